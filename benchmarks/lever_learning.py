"""What a lever of training once costs in learning: T-PPO with and without it, at equal generated tokens, paired by seed.

    python -m benchmarks.lever_learning [--seeds 16] [--levers constant-prefix engine] [--tasks chain fork length] [--jobs 1]

Arms, scores, contrasts, verdicts and stopping rules: prestated/2026-11-21-constant-prefix.md and 2026-11-22-prices-of-levers.md,
each written before its first run. Runs, marks and scores are those of benchmarks/equal_tokens.py: the budget is in generated
tokens, so a busy machine makes it later, not different.
Each run's rows go to results/lever_learning.csv when it ends; the same command goes on where it was stopped. Prints a contrast per
lever, task and score; `--seeds 0` prints what is there.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import workers
from benchmarks.common import RESULTS
from benchmarks.critic_batches import contrast
from benchmarks.equal_tokens import BUDGET, KEY, SHARED, TASKS, Arm, Job, Row, Score, prepare, scores
from benchmarks.fair_headline import ENGINE, FILLED, small_critic

BASE, SMALL = "tppo", "small-critic"
LEVERS: dict[str, Arm] = {
    "constant-prefix": Arm(fields={"policy.prefix": "constant"}),
    "engine": Arm(fields=ENGINE),
    "filled": Arm(fields=FILLED),
    SMALL: Arm(),
    "once-small": Arm("tppo-once"),
}
WITH_SMALL_CRITIC = (SMALL, "once-small")
PATH = RESULTS / "lever_learning.csv"


def table(rows: Sequence[Row], lever: str, budget: int = BUDGET, level: float = 0.95) -> list[Row]:
    """lever - base per score and task ("all": the mean over tasks, seed by seed), with its verdict. Seeds that lack a run are left
    out."""
    runs = scores(rows, budget)
    tasks = sorted({task for task, arm, _ in runs if arm == lever})
    seeds = sorted(s for s in {seed for _, _, seed in runs} if all((t, a, s) in runs for t in tasks for a in (BASE, lever)))
    found = []
    for name, task in itertools.product(Score._fields, ("all", *tasks) if tasks and seeds else ()):
        ours, theirs = (
            [float(np.mean([getattr(runs[t, arm, s], name) for t in (tasks if task == "all" else [task])])) for s in seeds]
            for arm in (lever, BASE)
        )
        numbers: dict[str, Any] = contrast([a - b for a, b in zip(ours, theirs, strict=True)], level)
        found.append({"score": name, "task": task, "with": float(np.mean(ours)), "without": float(np.mean(theirs))} | numbers)
    return found


def plan(arguments: argparse.Namespace, rows: Sequence[Row]) -> list[Job]:
    """The runs that are not there yet, seeds outermost."""
    there = {tuple(row[name] for name in KEY) for row in rows}
    keys = [
        (seed, task, arm)
        for seed, task, arm in itertools.product(range(arguments.seeds), arguments.tasks, (BASE, *arguments.levers))
        if (task, arm, seed, arguments.budget) not in there
    ]
    shared = {"run.cache": arguments.cache, "run.eval_prompts": arguments.eval_prompts, **SHARED}
    prepared = {task: prepare(task, shared) for task in sorted({task for _, task, _ in keys})}
    small = {
        task: {"model.value": small_critic(task, Path(arguments.cache) / f"small-{task}", arguments.cache)}
        for task in sorted({task for _, task, arm in keys if arm in WITH_SMALL_CRITIC})
    }
    return [
        Job(task=task, arm=arm, what=LEVERS.get(arm, Arm()), seed=seed, budget_tokens=arguments.budget, start=prepared[task][1],
            fields=prepared[task][0] | (small[task] if arm in WITH_SMALL_CRITIC else {}))
        for seed, task, arm in keys
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes as workers.command says."""
    options = workers.parser(__doc__, seeds=16, out=PATH)
    options.set_defaults(jobs=1)
    options.add_argument("--levers", nargs="+", default=list(LEVERS), choices=LEVERS, metavar="LEVER")
    options.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK")
    arguments = workers.parsed(options, argv)

    def show(rows: list[Row]) -> None:
        for r in (row | {"lever": lever} for lever in arguments.levers for row in table(rows, lever, arguments.budget)):
            more = f", {r['seeds_needed']} seeds would decide" if r["seeds_needed"] else ""
            print(
                f"{r['lever']:<16}{r['score']:<6}{r['task']:<7}with {r['with']:.4f}  without {r['without']:.4f}  "
                f"{r['difference']:+.4f} [{r['low']:+.4f}, {r['high']:+.4f}]  {r['verdict']}, {r['n']} seeds{more}"
            )

    return workers.command(lambda rows: plan(arguments, rows), arguments.out, arguments.jobs, show)


if __name__ == "__main__":
    sys.exit(main())
