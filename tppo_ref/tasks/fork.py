"""`fork`: one early token decides. Choose a mark, then go on with it to the end.

    prompt      left2 right5 0_ _3      which mark belongs to this pair, and three steps
    response    C 03 D 02 E 01 F END

The right mark is the entry of a fixed table of 8 x 8 pairs. After it everything is mechanical: count down, and take the
next mark of the circle A ... H. The value of a response jumps at its first token and hardly moves after it, however long the
rest is; the length says nothing about the choice, because a wrong mark is carried on just as far. Credit for the choice in a
response that a window cuts rests on the critic alone: a task on which truncation need not win.

The base model knows the table poorly: the right mark has probability 0.38, for short and long problems alike.

Test problems are (left, right, steps) triples that are in no train prompt; the table is shared, it is what is learnt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tppo_ref.tasks.synthetic import END, FIRST_OWN_TOKEN, LONG_STEPS, Problem, SyntheticTask, draw_steps, prompt_number, two_digits

NUM_SIDES = 8
NUM_MARKS = 8
RIGHT_MARK_PROBABILITY = 0.38
FAVOURITE_SHARE = 0.6
"""Share of the wrong marks that are the same wrong mark every time for a pair."""

_MARK = FIRST_OWN_TOKEN
_LEFT = _MARK + NUM_MARKS
_RIGHT = _LEFT + NUM_SIDES


def _make_world() -> tuple[list[list[int]], list[list[int]]]:
    """Per pair: the right mark, and the wrong one that the base model favours."""
    rng = random.Random("fork world 0")
    marks = [[rng.randrange(NUM_MARKS) for _ in range(NUM_SIDES)] for _ in range(NUM_SIDES)]
    wrong = [[(mark + rng.randrange(1, NUM_MARKS)) % NUM_MARKS for mark in row] for row in marks]
    return marks, wrong


RIGHT_MARK, FAVOURITE_WRONG = _make_world()


def response_for(mark: int, steps: int) -> tuple[int, ...]:
    """The response that chooses `mark`, end token included; its length depends on `steps` alone."""
    ids = [_MARK + mark]
    for left in range(steps, 0, -1):
        mark = (mark + 1) % NUM_MARKS
        ids += (*two_digits(left), _MARK + mark)
    return (*ids, END)


def verify(answer: str, response_token_ids: Sequence[int], response_text: str | None = None) -> float:
    """+1.0 if the mark, every step and the end are right, else -1.0. `answer` is "mark steps"."""
    mark, steps = map(int, answer.split())
    return 1.0 if tuple(response_token_ids) == response_for(mark, steps) else -1.0


class ForkTask(SyntheticTask):
    """Problems are (left, right, steps). Options: see `SyntheticTask`."""

    name = "fork"
    verifier = "tppo_ref.tasks.fork:verify"
    own_tokens = (*"ABCDEFGH", *(f"left{i}" for i in range(NUM_SIDES)), *(f"right{i}" for i in range(NUM_SIDES)))
    max_prompt_tokens = 4
    max_response_tokens = 3 * LONG_STEPS[1] + 2

    def draw_problem(self, rng: random.Random, long_share: float) -> Problem:
        return rng.randrange(NUM_SIDES), rng.randrange(NUM_SIDES), draw_steps(rng, long_share)

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        left, right, steps = problem
        return (_LEFT + left, _RIGHT + right, *prompt_number(steps))

    def answer(self, problem: Problem) -> str:
        left, right, steps = problem
        return f"{RIGHT_MARK[left][right]} {steps}"

    def solve(self, problem: Problem) -> tuple[int, ...]:
        left, right, steps = problem
        return response_for(RIGHT_MARK[left][right], steps)

    def demonstrate(self, problem: Problem, rng: random.Random) -> tuple[int, ...]:
        """A guess at the mark, carried on correctly."""
        left, right, steps = problem
        mark = RIGHT_MARK[left][right]
        if rng.random() >= RIGHT_MARK_PROBABILITY:
            other = (mark + rng.randrange(1, NUM_MARKS)) % NUM_MARKS
            mark = FAVOURITE_WRONG[left][right] if rng.random() < FAVOURITE_SHARE else other
        return response_for(mark, steps)
