"""`compare`: several methods over several seeds on one task, each run in a process of its own.

All runs share the base model, the pre-trained value model and the engine, and slots where `compare.per_method` gives none; the
value model is pre-trained once. Runs that are complete are kept, so that a comparison that was stopped goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from tppo_ref.method.errors import UserError, refusal
from tppo_ref.runs.build import TaskScorer, base_model, check_sources, make_task
from tppo_ref.runs.commands import settle_libraries
from tppo_ref.runs.config import Config
from tppo_ref.runs.inputs import inputs_of, rule_digest
from tppo_ref.runs.own_rule import FIELD as RULE
from tppo_ref.runs.own_rule import rule_of
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.plans import difference, plan_of, plan_runs
from tppo_ref.runs.references import FILE, leave_out_bad_references
from tppo_ref.runs.run_folder import own_folder
from tppo_ref.runs.sinks import read_metrics
from tppo_ref.runs.value_cache import cached_value
from tppo_ref.runs.versions import versions


def compare(config: Config) -> Path:
    """Run what is not there yet, then write the report; returns its folder (run.out). The plans have been checked.

    The folder is this comparison's alone while it runs: to start a run anew it removes what an earlier one left. UserError for a
    rule at the cut that cannot be had, before a base model is made.
    """
    for method in config.compare.methods:
        rule_of(plan_of(config, method))
    with own_folder(config.run.out) as out:
        return _compare(config, out)


def _compare(config: Config, out: Path) -> Path:
    from tppo_ref.runs.report import write_report

    shared, inputs = prepare(config, out)
    runs = plan_runs(shared, out)
    inputs_by_run = {run.run.out: inputs | rule_digest(run) for run in runs}
    for run in runs:
        refuse_other(run, inputs_by_run[run.run.out])
    waiting = [run for run in runs if not (Path(run.run.out) / "finished").exists()]
    for run in waiting:  # a run that was stopped half-way starts anew: half of its clock ran beside other work
        folder = Path(run.run.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "inputs.json").write_text(json.dumps(inputs_by_run[run.run.out], indent=1) + "\n")
        if (out / FILE).exists():
            shutil.copy(out / FILE, folder / FILE)
        beside = folder / "wanted.json.new"
        beside.write_text(json.dumps(dataclasses.asdict(run), indent=1))
        os.replace(beside, folder / "wanted.json")
    _run_all(waiting, config)
    (out / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")
    (out / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n")
    write_report(out, methods=config.compare.methods, target_share=config.compare.target)
    return out


def prepare(config: Config, out: Path) -> tuple[Config, dict[str, str]]:
    """What all runs share: the config with base model and pre-trained value model filled in, and the digests of their inputs.

    References are checked here, once, and the list of the bad ones goes to `out`.
    """
    settle_libraries(config)
    task = make_task(config)
    check_sources(config, task)
    config = replace_fields(config, {"model.policy": base_model(config, task)})
    with closing(TaskScorer(task, config.task)) as scorer:
        leave_out_bad_references(make_task(config), scorer.verifier, out, resume=False, progress=config.run.progress)
        with_critic = [m for m in config.compare.methods if not plan_of(config, m).advantage.critic_free]
        if with_critic and config.model.value is None and config.value.pretrain_responses:
            config = replace_fields(config, {"model.value": str(cached_value(config, task, scorer.verifier, out / FILE))})
        return config, inputs_of(config, task, scorer.verifier)


def refuse_other(run: Config, inputs: Mapping[str, str]) -> None:
    """A folder that holds a run of other settings, or of other inputs under their names, is neither mixed in nor overwritten."""
    folder = Path(run.run.out)
    wanted = folder / "wanted.json"
    if not wanted.exists():
        return
    remedy = f"choose another run.out, or remove {folder}"
    try:
        found = difference(run, json.loads(wanted.read_text()))
        before = {RULE: ""} | json.loads((folder / "inputs.json").read_text())  # of before rules of one's own: `egae` had it
        changed = [name for name, digest in inputs.items() if before[name] != digest]
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        got = f"{folder}, which holds no run that can be read"
        raise UserError(refusal("run.out", got, "a folder of this comparison", remedy)) from None
    if found:
        field, then, now = found
        raise UserError(refusal("run.out", f"{folder}, which holds a run with {field} {then}", f"one with {now}", remedy))
    if changed:
        expected = f"one with the {changed[0]} of today: what stands under the same name has changed since"
        raise UserError(refusal("run.out", f"{folder}, which holds a run with another {changed[0]}", expected, remedy))


def _run_all(runs: list[Config], config: Config) -> None:
    """Run configs in processes of their own, compare.jobs at a time, with one progress bar over all of them."""
    total = sum(run.run.train_seconds or run.run.steps for run in runs)
    unit = "s" if config.run.train_seconds else "step"
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} {unit} trained [{elapsed}<{remaining}, {rate_fmt}]{postfix}"
    waiting, active = list(runs), dict[str, tuple[Config, subprocess.Popen[bytes]]]()
    done = 0.0
    with tqdm(total=total, desc=f"{len(runs)} runs", unit=unit, bar_format=form, disable=not config.run.progress) as bar:
        try:
            while waiting or active:
                while waiting and len(active) < config.compare.jobs:
                    run = waiting.pop(0)
                    active[run.run.out] = (run, _start(run))
                time.sleep(0.5)
                for folder, (run, process) in list(active.items()):
                    if process.poll() is not None:
                        _check(folder, process.returncode)
                        done += run.run.train_seconds or run.run.steps
                        del active[folder]
                bar.n = done + sum(min(_progress(run), run.run.train_seconds or run.run.steps) for run, _ in active.values())
                bar.set_postfix_str(", ".join(_curve(folder) for folder in active), refresh=False)
                bar.refresh()
        finally:
            for _, process in active.values():
                process.send_signal(signal.SIGINT)
            for _, process in active.values():
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    process.kill()


BARS = "▁▂▃▄▅▆▇█"


def _curve(folder: str) -> str:
    """A run's name and its accuracy so far, evaluation by evaluation, as a line of small bars."""
    try:
        records = read_metrics(Path(folder) / "metrics.jsonl")
    except (OSError, UserError):  # not yet there, or damaged: the report will say so
        records = []
    curve = [record["eval/accuracy"] for record in records if "eval/accuracy" in record][-16:]
    bars = "".join(BARS[min(int(accuracy * len(BARS)), len(BARS) - 1)] for accuracy in curve)
    return f"{Path(folder).name} {bars} {curve[-1]:.2f}" if curve else Path(folder).name


