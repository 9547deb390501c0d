"""Who decodes in which slot of a window, how long: `SlotSchedule` driven with known lengths, or a compiled loop equal to it.

Both give rows (slot, sample, begin, stop, end) in decode steps, in the order in which an engine reports them: by the step with
which they finish, and within a step by when they were granted. A property test holds the two to each other, row by row.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from sim.clock.cluster import Samples, Setup
from sim.clock.compiled import compiled
from sim.clock.decoding import Ints
from tppo_ref.method.records import End
from tppo_ref.method.slots import Grant, Refill, Segment, SlotSchedule

RUNNING, END_TOKEN, LENGTH_CAP = int(End.RUNNING), int(End.END_TOKEN), int(End.LENGTH_CAP)


@contextlib.contextmanager
def paused_collector() -> Iterator[None]:
    """Without Python's cycle collector: a window makes tens of thousands of tuples and no cycle; the search doubles its time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def drive_window(
    schedule: SlotSchedule,
    draw: Callable[[], int | None],
    left_of: Callable[[list[Grant]], list[int]],
    fresh: Callable[[int], Iterator[int]],
) -> list[Segment]:
    """One window of `schedule`, decode step by decode step at which something finishes; its segments, in that order.

    draw      ids of new responses, in order
    left_of   tokens that each of the first grants' responses would still decode if nothing stopped it; more than the cap allows
              means that the cap ends it
    fresh     the same, for the responses that are drawn after the first `n` of this window

    Responses that finish with the same step do so in the order in which they were granted, as an engine reports them.
    """
    segments: list[Segment] = []
    calendar: list[list[tuple[int, int, bool]] | None] = [None] * (schedule.window + 1)
    due = bytearray(schedule.window + 2)  # 1 at decode steps with which something finishes: searched at the speed of memory
    drawn_before = len(schedule.carried) - schedule.carried.count(None)
    grants = schedule.open_window(draw)
    lengths: Iterator[int] = iter(left_of(grants))
    rest = fresh(len(grants) - drawn_before)
    now = 0
    while True:
        for (_, response, granted), left in zip(grants, lengths, strict=False):
            if left > granted:
                stop, entry = now + granted, (response, granted, False)
            else:
                stop, entry = now + left, (response, left, True)
            finishing = calendar[stop]
            if finishing is None:
                calendar[stop], due[stop] = [entry], 1
            else:
                finishing.append(entry)
        now = due.find(1, now + 1)
        if now < 0:
            return segments
        closed, grants = schedule.finish(now, calendar[now] or (), draw)
        calendar[now] = None  # its memory is used again while the processor's cache still has it
        segments += closed
        lengths = rest


def windows_of(schedule: SlotSchedule, lengths: Sequence[int]) -> Iterator[list[Segment]]:
    """Windows of `schedule` one after the other, until no response is left: response r has lengths[r] tokens, or the cap's.
    Their segments are in the order of `drive_window`, in decode steps since the window's begin."""
    ids, sampled = iter(range(len(lengths))), Counter[int]()
    draw = lambda: next(ids, None)  # noqa: E731
    left_of = lambda grants: [lengths[grant.response] - sampled[grant.response] for grant in grants]  # noqa: E731
    fresh = lambda drawn: iter(lengths[len(sampled) + drawn :])  # noqa: E731
    while segments := drive_window(schedule, draw, left_of, fresh):
        for segment in segments:
            sampled[segment.response] += segment.stop - segment.begin
        yield segments


class ReadableWindows:
    """One replica's windows, each decision made by `SlotSchedule`."""

    def __init__(self, setup: Setup, replica: int, *, window: int, refill: Refill):
        self.setup, self.replica = setup, replica
        self.schedule = SlotSchedule(
            slots=setup.share(setup.slots, replica), window=window, max_response_tokens=setup.lengths.cap, refill=refill
        )

    def window(self, samples: Samples, updates: int) -> Ints:
        """The next window's rows."""
        cap, stride, first = self.setup.lengths.cap, self.setup.num_replicas, int(samples.next_R[self.replica])

        def left_of(grants: list[Grant]) -> list[int]:
            ids = np.fromiter((grant.response for grant in grants), np.int64, len(grants))
            samples.require(int(ids.max()) + 1, updates)
            row = samples.at(ids)
            return (row.length + (row.length == cap) - row.done).tolist()

        def fresh(drawn: int) -> Iterator[int]:
            for piece in itertools.count(drawn, 256):
                yield from samples.lengths(first + piece * stride, 256, updates).tolist()

        with paused_collector():
            segments = drive_window(self.schedule, itertools.count(first, stride).__next__, left_of, fresh)
            rows = np.fromiter(itertools.chain.from_iterable(segments), np.int64, 5 * len(segments)).reshape(-1, 5)
            del segments  # before the collector comes back and looks through them
        samples.start(self.replica, int((rows[:, 1] >= first).sum()))
        return rows


