"""A run's folder belongs to one process, and stays where it is while that process writes to it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from tppo_ref.method.errors import UserError, refusal
from tppo_ref.runs.checkpoint import sweep
from tppo_ref.runs.validation import writable_folder

log = logging.getLogger("tppo_ref")

LOCK = ".lock"


@contextmanager
def own_folder(path: str, name: str = "run.out") -> Iterator[Path]:
    """The folder `path`, this process's alone while inside; what a kill left half-written or half-removed in it is swept.

    The lock is the system's (flock on the file .lock) and ends with the process, however that ends. UserError, naming the field
    `name`, where another process has it.
    """
    folder = writable_folder(path, name)
    with (folder / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = f"process {pid}" if (pid := file.read(20).strip()).isdigit() else "another process"
            raise UserError(refusal(name, f"{path}, to which {holder} is writing", "a folder of this run's own",
                                    "wait until that run has ended, or choose another")) from None  # fmt: skip
        except OSError as error:
            log.warning("%s: the file system of %s has no locks (%s): see to it that no second run writes there", name, path,
                        error.strerror)  # fmt: skip
        with writing(folder, name):
            file.truncate(0)
            print(os.getpid(), file=file, flush=True)
        sweep(folder / "checkpoints")
        yield folder


@contextmanager
def writing(folder: Path, name: str = "run.out") -> Iterator[None]:
    """A disk that is full, or a folder that cannot be written to, as a UserError."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors has a type of its own for a full disk
        why = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise UserError(refusal(name, f"{folder}, which cannot be written to ({why})", "a folder with room",
                                "free some space or choose another; checkpoints that are there are good")) from None  # fmt: skip


def refuse_if_gone(file: IO[Any], path: Path, name: str = "run.out") -> None:
    """UserError where the open `file` is no longer the one at `path`: what is written now would be seen by nobody."""
    try:
        there = os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        there = False
    if not there:
        raise UserError(refusal(name, f"{path.parent}, whose {path.name} was removed or replaced under the run", "it to stay",
                                "go on from a checkpoint that is left, or start anew"))  # fmt: skip


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Written beside and renamed: a kill leaves the old file or the new one, never half of one."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(beside, path)


def move_into_place(beside: Path, folder: Path) -> None:
    """A finished folder under its own name; where another process has made the same meanwhile, that one stays.

    warmstart.py says the same in its own words: its source is in the name of every base model, and a change makes all of them anew.
    """
    try:
        os.rename(beside, folder)
    except OSError:
        if not folder.is_dir():
            raise
