"""The words around the commands: usage, a help of one screen, completion, and the commands that other packages bring.

A package adds a command by an entry point of the group `tppo.commands`: a function of the argument list, its own name first, that
returns an exit code. So `tppo plan` and `tppo launch` exist without an import of sim or scale in here.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tppo_ref.method.errors import UserError
from tppo_ref.runs.config import Config
from tppo_ref.runs.docs_pages import field_help
from tppo_ref.runs.parsing import field_paths, get_field, parse
from tppo_ref.runs.repair import read_config

GROUP = "tppo.commands"
CONFIGS = Path(__file__).parents[1] / "configs"
SHELLS = ("bash", "zsh", "tcsh")

ESSENTIAL: dict[str, tuple[str, ...]] = {
    "train": (
        "run.method", "run.out", "run.steps", "run.train_seconds", "run.seed", "task.name", "task.path", "task.verifier",
        "model.policy", "model.value", "model.device", "rollout.slots", "rollout.window", "rollout.max_response_tokens",
        "policy.lr", "value.lr",
    ),
    "compare": (
        "compare.methods", "compare.seeds", "compare.jobs", "compare.per_method", "run.out", "run.train_seconds", "task.name",
        "rollout.slots", "rollout.window",
    ),
    "evaluate": ("model.policy", "task.name", "task.path", "task.eval_path", "run.out", "run.eval_prompts", "run.eval_samples"),
    "pretrain-value": (
        "model.policy", "model.value", "task.name", "task.path", "run.out", "value.pretrain_responses", "value.pretrain_epochs",
    ),
    "check-data": ("task.path", "task.eval_path", "task.verifier", "task.answer_key", "task.prompt_key"),
    "demo": ("run.out", "compare.seeds", "run.train_seconds", "task.name"),
    "resume": ("run.steps", "run.train_seconds", "run.progress"),
    "report": (),
}  # fmt: skip
"""Fields that the short help of a command shows; all of them stand in --help-all."""


def elsewhere() -> dict[str, Callable[[Sequence[str]], int]]:
    """Commands that other packages bring, by name; each is imported when it is called."""

    def call(entry: importlib.metadata.EntryPoint) -> Callable[[Sequence[str]], int]:
        return lambda argv: entry.load()(argv)

    return {entry.name: call(entry) for entry in _entries()}


def _entries() -> Sequence[importlib.metadata.EntryPoint]:
    return tuple(importlib.metadata.entry_points(group=GROUP))


def usage(lines: Mapping[str, str]) -> str:
    """What `tppo` prints without a command."""
    names = [*lines, *elsewhere(), "completion"]
    width = max(map(len, names))
    told = [f"  {name:{width}}  {line}" for name, line in lines.items()]
    told += [f"  {name:{width}}  see `tppo {name} --help`" for name in elsewhere()]
    told += [f"  {'completion':{width}}  Print a shell's completion script (completion bash | zsh | tcsh)."]
    return "\n".join([
        "usage: tppo COMMAND [--config FILE] [--section.field VALUE ...]", "", *told, "",
        "COMMAND --help lists what is set most often, COMMAND --help-all every field with where its default comes from.",
        "--version prints the version.",
    ])  # fmt: skip


def short_help(name: str, line: str) -> str:
    """A command's help on one screen."""
    hints = typing.get_type_hints(Config)
    texts = {f"{section}.{field}": text for section in hints for field, (text, _) in field_help(hints[section]).items()}
    default = parse(Config, fields_of(name, []), prog=name) if name == "demo" else Config()
    rows = [(path, texts[path], get_field(default, path)) for path in ESSENTIAL[name]]
    width = max((len(path) for path, _, _ in rows), default=0)
    options = [f"  --{path:{width}}  {text}{'' if value is None else f' (default {value})'}" for path, text, value in rows]
    argument = {"resume": " FOLDER", "report": " FOLDER", "check-data": " FILE", "demo": " [--quick]"}.get(name, "")
    return "\n".join([
        f"usage: tppo {name}{argument} [--config FILE] [--section.field VALUE ...]", "", line, "", *options, "",
        "--help-all lists every field.",
    ])  # fmt: skip


def fields_of(name: str, argv: Sequence[str]) -> list[str]:
    """A command's arguments as fields: its folder or file, and the configuration that it brings along, come first."""
    arguments = list(argv)
    if name == "demo":
        quick = "--quick" in arguments
        arguments = [argument for argument in arguments if argument != "--quick"]
        return ["--config", str(CONFIGS / ("demo-quick.yaml" if quick else "demo.yaml")), *arguments]
    if name == "check-data" and arguments and not arguments[0].startswith("-"):
        return ["--task.path", *arguments]
    if name in ("resume", "report") and "--help-all" not in arguments:
        if not arguments or arguments[0].startswith("-"):
            raise UserError(f"{name}: got no folder; expected the folder of a run, as in: tppo {name} runs/train")
        folder, *rest = arguments
        config = Path(folder) / "config.json"
        if name == "resume":
            config = read_config(Path(folder))
        if not config.is_file():
            raise UserError(f"{name}: got {folder}, which holds no config.json; expected the folder of a run; give its run.out")
        if b'"algo"' in config.read_bytes():
            raise UserError(f"{name}: got {folder}, a run of scale/; expected one of this machine's; give it to: tppo launch "
                            f"{'report' if name == 'report' else ''} --config {config}".replace("  ", " "))  # fmt: skip
        fields = ["--config", str(config), "--run.out", folder]
        return [*fields, *(["--run.resume", "true"] if name == "resume" else []), *rest]
    return arguments


def completion(commands: Sequence[str], argv: Sequence[str]) -> str:
    """A completion script for a shell, made by shtab from the commands and fields as they are."""
    if len(argv) != 1 or argv[0] not in SHELLS:
        raise UserError(f"completion: got {' '.join(argv) or 'no shell'}; expected one of {', '.join(SHELLS)}")
    import shtab

    parser = argparse.ArgumentParser(prog="tppo")
    below = parser.add_subparsers()
    hints = typing.get_type_hints(Config)
    for name in [*commands, *elsewhere()]:
        command = below.add_parser(name, help=name)  # shtab leaves out what has no help
        if name not in commands:
            continue
        command.add_argument("--config", help="a file of fields").complete = shtab.FILE  # type: ignore[attr-defined]
        for path in field_paths(Config):
            section, field = path.split(".")
            command.add_argument(f"--{path}", choices=_choices(hints[section], field), help=path)
    return shtab.complete(parser, shell=argv[0])


def _choices(section: type, field: str) -> list[str] | None:
    """What a field can be, where that is a short list."""
    assert dataclasses.is_dataclass(section)
    hint = typing.get_type_hints(section)[field]
    if hint is bool:
        return ["true", "false"]
    return [str(choice) for choice in typing.get_args(hint)] if typing.get_origin(hint) is typing.Literal else None
