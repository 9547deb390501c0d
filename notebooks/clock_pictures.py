"""Notebook 06: three slots by hand, and its figures. A method has its own colour; phases and contexts have colours of no method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sim.clock.compare import Case, Cell, run_at
from sim.clock.devices import Accelerator
from sim.clock.trace import Trace
from sim.clock.windows import drive_window
from tppo_ref.method.records import End
from tppo_ref.method.slots import Segment, SlotSchedule
from tppo_ref.runs.colours import LINES, Look, look
from tppo_ref.runs.figures import tidy

TRAINING = {"facecolor": "#d9d9d9", "hatch": "////", "edgecolor": "white", "linewidth": 0}


def look_of(way: str) -> Look:
    """The look of a way to train, by its first words: notebook 06's names say more than the method."""
    names = {"PPO": "ppo", "T-PPO+ac": "tppo-once", "T-PPO": "tppo", "partial": "partial-is"}
    return look(next(name for begin, name in names.items() if way.startswith(begin)))


# ------------------------------------------------------------------------------------------------------------- slots by hand


def windows(num_windows: int, lengths: Sequence[int], slots: int, cap: int, **how: Any) -> list[list[Segment]]:
    """Windows of the trainer's own SlotSchedule on known lengths: for each its segments (slot, response, begin, stop, end)."""
    schedule = SlotSchedule(slots=slots, max_response_tokens=cap, **how)
    done, ids, found = [0] * len(lengths), iter(range(len(lengths))), list[list[Segment]]()
    for _ in range(num_windows):
        first_new = max((s.response for w in found for s in w), default=-1) + 1
        segments = drive_window(
            schedule, lambda: next(ids, None), lambda grants: [lengths[g.response] - done[g.response] for g in grants],
            lambda n, first=first_new: iter(lengths[first + n :]),
        )  # fmt: skip
        found.append([Segment(*map(int, s[:4]), End(s[4])) for s in segments])
        for s in found[-1]:
            done[s.response] += s.stop - s.begin
    return found


def show(window: Sequence[Segment], slots: int) -> None:
    """A window in letters: a row per slot, the response that decodes at each second, a dot where the slot is idle."""
    seconds = max(s.stop for s in window)
    for slot in range(slots):
        line = ["."] * seconds
        for s in window:
            if s.slot == slot:
                line[s.begin : s.stop] = [f"{s.response:x}"] * (s.stop - s.begin)
        print(f"  slot {slot}: {''.join(line)}")
    tokens = sum(s.stop - s.begin for s in window)
    print(f"  {seconds} s, {tokens} tokens, {100 * tokens / (slots * seconds):.0f} % busy")


# -------------------------------------------------------------------------------------------------------------- over seconds


def settled(trace: Trace, after: int = 3) -> Trace:
    """Whole steps, without the first: there every response is new, so that T-PPO has no earlier window to feed again."""
    return dataclasses.replace(trace, records=trace.records[after:])


def busy_shares(trace: Trace) -> tuple[float, float]:
    """Busy slot-seconds of the settled steps: of the seconds of decoding, and of all seconds, training included."""
    steps = settled(trace).records
    busy = sum(r.busy_slot_s for r in steps)
    return busy / sum(r.slots * r.rollout_s for r in steps), busy / sum(r.slots * r.step_s for r in steps)


def draw_active(traces: Mapping[str, Trace], until_s: float, slots: int) -> Figure:
    """A panel per system over the same seconds: how many sequences decode; hatched: training, nobody decodes."""
    figure, panels = plt.subplots(len(traces), 1, figsize=(8, 6.2), layout="constrained", sharex=True)
    for axes, (name, trace) in zip(panels, traces.items(), strict=True):
        time_s, active = trace.active()
        axes.fill_between(time_s, active, step="post", color=look_of(name).colour, linewidth=0)
        for r in trace.records:
            axes.axvspan(r.rollout_begin_s + r.rollout_s, r.end_s, **TRAINING)
        decoding, of_all = busy_shares(trace)
        axes.set(xlim=(0, until_s), ylim=(0, 1.1 * slots))
        shares = f"{100 * decoding:.0f} % of the slots busy while decoding, {100 * of_all:.0f} % of all seconds"
        tidy(axes, title=f"{name}: {shares}", x="", y="sequences")
    panels[-1].set_xlabel("time (s)")
    _, of_all = busy_shares(traces["T-PPO"])
    title = f"T-PPO's slots are full while it decodes; over all seconds {100 * of_all:.0f} % are busy, for it also trains"
    figure.suptitle(title, fontweight="bold", fontsize=11)
    training: Any = Patch(**TRAINING, label="training: nobody decodes")
    idle = Patch(facecolor="white", edgecolor="#888888", linewidth=0.8, label="white: slots that idle")
    figure.legend(handles=[Patch(color=look("ppo").colour, label="PPO: sequences that decode"),
                           Patch(color=look("tppo").colour, label="T-PPO: sequences that decode"), idle, training],
                  loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)  # fmt: skip
    return figure


# ---------------------------------------------------------------------------------------------------- roofline, phases, speeds


