"""token_mdp.py and instances.py against a recursion in Fractions, hand arithmetic, closed forms, finite differences and chance.

The oracle (`Tiny`) is written from the definition: it recurses over (tokens so far, state) in exact rationals, lists every
response, and shares nothing with the code under test but the two names of the ends and of "no next state".
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sim.lab import instances
from sim.lab.instances import INSTANCES, Instance, load
from sim.lab.token_mdp import ENDED, Edges, TokenMDP
from tppo_ref.method.records import End

LAW = settings(max_examples=60, deadline=None)
TIGHT = {"rtol": 0, "atol": 1e-12}

# --------------------------------------------------------------------------------------------------------------- the oracle


@dataclasses.dataclass(frozen=True)
class Move:
    """One outcome of one token, as a response meets it."""

    depth: int
    state: int
    token: int
    prob: Fraction  # given the token
    reward: Fraction  # the cap's reward included
    next: int  # graph state, or ENDED
    end: End


@dataclasses.dataclass(frozen=True, eq=False)
class Tiny:
    """A tiny graph with its policy, everything a Fraction. `rows` are (state, token, prob, reward, next)."""

    num_states: int
    num_tokens: int
    rows: list[tuple[int, int, Fraction, Fraction, int]]
    max_tokens: int
    gamma: Fraction
    start: list[Fraction]
    cap_reward: list[Fraction]
    policy: dict[tuple[int, int], list[Fraction]]  # (depth, state) -> probability of each token

    def mdp(self) -> TokenMDP:
        state, token, prob, reward, next_ = zip(*self.rows, strict=True)
        return TokenMDP(
            num_states=self.num_states,
            num_tokens=self.num_tokens,
            edges=Edges(state, token, [float(p) for p in prob], [float(r) for r in reward], next_),
            max_tokens=self.max_tokens,
            gamma=float(self.gamma),
            start_S=[float(p) for p in self.start],
            cap_reward_S=[float(r) for r in self.cap_reward],
        )

    def policy_NA(self, mdp: TokenMDP) -> np.ndarray:
        nodes = zip(mdp.depth_N.tolist(), mdp.state_N.tolist(), strict=True)
        return np.array([[float(p) for p in self.policy[node]] for node in nodes])

    @functools.cache  # noqa: B019  the object lives as long as one example
    def moves(self, depth: int, state: int) -> list[Move]:
        out = []
        for s, token, prob, reward, next_ in self.rows:
            if s != state or prob == 0:
                continue
            end = End.END_TOKEN if next_ == ENDED else End.LENGTH_CAP if depth + 1 == self.max_tokens else End.RUNNING
            gain = reward + (self.cap_reward[next_] if end is End.LENGTH_CAP else 0)
            out.append(Move(depth, state, token, prob, gain, ENDED if end is not End.RUNNING else next_, end))
        return out

    def reachable(self) -> set[tuple[int, int]]:
        """(depth, state) of every node that some policy's response can meet."""
        found = {(0, s) for s, p in enumerate(self.start) if p > 0}
        todo = list(found)
        while todo:
            depth, state = todo.pop()
            new = {(depth + 1, m.next) for m in self.moves(depth, state) if m.end is End.RUNNING} - found
            found |= new
            todo += new
        return found

    @functools.cache  # noqa: B019
    def q(self, depth: int, state: int, token: int) -> Fraction:
        moves = [m for m in self.moves(depth, state) if m.token == token]
        after = [self.value(depth + 1, m.next) if m.end is End.RUNNING else Fraction(0) for m in moves]
        return sum((m.prob * (m.reward + self.gamma * v) for m, v in zip(moves, after, strict=True)), Fraction(0))

    @functools.cache  # noqa: B019
    def value(self, depth: int, state: int) -> Fraction:
        return sum((p * self.q(depth, state, a) for a, p in enumerate(self.policy[depth, state]) if p), Fraction(0))

    def stretches(self, depth: int, state: int, num_tokens: int) -> list[tuple[Fraction, tuple[Move, ...]]]:
        """Every possible stretch of up to num_tokens tokens from a node, with its probability."""
        out = []
        for move in self.moves(depth, state):
            prob = self.policy[depth, state][move.token] * move.prob
            if prob == 0:
                continue
            if move.end is not End.RUNNING or num_tokens == 1:
                out.append((prob, (move,)))
            else:
                rest = self.stretches(depth + 1, move.next, num_tokens - 1)
                out += [(prob * p, (move, *moves)) for p, moves in rest]
        return out

    @functools.cache  # noqa: B019
    def responses(self) -> list[tuple[Fraction, tuple[Move, ...]]]:
        starts = [(p, s) for s, p in enumerate(self.start) if p > 0]
        return [(p * q, moves) for p, s in starts for q, moves in self.stretches(0, s, self.max_tokens)]


@st.composite
def tinies(draw, max_tokens: int = 4) -> Tiny:
    """Graphs with illegal tokens, noisy and impossible outcomes, loops, several first states, and policies with zeros."""
    r = draw(st.randoms(use_true_random=False))
    num_states, num_tokens, cap = r.randint(1, 3), r.randint(1, 3), r.randint(1, max_tokens)

    def probabilities(num: int, zeros: bool) -> list[Fraction]:
        weights = [r.choice([0, 1, 2, 5] if zeros else [1, 2, 5]) for _ in range(num)]
        weights[r.randrange(num)] += 1
        return [Fraction(w, sum(weights)) for w in weights]

    rows, legal = [], {}
    for state in range(num_states):
        legal[state] = sorted(r.sample(range(num_tokens), r.randint(1, num_tokens)))
        for token in legal[state]:
            for prob in probabilities(r.choice([1, 1, 2, 3]), zeros=True):
                next_ = ENDED if r.random() < 0.35 else r.randrange(num_states)
                rows.append((state, token, prob, Fraction(r.randint(-6, 6), 4), next_))
    r.shuffle(rows)
    policy = {}
    for depth in range(cap):
        for state in range(num_states):
            policy[depth, state] = [Fraction(0)] * num_tokens
            for token, p in zip(legal[state], probabilities(len(legal[state]), zeros=True), strict=True):
                policy[depth, state][token] = p
    tiny = Tiny(
        num_states=num_states,
        num_tokens=num_tokens,
        rows=rows,
        max_tokens=cap,
        gamma=r.choice([Fraction(0), Fraction(1, 2), Fraction(9, 10), Fraction(1)]),
        start=probabilities(num_states, zeros=True),
        cap_reward=[Fraction(r.randint(-4, 4), 2) for _ in range(num_states)],
        policy=policy,
    )
    assume(any(m.end is End.END_TOKEN for node in tiny.reachable() for m in tiny.moves(*node)))
    return tiny


def nodes(mdp: TokenMDP) -> list[tuple[int, int]]:
    return list(zip(mdp.depth_N.tolist(), mdp.state_N.tolist(), strict=True))


def merged(pairs) -> dict:
    """Probabilities of equal keys added up."""
    out: dict = collections.defaultdict(float)
    for key, prob in pairs:
        out[key] += float(prob)
    return dict(out)


def close(actual, expected) -> None:
    np.testing.assert_allclose(np.asarray(actual, dtype=float), np.asarray(expected, dtype=float), **TIGHT)


