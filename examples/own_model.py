"""A model's folder as Hugging Face has it, and prompts as GSM8K has them. Copy this file, and change what you need.

    python examples/own_model.py MODEL_FOLDER PROMPTS.jsonl [--section.field VALUE ...]

A line of the prompt file: {"question": "...", "answer": "... #### 72"}. Three commands, one after the other: can every reference
be read, a value model from responses of the policy, training.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

from tppo_ref.__main__ import main

OUT = Path("runs/own_model")


def train(model: str, prompts: str, arguments: Sequence[str], out: Path = OUT) -> int:
    """The exit code of the last command; the run is in `out`/run."""
    chat = AutoTokenizer.from_pretrained(model, local_files_only=True).chat_template is not None
    task = ["--task.name", "jsonl", "--task.path", prompts, "--task.chat_template", str(chat).lower(), "--model.policy", model]
    if main(["check-data", prompts, *arguments]) == 2:  # 1: some references cannot be read; their prompts will be left out
        return 2
    critic = ["--run.out", str(out / "critic")]
    if not (out / "critic" / "value").exists() and (code := main(["pretrain-value", *task, *arguments, *critic])):
        return code
    value = ["--model.value", str(out / "critic" / "value"), "--run.out", str(out / "run")]
    return main(["train", *task, *arguments, *value])


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit("usage: python examples/own_model.py MODEL_FOLDER PROMPTS.jsonl [--section.field VALUE ...]")
    sys.exit(train(sys.argv[1], sys.argv[2], sys.argv[3:]))
