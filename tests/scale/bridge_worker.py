"""The bridge: tppo_ref's Session and scale's on one rank, in one process each after the other, same task, seeds and weights.

bridge_worker.py POLICY VALUE PROBLEMS OUT STEPS      prints FOUND {"ref": [...], "scale": [...]}
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from scale.config import ScaleConfig, check
from scale.distributed import start
from scale.run import ScaleSession
from tppo_ref.config import Config, replace_fields
from tppo_ref.run import Session


def main(policy, value, problems, out, steps):
    world = start(device="cpu")
    fields = {
        "task.name": "jsonl", "task.path": problems, "task.tokenizer": "bytes", "task.verifier": "scale.rewards:verify_math",
        "model.policy": policy, "model.value": value, "rollout.slots": 6, "rollout.window": 10, "rollout.max_response_tokens": 25,
        "rollout.temperature": 0.9, "rollout.min_response_tokens": 2, "advantage.tail_tokens": 3, "policy.mini_batches": 2,
        "policy.mini_batch_tokens": 0, "policy.micro_batch_tokens": 64, "policy.lr": 1e-4, "value.mini_batches": 2, "value.mini_batch_tokens": 0,
        "value.micro_batch_tokens": 64, "value.warmup_steps": 1, "policy.lr_warmup_steps": 3, "run.progress": False, "task.max_prompt_tokens": 64,
    }  # fmt: skip
    found = {}
    for name in ("ref", "scale"):
        algo = replace_fields(Config(), fields | {"run.out": str(Path(out) / name)})
        if name == "ref":
            session = Session(algo)
        else:
            config = check(replace_fields(ScaleConfig(), {"engine.kind": "torch"}))
            session = ScaleSession(replace_algo(config, algo), world)
        rows = []
        for _ in range(steps):
            rows.append(session.trainer.step())
            rows[-1]["tokens"] = [
                [s.response.id, s.begin, s.response.end.name, s.response.score, s.response.token_ids]
                for s in session.trainer.slices
            ]
        found[name] = rows
        session.scorer.close()
    return found


def replace_algo(config, algo):
    import dataclasses

    return dataclasses.replace(config, algo=algo)


if __name__ == "__main__":
    print("FOUND " + json.dumps(main(*sys.argv[1:5], int(sys.argv[5]))), flush=True)
    os._exit(0)
