"""The numbers of a finished run as named columns, and two sets of them compared bit for bit (for benchmarks/unchanged.py).

collect            a run's files -> "file:name" -> Column
store, load        many runs' columns as a small CSV of digests and last values
compare            what differs, and what only one side has
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.numpy import load_file

WALL_CLOCK = re.compile(r"time/.*|mfu/.*|memory/.*|.*_per_s|.*/idle_s|eval/time_s|train_s|begin_s|stop_s|seconds")
"""Metrics, and columns of a training run's tables, that no two runs have in common."""
CONDITIONS = ("processor", "instructions", "torch", "numpy", "transformers", "python")
"""What numbers depend on besides the code."""


class Column(NamedTuple):
    """The cells under one name, in order: how many, a hash of them all, the last one; all of them, where they were not stored."""

    rows: int
    digest: str
    last: str
    values: list[str] | None = None


@dataclasses.dataclass
class Side:
    """What one checkout gave: run -> its columns; run -> why there are none; under which conditions."""

    runs: dict[str, dict[str, Column]] = dataclasses.field(default_factory=dict)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)


# -------------------------------------------------------------------------------------------------------------- files to columns


def collect(folder: Path, printed: str = "", *, timed: bool) -> dict[str, Column]:
    """Columns of all files of a run, and of what it printed where that is JSON. timed: wall-clock is left out."""
    cells: dict[str, list[Any]] = defaultdict(list)
    for path in sorted(folder.glob("*.jsonl")):
        for name, cell in leaves([json.loads(line) for line in path.read_text().splitlines()]):
            cells[f"{path.name}:{name}"].append(cell)
    for path in folder.glob("evaluation.json"):
        for name, cell in leaves(json.loads(path.read_text())):
            cells[f"{path.name}:{name}"].append(cell)
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, cell in row.items():
                    cells[f"{path.name}:{name}"].append(cell)
    if printed.startswith("{"):
        for name, cell in leaves(json.loads(printed)):
            cells[f"stdout:{name}"].append(numbers_of_prose(cell))
    for path in sorted(folder.rglob("*.safetensors")):
        cells[f"{path.relative_to(folder).as_posix()}:tensors"] = tensor_digests(path)
    return {name: column(found) for name, found in cells.items() if not (timed and WALL_CLOCK.fullmatch(name.split(":", 1)[1]))}


def column(cells: Iterable[Any]) -> Column:
    values = [canonical(cell) for cell in cells]
    return Column(len(values), hashlib.sha256("\n".join(values).encode()).hexdigest()[:16], values[-1], values)


def canonical(cell: Any) -> str:
    """A cell as text: equal for equal numbers, 3 and "3.0" among them, and different where a single bit differs."""
    if cell is None:
        return ""
    try:
        number = float(cell)
    except ValueError:
        return str(cell)
    rounded = isinstance(cell, int) and int(number) != cell  # an integer may have more digits than a float
    return str(cell) if rounded else repr(number)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, leaf) of nested JSON; the entries of a list share its name."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list):
        for inner in value:
            yield from leaves(inner, name)
    else:
        yield name, value


def numbers_of_prose(cell: Any) -> Any:
    """A sentence may be put in other words, with the same numbers."""
    return " ".join(re.findall(r"-?\d+(?:[.,]\d+)*", cell)) if isinstance(cell, str) and " " in cell else cell


def tensor_digests(path: Path) -> list[str]:
    """A hash per tensor, of dtype, shape and bytes; sorted, because tensors may be renamed."""
    tensors = load_file(path).values()
    return sorted(hashlib.sha256(f"{t.dtype} {t.shape}".encode() + t.tobytes()).hexdigest() for t in tensors)


# ------------------------------------------------------------------------------------------------------------------ the stored side


def store(side: Side, folder: Path) -> None:
    """Write columns.csv (run, column, rows, digest, last) and provenance.json."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "columns.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", "column", "rows", "digest", "last"])
        writer.writerows([run, name, *found[:3]] for run, columns in side.runs.items() for name, found in columns.items())
    (folder / "provenance.json").write_text(json.dumps(side.provenance, indent=1) + "\n")


def load(folder: Path) -> Side:
    """What `store` wrote."""
    runs: dict[str, dict[str, Column]] = defaultdict(dict)
    with (folder / "columns.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            runs[row["run"]][row["column"]] = Column(int(row["rows"]), row["digest"], row["last"])
    return Side(dict(runs), {}, json.loads((folder / "provenance.json").read_text()))


# ------------------------------------------------------------------------------------------------------------------- the comparison


class Difference(NamedTuple):
    """A column of a run that is not what it was, at the first row that differs, where rows are known."""

    run: str
    column: str
    row: str
    before: str
    after: str


def compare(before: Side, after: Side) -> tuple[list[Difference], list[str]]:
    """(differences, what only one side has). A run most of whose columns are gone is a difference: it has not been compared."""
    differences, alone = [], []
    for run, old in before.runs.items():
        if run in after.failed:
            differences.append(Difference(run, "(all)", "", "ran", after.failed[run]))
        elif run not in after.runs:
            alone.append(f"{run}: before only, all of it")
        else:
            new = after.runs[run]
            common = [name for name in old if name in new]
            differences += [difference(run, name, old[name], new[name]) for name in common if old[name][:2] != new[name][:2]]
            if 2 * len(common) <= len(old):
                differences.append(Difference(run, "(all)", "", f"{len(old)} columns", f"{len(common)} of them"))
            alone += [f"{run} {name}: before only" for name in old if name not in new]
            alone += [f"{run} {name}: after only" for name in new if name not in old]
    differences += [Difference(run, "(all)", "", "not there", why) for run, why in after.failed.items() if run not in before.runs]
    return differences, alone + [f"{run}: after only, all of it" for run in after.runs if run not in before.runs]


def difference(run: str, name: str, old: Column, new: Column) -> Difference:
    """Where two columns part."""
    if old.rows != new.rows:
        return Difference(run, name, "", f"{old.rows} rows", f"{new.rows} rows")
    if old.values is not None and new.values is not None:
        at = next(i for i, (a, b) in enumerate(zip(old.values, new.values, strict=True)) if a != b)
        return Difference(run, name, f"{at + 1} of {old.rows}", old.values[at], new.values[at])
    if old.last != new.last:
        return Difference(run, name, f"last of {old.rows}", old.last, new.last)
    return Difference(run, name, f"before {old.rows}", f"hash {old.digest}", f"hash {new.digest}")


def other_conditions(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What numbers depend on besides the code, where both sides tell it and it is not the same."""
    told = [name for name in CONDITIONS if name in before and name in after]
    return [f"{name}: {before[name]} before, {after[name]} after" for name in told if before[name] != after[name]]
