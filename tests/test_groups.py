"""Training without a value model: advantages of groups, what is held until a group has ended, and what is not there."""

from __future__ import annotations

import collections
import copy
import csv
import itertools
import json
import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from helpers import TINY as TINY_SHAPE
from helpers import ToyScorer, learnt, make_prompts, make_trainer, one_thread, same, weights_of  # noqa: F401  (a fixture)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle_stage import make_config, real_stage, toy_stage
from test_parallel import on_ranks
from test_resume import TINY, config_of, metrics_of, train

from sim.lab import instances
from tppo_ref.__main__ import main
from tppo_ref.loop.groups import advantage_of_rows, group_advantages, held_metrics, split_whole_groups
from tppo_ref.loop.parallel import SingleProcess
from tppo_ref.loop.trainer import Trainer
from tppo_ref.method.errors import UserError
from tppo_ref.method.records import End, Prompt, Response
from tppo_ref.rollout.batcher import SampleStream
from tppo_ref.rollout.models import load_value_model
from tppo_ref.runs.build import build
from tppo_ref.runs.checkpoint import MANIFEST, complete_checkpoints, read_state
from tppo_ref.runs.compare import compare, prepare
from tppo_ref.runs.config import Config, apply_method
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.session import Session
from tppo_ref.runs.state_laws import broken_law
from tppo_ref.runs.validation import check

pytestmark = pytest.mark.usefixtures("one_thread")

F64 = torch.float64
ESTIMATORS = ("rloo", "grpo")
METHODS = ("rloo", "grpo", "rloo-window", "grpo-window")


# -------------------------------------------------------------------------------------------------------------- the two formulas


@pytest.mark.parametrize(("estimator", "scores", "wanted"), [
    ("rloo", [1, -1], [2, -2]),
    ("rloo", [1, -1, -1, -1], [2, -2 / 3, -2 / 3, -2 / 3]),  # 1 - (-1); -1 - (1 - 1 - 1) / 3
    ("rloo", [3, 0, 0], [3, -1.5, -1.5]),
    ("grpo", [1, -1], [2**-0.5, -(2**-0.5)]),  # mean 0, and a deviation of sqrt(2) over G - 1 = 1
    ("grpo", [1, -1, -1, -1], [1.5, -0.5, -0.5, -0.5]),  # mean -1/2, squares 9/4 + 3/4 = 3 over 3
    ("rloo", [0.1, 0.1, 0.1], [0, 0, 0]), ("grpo", [0.1, 0.1, 0.1], [0, 0, 0]), ("grpo", [-1, -1], [0, 0]),
])  # fmt: skip
def test_groups_by_hand(estimator, scores, wanted):
    found = group_advantages(torch.tensor([scores], dtype=F64), estimator=estimator)
    torch.testing.assert_close(found, torch.tensor([wanted], dtype=F64), rtol=1e-5, atol=0)
    assert len({*scores}) > 1 or found.count_nonzero() == 0, "alike, and not exactly 0"


@given(st.lists(st.lists(st.floats(-9, 9), min_size=4, max_size=4), min_size=1, max_size=4))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_each_group_is_its_definition_and_sees_no_other(groups):
    for estimator in ESTIMATORS:
        found = group_advantages(torch.tensor(groups, dtype=F64), estimator=estimator)
        for group, row in zip(groups, found.tolist(), strict=True):
            for i, score in enumerate(group):
                wanted = score - statistics.mean(group[:i] + group[i + 1 :])
                if estimator == "grpo":
                    wanted = (score - statistics.mean(group)) / (statistics.stdev(group) + 1e-6)
                assert row[i] == pytest.approx(wanted, rel=1e-6, abs=1e-7)


def test_a_group_of_one_has_nothing_to_be_measured_against():
    with pytest.raises(ValueError, match=r"^scores_PG: expected groups of at least 2, got 1"):
        group_advantages(torch.ones(3, 1), estimator="rloo")


# ----------------------------------------------------------------------------------------------- the exact expected gradient


FEWEST = {"ended so far": 1, "two have ended": 2}
"""Rules that do not wait for a whole group: how many of it must have ended for one to train."""


