"""A token MDP so small that every response can be listed: an oracle in expectation for estimators of V and A.

A state is the tuple of tokens so far. Token END ends the response, and so does reaching `max_tokens` tokens. Policy and
rewards are fixed functions of (seed, state); nothing is sampled. `Fraction`s are not needed: float64 sums of a hundred
terms are exact to 1e-14.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

END = 0


class ToyMDP:
    def __init__(self, seed: int, *, num_tokens: int = 3, max_tokens: int = 5, rewards_at: str = "every token"):
        self.seed, self.num_tokens, self.max_tokens, self.rewards_at = seed, num_tokens, max_tokens, rewards_at
        self.probabilities, self.reward, self.value = map(functools.cache, (self.probabilities, self.reward, self.value))

    def ended(self, state: tuple[int, ...]) -> bool:
        return len(state) == self.max_tokens or END in state[-1:]

    def probabilities(self, state: tuple[int, ...]) -> list[float]:
        weights = [random.Random(f"policy {self.seed} {state} {a}").uniform(0.2, 1.0) for a in range(self.num_tokens)]
        return [weight / sum(weights) for weight in weights]

    def reward(self, state: tuple[int, ...], token: int) -> float:
        counts = self.rewards_at == "every token" or self.ended((*state, token))
        return random.Random(f"reward {self.seed} {state} {token}").uniform(-1.0, 1.0) if counts else 0.0

    def q(self, state: tuple[int, ...], token: int, gamma: float) -> float:
        return self.reward(state, token) + gamma * self.value((*state, token), gamma)

    def value(self, state: tuple[int, ...], gamma: float) -> float:
        """Exact V under the policy; 0 once the response ended."""
        if self.ended(state):
            return 0.0
        return sum(p * self.q(state, a, gamma) for a, p in enumerate(self.probabilities(state)))

    def responses(self, prefix: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], float]]:
        """Every finished response that begins with `prefix`, with its probability given that prefix."""
        if self.ended(prefix):
            yield prefix, 1.0
            return
        for token, p in enumerate(self.probabilities(prefix)):
            yield from ((response, p * q) for response, q in self.responses((*prefix, token)))
