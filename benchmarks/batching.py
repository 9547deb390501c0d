"""What successive batching itself costs: microseconds per response event and per generated token, without a model.

    python -m benchmarks.batching

Aims: at most 2 us per response event (a grant or a segment) for the schedule, at most 2 us per generated token for the batcher. A
machine's absolute speed differs, so each is also given as a multiple of a Python loop that does nothing per token, in the same run.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np

from benchmarks.common import report
from tppo_ref.method.records import Prompt
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.batcher import SampleStream, SuccessiveBatcher
from tppo_ref.rollout.engine import Decoded, Request

SLOTS, WINDOW, CAP = 512, 1024, 4096


def lengths(n: int) -> list[int]:
    """Response lengths with a heavy tail: log-normal, mean about half a window, capped."""
    return np.random.default_rng(0).lognormal(5.7, 1.0, n).astype(int).clip(1, CAP).tolist()


def time_schedule(windows: int) -> tuple[float, int]:
    """Seconds and events (grants and segments) of the schedule alone, driven event by event with known lengths."""
    natural = lengths(200_000)
    ids = itertools.count()
    draw = lambda: next(ids)  # noqa: E731
    schedule = SlotSchedule(slots=SLOTS, window=WINDOW, max_response_tokens=CAP)
    done: dict[int, int] = {}
    seconds, events = 0.0, 0
    for _ in range(windows):
        begin = time.perf_counter()
        grants = schedule.open_window(draw)
        seconds += time.perf_counter() - begin
        calendar: dict[int, list[tuple[int, int, bool]]] = {}
        now = 0
        while grants or calendar:
            events += len(grants)
            for grant in grants:
                left = natural[grant.response] - done.get(grant.response, 0)
                new = min(left, grant.max_new_tokens)
                done[grant.response] = done.get(grant.response, 0) + new
                calendar.setdefault(now + new, []).append((grant.response, new, left <= grant.max_new_tokens))
            now = min(calendar)
            finished = calendar.pop(now)
            begin = time.perf_counter()
            segments, grants = schedule.finish(now, finished, draw)
            seconds += time.perf_counter() - begin
            events += len(segments)
    return seconds, events


class ReplayEngine:
    """Hands back tokens that were made beforehand, at the step at which a real engine would: response r ends at natural[r]."""

    def __init__(self, natural: Sequence[int] | None = None, cap: int = CAP) -> None:
        self.natural = natural if natural is not None else lengths(200_000)
        self.tokens, self.logprobs = list(range(cap)), [-0.5] * cap
        self.done: dict[int, int] = {}
        self.now = 0
        self.calendar: dict[int, list[Decoded]] = {}
        self.num_running = 0
        self.seconds = 0.0

    def submit(self, requests: Sequence[Request]) -> None:
        begin = time.perf_counter()
        for r in requests:
            left = self.natural[r.response_id] - self.done.get(r.response_id, 0)
            new = min(left, r.max_new_tokens)
            self.done[r.response_id] = self.done.get(r.response_id, 0) + new
            decoded = Decoded(response_id=r.response_id, token_ids=self.tokens[:new], logprobs=self.logprobs[:new],
                              end_token=left <= r.max_new_tokens)  # fmt: skip
            self.calendar.setdefault(self.now + new, []).append(decoded)
        self.seconds += time.perf_counter() - begin

    def step(self) -> list[Decoded]:
        self.now += 1
        return self.calendar.pop(self.now, [])

    def sleep(self) -> None:
        pass

    def load_weights(self, named_tensors: object, version: int) -> None:
        pass


def time_batcher(windows: int) -> tuple[float, int]:
    """Seconds (the replay engine's taken off) and tokens of the batcher."""
    engine = ReplayEngine()
    stream = SampleStream([Prompt(id=i, token_ids=(1, 2, 3), answer="") for i in range(64)], samples_per_prompt=1, seed=0)
    batcher = SuccessiveBatcher(SlotSchedule(slots=SLOTS, window=WINDOW, max_response_tokens=CAP), stream, run_seed=0)
    begin = time.perf_counter()
    for _ in range(windows):
        batcher.window(engine)
    return time.perf_counter() - begin - engine.seconds, batcher.num_generated_tokens


def time_empty_loop(n: int = 2_000_000) -> float:
    begin = time.perf_counter()
    for _ in range(n):
        pass
    return (time.perf_counter() - begin) / n


def main() -> None:
    loop_s = time_empty_loop()
    schedule_s, events = time_schedule(40)
    batcher_s, tokens = time_batcher(40)
    rows = [
        {"what": "schedule, per response event", "us": round(1e6 * schedule_s / events, 3), "aim_us": 2.0,
         "empty_loops": round(schedule_s / events / loop_s, 1), "count": events},
        {"what": "batcher, per generated token", "us": round(1e6 * batcher_s / tokens, 3), "aim_us": 2.0,
         "empty_loops": round(batcher_s / tokens / loop_s, 1), "count": tokens},
    ]  # fmt: skip
    report("batching", rows)


if __name__ == "__main__":
    main()