class CompiledWindows:
    """The same by `run_window`. It keeps which sample stands in which slot, how far it got and has to go."""

    def __init__(self, setup: Setup, replica: int, *, window: int, refill: Refill):
        if isinstance(window, bool) or not isinstance(window, int) or window < 1:
            raise ValueError(f"window: got {window!r}; expected an integer of at least 1")
        self.setup, self.replica, self.length, self.immediate = setup, replica, window, refill == "immediate"
        self.id_S, self.done_S, self.left_S = np.zeros((3, setup.share(setup.slots, replica)), dtype=np.int64)
        self.id_S[:] = -1
        self.fresh = len(self.id_S) + 64  # samples that a window is expected to start, at most

    def window(self, samples: Samples, updates: int) -> Ints:
        """The next window's rows."""
        cap, stride, first = self.setup.lengths.cap, self.setup.num_replicas, int(samples.next_R[self.replica])
        while True:
            fresh = samples.lengths(first, self.fresh, updates)
            rows, started = run_window(self.id_S, self.done_S, self.left_S, fresh, first, stride, self.length, cap, self.immediate)
            if started >= 0:
                break
            self.fresh *= 2
        self.fresh = min(self.fresh, 64 + started + started // 4)
        slot_n, id_n, begin_n, stop_n, _ = rows[rows[:, 4] == RUNNING].T
        new_n, old_n = stop_n - begin_n, id_n < first
        left_n = np.where(old_n, self.left_S[slot_n], fresh[np.where(old_n, 0, (id_n - first) // stride)]) - new_n
        done_n = np.where(old_n, self.done_S[slot_n], 0) + new_n
        self.id_S = np.full(len(self.id_S), -1)
        self.id_S[slot_n], self.done_S[slot_n], self.left_S[slot_n] = id_n, done_n, left_n
        samples.start(self.replica, started)
        return rows


@compiled
def run_window(
    id_S: Ints, done_S: Ints, left_S: Ints, fresh: Ints, first: int, stride: int, window: int, cap: int, immediate: bool
) -> tuple[Ints, int]:
    """Rows of a window, and how many samples it started; -1 where `fresh` holds too few.

    id_S, done_S, left_S   what the slots carry: a sample or -1, its tokens so far, those that it would still decode if nothing
                           stopped it (more than the cap allows: the cap ends it)
    fresh                  the same number for the samples first, first + stride, ... that come next

    A calendar: grants wait in a list of their own at the decode step with which they finish, in the order in which they came.
    """
    size = len(id_S) + len(fresh)
    slot, sample, begin, end = (
        np.empty(size, np.int64),
        np.empty(size, np.int64),
        np.empty(size, np.int64),
        np.empty(size, np.int64),
    )
    behind, head, tail = np.full(size, -1), np.full(window + 1, -1), np.full(window + 1, -1)
    rows, written, granted, started = np.empty((size, 5), np.int64), 0, 0, 0
    done = left = 0
    for now in range(window + 1):
        grant = head[now]  # at step 0 the slots are filled, later those whose response ended are
        place = 0
        while grant >= 0 or (now == 0 and place < len(id_S)):
            if now == 0:
                where, who, done, left = place, id_S[place], done_S[place], left_S[place]
                place += 1
            else:
                where, who = slot[grant], -1
                rows[written, 0], rows[written, 1], rows[written, 2] = where, sample[grant], begin[grant]
                rows[written, 3], rows[written, 4] = now, end[grant]
                written += 1
                cut, grant = end[grant] == RUNNING, behind[grant]
                if cut or not immediate or now == window:
                    continue
            if who < 0:
                if started == len(fresh):
                    return rows[:0], -1
                who, done, left = first + stride * started, 0, fresh[started]
                started += 1
            allowed = min(window - now, cap - done)
            stop = now + min(left, allowed)
            slot[granted], sample[granted], begin[granted] = where, who, now
            end[granted] = END_TOKEN if left <= allowed else LENGTH_CAP if done + allowed == cap else RUNNING
            if head[stop] < 0:
                head[stop] = granted
            else:
                behind[tail[stop]] = granted
            tail[stop] = granted
            granted += 1
    return rows[:written], started
