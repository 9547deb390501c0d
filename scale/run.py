"""From a `ScaleConfig` to a run: tppo_ref's `Session` with sharded models, a cluster's engine and distributed checkpoints."""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from scale.checkpoint import Checkpointer, load_checkpoint, read_manifest
from scale.config import ScaleConfig, own_base_model
from scale.data import make_task
from scale.distributed import Collective, World
from scale.evaluate import GLOSSARY as EVALUATION
from scale.evaluate import evaluate, write_texts
from scale.rewards import GRADE, NO_ANSWER, shaped
from scale.sharding import load_sharded
from scale.shutdown import under_torchrun
from scale.vllm_engine import VLLMEngine
from tppo_ref.loop.trainer import Trainer
from tppo_ref.method.errors import UserError
from tppo_ref.method.records import Response
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.batcher import SampleStream, SuccessiveBatcher
from tppo_ref.rollout.decode_load import ObservedEngine
from tppo_ref.rollout.engine import RolloutEngine
from tppo_ref.rollout.models import PolicyModel, ValueModel, load_policy
from tppo_ref.rollout.torch_engine import TorchEngine
from tppo_ref.runs import sinks as metrics
from tppo_ref.runs.build import TaskScorer, base_model, check_vocabulary
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import field_paths, get_field, replace_fields
from tppo_ref.runs.session import Session
from tppo_ref.tasks import Task, load_task

log = logging.getLogger("scale")

PROBE = {"float32": (1e-4, 1e-3), "bfloat16": (0.03, 0.3)}  # mean and top-1 % gap; bfloat16 is unconfirmed until a GPU run

FIXED_ON_RESUME = ("engine.kind", "engine.dtype", "sharding.compute_dtype", "data", "reward")
"""What is computed, beside `algo`. The rest says where: ranks, groups and machines may change with a restart."""


class ShapingScorer(TaskScorer):
    """The verifier's score, shaped (rewards.shaped) while `shaping` is on; evaluation turns it off."""

    def __init__(self, task: Any, config: ScaleConfig):
        super().__init__(task, config.algo.task)
        self.rewards, self.cap, self.shaping = config.reward, config.algo.rollout.max_response_tokens, True
        self.graded = task.verifier == GRADE  # only it says NO_ANSWER; a user's own verifier may mean -2 when it says -2
        self._submitted: dict[int, Response] = {}

    def submit(self, response: Response) -> None:
        self._submitted[response.id] = response
        super().submit(response)

    def collect(self) -> dict[int, tuple[float, str]]:
        scores = super().collect()
        responses, self._submitted = self._submitted, {}
        return {id: (self._final(score, responses[id]), status) for id, (score, status) in scores.items()}

    def _final(self, score: float, response: Response) -> float:
        """What becomes of the verifier's score: an answer that cannot be found is wrong, and training shapes the rest."""
        answered = not (self.graded and score == NO_ANSWER)
        score = score if answered else -1.0
        return shaped(score, response, self.rewards, cap=self.cap, answered=answered) if self.shaping else score


