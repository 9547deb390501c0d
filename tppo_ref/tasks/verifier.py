"""Scores of responses, computed in processes that can be killed while the main process decodes on.

A verifier is somebody's code on a language model's text: it may hang, raise, exit, print. One thread of the main
process feeds the workers over pipes, reads what they answer and watches the clock; `submit` only queues.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import math
import os
import selectors
import threading
import time
from collections.abc import Hashable, Sequence

from tppo_ref.method.errors import UserError, refusal
from tppo_ref.tasks.verifier_process import STATUSES, Ready, Request, Score, Worker
from tppo_ref.tasks.verifier_worker import MAX_SCORE

log = logging.getLogger("tppo_ref")

MAX_SENT = 32
"""Requests that a worker holds at a time: enough to hide a pipe's latency, few enough to share between workers."""
LINGER_S = 0.01
"""While nobody waits, the thread acts this often at most: every time it runs, it takes the interpreter from decoding."""
TOLD_AFTER_S = 5.0
"""An import that takes longer is told, once."""
STARTUP_S = 60.0
"""An import may take this long on a busy machine: sympy's takes seconds on an idle one."""


class Verifier:
    """Runs `verifier` ("module:function", see tasks.Task) in `num_workers` killable processes.

    timeout_s       wall-clock seconds for one response; then the worker is killed, its children too, and replaced
    failure_score   the value of a response whose verification failed in any way
    startup_timeout_s   seconds in which a worker has to import the verifier; None: 60, or timeout_s where that is more
    counts          how many verdicts of each status there were so far
    checks_references   whether the verifier's module has `wrap_reference(answer) -> text`, so that `submit_reference` works
    code            SHA-256 of what its processes have imported (`verifier_worker.code_digest`)

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
                raise UserError(refusal(f"verifier: {name}", f"{value}", "seconds above 0"))
        if "\0" in verifier:
            raise UserError(refusal("verifier", repr(verifier), "module:function"))
        if num_workers < 1:
            raise UserError(refusal("verifier: num_workers", f"{num_workers}", "at least 1"))
        if not abs(failure_score) <= MAX_SCORE:
            raise UserError(refusal("verifier: failure_score", f"{failure_score}", f"{-MAX_SCORE:g} to {MAX_SCORE:g}"))
        self.verifier, self.timeout_s, self.failure_score = verifier, timeout_s, failure_score
        self.startup_timeout_s = startup_timeout_s
        self.counts: collections.Counter[str] = collections.Counter(dict.fromkeys(STATUSES, 0))
        self._changed = threading.Condition()
        self._hurry = threading.Event()
        # Guarded by _changed:
        self._queue: collections.deque[Request] = collections.deque()
        self._pending: dict[Hashable, None] = {}
        self._scores: dict[Hashable, Score] = {}
        self._failure: BaseException | None = None
        self._num_ready = 0
        self.checks_references, self.code = False, ""
        self._asleep = False
        self._num_waiting = 0
        self._closing = False
        self._next_seq = 0
        # The thread's own:
        self._workers: list[Worker] = []
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
            self._queue.append(Request(seq, response_id, line))
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
        begin_s, longest_s, told = time.monotonic(), 2 * self.startup_timeout_s + 10.0, False
        with self._changed:
            while self._num_ready < num_workers:
                self._raise_failure()
                waited_s = time.monotonic() - begin_s
                if waited_s > longest_s:
                    raise UserError(refusal("verifier", f"{self.verifier!r}, not ready after {longest_s:g} s", "a ready process"))
                if waited_s > TOLD_AFTER_S and not told:
                    told = True
                    log.info("waiting for verifier %s to be imported (%g s at most)", self.verifier, self.startup_timeout_s)
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
        worker = Worker(self.verifier, self.timeout_s, self.startup_timeout_s)
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

    def _write(self, worker: Worker) -> None:
        worker.write()
        registered = worker.stdin in self._selector.get_map()
        if worker.unwritten and not registered:
            self._selector.register(worker.stdin, selectors.EVENT_WRITE, worker)
        elif not worker.unwritten and registered:
            self._selector.unregister(worker.stdin)

    def _wait_and_read(self, longest_s: float) -> None:
        first_s = min((worker.deadline_s for worker in self._workers), default=math.inf)
        events = self._selector.select(max(0.0, min(first_s - time.monotonic(), longest_s)))
        with self._changed:
            self._asleep = False
        for key, mask in events:
            worker = key.data
            if worker is None:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
            elif mask & selectors.EVENT_READ and worker in self._workers:
                self._read(worker)

    def _read(self, worker: Worker) -> None:
        lines, problem = worker.read()
        scores: list[tuple[Request, Score]] = []
        try:
            for line in lines:
                said = worker.take(line, self.failure_score)
                if isinstance(said, Ready):
                    with self._changed:
                        self._num_ready, self.checks_references, self.code = self._num_ready + 1, said.wraps, said.code
                        self._changed.notify_all()
                else:
                    scores.append(said)
        except ValueError:
            problem = "its process sent a line that is no answer"
        if scores:
            worker.clock_s = time.monotonic()
            self._publish(scores)
        if problem:
            self._replace(worker, "error", problem)

    def _publish(self, scores: list[tuple[Request, Score]]) -> None:
        with self._changed:
            for request, score in scores:
                del self._pending[request.response_id]
                self._scores[request.response_id] = score
                self.counts[score.status] += 1
            if not self._pending:
                self._changed.notify_all()

    def _check_clocks(self) -> None:
        for worker in list(self._workers):
            if time.monotonic() < worker.deadline_s:
                continue
            if not worker.ready:
                raise worker.not_imported()
            head = worker.sent[0]
            self._read(worker)  # its answer may be in the pipe, when this thread was kept from running
            if worker in self._workers and worker.sent and worker.sent[0] is head:
                self._replace(worker, "timeout", f"no answer within {self.timeout_s:g} s")

    def _replace(self, worker: Worker, status: str, detail: str) -> None:
        """Blames the request that the worker was at, gives the later ones back to the queue, starts a new worker."""
        if not worker.ready:
            raise worker.not_started(detail)
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
