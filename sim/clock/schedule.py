"""The clock of successive batching: windows of responses with known lengths, and what they take. T-PPO and PPO.

One step: every replica decodes a window -> the policy trains on the window's tokens, the value model on the responses that ended
-> weights to the engines. windows.py makes the decisions, in decode steps; decoding.py turns them into seconds.

Where the KV cache of a replica is too small for what its slots hold, the decisions stay (which response decodes in which slot, for
how many tokens) and only their time changes: each slot hands its pieces of work to the engine, the next when the last has ended;
the engine queues and preempts them as `queueing.queued` says. So a window may take more than `window` decode steps. A real batcher
would count those steps and cut earlier; with as many slots as the cache holds the two agree.

The other systems are in systems.py.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np

from sim.clock.cluster import Rows, Samples, Setup, Timeline, capacity_of, check_count, step_record, train
from sim.clock.compiled import AVAILABLE
from sim.clock.decoding import Ints, Rollout, Stints, clock, load, measure
from sim.clock.queueing import queued
from sim.clock.trace import StepRecord, Trace, check_conservation
from sim.clock.windows import CompiledWindows, ReadableWindows
from tppo_ref.method.records import End
from tppo_ref.method.slots import Refill

Tail = Literal["exclude", "defer"]


class System(Protocol):
    """Something that trains, step after step."""

    name: str

    def step(self) -> StepRecord: ...


def run(
    system: System, *, steps: int | None = None, updates: int | None = None, tokens: int | None = None, max_steps: int = 100_000
) -> Trace:
    """Steps until one of the given limits is met: training steps, updates of the policy, or trained tokens.

    RuntimeError after `max_steps` that did not get there.
    """
    limits = {"steps": steps, "updates": updates, "tokens": tokens}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    if not given:
        raise ValueError("steps, updates, tokens: expected one of them, got none")
    for name, limit in given.items():
        check_count(name, limit)
    records: list[StepRecord] = []
    sofar = dict.fromkeys(limits, 0)
    while all(sofar[name] < limit for name, limit in given.items()):
        if len(records) == max_steps:
            raise RuntimeError(f"{system.name}: {max_steps} steps brought {sofar}, expected to reach {given}")
        records.append(system.step())
        sofar["steps"] += 1
        sofar["updates"] += records[-1].updates
        sofar["tokens"] += records[-1].trained
    check_conservation(records)
    return Trace(system=system.name, records=tuple(records))


class Windowed:
    """T-PPO: windows of `window` decode steps. PPO is the same with the window as long as a response and refill="step".

    tail             last `tail_tokens` of a cut row: left out for good ("exclude"), or trained in the next window ("defer"); the
                     masks are those of `tppo_ref.method.masks`
    min_new_tokens   a cut row with fewer untrained tokens trains none of them in this step, but in the next; at most the window
    train_on         "ended": a response trains when it has ended, whole and once (partial rollouts by windows, `policy.train_on`)
    readable         decisions by `SlotSchedule` itself, not by the compiled loop that equals it (windows.py); None: where numba is
                     missing, and where lengths grow, since the loop draws samples early

    `segments` are the last step's: the replica of each, and rows (slot, sample, begin, stop, end), in decode steps.
    """

    def __init__(
        self, setup: Setup, *, window: int, refill: Refill = "immediate", tail: Tail = "exclude", tail_tokens: int = 8,
        min_new_tokens: int = 0, train_on: Literal["window", "ended"] = "window", name: str = "tppo", readable: bool | None = None,
    ):  # fmt: skip
        if tail not in ("exclude", "defer"):
            raise ValueError(f"tail: got {tail!r}; expected one of exclude, defer")
        if refill not in ("immediate", "step"):
            raise ValueError(f"refill: got {refill!r}; expected one of immediate, step; for batch take systems.Synchronous")
        check_count("tail_tokens", tail_tokens, least=0)
        if tail == "defer" and tail_tokens > window:
            raise ValueError(f"tail_tokens: got {tail_tokens}; expected at most the window, {window}, to train in the next")
        check_count("min_new_tokens", min_new_tokens, least=0)
        if min_new_tokens > window:
            raise ValueError(f"min_new_tokens: got {min_new_tokens}; expected at most the window, {window}")
        if train_on not in ("window", "ended"):
            raise ValueError(f"train_on: got {train_on!r}; expected one of window, ended")
        if not setup.recipe.critic and window < setup.lengths.cap and train_on == "window":
            raise ValueError("critic is off: a response that is cut has no reward yet, and nothing else to learn from")
        self.min_new_tokens, self.whole = min_new_tokens, train_on == "ended"
        self.setup, self.name, self.tail, self.tail_tokens = setup, name, tail, tail_tokens
        if readable is None:
            growth = getattr(setup.lengths, "growth", None)
            readable = not AVAILABLE or (growth is not None and len(growth.factors) > 1)
        make = ReadableWindows if readable else CompiledWindows
        self.replicas = [make(setup, replica, window=window, refill=refill) for replica in range(setup.num_replicas)]
        self.samples, self.timeline, self.num_steps, self.num_updates = Samples(setup), Timeline(setup), 0, 0

    def step(self) -> StepRecord:
        """One window on every replica, and the updates on it."""
        setup, samples, step = self.setup, self.samples, self.num_steps
        windows = [self._window(replica) for replica in range(setup.num_replicas)]
        replica_n = np.repeat(np.arange(len(windows)), [len(window) for window in windows])
        self.segments = replica_n, np.concatenate(windows)
        slot_n, id_n, begin_n, stop_n, end_n = self.segments[1].T
        row, new_n, cut_n = samples.at(id_n), stop_n - begin_n, end_n == End.RUNNING
        context_n, done_n, begun_n = row.prompt + row.done, row.done + new_n, row.done > 0
        rollout, preemptions = self._time(Stints(replica_n, np.arange(len(id_n)), begin_n, begin_n, stop_n, context_n), slot_n)

        unsettled_n = row.pending + new_n
        waits_n = cut_n & (self.whole | (unsettled_n < self.min_new_tokens))
        kept_n = np.where(waits_n, unsettled_n, np.where(cut_n, np.minimum(self.tail_tokens, unsettled_n), 0))
        trained_n = unsettled_n - kept_n
        pending_n = np.where(waits_n | (self.tail == "defer"), kept_n, 0)
        staleness_sum, staleness_max = self._staleness(id_n, row, new_n, trained_n)
        samples.put(id_n, done=done_n, pending=pending_n)

        trained, completed_length = int(trained_n.sum()), int(done_n[~cut_n].sum())
        fed_n, policy_n = row.prompt + done_n, ~waits_n
        again_n = (
            begun_n & policy_n & ~((self.whole | (self.min_new_tokens > 0)) & (row.pending == row.done))
        )  # what waited was not fed before
        level = "in_flight" if self.whole else "deferred"
        training = train(setup, (fed_n - unsettled_n)[policy_n], unsettled_n[policy_n], fed_n[~cut_n], trained=trained,
                         value_trained=completed_length)  # fmt: skip
        samples.release(int(id_n[cut_n].min(initial=np.iinfo(np.int64).max)))
        self.num_steps, self.num_updates = step + 1, self.num_updates + training.updates
        return step_record(
            setup, step, rollout, self.timeline.place(rollout.seconds, training), training,
            preemptions=preemptions, generated=int(new_n.sum()), trained=trained, **{level: int(pending_n.sum())},
            excluded=int((kept_n - pending_n).sum()),
            tokens_fed=int(fed_n[policy_n].sum()), prefix_tokens_trained=int(context_n[again_n].sum()),
            value_tokens_trained=int(fed_n[~cut_n].sum()),
            reprefilled_tokens=rollout.prefill_tokens - int((context_n - 1)[~begun_n].sum()),
            staleness_sum=staleness_sum, staleness_max=staleness_max,
            started=int((~begun_n).sum()), started_length=int(row.length[~begun_n].sum()),
            finished=int((~cut_n).sum()), capped=int((end_n == End.LENGTH_CAP).sum()),
            completed=int((~cut_n).sum()), completed_length=completed_length,
        )  # fmt: skip

    def _staleness(self, id_n: Ints, row: Rows, new_n: Ints, trained_n: Ints) -> tuple[int, int]:
        """Of the trained tokens in syncs: their sum, and the largest. What a cut row kept back is of the window before; a response
        that trains whole remembers the policies of all its windows."""
        step = self.num_steps
        lag, old_lag = (step - self.timeline.version(max(k, 0)) for k in (step, step - 1))
        if not self.whole:
            old_n = np.minimum(row.pending, trained_n)  # trained first
            longest = max(lag * bool((trained_n > old_n).any()), old_lag * bool(old_n.any()))
            return int((trained_n - old_n).sum()) * lag + int(old_n.sum()) * old_lag, longest
        sum_n = row.version_sum + (step - lag) * new_n
        first_n = np.where(row.done > 0, row.first_version, step - lag)
        self.samples.put(id_n, version_sum=sum_n, first_version=first_n)
        ended_n = trained_n > 0
        return int((step * trained_n - sum_n)[ended_n].sum()), int((step - first_n)[ended_n].max(initial=0))

    def _window(self, replica: int) -> Ints:
        """Rows (slot, sample, begin, stop, end) of this replica's window."""
        return self.replicas[replica].window(self.samples, self.num_updates)

    def _time(self, stints: Stints, slot_n: Ints) -> tuple[Rollout, int]:
        """The rollout in seconds, and its preemptions."""
        costs, num_replicas, num_segments = self.setup.costs, self.setup.num_replicas, len(slot_n)
        loads = load(stints, num_replicas)
        capacity = capacity_of(costs, stints)
        places_R = np.array([self.setup.places(replica, capacity) for replica in range(num_replicas)])
        share_R = np.array([self.setup.share(self.setup.slots, replica) for replica in range(num_replicas)])
        crowded_R = (loads.peak_context_R > capacity) | (places_R < share_R)
        if crowded_R.any():
            parts = [stints.only(~crowded_R[stints.replica_n])]
            for replica in np.flatnonzero(crowded_R):
                mine_n = stints.replica_n == replica
                parts.append(queue_slots(stints.only(mine_n), slot_n[mine_n], capacity, places_R[replica]))
            stints = Stints(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
            loads = load(stints, num_replicas)
        return measure(costs, stints, loads, clock(costs, loads)), len(stints.job_n) - num_segments


def queue_slots(stints: Stints, slot_n: Ints, capacity: int, places: int) -> Stints:
    """One replica's stints where its cache cannot hold all slots at once: each slot's segments come one after the other."""
    order = np.lexsort((stints.begin_n, slot_n))
    context_n, new_n, slot_n = stints.context_n[order], (stints.stop_n - stints.begin_n)[order], slot_n[order]
    following = np.where(np.append(slot_n[1:] == slot_n[:-1], False), np.arange(1, len(order) + 1), -1)
    found = queued(context_n, new_n, places=int(places), capacity=capacity, following=following)
    job_n, ready_n, begin_n, stop_n, context_n = found.T
    return Stints(np.full(len(job_n), stints.replica_n[0]), job_n, ready_n, begin_n, stop_n, context_n)


def tppo(setup: Setup, *, window: int, min_new_tokens: int = 0, **options: Any) -> Windowed:
    """T-PPO (arXiv 2506.15050): a window's tokens train at once, ended or not; the port's tail of 8 tokens [P]."""
    return Windowed(setup, window=window, min_new_tokens=min_new_tokens, **options)


def ppo(setup: Setup) -> Windowed:
    """Synchronous PPO: every slot decodes one whole response a step."""
    return Windowed(setup, window=setup.lengths.cap, refill="step", name="ppo")
