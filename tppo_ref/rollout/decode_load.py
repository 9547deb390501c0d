"""What each decode step carried and how long it took: the record from which a clock is calibrated (sim/clock/calibrate.py)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from tppo_ref.method.records import WindowSlice
from tppo_ref.method.slots import Segment
from tppo_ref.rollout.engine import Decoded, Request, RolloutEngine
from tppo_ref.rollout.turns import num_before


class DecodeStep(NamedTuple):
    """The load of one decode step, and how long it took.

    active            responses that got a token
    context_tokens    prompt and response tokens that they held before it, all together
    prefill_tokens    tokens that the engine read besides one per active response: of the requests that came before this step, all
                      but the last token each
    seconds           from the end of the step before, so prefill and the batcher's own work are in it
    """

    active: int
    context_tokens: int
    prefill_tokens: int
    seconds: float


def decode_steps(segments: Sequence[Segment], slices: Sequence[WindowSlice], step_ends_s: Sequence[float]) -> list[DecodeStep]:
    """Each decode step of a window, from what the batcher kept of it: `slices[i]` are the tokens of `segments[i]`.

    Sums over the window: active, the tokens sampled; seconds, the last entry of `step_ends_s`.
    """
    active, held, prefill = np.zeros((3, len(step_ends_s)), dtype=np.int64)
    for segment, part in zip(segments, slices, strict=True):
        context, busy = num_before(part.response, part.begin), segment.stop - segment.begin
        prefill[segment.begin] += context - 1
        active[segment.begin : segment.stop] += 1
        held[segment.begin : segment.stop] += np.arange(context, context + busy)
    seconds = np.diff(step_ends_s, prepend=0.0)
    return [DecodeStep(*row) for row in zip(active.tolist(), held.tolist(), prefill.tolist(), seconds.tolist(), strict=True)]


class ObservedEngine:
    """An engine that keeps the load and seconds of its decode steps in `steps`: for evaluation, whose batcher nobody keeps."""

    def __init__(self, engine: RolloutEngine, now: Callable[[], float] = time.perf_counter):
        self.engine, self.steps, self.now = engine, list[DecodeStep](), now
        self._held: dict[int, int] = {}  # prompt and response tokens when it came, by response
        self._context_tokens, self._prefill_tokens, self._last_end = 0, 0, now()

    @property
    def num_running(self) -> int:
        return self.engine.num_running

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._held[request.response_id] = len(request.token_ids)
            self._context_tokens += len(request.token_ids)
            self._prefill_tokens += len(request.token_ids) - 1
        self.engine.submit(requests)

    def step(self) -> list[Decoded]:
        decoded = self.engine.step()
        now, active = self.now(), len(self._held)
        self.steps.append(DecodeStep(active, self._context_tokens, self._prefill_tokens, now - self._last_end))
        self._last_end, self._prefill_tokens = now, 0
        self._context_tokens += active - sum(self._held.pop(d.response_id) + len(d.token_ids) for d in decoded)
        return decoded

    def sleep(self) -> None:
        self.engine.sleep()

    def load_weights(self, named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        self.engine.load_weights(named_tensors, version)
