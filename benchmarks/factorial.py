"""Cut rule x critic x window: does the best rule at the cut depend on how good the critic is? On text, at equal generated tokens.

    python -m benchmarks.factorial [--seeds 32] [--jobs 2]      # says how long it will take; --seeds 0 only prints what is there
    python -m benchmarks.factorial --tasks maze brackets        # the same of two tasks whose value moves fast: a study of its own

Arms, contrasts, verdicts and stopping rules: prestated/2026-11-21-factorial.md, and for maze and brackets
2026-11-22-factorial-new-tasks.md, each written before its first run. No tail; runs and scores are those of
benchmarks/equal_tokens.py, with four answers per prompt at each evaluation. Seeds are outermost: what is there is balanced at any
time, and the same command goes on where it was stopped. Until all seeds are there no verdict is printed.

Writes results/factorial.csv or factorial-new-tasks.csv, a row per evaluation.
"""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import RESULTS
from benchmarks.critic_batches import contrast
from benchmarks.equal_tokens import BUDGET, KEY, NUM_MARKS, SHARED, Arm, Job, Row, keep_whole, prepare, quiet, read_whole, score
from benchmarks.workers import run_all

TASKS, NEW_TASKS = ("chain", "fork"), ("maze", "brackets")
STUDIES = {TASKS: "factorial.csv", NEW_TASKS: "factorial-new-tasks.csv"}  # tasks of a plan -> its table
CUTS = {"previous": "tppo", "critic": "tppo-critic-cut", "zero": "tppo-zero-cut"}  # rule at the cut -> method
CRITICS = {"weak": 1024, "strong": 8192}  # responses that it was pre-trained on
WINDOWS = (16, 64)
SEEDS = 32
Cell = tuple[str, str, int]  # cut, critic, window
CELLS: tuple[Cell, ...] = tuple(itertools.product(CUTS, CRITICS, WINDOWS))
Weights = Mapping[Cell, float]


def weights(*, cut: Mapping[str, float] | None = None, critic: Mapping[str, float] | None = None,
            window: Mapping[int, float] | None = None) -> Weights:  # fmt: skip
    """Weight of each cell: a product over the factors, each a mean over its levels where nothing else is said."""
    cut, critic = cut or dict.fromkeys(CUTS, 1 / len(CUTS)), critic or dict.fromkeys(CRITICS, 1 / len(CRITICS))
    window = window or dict.fromkeys(WINDOWS, 1 / len(WINDOWS))
    return {(c, q, w): cut.get(c, 0.0) * critic.get(q, 0.0) * window.get(w, 0.0) for c, q, w in CELLS}


CRITIC_CUT = {"critic": 1.0, "previous": -1.0}
BETTER_CRITIC = {"strong": 1.0, "weak": -1.0}
CONTRASTS: dict[str, Weights] = {
    "(critic - previous) x (strong - weak)": weights(cut=CRITIC_CUT, critic=BETTER_CRITIC),
    "critic - previous, weak": weights(cut=CRITIC_CUT, critic={"weak": 1.0}),
    "critic - previous, strong": weights(cut=CRITIC_CUT, critic={"strong": 1.0}),
    "zero - previous": weights(cut={"zero": 1.0, "previous": -1.0}),
    "window 16 - 64, previous": weights(cut={"previous": 1.0}, window={16: 1.0, 64: -1.0}),
    "strong - weak, previous": weights(cut={"previous": 1.0}, critic=BETTER_CRITIC),
}
"""The first is primary. All are means over what they do not name, and over the tasks."""
LEVEL = 1 - 0.05 / len(CONTRASTS)


def name(cell: Cell) -> str:
    return "-".join(map(str, cell))


def arm(cell: Cell) -> Arm:
    cut, _, window = cell
    return Arm(CUTS[cut], {"advantage.tail_tokens": 0, "rollout.window": window})


