"""What each phase of a step takes, in seconds: the `Costs` that the clock asks, and a roofline that answers.

`Roofline` counts operations and bytes from a model's shape and divides them by an accelerator's rates times what software reaches
of them (`Efficiency`): a kernel takes as long as the slower of its arithmetic and its traffic, and kernels run one after another.
Work is taken as spread evenly over devices: what unequal ranks wait for is balance.py's. calibrate.Measured answers from a run's
own timeline.

The engine: replicas of `tensor_parallel` devices, two all-reduces per layer. Training: parameters, gradients and optimiser state
sharded over all training devices (FSDP2), in bf16 with fp32 state; each micro-batch gathers the weights. Sequence parallelism
and speculative decoding are not modelled. Suffix n: cases that are asked at once.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sim.clock.devices import ACCELERATORS, Accelerator, accelerator, cluster
from sim.clock.efficiency import Efficiency
from sim.clock.layout import Layout
from sim.clock.specs import MODELS, ModelShape, model

__all__ = [
    "ACCELERATORS", "MODELS", "Accelerator", "Costs", "Efficiency", "Layout", "ModelShape", "Roofline", "accelerator",
    "causal_context", "cluster", "model",
]  # fmt: skip

Seconds = NDArray[np.float64]

OPTIMISER_BYTES_PER_PARAMETER = 12  # AdamW in fp32: master weight and two moments
GRADIENT_BYTES_PER_PARAMETER = 4  # reduced and kept in fp32
OPTIMISER_TRAFFIC_BYTES_PER_PARAMETER = 28  # AdamW reads weight, gradient and moments, writes weight and moments


class Work(NamedTuple):
    """Of one kind of kernel: operations, and bytes read."""

    flops: NDArray[np.float64]
    moved_bytes: NDArray[np.float64]


class Costs(Protocol):
    """Seconds of every phase, vectorised: numbers give a number, arrays an array (they broadcast).

    tokens          tokens that are fed to the model, over all sequences.
    context_tokens  for each of these tokens the tokens that it attends to, itself included, summed: the query-key pairs. One
                    decode step of sequences with c_1, c_2, … tokens has c_1 + c_2 + …; a sequence that is fed whole, n tokens,
                    has n (n + 1) / 2; `causal_context(begin, stop)` has it for any part of one. 0 charges no attention.

    The engine's costs are those of one replica, the others those of the whole cluster with its work spread evenly.
    """

    @property
    def kv_capacity_tokens(self) -> int | None:
        """Tokens that the KV cache of one engine replica holds; None: without bound."""

    def decode_step_s(self, active_n: ArrayLike, context_tokens_n: ArrayLike) -> Seconds:
        """One decode step of `active` sequences on one replica: a straight line in their context. No active sequence costs 0."""

    def prefill_s(self, tokens: ArrayLike, context_tokens: ArrayLike = 0) -> Seconds:
        """Prompts, and tokens whose cache was dropped, fed to one replica."""

    def logprob_s(self, tokens: ArrayLike, context_tokens: ArrayLike) -> Seconds:
        """Log-probabilities of the policy: one forward pass."""

    def prefix_s(self, tokens: ArrayLike, context_tokens: ArrayLike) -> Seconds:
        """The policy's forward pass over tokens whose keys and values alone are wanted."""

    def policy_train_s(self, tokens: ArrayLike, context_tokens: ArrayLike, num_updates: ArrayLike = 1) -> Seconds:
        """`num_updates` updates of the policy on the tokens of all of them together, the optimiser's steps included."""

    def value_forward_s(self, tokens: ArrayLike, context_tokens: ArrayLike) -> Seconds:
        """Values of the critic: one forward pass."""

    def value_train_s(self, tokens: ArrayLike, context_tokens: ArrayLike, num_updates: ArrayLike = 1) -> Seconds:
        """Updates of the critic; see `policy_train_s`."""

    def sync_s(self) -> float:
        """The policy's new weights to every engine."""

    def wake_s(self) -> float:
        """The engines take back the memory that training used."""


