"""The figures of a comparison. `*_rows` makes the numbers, which go into the CSV, and `draw_*` draws those rows and nothing else.

A method's colour, line and marker are those of colours.py, the same in every figure.
No pyplot: importing this file changes no backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from tppo_ref.runs.colours import look
from tppo_ref.runs.comparison import Comparison, Run, display, mean_interval, number, read_table, running_mean

DPI, FONT, SMALL = 150, 9.5, 8.5  # 8 inches at 150 dpi are 1200 px
BINS = 12  # of the training clock, for mean lengths
Rows = list[dict[str, Any]]


def headline(comparison: Comparison) -> str:
    """The comparison in one sentence: times to target of the pair that matters, or why there is nothing to say."""
    if comparison.void:
        return f"Comparison void: {comparison.void}"
    parts: list[str] = []
    notes: list[str] = []
    for method in sorted(comparison.pair, key=lambda m: comparison.typical_crossing(m)[1].train_s):
        statistic, (time_s, _) = comparison.typical_crossing(method)
        when = number(time_s, "s") if math.isfinite(time_s) else seeds_reached(comparison, method)
        parts.append(f"{display(method)}{'' if parts else f' reaches {comparison.target:.2f}'} in {when}")
        note = " (one seed)" if comparison.num_seeds == 1 else f" ({statistic} of {comparison.num_seeds} seeds)"
        if statistic == "median":
            note = f" (median, {seeds_reached(comparison, method)} arrive)"
        notes.append(note if math.isfinite(time_s) else "")
    if len(set(notes)) == 1:  # said once where it holds for both
        return ", ".join(parts) + notes[0]
    return ", ".join(part + note for part, note in zip(parts, notes, strict=True))


def seeds_reached(comparison: Comparison, method: str) -> str:
    reached = sum(math.isfinite(crossing.train_s) for crossing in comparison.crossings[method])
    return f"{reached} of {comparison.num_seeds} seeds"


def method_handle(method: str, label: str) -> Line2D:
    """The legend's sample of a method."""
    return Line2D([], [], **look(method).line(linewidth=2.0, markersize=6), label=label)


def tidy(axes: Axes, *, title: str, x: str, y: str) -> None:
    axes.set_title(title, fontsize=FONT, loc="left")
    axes.set_xlabel(x, fontsize=FONT)
    axes.set_ylabel(y, fontsize=FONT)
    axes.tick_params(labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)


def below(figure: Figure, handles: Sequence[Any]) -> None:
    """One legend under all panels: it covers no data, however many methods there are."""
    labels = [(h[0] if isinstance(h, tuple) else h).get_label() for h in handles]
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(handles)), frameon=False, fontsize=SMALL,
                  handlelength=3.2, columnspacing=1.5, handler_map={tuple: HandlerTuple(ndivide=None, pad=0)})  # fmt: skip


def select(rows: Rows, **wanted: Any) -> Rows:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def values(rows: Rows, name: str) -> np.ndarray:
    return np.array([row[name] for row in rows], dtype=float)


def learning_curve_rows(comparison: Comparison) -> Rows:
    """3-point running means of the accuracy: of each seed, their mean over seeds, evaluation by evaluation, with its 95 % band;
    then where the method reaches the target (Comparison.typical_crossing). train_s in seconds, trained in response tokens."""
    rows: Rows = []
    for method, runs in comparison.runs.items():
        curves = [(r.evaluations["time/train_s"], r.evaluations["ledger/trained"], running_mean(r.accuracy)) for r in runs]
        for run, (seconds, tokens, accuracy) in zip(runs, curves, strict=True):
            rows += [curve_row(method, f"seed {run.seed}", *point) for point in zip(seconds, tokens, accuracy, strict=True)]
        for i in range(min(len(seconds) for seconds, _, _ in curves)):
            band = mean_interval([accuracy[i] for _, _, accuracy in curves])
            x = [np.mean([curve[k][i] for curve in curves]) for k in (0, 1)]
            rows.append(curve_row(method, "mean", *x, *band))
        rows.append(crossing_row(comparison, method))
    return rows


