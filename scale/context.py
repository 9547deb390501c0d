"""Context parallelism: the ranks of a context group hold the same rows, and each of them computes a part of their tokens.

    a packed micro-batch      N tokens end to end, cut into equal pieces, one a rank; the last ones are padded
    everything but attention  on the rank's own n = ceil(N / ranks) tokens
    attention                 all tokens, the rank's share of the heads: an all-to-all before it and one behind it (Ulysses,
                              arXiv 2309.14509); masks, prefixes and kernels are tppo_ref's, which sees whole sequences as ever
    outputs                   a number per response token, put together on every rank of the group

So the loss is the same on each rank of a group, and of its gradient each rank has a part: the parts add up. FSDP's mean over all
ranks, times `Parallel.loss_scale`, is their sum; the denominators count the tokens of each group once, as `Collective` does.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from scale.distributed import World, group_of_ranks
from tppo_ref.method.errors import UserError, refusal
from tppo_ref.method.records import Response, WindowSlice
from tppo_ref.rollout.attention import LiveLayout, PackedLayout
from tppo_ref.rollout.models import PolicyModel, ValueModel
from tppo_ref.rollout.packing import Packed
from tppo_ref.runs.build import TaskScorer
from tppo_ref.runs.config import TaskConfig
from tppo_ref.tasks import Task


@dataclasses.dataclass(frozen=True)
class Context:
    """This rank's context group: its process group, its place in it, and how many ranks it has."""

    group: Any
    part: int
    parts: int


@functools.lru_cache(maxsize=4)
def context_of(world: World) -> Context:
    """This rank's context group, made once. All ranks take part."""
    size = world.context_parallel
    together = [range(first, first + size) for first in range(0, world.world, size)]
    return Context(group_of_ranks(together, world), world.rank % size, size)


def check_heads(field: str, model: str, num_heads: int, num_kv_heads: int, parts: int) -> None:
    """UserError where a model's heads cannot be dealt to so many ranks. Key heads that are fewer are repeated.

    field   that says how many ranks
    model   "policy" or "value model"
    """
    fitting = [n for n in range(1, num_heads + 1) if num_heads % n == 0 and (num_kv_heads % n == 0 or n % num_kv_heads == 0)]
    if parts not in fitting:
        whose = f"to which the {model}'s {num_heads} heads and {num_kv_heads} key-value heads can be dealt"
        raise UserError(refusal(field, str(parts), f"one of {', '.join(map(str, fitting))}, {whose}"))


# ----------------------------------------------------------------------------------------------------------------- the models


def share_rows(model: PolicyModel | ValueModel, context: Context) -> None:
    """From here on each call of `model` is one of all ranks of the group, with the same rows, and gives all of them the same."""
    config = model.hf.config
    kind = "policy" if isinstance(model, PolicyModel) else "value model"
    num_kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    check_heads("sharding.context_parallel", kind, config.num_attention_heads, num_kv_heads, context.parts)
    whole = model.packed
    model.__dict__["packed"] = lambda batch: part_of(whole(batch), context)


@dataclasses.dataclass
class PackedPart(Packed):
    """One rank's piece of a packed batch. `cell_M`, `shape` and `on_host` are the whole batch's, the rest is of the piece.

    own_M, own_B   which response tokens, and which rows' last tokens, this rank computes: their places among all
    """

    context: Context
    own_M: Tensor
    own_B: Tensor

    def unpack(self, x_M: Tensor) -> Tensor:
        return super().unpack(Joined.apply(x_M, self.own_M, len(self.cell_M), self.context))

    def unpack_last(self, x_B: Tensor) -> Tensor:
        return super().unpack_last(Joined.apply(x_B, self.own_B, self.shape[0], self.context))


