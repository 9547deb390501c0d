"""agents.py, setting.py, recorder.py, learning.py of sim/lab: the engine samples the MDP, the Trainer follows its gradient, the records are exact."""

from __future__ import annotations

import collections
import csv
import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sim.lab import instances
from sim.lab.agents import PROMPT, MDPEngine, MDPScorer, NetworkPolicy, NetworkValue, TabularPolicy, TabularValue
from sim.lab.learning import learn, table, write_csv
from sim.lab.recorder import Record, Recorder
from sim.lab.setting import Setting, build
from sim.lab.token_mdp import ENDED, Edges, TokenMDP
from sim.lab.truth import optimum, true_value
from tppo_ref.method.records import Response
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.batcher import SampleStream, SuccessiveBatcher
from tppo_ref.rollout.engine import Request
from tppo_ref.rollout.packing import TokenBatch
from tppo_ref.runs.config import METHODS

PLAIN = {"advantage.whiten": False, "policy.mini_batch_tokens": 0, "policy.mini_batches": 1, "policy.micro_batch_tokens": 10**9}


def two_starts() -> instances.Instance:
    """Two prompts, outcomes that are drawn, an end and a cap with a reward: everything an engine can meet."""
    edges = Edges(
        state=[0, 0, 0, 1, 1, 2, 2, 2],
        token=[0, 0, 1, 0, 1, 0, 0, 1],
        prob=[0.3, 0.7, 1, 1, 1, 0.4, 0.6, 1],
        reward=[0, 0, 1, 0, -1, 0, 0.5, 1],
        next=[0, 2, ENDED, 2, ENDED, 1, ENDED, ENDED],
    )
    mdp = TokenMDP(num_states=3, num_tokens=2, edges=edges, max_tokens=4, start_S=[0.6, 0.4, 0], cap_reward_S=[0.2, 0.3, 0.4])
    return instances.Instance(mdp, mdp.softmax(mdp.by_node([[0.5, -0.2], [1.0, 0.0], [0.3, 0.1]])), "")


MADE = {
    "two starts": two_starts,
    "random": lambda: instances.random(seed=3, num_states=3, num_tokens=2, max_tokens=4, outcomes=2, every_token=False),
    "thinking": lambda: instances.thinking(length=6),
    "cliff": lambda: instances.cliff(length=6),
}


def responses_of(made: instances.Instance, num: int, *, window: int, slots: int, refill="immediate", seed=0) -> dict[int, Response]:
    """The first `num` responses of a run with fixed weights, whole, by id."""
    engine = MDPEngine(TabularPolicy(made.mdp, made.policy_NA))
    schedule = SlotSchedule(slots=slots, window=window, max_response_tokens=made.mdp.max_tokens, refill=refill)
    batcher = SuccessiveBatcher(schedule, SampleStream([PROMPT], samples_per_prompt=2**62, seed=seed, limit=num), run_seed=seed)
    ended: dict[int, Response] = {}
    while len(ended) < num:
        batcher.window(engine, version=0, on_end=lambda response: ended.setdefault(response.id, response))
        engine.load_weights(engine.policy.named_tensors(), 1)
    return ended


# ------------------------------------------------------------------------------------------------------------------ the engine


@pytest.mark.parametrize("name", MADE)
def test_the_engine_samples_each_response_as_often_as_the_mdp_says(name):
    made, num = MADE[name](), 4000
    trajectories = made.mdp.trajectories(made.policy_NA)
    paths = [tuple(row[row >= 0].tolist()) for row in trajectories.edge_BT]
    expected = {path: num * p for path, p in zip(paths, trajectories.prob_B, strict=True)}
    found = collections.Counter(tuple(r.token_ids) for r in responses_of(made, num, window=3, slots=64).values())
    assert set(found) <= set(expected)
    often = [path for path in expected if expected[path] >= 5]
    rest = [sum(x[path] for path in expected if expected[path] < 5) for x in (found, expected)]
    observed, wanted = ([*(x[path] for path in often), r] for x, r in zip((found, expected), rest, strict=True))
    if not rest[1]:
        observed, wanted = observed[:-1], wanted[:-1]
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


