"""The Trainer's own share of a step, the occupancy of the slots, and resident memory over many steps.

    python -m benchmarks.overhead [--steps 1000]
    python -m benchmarks.overhead --memory [--steps 10000] [--minutes 14]

"Own share": everything in a step outside of model forward, backward, gradient clipping, optimiser and decoding, over the step's
seconds (aim: at most 5 %). Occupancy with immediate refill (aim: at least 98 %). Memory: resident bytes at the end against
those after a tenth of the steps (aim: flat, within 2 %). The run is T-PPO with its defaults on the chain task.

--memory: the second alone, of whole steps of the loop with all that a run writes, on a model and windows that are tiny, so that
10,000 steps fit in minutes; a checkpoint every 1,000. It stops after --minutes, with fewer steps, and says how many.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
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
    for learner in trainer.learners:
        watch.wrap(learner.optimiser, "step")
    # Of the class: what a sharded model does before and after its `forward` belongs to it.
    patched = [
        (torch.Tensor, "backward"),
        *((type(learner.module), "__call__") for learner in trainer.learners),
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


TINY = {
    "task.name": "length", "model.warm_start_steps": 2, "model.hidden_size": 16, "model.num_layers": 1, "model.num_heads": 2,
    "rollout.slots": 4, "rollout.window": 4, "rollout.max_response_tokens": 12, "advantage.tail_tokens": 2,
    "policy.mini_batches": 1, "policy.mini_batch_tokens": 0, "value.mini_batches": 1, "value.mini_batch_tokens": 0,
    "policy.lr": 1e-5, "value.lr": 1e-5, "run.eval_prompts": 2, "run.eval_every_s": 0.0, "run.checkpoint_every": 1000,
    "run.cut_warning": 1.0,
}  # fmt: skip


def memory_of_the_loop(config: Config, steps: int, minutes: float) -> dict[str, float]:
    """Resident bytes over many steps of a Session, its files and checkpoints included."""
    session, process, memory = Session(build(config)), psutil.Process(), list[float]()
    begin = time.perf_counter()
    with closing(session):
        for step in tqdm(range(1, steps + 1), desc="memory", unit="step", mininterval=10):
            session.step()
            if step % config.run.checkpoint_every == 0:
                session.save()
            memory.append(process.memory_info().rss)
            if time.perf_counter() - begin > 60 * minutes:
                break
    half = memory[len(memory) // 2 :]
    return {
        "memory_growth": round(growth(memory), 4), "memory_growth_second_half": round(memory[-1] / half[0] - 1, 4),
        "aim_memory_growth": 0.02, "rss_mib": round(memory[-1] / 2**20), "highest_mib": round(max(memory) / 2**20),
        "steps": len(memory), "checkpoints": len(memory) // config.run.checkpoint_every,
        "ms_per_step": round(1e3 * (time.perf_counter() - begin) / len(memory), 1),
    }  # fmt: skip


def growth(memory: Sequence[float]) -> float:
    """The last of a run's memory readings over the mean of ten after a tenth of them, less 1."""
    early = memory[len(memory) // 10 : len(memory) // 10 + 10]
    return memory[-1] / (sum(early) / len(early)) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="1,000; with --memory 10,000")
    parser.add_argument("--memory", action="store_true", help="resident memory alone, of tiny steps of the whole loop")
    parser.add_argument("--minutes", type=float, default=14.0, help="of --memory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        if arguments.memory:
            tiny = replace_fields(Config(), TINY | {"run.out": out, "run.cache": f"{out}/cache"})
            report("memory", [memory_of_the_loop(tiny, arguments.steps or 10_000, arguments.minutes)])
            return
        config = apply_method(parse(Config, ["--config", str(DEMO)], prog="overhead"), "tppo", strict=False)
        run = dataclasses.replace(config.run, out=out, progress=True)
        config = replace_fields(dataclasses.replace(config, run=run), {"run.timeline": False})
        report("overhead", [measure(config, arguments.steps or 1000)])


if __name__ == "__main__":
    main()
