"""The levers of training once, in the Trainer: constant prefix, the engine's log-probabilities, windows filled by tokens, batches
larger than the slots; and the paper's competitor GePPO, which trains on each batch several times."""

from __future__ import annotations

import collections
import math

import pytest
import torch
from helpers import make_trainer, same, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st

from tppo_ref.method.errors import UserError
from tppo_ref.method.records import End
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.runs.config import Config, apply_method
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.validation import check

# ------------------------------------------------------------------------------------------------------- the constant prefix


def fed_spy(calls):
    def see(batch, output, training):
        calls.append((training, batch))
        return output

    return see


@pytest.mark.parametrize("old", ["recompute", "engine"])
@pytest.mark.parametrize("update", ["independent", "joint"])
def test_a_constant_prefix_reaches_every_pass_that_trains_on_the_window(old, update):
    policy_calls, value_calls = [], []
    trainer = make_trainer(
        "tppo", policy_spy=fed_spy(policy_calls), value_spy=fed_spy(value_calls), policy__prefix="constant", policy__old_logprobs=old,
        value__update=update, advantage__tail="defer",
    )  # fmt: skip
    for _ in range(4):
        trainer.step()
    trained = [batch for training, batch in policy_calls if training]
    assert trained
    assert all(batch.live_from is not None for _, batch in policy_calls)
    assert any(any(batch.live_from) for batch in trained), "no row had a prefix: choose another setting"
    assert all((batch.live_from is not None) == (update == "joint") for training, batch in value_calls if training)
    assert all(batch.live_from is None for training, batch in value_calls if not training), "V of the whole row is stored"


def test_the_first_ratio_is_exactly_one_with_a_constant_prefix():
    trainer = make_trainer("tppo", policy__prefix="constant", policy__mini_batches=1, policy__mini_batch_tokens=0)
    for _ in range(4):
        metrics = trainer.step()
        assert (metrics["policy/ratio_max"], metrics["policy/kl"]) == (1.0, 0.0)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_kept_prefix_is_exact_in_the_first_update_and_is_used_once(epochs):
    fed: dict[bool, list[int]] = {}
    for keep in (False, True):
        trainer = make_trainer(
            "tppo", policy__prefix="constant", policy__keep_prefix=keep, policy__epochs=epochs, policy__mini_batches=1,
            policy__mini_batch_tokens=0,
        )  # fmt: skip
        passes: list[int] = []
        reads = trainer.policy_learner.module.read
        trainer.policy_learner.module.read = lambda packed, reads=reads, passes=passes: (
            passes.append(packed.prefix is not None),
            reads(packed),
        )[1]
        metrics = trainer.step()
        if epochs == 1:
            assert metrics["policy/ratio_max"] == 1.0
        fed[keep] = passes
    micro = len(fed[False]) // (1 + epochs)
    assert fed[False] == [True] * micro * (1 + epochs)
    assert fed[True] == [True] * micro + [False] * micro + [True] * micro * (epochs - 1)


# --------------------------------------------------------------------------------------- the engine's log-probabilities, guarded


def test_a_twentieth_of_the_micro_batches_is_recomputed_and_compared():
    calls, gaps = [], []
    trainer = make_trainer("tppo", policy_spy=fed_spy(calls), policy__old_logprobs="engine", policy__micro_batch_tokens=1)
    for _ in range(20):
        gaps.append(trainer.step()["policy/logprob_gap"])
    recomputed = sum(not training and len(batch) > 0 for training, batch in calls)
    trained = sum(training and len(batch) > 0 for training, batch in calls)
    assert 0.02 < recomputed / trained < 0.1
    seen = [gap for gap in gaps if not math.isnan(gap)]
    assert seen
    assert max(seen) < 1e-4
    assert len(seen) < 20, "every step was compared: a twentieth is not what was recomputed"


def test_an_engine_that_disagrees_is_refused_before_the_update_on_the_step_that_sees_it():
    trainer = make_trainer("tppo", policy__old_logprobs="engine", policy__micro_batch_tokens=1, policy__engine_gap_limit=0.05)
    step = trainer.engine.step

    def wrong():
        decoded = step()
        for d in decoded:
            d.logprobs[:] = [x - 0.2 * (-1) ** i for i, x in enumerate(d.logprobs)]  # off by 0.2, and hardly so on average
        return decoded

    trainer.engine.step = wrong
    before: list[torch.Tensor] = []

    def steps():
        for _ in range(40):
            before[:] = weights_of(trainer.policy_learner.module)
            trainer.step()

    with pytest.raises(
        UserError, match=r"policy\.old_logprobs: got engine, .* by 0\.2 in step \d+; expected at most 0\.05 on average"
    ):
        steps()
    assert same(before, weights_of(trainer.policy_learner.module))


