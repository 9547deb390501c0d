"""The headline, fairer: PPO with every lever that applies to it and at its own best settings, against T-PPO and tppo-once.

    python -m benchmarks.fair_headline --task chain [--clock cpu] [--critic same|small] [--seeds 12] [--seconds 60]

First each method is tuned, from the same budget: every cell of its own grid, as many as each other's, once on one seed, then its
three best again on two more. Then it runs with its best cell on seeds that tuning did not use. All methods are refilled at once,
take the engine's log-probabilities and share base model and pre-trained critic; `--critic small` gives all a critic of a quarter of
the width. The last command's runs are kept in --out, and the same command goes on where it was stopped.

    grid       learning rate x tokens per update x what a step holds: slots, and PPO's responses per step or T-PPO's window
    clock      cpu: CPU seconds of each run's process, one thread: other work on the machine hardly changes them. wall: seconds
    evaluation after every step, so that no arm waits for its mark. A run's accuracy is read between evaluations on straight lines,
               on a grid of seconds that is the same for all, as the mean over the last SPAN of the budget
    target     0.95 of the best such mean of PPO, averaged over seeds; to it: seconds, generated and trained tokens
    ratio      PPO / method, seed by seed: geometric mean and 95 % Student-t interval of logarithms, over the seeds in which both
               arrive; how many do stands beside it, and where they are not all, no verdict

Keeps fair-headline-<task>-<clock>-<critic>.csv, a row per method, seed and quantity, and the chosen cells, in results/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from benchmarks.common import RESULTS, report
from tppo_ref.runs.build import make_task
from tppo_ref.runs.comparison import Run, read_run
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.warmstart import tiny_policy_config

METHODS = ("ppo", "tppo", "tppo-once")
LEARNING_RATES, UPDATE_TOKENS = (3e-4, 6e-4), (250, 500)
WINDOWS = [{"rollout.slots": slots, "rollout.window": window} for slots, window in ((32, 64), (32, 128), (128, 64))]
BATCHES = [{"rollout.slots": slots, "rollout.responses_per_step": batch} for slots, batch in ((32, 32), (32, 128), (128, 128))]
HOLDS = {"ppo": BATCHES, "tppo": WINDOWS, "tppo-once": WINDOWS}  # what a step holds: for each method as many choices
TUNING_SEED, FINAL_SEEDS = 100, (101, 102)  # the headline uses 0 to --seeds less 1
SHARE, SPAN, GRID = 0.95, 0.1, 600  # of PPO's best; of the budget, for a mean; points over the budget
Fields = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------- what is run


def cells(method: str) -> list[Fields]:
    """The method's grid. Equal tuning budgets: every method has as many cells."""
    joint = method == "ppo"  # a joint value model trains in the policy's mini-batches
    return [
        {"policy.lr": lr, "policy.mini_batch_tokens": tokens, "policy.old_logprobs": "engine", **hold}
        | ({} if joint else {"value.mini_batch_tokens": tokens})
        for lr, tokens, hold in itertools.product(LEARNING_RATES, UPDATE_TOKENS, HOLDS[method])
    ]


def compare(
    out: Path, shared: Mapping[str, Any], per_method: Mapping[str, Fields], *, seed: int, seeds: int, seconds: float
) -> None:
    """One `tppo compare`, which keeps the runs that are complete."""
    fields = {
        **shared, "run.out": out, "run.train_seconds": seconds, "run.seed": seed, "compare.seeds": seeds,
        "compare.methods": json.dumps(list(per_method)), "compare.per_method": json.dumps(per_method), "run.timeline": "false",
        "run.eval_every_s": 0.001, "run.checkpoint_every": 0,
    }  # fmt: skip
    command = [sys.executable, "-m", "tppo_ref", "compare", *(f"--{name}={value}" for name, value in fields.items())]
    subprocess.run(command, check=True)


def tune(method: str, shared: Mapping[str, Any], out: Path, seconds: float) -> Fields:
    """The method's best cell by area: all cells on one seed, the three best on two more, the mean over three seeds decides."""
    areas: list[tuple[list[float], Fields]] = []
    for i, cell in enumerate(cells(method)):
        folder = out / f"tune-{method}-{i}"
        compare(folder, shared, {method: cell}, seed=TUNING_SEED, seeds=1, seconds=seconds)
        areas.append(([area(read_run(folder, method, TUNING_SEED), seconds)], cell))
    best = sorted(range(len(areas)), key=lambda i: -areas[i][0][0])[:3]
    for i in best:
        folder = out / f"tune-{method}-{i}-again"
        compare(folder, shared, {method: areas[i][1]}, seed=FINAL_SEEDS[0], seeds=len(FINAL_SEEDS), seconds=seconds)
        areas[i][0].extend(area(read_run(folder, method, seed), seconds) for seed in FINAL_SEEDS)
    return areas[max(best, key=lambda i: float(np.mean(areas[i][0])))][1]


