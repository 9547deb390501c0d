"""From a `ScaleConfig` to the parts of a run on a cluster: sharded models, a group's batcher, distributed checkpoints."""

from __future__ import annotations

import dataclasses
import logging
import signal
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig

from scale.checkpoint import DistributedCheckpointer, read_manifest
from scale.config import FIXED_ON_RESUME, ScaleConfig, check_deal, named_in, own_base_model
from scale.context import SharedScorer, context_of
from scale.data import make_task
from scale.distributed import Collective, World
from scale.evaluate import GLOSSARY as EVALUATION
from scale.evaluate import accuracy_metrics
from scale.group import Group, group_of
from scale.memory.budget import CPU_KV_BYTES, config_file, kv_cache_bytes, read_shape, whole_sequences
from scale.rewards import GRADE
from scale.shaping import Shaped
from scale.sharding import load_sharded
from scale.shutdown import under_torchrun
from scale.vllm_engine import VLLMEngine
from scale.watch import ClusterWatch, GapLimit
from tppo_ref.loop.meters import CLOCKS
from tppo_ref.loop.parallel import Parallel
from tppo_ref.loop.trainer import Scorer
from tppo_ref.method.errors import UserError, refusal
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.engine import RolloutEngine
from tppo_ref.rollout.flops import EXPERTS
from tppo_ref.rollout.models import PolicyModel, ValueModel, load_policy
from tppo_ref.rollout.torch_engine import TorchEngine
from tppo_ref.runs.build import (
    TaskScorer,
    base_model,
    check_sources,
    check_vocabulary,
    end_token_ids,
    make_schedule,
    name_end_tokens,
    reply_of,
)
from tppo_ref.runs.evaluate import Evaluator, Sampler
from tppo_ref.runs.glossary import GLOSSARY
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.parts import Parts
from tppo_ref.runs.references import leave_out_bad_references
from tppo_ref.runs.resume import resume_point
from tppo_ref.runs.validation import writable_folder
from tppo_ref.runs.watch import Watch
from tppo_ref.tasks import Task, load_task

log = logging.getLogger("scale")


def build(config: ScaleConfig, world: World) -> Parts:
    """This rank's parts of a run, from its checkpoint or from its beginning. UserError for what cannot be. All ranks take part."""
    algo, record = config.algo, dataclasses.asdict(config)
    torch.set_num_threads(algo.run.threads)
    check_device(config, world)
    out = writable_folder(algo.run.out, "algo.run.out")
    task = make_task(config)
    checkpointer = DistributedCheckpointer(out / "checkpoints", world, config, task)
    resume = bool(checkpointer.complete()) if config.cluster.requeued else algo.run.resume
    resume_from = resume_point(checkpointer, config, resume=resume, fixed=FIXED_ON_RESUME, section="algo.", tell=world.rank == 0)
    parallel, schedule = Collective(world), slots_and_windows(config, world)
    new = resume_from is None
    with named_in("algo."):
        check_sources(algo, task)
    ends = checkpointer.end_tokens = end_tokens_of_run(config, world, task, resume_from)
    policy = build_policy(config, world, task, ends, weights=new)
    value = None if algo.advantage.critic_free else build_value(config, world, weights=new)
    engine = build_engine(config, world, task, ends)
    scorer = build_scorer(config, world, task)
    leave_out_bad_references(
        task, scorer.verifier, out, resume=not new, progress=algo.run.progress, parallel=Collective(world.flat)
    )
    training_scorer = shape(scorer, config)
    every = config.evaluation.every_steps
    return Parts(
        config=algo, record=record, task=task, policy=policy, value=value, device=world.device, parallel=parallel, engine=engine,
        scorer=training_scorer, checkpointer=checkpointer, resume_from=resume_from,
        averaged=build_policy(config, world, task, ends, weights=new) if algo.policy.ewma_decay else None,
        batcher=groups_here(config, world, task)(schedule, task.prompts("train"),
                                                samples_per_prompt=algo.rollout.samples_per_prompt, seed=algo.run.seed),
        evaluator=build_evaluator(config, world, task, engine, scorer), answers_kept=config.evaluation.save_texts,
        due=lambda steps, train_s: steps // every if every else 0, glossary=GLOSSARY | EVALUATION,
        watchers=[Watch(algo), ClusterWatch(config, world)], limits=[GapLimit(config)],
        # Under torchrun SIGTERM means that a rank is gone: shutdown.py ends this one at once.
        stop_signals=(signal.SIGINT,) if under_torchrun() else (signal.SIGINT, signal.SIGTERM),
    )  # fmt: skip


