"""What training feeds under each lever, by hand; PPO refilled within its step; lag in updates."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.clock.cluster import Recipe, Setup, train
from sim.clock.distributions import Constant, LogNormal
from sim.clock.schedule import Windowed, ppo, run, tppo
from sim.clock.systems import PartialRollouts, Synchronous
from tests.test_schedule import Line, plans, setup_of, windowed

LAW = settings(max_examples=60, deadline=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counting(Line):
    """One second per token and pass, and thousandths per query-key pair; the policy's update counts ten times."""

    def logprob_s(self, tokens, context_tokens):
        return tokens + context_tokens / 1000

    def prefix_s(self, tokens, context_tokens):
        return 100 * tokens + context_tokens / 1000

    def value_forward_s(self, tokens, context_tokens):
        return 3 * tokens + context_tokens / 1000

    def policy_train_s(self, tokens, context_tokens, num_updates=1):
        return 10 * tokens + context_tokens / 1000

    def value_train_s(self, tokens, context_tokens, num_updates=1):
        return 7 * tokens


def trained(recipe: Recipe):
    """Two rows: 2 tokens of prefix and 3 live ones; 0 and 4. The critic trains on 5 tokens."""
    setup = Setup(lengths=Constant(value=9, cap=9), prompt_tokens=1, costs=Counting(), slots=2, recipe=recipe)
    return train(setup, np.array([2, 0]), np.array([3, 4]), np.array([5]), trained=7, value_trained=5)


def test_the_papers_recipe_feeds_rows_whole():
    pairs = 15 + 10  # 5 * 6 / 2 and 4 * 5 / 2
    assert trained(Recipe()) == (9 + pairs / 1000, 27 + pairs / 1000, 90 + pairs / 1000, 35, 1)


def test_each_lever_by_hand():
    """Live tokens attend to their prefix: 15 - 3 pairs of the first row, 10 of the second."""
    whole, live, prefix = 25 / 1000, 22 / 1000, 3 / 1000
    assert trained(Recipe(prefix="forward")) == (9 + whole, 27 + whole, pytest.approx(70 + live + 200 + prefix), 35, 1)
    assert trained(Recipe(prefix="kept")) == (9 + whole, 27 + whole, 70 + live, 35, 1)
    assert trained(Recipe(logprobs="engine")) == (0, 27 + whole, 90 + whole, 35, 1)
    assert trained(Recipe(values="window")) == (9 + whole, 21 + live, 90 + whole, 35, 1)
    assert trained(Recipe(critic=False)) == (9 + whole, 0, 90 + whole, 0, 1)


def test_without_prefixes_the_levers_on_prefixes_change_nothing():
    setup = Setup(lengths=Constant(value=9, cap=9), prompt_tokens=1, costs=Counting(), slots=2)
    found = [
        train(
            dataclasses.replace(setup, recipe=recipe),
            np.zeros(2, dtype=int),
            np.array([3, 4]),
            np.array([5]),
            trained=7,
            value_trained=5,
        )
        for recipe in (Recipe(), Recipe(prefix="forward"), Recipe(prefix="kept"), Recipe(values="window"))
    ]
    assert found.count(found[0]) == 4


def test_kept_keys_need_the_pass_that_makes_them():
    with pytest.raises(ValueError, match="expected a pass whose keys"):
        Recipe(prefix="kept", logprobs="engine")
    with pytest.raises(ValueError, match="prefix: got 'none'; expected one of full, forward, kept"):
        Recipe(prefix="none")


def test_a_cut_response_has_nothing_to_learn_from_without_a_critic():
    setup = setup_of([5], 8, recipe=Recipe(critic=False))
    with pytest.raises(ValueError, match="critic is off: a response that is cut has no reward"):
        tppo(setup, window=4)
    assert run(ppo(setup), steps=2).total("value_train_s") == 0


# ------------------------------------------------------------------------------------------------------------ min_new_tokens


