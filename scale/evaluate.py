"""avg@k and pass@k on a fixed set of prompts, with intervals over prompts, stand-alone and inside a run."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special
import scipy.stats

from scale.config import ScaleConfig
from scale.distributed import World
from tppo_ref.loop.parallel import Parallel
from tppo_ref.loop.trainer import Scorer
from tppo_ref.method.records import Prompt, Response
from tppo_ref.rollout.engine import RolloutEngine
from tppo_ref.runs.evaluate import EVALUATION_SEED, sample_answers, summary
from tppo_ref.runs.glossary import Metric
from tppo_ref.tasks import Task

OVER, ENDS = "evaluation prompts", "95 % bootstrap over prompts"
GLOSSARY = {
    "eval/k": Metric("answers per prompt", OVER, "answers", "as configured"),
    "eval/avg_at_k": Metric("share of right answers, mean over prompts", OVER, "share", "rises"),
    "eval/avg_at_k_low": Metric(f"lower end of its interval: {ENDS}", OVER, "share", "near the mean"),
    "eval/avg_at_k_high": Metric(f"upper end of its interval: {ENDS}", OVER, "share", "near the mean"),
    "eval/pass_at_k": Metric("prompts with a right answer among k", OVER, "share", "does not fall"),
    "eval/pass_at_k_low": Metric(f"lower end of its interval: {ENDS}", OVER, "share", "near the mean"),
    "eval/pass_at_k_high": Metric(f"upper end of its interval: {ENDS}", OVER, "share", "near the mean"),
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


def accuracy_metrics(answers: Sequence[Response], samples: int) -> dict[str, float]:
    """avg@k and pass@k (k = samples) with their 95 % intervals over prompts."""
    right: dict[int, list[bool]] = {}
    for answer in answers:
        right.setdefault(answer.prompt.id, []).append((answer.score or 0.0) > 0)
    averages = [float(np.mean(r)) for r in right.values()]
    passes = [pass_at(samples, len(r), sum(r)) for r in right.values()]
    metrics = {"eval/avg_at_k": float(np.mean(averages)), "eval/pass_at_k": float(np.mean(passes)), "eval/k": samples}
    for name, values in (("avg", averages), ("pass", passes)):
        metrics[f"eval/{name}_at_k_low"], metrics[f"eval/{name}_at_k_high"] = interval(values)
    return metrics


def evaluate(
    engine: RolloutEngine, scorer: Scorer, prompts: Sequence[Prompt], config: ScaleConfig, world: World, parallel: Parallel
) -> tuple[dict[str, float], list[Response]]:
    """The eval/ metrics and the answers of all ranks, in the order of the samples. All ranks take part."""
    begin = time.perf_counter()
    samples = config.algo.run.eval_samples
    slots = config.algo.rollout.slots // world.num_engines
    answers, failures = sample_answers(
        engine, scorer, prompts, samples_per_prompt=samples, slots=slots,
        max_response_tokens=config.algo.rollout.max_response_tokens, seed=EVALUATION_SEED,
        rank=world.engine, world=world.num_engines, part=world.part, parts=world.tensor_parallel,
    )  # fmt: skip
    unread: dict[str, Any] = {"logprobs": [], "versions": [], "values": []}  # several times the bytes of what is
    gathered = parallel.gather_objects([a.state_dict() | unread for a in answers])
    everyones = sorted((Response.from_state_dict(a) for part in gathered for a in part), key=lambda a: a.id)
    (failures,) = (int(x) for x in parallel.sum([failures]))
    metrics = summary(everyones, failures) | accuracy_metrics(everyones, samples)
    return metrics | {"eval/time_s": parallel.max([time.perf_counter() - begin])[0]}, everyones


def write_texts(path: Path, answers: Sequence[Response], task: Task) -> None:
    """Prompts and answers as people read them, one JSON object a line."""
    rows: list[dict[str, Any]] = [
        {"prompt": task.describe(a.prompt.token_ids), "answer": a.prompt.answer, "response": task.describe(a.token_ids),
         "end": a.end.name, "score": a.score, "tokens": len(a)}
        for a in answers
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
