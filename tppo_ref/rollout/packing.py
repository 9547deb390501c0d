"""What the models are fed, and how a batch of ragged responses is laid end to end for them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from tppo_ref.method.records import Response
from tppo_ref.rollout.attention import LiveLayout, PackedLayout, PrefixKeys
from tppo_ref.rollout.turns import Observations, num_observed, turns_of


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """What the models are fed: B prompts, each with its response tokens so far (whole, from response column 0).

    live_from   None: every token is differentiated through, and every response column has an output. Else one column per row:
                the prompt and the response columns before it are read without gradient, their keys and values are constants, and
                outputs exist from that column on, 0 before it. An empty batch keeps its empty list, so that all ranks make the
                same passes
    prefix      with live_from: keys and values of those constants but the last one's, whose hidden state predicts column live_from;
                filled by the first pass that reads them, then kept. None: each pass makes its own
    observations  per row what an environment said between the response tokens: read where it stands, no output. None: nothing
    """

    prompt_ids: Sequence[Sequence[int]]
    response_ids: Sequence[Sequence[int]]
    live_from: Sequence[int] | None = None
    prefix: PrefixKeys | None = None
    observations: Sequence[Observations] | None = None

    @classmethod
    def of(
        cls, responses: Sequence[Response], live_from: Sequence[int] | None = None, prefix: PrefixKeys | None = None
    ) -> TokenBatch:
        """Prompts, tokens and observations of some responses."""
        observations = [r.observations for r in responses] if any(r.observations for r in responses) else None
        return cls([r.prompt.token_ids for r in responses], [r.token_ids for r in responses], live_from, prefix, observations)

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def num_tokens_fed(self) -> int:
        """Prompt, response and observation tokens that a forward pass over the batch reads."""
        return sum(self.num_before(row, len(ids)) for row, ids in enumerate(self.response_ids))

    def num_before(self, row: int, column: int) -> int:
        """Tokens that a row holds before its response token `column`; with the number of response tokens, all."""
        observed = num_observed(self.observations[row], column) if self.observations else 0
        return len(self.prompt_ids[row]) + column + observed


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
    lengths = np.array([batch.num_before(b, n) for b, n in enumerate(num_response.tolist())], dtype=np.int64)
    constant = np.zeros_like(lengths) if batch.live_from is None else _num_constant(batch, num_response)
    order = np.argsort(-lengths, kind="stable")
    rows = [np.fromiter(_read(batch, b), np.int64, lengths[b]) for b in order]

    def to(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    live = (lengths - constant)[order]
    ids = np.concatenate([row[constant[b] :] for row, b in zip(rows, order, strict=True)])
    begin = np.empty_like(lengths)  # of each row's live tokens
    begin[order] = np.cumsum(live) - live
    row_N = np.repeat(order, live)
    position_N = np.arange(len(ids)) - begin[row_N] + constant[row_N]
    column_N = position_N - num_prompt[row_N]  # < 0 in the prompt
    if batch.observations:
        column_N = np.concatenate([_columns(batch, b)[constant[b] :] for b in order])  # < 0 in observations too
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


def _read(batch: TokenBatch, row: int) -> Iterable[int]:
    """A row's tokens in the order in which a model reads them."""
    observations = batch.observations[row] if batch.observations else ()
    return itertools.chain(batch.prompt_ids[row], *turns_of(batch.response_ids[row], observations))


def _columns(batch: TokenBatch, row: int) -> np.ndarray:
    """The response column of each of a row's tokens, -1 in the prompt and in observations."""
    parts, own = [np.full(len(batch.prompt_ids[row]), -1)], 0
    for number, turn in enumerate(turns_of(batch.response_ids[row], batch.observations[row] if batch.observations else ())):
        by_policy = number % 2 == 0
        parts.append(np.arange(own, own + len(turn)) if by_policy else np.full(len(turn), -1))
        own += len(turn) if by_policy else 0
    return np.concatenate(parts)


def _num_constant(batch: TokenBatch, num_response: np.ndarray) -> np.ndarray:
    """Tokens of each row that are read without gradient: all before the one whose hidden state predicts column `live_from`."""
    column_B = np.asarray(batch.live_from, dtype=np.int64)
    if ((column_B < 0) | (column_B > num_response)).any():
        raise ValueError(f"live_from: got {column_B.tolist()}; expected a column of each response, 0 to {num_response.tolist()}")
    return np.array([batch.num_before(row, column) - 1 for row, column in enumerate(column_B.tolist())], dtype=np.int64)


def _prefix(rows: list[np.ndarray], kept: PrefixKeys, device: torch.device) -> tuple[Tensor, Tensor, PackedLayout]:
    """The constant tokens end to end. Never empty: sharded models gather their weights in each pass, on every rank or on none."""
    rows = [row for row in rows if len(row)]  # nothing stands before the live end of a one-token prompt's whole response
    rows = rows or [np.zeros(1, dtype=np.int64)]
    ids, positions = np.concatenate(rows), np.concatenate([np.arange(len(row)) for row in rows])
    layout = PackedLayout([len(row) for row in rows], device, record=kept)
    return torch.from_numpy(ids).to(device)[None], torch.from_numpy(positions).to(device)[None], layout