@pytest.mark.parametrize("name", MADE)
def test_scores_ends_and_log_probabilities_are_those_of_the_mdp(name):
    made, num = MADE[name](), 1500
    mdp = made.mdp
    responses = responses_of(made, num, window=mdp.max_tokens, slots=50)
    scorer = MDPScorer(mdp)
    for response in responses.values():
        scorer.submit(response)
        edges = np.array(response.token_ids)
        assert response.end == mdp.end_E[edges[-1]]
        assert (mdp.node_E[edges[1:]] == mdp.next_E[edges[:-1]]).all()
        np.testing.assert_allclose(response.logprobs, np.log(made.policy_NA[mdp.node_E[edges], mdp.token_E[edges]]), atol=1e-6)
    scores = scorer.collect()
    assert scorer.collect() == {}
    assert {status for _, status in scores.values()} == {"ok"}
    returns, prob = mdp.return_distribution(made.policy_NA)
    mean = returns @ prob
    error = math.sqrt((returns - mean) ** 2 @ prob / num)
    assert abs(np.mean([score for score, _ in scores.values()]) - mean) < 4 * error
    assert mean == pytest.approx(mdp.solve(made.policy_NA).mean_return, abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(
    name=st.sampled_from(sorted(MADE)),
    window=st.integers(1, 7),
    slots=st.integers(1, 9),
    refill=st.sampled_from(["immediate", "step"]),
    seed=st.integers(0, 99),
)
def test_with_fixed_weights_a_cut_changes_no_response(name, window, slots, refill, seed):
    made, num = MADE[name](), 12
    cut = responses_of(made, num, window=window, slots=slots, refill=refill, seed=seed)
    whole = responses_of(made, num, window=made.mdp.max_tokens, slots=num, refill="step", seed=seed)
    for i in range(num):
        assert (cut[i].token_ids, cut[i].end) == (whole[i].token_ids, whole[i].end)
        assert cut[i].logprobs == whole[i].logprobs
    other = responses_of(made, num, window=window, slots=slots, refill=refill, seed=seed + 1)
    assert any(other[i].token_ids != cut[i].token_ids for i in range(num))


def request(token_ids, *, new=1, response=0):
    return Request(response_id=response, token_ids=[0, *token_ids], max_new_tokens=new, seed=7, num_response_tokens=len(token_ids))


def test_the_engine_refuses_what_it_cannot_serve():
    made = instances.thinking(length=4)
    mdp, engine = made.mdp, MDPEngine(TabularPolicy(made.mdp, made.policy_NA))
    end, on = (int(np.flatnonzero((mdp.node_E == 0) & (mdp.token_E == token))[0]) for token in (1, 0))
    with pytest.raises(ValueError, match="response 3: got one that has ended after 1 tokens"):
        engine.submit([request([end], response=3)])
    with pytest.raises(ValueError, match=r"response 0: got max_new_tokens 4 after 1 tokens; expected 1 \.\. 3"):
        engine.submit([request([on], new=4)])
    with pytest.raises(ValueError, match="got a tensor named 'nonsense'"):
        engine.load_weights({"nonsense": torch.zeros(1)}, 1)
    engine.submit([request([], new=4)])
    assert engine.num_running == 1
    with pytest.raises(RuntimeError, match="1 requests run"):
        engine.load_weights(None, 1)
    torch.nn.init.constant_(engine.policy.logits.row[2], math.nan)
    with pytest.raises(FloatingPointError, match="not finite at node 2"):
        MDPEngine(engine.policy)


def test_weights_from_elsewhere_are_copied_and_change_the_samples():
    made = instances.thinking(length=4)
    engine = MDPEngine(TabularPolicy(made.mdp, made.policy_NA))
    sure = torch.zeros(made.mdp.num_nodes, 2)
    sure[:, 1] = 50.0
    engine.load_weights({"logits.row": sure}, 1)
    engine.submit([request([], new=4, response=i) for i in range(20)])
    assert [d.end_token and len(d.token_ids) == 1 for d in engine.step()] == [True] * 20


# ---------------------------------------------------------------------------------------------------- policies, critics, scorer


@pytest.mark.parametrize("name", MADE)
def test_policies_and_critics_begin_as_asked_and_read_rows_node_by_node(name):
    made = MADE[name]()
    mdp, value_N = made.mdp, np.random.default_rng(0).normal(size=made.mdp.num_nodes)
    rows = [r.token_ids for r in responses_of(made, 20, window=9, slots=20).values()]
    rows.append(next(row[:1] for row in rows if len(row) > 1))  # RUNNING: its last value is that of a live node
    for policy in (TabularPolicy(mdp, made.policy_NA), NetworkPolicy(mdp, made.policy_NA, seed=5)):
        np.testing.assert_allclose(policy.table(), made.policy_NA, atol=1e-6)
        logprob_BT = policy(TokenBatch([(0,)] * len(rows), rows)).detach()
        assert logprob_BT.dtype == torch.float32
        for b, row in enumerate(rows):
            for t, edge in enumerate(row):
                expected = math.log(made.policy_NA[mdp.node_E[edge], mdp.token_E[edge]])
                assert logprob_BT[b, t].item() == pytest.approx(expected, abs=1e-5)
    for value in (TabularValue(mdp, value_N), NetworkValue(mdp, value_N, seed=5)):
        np.testing.assert_allclose(value.table(), value_N, atol=1e-6)
        value_BT, last_value_B = (x.detach() for x in value(TokenBatch([(0,)] * len(rows), rows)))
        assert value_BT.dtype == last_value_B.dtype == torch.float32
        for b, row in enumerate(rows):
            np.testing.assert_allclose(value_BT[b, : len(row)], value_N[mdp.node_E[row]], atol=1e-6)
            after = mdp.next_E[row[-1]]
            assert float(last_value_B[b]) == pytest.approx(0 if after == ENDED else value_N[after], abs=1e-6)


def test_an_illegal_token_never_gets_a_probability_or_a_gradient():
    made = instances.decision(length=6, at=2)
    policy = TabularPolicy(made.mdp, made.policy_NA)
    rows = [r.token_ids for r in responses_of(made, 10, window=9, slots=10).values()]
    policy(TokenBatch([(0,)] * 10, rows)).sum().backward()
    assert not policy.logits.row.grad[~torch.from_numpy(made.mdp.legal_NA)].any()
    assert torch.isfinite(policy.logits.row.grad).all()
    assert (policy.table()[~made.mdp.legal_NA] == 0).all()


def test_a_table_by_state_shares_its_row_and_refuses_what_it_cannot_hold():
    made = instances.random(seed=1, every_token=False)
    mdp = made.mdp
    policy = TabularPolicy(mdp, made.policy_NA, by="state")
    assert policy.logits.row.shape == (mdp.num_states, mdp.num_tokens)
    np.testing.assert_allclose(policy.table(), made.policy_NA, atol=1e-6)
    with pytest.raises(ValueError, match='use by="node"'):
        TabularValue(mdp, mdp.solve(made.policy_NA).value_N, by="state")  # the tokens left matter
    with pytest.raises(ValueError, match="by: got 'edge'; expected node or state"):
        TabularValue(mdp, np.zeros(mdp.num_nodes), by="edge")
    with pytest.raises(ValueError, match="expected 21 finite numbers"):
        TabularValue(instances.decision(length=16, at=10).mdp, np.zeros(4))


@pytest.mark.parametrize("made", [TabularValue, NetworkValue])
def test_a_critic_can_be_set_anew_after_training(made):
    mdp = instances.thinking(length=5).mdp
    value = made(mdp, np.zeros(5))
    with torch.no_grad():
        for parameter in value.parameters():
            parameter += 0.3
    assert abs(value.table()).min() > 0.01
    value.begin_at(np.arange(5.0))
    np.testing.assert_allclose(value.table(), np.arange(5.0), atol=1e-6)


def test_a_softmax_cannot_begin_with_a_legal_token_of_probability_0():
    made = instances.cliff()
    sure_NA = np.where(made.mdp.legal_NA.all(1, keepdims=True), [1.0, 0.0], made.policy_NA)
    with pytest.raises(ValueError, match="got probability 0 for a legal token of node 8"):
        TabularPolicy(made.mdp, sure_NA)


def test_rewards_on_the_way_need_gamma_1():
    with pytest.raises(ValueError, match=r"gamma: got 0\.9 with rewards on the way"):
        MDPScorer(instances.noisy_reward(gamma=0.9).mdp)
    MDPScorer(instances.noisy_reward().mdp)
    MDPScorer(instances.thinking(gamma=0.9).mdp)


# ------------------------------------------------------------------------------------------------------------ the true gradient


def gradient_z(made: instances.Instance, setting: Setting) -> tuple[np.ndarray, np.ndarray]:
    """One Trainer step on many responses: (sum over tokens of its policy gradient per response - exact) / standard error, [N, A],
    and the exact one, of the depths below the window."""
    mdp, trainer, grads = made.mdp, build(made, setting), []
    seen = Recorder(mdp, trainer)
    trainer.policy_learner.module.logits.row.register_hook(lambda grad: grads.append(grad.double().numpy().copy()))
    trainer.step()
    (grad_NA,) = grads
    rows = seen.rows
    tokens, num = float(rows.train_BT.sum()), len(rows.responses)
    estimate_NA = -grad_NA * tokens / num  # the loss is minus a token mean
    seen_N = mdp.depth_N < trainer.config.rollout.window
    exact_NA = mdp.policy_gradient(made.policy_NA) * seen_N[:, None]
    squares_NA = np.zeros(exact_NA.shape)  # a response passes a node once: its share there is A (1[a] - pi)
    for response, raw_T in zip(rows.responses, seen.advantages.raw_BT.double().numpy(), strict=True):
        edges = np.array(response.token_ids)
        node = mdp.node_E[edges]
        share = raw_T[: len(edges), None] * (np.eye(mdp.num_tokens)[mdp.token_E[edges]] - made.policy_NA[node])
        squares_NA[node] += share**2
    error_NA = np.sqrt(np.maximum(squares_NA / num - exact_NA**2, 0) / num)
    return (estimate_NA - exact_NA) / np.maximum(error_NA, 1e-5), exact_NA  # float32 sums of thousands of tokens: 1e-6


WHOLE = Setting(method="ppo", slots=3000, critic="oracle", overrides=PLAIN)
FIRST = dataclasses.replace(WHOLE, window=3, method="tppo", overrides=PLAIN | {"rollout.refill": "step"})


@pytest.mark.parametrize("name", MADE)
def test_with_the_exact_critic_and_whole_responses_the_update_follows_the_exact_policy_gradient(name):
    made = MADE[name]()
    lam = 1.0 if name == "two starts" else 0.95  # rewarded on the way: the node's value is exact for lambda = 1 (true_value)
    z, exact_NA = gradient_z(made, dataclasses.replace(WHOLE, overrides=PLAIN | {"advantage.lam": lam}))
    assert np.abs(exact_NA).max() > 0.01
    assert np.abs(z).max() < 4.5


@pytest.mark.parametrize("name", ["random", "thinking"])
def test_a_first_window_cut_at_the_exact_value_follows_the_gradient_of_its_depths_and_the_zero_cut_does_not(name):
    made = {"random": MADE["random"], "thinking": lambda: instances.thinking(length=6, start=0.8)}[name]()
    critic, zero = ({**FIRST.overrides, "advantage.cut_value": rule} for rule in ("critic", "zero"))
    z, exact_NA = gradient_z(made, dataclasses.replace(FIRST, overrides=critic))
    assert np.abs(exact_NA).max() > 0.01
    assert np.abs(z).max() < 4.5
    assert np.abs(gradient_z(made, dataclasses.replace(FIRST, overrides=zero))[0]).max() > 8


# ------------------------------------------------------------------------------------------------------------------ it learns


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("made", "options"),
    [
        (instances.early_decision(), {}),
        (instances.thinking(length=12), {"window": 4, "overrides": {"policy.lr": 0.1}}),
        (instances.thinking(length=12), {"window": 4, "model": "network"}),
    ],
    ids=["early-decision", "thinking", "thinking-network"],
)
def test_tppo_closes_more_than_half_of_the_gap_to_the_exact_optimum(made, options, seed):
    history = learn(made, steps=50, seed=seed, slots=24, **options)
    best = optimum(made.mdp).mean_return
    gap = [best - record.mean_return for record in history]
    assert min(gap) > 0
    assert gap[-1] < gap[0] / 2
    assert history[-1].critic_rms < history[0].critic_rms / 2
    assert history[0].mean_return == pytest.approx(made.mdp.solve(made.policy_NA).mean_return, abs=1e-6)


