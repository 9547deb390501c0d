"""The loop over a run's parts: steps the Trainer, evaluates, writes the run's files and checkpoints, and stops when it should.

A run's folder: config.json, versions.json, references.json (prompts whose reference fails against itself), metrics.jsonl,
tensorboard/, responses.csv (each response that ended), timeline.csv (the decoding slots over time), decode.csv and
eval_decode.csv (load and seconds of each decode step of the windows, and of the evaluations, whose batch shrinks), checkpoints/,
profile/ (traces of run.profile_steps).
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tppo_ref.loop.trainer import Trainer
from tppo_ref.method.errors import NonFiniteError
from tppo_ref.runs.checkpoint import complete_checkpoints
from tppo_ref.runs.evaluate import write_answers
from tppo_ref.runs.parts import Parts
from tppo_ref.runs.profiler import Profiler
from tppo_ref.runs.run_files import RunFiles
from tppo_ref.runs.stop import PoliteStop


class Session:
    """A run on this rank, in the state of the checkpoint that it goes on from where there is one."""

    def __init__(self, parts: Parts):
        self.parts, self.config, self.out = parts, parts.config, Path(parts.config.run.out)
        self.trainer = Trainer(
            parts.config, policy=parts.policy, value=parts.value, engine=parts.engine, batcher=parts.batcher, scorer=parts.scorer,
            parallel=parts.parallel, device=parts.device, averaged=parts.averaged, cut_rule=parts.cut_rule,
        )  # fmt: skip
        if parts.resume_from is not None:
            parts.checkpointer.load(self.trainer, parts.resume_from)
        parts.engine.load_weights(parts.policy.named_tensors(), self.trainer.version)
        self.profiler = Profiler(self.out / "profile", self.config.run.profile_steps, self.trainer.meters, process_number())
        self.files: RunFiles | None = None  # on the first rank, which talks to people
        if parts.parallel.first:
            self.files = RunFiles(
                self.out, parts.record, parts.glossary, resume_step=self.trainer.num_steps if parts.resume_from else None,
                timeline=self.config.run.timeline, wandb_project=self.config.run.wandb_project,
            )  # fmt: skip
        last = self.files.last_evaluation() if self.files else None
        step, self.accuracy = last or (-1, math.nan)  # of the last evaluation; the accuracy is for the progress line
        self.evaluated_at = int(parts.parallel.max([step])[0])  # told to all ranks: what is on record is not made again

    # ------------------------------------------------------------------------------------------------------------------- running

    def train(self) -> None:
        """Step until run.steps or run.train_seconds, or until Ctrl-C, which ends at the step's edge; then a checkpoint."""
        config, trainer = self.config.run, self.trainer
        evaluations = self._due_evaluations()
        with PoliteStop(self.parts.stop_signals) as stop, self._progress() as bar, self._guarded():
            if trainer.num_steps == 0 and self.evaluated_at != 0:
                self.evaluate()
            while not self._finished() and not self._stops(stop):
                metrics = self.step()
                if (due := self._due_evaluations()) > evaluations:
                    self.evaluate()  # a step longer than the interval is followed by one evaluation, not by several
                    evaluations = due
                if config.checkpoint_every and trainer.num_steps % config.checkpoint_every == 0:
                    self.save()  # after the evaluation: what cannot decode is not worth a checkpoint
                self._show(bar, metrics)
            stopped = self._stops(stop)
            if not stopped and self.evaluated_at != trainer.num_steps:
                self.evaluate()
            self.save()
            self.parts.checkpointer.finish()
        if stopped:
            raise KeyboardInterrupt

    def step(self) -> dict[str, float]:
        """One training step, written down."""
        trainer, begin_s = self.trainer, self.trainer.train_s
        with self.profiler(trainer.num_steps + 1):
            metrics = trainer.step()
        step, clock = trainer.num_steps, f"{trainer.train_s:.4f}"
        ended = [s.response for s in trainer.slices if s.response.ended]
        rows = [(step, clock, r.id, r.prompt.id, len(r), r.end.name, r.score) for r in ended]
        everyones = self.parts.parallel.gather_objects(rows)
        if self.files:
            with self.files.guarded():
                self.files.responses.write([row for share in everyones for row in share])
                self.files.write_window(step, begin_s, trainer.batcher)
                self.files.log.log(step, metrics)
            for watcher in self.parts.watchers:
                watcher(step, metrics)
        for limit in self.parts.limits:
            limit(step, metrics)
        self.parts.checkpointer.poll()
        return metrics

    def evaluate(self) -> None:
        """Log the accuracy on the fixed evaluation set; the training clock stands still."""
        evaluator, trainer = self.parts.evaluator, self.trainer
        metrics, answers, loads = evaluator()
        evaluator.sampler.engine.load_weights(None, trainer.version)  # the next step changes the weights under its cache
        (trained,) = self.parts.parallel.sum([trainer.ledger.tokens["trained"]])
        if self.files:
            clock = {"time/train_s": trainer.train_s, "ledger/trained": trained}
            with self.files.guarded():
                self.files.write_evaluation(trainer.num_steps, loads)
                if kept := answers[: self.parts.answers_kept]:
                    write_answers(self.out / f"answers-{trainer.num_steps:08d}.jsonl", kept, self.parts.task)
                self.files.log.log(trainer.num_steps, metrics | clock)  # last: with its record an evaluation is not made again
        self.accuracy, self.evaluated_at = metrics["eval/accuracy"], trainer.num_steps

    def save(self) -> Path:
        """A checkpoint of the last step."""
        if self.files:
            with self.files.guarded():
                self.files.flush()
        return self.parts.checkpointer.save(self.trainer)

    def close(self) -> None:
        with ExitStack() as leaving:  # each, whatever becomes of the others: a full disk must not keep the verifiers alive
            if self.files:
                leaving.callback(self.files.close)
            leaving.callback(self.parts.scorer.close)
            self.profiler.close()

    # ----------------------------------------------------------------------------------------------------------- when, and how

    def _due_evaluations(self) -> int:
        """How many evaluations should have been made by now: the first rank's clock decides."""
        (train_s,) = self.parts.parallel.max([self.trainer.train_s])
        return self.parts.due(self.trainer.num_steps, train_s)

    def _finished(self) -> bool:
        limit_s = self.config.run.train_seconds
        if limit_s is None:
            return self.trainer.num_steps >= self.config.run.steps
        return self.parts.parallel.max([self.trainer.train_s])[0] >= limit_s

    def _stops(self, stop: PoliteStop) -> bool:
        """Whether any rank was asked to stop: all of them leave at the same step."""
        return bool(self.parts.parallel.max([stop.asked])[0])

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Numbers that are not finite end the run in one line that says where, and which checkpoint is left."""
        try:
            yield
        except (NonFiniteError, FloatingPointError) as error:
            kept = complete_checkpoints(self.parts.checkpointer.folder)  # not `complete()`: the other ranks may be elsewhere
            where = "" if isinstance(error, NonFiniteError) else f"step {self.trainer.num_steps}: "
            raise NonFiniteError(f"{where}{error}; {f'{kept[-1]} is good' if kept else 'no checkpoint was due yet'}") from None

    def _progress(self) -> Any:
        limit_s, run = self.config.run.train_seconds, self.config.run
        total, unit = (run.steps, "step") if limit_s is None else (limit_s, "s")
        seconds = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s [{elapsed}<{remaining}{postfix}]"
        return tqdm(total=total, desc=f"{run.method} seed {run.seed}", unit=unit, bar_format=None if limit_s is None else seconds,
                    disable=not (run.progress and self.files))  # fmt: skip

    def _show(self, bar: Any, metrics: Mapping[str, float]) -> None:
        done = self.trainer.num_steps if self.config.run.train_seconds is None else self.trainer.train_s
        bar.set_postfix_str(progress_line(metrics, self.accuracy), refresh=False)
        bar.update(min(done, bar.total) - bar.n)


def process_number() -> int:
    """Of this process in its job, as torchrun counts; 0 alone. Ranks that hold the same rows share one `Parallel.rank`."""
    return int(os.environ.get("RANK", "0"))


def progress_line(metrics: Mapping[str, float], accuracy: float) -> str:
    """What the progress bar says of a step; `accuracy` is the last evaluation's."""
    trained = metrics["policy/tokens"] / max(metrics["time/policy_s"], 1e-9)
    last = f"explained {metrics['value/explained_variance']:.2f}"
    if math.isnan(metrics["value/lr"]):  # no value model
        last = f"held groups {metrics['ledger/held_groups']:.0f}"
    return (
        f"eval {accuracy:.2f}, score {metrics['response/score_mean']:+.2f}, length {metrics['response/length_mean']:.0f} "
        f"(cut {metrics['response/cut_share']:.0%}, capped {metrics['response/capped_share']:.0%}), "
        f"tokens/s {metrics['rollout/tokens_per_s']:.0f} decoded {trained:.0f} trained, "
        f"idle {1 - metrics['rollout/occupancy']:.0%}, gap {metrics['policy/logprob_gap']:.0e}, {last}"
    )  # fmt: skip
