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
import math
from typing import Literal

from tqdm import tqdm

from sim.clock.cluster import Setup
from sim.clock.cuts import cut_weight
from sim.clock.distributions import Lengths
from sim.clock.efficiency import Efficiency
from sim.clock.fitting import Remedy, decode_rate, kv_capacity, problems, remedies_of, tensor_parallel_sizes, with_utilisation
from sim.clock.footprint import Budget, bytes_per_phase, totals
from sim.clock.hardware import Accelerator, Layout, ModelShape, Roofline, cluster, model
from sim.clock.lengths import load_lengths, prompt_lengths
from sim.clock.ranges import Range, Ranged
from sim.clock.steady import Steady, few, in_routine, sampled, synchronous
from sim.command import option

__all__ = ["Choice", "Plan", "PlanConfig", "make"]


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
    updates: int = option(
        16, "policy updates per PPO step; T-PPO makes as many per trained token; with --best, of any step at most [P]"
    )
    best: bool = option(False, "search slots, window, tensor parallelism and method, and print the config to run")
    method: str = option(
        "all", "with --best: what may be recommended: all, tppo, partial-is, ppo, or a method's name [O]", metavar="NAME"
    )
    mini_batch: int = option(512, "with --best: responses whose tokens an update trains [P]")
    slack: float = option(0.03, "with --best: share of the speed that fresher tokens are worth [O]")
    longest_prompt: int = option(1024, "with --best: tokens of the longest prompt; memory is planned for it [O]")
    tp: int = option(0, "devices of an engine replica; 0: the fastest that fits [O]")
    micro_batch: int = option(0, "tokens per device and pass; 0: the longest sequence [O]")
    memory_utilisation: float = option(0.0, "engine's share of a device; 0: what the trainer leaves, at most 0.9 [O]")
    logit_chunk: int = option(0, "tokens whose logits exist at a time; 0: tppo_ref's half a gigabyte [O]")
    offload: bool = option(False, "shards, gradients and moments in host memory [O]")
    no_checkpointing: bool = option(False, "keep all activations [O]")
    sleep_level: int = option(2, "of the engine while training: 0, 1, 2 as vLLM's [O]")
    kv_cache: Literal["auto", "fp8"] = option("auto", "fp8: a byte for each number of the engine's KV cache; not with --best [O]")
    gamma: float = option(1.0, "discount [S]")
    lam: float = option(0.95, "trace parameter; the floor of the adaptive one [P]")
    alpha: float = option(0.05, "lambda = max(lam, 1 - 1/(alpha L)) [P]; 0: lam at every length")
    tolerance: float = option(0.1, "largest weight of the cut (see below) of a window to choose [O]")
    replicas: int = option(0, "engine replicas that are simulated for all; 0: 2, or 1 where 2 have more than 1,024 slots [O]")
    seed: int = option(0, "of the lengths [O]")
    out: str | None = option(None, "folder for the figure and its CSV; with --best, file for the config", metavar="PATH")
    json: bool = option(False, "print JSON and nothing else")


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
    ranged: dict[int, Ranged]
    """By window, PPO's last: a window as long as a response."""
    choice: Choice | None
    sampling: str

    @property
    def systems(self) -> dict[int, Steady]:
        """By the middle efficiencies."""
        return {window: system.middle for window, system in self.ranged.items()}

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

    def gain(self, window: int) -> Range:
        """Trained tokens per second, T-PPO with this window / PPO."""
        return self.ranged[window].gain(self.ranged[self.lengths.cap])