def crossing_row(comparison: Comparison, method: str) -> dict[str, Any]:
    return curve_row(method, "crossing", *comparison.typical_crossing(method)[1], comparison.target)


def curve_row(method: str, line: str, train_s: float, tokens: float, accuracy: float, *band: float) -> dict[str, Any]:
    low, high = map(float, band or (np.nan, np.nan))
    return {"method": method, "line": line, "train_s": float(train_s), "trained": float(tokens), "accuracy": float(accuracy),
            "low": low, "high": high}  # fmt: skip


def draw_learning_curves(path: Path, rows: Rows, comparison: Comparison) -> None:
    """Accuracy against training-clock seconds (left) and trained response tokens (right)."""
    figure = Figure(figsize=(8, 4.2), dpi=DPI, layout="constrained")
    target: dict[str, Any] = {"color": "#444444", "linestyle": (0, (4, 4)), "linewidth": 1.0}
    for axes, x, scale in zip(figure.subplots(1, 2, sharey=True), ("train_s", "trained"), (1.0, 1e-3), strict=True):
        axes.axhline(comparison.target, **target)
        for method, runs in comparison.runs.items():
            line, mark = look(method).bare(), look(method).marker
            for run in runs if len(runs) > 1 else []:
                seed = select(rows, method=method, line=f"seed {run.seed}")
                axes.plot(values(seed, x) * scale, values(seed, "accuracy"), color=line["color"], linewidth=0.6, alpha=0.45)
            mean = select(rows, method=method, line="mean")
            band = (values(mean, "low"), values(mean, "high"))
            alpha = 0.13 if len(comparison.runs) < 4 else 0.05
            axes.fill_between(values(mean, x) * scale, *band, color=line["color"], alpha=alpha, linewidth=0)
            axes.plot(values(mean, x) * scale, values(mean, "accuracy"), **line, linewidth=2.0)
            for point in select(rows, method=method, line="crossing"):
                if np.isfinite(point[x]):
                    axes.plot(point[x] * scale, point["accuracy"], mark, color=line["color"], markersize=8, markeredgecolor="white")
        axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)
        axes.set_xlim(left=0)
        drawn = np.concatenate([line.get_ydata() for line in axes.lines])
        margin = 0.2 * np.ptp(drawn) + 0.01  # the band of 2 seeds would dwarf the lines: it is cut here, and whole in the CSV
        axes.set_ylim(drawn.min() - margin, drawn.max() + margin)
    left, right = figure.axes
    tidy(left, title="against time", x="training clock (s)", y="accuracy (share of answers, 3-point mean)")
    tidy(right, title="against data", x="trained response tokens (thousands)", y="")
    figure.suptitle(headline(comparison), fontsize=FONT + 1.5, fontweight="bold", wrap=True)
    handles: list[Any] = [method_handle(m, curve_label(comparison, m)) for m in comparison.runs]
    handles.append(Line2D([], [], **target, label=f"target {comparison.target:.3f}"))
    if comparison.num_seeds > 1:
        handles.append(Patch(facecolor="#cccccc", label="95 % band of the mean"))
    below(figure, handles)
    figure.savefig(path)


def curve_label(comparison: Comparison, method: str) -> str:
    statistic, crossing = comparison.typical_crossing(method)
    if not np.isfinite(crossing.train_s):
        return f"{display(method)}: in {seeds_reached(comparison, method)}"
    note = f" (median, {seeds_reached(comparison, method)})" if statistic == "median" else ""
    return f"{display(method)}: {number(crossing.train_s, 's')}, {crossing.tokens / 1e3:,.0f}k tokens{note}"


