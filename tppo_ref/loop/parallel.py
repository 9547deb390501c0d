"""The few collective operations that the training loop needs. In one process they do nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import torch

Thing = TypeVar("Thing")


def per(total: float, n: float) -> float:
    """total / n, and NaN where there was nothing to count: a mean of nothing is not 0. A run's metrics.jsonl has null for it."""
    return total / n if n else math.nan


def mean_and_variance(x_N: torch.Tensor, parallel: Parallel) -> tuple[int, float, float]:
    """Number, mean and population variance of all ranks' elements, in float64; NaN where there are none.

    Two passes, the second about the mean: E[x^2] - E[x]^2 loses every digit where the mean is large beside the spread.
    """
    x_N = x_N.double()
    n, total = parallel.sum([x_N.numel(), float(x_N.sum())])
    mean = per(total, n)
    (squares,) = parallel.sum([float((x_N - mean).square().sum())])
    return int(n), mean, per(squares, n)


def clip_gradients(
    module: torch.nn.Module, max_norm: float, whole: Callable[[torch.Tensor], torch.Tensor] = lambda norm: norm
) -> float:
    """`Parallel.grad_norm`. whole: brings the norm of shards to that of all of them, the same on every rank."""
    parameters = [p for p in module.parameters() if p.grad is not None]
    norm = whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if bool(torch.isfinite(norm)):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return float(norm)


class Parallel(Protocol):
    """What the Trainer asks of the other ranks. Ranks that hold the same rows count as one, with one `rank`.

    loss_scale   undoes the averaging of gradients over ranks (under FSDP, how many there are)
    leads        of those that hold the same rows, this one writes what they have to say
    first        this one talks to people, and writes what is every rank's
    """

    rank: int
    world: int
    loss_scale: float
    leads: bool

    @property
    def first(self) -> bool: ...

    def sum(self, numbers: Iterable[float]) -> list[float]:
        """Element-wise sum over all ranks, in float64."""

    def max(self, numbers: Iterable[float]) -> list[float]:
        """Element-wise maximum over all ranks, in float64."""

    def gather_objects(self, thing: Any) -> list[Any]:
        """`thing` of every rank, in rank order, on every rank."""

    def rebalance(self, things: list[Thing], tokens: Sequence[int], movable: Sequence[bool]) -> list[Thing]:
        """This rank's things once some have moved to ranks with fewer tokens: its own that stayed, in order, then what came.

        tokens    work that each thing of this rank is; movable    whether it may leave
        """

    def grad_norm(self, module: torch.nn.Module, max_norm: float) -> float:
        """Clip the gradient of `module` to `max_norm` in place; the norm before clipping, over all ranks' shards.

        Where the norm is not finite, the gradients stay as they are: somebody will want to know which one it was.
        """


class SingleProcess:
    """`Parallel` for one process."""

    rank = 0
    world = 1
    loss_scale = 1.0
    leads = True

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, numbers: Iterable[float]) -> list[float]:
        return [float(number) for number in numbers]

    def max(self, numbers: Iterable[float]) -> list[float]:
        return [float(number) for number in numbers]

    def gather_objects(self, thing: Any) -> list[Any]:
        return [thing]

    def rebalance(self, things: list[Thing], tokens: Sequence[int], movable: Sequence[bool]) -> list[Thing]:
        return things

    def grad_norm(self, module: torch.nn.Module, max_norm: float) -> float:
        return clip_gradients(module, max_norm)