def same_distribution(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for key, prob in expected.items():
        assert actual[key] == pytest.approx(prob, abs=1e-12), key


# -------------------------------------------------------------------------------------------------------- the unrolled graph


@LAW
@given(tinies())
def test_nodes_are_what_some_response_can_meet_each_once_in_contiguous_layers(tiny):
    mdp = tiny.mdp()
    found = nodes(mdp)
    assert len(found) == len(set(found)) == mdp.num_nodes
    assert set(found) == tiny.reachable()
    assert len(mdp.layer_T) == mdp.max_tokens + 1
    assert mdp.layer_T[0] == 0
    assert mdp.layer_T[-1] == mdp.num_nodes
    for t in range(mdp.max_tokens):
        assert (mdp.depth_N[mdp.layer_T[t] : mdp.layer_T[t + 1]] == t).all()
    close(mdp.start_N, [float(tiny.start[s]) if d == 0 else 0.0 for d, s in found])


@LAW
@given(tinies())
def test_edges_are_every_possible_outcome_with_its_reward_and_its_end(tiny):
    mdp = tiny.mdp()
    found = nodes(mdp)
    seen, legal = [], np.zeros((mdp.num_nodes, mdp.num_tokens), dtype=bool)
    for n, (depth, state) in enumerate(found):
        for e in range(mdp.edge_N[n], mdp.edge_N[n + 1]):
            assert mdp.node_E[e] == n
            next_, prob, reward = int(mdp.next_E[e]), mdp.prob_E[e].item(), mdp.reward_E[e].item()
            after = ENDED if next_ == ENDED else found[next_]
            seen.append((depth, state, int(mdp.token_E[e]), round(prob, 12), reward, after, int(mdp.end_E[e])))
            legal[n, mdp.token_E[e]] = True
    expected = [
        (
            m.depth,
            m.state,
            m.token,
            round(float(m.prob), 12),
            float(m.reward),
            ENDED if m.end else (m.depth + 1, m.next),
            int(m.end),
        )
        for node in found
        for m in tiny.moves(*node)
    ]
    assert collections.Counter(seen) == collections.Counter(expected)
    assert (mdp.legal_NA == legal).all()


def test_a_token_that_ends_as_the_last_allowed_one_is_an_end_token_and_gets_no_cap_reward():
    edges = Edges([0, 0], [0, 1], [1.0, 1.0], [1.0, 2.0], [ENDED, 0])
    mdp = TokenMDP(num_states=1, num_tokens=2, edges=edges, max_tokens=1, cap_reward_S=[10.0])
    assert [End(e) for e in mdp.end_E] == [End.END_TOKEN, End.LENGTH_CAP]
    assert mdp.reward_E.tolist() == [1.0, 12.0]


def test_the_cap_reward_is_that_of_the_state_in_which_the_cap_is_reached():
    edges = Edges([0, 0, 1], [0, 1, 0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1, ENDED, 0])
    mdp = TokenMDP(num_states=2, num_tokens=2, edges=edges, max_tokens=3, cap_reward_S=[3.0, 5.0])
    assert mdp.reward_E[mdp.end_E == End.LENGTH_CAP].tolist() == [5.0], "0 -> 1 -> 0 -> 1"


# ------------------------------------------------------------------------------------------------------- V, Q, A, visits, ends


@LAW
@given(tinies())
def test_value_q_and_advantage_are_those_of_the_definition(tiny):
    mdp = tiny.mdp()
    solution = mdp.solve(tiny.policy_NA(mdp))
    value = [tiny.value(*node) for node in nodes(mdp)]
    q = [[tiny.q(*node, a) for a in range(mdp.num_tokens)] for node in nodes(mdp)]
    close(solution.value_N, value)
    close(solution.q_NA, q)
    expected = [[q[n][a] - value[n] if mdp.legal_NA[n, a] else 0 for a in range(mdp.num_tokens)] for n in range(mdp.num_nodes)]
    close(solution.advantage_NA, expected)
    assert solution.mean_return == pytest.approx(float(sum(p * tiny.value(0, s) for s, p in enumerate(tiny.start) if p)), abs=1e-12)


@LAW
@given(tinies())
def test_visits_ends_and_lengths_are_sums_over_all_responses(tiny):
    mdp = tiny.mdp()
    solution = mdp.solve(tiny.policy_NA(mdp))
    passed = merged(((m.depth, m.state), p) for p, moves in tiny.responses() for m in moves)
    close(solution.visits_N, [passed.get(node, 0.0) for node in nodes(mdp)])
    lengths = merged((len(moves), p) for p, moves in tiny.responses())
    close(solution.length_T, [lengths.get(t, 0.0) for t in range(mdp.max_tokens + 1)])
    ends = merged((int(moves[-1].end), p) for p, moves in tiny.responses())
    for end in End:
        assert solution.ends_E[mdp.end_E == end].sum() == pytest.approx(ends.get(int(end), 0.0), abs=1e-12)
    last = merged(((m.depth, m.state, m.token, float(m.reward)), p) for p, moves in tiny.responses() for m in moves[-1:])
    key_E = zip(mdp.depth_N[mdp.node_E], mdp.state_N[mdp.node_E], mdp.token_E, mdp.reward_E, strict=True)
    actual = merged((tuple(x.item() for x in key), p) for key, p in zip(key_E, solution.ends_E, strict=True) if p > 0)
    same_distribution(actual, last)


@LAW
@given(tinies())
def test_bellman_the_expected_advantage_is_zero_and_the_mean_return_is_the_sum_of_expected_rewards(tiny):
    """A third route to the mean return: rewards weighted by how often their edge is taken."""
    mdp = tiny.mdp()
    policy_NA = tiny.policy_NA(mdp)
    s = mdp.solve(policy_NA)
    close((policy_NA * s.advantage_NA).sum(1), np.zeros(mdp.num_nodes))
    close((policy_NA * s.q_NA).sum(1), s.value_N)
    backed_up = np.zeros((mdp.num_nodes, mdp.num_tokens))
    after_E = np.where(mdp.next_E == ENDED, 0.0, s.value_N[mdp.next_E])
    np.add.at(backed_up, (mdp.node_E, mdp.token_E), mdp.prob_E * (mdp.reward_E + mdp.gamma * after_E))
    close(s.q_NA, backed_up)
    taken_E = s.visits_N[mdp.node_E] * policy_NA[mdp.node_E, mdp.token_E] * mdp.prob_E
    assert s.mean_return == pytest.approx((mdp.gamma ** mdp.depth_N[mdp.node_E] * taken_E * mdp.reward_E).sum(), abs=1e-12)
    assert s.length_T.sum() == pytest.approx(1, abs=1e-12)
    assert s.ends_E.sum() == pytest.approx(1, abs=1e-12)
    assert s.visits_N.sum() == pytest.approx(s.length_T @ np.arange(mdp.max_tokens + 1), abs=1e-12), "tokens sampled = nodes passed"


@LAW
@given(tinies())
def test_evaluate_is_what_solve_says_of_value_and_q(tiny):
    mdp = tiny.mdp()
    policy_NA = tiny.policy_NA(mdp)
    value_N, q_NA = mdp.evaluate(mdp.check_policy(policy_NA))
    close(value_N, mdp.solve(policy_NA).value_N)
    close(q_NA, mdp.solve(policy_NA).q_NA)


@LAW
@given(tinies(), st.randoms(use_true_random=False))
def test_visits_from_weights_on_any_nodes_add_up_over_these_nodes(tiny, r):
    mdp = tiny.mdp()
    policy_NA, found = tiny.policy_NA(mdp), nodes(mdp)
    weight_N = np.array([float(r.randint(0, 3)) for _ in found])
    expected = dict.fromkeys(found, 0.0)
    for node, weight in zip(found, weight_N, strict=True):
        for p, moves in tiny.stretches(*node, mdp.max_tokens):
            for m in moves:
                expected[m.depth, m.state] += weight * float(p)
    close(mdp.visits(policy_NA, weight_N), [expected[node] for node in found])
    close(mdp.visits(policy_NA), mdp.solve(policy_NA).visits_N)


# ------------------------------------------------------------------------------------------------------ a case by hand, whole

HAND = dict(
    num_states=3,
    num_tokens=2,
    edges=Edges(
        state=[0, 0, 1, 1, 2, 2],
        token=[0, 1, 0, 1, 0, 0],
        prob=[1, 1, 1, 1, 0.25, 0.75],
        reward=[1, 0, 2, -1, 4, -4],
        next=[1, 2, ENDED, 1, ENDED, ENDED],
    ),
    max_tokens=3,
    gamma=0.5,
    cap_reward_S=[100, 8, 100],
)
"""State 0 chooses 1 (for +1) or 2; 1 ends for +2 or stays for -1, worth +8 at the cap; 2 can only end, for +4 or -4."""
HAND_POLICY = [[0.25, 0.75], [0.5, 0.5], [1, 0], [0.5, 0.5]]  # nodes: (0, state 0), (1, state 1), (1, state 2), (2, state 1)


def test_three_states_by_hand():
    mdp = TokenMDP(**HAND)
    assert nodes(mdp) == [(0, 0), (1, 1), (1, 2), (2, 1)]
    assert mdp.layer_T.tolist() == [0, 1, 3, 4]
    assert mdp.legal_NA.tolist() == [[True, True], [True, True], [True, False], [True, True]]
    s = mdp.solve(HAND_POLICY)
    # From the back: 7 = -1 + 8 at the cap; 1.25 = -1 + 4.5 / 2; -2 = (4 - 3 * 4) / 4; 1.8125 = 1 + 1.625 / 2.
    assert s.q_NA.tolist() == [[1.8125, -1], [2, 1.25], [-2, 0], [2, 7]]
    assert s.value_N.tolist() == [-0.296875, 1.625, -2, 4.5]
    assert s.advantage_NA.tolist() == [[2.109375, -0.703125], [0.375, -0.375], [0, 0], [-2.5, 2.5]]
    assert s.visits_N.tolist() == [1, 0.25, 0.75, 0.125]
    assert s.length_T.tolist() == [0, 0, 0.875, 0.125]
    assert s.mean_return == -0.296875
    assert sorted(p for p in s.ends_E.tolist() if p) == [0.0625, 0.0625, 0.125, 0.1875, 0.5625]
    returns, probabilities = mdp.return_distribution(HAND_POLICY)
    # 2 comes about twice: 1 + 2 / 2 with 1/8 and 4 / 2 with 3/16.
    assert returns.tolist() == [-2, 1, 2, 2.25]
    assert probabilities.tolist() == [0.5625, 0.0625, 0.3125, 0.0625]
    gradient = [[0.52734375, -0.52734375], [0.046875, -0.046875], [0, 0], [-0.15625, 0.15625]]
    assert mdp.policy_gradient(HAND_POLICY).tolist() == gradient
    discounts = np.array([1, 0.5, 0.5, 0.25])[:, None]  # gamma^t, which PPO's sum leaves out
    assert mdp.policy_gradient(HAND_POLICY, discounted=True).tolist() == (discounts * gradient).tolist()
    assert mdp.by_state(gradient).tolist() == [[0.52734375, -0.52734375], [-0.109375, 0.109375], [0, 0]]
    assert mdp.uniform().tolist() == [[0.5, 0.5], [0.5, 0.5], [1, 0], [0.5, 0.5]]


def test_three_states_by_hand_every_trajectory():
    t = TokenMDP(**HAND).trajectories(HAND_POLICY)
    rows = {}
    for b in range(len(t)):
        k = int(t.mask_BT[b].sum())
        rows[tuple(t.node_BT[b, :k].tolist()), tuple(t.token_BT[b, :k].tolist()), tuple(t.reward_BT[b, :k].tolist())] = (
            t.prob_B[b].item(),
            End(t.end_B[b]),
        )
    assert rows == {
        ((0, 1), (0, 0), (1, 2)): (0.125, End.END_TOKEN),
        ((0, 1, 3), (0, 1, 0), (1, -1, 2)): (0.0625, End.END_TOKEN),
        ((0, 1, 3), (0, 1, 1), (1, -1, 7)): (0.0625, End.LENGTH_CAP),
        ((0, 2), (1, 0), (0, 4)): (0.1875, End.END_TOKEN),
        ((0, 2), (1, 0), (0, -4)): (0.5625, End.END_TOKEN),
    }
    assert t.mask_BT.shape == (5, 3)
    assert (t.mask_BT.sum(1) == [2 if p in (0.125, 0.1875, 0.5625) else 3 for p in t.prob_B]).all()
    for padded in (t.node_BT, t.token_BT, t.edge_BT):
        assert (padded[~t.mask_BT] == -1).all()
        assert (padded[t.mask_BT] >= 0).all()
    assert (t.reward_BT[~t.mask_BT] == 0).all()
    assert (t.next_node_B == ENDED).all()
    assert not t.cut_B.any()


def test_three_states_by_hand_cut_after_two_tokens():
    t = TokenMDP(**HAND).trajectories(HAND_POLICY, num_tokens=2)
    assert t.mask_BT.all()
    cut = t.cut_B
    assert sorted(zip(t.prob_B.tolist(), t.next_node_B.tolist(), strict=True)) == [
        (0.125, -1),
        (0.125, 3),
        (0.1875, -1),
        (0.5625, -1),
    ]
    assert cut.sum() == 1
    assert End(t.end_B[cut][0]) is End.RUNNING
    assert t.token_BT[cut].tolist() == [[0, 1]]


# ------------------------------------------------------------------------------------------------- trajectories and returns


def as_rows(mdp: TokenMDP, t) -> list[tuple]:
    """Each row as ((depth, state, token, reward), ...), its end, and the node after it."""
    found = nodes(mdp)
    rows = []
    for b in range(len(t)):
        length = int(t.mask_BT[b].sum())
        assert t.mask_BT[b, :length].all(), "right-padded"
        steps = tuple((*found[t.node_BT[b, i]], int(t.token_BT[b, i]), float(t.reward_BT[b, i])) for i in range(length))
        after = None if t.next_node_B[b] == ENDED else found[t.next_node_B[b]]
        rows.append((steps, int(t.end_B[b]), after))
    return rows


def as_oracle_rows(stretches) -> dict:
    return merged(
        (
            (
                tuple((m.depth, m.state, m.token, float(m.reward)) for m in moves),
                int(moves[-1].end),
                None if moves[-1].end else (moves[-1].depth + 1, moves[-1].next),
            ),
            p,
        )
        for p, moves in stretches
    )


@LAW
@given(tinies())
def test_trajectories_are_all_responses_with_their_probabilities(tiny):
    mdp = tiny.mdp()
    t = mdp.trajectories(tiny.policy_NA(mdp))
    assert t.prob_B.sum() == pytest.approx(1, abs=1e-12)
    assert (t.prob_B > 0).all()
    same_distribution(merged(zip(as_rows(mdp, t), t.prob_B, strict=True)), as_oracle_rows(tiny.responses()))
    assert len({tuple(row) for row in t.edge_BT.tolist()}) == len(t), "no stretch is listed twice"


@LAW
@given(tinies(), st.integers(0, 3), st.integers(1, 5))
def test_stretches_from_one_layer_are_those_of_the_definition(tiny, depth, num_tokens):
    mdp = tiny.mdp()
    layer = [n for n, (d, _) in enumerate(nodes(mdp)) if d == depth]
    assume(layer)
    start_N = np.zeros(mdp.num_nodes)
    start_N[layer] = 0.3 / np.arange(1, len(layer) + 1)  # need not sum to 1
    t = mdp.trajectories(tiny.policy_NA(mdp), start_N=start_N, num_tokens=num_tokens)
    assert t.prob_B.sum() == pytest.approx(start_N.sum(), abs=1e-12)
    expected = [
        (Fraction(start_N[n]) * p, moves)
        for n in layer
        for p, moves in tiny.stretches(*nodes(mdp)[n], min(num_tokens, mdp.max_tokens - depth))
    ]
    same_distribution(merged(zip(as_rows(mdp, t), t.prob_B, strict=True)), as_oracle_rows(expected))
    assert (t.cut_B == (t.next_node_B != ENDED)).all()
    assert (t.mask_BT[t.cut_B].sum(1) == num_tokens).all(), "only a window's edge cuts"


@LAW
@given(tinies(), st.integers(1, 3))
def test_windows_joined_at_their_edges_are_the_whole_responses(tiny, window):
    """Every window begins where the last one was cut; the probabilities of the pieces multiply."""
    mdp = tiny.mdp()
    policy_NA = tiny.policy_NA(mdp)
    whole, pending = collections.defaultdict(float), [((), 1.0, None)]
    while pending:
        prefix, prob, node = pending.pop()
        start_N = None if node is None else np.eye(mdp.num_nodes)[node]
        t = mdp.trajectories(policy_NA, start_N=start_N, num_tokens=window)
        for b in range(len(t)):
            path, p = (*prefix, *t.edge_BT[b][t.mask_BT[b]].tolist()), prob * t.prob_B[b]
            if t.cut_B[b]:
                pending.append((path, p, int(t.next_node_B[b])))
            else:
                whole[path] += p
    t = mdp.trajectories(policy_NA)
    same_distribution(
        dict(whole), merged((tuple(e[m].tolist()), p) for e, m, p in zip(t.edge_BT, t.mask_BT, t.prob_B, strict=True))
    )


@LAW
@given(tinies())
def test_the_return_distribution_is_that_of_all_responses(tiny):
    mdp = tiny.mdp()
    returns, probabilities = mdp.return_distribution(tiny.policy_NA(mdp))
    exact: dict[Fraction, Fraction] = collections.defaultdict(Fraction)
    for p, moves in tiny.responses():
        exact[sum((tiny.gamma**m.depth * m.reward for m in moves), Fraction(0))] += p
    ascending = sorted(exact)
    close(returns, ascending)
    close(probabilities, [exact[x] for x in ascending])
    assert (np.diff(returns) > 0).all()
    mean = mdp.solve(tiny.policy_NA(mdp)).mean_return
    assert returns @ probabilities == pytest.approx(mean, abs=1e-12)


def test_limits_are_met_exactly():
    """Two tokens of which one ends, five positions: 2, 3, 4, 5 and at last 6 responses."""
    edges = Edges([0, 0], [0, 1], [1, 1], [1, 0], [0, ENDED])
    mdp = TokenMDP(num_states=1, num_tokens=2, edges=edges, max_tokens=5)
    assert len(mdp.trajectories(mdp.uniform(), limit=6)) == 6
    with pytest.raises(ValueError, match=r"more than 5 trajectories"):
        mdp.trajectories(mdp.uniform(), limit=5)
    assert len(mdp.trajectories(mdp.uniform(), num_tokens=2, limit=3)) == 3
    with pytest.raises(ValueError, match=r"more than 2 trajectories of 2 tokens"):
        mdp.trajectories(mdp.uniform(), num_tokens=2, limit=2)


def test_the_limit_of_partial_returns_is_met_exactly():
    """Three bits, each worth 2^i: 2, 4 live partial returns, then the cap."""
    rows = [(i, a, 1.0, a * 2.0**i, i + 1 if i < 2 else ENDED) for i in range(3) for a in (0, 1)]
    mdp = TokenMDP(num_states=3, num_tokens=2, edges=Edges(*map(list, zip(*rows, strict=True))), max_tokens=3)
    returns, probabilities = mdp.return_distribution(mdp.uniform(), limit=4)
    assert returns.tolist() == list(range(8))
    assert probabilities.tolist() == [0.125] * 8
    with pytest.raises(ValueError, match=r"more than 3 partial returns after 2 tokens; expected fewer; raise it"):
        mdp.return_distribution(mdp.uniform(), limit=3)


def test_returns_that_differ_by_rounding_only_are_one():
    """0.1 + 0.2 and 0.2 + 0.1 + 0.3 - 0.3, in floats two numbers."""
    rows = [(0, 0, 0.5, 0.1, 1), (0, 0, 0.5, 0.3, 2), (1, 0, 1.0, 0.2, ENDED), (2, 0, 1.0, 0.0, ENDED)]
    mdp = TokenMDP(num_states=3, num_tokens=1, edges=Edges(*map(list, zip(*rows, strict=True))), max_tokens=2)
    returns, probabilities = mdp.return_distribution(mdp.uniform())
    assert 0.1 + 0.2 != 0.3
    assert returns.tolist() == [pytest.approx(0.3, abs=1e-15)]
    assert probabilities.tolist() == [1.0]


# --------------------------------------------------------------------------------------------------------------- gradients


@LAW
@given(tinies(), st.randoms(use_true_random=False))
def test_the_score_function_is_its_sum_over_all_responses(tiny, r):
    """sum_responses p sum_t c(n_t, a_t) (1[b = a_t] - pi(b | n_t)), added up response by response."""
    mdp = tiny.mdp()
    policy_NA, found = tiny.policy_NA(mdp), nodes(mdp)
    credit_NA = np.array([[r.uniform(-1, 1) for _ in range(mdp.num_tokens)] for _ in found])
    place = {node: n for n, node in enumerate(found)}
    expected = np.zeros_like(credit_NA)
    for p, moves in tiny.responses():
        for m in moves:
            n = place[m.depth, m.state]
            expected[n] -= float(p) * credit_NA[n, m.token] * policy_NA[n]
            expected[n, m.token] += float(p) * credit_NA[n, m.token]
    close(mdp.score_function(policy_NA, credit_NA, mdp.visits(policy_NA)), expected)


@LAW
@given(tinies())
def test_the_policy_gradient_is_the_score_function_of_the_advantage_and_a_baseline_changes_nothing(tiny):
    mdp = tiny.mdp()
    policy_NA = tiny.policy_NA(mdp)
    s = mdp.solve(policy_NA)
    gradient_NA = mdp.policy_gradient(policy_NA)
    close(gradient_NA, mdp.score_function(policy_NA, s.advantage_NA, s.visits_N))
    close(gradient_NA, mdp.score_function(policy_NA, s.q_NA + np.arange(mdp.num_nodes)[:, None], s.visits_N))
    close(gradient_NA.sum(1), np.zeros(mdp.num_nodes))
    close(gradient_NA, np.array(s.visits_N)[:, None] * policy_NA * s.advantage_NA)
    assert (gradient_NA[~mdp.legal_NA] == 0).all()


def slope(f, x: np.ndarray, h: float = 1e-4) -> np.ndarray:
    """Central differences of f, by every entry of x; Richardson's extrapolation leaves an error of order h^4."""
    out = np.zeros_like(x)
    for i in np.ndindex(x.shape):
        step = np.zeros_like(x)
        step[i] = h
        coarse, fine = (f(x + step) - f(x - step)) / (2 * h), (f(x + step / 2) - f(x - step / 2)) / h
        out[i] = (4 * fine - coarse) / 3
    return out


@settings(max_examples=25, deadline=None)
@given(tinies(), st.integers(0, 10**6))
def test_the_discounted_policy_gradient_is_the_slope_of_the_mean_return(tiny, seed):
    mdp = tiny.mdp()
    logits_NA = np.random.default_rng(seed).normal(size=mdp.legal_NA.shape)
    expected = slope(lambda x: mdp.solve(mdp.softmax(x)).mean_return, logits_NA)
    np.testing.assert_allclose(mdp.policy_gradient(mdp.softmax(logits_NA), discounted=True), expected, rtol=0, atol=1e-9)
    if mdp.gamma == 1:
        np.testing.assert_allclose(mdp.policy_gradient(mdp.softmax(logits_NA)), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_with_gamma_below_one_the_undiscounted_gradient_is_not_the_slope_but_ppos_sum(seed):
    """Refuted: "PPO's sum over tokens is the gradient of the discounted return"."""
    mdp, policy_NA, _ = instances.random(seed=seed, gamma=0.7, outcomes=2)
    s = mdp.solve(policy_NA)
    gradient = mdp.policy_gradient(policy_NA)
    assert np.abs(gradient - mdp.policy_gradient(policy_NA, discounted=True)).max() > 1e-3
    close(gradient, s.visits_N[:, None] * policy_NA * s.advantage_NA)


@pytest.mark.parametrize("every_token", [False, True])
def test_rewards_of_random_instances_fill_the_range_from_minus_1_to_1(every_token):
    mdps = [instances.random(seed=seed, outcomes=3, every_token=every_token)[0] for seed in range(40)]
    drawn = np.concatenate([mdp.reward_E[mdp.end_E != End.LENGTH_CAP] for mdp in mdps])  # without what the cap adds
    assert -1 <= drawn.min() < -0.9
    assert 0.9 < drawn.max() <= 1
    given = drawn[drawn != 0]
    assert abs(given.mean()) < 4 * np.sqrt(1 / 3 / len(given))  # of a uniform number on [-1, 1]: mean 0, variance 1/3


@pytest.mark.parametrize("seed", range(4))
def test_the_gradient_by_state_is_the_slope_by_shared_logits(seed):
    mdp, _, _ = instances.random(seed=seed, outcomes=2, gamma=1.0 if seed % 2 else 0.8, num_states=4)
    logits_SA = np.random.default_rng(seed).normal(size=(mdp.num_states, mdp.num_tokens))
    expected = slope(lambda x: mdp.solve(mdp.softmax(mdp.by_node(x))).mean_return, logits_SA)
    policy_NA = mdp.softmax(mdp.by_node(logits_SA))
    gradient_SA = mdp.by_state(mdp.policy_gradient(policy_NA, discounted=True))
    np.testing.assert_allclose(gradient_SA, expected, rtol=0, atol=1e-9)
    assert np.abs(gradient_SA).max() > 1e-2


def test_a_step_along_the_gradient_raises_the_mean_return():
    mdp, policy_NA, _ = load("thinking")
    logits_NA = np.log(np.where(policy_NA > 0, policy_NA, 1.0))
    better = mdp.softmax(logits_NA + 0.5 * mdp.policy_gradient(policy_NA))
    assert mdp.solve(better).mean_return > mdp.solve(policy_NA).mean_return + 1e-3


# ---------------------------------------------------------------------------------------------------------------- sampling


def counts(mdp: TokenMDP, exact, drawn) -> tuple[np.ndarray, np.ndarray]:
    """Expected and observed numbers of every stretch of tokens; a stretch that cannot be fails here."""
    index = {tuple(row[mask].tolist()): i for i, (row, mask) in enumerate(zip(exact.edge_BT, exact.mask_BT, strict=True))}
    observed = np.zeros(len(exact))
    for row, mask in zip(drawn.edge_BT, drawn.mask_BT, strict=True):
        observed[index[tuple(row[mask].tolist())]] += 1
    return exact.prob_B / exact.prob_B.sum() * len(drawn), observed


SAMPLED = {
    "by hand": lambda: (TokenMDP(**HAND), np.array(HAND_POLICY)),
    "two first states": lambda: (TokenMDP(**HAND | {"start_S": [0.3, 0.5, 0.2]}), None),
    "noisy outcomes": lambda: instances.random(seed=3, outcomes=3, num_states=3, num_tokens=2, max_tokens=3)[:2],
    "a policy with zeros": lambda: load("cliff", length=8)[:2],
}


@pytest.mark.parametrize("case", SAMPLED)
def test_samples_pass_a_chi_square_test_against_the_enumeration(case):
    mdp, policy_NA = SAMPLED[case]()
    policy_NA = mdp.uniform() if policy_NA is None else policy_NA
    expected, observed = counts(mdp, mdp.trajectories(policy_NA), mdp.sample(policy_NA, 40_000, np.random.default_rng(1)))
    few = expected < 5
    pool = [np.append(x[~few], x[few].sum()) if few.any() else x for x in (expected, observed)]
    assert len(pool[0]) > 3, "too few cells to test anything"
    assert scipy.stats.chisquare(pool[1], pool[0]).pvalue > 1e-3


def test_the_chi_square_test_sees_a_policy_that_is_a_little_off():
    """The test above can fail: 0.25 against 0.27."""
    mdp = TokenMDP(**HAND)
    off = np.array([[0.27, 0.73], *HAND_POLICY[1:]])
    expected, observed = counts(mdp, mdp.trajectories(HAND_POLICY), mdp.sample(off, 40_000, np.random.default_rng(1)))
    assert scipy.stats.chisquare(observed, expected).pvalue < 1e-9


def test_windows_are_sampled_from_any_layer_with_its_weights():
    mdp, policy_NA, _ = instances.random(seed=5, outcomes=2, num_states=3, num_tokens=2, max_tokens=5)
    start_N = np.where(mdp.depth_N == 2, mdp.state_N + 1.0, 0.0)
    exact = mdp.trajectories(policy_NA, start_N=start_N, num_tokens=2)
    drawn = mdp.sample(policy_NA, 40_000, np.random.default_rng(2), start_N=start_N, num_tokens=2)
    assert drawn.cut_B.any()
    assert not drawn.cut_B.all()
    assert (drawn.mask_BT.sum(1) <= 2).all()
    assert (mdp.depth_N[drawn.node_BT[:, 0]] == 2).all()
    expected, observed = counts(mdp, exact, drawn)
    kept = expected >= 5
    pool = [np.append(x[kept], x[~kept].sum()) for x in (expected, observed)]
    pool = [x if pool[0][-1] > 0 else x[:-1] for x in pool]
    assert scipy.stats.chisquare(pool[1], pool[0]).pvalue > 1e-3


@pytest.mark.parametrize("name", INSTANCES)
def test_sampled_returns_and_lengths_agree_with_the_exact_ones_within_their_confidence_interval(name):
    mdp, policy_NA, _ = load(name)
    s = mdp.solve(policy_NA)
    t = mdp.sample(policy_NA, 20_000, np.random.default_rng(11))
    assert (t.prob_B == 1 / 20_000).all()
    length_B = t.mask_BT.sum(1)
    columns = np.arange(mdp.max_tokens + 1)
    for drawn, exact in (
        ((mdp.gamma ** np.arange(t.reward_BT.shape[1]) * t.reward_BT).sum(1), s.mean_return),
        (length_B, s.length_T @ columns),
        ((length_B - s.length_T @ columns) ** 2, s.length_T @ (columns - s.length_T @ columns) ** 2),
    ):
        assert abs(drawn.mean() - exact) <= 4 * drawn.std() / math.sqrt(len(t)) + 1e-12
    passed = np.bincount(t.node_BT[t.mask_BT], minlength=mdp.num_nodes) / len(t)
    error = np.sqrt(s.visits_N * (1 - s.visits_N) / len(t))
    assert (np.abs(passed - s.visits_N) <= 5 * error + 1e-9).all()


def test_the_same_generator_state_gives_the_same_samples():
    mdp, policy_NA, _ = load("random", outcomes=2)
    one, two, other = (mdp.sample(policy_NA, 200, np.random.default_rng(seed)) for seed in (4, 4, 5))
    for field in dataclasses.fields(one):
        assert np.array_equal(getattr(one, field.name), getattr(two, field.name)), field.name
    assert one.edge_BT.shape != other.edge_BT.shape or (one.edge_BT != other.edge_BT).any()


def test_samples_are_as_wide_as_the_longest_and_follow_the_record():
    mdp, policy_NA, _ = load("calm-chain")
    t = mdp.sample(policy_NA, 50, np.random.default_rng(0))
    assert t.mask_BT.any(0).all()
    length_B = t.mask_BT.sum(1)
    assert (t.mask_BT == (np.arange(t.mask_BT.shape[1]) < length_B[:, None])).all()
    inner = t.mask_BT[:, 1:]
    assert (mdp.next_E[t.edge_BT[:, :-1]][inner] == t.node_BT[:, 1:][inner]).all(), "each token leads to the next node"
    for padded in (t.node_BT, t.token_BT, t.edge_BT):
        assert (padded[~t.mask_BT] == -1).all()
    assert (t.reward_BT[~t.mask_BT] == 0).all()
    assert (t.end_B != End.RUNNING).all()


def test_a_token_of_probability_zero_is_never_drawn_although_it_stands_first_or_last():
    rows = [(0, 0, ENDED), (0, 1, 0), (0, 2, ENDED)]
    state, token, next_ = map(list, zip(*rows, strict=True))
    mdp = TokenMDP(num_states=1, num_tokens=3, edges=Edges(state, token, [1.0] * 3, [0.0] * 3, next_), max_tokens=40)
    policy_NA = mdp.by_node([[0.0, 1.0, 0.0]])
    t = mdp.sample(policy_NA, 3000, np.random.default_rng(0))
    assert t.mask_BT.all()
    assert t.token_BT.shape == (3000, 40)
    assert (t.token_BT == 1).all()
    assert (t.end_B == End.LENGTH_CAP).all()


class Extreme(np.random.Generator):
    """A generator whose uniforms are always the same, the smallest or the largest that can come."""

    def __init__(self, value: float):
        super().__init__(np.random.PCG64(0))
        self.value = value

    def random(self, size=None, *args, **kwargs):
        return np.full(size, self.value)


@pytest.mark.parametrize("u", [0.0, np.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("case", SAMPLED)
def test_the_extreme_draws_choose_possible_edges_of_their_own_node(case, u):
    mdp, policy_NA = SAMPLED[case]()
    policy_NA = mdp.uniform() if policy_NA is None else policy_NA
    t = mdp.sample(policy_NA, 3, Extreme(u))
    assert (mdp.start_N[t.node_BT[:, 0]] > 0).all()
    edge = t.edge_BT[t.mask_BT]
    assert (policy_NA[mdp.node_E[edge], mdp.token_E[edge]] > 0).all()
    inner = t.mask_BT[:, 1:]
    assert (mdp.next_E[t.edge_BT[:, :-1]][inner] == mdp.node_E[t.edge_BT[:, 1:]][inner]).all()


# -------------------------------------------------------------------------------------------------------- 10^5 nodes


def test_a_chain_of_10_000_tokens_has_its_closed_form():
    """V_i = q + g (1 - q) V_{i+1}, V = 1 at the last: V_i = F + (g (1 - q))^(n-1-i) (1 - F), F = q / (1 - g (1 - q))."""
    n, q, gamma = 10_000, 1e-4, 0.9999
    state = np.concatenate([np.arange(n - 1), np.arange(n)])
    token = np.concatenate([np.zeros(n - 1, dtype=int), np.ones(n, dtype=int)])
    next_ = np.concatenate([np.arange(1, n), np.full(n, ENDED)])
    reward = np.where(token == 1, 1.0, 0.0)
    edges = Edges(state, token, np.ones(2 * n - 1), reward, next_)
    mdp = TokenMDP(num_states=n, num_tokens=2, edges=edges, max_tokens=n, gamma=gamma)
    assert mdp.num_nodes == n
    policy_SA = np.tile([1 - q, q], (n, 1))
    policy_SA[-1] = 0, 1
    s = mdp.solve(mdp.by_node(policy_SA))
    on, i = gamma * (1 - q), np.arange(n)
    fixed = q / (1 - on)
    np.testing.assert_allclose(s.value_N, fixed + on ** (n - 1 - i) * (1 - fixed), rtol=1e-11)
    np.testing.assert_allclose(s.visits_N, (1 - q) ** i, rtol=1e-11)
    np.testing.assert_allclose(s.length_T[1:-1], q * (1 - q) ** i[:-1], rtol=1e-11)
    assert s.length_T.sum() == pytest.approx(1, abs=1e-10)


def test_a_lazy_walk_over_100_000_nodes_has_its_closed_form():
    """State k counts the ups. The token "end" (q) is worth 0, the cap is worth k, so V(t, k) = (1-q)^m (k + m p), m = T - t."""
    cap, p, q = 446, 0.3, 0.002
    k = np.arange(cap + 1)
    state, token = np.tile(k, 3), np.repeat([0, 1, 2], cap + 1)
    next_ = np.concatenate([np.minimum(k + 1, cap), k, np.full(cap + 1, ENDED)])
    edges = Edges(state, token, np.ones(3 * (cap + 1)), np.zeros(3 * (cap + 1)), next_)
    mdp = TokenMDP(num_states=cap + 1, num_tokens=3, edges=edges, max_tokens=cap, cap_reward_S=k)
    assert mdp.num_nodes == cap * (cap + 1) // 2 == 99_681
    s = mdp.solve(mdp.by_node(np.tile([(1 - q) * p, (1 - q) * (1 - p), q], (cap + 1, 1))))
    m = cap - mdp.depth_N
    np.testing.assert_allclose(s.value_N, (1 - q) ** m * (mdp.state_N + m * p), rtol=1e-10)
    walk = scipy.stats.binom.pmf(mdp.state_N, mdp.depth_N, p) * (1 - q) ** mdp.depth_N
    np.testing.assert_allclose(s.visits_N, walk, rtol=1e-8, atol=1e-15)
    assert s.mean_return == pytest.approx((1 - q) ** cap * cap * p, rel=1e-10)


def test_memory_is_linear_in_the_states():
    """3,000 states are 24 kB a vector; their square is 72 MB, and 80 GB for 10^5 states."""
    n = 3000
    edges = Edges(np.arange(n), np.zeros(n, dtype=int), np.ones(n), np.ones(n), np.full(n, ENDED))
    tracemalloc.start()
    try:
        TokenMDP(num_states=n, num_tokens=1, edges=edges, max_tokens=2)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 100 * 8 * n


# ------------------------------------------------------------------------------------------------------------ what is refused

GOOD = dict(num_states=2, num_tokens=2, edges=Edges([0, 0, 1], [0, 1, 1], [1, 1, 1], [0, 0, 1], [1, ENDED, ENDED]), max_tokens=3)


def with_edges(**changes) -> dict:
    return {"edges": GOOD["edges"]._replace(**changes)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (with_edges(prob=[1, 1, 0.5]), r"edges\.prob: got a sum of 0\.5 for state 1, token 1"),
        (with_edges(prob=[1, 1, 1 + 1e-6]), r"edges\.prob: got a sum of 1\.000001 for state 1, token 1"),
        (with_edges(prob=[0, 1, 1]), r"edges\.prob: got a sum of 0\.0 for state 0, token 0"),
        (with_edges(prob=[1, 1, -1]), r"edges\.prob: got -1"),
        (with_edges(prob=[1, 1, math.nan]), r"edges\.prob\[2\]: got nan"),
        (
            with_edges(state=[0, 0, 1, 1], token=[0, 1, 1, 1], prob=[1, 1, 2, -1], reward=[0] * 4, next=[1, -1, -1, -1]),
            r"edges\.prob: got -1",
        ),
        (with_edges(reward=[0, 0, math.nan]), r"edges\.reward\[2\]: got nan"),
        (with_edges(reward=[0, math.inf, 0]), r"edges\.reward\[1\]: got inf"),
        (with_edges(reward=[-math.inf, 0, 0]), r"edges\.reward\[0\]: got -inf"),
        (with_edges(state=[0, 0, 2]), r"edges\.state: got 2; expected 0 \.\. 1"),
        (with_edges(state=[0, 0, -1]), r"edges\.state: got -1; expected 0 \.\. 1"),
        (with_edges(token=[0, 2, 1]), r"edges\.token: got 2; expected 0 \.\. 1"),
        (with_edges(next=[2, ENDED, ENDED]), r"edges\.next: got 2; expected -1 \.\. 1"),
        (with_edges(next=[-2, ENDED, ENDED]), r"edges\.next: got -2"),
        (with_edges(token=[0.0, 1.0, 1.0]), r"edges\.token: got float64, shape \[3\]; expected integers"),
        (with_edges(reward=[0, 0]), r"edges\.reward: got shape \[2\]; expected shape \[3\]"),
        (with_edges(next=[1, ENDED]), r"edges\.next: got int64, shape \[2\]; expected integers, shape \[3\]"),
        (with_edges(next=[1, 1, 1]), r"expected an end that can be reached"),
        ({"edges": Edges([], [], [], [], [])}, r"edges: got no token for state 0, reached after 0 tokens"),
        ({"edges": Edges([0, 0], [0, 1], [1, 1], [0, 0], [1, ENDED])}, r"edges: got no token for state 1, reached after 1 tokens"),
        ({"start_S": [0.5, 0.4]}, r"start_S: got a sum of 0\.9"),
        ({"start_S": [1.5, -0.5]}, r"start_S"),
        ({"start_S": [1.0]}, r"start_S: got shape \[1\]; expected shape \[2\]"),
        ({"start_S": [math.nan, 1.0]}, r"start_S\[0\]: got nan"),
        ({"start_S": [0.0, 0.0]}, r"start_S: got a sum of 0"),
        ({"cap_reward_S": [0.0, math.inf]}, r"cap_reward_S\[1\]: got inf"),
        ({"cap_reward_S": [0.0]}, r"cap_reward_S: got shape \[1\]; expected shape \[2\]"),
        ({"gamma": 1.1}, r"gamma: got 1\.1; expected a number in \[0, 1\]"),
        ({"gamma": -0.1}, r"gamma: got -0\.1"),
        ({"gamma": math.nan}, r"gamma: got nan"),
        ({"max_tokens": 0}, r"max_tokens: got 0"),
        ({"max_tokens": 2.0}, r"max_tokens: got 2\.0"),
        ({"num_states": 0}, r"num_states: got 0"),
        ({"num_tokens": -1}, r"num_tokens: got -1"),
        ({"state_names": ("a",)}, r"state_names: got 1 names; expected 2"),
        ({"token_names": ("a", "b", "c")}, r"token_names: got 3 names; expected 2"),
    ],
)
def test_mistakes_in_a_graph_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        TokenMDP(**GOOD | changes)


def test_what_the_refusals_above_start_from_is_fine():
    mdp = TokenMDP(**GOOD)
    assert mdp.num_nodes == 2
    assert mdp.solve(mdp.uniform()).mean_return == 0.5


def test_an_end_that_only_a_longer_response_could_reach_is_unreachable():
    """0 -> 1 -> end needs two tokens."""
    edges = Edges([0, 1], [0, 0], [1, 1], [0, 0], [1, ENDED])
    with pytest.raises(ValueError, match=r"edges: got no end token within max_tokens = 1; expected an end that can be reached"):
        TokenMDP(num_states=2, num_tokens=1, edges=edges, max_tokens=1)
    assert TokenMDP(num_states=2, num_tokens=1, edges=edges, max_tokens=2).num_nodes == 2


def test_an_end_that_has_probability_zero_is_unreachable():
    edges = Edges([0, 0], [0, 0], [1.0, 0.0], [0, 0], [0, ENDED])
    with pytest.raises(ValueError, match="expected an end that can be reached"):
        TokenMDP(num_states=1, num_tokens=1, edges=edges, max_tokens=3)


def test_an_unreachable_dead_end_and_a_state_met_only_at_the_cap_need_no_token():
    edges = Edges([0, 0], [0, 1], [1, 1], [0, 1], [1, ENDED])
    assert (
        TokenMDP(num_states=3, num_tokens=2, edges=edges, max_tokens=1, cap_reward_S=[0, 7, 0]).solve([[0.5, 0.5]]).mean_return == 4
    )
    with pytest.raises(ValueError, match="edges: got no token for state 1, reached after 1 tokens"):
        TokenMDP(num_states=3, num_tokens=2, edges=edges, max_tokens=2)


def test_a_dead_end_is_named_by_its_name():
    edges = Edges([0, 0], [0, 1], [1, 1], [0, 1], [1, ENDED])
    with pytest.raises(ValueError, match="edges: got no token for state mud, reached after 1 tokens"):
        TokenMDP(num_states=2, num_tokens=2, edges=edges, max_tokens=2, state_names=("road", "mud"))


def test_rounding_in_probabilities_is_scaled_away():
    third = [1 / 3 + 3e-10, 1 / 3, 1 / 3]
    mdp = TokenMDP(num_states=1, num_tokens=1, edges=Edges([0] * 3, [0] * 3, third, [1, 2, 3], [ENDED] * 3), max_tokens=1)
    assert mdp.prob_E.sum() == pytest.approx(1, abs=1e-15)
    mdp = TokenMDP(**GOOD | {"start_S": [0.5, 0.5 + 5e-10]})
    assert mdp.start_N.sum() == pytest.approx(1, abs=1e-15)
    policy_NA = mdp.check_policy([[0.5, 0.5 + 5e-10]] + [[0, 1 - 5e-10]] * (mdp.num_nodes - 1))
    assert policy_NA.sum(1) == pytest.approx(np.ones(mdp.num_nodes), abs=1e-15)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (
            [[0.25, 0.75], [0.5, 0.5], [1, 0]],
            r"policy_NA: got shape \[3, 2\]; expected shape \[4, 2\]; use by_node for a policy per state",
        ),
        ([[0.25, 0.75]] * 2, r"policy_NA: got shape \[2, 2\]; expected shape \[4, 2\]$"),
        ([[1.0]] * 4, r"got shape \[4, 1\]; expected shape \[4, 2\]"),
        ([0.5] * 4, r"got shape \[4\]; expected shape \[4, 2\]"),
        ([[0.25, 0.75], [0.5, 0.5], [0.5, 0.5], [0.5, 0.5]], r"0 on illegal tokens"),
        ([[0.25, 0.7], [0.5, 0.5], [1, 0], [0.5, 0.5]], r"policy_NA: got a sum of 0\.95 at node 0"),
        ([[0.25, 0.75], [0.5, 0.5], [0, 0], [0.5, 0.5]], r"policy_NA: got a sum of 0\.0 at node 2"),
        ([[0.25, 0.75], [1.5, -0.5], [1, 0], [0.5, 0.5]], r"expected probabilities"),
        ([[0.25, 0.75], [math.nan, 0.5], [1, 0], [0.5, 0.5]], r"expected probabilities"),
        ([[0.25, 0.75], [math.inf, 0.5], [1, 0], [0.5, 0.5]], r"policy_NA"),
    ],
)
def test_mistakes_in_a_policy_are_refused_by_everything_that_takes_one(policy, message):
    mdp = TokenMDP(**HAND)
    takers = [mdp.check_policy, mdp.solve, mdp.visits, mdp.policy_gradient, mdp.return_distribution, mdp.trajectories]
    takers += [lambda p: mdp.sample(p, 3, np.random.default_rng(0)), lambda p: mdp.score_function(p, np.zeros((4, 2)), np.ones(4))]
    for take in takers:
        with pytest.raises(ValueError, match=message):
            take(policy)


@pytest.mark.parametrize(
    "policy",
    [
        0.5,
        "uniform",
    ],
)
def test_a_policy_that_is_no_array_at_all_is_a_value_error(policy):
    with pytest.raises(ValueError):  # noqa: PT011  NumPy's own words will do
        TokenMDP(**HAND).check_policy(policy)


@pytest.mark.parametrize("method", ["trajectories", "sample"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start_N": [0.5, 0.5, 0, 0]}, r"start_N: got other numbers; expected probabilities on nodes of one depth"),
        ({"start_N": [0, 0, 0.5, 0.5]}, r"start_N: got other numbers; expected probabilities on nodes of one depth"),
        ({"start_N": [0, 0, 0, 0]}, r"start_N"),
        ({"start_N": [0, 1.5, -0.5, 0]}, r"start_N"),
        ({"start_N": [1, 0, 0]}, r"start_N: got shape \[3\]; expected shape \[4\]"),
        ({"start_N": [math.nan, 0, 0, 0]}, r"start_N\[0\]: got nan"),
        ({"num_tokens": 0}, r"num_tokens: got 0; expected an integer of at least 1"),
        ({"num_tokens": -1}, r"num_tokens: got -1"),
    ],
)
def test_mistakes_in_a_stretch_are_refused_by_name(method, options, message):
    mdp = TokenMDP(**HAND)
    first = (HAND_POLICY,) if method == "trajectories" else (HAND_POLICY, 5, np.random.default_rng(0))
    with pytest.raises(ValueError, match=message):
        getattr(mdp, method)(*first, **options)


@pytest.mark.parametrize("num", [0, -1])
def test_a_senseless_number_of_samples_is_a_value_error(num):
    with pytest.raises(ValueError, match="num"):
        TokenMDP(**HAND).sample(HAND_POLICY, num, np.random.default_rng(0))


def test_by_node_repeats_and_by_state_adds_up():
    mdp = TokenMDP(**HAND)
    assert mdp.by_node([10, 20, 30]).tolist() == [10, 20, 30, 20]
    assert mdp.by_node([[1, 2], [3, 4], [5, 6]]).tolist() == [[1, 2], [3, 4], [5, 6], [3, 4]]
    assert mdp.by_state([1, 2, 4, 8]).tolist() == [1, 10, 4]
    for wrong in ([1, 2], 3.0, [1, 2, 3, 4]):
        with pytest.raises(ValueError, match=r"expected one entry per state, 3"):
            mdp.by_node(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        [1.0],
        3.0,
        [1.0, 2.0, 3.0],
        [[1.0, 2.0]],
    ],
)
def test_by_state_refuses_what_has_not_one_entry_per_node(wrong):
    with pytest.raises(ValueError):  # noqa: PT011
        TokenMDP(**HAND).by_state(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda mdp: mdp.visits(HAND_POLICY, [1.0, 0.0]),
        lambda mdp: mdp.visits(HAND_POLICY, np.ones(6)),
        lambda mdp: mdp.visits(HAND_POLICY, [math.nan, 0, 0, 0]),
        lambda mdp: mdp.score_function(HAND_POLICY, np.ones((1, 2)), np.ones(4)),
        lambda mdp: mdp.score_function(HAND_POLICY, np.ones((4, 2)), [1.0]),
        lambda mdp: mdp.score_function(HAND_POLICY, [[1, math.nan], [1, 1], [1, 1], [1, 1]], np.ones(4)),
    ],
)
def test_weights_and_credits_of_a_wrong_shape_or_not_finite_are_refused(wrong):
    with pytest.raises(ValueError, match=r"start_N|credit_NA|weight_N"):
        wrong(TokenMDP(**HAND))


