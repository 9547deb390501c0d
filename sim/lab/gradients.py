"""The error of an estimator's expected policy gradient, split into the cut's share and the critic's, and the window it asks for.

    g*    = E[sum_t A^pi(s_t, a_t) grad log pi(a_t | s_t)]                      what PPO's sum over tokens aims at
    g     = E[sum_t mask_t w_t A^_t grad log pi(a_t | s_t)]                     what the estimator gives, in expectation
    whole = the same from whole responses, with the same critic and lambda      nothing cut, nothing stale, no tail

    g - g* = (g - whole)  +  (whole - g*)
              the cut's       the critic's

Gradients are by the softmax logits of each node, or, shared, of each state. A baseline in the estimate adds nothing to g, however
wrong it is: that is why this error, not the bias token by token, decides what a policy learns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from sim.lab.bias import conditional_moments, every_offset
from sim.lab.checks import Floats, check_choice
from sim.lab.estimators import Estimator
from sim.lab.rollouts import Rollouts

Measure = Literal["relative", "rescaled"]


@dataclasses.dataclass(frozen=True)
class GradientError:
    """How far an expected gradient is from the true one. All but the last four in units of ||g*||.

    relative       ||g - g*||: it counts a gradient that is only too short as wrong, as excluding a tail makes it
    rescaled       min over c >= 0 of ||c g - g*||: the error that no learning rate, whitening or token mean can mend
    cut            ||g - whole||: the cut's share (with its tail, its staleness)
    critic         ||whole - g*||: the critic's share (and a length-adaptive lambda's)
    cosine         of g and g*; 0 where g is 0
    length         ||g||
    trained_share  trained tokens of a step / sampled ones
    true_norm      ||g*||, in units of reward

    relative <= cut + critic, and relative >= rescaled = sqrt(1 - max(cosine, 0)^2).
    """

    relative: float
    rescaled: float
    cut: float
    critic: float
    cosine: float
    length: float
    trained_share: float
    true_norm: float


@dataclasses.dataclass(frozen=True)
class Expected:
    """An estimator's expected gradient, [N, A] or, shared, [S, A], and the trained share of a step's tokens."""

    gradient: Floats
    trained_share: float


def expected_gradient(
    rollouts: Rollouts,
    critic_N: ArrayLike,
    estimator: Estimator,
    window: int,
    offsets: Sequence[int] | None = None,
    *,
    shared: bool = False,
) -> Expected:
    """E[sum_t mask_t w_t A^_t grad log pi(a_t | s_t)] per response that a step begins, averaged over `offsets` (default: [window]).

    A sum over tokens: no token mean, no whitening. Raises ValueError as `bias.conditional_moments`.
    """
    mdp, policy_NA = rollouts.mdp, rollouts.policy_NA
    moments = [conditional_moments(rollouts, critic_N, estimator, window, o) for o in ([window] if offsets is None else offsets)]
    credit_NA = sum(m.trained_NA * m.mean_NA for m in moments) / len(moments)
    # score_function weighs with visits x policy; trained_NA already does, with the tail and the older policy in it
    per_draw_NA = np.divide(credit_NA, policy_NA, out=np.zeros_like(policy_NA), where=policy_NA > 0)
    gradient_NA = mdp.score_function(policy_NA, per_draw_NA, np.ones(mdp.num_nodes))
    trained, sampled = (sum(float(getattr(m, name).sum()) for m in moments) for name in ("trained_NA", "sampled_NA"))
    return Expected(mdp.by_state(gradient_NA) if shared else gradient_NA, trained / sampled)


def gradient_errors(
    rollouts: Rollouts,
    critic_N: ArrayLike,
    estimator: Estimator,
    windows: Iterable[int],
    *,
    average_offsets: bool = False,
    shared: bool = False,
) -> dict[int, GradientError]:
    """`GradientError` of each window, ascending.

    average_offsets: responses begin anywhere in a window (immediate refill), each first edge 1 .. window as likely.
    Raises ValueError where the true gradient is 0 (nothing to compare with), for no windows, and as `bias.conditional_moments`.
    """
    windows = sorted(set(windows))
    if not windows:
        raise ValueError("windows: got none; expected at least one window")
    true = rollouts.mdp.by_state(rollouts.policy_gradient_NA) if shared else rollouts.policy_gradient_NA
    if not np.linalg.norm(true) > 1e-14 * max(1.0, float(np.abs(rollouts.solution.q_NA).max())):
        raise ValueError("policy: got a true gradient of 0, to which nothing is relative; expected something to learn")
    whole = expected_gradient(rollouts, critic_N, estimator.uncut, windows[0], shared=shared).gradient
    errors: dict[int, GradientError] = {}
    for window in windows:
        same = [w for w in errors if w >= rollouts.mdp.max_tokens]  # nothing is cut there either
        if same and not average_offsets:
            errors[window] = errors[same[0]]
            continue
        offsets = every_offset(window) if average_offsets else None
        expected = expected_gradient(rollouts, critic_N, estimator, window, offsets, shared=shared)
        errors[window] = _compare(expected, whole, true)
    return errors


def _compare(expected: Expected, whole: Floats, true: Floats) -> GradientError:
    gradient, scale = expected.gradient, float(np.linalg.norm(true))
    length = float(np.linalg.norm(gradient)) / scale
    cosine = float((gradient * true).sum() / scale**2 / length) if length > 0 else 0.0
    # not sqrt(1 - cosine^2), which loses half of the digits near 0
    rescaled = float(np.linalg.norm(max(cosine, 0.0) / length * gradient - true)) / scale if length > 0 else 1.0
    return GradientError(
        relative=float(np.linalg.norm(gradient - true)) / scale,
        rescaled=rescaled,
        cut=float(np.linalg.norm(gradient - whole)) / scale,
        critic=float(np.linalg.norm(whole - true)) / scale,
        cosine=cosine,
        length=length,
        trained_share=expected.trained_share,
        true_norm=scale,
    )


def knee(errors: Mapping[int, GradientError], tolerance: float, measure: Measure = "relative") -> int | None:
    """The smallest window such that it and every larger one examined keep the gradient's error within the tolerance, else None.

    Larger ones too, because the error may rise again: an edge may fall just behind the token that decides. "relative" is the
    strict measure, also of length; "rescaled" forgives a gradient that is right but for its length.
    """
    check_choice("measure", measure, ("relative", "rescaled"))
    if not tolerance >= 0:
        raise ValueError(f"tolerance: got {tolerance!r}; expected a number of at least 0")
    smallest = None
    for window in sorted(errors, reverse=True):
        if getattr(errors[window], measure) > tolerance:
            break
        smallest = window
    return smallest
