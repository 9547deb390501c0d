"""Weight sync into vLLM's CPU build, against a copy of the same bytes: what is ours, and what is vLLM's.

    python -m benchmarks.sync [--repeats 7]

A random Qwen2 of 53 million parameters (210 MB in float32), one rank, medians over repeats that take turns. `copy` writes into
memory that is mapped already, `clone` into fresh memory. `gather` is FSDP's whole tensors, one by one; `checksum` what leaves
and what arrives, both; `vllm` its reload_weights on tensors that lie ready: it builds each layer anew, packs it for its matrix
kernels, and copies the result into place. `sync` is `VLLMEngine.load_weights`, all of it. Aim: at most twice the copy. Needs
vLLM.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.common import report
from scale.config import ShardingConfig
from scale.distributed import start
from scale.sharding import load_sharded
from scale.vllm_engine import Checksum, VLLMEngine
from tppo_ref.rollout.models import PolicyModel

AIM = 2.0
SHAPE = dict(
    vocab_size=32_000, hidden_size=512, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=8, num_key_value_heads=2,
    max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=1,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    world = start(device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        Qwen2ForCausalLM(Qwen2Config(**SHAPE)).save_pretrained(folder)
        engine = VLLMEngine(folder, world=world, slots=4, max_context_tokens=128, end_token_ids=(1,))
        policy = load_sharded(PolicyModel, Path(folder), world, ShardingConfig(), end_token_ids=(1,))
    ready = {name: tensor.clone() for name, tensor in policy.named_tensors()}
    target = {name: torch.empty_like(tensor) for name, tensor in ready.items()}
    num_bytes = sum(tensor.nbytes for tensor in ready.values())

    def checksum() -> None:
        for _ in Checksum().over(Checksum().over(ready.items())):
            pass

    tasks: dict[str, Callable[[], object]] = {
        "copy": lambda: [target[name].copy_(tensor) for name, tensor in ready.items()],
        "clone": lambda: [tensor.clone() for tensor in ready.values()],
        "gather": lambda: [None for _ in policy.named_tensors()],
        "checksum": checksum,
        "vllm": lambda: engine._llm.collective_rpc(lambda worker: worker.reload_weights(weights_iterator=iter(ready.items()))),
        "sync": lambda: engine.load_weights(policy.named_tensors(), 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for repeat in tqdm(range(arguments.repeats + 2), unit="round"):
        for name, task in tasks.items():
            begin = time.perf_counter()
            task()
            if repeat >= 2:  # pages are mapped, vLLM has warmed up
                seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows: list[dict[str, object]] = []
    for name, took in medians.items():
        copies = round(took / medians["copy"], 2)
        rows.append({"what": name, "ms": round(1e3 * took, 1), "copies": copies, "aim_copies": AIM if name == "sync" else "",
                     "mib": round(num_bytes / 2**20)})  # fmt: skip
    report("sync", rows)
    sys.stdout.flush()
    os._exit(0)  # vLLM and torch would both take the process groups down


if __name__ == "__main__":
    main()
