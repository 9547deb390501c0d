"""The training loop on tiny real models: what is fed, what is trained, what is counted, and what stops it.

The laws F1 to F4 are those of docs/theory. Spies stand between the Trainer and its two modules, so that what reaches a
loss is read from the gradient that comes back, and not from the Trainer's own masks.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import itertools
import math
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    END_ID,
    RecordingParallel,
    ToyScorer,
    make_prompts,
    make_trainer,
    one_thread,  # noqa: F401  (a fixture)
    same,
    score_of,
    weights_of,
)

import tppo_ref.loop.updates
from tppo_ref.loop.meters import PhaseClock
from tppo_ref.method.errors import NonFiniteError
from tppo_ref.method.records import End
from tppo_ref.rollout.packing import TokenBatch
from tppo_ref.rollout.torch_engine import TorchEngine
from tppo_ref.runs.config import METHODS
from tppo_ref.runs.docs_pages import metrics_markdown
from tppo_ref.runs.evaluate import Evaluation, Evaluator, Sampler
from tppo_ref.runs.glossary import GLOSSARY

pytestmark = pytest.mark.usefixtures("one_thread")

TAILS = {"exclude": ("exclude", 2), "defer": ("defer", 2), "none": ("exclude", 0)}  # advantage.tail, advantage.tail_tokens


# -------------------------------------------------------------------------------------------------------------- F1: the ledger


@dataclasses.dataclass
class LossSpy:
    """What `losses.policy_loss` was given, call by call, beside the batch that the policy was fed just before."""

    calls: list[dict] = dataclasses.field(default_factory=list)
    batch: TokenBatch | None = None

    def see(self, batch, logprob_BT, training):
        if training:
            self.batch = batch
        return logprob_BT

    def install(self, monkeypatch):
        whole = tppo_ref.loop.updates.policy_loss

        def policy_loss(logprob_BT, old_BT, advantages_BT, mask_BT, **options):
            rows = list(zip(map(tuple, self.batch.prompt_ids), map(tuple, self.batch.response_ids), strict=True))
            weight = options.get("weight_BT")
            self.calls.append({
                "rows": rows, "mask": mask_BT.clone(), "old": old_BT.detach().clone(), "new": logprob_BT.detach().clone(),
                "advantages": advantages_BT.clone(), "weight": None if weight is None else weight.clone(),
            })  # fmt: skip
            return whole(logprob_BT, old_BT, advantages_BT, mask_BT, **options)

        monkeypatch.setattr(tppo_ref.loop.updates, "policy_loss", policy_loss)
        return self

    def take(self) -> list[dict]:
        calls, self.calls = self.calls, []
        return calls


def columns(mask_T: torch.Tensor) -> list[int]:
    return mask_T.nonzero()[:, 0].tolist()


WITH_A_CRITIC = [method for method in METHODS if "advantage.estimator" not in METHODS[method]]  # test_groups.py has the others


@pytest.mark.parametrize(("tail", "tail_tokens"), TAILS.values(), ids=TAILS)
@pytest.mark.parametrize("method", WITH_A_CRITIC)
def test_F1_generated_is_trained_plus_excluded_plus_pending_at_every_step(method, tail, tail_tokens, monkeypatch):
    """An independent ledger, from the text: which columns of which response the policy's loss must hold in each step."""
    spy = LossSpy().install(monkeypatch)
    epochs, warmup = 2, 1
    trainer = make_trainer(
        method, policy_spy=spy.see, advantage__tail=tail, advantage__tail_tokens=tail_tokens, policy__epochs=epochs,
        value__warmup_steps=warmup,
    )  # fmt: skip
    reused: collections.deque[dict[tuple, list[int]]] = collections.deque(maxlen=trainer.config.policy.reuse_batches)
    settled: collections.Counter[int] = collections.Counter()
    ever_trained: collections.Counter[tuple[int, int]] = collections.Counter()
    trained = tail_excluded = warmup_excluded = generated = 0
    for step in range(1, 8):
        metrics = trainer.step()
        expected: dict[tuple, list[int]] = {}
        for s in trainer.slices:
            r, n = s.response, s.stop
            generated += s.stop - s.begin
            if method == "partial-is" and not r.ended:
                continue  # trains once, when it ends
            cut = r.end is End.RUNNING
            if cut and n - settled[r.id] < trainer.config.policy.min_new_tokens:
                continue  # waits for a window of untrained tokens
            begin, settled[r.id] = settled[r.id], n
            stop = max(begin, n - tail_tokens) if cut else n
            if step <= warmup:
                warmup_excluded += n - begin
                continue
            if tail == "defer":
                settled[r.id] = stop
            else:
                tail_excluded += n - stop
            trained += stop - begin
            expected[tuple(r.prompt.token_ids), tuple(r.token_ids)] = list(range(begin, stop))
            ever_trained.update((r.id, t) for t in range(begin, stop))
        found: dict[tuple, list[list[int]]] = collections.defaultdict(list)
        for call in spy.take():
            for row, mask_T in zip(call["rows"], call["mask"], strict=True):
                found[row].append(columns(mask_T))
        again = list(itertools.chain.from_iterable(rows.items() for rows in reused))  # whole responses, outside of the books
        if any(expected.values()) or again:
            wanted: dict[tuple, list[list[int]]] = collections.defaultdict(list)
            for row, cols in (*expected.items(), *again):
                wanted[row] += [cols] * epochs
            assert {row: sorted(masks) for row, masks in found.items()} == {row: sorted(masks) for row, masks in wanted.items()}
        else:
            assert not any(itertools.chain(*found.values()))
        in_flight = trainer.batcher.in_flight.values()
        pending = sum(len(r) - settled[r.id] for r in in_flight)
        assert (metrics["ledger/generated"], metrics["ledger/trained"]) == (generated, trained)
        assert (metrics["ledger/excluded_tail"], metrics["ledger/excluded_warmup"]) == (tail_excluded, warmup_excluded)
        assert (metrics["ledger/pending"], metrics["ledger/in_flight"]) == (pending, len(in_flight))
        assert metrics["ledger/generated"] == trained + tail_excluded + warmup_excluded + pending
        if step > warmup:
            num_reused = sum(len(cols) for _, cols in again)
            assert metrics["policy/reused_tokens"] == num_reused
            assert metrics["policy/tokens"] == sum(map(len, expected.values())) + num_reused
            reused.append(expected)
    assert set(ever_trained.values()) == {1}, "a token was trained in two steps"
    assert trained > 0
    assert warmup_excluded > 0


