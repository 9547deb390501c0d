"""The command line: a mistake is one line that names the thing and the remedy, exit code 2, no traceback, nothing lost."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import typing
from pathlib import Path

import pytest
import torch
from helpers import TINY, make_policy

from tppo_ref.__main__ import COMMANDS, main
from tppo_ref.method.errors import UserError
from tppo_ref.rollout.models import load_policy
from tppo_ref.runs.checkpoint import complete_checkpoints, read_state
from tppo_ref.runs.config import METHODS, Config, apply_method
from tppo_ref.runs.parsing import field_paths, fields_given, get_field, parse, replace_fields
from tppo_ref.runs.validation import check

ROOT = Path(__file__).resolve().parents[1]
FAST = {
    "task.name": "length", "model.warm_start_steps": 2, "model.hidden_size": 16, "model.num_layers": 1, "model.num_heads": 2,
    "rollout.slots": 4, "rollout.window": 6, "rollout.max_response_tokens": 12, "run.eval_prompts": 2, "run.eval_every_s": 0,
    "run.steps": 2, "run.progress": "false",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Cluster:
    """A config that has the whole of another one as a section."""

    algo: Config = dataclasses.field(default_factory=Config)


def options(**changes: object) -> list[str]:
    """--section.field VALUE; section__field as keyword."""
    fields = FAST | {name.replace("__", "."): value for name, value in changes.items()}
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def own_model(words: list[str], folder: Path) -> list[str]:
    """The same options with a model of one's own, and so without the built-in one's shape."""
    pairs = zip(words[::2], words[1::2], strict=True)
    return [*(word for pair in pairs if not pair[0].startswith("--model.") for word in pair), "--model.policy", str(folder)]


@pytest.fixture(scope="session", name="cache")
def _cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(name="refuse")
def _refuse(capfd, tmp_path, cache):
    """Runs a command that must be refused; its one line."""

    def refuse(*argv: str, words: tuple[str, ...] = (), paths: bool = True) -> str:
        if paths:
            argv = (
                *argv,
                *(["--run.out", str(tmp_path / "out")] if "--run.out" not in argv else []),
                "--run.cache",
                str(cache),
            )
        capfd.readouterr()
        code = main(list(argv))
        out, err = capfd.readouterr()
        assert code == 2, (code, out, err)
        lines = err.splitlines()
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in out + err
        for word in words:
            assert word in lines[0], lines[0]
        return lines[0]

    return refuse


# ------------------------------------------------------------------------------------------------------------ before anything


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--rollout.windw", "8"], ("rollout.windw", "rollout.window")),
        (["--rolout.window", "8"], ("rolout.window", "rollout.window")),
        (["--policy.window", "8"], ("policy.window", "rollout.window")),
        (["--policy.learning_rte=1"], ("policy.learning_rte",)),
        (["--widnow", "8"], ("widnow", "window")),
        (["--rollout.window", "0"], ("rollout.window", "0", "at least 1")),
        (["--rollout.window", "-3"], ("rollout.window", "-3")),
        (["--rollout.window", "eight"], ("rollout.window", "eight")),
        (["--rollout.slots", "2.5"], ("rollout.slots", "2.5")),
        (["--advantage.lam", "1.5"], ("advantage.lam: got 1.5; expected a number at least 0, at most 1",)),
        (["--advantage.lam", "nan"], ("advantage.lam", "nan")),
        (["--advantage.gamma", "-0.1"], ("advantage.gamma", "-0.1")),
        (["--advantage.tail", "keep"], ("advantage.tail", "keep", "defer")),
        (["--advantage.tail", "none"], ("advantage.tail", "none; give advantage.tail_tokens 0")),
        (["--run.method", "tppo-defer", "--advantage.tail_tokens", "0"], ("advantage.tail: got defer; expected exclude with advantage.tail_tokens 0",)),
        (["--advantage.lam_alpha", "0"], ("advantage.lam_alpha: got 0.0; expected a number above 0, or null",)),
        (["--advantage.length_adaptive_lam", "false"], ("length_adaptive_lam: no such option; give advantage.lam_alpha null",)),
        (["--policy.lr", "0"], ("policy.lr: got 0.0; expected a number above 0",)),
        (["--policy.lr", "inf"], ("policy.lr", "inf")),
        (["--policy.dual_clip", "0.5"], ("policy.dual_clip", "0.5")),
        (["--policy.ewma_decay", "1"], ("policy.ewma_decay", "1")),
        (["--policy.clip_low", "-0.2"], ("policy.clip_low", "-0.2")),
        (["--policy.clip_low", "nan"], ("policy.clip_low", "nan")),
        (["--value.clip_high", "-1"], ("value.clip_high", "-1")),
        (["--value.lr", "nan"], ("value.lr", "nan")),
        (["--run.seed", "-1"], ("run.seed", "-1")),
        (["--model.hidden_size", "0"], ("model.hidden_size", "0")),
        (["--model.warm_start_steps", "0"], ("warm", "0")),
        (["--task.failure_score", "nan"], ("failure_score", "nan")),
        (["--rollout.min_response_tokens", "12"], ("rollout.min_response_tokens", "12")),
        (["--run.method", "tpo"], ("run.method", "tpo", "tppo")),
        (["--run.train_seconds", "0"], ("run.train_seconds", "0")),
        (["--task.name", "chian"], ("chian", "chain")),
        (["--task.name", "jsonl"], ("task.path",)),
        (["--config", "/no/such/file.yaml"], ("/no/such/file.yaml",)),
        (["--model.device", "cuda:99"], ("cuda:99",)),
        (["--model.device", "teapot"], ("teapot",)),
        (["--model.policy", "/no/such/model"], ("/no/such/model",)),
        (["--model.dtype", "float16"], ("model.dtype", "float16", "bfloat16")),
        (["--task.verifier", "no_such_module:verify"], ("no_such_module",)),
        (["stray"], ("stray",)),
        (["--rollout.window"], ("rollout.window",)),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)  # fmt: skip
def test_a_mistake_is_one_line_that_names_it(argv, words, refuse, tmp_path):
    refuse("train", *options(), *argv, words=words)
    assert not list(tmp_path.rglob("step-*"))


def test_an_unknown_command_is_named_with_the_nearest_one(refuse):
    refuse("trian", words=("trian", "train", "compare"), paths=False)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("rollout:\n  windw: 8\n", ("windw", "rollout.window")),
        ("rolout:\n  window: 8\n", ("rolout", "rollout")),
        ("rollout:\n  window: 0\n", ("rollout.window", "0")),
        ("rollout:\n  window: many\n", ("rollout.window", "many")),
        ("rollout: [1, 2]\n", ("rollout",)),
        ("a: b: c\n", ("c.yaml",)),
        ("\x00\x01", ("c.yaml",)),
    ],
    ids=["misspelt field", "misspelt section", "bad value", "bad type", "a list for a section", "no YAML", "no text"],
)
def test_a_mistake_in_a_config_file_is_one_line(content, words, refuse, tmp_path):
    (tmp_path / "c.yaml").write_text(content)
    argv = ["train", "--config", str(tmp_path / "c.yaml")]
    refuse(*argv, words=words)


def test_a_field_that_the_method_fixes_is_refused(refuse):
    refuse(
        "train",
        *options(run__method="ppo", rollout__refill="immediate", rollout__window=7),
        words=("rollout.window", "ppo", "7"),
    )


@pytest.mark.parametrize("given", [
    ["--rollout.window", "64"], ["--rollout", "{window: 64}"], ["--rollout={window: 64}"], ["--rollout", '{"slots": 8, "window": 64}'],
    ["--rollout", "window: 64"],
])  # fmt: skip
def test_a_field_that_is_as_by_default_was_given_in_its_section_too(given, refuse, monkeypatch):
    """Method ppo fixes the window: whoever gives 64, the default, is told so, however it is written."""
    monkeypatch.setattr("tppo_ref.runs.commands.train", lambda config: pytest.fail("the window was overridden in silence"))
    refuse("train", "--run.method", "ppo", *given, words=("rollout.window: got 64; expected 320, at which method ppo fixes it",))


@pytest.mark.parametrize("given", [["--rollout", "{slots: 64}"], ["--task.name", "{"], ["--run.wandb_project", "window: 64"]])
def test_what_a_section_does_not_name_was_not_given(given):
    assert fields_given(Config, given) & set(field_paths(Config)) <= {"rollout.slots", given[0][2:]}


@pytest.mark.parametrize("written", ["--rollout FILE", "--rollout=FILE"])
@pytest.mark.parametrize("content", ["window: 64", '{"slots": 8, "window": 64}'])
def test_a_file_for_a_section_counts_as_the_fields_that_are_in_it(written, content, refuse, tmp_path, monkeypatch):
    monkeypatch.setattr("tppo_ref.runs.commands.train", lambda config: pytest.fail("the window was overridden in silence"))
    (tmp_path / "rollout.yaml").write_text(content)
    words = written.replace("FILE", str(tmp_path / "rollout.yaml")).split()
    refuse("train", "--run.method", "ppo", *words, words=("rollout.window: got 64; expected 320, at which method ppo fixes it",))
    assert parse(Config, words, prog="x").rollout.window == 64


def test_a_file_counts_wherever_a_section_may_be_one_and_nowhere_else(tmp_path, monkeypatch):
    """A file in a file is looked for beside that, as the parser does. A field's own value is not opened."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "rollout.yaml").write_text("window: 64\nkv_cache: auto\n")
    (tmp_path / "sub" / "algo.yaml").write_text("run: {seed: 3}\nrollout: rollout.yaml\n")
    (tmp_path / "config.yaml").write_text("algo: {rollout: sub/rollout.yaml}\n")
    monkeypatch.chdir(tmp_path)
    leaves = {f"algo.{path}" for path in field_paths(Config)} | set(field_paths(Config))
    inside = {"algo.rollout.window", "algo.rollout.kv_cache"}
    for words, expected in (
        (["--algo", "sub/algo.yaml"], inside | {"algo.run.seed"}),
        (["--algo", "{rollout: sub/rollout.yaml}"], inside),
        (["--algo.rollout", "sub/rollout.yaml"], inside),
        (["--config", "config.yaml"], inside),
        (["--algo.model.policy", "sub/rollout.yaml"], {"algo.model.policy"}),
        (["--algo.task.path", "sub"], {"algo.task.path"}),
    ):
        assert fields_given(Cluster, words) & leaves == expected, words
        config = parse(Cluster, words, prog="x")
        assert config.algo.rollout.window == 64
        assert (config.algo.run.seed == 3) == ("algo.run.seed" in expected)


