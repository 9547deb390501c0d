"""Files of a run that goes on: taken back to its checkpoint, repaired where they were damaged, and nothing lost without a word."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tppo_ref.method.errors import UserError, refusal

log = logging.getLogger("tppo_ref")


def take_back(path: Path, resume_step: int, step_of: Callable[[bytes], int], header: bytes = b"") -> list[bytes]:
    """Rewrite a file of lines to those of the steps up to `resume_step`, behind its `header`; returns them.

    step_of   the step of a line; ValueError for a line that is none of this file's
    A last line without its end was cut off by a kill: it was written after the checkpoint, and goes. Any other line that cannot be
    read moves to the file's name and `.damaged`, and is told. Renamed: a kill here must not lose what was there.
    """
    if path.exists() and not path.is_file():
        raise UserError(refusal("run.resume", f"{path}, which is no regular file", "the file that the run wrote", "remove it"))
    *lines, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    kept: list[bytes] = []
    damaged: list[tuple[int, bytes]] = []
    for number, line in enumerate(lines, start=1):
        if number == 1 and header and line == header:
            continue
        try:
            step = step_of(line)
        except (ValueError, LookupError, TypeError, RecursionError):
            damaged.append((number, line))
            continue
        if step <= resume_step:
            kept.append(line)
    if damaged:
        aside = path.with_name(f"{path.name}.damaged")
        with aside.open("ab") as file:
            file.writelines(line + b"\n" for _, line in damaged)
        log.warning("%s: %d of %d lines cannot be read (the first: line %d): they are in %s now", path, len(damaged), len(lines),
                    damaged[0][0], aside.name)  # fmt: skip
    beside = path.with_suffix(".new")
    beside.write_bytes(b"".join(line + b"\n" for line in ([header] if header else []) + kept))
    os.replace(beside, path)
    return kept


def tell_what_is_missing(
    out: Path, records: Sequence[Mapping[str, Any]], num_rows: Counter[int], resume_step: int, *, name: str = "response/ended"
) -> None:
    """A word where metrics.jsonl lacks steps, or responses.csv responses, of those up to `resume_step`.

    records    of metrics.jsonl; a training step's holds under `name` how many responses ended
    num_rows   rows of responses.csv by step
    """
    ended = {record["step"]: record[name] for record in records if name in record}
    lost = [step for step in range(1, resume_step + 1) if step not in ended]
    if lost:
        log.warning("%s: the records of %d of %d steps are missing (the first: step %d); the run goes on all the same",
                    out / "metrics.jsonl", len(lost), resume_step, lost[0])  # fmt: skip
    short = {step: int(num) - num_rows[step] for step, num in ended.items() if num_rows[step] != num}
    if short:
        log.warning("%s: %d of %d responses are missing (the first: of step %d); the run goes on all the same",
                    out / "responses.csv", sum(map(abs, short.values())), int(sum(ended.values())), min(short))  # fmt: skip


def read_config(folder: Path) -> Path:
    """The config.json of a run that is to go on; where that is missing or cannot be read, the newest checkpoint's is put there.

    UserError where there is neither, and for a checkpoint of another version, whose fields would be refused one by one.
    """
    from tppo_ref.runs.checkpoint import (  # slow to import, and only used here
        complete_checkpoints,
        read_manifest,
        read_state,
        regular,
    )
    from tppo_ref.runs.run_folder import write_json, writing

    file, found = folder / "config.json", complete_checkpoints(folder / "checkpoints")
    if found:
        with contextlib.suppress(OSError, ValueError):  # told where the checkpoint is read whole
            read_manifest(found[-1])
    try:
        if isinstance(json.loads(regular(file).read_bytes()), dict):
            return file
        why = "it holds no sections"
    except (OSError, ValueError, RecursionError) as error:
        why = getattr(error, "strerror", None) or "it is no JSON"
    if not found or not (found[-1] / "state.json").is_file():
        raise UserError(refusal("resume", f"{folder}, whose config.json cannot be read ({why})",
                                "the folder of a run with a checkpoint", "give its run.out"))  # fmt: skip
    with writing(folder):
        write_json(file, read_state(found[-1])["config"])
    log.warning("%s cannot be read (%s): it is now that of checkpoint %s", file, why, found[-1].name)
    return file