class ScaleSession(Session):
    """A run of scale/ on this rank. Everything that is not overridden here is tppo_ref's."""

    glossary = metrics.GLOSSARY | EVALUATION

    def __init__(self, config: ScaleConfig, world: World):
        self.scale, self.world = config, world
        self.parallel = Collective(world)
        if under_torchrun():  # there SIGTERM means that a rank is gone: shutdown.py ends this one at once
            self.stop_signals = (signal.SIGINT,)
        super().__init__(config.algo)
        self.checkpointer = Checkpointer(self.checkpoints, world, config, newest=self.start)

    def _make_task(self) -> Task:
        return make_task(self.scale)

    def _saved_config(self, checkpoint: Path) -> dict[str, Any]:
        saved = self._manifest(checkpoint)["config"]
        for path in field_paths(ScaleConfig):
            section, name = path.split(".", 1)
            if section in FIXED_ON_RESUME or path in FIXED_ON_RESUME:
                then, now = saved.get(section, {}).get(name), get_field(self.scale, path)
                if then != now:
                    raise UserError(f"{path}: the checkpoint was made with {then}, got {now}; give the same value to go on")
        return saved["algo"]

    def _complete_checkpoints(self) -> list[Path]:
        """As the first rank sees them: a shared disk may not show every rank the same."""
        return self.parallel.gather_objects(super()._complete_checkpoints())[0]

    def _resume_point(self) -> Path | None:
        if self.scale.cluster.requeued:
            self.config = replace_fields(self.config, {"run.resume": bool(self._complete_checkpoints())})
        return super()._resume_point()

    def _manifest(self, checkpoint: Path) -> dict[str, Any]:
        """Read and verified by the first rank, refused by all."""
        found: dict[str, Any] | str = ""
        try:
            found = read_manifest(checkpoint) if self.is_main else ""
        except UserError as error:
            found = str(error)
        found = self.parallel.gather_objects(found)[0]
        if isinstance(found, str):
            raise UserError(found)
        return found

    def _build(self) -> Trainer:
        config, world = self.config, self.world
        if config.rollout.slots % world.num_engines:
            raise UserError(f"algo.rollout.slots: {config.rollout.slots} slots cannot be dealt to {world.num_engines} engines; "
                            f"give a multiple")  # fmt: skip
        self.policy, value = build_models(self.scale, world, self.task, weights=self.start is None)
        slots = config.rollout.slots // world.num_engines
        if config.rollout.responses_per_step % world.num_engines:
            raise UserError(f"algo.rollout.responses_per_step: got {config.rollout.responses_per_step}; expected a multiple of the "
                            f"{world.num_engines} engines; give one")  # fmt: skip
        self.engine = build_engine(self.scale, world, self.task, slots)
        self.scorer: ShapingScorer = ShapingScorer(self.task, self.scale)
        self._leave_out_bad_references()
        rollout = config.rollout
        schedule = SlotSchedule(slots=slots, window=rollout.window, max_response_tokens=rollout.max_response_tokens,
                                refill=rollout.refill,
                                responses_per_step=rollout.responses_per_step // world.num_engines)  # fmt: skip
        stream = SampleStream(self.task.prompts("train"), samples_per_prompt=rollout.samples_per_prompt, seed=config.run.seed,
                              rank=world.engine, world=world.num_engines)  # fmt: skip
        batcher = SuccessiveBatcher(schedule, stream, run_seed=config.run.seed, part=world.part, parts=world.tensor_parallel)
        averaged = build_policy(self.scale, world, self.task, weights=self.start is None) if config.policy.ewma_decay else None
        trainer = Trainer(config, policy=self.policy, value=value, engine=self.engine, batcher=batcher, scorer=self.scorer,
                          parallel=self.parallel, device=world.device, averaged=averaged)  # fmt: skip
        if self.start is not None:
            load_checkpoint(trainer, self.start, world)
        self.engine.load_weights(self.policy.named_tensors(), trainer.version)
        if isinstance(self.engine, VLLMEngine):
            probe(self.engine, self.policy, self.task, self.scale)
        return trainer

    def evaluate(self) -> None:
        """avg@k and pass@k over all ranks; the training clock stands still."""
        self.scorer.shaping = False
        engine = ObservedEngine(self.engine)
        found, answers = evaluate(engine, self.scorer, self.eval_prompts, self.scale, self.world, self.parallel)
        self.scorer.shaping = True
        self.engine.load_weights(self.policy.named_tensors(), self.trainer.version)
        (trained,) = self.parallel.sum([self.trainer.ledger.tokens["trained"]])
        if self.is_main:  # the first rank's engine, as for the windows
            self._write_decode(self.eval_decode, engine.steps)
            self.log.log(self.trainer.num_steps, found | {"time/train_s": self.trainer.train_s, "ledger/trained": trained})
            write_texts(
                self.out / f"answers-{self.trainer.num_steps:08d}.jsonl", answers[: self.scale.evaluation.save_texts], self.task
            )
        self.accuracy, self.evaluated_at = found["eval/accuracy"], self.trainer.num_steps

    def _due_evaluations(self) -> int:
        every = self.scale.evaluation.every_steps
        return self.trainer.num_steps // every if every else 0

    def _step(self) -> dict[str, float]:
        metrics = super()._step()
        self.checkpointer.poll()
        return metrics

    def save(self) -> Path:
        self._flush()
        return self.checkpointer.save(self.trainer)

    def _finish_saving(self) -> None:
        """Only where all ranks come by: one that failed must say so at once, and not wait here for the others."""
        self.checkpointer.finish()

    def _open_files(self, resume_step: int | None) -> None:
        super()._open_files(resume_step)
        (self.out / "config.json").write_text(json.dumps(dataclasses.asdict(self.scale), indent=1) + "\n")

    def _line(self, metrics: Mapping[str, float]) -> str:
        trained = metrics["policy/tokens"] / max(metrics["time/policy_s"], 1e-9)
        return (
            f"eval {self.accuracy:.2f}, score {metrics['response/score_mean']:+.2f}, length {metrics['response/length_mean']:.0f} "
            f"(cut {metrics['response/cut_share']:.0%}, capped {metrics['response/capped_share']:.0%}), "
            f"tokens/s {metrics['rollout/tokens_per_s']:.0f} decoded {trained:.0f} trained, "
            f"idle {1 - metrics['rollout/occupancy']:.0%}, gap {metrics['policy/logprob_gap']:.0e}, "
            f"explained {metrics['value/explained_variance']:.2f}"
        )

    def _warn(self, metrics: dict[str, float]) -> None:
        if not self.is_main:
            return
        super()._warn(metrics)
        step, limit = self.trainer.num_steps, self.scale.engine.gap_warning or thresholds(self.scale)[0]
        if metrics["policy/logprob_gap"] > limit:
            log.warning("step %d: engine and trainer log-probabilities differ by %.2g on average (engine.gap_warning %.2g): "
                        "policy.importance truncated corrects for it", step, metrics["policy/logprob_gap"], limit)  # fmt: skip
        if metrics["response/ended"] < self.world.world and step % 20 == 1:
            log.warning("step %d: only %d responses ended, the value model has little to learn from; a longer rollout.window "
                        "or more slots help", step, metrics["response/ended"])  # fmt: skip


def with_base_model(config: ScaleConfig, parallel: Collective) -> ScaleConfig:
    """The config with a policy to start from: a built-in task makes its own, once for all ranks, in algo.run.cache."""
    if not own_base_model(config):
        return config
    for first in (True, False):  # the others find what rank 0 made; without a shared cache they make the same one
        if (parallel.rank == 0) == first:
            folder = base_model(config.algo, load_task(config.algo.task.name))
        parallel.gather_objects(None)
    return replace_fields(config, {"algo.model.policy": folder})


def build_models(config: ScaleConfig, world: World, task: Task, *, weights: bool = True) -> tuple[PolicyModel, ValueModel]:
    """Policy and value model, sharded; the value model from `algo.model.value`, or on the policy's backbone."""
    model = config.algo.model
    policy = build_policy(config, world, task, weights=weights)
    value = load_sharded(
        ValueModel, model.value or model.policy or "", world, config.sharding, seed=config.algo.run.seed, weights=weights
    )
    assert isinstance(value, ValueModel)
    return policy, value


def build_policy(config: ScaleConfig, world: World, task: Task, *, weights: bool = True) -> PolicyModel:
    """The policy, sharded, with the config's sampling distribution."""
    model, rollout = config.algo.model, config.algo.rollout
    if not model.policy:
        raise UserError("algo.model.policy: expected a model's folder or a config.json, got none")
    policy = load_sharded(
        PolicyModel, model.policy, world, config.sharding, seed=config.algo.run.seed, weights=weights,
        temperature=rollout.temperature, min_response_tokens=rollout.min_response_tokens, end_token_id=task.end_token_id,
        logit_chunk_tokens=model.logit_chunk_tokens or None, sync_dtype=getattr(torch, config.engine.dtype),
    )  # fmt: skip
    assert isinstance(policy, PolicyModel)
    check_vocabulary("algo.model.policy", policy, task, model.policy)
    return policy


def build_engine(config: ScaleConfig, world: World, task: Task, slots: int) -> RolloutEngine:
    """The engine of this rank's group. It has no weights yet."""
    algo, engine = config.algo, config.engine
    context = task.max_prompt_tokens + algo.rollout.max_response_tokens
    source = Path(algo.model.policy or "")
    folder = source.parent if source.suffix == ".json" else source
    if engine.kind == "torch":
        if world.tensor_parallel > 1:
            raise UserError(
                f"engine.tensor_parallel: TorchEngine is one process, got {world.tensor_parallel}; give 1, or kind vllm"
            )
        copy = load_policy(str(folder / "config.json"), device=world.device, dtype=engine.dtype)
        return TorchEngine(copy, slots=slots, max_context_tokens=context, end_token_id=task.end_token_id,
                           temperature=algo.rollout.temperature, min_response_tokens=algo.rollout.min_response_tokens)  # fmt: skip
    heads = AutoConfig.from_pretrained(folder, local_files_only=True).num_attention_heads
    if heads % world.tensor_parallel:
        raise UserError(f"engine.tensor_parallel: {folder} has {heads} attention heads, which cannot be cut into "
                        f"{world.tensor_parallel}; give a divisor")  # fmt: skip
    options = {"block_size": engine.block_size} if engine.block_size else {}
    if engine.max_batched_tokens:
        options["max_num_batched_tokens"] = engine.max_batched_tokens
    return VLLMEngine(
        folder, world=world, slots=slots, max_context_tokens=context, end_token_id=task.end_token_id, dtype=engine.dtype,
        temperature=algo.rollout.temperature, min_response_tokens=algo.rollout.min_response_tokens, seed=algo.run.seed,
        sleep_level=engine.sleep_level, gpu_memory_utilization=engine.gpu_memory_utilization, options=options,
    )  # fmt: skip


def thresholds(config: ScaleConfig) -> tuple[float, float]:
    """(mean, top-1 %) gap above which the probe refuses to train."""
    mean, top = PROBE[config.engine.dtype if config.sharding.compute_dtype == "float32" else "bfloat16"]
    return config.engine.probe_mean or mean, config.engine.probe_top_percent or top


def probe(engine: VLLMEngine, policy: PolicyModel, task: Task, config: ScaleConfig) -> None:
    """Compare engine and trainer on the same tokens. UserError where they are further apart than the thresholds."""
    prompts = [prompt.token_ids for prompt in task.prompts("train")[: config.engine.probe_prompts]]
    gap = engine.probe(policy, prompts, new_tokens=config.engine.probe_tokens)
    mean, top = thresholds(config)
    verdict = (f"engine and trainer log-probabilities differ by {gap.mean:.2g} on average, {gap.top_percent:.2g} in the top 1 % "
               f"of {gap.num_tokens} tokens (allowed: {mean:.2g}, {top:.2g})")  # fmt: skip
    if not (gap.mean <= mean and gap.top_percent <= top):
        raise UserError(f"engine.probe_mean: {verdict}; look at dtype, temperature, the weights' sync and the prefix cache")
    if engine.world.rank == 0:
        log.info("probe passed: %s", verdict)


def train(config: ScaleConfig, world: World) -> Path:
    """Run or resume, and leave a checkpoint; the folder of checkpoints."""
    torch.set_num_threads(config.algo.run.threads)
    session = ScaleSession(config, world)
    try:
        session.train()
        return session.checkpoints
    finally:
        session.close()


__all__ = [
    "Config",
    "ScaleSession",
    "ShapingScorer",
    "build_engine",
    "build_models",
    "probe",
    "thresholds",
    "train",
    "with_base_model",
]