def test_what_a_credit_says_of_an_illegal_token_is_not_read():
    mdp = TokenMDP(**HAND)
    credit = np.where(mdp.legal_NA, 1.0, math.nan)
    assert np.isfinite(mdp.score_function(HAND_POLICY, credit, np.ones(4))).all()


def test_softmax_ignores_illegal_logits_and_is_right_for_large_ones():
    mdp = TokenMDP(**HAND)
    logits = np.array([[0.0, math.log(3)], [1000.0, 1000.0 + math.log(4)], [-7.0, math.nan], [-1000.0, -1000.0]])
    close(mdp.softmax(logits), [[0.25, 0.75], [0.2, 0.8], [1, 0], [0.5, 0.5]])
    assert mdp.softmax(logits)[2, 1] == 0
    for bad in (math.nan, math.inf, -math.inf):
        logits[0, 0] = bad
        with pytest.raises(ValueError, match="logits_NA: got NaN or infinity; expected finite numbers on the legal tokens"):
            mdp.softmax(logits)
    with pytest.raises(ValueError, match=r"logits_NA: got shape \[3, 2\]; expected shape \[4, 2\]"):
        mdp.softmax(np.zeros((3, 2)))


def test_nothing_that_is_returned_is_what_was_passed_in():
    """A policy changed afterwards changes no result, and an input is never written to."""
    mdp = TokenMDP(**HAND)
    policy = np.array(HAND_POLICY)
    weights = np.ones(4)
    before = mdp.solve(policy)
    mdp.visits(policy, weights)
    assert (weights == 1).all()
    start = mdp.start_N.copy()
    policy[0] = 1, 0
    assert before.visits_N.tolist() == [1, 0.25, 0.75, 0.125]
    assert (mdp.start_N == start).all()


