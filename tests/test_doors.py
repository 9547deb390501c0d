"""`from tppo_ref import gae, ...`: each name comes from its room, when it is asked for, and brings no more than it needs."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tppo_ref

ROOT = Path(__file__).resolve().parents[1]
SLOW = ("torch", "transformers", "jsonargparse", "matplotlib", "scipy")
PURE = [name for name in tppo_ref.__all__ if name != "Trainer"]


def imported_by(code: str) -> list[str]:
    """Which of the slow packages a fresh process has imported after `code`."""
    probe = f"{code}\nimport json, sys; print(json.dumps([name for name in {SLOW!r} if name in sys.modules]))"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_doors_are_those_that_are_promised():
    promised = {"gae", "egae", "monte_carlo_returns", "length_adaptive_lambda", "policy_token_mask", "value_token_mask", "policy_loss",
                "value_loss", "SlotSchedule", "Trainer"}  # fmt: skip
    assert set(tppo_ref.__all__) == promised
    assert promised <= set(dir(tppo_ref))


@pytest.mark.parametrize("name", tppo_ref.__all__)
def test_a_door_opens_to_the_thing_itself(name):
    thing = getattr(tppo_ref, name)
    assert getattr(importlib.import_module(thing.__module__), name) is thing
    assert thing.__module__.startswith("tppo_ref.")


def test_type_checkers_see_the_names_that_python_gives():
    """Under TYPE_CHECKING each name is imported from the very room that `__getattr__` looks in."""
    tree = ast.parse((ROOT / "tppo_ref" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == {name: getattr(tppo_ref, name).__module__ for name in tppo_ref.__all__}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'tppo_ref' has no attribute 'vtrace'"):
        tppo_ref.vtrace  # noqa: B018
    with pytest.raises(ImportError, match="vtrace"):
        exec("from tppo_ref import vtrace")


def test_importing_the_package_imports_neither_torch_nor_transformers():
    assert imported_by("import tppo_ref; dir(tppo_ref); tppo_ref.__version__") == []


def test_the_pure_functions_import_no_transformers():
    assert imported_by(f"from tppo_ref import {', '.join(PURE)}") == ["torch"]


def test_the_schedule_needs_no_torch():
    """Integers: the clock counts with it."""
    assert imported_by("from tppo_ref import SlotSchedule") == []
