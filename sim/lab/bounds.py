"""Bounds of docs/theory.md on what a cut does to an advantage, exactly: P4 for any critic, the bracket of P2 for the exact one.

For the token a_t at node s_t, cut after l tokens, n = l - t known tokens, A GAE over the whole response and B the estimate from
the cut row, both with the same critic V and trace parameter, e = V - V^pi:

    P4   |E[A_t - B_t | s_t, a_t]| <= (gamma lam)^{n-1} gamma P(T > l | s_t, a_t) [ step + lam |e| (1 + f) ]
         f = gamma (1 - lam) / (1 - gamma lam)

with f = 0 at lam = 1 and |e| the largest error. `step` is what the rule's guess of V(s_l) may miss: for "previous" (EGAE,
the paper's) Lip, the largest |V(s') - V(s)| over one live step s -> s'; by the same proof 0 for "critic" and the largest
|V| for "zero". A trace parameter that depends on the response's own length has no such bound.
"""

from __future__ import annotations

import numpy as np

from sim.lab.checks import Floats, Ints
from sim.lab.critics import check_critic
from sim.lab.rollouts import Rollouts
from sim.lab.unrolled import ENDED
from tppo_ref.method.advantages import CutValue


def at_the_cut(rollouts: Rollouts, payoff_N: Floats, edges: Ints) -> Floats:
    """E[payoff(s_l) 1(T > l) | s_t, a_t], [N, A], under the current policy; l is the first of the ascending `edges` behind t.

    payoff 1 gives P(T > l | s_t, a_t). 0 where no edge follows.
    """
    mdp, is_edge = rollouts.mdp, np.zeros(rollouts.mdp.max_tokens + 1, dtype=bool)
    is_edge[edges] = True
    q_NA, value_N = np.zeros(mdp.legal_NA.shape), np.zeros(mdp.num_nodes)
    for depth in reversed(range(mdp.max_tokens)):
        first, stop = int(mdp.layer_T[depth]), int(mdp.layer_T[depth + 1])
        edge = slice(mdp.edge_N[first], mdp.edge_N[stop])
        next_E, prob_E = mdp.next_E[edge], mdp.prob_E[edge]
        gain_E = np.where(next_E == ENDED, 0.0, (payoff_N if is_edge[depth + 1] else value_N)[next_E]) * prob_E
        np.add.at(q_NA, (mdp.node_E[edge], mdp.token_E[edge]), gain_E)
        value_N[first:stop] = (rollouts.policy_NA[first:stop] * q_NA[first:stop]).sum(1)
    return q_NA


def largest_step_T(rollouts: Rollouts, critic_N: Floats) -> Floats:
    """[max_tokens + 1], at l the largest |V(s') - V(s)| over the live steps s -> s' that the current policy can take to s' = s_l.

    Its maximum is P4's Lip.
    """
    mdp, largest_T = rollouts.mdp, np.zeros(rollouts.mdp.max_tokens + 1)
    taken_E = rollouts.policy_NA[mdp.node_E, mdp.token_E] * rollouts.solution.visits_N[mdp.node_E]
    live_E = (mdp.next_E != ENDED) & (taken_E > 0)
    to_E, from_E = mdp.next_E[live_E], mdp.node_E[live_E]
    np.maximum.at(largest_T, mdp.depth_N[to_E], np.abs(critic_N[to_E] - critic_N[from_E]))
    return largest_T


def cut_bound(
    rollouts: Rollouts,
    critic_N: Floats,
    window: int,
    offset: int | None = None,
    *,
    lam: float,
    cut_value: CutValue = "previous",
    local: bool = False,
) -> Floats:
    """P4's right-hand side for every (node, token), [N, A], in units of reward. See the module's docstring.

    local: Lip and |V| over the states at this cut alone, |e| over those at the cut and behind it. The proof needs no more, and
    where one token moves the value far from any edge the bound is then not spoilt by it.
    """
    mdp, gamma = rollouts.mdp, rollouts.mdp.gamma
    critic_N, edges = check_critic(mdp, critic_N), rollouts.edges(window, offset)
    step_T, value_T, error_T = largest_step_T(rollouts, critic_N), *(np.zeros(mdp.max_tokens + 1) for _ in range(2))
    reached = rollouts.solution.visits_N > 0
    np.maximum.at(value_T, mdp.depth_N[reached], np.abs(critic_N)[reached])
    np.maximum.at(error_T, mdp.depth_N[reached], np.abs(critic_N - rollouts.solution.value_N)[reached])
    error_T = np.maximum.accumulate(error_T[::-1])[::-1]
    guess_T = {"previous": step_T, "critic": np.zeros_like(step_T), "zero": value_T}[cut_value]
    if not local:
        guess_T, error_T = (np.full_like(x, x.max()) for x in (guess_T, error_T))
    later = gamma * (1 - lam) / (1 - gamma * lam) if lam < 1 else 0.0  # lam < 1: gamma lam < 1
    alive_NA = at_the_cut(rollouts, np.ones(mdp.num_nodes), edges)
    edge_N = rollouts.edge_N(window, offset)
    bracket_N = (guess_T + lam * error_T * (1 + later))[edge_N]
    return ((gamma * lam) ** (edge_N - mdp.depth_N - 1) * gamma * bracket_N)[:, None] * alive_NA


def ending_surprise(rollouts: Rollouts) -> Floats:
    """P2's bracket at s = s_{l-1} for the exact critic, [N]: what EGAE loses in expectation when a row is cut one token after s.

    (1 - gamma) V(s) + p_end(s) (gamma V(s) - R_end(s)) - E[r 1(the next token does not end) | s]
    """
    mdp, value_N = rollouts.mdp, rollouts.solution.value_N
    joint_E = rollouts.policy_NA[mdp.node_E, mdp.token_E] * mdp.prob_E
    ends_E = mdp.next_E == ENDED
    p_end_N = np.bincount(mdp.node_E, joint_E * ends_E, minlength=mdp.num_nodes)
    reward_N = np.bincount(mdp.node_E, joint_E * mdp.reward_E, minlength=mdp.num_nodes)  # p_end R_end + E[r 1(goes on)]
    return (1 - mdp.gamma) * value_N + p_end_N * mdp.gamma * value_N - reward_N


def surprise_bound(rollouts: Rollouts, window: int, offset: int | None = None, *, lam: float) -> Floats:
    """P2's bound for EGAE with the exact critic, [N, A]: (gamma lam)^{n-1} E[|bracket(s_{l-1})| 1(T > l-1) | s_t, a_t].

    NaN at n = 1, for which P2 says nothing: the token at s_{l-1} is then given.
    """
    mdp, edges = rollouts.mdp, rollouts.edges(window, offset)
    distance_N = rollouts.edge_N(window, offset) - mdp.depth_N
    expected_NA = at_the_cut(rollouts, np.abs(ending_surprise(rollouts)), edges[edges > 1] - 1)
    bound_NA = (mdp.gamma * lam) ** (distance_N - 1)[:, None] * expected_NA
    bound_NA[distance_N == 1] = np.nan
    return bound_NA
