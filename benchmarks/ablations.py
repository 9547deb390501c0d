"""Ablations: what each part of T-PPO brings, on the three built-in tasks, over seeds, at the same number of generated tokens.

    python -m benchmarks.ablations [--seeds 5] [--tasks chain fork length] [--arms tppo window-16 ...] [--jobs 2] [--budget 30720]

An arm is T-PPO with its defaults, less one thing (ARMS); a comparison is an arm against its base, and belongs to one of the
questions of docs/theory.md (COMPARISONS). The budget is in generated tokens: a busy machine makes a run longer, not worse. Runs of
a task start from the same base model and, unless the critic is cold, from the same pre-trained critic, as in `compare`.

Writes results/ablations.csv, a row per evaluation, and results/ablations_summary.csv, a row per comparison, task and metric.
A run's rows are appended when the run is whole: a command that was stopped goes on where it was, and asking for more seeds makes
the missing ones. Seeds are outermost, so that what is there is balanced at any time. `--seeds 0` only makes the summary anew.

    area     mean accuracy over the tokens from 0 to the budget: the area under the learning curve, divided by the budget
    final    mean accuracy at the last two of three marks; between evaluations, accuracy is interpolated to the mark
    interval 95 %, Student-t, of the mean of paired differences (arm - base, seed by seed); no correction for how many there are
    verdict  better or worse where the interval leaves out 0, else undecided. Task "all": the mean over tasks, seed by seed
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import hashlib
import itertools
import json
import math
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import scipy.stats
from tqdm import tqdm

from benchmarks.common import RESULTS, report
from tppo_ref.method.errors import UserError
from tppo_ref.runs.config import Config, apply_method
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.sinks import read_metrics

TASKS = ("chain", "fork", "length")
NUM_MARKS = 3  # evaluations after the start, evenly over the budget
NUM_LAST = 2  # of them in "final"
BUDGET = 30_720  # 3 marks of 10,240 tokens: with 32 slots, windows of 16, 32, 64 and 320 tokens end at each of them


SHARED = {"run.progress": False, "run.timeline": False, "task.verifier_timeout_s": 60.0}  # so long that no busy machine is blamed


class Arm(NamedTuple):
    """A named method, and the fields in which the arm differs from it."""

    method: str = "tppo"
    fields: Mapping[str, Any] = {}


PPO_LR = {"policy.lr": 6e-4}  # what benchmarks/sweep.py found for PPO; 3e-4, the default, is what it found for T-PPO
ARMS: dict[str, Arm] = {
    "tppo": Arm(),
    **{f"window-{window}": Arm(fields={"rollout.window": window}) for window in (16, 32, 128, 320)},
    "critic-cut": Arm("tppo-critic-cut"),
    "zero-cut": Arm("tppo-zero-cut"),
    "partial-is": Arm("partial-is"),
    "cold-critic": Arm(fields={"model.value": None}),  # the policy's weights under a new head: V is near 0
    "cold-critic-warmup": Arm(fields={"model.value": None, "value.warmup_steps": 10}),
    "value-batch-64": Arm(fields={"value.batch_responses": 64}),
    "value-joint": Arm(fields={"value.update": "joint"}),
    "ppo": Arm("ppo", PPO_LR),
    "ppo-dual": Arm("ppo-dual", PPO_LR),
    "tail-none": Arm(fields={"advantage.tail_tokens": 0}),
    "tail-defer": Arm(fields={"advantage.tail": "defer"}),
}


class Comparison(NamedTuple):
    """`arm` against `base`, in answer to a question of docs/theory.md."""

    question: str
    arm: str
    base: str = "tppo"


COMPARISONS = (
    *(Comparison("3", arm) for arm in ("window-16", "window-32", "window-128", "window-320")),
    *(Comparison("4", arm) for arm in ("critic-cut", "zero-cut", "partial-is")),
    Comparison("5", "cold-critic"), Comparison("5", "cold-critic-warmup"), Comparison("5", "cold-critic-warmup", "cold-critic"),
    Comparison("6", "value-batch-64"), Comparison("7", "value-joint"),
    Comparison("8", "ppo-dual", "ppo"), Comparison("8", "ppo"), Comparison("8", "ppo-dual"),
    Comparison("P7", "tail-none"), Comparison("P7", "tail-defer"), Comparison("P7", "tail-defer", "tail-none"),
)  # fmt: skip

KEY = ("task", "arm", "seed", "budget_tokens")
COLUMNS = (*KEY, "mark", "generated_tokens", "trained_tokens", "prefix_tokens", "decode_steps", "steps", "accuracy", "length_mean",
           "explained_variance", "cut_share", "cpu_s", "final", "settings")  # fmt: skip
TEXTS, FRACTIONS = ("task", "arm", "settings"), ("accuracy", "length_mean", "explained_variance", "cut_share", "cpu_s")
Row = dict[str, Any]

# --------------------------------------------------------------------------------------------------------------------- one run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One run; `fields` are those that all arms of the task share, `start` is the evaluation of the model they start from."""

    task: str
    arm: str
    seed: int
    budget_tokens: int
    fields: Mapping[str, Any]
    start: Mapping[str, float]

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.task, self.arm, self.seed, self.budget_tokens

    def config(self, out: str = "") -> Config:
        arm = ARMS[self.arm]
        config = apply_method(replace_fields(Config(), self.fields), arm.method, strict=False)
        return replace_fields(config, {**arm.fields, "run.seed": self.seed, "run.out": out})

    def settings(self) -> str:
        """A hash of what decides the run's numbers; folders count by what they hold: the base model's name has its own hash."""
        config = self.config()
        critic = "cold" if config.model.value is None else "pre-trained"
        config = replace_fields(config, {"model.policy": Path(config.model.policy or "").name, "model.value": critic})
        sections = {name: fields for name, fields in dataclasses.asdict(config).items() if name not in ("run", "compare")}
        text = json.dumps([sections, config.run.eval_prompts, config.run.eval_samples], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def row(self, mark: int, **numbers: float) -> Row:
        key = dict(zip(KEY, self.key, strict=True))
        rest = {"mark": mark, "final": int(mark == NUM_MARKS), "settings": self.settings()}
        row = {name: 0.0 if name in FRACTIONS else 0 for name in COLUMNS} | key | rest | numbers
        return {name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()}


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


def prepare(task_name: str, fields: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, float]]:
    """Base model and pre-trained critic of a task, made once and cached: (the fields of all its runs, the base's evaluation)."""
    from tppo_ref.runs.build import TaskScorer, base_model, build, make_task
    from tppo_ref.runs.session import Session
    from tppo_ref.runs.value_cache import cached_value

    fields = {**fields, "task.name": task_name}
    config = replace_fields(Config(), fields)
    task = make_task(config)
    fields["model.policy"] = base_model(config, task)
    with contextlib.closing(TaskScorer(task, config.task)) as scorer:
        fields["model.value"] = str(cached_value(replace_fields(Config(), fields), task, scorer.verifier))
    with tempfile.TemporaryDirectory() as out:
        config = replace_fields(Config(), {**fields, "run.out": out})
        with contextlib.closing(Session(build(config))) as session:
            session.evaluate()
        return fields, read_metrics(Path(out) / "metrics.jsonl")[-1]


