"""What an engine's decode steps take: who decodes in which of them, and from that the seconds at which each one ends.

Everything is counted in decode steps first and in seconds afterwards. A *job* is a request: so many tokens in the cache when it
begins, so many new ones. A *stint* is a stretch of decode steps in which a job decodes; a job that is preempted has several. Who
is admitted or preempted depends on tokens alone, so a faster machine runs the same stints.

    stints -> loads (active sequences and their context, per decode step) -> clock (seconds at each step's end) -> rollout

Suffixes: n stints, R engine replicas, F decode steps of all replicas, one after the other: replica r has steps_R[r] of them and one
more entry, its end, and begins at offset_R[r].
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.clock.hardware import Costs, causal_context

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Numbers = NDArray[Any]  # whole numbers, in whichever type the sums come
SLICE = 1 << 20  # decode steps whose costs are asked for at once: what the costs compute on the way stays small


class Stints(NamedTuple):
    """Job `job` decodes on `replica` in the decode steps [begin, stop); it could have begun at step `ready`.

    `context` tokens, prompt included, are there when it begins. They are in no cache: a stint begins with their prefill.
    """

    replica_n: Ints
    job_n: Ints
    ready_n: Ints
    begin_n: Ints
    stop_n: Ints
    context_n: Ints

    def only(self, some_n: NDArray[np.bool_]) -> Stints:
        return Stints(*(column_n[some_n] for column_n in self))

    def until(self, stop_R: Ints) -> Stints:
        """What is left of the stints when replica r stops after stop_R[r] decode steps."""
        cut = self._replace(stop_n=np.minimum(self.stop_n, stop_R[self.replica_n]))
        return cut.only(cut.stop_n > cut.begin_n)


class Loads(NamedTuple):
    """Per decode step: sequences that get a token, the context that they attend to, what is prefilled before it (tokens, and
    their query-key pairs). The last token of a sequence is fed by the decode step itself, so prefill has one token less."""

    offset_R: Ints
    steps_R: Ints
    active_F: Ints
    context_F: Numbers
    prefill_F: Numbers
    pairs_F: Numbers

    @property
    def peak_context_R(self) -> Numbers:
        """Most tokens in a replica's cache at once."""
        return np.maximum.reduceat(self.context_F, self.offset_R)


class Clock(NamedTuple):
    """Seconds, from the rollout's begin, before decode step f (`time_F`); of its prefill and of itself."""

    time_F: Floats
    prefill_s_F: Floats
    decode_s_F: Floats


class Rollout(NamedTuple):
    """One rollout in seconds. Prefill and decode are means over the replicas; `busy_slot_s` counts the seconds of every sequence
    that decodes, or waits for the prefill of others; `active_n[i]` sequences from `active_time_s[i]` on."""

    prefill_s: float
    decode_s: float
    seconds: float
    decode_steps: int
    busy_slot_s: float
    queue_s: float
    prefill_tokens: int
    ops_per_byte: float | None
    active_time_s: Floats
    active_n: Ints


def all_at_once(replica_n: Ints, context_n: Ints, new_n: Ints) -> Stints:
    """Every job begins at step 0: there is room for all."""
    zeros_n = np.zeros_like(new_n)
    return Stints(replica_n, np.arange(len(new_n)), zeros_n, zeros_n, new_n, context_n)


