"""Nested frozen dataclasses from a file and a command line: the one parser that laptop and cluster share."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import re
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from tppo_ref.method.errors import UserError, nearest, refusal
from tppo_ref.runs.yaml_file import StrictLoader, read_fields, read_sections

ConfigT = TypeVar("ConfigT")

GONE = {
    "advantage.length_adaptive_lam": "give advantage.lam_alpha null for a lambda that does not grow",
    "advantage.tail none": "give advantage.tail_tokens 0 to train the tail at once",
}
"""Fields, and values of a field, that there were: what to give in their place."""

LONGEST = 600  # characters of a message that is jsonargparse's


def replace_fields(config: ConfigT, overrides: Mapping[str, Any]) -> ConfigT:
    """A copy of a nested config with dotted fields replaced, as `{"rollout.window": 64}`. Unknown names are UserErrors.

    A whole section may be given as what the config holds there. As anything else it is a UserError: a mapping would say nothing
    of the fields that it leaves out (`dotted_fields`).
    """
    paths = field_paths(type(config))
    for path, value in overrides.items():
        if path not in paths:
            inside = next((one for one in paths if one.startswith(f"{path}.")), None)
            if inside is None:
                raise UserError(f"{path}: no such field{_instead(path, paths)}")
            if not isinstance(value, type(get_field(config, path))):
                raise UserError(refusal(path, str(value), f"fields under it, as {inside}"))
        config = _replaced(config, path.split("."), _number(path, value, get_field(config, path)))
    return config


def _replaced(config: Any, names: Sequence[str], value: Any) -> Any:
    if len(names) > 1:
        value = _replaced(getattr(config, names[0]), names[1:], value)
    return dataclasses.replace(config, **{names[0]: value})


def _number(path: str, value: Any, current: Any) -> Any:
    """YAML 1.1 reads 6e-4 as a text: a text where a number stands is read as one, or refused."""
    if not isinstance(value, str) or isinstance(current, bool) or not isinstance(current, int | float):
        return value
    try:
        return type(current)(value)
    except ValueError:
        raise UserError(refusal(path, repr(value), "an integer" if isinstance(current, int) else "a number")) from None


def field_paths(config_class: Any, prefix: str = "") -> list[str]:
    """Dotted names of all leaf fields of a nested config class, in order."""
    paths: list[str] = []
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        inner = hints[field.name]
        paths += field_paths(inner, f"{prefix}{field.name}.") if dataclasses.is_dataclass(inner) else [prefix + field.name]
    return paths


def dotted_fields(config_class: Any, fields: Mapping[Any, Any]) -> dict[str, Any]:
    """Fields by their dotted names, {"rollout": {"window": 64}} as {"rollout.window": 64}. UserError for one that is given twice.

    A mapping that is a field's own value stays one.
    """
    paths, dotted = field_paths(config_class), dict[str, Any]()
    for path, value in _leaves(fields, ends=paths):
        if isinstance(value, dict) and value and path not in paths:
            continue  # a section: what it holds comes next
        if path in dotted:
            raise UserError(refusal(path, f"{dotted[path]} and {value}", "one value", "drop one"))
        dotted[path] = value
    return dotted


def get_field(config: Any, path: str) -> Any:
    """The value of a dotted field."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def parse(config_class: type[ConfigT], argv: Sequence[str], *, prog: str, description: str = "") -> ConfigT:
    """`--config FILE --section.field VALUE` into a nested frozen dataclass: the one parser of laptop and cluster.

    A field on the command line wins over the files wherever it stands. Unknown keys, wrong types and unreadable files raise
    UserError, in one line, with the nearest right name. `--help` and `--print_config` print and leave with exit code 0.
    """
    fields_given(config_class, argv)
    parser = _parser(config_class, prog, description)
    files, others = _files_and_others(argv)  # to jsonargparse whatever comes later wins
    return _instance(config_class, parser, lambda: parser.parse_args([*files, *others]))


def typed(config: ConfigT) -> ConfigT:
    """The config, its fields of the types that they are declared with; UserError where one cannot be."""
    parser = _parser(type(config), "", "")
    return _instance(type(config), parser, lambda: parser.parse_object(dataclasses.asdict(config)))  # type: ignore[call-overload]


def _parser(config_class: Any, prog: str, description: str) -> Any:
    import jsonargparse  # slow to import, and nothing else of the library needs it

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML or JSON file with any of the fields below.")
    parser.add_class_arguments(config_class, None)
    return parser


def _instance(config_class: type[ConfigT], parser: Any, parsed: Callable[[], Any]) -> ConfigT:
    import jsonargparse

    try:
        values = parser.instantiate(parsed()).as_dict()
    except jsonargparse.ArgumentError as error:
        raise UserError(_one_line(str(error), field_paths(config_class))) from None
    return config_class(**{f.name: values[f.name] for f in dataclasses.fields(config_class)})  # type: ignore[arg-type]


