"""One whole training step against an independent oracle: Trainer.step is what the contract says, under every setting.

The functions have tests of their own; this file sees their assembly. Each case plays some steps on the Trainer and on the oracle
(oracle.py: plain loops over tokens, float64), and compares after each both models' parameters, PPO-EWMA's average, the stored
values, what is settled, and every metric of the glossary that is no wall-clock time.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
from helpers import one_thread  # noqa: F401  (a fixture)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from oracle_stage import WALL_CLOCK, Outcome, make_config, real_stage, same_outcome, toy_stage

from tppo_ref.loop.learner import Learner
from tppo_ref.runs.config import METHODS, Config
from tppo_ref.runs.glossary import GLOSSARY
from tppo_ref.runs.parsing import field_paths
from tppo_ref.runs.validation import check

pytestmark = pytest.mark.usefixtures("one_thread")

SECTIONS = ("rollout.", "advantage.", "policy.", "value.")
SMALL: dict[str, Any] = {
    "rollout.slots": 4, "rollout.window": 4, "rollout.max_response_tokens": 10, "advantage.tail_tokens": 1, "policy.lr": 0.02,
    "policy.mini_batch_tokens": 0, "policy.mini_batches": 2, "value.lr": 0.02, "value.mini_batch_tokens": 0, "value.mini_batches": 2,
    "policy.engine_gap_limit": 1.0,
}  # fmt: skip
"""Rows are cut, capped and ended in nearly every step, and a step moves the weights far enough to be seen."""


# --------------------------------------------------------------------------------------------------------------- named methods


@pytest.mark.parametrize("method", METHODS)
def test_a_named_methods_steps_are_the_oracles(method):
    toy_stage(make_config(SMALL, method)).play()


@pytest.mark.parametrize("method", METHODS)
def test_a_named_methods_steps_are_the_oracles_on_a_transformer_with_grouped_heads_and_several_chunks_of_logits(method):
    outcome = real_stage(make_config(SMALL, method)).play()
    for metrics in outcome.metrics:  # the engine decodes with the trainer's weights; its log-probabilities are float32
        assert math.isnan(metrics["policy/logprob_gap"]) or metrics["policy/logprob_gap"] < 1e-6


@pytest.mark.parametrize("changes", [
    {}, {"policy.prefix": "constant", "policy.keep_prefix": True, "policy.epochs": 2},
    {"policy.prefix": "constant", "value.update": "joint", "rollout.temperature": 0.7, "rollout.min_response_tokens": 3},
])  # fmt: skip
def test_steps_are_the_oracles_with_an_attention_scale_that_is_not_the_default(changes):
    outcome = real_stage(make_config(SMALL | changes), model_type="qwen2", scaling=0.9).play()
    assert max(metrics["policy/logprob_gap"] for metrics in outcome.metrics) < 1e-6


# ------------------------------------------------------------------------------------------------------------ every field, drawn

small_share = st.sampled_from([0.001, 0.01, 0.1, 0.3, 1.0])  # not 0: that is a kink where every update begins
passes: dict[str, st.SearchStrategy[Any]] = {
    "epochs": st.integers(1, 3),
    "mini_batches": st.integers(1, 4),
    "mini_batch_tokens": st.sampled_from([0, 0, 3, 8, 1000]),
    "micro_batch_tokens": st.sampled_from([1, 9, 20, 4096]),
    "lr": st.sampled_from([0.001, 0.02, 0.1]),
    "lr_warmup_steps": st.sampled_from([0, 1, 2, 5]),
    "weight_decay": st.sampled_from([0.0, 0.1, 2.0]),
    "max_grad_norm": st.sampled_from([0.01, 0.3, 1.0, 100.0]),
}
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "rollout.slots": st.integers(1, 5),
    "rollout.window": st.integers(1, 7),
    "rollout.max_response_tokens": st.integers(4, 12),
    "rollout.min_response_tokens": st.sampled_from([0, 0, 2, 3]),
    "rollout.refill": st.sampled_from(["immediate", "immediate", "step", "batch"]),
    "rollout.responses_per_step": st.integers(0, 8),
    "rollout.samples_per_prompt": st.integers(1, 3),
    "rollout.temperature": st.sampled_from([1.0, 0.5, 2.0]),
    "advantage.estimator": st.sampled_from(["egae", "egae", "egae", "rloo", "grpo"]),
    "advantage.gamma": st.sampled_from([1.0, 0.9, 0.5, 0.0]),
    "advantage.lam": st.sampled_from([1.0, 0.95, 0.5, 0.0]),
    "advantage.lam_alpha": st.sampled_from([None, 0.05, 0.3, 2.0]),
    "advantage.cut_value": st.sampled_from(["previous", "critic", "zero"]),
    "advantage.tail": st.sampled_from(["exclude", "defer"]),
    "advantage.tail_tokens": st.integers(0, 4),
    "advantage.whiten": st.booleans(),
    "advantage.clamp": st.sampled_from([0.3, 1.0, 10.0]),
    **{f"policy.{name}": strategy for name, strategy in passes.items()},
    "policy.clip_low": small_share,
    "policy.clip_high": small_share,
    "policy.dual_clip": st.sampled_from([None, 1.01, 1.2, 10.0]),
    "policy.lm_loss_weight": st.sampled_from([0.0, 0.1, 1.0]),
    "policy.old_logprobs": st.sampled_from(["recompute", "recompute", "engine"]),
    "policy.importance": st.sampled_from(["none", "none", "truncated", "masked", "generalised"]),
    "policy.reuse_batches": st.sampled_from([0, 1, 2]),
    "policy.importance_cap": st.sampled_from([0.8, 1.1, 2.0]),
    "policy.train_on": st.sampled_from(["window", "window", "ended"]),
    "policy.ewma_decay": st.sampled_from([0.0, 0.0, 0.5, 0.9]),
    "policy.prefix": st.sampled_from(["full", "constant"]),
    "policy.keep_prefix": st.booleans(),
    "policy.min_new_tokens": st.sampled_from([0, 0, 2, 5]),
    "policy.engine_gap_limit": st.sampled_from([1.0, 1.0, 0.1]),
    **{f"value.{name}": strategy for name, strategy in passes.items()},
    "value.update": st.sampled_from(["independent", "joint"]),
    "value.clip_low": st.one_of(st.none(), small_share),
    "value.clip_high": st.one_of(st.none(), small_share),
    "value.batch_responses": st.sampled_from([0, 0, 1, 2, 3, 50]),
    "value.warmup_steps": st.sampled_from([0, 0, 0, 1, 2]),
}
READ_ELSEWHERE: dict[str, Any] = {"value.pretrain_responses": 2, "value.pretrain_epochs": 2, "rollout.kv_cache": "fp8"}
"""Of `pretrain-value`, and of engines, which this stage has one of its own for (tests/test_fp8.py): a training step does not read them."""
ALGORITHM = {path for path in field_paths(Config) if path.startswith(SECTIONS)}


def accepted(drawn: dict[str, Any]) -> dict[str, Any]:
    """Combinations that validation refuses, made into ones that it takes."""
    if drawn["policy.importance"] != "none":
        drawn["policy.old_logprobs"] = "recompute"
    if (drawn["policy.prefix"], drawn["policy.old_logprobs"]) != ("constant", "recompute"):
        drawn["policy.keep_prefix"] = False
    if drawn["policy.importance"] == "generalised":
        drawn["policy.ewma_decay"] = 0.0
    if drawn["rollout.refill"] != "batch" and drawn["policy.train_on"] != "ended":
        drawn["policy.reuse_batches"] = 0
    if drawn["advantage.tail"] == "defer":
        drawn["advantage.tail_tokens"] = max(1, drawn["advantage.tail_tokens"])
    if drawn["advantage.estimator"] != "egae":
        drawn["rollout.samples_per_prompt"] = max(2, drawn["rollout.samples_per_prompt"])
        drawn["policy.train_on"] = "ended"
    batch = max(drawn["rollout.responses_per_step"], drawn["rollout.slots"])
    drawn["rollout.responses_per_step"] = batch if drawn["rollout.refill"] == "batch" else 0
    return drawn


def test_every_field_of_the_algorithm_is_drawn():
    assert {*FIELDS, *READ_ELSEWHERE} == ALGORITHM


# What the oracle found in the code, each as it was found.
JOINT_ANCHOR = {"value.update": "joint", "advantage.tail": "defer", "advantage.tail_tokens": 2, "value.clip_low": 0.05,
                "value.clip_high": 0.05, "rollout.min_response_tokens": 8}  # fmt: skip
PARTIAL_PREFIX = {"policy.train_on": "ended"}
AVERAGES_PREFIX = {"policy.ewma_decay": 0.5, "policy.prefix": "constant", "policy.keep_prefix": True}
LM_LOSS_OF_NO_WEIGHT = {"policy.lm_loss_weight": 0.0}
CRITIC_ALONE = {"value.warmup_steps": 2, "policy.lr_warmup_steps": 5}
NO_UPDATE_YET = {"value.batch_responses": 50, "value.lr_warmup_steps": 5}
NOTHING_ENDS_OR_TRAINS = {"policy.train_on": "ended", "rollout.window": 1, "rollout.min_response_tokens": 3}

FEW_NEW_TOKENS = {"policy.min_new_tokens": 5, "rollout.window": 3, "rollout.max_response_tokens": 12,
                  "rollout.min_response_tokens": 11}  # fmt: skip


@example(FEW_NEW_TOKENS)
@example(JOINT_ANCHOR)
@example(PARTIAL_PREFIX)
@example(AVERAGES_PREFIX)
@example(LM_LOSS_OF_NO_WEIGHT)
@example(CRITIC_ALONE)
@example(NO_UPDATE_YET)
@example(NOTHING_ENDS_OR_TRAINS)
@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.fixed_dictionaries(FIELDS).map(accepted))
def test_steps_are_the_oracles_under_any_settings(drawn):
    config = make_config(SMALL | drawn)
    check(config)
    toy_stage(config).play()


# ------------------------------------------------------------------------------------------------------------ every field matters

OLDER_TOKENS = {"advantage.tail": "defer", "advantage.tail_tokens": 2}  # tokens of older policies are trained
SMALL_STEPS = {"policy.mini_batch_tokens": 6}
CUT_OFF = {"value.mini_batch_tokens": 6, "value.lr": 0.1}

PAIRS = {"rollout.samples_per_prompt": 2, "policy.train_on": "ended", "rollout.window": 7}
HELD = PAIRS | {"advantage.estimator": "rloo", "rollout.window": 4, "rollout.slots": 8}

MATTERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "rollout.slots": (3, {}),
    "rollout.window": (3, {}),
    "rollout.max_response_tokens": (6, {}),
    "rollout.min_response_tokens": (3, {}),
    "rollout.refill": ("step", {}),
    "rollout.responses_per_step": (7, {"rollout.refill": "batch"}),
    "rollout.samples_per_prompt": (2, {}),
    "rollout.temperature": (0.5, {}),
    "advantage.estimator": ("rloo", PAIRS),
    "advantage.gamma": (0.9, {}),
    "advantage.lam": (0.5, {}),
    "advantage.lam_alpha": (2.0, {"advantage.lam": 0.5}),
    "advantage.cut_value": ("critic", {}),
    "advantage.tail": ("defer", {}),
    "advantage.tail_tokens": (2, {}),
    "advantage.whiten": (False, {}),
    "advantage.clamp": (0.5, {}),
    "policy.epochs": (2, {}),
    "policy.mini_batches": (3, {}),
    "policy.mini_batch_tokens": (3, {}),
    "policy.micro_batch_tokens": (9, {}),
    "policy.lr": (0.03, {}),
    "policy.lr_warmup_steps": (2, {}),
    "policy.weight_decay": (0.3, {}),
    "policy.max_grad_norm": (0.1, {}),
    "policy.clip_low": (0.01, SMALL_STEPS),
    "policy.clip_high": (0.01, SMALL_STEPS),
    "policy.dual_clip": (1.02, {**SMALL_STEPS, "policy.epochs": 2, "policy.lr": 0.1}),
    "policy.lm_loss_weight": (0.3, {}),
    "policy.old_logprobs": ("engine", {}),
    "policy.importance": ("truncated", {}),
    "policy.importance_cap": (1.1, {"policy.importance": "truncated"}),
    "policy.train_on": ("ended", {}),
    "policy.reuse_batches": (1, {"rollout.refill": "batch"}),
    "policy.ewma_decay": (0.5, {}),
    "policy.prefix": ("constant", {}),
    "policy.keep_prefix": (True, {"policy.prefix": "constant"}),
    "policy.min_new_tokens": (5, {}),
    "policy.engine_gap_limit": (0.01, {"policy.old_logprobs": "engine", "policy.micro_batch_tokens": 1, "rollout.slots": 8}),
    "value.update": ("joint", {}),
    "value.epochs": (2, {}),
    "value.mini_batches": (3, {}),
    "value.mini_batch_tokens": (3, {}),
    "value.micro_batch_tokens": (9, {}),
    "value.lr": (0.03, {}),
    "value.lr_warmup_steps": (2, {}),
    "value.weight_decay": (0.3, {}),
    "value.max_grad_norm": (0.1, {}),
    "value.clip_low": (0.01, CUT_OFF),
    "value.clip_high": (0.01, CUT_OFF),
    "value.batch_responses": (3, {}),
    "value.warmup_steps": (1, {}),
}
"""Per field another value than the base's, and what else the base has, so that the field has something to act on."""


