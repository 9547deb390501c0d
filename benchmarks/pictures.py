"""The pictures of docs/index.md and README.md as SVG: slots in motion, one response being cut, one cut under three rules.

`python -m benchmarks.front_page` writes them.

No number is typed in: slots are driven by the Trainer's own `SlotSchedule` with published lengths, the response is that of
results/one_response.csv. A picture has its own ground in light and in dark, words instead of colours alone, a title and a
description for who does not see it, and stands still for who asked for that.
"""

from __future__ import annotations

import dataclasses
import functools
import html
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from sim.clock.lengths import load_lengths
from sim.clock.windows import windows_of
from tppo_ref.method.records import End
from tppo_ref.method.slots import Segment, SlotSchedule
from tppo_ref.runs.colours import look

INKS = {  # name: (in light, in dark)
    "ground": ("#ffffff", "#1e2129"), "ink": ("#1c1f24", "#eceef1"), "quiet": ("#5c6470", "#a5adb9"),
    "line": ("#c9ced6", "#4a515d"), "field": ("#eef1f4", "#2a2f39"),
    "ppo": look("ppo").shades, "ppo2": ("#F0A87A", "#A8531D"), "tppo": look("tppo").shades, "tppo2": ("#7DB7E8", "#2C5F8A"),
    **{rule: look(rule).shades for rule in ("previous", "critic", "zero")},
}  # fmt: skip
TEXT = "text{font-variant-numeric:tabular-nums;paint-order:stroke;stroke-width:3px;stroke-linejoin:round}"
FONT = "system-ui, 'Segoe UI', Roboto, 'Liberation Sans', sans-serif"


def text(x: float, y: float, words: object, ink: str = "ink", size: float = 13, anchor: str = "start", weight: int = 400) -> str:
    """`words` at a place, in front of a line that crosses them; A_t and V(s_t) with their index below the line of writing."""
    index = r'<tspan dy="4" font-size="75%">t</tspan><tspan dy="-4">\1</tspan>'
    written = re.sub(r"(?<=[sA])_t\b(.*)", index, html.escape(str(words)))
    rim = " s-ground" * (anchor != "middle")  # words in the middle of a box have no line behind them
    return (f'<text x="{x:.1f}" y="{y:.1f}" class="f-{ink}{rim}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}">'
            f"{written}</text>")  # fmt: skip


def box(x: float, y: float, width: float, height: float, ink: str, more: str = "") -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="f-{ink}" {more}/>'


def line(x: float, y: float, x2: float, y2: float, ink: str, width: float = 1, dashes: str = "none") -> str:
    return (f'<path d="M{x:.1f} {y:.1f}L{x2:.1f} {y2:.1f}" class="s-{ink}" fill="none" stroke-width="{width}" '
            f'stroke-dasharray="{dashes}"/>')  # fmt: skip


def svg(width: float, height: float, title: str, description: str, parts: Sequence[str], style: str = "") -> str:
    """A whole picture. Its colours are those of the scheme that its reader prefers."""
    light, dark = (
        "".join(f".f-{name}{{fill:{inks[i]}}}.s-{name}{{stroke:{inks[i]}}}" for name, inks in INKS.items()) for i in (0, 1)
    )
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" role="img" font-family="{FONT}">',
        f"<title>{html.escape(title)}</title>", f"<desc>{html.escape(description)}</desc>",
        f"<style>{TEXT}{light}@media(prefers-color-scheme:dark){{{dark}}}{style}</style>",
        box(0, 0, width, height, "ground", 'rx="8"'), *parts, "</svg>\n",
    ])  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- slots in motion

SLOTS, WINDOW, LENGTHS, STEPS, SEED = 8, 512, "dapo-32b-early", 3, 0
"""Of the picture: decoding places, T-PPO's window, the published lengths and their seed, and how many steps of PPO are shown."""


@dataclasses.dataclass(frozen=True)
class Play:
    """A schedule driven with known lengths: segments on one axis of decode steps, and where its steps end."""

    segments: list[Segment]
    edges: list[int]

    def until(self, stop: int) -> list[Segment]:
        return [s._replace(stop=min(s.stop, stop)) for s in self.segments if s.begin < stop]

    def ended(self, stop: int) -> list[int]:
        """Decode steps at which a response ended, in order."""
        return sorted(s.stop for s in self.segments if s.end is not End.RUNNING and s.stop <= stop)

    def busy(self, stop: int) -> float:
        return sum(s.stop - s.begin for s in self.until(stop)) / (SLOTS * stop)


