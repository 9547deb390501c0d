"""The words and the JSON of `python -m sim bias`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from sim.lab.bias import AtDistance
from sim.lab.examination import BiasConfig, Examination, Finding
from sim.lab.gradients import GradientError

COLUMNS = (
    f"{'':6}  {'|bias|':^15}  {'share of cut':^15}  {'P4 bound':^15}  {'gradient error, share of the true gradient':^50}\n"
    f"{'window':>6}  {'near':>7} {'far':>7}  {'near':>7} {'far':>7}  {'near':>7} {'far':>7}  "
    f"{'total':>7} {'cut':>7} {'critic':>7} {'rescaled':>8} {'cosine':>8} {'trained':>8}"
)


def report(examination: Examination) -> str:
    """The table for people. near: the last token before a cut, far: the first of the window, means over the trained tokens."""
    config, rollouts = examination.config, examination.rollouts
    error_N = examination.critic_N - rollouts.solution.value_N
    visits_N = rollouts.solution.visits_N
    rms, length = (
        np.sqrt(visits_N @ error_N**2 / visits_N.sum()),
        rollouts.solution.length_T @ np.arange(rollouts.mdp.max_tokens + 1),
    )
    reach = f"{1 / (1 - config.gamma * config.lam):.4g} tokens" if config.gamma * config.lam < 1 else "without end"
    lines = [
        f"{examination.title}: {examination.story}.",
        f"{rollouts.mdp.num_nodes} nodes, responses of {length:.3g} tokens in the mean, {rollouts.mdp.max_tokens} at most; "
        f"critic's error {rms:.3g} rms over visits; reach of the trace 1/(1 - gamma lambda): {reach}.",
        "near: the last token before a cut; far: the first of the window. Biases and bounds in units of reward.",
    ]
    for name, finding in examination.findings.items():
        lines += ["", name, COLUMNS, *(_line(w, finding.errors[w], finding.distances[w]) for w in finding.errors)]
        lines.append(knee_sentence(name, finding, config))
    return "\n".join(lines)


def _line(window: int, error: GradientError, distances: Sequence[AtDistance]) -> str:
    def pair(name: str) -> str:
        ends = [getattr(d, name) if d.tokens else None for d in (distances[0], distances[-1])] if distances else [None, None]
        return " ".join(f"{'-' if x is None else _number(x):>7}" for x in ends)

    shares = " ".join(f"{_number(x):>7}" for x in (error.relative, error.cut, error.critic))
    return (f"{window:>6}  {pair('mean_bias')}  {pair('cut_bias')}  {pair('bound')}  {shares} {_number(error.rescaled):>8} "
            f"{error.cosine:>8.4f} {100 * error.trained_share:>6.1f} %")  # fmt: skip


def _number(x: float) -> str:
    return "0" if abs(x) < 1e-12 else f"{x:.4f}" if abs(x) >= 0.001 else f"{x:.1e}"


def knee_sentence(name: str, finding: Finding, config: BiasConfig) -> str:
    """Which window keeps the gradient within the tolerance, and by which measure."""
    within = f"within {100 * config.tolerance:g} % of the true one ({config.measure} error)"
    if finding.knee is not None:
        larger = " and every larger one examined keep" if finding.knee < max(finding.errors) else ", the largest examined, keeps"
        tokens = "token" if finding.knee == 1 else "tokens"
        return f"Knee of {name}: a window of {finding.knee} {tokens}{larger} the gradient {within}."
    last = finding.errors[max(finding.errors)]
    blame = f"; the critic alone costs {100 * last.critic:.3g} %" if last.critic > config.tolerance else ""
    return f"Knee of {name}: no window examined keeps the gradient {within}{blame}."


def as_json(examination: Examination) -> dict[str, Any]:
    """All numbers, in JSON's types. Unknown ones are null."""
    return {
        "config": dataclasses.asdict(examination.config),
        "instance": {"name": examination.rollouts.mdp.name, "story": examination.story, "nodes": examination.rollouts.mdp.num_nodes,
                     "mean_return": examination.rollouts.solution.mean_return},
        "estimators": {
            name: {
                "estimator": _estimator(name, finding), "knee": finding.knee,
                "windows": [{"window": w, "gradient": dataclasses.asdict(finding.errors[w]),
                             "by_distance": [dataclasses.asdict(d) for d in finding.distances[w]]} for w in finding.errors],
            } for name, finding in examination.findings.items()
        },
    }  # fmt: skip


def _estimator(name: str, finding: Finding) -> dict[str, Any]:
    """Its fields; a cut rule that is a function goes by the estimator's name."""
    fields = dataclasses.asdict(finding.estimator)
    return fields | {"cut_value": name} if callable(finding.estimator.cut_value) else fields
