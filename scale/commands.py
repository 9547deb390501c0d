"""What the ranks can be asked to do: one function per command of launch.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from scale.checkpoint import export as export_model
from scale.checkpoint import load_models, read_manifest
from scale.config import ScaleConfig
from scale.data import make_task
from scale.distributed import Collective, World
from scale.evaluate import evaluate as run_evaluation
from scale.evaluate import write_texts
from scale.run import ShapingScorer, build_engine, build_models
from scale.run import train as run_training
from tppo_ref.method.errors import UserError
from tppo_ref.runs.checkpoint import complete_checkpoints
from tppo_ref.runs.evaluate import sample_answers
from tppo_ref.runs.pretrain import PRETRAIN_SEED, explained_by_position, fit_value
from tppo_ref.runs.references import leave_out_bad_references
from tppo_ref.runs.session import writable_folder


def train(config: ScaleConfig, world: World) -> None:
    """Train, or go on with `--algo.run.resume true`; every step is one window."""
    folder = run_training(config, world)
    if world.rank == 0:
        print(f"checkpoints: {folder}")


def evaluate(config: ScaleConfig, world: World) -> None:
    """avg@k and pass@k of algo.model.policy on the evaluation prompts; answers and metrics go to algo.run.out."""
    out = writable_folder(config.algo.run.out, "algo.run.out")
    task, parallel = make_task(config), Collective(world)
    policy, _ = build_models(config, world, task)
    engine = build_engine(config, world, task, config.algo.rollout.slots // world.num_engines)
    engine.load_weights(policy.named_tensors(), 0)
    scorer = ShapingScorer(task, config)
    scorer.shaping = False
    try:
        prompts = task.prompts("test")[: config.algo.run.eval_prompts]
        metrics, answers = run_evaluation(engine, scorer, prompts, config, world, parallel)
    finally:
        scorer.close()
    if world.rank == 0:
        (out / "evaluation.json").write_text(json.dumps(metrics, indent=1) + "\n")
        write_texts(out / "answers.jsonl", answers, task)
        for name, number in metrics.items():
            print(f"{name:22} {number:.4g}")


def pretrain_value(config: ScaleConfig, world: World) -> None:
    """Fit the value model to responses of the frozen policy; `algo.run.out/value` is a folder for --algo.model.value."""
    out = writable_folder(config.algo.run.out, "algo.run.out")
    if (out / "value").exists():
        raise UserError(f"algo.run.out: {out} holds a value model already; choose another folder")
    task, parallel, algo = make_task(config), Collective(world), config.algo
    policy, value = build_models(config, world, task)
    engine = build_engine(config, world, task, algo.rollout.slots // world.num_engines)
    engine.load_weights(policy.named_tensors(), 0)
    scorer = ShapingScorer(task, config)
    leave_out_bad_references(task, scorer.verifier, out, resume=False, progress=algo.run.progress, parallel=parallel)
    prompts = task.prompts("train")[: max(1, algo.value.pretrain_responses // algo.rollout.samples_per_prompt)]
    try:
        responses, failures = sample_answers(
            engine, scorer, prompts, samples_per_prompt=algo.rollout.samples_per_prompt,
            slots=algo.rollout.slots // world.num_engines, max_response_tokens=algo.rollout.max_response_tokens, seed=PRETRAIN_SEED,
            rank=world.engine, world=world.num_engines, part=world.part, parts=world.tensor_parallel,
        )  # fmt: skip
    finally:
        scorer.close()
    engine.sleep()
    held_out = max(1, len(responses) // 10)
    fit_value(algo, value, responses[held_out:], parallel, device=world.device)
    # Every rank reports on as many responses: the value model's forward is a collective operation.
    (fewest,) = (-int(x) for x in parallel.max([-held_out]))
    report = explained_by_position(value, responses[:fewest], algo.advantage.gamma, device=world.device)
    export_model(value, out / "value", world, dtype=torch.float32)
    if world.rank == 0:
        print(f"{'tokens':>14} {'count':>8}  explained variance on {fewest} held-out responses of rank 0; {failures} not verified")
        for row in report:
            print(f"{row['from_token']:>6}-{row['to_token']:<7} {row['tokens']:>8}  {row['explained_variance']:.3f}")
        print(f"value model: {out / 'value'}")
        below = [row["from_token"] for row in report if row["tokens"] and row["explained_variance"] < 0]
        if below:
            print(f"warning: explained variance is below 0 from token {below[0]} on: worse than a constant; take more "
                  "algo.value.pretrain_responses or pretrain_epochs before you train with it", file=sys.stderr)  # fmt: skip


def export(config: ScaleConfig, world: World) -> None:
    """The newest checkpoint of algo.run.out as Hugging Face folders, `export/policy` and `export/value`, in engine.dtype."""
    out = Path(config.algo.run.out)
    found = complete_checkpoints(out / "checkpoints")
    if not found:
        raise UserError(f"algo.run.out: {out} holds no checkpoint; give the folder of a run")
    read_manifest(found[-1], digests=False)
    policy, value = build_models(config, world, make_task(config), weights=False)
    load_models(policy, value, found[-1])
    for name, model in (("policy", policy), ("value", value)):
        export_model(model, out / "export" / name, world, dtype=getattr(torch, config.engine.dtype))
    if world.rank == 0:
        print(f"{found[-1].name}: {out / 'export' / 'policy'}, {out / 'export' / 'value'}")
