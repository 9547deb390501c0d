"""What a run warns of, at the thresholds that its config states, and not below them."""

from __future__ import annotations

import contextlib
import logging
from types import SimpleNamespace

import pytest

from tppo_ref.loop.parallel import SingleProcess
from tppo_ref.method.errors import UserError
from tppo_ref.runs import commands
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.session import Session
from tppo_ref.runs.watch import Watch, forewarn

WELL = {
    "response/rows": 10, "response/ended": 6, "response/cut_share": 0.4, "response/capped_share": 0.0, "policy/staleness_max": 0,
    "verify/timeouts": 0, "verify/errors": 0,
}  # fmt: skip


def warnings_of(caplog, metrics, *, step=1, **fields):
    watch = Watch(replace_fields(Config(), {f"run.{name}": value for name, value in fields.items()}))
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="tppo_ref"):
        watch(step, WELL | metrics)
    return [record.getMessage() for record in caplog.records]


def test_a_run_that_is_well_is_not_warned_of(caplog):
    assert warnings_of(caplog, {}) == []


@pytest.mark.parametrize(("field", "limit", "metrics", "word"), [
    ("cut_warning", 0.7, lambda x: {"response/cut_share": x}, "rollout.window"),
    ("cut_warning", 0.7, lambda x: {"response/cut_share": 0.0, "response/ended": 10, "response/capped_share": x}, "cut or capped"),
    ("staleness_warning", 5, lambda x: {"policy/staleness_max": x}, "5 weight versions|6 weight versions"),
])  # fmt: skip
def test_each_threshold_is_passed_before_it_is_warned_of(caplog, field, limit, metrics, word):
    assert warnings_of(caplog, metrics(limit), **{field: limit}) == []
    above = limit + 1 if isinstance(limit, int) else limit + 0.1
    (said,) = warnings_of(caplog, metrics(above), **{field: limit})
    assert any(w in said for w in word.split("|"))
    assert f"run.{field}" in said
    assert warnings_of(caplog, metrics(above), step=2, **{field: limit}) == [], "every 20 steps, not at each"


@pytest.mark.parametrize("name", ["verify/timeouts", "verify/errors"])
def test_verifications_that_fail_are_told_when_there_are_more(caplog, name):
    """At any step, and each of them once: the numbers are sums over the run."""
    watch = Watch(Config())
    with caplog.at_level(logging.WARNING, logger="tppo_ref"):
        for step, so_far in enumerate((0, 3, 3, 3, 4), 6):
            watch(step, WELL | {name: so_far})
    said = [record.getMessage() for record in caplog.records]
    assert [text.partition(";")[0] for text in said] == [f"step 7: {name} is 3 so far", f"step 10: {name} is 4 so far"]


@pytest.mark.parametrize(("fields", "said"), [
    ({"value.warmup_steps": 10, "run.steps": 10}, "value.warmup_steps 10: the policy trains in none of the 10 steps"),
    ({"value.warmup_steps": 9, "run.steps": 10}, None),
    ({"value.warmup_steps": 10, "run.steps": 10, "run.train_seconds": 60.0}, None),
    ({"run.profile_steps": "11:12", "run.steps": 10}, "run.profile_steps 11:12: the run ends with step 10"),
    ({"run.profile_steps": "10:12", "run.steps": 10}, None),
    ({"run.profile_steps": "11:12", "run.steps": 10, "run.train_seconds": 60.0}, None),
    ({"advantage.tail_tokens": 64}, "advantage.tail_tokens 64 with rollout.window 64: no token of a cut row trains the policy"),
    ({"advantage.tail_tokens": 63}, None),
    ({"advantage.tail_tokens": 64, "advantage.tail": "defer"}, None),
    ({"advantage.tail_tokens": 64, "rollout.refill": "batch"}, None),
    ({"advantage.tail_tokens": 64, "policy.train_on": "ended"}, None),
])  # fmt: skip
def test_settings_that_are_legal_and_hardly_meant_are_told_before_the_first_step(caplog, fields, said):
    with caplog.at_level(logging.WARNING, logger="tppo_ref"):
        forewarn(replace_fields(Config(), fields))
    told = [record.getMessage() for record in caplog.records]
    assert (not told) if said is None else (len(told) == 1 and told[0].startswith(said))


def test_they_are_told_before_anything_is_made(caplog, monkeypatch, tmp_path):
    def build(config):
        raise UserError("nothing is made in this test")

    monkeypatch.setattr(commands, "build", build)
    config = replace_fields(Config(), {"run.out": str(tmp_path), "value.warmup_steps": 10, "run.steps": 10})
    with caplog.at_level(logging.WARNING, logger="tppo_ref"), pytest.raises(UserError, match="nothing is made"):
        commands.train(config)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["value.warmup_steps 10"]


def test_a_limit_ends_the_run_on_every_rank_and_not_on_the_first_alone():
    """A rank that talks to nobody (no files) leaves by it, too; what the limit is told are the step's number and metrics."""
    told = []

    def limit(step, metrics):
        told.append((step, metrics))
        raise UserError("enough")

    session = Session.__new__(Session)
    session.files, session.profiler = None, lambda step: contextlib.nullcontext()
    session.trainer = SimpleNamespace(step=lambda: {"policy/logprob_gap": 1.0}, train_s=0.0, num_steps=4, slices=[])
    session.parts = SimpleNamespace(parallel=SingleProcess(), limits=[limit])
    with pytest.raises(UserError, match="enough"):
        session.step()
    assert told == [(4, {"policy/logprob_gap": 1.0})]
