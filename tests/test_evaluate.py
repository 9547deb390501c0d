"""The eval/ metrics of answers, by hand."""

from __future__ import annotations

import pytest

from tppo_ref.method.records import End, Prompt, Response
from tppo_ref.runs.evaluate import summary


def answer(length: int, end: End, score: float | None) -> Response:
    return Response(
        id=length, prompt=Prompt(id=0, token_ids=(1,), answer=""), sample_index=0, token_ids=[3] * length, end=end, score=score
    )


def test_the_metrics_of_answers_by_hand():
    answers = [
        answer(10, End.END_TOKEN, 1.0), answer(20, End.END_TOKEN, 0.0), answer(30, End.LENGTH_CAP, -1.0), answer(40, End.END_TOKEN, 0.1),
        answer(60, End.LENGTH_CAP, None),
    ]  # fmt: skip
    assert summary(answers, failures=2) == pytest.approx({
        "eval/accuracy": 2 / 5,  # a score of 0 is not right, nor is none
        "eval/length_mean": 32, "eval/length_p99": 40 + 0.96 * 20,  # 0.99 of the way through four gaps
        "eval/capped_share": 2 / 5, "eval/verify_failures": 2,
    })  # fmt: skip