def timeline_rows(comparison: Comparison) -> Rows:
    """The same number of seconds of two methods' first seed, from the step in the middle of each run on: a step of the first
    method and a quarter more. begin_s and stop_s count from there, and are cut at the edges."""
    runs = [comparison.runs[method][0] for method in comparison.pair]
    seconds = 1.25 * middle_step(runs[0])[1]
    panels = [list(window_rows(run, middle_step(run)[0], middle_step(run)[0] + seconds)) for run in runs]
    return [row for panel in panels for row in panel] if all(select(panel, kind="decoding") for panel in panels) else []


def middle_step(run: Run) -> tuple[float, float]:
    """(begin, duration) in seconds of the step during which half of the run's training clock has passed."""
    at = int(np.searchsorted(run.steps["time/train_s"], run.steps["time/train_s"][-1] / 2))
    return float(run.steps["time/train_s"][at] - run.steps["time/step_s"][at]), float(run.steps["time/step_s"][at])


def window_rows(run: Run, from_s: float, to_s: float) -> Iterator[dict[str, Any]]:
    """What falls into [from_s, to_s] of the training clock: the steps' phases, and what the slots decoded (end RUNNING: cut)."""
    spans: list[tuple[Any, ...]] = []
    for stop_s, step_s, rollout_s in zip(*(run.steps[f"time/{name}_s"] for name in ("train", "step", "rollout")), strict=True):
        begin_s = stop_s - step_s
        spans += [("rollout", "", "", begin_s, begin_s + rollout_s, ""), ("training", "", "", begin_s + rollout_s, stop_s, "")]
    types = {"slot": int, "response": int, "begin_s": float, "stop_s": float, "end": str}
    spans += [("decoding", *row) for row in read_table(run.folder / "timeline.csv", types)]
    for kind, slot, response, begin_s, stop_s, end in spans:
        if begin_s < to_s and stop_s > from_s:
            inside = [round(float(min(max(t, from_s), to_s) - from_s), 4) for t in (begin_s, stop_s)]
            yield {"method": run.method, "seed": run.seed, "from_s": round(from_s, 4), "seconds": round(to_s - from_s, 4),
                   "kind": kind, "slot": slot, "response": response, "begin_s": inside[0], "stop_s": inside[1],
                   "end": end}  # fmt: skip


def busy_share(rows: Rows, slots: int) -> float:
    """Busy slot-seconds / (slots x seconds of decoding) in one panel."""
    decoding_s, rollout_s = (sum(r["stop_s"] - r["begin_s"] for r in select(rows, kind=kind)) for kind in ("decoding", "rollout"))
    return float(decoding_s / (slots * rollout_s))


def draw_timeline(path: Path, rows: Rows, comparison: Comparison) -> None:
    """Slots over time: a bar is a response, white is idle, grey is training, a triangle a response cut at its window's edge."""
    figure = Figure(figsize=(8, 2.9 * len(comparison.pair) + 0.7), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(comparison.pair), 1, sharex=True, squeeze=False)[:, 0]
    busy = []
    for axes, method in zip(panels, comparison.pair, strict=True):
        panel, slots = select(rows, method=method), comparison.runs[method][0].slots
        axes.set(xlim=(0, panel[0]["seconds"]), ylim=(-0.6, slots - 0.4))
        draw_slots(axes, panel, look(method).shades)
        if busy_share(panel, slots) < 0.5:
            say_idle(axes, panel, slots)
        ended = sum(row["end"] in ("END_TOKEN", "LENGTH_CAP") and row["stop_s"] < row["seconds"] for row in panel)
        busy.append(f"{display(method)} {100 * busy_share(panel, slots):.0f} %")
        tidy(axes, title=f"{display(method)}: {ended} responses ended in {panel[0]['seconds']:.1f} s "
             f"(seed {panel[0]['seed']}, from {panel[0]['from_s']:.1f} s on)", x="", y="decoding slot")  # fmt: skip
    panels[-1].set_xlabel("training clock since the panel's beginning (s)", fontsize=FONT)
    figure.suptitle(f"Busy share of the slots while decoding: {', '.join(busy)}", fontsize=FONT + 1.5, fontweight="bold")
    handles = [tuple(Patch(facecolor=shade, label=f"{display(m)}: responses, shades alternate") for shade in look(m).shades)
               for m in comparison.pair]  # fmt: skip
    below(figure, [*handles, Patch(facecolor="white", edgecolor="#888888", label="idle slot"),
                   Patch(facecolor="#d9d9d9", hatch="////", edgecolor="white", label="training: no decoding"),
                   Line2D([], [], color="black", linestyle="", marker=">", markersize=4,
                          label="cut, goes on in the next window")])  # fmt: skip
    figure.savefig(path)


