"""Finding 1 of docs/throughput.md once more, training as fast as was published: T-PPO as published over PPO at its best.

    python -m benchmarks.update_level            half a minute; writes results/throughput_update.csv

The one published time of an update is far below the clock's (literature.csv, the setup 7B/28k). Here the seconds of training are
multiplied by published / predicted of that setup, and each method takes its best slots and tensor parallelism anew:

    as predicted    nothing is multiplied
    update          seconds of both models' updates x UPDATE
    training        that, and those of the passes for log-probabilities and values x its own quotient

A bound on what the miss may mean, and no correction: the quotients are of another model on other devices, and in them is whatever
is wrong about the lengths assumed there. Middle efficiencies; a faster update leaves more of a step to the rollout.
"""

from __future__ import annotations

import argparse
import csv
import functools
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.common import RESULTS, report
from sim.clock.compare import at_best, best_ppo, equal_ppo
from sim.clock.steady import Steady
from sim.clock.throughput import SETUPS

SETUP = "7B/28k"
PHASES = {"update": ("policy_train", "value_train"), "log-probabilities": ("logprob", "value_forward")}
LEVELS: dict[str, tuple[str, ...]] = {"as predicted": (), "update": ("update",), "training": ("update", "log-probabilities")}


def published_over_predicted(quantity: str) -> float:
    """Of SETUP, with the lengths that were assumed first."""
    with (RESULTS / "literature.csv").open(newline="") as file:
        rows = [r for r in csv.DictReader(file) if (r["setup"], r["quantity"], r["first"]) == (SETUP, quantity, "True")]
    (row,) = rows
    return float(row["published"]) / float(row["predicted"])


def speed(found: Steady, factors: Mapping[str, float]) -> float:
    """Trained tokens per second of a colocated system some phases of which take `factors` times as long."""
    return found.trained / sum(seconds * factors.get(phase, 1.0) for phase, seconds in found.phases_s.items())


def rows() -> Iterator[dict[str, Any]]:
    for case in SETUPS[:2]:
        for level, quantities in LEVELS.items():
            factors = {phase: published_over_predicted(name) for name in quantities for phase in PHASES[name]}
            rate = functools.partial(speed, factors=factors)
            ours, best = at_best(case, "tppo", speed=rate), best_ppo(case, speed=rate)
            equal = equal_ppo(case, ours)
            after, before, same = (one.system.middle for one in (ours, best, equal))
            yield {
                "what": f"{case.what}, {level}", "lengths": case.lengths,
                "update": factors.get("policy_train", 1.0), "passes": factors.get("logprob", 1.0),
                "tp": ours.cell.tp, "slots": ours.cell.slots, "best_tp": best.cell.tp, "best_slots": best.cell.slots,
                "gain": rate(after) / rate(before), "gain_equal": rate(after) / rate(same),
            }  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    report("throughput_update", list(rows()))


if __name__ == "__main__":
    main()
