"""The headline, fairer: PPO with every lever that applies to it and at its own best settings, against tppo-once at its own.

    python -m benchmarks.fair_headline --choose                  what tppo-once is: candidates at equal CPU seconds
    python -m benchmarks.fair_headline --task chain [--seeds 12] tunes both methods, then measures
    python -m benchmarks.fair_headline --report [--task chain fork length]     the tables of the committed runs, nothing is run

Plan, verdicts and stopping rule: prestated/2026-11-21-fair-headline.md, and for maze and brackets 2026-11-22-headline-new-tasks.md,
each written before its first run.

    clock      CPU seconds of one process and one thread, evaluation excluded: other work on the machine hardly changes them
    tuning     the same number of runs for each method and task, half as long, on a seed that the headline does not use: a grid of
               learning rate x what a step holds, and four changes of its best cell
    accuracy   between evaluations on straight lines, then the mean over SPAN of the budget, centred, on a grid of seconds
    target     0.95 of the best of PPO's means, averaged over seeds; to it: CPU seconds, generated and trained tokens
    ratio      PPO / method, seed by seed: geometric mean and 95 % Student-t interval of logarithms, over the seeds in which both
               arrive; how many do stands beside it, and where they are not all, no verdict
    area       mean accuracy over the budget, method - PPO, seed by seed, with its t-interval

Each run's evaluations go to results/fair-headline-runs.csv when it ends, and the same command goes on where it was stopped.
Keeps fair-headline-<task>.csv, a row per method, seed and quantity, and fair-headline-choice.csv, a row per candidate and task.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.arrivals import Curve, Fields, area, curve, rows_of, token_area
from benchmarks.common import RESULTS, report, whole_rows
from benchmarks.equal_tokens import SHARED, append, prepare, quiet
from benchmarks.paired import verdict
from tppo_ref.method.errors import UserError, refusal
from tppo_ref.runs.build import build, make_task
from tppo_ref.runs.comparison import mean_interval
from tppo_ref.runs.config import Config, apply_method
from tppo_ref.runs.exits import exit_code
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.session import Session
from tppo_ref.runs.sinks import read_metrics
from tppo_ref.runs.warmstart import tiny_policy_config

TASKS = ("chain", "fork", "length", "maze", "brackets")
BUDGETS_S = {"chain": 20.0, "fork": 14.0, "length": 8.0, "maze": 20.0, "brackets": 20.0}  # CPU seconds of a run; of tuning, half
CHOICE_S = {"chain": 10.0, "fork": 10.0, "length": 6.0}  # the choice was made before the other two tasks were there
EVAL_EVERY_S = {"chain": 2.0, "fork": 1.5, "length": 1.0, "maze": 2.0, "brackets": 2.0}  # CPU seconds
EVAL_PROMPTS = 256

ENGINE, FILLED = {"policy.old_logprobs": "engine"}, {"policy.min_new_tokens": 64}  # as many as a window holds
CANDIDATES: dict[str, Fields] = {  # of the name tppo-once; the first, the paper's method, is what they are held against
    "tppo": {},
    "c": ENGINE,
    "cf": ENGINE | FILLED,
    "ac": ENGINE | {"policy.prefix": "constant"},
}
CHOICE_CELL: Fields = {"rollout.slots": 128, "policy.lr": 6e-4, "model.value": "small"}
CHOICE_SEEDS, TUNING_SEED = (200, 201), 100  # the headline uses 0 to --seeds less 1

# A step holds 128 x 64 tokens, and half and twice as many; PPO's responses are 20 to 30 tokens long on average.
HOLDS: dict[str, list[Fields]] = {
    "ppo": [{"rollout.slots": 128, "rollout.responses_per_step": batch} for batch in (128, 256, 512)],
    "tppo-once": [{"rollout.slots": slots, "rollout.window": 64} for slots in (64, 128, 256)],
}
LEARNING_RATES, UPDATE_TOKENS = (3e-4, 6e-4), 500


# ---------------------------------------------------------------------------------------------------------------- what is run


class Job(NamedTuple):
    """One run: `arm` is "ppo" or a T-PPO, `cell` the JSON of all fields in which it differs from its method's defaults."""

    stage: str
    task: str
    arm: str
    cell: str
    seed: int
    budget_s: float


Runs = Callable[[Job], Curve]


def grid(arm: str, levers: Fields) -> list[Fields]:
    """What a step holds x learning rate; as many cells for each method."""
    return [
        levers | hold | {"policy.lr": lr, "model.value": "small"} | update_tokens(arm, UPDATE_TOKENS)
        for hold, lr in itertools.product(HOLDS[arm], LEARNING_RATES)
    ]