def test_a_tail_that_is_deferred_is_trained_exactly_once_and_nothing_is_excluded(monkeypatch):
    spy = LossSpy().install(monkeypatch)
    trainer = make_trainer("tppo-defer", policy_spy=spy.see, advantage__tail_tokens=4)
    counts: dict[tuple, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    responses, deferred = {}, 0
    for _ in range(8):
        metrics = trainer.step()
        responses |= {tuple(s.response.prompt.token_ids): s.response for s in trainer.slices}
        begins = {tuple(s.response.prompt.token_ids): s.begin for s in trainer.slices}
        for call in spy.take():
            for (prompt, _), mask_T in zip(call["rows"], call["mask"], strict=True):
                counts[prompt].update(columns(mask_T))
                deferred += sum(t < begins[prompt] for t in columns(mask_T))
        assert metrics["ledger/excluded_tail"] == 0
    assert deferred > 0
    for prompt, r in responses.items():
        stop = len(r) if r.ended else max(0, len(r) - 4)
        assert counts[prompt] == collections.Counter(range(stop))


@pytest.mark.parametrize("window", [2, 3])
def test_a_tail_longer_than_the_window_defers_over_several_windows(window, monkeypatch):
    spy = LossSpy().install(monkeypatch)
    trainer = make_trainer("tppo-defer", policy_spy=spy.see, advantage__tail_tokens=5, rollout__window=window)
    counts: dict[tuple, collections.Counter[int]] = collections.defaultdict(collections.Counter)
    responses = {}
    for _ in range(12):
        trainer.step()
        responses |= {tuple(s.response.prompt.token_ids): s.response for s in trainer.slices}
        for call in spy.take():
            for (prompt, _), mask_T in zip(call["rows"], call["mask"], strict=True):
                counts[prompt].update(columns(mask_T))
    assert any(len(r) > 2 * window and r.ended for r in responses.values())
    for prompt, r in responses.items():
        assert counts[prompt] == collections.Counter(range(len(r) if r.ended else max(0, len(r) - 5)))


def test_synchronous_ppo_ends_every_response_in_its_step_and_leaves_nothing_pending():
    trainer = make_trainer("ppo")
    for step in range(1, 4):
        metrics = trainer.step()
        assert metrics["response/rows"] == metrics["response/ended"] == 5
        assert metrics["ledger/pending"] == metrics["ledger/in_flight"] == metrics["ledger/excluded_tail"] == 0
        assert metrics["ledger/trained"] == metrics["ledger/generated"]
        assert trainer.batcher.stream.next == 5 * step


# -------------------------------------------------------------------------------------------------------------- F2: the critic


class CriticSpy:
    """Rows and gradients of the critic's training passes: where the gradient is not 0, a token reached its loss."""

    def __init__(self):
        self.calls: list[dict] = []

    def see(self, batch, output, training):
        value_BT, last_B = output
        if training:
            rows = list(zip(map(tuple, batch.prompt_ids), map(tuple, batch.response_ids), strict=True))
            call = {"rows": rows, "value": value_BT.detach().clone(), "gradient": torch.zeros_like(value_BT)}
            value_BT.register_hook(lambda g: call.update(gradient=g.clone()))
            self.calls.append(call)
        return value_BT, last_B

    def take(self) -> list[dict]:
        calls, self.calls = self.calls, []
        return calls


NO_CLIP = {"value__clip_low": None, "value__clip_high": None}


@pytest.mark.parametrize("method", ["tppo", "tppo-defer", "ppo-dual", "partial-is"])
@pytest.mark.parametrize("batch_responses", [0, 4])
def test_F2_each_ended_token_reaches_the_critic_once_per_epoch_and_no_running_one_ever(method, batch_responses):
    spy, epochs, gamma = CriticSpy(), 2, 0.9
    trainer = make_trainer(method, value_spy=spy.see, value__epochs=epochs, advantage__gamma=gamma,
                           value__batch_responses=batch_responses, **NO_CLIP)  # fmt: skip
    waiting, trained, held_once = [], 0, False
    for _ in range(7):
        metrics = trainer.step()
        waiting += [s.response for s in trainer.slices if s.response.ended]
        size = batch_responses or len(waiting) or 1
        due, waiting = waiting[: len(waiting) // size * size], waiting[len(waiting) // size * size :]
        held_once |= bool(waiting)
        expected = collections.Counter(
            (tuple(r.prompt.token_ids), tuple(r.token_ids), tuple(range(len(r)))) for r in due for _ in range(epochs)
        )
        found: collections.Counter[tuple] = collections.Counter()
        num_tokens = sum(map(len, due))
        for call in spy.take():
            for row, value_T, g_T in zip(call["rows"], call["value"], call["gradient"], strict=True):
                found[(*row, tuple(columns(g_T != 0)))] += 1
                # d/dv of (v - R)^2 / 2N is (v - R)/N, so the target can be read back.
                (r,) = (r for r in due if tuple(r.prompt.token_ids) == row[0])
                returns = [gamma ** (len(r) - 1 - t) * score_of(r) for t in range(len(r))]
                target_T = (value_T - g_T * num_tokens)[: len(r)]
                torch.testing.assert_close(target_T, torch.tensor(returns), rtol=0, atol=1e-4)
        assert found == expected
        trained += len(due)
        assert metrics["value/responses"] == len(due)
        assert metrics["value/tokens"] == epochs * num_tokens
        assert metrics["value/held"] == len(waiting) == len(trainer.held)
        assert metrics["value/updates"] == epochs * bool(due)
    assert trained > 0
    assert held_once == bool(batch_responses)


def test_a_critic_that_waits_for_a_full_batch_is_left_as_it_is_until_then():
    trainer = make_trainer("tppo", value__batch_responses=1000)
    before = weights_of(trainer.value_learner.module)
    ended = 0
    for _ in range(4):
        metrics = trainer.step()
        ended += int(metrics["response/ended"])
        assert metrics["value/held"] == ended
    assert ended > 0
    assert same(before, weights_of(trainer.value_learner.module))


def test_the_joint_critic_trains_on_the_policys_tokens_towards_advantage_plus_value():
    """PPO: gamma = 1 and lambda = 1 make the target the Monte Carlo return, whatever the critic says."""
    spy = CriticSpy()
    trainer = make_trainer("ppo", value_spy=spy.see, advantage__lam=1, advantage__lam_alpha=None, **NO_CLIP)
    metrics = trainer.step()
    (call,) = spy.take()
    by_prompt = {tuple(s.response.prompt.token_ids): s.response for s in trainer.slices}
    num_tokens = sum(map(len, by_prompt.values()))
    assert metrics["value/tokens"] == metrics["policy/tokens"] == num_tokens
    assert len(call["rows"]) == len(by_prompt) == 5
    for (prompt, _), value_T, g_T in zip(call["rows"], call["value"], call["gradient"], strict=True):
        r = by_prompt[prompt]
        torch.testing.assert_close((value_T - g_T * num_tokens)[: len(r)], torch.full((len(r),), score_of(r)), rtol=0, atol=1e-4)
        assert not g_T[len(r) :].any()


def test_the_values_that_anchor_the_critics_clip_are_of_the_step_that_sampled_the_token():
    seen: list[tuple] = []

    def see(batch, output, training):
        if not training:
            seen.append(([tuple(ids) for ids in batch.prompt_ids], output[0].clone()))
        return output

    trainer = make_trainer("tppo", value_spy=see)
    earlier: dict[int, list[float]] = {}
    for _ in range(5):
        trainer.step()
        for s in trainer.slices:
            assert s.response.values[: s.begin] == earlier.get(s.response.id, [])
            earlier[s.response.id] = list(s.response.values)
            (values_T,) = [v[prompts.index(key)] for prompts, v in seen if (key := tuple(s.response.prompt.token_ids)) in prompts]
            assert s.response.values[s.begin : s.stop] == values_T[s.begin : s.stop].tolist()
            assert len(s.response.values) == len(s.response)
        seen.clear()


# --------------------------------------------------------------------------------------------------- F3: prompts and padding


def test_F3_prompt_and_padding_tokens_reach_no_loss():
    """Prompts are no columns at all; garbage in the padding of what the models return changes no weight and no metric."""

    def garbage(number):
        def see(batch, output, training):
            lengths = torch.tensor([len(ids) for ids in batch.response_ids])
            first = output[0] if isinstance(output, tuple) else output
            assert first.shape == (len(lengths), int(lengths.max()))
            padding = torch.arange(first.shape[1]) >= lengths[:, None]
            first = torch.where(padding, number, first)
            return (first, output[1]) if isinstance(output, tuple) else first

        return see

    runs = []
    for number in (0.0, 5.0, -3e4):
        trainer = make_trainer("tppo", policy_spy=garbage(number), value_spy=garbage(number), advantage__gamma=0.9)
        metrics = [trainer.step() for _ in range(4)]
        runs.append((weights_of(trainer.policy_learner.module) + weights_of(trainer.value_learner.module), metrics))
    for weights, metrics in runs[1:]:
        assert same(weights, runs[0][0])
        for one, two in zip(metrics, runs[0][1], strict=True):
            assert without_clock(one) == pytest.approx(without_clock(two), nan_ok=True)


def without_clock(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.startswith("time/") and k not in ("rollout/tokens_per_s", "rollout/idle_s")}


# ----------------------------------------------------------------------------------------------- what is equal carries no signal


@pytest.mark.parametrize("whitened", [True, False])
def test_advantages_that_differ_by_rounding_alone_train_nothing(whitened, monkeypatch):
    """Every score +1, lambda 1 and a critic that says -0.9 up to its last bit: each advantage is 1.9, and their spread no signal."""

    def see(batch, output, training):
        last_bit_T = torch.arange(output[0].shape[1]) % 2 * 2.0**-23
        return (0 * output[0] - 0.9 * (1 + last_bit_T), output[1])

    monkeypatch.setattr("helpers.score_of", lambda response: 1.0)
    spy = LossSpy().install(monkeypatch)
    trainer = make_trainer(
        "ppo-dual", policy_spy=spy.see, value_spy=see, advantage__lam=1, advantage__lam_alpha=None,
        advantage__whiten=whitened, value__lr=0.0,
    )  # fmt: skip
    for _ in range(3):
        metrics = trainer.step()
        assert metrics["advantage/mean"] == pytest.approx(1.9, abs=1e-6)
        assert 0 < metrics["advantage/std"] < 1e-6, "nothing was rounded"
        (call,) = spy.take()
        expected = torch.where(call["mask"], 0.0 if whitened else 1.9, 0.0)
        torch.testing.assert_close(call["advantages"], expected, rtol=0, atol=0 if whitened else 1e-6)


# ------------------------------------------------------------------------------- F4: against the policy that sampled the token


def test_F4_without_deferral_every_trained_token_was_sampled_by_the_current_policy(monkeypatch):
    spy = LossSpy().install(monkeypatch)
    trainer = make_trainer("tppo", policy_spy=spy.see)
    several = False
    for step in range(6):
        trainer.step()
        by_prompt = {tuple(s.response.prompt.token_ids): s.response for s in trainer.slices}
        for call in spy.take():
            for (prompt, _), mask_T, old_T in zip(call["rows"], call["mask"], call["old"], strict=True):
                r = by_prompt[prompt]
                several |= len(set(r.versions)) > 1
                for t in columns(mask_T):
                    assert r.versions[t] == step
                    assert float(old_T[t]) == pytest.approx(r.logprobs[t], abs=1e-5)
    assert several, "no response spanned two policies"


@pytest.mark.parametrize(("method", "changes", "oldest"), [
    ("tppo", {}, 0), ("tppo-defer", {"advantage__tail_tokens": 3}, 1), ("ppo", {}, 0), ("partial-is", {}, None),
])  # fmt: skip
def test_staleness_is_the_weight_versions_between_sampling_and_training_of_the_trained_tokens(method, changes, oldest):
    """Of a cut row without its tail; of a partial rollout nothing before its end."""
    trainer = make_trainer(method, **changes)
    tail = trainer.config.advantage.tail_tokens if trainer.config.advantage.tail == "exclude" else 0
    worst, excluded = 0.0, 0
    for _ in range(8):
        now, ages = trainer.version, []
        settled = {r.id: r.num_settled for r in trainer.batcher.in_flight.values()}
        metrics = trainer.step()
        for s in trainer.slices:
            r = s.response
            begin = settled.get(r.id, 0)
            stop = r.num_settled if r.ended else 0 if method == "partial-is" else max(begin, r.num_settled - tail)
            excluded += r.num_settled - max(begin, stop)
            ages += [now - version for version in r.versions[begin:stop]]
        assert metrics["policy/tokens"] == len(ages)
        assert metrics["policy/staleness"] == pytest.approx(sum(ages) / len(ages) if ages else math.nan, nan_ok=True)
        assert metrics["policy/staleness_max"] == pytest.approx(max(ages, default=math.nan), nan_ok=True)
        worst = max(worst, *ages, 0)
    assert (excluded > 0) == (method == "tppo")
    assert worst == oldest if oldest is not None else worst > 1, "a response of several windows, trained at its end"


def test_F4_a_deferred_token_is_trained_against_its_own_older_policy(monkeypatch):
    spy = LossSpy().install(monkeypatch)
    trainer = make_trainer("tppo-defer", policy_spy=spy.see, advantage__tail_tokens=3, policy__lr=5e-3)
    largest = 0.0
    for step in range(6):
        trainer.step()
        by_prompt = {tuple(s.response.prompt.token_ids): s.response for s in trainer.slices}
        for call in spy.take():
            for i, (prompt, _) in enumerate(call["rows"]):
                r = by_prompt[prompt]
                for t in columns(call["mask"][i]):
                    assert r.versions[t] in (step, step - 1)
                    assert float(call["old"][i, t]) == pytest.approx(r.logprobs[t], abs=1e-5)
                    if r.versions[t] < step:
                        largest = max(largest, abs(float(call["new"][i, t]) - r.logprobs[t]))
    assert largest > 1e-3, "no deferred token's policy had moved on: the check above could not fail"


def test_F4_partial_rollouts_weigh_older_tokens_by_current_over_behaviour(monkeypatch):
    spy = LossSpy().install(monkeypatch)
    trainer = make_trainer("partial-is", policy_spy=spy.see, policy__lr=5e-3, policy__importance_cap=1.2)
    capped = 0
    for _ in range(7):
        trainer.step()
        by_prompt = {tuple(s.response.prompt.token_ids): s.response for s in trainer.slices}
        for call in spy.take():
            for i, (prompt, _) in enumerate(call["rows"]):
                r = by_prompt[prompt]
                for t in columns(call["mask"][i]):
                    ratio = math.exp(float(call["old"][i, t]) - r.logprobs[t])  # one update: old is the current policy's
                    assert float(call["weight"][i, t]) == pytest.approx(min(ratio, 1.2), abs=1e-4)
                    assert float(call["old"][i, t]) == float(call["new"][i, t])
                    capped += ratio > 1.2
    assert capped > 0


def test_old_log_probabilities_of_the_engine_are_used_as_they_are(monkeypatch):
    spy = LossSpy().install(monkeypatch)
    trainer = make_trainer("tppo", policy_spy=spy.see, policy__old_logprobs="engine")
    trainer.step()
    by_prompt = {tuple(s.response.prompt.token_ids): s.response for s in trainer.slices}
    (call,) = spy.take()
    for (prompt, _), mask_T, old_T in zip(call["rows"], call["mask"], call["old"], strict=True):
        r = by_prompt[prompt]
        assert old_T[mask_T].tolist() == pytest.approx([r.logprobs[t] for t in columns(mask_T)], abs=0)


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [({}, 0.0), ({"policy__micro_batch_tokens": 30}, 0.0), ({"policy__old_logprobs": "engine"}, 1e-5)],
    ids=["recomputed", "recomputed, micro-batches", "engine"],
)
def test_the_ratio_is_1_at_the_first_inner_step(changes, tolerance):
    trainer = make_trainer("tppo", **changes)
    for _ in range(4):
        metrics = trainer.step()
        assert metrics["policy/updates"] == 1
        assert abs(metrics["policy/ratio_max"] - 1.0) <= tolerance
        assert abs(metrics["policy/kl"]) <= tolerance
        if trainer.config.policy.old_logprobs == "recompute":
            assert metrics["policy/logprob_gap"] <= 1e-5
        else:
            assert math.isnan(metrics["policy/logprob_gap"]), "nothing was recomputed: there is nothing to compare"


def test_the_ratio_leaves_1_after_the_first_update():
    metrics = make_trainer("tppo", policy__epochs=2).step()
    assert metrics["policy/ratio_max"] > 1.0


# ------------------------------------------------------------------------------------- micro-batches, mini-batches, prefixes


@pytest.mark.parametrize("method", ["tppo", "tppo-defer", "ppo", "partial-is"])
def test_a_mini_batch_in_micro_batches_has_the_gradient_of_one_batch(method):
    gradients, num_forward = [], []
    for budget in (10**6, 31, 1):
        count: collections.Counter[str] = collections.Counter()

        def see(batch, output, training, count=count):
            count["training"] += training
            return output

        parallel = RecordingParallel()
        trainer = make_trainer(method, parallel=parallel, policy_spy=see, policy__micro_batch_tokens=budget,
                               value__micro_batch_tokens=budget, rollout__slots=12, rollout__window=12)  # fmt: skip
        trainer.step()
        num_forward.append(count["training"])
        gradients.append((parallel.of(trainer.policy_learner.module), parallel.of(trainer.value_learner.module)))
    assert num_forward[0] == 1
    assert num_forward[0] < num_forward[1] < num_forward[2]
    for pair in gradients[1:]:
        for ours, whole in zip(pair, gradients[0], strict=True):
            assert len(ours) == len(whole) == 1
            for a, b in zip(ours[0], whole[0], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()) + 1e-8)