def expected_gradient(made: instances.Instance, size: int, baseline: str) -> tuple[np.ndarray, np.ndarray]:
    """E[1/G sum_i A_i grad log pi(response i)], every group of `size` responses with its probability; and the exact gradient."""
    mdp, policy_NA = made.mdp, made.policy_NA
    rows = mdp.trajectories(policy_NA)
    score_BNA = np.zeros((len(rows), *policy_NA.shape))
    for b, (nodes, tokens, mask) in enumerate(zip(rows.node_BT, rows.token_BT, rows.mask_BT, strict=True)):
        for node, token in zip(nodes[mask], tokens[mask], strict=True):
            score_BNA[b, node] += np.eye(mdp.num_tokens)[token] - policy_NA[node]
    return_B, length_B, gradient_NA = rows.reward_BT.sum(1), rows.mask_BT.sum(1), 0.0
    for group in map(list, itertools.product(range(len(rows)), repeat=size)):
        if baseline in FEWEST:  # all began together: of the others those that have ended when i has, and as many as the rule asks
            enough = sorted(length_B[group])[FEWEST[baseline] - 1]
            others = [
                [j for k, j in enumerate(group) if k != i and length_B[j] <= max(length_B[group[i]], enough)] for i in range(size)
            ]
            advantages = [return_B[i] - (return_B[them].mean() if them else 0.0) for i, them in zip(group, others, strict=True)]
        else:
            advantages = group_advantages(torch.tensor([return_B[group].tolist()], dtype=F64), estimator=baseline)[0].tolist()
        share = sum(a * score_BNA[i] for a, i in zip(advantages, group, strict=True)) / size
        gradient_NA = gradient_NA + rows.prob_B[group].prod() * share
    return gradient_NA, mdp.policy_gradient(policy_NA)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    "made", [instances.thinking(length=4, start=0.3), instances.decision(length=4, at=1)], ids=["thinking", "decision"]
)
def test_rloos_expected_gradient_is_the_policy_gradient(made, size):
    found, exact = expected_gradient(made, size, "rloo")
    assert np.abs(exact).max() > 0.04
    np.testing.assert_allclose(found, exact, atol=1e-12)


def test_a_mean_of_those_that_have_ended_so_far_is_no_baseline_and_may_point_the_other_way():
    """Who has ended when a response ends depends on its own length. Here most answers are right, and longer ones more often: the first
    to end is measured against nobody and praised for being right, so that the expected update shortens what it should lengthen."""
    made = instances.thinking(length=4, start=0.9, gain=0.3, p_end=0.4)
    (early, exact), (rloo, _) = (expected_gradient(made, 2, baseline) for baseline in ("ended so far", "rloo"))
    cosine = (early * exact).sum() / np.linalg.norm(early) / np.linalg.norm(exact)
    assert np.abs(exact).max() > 0.02
    np.testing.assert_allclose(rloo, exact, atol=1e-12)
    assert cosine < -0.9
    assert np.abs(early - exact).max() > 3 * np.abs(exact).max()


def test_to_wait_for_two_of_three_is_no_baseline_either_and_less_wrong():
    """The rule of docs/wrong.md's change: a response trains once two of its group have ended, against those that have. On the same MDP."""
    made = instances.thinking(length=4, start=0.9, gain=0.3, p_end=0.4)
    found = {rule: expected_gradient(made, 3, rule)[0] for rule in (*FEWEST, "rloo")}
    exact = made.mdp.policy_gradient(made.policy_NA)
    off = {rule: np.abs(g - exact).max() / np.abs(exact).max() for rule, g in found.items()}
    cosine = {rule: (g * exact).sum() / np.linalg.norm(g) / np.linalg.norm(exact) for rule, g in found.items()}
    assert off["rloo"] < 1e-10
    assert off["two have ended"] == pytest.approx(1 / 6, abs=0.01)  # "by a sixth"
    assert cosine["two have ended"] > 0.99
    assert cosine["ended so far"] < -0.9
    assert off["ended so far"] > 2


def test_grpos_expected_gradient_is_scaled_by_the_spread_of_a_prompts_scores():
    """Two scores, groups of two: a group that differs has advantages of 1 / sqrt(2) where rloo's are the scores' difference, 2."""
    found, exact = expected_gradient(instances.thinking(length=4, start=0.3), 2, "grpo")
    np.testing.assert_allclose(found, exact / 2 / 2**0.5, rtol=1e-5, atol=1e-12)


# ------------------------------------------------------------------------------------------------------- whose group has ended


