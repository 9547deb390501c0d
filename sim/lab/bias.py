"""Exact bias and variance of every estimator, token by token and at each distance to the cut.

    rollouts = Rollouts(mdp, policy_NA)
    critic_N = critic("noise:0.1", mdp, rollouts.solution)
    by_distance(rollouts, critic_N, ESTIMATORS["egae"], window=8)

Expectations run over everything that can follow (s_t, a_t): rows that end and rows that are cut. Enumeration, so no sampling error;
float64. Suffixes: N nodes, A tokens; [N, A] entries of tokens that no response contains are 0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from sim.lab import instances
from sim.lab.bounds import at_the_cut, cut_bound, surprise_bound
from sim.lab.checks import Floats, Ints
from sim.lab.critics import check_critic
from sim.lab.estimators import Estimator, estimate
from sim.lab.rollouts import Rollouts, Stretches


@dataclasses.dataclass(frozen=True)
class Moments:
    """What an estimator says of each (node, token), given that a response contains it.

    sampled_NA    how many of these tokens a step samples, per response that it begins (visits x policy where nothing is stale)
    trained_NA    how many it trains, in this step's rows: less than sampled where a tail is excluded
    mean_NA       E[estimate | s_t, a_t, trained], importance weight included; 0 where nothing is trained
    variance_NA   Var[estimate | s_t, a_t, trained]
    truth_NA      A^pi(s_t, a_t)
    distance_N    n = l - t, tokens from t to the next window edge
    """

    sampled_NA: Floats
    trained_NA: Floats
    mean_NA: Floats
    variance_NA: Floats
    truth_NA: Floats
    distance_N: Ints

    @property
    def bias_NA(self) -> Floats:
        """mean - truth on trained tokens, else 0."""
        return np.where(self.trained_NA > 0, self.mean_NA - self.truth_NA, 0.0)


def conditional_moments(
    rollouts: Rollouts, critic_N: ArrayLike, estimator: Estimator, window: int, offset: int | None = None
) -> Moments:
    """Exact mean and variance of the estimate of every (node, token), windows cut at offset, offset + window, ...

    offset in 1 .. window, default window. Raises ValueError for a critic of the wrong shape or not finite, a window below 1, an
    offset outside 1 .. window, and an enumeration beyond `rollouts.limit`.
    """
    mdp, critic_N = rollouts.mdp, check_critic(rollouts.mdp, critic_N)
    rows = estimator.rows(rollouts, window, offset)
    error_N, visits_N = critic_N - rollouts.solution.value_N, rollouts.solution.visits_N
    critic_rms = math.sqrt(visits_N @ error_N**2 / visits_N.sum())
    credit = estimate(rows, critic_N, estimator, mdp, window, critic_rms=critic_rms)
    sampled_NA = rollouts.sampled_NA(window if estimator.cuts or estimator.train_on == "ended" else None, offset)
    train_BT, estimate_BT = credit.train_BT.numpy(), credit.estimate_BT.numpy()
    trained_NA = _total(rollouts, rows, train_BT)
    share_NA = np.where(trained_NA > 0, trained_NA, 1.0)
    mean_NA = _total(rollouts, rows, train_BT, estimate_BT) / share_NA
    mean_BT = mean_NA[rows.node_BT.numpy(), rows.token_BT.numpy()]
    variance_NA = _total(rollouts, rows, train_BT, (estimate_BT - mean_BT) ** 2) / share_NA
    distance_N = rollouts.edge_N(window, offset) - mdp.depth_N
    return Moments(sampled_NA, trained_NA, mean_NA, variance_NA, rollouts.solution.advantage_NA, distance_N)


def _total(rollouts: Rollouts, rows: Stretches, chosen_BT: np.ndarray, x_BT: np.ndarray | None = None) -> Floats:
    """Sum over the chosen tokens of probability x, per (node, token). [N, A]."""
    num_nodes, num_tokens = rollouts.mdp.legal_NA.shape
    pair = (rows.node_BT.numpy() * num_tokens + rows.token_BT.numpy())[chosen_BT]
    weight = np.broadcast_to(rows.prob_B.numpy()[:, None], chosen_BT.shape)[chosen_BT]
    weight = weight if x_BT is None else weight * x_BT[chosen_BT]
    total = np.bincount(pair, weight, minlength=num_nodes * num_tokens).astype(np.float64)
    return total.reshape(num_nodes, num_tokens)


@dataclasses.dataclass(frozen=True)
class AtDistance:
    """The tokens at one distance to the cut, averaged over how often they are trained. Units of reward; None: says nothing here.

    distance        n = l - t: the last token before the cut has 1
    tokens          trained tokens of a step per response that it begins
    trained_share   of the sampled ones
    mean_bias       mean of |E[estimate | s_t, a_t] - A^pi|; rms_bias, max_bias its root mean square and largest
    cut_bias        mean of |E[estimate - GAE over the whole response | s_t, a_t]|, same critic and lambda: the cut's share
    bound           mean of P4's bound of it: for rows that are cut, without a tail rule, with a lambda that is a number
    second_bound    mean of P2's: for EGAE with the exact critic, from n = 2 on
    variance        mean of Var[estimate | s_t, a_t]
    """

    distance: int
    tokens: float
    trained_share: float
    mean_bias: float
    rms_bias: float
    max_bias: float
    cut_bias: float
    bound: float | None
    second_bound: float | None
    variance: float


def by_distance(
    rollouts: Rollouts, critic_N: ArrayLike, estimator: Estimator, window: int, offsets: Sequence[int] | None = None
) -> list[AtDistance]:
    """Bias and variance at each distance to the cut, nearest first; windows at whose edge nothing can be cut are left out.

    offsets: first edges to average over (`every_offset(window)`: responses begin anywhere in a window); default: [window].
    Empty where nothing is ever cut. Raises ValueError as `conditional_moments`.
    """
    critic_N = check_critic(rollouts.mdp, critic_N)
    columns: list[tuple[np.ndarray, ...]] = []
    for offset in [window] if offsets is None else offsets:
        moments = conditional_moments(rollouts, critic_N, estimator, window, offset)
        whole = conditional_moments(rollouts, critic_N, estimator.uncut, window, offset)
        bounds = _bounds(rollouts, critic_N, estimator, window, offset)
        chosen = (moments.sampled_NA > 0) & _before_a_cut(rollouts, window, offset)[:, None]
        cut_NA = np.where(moments.trained_NA > 0, np.abs(moments.mean_NA - whole.mean_NA), 0.0)
        distance_NA = np.broadcast_to(moments.distance_N[:, None], chosen.shape)
        arrays = distance_NA, moments.sampled_NA, moments.trained_NA, np.abs(moments.bias_NA), cut_NA, moments.variance_NA, *bounds
        columns.append(tuple(x[chosen] for x in arrays))
    distance, *rest = (np.concatenate(x) for x in zip(*columns, strict=True))
    return [_at(int(n), *(x[distance == n] for x in rest)) for n in np.unique(distance)]


def every_offset(window: int) -> range:
    """All first edges: with immediate refill a response begins anywhere in a window."""
    return range(1, window + 1)


def _before_a_cut(rollouts: Rollouts, window: int, offset: int) -> np.ndarray:
    """Nodes whose next edge some response passes alive. [N]."""
    alive_T = np.bincount(rollouts.mdp.depth_N, rollouts.solution.visits_N, minlength=rollouts.mdp.max_tokens + 1) > 0
    return alive_T[rollouts.edge_N(window, offset)]


def _bounds(rollouts: Rollouts, critic_N: Floats, estimator: Estimator, window: int, offset: int) -> tuple[Floats, Floats]:
    """P4's and P2's bounds, [N, A], NaN where they say nothing."""
    first = second = np.full(rollouts.mdp.legal_NA.shape, np.nan)
    if estimator.tail_tokens or estimator.lam_alpha is not None:
        return first, second
    rule = estimator.cut_value
    if callable(rule) or rule == "none" or rule == "monte-carlo":
        return first, second
    first = cut_bound(rollouts, critic_N, window, offset, lam=estimator.lam, cut_value=rule)
    if rule == "previous" and np.abs(critic_N - rollouts.solution.value_N).max() < 1e-12:
        second = surprise_bound(rollouts, window, offset, lam=estimator.lam)
    return first, second


def _at(
    distance: int, sampled: Floats, trained: Floats, bias: Floats, cut: Floats, variance: Floats, bound: Floats, second: Floats
) -> AtDistance:
    weight = trained / (trained.sum() or 1.0)

    def mean(x: Floats) -> float:
        return float(weight @ x)

    def known(x: Floats) -> float | None:
        return None if np.isnan(x).any() else mean(x)

    return AtDistance(
        distance=distance, tokens=float(trained.sum()), trained_share=float(trained.sum() / sampled.sum()), mean_bias=mean(bias),
        rms_bias=mean(bias**2) ** 0.5, max_bias=float(bias.max()), cut_bias=mean(cut), bound=known(bound),
        second_bound=known(second), variance=mean(variance),
    )  # fmt: skip


class VarianceOrder(NamedTuple):
    """At how many (token, window) EGAE's variance lies above the whole response's (GAE), above and below that of the critic's own
    value at the cut, and at how many the last lies above the whole response's (P5: none, with the exact critic)."""

    cases: int
    above_whole: int
    above_critic: int
    below_critic: int
    critic_above_whole: int


