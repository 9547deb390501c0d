"""Loops that numba compiles where it is installed (`pip install 'tppo-ref[speed]'`), and that run as they are where it is not.

A compiled function keeps its source as `.py_func`; both give the same numbers, and a property test holds them to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

try:
    from numba import njit
except ImportError:
    njit = None

AVAILABLE = njit is not None


def compiled(function: Function) -> Function:
    """`function`, compiled at its first call and kept on disk for the next process; as it is without numba."""
    return function if njit is None else njit(cache=True)(function)
