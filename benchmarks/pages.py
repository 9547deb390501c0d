"""The numbers of docs/throughput.md and docs/scale.md are those of the committed tables: writes them, by the note beside each.

    python -m benchmarks.pages            after `python -m sim throughput --out benchmarks/results` or another table changed
    python -m benchmarks.pages --check    says what would change, and exits with 1 if anything does

A note is `<!-- TABLE "ROW" COLUMN SPEC -->` behind a number: the first row of that key, and how it is printed: as .2f says, % for
a share in per cent, s for the text itself, range for `1.14x (1.06 to 1.22)` from COLUMN, COLUMN_low and COLUMN_high.
"""

from __future__ import annotations

import argparse
import csv
import functools
import re
import sys
from pathlib import Path

from benchmarks.common import RESULTS
from sim.clock.ranges import Range

PAGE = Path(__file__).resolve().parents[1] / "docs" / "throughput.md"
PAGES = (PAGE, PAGE.with_name("scale.md"))
NOTE = re.compile(r"(\d+\.\d+x \(\d+\.\d+ to \d+\.\d+\)|[-+]?[\d.,]+(?: %)?)(<!-- (\w+) \"([^\"]+)\" (\w+) (\S+) -->)")


@functools.cache
def committed(name: str) -> tuple[dict[str, str], ...]:
    """A table's rows. In literature `nth` is empty for a setup's first assumption, then #2, #3, ..."""
    file = name if name in ("literature", "plans", "reality") else f"throughput_{name}"
    with (RESULTS / f"{file}.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    if name == "literature":
        for at, row in enumerate(rows):
            before = sum((other["setup"], other["quantity"]) == (row["setup"], row["quantity"]) for other in rows[:at])
            row["nth"] = f"#{before + 1}" if before else ""
    return tuple(rows)


def key(name: str, row: dict[str, str]) -> str:
    """What a note calls a row of table `name`."""
    if name == "methods":
        return f"{row['what']}/{row['system']}"
    if name == "plans":
        return f"{row['what']}/{row['method']}"
    if name == "reality":
        return f"{row['run']}/{row['quantity']}"
    return f"{row['setup']}/{row['quantity']}{row['nth']}" if name == "literature" else row["what"]


def written(row: dict[str, str], column: str, spec: str) -> str:
    """A number of the table as the page prints it."""
    if spec == "range":
        low, middle, high = (float(row[f"{column}{end}"]) for end in ("_low", "", "_high"))
        return Range(low, middle, high).text()
    value = row[column]
    return value if spec == "s" else f"{100 * float(value):.0f}" if spec == "%" else format(float(value), spec)


def number(name: str, what: str, column: str, spec: str) -> str:
    """What a note stands for. KeyError for a row or column that its table does not have."""
    row = next((row for row in committed(name) if key(name, row) == what), None)
    if row is None:
        raise KeyError(f'{name} "{what}": no such row')
    return written(row, column, spec)


def filled(text: str) -> str:
    """The page with every number written anew."""
    return NOTE.sub(lambda match: number(*match.group(3, 4, 5, 6)) + match[2], text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check, total = parser.parse_args().check, 0
    for page in PAGES:
        before = page.read_text()
        after = filled(before)
        stale = sum(a != b for a, b in zip(before.splitlines(), after.splitlines(), strict=True))
        print(f"{page.name}: {len(NOTE.findall(after))} numbers, {stale} lines {'are stale' if check else 'rewritten'}")
        total += stale
        if not check:
            page.write_text(after)
    sys.exit(1 if check and total else 0)


if __name__ == "__main__":
    main()
