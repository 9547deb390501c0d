"""Prompts whose reference their own verifier refuses: left out of training, counted and listed."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tppo_ref.loop.parallel import Parallel, SingleProcess
from tppo_ref.method.errors import UserError
from tppo_ref.method.records import Prompt
from tppo_ref.runs.inputs import digest_of, prompts_of
from tppo_ref.runs.run_folder import write_json, writing
from tppo_ref.tasks import Task
from tppo_ref.tasks.json_lines import check_regular
from tppo_ref.tasks.jsonl import JsonlTask
from tppo_ref.tasks.references import failing_references
from tppo_ref.tasks.verifier import Verifier

log = logging.getLogger("tppo_ref")

FILE = "references.json"


def leave_out_bad_references(
    task: Task, verifier: Verifier, out: Path, *, resume: bool, progress: bool, parallel: Parallel | None = None
) -> None:
    """Takes out of the task's train prompts those whose reference fails against itself, and lists them in `out`/references.json.

    Evaluation prompts are checked and listed too, and stay: an accuracy is over all of its prompts. Each rank checks its share.
    A run that goes on takes the list as it is: what the prompts are must not depend on how busy the machine was. A list that is
    there already and was made of these prompts by this verifier's code is taken, too: a comparison checks once for all its runs.
    """
    if not isinstance(task, JsonlTask) or not verifier.checks_references:
        return
    parallel = parallel or SingleProcess()
    file, inputs = out / FILE, digest_of([verifier.verifier, verifier.code, verifier.timeout_s, prompts_of(task)])
    if file.exists():
        check_regular(file, FILE)
    (known, *_) = parallel.gather_objects((resume and file.exists()) or _inputs(file) == inputs)  # the first rank decides for all
    if known:
        found = _read(file)
    else:
        num = len(task.prompts("train"))
        found = {"verifier": verifier.verifier, "inputs": inputs, "checked": num, "left_out": [], "evaluation": []}
        for name, split in (("left_out", "train"), ("evaluation", "test")):
            mine = failing_rows(task, verifier, task.prompts(split)[parallel.rank :: parallel.world], progress and parallel.first)
            everyones = [row for rows in parallel.gather_objects(mine) for row in rows]
            found[name] = sorted(everyones, key=lambda row: row["prompt"])
        if parallel.first:
            with writing(out):
                write_json(file, found)
            _tell(found, len(task.prompts("test")), file)
    task.leave_out({row["prompt"] for row in found["left_out"]})


def _inputs(file: Path) -> str | None:
    """What a list was made of; None for one that is not there or cannot be read."""
    try:
        return str(json.loads(file.read_bytes())["inputs"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def failing_rows(task: JsonlTask, verifier: Verifier, prompts: Sequence[Prompt], progress: bool) -> list[dict[str, Any]]:
    """Prompt, place in the file, answer and cause of each reference that fails against itself."""
    bad = failing_references(verifier, prompts, progress=progress)
    return [{"prompt": b.prompt_id, "where": task.where(b.prompt_id), "answer": b.answer, "why": b.why} for b in bad]


def _tell(found: dict[str, Any], num_evaluation: int, file: Path) -> None:
    if bad := found["left_out"]:
        log.warning("%d of %d references fail against themselves (%s; the first: %s, %s): their prompts are left out, "
                    "%s lists them", len(bad), found["checked"], found["verifier"], bad[0]["where"], bad[0]["why"],
                    file)  # fmt: skip
    if bad := found["evaluation"]:
        log.warning("%d of %d evaluation references fail against themselves (the first: %s): they stay, and no answer to them is "
                    "right", len(bad), num_evaluation, bad[0]["where"])  # fmt: skip


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
        return {"left_out": [{"prompt": int(row["prompt"])} for row in found["left_out"]]}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"run.resume: got {file}, which cannot be read ({type(error).__name__}: {error}); expected the list of the "
                        f"prompts that were left out; remove it to have the references checked anew") from None  # fmt: skip
