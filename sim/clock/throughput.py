"""Where 84 -> 249 operations per byte and 2.5x come from, and where they vanish: cases, each PPO beside T-PPO on the clock.

    Case         a model, a cluster, lengths, slots, a window, and what is charged
    evaluate     -> a row of numbers
    TABLES       name -> cases: conditions, lengths, windows, slots, devices, models, tails
    systems()    the other systems on two setups of ours, beside what their papers claim

Three gains of T-PPO over PPO, all of trained tokens per second:

    gain_rollout          of the rollout's seconds alone
    gain_without_prefix   of the step, as if no earlier window were ever fed again, to the engine or to the policy
    gain                  of the step

Operations per byte are means over the seconds of decoding; `ppo_active_per_step` is PPO's mean batch over its decode steps, slots
of a replica x mean / longest, which is what weights-only operations per byte would be if every step took the same time.

`counted` says what decoding is charged for: "weights": their bytes and operations only, and a KV cache without bound, as in the
simplest roofline; "kv": keys and values are read too; "cache": and their room is limited, as it is. T-PPO runs on a few of the
engine replicas, PPO on all (steady.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sim.clock.cluster import Setup
from sim.clock.distributions import Lengths
from sim.clock.footprint import Budget
from sim.clock.hardware import Layout, Roofline, cluster, model
from sim.clock.lengths import load_lengths
from sim.clock.plan import at_step, with_utilisation
from sim.clock.steady import Steady, in_routine, steady, synchronous
from sim.clock.systems import Asynchronous, PartialRollouts, TailBatching

PROMPT_TOKENS, SAMPLES, UPDATES = 200, 16, 16
CLAIM, PPO_INTENSITY, TPPO_INTENSITY = 2.5, 84.0, 249.0  # [S]
DAPO = "dapo-32b@2049"  # DAPO's run, half-way: a mean of 2,586 tokens
Counted = Literal["weights", "kv", "cache"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """`lengths` is a spec of lengths.py, with @step for one that grows. 32B on 64 H800 is the paper's [S]; the rest is ours [O]."""

    what: str = ""
    model: str = "Qwen2.5-32B"
    gpus: str = "64xH800"
    tp: int = 4
    lengths: str = "math-mixture"
    cap: int = 24_576
    slots: int = 2048
    window: int = 8192
    counted: Counted = "cache"


class WithoutBound(Roofline):
    """As a Roofline, with a KV cache that holds everything."""

    @property
    def kv_capacity_tokens(self) -> Any:
        return 1 << 60


