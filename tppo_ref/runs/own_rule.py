"""A cut rule of the user's own, `--advantage.cut_value module:function`: loaded, and checked each time it is asked."""

from __future__ import annotations

from torch import Tensor

from tppo_ref.loop.cut_rules import Cut, CutRule, stand_in
from tppo_ref.method.errors import UserError, refusal
from tppo_ref.runs.config import Config
from tppo_ref.tasks.verifier_worker import load, name_of

FIELD = "advantage.cut_value"
FORM = "module:function"


def load_rule(name: str) -> CutRule:
    """A rule "module:function", importable from the working folder. ValueError for one that cannot be had."""
    try:
        return load(name)[0]
    except ValueError as error:
        raise ValueError(f"rule: got {name!r}; expected {FORM}; {error}") from None


def rule_of(config: Config) -> CutRule | None:
    """The rule that a config names; None for those that `egae` has itself.

    UserError where it cannot be had, and from the rule where it raises, or returns anything else than one finite number per row.
    """
    name = config.advantage.cut_value
    if ":" not in name:
        return None
    try:
        found = load(name)[0]
    except ValueError as error:
        raise UserError(refusal(FIELD, name, f"{FORM}, importable from here", str(error))) from None

    def rule(cut: Cut) -> Tensor:
        try:
            return stand_in(found, cut)
        except Exception as error:  # whatever a user's code raises
            got = f"{name}, which ended in {name_of(error)}"
            raise UserError(refusal(FIELD, got, "a finite number for each cut row")) from error

    return rule
