"""What one GPU says: egae, attention kernels, training, PPO against T-PPO, and memory beside its prediction.

python -m benchmarks.gpu [--toy] [--only egae attention training methods] [--results FOLDER]

Made for a bare machine with torch, transformers and numpy: weights are random, nothing is downloaded, vLLM is not needed. Some ten
minutes of an H100 are planned; each case is kept as soon as it is measured (gpu.csv), and a second call goes on behind it. Figures
are drawn where matplotlib is there, so also later and elsewhere. `--toy` runs all of it at sizes of a CPU, for the tests.

    egae        seconds of the advantages of [rows, tokens], over those of a copy of as many bytes
    attention   seconds of one layer's attention, forward and backward, over packed sequences, by kernel
    training    MFU and peak bytes of packed training in bfloat16 at Qwen2.5's 0.5B and 1.5B shapes; the peak over its prediction
    methods     trained tokens per second of the Trainer, PPO and T-PPO, at response lengths forced to a heavy tail

MFU: model FLOPs (tppo_ref.rollout.flops, as a run counts them) / (seconds x the device's peak). Recomputation in the backward pass
is not counted.
"""

from __future__ import annotations

import argparse
import csv
import functools
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from benchmarks.common import RESULTS, provenance, whole_rows
from tppo_ref.loop.learner import Learner
from tppo_ref.loop.parallel import SingleProcess
from tppo_ref.loop.peaks import peak_flops_per_s
from tppo_ref.loop.trainer import Trainer
from tppo_ref.method.advantages import egae
from tppo_ref.method.records import Prompt
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout import kernels
from tppo_ref.rollout.attention import begins
from tppo_ref.rollout.batcher import SampleStream, SuccessiveBatcher
from tppo_ref.rollout.engine import Decoded, Request
from tppo_ref.rollout.flops import flops_of
from tppo_ref.rollout.models import load_policy, load_value_model
from tppo_ref.rollout.packing import TokenBatch
from tppo_ref.rollout.torch_engine import TorchEngine
from tppo_ref.runs.colours import look
from tppo_ref.runs.config import Config, apply_method
from tppo_ref.runs.parsing import replace_fields

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COLUMNS = ("part", "case", "quantity", "unit", "value")
SHAPES = {
    "toy": dict(vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                num_key_value_heads=2, tie_word_embeddings=True),
    "0.5B": dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
                 num_key_value_heads=2, tie_word_embeddings=True),
    "1.5B": dict(vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                 num_key_value_heads=2, tie_word_embeddings=True),
}  # fmt: skip
BYTES_PER_PARAMETER = 2 + 4 + 8 + 4  # bfloat16 weights, float32 masters, AdamW's moments, float32 gradients

Row = tuple[str, str, float]  # quantity, unit, value


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median of `repeats` calls after one that does not count."""
    found = []
    for _ in range(repeats + 1):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return float(np.median(found[1:]))


def heavy_tail(num: int, cap: int, seed: int = 0) -> list[int]:
    """Lengths of a log-normal law with its median at an eighth of the cap, cut there; longest first."""
    lengths = np.exp(np.random.default_rng(seed).normal(np.log(cap / 8), 1.0, num))
    return sorted(np.clip(lengths, 8, cap).astype(int).tolist(), reverse=True)


# ------------------------------------------------------------------------------------------------------------------- the parts


def egae_rows(rows: int, tokens: int) -> list[Row]:
    """What `egae` costs over one copy of the bytes that it reads and writes."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    reward, value = (torch.randn(rows, tokens, device=DEVICE, generator=generator) for _ in range(2))
    mask = torch.ones(rows, tokens, dtype=torch.bool, device=DEVICE)
    cut = torch.arange(rows, device=DEVICE) % 2 == 0
    lam = torch.full((rows,), 0.95, device=DEVICE)
    mine = seconds(functools.partial(egae, reward, value, mask, cut, gamma=1.0, lam=lam), 9)
    target = torch.empty_like(reward)
    copied = seconds(lambda: target.copy_(reward), 9)
    return [("egae", "s", mine), ("copy", "s", copied), ("egae over copy", "x", mine / copied)]


def attention_rows(shape: dict[str, Any], lengths: list[int], kind: str) -> list[Row]:
    """One layer's packed attention, forward and backward, by one kernel."""
    heads, shared, n = shape["num_attention_heads"], shape["num_key_value_heads"], sum(lengths)
    width = shape["hidden_size"] // heads
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    q, k, v = (torch.randn(n, h, width, device=DEVICE, dtype=dtype, requires_grad=True) for h in (heads, shared, shared))
    edges, begin = np.concatenate([[0], np.cumsum(lengths)]).tolist(), begins(lengths, DEVICE)

    def one_by_one(backends: list[SDPBackend]) -> None:
        for a, b in pairwise(edges):
            parts = (x[a:b].transpose(0, 1)[None] for x in (q, k, v))
            with sdpa_kernel(backends):
                out = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
            out.sum().backward()

    def packed() -> None:
        kernels.varlen(q, k, v, begin, begin, (max(lengths), max(lengths)), None).sum().backward()

    calls = {
        "varlen": packed,
        "flash": lambda: one_by_one([SDPBackend.FLASH_ATTENTION]),
        "cudnn": lambda: one_by_one([SDPBackend.CUDNN_ATTENTION]),
        "default": lambda: one_by_one(list(SDPBackend.__members__.values())[1:]),
    }
    return [("forward and backward", "s", seconds(calls[kind], 3))]