def fields_given(config_class: Any, argv: Sequence[str]) -> set[str]:
    """Dotted names of the fields that a command line gives, those of its files included: `--config FILE`, and `--section FILE`.

    A file that is no mapping (of sections; of fields, where it is a section's), or has a key twice, is a UserError with the file's
    name, which jsonargparse leaves out.
    """
    sections = {path[: dot.start()] for path in field_paths(config_class) for dot in re.finditer(r"\.", path)}
    files, others = _files_and_others(argv)
    given = {"config"} if files else set()
    for arg, behind in zip(others, [*others[1:], ""], strict=False):
        if arg.startswith("--"):
            name, _, value = arg[2:].partition("=")
            content = _mapping(value or behind)
            given |= set(_with_files([(name, None if content else value or behind), *_leaves(content, f"{name}.")], sections))
    for file in (arg.removeprefix("--config=") for arg in files if arg != "--config"):
        given |= set(_with_files(_leaves(read_sections(file)), sections, Path(file).parent))
    return given


def _with_files(fields: Iterable[tuple[str, Any]], sections: Collection[str], beside: Path = Path()) -> Iterator[str]:
    """The names of `fields`, and where a section's value is a file, of those in it: a relative name is looked for in `beside`."""
    for name, value in fields:
        yield name
        if name in sections and isinstance(value, str) and os.path.isfile(file := beside / value):
            yield from _with_files(_leaves(read_fields(str(file), name), f"{name}."), sections, file.parent)


def _mapping(text: str) -> Mapping[Any, Any]:
    """What `--section '{field: value}'` gives; empty where a text is no mapping."""
    with contextlib.suppress(yaml.YAMLError, ValueError, RecursionError):  # the parser will say so, where a mapping is expected
        content = StrictLoader(text).get_single_data()
        return content if isinstance(content, dict) else {}
    return {}


def without_files(argv: Sequence[str]) -> list[str]:
    """The arguments but for `--config FILE`."""
    return _files_and_others(argv)[1]


def _files_and_others(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments `--config FILE` and `--config=FILE`, and all others, each in their order."""
    behind = [False, *(arg == "--config" for arg in argv)]
    of_file = [after or arg == "--config" or arg.startswith("--config=") for after, arg in zip(behind, argv, strict=False)]
    return list(itertools.compress(argv, of_file)), [arg for arg, one in zip(argv, of_file, strict=True) if not one]


def _leaves(sections: Mapping[Any, Any], prefix: str = "", ends: Collection[str] = ()) -> Iterator[tuple[str, Any]]:
    """What nested mappings hold, by its dotted name: a mapping and then what is in it, but for those named in `ends`."""
    for name, value in sections.items():
        yield f"{prefix}{name}", value
        if isinstance(value, dict) and f"{prefix}{name}" not in ends:
            yield from _leaves(value, f"{prefix}{name}.", ends)


def _instead(name: str, names: Sequence[str]) -> str:
    """The end of a refusal of a name: what became of the field, or the nearest one that there is."""
    gone = [remedy for field, remedy in GONE.items() if name == field or name.endswith(f".{field}")]
    return f"; {gone[0]}" if gone else nearest(name, names)


def _one_line(message: str, names: Sequence[str]) -> str:
    """jsonargparse's error in one line, with the nearest right name where a name is the error."""
    message = " ".join(message.split())
    message = message if len(message) <= LONGEST else f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
    if match := re.search(r"unrecognized arguments: (\S+)", message):
        name = match.group(1).lstrip("-").partition("=")[0]
        return f"--{name}: no such option{_instead(name, names)}"
    if match := re.search(r"Group '(\S+)' does not accept option '(\S+)'", message):
        name = f"{match.group(1)}.{match.group(2)}"
        return f"{name}: no such field{_instead(name, names)}"
    if match := re.search(r"(?:Option|Key) '(\S+?)' is not accepted|does not accept option '(\S+)'", message):
        name = match.group(1) or match.group(2)
        return f"{name}: no such field{_instead(name, [*names, *{n.partition('.')[0] for n in names}])}"
    if match := re.search(r"(\S+?)\"?: Expected a \S.* Got value: (\S+)$", message):
        message += _instead(" ".join(match.groups()).lstrip('"'), ())
    message = re.sub(r"Parser key \"(\S+?)\": ", r"\1: ", message)
    return re.sub(r"Expected a (?:<class '(\w+)'>|typing\.)", r"expected \1", message).replace(" Got value:", " got")