def variance_order(worlds: Iterable[Rollouts], windows: Sequence[int], lam: float = 0.95) -> VarianceOrder:
    """Counts over the tokens of each world's first window that its cut can follow, for each of `windows`, with the exact critic.

    Variances given (s_t, a_t); those within 1e-9 count as equal.
    """
    counts = []
    for rollouts in worlds:
        value_N, depth_N = rollouts.solution.value_N, rollouts.mdp.depth_N
        for window in windows:
            alive_NA = at_the_cut(rollouts, np.ones(rollouts.mdp.num_nodes), rollouts.edges(window))
            rules = (Estimator(lam=lam, cut_value="none"), Estimator(lam=lam), Estimator(lam=lam, cut_value="critic"))
            moments = [conditional_moments(rollouts, value_N, rule, window) for rule in rules]
            chosen_NA = (moments[1].sampled_NA > 0) & (depth_N < window)[:, None] & (alive_NA > 0)
            whole, egae, critic = (m.variance_NA[chosen_NA] for m in moments)
            pairs = ((egae, whole), (egae, critic), (critic, egae), (critic, whole))
            counts.append([len(egae), *(int((one > other + 1e-9).sum()) for one, other in pairs)])
    return VarianceOrder(*np.sum(counts, axis=0).tolist())


def random_variance_order(every_token: bool, num_mdps: int = 300) -> VarianceOrder:
    """`variance_order` of the random MDPs of seeds 0 .. num_mdps - 1: 4 states, 2 tokens, responses of at most 5 tokens, one
    outcome or two in turn, each an end with probability 0.2; windows of 1 to 4, lambda 0.95; rewards at every token, or at the end
    only."""
    made = (instances.random(seed=seed, num_states=4, num_tokens=2, max_tokens=5, outcomes=1 + seed % 2, p_end=0.2,
                             every_token=every_token) for seed in range(num_mdps))  # fmt: skip
    return variance_order((Rollouts(mdp, policy_NA) for mdp, policy_NA, _ in made), range(1, 5))
