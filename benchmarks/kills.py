"""Kills of real runs: whatever ends a run, wherever, it goes on bit for bit, and no response is lost or trained twice.

    python -m benchmarks.kills [--kills 1000] [--minutes 25] [--out runs/kills] [--ranks 2]

A run of 16 tiny steps, with a checkpoint of each, is ended again and again until it is through: by SIGKILL, SIGTERM, SIGSTOP (a
second run must not get the folder meanwhile; then SIGCONT, and SIGKILL a little later), or a disk that takes no more bytes
(RLIMIT_FSIZE); at random times, or aimed inside of decoding, update, save, prune and start. Then it is compared with the run that
nobody ended: checkpoint (weights, optimisers, responses in flight, books), records and responses.

Each attempt is a process of its own, forked from one that has torch imported; in one run of four its verifier is one, too. The raw
rows are in OUT: a second call goes on there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, report
from benchmarks.kill_plans import HOWS, TINY, WHERES, InProcessScorer, Places, Plan, plant, strike
from benchmarks.same_run import difference
from tppo_ref.__main__ import resume
from tppo_ref.loop.learner import Learner
from tppo_ref.method.errors import UserError
from tppo_ref.rollout.torch_engine import TorchEngine
from tppo_ref.runs import build, checkpoint, commands, session
from tppo_ref.runs.checkpoint import complete_checkpoints
from tppo_ref.runs.config import Config, apply_method
from tppo_ref.runs.exits import MISTAKE, STOPPED, exit_code
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.run_folder import own_folder
from tppo_ref.tasks import load_task

NAME = "kills"
STEPS = 16
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tppo": ("tppo", {}),
    "tppo-defer": ("tppo-defer", {"advantage.tail_tokens": 5}),
    "held batches": ("tppo", {"value.batch_responses": 7, "policy.epochs": 2}),
    "tppo-ewma": ("tppo-ewma", {}),
}
TRIES = 400  # of one run, before it counts as stuck


# ------------------------------------------------------------------------------------------------------------------ in the child


def places(where: str) -> Places:
    """Functions inside of which an attempt is ended."""
    return {
        "start": [(build, "resume_point"), (build, "make_policy"), (build, "make_value"), (build, "TaskScorer"),
                  (checkpoint.LocalCheckpointer, "load"), (session, "RunFiles"), (commands, "build"), (commands, "Session")],
        "decode": [(TorchEngine, "step")],
        "update": [(Learner, "update"), (torch.optim.AdamW, "step"), (session.Trainer, "state_dict")],
        "save": [(checkpoint, "clear_for"), (checkpoint, "save_tokenizer"), (checkpoint.torch, "save"),
                 (checkpoint, "write_manifest"),
                 (checkpoint.os, "fsync"), (checkpoint, "put_in_place"), (checkpoint, "remove_all_but")],
        "prune": [(checkpoint, "remove_all_but"), (checkpoint.os, "rename"), (checkpoint.shutil, "rmtree")],
    }[where]  # fmt: skip


def attempt(config: Config, plan: Plan | None, errors: Path, *, real_verifier: bool = True) -> int:
    """Fork a process that trains `config` under a plan; its id."""
    if child := os.fork():
        return child
    code = 1
    try:
        descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if not real_verifier:
            build.TaskScorer = InProcessScorer  # type: ignore[misc, assignment]
        if plan and plan.where != "random":
            plant(plan, places(plan.where), lambda: strike(plan.how, os.getpid()))
        code = exit_code(lambda: resume(config, set()))
    finally:
        os._exit(code)


# ----------------------------------------------------------------------------------------------------------------- in the parent


def config_of(case: str, out: Path, cache: Path) -> Config:
    """A case's config, which goes on where there is something to go on from."""
    method, changes = CASES[case]
    found = bool(complete_checkpoints(out / "checkpoints"))
    fields = (
        TINY
        | changes
        | {"run.steps": STEPS, "run.eval_every_s": 0.0, "run.out": str(out), "run.cache": str(cache), "run.resume": found}
    )
    return apply_method(replace_fields(Config(), fields), method, strict=False)


def wait(child: int, plan: Plan | None, out: Path, counts: Counter[str]) -> int | None:
    """See a child to its end, with what its plan asks of the outside; its wait status, None where it stood still."""
    limit = time.monotonic() + 120
    at = time.monotonic() + plan.delay_s if plan and plan.where == "random" else None
    while time.monotonic() < limit:
        pid, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED)
        if pid and os.WIFSTOPPED(status):
            counts["second refused" if refused(out) else "second accepted"] += 1
            os.kill(child, signal.SIGCONT)
            at, plan = time.monotonic() + 0.1, Plan("SIGKILL", "random", 0, 0, 0.0)
        elif pid:
            return status
        if at is not None and plan is not None and time.monotonic() >= at:
            at = None
            with contextlib.suppress(ProcessLookupError):
                strike(plan.how, child)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def refused(out: Path) -> bool:
    """Whether a second run is kept away from `out`, of which the first has got hold."""
    if not (out / "checkpoints").exists():  # struck before it had the folder
        return True
    try:
        with own_folder(str(out)):
            return False
    except UserError:
        return True


