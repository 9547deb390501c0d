"""Where a run goes on: a run is never overwritten, and never continued under another config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tppo_ref.method.errors import UserError
from tppo_ref.runs.parsing import get_field
from tppo_ref.runs.parts import Checkpointer


def resume_point(checkpointer: Checkpointer, config: Any, *, resume: bool, fixed: Sequence[str], section: str = "") -> Path | None:
    """The checkpoint to go on from; None for a run that begins.

    config   the whole config, of which the fields `fixed` must be what they were
    section  where in it `run` stands, for messages: "algo." on a cluster
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
    saved = checkpointer.saved_config(found[-1])
    for path in fixed:
        before, now = _lookup(saved, path), get_field(config, path)
        if before != now:
            raise UserError(
                f"{path}: got {now}; expected {before}, as in checkpoint {found[-1].name}; give the same value to go on"
            )
    return found[-1]


def step_of(checkpoint: Path) -> int:
    """The training step after which a checkpoint was written."""
    return int(checkpoint.name.removeprefix("step-"))


def _lookup(saved: Mapping[str, Any], path: str) -> Any:
    """A dotted field of a saved config; None where that has no such field."""
    thing: Any = saved
    for name in path.split("."):
        thing = thing.get(name) if isinstance(thing, Mapping) else None
    return thing
