"""What some training steps did, call by call: a trace of torch's profiler per rank, and on CUDA a snapshot of the memory.

    --run.profile_steps 3:5        steps 3, 4 and 5, counted from 1

out/profile/steps-3-5-rank0.json.gz     Chrome's trace format: open it at ui.perfetto.dev or chrome://tracing
out/profile/steps-3-5-rank0.pickle      CUDA only: the allocator's history, for pytorch.org/memory_viz. Torch writes no other
                                        format; nothing here reads it

Bounded, whatever the batch and however long the responses: of each phase the first DECODE_STEPS decode steps or the first PASSES
passes of a model are traced, and the history keeps its latest EVENTS events. The steps that are traced are slower; their seconds
and MFU are in the metrics all the same.
"""

from __future__ import annotations

import gzip
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from tppo_ref.loop.meters import Meters
from tppo_ref.runs.run_folder import writing
from tppo_ref.runs.validation import steps_of

log = logging.getLogger("tppo_ref")

DECODE_STEPS, PASSES, EVENTS = 16, 8, 100_000


class Profiler:
    """`with profiler(step): ...` traces the steps that are asked for, and costs the others nothing. The `Witness` of its meters."""

    def __init__(self, folder: Path, steps: str, meters: Meters, rank: int):
        self.folder, self.meters, self.rank = folder, meters, rank
        self.steps = steps_of(steps) or range(0)
        self.first = self.step = 0  # of those that are traced: a run may end, or go on, among them
        self.cuda = meters.device.type == "cuda"
        self.traces: list[Any] = []
        self.now: ExitStack | None = None  # what is being traced
        self.calls = self.most = 0

    @contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        if step not in self.steps:
            yield
            return
        if not self.traces:
            self.first = step
            if self.cuda:
                torch.cuda.memory._record_memory_history(max_entries=EVENTS)
        self.step, self.meters.witness = step, self
        try:
            yield
        finally:
            self.meters.witness = None
            self.end()
        if step == self.steps[-1]:
            self.close()

    def begin(self, phase: str) -> None:
        """A phase begins."""
        self.calls, self.most = 0, DECODE_STEPS if phase == "rollout" else PASSES
        kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if self.cuda else [])]
        self.now = ExitStack()
        self.traces.append(self.now.enter_context(torch.profiler.profile(activities=kinds)))
        self.now.enter_context(torch.profiler.record_function(f"step {self.step}: {phase}"))

    def call(self) -> None:
        """A decode step or a pass of a model is about to begin: enough of them, and the rest of the phase is not traced."""
        self.calls += 1
        if self.calls > self.most:
            self.end()

    def end(self) -> None:
        """The phase is over, or enough of it was traced."""
        if self.now is not None:
            self.now.close()
            self.now = None

    def close(self) -> None:
        """Write down what there is: after the last of the steps, or as the run ends before it."""
        if not self.traces:
            return
        self.folder.mkdir(exist_ok=True)
        name = self.folder / f"steps-{self.first}-{self.step}-rank{self.rank}"
        with writing(self.folder):
            if self.cuda:
                torch.cuda.memory._dump_snapshot(f"{name}.pickle")
                torch.cuda.memory._record_memory_history(enabled=None)
            with gzip.open(f"{name}.json.gz", "wt") as file:
                json.dump(joined(self.traces), file)
        self.traces = []
        if self.rank == 0:
            log.info("profile of steps %d to %d, a file of each rank: %s.json.gz", self.first, self.step, name)


def joined(traces: list[Any]) -> dict[str, Any]:
    """Several traces of one process as one, each at its time."""
    whole: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for trace in traces:
            trace.export_chrome_trace(f"{folder}/trace.json")
            part = json.loads(Path(folder, "trace.json").read_text())
            whole = whole or {**part, "traceEvents": []}
            later_us = (part.get("baseTimeNanoseconds", 0) - whole.get("baseTimeNanoseconds", 0)) / 1e3
            for event in part["traceEvents"]:
                if "ts" in event:
                    event["ts"] += later_us
            whole["traceEvents"] += part["traceEvents"]
    return whole
