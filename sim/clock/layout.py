"""How a cluster is used: devices, engine replicas, types, memory shares.

Marks, as in docs/config.md: [V] a primary source, [2] a secondary one, [I] inferred, [M] measured by us, [O] our choice.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal


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
    fp8_kv_cache: bool = False
    """Keys and values take a byte each, in memory and in the traffic of decoding; arithmetic as before."""
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
                raise ValueError(f"{name}: got {getattr(self, name)!r}; expected a whole number, 1 or more")
        if self.tensor_parallel > self.devices_per_node:
            raise ValueError(
                f"tensor_parallel: got {self.tensor_parallel}; expected at most the devices of a node, {self.devices_per_node}"
            )
        if self.engine_devices < 1 or self.engine_devices % self.tensor_parallel:
            raise ValueError(
                f"tensor_parallel: got {self.tensor_parallel}; expected a divisor of the engine's {self.engine_devices} devices"
            )
        if not 0 < self.memory_utilisation <= 1:
            raise ValueError(f"memory_utilisation: got {self.memory_utilisation!r}; expected a number in (0, 1]")
        if not 0 <= self.engine_reserve_bytes < math.inf:
            raise ValueError(f"engine_reserve_bytes: got {self.engine_reserve_bytes!r}; expected bytes, 0 or more, finite")
        if self.sleep_level not in (0, 1, 2):
            raise ValueError(f"sleep_level: got {self.sleep_level!r}; expected 0, 1 or 2")

    @property
    def kv_number_bytes(self) -> int:
        """Of a number in the KV cache."""
        return 1 if self.fp8_kv_cache else self.bytes_per_parameter

    @property
    def engine_devices(self) -> int:
        return self.num_devices if self.num_engine_devices is None else self.num_engine_devices

    @property
    def num_replicas(self) -> int:
        return self.engine_devices // self.tensor_parallel
