"""Token MDPs about which everything is known: V, Q, A, visits, the return's distribution, the policy gradient, every trajectory.

A response walks over a graph of states, one token a step, until an end token or the length cap. The graph is unrolled over the
tokens so far: a *node* is a state reached after t tokens, so the length cap is part of the state and all of this is exact dynamic
programming over layers, in float64. Nothing here knows of windows, critics or estimators (bias.py does).

Suffixes: S states, A tokens, N nodes, E edges of nodes, e edges of the graph, B trajectories, T tokens of a response.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tppo_ref.method.records import End

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
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


@dataclasses.dataclass(frozen=True)
class Solution:
    """What is true of a policy. Illegal tokens have q and advantage 0.

    value_N       V(n): expected discounted rewards from node n on
    q_NA          Q(n, a) = E[r + gamma V(next)]
    advantage_NA  Q - V
    visits_N      probability that a response passes node n (every node is passed at most once)
    ends_E        probability that a response ends with edge e, 0 where the edge leads on
    length_T      [max_tokens + 1], probability that a response has t tokens
    mean_return   expected return of a response: V averaged over the start
    """

    value_N: Floats
    q_NA: Floats
    advantage_NA: Floats
    visits_N: Floats
    ends_E: Floats
    length_T: Floats
    mean_return: float


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """Stretches of responses, enumerated or sampled. Right-padded; outside the mask nodes, tokens and edges are -1, rewards 0.

    prob_B       probability of each (1 / B for samples)
    node_BT      the node before token t;  token_BT, edge_BT, reward_BT: what was chosen there, what it led to, what it gave
    mask_BT      True on the tokens that exist
    end_B        `End` after the last token; RUNNING: the stretch was cut there
    next_node_B  the live node after the last token of a RUNNING row, else ENDED
    """

    prob_B: Floats
    node_BT: Ints
    token_BT: Ints
    edge_BT: Ints
    reward_BT: Floats
    mask_BT: NDArray[np.bool_]
    end_B: Ints
    next_node_B: Ints

    def __len__(self) -> int:
        return len(self.prob_B)

    @property
    def cut_B(self) -> NDArray[np.bool_]:
        return self.end_B == End.RUNNING


class TokenMDP:
    """A finite-horizon token MDP, unrolled into nodes when it is built.

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
        for what, number in (("num_states", num_states), ("num_tokens", num_tokens), ("max_tokens", max_tokens)):
            if not isinstance(number, int | np.integer) or number < 1:
                raise ValueError(f"{what} is {number!r}, expected an integer of at least 1")
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma is {gamma!r}, expected a number in [0, 1]")
        self.num_states, self.num_tokens, self.max_tokens = int(num_states), int(num_tokens), int(max_tokens)
        self.gamma, self.name = float(gamma), name
        self.state_names = state_names or tuple(map(str, range(num_states)))
        self.token_names = token_names or tuple(map(str, range(num_tokens)))
        for what, names, number in (("state_names", state_names, num_states), ("token_names", token_names, num_tokens)):
            if names and len(names) != number:
                raise ValueError(f"{what} holds {len(names)} names, expected {number}")
        start_S = _vector("start_S", np.arange(num_states) == 0 if start_S is None else start_S, num_states)
        if (start_S < 0).any() or abs(start_S.sum() - 1) > TOLERANCE:
            raise ValueError(f"start_S sums to {start_S.sum()}, expected probabilities that sum to 1")
        cap_reward_S = _vector("cap_reward_S", np.zeros(num_states) if cap_reward_S is None else cap_reward_S, num_states)
        self._unroll(self._checked(edges), start_S / start_S.sum(), cap_reward_S)

    # --------------------------------------------------------------------------------------------------------- construction

    def _checked(self, edges: Edges) -> tuple[Ints, Ints, Floats, Floats, Ints]:
        """The edges as arrays, sorted by state and token, impossible outcomes dropped."""
        num = np.asarray(edges.state).size
        state, token, next_ = (
            _integers(f"edges.{name}", getattr(edges, name), num, low, high)
            for name, low, high in (("state", 0, self.num_states), ("token", 0, self.num_tokens), ("next", ENDED, self.num_states))
        )
        prob, reward = _vector("edges.prob", edges.prob, num), _vector("edges.reward", edges.reward, num)
        if (prob < 0).any():
            raise ValueError(f"edges.prob holds {prob.min()}, expected probabilities")
        pair = state * self.num_tokens + token
        total = np.bincount(pair, prob, minlength=self.num_states * self.num_tokens)
        given = np.bincount(pair, minlength=len(total)) > 0
        bad = given & (np.abs(total - 1) > TOLERANCE)
        if bad.any():
            s, a = divmod(int(np.flatnonzero(bad)[0]), self.num_tokens)
            raise ValueError(f"edges.prob sums to {total[bad][0]} for state {s}, token {a}, expected 1")
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
                raise ValueError(f"edges: state {stuck} is reached after {depth} tokens and has no token, expected at least one")
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
            raise ValueError(f"edges: no end token can be sampled within max_tokens = {self.max_tokens}: the end is unreachable")
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
            raise ValueError(f"expected one entry per state, {self.num_states}, got shape {list(x_S.shape)}")
        return x_S[self.state_N]

    def by_state(self, x_N: ArrayLike) -> Floats:
        """Something per node, [N, ...], summed over the nodes of each state, [S, ...]: gradients of shared logits add up."""
        x_N = np.asarray(x_N, dtype=np.float64)
        if x_N.ndim == 0 or len(x_N) != self.num_nodes:
            raise ValueError(f"expected one entry per node, {self.num_nodes}, got shape {list(x_N.shape)}")
        x_S = np.zeros((self.num_states, *x_N.shape[1:]))
        np.add.at(x_S, self.state_N, x_N)
        return x_S

    def uniform(self) -> Floats:
        """The policy that draws among the legal tokens of each node. [N, A]."""
        return self.legal_NA / self.legal_NA.sum(1, keepdims=True)

    def softmax(self, logits_NA: ArrayLike) -> Floats:
        """Policy [N, A] of logits [N, A]; illegal tokens get 0, whatever their logits."""
        logits_NA = np.asarray(logits_NA, dtype=np.float64)
        if logits_NA.shape != self.legal_NA.shape:
            raise ValueError(f"logits_NA: expected shape {list(self.legal_NA.shape)}, got {list(logits_NA.shape)}")
        if not np.isfinite(logits_NA[self.legal_NA]).all():
            raise ValueError("logits_NA: expected finite numbers on the legal tokens")
        legal = np.where(self.legal_NA, logits_NA, -np.inf)
        weight_NA = np.exp(legal - legal.max(1, keepdims=True))
        return weight_NA / weight_NA.sum(1, keepdims=True)

    def check_policy(self, policy_NA: ArrayLike) -> Floats:
        """`policy_NA` as float64 [N, A]. ValueError where rows do not sum to 1 or an illegal token has a probability."""
        policy_NA = np.asarray(policy_NA, dtype=np.float64)
        if policy_NA.shape != self.legal_NA.shape:
            per_state = policy_NA.shape == (self.num_states, self.num_tokens)
            hint = "; use by_node for a policy per state" if per_state else ""
            raise ValueError(f"policy_NA: expected shape {list(self.legal_NA.shape)}, got {list(policy_NA.shape)}{hint}")
        if not (policy_NA >= 0).all() or (policy_NA[~self.legal_NA] > 0).any():
            raise ValueError("policy_NA: expected probabilities, 0 on illegal tokens")
        total_N = policy_NA.sum(1)
        if not (np.abs(total_N - 1) <= TOLERANCE).all():
            worst = int(np.argmax(np.abs(total_N - 1)))
            raise ValueError(f"policy_NA: node {worst} sums to {total_N[worst]}, expected 1")
        return policy_NA / total_N[:, None]

    # ------------------------------------------------------------------------------------------------------- what is exact

    def solve(self, policy_NA: ArrayLike) -> Solution:
        """V, Q, A backwards over the layers, visits and lengths forwards. Time and memory are linear in nodes and edges."""
        policy_NA = self.check_policy(policy_NA)
        value_N, q_NA = self.evaluate(policy_NA)
        advantage_NA = np.where(self.legal_NA, q_NA - value_N[:, None], 0.0)
        visits_N = self.visits(policy_NA)
        ends_E = np.where(self.next_E == ENDED, visits_N[self.node_E] * self._joint(policy_NA), 0.0)
        length_T = np.bincount(self.depth_N[self.node_E] + 1, ends_E, minlength=self.max_tokens + 1).astype(np.float64)
        return Solution(value_N, q_NA, advantage_NA, visits_N, ends_E, length_T, float(self.start_N @ value_N))

    def evaluate(self, policy_NA: Floats) -> tuple[Floats, Floats]:
        """V [N] and Q [N, A] of a checked policy."""
        value_N, q_NA = np.zeros(self.num_nodes), np.zeros(self.legal_NA.shape)
        pair_E = self.node_E * self.num_tokens + self.token_E
        for first, stop in self._layers(backwards=True):
            edges = slice(self.edge_N[first], self.edge_N[stop])
            next_ = self.next_E[edges]
            gain = self.prob_E[edges] * (self.reward_E[edges] + self.gamma * np.where(next_ == ENDED, 0.0, value_N[next_]))
            size = (stop - first) * self.num_tokens
            q_NA[first:stop] = np.bincount(pair_E[edges] - first * self.num_tokens, gain, minlength=size).reshape(stop - first, -1)
            value_N[first:stop] = (policy_NA[first:stop] * q_NA[first:stop]).sum(1)
        return value_N, q_NA

    def visits(self, policy_NA: ArrayLike, start_N: Floats | None = None) -> Floats:
        """Probability of passing each node [N], from the start or from any weights on nodes."""
        joint_E = self._joint(self.check_policy(policy_NA))
        visits_N = self.start_N.copy() if start_N is None else _vector("start_N", start_N, self.num_nodes).copy()
        for first, stop in self._layers():
            edges = slice(self.edge_N[first], self.edge_N[stop])
            live_E = self.next_E[edges] != ENDED
            following_E = self.next_E[edges][live_E] - stop  # the next layer begins where this one stops
            flow_E = (visits_N[self.node_E[edges]] * joint_E[edges])[live_E]
            arrived = np.bincount(following_E, flow_E)
            visits_N[stop : stop + len(arrived)] += arrived
        return visits_N

    def score_function(self, policy_NA: ArrayLike, credit_NA: ArrayLike, weight_N: ArrayLike) -> Floats:
        """E[sum_t c(n_t, a_t) grad log pi(a_t | n_t)] by softmax logits [N, A], for a credit c and node weights (visits).

        Of a softmax it is weight(n) pi(a|n) (c(n, a) - sum_b pi(b|n) c(n, b)). With c = A and weight = visits this is the policy
        gradient; with an estimator's conditional mean for c it is that estimator's expected gradient.
        """
        policy_NA, credit_NA = self.check_policy(policy_NA), np.asarray(credit_NA, dtype=np.float64)
        if credit_NA.shape != self.legal_NA.shape:
            raise ValueError(f"credit_NA: expected shape {list(self.legal_NA.shape)}, got {list(credit_NA.shape)}")
        credit_NA = np.where(self.legal_NA, credit_NA, 0.0)  # an estimator says nothing of tokens that cannot be taken
        if not np.isfinite(credit_NA).all():
            raise ValueError("credit_NA: expected finite numbers on the legal tokens")
        centred_NA = credit_NA - (policy_NA * credit_NA).sum(1, keepdims=True)
        return _vector("weight_N", weight_N, self.num_nodes)[:, None] * policy_NA * centred_NA

    def policy_gradient(self, policy_NA: ArrayLike, *, discounted: bool = False) -> Floats:
        """Gradient [N, A] by the logits of each node (`by_state` for shared ones): what PPO's sum over tokens estimates.

        With gamma < 1 that sum leaves out gamma^t, as everyone's trainer does; `discounted` puts it in, and the result is then the
        gradient of `mean_return` (policy gradient theorem). With gamma = 1 both are the same.
        """
        solution = self.solve(policy_NA)
        weight_N = solution.visits_N * (self.gamma**self.depth_N if discounted else 1.0)
        return self.score_function(policy_NA, solution.q_NA, weight_N)

    def return_distribution(self, policy_NA: ArrayLike, *, limit: int = 1_000_000) -> tuple[Floats, Floats]:
        """Possible returns of a response, ascending, and their probabilities. Returns that agree to 1e-12 are one.

        ValueError when more than `limit` different partial returns have to be kept at once.
        """
        joint_E = self._joint(self.check_policy(policy_NA))
        node = np.flatnonzero(self.start_N)
        total, prob = np.zeros(len(node)), self.start_N[node]
        ended: list[tuple[Floats, Floats]] = []
        for depth in range(self.max_tokens):
            row, edge = self._expand(node, joint_E)
            total = total[row] + self.gamma**depth * self.reward_E[edge]
            prob, node = prob[row] * joint_E[edge], self.next_E[edge]
            ended.append(_merge(total[node == ENDED], prob[node == ENDED])[:2])
            live = node != ENDED
            total, prob, node = _merge(total[live], prob[live], node[live])
            if len(node) > limit:
                raise ValueError(f"more than {limit} different partial returns after {depth + 1} tokens; raise limit")
            if not len(node):
                break
        total, prob, _ = _merge(*(np.concatenate(x) for x in zip(*ended, strict=True)))
        return total, prob

    # ----------------------------------------------------------------------------------------------------------- trajectories

    def trajectories(
        self, policy_NA: ArrayLike, *, start_N: ArrayLike | None = None, num_tokens: int | None = None, limit: int = 2_000_000
    ) -> Trajectories:
        """Every stretch of up to `num_tokens` tokens (None: to the end) that has a probability, from nodes of one depth.

        start_N are probabilities of the first node (default: where responses begin); prob_B sums to their sum.
        ValueError when there are more than `limit` stretches.
        """
        joint_E = self._joint(self.check_policy(policy_NA))
        node, prob, num_tokens = self._starts(start_N, num_tokens)
        path = np.empty((len(node), 0), dtype=np.int64)
        done: list[tuple[Ints, Floats]] = []
        for depth in range(num_tokens):
            row, edge = self._expand(node, joint_E)
            if len(row) + sum(len(p) for p, _ in done) > limit:
                raise ValueError(f"more than {limit} trajectories of {depth + 1} tokens; take fewer tokens, or sample")
            path = np.concatenate([path[row], edge[:, None]], axis=1)
            prob, node = prob[row] * joint_E[edge], self.next_E[edge]
            stay = (node != ENDED) & (depth + 1 < num_tokens)
            done.append((path[~stay], prob[~stay]))
            path, prob, node = path[stay], prob[stay], node[stay]
            if not len(node):
                break
        width = max((p.shape[1] for p, _ in done if len(p)), default=0)
        edge_BT = np.concatenate([np.pad(p[:, :width], ((0, 0), (0, width - min(p.shape[1], width))), constant_values=-1)
                                  for p, _ in done])  # fmt: skip
        return self._record(np.concatenate([p for _, p in done]), edge_BT)

    def sample(
        self,
        policy_NA: ArrayLike,
        num: int,
        rng: np.random.Generator,
        *,
        start_N: ArrayLike | None = None,
        num_tokens: int | None = None,
    ) -> Trajectories:
        """`num` independent stretches, as `trajectories` but drawn; the same generator state gives the same ones."""
        if not isinstance(num, int | np.integer) or num < 1:
            raise ValueError(f"num is {num!r}, expected an integer of at least 1")
        joint_E = self._joint(self.check_policy(policy_NA))
        first, prob, num_tokens = self._starts(start_N, num_tokens)
        total = np.cumsum(prob)
        node = first[_draw(total, np.zeros(num), np.full(num, total[-1]), rng)]
        below_N = np.concatenate([[0.0], np.cumsum(joint_E)])[self.edge_N]  # cumulative probability below each node's edges
        edge_BT = np.full((num, num_tokens), -1)
        alive = np.arange(num)
        cumulative_E = np.cumsum(joint_E)
        for t in range(num_tokens):
            edge = _draw(cumulative_E, below_N[node], below_N[node + 1], rng)
            edge_BT[alive, t] = edge
            live = self.next_E[edge] != ENDED
            alive, node = alive[live], self.next_E[edge][live]
            if not len(alive):
                break
        return self._record(np.full(num, 1 / num), edge_BT[:, : int((edge_BT >= 0).sum(1).max(initial=0))])

    def _starts(self, start_N: ArrayLike | None, num_tokens: int | None) -> tuple[Ints, Floats, int]:
        weight_N = self.start_N if start_N is None else _vector("start_N", start_N, self.num_nodes)
        node = np.flatnonzero(weight_N)
        if not len(node) or (weight_N < 0).any() or len(set(self.depth_N[node])) > 1:
            raise ValueError("start_N: expected probabilities on nodes of one depth")
        if num_tokens is not None and num_tokens < 1:
            raise ValueError(f"num_tokens is {num_tokens}, expected at least 1")
        left = self.max_tokens - int(self.depth_N[node[0]])
        return node, weight_N[node], left if num_tokens is None else min(num_tokens, left)

    def _expand(self, node_B: Ints, joint_E: Floats) -> tuple[Ints, Ints]:
        """(row, edge) for every possible edge out of each row's node."""
        count = self.edge_N[node_B + 1] - self.edge_N[node_B]
        row = np.repeat(np.arange(len(node_B)), count)
        edge = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + self.edge_N[node_B][row]
        possible = joint_E[edge] > 0
        return row[possible], edge[possible]

    def _record(self, prob_B: Floats, edge_BT: Ints) -> Trajectories:
        mask_BT = edge_BT >= 0
        last_B = np.take_along_axis(edge_BT, mask_BT.sum(1)[:, None] - 1, axis=1)[:, 0]
        return Trajectories(
            prob_B=prob_B,
            node_BT=np.where(mask_BT, self.node_E[edge_BT], -1),
            token_BT=np.where(mask_BT, self.token_E[edge_BT], -1),
            edge_BT=edge_BT,
            reward_BT=np.where(mask_BT, self.reward_E[edge_BT], 0.0),
            mask_BT=mask_BT,
            end_B=self.end_E[last_B],
            next_node_B=self.next_E[last_B],
        )

    def _joint(self, policy_NA: Floats) -> Floats:
        """Probability of each edge given its node: of the token and of the outcome."""
        return policy_NA[self.node_E, self.token_E] * self.prob_E

    def _layers(self, *, backwards: bool = False) -> list[tuple[int, int]]:
        """(first, stop) of every layer that has nodes."""
        bounds = [(int(a), int(b)) for a, b in zip(self.layer_T, self.layer_T[1:], strict=False) if b > a]
        return bounds[::-1] if backwards else bounds


