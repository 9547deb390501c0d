"""Bytes on one device in each phase of a step, term by term, from a model's shape and a layout. No seconds: hardware.py.

Policy and value model are sharded over all training devices (FSDP2), master weights, gradients and AdamW's moments in fp32,
computing in `layout.bytes_per_parameter`. Each decoder layer is a group of its own; embedding and head form the root group, which
stays gathered from the forward to the backward pass. The value model has the policy's shape and a scalar head.

The longest sequence, prompt and response, is fed whole in one micro-batch: earlier windows of a response are fed again and
differentiated through, so that a smaller window does not make a training pass smaller. Only a lower cap does.

All counts are of live tensors at the phase's peak. What an allocator adds is `Budget.runtime_bytes`, an allowance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from sim.clock.hardware import GRADIENT_BYTES_PER_PARAMETER, OPTIMISER_BYTES_PER_PARAMETER, Accelerator, Layout, ModelShape

GIB = float(1 << 30)
TRAINING = ("logprob", "value_forward", "policy_update", "value_update")
PHASES = ("sync", "rollout", "probe", *TRAINING)
"""Phases, in the order of a step that begins with new weights. "probe" is the start-up's, where the budget has one: engine and
trainer compare log-probabilities, both awake."""

TERMS: dict[str, str] = {
    "policy_state": "the policy's fp32 master weights and AdamW moments, this device's shard (12 bytes a parameter)",
    "value_state": "the same of the value model",
    "gradients": "the fp32 gradient shards of the model under update, freed with it (4 bytes a parameter)",
    "gathered_weights": "weights gathered for computing: the root group, this layer and the next",
    "gathered_gradients": "gradients before they are reduced: a layer's, in the computing type and in fp32, and the head's",
    "activations": "of a micro-batch at the peak of the pass",
    "logits": "of a chunk of tokens, with their gradient in training; counted where the head is the peak",
    "engine_weights": "the engine's own copy of the policy, split over the devices of a replica",
    "engine_reserve": "the engine's activations, graphs and buffers (an allowance)",
    "kv_cache": "what is left of the engine's share for keys and values",
    "sync_buffer": "the largest tensor, whole in the engine's type, and its place in the engine",
    "runtime": "driver context, communication buffers and fragmentation (an allowance)",
}
"""Keys of `bytes_per_phase(...)[phase]`, and what they count."""

UNSEEN: dict[str, tuple[str, ...]] = {
    "dry_run": ("engine_weights", "engine_reserve", "kv_cache", "runtime"),
    "plan": (
        "temporaries of the optimiser step",
        "the attention kernel's workspace and masks",
        "the batch itself: token ids, log-probabilities, values",
        "padding of uneven shards",
        "what a sleeping engine keeps",
    ),
}
"""Terms that the other does not count: a dry run on fake tensors counts tensors of the training passes only."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budget:
    """What a plan assumes beside model and layout."""

    sequence_tokens: int
    """Tokens of the longest sequence, prompt and response: a micro-batch holds at least that."""
    logit_chunk_tokens: int = 882
    """Tokens whose logits exist at a time: tppo_ref's half a gigabyte in fp32 at Qwen's vocabulary [O]."""
    offload: bool = False
    """Shards, gradients and moments in the host's memory instead."""
    accumulate: bool = True
    """Gradient shards of earlier micro-batches exist at the peak. False: an update of one micro-batch."""
    value_model: bool = True
    """A value model of the policy's shape; False: the policy alone."""
    probe_tokens: int = 0
    """Tokens that the start-up's comparison of engine and trainer feeds to the policy; 0: there is none."""
    runtime_bytes: float = 2e9
    """Per device, for `runtime` [I]."""

    def __post_init__(self) -> None:
        for name in ("sequence_tokens", "logit_chunk_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}; expected a whole number, 1 or more")
        if not 0 <= self.runtime_bytes < float("inf"):
            raise ValueError(f"runtime_bytes: got {self.runtime_bytes!r}; expected bytes, 0 or more, finite")


def bytes_per_phase(
    model: ModelShape, layout: Layout, budget: Budget, *, accelerator: Accelerator | None = None
) -> dict[str, dict[str, float]]:
    """Phase -> term -> bytes on one device; phases are PHASES, terms TERMS; terms that a phase does not have are left out.

    accelerator   its memory sets the KV cache's share, `layout.memory_utilisation`; None: no `kv_cache`

    Colocated: the engine's weights live beside the sharded states in "sync" and "rollout", and are gone in training at sleep level
    1 and 2. At level 0 they and the KV cache stay everywhere. With engine devices of their own, "rollout" is such a device, and
    "sync" the larger of the two.
    """
    budget_tokens = max(budget.sequence_tokens, layout.micro_batch_tokens)
    engine, kv_cache = _engine(model, layout, accelerator)
    resident = _resident(model, layout, budget)
    apart, runtime = layout.num_engine_devices is not None, {"runtime": budget.runtime_bytes}
    stays = engine | kv_cache if layout.sleep_level == 0 and not apart else {}
    size = layout.bytes_per_parameter
    buffer = {"sync_buffer": float(model.num_embedding_parameters) * (size + size / layout.tensor_parallel)}
    phases = {
        "sync": resident | engine | buffer | (kv_cache if layout.sleep_level == 0 else {}) | runtime,
        "rollout": (engine if apart else resident | engine) | kv_cache | runtime,
    }
    if budget.probe_tokens:
        trainer = _pass(model, layout, budget, budget.probe_tokens, value=False, train=False)
        phases["probe"] = (trainer if apart else engine | kv_cache | trainer) | resident | runtime
    if apart:
        sides = [resident | buffer | runtime, engine | kv_cache | buffer | runtime]
        phases["sync"] = max(sides, key=lambda terms: sum(terms.values()))
    for name, value, train in (("logprob", False, False), ("value_forward", True, False),
                               ("policy_update", False, True), ("value_update", True, True)):  # fmt: skip
        if budget.value_model or not value:
            phases[name] = resident | stays | _pass(model, layout, budget, budget_tokens, value=value, train=train) | runtime
    return phases