def part_of(packed: Packed, context: Context) -> PackedPart:
    """This rank's piece of a packed batch."""
    num = _piece(packed.input_ids.shape[1], context)
    own_M, own_B = (torch.from_numpy(np.flatnonzero(places // num == context.part)).to(packed.last_B.device)
                    for places in packed.on_host)  # fmt: skip
    ids, positions, layout = _cut(packed.input_ids, packed.position_ids, packed.layout, context)
    return PackedPart(
        input_ids=ids, position_ids=positions, layout=layout,  # type: ignore[arg-type]  # the model passes a layout on unread
        prefix=None if packed.prefix is None else _cut(*packed.prefix, context),  # type: ignore[arg-type]
        predictor_M=packed.predictor_M[own_M] - context.part * num, target_M=packed.target_M[own_M],
        column_M=packed.column_M[own_M], cell_M=packed.cell_M, last_B=packed.last_B[own_B] - context.part * num,
        shape=packed.shape, on_host=packed.on_host, context=context, own_M=own_M, own_B=own_B,
    )  # fmt: skip


def _piece(num_tokens: int, context: Context) -> int:
    """Tokens of each rank."""
    return -(-num_tokens // context.parts)


def _cut(
    ids_1N: Tensor, positions_1N: Tensor, layout: PackedLayout | LiveLayout, context: Context
) -> tuple[Tensor, Tensor, SharedLayout]:
    """This rank's piece of a row of tokens, and its layout."""
    num_tokens = ids_1N.shape[1]
    num = _piece(num_tokens, context)
    ids_1n, positions_1n = (
        F.pad(x, (0, num * context.parts - num_tokens)).narrow(1, context.part * num, num) for x in (ids_1N, positions_1N)
    )
    return ids_1n, positions_1n, SharedLayout(layout, num_tokens, context)


class SharedLayout:
    """A layout of tppo_ref's over all tokens and this rank's heads, where a model brings this rank's tokens and all heads."""

    def __init__(self, layout: PackedLayout | LiveLayout, num_tokens: int, context: Context):
        self.layout, self.num_tokens, self.context = layout, num_tokens, context
        self.max_length = layout.max_length

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """query [1, H, n, D], key and value [1, K, n, D] of this rank's tokens -> [n, H, D]."""
        q, k, v = (self._whole_rows(x) for x in (query, key, value))
        out_NhD = self.layout.attend(layer, q, k, v, scaling)
        padding = _piece(self.num_tokens, self.context) * self.context.parts - self.num_tokens
        pieces = F.pad(out_NhD, (0, 0, 0, 0, 0, padding)).unflatten(0, (self.context.parts, -1))
        return AllToAll.apply(pieces, self.context).transpose(0, 1).flatten(1, 2)

    def _whole_rows(self, x_1HnD: Tensor) -> Tensor:
        """[1, H, n, D] of this rank's tokens and all heads -> [1, h, N, D] of all tokens and this rank's heads."""
        parts, x_nHD = self.context.parts, x_1HnD[0].transpose(0, 1)
        if x_nHD.shape[1] % parts:  # fewer key heads than ranks: several ranks' query heads share one
            x_nHD = x_nHD.repeat_interleave(parts // x_nHD.shape[1], 1)
        shares = x_nHD.unflatten(1, (parts, -1)).transpose(0, 1)  # [parts, n, h, D]
        return AllToAll.apply(shares, self.context).flatten(0, 1)[: self.num_tokens].transpose(0, 1)[None]


class AllToAll(torch.autograd.Function):
    """x [ranks, ...]: entry r goes to rank r of the group, and the result's entry r came from it. Its own transpose.

    torch.distributed.nn has the same, deprecated; what its warning names instead is a private module.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: Context) -> Tensor:
        ctx.context = context
        x = x.contiguous()
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x, group=context.group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return AllToAll.apply(grad, ctx.context), None


class Joined(torch.autograd.Function):
    """Numbers that each rank of the group has some of -> all of them [num], on every rank.

    own   their places; each place is one rank's

    Backwards each rank takes the gradient of its own numbers. All ranks compute the same loss: added up over them, as the gradient
    of an all-reduce is, each number would count as often as there are ranks.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Tensor, num: int, context: Context) -> Tensor:
        ctx.save_for_backward(own)
        whole = x.new_zeros(num).index_copy_(0, own, x)
        dist.all_reduce(whole, group=context.group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (own,) = ctx.saved_tensors
        return grad.index_select(0, own), None, None, None


# ------------------------------------------------------------------------------------------------- the same rows on every rank


def refuse_other_rows(slices: Sequence[WindowSlice], context: Context) -> None:
    """RuntimeError where the ranks of the group do not hold the same rows: what they compute of them would fit together nowhere."""
    digest = hashlib.blake2b(digest_size=8)
    for s in slices:
        digest.update(repr((s.response.id, s.begin, s.stop, s.response.token_ids, s.response.observations)).encode())
    everyones: list[Any] = [None] * context.parts
    dist.all_gather_object(everyones, (len(slices), digest.hexdigest()), group=context.group)
    if len(set(everyones)) > 1:
        raise RuntimeError(f"the ranks of a context group decoded different responses: (number, digest) {everyones}")


class SharedScorer(TaskScorer):
    """The task's verifier, which the group's first rank asks for all: on a busy host it need not say the same twice."""

    def __init__(self, task: Task, config: TaskConfig, context: Context):
        super().__init__(task, config)
        self.context = context

    def submit(self, response: Response) -> None:
        if self.context.part == 0:
            super().submit(response)

    def collect(self) -> dict[int, tuple[float, str]]:
        scores: list[Any] = [super().collect() if self.context.part == 0 else None]
        dist.broadcast_object_list(scores, group_src=0, group=self.context.group)
        return scores[0]
