"""Exact resume: N steps, a kill, a restart and N more steps give bit for bit what 2N steps give.

A checkpoint is a folder `step-00000120` with the models (save_pretrained), optimisers, and the Trainer's state: in-flight and
held-back responses with their log-probabilities, versions and stored values, the sample stream's position, the counters. It is
written beside and renamed, and its manifest is written last: a half-written one is never picked up. An old one is renamed before
it is removed: a half-removed one is not, either. Loading runs no code: safetensors, JSON and `torch.load(weights_only=True)`; and
it believes no state that breaks a law of the run (state_laws.py).

The loop draws its random numbers from (seed, step) and from (seed, prompt, sample, position), so there is no generator whose state
could be lost; torch's global one is stored for whoever extends the loop.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from tppo_ref import __version__
from tppo_ref.loop.trainer import Trainer
from tppo_ref.method.errors import NonFiniteError, UserError
from tppo_ref.rollout.models import in_value_head
from tppo_ref.runs.state_laws import broken_law
from tppo_ref.tasks import Task

MANIFEST = "manifest.json"
FORMAT = 5
"""Of the folder. 4 knew no groups, 3 no conversations, 2 not its prompts; 1 had no number, nor the Trainer's state a place."""
REMEDY = "remove this folder to go on from the one before"


class LocalCheckpointer:
    """Writes and reads checkpoints of a run in one process, and keeps the newest `keep`."""

    def __init__(self, folder: Path, config: Mapping[str, Any], task: Task, *, keep: int):
        self.folder, self.config, self.keep = folder, config, keep
        self.prompts, self.tokenizer = prompts_digest(task), task.tokenizer

    def complete(self) -> list[Path]:
        return complete_checkpoints(self.folder)

    def saved(self, checkpoint: Path) -> dict[str, Any]:
        return read_state(checkpoint)

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
        for learner in trainer.learners:
            if not math.isfinite(float(torch.nn.utils.get_total_norm(list(learner.module.parameters())))):
                raise NonFiniteError(f"step {trainer.num_steps}: the {learner.name}'s weights are not finite; they were not saved")
        if (final / MANIFEST).exists():  # the same step again: a stop right after a periodic one
            return final
        try:
            clear_for(beside)
            self._write(trainer, beside)
            put_in_place(beside, final)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors say "disk full" in their own ways
            shutil.rmtree(beside, ignore_errors=True)
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise UserError(f"checkpoint {final}: cannot be written ({reason}); free some space or choose another run.out; "
                            f"earlier checkpoints are good") from None  # fmt: skip
        remove_all_but(self.folder, self.keep)
        return final

    def _write(self, trainer: Trainer, folder: Path) -> None:
        learners = trainer.learners
        for learner in learners:
            learner.module.save_pretrained(folder / learner.name)
        save_tokenizer(self.tokenizer, folder / "policy")
        if trainer.ewma is not None:
            # Named parameters hold a tied weight once; safetensors refuses tensors that share memory.
            save_file({name: p.detach().clone() for name, p in trainer.ewma.masters.tensors.items()}, folder / "ewma.safetensors")
        for learner in learners:
            if apart := learner.masters.apart:
                save_file(apart, folder / f"{learner.name}-masters.safetensors")
        optimisers = {learner.name: learner.optimiser.state_dict() for learner in learners}
        torch.save(optimisers, folder / "optimisers.pt")
        state = {"config": self.config, "prompts": self.prompts, "trainer": trainer.state_dict()}
        (folder / "state.json").write_text(json.dumps(state))
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        write_manifest(folder, {"sha256": {str(path.relative_to(folder)): file_digest(path) for path in files}})
        for path in files:
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def load(self, trainer: Trainer, checkpoint: Path) -> None:
        """Bring a trainer that was built from the same config, with models from `checkpoint`, to the state that was saved there."""
        state = read_state(checkpoint)
        refuse_swapped(checkpoint, [learner.name for learner in trainer.learners])
        if law := broken_law([state["trainer"]], trainer, step=step_of(checkpoint), whole=True):
            raise UserError(f"checkpoint {checkpoint}: got a state.json in which {law}; expected what was written; {REMEDY}")
        try:
            optimisers = torch.load(checkpoint / "optimisers.pt", weights_only=True)
            for learner in trainer.learners:
                learner.optimiser.load_state_dict(optimisers[learner.name])
                refuse_other_shapes(learner.optimiser, learner.name)
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


def what_is_left(out: Path, go_on: str) -> str:
    """One line about a run that was stopped: its newest checkpoint, and the command that goes on from it."""
    kept = complete_checkpoints(out / "checkpoints")
    if not kept:
        return f"stopped before the first checkpoint: {out} holds nothing to go on from"
    return f"stopped: {kept[-1]} holds everything; go on with: {go_on}"


