"""One job of scale/ on ranks over gloo, forked, struck, and seen to its end: the half of kills_on_ranks.py that is about processes.

A job is scale/launch.py's own launcher and ranks, forked where it would start programs: imports take longer than a run. Some jobs
have no launcher, as where a scheduler leaves alone what it has started.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.distributed.checkpoint as dcp

from benchmarks.forked import Forked, leave_with
from benchmarks.kill_plans import InProcessScorer, Places, Plan, plant, strike
from scale import build, checkpoint, launch, run, shutdown
from scale.config import ScaleConfig
from scale.distributed import Collective
from scale.network import ranks_here
from tppo_ref.loop.learner import Learner
from tppo_ref.method.errors import UserError
from tppo_ref.rollout.torch_engine import TorchEngine
from tppo_ref.runs import parsing, session
from tppo_ref.runs.exits import MISTAKE, STOPPED
from tppo_ref.runs.run_folder import LOCK, own_folder

FOR_GOOD = " for good"
WHOM = {"one rank": 0.6, "all ranks": 0.2, "launcher": 0.2}
REAL_POPEN = subprocess.Popen


@dataclasses.dataclass(frozen=True)
class RankPlan(Plan):
    """A plan for one job: `whom` is "rank N", "all ranks" or "launcher". SIGSTOP is followed by SIGCONT, unless it is for good.

    leave_s   by then everybody has to be gone: a rank waits for another one `timeout_s`, and up to twice that where the first rank
              never came; it keeps quiet for a while about what another one should tell; the launcher gives those who are left its
              grace
    """

    whom: str = "all ranks"
    ranks: int = 2
    launcher: bool = True
    timeout_s: float = 60.0

    @classmethod
    def draw(cls, rng: random.Random, ranks: int = 2) -> Self:
        plan = super().draw(rng)
        how, launcher = plan.how, rng.random() < 0.85
        if how == "SIGSTOP" and launcher and rng.random() < 0.3:
            how += FOR_GOOD
        (whom,) = rng.choices(list(WHOM), list(WHOM.values()))
        if whom == "one rank" or (whom == "launcher" and (not launcher or how not in ("SIGKILL", "SIGTERM"))) or FOR_GOOD in how:
            whom = f"rank {rng.randrange(ranks)}"
        call = {"start": 1, "decode": min(plan.call, 12)}.get(plan.where, plan.call)  # a start calls once
        fields = dataclasses.asdict(plan) | {"how": how, "call": call, "delay_s": 2.5 * plan.delay_s}
        return cls(**fields | {"whom": whom, "ranks": ranks, "launcher": launcher, "timeout_s": 10.0 if FOR_GOOD in how else 60.0})

    @property
    def leave_s(self) -> float:
        return 2 * self.timeout_s + shutdown.QUIET_S + shutdown.CLAIM_S + launch.GRACE_S + 60.0

    @property
    def inside(self) -> str:
        """The function that is struck; empty at a random time."""
        options = places(self.where) if self.where != "random" else ()
        return options[self.function % len(options)][1] if options else ""

    def struck(self, family: Mapping[str, int]) -> list[int]:
        """Processes that the blow is for; this one, where it is among them, last."""
        names = [name for name in family if name.startswith("rank")] if self.whom == "all ranks" else [self.whom]
        return sorted((family[name] for name in names), key=lambda process: process == os.getpid())


# ------------------------------------------------------------------------------------------------------------------ in the job


def places(where: str) -> Places:
    """Functions inside of which a rank is struck."""
    return {
        "start": [(build, "with_base_model"), (run, "own_folder"), (build, "build_policy"), (build, "build_value"),
                  (build, "build_engine"), (checkpoint.dcp, "load"), (session, "RunFiles"), (run, "build")],
        "decode": [(TorchEngine, "step")],
        "update": [(Learner, "update"), (torch.optim.AdamW, "step"), (Collective, "rebalance"), (Collective, "grad_norm")],
        "save": [(checkpoint, "model_state"), (checkpoint.dcp, "async_save"), (dcp.FileSystemWriter, "write_data"),
                 (checkpoint.DistributedCheckpointer, "finish"), (os, "fsync"),
                 (checkpoint, "clear_for"), (checkpoint, "write_manifest"), (checkpoint, "put_in_place")],
        "prune": [(checkpoint, "remove_all_but"), (os, "rename"), (shutil, "rmtree")],
    }[where]  # fmt: skip


FIRST_RANKS = ("own_folder", "RunFiles", "clear_for", "write_manifest", "put_in_place", "remove_all_but", "rename", "rmtree")
"""Functions that the first rank alone calls."""


def plants_in(plan: RankPlan) -> int:
    """The rank in which the blow is prepared: the one that is struck, where it comes by that place."""
    return int(plan.whom[5:]) if plan.whom.startswith("rank") and plan.inside not in FIRST_RANKS else 0


def blow(plan: RankPlan, work: Path) -> None:
    """The one blow of this attempt, and when it fell."""
    with contextlib.suppress(FileExistsError):
        os.symlink(str(time.monotonic()), work / "struck")
        for process in plan.struck(family(work, plan.ranks)):
            with contextlib.suppress(ProcessLookupError):
                strike(plan.how.removesuffix(FOR_GOOD), process)


def family(work: Path, ranks: int) -> dict[str, int]:
    """Process numbers of the launcher and all ranks, once all are there."""
    deadline = time.monotonic() + 30
    while len(found := dict(line.split(": ") for line in (work / "family").read_text().splitlines())) < ranks + 1:
        assert time.monotonic() < deadline, found
        time.sleep(0.005)
    return {name: int(process) for name, process in found.items()}


def job(config: ScaleConfig, plan: RankPlan, work: Path, said: int, *, real_verifier: bool, struck: bool) -> int:
    """Fork a launcher, which forks its ranks; its id."""
    if child := os.fork():
        return child
    os.dup2(said, 1)
    os.dup2(said, 2)
    (work / "family").write_text(f"launcher: {os.getpid()}\n")
    parsing.parse = lambda *_, **__: config  # type: ignore[assignment]
    if not real_verifier:
        build.TaskScorer = InProcessScorer  # type: ignore[misc, assignment]

    def begin(rank: int) -> int:
        if struck and plan.where != "random" and plants_in(plan) == rank:
            plant(plan, places(plan.where), lambda: blow(plan, work))
        return launch.main([])

    def start(command: Sequence[str], env: Mapping[str, str], **_: Any) -> Forked:
        def rank() -> int:
            subprocess.Popen = REAL_POPEN  # type: ignore[misc]
            os.environ.clear()
            os.environ.update(env)
            return begin(int(env["RANK"]))

        forked = Forked(rank)
        with (work / "family").open("a") as file:
            print(f"rank {env['RANK']}: {forked.pid}", file=file)
        return forked

    subprocess.Popen = start  # type: ignore[misc, assignment]
    leave_with((lambda: launch.main([])) if plan.launcher else (lambda: unwatched(plan.ranks, start)))


def unwatched(ranks: int, start: Any) -> int:
    """Ranks that nobody looks after; the first exit code of those that left by themselves."""
    processes = [start([], os.environ | rank) for rank in ranks_here(ranks)]
    codes = [process.wait() for process in processes]
    return next((code for code in codes if code > 0), int(any(codes)))


# --------------------------------------------------------------------------------------------------------------- outside of it


class End(NamedTuple):
    """How a job ended: the launcher's wait status (None: somebody had to be ended), when it was struck, how long it then took."""

    status: int | None
    struck: bool
    left_s: float
    said: str
    second: str = ""