def ended(id: int, score: float = 1.0, version: int = 0) -> Response:
    return Response(id=id, prompt=Prompt(id=0, token_ids=(1,), answer=""), sample_index=id, token_ids=[3], logprobs=[-1.0],
                    versions=[version], window_starts=[0], end=End.END_TOKEN, score=score)  # fmt: skip


def test_every_rank_decides_the_same_of_groups_that_lie_on_several():
    """Groups of three: 0 1 2 on three ranks, 3 4 5 on two, of which 5 still runs, 6 7 8 on one. The prompt is one for all of them."""
    ranks = [[ended(0), ended(3, 0.5)], [ended(1, -1.0), ended(4)], [ended(8), ended(2), ended(6), ended(7, 4.0, version=2)]]

    def work(parallel):
        whole, held = split_whole_groups(ranks[parallel.rank], 3, parallel)
        advantages, flat = advantage_of_rows(whole, 3, estimator="rloo", parallel=parallel)
        metrics = held_metrics(held, whole, 3, sampled_with=2, parallel=parallel)
        return [r.id for r in whole], [r.id for r in held], dict(zip((r.id for r in whole), advantages, strict=True)), flat, metrics

    results = on_ranks(3, work)
    assert [(whole, held) for whole, held, *_ in results] == [([0], [3]), ([1], [4]), ([8, 2, 6, 7], [])]
    advantages = {id: a for _, _, own, _, _ in results for id, a in own.items()}
    assert advantages == pytest.approx({0: 1.0, 1: -2.0, 2: 1.0, 6: -1.5, 7: 3.0, 8: -1.5})
    assert {flat for *_, flat, _ in results} == {0.0}
    metrics = {"ledger/held_groups": 1, "ledger/held_responses": 2, "ledger/held_steps": (5 * 2 + 0) / 6}
    assert all(found == pytest.approx(metrics) for *_, found in results)


def test_where_no_group_has_ended_nothing_is_a_number_and_nothing_warns():
    one = SingleProcess()
    assert split_whole_groups([ended(0)], 2, one) == ([], [ended(0)])
    for estimator in ESTIMATORS:
        advantages, flat = advantage_of_rows([], 2, estimator=estimator, parallel=one)
        assert advantages == []
        assert math.isnan(flat)


# ------------------------------------------------------------------------------------------------------------- the Trainer