def update_tokens(arm: str, tokens: int) -> Fields:
    """Tokens per optimiser step; a joint value model (PPO's) trains in the policy's mini-batches."""
    return {"policy.mini_batch_tokens": tokens} | ({} if arm == "ppo" else {"value.mini_batch_tokens": tokens})


def variants(arm: str, cell: Fields) -> list[Fields]:
    """Four changes of the grid's best cell: the full critic, smaller and larger updates, a higher learning rate."""
    changes: list[Fields] = [{"model.value": "full"}, update_tokens(arm, 250), update_tokens(arm, 1000),
                             {"policy.lr": round(cell["policy.lr"] * 5 / 3, 6)}]  # fmt: skip
    return [cell | change for change in changes]


def tune(task: str, arm: str, levers: Fields, runs: Runs) -> Fields:
    """The arm's best cell by area, on one seed: of the grid, and of the variants of the grid's best."""
    budget_s = BUDGETS_S[task] / 2

    def score(cell: Fields) -> tuple[float, Fields]:
        return area(runs(Job("tune", task, arm, json.dumps(cell), TUNING_SEED, budget_s)), budget_s), cell

    scored = [score(cell) for cell in grid(arm, levers)]
    scored += [score(cell) for cell in variants(arm, max(scored, key=lambda x: x[0])[1])]
    return max(scored, key=lambda x: x[0])[1]


def measure(job: Job, shared: Mapping[str, Any], critics: Mapping[str, str]) -> list[Fields]:
    """Make the run: a row per evaluation."""
    cell = json.loads(job.cell)
    cell["model.value"] = critics[cell["model.value"]]
    config = apply_method(replace_fields(Config(), shared), "ppo" if job.arm == "ppo" else "tppo", strict=False)
    own = {"run.seed": job.seed, "run.clock": "cpu", "run.train_seconds": job.budget_s, "run.checkpoint_every": 0,
           "run.eval_every_s": EVAL_EVERY_S[job.task], "run.eval_prompts": EVAL_PROMPTS}  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        with contextlib.closing(Session(build(replace_fields(config, {**cell, **own, "run.out": out})))) as session:
            session.train()
        records = read_metrics(Path(out) / "metrics.jsonl")
    steps = {r["step"]: r for r in records if "time/step_s" in r}
    evaluations = [r for r in records if "eval/accuracy" in r]
    if sum(r["eval/verify_failures"] for r in evaluations) + sum(r["verify/timeouts"] + r["verify/errors"] for r in steps.values()):
        raise RuntimeError(f"{job}: verifications failed: the run would depend on the machine, not on the arm")
    tokens = {0: (0, 0)} | {step: (int(r["ledger/generated"]), int(r["ledger/trained"])) for step, r in steps.items()}
    return [
        job._asdict() | dict(zip(Curve._fields, (round(r["time/train_s"], 3), r["eval/accuracy"], *tokens[r["step"]]), strict=True))
        for r in evaluations
    ]


class Book:
    """The runs of a CSV: asked for one, it reads it there, or makes it and adds it when it is whole."""

    def __init__(self, path: Path, cache: str | None):
        """cache: where base models and critics are kept; None: nothing is run, and what is not there is a KeyError."""
        self.path, self.cache = path, cache
        self.curves: dict[Job, Curve] = {}
        self.prepared: dict[str, tuple[Fields, dict[str, str]]] = {}
        for key, rows in itertools.groupby(whole_rows(path), key=lambda r: tuple(r[name] for name in Job._fields)):
            stage, task, arm, cell, seed, budget = key
            self.curves[Job(stage, task, arm, cell, int(seed), float(budget))] = curve(list(rows))

    def __call__(self, job: Job) -> Curve:
        if job not in self.curves:
            if self.cache is None:
                raise KeyError(job)
            if job.task not in self.prepared:
                self.prepared[job.task] = self.prepare(job.task)
            rows = measure(job, *self.prepared[job.task])
            append(self.path, rows, list(rows[0]))
            self.curves[job] = curve(rows)
            print(
                f"{job.stage} {job.task} {job.arm} seed {job.seed}: area {area(self.curves[job], job.budget_s):.4f} {job.cell}",
                flush=True,
            )
        return self.curves[job]

    def prepare(self, task: str) -> tuple[Fields, dict[str, str]]:
        """What all runs of a task share, and the two critics."""
        assert self.cache is not None
        fields = prepare(task, {"run.cache": self.cache, **SHARED})[0]
        return fields, {
            "full": fields.pop("model.value"),
            "small": small_critic(task, Path(self.cache) / f"small-{task}", self.cache),
        }


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


# ------------------------------------------------------------------------------------------------------------------- the stages


