"""The bugs of the catalogue that a test of scale/ kills: these tests need what only `make test-scale` installs."""

from __future__ import annotations

from pathlib import Path

import pytest
from seeded_bugs import Bug, assert_killed, cases


@pytest.mark.parametrize("bug", cases(scale=True))
def test_the_named_test_kills_the_bug_of_scale(bug: Bug, tmp_path: Path) -> None:
    assert_killed(bug, tmp_path)