def training_rows(shape: dict[str, Any], tokens: int, cap: int) -> list[Row]:
    """Packed training of one model: MFU, and the peak of memory beside 18 bytes a parameter and what is saved and computed anew."""
    policy = load_policy(dict(shape, model_type="qwen2", max_position_embeddings=cap), dtype="bfloat16", device=DEVICE)
    for layer in policy.hf.model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    learner = Learner("policy", policy, Config().policy, SingleProcess())
    lengths = [n for n, total in zip(heavy_tail(4096, cap), np.cumsum(heavy_tail(4096, cap)), strict=True) if total <= tokens]
    batch = TokenBatch([[1]] * len(lengths), [[5] * (n - 1) for n in lengths])
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    took = seconds(lambda: learner.update([[0]], lambda rows: policy(batch).mean(), step=1), 3)
    fed, num = sum(lengths), sum(p.numel() for p in policy.parameters())
    counted = flops_of(policy)
    assert counted is not None
    flops = counted.of_batch(batch, backward=True)
    rows = [("tokens per second", "tokens/s", fed / took), ("model FLOP per second", "FLOP/s", flops / took)]
    if DEVICE == "cuda":
        if peak := peak_flops_per_s(torch.cuda.get_device_name()):
            rows += [("MFU", "share", flops / took / peak)]
        saved = fed * shape["hidden_size"] * 2 * shape["num_hidden_layers"]
        layer = fed * 2 * (8 * shape["hidden_size"] + 6 * shape["intermediate_size"])
        logits = 2 * 4 * policy.logit_chunk_tokens * shape["vocab_size"]
        predicted, peak_bytes = num * BYTES_PER_PARAMETER + saved + max(layer, logits), torch.cuda.max_memory_allocated()
        rows += [("peak", "bytes", float(peak_bytes)), ("reserved", "bytes", float(torch.cuda.max_memory_reserved())),
                 ("predicted", "bytes", float(predicted)), ("peak over predicted", "x", peak_bytes / predicted)]  # fmt: skip
    return rows


class ForcedLengths:
    """An engine whose responses end where they are told to: the model decodes, and its tokens mean nothing."""

    def __init__(self, engine: TorchEngine, length: Callable[[int], int]):
        self.engine, self.length, self.total = engine, length, dict[int, int]()

    @property
    def num_running(self) -> int:
        return self.engine.num_running

    def submit(self, requests: Sequence[Request]) -> None:
        taken = []
        for r in requests:
            left = self.length(r.response_id) - r.num_response_tokens
            self.total[r.response_id] = r.num_response_tokens
            taken.append(Request(response_id=r.response_id, token_ids=r.token_ids, max_new_tokens=min(r.max_new_tokens, left),
                                 seed=r.seed, num_response_tokens=r.num_response_tokens))  # fmt: skip
        self.engine.submit(taken)

    def step(self) -> list[Decoded]:
        done = self.engine.step()
        return [Decoded(response_id=d.response_id, token_ids=d.token_ids, logprobs=d.logprobs,
                        end_token=self.total[d.response_id] + len(d.token_ids) == self.length(d.response_id))
                for d in done]  # fmt: skip

    def sleep(self) -> None:
        self.engine.sleep()

    def load_weights(self, named_tensors: Any, version: int) -> None:
        self.engine.load_weights(named_tensors, version)


class NoScores:
    """Every response is right: what a score is costs nothing here."""

    def __init__(self) -> None:
        self.ended: list[int] = []

    def submit(self, response: Any) -> None:
        self.ended.append(response.id)

    def collect(self) -> dict[int, tuple[float, str]]:
        found, self.ended = {id: (1.0, "ok") for id in self.ended}, []
        return found


