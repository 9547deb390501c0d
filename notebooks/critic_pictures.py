"""Notebook 04: statistics over seeds of `sim.lab.learning`'s records, its tables, and its figures.

An arm looks the same in 04 and 05: a critic worth asking is T-PPO as it is meant, cold and waiting ones have colours of no method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sim.lab.instances import Instance
from sim.lab.learning import learn
from sim.lab.recorder import Record, Recorder
from sim.lab.token_mdp import TokenMDP
from tppo_ref.runs.colours import COLOURS, LINES, MARKERS, look
from tppo_ref.runs.comparison import Estimate, mean_interval
from tppo_ref.runs.figures import tidy

Histories = Sequence[Sequence[Record]]
Runs = Mapping[str, Histories]
ARM_COLOURS = {"cold": 3, "warm-up": 4, "oracle": 6, "truncated targets": 7}
BANDS = "exact return (bands: 95 %, 5 seeds)"


def column(histories: Histories, name: str) -> np.ndarray:
    """One field of the records, [seeds, steps + 1]; step 0 is before training."""
    return np.array([[getattr(record, name) for record in history] for history in histories])


def show(values: Sequence[float] | np.ndarray) -> str:
    found = mean_interval(values)
    return f"{found.value:.3f} ± {found.high - found.value:.3f}"


def paired(histories: Histories, base: Histories, name: str = "mean_return", step: int | None = None) -> Estimate:
    """Paired difference of a field after `step`, or of its mean over all steps."""
    ours, theirs = column(histories, name), column(base, name)
    return mean_interval(ours[:, 1:].mean(1) - theirs[:, 1:].mean(1) if step is None else ours[:, step] - theirs[:, step])


def verdict(gap: Estimate) -> str:
    word = "undecided" if gap.low <= 0 <= gap.high else "higher" if gap.value > 0 else "lower"
    return f"{gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] {word}"


class Kept:
    """What the cold runs leave beside their records: the policies after each step, and the share of cut rows in the first step."""

    def __init__(self) -> None:
        self.policies: dict[int, list[np.ndarray]] = {}
        self.cut_tokens: list[float] = []

    def watch(self, seed: int, first_NA: np.ndarray) -> Callable[[Recorder, Record], None]:
        self.policies[seed] = [first_NA]

        def noted(recorder: Recorder, record: Record) -> None:
            module: Any = recorder.trainer.policy_learner.module
            self.policies[seed].append(module.table())
            if record.step == 1:
                train_BT = recorder.rows.train_BT
                self.cut_tokens.append(float(train_BT[recorder.rows.cut_B].sum() / train_BT.sum()))

        return noted


def run_arms(instance: Instance, arms: Mapping[str, Mapping[str, Any]], window: int, steps: Mapping[str, int], seeds: Sequence[int],
             kept: Kept) -> dict[str, list[list[Record]]]:  # fmt: skip
    """The real Trainer, per arm and seed. `steps`: by arm, "" for those that it does not name; the cold arm is watched."""
    return {
        arm: [
            learn(instance, window=window, steps=steps.get(arm, steps[""]), seed=seed,
                  watch=kept.watch(seed, instance.policy_NA) if arm == "cold" else None, **how)
            for seed in seeds
        ]
        for arm, how in arms.items()
    }  # fmt: skip


def print_silent(runs: Runs, steps: Sequence[int]) -> None:
    print("share of the trained tokens whose raw advantage is exactly 0")
    print(f"{'step':<8}" + "".join(f"{step:>14}" for step in steps))
    for arm in ("cold", "warm"):
        silent = column(runs[arm], "no_signal_share")
        print(f"{arm:<8}" + "".join(f"{show(silent[:, step]):>14}" for step in steps))


def print_arms(title: str, runs: Runs, pairs: Sequence[tuple[str, str | None]], last: int) -> None:
    """Return and critic's error per arm, and its paired difference from a base."""
    head = f"{title:<15}{'return, step ' + str(last):>16}{'rms, step 5':>15}"
    print(head + "   mean return of all steps, difference (95 %)")
    for arm, base in pairs:
        returns, rms = column(runs[arm], "mean_return")[:, last], column(runs[arm], "critic_rms")[:, 5]
        against = f"{verdict(paired(runs[arm], runs[base]))}, against {base}" if base else "base"
        print(f"{arm:<15}{show(returns):>16}{show(rms):>15}   {against}")


def style_of(arm: str) -> dict[str, Any]:
    if arm == "warm":
        return look("tppo").line()
    i = ARM_COLOURS[arm]
    return {"color": COLOURS[i], "linestyle": LINES[i], "marker": MARKERS[i], "markersize": 5, "linewidth": 1.8}


def band(axes: Axes, x: Sequence[float] | np.ndarray, values: np.ndarray, style: Mapping[str, Any], **more: Any) -> None:
    """The mean over seeds of [seeds, steps], with its 95 % band."""
    found = [mean_interval(v) for v in values.T]
    axes.plot(x, [e.value for e in found], **style, **more)
    axes.fill_between(x, [e.low for e in found], [e.high for e in found], color=style["color"], alpha=0.15, linewidth=0)


