"""What each lever of training once is worth beside vLLM's CPU build: CPU seconds per token of scale/, for the table of levers.py.

    python -m benchmarks.levers_vllm [--rounds 3] [--steps 12]

One rank of scale/configs/cpu-tiny.yaml per lever and round, the levers in turn, each a process of its own, as vLLM needs one.
Seconds are the rank's CPU seconds, its engine's included. The first steps are not counted. A gain is T-PPO's seconds per generated
token over the lever's, round by round: geometric mean and 95 % Student-t interval of logarithms. The small critic has not learnt
anything: what it costs is asked, and not what it brings. Needs vLLM (make test-scale installs it). Keeps results/levers_vllm.csv.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.common import report
from benchmarks.levers import LEVERS
from tppo_ref.runs.comparison import geometric
from tppo_ref.runs.sinks import read_metrics

ROOT = Path(__file__).parents[1]
WARM_STEPS = 4


def small_critic(folder: Path) -> Path:
    """A value model of a quarter of cpu-tiny's width and one layer."""
    from transformers import AutoModelForCausalLM

    from scale.config import ScaleConfig
    from tppo_ref.runs.parsing import parse
    from tppo_ref.runs.warmstart import tiny_policy_config
    from tppo_ref.tasks import load_task

    config = parse(ScaleConfig, ["--config", str(ROOT / "scale" / "configs" / "cpu-tiny.yaml")], prog="levers_vllm").algo
    shape = tiny_policy_config(load_task(config.task.name), num_layers=1, width=config.model.hidden_size // 4, num_heads=1)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    return folder


def seconds_per_token(fields: Mapping[str, Any], steps: int, cache: Path) -> float:
    """A run of so many steps behind the warm ones."""
    with tempfile.TemporaryDirectory() as out:
        shared = {"run.steps": WARM_STEPS + steps, "run.out": out, "run.cache": cache, "run.clock": "cpu", "run.progress": False,
                  "run.checkpoint_every": 0, "value.pretrain_responses": 0, "value.warmup_steps": 0}  # fmt: skip
        options = [f"--algo.{name}={str(value).lower() if isinstance(value, bool) else value}"
                   for name, value in {**shared, **fields}.items()]  # fmt: skip
        command = [sys.executable, str(ROOT / "scale" / "launch.py"), "--config", str(ROOT / "scale" / "configs" / "cpu-tiny.yaml")]
        done = subprocess.run([*command, *options], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(options)}: ended with {done.returncode}\n{done.stderr[-2000:]}")
        rows = [r for r in read_metrics(Path(out) / "metrics.jsonl") if "time/step_s" in r][WARM_STEPS:]
    return sum(r["time/step_s"] for r in rows) / sum(r["rollout/tokens"] for r in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in LEVERS}
    with tempfile.TemporaryDirectory() as folder:
        small = small_critic(Path(folder) / "small")
        turns = [name for _ in range(arguments.rounds) for name in LEVERS]
        for name in tqdm(turns, unit="run"):
            fields = {key: small if x == "small" else x for key, x in LEVERS[name][1].items()}
            seconds[name].append(seconds_per_token(fields, arguments.steps, Path(folder) / "cache"))
    base = np.array(seconds["tppo"])
    report("levers_vllm", [
        {"lever": name, "rounds": arguments.rounds, "steps": arguments.steps, "us_per_token": round(1e6 * float(np.mean(own)), 1)}
        | dict(zip(("gain", "low", "high"), (round(x, 4) for x in geometric(base / own)), strict=True))
        for name, own in seconds.items()
    ])  # fmt: skip


if __name__ == "__main__":
    main()
