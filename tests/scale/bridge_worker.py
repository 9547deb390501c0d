"""The bridge: tppo_ref's Session and scale's on one rank, in one process each after the other, same task, seeds and weights.

bridge_worker.py POLICY VALUE PROBLEMS OUT STEPS torch|vllm      prints FOUND {"ref": [...], "scale": [...]}

torch   both decode with TorchEngine: same tokens, same losses
vllm    scale decodes with vLLM, and tppo_ref's Trainer is given the windows that it sampled
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from scale.config import ScaleConfig, check
from scale.distributed import start
from scale.run import open_session
from tppo_ref.method.records import Response, WindowSlice
from tppo_ref.runs.build import build
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.session import Session


class Replay:
    """Batcher and scorer that bring recorded windows, one a step, as (response after the window, begin, stop)."""

    def __init__(self, windows):
        self.windows, self.known, self.segments, self.slices, self.step_ends_s = iter(windows), {}, [], [], []
        self.num_generated_tokens, self.num_steps, self.slot_steps = 0, 1, 1.0

    def window(self, engine, *, version=0, on_end=None):
        self.slices = []
        for state, begin, stop in next(self.windows):
            recorded = Response.from_state_dict(state)
            response = self.known.setdefault(recorded.id, recorded)
            for name in ("token_ids", "logprobs", "versions", "window_starts", "end"):  # not what the Trainer has written there
                setattr(response, name, getattr(recorded, name))
            if response is recorded:
                response.values, response.num_settled = [], 0
            self.verdict = {**getattr(self, "verdict", {}), recorded.id: (recorded.score, "ok")}
            self.slices.append(WindowSlice(response, begin, stop))
            self.num_generated_tokens += stop - begin
        return self.slices

    @property
    def in_flight(self):
        return {s.response.id: s.response for s in self.slices if not s.response.ended}

    def submit(self, response):
        raise AssertionError("a replay ends nothing")

    def collect(self):
        return self.verdict


def main(policy, value, problems, out, steps, kind):
    world = start(device="cpu")
    fields = {
        "task.name": "jsonl", "task.path": problems, "task.tokenizer": "bytes", "task.verifier": "scale.rewards:verify_math",
        "model.policy": policy, "model.value": value, "rollout.slots": 6, "rollout.window": 10, "rollout.max_response_tokens": 25,
        "rollout.temperature": 0.9, "rollout.min_response_tokens": 2, "advantage.tail_tokens": 3, "policy.mini_batches": 2,
        "policy.mini_batch_tokens": 0, "policy.micro_batch_tokens": 64, "policy.lr": 1e-4, "value.mini_batches": 2, "value.mini_batch_tokens": 0,
        "value.micro_batch_tokens": 64, "value.warmup_steps": 1, "policy.lr_warmup_steps": 3, "run.progress": False, "task.max_prompt_tokens": 64,
    }  # fmt: skip
    found, windows = {}, []
    for name in ("scale", "ref"):
        algo = replace_fields(Config(), fields | {"run.out": str(Path(out) / name)})
        if name == "ref":
            session = Session(build(algo))
            if kind == "vllm":
                session.trainer.batcher = session.trainer.scorer = Replay(windows)
        else:
            config = check(replace_fields(ScaleConfig(), {"engine.kind": kind}))
            session = open_session(replace_algo(config, algo), world)
        rows = []
        for _ in range(steps):
            rows.append(session.trainer.step())
            rows[-1]["tokens"] = [
                [s.response.id, s.begin, s.response.end.name, s.response.score, list(s.response.token_ids)]
                for s in session.trainer.slices
            ]
            if name == "scale":
                windows.append([(s.response.state_dict(), s.begin, s.stop) for s in session.trainer.slices])
        found[name] = rows
        session.parts.scorer.close()
    return found


def replace_algo(config, algo):
    import dataclasses

    return dataclasses.replace(config, algo=algo)


if __name__ == "__main__":
    print("FOUND " + json.dumps(main(*sys.argv[1:5], int(sys.argv[5]), sys.argv[6])), flush=True)
    os._exit(0)