def say_idle(axes: Axes, panel: Rows, slots: int) -> None:
    """Write into the highest run of slots that idle late in the panel's first rollout why they do."""
    rollout = select(panel, kind="rollout")[0]
    at_s = rollout["begin_s"] + 0.6 * (rollout["stop_s"] - rollout["begin_s"])
    late = [r["slot"] for r in select(panel, kind="decoding") if r["begin_s"] < rollout["stop_s"] and r["stop_s"] > 0.4 * at_s]
    gap, below_slot = max((b - a, a) for a, b in pairwise(sorted({-1, slots, *late})))
    if gap > 4:
        axes.text(at_s, below_slot + gap / 2, "idle: waiting for the longest response", fontsize=SMALL, ha="center", va="center")


def draw_slots(axes: Axes, panel: Rows, shades: tuple[str, str]) -> None:
    """Bars and marks of one panel, on its own axes."""
    for row in select(panel, kind="training"):
        axes.axvspan(row["begin_s"], row["stop_s"], facecolor="#d9d9d9", hatch="////", edgecolor="white", linewidth=0)
        if row["stop_s"] - row["begin_s"] > 0.1 * row["seconds"]:
            axes.text((row["begin_s"] + row["stop_s"]) / 2, axes.get_ylim()[1] / 2, "training", fontsize=SMALL, ha="center",
                      bbox={"facecolor": "#d9d9d9", "edgecolor": "none"})  # fmt: skip
    decoding = sorted(select(panel, kind="decoding"), key=lambda row: (row["slot"], row["begin_s"]))
    shade, before = 0, {"slot": -1, "response": -1}
    bars: dict[int, list[tuple[int, float, float]]] = {0: [], 1: []}
    for row in decoding:
        if row["response"] != before["response"]:
            shade = 1 - shade if row["slot"] == before["slot"] else 0
        bars[shade].append((row["slot"], row["begin_s"], row["stop_s"] - row["begin_s"]))
        before = row
    for shade, found in bars.items():
        slot, begin, width = zip(*found, strict=True) if found else ((), (), ())
        axes.barh(slot, width, left=begin, height=0.82, color=shades[shade], linewidth=0)
    cut = [row for row in decoding if row["end"] == "RUNNING" and row["stop_s"] < row["seconds"]]
    axes.plot(values(cut, "stop_s"), values(cut, "slot"), linestyle="", marker=">", color="black", markersize=2.2)


