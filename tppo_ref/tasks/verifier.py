"""Scores of responses, computed in processes that can be killed while the main process decodes on.

A verifier is somebody's code on a language model's text: it may hang, raise, exit, print. One thread of the main
process feeds the workers over pipes, reads what they answer and watches the clock; `submit` only queues.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Hashable, Sequence
from typing import IO, Any, NamedTuple

from tppo_ref.method.errors import UserError

STATUSES = ("ok", "timeout", "error", "bad_score")
MAX_SENT = 32
"""Requests that a worker holds at a time: enough to hide a pipe's latency, few enough to share between workers."""
LINGER_S = 0.01
"""While nobody waits, the thread acts this often at most: every time it runs, it takes the interpreter from decoding."""
STARTUP_S = 60.0
"""An import may take this long on a busy machine: sympy's takes seconds on an idle one."""
MAX_LINE_BYTES = 1 << 16
"""A worker's answer is shorter than this; a longer one is the verifier writing into the protocol."""


class Score(NamedTuple):
    """A verdict: the value that training uses, how it came about ("ok", "timeout", "error", "bad_score"), and why."""

    value: float
    status: str
    detail: str = ""


@dataclasses.dataclass
class _Request:
    seq: int
    response_id: Hashable
    line: bytes


class _Worker:
    """One process with its pipes, and the requests that it was sent and has not answered, in order."""

    def __init__(self, name: str, timeout_s: float, startup_timeout_s: float) -> None:
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
        self.sent: collections.deque[_Request] = collections.deque()
        self.unwritten = bytearray()
        self.unread = bytearray()
        self.ready = False
        self.clock_s = time.monotonic()
        """When the worker was started, or began the first of `sent`."""

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


