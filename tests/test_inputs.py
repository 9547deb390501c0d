"""What is kept for the next time is used again only where everything is as it was: also a verifier's code, and prompts, under one name."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from helpers import one_thread  # noqa: F401  (a fixture)

from tppo_ref.loop.settings import RolloutConfig
from tppo_ref.method.errors import UserError
from tppo_ref.runs import value_cache
from tppo_ref.runs.build import make_task
from tppo_ref.runs.compare import compare, refuse_other
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.value_cache import cached_value
from tppo_ref.tasks.verifier import Verifier

pytestmark = pytest.mark.usefixtures("one_thread")

CODE = """
import helper_of_mine

def verify(answer, ids, text):
    return 1.0 if text.strip() == answer or helper_of_mine.RIGHT in text else -1.0

def wrap_reference(answer):
    with open(__file__ + ".asked", "a") as file:
        file.write(answer + "\\n")
    return answer if answer != "bad" else ""
"""
SHAPE = {"model_type": "qwen2", "vocab_size": 260, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "architectures": ["Qwen2ForCausalLM"]}  # fmt: skip


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def write(path: Path, *answers: str) -> str:
    path.write_text("".join(json.dumps({"prompt": f"say {i}", "answer": answer}) + "\n" for i, answer in enumerate(answers)))
    return str(path)


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    """Two methods, a step each, on prompts and with a verifier of one's own."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    (tmp_path / "verifier_of_mine.py").write_text(CODE)
    (tmp_path / "helper_of_mine.py").write_text("RIGHT = 'e'\n")
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return replace_fields(Config(), {
        "task.name": "jsonl", "task.tokenizer": "bytes", "task.verifier": "verifier_of_mine:verify",
        "task.path": write(tmp_path / "train.jsonl", "1", "bad", "2", "3"), "task.eval_path": write(tmp_path / "test.jsonl", "4"),
        "model.policy": str(tmp_path / "config.json"), "rollout.slots": 4, "rollout.window": 4, "rollout.max_response_tokens": 8,
        "value.pretrain_responses": 6, "value.pretrain_epochs": 1, "run.out": str(tmp_path / "out"), "run.cache": str(tmp_path / "cache"),
        "run.steps": 1, "run.progress": False, "run.eval_prompts": 1, "compare.seeds": 1, "compare.methods": ["ppo", "tppo"],
    })  # fmt: skip


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.fixture
def name_of(monkeypatch):
    """The name under which a config's critic is kept, without a critic."""

    def stand_in(config: Config) -> None:
        (Path(config.run.out) / "value").mkdir()

    monkeypatch.setattr(value_cache, "pretrain_value", stand_in)

    def name(config: Config) -> str:
        with Verifier(config.task.verifier, 20.0) as verifier:
            return cached_value(config, make_task(config), verifier).parent.name

    return name


@pytest.mark.parametrize(("file", "old", "new"), [
    ("verifier_of_mine.py", "1.0 if", "2.0 if"), ("helper_of_mine.py", "'e'", "'f'"), ("train.jsonl", '"3"', '"5"'), ("test.jsonl", '"4"', '"5"'),
    ("config.json", '"hidden_size": 8', '"hidden_size": 16'),
])  # fmt: skip
def test_a_critic_is_not_used_again_after_what_it_was_made_of_changed_under_its_name(config, name_of, tmp_path, file, old, new):
    before = name_of(config)
    assert name_of(config) == before
    change(tmp_path / file, old, new)
    assert name_of(config) != before


@pytest.mark.parametrize(("field", "value", "same"), [
    ("value.lr", 0.1, False), ("advantage.gamma", 0.5, False), ("run.seed", 1, False), ("model.dtype", "bfloat16", False),
    ("policy.lr", 0.1, True), ("run.steps", 7, True), ("compare.seeds", 9, True),
])  # fmt: skip
def test_a_critic_is_used_again_where_nothing_that_pre_training_reads_is_other(config, name_of, field, value, same):
    assert (name_of(config) == name_of(replace_fields(config, {field: value}))) == same


def test_a_comparison_says_where_its_critic_is_kept_and_says_it_once(config, name_of, capsys):
    """Not the folder beside it in which it was made, which is gone by then."""
    name = name_of(config)
    assert capsys.readouterr().out == f"value model: {config.run.cache}/{name}/value\n"
    assert name_of(config) == name
    assert capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------- beside other comparisons


