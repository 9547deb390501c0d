"""Where a run goes on: a run is never overwritten, and never continued under another config or on other prompts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tppo_ref.method.errors import UserError, refusal
from tppo_ref.runs.checkpoint import step_of
from tppo_ref.runs.parsing import get_field
from tppo_ref.runs.parts import Checkpointer

log = logging.getLogger("tppo_ref")


def resume_point(
    checkpointer: Checkpointer, config: Any, *, resume: bool, fixed: Sequence[str], section: str = "", tell: bool = True
) -> Path | None:
    """The checkpoint to go on from; None for a run that begins.

    config   the whole config, of which the fields `fixed` must be what they were
    section  where in it `run` stands, for messages: "algo." on a cluster
    tell     whether this rank warns of models that are given and not read: the weights are the checkpoint's
    """
    found = checkpointer.complete()
    if not resume:
        if found:
            raise UserError(f"{section}run.out: got {checkpointer.folder.parent}, which holds a run (step {step_of(found[-1])}); "
                            f"expected a new folder; add --{section}run.resume true to go on with that run")  # fmt: skip
        return None
    if not found:
        raise UserError(f"{section}run.resume: got true; expected a complete checkpoint in {checkpointer.folder}, there is none; "
                        f"leave it out to start anew")  # fmt: skip
    saved = checkpointer.saved(found[-1])
    models = (f"{section}model.policy", f"{section}model.value")  # free to have moved
    for path in (*fixed, *models):
        now = get_field(config, path)
        try:
            before = _lookup(saved["config"], path)
        except LookupError:
            remedy = "go on with the version of tppo-ref that wrote it, or start anew in another run.out"
            raise UserError(refusal(f"checkpoint {found[-1]}", f"a config without {path}", "every field of this version",
                                    remedy)) from None  # fmt: skip
        if before != now and path in models:
            if tell:
                began = f"{before}, with which the run began: a resume takes the weights of {found[-1].name}"
                log.warning(refusal(path, f"{now}, which is not read", began, "start a new run to begin from another model"))
        elif before != now:
            raise UserError(
                f"{path}: got {now}; expected {before}, as in checkpoint {found[-1].name}; give the same value to go on"
            )
    for split, digest in checkpointer.prompts.items():
        if saved["prompts"].get(split) != digest:
            field = "task.path" if split == "train" else "task.eval_path"
            raise UserError(refusal(f"{section}{field}", f"other {split} prompts than checkpoint {found[-1].name} was trained with",
                                    "the same content, read by the same tokenizer", "give them to go on, or start anew in another "
                                    "run.out"))  # fmt: skip
    return found[-1]


def _lookup(saved: Mapping[str, Any], path: str) -> Any:
    """A dotted field of a saved config. LookupError where that has no such field."""
    thing: Any = saved
    for name in path.split("."):
        if not isinstance(thing, Mapping):
            raise LookupError(path)
        thing = thing[name]
    return thing
