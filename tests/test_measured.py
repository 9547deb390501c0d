"""`tppo report FOLDER` of one run: phases measured beside what was predicted, on files with numbers that can be worked out by hand."""

from __future__ import annotations

import csv
import json

import pytest

from tppo_ref.__main__ import main
from tppo_ref.method.errors import UserError
from tppo_ref.runs.measured import COLUMNS, PHASES, measured_rows

GB = 1e9
SECONDS = {"rollout": (50.0, 60.0, 40.0), "verify": (1.0, 1.0, 4.0), "forward": (5.0, 7.0, 6.0), "policy": (20.0, 10.0, 30.0),
           "value": (9.0, 9.0, 9.0), "sync": (2.0, 3.0, 1.0)}  # fmt: skip
PLAN = {"schema": "tppo-sim-plan/1", "seconds": [
    {"window": 512, "step_s": 1.0, "phases_s": dict.fromkeys(("prefill", "decode"), 0.5)},
    {"window": 64, "step_s": 80.0, "phases_s": {"wake": 0.5, "prefill": 4.0, "decode": 36.0, "engine_wait": 0.0, "verify": 0.0, "logprob": 3.0,
                                                "value_forward": 2.0, "policy_train": 22.0, "value_train": 11.0, "sync": 1.5}},
]}  # fmt: skip
DRY_RUN = {"schema": "tppo-dry-run/1", "seconds": None, "bytes_per_phase": {
    "sync": 30 * GB, "rollout": 70 * GB, "probe": 80 * GB, "logprob": 20 * GB, "value_forward": 25 * GB, "policy_update": 60 * GB,
    "value_update": 40 * GB,
}}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """Three steps; in the second one the policy's update takes most memory. An evaluation has a record of its own."""
    records = [{"step": 0, "eval/accuracy": 0.5}]
    for i in range(3):
        record = {"step": i + 1, "time/step_s": 90.0 + i} | {f"time/{phase}_s": s[i] for phase, s in SECONDS.items()}
        for phase in ("rollout", "forward", "policy", "value", "sync"):
            record |= {f"mfu/{phase}": (0.4, 0.5, 0.1)[i] if phase != "sync" else None}
            most = 3 * GB if i == 1 and phase == "policy" else 0
            record |= {
                f"memory/{phase}_{what}": GB * (20 + 10 * j) + most for j, what in enumerate(("allocated", "reserved", "used"))
            }
        records.append(record)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "config.json").write_text(json.dumps({"rollout": {"window": 64, "max_response_tokens": 256}}))
    return tmp_path


def rows(run) -> dict[str, dict]:
    return {row["phase"]: row for row in measured_rows(run, 64)}


def test_seconds_are_medians_bytes_the_most_and_predictions_are_added_up_by_phase(run):
    (run / "plan.json").write_text(json.dumps(PLAN))
    (run / "dry_run.json").write_text(json.dumps(DRY_RUN))
    found = rows(run)
    assert {phase: row["seconds"] for phase, row in found.items()} == {
        "rollout": 50, "verify": 1, "forward": 6, "policy": 20, "value": 9, "sync": 2, "step": 91,
    }  # fmt: skip
    assert {phase: row["predicted_s"] for phase, row in found.items()} == {
        "rollout": 40, "verify": 0, "forward": 5, "policy": 22, "value": 11, "sync": 2, "step": 80,
    }  # fmt: skip
    assert {phase: row["predicted_bytes"] for phase, row in found.items()} == {
        "rollout": 70 * GB, "verify": None, "forward": 25 * GB, "policy": 60 * GB, "value": 40 * GB, "sync": 30 * GB, "step": None,
    }  # fmt: skip
    policy = found["policy"]
    assert [policy[f"{what}_bytes"] / GB for what in ("allocated", "reserved", "used")] == [23, 33, 43]
    assert policy["used_over_predicted"] == pytest.approx(43 / 60)
    assert policy["mfu"] == 0.4


def test_the_plans_seconds_are_those_of_the_runs_window(run):
    (run / "plan.json").write_text(json.dumps(PLAN))
    assert {row["phase"]: row["predicted_s"] for row in measured_rows(run, 512)}["step"] == 1.0
    assert {row["predicted_s"] for row in measured_rows(run, 100)} == {None}


def test_every_second_of_a_plan_is_some_phases():
    from sim.clock.trace import PHASES as PLANNED

    assert sorted(name for names in PHASES.values() for name in names.seconds) == sorted(PLANNED)


def test_what_was_not_predicted_or_measured_stays_empty_and_is_said(run, capsys):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    bare = [{k: None if k.startswith(("mfu", "memory")) else x for k, x in line.items()} for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in bare))
    assert main(["report", str(run)]) == 0
    printed = capsys.readouterr().out
    assert all(f"No {what}" in printed for what in ("seconds are predicted", "memory is predicted", "MFU", "memory was measured"))
    assert all(row[name] is None for row in rows(run).values() for name in COLUMNS if name not in ("phase", "seconds"))


def test_the_command_prints_the_table_and_leaves_it_behind(run, capsys):
    (run / "plan.json").write_text(json.dumps(PLAN))
    (run / "dry_run.json").write_text(json.dumps(DRY_RUN))
    assert main(["report", str(run)]) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.split("|")[1:2] and line.split("|")[1].strip() == "policy"]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["policy", "20", "22", "40%", "23.0", "33.0", "43.0", "60.0", "72%"]
    with (run / "measured.csv").open(newline="") as file:
        written = {row["phase"]: row for row in csv.DictReader(file)}
    assert float(written["policy"]["used_bytes"]) == 43 * GB
    assert "No " not in printed


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema": "another/1"}', "3", '{"schema": "tppo-sim-plan/1", "seconds": [{}]}',
                                  *(f'{{"schema": "tppo-dry-run/1", "bytes_per_phase": {wrong}}}'
                                    for wrong in ("null", "[1]", '{"rollout": "many"}', '{"rollout": {"a": 1}}'))])  # fmt: skip
@pytest.mark.parametrize("name", ["plan.json", "dry_run.json"])
def test_a_prediction_that_cannot_be_read_is_one_line(run, name, text, capsys):
    (run / name).write_text(text)
    assert main(["report", str(run)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: report: got ")
    assert name in line


def test_a_phase_that_is_predicted_to_take_nothing_has_no_ratio(run):
    (run / "dry_run.json").write_text(json.dumps(DRY_RUN | {"bytes_per_phase": {"rollout": 0, "sync": 30 * GB}}))
    assert rows(run)["rollout"]["used_over_predicted"] is None
    assert rows(run)["sync"]["used_over_predicted"] == pytest.approx(40 / 30)


def test_a_metric_that_is_no_number_is_refused(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "time/step_s": "long"}) + "\n")
    with pytest.raises(UserError, match=r"report: got time/step_s 'long'.*; expected a number; "):
        measured_rows(run, 64)


def test_a_run_without_a_step_has_nothing_to_report(run):
    (run / "metrics.jsonl").write_text(json.dumps({"step": 0, "eval/accuracy": 0.5}) + "\n")
    with pytest.raises(UserError, match="a finished step"):
        measured_rows(run, 64)
