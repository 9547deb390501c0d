"""Checks at the door of advantages.py: a ValueError names the argument, shows what came and says what was expected."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class Runs(NamedTuple):
    """Per row the columns [first, stop) of its run; both 0 where it is empty."""

    first_B: Tensor
    stop_B: Tensor


def show(x: Any) -> str:
    return f"a tensor {x.dtype} {list(x.shape)} on {x.device}" if isinstance(x, Tensor) else repr(x)


def check_tensor(name: str, x: Any, ndim: int) -> None:
    if not isinstance(x, Tensor) or x.ndim != ndim:
        raise ValueError(f"{name} is {show(x)}, expected a tensor with {ndim} dimension{'s' * (ndim > 1)}")


def check_float_BT(name: str, x_BT: Any) -> None:
    check_tensor(name, x_BT, ndim=2)
    if x_BT.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} has dtype {x_BT.dtype}, expected torch.float32 or torch.float64")


def check_like(name: str, x: Any, like: Tensor, dtype: torch.dtype, ndim: int = 2) -> None:
    """`x` has the dtype given, the device of `like` and the first `ndim` sizes of it."""
    shape = like.shape[:ndim]
    if not isinstance(x, Tensor) or x.shape != shape or x.dtype != dtype or x.device != like.device:
        raise ValueError(f"{name} is {show(x)}, expected a tensor {dtype} {list(shape)} on {like.device}")


def check_number(name: str, x: Any, low: float, high: float) -> float:
    """Not a bool, not a tensor; NaN is in no interval."""
    if not isinstance(x, numbers.Real) or isinstance(x, bool) or not low <= float(x) <= high:
        raise ValueError(f"{name} is {show(x)}, expected a number in [{low:g}, {high:g}]")
    return float(x)


def check_lam(lam: Any, rewards_BT: Tensor) -> Tensor:
    """float64, [1, 1] for a number, [B, 1] for a tensor."""
    if not isinstance(lam, Tensor):
        return rewards_BT.new_full((1, 1), check_number("lam", lam, 0, 1), dtype=torch.float64)
    if lam.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"lam is {show(lam)}, expected a number or a tensor of float32 or float64")
    check_like("lam", lam, rewards_BT, lam.dtype, ndim=1)
    bad_B = ~((lam >= 0) & (lam <= 1))
    if bad_B.any():
        raise ValueError(f"lam holds {lam[bad_B][0].item()}, expected numbers in [0, 1]")
    return lam.double()[:, None]


def check_last_value(last_value_B: Any, rewards_BT: Tensor, read_B: Tensor) -> Tensor:
    """0 in the rows that are not read."""
    check_like("last_value_B", last_value_B, rewards_BT, rewards_BT.dtype, ndim=1)
    bad_B = read_B & ~last_value_B.isfinite()
    if bad_B.any():
        b = int(bad_B.nonzero()[0])
        raise ValueError(f"last_value_B[{b}] is {last_value_B[b].item()}, expected a finite number")
    return last_value_B.masked_fill(~read_B, 0)


def check_finite(name: str, x_BT: Tensor, mask_BT: Tensor) -> None:
    bad = (mask_BT & ~x_BT.isfinite()).nonzero()
    if len(bad):
        b, t = bad[0].tolist()
        raise ValueError(f"{name}[{b}, {t}] is {x_BT[b, t].item()}, expected finite numbers inside the mask")


def check_tokens(rewards_BT: Any, mask_BT: Any, values_BT: Any) -> Runs:
    """All but finiteness, which the scan sees for nothing."""
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
        raise ValueError(f"{name}[{b}] has {int(num_runs_B[b])} runs of True, expected one run without a hole")
    first_B[row[rises]] = column[rises] + 1
    stop_B[mask_BT[:, -1]] = T
    stop_B[row[~rises]] = column[~rises] + 1
    return Runs(first_B, stop_B)