def test_the_optimum_satisfies_bellmans_equation_and_nothing_beats_it():
    for seed in range(5):
        made = instances.random(seed=seed, outcomes=2)
        mdp, best = made.mdp, optimum(made.mdp)
        np.testing.assert_allclose(best.value_N, np.where(mdp.legal_NA, best.q_NA, -np.inf).max(1), atol=1e-12)
        rng = np.random.default_rng(seed)
        others = [mdp.solve(mdp.softmax(rng.normal(scale=3, size=mdp.legal_NA.shape))).mean_return for _ in range(20)]
        assert max(others) < best.mean_return


def test_two_runs_of_one_seed_are_the_same_and_another_seed_differs():
    made = instances.thinking(length=8)
    one, again, other = (learn(made, steps=4, seed=seed) for seed in (0, 0, 1))
    assert repr(one) == repr(again)
    assert repr(one) != repr(other)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_steps_and_its_value_batch_is_what_the_trainer_counts(method):
    made, sizes = instances.noisy_reward(), []
    for joint in (False, True):
        overrides = {"value.update": "joint", "advantage.tail": "exclude", "advantage.tail_tokens": 1} if joint else {}
        history = learn(
            made, method=method, steps=5, slots=12, window=4, overrides=overrides,
            watch=lambda recorder, record: sizes.append((sum(len(s.edge_T) for s in recorder.stretches()), record.value_tokens)),
        )  # fmt: skip
        assert [record.step for record in history] == list(range(6))
        assert history[-1].tokens > history[1].tokens > 0
    assert all(counted == trained for counted, trained in sizes)
    assert (max(counted for counted, _ in sizes) == 0) == ("advantage.estimator" in METHODS[method])  # which has no value model


