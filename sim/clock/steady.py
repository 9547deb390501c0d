"""A system on the clock, long after its start: means per training step, and one system's speed beside another's.

    setup, scale = sampled(setup, replicas=2)           a few of the engine replicas stand for all
    found = steady(tppo(setup, window=8192), warm=6, steps=8, scale=scale)
    gain(before=steady(ppo(setup), ...), after=found)   trained tokens per second, after / before

What a *sampled* setup leaves out: the step waits for the slowest replica, and among many the slowest is later than among few. Where
the KV cache is not full all replicas of a window end together and nothing is lost; PPO's rollout ends with the longest response,
which among few replicas is a little shorter. Both are stated beside the numbers that come of it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from sim.clock.cluster import Setup
from sim.clock.course import grows, kept
from sim.clock.hardware import Costs, Seconds
from sim.clock.schedule import System, ppo, run, tppo
from sim.clock.systems import Synchronous
from sim.clock.trace import PHASES, StepRecord
from tppo_ref.method.slots import Refill

SEGMENTS, SLOTS, LEAST_STEPS = 120_000, 1024, 6  # of one simulated run, about; of a sample; that are measured at least
TRAINING = ("logprob", "value_forward", "policy_train", "value_train")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiplied:
    """`Costs` of a cluster, asked with the training work of 1 / `factor` of its replicas."""

    costs: Costs
    factor: float

    @property
    def kv_capacity_tokens(self) -> int | None:
        return self.costs.kv_capacity_tokens

    def operations_per_byte(self, active: ArrayLike, context_tokens: ArrayLike) -> Any:
        return self.costs.operations_per_byte(active, context_tokens)  # type: ignore[attr-defined]

    def decode_step_s(self, active_n: ArrayLike, context_tokens_n: ArrayLike) -> Seconds:
        return self.costs.decode_step_s(active_n, context_tokens_n)

    def prefill_s(self, tokens: ArrayLike, context_tokens: ArrayLike = 0) -> Seconds:
        return self.costs.prefill_s(tokens, context_tokens)

    def logprob_s(self, tokens: ArrayLike, context_tokens: ArrayLike) -> Seconds:
        return self.costs.logprob_s(*self._all(tokens, context_tokens))

    def value_forward_s(self, tokens: ArrayLike, context_tokens: ArrayLike) -> Seconds:
        return self.costs.value_forward_s(*self._all(tokens, context_tokens))

    def row_work(self, tokens: ArrayLike, context_tokens: ArrayLike) -> Any:
        return self.costs.row_work(tokens, context_tokens)  # type: ignore[attr-defined]

    def prefix_s(self, tokens: ArrayLike, context_tokens: ArrayLike) -> Seconds:
        return self.costs.prefix_s(*self._all(tokens, context_tokens))

    def policy_train_s(self, tokens: ArrayLike, context_tokens: ArrayLike, num_updates: ArrayLike = 1) -> Seconds:
        return self.costs.policy_train_s(*self._all(tokens, context_tokens), num_updates)

    def value_train_s(self, tokens: ArrayLike, context_tokens: ArrayLike, num_updates: ArrayLike = 1) -> Seconds:
        return self.costs.value_train_s(*self._all(tokens, context_tokens), num_updates)

    def sync_s(self) -> float:
        return self.costs.sync_s()

    def wake_s(self) -> float:
        return self.costs.wake_s()

    def _all(self, tokens: ArrayLike, context_tokens: ArrayLike) -> tuple[Any, Any]:
        return np.asarray(tokens) * self.factor, np.asarray(context_tokens, dtype=float) * self.factor


def sampled(setup: Setup, replicas: int) -> tuple[Setup, float]:
    """The setup with at most `replicas` engine replicas, which stand for all of them, and how many times larger the real one is."""
    if setup.num_replicas <= replicas:
        return setup, 1.0
    slots = max(replicas, round(setup.slots * replicas / setup.num_replicas))
    factor = setup.slots / slots
    trainer = setup.train_costs and Multiplied(costs=setup.train_costs, factor=factor)
    fewer = dataclasses.replace(
        setup, num_replicas=replicas, slots=slots, costs=Multiplied(costs=setup.costs, factor=factor), train_costs=trainer,
        update_tokens=round(setup.update_tokens / factor), copies=max(1, round(factor)),
    )  # fmt: skip
    return fewer, factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steady:
    """Means per training step over the steps that were measured. Seconds (`_s`), tokens of the whole cluster."""

    system: str
    steps: int
    step_s: float
    rollout_s: float
    phases_s: dict[str, float]
    """By phase of `trace.PHASES`; colocated they sum to `step_s`."""
    trained: float
    generated: float
    discarded: float
    tokens_fed: float
    prefix_tokens_trained: float
    prefill_tokens: float
    reprefilled_tokens: float
    preemptions: float
    updates: float
    finished: float
    occupancy: float
    """Busy share of the slot-seconds of the rollout."""
    mean_active: float
    """Sequences that decode on a replica, over the seconds of decoding."""
    ops_per_byte: float | None
    staleness_mean: float
    """Weight syncs per trained token."""

    @property
    def lag_updates(self) -> float:
        """Updates per trained token between the policy that sampled it and the one that trains it: trace.StepRecord's."""
        return self.staleness_mean * self.updates + max(self.updates - 1, 0) / 2

    @property
    def updates_per_day(self) -> float:
        return 86_400 * self.updates / self.step_s

    @property
    def tokens_per_s(self) -> float:
        """Trained tokens."""
        return self.trained / self.step_s

    @property
    def training_s(self) -> float:
        return sum(self.phases_s[name] for name in TRAINING)

    @property
    def rollout_share(self) -> float:
        return self.rollout_s / self.step_s

    @property
    def step_without_prefix_s(self) -> float:
        """Had nothing been fed twice: the policy's passes without earlier windows and their prompts, no prefill but the first.

        By tokens, so a little too slow: the attention that later windows pay is left in.
        """
        policy_s = sum(self.phases_s[name] for name in ("logprob", "value_forward", "policy_train"))
        again = self.prefix_tokens_trained / max(self.tokens_fed, 1), self.reprefilled_tokens / max(self.prefill_tokens, 1)
        return self.step_s - policy_s * again[0] - self.phases_s["prefill"] * again[1]


