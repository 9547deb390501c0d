"""What vLLM's own Python costs per decode step, and per sequence in it: the clock's `sequence_overhead_s` and where it comes from.

    python -m benchmarks.vllm_host [--steps 60]

vLLM's CPU build decodes with a policy of two layers and 64 words, as `scale.vllm_engine` drives it: every request seeded, processed
log-probabilities. Timed are the parts that run on the host whatever the device: scheduling, preparing the batch, bookkeeping,
handing out. Left out: what the model computes, and the sampler, whose seeded noise a GPU draws with a kernel per row. A line over
the batch, seconds = once + sequence x batch, is fitted to the medians. vLLM's asynchronous scheduling hides some of it behind the
GPU's work: not measured here. Needs vLLM (make test-scale installs it).
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from benchmarks.common import report
from scale.distributed import start
from scale.vllm_engine import VLLMEngine
from tppo_ref.rollout.engine import Request, request_seed

BATCHES = (16, 32, 64, 128, 256)
WARM = 8  # steps: prefill, first shapes
SHAPE = dict(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=1,
)  # fmt: skip


class Stopwatches:
    """Seconds of each watched function, since the last `take`. One that is called inside another is counted in both."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def watch(self, owner: Any, name: str) -> None:
        call: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(call)
        def timed(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                self.seconds[name] += time.perf_counter() - begin

        setattr(owner, name, timed)

    def take(self) -> dict[str, float]:
        taken, self.seconds = dict(self.seconds), defaultdict(float)
        return taken


def watch(engine: VLLMEngine, watches: Stopwatches) -> None:
    """The host's parts of a decode step, once each."""
    llm, core = engine._engine, engine._engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    for owner, name in (
        (core.scheduler, "schedule"), (core.scheduler, "update_from_output"), (llm.output_processor, "process_outputs"),
        (runner, "_update_states"), (runner, "_prepare_inputs"), (runner, "_bookkeeping_sync"),
    ):  # fmt: skip
        watches.watch(owner, name)


def decode(engine: VLLMEngine, watches: Stopwatches, batch: int, steps: int) -> dict[str, float]:
    """Median seconds of each part in a decode step of `batch` sequences."""
    engine.submit([
        Request(response_id=i, token_ids=[2] * 16, max_new_tokens=WARM + steps, seed=request_seed(0, i, 0, 0)) for i in range(batch)
    ])  # fmt: skip
    found: dict[str, list[float]] = defaultdict(list)
    for step in range(WARM + steps):
        watches.take()
        engine.step()
        if WARM <= step < WARM + steps - 1:
            for name, seconds in watches.take().items():
                found[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    world = start(device="cpu")
    watches = Stopwatches()
    with tempfile.TemporaryDirectory() as folder:
        model = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
        model.save_pretrained(folder)
        engine = VLLMEngine(folder, world=world, slots=max(BATCHES), max_context_tokens=256, end_token_ids=(1,),
                            min_response_tokens=WARM + arguments.steps)  # fmt: skip
    engine.load_weights(dict(model.state_dict()), 1)
    watch(engine, watches)
    by_batch = {batch: decode(engine, watches, batch, arguments.steps) for batch in BATCHES}
    rows: list[dict[str, object]] = []
    names = [*by_batch[BATCHES[0]], "in all"]
    for name in names:
        parts = [sum(p.values()) if name == "in all" else p[name] for p in by_batch.values()]
        sequence_s, once_s = np.polyfit(BATCHES, parts, 1)
        rows.append({
            "part": name.strip("_"), "once_us": round(1e6 * float(once_s), 1), "sequence_us": round(1e6 * float(sequence_s), 2),
            **{f"us_at_{batch}": round(1e6 * seconds, 1) for batch, seconds in zip(BATCHES, parts, strict=True)},
        })  # fmt: skip
    report("vllm_host", rows)
    sys.stdout.flush()
    os._exit(0)  # vLLM and torch would both take the process groups down


if __name__ == "__main__":
    main()
