"""`calculator`: a conversation with a tool. Press the right keys as often as the display asks for, then say what it shows.

    prompt        key3 4_ _7 6 0_ _2          start at 47, press what key3 stands for with 6, two times
    policy        * 6 =                       a turn, which "=" ends
    environment   01 : 82 |                   presses left, and the display (modulo 100)
    policy        * 6 =
    environment   00 : 92 |
    policy        92 END

What a key of the prompt stands for is a fixed table, which the base model knows poorly: it is right with probability 0.4, and goes
on as it began. The rest is mechanical for who reads the answers: when to stop and what to say stand in no other place. The policy
writes its keys and the result, and is trained on these alone; the environment's tokens are context.

Test problems are (key, start, operand, presses) that are in no train prompt; the table is shared, it is what is learnt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tppo_ref.method.records import Prompt
from tppo_ref.tasks.synthetic import END, FIRST_OWN_TOKEN, LONG_STEPS, Problem, SyntheticTask, draw_steps, prompt_number, two_digits

NUM_KEYS = 12
OPERATIONS = ("+", "-", "*")
RIGHT_OPERATION_PROBABILITY = 0.4
FAVOURITE_SHARE = 0.7
"""Share of the wrong operations that are the same wrong one every time for a key."""
MAX_PRESSES = LONG_STEPS[1] // 3

_KEY = FIRST_OWN_TOKEN
_OPERATION = _KEY + NUM_KEYS
EQUALS, COLON, BAR, UNREADABLE = range(_OPERATION + len(OPERATIONS), _OPERATION + len(OPERATIONS) + 4)

_rng = random.Random("calculator world 0")
RIGHT_OPERATION = tuple(_rng.randrange(len(OPERATIONS)) for _ in range(NUM_KEYS))
FAVOURITE_WRONG = tuple((right + _rng.randrange(1, 3)) % 3 for right in RIGHT_OPERATION)


def pressed(operation: int, display: int, operand: int) -> int:
    """What the display shows after a press."""
    return (display + operand, display - operand, display * operand)[operation] % 100


def shown(left: int, display: int) -> tuple[int, ...]:
    """What the environment says: presses left, and the display."""
    return (*two_digits(left), COLON, *two_digits(display), BAR)


def conversation(operation: int, start: int, operand: int, presses: int) -> tuple[int, ...]:
    """All that is said after the prompt by a policy that presses `operation` each time, end token included."""
    ids: list[int] = []
    for left in reversed(range(presses)):
        start = pressed(operation, start, operand)
        ids += (_OPERATION + operation, operand, EQUALS, *shown(left, start))
    return (*ids, *two_digits(start), END)


def verify(answer: str, response_token_ids: Sequence[int], response_text: str | None = None) -> float:
    """+1.0 if every key, every answer, the result and the end are right, else -1.0. `answer` is "key start operand presses"."""
    key, start, operand, presses = map(int, answer.split())
    return 1.0 if tuple(response_token_ids) == conversation(RIGHT_OPERATION[key], start, operand, presses) else -1.0


class CalculatorTask(SyntheticTask):
    """Problems are (key, start, operand, presses). Options: see `SyntheticTask`."""

    name = "calculator"
    verifier = "tppo_ref.tasks.calculator:verify"
    own_tokens = (*(f"key{i}" for i in range(NUM_KEYS)), *OPERATIONS, "=", ":", "|", "?")
    max_prompt_tokens = 6
    max_response_tokens = 9 * MAX_PRESSES + 3
    turn_end_token_ids = (EQUALS,)

    def reply(self, prompt: Prompt, turns: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
        """The display after an operation, a digit and "="; "?" and the display as it was after anything else that ends with "="."""
        *keys, last = turns[-1]
        if last != EQUALS:
            return None
        _, display, _, left = map(int, prompt.answer.split())
        if len(turns) > 1:
            tens_left, units_left, _, tens, units, _ = turns[-2][-6:]
            left, display = 10 * tens_left + units_left, 10 * tens + units
        operation = keys[0] - _OPERATION if len(keys) == 2 else -1
        if not (0 <= operation < len(OPERATIONS) and 0 <= keys[1] < 10):
            return (UNREADABLE, *shown(left, display))
        return shown(max(0, left - 1), pressed(operation, display, keys[1]))

    def draw_problem(self, rng: random.Random, long_share: float) -> Problem:
        presses = max(1, draw_steps(rng, long_share) // 3)
        return rng.randrange(NUM_KEYS), rng.randrange(100), rng.randrange(2, 10), presses

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        key, start, operand, presses = problem
        return (_KEY + key, *prompt_number(start), operand, *prompt_number(presses))

    def answer(self, problem: Problem) -> str:
        return "{} {} {} {}".format(*problem)

    def solve(self, problem: Problem) -> tuple[int, ...]:
        key, start, operand, presses = problem
        return conversation(RIGHT_OPERATION[key], start, operand, presses)

    def demonstrate(self, problem: Problem, rng: random.Random) -> tuple[int, ...]:
        """A guess at the operation, pressed each time; the environment's answers are among the tokens."""
        key, start, operand, presses = problem
        operation = RIGHT_OPERATION[key]
        if rng.random() >= RIGHT_OPERATION_PROBABILITY:
            other = (operation + rng.randrange(1, 3)) % 3
            operation = FAVOURITE_WRONG[key] if rng.random() < FAVOURITE_SHARE else other
        return conversation(operation, start, operand, presses)