def choice_jobs() -> list[Job]:
    """Seeds outermost: a run that is stopped leaves whole pairs."""
    return [
        Job("choose", task, name, json.dumps(levers | CHOICE_CELL), seed, CHOICE_S[task])
        for seed, task, (name, levers) in itertools.product(CHOICE_SEEDS, CHOICE_S, CANDIDATES.items())
    ]


def choice(runs: Runs) -> list[Fields]:
    """A row per score, task ("all": their mean) and candidate, over the seeds that are whole: the area, and its difference to the
    paper's. Scores: over equal CPU seconds, which decides, and over equal generated tokens, as many as all candidates have."""
    curves: dict[tuple[str, str, int], Curve] = {}
    for job in choice_jobs():
        with contextlib.suppress(KeyError):
            curves[job.arm, job.task, job.seed] = runs(job)
    seeds = [s for s in CHOICE_SEEDS if all((arm, task, s) in curves for arm in CANDIDATES for task in CHOICE_S)]
    if not seeds:
        raise UserError(refusal("--results", "no whole seed of the candidates", "at least one", "run with --choose first"))
    tokens = {(t, s): min(curves[arm, t, s].generated[-1] for arm in CANDIDATES) for t in CHOICE_S for s in seeds}

    def areas(score: str, arm: str, of: Sequence[str]) -> list[float]:
        """Of each seed the mean over tasks."""

        def one(t: str, s: int) -> float:
            run = curves[arm, t, s]
            return area(run, CHOICE_S[t]) if score == "seconds" else token_area(run, tokens[t, s])

        return [float(np.mean([one(t, s) for t in of])) for s in seeds]

    rows = []
    for score, task, arm in itertools.product(("seconds", "tokens"), (*CHOICE_S, "all"), CANDIDATES):
        mine, base = (areas(score, a, CHOICE_S if task == "all" else (task,)) for a in (arm, "tppo"))
        difference, low, high = mean_interval([a - b for a, b in zip(mine, base, strict=True)])
        rows.append({"score": score, "task": task, "candidate": arm, "seeds": len(seeds), "area": float(np.mean(mine)),
                     "difference": difference, "low": low, "high": high,
                     "verdict": "the reference" if arm == "tppo" else verdict(low, high)})  # fmt: skip
    return rows


def chosen(rows: Sequence[Mapping[str, Any]]) -> str:
    """The candidate with the largest mean area over tasks at equal CPU seconds."""
    rows = [r for r in rows if (r["score"], r["task"]) == ("seconds", "all") and r["candidate"] != "tppo"]
    return str(max(rows, key=lambda r: float(r["area"]))["candidate"])


def headline(task: str, levers: Mapping[str, Fields], seeds: Sequence[int], runs: Runs) -> list[Fields]:
    """Tune each arm, then measure it; seeds outermost. Seeds that lack an arm's run are left out; UserError where not two stay."""
    try:
        cells = {arm: json.dumps(tune(task, arm, own, runs)) for arm, own in levers.items()}
    except KeyError:
        raise UserError(refusal("--task", f"{task}, which is not tuned", "one that is", "leave --report out")) from None
    curves: dict[str, dict[int, Curve]] = {arm: {} for arm in cells}
    for seed, (arm, cell) in itertools.product(seeds, cells.items()):
        with contextlib.suppress(KeyError):
            curves[arm][seed] = runs(Job("headline", task, arm, cell, seed, BUDGETS_S[task]))
    whole = [seed for seed in seeds if all(seed in own for own in curves.values())]
    if len(whole) < 2:
        raise UserError(refusal("--task", f"{task} with {len(whole)} whole seeds", "at least 2", "give more --seeds"))
    rows = rows_of({arm: {seed: own[seed] for seed in whole} for arm, own in curves.items()}, BUDGETS_S[task])
    return [{"task": task} | row | {"cell": cells[row["arm"]]} for row in rows]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--choose", action="store_true", help="run the candidates of tppo-once")
    parser.add_argument("--task", nargs="+", default=[], choices=TASKS, help="tune and measure these")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--report", action="store_true", help="run nothing: the tables of the runs that are there")
    parser.add_argument("--cache", default="runs/cache", help="folder of base models and pre-trained critics")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    return exit_code(lambda: make(arguments))


def make(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    quiet()
    runs = Book(arguments.results / "fair-headline-runs.csv", None if arguments.report else arguments.cache)
    if arguments.choose or arguments.report:
        report("fair-headline-choice", choice(runs), arguments.results / "fair-headline-choice.csv")
    levers = {"ppo": ENGINE, "tppo-once": CANDIDATES[chosen(choice(runs))]} if arguments.task else {}
    for task in arguments.task:
        rows = headline(task, levers, range(arguments.seeds), runs)
        report(f"fair-headline-{task}", rows, arguments.results / f"fair-headline-{task}.csv")


if __name__ == "__main__":
    sys.exit(main())
