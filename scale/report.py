"""`launch.py report`: a run drawn from its own files, and its phases beside what dry run and plan predict of them.

`*_rows` makes the numbers, for a CSV, and `draw_*` draws those alone.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from scale.config import ScaleConfig
from scale.memory.dryrun import predictions
from tppo_ref.method.errors import UserError
from tppo_ref.runs.colours import COLOURS, LINES
from tppo_ref.runs.comparison import write_csv
from tppo_ref.runs.measured import DRY_RUN, write_measured
from tppo_ref.runs.run_folder import write_json
from tppo_ref.runs.sinks import read_metrics

Rows = list[dict[str, Any]]
CURVES = {
    "score": ("response/score_mean", "mean score of ended responses"),
    "accuracy": ("eval/avg_at_k", "avg@k on the evaluation prompts"),
    "critic": ("value/explained_variance", "explained variance of the critic"),
    "gap": ("policy/logprob_gap", "engine against trainer, |log-probability|"),
}
PHASES = ("rollout", "verify", "forward", "policy", "value", "sync", "other")
GREYS = (COLOURS[1], "#BBBBBB", COLOURS[5], COLOURS[0], COLOURS[4], COLOURS[2], "#EEEEEE")
HATCHES = ("", "..", "//", "", "\\\\", "xx", "")
PERCENTILES = (10, 50, 90, 99, 100)
BINS = 20  # of training steps, for lengths


def report(config: ScaleConfig) -> int:
    """Write report/*.png and the CSV behind each, and the table of phases; 0, or a UserError for a folder that holds no run."""
    out = Path(config.algo.run.out)
    if not (out / "metrics.jsonl").exists():
        raise UserError(f"algo.run.out: got {out}; expected the folder of a run; give one")
    records = read_metrics(out / "metrics.jsonl")
    steps = [record for record in records if "time/step_s" in record]
    if not steps:
        raise UserError(f"algo.run.out: got {out}; expected a run with a finished step; wait for one")
    folder = out / "report"
    folder.mkdir(exist_ok=True)
    figures = {
        "curves": (curve_rows(records), draw_curves, (8.0, 6.0)),
        "lengths": (length_rows(_table(out / "responses.csv")), draw_lengths, (8.0, 3.6)),
        "phases": (phase_rows(steps), draw_phases, (8.0, 3.6)),
        "slots": (slot_rows(_table(out / "timeline.csv")), draw_slots, (8.0, 3.6)),
    }
    for name, (rows, draw, size) in figures.items():
        if not rows:
            print(f"{name}: nothing to draw yet")
            continue
        write_csv(folder / f"{name}.csv", rows)
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, rows)
        figure.savefig(folder / f"{name}.png", dpi=150)
        print(folder / f"{name}.png")
    try:
        write_json(out / DRY_RUN[0], predictions(config))
    except UserError as error:  # a model that has moved, a plan of another run: what was measured can be shown all the same
        print(f"nothing is predicted: {error}")
    write_measured(out, min(config.algo.rollout.window, config.algo.rollout.max_response_tokens))
    return 0


def _table(path: Path) -> Rows:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def curve_rows(records: Sequence[dict[str, Any]]) -> Rows:
    """(curve, step, value) of what was measured; undefined values (no response ended) are left out."""
    return [
        {"curve": curve, "step": record["step"], "value": record[key]}
        for curve, (key, _) in CURVES.items()
        for record in records
        if record.get(key) is not None
    ]


def draw_curves(figure: Figure, rows: Rows) -> None:
    axes = figure.subplots(2, 2, sharex=True).ravel()
    for ax, (curve, (_, label)) in zip(axes, CURVES.items(), strict=True):
        points = [(r["step"], r["value"]) for r in rows if r["curve"] == curve]
        ax.plot(*(zip(*points, strict=True) if points else ([], [])), color=COLOURS[1], lw=1.2)
        ax.set_ylabel(label, fontsize=8.5)
        _plain(ax)
    for ax in axes[2:]:
        ax.set_xlabel("training step")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    scores = [r["value"] for r in rows if r["curve"] == "score"]
    if len(scores) > 1:
        third = max(1, len(scores) // 3)
        figure.suptitle(f"Score went from {np.mean(scores[:third]):+.2f} (first third) to {np.mean(scores[-third:]):+.2f} (last)")


def length_rows(responses: Rows) -> Rows:
    """Percentiles of the lengths of responses that ended, over training."""
    if not responses:
        return []
    step = np.array([int(r["step"]) for r in responses])
    tokens = np.array([int(r["tokens"]) for r in responses])
    edges = np.unique(np.linspace(step.min(), step.max() + 1, min(BINS, int(np.ptp(step)) + 1) + 1).astype(int))
    rows = []
    for low, high in pairwise(edges.tolist()):
        inside = tokens[(step >= low) & (step < high)]
        if len(inside):
            found = np.percentile(inside, PERCENTILES)
            rows.append({"from_step": int(low), "to_step": int(high) - 1, "responses": len(inside)}
                        | {f"p{p}": float(x) for p, x in zip(PERCENTILES, found, strict=True)})  # fmt: skip
    return rows


def draw_lengths(figure: Figure, rows: Rows) -> None:
    ax = figure.subplots()
    middle = [(r["from_step"] + r["to_step"]) / 2 for r in rows]
    for i, p in enumerate(PERCENTILES):
        ax.plot(
            middle, [r[f"p{p}"] for r in rows], color=COLOURS[i], ls=LINES[i], lw=1.3, label="longest" if p == 100 else f"{p} %"
        )
    ax.set(xlabel="training step", ylabel="response length (tokens)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title(f"Median length: {rows[0]['p50']:.0f} tokens at first, {rows[-1]['p50']:.0f} at last", fontsize=10)
    figure.legend(fontsize=8, frameon=False, ncols=len(PERCENTILES), loc="outside lower center")
    _plain(ax)


def phase_rows(steps: Sequence[dict[str, Any]]) -> Rows:
    return [{"step": s["step"]} | {phase: s.get(f"time/{phase}_s") or 0.0 for phase in PHASES} for s in steps]


def draw_phases(figure: Figure, rows: Rows) -> None:
    ax = figure.subplots()
    seconds = np.array([[r[p] for p in PHASES] for r in rows])
    bottom = np.zeros(len(rows))
    for i, phase in enumerate(PHASES):
        ax.bar([r["step"] for r in rows], seconds[:, i], bottom=bottom, width=1.0, color=GREYS[i], hatch=HATCHES[i], label=phase)
        bottom += seconds[:, i]
    share = seconds.sum(0) / seconds.sum()
    largest = int(share.argmax())
    ax.set(xlabel="training step", ylabel="seconds")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title(f"The largest phase of a step is {PHASES[largest]}: {share[largest]:.0%}", fontsize=10)
    figure.legend(fontsize=8, frameon=False, ncols=len(PHASES), loc="outside lower center")
    _plain(ax)


def slot_rows(timeline: Rows, *, last_steps: int = 6) -> Rows:
    """Who held which slot, in the last few steps of the first engine."""
    if not timeline:
        return []
    newest = max(int(r["step"]) for r in timeline)
    return [r for r in timeline if int(r["step"]) > newest - last_steps]


def draw_slots(figure: Figure, rows: Rows) -> None:
    ax = figure.subplots()
    shades: defaultdict[int, int] = defaultdict(int)
    for r in sorted(rows, key=lambda r: float(r["begin_s"])):
        slot = int(r["slot"])
        shades[slot] += 1
        ax.barh(slot, float(r["stop_s"]) - float(r["begin_s"]), left=float(r["begin_s"]), height=0.9,
                color="#0B5394" if shades[slot] % 2 else "#7DB7E8")  # fmt: skip
    ax.set(xlabel="training clock (s)", ylabel="decoding slot")
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_title("Slots of the first engine, last steps: white is idle or training", fontsize=10)
    _plain(ax)


def _plain(ax: Axes) -> None:
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