@pytest.mark.parametrize(("content", "said"), [
    ("window: 8\nwindow: 64\n", "'window' stands there twice"), ("window: &a 8\nslots: *a\n", "*a: write out what it stands for"),
    ("[64]", "fields, as `field: value` lines"), ("window: {", "YAML or JSON"),
])  # fmt: skip
def test_a_mistake_in_a_file_for_a_section_is_one_line_with_its_name(content, said, refuse, tmp_path, monkeypatch):
    monkeypatch.setattr("tppo_ref.runs.commands.train", lambda config: pytest.fail("one of them was taken"))
    (tmp_path / "rollout.yaml").write_text(content)
    assert said in refuse("train", "--rollout", str(tmp_path / "rollout.yaml"), words=(str(tmp_path / "rollout.yaml"),))


def test_no_command_and_help_print_the_commands(capsys):
    for argv in ([], ["--help"]):
        assert main(argv) == 0
        out = capsys.readouterr().out
        assert all(re.search(rf"^  {name} ", out, re.M) for name in ("train", "compare", "pretrain-value", "evaluate"))


# ---------------------------------------------------------------------------------------------------- files, models, folders


@pytest.mark.parametrize("field", ["run.out", "run.cache"])
def test_a_folder_that_cannot_be_written_is_named(field, refuse, tmp_path):
    (tmp_path / "file").write_text("in the way")
    below = str(tmp_path / "file" / "run")
    argv = ["train", *options(model__warm_start_steps=3), "--run.out", str(tmp_path / "out")]
    code_line = refuse(*argv, *(["--run.out", below] if field == "run.out" else []), words=(below,)) if field == "run.out" else None
    if code_line is None:
        code_line = refuse(*argv, "--run.cache", below, words=(below,), paths=False)
    assert field in code_line
    assert (tmp_path / "file").read_text() == "in the way"


