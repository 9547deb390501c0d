"""The clock of successive batching: windows of responses with known lengths, and what they take. T-PPO and PPO.

One step: every replica decodes a window -> the policy trains on the window's tokens, the value model on the responses that ended
-> weights to the engines. course.py says who decodes when, in decode steps; decoding.py turns them into seconds; here they train.

The other systems are in systems.py.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sim.clock.cluster import Setup, Timeline, check_count, step_record, train
from sim.clock.course import Course, Window
from sim.clock.decoding import Ints, only
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


class Ended(NamedTuple):
    """Responses that ended and are not trained yet, each token once: by sample, the versions of the policies of its tokens."""

    sample_n: Ints
    prompt_n: Ints
    length_n: Ints
    version_sum_n: Ints
    first_version_n: Ints

    def beside(self, others: Ended) -> Ended:
        return Ended(*(np.concatenate(columns) for columns in zip(self, others, strict=True)))


def split_whole_groups(ended: Ended, size: int) -> tuple[Ended, Ended]:
    """Those whose group, `size` successive samples, has ended; those that wait for it: `tppo_ref.loop.groups` by the thousand."""
    _, group_n, num_g = np.unique(ended.sample_n // size, return_inverse=True, return_counts=True)
    whole_n = num_g[group_n] == size
    return only(ended, whole_n), only(ended, ~whole_n)


class Work(NamedTuple):
    """What a step trains: rows n of the policy, tokens before and in them; tokens of the responses that the value model reads."""

    prefix_n: Ints
    tokens_n: Ints
    value_n: Ints
    completed_length: int
    counts: dict[str, int]
    """Fields of a StepRecord that are the method's own."""