# --------------------------------------------------------------------------------------------------------- named instances


def steps(instance: Instance) -> tuple[np.ndarray, np.ndarray]:
    """Depth of, and change of V over, every live step that the policy takes."""
    mdp, policy_NA, _ = instance
    value_N = mdp.solve(policy_NA).value_N
    live = (mdp.next_E != ENDED) & (policy_NA[mdp.node_E, mdp.token_E] > 0)
    return mdp.depth_N[mdp.node_E[live]], np.abs(value_N[mdp.next_E[live]] - value_N[mdp.node_E[live]])


def return_variance(instance: Instance) -> float:
    returns, probabilities = instance.mdp.return_distribution(instance.policy_NA)
    mean = returns @ probabilities
    return float(probabilities @ (returns - mean) ** 2)


@pytest.mark.parametrize("name", INSTANCES)
def test_every_instance_comes_with_a_legal_policy_a_story_and_a_name(name):
    mdp, policy_NA, story = load(name)
    close(mdp.check_policy(policy_NA), policy_NA)
    assert story
    assert mdp.name
    assert len(mdp.state_names) == mdp.num_states
    assert len(mdp.token_names) == mdp.num_tokens
    assert mdp.gamma == 1.0
    assert load(name, gamma=0.5).mdp.gamma == 0.5
    assert (mdp.solve(policy_NA).visits_N > 0).all(), "the policy can meet all of it"


