"""Notebook 02: the tables and figures of its sections. What is computed is sim.lab's; here it is arranged, printed and drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from sim.lab.bias import conditional_moments
from sim.lab.bounds import cut_bound, surprise_bound
from sim.lab.critics import critic
from sim.lab.estimators import ESTIMATORS, Estimator
from sim.lab.gradients import GradientError, gradient_errors, knee
from sim.lab.rollouts import Rollouts
from tppo_ref.runs.colours import COLOURS, LINES, MARKERS, look
from tppo_ref.runs.comparison import mean_interval
from tppo_ref.runs.figures import tidy

LAM = 0.95
RULES = {"gae": "A, the whole response", "egae": "B, EGAE", "cut-gae": "C, the critic's own value", "zero-cut": "Z, zero"}
CUTS = ("egae", "cut-gae", "zero-cut")
CRITICS = ("exact", "noise:0.3", "drift:0.3", "shrunk:0.5", "zero")
WINDOWS = (1, 2, 4, 6, 8, 9, 10, 12, 16, 20, 24, 32)
CASES = {
    "EGAE, exact critic": ("egae", "exact", LAM),
    "EGAE, exact, lambda 1": ("egae", "exact", 1.0),
    "value 0, exact critic": ("zero-cut", "exact", LAM),
    "EGAE, shrunk:0.9": ("egae", "shrunk:0.9", LAM),
    "critic's own, shrunk:0.9": ("cut-gae", "shrunk:0.9", LAM),
}
Split = dict[tuple[str, str, str], list[GradientError]]
Sweep = dict[tuple[str, str], Mapping[int, GradientError]]


def estimator(name: str, lam: float) -> Estimator:
    return dataclasses.replace(ESTIMATORS[name], lam=lam)


# ------------------------------------------------------------------------------------------------------- section 2: the fading


class FirstCut:
    """The first window of a world under the exact critic, [window, tokens], the last token before the cut first: |bias| per rule,
    NaN where a token is never sampled, and the bounds of P4 and P2."""

    def __init__(self, rollouts: Rollouts, window: int):
        first, value_N = rollouts.mdp.depth_N < window, rollouts.solution.value_N
        self.window, self.bias = window, dict[str, np.ndarray]()
        for name in RULES:
            moments = conditional_moments(rollouts, value_N, estimator(name, LAM), window)
            self.bias[name] = np.where(moments.sampled_NA > 0, np.abs(moments.bias_NA), np.nan)[first][::-1]
        self.bound = cut_bound(rollouts, value_N, window, lam=LAM)[first][::-1]
        self.second = surprise_bound(rollouts, window, lam=LAM)[first][::-1]


def print_fading(calm: FirstCut, cliff: FirstCut, on: int) -> None:
    """Biases and bounds, n tokens before the cut."""
    print("calm chain, token ON                         |  cliff, token on the way")
    print(" n    EGAE  P2's bound  P4's bound    zero  |    EGAE  P4's bound   zero")
    for n in (1, 2, 3, 6, 11, 16):
        i = n - 1
        p2 = f"{calm.second[i, on]:>11.5f}" if n > 1 else f"{'-':>11}"
        line = f"{n:>2} {calm.bias['egae'][i, on]:>7.5f}{p2}{calm.bound[i, on]:>12.5f}{calm.bias['zero-cut'][i, on]:>8.3f}  |"
        print(line + f"{cliff.bias['egae'][i, on]:>8.3f}{cliff.bound[i, on]:>12.3f}{cliff.bias['zero-cut'][i, on]:>7.3f}")
    bias, bound = cliff.bias["egae"][0, 1], cliff.bound[0, 1]
    print(f"cliff, n = 1: that is the right token; for the wrong one EGAE is off by {bias:.3f}, and P4's bound is {bound:.3f}")


def draw_fading(calm: FirstCut, cliff: FirstCut, on: int) -> Figure:
    """|bias| against the tokens left before the cut, with the bounds."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.1), layout="constrained")
    for axes, world in zip(panels, (calm, cliff), strict=True):
        n = np.arange(1, world.window + 1)
        axes.semilogy(n, world.bound.max(1), color="black", linewidth=1.6, label="P4's bound")
        if world is calm:
            axes.semilogy(n, world.second[:, on], color="black", linewidth=4, alpha=0.25, label="P2's bound")
        for name, label in (("zero-cut", "value 0 at the cut"), ("egae", "EGAE")):
            y = np.nanmax(world.bias[name], axis=1)
            axes.semilogy(n[y > 1e-12], y[y > 1e-12], **look(name).line(), label=label)
        axes.set_xlim(0.3, world.window + 0.7)
    panels[1].annotate("EGAE: one token,\nas wrong as P4 allows;\nfrom n = 2 on exactly 0", (1, 1.8), (4.2, 0.27), fontsize=8.5,
                       arrowprops={"arrowstyle": "->", "color": "#555555"})  # fmt: skip
    panels[0].set_yticks([0.002, 0.005, 0.01, 0.02, 0.05], ["0.002", "0.005", "0.01", "0.02", "0.05"])
    panels[1].set_ylim(0.2, 3)
    panels[1].set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
    x = "tokens before the cut, n"
    title = "Calm chain, cut after 16: EGAE starts at 0.012\nand loses 13 % with each token"
    tidy(panels[0], title=title, x=x, y="|bias| of the advantage, largest of the tokens")
    tidy(panels[1], title="Cliff, cut just behind the decision:\nEGAE fails at one token, and nowhere else", x=x, y="")
    for axes in panels:
        axes.minorticks_off()
    panels[0].legend(frameon=False, fontsize=8.5, loc="lower left")
    figure.suptitle("P4 says how the error fades; how high it starts is the world's affair", fontweight="bold", fontsize=11)
    return figure


