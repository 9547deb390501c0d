"""Distributed checkpoints: shards of both models and optimisers, and every response exactly once, on any number of ranks.

A checkpoint is a folder `step-00000120`: `shards/` (torch.distributed.checkpoint: each rank writes its own), `rank-00003.json` per
rank (its Trainer's state: in-flight and held responses, the sample stream, the ledger; ranks that hold the same rows write one),
`tokenizer/` where the task has one, and a manifest, which is written last, after every rank is done. A folder without one is not a
checkpoint. Shards are written in the background while the next step runs.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_model_state_dict, set_state_dict

from scale.config import ScaleConfig
from scale.distributed import World
from scale.sharding import gathered
from scale.shutdown import lost_a_rank
from tppo_ref.loop.trainer import Trainer
from tppo_ref.method.errors import UserError
from tppo_ref.rollout.models import PolicyModel, ValueModel
from tppo_ref.runs import checkpoint as local
from tppo_ref.runs.checkpoint import (
    REMEDY,
    clear_for,
    complete_checkpoints,
    file_digest,
    prompts_digest,
    put_in_place,
    refuse_changed,
    regular,
    remove_all_but,
    save_tokenizer,
    step_of,
)
from tppo_ref.runs.state_laws import broken_law
from tppo_ref.tasks import Task

WHOLE_BYTES = 2**24  # of each shard go into its digest
PIECES = 64


class DistributedCheckpointer:
    """Writes checkpoints of a run, one at a time, in the background. All ranks call the same methods in the same order."""

    def __init__(self, folder: Path, world: World, config: ScaleConfig, task: Task):
        self.folder, self.world, self.config = folder, world, config
        self.prompts, self.tokenizer = prompts_digest(task), task.tokenizer
        self.end_tokens: tuple[int, ...] = ()  # of a response of this run; `save` keeps them
        self._newest: Path | None = None
        timeout = datetime.timedelta(seconds=config.cluster.timeout_s)
        self._group = dist.new_group(backend="gloo", timeout=timeout)  # the background write talks on its own group
        self._pending: tuple[Any, Path, Path] | None = None

    def complete(self) -> list[Path]:
        """As the first rank sees them: a shared disk may not show every rank the same."""
        return self._everyones(complete_checkpoints(self.folder))[0]

    def saved(self, checkpoint: Path) -> dict[str, Any]:
        """Every file is compared with the manifest by the first rank; what it refuses, all refuse."""
        found: dict[str, Any] | str = ""
        try:
            if self.world.rank == 0:
                manifest = read_manifest(checkpoint)
                found = {"config": manifest["config"], "prompts": manifest["prompts"]}
        except UserError as error:
            found = str(error)
        found = self._everyones(found)[0]
        if isinstance(found, str):
            raise UserError(found)
        return found

    def save(self, trainer: Trainer) -> Path:
        """Begin writing `folder/step-N`; `poll`, `finish` or the next `save` makes it a checkpoint. Returns its path to be."""
        self.finish()
        final = self.folder / f"step-{trainer.num_steps:08d}"
        if final == self._newest:  # not asked of the disk: a shared one may not tell every rank the same
            return final
        self._newest = final
        beside = self.folder / f".unfinished-{final.name}"
        failure = ""
        try:
            if self.world.rank == 0:
                clear_for(beside)
                save_tokenizer(self.tokenizer, beside / "tokenizer")
            self._agree("")
            if self.world.leads:
                rank_state = {"trainer": trainer.state_dict()}
                (beside / f"rank-{self.world.data_rank:05d}.json").write_text(json.dumps(rank_state))
            state = model_state(trainer)
        except OSError as error:
            failure = error.strerror or str(error)
        self._agree(failure, final)
        shards = str(beside / "shards")
        # What is staged lies on the host. A writer that copies ahead would still open a stream, in its thread on GPU 0, whichever
        # is this rank's: every rank of a machine would keep a context there. A stager beside it, or the writer would stage itself.
        stager = DefaultStager(StagingOptions(False, False, False, False))  # as torch's own choice: at once, and copied
        writer = dcp.FileSystemWriter(shards, per_thread_copy_ahead=0)
        future: Any = dcp.async_save(
            state, checkpoint_id=shards, storage_writer=writer, async_stager=stager, process_group=self._group
        )
        future.add_done_callback(lambda _: stager.close())
        self._pending = (future, beside, final)
        return final

    def poll(self) -> None:
        """Make the write in progress a checkpoint if every rank is done with it: a kill then costs no more than it must."""
        if self._pending is not None and all(self._everyones(self._pending[0].done())):
            self.finish()

    def finish(self) -> None:
        """Wait for the write in progress and make it a checkpoint. UserError where a rank could not write; older ones stay good."""
        if self._pending is None:
            return
        (future, beside, final), self._pending = self._pending, None
        failure = ""
        try:
            future.result()
        except (Exception, CheckpointException) as error:  # torch wraps a full disk in a type of its own, a BaseException
            failure = reason(error)
        self._agree(failure, final)
        if self.world.rank == 0:
            try:
                write_manifest(beside, self.config, self.world, self.prompts, self.end_tokens)
                put_in_place(beside, final)
                remove_all_but(self.folder, self.config.algo.run.checkpoints_kept)
            except OSError as error:
                failure = error.strerror or str(error)
        self._agree(failure, final)

    def load(self, trainer: Trainer, checkpoint: Path) -> None:
        """Bring a freshly built trainer to what was saved, on any number of ranks. All ranks take part.

        On the same ranks and groups everything is as it was. On others, in-flight and held responses and unissued samples are dealt
        anew, none lost and none twice, and the first rank takes over the counts, of which only the sums mean anything.
        """
        world, saved_on = self.world, read_manifest(checkpoint, digests=False)["world"]
        shared = saved_on.get("context_parallel", 1)
        num_saved = saved_on["world"] // shared
        same = (num_saved, saved_on["tensor_parallel"] // shared) == (world.data_world, world.parts)
        first = world.engine * world.parts if same else 0  # in-flight responses are long: no rank reads more than it must
        ranks = range(first, first + world.parts) if same else range(num_saved)
        states = [json.loads((checkpoint / f"rank-{rank:05d}.json").read_text()) for rank in ranks]
        whole = len(ranks) == num_saved
        found = broken_law([state["trainer"] for state in states], trainer, step=step_of(checkpoint), whole=whole)
        if law := next(filter(None, self._everyones(found)), ""):  # what one rank refuses, all refuse
            raise UserError(f"checkpoint {checkpoint}: got ranks' states in which {law}; expected what was written; {REMEDY}")
        shards = model_state(trainer)
        try:
            dcp.load(shards, checkpoint_id=str(checkpoint / "shards"))
            trainer.load_state_dict([state["trainer"] for state in states], own=world.part if same else None)
            for learner in trainer.learners:
                saved = shards[learner.name]
                set_state_dict(
                    learner.module, learner.optimiser, model_state_dict=saved["model"], optim_state_dict=saved["optimiser"]
                )
            if trainer.ewma is not None:
                set_model_state_dict(trainer.ewma.module, shards["ewma"])
        except (Exception, CheckpointException) as error:  # torch's checkpoint readers raise types of their own
            if lost_a_rank(reason(error)):  # which says nothing about the checkpoint
                raise RuntimeError(reason(error)) from None
            raise UserError(
                f"checkpoint {checkpoint}: got one that does not fit this run ({reason(error)}); expected the run's own config"
            ) from None
        self._newest = checkpoint

    def _agree(self, failure: str, final: Path | None = None) -> None:
        found = [(rank, text) for rank, text in enumerate(self._everyones(failure)) if text]
        if found:
            rank, text = found[0]
            raise UserError(f"checkpoint {final}: rank {rank} cannot write it ({text}); free some space or choose another "
                            f"algo.run.out; earlier checkpoints are good")  # fmt: skip

    def _everyones(self, thing: Any) -> list[Any]:
        things: list[Any] = [None] * self.world.world
        dist.all_gather_object(things, thing)
        return things


def reason(error: BaseException) -> str:
    """An error in one line; of torch's collection of all ranks' errors the first."""
    failures = getattr(error, "failures", None)
    if isinstance(failures, dict) and failures:
        error = next(iter(failures.values()))[0]
    return " ".join(str(error).split())[:200] or type(error).__name__


def model_state(trainer: Trainer) -> dict[str, Any]:
    """Sharded states of the models and their optimisers (and of PPO-EWMA's average)."""
    state: dict[str, Any] = {}
    for learner in trainer.learners:
        model, optimiser = get_state_dict(learner.module, learner.optimiser)
        state[learner.name] = {"model": model, "optimiser": optimiser}
    if trainer.ewma is not None:
        state["ewma"] = get_model_state_dict(trainer.ewma.module)
    return state


def write_manifest(folder: Path, config: ScaleConfig, world: World, prompts: dict[str, str], end_tokens: Sequence[int]) -> None:
    """What a resume compares or takes over; sizes of all files, digests of the small ones whole, of shards by `shard_digest`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    local.write_manifest(folder, {
        "config": dataclasses.asdict(config),
        "prompts": prompts,
        "end_tokens": list(end_tokens),
        "world": dataclasses.asdict(world),
        "bytes": {str(path.relative_to(folder)): path.stat().st_size for path in files},
        "sha256": {str(path.relative_to(folder)): file_digest(path) for path in files if path.suffix == ".json"},
        "shards": {str(path.relative_to(folder)): shard_digest(path) for path in files if path.suffix == ".distcp"},
    })  # fmt: skip


def shard_digest(path: Path) -> str:
    """SHA-256 of a shard's size and of WHOLE_BYTES of it: all of it where it is not larger, else evenly spaced pieces, the first at
    its beginning, the last at its end. Hashing terabytes would take longer than writing them.
    """
    size, piece = path.stat().st_size, WHOLE_BYTES // PIECES
    digest = hashlib.sha256(str(size).encode())
    with regular(path).open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
        else:
            for i in range(PIECES):
                file.seek((size - piece) * i // (PIECES - 1))
                digest.update(file.read(piece))
    return digest.hexdigest()


def read_manifest(folder: Path, *, digests: bool = True) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file is there, as long as it was written; else a UserError that names the file.

    digests   also compare digests, for which the small files are read whole and pieces of the shards; one rank is enough
    """
    try:
        manifest = local.read_manifest(folder)
        for name, size in manifest["bytes"].items():
            found = (folder / name).stat().st_size
            if found != size:
                raise UserError(
                    f"checkpoint {folder}: got {name} of {found} bytes; expected the {size} that were written; {REMEDY}"
                )
        for name, digest in manifest["sha256"].items() if digests else ():
            refuse_changed(folder, name, digest)
        for name, digest in manifest["shards"].items() if digests else ():
            refuse_changed(folder, name, digest, shard_digest)
        return manifest
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint {folder}: got what cannot be read ({error}); expected what was written; {REMEDY}") from None


def load_models(models: Mapping[str, PolicyModel | ValueModel], folder: Path) -> None:
    """A checkpoint's "policy", and its "value" model where it has one, without the rest of the run. All ranks take part."""
    state = {name: {"model": get_model_state_dict(model)} for name, model in models.items()}
    dcp.load(state, checkpoint_id=str(folder / "shards"))
    for name, model in models.items():
        set_model_state_dict(model, state[name]["model"])


def export(model: PolicyModel | ValueModel, folder: Path, world: World, *, dtype: torch.dtype, tokenizer: Any = None) -> None:
    """A Hugging Face folder that transformers and vLLM load, tokenizer included. All ranks take part; rank 0 gathers and writes."""
    whole = {}
    for name, tensor in gathered(model):  # every rank gathers, one keeps
        if world.rank == 0:
            whole[name] = tensor.to("cpu", dtype)
    failure = ""
    if world.rank == 0:
        try:
            config = type(model.hf.config).from_dict(model.hf.config.to_dict())
            config.dtype = dtype
            with torch.device("meta"):
                shell = _plain_class(model.hf)(config)
            if isinstance(model, PolicyModel):
                shell.generation_config = model.hf.generation_config
            shell.save_pretrained(folder, state_dict=whole)
            save_tokenizer(tokenizer, folder)
        except (OSError, SafetensorError) as error:
            failure = getattr(error, "strerror", None) or reason(error)
    failures: list[Any] = [None] * world.world
    dist.all_gather_object(failures, failure)
    if failures[0]:
        raise UserError(f"export: got {folder}; expected a folder that can be written ({failures[0]}); choose another")


def _plain_class(hf: Any) -> Any:
    """The transformers class of a model, without what FSDP mixed into it."""
    return next(c for c in type(hf).__mro__ if c.__module__.startswith("transformers.models."))
