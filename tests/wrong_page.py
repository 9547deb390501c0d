"""docs/wrong.md: puts each story's code and test there, from the catalogue of planted bugs.

python tests/wrong_page.py        after a bug of the page was renewed
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from seeded_bugs import BUGS, Bug  # noqa: E402

PAGE = Path(__file__).resolve().parents[1] / "docs" / "wrong.md"
STORY = re.compile(r"^### (.+?)\n(.*?)^```diff\n.*?^```\n\n[^\n]*\n", flags=re.MULTILINE | re.DOTALL)
BY_NAME = {bug.what: bug for bug in BUGS}


def where(bug: Bug) -> str:
    """The function, with its class, in which the bug's line stands."""
    source = (PAGE.parents[1] / bug.file).read_text()
    line = source[: source.index(bug.before)].count("\n") + 1
    names = [(node.lineno, node.name) for node in ast.walk(ast.parse(source))
             if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.lineno <= line <= (node.end_lineno or 0)]  # fmt: skip
    return ".".join(name for _, name in sorted(names))


def evidence(bug: Bug) -> str:
    """What is right and what is wrong as a diff, where it stands, and the test that tells them apart."""
    lines = [
        f"{sign} {line}" for sign, text in (("-", bug.before), ("+", bug.after)) for line in text.strip("\n").splitlines() or [""]
    ]
    file, test = bug.test.split("::")
    return (
        "```diff\n"
        + "\n".join(lines)
        + f"\n```\n\n`{where(bug)}` in [{bug.file}](../{bug.file}); killed by `{test}` in [{file}](../tests/{file})\n"
    )


def rewrite(page: str) -> str:
    """The page with every story's evidence as the catalogue has it now. KeyError for a story that the catalogue does not know."""
    return STORY.sub(lambda m: f"### {m[1]}\n{m[2]}{evidence(BY_NAME[m[1]])}", page)


if __name__ == "__main__":
    PAGE.write_text(rewrite(PAGE.read_text()))
