"""Continuous batching on one replica, as vLLM does it: who decodes when, and who is preempted. In decode steps and tokens."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from sim.clock.compiled import compiled
from sim.clock.decoding import Ints

Jobs = Sequence[int] | Ints


def queued(context: Jobs, new: Jobs, *, places: int, capacity: int, following: Jobs | None = None, unused: int = 0) -> Ints:
    """A row (job, ready, begin, stop, context) for each stint, by stop.

    context, new   per job: tokens to prefill (prompt and response so far), tokens to decode, at least one
    places         sequences that may decode at once
    capacity       tokens that the cache holds: at each decode step the sum of the context of those that decode
    unused         tokens of the cache that each of them holds beside, in its last block
    following      per job: the job that comes when it ends, or -1 (the next response of a slot); None: none

    First come, first served, nobody overtakes: the head of the queue begins as soon as a place is free and its context fits. The
    cache of those that decode grows by a token each per step. When it overflows, whoever began last goes back to the head of the
    queue, and its tokens so far are prefilled again (recompute preemption). Shared prefixes are left out.
    """
    followers = np.full(len(new), -1, dtype=np.int64) if following is None else np.asarray(following, dtype=np.int64)
    stints = run_queue(np.asarray(context, dtype=np.int64) + unused, np.asarray(new, dtype=np.int64), places, capacity, followers)
    stints[:, 4] -= unused
    return stints


@compiled
def run_queue(context: Ints, new: Ints, places: int, capacity: int, following: Ints) -> Ints:
    """See `queued`."""
    num = len(new)
    held, left, ready, begin = context.copy(), new.copy(), np.zeros(num, np.int64), np.zeros(num, np.int64)
    finish = np.full(num, -1)  # the step at which a job ends; -1: it does not decode
    newest = np.empty(2 * num + 1, np.int64)  # those that decode, by when they began; holds some that ended
    stints, written, num_newest = np.empty((2 * num, 5), np.int64), 0, 0
    behind, first, last = _waiting(following)  # the queue: who stands behind whom
    due = [(0, 0) for _ in range(0)]
    now = count = base = 0  # the cache holds base + count * now tokens
    while first >= 0 or count:
        while first >= 0 and count < places and (base + count * now + held[first] <= capacity or not count):
            job, first = first, behind[first]
            begin[job], finish[job] = now, now + left[job]
            heapq.heappush(due, (int(finish[job]), int(job)))
            if num_newest == len(newest):
                num_newest = _drop_ended(newest, finish)
            newest[num_newest] = job
            num_newest += 1
            count, base = count + 1, base + held[job] - now
        while finish[due[0][1]] != due[0][0]:  # it was preempted since
            heapq.heappop(due)
        now = min(due[0][0], now + (capacity - base - count * now) // count + 1)
        while len(due) and due[0][0] == now:
            job = heapq.heappop(due)[1]
            if finish[job] != now:
                continue
            count, base, written, stints = _close(job, now, count, base, held, begin, ready, finish, stints, written)
            follower = following[job]
            if follower >= 0:
                ready[follower], behind[follower] = now, -1
                if first < 0:
                    first = follower
                else:
                    behind[last] = follower
                last = follower
        while count > 1 and base + count * now > capacity:
            num_newest -= 1
            job = newest[num_newest]
            if finish[job] < 0:
                continue
            count, base, written, stints = _close(job, now, count, base, held, begin, ready, finish, stints, written)
            held[job], left[job], ready[job] = held[job] + now - begin[job], left[job] - now + begin[job], now
            if first < 0:
                last = job
            behind[job], first = first, job
    return stints[:written]


@compiled
def _close(
    job: int, now: int, count: int, base: int, held: Ints, begin: Ints, ready: Ints, finish: Ints, stints: Ints, written: int
) -> tuple[int, int, int, Ints]:
    """The job stops decoding: its stint is written down, its cache is free."""
    finish[job] = -1
    if written == len(stints):
        longer = np.empty((2 * written, 5), np.int64)
        for row in range(written):  # by numbers: numba takes seconds to compile a copy of slices
            for column in range(5):
                longer[row, column] = stints[row, column]
        stints = longer
    stints[written, 0], stints[written, 1], stints[written, 2] = job, ready[job], begin[job]
    stints[written, 3], stints[written, 4] = now, held[job]
    return count - 1, base - held[job] + begin[job], written + 1, stints


@compiled
def _waiting(following: Ints) -> tuple[Ints, int, int]:
    """The queue at first: all jobs that follow no other, in order, as (who stands behind each, its first, its last)."""
    num = len(following)
    behind, comes_later, first, last = np.full(num, -1), np.zeros(num, np.bool_), -1, -1
    for job in range(num):
        if following[job] >= 0:
            comes_later[following[job]] = True
    for job in range(num):
        if comes_later[job]:
            continue
        if first < 0:
            first = job
        else:
            behind[last] = job
        last = job
    return behind, first, last


@compiled
def _drop_ended(newest: Ints, finish: Ints) -> int:
    """Keeps those that decode at the front of `newest`; how many they are."""
    kept = 0
    for at in range(len(newest)):
        if finish[newest[at]] >= 0:
            newest[kept] = newest[at]
            kept += 1
    return kept