def methods_rows(shape: dict[str, Any], method: str, slots: int, cap: int, steps: int) -> list[Row]:
    """Whole steps of the Trainer, of which the first does not count."""
    dtype = "bfloat16" if DEVICE == "cuda" else "float32"
    spec = dict(shape, model_type="qwen2", max_position_embeddings=cap + 8)
    config = replace_fields(Config(), {
        "rollout.slots": slots, "rollout.window": cap // 4, "rollout.max_response_tokens": cap, "policy.lr": 1e-6, "value.lr": 1e-6,
        "policy.mini_batch_tokens": 0, "policy.mini_batches": 4, "value.mini_batch_tokens": 0, "value.mini_batches": 4,
        "policy.micro_batch_tokens": max(cap + 8, 16384), "value.micro_batch_tokens": max(cap + 8, 16384),
    })  # fmt: skip
    config = apply_method(config, method, strict=False)
    policy = load_policy(spec, dtype=dtype, device=DEVICE, min_response_tokens=cap, end_token_ids=(0,))
    value = load_value_model(spec, dtype=dtype, device=DEVICE)
    lengths = np.random.default_rng(1).permutation(heavy_tail(4096, cap))
    inner = TorchEngine(policy, slots=slots, max_context_tokens=cap + 8, end_token_ids=(0,), min_response_tokens=cap)
    rollout = config.rollout
    schedule = SlotSchedule(slots=slots, window=rollout.window, max_response_tokens=cap, refill=rollout.refill)
    stream = SampleStream([Prompt(id=i, token_ids=(1, 2 + i), answer="") for i in range(64)], samples_per_prompt=1, seed=0)
    trainer = Trainer(config, policy=policy, value=value, engine=ForcedLengths(inner, lambda id: int(lengths[id % 4096])),
                      batcher=SuccessiveBatcher(schedule, stream, run_seed=0), scorer=NoScores(), device=DEVICE)  # fmt: skip
    metrics = [trainer.step() for _ in range(steps + 1)][1:]
    spent = sum(m["time/step_s"] for m in metrics)
    rows = [("trained tokens per second", "tokens/s", sum(m["policy/tokens"] for m in metrics) / spent),
            ("occupancy", "share", float(np.mean([m["rollout/occupancy"] for m in metrics])))]  # fmt: skip
    return rows + [(f"{p} of the step", "share", sum(m[f"time/{p}_s"] for m in metrics) / spent)
                   for p in ("rollout", "forward", "policy", "value")]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ the command


def cases(toy: bool) -> Iterator[tuple[str, str, Callable[[], list[Row]]]]:
    """(part, case, what measures it)."""
    for rows, tokens in ((8, 64),) if toy else ((1024, 8192), (128, 24576)):
        yield "egae", f"{rows} x {tokens}", functools.partial(egae_rows, rows, tokens)
    lengths = heavy_tail(4, 64) if toy else heavy_tail(24, 8192)
    shape = SHAPES["toy" if toy else "1.5B"]
    for kind in ("default",) if DEVICE == "cpu" else ("varlen", "flash", "cudnn", "default"):
        yield "attention", f"{kind}, {sum(lengths)} tokens", functools.partial(attention_rows, shape, lengths, kind)
    for name in ("toy",) if toy else ("0.5B", "1.5B"):
        yield "training", name, functools.partial(training_rows, SHAPES[name], 512 if toy else 32768, 128 if toy else 8192)
    small = SHAPES["toy" if toy else "0.5B"]
    for method in ("ppo", "ppo-dual", "tppo"):
        sizes = (4, 32, 1) if toy else (64, 1024, 3)
        yield "methods", method, functools.partial(methods_rows, small, method, *sizes)


def measure(path: Path, *, toy: bool, only: list[str]) -> None:
    """Measure what is not in the CSV yet, a row at a time."""
    there = {(r["part"], r["case"]) for r in whole_rows(path)}
    for part, case, call in cases(toy):
        if (only and part not in only) or (part, case) in there:
            continue
        found = call()
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [*COLUMNS, *provenance()])
            if new:
                writer.writeheader()
            writer.writerows({"part": part, "case": case, "quantity": q, "unit": u, "value": v} | provenance() for q, u, v in found)
        for quantity, unit, value in found:
            print(f"{part:10} {case:24} {quantity:26} {value:12.4g} {unit}", flush=True)
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def draw(path: Path) -> None:
    """One bar chart a part and quantity, beside the CSV."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"matplotlib is not here: draw {path} elsewhere, with the same command")
        return
    rows = whole_rows(path)
    shown = [
        ("egae", "egae over copy"), ("attention", "forward and backward"), ("training", "MFU"), ("training", "tokens per second"),
        ("training", "peak over predicted"), ("methods", "trained tokens per second"),
    ]  # fmt: skip
    shown = [pair for pair in shown if any((r["part"], r["quantity"]) == pair for r in rows)]
    figure = Figure(figsize=(3.2 * len(shown), 3.2), layout="constrained")
    for ax, (part, quantity) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        mine = [r for r in rows if (r["part"], r["quantity"]) == (part, quantity)]
        ax.barh([r["case"] for r in mine], [float(r["value"]) for r in mine], color=look("tppo").colour)
        ax.set_title(f"{part}: {quantity} ({mine[0]['unit']})", fontsize=9)
        ax.tick_params(labelsize=8)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    print(path.with_suffix(".png"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--only", nargs="*", default=[], choices=("egae", "attention", "training", "methods"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    file = given.results / ("gpu-toy.csv" if given.toy else "gpu.csv")
    measure(file, toy=given.toy, only=given.only)
    draw(file)