def draw_roofline(gpu: Accelerator, reached: Callable[[int, int], tuple[float, float]]) -> tuple[Figure, dict[int, np.ndarray]]:
    """The roof, and for four contexts the decode steps of 84 sequences (PPO's mean) and 249 (T-PPO's), at the speed they reach.

    Returns the points, too: context -> [[operations per byte, TFLOP/s] of 84, of 249].
    """
    x_roof = np.geomspace(1, 1000, 200)
    figure, axes = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    axes.plot(x_roof, np.minimum(gpu.flops_per_s, x_roof * gpu.memory_bytes_per_s) / 1e12, color="black", label="roof")
    points = {context: np.array([reached(n, context) for n in (84, 249)]) for context in (1, 1000, 4000, 8000)}
    who = {"ppo": "84 sequences: PPO's mean [I]", "tppo": "249 sequences: T-PPO's batch [I]"}
    for at, (context, pair) in enumerate(points.items()):
        x, y = pair.T
        axes.plot(x, y, color="#7F7F7F", linestyle=LINES[at], zorder=1, label=f"context of {context:,} token{'s' * (context > 1)}")
        for number, (name, label) in enumerate(who.items()):
            dot = look(name).line(linestyle="", markersize=7)
            axes.plot(x[number], y[number], **dot, label=None if at else label)
        axes.annotate(f"{x[1]:.0f}", (x[1], y[1]), xytext=(-4, 8), textcoords="offset points", ha="center", fontsize=9)
    axes.axvline(gpu.ridge, color="#888888", linewidth=0.8, linestyle=(0, (4, 4)))
    axes.annotate(f"ridge {gpu.ridge:.0f}", (gpu.ridge * 1.05, 14), fontsize=8.5)
    axes.set(xscale="log", yscale="log", xlim=(8, 1000), ylim=(10, 1500))
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    tidy(
        axes, title=f"one {gpu.name}; each point at the speed that its steps reach", x="operations per byte", y="TFLOP/s per device"
    )
    left = points[4000][1, 0]
    title = f"249 operations per byte need short contexts: {left:.0f} are left at 4,000 tokens"
    figure.suptitle(title, fontweight="bold", fontsize=11)
    return figure, points


def draw_phases(parts: Mapping[str, Mapping[str, float]]) -> Figure:
    """Stacked bars: where the seconds of a million trained tokens go, per way to train."""
    phases = list(next(iter(parts.values())))
    figure, axes = plt.subplots(figsize=(8, 4.6), layout="constrained")
    left = np.zeros(len(parts))
    for at, phase in enumerate(phases):
        width = np.array([found[phase] for found in parts.values()])
        face, hatch = plt.get_cmap("cividis")(0.1 + 0.2 * at), ("", "//", "..", "xx", "--")[at]
        axes.barh(list(parts), width, left=left, color=face, hatch=hatch, edgecolor="white", label=phase.replace("_", " "))
        left += width
    axes.invert_yaxis()
    figure.legend(frameon=False, fontsize=8.5, ncols=5, loc="outside lower center")
    tidy(axes, title="", x="seconds per million trained tokens", y="")
    title = "Windows lengthen the policy's passes; what they take off the rollout depends on the lengths"
    figure.suptitle(title, fontweight="bold", fontsize=11)
    return figure


def draw_speeds(median: float = 1500, sigma: float = 1.0, slots: int = 512, devices: str = "8xH800") -> Figure:
    """Tokens per second of a 7B model: PPO with one response per slot, PPO refilled, T-PPO, partial rollouts; with their ranges."""
    spec = f"lognormal:median={median},sigma={sigma}"
    mine = Case(model="Qwen2.5-7B", gpus=devices, lengths=spec, cap=16_384, window=5461, mini_batch=128)
    tp = 2
    cells = {"PPO, one per slot": ("ppo", Cell(tp, slots)), "PPO, four per slot": ("ppo", Cell(tp, slots, 4 * slots))}
    others = {"T-PPO": "tppo", "T-PPO+ac": "tppo+ac", "partial rollouts": "partial"}
    cells |= {name: (method, Cell(tp, slots)) for name, method in others.items()}
    systems = {name: run_at(mine, *how) for name, how in cells.items()}
    figure, axes = plt.subplots(figsize=(7.5, 3), layout="constrained")
    for name, s in ((name, system.speed) for name, system in systems.items()):
        hatch = "//" if name == "PPO, four per slot" else ""
        axes.barh(name, s.middle, color=look_of(name).colour, hatch=hatch, edgecolor="white",
                  xerr=[[s.middle - s.low], [s.high - s.middle]], error_kw={"linewidth": 1})  # fmt: skip
    axes.invert_yaxis()
    best = max(systems, key=lambda name: systems[name].speed.middle)
    level = [name for name, system in systems.items() if name != best and systems[best].gain(system).low <= 1]
    ahead = "is ahead of all others at every efficiency" if not level else f"is not told apart from {', '.join(level)}"
    title = f"7B on {devices}, {slots} slots, lengths with median {median} and sigma {sigma}"
    tidy(axes, title=title, x="trained tokens per second", y="")
    figure.suptitle(f"At these settings {best} {ahead}", fontweight="bold", fontsize=11)
    return figure