def test_the_calm_chain_is_long_and_calm():
    calm = load("calm-chain")
    s = calm.mdp.solve(calm.policy_NA)
    depth, change = steps(calm)
    assert calm.mdp.max_tokens == 48
    assert len(depth) == 47
    # The verdict is +1 or -1; no step moves V by more than 1 % of that range.
    assert change.max() < 0.02
    # By hand: the chain ends in state i with probability q (1-q)^i (the rest in the last), for 2 p_i - 1.
    stop = 0.08 * 0.92 ** np.arange(48)
    stop[-1] = 0.92**47
    verdict = 2 * (0.35 + 0.3 * np.arange(48) / 47) - 1
    assert s.mean_return == pytest.approx(stop @ verdict, abs=1e-12)
    close(s.length_T[1:], stop)
    assert (np.diff(s.value_N) > 0).all(), "the prospects get better all along"
    assert s.value_N[-1] == pytest.approx(2 * 0.65 - 1)


@pytest.mark.parametrize(
    ("name", "at", "p_good"),
    [("cliff", 8, 0.9), ("early-decision", 0, 0.5), ("late-decision", 13, 0.5)],
)
def test_one_token_decides_and_no_other_matters(name, at, p_good):
    instance = load(name)
    mdp, policy_NA, _ = instance
    s = mdp.solve(policy_NA)
    depth, change = steps(instance)
    assert mdp.max_tokens == 16
    assert sorted(change[depth == at].tolist()) == pytest.approx([2 * (1 - p_good), 2 * p_good])
    assert change[depth != at].max(initial=0.0) < 1e-12
    decisive = np.abs(s.advantage_NA).max(1) > 1e-9
    assert mdp.depth_N[decisive].tolist() == [at]
    assert s.advantage_NA[decisive].tolist() == [pytest.approx([2 * (1 - p_good), -2 * p_good])]
    assert s.mean_return == pytest.approx(2 * p_good - 1, abs=1e-12)
    assert (s.length_T[: at + 2] == 0).all(), "nothing ends before the decision or with it"
    assert s.length_T[at + 2] > 0, "the first token after it may be the last"
    assert s.length_T[16] > 0
    returns, probabilities = mdp.return_distribution(policy_NA)
    assert returns.tolist() == [-1, 1]
    assert probabilities.tolist() == pytest.approx([1 - p_good, p_good])