def clear_for(beside: Path) -> None:
    """An empty folder `beside` to write a checkpoint in; what a kill left of earlier ones goes."""
    beside.parent.mkdir(parents=True, exist_ok=True)
    sweep(beside.parent)
    beside.mkdir()


def sweep(folder: Path) -> None:
    """What a kill left half-written or half-removed goes."""
    for stale in (*folder.glob(".unfinished-*"), *folder.glob(".removed-*")):
        shutil.rmtree(stale, ignore_errors=True)


def put_in_place(beside: Path, final: Path) -> None:
    """A whole checkpoint under its own name, where a power failure finds it, too."""
    shutil.rmtree(final, ignore_errors=True)  # without a manifest: somebody's half-written one
    os.rename(beside, final)
    descriptor = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_all_but(folder: Path, keep: int) -> None:
    """Only the newest `keep` complete checkpoints stay. A kill in between leaves a name that `sweep` knows."""
    for old in complete_checkpoints(folder)[:-keep]:
        removed = folder / f".removed-{old.name}"
        try:
            os.rename(old, removed)
        except OSError:  # what cannot be removed stays, and stays good
            continue
        shutil.rmtree(removed, ignore_errors=True)


def step_of(checkpoint: Path) -> int:
    """The training step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """The tokenizer beside its model, where the task has one: the folder is then all that an evaluation needs."""
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)


def prompts_digest(task: Task) -> dict[str, str]:
    """SHA-256 of the prompts of each split as the models read them, their answers included: a file may change under its name."""
    found = {}
    for split in ("train", "test"):
        digest = hashlib.sha256()
        for prompt in task.prompts(split):
            digest.update(repr((prompt.id, tuple(prompt.token_ids), prompt.answer)).encode())
        found[split] = digest.hexdigest()
    return found


def refuse_swapped(folder: Path, roles: Sequence[str]) -> None:
    """UserError where policy/ holds a value model's weights, or value/ a policy's: each would load, the head at random."""
    for role in roles:
        names: set[str] = set()
        for file in (folder / role).glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                names.update(tensors.keys())
        if any(map(in_value_head, names)) != (role == "value"):
            other = "value model" if role == "policy" else "policy"
            raise UserError(f"checkpoint {folder}: got a {other}'s weights in {role}/; expected what was written; {REMEDY}")


def refuse_other_shapes(optimiser: torch.optim.Optimizer, name: str) -> None:
    """ValueError where an optimiser's state is that of other parameters: torch compares their number alone."""
    for parameter, state in optimiser.state.items():
        for key, tensor in state.items():
            if key != "step" and isinstance(tensor, torch.Tensor) and tensor.shape != parameter.shape:
                raise ValueError(f"{key} of the {name}'s optimiser has shape {list(tensor.shape)}, not {list(parameter.shape)}")


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """The last file of a checkpoint: with it, the folder is one."""
    with (folder / MANIFEST).open("w") as file:
        json.dump({"format": FORMAT, "version": __version__, **content}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest. UserError where it is of another format; one that cannot be read is an OSError or a ValueError."""
    manifest = json.loads(regular(folder / MANIFEST).read_text())
    if not isinstance(manifest, dict) or not manifest:
        raise ValueError(f"{MANIFEST} holds no manifest")
    if (number := manifest.get("format", 1)) != FORMAT:
        wrote = f"tppo-ref {manifest['version']}, which" if "version" in manifest else "the version of tppo-ref that"
        raise UserError(f"checkpoint {folder}: got format {number}; expected {FORMAT}; go on with {wrote} wrote it, or start anew "
                        f"in another run.out")  # fmt: skip
    return manifest


def read_state(folder: Path) -> dict[str, Any]:
    """The state.json of a checkpoint whose every file is as it was written; else a UserError that names the file."""
    try:
        for name, digest in read_manifest(folder)["sha256"].items():
            refuse_changed(folder, name, digest)
        state = json.loads((folder / "state.json").read_text())
        missing = [key for key in ("config", "prompts", "trainer") if not isinstance(state.get(key), dict)]
        if missing:
            raise UserError(
                f"checkpoint {folder}: got a state.json without {', '.join(missing)}; expected what was written; {REMEDY}"
            )
        return state
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError(f"checkpoint {folder}: got what cannot be read ({error}); expected what was written; {REMEDY}") from None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with regular(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_changed(folder: Path, name: str, digest: str, digest_of: Callable[[Path], str] = file_digest) -> None:
    """UserError where a file of a checkpoint is not the one that was written."""
    if digest_of(folder / name) != digest:
        raise UserError(f"checkpoint {folder}: got another {name}; expected what was written; {REMEDY}")


def regular(path: Path) -> Path:
    """`path`, unless a pipe or a folder is there: OSError. A pipe would be waited for."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return path
