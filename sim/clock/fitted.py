"""Distributions of response lengths from the few numbers that are published of them: a mean, a percentile, a curve of means."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from scipy.optimize import brentq
from scipy.special import ndtri

from sim.clock.distributions import AnyLengths, Growth, LogNormal, Pairs, PercentileTable


def growing_to(lengths: AnyLengths, means: Mapping[float, float]) -> AnyLengths:
    """The same shape, in log-length, that grows so that the mean after the cap is `means[step]` at these steps."""
    factors = []
    for step, mean in sorted(means.items()):
        if not 1 <= mean < lengths.cap:
            raise ValueError(f"mean at step {step:g}: got {mean:g}; expected at least 1 and less than the cap, {lengths.cap}")

        def excess(log_factor: float, mean: float = mean) -> float:
            growth = Growth(factors=((0, math.exp(log_factor)),))
            return dataclasses.replace(lengths, growth=growth).mean_tokens() - mean

        factors.append((float(step), math.exp(brentq(excess, math.log(1e-4), math.log(1e4), xtol=1e-6))))
    return dataclasses.replace(lengths, growth=Growth(factors=tuple(factors)))


def log_normal(
    *, cap: int, mean: float | None = None, median: float | None = None, p99: float | None = None, sigma: float | None = None,
    correlation: float = 0.0,
) -> LogNormal:  # fmt: skip
    """A log-normal from one of mean and median, and one of p99 and sigma; all of them before the cap.

    mean = median exp(sigma^2 / 2) and p99 = median exp(2.326 sigma). A p99 above 14.97 times the mean has no solution.
    """
    if (mean is None) == (median is None) or (p99 is None) == (sigma is None):
        raise ValueError("a log-normal takes one of mean and median, and one of p99 and sigma")
    centre, z = (median if mean is None else mean), float(ndtri(0.99))
    assert centre is not None  # by the check above
    for key, value in (("mean" if median is None else "median", centre), ("p99", p99)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{key}: got {value!r}; expected a positive finite number of tokens")
    if sigma is None:
        assert p99 is not None
        low, high = (1.0, math.exp(z * z / 2)) if median is None else (1.0, math.inf)
        if not low <= p99 / centre <= high:
            raise ValueError(f"p99: got {p99:g}, {p99 / centre:.4g} times the centre; expected {low:g} to {high:.4g} times")
        ratio = math.log(p99 / centre)
        sigma = ratio / z if mean is None else z - math.sqrt(z * z - 2 * ratio)
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma: got {sigma!r}; expected 0 or more, finite")
    median = centre if mean is None else centre * math.exp(-sigma * sigma / 2)
    return LogNormal(median=median, sigma=sigma, cap=cap, correlation=correlation, name="lognormal", source="[O]")


def stretch_for_mean(percentiles_upward: Pairs, *, cap: int, mean: float) -> float:
    """The `lower_stretch` with which a PercentileTable has this mean after the cap."""

    def excess(stretch: float) -> float:
        table = PercentileTable(percentiles_upward=percentiles_upward, lower_stretch=stretch, cap=cap)
        return table.mean_tokens() - mean

    low, high = 0.05, 20.0
    if not excess(low) >= 0 >= excess(high):
        raise ValueError(f"mean: got {mean:g}; expected one within reach of {percentiles_upward} under a cap of {cap}")
    return float(brentq(excess, low, high, xtol=1e-6))
