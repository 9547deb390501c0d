"""What the ranks can be asked to do: one function per command of launch.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from scale.build import (
    build_engine,
    build_evaluator,
    build_policy,
    build_sampler,
    build_scorer,
    build_value,
    check_device,
    end_tokens_of_run,
    shape,
)
from scale.checkpoint import DistributedCheckpointer, load_models
from scale.checkpoint import export as export_model
from scale.config import ScaleConfig, named_in
from scale.data import make_task
from scale.distributed import Collective, World
from scale.run import alone
from scale.run import train as run_training
from tppo_ref.method.errors import UserError
from tppo_ref.rollout.engine import RolloutEngine
from tppo_ref.rollout.models import PolicyModel, ValueModel
from tppo_ref.runs.build import TaskScorer, check_sources
from tppo_ref.runs.checkpoint import what_is_left
from tppo_ref.runs.evaluate import evaluate_policy
from tppo_ref.runs.pretrain import pretrain_value as pretrain
from tppo_ref.runs.references import leave_out_bad_references
from tppo_ref.runs.validation import refuse_without_critic
from tppo_ref.tasks import Task


def train(config: ScaleConfig, world: World) -> None:
    """Train, or go on with `--algo.run.resume true`; every step is one window."""
    try:
        folder = run_training(config, world)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(what_is_left(Path(config.algo.run.out), "the same command and --algo.run.resume true")) from None
    if world.rank == 0:
        print(f"checkpoints: {folder}")


def evaluate(config: ScaleConfig, world: World) -> None:
    """avg@k and pass@k of algo.model.policy on the evaluation prompts; answers and metrics go to algo.run.out."""
    with alone(config, world), frozen_policy(config, world) as (task, engine, scorer):
        evaluate_policy(build_evaluator(config, world, task, engine, scorer), task, Path(config.algo.run.out))


def pretrain_value(config: ScaleConfig, world: World) -> None:
    """Fit the value model to responses of the frozen policy; `algo.run.out/value` is a folder for --algo.model.value."""
    with named_in("algo."):
        refuse_without_critic(config.algo)
    out, parallel = Path(config.algo.run.out), Collective(world)
    with alone(config, world), frozen_policy(config, world) as (task, engine, scorer):
        everyone = Collective(world.flat)
        leave_out_bad_references(task, scorer.verifier, out, resume=False, progress=config.algo.run.progress, parallel=everyone)
        folder = pretrain(
            config.algo, build_sampler(config, world, task, engine, shape(scorer, config)), task.prompts("train"),
            make_value=lambda: build_value(config, world), parallel=parallel, device=world.device,
            save=lambda value, folder: export_model(value, folder, world, dtype=torch.float32),
        )  # fmt: skip
        if parallel.first:
            print(f"value model: {folder}")


@contextmanager
def frozen_policy(config: ScaleConfig, world: World) -> Iterator[tuple[Task, RolloutEngine, TaskScorer]]:
    """The task, an engine that holds algo.model.policy, and the verifier's processes while they are needed.

    A GPU that is smaller than the config says is refused, and by their config.json models that do not fit the task, before an
    engine starts.
    """
    check_device(config, world)
    task = make_task(config)
    with named_in("algo."):
        check_sources(config.algo, task)
    engine = build_engine(config, world, task)
    engine.load_weights(build_policy(config, world, task).named_tensors(), 0)
    with closing(build_scorer(config, world, task)) as scorer:
        yield task, engine, scorer


def export(config: ScaleConfig, world: World) -> None:
    """The newest checkpoint of algo.run.out as Hugging Face folders, `export/policy` and `export/value`, in engine.dtype; of a run
    without a value model the policy alone."""
    out, task = Path(config.algo.run.out), make_task(config)
    checkpointer = DistributedCheckpointer(out / "checkpoints", world, config, task)
    found = checkpointer.complete()
    if not found:
        raise UserError(f"algo.run.out: got {out}; expected the folder of a run with a checkpoint; give one")
    checkpointer.saved(found[-1])
    ends = end_tokens_of_run(config, world, task, found[-1])
    models: dict[str, PolicyModel | ValueModel] = {"policy": build_policy(config, world, task, ends, weights=False)}
    if not config.algo.advantage.critic_free:
        models["value"] = build_value(config, world, weights=False)
    load_models(models, found[-1])
    for name, model in models.items():
        export_model(model, out / "export" / name, world, dtype=getattr(torch, config.engine.dtype), tokenizer=task.tokenizer)
    if world.rank == 0:
        print(f"{found[-1].name}: {', '.join(str(out / 'export' / name) for name in models)}")
