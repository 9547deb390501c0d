"""From a config to the parts of a run on a laptop: task, models, engines, scorer, checkpointer."""

from __future__ import annotations

import dataclasses
import functools
import json
import operator
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import PretrainedConfig

from tppo_ref.loop.meters import CLOCKS
from tppo_ref.loop.parallel import SingleProcess
from tppo_ref.loop.settings import RolloutConfig
from tppo_ref.method.errors import NonFiniteError, UserError, refusal
from tppo_ref.method.records import Prompt, Response
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.models import PolicyModel, ValueModel, load_policy, load_value_model
from tppo_ref.rollout.shapes import device_named, read_config, reason
from tppo_ref.rollout.torch_engine import TorchEngine
from tppo_ref.rollout.turns import Reply, transcript
from tppo_ref.runs.checkpoint import LocalCheckpointer
from tppo_ref.runs.config import FIXED_ON_RESUME, Config, TaskConfig
from tppo_ref.runs.evaluate import Evaluator, Sampler, make_batcher
from tppo_ref.runs.own_rule import rule_of
from tppo_ref.runs.parts import Parts
from tppo_ref.runs.references import leave_out_bad_references
from tppo_ref.runs.resume import resume_point
from tppo_ref.runs.validation import writable_folder
from tppo_ref.runs.warmstart import tiny_policy_config, warm_start
from tppo_ref.runs.watch import Watch
from tppo_ref.tasks import EnvironmentTask, Task, load_task
from tppo_ref.tasks.verifier import Verifier

EVALUATION_SLOTS = 256  # at most: evaluation decodes beside nothing else, so its batch may be larger than the run's


