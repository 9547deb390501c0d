"""The clock's costs, measured: `Measured` reads one run's folder and answers as `hardware.Costs` does.

Every cost is linear in what the clock knows of the work, with coefficients that are not negative:

    decode step         step_s + row_s active + context_s context
    prefill before it   arrival_s + prefill_token_s tokens             arrival_s: new sequences join, however short they are
    forward, updates    update_s updates + token_s fed tokens          attention is in the cost per token, at the run's lengths

Coefficients minimise the absolute error, so that they describe the middle of the steps and not their outliers: other work on a
machine only ever makes a step slower. What such outliers add to every window is put back as one factor on the engine's costs, the
median over the windows of seconds measured / seconds fitted. The first step of a run is left out: it fills caches.

Steps that make the same number of updates each leave the cost of an update and the cost of its tokens indistinguishable: a second
run with other mini-batches tells them apart. A window with immediate refill decodes with all its slots always, which leaves the
cost of a step and the cost of a row indistinguishable; the run's evaluations, whose batch shrinks to one, tell them apart.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

from tppo_ref.method.errors import UserError
from tppo_ref.runs.checkpoint import complete_checkpoints
from tppo_ref.runs.comparison import read_table
from tppo_ref.runs.sinks import read_metrics

Array = NDArray[np.float64]

LEFT_OUT_STEPS = 1
MIN_STEPS = 8
NEEDED = {"policy.train_on": "window", "value.batch_responses": 0, "run.timeline": True}
"""Settings without which a run's records do not say what a step was fed."""

FILES = ("config.json", "metrics.jsonl", "decode.csv", "eval_decode.csv")
LOADS = {"step": int, "active": int, "context_tokens": int, "prefill_tokens": int, "seconds": float}
NAMES = ("step", "time/rollout_s", "time/forward_s", "time/policy_s", "time/value_s", "time/sync_s", "time/verify_s",
         "time/other_s", "rollout/tokens", "response/rows", "policy/prefix_tokens", "policy/updates", "value/tokens",
         "value/responses", "value/updates")  # fmt: skip


class Passes(NamedTuple):
    """Seconds of model passes over a step's rows: update_s updates + token_s tokens."""

    update_s: float
    token_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """`hardware.Costs` of the machine, model and engine that a run used. Fields in seconds; see the file's docstring.

    forward     values and old log-probabilities, which a run clocks as one phase: `logprob_s` has both, `value_forward_s` is 0.
                They run in the policy's micro-batches, so their cost per update is charged with the policy's updates.
    once_s      once a step: weights to the engine, waiting for scores, bookkeeping (`sync_s`; `wake_s` is 0)
    """

    step_s: float
    row_s: float
    context_s: float
    arrival_s: float
    prefill_token_s: float
    forward: Passes
    policy: Passes
    value: Passes
    once_s: float

    @classmethod
    def from_run(cls, folder: Path | str, *others: Path | str) -> Measured:
        """From a finished run's config.json, metrics.jsonl, decode.csv and eval_decode.csv.

        others    runs of the same model on the same machine with another `mini_batch_tokens`: where every step makes as many
                  updates, the cost of an update cannot be told from that of its tokens. Their training counts, their decoding not

        UserError: a missing or unreadable file, a run that has not ended, fewer than 8 steps beside the first, settings that
        hide what a step was fed (NEEDED), a batch that never changes.
        """
        runs = [(_read_config(path), *_read_steps(path)) for path in map(Path, (folder, *others))]
        steps = runs[0][1]
        forward, policy, value = (np.concatenate(phase, axis=1) for phase in zip(*(_passes(*run) for run in runs), strict=True))
        return cls(
            **_fit_engine(Path(folder), steps), forward=_fit_passes(forward), policy=_fit_passes(policy), value=_fit_passes(value),
            once_s=float(np.median(steps["time/sync_s"] + steps["time/verify_s"] + steps["time/other_s"])),
        )  # fmt: skip

    @property
    def kv_capacity_tokens(self) -> None:
        """Without bound: the engine of a run holds every slot at its full length."""

    def decode_step_s(self, active_n: ArrayLike, context_tokens_n: ArrayLike) -> Array:
        seconds = self.step_s + np.multiply(self.row_s, active_n) + np.multiply(self.context_s, context_tokens_n)
        return np.where(np.asarray(active_n) > 0, seconds, 0.0)

    def prefill_s(self, tokens: ArrayLike, context_tokens: ArrayLike = 0) -> Array:
        """Of all sequences that join before one decode step."""
        return np.where(np.asarray(tokens) > 0, self.arrival_s + np.multiply(self.prefill_token_s, tokens), 0.0)

    def logprob_s(self, tokens: ArrayLike, context_tokens: ArrayLike) -> Array:
        return np.multiply(self.forward.token_s, tokens, dtype=np.float64)

    def prefix_s(self, tokens: ArrayLike, context_tokens: ArrayLike) -> Array:
        return self.logprob_s(tokens, context_tokens)

    def policy_train_s(self, tokens: ArrayLike, context_tokens: ArrayLike, num_updates: ArrayLike = 1) -> Array:
        per_update = self.policy.update_s + self.forward.update_s
        return np.multiply(per_update, num_updates) + np.multiply(self.policy.token_s, tokens)

    def value_forward_s(self, tokens: ArrayLike, context_tokens: ArrayLike) -> Array:
        return np.multiply(0.0, tokens)

    def value_train_s(self, tokens: ArrayLike, context_tokens: ArrayLike, num_updates: ArrayLike = 1) -> Array:
        return np.multiply(self.value.update_s, num_updates) + np.multiply(self.value.token_s, tokens)

    def sync_s(self) -> float:
        return self.once_s

    def wake_s(self) -> float:
        return 0.0


