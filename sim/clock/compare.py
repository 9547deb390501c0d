"""One cluster and its work, and how fast each method is on it: PPO at its own best, at equal tokens per step, at equal settings.

    Case                 a model, a cluster, lengths, slots, a window, and what is charged
    setup_of(case, tp)   the clock's setup for it
    best_ppo, at_best    a method over the stated grid, each with its own tensor parallelism

Every update trains the same number of tokens, under every system: `mini_batch` responses' worth, the port's 512 [P]. Three
baselines, since steps of unequal size flatter one side or the other:

    best        PPO's own best of TP x slots, with as many responses per step as the port has, 8,192 [P], refilled within the step
    step        the same, its step holding no more tokens than T-PPO's: as many updates between two syncs, so as much lag
    equal       T-PPO's TP and slots, one response per slot: the paper's comparison, as far as it is known

No method's own best makes more updates between two syncs than PPO with 8,192 responses: 16.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from sim.clock.cluster import Setup
from sim.clock.distributions import Lengths
from sim.clock.efficiency import Efficiency
from sim.clock.fitting import problems, tensor_parallel_sizes, with_utilisation
from sim.clock.footprint import Budget
from sim.clock.hardware import Layout, Roofline, Work, cluster, model
from sim.clock.lengths import load_lengths
from sim.clock.methods import Method, method, routine, small_critic
from sim.clock.ranges import Ranged
from sim.clock.steady import Steady

PROMPT_TOKENS, SAMPLES = 200, 16
MOST_RESPONSES = 8192
SLOTS = (256, 512, 1024, 2048, 4096, 8192)
"""Grid of a method's decoding places; tensor parallelism is any power of 2 within a node that fits."""
Speed = Callable[[Steady], float]
TOKENS_PER_S: Speed = operator.attrgetter("tokens_per_s")
Counted = Literal["weights", "kv", "cache"]
"""What decoding is charged for: "weights": their bytes and operations only, and a KV cache without bound, as in the simplest
roofline; "kv": keys and values are read too; "cache": and their room is limited, as it is."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """`lengths` is a spec of lengths.py, with @step for one that grows. 32B and windows of 8k are the paper's [S], a cap of 24k and
    a mini-batch of 512 responses the port's [P]; the rest, the cluster too, is ours [O]. `tp`, `slots` 0: a system's own best."""

    what: str = ""
    model: str = "Qwen2.5-32B"
    gpus: str = "64xH800"
    tp: int = 0
    lengths: str = "math-mixture"
    cap: int = 24_576
    slots: int = 0
    window: int = 8192
    mini_batch: int = 512
    counted: Counted = "cache"


class Cell(NamedTuple):
    """One point of the grid. `responses` per step of PPO: 0 is one per slot; `engine_devices`: 0 is colocated."""

    tp: int
    slots: int
    responses: int = 0
    engine_devices: int = 0


class WithoutBound(Roofline):
    """As a Roofline, with a KV cache that holds everything."""

    @property
    def kv_capacity_tokens(self) -> Any:
        return 1 << 60


class WeightsOnly(WithoutBound):
    """And decoding neither reads keys and values nor attends to them: operations per byte are the active batch."""

    def _decode_work(self, active: ArrayLike, context_tokens: ArrayLike) -> tuple[Work, Work]:
        return super()._decode_work(active, 0 * np.asarray(context_tokens))


COUNTED: dict[str, type[Roofline]] = {"weights": WeightsOnly, "kv": WithoutBound, "cache": Roofline}


@functools.lru_cache(maxsize=64)
def _lengths(spec: str, cap: int) -> tuple[Lengths, float]:
    name, _, step = spec.partition("@")
    lengths = load_lengths(name, cap).at_step(int(step or 0))
    return lengths, lengths.mean_tokens()


def lengths_of(case: Case) -> Lengths:
    return _lengths(case.lengths, case.cap)[0]


def mean_of(case: Case) -> float:
    """Mean tokens of a response."""
    return _lengths(case.lengths, case.cap)[1]


def layout_of(case: Case, tp: int, *, engine_devices: int = 0) -> Layout:
    """The engine takes what the trainer leaves, as `sim plan` does."""
    shape, (num_devices, gpu) = model(case.model), cluster(case.gpus)
    budget = Budget(sequence_tokens=case.cap + PROMPT_TOKENS)
    plain = Layout(
        num_devices=num_devices - engine_devices, num_engine_devices=engine_devices or None, tensor_parallel=tp,
        micro_batch_tokens=budget.sequence_tokens,
    )  # fmt: skip
    return plain if engine_devices else with_utilisation(shape, plain, budget, gpu)


@functools.lru_cache(maxsize=64)
def parallel_sizes(name: str, gpus: str, cap: int) -> tuple[int, ...]:
    """Tensor parallelism that fits, colocated, the engine's cache holding at least two of the longest sequences."""
    case, (num_devices, gpu) = Case(model=name, gpus=gpus, cap=cap), cluster(gpus)
    budget, found = Budget(sequence_tokens=cap + PROMPT_TOKENS), []
    for tp in tensor_parallel_sizes(model(name), num_devices):
        layout = layout_of(case, tp)
        if not problems(model(name), layout, budget, gpu):
            found.append(tp)
    if not found:
        raise ValueError(f"{name} does not fit on {gpus} with responses of {cap:,} tokens; take more devices, or larger ones")
    return tuple(found)