def table(rows: Sequence[Row], wanted: int = SEEDS, tasks: Sequence[str] = TASKS) -> list[dict[str, Any]]:
    """A row per contrast: of the area's mean over tasks, seed by seed, over the seeds that lack no run; verdict "not yet" until
    `wanted` of them are there."""
    area = {key[:3]: score(list(group)).area for key, group in itertools.groupby(rows, key=lambda r: tuple(r[k] for k in KEY))}
    seeds = sorted({seed for _, _, seed in area})
    seeds = [s for s in seeds if all((t, name(c), s) in area for t in tasks for c in CELLS)]
    out = []
    for what, weight in CONTRASTS.items() if seeds else ():
        of_seed = [sum(w * float(np.mean([area[t, name(c), s] for t in tasks])) for c, w in weight.items()) for s in seeds]
        out.append({"contrast": what} | contrast(of_seed, LEVEL) | ({"verdict": "not yet"} if len(seeds) < wanted else {}))
    return out


def plan(arguments: argparse.Namespace, rows: Sequence[Row]) -> list[Job]:
    """The runs that are not there yet, seeds outermost."""
    there = {tuple(row[k] for k in KEY) for row in rows}
    keys = [
        k
        for k in itertools.product(range(arguments.seeds), CELLS, arguments.tasks)
        if (k[2], name(k[1]), k[0], arguments.budget) not in there
    ]
    shared = {"run.cache": arguments.cache, "run.eval_prompts": 256, "run.eval_samples": 4, **SHARED}
    needed = sorted({(task, cell[1]) for _, cell, task in keys})
    prepared = {(task, critic): prepare(task, shared | {"value.pretrain_responses": CRITICS[critic]}) for task, critic in needed}
    jobs = []
    for seed, cell, task in keys:
        fields, start = prepared[task, cell[1]]
        jobs.append(
            Job(task=task, arm=name(cell), what=arm(cell), seed=seed, budget_tokens=arguments.budget, fields=fields, start=start)
        )
    return jobs


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 runs failed, 2 a user's mistake, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="seeds 0 to this less 1; 0 only prints")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="of one study: chain fork, or maze brackets")
    parser.add_argument("--budget", type=int, default=BUDGET, help="generated tokens of a run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--cache", default="runs/cache", help="folder of base models and pre-trained critics")
    parser.add_argument("--out", type=Path, help="default: the study's own table")
    arguments = parser.parse_args(argv)
    arguments.tasks = tuple(arguments.tasks)
    if arguments.tasks not in STUDIES:  # contrasts are means over all tasks of a plan
        parser.error(f"--tasks: got {' '.join(arguments.tasks)}; expected {' or '.join(map(' '.join, STUDIES))}")
    arguments.out = arguments.out or RESULTS / STUDIES[arguments.tasks]
    for field, least in (("seeds", 0), ("budget", NUM_MARKS), ("jobs", 1)):
        if getattr(arguments, field) < least:
            parser.error(f"--{field}: got {getattr(arguments, field)}; expected an integer of at least {least}")
    quiet()
    rows, failed = keep_whole(arguments.out), list[str]()
    try:
        jobs = plan(arguments, rows)
        if per_run := [row["cpu_s"] for row in rows if row["final"]]:
            hours = len(jobs) * float(np.mean(per_run)) / 3600
            print(f"{len(jobs)} runs to make, {np.mean(per_run):.0f} s of CPU each so far: {hours:.1f} CPU-hours", flush=True)
        failed = run_all(jobs, arguments.out, arguments.jobs)
    except KeyboardInterrupt:
        print(f"stopped; whole runs are in {arguments.out}, and the same command goes on with the others", file=sys.stderr)
        return 130
    rows = [row for row in read_whole(arguments.out)[0] if row["budget_tokens"] == arguments.budget]
    for r in table(rows, tasks=arguments.tasks):
        more = f", {r['seeds_needed']} seeds would decide" if r["verdict"] == "undecided" else ""
        print(
            f"{r['contrast']:<40}{r['difference']:+.4f} [{r['low']:+.4f}, {r['high']:+.4f}]  {r['verdict']}, {r['n']} seeds{more}"
        )
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill stops as Ctrl-C does: no worker is left behind
    sys.exit(main())