GOOD_LINE = '{"prompt": "1+1", "answer": "2"}'


def jsonl(tmp_path: Path, *lines: str) -> list[str]:
    (tmp_path / "p.jsonl").write_text("\n".join([GOOD_LINE, *lines, GOOD_LINE]) + "\n")
    changes = {
        "task__name": "jsonl",
        "task__path": tmp_path / "p.jsonl",
        "task__tokenizer": "bytes",
        "task__max_prompt_tokens": 30,
    }
    return options(**changes)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "x", "answer": ', ("JSON",)),
        ('{"answer": "2"}', ("prompt",)),
        ('{"prompt": "x"}', ("answer",)),
        ('["prompt"]', ("object",)),
        ('{"prompt": 3, "answer": "2"}', ("prompt",)),
        ('{"prompt": "' + "x" * 31 + '", "answer": "2"}', ("31", "30")),
    ],
    ids=["half a line", "no prompt", "no answer", "no object", "prompt of another type", "longer than max_prompt_tokens"],
)
def test_a_bad_line_of_a_prompt_file_is_named_with_file_and_line(line, words, refuse, tmp_path):
    refuse("train", *jsonl(tmp_path, GOOD_LINE, line), words=(f"{tmp_path / 'p.jsonl'}:3", *words))


def test_a_prompt_file_that_is_not_there_is_named(refuse, tmp_path):
    refuse(
        "train",
        *options(task__name="jsonl", task__path=tmp_path / "none.jsonl", task__tokenizer="bytes"),
        words=("none.jsonl",),
    )


