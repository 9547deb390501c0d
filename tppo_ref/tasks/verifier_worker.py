"""The process in which a user's verifier runs: `python -m tppo_ref.tasks.verifier_worker module:function timeout_s startup_s`.

One JSON line in, one JSON line out, in order:

    in   [seq, answer, token_ids, text]         token_ids null: the reference against itself, as `wrap_reference` states it
    out  ["ready", wraps, code]                 once, after the import: whether there is a `wrap_reference`, and `code_digest`;
                                                or ["fatal", reason]
    out  [seq, status, score or null, detail]   status "ok", "error" or "bad_score"

The verifier may print, read its stdin, raise or exit: the protocol has file descriptors of its own. The end of stdin, which
also means that the parent died, ends the process.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import numbers
import os
import signal
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

GRACE_S = 5.0
"""The parent kills a verifier that is over its time; this much later the kernel does, in case the parent is dead."""
MAX_DETAIL_CHARS = 500
MAX_SCORE = 1e6
"""The largest score, either way: rewards are float32, in which sums and squares of larger ones would not be finite for long."""


def claim_descriptors() -> tuple[Any, int]:
    """The protocol's (input file, output descriptor); afterwards 0 and 1 are the null device, for the verifier."""
    protocol_in, protocol_out = os.dup(0), os.dup(1)  # not inherited by a verifier's own children
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    return os.fdopen(protocol_in, "rb"), protocol_out


def silence_errors() -> None:
    """What the verifier writes to stderr must not run through the parent's progress bars."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    os.close(null)


def write_line(descriptor: int, message: list[Any]) -> None:
    """One line, whole. ASCII, so that no text can break the framing."""
    data = json.dumps(message).encode("ascii") + b"\n"
    while data:
        data = data[os.write(descriptor, data) :]


def limit(seconds: float) -> None:
    """Ends the process by the kernel after so many seconds and a grace, also where C code holds the interpreter; 0: no more."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds and seconds + GRACE_S)


def load(name: str) -> tuple[Callable[..., Any], Callable[[str], Any] | None]:
    """The function "module:function", and its module's `wrap_reference`, if any. ValueError says why it cannot be had."""
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise ValueError("it is not of the form module:function")
    try:
        found: Any = importlib.import_module(module_name)
    except BaseException as error:  # an import may even exit
        raise ValueError(f"importing {module_name!r} failed with {name_of(error)}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ValueError(f"module {module_name!r} has no {attribute!r}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{name} is {type(found).__name__}, not a function")
    wrap = getattr(sys.modules[module_name], "wrap_reference", None)
    return found, wrap if callable(wrap) else None


def code_digest() -> str:
    """SHA-256 of the Python that this process has imported: of each file its text, of one of an installed package its size.

    What a verifier imports only when it is called is not seen, nor is what it reads.
    """
    installed = tuple({sysconfig.get_path(kind) + os.sep for kind in ("purelib", "platlib")})
    digest = hashlib.sha256(sys.version.encode())
    for name, module in sorted(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if not file or name.partition(".")[0] in sys.stdlib_module_names or not os.path.isfile(file):
            continue
        found = str(os.path.getsize(file)).encode() if file.startswith(installed) else Path(file).read_bytes()
        digest.update(b"\0".join((name.encode(), hashlib.sha256(found).digest())))
    return digest.hexdigest()


def name_of(error: BaseException) -> str:
    """Type and message, cut to MAX_DETAIL_CHARS; an exception whose message raises is named by its type."""
    try:
        return f"{type(error).__name__}: {error}"[:MAX_DETAIL_CHARS]
    except BaseException:
        return type(error).__name__


def judge(verify: Callable[..., Any], wrap: Callable[[str], Any] | None, answer: str, token_ids: list[int] | None,
          text: str | None) -> tuple[str, Any, str]:  # fmt: skip
    """(status, score or None, detail) of one call."""
    try:
        if token_ids is None:
            assert wrap is not None
            token_ids, text = [], str(wrap(answer))
        score = verify(answer, token_ids, text)
    except BaseException as error:  # SystemExit and KeyboardInterrupt are the verifier's mistakes too
        return "error", None, name_of(error)
    if type(score) is not float:
        if isinstance(score, bool) or not isinstance(score, numbers.Real):
            return "bad_score", None, f"returned a {type(score).__name__}, expected a number such as +1.0 or -1.0"
        try:
            score = float(score)
        except BaseException as error:
            return "bad_score", None, f"returned a {type(score).__name__} that is no float: {name_of(error)}"
    if not abs(score) <= MAX_SCORE:  # NaN compares as False
        return "bad_score", None, f"returned {score}, expected a number of at most {MAX_SCORE:,.0f}, either way"
    return "ok", score, ""


def main() -> None:
    name, timeout_s, startup_s = sys.argv[1], float(sys.argv[2]), float(sys.argv[3])
    lines, out = claim_descriptors()
    limit(startup_s)
    try:
        verify, wrap = load(name)
    except ValueError as error:
        write_line(out, ["fatal", str(error)[:MAX_DETAIL_CHARS]])
        return
    code = code_digest()
    limit(0.0)
    silence_errors()
    write_line(out, ["ready", wrap is not None, code])
    for line in lines:
        seq, answer, token_ids, text = json.loads(line)
        limit(timeout_s)
        status, score, detail = judge(verify, wrap, answer, token_ids, text)
        limit(0.0)
        write_line(out, [seq, status, score, detail])


if __name__ == "__main__":
    main()
