"""What every benchmark shares: who measured, when, with which command; a CSV and a table on the terminal."""

from __future__ import annotations

import csv
import datetime
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tppo_ref.runs.versions import processor

RESULTS = Path(__file__).parent / "results"


def provenance() -> dict[str, str | int]:
    """Columns that say under which conditions a row was measured."""
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    module = getattr(sys.modules["__main__"], "__spec__", None)
    command = f"python -m {module.name.removesuffix('.__main__')}" if module else f"python {sys.argv[0]}"
    arguments = [Path(text).name if Path(text).is_absolute() else text for text in sys.argv[1:]]  # not its folders
    return {
        "machine": machine, "torch": torch.__version__, "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(), "command": shlex.join([*command.split(), *arguments]),
    }  # fmt: skip


def whole_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV to which each finished run adds. A line that a kill has torn is taken out: its run is made again."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        return []
    text = path.read_text()
    if not text.endswith("\n"):
        path.write_text(text[: text.rfind("\n") + 1])
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def report(name: str, rows: Sequence[Mapping[str, object]], path: Path | None = None) -> None:
    """Print rows as a table, and write them with their provenance to results/<name>.csv."""
    path = path or RESULTS / f"{name}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = [dict(row) | provenance() for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(whole[0]))
        writer.writeheader()
        writer.writerows(whole)
    widths = {key: max(len(key), *(len(str(row[key])) for row in rows)) for key in rows[0]}
    print("  ".join(key.ljust(width) for key, width in widths.items()))
    for row in rows:
        print("  ".join(str(row[key]).ljust(width) for key, width in widths.items()))
    print(f"-> {path}")