def test_a_row_with_few_untrained_tokens_waits_by_hand():
    """One slot, a window of 4, at least 3 new tokens. The first response (3) trains; the second has 1 token at the edge and waits;
    in the next window it gets 4 more, and 5 train at once, one of them a sync old."""
    system = Windowed(setup_of([3, 9], 12, slots=1), window=4, tail_tokens=0, min_new_tokens=3)
    first, second, third = (system.step() for _ in range(3))
    assert [(r.generated, r.trained, r.deferred) for r in (first, second, third)] == [(4, 3, 1), (4, 5, 0), (4, 4, 0)]
    assert [r.staleness_sum for r in (first, second, third)] == [0, 1, 0]
    assert first.tokens_fed == 1 + 3  # the row that waits is not fed
    assert (second.tokens_fed, second.prefix_tokens_trained) == (1 + 5, 0)  # nor was any of it fed before
    assert (third.tokens_fed, third.prefix_tokens_trained) == (1 + 9, 1 + 5)


@LAW
@given(plans(), st.integers(0, 9), st.sampled_from(["exclude", "defer"]))
def test_waiting_loses_nothing_and_feeds_no_more(plan, least, tail):
    tail_tokens, least = min(2, plan["window"]), min(least, plan["window"])
    now, later = (windowed(plan, tail=tail, tail_tokens=tail_tokens, min_new_tokens=n) for n in (0, least))
    records = run(now, steps=8).records, run(later, steps=8).records  # conservation is checked
    assert [r.generated for r in records[0]] == [r.generated for r in records[1]]
    fed = [sum(r.tokens_fed for r in some) for some in records]
    assert fed[1] <= fed[0]
    settled = [sum(r.trained + r.excluded for r in some) + some[-1].deferred for some in records]
    assert settled[0] == settled[1]
    assert all(r.staleness_max <= 1 for r in records[1])


def test_more_than_a_window_cannot_be_asked_for():
    with pytest.raises(ValueError, match="min_new_tokens: got 5; expected at most the window, 4"):
        Windowed(setup_of([3], 12), window=4, min_new_tokens=5)


# ---------------------------------------------------------------------------------------------------- PPO, refilled within a step


def test_ppo_with_more_responses_than_slots_by_hand():
    """Two slots, five responses of 4, 1, 2, 3, 1: 4 beside 1, 2, then 3 (from second 3 to 6) and 1 (from 4 to 5); six steps."""
    system = Synchronous(setup_of([4, 1, 2, 3, 1], 9, slots=2), batch_responses=5)
    first, second = system.step(), system.step()
    assert (first.decode_steps, first.rollout_s, first.trained, first.completed) == (6, 6.0, 11, 5)
    assert first.busy_slot_s == 11
    assert second.trained == 11
    assert first.staleness_max == second.staleness_max == 0


@LAW
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 6), st.integers(1, 4))
def test_a_refilled_step_ends_within_one_longest_response_of_full_slots(lengths, slots, times):
    """List scheduling: the step ends at most one longest response after the slots would have been full throughout."""
    system = Synchronous(setup_of(lengths, 30, slots=slots), batch_responses=times * slots)
    for _ in range(3):
        record = system.step()
        assert record.trained == record.generated
        assert record.decode_steps <= record.generated / slots + (1 - 1 / slots) * 30
        assert record.in_flight == 0


def test_partial_rollouts_with_nothing_beyond_the_batch_are_the_same():
    setup = setup_of(LogNormal(median=5, sigma=1, cap=30), 30, slots=3)
    one, two = (run(make(setup), steps=4).records for make in
                (lambda s: Synchronous(s, batch_responses=7), lambda s: PartialRollouts(s, batch_responses=7, in_flight=7)))  # fmt: skip
    assert one == two


# -------------------------------------------------------------------------------------------------------------- lag, in updates


def test_lag_counts_the_updates_of_the_own_step_and_of_those_before():
    """50 updates after a sync are a mean lag of 24.5, whatever the syncs say."""
    setup = setup_of(LogNormal(median=20, sigma=0.5, cap=60), 60, slots=32, updates_per_step=50)
    record = run(ppo(setup), steps=1).records[0]
    assert (record.staleness_mean, record.lag_updates) == (0, 24.5)
    partial = run(PartialRollouts(dataclasses.replace(setup, slots=48), batch_responses=32), steps=6).records[-1]
    assert partial.staleness_mean > 0
    assert partial.lag_updates == pytest.approx(50 * partial.staleness_mean + 24.5)


def test_one_update_per_sync_is_no_lag():
    assert run(ppo(setup_of([3, 5], 9)), steps=1).records[0].lag_updates == 0