@pytest.fixture(scope="module", name="model_folder")
def _model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_policy().save_pretrained(folder)
    return folder


def test_a_warm_start_that_diverges_is_one_line_and_leaves_nothing(refuse, tmp_path):
    cache = tmp_path / "own-cache"
    argv = options(model__warm_start_lr=1000, model__warm_start_steps=50)
    line = refuse("train", *argv, "--run.out", str(tmp_path / "out"), "--run.cache", str(cache), paths=False)
    assert line.startswith(
        "error: model.warm_start_lr: got 1000.0, with which a gradient of the warm start is not finite; expected "
    )
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError("not enough memory"), KeyError("x")])
def test_only_a_warm_start_that_diverges_is_the_learning_rates_fault(error, tmp_path, monkeypatch):
    from tppo_ref.runs import build

    def fails(*_, **__):
        raise error

    monkeypatch.setattr(build, "warm_start", fails)
    config = replace_fields(Config(), {"task.name": "length", "run.cache": str(tmp_path)})
    with pytest.raises(type(error), match=str(error.args[0])):
        build.base_model(config, build.make_task(config))


def test_prompt_and_response_longer_than_the_models_context_are_refused(refuse, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"vocab_size": 300, "max_position_embeddings": 8}))
    refuse("train", *own_model(jsonl(tmp_path), tmp_path / "config.json"), words=("rollout.max_response_tokens", "8"))


def test_a_vocabulary_that_is_smaller_than_the_tokenizers_is_refused(refuse, tmp_path, model_folder):
    refuse("train", *own_model(jsonl(tmp_path), model_folder), words=(str(model_folder), "20", "260"))


@pytest.mark.parametrize("harm", ["empty folder", "no weights", "truncated weights", "garbage config"])
def test_a_broken_model_folder_is_one_line(harm, refuse, tmp_path, model_folder):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    weights = folder / "model.safetensors"
    if harm == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
    elif harm == "no weights":
        weights.unlink()
    elif harm == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:500])
    else:
        (folder / "config.json").write_text("{")
    refuse("train", *own_model(options(), folder), words=(str(folder),))


def test_evaluate_and_pretrain_value_refuse_in_one_line_too(refuse, tmp_path):
    refuse("evaluate", *own_model(options(), tmp_path / "none"), words=(str(tmp_path / "none"),))
    refuse("pretrain-value", *own_model(options(), tmp_path / "none"), words=(str(tmp_path / "none"),))
    refuse("compare", *options(), "--compare.methods", "[ppo, tpo]", words=("tpo", "tppo"))


@pytest.mark.parametrize("command", ["train", "evaluate", "pretrain-value"])
@pytest.mark.parametrize("own", [False, True])
def test_a_device_that_is_not_there_is_one_line_for_every_command(command, own, refuse, tmp_path):
    load_policy(TINY | {"vocab_size": 64}).save_pretrained(tmp_path / "model")
    words = own_model(options(), tmp_path / "model") if own else options()
    refuse(command, *words, "--model.device", "cuda:99", words=("device: got 'cuda:99', which is not there",))


# --------------------------------------------------------------------------------------------------------- runs that are there