def setup_of(case: Case, cell: Cell | None = None, *, efficiency: Efficiency | None = None, critic: str = "own") -> Setup:
    """The clock's setup for a point of the grid; None: the case's own, where it leaves nothing open."""
    cell = cell or Cell(case.tp, case.slots)
    shape, gpu = model(case.model), cluster(case.gpus)[1]
    layout = layout_of(case, cell.tp, engine_devices=cell.engine_devices)
    costs = COUNTED[case.counted](
        accelerator=gpu, model=shape, layout=layout, efficiency=efficiency or Efficiency(),
        critic=small_critic(shape) if critic == "small" else None,
    )  # fmt: skip
    return Setup(
        lengths=lengths_of(case), prompt_tokens=PROMPT_TOKENS, costs=costs, slots=cell.slots, num_replicas=layout.num_replicas,
        train_costs=costs if cell.engine_devices else None, ranks=layout.num_devices, samples_per_prompt=SAMPLES,
        update_tokens=max(1, round(case.mini_batch * mean_of(case))),
    )  # fmt: skip


class Best(NamedTuple):
    """A method at its best: where on the grid, and how fast."""

    cell: Cell
    system: Ranged


@functools.lru_cache(maxsize=4096)
def run_at(case: Case, name: str, cell: Cell) -> Ranged:
    """A method at one point of the grid; each level runs when it is asked for."""
    which = method(name)

    def run(efficiency: Efficiency) -> Any:
        setup = setup_of(case, cell, efficiency=efficiency, critic=which.critic)
        return routine(which, setup, window=case.window, responses=cell.responses)

    return Ranged(run, apart=cell.engine_devices > 0)


def fastest(case: Case, name: str, cells: Iterator[Cell], speed: Speed = TOKENS_PER_S) -> Best:
    """The cell with the most trained tokens per second, by the middle efficiencies; `speed` may count seconds otherwise."""
    some = [Best(cell, run_at(_plain(case, name), name, cell)) for cell in cells]
    return max(some, key=lambda best: speed(best.system.middle))


def _plain(case: Case, name: str) -> Case:
    """Without what the method does not look at, so that equal work is done once."""
    return dataclasses.replace(case, what="", tp=0, slots=0, window=case.window if method(name).kind == "tppo" else 0)


def tps_of(case: Case) -> tuple[int, ...]:
    return (case.tp,) if case.tp else parallel_sizes(case.model, case.gpus, case.cap)