def play(schedule: SlotSchedule, lengths: Sequence[int], until: int) -> Play:
    """Windows of a schedule whose responses have these lengths, until so many decode steps have gone by."""
    segments, edges = list[Segment](), [0]
    for window in windows_of(schedule, lengths):
        segments += [s._replace(begin=edges[-1] + s.begin, stop=edges[-1] + s.stop) for s in window]
        edges.append(segments[-1].stop)
        if edges[-1] >= until:
            break
    return Play(segments, edges)


@functools.cache
def plays() -> tuple[Play, Play, int]:
    """PPO, T-PPO, and the decode steps that are shown: PPO's first `STEPS` steps."""
    drawn = load_lengths(LENGTHS).sample(np.random.default_rng(SEED), 4000)[:, 0]
    lengths, cap = [int(n) for n in drawn], int(drawn.max())
    ppo = play(SlotSchedule(slots=SLOTS, window=cap, max_response_tokens=cap, refill="batch"), lengths, 4 * cap)
    shown = ppo.edges[STEPS]
    return ppo, play(SlotSchedule(slots=SLOTS, window=WINDOW, max_response_tokens=cap), lengths, shown), shown


ROW, SPACE = 15, 62
"""Units of the picture: a slot's height, and what lies between the two panels."""
COUNT = 22
"""Units between two numbers on the strip that counts the ended responses."""
SECONDS, PLAYED = 14, 0.82
"""Of the film, and the share of it in which time goes by; then the whole stands."""


def slots_picture() -> str:
    """PPO's slots above T-PPO's, uncovered from left to right as time goes by, with the number of responses that have ended."""
    ppo, tppo, shown = plays()
    left, width, top = 14, 532, 38
    parts, style = [], ""
    for name, label, run in (("ppo", "PPO waits for the longest", ppo), ("tppo", "T-PPO cuts at the window's edge", tppo)):
        y = top + (name == "tppo") * (SLOTS * ROW + SPACE)
        parts.append(text(left, y - 12, label, size=17, weight=700))
        parts.append(text(left + width - 36, y - 12, "responses ended", "quiet", 15, "end"))
        parts += panel(name, run, shown, left, y, width)
        style += counting(name, run.ended(shown), shown)
    height = top + 2 * (SLOTS * ROW + SPACE) + 2
    parts.append(text(left, height - 32, "each row a slot, each bar a response; empty: idle", "quiet", 15))
    parts.append(text(left, height - 12, "each upright line: training", "quiet", 15))
    parts.append(text(left + width, height - 12, "decode steps →", "quiet", 15, "end"))
    gone = f"transform:translateX({width + 3}px)"
    style += f"@keyframes go{{0%{{transform:translateX(0)}}{100 * PLAYED:.0f}%,100%{{{gone}}}}}"
    style += f".cover{{{gone};animation:go {SECONDS}s linear infinite}}"
    style += "@media(prefers-reduced-motion:reduce){.cover,.count-ppo,.count-tppo{animation:none}}"
    said = [f"{len(run.ended(shown))} responses and keeps {100 * run.busy(shown):.0f} % of the slots busy" for run in (ppo, tppo)]
    say = (
        f"{SLOTS} decoding slots over {shown:,} decode steps. PPO ends {said[0]}; T-PPO, with a window of {WINDOW}, ends {said[1]}."
    )
    # What has been uncovered must not show again beyond the panel: the cover leaves through a clip of the panel's width.
    clip = f'<clipPath id="panel"><rect x="{left - 2}" y="0" width="{width + 4}" height="{height}"/></clipPath>'
    whole = [clip, '<g clip-path="url(#panel)">', *parts, "</g>"]
    return svg(2 * left + width, height, "Decoding slots under PPO and T-PPO", say, whole, style)


