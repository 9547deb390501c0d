"""What goes wrong, as exceptions: a user's mistake, and a number that is not finite."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class UserError(Exception):
    """A mistake of the user's: one line with the thing, its value, what was expected and the remedy; exit code 2."""


class NonFiniteError(UserError):
    """A loss, gradient or log-probability that is not finite: the run stops before the update that it would have spoilt."""


def nearest(name: str, names: Sequence[str]) -> str:
    """'; did you mean X?' for the closest known name, or nothing when none is close."""
    tail = name.rpartition(".")[2]
    misplaced = [n for n in names if n.rpartition(".")[2] == tail]  # a right field under the wrong section
    close = misplaced or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
