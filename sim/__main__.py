"""`python -m sim COMMAND ...`: each command is a module with a `main(argv)`, imported when it is asked for."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence

from tppo_ref import __version__
from tppo_ref.method.errors import UserError, nearest

COMMANDS: dict[str, tuple[str, str]] = {
    "bias": (
        "sim.lab.bias_command",
        "What a window costs: exact bias, variance and gradient error on a token MDP, and the window to take.",
    ),
    "throughput": (
        "sim.clock.throughput_command",
        "Where the 2.5x comes from, and where it vanishes: the clock on published lengths.",
    ),
    "plan": ("sim.clock.plan_command", "What a run needs and takes: bytes per device, seconds per step, which window."),
}
"""Name -> (module, one line for people)."""


def usage() -> str:
    """What `python -m sim` prints without a command."""
    lines = [f"  {name:12} {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(["usage: python -m sim COMMAND [--option VALUE ...]", "", *lines, "", "COMMAND --help lists its options."])


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 done, 2 a user's mistake, 130 Ctrl-C. A mistake is one line on stderr; with --json also {"error": the line}."""
    try:
        code = _run(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has enough, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"tppo-ref {__version__}")
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise UserError(f"command: got {argv[0]!r}; expected one of {', '.join(COMMANDS)}{nearest(argv[0], list(COMMANDS))}")
        importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])
    except UserError as error:
        if "--json" in argv:
            print(json.dumps({"error": str(error)}))
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
