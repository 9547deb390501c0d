"""The cluster clock against real runs: calibrated on the costs of one run of the CPU demo, it predicts the others.

    python -m benchmarks.reality [--share 1.0] [--out runs/reality] [--results benchmarks/results]

Costs come from the first base run (T-PPO on the chain task, window 64, 32 slots; clock/calibrate.py) and, of training, from one
with a quarter of its tokens per update, which tells an update's own cost from that of its tokens. The other runs differ in window,
slots, task or method; what is taken from them is how long their responses were: input to the clock and no cost. A run's
seconds per step are its mean over all steps but the first. The base run is repeated with the same seed, between the others:
(largest - smallest) / median of its repeats is what this machine does to equal work.

`low` and `high` are the ends of what the costs of the base run's repeats predict, `predicted` is the first one's.
A prediction is within tolerance when its relative error is at most max(10 %, that spread). Ratios are of T-PPO to PPO, on the same
task. Writes results/reality.csv, misses included, and the costs to results/reality-costs.csv. Run it alone, it measures seconds,
about six minutes of them; a run that is finished is kept, so it goes on where it was stopped. For a try: --share 0.3 of the steps,
and --results, another folder for the tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.common import RESULTS, report
from sim.clock.calibrate import LEFT_OUT_STEPS, MIN_STEPS, Measured, Passes
from sim.clock.cluster import Setup
from sim.clock.distributions import Empirical, Tokens
from sim.clock.schedule import System, Windowed, run
from sim.clock.systems import Synchronous
from tppo_ref.runs.comparison import read_table
from tppo_ref.runs.sinks import read_metrics

TOLERANCE = 0.10
COMMON = {
    "rollout.slots": 32, "run.eval_prompts": 32, "run.eval_every_s": 3, "run.checkpoint_every": 0, "run.progress": "false",
    "run.threads": 1,
}  # fmt: skip
TPPO = {"run.method": "tppo", "policy.lr": 3e-4, "task.name": "chain", "rollout.window": 64}  # the demo's settings
PPO = {"run.method": "ppo", "policy.lr": 6e-4, "task.name": "chain"}


class Setting(NamedTuple):
    """A run to make: its name, its steps (10 to 20 s of training on a quiet core), and what it is."""

    name: str
    steps: int
    fields: Mapping[str, Any]


SETTINGS = (
    Setting("base-1", 48, TPPO),
    Setting("small-updates", 24, TPPO | {"policy.mini_batch_tokens": 125, "value.mini_batch_tokens": 125}),  # default: 500
    Setting("window-32", 64, TPPO | {"rollout.window": 32}),
    Setting("window-128", 20, TPPO | {"rollout.window": 128}),
    Setting("ppo", 40, PPO),
    Setting("base-2", 48, TPPO),
    Setting("slots-16", 64, TPPO | {"rollout.slots": 16}),
    Setting("refill-step", 48, TPPO | {"rollout.refill": "step"}),
    Setting("fork", 32, TPPO | {"task.name": "fork"}),
    Setting("ppo-fork", 40, PPO | {"task.name": "fork"}),
    Setting("base-3", 48, TPPO),
)
BASES = tuple(s.name for s in SETTINGS if s.name.startswith("base"))
CALIBRATION = (BASES[0], "small-updates")
RATIOS = (("base-1", "ppo"), ("fork", "ppo-fork"))


class Means(NamedTuple):
    """Of a run, per step."""

    step_s: float
    rollout_s: float
    training_s: float
    tokens: float

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.step_s


# ------------------------------------------------------------------------------------------------------------------------ runs


def make_run(setting: Setting, share: float, out: Path) -> Path:
    """The folder of a finished run of `setting`; one that was stopped half-way starts anew."""
    folder = out / setting.name
    steps = max(LEFT_OUT_STEPS + MIN_STEPS, round(share * setting.steps))
    fields = {**COMMON, **setting.fields, "run.steps": steps, "run.out": folder}
    command = ["-m", "tppo_ref", "train", *(f"--{name}={value}" for name, value in fields.items())]
    marker = folder / "finished"
    if marker.exists():
        if marker.read_text() != shlex.join(command):
            raise SystemExit(f"--out: {folder} holds a run with other settings; remove it, or choose another folder")
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, *command], check=True)
    marker.write_text(shlex.join(command))
    return folder


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [r for r in read_metrics(folder / "metrics.jsonl") if "rollout/tokens" in r]


def measured_means(folder: Path) -> Means:
    used = steps_of(folder)[LEFT_OUT_STEPS:]
    return Means(
        step_s=mean(r["time/step_s"] for r in used), rollout_s=mean(r["time/rollout_s"] for r in used),
        tokens=mean(r["rollout/tokens"] for r in used),
        training_s=mean(r["time/forward_s"] + r["time/policy_s"] + r["time/value_s"] for r in used),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ prediction


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Recorded(Empirical):
    """A run's lengths in the order in which its responses were drawn, for one prediction; after the last one, the cap."""

    order: Iterator[int]

    def sample(self, rng: np.random.Generator, num_groups: int, samples_per_group: int = 1, *, step: float = 0) -> Tokens:
        num = num_groups * samples_per_group
        return np.fromiter(self.order, dtype=np.int64, count=num).reshape(num_groups, samples_per_group)


def recorded_lengths(folder: Path, cap: int) -> Recorded:
    """What had not ended with the run's last step did not end in it: it stands here with the cap."""
    known = dict(read_table(folder / "responses.csv", {"response": int, "tokens": int}))
    lengths = [known.get(response, cap) for response in range(max(known) + 1)]
    order = itertools.chain(lengths, itertools.repeat(cap))
    return Recorded(values=tuple(lengths), cap=cap, name=folder.name, source="[M]", order=order)


