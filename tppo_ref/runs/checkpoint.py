"""Exact resume: N steps, a kill, a restart and N more steps give bit for bit what 2N steps give.

A checkpoint is a folder `step-00000120` with both models (save_pretrained), optimisers, and the Trainer's state: in-flight and
held-back responses with their log-probabilities, versions and stored values, the sample stream's position, the counters. It is
written beside and renamed, and its manifest is written last: a half-written one is never picked up. Loading runs no code:
safetensors, JSON and `torch.load(weights_only=True)`.

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from tppo_ref.loop.trainer import Trainer
from tppo_ref.method.errors import NonFiniteError, UserError

MANIFEST = "manifest.json"
FORMAT = 2  # of the folder; 1, without a number, was written before the Trainer's state had a place of its own
REMEDY = "remove this folder to go on from the one before"


class LocalCheckpointer:
    """Writes and reads checkpoints of a run in one process, and keeps the newest `keep`."""

    def __init__(self, folder: Path, config: Mapping[str, Any], *, keep: int):
        self.folder, self.config, self.keep = folder, config, keep

    def complete(self) -> list[Path]:
        return complete_checkpoints(self.folder)

    def saved_config(self, checkpoint: Path) -> dict[str, Any]:
        return read_state(checkpoint)["config"]

    def poll(self) -> None:
        """Nothing goes on in the background."""

    def finish(self) -> None:
        """Nothing goes on in the background."""

    def save(self, trainer: Trainer) -> Path:
        """Write `folder/step-N` and remove all but the newest ones. Returns its path.

        A full disk or a missing permission is a UserError; the checkpoints that are there stay good.
        """
        final = self.folder / f"step-{trainer.num_steps:08d}"
        beside = self.folder / f".unfinished-{final.name}-{os.getpid()}"
        for learner in (trainer.policy_learner, trainer.value_learner):
            if not math.isfinite(float(torch.nn.utils.get_total_norm(list(learner.module.parameters())))):
                raise NonFiniteError(f"step {trainer.num_steps}: the {learner.name}'s weights are not finite; they were not saved")
        if (final / MANIFEST).exists():  # the same step again: a stop right after a periodic one
            return final
        try:
            clear_for(beside)
            self._write(trainer, beside)
            shutil.rmtree(final, ignore_errors=True)  # without a manifest: somebody's half-written one
            os.rename(beside, final)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors say "disk full" in their own ways
            shutil.rmtree(beside, ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise UserError(f"checkpoint {final}: cannot be written ({reason}); free some space or choose another run.out; "
                            f"earlier checkpoints are good") from None  # fmt: skip
        remove_all_but(self.folder, self.keep)
        return final

    def _write(self, trainer: Trainer, folder: Path) -> None:
        learners = (trainer.policy_learner, trainer.value_learner)
        for learner in learners:
            learner.module.save_pretrained(folder / learner.name)
        if trainer.ewma is not None:
            # Named parameters hold a tied weight once; safetensors refuses tensors that share memory.
            save_file({name: p.detach().clone() for name, p in trainer.ewma.masters.tensors.items()}, folder / "ewma.safetensors")
        for learner in learners:
            if apart := learner.masters.apart:
                save_file(apart, folder / f"{learner.name}-masters.safetensors")
        optimisers = {learner.name: learner.optimiser.state_dict() for learner in learners}
        torch.save(optimisers, folder / "optimisers.pt")
        (folder / "state.json").write_text(json.dumps({"config": self.config, "trainer": trainer.state_dict()}))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        write_manifest(folder, {"sha256": {str(path.relative_to(folder)): file_digest(path) for path in files}})
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def load(self, trainer: Trainer, checkpoint: Path) -> None:
        """Bring a trainer that was built from the same config, with models from `checkpoint`, to the state that was saved there."""
        state = read_state(checkpoint)
        try:
            optimisers = torch.load(checkpoint / "optimisers.pt", weights_only=True)
            for learner in (trainer.policy_learner, trainer.value_learner):
                learner.optimiser.load_state_dict(optimisers[learner.name])
                if learner.masters.apart:
                    learner.masters.load(load_file(checkpoint / f"{learner.name}-masters.safetensors"))
            if trainer.ewma is not None:
                trainer.ewma.masters.load(load_file(checkpoint / "ewma.safetensors"))
            trainer.load_state_dict([state["trainer"]])
        except (
            OSError,
            LookupError,
            TypeError,
            AttributeError,
            ValueError,
            RuntimeError,
            SafetensorError,
            pickle.UnpicklingError,
        ) as error:
            first_line = str(error).strip().partition("\n")[0]
            raise UserError(f"checkpoint {checkpoint}: does not fit this run ({first_line}); use the run's own config") from None


# ------------------------------------------------------------------------------------------------------- a checkpoint as a folder


def complete_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints whose manifest is there, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def clear_for(beside: Path) -> None:
    """An empty folder `beside` to write a checkpoint in; what a kill left of earlier ones goes."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    for stale in beside.parent.glob(".unfinished-*"):
        shutil.rmtree(stale, ignore_errors=True)
    beside.mkdir()


def remove_all_but(folder: Path, keep: int) -> None:
    """Only the newest `keep` complete checkpoints stay."""
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """The last file of a checkpoint: with it, the folder is one."""
    with (folder / MANIFEST).open("w") as file:
        json.dump({"format": FORMAT, **content}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest. UserError where it cannot be read or is of another format; a missing file is an OSError."""
    manifest = json.loads((folder / MANIFEST).read_text())
    if not isinstance(manifest, dict) or not manifest:
        raise ValueError(f"{MANIFEST} holds no manifest")
    if (number := manifest.get("format", 1)) != FORMAT:
        raise UserError(f"checkpoint {folder}: got format {number}; expected {FORMAT}; go on with the version of tppo-ref that "
                        f"wrote it, or start anew in another run.out")  # fmt: skip
    return manifest


def read_state(folder: Path) -> dict[str, Any]:
    """The state.json of a checkpoint whose every file is as it was written; else a UserError that names the file."""
    try:
        for name, digest in read_manifest(folder)["sha256"].items():
            refuse_changed(folder, name, digest)
        state = json.loads((folder / "state.json").read_text())
        missing = [key for key in ("config", "trainer") if not isinstance(state.get(key), dict)]
        if missing:
            raise UserError(
                f"checkpoint {folder}: got a state.json without {', '.join(missing)}; expected what was written; {REMEDY}"
            )
        return state
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError(f"checkpoint {folder}: got what cannot be read ({error}); expected what was written; {REMEDY}") from None


def refuse_changed(folder: Path, name: str, digest: str) -> None:
    """UserError where a file of a checkpoint is not the one that was written."""
    if file_digest(folder / name) != digest:
        raise UserError(f"checkpoint {folder}: got another {name}; expected what was written; {REMEDY}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
