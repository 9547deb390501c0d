"""One colour per method and estimator: every name has a look, the same in figures and on pages, and readers can tell them apart."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from sim.lab.estimators import ESTIMATORS, CutValue
from tppo_ref.runs.colours import COLOURS, LOOKS, OTHER, SERIES, look
from tppo_ref.runs.config import METHODS

ROOT = Path(__file__).resolve().parents[1]
FIVE = ("ppo", "tppo", "critic", "zero", "none")  # those that share figures most
PAGES = {"colour": "#FFFFFF", "on_dark": "#16181D"}
# What a dichromat's eye makes of linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
EYES = {
    "normal": np.eye(3),
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(colour: str) -> np.ndarray:
    c = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    """WCAG 2's ratio."""
    light, dark = sorted((float(linear(x) @ [0.2126, 0.7152, 0.0722]) for x in (a, b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b*."""
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_every_method_cut_rule_and_estimator_has_a_look():
    assert {*METHODS, *ESTIMATORS, *get_args(CutValue)} <= set(LOOKS)
    assert look("my_module:mine") is OTHER


@pytest.mark.parametrize("same", [
    ("tppo", "previous", "egae"), ("critic", "cut-gae", "tppo-critic-cut"), ("zero", "zero-cut", "tppo-zero-cut"), ("none", "gae"),
    ("tppo-defer", "egae-defer"),
])  # fmt: skip
def test_what_is_the_same_looks_the_same(same):
    assert len({look(name) for name in same}) == 1


def test_in_grey_looks_differ_in_line_or_marker():
    """Two that are not the same never share both; of one family's names no two share a look."""
    for a, b in itertools.combinations({*LOOKS.values(), OTHER}, 2):
        assert (str(a.dashes), a.marker) != (str(b.dashes), b.marker), (a, b)
    for family in (METHODS, get_args(CutValue), ESTIMATORS):
        assert len({look(name) for name in family}) == len(family)


@pytest.mark.parametrize("page", PAGES)
def test_the_five_stand_out_from_the_page_and_from_one_another_for_every_eye(page):
    colours = {name: getattr(look(name), page) for name in FIVE}
    assert all(contrast(colour, PAGES[page]) >= 3 for colour in colours.values())
    for eye, matrix in EYES.items():
        seen = {name: lab(np.clip(matrix @ linear(colour), 0, 1)) for name, colour in colours.items()}
        for a, b in itertools.combinations(FIVE, 2):
            assert np.linalg.norm(seen[a] - seen[b]) > 10, (eye, a, b)  # 2.3 is a difference that one just sees


def test_series_without_a_name_have_no_colour_of_the_five():
    assert len(set(SERIES)) == len(SERIES)
    assert not {COLOURS[i] for i in SERIES} & {look(name).colour for name in FIVE}


def test_red_and_green_of_one_lightness_would_be_noticed():
    a, b = (lab(np.clip(EYES["deutan"] @ linear(colour), 0, 1)) for colour in ("#B87A00", "#D55E00"))
    assert np.linalg.norm(a - b) < 10


def test_the_widget_has_the_same_colours_in_light_and_in_dark():
    css = (ROOT / "docs" / "widget" / "widget.css").read_text()
    for name in get_args(CutValue)[:4]:
        found = re.findall(rf"--{name}: (#\w{{6}})", css)
        assert [x.upper() for x in found] == [x.upper() for x in (look(name).colour, look(name).on_dark, look(name).on_dark)], name
    assert re.findall(r"--page: (#\w{6})", css)[1].upper() == PAGES["on_dark"]


def test_nobody_else_writes_the_colours_of_the_methods_down():
    mine = [look(name).colour for name in ("ppo", "tppo")]
    houses = [path for house in ("tppo_ref", "sim", "scale", "benchmarks", "notebooks") for path in (ROOT / house).rglob("*.py")]
    texts = [*houses, *(ROOT / "notebooks").glob("*.ipynb")]
    assert [path.name for path in texts if any(colour.lower() in path.read_text().lower() for colour in mine)] == ["colours.py"]
