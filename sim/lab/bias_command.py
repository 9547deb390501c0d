"""`python -m sim bias`: the table, the figures and the window that keeps the gradient within a stated error."""

from __future__ import annotations

import json
from collections.abc import Sequence

from sim.command import mistakes, parse
from sim.lab.bias_report import as_json, report
from sim.lab.examination import BiasConfig, examine


def main(argv: Sequence[str]) -> None:
    """Prints the table or JSON, and draws where --out is given. UserError for a user's mistake."""
    config = parse(BiasConfig, argv, command="bias", description=__doc__)
    with mistakes():
        examination = examine(config)
    print(json.dumps(as_json(examination), indent=1, allow_nan=False) if config.json else report(examination))
    if config.out is not None:
        from sim.lab.bias_figures import draw  # matplotlib takes its time

        for path in draw(examination, config.out):
            if not config.json:
                print(f"figure: {path}")