def judge(plan: Plan | None, status: int | None, said: str) -> str:
    """What is wrong with how an attempt ended; empty where nothing is."""
    if status is None:
        return "stood still"
    if "Traceback" in said:
        return "traceback"
    if os.WIFSIGNALED(status):
        allowed = {"SIGKILL": (signal.SIGKILL,), "SIGSTOP": (signal.SIGKILL,), "SIGTERM": (signal.SIGTERM,)}
        return "" if plan and os.WTERMSIG(status) in allowed.get(plan.how, ()) else "killed by another signal"
    code, lines = os.WEXITSTATUS(status), [line for line in said.splitlines() if line.startswith(("error:", "stopped"))]
    if plan and code == {"full disk": MISTAKE, "SIGTERM": STOPPED}.get(plan.how):
        return "" if len(lines) == 1 else "not one line"
    return "" if code == 0 else f"exit code {code}"


def one_run(
    case: str, seed: int, work: Path, cache: Path, reference: Path, *, most: int = TRIES, stop: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """End a run again and again until it is through, or `most` times; what was done to it, and how it differs from `reference`."""
    out, errors, rng, counts = work / "run", work / "said.txt", random.Random(f"{case} {seed}"), Counter[str]()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    begin, through, wrong = time.monotonic(), False, []
    for number in range(most + 1):
        plan = None if number == most or stop() else Plan.draw(rng)
        status = wait(attempt(config_of(case, out, cache), plan, errors, real_verifier=seed % 4 == 0), plan, out, counts)
        if fault := judge(plan, status, said := errors.read_text()):
            wrong.append({"fault": fault, "plan": dataclasses.asdict(plan) if plan else None, "said": said[-2000:]})
        if status == 0:
            through = True
            break
        if plan:
            counts.update([plan.how, plan.where, "kills"])
    found = difference(reference, out) if through else {"stuck": 1}
    row = {"case": case, "seed": seed, **counts, **found, "wrong": wrong, "seconds": round(time.monotonic() - begin, 1)}
    if not wrong and not any(found.values()):
        shutil.rmtree(work)
    return row


def unbroken(case: str, folder: Path, cache: Path) -> Path:
    """The run of a case that nobody ends; kept."""
    if not (folder / "through").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        errors = folder / "said.txt"
        _, status = os.waitpid(attempt(config_of(case, folder / "run", cache), None, errors), 0)
        assert status == 0, errors.read_text()
        (folder / "through").touch()
    return folder / "run"


def table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per case: kills by how and where, and what was found."""
    summary = []
    for case in CASES:
        own = [row for row in rows if row["case"] == case]
        if own:
            names = ("kills", *HOWS, *WHERES, "second refused", "second accepted", "lost", "twice", "other responses",
                     "other records", "other state", "left", "stuck")  # fmt: skip
            total = {name.replace(" ", "_"): sum(row.get(name, 0) for row in own) for name in names}
            faults = sum(len(row["wrong"]) for row in own)
            seconds = round(sum(row["seconds"] for row in own))
            summary.append({"case": case, "runs": len(own), **total, "wrong_ends": faults, "seconds": seconds})
    return summary


def warm_up(work: Path, cache: Path) -> None:
    """Import whatever a run imports, fresh or resumed, so that no child has to; make the base model and the prompts."""
    torch.set_num_threads(1)
    task = load_task("length")
    build.make_task = lambda config: task
    for steps in (1, 2):
        commands.train(replace_fields(config_of("tppo-ewma", work / "warm-up", cache), {"run.steps": steps}))
    shutil.rmtree(work / "warm-up")
    gc.collect()
    gc.freeze()  # a child's collector would copy every page that it looks at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=25.0, help="stop there, with fewer kills")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1, help="2: runs of scale/, by kills_on_ranks.py")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cases", nargs="+")
    parser.add_argument("--csv", type=Path)
    given = parser.parse_args()
    if given.ranks > 1:
        from benchmarks import kills_on_ranks as program
    else:
        program = sys.modules[__name__]
    given.out = given.out or Path("runs") / program.NAME
    given.csv = given.csv or RESULTS / f"{program.NAME}.csv"
    given.cases = given.cases or list(program.CASES)
    given.out.mkdir(parents=True, exist_ok=True)
    program.measure(given)


def measure(given: argparse.Namespace) -> None:
    """End runs until `given.kills` are made, or `given.minutes` are over."""
    deadline, cache, raw = time.monotonic() + 60 * given.minutes, given.out / "cache", given.out / "runs.jsonl"
    warm_up(given.out, cache)
    references = {case: unbroken(case, given.out / f"unbroken-{case.replace(' ', '-')}", cache) for case in given.cases}
    rows = [json.loads(line) for line in raw.read_text().splitlines()] if raw.exists() else []
    while (done := sum(row.get("kills", 0) for row in rows)) < given.kills and time.monotonic() < deadline:
        case, seed = given.cases[len(rows) % len(given.cases)], len(rows) // len(given.cases)
        row = one_run(case, seed, given.out / f"run-{len(rows)}", cache, references[case], stop=lambda: time.monotonic() > deadline)
        rows.append(row)
        with raw.open("a") as file:
            print(json.dumps(row), file=file)
        print(f"{done + row.get('kills', 0)} kills: {row}", flush=True)
    report(NAME, table(rows), given.csv)


if __name__ == "__main__":
    main()