def test_the_cliff_loses_nearly_everything_in_one_step():
    """Of a range of 2, the wrong token takes 1.8: what the paper's V(s_l) = V(s_(l-1)) is wrong by there."""
    _, change = steps(load("cliff"))
    assert change.max() == pytest.approx(1.8)
    calm = steps(load("calm-chain"))[1].max()
    assert change.max() > 50 * calm


@pytest.mark.parametrize(("length", "at"), [(16, 15), (16, -1), (3, 2), (2, 1)])
def test_a_decision_that_leaves_no_token_to_answer_with_is_refused(length, at):
    with pytest.raises(ValueError, match=f"at: got {at}; expected 0 .. {length - 2}"):
        instances.decision(length=length, at=at)


def test_the_last_possible_decision_is_answered_by_one_forced_token():
    mdp, policy_NA, _ = instances.decision(length=4, at=2, p_good=0.25)
    assert mdp.solve(policy_NA).length_T.tolist() == [0, 0, 0, 0, 1]
    assert mdp.solve(policy_NA).mean_return == pytest.approx(-0.5)


def test_noise_moves_the_variance_and_never_the_value():
    """Var = Var without noise + noise^2 E[shaken tokens]: the noise of each token is independent of everything."""
    quiet = load("noisy-reward", noise=0.0)
    base, s = return_variance(quiet), quiet.mdp.solve(quiet.policy_NA)
    policy_E = quiet.policy_NA[quiet.mdp.node_E, quiet.mdp.token_E] * quiet.mdp.prob_E
    shaken = float((s.visits_N[quiet.mdp.node_E] * policy_E)[quiet.mdp.token_E != 2].sum())
    assert 4 < shaken < 8
    last = base
    for noise in (0.25, 1.0, 3.0):
        noisy = load("noisy-reward", noise=noise)
        t = noisy.mdp.solve(noisy.policy_NA)
        close(t.value_N, s.value_N)
        close(t.q_NA, s.q_NA)
        close(t.length_T, s.length_T)
        variance = return_variance(noisy)
        assert variance == pytest.approx(base + noise**2 * shaken, abs=1e-9)
        assert variance > last
        last = variance
    # A good token is worth 1/8, a bad one -1/8; at the first node both are followed by the same.
    assert s.q_NA[0, 0] - s.q_NA[0, 1] == pytest.approx(2 / 8)


