"""Which rows share an optimiser step, and which of those share a forward pass.

A mini-batch is one optimiser step; a micro-batch is one forward and backward pass. Losses divide by the mini-batch's token count,
so how a mini-batch is cut into micro-batches changes memory and time, never the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def split_mini_batches(
    trained_tokens: Sequence[int], fed_tokens: Sequence[int], num_mini_batches: int, rng: np.random.Generator
) -> list[list[int]]:
    """Rows dealt at random into mini-batches of about equal trained tokens, for equal noise, and of about equal fed tokens, for
    equal work: where several ranks share a mini-batch, the one with most of it is waited for.

    trained_tokens, fed_tokens: per row. Long rows are dealt first, those of a like length (half an octave) in random order, and
    each joins the mini-batch where the squares of both loads, as shares of all, grow least. Every row is in exactly one mini-batch;
    a mini-batch may be empty when there are fewer rows than mini-batches.
    """
    mini_batches: list[list[int]] = [[] for _ in range(num_mini_batches)]
    tokens = np.array([trained_tokens, fed_tokens], dtype=float).reshape(2, -1)
    share = tokens / np.maximum(tokens.sum(1, keepdims=True), 1)
    octave = np.floor(2 * np.log2(np.maximum(tokens[1], 1)))
    order = rng.permutation(tokens.shape[1])
    load = np.zeros((2, num_mini_batches))
    for row in order[np.argsort(-octave[order], kind="stable")]:
        chosen = int((share[:, row] @ load).argmin())
        mini_batches[chosen].append(int(row))
        load[:, chosen] += share[:, row]
    return mini_batches


def pack(rows: Sequence[int], fed_tokens: Sequence[int], budget_tokens: int) -> list[list[int]]:
    """Rows of one mini-batch packed into micro-batches of at most `budget_tokens` fed tokens (first fit, longest first).

    fed_tokens: prompt and response tokens, per row of the step. A row longer than the budget goes alone.
    """
    micro_batches: list[list[int]] = []
    load: list[int] = []
    for row in sorted(rows, key=lambda row: -fed_tokens[row]):
        need = fed_tokens[row]
        fits = next((i for i, tokens in enumerate(load) if tokens + need <= budget_tokens), None)
        if fits is None:
            micro_batches.append([row])
            load.append(need)
        else:
            micro_batches[fits].append(row)
            load[fits] += need
    return micro_batches
