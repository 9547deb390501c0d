"""What is measured of a run: one glossary of metrics, and the sinks that they are written to.

A name that is not in GLOSSARY cannot be logged. docs/metrics.md is this table, and a test holds the two and the logged keys equal.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tppo_ref.method.errors import UserError
from tppo_ref.runs.glossary import GLOSSARY, Metric


class MetricLog:
    """Metrics of a run as JSON lines and TensorBoard events, and on Weights & Biases where asked for; a run that goes on continues.

    `metrics.jsonl` holds one object a record: step, then names of the glossary. Lines after `resume_step` (written after the
    checkpoint from which a run goes on) are taken back.
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
        if resume_step is None:
            self.path.unlink(missing_ok=True)
        elif self.path.exists():
            kept = [record for record in read_metrics(self.path) if record["step"] <= resume_step]
            beside = self.path.with_suffix(".new")  # renamed: a kill here must not lose what was there
            beside.write_text("".join(json.dumps(record) + "\n" for record in kept))
            os.replace(beside, self.path)
        self._file = self.path.open("a")
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=None if resume_step is None else resume_step + 1)
        self._wandb = _wandb_run(wandb_project, folder) if wandb_project else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one record. A name outside of the glossary is a KeyError: it is complete by construction."""
        unknown = [name for name in metrics if name not in self._glossary]
        if unknown:
            raise KeyError(f"metrics not in GLOSSARY: {unknown}")
        # NaN is not JSON: an undefined metric (accuracy of a step without an ended response) is null.
        record = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **record}) + "\n")
        self._file.flush()
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if self._writer:
            from tensorboard.compat.proto.summary_pb2 import Summary

            # One event for all of them: an event each, as add_scalar writes them, is dearer than the rest of the record.
            values = [Summary.Value(tag=name, simple_value=value) for name, value in finite.items()]
            self._writer._get_file_writer().add_summary(Summary(value=values), step)
        if self._wandb:
            self._wandb.log({"step": step} | finite)

    def close(self) -> None:
        self._file.close()
        if self._writer:
            self._writer.close()
        if self._wandb:
            self._wandb.finish()


def _wandb_run(project: str, folder: Path) -> Any:
    """The W&B run of a folder: the same one after a restart. Its x axis is our step: W&B's own cannot go back to a checkpoint."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"run.wandb_project: got {project}; expected wandb to be installed; pip install wandb, or leave it out"
        ) from None
    known = folder / "wandb-run-id"
    run = wandb.init(project=project, name=folder.name, dir=str(folder), id=known.read_text() if known.exists() else None,
                     resume="allow")  # fmt: skip
    known.write_text(run.id)
    run.define_metric("*", step_metric="step")
    return run


class Table:
    """A CSV file that grows by rows whose first column is the step; takes back rows after `resume_step`."""

    def __init__(self, path: Path, columns: Sequence[str], *, resume_step: int | None = None):
        rows = []
        if resume_step is not None and path.exists():
            with path.open(newline="") as file:
                whole = [row for row in list(csv.reader(file))[1:] if len(row) == len(columns)]  # a kill may tear the last one
                rows = [row for row in whole if int(row[0]) <= resume_step]
        beside = path.with_suffix(".new")  # renamed: a kill here must not lose what was there
        with beside.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
        os.replace(beside, path)
        self._file = path.open("a", newline="")
        self._writer = csv.writer(self._file)

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        self._writer.writerows(rows)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A last line that was cut off by a kill is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records