def share_of_bound(rollouts: Rollouts, window: int, spec: str, lam: float, seed: int) -> float:
    """The largest |E[A - B]| / P4's bound over all tokens with a cut behind them."""
    critic_N, rule = critic(spec, rollouts.mdp, rollouts.solution, seed=seed), estimator("egae", lam)
    B, A = (conditional_moments(rollouts, critic_N, e, window) for e in (rule, rule.uncut))
    limit_NA = cut_bound(rollouts, critic_N, window, lam=lam)
    cuts = (limit_NA > 0) & (B.sampled_NA > 0)
    return float((np.abs(A.mean_NA - B.mean_NA)[cuts] / limit_NA[cuts]).max())


# ------------------------------------------------------------------------------------------------------ section 4: whose error


def split_errors(worlds: Mapping[str, Rollouts], window: int) -> Split:
    """(world, critic, rule) -> errors of the gradient, one per draw of the critic: five where it is noisy."""
    return {
        (world, spec, name): [
            gradient_errors(rollouts, critic(spec, rollouts.mdp, rollouts.solution, seed=seed), estimator(name, LAM), [window],
                            average_offsets=True)[window]
            for seed in range(5 if spec.startswith("noise") else 1)
        ]
        for world, rollouts in worlds.items() for spec in CRITICS for name in CUTS
    }  # fmt: skip


def print_split(split: Split, worlds: Sequence[str]) -> None:
    wide = {name: max(16, len(RULES[name]) + 2) for name in CUTS}
    for world in worlds:
        print(f"{world:<14}{'critic alone':>13}" + "".join(f"{RULES[name]:>{wide[name]}}" for name in CUTS))
        for spec in CRITICS:
            line = f"   {spec:<11}"
            for name in CUTS:
                errors = split[world, spec, name]
                total, own = (mean_interval([getattr(e, part) for e in errors]) for part in ("relative", "critic"))
                around = f" ± {total.high - total.value:.3f}" if len(errors) > 1 else ""
                line += (f"{own.value:>13.3f}" if name == CUTS[0] else "") + f"{f'{total.value:.3f}{around}':>{wide[name]}}"
            print(line)


