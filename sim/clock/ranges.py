"""What a prediction is worth: its middle, and the ends that the stated efficiencies allow.

A system runs three times, with every efficiency slow, in the middle and fast (efficiency.py). The engine's and the trainer's ends
are independent of each other, so that a step has five seconds: the middle's, and those of the four corners. A ratio of two systems
is taken corner by corner, both on the same cluster, and its range goes from the smallest to the largest of the five.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from sim.clock.efficiency import LEVELS, Efficiency, Level, at
from sim.clock.steady import Steady

ENDS: tuple[Level, Level] = ("slow", "fast")
CORNERS: tuple[tuple[Level, Level], ...] = (("middle", "middle"), *itertools.product(ENDS, ENDS))
"""(engine, trainer); the middle first."""


class Range(NamedTuple):
    """A number, and its ends."""

    low: float
    middle: float
    high: float

    @classmethod
    def over(cls, numbers: Iterator[float]) -> Range:
        """Of a corner's number each, the middle's first."""
        some = list(numbers)
        return cls(min(some), some[0], max(some))

    def text(self, spec: str = ".2f", unit: str = "x") -> str:
        """1.57x (1.31 to 1.90)."""
        return f"{self.middle:{spec}}{unit} ({self.low:{spec}} to {self.high:{spec}})"


class Ranged:
    """A system in its routine, at all levels of efficiency.

    apart   rollout and training overlap on devices of their own: their seconds cannot be put together corner by corner, and both
            ends move together
    """

    def __init__(self, run: Callable[[Efficiency], Steady], *, apart: bool = False):
        self.levels: dict[Level, Steady] = {}
        self.run, self.apart = run, apart

    def at(self, level: Level) -> Steady:
        """The system with all efficiencies at this level."""
        if level not in self.levels:
            self.levels[level] = self.run(at(level, level))
        return self.levels[level]

    @property
    def middle(self) -> Steady:
        return self.at("middle")

    def complete(self) -> Ranged:
        """Runs every level now."""
        for level in LEVELS:
            self.at(level)
        return self

    def step_s(self, engine: Level, trainer: Level) -> float:
        """Seconds of a step at a corner."""
        if self.apart:
            return self.at(trainer).step_s
        ours = self.at(trainer)
        return self.at(engine).rollout_s + ours.step_s - ours.rollout_s

    def rollout_s(self, engine: Level) -> float:
        return self.at(engine).rollout_s

    def tokens_per_s(self, engine: Level, trainer: Level) -> float:
        """Trained tokens."""
        return self.at(trainer if self.apart else engine).trained / self.step_s(engine, trainer)

    @property
    def speed(self) -> Range:
        """Trained tokens per second."""
        return Range.over(self.tokens_per_s(*corner) for corner in CORNERS)

    @property
    def step(self) -> Range:
        """Seconds of a step."""
        return Range.over(self.step_s(*corner) for corner in CORNERS)

    def gain(self, before: Ranged) -> Range:
        """Trained tokens per second, this / before."""
        return Range.over(self.tokens_per_s(*corner) / before.tokens_per_s(*corner) for corner in CORNERS)

    def rollout_gain(self, before: Ranged) -> Range:
        """The same of the rollout's seconds alone."""

        def rate(system: Ranged, engine: Level) -> float:
            return system.at(engine).trained / system.rollout_s(engine)

        return Range.over(rate(self, engine) / rate(before, engine) for engine, _ in CORNERS)