def check_device(config: ScaleConfig, world: World) -> None:
    """UserError where a GPU has less memory than cluster.device_bytes says, from which cache and dry run are reckoned alike."""
    if world.device == "cpu":
        return
    device, asked = torch.cuda.get_device_properties(world.device), config.cluster.device_bytes
    if device.total_memory < 0.99 * asked:  # of one kind some report a few MB less than others
        expected = f"at most what {device.name} has, {device.total_memory:.4g}"
        raise UserError(refusal("cluster.device_bytes", f"{asked:.4g}", expected, "give that, and dry-run it again"))
    if device.total_memory > 1.02 * asked and world.rank == 0:
        log.info("%s has %.4g bytes, cluster.device_bytes is %.4g: the rest stays unused", device.name, device.total_memory, asked)


def build_evaluator(config: ScaleConfig, world: World, task: Task, engine: RolloutEngine, scorer: TaskScorer) -> Evaluator:
    """Answers of all ranks to the first run.eval_prompts evaluation prompts; the score is the verifier's own."""
    run = config.algo.run
    return Evaluator(
        sampler=build_sampler(config, world, task, engine, scorer), prompts=task.prompts("test")[: run.eval_prompts],
        samples_per_prompt=run.eval_samples, parallel=Collective(world), further_metrics=accuracy_metrics,
    )  # fmt: skip


def build_sampler(config: ScaleConfig, world: World, task: Task, engine: RolloutEngine, scorer: Scorer) -> Sampler:
    """Whole responses from the engine of this rank's group."""
    return Sampler(engine=engine, scorer=scorer, slots=slots_and_windows(config, world).slots,
                   max_response_tokens=config.algo.rollout.max_response_tokens,
                   make_batcher=groups_here(config, world, task), now=CLOCKS[config.algo.run.clock])  # fmt: skip


def groups_here(config: ScaleConfig, world: World, task: Task) -> Callable[..., Group]:
    """Makes this rank's batchers, for training and for evaluation: the task's environment answers, the run's clock times."""
    return group_of(world, reply_of(task), CLOCKS[config.algo.run.clock])


def build_scorer(config: ScaleConfig, world: World, task: Task) -> TaskScorer:
    """The task's verifier; of ranks that hold the same rows the first one asks it for all."""
    if world.context_parallel > 1:
        return SharedScorer(task, config.algo.task, context_of(world))
    return TaskScorer(task, config.algo.task)


def shape(scorer: TaskScorer, config: ScaleConfig) -> Shaped:
    """The scorer that training gets."""
    return Shaped(scorer, config.reward, cap=config.algo.rollout.max_response_tokens, graded=scorer.name == GRADE)


def slots_and_windows(config: ScaleConfig, world: World) -> SlotSchedule:
    """The slots and windows of one engine."""
    check_deal(config, world.num_engines)
    return make_schedule(config.algo.rollout, world.num_engines)


def with_base_model(config: ScaleConfig, parallel: Parallel) -> ScaleConfig:
    """The config with a policy to start from: a built-in task makes its own, once for all ranks, in algo.run.cache."""
    if not own_base_model(config):
        return config
    for first in (True, False):  # the others find what rank 0 made; without a shared cache they make the same one
        if parallel.first == first:
            folder = base_model(config.algo, load_task(config.algo.task.name))
        parallel.gather_objects(None)
    return replace_fields(config, {"algo.model.policy": folder})


def end_tokens_of_run(config: ScaleConfig, world: World, task: Task, checkpoint: Path | None) -> tuple[int, ...]:
    """The tokens that end a response of a run: those with which it began, where there is a checkpoint of it.

    algo.model.policy may be another by then, and name others. A checkpoint that was written before it kept them has the model with
    which its run began; where that is gone, the one that is given says it. All ranks take part, and have what the first one finds.
    """
    began_with, found = config.algo.model.policy, None
    if checkpoint is not None:
        manifest = read_manifest(checkpoint, digests=False)
        found, before = manifest.get("end_tokens"), manifest["config"]["algo"]["model"]["policy"]
        began_with = before if before and Path(before).exists() else began_with
    found = Collective(world.flat).gather_objects(end_token_ids(task, began_with) if found is None else tuple(found))
    return found[0]


