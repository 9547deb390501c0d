"""Continuous batching on the same clock: PPO as everyone runs it, partial rollouts, tail batching, asynchronous training.

All of them decode with continuous batching (`queueing.queued`) instead of windows, and train whole responses that have ended. They
differ in when a rollout stops, in what becomes of the responses that still run then, and in which ones train.

    Synchronous        stop when all requests of the step have ended; a place that becomes free takes the next of them
    PartialRollouts    stop when enough responses ended; the others go on in the next step, under the next policy
    TailBatching       the same, but the others are given up and run again, together, in rounds of their own
    Asynchronous       never stop; train, on other devices, when enough responses ended and none can become too old

With no more requests than the batch needs (for Asynchronous: with max_staleness 0) each is synchronous PPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sim.clock.cluster import Rows, Samples, Setup, Timeline, Times, Training, capacity_of, check_count, step_record, train
from sim.clock.decoding import Clock, Floats, Ints, Loads, Rollout, Stints, all_at_once, clock, load, measure, only, steps_until
from sim.clock.queueing import queued
from sim.clock.trace import StepRecord

LAST = np.iinfo(np.int64).max


class Jobs(NamedTuple):
    """Requests, what their replicas would do with them if nothing stopped them, and when each would end, in seconds."""

    id_n: Ints
    replica_n: Ints
    row: Rows  # before
    stints: Stints
    loads: Loads
    times: Clock
    finish_s_n: Floats


class _Continuous:
    """What the three share: requests are decoded until a moment, whole responses are trained.

    running   begun and not ended, by replica, oldest first
    held      ended, not trained yet
    """

    name: str

    def __init__(self, setup: Setup, batch_responses: int):
        check_count("batch_responses", batch_responses)
        self.setup, self.batch_responses = setup, batch_responses
        self.samples, self.timeline, self.num_steps, self.num_updates = Samples(setup), Timeline(setup), 0, 0
        self.running: list[Ints] = [np.zeros(0, dtype=np.int64)] * setup.num_replicas
        self.held: Ints = np.zeros(0, dtype=np.int64)

    def _jobs(self, ids_R: Sequence[Ints]) -> Jobs:
        """First come, first served on each replica, to the end of the last request."""
        setup, id_n = self.setup, np.concatenate(ids_R)
        replica_n = np.repeat(np.arange(len(ids_R)), [len(ids) for ids in ids_R])
        row = self.samples.at(id_n)
        stints = all_at_once(replica_n, row.prompt + row.done, row.length - row.done)
        capacity, parts = capacity_of(setup.costs, stints), []
        peak_R = load(stints, setup.num_replicas).peak_context_R(setup.half_block)
        for replica, ids in enumerate(ids_R):
            part, places = only(stints, replica_n == replica), setup.places(replica, capacity)
            if len(ids) > places or peak_R[replica] > capacity:
                found = queued(part.context_n, part.stop_n, places=places, capacity=capacity, unused=setup.half_block)
                job_n, *others = found.T
                part = Stints(np.full(len(job_n), replica), part.job_n[job_n], *others)
            parts.append(part)
        stints = Stints(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
        loads = load(stints, setup.num_replicas)
        times, last_n = clock(setup.costs, loads), np.zeros_like(id_n)
        np.maximum.at(last_n, stints.job_n, stints.stop_n)
        return Jobs(id_n, replica_n, row, stints, loads, times, times.time_E[loads.at(replica_n, last_n)])

    def _decode(self, jobs: Jobs, stop_s: float, *, again: bool = False) -> tuple[Rollout, dict[str, int]]:
        """Until each replica's first decode step that ends at `stop_s` or later; updates samples, `running` and `held`.

        again   the requests had begun before, and what they had was given up
        Returns the rollout, and counts for the record.
        """
        setup, row = self.setup, jobs.row
        stints = jobs.stints.until(steps_until(setup.costs, jobs.loads, jobs.times, stop_s))
        loads = load(stints, setup.num_replicas)
        rollout = measure(setup.costs, stints, loads, clock(setup.costs, loads))

        new_n = np.bincount(stints.job_n, stints.stop_n - stints.begin_n, len(jobs.id_n)).astype(np.int64)
        version, done_n, ended_n = self.timeline.version(self.num_steps), row.done + new_n, row.done + new_n == row.length
        first_version_n = np.where(row.done > 0, row.first_version, version)
        self.samples.put(jobs.id_n, done=done_n, version_sum=row.version_sum + version * new_n, first_version=first_version_n)
        alive_n = (done_n > 0) & ~ended_n
        self.running = [jobs.id_n[alive_n & (jobs.replica_n == replica)] for replica in range(setup.num_replicas)]
        self.held = np.concatenate([self.held, jobs.id_n[ended_n]])

        first_n = (row.done == 0) & (new_n > 0) & (not again)
        return rollout, {
            "generated": int(new_n.sum()),
            "preemptions": len(stints.job_n) - int((new_n > 0).sum()),
            "reprefilled_tokens": rollout.prefill_tokens - int((row.prompt - 1)[first_n].sum()),
            "started": int(first_n.sum()),
            "started_length": int(row.length[first_n].sum()),
            "finished": int(ended_n.sum()),
            "capped": int((row.length[ended_n] == setup.lengths.cap).sum()),
        }

    def _start(self, jobs: Jobs) -> None:
        """The fresh requests that got a token have started; the others are handed out again."""
        fresh_n = (jobs.row.done == 0) & (self.samples.at(jobs.id_n).done > 0)
        for replica, num in enumerate(np.bincount(jobs.replica_n[fresh_n], minlength=self.setup.num_replicas).tolist()):
            self.samples.start(replica, num)

    def _training(self, batch: Ints) -> Training:
        row = self.samples.at(batch)
        trained = int(row.length.sum())
        return train(self.setup, row.prompt, row.length, row.prompt + row.length, trained=trained, value_trained=trained)

    def _record(
        self, batch: Ints, rollout: Rollout, times: Times, training: Training, counts: dict[str, int], alive: int = LAST
    ) -> StepRecord:
        """The step's record. The batch leaves `held`; `alive` is a sample, if any, that is still to come back."""
        step, row = self.num_steps, self.samples.at(batch)
        self.held = np.setdiff1d(self.held, batch)
        open_ids = np.concatenate([*self.running, self.held])
        fed = int((row.prompt + row.length).sum())
        record = step_record(
            self.setup, step, rollout, times, training, **counts, trained=int(row.length.sum()),
            in_flight=int(self.samples.at(open_ids).done.sum()), tokens_fed=fed, prefix_tokens_trained=0, value_tokens_trained=fed,
            staleness_sum=int((step * row.length - row.version_sum).sum()),
            staleness_max=int((step - row.first_version).max(initial=0)),
            completed=len(batch), completed_length=int(row.length.sum()),
        )  # fmt: skip
        self.samples.release(min(int(open_ids.min(initial=LAST)), alive))
        self.num_steps, self.num_updates = step + 1, self.num_updates + training.updates
        return record


