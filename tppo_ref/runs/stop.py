"""Ctrl-C, politely: a run ends at a step's edge, with a checkpoint."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType


class PoliteStop:
    """Ctrl-C (or SIGTERM) once: `asked` is True and the loop ends at the step's edge. Twice: KeyboardInterrupt at once."""

    def __init__(self, signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)) -> None:
        self.asked, self._signals = False, signals

    def __enter__(self) -> PoliteStop:
        self._before = {s: signal.signal(s, self._handle) for s in self._signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping at the end of this step, with a checkpoint; once more to stop at once", file=sys.stderr)
