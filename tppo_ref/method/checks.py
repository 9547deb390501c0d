"""Checks at the door of this wing: a ValueError `name: got VALUE; expected ...` for an argument that cannot be meant."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tppo_ref.method.errors import refusal

FLOATS = (torch.float32, torch.float64)  # precise enough for long sums
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Runs(NamedTuple):
    """Where the tokens of each row are: one run of columns [first, stop), both 0 where it is empty."""

    mask_BT: Tensor
    first_B: Tensor
    stop_B: Tensor

    def columns_and_spans(self) -> tuple[slice, list[tuple[int, int]]]:
        """The columns that the runs take up, and [first, stop) of each row counted from there, (0, 0) where it is empty."""
        spans = list(zip(self.first_B.tolist(), self.stop_B.tolist(), strict=True))
        begin = min((first for first, stop in spans if stop > first), default=0)
        columns = slice(begin, max((stop for _, stop in spans), default=0))
        return columns, [(first - begin, stop - begin) if stop > first else (0, 0) for first, stop in spans]


def refused(name: str, got: Any, expected: str) -> ValueError:
    """The error to raise. A tensor is shown by dtype, shape and device, anything else as Python writes it."""
    shown = f"a tensor {got.dtype} {list(got.shape)} on {got.device}" if isinstance(got, Tensor) else repr(got)
    return ValueError(refusal(name, shown, expected))


def choice(name: str, x: Any, choices: tuple[str, ...]) -> None:
    if x not in choices:
        raise refused(name, x, f"one of {', '.join(choices)}")


def count(name: str, x: Any, *, least: int) -> None:
    """A whole number; True is none."""
    if not isinstance(x, int) or isinstance(x, bool) or x < least:
        raise refused(name, x, f"an integer of at least {least}")


def number(name: str, x: Any, low: float, high: float) -> float:
    """In [low, high], as a float. Not a bool, not a tensor; NaN is in no interval."""
    if not isinstance(x, numbers.Real) or isinstance(x, bool) or not low <= float(x) <= high:
        raise refused(name, x, f"a number in [{low:g}, {high:g}]")
    return float(x)


def positive(name: str, x: Any) -> None:
    if not isinstance(x, numbers.Real) or isinstance(x, bool) or not 0 < float(x) < float("inf"):
        raise refused(name, x, "a positive finite number")


def tensor(name: str, x: Any, ndim: int, *dtypes: torch.dtype) -> None:
    """A tensor of that rank and, where any are named, one of the dtypes."""
    if not isinstance(x, Tensor) or x.ndim != ndim or (dtypes and x.dtype not in dtypes):
        raise refused(name, x, f"a tensor with {ndim} dimension{'s' * (ndim > 1)} of {' or '.join(map(str, dtypes)) or 'numbers'}")


def like(name: str, x: Any, other: Tensor, dtype: torch.dtype, ndim: int = 2) -> None:
    """`x` has the dtype given, the device of `other` and the first `ndim` sizes of it."""
    shape = other.shape[:ndim]
    if not isinstance(x, Tensor) or x.shape != shape or x.dtype != dtype or x.device != other.device:
        raise refused(name, x, f"a tensor {dtype} {list(shape)} on {other.device}")


def every(name: str, x: Tensor, good: Tensor, expected: str = "finite numbers inside the mask") -> None:
    """All elements are good; the first one that is not is shown as `name[b, t]`."""
    if not good.all():
        index = (~good).nonzero()[0].tolist()
        raise refused(f"{name}{index}", x[tuple(index)].item(), expected)


def lam(x: Any, rewards_BT: Tensor) -> Tensor:
    """A trace parameter in float64: [1, 1] for a number, whole or not, [B, 1] for a tensor [B]."""
    if not isinstance(x, Tensor):
        return rewards_BT.new_full((1, 1), number("lam", x, 0, 1), dtype=torch.float64)
    tensor("lam", x, 1, *FLOATS)
    like("lam", x, rewards_BT, x.dtype, ndim=1)
    every("lam", x, (x >= 0) & (x <= 1), "a number in [0, 1]")
    return x.double()[:, None]


def lengths(name: str, x_B: Any) -> None:
    """[B], whole numbers or not, finite, 0 or more."""
    tensor(name, x_B, 1, *FLOATS, *INTEGERS)
    every(name, x_B, x_B.isfinite() & (x_B >= 0), "a finite length, 0 or more")


def last_value(last_value_B: Any, rewards_BT: Tensor, read_B: Tensor) -> Tensor:
    """Finite where it is read; 0 elsewhere."""
    like("last_value_B", last_value_B, rewards_BT, rewards_BT.dtype, ndim=1)
    every("last_value_B", last_value_B, last_value_B.isfinite() | ~read_B, "a finite number")
    return last_value_B.masked_fill(~read_B, 0)


def tokens(rewards_BT: Any, mask_BT: Any, values_BT: Any) -> Runs:
    """All but finiteness, which the sums over the runs show for nothing."""
    tensor("rewards_BT", rewards_BT, 2, *FLOATS)
    if values_BT is not None:
        like("values_BT", values_BT, rewards_BT, rewards_BT.dtype)
    like("mask_BT", mask_BT, rewards_BT, torch.bool)
    return runs_of("mask_BT", mask_BT)


def runs_of(name: str, mask_BT: Any) -> Runs:
    """The run of each row of a bool mask [B, T]; ValueError for a row with a hole."""
    tensor(name, mask_BT, 2, torch.bool)
    (B, T), device = mask_BT.shape, mask_BT.device
    first_B, stop_B = torch.zeros(2, B, dtype=torch.int64, device=device)
    if B == 0 or T == 0:
        return Runs(mask_BT, first_B, stop_B)
    if mask_BT.view(torch.uint8).amin() == 1:  # bytes: many times faster than all() on bools
        return Runs(mask_BT, first_B, stop_B + T)
    edge_BT = mask_BT[:, 1:] != mask_BT[:, :-1]
    if device.type == "cpu":  # NumPy finds them several times faster, and a padded batch is the common case
        flat = torch.from_numpy(np.flatnonzero(edge_BT.numpy()))
        row, column = flat // max(T - 1, 1), flat % max(T - 1, 1)
    else:
        row, column = edge_BT.nonzero().unbind(1)
    rises = mask_BT[row, column + 1]
    num_runs_B = mask_BT[:, 0] + torch.bincount(row[rises], minlength=B)
    every(name, num_runs_B, num_runs_B <= 1, "1 run of True at most, without a hole")
    first_B[row[rises]] = column[rises] + 1
    stop_B[mask_BT[:, -1]] = T
    stop_B[row[~rises]] = column[~rises] + 1
    return Runs(mask_BT, first_B, stop_B)