def least_absolute(features_NK: Array, target_N: Array, rounds: int = 300) -> Array:
    """Coefficients [K], none negative, that minimise sum |target - features @ coefficients|.

    Non-negative least squares, each row weighted by 1 / |its last residual|, until nothing changes: least absolute error.
    """
    scale_K = np.maximum(np.abs(features_NK).max(axis=0), 1e-300)
    smallest = 1e-6 * float(np.median(np.abs(target_N)))
    weight_N, found_K = np.ones(len(target_N)), np.zeros(features_NK.shape[1])
    for _ in range(rounds):
        last_K, (found_K, _) = found_K, nnls(features_NK / scale_K * weight_N[:, None], target_N * weight_N)
        if np.abs(found_K - last_K).max() <= 1e-7 * found_K.max():
            break
        weight_N = 1 / np.sqrt(np.maximum(np.abs(target_N - features_NK / scale_K @ found_K), smallest))
    return found_K / scale_K


def _passes(config: Mapping[str, Any], steps: Mapping[str, Array], prompt_tokens: float) -> tuple[Array, Array, Array]:
    """Of forward, policy and value: updates, tokens fed and seconds of each step [3, N]."""
    epochs = value_epochs = config["policy"]["epochs"]
    fed_N = value_fed_N = steps["rollout/tokens"] + steps["policy/prefix_tokens"]  # "joint": on the policy's rows, as often
    if config["value"]["update"] == "independent":  # on ended responses
        value_epochs = config["value"]["epochs"]
        value_fed_N = steps["value/tokens"] / value_epochs + prompt_tokens * steps["value/responses"]
    return (
        np.stack([steps["policy/updates"] / epochs, fed_N, steps["time/forward_s"]]),
        np.stack([steps["policy/updates"], epochs * fed_N, steps["time/policy_s"]]),
        np.stack([steps["value/updates"], value_epochs * value_fed_N, steps["time/value_s"]]),
    )


def _fit_passes(work: Array) -> Passes:
    updates_N, tokens_N, seconds_N = work
    return Passes(*least_absolute(np.stack([updates_N, tokens_N], axis=1), seconds_N).tolist())


