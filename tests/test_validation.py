"""What a config refuses: numbers out of bounds, what cannot run, and options that another option cancels."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import typing

import pytest
from helpers import make_trainer, one_thread  # noqa: F401  (a fixture)
from hypothesis import given
from hypothesis import strategies as st

from tppo_ref.__main__ import main
from tppo_ref.loop.bounds import Bounds, Count, Natural, NotNegative, Positive, Share, Unit, bounds_of
from tppo_ref.method.errors import UserError
from tppo_ref.runs.config import METHODS, Config, apply_method
from tppo_ref.runs.parsing import field_paths, get_field, parse, replace_fields
from tppo_ref.runs.plans import CANCELLED_COMPARE, SHARED, check_plans, plan_of
from tppo_ref.runs.validation import (
    CANCELLED,
    CANCELLED_MODEL,
    CANCELLED_TASK,
    IMPOSSIBLE,
    cancelled_fields,
    check,
    check_task,
    check_training,
)

NUMBERS = {
    f"{section.name}.{name}": bounds
    for section in dataclasses.fields(Config)
    for name, hint in typing.get_type_hints(type(getattr(Config(), section.name)), include_extras=True).items()
    if (bounds := bounds_of(hint)) is not None
}


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# -------------------------------------------------------------------------------------------------------------------- bounds


def test_every_number_of_the_config_has_bounds():
    numbers = {path for path in field_paths(Config) if isinstance(get_field(Config(), path), int | float)}
    numbers -= {path for path in numbers if isinstance(get_field(Config(), path), bool)}
    assert numbers <= NUMBERS.keys()
    assert {path for path, bounds in NUMBERS.items() if bounds == Bounds()} == set()


@pytest.mark.parametrize("path", NUMBERS)
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_field_takes_what_is_not_finite(path, number):
    with pytest.raises(UserError) as error:
        check(replace_fields(Config(), {path: number}))
    assert one_line(error).startswith(f"{path}: got {number}; expected ")


@pytest.mark.parametrize("path", [path for path, bounds in NUMBERS.items() if bounds.low > -math.inf])
def test_no_field_takes_less_than_its_least(path):
    bounds = NUMBERS[path]
    least = bounds.low if bounds.above else bounds.low - 1
    with pytest.raises(UserError) as error:
        check(replace_fields(Config(), {path: least}))
    assert one_line(error).startswith(f"{path}: got ")
    assert str(bounds) in str(error.value)


@pytest.mark.parametrize("path", [path for path, bounds in NUMBERS.items() if bounds.high < math.inf])
def test_no_field_takes_more_than_its_most(path):
    bounds = NUMBERS[path]
    with pytest.raises(UserError, match=f"^{path}: got "):
        check(replace_fields(Config(), {path: bounds.high if bounds.below else bounds.high + 0.01}))


def test_the_defaults_are_inside_of_their_bounds():
    check(Config())
    check_task(Config())
    check_training(Config())


@given(st.floats(), st.floats(-10, 10), st.floats(-10, 10), st.booleans(), st.booleans())
def test_bounds_hold_what_lies_between_and_is_finite(number, low, high, above, below):
    held = Bounds(low, high, above=above, below=below).holds(number)
    inside = math.isfinite(number) and low <= number <= high
    assert held == (inside and not (above and number == low) and not (below and number == high))


@pytest.mark.parametrize(("hint", "said"), [
    (Count, "at least 1"), (Natural, "at least 0"), (Positive, "above 0"), (NotNegative, "at least 0"), (Unit, "at least 0, at most 1"),
    (Share, "above 0, at most 1"), (Positive | None, "above 0"), (float, "finite"), (float | None, "finite"), (int, "None"), (str, "None"),
])  # fmt: skip
def test_the_bounds_of_a_type_in_words(hint, said):
    assert str(bounds_of(hint)) == said


def test_an_integers_refusal_says_so_and_null_is_offered_where_it_may_be():
    for fields, said in (
        ({"rollout.slots": 0}, "rollout.slots: got 0; expected an integer at least 1, at most 1,000,000"),
        ({"run.steps": 0}, "run.steps: got 0; expected an integer at least 1"),
        ({"run.steps": 10**20}, f"run.steps: got {10**20}; expected an integer at least 1, at most 1,000,000,000,000"),
        ({"policy.lr": 0.0}, "policy.lr: got 0.0; expected a number above 0"),
        ({"policy.dual_clip": 1.0}, "policy.dual_clip: got 1.0; expected a number above 1, or null"),
    ):
        with pytest.raises(UserError) as error:
            check(replace_fields(Config(), fields))
        assert one_line(error) == said


# ----------------------------------------------------------------------------------------------------------------- impossible

IMPOSSIBLE_EXAMPLES = {
    "rollout.samples_per_prompt": {"rollout.samples_per_prompt": 1, "advantage.estimator": "rloo", "policy.train_on": "ended"},
    "policy.train_on": {"policy.train_on": "window", "advantage.estimator": "grpo", "rollout.samples_per_prompt": 2},
    "rollout.min_response_tokens": {"rollout.min_response_tokens": 320},
    "rollout.responses_per_step": {"rollout.refill": "batch", "rollout.responses_per_step": 31},
    "model.hidden_size": {"model.hidden_size": 34},
    "rollout.kv_cache": {"rollout.kv_cache": "fp8"},
    "run.profile_steps": {"run.profile_steps": "5:3"},
    "policy.old_logprobs": {"policy.importance": "masked", "policy.old_logprobs": "engine"},
    "run.clock": {"run.clock": "cpu", "model.device": "auto"},
    "policy.importance": {"policy.importance": "generalised", "policy.ewma_decay": 0.5},
    "policy.reuse_batches": {"policy.reuse_batches": 1},
    "policy.keep_prefix": {"policy.keep_prefix": True},
    "advantage.cut_value": {"advantage.cut_value": "next"},
    "advantage.tail": {"advantage.tail": "defer", "advantage.tail_tokens": 0},
}


@pytest.mark.parametrize("refusal", IMPOSSIBLE, ids=lambda r: r.field)
def test_what_cannot_run_is_refused_by_name(refusal):
    with pytest.raises(UserError) as error:
        check(replace_fields(Config(), IMPOSSIBLE_EXAMPLES[refusal.field]))
    assert one_line(error).startswith(f"{refusal.field}: got {IMPOSSIBLE_EXAMPLES[refusal.field].get(refusal.field)}; expected ")
    assert "{" not in str(error.value)


# ------------------------------------------------------------------------------------------------------------------ cancelled

OTHER = {
    "value.epochs": 2, "value.batch_responses": 7, "value.mini_batches": 3, "value.mini_batch_tokens": 0, "value.micro_batch_tokens": 9,
    "advantage.cut_value": "zero", "advantage.tail": "defer", "advantage.tail_tokens": 3, "policy.min_new_tokens": 5, "rollout.window": 7,
    "rollout.responses_per_step": 40, "policy.mini_batches": 3, "policy.importance_cap": 3.0, "policy.engine_gap_limit": 0.1,
    "advantage.clamp": 1.5, "advantage.lam_alpha": 0.1, "run.steps": 7, "task.path": "p.jsonl", "task.eval_path": "e.jsonl",
    "task.tokenizer": "bytes", "task.prompt_key": "q", "task.answer_key": "a", "task.max_prompt_tokens": 9, "task.chat_template": True,
    "model.hidden_size": 64, "model.num_layers": 2, "model.num_heads": 4, "model.warm_start_steps": 3, "model.warm_start_lr": 1e-3,
    "run.method": "ppo", "run.resume": True, "model.value": "some/folder", "advantage.gamma": 0.9, "advantage.lam": 0.5,
    "value.update": "joint", "value.lr": 1e-2, "value.lr_warmup_steps": 3, "value.weight_decay": 0.5, "value.max_grad_norm": 0.1,
    "value.clip_low": 0.1, "value.clip_high": 0.1, "value.warmup_steps": 1, "value.pretrain_responses": 7, "value.pretrain_epochs": 1,
}  # fmt: skip
"""A value of each such field that is not its default."""

ALONE = {"advantage.estimator": "rloo", "rollout.samples_per_prompt": 2, "policy.train_on": "ended"}  # no value model
NO_CRITIC = [path for path in field_paths(Config) if path.startswith("value.")] + [
    "model.value",
    "advantage.gamma",
    "advantage.lam",
]

CASES = [
    *((field, ALONE) for field in (*NO_CRITIC, "advantage.lam_alpha")),
    *((f"value.{name}", {"value.update": "joint"}) for name in ("epochs", "batch_responses", "mini_batches", "mini_batch_tokens", "micro_batch_tokens")),
    *((field, cause) for field in ("advantage.cut_value", "advantage.tail", "advantage.tail_tokens", "policy.min_new_tokens")
      for cause in ({"rollout.refill": "batch"}, {"rollout.refill": "step", "rollout.window": 320}, {"policy.train_on": "ended"})),
    ("rollout.window", {"rollout.refill": "batch"}),
    ("rollout.responses_per_step", {"rollout.refill": "immediate"}),
    ("policy.mini_batches", {"policy.mini_batch_tokens": 500}),
    ("value.mini_batches", {"value.mini_batch_tokens": 500}),
    ("policy.importance_cap", {"policy.importance": "none"}),
    ("policy.engine_gap_limit", {"policy.old_logprobs": "recompute"}),
    ("advantage.clamp", {"advantage.whiten": False}),
    ("advantage.lam_alpha", {"advantage.lam": 1.0}),
    ("run.steps", {"run.train_seconds": 60.0}),
]  # fmt: skip
"""A field, and what cancels it."""

NEEDED = {
    "rollout.responses_per_step": {"rollout.refill": "batch"}, "policy.mini_batches": {"policy.mini_batch_tokens": 0},
    "value.mini_batches": {"value.mini_batch_tokens": 0}, "policy.importance_cap": {"policy.importance": "masked"},
    "policy.engine_gap_limit": {"policy.old_logprobs": "engine"},
}  # fmt: skip
"""What a field needs in order to do something, where the defaults do not give it."""


def test_every_pair_of_the_table_has_a_case():
    assert {row.field for row in CANCELLED} == {field for field, _ in CASES}
    assert {row.field for row in (*CANCELLED, *CANCELLED_TASK, *CANCELLED_MODEL, *CANCELLED_COMPARE)} == OTHER.keys()
    assert all(get_field(Config(), field) != value for field, value in OTHER.items())


@pytest.mark.parametrize(("field", "cause"), CASES, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values())))
def test_an_option_that_another_one_cancels_is_refused_by_name(field, cause):
    with pytest.raises(UserError) as error:
        check_training(replace_fields(Config(), {field: OTHER[field]} | cause))
    said = one_line(error)
    assert said.startswith(f"{field}: got {OTHER[field]}; expected it left out: ")
    assert said.endswith("; drop it")
    assert "{" not in said


@pytest.mark.parametrize("field", sorted({row.field for row in CANCELLED}))
def test_an_option_that_nothing_cancels_is_not_refused(field):
    check_training(replace_fields(Config(), {field: OTHER[field]} | NEEDED.get(field, {})))


LOOP_CASES = [
    (f, c) for f, c in CASES if f not in ("run.steps", "rollout.responses_per_step", "policy.engine_gap_limit", "model.value")
]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("field", "cause"), LOOP_CASES, ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x.values())))
def test_a_cancelled_option_really_changes_nothing(field, cause):
    """Two steps with it and without it are the same, but for the clock: else it must not stand in the table."""

    def steps(fields: dict) -> list[dict]:
        changes = {name.replace(".", "__"): value for name, value in ({"rollout.max_response_tokens": 20} | fields).items()}
        trainer = make_trainer("tppo", **changes)
        rows = [trainer.step() for _ in range(2)]
        return [
            {k: v for k, v in row.items() if not k.startswith("time/") and k not in ("rollout/tokens_per_s", "rollout/idle_s")}
            for row in rows
        ]

    cause = {k: 20 if (k, v) == ("rollout.window", 320) else v for k, v in cause.items()}  # these responses have at most 20 tokens
    one, two = steps(cause), steps(cause | {field: OTHER[field]})
    assert [json.dumps(row) for row in one] == [json.dumps(row) for row in two]  # NaN equals itself there


@pytest.mark.parametrize("row", CANCELLED_TASK, ids=lambda row: row.field)
def test_an_option_of_prompt_files_is_refused_with_a_task_that_reads_none(row):
    with pytest.raises(UserError) as error:
        check_task(replace_fields(Config(), {row.field: OTHER[row.field]}))
    assert one_line(error).startswith(f"{row.field}: got {OTHER[row.field]}; expected it left out: ")
    assert "--task.name jsonl" in str(error.value)
    check_task(replace_fields(Config(), {row.field: OTHER[row.field], "task.name": "jsonl"}))


@pytest.mark.parametrize("row", CANCELLED_MODEL, ids=lambda row: row.field)
def test_a_shape_is_refused_beside_a_model_that_has_one(row):
    with pytest.raises(UserError, match=f"^{row.field}: got {OTHER[row.field]}; expected it left out: model.policy some/folder "):
        check_task(replace_fields(Config(), {row.field: OTHER[row.field], "model.policy": "some/folder"}))
    check_task(replace_fields(Config(), {row.field: OTHER[row.field]}))


@pytest.mark.parametrize(
    ("field", "cause"), [CASES[0], CASES[-1], ("task.path", {})], ids=lambda x: x if isinstance(x, str) else ""
)
def test_train_refuses_it_on_the_command_line(field, cause, capfd):
    fields = {field: OTHER[field]} | cause
    assert main(["train", *(word for name, value in fields.items() for word in (f"--{name}", str(value)))]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {field}: got {OTHER[field]}; expected it left out: ")


def test_data_can_be_checked_whatever_the_task_is_named(tmp_path, capsys):
    """`check-data FILE` gives task.path beside the built-in task that is the default."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n' * 2)
    assert main(["check-data", str(tmp_path / "p.jsonl")]) == 0
    assert "0 of " in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------ named methods


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_with_the_defaults(method):
    check_training(apply_method(Config(), method))
    check(apply_method(Config(), method))


