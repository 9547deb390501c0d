"""A study of runs on text whose plan was stated before its first run: its table, and the command that makes it.

Study       what a plan in prestated/ says
table       a row per contrast: difference, interval, verdict
command     make the runs that are missing, say how long that takes, print the table
commands    the same of several studies, one after the other

Runs and scores are those of benchmarks/equal_tokens.py. Seeds are outermost, so what is there is balanced at any time and the same
command goes on where it was stopped. Until all seeds are there no verdict is given, only "not yet".
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from benchmarks import workers
from benchmarks.critic_batches import contrast
from benchmarks.equal_tokens import BUDGET, KEY, SHARED, Arm, Job, Row, Score, Wanted, plan, read_whole, scores
from tppo_ref.runs.exits import exit_code

Weights = Mapping[str, float]
"""Arm -> its weight in a contrast; 0 for an arm that is not there."""


class Study(NamedTuple):
    """A plan.

    plan        its file in prestated/
    contrasts   name -> weights of arms; each is of the mean over tasks, seed by seed; the first is primary
    models      arm -> the fields that decide which base model and critic it begins with
    bases       seeds of base model and critic. Of several, each arm begins with each of them, and a contrast is over bases: their
                means over seeds, since seeds of one base share it
    first_seed  of `seeds` that follow each other
    run_s       CPU seconds of a run, as the plan guessed them
    """

    plan: str
    path: Path
    tasks: Sequence[str]
    arms: Mapping[str, Arm]
    contrasts: Mapping[str, Weights]
    seeds: int
    models: Mapping[str, Mapping[str, Any]] = {}
    bases: Sequence[int] = (0,)
    first_seed: int = 0
    budget: int = BUDGET
    run_s: float = 12.0
    score: str = "area"

    def names(self, arm: str) -> list[str]:
        """The arm's names in the table, one per base model."""
        return [arm] if len(self.bases) == 1 else [f"{arm}@{base}" for base in self.bases]


def whole_seeds(study: Study, rows: Sequence[Row]) -> tuple[list[int], dict[tuple[str, str, int], Score]]:
    """The seeds that lack no run, and the scores of all runs by task, arm and seed."""
    found = scores(rows, study.budget)
    names = [name for arm in study.arms for name in study.names(arm)]
    seeds = sorted({seed for _, _, seed in found})
    return [s for s in seeds if all((t, a, s) in found for t, a in itertools.product(study.tasks, names))], found