# ----------------------------------------------------------------------------------------------------- survivorship: theory F6

FROZEN = {"policy.lr": 0.0, "value.lr": 0.0}


def test_the_first_value_batches_hold_short_responses_only_and_those_of_whole_windows_do_not():
    made = instances.thinking(length=24)
    mean = made.mdp.solve(made.policy_NA).visits_N.sum()
    cut = learn(made, steps=6, window=2, overrides=FROZEN)
    assert [record.exact_length for record in cut[1:]] == pytest.approx([mean] * 6, abs=1e-5)
    assert all(record.value_length <= 2 * record.step for record in cut[1:])  # nothing else can have ended
    assert all(record.value_length < mean for record in cut[1:4])
    assert all(record.value_tv > floor for record, floor in zip(cut[1:4], (0.5, 0.3, 0.2), strict=True))

    whole = learn(made, method="ppo-dual", steps=6, slots=200, overrides=FROZEN)
    length_T = made.mdp.solve(made.policy_NA).length_T
    spread = math.sqrt(np.arange(len(length_T)) ** 2 @ length_T - mean**2)
    z = [(record.value_length - mean) / (spread / math.sqrt(200)) for record in whole[1:]]
    assert max(map(abs, z)) < 4
    assert math.fsum(x * x for x in z) < 20  # 6 squares of about 1