def causal_context(begin: ArrayLike, stop: ArrayLike) -> NDArray[np.int64]:
    """Query-key pairs of the tokens [begin, stop) of a sequence: sum over t of (t + 1)."""
    begin, stop = np.asarray(begin, dtype=np.int64), np.asarray(stop, dtype=np.int64)
    return (stop * (stop + 1) - begin * (begin + 1)) // 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """`Costs` of an accelerator, a model and a layout. See the module's docstring.

    critic   the value model's shape; None: the policy's

    Raises ValueError when the weights do not fit the engine's devices, or heads do not divide among them.
    """

    accelerator: Accelerator
    model: ModelShape
    layout: Layout
    efficiency: Efficiency = dataclasses.field(default_factory=Efficiency)
    critic: ModelShape | None = None

    def __post_init__(self) -> None:
        split, heads, kv_heads = self.layout.tensor_parallel, self.model.num_heads, self.model.num_kv_heads
        if heads % split or (kv_heads % split and split % kv_heads):
            raise ValueError(f"tensor_parallel: got {split}; expected a divisor of {self.model.name}'s {heads} heads that divides, "
                             f"or is a multiple of, its {kv_heads} key-value heads")  # fmt: skip
        if self.kv_capacity_tokens < 1:
            lay, gpu = self.layout, self.accelerator
            raise ValueError(f"{self.model.name} does not fit: {self.engine_weight_bytes / 1e9:.1f} GB of weights and "
                             f"{lay.engine_reserve_bytes / 1e9:.1f} GB of reserve per device, expected less than "
                             f"{gpu.memory_bytes * lay.memory_utilisation / 1e9:.1f} GB of an {gpu.name}; raise tensor_parallel "
                             f"(it is {split}) or memory_utilisation")  # fmt: skip

    # Sizes

    @property
    def engine_weight_bytes(self) -> float:
        """Per device of a replica."""
        return self.model.weight_bytes(self.layout.bytes_per_parameter) / self.layout.tensor_parallel

    @property
    def kv_bytes_per_token(self) -> float:
        """Per device of a replica; with more devices than key-value heads, these are held more than once."""
        share = max(1 / self.layout.tensor_parallel, 1 / self.model.num_kv_heads)
        return self.model.kv_bytes_per_token(self.layout.kv_number_bytes) * share

    @property
    def kv_capacity_tokens(self) -> int:
        engine_bytes = self.accelerator.memory_bytes * self.layout.memory_utilisation
        return math.floor((engine_bytes - self.engine_weight_bytes - self.layout.engine_reserve_bytes) / self.kv_bytes_per_token)

    def operations_per_byte(self, active: ArrayLike, context_tokens: ArrayLike) -> NDArray[np.float64]:
        """Of a decode step: operations / bytes of weights and KV cache that are read. With short contexts, the active batch."""
        weights, attention = self._decode_work(active, context_tokens)
        return (weights.flops + attention.flops) / (weights.moved_bytes + attention.moved_bytes)

    def row_work(self, tokens: ArrayLike, context_tokens: ArrayLike) -> NDArray[np.float64]:
        """A forward pass's operations: by how much of it a row keeps its rank busy."""
        return self.model.forward_flops(np.asarray(tokens, dtype=float), np.asarray(context_tokens, dtype=float))

    # The engine

    def decode_step_s(self, active_n: ArrayLike, context_tokens_n: ArrayLike) -> Seconds:
        """Kernels run one after another, so each of the two kinds is bound by its own roof; 0 where nothing is active:

        max(weights' bytes, their operations) + max(KV bytes, attention's operations) + all-reduces
        + sampling: the vocabulary, on every device + overhead per step + overhead per sequence
        """
        eff, active_n = self.efficiency, np.asarray(active_n, dtype=float)
        roof_n = sum((self._roof_s(work) for work in self._decode_work(active_n, context_tokens_n)), np.zeros(()))
        logits_s = eff.sampling_passes * 4 * self.model.vocab_size / self._memory_rate
        step_n = roof_n + self._all_reduces_s(active_n, num_steps=1) + eff.decode_overhead_s
        step_n = step_n + active_n * (eff.sequence_overhead_s + logits_s)
        return np.where(active_n > 0, step_n, 0.0)[()]

    def prefill_s(self, tokens: ArrayLike, context_tokens: ArrayLike = 0) -> Seconds:
        """As a decode step, in chunks; logits of the last token only, and cached keys and values are not counted as traffic.

        The chunks are steps of their own: an engine that mixes them with decoding reads the weights once for both, and is faster.
        """
        eff, split, tokens = self.efficiency, self.layout.tensor_parallel, np.asarray(tokens, dtype=float)
        chunks = np.ceil(tokens / eff.prefill_chunk_tokens)
        read = chunks * self.model.read_bytes(self.layout.bytes_per_parameter) / split
        weights = Work(self.model.forward_flops(tokens, 0.0, head=False) / split, read)
        attention = Work(self.model.forward_flops(0.0, np.asarray(context_tokens, dtype=float), head=False) / split, np.zeros(()))
        roof_s = self._roof_s(weights) + self._roof_s(attention)
        return (roof_s + self._all_reduces_s(tokens, num_steps=chunks) + chunks * eff.decode_overhead_s)[()]

    def wake_s(self) -> float:
        """An overhead, and at sleep level 1 the weights from the host's memory. 0 for engines that never sleep."""
        if self.layout.num_engine_devices is not None or self.layout.sleep_level == 0:
            return 0.0
        from_host = self.engine_weight_bytes if self.layout.sleep_level == 1 else 0.0
        return self.efficiency.wake_overhead_s + from_host / self._host_rate

    def sync_s(self) -> float:
        """A cost per tensor, and the bytes: as software hands them over (`sync_bytes_per_s`), or as the links carry them where that
        takes longer: an all-gather over the training devices, each engine device's own copy, and with engine devices of their own
        one broadcast in between over the network, from one device's adapter."""
        eff, weights = self.efficiency, self.model.weight_bytes(self.layout.bytes_per_parameter)
        links_s = self._gather_s(weights) + 2 * self.engine_weight_bytes / self._memory_rate
        if self.layout.num_engine_devices is not None:
            links_s += weights / (self.accelerator.network_bytes_per_s * eff.network_fraction)
        return self.model.num_tensors * eff.sync_tensor_s + max(weights / eff.sync_bytes_per_s, links_s)

    # Training

    def logprob_s(self, tokens: ArrayLike, context_tokens: ArrayLike) -> Seconds:
        return self._passes_s(self.model, tokens, context_tokens, 1)

    def prefix_s(self, tokens: ArrayLike, context_tokens: ArrayLike) -> Seconds:
        return self._passes_s(self.model, tokens, context_tokens, 1, head=False)

    def value_forward_s(self, tokens: ArrayLike, context_tokens: ArrayLike) -> Seconds:
        return self._passes_s(self._critic, tokens, context_tokens, 1, value=True)

    def policy_train_s(self, tokens: ArrayLike, context_tokens: ArrayLike, num_updates: ArrayLike = 1) -> Seconds:
        """Forward and backward pass, 3 forward passes' operations, 4 with recomputation; one optimiser step per update."""
        return self._passes_s(self.model, tokens, context_tokens, num_updates, train=True)

    def value_train_s(self, tokens: ArrayLike, context_tokens: ArrayLike, num_updates: ArrayLike = 1) -> Seconds:
        return self._passes_s(self._critic, tokens, context_tokens, num_updates, value=True, train=True)

    def optimiser_s(self, num_parameters: int | None = None) -> float:
        """One AdamW step on a device's share of the parameters, the policy's by default: bound by memory."""
        share = (self.model.num_parameters if num_parameters is None else num_parameters) / self.layout.num_devices
        return share * OPTIMISER_TRAFFIC_BYTES_PER_PARAMETER / self._memory_rate

    # Parts

    @property
    def _memory_rate(self) -> float:
        return self.accelerator.memory_bytes_per_s * self.efficiency.memory_fraction

    @property
    def _engine_flops_rate(self) -> float:
        return self.accelerator.flops_per_s * self.efficiency.engine_flops_fraction

    @property
    def _host_rate(self) -> float:
        return self.accelerator.host_link_bytes_per_s * self.efficiency.host_link_fraction

    @property
    def _critic(self) -> ModelShape:
        return self.critic or self.model

    def _decode_work(self, active: ArrayLike, context_tokens: ArrayLike) -> tuple[Work, Work]:
        """Of a decode step, per device of a replica: the products with weights, and attention."""
        active, context_tokens = np.asarray(active, dtype=float), np.asarray(context_tokens, dtype=float)
        split = self.layout.tensor_parallel
        weights = np.asarray(self.model.read_bytes(self.layout.bytes_per_parameter) / split)
        products, attention = (self.model.forward_flops(*work) / split for work in ((active, 0.0), (0.0, context_tokens)))
        return Work(products, weights), Work(attention, self.kv_bytes_per_token * context_tokens)

    def _roof_s(self, work: Work) -> Seconds:
        return np.maximum(work.moved_bytes / self._memory_rate, work.flops / self._engine_flops_rate)

    def _all_reduces_s(self, tokens: NDArray[np.float64], num_steps: ArrayLike) -> NDArray[np.float64]:
        """Two all-reduces per layer of a replica's hidden states: latency, and 2 (n - 1) / n of the bytes over each link."""
        split, eff = self.layout.tensor_parallel, self.efficiency
        if split == 1:
            return np.zeros_like(tokens)
        hidden_bytes = tokens * self.model.hidden_size * self.layout.bytes_per_parameter
        link_rate = self.accelerator.node_link_bytes_per_s * eff.link_fraction
        once_s = np.multiply(num_steps, eff.all_reduce_latency_s) + 2 * (split - 1) / split * hidden_bytes / link_rate
        return 2 * self.model.num_layers * once_s

    def _gather_s(self, num_bytes: float) -> float:
        """All-gather, or reduce-scatter, of `num_bytes` in all, over the training devices.

        Every device receives (N - 1) / N of them over its link to the node; where there are several nodes, each node receives them
        through its devices' network adapters together. The slower of the two is the time.
        """
        devices, per_node = self.layout.num_devices, min(self.layout.num_devices, self.layout.devices_per_node)
        received = num_bytes * (devices - 1) / devices
        rate = self.accelerator.node_link_bytes_per_s * self.efficiency.link_fraction
        if devices > per_node:
            rate = min(rate, per_node * self.accelerator.network_bytes_per_s * self.efficiency.network_fraction)
        return received / rate

    def _passes_s(
        self, shape: ModelShape, tokens: ArrayLike, context_tokens: ArrayLike, num_updates: ArrayLike, *, value: bool = False,
        head: bool = True, train: bool = False,
    ) -> Seconds:  # fmt: skip
        """Micro-batches of `micro_batch_tokens` on every device. Forward: one all-gather each. Training: another in the backward
        pass, and a reduce-scatter of fp32 gradients; an optimiser step per update. A value model's head is a scalar."""
        lay, eff, tokens = self.layout, self.efficiency, np.asarray(tokens, dtype=float)
        num_parameters = shape.num_value_parameters if value else shape.num_parameters
        num_updates = np.where(tokens > 0, num_updates, 0)
        per_update = tokens / np.maximum(num_updates, 1)
        passes = num_updates * np.ceil(per_update / (lay.num_devices * lay.micro_batch_tokens))
        flops = shape.forward_flops(tokens, np.asarray(context_tokens, dtype=float), head=head and not value)
        flops = flops * (1 if not train else 4 if lay.activation_checkpointing else 3)
        compute_s = flops / lay.num_devices / (self.accelerator.flops_per_s * eff.training_flops_fraction)
        gathered = num_parameters * (lay.bytes_per_parameter * (2 if train else 1) + GRADIENT_BYTES_PER_PARAMETER * train)
        link_s = passes * self._gather_s(gathered)
        hidden_s = eff.communication_overlap * np.minimum(compute_s, link_s)
        return (compute_s + link_s - hidden_s + num_updates * (self.optimiser_s(num_parameters) * train))[()]