@pytest.fixture(name="reached")
def _reached(monkeypatch, tmp_path):
    """Runs a command up to where it would load something; its exit code, and the configs that got there."""
    monkeypatch.chdir(tmp_path)
    configs: list[Config] = []

    def stop(config: Config, *args: object, **kwargs: object) -> str:
        configs.append(config)
        return "nowhere"

    for name in ("commands.train", "commands.evaluate", "commands.pretrain_value", "compare.compare", "report.write_report"):
        monkeypatch.setattr(f"tppo_ref.runs.{name}", stop)
    return lambda line: (main(line.split()), configs)


@pytest.mark.parametrize(("line", "fields"), [
    ("--run.method partial-is --rollout.kv_cache fp8", {"policy.importance": "truncated", "rollout.kv_cache": "fp8"}),
    ("--run.method rloo-window --rollout.kv_cache fp8", {"policy.importance": "truncated", "advantage.estimator": "rloo"}),
    ("--run.method geppo --rollout.kv_cache fp8", {"policy.importance": "generalised", "rollout.kv_cache": "fp8"}),
    ("--run.method geppo --policy.reuse_batches 2", {"policy.reuse_batches": 2}),
    ("--run.method rloo --advantage.estimator rloo --rollout.samples_per_prompt 4", {"rollout.refill": "batch"}),
    ("--run.method grpo --advantage.estimator grpo", {"rollout.samples_per_prompt": 4}),
])  # fmt: skip
def test_what_the_method_makes_possible_is_not_refused(line, fields, reached, tmp_path):
    code, (config,) = reached(f"train {line}")
    assert code == 0
    assert {field: get_field(config, field) for field in fields} == fields
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    assert reached(f"resume {tmp_path}")[0] == 0


