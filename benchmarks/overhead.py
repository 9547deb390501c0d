"""The Trainer's own share of a demo step, the occupancy of the slots, and resident memory over many steps.

    python -m benchmarks.overhead [--steps 1000]

"Own share": everything in a step outside of model forward, backward, optimiser and decoding, over the step's seconds (aim: at
most 5 %). Occupancy with immediate refill (aim: at least 98 %). Memory: resident bytes at the end against those after a tenth of
the steps (aim: flat, within 2 %). The run is the chain task with the demo's settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from benchmarks.common import report
from tppo_ref.config import Config, apply_method, parse, replace_fields
from tppo_ref.run import Session

DEMO = Path(__file__).parents[1] / "tppo_ref" / "configs" / "demo.yaml"


class Stopwatch:
    """Seconds inside of wrapped calls; a call inside of another is counted once."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    def wrap(self, owner: Any, name: str) -> None:
        setattr(owner, name, self.timed(getattr(owner, name)))

    def timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            begin = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.depth -= 1
                if not self.depth:
                    self.seconds += time.perf_counter() - begin

        return run


def measure(config: Config, steps: int) -> dict[str, float]:
    session = Session(config)
    trainer, watch = session.trainer, Stopwatch()
    watch.wrap(trainer.engine, "step")
    for learner in (trainer.policy, trainer.value):
        watch.wrap(learner.module, "forward")
        watch.wrap(learner.optimiser, "step")
    backward = torch.Tensor.backward
    torch.Tensor.backward = watch.timed(backward)  # type: ignore[method-assign]
    process, memory, totals = psutil.Process(), [], {"step_s": 0.0, "busy": 0.0}
    try:
        for _ in tqdm(range(steps), desc=config.run.method, unit="step"):
            metrics = trainer.step()
            totals["step_s"] += metrics["time/step_s"]
            totals["busy"] += metrics["rollout/occupancy"]
            memory.append(process.memory_info().rss)
    finally:
        torch.Tensor.backward = backward  # type: ignore[method-assign]
        session.close()
    early = sum(memory[steps // 10 : steps // 10 + 10]) / len(memory[steps // 10 : steps // 10 + 10])
    return {
        "own_share": round(1 - watch.seconds / totals["step_s"], 4), "aim_own_share": 0.05,
        "occupancy": round(totals["busy"] / steps, 4), "aim_occupancy": 0.98,
        "memory_growth": round(memory[-1] / early - 1, 4), "aim_memory_growth": 0.02,
        "rss_mib": round(memory[-1] / 2**20), "ms_per_step": round(1e3 * totals["step_s"] / steps, 1), "steps": steps,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        config = apply_method(parse(Config, ["--config", str(DEMO)], prog="overhead"), "tppo", strict=False)
        run = dataclasses.replace(config.run, out=out, progress=True)
        config = replace_fields(dataclasses.replace(config, run=run), {"run.timeline": False})
        report("overhead", [measure(config, arguments.steps)])


if __name__ == "__main__":
    main()
