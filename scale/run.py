"""A run on a cluster: tppo_ref's `Session` over the parts that build.py makes, once engine and trainer have been compared."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from scale.build import build
from scale.config import ScaleConfig, thresholds
from scale.distributed import Collective, World
from scale.vllm_engine import VLLMEngine
from tppo_ref.method.errors import UserError
from tppo_ref.rollout.models import PolicyModel
from tppo_ref.runs.run_folder import own_folder
from tppo_ref.runs.session import Session
from tppo_ref.runs.watch import forewarn
from tppo_ref.tasks import Task

log = logging.getLogger("scale")


def open_session(config: ScaleConfig, world: World) -> Session:
    """This rank's part in a run, ready to train. UserError where engine and trainer do not agree on log-probabilities."""
    parts = build(config, world)
    session = Session(parts)
    try:
        if isinstance(parts.engine, VLLMEngine):
            probe_through_sleep(parts.engine, parts.policy, parts.task, config)
    except UserError:
        session.close()
        raise
    return session


def train(config: ScaleConfig, world: World) -> Path:
    """Run or resume, and leave a checkpoint; the folder of checkpoints."""
    if world.rank == 0:
        forewarn(config.algo)
    with alone(config, world), closing(open_session(config, world)) as session:
        session.train()
        return session.parts.checkpointer.folder


@contextmanager
def alone(config: ScaleConfig, world: World) -> Iterator[None]:
    """The run's folder is this job's while inside: the first rank holds its lock. What it refuses, all refuse."""
    with ExitStack() as held:
        refused = ""
        if world.rank == 0:
            try:
                held.enter_context(own_folder(config.algo.run.out, "algo.run.out"))
            except UserError as error:
                refused = str(error)
        (refused, *_) = Collective(world.flat).gather_objects(refused)
        if refused:
            raise UserError(refused)
        yield


def probe_through_sleep(engine: VLLMEngine, policy: PolicyModel, task: Task, config: ScaleConfig) -> None:
    """The probe, and the same once the engine has slept and taken its weights again: what every step of a run does to it.

    Level 2 has come back with other numbers elsewhere, buffers and weights alike (vLLM issue 29341, NeMo-RL issue 2631).
    """
    probe(engine, policy, task, config)
    if engine.sleep_level:
        engine.sleep()
        engine.load_weights(policy.named_tensors(), engine.version or 0)
        probe(engine, policy, task, config, f" after a sleep of level {engine.sleep_level}")


def probe(engine: VLLMEngine, policy: PolicyModel, task: Task, config: ScaleConfig, when: str = "") -> None:
    """Compare engine and trainer on the same tokens. UserError where they are further apart than the thresholds."""
    prompts = [prompt.token_ids for prompt in task.prompts("train")[: config.engine.probe_prompts]]
    gap = engine.probe(policy, prompts, new_tokens=config.engine.probe_tokens)
    mean, top = thresholds(config)
    verdict = (f"engine and trainer log-probabilities differ by {gap.mean:.2g} on average, {gap.top_percent:.2g} in the top 1 % "
               f"of {gap.num_tokens} tokens{when} (allowed: {mean:.2g}, {top:.2g})")  # fmt: skip
    if not (gap.mean <= mean and gap.top_percent <= top):
        raise UserError(
            f"engine.probe_mean: got {gap.mean:.2g}; expected less: {verdict}; "
            + ("give engine.sleep_level 1 or 0" if when else "look at dtype, temperature, the weights' sync and the prefix cache")
        )
    if engine.world.rank == 0:
        log.info("probe passed: %s", verdict)