class Books:
    """An independent ledger, from the text: which responses train in which step, with what advantage, and what waits."""

    def __init__(self, size: int, estimator: str):
        self.size, self.estimator = size, estimator
        self.groups: dict[int, dict[int, Response]] = collections.defaultdict(dict)
        self.trained: dict[int, int] = {}  # response: step
        self.ended: dict[int, int] = {}
        self.generated = 0

    def step(self, number: int, slices) -> dict[int, float]:
        """The advantages of the responses that train in this step."""
        self.generated += sum(s.stop - s.begin for s in slices)
        for s in slices:
            if s.response.ended:
                self.groups[s.response.id // self.size][s.response.id] = s.response
                self.ended[s.response.id] = number
        wanted = {}
        for group in [group for group, members in self.groups.items() if len(members) == self.size]:
            members = self.groups.pop(group)
            for id, r in members.items():
                scores = [other.score for other in members.values()]
                centre = (sum(scores) - r.score) / (self.size - 1) if self.estimator == "rloo" else statistics.mean(scores)
                scale = 1.0 if self.estimator == "rloo" else statistics.stdev(scores) + 1e-6
                wanted[id] = 0.0 if len({*scores}) == 1 else (r.score - centre) / scale
                self.trained[id] = number
        return wanted


@pytest.mark.parametrize("num_prompts", [400, 3])
@pytest.mark.parametrize("method", METHODS)
def test_every_group_trains_once_whole_in_the_step_in_which_its_last_response_ended(method, num_prompts):
    """With three prompts each comes again in every epoch: a group is a run of sample numbers, and no prompt."""
    trainer = make_trainer(method, rollout__samples_per_prompt=3, rollout__slots=7, value__warmup_steps=2, policy__mini_batches=2)
    stream = trainer.batcher.stream
    trainer.batcher.stream = SampleStream(make_prompts(num_prompts), samples_per_prompt=3, seed=stream.seed)
    books, seen, lengths = Books(3, trainer.config.advantage.estimator), [], {}
    trainer.observer = lambda rows, forward, advantages, batch: seen.append((rows, forward, advantages, batch))
    for number in range(12):
        metrics = trainer.step()
        wanted = books.step(number, trainer.slices)
        rows, forward, advantages, batch = seen[-1]
        lengths |= {s.response.id: s.response for s in trainer.slices}
        assert sorted(r.id for r in rows.responses) == sorted(wanted)
        for r, mask_T, raw_T, scaled_T in zip(rows.responses, rows.train_BT, advantages.raw_BT, advantages.scaled_BT, strict=True):
            assert mask_T.tolist() == [t < len(r) for t in range(len(mask_T))]
            assert raw_T[: len(r)].tolist() == pytest.approx([wanted[r.id]] * len(r), rel=1e-5)
            assert scaled_T.tolist() == raw_T.tolist()  # the methods do not whiten
            assert r.num_settled == len(r)
            assert r.values == []
        assert forward.values_BT.isnan().all()
        assert len(batch.responses) == 0
        held = [r for group in books.groups.values() for r in group.values()]
        running = trainer.batcher.in_flight.values()
        trained = sum(len(lengths[id]) for id in books.trained)
        waited = [number - books.ended[id] for id in wanted]
        assert metrics["ledger/generated"] == books.generated == trained + metrics["ledger/pending"]
        assert metrics["ledger/trained"] == trained
        assert metrics["ledger/pending"] == sum(map(len, (*running, *held)))
        assert (metrics["ledger/held_groups"], metrics["ledger/held_responses"]) == (len(books.groups), len(held))
        assert metrics["ledger/held_steps"] == pytest.approx(statistics.mean(waited) if waited else math.nan, nan_ok=True)
        assert metrics["ledger/excluded_tail"] == metrics["ledger/excluded_warmup"] == 0
        assert {name for name, x in metrics.items() if name.startswith("value/") and x != 0} == {
            f"value/{name}" for name in ("loss", "clipped_share", "explained_variance", "grad_norm", "lr")
        }
        assert (metrics["flops/value"], math.isnan(metrics["advantage/lam_mean"])) == (0, True)
    assert len({r.prompt.id for r in lengths.values()}) <= num_prompts
    assert max(books.ended[id] for id in books.trained) > 6
    if method.endswith("window"):  # responses were held, and their tokens are of older policies than the step's
        assert max(books.trained[id] - books.ended[id] for id in books.trained) > 0


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_window_variant_with_a_window_as_long_as_a_response_is_the_synchronous_method(estimator):
    changes: dict[str, Any] = {"rollout__samples_per_prompt": 2, "rollout__slots": 6}
    whole = make_trainer(estimator, **changes)
    window = make_trainer(f"{estimator}-window", **changes, rollout__window=20, rollout__refill="step", policy__importance="none")
    for _ in range(4):
        one, two = (
            {
                k: x
                for k, x in trainer.step().items()
                if not k.startswith("time/") and k not in ("rollout/tokens_per_s", "rollout/idle_s")
            }
            for trainer in (whole, window)
        )
        assert json.dumps(one) == json.dumps(two)
        assert one["policy/tokens"] == one["rollout/tokens"]
    assert same(weights_of(whole.policy_learner.module), weights_of(window.policy_learner.module))


def test_a_step_that_doubles_as_the_textbooks_gradient():
    """One update on one step of RLOO: the gradient of -sum_i A_i sum_t log pi / tokens, from the plain model."""
    from helpers import RecordingParallel

    parallel, before = RecordingParallel(), []
    trainer = make_trainer("rloo", parallel=parallel, rollout__samples_per_prompt=2, rollout__slots=4, policy__lm_loss_weight=0.0,
                           policy__max_grad_norm=1e9, dtype=F64)  # fmt: skip
    plain = copy.deepcopy(trainer.policy_learner.module)
    trainer.observer = lambda rows, *rest: before.append(rows)
    trainer.step()
    from tppo_ref.rollout.packing import TokenBatch

    responses, wanted = before[0].responses, 0.0
    score = {r.id: r.score for r in responses}
    for r in responses:
        wanted = wanted - (r.score - score[r.id ^ 1]) * plain(TokenBatch.of([r])).sum()
    (wanted / sum(map(len, responses))).backward()
    assert len({*score.values()}) == 2
    (found,) = parallel.of(trainer.policy_learner.module)
    for gradient, parameter in zip(found, plain.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-8)


def test_a_value_model_is_asked_for_by_egae_alone():
    trainer = make_trainer("rloo")
    assert trainer.value_learner is None
    assert [learner.name for learner in trainer.learners] == ["policy"]
    parts = dict(policy=trainer.policy_learner.module, engine=trainer.engine, batcher=trainer.batcher, scorer=ToyScorer())
    with pytest.raises(ValueError, match=r"^value: got a model with advantage.estimator rloo"):
        Trainer(trainer.config, value=load_value_model(dict(TINY_SHAPE)), **parts)
    with pytest.raises(ValueError, match=r"^value: got none with advantage.estimator egae"):
        Trainer(make_trainer("tppo").config, value=None, **parts)


def test_reused_groups_are_trained_again_with_the_advantages_that_they_had():
    """GePPO's reuse (policy.reuse_batches) keeps whole groups, so that their advantages are known again."""
    trainer = make_trainer("rloo", rollout__samples_per_prompt=2, rollout__slots=4, policy__reuse_batches=1)
    first: dict[int, float] = {}

    def observe(rows, forward, advantages, batch):
        for r, raw_T, reused in zip(rows.responses, advantages.raw_BT.tolist(), rows.reused_B.tolist(), strict=True):
            assert first.setdefault(r.id, raw_T[0]) == raw_T[0]
            again.append(reused)

    again: list[bool] = []
    trainer.observer = observe
    for _ in range(3):
        trainer.step()
    assert again == [*[False] * 4, *([False] * 4 + [True] * 4) * 2]


# ---------------------------------------------------------------------------------------------- whole steps, by the oracle


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.fixed_dictionaries({
    "advantage.estimator": st.sampled_from(ESTIMATORS), "rollout.samples_per_prompt": st.integers(2, 5),
    "rollout.slots": st.integers(1, 9), "rollout.window": st.integers(1, 7), "rollout.max_response_tokens": st.integers(2, 12),
    "rollout.refill": st.sampled_from(["immediate", "step", "batch"]), "advantage.whiten": st.booleans(),
    "policy.importance": st.sampled_from(["none", "truncated", "masked", "generalised"]), "policy.epochs": st.integers(1, 2),
}))  # fmt: skip
def test_no_token_is_lost_and_every_step_is_the_oracles_with_groups_held_over_windows(drawn):
    """`Ledger.settle` asserts the conservation law in each step; the oracle has books of its own, which hold the same numbers."""
    fields = {"policy.train_on": "ended", "policy.mini_batch_tokens": 0, "policy.mini_batches": 2, "policy.lr": 0.02} | drawn
    config = make_config(fields)
    check(config)
    toy_stage(config).play(6)


