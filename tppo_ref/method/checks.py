"""Checks at the door of this wing: a ValueError names the argument, shows what came and says what was expected.

Every message is of one form: `name: got VALUE; expected ...`, made by `refused`.
"""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tppo_ref.method.errors import refusal


class Runs(NamedTuple):
    """Where the tokens of each row are: the columns [first, stop), [B] each; both 0 where there are none."""

    first_B: Tensor
    stop_B: Tensor


def refused(name: str, got: Any, expected: str, remedy: str = "") -> ValueError:
    """The error to raise. A tensor is shown by dtype, shape and device, anything else as Python writes it."""
    shown = f"a tensor {got.dtype} {list(got.shape)} on {got.device}" if isinstance(got, Tensor) else repr(got)
    return ValueError(refusal(name, shown, expected, remedy))


def check_choice(name: str, x: Any, choices: tuple[str, ...]) -> None:
    if x not in choices:
        raise refused(name, x, f"one of {', '.join(choices)}")


def check_count(name: str, x: Any, *, least: int) -> None:
    """A whole number of at least `least`; True is none."""
    if not isinstance(x, int) or isinstance(x, bool) or x < least:
        raise refused(name, x, f"an integer of at least {least}")


def check_number(name: str, x: Any, low: float, high: float) -> float:
    """In [low, high], as a float. Not a bool, not a tensor; NaN is in no interval."""
    if not isinstance(x, numbers.Real) or isinstance(x, bool) or not low <= float(x) <= high:
        raise refused(name, x, f"a number in [{low:g}, {high:g}]")
    return float(x)


def check_positive(name: str, x: Any) -> float:
    """Above 0 and finite, as a float."""
    if not isinstance(x, numbers.Real) or isinstance(x, bool) or not 0 < float(x) < float("inf"):
        raise refused(name, x, "a positive finite number")
    return float(x)


def check_tensor(name: str, x: Any, ndim: int) -> None:
    if not isinstance(x, Tensor) or x.ndim != ndim:
        raise refused(name, x, f"a tensor with {ndim} dimension{'s' * (ndim > 1)}")


def check_float_BT(name: str, x_BT: Any) -> None:
    """[B, T], of a precision in which long sums make sense."""
    check_tensor(name, x_BT, ndim=2)
    if x_BT.dtype not in (torch.float32, torch.float64):
        raise refused(name, x_BT, "torch.float32 or torch.float64")


def check_like(name: str, x: Any, like: Tensor, dtype: torch.dtype, ndim: int = 2) -> None:
    """`x` has the dtype given, the device of `like` and the first `ndim` sizes of it."""
    shape = like.shape[:ndim]
    if not isinstance(x, Tensor) or x.shape != shape or x.dtype != dtype or x.device != like.device:
        raise refused(name, x, f"a tensor {dtype} {list(shape)} on {like.device}")


def check_mask(name: str, mask_BT: Any) -> None:
    check_tensor(name, mask_BT, ndim=2)
    if mask_BT.dtype != torch.bool:
        raise refused(name, mask_BT, "torch.bool")


def check_lam(lam: Any, rewards_BT: Tensor) -> Tensor:
    """A trace parameter in float64: [1, 1] for a number, whole or not, [B, 1] for a tensor [B]."""
    if not isinstance(lam, Tensor):
        return rewards_BT.new_full((1, 1), check_number("lam", lam, 0, 1), dtype=torch.float64)
    if lam.dtype not in (torch.float32, torch.float64):
        raise refused("lam", lam, "a number, or a tensor torch.float32 or torch.float64")
    check_like("lam", lam, rewards_BT, lam.dtype, ndim=1)
    bad_B = ~((lam >= 0) & (lam <= 1))
    if bad_B.any():
        b = int(bad_B.nonzero()[0])
        raise refused(f"lam[{b}]", lam[b].item(), "a number in [0, 1]")
    return lam.double()[:, None]


def check_lengths(name: str, length_B: Any) -> None:
    """[B], whole numbers or not, finite, 0 or more."""
    check_tensor(name, length_B, ndim=1)
    if length_B.dtype in (torch.bool, torch.float16, torch.bfloat16) or length_B.is_complex():
        raise refused(name, length_B, "integers, torch.float32 or torch.float64")
    bad_B = (length_B < 0) | ~torch.isfinite(length_B)
    if bad_B.any():
        b = int(bad_B.nonzero()[0])
        raise refused(f"{name}[{b}]", length_B[b].item(), "a finite length, 0 or more")


def check_last_value(last_value_B: Any, rewards_BT: Tensor, read_B: Tensor) -> Tensor:
    """Finite where it is read; 0 elsewhere."""
    check_like("last_value_B", last_value_B, rewards_BT, rewards_BT.dtype, ndim=1)
    bad_B = read_B & ~last_value_B.isfinite()
    if bad_B.any():
        b = int(bad_B.nonzero()[0])
        raise refused(f"last_value_B[{b}]", last_value_B[b].item(), "a finite number")
    return last_value_B.masked_fill(~read_B, 0)


def check_finite(name: str, x_BT: Tensor, mask_BT: Tensor) -> None:
    bad = (mask_BT & ~x_BT.isfinite()).nonzero()
    if len(bad):
        b, t = bad[0].tolist()
        raise refused(f"{name}[{b}, {t}]", x_BT[b, t].item(), "finite numbers inside the mask")


def check_tokens(rewards_BT: Any, mask_BT: Any, values_BT: Any) -> Runs:
    """All but finiteness, which the recursion shows for nothing."""
    check_float_BT("rewards_BT", rewards_BT)
    if values_BT is not None:
        check_like("values_BT", values_BT, rewards_BT, rewards_BT.dtype)
    check_like("mask_BT", mask_BT, rewards_BT, torch.bool)
    return runs_of("mask_BT", mask_BT)


def runs_of(name: str, mask_BT: Tensor) -> Runs:
    """The run of each row of a bool mask [B, T]; ValueError for a row with a hole."""
    (B, T), device = mask_BT.shape, mask_BT.device
    first_B, stop_B = torch.zeros(2, B, dtype=torch.int64, device=device)
    if B == 0 or T == 0:
        return Runs(first_B, stop_B)
    if mask_BT.view(torch.uint8).amin() == 1:  # bytes: many times faster than all() on bools
        return Runs(first_B, stop_B + T)
    edge_BT = mask_BT[:, 1:] != mask_BT[:, :-1]
    if device.type == "cpu":  # NumPy finds them several times faster, and a padded batch is the common case
        flat = torch.from_numpy(np.flatnonzero(edge_BT.numpy()))
        row, column = flat // max(T - 1, 1), flat % max(T - 1, 1)
    else:
        row, column = edge_BT.nonzero().unbind(1)
    rises = mask_BT[row, column + 1]
    num_runs_B = mask_BT[:, 0] + torch.bincount(row[rises], minlength=B)
    if (num_runs_B > 1).any():
        b = int((num_runs_B > 1).nonzero()[0])
        raise ValueError(refusal(f"{name}[{b}]", f"{int(num_runs_B[b])} runs of True", "one run without a hole"))
    first_B[row[rises]] = column[rises] + 1
    stop_B[mask_BT[:, -1]] = T
    stop_B[row[~rises]] = column[~rises] + 1
    return Runs(first_B, stop_B)
