"""A token graph unrolled over the tokens so far: nodes and edges as arrays, layer by layer, and policies on them.

A response walks over a graph of states, one token a step, until an end token or the length cap. A *node* is a state reached after t
tokens, so the length cap is part of the state, every node is passed at most once, and what token_mdp.py says of it is exact.

Suffixes, in all of sim/lab: S states, A tokens, N nodes, E edges of nodes, e edges of the graph, B trajectories, T their tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sim.lab.checks import Floats, Ints, check_count, check_shape, check_unit, integers, vector
from tppo_ref.method.records import End

ENDED = -1  # in place of the next state or node, where the response ended
TOLERANCE = 1e-9  # by which probabilities may miss 1; they are scaled to sum to 1 exactly


class Edges(NamedTuple):
    """The graph, one entry per outcome: in `state`, `token` leads with probability `prob` to `next`, for `reward`.

    `next` is ENDED where the token ends the response. A (state, token) without entries is illegal; with several, the outcome is
    drawn (a noisy verifier: two entries that differ in reward), and their probabilities sum to 1.
    """

    state: ArrayLike
    token: ArrayLike
    prob: ArrayLike
    reward: ArrayLike
    next: ArrayLike


class Unrolled:
    """A finite-horizon token graph, unrolled into nodes when it is built.

    num_states, num_tokens   of the graph
    edges                    `Edges`, arrays of one length
    max_tokens               length cap: with that many tokens a response ends as LENGTH_CAP, unless the last is an end token
    gamma                    discount in [0, 1]
    start_S                  probability of each first state ("the prompt"); default: state 0
    cap_reward_S             added to the last token's reward where a response reaches the cap in state s; default 0
    state_names, token_names for people; default: numbers

    After construction, all nodes and edges that a response can meet, whatever the policy, layer by layer:
        layer_T     [max_tokens + 1], the nodes of depth t are layer_T[t] .. layer_T[t + 1] - 1
        state_N, depth_N;  start_N: probability that a response begins at n
        legal_NA    bool
        edge_N      [N + 1], the edges of node n are edge_N[n] .. edge_N[n + 1] - 1
        node_E, token_E, prob_E (given the token), reward_E, next_E (ENDED or a node), end_E (an `End`)

    Raises ValueError for shapes, ranges, probabilities that do not sum to 1, rewards that are not finite, a state that a response
    can reach and not leave, and an MDP in which no end token can be sampled within the cap.
    """

    def __init__(
        self,
        *,
        num_states: int,
        num_tokens: int,
        edges: Edges,
        max_tokens: int,
        gamma: float = 1.0,
        start_S: ArrayLike | None = None,
        cap_reward_S: ArrayLike | None = None,
        name: str = "",
        state_names: tuple[str, ...] = (),
        token_names: tuple[str, ...] = (),
    ):
        self.num_states, self.num_tokens = check_count("num_states", num_states), check_count("num_tokens", num_tokens)
        self.max_tokens, self.gamma, self.name = check_count("max_tokens", max_tokens), check_unit("gamma", gamma), name
        self.state_names = state_names or tuple(map(str, range(num_states)))
        self.token_names = token_names or tuple(map(str, range(num_tokens)))
        for what, names, number in (("state_names", state_names, num_states), ("token_names", token_names, num_tokens)):
            if names and len(names) != number:
                raise ValueError(f"{what}: got {len(names)} names; expected {number}")
        start_S = vector("start_S", np.arange(num_states) == 0 if start_S is None else start_S, num_states)
        if (start_S < 0).any() or abs(start_S.sum() - 1) > TOLERANCE:
            raise ValueError(f"start_S: got a sum of {start_S.sum()}; expected probabilities that sum to 1")
        cap_reward_S = vector("cap_reward_S", np.zeros(num_states) if cap_reward_S is None else cap_reward_S, num_states)
        self._unroll(self._checked(edges), start_S / start_S.sum(), cap_reward_S)

    # --------------------------------------------------------------------------------------------------------- construction

    def _checked(self, edges: Edges) -> tuple[Ints, Ints, Floats, Floats, Ints]:
        """The edges as arrays, sorted by state and token, impossible outcomes dropped."""
        num = np.asarray(edges.state).size
        state, token, next_ = (
            integers(f"edges.{name}", getattr(edges, name), num, low, high)
            for name, low, high in (("state", 0, self.num_states), ("token", 0, self.num_tokens), ("next", ENDED, self.num_states))
        )
        prob, reward = vector("edges.prob", edges.prob, num), vector("edges.reward", edges.reward, num)
        if (prob < 0).any():
            raise ValueError(f"edges.prob: got {prob.min()}; expected probabilities")
        pair = state * self.num_tokens + token
        total = np.bincount(pair, prob, minlength=self.num_states * self.num_tokens)
        given = np.bincount(pair, minlength=len(total)) > 0
        bad = given & (np.abs(total - 1) > TOLERANCE)
        if bad.any():
            s, a = divmod(int(np.flatnonzero(bad)[0]), self.num_tokens)
            raise ValueError(f"edges.prob: got a sum of {total[bad][0]} for state {s}, token {a}; expected 1")
        kept = np.flatnonzero(prob > 0)
        kept = kept[np.argsort(pair[kept], kind="stable")]
        return state[kept], token[kept], (prob / total[pair])[kept], reward[kept], next_[kept]

    def _unroll(self, edges: tuple[Ints, Ints, Floats, Floats, Ints], start_S: Floats, cap_reward_S: Floats) -> None:
        state_e, token_e, prob_e, reward_e, next_e = edges
        first_S = np.searchsorted(state_e, np.arange(self.num_states + 1))
        states, base = np.flatnonzero(start_S), 0
        layers: list[Ints] = []
        parts: list[tuple[Ints, ...]] = []  # per layer: (graph edge, node, next node, end)
        for depth in range(self.max_tokens):
            count = first_S[states + 1] - first_S[states]
            if (count == 0).any():
                stuck = self.state_names[int(states[count == 0][0])]
                raise ValueError(f"edges: got no token for state {stuck}, reached after {depth} tokens; expected at least one")
            node = np.repeat(np.arange(len(states)), count)
            e = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + first_S[states[node]]
            end = np.where(next_e[e] == ENDED, End.END_TOKEN, End.LENGTH_CAP if depth + 1 == self.max_tokens else End.RUNNING)
            live = end == End.RUNNING
            following, place = np.unique(next_e[e[live]], return_inverse=True)
            next_node = np.full(len(e), ENDED)
            next_node[live] = base + len(states) + place
            layers.append(states)
            parts.append((e, base + node, next_node, end))
            base += len(states)
            states = following
            if not len(states):
                break
        e, self.node_E, self.next_E, self.end_E = (np.concatenate(x) for x in zip(*parts, strict=True))
        if not (self.end_E == End.END_TOKEN).any():
            raise ValueError(f"edges: got no end token within max_tokens = {self.max_tokens}; expected an end that can be reached")
        self.state_N = np.concatenate(layers)
        sizes = [len(layer) for layer in layers]
        self.layer_T = np.cumsum([0, *sizes, *[0] * (self.max_tokens - len(sizes))])
        self.depth_N = np.repeat(np.arange(len(sizes)), sizes)
        self.num_nodes = len(self.state_N)
        self.start_N = np.zeros(self.num_nodes)
        self.start_N[: sizes[0]] = start_S[layers[0]]
        self.token_E, self.prob_E = token_e[e], prob_e[e]
        capped = self.end_E == End.LENGTH_CAP
        self.reward_E = reward_e[e] + np.where(capped, cap_reward_S[next_e[e]], 0.0)
        self.edge_N = np.searchsorted(self.node_E, np.arange(self.num_nodes + 1))
        self.legal_NA = np.zeros((self.num_nodes, self.num_tokens), dtype=bool)
        self.legal_NA[self.node_E, self.token_E] = True

    # -------------------------------------------------------------------------------------------------------------- policies

    def by_node(self, x_S: ArrayLike) -> NDArray:
        """Something per state, [S, ...], as something per node, [N, ...]."""
        x_S = np.asarray(x_S)
        if x_S.ndim == 0 or len(x_S) != self.num_states:
            raise ValueError(f"x_S: got shape {list(x_S.shape)}; expected one entry per state, {self.num_states}")
        return x_S[self.state_N]

    def by_state(self, x_N: ArrayLike) -> Floats:
        """Something per node, [N, ...], summed over the nodes of each state, [S, ...]: gradients of shared logits add up."""
        x_N = np.asarray(x_N, dtype=np.float64)
        if x_N.ndim == 0 or len(x_N) != self.num_nodes:
            raise ValueError(f"x_N: got shape {list(x_N.shape)}; expected one entry per node, {self.num_nodes}")
        x_S = np.zeros((self.num_states, *x_N.shape[1:]))
        np.add.at(x_S, self.state_N, x_N)
        return x_S

    def uniform(self) -> Floats:
        """The policy that draws among the legal tokens of each node. [N, A]."""
        return self.legal_NA / self.legal_NA.sum(1, keepdims=True)

    def softmax(self, logits_NA: ArrayLike) -> Floats:
        """Policy [N, A] of logits [N, A]; illegal tokens get 0, whatever their logits."""
        logits_NA = check_shape("logits_NA", logits_NA, self.legal_NA.shape)
        if not np.isfinite(logits_NA[self.legal_NA]).all():
            raise ValueError("logits_NA: got NaN or infinity; expected finite numbers on the legal tokens")
        legal = np.where(self.legal_NA, logits_NA, -np.inf)
        weight_NA = np.exp(legal - legal.max(1, keepdims=True))
        return weight_NA / weight_NA.sum(1, keepdims=True)

    def check_policy(self, policy_NA: ArrayLike) -> Floats:
        """`policy_NA` as float64 [N, A]. ValueError where rows do not sum to 1 or an illegal token has a probability."""
        per_state = np.shape(policy_NA) == (self.num_states, self.num_tokens)
        hint = "; use by_node for a policy per state" if per_state else ""
        policy_NA = check_shape("policy_NA", policy_NA, self.legal_NA.shape, hint)
        if not (policy_NA >= 0).all() or (policy_NA[~self.legal_NA] > 0).any():
            raise ValueError("policy_NA: got other numbers; expected probabilities, 0 on illegal tokens")
        total_N = policy_NA.sum(1)
        if not (np.abs(total_N - 1) <= TOLERANCE).all():
            worst = int(np.argmax(np.abs(total_N - 1)))
            raise ValueError(f"policy_NA: got a sum of {total_N[worst]} at node {worst}; expected 1")
        return policy_NA / total_N[:, None]

    def joint(self, policy_NA: Floats) -> Floats:
        """Probability of each edge given its node: of the token and of the outcome."""
        return policy_NA[self.node_E, self.token_E] * self.prob_E

    def layers(self, *, backwards: bool = False) -> list[tuple[int, int]]:
        """(first, stop) of every layer that has nodes."""
        bounds = [(int(a), int(b)) for a, b in zip(self.layer_T, self.layer_T[1:], strict=False) if b > a]
        return bounds[::-1] if backwards else bounds
