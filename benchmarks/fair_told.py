"""What the committed tables of benchmarks/fair_headline.py say, as pages tell it.

found      an interval with its verdict, and who arrives
bound      where seeds of one method miss the target: the ratio of seconds over all seeds, as far as it is known
told       a task's row
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Mapping
from typing import Any

from benchmarks.arrivals import SPAN, Fields, ratio
from benchmarks.common import RESULTS
from benchmarks.fair_headline import HOLDS


@functools.cache
def committed(task: str) -> tuple[dict[str, str], ...]:
    """The rows of a task's table; none where there is no table."""
    path = RESULTS / f"fair-headline-{task}.csv"
    if not path.exists():
        return ()
    with path.open(newline="") as file:
        return tuple(csv.DictReader(file))


def of_seeds(task: str, quantity: str) -> list[list[float]]:
    """Of PPO and of tppo-once, seed by seed; infinite where a seed never arrives."""
    return [[float(r["value"]) for r in committed(task) if (r["arm"], r["quantity"]) == (arm, quantity)] for arm in HOLDS]


def found(task: str, quantity: str) -> Fields | None:
    """A committed interval with its verdict, the seeds, how many of each method arrive and in how many both do; None where there is
    none."""
    if not committed(task):
        return None
    (row,) = (r for r in committed(task) if r["quantity"].startswith(f"{quantity}:"))
    ppo, once = of_seeds(task, quantity)
    return {name: float(row[name]) for name in ("value", "low", "high")} | {
        "verdict": row["verdict"], "seeds": len(ppo), "ppo": sum(map(math.isfinite, ppo)), "once": sum(map(math.isfinite, once)),
        "both": int(row["reached"]),
    }  # fmt: skip


def bound(task: str) -> Fields | None:
    """PPO / tppo-once in CPU seconds over all seeds, those that miss taken to arrive at the last moment of which there is a mean:
    `side` is "least" where only PPO's miss, "most" where only tppo-once's do. None where all arrive, or both miss some."""
    arrivals = of_seeds(task, "seconds")
    misses = [not all(map(math.isfinite, own)) for own in arrivals]
    if sum(misses) != 1:
        return None
    last_s = (1 - SPAN / 2) * float(committed(task)[0]["budget_s"])
    ppo, once = ([min(x, last_s) for x in own] for own in arrivals)
    return {"side": "least" if misses[0] else "most"} | ratio(ppo, once)


def shown(row: Mapping[str, Any], form: str = ".2f") -> str:
    """An interval as pages have it; of one seed there is none."""
    value, low, high = (format(row[name], form) for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]" if math.isfinite(row["low"]) else f"{value} [no interval]"


def all_seeds(task: str, seconds: Mapping[str, Any]) -> str:
    """The ratio of seconds over all seeds, as far as it is known."""
    limit = bound(task)
    if limit:
        return f"at {limit['side']} {shown(limit)}"
    return "the same" if seconds["both"] == seconds["seeds"] else "not known: both miss some"


def told(task: str) -> dict[str, str]:
    """What came out on a task, for the tables of pages: who arrives, of how many seeds, each ratio, area and verdicts. Empty where
    nothing did yet."""
    ratios = {name: found(task, name) for name in ("seconds", "generated_tokens", "trained_tokens")}
    seconds, area = ratios["seconds"], found(task, "area")
    if not seconds or not area:
        return {}
    return {
        "arrive": "`tppo-once` {once}, PPO {ppo}, both {both}, of {seeds}".format(**seconds),
        "seconds": shown(seconds),
        "bound": all_seeds(task, seconds),
        **{name: shown(row) for name, row in ratios.items() if row and name != "seconds"},
        "area": f"{shown(area, '+.3f')}, {area['verdict']}",
        "verdict": seconds["verdict"],
    }