def test_a_window_as_long_as_the_cap_still_favours_short_responses_where_freed_slots_refill_at_once():
    made = instances.thinking(length=12)
    (_, first) = learn(made, steps=1, window=12, slots=800, overrides=FROZEN)
    length_T = made.mdp.solve(made.policy_NA).length_T
    spread = math.sqrt(np.arange(13) ** 2 @ length_T - first.exact_length**2)
    assert first.value_length < first.exact_length - 5 * spread / math.sqrt(first.value_responses)


def test_in_the_long_run_the_critics_batches_visit_nodes_as_often_as_the_policy_does():
    made, slots = instances.thinking(length=24), 16
    history = learn(made, steps=64, window=3, slots=slots, overrides=FROZEN)
    solution = made.mdp.solve(made.policy_NA)
    visits_N, length = solution.visits_N, solution.visits_N.sum()
    # Counts of nodes over R responses are sums of independent indicators; at most `slots` responses are missing, of <= cap tokens.
    num = sum(record.value_responses for record in history)
    noise = np.sqrt(visits_N * (1 - visits_N) / num).sum() / length
    bound = 2 * noise + slots * made.mdp.max_tokens / (num * length)
    tv = [history[i].value_tv_so_far for i in (1, 4, 16, 64)]
    assert sorted(tv, reverse=True) == tv
    assert tv[-1] < bound < 0.3 < tv[0]