def _start(run: Config) -> subprocess.Popen[bytes]:
    folder = Path(run.run.out)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # without one the run starts anew, and its curves with it
    environment = os.environ | {"OMP_NUM_THREADS": str(run.run.threads), "PYTHONUNBUFFERED": "1"}
    with (folder / "log.txt").open("wb") as log:
        command = [sys.executable, "-m", "tppo_ref.runs.planned", str(folder / "wanted.json")]
        # A session of its own: Ctrl-C reaches this process, which then asks each run to stop, once.
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def _check(folder: str, code: int) -> None:
    if code == 0:
        (Path(folder) / "finished").touch()
        return
    lines = (Path(folder) / "log.txt").read_text(errors="replace").strip().splitlines() or ["no output"]
    raise UserError(f"run {Path(folder).name} ended with exit code {code}: {lines[-1]} (its log: {Path(folder) / 'log.txt'})")


def _progress(run: Config) -> float:
    """Training-clock seconds or steps that a run has behind it."""
    path = Path(run.run.out) / "metrics.jsonl"
    if not path.exists():
        return 0.0
    with path.open("rb") as file:  # its end only: this runs beside the runs, on their cores
        file.seek(max(0, path.stat().st_size - 2**14))
        lines = file.read().splitlines()[1:]
    for line in reversed(lines):
        try:
            record = json.loads(line)
            return float(record["time/train_s"] if run.run.train_seconds else record["step"])
        except (ValueError, LookupError, TypeError):  # cut off by a write in progress
            continue
    return 0.0
