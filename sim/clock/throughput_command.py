"""`python -m sim throughput`: where the speed comes from, and where it goes: tables, CSV and figures.

    python -m sim throughput --out benchmarks/results        what docs/throughput.md cites; about ten minutes

Writes throughput_NAME.csv for each table of sim/clock/throughput.py, and throughput_NAME.png for the figures.
The JSON is {table: [rows]}; a mistake prints {"error": "..."} instead, and the exit code is 2.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sim.clock.compare import evaluate
from sim.clock.ranges import Range
from sim.clock.throughput import NAMES as NAMES_OF_METHODS
from sim.clock.throughput import PUBLISHED, SETUPS, TABLES, methods
from sim.command import option, parse
from tppo_ref.method.errors import UserError, nearest
from tppo_ref.runs.comparison import write_csv
from tppo_ref.runs.figures import Rows
from tppo_ref.runs.validation import writable_folder

NAMES = (*TABLES, "methods", "timeline")
COLUMNS = ("tp", "mean_tokens", "longest_over_mean", "ppo_ops_per_byte", "ops_per_byte", "gain_rollout", "gain_without_prefix",
           "ppo_rollout_share", "fed_again", "lag_updates", "preemptions")  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class ThroughputConfig:
    """What is computed. Each field is an option of the command line, its help is the field's."""

    tables: tuple[str, ...] = option(NAMES, f"of {', '.join(NAMES)}; all by default", metavar="NAME")
    out: str | None = option(None, "folder for CSV and figures; none given: none are written", metavar="FOLDER")
    json: bool = option(False, "print JSON and nothing else")


def main(argv: Sequence[str]) -> None:
    """Prints tables or JSON, and writes CSV and figures where --out is given. UserError for a user's mistake."""
    config = parse(ThroughputConfig, argv, command="throughput", description=__doc__)
    for name in config.tables:
        if name not in NAMES:
            raise UserError(f"tables: got {name}; expected some of {', '.join(NAMES)}{nearest(name, list(NAMES))}")
    folder = None if config.out is None else writable_folder(config.out, "out")
    tables: dict[str, Rows] = {}
    for name in config.tables:
        begin_s = time.perf_counter()
        tables[name] = table(name, quiet=config.json)
        if not config.json:
            print(text(name, tables[name]) + f"\n({time.perf_counter() - begin_s:.0f} s)\n", flush=True)
        if folder:
            write(folder, name, tables[name])
    if config.json:
        print(json.dumps(tables, indent=1, allow_nan=False))


def table(name: str, *, quiet: bool = False) -> Rows:
    """The rows of a table, with their progress on the terminal unless `quiet`."""
    if name == "timeline":
        from sim.clock.clock_figures import timeline_rows

        return timeline_rows()
    if name == "methods":
        return list(tqdm(methods(), name, len(NAMES_OF_METHODS) * len(SETUPS), unit="row", leave=False, disable=quiet or None))
    cases = list(TABLES[name]())
    return [evaluate(case) for case in tqdm(cases, name, unit="row", leave=False, disable=quiet or None)]


def write(folder: Path, name: str, rows: Rows) -> None:
    """CSV, and the figure of those tables that have one."""
    from sim.clock import clock_figures as figures

    write_csv(folder / f"throughput_{name}.csv", rows)
    draw: dict[str, Any] = {"timeline": figures.draw_timeline, "windows": figures.draw_windows, "tails": figures.draw_tails}
    if name == "conditions":
        roof = figures.roofline_rows(rows)
        write_csv(folder / "throughput_roofline.csv", roof)
        figures.draw_roofline(folder / "throughput_roofline.png", roof)
    elif name in draw:
        draw[name](folder / f"throughput_{name}.png", rows)


def text(name: str, rows: Rows) -> str:
    """A table for people."""
    if name == "timeline":
        return f"timeline: {len(rows)} bars"
    if name == "methods":
        gains = {"gain": "PPO at its best", "gain_step": "equal tokens per step", "gain_same_critic": "its best, same critic"}
        lines = [f"{'':5} {'':17} {'':>2} {'':>6} " + " ".join(f"{words:>22}" for words in gains.values()) +
                 f" {'tokens/s':>9} {'step s':>7} {'updates/day':>12} {'lag':>5} {'busy':>6} {'given up':>9}"]  # fmt: skip
        for r in rows:
            own = " ".join(f"{_range(r, gain):>22}" for gain in gains)
            lines.append(f"{r['what']:5} {r['system']:17} {r['tp']:>2} {r['slots']:>6,} {own} {r['tokens_per_s']:>9,.0f} "
                         f"{r['step_s']:>7,.0f} {r['updates_per_day']:>12,.0f} {r['lag_updates']:>5.1f} "
                         f"{100 * r['occupancy']:>4.0f} % {100 * r['discarded']:>7.0f} %")  # fmt: skip
        claims = [f"  {system:38} {claim:34} {setup}" for system, claim, setup in PUBLISHED]
        title = f"{name}: setups of ours; TP, slots, gains over, lag in updates per token"
        return "\n".join([title, *lines, "Published, on their own setups:", *claims])
    head = f"{'':36} {'gain: best PPO':>24} {'equal tokens per step':>24} {'equal settings':>24}  " + " ".join(
        f"{column.replace('gain_', 'gain '):>19}" for column in COLUMNS)  # fmt: skip
    columns = ("gain", "gain_step", "gain_equal")
    return "\n".join([f"{name}", head, *(
        f"{_label(r):36} " + " ".join(f"{_range(r, gain):>24}" for gain in columns) + "  "
        + " ".join(f"{r[column]:>19,.2f}" for column in COLUMNS) for r in rows)])  # fmt: skip


def _range(row: dict[str, Any], name: str) -> str:
    return Range(row[f"{name}_low"], row[name], row[f"{name}_high"]).text()


def _label(row: dict[str, Any]) -> str:
    what = row["what"] if row["lengths"] in row["what"] else f"{row['lengths'][:16]}, {row['what']}"
    return str(what)[:36]
