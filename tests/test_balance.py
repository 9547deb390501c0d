"""What whole rows cost a cluster: hand-made dealings, laws, and the dealing that the Trainer's own code makes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.clock.balance import waiting_factor
from sim.clock.cluster import Setup, train
from sim.clock.distributions import LogNormal
from sim.clock.hardware import Layout, Roofline, cluster, model
from sim.clock.steady import in_routine, synchronous
from tppo_ref.loop.minibatches import split_mini_batches

LAW = settings(max_examples=80, deadline=None)
rows = st.lists(st.integers(1, 1000), min_size=1, max_size=60)


def factor(work, **options) -> float:
    return waiting_factor(np.array(work, dtype=float), **options)


def test_a_dealing_by_hand():
    assert factor([9, 8, 5, 4], ranks=2) == pytest.approx(13 / 13)  # 9 + 4 and 8 + 5
    assert factor([9, 7, 5, 4], ranks=2) == pytest.approx(13 / 12.5)  # 9 + 4 and 7 + 5
    assert factor([9, 1, 1], ranks=2) == pytest.approx(9 / 5.5)  # the long one alone is more than an even share
    assert factor([6, 4, 3, 2], ranks=2, updates=2) == pytest.approx((6 + 4) * 2 / 15)  # 6 beside 3, then 4 beside 2


def test_fewer_rows_than_ranks_leave_ranks_idle():
    assert factor([5, 5, 5], ranks=12) == pytest.approx(4)


@LAW
@given(rows, st.integers(1, 16), st.integers(1, 5), st.integers(1, 3))
def test_waiting_never_shortens_and_one_rank_never_waits(work, ranks, updates, copies):
    assert factor(work, ranks=1, updates=updates, copies=copies) == 1
    found = factor(work, ranks=ranks, updates=updates, copies=copies)
    even = copies * sum(work) / (ranks * updates)
    assert 1 - 1e-12 <= found <= 1 + (1 - 1 / ranks) * max(work) / even + 1e-9  # a mini-batch's fullest: an even share, and one row


@LAW
@given(st.integers(1, 500), st.integers(1, 8), st.integers(1, 8), st.integers(1, 4))
def test_equal_rows_that_fill_the_ranks_are_level(length, ranks, updates, rounds):
    assert factor([length] * (ranks * updates * rounds), ranks=ranks, updates=updates) == pytest.approx(1)


@LAW
@given(rows, st.integers(1, 8))
def test_order_does_not_matter_and_copies_are_rows(work, ranks):
    shuffled = np.random.default_rng(0).permutation(work)
    assert factor(shuffled, ranks=ranks) == pytest.approx(factor(work, ranks=ranks))
    assert factor(work, ranks=ranks, copies=3) == pytest.approx(factor(work * 3, ranks=ranks))


def test_the_trainers_own_dealing_waits_about_as_long():
    """The Trainer deals rows to mini-batches as this deals them to ranks, though random within half an octave of length."""
    work = np.random.default_rng(1).lognormal(8, 0.8, size=320).round()
    loads = [work[batch].sum() for batch in split_mini_batches(work, work, 16, np.random.default_rng(0))]
    assert factor(work, ranks=16) == pytest.approx(max(loads) * 16 / work.sum(), abs=0.02)


# --------------------------------------------------------------------------------------------------------------- in the clock


def setup_on(devices: int, **changes) -> Setup:
    _, gpu = cluster("1xH100")
    layout = Layout(num_devices=devices, tensor_parallel=1, micro_batch_tokens=8192)
    costs = Roofline(accelerator=gpu, model=model("Qwen2.5-1.5B"), layout=layout)
    plain = {"lengths": LogNormal(median=700, sigma=0.9, cap=8192), "prompt_tokens": 100, "costs": costs, "slots": 512,
             "num_replicas": devices, "updates_per_step": 4, "ranks": devices}  # fmt: skip
    return Setup(**plain | changes)


def test_more_devices_do_not_divide_the_training_by_their_number():
    few, many = (synchronous(setup_on(devices)).training_s for devices in (8, 64))
    spread = [synchronous(setup_on(devices, ranks=1)).training_s for devices in (8, 64)]
    assert many > 1.25 * few * spread[1] / spread[0]


def test_training_is_the_even_spread_times_the_waiting():
    """Each model waits for the fullest rank of its own rows."""
    rng = np.random.default_rng(0)
    live_n, prefix_n, ended_n = rng.integers(1, 2000, 96), np.full(96, 50), rng.integers(1, 6000, 20)
    setup = setup_on(8)
    even, waiting = (
        train(s, prefix_n, live_n, ended_n, trained=1, value_trained=1) for s in (dataclasses.replace(setup, ranks=1), setup)
    )
    policy, value = (
        waiting_factor(setup.costs.row_work(fed_n, fed_n * (fed_n + 1) // 2), ranks=8, updates=4)
        for fed_n in (prefix_n + live_n, ended_n)
    )
    assert value > 1.1 * policy > 1.1
    expected = {"logprob_s": policy, "value_forward_s": policy, "policy_train_s": policy, "value_train_s": value}
    for name, factor in expected.items():
        assert getattr(waiting, name) == pytest.approx(factor * getattr(even, name)), name


def test_few_replicas_that_stand_for_all_wait_as_all_do():
    whole = setup_on(16, slots=1024)
    few, all_of_them = (in_routine(whole, 2048, replicas=replicas) for replicas in (2, 16))
    assert few.training_s / few.trained == pytest.approx(all_of_them.training_s / all_of_them.trained, rel=0.1)
