"""sim/command.py: annotations become options, and every mistake is one line that names the option, what came and what was expected."""

from __future__ import annotations

import dataclasses
import json
from typing import Literal

import pytest

from sim.__main__ import COMMANDS, main
from sim.command import mistakes, option, parse
from tppo_ref import __version__
from tppo_ref.method.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tea:
    num_cups: int = option(1, "cups [O]")
    grams: float = option(2.5, "of leaves [O]", metavar="GRAMS")
    kind: Literal["green", "black"] = option("green", "of tea [O]")
    minutes: tuple[int, ...] = option((), "one per infusion [O]")
    pot: str | None = option(None, "which pot")
    deepest: int | None = option(None, "in cm")
    milk: bool = option(False, "with milk")


def tea(line: str) -> Tea:
    return parse(Tea, line.split(), command="tea", description="Makes tea.")


def test_nothing_given_is_the_dataclass_itself():
    assert tea("") == Tea()


def test_annotations_say_what_options_take():
    made = tea("--num-cups 3 --grams 1e-1 --kind black --minutes 1 -2 3 --pot iron --deepest 7 --milk")
    assert made == Tea(num_cups=3, grams=0.1, kind="black", minutes=(1, -2, 3), pot="iron", deepest=7, milk=True)
    assert tea("--num_cups 3") == tea("--num-cups=3") == Tea(num_cups=3)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--num_cups many", "num_cups: got 'many'; expected an integer"),
        ("--num-cups 1.5", "num_cups: got '1.5'; expected an integer"),
        ("--grams x", "grams: got 'x'; expected a number"),
        ("--minutes 3 x", "minutes: got 'x'; expected an integer"),
        ("--deepest x", "deepest: got 'x'; expected an integer"),
        ("--kind blakc", "kind: got 'blakc'; expected one of green, black; did you mean black?"),
        ("--pot", "pot: got nothing; expected one value"),
        ("--minutes", "minutes: got nothing; expected at least one value"),
        ("--milk=1", "milk: got '1'; expected no value"),
        ("--mlik", "--mlik: no such option; did you mean milk?"),
        ("--num 3", "--num: no such option"),
        ("please", "arguments: got please, which belongs to no option; expected --option VALUE"),
    ],
)
def test_a_mistake_is_one_line_in_one_dialect(line, said):
    with pytest.raises(UserError) as error:
        tea(line)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_the_librarys_mistakes_are_the_users_and_other_errors_stay_what_they_are():
    with pytest.raises(UserError, match="window: got 0"), mistakes():
        raise ValueError("window: got 0; expected an integer of at least 1")
    with pytest.raises(KeyError), mistakes():
        raise KeyError("a bug")


def test_help_shows_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as leaving:
        tea("--help")
    text = capsys.readouterr().out
    assert leaving.value.code == 0
    for field in dataclasses.fields(Tea):
        assert f"--{field.name}" in text
        assert field.metadata["help"] in text
    assert "{green,black}" in text
    assert "(default: 2.5)" in text


@pytest.mark.parametrize("argv", [["--version"], *([name, "--version"] for name in COMMANDS)])
def test_the_version_is_the_packages(argv, capsys):
    try:
        code = main(argv)
    except SystemExit as leaving:
        code = leaving.code
    assert code == 0
    assert capsys.readouterr().out == f"tppo-ref {__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_mistake_is_one_line_on_stderr_and_json_for_who_asked_for_it(name, capsys):
    assert main([name, "--outt", "x", "--json"]) == 2
    out, err = capsys.readouterr()
    assert err == "error: --outt: no such option; did you mean out?\n"
    assert json.loads(out) == {"error": err.removeprefix("error: ").strip()}


def test_an_unknown_command_is_named_with_its_nearest(capsys):
    assert main(["biass"]) == 2
    assert "command: got 'biass'; expected one of bias, throughput, plan; did you mean bias?" in capsys.readouterr().err
