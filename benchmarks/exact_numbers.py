"""Numbers of the laboratory, by name: the source `exact` of docs/findings.md (benchmarks/findings.py). Nothing is sampled."""

from __future__ import annotations

import functools
import re

import numpy as np

from benchmarks import early_decision
from sim.lab import instances
from sim.lab.bias import AtDistance, by_distance
from sim.lab.critics import critic
from sim.lab.estimators import Estimator, named
from sim.lab.gradients import GradientError, gradient_errors, knee
from sim.lab.rollouts import Rollouts, older_policy

NUM_RANDOM = 40


@functools.cache
def world(name: str) -> Rollouts:
    """`early-0`: of benchmarks.early_decision; `random-7`: of seed 7; `thinking/1`: earlier windows' sampler is one step behind."""
    name, _, behind = name.partition("/")
    kind, _, number = name.rpartition("-")
    if kind == "early":
        made = early_decision.instance(int(number))
    elif kind == "random":
        made = instances.load("random", seed=int(number), num_states=4, num_tokens=2, max_tokens=8, every_token=False)
    else:
        made = instances.load(name)
    older_NA = older_policy(made.mdp, made.policy_NA, float(behind)) if behind else None
    return Rollouts(made.mdp, made.policy_NA, older_NA)


def estimator(name: str) -> Estimator:
    """sim's, with lambda 0.95; `egae-defer4` has a tail of 4 tokens."""
    plain = name.rstrip("0123456789")
    tail = name[len(plain) :]
    return named(plain) if not tail else Estimator(**{**vars(named(plain)), "tail_tokens": int(tail)})


@functools.cache
def gradient(key: str) -> GradientError:
    """ "calm-chain egae 8": the exact critic, responses that begin at an edge. More words: a critic; `anywhere` in a window."""
    name, rule, window, *more = key.split()
    rollouts, anywhere = world(name), "anywhere" in more
    spec = next((word for word in more if word != "anywhere"), "exact")
    value_N = critic(spec, rollouts.mdp, rollouts.solution, seed=int(name.rpartition("-")[2]) if name.startswith("random") else 0)
    return gradient_errors(rollouts, value_N, estimator(rule), [int(window)], average_offsets=anywhere)[int(window)]


@functools.cache
def bias(key: str) -> tuple[AtDistance, ...]:
    name, rule, window, *spec = key.split()
    rollouts = world(name)
    value_N = critic(spec[0] if spec else "exact", rollouts.mdp, rollouts.solution)
    return tuple(by_distance(rollouts, value_N, estimator(rule), int(window)))


@functools.cache
def knee_of(key: str) -> int | None:
    """ "calm-chain egae": the knee at 5 %, exact critic, over powers of 2 and the cap, as `python -m sim bias` has it."""
    name, rule = key.split()
    cap = world(name).mdp.max_tokens
    windows = sorted({*(2**i for i in range(cap.bit_length())), cap})
    return knee({w: gradient(f"{name} {rule} {w}") for w in windows}, 0.05)


def over_random(key: str, measure: str = "relative") -> list[float]:
    """ "random egae 4 ...": errors on the forty random MDPs of notebook 03."""
    return [getattr(gradient(key.replace("random", f"random-{seed}", 1)), measure) for seed in range(NUM_RANDOM)]


def exact(key: str, column: str) -> float | int | None:
    """A number of the laboratory. `near` and `far`: at the last token before the cut, at the first of the window."""
    if column == "knee":
        return knee_of(key)
    if column in ("median", "median_rescaled"):
        return float(np.median(over_random(key, "rescaled" if column == "median_rescaled" else "relative")))
    if column == "wins":  # "random cut-gae:egae 4 ...": in how many of the MDPs the first has the smaller error
        ours, theirs = (over_random(re.sub(r"[\w-]+:[\w-]+", name, key, count=1)) for name in key.split()[1].split(":"))
        return sum(a < b * (1 - 1e-6) for a, b in zip(ours, theirs, strict=True))
    if column.startswith(("near_", "far_")):
        end, _, what = column.partition("_")
        found: float = getattr(bias(key)[0 if end == "near" else -1], what)
        return found
    if column == "ended":  # "early-0 8": the share of the responses that end within so many tokens
        name, tokens = key.split()
        return float(world(name).solution.length_T[: int(tokens) + 1].sum())
    error = gradient(key)  # along: the part that points along the true gradient, in units of its length
    value: float = error.length * error.cosine if column == "along" else getattr(error, column)
    return value
