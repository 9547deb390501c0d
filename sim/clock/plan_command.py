"""`python -m sim plan`: bytes, seconds and the window of a setting, or with --best the setting to take; for people or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sim.clock.plan import PlanConfig, make
from sim.clock.plan_report import as_json, report
from sim.command import mistakes, parse
from tppo_ref.method.errors import UserError

DESCRIPTION = "Bytes, seconds and the window of a run; with --best the fastest setting and method, as a config for scale/launch.py."


def main(argv: Sequence[str]) -> None:
    """Prints a table, a config or JSON, and writes where --out is given. UserError for a user's mistake."""
    config = parse(PlanConfig, argv, command="plan", description=DESCRIPTION)
    if config.best:
        best(config)
        return
    with mistakes():
        plan = make(config)
    drawn = []
    if config.out is not None:
        from sim.clock.clock_figures import draw_plan  # matplotlib takes its time

        drawn = draw_plan(plan, config.out)
    if config.json:
        print(json.dumps(as_json(plan), indent=1, allow_nan=False))
        return
    print(report(plan))
    for path in drawn:
        print(f"figure: {path}")


def best(config: PlanConfig) -> None:
    """The recommended config, on stdout or in the file that --out names; then the table alone is printed."""
    from sim.clock import best as planner

    with mistakes():
        found = planner.answer(config)
        text = planner.text(config, found)
    if config.out is not None:
        try:
            Path(config.out).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"out: got {config.out}, which cannot be written ({error.strerror}); expected a file") from None
    if config.json:
        print(json.dumps(planner.as_json(config, found), indent=1, allow_nan=False))
    elif config.out is None:
        print(text, end="")
    else:
        print("\n".join([*planner.report(config, found), f"config: {config.out}"]))
