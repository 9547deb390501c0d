"""The generated pages of docs/: `python -m tppo_ref.runs.docs_pages` writes them, a test holds them equal to the code."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import docstring_parser

from tppo_ref.loop.bounds import bounds_of
from tppo_ref.runs.config import GROUP, GROUP_SIZE, METHODS, WHOLE, WINDOW, Config
from tppo_ref.runs.glossary import GLOSSARY, Metric

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


SAID = {
    WHOLE: "(that of rollout.max_response_tokens)",
    WINDOW: "(that of rollout.window)",
    GROUP: f"(as given; {GROUP_SIZE} where that is 1)",
}
"""What a method fixes at another field's value."""


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


def markdown_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """A table of a page, whichever page it is."""
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in (head, ["---"] * len(head), *rows))


def config_markdown() -> str:
    """Every field with its default, its meaning and where the default comes from: docs/config.md."""
    head = (
        "# Configuration\n\n"
        "Made by `python -m tppo_ref.runs.docs_pages` from the settings. `--section.field VALUE` gives a field on the command\n"
        "line; in a file (`--config FILE`, YAML or JSON) it stands under its section. Where it says none, type `null`. A cluster\n"
        "has further fields: [cluster.md](cluster.md). Provenance of the defaults:\n\n"
    )
    marks = "".join(f"- [{mark}] {meaning}\n" for mark, meaning in MARKS.items())
    methods = [[f"`{method}`", ", ".join(f"`{path} {SAID.get(value, as_yaml(value))}`" for path, value in fields.items())
                or "none: the defaults"] for method, fields in METHODS.items()]  # fmt: skip
    named = "\n## Named methods\n\n`run.method NAME` fixes these fields; another value that is given for one is refused.\n\n"
    return head + marks + field_tables(Config()) + named + markdown_table(("method", "fields"), methods)


def field_tables(config: Any, without: Sequence[str] = ()) -> str:
    """A heading and a table of fields for each section of a config, but for those left out."""
    names = [section.name for section in dataclasses.fields(config) if section.name not in without]
    return "".join(f"\n## {name}\n\n{field_table(name, getattr(config, name))}" for name in names)


def field_table(name: str, section: Any) -> str:
    """The fields of a section of a config: default, bounds, meaning and mark."""
    types = typing.get_type_hints(type(section), include_extras=True)
    rows = [(f"`{name}.{field}`", f"`{as_yaml(getattr(section, field))}`", _may_be(types[field]), text, f"[{mark}]")
            for field, (text, mark) in field_help(type(section)).items()]  # fmt: skip
    return markdown_table(("field", "default", "may be", "meaning", "from"), rows)


def as_yaml(value: Any) -> str:
    """A value as a command line takes it."""
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def _may_be(hint: Any) -> str:
    """The bounds or the choices of a field, in words."""
    choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    return ", ".join(map(str, choices)) or str(bounds_of(hint) or "")


def metrics_table(glossary: Mapping[str, Metric] = GLOSSARY) -> str:
    """What a run logs under each name."""
    return markdown_table(("metric", "what it is", "over", "unit", "healthy"), [(f"`{name}`", *m) for name, m in glossary.items()])


def metrics_markdown() -> str:
    """The glossary of metrics: docs/metrics.md."""
    head = (
        "# Metrics\n\nMade by `python -m tppo_ref.runs.docs_pages` from tppo_ref/runs/glossary.py. A mean, share or maximum of "
        "nothing (the score of a\nstep in which no response ended, the loss of a step without an update) is NaN, null in "
        "metrics.jsonl; a count of nothing is 0.\n\n"
        "A *row* is a response that sampled a token in the step. It ended with its end token, or at rollout.max_response_tokens\n"
        "(LENGTH_CAP), or it goes on in the next window (RUNNING). The *window's edge* is the step's last decode step.\n\n"
        "FLOPs are the model's (tppo_ref/rollout/flops.py), added up over ranks: P weights of the layers' matrices, n tokens fed,\n"
        "L layers of H heads D wide, s pairs of a token and one that it sees (itself too), W weights of the head, m outputs.\n"
        "With a backward pass three times that; a layer that is computed anew in it counts once. MFU is their share of what\n"
        "the devices promise, dense in bfloat16 (tppo_ref/loop/peaks.py, or run.peak_tflops). Both are null for a mixture\n"
        "of experts.\n\n"
    )
    return head + metrics_table() + "\nAn evaluation on a cluster logs more: [cluster.md](cluster.md#metrics-of-an-evaluation).\n"


def main(docs: Path = Path("docs")) -> None:
    (docs / "config.md").write_text(config_markdown())
    (docs / "metrics.md").write_text(metrics_markdown())


if __name__ == "__main__":
    main()
