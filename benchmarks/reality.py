"""The cluster clock against real runs: calibrated on the costs of one run of the CPU demo, it predicts the others.

    python -m benchmarks.reality [--rounds 30] [--alone] [--out runs/reality] [--results benchmarks/results]

Costs come from the first base run (T-PPO on the chain task, window 64, 32 slots; clock/calibrate.py) and, of training, from one
with a quarter of its tokens per update, which tells an update's own cost from that of its tokens. The other runs differ in window,
slots, task or method; what is taken from them is how long their responses were: input to the clock and no cost.

All runs are of one process, which steps them in turn, a step of each to a round: a host that is faster in one minute than in the
next is so for calibration and prediction alike. Seconds are this process's CPU seconds, one thread. The first round is left out.
`error` is the median over rounds of what is predicted of a run's step over what that step took, less 1; `predicted` and `measured`
are medians over rounds, too. The base run is there three times with one seed, equal work: `spread` is the most by which two of
these differ, as the median over rounds of their ratio.

`low` and `high` are the ends of what the costs of the base run's repeats predict, `predicted` is the first one's.
A prediction is within tolerance when its error is at most max(10 %, that spread). Ratios are of T-PPO to PPO, on the same task, in
the same round. `load` is the machine's load average over the rounds: the process itself is 1 of it. Writes results/reality.csv,
misses included, and the costs to results/reality-costs.csv. Some four minutes of a core; a run that was stopped goes on from its
latest checkpoint in --out, and whole ones are read again. For a try: --rounds 9, and --results, another folder for the tables.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from benchmarks.common import RESULTS, report
from benchmarks.equal_tokens import quiet
from sim.clock.calibrate import LEFT_OUT_STEPS, MIN_STEPS, Measured, Passes
from sim.clock.cluster import Setup
from sim.clock.distributions import Empirical, Tokens
from sim.clock.schedule import System, Windowed, run
from sim.clock.systems import Synchronous
from tppo_ref.runs.build import build
from tppo_ref.runs.checkpoint import complete_checkpoints
from tppo_ref.runs.comparison import read_table
from tppo_ref.runs.config import Config, apply_method
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.session import Session
from tppo_ref.runs.sinks import read_metrics

Array = NDArray[np.float64]

TOLERANCE = 0.10
KEPT_EVERY = 5  # rounds
COMMON = {
    "rollout.slots": 32, "run.eval_prompts": 32, "run.checkpoint_every": 0, "run.progress": False, "run.threads": 1,
    "run.clock": "cpu", "task.verifier_timeout_s": 60.0,  # so long that no busy machine is blamed
}  # fmt: skip
TPPO = {"policy.lr": 3e-4, "task.name": "chain", "rollout.window": 64}  # the demo's settings
PPO = {"policy.lr": 6e-4, "task.name": "chain"}


class Setting(NamedTuple):
    """A run to make: its name, its method, and the fields in which it is not that method on the demo's settings."""

    name: str
    method: str
    fields: Mapping[str, Any]


SETTINGS = (
    Setting("base-1", "tppo", TPPO),
    Setting("small-updates", "tppo", TPPO | {"policy.mini_batch_tokens": 125, "value.mini_batch_tokens": 125}),  # default: 500
    Setting("window-32", "tppo", TPPO | {"rollout.window": 32}),
    Setting("window-128", "tppo", TPPO | {"rollout.window": 128}),
    Setting("ppo", "ppo", PPO),
    Setting("base-2", "tppo", TPPO),
    Setting("slots-16", "tppo", TPPO | {"rollout.slots": 16}),
    Setting("refill-step", "tppo", TPPO | {"rollout.refill": "step"}),
    Setting("fork", "tppo", TPPO | {"task.name": "fork"}),
    Setting("ppo-fork", "ppo", PPO | {"task.name": "fork"}),
    Setting("base-3", "tppo", TPPO),
)
BASES = tuple(s.name for s in SETTINGS if s.name.startswith("base"))
CALIBRATION = (BASES[0], "small-updates")
RATIOS = (("base-1", "ppo"), ("fork", "ppo-fork"))


class Steps(NamedTuple):
    """Of a run, by round."""

    step_s: Array
    rollout_s: Array
    training_s: Array
    tokens: Array

    @property
    def tokens_per_s(self) -> Array:
        return self.tokens / self.step_s


# ------------------------------------------------------------------------------------------------------------------------ runs


