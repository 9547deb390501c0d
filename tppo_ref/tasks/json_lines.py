"""JSON lines from a regular file, each refused by its number where it is no object or has a key twice."""

from __future__ import annotations

import json
import stat
from collections import Counter
from pathlib import Path
from typing import Any

from tppo_ref.method.errors import UserError, refusal


def unreadable(file: Path, error: OSError | ValueError, name: str = "prompt file") -> UserError:
    """The refusal of a file that the system does not open."""
    why = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return UserError(refusal(name, f"{str(file)[:200]!r}, which cannot be read ({why})", "a file that can be"))


def check_regular(file: Path, name: str = "prompt file") -> None:
    """UserError unless `file` is a regular file: a pipe would wait for ever, a device never end. name: what it is to be."""
    try:
        mode = file.stat().st_mode
    except (OSError, ValueError) as error:
        raise unreadable(file, error, name) from error
    if not stat.S_ISREG(mode):
        kind = "folder" if stat.S_ISDIR(mode) else "pipe" if stat.S_ISFIFO(mode) else "device or socket"
        raise UserError(refusal(name, f"{str(file)!r}, a {kind}", "a regular file", "write the content into one"))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError where it has a key twice: Python would keep the last one in silence."""
    twice = [key for key, num in Counter(key for key, _ in pairs).items() if num > 1]
    if twice:
        raise ValueError(f"key {twice[0]!r} stands there twice")
    return dict(pairs)


def read_lines(file: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank. UserError with file:line for one that is no JSON object."""
    check_regular(file)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise unreadable(file, error) from error
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, raw in enumerate(content.split(b"\n"), start=1):
        where = f"{file}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError as error:
            place = f"byte {error.start + 1} of the line"
            raise UserError(refusal(where, f"what is no UTF-8 ({place})", "one JSON object in UTF-8")) from error
        if not line:
            continue
        try:
            row = json.loads(line, object_pairs_hook=unique_keys)
        except (ValueError, RecursionError) as error:
            raise UserError(refusal(where, f"invalid JSON ({error})", "one JSON object per line")) from error
        if not isinstance(row, dict):
            raise UserError(refusal(where, f"a JSON {type(row).__name__}", "an object with a prompt and an answer"))
        rows.append((number, row))
    if not rows:
        raise UserError(refusal("prompt file", f"{str(file)!r}, which is empty", "one JSON object per line"))
    return rows


__all__ = ["check_regular", "read_lines", "unreadable"]