def draw_split(split: Split, worlds: Sequence[str]) -> Figure:
    """Bars of the gradient's error per critic and rule; black: what the critic costs without any cut."""
    figure, panels = plt.subplots(1, len(worlds), figsize=(9.6, 3.9), layout="constrained", sharey=True)
    for axes, world in zip(panels, worlds, strict=True):
        for i, spec in enumerate(CRITICS):
            for j, name in enumerate(CUTS):
                x, total = i + 0.26 * (j - 1), np.mean([e.relative for e in split[world, spec, name]])
                axes.bar(x, total, 0.23, color=look(name).colour, hatch=("", "//", "..")[j], edgecolor="white",
                         label=None if i else RULES[name])  # fmt: skip
            own = np.mean([e.critic for e in split[world, spec, "egae"]])
            axes.plot([i - 0.4, i + 0.4], [own, own], color="black", linewidth=2, label=None if i else "critic alone, no cut")
        axes.set_xticks(range(len(CRITICS)), CRITICS)
    tidy(panels[0], title="Calm chain: a wrong critic costs more than the rule", x="critic", y="relative error of the gradient")
    tidy(panels[1], title="Cliff: value 0 is worst, the critic decides the rest", x="critic", y="")
    panels[0].legend(frameon=False, fontsize=8.5, loc="upper left")
    figure.suptitle("The paper's rule or the critic's own word: what the critic knows matters more", fontweight="bold", fontsize=11)
    return figure


# ------------------------------------------------------------------------------------------------------ section 6: which window


def sweep_windows(worlds: Mapping[str, Rollouts]) -> Sweep:
    """(world, case) -> the gradient's error by window."""
    return {
        (world, case): gradient_errors(
            rollouts, critic(spec, rollouts.mdp, rollouts.solution), estimator(name, lam), WINDOWS, average_offsets=True
        )
        for world, rollouts in worlds.items()
        for case, (name, spec, lam) in CASES.items()
    }


def print_knees(sweep: Sweep, worlds: Mapping[str, Rollouts], tolerance: float) -> None:
    """Knees in the relative and in the rescaled error, and errors at a window of 12: a line per case, a column per world."""

    def row(label: str, cells: Iterable[object], digits: str = "") -> None:
        print(f"{label:<32}" + "".join(f"{cell:>16{'' if isinstance(cell, str) else digits}}" for cell in cells))

    row("", worlds)
    row("mean length", (rollouts.solution.visits_N.sum() for rollouts in worlds.values()), ".1f")
    print("windows tried: " + ", ".join(map(str, WINDOWS)))
    measures: tuple[tuple[str, Any], ...] = (("", "relative"), (", if a gradient may be too short", "rescaled"))
    for words, measure in measures:
        print(f"knee at {tolerance:.0%}{words}")
        for case in CASES:
            row(f"   {case}", (knee(sweep[world, case], tolerance, measure) or "none up to 32" for world in worlds))
    print("error at 12")
    for case in CASES:
        row(f"   {case}", (sweep[world, case][12].relative for world in worlds), ".3f")
    row("   critic alone, shrunk:0.9", (sweep[world, "EGAE, shrunk:0.9"][12].critic for world in worlds), ".3f")


def draw_knees(sweep: Sweep, worlds: Sequence[str], tolerance: float) -> Figure:
    """EGAE's error against the window, exact critic and one that is 10 % too small; rings: the knees."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4.1), layout="constrained", sharey=True)
    for axes, case in zip(panels, ("EGAE, exact critic", "EGAE, shrunk:0.9"), strict=True):
        for i, world in zip((7, 4, 6), worlds, strict=True):  # looks that no estimator has
            errors = sweep[world, case]
            style: dict[str, Any] = {"color": COLOURS[i], "linestyle": LINES[i], "marker": MARKERS[i], "linewidth": 1.7}
            axes.loglog(list(errors), [e.relative for e in errors.values()], **style, markersize=5, label=world)
            if found := knee(errors, tolerance):
                axes.plot(found, errors[found].relative, marker="o", markersize=12, markerfacecolor="none", markeredgecolor="black")
        axes.axhline(tolerance, color="black", linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
        axes.set_yticks([0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1], ["0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"])
        axes.minorticks_off()
    panels[0].text(1, tolerance * 0.95, f"{100 * tolerance:.0f} %", fontsize=8.5, va="top")
    x, y = "window (tokens)", "relative error of the gradient"
    tidy(panels[0], title="Exact critic: knees at 9, 8 and 20 tokens (rings)", x=x, y=y)
    tidy(panels[1], title="A critic 10 % too small: two stay above 5 % up to 32", x=x, y="")
    panels[0].legend(frameon=False, fontsize=8.5)
    figure.suptitle(
        "Longer windows help here; a critic 10 % too small puts two of three knees beyond 32 tokens",
        fontweight="bold",
        fontsize=11,
    )
    return figure
