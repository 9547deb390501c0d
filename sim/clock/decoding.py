"""What an engine's decode steps take: who decodes in which of them, and from that the seconds at which each one ends.

Everything is counted in decode steps first and in seconds afterwards. A *job* is a request: so many tokens in the cache when it
begins, so many new ones. A *stint* is a stretch of decode steps in which a job decodes; a job that is preempted has several. Who
is admitted or preempted depends on tokens alone (queueing.py), so a faster machine runs the same stints.

    stints -> loads (active sequences and their context, by span) -> clock (seconds at each span's begin) -> rollout

A *span* is a stretch of decode steps in which nobody begins or stops. In it the context grows by one token per sequence and step,
and a decode step's seconds along a straight line with it (hardware.Costs), so that first and last step give their sum.

Suffixes: n stints, R engine replicas, E spans of all replicas, one after the other: those of replica r begin at first_R[r], and
the last of them is its end, of no steps.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from sim.clock.hardware import Costs, causal_context

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Numbers = NDArray[Any]  # whole numbers, in whichever type the sums come


Table = TypeVar("Table", bound=tuple[Any, ...])


def only(table: Table, some_n: NDArray[np.bool_]) -> Table:
    """Of a named tuple of columns, these rows."""
    return type(table)(*(column_n[some_n] for column_n in table))


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

    def until(self, stop_R: Ints) -> Stints:
        """What is left of the stints when replica r stops after stop_R[r] decode steps."""
        cut = self._replace(stop_n=np.minimum(self.stop_n, stop_R[self.replica_n]))
        return only(cut, cut.stop_n > cut.begin_n)


class Loads(NamedTuple):
    """By span: its first decode step and how many there are; sequences that get a token in each of them; the context that they
    attend to in the first one; what is prefilled before that (tokens, and their query-key pairs). The last token of a sequence is
    fed by the decode step itself, so prefill has one token less."""

    steps_R: Ints  # decode steps of each replica
    first_R: Ints
    step_E: Ints
    length_E: Ints
    active_E: Ints
    context_E: Numbers
    prefill_E: Numbers
    pairs_E: Numbers

    @property
    def last_context_E(self) -> Numbers:
        """In the span's last step."""
        return self.context_E + self.active_E * np.maximum(self.length_E - 1, 0)

    def peak_context_R(self, unused: int = 0) -> Numbers:
        """Most tokens in a replica's cache at once, if each sequence holds so many more than it uses."""
        return np.maximum.reduceat(self.last_context_E + unused * self.active_E, self.first_R)

    def at(self, replica_n: Ints, step_n: Ints) -> Ints:
        """The spans that begin with these decode steps of these replicas. Something has to begin or stop there."""
        virtual_R = np.cumsum(self.steps_R + 1) - self.steps_R - 1
        virtual_E = self.step_E + np.repeat(virtual_R, np.diff(np.append(self.first_R, len(self.step_E))))
        return np.searchsorted(virtual_E, virtual_R[replica_n] + step_n)


class Clock(NamedTuple):
    """Seconds, from the rollout's begin, before each span and its prefill (`time_E`); of its prefill and of its decode steps."""

    time_E: Floats
    prefill_s_E: Floats
    decode_s_E: Floats


class Curve(NamedTuple):
    """Sequences that decode on a replica, by span: `time_E` seconds after the rollout's begin."""

    time_E: Floats
    change_E: Ints

    def merged(self) -> tuple[Floats, Ints]:
        """Of all replicas together: n[i] of them from second t[i] on, only where their number changes."""
        (at,) = np.nonzero(self.change_E)
        time_n, place_n = np.unique(self.time_E[at], return_inverse=True)
        active_n = np.cumsum(np.bincount(place_n, self.change_E[at], len(time_n)).astype(np.int64))
        keep_n = np.diff(active_n, prepend=0) != 0
        return time_n[keep_n], active_n[keep_n]


class Rollout(NamedTuple):
    """One rollout in seconds. Prefill and decode are means over the replicas; `busy_slot_s` counts the seconds of every sequence
    that decodes, or waits for the prefill of others."""

    prefill_s: float
    decode_s: float
    seconds: float
    decode_steps: int
    busy_slot_s: float
    queue_s: float
    prefill_tokens: int
    ops_per_byte: float | None
    curve: Curve


def all_at_once(replica_n: Ints, context_n: Ints, new_n: Ints) -> Stints:
    """Every job begins at step 0: there is room for all."""
    zeros_n = np.zeros_like(new_n)
    return Stints(replica_n, np.arange(len(new_n)), zeros_n, zeros_n, new_n, context_n)


