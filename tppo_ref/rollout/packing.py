"""What the models are fed, and how a batch of ragged responses is laid end to end for them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tppo_ref.method.records import Response
from tppo_ref.rollout.attention import LiveLayout, PackedLayout, PrefixKeys


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """What the models are fed: B prompts, each with its response tokens so far (whole, from response column 0).

    live_from   None: every token is differentiated through, and every response column has an output. Else one column per row:
                the prompt and the response columns before it are read without gradient, their keys and values are constants, and
                outputs exist from that column on, 0 before it. An empty batch keeps its empty list, so that all ranks make the
                same passes
    prefix      with live_from: keys and values of those constants but the last one's, whose hidden state predicts column live_from;
                filled by the first pass that reads them, then kept. None: each pass makes its own
    """

    prompt_ids: Sequence[Sequence[int]]
    response_ids: Sequence[Sequence[int]]
    live_from: Sequence[int] | None = None
    prefix: PrefixKeys | None = None

    @classmethod
    def of(
        cls, responses: Sequence[Response], live_from: Sequence[int] | None = None, prefix: PrefixKeys | None = None
    ) -> TokenBatch:
        """Prompts and tokens of some responses."""
        return cls([r.prompt.token_ids for r in responses], [r.token_ids for r in responses], live_from, prefix)

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_tokens_fed(self) -> int:
        """Prompt and response tokens that a forward pass over the batch reads."""
        return sum(map(len, self.prompt_ids)) + sum(map(len, self.response_ids))


@dataclasses.dataclass
class Packed:
    """A TokenBatch end to end, longest row first. M response tokens with outputs, in packed order; N tokens in all.

    prefix          what is read before, without gradient: (input_ids, position_ids, layout); None: nothing
    predictor_M     place in [0, N) of the token whose hidden state predicts the response token
    target_M        the response token
    column_M        its response column
    cell_M          its cell b * T + t in the padded result
    last_B          place of each row's last token
    on_host         predictor_M and last_B again, where they can be read without waiting for a device
    """

    input_ids: Tensor
    position_ids: Tensor
    layout: PackedLayout | LiveLayout
    prefix: tuple[Tensor, Tensor, PackedLayout] | None
    predictor_M: Tensor
    target_M: Tensor
    column_M: Tensor
    cell_M: Tensor
    last_B: Tensor
    shape: tuple[int, int]
    on_host: tuple[np.ndarray, np.ndarray]

    def unpack(self, x_M: Tensor) -> Tensor:
        """[M] -> [B, T], 0 in padding and where there is no output; differentiable."""
        rows, columns = self.shape
        # A copy at the end, not a view: sharded modules must not return views.
        return x_M.new_zeros(rows * columns).index_copy(0, self.cell_M, x_M).view(rows, columns).clone()

    def unpack_last(self, x_B: Tensor) -> Tensor:
        """A number of each row's last token, in the order of `last_B`, as a tensor of its own."""
        return x_B.clone()


def pack(batch: TokenBatch, device: torch.device) -> Packed:
    """Lays a batch end to end. ValueError on an empty prompt: nothing would predict its first response token."""
    num_prompt = np.array([len(ids) for ids in batch.prompt_ids], dtype=np.int64)
    num_response = np.array([len(ids) for ids in batch.response_ids], dtype=np.int64)
    if (num_prompt == 0).any():
        raise ValueError(f"prompt_ids[{int(num_prompt.argmin())}]: got no tokens; expected at least one")
    lengths = num_prompt + num_response
    constant = np.zeros_like(lengths) if batch.live_from is None else _num_constant(batch.live_from, num_prompt, num_response)
    order = np.argsort(-lengths, kind="stable")
    rows = [np.fromiter(itertools.chain(batch.prompt_ids[b], batch.response_ids[b]), np.int64, lengths[b]) for b in order]

    def to(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    live = (lengths - constant)[order]
    ids = np.concatenate([row[constant[b] :] for row, b in zip(rows, order, strict=True)])
    begin = np.empty_like(lengths)  # of each row's live tokens
    begin[order] = np.cumsum(live) - live
    row_N = np.repeat(order, live)
    position_N = np.arange(len(ids)) - begin[row_N] + constant[row_N]
    column_N = position_N - num_prompt[row_N]  # < 0 in the prompt
    response_M = np.flatnonzero((column_N >= 0) & (position_N > constant[row_N] if batch.live_from is not None else True))
    predictor_M, last_B = response_M - 1, begin + lengths - constant - 1
    num_columns = int(num_response.max(initial=0))
    layout: PackedLayout | LiveLayout
    prefix = None
    if batch.live_from is None:
        layout = PackedLayout(lengths[order].tolist(), device)
    else:
        kept = batch.prefix or PrefixKeys()
        layout = LiveLayout(kept, constant[order], live, device)
        if not kept.filled:
            prefix = _prefix([row[: constant[b]] for row, b in zip(rows, order, strict=True)], kept, device)
    return Packed(
        input_ids=to(ids)[None],
        position_ids=to(position_N)[None],
        layout=layout,
        prefix=prefix,
        predictor_M=to(predictor_M),
        target_M=to(ids[response_M]),
        column_M=to(column_N[response_M]),
        cell_M=to(row_N[response_M] * num_columns + column_N[response_M]),
        last_B=to(last_B),
        shape=(len(batch), num_columns),
        on_host=(predictor_M, last_B),
    )


def _num_constant(live_from: Sequence[int], num_prompt: np.ndarray, num_response: np.ndarray) -> np.ndarray:
    """Tokens of each row that are read without gradient: all before the one whose hidden state predicts column `live_from`."""
    column_B = np.asarray(live_from, dtype=np.int64)
    if ((column_B < 0) | (column_B > num_response)).any():
        raise ValueError(f"live_from: got {list(live_from)}; expected a column of each response, 0 to {num_response.tolist()}")
    return num_prompt + column_B - 1


def _prefix(rows: list[np.ndarray], kept: PrefixKeys, device: torch.device) -> tuple[Tensor, Tensor, PackedLayout]:
    """The constant tokens end to end. Never empty: sharded models gather their weights in each pass, on every rank or on none."""
    rows = [row for row in rows if len(row)]  # nothing stands before the live end of a one-token prompt's whole response
    rows = rows or [np.zeros(1, dtype=np.int64)]
    ids, positions = np.concatenate(rows), np.concatenate([np.arange(len(row)) for row in rows])
    layout = PackedLayout([len(row) for row in rows], device, record=kept)
    return torch.from_numpy(ids).to(device)[None], torch.from_numpy(positions).to(device)[None], layout
