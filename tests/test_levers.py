"""benchmarks/levers.py: the page is the committed tables', every lever's fields can run, and the gain by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.levers import LEVERS, PAGE, gain, page, rows_of
from sim.clock.methods import method
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.validation import check, check_training


def test_the_page_is_made_of_the_committed_tables():
    assert PAGE.read_text() == page()


def test_every_lever_is_measured_has_a_name_for_the_clock_and_can_run():
    assert [row["lever"] for row in rows_of("levers")] == list(LEVERS)
    for name, (_, fields) in LEVERS.items():
        method(name)
        config = replace_fields(Config(), fields)
        check(config)
        check_training(config)


def test_the_gain_by_hand():
    found = gain(np.array([2.0, 8.0]))  # logs ln 2 and ln 8: mean ln 4, deviation ln 4 / sqrt 2, t of one degree 12.706
    assert found["gain"] == pytest.approx(4)
    assert math.log(found["high"] / 4) == pytest.approx(12.7062 * math.log(4) / 2, rel=1e-4)
    assert found["low"] * found["high"] == pytest.approx(16)