def make_runs(settings: Sequence[Setting], rounds: int, out: Path) -> dict[str, Path]:
    """The folders of finished runs, stepped in turn. `out`/load.txt has the machine's load in each round."""
    folders, marker = {s.name: out / s.name for s in settings}, out / "settings.json"
    asked = json.dumps([rounds, COMMON, settings])
    if out.exists() and (not marker.exists() or marker.read_text() != asked):
        raise SystemExit(f"--out: {out} holds something else than these runs; remove it, or choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    marker.write_text(asked)
    if all(complete_checkpoints(folder / "checkpoints")[-1:] == [folder / "checkpoints" / f"step-{rounds:08d}"]
           for folder in folders.values()):  # fmt: skip
        return folders
    with contextlib.ExitStack() as stack:
        sessions = []
        for name, method, fields in settings:
            changed = {**COMMON, **fields, "run.steps": rounds, "run.out": str(folders[name])}
            changed["run.resume"] = bool(complete_checkpoints(folders[name] / "checkpoints"))
            if not changed["run.resume"]:
                shutil.rmtree(folders[name], ignore_errors=True)
            config = replace_fields(apply_method(Config(), method), changed)
            sessions.append(stack.enter_context(contextlib.closing(Session(build(config)))))
        for number in tqdm(range(1, rounds + 1), "reality", unit="round"):
            behind = [session for session in sessions if session.trainer.num_steps < number]
            for session in behind:
                session.step()
            for session in behind if number % KEPT_EVERY == 0 or number == rounds else ():
                session.evaluate()  # its batch shrinks, which tells a step's cost from a row's
                session.save()
            if behind:
                with (out / "load.txt").open("a") as file:
                    file.write(f"{os.getloadavg()[0]:.2f}\n")
        for session in sessions:
            session.parts.checkpointer.finish()
    return folders


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [r for r in read_metrics(folder / "metrics.jsonl") if "rollout/tokens" in r]


def measured_steps(folder: Path) -> Steps:
    used = steps_of(folder)[LEFT_OUT_STEPS:]
    return Steps(
        step_s=np.array([r["time/step_s"] for r in used]), rollout_s=np.array([r["time/rollout_s"] for r in used]),
        training_s=np.array([r["time/forward_s"] + r["time/policy_s"] + r["time/value_s"] for r in used]),
        tokens=np.array([r["rollout/tokens"] for r in used]),
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


def predicted_steps(folder: Path, costs: Measured) -> Steps:
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
    return Steps(
        step_s=np.array([r.step_s for r in used]), rollout_s=np.array([r.rollout_s for r in used]),
        training_s=np.array([r.logprob_s + r.value_forward_s + r.policy_train_s + r.value_train_s for r in used]),
        tokens=np.array([r.generated for r in used]),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------------ comparison


def middle_ratio(above: Array, below: Array) -> float:
    """Median over rounds of the ratio within a round."""
    return float(np.median(above / below))


def spread(equals: Sequence[Array]) -> float:
    """The most by which two of several runs of equal work differ."""
    return max(abs(middle_ratio(a, b) - 1) for a, b in itertools.permutations(equals, 2))


def compare(
    name: str, quantity: str, predicted: Array, measured: Array, spread_of_equals: float, others: Sequence[Array] = ()
) -> dict[str, Any]:
    """A row. `others`: predictions from the costs of the base run's repeats; the range is over them."""
    error, tolerance = middle_ratio(predicted, measured) - 1, max(TOLERANCE, spread_of_equals)
    real, middle, *all_middles = (float(np.median(x)) for x in (measured, predicted, predicted, *others))
    return {
        "run": name, "role": "calibration" if name in CALIBRATION else "repeat" if name in BASES else "prediction",
        "quantity": quantity, "predicted": f"{middle:.4g}", "low": f"{min(all_middles):.4g}", "high": f"{max(all_middles):.4g}",
        "measured": f"{real:.4g}", "error": round(error, 4), "tolerance": round(tolerance, 4),
        "spread": round(spread_of_equals, 4), "within": abs(error) <= tolerance,
    }  # fmt: skip


def cost_rows(costs: Measured) -> list[dict[str, str]]:
    """The fields of `Measured`, one a row."""
    flat: dict[str, float] = {}
    for name, value in vars(costs).items():
        flat |= {f"{name}.{part}": s for part, s in value._asdict().items()} if isinstance(value, Passes) else {name: value}
    return [{"cost": name, "seconds": f"{seconds:.4g}"} for name, seconds in flat.items()]


def rows_of(measured: Mapping[str, Steps], by_costs: Sequence[Mapping[str, Steps]]) -> list[dict[str, Any]]:
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
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, default=Path("runs/reality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--alone", action="store_true", help="costs of the base run alone, for --results elsewhere")
    arguments = parser.parse_args()
    if arguments.rounds < LEFT_OUT_STEPS + MIN_STEPS:
        parser.error(f"--rounds: got {arguments.rounds}; expected {LEFT_OUT_STEPS + MIN_STEPS} or more, to fit costs to")
    quiet()
    torch.set_num_threads(1)  # as the runs have: the tables say so
    begin = time.monotonic()
    folders = make_runs(SETTINGS, arguments.rounds, arguments.out)
    beside = [] if arguments.alone else [folders[CALIBRATION[1]]]
    costs, *others = (Measured.from_run(folders[base], *beside) for base in BASES)
    report("reality-costs", cost_rows(costs), arguments.results / "reality-costs.csv")
    measured = {name: measured_steps(folder) for name, folder in folders.items()}
    by_costs = [{name: predicted_steps(folder, one) for name, folder in folders.items()} for one in (costs, *others)]
    load = mean(map(float, (arguments.out / "load.txt").read_text().split()))
    rows = [row | {"rounds": arguments.rounds, "load": round(load, 1)} for row in rows_of(measured, by_costs)]
    report("reality", rows, arguments.results / "reality.csv")
    asked = [row["within"] for row in rows if row["role"] == "prediction"]
    print(f"{sum(asked)} of {len(asked)} predictions within; {time.monotonic() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