# ----------------------------------------------------------------------------------------------------------- exact bookkeeping


def enumerated(mdp: TokenMDP, policy_NA: np.ndarray) -> dict:
    """What a Record calls exact, from the list of all responses."""
    paths = mdp.trajectories(policy_NA)
    found = collections.defaultdict(float)
    passed, paid = np.zeros(mdp.num_nodes), np.zeros(mdp.num_nodes)
    for p, nodes, rewards, mask in zip(paths.prob_B, paths.node_BT, paths.reward_BT, paths.mask_BT, strict=True):
        found["return"] += p * rewards[mask].sum()
        found["length"] += p * mask.sum()
        for node in nodes[mask]:
            passed[node] += p
            paid[node] += p * rewards[mask].sum()
            found["nats"] -= p * sum(q * math.log(q) for q in policy_NA[node] if q > 0)
    return dict(found) | {"visits": passed, "true": paid / np.where(passed > 0, passed, 1)}


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), every_token=st.booleans(), outcomes=st.integers(1, 2))
def test_the_true_value_is_the_mean_return_of_the_responses_that_pass_the_node(seed, every_token, outcomes):
    made = instances.random(seed=seed, num_states=3, num_tokens=2, max_tokens=4, outcomes=outcomes, every_token=every_token)
    found = enumerated(made.mdp, made.policy_NA)
    passed = found["visits"] > 0
    np.testing.assert_allclose(true_value(made.mdp, made.policy_NA)[passed], found["true"][passed], atol=1e-12)
    if not every_token:
        np.testing.assert_allclose(true_value(made.mdp, made.policy_NA), made.mdp.solve(made.policy_NA).value_N, atol=0)


def explained_by_hand(weight, true, error):
    def variance(x):
        return np.average((x - np.average(x, weights=weight)) ** 2, weights=weight)

    return 1 - variance(error) / variance(true)


