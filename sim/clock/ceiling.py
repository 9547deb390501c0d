"""An upper bound of a method's speed: what lets a search leave places out without running them.

    ceiling(which, setup, window=...)      trained tokens per second

Per token, the seconds below which nothing can push the engine and the trainer:

    decoding    The tokens of all responses have a mean context c, whatever their order, and a decode step's seconds are convex in
                (sequences, context), with a fixed part. So of all ways to decode them none is shorter than equal steps, with as
                many sequences in each as the slots or the cache, capacity / c, allow (Jensen's inequality).
    prefill     of every row's context, in as few chunks as hold it
    training    of rows as `cluster.train` charges them, spread evenly over the ranks

Left out: slots that idle at a step's end, preemptions, unequal ranks, the weight sync, all of which only take longer. Rows of
windowed methods are those of responses that a window's edge meets at a random place, as in a long run: an expectation, not a bound
for every run, which is why search.py leaves a margin.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from sim.clock.cluster import Setup, train
from sim.clock.decoding import Ints
from sim.clock.distributions import Lengths
from sim.clock.hardware import causal_context
from sim.clock.lengths import prompt_lengths
from sim.clock.methods import Method
from tppo_ref.method.slots import Refill

RESPONSES = 4096
"""That stand for all."""


def ceiling(which: Method, setup: Setup, *, window: int = 0, refill: Refill = "immediate") -> float:
    """Trained tokens per second. window, refill   of windowed methods; 0: rows are whole responses"""
    drawn = setup.lengths, setup.prompt_tokens, setup.samples_per_prompt, setup.seed
    cut, most = rows(*drawn, window, refill == "immediate"), setup.slots / setup.num_replicas
    if window and refill == "step":  # a slot that ended waits for the next window
        most *= float(cut[1].mean()) / window
    engine_s, tokens = engine_seconds(setup, cut[2] + cut[0], cut[1], most), int(cut[1].sum())
    if which.kind != "tppo":
        cut = rows(*drawn, 0)
    elif "f" in which.levers:  # a row waits for a window of untrained tokens, so that its edges are at most two windows apart
        cut = rows(*drawn, 2 * window)
    (done_n, new_n, prompt_n), (_, length, prompt) = cut, rows(*drawn, 0)
    alone = dataclasses.replace(setup, recipe=which.recipe, ranks=1)
    training = train(alone, prompt_n + done_n, new_n, prompt + length, trained=tokens, value_trained=tokens)
    trainer_s = float(np.sum(training[:-1]))
    return float(tokens / (max(engine_s, trainer_s) if setup.train_costs is not None else engine_s + trainer_s))


@functools.lru_cache(maxsize=64)
def rows(
    lengths: Lengths, prompt_tokens: Lengths | int, samples: int, seed: int, window: int, anywhere: bool = True
) -> tuple[Ints, Ints, Ints]:
    """Some responses cut every `window` tokens: tokens before, tokens in it, the prompt's, by row. 0: whole responses.

    anywhere   the first cut may be anywhere in a response's first window, as where a slot is refilled at once; else at its end
    """
    rng, size = np.random.default_rng(seed), max(1, RESPONSES // samples)
    prompt = np.repeat(prompt_lengths(prompt_tokens).sample(rng, size, 1).ravel(), samples)
    length = lengths.sample(rng, size, samples).ravel()
    if not window:
        return np.zeros_like(length), length, prompt
    first = rng.integers(1, window + 1, len(length)) if anywhere else np.full(len(length), window)
    num = np.maximum(-(-(length - first) // window), 0) + 1
    which_n = np.repeat(np.arange(len(length)), num)
    number_n = np.arange(len(which_n)) - np.repeat(np.cumsum(num) - num, num)
    done_n = np.where(number_n > 0, first[which_n] + (number_n - 1) * window, 0)
    return done_n, np.minimum(first[which_n] + number_n * window, length[which_n]) - done_n, prompt[which_n]


def engine_seconds(setup: Setup, context_n: Ints, new_n: Ints, most: float) -> float:
    """See the file's docstring: of all replicas at once, for rows with so much context that decode so many tokens, at most `most`
    of them at a time on a replica."""
    costs, num = setup.costs, setup.num_replicas
    tokens = int(new_n.sum())
    context = int(causal_context(context_n - 1, context_n + new_n - 1).sum()) / tokens  # a token is fed before it is in the cache
    if costs.kv_capacity_tokens is not None:
        most = min(most, costs.kv_capacity_tokens / context)
    prefilled = np.maximum(context_n - 1, 0)
    prefill_s = float(costs.prefill_s(int(prefilled.sum()) / num, int(causal_context(0, prefilled).sum()) / num))
    return tokens / num / most * float(costs.decode_step_s(most, most * context)) + prefill_s