def test_mini_batches_share_out_the_rows_and_each_is_an_update():
    trainer = make_trainer("ppo-dual", policy__mini_batches=4, value__mini_batches=2, policy__epochs=3)
    metrics = trainer.step()
    assert metrics["policy/updates"] == 12
    assert metrics["value/updates"] == 2


def test_mini_batches_by_tokens_are_about_that_large():
    trainer = make_trainer("ppo-dual", policy__mini_batch_tokens=20, rollout__slots=20)
    metrics = trainer.step()
    assert metrics["policy/updates"] == pytest.approx(metrics["policy/tokens"] / 20, abs=0.5)


def test_prefix_tokens_are_counted_as_fed_less_sampled():
    fed: list[int] = []
    trainer = make_trainer(
        "tppo", policy_spy=lambda batch, output, training: (training and fed.append(batch.num_tokens_fed), output)[1]
    )
    for _ in range(4):
        fed.clear()
        metrics = trainer.step()
        assert metrics["policy/prefix_tokens"] == sum(fed) - metrics["rollout/tokens"]
        assert sum(fed) == sum(len(s.response.prompt.token_ids) + s.stop for s in trainer.slices)


# ------------------------------------------------------------------------------------------------------ warm-up and PPO-EWMA


def test_warm_up_steps_train_the_critic_alone_and_exclude_their_tokens():
    trainer = make_trainer("tppo", value__warmup_steps=3)
    policy = weights_of(trainer.policy_learner.module)
    for step in range(1, 6):
        value = weights_of(trainer.value_learner.module)
        metrics = trainer.step()
        if step <= 3:
            assert same(policy, weights_of(trainer.policy_learner.module))
            assert metrics["ledger/excluded_warmup"] == metrics["ledger/generated"]
            assert metrics["ledger/trained"] == metrics["policy/tokens"] == metrics["ledger/pending"] == 0
            excluded = metrics["ledger/excluded_warmup"]
        else:
            assert not same(policy, weights_of(trainer.policy_learner.module))
            assert metrics["ledger/excluded_warmup"] == excluded
        assert same(value, weights_of(trainer.value_learner.module)) == (metrics["response/ended"] == 0)


