"""What `policy.prefix constant` costs in learning: T-PPO with and without it, at equal generated tokens, paired by seed.

    python -m benchmarks.prefix_learning [--seeds 16] [--tasks chain fork length] [--budget 30720]

Arms, scores, contrasts, verdicts and stopping rule: prestated/2026-11-21-constant-prefix.md, written before the first run. Runs,
marks and scores are those of benchmarks/equal_tokens.py: the budget is in generated tokens, so a busy machine makes it later, not
different.
Each run's rows go to results/prefix_learning.csv when it ends; the same command goes on where it was stopped. One thread. Prints a
contrast per task and score; `--seeds 0` prints what is there.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
    append,
    keep_whole,
    prepare,
    quiet,
    read_whole,
    run_one,
    score,
)

BASE, ARM = "tppo", "constant-prefix"
ARMS = {BASE: Arm(), ARM: Arm(fields={"policy.prefix": "constant"})}
PATH = RESULTS / "prefix_learning.csv"


def table(rows: Sequence[Row]) -> list[Row]:
    """constant - full per score and task ("all": the mean over tasks, seed by seed), with its verdict. Seeds that lack a run are
    left out."""
    runs: dict[tuple[str, str, int], Score] = {}
    for key, group in itertools.groupby(rows, key=lambda r: tuple(r[name] for name in KEY)):
        runs[key[0], key[1], key[2]] = score(list(group))
    tasks = sorted({task for task, _, _ in runs})
    seeds = sorted(s for s in {seed for _, _, seed in runs} if all((t, a, s) in runs for t in tasks for a in (BASE, ARM)))
    found = []
    for name, task in itertools.product(Score._fields, ("all", *tasks) if seeds else ()):
        ours, theirs = (
            [float(np.mean([getattr(runs[t, arm, s], name) for t in (tasks if task == "all" else [task])])) for s in seeds]
            for arm in (ARM, BASE)
        )
        numbers: dict[str, Any] = contrast([a - b for a, b in zip(ours, theirs, strict=True)])
        found.append({"score": name, "task": task, "constant": float(np.mean(ours)), "full": float(np.mean(theirs))} | numbers)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a user's mistake, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK")
    parser.add_argument("--seeds", type=int, default=16, help="seeds 0 to this less 1; 0 only prints")
    parser.add_argument("--budget", type=int, default=BUDGET, help="generated tokens of a run")
    parser.add_argument("--cache", default="runs/cache", help="folder of base models and pre-trained critics")
    parser.add_argument("--eval-prompts", type=int, default=256)
    parser.add_argument("--out", type=Path, default=PATH)
    arguments = parser.parse_args(argv)
    for name, least in (("seeds", 0), ("budget", NUM_MARKS), ("eval_prompts", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"{name}: got {getattr(arguments, name)}; expected an integer of at least {least}")
    torch.set_num_threads(1)
    quiet()
    there = {tuple(row[name] for name in KEY) for row in keep_whole(arguments.out)}
    keys = list(itertools.product(range(arguments.seeds), arguments.tasks, (BASE, ARM)))
    missing = [(task, arm, seed, arguments.budget) for seed, task, arm in keys if (task, arm, seed, arguments.budget) not in there]
    shared = {"run.cache": arguments.cache, "run.eval_prompts": arguments.eval_prompts, **SHARED}
    prepared = {task: prepare(task, shared) for task in sorted({key[0] for key in missing})}
    try:
        for done, (task, arm, seed, budget) in enumerate(missing):
            fields, start = prepared[task]
            append(
                arguments.out,
                run_one(Job(task=task, arm=arm, what=ARMS[arm], seed=seed, budget_tokens=budget, fields=fields, start=start)),
            )
            print(f"{done + 1} of {len(missing)}: {task} {arm} seed {seed}", flush=True)
    except KeyboardInterrupt:
        print(f"stopped; whole runs are in {arguments.out}, and the same command goes on with the others", file=sys.stderr)
        return 130
    for r in table([row for row in read_whole(arguments.out)[0] if row["budget_tokens"] == arguments.budget]):
        more = f", {r['seeds_needed']} seeds would decide" if r["seeds_needed"] else ""
        print(f"{r['score']:<6}{r['task']:<7}constant {r['constant']:.4f}  full {r['full']:.4f}  {r['difference']:+.4f} "
              f"[{r['low']:+.4f}, {r['high']:+.4f}]  {r['verdict']}, {r['n']} seeds{more}")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
