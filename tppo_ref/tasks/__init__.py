"""What is trained on: prompts, and a verifier that says of a response +1 or -1.

Importing this package imports neither torch nor transformers: the verifier processes import it too, and must start fast.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from tppo_ref.method.errors import UserError, nearest, refusal
from tppo_ref.method.records import Prompt


@runtime_checkable
class Task(Protocol):
    """Prompts of a `train` and a `test` split, and the name of the function that scores their responses.

    tokenizer       a `transformers` tokenizer, `ByteTokenizer`, or None where token ids have no text of their own
    vocab_size      number of token ids; the model's vocabulary must be at least this large
    end_token_id    the token that ends a response
    verifier        "module:function" of `verify(answer, response_token_ids, response_text) -> float`. It is pure, and its
                    module is imported in a separate process, so it should import little. The ids hold the end token
                    where one was sampled.
    max_prompt_tokens, max_response_tokens
                    tokens of the longest prompt, and of the longest right response (end token included); the latter is
                    None where it is not known, as for a user's own prompts
    """

    name: str
    tokenizer: Any | None
    vocab_size: int
    end_token_id: int
    verifier: str
    max_prompt_tokens: int
    max_response_tokens: int | None

    def prompts(self, split: str) -> Sequence[Prompt]:
        """The prompts of "train" or "test". Ids are unique over both splits and the same in every process."""
        ...

    def response_text(self, token_ids: Sequence[int]) -> str | None:
        """What the verifier gets as text: special tokens removed; None where there is no tokenizer."""
        ...

    def describe(self, token_ids: Sequence[int]) -> str:
        """A prompt or a response as text for people."""
        ...


@runtime_checkable
class DemonstratedTask(Task, Protocol):
    """A task that can make its own imperfect base model (warmstart.py)."""

    max_response_tokens: int

    def demonstrations(self, rng_seed: int, num: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """`num` pairs (prompt_ids, response_ids) of train problems, answered with the mistakes of the base model."""
        ...


@runtime_checkable
class EnvironmentTask(Task, Protocol):
    """A task of several turns: when the policy ends one, an environment (a tool, a partner) may answer, and the response goes on.

    turn_end_token_ids   tokens that end a turn, beside the end token, which may end one too
    The verifier gets all that was said, the environment's tokens among the policy's; `max_response_tokens` counts them, and so does
    rollout.max_response_tokens.
    """

    turn_end_token_ids: Sequence[int]

    def reply(self, prompt: Prompt, turns: Sequence[Sequence[int]]) -> Sequence[int] | None:
        """What is answered to the policy's turn `turns[-1]`, its end token included; None: with it the response ended.

        turns   the policy's and the environment's, one after the other, all so far
        A pure function, so that a restart needs no state of it and all ranks of a tensor-parallel group hear the same. At least one
        token, each below vocab_size. All decoding waits for it.
        """
        ...


TASKS: dict[str, str] = {
    "chain": "tppo_ref.tasks.chain:ChainTask",
    "fork": "tppo_ref.tasks.fork:ForkTask",
    "length": "tppo_ref.tasks.length:LengthTask",
    "maze": "tppo_ref.tasks.maze:MazeTask",
    "brackets": "tppo_ref.tasks.brackets:BracketsTask",
    "calculator": "tppo_ref.tasks.calculator:CalculatorTask",
    "jsonl": "tppo_ref.tasks.jsonl:JsonlTask",
}
"""Name -> "module:class"; a module is imported when its task is asked for."""


def load_task(name: str, **options: Any) -> Task:
    """The task `name` of `TASKS`, or "module:Class" of one's own, made with `options` (the keyword arguments of its class).

    Raises UserError for a name or an option that does not exist, with the nearest one that does, for a class that cannot be
    imported, and for an environment that lacks a part of one.
    """
    if name not in TASKS and ":" not in name:
        raise UserError(refusal("task.name", repr(name), f"one of {', '.join(TASKS)}, or module:Class") + nearest(name, TASKS))
    module, _, attribute = TASKS.get(name, name).partition(":")
    try:
        task_class = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever a user's module raises
        got = f"{name!r} ({type(error).__name__}: {' '.join(str(error).split())})"
        raise UserError(refusal("task.name", got, "a class that can be imported", "put its folder on PYTHONPATH")) from error
    allowed = list(inspect.signature(task_class).parameters)
    for option in options:
        if option not in allowed:
            expected = f"one of the options of {name}: {', '.join(allowed)}"
            raise UserError(refusal("task", f"the option {option!r}", expected) + nearest(option, allowed))
    task: Task = task_class(**options)
    if missing := missing_of_environment(task):
        expected = f"an environment (a task with reply or turn_end_token_ids) to have {', '.join(missing)}, too"
        raise UserError(refusal("task.name", repr(name), expected, "add what is missing: tppo_ref.tasks.EnvironmentTask says what"))
    return task


def missing_of_environment(task: Task) -> list[str]:
    """The members of an EnvironmentTask that a task lacks which has a part of what makes it one; none of any other task.

    With one of them missing it would be no EnvironmentTask, and would be trained on as if nobody answered.
    """
    if all(getattr(task, name, None) is None for name in ("reply", "turn_end_token_ids")):
        return []
    members = {name for protocol in (Task, EnvironmentTask) for name in (*inspect.get_annotations(protocol), *vars(protocol))}
    needed = {name for name in members if not name.startswith("_")}
    absent = {name for name in needed if not hasattr(task, name)}
    return sorted(absent | {name for name in needed - {"tokenizer", "max_response_tokens"} if getattr(task, name, None) is None})


__all__ = ["TASKS", "DemonstratedTask", "EnvironmentTask", "Task", "load_task"]