def test_the_learning_rate_rises_linearly_over_its_warm_up():
    trainer = make_trainer("tppo", policy__lr=4e-4, policy__lr_warmup_steps=4, value__lr_warmup_steps=0)
    rates = [trainer.step() for _ in range(6)]
    assert [m["policy/lr"] for m in rates] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 4e-4, 4e-4])
    assert {m["value/lr"] for m in rates} == {1e-3}


def test_ppo_ewma_the_average_is_of_all_weights_so_far_each_older_one_counting_decay_times_less():
    parallel, decay = RecordingParallel(), 0.75
    trainer = make_trainer("tppo", parallel=parallel, policy__ewma_decay=decay, policy__mini_batches=3, policy__lr=3e-3)
    history = [weights_of(trainer.policy_learner.module)]
    assert same(history[0], weights_of(trainer.ewma.module)), "it starts as the policy"
    for _ in range(3):
        parallel.weights.clear()
        trainer.step()
        before_each = [w for module, w in parallel.weights if module is trainer.policy_learner.module]
        history += [*before_each[1:], weights_of(trainer.policy_learner.module)]
    assert len(history) == 10
    share = [decay ** (len(history) - 1 - i) for i in range(len(history))]
    for i, averaged in enumerate(weights_of(trainer.ewma.module)):
        expected = sum(s * weights[i] for s, weights in zip(share, history, strict=True)) / sum(share)
        torch.testing.assert_close(averaged, expected, rtol=0, atol=1e-6)
    assert not same(weights_of(trainer.ewma.module), weights_of(trainer.policy_learner.module))


