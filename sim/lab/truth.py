"""What is true of a policy and of a critic on a token MDP, as the Trainer meets it: it pays one score, at the end of a response."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from sim.lab.checks import Floats
from sim.lab.token_mdp import Solution, TokenMDP
from sim.lab.unrolled import ENDED
from tppo_ref.loop.updates import explained_variance

OFTEN_VISITED = 0.01  # nodes passed by fewer responses than this do not count for `critic_max`


def terminal_only(mdp: TokenMDP) -> bool:
    """True where only the last token of a response is ever rewarded."""
    return not mdp.reward_E[mdp.next_E != ENDED].any()


def true_value(mdp: TokenMDP, policy_NA: ArrayLike, solution: Solution | None = None) -> Floats:
    """What the Trainer's critic should say at each node [N] under a policy: V, plus the expected rewards on the way there.

    The Trainer pays the whole return at the end, so a target holds the rewards before its token too. With rewards at the end only
    this is V. With others it is the best that a function of the node can do, and exact for lambda = 1 only: the node does not know
    which rewards came before it, so a difference of two such values holds more than one token's news.
    `solution`: mdp.solve(policy_NA), where it is known already.
    """
    solution = solution or mdp.solve(policy_NA)
    if terminal_only(mdp):
        return solution.value_N
    policy_NA = np.asarray(policy_NA, dtype=np.float64)
    so_far_N = np.zeros(mdp.num_nodes)  # expected rewards before the node, times the probability of passing it
    for first, stop in zip(mdp.layer_T[:-1], mdp.layer_T[1:], strict=True):
        edges = np.arange(mdp.edge_N[first], mdp.edge_N[stop])
        edges = edges[mdp.next_E[edges] != ENDED]
        node = mdp.node_E[edges]
        joint = policy_NA[node, mdp.token_E[edges]] * mdp.prob_E[edges]
        np.add.at(so_far_N, mdp.next_E[edges], joint * (so_far_N[node] + mdp.reward_E[edges] * solution.visits_N[node]))
    passed = solution.visits_N > 0
    return solution.value_N + np.divide(so_far_N, solution.visits_N, out=np.zeros_like(so_far_N), where=passed)


def optimum(mdp: TokenMDP) -> Solution:
    """Of the best policy, by policy iteration (one round per layer at most: the horizon is finite)."""
    solution = mdp.solve(mdp.uniform())
    for _ in range(mdp.max_tokens):
        best_N = np.where(mdp.legal_NA, solution.q_NA, -np.inf).argmax(1)
        solution = mdp.solve(np.eye(mdp.num_tokens)[best_N])
    return solution


def mean_length(solution: Solution) -> float:
    """Expected tokens of a response: every node is passed at most once."""
    return float(solution.visits_N.sum())


def entropy(policy_NA: Floats, visits_N: Floats) -> float:
    """Of the next token, in nats, averaged over the tokens of responses."""
    log_NA = np.log(np.where(policy_NA > 0, policy_NA, 1.0))
    return float(visits_N @ -(policy_NA * log_NA).sum(1) / visits_N.sum())


def critic_error(mdp: TokenMDP, value_N: Floats, true_N: Floats, visits_N: Floats) -> dict[str, float]:
    """The critic_ fields of a `Record`, and explained_variance."""
    error_N = value_N - true_N

    def rms(weight_N: Floats) -> float:
        return math.sqrt(weight_N @ error_N**2 / weight_N.sum()) if weight_N.any() else math.nan

    third_N = mdp.depth_N * 3 // mdp.max_tokens
    thirds = {f"critic_rms_{name}": rms(visits_N * (third_N == i)) for i, name in enumerate(("early", "middle", "late"))}
    share_N = visits_N / visits_N.sum()
    variances = (float(share_N @ (x_N - share_N @ x_N) ** 2) for x_N in (true_N, error_N))
    return thirds | {
        "critic_rms": rms(visits_N),
        "critic_bias": float(visits_N @ error_N / visits_N.sum()),
        "critic_max": float(np.abs(error_N[visits_N >= OFTEN_VISITED]).max(initial=0.0)),
        "explained_variance": explained_variance(*variances),
    }