def test_long_traces_pay_in_variance():
    """The longer the chain, the more noise adds up."""
    short, long = (return_variance(load("noisy-reward", length=n)) for n in (3, 8))
    assert long > 1.5 * short


def test_thinking_longer_is_better_and_the_length_is_the_policys():
    previous = None
    for p_end in (0.9, 0.5, 0.3, 0.1, 0.03, 0.01):
        mdp, policy_NA, _ = load("thinking", p_end=p_end)
        s = mdp.solve(policy_NA)
        now = (s.length_T @ np.arange(33), s.mean_return)
        assert previous is None or (now[0] > previous[0] and now[1] > previous[1])
        previous = now
    mdp, policy_NA, _ = load("thinking")
    s = mdp.solve(policy_NA)
    thinking, answering = s.advantage_NA[:-1].T
    assert (thinking > 0).all(), "ending early is a mistake everywhere"
    assert (answering < 0).all()
    # P(right after i thoughts) = 1 - 0.8 * 0.85^i
    close(s.q_NA[:, 1], 2 * (1 - 0.8 * 0.85 ** np.arange(32)) - 1)


def test_thinking_that_costs_too_much_should_end_at_once():
    mdp, policy_NA, _ = load("thinking", cost=0.5)
    assert (mdp.solve(policy_NA).advantage_NA[:-1, 0] < 0).all()
    assert mdp.reward_E[(mdp.token_E == 0)].tolist() == [-0.5] * 31


