"""What a config refuses before anything is loaded: one line with the field, its value, what was expected and what helps.

A number outside of its bounds, which stand beside the field; what cannot run (IMPOSSIBLE); and options that another one cancels
(CANCELLED), which would otherwise be given and do nothing.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
import typing
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from tppo_ref.loop.bounds import LARGEST, bounds_of
from tppo_ref.loop.settings import ValueConfig
from tppo_ref.method.advantages import CutValue
from tppo_ref.method.errors import UserError, refusal
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import get_field

# ------------------------------------------------------------------------------------------------------------------- one field


def check_bounds(config: Any, prefix: str = "") -> None:
    """UserError for the first number of a nested config that is outside of its field's bounds, or not finite."""
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        value, bounds = getattr(config, name), bounds_of(hint)
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{prefix}{name}.")
        elif bounds is not None and value is not None and not bounds.holds(value):
            kind = "an integer" if Annotated[int, bounds] == hint else "a number"
            null = ", or null" if type(None) in typing.get_args(hint) else ""
            largest = f", at most {LARGEST:,.0f}" if value > LARGEST == bounds.high else ""
            raise UserError(refusal(f"{prefix}{name}", str(value), f"{kind} {bounds}{largest}{null}"))


MOST_STEPS = 5
"""Training steps that a run may trace."""


def steps_of(text: str) -> range | None:
    """The steps that run.profile_steps names, FIRST:LAST with both included; none for "". None where it names none, or too many."""
    if not text:
        return range(0)
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if match is None:
        return None
    first, last = map(int, match.groups())
    return range(first, last + 1) if 1 <= first <= last < first + MOST_STEPS else None


# -------------------------------------------------------------------------------------------------------------- several fields


class Refusal(NamedTuple):
    """`field` is refused where `when` holds. Names of other fields in braces stand for their values."""

    field: str
    when: Callable[[Any], bool]
    expected: str
    remedy: str = ""


def never_cut(c: Config) -> bool:
    """Every row is a whole response: nothing is RUNNING at a window's edge when it is trained."""
    synchronous = c.rollout.refill == "step" and c.rollout.window >= c.rollout.max_response_tokens
    return c.rollout.refill == "batch" or synchronous or c.policy.train_on == "ended"


def critic_free(c: Config) -> bool:
    """There is no value model."""
    return c.advantage.critic_free


CUT_VALUES = typing.get_args(CutValue)
"""What `egae` knows itself."""

IMPOSSIBLE = (
    Refusal("rollout.samples_per_prompt", lambda c: critic_free(c) and c.rollout.samples_per_prompt < 2,
            "at least 2 with advantage.estimator {advantage.estimator}, which measures a prompt's responses against each other",
            "give --rollout.samples_per_prompt 4, or more"),
    Refusal("policy.train_on", lambda c: critic_free(c) and not never_cut(c),
            "ended with advantage.estimator {advantage.estimator}: a response that is cut has no score yet",
            "give it, or --run.method {advantage.estimator}-window"),
    Refusal("rollout.min_response_tokens", lambda c: c.rollout.min_response_tokens >= c.rollout.max_response_tokens,
            "less than rollout.max_response_tokens ({rollout.max_response_tokens})"),
    Refusal("rollout.responses_per_step", lambda c: 0 < c.rollout.responses_per_step < c.rollout.slots,
            "0, or at least rollout.slots ({rollout.slots})"),
    Refusal("model.hidden_size", lambda c: c.model.hidden_size % (2 * c.model.num_heads) != 0,
            "a multiple of twice model.num_heads ({model.num_heads})"),
    Refusal("policy.old_logprobs", lambda c: c.policy.importance != "none" and c.policy.old_logprobs == "engine",
            "recompute with policy.importance {policy.importance}, whose weights compare both"),
    Refusal("rollout.kv_cache", lambda c: c.rollout.kv_cache != "auto" and c.policy.importance == "none",
            "auto with policy.importance none (policy.old_logprobs {policy.old_logprobs}): rounded keys are another policy",
            "give --policy.importance truncated, with old_logprobs recompute"),
    Refusal("policy.importance", lambda c: c.policy.importance == "generalised" and c.policy.ewma_decay > 0,
            "none, truncated or masked with policy.ewma_decay {policy.ewma_decay}, which has a clip of its own"),
    Refusal("policy.reuse_batches", lambda c: c.policy.reuse_batches > 0 and not never_cut(c),
            "0 where rows are cut: only whole responses are trained on again", "give --run.method geppo"),
    Refusal("run.clock", lambda c: c.run.clock == "cpu" and c.model.device != "cpu",
            "wall with model.device {model.device}, whose work this process's CPU seconds do not count"),
    Refusal("run.profile_steps", lambda c: steps_of(c.run.profile_steps) is None,
            f"FIRST:LAST, as 3:5, the first step being 1, at most {MOST_STEPS} steps; or nothing"),
    Refusal("policy.keep_prefix",
            lambda c: c.policy.keep_prefix and (c.policy.prefix, c.policy.old_logprobs) != ("constant", "recompute"),
            "false, or policy.prefix constant with policy.old_logprobs recompute, which fills it"),
    Refusal("advantage.cut_value", lambda c: c.advantage.cut_value not in CUT_VALUES and ":" not in c.advantage.cut_value,
            f"{', '.join(CUT_VALUES)}, or module:function, a rule of your own (tppo_ref/loop/cut_rules.py)"),
    Refusal("advantage.tail", lambda c: c.advantage.tail == "defer" and not c.advantage.tail_tokens,
            "exclude with advantage.tail_tokens 0, which leaves nothing to defer",
            "give a tail, or choose another run.method"),
)  # fmt: skip
"""What cannot run."""