@pytest.mark.parametrize("every_token", [False, True])
@pytest.mark.parametrize("held", [0, 9])
def test_every_record_agrees_with_a_recomputation_from_lists(every_token, held):
    made = instances.random(seed=4, num_states=3, num_tokens=2, max_tokens=5, outcomes=2, p_end=0.15, every_token=every_token)
    mdp, thirds = made.mdp, np.array([0, 0, 1, 1, 2])  # of 5 tokens: depths 0-1, 2-3, 4
    queue: list[Response] = []
    counted, expected, sampled_by, checked = np.zeros(mdp.num_nodes), np.zeros(mdp.num_nodes), [made.policy_NA], []

    def check(recorder: Recorder, record: Record) -> None:
        trainer = recorder.trainer
        exact = enumerated(mdp, trainer.policy_learner.module.table())
        weight, error = exact["visits"], trainer.value_learner.module.values.row.detach().double().numpy() - exact["true"]
        by_third = [math.sqrt(np.average(error[m] ** 2, weights=weight[m])) for m in (thirds[mdp.depth_N] == i for i in range(3))]
        assert record.mean_return == pytest.approx(exact["return"], abs=1e-9)
        assert record.mean_length == pytest.approx(exact["length"], abs=1e-9)
        assert record.entropy == pytest.approx(exact["nats"] / exact["length"], abs=1e-9)
        assert record.critic_rms == pytest.approx(math.sqrt(np.average(error**2, weights=weight)), abs=1e-9)
        assert record.critic_bias == pytest.approx(np.average(error, weights=weight), abs=1e-9)
        assert record.critic_max == pytest.approx(max(abs(e) for e, w in zip(error, weight, strict=True) if w >= 0.01), abs=1e-9)
        assert [record.critic_rms_early, record.critic_rms_middle, record.critic_rms_late] == pytest.approx(by_third, abs=1e-9)
        assert record.explained_variance == pytest.approx(explained_by_hand(weight, exact["true"], error), abs=1e-6)
        batch(trainer, record)
        sampled_by.append(trainer.policy_learner.module.table())

    def batch(trainer, record: Record) -> None:
        nonlocal counted, expected
        queue.extend(s.response for s in trainer.slices if s.response.ended)
        take = len(queue) if not held else len(queue) // held * held
        taken = [queue.pop(0) for _ in range(take)]
        policy = enumerated(mdp, sampled_by[-1])
        assert record.exact_length == pytest.approx(policy["length"], abs=1e-6)
        assert record.value_responses == take
        if not take:
            assert math.isnan(record.value_length)
            assert math.isnan(record.target_age)
            return
        tokens = [edge for r in taken for edge in r.token_ids]
        now = np.array([sum(mdp.node_E[e] == n for e in tokens) for n in range(mdp.num_nodes)], dtype=float)
        share = policy["visits"] / policy["visits"].sum()
        counted, expected = counted + now, expected + len(tokens) * share
        assert record.value_length == pytest.approx(len(tokens) / take)
        assert record.value_tv == pytest.approx(np.maximum(now / len(tokens) - share, 0).sum(), abs=1e-6)
        assert record.value_tv_so_far == pytest.approx(np.maximum(counted - expected, 0).sum() / counted.sum(), abs=1e-6)
        ages = [[np.mean([u - v for u in r.versions[t:]]) for t, v in enumerate(r.versions)] for r in taken]
        later = [[np.mean([u > v for u in r.versions[t:]]) for t, v in enumerate(r.versions)] for r in taken]
        lags = [np.mean([record.step - 1 - u for u in r.versions[t:]]) for r in taken for t in range(len(r))]
        assert record.target_age == pytest.approx(np.mean([x for row in ages for x in row]))
        assert record.target_age_first == pytest.approx(np.mean([row[0] for row in ages]))
        assert record.target_later_share == pytest.approx(np.mean([x for row in later for x in row]))
        assert record.target_later_share_first == pytest.approx(np.mean([row[0] for row in later]))
        assert record.target_lag == pytest.approx(np.mean(lags))
        checked.append(record.target_age)

    history = learn(made, steps=8, slots=5, window=2, watch=check, overrides={"value.batch_responses": held})
    assert max(checked) > 0.1  # some targets do span versions
    assert sum(record.decode_steps == 2 * record.step for record in history) == 9
    assert history[0].critic_rms > 0
    assert math.isnan(history[0].value_tv)


# ------------------------------------------------------------------------------------------------------------------ the critics


def test_a_cut_response_under_an_untrained_critic_gives_no_signal_and_moves_nothing():
    made = instances.decision(length=12, at=6)  # nothing ends within the first window
    (before, after) = learn(made, steps=1, window=5)
    assert (after.no_signal_share, after.advantage_std, after.cut_share) == (1.0, 0.0, 1.0)
    assert after.trained_tokens == 5 * 32
    assert (after.mean_return, after.entropy) == (before.mean_return, before.entropy)
    (_, warm) = learn(made, steps=1, window=8, critic="warm")
    assert warm.no_signal_share < 1

    rows = []
    learn(
        instances.early_decision(), steps=1, window=4, watch=lambda recorder, _: rows.append((recorder.rows, recorder.advantages))
    )
    step, advantages = rows[0]
    assert not advantages.raw_BT[step.cut_B].any()
    assert advantages.raw_BT[~step.cut_B].any()


def test_critics_begin_as_their_name_says():
    made = instances.thinking(length=10)
    errors = {critic: learn(made, steps=1, critic=critic, overrides=FROZEN) for critic in ("zero", "warm", "noisy", "oracle")}
    value_N = made.mdp.solve(made.policy_NA).value_N
    visits_N = made.mdp.solve(made.policy_NA).visits_N
    assert errors["zero"][0].critic_rms == pytest.approx(math.sqrt(np.average(value_N**2, weights=visits_N)), abs=1e-6)
    assert errors["warm"][0].critic_rms < 1e-6
    assert errors["noisy"][0].critic_rms == pytest.approx(0.5, abs=0.25)
    quiet = learn(made, steps=1, critic="noisy", noise=0.01, overrides=FROZEN)
    assert quiet[0].critic_rms == pytest.approx(errors["noisy"][0].critic_rms / 50, rel=1e-3)
    given = learn(made, steps=1, critic=value_N + 0.25, overrides=FROZEN)
    assert [given[0].critic_bias, given[0].critic_max] == pytest.approx([0.25, 0.25], abs=1e-6)


