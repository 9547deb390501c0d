"""`python -m sim throughput`: where the speed comes from, and where it goes: tables, CSV and figures.

    python -m sim throughput --out benchmarks/results        what docs/throughput.md cites; about two minutes

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

from sim.clock.throughput import PUBLISHED, TABLES, evaluate, system_cases, systems
from sim.command import option, parse
from tppo_ref.method.errors import UserError, nearest
from tppo_ref.runs.comparison import write_csv
from tppo_ref.runs.figures import Rows
from tppo_ref.runs.validation import writable_folder

NAMES = (*TABLES, "systems", "timeline")
COLUMNS = ("mean_tokens", "longest_over_mean", "ppo_ops_per_byte", "ops_per_byte", "gain_rollout", "gain_without_prefix", "gain",
           "ppo_rollout_share", "fed_again", "preemptions")  # fmt: skip


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
        tables[name] = table(name)
        if not config.json:
            print(text(name, tables[name]) + f"\n({time.perf_counter() - begin_s:.0f} s)\n", flush=True)
        if folder:
            write(folder, name, tables[name])
    if config.json:
        print(json.dumps(tables, indent=1, allow_nan=False))


def table(name: str) -> Rows:
    """The rows of a table."""
    if name == "timeline":
        from sim.clock.clock_figures import timeline_rows

        return timeline_rows()
    if name == "systems":
        return [row for case in system_cases() for row in systems(case)]
    return [evaluate(case) for case in TABLES[name]()]


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
    if name == "systems":
        lines = [f"{'setup':16} {'system':14} {'how':34} {'rollout':>8} {'step':>6} {'busy':>6} {'stale':>6} {'given up':>9}"]
        lines += [f"{r['what']:16} {r['system']:14} {r['how']:34} {r['gain_rollout']:>7.2f}x {r['gain']:>5.2f}x "
                  f"{100 * r['occupancy']:>4.0f} % "
                  f"{r['staleness_mean']:>6.2f} {100 * r['discarded']:>7.0f} %" for r in rows]  # fmt: skip
        claims = [f"  {system:38} {claim:34} {setup}" for system, claim, setup in PUBLISHED]
        return "\n".join([f"{name}: setups of ours", *lines, "Published, on their own setups:", *claims])
    head = f"{'':36} " + " ".join(f"{column.replace('gain_', 'gain '):>19}" for column in COLUMNS)
    return "\n".join(
        [f"{name}", head, *(f"{_label(r):36} " + " ".join(f"{r[column]:>19,.2f}" for column in COLUMNS) for r in rows)]
    )


def _label(row: dict[str, Any]) -> str:
    what = row["what"] if row["lengths"] in row["what"] else f"{row['lengths'][:16]}, {row['what']}"
    return str(what)[:36]