def test_ppo_ewma_clips_around_the_average_and_weighs_by_average_over_behaviour(monkeypatch):
    spy = LossSpy().install(monkeypatch)
    trainer = make_trainer("tppo-ewma", policy_spy=spy.see, policy__lr=5e-3)
    trainer.step()
    trainer.step()
    spy.take()
    averaged = copy.deepcopy(trainer.ewma.module)
    trainer.step()
    by_prompt = {tuple(s.response.prompt.token_ids): s.response for s in trainer.slices}
    (call,) = spy.take()
    moved = 0.0
    for i, (prompt, response) in enumerate(call["rows"]):
        with torch.no_grad():
            centre_T = averaged(TokenBatch([prompt], [response]))[0]
        r = by_prompt[prompt]
        for t in columns(call["mask"][i]):
            assert float(call["old"][i, t]) == pytest.approx(float(centre_T[t]), abs=1e-5)
            weight = min(math.exp(float(centre_T[t]) - r.logprobs[t]), 2.0)
            assert float(call["weight"][i, t]) == pytest.approx(weight, abs=1e-4)
            moved = max(moved, abs(weight - 1))
    assert moved > 1e-3


# ------------------------------------------------------------------------------------------------------------- what stops it


def poison(at: str, when):
    """A spy that spoils the output's numbers, or their gradient, from the training pass number `when` on (0 = the first)."""
    count: collections.Counter[bool] = collections.Counter()

    def see(batch, output, training):
        first = output[0] if isinstance(output, tuple) else output
        count[training] += 1
        if training and count[True] > when:
            if at == "gradient":
                first.register_hook(lambda g: g * math.inf)
            elif at == "loss":
                first = first * math.nan
        if not training and at == "forward" and count[False] > when:
            first = first + math.inf
        return (first, output[1]) if isinstance(output, tuple) else first

    return see


