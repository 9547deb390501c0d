"""What it would cost an engine never to preempt: T-PPO on 64 H100 with either admission of `engine.admission`, by the clock.

    python -m benchmarks.admission          under a minute; writes results/admission.csv

room: an engine begins a sequence when what it holds so far fits its cache, and preempts when that overflows; whole: when it fits at
its longest. 32B, TP 4, a window of 8,192. A preempted sequence is prefilled again; what vLLM's own steps and our lockstep add to
that (scale/vllm_engine.py) is not in it.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

from benchmarks.common import report
from sim.clock.best import question_of
from sim.clock.efficiency import Efficiency
from sim.clock.plan import PlanConfig
from sim.clock.search import Setting, setup_of
from sim.clock.steady import in_routine

WORK = (("math-mixture", 0, 8192), ("math-mixture", 0, 2048), ("dapo-32b", 2049, 2048))
"""Lengths, training step, slots: the port's 8,192, and fewer."""


def rows() -> Iterator[dict[str, Any]]:
    for lengths, step, slots in WORK:
        question = question_of(PlanConfig(gpus="64xH100", lengths=lengths, train_step=step))
        for admission in ("room", "whole"):
            setup = dataclasses.replace(setup_of(question, Setting(4, slots), Efficiency()), admission=admission)
            found = in_routine(setup, 8192, segments=60_000)
            yield {
                "lengths": f"{lengths}@{step}", "slots": slots, "admission": admission,
                "places": setup.places(0, setup.costs.kv_capacity_tokens or 0), "slots_per_engine": slots // setup.num_replicas,
                "rollout_s": round(found.rollout_s), "step_s": round(found.step_s), "preemptions": round(found.preemptions),
                "tokens_per_s": round(found.tokens_per_s),
            }  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    report("admission", list(rows()))


if __name__ == "__main__":
    main()