# ------------------------------------------------------------------------------------------------------- processes that make runs


class Worker(threading.Thread):
    """A process that is asked for one run after the other; one that dies costs the run it was at, and is replaced."""

    def __init__(self, waiting: queue.SimpleQueue[Job], answers: queue.SimpleQueue[tuple[Job, Row]], command: Sequence[str]):
        super().__init__(daemon=True)
        self.waiting, self.answers, self.command = waiting, answers, command
        self.process: subprocess.Popen[str] | None = None

    def run(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                job = self.waiting.get_nowait()
                self.answers.put((job, self.ask(job)))
        if self.process:
            self.process.communicate()  # the end of its input ends it

    def ask(self, job: Job) -> Row:
        """{"rows": [...]}, or {"error": reason}."""
        if self.process is None:
            # A session of its own: Ctrl-C reaches this process, which then ends its workers.
            self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                            env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)  # fmt: skip
        process = self.process
        assert process.stdin
        assert process.stdout
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(dataclasses.asdict(job)) + "\n")
            process.stdin.flush()
        line = process.stdout.readline()
        if line.endswith("\n"):
            return dict(json.loads(line))
        self.process = None
        return {"error": f"its process ended with code {process.wait()}"}

    def kill(self) -> None:
        if self.process:
            self.process.kill()


