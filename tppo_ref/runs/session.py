"""From a config to a run: builds the Trainer's parts, steps it, and keeps what a person wants afterwards.

A run's folder: config.json, versions.json, references.json (prompts whose reference fails against itself), metrics.jsonl,
tensorboard/, responses.csv (each response that ended), timeline.csv (the decoding slots over time), decode.csv and
eval_decode.csv (load and seconds of each decode step of the windows, and of the evaluations, whose batch shrinks), checkpoints/.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import math
import platform
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from tppo_ref.loop.parallel import Parallel, SingleProcess
from tppo_ref.loop.trainer import Trainer
from tppo_ref.method.errors import NonFiniteError, UserError
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.batcher import SampleStream, SuccessiveBatcher
from tppo_ref.rollout.decode_load import DecodeStep, ObservedEngine, decode_steps
from tppo_ref.runs.build import TaskScorer, base_model, make_engine, make_policy, make_task, make_value
from tppo_ref.runs.checkpoint import complete_checkpoints, load_checkpoint, read_state, save_checkpoint
from tppo_ref.runs.config import Config
from tppo_ref.runs.evaluate import evaluate
from tppo_ref.runs.glossary import GLOSSARY, Metric
from tppo_ref.runs.parsing import field_paths, get_field
from tppo_ref.runs.references import leave_out_bad_references
from tppo_ref.runs.sinks import MetricLog, Table
from tppo_ref.runs.validation import writable_folder

log = logging.getLogger("tppo_ref")

# May differ between a checkpoint and the run that goes on from it: they say where and how long, not what is computed.
FREE_ON_RESUME = ("run.out", "run.cache", "run.resume", "run.steps", "run.train_seconds", "run.checkpoint_every", "run.progress",
                  "run.checkpoints_kept", "run.eval_every_s", "run.timeline", "run.wandb_project", "compare.methods",
                  "compare.seeds", "compare.jobs", "compare.target", "compare.per_method", "model.policy",
                  "model.value")  # fmt: skip


class Session:
    """A run in one process: task, Trainer, evaluation and the run's files."""

    def __init__(self, config: Config):
        torch.set_num_threads(config.run.threads)
        self.config = config
        self.out = writable_folder(config.run.out, "run.out")
        self.checkpoints = self.out / "checkpoints"
        self.start = self._resume_point()
        self.task: Any = self._make_task()  # a Task
        self.eval_prompts = self.task.prompts("test")[: config.run.eval_prompts]
        self.trainer = self._build()
        self.accuracy, self.evaluated_at = math.nan, -1  # of the last evaluation, for the progress line
        self._warned: Counter[str] = Counter()
        if self.is_main:
            self._open_files(self.trainer.num_steps if self.start else None)

    # ------------------------------------------------------------------------------------------- what scale/ builds differently

    parallel: Parallel = SingleProcess()
    glossary: Mapping[str, Metric] = GLOSSARY
    stop_signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run's files and talks to people."""
        return self.parallel.rank == 0

    def _make_task(self) -> Any:
        return make_task(self.config)

    def _build(self) -> Trainer:
        """Models, engines and scorer, and the Trainer over them, in the state of the checkpoint where there is one."""
        config = self.config
        base = base_model(config, self.task) if self.start is None else ""
        self.policy = make_policy(config, self.task, base if self.start is None else str(self.start / "policy"))
        value_source = (config.model.value or base) if self.start is None else str(self.start / "value")
        value = make_value(config, self.task, value_source)
        self.eval_slots = min(256, len(self.eval_prompts) * config.run.eval_samples)
        self.eval_engine = make_engine(config, self.task, self.policy, self.eval_slots)
        self.scorer: Any = TaskScorer(self.task, config.task)
        self._leave_out_bad_references()
        rollout = config.rollout
        schedule = SlotSchedule(slots=rollout.slots, window=rollout.window, max_response_tokens=rollout.max_response_tokens,
                                refill=rollout.refill, responses_per_step=rollout.responses_per_step)  # fmt: skip
        stream = SampleStream(self.task.prompts("train"), samples_per_prompt=rollout.samples_per_prompt, seed=config.run.seed)
        trainer = Trainer(
            config, policy=self.policy, value=value, engine=make_engine(config, self.task, self.policy, rollout.slots),
            batcher=SuccessiveBatcher(schedule, stream, run_seed=config.run.seed), scorer=self.scorer, device=self.policy.device,
        )  # fmt: skip
        if self.start is not None:
            load_checkpoint(trainer, self.start)
        return trainer

    def _leave_out_bad_references(self) -> None:
        leave_out_bad_references(self.task, self.scorer.verifier, self.out, resume=self.start is not None,
                                 progress=self.config.run.progress, parallel=self.parallel)  # fmt: skip

    def _saved_config(self, checkpoint: Path) -> dict[str, Any]:
        return read_state(checkpoint)["config"]

    def _gather(self, rows: list[Any]) -> list[Any]:
        """Table rows of all ranks, in rank order."""
        return [row for part in self.parallel.gather_objects(rows) for row in part]

    def _complete_checkpoints(self) -> list[Path]:
        return complete_checkpoints(self.checkpoints)

    # --------------------------------------------------------------------------------------------------------------- its files

    def _resume_point(self) -> Path | None:
        """The checkpoint to go on from. A run is never overwritten, and never continued under another config."""
        found = self._complete_checkpoints()
        if not self.config.run.resume:
            if found:
                raise UserError(f"run.out: {self.out} holds a run already (step {int(found[-1].name[5:])}); add --run.resume true "
                                f"to go on, or choose another folder")  # fmt: skip
            return None
        if not found:
            raise UserError(f"run.resume: no complete checkpoint in {self.checkpoints}; leave it out to start anew")
        before = self._saved_config(found[-1])
        for path in field_paths(Config):
            section, name = path.split(".")
            then, now = before[section].get(name), get_field(self.config, path)
            if path not in FREE_ON_RESUME and then != now:
                raise UserError(f"{path}: the checkpoint was made with {then}, got {now}; give the same value to go on")
        return found[-1]

    def _open_files(self, resume_step: int | None) -> None:
        (self.out / "config.json").write_text(json.dumps(dataclasses.asdict(self.config), indent=1) + "\n")
        (self.out / "versions.json").write_text(json.dumps(versions(), indent=1) + "\n")
        self.log = MetricLog(self.out, resume_step=resume_step, wandb_project=self.config.run.wandb_project, glossary=self.glossary)
        columns = ("step", "train_s", "response", "prompt", "tokens", "end", "score")
        self.responses = Table(self.out / "responses.csv", columns, resume_step=resume_step)
        columns = ("step", "slot", "response", "begin_s", "stop_s", "tokens", "end")
        self.timeline = Table(self.out / "timeline.csv", columns, resume_step=resume_step)
        loads = ("step", "decode_step", *DecodeStep._fields)
        self.decode = Table(self.out / "decode.csv", loads, resume_step=resume_step)
        self.eval_decode = Table(self.out / "eval_decode.csv", loads, resume_step=resume_step)

    # ------------------------------------------------------------------------------------------------------------------- running

    def train(self) -> None:
        """Step until run.steps or run.train_seconds, or until Ctrl-C, which ends at the step's edge; then a checkpoint."""
        config, trainer = self.config.run, self.trainer
        self._evaluations = self._due_evaluations()
        with PoliteStop(self.stop_signals) as stop, self._progress() as bar, self._guarded():
            if trainer.num_steps == 0:
                self.evaluate()
            while not self._finished() and not self._stops(stop):
                metrics = self._step()
                self._warn(metrics)
                if (due := self._due_evaluations()) > self._evaluations:
                    self.evaluate()  # a step longer than the interval is followed by one evaluation, not by several
                    self._evaluations = due
                if config.checkpoint_every and trainer.num_steps % config.checkpoint_every == 0:
                    self.save()  # after the evaluation: what cannot decode is not worth a checkpoint
                self._show(bar, metrics)
            stopped = self._stops(stop)
            if not stopped and self.evaluated_at != trainer.num_steps:
                self.evaluate()
            self.save()
            self._finish_saving()
        if stopped:
            raise KeyboardInterrupt

    def _stops(self, stop: PoliteStop) -> bool:
        """Whether any rank was asked to stop: all of them leave at the same step."""
        return bool(self.parallel.max([stop.asked])[0])

    def _due_evaluations(self) -> int:
        """How many evaluations should have been made by now."""
        every_s = self.config.run.eval_every_s
        return int(self.parallel.max([self.trainer.train_s])[0] // every_s) if every_s else 0

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Numbers that are not finite end the run in one line that says where, and which checkpoint is left."""
        try:
            yield
        except (NonFiniteError, FloatingPointError) as error:
            kept = complete_checkpoints(self.checkpoints)
            where = "" if isinstance(error, NonFiniteError) else f"step {self.trainer.num_steps}: "
            raise NonFiniteError(f"{where}{error}; {f'{kept[-1]} is good' if kept else 'no checkpoint was due yet'}") from None

    def _step(self) -> dict[str, float]:
        before_s = self.trainer.train_s
        metrics = self.trainer.step()
        self._write_tables(before_s)
        if self.is_main:
            self.log.log(self.trainer.num_steps, metrics)
        return metrics

    def _write_tables(self, before_s: float) -> None:
        step, batcher = self.trainer.num_steps, self.trainer.batcher
        ended = [s.response for s in self.trainer.slices if s.response.ended]
        clock = f"{self.trainer.train_s:.4f}"
        responses = self._gather([(step, clock, r.id, r.prompt.id, len(r), r.end.name, r.score) for r in ended])
        if not self.is_main:  # the timeline shows the slots of the first rank
            return
        self.responses.write(responses)
        if self.config.run.timeline:
            at = [before_s, *(before_s + s for s in batcher.step_ends_s)]
            self.timeline.write([
                (step, s.slot, s.response, f"{at[s.begin]:.4f}", f"{at[s.stop]:.4f}", s.stop - s.begin, s.end.name)
                for s in batcher.segments
            ])  # fmt: skip
            self._write_decode(self.decode, decode_steps(batcher.segments, batcher.slices, batcher.step_ends_s))

    def _write_decode(self, table: Table, steps: Sequence[DecodeStep]) -> None:
        if self.config.run.timeline:
            table.write([(self.trainer.num_steps, i, *s[:-1], f"{s.seconds:.6f}") for i, s in enumerate(steps)])

    def evaluate(self) -> None:
        """Log the accuracy on the fixed evaluation set; the training clock stands still."""
        engine = ObservedEngine(self.eval_engine)
        metrics, _ = evaluate(
            engine, self.scorer, self.eval_prompts, samples_per_prompt=self.config.run.eval_samples,
            slots=self.eval_slots, max_response_tokens=self.config.rollout.max_response_tokens,
        )  # fmt: skip
        self._write_decode(self.eval_decode, engine.steps)
        engine.load_weights(None, self.trainer.version)  # the next step changes the weights under its cache
        trained = self.trainer.ledger.tokens["trained"]
        self.log.log(self.trainer.num_steps, metrics | {"time/train_s": self.trainer.train_s, "ledger/trained": trained})
        self.accuracy, self.evaluated_at = metrics["eval/accuracy"], self.trainer.num_steps

    def save(self) -> Path:
        self._flush()
        return save_checkpoint(self.trainer, self.checkpoints, keep=self.config.run.checkpoints_kept,
                               config=dataclasses.asdict(self.config))  # fmt: skip

    def _finish_saving(self) -> None:
        """Wait for what `save` may still be writing: nothing, here."""

    def _tables(self) -> list[Table]:
        return [self.responses, self.timeline, self.decode, self.eval_decode] if self.is_main else []

    def _flush(self) -> None:
        for table in self._tables():
            table.flush()

    def close(self) -> None:
        self.scorer.close()
        for table in self._tables():
            table.close()
        if self.is_main:
            self.log.close()

    def _finished(self) -> bool:
        limit_s = self.config.run.train_seconds
        if limit_s is None:
            return self.trainer.num_steps >= self.config.run.steps
        return self.parallel.max([self.trainer.train_s])[0] >= limit_s

    def _progress(self) -> Any:
        limit_s = self.config.run.train_seconds
        total, unit = (self.config.run.steps, "step") if limit_s is None else (limit_s, "s")
        form = (
            None if limit_s is None else "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}{postfix}]"
        )
        return tqdm(total=total, desc=f"{self.config.run.method} seed {self.config.run.seed}", unit=unit, bar_format=form,
                    disable=not (self.config.run.progress and self.is_main))  # fmt: skip

    def _show(self, bar: Any, metrics: dict[str, float]) -> None:
        done = self.trainer.num_steps if self.config.run.train_seconds is None else self.trainer.train_s
        bar.set_postfix_str(self._line(metrics), refresh=False)
        bar.update(min(done, bar.total) - bar.n)

    def _line(self, metrics: Mapping[str, float]) -> str:
        """What the progress bar says of a step."""
        return (
            f"eval {self.accuracy:.2f}, score {metrics['response/score_mean']:+.2f}, length {metrics['response/length_mean']:.0f}, "
            f"cut {metrics['response/cut_share']:.0%}, busy {metrics['rollout/occupancy']:.0%}, "
            f"{metrics['rollout/tokens_per_s']:.0f} tok/s"
        )

    def _warn(self, metrics: dict[str, float]) -> None:
        rows = max(metrics["response/rows"], 1)
        capped = metrics["response/ended"] * metrics["response/capped_share"] if metrics["response/ended"] else 0.0
        share = metrics["response/cut_share"] + capped / rows
        if share > self.config.run.cut_warning and self.trainer.num_steps % 20 == 1:
            log.warning("step %d: %.0f %% of the rows were cut or capped (run.cut_warning %.0f %%): the critic sees few finished "
                        "responses; a longer rollout.window helps", self.trainer.num_steps, 100 * share,
                        100 * self.config.run.cut_warning)  # fmt: skip
        oldest = metrics.get("policy/staleness_max", 0)
        if oldest > self.config.run.staleness_warning and self.trainer.num_steps % 20 == 1:
            log.warning("step %d: tokens that are %d weight versions old are trained (run.staleness_warning %d): their importance "
                        "weights are far from 1; a longer rollout.window helps", self.trainer.num_steps, oldest,
                        self.config.run.staleness_warning)  # fmt: skip
        for name in ("verify/timeouts", "verify/errors"):
            if metrics[name] > self._warned[name]:
                log.warning("step %d: %s is %d so far; they score %g", self.trainer.num_steps, name, metrics[name],
                            self.config.task.failure_score)  # fmt: skip
                self._warned[name] = int(metrics[name])


class PoliteStop:
    """Ctrl-C (or SIGTERM) once: `asked` is True and the loop ends at the step's edge. Twice: KeyboardInterrupt at once."""

    def __init__(self, signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)) -> None:
        self.asked, self._signals = False, signals

    def __enter__(self) -> PoliteStop:
        self._before = {s: signal.signal(s, self._handle) for s in self._signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping at the end of this step, with a checkpoint; once more to stop at once", file=sys.stderr)


def versions() -> dict[str, str]:
    """What the numbers of a run depend on."""
    packages = ("tppo-ref", "torch", "transformers", "numpy")
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"python": platform.python_version(), "machine": platform.machine(), "processor": processor()}


def processor() -> str:
    """The CPU's name, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def train(config: Config) -> Path:
    """Run `config` to its end; returns the newest checkpoint."""
    session = Session(config)
    try:
        session.train()
        return complete_checkpoints(session.checkpoints)[-1]
    finally:
        session.close()
