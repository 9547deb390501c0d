"""Partition laws: every row once, the budget, the balance; and what reaches a model is never padded."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
from helpers import make_value, one_thread  # noqa: F401  (one_thread is a fixture)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tppo_ref.loop.minibatches import pack, split_mini_batches
from tppo_ref.rollout.packing import TokenBatch

LAW = settings(max_examples=150, deadline=None)
TOKENS = st.lists(st.integers(0, 40), max_size=30)


def flat(parts):
    return sorted(row for part in parts for row in part)


@LAW
@given(TOKENS, st.integers(1, 20), st.integers(0, 99))
@example([], 1, 0)
@example([0, 0, 0], 2, 0)
def test_every_row_is_in_exactly_one_mini_batch(tokens, wanted, seed):
    mini_batches = split_mini_batches(tokens, tokens[::-1], wanted, np.random.default_rng(seed))
    assert len(mini_batches) == wanted
    assert flat(mini_batches) == list(range(len(tokens)))


@LAW
@given(TOKENS, st.integers(1, 20), st.integers(0, 99))
def test_mini_batches_differ_by_at_most_the_longest_row_where_all_that_is_fed_is_trained(tokens, wanted, seed):
    parts = split_mini_batches(tokens, tokens, wanted, np.random.default_rng(seed))
    loads = [sum(tokens[row] for row in part) for part in parts]
    assert max(loads) - min(loads) <= max(tokens, default=0)


@pytest.mark.parametrize("seed", range(5))
def test_mini_batches_are_level_in_trained_and_in_fed_tokens_though_they_are_not_the_same(seed):
    """240 rows as a rank of a large run has them: long-tailed, a window of each trained, its prefix only fed."""
    rng = np.random.default_rng(seed)
    fed = rng.lognormal(8.7, 0.9, 240).astype(int).clip(200, 24_000)
    trained = np.minimum(fed, rng.integers(100, 8192, 240))

    def excess(parts, tokens):
        loads = [tokens[part].sum() for part in parts]
        return max(loads) / np.mean(loads) - 1

    parts = split_mini_batches(trained.tolist(), fed.tolist(), 16, np.random.default_rng(seed))
    assert excess(parts, trained) < 0.05
    assert excess(parts, fed) < 0.15
    by_trained = split_mini_batches(trained.tolist(), trained.tolist(), 16, np.random.default_rng(seed))
    assert excess(by_trained, fed) > 2 * excess(parts, fed), "one of the two does not level the other"


def test_mini_batches_are_dealt_at_random_and_the_same_for_the_same_generator():
    deals = [split_mini_batches([5] * 40, [9] * 40, 4, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert deals[0] == deals[1]
    assert [sorted(part) for part in deals[0]] != [sorted(part) for part in deals[2]]


@LAW
@given(TOKENS, st.integers(1, 90), st.randoms())
@example([7, 7, 7], 7, None)
@example([8, 3], 7, None)
def test_micro_batches_hold_every_row_once_within_the_budget_and_a_longer_row_goes_alone(tokens, budget, random):
    rows = [row for row in range(len(tokens)) if random is None or random.random() < 0.8]
    micro_batches = pack(rows, tokens, budget)
    assert flat(micro_batches) == rows
    for part in micro_batches:
        assert part
        load = sum(tokens[row] for row in part)
        assert load <= budget or (len([row for row in part if tokens[row]]) == 1 and load == max(tokens[row] for row in part))


@LAW
@given(TOKENS, st.integers(1, 90))
def test_no_two_micro_batches_could_have_been_one(tokens, budget):
    loads = [sum(tokens[row] for row in part) for part in pack(range(len(tokens)), tokens, budget)]
    assert all(a + b > budget for i, a in enumerate(loads) for b in loads[:i])


@pytest.mark.usefixtures("one_thread")
def test_nothing_is_padded_the_tokens_fed_are_the_sum_of_the_lengths():
    value = make_value()
    lengths = [(3, 17), (1, 2), (2, 0), (3, 9), (1, 1)]
    batch = TokenBatch([[4] * p for p, _ in lengths], [[5] * r for _, r in lengths])
    fed = collections.Counter()
    embedding = value.hf.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, out: fed.update(tokens=args[0].numel()))
    values_BT, last_B = value(batch)
    handle.remove()
    assert fed["tokens"] == sum(p + r for p, r in lengths) == batch.num_tokens_fed
    assert values_BT.shape == (5, 17)
    assert last_B.shape == (5,)
    assert values_BT.dtype == last_B.dtype == torch.float32
