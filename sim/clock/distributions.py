"""Distributions of response lengths, each given by its quantile function; group correlation, growth and cap for all of them.

A distribution is two inverse functions of a length x > 0 in tokens, before growth and cap:

    quantile(u) = the length that a share u of the responses does not exceed          below(x) = share of lengths < x

and everything else follows. A response of rank u in [0, 1] has, at training step s,

    tokens(u, s) = clip(round(factor(s) * quantile(u)), 1, cap)        an exact .5 is rounded up

where `growth` gives factor(s), 1 without it. The answers to one prompt (a group) are correlated by a Gaussian copula:

    z = sqrt(rho) z_group + sqrt(1 - rho) z_answer,     u = Phi(z),     z_group and z_answer standard normal, independent

so every answer alone has the distribution itself. `correlation` is rho, the correlation of the normal scores z of two answers to
one prompt. For a log-normal it is also the correlation of their log-lengths, before rounding and cap; for the others nearly so.
lengths.py holds the published distributions and reads files. Suffixes: G prompts (groups), S answers to each.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

Floats = NDArray[np.float64]
Tokens = NDArray[np.int64]
Pairs = tuple[tuple[float, float], ...]
MAX_CAP = 10_000_000  # tokens; `cumulative` keeps a number for each
AnyLengths = TypeVar("AnyLengths", bound="Lengths")
PERCENTS = (50.0, 75.0, 90.0, 95.0, 99.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Growth:
    """How lengths grow over training: factors at steps, linear in between, flat before the first and after the last."""

    factors: Pairs
    """(step, factor) pairs, steps ascending, factors positive."""

    def __post_init__(self) -> None:
        steps, factors = np.array(self.factors, dtype=float).reshape(-1, 2).T
        if not len(steps) or not np.isfinite(self.factors).all() or (np.diff(steps) <= 0).any() or (factors <= 0).any():
            raise ValueError(f"growth: got {self.factors}; expected (step, factor) pairs: steps ascending, factors positive")

    def factor(self, step: float) -> float:
        steps, factors = zip(*self.factors, strict=True)
        return float(np.interp(step, steps, factors))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Lengths(abc.ABC):
    """A distribution of response lengths; a subclass gives `quantile` and `below`. See the module's docstring."""

    cap: int
    """Longest response, in tokens."""
    correlation: float = 0.0
    """rho of two answers to one prompt, in [0, 1)."""
    growth: Growth | None = None
    """Growth over training; None: the same at every step."""
    name: str = ""
    source: str = ""
    """Where the numbers come from, with the marks of docs/config.md, and what was inferred."""

    def __post_init__(self) -> None:
        if isinstance(self.cap, bool) or not isinstance(self.cap, int) or not 1 <= self.cap <= MAX_CAP:
            raise ValueError(f"cap: got {self.cap!r}; expected a whole number of tokens, 1 to {MAX_CAP:,}")
        if not 0 <= self.correlation < 1:
            raise ValueError(f"correlation: got {self.correlation!r}; expected a number in [0, 1)")

    @abc.abstractmethod
    def quantile(self, u: ArrayLike) -> Floats:
        """Length at rank u in [0, 1], before growth and cap, not decreasing in u; may be inf."""

    @abc.abstractmethod
    def below(self, x: ArrayLike) -> Floats:
        """Share of lengths strictly less than x, before growth and cap: the inverse of `quantile`."""

    def tokens(self, u: ArrayLike, step: float = 0) -> Tokens:
        """Length in tokens at rank u: whole, 1 .. cap."""
        factor = self.growth.factor(step) if self.growth else 1.0
        x = np.minimum(factor * self.quantile(u), self.cap)
        return np.clip(np.floor(x + 0.5), 1, self.cap).astype(np.int64)

    def at_step(self: AnyLengths, step: float) -> AnyLengths:
        """The distribution as it is at one training step: it grows no more."""
        if self.growth is None:
            return self
        return dataclasses.replace(self, growth=Growth(factors=((0, self.growth.factor(step)),)))

    def sample(self, rng: np.random.Generator, num_groups: int, samples_per_group: int = 1, *, step: float = 0) -> Tokens:
        """Lengths of the answers to `num_groups` prompts -> int64 [num_groups, samples_per_group], 1 .. cap."""
        z_G1 = rng.standard_normal((num_groups, 1))
        z_GS = rng.standard_normal((num_groups, samples_per_group))
        z_GS = math.sqrt(self.correlation) * z_G1 + math.sqrt(1 - self.correlation) * z_GS
        return self.tokens(ndtr(z_GS), step)

    def cumulative(self, step: float = 0) -> Floats:
        """P(length <= k) for k = 0 .. cap: `cap + 1` numbers from 0 to 1, exact for the whole lengths that `tokens` gives."""
        factor = self.growth.factor(step) if self.growth else 1.0
        return np.concatenate([[0.0], self.below((np.arange(1, self.cap) + 0.5) / factor), [1.0]])

    def mean_tokens(self, step: float = 0) -> float:
        """E[length] = sum over k >= 0 of P(length > k)."""
        return float(np.sum(1 - self.cumulative(step)))

    def capped_share(self, step: float = 0) -> float:
        """Share of responses of `cap` tokens."""
        return float(1 - self.cumulative(step)[-2])

    def percentiles(self, percents: Sequence[float] = PERCENTS, step: float = 0) -> dict[float, int]:
        """Length in tokens at each percentile."""
        return dict(zip(percents, self.tokens(np.array(percents) / 100, step).tolist(), strict=True))

    def expected_maximum(self, num: int, step: float = 0) -> float:
        """E[longest of `num` independent responses] = sum over k >= 0 of 1 - P(length <= k)^num; correlation is left out."""
        if num < 1:
            raise ValueError(f"num: got {num}; expected 1 response or more")
        return float(np.sum(1 - self.cumulative(step) ** num))