def small_critic(task: str, out: Path, cache: str = "runs/cache") -> str:
    """A value model of a quarter of the base's width and a layer, pre-trained as the usual one is."""
    folder = out / "critic"
    if not (folder / "value").exists():
        folder.mkdir(parents=True, exist_ok=True)
        config = replace_fields(Config(), {"task.name": task})
        shape = tiny_policy_config(make_task(config), num_layers=1, width=config.model.hidden_size // 4, num_heads=1)
        shape.to_json_file(folder / "config.json", use_diff=False)
        fields = {"task.name": task, "model.value": folder / "config.json", "run.out": folder, "run.cache": cache}
        command = [sys.executable, "-m", "tppo_ref", "pretrain-value", *(f"--{name}={value}" for name, value in fields.items())]
        subprocess.run(command, check=True)
    return str(folder / "value")


# ------------------------------------------------------------------------------------------------------------- what came out


def smooth(run: Run, budget_s: float) -> tuple[np.ndarray, np.ndarray]:
    """(seconds, accuracy) on the common grid: straight lines between evaluations, then the mean over the last SPAN of the budget,
    of what there is where that is less."""
    seconds = np.linspace(0, budget_s, GRID + 1)
    accuracy = np.interp(seconds, run.evaluations["time/train_s"], run.accuracy)
    width = round(SPAN * GRID)
    total = np.concatenate([[0.0], np.cumsum(accuracy)])
    begin = np.maximum(np.arange(GRID + 1) - width, 0)
    return seconds, (total[1:] - total[begin]) / (np.arange(GRID + 1) - begin + 1)


def area(run: Run, budget_s: float) -> float:
    """Mean accuracy over the budget."""
    seconds = np.linspace(0, budget_s, GRID + 1)
    return float(np.trapezoid(np.interp(seconds, run.evaluations["time/train_s"], run.accuracy), seconds) / budget_s)


class Arrival(NamedTuple):
    """What it took to the target; infinite where a seed never arrives."""

    seconds: float
    generated_tokens: float
    trained_tokens: float


def arrival(run: Run, target: float, budget_s: float) -> Arrival:
    """The first point of the grid from a whole span on at which the mean is at least the target."""
    seconds, means = smooth(run, budget_s)
    reached = np.flatnonzero((means >= target - 1e-12) & (seconds >= SPAN * budget_s))
    if not len(reached):
        return Arrival(math.inf, math.inf, math.inf)
    at = float(seconds[reached[0]])
    clock = np.concatenate([[0.0], run.steps["time/train_s"]])
    tokens = (np.concatenate([[0.0], run.steps[f"ledger/{name}"]]) for name in ("generated", "trained"))
    return Arrival(at, *(float(np.interp(at, clock, x)) for x in tokens))


def ratio(first: Sequence[float], other: Sequence[float]) -> Fields:
    """first / other seed by seed, where both arrive: geometric mean, 95 % Student-t interval of logarithms, verdict."""
    pairs = [(a, b) for a, b in zip(first, other, strict=True) if math.isfinite(a) and math.isfinite(b)]
    logs = np.log([a / b for a, b in pairs])
    n = len(logs)
    middle = float(logs.mean()) if n else math.nan
    half = float(stats.t.ppf(0.975, n - 1) * logs.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    low, high = math.exp(middle - half), math.exp(middle + half)
    word = "not all arrive" if n < len(first) else "better" if low > 1 else "worse" if high < 1 else "undecided"
    return {"value": math.exp(middle), "low": low, "high": high, "reached": n, "verdict": word}


def rows_of(runs: Mapping[str, Sequence[Run]], budget_s: float) -> list[Fields]:
    """A row per method and quantity with its interval, and one per seed."""
    first = next(iter(runs))
    target = SHARE * float(np.mean([smooth(run, budget_s)[1] for run in runs[first]], axis=0)[round(SPAN * GRID) :].max())
    arrivals = {method: [arrival(run, target, budget_s) for run in group] for method, group in runs.items()}
    rows: list[Fields] = []
    for method, name in itertools.product(runs, Arrival._fields):
        mine, base = ([getattr(a, name) for a in arrivals[m]] for m in (method, first))
        rows += [{"method": method, "quantity": name, "seed": run.seed, "value": x, "low": "", "high": "", "reached": "",
                  "verdict": ""} for run, x in zip(runs[method], mine, strict=True)]  # fmt: skip
        if method != first:
            rows.append({"method": method, "quantity": f"{name}: {first} / {method}", "seed": "all"} | ratio(base, mine))
    return [row | {"target": round(target, 4), "budget_s": budget_s} for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="chain", choices=("chain", "fork", "length"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, help="the first is the baseline")
    parser.add_argument("--clock", default="cpu", choices=("cpu", "wall"))
    parser.add_argument("--critic", default="same", choices=("same", "small"))
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=60.0, help="of a run; tuning runs have half of it")
    parser.add_argument("--untuned", action="store_true", help="a trial: each method runs with the first cell of its grid")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--eval-prompts", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("runs/fair-headline"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    out = arguments.out / f"{arguments.task}-{arguments.clock}-{arguments.critic}"
    shared: Fields = {"task.name": arguments.task, "run.clock": arguments.clock, "compare.jobs": arguments.jobs,
                      "run.eval_prompts": arguments.eval_prompts}  # fmt: skip
    if arguments.critic == "small":
        shared["model.value"] = small_critic(arguments.task, out)
    chosen = {
        method: cells(method)[0] if arguments.untuned else tune(method, shared, out, arguments.seconds / 2)
        for method in arguments.methods
    }
    compare(out / "headline", shared, chosen, seed=0, seeds=arguments.seeds, seconds=arguments.seconds)
    runs = {m: [read_run(out / "headline", m, seed) for seed in range(arguments.seeds)] for m in arguments.methods}
    rows = [row | {"cell": json.dumps(chosen[row["method"]])} for row in rows_of(runs, arguments.seconds)]
    name = f"fair-headline-{out.name}"
    report(name, rows, arguments.results / f"{name}.csv")
    return 0


if __name__ == "__main__":
    sys.exit(main())
