"""Conversations: the policy's turns, and between them what an environment answered (docs/turns.md).

An observation is context, as the prompt is: no column of a response is an observation's, so no mask, sum or loss can hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tppo_ref.method.records import Prompt, Response

Observations = Sequence[tuple[int, Sequence[int]]]
"""In order, (column, tokens): what stands before the policy's token `column`."""

Reply = Callable[[Prompt, Sequence[Sequence[int]]], Sequence[int] | None]
"""What an environment answers to the policy's turn that just ended: tokens, or None where the response has ended with it.

The turns are all so far (`turns_of`), the policy's last one included. A pure function of its arguments: a restart asks nothing
again, and the ranks of a tensor-parallel group each ask for themselves.
"""


def turns_of(token_ids: Sequence[int], observations: Observations) -> list[Sequence[int]]:
    """A response as it was spoken: what the policy wrote, what the environment answered, and so on in turn. The last turn is the
    policy's, empty where it has yet to answer."""
    turns, begin = list[Sequence[int]](), 0
    for column, observed in observations:
        turns += [token_ids[begin:column], observed]
        begin = column
    return [*turns, token_ids[begin:]]


def transcript(response: Response) -> list[int]:
    """All that was said after the prompt, by the policy and by the environment."""
    return [token for turn in turns_of(response.token_ids, response.observations) for token in turn]


def num_observed(observations: Observations, column: int) -> int:
    """Tokens of the observations that stand before the policy's token `column`."""
    return sum(len(tokens) for at, tokens in observations if at <= column)


def num_before(response: Response, column: int) -> int:
    """Tokens that a model reads before it says what token `column` may be: prompt, response and observations."""
    return len(response.prompt.token_ids) + column + num_observed(response.observations, column)