@pytest.mark.parametrize("command", ["evaluate", "pretrain-value"])
@pytest.mark.parametrize("line", [
    "--run.method partial-is --rollout.kv_cache fp8", "--run.method geppo --policy.reuse_batches 2",
    "--run.method ppo --rollout.window 320 --value.update joint",
])  # fmt: skip
def test_what_the_method_makes_possible_is_not_refused_where_nothing_is_trained(command, line, reached):
    code, (config,) = reached(f"{command} {line}")
    assert code == 0
    assert config == apply_method(config, config.run.method), "not the method's fields"
    assert reached(f"train {line}") == (0, [config, config])


OTHER_LENGTH = apply_method(replace_fields(Config(), {"rollout.max_response_tokens": 64, "rollout.window": 64}), "ppo")


@pytest.mark.parametrize("command", ["evaluate", "pretrain-value"])
@pytest.mark.parametrize(("recorded", "words"), [
    (OTHER_LENGTH, "--rollout.max_response_tokens 96"), (OTHER_LENGTH, ""), (OTHER_LENGTH, "--rollout.window 64"),
    (replace_fields(apply_method(Config(), "tppo-critic-cut"), {"advantage.cut_value": "zero"}), ""),
    (replace_fields(apply_method(Config(), "ppo"), {"rollout.refill": "immediate", "rollout.window": 48}), "--rollout.slots 8"),
    # what the method would undo, and could not run without
    (replace_fields(apply_method(Config(), "tppo-once"), {"policy.old_logprobs": "recompute", "policy.importance": "truncated"}), ""),
])  # fmt: skip
def test_a_runs_own_configuration_is_not_refused_where_nothing_is_trained(command, recorded, words, reached, tmp_path):
    """Of a run of a comparison, too, whose per_method may have given what its method fixes otherwise."""
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(recorded)))
    code, (config,) = reached(f"{command} --config {tmp_path / 'config.json'} --run.out e {words}")
    assert (code, config.run.method, config.run.out) == (0, recorded.run.method, "e")
    assert config.rollout.max_response_tokens == (96 if "96" in words else recorded.rollout.max_response_tokens)
    check(config)