def build_policy(
    config: ScaleConfig, world: World, task: Task, ends: tuple[int, ...] | None = None, *, weights: bool = True
) -> PolicyModel:
    """The policy, sharded, with the config's sampling distribution.

    ends   the tokens that end a response; None: `end_token_ids` of algo.model.policy
    """
    model, rollout = config.algo.model, config.algo.rollout
    if not model.policy:
        raise UserError("algo.model.policy: got none; expected a model's folder or a config.json; give one")
    policy = load_sharded(
        PolicyModel, model.policy, world, config.sharding, seed=config.algo.run.seed, weights=weights,
        temperature=rollout.temperature, min_response_tokens=rollout.min_response_tokens,
        end_token_ids=end_token_ids(task, model.policy) if ends is None else ends,
        logit_chunk_tokens=model.logit_chunk_tokens or None, sync_dtype=getattr(torch, config.engine.dtype),
    )  # fmt: skip
    assert isinstance(policy, PolicyModel)
    check_vocabulary("algo.model.policy", policy.hf.config, task, model.policy)
    name_end_tokens(policy)  # for an export: a resume reads them in the checkpoint's manifest
    return policy


def build_value(config: ScaleConfig, world: World, *, weights: bool = True) -> ValueModel:
    """The value model, sharded: `algo.model.value`, or the policy's backbone under a new head."""
    model = config.algo.model
    value = load_sharded(
        ValueModel, model.value or model.policy or "", world, config.sharding, seed=config.algo.run.seed, weights=weights
    )
    assert isinstance(value, ValueModel)
    return value


def build_engine(config: ScaleConfig, world: World, task: Task, ends: tuple[int, ...] | None = None) -> RolloutEngine:
    """The engine of this rank's group. It has no weights yet. `ends` as of `build_policy`."""
    algo, engine, slots = config.algo, config.engine, slots_and_windows(config, world).slots
    context = task.max_prompt_tokens + algo.rollout.max_response_tokens
    source = Path(algo.model.policy or "")
    folder = source.parent if source.suffix == ".json" else source
    ends = end_token_ids(task, algo.model.policy) if ends is None else ends
    if engine.kind == "torch":
        if world.tensor_parallel != world.context_parallel:  # each of its ranks has one, and decodes the same
            expected = f"{world.context_parallel}, sharding.context_parallel, with engine.kind torch"
            raise UserError(refusal("engine.tensor_parallel", str(world.tensor_parallel), expected, "give that, or kind vllm"))
        copy = load_policy(str(folder / "config.json"), device=world.device, dtype=engine.dtype)
        return TorchEngine(copy, slots=slots, max_context_tokens=context, end_token_ids=ends,
                           temperature=algo.rollout.temperature, min_response_tokens=algo.rollout.min_response_tokens,
                           kv_cache=algo.rollout.kv_cache)  # fmt: skip
    shape = AutoConfig.from_pretrained(folder, local_files_only=True)
    if world.device == "cpu" and any(getattr(shape, name, 0) for name in EXPERTS):
        # vLLM 0.32 packs the experts when it first loads (UnquantizedFusedMoEMethod._setup_kernel) and computes with that for ever.
        expected = "torch on a CPU, where vLLM keeps a packed copy of the experts that no sync renews"
        raise UserError(refusal("engine.kind", f"vllm for {folder}, a mixture of experts", expected, "give that"))
    heads = shape.num_attention_heads
    if heads % world.tensor_parallel:
        raise UserError(f"engine.tensor_parallel: got {world.tensor_parallel}; expected a divisor of the {heads} attention heads "
                        f"of {folder}; give one")  # fmt: skip
    cache = CPU_KV_BYTES if world.device == "cpu" else kv_cache_bytes(config, read_shape(config_file(str(source))))
    if cache <= 0:
        raise UserError(f"engine.gpu_memory_utilization: got {engine.gpu_memory_utilization}; expected room for a cache beside the "
                        f"engine's weights; raise it, or engine.tensor_parallel")  # fmt: skip
    options = {**engine.vllm, "kv_cache_dtype": algo.rollout.kv_cache}
    if engine.block_size:
        options["block_size"] = engine.block_size
    if engine.max_batched_tokens:
        options["max_num_batched_tokens"] = engine.max_batched_tokens
    if engine.admission == "whole":
        options.setdefault("max_num_seqs", whole_sequences(config))
    return VLLMEngine(
        folder, world=world, slots=slots, max_context_tokens=context, end_token_ids=ends, dtype=engine.dtype,
        temperature=algo.rollout.temperature, min_response_tokens=algo.rollout.min_response_tokens, seed=algo.run.seed,
        sleep_level=engine.sleep_level, gpu_memory_utilization=engine.gpu_memory_utilization, kv_cache_bytes=int(cache),
        options=options,
    )  # fmt: skip
