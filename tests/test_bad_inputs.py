"""Files, shapes and names that no run can begin with: each is one line on stderr with its remedy, at once, and exit code 2."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from helpers import one_thread  # noqa: F401  (a fixture)

from tppo_ref.__main__ import main

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = {"model_type": "qwen2", "vocab_size": 260, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """Runs a command that must be refused; its one line."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "answer": "1"}\n' * 4)

    def run(*argv: str) -> str:
        capfd.readouterr()
        assert main([*argv, "--run.cache", "cache"]) == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if "warn" not in line.lower() and "init." not in line]
        assert line.startswith("error: ")
        assert len(line) < 1000
        assert not Path("cache").exists() or not os.listdir("cache"), "a base model was made before the refusal"
        return line

    return run


JSONL = (
    "train",
    "--task.name",
    "jsonl",
    "--task.path",
    "p.jsonl",
    "--task.tokenizer",
    "bytes",
    "--rollout.max_response_tokens",
    "8",
)


@pytest.mark.parametrize(("content", "said"), [
    ("run:\n  steps: 1\n  steps: 2\n", "'steps' stands there twice"), ("run: {steps: 1}\nrun: {seed: 2}\n", "'run' stands there twice"),
    ('{"run": {"steps": 1, "steps": 2}}', "'steps' stands there twice"), ("[" * 20_000, "more than 20 levels"),
    ("run: " + "[" * 20_000, "more than 20 levels"), ("{a: " * 5000, "more than 20 levels"), ("a: &x [1]\nb: {c: *x}\n", "*x: write out"),
    ("run: !!python/object/apply:os.getpid []\n", "constructor"), ("run:\n\tsteps: 1\n", "YAML"), ("\x00", "YAML"), ("\udc80", "YAML"),
    ("run:\n  eval_every_s: .nan\n", "run.eval_every_s: got nan"), ("run: 3\n", "c.yaml with run: '3'"), ("- 1\n", "c.yaml with the file"), ("", "c.yaml"),
])  # fmt: skip
def test_a_config_file_that_means_two_things_or_nothing(refused, content, said):
    Path("c.yaml").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert said in refused("train", "--config", "c.yaml")


def test_the_same_of_scale(tmp_path, capfd):
    from scale.launch import main as launch

    (tmp_path / "c.yaml").write_text("algo:\n  run: {steps: 1, steps: 2}\n")
    assert launch(["--config", str(tmp_path / "c.yaml")]) == 2
    assert "'steps' stands there twice" in capfd.readouterr().err


@pytest.mark.parametrize(
    "argv", [("train", "--config", "pipe"), (*JSONL, "--model.policy", "pipe"), (*JSONL, "--task.path", "pipe")]
)
def test_a_pipe_is_not_waited_for(refused, argv):
    os.mkfifo("pipe")
    assert "pipe" in refused(*argv)


@pytest.mark.parametrize(
    "field", ["rollout.slots", "rollout.window", "run.seed", "policy.lr", "value.clip_low", "policy.dual_clip", "run.steps"]
)
@pytest.mark.parametrize("number", ["1e20", "100000000000000000000", "nan", "inf", "-inf", "1e400"])
def test_numbers_that_are_none_or_astronomical(refused, field, number):
    assert field in refused("train", f"--{field}", number)


@pytest.mark.parametrize(("fields", "said"), [
    ({"num_hidden_layers": 0}, "num_hidden_layers: got 0; expected an integer from 1 to 1,000"),
    ({"intermediate_size": 0}, "intermediate_size: got 0; expected an integer from 1"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers: got 1e+09; expected at most 1,000"), ({"vocab_size": 0}, "vocabulary of 0 tokens"),
    ({"vocab_size": 10}, "vocabulary of 10 tokens; expected the 260 of the task's tokenizer; give the model's own tokenizer"),
    ({"hidden_size": 2**24}, "GB of float32; expected at most the"), ({"vocab_size": 10**12}, "a shape of 16,000,000,"), ({"hidden_size": "x"}, "hidden_size"),
    ({"num_attention_heads": 3}, "does not run"), ({"model_type": "nope"}, "nope"), ({"model_type": 3}, "model_type"), ({"vocab_size": None}, "vocab"),
])  # fmt: skip
def test_a_shape_that_is_none_or_that_no_machine_holds(refused, fields, said):
    Path("m.json").write_text(json.dumps(SHAPE | fields))
    assert said in refused(*JSONL, "--model.policy", "m.json")


@pytest.mark.parametrize(
    "content", ['{"model_type": "qwen2", "model_type": "llama"}', "[" * 20_000, "", "3", "\x00", '{"model_type": "qwen2"']
)
def test_a_models_config_that_cannot_be_read(refused, content):
    Path("m.json").write_text(content)
    assert "m.json" in refused(*JSONL, "--model.policy", "m.json")


@pytest.mark.parametrize(("argv", "said"), [
    (("--model.hidden_size", "65536", "--model.num_layers", "1000"), "GB of float32; expected at most the"),
    (("--model.num_layers", "1000000000"), "model.num_layers: got 1000000000"), (("--task.path", "p.jsonl"), "task.path: got p.jsonl; expected it left out"),
    (("--rollout.max_response_tokens", "100000000"), "the model's context"), (("--run.out", "a\0b"), "run.out"), (("--model.value", "nowhere"), "model.value"),
    (("--model.device", "meta"), "device"), (("--model.policy", "x" * 5000), "no such file"), (("--task.verifier_timeout_s", "1e300"), "verifier_timeout_s"),
    (("--run.profile_steps", "5:3"), "run.profile_steps: got 5:3; expected FIRST:LAST, as 3:5"), (("--run.peak_tflops", "-1"), "run.peak_tflops: got -1"),
])  # fmt: skip
def test_what_is_refused_before_a_base_model_is_made(refused, argv, said):
    assert said in refused("train", *argv)


@pytest.mark.parametrize("command", ["train", "pretrain-value", "compare"])
def test_a_value_model_of_another_vocabulary_is_refused_before_a_base_model_is_made(refused, command):
    Path("m.json").write_text(json.dumps(SHAPE | {"vocab_size": 3}))
    line = refused(command, "--model.value", "m.json")
    assert "model.value: got m.json with a vocabulary of 3 tokens; expected the " in line
    assert line.endswith("; take a model that was made for it, or leave model.value out")
