"""The headline: PPO against T-PPO, the same engine, slots, base model and pre-trained critic, five fresh seeds.

    python -m benchmarks.headline [--tasks chain fork length] [--seconds 60]

Settings of each method: the best cell of results/sweep-chain.csv by mean accuracy over the clock, averaged over the tuning seeds
(0 to 4 here, 100 and 101 there). Target and time are as tppo_ref/report.py defines them and summary.md repeats. Keeps summary.md,
summary.csv, the figures and their CSV in results/headline-<task>/.
"""

from __future__ import annotations

import argparse
import collections
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.common import RESULTS, provenance

KEPT = ("summary.md", "summary.csv", "learning_curves.png", "learning_curves.csv", "timeline.png", "lengths.png", "lengths.csv")
SEEDS = 5


def best_settings(sweep: Path) -> dict[str, dict[str, float]]:
    """Per method the swept cell with the highest mean accuracy over the clock, averaged over its seeds."""
    areas: dict[tuple[str, str, str], list[float]] = collections.defaultdict(list)
    with sweep.open(newline="") as file:
        for row in csv.DictReader(file):
            areas[row["method"], row["lr"], row["mini_batch_tokens"]].append(float(row["mean_accuracy"]))
    best: dict[str, dict[str, float]] = {}
    for method in sorted({key[0] for key in areas}):
        _, lr, tokens = max((key for key in areas if key[0] == method), key=lambda key: sum(areas[key]) / len(areas[key]))
        best[method] = {"policy.lr": float(lr), "policy.mini_batch_tokens": int(tokens), "value.mini_batch_tokens": int(tokens)}
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["chain", "fork"])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("runs/headline"))
    arguments = parser.parse_args()
    settings = best_settings(RESULTS / "sweep-chain.csv")
    for task in arguments.tasks:
        out = arguments.out / task
        fields = {
            "task.name": task, "run.out": out, "run.train_seconds": arguments.seconds, "compare.seeds": SEEDS,
            "compare.per_method": json.dumps(settings), "run.eval_every_s": 2.5,
        }  # fmt: skip
        command = [sys.executable, "-m", "tppo_ref", "compare", *(f"--{name}={value}" for name, value in fields.items())]
        subprocess.run(command, check=True)
        kept = RESULTS / f"headline-{task}"
        kept.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            shutil.copy(out / name, kept / name)
        (kept / "provenance.json").write_text(json.dumps(provenance() | {"settings": settings}, indent=1) + "\n")


if __name__ == "__main__":
    main()
