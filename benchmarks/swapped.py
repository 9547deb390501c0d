"""Tests in forks of a process that has collected them, each with the functions of one module replaced by a mutant's.

Importing the packages and collecting the tests takes seconds, and the test that kills a mutant takes milliseconds: so both are done
once, and each fork gets its mutant by an assignment to `__code__`. What runs at import (defaults, classes, constants) cannot be
replaced so.
"""

from __future__ import annotations

import ast
import functools
import importlib
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
from _pytest.runner import runtestprotocol

UNPLANTED = "the mutant could not be planted"


class Result(NamedTuple):
    """failed: the first test that failed, "" where all passed; None: time ran out."""

    failed: str | None
    seconds: float


def in_function(text: str, line: int) -> bool:
    """Whether `line` is in the body of a function."""
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
    return any(node.body[0].lineno <= line <= (node.end_lineno or 0) for node in functions)


def swap(module_name: str, text: str) -> None:
    """The functions and methods of an imported module get their code from `text`; LookupError where that changes none."""
    module = importlib.import_module(module_name)
    changed = 0
    for path, code in _codes(compile(text, module.__file__ or "", "exec")):
        function = _function(module, path)
        if function is not None and function.__code__ != code:
            function.__code__ = code
            changed += 1
    if not changed:
        raise LookupError(f"no function of {module_name} is changed")


def _codes(code: types.CodeType, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], types.CodeType]]:
    """Code of functions and methods by its path of names; that of nested ones is part of it."""
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType) and not inner.co_name.startswith("<"):
            is_class = not inner.co_flags & 0x0002  # CO_NEWLOCALS
            yield from _codes(inner, (*path, inner.co_name)) if is_class else [((*path, inner.co_name), inner)]


def _function(module: types.ModuleType, path: Sequence[str]) -> types.FunctionType | None:
    found: Any = module
    for name in path:
        found = vars(found).get(name)
        if found is None:
            return None
    if isinstance(found, property):
        found = found.fget
    if isinstance(found, functools.cached_property):
        found = found.func
    while hasattr(found, "__wrapped__") or hasattr(found, "__func__"):
        found = getattr(found, "__wrapped__", None) or found.__func__
    return found if isinstance(found, types.FunctionType) else None


class Loop:
    """pytest plugin: collects, and then hands `trial` to `body` instead of running the tests."""

    def __init__(self, body: Callable[[Loop], None]) -> None:
        self.body, self.items = body, dict[str, Any]()

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        self.body(self)
        return True

    def trial(self, module: str, text: str, tests: Sequence[str], limit: float) -> Result:
        """The tests in that order, until one fails, in a fork in which `module` is as `text` has it."""
        begin = time.monotonic()
        read, write = os.pipe()
        child = os.fork()
        if not child:
            self._child(write, module, text, tests)
        os.close(write)
        ended = False
        while not ended and time.monotonic() - begin < limit:
            time.sleep(0.005)
            ended = os.waitpid(child, os.WNOHANG)[0] == child
        if not ended:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        with os.fdopen(read) as pipe:
            said = pipe.read()
        return Result(said.removesuffix("\n") if said else "the process died" if ended else None, time.monotonic() - begin)

    def _child(self, write: int, module: str, text: str, tests: Sequence[str]) -> None:
        said = UNPLANTED
        try:
            os.setsid()
            nothing = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(nothing, stream)
            swap(module, text)
            said = "pytest broke"
            said = self._first_failure([self.items[test] for test in tests])
        finally:
            os.write(write, f"{said}\n".encode())
            os._exit(0)

    @staticmethod
    def _first_failure(items: Sequence[Any]) -> str:
        for item, following in zip(items, [*items[1:], None], strict=True):
            if any(report.failed for report in runtestprotocol(item, nextitem=following, log=False)):
                return item.nodeid
        return ""


def collected(files: Sequence[str], basetemp: str, body: Callable[[Loop], None]) -> None:
    """pytest collects `files` in the working directory; then `body` runs."""
    sys.path.insert(0, os.getcwd())
    absent = [word for plugin in ("cacheprovider", "warnings", "faulthandler", "xdist") for word in ("-p", f"no:{plugin}")]
    arguments = ["-q", "-s", *absent, "--basetemp", basetemp]
    code = pytest.main([*arguments, *files], plugins=[Loop(body)])
    if code:
        raise SystemExit(f"pytest ended with {code!r}")