@pytest.mark.parametrize("at", ["forward", "loss", "gradient"])
@pytest.mark.parametrize("model", ["policy", "value"])
def test_what_is_not_finite_stops_before_the_update_and_is_named(model, at):
    trainer = make_trainer("tppo", **{f"{model}_spy": poison(at, when=2)})
    step, learner, message = 0, getattr(trainer, f"{model}_learner"), ""
    while not message and step < 20:
        step += 1
        before = weights_of(learner.module)
        try:
            trainer.step()
        except NonFiniteError as error:
            message = str(error)
    assert f"step {step}:" in message
    assert step > 1
    output = {"policy": "log-probability", "value": "value"}[model]
    assert {"forward": output, "loss": f"{model}'s loss", "gradient": "gradient"}[at] in message
    assert same(before, weights_of(learner.module))
    assert "\n" not in message


def test_the_tensor_whose_gradient_is_not_finite_is_the_one_that_is_named():
    trainer = make_trainer("tppo")
    name, parameter = list(trainer.policy_learner.module.named_parameters())[5]
    parameter.register_hook(lambda g: g * math.nan)
    before = weights_of(trainer.policy_learner.module)
    with pytest.raises(NonFiniteError, match=rf"gradient of {name} is not finite"):
        trainer.step()
    assert same(before, weights_of(trainer.policy_learner.module))