def attempt(config: ScaleConfig, plan: RankPlan, work: Path, *, real_verifier: bool = True, struck: bool = True) -> End:
    """One job under a plan, seen to its end."""
    (work / "struck").unlink(missing_ok=True)
    (work / "family").write_text("")
    read, write = os.pipe()
    os.set_blocking(read, False)
    try:
        launcher = job(config, plan, work, write, real_verifier=real_verifier, struck=struck)
        os.close(write)
        return see_out(launcher, plan if struck else None, work, read)
    finally:
        os.close(read)


def see_out(launcher: int, plan: RankPlan | None, work: Path, pipe: int) -> End:
    """Wait until every process of the job is gone, those that lost their parents too; do what the plan asks of the outside."""
    begin, said, status, second, todo = time.monotonic(), b"", None, "", ["SIGCONT", "SIGKILL"]
    struck_at, stood_still = None, False
    while True:
        with contextlib.suppress(BlockingIOError):
            said += os.read(pipe, 1 << 16)
        try:
            process, ended = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            break
        status = ended if process == launcher else status
        now = time.monotonic()
        if struck_at is None and (work / "struck").is_symlink():
            struck_at = float(os.readlink(work / "struck"))
        elif plan and struck_at is None and plan.where == "random" and now > begin + plan.delay_s:
            blow(plan, work)
        elif plan and struck_at is not None and plan.how == "SIGSTOP" and todo and now > struck_at + 0.15 * (3 - len(todo)):
            second = second or second_run(work, plan)
            for target in plan.struck(family(work, plan.ranks)):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(target, signal.Signals[todo[0]])
            todo.pop(0)
        if now > (struck_at or begin) + (plan.leave_s if plan else 300.0) and not stood_still:
            stood_still = True
            for target in family(work, plan.ranks if plan else 1).values():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(target, signal.SIGKILL)
        time.sleep(0.003 if not process else 0)
    left_s = time.monotonic() - struck_at if struck_at is not None else 0.0
    with contextlib.suppress(BlockingIOError):
        said += os.read(pipe, 1 << 20)
    return End(None if stood_still else status, struck_at is not None, left_s, said.decode(), second)