def panel(name: str, run: Play, shown: int, left: float, y: float, width: float) -> list[str]:
    """A method's slots, under a cover that leaves, and the strip of numbers that counts beside them."""
    at = lambda step: left + width * step / shown  # noqa: E731
    parts, height = [box(left, y, width, SLOTS * ROW, "field")], SLOTS * ROW
    dark, seen = Counter[int](), dict[int, int]()  # per slot: whether its last response is drawn dark, and which that is
    for s in sorted(run.until(shown), key=lambda s: s.begin):
        if seen.get(s.slot) != s.response:
            dark[s.slot], seen[s.slot] = 1 - dark[s.slot], s.response
        size = max(at(s.stop) - at(s.begin) - 0.6, 0.6), ROW - 2
        parts.append(box(at(s.begin), y + s.slot * ROW + 1, *size, name if dark[s.slot] else f"{name}2"))
    parts += [line(at(edge), y - 4, at(edge), y + height + 4, "ink", 1.2) for edge in run.edges[1:] if edge <= shown]
    hand = line(left, y - 3, left, y + height + 3, "quiet", 2)
    parts.append(f'<g class="cover">{box(left, y, width + 1, height, "ground")}{hand}</g>')
    counts = [text(34, 18 + COUNT * n, n, size=18, anchor="end", weight=700) for n in range(len(run.ended(shown)) + 1)]
    parts.append(f'<svg x="{left + width - 34}" y="{y - 30}" width="36" height="22" overflow="hidden">')
    return [*parts, f'<g class="count-{name}">', *counts, "</g></svg>"]


def counting(name: str, ended: Sequence[int], shown: int) -> str:
    """The strip's motion: a number further at each decode step with which a response ended."""
    moved = lambda n: f"transform:translateY({-COUNT * n}px)"  # noqa: E731
    frames = {0.0: 0} | {100 * PLAYED * stop / shown: n for n, stop in enumerate(ended, start=1)} | {100.0: len(ended)}
    film = "".join(f"{share:.2f}%{{{moved(n)}}}" for share, n in frames.items())
    return f"@keyframes {name}{{{film}}}.count-{name}{{{moved(len(ended))};animation:{name} {SECONDS}s step-end infinite}}"


# ------------------------------------------------------------------------------------------------------- one response being cut

Told = Sequence[Mapping[str, str]]


def bars(
    x: float, y: float, step: float, values: Sequence[float | None], scale: float, ink: str, *, hollow: bool = False
) -> list[str]:
    """A bar per value up or down from y; None: nothing."""
    parts = []
    for at, value in enumerate(values):
        if value is None:
            continue
        high = max(abs(value) * scale, 0.8)
        shape = f'class="s-{ink}" fill="none" stroke-width="1.3" stroke-dasharray="2.5 2"' if hollow else f'class="f-{ink}"'
        inset = 1.5 if hollow else 4
        parts.append(f'<rect x="{x + at * step + inset:.1f}" y="{y - high if value > 0 else y:.1f}" width="{step - 2 * inset:.1f}" '
                     f'height="{high:.1f}" {shape}/>')  # fmt: skip
    return parts


def number(cell: str) -> float | None:
    return float(cell) if cell else None


