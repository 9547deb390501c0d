"""The tuning of both methods before the headline: the same grid of learning rates and mini-batches for each.

    python -m benchmarks.sweep [--seconds 30] [--task chain]

Every cell is one `compare` run of ppo and tppo on seeds that the headline does not use. PPO then gets more: its three best cells
run twice as long on two further seeds, so that a near tie, or a cell that collapses later, is not decided by luck against it.

Writes results/sweep-<task>.csv: a row per method, cell and seed with the mean accuracy over the training clock (the area under
the learning curve, which rewards speed and level alike) and the final 3-point mean. The cell with the best mean area over seeds
is the method's setting in the headline (the demo's is fair_headline.py's). Run it alone: the ranking is by wall-clock, and
tokens_per_s shows when other work disturbed a cell.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import report
from tppo_ref.runs.config import METHODS
from tppo_ref.runs.sinks import read_metrics

LEARNING_RATES = (1.5e-4, 3e-4, 6e-4)
MINI_BATCH_TOKENS = (125, 250, 500)
TUNING_SEEDS = (100, 101)  # the headline uses 0 to 4
FINAL_SEEDS = (102, 103)


def curve(folder: Path) -> tuple[float, float, float]:
    """Mean accuracy over the clock, the mean of the last three evaluations, and trained tokens per second.

    The last tells whether other work disturbed a run: cells can be compared only where it agrees between the seeds of a method.
    """
    names = ("time/train_s", "eval/accuracy", "ledger/trained")
    points = [[r[n] for n in names] for r in read_metrics(folder / "metrics.jsonl") if "eval/accuracy" in r]
    seconds, accuracy, trained = np.array(points).T
    area = float(np.trapezoid(accuracy, seconds) / (seconds[-1] - seconds[0]))
    return area, float(accuracy[-3:].mean()), float(trained[-1] / seconds[-1])


def best_cells(rows: Sequence[Mapping[str, Any]], method: str) -> list[tuple[float, int]]:
    """The method's cells (lr, mini-batch tokens) by mean accuracy over the clock, averaged over seeds, best first."""
    areas: dict[tuple[float, int], list[float]] = collections.defaultdict(list)
    for row in rows:
        if row["method"] == method:
            areas[float(row["lr"]), int(row["mini_batch_tokens"])].append(float(row["mean_accuracy"]))
    return sorted(areas, key=lambda cell: -sum(areas[cell]) / len(areas[cell]))


def cell_of(method: str, lr: float, tokens: int) -> dict[str, float]:
    """The fields of a swept cell; a joint value model has the policy's mini-batches."""
    joint = METHODS[method].get("value.update") == "joint"
    return {"policy.lr": lr, "policy.mini_batch_tokens": tokens} | ({} if joint else {"value.mini_batch_tokens": tokens})


def finals(rows: Sequence[Mapping[str, Any]], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """PPO's three best cells again: twice the time, two further seeds."""
    found = []
    for lr, tokens in best_cells(rows, "ppo")[:3]:
        out = arguments.out / f"{arguments.task}-final-lr{lr:g}-mb{tokens}"
        fields = {
            "task.name": arguments.task, "run.out": out, "run.train_seconds": 2 * arguments.seconds, "run.seed": FINAL_SEEDS[0],
            "compare.seeds": len(FINAL_SEEDS), "run.eval_every_s": 2.5, "run.timeline": "false", "compare.methods": "[ppo]",
            "compare.per_method": json.dumps({"ppo": cell_of("ppo", lr, tokens)}),
        }  # fmt: skip
        command = [sys.executable, "-m", "tppo_ref", "compare", *(f"--{name}={value}" for name, value in fields.items())]
        subprocess.run(command, check=True)
        for seed in FINAL_SEEDS:
            area, final, speed = curve(out / "runs" / f"ppo-seed{seed}")
            found.append({"method": "ppo final", "lr": lr, "mini_batch_tokens": tokens, "seed": seed,
                          "mean_accuracy": round(area, 4), "final_accuracy": round(final, 4),
                          "tokens_per_s": round(speed)})  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--task", default="chain")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    arguments = parser.parse_args()
    rows = []
    for lr, tokens in itertools.product(LEARNING_RATES, MINI_BATCH_TOKENS):
        out = arguments.out / f"{arguments.task}-lr{lr:g}-mb{tokens}"
        fields = {
            "task.name": arguments.task, "run.out": out, "run.train_seconds": arguments.seconds, "run.seed": TUNING_SEEDS[0],
            "compare.seeds": len(TUNING_SEEDS), "run.eval_every_s": 2.5, "run.timeline": "false",
            # per method, so that every cell starts from the same pre-trained critic
            "compare.per_method": json.dumps({method: cell_of(method, lr, tokens) for method in ("ppo", "tppo")}),
        }  # fmt: skip
        command = [sys.executable, "-m", "tppo_ref", "compare", *(f"--{name}={value}" for name, value in fields.items())]
        subprocess.run(command, check=True)
        for method, seed in itertools.product(("ppo", "tppo"), TUNING_SEEDS):
            area, final, speed = curve(out / "runs" / f"{method}-seed{seed}")
            rows.append({"method": method, "lr": lr, "mini_batch_tokens": tokens, "seed": seed,
                         "mean_accuracy": round(area, 4), "final_accuracy": round(final, 4),
                         "tokens_per_s": round(speed)})  # fmt: skip
        report(f"sweep-{arguments.task}", rows)
    rows += finals(rows, arguments)
    report(f"sweep-{arguments.task}", rows)


if __name__ == "__main__":
    main()