def test_a_policy_with_a_weight_that_is_not_finite_stops_in_the_rollout_and_says_where():
    trainer = make_trainer("tppo")
    trainer.step()
    with torch.no_grad():
        next(trainer.policy_learner.module.parameters())[:] = math.nan
    with pytest.raises((FloatingPointError, NonFiniteError), match=r"response \d+.*position \d+"):
        trainer.step()


# ---------------------------------------------------------------------------------------------------------- sync and versions


def test_each_step_ends_with_a_sync_of_the_next_version():
    trainer = make_trainer("tppo")
    synced = []
    load_weights = trainer.engine.load_weights

    def sync(tensors, version):
        synced.append((version, trainer.engine.num_running))
        load_weights(tensors, version)

    trainer.engine.load_weights = sync
    for step in range(3):
        trainer.step()
        new = [v for s in trainer.slices for v in s.response.versions[s.begin : s.stop]]
        assert set(new) == {step}
    assert synced == [(1, 0), (2, 0), (3, 0)]
    assert trainer.version == 3


def test_two_runs_of_one_seed_are_the_same_bit_for_bit_and_another_seed_differs():
    outcomes = []
    for seed in (0, 0, 1):
        trainer = make_trainer("tppo", run__seed=seed, policy__mini_batches=3)
        for _ in range(3):
            trainer.step()
        outcomes.append(weights_of(trainer.policy_learner.module) + weights_of(trainer.value_learner.module))
    assert same(outcomes[0], outcomes[1])
    assert not same(outcomes[0], outcomes[2])