def steady(system: System, *, warm: int, steps: int, scale: float = 1.0) -> Steady:
    """Runs `warm` steps and then measures `steps`. `scale`: see `sampled`."""
    return summary(system.name, list(run(system, steps=warm + steps).records[warm:]), scale, replicas_of(system))


def replicas_of(system: Any) -> int:
    return int(system.setup.num_replicas)


def summary(name: str, records: list[StepRecord], scale: float, num_replicas: int) -> Steady:
    """Means over records."""
    num, seconds = len(records), records[-1].end_s - records[0].begin_s

    def mean(field: str) -> float:
        return float(sum(getattr(record, field) for record in records)) / num

    decode_s, slot_s = mean("decode_s"), sum(r.slots * r.rollout_s for r in records) / num
    known = [(r.ops_per_byte, r.decode_s) for r in records if r.ops_per_byte is not None]
    rolling_s = num_replicas * (mean("decode_s") + mean("prefill_s"))
    return Steady(
        system=name, steps=num, step_s=seconds / num, rollout_s=mean("rollout_s"),
        phases_s={phase: mean(f"{phase}_s") for phase in PHASES},
        **{f: mean(f) * scale for f in ("trained", "generated", "discarded", "tokens_fed", "prefix_tokens_trained",
                                       "prefill_tokens", "reprefilled_tokens", "preemptions", "finished")},
        updates=mean("updates"),
        occupancy=mean("busy_slot_s") / slot_s if slot_s else 0.0,
        mean_active=mean("busy_slot_s") / rolling_s if rolling_s else 0.0,
        ops_per_byte=sum(x * s for x, s in known) / sum(s for _, s in known) if known and decode_s else None,
        staleness_mean=sum(r.staleness_sum for r in records) / max(1, sum(r.trained for r in records)),
    )  # fmt: skip


def gain(*, before: Steady, after: Steady) -> float:
    """Trained tokens per second, after / before."""
    return after.tokens_per_s / before.tokens_per_s


def warm_steps(cap: int, window: int) -> int:
    """Steps until windowed systems are in their routine: the longest response has passed through twice."""
    return 2 * -(-cap // window)


def few(whole: Setup) -> int:
    """Engine replicas that stand for all: 2, or 1 where 2 have more than SLOTS slots."""
    return 1 if 2 * whole.slots > SLOTS * whole.num_replicas else 2


def in_routine(
    whole: Setup, window: int, *, refill: Refill = "immediate", replicas: int = 0, segments: int = SEGMENTS, **options: Any
) -> Steady:
    """T-PPO on a few replicas, for as many steps as `segments` allows. `replicas`: 0 means `few`; options: schedule.Windowed's."""
    some, scale = sampled(whole, replicas or few(whole))
    cap, mean = whole.lengths.cap, whole.lengths.mean_tokens()
    affordable = int(segments / (some.slots * (1 + window / mean)))
    warm = max(3, min(warm_steps(cap, window), affordable - LEAST_STEPS))
    steps = max(LEAST_STEPS, min(max(-(-cap // window), min(32, 4096 // some.slots)), affordable - warm))
    course = None if grows(some) else kept(some, window=window, refill=refill)
    system = tppo(some, window=window, refill=refill, course=course, **options)
    return steady(system, warm=warm, steps=steps, scale=scale)


def synchronous(whole: Setup) -> Steady:
    """PPO on all replicas: its rollout ends with the longest of all responses, which a sample would miss. It needs no warm-up."""
    return steady(ppo(whole), warm=0, steps=max(2, min(16, 4096 // whole.slots)))


def refilled(whole: Setup, responses: int) -> Steady:
    """PPO with so many responses per step, more than slots, on all replicas."""
    return steady(Synchronous(whole, batch_responses=responses), warm=0, steps=max(1, min(16, 4096 // responses)))
