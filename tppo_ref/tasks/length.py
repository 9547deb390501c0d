"""`length`: the right length is the answer. Hand out exactly n of an item, counting up, then stop.

    prompt      bolt 0_ _3
    response    01 bolt 02 bolt 03 bolt END

Nothing about the response is doubtful except where it ends: the decision comes last, where `fork` has it first. For each
item the base model has a habit of its own, to stop one unit early or one late; it is right with probability 0.4
whatever n is, because the mistake is a distance from n and not a chance per step.

Test problems are (item, n) pairs that are in no train prompt; the items and the habits are shared.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tppo_ref.tasks.synthetic import END, FIRST_OWN_TOKEN, LONG_STEPS, Problem, SyntheticTask, draw_steps, prompt_number, two_digits

NUM_ITEMS = 16
RIGHT_STOP_PROBABILITY = 0.4
HABIT_SHARE = 0.5
"""Share of the wrong stops that follow the item's habit; the others go either way, each as often."""
MAX_DISTANCE = 1
MAX_UNITS = LONG_STEPS[1] - MAX_DISTANCE
"""So that a response that is one unit too long still has a two-digit counter."""

_ITEM = FIRST_OWN_TOKEN
DISTANCES = tuple(d for d in range(-MAX_DISTANCE, MAX_DISTANCE + 1) if d != 0)
HABIT = tuple(random.Random("length world 0").choice(DISTANCES) for _ in range(NUM_ITEMS))
"""Per item: by how many units the base model likes to miss n. One, not more: to see that a counter is n - 3 is
arithmetic with a borrow, which a model of this size gets wrong for large n, and then long problems have no signal."""


def response_of(item: int, num_units: int) -> tuple[int, ...]:
    """The response that hands out `num_units` of `item`, end token included."""
    ids: list[int] = []
    for unit in range(1, num_units + 1):
        ids += (*two_digits(unit), _ITEM + item)
    return (*ids, END)


def verify(answer: str, response_token_ids: Sequence[int], response_text: str | None = None) -> float:
    """+1.0 if exactly n units of the item are counted out and then the end comes, else -1.0. `answer` is "item n"."""
    item, num_units = map(int, answer.split())
    return 1.0 if tuple(response_token_ids) == response_of(item, num_units) else -1.0


class LengthTask(SyntheticTask):
    """Problems are (item, n). Options: see `SyntheticTask`."""

    name = "length"
    verifier = "tppo_ref.tasks.length:verify"
    own_tokens = ("bolt", "nut", "nail", "screw", "pin", "hook", "ring", "cog", "cap", "rod", "peg", "tie", "fuse",
                  "wire", "bulb", "bead")  # fmt: skip
    max_prompt_tokens = 3
    max_response_tokens = 3 * MAX_UNITS + 1

    def draw_problem(self, rng: random.Random, long_share: float) -> Problem:
        return rng.randrange(NUM_ITEMS), min(MAX_UNITS, draw_steps(rng, long_share))

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        item, num_units = problem
        return (_ITEM + item, *prompt_number(num_units))

    def answer(self, problem: Problem) -> str:
        return "{} {}".format(*problem)

    def solve(self, problem: Problem) -> tuple[int, ...]:
        return response_of(*problem)

    def demonstrate(self, problem: Problem, rng: random.Random) -> tuple[int, ...]:
        """The right units, but often too few or too many of them; at least one."""
        item, num_units = problem
        if rng.random() >= RIGHT_STOP_PROBABILITY:
            distance = HABIT[item] if rng.random() < HABIT_SHARE else rng.choice(DISTANCES)
            # Where there are too few units to leave out, the mistake goes the other way.
            num_units += distance if num_units + distance >= 1 else -distance
        return response_of(item, num_units)
