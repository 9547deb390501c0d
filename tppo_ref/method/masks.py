"""Who trains on which token: T-PPO's token filter as two masks.

Source: T-PPO (arXiv 2506.15050), section on token filtering: the policy learns from the tokens of the current window, whether
or not the response ended; the value model learns from finished responses only.
"""

from __future__ import annotations

import torch

from tppo_ref.method.checks import runs_of


def policy_token_mask(
    response_mask_BT: torch.Tensor, window_start_B: torch.Tensor, cut_B: torch.Tensor, *, skip_tail: int = 0
) -> torch.Tensor:
    """Tokens that the policy trains on in this step.

        mask[b, t] = response_mask[b, t]  and  t >= window_start[b]  and  not (cut[b] and t is one of the row's last skip_tail)

    response_mask_BT: bool, True on the response's tokens so far. window_start_B: integer, column of the first token that the
    policy has not trained yet; with a deferred tail of k tokens that is k columns before the window. cut_B: bool, the response
    is RUNNING at the window's edge. Returns bool [B, T].

    With skip_tail=0 it is the run on which `egae` is computed, tail included. With skip_tail=k it is the mask of the loss and of
    whitening. The authors' port leaves out the last 8 tokens of unfinished responses and never trains them [P]; theory.md P7
    says what that costs. Raises ValueError that names the argument.
    """
    _check_mask("response_mask_BT", response_mask_BT)
    _check_rows("window_start_B", window_start_B, response_mask_BT)
    _check_rows("cut_B", cut_B, response_mask_BT)
    if window_start_B.is_floating_point() or window_start_B.dtype == torch.bool or bool((window_start_B < 0).any()):
        raise ValueError(f"window_start_B: columns are integers of at least 0, got {window_start_B}")
    if cut_B.dtype != torch.bool:
        raise ValueError(f"cut_B: expected bool, got {cut_B.dtype}")
    if isinstance(skip_tail, bool) or not isinstance(skip_tail, int) or skip_tail < 0:
        raise ValueError(f"skip_tail: expected an integer of at least 0, got {skip_tail!r}")

    column_T = torch.arange(response_mask_BT.shape[1], device=response_mask_BT.device)
    stop_B = runs_of("response_mask_BT", response_mask_BT).stop_B
    # An arithmetic bound, not a slice: [-0:] would select the whole row when the tail is 0.
    last_B = torch.where(cut_B, stop_B - skip_tail, stop_B)
    return response_mask_BT & (column_T >= window_start_B[:, None]) & (column_T < last_B[:, None])


def value_token_mask(response_mask_BT: torch.Tensor, ended_B: torch.Tensor) -> torch.Tensor:
    """Tokens that the value model trains on: all of a response that ended, none of one that is RUNNING.

    response_mask_BT: bool [B, T]. ended_B: bool [B], the complement of `cut_B`. Returns bool [B, T].
    Raises ValueError that names the argument.
    """
    _check_mask("response_mask_BT", response_mask_BT)
    runs_of("response_mask_BT", response_mask_BT)
    _check_rows("ended_B", ended_B, response_mask_BT)
    if ended_B.dtype != torch.bool:
        raise ValueError(f"ended_B: expected bool, got {ended_B.dtype}")
    return response_mask_BT & ended_B[:, None]


def _check_mask(name: str, mask: torch.Tensor) -> None:
    if mask.ndim != 2 or mask.dtype != torch.bool:
        raise ValueError(f"{name}: expected bool [B, T], got {mask.dtype} {list(mask.shape)}")


def _check_rows(name: str, rows: torch.Tensor, mask: torch.Tensor) -> None:
    if rows.shape != mask.shape[:1]:
        raise ValueError(f"{name}: expected shape [{mask.shape[0]}], one entry per response, got {list(rows.shape)}")
