"""vLLM's fp8 cache, as a config's one field makes it: one engine for the life of this process. Prints a JSON object of findings.

vllm_fp8_worker.py FOLDER OUT

vLLM's CPU build rounds towards zero (its CUDA kernels to the nearest), so the trainer's own keys are rounded that way here.
"""

from __future__ import annotations

import json
import os
import sys

import torch
from scale_helpers import TINY_CONFIG

from scale.build import build_engine
from scale.config import ScaleConfig, check, thresholds
from scale.distributed import start
from scale.run import probe as start_up_probe
from tppo_ref.method.errors import UserError
from tppo_ref.rollout.attention import PackedLayout, through_fp8
from tppo_ref.rollout.models import load_policy
from tppo_ref.runs.parsing import parse
from tppo_ref.tasks import load_task


def towards_zero(x: torch.Tensor) -> torch.Tensor:
    """e4m3's next number towards zero: one code less where the nearest is further out."""
    codes = through_fp8(x).to(torch.float8_e4m3fn).view(torch.uint8)
    outside = through_fp8(x).double().abs() > x.double().abs()
    return torch.where(outside, codes - 1, codes).view(torch.float8_e4m3fn).to(x.dtype)


def main(folder: str, out: str) -> dict:
    world, task = start(device="cpu"), load_task("chain")
    fields = {
        "algo.model.policy": folder,
        "algo.run.out": out,
        "algo.rollout.kv_cache": "fp8",
        "algo.policy.importance": "truncated",
    }
    config = check(
        parse(ScaleConfig, ["--config", str(TINY_CONFIG), *(w for f, x in fields.items() for w in (f"--{f}", x))], prog="test")
    )
    engine, policy = build_engine(config, world, task), load_policy(folder, end_token_ids=(task.end_token_id,))
    prompts = [prompt.token_ids for prompt in task.prompts("train")[:6]]
    attend, found = PackedLayout.attend, {"cache": engine._engine.vllm_config.cache_config.cache_dtype, "plain": [], "rounded": []}

    def rounded(self, layer, query, key, value, scaling):
        return attend(self, layer, query, towards_zero(key), towards_zero(value), scaling)

    for version in range(2):  # and once more after a sync
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(version * 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
        engine.load_weights(policy.named_tensors(), version)
        found["plain"].append(engine.probe(policy, prompts, new_tokens=40).mean)
        PackedLayout.attend = rounded
        found["rounded"].append(engine.probe(policy, prompts, new_tokens=40).mean)
        PackedLayout.attend = attend
    found["thresholds"] = thresholds(config)
    try:
        start_up_probe(engine, policy, task, config)
        found["start-up probe"] = "passed"
    except UserError as error:
        found["start-up probe"] = str(error)
    return found


if __name__ == "__main__":
    print("FOUND " + json.dumps(main(*sys.argv[1:])), flush=True)
    os._exit(0)