@pytest.mark.parametrize("command", ["evaluate", "pretrain-value"])
def test_a_file_may_name_a_method_that_makes_its_fields_possible(command, reached, tmp_path, capfd):
    (tmp_path / "config.yaml").write_text("run: {method: partial-is}\nrollout: {kv_cache: fp8}\n")
    code, (config,) = reached(f"{command} --config {tmp_path / 'config.yaml'}")
    assert (code, config.policy.importance, config.rollout.kv_cache) == (0, "truncated", "fp8")
    (tmp_path / "config.yaml").write_text("run: {method: ppo}\nrollout: {kv_cache: fp8}\n")
    assert reached(f"{command} --config {tmp_path / 'config.yaml'}")[0] == 2
    assert capfd.readouterr().err.startswith("error: rollout.kv_cache: got fp8; expected auto")


@pytest.mark.parametrize("command", ["evaluate", "pretrain-value"])
def test_what_contradicts_a_method_on_the_command_line_is_refused_beside_a_file_too(command, reached, tmp_path, capfd):
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(OTHER_LENGTH)))
    line = f"{command} --config {tmp_path / 'config.json'} --run.method ppo"
    assert reached(f"{line} --rollout.window 32")[0] == 2
    assert "rollout.window: got 32; expected 64, at which method ppo fixes it" in capfd.readouterr().err
    assert reached(f"{line} --rollout.window 64")[0] == reached(f"{line} --rollout.max_response_tokens 96")[0] == 0