# -------------------------------------------------------------------------------------------------------------- the glossary


@pytest.fixture(scope="module")
def logged() -> dict[str, set[str]]:
    """Names that each method logs in two steps, and those of an evaluation."""
    torch.set_num_threads(1)
    names = {}
    for method in METHODS:
        trainer = make_trainer(method)
        names[method] = set().union(*(trainer.step() for _ in range(2)))
    engine = TorchEngine(trainer.policy_learner.module, slots=4, max_context_tokens=24, end_token_ids=(END_ID,))
    return names | {"evaluation": set(evaluate(engine, 6, 1).metrics)}


def evaluate(engine: TorchEngine, num_prompts: int, samples: int) -> Evaluation:
    sampler = Sampler(engine=engine, scorer=ToyScorer(), slots=engine.slots, max_response_tokens=20)
    return Evaluator(sampler=sampler, prompts=make_prompts(num_prompts), samples_per_prompt=samples)()


def test_every_metric_of_the_glossary_is_logged_and_nothing_else(logged):
    assert set().union(*logged.values()) == set(GLOSSARY)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_logs_the_same_names(logged, method):
    assert logged[method] == logged["tppo"]


def test_an_evaluation_answers_each_prompt_and_sample_whole_and_always_the_same():
    trainer = make_trainer("tppo")
    engine = TorchEngine(trainer.policy_learner.module, slots=3, max_context_tokens=24, end_token_ids=(END_ID,))
    other = TorchEngine(trainer.policy_learner.module, slots=7, max_context_tokens=24, end_token_ids=(END_ID,))
    prompts = make_prompts(7)
    results = [evaluate(e, 7, 3) for e in (engine, engine, other)]
    metrics, answers, decode_steps = results[0]
    assert collections.Counter(r.prompt.id for r in answers) == {p.id: 3 for p in prompts}
    assert all(r.ended for r in answers)
    assert metrics["eval/accuracy"] == sum(score_of(r) > 0 for r in answers) / 21
    assert metrics["eval/length_mean"] == pytest.approx(sum(map(len, answers)) / 21)
    assert metrics["eval/capped_share"] == sum(r.end is End.LENGTH_CAP for r in answers) / 21
    assert sum(step.active for step in decode_steps) == sum(map(len, answers))
    for _, again, _ in results[1:]:
        assert [r.token_ids for r in again] == [r.token_ids for r in answers]


def test_docs_metrics_is_the_glossary():
    path = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
    assert path.exists(), "docs/metrics.md is missing"
    assert path.read_text() == metrics_markdown(), "run: python -m tppo_ref.runs.docs_pages"
    rows = [line for line in path.read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == len(GLOSSARY)


# ---------------------------------------------------------------------------------------------------------------- the clock


def test_the_cpu_clock_counts_what_this_process_computes_and_no_waiting():
    clocks = {kind: PhaseClock(kind) for kind in ("wall", "cpu")}
    with clocks["wall"]("rollout"), clocks["cpu"]("rollout"):
        time.sleep(0.2)
    waited = {kind: clock.seconds["rollout"] for kind, clock in clocks.items()}
    assert waited["wall"] >= 0.2
    assert waited["cpu"] < 0.1
    with clocks["cpu"]("policy"):
        begin = time.process_time()
        while time.process_time() - begin < 0.05:
            pass
    metrics = clocks["cpu"].metrics()
    assert metrics["time/policy_s"] >= 0.05
    phases = sum(metrics[f"time/{name}_s"] for name in ("rollout", "policy", "other"))
    assert metrics["time/step_s"] == pytest.approx(phases)


def test_a_trainers_clock_is_the_one_that_its_config_names():
    trainer = make_trainer("tppo", run__clock="cpu")
    plain, trainer.scorer.collect = trainer.scorer.collect, lambda: (time.sleep(0.3), plain())[1]
    assert trainer.step()["time/verify_s"] < 0.2
