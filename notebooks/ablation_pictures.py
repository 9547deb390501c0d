"""Notebook 05: the committed ablations as tables, Holm's correction, and the figures. Nothing is trained."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from pictures import TASK_LOOKS

from tppo_ref.runs.colours import COLOURS, LINES, MARKERS, look
from tppo_ref.runs.comparison import holm, mean_interval
from tppo_ref.runs.figures import tidy

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
Row = dict[str, str]
WINDOWS = {"window-16": 16, "window-32": 32, "tppo": 64, "window-128": 128, "window-320": 320}
SHOWN = {"tppo": "T-PPO", "ppo": "PPO", "cold-critic": "cold critic", "cold-critic-warmup": "cold critic, 10 warm-up steps"}


def rows_of(name: str) -> list[Row]:
    """A committed table."""
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def number_of(row: Mapping[str, str], name: str) -> float:
    return float(row[name])


def leaves_out_0(row: Mapping[str, str]) -> bool:
    """The interval of the difference: the verdict "equal" may be said of one that holds 0."""
    return number_of(row, "p") < 0.05


class Ablations:
    """The runs and the comparisons; `stands[id(row)]`: what is left of a comparison's verdict after Holm, over all of the file."""

    def __init__(self) -> None:
        self.runs, self.summary = rows_of("ablations"), rows_of("ablations_summary")
        self.ends = [row for row in self.runs if row["final"] == "1"]
        self.areas = [row for row in self.summary if row["metric"] == "area"]  # a run's mean accuracy along the way
        self.together = [row for row in self.areas if row["task"] == "all"]
        self.seeds = sorted({int(row["seed"]) for row in self.runs})
        self.tasks = sorted({row["task"] for row in self.runs})
        self.arms = list(dict.fromkeys(row["arm"] for row in self.runs))
        self.budget = int(self.ends[0]["budget_tokens"])
        self.stands = dict(zip(map(id, self.summary), holm([number_of(r, "p") for r in self.summary]), strict=True))

    def mean_of(self, arm: str, name: str, per: str | None = None) -> float:
        """Mean over tasks and seeds of a column at the runs' ends, or of its ratio to another."""
        chosen = [row for row in self.ends if row["arm"] == arm]
        return float(np.mean([number_of(row, name) / (number_of(row, per) if per else 1) for row in chosen]))

    def curve(self, task: str, arm: str) -> tuple[list[float], list[list[float]]]:
        """Tokens at the evaluations (mean), and accuracies [evaluations, seeds]."""
        chosen = [row for row in self.runs if (row["task"], row["arm"]) == (task, arm)]
        marks = sorted({int(row["mark"]) for row in chosen})
        at = [[row for row in chosen if int(row["mark"]) == mark] for mark in marks]
        tokens = [float(np.mean([number_of(r, "generated_tokens") for r in rows])) for rows in at]
        return tokens, [[number_of(r, "accuracy") for r in rows] for rows in at]

    def verdict_of(self, arm: str, base: str = "tppo", task: str = "all", metric: str = "area") -> str:
        row = next(r for r in self.summary if (r["task"], r["arm"], r["base"], r["metric"]) == (task, arm, base, metric))
        kept = ", also after Holm" if self.stands[id(row)] else ", not after Holm" if leaves_out_0(row) else ""
        return f"{row['verdict']}{kept} ({said(row)}, n = {row['n']})"

    def after_equal_updates(self, arm: str, base: str) -> str:
        """Accuracy of `arm` at its end less that of `base` at its first mark, mean over tasks: equally many steps of the policy
        where `arm` waits for two thirds of the budget."""
        ends, firsts = (
            np.mean([self.curve(t, which)[1][mark] for t in self.tasks], axis=0) for which, mark in ((arm, -1), (base, 1))
        )
        gap = mean_interval(ends - firsts)
        word = "undecided" if gap.low <= 0 <= gap.high else "better" if gap.value > 0 else "worse"
        return f"{word} ({gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], n = {len(ends)})"

    # --------------------------------------------------------------------------------------------------------------- tables

    def print_runs(self) -> None:
        """Per arm what the budget bought."""
        print(f"{len(self.ends)} runs of {self.budget} generated tokens on {', '.join(self.tasks)}")
        heads = f"{'trained':>9}{'cut':>7}{'fed again':>11}{'decode steps':>14}{'steps':>7}{'length':>8}{'explained':>11}"
        print(f"{'arm':<20}{'seeds':>7}{heads}")
        for arm in self.arms:
            counts = [sum(row["arm"] == arm and row["task"] == task for row in self.ends) for task in self.tasks]
            trained, fed = (self.mean_of(arm, name, "generated_tokens") for name in ("trained_tokens", "prefix_tokens"))
            cut, decode, steps, length, explained = (
                self.mean_of(arm, name) for name in ("cut_share", "decode_steps", "steps", "length_mean", "explained_variance")
            )
            rest = f"{trained:>9.0%}{cut:>7.0%}{fed:>11.1f}{decode:>14.0f}{steps:>7.0f}{length:>8.1f}{explained:>11.2f}"
            print(f"{arm:<20}{'/'.join(map(str, counts)):>7}{rest}")
        for arm in ("tppo", "cold-critic", "cold-critic-warmup"):
            by_task = {task: [number_of(r, "explained_variance") for r in self.ends if (r["arm"], r["task"]) == (arm, task)]
                       for task in self.tasks}  # fmt: skip
            print(f"explained, {arm}: " + ", ".join(f"{task} {np.mean(values):.2f}" for task, values in by_task.items()))

    def print_comparisons(self) -> None:
        """Per comparison its interval, its verdict before and after Holm, and the single tasks on which it is decided."""
        heads = f"{'area, mean over tasks':<25}{'verdict':<11}after Holm"
        single: dict[str, list[str]] = {}
        print(f"{'':<4}{'arm':<20}{'against':<13}{'n':>2}  {heads}")
        for row in self.together:
            same = [r for r in self.areas if r["task"] != "all" and (r["arm"], r["base"]) == (row["arm"], row["base"])]
            single[f"{row['arm']} against {row['base']}"] = [
                f"{r['task']} {r['verdict']}" for r in same if r["verdict"] != "undecided"
            ]
            kept = row["verdict"] if self.stands[id(row)] else "undecided"
            which = f"{row['question']:<4}{row['arm']:<20}{row['base']:<13}{row['n']:>2}"
            print(f"{which}  {said(row):<25}{row['verdict']:<11}{kept}")
        print("\ndecided on single tasks")
        for which, tasks in single.items():
            if tasks:
                print(f"  {which}: {', '.join(tasks)}")
        decided, left = sum(map(leaves_out_0, self.summary)), sum(self.stands.values())
        print(f"\n{len(self.summary)} tests in all, {decided} with an interval without 0. Left after Holm's correction: {left}")
        for row in self.summary:
            if self.stands[id(row)]:
                print(f"  {row['arm']} against {row['base']}, {row['task']}, {row['metric']}: {said(row)}, {row['verdict']}")

    # -------------------------------------------------------------------------------------------------------------- figures

    def draw_curves(self) -> Figure:
        """A panel per task: accuracy against generated tokens with bands over seeds."""
        figure, panels = plt.subplots(1, len(self.tasks), figsize=(10.2, 3.9), layout="constrained", sharey=True)
        for axes, task in zip(panels, self.tasks, strict=True):
            fewest = min(len(self.curve(task, arm)[1][0]) for arm in SHOWN)
            for arm, label in SHOWN.items():
                x, y = self.curve(task, arm)
                bands = [mean_interval(values) for values in y]
                thousands, (low, high) = np.array(x) / 1000, zip(*((b.low, b.high) for b in bands), strict=True)
                axes.plot(thousands, [b.value for b in bands], **style_of_arm(arm), label=label)
                axes.fill_between(thousands, low, high, color=style_of_arm(arm)["color"], alpha=0.12, linewidth=0)
            y_label = "accuracy" if task == self.tasks[0] else ""
            tidy(axes, title=f"{task}, at least {fewest} seeds", x="generated tokens (thousands)", y=y_label)
        title = "A critic that knows nothing costs a little, a policy that waits for it most"
        figure.suptitle(title, fontweight="bold", fontsize=11)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
        return figure

    def draw_windows(self) -> Figure:
        """Left: area against that of a window of 64. Right: what else differs between windows."""
        figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.9), layout="constrained")
        for i, task in enumerate(["all", *self.tasks]):
            found = [
                next((r for r in self.areas if (r["task"], r["arm"], r["base"]) == (task, arm, "tppo")), None) for arm in WINDOWS
            ]
            middle = [number_of(r, "mean_difference") if r else 0.0 for r in found]
            spread = np.abs(np.array([[number_of(r, end) if r else 0.0 for r in found] for end in ("low", "high")]) - middle)
            x = [w * 1.06 ** (i - 1.5) for w in WINDOWS.values()]
            style: dict[str, Any] = {"linestyle": "-"} | TASK_LOOKS[task]
            left.errorbar(x, middle, spread, **style, linewidth=1.2, markersize=5, capsize=2, label=task)
        left.axhline(0, color="#666666", linewidth=0.8)
        left.legend(frameon=False, fontsize=8.5, loc="lower center")
        shares = {"trained tokens": self.trained(), "rows that are cut": {arm: self.mean_of(arm, "cut_share") for arm in WINDOWS}}
        for at, (label, share) in zip((7, 6), shares.items(), strict=True):  # colours that no method here has
            right.plot(list(WINDOWS.values()), list(share.values()), **style_of(at), label=label)
        right.legend(frameon=False, fontsize=8.5, loc="center right")
        tidy(left, title="Best near 64: shorter learn less, the cap too", x="window (tokens)", y="difference in area (95 %)")
        tidy(right, title="A short window also trains less and cuts more", x="window (tokens)", y="share")
        for axes in (left, right):
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(WINDOWS.values()), map(str, WINDOWS.values()))
        title = "Windows of 16, 32 and 320 learn less than 64, before Holm; a short one differs in three ways"
        figure.suptitle(title, fontweight="bold", fontsize=11)
        return figure

    def trained(self) -> dict[str, float]:
        """Share of the generated tokens that the policy trained on, per window."""
        return {arm: self.mean_of(arm, "trained_tokens", "generated_tokens") for arm in WINDOWS}


def said(row: Row) -> str:
    return f"{number_of(row, 'mean_difference'):+.3f} [{number_of(row, 'low'):+.3f}, {number_of(row, 'high'):+.3f}]"


def style_of(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i], "linestyle": LINES[i], "marker": MARKERS[i], "markersize": 5, "linewidth": 1.8}


def style_of_arm(arm: str) -> dict[str, Any]:
    """A method's own look; the two arms without one take colours that no method here has."""
    return look(arm).line() if arm in ("tppo", "ppo") else style_of({"cold-critic": 3, "cold-critic-warmup": 4}[arm])