@pytest.fixture(scope="module", name="run_folder")
def _run_folder(tmp_path_factory, cache) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", *options(), "--run.out", str(out), "--run.cache", str(cache)]) == 0
    return out


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_folder_that_holds_a_run_is_neither_overwritten_nor_touched(refuse, run_folder):
    before = files_of(run_folder)
    refuse("train", *options(), "--run.out", str(run_folder), words=(str(run_folder), "step 2", "run.resume"))
    assert files_of(run_folder) == before


def test_resume_without_a_checkpoint_is_refused(refuse, tmp_path):
    refuse("train", *options(run__resume="true"), "--run.out", str(tmp_path / "new"), words=("run.resume", str(tmp_path / "new")))


@pytest.mark.parametrize(
    ("field", "value"), [("policy.lr", "0.5"), ("rollout.window", "5"), ("run.seed", "3"), ("advantage.tail", "defer")]
)
def test_another_config_on_resume_is_refused_and_leaves_the_run_as_it_was(field, value, refuse, run_folder):
    before = files_of(run_folder)
    argv = ["train", *options(run__resume="true"), "--run.out", str(run_folder), f"--{field}", value]
    then = get_field(Config(), field) if field != "rollout.window" else 6
    refuse(*argv, words=(field, value, str(then)))
    assert files_of(run_folder) == before


def test_another_method_on_resume_is_refused(refuse, run_folder):
    refuse(
        "train",
        *options(run__resume="true", run__method="tppo-defer"),
        "--run.out",
        str(run_folder),
        words=("exclude", "defer"),
    )


@pytest.fixture(scope="module", name="timed_run")
def _timed_run(tmp_path_factory, cache) -> Path:
    """A run that its seconds have ended."""
    out = tmp_path_factory.mktemp("runs") / "timed"
    pairs = zip(*[iter(options())] * 2, strict=True)
    fields = [word for pair in pairs if pair[0] != "--run.steps" for word in pair]
    assert main(["train", *fields, "--run.train_seconds", "0.01", "--run.out", str(out), "--run.cache", str(cache)]) == 0
    return out


@pytest.mark.parametrize("steps", ["7", "1000"])
def test_steps_behind_the_folder_of_a_run_that_its_seconds_end_are_refused(steps, refuse, timed_run, tmp_path):
    """Also where they are as many as by default: who gives them wants the run to go on."""
    before = files_of(timed_run)
    said = f"error: run.steps: got {steps}; expected it left out: run.train_seconds 0.01 ends the run; drop it"
    assert refuse("resume", str(timed_run), "--run.steps", steps, paths=False) == said
    (tmp_path / "more.yaml").write_text(f"run: {{steps: {steps}}}\n")
    assert refuse("resume", str(timed_run), "--config", str(tmp_path / "more.yaml"), paths=False) == said
    assert files_of(timed_run) == before


def test_steps_behind_the_folder_count_where_the_seconds_are_taken_back(timed_run, tmp_path):
    out = shutil.copytree(timed_run, tmp_path / "run")
    steps = int(complete_checkpoints(out / "checkpoints")[-1].name.removeprefix("step-")) + 1
    assert main(["resume", str(out), "--run.train_seconds", "null", "--run.steps", str(steps)]) == 0
    assert complete_checkpoints(out / "checkpoints")[-1].name == f"step-{steps:08d}"


def test_what_the_run_was_given_before_is_not_refused_where_it_does_nothing_now(run_folder, tmp_path):
    """Its run.steps stands in config.json; seconds may end it from now on."""
    out = shutil.copytree(run_folder, tmp_path / "run")
    assert main(["resume", str(out), "--run.train_seconds", "0.01"]) == 0


def test_a_run_leaves_its_config_versions_metrics_and_tables(run_folder):
    config = json.loads((run_folder / "config.json").read_text())
    assert config["rollout"]["window"] == 6
    assert {"torch", "transformers", "python", "numpy"} <= json.loads((run_folder / "versions.json").read_text()).keys()
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [0, 1, 2, 2], "an evaluation before, two steps, an evaluation after"
    assert "eval/accuracy" in records[0]
    assert "eval/accuracy" in records[-1]
    timeline = (run_folder / "timeline.csv").read_text().splitlines()
    assert sum(int(line.split(",")[5]) for line in timeline[1:]) == records[2]["ledger/generated"]
    assert list((run_folder / "tensorboard").iterdir())