def quiet() -> None:
    """No bar of transformers' own for each file that it reads or writes."""
    import transformers

    transformers.utils.logging.disable_progress_bar()


WORKER = (sys.executable, "-m", "benchmarks.ablations", "--worker")


def serve(lines: Iterable[str], protocol: TextIO) -> None:
    """The worker's side: a job a line in, an answer a line out."""
    for line in lines:
        answer: Row
        try:
            answer = {"rows": run_one(Job(**json.loads(line)))}
        except Exception as error:  # one run's failure is told, and is not the end of the others
            answer = {"error": f"{type(error).__name__}: {error}"}
        protocol.write(json.dumps(answer) + "\n")
        protocol.flush()


def run_all(jobs: Sequence[Job], path: Path, num_workers: int, command: Sequence[str] = WORKER) -> list[str]:
    """Make the runs, append each to `path` when it is whole; returns what went wrong, a line per run that failed."""
    waiting, answers = queue.SimpleQueue[Job](), queue.SimpleQueue[tuple[Job, Row]]()
    for job in jobs:
        waiting.put(job)
    workers = [Worker(waiting, answers, command) for _ in range(min(num_workers, len(jobs)))]
    failed = []
    with tqdm(total=len(jobs), unit="run", smoothing=0.1, disable=not jobs) as bar:
        try:
            for worker in workers:
                worker.start()
            for _ in jobs:
                job, answer = answers.get()
                if "error" in answer:
                    failed.append(f"{job.task} {job.arm} seed {job.seed}: {answer['error']}")
                    bar.write(f"failed: {failed[-1]}", file=sys.stderr)
                else:
                    append(path, answer["rows"])
                bar.set_postfix_str(f"last: {job.task} {job.arm} seed {job.seed}; {len(failed)} failed", refresh=False)
                bar.update()
        except KeyboardInterrupt:
            for worker in workers:
                worker.kill()
            raise
    return failed


# ------------------------------------------------------------------------------------------------------------------- the table


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add a run's rows in one write; a new file gets its header first."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
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
        raise UserError(f"{path}: expected the columns {', '.join(COLUMNS)}; found others: choose another --out")
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


# -------------------------------------------------------------------------------------------------------------------- statistics


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


def interval(differences: Sequence[float]) -> tuple[float, float, float, float]:
    """Mean, the ends of its 95 % Student-t interval, and the two-sided p; the last three NaN for fewer than two."""
    n, middle = len(differences), float(np.mean(differences))
    if n < 2:
        return middle, math.nan, math.nan, math.nan
    error = float(np.std(differences, ddof=1)) / math.sqrt(n)
    half = float(scipy.stats.t.ppf(0.975, n - 1)) * error
    p = 2 * float(scipy.stats.t.sf(abs(middle) / error, n - 1)) if error else float(middle == 0)
    return middle, middle - half, middle + half, p


def verdict(low: float, high: float) -> str:
    return "better" if low > 0 else "worse" if high < 0 else "undecided"


