"""What is measured of a run: one glossary of metrics, and the sinks that they are written to.

A name that is not in GLOSSARY cannot be logged. docs/metrics.md is this table, and a test holds the two and the logged keys equal.
"""

from __future__ import annotations

import csv
import json
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tppo_ref.method.errors import UserError, refusal
from tppo_ref.runs.glossary import GLOSSARY, Metric
from tppo_ref.runs.repair import take_back

WANDB_RUN_ID = "wandb-run-id"


class MetricLog:
    """Metrics of a run as JSON lines and TensorBoard events, and on Weights & Biases where asked for; a run that goes on continues,
    one that starts anew (`resume_step` None) begins all of them anew.

    `metrics.jsonl` holds one object a record: step, then names of the glossary. Lines after `resume_step` (written after the
    checkpoint from which a run goes on) are taken back; `kept` are those before.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resume_step: int | None = None,
        tensorboard: bool = True,
        wandb_project: str = "",
        glossary: Mapping[str, Metric] | None = None,
    ):
        self.path, self._glossary = folder / "metrics.jsonl", glossary or GLOSSARY
        self.kept: list[dict[str, Any]] = []
        if resume_step is None:
            forget_curves(folder)
        else:
            self.kept = [_record(line) for line in take_back(self.path, resume_step, lambda line: int(_record(line)["step"]))]
        self.file = self.path.open("a")
        self._events = EventFile(folder / "tensorboard", resume_step) if tensorboard else None
        self._wandb = _wandb_run(wandb_project, folder) if wandb_project else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one record. A name outside of the glossary is a KeyError: it is complete by construction."""
        unknown = [name for name in metrics if name not in self._glossary]
        if unknown:
            raise KeyError(f"metrics not in GLOSSARY: {unknown}")
        # NaN is not JSON: an undefined metric (accuracy of a step without an ended response) is null.
        record = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.file.write(json.dumps({"step": step, **record}) + "\n")
        self.file.flush()
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if self._events:
            self._events.write(step, finite)
        if self._wandb:
            self._wandb.log({"step": step} | finite)

    def close(self) -> None:
        self.file.close()
        if self._events:
            self._events.close()
        if self._wandb:
            self._wandb.finish()


def forget_curves(folder: Path) -> None:
    """Take away what an earlier run of this folder measured, and what W&B knows it by: its curves would mix with the new run's."""
    for stale in (folder / "metrics.jsonl", folder / WANDB_RUN_ID, *(folder / "tensorboard").glob("events.out.tfevents.*")):
        stale.unlink(missing_ok=True)


class EventFile:
    """TensorBoard's event file of a run or its continuation, which takes back the steps after `resume_step`.

    tensorboard's own writer has a thread, whose errors (a full disk) end in a traceback beside ours, and which a kill interrupts
    minutes behind the run.
    """

    def __init__(self, folder: Path, resume_step: int | None):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
        self._event, self._writer = Event, RecordWriter((folder / name).open("xb"))
        self._write(file_version="brain.Event:2")
        if resume_step is not None:
            self._write(step=resume_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """One event for all of them: an event each is dearer than the rest of the record."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._write(step=step, summary=Summary(value=values))

    def _write(self, **content: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **content).SerializeToString())
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _wandb_run(project: str, folder: Path) -> Any:
    """The W&B run of a folder: the same one after a restart. Its x axis is our step: W&B's own cannot go back to a checkpoint."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"run.wandb_project: got {project}; expected wandb to be installed; pip install wandb, or leave it out"
        ) from None
    known = folder / WANDB_RUN_ID
    run = wandb.init(project=project, name=folder.name, dir=str(folder), id=known.read_text() if known.exists() else None,
                     resume="allow")  # fmt: skip
    known.write_text(run.id)
    run.define_metric("*", step_metric="step")
    return run


class Table:
    """A CSV file that grows by rows whose first column is the step; takes back rows after `resume_step`.

    num_rows   by step, the rows that were kept
    """

    def __init__(self, path: Path, columns: Sequence[str], *, resume_step: int | None = None):
        self.path, self.num_rows = path, Counter[int]()

        def step_of(line: bytes) -> int:
            (row,) = csv.reader([line.decode("ascii")])
            if len(row) != len(columns):
                raise ValueError(f"{len(row)} fields")
            return int(row[0])

        header = ",".join(columns).encode() + b"\r"
        if resume_step is None:
            path.write_bytes(header + b"\n")
        else:
            self.num_rows.update(map(step_of, take_back(path, resume_step, step_of, header)))
        self.file = path.open("a", newline="")
        self._writer = csv.writer(self.file)

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        self._writer.writerows(rows)

    def flush(self) -> None:
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A last line that was cut off by a kill is left out; UserError for any other that is none."""
    *lines, _ = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_record(line))
        except (ValueError, RecursionError):
            raise UserError(refusal("metrics", f"{path}, of which line {number} is no record", "a JSON object with its step",
                                    "go on with the run, which moves it aside, or remove the line")) from None  # fmt: skip
    return records


def _record(line: bytes) -> dict[str, Any]:
    """A line of metrics.jsonl; ValueError where it is none."""
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError("no record of a step")
    return record
