"""What all systems on the clock share: the setup, samples with known lengths, what training costs, who waits for whom."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import numpy as np

from sim.clock.balance import waiting_factor
from sim.clock.decoding import Floats, Ints, Rollout, Stints, check_seconds
from sim.clock.distributions import Lengths
from sim.clock.hardware import Costs, causal_context
from sim.clock.lengths import prompt_lengths
from sim.clock.trace import StepRecord

UNBOUNDED = 1 << 62
BLOCK = 4096  # samples whose lengths are drawn together, about


RECIPES = {"prefix": ("full", "forward", "kept"), "logprobs": ("recompute", "engine"), "values": ("row", "window")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a step's training feeds, and to whom: the levers that make a continued response cheaper. Defaults: the paper's.

    Each has a price that no clock sees; methods.py names it.
    """

    prefix: Literal["full", "forward", "kept"] = "full"
    """Earlier tokens in the policy's update: with gradient; forward only, once; or their keys and values are kept from the pass
    for old log-probabilities."""
    logprobs: Literal["recompute", "engine"] = "recompute"
    """Old log-probabilities: one more pass, or those that the engine sampled with."""
    values: Literal["row", "window"] = "row"
    """The critic reads whole rows, or the window alone with what it knew of the tokens before."""
    critic: bool = True
    """False: groups of answers take its place."""

    def __post_init__(self) -> None:
        for name, choices in RECIPES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: got {getattr(self, name)!r}; expected one of {', '.join(choices)}")
        if self.prefix == "kept" and self.logprobs == "engine":
            raise ValueError("prefix: got 'kept' beside logprobs 'engine'; expected a pass whose keys and values could be kept")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """A cluster and its work. ValueError for numbers that make no sense."""

    lengths: Lengths
    """Response lengths; a response of `lengths.cap` tokens ended at the cap, for all that a length can tell."""
    prompt_tokens: Lengths | int
    """Prompt lengths, by group."""
    costs: Costs
    """Seconds; of the engines, and of training unless `train_costs` has it."""
    train_costs: Costs | None = None
    """Training on devices of its own (disaggregated); None: rollout and training take turns on the same devices (colocated)."""
    pipelined: bool = False
    """Disaggregated only: while a step trains, the next one's rollout runs, with weights that are one version old."""
    slots: int
    """Decoding places over all engine replicas."""
    num_replicas: int = 1
    samples_per_prompt: int = 1
    updates_per_step: int = 1
    """Optimiser steps of the policy and of the value model per training step, where update_tokens is 0."""
    update_tokens: int = 0
    """Trained tokens per optimiser step, about, as `policy.mini_batch_tokens`."""
    ranks: int = 1
    """Training ranks that rows are dealt to, whole; each mini-batch waits for the fullest (balance.py). 1: spread evenly."""
    copies: int = 1
    """Rows that each row stands for, where few replicas stand for all (steady.py)."""
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    """What training feeds."""
    admission: Literal["room", "whole"] = "room"
    """An engine begins a sequence when what it holds so far fits, and preempts when the cache overflows; or when it fits at its
    longest, so that it never preempts."""
    block_tokens: int = 1
    """Tokens that the cache is given out by; vLLM's blocks have 16. A sequence's last block is half empty, in the mean."""
    verify_s: float = 0.0
    """Seconds of verification per step that decoding does not hide."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("slots", "num_replicas", "samples_per_prompt", "updates_per_step", "ranks", "copies", "block_tokens"):
            check_count(name, getattr(self, name))
        check_count("update_tokens", self.update_tokens, least=0)
        if self.admission not in ("room", "whole"):
            raise ValueError(f"admission: got {self.admission!r}; expected one of room, whole")
        if self.slots < self.num_replicas:
            raise ValueError(f"slots: got {self.slots}; expected at least one for each of {self.num_replicas} engine replicas")
        if not 0 <= self.verify_s < float("inf"):
            raise ValueError(f"verify_s: got {self.verify_s!r}; expected seconds, 0 or more, finite")
        if self.pipelined and self.train_costs is None:
            raise ValueError("pipelined needs train_costs: a step cannot train while the next decodes on the same devices")

    @property
    def half_block(self) -> int:
        """Tokens of the cache that a sequence holds and does not use."""
        return self.block_tokens // 2

    def places(self, replica: int, capacity: int) -> int:
        """Sequences that a replica with so many tokens of cache decodes at once, at most."""
        slots = self.share(self.slots, replica)
        if self.admission == "room":
            return slots
        return max(1, min(slots, capacity // (self.lengths.cap + prompt_lengths(self.prompt_tokens).cap)))

    def share(self, total: int, replica: int) -> int:
        """This replica's part of `total` places or requests."""
        return total // self.num_replicas + (replica < total % self.num_replicas)


