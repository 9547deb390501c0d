"""A method against another on the same seeds: verdicts; ratios to PPO from a headline's summary.csv."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

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


def verdict(low: float, high: float, same: float = 0.0) -> str:
    """Of an interval, where larger is better than `same`; undecided where it has no ends."""
    return "better" if low > same else "worse" if high < same else "undecided"


PAIRED: dict[str, Callable[[Summary, str], list[float]]] = {
    "speed-up": lambda summary, method: by_seed(summary, method, "speed-up"),
    "throughput ratio": lambda summary, method: by_seed(summary, method, "throughput ratio"),
    "trained tokens to target": lambda summary, method: tokens_to_target(summary, method, generated=False),
    "generated tokens to target": lambda summary, method: tokens_to_target(summary, method, generated=True),
}
