"""The one command line of sim: a frozen dataclass's fields become options, and a mistake becomes one line.

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class BiasConfig:
        window: tuple[int, ...] = option((), "windows [O]", metavar="TOKENS")

    parse(BiasConfig, argv, command="bias", description=...) -> BiasConfig

A field's annotation says what its option takes: str, int, float, bool (a switch), Literal, tuple[X, ...] (one or more), X | None.
Every mistake is a UserError of the form `name: got VALUE; expected ...`, with the remedy where there is one.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from tppo_ref import __version__
from tppo_ref.method.errors import UserError, nearest

ConfigT = TypeVar("ConfigT")
EXPECTED: dict[type, str] = {int: "an integer", float: "a number"}


def option(default: Any, help: str, metavar: str | None = None) -> Any:
    """A dataclass field that is an option; `help` ends with where the default comes from, as in docs/config.md."""
    return dataclasses.field(default=default, metadata={"help": help, "metavar": metavar})


def parse(config_class: type[ConfigT], argv: Sequence[str], *, command: str, description: str) -> ConfigT:
    """The command line as a config. `--help` and `--version` print and leave with exit code 0."""
    given = vars(_Parser(config_class, command, description).parse_args(list(argv)))
    return config_class(**{name: tuple(x) if isinstance(x, list) else x for name, x in given.items()})


@contextmanager
def mistakes() -> Iterator[None]:
    """ValueErrors of the library as UserErrors: the names in them are those of the options."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults are shown, the description keeps its lines."""


class _Parser(argparse.ArgumentParser):
    """An option per field: --prompt-tokens and --prompt_tokens are the same."""

    def __init__(self, config_class: type, command: str, description: str):
        super().__init__(prog=f"python -m sim {command}", description=description, allow_abbrev=False, formatter_class=_Help)
        self.add_argument("--version", action="version", version=f"tppo-ref {__version__}")
        hints = typing.get_type_hints(config_class)
        self.names = [field.name for field in dataclasses.fields(config_class)]
        for field in dataclasses.fields(config_class):
            flags = sorted({f"--{field.name}", f"--{field.name.replace('_', '-')}"})
            takes = _takes(hints[field.name], field.metadata["metavar"])
            self.add_argument(*flags, dest=field.name, default=field.default, help=field.metadata["help"], **takes)

    def error(self, message: str) -> NoReturn:
        """argparse's own words, in our dialect."""
        if match := re.match(r"unrecognized arguments: (\S+)", message):
            name = match[1].partition("=")[0]
            if name.startswith("--"):
                raise UserError(f"{name}: no such option{nearest(name.removeprefix('--'), self.names)}")
            raise UserError(f"arguments: got {match[1]}, which belongs to no option; expected --option VALUE")
        flags, _, what = message.removeprefix("argument ").partition(": ")
        what = re.sub("^expected (.*) argument.*", r"got nothing; expected \1 value", what)
        what = re.sub("^ignored explicit argument (.*)", r"got \1; expected no value", what)
        raise UserError(f"{flags.split('/')[-1].removeprefix('--')}: {what}")


def _takes(hint: Any, metavar: str | None) -> dict[str, Any]:
    """What argparse is to take for an annotation."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(inner for inner in typing.get_args(hint) if inner is not type(None))
    if hint is bool:
        return {"action": "store_true"}
    if typing.get_origin(hint) is tuple:
        return {"nargs": "+", "metavar": metavar, "type": _reader(typing.get_args(hint)[0])}
    if typing.get_origin(hint) is typing.Literal:
        names = typing.get_args(hint)
        return {"metavar": metavar or f"{{{','.join(names)}}}", "type": _chooser(names)}
    return {"metavar": metavar, "type": _reader(hint)}


def _reader(kind: type) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}; expected {EXPECTED[kind]}") from None

    return read


def _chooser(names: Sequence[str]) -> Callable[[str], str]:
    def choose(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"got {text!r}; expected one of {', '.join(names)}{nearest(text, names)}")
        return text

    return choose