def length_rows(comparison: Comparison) -> Rows:
    """Lengths in tokens. shares: of the responses that ended in the first and the last quarter of the training clock, seeds
    together, the share at least that long. means: over seeds, of ended responses in bins of the clock, and of evaluations."""
    rows: Rows = []

    def add(method: str, panel: str, line: str, x: Iterable[float], y: Iterable[float]) -> None:
        points = zip(x, y, strict=True)
        rows.extend({"panel": panel, "method": method, "line": line, "x": float(a), "y": float(b)} for a, b in points)

    for method, runs in comparison.runs.items():
        ends = [run.steps["time/train_s"][-1] for run in runs]
        clocks = [np.array([r[0] for r in run.responses]) / end for run, end in zip(runs, ends, strict=True)]
        tokens = [np.array([r[1] for r in run.responses], dtype=float) for run in runs]
        clock, pooled = np.concatenate(clocks), np.concatenate(tokens)
        for line, chosen in (("first quarter", clock <= 0.25), ("last quarter", clock > 0.75)):
            length, first = np.unique(np.sort(pooled[chosen]), return_index=True)
            add(method, "shares", line, length, 1 - first / max(chosen.sum(), 1))
        edges = np.linspace(0, 1, BINS + 1)
        bins = [[t[(c > a) & (c <= b)] for c, t in zip(clocks, tokens, strict=True)] for a, b in pairwise(edges)]
        mean = np.array([np.mean([seed.mean() for seed in seeds]) if all(map(len, seeds)) else np.nan for seeds in bins])
        middle = (edges[:-1] + edges[1:]) / 2 * np.mean(ends)
        add(method, "means", "ended responses", middle[np.isfinite(mean)], mean[np.isfinite(mean)])
        common = range(min(len(run.accuracy) for run in runs))
        seconds, mean = (np.array([np.mean([run.evaluations[name][i] for run in runs]) for i in common])
                         for name in ("time/train_s", "eval/length_mean"))  # fmt: skip
        add(method, "means", "evaluation", seconds, mean)
        trained = np.mean([run.steps["ledger/trained"][-1] / run.steps["ledger/generated"][-1] for run in runs])
        add(method, "trained", "share of the generated tokens", [np.mean(ends)], [trained])
    return rows


def draw_lengths(path: Path, rows: Rows, comparison: Comparison) -> None:
    """Left: does the long tail stay? Right: are the responses that ended as long as those that the policy would give?"""
    figure = Figure(figsize=(8, 4.4), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2)
    thin: dict[str, Any] = {"linewidth": 1.1, "alpha": 0.55}
    thick: dict[str, Any] = {"linewidth": 2.0}
    for method in comparison.runs:
        line, mark = look(method).bare(), look(method).marker
        for name, weight in (("first quarter", thin), ("last quarter", thick)):
            found = select(rows, method=method, panel="shares", line=name)
            left.step(values(found, "x"), values(found, "y"), **line, **weight, where="pre")
        for name, weight in (("evaluation", thin), ("ended responses", thick | {"marker": mark, "markersize": 5})):
            found = select(rows, method=method, panel="means", line=name)
            right.plot(values(found, "x"), values(found, "y"), **line, **weight, markeredgecolor="white")
    left.set(xscale="log", yscale="log", ylim=(None, 1.3))
    left.grid(color="#e5e5e5", linewidth=0.6)
    right.set(xlim=(0, None), ylim=(0, None))
    right.grid(axis="y", color="#e5e5e5", linewidth=0.6)
    tidy(left, title="thin: first quarter of training, thick: last", x="length (tokens)", y="share of responses at least as long")
    tidy(right, title="thin: evaluation, thick: responses that ended", x="training clock (s)", y="mean length (tokens)")
    quarters = {m: [p99(rows, m, f"{name} quarter") for name in ("first", "last")] for m in comparison.pair}
    tails = ", ".join(f"{display(m)} {first} to {last}" for m, (first, last) in quarters.items())
    trained = ", ".join(f"{display(m)} {100 * select(rows, panel='trained', method=m)[0]['y']:.0f} %" for m in comparison.pair)
    title = f"99th percentile of the length, first to last quarter: {tails} tokens\nTrained share of generated tokens: {trained}"
    figure.suptitle(title, fontsize=FONT + 0.5, fontweight="bold")
    below(figure, [method_handle(method, display(method)) for method in comparison.runs])
    figure.savefig(path)


def p99(rows: Rows, method: str, line: str) -> str:
    """The longest length that at least 1 % of the responses reach, in tokens."""
    found = [row["x"] for row in select(rows, panel="shares", method=method, line=line) if row["y"] >= 0.01]
    return f"{max(found):.0f}" if found else "?"


FIGURES = (
    ("learning_curves", learning_curve_rows, draw_learning_curves),
    ("timeline", timeline_rows, draw_timeline),
    ("lengths", length_rows, draw_lengths),
)