@pytest.fixture
def making(config, monkeypatch):
    """`cached_value` with a stand-in of the pre-training, which is given the folder to be."""

    def make(pretrain, config: Config = config) -> Path:
        def stand_in(of_it: Config) -> None:
            pretrain(Path(of_it.run.out))

        monkeypatch.setattr(value_cache, "pretrain_value", stand_in)
        with Verifier(config.task.verifier, 20.0) as verifier:
            return cached_value(config, make_task(config), verifier)

    return make


def critic_in(folder: Path, weights: str) -> None:
    (folder / "value").mkdir(parents=True)
    (folder / "value" / "weights").write_text(weights)


def test_of_two_comparisons_that_make_a_critic_at_once_both_use_the_one_that_was_there_first(config, making):
    cache, name = Path(config.run.cache), making(lambda out: critic_in(out, "")).parent.name
    shutil.rmtree(cache / name)

    def beaten(out: Path) -> None:
        critic_in(cache / name, "theirs")
        critic_in(out, "ours")

    critic = making(beaten)
    assert (critic / "weights").read_text() == "theirs"
    assert [path.name for path in cache.iterdir()] == [name]


def test_what_a_killed_comparison_of_the_same_process_number_left_is_no_hindrance(config, making):
    """In a container the first process is always number 1."""
    cache, name = Path(config.run.cache), making(lambda out: critic_in(out, "")).parent.name
    shutil.rmtree(cache / name)
    left = cache / f".unfinished-{name}-{os.getpid()}"
    critic_in(left, "half")
    assert (making(lambda out: critic_in(out, "whole")) / "weights").read_text() == "whole"


def test_a_critic_of_which_the_pre_training_failed_is_not_in_the_cache(config, making):
    def failing(out: Path) -> None:
        critic_in(out, "half")
        raise UserError("no")

    with pytest.raises(UserError, match=r"^no$"):
        making(failing)
    assert list(Path(config.run.cache).iterdir()) == []


def test_a_cache_that_cannot_be_written_is_refused_before_anything_is_trained(config, making):
    with pytest.raises(UserError) as error:
        making(lambda out: pytest.fail("it was trained"), replace_fields(config, {"run.cache": "/proc/nowhere"}))
    assert one_line(error).startswith("run.cache: got /proc/nowhere; expected a folder that can be written to; ")


OTHER_ROLLOUT = {"slots": 8, "max_response_tokens": 6, "min_response_tokens": 2, "samples_per_prompt": 2, "temperature": 0.5,
                 "window": 8, "refill": "step", "responses_per_step": 9, "kv_cache": "fp8"}  # fmt: skip
SHAPES_NO_RESPONSE = {"window", "refill", "responses_per_step"}  # pre-training samples whole responses, in one window


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(RolloutConfig)])
def test_every_field_of_the_rollout_that_shapes_a_response_makes_another_critic(config, name_of, field):
    other = replace_fields(config, {f"rollout.{field}": OTHER_ROLLOUT[field]})
    assert (name_of(config) == name_of(other)) == (field in SHAPES_NO_RESPONSE)


def test_a_comparison_asks_each_reference_once_and_keeps_no_run_of_another_verifier(config, tmp_path):
    """One line in `.asked` for each reference: not one more for the critic's pre-training, nor for either run."""
    out = compare(config)
    assert sorted((tmp_path / "verifier_of_mine.py.asked").read_text().split()) == ["1", "2", "3", "4", "bad"]
    for run in ("ppo-seed0", "tppo-seed0"):
        assert [row["answer"] for row in json.loads((out / "runs" / run / "references.json").read_text())["left_out"]] == ["bad"]
    finished = (out / "runs" / "ppo-seed0" / "metrics.jsonl").read_bytes()
    compare(config)
    assert (out / "runs" / "ppo-seed0" / "metrics.jsonl").read_bytes() == finished, "a run that was complete was run again"

    change(tmp_path / "helper_of_mine.py", "'e'", "'f'")
    with pytest.raises(UserError) as error:
        compare(config)
    assert one_line(error).startswith(f"run.out: got {out / 'runs' / 'ppo-seed0'}, which holds a run with ")


