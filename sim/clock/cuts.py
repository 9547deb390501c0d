"""How much weight P4 (docs/theory.md) gives to a window's cuts: what can be said of their cost before a run."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sim.clock.distributions import Lengths

Floats = NDArray[np.float64]


def lambda_at_cut(length: ArrayLike, window: int, *, lam: float, alpha: float) -> Floats:
    """The trainer's lambda of rows that are cut at so many tokens; alpha = 0: lam at every length."""
    import torch  # the clock needs it for nothing else

    from tppo_ref.method.advantages import lambda_of_rows

    length_n = torch.as_tensor(np.atleast_1d(np.asarray(length, dtype=np.float64)))
    return lambda_of_rows(length_n, torch.ones_like(length_n, dtype=torch.bool), window, lam=lam, alpha=alpha or None).numpy()


def cut_weight(lengths: Lengths, window: int, *, gamma: float = 1.0, lam: float = 0.95, alpha: float = 0.0) -> float:
    """How much of P4's bracket falls on a sampled token, in the mean: 0 without cuts, 1 if every token stood at a cut.

        sum over edges l of P(T > l) * sum over the n tokens before l of (gamma lambda)^(n - 1),  over E[T]

    P4 (docs/theory.md): the cut's share of the mean |bias| is at most this times gamma [Lip + lambda |e| (1 + f)], which depends on
    task and critic. The first edge of a response is anywhere in a window, as with immediate refill.

    alpha   of the length-adaptive lambda of a row that is cut at l (`lambda_at_cut`); P4 is proven for alpha = 0 only, with it the
            weight is a comparison, no bound
    """
    above = 1 - lengths.cumulative()  # P(T > l)
    first = np.unique(np.linspace(1, window, 64).round().astype(np.int64))
    total = 0.0
    for at in range(-(-lengths.cap // window)):
        edge = first + at * window
        known = np.where(at == 0, edge, window)
        alive = np.where(edge < lengths.cap, above[np.minimum(edge, lengths.cap)], 0.0)
        decay = gamma * lambda_at_cut(edge, window, lam=lam, alpha=alpha)
        sums = np.where(decay < 1, (1 - decay**known) / np.maximum(1 - decay, 1e-300), known)
        total += float((alive * sums).mean())
    return total / lengths.mean_tokens()