def totals(phases: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Phase -> bytes in all."""
    return {name: sum(terms.values()) for name, terms in phases.items()}


def state_bytes(num_parameters: int, layout: Layout) -> float:
    """Master weights, moments and gradients of a model on one device: what a run holds between any two passes, at most."""
    return num_parameters * (OPTIMISER_BYTES_PER_PARAMETER + GRADIENT_BYTES_PER_PARAMETER) / layout.num_devices


def kv_cache_bytes(model: ModelShape, layout: Layout, accelerator: Accelerator) -> float:
    """What the engine's share of a device leaves for keys and values; negative where weights and reserve take more."""
    engine, _ = _engine(model, layout, None)
    return accelerator.memory_bytes * layout.memory_utilisation - sum(engine.values())


def _engine(model: ModelShape, layout: Layout, accelerator: Accelerator | None) -> tuple[dict[str, float], dict[str, float]]:
    weights = model.weight_bytes(layout.bytes_per_parameter) / layout.tensor_parallel
    engine = {"engine_weights": weights, "engine_reserve": layout.engine_reserve_bytes}
    if accelerator is None:
        return engine, {}
    return engine, {"kv_cache": max(0.0, kv_cache_bytes(model, layout, accelerator))}


def _resident(model: ModelShape, layout: Layout, budget: Budget) -> dict[str, float]:
    """What the trainer holds in every phase."""
    num = {"policy_state": model.num_parameters} | ({"value_state": model.num_value_parameters} if budget.value_model else {})
    share = 0.0 if budget.offload else 1 / layout.num_devices
    return {name: count * OPTIMISER_BYTES_PER_PARAMETER * share for name, count in num.items()}


def _pass(model: ModelShape, layout: Layout, budget: Budget, tokens: int, *, value: bool, train: bool) -> dict[str, float]:
    """Terms of one pass over a micro-batch, at its peak: in a layer, or at the head if that is more.

    In a layer   this layer and the next are gathered; in training, its gradients wait to be reduced, as does the head's
    At the head  a layer is still gathered, and a chunk's logits exist: in the computing type, in fp32, and in training the
                 gradients of both
    """
    size = layout.bytes_per_parameter
    layer = (model.num_body_parameters - model.hidden_size) // model.num_layers
    head = 0 if value or model.tied_embeddings else model.num_embedding_parameters
    root = model.num_embedding_parameters + head
    root_gradient = (0 if value else model.num_embedding_parameters) * size * train
    shards = (model.num_value_parameters if value else model.num_parameters) / layout.num_devices * (not budget.offload)
    gradients = {"gradients": shards * GRADIENT_BYTES_PER_PARAMETER * (train and budget.accumulate)}
    in_layer = gradients | {
        "gathered_weights": (root + 2 * layer) * size,
        "gathered_gradients": layer * (size + GRADIENT_BYTES_PER_PARAMETER) * train + root_gradient,
        "activations": tokens * activation_bytes_per_token(model, layout, train=train),
    }
    logits = 0 if value else min(tokens, budget.logit_chunk_tokens) * model.vocab_size * (size + 4) * (2 if train else 1)
    saved = activation_bytes_per_token(model, layout, train=train, in_layer=False)
    at_head = gradients | {
        "gathered_weights": (root + layer) * size,
        "gathered_gradients": root_gradient,
        "activations": tokens * saved,
        "logits": logits,
    }
    terms = max(in_layer, at_head, key=lambda moment: sum(moment.values()))
    return {name: float(num_bytes) for name, num_bytes in terms.items() if num_bytes}


def activation_bytes_per_token(model: ModelShape, layout: Layout, *, train: bool, in_layer: bool = True) -> float:
    """Of a training pass inside a layer's backward, or outside of any layer; of a forward pass without gradients.

    Training: `ModelShape.activation_bytes_per_token`; outside of a layer what the layers have saved. Without gradients
    [I]: residual, norm, queries, keys, values, attention, and gate, up and their product: 12 hidden + 6 intermediate sizes.
    """
    width = layout.bytes_per_parameter / 2  # the counts are of two bytes a number
    if not train:
        return width * (12 * model.hidden_size + 6 * model.intermediate_size if in_layer else 6 * model.hidden_size)
    whole = model.activation_bytes_per_token(checkpointing=layout.activation_checkpointing)
    if in_layer:
        return width * whole
    if layout.activation_checkpointing:
        return width * model.num_layers * 2 * model.hidden_size
    return width * (whole - 6 * model.intermediate_size)