def test_a_random_instance_is_its_seeds_and_fully_connected():
    one, again, other = load("random"), load("random"), load("random", seed=1)
    assert (one.mdp.reward_E == again.mdp.reward_E).all()
    assert (one.policy_NA == again.policy_NA).all()
    assert not np.array_equal(one.policy_NA, other.policy_NA)
    assert one.mdp.legal_NA.all()
    assert (np.abs(one.mdp.reward_E) <= 2).all()


@pytest.mark.parametrize("seed", range(12))
def test_a_random_instance_rewards_every_token_or_the_end_only(seed):
    everywhere, at_the_end = (load("random", seed=seed, every_token=x, outcomes=2).mdp for x in (True, False))
    assert (everywhere.reward_E[everywhere.end_E == End.RUNNING] != 0).all()
    assert (at_the_end.reward_E[at_the_end.end_E == End.RUNNING] == 0).all()
    assert (at_the_end.reward_E[at_the_end.end_E != End.RUNNING] != 0).all()
    assert np.isclose(np.bincount(everywhere.node_E * 3 + everywhere.token_E, everywhere.prob_E), 1).all()
    solved = everywhere.solve(everywhere.uniform())
    assert solved.ends_E[everywhere.end_E == End.END_TOKEN].sum() > 0.1
    assert solved.ends_E[everywhere.end_E == End.LENGTH_CAP].sum() > 0.01


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("cliv", {}, r"instance: got 'cliv'; expected one of calm-chain, .*; did you mean cliff\?"),
        ("", {}, r"instance: got ''; expected one of"),
        ("cliff", {"lenght": 3}, r"cliff: got parameter 'lenght'; expected some of length, p_good, gamma"),
        ("thinking", {"gamma": 2.0}, r"gamma: got 2\.0"),
        ("thinking", {"p_end": 1.5}, r"policy_NA"),
        ("noisy-reward", {"noise": math.inf}, r"edges\.reward"),
        ("calm-chain", {"first": 1.2}, r"edges\.prob"),
    ],
)
def test_mistakes_in_an_instance_are_refused_by_name(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        load(name, **parameters)


@pytest.mark.parametrize("name", INSTANCES)
def test_a_return_distribution_of_every_instance_has_its_mean(name):
    instance = load(name)
    returns, probabilities = instance.mdp.return_distribution(instance.policy_NA)
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert returns @ probabilities == pytest.approx(instance.mdp.solve(instance.policy_NA).mean_return, abs=1e-10)


@pytest.mark.parametrize("name", INSTANCES)
@pytest.mark.parametrize("window", [1, 3])
def test_every_instance_can_be_enumerated_window_by_window(name, window):
    """As its module promises: each window begins with the visits of its layer."""
    mdp, policy_NA, _ = load(name)
    s = mdp.solve(policy_NA)
    ended = 0.0
    for first in range(0, mdp.max_tokens, window):
        start_N = np.where(mdp.depth_N == first, s.visits_N, 0.0)
        if not start_N.any():
            break
        t = mdp.trajectories(policy_NA, start_N=start_N, num_tokens=window)
        arrived = np.bincount(t.next_node_B[t.cut_B], t.prob_B[t.cut_B], minlength=mdp.num_nodes)
        close(arrived, np.where(mdp.depth_N == first + window, s.visits_N, 0.0))
        ended += t.prob_B[~t.cut_B].sum()
    assert ended == pytest.approx(1, abs=1e-12)


def test_the_oracle_and_the_code_disagree_where_a_reward_differs():
    """The laws above can fail: one reward moved by 1/4 shows in V."""
    rows = [(0, 0, Fraction(1), Fraction(1), ENDED)]
    tiny = Tiny(1, 1, rows, 1, Fraction(1), [Fraction(1)], [Fraction(0)], {(0, 0): [Fraction(1)]})
    other = dataclasses.replace(tiny, rows=[(0, 0, Fraction(1), Fraction(5, 4), ENDED)])
    assert tiny.value(0, 0) == 1
    assert other.mdp().solve([[1.0]]).mean_return == 1.25