@functools.cache
def played(fields: tuple[tuple[str, Any], ...]) -> Outcome:
    return toy_stage(make_config(SMALL | dict(fields))).play()


@pytest.mark.parametrize("path", sorted(ALGORITHM))
def test_a_field_changes_what_a_run_comes_to_on_the_trainer_and_on_the_oracle(path):
    """Both agree on either side of the change (`play` asserts it), and the two sides differ: no field is dead, or wired to nothing."""
    changed, base = (READ_ELSEWHERE[path], OLDER_TOKENS) if path in READ_ELSEWHERE else MATTERS[path]
    before = played(tuple(sorted(base.items(), key=str)))
    after = played(tuple(sorted((base | {path: changed}).items(), key=str)))
    assert same_outcome(before, after) == (path in READ_ELSEWHERE)


@pytest.mark.parametrize(("metric", "changes"), [
    ("advantage/clamped_share", {"advantage.clamp": 0.5}),
    ("policy/clipped_share", SMALL_STEPS | {"policy.clip_low": 0.01, "policy.clip_high": 0.01}),
    ("policy/dual_clipped_share", SMALL_STEPS | {"policy.dual_clip": 1.02, "policy.epochs": 2, "policy.lr": 0.1}),
    ("policy/weight_clipped_share", OLDER_TOKENS | {"policy.importance": "masked", "policy.importance_cap": 1.1}),
    ("policy/weight_clipped_share", {"policy.ewma_decay": 0.5, "policy.importance_cap": 1.1}),
    ("policy/staleness", OLDER_TOKENS), ("policy/lag_updates", OLDER_TOKENS), ("policy/lm_loss", {}), ("response/capped_share", {}),
    ("value/clipped_share", CUT_OFF | {"value.clip_low": 0.01, "value.clip_high": 0.01}),
    ("value/held", {"value.batch_responses": 3}), ("ledger/excluded_tail", {}), ("ledger/excluded_warmup", CRITIC_ALONE),
    ("ledger/pending", OLDER_TOKENS), ("ledger/held_groups", HELD), ("ledger/held_steps", HELD), ("advantage/flat_groups", HELD),
    ("policy/staleness", HELD), ("verify/timeouts", {}), ("verify/errors", {}),
])  # fmt: skip
def test_the_cases_above_reach_what_they_are_about(metric, changes):
    """A clip that never binds, a tail that is never excluded: agreement on these would say nothing."""
    found = [metrics[metric] for metrics in played(tuple(sorted(changes.items(), key=str))).metrics]
    assert max(x for x in found if not math.isnan(x)) > 0