# ------------------------------------------------------------------------------------------------------------ configuration


def test_every_option_of_the_command_line_wins_over_the_file_which_wins_over_the_default(tmp_path):
    (tmp_path / "c.yaml").write_text("rollout: {window: 7, slots: 9}\npolicy: {dual_clip: null}\n")
    config = parse(Config, ["--config", str(tmp_path / "c.yaml"), "--rollout.window", "5"], prog="x")
    assert parse(Config, ["--rollout.window", "5", "--config", str(tmp_path / "c.yaml")], prog="x") == config
    assert parse(Config, ["--rollout.window=5", f"--config={tmp_path / 'c.yaml'}"], prog="x") == config
    assert (config.rollout.window, config.rollout.slots, config.rollout.refill) == (5, 9, "immediate")
    assert config.policy.dual_clip is None
    assert config.value == Config().value


def test_a_config_survives_the_file_that_a_run_writes(tmp_path):
    config = replace_fields(
        Config(), {"policy.dual_clip": None, "run.train_seconds": 2.5, "compare.per_method": {"ppo": {"policy.lr": 0.1}}}
    )
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    assert parse(Config, ["--config", str(tmp_path / "config.json")], prog="x") == config


def test_the_config_is_frozen_and_keyword_only():
    for section in dataclasses.fields(Config):
        part = getattr(Config(), section.name)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, dataclasses.fields(part)[0].name, 1)
        with pytest.raises(TypeError):
            type(part)(1)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_a_set_of_fields_that_can_run(method):
    config = apply_method(Config(), method)
    check(config)
    assert config.run.method == method
    if method.startswith("ppo"):
        assert config.rollout.window == config.rollout.max_response_tokens
        assert config.rollout.refill == "batch"


def test_the_defaults_can_run_and_the_papers_are_the_papers():
    config = Config()
    check(config)
    assert (config.advantage.gamma, config.advantage.lam, config.advantage.lam_alpha) == (1.0, 0.95, 0.05)
    assert (config.policy.clip_low, config.policy.clip_high, config.policy.dual_clip) == (0.2, 0.28, 10.0)
    assert (config.value.clip_low, config.value.clip_high) == (0.5, 0.6)
    assert (config.advantage.tail, config.advantage.tail_tokens, config.advantage.clamp) == ("exclude", 8, 10.0)
    assert (config.policy.lm_loss_weight, config.policy.weight_decay, config.policy.epochs) == (0.1, 0.1, 1)


def helps() -> dict[str, str]:
    """field -> its line of help, read from the source of the settings."""
    import ast
    import inspect

    import tppo_ref.loop.settings
    import tppo_ref.runs.config

    found = {}
    sections = {type(getattr(Config(), f.name)).__name__: f.name for f in dataclasses.fields(Config)}
    rooms = (tppo_ref.loop.settings, tppo_ref.runs.config)
    for node in (node for room in rooms for node in ast.parse(inspect.getsource(room)).body):
        if isinstance(node, ast.ClassDef) and node.name in sections:
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                    found[f"{sections[node.name]}.{field.target.id}"] = text.value.value
    return found


