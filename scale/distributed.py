"""Ranks: the process group, who shares an engine with whom, and the collective operations that the Trainer needs."""

from __future__ import annotations

import bisect
import dataclasses
import datetime
import functools
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from scale.network import check_interfaces, first_word, join, ranks_here
from tppo_ref.loop.parallel import Thing, clip_gradients
from tppo_ref.method.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class World:
    """Where this process stands.

    rank, world       among all ranks
    local_rank        on this machine; the accelerator's number
    tensor_parallel   ranks that share one engine: consecutive ones
    context_parallel  ranks that hold the same rows: consecutive ones of one engine
    device            "cpu" or "cuda:N"
    timeout_s         longest wait for another rank
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    tensor_parallel: int = 1
    context_parallel: int = 1
    device: str = "cpu"
    timeout_s: float = 600.0

    @property
    def engine(self) -> int:
        """Number of this rank's engine, its data-parallel index for sampling."""
        return self.rank // self.tensor_parallel

    @property
    def num_engines(self) -> int:
        return self.world // self.tensor_parallel

    @property
    def part(self) -> int:
        """Which of its engine's `parts` this rank answers for."""
        return self.rank % self.tensor_parallel // self.context_parallel

    @property
    def parts(self) -> int:
        return self.tensor_parallel // self.context_parallel

    @property
    def data_rank(self) -> int:
        """Number of the rows that this rank holds."""
        return self.rank // self.context_parallel

    @property
    def data_world(self) -> int:
        return self.world // self.context_parallel

    @property
    def leads(self) -> bool:
        """Whether this rank is the first of those that hold its rows."""
        return self.rank % self.context_parallel == 0

    @property
    def flat(self) -> World:
        """The same ranks, for what has nothing to do with rows."""
        return dataclasses.replace(self, context_parallel=1)


def start(*, tensor_parallel: int = 1, context_parallel: int = 1, device: str = "auto", timeout_s: float = 600.0) -> World:
    """Join the process group that torchrun describes, or make one of a single rank.

    Host numbers travel over gloo, tensors on GPUs over nccl. Every wait is bounded by `timeout_s` and then fails by name.
    Must run before vLLM is imported, which overwrites LOCAL_WORLD_SIZE. UserError where the ranks cannot be cut into groups, or do
    not reach each other (network.py).
    """
    if "RANK" not in os.environ:
        os.environ.update(ranks_here(1)[0])
    rank, world, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if tensor_parallel < 1 or world % tensor_parallel:
        raise UserError(f"engine.tensor_parallel: got {tensor_parallel}; expected a divisor of the {world} ranks; give one")
    cuda = torch.cuda.is_available() if device == "auto" else device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        raise UserError(f"algo.model.device: got {device}; expected one that is there; give cpu, or auto")
    if cuda:
        torch.cuda.set_device(local_rank)
    here = f"cuda:{local_rank}" if cuda else "cpu"
    if not dist.is_initialized():
        check_interfaces()
        backend, limit = "cpu:gloo,cuda:nccl" if cuda else "gloo", datetime.timedelta(seconds=timeout_s)
        join(lambda: dist.init_process_group(backend, timeout=limit), lambda: first_word(sorted({"cpu", here})))
    return World(rank=rank, world=world, local_rank=local_rank, tensor_parallel=tensor_parallel, context_parallel=context_parallel,
                 device=here, timeout_s=timeout_s)  # fmt: skip


def group_of_ranks(together: Sequence[Iterable[int]], world: World) -> Any:
    """The process group of this rank, one of those `together`. All ranks take part."""
    limit = datetime.timedelta(seconds=world.timeout_s)
    return dist.new_subgroups_by_enumeration([list(ranks) for ranks in together], timeout=limit)[0]


@functools.lru_cache(maxsize=4)
def peers_of(world: World) -> Any:
    """The ranks that have other rows than this one, each row once: those at its place among the ranks with the same rows."""
    size = world.context_parallel
    return group_of_ranks([range(place, world.world, size) for place in range(size)], world) if size > 1 else None


class Collective:
    """`Parallel` over torch.distributed. FSDP averages gradients over all ranks: loss_scale, how many there are, undoes that.

    Where several ranks hold the same rows (context.py), each of them does what one would: sums and lists are over its peers, so
    that each row counts once. A maximum is over all ranks, as it decides what all of them do next.
    """

    def __init__(self, world: World):
        self.rank, self.world, self.loss_scale = world.data_rank, world.data_world, float(world.world)
        self.leads, self._peers = world.leads, peers_of(world)

    @property
    def first(self) -> bool:
        return self.leads and self.rank == 0

    def sum(self, numbers: Iterable[float]) -> list[float]:
        return self._reduce(numbers, dist.ReduceOp.SUM, self._peers)

    def max(self, numbers: Iterable[float]) -> list[float]:
        return self._reduce(numbers, dist.ReduceOp.MAX, None)

    def gather_objects(self, thing: Any) -> list[Any]:
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, thing, group=self._peers)
        return gathered

    def rebalance(self, things: list[Thing], tokens: Sequence[int], movable: Sequence[bool]) -> list[Thing]:
        transfers = moves(self.gather_objects(list(zip(tokens, movable, strict=True))))
        leaving, arrived = set(), list[Thing]()
        for source, target in sorted(
            {(m.source, m.target) for m in transfers}
        ):  # one order for all ranks: nobody waits in a circle
            going = [m.thing for m in transfers if (m.source, m.target) == (source, target)]
            if self.rank == source:
                dist.send_object_list([[things[i] for i in going]], group_dst=target, group=self._peers)
                leaving.update(going)
            elif self.rank == target:
                box: list[Any] = [None]
                dist.recv_object_list(box, group_src=source, group=self._peers)
                arrived += box[0]
        return [thing for i, thing in enumerate(things) if i not in leaving] + arrived

    def grad_norm(self, module: torch.nn.Module, max_norm: float) -> float:
        return clip_gradients(module, max_norm, lambda norm: norm.full_tensor() if isinstance(norm, DTensor) else norm)

    @staticmethod
    def _reduce(numbers: Iterable[float], how: Any, group: Any) -> list[float]:
        tensor = torch.tensor([float(number) for number in numbers], dtype=torch.float64)
        dist.all_reduce(tensor, how, group=group)
        return tensor.tolist()


class Move(NamedTuple):
    """Number `thing` of rank `source` goes to rank `target`."""

    source: int
    target: int
    thing: int


def moves(ranks: Sequence[Sequence[tuple[int, bool]]], tolerance: float = 0.005) -> list[Move]:
    """What to move so that all ranks have about as many tokens, from (tokens, may it move) of each thing of each rank.

    Again and again the fullest rank gives the emptiest one its largest thing that is at most half of their difference, until it is
    within `tolerance` of the mean, or has no such thing. The largest load never grows; a thing moves once at most.
    """
    load = [sum(tokens for tokens, _ in things) for things in ranks]
    stock = [sorted((tokens, i) for i, (tokens, movable) in enumerate(things) if movable and tokens) for things in ranks]
    mean, found = sum(load) / len(load), list[Move]()
    while load and max(load) > mean * (1 + tolerance):
        source, target = load.index(max(load)), load.index(min(load))
        place = bisect.bisect_right(stock[source], (load[source] - load[target]) // 2, key=lambda thing: thing[0]) - 1
        if place < 0:
            break
        tokens, index = stock[source].pop(place)
        load[source] -= tokens
        load[target] += tokens
        found.append(Move(source, target, index))
    return found
