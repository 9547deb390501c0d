"""How far an fp8 cache is from the trainer, and what the weights are that correct for it, on the built-in tasks' base models.

    python -m benchmarks.fp8_rollouts [--tasks chain fork length] [--cache runs/cache] [--out FILE.csv]

Each task's own base model answers 128 prompts whole, from a TorchEngine whose keys and values are rounded to e4m3, and from a plain
one. The gap is |recomputed - engine's| log-probability of a token, the weight exp(recomputed - engine's). No seconds in it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import RESULTS, report
from tppo_ref.rollout.packing import TokenBatch
from tppo_ref.runs.build import base_model, make_engine, make_policy, make_schedule, make_task, reply_of
from tppo_ref.runs.config import Config
from tppo_ref.runs.evaluate import make_batcher
from tppo_ref.runs.parsing import replace_fields

RESPONSES = 128


def gaps(config: Config) -> torch.Tensor:
    """recomputed - engine's log-probability of every token of RESPONSES whole responses, in nats."""
    task = make_task(config)
    policy = make_policy(config, task, base_model(config, task))
    rollout, cap = config.rollout, config.rollout.max_response_tokens
    whole = replace_fields(config, {"rollout.slots": RESPONSES, "rollout.window": cap * RESPONSES}).rollout
    batcher = make_batcher(make_schedule(whole), task.prompts("train"), samples_per_prompt=rollout.samples_per_prompt,
                           seed=config.run.seed, reply=reply_of(task), limit=RESPONSES)  # fmt: skip
    responses = [s.response for s in batcher.window(make_engine(config, task, policy, RESPONSES))]
    with torch.no_grad():
        logprob_BT = policy(TokenBatch.of(responses))
    return torch.cat([row[: len(r)] - torch.tensor(r.logprobs) for row, r in zip(logprob_BT, responses, strict=True)])


def row(task: str, cache: str, kind: str) -> dict[str, object]:
    """One line of the table."""
    config = replace_fields(Config(), {"task.name": task, "run.cache": cache, "rollout.kv_cache": kind, "run.progress": False})
    found = gaps(config).double()
    worst, weight = found.abs().sort(descending=True).values, found.exp()
    return {
        "task": task, "kv_cache": kind, "tokens": len(found), "gap_mean": f"{worst.mean():.2g}",
        "gap_top_percent": f"{worst[: max(1, len(worst) // 100)].mean():.2g}", "gap_max": f"{worst[0]:.2g}",
        "weight_mean": f"{weight.mean():.4f}", "weight_std": f"{weight.std():.4f}",
        "weight_above_2": f"{(weight > 2).double().mean():.2g}",
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["chain", "fork", "length"])
    parser.add_argument("--cache", default="runs/cache", help="of base models")
    parser.add_argument("--out", type=Path, default=RESULTS / "fp8_rollouts.csv")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    report(
        "fp8_rollouts", [row(task, arguments.cache, kind) for task in arguments.tasks for kind in ("auto", "fp8")], arguments.out
    )


if __name__ == "__main__":
    main()
