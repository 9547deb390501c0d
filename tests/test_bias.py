"""The bias laboratory's own promises: what its tables and gradients say, its errors, the command line and the figures.

docs/theory.md's laws, and the written-out oracle behind all numbers, are in test_bias_laws.py.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sim.__main__ import COMMANDS, main
from sim.command import parse
from sim.lab import instances
from sim.lab.bias import by_distance, conditional_moments, every_offset
from sim.lab.bias_report import knee_sentence
from sim.lab.bounds import cut_bound, surprise_bound
from sim.lab.critics import CRITICS, check_critic, critic
from sim.lab.estimators import ESTIMATORS, Estimator, named
from sim.lab.examination import BiasConfig, examine
from sim.lab.gradients import GradientError, expected_gradient, gradient_errors, knee
from sim.lab.rollouts import Rollouts, older_policy

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def rollouts_of(name: str, **parameters: float) -> Rollouts:
    mdp, policy_NA, _ = instances.load(name, **parameters)
    return Rollouts(mdp, policy_NA)


@pytest.fixture(scope="module", name="thinking")
def _thinking() -> Rollouts:
    return rollouts_of("thinking", length=12)


# ------------------------------------------------------------------------------------------------------------------- windows


def test_edges_begin_at_the_offset_and_end_at_the_length_cap(thinking):
    assert thinking.edges(5).tolist() == [5, 10, 12]
    assert thinking.edges(5, 2).tolist() == [2, 7, 12]
    assert thinking.edges(12).tolist() == thinking.edges(100).tolist() == [12]
    edge_N, depth_N = thinking.edge_N(5, 2), thinking.mdp.depth_N
    assert {int(d): int(e) for d, e in zip(depth_N, edge_N, strict=True)} == {
        **dict.fromkeys((0, 1), 2), **dict.fromkeys(range(2, 7), 7), **dict.fromkeys(range(7, 12), 12)
    }  # fmt: skip


def test_the_stretches_of_a_window_carry_the_probability_of_getting_there(thinking):
    rows, visits_N = thinking.stretches(5), thinking.solution.visits_N
    for begin in (0, 5, 10):
        prob = rows.prob_B[rows.begin_B == begin].sum().item()
        assert prob == pytest.approx(visits_N[thinking.mdp.depth_N == begin].sum(), abs=1e-14)
    assert thinking.stretches(5) is rows  # enumerated once
    assert thinking.stretches(40) is thinking.stretches(None)
    assert not thinking.stretches(None).cut_B.any()


def test_no_rounding_of_a_window_changes_what_is_cut(thinking):
    rows = thinking.stretches(5)
    cut_B = rows.cut_B.numpy()
    assert (rows.length_B.numpy()[cut_B] == rows.edge_B.numpy()[cut_B]).all()
    assert (rows.length_B.numpy() <= rows.edge_B.numpy()).all()
    assert (rows.edge_B.numpy()[cut_B] < 12).all()


# -------------------------------------------------------------------------------------------------------------- by distance


@pytest.mark.parametrize("name", ["egae", "egae-exclude"])
def test_the_table_averages_the_moments_over_the_trained_tokens(thinking, name):
    v = critic("noise:0.3", thinking.mdp, thinking.solution)
    moments = conditional_moments(thinking, v, ESTIMATORS[name], 4)
    whole = conditional_moments(thinking, v, ESTIMATORS["gae"], 4)
    table = by_distance(thinking, v, ESTIMATORS[name], 4)
    assert [row.distance for row in table] == [1, 2, 3, 4]
    for row in table:
        weight = bias = square = largest = cut = variance = 0.0
        for node in range(thinking.mdp.num_nodes):
            if moments.distance_N[node] != row.distance or thinking.mdp.depth_N[node] >= 8:  # the last window cuts nothing
                continue
            for token in range(2):
                w, b = moments.trained_NA[node, token], abs(moments.mean_NA[node, token] - moments.truth_NA[node, token])
                if w == 0:
                    continue
                weight, bias, square, largest = weight + w, bias + w * b, square + w * b * b, max(largest, b)
                cut += w * abs(moments.mean_NA[node, token] - whole.mean_NA[node, token])
                variance += w * moments.variance_NA[node, token]
        assert row.tokens == pytest.approx(weight, abs=1e-14)
        got = row.mean_bias, row.rms_bias, row.max_bias, row.cut_bias, row.variance
        assert got == pytest.approx((bias / weight, (square / weight) ** 0.5, largest, cut / weight, variance / weight), abs=1e-13)
        assert row.second_bound is None  # the critic is wrong
        assert name != "egae" or row.cut_bias <= row.bound


def test_the_table_is_empty_where_nothing_is_cut(thinking):
    assert by_distance(thinking, thinking.solution.value_N, ESTIMATORS["egae"], 12) == []


def test_bounds_are_given_where_theory_has_them_and_none_elsewhere(thinking):
    v = thinking.solution.value_N
    has = {
        name: [(row.bound is not None, row.second_bound is not None) for row in by_distance(thinking, v, rule, 4)]
        for name, rule in ESTIMATORS.items()
    }
    assert has["egae"] == [(True, False), (True, True), (True, True), (True, True)]
    assert has["cut-gae"] == has["zero-cut"] == [(True, False)] * 4
    for name in ("gae", "monte-carlo", "egae-exclude", "egae-defer", "egae-drop", "egae-adaptive", "partial"):
        assert has[name] == [(False, False)] * 4


def test_tail_rules_train_the_share_that_they_say(thinking):
    v = thinking.solution.value_N
    share = {tail: [row.trained_share for row in by_distance(thinking, v, Estimator(tail=tail, tail_tokens=2), 4)]
             for tail in ("exclude", "defer", "drop")}  # fmt: skip
    assert [row.trained_share for row in by_distance(thinking, v, Estimator(), 4)] == pytest.approx([1, 1, 1, 1])
    assert share["defer"] == pytest.approx([1, 1, 1, 1])
    assert share["drop"] == pytest.approx([0, 0, 1, 1])
    assert share["exclude"] == pytest.approx([0.1, 0.19, 1, 1])  # the rows that end there: p_end is 0.1


def test_offsets_are_averaged_with_equal_weight(thinking):
    v = critic("noise:0.3", thinking.mdp, thinking.solution)
    rule = ESTIMATORS["egae"]
    each = [expected_gradient(thinking, v, rule, 3, [offset]).gradient for offset in every_offset(3)]
    both = expected_gradient(thinking, v, rule, 3, every_offset(3)).gradient
    np.testing.assert_allclose(both, sum(each) / 3, atol=1e-15, rtol=0)
    assert np.abs(each[0] - each[1]).max() > 1e-3
    rows = [by_distance(thinking, v, rule, 3, [offset]) for offset in every_offset(3)]
    first = [row for table in rows for row in table if row.distance == 1]
    together = by_distance(thinking, v, rule, 3, every_offset(3))[0]
    assert together.tokens == pytest.approx(sum(row.tokens for row in first), abs=1e-14)
    assert together.max_bias == max(row.max_bias for row in first)


def test_the_bias_of_the_cliff_is_large_beside_it_and_the_local_bound_sees_where():
    """Windows of 4: no edge falls behind the decision (8), so the local Lip is small at every cut, the global one is 1.8."""
    rollouts = rollouts_of("cliff")
    v = rollouts.solution.value_N
    everywhere, local = (cut_bound(rollouts, v, 4, lam=0.95, local=x) for x in (False, True))
    assert everywhere[0, 0] == pytest.approx(0.95**3 * 1.8)
    assert np.abs(local).max() < 1e-12
    assert cut_bound(rollouts, v, 9, lam=0.95, local=True)[8, 1] == pytest.approx(1.8)


def test_the_second_bound_is_often_smaller_than_the_first():
    rollouts = rollouts_of("thinking")
    v = rollouts.solution.value_N
    first, second = cut_bound(rollouts, v, 8, lam=0.95), surprise_bound(rollouts, 8, lam=0.95)
    known = ~np.isnan(second) & (first > 0)
    assert (second[known] < first[known]).mean() > 0.9


# ---------------------------------------------------------------------------------------------------------------- gradients


def test_with_the_exact_critic_gae_monte_carlo_and_cut_gae_give_the_true_gradient(thinking):
    v = thinking.solution.value_N
    for name in ("gae", "monte-carlo", "cut-gae", "partial", "partial-is", "partial-exact"):
        for window, error in gradient_errors(thinking, v, ESTIMATORS[name], [1, 4, 12]).items():
            assert max(error.relative, error.rescaled, error.cut, error.critic) < 1e-12, (name, window)
            assert (error.cosine, error.length) == pytest.approx((1, 1), abs=1e-12)


def test_a_constant_added_to_the_monte_carlo_baseline_changes_no_gradient(thinking):
    found = [expected_gradient(thinking, v, ESTIMATORS["monte-carlo"], 4).gradient
             for v in (np.zeros(12), np.full(12, 3.7))]  # fmt: skip
    np.testing.assert_allclose(found[0], found[1], atol=1e-13, rtol=0)


def test_the_errors_parts_fit_together(thinking):
    v = critic("noise:0.3", thinking.mdp, thinking.solution)
    true = thinking.policy_gradient_NA
    whole = expected_gradient(thinking, v, ESTIMATORS["gae"], 12).gradient
    for window, error in gradient_errors(thinking, v, ESTIMATORS["egae-exclude"], [3, 5]).items():
        g = expected_gradient(thinking, v, ESTIMATORS["egae-exclude"], window).gradient
        scale = np.linalg.norm(true)
        assert error.true_norm == pytest.approx(scale)
        assert error.relative == pytest.approx(np.linalg.norm(g - true) / scale)
        assert error.cut == pytest.approx(np.linalg.norm(g - whole) / scale)
        assert error.critic == pytest.approx(np.linalg.norm(whole - true) / scale)
        assert error.cosine == pytest.approx((g * true).sum() / np.linalg.norm(g) / scale)
        tries = [np.linalg.norm(c * g - true) / scale for c in np.linspace(0, 3, 3001)]
        assert error.rescaled == pytest.approx(min(tries), abs=1e-5)
        assert error.rescaled <= error.relative <= error.cut + error.critic
        assert 0 < error.trained_share < 1


def test_a_gradient_that_points_backwards_is_not_mended_by_any_length(thinking):
    upside_down = -thinking.solution.value_N
    error = gradient_errors(thinking, upside_down, ESTIMATORS["egae"], [2])[2]
    assert error.cosine < -0.2
    assert error.rescaled == 1 < error.relative


def test_shared_logits_add_up_over_positions():
    mdp, policy_NA, _ = instances.random(seed=4, num_states=3, p_end=0.2)
    rollouts = Rollouts(mdp, policy_NA)
    v = critic("noise:0.5", mdp, rollouts.solution)
    by_node = expected_gradient(rollouts, v, ESTIMATORS["egae"], 2).gradient
    by_state = expected_gradient(rollouts, v, ESTIMATORS["egae"], 2, shared=True).gradient
    summed = np.zeros((3, mdp.num_tokens))
    for node, state in enumerate(mdp.state_N):
        summed[state] += by_node[node]
    np.testing.assert_allclose(by_state, summed, atol=1e-15, rtol=0)
    errors = [gradient_errors(rollouts, v, ESTIMATORS["egae"], [2], shared=shared)[2].relative for shared in (False, True)]
    assert errors[0] != pytest.approx(errors[1], rel=0.01)


def test_an_estimator_that_trains_nothing_has_error_one_and_no_direction():
    error = gradient_errors(rollouts_of("thinking", length=3), np.zeros(3), Estimator(tail="drop", tail_tokens=3), [2])[2]
    # the last window begins at 2 and ends at the cap, where nothing is dropped: one token of it is left
    assert 0 < error.trained_share < 0.5
    rollouts = rollouts_of("cliff")
    error = gradient_errors(rollouts, rollouts.solution.value_N, ESTIMATORS["egae"], [9])[9]
    assert (error.relative, error.rescaled, error.cosine, error.length) == (1, 1, 0, 0)


def test_stale_tokens_cost_and_partial_rollouts_carry_the_cost_that_the_window_does_not():
    mdp, policy_NA, _ = instances.thinking(length=12)
    stale = Rollouts(mdp, policy_NA, older_policy(mdp, policy_NA, 2.0))
    v = stale.solution.value_N
    error = {name: gradient_errors(stale, v, ESTIMATORS[name], [4])[4].relative for name in
             ("cut-gae", "partial", "partial-is", "partial-exact", "gae")}  # fmt: skip
    assert error["gae"] < 1e-12  # nothing is cut, nothing is stale
    assert error["cut-gae"] > 0.01  # windows begin where the older policy has led
    assert error["partial"] > error["cut-gae"]  # here whole prefixes come from it
    np.testing.assert_array_equal(older_policy(mdp, policy_NA, 0.0), policy_NA)


def test_older_tokens_carry_the_older_policys_probability_and_new_ones_the_new_ones():
    mdp, policy_NA, _ = instances.thinking(length=12)
    older_NA = older_policy(mdp, policy_NA, 2.0)
    rows = Rollouts(mdp, policy_NA, older_NA).stretches(4, ended_only=True)
    assert {*rows.edge_B.tolist()} == {4, 8, 12}
    new_BT = rows.depth_BT >= rows.edge_B[:, None] - 4
    now_BT, then_BT = (torch.from_numpy(x_NA)[rows.node_BT, rows.token_BT].log() for x_NA in (policy_NA, older_NA))
    assert ((now_BT != then_BT) & ~new_BT & rows.mask_BT).any()
    torch.testing.assert_close(rows.logprob_BT[rows.mask_BT], now_BT[rows.mask_BT])
    torch.testing.assert_close(rows.behaviour_logprob_BT[rows.mask_BT], torch.where(new_BT, now_BT, then_BT)[rows.mask_BT])


def error_of(relative: float, rescaled: float = 0.0) -> GradientError:
    return GradientError(relative, rescaled, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0)


def test_the_knee_is_the_smallest_window_from_which_on_all_are_within_the_tolerance():
    errors = {w: error_of(e) for w, e in {1: 0.02, 2: 0.3, 4: 0.05, 8: 0.04, 16: 0.0}.items()}
    assert knee(errors, 0.05) == 4
    assert knee(errors, 0.3) == 1
    assert knee(errors, 0.01) == 16
    assert knee(dict(reversed(list(errors.items()))), 0.05) == 4
    assert knee({w: error_of(0.5) for w in (1, 2)}, 0.05) is None
    assert knee(errors, 0.05, "rescaled") == 1


# ------------------------------------------------------------------------------------------------------------------- critics


def test_critics_err_as_they_say(thinking):
    mdp, v = thinking.mdp, thinking.solution.value_N
    made = {spec: critic(spec, mdp, thinking.solution, seed=3) for spec in
            ("exact", "zero", "constant:0.3", "noise:0.2", "drift:-0.4", "shrunk:0.5")}  # fmt: skip
    assert {spec.partition(":")[0] for spec in made} == set(CRITICS)
    np.testing.assert_array_equal(made["exact"], v)
    assert (made["zero"] == 0).all()
    assert (made["constant:0.3"] == 0.3).all()
    np.testing.assert_allclose(made["noise:0.2"] - v, 0.2 * np.random.default_rng(3).standard_normal(12), atol=1e-15)
    np.testing.assert_allclose(made["drift:-0.4"] - v, np.linspace(0, -0.4, 12), atol=1e-15)
    np.testing.assert_allclose(made["shrunk:0.5"], v / 2, atol=1e-15)
    assert critic("exact", mdp, thinking.solution) is not v  # changing it changes no truth


# -------------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lam": 1.5}, "lam: got 1.5; expected a number in [0, 1]"),
        ({"lam": float("nan")}, "lam: got nan"),
        ({"lam_alpha": 0.0}, "lam_alpha: got 0.0"),
        ({"cut_value": "last"}, "cut_value: got 'last'; expected one of previous, critic, zero, none, monte-carlo"),
        ({"tail": "skip"}, "tail: got 'skip'; expected one of exclude, defer, drop"),
        ({"tail": "none"}, "tail: got 'none'"),
        ({"tail_tokens": -1}, "tail_tokens: got -1; expected an integer of at least 0"),
        ({"train_on": "all"}, "train_on: got 'all'"),
        ({"importance": "some"}, "importance: got 'some'"),
        ({"importance_cap": 0.0}, "importance_cap: got 0.0"),
        ({"train_on": "ended"}, "cut_value: got 'previous' with train_on='ended'; expected none or monte-carlo"),
        ({"cut_value": "none", "tail_tokens": 2}, "tail_tokens: got 2 with cut_value='none'; expected 0"),
    ],
)
def test_an_estimator_that_means_nothing_is_refused(options, words):
    with pytest.raises(ValueError, match=r".") as caught:
        Estimator(**options)
    assert words in str(caught.value)


@pytest.mark.parametrize("window", [0, -1, 2.0, True])
def test_a_window_is_an_integer_of_at_least_1(thinking, window):
    with pytest.raises(ValueError, match=f"window: got {window!r}"):
        conditional_moments(thinking, thinking.solution.value_N, ESTIMATORS["egae"], window)
    with pytest.raises(ValueError, match=f"window: got {window!r}"):
        expected_gradient(thinking, thinking.solution.value_N, ESTIMATORS["gae"], window)


@pytest.mark.parametrize("offset", [0, 5, 1.5])
def test_an_offset_lies_within_the_window(thinking, offset):
    with pytest.raises(ValueError, match=f"offset: got {offset!r}; expected an integer in 1 .. window = 4"):
        conditional_moments(thinking, thinking.solution.value_N, ESTIMATORS["egae"], 4, offset)


def test_a_critic_has_one_finite_value_per_node():
    mdp, policy_NA, _ = instances.random(seed=0)
    rollouts = Rollouts(mdp, policy_NA)
    with pytest.raises(ValueError, match="use by_node for a critic per state"):
        check_critic(mdp, np.zeros(mdp.num_states))
    with pytest.raises(ValueError, match=rf"critic_N: got shape \[2\]; expected shape \[{mdp.num_nodes}\]"):
        by_distance(rollouts, np.zeros(2), ESTIMATORS["egae"], 2)
    for bad in (np.nan, np.inf):
        values = np.zeros(mdp.num_nodes)
        values[3] = bad
        with pytest.raises(ValueError, match=rf"critic_N\[3\]: got {bad}; expected finite numbers"):
            conditional_moments(rollouts, values, ESTIMATORS["egae"], 2)


def test_too_many_stretches_are_refused_before_they_fill_the_memory():
    mdp, policy_NA, _ = instances.noisy_reward(length=6)
    with pytest.raises(ValueError, match="more than 500 trajectories"):
        conditional_moments(Rollouts(mdp, policy_NA, limit=500), np.zeros(6), ESTIMATORS["gae"], 2)
    with pytest.raises(ValueError, match="more than 300 trajectories"):
        conditional_moments(Rollouts(mdp, policy_NA, limit=300), np.zeros(6), ESTIMATORS["egae"], 4)
    conditional_moments(Rollouts(mdp, policy_NA, limit=500), np.zeros(6), ESTIMATORS["egae"], 1)
    with pytest.raises(ValueError, match="limit: got more than 40 stretches; expected fewer"):
        conditional_moments(Rollouts(mdp, policy_NA, limit=40), np.zeros(6), ESTIMATORS["egae"], 2)


def test_as_many_stretches_as_the_limit_are_taken_and_one_more_is_not():
    mdp, policy_NA, _ = instances.noisy_reward(length=6)
    num = len(Rollouts(mdp, policy_NA).stretches(2).mask_BT)
    assert len(Rollouts(mdp, policy_NA, limit=num).stretches(2).mask_BT) == num
    with pytest.raises(ValueError, match=f"more than {num - 1} stretches"):
        Rollouts(mdp, policy_NA, limit=num - 1).stretches(2)


def test_other_mistakes_are_named(thinking):
    mdp, policy_NA, v = thinking.mdp, thinking.policy_NA, thinking.solution.value_N
    for spec, words in (("nose:0.1", "did you mean noise?"), ("noise", "expected noise:SIZE"), ("noise:x", "expected noise:SIZE"),
                        ("noise:inf", "finite number"), ("exact:1", "expected exact without a size")):  # fmt: skip
        with pytest.raises(ValueError, match=r".") as caught:
            critic(spec, mdp, thinking.solution)
        assert words in str(caught.value)
        assert spec in str(caught.value)
    with pytest.raises(ValueError, match="did you mean egae-defer"):
        named("egae-deffer")
    with pytest.raises(ValueError, match="windows: got none"):
        gradient_errors(thinking, v, ESTIMATORS["egae"], [])
    with pytest.raises(ValueError, match="measure: got 'best'"):
        knee({}, 0.1, "best")
    with pytest.raises(ValueError, match="tolerance: got nan"):
        knee({}, float("nan"))
    with pytest.raises(ValueError, match="step: got inf"):
        older_policy(mdp, policy_NA, float("inf"))
    sure = np.where(mdp.legal_NA, [0.0, 1.0], 0)
    with pytest.raises(ValueError, match="behaviour_NA: got token 0 at node 0; expected tokens that policy_NA takes"):
        Rollouts(mdp, sure, policy_NA)
    with pytest.raises(ValueError, match="policy: got a true gradient of 0"):
        gradient_errors(Rollouts(mdp, sure), v, ESTIMATORS["egae"], [2])


# ---------------------------------------------------------------------------------------------------------- the command line


def run(*argv: str, capsys) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["bias", *argv])
    return code, *capsys.readouterr()


SMALL = ("--instance", "thinking", "--set", "length=8", "--window", "2", "4", "8")


def test_the_table_names_the_knee_and_agrees_with_the_library(capsys):
    code, out, err = run(*SMALL, "--critic", "noise:0.1", "--estimators", "egae", "zero-cut", "--tolerance", "0.1", capsys=capsys)
    assert (code, err) == (0, "")
    rollouts = rollouts_of("thinking", length=8)
    errors = gradient_errors(rollouts, critic("noise:0.1", rollouts.mdp, rollouts.solution), ESTIMATORS["egae"], [2, 4, 8])
    line = next(line for line in out.splitlines() if line.split()[:1] == ["4"])
    assert f"{errors[4].relative:.4f}" in line.split()
    assert f"{errors[4].cosine:.4f}" in line.split()
    found = knee(errors, 0.1)
    assert found is not None
    assert f"Knee of egae: a window of {found} tokens" in out
    assert "within 10 % of the true one (relative error)" in out


def test_a_knee_that_is_not_there_is_said_with_the_reason(capsys):
    _, out, _ = run(*SMALL, "--critic", "noise:2", "--estimators", "egae", capsys=capsys)
    assert "no window examined keeps the gradient within 5 %" in out
    assert "the critic alone costs" in out


def test_json_holds_every_number_and_nothing_else_is_printed(capsys):
    code, out, err = run(*SMALL, "--json", "--tolerance", "0.2", capsys=capsys)
    assert (code, err) == (0, "")
    found = json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert list(found["estimators"]) == list(BiasConfig().estimators)
    egae = found["estimators"]["egae"]
    assert [w["window"] for w in egae["windows"]] == [2, 4, 8]
    assert set(egae["windows"][0]["gradient"]) == {f.name for f in dataclasses.fields(GradientError)}
    assert egae["windows"][0]["by_distance"][0]["second_bound"] is None
    assert egae["knee"] in (2, 4, 8)
    assert found["config"]["critic"] == "noise:0.1"


def test_figures_come_with_their_numbers(capsys, tmp_path):
    code, out, _ = run(*SMALL, "--critic", "exact", "--out", str(tmp_path / "new"), capsys=capsys)
    assert code == 0
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert files == ["bias_by_distance.csv", "bias_by_distance.png", "gradient_by_window.csv", "gradient_by_window.png"]
    assert all(name in out for name in files if name.endswith("png"))
    for name in files[1::2]:
        assert (tmp_path / "new" / name).read_bytes()[:4] == b"\x89PNG"
    with (tmp_path / "new" / "gradient_by_window.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["estimator"] == "egae"]
    examination = examine(parse(BiasConfig, [*SMALL, "--critic", "exact"], command="bias", description=""))
    finding = examination.findings["egae"]
    assert [float(row["relative"]) for row in rows] == [error.relative for error in finding.errors.values()]
    assert [int(row["window"]) for row in rows if row["knee"] == "1"] == [finding.knee]
    assert str(finding.knee) in knee_sentence("egae", finding, examination.config)
    with (tmp_path / "new" / "bias_by_distance.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["estimator"] == "egae" and row["window"] == "4"]
    assert [float(row["cut_bias"]) for row in rows] == [at.cut_bias for at in finding.distances[4]]
    assert [float(row["slope"]) for row in rows] == pytest.approx([0.95**n for n in range(4)])


def test_where_nothing_is_cut_only_the_gradients_figure_is_drawn(capsys, tmp_path):
    code, _, err = run("--instance", "thinking", "--set", "length=8", "--window", "8", "--out", str(tmp_path), capsys=capsys)
    assert (code, err) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gradient_by_window.csv", "gradient_by_window.png"]


QUICK = ("--instance", "random", "--set", "p_end=0.2", "--window", "2", "4", "--json")


@pytest.mark.parametrize("extra", [("--offsets", "all"), ("--logits", "state"), ("--behind", "1"), ("--gamma", "0.9"), ("--lam", "1"),
                                   ("--seed", "1"), ("--tail", "1"), ("--estimators", *ESTIMATORS), ("--set", "seed=3")])  # fmt: skip
def test_every_option_changes_what_is_computed(capsys, extra):
    code, out, err = run(*QUICK, *extra, capsys=capsys)
    assert (code, err) == (0, "")
    assert json.loads(out)["estimators"] != json.loads(run(*QUICK, capsys=capsys)[1])["estimators"]


def test_the_length_adaptive_lambda_is_drawn_like_any_other(capsys, tmp_path):
    code, out, _ = run(*QUICK, "--estimators", "egae-adaptive", "gae", "--alpha", "0.5", "--lam", "0", "--out", str(tmp_path),
                       "--measure", "rescaled", capsys=capsys)  # fmt: skip
    assert code == 0
    assert json.loads(out)["estimators"]["egae-adaptive"]["estimator"]["lam_alpha"] == 0.5
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--instance", "clif"), ("instance: got 'clif'", "did you mean cliff?")),
        (("--set", "size=3"), ("calm-chain: got parameter 'size'",)),
        (("--set", "length"), ("set: got length;", "NAME=NUMBER")),
        (("--set", "length=x"), ("set: got length=x;", "NAME=NUMBER")),
        (("--set", "gamma=1"), ("gamma has its own option",)),
        (("--critic", "oracle"), ("critic: got 'oracle'", "exact")),
        (("--gamma", "2"), ("gamma: got 2.0", "[0, 1]")),
        (("--lam", "x"), ("lam: got 'x'; expected a number",)),
        (("--lam", "-1"), ("lam: got -1.0", "[0, 1]")),
        (("--window", "0"), ("window: got 0",)),
        (("--window", "4.5"), ("window: got '4.5'; expected an integer",)),
        (("--tail", "0"), ("tail: got 0",)),
        (("--estimators", "egae", "egae"), ("estimators", "egae egae")),
        (("--estimators", "vtrace"), ("estimator: got 'vtrace'",)),
        (("--tolerance", "-1"), ("tolerance: got -1.0",)),
        (("--offsets", "some"), ("offsets: got 'some'; expected one of first, all",)),
        (("--windows", "4"), ("--windows: no such option", "window")),
        (("stray",), ("stray",)),
        (("--instance", "noisy-reward", "--set", "length=14"), ("more than 2000000", "trajectories")),
        (("--out", "/proc/nowhere"), ("out: got /proc/nowhere; expected a folder that can be written to",)),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(capsys, argv, words):
    code, _, err = run(*argv, capsys=capsys)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    for word in words:
        assert word in err


def test_the_dispatcher_knows_its_commands_and_imports_none_before_it_is_asked(capsys):
    assert main([]) == main(["--help"]) == 0
    out, _ = capsys.readouterr()
    assert all(name in out for name in COMMANDS)
    assert main(["bios"]) == 2
    assert "did you mean bias" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["bias", "--help"])
    assert caught.value.code == 0
    assert "--tolerance" in capsys.readouterr().out
    code = "import sys, sim.__main__; print(sorted({'torch', 'matplotlib', 'scipy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
