"""Step times and shares that others published, predicted by the clock from the setups that they state, before anything is tuned.

    python -m benchmarks.literature            about a minute; writes results/literature.csv

Every efficiency is sim/clock/efficiency.py's; none was chosen by looking at these numbers. `low` and `high` are the ends that the
stated efficiencies allow (sim/clock/ranges.py). What a source does not state is assumed, and stands in `assumed`; where that
matters, several assumptions are printed, the first of them chosen beforehand. `error` is of the middle, relative to the nearest end
of the published range, 0 inside it; `within` says whether the two ranges meet. Misses are kept: they are what the page is for.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import report
from sim.clock.cluster import Recipe, Setup
from sim.clock.efficiency import Efficiency, Level
from sim.clock.fitting import with_utilisation
from sim.clock.footprint import Budget
from sim.clock.hardware import Layout, Roofline, cluster, model
from sim.clock.lengths import load_lengths
from sim.clock.ranges import CORNERS, Range, Ranged
from sim.clock.steady import Steady, synchronous

PROMPT_TOKENS = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stated:
    """A setup: what its source states, what is assumed beside it [O], and whether a critic is trained."""

    name: str
    known: str
    model: str
    gpus: str
    cap: int
    tp: int
    lengths: str
    responses: int
    mini_batch: int = 512
    """Responses per update."""
    critic: bool = False

    @property
    def assumed(self) -> str:
        return (f"{self.gpus}, TP {self.tp}, {self.lengths}, {self.responses} responses, {self.mini_batch} per update, "
                f"{'a' if self.critic else 'no'} critic, no reference")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Published:
    """A quantity as published, from `low` to `high`."""

    quantity: str
    low: float
    high: float
    unit: str


LONG = Stated(
    name="32B/32k", known="32B, cap 32k, 64 H800, 1,024 responses, the longest at the cap [V]", model="Qwen2.5-32B", gpus="64xH800",
    cap=32_768, tp=4, lengths="math-mixture", responses=1024,
)  # fmt: skip
H20 = Stated(  # DAPO has neither critic nor reference. Seconds as at verl-project/verl 1947b75; older versions print others.
    name="7B/28k", known="Qwen2.5-Math-7B, cap 28k, 32 H20, 512 x 16 responses, mini-batches of 32 x 16, DAPO: verl's page on "
    "fully asynchronous training, its colocated synchronous row [V]", model="Qwen2.5-7B", gpus="32xH20", cap=28_672, tp=1,
    lengths="dapo-32b@2049", responses=8192,
)  # fmt: skip
SHARE = Stated(
    name="32B synchronous", known="32B, synchronous [V]", model="Qwen2.5-32B", gpus="64xH800", cap=20_480, tp=4,
    lengths="dapo-32b@2049",
    responses=8192,
)  # fmt: skip
MATH = Stated(
    name="14B/16k math", known="14B, cap 16k, mathematics, GRPO; lengths as math-14b [V]", model="Qwen2.5-14B", gpus="64xH800",
    cap=16_000,
    tp=2, lengths="math-14b", responses=1024,
)  # fmt: skip

ROLLOUT = Published("rollout", 550, 600, "s")
PARTS = (Published("generation", 357, 357, "s"), Published("log-probabilities", 108, 108, "s"), Published("update", 270, 270, "s"),
         Published("update / log-probabilities", 2.5, 2.5, ""))  # fmt: skip
SETUPS: tuple[tuple[Stated, tuple[Published, ...]], ...] = (
    (LONG, (ROLLOUT,)),
    (dataclasses.replace(LONG, tp=8), (ROLLOUT,)),
    (dataclasses.replace(LONG, tp=2), (ROLLOUT,)),
    (dataclasses.replace(LONG, lengths="code-14b"), (ROLLOUT,)),
    (H20, PARTS),
    (dataclasses.replace(H20, lengths="dapo-32b@1024"), PARTS),
    (dataclasses.replace(H20, lengths="dapo-32b@5280"), PARTS),
    (SHARE, (Published("rollout share", 0.70, 0.70, ""),)),
    (dataclasses.replace(SHARE, responses=2048), (Published("rollout share", 0.70, 0.70, ""),)),
    (MATH, (Published("rollout share", 0.72, 0.72, ""), Published("training share", 0.23, 0.23, ""))),
    (
        dataclasses.replace(MATH, gpus="8xH800"),
        (Published("rollout share", 0.72, 0.72, ""), Published("training share", 0.23, 0.23, "")),
    ),
)


def simulate(stated: Stated) -> Ranged:
    """Synchronous steps of the setup, at every level of efficiency."""
    spec, _, step = stated.lengths.partition("@")
    shape, (num_devices, gpu) = model(stated.model), cluster(stated.gpus)
    budget = Budget(sequence_tokens=stated.cap + PROMPT_TOKENS, value_model=stated.critic)
    plain = Layout(num_devices=num_devices, tensor_parallel=stated.tp, micro_batch_tokens=budget.sequence_tokens)
    layout = with_utilisation(shape, plain, budget, gpu)
    lengths = load_lengths(spec, stated.cap).at_step(int(step or 0))

    def run(efficiency: Efficiency) -> Steady:
        return synchronous(Setup(
            lengths=lengths, prompt_tokens=PROMPT_TOKENS, slots=stated.responses, num_replicas=layout.num_replicas,
            costs=Roofline(accelerator=gpu, model=shape, layout=layout, efficiency=efficiency), ranks=num_devices,
            samples_per_prompt=16, update_tokens=round(stated.mini_batch * lengths.mean_tokens()),
            recipe=Recipe(critic=stated.critic),
        ))  # fmt: skip

    return Ranged(run)


def parts(found: Ranged, engine: Level = "middle", trainer: Level = "middle") -> dict[str, float]:
    """Quantities as the sources name them, at a corner of the efficiencies."""
    spent, rollout_s, step_s = found.at(trainer).phases_s, found.rollout_s(engine), found.step_s(engine, trainer)
    training_s = sum(spent[name] for name in ("logprob", "value_forward", "policy_train", "value_train"))
    return {
        "rollout": rollout_s, "generation": rollout_s, "log-probabilities": spent["logprob"], "update": spent["policy_train"],
        "update / log-probabilities": spent["policy_train"] / spent["logprob"], "rollout share": rollout_s / step_s,
        "training share": training_s / step_s,
    }  # fmt: skip


def error(predicted: float, published: Published) -> float:
    """(predicted - nearest end of the range) / that end; 0 inside."""
    nearest = min(max(predicted, published.low), published.high)
    return (predicted - nearest) / nearest


def rows() -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    for stated, quantities in SETUPS:
        found = simulate(stated)
        corners = [parts(found, *corner) for corner in CORNERS]
        for published in quantities:
            predicted = Range.over(corner[published.quantity] for corner in corners)
            span = f"{published.low:g}" if published.low == published.high else f"{published.low:g}-{published.high:g}"
            low, middle, high = (round(number, 3 if number < 10 else 1) for number in predicted)
            yield {
                "setup": stated.name, "first": stated.name not in seen, "quantity": published.quantity, "unit": published.unit,
                "published": span, "predicted": middle, "low": low, "high": high,
                "error": f"{100 * error(predicted.middle, published):+.0f} %",
                "within": predicted.low <= published.high and published.low <= predicted.high,
                "known": stated.known, "assumed": stated.assumed,
            }  # fmt: skip
        seen.add(stated.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="CSV file; results/literature.csv by default")
    report("literature", list(rows()), parser.parse_args().out)


if __name__ == "__main__":
    main()