def test_what_all_methods_of_a_comparison_make_possible_is_not_refused(reached, tmp_path):
    line = "compare --compare.methods [partial-is,rloo-window] --rollout.kv_cache fp8"
    code, configs = reached(line)
    assert (code, len(configs)) == (0, 1)
    assert {plan_of(configs[0], method).policy.importance for method in ("partial-is", "rloo-window")} == {"truncated"}
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(configs[0])))  # nor by the report of it
    assert reached(f"report {tmp_path}")[0] == 0


@pytest.mark.parametrize(("line", "said"), [
    ("train --rollout.kv_cache fp8", "rollout.kv_cache: got fp8"),
    ("train --run.method ppo --rollout.kv_cache fp8", "rollout.kv_cache: got fp8"),
    ("train --run.method tppo-ewma --policy.reuse_batches 1", "policy.reuse_batches: got 1"),
    ("train --advantage.estimator rloo --value.epochs 3", "rollout.samples_per_prompt: got 1"),
    ("train --model.hidden_size 34", "model.hidden_size: got 34"),
    ("compare --compare.methods [partial-is,tppo] --rollout.kv_cache fp8", "rollout.kv_cache: got fp8"),
    ("compare --model.hidden_size 34", "model.hidden_size: got 34"),
    ("demo --model.hidden_size 34", "model.hidden_size: got 34"),
    ("evaluate --model.hidden_size 34", "model.hidden_size: got 34"),
    ("pretrain-value --model.hidden_size 34", "model.hidden_size: got 34"),
    *((f"{command} {words}", said) for command in ("evaluate", "pretrain-value") for words, said in (
        ("--rollout.kv_cache fp8", "rollout.kv_cache: got fp8"),
        ("--run.method ppo --rollout.kv_cache fp8", "rollout.kv_cache: got fp8"),
        ("--run.method tppo-once --policy.importance truncated", "policy.old_logprobs: got engine"),
        ("--run.method ppo --rollout.window 64", "rollout.window: got 64"),
        ("--run.method tpo", "run.method: got 'tpo'"),
    )),
    ("report FOLDER --rollout.slots 0", "rollout.slots: got 0"),
    ("resume FOLDER --rollout.kv_cache fp8", "rollout.kv_cache: got fp8"),
])  # fmt: skip
def test_what_no_method_makes_possible_is_refused_before_anything_is_loaded(line, said, reached, tmp_path, capfd):
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(Config())))
    code, configs = reached(line.replace("FOLDER", str(tmp_path)))
    assert (code, configs) == (2, [])
    (told,) = capfd.readouterr().err.splitlines()
    assert told.startswith(f"error: {said}; expected "), told
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# -------------------------------------------------------------------------------------------------------------------- compare


