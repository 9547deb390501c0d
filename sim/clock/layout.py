"""How a cluster is used, and what software reaches of it: the named parameters of hardware.Roofline, each default with its source.

Marks, as in docs/config.md: [V] a primary source, [2] a secondary one, [I] inferred, [M] measured by us, [O] our choice.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class Efficiency:
    """What software reaches of a rate (`_fraction`, in (0, 1]), and what it adds (`_s`). Each default has its source; none was
    chosen by looking at the step times that the clock is to predict."""

    memory_fraction: float = 0.8
    """Of HBM's rate in a decode step. A plain copy reaches 4.3 of 4.8 TB/s on an H200 [M]; decoding stays below: 60-85 % [2]."""
    engine_flops_fraction: float = 0.58
    """Of matrix FLOP/s in prefill and decoding: vLLM prefills 4k-8k tokens with Qwen2.5-72B on 2 H100 at 0.55-0.58
    (tenstorrent/tt-inference-server issue 143) [V]; plain products alone reach 0.78-0.81 on an H200 [M]."""
    training_flops_fraction: float = 0.40
    """Of matrix FLOP/s in the trainer's passes, recomputation counted: FSDP2 on 8-128 H100 0.33-0.39 (torchtitan's performance
    page), Llama 3 on 8-16k H100 0.38-0.43 (arXiv 2407.21783) [V]. Padding and unequal ranks of RL come on top: unknown."""
    link_fraction: float = 0.77
    """Of NVLink's rate in a collective of large messages: 366 GB/s of bus bandwidth on 4 H100, which the source calls 77 % [2]."""
    network_fraction: float = 0.92
    """Of the network's rate: 46-48 GB/s per 400 Gb/s adapter (NVIDIA/nccl-tests issue 290) [V]."""
    host_link_fraction: float = 0.8
    """Of PCIe's rate with pinned memory [I]."""
    all_reduce_latency_s: float = 10e-6
    """Of one all-reduce of a few KB in a node: 9-12 microseconds on H100 (sgl-project/sglang pull request 2904) [V]."""
    decode_overhead_s: float = 3e-3
    """Per decode step, for launches, scheduling and sampling: what a 4B model's 5 ms on an H200 (vllm-project/vllm pull request
    51167) leave beyond reading its weights [I]. Growth with the batch: unknown, 0 here."""
    prefill_chunk_tokens: int = 8192
    """Tokens that the engine prefills at once; each chunk reads the weights and costs a step's overhead. vLLM's default [V]."""
    communication_overlap: float = 1.0
    """Share of the shorter of computing and communicating that hides behind the longer in training. 1, because
    `training_flops_fraction` was measured with what shows of communication inside [O]."""
    sync_overhead_s: float = 0.18
    """Per weight sync beside the bytes: a 0.6B model's sync on one node (huggingface/trl pull request 5892) [V]."""
    wake_overhead_s: float = 0.4
    """Per engine wake-up beside the bytes: 0.1-0.4 s for small models (vLLM's page on sleep mode) [V]."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), field.name
            if name.endswith("_fraction") and not 0 < value <= 1:
                raise ValueError(f"{name} is {value!r}, expected a number in (0, 1]")
            if name.endswith("_s") and not 0 <= value < math.inf:
                raise ValueError(f"{name} is {value!r}, expected seconds, 0 or more, finite")
        if not 0 <= self.communication_overlap <= 1:
            raise ValueError(f"communication_overlap is {self.communication_overlap!r}, expected a number in [0, 1]")
        if self.prefill_chunk_tokens < 1:
            raise ValueError(f"prefill_chunk_tokens is {self.prefill_chunk_tokens!r}, expected 1 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How devices are used. Colocated: the same devices train and, asleep in between, decode."""

    num_devices: int
    """Devices that train, and decode unless `num_engine_devices` says otherwise."""
    tensor_parallel: int = 1
    """Devices of an engine replica, inside one node."""
    num_engine_devices: int | None = None
    """Devices of their own for the engine (disaggregated); None: colocated."""
    devices_per_node: int = 8
    bytes_per_parameter: int = 2
    """Of weights, activations and KV cache in computing: 2 = bf16, 4 = fp32. Gradients and optimiser state are fp32."""
    memory_utilisation: float = 0.9
    """Share of a device's memory that the engine takes for weights, reserve and KV cache. vLLM's default [V]."""
    engine_reserve_bytes: float = 4e9
    """Per device, for the engine's activations, graphs and buffers [I]."""
    micro_batch_tokens: int = 32_768
    """Tokens that a device trains on at once; a pass over them gathers the weights. The longest response must fit [O]."""
    activation_checkpointing: bool = True
    """Recompute the forward pass in the backward pass."""
    sleep_level: Literal[0, 1, 2] = 2
    """Colocated engines in training, in vLLM's words: 1 keeps weights in the host's memory, 2 drops them, 0 stays awake."""

    def __post_init__(self) -> None:
        for name in ("num_devices", "tensor_parallel", "devices_per_node", "bytes_per_parameter", "micro_batch_tokens"):
            if isinstance(getattr(self, name), bool) or not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a whole number, 1 or more")
        if self.tensor_parallel > self.devices_per_node:
            raise ValueError(
                f"tensor_parallel is {self.tensor_parallel}, expected at most the devices of a node, {self.devices_per_node}"
            )
        if self.engine_devices < 1 or self.engine_devices % self.tensor_parallel:
            raise ValueError(
                f"tensor_parallel is {self.tensor_parallel}, expected a divisor of the engine's {self.engine_devices} devices"
            )
        if not 0 < self.memory_utilisation <= 1:
            raise ValueError(f"memory_utilisation is {self.memory_utilisation!r}, expected a number in (0, 1]")
        if not 0 <= self.engine_reserve_bytes < math.inf:
            raise ValueError(f"engine_reserve_bytes is {self.engine_reserve_bytes!r}, expected bytes, 0 or more, finite")
        if self.sleep_level not in (0, 1, 2):
            raise ValueError(f"sleep_level is {self.sleep_level!r}, expected 0, 1 or 2")

    @property
    def engine_devices(self) -> int:
        return self.num_devices if self.num_engine_devices is None else self.num_engine_devices

    @property
    def num_replicas(self) -> int:
        return self.engine_devices // self.tensor_parallel