def summary(rows: Sequence[Row], budget: int) -> list[Row]:
    """A row per comparison, task and metric that has at least one pair of runs at this budget."""
    runs: dict[tuple[str, str], dict[int, Score]] = {}
    for (task, arm, seed, tokens), group in itertools.groupby(rows, key=lambda r: tuple(r[name] for name in KEY)):
        if tokens == budget:
            runs.setdefault((task, arm), {})[seed] = score(list(group))
    tasks, table = sorted({task for task, _ in runs}), []
    for question, arm, base in COMPARISONS:
        seeds = {t: sorted(runs.get((t, arm), {}).keys() & runs.get((t, base), {}).keys()) for t in tasks}
        for metric in Score._fields:
            pairs = {t: [(getattr(runs[t, arm][s], metric), getattr(runs[t, base][s], metric)) for s in seeds[t]] for t in tasks}
            everywhere = [s for s in seeds[tasks[0]] if all(s in seeds[t] for t in tasks)] if tasks else []
            of_seed = [[pairs[t][seeds[t].index(s)] for t in tasks] for s in everywhere]
            pairs["all"] = [(mean([a for a, _ in x]), mean([b for _, b in x])) for x in of_seed]
            head = {"arm": arm, "base": base, "question": question, "metric": metric, "budget_tokens": budget}
            table += [{"task": task, **head, **compared(of_task)} for task, of_task in pairs.items() if of_task]
    return table


def compared(pairs: Sequence[tuple[float, float]]) -> Row:
    """The numbers of a summary row, from (arm, base) per seed."""
    middle, low, high, p = interval([arm - base for arm, base in pairs])
    numbers = {"arm_mean": mean([a for a, _ in pairs]), "base_mean": mean([b for _, b in pairs]), "mean_difference": middle,
               "low": low, "high": high, "p": p}  # fmt: skip
    return {"n": len(pairs)} | {name: round(x, 4) for name, x in numbers.items()} | {"verdict": verdict(low, high)}


# ------------------------------------------------------------------------------------------------------------------------- command


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to this less 1; 0 only makes the summary")
    parser.add_argument("--budget", type=int, default=BUDGET, help="generated tokens of a run")
    parser.add_argument("--eval-prompts", type=int, default=256)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--cache", default="runs/cache", help="folder of base models and pre-trained critics")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the two CSV")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for name, least in (("seeds", 0), ("budget", NUM_MARKS), ("eval_prompts", 1), ("jobs", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name.replace('_', '-')}: expected an integer of at least {least}, got {getattr(arguments, name)}")
    return arguments


def plan(arguments: argparse.Namespace, rows: Sequence[Row]) -> list[Job]:
    """The runs that are not there yet, seeds outermost. A run that is there with other settings is a UserError."""
    settings = {tuple(row[name] for name in KEY): row["settings"] for row in rows}
    keys = list(itertools.product(range(arguments.seeds), arguments.arms, arguments.tasks))
    missing = {task for seed, arm, task in keys if (task, arm, seed, arguments.budget) not in settings}
    shared = {"run.cache": arguments.cache, "run.eval_prompts": arguments.eval_prompts, **SHARED}
    prepared = {task: prepare(task, shared) for task in arguments.tasks if task in missing}
    waiting = []
    for seed, arm, task in keys:
        if task not in prepared:
            continue
        fields, start = prepared[task]
        job = Job(task=task, arm=arm, seed=seed, budget_tokens=arguments.budget, fields=fields, start=start)
        if job.key not in settings:
            waiting.append(job)
        elif settings[job.key] != job.settings():
            raise UserError(f"--out: {task} {arm} seed {seed} is there with other settings; choose another, or remove its rows")
    return waiting


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 runs failed, 2 a user's mistake, 130 Ctrl-C."""
    arguments = parse_arguments(argv)
    quiet()
    if arguments.worker:
        with os.fdopen(os.dup(1), "w") as protocol:
            os.dup2(2, 1)  # whatever else is printed must not break the protocol
            serve(sys.stdin, protocol)
        return 0
    path = arguments.out / "ablations.csv"
    try:
        jobs = plan(arguments, keep_whole(path))
        failed = run_all(jobs, path, arguments.jobs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; whole runs are in {path}, and the same command goes on with the others", file=sys.stderr)
        return 130
    if table := summary(read_whole(path)[0], arguments.budget):
        report("ablations_summary", table, arguments.out / "ablations_summary.csv")
    for line in failed:
        print(f"failed: {line}", file=sys.stderr)
    print(f"{len(jobs) - len(failed)} runs made, {len(failed)} failed; runs are in {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill stops as Ctrl-C does: no worker is left behind
    sys.exit(main())
