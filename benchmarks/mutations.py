"""The mutants that mutmut makes of a file. Planted whole, so that mutmut's own runner, and what it forbids, are not needed."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import libcst as cst
from mutmut.mutation.file_mutation import MutationVisitor, deep_replace
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import IgnoredCode


class Mutant(NamedTuple):
    """`text` is the whole of `file` with one change, which shows in `line` (from 1): `before`, `after`."""

    file: str
    number: int
    line: int
    before: str
    after: str
    text: str


class _Visitor(MutationVisitor):
    """mutmut leaves decorated functions out, as it cannot wrap them; a planted file needs no wrapping."""

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        return not isinstance(node, cst.FunctionDef) and super()._skip_node_and_children(node)


def _only_text(original: cst.CSTNode, mutated: cst.CSTNode) -> bool:
    """A change of prose, or of a word's case: of each name and key the one mutant "XXnameXX" stays."""
    if not isinstance(original, cst.SimpleString) or not isinstance(mutated, cst.SimpleString):
        return False
    return " " in original.value or f"XX{original.raw_value}XX" != mutated.raw_value


class Mutations:
    """All mutants of one file, made one at a time."""

    def __init__(self, root: Path, file: str) -> None:
        self.file, self.text = file, (root / file).read_text()
        wrapper = cst.MetadataWrapper(cst.parse_module(self.text))
        visitor = _Visitor(mutation_operators, IgnoredCode(set(), set(), set()), None)
        self.module = wrapper.visit(visitor)
        self.found = [m for m in visitor.mutations if not _only_text(m.original_node, m.mutated_node)]

    def __len__(self) -> int:
        return len(self.found)

    def __getitem__(self, number: int) -> Mutant:
        mutation = self.found[number]
        changed = deep_replace(self.module, mutation.original_node, mutation.mutated_node)
        assert isinstance(changed, cst.Module)
        old, new = self.text.splitlines(), changed.code.splitlines()
        first = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        last = next((i for i, (a, b) in enumerate(zip(old[::-1], new[::-1], strict=False)) if a != b), 0)
        last = min(last, len(old) - first - 1, len(new) - first - 1)
        before, after = (" ".join(line.strip() for line in lines[first : len(lines) - last]) for lines in (old, new))
        return Mutant(self.file, number, first + 1, before, after, changed.code)


def lines_of_statement(text: str, line: int) -> range:
    """The lines of the innermost statement at `line`; of one with a body its head only."""
    found = range(line, line + 1)
    for node in _statements(ast.parse(text)):
        body = getattr(node, "body", None)
        stop = body[0].lineno if body else node.end_lineno + 1
        if node.lineno <= line < stop:
            found = range(node.lineno, stop)
    return found


def _statements(tree: ast.AST) -> Iterator[ast.stmt]:
    """Outer ones first."""
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt):
            yield node
