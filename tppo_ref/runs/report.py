"""What `compare` leaves behind: a table with intervals, three figures (figures.py), and a CSV behind each of them.

DEFINITIONS says how each number is made, and is printed under the table. Figures are drawn from the rows that their CSV holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tppo_ref.runs.comparison import (
    BOOTSTRAP_SEEDS,
    Comparison,
    compare_runs,
    display,
    mean_interval,
    median_interval,
    quantities,
    read_json,
    read_run,
    speed_up,
    write_csv,
)

DEFINITIONS = (
    "Accuracy: share of sampled full-length answers to the fixed evaluation prompts that the verifier accepts; the start is the "
    "first evaluation, final the mean of the last three, best the highest mean of three in a row.",
    "Target: {share:g} x the best 3-point mean of {first}'s accuracy averaged over seeds (evaluation by evaluation, as far as each "
    "seed has them), here {target:.3f}.",
    "Time and tokens to target: training clock (evaluation and checkpoints excluded) and trained response tokens at the first "
    "evaluation at which the trailing 3-point mean of that seed reaches the target; nothing is interpolated, and a seed that never "
    "reaches it is not dropped but counts as infinite.",
    "Speed-up: time to target of {first} / that of the other method, seed by seed, then the median; a seed in which the other "
    "method never reaches the target counts as 0, one in which only {first} does not as infinite.",
    "Throughput ratio: generated tokens per second of the training clock, other method / {first}, seed by seed, then the median.",
    "Intervals: means with a 95 % Student-t interval over seeds; medians with {interval}; one seed has none.",
    "Occupancy: busy slot-steps / (slots x decode steps) of the whole run. Trained tokens: those that the policy trained on / all "
    "generated. Clock: shares of the training clock; other is waiting for scores, weights to the engine and the rest.",
    "Lengths: tokens of the evaluation's full-length answers, at the first evaluation and as the mean of the last three.",
)


def write_report(out: Path, *, methods: list[str], target_share: float) -> None:
    """Tables, figures and CSV into `out`, from the finished runs out/runs/<method>-seed<k>; the table is printed too.

    Seeds are those of out/config.json. A missing, unfinished or half-written file is a UserError that names it.
    """
    from tppo_ref.runs import figures  # matplotlib is slow to import, and nothing else of the library needs it

    config, versions = read_json(out / "config.json"), read_json(out / "versions.json")
    seeds = [config["run"]["seed"] + i for i in range(config["compare"]["seeds"])]
    comparison = compare_runs({method: [read_run(out, method, seed) for seed in seeds] for method in methods}, target_share)
    rows = summary_rows(comparison)
    write_csv(out / "summary.csv", rows)
    text = summary_markdown(comparison, rows, versions)
    (out / "summary.md").write_text(text)
    print(text)
    for name, rows_of, draw in figures.FIGURES:
        rows = rows_of(comparison)
        if rows:  # no timeline where run.timeline was off
            write_csv(out / f"{name}.csv", rows)
            draw(out / f"{name}.png", rows, comparison)
            print(f"figure: {out / name}.png")


def summary_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """The long table: per method and quantity a row of the statistic over seeds with its interval, and a row of each seed."""
    rows: list[dict[str, Any]] = []

    def add(method: str, quantity: str, unit: str, statistic: str, values: Sequence[float]) -> None:
        row = {"method": method, "quantity": quantity, "unit": unit}
        estimate = (median_interval if statistic == "median" else mean_interval)(values)._asdict()
        rows.append(row | {"statistic": statistic} | estimate | {"reached": sum(map(math.isfinite, values))})
        for run, value in zip(comparison.runs[method], values, strict=True):
            rows.append(row | {"statistic": f"seed {run.seed}", "value": float(value)})

    made = {method: [quantities(run) for run in group] for method, group in comparison.runs.items()}
    for method, crossings in comparison.crossings.items():
        add(method, "time to target", "s", "median", [c.train_s for c in crossings])
        add(method, "tokens to target", "tokens", "median", [c.tokens for c in crossings])
        for name, (_, unit) in made[method][0].items():
            add(method, name, unit, "mean", [found[name][0] for found in made[method]])
    for method in list(comparison.runs)[1:]:
        pairs = zip(comparison.crossings[comparison.first], comparison.crossings[method], strict=True)
        add(method, "speed-up", "x", "median", [speed_up(a.train_s, b.train_s) for a, b in pairs])
        rates = [[found["throughput"][0] for found in made[m]] for m in (comparison.first, method)]
        add(method, "throughput ratio", "x", "median", [b / a for a, b in zip(*rates, strict=True)])
    return rows


def summary_markdown(comparison: Comparison, rows: Sequence[Mapping[str, Any]], versions: Mapping[str, str]) -> str:
    """summary.md: what came out, whether it is valid, the table, how each number was made, and where."""
    from tppo_ref.runs.figures import headline, number  # they speak in the figures too

    first, num_seeds = display(comparison.first), comparison.num_seeds
    valid = f"Valid: {first} improved in every seed (final accuracy above its start), and the target is above its mean start."
    if comparison.void:
        valid = f"**Void: {comparison.void}. Times to target and speed-ups below say nothing about which method is faster.**"
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        if "low" in row:
            value, low, high = (number(row[name], row["unit"]) for name in ("value", "low", "high"))
            cell = value if math.isnan(row["low"]) else f"{value} [{low}, {high}]"
            if row["quantity"].endswith("to target"):
                cell += f", {row['reached']} of {num_seeds} seeds"
            unit = f" ({row['unit']})" if row["unit"] == "tokens/s" or row["quantity"].startswith("length") else ""
            table.setdefault(row["quantity"] + unit, {})[row["method"]] = cell
    body = [[name, *(cells.get(method, "") for method in comparison.runs)] for name, cells in table.items()]
    lines = [["", *map(display, comparison.runs)], *body]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    grid = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]
    interval = "a 95 % percentile bootstrap interval" if num_seeds >= BOOTSTRAP_SEEDS else "their range (fewer than 5 seeds)"
    notes = [d.format(share=comparison.share, first=first, target=comparison.target, interval=interval) for d in DEFINITIONS]
    return "\n".join([
        f"# {headline(comparison)}", "", valid, "", *grid, "", *(f"- {note}" for note in notes), "",
        "Measured with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".", "",
    ])  # fmt: skip