def draw_returns(thinking: Runs, early: Runs) -> Figure:
    """Exact return against step: what a critic that knows, waits or is exact brings, in two worlds."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 4), layout="constrained")
    for axes, found, arms in ((panels[0], thinking, ("cold", "warm", "warm-up", "oracle")), (panels[1], early, ("cold", "warm"))):
        for i, arm in enumerate(arms):
            returns = column(found[arm], "mean_return")
            band(axes, np.arange(returns.shape[1]), returns, style_of(arm), markevery=(2 * i, 8), label=arm)
        axes.legend(frameon=False, fontsize=8.5, loc="lower right")
    tidy(panels[0], title="Thinking: a head start lasts; warm-up waits for it", x="step", y=BANDS)
    tidy(panels[1], title="Early decision: warm leads early, cold overtakes", x="step", y="")
    figure.suptitle("Whether the critic must know something depends on the world", fontweight="bold", fontsize=11)
    return figure


def draw_errors(runs: Runs) -> Figure:
    """The critic's true error under three ways to train it."""
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    labels = {"cold": "Monte Carlo returns of ended responses", "truncated targets": "A + V of this step's tokens, cut or not",
              "warm": "Monte Carlo, begins at the exact value"}  # fmt: skip
    for i, (arm, label) in enumerate(labels.items()):
        rms = column(runs[arm], "critic_rms")
        band(axes, np.arange(rms.shape[1]), rms, style_of(arm), markevery=(2 * i, 8), label=label)
    axes.set_ylim(0, None)
    tidy(axes, title="", x="step", y="critic's error (rms over visits)")
    figure.suptitle("From 0, Monte Carlo targets find the value sooner", fontweight="bold", fontsize=11)
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def first_batch(instance: Instance, window: int) -> tuple[float, float]:
    """Exact mean score of the responses that end within `window` tokens, and their share of all."""
    found = instance.mdp.trajectories(instance.policy_NA, num_tokens=window)
    ended = ~found.cut_B
    prob_B, score_B = found.prob_B[ended], found.reward_BT[ended].sum(1)
    return prob_B @ score_B / prob_B.sum(), prob_B.sum()


def draw_survivors(length_ratio: np.ndarray, tv_now: np.ndarray, tv_so_far: np.ndarray) -> Figure:
    """How long the critic's responses are beside the policy's, and how far its tokens are from the policy's visits."""
    figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.9), layout="constrained")
    steps = np.arange(1, length_ratio.shape[1] + 1)
    band(panels[0], steps, length_ratio, {"color": "black", "linewidth": 1.8})
    panels[0].axhline(1, color="black", linewidth=1, linestyle=(0, (4, 3)))
    panels[0].axvline(4, color="#999999", linewidth=1)
    panels[0].text(4.3, 0.35, "cap / window = 4 steps", fontsize=8.5)
    panels[0].set_ylim(0, 1.6)
    for i, (label, values) in zip((4, 3), (("this step's batch", tv_now), ("all batches so far", tv_so_far)), strict=True):
        style: dict[str, Any] = {
            "color": COLOURS[i],
            "linestyle": LINES[i],
            "marker": MARKERS[i],
            "markersize": 5,
            "linewidth": 1.8,
        }
        panels[1].plot(steps, values.mean(0), **style, markevery=(i % 2, 6), label=label)
    y = "length, critic's over policy's (95 %, 5 seeds)"
    tidy(panels[0], title="The critic's responses: too short at first, too long in step 4", x="step", y=y)
    tidy(panels[1], title="What it sees comes near the visits in 4 steps", x="step", y="total variation from the visits")
    panels[1].legend(frameon=False, fontsize=8.5)
    figure.suptitle("The survivors' bias is large and short: over after cap / window = 4 steps", fontweight="bold", fontsize=11)
    return figure


def staleness(mdp: TokenMDP, tables: Sequence[np.ndarray], window: int, num_windows: int = 4) -> tuple[float, float]:
    """Rms and mean over visits of (mean target - value under the newest policy), averaged over beginnings of a response whose
    windows were sampled by `num_windows` successive policies."""
    block_N, rms, bias = mdp.depth_N // window, [], []
    for first in range(len(tables) - num_windows + 1):
        mixture_NA = np.stack(tables[first : first + num_windows])[block_N, np.arange(mdp.num_nodes)]
        taught, now = mdp.solve(mixture_NA), mdp.solve(tables[first + num_windows - 1])
        error_N, weight_N = taught.value_N - now.value_N, taught.visits_N / taught.visits_N.sum()
        rms.append((weight_N @ error_N**2) ** 0.5)
        bias.append(weight_N @ error_N)
    return float(np.mean(rms)), float(np.mean(bias))
