"""Which rows share an optimiser step, and which of those share a forward pass.

A mini-batch is one optimiser step; a micro-batch is one forward and backward pass. Losses divide by the mini-batch's token count,
so how a mini-batch is cut into micro-batches changes memory and time, never the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def split_mini_batches(trained_tokens: Sequence[int], num_mini_batches: int, rng: np.random.Generator) -> list[list[int]]:
    """Rows dealt at random into mini-batches of about equal numbers of trained tokens.

    trained_tokens: per row. The rows come in random order and each joins the lightest mini-batch so far. Every row is in exactly
    one mini-batch; a mini-batch may be empty when there are fewer rows than mini-batches.
    """
    mini_batches: list[list[int]] = [[] for _ in range(num_mini_batches)]
    load = [0] * num_mini_batches
    for row in rng.permutation(len(trained_tokens)):
        lightest = load.index(min(load))
        mini_batches[lightest].append(int(row))
        load[lightest] += trained_tokens[row]
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