def predicted_means(folder: Path, costs: Measured) -> Means:
    """The clock on the run's settings and lengths. RuntimeError where it does not sample, step by step, what the run did."""
    config, steps = json.loads((folder / "config.json").read_text()), steps_of(folder)
    rollout, advantage = config["rollout"], config["advantage"]
    prompt_tokens = steps[0]["policy/prefix_tokens"] / steps[0]["response/rows"]  # of the demo's tasks: all alike
    setup = Setup(
        lengths=recorded_lengths(folder, rollout["max_response_tokens"]), prompt_tokens=round(prompt_tokens), costs=costs,
        slots=rollout["slots"], samples_per_prompt=rollout["samples_per_prompt"],
        update_tokens=config["policy"]["mini_batch_tokens"],
    )  # fmt: skip
    system: System
    if rollout["refill"] == "batch":
        system = Synchronous(setup, batch_responses=rollout["responses_per_step"] or rollout["slots"])
    else:
        system = Windowed(setup, window=rollout["window"], refill=rollout["refill"], tail=advantage["tail"],
                          tail_tokens=advantage["tail_tokens"])  # fmt: skip
    records = run(system, steps=len(steps)).records
    for ours, theirs in zip(records, steps, strict=True):
        clock = (ours.generated, ours.decode_steps, ours.finished, ours.tokens_fed - ours.generated)
        real = tuple(theirs[n] for n in ("rollout/tokens", "rollout/decode_steps", "response/ended", "policy/prefix_tokens"))
        if clock != real:
            raise RuntimeError(f"{folder}, step {theirs['step']}: tokens, decode steps, ended responses and prefix tokens are "
                               f"{clock} on the clock, {real} in the run")  # fmt: skip
    used = records[LEFT_OUT_STEPS:]
    return Means(
        step_s=mean(r.step_s for r in used), rollout_s=mean(r.rollout_s for r in used), tokens=mean(r.generated for r in used),
        training_s=mean(r.logprob_s + r.value_forward_s + r.policy_train_s + r.value_train_s for r in used),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ comparison


def spread(values: Sequence[float]) -> float:
    """(largest - smallest) / median of what equal work took."""
    return (max(values) - min(values)) / median(values)


def compare(
    name: str, quantity: str, predicted: float, measured: float, spread_of_equals: float, others: Sequence[float] = ()
) -> dict[str, Any]:
    """A row. `others`: predictions from the costs of the base run's repeats; the range is over them."""
    error, tolerance = predicted / measured - 1, max(TOLERANCE, spread_of_equals)
    return {
        "run": name, "role": "calibration" if name in CALIBRATION else "repeat" if name in BASES else "prediction",
        "quantity": quantity, "predicted": f"{predicted:.4g}", "low": f"{min(predicted, *others, predicted):.4g}",
        "high": f"{max(predicted, *others, predicted):.4g}", "measured": f"{measured:.4g}", "error": round(error, 4),
        "tolerance": round(tolerance, 4), "spread": round(spread_of_equals, 4), "within": abs(error) <= tolerance,
    }  # fmt: skip


def cost_rows(costs: Measured) -> list[dict[str, str]]:
    """The fields of `Measured`, one a row."""
    flat: dict[str, float] = {}
    for name, value in vars(costs).items():
        flat |= {f"{name}.{part}": s for part, s in value._asdict().items()} if isinstance(value, Passes) else {name: value}
    return [{"cost": name, "seconds": f"{seconds:.4g}"} for name, seconds in flat.items()]


def rows_of(measured: Mapping[str, Means], by_costs: Sequence[Mapping[str, Means]]) -> list[dict[str, Any]]:
    """Seconds per step of every run, with their two parts, then the ratios of T-PPO to PPO.

    by_costs   predictions from the costs of the first base run, then those from its repeats'
    """
    rows = []
    for name in measured:
        for quantity in ("step_s", "rollout_s", "training_s"):
            equals = spread([getattr(measured[base], quantity) for base in BASES])
            first, *others = (getattr(predicted[name], quantity) for predicted in by_costs)
            rows.append(compare(name, quantity, first, getattr(measured[name], quantity), equals, others))
    for ours, ppo in RATIOS:
        for quantity in ("step_s", "tokens_per_s"):
            equals = spread([getattr(measured[base], quantity) for base in BASES])
            real, clock, *others = (getattr(m[ours], quantity) / getattr(m[ppo], quantity) for m in (measured, *by_costs))
            rows.append(compare(f"{ours} / {ppo}", quantity, clock, real, equals, others))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--out", type=Path, default=Path("runs/reality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # as the runs have: the tables say so
    begin = time.monotonic()
    folders = {}
    for setting in SETTINGS:
        print(f"{setting.name} ({time.monotonic() - begin:.0f} s)", flush=True)
        folders[setting.name] = make_run(setting, arguments.share, arguments.out)
    costs, *others = (Measured.from_run(folders[base], folders[CALIBRATION[1]]) for base in BASES)
    report("reality-costs", cost_rows(costs), arguments.results / "reality-costs.csv")
    measured = {name: measured_means(folder) for name, folder in folders.items()}
    by_costs = [{name: predicted_means(folder, one) for name, folder in folders.items()} for one in (costs, *others)]
    rows = rows_of(measured, by_costs)
    report("reality", rows, arguments.results / "reality.csv")
    print(f"{sum(not row['within'] for row in rows)} of {len(rows)} predictions miss; {time.monotonic() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
