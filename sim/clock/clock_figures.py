"""The figures of `python -m sim throughput` and `plan`. `*_rows` makes the numbers, which go into a CSV, and `draw_*` draws those.

A method looks as tppo_ref.runs.colours says; line styles, markers and hatches differ with the colours: readable in grey.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from sim.clock.cluster import Setup
from sim.clock.compare import Case, setup_of
from sim.clock.decoding import clock
from sim.clock.footprint import PHASES, TERMS
from sim.clock.hardware import cluster
from sim.clock.plan import Plan
from sim.clock.plan_report import COLUMNS, by_column
from sim.clock.schedule import Windowed
from sim.clock.throughput import CLAIM, PPO_INTENSITY, TPPO_INTENSITY
from tppo_ref.method.records import End
from tppo_ref.runs.colours import COLOURS, LINES, MARKERS, SERIES, look
from tppo_ref.runs.comparison import display, write_csv
from tppo_ref.runs.figures import DPI, FONT, SMALL, Rows, below, select, tidy, values
from tppo_ref.runs.validation import writable_folder

HATCHES = ("", "////", "\\\\\\\\", "....", "xx", "--", "++", "oo", "**", "||", "///", "")
SHADES = (
    "#F0A87A",
    "#0B5394",
    "#7DB7E8",
    "#B8480A",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#BBBBBB",
    "#56B4E9",
    "#FFFFFF",
    "#7F7F7F",
    "#DDDDDD",
)
TIMELINE = Case(
    what="timeline", gpus="4xH800", model="Qwen2.5-7B", tp=4, lengths="dapo-32b@2049", cap=12_288, slots=16, window=4096
)


def head(figure: Figure, title: str) -> None:
    figure.suptitle(title, fontsize=FONT + 1, fontweight="bold")


# ---------------------------------------------------------------------------------------------------------- slots over time


def timeline_rows(case: Case = TIMELINE, warm: int = 6) -> Rows:
    """Slots of PPO and of T-PPO over the same seconds, from a step in their routine on."""
    setup = setup_of(case)
    windows = {"ppo": (setup.lengths.cap, "step"), "tppo": (case.window, "immediate")}
    spans = {name: list(_spans(setup, name, *how, warm)) for name, how in windows.items()}
    until_s = 1.3 * max(row["stop_s"] for row in spans["ppo"] if row["step"] == 0)
    return [row | {"stop_s": min(row["stop_s"], until_s), "until_s": until_s}
            for rows in spans.values() for row in rows if row["begin_s"] < until_s]  # fmt: skip


def _spans(setup: Setup, name: str, window: int, refill: Any, warm: int) -> Iterator[dict[str, Any]]:
    """When each slot decoded what, in seconds. One replica, whose cache is not full."""
    system = Windowed(setup, window=window, refill=refill, name=name)
    records = [system.step() for _ in range(warm)]
    origin = records[-1].end_s
    for step in range(6):
        record = system.step()
        begin_s, rolled_s = record.rollout_begin_s - origin, record.rollout_begin_s + record.rollout_s - origin
        loads = system.latest.loads
        second_at = dict(zip(loads.step_E.tolist(), clock(setup.costs, loads).time_E.tolist(), strict=True))
        for slot, sample, begin, stop, end in system.latest.rows.tolist():
            yield {"method": name, "step": step, "kind": "decoding", "slot": slot, "response": sample, "end": End(end).name,
                   "begin_s": begin_s + second_at[begin], "stop_s": begin_s + second_at[stop]}  # fmt: skip
        yield {"method": name, "step": step, "kind": "training", "slot": -1, "response": -1, "end": "", "begin_s": rolled_s,
               "stop_s": record.end_s - origin}  # fmt: skip


def busy_share(rows: Rows, slots: int) -> float:
    """Busy slot-seconds / (slots x seconds of decoding), in one panel."""
    decoding, training = (sum(r["stop_s"] - r["begin_s"] for r in select(rows, kind=kind)) for kind in ("decoding", "training"))
    return float(decoding / (slots * (rows[0]["until_s"] - training)))


def draw_timeline(path: Path, rows: Rows) -> None:
    figure = Figure(figsize=(8, 6), dpi=DPI, layout="constrained")
    panels, busy = figure.subplots(2, 1, sharex=True), []
    for axes, name, label in zip(panels, ("ppo", "tppo"), ("PPO", "T-PPO"), strict=True):
        mine = select(rows, method=name)
        for row in select(mine, kind="training"):
            axes.axvspan(row["begin_s"], row["stop_s"], facecolor="#d9d9d9", hatch="////", edgecolor="white", linewidth=0)
        before: dict[str, Any] = {"slot": -1, "response": -1}
        shade = 0
        for row in sorted(select(mine, kind="decoding"), key=lambda row: (row["slot"], row["begin_s"])):
            if row["response"] != before["response"]:
                shade = 1 - shade if row["slot"] == before["slot"] else 0
            axes.barh(row["slot"], row["stop_s"] - row["begin_s"], left=row["begin_s"], height=0.82, color=look(name).shades[shade],
                      edgecolor="white", linewidth=0.5)  # fmt: skip
            before = row
        cut = [row for row in select(mine, kind="decoding", end="RUNNING") if row["stop_s"] < row["until_s"]]
        axes.plot(values(cut, "stop_s"), values(cut, "slot"), linestyle="", marker=">", color="black", markersize=2.5)
        ended = sum(row["end"] in ("END_TOKEN", "LENGTH_CAP") and row["stop_s"] < row["until_s"] for row in mine)
        share = busy_share(mine, TIMELINE.slots)
        busy.append(f"{label} {100 * share:.0f} %")
        axes.set(xlim=(0, rows[0]["until_s"]), ylim=(-0.6, TIMELINE.slots - 0.4))
        tidy(axes, title=f"{label}: {ended} responses ended", x="", y="decoding slot")
    panels[-1].set_xlabel("time (s)", fontsize=FONT)
    head(figure, f"Busy share of the slots while decoding: {', '.join(busy)}")
    below(figure, [Patch(facecolor=look("ppo").colour, label="PPO: responses (shades alternate)"),
                   Patch(facecolor=look("tppo").colour, label="T-PPO: responses (shades alternate)"),
                   Patch(facecolor="white", edgecolor="#888888", label="idle slot"),
                   Patch(facecolor="#d9d9d9", hatch="////", edgecolor="white", label="training: no decoding"),
                   Line2D([], [], color="black", linestyle="", marker=">", markersize=4, label="cut, goes on")])  # fmt: skip
    figure.savefig(path)


# ----------------------------------------------------------------------------------------------------------------- roofline

ACCOUNTS = {
    "claim": "stated by the paper",
    "steps": "weights only, mean over decode steps",
    "weights": "weights only, mean over seconds",
    "kv": "with keys and values",
    "cache": "and a cache of real size",
}


def roofline_rows(conditions: Rows) -> Rows:
    """Both methods' operations per byte and what the roof allows there, TFLOP/s per device; lengths of finding 1."""
    gpu = cluster(Case().gpus)[1]
    mine = [row for row in conditions if row["lengths"] == conditions[0]["lengths"] and row["slots"] == conditions[0]["slots"]]
    weights = select(mine, counted="weights")[0]
    found = {"claim": (PPO_INTENSITY, TPPO_INTENSITY), "steps": (weights["ppo_active_per_step"], weights["slots_per_replica"])}
    found |= {row["counted"]: (row["ppo_ops_per_byte"], row["ops_per_byte"]) for row in mine}
    return [
        {"counted": counted, "method": method, "operations_per_byte": intensity, "ridge": gpu.ridge, "device": gpu.name,
         "tflops_per_s": min(gpu.flops_per_s, intensity * gpu.memory_bytes_per_s) / 1e12,
         "peak_tflops_per_s": gpu.flops_per_s / 1e12}
        for counted, pair in found.items() for method, intensity in zip(("ppo", "tppo"), pair, strict=True)
    ]  # fmt: skip


