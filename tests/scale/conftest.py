"""The checkout on the path, ahead of tests/: a folder there is named scale too. Behind it tests/, for the catalogue of planted bugs."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
if str(ROOT / "tests") not in sys.path:
    sys.path.append(str(ROOT / "tests"))
pytest.register_assert_rewrite("scale_helpers")


@pytest.fixture(scope="session")
def problems(tmp_path_factory):
    from scale_helpers import make_problems

    return make_problems(tmp_path_factory.mktemp("problems") / "problems.jsonl")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    from scale_helpers import make_model

    return make_model(tmp_path_factory.mktemp("models") / "policy", tied=False)


@pytest.fixture(scope="session")
def needs_vllm():
    """Skips a test in plain words where vLLM is missing; fails it where CI_SCALE=1 says that it must be there."""
    if importlib.util.find_spec("vllm") is None:
        if os.environ.get("CI_SCALE") == "1":
            pytest.fail("CI_SCALE=1, and vllm is not installed", pytrace=False)
        pytest.skip("vllm is not installed: these runs decode with it")