def response_picture(first: Told, second: Told, waited: Sequence[float]) -> str:
    """first, second: the response's rows in its two windows; waited: what its first tokens would have been told without a cut."""
    length, cut, left, width = len(second), len(first), 14, 560
    step = (width - 2 * left) / length
    edge = left + cut * step
    parts = [text(left, 26, f"prompt  {first[0]['prompt']}", "quiet", 16)]
    parts += [text(edge + 6 * side, 54, name, "previous", 16, anchor, 700)
              for side, name, anchor in ((-1, "window 1", "end"), (1, "window 2", "start"))]  # fmt: skip
    for t, row in enumerate(second):
        unsure = float((first[t] if t < cut else row)["before"]) < SURE
        parts.append(box(left + t * step + 1, 62, step - 2, 28, "field", 'rx="3"'))
        word, ink = row["text"], "zero" if unsure else "ink"
        parts.append(text(left + (t + 0.5) * step, 82, word, ink, 16 if len(word) < 2 else 11.5, "middle", 700))
    y, scale = 186, 62
    parts.append(text(left, 116, "what the critic says before each token, V(s_t)", "quiet", 16))
    for rows, ink, dashes in ((second, "critic", "5 3"), (first, "previous", "none")):
        points = " ".join(f"{left + (t + 0.5) * step:.1f},{y - scale * float(r['value']):.1f}" for t, r in enumerate(rows))
        parts.append(f'<polyline points="{points}" class="s-{ink}" fill="none" stroke-width="2.2" stroke-dasharray="{dashes}"/>')
    parts += [line(left, y, width - left, y, "line"), text(width - left, y - 36, "one step later", "critic", 15, "end"),
              text(left, y - 36, "at the cut", "previous", 15), text(width - left, y + 13, "0", "quiet", 11, "end")]  # fmt: skip
    y, scale = 306, 74
    parts.append(text(left, 216, "what the policy is told, A_t", "quiet", 16))
    parts.append(text(left, 234, "dashed: had the machine waited", "ink", 15))
    parts += bars(left, y, step, waited, scale, "ink", hollow=True)
    parts += bars(left, y, step, [number(r["advantage"]) for r in [*first, *second[cut:]]], scale, "previous")
    parts += [line(left, y, width - left, y, "line"), text(width - left, y + 13, "0", "quiet", 11, "end")]
    strips = [("policy, window 1", first, "policy_trains", "previous"), ("policy, window 2", second, "policy_trains", "previous"),
              ("value model, once it has ended", second, "value_trains", "critic")]  # fmt: skip
    parts.append(text(left, 346, "who trains on it, and when", "quiet", 16))
    for at, (label, rows, column, ink) in enumerate(strips):
        y = 352 + 38 * at
        parts.append(text(left, y + 14, label, ink, 15, weight=700))
        on = [t < len(rows) and rows[t][column] == "1" for t in range(length)]
        parts += [box(left + t * step + 1, y + 19, step - 2, 11, ink if on[t] else "field") for t in range(length)]
    height = 352 + 38 * len(strips) + 6
    parts.insert(0, line(edge, 40, edge, height - 6, "ink", 1.6, "5 4"))  # behind the words
    missed = ", ".join(f"{a:+.2f}" for a in waited)
    say = f"A response of {length} tokens, cut after {cut}. In their window the first {cut} are told {listed(first)}; had the "
    say += f"machine waited, {missed}. The policy trains on each window's tokens in that window, less the tail before the cut; the "
    say += f"value model on all {length}, once the response has ended."
    return svg(width, height, "One response being cut", say, parts)


RULE_DASHES = {"previous": "none", "critic": "7 4", "zero": "2 3"}


def rules_picture(words: Sequence[str], by_rule: Mapping[str, Sequence[float]], waited: Sequence[float]) -> str:
    """What the tokens before a cut are told under each rule, and had the machine waited."""
    left, width, top, bottom = 14, 560, 46, 236
    values = [*waited, *(a for told in by_rule.values() for a in told), 0.0]
    low, high = min(values), max(values)
    step = (width - 2 * left - 130) / len(words)
    place = lambda t, a: (left + 30 + (t + 0.5) * step, bottom - (bottom - top) * (a - low) / (high - low))  # noqa: E731
    parts = [text(left, 26, "what each token before the cut is told, A_t", "quiet", 16)]
    _, zero = place(0, 0)
    parts += [line(left + 30, zero, width - left - 110, zero, "line"), text(left, zero + 5, "0", "quiet", 14)]
    lines = {"had it waited": (waited, "ink", "4 3"), **{name: (told, name, RULE_DASHES[name]) for name, told in by_rule.items()}}
    ends = sorted((place(len(words) - 1, told[-1])[1], name) for name, (told, *_) in lines.items())
    label_y: dict[str, float] = {}
    for y, name in ends:  # labels stand beside their lines, and not upon each other
        label_y[name] = max(y + 5, max(label_y.values(), default=-99.0) + 18)
    for name, (told, ink, dashes) in lines.items():
        points = [place(t, a) for t, a in enumerate(told)]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{drawn}" class="s-{ink}" fill="none" stroke-width="2.4" stroke-dasharray="{dashes}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" class="f-{ink}"/>' for x, y in points]
        parts.append(text(points[-1][0] + 12, label_y[name], name, ink, 15, weight=700))
    parts += [text(place(t, 0)[0], bottom + 28, word, size=16, anchor="middle", weight=700) for t, word in enumerate(words)]
    say = "; ".join(f"{name}: {', '.join(f'{a:+.2f}' for a in told)}" for name, (told, *_) in lines.items())
    return svg(
        width, bottom + 42, "One cut under three rules", f"Advantages of the tokens {' '.join(words)} before a cut. {say}.", parts
    )


SURE = 0.9
"""A token that the policy chose with a smaller probability is marked: there it could have gone another way."""


def listed(rows: Told) -> str:
    return ", ".join(f"{float(row['advantage']):+.2f}" for row in rows)
