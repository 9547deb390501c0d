"""A task of your own with a verifier of your own. Copy this file, and change the three functions.

    python examples/own_task.py [--run.steps 200] [--section.field VALUE ...]

The task here: say something with a certain letter in it. The policy begins at random, in bytes, and is right now and then.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tppo_ref.__main__ import main

SHAPE = {
    "model_type": "qwen2", "vocab_size": 260, "hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip


def prompts() -> list[dict[str, str]]:
    """One object per prompt; what is in "answer" is handed to the verifier."""
    return [{"prompt": f"{greeting}, say {letter}!", "answer": letter} for greeting in ("hello", "please") for letter in "aeiou"]


def verify(answer: str, response_token_ids: Sequence[int], response_text: str | None) -> float:
    """+1 for a right response, -1 for a wrong one. Runs in a process of its own, which is killed where it takes too long."""
    return 1.0 if answer in (response_text or "") else -1.0


def wrap_reference(answer: str) -> str:
    """A right response to a prompt with this answer: each is tried before training. Leave this out if there is none."""
    return f"the letter {answer}"


def train(arguments: Sequence[str], folder: Path = Path("runs/own_task")) -> int:
    """Write the prompts and the shape of a model, and train. Give a model's folder as --model.policy to begin from that."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts()))
    (folder / "model.json").write_text(json.dumps(SHAPE))
    prompt_file, shape_file = str(folder / "prompts.jsonl"), str(folder / "model.json")
    return main([
        "train", "--task.name", "jsonl", "--task.path", prompt_file, "--task.eval_path", prompt_file, "--task.tokenizer", "bytes",
        "--task.verifier", "own_task:verify", "--model.policy", shape_file, "--rollout.slots", "64", "--rollout.window", "8",
        "--rollout.max_response_tokens", "12", "--advantage.tail_tokens", "2", "--policy.lr", "3e-3", "--run.eval_samples", "8",
        "--run.steps", "200", "--run.out", str(folder / "run"), *arguments,
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