@pytest.mark.parametrize("method", METHODS)
def test_a_named_methods_steps_are_the_oracles_on_a_transformer_and_groups_are_held(method):
    fields = {"rollout.slots": 6, "rollout.window": 4, "rollout.max_response_tokens": 10, "rollout.samples_per_prompt": 2,
              "policy.lr": 0.02, "policy.mini_batch_tokens": 0, "policy.mini_batches": 2}  # fmt: skip
    outcome = real_stage(make_config(fields, method)).play(5)
    assert (max(m["ledger/held_groups"] for m in outcome.metrics) > 0) == method.endswith("window")
    assert max(m["policy/updates"] for m in outcome.metrics) == 2


# --------------------------------------------------------------------------------------------------- checkpoints and resume


@pytest.fixture(scope="session", name="cache")
def _cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_a_checkpoint_between_two_ends_of_a_group_holds_no_value_model_and_obeys_the_laws(tmp_path, cache):
    """That a run goes on from it bit for bit is held with the other cases of test_resume.py."""
    checkpoint = train(config_of("groups", tmp_path / "run", cache, steps=6))
    assert not (checkpoint / "value").exists()
    assert set(torch.load(checkpoint / "optimisers.pt", weights_only=True)) == {"policy"}
    state = read_state(checkpoint)["trainer"]
    held = state["held_groups"]
    assert held
    assert metrics_of(tmp_path / "run")[-1]["ledger/held_responses"] == len(held)
    session = Session(build(config_of("groups", tmp_path / "run", cache, steps=9, resume=True)))
    size = session.config.rollout.samples_per_prompt
    group = held[0]["id"] // size
    flying = {r["id"] for r in state["batcher"]["in_flight"]}
    missing = next(id for id in range(group * size, (group + 1) * size) if id not in {r["id"] for r in held})

    edits = {
        "": lambda s: None,
        "there twice": lambda s: s["held_groups"].append(s["held_groups"][0]),
        "is held unscored": lambda s: s["held_groups"][0].update(score=None),
        "waits for its group and was trained": lambda s: s["held_groups"][0].update(num_settled=1),
        "has values of no value model": lambda s: s["held_groups"][0].update(values=[0.0] * len(held[0]["token_ids"])),
        "tokens were generated and": lambda s: s["held_groups"].pop(),
        "held for a value model that is not there": lambda s: s["held"].append(s["held_groups"].pop()),
        "the learners are ['policy', 'value'], not ['policy']": lambda s: s["learners"].update(value=s["learners"]["policy"]),
    }
    try:
        for law, edit in edits.items():
            edited = copy.deepcopy(state)
            edit(edited)
            found = broken_law([edited], session.trainer, step=6, whole=True)
            assert law in found, found
            assert bool(law) == bool(found), found
        # The two laws of groups, seen by themselves: sums, seats and streams are checked before them.
        from tppo_ref.runs.state_laws import Broken, _check_groups

        _check_groups([state], size)
        lost = copy.deepcopy(state)
        lost["batcher"]["in_flight"] = [r for r in lost["batcher"]["in_flight"] if r["id"] != missing]
        lost["batcher"]["stream"]["next"] = max(lost["batcher"]["stream"]["next"], missing + 1)
        with pytest.raises(Broken, match=rf"group {group} waits for response \[{missing}\], which nobody has"):
            _check_groups([lost], size)
        assert missing in flying or missing >= state["batcher"]["stream"]["next"]
        whole = copy.deepcopy(state)
        whole["held_groups"] = [{"id": id} for id in range(size)]
        with pytest.raises(Broken, match="group 0 has ended and is held"):
            _check_groups([whole], size)
    finally:
        session.close()


