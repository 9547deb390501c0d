"""Planting, and the children that test what is planted: a copy's own packages, a time limit that holds, nothing left behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks import planted


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A package of the name of ours with one number in it, and a test of that number."""
    (tmp_path / "tppo_ref").mkdir()
    (tmp_path / "tppo_ref" / "__init__.py").write_text("number = 1\n")
    (tmp_path / "test_it.py").write_text("def test_number():\n    import tppo_ref\n    assert tppo_ref.number == 1\n")
    return tmp_path


def test_a_child_sees_what_is_planted_while_it_is_planted(root):
    assert planted.run(root, ["test_it.py"], limit=60).code == 0
    with planted.planted(root, "tppo_ref/__init__.py", "number = 2\n"):
        outcome = planted.run(root, ["test_it.py"], limit=60)
    assert (outcome.code, outcome.failed) == (1, ["test_it.py::test_number"])
    assert planted.run(root, ["test_it.py"], limit=60).code == 0, "another text's compiled file was taken"
    assert (root / "tppo_ref" / "__init__.py").read_text() == "number = 1\n"


def test_at_the_time_limit_a_child_dies_with_what_it_has_started(root):
    (root / "test_it.py").write_text(
        "import pathlib, subprocess, time\n\ndef test_number():\n    child = subprocess.Popen(['sleep', '600'])\n"
        "    pathlib.Path('pid').write_text(str(child.pid))\n    time.sleep(600)\n"
    )
    outcome = planted.run(root, ["test_it.py"], limit=20)
    assert outcome.code is None
    pid, deadline = int((root / "pid").read_text()), time.monotonic() + 30
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and whom nobody has asked for its exit code does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_only_the_chosen_tests_run_in_their_order(root):
    (root / "test_it.py").write_text("\n\n".join(f"def test_{i}():\n    print('ran', {i})" for i in range(4)))
    outcome = planted.run(root, ["-s", "test_it.py"], 60, [planted.Chosen(["test_it.py::test_3", "test_it.py::test_1"])])
    assert [line.rpartition(" ")[2].rstrip(".") for line in outcome.output.splitlines() if "ran" in line] == ["3", "1"]