class WeightsOnly(WithoutBound):
    """And decoding neither reads keys and values nor attends to them: operations per byte are the active batch."""

    def _decode_work(self, active: ArrayLike, context_tokens: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return super()._decode_work(active, 0 * np.asarray(context_tokens))


COUNTED: dict[str, type[Roofline]] = {"weights": WeightsOnly, "kv": WithoutBound, "cache": Roofline}


def lengths_of(case: Case) -> Lengths:
    spec, _, step = case.lengths.partition("@")
    return at_step(load_lengths(spec, case.cap), int(step or 0))


def layout_of(case: Case, *, engine_devices: int = 0) -> Layout:
    """The engine takes what the trainer leaves, as `sim plan` does."""
    shape, (num_devices, gpu) = model(case.model), cluster(case.gpus)
    budget = Budget(sequence_tokens=case.cap + PROMPT_TOKENS)
    plain = Layout(
        num_devices=num_devices - engine_devices, num_engine_devices=engine_devices or None, tensor_parallel=case.tp,
        micro_batch_tokens=budget.sequence_tokens,
    )  # fmt: skip
    return plain if engine_devices else with_utilisation(shape, plain, budget, gpu)


def setup_of(case: Case, **changes: Any) -> Setup:
    """The same number of updates per trained token under every system: 16 per PPO step [P]."""
    lengths, layout = lengths_of(case), layout_of(case)
    costs = COUNTED[case.counted](accelerator=cluster(case.gpus)[1], model=model(case.model), layout=layout)
    plain: dict[str, Any] = {
        "lengths": lengths, "prompt_tokens": PROMPT_TOKENS, "costs": costs, "slots": case.slots,
        "num_replicas": layout.num_replicas,
        "samples_per_prompt": SAMPLES, "update_tokens": max(1, round(case.slots * lengths.mean_tokens() / UPDATES)),
    }  # fmt: skip
    return Setup(**plain | changes)


@functools.lru_cache(maxsize=256)
def _baseline(case: Case) -> Steady:
    return synchronous(setup_of(case))


def baseline(case: Case) -> Steady:
    """PPO on the case's setup."""
    return _baseline(dataclasses.replace(case, what="", window=0))


def evaluate(case: Case) -> dict[str, Any]:
    """A row: the case, PPO, T-PPO and the three gains."""
    setup, before = setup_of(case), baseline(case)
    after, lengths = in_routine(setup, case.window), setup.lengths
    mean, longest = lengths.mean_tokens(), lengths.expected_maximum(case.slots)
    return dataclasses.asdict(case) | {
        "slots_per_replica": case.slots / setup.num_replicas, "mean_tokens": mean, "longest_over_mean": longest / mean,
        **gains(before, after),
        "ppo_ops_per_byte": before.ops_per_byte, "ops_per_byte": after.ops_per_byte,
        "ppo_active_per_step": case.slots / setup.num_replicas * mean / longest,
        "ppo_active": before.mean_active, "active": after.mean_active,
        "ppo_rollout_share": before.rollout_share, "rollout_share": after.rollout_share,
        "ppo_step_s": before.step_s, "step_s": after.step_s,
        "ppo_preemptions": before.preemptions, "preemptions": after.preemptions,
        "fed_again": after.prefix_tokens_trained / max(after.tokens_fed, 1),
    }  # fmt: skip


def gains(before: Steady, after: Steady) -> dict[str, float]:
    """The three gains of the file's docstring."""
    rate, own_s = before.trained, after.trained
    return {
        "gain_rollout": (own_s / after.rollout_s) / (rate / before.rollout_s),
        "gain_without_prefix": (own_s / after.step_without_prefix_s) / (rate / before.step_s),
        "gain": (own_s / after.step_s) / (rate / before.step_s),
    }


# --------------------------------------------------------------------------------------------------------------------- tables


def conditions() -> Iterator[Case]:
    """What is charged, one thing after the other, on the paper's cluster with its 8,192 slots and with a quarter of them.

    "lognormal:median=7500,sigma=0.4" has a mean of a third of the cap: with it 249/84 is met, and nothing else says it was so [I].
    """
    for lengths in (THIRD, "math-mixture", DAPO):
        for slots, tp in ((8192, 2), (2048, 4)):
            for counted in ("weights", "kv", "cache"):
                yield Case(what=f"{slots} slots, {counted}", lengths=lengths, slots=slots, tp=tp, counted=counted)


THIRD = "lognormal:median=7400,sigma=0.42"


def length_cases() -> Iterator[Case]:
    """The published distributions, each with its own cap and a window of a third of it."""
    for spec, cap in (("dapo-32b-early", 20_480), ("dapo-32b@1024", 20_480), (DAPO, 20_480), ("dapo-32b@5280", 20_480),
                      ("math-14b", 16_000),
                      ("code-14b", 16_000), ("math-mixture", 24_576), ("constant:8192", 8192)):  # fmt: skip
        yield Case(what=spec, lengths=spec, cap=cap, window=-(-cap // 3))


def windows() -> Iterator[Case]:
    for lengths in (DAPO, "dapo-32b-early", "math-mixture"):
        for window in (1024, 2048, 4096, 8192, 12_288, 16_384):
            yield Case(what=f"{lengths}, {window}", lengths=lengths, window=window)


def slots() -> Iterator[Case]:
    for lengths in (DAPO, "math-mixture"):
        for number in (64, 256, 1024, 2048, 4096, 8192):
            yield Case(what=f"{lengths}, {number}", lengths=lengths, slots=number)


def devices() -> Iterator[Case]:
    for lengths in (DAPO, "math-mixture"):
        for number in (32, 64, 128, 256, 512):
            yield Case(what=f"{lengths}, {number}", lengths=lengths, gpus=f"{number}xH800")


def models() -> Iterator[Case]:
    for lengths in (DAPO, "math-mixture"):
        for size, tp in (("0.5B", 1), ("1.5B", 1), ("3B", 1), ("7B", 1), ("14B", 2), ("32B", 4), ("72B", 8)):
            yield Case(what=f"{lengths}, {size}", lengths=lengths, model=f"Qwen2.5-{size}", tp=tp)


def tails() -> Iterator[Case]:
    """Log-normals with a mean of 2,500 tokens before the cap, from none to a heavy tail."""
    for sigma in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0):
        for counted in ("weights", "cache"):
            yield Case(what=f"sigma {sigma}, {counted}", lengths=f"lognormal:mean=2500,sigma={sigma}", counted=counted)


TABLES = {
    "conditions": conditions, "lengths": length_cases, "windows": windows, "slots": slots, "devices": devices, "models": models,
    "tails": tails,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- other systems

PUBLISHED = (
    ("T-PPO", "2.5x, at most [S]", "32B; cluster, lengths and baseline's settings unknown"),
    ("partial: APRIL 2509.18521", "+22.5 % rollout throughput, mean [V]", "unknown here"),
    ("partial: CoPRIS 2511.05589", "1.58-1.94x [V]", "against synchronous RL, mathematics; model and cluster unknown here"),
    ("partial: UloRL 2507.19766", "2.06x [V]", "Qwen3-30B-A3B, segments [V]; cluster unknown here"),
    ("tail batching: RollPacker 2509.21009", "2.03-2.56x [V]", "Qwen2.5 family on up to 128 H800, against veRL [V]"),
    ("asynchronous: AReaL 2505.24298", "up to 2.77x [V]", "unknown here"),
    ("asynchronous: Laminar 2510.12633", "up to 5.48x [V]", "1,024 GPUs [V]; model unknown here"),
)
"""System, what its paper claims, the setup that it states (abstracts; what is not stated there is unknown here)."""


def systems(case: Case) -> Iterator[dict[str, Any]]:
    """PPO, T-PPO and the others on a setup of ours. Batches are of `case.slots` responses everywhere.

    Partial rollouts have 1.5 batches in flight, tail batching 1.25, as many places as requests; asynchronous training takes half of
    the devices away from the engines [O].
    """
    before, setup = baseline(case), setup_of(case)
    half = cluster(case.gpus)[0] // 2
    apart = Roofline(accelerator=cluster(case.gpus)[1], model=model(case.model), layout=layout_of(case, engine_devices=half))
    asynchronous = setup_of(case, costs=apart, train_costs=apart, num_replicas=half // case.tp, slots=2 * case.slots)
    more = {share: dataclasses.replace(setup, slots=int(share * case.slots)) for share in (1.5, 1.25)}
    partial = functools.partial(PartialRollouts, more[1.5], batch_responses=case.slots)
    tail = functools.partial(TailBatching, more[1.25], batch_responses=case.slots)
    runs: list[tuple[str, str, Callable[[], Steady]]] = [
        ("ppo", "", lambda: before),
        ("tppo", f"window {case.window}", lambda: in_routine(setup, case.window)),
        ("partial", "1.5 batches in flight", lambda: steady(partial(), warm=6, steps=8)),
        ("tail-batching", "1.25 batches in flight", lambda: steady(tail(), warm=5, steps=10)),
    ]  # fmt: skip
    for lag in (1, 4):
        make = functools.partial(Asynchronous, asynchronous, batch_responses=case.slots, max_staleness=lag)
        how = f"{half} + {half} devices, staleness {lag}"
        runs.append(("async", how, functools.partial(_in_turn, make)))
    for name, how, start in runs:
        found = start()
        yield {
            "what": case.what, "system": name, "how": how, "gain_rollout": gains(before, found)["gain_rollout"],
            "gain": gains(before, found)["gain"], "step_s": found.step_s, "occupancy": found.occupancy,
            "ops_per_byte": found.ops_per_byte, "staleness_mean": found.staleness_mean,
            "discarded": found.discarded / max(found.generated, 1), "preemptions": found.preemptions,
        }  # fmt: skip


def _in_turn(make: Callable[[], Asynchronous]) -> Steady:
    return steady(make(), warm=8, steps=8)


def system_cases() -> Iterator[Case]:
    for lengths in (DAPO, "math-mixture"):
        yield Case(what=lengths, lengths=lengths, slots=1024)
