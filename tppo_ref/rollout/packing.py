"""What the models are fed, and how a batch of ragged responses is laid end to end for them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tppo_ref.method.records import Response
from tppo_ref.rollout.attention import PackedLayout


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """What the models are fed: B prompts, each with its response tokens so far (whole, from response column 0).

    `detach_before`, where given, holds one column per row: attention reads the prompt and the response columns before
    it as constants, so that no gradient flows through them. Biased, cheap to reason about, off by default.
    """

    prompt_ids: Sequence[Sequence[int]]
    response_ids: Sequence[Sequence[int]]
    detach_before: Sequence[int] | None = None

    @classmethod
    def of(cls, responses: Sequence[Response], detach_before: Sequence[int] | None = None) -> TokenBatch:
        return cls([r.prompt.token_ids for r in responses], [r.token_ids for r in responses], detach_before)

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_tokens_fed(self) -> int:
        """Prompt and response tokens that a forward pass over the batch reads."""
        return sum(map(len, self.prompt_ids)) + sum(map(len, self.response_ids))


@dataclasses.dataclass
class Packed:
    """A TokenBatch end to end, longest row first. M response tokens in packed order; N tokens in all.

    predictor_M     place in [0, N) of the token whose hidden state predicts the response token
    target_M        the response token
    column_M        its response column
    cell_M          its cell b * T + t in the padded result
    last_B          place of each row's last token
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: PackedLayout
    predictor_M: Tensor
    target_M: Tensor
    column_M: Tensor
    cell_M: Tensor
    last_B: Tensor
    shape: tuple[int, int]

    def unpack(self, x_M: Tensor) -> Tensor:
        """[M] -> [B, T], 0 in padding; differentiable."""
        rows, columns = self.shape
        # A copy at the end, not a view: sharded modules must not return views.
        return x_M.new_zeros(rows * columns).index_copy(0, self.cell_M, x_M).view(rows, columns).clone()


def pack(batch: TokenBatch, device: torch.device) -> Packed:
    """Lays a batch end to end. ValueError on an empty prompt: nothing would predict its first response token."""
    num_prompt = np.array([len(ids) for ids in batch.prompt_ids], dtype=np.int64)
    num_response = np.array([len(ids) for ids in batch.response_ids], dtype=np.int64)
    if (num_prompt == 0).any():
        raise ValueError(f"prompt_ids[{int(num_prompt.argmin())}] is empty; expected at least one token")
    lengths = num_prompt + num_response
    order = np.argsort(-lengths, kind="stable")
    rows = itertools.chain.from_iterable((*batch.prompt_ids[b], *batch.response_ids[b]) for b in order)
    ids = np.fromiter(rows, dtype=np.int64, count=int(lengths.sum()))
    begin = np.empty_like(lengths)
    begin[order] = np.cumsum(lengths[order]) - lengths[order]
    row_N = np.repeat(order, lengths[order])
    position_N = np.arange(len(ids)) - begin[row_N]
    column_N = position_N - num_prompt[row_N]  # < 0 in the prompt
    response_M = np.flatnonzero(column_N >= 0)
    num_columns = int(num_response.max(initial=0))
    cell_M = row_N[response_M] * num_columns + column_N[response_M]
    constant = None
    if batch.detach_before is not None:
        constant = torch.from_numpy(column_N < np.asarray(batch.detach_before, dtype=np.int64)[row_N])

    def to(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return Packed(
        input_ids=to(ids)[None],
        position_ids=to(position_N)[None],
        layout=PackedLayout(lengths[order].tolist(), device, constant),
        predictor_M=to(response_M - 1),
        target_M=to(ids[response_M]),
        column_M=to(column_N[response_M]),
        cell_M=to(cell_M),
        last_B=to(begin + lengths - 1),
        shape=(len(batch), num_columns),
    )
