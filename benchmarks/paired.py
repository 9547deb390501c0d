"""A method against PPO on the same seeds, from a headline's summary.csv: ratios, seed by seed, and their geometric mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from scipy import stats

Summary = Sequence[Mapping[str, str]]


def by_seed(summary: Summary, method: str, quantity: str) -> list[float]:
    return [float(r["value"]) for r in summary
            if (r["method"], r["quantity"]) == (method, quantity) and r["statistic"].startswith("seed ")]  # fmt: skip


def tokens_to_target(summary: Summary, method: str, *, generated: bool) -> list[float]:
    """What the method needs for one token of PPO: of trained ones, or of generated ones (trained / the share that is trained)."""
    needed = {m: np.asarray(by_seed(summary, m, "tokens to target")) for m in (method, "ppo")}
    if generated:
        needed = {m: x / np.asarray(by_seed(summary, m, "trained tokens")) for m, x in needed.items()}
    return list(needed[method] / needed["ppo"])


def geometric(ratios: Iterable[float]) -> tuple[float, float, float]:
    """Geometric mean of positive, finite ratios, and the 95 % Student-t interval of the mean logarithm."""
    x = np.log(list(ratios))
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)))
    return math.exp(x.mean()), math.exp(x.mean() - half), math.exp(x.mean() + half)


PAIRED: dict[str, Callable[[Summary, str], list[float]]] = {
    "speed-up": lambda summary, method: by_seed(summary, method, "speed-up"),
    "throughput ratio": lambda summary, method: by_seed(summary, method, "throughput ratio"),
    "trained tokens to target": lambda summary, method: tokens_to_target(summary, method, generated=False),
    "generated tokens to target": lambda summary, method: tokens_to_target(summary, method, generated=True),
}