def table(study: Study, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A row per contrast over the whole seeds, intervals shared by all (Bonferroni); `n` counts seeds, or base models of several;
    what `two_levels` says of several."""
    seeds, found = whole_seeds(study, rows)
    out = []
    for what, weights in study.contrasts.items() if seeds else ():
        weighted = [list(zip(study.names(arm), itertools.repeat(weight))) for arm, weight in weights.items()]
        of_base = np.array([
            [sum(w * np.mean([getattr(found[t, name, s], study.score) for t in study.tasks]) for name, w in parts) for s in seeds]
            for parts in zip(*weighted, strict=True)
        ])  # fmt: skip
        several, level = len(study.bases) > 1, 1 - 0.05 / len(study.contrasts)
        numbers = contrast([float(x) for x in (of_base.mean(axis=1) if several else of_base[0])], level)
        early = {"verdict": "not yet"} if len(seeds) < study.seeds else {}
        more = two_levels(of_base, level) if several else {}
        out.append({"contrast": what, "seeds": len(seeds)} | more | numbers | early)
    return out


def two_levels(of_base: np.ndarray, level: float) -> dict[str, float]:
    """Of a balanced two-level design, [base, seed]; NaN of one seed.

    between                deviation between base models that seeds do not explain: variance of the means, less the share of it that
                           is seeds; 0 where nothing is left. (Method of moments; equal to REML where it is above 0)
    between_high           its upper limit, one-sided 95 %: chi squared of the means' variance, less the same share
    seeds_low, seeds_high  the interval of the difference if bases did not differ at all, from the deviation of seeds alone: wider
                           than the other where the means happen to lie closer to each other than seeds let expect
    """
    bases, num = of_base.shape
    within = float(of_base.var(axis=1, ddof=1).mean()) / num if num > 1 else math.nan
    means, free = float(of_base.mean(axis=1).var(ddof=1)), bases - 1
    highest = means * free / float(scipy.stats.chi2.ppf(0.05, free))
    half = float(scipy.stats.t.ppf((1 + level) / 2, bases * (num - 1))) * math.sqrt(within / bases) if num > 1 else math.nan
    return {
        "between": math.sqrt(max(means - within, 0.0)), "between_high": math.sqrt(max(highest - within, 0.0)),
        "seeds_low": float(of_base.mean()) - half, "seeds_high": float(of_base.mean()) + half,
    }  # fmt: skip


def told(study: Study, row: Mapping[str, Any]) -> str:
    """A row of the table: difference, interval, verdict."""
    several = len(study.bases) > 1
    seeds = f"{row['seeds']} of {study.seeds} seeds" if row["verdict"] == "not yet" else f"{row['seeds']} seeds"
    over = f" on each of {row['n']} base models" if several else ""
    needed = (
        f", {row['seeds_needed']} {'base models' if several else 'seeds'} would decide" if row["verdict"] == "undecided" else ""
    )
    verdict = "equal within 0.005" if row["verdict"] == "equal" else row["verdict"]
    middle, low, high = (format(round(row[name], 4) + 0.0, "+.4f") for name in ("difference", "low", "high"))  # no -0.0000
    interval = f" [{low}, {high}]" if row["n"] > 1 else ""
    return f"{middle}{interval}, {verdict}, {seeds}{over}{needed}"


def options(doc: str | None) -> argparse.ArgumentParser:
    """Those of a program that makes studies; what is not said is the plan's."""
    made = workers.parser(doc, seeds=0, out=None)
    made.set_defaults(seeds=None, budget=None)
    return made


class Left(NamedTuple):
    """What is still to make: so many runs, and CPU seconds of each, measured on the runs that are there or guessed by the plan."""

    num: int
    run_s: float
    measured: bool

    @property
    def cpu_hours(self) -> float:
        return self.num * self.run_s / 3600


def wanted_of(study: Study, arguments: argparse.Namespace) -> list[Wanted]:
    """All runs of as many seeds as are asked for, of all its seeds where nothing is said; seeds outermost."""
    seeds = range(study.first_seed, study.first_seed + (study.seeds if arguments.seeds is None else arguments.seeds))
    shared = {"run.cache": arguments.cache, "run.eval_prompts": arguments.eval_prompts, "run.eval_samples": 4, **SHARED}
    return [
        Wanted(task, name, what, seed, {**shared, **study.models.get(arm, {}), **({"run.seed": base} if base else {})})
        for seed, (arm, what) in itertools.product(seeds, study.arms.items())
        for base, name in zip(study.bases, study.names(arm), strict=True)
        for task in study.tasks
    ]


def left(study: Study, wanted: Sequence[Wanted], rows: Sequence[Row]) -> Left:
    there = {tuple(row[name] for name in KEY) for row in rows}
    num = sum((w.task, w.arm, w.seed, study.budget) not in there for w in wanted)
    measured = [row["cpu_s"] for row in rows if row["final"] and row["budget_tokens"] == study.budget]
    return Left(num, float(np.mean(measured)) if measured else study.run_s, bool(measured))


def command(study: Study, arguments: argparse.Namespace) -> int:
    """Make what is missing and print the table; exit codes as workers.command says. A budget of one's own is a study of its own."""
    study = study._replace(budget=arguments.budget or study.budget)
    wanted = wanted_of(study, arguments)

    def missing(rows: list[Row]) -> list[Job]:
        to_make = left(study, wanted, rows)
        if to_make.num:
            known = "so far" if to_make.measured else "by the plan"
            print(
                f"{to_make.num} runs to make, {to_make.run_s:.0f} s of CPU each {known}: {to_make.cpu_hours:.1f} CPU-hours",
                flush=True,
            )
        return plan(wanted, study.budget, rows)

    def show(rows: list[Row]) -> None:
        for row in table(study, rows):
            print(f"{row['contrast']:<39} {told(study, row)}")
            if len(study.bases) > 1:
                between = "{between:.4f}, at most {between_high:.4f}; interval of seeds alone [{seeds_low:+.4f}, {seeds_high:+.4f}]"
                print(f"{'':<40}deviation between base models {between.format(**row)}")

    return workers.command(missing, arguments.out or study.path, arguments.jobs, show)


def commands(studies: Mapping[str, Study], arguments: argparse.Namespace) -> int:
    """`command` of each in turn, after a line that says how long all of them will take; `arguments.out` is a folder, None: where
    each belongs. A study of which runs failed does not stop the others; exit code 1 then, else as workers.command says."""
    folder: Path | None = arguments.out

    def each() -> int:
        placed = [s._replace(path=folder / s.path.name if folder else s.path, budget=arguments.budget or s.budget)
                  for s in studies.values()]  # fmt: skip
        for study in placed:
            workers.check_file(study.path)
        to_make = [left(study, wanted_of(study, arguments), read_whole(study.path)[0]) for study in placed]
        if num := sum(one.num for one in to_make):
            hours = sum(one.cpu_hours for one in to_make)
            print(f"{num} runs to make in {sum(one.num > 0 for one in to_make)} of {len(studies)} studies: {hours:.1f} CPU-hours, "
                  f"about {hours / arguments.jobs:.1f} hours with --jobs {arguments.jobs}", flush=True)  # fmt: skip
        worst = 0
        for name, study in zip(studies, placed, strict=True):
            print(f"\n{name}: {study.plan}", flush=True)
            code = command(study, argparse.Namespace(**vars(arguments) | {"out": study.path}))
            if code not in (0, 1):
                return code
            worst = max(worst, code)
        return worst

    return exit_code(each)