def build(config: Config) -> Parts:
    """The parts of a run in one process, from its checkpoint or from its beginning. UserError for what cannot be."""
    torch.set_num_threads(config.run.threads)
    record = dataclasses.asdict(config)
    out, cut_rule = writable_folder(config.run.out, "run.out"), rule_of(config)
    task = make_task(config)
    checkpointer = LocalCheckpointer(out / "checkpoints", record, task, keep=config.run.checkpoints_kept)
    resume_from = resume_point(checkpointer, config, resume=config.run.resume, fixed=FIXED_ON_RESUME)
    if resume_from is None:
        check_sources(config, task)
        base = base_model(config, task)
        policy_source, value_source = base, config.model.value or base
        ends = end_token_ids(task, base)
    else:
        policy_source, value_source = str(resume_from / "policy"), str(resume_from / "value")
        ends = end_token_ids(task, source_of_ends(resume_from))
    policy = make_policy(config, task, policy_source, ends)
    value = None if config.advantage.critic_free else make_value(config, task, value_source)
    rollout, every_s = config.rollout, config.run.eval_every_s
    scorer = TaskScorer(task, config.task)
    leave_out_bad_references(task, scorer.verifier, out, resume=resume_from is not None, progress=config.run.progress)
    return Parts(
        config=config, record=record, task=task, policy=policy, value=value, device=policy.device, parallel=SingleProcess(),
        engine=make_engine(config, task, policy, rollout.slots), scorer=scorer,
        batcher=make_batcher(make_schedule(rollout), task.prompts("train"), samples_per_prompt=rollout.samples_per_prompt,
                             seed=config.run.seed, reply=reply_of(task), now=CLOCKS[config.run.clock]),
        evaluator=make_evaluator(config, task, policy, scorer), checkpointer=checkpointer, resume_from=resume_from,
        due=lambda steps, train_s: int(train_s // every_s) if every_s else 0, watchers=[Watch(config)], cut_rule=cut_rule,
    )  # fmt: skip


def make_schedule(rollout: RolloutConfig, engines: int = 1) -> SlotSchedule:
    """The slots and windows of one of several engines, among which slots and a step's responses are dealt evenly."""
    return SlotSchedule(slots=rollout.slots // engines, window=rollout.window, max_response_tokens=rollout.max_response_tokens,
                        refill=rollout.refill, responses_per_step=rollout.responses_per_step // engines)  # fmt: skip


def make_evaluator(config: Config, task: Task, policy: PolicyModel, scorer: TaskScorer) -> Evaluator:
    """Answers of `policy` to the first run.eval_prompts prompts of the test split."""
    prompts = task.prompts("test")[: config.run.eval_prompts]
    sampler = make_sampler(config, task, policy, scorer, len(prompts) * config.run.eval_samples)
    return Evaluator(sampler=sampler, prompts=prompts, samples_per_prompt=config.run.eval_samples)


def make_sampler(config: Config, task: Task, policy: PolicyModel, scorer: TaskScorer, num_responses: int) -> Sampler:
    """A sampler with an engine of its own, with a slot for each of `num_responses`, up to EVALUATION_SLOTS."""
    slots = min(EVALUATION_SLOTS, num_responses)
    return Sampler(engine=make_engine(config, task, policy, slots), scorer=scorer, slots=slots,
                   max_response_tokens=config.rollout.max_response_tokens,
                   make_batcher=functools.partial(make_batcher, reply=reply_of(task)), now=CLOCKS[config.run.clock])  # fmt: skip


def reply_of(task: Task) -> Reply | None:
    """The environment of a task of several turns, with what it says checked; None: the task has none.

    UserError where it raises, or says what is no token.
    """
    if not isinstance(task, EnvironmentTask):
        return None

    def reply(prompt: Prompt, turns: Sequence[Sequence[int]]) -> Sequence[int] | None:
        name = f"task {task.name}: the reply to turn {len(turns) // 2 + 1} of prompt {prompt.id}"
        try:
            answer = task.reply(prompt, turns)
            if answer is None:
                return None
            tokens = [operator.index(token) for token in answer]
        except Exception as error:  # whatever a user's code raises
            raise UserError(refusal(name, f"{type(error).__name__} ({reason(error)})", "token ids, or None at the end")) from error
        if not tokens or not all(0 <= token < task.vocab_size for token in tokens):
            raise UserError(
                refusal(name, f"{tokens[:8]}", f"at least one token id, each below {task.vocab_size}, or None at the end")
            )
        return tokens

    return reply


class TaskScorer:
    """The task's verifier in its killable processes, as the Trainer's Scorer."""

    def __init__(self, task: Task, config: TaskConfig):
        self.task, self.name = task, task.verifier if config.verifier is None else config.verifier
        self.verifier = Verifier(self.name, config.verifier_timeout_s, config.verifier_workers, config.failure_score)

    def submit(self, response: Response) -> None:
        said = transcript(response)
        self.verifier.submit(response.id, response.prompt.answer, said, self.task.response_text(said))

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
        raise UserError("task.path: got none; expected a file of prompts with task.name jsonl; give --task.path FILE")
    tokenizer = task.tokenizer or config.model.policy
    if tokenizer is None:
        raise UserError("task.tokenizer: got none; expected a tokenizer with task.name jsonl; give a folder, or 'bytes'")
    return load_task(
        "jsonl", train=task.path, test=task.eval_path or "", tokenizer=tokenizer, chat_template=task.chat_template,
        prompt_key=task.prompt_key, answer_key=task.answer_key, max_prompt_tokens=task.max_prompt_tokens,
    )  # fmt: skip


def base_model(config: Config, task: Task) -> str:
    """Folder or config.json of the model that a run starts from; a built-in task makes (or finds) its own."""
    if config.model.policy is not None:
        return config.model.policy
    if not hasattr(task, "demonstrations"):
        raise UserError(
            f"model.policy: got none; expected a model for task {config.task.name}, which has none of its own; give its folder"
        )
    size, cache, shape = config.model, writable_folder(config.run.cache, "run.cache"), base_config(config, task)
    check_context(config, task, shape)
    device_named(config.model.device)
    try:
        made = warm_start(task, shape, steps=size.warm_start_steps, lr=size.warm_start_lr, cache_dir=cache,
                          progress=config.run.progress)  # fmt: skip
    except RuntimeError as error:
        # Told here and not in warmstart.py, whose source is in the base models' names, and these in the settings of all results.
        if "non-finite" not in str(error):
            raise
        got = f"{size.warm_start_lr}, with which a gradient of the warm start is not finite"
        raise NonFiniteError(refusal("model.warm_start_lr", got, "a rate that it learns with", "give a smaller one")) from None
    return str(made)


def base_config(config: Config, task: Task) -> PretrainedConfig:
    """The shape of a built-in task's own base model."""
    size = config.model
    return tiny_policy_config(task, num_layers=size.num_layers, width=size.hidden_size, num_heads=size.num_heads)


def make_policy(config: Config, task: Task, source: str, ends: tuple[int, ...] | None = None) -> PolicyModel:
    """The policy from `source`, with the sampling distribution of the config; a vocabulary that does not fit is refused.

    ends   the tokens that end a response; None: `end_token_ids` of the source
    """
    ends = end_token_ids(task, source) if ends is None else ends
    policy = load_policy(
        source, seed=config.run.seed, dtype=config.model.dtype, device=config.model.device,
        trust_remote_code=config.model.trust_remote_code, temperature=config.rollout.temperature,
        min_response_tokens=config.rollout.min_response_tokens, end_token_ids=ends,
        logit_chunk_tokens=config.model.logit_chunk_tokens or None,
    )  # fmt: skip
    check_vocabulary("model.policy", policy.hf.config, task, source)
    name_end_tokens(policy)
    return policy


def name_end_tokens(policy: PolicyModel) -> None:
    """Have each folder that this policy is saved in name what ends its responses, and nothing else.

    transformers would write down what the model's config.json or its architecture has for an end token, and whoever reads the
    folder (a resume, an evaluation) would end responses by it.
    """
    if policy.hf.can_generate():  # else it has no generation config, and none is saved
        policy.hf.generation_config.eos_token_id = list(policy.end_token_ids)
        policy.hf.generation_config._from_model_config = False  # transformers' mark of what it made of a config.json


def end_token_ids(task: Task, source: str | None) -> tuple[int, ...]:
    """The tokens that end a response, or a turn: the task's, and those that the model's own generation_config.json names.

    An instruct model ends its turn with one token (<|im_end|>) and a document with another (<|endoftext|>), and its tokenizer knows
    only one of them as its end: the other would run on to the cap.
    """
    own = tuple(dict.fromkeys((task.end_token_id, *(task.turn_end_token_ids if isinstance(task, EnvironmentTask) else ()))))
    file = Path(source or "") / "generation_config.json"
    if not source or not file.is_file():
        return own
    try:
        named = json.loads(file.read_text()).get("eos_token_id")
        further = {int(token) for token in (named if isinstance(named, list) else [named]) if token is not None}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            refusal("model.policy", f"{file}, which cannot be read ({error})", "numbers of its end tokens in it")
        ) from None
    return (*own, *sorted(further - {*own}))


def source_of_ends(checkpoint: Path) -> str | None:
    """The model whose folder names the end tokens of a run that goes on: its checkpoint's policy.

    Before `name_end_tokens`, a checkpoint named what transformers made of the model's config.json. Such a one bears transformers'
    mark, and its run goes on with the end tokens that it began with, as long as the model that it began with is where it was.
    """
    policy = checkpoint / "policy"
    file = policy / "generation_config.json"
    if not file.is_file() or not json.loads(file.read_text()).get("_from_model_config"):
        return str(policy)
    began_with: str | None = json.loads((checkpoint / "state.json").read_text())["config"]["model"]["policy"]
    return str(policy) if began_with and not Path(began_with).exists() else began_with


def check_sources(config: Config, task: Task) -> None:
    """Refuse models that are given and do not fit the task, by their config.json, before anything takes long."""
    critic = None if config.advantage.critic_free else config.model.value
    for field, source in (("model.policy", config.model.policy), ("model.value", critic)):
        if source is not None:
            model = model_config(field, source, config.model.trust_remote_code)
            check_vocabulary(field, model, task, source)
            if field == "model.value":
                check_value(config, task, model, source)


def model_config(field: str, source: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The transformers config of a model that a field gives; UserError with the field's name where it cannot be read."""
    try:
        return read_config(source, trust_remote_code)
    except UserError as error:
        raise UserError(f"{field}: {error}") from None
    except Exception as error:  # transformers raises a dozen types for a bad config
        raise UserError(
            refusal(field, f"{source}, which cannot be loaded ({reason(error)})", "a model's folder or config.json")
        ) from None


def check_vocabulary(field: str, model: PretrainedConfig, task: Task, source: str) -> None:
    """UserError where the task has tokens that the model has no embedding for."""
    found = model.get_text_config().vocab_size
    if not isinstance(found, int) or found < task.vocab_size:
        whose = f"task {task.name}" if task.tokenizer is None else "the task's tokenizer"
        remedy = "give the model's own tokenizer (task.tokenizer)"
        if task.tokenizer is None:
            remedy = f"take a model that was made for it, or leave {field} out"
        elif field.endswith("value"):
            remedy = "take a value model that was made from this policy, by pretrain-value"
        raise UserError(
            refusal(field, f"{source} with a vocabulary of {found} tokens", f"the {task.vocab_size} of {whose}", remedy)
        )


def check_value(config: Config, task: Task, model: PretrainedConfig, source: str) -> None:
    """UserError where a value model, of whatever size and architecture, cannot read what the policy writes: the tokenizer beside it
    gives a token another number, or it has fewer positions than the longest prompt and response need."""
    beside = Path(source) / "tokenizer.json"
    if beside.is_file() and task.tokenizer is not None and hasattr(task.tokenizer, "get_vocab"):
        own = Tokenizer.from_file(str(beside)).get_vocab()
        if other := sorted(token for token, number in task.tokenizer.get_vocab().items() if own.get(token) != number):
            got = f"{source}, whose tokenizer gives {other[0]!r} and {len(other) - 1} other tokens another number or none"
            raise UserError(refusal("model.value", got, "a value model that was made for the task's tokenizer"))
    longest = task.max_prompt_tokens + config.rollout.max_response_tokens
    room = getattr(model, "max_position_embeddings", None) or longest
    if room < longest:
        expected = f"a value model for the {longest} of the longest prompt and response (rollout.max_response_tokens)"
        raise UserError(refusal("model.value", f"{source}, made for {room} positions", expected))


def make_value(config: Config, task: Task, source: str) -> ValueModel:
    """The value model from `source`: a value model's folder, or a policy's, whose backbone gets a new head."""
    value = load_value_model(
        source, seed=config.run.seed, dtype=config.model.dtype, device=config.model.device,
        trust_remote_code=config.model.trust_remote_code,
    )  # fmt: skip
    check_vocabulary("model.value", value.hf.config, task, source)
    check_value(config, task, value.hf.config, source)
    return value


def make_engine(config: Config, task: Task, policy: PolicyModel, slots: int) -> TorchEngine:
    """An engine that decodes with the policy's own weights."""
    context = check_context(config, task, policy.hf.config)
    return TorchEngine(
        policy, slots=slots, max_context_tokens=context, end_token_ids=policy.end_token_ids,
        temperature=config.rollout.temperature, min_response_tokens=config.rollout.min_response_tokens,
        kv_cache=config.rollout.kv_cache,
    )  # fmt: skip


def check_context(config: Config, task: Task, model: PretrainedConfig) -> int:
    """Tokens of the longest prompt and response together; UserError where the model has no positions for them."""
    context, room = task.max_prompt_tokens + config.rollout.max_response_tokens, getattr(model, "max_position_embeddings", None)
    if room is not None and context > room:
        raise UserError(refusal("rollout.max_response_tokens", f"{config.rollout.max_response_tokens} beside prompts of up to "
                                f"{task.max_prompt_tokens} tokens", f"the model's context, {room}, to hold both"))  # fmt: skip
    return context
