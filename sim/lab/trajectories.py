"""Stretches of responses: every one with its probability, or drawn; and the distribution of returns.

Functions of an unrolled graph and a policy, which `TokenMDP` has as methods.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sim.lab.checks import Floats, Ints, check_count, vector
from sim.lab.unrolled import ENDED, Unrolled
from tppo_ref.method.records import End


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
        """The stretch ended while its response was RUNNING."""
        return self.end_B == End.RUNNING


def trajectories(
    mdp: Unrolled, policy_NA: ArrayLike, *, start_N: ArrayLike | None = None, num_tokens: int | None = None, limit: int = 2_000_000
) -> Trajectories:
    """Every stretch of up to `num_tokens` tokens (None: to the end) that has a probability, from nodes of one depth.

    start_N are probabilities of the first node (default: where responses begin); prob_B sums to their sum.
    ValueError when there are more than `limit` stretches.
    """
    joint_E = mdp.joint(mdp.check_policy(policy_NA))
    node, prob, num_tokens = _starts(mdp, start_N, num_tokens)
    path = np.empty((len(node), 0), dtype=np.int64)
    done: list[tuple[Ints, Floats]] = []
    for depth in range(num_tokens):
        row, edge = _expand(mdp, node, joint_E)
        if len(row) + sum(len(p) for p, _ in done) > limit:
            raise ValueError(f"limit: got more than {limit} trajectories of {depth + 1} tokens; expected fewer; sample instead")
        path = np.concatenate([path[row], edge[:, None]], axis=1)
        prob, node = prob[row] * joint_E[edge], mdp.next_E[edge]
        stay = (node != ENDED) & (depth + 1 < num_tokens)
        done.append((path[~stay], prob[~stay]))
        path, prob, node = path[stay], prob[stay], node[stay]
        if not len(node):
            break
    width = max((p.shape[1] for p, _ in done if len(p)), default=0)
    edge_BT = np.concatenate([np.pad(p[:, :width], ((0, 0), (0, width - min(p.shape[1], width))), constant_values=-1)
                              for p, _ in done])  # fmt: skip
    return _record(mdp, np.concatenate([p for _, p in done]), edge_BT)


def sample(
    mdp: Unrolled,
    policy_NA: ArrayLike,
    num: int,
    rng: np.random.Generator,
    *,
    start_N: ArrayLike | None = None,
    num_tokens: int | None = None,
) -> Trajectories:
    """`num` independent stretches, as `trajectories` but drawn; the same generator state gives the same ones."""
    check_count("num", num)
    joint_E = mdp.joint(mdp.check_policy(policy_NA))
    first, prob, num_tokens = _starts(mdp, start_N, num_tokens)
    total = np.cumsum(prob)
    node = first[_draw(total, np.zeros(num), np.full(num, total[-1]), rng)]
    below_N = np.concatenate([[0.0], np.cumsum(joint_E)])[mdp.edge_N]  # cumulative probability below each node's edges
    edge_BT = np.full((num, num_tokens), -1)
    alive = np.arange(num)
    cumulative_E = np.cumsum(joint_E)
    for t in range(num_tokens):
        edge = _draw(cumulative_E, below_N[node], below_N[node + 1], rng)
        edge_BT[alive, t] = edge
        live = mdp.next_E[edge] != ENDED
        alive, node = alive[live], mdp.next_E[edge][live]
        if not len(alive):
            break
    return _record(mdp, np.full(num, 1 / num), edge_BT[:, : int((edge_BT >= 0).sum(1).max(initial=0))])


def _starts(mdp: Unrolled, start_N: ArrayLike | None, num_tokens: int | None) -> tuple[Ints, Floats, int]:
    weight_N = mdp.start_N if start_N is None else vector("start_N", start_N, mdp.num_nodes)
    node = np.flatnonzero(weight_N)
    if not len(node) or (weight_N < 0).any() or len(set(mdp.depth_N[node])) > 1:
        raise ValueError("start_N: got other numbers; expected probabilities on nodes of one depth")
    if num_tokens is not None:
        check_count("num_tokens", num_tokens)
    left = mdp.max_tokens - int(mdp.depth_N[node[0]])
    return node, weight_N[node], left if num_tokens is None else min(num_tokens, left)


def _expand(mdp: Unrolled, node_B: Ints, joint_E: Floats) -> tuple[Ints, Ints]:
    """(row, edge) for every possible edge out of each row's node."""
    count = mdp.edge_N[node_B + 1] - mdp.edge_N[node_B]
    row = np.repeat(np.arange(len(node_B)), count)
    edge = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count) + mdp.edge_N[node_B][row]
    possible = joint_E[edge] > 0
    return row[possible], edge[possible]


def _record(mdp: Unrolled, prob_B: Floats, edge_BT: Ints) -> Trajectories:
    mask_BT = edge_BT >= 0
    last_B = np.take_along_axis(edge_BT, mask_BT.sum(1)[:, None] - 1, axis=1)[:, 0]
    return Trajectories(
        prob_B=prob_B,
        node_BT=np.where(mask_BT, mdp.node_E[edge_BT], -1),
        token_BT=np.where(mask_BT, mdp.token_E[edge_BT], -1),
        edge_BT=edge_BT,
        reward_BT=np.where(mask_BT, mdp.reward_E[edge_BT], 0.0),
        mask_BT=mask_BT,
        end_B=mdp.end_E[last_B],
        next_node_B=mdp.next_E[last_B],
    )


def return_distribution(mdp: Unrolled, policy_NA: ArrayLike, *, limit: int = 1_000_000) -> tuple[Floats, Floats]:
    """Possible returns of a response, ascending, and their probabilities. Returns that agree to 1e-12 are one.

    ValueError when more than `limit` different partial returns have to be kept at once.
    """
    joint_E = mdp.joint(mdp.check_policy(policy_NA))
    node = np.flatnonzero(mdp.start_N)
    total, prob = np.zeros(len(node)), mdp.start_N[node]
    ended: list[tuple[Floats, Floats]] = []
    for depth in range(mdp.max_tokens):
        row, edge = _expand(mdp, node, joint_E)
        total = total[row] + mdp.gamma**depth * mdp.reward_E[edge]
        prob, node = prob[row] * joint_E[edge], mdp.next_E[edge]
        ended.append(_merge(total[node == ENDED], prob[node == ENDED])[:2])
        live = node != ENDED
        total, prob, node = _merge(total[live], prob[live], node[live])
        if len(node) > limit:
            raise ValueError(f"limit: got more than {limit} partial returns after {depth + 1} tokens; expected fewer; raise it")
        if not len(node):
            break
    total, prob, _ = _merge(*(np.concatenate(x) for x in zip(*ended, strict=True)))
    return total, prob


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
