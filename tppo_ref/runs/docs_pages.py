"""The generated pages of docs/: `python -m tppo_ref.runs.docs_pages` writes them, a test holds them equal to the code."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path

import docstring_parser

from tppo_ref.runs.config import Config
from tppo_ref.runs.glossary import glossary_markdown

MARKS = {
    "S": "stated by the paper (abstract, figure 1, published summary)",
    "P": "read in the authors' public port, an unmerged draft",
    "R": "in the published reviews",
    "V": "another primary source",
    "2": "a secondary source",
    "I": "inferred",
    "M": "measured by us on the built-in tasks",
    "O": "our choice",
}


def field_help(config_class: type) -> dict[str, tuple[str, str]]:
    """Field name -> (help without the mark, provenance mark) of one section. KeyError where a field has no mark."""
    found = {}
    for parameter in docstring_parser.parse_from_object(config_class).params:
        text = " ".join((parameter.description or "").split())
        match = re.fullmatch(r"(.*) \[(.)\]", text)
        if match is None or match.group(2) not in MARKS:
            raise KeyError(f"{config_class.__name__}.{parameter.arg_name}: its help ends in no provenance mark: {text!r}")
        found[parameter.arg_name] = (match.group(1), match.group(2))
    return found


def config_markdown() -> str:
    """Every field with its default, its meaning and where the default comes from: docs/config.md."""
    lines = [
        "# Configuration",
        "",
        "Made by `python -m tppo_ref.runs.docs_pages` from the settings. Provenance of the defaults:",
        "",
    ]
    lines += [f"- [{mark}] {meaning}" for mark, meaning in MARKS.items()]
    hints = typing.get_type_hints(Config)
    for section in dataclasses.fields(Config):
        lines += ["", f"## {section.name}", "", "| field | default | meaning | from |", "| --- | --- | --- | --- |"]
        defaults = getattr(Config(), section.name)
        for name, (text, mark) in field_help(hints[section.name]).items():
            lines.append(f"| `{section.name}.{name}` | `{getattr(defaults, name)}` | {text} | [{mark}] |")
    return "\n".join(lines) + "\n"


def metrics_markdown() -> str:
    """The glossary of metrics: docs/metrics.md."""
    head = (
        "# Metrics\n\nMade by `python -m tppo_ref.runs.docs_pages` from tppo_ref/runs/glossary.py. A mean, share or maximum of "
        "nothing (the score of a\nstep in which no response ended, the loss of a step without an update) is NaN, null in "
        "metrics.jsonl; a count of nothing is 0.\n\n"
    )
    return head + glossary_markdown()


def main(docs: Path = Path("docs")) -> None:
    (docs / "config.md").write_text(config_markdown())
    (docs / "metrics.md").write_text(metrics_markdown())


if __name__ == "__main__":
    main()
