"""What both programs of kills share (kills.py, kills_on_ranks.py): a tiny run, how and where it is struck, and the blow itself."""

from __future__ import annotations

import dataclasses
import os
import random
import resource
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from tppo_ref.method.records import Response
from tppo_ref.tasks.length import verify

TINY = {
    "task.name": "length", "model.warm_start_steps": 2, "model.hidden_size": 16, "model.num_layers": 1, "model.num_heads": 2,
    "rollout.slots": 6, "rollout.window": 8, "rollout.max_response_tokens": 30, "rollout.min_response_tokens": 2,
    "rollout.samples_per_prompt": 2, "advantage.tail_tokens": 2, "policy.mini_batches": 2, "policy.mini_batch_tokens": 0,
    "value.mini_batches": 2, "value.mini_batch_tokens": 0, "policy.lr": 2e-3, "policy.lr_warmup_steps": 3, "value.warmup_steps": 1,
    "run.eval_prompts": 2, "run.checkpoint_every": 1, "run.checkpoints_kept": 2, "run.progress": False,
    "run.cut_warning": 1.0,
}  # fmt: skip
HOWS = {"SIGKILL": 0.7, "SIGTERM": 0.1, "SIGSTOP": 0.1, "full disk": 0.1}
WHERES = {"random": 0.25, "start": 0.15, "decode": 0.15, "update": 0.15, "save": 0.15, "prune": 0.15}
CALLS = {"decode": 24, "update": 8}  # the latest call of a function of such a place that is struck; elsewhere the second
FULL_BYTES = 300  # no file may grow beyond
Places = Sequence[tuple[Any, str]]
"""Functions inside of which an attempt is ended: (owner, name)."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """How one attempt is ended. At `where` "random" after `delay_s`, else at the `call`-th call of a function of that place."""

    how: str
    where: str
    call: int
    function: int
    delay_s: float

    @classmethod
    def draw(cls, rng: random.Random) -> Self:
        (how,), (where,) = rng.choices(list(HOWS), list(HOWS.values())), rng.choices(list(WHERES), list(WHERES.values()))
        return cls(how, where, rng.randint(1, CALLS.get(where, 2)), rng.randrange(12), rng.uniform(0.0, 1.2))


def strike(how: str, process: int) -> None:
    """End a process, or ask it to end, or take its disk away."""
    if how == "full disk":
        resource.prlimit(process, resource.RLIMIT_FSIZE, (FULL_BYTES, resource.RLIM_INFINITY))
    else:
        os.kill(process, signal.Signals[how])


def plant(plan: Plan, options: Places, blow: Callable[[], None]) -> None:
    """See to it that the blow falls inside of the planned call: before it, or in the middle of a removal, or after it."""
    owner, name = options[plan.function % len(options)]
    inner, calls = getattr(owner, name), 0

    def struck(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        here = calls == plan.call
        if here and plan.function % 2:
            if name == "rmtree":  # some of the folder is gone
                for file in sorted(path for path in Path(args[0]).rglob("*") if path.is_file())[: plan.function]:
                    file.unlink()
            blow()
        result = inner(*args, **kwargs)
        if here and not plan.function % 2:
            blow()
        return result

    setattr(owner, name, struck)


class InProcessScorer:
    """The length task's verdicts without a process of their own: starting one takes as long as the rest of an attempt."""

    name = "tppo_ref.tasks.length:verify"

    def __init__(self, task: Any, config: Any):
        self.scores: dict[int, tuple[float, str]] = {}
        self.verifier = None

    def submit(self, response: Response) -> None:
        self.scores[response.id] = (verify(response.prompt.answer, response.token_ids, None), "ok")

    def collect(self) -> dict[int, tuple[float, str]]:
        scores, self.scores = self.scores, {}
        return scores

    def close(self) -> None:
        pass
