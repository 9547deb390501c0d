"""Runs at the same number of generated tokens: one run, its rows, the table that keeps them whole, and its two scores.

Job         a run: task, arm, seed, budget in generated tokens, so a busy machine makes it later, not different
prepare     base model and pre-trained critic that all runs of a task start from, made once and cached
plan        the jobs whose runs are not there yet
run_one     the run's rows: an evaluation at the start and after each third of the budget
append, read_whole, keep_whole    a CSV to which whole runs are added; what a kill left half is taken out
Score       area: mean accuracy over the tokens from 0 to the budget; final: mean accuracy at the last two of three marks.
            Between evaluations, accuracy is interpolated to the mark
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import late_fork
from tppo_ref.method.errors import UserError, refusal
from tppo_ref.runs.config import Config, apply_method
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.sinks import read_metrics

TASKS = ("chain", "fork", "length")
NUM_MARKS = 3  # evaluations after the start, evenly over the budget
NUM_LAST = 2  # of them in "final"
BUDGET = 30_720  # 3 marks of 10,240 tokens: with 32 slots, windows of 16, 32, 64 and 320 tokens end at each of them
SHARED = {"run.progress": False, "run.timeline": False, "task.verifier_timeout_s": 60.0}  # so long that no busy machine is blamed
KEY = ("task", "arm", "seed", "budget_tokens")
COLUMNS = (*KEY, "mark", "generated_tokens", "trained_tokens", "prefix_tokens", "decode_steps", "steps", "accuracy", "length_mean",
           "explained_variance", "cut_share", "cpu_s", "final", "settings")  # fmt: skip
TEXTS, FRACTIONS = ("task", "arm", "settings"), ("accuracy", "length_mean", "explained_variance", "cut_share", "cpu_s")
LATER = {"advantage.estimator": "egae", "rollout.kv_cache": "auto"}
"""Fields that came after runs were made, each at what these did without it: there it leaves a run's settings what they were."""
Row = dict[str, Any]


