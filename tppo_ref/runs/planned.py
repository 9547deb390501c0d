"""One run of a comparison, in a process of its own: `python -m tppo_ref.runs.planned wanted.json`.

Not `train`: that refuses a field which the named method fixes, and in a comparison `compare.per_method` has the last word.
"""

from __future__ import annotations

import logging
import sys

from tppo_ref.runs.commands import train
from tppo_ref.runs.config import Config
from tppo_ref.runs.exits import exit_code
from tppo_ref.runs.parsing import parse
from tppo_ref.runs.validation import check


def run(file: str) -> None:
    """Train the run that a file describes, method applied and all. UserError for what cannot run."""
    config = parse(Config, ["--config", file], prog="python -m tppo_ref.runs.planned")
    check(config)
    print(f"checkpoint: {train(config)}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(exit_code(lambda: run(sys.argv[1])))