class Cancelled(NamedTuple):
    """`field` does nothing where `when` holds: there it is refused, unless it is as by default and so was hardly given."""

    field: str
    when: Callable[[Any], bool]
    why: str


def joint(c: Config) -> bool:
    """The value model trains on the policy's rows, in the policy's mini-batches."""
    return c.value.update == "joint"


def built_in(c: Config) -> bool:
    """The task makes its own prompts."""
    return c.task.name != "jsonl"


NO_VALUE = "with advantage.estimator {advantage.estimator} there is no value model"
NO_LAMBDA = "with advantage.estimator {advantage.estimator} all tokens of a response have its advantage"
JOINT = "with value.update joint the value model trains in the policy's mini-batches"
WHOLE_ROWS = "no row is cut (rollout.refill {rollout.refill}, policy.train_on {policy.train_on})"
NO_FILE = "task.name {task.name} reads no file; give --task.name jsonl to train on your own prompts"
BY_TOKENS = "{section}.mini_batch_tokens {{{section}.mini_batch_tokens}} says how many there are; 0 lets mini_batches count"

CANCELLED = (
    *(Cancelled(f"value.{field.name}", critic_free, NO_VALUE) for field in dataclasses.fields(ValueConfig)),
    Cancelled("model.value", critic_free, NO_VALUE),
    *(Cancelled(f"advantage.{name}", critic_free, NO_LAMBDA) for name in ("gamma", "lam", "lam_alpha")),
    *(Cancelled(f"value.{name}", joint, JOINT)
      for name in ("epochs", "batch_responses", "mini_batches", "mini_batch_tokens", "micro_batch_tokens")),
    *(Cancelled(f"advantage.{name}", never_cut, WHOLE_ROWS) for name in ("cut_value", "tail", "tail_tokens")),
    Cancelled("policy.min_new_tokens", never_cut, WHOLE_ROWS),
    Cancelled("rollout.window", lambda c: c.rollout.refill == "batch" and c.rollout.window != c.rollout.max_response_tokens,
              "with rollout.refill batch a window closes when its responses have ended"),
    Cancelled("rollout.responses_per_step", lambda c: c.rollout.refill != "batch",
              "only rollout.refill batch has a batch, not {rollout.refill}"),
    Cancelled("policy.mini_batches", lambda c: c.policy.mini_batch_tokens > 0, BY_TOKENS.format(section="policy")),
    Cancelled("value.mini_batches", lambda c: c.value.mini_batch_tokens > 0, BY_TOKENS.format(section="value")),
    Cancelled("policy.importance_cap", lambda c: c.policy.importance in ("none", "generalised") and not c.policy.ewma_decay,
              "with policy.importance {policy.importance} there are no weights"),
    Cancelled("policy.engine_gap_limit", lambda c: c.policy.old_logprobs != "engine",
              "with policy.old_logprobs {policy.old_logprobs} the engine's are not taken"),
    Cancelled("advantage.clamp", lambda c: not c.advantage.whiten, "only whitened advantages are clamped (advantage.whiten false)"),
    Cancelled("advantage.lam_alpha", lambda c: c.advantage.lam == 1, "with advantage.lam 1 lambda is 1 at every length"),
    Cancelled("run.steps", lambda c: c.run.train_seconds is not None, "run.train_seconds {run.train_seconds} ends the run"),
)  # fmt: skip
"""Options of training that another option cancels."""