def _draw(cumulative: Floats, low_B: Floats, high_B: Floats, rng: np.random.Generator) -> Ints:
    """Index of the first cumulative probability above a point drawn between low and high, per row."""
    point_B = low_B + rng.random(len(low_B)) * (high_B - low_B)
    last_B = np.searchsorted(cumulative, high_B, side="left")  # rounding never leads past the row's own entries
    return np.minimum(np.searchsorted(cumulative, point_B, side="right"), last_B)


def _merge(total: Floats, prob: Floats, node: Ints | None = None) -> tuple[Floats, Floats, Ints]:
    """Adds up the probabilities of equal (node, total)."""
    node = np.zeros(len(total), dtype=np.int64) if node is None else node
    key = np.round(total, 12) + 0.0  # no -0
    order = np.lexsort((key, node))
    key, node, total, prob = key[order], node[order], total[order], prob[order]
    new = np.ones(len(key), dtype=bool)
    new[1:] = (np.diff(key) != 0) | (np.diff(node) != 0)
    first = np.flatnonzero(new)
    return total[first], np.add.reduceat(prob, first) if len(first) else prob, node[first]


def _vector(name: str, x: ArrayLike, num: int) -> Floats:
    array = np.asarray(x, dtype=np.float64)
    if array.shape != (num,):
        raise ValueError(f"{name}: expected shape [{num}], got {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} holds {array[~np.isfinite(array)][0]}, expected finite numbers")
    return array


def _integers(name: str, x: ArrayLike, num: int, low: int, high: int) -> Ints:
    array = np.asarray(x)
    if array.shape != (num,) or not (num == 0 or np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name}: expected integers, shape [{num}], got {array.dtype} {list(array.shape)}")
    if ((array < low) | (array >= high)).any():
        raise ValueError(f"{name} holds {array[(array < low) | (array >= high)][0]}, expected {low} .. {high - 1}")
    return array.astype(np.int64)
