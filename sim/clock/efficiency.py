"""What software reaches of a device's rates, and what it adds: the named parameters of hardware.Roofline, each with its source.

Every parameter has a middle, which is the default, and where sources disagree a slow and a fast end. None was chosen by looking at
the step times that the clock is to predict. Marks, as in docs/config.md: [V] a primary source, [2] a secondary one, [I] inferred,
[M] measured by us (on the H200: a plain copy and plain products, no code of this repository), [O] our choice.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple

Level = Literal["slow", "middle", "fast"]
LEVELS: tuple[Level, ...] = ("slow", "middle", "fast")


class Ends(NamedTuple):
    """Of a parameter whose sources disagree."""

    slow: float
    fast: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Efficiency:
    """What software reaches of a rate (`_fraction`, in (0, 1], and `_per_s`), and what it adds (`_s`)."""

    memory_fraction: float = 0.8
    """Of HBM's rate in a decode step. A plain copy reaches 4.3 of 4.8 TB/s on an H200 [M], the fast end; decoding stays below:
    60-85 % [2]."""
    engine_flops_fraction: float = 0.58
    """Of matrix FLOP/s in prefill and decoding: vLLM prefills 4k-8k tokens with Qwen2.5-72B on 2 H100 at 0.55-0.58
    (tenstorrent/tt-inference-server issue 143) [V]; plain products alone reach 0.78-0.81 on an H200 [M]."""
    training_flops_fraction: float = 0.50
    """Of matrix FLOP/s in the trainer's passes, the recomputed forward pass counted as work. Sources publish shares of the work
    *without* recomputation; theirs, with it: 0.38-0.45 for FSDP2 on 8-128 H100 held to 500 W (0.33-0.39, and half of the forward
    products again; torchtitan's benchmark of 2024-12), 0.38-0.43 for Llama 3 on 8-16k H100, nothing recomputed, pipelines' idle
    time inside (arXiv 2407.21783), 0.59 for FSDP on 8 H200, everything recomputed (0.444; KempnerForge's benchmarks) [V].
    Unequal ranks come on top (balance.py)."""
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
    51167) leave beyond reading its weights [I]. Slow: gaps of 5 ms between decode steps (vllm-project/vllm issue 6854) [V]."""
    sequence_overhead_s: float = 17e-6
    """Per sequence and decode step, on the host: scheduling, preparing, bookkeeping, handing out. All of it is 34 microseconds on
    one core here (benchmarks/vllm_host.py) [M], the slow end; a server's core may be twice as fast, and asynchronous scheduling
    (vllm-project/vllm pull request 19970) hides some behind the GPU: how much of it shows is a guess [O]."""
    sampling_passes: float = 12.0
    """Over a sequence's logits in fp32, on every device of a replica: cast, temperature, log-softmax, softmax, noise, quotient,
    largest, rank, as vLLM 0.32 samples with seeds and processed log-probabilities [I]."""
    prefill_chunk_tokens: int = 8192
    """Tokens that the engine prefills at once; each chunk reads the weights and costs a step's overhead. vLLM's default [V]."""
    communication_overlap: float = 1.0
    """Share of the shorter of computing and communicating that hides behind the longer in training. 1, because
    `training_flops_fraction` was measured with what shows of communication inside [O]."""
    sync_tensor_s: float = 0.6e-3
    """Per tensor of a weight sync: a 0.6B model's 311 tensors take 0.18 s on one node (huggingface/trl pull request 5892), the
    gathers of a 7B model's 340 tensors 0.1-0.25 s (verl-project/verl issue 7015); slow: 290 calls in 0.6 s (huggingface/trl pull
    request 5249) [V]."""
    sync_bytes_per_s: float = 20e9
    """Of a weight sync as software does it: gather, hand over, load, one after the other. Published: 8.7 GB/s (a 30B in 7 s, THUDM/
    slime's page on weight sync), 14 (a 30B in 4.4 s, verl's page on fully asynchronous training), 28 (a 32B in 2.3 s, huggingface/
    trl pull request 7131), 61 and 75 (106B and 235B, MoonshotAI/checkpoint-engine) [V]. The middle is between them [O]."""
    wake_overhead_s: float = 0.4
    """Per engine wake-up beside the bytes: 0.1-0.4 s for small models (vLLM's page on sleep mode) [V]."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, name = getattr(self, field.name), field.name
            if name.endswith("_fraction") and not 0 < value <= 1:
                raise ValueError(f"{name}: got {value!r}; expected a number in (0, 1]")
            if name.endswith("_per_s"):
                if not 0 < value < math.inf:
                    raise ValueError(f"{name}: got {value!r}; expected a rate, above 0 and finite")
            elif name.endswith("_s") and not 0 <= value < math.inf:
                raise ValueError(f"{name}: got {value!r}; expected seconds, 0 or more, finite")
        if not 0 <= self.communication_overlap <= 1:
            raise ValueError(f"communication_overlap: got {self.communication_overlap!r}; expected a number in [0, 1]")
        if not 0 <= self.sampling_passes < math.inf:
            raise ValueError(f"sampling_passes: got {self.sampling_passes!r}; expected 0 or more, finite")
        if self.prefill_chunk_tokens < 1:
            raise ValueError(f"prefill_chunk_tokens: got {self.prefill_chunk_tokens!r}; expected 1 or more")


ENGINE_ENDS = {
    "memory_fraction": Ends(0.70, 0.88), "engine_flops_fraction": Ends(0.50, 0.70), "decode_overhead_s": Ends(5e-3, 1.5e-3),
    "sequence_overhead_s": Ends(34e-6, 5e-6),
}  # fmt: skip
TRAINER_ENDS = {
    "training_flops_fraction": Ends(0.38, 0.60), "sync_tensor_s": Ends(2e-3, 0.2e-3), "sync_bytes_per_s": Ends(8e9, 60e9),
    "wake_overhead_s": Ends(0.4, 0.1),
}  # fmt: skip
"""The ends of what the engine does, and of the rest of a step. What is not in them is a point."""


def at(engine: Level = "middle", trainer: Level = "middle") -> Efficiency:
    """Efficiencies with all of the engine's, and all of the trainer's, at one end."""
    found: dict[str, float] = {}
    for level, ends in ((engine, ENGINE_ENDS), (trainer, TRAINER_ENDS)):
        if level != "middle":
            found |= {name: getattr(end, level) for name, end in ends.items()}
    return Efficiency(**found)  # type: ignore[arg-type]
