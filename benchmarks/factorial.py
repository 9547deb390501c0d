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

import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks import workers
from benchmarks.common import RESULTS
from benchmarks.critic_batches import contrast
from benchmarks.equal_tokens import KEY, SHARED, Arm, Job, Row, Wanted, plan, score

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


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes as workers.command says."""
    options = workers.parser(__doc__, seeds=SEEDS, out=None)
    options.add_argument("--tasks", nargs="+", default=TASKS, help="of one study: chain fork, or maze brackets")
    arguments = workers.parsed(options, argv)
    if (tasks := tuple(arguments.tasks)) not in STUDIES:  # contrasts are means over all tasks of a plan
        options.error(f"--tasks: got {' '.join(tasks)}; expected {' or '.join(map(' '.join, STUDIES))}")
    shared = {"run.cache": arguments.cache, "run.eval_prompts": arguments.eval_prompts, "run.eval_samples": 4, **SHARED}
    wanted = [
        Wanted(task, name(cell), arm(cell), seed, shared | {"value.pretrain_responses": CRITICS[cell[1]]})
        for seed, cell, task in itertools.product(range(arguments.seeds), CELLS, tasks)
    ]

    def missing(rows: list[Row]) -> list[Job]:
        jobs = plan(wanted, arguments.budget, rows)
        if per_run := [row["cpu_s"] for row in rows if row["final"]]:
            hours = len(jobs) * float(np.mean(per_run)) / 3600
            print(f"{len(jobs)} runs to make, {np.mean(per_run):.0f} s of CPU each so far: {hours:.1f} CPU-hours", flush=True)
        return jobs

    def show(rows: list[Row]) -> None:
        for r in table([row for row in rows if row["budget_tokens"] == arguments.budget], tasks=tasks):
            more = f", {r['seeds_needed']} seeds would decide" if r["verdict"] == "undecided" else ""
            print(f"{r['contrast']:<40}{r['difference']:+.4f} [{r['low']:+.4f}, {r['high']:+.4f}]  {r['verdict']}, {r['n']} "
                  f"seeds{more}")  # fmt: skip

    return workers.command(missing, arguments.out or RESULTS / STUDIES[tasks], arguments.jobs, show)


if __name__ == "__main__":
    sys.exit(main())
