"""From a config to the parts of a run: task, models, engines, scorer."""

from __future__ import annotations

from transformers import PretrainedConfig

from tppo_ref.method.errors import UserError
from tppo_ref.method.records import Response
from tppo_ref.rollout.models import PolicyModel, ValueModel, load_policy, load_value_model
from tppo_ref.rollout.torch_engine import TorchEngine
from tppo_ref.runs.config import Config, TaskConfig
from tppo_ref.runs.validation import writable_folder
from tppo_ref.runs.warmstart import tiny_policy_config, warm_start
from tppo_ref.tasks import Task, load_task
from tppo_ref.tasks.verifier import Verifier


class TaskScorer:
    """The task's verifier in its killable processes, as the Trainer's Scorer."""

    def __init__(self, task: Task, config: TaskConfig):
        self.task = task
        name = config.verifier or task.verifier
        self.verifier = Verifier(name, config.verifier_timeout_s, config.verifier_workers, config.failure_score)

    def submit(self, response: Response) -> None:
        text = self.task.response_text(response.token_ids)
        self.verifier.submit(response.id, response.prompt.answer, response.token_ids, text)

    def collect(self) -> dict[int, tuple[float, str]]:
        return {int(str(id)): (score.value, score.status) for id, score in self.verifier.collect().items()}

    def close(self) -> None:
        self.verifier.close()


def make_task(config: Config) -> Task:
    """The task that a config names."""
    task = config.task
    if task.name != "jsonl":
        return load_task(task.name)
    if task.path is None:
        raise UserError("task.path: the jsonl task needs a file of prompts, got none; give --task.path FILE")
    tokenizer = task.tokenizer or config.model.policy
    if tokenizer is None:
        raise UserError("task.tokenizer: the jsonl task needs a tokenizer, got none; give a folder, or 'bytes'")
    return load_task(
        "jsonl", train=task.path, test=task.eval_path or "", tokenizer=tokenizer, chat_template=task.chat_template,
        prompt_key=task.prompt_key, answer_key=task.answer_key, max_prompt_tokens=task.max_prompt_tokens,
    )  # fmt: skip


def base_model(config: Config, task: Task) -> str:
    """Folder or config.json of the model that a run starts from; a built-in task makes (or finds) its own."""
    if config.model.policy is not None:
        return config.model.policy
    if not hasattr(task, "demonstrations"):
        raise UserError(f"model.policy: task {config.task.name} has no base model of its own, got none; give a checkpoint folder")
    size, cache = config.model, writable_folder(config.run.cache, "run.cache")
    return str(
        warm_start(task, base_config(config, task), steps=size.warm_start_steps, lr=size.warm_start_lr, cache_dir=cache,
                   progress=config.run.progress)
    )  # fmt: skip


def base_config(config: Config, task: Task) -> PretrainedConfig:
    """The shape of a built-in task's own base model."""
    size = config.model
    return tiny_policy_config(task, num_layers=size.num_layers, width=size.hidden_size, num_heads=size.num_heads)


def make_policy(config: Config, task: Task, source: str) -> PolicyModel:
    """The policy from `source`, with the sampling distribution of the config; a vocabulary that does not fit is refused."""
    policy = load_policy(
        source, seed=config.run.seed, dtype=config.model.dtype, device=config.model.device,
        trust_remote_code=config.model.trust_remote_code, temperature=config.rollout.temperature,
        min_response_tokens=config.rollout.min_response_tokens, end_token_id=task.end_token_id,
        logit_chunk_tokens=config.model.logit_chunk_tokens or None,
    )  # fmt: skip
    check_vocabulary("model.policy", policy, task, source)
    return policy


def check_vocabulary(field: str, model: PolicyModel | ValueModel, task: Task, source: str) -> None:
    """UserError where the task's tokenizer has tokens that the model has no embedding for."""
    if model.hf.config.vocab_size < task.vocab_size:
        raise UserError(
            f"{field}: {source} has a vocabulary of {model.hf.config.vocab_size} tokens, the task's tokenizer "
            f"{task.vocab_size}; use the tokenizer that belongs to the model (task.tokenizer)"
        )


def make_value(config: Config, task: Task, source: str) -> ValueModel:
    """The value model from `source`: a value model's folder, or a policy's, whose backbone gets a new head."""
    value = load_value_model(
        source, seed=config.run.seed, dtype=config.model.dtype, device=config.model.device,
        trust_remote_code=config.model.trust_remote_code,
    )  # fmt: skip
    check_vocabulary("model.value", value, task, source)
    return value


def make_engine(config: Config, task: Task, policy: PolicyModel, slots: int) -> TorchEngine:
    """An engine that decodes with the policy's own weights."""
    context = task.max_prompt_tokens + config.rollout.max_response_tokens
    room = getattr(policy.hf.config, "max_position_embeddings", None)
    if room is not None and context > room:
        raise UserError(f"rollout.max_response_tokens: {config.rollout.max_response_tokens} and prompts of up to "
                        f"{task.max_prompt_tokens} tokens exceed the model's context of {room}; lower one of them")  # fmt: skip
    return TorchEngine(
        policy, slots=slots, max_context_tokens=context, end_token_id=task.end_token_id,
        temperature=config.rollout.temperature, min_response_tokens=config.rollout.min_response_tokens,
    )  # fmt: skip