# ------------------------------------------------------------------------------------------------------ windows filled by tokens


@pytest.mark.parametrize("tail", ["exclude", "defer"])
@pytest.mark.parametrize("least", [1, 5, 9, 1000])
def test_a_cut_response_trains_once_it_holds_enough_untrained_tokens_and_always_when_it_ends(least, tail):
    trainer = make_trainer("tppo", policy__min_new_tokens=least, advantage__tail=tail, advantage__tail_tokens=2, rollout__window=4)
    seen = []
    trainer.observer = lambda rows, *rest: seen.append({r.id: (r.num_settled, len(r), r.end) for r in rows.responses})
    waited = 0
    for _ in range(12):
        before = {r.id: r.num_settled for r in trainer.batcher.in_flight.values()}
        metrics = trainer.step()
        rows = seen[-1]
        for s in trainer.slices:
            untrained = len(s.response) - before.get(s.response.id, 0)
            trains = s.response.end is not End.RUNNING or untrained >= least
            assert (s.response.id in rows) == trains
            waited += not trains
        spent = sum(metrics[f"ledger/{name}"] for name in ("trained", "excluded_tail", "excluded_warmup", "pending"))
        assert metrics["ledger/generated"] == spent
    assert (waited > 0) == (least > 4)


def test_a_thousand_untrained_tokens_are_partial_rollouts_without_their_weights():
    outcomes = []
    for changes in ({"policy__min_new_tokens": 1000}, {"policy__train_on": "ended"}):
        trainer = make_trainer("tppo", **changes)
        metrics = [trainer.step()["policy/tokens"] for _ in range(6)]
        outcomes.append((metrics, weights_of(trainer.policy_learner.module)))
    assert outcomes[0][0] == outcomes[1][0]
    assert same(outcomes[0][1], outcomes[1][1])


def test_age_is_counted_in_updates_of_the_policy():
    trainer = make_trainer("tppo", policy__min_new_tokens=7, rollout__window=4, policy__mini_batches=3, policy__mini_batch_tokens=0)
    updates_until = {0: 0}  # by version: an independent count
    positions: dict[int, collections.Counter] = {}

    def observe(rows, forward, advantages, batch):
        total = weight = 0
        for r, train_T in zip(rows.responses, rows.train_BT, strict=True):
            for t in train_T.nonzero()[:, 0].tolist():
                total += updates_until[trainer.num_steps - 1] - updates_until[r.versions[t]]
                weight += 1
        positions[trainer.num_steps] = collections.Counter(total=total, weight=weight)

    trainer.observer = observe
    lags = []
    for step in range(1, 9):
        metrics = trainer.step()
        updates_until[step] = updates_until[step - 1] + int(metrics["policy/updates"])
        expected = positions[step]
        assert metrics["policy/lag_updates"] == pytest.approx(expected["total"] / (expected["weight"] or math.nan), nan_ok=True)
        if metrics["policy/updates"]:
            assert 0 <= metrics["policy/lag_in_step"] <= metrics["policy/updates"] - 1
            lags.append(metrics["policy/lag_updates"])
    assert max(lags) > 0


# ---------------------------------------------------------------------------------------------- batches larger than the slots


@st.composite
def synchronous(draw):
    slots, cap = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    return slots, cap, slots + draw(st.integers(0, 9)), draw(st.lists(st.integers(1, 12), min_size=40, max_size=40))


@given(synchronous())
@settings(max_examples=60, deadline=None)
def test_a_batch_is_list_scheduling_every_response_ends_in_its_step_and_no_slot_waits_while_prompts_last(plan):
    slots, cap, batch, wanted = plan
    schedule = SlotSchedule(slots=slots, window=3, max_response_tokens=cap, refill="batch", responses_per_step=batch)
    lengths = [min(n, cap) for n in wanted]
    ids = iter(range(40))
    for step in range(2):
        mine = lengths[step * batch : (step + 1) * batch]
        if len(mine) < batch:
            return
        # List scheduling, written out: each response goes to the slot that is free first, the lowest of equals.
        free = [0] * slots
        for length in mine:
            slot = min(range(slots), key=lambda s: (free[s], s))
            free[slot] += length
        running = {g.response: (0, lengths[g.response]) for g in schedule.open_window(lambda: next(ids))}
        now = 0
        while running:
            now += 1
            done = sorted((r for r, (begin, n) in running.items() if begin + n == now), key=lambda r: schedule.running[r][0])
            ended = [(r, running.pop(r)[1], wanted[r] <= cap) for r in done]
            segments, grants = schedule.finish(now, ended, lambda: next(ids))
            assert all(s.end is not End.RUNNING for s in segments)
            running |= {g.response: (now, lengths[g.response]) for g in grants}
        assert now == max(free)
        assert schedule.begun == batch