@pytest.mark.parametrize("field", field_paths(Config))
def test_every_field_has_a_line_of_help_that_ends_in_the_provenance_of_its_default(field):
    text = helps()[field]
    assert "\n" not in text
    assert re.search(r"[.:)] \[(S|P|R|V|2|I|M|O)\]$", text), text


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_a_line_per_field_with_its_default(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help-all"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    body = " ".join(out[out.index("options:") if "options:" in out else 0 :].split())
    for field, text in helps().items():
        assert f"--{field} " in body, field
        assert " ".join(text.split()) in body, field
    assert "default: 64" in body


def test_every_leaf_of_the_config_has_a_type_that_the_command_line_can_fill():
    for section in dataclasses.fields(Config):
        for name, hint in typing.get_type_hints(type(getattr(Config(), section.name))).items():
            assert "Any" not in str(hint) or name == "per_method", f"{section.name}.{name}"


@pytest.mark.parametrize(("text", "number"), [("6e-4", 6e-4), ("0.5", 0.5)])
def test_a_number_that_yaml_took_for_a_text_is_a_number(text, number):
    assert replace_fields(Config(), {"policy.lr": text}).policy.lr == number


def test_a_text_that_is_no_number_is_refused_by_name():
    with pytest.raises(UserError, match=r"policy\.lr: got 'fast'; expected a number"):
        replace_fields(Config(), {"policy.lr": "fast"})


@pytest.mark.parametrize("written", ["rollout.windw", "window", "value.window"])
def test_replacing_an_unknown_field_names_it_and_the_nearest(written):
    """`compare.per_method` comes this way."""
    with pytest.raises(UserError) as error:
        replace_fields(Config(), {written: 1})
    assert str(error.value).startswith(f"{written}:")
    assert "rollout.window" in str(error.value)


# ----------------------------------------------------------------------------------------------------------- in a process


def start(*argv: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tppo_ref", *argv]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)  # fmt: skip


def test_ctrl_c_ends_at_a_steps_edge_with_a_checkpoint_and_exit_code_130(tmp_path, cache):
    out = tmp_path / "run"
    process = start("train", *options(run__steps=10**6, run__checkpoint_every=0), "--run.out", str(out), "--run.cache", str(cache))
    try:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_text().splitlines()) < 4:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline, "no step within two minutes"
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert "Traceback" not in stdout + stderr
    (checkpoint,) = complete_checkpoints(out / "checkpoints")
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert read_state(checkpoint)["trainer"]["num_steps"] == steps[-1] >= 3


def test_a_broken_checkpoint_ends_the_process_with_one_line_and_exit_code_2(tmp_path, run_folder, cache):
    """In a process of its own: whatever was started before the mistake was found must end, too."""
    import shutil

    out = tmp_path / "run"
    shutil.copytree(run_folder, out)
    (newest,) = complete_checkpoints(out / "checkpoints")
    state = json.loads((newest / "state.json").read_text())
    del state["trainer"]
    (newest / "state.json").write_text(json.dumps(state))
    (newest / "manifest.json").write_text("{}")
    given = options(run__resume="true", run__steps=3, advantage__tail_tokens=2, run__out=out, run__cache=cache)
    process = start("train", *given)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    assert newest.name in lines[0]


def test_an_abbreviated_field_is_refused_not_guessed():
    with pytest.raises(UserError, match=r"--rollout\.windo: no such option; did you mean rollout\.window\?"):
        parse(Config, ["--rollout.windo", "4"], prog="python -m tppo_ref train")


# ------------------------------------------------------------------------------------------- a value model of another size


def critic(folder: Path, **changes: object) -> Path:
    shape = dict(model_type="llama", vocab_size=64, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=1,
                 num_key_value_heads=1, max_position_embeddings=64)  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape | changes))
    return folder / "config.json"


@pytest.mark.parametrize(("changes", "words"), [
    ({"vocab_size": 5}, ("model.value", "a vocabulary of 5 tokens", "expected the")),
    ({"max_position_embeddings": 12}, ("model.value", "made for 12 positions", "rollout.max_response_tokens")),
])  # fmt: skip
def test_a_critic_that_cannot_read_what_the_policy_writes_is_refused(changes, words, tmp_path, refuse):
    file = critic(tmp_path / "critic", **changes)
    refuse("train", *options(), "--model.value", str(file), words=(str(file), *words))


def test_a_critic_with_another_tokenizer_beside_it_is_refused(tmp_path):
    from types import SimpleNamespace

    import tokenizers

    from tppo_ref.runs.build import check_value, model_config

    file = critic(tmp_path / "critic")
    ours, theirs = {"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 2, "c": 1, "d": 3}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(theirs, unk_token="a")).save(str(file.parent / "tokenizer.json"))
    model = model_config("model.value", str(file))
    task = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=lambda: ours), vocab_size=3, max_prompt_tokens=4)
    config = replace_fields(Config(), {"rollout.max_response_tokens": 60})
    with pytest.raises(
        UserError, match=r"model\.value: got .*, whose tokenizer gives 'b' and 1 other tokens another number or none"
    ):
        check_value(config, task, model, str(file.parent))
    ours.update(b=2, c=1)
    check_value(config, task, model, str(file.parent))  # it knows more tokens than the task: padded vocabularies differ, too
    with pytest.raises(UserError, match="made for 64 positions; expected a value model for the 65"):
        check_value(replace_fields(config, {"rollout.max_response_tokens": 61}), task, model, str(file.parent))
