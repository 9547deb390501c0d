"""`late-fork`: the task `fork` with its deciding token moved to the ninth place, as in the laboratory's `cliff`.

    prompt      left2 right0 0_ _3
    response    04 03 02 01 C 03 D 02 E 01 F END      four counters that are always the same, then the mark that decides

Nothing is chosen before the mark and nothing after it. The right side is always the same, so that there are eight marks to learn
instead of 64, and a critic that has seen a few thousand responses knows what each is worth: without that no edge matters (P3).
If responses begin with a window, one of nine tokens ends right behind the mark, one of eight right before it, one of ten a token
further on.

A task of benchmarks/studies.py alone: `known` puts it among the tasks for as long as runs of it are made.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from unittest.mock import patch

from tppo_ref.tasks import TASKS
from tppo_ref.tasks.fork import ForkTask
from tppo_ref.tasks.fork import verify as verify_fork
from tppo_ref.tasks.synthetic import Problem, two_digits

NAME = "late-fork"
LEAD = tuple(digit for left in range(4, 0, -1) for digit in two_digits(left))


@contextlib.contextmanager
def known() -> Iterator[None]:
    """While it lasts, `task.name late-fork` is known in this process."""
    with patch.dict(TASKS, {NAME: f"{__name__}:{LateFork.__name__}"}):
        yield


def verify(answer: str, response_token_ids: Sequence[int], response_text: str | None = None) -> float:
    """+1.0 if the lead, the mark, every step and the end are right, else -1.0."""
    lead, rest = tuple(response_token_ids[: len(LEAD)]), response_token_ids[len(LEAD) :]
    return verify_fork(answer, rest) if lead == LEAD else -1.0


class LateFork(ForkTask):
    """`fork` behind a lead of eight tokens."""

    name = NAME
    verifier = f"{__name__}:verify"
    max_response_tokens = len(LEAD) + ForkTask.max_response_tokens

    def draw_problem(self, rng: random.Random, long_share: float) -> Problem:
        left, _, steps = super().draw_problem(rng, long_share)
        return left, 0, steps

    def solve(self, problem: Problem) -> tuple[int, ...]:
        return (*LEAD, *super().solve(problem))

    def demonstrate(self, problem: Problem, rng: random.Random) -> tuple[int, ...]:
        return (*LEAD, *super().demonstrate(problem, rng))