def queued(
    context: Sequence[int], new: Sequence[int], *, places: int, capacity: int, following: Sequence[int] | None = None
) -> list[tuple[int, int, int, int, int]]:
    """Continuous batching on one replica, as vLLM does it: (job, ready, begin, stop, context) of each stint, by stop.

    context, new   per job: tokens to prefill (prompt and response so far), tokens to decode, at least one
    places         sequences that may decode at once
    capacity       tokens that the cache holds: at each decode step the sum of the context of those that decode
    following      per job: the job that comes when it ends, or -1 (the next response of a slot); None: none

    First come, first served, nobody overtakes: the head of the queue begins as soon as a place is free and its context fits. The
    cache of those that decode grows by a token each per step. When it overflows, whoever began last goes back to the head of the
    queue, and its tokens so far are prefilled again (recompute preemption). Blocks of the cache and shared prefixes are left out.
    """
    following = following or [-1] * len(new)
    later = set(following)
    waiting = deque(job for job in range(len(new)) if job not in later)
    held, left = list(context), list(new)
    ready, begin, finish = [0] * len(new), [0] * len(new), [-1] * len(new)  # finish: the step at which it ends; -1: not decoding
    newest: list[int] = []  # those that decode, by when they began; holds some that ended
    due: list[tuple[int, int]] = []
    now = count = base = 0  # the cache holds base + count * now tokens
    stints: list[tuple[int, int, int, int, int]] = []
    while waiting or count:
        while waiting and count < places and (base + count * now + held[waiting[0]] <= capacity or not count):
            job = waiting.popleft()
            begin[job], finish[job] = now, now + left[job]
            heapq.heappush(due, (finish[job], job))
            newest.append(job)
            count, base = count + 1, base + held[job] - now
        while finish[due[0][1]] != due[0][0]:  # it was preempted since
            heapq.heappop(due)
        now = min(due[0][0], now + (capacity - base - count * now) // count + 1)
        while due and due[0][0] == now:
            job = heapq.heappop(due)[1]
            if finish[job] != now:
                continue
            finish[job] = -1
            count, base = count - 1, base - held[job] + begin[job]
            stints.append((job, ready[job], begin[job], now, held[job]))
            if following[job] >= 0:
                waiting.append(following[job])
                ready[following[job]] = now
        while count > 1 and base + count * now > capacity:
            job = newest.pop()
            if finish[job] < 0:
                continue
            finish[job] = -1
            count, base = count - 1, base - held[job] + begin[job]
            stints.append((job, ready[job], begin[job], now, held[job]))
            held[job], left[job], ready[job] = held[job] + now - begin[job], left[job] - now + begin[job], now
            waiting.appendleft(job)
    return stints


def load(stints: Stints, num_replicas: int) -> Loads:
    """Sums over the stints, at every decode step; exact, being whole numbers below 2^53."""
    steps_R = np.zeros(num_replicas, dtype=np.int64)
    np.maximum.at(steps_R, stints.replica_n, stints.stop_n)
    end_R = np.cumsum(steps_R + 1)
    offset_R = end_R - steps_R - 1
    begin_n, stop_n = offset_R[stints.replica_n] + stints.begin_n, offset_R[stints.replica_n] + stints.stop_n
    size, fed_n = int(end_R[-1]), stints.context_n - 1

    def change(weight_n: Ints | None = None) -> Numbers:
        return np.bincount(begin_n, weight_n, size) - np.bincount(stop_n, weight_n, size)

    active_F = np.cumsum(change())
    step_F = np.arange(size) - np.repeat(offset_R, steps_R + 1)
    context_F = np.cumsum(change(stints.context_n - stints.begin_n)) + active_F * step_F
    prefill_F = np.bincount(begin_n, fed_n, size)
    pairs_F = np.bincount(begin_n, causal_context(0, fed_n), size)
    return Loads(offset_R, steps_R, active_F, context_F, prefill_F, pairs_F)


def clock(costs: Costs, loads: Loads) -> Clock:
    """Seconds of every decode step. A step without active sequences takes none."""
    size = len(loads.active_F)
    decode_F, prefill_F = np.zeros(size), np.zeros(size)
    for first in range(0, size, SLICE):
        some = slice(first, first + SLICE)
        seconds = costs.decode_step_s(loads.active_F[some], loads.context_F[some])
        decode_F[some] = np.where(loads.active_F[some] > 0, seconds, 0.0)
    (filled,) = np.nonzero(loads.prefill_F)
    if len(filled):
        prefill_F[filled] = costs.prefill_s(loads.prefill_F[filled], loads.pairs_F[filled])
    step_F, time_F = prefill_F + decode_F, np.zeros(size)
    check_seconds("prefill and decode steps", step_F)
    for first, steps in zip(loads.offset_R.tolist(), loads.steps_R.tolist(), strict=True):
        np.cumsum(step_F[first : first + steps], out=time_F[first + 1 : first + steps + 1])
    return Clock(time_F, prefill_F, decode_F)


def check_seconds(what: str, seconds: Floats) -> None:
    """ValueError for costs that are negative or not finite."""
    low = float(seconds.min(initial=0.0))
    if low < 0 or not np.isfinite(seconds).all():
        bad = seconds[~(np.isfinite(seconds) & (seconds >= 0))][0]
        raise ValueError(f"costs of {what}: found {bad} seconds, expected finite numbers, 0 or more")


def measure(costs: Costs, stints: Stints, loads: Loads, times: Clock) -> Rollout:
    """The rollout as a whole: it ends when its slowest replica does."""
    num_replicas, (active_time_s, active_n) = len(loads.steps_R), _active(loads, times)
    waited_n = times.time_F[loads.offset_R[stints.replica_n] + stints.begin_n]
    waited_n = waited_n - times.time_F[loads.offset_R[stints.replica_n] + stints.ready_n]
    decode_s, ops_per_byte = float(times.decode_s_F.sum()), None
    intensity = getattr(costs, "operations_per_byte", None)
    if intensity is not None and decode_s > 0:
        (busy,) = np.nonzero(loads.active_F)
        ops_per_byte = float(np.average(intensity(loads.active_F[busy], loads.context_F[busy]), weights=times.decode_s_F[busy]))
    return Rollout(
        prefill_s=float(times.prefill_s_F.sum()) / num_replicas,
        decode_s=decode_s / num_replicas,
        seconds=float(times.time_F[loads.offset_R + loads.steps_R].max()),
        decode_steps=int(loads.steps_R.max()),
        busy_slot_s=float(loads.active_F @ (times.prefill_s_F + times.decode_s_F)),
        queue_s=float(waited_n.sum()),
        prefill_tokens=int(loads.prefill_F.sum()),
        ops_per_byte=ops_per_byte,
        active_time_s=active_time_s,
        active_n=active_n,
    )


def _active(loads: Loads, times: Clock) -> tuple[Floats, Ints]:
    """Sequences that decode, over time, all replicas together; only where their number changes."""
    change_F = np.diff(loads.active_F, prepend=0)
    (at,) = np.nonzero(change_F)
    time_n, place_n = np.unique(times.time_F[at], return_inverse=True)
    active_n = np.cumsum(np.bincount(place_n, change_F[at], len(time_n)).astype(np.int64))
    keep_n = np.diff(active_n, prepend=0) != 0
    return time_n[keep_n], active_n[keep_n]
