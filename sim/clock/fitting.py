"""What fits on a device: the engine's share, the cache that is left, what is too large, and what to change then."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterator
from typing import Any

from sim.clock.distributions import Lengths
from sim.clock.footprint import Budget, bytes_per_phase, kv_cache_bytes, state_bytes, totals
from sim.clock.hardware import Accelerator, Layout, ModelShape, Roofline


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A change, in words, and the peak that it brings, in bytes."""

    text: str
    peak_bytes: float


def kv_capacity(shape: ModelShape, layout: Layout, gpu: Accelerator) -> int:
    """Tokens that a replica's cache holds; negative where weights and reserve leave nothing."""
    share = max(1 / layout.tensor_parallel, 1 / shape.num_kv_heads)
    return math.floor(kv_cache_bytes(shape, layout, gpu) / (shape.kv_bytes_per_token(layout.kv_number_bytes) * share))


def with_utilisation(shape: ModelShape, layout: Layout, budget: Budget, gpu: Accelerator) -> Layout:
    """The layout whose engine takes what the trainer leaves of a device, at most 0.9, in whole per cent."""
    engine_only = ("engine_weights", "engine_reserve", "kv_cache")
    asked = ("rollout", "probe", "policy_update", "value_update") if layout.sleep_level == 0 else ("rollout", "probe")
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


def remedies_of(
    shape: ModelShape, layout: Layout, budget: Budget, gpu: Accelerator, *, fixed: Collection[str] = ()
) -> Iterator[Remedy]:
    """Single changes that fit; if none does, pairs of them; if none does either, three.

    fixed   of "micro_batch" and "memory_utilisation" those that the user chose: the others follow a change
    """
    changes = list(_changes(shape, layout, budget, gpu))
    for number in (1, 2, 3):
        found = []
        for some in itertools.combinations(changes, number):
            fields = [set(lay) | set(bud) for _, lay, bud in some]
            if any(a & b for a, b in itertools.combinations(fields, 2)):
                continue
            new_budget = dataclasses.replace(budget, **{k: v for _, _, bud in some for k, v in bud.items()})
            new_layout = dataclasses.replace(layout, **{k: v for _, lay, _ in some for k, v in lay.items()})
            if new_budget.sequence_tokens < budget.sequence_tokens and "micro_batch" not in fixed:
                new_layout = dataclasses.replace(new_layout, micro_batch_tokens=new_budget.sequence_tokens)
            if "memory_utilisation" not in fixed:
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