class Verifier:
    """Runs `verifier` ("module:function", see tasks.Task) in `num_workers` killable processes.

    timeout_s       wall-clock seconds for one response; then the worker is killed, its children too, and replaced
    failure_score   the value of a response whose verification failed in any way
    startup_timeout_s   seconds in which a worker has to import the verifier; None: 60, or timeout_s where that is more
    counts          how many verdicts of each status there were so far
    checks_references   whether the verifier's module has `wrap_reference(answer) -> text`, so that `submit_reference` works

    UserError at construction where the function cannot be imported. What the verifier prints is discarded.
    """

    def __init__(
        self,
        verifier: str,
        timeout_s: float,
        num_workers: int = 1,
        failure_score: float = -1.0,
        *,
        startup_timeout_s: float | None = None,
    ) -> None:
        startup_timeout_s = max(STARTUP_S, timeout_s) if startup_timeout_s is None else startup_timeout_s
        for name, value in (("timeout_s", timeout_s), ("startup_timeout_s", startup_timeout_s)):
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"verifier: {name} is {value}, expected seconds above 0.")
        if num_workers < 1:
            raise UserError(f"verifier: num_workers is {num_workers}, expected at least 1.")
        if not math.isfinite(failure_score):
            raise UserError(f"verifier: failure_score is {failure_score}, expected a finite number.")
        self.verifier, self.timeout_s, self.failure_score = verifier, timeout_s, failure_score
        self.startup_timeout_s = startup_timeout_s
        self.counts: collections.Counter[str] = collections.Counter(dict.fromkeys(STATUSES, 0))
        self._changed = threading.Condition()
        self._hurry = threading.Event()
        # Guarded by _changed:
        self._queue: collections.deque[_Request] = collections.deque()
        self._pending: dict[Hashable, None] = {}
        self._scores: dict[Hashable, Score] = {}
        self._failure: BaseException | None = None
        self._num_ready = 0
        self.checks_references = False
        self._asleep = False
        self._num_waiting = 0
        self._closing = False
        self._next_seq = 0
        # The thread's own:
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._thread = threading.Thread(target=self._run, args=(num_workers,), name="verifier", daemon=True)
        self._thread.start()
        try:
            self._wait_until_ready(num_workers)
        except BaseException:
            self.close()
            raise

    # The caller's side.

    def submit(self, response_id: Hashable, answer: str, token_ids: Sequence[int], text: str | None = None) -> None:
        """Queues one response. ValueError if `response_id` is submitted and not yet collected."""
        self._submit(response_id, answer, list(token_ids), text)

    def submit_reference(self, response_id: Hashable, answer: str) -> None:
        """Queues a reference answer to be verified against itself: as if a response had said `wrap_reference(answer)`, without ids.

        ValueError where the verifier's module has no `wrap_reference`.
        """
        if not self.checks_references:
            raise ValueError(f"verifier {self.verifier!r} has no wrap_reference beside it")
        self._submit(response_id, answer, None, None)

    def _submit(self, response_id: Hashable, answer: str, token_ids: list[int] | None, text: str | None) -> None:
        with self._changed:
            self._raise_failure()
            if response_id in self._pending or response_id in self._scores:
                raise ValueError(f"verifier: response {response_id!r} is submitted already and not collected yet")
            seq = self._next_seq
            line = json.dumps([seq, answer, token_ids, text]).encode("ascii") + b"\n"
            self._next_seq += 1
            self._pending[response_id] = None
            self._queue.append(_Request(seq, response_id, line))
            if len(self._queue) >= MAX_SENT:
                self._hurry.set()
            if self._asleep:
                self._wake()

    def collect(self, timeout_s: float | None = None) -> dict[Hashable, Score]:
        """Waits for every submitted response; each score is given once.

        None waits as long as the verifications themselves may take. TimeoutError that names the missing responses after
        `timeout_s` seconds; what is done stays for the next call.
        """
        with self._changed:
            if timeout_s is None:
                timeout_s = (len(self._pending) + 1) * (self.timeout_s + self.startup_timeout_s)
            self._num_waiting += 1
            self._hurry.set()
            try:
                self._wait_for_scores(timeout_s)
            finally:
                self._num_waiting -= 1
            self._raise_failure()
            return self._take()

    def _wait_for_scores(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        while self._pending:
            self._raise_failure()
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                some = ", ".join(map(repr, list(self._pending)[:5]))
                raise TimeoutError(
                    f"verifier {self.verifier}: {len(self._pending)} responses not scored within {timeout_s:g} s, among them {some}"
                )
            self._changed.wait(min(left_s, 1.0))

    def poll(self) -> dict[Hashable, Score]:
        """The scores that are there, without waiting; each score is given once."""
        with self._changed:
            self._raise_failure()
            return self._take()

    @property
    def num_pending(self) -> int:
        """Responses submitted and not scored yet."""
        with self._changed:
            return len(self._pending)

    def close(self) -> None:
        """Kills the workers. May be called twice; scores that were not collected are gone."""
        with self._changed:
            self._closing = True
            self._hurry.set()
            if self._wake_write >= 0:
                self._wake()
        self._thread.join(timeout=10.0)
        with self._changed:
            if self._wake_write >= 0 and not self._thread.is_alive():
                os.close(self._wake_read)
                os.close(self._wake_write)
                self._wake_read = self._wake_write = -1

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _take(self) -> dict[Hashable, Score]:
        scores, self._scores = self._scores, {}
        return scores

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closing:
            raise RuntimeError(f"verifier {self.verifier} is closed")

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"\0")

    def _wait_until_ready(self, num_workers: int) -> None:
        # The thread enforces startup_timeout_s and reports a failure; the margin here is for a machine under load.
        deadline_s = time.monotonic() + 2 * self.startup_timeout_s + 10.0
        with self._changed:
            while self._num_ready < num_workers:
                self._raise_failure()
                if time.monotonic() > deadline_s:
                    raise UserError(f"verifier {self.verifier}: waited {2 * self.startup_timeout_s + 10:g} s for its workers.")
                self._changed.wait(1.0)

    # The thread's side.

    def _run(self, num_workers: int) -> None:
        try:
            self._selector.register(self._wake_read, selectors.EVENT_READ, None)
            for _ in range(num_workers):
                self._start_worker()
            while not self._closing:
                may_linger = self._feed()
                if may_linger:
                    self._hurry.wait(LINGER_S)
                self._wait_and_read(0.0 if may_linger else 5.0)
                self._check_clocks()
        except BaseException as error:  # told to whoever submits or collects next
            with self._changed:
                self._failure = error
                self._changed.notify_all()
        finally:
            for worker in self._workers:
                worker.kill()
            self._selector.close()

    def _start_worker(self) -> None:
        worker = _Worker(self.verifier, self.timeout_s, self.startup_timeout_s)
        self._workers.append(worker)
        self._selector.register(worker.stdout, selectors.EVENT_READ, worker)

    def _feed(self) -> bool:
        """Deals queued requests to the workers with the fewest, and writes what their pipes take.

        True while there is something to do and nobody waits for it: then the thread may linger.
        """
        with self._changed:
            ready = [worker for worker in self._workers if worker.ready]
            while self._queue and ready:
                worker = min(ready, key=lambda w: len(w.sent))
                if len(worker.sent) >= MAX_SENT:
                    break
                request = self._queue.popleft()
                if not worker.sent:
                    worker.clock_s = time.monotonic()
                worker.sent.append(request)
                worker.unwritten += request.line
            leisure = self._num_waiting == 0 and len(self._queue) < MAX_SENT
            if leisure and not self._closing:
                self._hurry.clear()
            may_linger = leisure and bool(self._pending)
            self._asleep = not may_linger  # from here on `submit` wakes the selector
        for worker in list(self._workers):
            if worker.unwritten:
                self._write(worker)
        return may_linger

    def _write(self, worker: _Worker) -> None:
        try:
            written = os.write(worker.stdin, worker.unwritten)
        except BlockingIOError:
            written = 0
        except BrokenPipeError:
            return  # the end of its stdout says the same, after its last answers
        del worker.unwritten[:written]
        registered = worker.stdin in self._selector.get_map()
        if worker.unwritten and not registered:
            self._selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
        elif not worker.unwritten and registered:
            self._selector.unregister(worker.stdin)

    def _wait_and_read(self, longest_s: float) -> None:
        now_s = time.monotonic()
        deadlines_s = [self._deadline_s(worker) for worker in self._workers]
        wait_s = max(0.0, min([deadline_s - now_s for deadline_s in deadlines_s] + [longest_s]))
        events = self._selector.select(wait_s)
        with self._changed:
            self._asleep = False
        for key, mask in events:
            worker = key.data
            if worker is None:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
            elif mask & selectors.EVENT_READ and worker in self._workers:
                self._read(worker)

    def _deadline_s(self, worker: _Worker) -> float:
        if not worker.ready:
            return worker.clock_s + self.startup_timeout_s
        return worker.clock_s + self.timeout_s if worker.sent else math.inf

    def _read(self, worker: _Worker) -> None:
        try:
            data = os.read(worker.stdout, 1 << 16)
        except BlockingIOError:
            return
        worker.unread += data
        *lines, rest = worker.unread.split(b"\n")
        worker.unread = bytearray(rest)
        scores: list[tuple[_Request, Score]] = []
        problem = "its answer is too long" if len(rest) > MAX_LINE_BYTES else ""
        for line in lines:
            problem = problem or self._understand(worker, bytes(line), scores)
        if scores:
            worker.clock_s = time.monotonic()
            self._publish(scores)
        if not data and not problem:
            try:
                problem = f"the verifier's process ended with code {worker.process.wait(timeout=0.5)}"
            except subprocess.TimeoutExpired:
                problem = "the verifier closed the pipes of its process"
        if problem:
            self._replace(worker, "error", problem)

    def _understand(self, worker: _Worker, line: bytes, scores: list[tuple[_Request, Score]]) -> str:
        """Takes one line of a worker into `scores`; what is wrong with it, or an empty string."""
        try:
            message: Any = json.loads(line)
            kind = message[0]
            if kind == "ready":
                worker.ready = True
                with self._changed:
                    self._num_ready, self.checks_references = self._num_ready + 1, bool(message[1])
                    self._changed.notify_all()
                return ""
            if kind == "fatal":
                raise UserError(
                    f"verifier {self.verifier!r} cannot be used: {message[1]}. Expected the dotted name of an importable "
                    "module, a colon and a function, such as tppo_ref.tasks.chain:verify."
                )
            seq, status, value, detail = message
            if not worker.sent or seq != worker.sent[0].seq or status not in STATUSES:
                raise ValueError
            score = Score(float(value) if status == "ok" else self.failure_score, status, detail)
        except (ValueError, TypeError, KeyError, IndexError):
            return "its process sent a line that is no answer"
        scores.append((worker.sent.popleft(), score))
        return ""

    def _publish(self, scores: list[tuple[_Request, Score]]) -> None:
        with self._changed:
            for request, score in scores:
                del self._pending[request.response_id]
                self._scores[request.response_id] = score
                self.counts[score.status] += 1
            if not self._pending:
                self._changed.notify_all()

    def _check_clocks(self) -> None:
        for worker in list(self._workers):
            if time.monotonic() < self._deadline_s(worker):
                continue
            if not worker.ready:
                raise UserError(
                    f"verifier {self.verifier!r}: not imported within {self.startup_timeout_s:g} s "
                    f"({worker.last_words()}); make its module lighter, or raise task.verifier_timeout_s beyond that."
                )
            head = worker.sent[0]
            self._read(worker)  # its answer may be in the pipe, when this thread was kept from running
            if worker in self._workers and worker.sent and worker.sent[0] is head:
                self._replace(worker, "timeout", f"no answer within {self.timeout_s:g} s")

    def _replace(self, worker: _Worker, status: str, detail: str) -> None:
        """Blames the request that the worker was at, gives the later ones back to the queue, starts a new worker."""
        if not worker.ready:
            raise UserError(f"verifier {self.verifier!r}: its process did not start: {detail} ({worker.last_words()}).")
        self._workers.remove(worker)
        self._selector.unregister(worker.stdout)
        if worker.stdin in self._selector.get_map():
            self._selector.unregister(worker.stdin)
        worker.kill()
        if worker.sent:
            blamed = worker.sent.popleft()
            self._publish([(blamed, Score(self.failure_score, status, detail))])
        with self._changed:
            self._queue.extendleft(reversed(worker.sent))
        self._start_worker()


__all__ = ["STATUSES", "Score", "Verifier"]