def _fit_engine(folder: Path, steps: Mapping[str, Array]) -> dict[str, float]:
    """step_s, row_s, context_s, arrival_s and prefill_token_s from the decode steps of windows and evaluations."""
    window, evaluation = (_table(folder / name) for name in ("decode.csv", "eval_decode.csv"))
    window = window[np.isin(window[:, 0], steps["step"])]
    evaluation = evaluation[evaluation[:, 0] > 0]  # the first one runs before the first step
    if len(lacking := np.setdiff1d(steps["step"], window[:, 0])):
        raise UserError(
            f"{folder / 'decode.csv'}: expected each step's decode steps, found none of step {lacking[0]:.0f}; run again"
        )
    both = np.concatenate([window, evaluation])
    _, active_n, context_n, prefill_n, seconds_n = both.T
    if len(np.unique(active_n)) < 3:
        raise UserError(f"{folder}: expected several numbers of active responses, found {active_n[0]:.0f} always; "
                        f"raise run.eval_prompts: an evaluation's batch shrinks")  # fmt: skip
    features = np.stack([np.ones(len(both)), active_n, context_n, prefill_n > 0, prefill_n], axis=1)
    coefficients = least_absolute(features, seconds_n)
    fitted_n = features[: len(window)] @ coefficients
    fitted_N = np.array([fitted_n[window[:, 0] == step].sum() for step in steps["step"]])
    coefficients = coefficients * np.median(steps["time/rollout_s"] / fitted_N)
    return dict(zip(("step_s", "row_s", "context_s", "arrival_s", "prefill_token_s"), coefficients.tolist(), strict=True))


def _read_config(folder: Path) -> dict[str, Any]:
    """The config of a finished run whose records say enough."""
    if lacking := [name for name in FILES if not (folder / name).is_file()]:
        raise UserError(
            f"{folder}: expected a run's folder, found no {lacking[0]}; make one: python -m tppo_ref train --run.out FOLDER"
        )
    try:
        config = json.loads((folder / "config.json").read_text())
        found = {field: config[field.partition(".")[0]][field.partition(".")[2]] for field in NEEDED}
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / 'config.json'}: expected a run's config, found something else; run again") from None
    for field, expected in NEEDED.items():
        if found[field] != expected:
            raise UserError(f"{field}: calibration needs a run with {expected}, {folder} has {found[field]}; run again with it")
    return config


def _read_steps(folder: Path) -> tuple[dict[str, Array], float]:
    """Metrics of the steps to look at, as arrays by name, and the mean tokens of a prompt."""
    path = folder / "metrics.jsonl"
    records = [r for r in read_metrics(path) if "rollout/tokens" in r]
    last, checkpoints = records[-1]["step"] if records else 0, complete_checkpoints(folder / "checkpoints")
    saved = int(checkpoints[-1].name[5:]) if checkpoints else 0
    if not saved or saved != last:
        raise UserError(f"{folder}: expected a run that ended, found records of {last} steps and a checkpoint of step {saved}; "
                        f"let it end (--run.resume true)")  # fmt: skip
    # Steps that train the critic alone say nothing of the policy's updates.
    used = [r for r in records[LEFT_OUT_STEPS:] if r.get("policy/updates")]
    if len(used) < MIN_STEPS:
        raise UserError(f"{folder}: expected at least {MIN_STEPS} steps after the first that update the policy, found {len(used)}; "
                        f"raise run.steps")  # fmt: skip
    if lacking := [name for name in NAMES for r in (records[0], *used) if not isinstance(r.get(name), int | float)]:
        raise UserError(f"{path}: expected a number for {lacking[0]} in each step, found none in one; run again")
    prompt_tokens = records[0]["policy/prefix_tokens"] / records[0]["response/rows"]  # the first step feeds nothing else again
    return {name: np.array([r[name] for r in used], dtype=np.float64) for name in NAMES}, prompt_tokens


def _table(path: Path) -> Array:
    rows = read_table(path, LOADS)
    table = np.array(rows, dtype=np.float64).reshape(len(rows), len(LOADS))
    if not np.isfinite(table).all():
        raise UserError(f"{path}: expected finite numbers, found {table[~np.isfinite(table)][0]}; run again")
    return table
