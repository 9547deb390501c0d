"use strict";
/*
What a cut does to advantages, exactly: the formulas of the page's widget, without the page.

  egae            tppo_ref/method/advantages.py      advantages of one row of tokens
  whoTrains       tppo_ref/method/masks.py           the token filter
  WORLDS          sim/lab/instances.py               three token MDPs, with the policy under which they are looked at
  solve           sim/lab/token_mdp.py               V, A and visits of that policy
  expected        sim/lab/bias.py                    E[estimate | s_t, a_t]: by a recursion, where sim enumerates all rows
  bound           sim/lab/bounds.py                  theorem P4 of docs/theory.md

tests/pages/test_widget.py holds every one of them to its Python counterpart, in a real browser, to 1e-9. A plain script and no module,
so that the page also opens from a folder. cutValue is the code's CutValue: "previous", "critic", "zero"; and "none": nothing is cut.
*/
const laws = (() => {
  const CUT_VALUES = ["previous", "critic", "zero", "none"];

  /* A_t = delta_t + gamma lam A_{t+1} over one row; after its last token V is what the cut rule says, and 0 at an end ("none"). */
  function egae(rewards, values, { gamma, lam, cutValue, lastValue = 0 }) {
    const advantages = new Array(rewards.length);
    let after = standIn(cutValue, values[values.length - 1], lastValue);
    let next = 0;
    for (let t = rewards.length - 1; t >= 0; t--) {
      next = rewards[t] + gamma * after - values[t] + gamma * lam * next;
      advantages[t] = next;
      after = values[t];
    }
    return advantages;
  }

  /* What stands for V(s_l) at a cut; previous is V(s_{l-1}), own is the critic's V(s_l). */
  function standIn(cutValue, previous, own) {
    return { previous, critic: own, zero: 0, none: 0 }[cutValue];
  }

  /* Per token what becomes of it in this step, for a response of which `sampled` tokens are there and all belong to this window. */
  function whoTrains(sampled, cut, tail) {
    const policy = [], value = [];
    for (let t = 0; t < sampled; t++) {
      policy.push(!cut || t < sampled - tail);
      value.push(!cut);
    }
    return { policy, value };
  }

  // ------------------------------------------------------------------------------------------------------------- worlds
  // A world is a list of nodes in order of depth. A node: {depth, tokens: [{name, prob, outcomes: [{prob, reward, next}]}]},
  // next null at an end. prob of a token is the policy's; tokens that the policy cannot take are null.

  const verdict = (right) => [[1, right], [-1, 1 - right]].filter(([, prob]) => prob > 0)
    .map(([reward, prob]) => ({ prob, reward, next: null }));
  const step = (next) => [{ prob: 1, reward: 0, next }];

  function chain(length, pEnd, rightAt, names) {
    return Array.from({ length }, (_, i) => {
      const last = i === length - 1;
      const on = last ? null : { name: names[0], prob: 1 - pEnd, outcomes: step(i + 1) };
      return { depth: i, tokens: [on, { name: names[1], prob: last ? 1 : pEnd, outcomes: verdict(rightAt(i)) }] };
    });
  }

  function calmChain({ length = 24, pEnd = 0.08, first = 0.35, last = 0.65 } = {}) {
    return chain(length, pEnd, (i) => first + (i * (last - first)) / (length - 1), ["on", "end"]);
  }

  function thinking({ length = 24, pEnd = 0.1, start = 0.2, gain = 0.15 } = {}) {
    return chain(length, pEnd, (i) => 1 - (1 - start) * (1 - gain) ** i, ["think", "answer"]);
  }

  function decision({ length = 24, at = 12, pGood = 0.7, pEnd = 0.15 } = {}) {
    const rest = length - at - 1;
    const nodes = Array.from({ length: at }, (_, i) => ({ depth: i, tokens: [{ name: "on", prob: 1, outcomes: step(i + 1) }, null] }));
    nodes.push({ depth: at, tokens: [
      { name: "right", prob: pGood, outcomes: step(at + 1) }, { name: "wrong", prob: 1 - pGood, outcomes: step(at + 2) },
    ] });
    for (let i = 0; i < rest; i++) {
      [1, -1].forEach((reward, side) => {
        const last = i === rest - 1;
        const on = last ? null : { name: "on", prob: 1 - pEnd, outcomes: step(at + 1 + 2 * (i + 1) + side) };
        nodes.push({ depth: at + 1 + i, tokens: [on, { name: "end", prob: last ? 1 : pEnd, outcomes: [{ prob: 1, reward, next: null }] }] });
      });
    }
    return nodes;
  }

  const WORLDS = { "cliff": decision, "calm chain": calmChain, "thinking": thinking };

  /* The nodes and tokens of one response of `length` tokens that goes on as long as it may, and its rewards. */
  function response(nodes, length, right) {
    const path = [];
    for (let at = 0; at !== null;) {
      const end = path.length === length - 1;
      const [first, second] = nodes[at].tokens;
      const forks = second && second.outcomes[0].next !== null; // the deciding token
      const token = forks ? (right ? 0 : 1) : end || !first ? 1 : 0;
      const outcomes = nodes[at].tokens[token].outcomes;
      const outcome = outcomes.find((o) => o.next !== null || o.reward === (right ? 1 : -1)) || outcomes[0];
      path.push({ node: at, token, reward: outcome.reward, name: nodes[at].tokens[token].name });
      at = outcome.next;
    }
    return path;
  }

  // -------------------------------------------------------------------------------------------------------- exact numbers

  /* q[node][token], null for tokens that cannot be taken, by one sweep from the last node to the first; f(node, outcome) is what
     an outcome is worth, given the averages of all deeper nodes. */
  function sweep(nodes, worth) {
    const average = new Array(nodes.length).fill(0);
    const q = new Array(nodes.length);
    for (let n = nodes.length - 1; n >= 0; n--) {
      q[n] = nodes[n].tokens.map((token) => token && token.outcomes.reduce((sum, o) => sum + o.prob * worth(n, o, average), 0));
      nodes[n].tokens.forEach((token, a) => { if (token) average[n] += token.prob * q[n][a]; });
    }
    return { q, average };
  }

  /* V^pi [node], A^pi [node][token], visits [node]. */
  function solve(nodes, gamma) {
    const { q, average: value } = sweep(nodes, (n, o, v) => o.reward + gamma * (o.next === null ? 0 : v[o.next]));
    const visits = new Array(nodes.length).fill(0);
    visits[0] = 1;
    nodes.forEach((node, n) => node.tokens.forEach((token) => token && token.outcomes.forEach((o) => {
      if (o.next !== null) visits[o.next] += visits[n] * token.prob * o.prob;
    })));
    return { value, advantage: q.map((row, n) => row.map((x) => x === null ? null : x - value[n])), visits };
  }

  /* Critics that are wrong by a size: evenly more with depth, in turn too high and too low, or too small by that share. */
  const ERRORS = {
    drift: (nodes, value, size) => value.map((v, n) => v + (size * nodes[n].depth) / nodes[nodes.length - 1].depth),
    rough: (nodes, value, size) => value.map((v, n) => v + (nodes[n].depth % 2 ? -size : size)),
    shrunk: (nodes, value, size) => value.map((v) => (1 - size) * v),
  };

  /* E[estimate | s_t, a_t] of the tokens before the cut after `cut` tokens, [node][token]: over everything that can follow. */
  function expected(nodes, critic, { cut, gamma, lam, cutValue }) {
    return sweep(nodes, (n, o, later) => {
      const isCut = cutValue !== "none" && o.next !== null && nodes[o.next].depth === cut;
      const after = o.next === null ? 0 : isCut ? standIn(cutValue, critic[n], critic[o.next]) : critic[o.next];
      const trace = o.next === null || isCut ? 0 : later[o.next];
      return o.reward + gamma * after - critic[n] + gamma * lam * trace;
    }).q;
  }

  /* P4: |E[A_t - B_t | s_t, a_t]| <= (gamma lam)^(n-1) gamma P(T > l | s_t, a_t) [step + lam |e| (1 + gamma (1-lam) / (1-gamma lam))] */
  function bound(nodes, critic, { cut, gamma, lam, cutValue }) {
    const { value, visits } = solve(nodes, gamma);
    let largestStep = 0, largestError = 0, largestValue = 0;
    nodes.forEach((node, n) => {
      if (!visits[n]) return;
      largestError = Math.max(largestError, Math.abs(critic[n] - value[n]));
      largestValue = Math.max(largestValue, Math.abs(critic[n]));
      node.tokens.forEach((token) => token && token.prob > 0 && token.outcomes.forEach((o) => {
        if (o.next !== null) largestStep = Math.max(largestStep, Math.abs(critic[o.next] - critic[n]));
      }));
    });
    const miss = { previous: largestStep, critic: 0, zero: largestValue, none: 0 }[cutValue];
    const later = lam < 1 ? (gamma * (1 - lam)) / (1 - gamma * lam) : 0;
    const bracket = miss + lam * largestError * (1 + later);
    const alive = sweep(nodes, (n, o, p) => o.next === null ? 0 : nodes[o.next].depth >= cut ? 1 : p[o.next]).q;
    const weight = (n) => cutValue === "none" ? 0 : (gamma * lam) ** (cut - nodes[n].depth - 1) * gamma * bracket;
    return alive.map((row, n) => row.map((p) => p === null || nodes[n].depth >= cut ? null : p * weight(n)));
  }

  return { CUT_VALUES, ERRORS, WORLDS, bound, calmChain, decision, egae, expected, response, solve, standIn, thinking, whoTrains };
})();