@pytest.mark.parametrize("changed", ["prompts", "verifier", "model.policy", "model.value"])
def test_a_run_of_other_inputs_under_the_same_names_is_refused_by_what_changed(config, tmp_path, changed):
    inputs = {"prompts": "p", "verifier": "v", "model.policy": "m", "model.value": "w"}
    folder = Path(config.run.out)
    folder.mkdir()
    (folder / "wanted.json").write_text(json.dumps(dataclasses.asdict(config)))
    with pytest.raises(UserError, match="which holds no run that can be read; expected a folder of this comparison; choose"):
        refuse_other(config, inputs)
    (folder / "inputs.json").write_text(json.dumps(inputs))
    refuse_other(config, inputs)
    with pytest.raises(UserError) as error:
        refuse_other(config, inputs | {changed: "other"})
    assert f"which holds a run with another {changed}; expected one with the {changed} of today" in one_line(error)


# ------------------------------------------------------------------------------------------- rules of one's own in a comparison

RULE = """
from decorators_of_mine import plain

@plain
def rule(cut):
    return cut.critic_B
"""


@pytest.fixture(name="with_rule")
def _with_rule(config, tmp_path, monkeypatch) -> Config:
    """A comparison under a rule of one's own, of runs that are finished at once; what all share has been made."""
    (tmp_path / "decorators_of_mine.py").write_text("def plain(function):\n    return lambda cut: function(cut)\n")
    (tmp_path / "rule_of_mine.py").write_text(RULE)
    for module in ("decorators_of_mine", "rule_of_mine"):
        monkeypatch.delitem(sys.modules, module, raising=False)  # another test's
    monkeypatch.setattr("tppo_ref.runs.compare.prepare", lambda config, out: (config, {"prompts": "p"}))
    monkeypatch.setattr("tppo_ref.runs.report.write_report", lambda *args, **kwargs: None)
    monkeypatch.setattr(
        "tppo_ref.runs.compare._run_all", lambda runs, config: [(Path(r.run.out) / "finished").touch() for r in runs]
    )
    return replace_fields(config, {"advantage.cut_value": "rule_of_mine:rule"})


def test_runs_of_two_rules_of_one_name_are_not_one_comparison(with_rule, tmp_path):
    out = compare(with_rule)
    more = replace_fields(with_rule, {"compare.seeds": with_rule.compare.seeds + 1})
    compare(more)
    before = sorted(out.rglob("*"))
    change(tmp_path / "rule_of_mine.py", "cut.critic_B", "cut.critic_B - 1")
    with pytest.raises(UserError) as error:
        compare(replace_fields(with_rule, {"compare.seeds": with_rule.compare.seeds + 2}))
    assert "tppo-seed0, which holds a run with another advantage.cut_value; expected one with the advan" in one_line(error)
    assert sorted(out.rglob("*")) == before


def test_a_comparison_from_before_rules_of_ones_own_goes_on(with_rule):
    own = replace_fields(with_rule, {"advantage.cut_value": "critic"})
    out = compare(own)
    files = sorted(out.rglob("inputs.json"))
    assert len(files) > 1
    for file in files:
        inputs = json.loads(file.read_text())
        assert inputs == {"prompts": "p", "advantage.cut_value": ""}
        file.write_text(json.dumps({"prompts": "p"}))
    compare(own)
    compare(replace_fields(own, {"compare.seeds": own.compare.seeds + 1}))
    for file in files:
        file.write_text(json.dumps({"advantage.cut_value": ""}))
    with pytest.raises(UserError, match="which holds no run that can be read"):
        compare(own)


@pytest.mark.parametrize(("fields", "said"), [
    ({"advantage.cut_value": "no_module:rule"}, "No module named 'no_module'"),
    ({"advantage.cut_value": "rule_of_mine:rules"}, "has no 'rules'"),
    ({"compare.per_method": {"tppo": {"advantage.cut_value": "rule_of_mine:rules"}}}, "has no 'rules'"),
])  # fmt: skip
def test_a_rule_that_cannot_be_had_is_refused_before_anything_is_made(fields, said, with_rule, monkeypatch):
    """Also where the first method cuts no row, and has no use for a rule."""
    monkeypatch.setattr("tppo_ref.runs.compare.prepare", lambda config, out: pytest.fail("models were made"))
    with pytest.raises(UserError, match=r"^advantage\.cut_value: got .*; expected module:function") as error:
        compare(replace_fields(with_rule, fields))
    assert said in one_line(error)
    assert not Path(with_rule.run.out).exists()


def test_a_rule_that_no_run_asks_is_not_looked_for(with_rule):
    compare(replace_fields(with_rule, {"advantage.cut_value": "no_module:rule", "compare.methods": ["ppo"]}))
