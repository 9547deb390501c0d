"""The Trainer's own share of a demo step, the occupancy of the slots, and resident memory over many steps.

    python -m benchmarks.overhead [--steps 1000]

"Own share": everything in a step outside of model forward, backward, gradient clipping, optimiser and decoding, over the step's
seconds (aim: at most 5 %). Occupancy with immediate refill (aim: at least 98 %). Memory: resident bytes at the end against
those after a tenth of the steps (aim: flat, within 2 %). The run is the chain task with the demo's settings.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from benchmarks.common import report
from tppo_ref.loop.trainer import Trainer
from tppo_ref.runs.build import build
from tppo_ref.runs.config import Config, apply_method
from tppo_ref.runs.parsing import parse, replace_fields
from tppo_ref.runs.session import Session

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


@contextmanager
def models_and_engine(trainer: Trainer) -> Iterator[Stopwatch]:
    """Seconds that a Trainer spends in models (forward, backward, gradient clipping, optimiser) and engine."""
    watch = Stopwatch()
    watch.wrap(trainer.parallel, "grad_norm")
    for name in ("submit", "step", "sleep", "load_weights"):
        watch.wrap(trainer.engine, name)
    for learner in (trainer.policy_learner, trainer.value_learner):
        watch.wrap(learner.optimiser, "step")
    # Of the class: what a sharded model does before and after its `forward` belongs to it.
    patched = [
        (torch.Tensor, "backward"),
        *((type(learner.module), "__call__") for learner in (trainer.policy_learner, trainer.value_learner)),
    ]
    before = [(owner, name, owner.__dict__.get(name)) for owner, name in patched]
    for owner, name in patched:
        watch.wrap(owner, name)
    try:
        yield watch
    finally:
        for owner, name, own in before:
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


def measure(config: Config, steps: int) -> dict[str, float]:
    session = Session(build(config))
    trainer = session.trainer
    process, memory, totals = psutil.Process(), [], {"step_s": 0.0, "busy": 0.0}
    with models_and_engine(trainer) as watch:
        for _ in tqdm(range(steps), desc=config.run.method, unit="step"):
            metrics = trainer.step()
            totals["step_s"] += metrics["time/step_s"]
            totals["busy"] += metrics["rollout/occupancy"]
            memory.append(process.memory_info().rss)
    session.close()
    return {
        "own_share": round(1 - watch.seconds / totals["step_s"], 4), "aim_own_share": 0.05,
        "occupancy": round(totals["busy"] / steps, 4), "aim_occupancy": 0.98,
        "memory_growth": round(growth(memory), 4), "aim_memory_growth": 0.02,
        "rss_mib": round(memory[-1] / 2**20), "ms_per_step": round(1e3 * totals["step_s"] / steps, 1), "steps": steps,
    }  # fmt: skip


def growth(memory: Sequence[float]) -> float:
    """The last of a run's memory readings over the mean of ten after a tenth of them, less 1."""
    early = memory[len(memory) // 10 : len(memory) // 10 + 10]
    return memory[-1] / (sum(early) / len(early)) - 1


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
