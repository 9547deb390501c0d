"""What the clock writes down: a record per training step, and the trace of a run."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.clock.decoding import Curve

PHASES = (
    "wake", "prefill", "decode", "engine_wait", "verify", "logprob", "value_forward", "policy_train", "value_train", "sync",
)  # fmt: skip
"""Phases of a step, in order; with rollout and training on the same devices their seconds sum to the step's."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One training step: its rollout and the updates on what the rollout brought. Seconds (`_s`), tokens, or as named.

    Times. Seconds from the run's begin: a step begins when the one before has ended, and ends when its new weights are with the
    engines. With disjoint devices the phases of neighbouring steps overlap, so that `rollout_begin_s` may be earlier; then
    `train_wait_s` is how long the training devices waited for responses.

    Tokens. Sampled response tokens, each in exactly one place at any time; flows are of this step, levels at its end:
        sum of generated = sum of (trained + discarded + excluded) + in_flight + deferred
    """

    step: int
    begin_s: float
    rollout_begin_s: float
    end_s: float

    wake_s: float = 0.0
    prefill_s: float = 0.0
    """Mean over engine replicas, as is `decode_s`."""
    decode_s: float = 0.0
    engine_wait_s: float = 0.0
    """Mean over engine replicas: waiting for the slowest one, or for work."""
    verify_s: float = 0.0
    logprob_s: float = 0.0
    value_forward_s: float = 0.0
    policy_train_s: float = 0.0
    """With the optimiser's steps, as `value_train_s`."""
    value_train_s: float = 0.0
    sync_s: float = 0.0
    train_wait_s: float = 0.0
    rollout_s: float
    """Prefill, decode and engine wait."""

    decode_steps: int
    """Of the replica with the most."""
    slots: int
    """Decoding places, all replicas together."""
    busy_slot_s: float
    queue_s: float
    """Seconds that requests spent waiting for a place in an engine or its cache, summed over those that got one."""
    preemptions: int
    ops_per_byte: float | None = None
    """Of the decode steps, weighted by their seconds; None where the costs do not tell."""

    generated: int
    trained: int
    """By the policy."""
    discarded: int = 0
    """Sampled, then given up."""
    excluded: int = 0
    """Tail tokens of cut rows that nobody trains."""
    in_flight: int = 0
    """Level. Of responses that are not trained yet: still running, or ended and waiting."""
    deferred: int = 0
    """Level. Tail tokens that train in the next window."""

    tokens_fed: int
    """To the policy's update: prompts, earlier windows and this one."""
    prefix_tokens_trained: int
    """Of these, fed again: the prompt and the earlier windows of continued responses. 0 where responses train whole, once."""
    value_tokens_trained: int
    """Fed to the value model's update."""
    prefill_tokens: int
    reprefilled_tokens: int
    """Of these, not for the first time: after a weight sync or a preemption."""

    updates: int
    """Of the policy."""
    staleness_sum: int
    """Over the trained tokens: weight syncs between sampling and training. In updates: `lag_updates`."""
    staleness_max: int
    """Of a response's oldest token among the trained."""
    started: int
    """Responses, as in the next two."""
    finished: int
    capped: int
    """Finished at the cap."""
    completed: int
    """Responses whose last token was trained."""
    started_length: int
    """Final length of the responses that started, summed."""
    completed_length: int
    """Length of the responses that were completed, summed."""

    curve: Curve = dataclasses.field(repr=False, compare=False)

    @property
    def active(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Sequences that decode: n[i] of them from t[i] seconds after `rollout_begin_s` on; the last entry is 0."""
        return self.curve.merged()

    @property
    def step_s(self) -> float:
        return self.end_s - self.begin_s

    @property
    def phases(self) -> dict[str, float]:
        """Seconds by phase."""
        return {name: getattr(self, f"{name}_s") for name in PHASES}

    @property
    def idle_slot_s(self) -> float:
        """Slot-seconds of the rollout without a sequence."""
        return self.slots * self.rollout_s - self.busy_slot_s

    @property
    def occupancy(self) -> float:
        """Busy share of the rollout's slot-seconds; 0 where nothing decoded."""
        return self.busy_slot_s / (self.slots * self.rollout_s) if self.rollout_s else 0.0

    @property
    def staleness_mean(self) -> float:
        """Weight syncs per trained token; 0 where nothing was trained."""
        return self.staleness_sum / self.trained if self.trained else 0.0

    @property
    def lag_updates(self) -> float:
        """Updates between the policy that sampled a token and the one that trains it, per trained token.

        A step's tokens are spread over its updates, and the k-th of them trains k - 1 updates after the sync, so that many
        updates per sync are a lag of their own: staleness in syncs x updates of a step + (updates - 1) / 2.
        """
        return self.staleness_mean * self.updates + max(self.updates - 1, 0) / 2

    def row(self) -> dict[str, Any]:
        """The scalars, for a table."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "curve"}
        return fields | {
            name: getattr(self, name) for name in ("step_s", "idle_slot_s", "occupancy", "staleness_mean", "lag_updates")
        }


LEVELS = ("in_flight", "deferred")
LARGEST = ("staleness_max", "decode_steps")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """The steps of a run, in order."""

    system: str
    records: tuple[StepRecord, ...]

    @property
    def seconds(self) -> float:
        return self.records[-1].end_s

    def total(self, name: str) -> float:
        """A field of the records: summed; its last value for a level; the largest for staleness_max and decode_steps."""
        values = [getattr(record, name) for record in self.records]
        return values[-1] if name in LEVELS else max(values) if name in LARGEST else sum(values)

    def totals(self) -> dict[str, Any]:
        """The whole run as one row: totals, and the means that follow from them. A mean over nothing is None."""
        skip = {"step", "begin_s", "rollout_begin_s", "end_s", "slots", "ops_per_byte", "curve"}
        names = [f.name for f in dataclasses.fields(StepRecord) if f.name not in skip]
        row: dict[str, Any] = {"system": self.system, "steps": len(self.records), "seconds": self.seconds}
        row |= {name: self.total(name) for name in names}
        slot_s = sum(r.slots * r.rollout_s for r in self.records)
        return row | {
            "idle_slot_s": slot_s - row["busy_slot_s"],
            "occupancy": _ratio(row["busy_slot_s"], slot_s),
            "ops_per_byte": self.ops_per_byte,
            "staleness_mean": _ratio(row["staleness_sum"], row["trained"]),
            "started_length_mean": _ratio(row["started_length"], row["started"]),
            "completed_length_mean": _ratio(row["completed_length"], row["completed"]),
            "length_bias": self.length_bias,
            "trained_tokens_per_s": _ratio(row["trained"], self.seconds),
        }

    @property
    def ops_per_byte(self) -> float | None:
        """Over all decode steps, weighted by their seconds."""
        known = [(r.ops_per_byte, r.decode_s) for r in self.records if r.ops_per_byte is not None]
        return _ratio(sum(x * s for x, s in known), sum(s for _, s in known))

    @property
    def length_bias(self) -> float | None:
        """Mean length of the responses that were trained to their end / of all that started. Below 1: short ones come first."""
        completed = _ratio(self.total("completed_length"), self.total("completed"))
        started = _ratio(self.total("started_length"), self.total("started"))
        return None if completed is None or not started else completed / started

    def time_to(self, *, updates: int | None = None, tokens: int | None = None) -> float | None:
        """Seconds until so many updates were made or tokens trained (one of the two); None if the run ends before.

        Within a step, updates and tokens count when its new weights are out.
        """
        if (updates is None) == (tokens is None):
            raise ValueError(f"updates and tokens: expected one of the two, got updates={updates!r}, tokens={tokens!r}")
        name, wanted, sofar = ("updates", updates, 0) if tokens is None else ("trained", tokens, 0)
        assert wanted is not None  # one of the two is given
        for record in self.records:
            sofar += getattr(record, name)
            if sofar >= wanted:
                return record.end_s
        return None

    def active(self) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Sequences that decode over the whole run: n[i] of them from second t[i] on, 0 between rollouts."""
        curves = [record.active for record in self.records]
        times = [record.rollout_begin_s + time_n for record, (time_n, _) in zip(self.records, curves, strict=True)]
        return np.concatenate(times), np.concatenate([active_n for _, active_n in curves])

    def write_csv(self, path: Path | str) -> None:
        """One line per step; an unknown value is an empty cell."""
        rows = [record.row() for record in self.records]
        with Path(path).open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def check_conservation(records: Sequence[StepRecord]) -> None:
    """Every sampled token is in exactly one place, at every step (docs/theory.md F1)."""
    balance = 0
    for r in records:
        balance += r.generated - r.trained - r.discarded - r.excluded
        assert balance == r.in_flight + r.deferred, f"step {r.step}: {balance} tokens unsettled, {r.in_flight} + {r.deferred} found"


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
