"""Notebook 03: the rules for the tail as estimators, their errors, and the figure of them. What is computed is sim.lab's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from sim.lab.estimators import Estimator
from sim.lab.gradients import GradientError, expected_gradient, gradient_errors
from sim.lab.rollouts import Rollouts
from tppo_ref.runs.colours import look
from tppo_ref.runs.figures import tidy

RULES = ("none", "exclude", "defer", "drop")


def tail_rule(rule: str, tail: int, lam: float) -> Estimator:
    """The estimator of a rule for the tail; a tail of 0 tokens is none."""
    return Estimator(lam=lam) if rule == "none" else Estimator(lam=lam, tail=rule, tail_tokens=tail)


def rule_errors(rollouts: Rollouts, tail: int, window: int, lam: float, **how: Any) -> dict[str, GradientError]:
    """Per rule the error of the expected policy gradient, with the exact critic."""
    value_N = rollouts.solution.value_N
    return {rule: gradient_errors(rollouts, value_N, tail_rule(rule, tail, lam), [window], **how)[window] for rule in RULES}


def errors_by_place(rollouts: Rollouts, tail: int, window: int, lam: float) -> dict[str, list[float]]:
    """Per rule and position in the window, the gradient's error there as a share of the whole true gradient's length."""
    place_N, true_NA = rollouts.mdp.depth_N % window, rollouts.policy_gradient_NA
    found = {}
    for rule in RULES:
        gradient_NA = expected_gradient(rollouts, rollouts.solution.value_N, tail_rule(rule, tail, lam), window).gradient
        errors = [np.linalg.norm((gradient_NA - true_NA)[place_N == p]) for p in range(window)]
        found[rule] = [float(e / np.linalg.norm(true_NA)) for e in errors]
    return found


def draw_tails(world: str, by_place: Mapping[str, Sequence[float]], by_tail: Mapping[int, Mapping[str, GradientError]],
               tail: int, labels: Mapping[str, str]) -> Figure:  # fmt: skip
    """Left: each rule's error by position in the window, with a tail of `tail`; right: its whole error by the tail's length."""
    window = len(by_place["none"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for rule in RULES:
        style = look("egae" if rule == "none" else f"egae-{rule}").line()
        left.semilogy(range(window), by_place[rule], **style, label=labels[rule])
        right.semilogy(list(by_tail), [errors[rule].relative for errors in by_tail.values()], **style)
    left.axvspan(window - tail - 0.5, window - 0.5, color="#EEEEEE", zorder=0)
    left.text(window - 0.6, left.get_ylim()[1] * 0.7, f"tail of {tail}", ha="right", va="top", fontsize=8.5)
    place = "position in the window (0 = first token)"
    tidy(left, title=f"Window {window}: the error of excluding sits in the tail", x=place, y="error there / whole true gradient")
    tidy(right, title="Longer tails: deferring gains, excluding loses", x="tail k (tokens)", y="error / true gradient, whole")
    at = {rule: error.relative for rule, error in by_tail[tail].items()}
    more, less = at["exclude"] / at["none"], at["defer"] / at["none"]
    title = f"excluding {tail} tokens multiplies the error by {more:.1f}, deferring by {less:.2f}"
    figure.suptitle(f"{world}, begun at an edge: {title}", fontweight="bold", fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    return figure
