"""The files that a run leaves: what it was (config, versions), what happened (metrics, tables), what it answered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tppo_ref.rollout.batcher import Batcher
from tppo_ref.rollout.decode_load import DecodeStep, decode_steps
from tppo_ref.runs.glossary import Metric
from tppo_ref.runs.repair import tell_what_is_missing
from tppo_ref.runs.run_folder import refuse_if_gone, write_json, writing
from tppo_ref.runs.sinks import MetricLog, Table
from tppo_ref.runs.versions import versions

RESPONSES = ("step", "train_s", "response", "prompt", "tokens", "end", "score")
TIMELINE = ("step", "slot", "response", "begin_s", "stop_s", "tokens", "end")
DECODE = ("step", "decode_step", *DecodeStep._fields)


class RunFiles:
    """Opened by the rank that writes; a run that goes on takes back what was written after its checkpoint.

    timeline   write timeline.csv, decode.csv and eval_decode.csv, too
    """

    def __init__(
        self,
        out: Path,
        config: Mapping[str, Any],
        glossary: Mapping[str, Metric],
        *,
        resume_step: int | None,
        timeline: bool,
        wandb_project: str = "",
    ):
        self.out, self._timeline_wanted = out, timeline
        with writing(out):
            self._open(config, glossary, resume_step, wandb_project)

    def _open(self, config: Mapping[str, Any], glossary: Mapping[str, Metric], resume_step: int | None, wandb_project: str) -> None:
        out = self.out
        write_json(out / "config.json", config)
        write_json(out / "versions.json", versions())
        self.log = MetricLog(out, resume_step=resume_step, wandb_project=wandb_project, glossary=glossary)
        self.responses = Table(out / "responses.csv", RESPONSES, resume_step=resume_step)
        self.timeline = Table(out / "timeline.csv", TIMELINE, resume_step=resume_step)
        self.decode = Table(out / "decode.csv", DECODE, resume_step=resume_step)
        self.eval_decode = Table(out / "eval_decode.csv", DECODE, resume_step=resume_step)
        self._tables = (self.responses, self.timeline, self.decode, self.eval_decode)
        if resume_step is not None:
            tell_what_is_missing(out, self.log.kept, self.responses.num_rows, resume_step)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Around whatever is written: UserError where the folder is gone, replaced or full."""
        with writing(self.out):
            for sink in (self.log, *self._tables):
                refuse_if_gone(sink.file, sink.path)
            yield

    def write_window(self, step: int, begin_s: float, batcher: Batcher) -> None:
        """The slots and decode steps of this rank's last window, which began at `begin_s` on the training clock."""
        if not self._timeline_wanted:
            return
        at = [begin_s, *(begin_s + s for s in batcher.step_ends_s)]
        self.timeline.write([
            (step, s.slot, s.response, f"{at[s.begin]:.4f}", f"{at[s.stop]:.4f}", s.stop - s.begin, s.end.name)
            for s in batcher.segments
        ])  # fmt: skip
        self._write_decode(self.decode, step, decode_steps(batcher.segments, batcher.slices, batcher.step_ends_s))

    def write_evaluation(self, step: int, loads: Sequence[DecodeStep]) -> None:
        """The decode steps of an evaluation by this rank, on the disk before its record is."""
        if self._timeline_wanted:
            self._write_decode(self.eval_decode, step, loads)
            self.eval_decode.flush()

    def last_evaluation(self) -> tuple[int, float] | None:
        """Step and accuracy of the last evaluation that a run that goes on has on record; None without one."""
        found = [(record["step"], record.get("eval/accuracy")) for record in self.log.kept]
        return max(((step, accuracy) for step, accuracy in found if isinstance(accuracy, float)), default=None)

    @staticmethod
    def _write_decode(table: Table, step: int, loads: Sequence[DecodeStep]) -> None:
        table.write([(step, i, *load[:-1], f"{load.seconds:.6f}") for i, load in enumerate(loads)])

    def flush(self) -> None:
        for table in self._tables:
            table.flush()

    def close(self) -> None:
        """What a full disk has not taken by now belongs to steps after the last checkpoint, and has been told."""
        for sink in (*self._tables, self.log):
            with suppress(OSError):
                sink.close()
