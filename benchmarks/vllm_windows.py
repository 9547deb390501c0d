"""T-PPO's step against one that waits as synchronous PPO's does, both with real vLLM, same config otherwise: tokens per second.

    python -m benchmarks.vllm_windows [--seeds 5]

The task is `chain`, whose longest response is ten times the mean; 32 slots on one rank of cpu-tiny. PPO is the same run with a
window as long as the longest response and refill at the step's edge: every step waits for its longest. Its critic update is
T-PPO's. The two are run in turn,
seed by seed; the first steps of each are left out. Aim: at least twice the generated tokens per second, training and weight
sync included. Policies learn meanwhile, so lengths may drift apart: each row gives its mean. Needs vLLM (make test-scale
installs it).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.common import report
from tppo_ref.runs.comparison import geometric
from tppo_ref.runs.sinks import read_metrics

ROOT = Path(__file__).parents[1]
COMMON = {
    "algo.rollout.slots": 32, "algo.run.eval_prompts": 1, "algo.run.checkpoint_every": 0, "algo.run.progress": "false",
    "cluster.devices_per_node": 1,
}  # fmt: skip
ARMS: dict[str, dict[str, Any]] = {
    "tppo": {"algo.rollout.window": 64, "algo.run.steps": 24},
    "ppo": {"algo.rollout.window": 320, "algo.rollout.refill": "step", "algo.run.steps": 34},
}
LEFT_OUT_STEPS = 4  # T-PPO's slots hold responses of all ages after them


def run(arm: str, seed: int, out: Path) -> dict[str, Any]:
    fields = COMMON | ARMS[arm] | {"algo.run.seed": seed, "algo.run.out": out / f"{arm}-{seed}"}
    command = [sys.executable, str(ROOT / "scale" / "launch.py"), "--config", str(ROOT / "scale" / "configs" / "cpu-tiny.yaml")]
    for name, value in fields.items():
        command += [f"--{name}", str(value)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{arm}, seed {seed}: {done.stderr[-1500:]}")
    steps = [row for row in read_metrics(fields["algo.run.out"] / "metrics.jsonl") if "rollout/tokens" in row][LEFT_OUT_STEPS:]
    total = {
        name: sum(row[name] for row in steps)
        for name in ("rollout/tokens", "time/step_s", "time/rollout_s", "rollout/decode_steps")
    }
    ended = sum(row["response/ended"] for row in steps)
    length = sum((row["response/length_mean"] or 0) * row["response/ended"] for row in steps) / ended
    return {
        "method": arm, "seed": seed, "steps": len(steps), "tokens": int(total["rollout/tokens"]),
        "tokens_per_s": round(total["rollout/tokens"] / total["time/step_s"], 1),
        "rollout_tokens_per_s": round(total["rollout/tokens"] / total["time/rollout_s"], 1),
        "occupancy": round(float(np.mean([row["rollout/occupancy"] for row in steps])), 4),
        "rollout_share": round(total["time/rollout_s"] / total["time/step_s"], 3),
        "ms_per_decode_step": round(1e3 * total["time/rollout_s"] / total["rollout/decode_steps"], 2),
        "length_mean": round(length, 1), "length_max": int(max(row["response/length_max"] or 0 for row in steps)),
    }  # fmt: skip


def ratio(rows: list[dict[str, Any]], column: str) -> dict[str, float]:
    """T-PPO over PPO, seed by seed: the geometric mean and the 95 % Student-t interval of logarithms."""
    of = {arm: np.array([row[column] for row in rows if row["method"] == arm], dtype=float) for arm in ARMS}
    return dict(zip(("ratio", "low", "high"), geometric(of["tppo"] / of["ppo"]), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as out, tqdm(total=2 * arguments.seeds, unit="run") as bar:
        for seed in range(arguments.seeds):
            for arm in ARMS:
                bar.set_description(f"{arm}, seed {seed}")
                rows.append(run(arm, seed, Path(out)))
                bar.update()
    report("vllm_windows", rows)
    for column in ("tokens_per_s", "rollout_tokens_per_s"):
        print(f"{column}, T-PPO over PPO: {json.dumps({name: round(x, 2) for name, x in ratio(rows, column).items()})}   (aim 2)")


if __name__ == "__main__":
    main()
