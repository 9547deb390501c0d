"""A cut rule of the user's own, `--advantage.cut_value module:function`: loaded, and checked each time it is asked."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

from torch import Tensor

from tppo_ref.loop.cut_rules import Cut, CutRule, stand_in
from tppo_ref.method.errors import UserError, refusal
from tppo_ref.runs.config import Config
from tppo_ref.tasks.verifier_worker import load

FIELD = "advantage.cut_value"
FORM = "module:function"


def load_rule(name: str) -> CutRule:
    """A rule "module:function", importable from the working folder. ValueError of one line for one that cannot be had."""
    if (here := os.getcwd()) not in sys.path:  # where a console script was started it is not there
        sys.path.insert(0, here)
    try:
        return load(name)[0]
    except ValueError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # while it was imported
            raise KeyboardInterrupt from None
        raise ValueError(f"rule: got {name!r}; expected {FORM}; {' '.join(str(error).split())}") from None


def file_of_rule(name: str) -> Path | None:
    """The file of the module that a rule is named with, and not the function's own, which is a decorator's where it has one; None
    for a module without a file. ValueError as `load_rule`."""
    load_rule(name)
    file = importlib.import_module(name.partition(":")[0]).__dict__.get("__file__")
    return Path(file) if file else None


def rule_of(config: Config) -> CutRule | None:
    """The rule that a config names; None for those that `egae` has itself.

    UserError where it cannot be had, and from the rule where it raises, or returns anything else than one finite number per row.
    """
    name = config.advantage.cut_value
    if ":" not in name:
        return None
    try:
        found = load_rule(name)
    except ValueError as error:
        why = str(error).partition(f"{FORM}; ")[2]
        raise UserError(refusal(FIELD, name, f"{FORM}, importable from here", why)) from None

    def rule(cut: Cut) -> Tensor:
        try:
            return stand_in(found, cut)
        except ValueError as error:
            raise UserError(refusal(FIELD, f"{name}, of which {error}", "a finite number for each cut row")) from error

    return rule
