"""Tests on a changed copy of the sources, each in a child forked from a process that holds what is slow to import and none of ours.

copy     of what the tests need of this checkout
planted  one file of a copy has another text for a while
run      pytest on a copy -> Outcome; at its time limit the child dies with all that it has started
Chosen   pytest plugin: only these tests, in this order
Traced   pytest plugin: which test reaches which line, and how long each test takes
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOUSES = ("tppo_ref", "sim", "scale")
SLOW = [
    "torch", "torch.distributed.tensor", "transformers", "numpy", "scipy.stats", "scipy.optimize", "gymnasium", "matplotlib.pyplot",
    "jsonargparse", "yaml", "safetensors.torch", "tqdm", "pytest", "hypothesis", "_hypothesis_pytestplugin",
]  # fmt: skip
QUIET = ("-x", "-q", "-p", "no:cacheprovider", "-p", "_hypothesis_pytestplugin")


_PLANTED = itertools.count(1)


class Outcome(NamedTuple):
    """How pytest ended: its exit code (negative: a signal), None where time ran out; what it printed; seconds."""

    code: int | None
    output: str
    seconds: float

    @property
    def failed(self) -> list[str]:
        """The tests, or files, that failed or broke, as pytest's summary names them."""
        return re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", self.output, re.MULTILINE)


class Chosen:
    """Runs only the tests named, in that order."""

    def __init__(self, nodeids: Sequence[str]) -> None:
        self.rank = {nodeid: i for i, nodeid in enumerate(nodeids)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = sorted((item for item in items if item.nodeid in self.rank), key=lambda item: self.rank[item.nodeid])


class Traced:
    """Writes {"seconds": test -> s, "reached": file -> line -> tests} to `path` as JSON.

    What a fixture reaches counts for every test of its file (its name, as a test): some are made for the first test only.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.seconds = path, {}

    def pytest_sessionstart(self) -> None:
        import coverage

        self.root = Path.cwd()
        inside = [f"{self.root}/{house}/*" for house in HOUSES]
        self.coverage = coverage.Coverage(data_file=None, config_file=False, include=inside)
        self.coverage.start()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: Any) -> None:
        self.coverage.switch_context(item.nodeid.partition("::")[0])

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_call(self, item: Any) -> None:
        self.coverage.switch_context(item.nodeid)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_teardown(self, item: Any) -> None:
        self.coverage.switch_context(item.nodeid.partition("::")[0])

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    def pytest_sessionfinish(self) -> None:
        import json

        self.coverage.stop()
        data = self.coverage.get_data()
        reached = {str(Path(file).relative_to(self.root)): data.contexts_by_lineno(file) for file in data.measured_files()}
        self.path.write_text(json.dumps({"seconds": self.seconds, "reached": reached}))


def copy(folder: Path) -> Path:
    """The checkout without what git ignores and without its history, as folder/copy."""

    def ignored(inside: str, names: list[str]) -> set[str]:
        at_root = {"runs", "build", "dist"} if Path(inside) == ROOT else set()
        return {n for n in names if n in at_root or n.startswith(".") or n == "__pycache__" or n.endswith(".egg-info")}

    return Path(shutil.copytree(ROOT, folder / "copy", ignore=ignored))


@contextlib.contextmanager
def planted(root: Path, file: str, text: str) -> Iterator[None]:
    """`text` stands in root/file while the block runs."""
    target = root / file
    before, stat = target.read_text(), target.stat()
    target.write_text(text)
    time_s = next(_PLANTED)  # a time of its own: Python takes the compiled file of no text for another's
    os.utime(target, (time_s, time_s))
    try:
        yield
    finally:
        target.write_text(before)
        os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def fork_server() -> ForkServerContext:
    """The process that children are forked from; it is started by the first child and ends with this process."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW)
    return context


def run(root: Path, arguments: Sequence[str], limit: float, plugins: Sequence[object] = ()) -> Outcome:
    """pytest with `arguments` in `root`, whose packages and tests are imported rather than this checkout's.

    limit: seconds, after which the child is killed together with the processes that it has started.
    """
    with tempfile.NamedTemporaryFile() as file:
        child = fork_server().Process(target=_child, args=(root, tuple(arguments), file.name, tuple(plugins)))
        begin = time.monotonic()
        child.start()
        child.join(limit)
        code = child.exitcode
        with contextlib.suppress(ProcessLookupError):  # what it has started may outlive it
            os.killpg(child.pid, signal.SIGKILL)
        if child.is_alive():
            child.kill()
        child.join()
        return Outcome(code, Path(file.name).read_text(errors="replace"), time.monotonic() - begin)


def _child(root: Path, arguments: tuple[str, ...], output: str, plugins: tuple[object, ...]) -> None:
    os.setsid()
    gc.freeze()  # pytest collects garbage as it ends: not through everything that torch has
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    ours = sorted(name for name in sys.modules if name.partition(".")[0] in HOUSES)
    assert not ours, f"imported before the copy was there: {ours}"
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        del os.environ[name]
    os.chdir(root)
    os.environ |= {
        "PYTHONPATH": str(root),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }  # looking for plugins takes longer than most tests
    sys.path.insert(0, str(root))
    sys.exit(int(pytest.main([*QUIET, *arguments], plugins=list(plugins))))
