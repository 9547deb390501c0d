"""Where a run reaches its target, what it took, and the ratio of two methods, seed by seed: for benchmarks/fair_headline.py.

accuracy   between evaluations on straight lines, then the mean over SPAN of the budget around each moment
target     SHARE of the best of the first arm's means, averaged over seeds
ratio      geometric mean and 95 % Student-t interval of logarithms, over the seeds in which both arrive
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.paired import verdict
from tppo_ref.runs.comparison import geometric, mean_interval

Fields = dict[str, Any]
SHARE, SPAN, GRID = 0.95, 0.2, 600  # of PPO's best; of the budget, for a mean; points over the budget


class Curve(NamedTuple):
    """A run at its evaluations: CPU seconds, accuracy, generated and trained tokens so far."""

    seconds: np.ndarray
    accuracy: np.ndarray
    generated: np.ndarray
    trained: np.ndarray


def curve(rows: Sequence[Mapping[str, Any]]) -> Curve:
    return Curve(*(np.array([float(r[name]) for r in rows]) for name in Curve._fields))


def smooth(run: Curve, budget_s: float) -> tuple[np.ndarray, np.ndarray]:
    """(seconds, accuracy) on the common grid: straight lines between evaluations, then the mean over SPAN of the budget around each
    moment, which shifts no arm; only moments that have all of it."""
    seconds = np.linspace(0, budget_s, GRID + 1)
    accuracy = np.interp(seconds, run.seconds, run.accuracy)
    half = round(SPAN * GRID / 2)
    means = np.convolve(accuracy, np.full(2 * half + 1, 1 / (2 * half + 1)), mode="valid")
    return seconds[half : GRID + 1 - half], means


def area(run: Curve, budget_s: float) -> float:
    """Mean accuracy over the budget."""
    seconds = np.linspace(0, budget_s, GRID + 1)
    return float(np.trapezoid(np.interp(seconds, run.seconds, run.accuracy), seconds) / budget_s)


def token_area(run: Curve, tokens: float) -> float:
    """Mean accuracy over the first so many generated tokens."""
    grid = np.linspace(0, tokens, GRID + 1)
    return float(np.trapezoid(np.interp(grid, run.generated, run.accuracy), grid) / tokens)


class Arrival(NamedTuple):
    """What it took to the target; infinite where a seed never arrives."""

    seconds: float
    generated_tokens: float
    trained_tokens: float


def arrival(run: Curve, target: float, budget_s: float) -> Arrival:
    """The first moment at which the mean is at least the target."""
    seconds, means = smooth(run, budget_s)
    reached = np.flatnonzero(means >= target - 1e-12)
    if not len(reached):
        return Arrival(math.inf, math.inf, math.inf)
    at = float(seconds[reached[0]])
    return Arrival(at, *(float(np.interp(at, run.seconds, tokens)) for tokens in (run.generated, run.trained)))


def ratio(first: Sequence[float], other: Sequence[float]) -> Fields:
    """first / other seed by seed, where both arrive: geometric mean, interval of logarithms, verdict."""
    ratios = [a / b for a, b in zip(first, other, strict=True) if math.isfinite(a) and math.isfinite(b)]
    value, low, high = geometric(ratios)
    word = "not all arrive" if len(ratios) < len(first) else verdict(low, high, same=1.0)
    return {"value": value, "low": low, "high": high, "reached": len(ratios), "verdict": word}


def rows_of(runs: Mapping[str, Mapping[int, Curve]], budget_s: float) -> list[Fields]:
    """A row per arm, seed and quantity, and one per quantity with its interval. The first arm is the baseline."""
    first, seeds = next(iter(runs)), list(next(iter(runs.values())))
    target = SHARE * float(np.mean([smooth(run, budget_s)[1] for run in runs[first].values()], axis=0).max())
    found = {arm: {seed: arrival(runs[arm][seed], target, budget_s)._asdict() | {"area": area(runs[arm][seed], budget_s)}
                   for seed in seeds} for arm in runs}  # fmt: skip
    rows: list[Fields] = []
    for arm, name in itertools.product(runs, (*Arrival._fields, "area")):
        mine, base = ([found[a][seed][name] for seed in seeds] for a in (arm, first))
        rows += [{"arm": arm, "quantity": name, "seed": seed, "value": x, "low": "", "high": "", "reached": "", "verdict": ""}
                 for seed, x in zip(seeds, mine, strict=True)]  # fmt: skip
        if arm == first:
            continue
        if name == "area":
            value, low, high = mean_interval([a - b for a, b in zip(mine, base, strict=True)])
            rows.append({"arm": arm, "quantity": f"area: {arm} - {first}", "seed": "all", "value": value, "low": low, "high": high,
                         "reached": len(seeds), "verdict": verdict(low, high)})  # fmt: skip
        else:
            rows.append({"arm": arm, "quantity": f"{name}: {first} / {arm}", "seed": "all"} | ratio(base, mine))
    return [row | {"target": round(target, 4), "budget_s": budget_s} for row in rows]
