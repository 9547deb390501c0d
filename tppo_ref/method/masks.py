"""Who trains on which token: T-PPO's token filter (arXiv 2506.15050) as two masks, and what becomes of the tail of a cut row.

The policy learns from the tokens of the current window, whether or not the response ended; the value model learns from finished
responses only. The tail is decided here and nowhere else: `policy_token_mask` leaves it out, `num_settled` says whether it comes
back. Suffixes: B responses, T response tokens, right-padded.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tppo_ref.method import checks
from tppo_ref.method.checks import runs_of

Tail = Literal["exclude", "defer"]


def policy_token_mask(response_mask_BT: Tensor, window_start_B: Tensor, cut_B: Tensor, *, skip_tail: int = 0) -> Tensor:
    """Tokens that the policy trains on in this step: those it has not seen yet, less the last ones of a cut row.

        mask[b, t] = response_mask[b, t]  and  t >= window_start[b]  and  not (cut[b] and t is one of the row's last skip_tail)

    Source: T-PPO (arXiv 2506.15050), token filtering. That the last 8 tokens of a cut row are left out is read in the authors' port
    [P]; docs/theory.md, P7, says what it costs.

    response_mask_BT  [B, T] bool, True on the response's tokens so far: per row one run, which may be empty
    window_start_B    [B] integers, column of the first token that the policy has yet to see; a tail that was deferred lies before
                      the window
    cut_B             [B] bool, the response is RUNNING at the window's edge
    skip_tail         tokens, at least 0. With 0 it is the run on which `egae` is computed, tail included; with k the mask of the
                      loss and of whitening. A tail longer than the run leaves nothing of a cut row, and touches no other.
    Returns bool [B, T], a new tensor. Raises ValueError that names the argument.
    """
    stop_B = runs_of("response_mask_BT", response_mask_BT).stop_B
    _check_rows(response_mask_BT, window_start_B, cut_B)
    checks.count("skip_tail", skip_tail, least=0)
    column_T = torch.arange(response_mask_BT.shape[1], device=response_mask_BT.device)
    # An arithmetic bound, not a slice: [-0:] would select the whole row when the tail is 0.
    last_B = torch.where(cut_B, stop_B - skip_tail, stop_B)
    return response_mask_BT & (column_T >= window_start_B[:, None]) & (column_T < last_B[:, None])


def num_settled(length_B: Tensor, window_start_B: Tensor, cut_B: Tensor, *, skip_tail: int, tail: Tail) -> Tensor:
    """How many tokens the policy is done with after this step, trained or lost: `window_start_B` of the next one.

        length                                      a row that is not cut; with tail="exclude" every row: what was skipped is lost
        max(window_start, length - skip_tail)       a cut row with tail="defer": what was skipped waits for the next window

    Excluding is the authors' port's [P], deferring is ours. length_B is [B], tokens of the response so far; the rest as in
    `policy_token_mask`. Returns integers [B]. Raises ValueError that names the argument.
    """
    checks.choice("tail", tail, ("exclude", "defer"))
    checks.count("skip_tail", skip_tail, least=0)
    _check_rows(length_B, window_start_B, cut_B)
    if tail == "exclude":
        return length_B.clone()
    return torch.where(cut_B, torch.maximum(window_start_B, length_B - skip_tail), length_B)


def value_token_mask(response_mask_BT: Tensor, ended_B: Tensor) -> Tensor:
    """Tokens that the value model trains on: all of a response that ended, none of one that is RUNNING.

        mask[b, t] = response_mask[b, t]  and  ended[b]            T-PPO (arXiv 2506.15050), token filtering

    A RUNNING response has no Monte Carlo return yet. response_mask_BT is bool [B, T], per row one run; ended_B bool [B], the
    complement of `cut_B`. Returns bool [B, T], a new tensor. Raises ValueError that names the argument.
    """
    runs_of("response_mask_BT", response_mask_BT)
    checks.like("ended_B", ended_B, response_mask_BT, torch.bool, ndim=1)
    return response_mask_BT & ended_B[:, None]


def _check_rows(like: Tensor, window_start_B: Tensor, cut_B: Tensor) -> None:
    checks.tensor("window_start_B", window_start_B, 1, *checks.INTEGERS)
    checks.like("window_start_B", window_start_B, like, window_start_B.dtype, ndim=1)
    checks.every("window_start_B", window_start_B, window_start_B >= 0, "a column, 0 or more")
    checks.like("cut_B", cut_B, like, torch.bool, ndim=1)
