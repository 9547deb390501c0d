"""Ctrl-C, politely: a run ends at a step's edge, with a checkpoint."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


@contextmanager
def sigterm_stops() -> Iterator[None]:
    """SIGTERM is a KeyboardInterrupt, as Ctrl-C is: a command that is asked to end while it starts says so in one line."""
    if threading.current_thread() is not threading.main_thread():  # only there can it be set
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
