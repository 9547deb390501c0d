"""How a command ends: an exit code, and one line on stderr where something is wrong."""

from __future__ import annotations

import sys
from collections.abc import Callable

from tppo_ref.method.errors import UserError
from tppo_ref.runs.stop import sigterm_stops

MISTAKE, STOPPED = 2, 130


def exit_code(command: Callable[[], int | None], tell: Callable[[str], None] | None = None) -> int:
    """Run `command`; its exit code (None: 0), 2 for a user's mistake, 130 for Ctrl-C and SIGTERM, each told in one line.

    tell   what is done with that line; None: it goes to stderr
    """
    try:
        with sigterm_stops():
            return command() or 0
    except UserError as error:
        code, line = MISTAKE, f"error: {error}"
    except KeyboardInterrupt as stop:
        code, line = STOPPED, str(stop) or "stopped"
    (tell or say)(line)
    return code


def say(line: str) -> None:
    """One line for people, apart from results."""
    print(line, file=sys.stderr, flush=True)