def best_ppo(case: Case, *, name: str = "ppo", most_responses: int = 0, speed: Speed = TOKENS_PER_S) -> Best:
    """PPO over TP x slots, with so many responses per step, at least as many as slots; 0: MOST_RESPONSES."""
    tps, num_devices = parallel_sizes(case.model, case.gpus, case.cap), cluster(case.gpus)[0]
    responses = max(most_responses or MOST_RESPONSES, num_devices // min(tps))
    slots = sorted({s for s in SLOTS if s < responses} | {responses})
    cells = [Cell(tp, s, 0 if s == responses else responses) for tp in tps for s in slots if s >= num_devices // tp]
    return fastest(case, name, iter(cells), speed)


def at_best(case: Case, name: str, *, speed: Speed = TOKENS_PER_S) -> Best:
    """Any method but PPO at its best of TP and slots, where the case leaves them open; asynchronous training also at its best split
    of the devices, with half as many responses per step as slots. Steps of more than 16 updates are left out."""
    which, num_devices = method(name), cluster(case.gpus)[0]
    engines = sorted({num_devices // 4, num_devices // 2, 3 * num_devices // 4} - {0}) if which.kind == "async" else [0]
    cells = []
    for tp, slots, engine in itertools.product(tps_of(case), (case.slots,) if case.slots else SLOTS, engines):
        if slots >= (engine or num_devices) // tp and (not engine or fits_apart(case, tp, engine)):
            cells.append(Cell(tp, slots, max(1, slots // 2) if engine else 0, engine))
    most = MOST_RESPONSES * mean_of(case)
    if not case.slots:
        cells = [cell for cell in cells if trained_about(case, which, cell) <= 1.05 * most] or cells[:1]
    if not cells:
        raise ValueError(f"{name} does not fit on {case.gpus}; take more devices, or larger ones")
    return fastest(case, name, iter(cells), speed)


def trained_about(case: Case, which: Method, cell: Cell) -> float:
    """Tokens that a step trains, before anything ran: a window of every slot, or a batch of mean responses."""
    if which.kind == "tppo":
        return cell.slots * min(case.window, lengths_of(case).cap)
    return (cell.responses or which.batch(cell.slots)) * mean_of(case)


def fits_apart(case: Case, tp: int, engine_devices: int) -> bool:
    """Whether trainer and engine fit on devices of their own."""
    budget = Budget(sequence_tokens=case.cap + PROMPT_TOKENS)
    if engine_devices % tp:
        return False
    layout = layout_of(case, tp, engine_devices=engine_devices)
    return not problems(model(case.model), layout, budget, cluster(case.gpus)[1])


def step_ppo(case: Case, ours: Best, *, name: str = "ppo") -> Best:
    """PPO at its best whose step holds no more tokens than `ours`, in whole mini-batches."""
    batches = max(1, int(ours.system.middle.trained / mean_of(case) / case.mini_batch + 1e-9))
    return best_ppo(case, name=name, most_responses=batches * case.mini_batch)


def equal_ppo(case: Case, ours: Best, *, name: str = "ppo") -> Best:
    """PPO with the TP and the slots of `ours`, one response per slot."""
    cell = Cell(ours.cell.tp, ours.cell.slots)
    return Best(cell, run_at(_plain(case, name), name, cell))


def evaluate(case: Case) -> dict[str, Any]:
    """A row: the case, T-PPO at its best TP, and its three gains over PPO with their ranges; the rest at equal settings."""
    ours = at_best(case, "tppo")
    best, step, equal = best_ppo(case), step_ppo(case, ours), equal_ppo(case, ours)
    after, before, slots = ours.system.middle, equal.system.middle, ours.cell.slots
    mean, longest, replicas = mean_of(case), lengths_of(case).expected_maximum(slots), setup_of(case, ours.cell).num_replicas
    row = dataclasses.asdict(case) | {
        "tp": ours.cell.tp, "slots": slots, "slots_per_replica": slots / replicas, "mean_tokens": mean,
        "longest_over_mean": longest / mean,
    }  # fmt: skip
    for name, baseline in (("gain", best), ("gain_step", step), ("gain_equal", equal)):
        row |= spread(name, ours.system.gain(baseline.system))
    row |= spread("gain_rollout", ours.system.rollout_gain(equal.system))
    return row | {
        "gain_without_prefix": (after.trained / after.step_without_prefix_s) / before.tokens_per_s,
        "best_tp": best.cell.tp, "best_slots": best.cell.slots, "best_responses": best.cell.responses or best.cell.slots,
        "step_responses": step.cell.responses or step.cell.slots,
        "ppo_ops_per_byte": before.ops_per_byte, "ops_per_byte": after.ops_per_byte,
        "ppo_active_per_step": slots / replicas * mean / longest,
        "ppo_active": before.mean_active, "active": after.mean_active,
        "ppo_rollout_share": before.rollout_share, "rollout_share": after.rollout_share,
        "best_step_s": best.system.middle.step_s, "ppo_step_s": before.step_s, "step_s": after.step_s,
        "best_lag_updates": best.system.middle.lag_updates, "lag_updates": after.lag_updates,
        "ppo_preemptions": before.preemptions, "preemptions": after.preemptions,
        "fed_again": after.prefix_tokens_trained / max(after.tokens_fed, 1),
    }  # fmt: skip


def spread(name: str, found: Any) -> dict[str, float]:
    """A range as three columns."""
    return {name: found.middle, f"{name}_low": found.low, f"{name}_high": found.high}


def method_row(case: Case, name: str, which: Method) -> dict[str, Any]:
    """A row of the methods' table: a method at its best, over PPO at its best, with its own critic and with the method's; and over
    PPO whose steps hold as many tokens."""
    ours = best_ppo(case, name=name) if which.kind == "ppo" else at_best(case, name)
    own, same = best_ppo(case), best_ppo(case, name=f"ppo/{which.critic}" if which.critic != "own" else "ppo")
    found = ours.system.middle
    return {
        "what": case.what, "system": name, "tp": ours.cell.tp, "slots": ours.cell.slots,
        "responses": found.finished, "engine_devices": ours.cell.engine_devices,
        **spread("gain", ours.system.gain(own.system)), **spread("gain_same_critic", ours.system.gain(same.system)),
        **spread("gain_step", ours.system.gain(step_ppo(case, ours).system)),
        **spread("tokens_per_s", ours.system.speed), **spread("step_s", ours.system.step),
        "updates_per_day": found.updates_per_day, "lag_updates": found.lag_updates, "staleness_mean": found.staleness_mean,
        "occupancy": found.occupancy, "discarded": found.discarded / max(found.generated, 1), "preemptions": found.preemptions,
        "price": which.price,
    }  # fmt: skip