# The distributions


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Constant(Lengths):
    """Every response has the same length: truncation cannot gain anything."""

    value: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_length("value", self.value, self.cap)

    def quantile(self, u: ArrayLike) -> Floats:
        return np.full(np.shape(u), float(self.value))

    def below(self, x: ArrayLike) -> Floats:
        return (np.asarray(x) > self.value).astype(float)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TwoPoint(Lengths):
    """Short, or at the cap with probability `long_share`: the case in which everything has a closed form."""

    short: float
    long_share: float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_length("short", self.short, self.cap)
        if not 0 <= self.long_share <= 1:
            raise ValueError(f"long_share: got {self.long_share!r}; expected a number in [0, 1]")

    def quantile(self, u: ArrayLike) -> Floats:
        return np.where(np.asarray(u) > 1 - self.long_share, np.inf, float(self.short))

    def below(self, x: ArrayLike) -> Floats:
        return np.where(np.asarray(x) > self.short, 1 - self.long_share, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class LogNormal(Lengths):
    """exp(normal(log median, sigma)); `log_normal` takes a mean and a percentile instead."""

    median: float
    sigma: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.median < math.inf or not 0 <= self.sigma < math.inf:
            raise ValueError(f"median: got {self.median!r} and sigma {self.sigma!r}; expected finite, positive and not negative")

    def quantile(self, u: ArrayLike) -> Floats:
        if self.sigma == 0:
            return np.full(np.shape(u), self.median)
        return self.median * np.exp(self.sigma * ndtri(np.asarray(u, dtype=float)))

    def below(self, x: ArrayLike) -> Floats:
        x = np.asarray(x, dtype=float)
        if self.sigma == 0:
            return (x > self.median).astype(float)
        return ndtr(_log(x / self.median) / self.sigma)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class PercentileTable(Lengths):
    """Published percentiles: log-length is linear in the normal score z = Phi^-1(u) between them.

    Papers give the median and what lies above. Both ends are therefore ours. Above the highest percentile the last straight piece
    goes on. Below the median the upper half is mirrored and stretched by s: log(median / quantile(1 - u)) = s log(quantile(u) /
    median), with s = 1, the plain mirror, where no mean is known, else what `stretch_for_mean` gives.
    """

    percentiles_upward: Pairs
    """(share, tokens) pairs upwards from the median, (0.5, median) first."""
    lower_stretch: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        shares, tokens = np.array(self.percentiles_upward, dtype=float).reshape(-1, 2).T
        rising = len(shares) > 1 and (np.diff(shares) > 0).all() and (np.diff(tokens) > 0).all()
        if not (rising and shares[0] == 0.5 and shares[-1] < 1 and tokens[0] > 0 and tokens[-1] < math.inf):
            raise ValueError(
                f"percentiles: got {self.percentiles_upward}; expected (share, tokens) pairs that rise from (0.5, median)"
            )
        if not 0 < self.lower_stretch < math.inf:
            raise ValueError(f"lower_stretch: got {self.lower_stretch!r}; expected a positive finite number")

    def quantile(self, u: ArrayLike) -> Floats:
        z_K, log_K = _knots(self.percentiles_upward, self.lower_stretch)
        return np.exp(_piecewise(ndtri(np.asarray(u, dtype=float)), z_K, log_K))

    def below(self, x: ArrayLike) -> Floats:
        z_K, log_K = _knots(self.percentiles_upward, self.lower_stretch)
        return ndtr(_piecewise(_log(x), log_K, z_K))


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Mixture(Lengths):
    """Components with weights that sum to 1; their own caps, correlations and growths are not used."""

    components: tuple[Lengths, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        proper = len(self.weights) == len(self.components) > 0 and all(w > 0 for w in self.weights)
        if not proper or not math.isclose(math.fsum(self.weights), 1, abs_tol=1e-9):
            raise ValueError(f"weights: got {self.weights}; expected {len(self.components)} positive numbers that sum to 1")

    def below(self, x: ArrayLike) -> Floats:
        shares = [weight * component.below(x) for weight, component in zip(self.weights, self.components, strict=True)]
        return np.sum(shares, axis=0)

    def quantile(self, u: ArrayLike) -> Floats:
        """By a table of `below` at 2,049 quantiles of each component and just above each, so that atoms stay atoms."""
        u, (share_K, log_K) = np.asarray(u, dtype=float), self._table
        return np.where(u > share_K[-1], np.inf, np.exp(np.interp(u, share_K, log_K)))

    @functools.cached_property
    def _table(self) -> tuple[Floats, Floats]:
        u = ndtr(np.linspace(-8, 8, 2049))
        at = np.concatenate([component.quantile(u) for component in self.components])
        at = at[np.isfinite(at)]
        x = np.unique(np.concatenate([at, np.nextafter(at, np.inf)]))
        share = self.below(x)
        rest = self.below(np.inf)
        share[-1] = 1.0 if rest > 1 - 1e-9 else rest  # what no finite knot reaches of a tail that ends
        return share, np.log(x)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Empirical(Lengths):
    """Lengths that were seen, each as likely as the others: the k-th smallest of n for (k - 1)/n < u <= k/n."""

    values: tuple[int, ...]
    """Lengths in tokens, any order, at most `cap`."""
    num_clipped: int = 0
    """How many of them the cap had shortened when they were read."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not len(self.values):
            raise ValueError("values: got none; expected one length or more")
        for value in (min(self.values), max(self.values)):
            check_length("values", value, self.cap)

    @functools.cached_property
    def _sorted(self) -> Floats:
        return np.sort(np.array(self.values, dtype=float))

    def quantile(self, u: ArrayLike) -> Floats:
        n = len(self._sorted)
        return self._sorted[np.clip(np.ceil(np.asarray(u) * n).astype(np.int64) - 1, 0, n - 1)]

    def below(self, x: ArrayLike) -> Floats:
        return np.searchsorted(self._sorted, np.asarray(x, dtype=float), side="left") / len(self._sorted)


def check_length(what: str, value: float, cap: int) -> None:
    """A length that somebody gave: positive, finite, at most the cap."""
    if not 0 < value < math.inf:
        raise ValueError(f"{what}: got {value!r}; expected a positive finite number of tokens")
    if value > cap:
        raise ValueError(f"{what}: got {value!r}; expected at most the cap of {cap}; raise the cap, or give a shorter length")


# Helpers


def _log(x: ArrayLike) -> Floats:
    with np.errstate(divide="ignore"):  # the log of length 0 is -inf, which no response is below
        return np.log(np.asarray(x, dtype=float))


def _piecewise(x: Floats, x_K: Floats, y_K: Floats) -> Floats:
    """Linear between the knots, along the outer pieces beyond them."""
    low = y_K[0] + (x - x_K[0]) * (y_K[1] - y_K[0]) / (x_K[1] - x_K[0])
    high = y_K[-1] + (x - x_K[-1]) * (y_K[-1] - y_K[-2]) / (x_K[-1] - x_K[-2])
    return np.where(x < x_K[0], low, np.where(x > x_K[-1], high, np.interp(x, x_K, y_K)))


def _knots(percentiles: Pairs, stretch: float) -> tuple[Floats, Floats]:
    """Normal scores and log-lengths of a PercentileTable, both halves."""
    shares, tokens = np.array(percentiles, dtype=float).T
    z, above = ndtri(shares), np.log(tokens / tokens[0])
    return np.concatenate([-z[:0:-1], z]), np.log(tokens[0]) + np.concatenate([-stretch * above[:0:-1], above])
