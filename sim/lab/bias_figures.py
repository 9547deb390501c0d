"""The figures of `python -m sim bias`. `*_rows` makes the numbers, which go into the CSV, and `draw_*` draws those rows alone.

An estimator looks as tppo_ref.runs.colours says, the rest of the manner is tppo_ref.runs.figures': readable in grey.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sim.lab.bias_report import knee_sentence
from sim.lab.examination import Examination
from tppo_ref.runs.colours import look
from tppo_ref.runs.comparison import write_csv
from tppo_ref.runs.figures import DPI, FONT, Rows, below, select, tidy, values
from tppo_ref.runs.validation import writable_folder

ZERO = 1e-12  # what enumeration in float64 leaves of an exact 0: not drawn on a log axis
DECADES = 5  # of the log axes, below the largest number drawn


def draw(examination: Examination, out: str) -> list[Path]:
    """Writes each figure and its CSV into the folder; returns the figures. UserError where it cannot be written to."""
    folder, drawn = writable_folder(out, "out"), []
    for name, make_rows, draw_rows in FIGURES:
        if rows := make_rows(examination):
            write_csv(folder / f"{name}.csv", rows)
            draw_rows(folder / f"{name}.png", rows, examination)
            drawn.append(folder / f"{name}.png")
    return drawn


def distance_rows(examination: Examination) -> Rows:
    """Bias by estimator, window and distance to the cut, in units of reward; slope: (gamma lambda)^(n-1). Empty: nothing is cut."""
    decay = examination.config.gamma * examination.config.lam
    return [
        {"estimator": name, "window": window, **dataclasses.asdict(at), "slope": decay ** (at.distance - 1)}
        for name, finding in examination.findings.items() for window, distances in finding.distances.items() for at in distances
    ]  # fmt: skip


def gradient_rows(examination: Examination) -> Rows:
    """Gradient error by estimator and window, in units of the true gradient's norm; knee: whether the window is the knee."""
    return [
        {"estimator": name, "window": window, **dataclasses.asdict(error), "knee": int(window == finding.knee)}
        for name, finding in examination.findings.items() for window, error in finding.errors.items()
    ]  # fmt: skip


