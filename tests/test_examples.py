"""Both examples run as they stand, on a few small steps."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--run.steps", "2", "--rollout.slots", "4", "--run.progress", "false", "--run.eval_samples", "1"]


def run(name: str, folder: Path, *arguments: str) -> str:
    """What an example printed."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, str(ROOT / "examples" / name), *arguments, *QUICK], cwd=folder, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def scores(run: Path) -> list[float]:
    with (run / "responses.csv").open(newline="") as file:
        return [float(row["score"]) for row in csv.DictReader(file)]


def test_a_task_of_ones_own_with_a_verifier_of_ones_own(tmp_path):
    printed = run("own_task.py", tmp_path)
    assert "checkpoint: runs/own_task/run/checkpoints/step-00000002" in printed
    found = scores(tmp_path / "runs/own_task/run")
    assert found
    assert set(found) <= {1.0, -1.0}
    listed = json.loads((tmp_path / "runs/own_task/run/references.json").read_text())
    assert (listed["verifier"], listed["left_out"]) == ("own_task:verify", [])


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder as save_pretrained writes it: a byte-level BPE tokenizer with a chat template, and a tiny Qwen2."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator(
        ["How many apples? #### 72"], trainers.BpeTrainer(special_tokens=["<end>"], initial_alphabet=letters, vocab_size=280)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    config = Qwen2Config(vocab_size=320, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                         num_key_value_heads=1, max_position_embeddings=256, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    tokenizer.save_pretrained(tmp_path / "model")
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_of_a_model_and_prompts_as_gsm8k_has_them(model, tmp_path):
    lines = [{"question": f"What is {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(12)]
    lines.append({"question": "What is it?", "answer": "#### "})
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[-1:] + lines[:-1]))
    printed = run("own_model.py", tmp_path, str(model), "prompts.jsonl", "--rollout.window", "8", "--rollout.max_response_tokens", "16",
                  "--value.pretrain_responses", "8", "--value.pretrain_epochs", "1", "--run.eval_prompts", "1")  # fmt: skip
    assert "1 of 13 references fail against themselves" in printed
    assert (tmp_path / "runs/own_model/critic/value/model.safetensors").exists()
    assert "checkpoint: runs/own_model/run/checkpoints/step-00000002" in printed


@pytest.mark.parametrize("name", ["own_task.py", "own_model.py"])
def test_an_example_is_short_and_linked_and_shipped(name):
    assert len((ROOT / "examples" / name).read_text().splitlines()) <= 60
    assert f"examples/{name}" in (ROOT / "README.md").read_text()
    assert "graft examples" in (ROOT / "MANIFEST.in").read_text()
