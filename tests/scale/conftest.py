"""The checkout on the path, ahead of tests/: a folder there is named scale too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def problems(tmp_path_factory):
    from scale_helpers import make_problems

    return make_problems(tmp_path_factory.mktemp("problems") / "problems.jsonl")


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    from scale_helpers import make_model

    return make_model(tmp_path_factory.mktemp("models") / "policy", tied=False)
