"""One killable process of a verifier, as its parent holds it: the pipes, the clock, and what it was asked. `verifier` drives it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Hashable
from typing import IO, Any, NamedTuple

from tppo_ref.method.errors import UserError, refusal

STATUSES = ("ok", "timeout", "error", "bad_score")
MAX_LINE_BYTES = 1 << 16
"""A worker's answer is shorter than this; a longer one is the verifier writing into the protocol."""


class Score(NamedTuple):
    """A verdict: the value that training uses, how it came about ("ok", "timeout", "error", "bad_score"), and why."""

    value: float
    status: str
    detail: str = ""


class Ready(NamedTuple):
    """What a process says once it has imported its verifier: whether that wraps references, and the digest of its code."""

    wraps: bool
    code: str


@dataclasses.dataclass
class Request:
    """One line for a worker: what it asks to be scored, under which number, for whom."""

    seq: int
    response_id: Hashable
    line: bytes


class Worker:
    """One process with its pipes, and the requests that it was sent and has not answered, in order."""

    def __init__(self, name: str, timeout_s: float, startup_timeout_s: float) -> None:
        self.name, self.timeout_s, self.startup_timeout_s = name, timeout_s, startup_timeout_s
        self.stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed in kill)
        # The worker finds what this process finds, the folder of the running script included, and no more (-P).
        command = [sys.executable, "-P", "-m", "tppo_ref.tasks.verifier_worker", name, repr(timeout_s), repr(startup_timeout_s)]
        path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C reaches the parent only, and the worker's children die with it
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.stdin, False)
        os.set_blocking(self.stdout, False)
        self.sent: collections.deque[Request] = collections.deque()
        self.unwritten = bytearray()
        self.unread = bytearray()
        self.ready = False
        self.clock_s = time.monotonic()
        """When the worker was started, or began the first of `sent`."""

    @property
    def deadline_s(self) -> float:
        """When the process has to have been imported, or to have answered; by `time.monotonic`."""
        if not self.ready:
            return self.clock_s + self.startup_timeout_s
        return self.clock_s + self.timeout_s if self.sent else math.inf

    def write(self) -> None:
        """Writes what the pipe takes of `unwritten`."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):  # the end of stdout says the latter, after its last answers
            del self.unwritten[: os.write(self.stdin, self.unwritten)]

    def read(self) -> tuple[list[bytes], str]:
        """The whole lines that are there, and what is wrong with the pipe, or an empty string."""
        try:
            data = os.read(self.stdout, 1 << 16)
        except BlockingIOError:
            return [], ""
        *lines, rest = (self.unread + data).split(b"\n")
        self.unread = rest
        if data:
            return [bytes(line) for line in lines], "its answer is too long" if len(rest) > MAX_LINE_BYTES else ""
        try:
            return [], f"the verifier's process ended with code {self.process.wait(timeout=0.5)}"
        except subprocess.TimeoutExpired:
            return [], "the verifier closed the pipes of its process"

    def take(self, line: bytes, failure_score: float) -> Ready | tuple[Request, Score]:
        """What a line says: that the process is ready; or the score of the oldest request.

        ValueError for a line that is neither; UserError where the process cannot use the verifier.
        """
        try:
            message: Any = json.loads(line)
            if message[0] == "ready":
                self.ready = True
                return Ready(bool(message[1]), str(message[2]))
            if message[0] == "fatal":
                expected = "the dotted name of an importable module, a colon and a function, such as tppo_ref.tasks.chain:verify"
                raise UserError(refusal("verifier", f"{self.name!r}, which cannot be used ({message[1]})", expected))
            seq, status, value, detail = message
            if not self.sent or seq != self.sent[0].seq or status not in STATUSES:
                raise ValueError
            score = Score(float(value) if status == "ok" else failure_score, status, detail)
        except (TypeError, KeyError, IndexError):
            raise ValueError from None
        return self.sent.popleft(), score

    def not_imported(self) -> UserError:
        """The refusal of a verifier whose import is over its time."""
        return UserError(refusal(
            "verifier", f"{self.name!r}, not imported within {self.startup_timeout_s:g} s ({self.last_words()})",
            "a module that is quick to import", "make it lighter, or raise task.verifier_timeout_s beyond that",
        ))  # fmt: skip

    def not_started(self, detail: str) -> UserError:
        """The refusal of a verifier whose process ended before it was imported."""
        got = f"{self.name!r}, whose process did not start: {detail} ({self.last_words()})"
        return UserError(refusal("verifier", got, "a module that can be imported"))

    def kill(self) -> None:
        """Ends the process and its children now, and closes the pipes."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout, self.stderr):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        self.process.wait()

    def last_words(self) -> str:
        """The last line that the process wrote to stderr before it was ready."""
        self.stderr.seek(0)
        lines = self.stderr.read().decode("utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "nothing on stderr"


__all__ = ["STATUSES", "Ready", "Request", "Score", "Worker"]
