"""The course of successive batching: who decodes when, window after window, on all replicas. What methods that decode alike share.

Lengths, slots, the window and the cache decide it; seconds do not, nor what trains on it. So a course may be kept and read by many:
T-PPO with any lever, partial rollouts by windows, at every level of efficiency (`kept`).

Where the KV cache of a replica is too small for what its slots hold, the decisions stay (which response decodes in which slot, for
how many tokens) and only their time changes: each slot hands its pieces of work to the engine, the next when the last has ended;
the engine queues and preempts them as `queueing.queued` says. So a window may take more than `window` decode steps. A real batcher
would count those steps and cut earlier; with as many slots as the cache holds the two agree.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from sim.clock.cluster import Recipe, Rows, Samples, Setup, capacity_of
from sim.clock.compiled import AVAILABLE
from sim.clock.decoding import Ints, Loads, Rollout, Stints, clock, load, measure, only
from sim.clock.hardware import Costs
from sim.clock.queueing import queued
from sim.clock.windows import CompiledWindows, ReadableWindows
from tppo_ref.method.records import End
from tppo_ref.method.slots import Refill

KEPT = 4
"""Courses that are kept at most: some 30 MB each."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Window:
    """One window of all replicas, by segment n: a stretch of decode steps in which a response holds a slot."""

    replica_n: Ints
    rows: Ints
    """(slot, sample, begin, stop, end), in decode steps; slots are counted on each replica."""
    place_n: Ints
    """The slot among those of all replicas."""
    before: Rows
    """Of the response, as the window found it."""
    stints: Stints
    loads: Loads
    preemptions: int
    rollouts: dict[Costs, Rollout] = dataclasses.field(default_factory=dict)

    def rollout(self, costs: Costs, *, keep: bool) -> Rollout:
        """The window in seconds."""
        if keep and costs in self.rollouts:
            return self.rollouts[costs]
        found = measure(costs, self.stints, self.loads, clock(costs, self.loads))
        if keep:
            self.rollouts[costs] = found
        return found


class Course:
    """Windows in their order. One that is kept can be read from its beginning again.

    readable   decisions by `SlotSchedule` itself, not by the compiled loop that equals it (windows.py); None: where numba is
               missing, and where lengths grow, since the loop draws samples early
    """

    def __init__(self, setup: Setup, *, window: int, refill: Refill, readable: bool | None = None, keep: bool = False):
        readable = (not AVAILABLE or grows(setup)) if readable is None else readable
        make = ReadableWindows if readable else CompiledWindows
        self.replicas = [make(setup, replica, window=window, refill=refill) for replica in range(setup.num_replicas)]
        self.setup, self.samples, self.keep, self.num_windows = setup, Samples(setup), keep, 0
        self.kept: list[Window] = []

    def window(self, index: int, updates: int) -> Window:
        """The window of this number; responses that begin in it are drawn as after so many updates."""
        if index < len(self.kept):
            return self.kept[index]
        assert index == self.num_windows, "windows come one after the other"
        found, self.num_windows = self._next(updates), index + 1
        if self.keep:
            self.kept.append(found)
        return found

    def _next(self, updates: int) -> Window:
        setup, samples = self.setup, self.samples
        windows = [replica.window(samples, updates) for replica in self.replicas]
        replica_n = np.repeat(np.arange(len(windows)), [len(window) for window in windows])
        rows = np.concatenate(windows)
        slot_n, id_n, begin_n, stop_n, end_n = rows.T
        before, cut_n = samples.at(id_n), end_n == End.RUNNING
        context_n = before.prompt + before.done
        stints, loads = self._admitted(Stints(replica_n, np.arange(len(id_n)), begin_n, begin_n, stop_n, context_n), slot_n)
        samples.put(id_n, done=before.done + stop_n - begin_n)
        samples.release(int(id_n[cut_n].min(initial=np.iinfo(np.int64).max)))
        first_R = np.cumsum([0, *(setup.share(setup.slots, replica) for replica in range(setup.num_replicas - 1))])
        return Window(
            replica_n=replica_n, rows=rows, place_n=first_R[replica_n] + slot_n, before=before, stints=stints, loads=loads,
            preemptions=len(stints.job_n) - len(id_n),
        )  # fmt: skip

    def _admitted(self, stints: Stints, slot_n: Ints) -> tuple[Stints, Loads]:
        """The stints as the engine admits and preempts them, and their loads."""
        setup, num_replicas = self.setup, self.setup.num_replicas
        loads, capacity = load(stints, num_replicas), capacity_of(setup.costs, stints)
        places_R = np.array([setup.places(replica, capacity) for replica in range(num_replicas)])
        share_R = np.array([setup.share(setup.slots, replica) for replica in range(num_replicas)])
        crowded_R = (loads.peak_context_R(setup.half_block) > capacity) | (places_R < share_R)
        if not crowded_R.any():
            return stints, loads
        parts = [only(stints, ~crowded_R[stints.replica_n])]
        for replica in np.flatnonzero(crowded_R):
            mine_n = stints.replica_n == replica
            parts.append(queue_slots(only(stints, mine_n), slot_n[mine_n], capacity, places_R[replica], setup.half_block))
        stints = Stints(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        return stints, load(stints, num_replicas)


def queue_slots(stints: Stints, slot_n: Ints, capacity: int, places: int, unused: int) -> Stints:
    """One replica's stints where its cache cannot hold all slots at once: each slot's segments come one after the other."""
    order = np.lexsort((stints.begin_n, slot_n))
    context_n, new_n, slot_n = stints.context_n[order], (stints.stop_n - stints.begin_n)[order], slot_n[order]
    following = np.where(np.append(slot_n[1:] == slot_n[:-1], False), np.arange(1, len(order) + 1), -1)
    found = queued(context_n, new_n, places=int(places), capacity=capacity, following=following, unused=unused)
    job_n, ready_n, begin_n, stop_n, context_n = found.T
    return Stints(np.full(len(job_n), stints.replica_n[0]), job_n, ready_n, begin_n, stop_n, context_n)


def grows(setup: Setup) -> bool:
    """Whether lengths depend on the updates made so far."""
    growths = (getattr(lengths, "growth", None) for lengths in (setup.lengths, setup.prompt_tokens))
    return any(growth is not None and len(growth.factors) > 1 for growth in growths)


@dataclasses.dataclass(frozen=True)
class _Room:
    """All that a course asks of costs."""

    kv_capacity_tokens: int | None


def kept(setup: Setup, *, window: int, refill: Refill) -> Course:
    """The course of this setup, of the last KEPT ones if it was asked for before. Not for lengths that grow."""
    room: Any = _Room(setup.costs.kv_capacity_tokens)
    bare = dataclasses.replace(
        setup, costs=room, train_costs=None, pipelined=False, updates_per_step=1, update_tokens=0, ranks=1, copies=1, verify_s=0.0,
        recipe=Recipe(),
    )  # fmt: skip
    return _kept(bare, window, refill)


@functools.lru_cache(maxsize=KEPT)
def _kept(setup: Setup, window: int, refill: Refill) -> Course:
    return Course(setup, window=window, refill=refill, keep=True)