def draw_roofline(path: Path, rows: Rows) -> None:
    """Above: the roof with the stated points. Below: PPO to T-PPO by what is counted, on the same axis."""
    figure = Figure(figsize=(8, 5.6), dpi=DPI, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2.4))
    first, x = rows[0], np.geomspace(10, 1000, 200)
    top.plot(
        x, np.minimum(first["peak_tflops_per_s"], x * first["peak_tflops_per_s"] / first["ridge"]), color="black", linewidth=1.6
    )
    for at, counted in enumerate(ACCOUNTS):
        pair = [select(rows, counted=counted, method=method)[0] for method in ("ppo", "tppo")]
        x_pair = values(pair, "operations_per_byte")
        bottom.plot(x_pair, [at, at], color="#7F7F7F", linewidth=1.5, zorder=1)
        for number, row in enumerate(pair):
            dot = look(row["method"]).line(linestyle="", markersize=8)
            bottom.plot(x_pair[number], at, **dot)
            bottom.annotate(f"{x_pair[number]:.0f}", (x_pair[number], at), xytext=((-9, 9)[number], 0), textcoords="offset points",
                            ha=("right", "left")[number], va="center", fontsize=SMALL)  # fmt: skip
            if counted in ("claim", "kv"):
                top.plot(x_pair[number], row["tflops_per_s"], **dot)
                words = f"{x_pair[number]:.0f}" + (", stated" if counted == "claim" else "")
                top.annotate(words, (x_pair[number], row["tflops_per_s"]), xytext=(-7, 5), textcoords="offset points",
                             ha="right", fontsize=SMALL)  # fmt: skip
    for axes in (top, bottom):
        axes.axvline(first["ridge"], color="#888888", linewidth=0.8, linestyle=(0, (4, 4)))
    top.annotate(f"ridge {first['ridge']:.0f}", (first["ridge"] * 1.04, 40), fontsize=SMALL)
    bottom.set(yticks=range(len(ACCOUNTS)), yticklabels=list(ACCOUNTS.values()), ylim=(len(ACCOUNTS) - 0.4, -0.6))
    top.set(xscale="log", yscale="log", xlim=(10, 1000), ylim=(20, 1500))
    tidy(top, title=f"roof of one {first['device']}; lengths whose mean is a third of the cap", x="", y="roof (TFLOP/s)")
    tidy(
        bottom,
        title="Qwen2.5-32B, 256 slots for each pair of devices",
        x="operations per byte read in decoding",
        y="",
    )
    kv = [select(rows, counted="kv", method=m)[0]["operations_per_byte"] for m in ("ppo", "tppo")]
    head(figure, "84 to 249 operations per byte is what weights alone would give;\n"
                 f"with keys and values read it is {kv[0]:.0f} to {kv[1]:.0f}")  # fmt: skip
    handles = [Line2D([], [], **look(m).line(linestyle="", markersize=8), label=display(m)) for m in ("ppo", "tppo")]
    below(figure, handles)
    figure.savefig(path)


