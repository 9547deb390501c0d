"""The clock of successive batching: windows of responses with known lengths, and what they take. T-PPO and PPO.

One step: every replica decodes a window -> the policy trains on the window's tokens, the value model on the responses that ended
-> weights to the engines. course.py says who decodes when, in decode steps; decoding.py turns them into seconds; here they train.

The other systems are in systems.py.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np

from sim.clock.cluster import Setup, Timeline, check_count, step_record, train
from sim.clock.course import Course, Window
from sim.clock.decoding import Ints
from sim.clock.trace import StepRecord, Trace, check_conservation
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
    readable         see course.Course
    course           who decodes when, where it is shared; None: its own

    `latest` is the last step's window, `segments` its decisions: the replica of each, and rows (slot, sample, begin, stop, end), in
    decode steps.
    """

    def __init__(
        self, setup: Setup, *, window: int, refill: Refill = "immediate", tail: Tail = "exclude", tail_tokens: int = 8,
        min_new_tokens: int = 0, train_on: Literal["window", "ended"] = "window", name: str = "tppo", readable: bool | None = None,
        course: Course | None = None,
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
        self.course = course or Course(setup, window=window, refill=refill, readable=readable)
        self.samples, self.timeline, self.num_steps, self.num_updates = self.course.samples, Timeline(setup), 0, 0
        self.pending_S, self.version_sum_S, self.first_version_S = np.zeros((3, setup.slots), dtype=np.int64)

    def step(self) -> StepRecord:
        """One window on every replica, and the updates on it."""
        setup, step, window = self.setup, self.num_steps, self.course.window(self.num_steps, self.num_updates)
        self.latest = window
        _, _, begin_n, stop_n, end_n = window.rows.T
        row, new_n, cut_n = window.before, stop_n - begin_n, end_n == End.RUNNING
        context_n, done_n, begun_n = row.prompt + row.done, row.done + new_n, row.done > 0
        rollout = window.rollout(setup.costs, keep=self.course.keep)

        old_n = np.where(begun_n, self.pending_S[window.place_n], 0)
        unsettled_n = old_n + new_n
        waits_n = cut_n & (self.whole | (unsettled_n < self.min_new_tokens))
        kept_n = np.where(waits_n, unsettled_n, np.where(cut_n, np.minimum(self.tail_tokens, unsettled_n), 0))
        trained_n = unsettled_n - kept_n
        pending_n = np.where(waits_n | (self.tail == "defer"), kept_n, 0)
        staleness_sum, staleness_max = self._staleness(window, old_n, new_n, trained_n)
        self.pending_S[window.place_n[cut_n]] = pending_n[cut_n]

        trained, completed_length = int(trained_n.sum()), int(done_n[~cut_n].sum())
        fed_n, policy_n = row.prompt + done_n, ~waits_n
        again_n = (
            begun_n & policy_n & ~((self.whole | (self.min_new_tokens > 0)) & (old_n == row.done))
        )  # what waited was not fed before
        level = "in_flight" if self.whole else "deferred"
        training = train(setup, (fed_n - unsettled_n)[policy_n], unsettled_n[policy_n], fed_n[~cut_n], trained=trained,
                         value_trained=completed_length)  # fmt: skip
        self.num_steps, self.num_updates = step + 1, self.num_updates + training.updates
        return step_record(
            setup, step, rollout, self.timeline.place(rollout.seconds, training), training,
            preemptions=window.preemptions, generated=int(new_n.sum()), trained=trained, **{level: int(pending_n.sum())},
            excluded=int((kept_n - pending_n).sum()),
            tokens_fed=int(fed_n[policy_n].sum()), prefix_tokens_trained=int(context_n[again_n].sum()),
            value_tokens_trained=int(fed_n[~cut_n].sum()),
            reprefilled_tokens=rollout.prefill_tokens - int((context_n - 1)[~begun_n].sum()),
            staleness_sum=staleness_sum, staleness_max=staleness_max,
            started=int((~begun_n).sum()), started_length=int(row.length[~begun_n].sum()),
            finished=int((~cut_n).sum()), capped=int((end_n == End.LENGTH_CAP).sum()),
            completed=int((~cut_n).sum()), completed_length=completed_length,
        )  # fmt: skip

    @property
    def segments(self) -> tuple[Ints, Ints]:
        """Of the last step: see the class."""
        return self.latest.replica_n, self.latest.rows

    def _staleness(self, window: Window, pending_n: Ints, new_n: Ints, trained_n: Ints) -> tuple[int, int]:
        """Of the trained tokens in syncs: their sum, and the largest. What a cut row kept back is of the window before; a response
        that trains whole remembers the policies of all its windows."""
        step, begun_n, place_n = self.num_steps, window.before.done > 0, window.place_n
        lag, old_lag = (step - self.timeline.version(max(k, 0)) for k in (step, step - 1))
        if not self.whole:
            old_n = np.minimum(pending_n, trained_n)  # trained first
            longest = max(lag * bool((trained_n > old_n).any()), old_lag * bool(old_n.any()))
            return int((trained_n - old_n).sum()) * lag + int(old_n.sum()) * old_lag, longest
        sum_n = np.where(begun_n, self.version_sum_S[place_n], 0) + (step - lag) * new_n
        first_n = np.where(begun_n, self.first_version_S[place_n], step - lag)
        ended_n = trained_n > 0
        self.version_sum_S[place_n[~ended_n]], self.first_version_S[place_n[~ended_n]] = sum_n[~ended_n], first_n[~ended_n]
        return int((step * trained_n - sum_n)[ended_n].sum()), int((step - first_n)[ended_n].max(initial=0))


def tppo(setup: Setup, *, window: int, min_new_tokens: int = 0, **options: Any) -> Windowed:
    """T-PPO (arXiv 2506.15050): a window's tokens train at once, ended or not; the port's tail of 8 tokens [P]."""
    return Windowed(setup, window=window, min_new_tokens=min_new_tokens, **options)


def ppo(setup: Setup) -> Windowed:
    """Synchronous PPO: every slot decodes one whole response a step."""
    return Windowed(setup, window=setup.lengths.cap, refill="step", name="ppo")
