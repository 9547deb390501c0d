"use strict";
/* Draws what laws.js computes, and redraws it whenever a control moves. Every picture has the tokens of one response for its x axis. */
(() => {
  const TOKENS = 20; // of the response that is shown; it may be cut, or end by itself
  const LEFT = 34, RIGHT = 6; // pixels of a picture beside its tokens
  const FLOOR = 1e-3, CEILING = 10; // of the logarithmic axis
  const DASHES = { previous: "", critic: "7 3 2 3", zero: "2 4", none: "" };
  const $ = (id) => document.getElementById(id);
  const form = $("controls");

  // ------------------------------------------------------------------------------------------------------------- numbers

  /* All that the page shows, from the controls alone. */
  function compute(at) {
    const nodes = laws.WORLDS[at.world]();
    const path = laws.response(nodes, TOKENS, at.right);
    const truth = laws.solve(nodes, at.gamma);
    const critic = laws.ERRORS[at.error](nodes, truth.value, at.size);
    const rewards = path.map((p) => p.reward), values = path.map((p) => critic[p.node]);
    const waits = at.cutValue === "none", ended = waits || at.cut >= TOKENS, seen = ended ? TOKENS : at.cut;
    const rule = { gamma: at.gamma, lam: at.lam, cutValue: at.cutValue, cut: at.cut };
    const whole = laws.egae(rewards, values, { ...rule, cutValue: "none" });
    const told = ended ? whole : laws.egae(rewards.slice(0, seen), values.slice(0, seen), { ...rule, lastValue: values[seen] });
    const withCut = laws.expected(nodes, critic, rule), without = laws.expected(nodes, critic, { ...rule, cutValue: "none" });
    const limit = laws.bound(nodes, critic, rule);
    const known = path.slice(0, at.cut);
    const trains = laws.whoTrains(seen, !ended, at.tail);
    return {
      path, values, whole, told, seen, ended, waits, trains, truth: path.map((p) => truth.value[p.node]),
      bias: known.map((p) => Math.abs(withCut[p.node][p.token] - without[p.node][p.token])),
      limit: known.map((p) => limit[p.node][p.token]),
      standIn: ended ? null : laws.standIn(at.cutValue, values[seen - 1], values[seen]),
    };
  }

  function settings() {
    const data = new FormData(form), number = (id) => Number($(id).value);
    return { cut: number("cut"), lam: number("lam"), gamma: number("gamma"), size: number("size"), tail: number("tail"),
      error: $("error").value, world: $("world").value, cutValue: data.get("cutValue"), right: data.get("right") === "right" };
  }

  // ------------------------------------------------------------------------------------------------------------- drawing

  const fixed = (x, digits = 2) => (x < -0.5 * 10 ** -digits ? "−" : x >= 0.5 * 10 ** -digits ? "+" : "") + Math.abs(x).toFixed(digits);
  const plain = (x, digits = 2) => (x < -0.5 * 10 ** -digits ? "−" : "") + Math.abs(x).toFixed(digits);
  const small = (x) => (x < 1e-12 ? "0" : x < 0.001 ? x.toExponential(0).replace("-", "−") : x.toFixed(3));
  const tag = (name, attributes, text = "") =>
    `<${name} ${Object.entries(attributes).map(([k, v]) => `${k}="${v}"`).join(" ")}>${text}</${name}>`;
  const swatch = (inner, text) => `<span><svg viewBox="0 0 22 10" aria-hidden="true">${inner}</svg>${text}</span>`;

  /* An axis with room for `height` px: x of a token's left edge, y of a number between low and high. */
  function frame(id, height, low, high, marks, scale = (y) => y) {
    const svg = $(id), width = Math.max(svg.clientWidth, 240), top = 8, bottom = 16;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.style.height = `${height}px`;
    const x = (t) => LEFT + ((width - LEFT - RIGHT) * t) / TOKENS;
    const y = (v) => top + ((height - top - bottom) * (scale(high) - scale(v))) / (scale(high) - scale(low));
    const parts = marks.map(([v, label]) => tag("line", { x1: LEFT, x2: width - RIGHT, y1: y(v), y2: y(v), stroke: "var(--line)" })
      + tag("text", { x: LEFT - 6, y: y(v) + 4, "text-anchor": "end" }, label));
    for (let t = 0; t < TOKENS; t += 4) parts.push(tag("text", { x: x(t + 0.5), y: height - 2, "text-anchor": "middle" }, t));
    parts.push(tag("text", { x: width - RIGHT, y: height - 2, "text-anchor": "end" }, "token"));
    return { svg, x, y, parts, height, top, bottom, span: x(1) - x(0) };
  }

  function finish(f, found, label, colour) {
    const at = f.x(found.seen);
    if (!found.ended) {
      f.parts.unshift(tag("rect", { x: at, y: f.top, width: f.x(TOKENS) - at, height: f.height - f.top - f.bottom, fill: "var(--unseen)" }));
      f.parts.push(tag("line", { x1: at, x2: at, y1: f.top - 6, y2: f.height - f.bottom, stroke: "var(--ink)", "stroke-width": 2 })
        + tag("path", { d: `M${at - 6} ${f.top - 8}h12l-6 9z`, fill: "var(--ink)" }));
    }
    f.svg.innerHTML = tag("title", {}, label) + f.parts.join("");
    f.svg.style.setProperty("--rule", colour);
  }

  const polyline = (points, attributes) => points.length < 2 ? "" : tag("polyline", { points: points.map((p) => p.join(",")).join(" "), fill: "none", ...attributes });

  function drawValues(at, found, colour) {
    const top = Math.max(1, ...found.values.map(Math.abs), ...found.truth.map(Math.abs)) * 1.05;
    const f = frame("values", 112, -top, top, [[-1, "−1"], [0, "0"], [1, "1"]]);
    const dots = (list) => list.map((v, t) => [f.x(t), f.y(v)]);
    f.parts.push(polyline(dots(found.truth), { stroke: "var(--quiet)", "stroke-width": 5, opacity: 0.35 }));
    f.parts.push(polyline(dots(found.values), { stroke: "var(--quiet)", "stroke-width": 1.2, "stroke-dasharray": "3 3" }));
    f.parts.push(polyline(dots(found.values.slice(0, found.seen)), { stroke: "var(--ink)", "stroke-width": 2 }));
    if (found.standIn !== null) {
      const [x0, y0, x1, y1] = [f.x(found.seen - 1), f.y(found.values[found.seen - 1]), f.x(found.seen), f.y(found.standIn)];
      f.parts.push(tag("line", { x1: x0, y1: y0, x2: x1, y2: y1, stroke: colour, "stroke-width": 3, "stroke-dasharray": DASHES[at.cutValue] }));
      f.parts.push(tag("circle", { class: "moves", cx: x1, cy: y1, r: 6, fill: "var(--page)", stroke: colour, "stroke-width": 3 }));
    }
    const said = found.standIn === null ? (found.waits ? "nothing is cut" : "the response ends here, and an end is no cut")
      : `at the cut ${plain(found.standIn)} stands in; the critic would say ${plain(found.values[found.seen])}`;
    $("say-values").textContent = said;
    $("key-values").innerHTML = swatch('<path d="M0 5H22" stroke="var(--ink)" stroke-width="2"/>', "critic V")
      + swatch('<path d="M0 5H22" stroke="var(--quiet)" stroke-width="5" opacity=".35"/>', "true value")
      + (found.standIn === null ? "" : swatch(`<circle cx="11" cy="5" r="4" fill="var(--page)" stroke="${colour}" stroke-width="2.5"/>`, "stand-in at the cut"));
    finish(f, found, `Value of each state: ${said}.`, colour);
  }

  function drawAdvantages(at, found, colour) {
    const largest = Math.max(...found.whole.map(Math.abs), ...found.told.map(Math.abs));
    const top = [0.5, 1, 2, 4].find((limit) => largest <= limit) || largest;
    const f = frame("advantages", 132, -top, top, [[-top, plain(-top, 1)], [0, "0"], [top, plain(top, 1)]]);
    const bar = (t, v, inset, attributes) => tag("rect", { x: f.x(t) + inset, width: Math.max(f.span - 2 * inset, 1),
      y: Math.min(f.y(v), f.y(0)), height: Math.max(Math.abs(f.y(v) - f.y(0)), 0.01), ...attributes });
    found.whole.forEach((v, t) => f.parts.push(bar(t, v, 1, { fill: "none", stroke: "var(--quiet)", "stroke-width": 1.2 })));
    found.told.forEach((v, t) => f.parts.push(bar(t, v, f.span * 0.22, { class: "moves", fill: colour })
      + (Math.abs(f.y(v) - f.y(0)) < 2 ? tag("circle", { cx: f.x(t + 0.5), cy: f.y(v), r: 2.6, fill: colour }) : "")));
    const last = found.seen - 1;
    const said = found.waits ? `the whole response, known only when its last token is there`
      : found.ended ? "nothing is missing: it ended before the cut"
      : `token ${last}, the last one, is told ${fixed(found.told[last])}; with the rest known it would be ${fixed(found.whole[last])}`;
    $("say-advantages").textContent = said;
    $("key-advantages").innerHTML = swatch(`<rect x="6" y="0" width="8" height="10" fill="${colour}"/>`, "advantage now")
      + swatch('<rect x="5" y="1" width="11" height="8" fill="none" stroke="var(--quiet)" stroke-width="1.2"/>', "of the whole response");
    finish(f, found, `Advantage of each token: ${said}.`, colour);
  }

  function drawBias(at, found, colour) {
    const f = frame("bias", 132, FLOOR / 2, CEILING, [[FLOOR, "0.001"], [0.01, "0.01"], [0.1, "0.1"], [1, "1"], [10, "10"]], Math.log10);
    const y = (v) => f.y(Math.min(Math.max(v, FLOOR / 2), CEILING));
    const middle = (t) => f.x(t + 0.5);
    f.parts.push(polyline(found.limit.map((v, t) => [middle(t), y(v)]), { stroke: "var(--ink)", "stroke-width": 2, "stroke-dasharray": "6 3" }));
    found.bias.forEach((v, t) => {
      const zero = v < 1e-12;
      f.parts.push(tag("line", { x1: middle(t), x2: middle(t), y1: y(v), y2: f.y(FLOOR / 2), stroke: colour, "stroke-width": 2 })
        + tag("circle", { class: "moves", cx: middle(t), cy: y(v), r: 3.6, fill: zero ? "var(--page)" : colour, stroke: colour, "stroke-width": 1.6 }));
    });
    const most = Math.max(...found.bias), where = found.bias.indexOf(most), rate = at.gamma * at.lam;
    const said = found.waits ? "nothing is cut, so nothing is wrong with it"
      : most < 1e-12 ? "exactly 0 at every token of this response"
      : `largest ${small(most)} at token ${where}, where P4 allows ${small(found.limit[where])}; it fades by γλ = ${rate.toFixed(2)} a token`;
    $("say-bias").textContent = said;
    $("key-bias").innerHTML = swatch(`<circle cx="11" cy="5" r="4" fill="${colour}"/>`, "exact error of the average, |E[cut − uncut]|")
      + swatch('<path d="M0 5H22" stroke="var(--ink)" stroke-width="2" stroke-dasharray="6 3"/>', "P4's bound")
      + (found.bias.some((v) => v < 1e-12) ? swatch(`<circle cx="11" cy="5" r="3.5" fill="var(--page)" stroke="${colour}" stroke-width="1.6"/>`, "exactly 0") : "");
    finish(f, { ...found, seen: at.cut, ended: found.waits || at.cut >= TOKENS }, `Bias that the cut adds, by token: ${said}.`, colour);
  }

  /* What a token is to each of the two models: [fill, mark, words]. The mark says it without the colour. */
  const FATES = {
    policy: ["var(--previous)", "P", "the policy trains"], value: ["var(--value-model)", "V", "the value model trains"],
    tail: ["none", "×", "tail: left out"], later: ["none", "…", "later: the response still runs"], unseen: ["none", "", "not sampled yet"],
  };

  function fates(found) {
    return found.path.map((_, t) => t >= found.seen ? ["unseen", "unseen"]
      : [found.trains.policy[t] ? "policy" : "tail", found.trains.value[t] ? "value" : "later"]);
  }

  function drawMasks(at, found, colour) {
    const f = frame("masks", 74, 0, 1, []);
    ["policy", "value"].forEach((who, row) => {
      const y = 6 + row * 26;
      f.parts.push(tag("text", { x: LEFT - 6, y: y + 15, "text-anchor": "end" }, who));
      fates(found).forEach((fate, t) => {
        const [fill, mark] = FATES[fate[row]];
        f.parts.push(tag("rect", { x: f.x(t) + 1, y, width: f.span - 2, height: 22, rx: 3, fill, "data-fate": fate[row],
          stroke: fill === "none" ? (fate[row] === "tail" ? "var(--tail)" : "var(--line)") : "none" })
          + tag("text", { x: f.x(t + 0.5), y: y + 15.5, "text-anchor": "middle",
            style: `fill: ${fill === "none" ? (fate[row] === "tail" ? "var(--tail)" : "var(--quiet)") : "var(--page)"}; font-weight: 600` }, mark));
      });
    });
    const trained = found.trains.policy.filter(Boolean).length, valued = found.trains.value.filter(Boolean).length;
    const said = found.waits ? `both models, but only after token ${TOKENS - 1}: until then the machine waits`
      : found.ended ? "both models: the response has ended"
      : `the policy on ${trained} of ${found.seen} tokens; the value model on none, for the response has no return yet`;
    $("say-masks").textContent = said;
    const used = [...new Set(fates(found).flat())].filter((name) => name !== "unseen");
    $("key-masks").innerHTML = used.map((name) => `<span><b>${FATES[name][1]}</b> ${FATES[name][2]}</span>`).join("");
    finish(f, { ...found, ended: true }, `Who trains: ${said}.`, colour);
  }

  function tabulate(at, found) {
    const cells = found.path.map((p, t) => {
      const [policy, value] = fates(found)[t].map((name) => FATES[name][2].replace("the policy ", "").replace("the value model ", ""));
      return [t, p.name, plain(found.values[t], 3), t < found.seen ? plain(found.told[t], 3) : "", plain(found.whole[t], 3),
        t < at.cut ? small(found.bias[t]) : "", t < at.cut ? small(found.limit[t]) : "", policy, value];
    });
    $("numbers").tBodies[0].innerHTML = cells.map((row, t) =>
      `<tr class="${t < found.seen ? "" : "unseen"}">${row.map((x) => `<td>${x}</td>`).join("")}</tr>`).join("");
  }

  function draw() {
    const at = settings(), found = compute(at), colour = `var(--${at.cutValue})`;
    document.documentElement.style.setProperty("--rule", colour);
    $("out-cut").textContent = at.cut === 1 ? "1 token" : `${at.cut} tokens`;
    $("out-lam").textContent = at.lam.toFixed(2);
    $("out-gamma").textContent = at.gamma.toFixed(2);
    $("out-size").textContent = at.size === 0 ? "none" : fixed(at.size);
    $("out-tail").textContent = at.tail === 1 ? "1 token" : `${at.tail} tokens`;
    drawValues(at, found, colour);
    drawAdvantages(at, found, colour);
    drawBias(at, found, colour);
    drawMasks(at, found, colour);
    tabulate(at, found);
    $("said").textContent = story(at, found);
  }

  /* The picture in words. */
  function story(at, found) {
    if (found.waits) return `Nothing is cut: every token gets the advantage of the whole response, and ${TOKENS} tokens must be decoded before anyone learns anything.`;
    if (found.ended) return "The response ended by itself, so no rule is needed: all rules agree, and both models train on all of it.";
    const last = found.seen - 1, told = found.told[last], whole = found.whole[last];
    const credit = { previous: "V does not move at the cut, so the last token gets its own reward and nothing else",
      critic: "the last token gets what the critic saw happen, right or wrong",
      zero: "the whole value of the response so far is taken away at the cut, and the last tokens are blamed for it" }[at.cutValue];
    return `Cut after ${at.cut} tokens under “${at.cutValue}”: ${credit}. Token ${last} is told ${fixed(told)} instead of ${fixed(whole)}.`;
  }

  // -------------------------------------------------------------------------------------------------------------- events

  form.addEventListener("input", draw);
  form.addEventListener("reset", () => setTimeout(draw));
  form.addEventListener("submit", (event) => event.preventDefault());
  document.querySelectorAll("figure > svg").forEach((svg) => {
    const move = (event) => {
      const box = svg.getBoundingClientRect();
      const t = ((event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT)) * TOKENS;
      $("cut").value = Math.min(TOKENS, Math.max(1, Math.round(t)));
      draw();
    };
    svg.addEventListener("pointerdown", (event) => { svg.setPointerCapture(event.pointerId); move(event); });
    svg.addEventListener("pointermove", (event) => { if (svg.hasPointerCapture(event.pointerId)) move(event); });
  });
  new ResizeObserver(draw).observe(document.querySelector(".pictures"));

  /* Inside a page of the site its light or dark counts; alone, what the site's switch was left at; else the reader's system. */
  function follow() {
    let scheme = null;
    try { scheme = inside ? window.parent.document.body.dataset.mdColorScheme : left(); } catch { /* another origin, or no storage */ }
    if (scheme) document.documentElement.dataset.scheme = scheme === "slate" ? "dark" : "light";
    else delete document.documentElement.dataset.scheme;
    return scheme;
  }
  function left() {  // where Material keeps its switch: under the path of the site's root
    const { color } = JSON.parse(localStorage.getItem(new URL("..", location).pathname + ".__palette")) || {};
    return color && color.media !== "(prefers-color-scheme)" ? color.scheme : null;
  }
  const inside = window.parent !== window;
  if (follow() && inside) new MutationObserver(follow).observe(window.parent.document.body, { attributeFilter: ["data-md-color-scheme"] });
  window.addEventListener("storage", follow);  // the switch, in another tab
  draw();
})();