def second_run(work: Path, plan: RankPlan) -> str:
    """Whether a second run is kept away from the folder while this job's first rank, stopped or not, has it."""
    out, first = work / "run", family(work, plan.ranks)["rank 0"]
    if not (out / LOCK).exists() or (out / LOCK).read_text().strip() != str(first):  # it had not come so far
        return ""
    try:
        with own_folder(str(out)):
            return "accepted"
    except UserError:
        return "refused"


def judge(plan: RankPlan, end: End) -> str:
    """What is wrong with how a job ended; empty where nothing is."""
    lines = [line for line in end.said.splitlines() if line.startswith(("error:", "stopped"))]
    if end.status is None:
        return "stood still"
    if "Traceback" in end.said:
        return "traceback"
    if end.second == "accepted":
        return "second run accepted"
    code = os.waitstatus_to_exitcode(end.status)
    if not end.struck or code == 0:  # the blow found nobody, or nothing more to be done
        return f"exit code {code}" if code else "a line" * bool(lines)
    if plan.whom == "launcher" and plan.how == "SIGKILL":  # nobody is left to say it to
        return "" if code == -signal.SIGKILL and not lines else f"exit code {code}, {len(lines)} lines"
    allowed = {"SIGTERM": (STOPPED, 1), "full disk": (MISTAKE,)}.get(plan.how, (1,))
    if not plan.launcher:  # nobody says that all were killed; each rank says that the first one never came, or is gone
        allowed = (*allowed, MISTAKE) if "network: rank" in end.said else allowed
        survivors = plan.whom != "all ranks" and plan.ranks > 1
        return "" if code in allowed and survivors <= len(lines) <= plan.ranks else f"exit code {code}, {len(lines)} lines"
    return "" if code in allowed and len(lines) == 1 else f"exit code {code}, {len(lines)} lines"