def test_synchronous_ppo_with_a_batch_of_three_times_its_slots():
    trainer = make_trainer("ppo", rollout__responses_per_step=15)
    for step in range(1, 4):
        metrics = trainer.step()
        assert metrics["response/rows"] == metrics["response/ended"] == 15
        assert metrics["ledger/pending"] == metrics["ledger/in_flight"] == 0
        assert metrics["ledger/trained"] == metrics["ledger/generated"]
        assert trainer.batcher.stream.next == 15 * step


def test_a_batch_as_large_as_the_slots_is_the_old_synchronous_ppo_bit_for_bit():
    outcomes = []
    for refill in ("batch", "step"):
        trainer = make_trainer("ppo", rollout__refill=refill)
        tokens = [trainer.step()["rollout/tokens"] for _ in range(3)]
        outcomes.append((tokens, weights_of(trainer.policy_learner.module)))
    assert outcomes[0][0] == outcomes[1][0]
    assert same(outcomes[0][1], outcomes[1][1])


@pytest.mark.parametrize(("refill", "batch"), [("step", 5), ("immediate", 8), ("batch", 2)])
def test_a_batch_that_cannot_be_is_refused(refill, batch):
    with pytest.raises(ValueError, match="responses_per_step: got"):
        SlotSchedule(slots=4, window=8, max_response_tokens=8, refill=refill, responses_per_step=batch)


def test_tppo_once_takes_the_engines_log_probabilities_and_waits_for_a_window():
    made = apply_method(replace_fields(Config(), {"rollout.window": 48}), "tppo-once")
    assert (made.policy.old_logprobs, made.policy.min_new_tokens, made.policy.prefix) == ("engine", 48, "full")


# ------------------------------------------------------------------------------------------------------------------------ GePPO


def test_geppo_trains_on_the_last_batches_again_and_books_each_token_once():
    trainer = make_trainer("geppo", value__warmup_steps=1)
    seen = []
    trainer.observer = lambda rows, *rest: seen.append(rows)
    batches: list[set[int]] = []
    for step in range(1, 7):
        metrics = trainer.step()
        rows, new = seen[-1], {s.response.id for s in trainer.slices}
        again = batches[-2:]
        assert sorted(r.id for r in rows.responses) == sorted(new.union(*again))
        assert {r.id for r, reused in zip(rows.responses, rows.reused_B, strict=True) if reused} == set().union(*again)
        assert torch.equal(rows.train_BT.sum(1), torch.tensor([len(r) for r in rows.responses])), "a response is trained on whole"
        assert metrics["policy/tokens"] == (0 if step == 1 else sum(map(len, rows.responses)))
        assert metrics["policy/reused_tokens"] == sum(len(r) for r in rows.responses if r.id not in new)
        assert metrics["ledger/trained"] + metrics["ledger/excluded_warmup"] == metrics["ledger/generated"]
        assert metrics["policy/staleness_max"] == len(again) or step == 1
        if step > 1:  # what the critic's warm-up left out stays out
            batches.append(new)


def test_geppos_clip_is_the_papers_share_of_ppos():
    """epsilon / E[i + 1] over the batches i = 0, 1, 2 that count alike: half of it."""
    geppo, ppo = apply_method(Config(), "geppo", strict=False).policy, Config().policy
    batches = range(1 + geppo.reuse_batches)
    share = len(batches) / sum(i + 1 for i in batches)
    assert (geppo.clip_low, geppo.clip_high) == pytest.approx((ppo.clip_low * share, ppo.clip_high * share))


@pytest.mark.parametrize(("changes", "field"), [
    ({"policy.reuse_batches": 1}, "policy.reuse_batches: got 1; expected 0 where rows are cut"),
    ({"policy.importance": "generalised", "policy.ewma_decay": 0.5}, "policy.importance: got generalised; expected none, truncated"),
    ({"policy.importance": "generalised", "policy.old_logprobs": "engine"}, "policy.old_logprobs: got engine; expected recompute"),
])  # fmt: skip
def test_what_geppo_cannot_be_combined_with(changes, field):
    with pytest.raises(UserError, match=field):
        check(replace_fields(Config(), changes))
    check(apply_method(Config(), "geppo", strict=False))
