"""The headline: PPO against T-PPO, the same engine, slots, base model and pre-trained critic, five fresh seeds.
ppo-dual, PPO's window with T-PPO's critic and PPO's settings, stands between them.

    python -m benchmarks.headline [--tasks chain fork] [--methods ppo ppo-dual tppo] [--seconds 60]
    python -m benchmarks.headline --redraw [--tasks chain fork]      nothing is run: statistics, intervals and figures anew from the
                                                                     values of the seeds in the committed summary.csv

Settings of each method: the best cell of results/sweep-chain.csv by mean accuracy over the clock, averaged over tuning seeds that
are not used here. Target and time are as tppo_ref/runs/report.py defines them and summary.md repeats. Keeps summary.md,
summary.csv, the figures and their CSV in results/headline-<task>/.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.common import RESULTS, provenance
from benchmarks.sweep import best_cells, cell_of
from tppo_ref.runs.comparison import Comparison, Crossing, void_because, write_csv
from tppo_ref.runs.config import Config
from tppo_ref.runs.figures import crossing_row, draw_learning_curves, draw_lengths
from tppo_ref.runs.report import INTERVALS, quantity_rows, summary_markdown

KEPT = ("summary.md", "summary.csv", "learning_curves.png", "learning_curves.csv", "timeline.png", "lengths.png", "lengths.csv")
SEEDS = 5


def best_settings(sweep: Path) -> dict[str, dict[str, float]]:
    """Per method its best swept cell (sweep.best_cells): T-PPO's of the grid, PPO's of its final round."""
    with sweep.open(newline="") as file:
        rows = list(csv.DictReader(file))
    best: dict[str, dict[str, float]] = {}
    for method, stage in (("ppo", "ppo final"), ("ppo-dual", "ppo final"), ("tppo", "tppo")):
        best[method] = cell_of(method, *best_cells(rows, stage)[0])
    return best


def sentence(summary: Path) -> str:
    """The result in one sentence, from summary.csv: what README.md says of a task, held equal by tests/test_docs.py."""
    with summary.open(newline="") as file:
        rows = {(r["method"], r["quantity"]): r for r in csv.DictReader(file) if not r["statistic"].startswith("seed ")}

    def between(method: str, quantity: str, form: str) -> str:
        row = rows[method, quantity]
        value, low, high = (f"{float(row[name]):{form}}" for name in ("value", "low", "high"))
        ends = {"": "", INTERVALS["median"]: f" (median, range {low} to {high})"}
        return value + ends.get(row["interval"], f" [{low}, {high}]")

    def arrival(method: str) -> str:
        row = rows[method, "time to target"]
        if float(row["value"]) == float("inf"):
            return f"does not reach it in most seeds ({row['reached']} of {SEEDS} do)"
        return f"reaches it in {between(method, 'time to target', '.1f')} s ({row['reached']} of {SEEDS} seeds)"

    return (
        f"PPO {arrival('ppo')}, T-PPO {arrival('tppo')}; speed-up {between('tppo', 'speed-up', '.2f')}x, tokens per second "
        f"{between('tppo', 'throughput ratio', '.2f')}x, final accuracy {between('ppo', 'accuracy, final', '.3f')} and "
        f"{between('tppo', 'accuracy, final', '.3f')}."
    )


def redraw(folder: Path) -> list[Path]:
    """From the values of each seed in summary.csv: both tables, learning_curves.csv's crossings, learning curves and lengths. The
    timeline, whose table is too large to keep, stays as it is. The paths written."""
    by_seed = seed_values(folder / "summary.csv")
    curves, lengths = rows_of(folder / "learning_curves.csv"), rows_of(folder / "lengths.csv")
    (target, *_) = [r["accuracy"] for r in curves if r["line"] == "crossing"]
    comparison = comparison_of({(method, quantity): seeds for (method, quantity, _), seeds in by_seed.items()}, target)
    rows = [row for key, seeds in by_seed.items() for row in quantity_rows(*key, seeds)]
    curves = [crossing_row(comparison, r["method"]) if r["line"] == "crossing" else r for r in curves]
    (measured,) = [x for x in (folder / "summary.md").read_text().splitlines() if x.startswith("Measured with ")]
    names = ("summary.csv", "summary.md", "learning_curves.csv", "learning_curves.png", "lengths.png")
    paths = [folder / name for name in names]
    write_csv(paths[0], rows)
    paths[1].write_text(summary_markdown(comparison, rows, measured))
    write_csv(paths[2], curves)
    draw_learning_curves(paths[3], curves, comparison)
    draw_lengths(paths[4], lengths, comparison)
    return paths


def seed_values(summary: Path) -> dict[tuple[str, str, str], dict[int, float]]:
    """Values by seed of each (method, quantity, unit), in the order of the table."""
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for row in rows_of(summary):
        if row["statistic"].startswith("seed "):
            key = row["method"], row["quantity"], row["unit"]
            found.setdefault(key, {})[int(row["statistic"].removeprefix("seed "))] = row["value"]
    return found


def comparison_of(found: Mapping[tuple[str, str], Mapping[int, float]], target: float) -> Comparison:
    """What figures and tables ask of a comparison, from values by (method, quantity) and seed; of the runs only their seeds."""
    methods = list(dict.fromkeys(method for method, _ in found))
    runs: Any = {m: [SimpleNamespace(seed=seed) for seed in found[m, "time to target"]] for m in methods}
    crossings = {m: [Crossing(x, found[m, "tokens to target"][k]) for k, x in found[m, "time to target"].items()] for m in methods}
    starts, finals = (found[methods[0], f"accuracy, {name}"] for name in ("start", "final"))
    void = void_because(methods[0], target, {seed: (start, finals[seed]) for seed, start in starts.items()})
    return Comparison(runs=runs, share=Config().compare.target, target=target, void=void, crossings=crossings)


def rows_of(path: Path) -> list[dict[str, Any]]:
    """A table's rows, numbers as numbers."""

    def value(text: str) -> Any:
        try:
            return float(text)
        except ValueError:
            return text

    with path.open(newline="") as file:
        return [{name: value(text) for name, text in row.items()} for row in csv.DictReader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["chain", "fork"])
    parser.add_argument("--methods", nargs="+", default=["ppo", "ppo-dual", "tppo"])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("runs/headline"))
    parser.add_argument("--redraw", action="store_true", help="tables and figures anew from the committed values of each seed")
    arguments = parser.parse_args()
    if arguments.redraw:
        for path in (path for task in arguments.tasks for path in redraw(RESULTS / f"headline-{task}")):
            print(path)
        return
    settings = best_settings(RESULTS / "sweep-chain.csv")
    for task in arguments.tasks:
        out = arguments.out / task
        fields = {
            "task.name": task, "run.out": out, "run.train_seconds": arguments.seconds, "compare.seeds": SEEDS,
            "compare.per_method": json.dumps({m: settings[m] for m in arguments.methods}), "run.eval_every_s": 2.5,
            "compare.methods": json.dumps(arguments.methods),
        }  # fmt: skip
        command = [sys.executable, "-m", "tppo_ref", "compare", *(f"--{name}={value}" for name, value in fields.items())]
        subprocess.run(command, check=True)
        kept = RESULTS / f"headline-{task}"
        kept.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            shutil.copy(out / name, kept / name)
        print(f"{task}: {sentence(kept / 'summary.csv')}")
        (kept / "provenance.json").write_text(json.dumps(provenance() | {"settings": settings}, indent=1) + "\n")


if __name__ == "__main__":
    main()