def test_every_step_epoch_and_model_deals_its_rows_anew(monkeypatch):
    """The oracle takes the mini-batches as they come; that they are drawn each time, and again the same in the same run, is seen here."""
    draws, plan = [], Learner.plan

    def watched(learner, trained_tokens, fed_tokens, rng):
        draws[-1].append(rng.bit_generator.state["state"]["state"])
        return plan(learner, trained_tokens, fed_tokens, rng)

    monkeypatch.setattr(Learner, "plan", watched)
    for seed in (0, 0, 1):
        draws.append([])
        stage = toy_stage(make_config(SMALL | {"policy.epochs": 2, "value.epochs": 2, "run.seed": seed}))
        for _ in range(3):
            stage.step()
    first, again, other = draws
    assert len({*first}) == len(first) == 3 * 2 * 2  # steps, epochs, models
    assert again == first
    assert not {*other} & {*first}


# --------------------------------------------------------------------------------------------------------------------- metrics


def test_every_metric_of_the_glossary_is_compared_or_a_wall_clock_time():
    """`Stage.step` fails on a metric that only one of the two sides reports."""
    compared = {*toy_stage(make_config(SMALL)).step()} - {name for name in GLOSSARY if name.startswith(WALL_CLOCK)}
    assert {name for name in GLOSSARY if not name.startswith(("eval/", *WALL_CLOCK))} == compared


