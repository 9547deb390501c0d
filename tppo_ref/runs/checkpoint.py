"""Exact resume: N steps, a kill, a restart and N more steps give bit for bit what 2N steps give.

A checkpoint is a folder `step-00000120` with both models (save_pretrained), optimisers, in-flight and held-back responses with
their log-probabilities, versions and stored values, the sample stream's position and the counters. It is written beside and
renamed, and its manifest is written last: a half-written one is never picked up. Loading runs no code: safetensors, JSON and
`torch.load(weights_only=True)`.

The loop draws its random numbers from (seed, step) and from (seed, prompt, sample, position), so there is no generator whose state
could be lost; torch's global one is stored for whoever extends the loop.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tppo_ref.loop.trainer import Trainer
from tppo_ref.method.errors import NonFiniteError, UserError

MANIFEST = "manifest.json"
STATE_KEYS = ("trainer", "config")


def save_checkpoint(trainer: Trainer, folder: Path, *, keep: int, config: dict[str, Any]) -> Path:
    """Write `folder/step-N` and remove all but the newest `keep`. Returns its path.

    A full disk or a missing permission is a UserError; the checkpoints that are there stay good.
    """
    final = folder / f"step-{trainer.num_steps:08d}"
    beside = folder / f".unfinished-{final.name}-{os.getpid()}"
    for learner in (trainer.policy_learner, trainer.value_learner):
        if not math.isfinite(float(torch.nn.utils.get_total_norm(list(learner.module.parameters())))):
            raise NonFiniteError(f"step {trainer.num_steps}: the {learner.name}'s weights are not finite; they were not saved")
    if (final / MANIFEST).exists():  # the same step again: a stop right after a periodic one
        return final
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".unfinished-*"):
            shutil.rmtree(stale, ignore_errors=True)
        beside.mkdir()
        _write(trainer, beside, config)
        shutil.rmtree(final, ignore_errors=True)  # without a manifest: somebody's half-written one
        os.rename(beside, final)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors say "disk full" in their own ways
        shutil.rmtree(beside, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(f"checkpoint {final}: cannot be written ({reason}); free some space or choose another run.out; "
                        f"earlier checkpoints are good") from None  # fmt: skip
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _write(trainer: Trainer, folder: Path, config: dict[str, Any]) -> None:
    trainer.policy_learner.module.save_pretrained(folder / "policy")
    trainer.value_learner.module.save_pretrained(folder / "value")
    if trainer.ewma is not None:
        # Named parameters hold a tied weight once; safetensors refuses tensors that share memory.
        save_file({name: p.detach().clone() for name, p in trainer.ewma.module.named_parameters()}, folder / "ewma.safetensors")
    optimisers = {learner.name: learner.optimiser.state_dict() for learner in (trainer.policy_learner, trainer.value_learner)}
    torch.save(optimisers, folder / "optimisers.pt")
    (folder / "state.json").write_text(json.dumps({"trainer": trainer.state_dict(), "config": config}))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(folder)): file_digest(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*files, folder / MANIFEST]:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints whose manifest is there, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def read_state(folder: Path) -> dict[str, Any]:
    """The state.json of a checkpoint whose every file is as it was written; else a UserError that names the file."""
    remedy = "remove this folder to go on from the one before"
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name, digest in manifest.items():
            if file_digest(folder / name) != digest:
                raise UserError(f"checkpoint {folder}: {name} is not what was written; {remedy}")
        state = json.loads((folder / "state.json").read_text())
        missing = [key for key in STATE_KEYS if key not in state]
        if missing or not isinstance(state["config"], dict):
            raise UserError(f"checkpoint {folder}: state.json lacks {', '.join(missing) or 'a config'}; {remedy}")
        return state
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"checkpoint {folder}: cannot be read ({error}); {remedy}") from None


def load_checkpoint(trainer: Trainer, folder: Path) -> None:
    """Bring a trainer that was built from the same config, with models from `folder`, to the state that was saved there."""
    state = read_state(folder)
    try:
        optimisers = torch.load(folder / "optimisers.pt", weights_only=True)
        for learner in (trainer.policy_learner, trainer.value_learner):
            learner.optimiser.load_state_dict(optimisers[learner.name])
        if trainer.ewma is not None:
            averaged = load_file(folder / "ewma.safetensors")
            for name, parameter in trainer.ewma.module.named_parameters():
                parameter.data.copy_(averaged[name])
        trainer.load_state_dict([state["trainer"]])
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(f"checkpoint {folder}: does not fit this run ({first_line}); use the run's own config") from None
    trainer.engine.load_weights(trainer.policy_learner.module.named_tensors(), trainer.version)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
