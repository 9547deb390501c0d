"""What the three built-in tasks share: digits, an end token, long-tailed lengths, splits.

A response consists of steps of three tokens, a two-digit counter and one token of the task's own, and of the end token.
Two digits rather than one token per counter value, so that rare values share statistics with common ones and a long
response is no harder per step than a short one. The number in a prompt has tokens of its own, `4_ _2` for 42: a model of three
layers finds them by what they are instead of having to work out where the prompt ends.

Nearly all problems are short (2 to 12 steps, log-uniform), a few are long (24 to 99 steps, uniform): the longest
response is about ten times the mean. Long problems are as solvable as short ones: the base model's mistakes do not
accumulate with length.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence
from typing import Any, ClassVar

from tppo_ref.method.errors import UserError, refusal
from tppo_ref.method.records import Prompt

DIGITS = tuple("0123456789")
END = 10
PROMPT_TENS, PROMPT_UNITS = 11, 21
FIRST_OWN_TOKEN = 31
"""Token ids: the ten digits of a response, the end token, ten tens and ten units of a prompt, then a task's own."""

COMMON_TOKENS = (*DIGITS, "END", *(f"{d}_" for d in DIGITS), *(f"_{d}" for d in DIGITS))

SHORT_STEPS = (2, 12)
LONG_STEPS = (24, 99)
DEMONSTRATED_LONG_SHARE = 0.15
"""Long problems are shown more often than they are asked: each of their numbers is rare otherwise."""

Problem = tuple[int, ...]
"""A task's own numbers, which determine prompt, answer and right response."""


def two_digits(number: int) -> tuple[int, int]:
    """The token ids of a number in 0..99 in a response."""
    return number // 10, number % 10


def prompt_number(number: int) -> tuple[int, int]:
    """The token ids of a number in 0..99 in a prompt."""
    return PROMPT_TENS + number // 10, PROMPT_UNITS + number % 10


def draw_steps(rng: random.Random, long_share: float) -> int:
    """A number of steps: log-uniform in SHORT_STEPS, or with probability `long_share` uniform in LONG_STEPS."""
    if rng.random() < long_share:
        return rng.randint(*LONG_STEPS)
    low, high = SHORT_STEPS
    return min(high, int(math.exp(rng.uniform(math.log(low), math.log(high + 1)))))


def in_test_split(problem: Problem) -> bool:
    """One problem in five belongs to the test split, whatever the seed: a stable hash of the problem decides."""
    return zlib.crc32(repr(problem).encode()) % 5 == 0


class SyntheticTask:
    """Base of the built-in tasks. A subclass gives the tokens and the five problem methods below.

    seed            of the draw of prompts; the problem world itself (maps, tables) is fixed
    num_train, num_test   prompts per split, drawn with repetition from the split's problems: a split is a sample of the
                    length distribution, while no problem is in both splits
    long_share      share of long problems, in [0, 1]
    """

    name: ClassVar[str]
    verifier: ClassVar[str]
    own_tokens: ClassVar[tuple[str, ...]]
    max_prompt_tokens: ClassVar[int]
    max_response_tokens: ClassVar[int]
    tokenizer = None
    end_token_id = END

    def __init__(self, *, seed: int = 0, num_train: int = 4096, num_test: int = 256, long_share: float = 0.06) -> None:
        for option, value in (("num_train", num_train), ("num_test", num_test)):
            if value < 1:
                raise UserError(refusal(f"task {self.name}: {option}", f"{value}", "at least 1"))
        if not 0.0 <= long_share <= 1.0:
            raise UserError(refusal(f"task {self.name}: long_share", f"{long_share}", "a share in [0, 1]"))
        self.options = {"seed": seed, "num_train": num_train, "num_test": num_test, "long_share": long_share}
        self.seed, self.num_train, self.num_test, self.long_share = seed, num_train, num_test, long_share
        self.tokens = (*COMMON_TOKENS, *self.own_tokens)
        self.vocab_size = len(self.tokens)
        self._prompts: dict[str, tuple[Prompt, ...]] = {}

    # What a subclass defines.

    def draw_problem(self, rng: random.Random, long_share: float) -> Problem:
        """One problem of the task's distribution, of either split."""
        raise NotImplementedError

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        """The prompt that poses `problem`."""
        raise NotImplementedError

    def answer(self, problem: Problem) -> str:
        """All that `verify` needs to know about `problem`."""
        raise NotImplementedError

    def solve(self, problem: Problem) -> tuple[int, ...]:
        """The one right response, end token included."""
        raise NotImplementedError

    def demonstrate(self, problem: Problem, rng: random.Random) -> tuple[int, ...]:
        """A response as the imperfect base model is meant to give it, end token included."""
        raise NotImplementedError

    # What they share.

    def prompts(self, split: str) -> Sequence[Prompt]:
        """The prompts of "train" or "test"; ids of the test split follow those of the train split."""
        if split not in ("train", "test"):
            raise UserError(refusal("split", repr(split), "'train' or 'test'"))
        if split not in self._prompts:
            first_id, num = (0, self.num_train) if split == "train" else (self.num_train, self.num_test)
            problems = self.problems(split, num, self.seed, self.long_share)
            self._prompts[split] = tuple(
                Prompt(id=first_id + i, token_ids=self.prompt_ids(p), answer=self.answer(p)) for i, p in enumerate(problems)
            )
        return self._prompts[split]

    def problems(self, split: str, num: int, seed: int, long_share: float) -> list[Problem]:
        """`num` problems of `split`, drawn with repetition; the same for the same arguments on every machine."""
        rng = random.Random(f"{self.name} {split} {seed}")
        drawn: list[Problem] = []
        while len(drawn) < num:
            problem = self.draw_problem(rng, long_share)
            if in_test_split(problem) == (split == "test"):
                drawn.append(problem)
        return drawn

    def demonstrations(self, rng_seed: int, num: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """`num` pairs (prompt_ids, response_ids) of train problems, with the mistakes of the base model."""
        rng = random.Random(f"{self.name} demonstrations {rng_seed}")
        problems = self.problems("train", num, rng.getrandbits(48), DEMONSTRATED_LONG_SHARE)
        return [(self.prompt_ids(p), self.demonstrate(p, rng)) for p in problems]

    def response_text(self, token_ids: Sequence[int]) -> None:
        """These tokens have no text of their own: the verifier reads the ids."""
        return None

    def describe(self, token_ids: Sequence[int]) -> str:
        """The tokens' names, digits of one number joined; an id outside the vocabulary shows as "?id"."""
        words: list[str] = []
        for position, token in enumerate(token_ids):
            word = self.tokens[token] if 0 <= token < self.vocab_size else f"?{token}"
            after_digit = position > 0 and 0 <= token_ids[position - 1] < 10
            if 0 <= token < 10 and after_digit:
                words[-1] += word
            else:
                words.append(word)
        return " ".join(words)

    def __repr__(self) -> str:
        options: dict[str, Any] = self.options
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in options.items())})"