@pytest.mark.parametrize("model", ["tabular", "network"])
def test_the_oracle_is_the_true_value_of_the_current_policy_at_every_step(model):
    made = instances.thinking(length=10)
    histories = {critic: learn(made, steps=6, critic=critic, model=model, overrides={"value.lr": 1e-9})
                 for critic in ("oracle", "warm")}  # fmt: skip
    for record in histories["oracle"]:
        assert record.critic_rms < 1e-6
    assert histories["oracle"][-1].mean_return != histories["oracle"][0].mean_return
    assert histories["warm"][-1].critic_rms > 1e-3  # the policy left it behind


def test_warm_up_steps_leave_the_policy_alone():
    history = learn(instances.thinking(length=10), steps=4, overrides={"value.warmup_steps": 2})
    returns = [record.mean_return for record in history]
    assert returns[0] == returns[1] == returns[2] != returns[3]
    assert [record.trained_tokens > 0 for record in history] == [False, False, False, True, True]
    assert history[2].critic_rms < history[0].critic_rms


# -------------------------------------------------------------------------------------------------------------- what one types


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overrides": {"advantage.gamma": 0.5}}, "got 'advantage.gamma', which is not read here"),
        ({"overrides": {"rollout.temperature": 0.5}}, "got 'rollout.temperature', which is not read here"),
        ({"overrides": {"advantage.lamda": 0.5}}, "did you mean advantage.lam"),
        ({"critic": "good"}, "critic: got 'good'; expected zero, warm, noisy, oracle or values"),
        ({"model": "big"}, "model: got 'big'; expected tabular or network"),
        ({"tokens": 5}, "steps, tokens: got 1, 5; expected exactly one"),
        ({"critic": [1.0, 2.0]}, "expected 8 finite numbers"),
        ({"window": 0}, "window: got 0; expected an integer of at least 1"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_was_expected(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        learn(instances.thinking(length=8), steps=1, **options)
    assert "\n" not in str(caught.value)


def test_overrides_have_the_last_word_and_methods_win_over_the_window():
    mdp = instances.thinking(length=8).mdp
    ppo = Setting(method="ppo", window=3).config(mdp)
    assert (ppo.rollout.window, ppo.rollout.max_response_tokens, ppo.rollout.refill) == (8, 8, "batch")
    assert ppo.policy.mini_batch_tokens == Setting(window=3).config(mdp).policy.mini_batch_tokens == 96  # equal in both arms
    assert Setting(method="ppo", overrides={"value.update": "independent"}).config(mdp).value.update == "independent"
    assert Setting(critic="oracle").config(mdp).value.lr == 0


def test_training_by_tokens_stops_at_the_first_step_that_reaches_them():
    history = learn(instances.thinking(length=8), tokens=500, window=4, slots=8)
    assert history[-2].tokens < 500 <= history[-1].tokens


def test_records_become_csv_rows_and_append_only_to_their_like(tmp_path):
    made, path = instances.thinking(length=8), tmp_path / "rows.csv"
    history = learn(made, steps=2, window=4)
    write_csv(path, table(history, method="tppo", seed=0))
    write_csv(path, table(history, method="tppo", seed=1), append=True)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["seed"] for row in rows] == ["0"] * 3 + ["1"] * 3
    for row, record in zip(rows, [*history, *history], strict=True):
        for name, number in dataclasses.asdict(record).items():
            assert float(row[name]) == number or math.isnan(number)
    with pytest.raises(ValueError, match="write to another file"):
        write_csv(path, table(history, other=1), append=True)
    write_csv(path, table(history[:1]))
    assert len(path.read_text().splitlines()) == 2