# ---------------------------------------------------------------------------------------------------------- gains as curves


def draw_windows(path: Path, rows: Rows) -> None:
    """Gain of the rollout (left) and of the step (right) against the window."""
    figure = Figure(figsize=(8, 4.4), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    specs = list(dict.fromkeys(row["lengths"] for row in rows))
    for axes, column, title in zip(
        panels, ("gain_rollout", "gain"), ("rollout alone", "whole step, earlier windows fed again"), strict=True
    ):
        for at, spec in enumerate(specs):
            mine = select(rows, lengths=spec)
            axes.plot(
                values(mine, "window") / 1024,
                values(mine, column),
                color=COLOURS[SERIES[at]],
                linestyle=LINES[at],
                marker=MARKERS[at],
                linewidth=1.8,
            )
        _reference_lines(axes)
        axes.set(xscale="log", yscale="log", xticks=[1, 2, 4, 8, 16], xticklabels=["1k", "2k", "4k", "8k", "16k"])
        axes.set(yticks=[0.5, 1, 2, 4, 8], yticklabels=["0.5", "1", "2", "4", "8"])
        axes.minorticks_off()
        tidy(axes, title=title, x="window (tokens)", y="gain over PPO (trained tokens per second)" if axes is panels[0] else "")
    step = select(rows, lengths=specs[0])
    most = max(values(select(rows, lengths=specs[-1]), "gain"))
    head(figure, f"A window of 1k costs what it wins: {step[0]['gain_rollout']:.1f}x in the rollout, {step[0]['gain']:.2f}x in "
                 f"the step;\nwhere responses are long in the mean, no window brings more than {most:.2f}x")  # fmt: skip
    handles = []
    for at, spec in enumerate(specs):
        style: dict[str, Any] = {"color": COLOURS[SERIES[at]], "linestyle": LINES[at], "marker": MARKERS[at]}
        handles.append(Line2D([], [], **style, label=f"{spec}: mean {select(rows, lengths=spec)[0]['mean_tokens']:,.0f}"))
    below(figure, handles)
    figure.savefig(path)


def _reference_lines(axes: Axes) -> None:
    axes.axhline(1, color="#444444", linewidth=0.9)
    axes.axhline(CLAIM, color="#888888", linewidth=0.9, linestyle=(0, (4, 4)))
    axes.annotate("2.5x, the claim", (0.99, CLAIM), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=SMALL)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.6)


TAIL_LINES = (("weights", "gain_rollout", "rollout, weights only"), ("cache", "gain_rollout", "rollout, keys and values counted"),
              ("cache", "gain_without_prefix", "step, nothing fed twice"), ("cache", "gain", "step"))  # fmt: skip