def test_a_run_is_not_continued_under_another_estimator(tmp_path, cache):
    train(config_of("groups", tmp_path / "run", cache, steps=1))
    other = replace_fields(config_of("groups", tmp_path / "run", cache, steps=2, resume=True), {"advantage.estimator": "grpo"})
    with pytest.raises(UserError, match=r"^advantage.estimator: got grpo; expected rloo, as in checkpoint step-00000001"):
        build(other)


def test_held_groups_are_dealt_anew_to_another_number_of_ranks_none_lost_and_none_twice():
    trainer = make_trainer("rloo-window", rollout__samples_per_prompt=3, rollout__slots=7)
    while len(trainer.held_groups) < 3:
        trainer.step()
    state = trainer.state_dict()

    class Rank(SingleProcess):
        def __init__(self, rank):
            self.rank, self.world = rank, 2

    dealt = []
    for rank in range(2):
        other = make_trainer("rloo-window", rollout__samples_per_prompt=3, rollout__slots=7, parallel=Rank(rank))
        other.batcher.stream.rank, other.batcher.stream.world = rank, 2
        other.load_state_dict([copy.deepcopy(state)], own=None)
        dealt.append([r.state_dict() for r in other.held_groups])
    assert all(dealt)
    key = lambda r: r["id"]  # noqa: E731
    assert sorted(itertools.chain(*dealt), key=key) == sorted(state["held_groups"], key=key)