def first_ended(id_n: Ints, finish_s_n: Floats, num: int) -> tuple[Ints, float]:
    """The `num` requests that end first, and when the last of them does; 0 for none."""
    order = np.lexsort((id_n, finish_s_n))[:num]
    return id_n[order], float(finish_s_n[order].max(initial=0.0))


class Synchronous(_Continuous):
    """PPO with more responses per step than slots: a place that becomes free takes the step's next response, until all have ended.

    So only the step's end is idle. With as many responses as slots it is `schedule.ppo`, to the last digit.
    """

    name = "ppo"

    def step(self) -> StepRecord:
        """A batch from its beginning to its end, and the updates on it."""
        replicas = range(self.setup.num_replicas)
        share = [len(range(replica, self.batch_responses, len(replicas))) for replica in replicas]
        jobs = self._jobs([self.samples.fresh(replica, share[replica], self.num_updates) for replica in replicas])
        rollout, counts = self._decode(jobs, np.inf)
        self._start(jobs)
        training = self._training(jobs.id_n)
        return self._record(jobs.id_n, rollout, self.timeline.place(rollout.seconds, training), training, counts)


class PartialRollouts(_Continuous):
    """Partial rollouts with over-provisioning (Kimi k1.5, arXiv 2501.12599; APRIL, 2509.18521).

    Each step fills up to `in_flight` requests and decodes until `batch_responses` have ended; these train, whole, in the step in
    which they ended. The others go on in the next step under its policy, their tokens so far prefilled again. What ends with the
    same decode step beyond the batch waits for the next. `in_flight` beyond the setup's slots queues; None: as many as the slots.
    """

    name = "partial"

    def __init__(self, setup: Setup, *, batch_responses: int, in_flight: int | None = None):
        super().__init__(setup, batch_responses)
        self.in_flight = setup.slots if in_flight is None else in_flight
        check_count("in_flight", self.in_flight, least=batch_responses)

    def step(self) -> StepRecord:
        """One rollout until the batch is full, and the updates on it."""
        num_R = [max(self.setup.share(self.in_flight, replica) - len(ids), 0) for replica, ids in enumerate(self.running)]
        fresh_R = [self.samples.fresh(replica, num, self.num_updates) for replica, num in enumerate(num_R)]
        jobs = self._jobs([np.concatenate(ids) for ids in zip(self.running, fresh_R, strict=True)])
        batch = np.sort(self.held)[: self.batch_responses]
        more, stop_s = first_ended(jobs.id_n, jobs.finish_s_n, self.batch_responses - len(batch))
        batch = np.concatenate([batch, more])
        rollout, counts = self._decode(jobs, stop_s)
        self._start(jobs)
        training = self._training(batch)
        return self._record(batch, rollout, self.timeline.place(rollout.seconds, training), training, counts)


