"""`tppo COMMAND ...`, which is also `python -m tppo_ref COMMAND ...`: what each command is, and how a mistake ends."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tppo_ref import __version__
from tppo_ref.method.errors import UserError, nearest, refusal
from tppo_ref.runs import console
from tppo_ref.runs.config import Config, apply_method, refuse_contradicting
from tppo_ref.runs.exits import exit_code
from tppo_ref.runs.parsing import fields_given, parse, without_files
from tppo_ref.runs.plans import check_plans
from tppo_ref.runs.validation import (
    CANCELLED,
    check,
    check_bounds,
    check_task,
    check_training,
    refuse_cancelled,
    refuse_without_critic,
)


def demo(config: Config, given: set[str]) -> None:
    """Train PPO and T-PPO on a built-in task, 6 minutes on 2 cores; --quick: one short seed each, which proves nothing."""
    compare(config, given)
    if config.compare.seeds == 1:
        print("One seed of each method proves nothing: it shows what a run looks like. Without --quick there are three.")


def train(config: Config, given: set[str]) -> None:
    """Train one policy with one method."""
    config = apply_method(config, config.run.method, given=given)
    check(config)  # not before: what cannot run may be what the method is there for, or what it brings
    check_task(config)
    check_training(config)
    _train(config)


def resume(config: Config, given: set[str]) -> None:
    """Go on with the run of a folder (resume FOLDER), from its newest checkpoint and under its own configuration."""
    check(config)
    # Of the run's own fields one may do nothing since then: run.steps, where run.train_seconds is given behind the folder.
    refuse_cancelled(config, [one for one in CANCELLED if one.field in given], given)
    _train(config)


def _train(config: Config) -> None:
    from tppo_ref.runs.checkpoint import what_is_left
    from tppo_ref.runs.commands import train as run_train

    try:
        print(f"checkpoint: {run_train(config)}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(what_is_left(Path(config.run.out), f"tppo resume {config.run.out}")) from None


def compare(config: Config, given: set[str]) -> None:
    """Run several methods over several seeds on one task; tables, figures and their CSV go to run.out."""
    check_plans(config)
    check_task(config)
    from tppo_ref.runs.compare import compare as run_compare

    run_compare(config)


def report(config: Config, given: set[str]) -> None:
    """Tables and figures of a finished comparison, or a run's phases beside what was predicted of them (report FOLDER)."""
    out = Path(config.run.out)
    if (out / "metrics.jsonl").exists():
        from tppo_ref.runs.measured import write_measured

        write_measured(out, min(config.rollout.window, config.rollout.max_response_tokens))
        return
    from tppo_ref.runs.report import write_report

    write_report(out, methods=config.compare.methods, target_share=config.compare.target)


def _sampled(config: Config, given: set[str]) -> Config:
    """For the commands that sample whole answers and train no policy: the config with its method's fields, checked.

    What contradicts the method is refused only beside a `--run.method` on the command line. A file may say how a run was trained:
    with fields of its own in `compare.per_method`, or with responses of another length.
    given   names of the fields on the command line itself
    """
    method, named = config.run.method, "run.method" in given
    if named:
        refuse_contradicting(config, method, given)
    applied = apply_method(config, method, strict=False)
    try:
        check(applied)
    except UserError:
        if named:
            raise
        check(config)  # a run's own configuration, which the method would undo
        applied = config
    check_task(applied)
    return applied


def pretrain_value(config: Config, given: set[str]) -> None:
    """Fit the value model to responses of the frozen policy, and report how well it explains their returns."""
    config = _sampled(config, given)
    refuse_without_critic(config)
    from tppo_ref.runs.commands import pretrain_value as run_pretrain

    print(f"value model: {run_pretrain(config)}")


def evaluate(config: Config, given: set[str]) -> None:
    """Sample full-length answers from model.policy on the task's test prompts, and report their accuracy."""
    config = _sampled(config, given)
    from tppo_ref.runs.commands import evaluate as run_evaluation

    run_evaluation(config)


def check_data(config: Config, given: set[str]) -> int:
    """Verify each reference of a prompt file (check-data FILE, or --task.path) against itself; exit code 1 where one fails."""
    from tppo_ref.runs.commands import check_data as run_check

    return run_check(config)


COMMANDS: dict[str, Callable[[Config, set[str]], int | None]] = {
    "demo": demo, "train": train, "resume": resume, "compare": compare, "evaluate": evaluate, "pretrain-value": pretrain_value,
    "check-data": check_data, "report": report,
}  # fmt: skip

SAMPLING = ("evaluate", "pretrain-value")
"""Commands that a file of fields tells how a run was trained, and not what they are to do."""


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 done, 2 a user's mistake (one line on stderr), 130 Ctrl-C (train: once writes a checkpoint)."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    lines = {name: (command.__doc__ or "").strip() for name, command in COMMANDS.items()}
    if not argv or argv[0] in ("-h", "--help"):
        print(console.usage(lines))
        return 0
    if argv[0] == "--version":
        print(f"tppo-ref {__version__}")
        return 0
    return exit_code(lambda: _run(argv[0], argv[1:], lines))


def _run(name: str, argv: Sequence[str], lines: Mapping[str, str]) -> int | None:
    """Do what a command says; its exit code. UserError for a mistake, before anything is loaded where that is possible."""
    if name == "completion":
        print(console.completion(list(COMMANDS), argv))
        return 0
    if (elsewhere := console.elsewhere().get(name)) is not None:
        return elsewhere([name, *argv])
    if name not in COMMANDS:
        known = [*COMMANDS, *console.elsewhere(), "completion"]
        raise UserError(refusal("command", repr(name), f"one of {', '.join(known)}") + nearest(name, known))
    line = lines[name]
    if "--help" in argv or "-h" in argv:
        print(console.short_help(name, line))
        return 0
    fields = console.fields_of(name, argv)
    config = parse(Config, ["--help" if arg == "--help-all" else arg for arg in fields], prog=f"tppo {name}", description=line)
    check_bounds(config)  # no more yet: what cannot run may be what the method is there for, and a comparison has several
    words = without_files(argv) if name in SAMPLING else argv  # not `fields`: what a folder or the demo brings was not given
    return COMMANDS[name](config, fields_given(Config, words))


def run() -> None:
    """The console script `tppo`."""
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
