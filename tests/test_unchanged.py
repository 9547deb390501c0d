"""The check that a re-arrangement changed no number finds one bit, and is not disturbed by a clock."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks import unchanged
from benchmarks.columns import Column, Side, canonical, collect, compare, load, numbers_of_prose, store
from benchmarks.unchanged import RUNS, STORED, Run

LOSSES = (0.1, -0.25, 3.0, 1e-9)


def one_bit_more(x: float) -> float:
    return math.nextafter(x, math.inf)


def written(folder: Path, *, losses=LOSSES, seconds=1.0, scores=(1.0, -1.0), weights=(0.5, 0.25), extra=None) -> Path:
    """A run's folder as `tppo_ref train` leaves it, small."""
    folder.mkdir(parents=True)
    clock = {"time/step_s": seconds, "rollout/tokens_per_s": 7 / seconds, "rollout/idle_s": seconds, "eval/time_s": seconds}
    records = [{"step": i, "policy/loss": x, **clock, **(extra or {})} for i, x in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = [f"{i},{seconds},END_TOKEN,{score}" for i, score in enumerate(scores)]
    (folder / "responses.csv").write_text("\n".join(["step,train_s,end,score", *rows]) + "\n")
    (folder / "policy").mkdir()
    save_file({"w": np.array(weights, dtype=np.float32)}, folder / "policy" / "model.safetensors")
    return folder


def side(folder: Path, **changes) -> Side:
    return Side({"tppo": collect(written(folder, **changes), timed=True)}, {}, {})


CHANGES = {
    "an early record": ({"losses": (0.1, one_bit_more(-0.25), 3.0, 1e-9)}, "metrics.jsonl:policy/loss", "2 of 4"),
    "the last record": ({"losses": (0.1, -0.25, 3.0, one_bit_more(1e-9))}, "metrics.jsonl:policy/loss", "4 of 4"),
    "an undefined metric": ({"losses": (0.1, None, 3.0, 1e-9)}, "metrics.jsonl:policy/loss", "2 of 4"),
    "a response": ({"scores": (1.0, one_bit_more(-1.0))}, "responses.csv:score", "2 of 2"),
    "a weight": ({"weights": (0.5, np.nextafter(np.float32(0.25), np.float32(1)))}, "policy/model.safetensors:tensors", "1 of 1"),
}  # fmt: skip


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(("changes", "column", "row"), CHANGES.values(), ids=CHANGES)
def test_one_bit_is_found(tmp_path, changes, column, row, stored):
    before, after = side(tmp_path / "before"), side(tmp_path / "after", **changes)
    if stored:
        store(before, tmp_path / "stored")
        before = load(tmp_path / "stored")
    (found,), alone = compare(before, after)
    assert (found.run, found.column, alone) == ("tppo", column, [])
    assert found.before != found.after
    assert stored or found.row == row


@pytest.mark.parametrize("stored", [False, True])
def test_equal_runs_at_other_speeds_are_equal(tmp_path, stored):
    before, after = side(tmp_path / "before", seconds=1.0), side(tmp_path / "after", seconds=2.5)
    if stored:
        store(before, tmp_path / "stored")
        before = load(tmp_path / "stored")
    assert compare(before, after) == ([], [])
    assert set(before.runs["tppo"]) == {
        "metrics.jsonl:step", "metrics.jsonl:policy/loss", "responses.csv:step", "responses.csv:end", "responses.csv:score",
        "policy/model.safetensors:tensors",
    }  # fmt: skip


def test_seconds_that_were_computed_are_compared(tmp_path):
    """The clock's tables are in seconds; nothing measured them."""
    (tmp_path / "throughput_slots.csv").write_text("what,step_s\nx,2.5\n")
    assert set(collect(tmp_path, '{"seconds": [{"step_s": 2.5}]}', timed=False)) == {
        "throughput_slots.csv:what", "throughput_slots.csv:step_s", "stdout:seconds.step_s",
    }  # fmt: skip


def test_a_step_less_is_found(tmp_path):
    differences, _ = compare(side(tmp_path / "before"), side(tmp_path / "after", losses=LOSSES[:3]))
    assert {d.column for d in differences} == {"metrics.jsonl:step", "metrics.jsonl:policy/loss"}
    assert {(d.before, d.after) for d in differences} == {("4 rows", "3 rows")}


def test_a_name_that_one_side_has_is_listed_and_fails_nothing(tmp_path):
    before, after = side(tmp_path / "before", extra={"policy/old": 1}), side(tmp_path / "after", extra={"policy/new": 1})
    differences, alone = compare(before, after)
    assert differences == []
    assert alone == ["tppo metrics.jsonl:policy/old: before only", "tppo metrics.jsonl:policy/new: after only"]


def test_a_run_whose_columns_are_mostly_gone_has_not_been_compared(tmp_path):
    before, after = side(tmp_path / "before"), side(tmp_path / "after")
    after.runs["tppo"] = {name: c for name, c in after.runs["tppo"].items() if name.endswith("step")}
    (found,), _ = compare(before, after)
    assert (found.before, found.after) == ("6 columns", "2 of them")


@pytest.mark.parametrize(("a", "b", "equal"), [
    (3, 3.0, True), ("3", 3.0, True), (0.1, 0.1 + 2**-58, True), (0.1, one_bit_more(0.1), False), (0.0, -0.0, False),
    (2**53, 2**53 + 1, False), ("END_TOKEN", "LENGTH_CAP", False), (None, "", True), (None, 0, False), (True, False, False),
])  # fmt: skip
def test_cells_are_equal_as_numbers(a, b, equal):
    assert (canonical(a) == canonical(b)) is equal


def test_prose_may_be_reworded_but_not_its_numbers():
    said = numbers_of_prose("a window of 4,096 tokens keeps 97.5 %.")
    assert said == numbers_of_prose("97.5 is not first: 4,096, then 97.5").removeprefix("97.5 ")
    assert said != numbers_of_prose("a window of 4,096 tokens keeps 97.4 %.")
    assert numbers_of_prose("END_TOKEN") == "END_TOKEN"


# ------------------------------------------------------------------------------------- through the door, on checkouts made of straw

PROGRAM = """
import json, os, sys, time
from pathlib import Path
if "--old" in sys.argv and {refuses_old}:
    sys.exit(2)
if "--broken" in sys.argv:
    sys.exit("no such luck")
out = Path("out"); out.mkdir(exist_ok=True)
records = [{{"step": i, "policy/loss": {loss!r}, "time/step_s": time.perf_counter()}} for i in range(3)]
(out / "metrics.jsonl").write_text("".join(json.dumps(r) + "\\n" for r in records))
(out / "versions.json").write_text(json.dumps({{"torch": {torch!r}}}))
assert os.environ["OMP_NUM_THREADS"] == "1"
"""


def checkout(folder: Path, *, loss=0.1, refuses_old=False, torch="2") -> str:
    for name in ("tppo_ref", "sim"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text("")
    (folder / "tppo_ref" / "__main__.py").write_text(PROGRAM.format(loss=loss, refuses_old=refuses_old, torch=torch))
    return str(folder)


@pytest.fixture
def renamed(monkeypatch):
    """Three runs; one whose option has another name by now, and one whose option may be gone."""
    runs = [
        Run("plain", ["tppo_ref"]),
        Run("renamed", ["tppo_ref --old", "tppo_ref --new"]),
        Run("gone", ["tppo_ref --old"], may_go=True),
    ]
    monkeypatch.setattr(unchanged, "RUNS", runs)
    return runs


def test_equal_checkouts_are_equal_under_new_spellings(tmp_path, renamed, capsys):
    before, after = checkout(tmp_path / "before"), checkout(tmp_path / "after", refuses_old=True)
    assert unchanged.main(["--before", before, "--after", after]) == 0
    said = capsys.readouterr().out
    assert "one side only: gone: before only, all of it" in said
    assert "0 of 6 columns of 3 runs differ" in said


def test_one_bit_fails_the_program_against_a_checkout_and_against_its_stored_numbers(tmp_path, renamed, capsys):
    before, after = checkout(tmp_path / "before"), checkout(tmp_path / "after", loss=one_bit_more(0.1), torch="3")
    kept = str(tmp_path / "kept")
    assert unchanged.main(["--before", before, "--store", kept]) == 0
    for other in (before, kept):
        assert unchanged.main(["--before", other, "--after", after]) == 1
        said = capsys.readouterr().out
        assert "0.1 " in said
        assert repr(one_bit_more(0.1)) in said
        assert "note: torch: 2 before, 3 after" in said
        assert "3 of 6 columns of 3 runs differ" in said
        assert unchanged.main(["--before", other, "--after", before, "--runs", "renamed"]) == 0
        assert "of 1 runs" in capsys.readouterr().out


def test_a_run_that_breaks_is_a_difference_after_and_a_refusal_before(tmp_path, monkeypatch, capsys):
    good, bad = [Run("x", ["tppo_ref"])], [Run("x", ["tppo_ref --broken"])]
    folder, kept = checkout(tmp_path / "checkout"), str(tmp_path / "kept")
    monkeypatch.setattr(unchanged, "RUNS", good)
    assert unchanged.main(["--before", folder, "--store", kept]) == 0
    monkeypatch.setattr(unchanged, "RUNS", bad)
    assert unchanged.main(["--before", kept, "--after", folder]) == 1
    assert "no such luck" in capsys.readouterr().out
    assert unchanged.main(["--before", folder, "--after", folder]) == 2
    assert "no such luck" in capsys.readouterr().err


def test_a_folder_that_python_does_not_import_from_is_refused(tmp_path, renamed, capsys):
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        unchanged.main(["--before", str(tmp_path / "empty"), "--after", checkout(tmp_path / "after")])
    assert stop.value.code == 2
    assert "expected it here" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- what is committed


@pytest.fixture(scope="module")
def committed() -> Side:
    return load(STORED)


def test_the_committed_numbers_are_of_every_run(committed):
    assert set(committed.runs) == {run.name for run in RUNS} | {"base-models"}
    assert {"processor", "instructions", "torch", "commit", "date"} <= set(committed.provenance)


def test_no_variant_is_idle(committed):
    """Each set of options trains other weights than every other: none of them is without effect on what is compared."""
    weights: dict[Column, str] = {}
    for run, columns in committed.runs.items():
        for name, found in columns.items():
            if name.startswith("checkpoints/") and "policy" in name:
                assert weights.setdefault(found, run) == run
    assert len(weights) == sum("tppo_ref train" in run.spellings[0] for run in RUNS) > 15