def compared(per_method: dict | None = None, **fields: object) -> Config:
    changes = {name.replace("__", "."): value for name, value in fields.items()}
    return replace_fields(Config(), changes | {"compare.per_method": per_method or {}})


@pytest.mark.parametrize(("methods", "per_method", "field", "value"), [
    (["ppo"], {"ppo": {"value.update": "independent"}}, "value.update", "independent"),
    (["tppo-defer"], {"tppo-defer": {"advantage.tail": "exclude"}}, "advantage.tail", "exclude"),
    (["ppo"], {"ppo": {"rollout.refill": "immediate", "rollout.window": 48}}, "rollout.window", 48),
    (["tppo", "ppo"], {"ppo": {"policy.lr": "6e-4"}}, "policy.lr", 6e-4),
])  # fmt: skip
def test_per_method_has_the_last_word(methods, per_method, field, value):
    config = compared(per_method, compare__methods=methods)
    check_plans(config)
    (method,) = per_method
    assert get_field(plan_of(config, method), field) == value


@pytest.mark.parametrize("nested", [
    {"rollout": {"slots": 16}},
    {"rollout": {"slots": 16}, "policy.lr": 1e-3},
    {"policy": {"lr": "1e-3", "dual_clip": None}, "run": {"train_seconds": 9.0}},
])  # fmt: skip
@pytest.mark.parametrize("method", ["ppo", "tppo"])
def test_a_section_in_per_method_changes_the_fields_that_it_names_and_no_other(nested, method, tmp_path, monkeypatch):
    """{rollout: {slots: 16}} is {rollout.slots: 16}: in a file, on the command line, and beside fields of the user's own."""
    alone = functools.partial(dataclasses.replace, compare=Config().compare)  # a plan also holds what it was made from
    dotted = {}
    for name, value in nested.items():
        dotted |= {f"{name}.{field}": one for field, one in value.items()} if isinstance(value, dict) else {name: value}
    users = {
        "rollout.max_response_tokens": 200,
        "rollout.window": 50,
        "policy.mini_batch_tokens": 999,
        "compare.methods": ["ppo", "tppo"],
    }

    def plan(own: dict) -> Config:
        config = replace_fields(Config(), users | {"compare.per_method": {method: own}})
        check_plans(config)
        return alone(plan_of(config, method))

    assert plan(nested) == plan(dotted)
    assert plan(nested).policy.mini_batch_tokens == 999
    assert plan(nested).rollout.window == (200 if method == "ppo" else 50)

    seen = []
    monkeypatch.setattr("tppo_ref.runs.compare.compare", lambda config: seen.append(alone(plan_of(config, method))))
    (tmp_path / "c.yaml").write_text(json.dumps({"compare": {"per_method": {method: nested}}}))
    assert main(["compare", "--config", str(tmp_path / "c.yaml")]) == 0
    for own in (nested, dotted):
        assert main(["compare", "--compare.per_method", json.dumps({method: own})]) == 0
    assert seen[0] == seen[1] == seen[2]


def test_slots_and_budget_may_be_a_methods_own():
    own = {"ppo": {"rollout.slots": 64, "run.train_seconds": 90.0}, "tppo": {"run.steps": 7}}
    config = compared(own, compare__methods=["ppo", "tppo"])
    check_plans(config)
    ppo, tppo = (plan_of(config, method) for method in own)
    assert (ppo.rollout.slots, ppo.run.train_seconds) == (64, 90.0)
    assert (tppo.rollout.slots, tppo.run.train_seconds, tppo.run.steps) == (Config().rollout.slots, None, 7)


