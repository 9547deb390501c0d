"""`brackets`: the last symbols turn the sense. Close a word of brackets, innermost first.

    prompt      1( 2[ 3( 4< 5{ 0_ _7    the word ( [ ( < {, repeated to a depth of seven brackets: ( [ ( < { ( [
    response    07 ] 06 ) 05 } 04 > 03 )! 02 ] 01 )! END    depth, closer

A closer has two forms, plain and with a bar. At the three outermost brackets one of them keeps the sense and the other turns it
round: which, a fixed table of depth and kind says; further inside the plain form keeps. A response is right if everything is
closed in order and the sense has been turned an even number of times: the last symbol can spoil all, or save it.

The base model closes without fault, and knows the table poorly: the last closer keeps the sense with probability 0.4, the two
before it with 0.85 each. So the value stays where it is for the whole mechanical inside, and swings up and down over the last
closers, however long the word is: where the ones to come turn with probabilities q_i, a response that stands straight is right
with probability (1 + prod(1 - 2 q_i)) / 2, and one that stands turned with the rest.

Test problems are (word, depth) that are in no train prompt; the table is shared, it is what is learnt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from tppo_ref.tasks.synthetic import END, FIRST_OWN_TOKEN, LONG_STEPS, Problem, SyntheticTask, draw_steps, prompt_number, two_digits

OPENERS, CLOSERS = "([{<", ")]}>"
NUM_KINDS = len(OPENERS)
WORD_LENGTH = 5
"""A divisor of ten: the last digit of a depth says which bracket of the word stands there."""
NUM_LATE = 3
"""The outermost brackets, closed last, whose form is doubtful."""
LONG_SHARE = 0.25
"""More long problems than the other tasks have: most tokens lie in rows that a window of 64 cuts."""
KEEP_PROBABILITY = (0.4, 0.85, 0.85)
"""Of the base model's forms, the outermost bracket first. Were all three as doubtful as the last, the odds of an even number would
be even whatever one of them does: nothing to learn from."""

_CLOSER = FIRST_OWN_TOKEN  # of each kind the plain form, then of each the barred one
_OPENER = _CLOSER + 2 * NUM_KINDS  # then a token for each place in the word with each kind
_WORLD = random.Random("brackets world 0")
KEEPS = [[_WORLD.randrange(2) for _ in OPENERS] for _ in range(NUM_LATE)]
"""Per depth (the outermost first) and kind: the form that keeps the sense, 0 plain or 1 barred."""


def keeping_form(word: Sequence[int], depth: int) -> int:
    """The form that keeps the sense at a depth of 1 or more."""
    return KEEPS[depth - 1][word[depth - 1]] if depth <= NUM_LATE else 0


def closed(word: Sequence[int], forms: Sequence[int]) -> tuple[tuple[int, ...], bool]:
    """The response that closes the word in these forms, innermost first, end token included; and whether its sense is straight."""
    ids: list[int] = []
    straight = True
    for depth, form in zip(range(len(forms), 0, -1), forms, strict=True):
        straight ^= form != keeping_form(word, depth)
        ids += (*two_digits(depth), _CLOSER + NUM_KINDS * form + word[(depth - 1) % WORD_LENGTH])
    return (*ids, END), straight


def verify(answer: str, response_token_ids: Sequence[int], response_text: str | None = None) -> float:
    """+1.0 if all is closed in order, ended, and turned an even number of times, else -1.0. `answer` is the word and the depth."""
    *word, depth = map(int, answer.split())
    forms = [int(token >= _CLOSER + NUM_KINDS) for token in response_token_ids[2:-1:3]]
    if len(forms) != depth:
        return -1.0
    ids, straight = closed(word, forms)
    return 1.0 if tuple(response_token_ids) == ids and straight else -1.0


class BracketsTask(SyntheticTask):
    """Problems are (five kinds, depth). Options: see `SyntheticTask`; `long_share` is 0.25 here."""

    name = "brackets"
    verifier = "tppo_ref.tasks.brackets:verify"
    own_tokens = (*CLOSERS, *(closer + "!" for closer in CLOSERS),
                  *(f"{place}{opener}" for place in range(1, WORD_LENGTH + 1) for opener in OPENERS))  # fmt: skip
    max_prompt_tokens = WORD_LENGTH + 2
    max_response_tokens = 3 * LONG_STEPS[1] + 1

    def __init__(self, *, seed: int = 0, num_train: int = 4096, num_test: int = 256, long_share: float = LONG_SHARE) -> None:
        super().__init__(seed=seed, num_train=num_train, num_test=num_test, long_share=long_share)

    def draw_problem(self, rng: random.Random, long_share: float) -> Problem:
        word = (rng.randrange(NUM_KINDS) for _ in range(WORD_LENGTH))
        return *word, draw_steps(rng, long_share)

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        *word, depth = problem
        return (*(_OPENER + NUM_KINDS * place + kind for place, kind in enumerate(word)), *prompt_number(depth))

    def answer(self, problem: Problem) -> str:
        return " ".join(map(str, problem))

    def solve(self, problem: Problem) -> tuple[int, ...]:
        """The response that never turns the sense: one right response of several."""
        *word, depth = problem
        return closed(word, [keeping_form(word, d) for d in range(depth, 0, -1)])[0]

    def demonstrate(self, problem: Problem, rng: random.Random) -> tuple[int, ...]:
        """Closed in order; at each of the outermost the form may be the one that turns."""
        *word, depth = problem
        forms = [keeping_form(word, d) for d in range(depth, 0, -1)]
        for d in range(1, min(depth, NUM_LATE) + 1):
            forms[-d] ^= rng.random() >= KEEP_PROBABILITY[d - 1]
        return closed(word, forms)[0]
