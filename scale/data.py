"""Prompts for scale/: tppo_ref's prompt-file task, which also reads parquet and Hub data sets, and can leave long prompts out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scale.config import ScaleConfig
from scale.rewards import GRADE
from tppo_ref.method.errors import UserError
from tppo_ref.tasks import Task, load_task
from tppo_ref.tasks.json_lines import check_regular, read_lines
from tppo_ref.tasks.jsonl import JsonlTask

log = logging.getLogger("scale")


class MathTask(JsonlTask):
    """`JsonlTask`, and:

    instruction   text put behind each prompt
    over_long     "skip": prompts above max_prompt_tokens are left out; `num_skipped` counts them, and the log says how many.
                  "error": the first one is a UserError
    Files are .jsonl or .parquet; anything that is no file, and looks like owner/name, is a data set of the Hub, of which the split
    named after the colon ("openai/gsm8k:main/train", default "train") is read from its parquet or jsonl files.
    """

    name = "math"
    prompt_keys = ("prompt", "question", "problem")

    def __init__(self, *, instruction: str = "", over_long: str = "skip", **options: Any):
        self.instruction, self.over_long, self.num_skipped, self._num_read = instruction, over_long, 0, 0
        super().__init__(**options)
        if self.num_skipped:
            log.warning("%d of %d prompts are longer than %d tokens and were left out (data.over_long)", self.num_skipped,
                        self._num_read, options.get("max_prompt_tokens", 1024))  # fmt: skip

    def _rows(self, file: Path) -> list[tuple[int, dict[str, Any]]]:
        if file.suffix == ".parquet":
            return list(enumerate(_parquet(file), start=1))
        if file.suffix in (".jsonl", ".json") or file.exists():
            return read_lines(file)
        return [pair for found in _hub_files(str(file)) for pair in self._rows(found)]

    def _encode(self, text: str, where: str) -> tuple[int, ...]:
        return super()._encode(text + self.instruction, where)

    def _admits(self, token_ids: Sequence[int], where: str) -> bool:
        self._num_read += 1
        if self.over_long == "skip" and len(token_ids) > self.max_prompt_tokens:
            self.num_skipped += 1
            return False
        return super()._admits(token_ids, where)

    def _read(self, file: Path, first_id: int) -> list:
        prompts = super()._read(file, first_id)
        if not prompts:
            raise UserError(
                f"{file}: got no prompt of at most {self.max_prompt_tokens} tokens; expected one; raise algo.task.max_prompt_tokens"
            )
        return prompts


def make_task(config: ScaleConfig) -> Task:
    """The task that a config describes: prompts from algo.task.path where it is given, else the built-in one of algo.task.name.

    UserError in one line for what is missing or unreadable.
    """
    task = config.algo.task
    if not task.path:
        if task.name == "jsonl":
            raise UserError("algo.task.path: got none; expected a file of prompts or a data set's id; give one")
        return load_task(task.name)
    tokenizer = task.tokenizer or config.algo.model.policy
    if not tokenizer:
        raise UserError("algo.task.tokenizer: got none; expected a tokenizer's folder, or bytes; give one")
    return MathTask(
        train=task.path, test=task.eval_path or "", tokenizer=tokenizer, chat_template=task.chat_template,
        verifier=task.verifier or (GRADE if config.reward.format_penalty else "scale.rewards:verify_math"),
        prompt_key=task.prompt_key, answer_key=task.answer_key,
        max_prompt_tokens=task.max_prompt_tokens, instruction=config.data.instruction, over_long=config.data.over_long,
    )  # fmt: skip


def _parquet(file: Path) -> list[dict[str, Any]]:
    check_regular(file)
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{file}: got a parquet file; expected pyarrow to read it; pip install 'tppo-ref[scale]', or convert it to jsonl"
        ) from None
    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file}: got what cannot be read ({' '.join(str(error).split())[:200]}); expected a parquet file of prompts"
        ) from None
    if not rows:
        raise UserError(f"{file}: got no rows; expected prompts")
    return rows


def _hub_files(name: str) -> list[Path]:
    """The parquet or jsonl files of one split of a data set, downloaded or from the cache."""
    repository, _, split = name.partition(":")
    if repository.count("/") != 1 or repository.startswith((".", "/")):
        raise UserError(
            f"algo.task.path: got {name}, which is no file; expected a .jsonl or .parquet file, or owner/name of a data set"
        )
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(repository, repo_type="dataset", allow_patterns=["*.parquet", "*.jsonl"]))
    except Exception as error:  # the client raises a dozen types for no network, no such set, no permission
        raise UserError(
            f"algo.task.path: got {repository}; expected a data set that can be had ({' '.join(str(error).split())[:200]})"
        ) from None
    wanted = split or "train"
    files = sorted(
        f for f in folder.rglob("*") if f.suffix in (".parquet", ".jsonl") and str(f.relative_to(folder)).startswith(wanted)
    )
    files = files or sorted(f for f in folder.rglob(f"*{wanted.rpartition('/')[2]}*") if f.suffix in (".parquet", ".jsonl"))
    if not files:
        raise UserError(
            f"algo.task.path: got {repository}, which has no parquet or jsonl file for {wanted!r}; expected one of its splits"
        )
    return files