class Windowed:
    """T-PPO: windows of `window` decode steps. PPO is the same with the window as long as a response and refill="step".

    tail             last `tail_tokens` of a cut row: left out for good ("exclude"), or trained in the next window ("defer"); the
                     masks are those of `tppo_ref.method.masks`
    min_new_tokens   a cut row with fewer untrained tokens trains none of them in this step, but in the next; at most the window
    train_on         "ended": a response trains when it has ended, whole and once (partial rollouts by windows, `policy.train_on`);
                     without a critic, when all of its group have (docs/critic_free.md)
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
        self.group_size = 1 if setup.recipe.critic else setup.samples_per_prompt
        self.held = Ended(*np.zeros((5, 0), dtype=np.int64))

    def step(self) -> StepRecord:
        """One window on every replica, and the updates on it."""
        setup, step, window = self.setup, self.num_steps, self.course.window(self.num_steps, self.num_updates)
        self.latest = window
        _, _, begin_n, stop_n, end_n = window.rows.T
        row, new_n, cut_n = window.before, stop_n - begin_n, end_n == End.RUNNING
        begun_n = row.done > 0
        rollout = window.rollout(setup.costs, keep=self.course.keep)
        work = (self._ended if self.whole else self._unsettled)(window, new_n, cut_n)
        trained = work.counts["trained"]
        training = train(setup, work.prefix_n, work.tokens_n, work.value_n, trained=trained, value_trained=work.completed_length)
        self.num_steps, self.num_updates = step + 1, self.num_updates + training.updates
        return step_record(
            setup, step, rollout, self.timeline.place(rollout.seconds, training), training, preemptions=window.preemptions,
            generated=int(new_n.sum()), tokens_fed=int((work.prefix_n + work.tokens_n).sum()),
            value_tokens_trained=int(work.value_n.sum()),
            reprefilled_tokens=rollout.prefill_tokens - int((row.prompt + row.done - 1)[~begun_n].sum()),
            started=int((~begun_n).sum()), started_length=int(row.length[~begun_n].sum()),
            finished=int((~cut_n).sum()), capped=int((end_n == End.LENGTH_CAP).sum()),
            completed=len(work.value_n), completed_length=work.completed_length, **work.counts,
        )  # fmt: skip

    @property
    def segments(self) -> tuple[Ints, Ints]:
        """Of the last step: see the class."""
        return self.latest.replica_n, self.latest.rows

    def _unsettled(self, window: Window, new_n: Ints, cut_n: NDArray[np.bool_]) -> Work:
        """What the window decoded and what waited from the one before, but for what waits now. Staleness in syncs."""
        row, place_n, begun_n = window.before, window.place_n, window.before.done > 0
        old_n = np.where(begun_n, self.pending_S[place_n], 0)
        unsettled_n, done_n = old_n + new_n, row.done + new_n
        waits_n = cut_n & (unsettled_n < self.min_new_tokens)
        kept_n = np.where(waits_n, unsettled_n, np.where(cut_n, np.minimum(self.tail_tokens, unsettled_n), 0))
        trained_n = unsettled_n - kept_n
        pending_n = np.where(waits_n | (self.tail == "defer"), kept_n, 0)
        self.pending_S[place_n[cut_n]] = pending_n[cut_n]
        fed_n = row.prompt + done_n
        never_fed_n = (self.min_new_tokens > 0) & (old_n == row.done)  # it waited until now
        lag, old_lag = (self.num_steps - self.timeline.version(max(k, 0)) for k in (self.num_steps, self.num_steps - 1))
        late_n = np.minimum(old_n, trained_n)  # what waited is of the window before, and is trained first
        longest = max(lag * bool((trained_n > late_n).any()), old_lag * bool(late_n.any()))
        return Work(
            (fed_n - unsettled_n)[~waits_n], unsettled_n[~waits_n], fed_n[~cut_n], int(done_n[~cut_n].sum()),
            {"trained": int(trained_n.sum()), "deferred": int(pending_n.sum()), "excluded": int((kept_n - pending_n).sum()),
             "prefix_tokens_trained": int((row.prompt + row.done)[begun_n & ~waits_n & ~never_fed_n].sum()),
             "staleness_sum": int((trained_n - late_n).sum()) * lag + int(late_n.sum()) * old_lag, "staleness_max": longest},
        )  # fmt: skip

    def _ended(self, window: Window, new_n: Ints, cut_n: NDArray[np.bool_]) -> Work:
        """Responses that have ended, with their group where there is no critic; each remembers the policies of all its windows."""
        row, place_n, begun_n = window.before, window.place_n, window.before.done > 0
        version, length_n = self.timeline.version(self.num_steps), row.done + new_n
        sum_n = np.where(begun_n, self.version_sum_S[place_n], 0) + version * new_n
        first_n = np.where(begun_n, self.first_version_S[place_n], version)
        self.version_sum_S[place_n[cut_n]], self.first_version_S[place_n[cut_n]] = sum_n[cut_n], first_n[cut_n]
        fresh = only(Ended(window.rows[:, 1], row.prompt, length_n, sum_n, first_n), ~cut_n)
        ready, self.held = split_whole_groups(self.held.beside(fresh), self.group_size)
        trained = int(ready.length_n.sum())
        return Work(
            ready.prompt_n, ready.length_n, ready.prompt_n + ready.length_n, trained,
            {"trained": trained, "in_flight": int(length_n[cut_n].sum() + self.held.length_n.sum()), "prefix_tokens_trained": 0,
             "staleness_sum": self.num_steps * trained - int(ready.version_sum_n.sum()),
             "staleness_max": int((self.num_steps - ready.first_version_n).max(initial=0))},
        )  # fmt: skip


def tppo(setup: Setup, *, window: int, min_new_tokens: int = 0, **options: Any) -> Windowed:
    """T-PPO (arXiv 2506.15050): a window's tokens train at once, ended or not; the port's tail of 8 tokens [P]."""
    return Windowed(setup, window=window, min_new_tokens=min_new_tokens, **options)


def ppo(setup: Setup) -> Windowed:
    """Synchronous PPO: every slot decodes one whole response a step."""
    return Windowed(setup, window=setup.lengths.cap, refill="step", name="ppo")
