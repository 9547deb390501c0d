"""docs/cluster.md, the fields of a cluster's config: `python -m scale.docs_pages` writes it, a test holds it equal to the code."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from scale.config import CANCELLED, FIXED_ON_RESUME, IMPOSSIBLE, ScaleConfig
from scale.evaluate import GLOSSARY
from tppo_ref.runs.docs_pages import field_tables, markdown_table, metrics_table
from tppo_ref.runs.parsing import field_paths

HEAD = """# Configuration of a cluster

Made by `python -m scale.docs_pages` from scale/config.py. Every field of [config.md](config.md) stands here under `algo.`
(`--algo.policy.lr 8e-7`), but for those that [are refused](#refused-on-a-cluster); the sections below are beside it. Marks of the
defaults as there. Files to begin from: `scale/configs/`; the way to a running job: [scale.md](scale.md).
"""


def cluster_markdown() -> str:
    """Every field that only a cluster has, what is refused, what a resume may change, its own metrics: docs/cluster.md."""
    cancelled = [(_names([c.field for c in CANCELLED if c.why == why]), why) for why in dict.fromkeys(c.why for c in CANCELLED)]
    impossible = [(f"`{r.field}`", _plain(r.expected) + (f"; {_plain(r.remedy)}" if r.remedy else "")) for r in IMPOSSIBLE]
    return (
        HEAD + field_tables(ScaleConfig(), without=["algo"])
        + "\n## Refused on a cluster\n\nBeside what a laptop refuses. In one line, with exit code 2, before anything is loaded.\n\n"
        + markdown_table(("field", "where it is given and does nothing"), cancelled)
        + "\n" + markdown_table(("field", "expected"), impossible)
        + "\n## What a resume may change\n\n"
        + _names([path for path in field_paths(ScaleConfig) if path not in FIXED_ON_RESUME])
        + ".\n\nEverything else says what is computed: another value than the checkpoint's is refused. `algo.model.policy` and\n"
          "`algo.model.value` may change because folders move: a resume takes the weights of the checkpoint,\n"
          "and ends responses by the tokens with which the run began.\n"
          "\n## Metrics of an evaluation\n\nIt draws k answers to each prompt. All others: [metrics.md](metrics.md).\n\n"
        + metrics_table(GLOSSARY)
    )  # fmt: skip


def _names(paths: Sequence[str]) -> str:
    """Fields by name; those of `algo.compare` as one."""
    return ", ".join(f"`{path}`" for path in dict.fromkeys(re.sub(r"compare\..*", "compare.*", path) for path in paths))


def _plain(text: str) -> str:
    """A refusal's words without places for values; where a field stands by its value alone, its name."""
    return re.sub(r"{([\w.]+)}", r"\1", re.sub(r"([\w.]+) (?:\({\1}\)|{\1})", r"\1", text))


def main(docs: Path = Path("docs")) -> None:
    (docs / "cluster.md").write_text(cluster_markdown())


if __name__ == "__main__":
    main()
