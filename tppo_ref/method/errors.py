"""What goes wrong, as exceptions, and the one dialect in which it is said: `name: got VALUE; expected ...; remedy`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the user's: one line with the thing, its value, what was expected and the remedy; exit code 2."""


class NonFiniteError(UserError):
    """A loss, gradient or log-probability that is not finite: the run stops before the update that it would have spoilt."""


def refusal(name: str, got: str, expected: str, remedy: str = "") -> str:
    """The text of a refusal: `name: got VALUE; expected ...; remedy`."""
    return f"{name}: got {got}; expected {expected}" + (f"; {remedy}" if remedy else "")


def nearest(name: str, names: Iterable[str]) -> str:
    """'; did you mean X?' for the closest known name, or nothing when none is close."""
    names, last = list(names), name.rpartition(".")[2]
    misplaced = [known for known in names if known.rpartition(".")[2] == last]  # a right field under the wrong section
    close = misplaced or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
