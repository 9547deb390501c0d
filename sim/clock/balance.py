"""How much longer training takes because rows are whole: the fullest rank of each mini-batch makes the others wait.

Rows differ in length and cannot be cut, so that no dealing makes all ranks equal, the less the fewer rows each rank has of a
mini-batch. Twice the devices therefore do not halve the seconds.
"""

from __future__ import annotations

import functools
import heapq

import numpy as np
from numpy.typing import NDArray

from sim.clock.compiled import compiled


def waiting_factor(work_n: NDArray[np.float64], *, ranks: int, updates: int = 1, copies: int = 1) -> float:
    """Seconds of `updates` mini-batches over `ranks`, relative to an even spread of the same work; 1 for one rank or no work.

        sum over mini-batches of (the fullest rank's work) x ranks / work in all

    work_n   of each row
    copies   rows that each of them stands for (steady.sampled)

    The dealing is a good one: rows in order of their work go to the mini-batches in turn, so that these are alike; within one each
    row, the longest first, goes to the rank that has least. A real trainer comes close: its ranks have engines of their own, and go
    through micro-batches in step. The Trainer's wait 7 % at the 32B shape (benchmarks/at_32b.py) [M], where this says 0 to 1 %.
    """
    if ranks == 1 or not work_n.any():
        return 1.0
    return _waiting_factor(np.asarray(work_n, dtype=float).tobytes(), ranks, updates, copies)


@functools.lru_cache(maxsize=256)
def _waiting_factor(work: bytes, ranks: int, updates: int, copies: int) -> float:
    """Kept, since methods that decode alike deal the same rows."""
    work_n = np.frombuffer(work)
    ordered = np.repeat(np.sort(work_n)[::-1], copies)
    together = sum(fullest(np.ascontiguousarray(ordered[first::updates]), ranks) for first in range(updates))
    return together * ranks / (copies * float(work_n.sum()))


@compiled
def fullest(work_n: NDArray[np.float64], ranks: int) -> float:
    """Work of the fullest rank when each row, the longest first, goes to the one that has least."""
    loads = [work_n[rank] if rank < len(work_n) else 0.0 for rank in range(ranks - 1, -1, -1)]  # ascending: a heap
    largest = loads[-1]
    for row in range(ranks, len(work_n)):
        load = loads[0] + work_n[row]
        heapq.heapreplace(loads, load)
        largest = max(largest, load)
    return float(largest)
