"""The books of a window by hand: what counts as right, what is a mean of nothing, and seconds by phase."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from tppo_ref.loop.ledger import Ledger
from tppo_ref.loop.meters import CLOCKS, PhaseClock
from tppo_ref.loop.parallel import SingleProcess
from tppo_ref.method.records import End, Prompt, Response, WindowSlice


def piece(id: int, length: int, end: End, score: float | None = None, begin: int = 0, observations=()) -> WindowSlice:
    prompt = Prompt(id=id, token_ids=(1,), answer="")
    response = Response(id=id, prompt=prompt, sample_index=0, token_ids=[3] * length, end=end, score=score,
                        observations=list(observations))  # fmt: skip
    return WindowSlice(response, begin, length)


def test_the_metrics_of_a_window_by_hand():
    slices = [
        piece(0, 4, End.END_TOKEN, 1.0, observations=[(2, (7, 8))]), piece(1, 6, End.END_TOKEN, 0.0),
        piece(2, 8, End.LENGTH_CAP, -0.5, begin=3, observations=[(3, (7, 7, 7)), (4, (9,))]),  # the first in an earlier window
        piece(3, 2, End.RUNNING, observations=[(2, (6, 6, 6, 6))]), piece(4, 7, End.END_TOKEN, None, begin=5),
    ]  # fmt: skip
    ledger = Ledger(SingleProcess())
    ledger.verdicts.update({"ok": 5, "timeout": 2, "error": 3, "bad_score": 4})
    metrics = ledger.window_metrics(slices, SimpleNamespace(slot_steps=40, num_steps=10), rollout_s=2.0)
    assert metrics == pytest.approx({
        "rollout/decode_steps": 10, "rollout/tokens": 4 + 6 + 5 + 2 + 2, "rollout/tokens_per_s": 9.5, "rollout/occupancy": 19 / 40,
        "rollout/idle_s": 21 / 40 * 2, "response/rows": 5, "response/ended": 4, "response/cut_share": 1 / 5,
        "response/cut_token_share": 2 / 19,
        "response/capped_share": 1 / 4, "response/length_mean": 25 / 4, "response/length_max": 8, "response/turns_mean": (2 + 1 + 3 + 1) / 4, "ledger/observed": 2 + 1 + 4,
        "response/score_mean": 0.5 / 4,  # what has no score counts as 0
        "response/accuracy": 1 / 4,  # a score of 0 is not right
        "verify/timeouts": 2, "verify/errors": 7,
    })  # fmt: skip


def test_where_nothing_ended_a_mean_is_not_0():
    metrics = Ledger(SingleProcess()).window_metrics([piece(0, 3, End.RUNNING)], SimpleNamespace(slot_steps=4, num_steps=4), 1.0)
    undefined = {name for name, value in metrics.items() if math.isnan(value)}
    assert undefined == {
        f"response/{name}" for name in ("capped_share", "length_mean", "length_max", "turns_mean", "score_mean", "accuracy")
    }
    assert metrics["response/cut_share"] == 1


def test_a_phase_that_is_entered_twice_takes_both_times(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 10.0, 14.0, 20.0])  # begin; in, out; in, out; the end
    monkeypatch.setitem(CLOCKS, "wall", lambda: next(now))
    clock = PhaseClock()
    for _ in range(2):
        with clock("policy"):
            pass
    assert clock.metrics() == {"time/step_s": 20.0, "time/policy_s": 6.0, "time/other_s": 14.0}
