"""What a run is made of. `runs/build.py` makes the parts on a laptop, `scale/build.py` on a cluster; a `Session` runs either."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from tppo_ref.loop.cut_rules import CutRule
from tppo_ref.loop.parallel import Parallel
from tppo_ref.loop.trainer import Trainer
from tppo_ref.rollout.batcher import Batcher
from tppo_ref.rollout.engine import RolloutEngine
from tppo_ref.runs.config import Config
from tppo_ref.runs.evaluate import Evaluator
from tppo_ref.runs.glossary import GLOSSARY, Metric
from tppo_ref.tasks import Task


class Checkpointer(Protocol):
    """Writes and reads the checkpoints in `folder`. All ranks make the same calls in the same order."""

    folder: Path
    prompts: dict[str, str]
    """Digest of the prompts of each split; `save` keeps it."""

    def complete(self) -> list[Path]:
        """Checkpoints that can be gone on from, oldest first."""

    def saved(self, checkpoint: Path) -> dict[str, Any]:
        """The `config` and the digests of the `prompts` that a checkpoint was made with. UserError where it is not as written."""

    def save(self, trainer: Trainer) -> Path:
        """Write the state after the last step, or begin to; the path that it has, or will have."""

    def load(self, trainer: Trainer, checkpoint: Path) -> None:
        """Bring a freshly built trainer to what was saved."""

    def poll(self) -> None:
        """Called between steps: what `save` began may have ended."""

    def finish(self) -> None:
        """Wait for what `save` began. Only where all ranks come by: one that failed must say so at once."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a run, made and connected; weights are read, nothing has run yet.

    config        the algorithm's settings, and `run`
    record        the whole config, which is written to config.json
    policy, value, engine, batcher, scorer, parallel, device, averaged, cut_rule     go to the Trainer; `scorer` also has
                  `close`. No value model: None
    evaluator     its engine decodes with the policy's weights; it may be the Trainer's own
    answers_kept  sample answers that are written at each evaluation
    resume_from   the checkpoint to go on from; None: a run that begins
    due           (training steps, training seconds) -> evaluations that should have been made by then; none at 0
    watchers      called with each step's number and metrics, on the first rank
    limits        the same on every rank: a UserError there ends the run
    """

    config: Config
    record: Mapping[str, Any]
    task: Task
    policy: Any
    value: Any
    engine: RolloutEngine
    batcher: Batcher
    scorer: Any
    evaluator: Evaluator
    checkpointer: Checkpointer
    parallel: Parallel
    device: torch.device | str
    resume_from: Path | None
    averaged: Any = None
    cut_rule: CutRule | None = None
    answers_kept: int = 0
    due: Callable[[int, float], int]
    glossary: Mapping[str, Metric] = dataclasses.field(default_factory=lambda: GLOSSARY)
    watchers: Sequence[Callable[[int, Mapping[str, float]], None]] = ()
    limits: Sequence[Callable[[int, Mapping[str, float]], None]] = ()
    stop_signals: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM)
