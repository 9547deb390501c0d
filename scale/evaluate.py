"""avg@k and pass@k on a fixed set of prompts, with intervals over prompts: what a cluster's evaluation adds to tppo_ref's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy.special
import scipy.stats

from tppo_ref.method.records import Response
from tppo_ref.runs.glossary import Metric

PROMPTS, ENDS = "evaluation prompts", "95 % bootstrap over prompts"
GLOSSARY = {
    "eval/k": Metric("answers per prompt (run.eval_samples)", PROMPTS, "answers", "as configured"),
    "eval/avg_at_k": Metric("share of right answers, mean over prompts", PROMPTS, "share", "rises"),
    "eval/avg_at_k_low": Metric(f"lower end of its interval: {ENDS}; null for one prompt", PROMPTS, "share", "near the mean"),
    "eval/avg_at_k_high": Metric("upper end of that interval", PROMPTS, "share", "near the mean"),
    "eval/pass_at_k": Metric("prompts with a right answer among their k / prompts", PROMPTS, "share", "does not fall"),
    "eval/pass_at_k_low": Metric(f"lower end of its interval: {ENDS}; null for one prompt", PROMPTS, "share", "near the mean"),
    "eval/pass_at_k_high": Metric("upper end of that interval", PROMPTS, "share", "near the mean"),
}
"""What evaluation logs beside tppo_ref's own metrics."""


def pass_at(k: int, num_samples: int, num_right: int) -> float:
    """Chance that k of `num_samples` answers, drawn without replacement, hold a right one (arXiv 2107.03374, eq. 1, unbiased).

    1 - C(n - c, k) / C(n, k).
    """
    if not 1 <= k <= num_samples or not 0 <= num_right <= num_samples:
        raise ValueError(f"expected 1 <= k <= n and 0 <= c <= n, got k={k}, n={num_samples}, c={num_right}")
    return 1 - float(scipy.special.binom(num_samples - num_right, k) / scipy.special.binom(num_samples, k))


def interval(per_prompt: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval (percentile) of the mean over prompts; one prompt has none (NaN)."""
    if len(per_prompt) < 2:
        return math.nan, math.nan
    if len(set(per_prompt)) == 1:
        return float(per_prompt[0]), float(per_prompt[0])
    found = scipy.stats.bootstrap((np.asarray(per_prompt),), np.mean, n_resamples=2000, method="percentile",
                                  rng=np.random.default_rng(0)).confidence_interval  # fmt: skip
    return float(found.low), float(found.high)


def accuracy_metrics(answers: Sequence[Response]) -> dict[str, float]:
    """avg@k and pass@k (k = answers per prompt) with their 95 % intervals over prompts."""
    right: dict[int, list[bool]] = {}
    for answer in answers:
        right.setdefault(answer.prompt.id, []).append((answer.score or 0.0) > 0)
    (samples,) = {len(r) for r in right.values()}
    averages = [float(np.mean(r)) for r in right.values()]
    passes = [pass_at(samples, samples, sum(r)) for r in right.values()]
    metrics = {"eval/avg_at_k": float(np.mean(averages)), "eval/pass_at_k": float(np.mean(passes)), "eval/k": samples}
    for name, values in (("avg", averages), ("pass", passes)):
        metrics[f"eval/{name}_at_k_low"], metrics[f"eval/{name}_at_k_high"] = interval(values)
    return metrics