def draw_distance(path: Path, rows: Rows, examination: Examination) -> None:
    """Left: what the cut does, with P4's bound and the slope. Right: the whole bias, the critic's own share in it."""
    window = int(max(values(rows, "window")))
    chosen = select(rows, window=window)
    figure = Figure(figsize=(8, 4.6), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, name in ((left, "cut_bias"), (right, "mean_bias")):
        for estimator in examination.findings:
            line = [row for row in select(chosen, estimator=estimator) if row["tokens"] > 0]
            _plot(axes, values(line, "distance"), values(line, name), estimator)
    first = select(chosen, estimator=next(iter(examination.findings)))
    guides = _guides(left, first)
    tidy(
        left,
        title="the cut's share: |E[estimate - GAE uncut]|",
        x="distance to the cut n (tokens)",
        y="mean |bias| (units of reward)",
    )
    tidy(right, title="all of it: |E[estimate] - A|, the critic's too", x="distance to the cut n (tokens)", y="")
    absent = _log(left, right)
    for axes in (left, right):
        axes.set_xlim(0.5, window + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.suptitle(f"{_decay_sentence(first, examination)}\n{examination.title}, windows of {window} tokens",
                    fontsize=FONT + 0.5, fontweight="bold")  # fmt: skip
    below(figure, [*_handles(examination), *guides, *absent])
    figure.savefig(path)


def _guides(axes: Axes, rows: Rows) -> list[Line2D]:
    """P4's and P2's bounds of the first estimator where there are some, and the slope, through its bias at n = 1."""
    drawn: list[Line2D] = []
    styles: dict[str, dict[str, Any]] = {
        "P4's bound": {"color": "black", "linestyle": "-", "linewidth": 1.6},
        "P2's bound": {"color": "black", "linestyle": ":", "linewidth": 2.2},
        "slope (γλ)ⁿ": {"color": "#7F7F7F", "linestyle": "-", "linewidth": 5, "alpha": 0.35},
    }
    anchor = next((row["cut_bias"] / row["slope"] for row in rows if row["cut_bias"] > ZERO and row["slope"] > 0), 0.0)
    lines = {"P4's bound": "bound", "P2's bound": "second_bound", "slope (γλ)ⁿ": "slope"}
    for label, name in lines.items():
        known = [row for row in rows if row[name] is not None]
        y = values(known, name) * (anchor if name == "slope" else 1)
        if (y > ZERO).any():
            label = label if name == "slope" else f"{label} of {rows[0]['estimator']}"
            axes.plot(values(known, "distance"), _drawable(y), **styles[label.partition(" of ")[0]], zorder=1)
            drawn.append(Line2D([], [], **styles[label.partition(" of ")[0]], label=label))
    return drawn


def _decay_sentence(rows: Rows, examination: Examination) -> str:
    """What the left panel shows of the first estimator, in numbers."""
    near, far = rows[0], rows[-1]
    name, config = near["estimator"], examination.config
    if near["cut_bias"] <= ZERO >= far["cut_bias"]:
        return f"{name}: the cut adds no bias here"
    if far["distance"] == near["distance"]:
        return f"{name}: the cut's bias is {near['cut_bias']:.2g}"
    ratio = f"{far['cut_bias'] / near['cut_bias']:.2g}" if near["cut_bias"] > ZERO else "infinite"
    return (f"{name}: from n = {near['distance']} to {far['distance']} the cut's bias goes from {near['cut_bias']:.2g} to "
            f"{far['cut_bias']:.2g},\na factor {ratio}; (γλ)^{far['distance'] - near['distance']} = "
            f"{(config.gamma * config.lam) ** (far['distance'] - near['distance']):.2g}")  # fmt: skip


def draw_gradient(path: Path, rows: Rows, examination: Examination) -> None:
    """Left: the first estimator's error and its two shares. Right: all estimators. With the tolerance and the knees."""
    config, names = examination.config, list(examination.findings)
    figure = Figure(figsize=(8, 4.6), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    first = select(rows, estimator=names[0])
    shares = {config.measure: f"{names[0]}: {config.measure} error", "cut": "the cut's share", "critic": "the critic's share"}
    styles: list[dict[str, Any]] = [look(names[0]).bare(linewidth=2.2),
                                    {"color": "black", "linestyle": ":", "linewidth": 2.0},
                                    {"color": "#7F7F7F", "linestyle": "-", "linewidth": 1.4}]  # fmt: skip
    for name, line in zip(shares, styles, strict=True):
        left.plot(
            values(first, "window"),
            _drawable(values(first, name)),
            **line,
            marker="." if name != config.measure else look(names[0]).marker,
        )
    for name in names:
        line_rows = select(rows, estimator=name)
        _plot(right, values(line_rows, "window"), values(line_rows, config.measure), name)
    for axes, chosen in ((left, first), (right, rows)):
        axes.axhline(config.tolerance, color="#444444", linestyle=(0, (4, 4)), linewidth=1.0)
        axes.set_xscale("log", base=2)
        axes.set_xlim(values(rows, "window").min() / 1.2, values(rows, "window").max() * 1.2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        for row in select(chosen, knee=1):
            axes.plot(row["window"], max(row[config.measure], ZERO), "o", markersize=13, fillstyle="none", color="black")
    tidy(left, title=f"{names[0]}: whose error it is", x="window (tokens)", y=f"{config.measure} gradient error (share of ||g*||)")
    tidy(right, title="all estimators", x="window (tokens)", y="")
    absent = _log(left, right)
    sentence = knee_sentence(names[0], examination.findings[names[0]], config).replace(" the gradient", "\nthe gradient")
    figure.suptitle(f"{sentence}\n{examination.title}", fontsize=FONT + 0.5, fontweight="bold", wrap=True)
    split = [Line2D([], [], **line, label=label) for line, label in zip(styles[1:], list(shares.values())[1:], strict=True)]
    marks = [Line2D([], [], color="#444444", linestyle=(0, (4, 4)), label=f"tolerance {config.tolerance:g}"),
             Line2D([], [], linestyle="", marker="o", markersize=10, fillstyle="none", color="black", label="knee")]  # fmt: skip
    below(figure, [*_handles(examination), *split, *marks, *absent])
    figure.savefig(path)


def _plot(axes: Axes, x: np.ndarray, y: np.ndarray, estimator: str) -> None:
    axes.plot(x, _drawable(y), **look(estimator).line(), markevery=max(1, len(x) // 8))


def _handles(examination: Examination) -> list[Line2D]:
    return [Line2D([], [], **look(name).line(), label=name) for name in examination.findings]


def _drawable(y: np.ndarray) -> np.ndarray:
    """NaN in place of exact zeros, which a log axis cannot show."""
    return np.where(y > ZERO, y, np.nan)


def _log(*panels: Axes) -> list[Line2D]:
    """A log axis over what is drawn, at most DECADES of it. Returns the legend's word on exact zeros, where there are any."""
    drawn = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for axes in panels for line in axes.lines])
    absent, drawn = bool(np.isnan(drawn).any()), drawn[drawn > ZERO]
    for axes in panels:
        axes.set_yscale("log")
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
        if not any((np.asarray(line.get_ydata(), dtype=float) > ZERO).any() for line in axes.lines if line.get_marker() != "None"):
            axes.text(0.5, 0.5, "exactly 0 everywhere", transform=axes.transAxes, ha="center", fontsize=FONT)
        if len(drawn):
            axes.set_ylim(max(drawn.min() / 1.6, drawn.max() / 10**DECADES), drawn.max() * 1.6)
    return [Line2D([], [], linestyle="", label="not drawn: exactly 0")] if absent else []


FIGURES = (("bias_by_distance", distance_rows, draw_distance), ("gradient_by_window", gradient_rows, draw_gradient))
