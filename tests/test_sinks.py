"""Where metrics go beside metrics.jsonl: TensorBoard, read back with its own reader, and Weights & Biases as an option.

W&B's package is a stand-in that records calls; the real one (0.31, offline) was tried by hand.
"""

from __future__ import annotations

import math
import sys
import types

import pytest

from tppo_ref.method.errors import UserError
from tppo_ref.runs.sinks import MetricLog, read_metrics


def test_tensorboard_shows_what_metrics_jsonl_holds_and_a_restart_takes_back_later_steps(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume, steps in ((None, (1, 2, 3)), (2, (3, 4))):
        log = MetricLog(tmp_path, resume_step=resume)
        for step in steps:
            log.log(step, {"time/step_s": step / 4 + (resume or 0), "response/accuracy": math.nan if step == 1 else 0.5})
        log.close()
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    shown = {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    kept = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in kept] == [1, 2, 3, 4]
    for tag in ("time/step_s", "response/accuracy"):
        assert shown[tag] == [(row["step"], row[tag]) for row in kept if row[tag] is not None]
    assert shown["time/step_s"][2] == (3, 2.75), "the third step is the one after the restart"


def test_a_run_that_starts_anew_in_the_folder_shows_no_step_of_the_one_before(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps, seconds in ((range(1, 6), 9.0), ((1, 2), 0.25)):
        log = MetricLog(tmp_path)
        for step in steps:
            log.log(step, {"time/step_s": seconds})
        log.close()
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    assert [(event.step, event.value) for event in reader.Scalars("time/step_s")] == [(1, 0.25), (2, 0.25)]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.fixture
def wandb(monkeypatch):
    """A wandb that keeps what it is told, per run id."""
    module = types.ModuleType("wandb")
    module.runs = {}

    def init(*, project, name, dir, id, resume):
        id = id or f"made-{len(module.runs)}"
        run = module.runs.setdefault(
            id, types.SimpleNamespace(id=id, project=project, name=name, resume=resume, rows=[], finished=0)
        )
        run.log = run.rows.append
        run.finish = lambda: setattr(run, "finished", run.finished + 1)
        run.define_metric = lambda pattern, step_metric: setattr(run, "axis", (pattern, step_metric))
        return run

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_run_and_its_continuation_are_one_run_there_with_our_steps(tmp_path, wandb):
    for resume, steps in ((None, (1, 2)), (1, (2, 3))):
        log = MetricLog(tmp_path, resume_step=resume, tensorboard=False, wandb_project="tails")
        for step in steps:
            log.log(step, {"time/step_s": 0.5, "response/accuracy": math.nan})
        log.close()
    (run,) = wandb.runs.values()
    assert (run.project, run.name, run.resume) == ("tails", tmp_path.name, "allow")
    assert run.axis == ("*", "step")
    assert run.rows == [{"step": step, "time/step_s": 0.5} for step in (1, 2, 2, 3)], "an undefined metric is left out"
    assert run.finished == 2


def test_a_run_that_starts_anew_in_the_folder_is_a_run_of_its_own_there(tmp_path, wandb):
    for steps in ((1, 2, 3), (1, 2)):
        log = MetricLog(tmp_path, tensorboard=False, wandb_project="tails")
        for step in steps:
            log.log(step, {"time/step_s": 0.5})
        log.close()
    assert [[row["step"] for row in run.rows] for run in wandb.runs.values()] == [[1, 2, 3], [1, 2]]


def test_nothing_is_sent_where_nobody_asked(tmp_path, wandb):
    log = MetricLog(tmp_path, tensorboard=False)
    log.log(1, {"time/step_s": 0.5})
    log.close()
    assert wandb.runs == {}


def test_a_missing_package_is_one_line_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^run\.wandb_project: .*pip install wandb") as caught:
        MetricLog(tmp_path, tensorboard=False, wandb_project="tails")
    assert "\n" not in str(caught.value)
