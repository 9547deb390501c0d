"""rows.py by hand: which rows are cut, where a score lies and which tokens train, when the row that is cut is not the longest."""

from __future__ import annotations

import torch

from tppo_ref.loop.rows import Rows
from tppo_ref.loop.settings import AdvantageConfig
from tppo_ref.method.records import End, Prompt, Response, WindowSlice

END_ID = 1  # small, so that it is also the number of a column that every row has


def piece(id: int, token_ids: list[int], end: End, score: float | None = None) -> WindowSlice:
    prompt = Prompt(id=id, token_ids=(5,), answer="")
    response = Response(id=id, prompt=prompt, sample_index=0, token_ids=token_ids, logprobs=[0.0] * len(token_ids), end=end, score=score,
                        window_starts=[0])  # fmt: skip
    return WindowSlice(response, 0, len(token_ids))


def four_rows(tail_tokens: int = 2) -> Rows:
    """Ended short; ended and the longest, as long as the batch is wide; still running, and shorter than both others; at the cap."""
    slices = [
        piece(0, [7, 8, END_ID], End.END_TOKEN, 1.0),
        piece(1, [7, 7, 7, 7, 7, END_ID], End.END_TOKEN, -1.0),
        piece(2, [7, 8, 9, 7], End.RUNNING),
        piece(3, [7, 8, 9, 7, 8, 9], End.LENGTH_CAP, -0.5),
    ]
    return Rows.of(slices, AdvantageConfig(tail_tokens=tail_tokens))


def test_a_row_is_cut_where_its_response_runs_and_nowhere_else():
    """Neither its length nor the batch's width says so: the row that is cut is shorter than two that ended."""
    assert four_rows().cut_B.dtype == torch.bool
    assert four_rows().cut_B.tolist() == [False, False, True, False]


def test_a_score_lies_on_the_last_token_of_an_ended_row_whatever_that_token_is():
    assert four_rows().rewards_BT.tolist() == [
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, -1],
        [0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, -0.5],
    ]


def test_the_row_that_is_cut_loses_its_tail_and_no_other_row_does():
    assert four_rows().train_BT.sum(1).tolist() == [3, 6, 2, 6]
    assert four_rows(tail_tokens=0).train_BT.sum(1).tolist() == [3, 6, 4, 6]