def test_wall_clock_metrics_add_up():
    stage, total = toy_stage(make_config(SMALL)), 0.0
    for _ in range(2):
        m = stage.step()
        phases = ("rollout", "verify", "forward", "policy", "value", "sync", "other")
        total += m["time/step_s"]
        assert m["time/step_s"] == pytest.approx(sum(m[f"time/{phase}_s"] for phase in phases))
        assert min(m[f"time/{phase}_s"] for phase in phases) > 0
        assert m["time/train_s"] == pytest.approx(total)
        assert m["rollout/tokens_per_s"] == pytest.approx(m["rollout/tokens"] / m["time/rollout_s"])
        assert m["rollout/idle_s"] == pytest.approx((1 - m["rollout/occupancy"]) * m["time/rollout_s"])


# -------------------------------------------------------------------------------------------------- the oracle sees a wrong step


@pytest.mark.parametrize(("path", "wrong"), [("advantage.gamma", 0.999), ("advantage.clamp", 1.0001), ("value.lr", 0.020001)])
def test_a_trainer_that_runs_on_other_settings_than_the_oracle_is_caught(path, wrong):
    base = SMALL | {"advantage.clamp": 1.0}
    stage = toy_stage(make_config(base | {path: wrong}))
    stage.oracle = toy_stage(make_config(base)).oracle
    with pytest.raises(AssertionError, match=r"oracle|off by"):
        stage.play()
