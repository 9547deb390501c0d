"""Tests that bite: each bug of the catalogue, planted into a copy of the package, is killed by the test that is named beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
from seeded_bugs import Bug, assert_killed, cases


@pytest.mark.parametrize("bug", cases(scale=False))
def test_the_named_test_kills_the_bug(bug: Bug, tmp_path: Path) -> None:
    assert_killed(bug, tmp_path)
