"""What became of every token, and the metrics of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class PhaseClock:
    """Wall-clock seconds by phase of one step: `with clock("rollout"): ...`."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin

    def metrics(self) -> dict[str, float]:
        step_s = time.perf_counter() - self.begin
        phases = {f"time/{name}_s": seconds for name, seconds in self.seconds.items()}
        return {"time/step_s": step_s, **phases, "time/other_s": step_s - sum(self.seconds.values())}
