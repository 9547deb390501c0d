"""What the laboratory refuses, said in one dialect: a ValueError `name: got VALUE; expected ...`.

Without torch, unlike tppo_ref.method.checks: a Gymnasium worker process imports the environments and nothing heavier.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def check_count(name: str, x: Any, *, least: int = 1) -> int:
    """A whole number of at least `least`; True is none."""
    if isinstance(x, bool) or not isinstance(x, int | np.integer) or x < least:
        raise ValueError(f"{name}: got {x!r}; expected an integer of at least {least}")
    return int(x)


def check_unit(name: str, x: float) -> float:
    """In [0, 1]; NaN is not."""
    if not 0 <= x <= 1:
        raise ValueError(f"{name}: got {x!r}; expected a number in [0, 1]")
    return float(x)


def check_choice(name: str, x: Any, choices: Sequence[str]) -> None:
    """One of some words."""
    if x not in choices:
        raise ValueError(f"{name}: got {x!r}; expected one of {', '.join(choices)}")


def check_shape(name: str, x: ArrayLike, shape: tuple[int, ...], hint: str = "") -> Floats:
    """As float64. hint: the remedy, where one is known."""
    array = np.asarray(x, dtype=np.float64)
    if array.shape != shape:
        raise ValueError(f"{name}: got shape {list(array.shape)}; expected shape {list(shape)}{hint}")
    return array


def check_finite(name: str, x: Floats) -> Floats:
    """No NaN and no infinity in a vector; the first of them is named."""
    bad = ~np.isfinite(x)
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise ValueError(f"{name}[{at}]: got {x[at]}; expected finite numbers")
    return x


def vector(name: str, x: ArrayLike, num: int) -> Floats:
    """`num` finite numbers as float64."""
    return check_finite(name, check_shape(name, x, (num,)))


def integers(name: str, x: ArrayLike, num: int, low: int, high: int) -> Ints:
    """`num` integers in low .. high - 1 as int64."""
    array = np.asarray(x)
    if array.shape != (num,) or not (num == 0 or np.issubdtype(array.dtype, np.integer)):
        raise ValueError(f"{name}: got {array.dtype}, shape {list(array.shape)}; expected integers, shape [{num}]")
    bad = (array < low) | (array >= high)
    if bad.any():
        raise ValueError(f"{name}: got {array[bad][0]}; expected {low} .. {high - 1}")
    return array.astype(np.int64)
