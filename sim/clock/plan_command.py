"""`python -m sim plan`: bytes, seconds and the window, for people or as JSON (its fields: plan_report.py)."""

from __future__ import annotations

import json
from collections.abc import Sequence

from sim.clock.plan import PlanConfig, make
from sim.clock.plan_report import as_json, report
from sim.command import mistakes, parse


def main(argv: Sequence[str]) -> None:
    """Prints the table or JSON, and draws where --out is given. UserError for a user's mistake."""
    config = parse(PlanConfig, argv, command="plan", description="Bytes, seconds and the window of a run.")
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