class Arm(NamedTuple):
    """A named method, and the fields in which the arm differs from it."""

    method: str = "tppo"
    fields: Mapping[str, Any] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One run of `what` under the name `arm`.

    `fields` are those that all arms of the task share, `start` is the evaluation of the model they start from.
    """

    task: str
    arm: str
    what: Arm
    seed: int
    budget_tokens: int
    fields: Mapping[str, Any]
    start: Mapping[str, float]

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.task, self.arm, self.seed, self.budget_tokens

    def config(self, out: str = "") -> Config:
        config = apply_method(replace_fields(Config(), self.fields), self.what.method, strict=False)
        return replace_fields(config, {**self.what.fields, "run.seed": self.seed, "run.out": out})

    def settings(self) -> str:
        """A hash of what decides the run's numbers; folders count by what they hold: the base model's name has its own hash."""
        config = self.config()
        critic = "cold" if config.model.value is None else "pre-trained"
        config = replace_fields(config, {"model.policy": Path(config.model.policy or "").name, "model.value": critic})
        sections = {name: fields for name, fields in dataclasses.asdict(config).items() if name not in ("run", "compare")}
        for path, before in LATER.items():
            section, name = path.split(".")
            if sections[section].get(name) == before:
                del sections[section][name]
        text = json.dumps([sections, config.run.eval_prompts, config.run.eval_samples], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def row(self, mark: int, **numbers: float) -> Row:
        key = dict(zip(KEY, self.key, strict=True))
        rest = {"mark": mark, "final": int(mark == NUM_MARKS), "settings": self.settings()}
        row = {name: 0.0 if name in FRACTIONS else 0 for name in COLUMNS} | key | rest | numbers
        return {name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()}


@late_fork.known()
def run_one(job: Job) -> list[Row]:
    """The rows of a run: the start, and an evaluation at the first step's end at or after each mark.

    explained_variance and cut_share are means over the steps since the row before (NaN where no step has one); prefix_tokens and
    decode_steps, sums over the run, stand for what training and decoding cost on a machine of one's own; cpu_s holds everything.
    """
    from tppo_ref.runs.build import build
    from tppo_ref.runs.session import Session

    begin_s, nan = time.process_time(), math.nan
    rows = [job.row(0, accuracy=job.start["eval/accuracy"], length_mean=job.start["eval/length_mean"], explained_variance=nan,
                    cut_share=nan)]  # fmt: skip
    with tempfile.TemporaryDirectory() as out, contextlib.closing(Session(build(job.config(out)))) as session:
        trainer, totals = session.trainer, {"decode_steps": 0, "prefix_tokens": 0}
        for mark in range(1, NUM_MARKS + 1):
            explained, cut = [], []
            while trainer.batcher.num_generated_tokens < job.budget_tokens * mark / NUM_MARKS:
                metrics = trainer.step()
                totals["decode_steps"] += int(metrics["rollout/decode_steps"])
                totals["prefix_tokens"] += int(metrics["policy/prefix_tokens"])
                explained.append(metrics["value/explained_variance"])
                cut.append(metrics["response/cut_share"])
            session.evaluate()
            evaluation = read_metrics(Path(out) / "metrics.jsonl")[-1]
            if failures := evaluation["eval/verify_failures"] + metrics["verify/timeouts"] + metrics["verify/errors"]:
                raise RuntimeError(f"{failures:.0f} verifications failed: the run would depend on the machine, not on the arm")
            rows.append(job.row(
                mark, generated_tokens=trainer.batcher.num_generated_tokens, trained_tokens=trainer.ledger.tokens["trained"],
                steps=trainer.num_steps, accuracy=evaluation["eval/accuracy"], length_mean=evaluation["eval/length_mean"],
                explained_variance=mean(explained), cut_share=mean(cut), cpu_s=round(time.process_time() - begin_s, 1), **totals,
            ))  # fmt: skip
    return rows


def mean(numbers: Sequence[float]) -> float:
    """Mean of the numbers that are finite; NaN where none is."""
    finite = [x for x in numbers if math.isfinite(x)]
    return sum(finite) / len(finite) if finite else math.nan


@late_fork.known()
def prepare(task_name: str, fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """Base model and pre-trained critic of a task, made once and cached: (the fields of all its runs, the base's evaluation).

    run.seed, where `fields` hold it, is the seed of both.
    """
    from tppo_ref.runs.build import TaskScorer, base_config, build, make_task
    from tppo_ref.runs.session import Session
    from tppo_ref.runs.value_cache import cached_value
    from tppo_ref.runs.warmstart import warm_start

    fields = {**fields, "task.name": task_name}
    config = replace_fields(Config(), fields)
    task, size = make_task(config), config.model
    base = warm_start(task, base_config(config, task), seed=config.run.seed, steps=size.warm_start_steps, lr=size.warm_start_lr,
                      cache_dir=config.run.cache, progress=config.run.progress)  # fmt: skip
    fields["model.policy"] = str(base)
    with contextlib.closing(TaskScorer(task, config.task)) as scorer:
        fields["model.value"] = str(cached_value(replace_fields(Config(), fields), task, scorer.verifier))
    with tempfile.TemporaryDirectory() as out:
        config = replace_fields(Config(), {**fields, "run.out": out})
        with contextlib.closing(Session(build(config))) as session:
            session.evaluate()
        return fields, read_metrics(Path(out) / "metrics.jsonl")[-1]


class Wanted(NamedTuple):
    """A run that is asked for; `fields` are those of all that begin with the same models, but for the models."""

    task: str
    arm: str
    what: Arm
    seed: int
    fields: Mapping[str, Any]


def plan(wanted: Sequence[Wanted], budget_tokens: int, rows: Sequence[Row]) -> list[Job]:
    """The runs that are not in `rows`, in their order. A run that is there with other settings is a UserError; where nothing is
    missing, nothing is prepared or looked at."""
    settings = {tuple(row[name] for name in KEY): row["settings"] for row in rows}
    missing = [w for w in wanted if (w.task, w.arm, w.seed, budget_tokens) not in settings]
    prepared = {_models(w): prepare(w.task, w.fields) for w in {_models(w): w for w in missing}.values()}
    jobs = []
    for w in (w for w in wanted if _models(w) in prepared):
        fields, start = prepared[_models(w)]
        job = Job(task=w.task, arm=w.arm, what=w.what, seed=w.seed, budget_tokens=budget_tokens, fields=fields, start=start)
        if job.key not in settings:
            jobs.append(job)
        elif settings[job.key] != job.settings():
            had = f"runs of which {w.task} {w.arm} seed {w.seed} is there with other settings"
            raise UserError(refusal("--out", had, "those of this command", "choose another, or remove its rows"))
    return jobs


def _models(wanted: Wanted) -> tuple[Any, ...]:
    """Equal for runs that begin with the same models."""
    return wanted.task, *sorted(wanted.fields.items())


def quiet() -> None:
    """No bar of transformers' own for each file that it reads or writes."""
    import transformers

    transformers.utils.logging.disable_progress_bar()


# ------------------------------------------------------------------------------------------------------------------- the table


def append(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> None:
    """Add a run's rows in one write; a new file gets its header first."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read_whole(path: Path) -> tuple[list[Row], int]:
    """Rows of the runs that are whole, and how many other lines there are: a kill in the middle of a write leaves such."""
    if not path.exists():
        return [], 0
    text = path.read_text()
    header, *lines = list(csv.reader(text.splitlines())) or [[]]
    if tuple(header) != COLUMNS:
        raise UserError(refusal("--out", f"{path} with others", f"the columns {', '.join(COLUMNS)}", "choose another"))
    runs: dict[tuple[Any, ...], list[Row]] = {}
    for line in lines if text.endswith("\n") else lines[:-1]:
        with contextlib.suppress(ValueError):
            texts = dict(zip(COLUMNS, line, strict=True))
            row = {name: text if name in TEXTS else float(text) if name in FRACTIONS else int(text) for name, text in texts.items()}
            runs.setdefault(tuple(row[name] for name in KEY), []).append(row)
    whole = [rows for rows in runs.values() if [r["mark"] for r in rows] == list(range(len(rows))) and rows[-1]["final"] == 1]
    kept = list(itertools.chain.from_iterable(whole))
    return kept, len(lines) - len(kept)


def keep_whole(path: Path) -> list[Row]:
    """`read_whole`, with the rest taken out of the file, and told."""
    rows, others = read_whole(path)
    if others:
        beside = path.with_suffix(".new")
        beside.unlink(missing_ok=True)
        append(beside, rows)
        os.replace(beside, path)
        print(f"{path}: {others} lines of runs that are not whole were taken out; these runs are made again", file=sys.stderr)
    return rows


class Score(NamedTuple):
    """A run in two numbers (see above)."""

    area: float
    final: float


def score(rows: Sequence[Row]) -> Score:
    """Area and final accuracy of one run; synchronous steps overshoot a mark, so accuracy there is interpolated."""
    tokens, accuracy = [r["generated_tokens"] for r in rows], [r["accuracy"] for r in rows]
    budget = rows[0]["budget_tokens"]
    inner = [(t, a) for t, a in zip(tokens, accuracy, strict=True) if t < budget]
    x, y = zip(*inner, (budget, np.interp(budget, tokens, accuracy)), strict=True)
    marks = [budget * mark / NUM_MARKS for mark in range(NUM_MARKS - NUM_LAST + 1, NUM_MARKS + 1)]
    return Score(float(np.trapezoid(y, x) / budget), float(np.interp(marks, tokens, accuracy).mean()))


def scores(rows: Sequence[Row], budget_tokens: int) -> dict[tuple[str, str, int], Score]:
    """Those of the runs of this budget, by task, arm and seed."""
    of_budget = [row for row in rows if row["budget_tokens"] == budget_tokens]
    runs = itertools.groupby(of_budget, key=lambda row: (row["task"], row["arm"], row["seed"]))
    return {key: score(list(run)) for key, run in runs}
