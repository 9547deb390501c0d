"""docs/algorithm.md: twelve sentences, each with a source and the one function that says it; every link is followed."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE, README = (ROOT / "docs" / "algorithm.md").read_text(), (ROOT / "README.md").read_text()
ROW = re.compile(r"^\| (\d+) \| (.+?) \| \[([SPVIO])\] \| \[([\w.]+)\]\(\.\./(tppo_ref/[\w/]+\.py)#([\w.]+)\) \|$", re.MULTILINE)


class Sentence(NamedTuple):
    number: int
    text: str
    mark: str
    shown: str
    file: str
    name: str


def sentences(page: str) -> list[Sentence]:
    return [Sentence(int(number), *rest) for number, *rest in ROW.findall(page)]


def definition(file: str, name: str) -> ast.AST | None:
    """The function, class or method `name` of a file; None where there is none."""
    path = ROOT / file
    if not path.exists():
        return None
    node: ast.AST = ast.parse(path.read_text())
    for part in name.split("."):
        inner = [child for child in getattr(node, "body", []) if getattr(child, "name", None) == part]
        if not inner:
            return None
        (node,) = inner
    return node


def runs_in_the_loop(file: str, name: str) -> bool:
    """In loop/ itself, imported by loop/ or by the batcher that it steps, or called by a function of its file that is."""
    if file.startswith("tppo_ref/loop/"):
        return True
    module = file.removesuffix(".py").replace("/", ".")
    for path in [*(ROOT / "tppo_ref" / "loop").glob("*.py"), ROOT / "tppo_ref" / "rollout" / "batcher.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == module and name in {alias.name for alias in node.names}:
                return True
    callers = [
        node for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef) and node.name != name
    ]
    return any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name and runs_in_the_loop(file, caller.name)
        for caller in callers for node in ast.walk(caller)
    )  # fmt: skip


SENTENCES = sentences(PAGE)


def test_there_are_twelve_sentences_each_with_a_function_of_its_own():
    assert [sentence.number for sentence in SENTENCES] == list(range(1, 13))
    assert len({(sentence.file, sentence.name) for sentence in SENTENCES}) == 12


@pytest.mark.parametrize("sentence", SENTENCES, ids=lambda sentence: sentence.name)
def test_the_function_is_there_says_what_it_is_and_runs_in_the_loop(sentence):
    node = definition(sentence.file, sentence.name)
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    assert ast.get_docstring(node)
    assert sentence.shown == sentence.name
    assert runs_in_the_loop(sentence.file, sentence.name)


def test_the_checkers_see_broken_links():
    assert definition("tppo_ref/method/advantages.py", "egea") is None
    assert definition("tppo_ref/method/gone.py", "egae") is None
    assert definition("tppo_ref/loop/trainer.py", "Trainer.stop") is None
    assert not runs_in_the_loop("tppo_ref/method/recurrence.py", "discounted_sum_by_loop")
    assert sentences("| 1 | EGAE. | [S] | egae |") == sentences("| 1 | EGAE. | | [egae](../tppo_ref/a.py#egae) |") == []


def eight_lines(page: str) -> list[str]:
    (block,) = re.findall(r"```\nevery step:\n(.*?)```", page, re.DOTALL)
    return block.splitlines()


def test_the_readmes_first_screen_states_the_method_in_the_same_eight_lines_and_links_the_page():
    lines = eight_lines(README)
    assert lines == eight_lines(PAGE)
    assert [line[0] for line in lines] == list("12345678")
    first_screen = [line for line in README.splitlines() if not re.fullmatch(r"<!--.*-->", line)][:30]  # comments are not seen
    link = next(i for i, line in enumerate(first_screen) if "(docs/algorithm.md)" in line)
    assert link > first_screen.index(lines[-1])


def test_every_file_that_the_page_links_is_there():
    for target in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