def load(stints: Stints, num_replicas: int) -> Loads:
    """Sums over the stints, span by span; exact, being whole numbers below 2^53."""
    steps_R = np.zeros(num_replicas, dtype=np.int64)
    if len(stints.stop_n) and (np.diff(stints.replica_n) >= 0).all():  # grouped by replica, as windows are
        (first_n,) = np.nonzero(np.diff(stints.replica_n, prepend=-1))
        steps_R[stints.replica_n[first_n]] = np.maximum.reduceat(stints.stop_n, first_n)
    else:
        np.maximum.at(steps_R, stints.replica_n, stints.stop_n)
    end_R = np.cumsum(steps_R + 1)
    offset_R = end_R - steps_R - 1  # decode steps of all replicas on one line, each with a place for its end
    begin_n, stop_n = offset_R[stints.replica_n] + stints.begin_n, offset_R[stints.replica_n] + stints.stop_n
    marked = np.zeros(int(end_R[-1]), dtype=bool)
    for places in (begin_n, stop_n, offset_R, end_R - 1):
        marked[places] = True
    (place_E,) = np.nonzero(marked)
    index, size, fed_n = np.cumsum(marked) - 1, len(place_E), stints.context_n - 1
    begin_n, stop_n, first_R = index[begin_n], index[stop_n], index[offset_R]

    def change(weight_n: Ints | None = None) -> Numbers:
        return np.bincount(begin_n, weight_n, size) - np.bincount(stop_n, weight_n, size)

    active_E = np.cumsum(change())
    step_E = place_E - np.repeat(offset_R, np.diff(np.append(first_R, size)))
    length_E = np.diff(place_E, append=place_E[-1] + 1)
    length_E[index[end_R - 1]] = 0
    context_E = np.cumsum(change(stints.context_n - stints.begin_n)) + active_E * step_E
    prefill_E = np.bincount(begin_n, fed_n, size)
    pairs_E = np.bincount(begin_n, causal_context(0, fed_n), size)
    return Loads(steps_R, first_R, step_E, length_E, active_E, context_E, prefill_E, pairs_E)


def clock(costs: Costs, loads: Loads) -> Clock:
    """Seconds of every span. Decode steps without active sequences take none."""
    first_E = costs.decode_step_s(loads.active_E, loads.context_E)
    last_E = costs.decode_step_s(loads.active_E, loads.last_context_E)
    decode_s_E = np.where(loads.active_E > 0, loads.length_E * (first_E + last_E) / 2, 0.0)
    prefill_s_E, time_E = np.zeros(len(decode_s_E)), np.zeros(len(decode_s_E))
    (filled,) = np.nonzero(loads.prefill_E)
    if len(filled):
        prefill_s_E[filled] = costs.prefill_s(loads.prefill_E[filled], loads.pairs_E[filled])
    span_s_E = prefill_s_E + decode_s_E
    check_seconds("prefill and decode steps", span_s_E)
    bounds = np.append(loads.first_R, len(span_s_E)).tolist()
    for first, stop in itertools.pairwise(bounds):
        np.cumsum(span_s_E[first : stop - 1], out=time_E[first + 1 : stop])
    return Clock(time_E, prefill_s_E, decode_s_E)


def step_times(costs: Costs, loads: Loads, times: Clock, span: int) -> Floats:
    """Seconds at which each decode step of one span ends."""
    step = np.arange(int(loads.length_E[span]))
    active = np.full(len(step), loads.active_E[span])
    seconds = costs.decode_step_s(active, loads.context_E[span] + active * step) * (active > 0)
    return times.time_E[span] + times.prefill_s_E[span] + np.cumsum(seconds)


def steps_until(costs: Costs, loads: Loads, times: Clock, stop_s: float) -> Ints:
    """Decode steps of each replica until the first that ends at `stop_s` or later; all of them where none does."""
    steps_R = loads.steps_R.copy()
    bounds = np.append(loads.first_R, len(times.time_E)).tolist()
    for replica, (first, stop) in enumerate(itertools.pairwise(bounds)):
        span = first + int(np.searchsorted(times.time_E[first:stop], stop_s)) - 1  # the last span that begins before
        if first <= span < stop - 1:
            inside = int(np.searchsorted(step_times(costs, loads, times, span), stop_s)) + 1
            steps_R[replica] = loads.step_E[span] + min(inside, int(loads.length_E[span]))
        elif span < first:
            steps_R[replica] = 0
    return steps_R


def check_seconds(what: str, seconds: Floats) -> None:
    """ValueError for costs that are negative or not finite."""
    low = float(seconds.min(initial=0.0))
    if low < 0 or not np.isfinite(seconds).all():
        bad = seconds[~(np.isfinite(seconds) & (seconds >= 0))][0]
        raise ValueError(f"costs of {what}: got {bad} seconds; expected finite numbers, 0 or more")


def measure(costs: Costs, stints: Stints, loads: Loads, times: Clock) -> Rollout:
    """The rollout as a whole: it ends when its slowest replica does."""
    num_replicas, queue_s = len(loads.steps_R), 0.0
    late_n = stints.ready_n < stints.begin_n
    if late_n.any():
        late = only(stints, late_n)
        waits = [times.time_E[loads.at(late.replica_n, step_n)] for step_n in (late.begin_n, late.ready_n)]
        queue_s = float((waits[0] - waits[1]).sum())
    decode_s = float(times.decode_s_E.sum())
    return Rollout(
        prefill_s=float(times.prefill_s_E.sum()) / num_replicas,
        decode_s=decode_s / num_replicas,
        seconds=float(times.time_E.max()),
        decode_steps=int(loads.steps_R.max()),
        busy_slot_s=float(loads.active_E.astype(float) @ (times.prefill_s_E + times.decode_s_E)),
        queue_s=queue_s,
        prefill_tokens=int(loads.prefill_E.sum()),
        ops_per_byte=_ops_per_byte(costs, loads, times),
        curve=Curve(times.time_E, np.diff(loads.active_E, prepend=0)),
    )


def _ops_per_byte(costs: Costs, loads: Loads, times: Clock) -> float | None:
    """Mean over the seconds of decoding; within a span by Simpson's rule, since it bends a little."""
    intensity = getattr(costs, "operations_per_byte", None)
    (busy,) = np.nonzero(times.decode_s_E)
    if intensity is None or not len(busy):
        return None
    active, first, last = loads.active_E[busy], loads.context_E[busy], loads.last_context_E[busy]
    mean = (intensity(active, first) + 4 * intensity(active, (first + last) / 2) + intensity(active, last)) / 6
    return float(np.average(mean, weights=times.decode_s_E[busy]))
