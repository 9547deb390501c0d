"""What a run's results depend on and its configuration only names: prompts, a verifier's code, models. As digests.

Whoever keeps a result for the next time (a pre-trained critic, a finished run of a comparison) keeps these beside it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from tppo_ref.method.records import Prompt
from tppo_ref.runs.checkpoint import file_digest
from tppo_ref.runs.config import Config
from tppo_ref.runs.own_rule import FIELD, file_of_rule, rule_of
from tppo_ref.tasks import Task
from tppo_ref.tasks.verifier import Verifier


def inputs_of(config: Config, task: Task, verifier: Verifier) -> dict[str, str]:
    """By what it is: a digest of each thing that `config` names and that may have changed under its name."""
    return {
        "prompts": digest_of(prompts_of(task)),
        "verifier": digest_of([verifier.verifier, verifier.code]),
        "model.policy": model_digest(config.model.policy),
        "model.value": model_digest(config.model.value),
    }


def rule_digest(config: Config) -> dict[str, str]:
    """Of the file of the module in which the rule at the cut is; "" for a rule of `egae`. UserError where it cannot be had.

    Apart from `inputs_of`: methods of one comparison may have different ones, and a critic that is kept depends on none.
    """
    name = config.advantage.cut_value
    if rule_of(config) is None:
        return {FIELD: ""}
    file = file_of_rule(name)
    return {FIELD: file_digest(file) if file else digest_of(name)}


def prompts_of(task: Task) -> list[list[Prompt]]:
    """Those of both splits, as they are."""
    return [list(task.prompts(split)) for split in ("train", "test")]


def model_digest(source: str | None) -> str:
    """Of the shape and the weights in a model's folder, or of a config.json; "" where there is none."""
    if source is None:
        return ""
    path = Path(source)
    files = [path] if path.is_file() else sorted([*path.glob("config.json"), *path.glob("*.safetensors")])
    return digest_of([[file.name, file_digest(file)] for file in files])


def digest_of(things: Any) -> str:
    """SHA-256 of nested lists, dicts, numbers, texts and dataclasses."""
    return hashlib.sha256(json.dumps(things, sort_keys=True, default=dataclasses.asdict).encode()).hexdigest()
