"""What a run will need and take: bytes per device and phase, whether it fits, what to change, seconds, and which window.

    PlanConfig   what is asked for; each field is an option of `python -m sim plan`
    make(config) -> Plan

Bytes come from footprint.py, seconds from the clock, PPO beside T-PPO at each window. The clock runs a few of the engine replicas
for all of them (steady.py), so that an answer takes seconds; `Plan.sampling` says how many.

The window. What a cut costs depends on the task and its critic, which nobody knows before the run. What is known beforehand is the
weight that P4 (docs/theory.md) gives to it: `cut_weight`. The window to choose is the fastest whose weight is within the tolerance.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sim.clock.cluster import Setup
from sim.clock.distributions import Growth, Lengths
from sim.clock.footprint import Budget, bytes_per_phase, kv_cache_bytes, state_bytes, totals
from sim.clock.hardware import Accelerator, Layout, ModelShape, Roofline, cluster, model
from sim.clock.lengths import load_lengths, prompt_lengths
from sim.clock.steady import Steady, few, in_routine, sampled, synchronous
from sim.command import option

Floats = NDArray[np.float64]

__all__ = ["Plan", "PlanConfig", "Remedy", "bytes_per_phase", "cut_weight", "make"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """What is asked for."""

    model: str = option("Qwen/Qwen2.5-32B", "a built-in name, or a config.json or its folder [S]", metavar="NAME")
    gpus: str = option("64xH800", "devices that train and, in turn, decode [V]", metavar="NxNAME")
    lengths: str = option("math-mixture", "response lengths: a published name, a short form, or a file [O]", metavar="SPEC")
    field: str | None = option(None, "column or key of the lengths in a file", metavar="NAME")
    cap: int | None = option(24_576, "longest response, in tokens; 0: the distribution's own, a file's longest [P]")
    train_step: int = option(0, "training step whose lengths are planned for, where they grow [O]")
    prompt_tokens: int = option(200, "length of a prompt [O]")
    window: tuple[int, ...] = option((), "windows of T-PPO; none: a sixth, a third, a half of the cap [O]")
    refill: Literal["immediate", "step"] = option("immediate", "of slots that become free [S]")
    prompts: int = option(512, "prompts per step; with samples, the decoding slots [P]")
    samples: int = option(16, "responses per prompt [P]")
    updates: int = option(16, "policy updates per PPO step; T-PPO makes as many per trained token [P]")
    tp: int = option(0, "devices of an engine replica; 0: the fastest that fits [O]")
    micro_batch: int = option(0, "tokens per device and pass; 0: the longest sequence [O]")
    memory_utilisation: float = option(0.0, "engine's share of a device; 0: what the trainer leaves, at most 0.9 [O]")
    logit_chunk: int = option(0, "tokens whose logits exist at a time; 0: tppo_ref's half a gigabyte [O]")
    offload: bool = option(False, "shards, gradients and moments in host memory [O]")
    no_checkpointing: bool = option(False, "keep all activations [O]")
    sleep_level: int = option(2, "of the engine while training: 0, 1, 2 as vLLM's [O]")
    gamma: float = option(1.0, "discount [S]")
    lam: float = option(0.95, "trace parameter; the floor of the adaptive one [P]")
    alpha: float = option(0.05, "lambda = max(lam, 1 - 1/(alpha L)) [P]; 0: lam at every length")
    tolerance: float = option(0.1, "largest weight of the cut (see below) of a window to choose [O]")
    replicas: int = option(0, "engine replicas that are simulated for all; 0: 2, or 1 where 2 have more than 1,024 slots [O]")
    seed: int = option(0, "of the lengths [O]")
    out: str | None = option(None, "folder for the figure and its CSV; none: not drawn", metavar="FOLDER")
    json: bool = option(False, "print JSON and nothing else")


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change, in words, and the peak that it brings, in bytes."""

    text: str
    peak_bytes: float


@dataclasses.dataclass(frozen=True)
class Choice:
    """The window to take, why, and the weight of the cut of every window."""

    window: int | None
    reason: str
    weights: dict[int, float]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that the command prints and draws. Without room there are no seconds: `systems` is empty, `choice` None."""

    config: PlanConfig
    model: ModelShape
    accelerator: Accelerator
    layout: Layout
    budget: Budget
    lengths: Lengths
    phases: dict[str, dict[str, float]]
    problems: tuple[str, ...]
    remedies: tuple[Remedy, ...]
    systems: dict[int, Steady]
    """By window, PPO's last: a window as long as a response."""
    choice: Choice | None
    sampling: str

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def kv_capacity_tokens(self) -> int:
        return kv_capacity(self.model, self.layout, self.accelerator)

    @property
    def peak(self) -> tuple[str, float]:
        """The phase that needs most, and its bytes."""
        return max(totals(self.phases).items(), key=lambda item: item[1])

    def gain(self, window: int) -> float:
        """Trained tokens per second, T-PPO with this window / PPO."""
        return self.systems[window].tokens_per_s / self.systems[self.lengths.cap].tokens_per_s