CANCELLED_TASK = tuple(
    Cancelled(f"task.{name}", built_in, NO_FILE)
    for name in ("path", "eval_path", "tokenizer", "prompt_key", "answer_key", "max_prompt_tokens", "chat_template")
)
"""Options of the task that its name cancels."""

CANCELLED_MODEL = tuple(
    Cancelled(f"model.{name}", lambda c: c.model.policy is not None, "model.policy {model.policy} has its own shape and weights")
    for name in ("hidden_size", "num_layers", "num_heads", "warm_start_steps", "warm_start_lr")
)
"""Options of the built-in base model that a model of one's own cancels."""


def refuse(config: Any, refusals: Sequence[Refusal]) -> None:
    """UserError for the first of `refusals` that holds of a config."""
    for one in refusals:
        if one.when(config):
            expected, remedy = _filled(one.expected, config), _filled(one.remedy, config)
            raise UserError(refusal(one.field, str(get_field(config, one.field)), expected, remedy))


def refuse_cancelled(config: Any, table: Sequence[Cancelled], given: Collection[str] = ()) -> None:
    """UserError for the first field of `table` that was given and does nothing.

    given   fields that are known to have been given, whatever their value
    """
    if found := cancelled_fields(config, table, given):
        field, _, why = found[0]
        raise UserError(refusal(field, str(get_field(config, field)), f"it left out: {_filled(why, config)}", "drop it"))


def cancelled_fields(config: Any, table: Sequence[Cancelled], given: Collection[str] = ()) -> list[Cancelled]:
    """Rows of `table` whose field was given and does nothing."""
    defaults = type(config)()
    done = [one for one in table if one.field in given or get_field(config, one.field) != get_field(defaults, one.field)]
    return [one for one in done if one.when(config)]


def _filled(text: str, config: Any) -> str:
    """`{section.field}` replaced by its value."""
    return re.sub(r"{([\w.]+)}", lambda match: str(get_field(config, match[1])), text)


# -------------------------------------------------------------------------------------------------------------------- a command


def check(config: Config) -> None:
    """Refuse what no command can run with."""
    check_bounds(config)
    refuse(config, IMPOSSIBLE)


def check_task(config: Config) -> None:
    """Refuse options of task and base model that do nothing, for the commands that train and evaluate."""
    refuse_cancelled(config, (*CANCELLED_TASK, *CANCELLED_MODEL))


def check_training(config: Config, given: Collection[str] = ()) -> None:
    """Refuse options of training that do nothing: for a config as it will be trained, its method applied."""
    refuse_cancelled(config, CANCELLED, given)


def refuse_without_critic(config: Config) -> None:
    """For the command that makes a value model: refuse a method that has none, of a config that its method is applied to."""
    which = config.advantage.estimator
    if which != Config().advantage.estimator:
        raise UserError(refusal("advantage.estimator", which, "egae: the other estimators train without a value model",
                                "leave pretrain-value out"))  # fmt: skip


def writable_folder(path: str, name: str) -> Path:
    """`path` as an existing folder that can be written to, or a UserError that names the field."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # nameless: ranks of other machines test the same folder at the same time
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        why = getattr(error, "strerror", None) or str(error)
        raise UserError(refusal(name, path[:200], "a folder that can be written to", f"{why}; choose another")) from None
    return folder
