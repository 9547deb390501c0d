"""Critics that are wrong in a known way, built on the exact value: the error of each is one number that people can turn."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from sim.lab.checks import Floats, check_finite, check_shape
from sim.lab.token_mdp import Solution, TokenMDP
from tppo_ref.method.errors import nearest


def exact(mdp: TokenMDP, solution: Solution, size: float, seed: int) -> Floats:
    """V^pi."""
    return solution.value_N.copy()


def zero(mdp: TokenMDP, solution: Solution, size: float, seed: int) -> Floats:
    """0 everywhere: a critic before its first update."""
    return np.zeros(mdp.num_nodes)


def constant(mdp: TokenMDP, solution: Solution, size: float, seed: int) -> Floats:
    """`size` everywhere, in units of reward."""
    return np.full(mdp.num_nodes, size)


def noise(mdp: TokenMDP, solution: Solution, size: float, seed: int) -> Floats:
    """V^pi plus independent normal errors of standard deviation `size`, one per node: as rough as an error can be."""
    return solution.value_N + size * np.random.default_rng(seed).standard_normal(mdp.num_nodes)


def drift(mdp: TokenMDP, solution: Solution, size: float, seed: int) -> Floats:
    """V^pi plus an error that grows evenly from 0 at the first token to `size` at the deepest node: as smooth as one can be."""
    return solution.value_N + size * mdp.depth_N / max(1, int(mdp.depth_N.max()))


def shrunk(mdp: TokenMDP, solution: Solution, size: float, seed: int) -> Floats:
    """`size` V^pi: a critic half-way from 0 (size 0.5), or an overconfident one (above 1)."""
    return size * solution.value_N


CRITICS: dict[str, tuple[Callable[[TokenMDP, Solution, float, int], Floats], bool]] = {
    "exact": (exact, False),
    "zero": (zero, False),
    "constant": (constant, True),
    "noise": (noise, True),
    "drift": (drift, True),
    "shrunk": (shrunk, True),
}
"""Name -> (builder, whether it takes a size)."""


def critic(spec: str, mdp: TokenMDP, solution: Solution, *, seed: int = 0) -> Floats:
    """The critic [N] of a name that people type: "exact", "zero", "constant:0.3", "noise:0.1", "drift:-0.2", "shrunk:0.5".

    The seed serves the noise. ValueError for an unknown name and for a size that is missing, superfluous or not finite.
    """
    name, colon, text = spec.partition(":")
    if name not in CRITICS:
        raise ValueError(f"critic: got {spec!r}; expected one of {', '.join(CRITICS)}{nearest(name, list(CRITICS))}")
    build, sized = CRITICS[name]
    if not sized and colon:
        raise ValueError(f"critic: got {spec!r}; expected {name} without a size")
    try:
        size = float(text) if sized else 0.0
    except ValueError:
        size = math.nan
    if not math.isfinite(size):
        raise ValueError(f"critic: got {spec!r}; expected {name}:SIZE with a finite number, such as {name}:0.1")
    return build(mdp, solution, size, seed)


def check_critic(mdp: TokenMDP, critic_N: ArrayLike) -> Floats:
    """`critic_N` as float64 [N]; ValueError for a wrong shape and for values that are not finite."""
    hint = "; use by_node for a critic per state" if np.shape(critic_N) == (mdp.num_states,) else ""
    return check_finite("critic_N", check_shape("critic_N", critic_N, (mdp.num_nodes,), hint))
