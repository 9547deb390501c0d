"""benchmarks/levers.py: the page is the committed tables' and every lever's fields can run."""

from __future__ import annotations

from benchmarks.levers import LEVERS, PAGE, page, rows_of
from sim.clock.methods import method
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.validation import check, check_training


def test_the_page_is_made_of_the_committed_tables():
    assert PAGE.read_text() == page()


def test_every_lever_is_measured_has_a_name_for_the_clock_and_can_run():
    for table in ("levers", "levers_vllm"):
        assert [row["lever"] for row in rows_of(table)] == list(LEVERS)
    for name, (_, fields) in LEVERS.items():
        method(name)
        config = replace_fields(Config(), fields)
        check(config)
        check_training(config)