@pytest.mark.parametrize(("own", "said"), [
    ({"rollout.windw": 8}, "rollout.windw: no such field; did you mean rollout.window?"),
    ({"policy.lr": "fast"}, "policy.lr: got 'fast'; expected a number"),
    ({"policy.lr": [1]}, "policy.lr"),
    ({"policy.lr": math.nan}, "policy.lr: got nan; expected a number above 0"),
    ({"advantage.tail": "none"}, "advantage.tail"),
    ({"rollout.window": 7.5}, "rollout.window"),
    ({"rollout.window": 64}, "rollout.window: got 64; expected it left out: with rollout.refill batch a window closes when"),
    ({"value.epochs": 1}, "value.epochs: got 1; expected it left out: with value.update joint"),
    ({"run.seed": 3}, "run.seed: got 3; expected it the same for all methods; give it outside of per_method"),
    ({"run.eval_prompts": 9}, "run.eval_prompts: got 9; expected it the same for all methods"),
    ({"task.name": "fork"}, "task.name: got fork; expected it the same for all methods"),
    ({"model.value": "x"}, "model.value: got x; expected it the same for all methods"),
    ({"rollout.max_response_tokens": 9}, "rollout.max_response_tokens: got 9; expected it the same for all methods"),
    ({"rollout.temperature": 0.5}, "rollout.temperature: got 0.5; expected it the same for all methods"),
    ({"value.pretrain_epochs": 9}, "value.pretrain_epochs: got 9; expected it the same for all methods"),
    ({"compare.jobs": 9}, "compare.jobs: got 9; expected it the same for all methods"),
    ({"run": {"seed": 3}}, "run.seed: got 3; expected it the same for all methods; give it outside of per_method"),
    ({"run": {"steps": 9, "threads": 9}}, "run.threads: got 9; expected it the same for all methods"),
    ({"task": {"name": "fork"}}, "task.name: got fork; expected it the same for all methods"),
    ({"model": {"num_layers": 5}}, "model.num_layers: got 5; expected it the same for all methods"),
    ({"rollout": {"temperature": 0.5}}, "rollout.temperature: got 0.5; expected it the same for all methods"),
    ({"value": {"pretrain_epochs": 9}}, "value.pretrain_epochs: got 9; expected it the same for all methods"),
    ({"compare": {"per_method": {"ppo": {"policy": {"lr": 1.0}}}}}, "compare.per_method: got {'ppo': {'policy': {'lr': 1.0}}}; expected it the same"),
    ({"rollout": {"windw": 8}}, "rollout.windw: no such field; did you mean rollout.window?"),
    ({"rolout": {"window": 8}}, "rolout.window: no such field; did you mean rollout.window?"),
    ({"rolout": {}}, "rolout: no such field"),
    ({"rollout": {"window": {"tokens": 8}}}, "rollout.window"),
    ({"value": {"epochs": 1}}, "value.epochs: got 1; expected it left out: with value.update joint"),
    ({"rollout": {"slots": 8}, "rollout.slots": 9}, "rollout.slots: got 8 and 9; expected one value; drop one"),
    ({"rollout": None}, "rollout: got None; expected fields under it, as rollout.slots"),
    ({"task": None}, "task: got None; expected fields under it, as task.name"),
    ({"policy": 3}, "policy: got 3; expected fields under it, as policy.lr"),
    ({"__class__": 3}, "__class__: no such field"),
])  # fmt: skip
def test_a_mistake_in_per_method_is_told_before_anything_is_made(own, said, tmp_path, capfd):
    argv = ["compare", "--run.out", str(tmp_path / "out"), "--run.cache", str(tmp_path / "cache")]
    (tmp_path / "c.json").write_text(json.dumps({"compare": {"per_method": {"ppo": own}}}))
    assert main([*argv, "--config", str(tmp_path / "c.json")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: compare.per_method.ppo.{said}"), line
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("fields", "said"), [
    ({"run.method": "ppo"}, "run.method: got ppo; expected it left out: compare.methods names the methods"),
    ({"run.resume": True}, "run.resume: got True; expected it left out: "),
    ({"compare.methods": []}, "compare.methods: got []; expected different methods, at least one"),
    ({"compare.methods": ["ppo", "ppo"]}, "compare.methods: got ['ppo', 'ppo']; expected different methods"),
    ({"compare.methods": ["ppo", "tpo"]}, "run.method: got 'tpo'; expected one of "),
    ({"compare.per_method": {"tppo-defer": {}}}, "compare.per_method: got 'tppo-defer'; expected one of compare.methods (ppo, tppo)"),
    ({"policy.mini_batches": 3}, "policy.mini_batches: got 3; expected it left out: "),
])  # fmt: skip
def test_a_mistake_in_a_comparison_is_refused(fields, said):
    with pytest.raises(UserError) as error:
        check_plans(replace_fields(Config(), fields))
    assert one_line(error).startswith(said)


def test_one_command_line_serves_methods_that_have_no_use_for_all_of_it():
    """An option that only this method cancels is left out of its plan; it is refused where the user's own options cancel it."""
    config = compared(value__epochs=2, advantage__tail_tokens=3, compare__methods=["ppo", "tppo"])
    check_plans(config)
    assert (plan_of(config, "tppo").value.epochs, plan_of(config, "tppo").advantage.tail_tokens) == (2, 3)
    assert (plan_of(config, "ppo").value.epochs, plan_of(config, "ppo").advantage.tail_tokens) == (1, 8)
    assert not cancelled_fields(plan_of(config, "ppo"), CANCELLED)
    with pytest.raises(UserError, match=r"^value\.epochs: got 2; expected it left out"):
        check_plans(compared(value__epochs=2, value__update="joint"))


def test_what_per_method_gives_a_meaning_is_kept():
    """The user's value.epochs serves tppo, and ppo too where per_method gives it a value update of its own."""
    users = {"value__epochs": 3, "value__mini_batch_tokens": 900, "compare__methods": ["ppo", "tppo"]}
    config = compared({"ppo": {"value.update": "independent"}}, **users)
    check_plans(config)
    for method in ("ppo", "tppo"):
        value = plan_of(config, method).value
        assert (value.update, value.epochs, value.mini_batch_tokens) == ("independent", 3, 900), method
    assert plan_of(compared(**users), "ppo").value.epochs == 1

    users = {"advantage__tail": "defer", "advantage__tail_tokens": 4, "compare__methods": ["ppo", "tppo"]}
    config = compared({"ppo": {"rollout.refill": "immediate", "rollout.window": 48}}, **users)
    check_plans(config)
    for method in ("ppo", "tppo"):
        advantage = plan_of(config, method).advantage
        assert (advantage.tail, advantage.tail_tokens) == ("defer", 4), method


def test_what_per_method_takes_the_meaning_of_is_left_out():
    """Whether the method or its own fields cancel an option of the shared command line is one; what they give is refused."""
    config = compared({"tppo": {"value.update": "joint"}}, value__epochs=3, compare__methods=["tppo", "ppo-dual"])
    check_plans(config)
    assert [plan_of(config, method).value.epochs for method in ("tppo", "ppo-dual")] == [1, 3]
    own = {"tppo": {"value.update": "joint", "value.epochs": 3}}
    with pytest.raises(UserError, match=r"^compare\.per_method\.tppo\.value\.epochs: got 3; expected it left out: "):
        check_plans(compared(own, compare__methods=["tppo"]))


@pytest.mark.parametrize(("fields", "own", "said"), [
    ({"model.hidden_size": 34}, {"policy.lr": 1e-3}, "model.hidden_size: got 34; "),
    ({"rollout.responses_per_step": 31, "rollout.refill": "batch"}, {}, "rollout.responses_per_step: got 31; "),
    ({"policy.old_logprobs": "engine"}, {"policy.importance": "masked"}, "compare.per_method.ppo.policy.old_logprobs: got engine; "),
])  # fmt: skip
def test_a_mistake_is_per_methods_only_where_it_would_not_be_there_without(fields, own, said):
    with pytest.raises(UserError) as error:
        check_plans(replace_fields(Config(), fields | {"compare.methods": ["ppo"], "compare.per_method": {"ppo": own}}))
    assert one_line(error).startswith(said)


def test_what_all_runs_share_is_named_in_full():
    paths = field_paths(Config)
    assert all(any(path.startswith(shared) for path in paths) for shared in SHARED)


def test_a_plan_survives_the_file_that_its_run_reads(tmp_path):
    plan = plan_of(compared({"ppo": {"value.update": "independent", "policy.lr": "6e-4"}}), "ppo")
    (tmp_path / "wanted.json").write_text(json.dumps(dataclasses.asdict(plan)))
    assert parse(Config, ["--config", str(tmp_path / "wanted.json")], prog="x") == plan
