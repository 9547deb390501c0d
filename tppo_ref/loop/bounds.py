"""What a number of the settings may be, declared with its field: help, docs and check all read it there.

lr: Positive = 3e-4          Annotated[float, Bounds(0, above=True)]
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Annotated, Any


@dataclasses.dataclass(frozen=True, repr=False)
class Bounds:
    """An interval of finite numbers, `low` to `high`; NaN is in none.

    above, below   the interval does not hold `low`, `high` itself
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, number: float) -> bool:
        """Whether `number` is finite, at most LARGEST in size, and inside."""
        over = number > self.low if self.above else number >= self.low
        under = number < self.high if self.below else number <= self.high
        return abs(number) <= LARGEST and over and under

    def __repr__(self) -> str:
        """As in "a number above 0, at most 1"; LARGEST, which only absurd numbers pass, is said of those alone."""
        low = "" if self.low == -math.inf else f"{'above' if self.above else 'at least'} {self.low:,g}"
        high = "" if self.high >= LARGEST else f"{'below' if self.below else 'at most'} {self.high:,.10g}"
        return ", ".join(filter(None, (low, high))) or "finite"


LARGEST = 1e12
"""No number of a configuration is larger: 10^20 slots are a slip, not a wish."""

Count = Annotated[int, Bounds(1, LARGEST)]
Natural = Annotated[int, Bounds(0, LARGEST)]
Positive = Annotated[float, Bounds(0, LARGEST, above=True)]
NotNegative = Annotated[float, Bounds(0, LARGEST)]
Unit = Annotated[float, Bounds(0, 1)]
Share = Annotated[float, Bounds(0, 1, above=True)]


def bounds_of(hint: Any) -> Bounds | None:
    """The bounds in a field's type, `Annotated[...]` or `Annotated[...] | None`; finite for a plain float, None for no number."""
    if typing.get_origin(hint) is Annotated:
        return next((mark for mark in hint.__metadata__ if isinstance(mark, Bounds)), None)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next((found for arm in typing.get_args(hint) if (found := bounds_of(arm))), None)
    return Bounds() if hint is float else None
