"""Processes that make runs at equal tokens, one after the other; one that dies costs the run it was at.

python -m benchmarks.workers     # a worker: a job a line in, an answer a line out; `run_all` starts them

What the programs that ask for such runs share: `parser`, `parsed`, `command`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from benchmarks.equal_tokens import BUDGET, NUM_MARKS, Arm, Job, Row, append, keep_whole, quiet, read_whole, run_one
from tppo_ref.method.errors import UserError, refusal
from tppo_ref.runs.exits import exit_code

WORKER = (sys.executable, "-m", "benchmarks.workers")


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


def serve(lines: Iterable[str], protocol: TextIO) -> None:
    """The worker's side: a job a line in, an answer a line out."""
    for line in lines:
        answer: Row
        try:
            asked = json.loads(line)
            answer = {"rows": run_one(Job(**asked | {"what": Arm(*asked["what"])}))}
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
            with contextlib.suppress(queue.Empty):  # before the kills: a worker replaces a process that died while runs wait
                while True:
                    waiting.get_nowait()
            for worker in workers:
                worker.kill()
            raise
    return failed


def parser(doc: str | None, *, seeds: int, out: Path | None) -> argparse.ArgumentParser:
    """Options of a program that makes such runs. out: where to; None: the program says."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--seeds", type=int, default=seeds, help="so many, from the first on; 0 makes no run, only shows")
    made.add_argument("--budget", type=int, default=BUDGET, help="generated tokens of a run")
    made.add_argument("--eval-prompts", type=int, default=256)
    made.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    made.add_argument("--cache", default="runs/cache", help="folder of base models and pre-trained critics")
    made.add_argument("--out", type=Path, default=out)
    return made


def parsed(options: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Exit code 2 and a line where a number is too small."""
    arguments = options.parse_args(argv)
    for name, least in (("seeds", 0), ("budget", NUM_MARKS), ("eval_prompts", 1), ("jobs", 1)):
        if getattr(arguments, name) is not None and getattr(arguments, name) < least:
            options.error(f"--{name.replace('_', '-')}: got {getattr(arguments, name)}; expected an integer of at least {least}")
    return arguments


def check_file(path: Path) -> None:
    """UserError where --out asks for a file, or for a folder of it, at what is the other."""
    nearest = next(place for place in path.parents if place.exists())
    if not nearest.is_dir():
        raise UserError(refusal("--out", f"{nearest}, a file", "a folder", "choose another"))
    if path.is_dir():
        raise UserError(refusal("--out", f"{path}, a folder", "a file", "choose another"))


def command(plan: Callable[[list[Row]], Sequence[Job]], path: Path, num_workers: int, show: Callable[[list[Row]], None]) -> int:
    """Make the runs that `plan` finds missing among those of `path`, then `show` all that are there.

    Exit codes: 0 done, 1 runs failed, 2 a user's mistake, 130 Ctrl-C and SIGTERM.
    """

    def make() -> int:
        try:
            quiet()
            check_file(path)
            jobs = plan(keep_whole(path))
            failed = run_all(jobs, path, num_workers)
        except KeyboardInterrupt:
            left = f"stopped; whole runs are in {path}, and the same command goes on with the others"
            raise KeyboardInterrupt(left) from None
        show(read_whole(path)[0])
        for line in failed:
            print(f"failed: {line}", file=sys.stderr)
        print(f"{len(jobs) - len(failed)} runs made, {len(failed)} failed; runs are in {path}")
        return 1 if failed else 0

    return exit_code(make)


def main() -> None:
    quiet()
    with os.fdopen(os.dup(1), "w") as protocol:
        os.dup2(2, 1)  # whatever else is printed must not break the protocol
        serve(sys.stdin, protocol)


if __name__ == "__main__":
    main()
