"""scale/ on vLLM's CPU build: the Trainer's own share of a cpu-tiny step, padding in what is trained, memory over many steps.

    python -m benchmarks.scale_overhead [--steps 200] [--ranks 1]

Own share (aim: at most 3 %): what a step takes outside of models, optimisers, engine, verifier and waiting for other ranks, its
metrics, tables and checkpoint polls included, over the step's seconds. With more ranks than one, waiting cannot be told from work
in collectives, so both are given: `waiting_share` is the collectives'. Padding (aim: at most 5 %): tokens that the models are fed
in updates and that belong to no response or prompt, over all that they are fed; and the same inside attention, which pads in groups
of similar lengths. Memory (aim: flat, within 2 %): resident bytes of the first rank at the end against those after a tenth of the
steps, the engine included, and against the middle. Needs vLLM (make test-scale installs it).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from benchmarks.common import report
from benchmarks.overhead import Stopwatch, growth, models_and_engine
from scale.build import with_base_model
from scale.config import ScaleConfig, check
from scale.distributed import Collective, start
from scale.run import open_session
from tppo_ref.rollout import attention
from tppo_ref.runs.parsing import parse

TINY = Path(__file__).parents[1] / "scale" / "configs" / "cpu-tiny.yaml"


def count_padding(counts: Counter[str]) -> None:
    """Every packed batch that is fed with gradients adds its tokens to `counts`: real ones, fed ones, ones that attention reads."""
    layout, forward = attention.PackedLayout, attention.PackedLayout.__init__

    def counted(self: Any, lengths: Any, *arguments: Any, **options: Any) -> None:
        forward(self, lengths, *arguments, **options)
        if torch.is_grad_enabled():
            spare = list(lengths) == [2]  # models.NO_ROWS: what a rank with nothing left to do feeds
            counts["fed"] += sum(lengths)
            counts["real"] += 0 if spare else sum(lengths)
            counts["attended"] += sum(num * longest for _, _, num, longest, *_ in self.groups)

    layout.__init__ = counted  # type: ignore[method-assign]


def measure(steps: int) -> dict[str, Any]:
    """One rank's run of cpu-tiny."""
    world = start(device="cpu")
    with tempfile.TemporaryDirectory() as out:
        arguments = ["--config", str(TINY), "--algo.run.out", out, "--algo.run.checkpoint_every", "0"]
        config = check(parse(ScaleConfig, arguments, prog="scale_overhead"))
        torch.set_num_threads(config.algo.run.threads)
        session = open_session(with_base_model(config, Collective(world)), world)
        process, memory, total_s = psutil.Process(), [], 0.0
        waiting, verifying, counts = Stopwatch(), Stopwatch(), Counter[str]()
        for name in ("sum", "max", "gather_objects"):
            waiting.wrap(session.parts.parallel, name)
        for name in ("submit", "collect"):
            verifying.wrap(session.parts.scorer, name)
        count_padding(counts)
        with models_and_engine(session.trainer) as watch:
            for _ in tqdm(range(steps), desc="cpu-tiny", unit="step", disable=world.rank > 0):
                begin = time.perf_counter()
                session.step()
                total_s += time.perf_counter() - begin
                memory.append(process.memory_info().rss)
        session.close()
    others = watch.seconds + verifying.seconds
    return {
        "ranks": world.world, "steps": steps, "ms_per_step": round(1e3 * total_s / steps, 1),
        "own_share": round(1 - (others + waiting.seconds) / total_s, 4), "aim_own_share": 0.03,
        "waiting_share": round(waiting.seconds / total_s, 4), "verifier_share": round(verifying.seconds / total_s, 4),
        "padding": round(1 - counts["real"] / counts["fed"], 4), "aim_padding": 0.05,
        "attention_padding": round(1 - counts["real"] / counts["attended"], 4),
        "memory_growth": round(growth(memory), 4), "aim_memory_growth": 0.02,
        "memory_growth_second_half": round(memory[-1] / memory[len(memory) // 2] - 1, 4), "rss_mib": round(memory[-1] / 2**20),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.ranks > 1 and "RANK" not in os.environ:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(arguments.ranks)]
        sys.exit(subprocess.call([*torchrun, "-m", "benchmarks.scale_overhead", *sys.argv[1:]]))
    row = measure(arguments.steps)
    if int(os.environ.get("RANK", "0")) == 0:
        report("scale_overhead" if arguments.ranks == 1 else f"scale_overhead-{arguments.ranks}", [row])
    sys.stdout.flush()
    os._exit(0)  # vLLM and torch would both take the process groups down


if __name__ == "__main__":
    main()
