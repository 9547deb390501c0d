"""Ablations: what each part of T-PPO brings, on the three built-in tasks, over seeds, at the same number of generated tokens.

    python -m benchmarks.ablations [--seeds 5] [--tasks chain fork length] [--arms tppo window-16 ...] [--jobs 2] [--budget 30720]

An arm is T-PPO with its defaults, less one thing (ARMS); a comparison is an arm against its base, and belongs to one of the
questions of docs/findings.md (COMPARISONS). The budget is in generated tokens: a busy machine makes a run longer, not worse. Runs
of a task start from the same base model and, unless the critic is cold, from the same pre-trained critic, as in `compare`.

Writes results/ablations.csv, a row per evaluation, and results/ablations_summary.csv, a row per comparison, task and metric.
A run's rows are appended when the run is whole: a command that was stopped goes on where it was, and asking for more seeds makes
the missing ones. Seeds are outermost, so that what is there is balanced at any time. `--seeds 0` only makes the summary anew.

    area, final   of benchmarks/equal_tokens.py, where a run is made
    interval 95 %, Student-t, of the mean of paired differences (arm - base, seed by seed); no correction for how many there are
    verdict  equal where the interval lies within 0.005 of 0, better or worse where it leaves out 0, else undecided. Task "all": the
             mean over tasks, seed by seed
    seeds_needed  how many seeds would decide, at this mean and deviation: in about every second repetition, and no more
             (benchmarks/critic_batches.py); 0 where it is decided, and where one seed says nothing of it
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from benchmarks import workers
from benchmarks.common import RESULTS, report
from benchmarks.critic_batches import contrast
from benchmarks.equal_tokens import SHARED, TASKS, Arm, Row, Score, Wanted, mean, plan, scores

PPO_LR = {"policy.lr": 6e-4}  # what benchmarks/sweep.py found for PPO; 3e-4, the default, is what it found for T-PPO
ARMS: dict[str, Arm] = {
    "tppo": Arm(),
    **{f"window-{window}": Arm(fields={"rollout.window": window}) for window in (16, 32, 128, 320)},
    "critic-cut": Arm("tppo-critic-cut"),
    "zero-cut": Arm("tppo-zero-cut"),
    "partial-is": Arm("partial-is"),
    "cold-critic": Arm(fields={"model.value": None}),  # the policy's weights under a new head: V is near 0
    "cold-critic-warmup": Arm(fields={"model.value": None, "value.warmup_steps": 10}),
    "value-batch-64": Arm(fields={"value.batch_responses": 64}),
    "value-joint": Arm(fields={"value.update": "joint"}),
    "ppo": Arm("ppo", PPO_LR),
    "ppo-dual": Arm("ppo-dual", PPO_LR),
    "tail-none": Arm(fields={"advantage.tail_tokens": 0}),
    "tail-defer": Arm(fields={"advantage.tail": "defer"}),
}


class Comparison(NamedTuple):
    """`arm` against `base`, in answer to a question of docs/theory.md."""

    question: str
    arm: str
    base: str = "tppo"


COMPARISONS = (
    *(Comparison("3", arm) for arm in ("window-16", "window-32", "window-128", "window-320")),
    *(Comparison("4", arm) for arm in ("critic-cut", "zero-cut", "partial-is")),
    Comparison("5", "cold-critic"), Comparison("5", "cold-critic-warmup"), Comparison("5", "cold-critic-warmup", "cold-critic"),
    Comparison("6", "value-batch-64"), Comparison("7", "value-joint"),
    Comparison("8", "ppo-dual", "ppo"), Comparison("8", "ppo"), Comparison("8", "ppo-dual"),
    Comparison("P7", "tail-none"), Comparison("P7", "tail-defer"), Comparison("P7", "tail-defer", "tail-none"),
)  # fmt: skip


# -------------------------------------------------------------------------------------------------------------------- statistics


def p_value(differences: Sequence[float]) -> float:
    """Two-sided, of Student's t that the mean is 0; NaN for fewer than two."""
    n, middle = len(differences), float(np.mean(differences))
    if n < 2:
        return math.nan
    error = float(np.std(differences, ddof=1)) / math.sqrt(n)
    return 2 * float(scipy.stats.t.sf(abs(middle) / error, n - 1)) if error else float(middle == 0)


def summary(rows: Sequence[Row], budget: int) -> list[Row]:
    """A row per comparison, task and metric that has at least one pair of runs at this budget."""
    runs: dict[tuple[str, str], dict[int, Score]] = {}
    for (task, arm, seed), found in scores(rows, budget).items():
        runs.setdefault((task, arm), {})[seed] = found
    tasks, table = sorted({task for task, _ in runs}), []
    for question, arm, base in COMPARISONS:
        seeds = {t: sorted(runs.get((t, arm), {}).keys() & runs.get((t, base), {}).keys()) for t in tasks}
        for metric in Score._fields:
            pairs = {t: [(getattr(runs[t, arm][s], metric), getattr(runs[t, base][s], metric)) for s in seeds[t]] for t in tasks}
            everywhere = [s for s in seeds[tasks[0]] if all(s in seeds[t] for t in tasks)] if tasks else []
            of_seed = [[pairs[t][seeds[t].index(s)] for t in tasks] for s in everywhere]
            pairs["all"] = [(mean([a for a, _ in x]), mean([b for _, b in x])) for x in of_seed]
            head = {"arm": arm, "base": base, "question": question, "metric": metric, "budget_tokens": budget}
            table += [{"task": task, **head, **compared(of_task)} for task, of_task in pairs.items() if of_task]
    return table


def compared(pairs: Sequence[tuple[float, float]]) -> Row:
    """The numbers of a summary row, from (arm, base) per seed."""
    differences = [arm - base for arm, base in pairs]
    said = contrast(differences)
    numbers = {"arm_mean": mean([a for a, _ in pairs]), "base_mean": mean([b for _, b in pairs]),
               "mean_difference": said["difference"], "low": said["low"], "high": said["high"],
               "p": p_value(differences)}  # fmt: skip
    # Holm's thresholds over 144 tests begin at 0.00035: p needs more digits than the rest.
    rounded = {name: round(x, 8 if name == "p" else 4) for name, x in numbers.items()}
    return {"n": len(pairs)} | rounded | {name: said[name] for name in ("verdict", "seeds_needed")}


# ------------------------------------------------------------------------------------------------------------------------- command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    options = workers.parser(__doc__, seeds=5, out=RESULTS)
    options.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK")
    options.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    return workers.parsed(options, argv)


def wanted(arguments: argparse.Namespace) -> list[Wanted]:
    """All runs, seeds outermost."""
    shared = {"run.cache": arguments.cache, "run.eval_prompts": arguments.eval_prompts, **SHARED}
    keys = itertools.product(range(arguments.seeds), arguments.arms, arguments.tasks)
    return [Wanted(task, arm, ARMS[arm], seed, shared) for seed, arm, task in keys]


def main(argv: Sequence[str] | None = None) -> int:
    """The two CSV go to the folder --out; exit codes as workers.command says."""
    arguments = parse_arguments(argv)

    def show(rows: list[Row]) -> None:
        if table := summary(rows, arguments.budget):
            report("ablations_summary", table, arguments.out / "ablations_summary.csv")

    return workers.command(lambda rows: plan(wanted(arguments), arguments.budget, rows), arguments.out / "ablations.csv",
                           arguments.jobs, show)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
