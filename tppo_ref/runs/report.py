"""What `compare` leaves behind: a table with intervals, three figures (figures.py), and a CSV behind each of them.

DEFINITIONS says how each number is made, and is printed under the table. Figures are drawn from the rows that their CSV holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tppo_ref.runs.comparison import (
    Comparison,
    compare_runs,
    display,
    has_logarithm,
    mean_interval,
    number,
    quantities,
    read_json,
    read_run,
    speed_up,
    typical,
    write_csv,
)

INTERVALS = {"mean": "95 % t", "geometric mean": "95 % t of logarithms", "median": "range"}
DEFINITIONS = (
    "Accuracy: share of sampled full-length answers to the fixed evaluation prompts that the verifier accepts; the start is the "
    "first evaluation, final the mean of the last three, best the highest mean of three in a row.",
    "Target: {share:g} x the best 3-point mean of {first}'s accuracy averaged over seeds (evaluation by evaluation, as far as each "
    "seed has them), here {target:.3f}.",
    "Time and tokens to target: training clock (evaluation and checkpoints excluded) and trained response tokens at the first "
    "evaluation at which the trailing 3-point mean of that seed reaches the target; nothing is interpolated. Over seeds: the "
    "geometric mean where all reach it. Where some do not, the median and the range of all, in which those count as infinite.",
    "Speed-up: time to target of {first} / that of the other method, seed by seed, then the geometric mean over seeds. Where a "
    "seed of either never reaches the target, the median and the range: a seed in which the other method never does counts as 0, "
    "one in which only {first} does not as infinite.",
    "Throughput ratio: generated tokens per second of the training clock, other method / {first}, seed by seed, then the geometric "
    "mean over seeds.",
    "Brackets: 95 % Student-t intervals over seeds, of means as they are, of geometric means on logarithms. A range is the least "
    "and the largest seed, and no interval. One seed, or the same value in every seed, has neither.",
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
    text = summary_markdown(comparison, rows, measured_with(versions))
    (out / "summary.md").write_text(text)
    print(text)
    for name, rows_of, draw in figures.FIGURES:
        rows = rows_of(comparison)
        if rows:  # no timeline where run.timeline was off
            write_csv(out / f"{name}.csv", rows)
            draw(out / f"{name}.png", rows, comparison)
            print(f"figure: {out / name}.png")


def summary_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """The long table: `quantity_rows` of each method and quantity."""
    rows: list[dict[str, Any]] = []

    def add(method: str, quantity: str, unit: str, values: Sequence[float]) -> None:
        seeds = [run.seed for run in comparison.runs[method]]
        rows.extend(quantity_rows(method, quantity, unit, dict(zip(seeds, values, strict=True))))

    made = {method: [quantities(run) for run in group] for method, group in comparison.runs.items()}
    for method, crossings in comparison.crossings.items():
        add(method, "time to target", "s", [c.train_s for c in crossings])
        add(method, "tokens to target", "tokens", [c.tokens for c in crossings])
        for name, (_, unit) in made[method][0].items():
            add(method, name, unit, [found[name][0] for found in made[method]])
    for method in list(comparison.runs)[1:]:
        pairs = zip(comparison.crossings[comparison.first], comparison.crossings[method], strict=True)
        add(method, "speed-up", "x", [speed_up(a.train_s, b.train_s) for a, b in pairs])
        rates = [[found["throughput"][0] for found in made[m]] for m in (comparison.first, method)]
        add(method, "throughput ratio", "x", [b / a for a, b in zip(*rates, strict=True)])
    return rows


def quantity_rows(method: str, quantity: str, unit: str, by_seed: Mapping[int, float]) -> list[dict[str, Any]]:
    """A row of the statistic over seeds, `interval` saying what low and high are, and a row of each seed. Times and tokens to the
    target and ratios have the statistic of `typical`, everything else a mean. reached: the seeds with a finite value, of a
    ratio with two. Where all seeds have one value, as one base model's accuracy at the start, no interval can be made of them."""
    row, values = {"method": method, "quantity": quantity, "unit": unit}, list(by_seed.values())
    to_target = quantity.endswith("to target") or unit == "x"
    statistic, estimate = typical(values) if to_target else ("mean", mean_interval(values))
    reached = sum(map(has_logarithm if unit == "x" else math.isfinite, values))
    interval = INTERVALS[statistic]
    if len(set(values)) == 1:
        interval, estimate = "", estimate._replace(low=math.nan, high=math.nan)
    return [row | {"statistic": statistic, "interval": interval} | estimate._asdict() | {"reached": reached},
            *(row | {"statistic": f"seed {seed}", "value": float(value)} for seed, value in by_seed.items())]  # fmt: skip


def table_cell(row: Mapping[str, Any], num_seeds: int) -> str:
    """A statistic over seeds with its interval or range, and how many seeds reach the target."""
    value, low, high = (number(row[name], row["unit"]) for name in ("value", "low", "high"))
    interval = f"{value} [{low}, {high}]" if row["interval"] else value
    cell = f"median {value}, range {low} to {high}" if row["interval"] == INTERVALS["median"] else interval
    if row["quantity"].endswith("to target"):
        return f"{cell}, {row['reached']} of {num_seeds} seeds"
    return cell + (f", both arrive in {row['reached']} of {num_seeds} seeds" if row["statistic"] == "median" else "")


def measured_with(versions: Mapping[str, str]) -> str:
    return "Measured with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + "."


def summary_markdown(comparison: Comparison, rows: Sequence[Mapping[str, Any]], measured: str) -> str:
    """summary.md: what came out, whether it is valid, the table, how each number was made, and where (`measured_with`)."""
    from tppo_ref.runs.figures import headline  # it speaks in the figures too

    first = display(comparison.first)
    valid = f"Valid: {first} improved in every seed (final accuracy above its start), and the target is above its mean start."
    if comparison.void:
        valid = f"**Void: {comparison.void}. Times to target and speed-ups below say nothing about which method is faster.**"
    table: dict[str, dict[str, str]] = {}
    for row in rows:
        if "low" in row:
            unit = f" ({row['unit']})" if row["unit"] == "tokens/s" or row["quantity"].startswith("length") else ""
            table.setdefault(row["quantity"] + unit, {})[row["method"]] = table_cell(row, comparison.num_seeds)
    body = [[name, *(cells.get(method, "") for method in comparison.runs)] for name, cells in table.items()]
    lines = [["", *map(display, comparison.runs)], *body]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    grid = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines]
    notes = [d.format(share=comparison.share, first=first, target=comparison.target) for d in DEFINITIONS]
    return "\n".join([
        f"# {headline(comparison)}", "", valid, "", *grid, "", *(f"- {note}" for note in notes), "", measured, "",
    ])  # fmt: skip
