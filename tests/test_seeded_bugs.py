"""Tests that bite: each bug of the catalogue, planted into a copy of the package, is killed by the test that is named beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
from seeded_bugs import Bug, assert_killed, cases

from benchmarks import planted


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.copy(tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("bug", cases(scale=False))
def test_the_named_test_kills_the_bug(bug: Bug, copy: Path) -> None:
    assert_killed(bug, copy)