def make(config: PlanConfig) -> Plan:
    """The plan. ValueError, in one line, for what is unknown or senseless, and for what no change listed here would make fit."""
    check(config)
    shape, (num_devices, gpu) = model(config.model), cluster(config.gpus)
    lengths = load_lengths(config.lengths, config.cap or None, field=config.field).at_step(config.train_step)
    windows = config.window or default_windows(lengths.cap)
    for window in windows:
        if not 1 <= window <= lengths.cap:
            raise ValueError(f"window: got {window}; expected 1 to the cap, {lengths.cap} tokens")
    sequence = lengths.cap + prompt_lengths(config.prompt_tokens).cap
    budget = Budget(sequence_tokens=sequence, offload=config.offload,
                    logit_chunk_tokens=config.logit_chunk or max(1, 2**27 // shape.vocab_size))  # fmt: skip
    layout = _layout(config, shape, gpu, num_devices, budget, lengths)
    phases = bytes_per_phase(shape, layout, budget, accelerator=gpu)
    found = problems(shape, layout, budget, gpu)
    fixed = set() if not config.micro_batch else {"micro_batch"}
    fixed |= {"memory_utilisation"} if config.memory_utilisation else set()
    remedies = tuple(remedies_of(shape, layout, budget, gpu, fixed=fixed)) if found else ()
    if found and not remedies:
        raise ValueError(f"{shape.name} does not fit on {config.gpus}, with no change of tensor parallelism, micro-batch, cap, "
                         f"recomputation or offload: {found[0]}; take more devices, or larger ones")  # fmt: skip
    ranged: dict[int, Ranged] = {}
    choice, sampling = None, ""
    if not found:
        whole = _setup(config, shape, layout, gpu, lengths)
        some, _ = sampled(whole, config.replicas or few(whole))
        sampling = (f"T-PPO: {some.num_replicas} of {layout.num_replicas} engine replicas simulated, {some.slots:,} of "
                    f"{whole.slots:,} slots; PPO: all")  # fmt: skip
        tried = tqdm([*(w for w in windows if w < lengths.cap), lengths.cap], "plan", unit="window", delay=1.0, leave=False,
                     disable=config.json or None)  # fmt: skip
        ranged = {w: _system(config, whole, w) for w in tried}
        choice = choose(config, lengths, {w: s.middle for w, s in ranged.items() if w < lengths.cap or len(ranged) == 1})
    return Plan(config, shape, gpu, layout, budget, lengths, phases, tuple(found), remedies, ranged, choice, sampling)


def check(config: PlanConfig) -> None:
    """ValueError for the first option that makes no sense."""
    for name in ("prompts", "samples", "updates", "prompt_tokens", "mini_batch", "longest_prompt"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: got {getattr(config, name)}; expected 1 or more")
    for name in ("tp", "replicas", "micro_batch", "logit_chunk", "train_step", "alpha", "tolerance", "memory_utilisation"):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name}: got {getattr(config, name)}; expected 0 or more, finite")
    if config.cap is not None and config.cap < 0:
        raise ValueError(f"cap: got {config.cap}; expected tokens, or 0 for the distribution's own")
    if config.best and config.kv_cache != "auto":
        raise ValueError(f"kv_cache: got {config.kv_cache}; expected auto with --best; plan a setting of your own")
    for name in ("gamma", "lam", "slack"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name}: got {getattr(config, name)}; expected a number in [0, 1]")


def default_windows(cap: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, cap // part) for part in (6, 3, 2)}))


def _layout(config: PlanConfig, shape: ModelShape, gpu: Accelerator, num_devices: int, budget: Budget, lengths: Lengths) -> Layout:
    """The layout asked for; what is left open is chosen: the engine's share by what the trainer leaves, its devices by speed."""

    def layout(tensor_parallel: int) -> Layout:
        plain = Layout(
            num_devices=num_devices, tensor_parallel=tensor_parallel,
            micro_batch_tokens=config.micro_batch or budget.sequence_tokens,
            activation_checkpointing=not config.no_checkpointing, sleep_level=config.sleep_level,  # type: ignore[arg-type]
            memory_utilisation=config.memory_utilisation or 0.9, fp8_kv_cache=config.kv_cache == "fp8",
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


# -------------------------------------------------------------------------------------------------------------------- seconds


def _setup(config: PlanConfig, shape: ModelShape, layout: Layout, gpu: Accelerator, lengths: Lengths) -> Setup:
    slots = config.prompts * config.samples
    if slots < layout.num_replicas:
        raise ValueError(f"prompts x samples: got {slots}; expected at least one response for each of {layout.num_replicas} engine "
                         "replicas")  # fmt: skip
    return Setup(
        lengths=lengths, prompt_tokens=config.prompt_tokens, costs=Roofline(accelerator=gpu, model=shape, layout=layout),
        slots=slots,
        num_replicas=layout.num_replicas, ranks=layout.num_devices, samples_per_prompt=config.samples, seed=config.seed,
        update_tokens=max(1, round(slots * lengths.mean_tokens() / config.updates)),
    )  # fmt: skip


def _system(config: PlanConfig, whole: Setup, window: int) -> Ranged:
    """T-PPO with this window, at any level of efficiency; PPO where it is as long as a response."""

    def run(efficiency: Efficiency) -> Steady:
        setup = dataclasses.replace(whole, costs=dataclasses.replace(whole.costs, efficiency=efficiency))  # type: ignore[type-var]
        if window == whole.lengths.cap:
            return synchronous(setup)
        return in_routine(setup, window, refill=config.refill, replicas=config.replicas)

    return Ranged(run)


# --------------------------------------------------------------------------------------------------------------------- window


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