class TailBatching(_Continuous):
    """Tail batching (RollPacker, arXiv 2509.21009): short rounds that give up what is long, and long rounds for that.

    A short round starts `in_flight` new requests and decodes until `batch_responses` have ended; what the others sampled is
    discarded and they are put aside. Once a batch of them is there, a long round runs it alone, from its beginning and to its end.
    So all tokens are of the current policy. Our reading of the paper [I]: what was sampled is discarded, not kept. Ours [O]: a
    response that runs again has the same length; one number over-provisions, where the paper has prompts and answers apart.
    `in_flight` beyond the setup's slots queues; None: as many as the slots.
    """

    name = "tail-batching"

    def __init__(self, setup: Setup, *, batch_responses: int, in_flight: int | None = None):
        super().__init__(setup, batch_responses)
        self.in_flight = setup.slots if in_flight is None else in_flight
        check_count("in_flight", self.in_flight, least=batch_responses)
        self.put_aside: Ints = np.zeros(0, dtype=np.int64)

    def step(self) -> StepRecord:
        """One round, short or long, and the updates on its batch."""
        replicas, discarded = range(self.setup.num_replicas), 0
        if len(self.put_aside) >= self.batch_responses:
            batch, self.put_aside = self.put_aside[: self.batch_responses], self.put_aside[self.batch_responses :]
            jobs = self._jobs([batch[replica :: len(replicas)] for replica in replicas])
            rollout, counts = self._decode(jobs, np.inf, again=True)
        else:
            num_R = [self.setup.share(self.in_flight, replica) for replica in replicas]
            jobs = self._jobs([self.samples.fresh(replica, num_R[replica], self.num_updates) for replica in replicas])
            batch, stop_s = first_ended(jobs.id_n, jobs.finish_s_n, self.batch_responses)
            rollout, counts = self._decode(jobs, stop_s)
            self._start(jobs)
            given_up = np.setdiff1d(np.concatenate([*self.running, self.held]), batch)
            discarded = int(self.samples.at(given_up).done.sum())
            self.samples.put(given_up, done=0, version_sum=0)
            self.put_aside = np.concatenate([self.put_aside, given_up])
            self.running, self.held = [ids[:0] for ids in self.running], batch
        training = self._training(batch)
        times = self.timeline.place(rollout.seconds, training)
        alive = int(self.put_aside.min(initial=LAST))
        return self._record(batch, rollout, times, training, counts | {"discarded": discarded}, alive)


