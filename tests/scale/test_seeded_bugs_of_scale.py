"""The bugs of the catalogue that a test of scale/ kills: these tests need what only `make test-scale` installs."""

from __future__ import annotations

from pathlib import Path

import pytest
from seeded_bugs import Bug, assert_killed, cases

from benchmarks import planted


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted.copy(tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("bug", cases(scale=True))
def test_the_named_test_kills_the_bug_of_scale(bug: Bug, copy: Path) -> None:
    assert_killed(bug, copy)