# ------------------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize(("words", "said"), [
    (["--advantage.estimator", "rloo"], "rollout.samples_per_prompt: got 1; expected at least 2 with advantage.estimator rloo"),
    (["--advantage.estimator", "grpo", "--rollout.samples_per_prompt", "4"],
     "policy.train_on: got window; expected ended with advantage.estimator grpo: a response that is cut has no score yet; give it, or "
     "--run.method grpo-window"),
    (["--run.method", "rloo", "--model.value", "some/folder"],
     "model.value: got some/folder; expected it left out: with advantage.estimator rloo there is no value model; drop it"),
    (["--run.method", "rloo", "--value.lr", "1e-4"], "value.lr: got 0.0001; expected it left out: with advantage.estimator rloo"),
    (["--run.method", "grpo-window", "--value.warmup_steps", "3"], "value.warmup_steps: got 3; expected it left out"),
    (["--run.method", "grpo", "--advantage.lam", "0.9"], "advantage.lam: got 0.9; expected it left out: with advantage.estimator grpo "
     "all tokens of a response have its advantage"),
    (["--run.method", "rloo", "--advantage.cut_value", "zero"], "advantage.cut_value: got zero; expected it left out"),
    (["--run.method", "rloo", "--advantage.estimator", "grpo", "--rollout.samples_per_prompt", "2", "--policy.train_on", "ended"],
     "advantage.estimator: got grpo; expected rloo, at which method rloo fixes it"),
])  # fmt: skip
def test_what_makes_no_sense_without_a_value_model_is_one_line(words, said, capfd):
    assert main(["train", *words]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


@pytest.mark.parametrize("words", [["--run.method", "rloo"],
                                   ["--advantage.estimator", "rloo", "--rollout.samples_per_prompt", "2", "--policy.train_on", "ended"]])  # fmt: skip
def test_there_is_no_value_model_to_pre_train(words, capfd):
    assert main(["pretrain-value", *words]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line == ("error: advantage.estimator: got rloo; expected egae: the other estimators train without a value model; "
                    "leave pretrain-value out")  # fmt: skip


def test_a_method_takes_groups_of_the_users_size_or_of_four():
    assert apply_method(Config(), "rloo").rollout.samples_per_prompt == 4
    eight = replace_fields(Config(), {"rollout.samples_per_prompt": 8})
    assert apply_method(eight, "grpo-window", given={"rollout.samples_per_prompt"}).rollout.samples_per_prompt == 8


def test_ppo_and_rloo_are_compared_with_one_pre_trained_critic_which_rloo_does_not_see(tmp_path, cache):
    fields = TINY | {
        "value.warmup_steps": 0, "rollout.samples_per_prompt": 2, "compare.methods": ["ppo", "rloo"], "compare.seeds": 1, "compare.jobs": 1,
        "value.pretrain_responses": 8, "value.pretrain_epochs": 1, "run.steps": 2, "run.out": str(tmp_path / "c"), "run.cache": str(cache),
    }  # fmt: skip
    out = compare(replace_fields(Config(), fields))
    configs = {m: json.loads((out / "runs" / f"{m}-seed0" / "wanted.json").read_text()) for m in ("ppo", "rloo")}
    assert configs["ppo"]["model"]["value"]
    assert configs["rloo"]["model"]["value"] is None
    for method, models in (("ppo", {"policy", "value"}), ("rloo", {"policy"})):
        run = out / "runs" / f"{method}-seed0"
        checkpoint = complete_checkpoints(run / "checkpoints")[-1]
        assert {folder.name for folder in checkpoint.iterdir() if folder.is_dir()} == models
        assert (checkpoint / MANIFEST).exists()
        found = metrics_of(run)
        assert [record["value/lr"] is None or math.isnan(record["value/lr"]) for record in found] == [method == "rloo"] * 2
    with (out / "summary.csv").open(newline="") as file:
        assert {row["method"] for row in csv.DictReader(file)} == {"ppo", "rloo"}


def test_a_comparison_of_critic_free_methods_pre_trains_no_value_model(tmp_path, cache, monkeypatch):
    monkeypatch.setattr("tppo_ref.runs.compare.cached_value", lambda *arguments: 1 / 0)
    fields = TINY | {
        "value.warmup_steps": 0,
        "rollout.samples_per_prompt": 2,
        "compare.methods": ["rloo", "grpo"],
        "run.cache": str(cache),
    }
    config, _ = prepare(replace_fields(Config(), fields), tmp_path)
    assert config.model.value is None


def test_a_policy_learns_from_groups_that_wait_over_windows(tmp_path):
    """End to end on the real parts: T-PPO's windows over conversations, and no value model."""
    steps, before, after = learnt("rloo-window", tmp_path, steps=15, **{"rollout.samples_per_prompt": 4})
    assert max(m["ledger/held_groups"] for m in steps) > 0
    assert max(m["policy/staleness_max"] for m in steps if not math.isnan(m["policy/staleness_max"])) > 0
    assert after > before + 0.25, (before, after)
