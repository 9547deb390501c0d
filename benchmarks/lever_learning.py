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
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS
from benchmarks.critic_batches import contrast
from benchmarks.equal_tokens import (
    BUDGET,
    KEY,
    NUM_MARKS,
    SHARED,
    TASKS,
    Arm,
    Job,
    Row,
    Score,
    keep_whole,
    prepare,
    quiet,
    read_whole,
    score,
)
from benchmarks.fair_headline import ENGINE, FILLED, small_critic
from benchmarks.workers import run_all

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


def table(rows: Sequence[Row], lever: str) -> list[Row]:
    """lever - base per score and task ("all": the mean over tasks, seed by seed), with its verdict. Seeds that lack a run are left
    out."""
    runs: dict[tuple[str, str, int], Score] = {}
    for key, group in itertools.groupby(rows, key=lambda r: tuple(r[name] for name in KEY)):
        runs[key[0], key[1], key[2]] = score(list(group))
    tasks = sorted({task for task, arm, _ in runs if arm == lever})
    seeds = sorted(s for s in {seed for _, _, seed in runs} if all((t, a, s) in runs for t in tasks for a in (BASE, lever)))
    found = []
    for name, task in itertools.product(Score._fields, ("all", *tasks) if tasks and seeds else ()):
        ours, theirs = (
            [float(np.mean([getattr(runs[t, arm, s], name) for t in (tasks if task == "all" else [task])])) for s in seeds]
            for arm in (lever, BASE)
        )
        numbers: dict[str, Any] = contrast([a - b for a, b in zip(ours, theirs, strict=True)])
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
    """Exit codes: 0 done, 1 runs failed, 2 a user's mistake, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levers", nargs="+", default=list(LEVERS), choices=LEVERS, metavar="LEVER")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK")
    parser.add_argument("--seeds", type=int, default=16, help="seeds 0 to this less 1; 0 only prints")
    parser.add_argument("--budget", type=int, default=BUDGET, help="generated tokens of a run")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--cache", default="runs/cache", help="folder of base models and pre-trained critics")
    parser.add_argument("--eval-prompts", type=int, default=256)
    parser.add_argument("--out", type=Path, default=PATH)
    arguments = parser.parse_args(argv)
    for name, least in (("seeds", 0), ("budget", NUM_MARKS), ("eval_prompts", 1), ("jobs", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"{name}: got {getattr(arguments, name)}; expected an integer of at least {least}")
    quiet()
    try:
        failed = run_all(plan(arguments, keep_whole(arguments.out)), arguments.out, arguments.jobs)
    except KeyboardInterrupt:
        print(f"stopped; whole runs are in {arguments.out}, and the same command goes on with the others", file=sys.stderr)
        return 130
    rows = [row for row in read_whole(arguments.out)[0] if row["budget_tokens"] == arguments.budget]
    for r in (row | {"lever": lever} for lever in arguments.levers for row in table(rows, lever)):
        more = f", {r['seeds_needed']} seeds would decide" if r["seeds_needed"] else ""
        print(
            f"{r['lever']:<16}{r['score']:<6}{r['task']:<7}with {r['with']:.4f}  without {r['without']:.4f}  "
            f"{r['difference']:+.4f} [{r['low']:+.4f}, {r['high']:+.4f}]  {r['verdict']}, {r['n']} seeds{more}"
        )
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill stops as Ctrl-C does: no worker is left behind
    sys.exit(main())