def check_count(name: str, value: int, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}; expected a whole number of at least {least}")


class Rows(NamedTuple):
    """What is known of samples, a column each.

    length, prompt     tokens, known beforehand
    done               tokens sampled so far
    first_version      of the policy that sampled the first token
    version_sum        versions of the policies that sampled the tokens so far, summed over the tokens
    """

    length: Ints
    prompt: Ints
    done: Ints
    first_version: Ints
    version_sum: Ints


class Samples:
    """Samples by number, and how far each one got. Sample g answers prompt g // samples_per_prompt; replica r draws r, r + R, ...

    Lengths are drawn in blocks, each from (seed, block): sample g has the same rank in its distribution under every system, so that
    two systems differ by what they do and not by their luck. Growth counts the policy's updates, at the first sample of a block.
    """

    def __init__(self, setup: Setup):
        self._setup, self._groups = setup, max(1, BLOCK // setup.samples_per_prompt)
        self._prompts = prompt_lengths(setup.prompt_tokens)
        self._rows, self._stop = Rows(*np.zeros((len(Rows._fields), 2 * BLOCK), dtype=np.int64)), 0
        self._base = 0  # the number of the first row
        self.next_R = np.arange(setup.num_replicas)  # the sample that each replica starts next

    def at(self, ids: Ints) -> Rows:
        """A copy of the rows of these samples."""
        return Rows(*(column[ids - self._base] for column in self._rows))

    def put(self, ids: Ints, **columns: Ints | int) -> None:
        for name, values in columns.items():
            getattr(self._rows, name)[ids - self._base] = values

    def fresh(self, replica: int, num: int, updates: int) -> Ints:
        """The next `num` samples of a replica. They are handed out again until `start` says that they started."""
        ids = self.next_R[replica] + self._setup.num_replicas * np.arange(num)
        self.require(int(self.next_R[replica]) + num * self._setup.num_replicas, updates)
        return ids

    def start(self, replica: int, num: int) -> None:
        self.next_R[replica] += num * self._setup.num_replicas

    def lengths(self, first: int, num: int, updates: int) -> Ints:
        """Of the `num` samples `first`, `first` + R, ... of a replica; cap + 1: the cap ends it.

        Reading ahead draws a block early; only growth could notice.
        """
        stride, cap = self._setup.num_replicas, self._setup.lengths.cap
        self.require(first + num * stride, updates)
        length = self._rows.length[first - self._base : first - self._base + num * stride : stride]
        return length + (length == cap)

    def release(self, oldest: int) -> None:
        """Samples before `oldest` and before every replica's next one are not asked for again: their rows are dropped."""
        dead = min(oldest, int(self.next_R.min())) - self._base
        if dead > len(self._rows.length) // 2:
            for column in self._rows:
                column[: self._stop - dead] = column[dead : self._stop]
            self._base, self._stop = self._base + dead, self._stop - dead

    def require(self, stop: int, updates: int) -> None:
        """Rows of all samples before `stop` exist; new ones are drawn as after so many updates."""
        per_prompt, cap = self._setup.samples_per_prompt, self._setup.lengths.cap
        size = self._groups * per_prompt
        while self._base + self._stop < stop:
            block = (self._base + self._stop) // size
            rng, prompt_rng = (np.random.default_rng((self._setup.seed, block, part)) for part in (0, 1))
            length_GS = self._setup.lengths.sample(rng, self._groups, per_prompt, step=updates)
            prompt_G1 = self._prompts.sample(prompt_rng, self._groups, 1, step=updates)
            if length_GS.min() < 1 or length_GS.max() > cap:
                raise ValueError(f"lengths: got {length_GS.min()} to {length_GS.max()} tokens; expected 1 to their cap, {cap}")
            if self._stop + size > len(self._rows.length):
                more = np.zeros(max(len(self._rows.length), size), dtype=np.int64)
                self._rows = Rows(*(np.concatenate([column, more]) for column in self._rows))
            for column in self._rows:
                column[self._stop : self._stop + size] = 0
            self._rows.length[self._stop : self._stop + size] = length_GS.ravel()
            self._rows.prompt[self._stop : self._stop + size] = np.repeat(prompt_G1.ravel(), per_prompt)
            self._stop += size


class Training(NamedTuple):
    """Seconds of a step's passes over its rows, and the updates that they make."""

    logprob_s: float
    value_forward_s: float
    policy_train_s: float
    value_train_s: float
    updates: int


def train(setup: Setup, prefix_n: Ints, live_n: Ints, value_fed_n: Ints, *, trained: int, value_trained: int) -> Training:
    """Old log-probabilities, values and the policy's update on the policy's rows; the value model's update on its own.

    prefix_n, live_n         tokens of each of the policy's rows: prompt and what was trained before; what trains now
    value_fed_n              tokens of each of the value model's rows
    trained, value_trained   tokens in the loss, which set the number of updates where setup.update_tokens does
    """
    costs, recipe, whole_n = setup.train_costs or setup.costs, setup.recipe, prefix_n + live_n
    updates, value_updates = _num_updates(setup, trained), _num_updates(setup, value_trained) * recipe.critic
    whole, value = Fed(0, whole_n), Fed(0, value_fed_n)
    policy_s = logprob_s = value_s = value_train_s = 0.0
    wait = value_wait = 1.0
    if updates:
        live = whole if (recipe.prefix, recipe.values) == ("full", "row") else Fed(prefix_n, whole_n)
        policy_s = float(costs.policy_train_s(*(whole if recipe.prefix == "full" else live).sums, num_updates=updates))
        policy_s += float(costs.prefix_s(*Fed(0, prefix_n).sums)) if recipe.prefix == "forward" and prefix_n.any() else 0.0
        logprob_s = float(costs.logprob_s(*whole.sums)) if recipe.logprobs == "recompute" else 0.0
        reads = live if recipe.values == "window" else whole
        value_s = float(costs.value_forward_s(*reads.sums)) if recipe.critic else 0.0
        wait = waiting_factor(whole.work(costs), ranks=setup.ranks, updates=updates, copies=setup.copies)
    if value_updates:
        value_train_s = float(costs.value_train_s(*value.sums, num_updates=value_updates))
        value_wait = waiting_factor(value.work(costs), ranks=setup.ranks, updates=value_updates, copies=setup.copies)
    training = Training(wait * logprob_s, wait * value_s, wait * policy_s, value_wait * value_train_s, updates)
    check_seconds("training", np.array(training[:-1]))
    return training


class Fed:
    """Tokens [begin, stop) of sequences that are fed to a pass."""

    def __init__(self, begin_n: Ints | int, stop_n: Ints):
        self.tokens_n, self.pairs_n = stop_n - begin_n, causal_context(begin_n, stop_n)

    @property
    def sums(self) -> tuple[int, int]:
        """Tokens, and query-key pairs."""
        return int(self.tokens_n.sum()), int(self.pairs_n.sum())

    def work(self, costs: Costs) -> Floats:
        """Of each sequence, in whichever unit the costs have; its tokens where they tell nothing."""
        row_work = getattr(costs, "row_work", None)
        return np.asarray(self.tokens_n, dtype=float) if row_work is None else row_work(self.tokens_n, self.pairs_n)


def _num_updates(setup: Setup, trained: int) -> int:
    if not trained:
        return 0
    return max(1, round(trained / setup.update_tokens)) if setup.update_tokens else setup.updates_per_step


def capacity_of(costs: Costs, jobs: Stints) -> int:
    """Tokens that a replica's cache holds; ValueError if it cannot even hold one of the jobs, whose stints are not cut yet."""
    capacity = costs.kv_capacity_tokens
    if capacity is None:
        return UNBOUNDED
    longest = int((jobs.context_n + jobs.stop_n - jobs.begin_n).max(initial=0))
    if longest > capacity:
        raise ValueError(
            f"kv_capacity_tokens: got {capacity:,}; expected room for a sequence of {longest:,}: use more devices per replica"
        )
    return capacity


class Times(NamedTuple):
    """A step's place in time: fields of a StepRecord."""

    begin_s: float
    rollout_begin_s: float
    end_s: float
    wake_s: float
    verify_s: float
    sync_s: float
    train_wait_s: float


class Timeline:
    """Who waits for whom, step after step.

    In turn       (wake), rollout, verify, train, sync, and the next step; engines sleep during training only where they share
                  its devices
    Pipelined     while step k trains, rollout k + 1 runs; when both are done the weights are synced
    """

    def __init__(self, setup: Setup):
        self._setup = setup
        self._end_s = self._trained_s = self._rollout_begin_s = 0.0
        self._first = True

    def version(self, step: int) -> int:
        """Of the policy that decodes in this step; the step trains version `step`."""
        return max(step - 1, 0) if self._setup.pipelined else step

    def place(self, rollout_s: float, training: Training) -> Times:
        """The next step's times."""
        setup, train_s = self._setup, sum(training[:-1])
        sync_s, verify_s = setup.costs.sync_s(), setup.verify_s
        begin_s, wake_s = self._end_s, 0.0
        if setup.pipelined:
            rollout_begin_s = self._rollout_begin_s
            ready_s = max(rollout_begin_s + rollout_s, self._trained_s)
            wait_s = ready_s - self._trained_s
            # The weights of the step before go to the engines now, and the next rollout begins; there are none at first.
            self._rollout_begin_s = ready_s if self._first else ready_s + sync_s
            self._trained_s = self._rollout_begin_s + verify_s + train_s
        else:
            wake_s = setup.costs.wake_s() if setup.train_costs is None else 0.0
            rollout_begin_s = begin_s + wake_s
            wait_s = rollout_s if setup.train_costs is not None else 0.0
            self._trained_s = rollout_begin_s + rollout_s + verify_s + train_s
        self._first, self._end_s = False, self._trained_s + sync_s
        return Times(begin_s, rollout_begin_s, self._end_s, float(wake_s), verify_s, float(sync_s), wait_s)


def step_record(setup: Setup, step: int, rollout: Rollout, times: Times, training: Training, **counts: Any) -> StepRecord:
    """A step's record, from its parts."""
    return StepRecord(
        step=step, **times._asdict(), **training._asdict(), slots=setup.slots, rollout_s=rollout.seconds,
        prefill_s=rollout.prefill_s, decode_s=rollout.decode_s,
        engine_wait_s=rollout.seconds - rollout.prefill_s - rollout.decode_s,
        decode_steps=rollout.decode_steps, busy_slot_s=rollout.busy_slot_s, queue_s=rollout.queue_s,
        prefill_tokens=rollout.prefill_tokens, ops_per_byte=rollout.ops_per_byte,
        curve=rollout.curve, **counts,
    )  # fmt: skip
