"""One pre-trained value model for all methods and seeds of a comparison, kept under run.cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

from tppo_ref.runs.checkpoint import file_digest
from tppo_ref.runs.commands import pretrain_value
from tppo_ref.runs.config import Config
from tppo_ref.tasks import Task


def cached_value(config: Config, task: Task) -> Path:
    """A pre-trained value model under run.cache, made where it is not there yet: one for all methods and seeds of a comparison.

    The folder's name holds a hash of what determines it, the base model's weights and the prompts included. Written beside and
    renamed: a folder that is there is complete.
    """
    all_fields = dataclasses.asdict(config)
    rollout = {name: field for name, field in all_fields["rollout"].items() if "tokens" in name or name == "temperature"}
    base = Path(config.model.policy or "")
    weights = [base] if base.is_file() else sorted(base.glob("*.safetensors"))
    determined_by = {
        "task": all_fields["task"], "model": all_fields["model"], "value": all_fields["value"], "rollout": rollout,
        "gamma": config.advantage.gamma, "seed": config.run.seed, "weights": [file_digest(path) for path in weights],
        "prompts": [dataclasses.astuple(prompt) for prompt in task.prompts("train")],
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(determined_by, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(config.run.cache) / f"value-{name}"
    if not folder.exists():
        beside = Path(config.run.cache) / f".unfinished-value-{name}-{os.getpid()}"
        try:
            pretrain_value(dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(beside))))
            os.rename(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder / "value"