def make(config: PlanConfig) -> Plan:
    """The plan. ValueError, in one line, for what is unknown or senseless, and for what no change listed here would make fit."""
    _check(config)
    shape, (num_devices, gpu) = model(config.model), cluster(config.gpus)
    lengths = at_step(load_lengths(config.lengths, config.cap or None, field=config.field), config.train_step)
    windows = config.window or default_windows(lengths.cap)
    for window in windows:
        if not 1 <= window <= lengths.cap:
            raise ValueError(f"window is {window}, expected 1 to the cap, {lengths.cap} tokens")
    sequence = lengths.cap + prompt_lengths(config.prompt_tokens).cap
    budget = Budget(sequence_tokens=sequence, offload=config.offload,
                    logit_chunk_tokens=config.logit_chunk or max(1, 2**27 // shape.vocab_size))  # fmt: skip
    layout = _layout(config, shape, gpu, num_devices, budget, lengths)
    phases = bytes_per_phase(shape, layout, budget, accelerator=gpu)
    found = problems(shape, layout, budget, gpu)
    remedies = tuple(_remedies(config, shape, layout, budget, gpu)) if found else ()
    if found and not remedies:
        raise ValueError(f"{shape.name} does not fit on {config.gpus}, with no change of tensor parallelism, micro-batch, cap, "
                         f"recomputation or offload: {found[0]}; take more devices, or larger ones")  # fmt: skip
    systems: dict[int, Steady] = {}
    choice, sampling = None, ""
    if not found:
        whole = _setup(config, shape, layout, gpu, lengths)
        some, _ = sampled(whole, config.replicas or few(whole))
        sampling = (f"T-PPO: {some.num_replicas} of {layout.num_replicas} engine replicas simulated, {some.slots:,} of "
                    f"{whole.slots:,} slots; PPO: all")  # fmt: skip
        systems = {w: in_routine(whole, w, refill=config.refill, replicas=config.replicas) for w in windows if w < lengths.cap}
        systems[lengths.cap] = synchronous(whole)
        choice = choose(config, lengths, {w: s for w, s in systems.items() if w < lengths.cap or len(systems) == 1})
    return Plan(config, shape, gpu, layout, budget, lengths, phases, tuple(found), remedies, systems, choice, sampling)


def _check(config: PlanConfig) -> None:
    for name in ("prompts", "samples", "updates", "prompt_tokens"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}, expected 1 or more")
    for name in ("tp", "replicas", "micro_batch", "logit_chunk", "train_step", "alpha", "tolerance", "memory_utilisation"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} is {getattr(config, name)}, expected 0 or more, finite")
    if config.cap is not None and config.cap < 0:
        raise ValueError(f"cap is {config.cap}, expected tokens, or 0 for the distribution's own")
    for name in ("gamma", "lam"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} is {getattr(config, name)}, expected a number in [0, 1]")


def at_step(lengths: Lengths, step: int) -> Lengths:
    """The distribution as it is at one training step."""
    if lengths.growth is None:
        return lengths
    return dataclasses.replace(lengths, growth=Growth(factors=((0, lengths.growth.factor(step)),)))


def default_windows(cap: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, cap // part) for part in (6, 3, 2)}))


# ---------------------------------------------------------------------------------------------------------------------- bytes


def kv_capacity(shape: ModelShape, layout: Layout, gpu: Accelerator) -> int:
    """Tokens that a replica's cache holds; negative where weights and reserve leave nothing."""
    share = max(1 / layout.tensor_parallel, 1 / shape.num_kv_heads)
    return math.floor(kv_cache_bytes(shape, layout, gpu) / (shape.kv_bytes_per_token(layout.bytes_per_parameter) * share))


def _layout(config: PlanConfig, shape: ModelShape, gpu: Accelerator, num_devices: int, budget: Budget, lengths: Lengths) -> Layout:
    """The layout asked for; what is left open is chosen: the engine's share by what the trainer leaves, its devices by speed."""

    def layout(tensor_parallel: int) -> Layout:
        plain = Layout(
            num_devices=num_devices, tensor_parallel=tensor_parallel,
            micro_batch_tokens=config.micro_batch or budget.sequence_tokens,
            activation_checkpointing=not config.no_checkpointing, sleep_level=config.sleep_level,  # type: ignore[arg-type]
            memory_utilisation=config.memory_utilisation or 0.9,
        )  # fmt: skip
        if config.memory_utilisation:
            return plain
        return with_utilisation(shape, plain, budget, gpu)

    if config.tp:
        return layout(config.tp)
    layouts = [layout(split) for split in tensor_parallel_sizes(shape, num_devices)]
    fitting = [lay for lay in layouts if not problems(shape, lay, budget, gpu)]
    if not fitting:
        return layouts[-1]
    return max(fitting, key=lambda lay: decode_rate(shape, lay, gpu, lengths, config.prompts * config.samples))


def with_utilisation(shape: ModelShape, layout: Layout, budget: Budget, gpu: Accelerator) -> Layout:
    """The layout whose engine takes what the trainer leaves of a device, at most 0.9, in whole per cent."""
    engine_only = ("engine_weights", "engine_reserve", "kv_cache")
    asked = ("rollout", "policy_update", "value_update") if layout.sleep_level == 0 else ("rollout",)
    trainer = [sum(b for term, b in terms.items() if term not in engine_only)
               for name, terms in bytes_per_phase(shape, layout, budget).items() if name in asked]  # fmt: skip
    share = math.floor(100 * (1 - max(trainer) / gpu.memory_bytes)) / 100
    return dataclasses.replace(layout, memory_utilisation=min(0.9, max(share, 0.01)))


def tensor_parallel_sizes(shape: ModelShape, num_devices: int) -> list[int]:
    """Powers of 2 within a node of 8 that divide devices and heads."""
    return [n for n in (1, 2, 4, 8) if num_devices % n == 0 and shape.num_heads % n == 0 and
            (shape.num_kv_heads % n == 0 or n % shape.num_kv_heads == 0)]  # fmt: skip


def decode_rate(shape: ModelShape, layout: Layout, gpu: Accelerator, lengths: Lengths, slots: int) -> float:
    """Tokens per second of all replicas with as many sequences as slots and cache allow, at half the mean response's context."""
    costs = Roofline(accelerator=gpu, model=shape, layout=layout)
    context = lengths.mean_tokens() / 2
    active = max(1.0, min(slots / layout.num_replicas, costs.kv_capacity_tokens / context))
    return layout.num_replicas * active / float(costs.decode_step_s(active, active * context))


def problems(shape: ModelShape, layout: Layout, budget: Budget, gpu: Accelerator) -> list[str]:
    """What does not fit, a line each."""
    found = []
    for phase, num_bytes in totals(bytes_per_phase(shape, layout, budget, accelerator=gpu)).items():
        if num_bytes > gpu.memory_bytes:
            found.append(f"{phase} needs {num_bytes / 1e9:.1f} GB per device, expected at most {gpu.memory_bytes / 1e9:.1f} GB")
    capacity = kv_capacity(shape, layout, gpu)
    if capacity < budget.sequence_tokens:
        found.append(f"the engine's KV cache holds {max(capacity, 0):,} tokens per replica, expected at least one sequence of "
                     f"{budget.sequence_tokens:,}")  # fmt: skip
    return found


def _remedies(config: PlanConfig, shape: ModelShape, layout: Layout, budget: Budget, gpu: Accelerator) -> Iterator[Remedy]:
    """Single changes that fit; if none does, pairs of them; if none does either, the fewest devices."""
    changes = list(_changes(shape, layout, budget, gpu))
    for number in (1, 2, 3):
        found = []
        for some in itertools.combinations(changes, number):
            fields = [set(lay) | set(bud) for _, lay, bud in some]
            if any(a & b for a, b in itertools.combinations(fields, 2)):
                continue
            new_budget = dataclasses.replace(budget, **{k: v for _, _, bud in some for k, v in bud.items()})
            new_layout = dataclasses.replace(layout, **{k: v for _, lay, _ in some for k, v in lay.items()})
            if new_budget.sequence_tokens < budget.sequence_tokens and not config.micro_batch:
                new_layout = dataclasses.replace(new_layout, micro_batch_tokens=new_budget.sequence_tokens)
            if not config.memory_utilisation:
                new_layout = with_utilisation(shape, new_layout, new_budget, gpu)
            if not problems(shape, new_layout, new_budget, gpu):
                peak = max(totals(bytes_per_phase(shape, new_layout, new_budget, accelerator=gpu)).values())
                found.append(Remedy(" and ".join(text for text, _, _ in some), peak))
        if found:
            yield from found
            return


def _changes(
    shape: ModelShape, layout: Layout, budget: Budget, gpu: Accelerator
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(words, fields of the layout, fields of the budget)."""
    for split in tensor_parallel_sizes(shape, layout.num_devices):
        if split > layout.tensor_parallel:
            yield f"--tp {split}", {"tensor_parallel": split}, {}
    if layout.micro_batch_tokens > budget.sequence_tokens:
        yield f"--micro_batch {budget.sequence_tokens}", {"micro_batch_tokens": budget.sequence_tokens}, {}
    if not layout.activation_checkpointing:
        yield "recomputation (drop --no_checkpointing)", {"activation_checkpointing": True}, {}
    if layout.sleep_level == 0:
        yield "--sleep_level 2", {"sleep_level": 2}, {}
    fitting = with_utilisation(shape, layout, budget, gpu).memory_utilisation
    if fitting < layout.memory_utilisation:
        yield f"--memory_utilisation {fitting:g}", {"memory_utilisation": fitting}, {}
    if not budget.offload:
        yield f"--offload ({host_bytes(shape, layout) / 1e9:,.0f} GB of host memory per device)", {}, {"offload": True}
    for part in (2, 3, 4, 6, 8):
        tokens = budget.sequence_tokens // part
        if tokens >= 1024:
            yield f"a cap of about {tokens} tokens", {}, {"sequence_tokens": tokens}
    for times in (2, 4, 8, 16):
        yield f"{times} times the devices", {"num_devices": times * layout.num_devices}, {}


def host_bytes(shape: ModelShape, layout: Layout) -> float:
    """What --offload keeps in the host's memory per device: masters, moments and gradients of both models."""
    return state_bytes(shape.num_parameters, layout) + state_bytes(shape.num_value_parameters, layout)


# -------------------------------------------------------------------------------------------------------------------- seconds


def _setup(config: PlanConfig, shape: ModelShape, layout: Layout, gpu: Accelerator, lengths: Lengths) -> Setup:
    slots = config.prompts * config.samples
    if slots < layout.num_replicas:
        raise ValueError(f"prompts x samples are {slots}, expected at least one response for each of {layout.num_replicas} engine "
                         "replicas")  # fmt: skip
    return Setup(
        lengths=lengths, prompt_tokens=config.prompt_tokens, costs=Roofline(accelerator=gpu, model=shape, layout=layout),
        slots=slots,
        num_replicas=layout.num_replicas, samples_per_prompt=config.samples, seed=config.seed,
        update_tokens=max(1, round(slots * lengths.mean_tokens() / config.updates)),
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------- window


def lambda_at_cut(length: ArrayLike, window: int, *, lam: float, alpha: float) -> Floats:
    """The trainer's lambda of rows that are cut at so many tokens; alpha = 0: lam at every length."""
    import torch  # the clock needs it for nothing else

    from tppo_ref.method.advantages import lambda_of_rows

    length_n = torch.as_tensor(np.atleast_1d(np.asarray(length, dtype=np.float64)))
    return lambda_of_rows(length_n, torch.ones_like(length_n, dtype=torch.bool), window, lam=lam, alpha=alpha or None).numpy()


def cut_weight(lengths: Lengths, window: int, *, gamma: float = 1.0, lam: float = 0.95, alpha: float = 0.0) -> float:
    """How much of P4's bracket falls on a sampled token, in the mean: 0 without cuts, 1 if every token stood at a cut.

        sum over edges l of P(T > l) * sum over the n tokens before l of (gamma lambda)^(n - 1),  over E[T]

    P4 (docs/theory.md): the cut's share of the mean |bias| is at most this times gamma [Lip + lambda |e| (1 + f)], which depends on
    task and critic. The first edge of a response is anywhere in a window, as with immediate refill.

    alpha   of the length-adaptive lambda of a row that is cut at l (`lambda_at_cut`); P4 is proven for alpha = 0 only, with it the
            weight is a comparison, no bound
    """
    above = 1 - lengths.cumulative()  # P(T > l)
    first = np.unique(np.linspace(1, window, 64).round().astype(np.int64))
    total = 0.0
    for at in range(-(-lengths.cap // window)):
        edge = first + at * window
        known = np.where(at == 0, edge, window)
        alive = np.where(edge < lengths.cap, above[np.minimum(edge, lengths.cap)], 0.0)
        decay = gamma * lambda_at_cut(edge, window, lam=lam, alpha=alpha)
        sums = np.where(decay < 1, (1 - decay**known) / np.maximum(1 - decay, 1e-300), known)
        total += float((alive * sums).mean())
    return total / lengths.mean_tokens()


def choose(config: PlanConfig, lengths: Lengths, systems: dict[int, Steady]) -> Choice:
    """The fastest window within the tolerance; if there is none, the one with the smallest weight."""
    weights = {w: cut_weight(lengths, w, gamma=config.gamma, lam=config.lam, alpha=config.alpha) for w in systems}
    within = [w for w, weight in weights.items() if weight <= config.tolerance]
    if within:
        best = max(within, key=lambda w: systems[w].tokens_per_s)
        return Choice(best, f"the fastest of those whose weight of the cut is within {config.tolerance:g}", weights)
    best = min(weights, key=lambda w: weights[w])
    return Choice(
        best, f"no window examined has a weight of the cut within {config.tolerance:g}; this one has the smallest", weights
    )
