"""One pre-trained value model for all methods and seeds of a comparison, kept under run.cache."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path

from tppo_ref.runs.commands import pretrain_value
from tppo_ref.runs.config import Config
from tppo_ref.runs.inputs import digest_of, inputs_of
from tppo_ref.runs.references import FILE
from tppo_ref.runs.run_folder import move_into_place
from tppo_ref.runs.validation import writable_folder
from tppo_ref.tasks import Task
from tppo_ref.tasks.verifier import Verifier

NOT_READ = ("window", "refill", "responses_per_step")
"""Fields of the rollout that `pretrain-value` does not read: it samples whole responses."""


def cached_value(config: Config, task: Task, verifier: Verifier, references: Path | None = None) -> Path:
    """A pre-trained value model under run.cache, made where it is not there yet: one for all methods and seeds of a comparison.

    references   a list of bad references that was made already

    The folder's name holds a hash of what determines it: prompts, verifier's code and base model's weights included. Written
    beside and renamed: a folder that is there is complete, and of two comparisons that make the same at once either's will do.
    UserError where the cache cannot be written.
    """
    fields = dataclasses.asdict(config)
    determined_by = {
        "rollout": {name: field for name, field in fields["rollout"].items() if name not in NOT_READ},
        "gamma": config.advantage.gamma, "seed": config.run.seed, "inputs": inputs_of(config, task, verifier),
        **{section: fields[section] for section in ("task", "model", "value")},
    }  # fmt: skip
    name = digest_of(determined_by)[:16]
    folder = Path(config.run.cache) / f"value-{name}"
    if not folder.exists():
        cache = writable_folder(config.run.cache, "run.cache")
        beside = Path(tempfile.mkdtemp(prefix=".unfinished-value-", dir=cache))  # a name of its own: process numbers come again
        try:
            if references and references.exists():
                shutil.copy(references, beside / FILE)
            pretrain_value(dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(beside))))
            move_into_place(beside, folder)
            print(f"value model: {folder / 'value'}")
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder / "value"
