"""`python -m tppo_ref train | compare | pretrain-value | evaluate | check-data`, with `--config FILE --section.field VALUE`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from tppo_ref.method.errors import UserError, nearest
from tppo_ref.runs.config import Config, apply_method
from tppo_ref.runs.parsing import given_fields, parse
from tppo_ref.runs.validation import check


def train(config: Config, given: set[str]) -> None:
    """Train one policy with one method."""
    from tppo_ref.runs.commands import train as run_train

    config = apply_method(config, config.run.method, given=given)
    check(config)
    print(f"checkpoint: {run_train(config)}")


def compare(config: Config, given: set[str]) -> None:
    """Run several methods over several seeds on one task; tables, figures and their CSV go to run.out."""
    from tppo_ref.runs.compare import compare as run_compare

    run_compare(config)


def pretrain_value(config: Config, given: set[str]) -> None:
    """Fit the value model to responses of the frozen policy, and report how well it explains their returns."""
    from tppo_ref.runs.commands import pretrain_value as run_pretrain

    run_pretrain(config)


def evaluate(config: Config, given: set[str]) -> None:
    """Sample full-length answers from model.policy on the task's test prompts, and report their accuracy."""
    from tppo_ref.runs.commands import evaluate as run_evaluation

    run_evaluation(config)


def check_data(config: Config, given: set[str]) -> int:
    """Verify each reference of a prompt file (check-data FILE, or --task.path) against itself; exit code 1 where one fails."""
    from tppo_ref.runs.commands import check_data as run_check

    return run_check(config)


COMMANDS: dict[str, Callable[[Config, set[str]], int | None]] = {
    "train": train, "compare": compare, "pretrain-value": pretrain_value, "evaluate": evaluate, "check-data": check_data,
}  # fmt: skip


def usage() -> str:
    lines = [f"  {name:15} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join([
        "usage: python -m tppo_ref COMMAND [--config FILE] [--section.field VALUE ...]", "", *lines, "",
        "COMMAND --help lists every field with its default, its meaning and where the default comes from.",
    ])  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 done, 2 a user's mistake (one line on stderr), 130 Ctrl-C (train: once writes a checkpoint)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    try:
        if argv[0] not in COMMANDS:
            raise UserError(f"unknown command {argv[0]!r}, expected one of {', '.join(COMMANDS)}{nearest(argv[0], list(COMMANDS))}")
        command = COMMANDS[argv[0]]
        if argv[0] == "check-data" and len(argv) > 1 and not argv[1].startswith("-"):
            argv = [argv[0], "--task.path", *argv[1:]]
        config = parse(Config, argv[1:], prog=f"python -m tppo_ref {argv[0]}", description=command.__doc__ or "")
        check(config)
        import torch  # after the arguments are known to be right: these take seconds to import
        import transformers

        torch.set_num_threads(config.run.threads)
        transformers.utils.logging.disable_progress_bar()  # a bar of its own for every file that is read or written
        return command(config, given_fields(argv[1:])) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
