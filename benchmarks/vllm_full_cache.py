"""What lockstep costs when vLLM's cache is full: engine steps per window, by either admission, beside what the clock says.

    python -m benchmarks.vllm_full_cache          with vLLM on a CPU, some minutes; writes results/vllm_full_cache.csv
    python -m benchmarks.vllm_full_cache --clock  the clock's columns alone, anew beside what was measured; without vLLM

A batcher's window is 64 decode steps. With a full cache vLLM queues or preempts, requests lag, and `VLLMEngine.step` lets vLLM run
on until none lags, so that a window takes more of its steps: slots that are free meanwhile wait. Counted, so a busy machine changes
nothing: vLLM's steps per window, its preemptions, tokens per step. The model is random and ends a response with each token at 1/64.

    ample   a cache that holds every slot at its longest
    room    33 blocks of 32 tokens, three of the longest: vLLM preempts (`engine.admission` room)
    whole   the same cache, three sequences at a time: it never preempts

`clock` is the clock's decode steps per window for the same slots and cache and 4,000 lengths of that model, a sequence's last block
counting as half empty; `clock_by_tokens` counts tokens instead of blocks. `clock_date` is theirs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, report, whole_rows
from tppo_ref.method.records import Prompt
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.batcher import SampleStream, SuccessiveBatcher
from tppo_ref.runs.comparison import write_csv

SLOTS, WINDOW, CAP, PROMPT, BLOCK, END, VOCAB = 16, 64, 320, 16, 32, 1, 64
BLOCKS = 33
WARM, WINDOWS = 3, 6
ARMS: dict[str, dict[str, int]] = {
    "ample": {},
    "room": {"num_gpu_blocks_override": BLOCKS + 1},  # one of them is vLLM's null block
    "whole": {"num_gpu_blocks_override": BLOCKS + 1, "max_num_seqs": BLOCKS // (-(-(PROMPT + CAP) // BLOCK))},
}
SHAPE = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=512, tie_word_embeddings=True, eos_token_id=END,
)  # fmt: skip


def measure(arm: str) -> dict[str, Any]:
    """Runs in a process of its own: an engine lives as long as its process."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from scale.distributed import start
    from scale.vllm_engine import VLLMEngine
    from tppo_ref.rollout.models import load_policy

    torch.manual_seed(0)
    world = start(device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        Qwen2ForCausalLM(Qwen2Config(**SHAPE)).save_pretrained(folder)
        engine = VLLMEngine(
            folder, world=world, slots=SLOTS, max_context_tokens=PROMPT + CAP, end_token_ids=(END,), options=ARMS[arm]
        )
        policy = load_policy(folder, end_token_ids=(END,))
    counts = {"steps": 0, "preemptions": 0}
    scheduler, advance = engine._engine.engine_core.engine_core.scheduler, engine._advance
    preempt = scheduler._preempt_request

    def counted(name: str, call: Any) -> Any:
        def one(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return call(*arguments, **options)

        return one

    engine._advance, scheduler._preempt_request = counted("steps", advance), counted("preemptions", preempt)  # type: ignore[method-assign]
    prompts = [Prompt(id=i, token_ids=tuple([2 + i % 60] * PROMPT), answer="") for i in range(512)]
    schedule = SlotSchedule(slots=SLOTS, window=WINDOW, max_response_tokens=CAP)
    batcher = SuccessiveBatcher(schedule, SampleStream(prompts, samples_per_prompt=1, seed=0), run_seed=0)
    tokens, lengths = 0, []
    for window in range(WARM + WINDOWS):
        engine.load_weights(policy.named_tensors(), window)
        if window == WARM:
            counts.update(steps=0, preemptions=0)
        slices = batcher.window(engine, version=window)
        tokens += (window >= WARM) * sum(s.stop - s.begin for s in slices)
        lengths += [len(s.response) for s in slices if s.response.ended]
    return {"steps": counts["steps"] / WINDOWS, "preemptions": counts["preemptions"] / WINDOWS, "tokens": tokens / WINDOWS,
            "length_mean": float(np.mean(lengths))}  # fmt: skip


def clock(arm: str) -> dict[str, Any]:
    """The clock's columns of a row."""
    lengths = np.minimum(np.random.default_rng(0).geometric(1 / VOCAB, 4000), CAP).tolist()
    today = datetime.date.today().isoformat()
    by_blocks, by_tokens = (round(predicted(arm, lengths, block), 1) for block in (BLOCK, 1))
    return {"clock": by_blocks, "clock_by_tokens": by_tokens, "clock_date": today}


def predicted(arm: str, lengths: list[int], block: int) -> float:
    """The clock's decode steps per window. (Imported here: vLLM looks through all modules, and stumbles over numba's.)"""
    from sim.clock.cluster import Setup
    from sim.clock.distributions import Empirical
    from sim.clock.hardware import Layout, Roofline, accelerator, model
    from sim.clock.schedule import run, tppo

    class Small(Roofline):
        @property
        def kv_capacity_tokens(self) -> int:
            return 1 << 40 if arm == "ample" else BLOCKS * BLOCK

    costs = Small(accelerator=accelerator("laptop-cpu"), model=model("Qwen2.5-0.5B"), layout=Layout(num_devices=1))
    setup = Setup(lengths=Empirical(values=tuple(lengths), cap=CAP), prompt_tokens=PROMPT, costs=costs, slots=SLOTS,
                  admission="whole" if arm == "whole" else "room", block_tokens=block)  # fmt: skip
    records = run(tppo(setup, window=WINDOW), steps=200).records[20:]
    return float(np.mean([record.decode_steps for record in records]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=list(ARMS), help="this one alone, in this process, as JSON")
    parser.add_argument("--clock", action="store_true", help="the clock alone, without vLLM: by tokens, and by blocks")
    arguments = parser.parse_args()
    if arguments.clock:
        rows = [row | clock(row["admission"]) for row in whole_rows(RESULTS / "vllm_full_cache.csv")]
        write_csv(RESULTS / "vllm_full_cache.csv", rows)
        for row in rows:
            print("{admission:6} vLLM {engine_steps}, by tokens {clock_by_tokens}, by blocks {clock}".format(**row))
        return
    arm = arguments.arm
    if arm:
        print(json.dumps(measure(arm)), flush=True)
        os._exit(0)  # vLLM and torch would both take the process groups down
    rows = []
    for name in ARMS:
        done = subprocess.run([sys.executable, "-m", "benchmarks.vllm_full_cache", "--arm", name], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-1500:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append({
            "admission": name, "window": WINDOW, "slots": SLOTS, "cache_tokens": "all" if name == "ample" else BLOCKS * BLOCK,
            "engine_steps": round(found["steps"], 1), **clock(name),
            "preemptions": round(found["preemptions"], 1), "tokens": round(found["tokens"]),
            "tokens_per_engine_step": round(found["tokens"] / found["steps"], 2),
            "length_mean": round(found["length_mean"], 1),
        })  # fmt: skip
    report("vllm_full_cache", rows)


if __name__ == "__main__":
    main()