def draw_tails(path: Path, rows: Rows) -> None:
    """Gains against how much longer the longest response of a step is than the mean."""
    figure = Figure(figsize=(8, 4.6), dpi=DPI, layout="constrained")
    axes, handles = figure.subplots(), []
    longest = values(select(rows, counted="cache"), "longest_over_mean")
    axes.plot([1, longest.max()], [1, longest.max()], color="#888888", linewidth=0.9, linestyle=(0, (1, 2)))
    axes.annotate("longest / mean", (4.0, 4.4), rotation=27, fontsize=SMALL, ha="center", va="bottom")
    for at, (counted, column, label) in enumerate(TAIL_LINES):
        mine = select(rows, counted=counted)
        style: dict[str, Any] = {"color": COLOURS[SERIES[at]], "linestyle": LINES[at], "marker": MARKERS[at]}
        axes.plot(values(mine, "longest_over_mean"), values(mine, column), **style, linewidth=1.8)
        handles.append(Line2D([], [], **style, label=label))
    _reference_lines(axes)
    axes.set(xscale="log", yscale="log", xticks=[1, 2, 4, 8, 16], xticklabels=["1", "2", "4", "8", "16"])
    axes.set(yticks=[1, 2, 4, 8], yticklabels=["1", "2", "4", "8"])
    axes.minorticks_off()
    tidy(axes, title="log-normal lengths with a mean of 2,500 tokens before the cap; 32B on 64 H800, 2,048 slots, window 8,192",
         x="longest response of a step / mean", y="gain over PPO (trained tokens per second)")  # fmt: skip
    best = max(values(select(rows, counted="cache"), "gain"))
    head(
        figure,
        f"The tail's gain is made in the rollout; of the step {best:.2f}x is left,\nbecause training takes its share and grows",
    )
    below(figure, handles)
    figure.savefig(path)


# --------------------------------------------------------------------------------------------------------------------- plan


def plan_rows(plan: Plan) -> Rows:
    """Panel "bytes": GB per device by phase and term; panel "seconds": per million trained tokens, by system and phase."""
    rows: Rows = [
        {"panel": "bytes", "bar": phase, "part": term, "value": plan.phases[phase][term] / 1e9}
        for phase in PHASES if phase in plan.phases for term in TERMS if term in plan.phases[phase]
    ]  # fmt: skip
    for window, found in plan.systems.items():
        bar = "PPO" if found.system == "ppo" else f"T-PPO {window:,}"
        rows += [{"panel": "seconds", "bar": bar, "part": name, "value": 1e6 * seconds / found.trained}
                 for name, seconds in by_column(found).items()]  # fmt: skip
    return rows


def draw_plan(plan: Plan, out: str) -> list[Path]:
    """Writes plan.png and plan.csv; UserError where the folder cannot be written to."""
    folder, rows = writable_folder(out, "out"), plan_rows(plan)
    write_csv(folder / "plan.csv", rows)
    figure = Figure(figsize=(8, 6.4 if plan.systems else 3.8), dpi=DPI, layout="constrained")
    panels = figure.subplots(2 if plan.systems else 1, 1, squeeze=False)[:, 0]
    _stack(panels[0], select(rows, panel="bytes"), list(TERMS), "GB per device")
    memory = plan.accelerator.memory_bytes / 1e9
    panels[0].axvline(memory, color="black", linewidth=1.2, linestyle=(0, (4, 3)))
    panels[0].annotate(
        f" {memory:.1f} GB", (memory, 1.0), xycoords=("data", "axes fraction"), fontsize=SMALL, va="bottom", ha="center"
    )
    title = f"{plan.model.name} on {plan.layout.num_devices} {plan.accelerator.name}: " + ("fits" if plan.fits else "does not fit")
    if plan.systems:
        _stack(panels[1], select(rows, panel="seconds"), list(COLUMNS), "seconds per million trained tokens")
        best = max(plan.systems, key=lambda w: plan.systems[w].tokens_per_s)
        title += (
            "; PPO trains fastest"
            if best == plan.lengths.cap
            else f"; T-PPO with {best:,} trains fastest, {plan.gain(best).text()} PPO"
        )
    head(figure, title)
    figure.savefig(folder / "plan.png")
    return [folder / "plan.png"]


def _stack(axes: Axes, rows: Rows, parts: list[str], x: str) -> None:
    """Horizontal bars, a part after the other; each part has its shade and its hatch."""
    bars = list(dict.fromkeys(row["bar"] for row in rows))
    left = np.zeros(len(bars))
    for at, part in enumerate(parts):
        width = np.array([sum(row["value"] for row in select(rows, bar=bar, part=part)) for bar in bars])
        if width.any():
            axes.barh(
                bars,
                width,
                left=left,
                label=part.replace("_", " "),
                color=SHADES[at],
                hatch=HATCHES[at],
                edgecolor="black",
                linewidth=0.5,
            )
        left += width
    axes.invert_yaxis()
    axes.legend(fontsize=SMALL - 1, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    tidy(axes, title="", x=x, y="")


__all__ = ["draw_plan", "draw_roofline", "draw_tails", "draw_timeline", "draw_windows", "roofline_rows", "timeline_rows"]
