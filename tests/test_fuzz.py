"""A sample of 500 of the bad inputs of `python -m benchmarks.fuzz`, others than its own: each is one line and exit code 2."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import one_thread  # noqa: F401  (a fixture)

from benchmarks.fuzz import KINDS, drawn, good_run, keep_parser, outcomes, tally
from benchmarks.fuzz_inputs import Case, train
from tppo_ref.runs import parsing

pytestmark = pytest.mark.usefixtures("one_thread")

SAMPLE = {"configuration": 200, "yaml": 120, "prompts": 90, "models": 50, "checkpoints": 25, "verifiers": 15}
UNSEEN = 10_000  # batches from here on are no benchmark's


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parsing, "_parser", parsing._parser)  # as it was, afterwards
        keep_parser()
        folder = tmp_path_factory.mktemp("good")
        good_run(folder)
        yield folder / "good"


def test_the_sample_is_of_all_kinds_and_of_500():
    assert SAMPLE.keys() == KINDS.keys()
    assert sum(SAMPLE.values()) == 500


@pytest.mark.parametrize("kind", SAMPLE)
def test_bad_inputs_are_refused_in_one_line(kind, good):
    told: list[str] = []
    row = tally(kind, UNSEEN, SAMPLE[kind], good, told.append)
    assert (row["refused"], told) == (SAMPLE[kind], [])


def test_a_batch_is_the_same_each_time_and_another_one_is_other():
    one, again, other = drawn("prompts", 3, 20), drawn("prompts", 3, 20), drawn("prompts", 4, 20)
    assert one == again != other


def test_what_is_no_refusal_is_seen(good, monkeypatch):
    """A good input is accepted; one that raises, hangs or ends the process is told as that, and the next one is tried."""
    import tppo_ref.__main__ as command

    behaviour = {"raise": lambda: 1 / 0, "hang": lambda: __import__("time").sleep(60), "die": lambda: __import__("os")._exit(3)}
    right = command.main
    monkeypatch.setattr(command, "main", lambda argv: behaviour.get(argv[-1], lambda: right(argv))())
    monkeypatch.setattr("benchmarks.fuzz.LIMIT_S", 8.0)
    cases = [train(), *(train(word) for word in behaviour), Case(("train", "--run.steps", "0"))]
    assert [ended for _, ended, _ in outcomes(cases, good)] == ["accepted", "traceback", "hang", "traceback", "refused"]


def test_the_results_page_says_what_the_committed_run_found():
    """All that were drawn were refused, or the page would have to say which were not."""
    folder = Path(__file__).resolve().parents[1] / "benchmarks"
    with (folder / "results" / "fuzz.csv").open() as file:
        rows = list(csv.DictReader(file))
    total = sum(int(row["inputs"]) for row in rows)
    assert sum(int(row["refused"]) for row in rows) == total
    (line,) = [line for line in (folder / "RESULTS.md").read_text().splitlines() if "`python -m benchmarks.fuzz`" in line]
    assert f"| {total:,} bad inputs of {len({row['kind'] for row in rows})} kinds: all refused" in line
    assert f"5,000: {'met' if total >= 5000 else 'missed'}" in line
