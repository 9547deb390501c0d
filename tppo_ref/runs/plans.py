"""The runs of a comparison as configs, all of them checked before anything is made: one per method and seed.

`compare.per_method` has the last word over what a named method fixes. It cannot change what all runs share: the task, the base and
the value model, what is evaluated. Slots and budget (run.train_seconds or run.steps) may be a method's own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tppo_ref.method.errors import UserError, refusal
from tppo_ref.runs.config import Config, apply_method
from tppo_ref.runs.parsing import dotted_fields, get_field, replace_fields, typed
from tppo_ref.runs.validation import CANCELLED, Cancelled, cancelled_fields, check, check_training, refuse_cancelled

SHARED = (
    "task.", "model.", "run.", "compare.", "value.pretrain_", "rollout.max_response_tokens", "rollout.min_response_tokens",
    "rollout.temperature",
)  # fmt: skip
"""Beginnings of fields that are the same in all runs, or the comparison would be of something else."""

OWN = ("run.train_seconds", "run.steps")
"""Exceptions: each method may have a budget of its own, as it may have its own best number of slots."""

CANCELLED_COMPARE = (
    Cancelled("run.method", lambda c: True, "compare.methods names the methods"),
    Cancelled("run.resume", lambda c: True, "a comparison goes on where it was, and keeps the runs that are complete"),
)
"""Options that `compare` cancels."""


def check_plans(config: Config) -> None:
    """UserError for the first mistake in any run of a comparison, before a base model is made."""
    refuse_cancelled(config, CANCELLED_COMPARE)
    methods = config.compare.methods
    if len(set(methods)) < len(methods) or not methods:
        raise UserError(refusal("compare.methods", str(methods), "different methods, at least one"))
    for method in config.compare.per_method:
        if method not in methods:
            raise UserError(refusal("compare.per_method", repr(method), f"one of compare.methods ({', '.join(methods)})"))
    for method in methods:
        plan_of(config, method)


def plan_of(config: Config, method: str) -> Config:
    """The config of a method's runs, but for seed and folder. UserError for what cannot run, or would not be comparable."""
    given = config.compare.per_method.get(method, {})
    try:
        return _plan(config, method, given)
    except UserError as error:
        if not given or str(error) == _mistake(config, method):
            raise
        raise UserError(f"compare.per_method.{method}.{error}") from None


def _plan(config: Config, method: str, given: Mapping[str, Any]) -> Config:
    """`plan_of` with `given` as the method's own fields, dotted or in sections."""
    own = dotted_fields(Config, given)
    for field, value in own.items():
        if field.startswith(SHARED) and field not in OWN:
            raise UserError(refusal(field, str(value), "it the same for all methods", "give it outside of per_method"))
    plan = typed(replace_fields(apply_method(config, method, strict=False), own))
    # One command line serves several methods: what only this one has no use for, it leaves out. Its own fields may give a use.
    unused = [one.field for one in cancelled_fields(plan, CANCELLED) if one.field not in own and not one.when(config)]
    plan = replace_fields(plan, {field: get_field(Config(), field) for field in unused})
    check(plan)
    check_training(plan, own)
    return plan


def _mistake(config: Config, method: str) -> str | None:
    """What is wrong with a method's runs without fields of its own; None: nothing."""
    try:
        _plan(config, method, {})
    except UserError as error:
        return str(error)
    return None


def plan_runs(config: Config, out: Path) -> list[Config]:
    """One config per seed and method, seeds outermost: what runs side by side differs in the method and not in the hour."""
    runs = []
    for i in range(config.compare.seeds):
        turn = i % len(config.compare.methods)  # in turn, so that no method is always the one that ends alone on the machine
        for method in [*config.compare.methods[turn:], *config.compare.methods[:turn]]:
            seed = config.run.seed + i
            own = {"run.seed": seed, "run.out": str(out / "runs" / f"{method}-seed{seed}"), "run.progress": False}
            runs.append(replace_fields(plan_of(config, method), own))
    return runs


def difference(now: Config, before: object) -> tuple[str, object, object] | None:
    """The first field in which a saved config differs, with both values; `compare` is left out: it says who else ran.

    LookupError, AttributeError or TypeError where `before` is no config.
    """
    for section, fields in dataclasses.asdict(now).items():
        for name, value in fields.items() if section != "compare" else ():
            if (then := before[section].get(name)) != value:  # type: ignore[index]
                return f"{section}.{name}", then, value
    return None