class Asynchronous(_Continuous):
    """Fully asynchronous training with bounded staleness (AReaL, arXiv 2505.24298), on devices of its own (`setup.train_costs`).

    Engines decode without a break. Whenever the training devices are free and the batch is there they train it, oldest responses
    first; then the engines take the new weights between two decode steps, and prefill what they are decoding again.

    staleness of a response = versions between its first token and its own training <= max_staleness =: m. With batches of B:
        admission   while version i is out, at most B (i + m + 1) responses have ever started    (the rule of AReaL's code [V])
        waiting     at version i, for every d < m: of the responses that must train by version i + d, all but B d have ended
    Admission alone bounds how many are under way, not how old one gets: a long response is overtaken by younger ones, batch after
    batch. With `wait_for_old` the training waits for it, and the bound holds [O]; without, the system is the published one.
    """

    name = "async"

    def __init__(self, setup: Setup, *, batch_responses: int, max_staleness: int, wait_for_old: bool = True):
        super().__init__(setup, batch_responses)
        check_count("max_staleness", max_staleness, least=0)
        if setup.train_costs is None or setup.pipelined:
            raise ValueError("asynchronous training needs train_costs, its own devices, and has a pipeline of its own")
        self.max_staleness, self.wait_for_old, self._now_s = max_staleness, wait_for_old, 0.0

    def step(self) -> StepRecord:
        """From one weight sync to the next: what is decoded meanwhile, and the batch that trains."""
        setup, samples, step = self.setup, self.samples, self.num_steps
        limit = self.batch_responses * (step + self.max_staleness + 1)  # samples from this one on may not start yet
        num_R = np.maximum(limit - samples.next_R + setup.num_replicas - 1, 0) // setup.num_replicas
        fresh_R = [samples.fresh(replica, num, self.num_updates) for replica, num in enumerate(num_R.tolist())]
        jobs = self._jobs([np.concatenate(ids) for ids in zip(self.running, fresh_R, strict=True)])
        held = samples.at(self.held)
        id_n = np.concatenate([self.held, jobs.id_n])
        finish_s_n = np.concatenate([np.zeros(len(self.held)), jobs.finish_s_n])
        begun_n = np.concatenate([held.first_version, np.where(jobs.row.done > 0, jobs.row.first_version, step)])
        ready_s = self._ready_s(finish_s_n, begun_n)
        (ended_n,) = np.nonzero(finish_s_n <= ready_s)
        batch = id_n[ended_n[np.lexsort((id_n[ended_n], begun_n[ended_n]))][: self.batch_responses]]

        training = self._training(batch)
        trained_s = ready_s + setup.verify_s + sum(training[:-1])
        rollout, counts = self._decode(jobs, trained_s)
        self._start(jobs)
        seconds, sync_s, begin_s = max(rollout.seconds, trained_s), float(setup.costs.sync_s()), self._now_s
        self._now_s += seconds + sync_s
        times = Times(begin_s, begin_s, self._now_s, 0.0, setup.verify_s, sync_s, ready_s)
        return self._record(batch, rollout._replace(seconds=seconds), times, training, counts)

    def _ready_s(self, finish_s_n: Floats, begun_n: Ints) -> float:
        """When the batch is there: enough responses have ended, and enough of the old ones."""
        ready_s = float(np.partition(finish_s_n, self.batch_responses - 1)[self.batch_responses - 1])
        for later in range(self.max_staleness if self.wait_for_old else 0):
            old_s = np.sort(finish_s_n[begun_n <= self.num_steps + later - self.max_staleness])
            needed = len(old_s) - self.batch_responses * later
            assert needed <= self.batch_responses, "admission lets in no more than can be trained in time"
            ready_s = max(ready_s, float(old_s[needed - 1]) if needed > 0 else 0.0)
        return ready_s
