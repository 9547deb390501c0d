"""Attention over ragged batches: sequences of any lengths, fed as one row without padding.

A transformers model sees input_ids [1, N] and position_ids [1, N]; which token belongs to which sequence travels as the
keyword argument `ragged`, a layout object, through the model's forward to `ragged_attention`. Three layouts exist:
`PackedLayout` (training, log-probabilities, prefill: whole sequences, causal, differentiable), `LiveLayout` (training on
the ends of sequences whose beginnings are constants) and `StepLayout` (one decode step: prefill of new sequences, then
one query per running sequence against a `KVCache`).

Everything but attention then runs over exactly the N tokens. On a GPU attention does, too (kernels.varlen); elsewhere it works
on groups of sequences of similar length, and pads inside a group only: a padded token costs arithmetic, another group costs
kernel calls (`group_by_length`).

Shape letters: N tokens, H query heads, K key/value heads, G = H / K, D head width, R rows of the cache, L padded length.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tppo_ref.method.errors import UserError
from tppo_ref.rollout import kernels

NAME = "tppo_ragged"

# Padded tokens that cost about as much as one more attention call, forward only (decode) or with backward (training).
# Measured on one CPU core with 2 x 16 wide keys: 15-20 us a call, 0.02 us a token. Wider models tolerate less padding
# per call, but then a call's fixed cost is small beside the rest of the step.
DECODE_CALL_TOKENS = 1024
PACKED_CALL_TOKENS = 64


def group_by_length(descending: Sequence[int], call_tokens: int) -> list[tuple[int, int]]:
    """Cuts lengths, longest first, into runs [start, stop): at the place that saves most padding, again on both sides.

    A run is padded to its longest length; it is cut as long as that saves more than `call_tokens` padded tokens.
    """
    length = np.asarray(descending)

    def cut(start: int, stop: int) -> list[tuple[int, int]]:
        saved = (length[start] - length[start:stop]) * np.arange(stop - start, 0, -1)
        best = int(saved.argmax())
        if saved[best] <= call_tokens:
            return [(start, stop)]
        return cut(start, start + best) + cut(start + best, stop)

    return cut(0, len(length)) if len(length) else []


def _token_rows(x_1HND: Tensor) -> Tensor:
    """[1, H, N, D] -> [N, H, D]; a view."""
    return x_1HND[0].transpose(0, 1)


def begins(lengths: Any, device: torch.device | str) -> Tensor:
    """Where each of several sequences, end to end, begins, and where the last one ends: int32, as `kernels.varlen` wants it."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)).to(device)


class PrefixKeys:
    """Keys and values of tokens that are read as constants, by layer: [P, K, D] each, in packed order."""

    def __init__(self) -> None:
        self.by_layer: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def filled(self) -> bool:
        return bool(self.by_layer)


class PackedLayout:
    """Whole sequences end to end; every token attends to its own sequence up to itself.

    lengths   tokens of each sequence, in packed order, longest first (another order is right, but pads more)
    record    takes the keys and values of each layer, without gradient
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu", record: PrefixKeys | None = None):
        self.max_length, self.record = max(lengths, default=0), record
        self.lengths, self.device = lengths, device

    @functools.cached_property
    def begin(self) -> Tensor:
        return begins(self.lengths, self.device)

    @functools.cached_property
    def groups(self) -> list[tuple[int, int, int, int, Tensor | None, Tensor | None]]:
        """(first token, last token, sequences, longest, tokens to gather, cells to keep) of each group of similar length."""
        lengths, device, groups = self.lengths, self.device, []
        begin = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        for a, b in group_by_length(lengths, PACKED_CALL_TOKENS):
            longest = max(lengths[a:b])
            gather, keep = None, None
            if any(length != longest for length in lengths[a:b]):
                column = np.arange(longest)
                real = column < np.asarray(lengths[a:b])[:, None]
                # Padding repeats the sequence's last token: any finite key will do, no real query looks to its right.
                index = np.minimum(begin[a:b, None] + column, begin[a + 1 : b + 1, None] - 1)
                gather = torch.from_numpy(index.reshape(-1)).to(device)
                keep = torch.from_numpy(np.flatnonzero(real)).to(device)
            groups.append((int(begin[a]), int(begin[b]), b - a, longest, gather, keep))
        return groups

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """query [1, H, N, D], key and value [1, K, N, D] -> [N, H, D]."""
        rows = [_token_rows(x) for x in (query, key, value)]
        if self.record is not None:
            self.record.by_layer[layer] = (rows[1].detach(), rows[2].detach())
        if kernels.takes_varlen(query):
            both = self.max_length, self.max_length
            return kernels.varlen(rows[0], rows[1], rows[2], self.begin, self.begin, both, scaling)
        outs = []
        for start, stop, num, longest, gather, keep in self.groups:
            parts = [x[start:stop] if gather is None else x.index_select(0, gather) for x in rows]
            q, k, v = (x.unflatten(0, (num, longest)).transpose(1, 2) for x in parts)
            # Right padding needs no mask: no real query looks to its right.
            out = kernels.sdpa(q, k, v, scaling, causal=True).transpose(1, 2).flatten(0, 1)
            outs.append(out if keep is None else out.index_select(0, keep))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


class LiveLayout:
    """The live ends of sequences whose beginnings were read before: each token attends to its sequence's constant keys, and to the
    live ones up to itself. No gradient flows into the constants; the first live token's key and value are constants, too (it
    stands before the first column that is trained, and is here only because its hidden state predicts that column).

    prefix          keys and values of the constant tokens, end to end in the same order
    constant, live  tokens of each sequence, in packed order, longest sequence first
    """

    def __init__(self, prefix: PrefixKeys, constant: np.ndarray, live: np.ndarray, device: torch.device | str = "cpu"):
        self.prefix, total = prefix, constant + live
        self.max_length = int(total.max(initial=0))
        self.num_constant = int(constant.sum())
        first = np.cumsum(live) - live
        is_first = np.zeros(int(live.sum()), dtype=bool)
        is_first[first] = True
        self.first_mask = torch.from_numpy(is_first).to(device)[:, None, None]
        self.constant, self.live, self.device = constant, live, device

    @functools.cached_property
    def ends(self) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
        """For `kernels.varlen`: where queries and keys begin, the order that puts each sequence's constant keys before its live
        ones, and the longest of both."""
        total, position = self.constant + self.live, np.concatenate([np.arange(n) for n in self.constant + self.live])
        row = np.repeat(np.arange(len(total)), total)
        begin, first = np.cumsum(self.constant) - self.constant, np.cumsum(self.live) - self.live
        live_key = self.num_constant + first[row] + position - self.constant[row]
        order = torch.from_numpy(np.where(position < self.constant[row], begin[row] + position, live_key)).to(self.device)
        longest = (int(self.live.max()), int(total.max()))
        return begins(self.live, self.device), begins(total, self.device), order, longest

    @functools.cached_property
    def groups(self) -> list[list[Tensor]]:
        """(queries, keys, which sees which, cells to keep) of each group of sequences of similar length."""
        constant, live, device, groups = self.constant, self.live, self.device, list[list[Tensor]]()
        total = constant + live
        begin, first = np.cumsum(constant) - constant, np.cumsum(live) - live
        stop = first + live
        for a, b in group_by_length(total.tolist(), PACKED_CALL_TOKENS):
            own, keys = np.arange(live[a:b].max()), np.arange(total[a:b].max())
            # Padding repeats the sequence's last token; no real query looks at a repeated key.
            query = np.minimum(first[a:b, None] + own, stop[a:b, None] - 1)
            live_key = self.num_constant + np.minimum(first[a:b, None] + keys - constant[a:b, None], stop[a:b, None] - 1)
            key = np.where(keys < constant[a:b, None], begin[a:b, None] + keys, live_key)
            sees = keys <= constant[a:b, None, None, None] + own[:, None]  # [n, 1, Lq, Lk]
            keep = np.flatnonzero(own < live[a:b, None])
            groups.append([torch.from_numpy(x).to(device) for x in (query, key, sees, keep)])
        return groups

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """query [1, H, N, D], key and value [1, K, N, D] of the live tokens -> [N, H, D]."""
        rows = []
        for x, kept in zip((key, value), self.prefix.by_layer[layer], strict=True):
            live_NKD = _token_rows(x)
            rows.append(torch.cat([kept[: self.num_constant], torch.where(self.first_mask, live_NKD.detach(), live_NKD)]))
        keys_NKD, values_NKD = rows
        query_NHD, outs = _token_rows(query), []
        if kernels.takes_varlen(query):
            queries_begin, keys_begin, order, longest = self.ends
            in_order = (keys_NKD.index_select(0, order), values_NKD.index_select(0, order))
            return kernels.varlen(query_NHD, *in_order, queries_begin, keys_begin, longest, scaling)
        for places, sources, sees, keep in self.groups:
            q = query_NHD[places].transpose(1, 2)
            k, v = keys_NKD[sources].transpose(1, 2), values_NKD[sources].transpose(1, 2)
            out = kernels.sdpa(q, k, v, scaling, mask=sees)
            outs.append(out.transpose(1, 2).flatten(0, 1).index_select(0, keep))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def through_fp8(x: Tensor) -> Tensor:
    """`x` rounded to float8 e4m3 (4 bits of exponent, 3 of mantissa) and back, without a scale; beyond +-448 to +-448.

    The scale is 1 as in vLLM's cache of a model that brings no scales (`BaseKVCacheMethod`).
    """
    largest = torch.finfo(torch.float8_e4m3fn).max
    return x.clamp(-largest, largest).to(torch.float8_e4m3fn).to(x.dtype)


class KVCache:
    """Keys and values of the running sequences: row r of `num_rows`, column = position, for all layers in one tensor.

    Rows are as wide as the longest sequence so far (doubling, at most `max_tokens`) and kept over windows. Sequences of
    similar length lie in neighbouring rows, so that a group's keys are a slice and short rows read no padding of a long
    one's; `move` restores that when sequences come and go. Columns that a mask hides are read nevertheless, times zero:
    they are zeros at first and then old keys, never uninitialised memory, which may hold NaN.

    fp8   what is read is `through_fp8`: an fp8 cache's numbers, in memory of the model's own type
    """

    def __init__(self, num_layers: int, num_rows: int, max_tokens: int, fp8: bool = False):
        self.num_layers, self.num_rows, self.max_tokens, self.fp8 = num_layers, num_rows, max_tokens, fp8
        self.width = 0
        self.store: Tensor | None = None  # [layers, 2, R, width, K, D], made at the first write, which knows K and D

    def reserve(self, num_tokens: int) -> None:
        """Makes rows at least `num_tokens` wide; keeps the contents."""
        if num_tokens <= self.width:
            return
        assert num_tokens <= self.max_tokens, (num_tokens, self.max_tokens)
        old, old_width = self.store, self.width
        self.width = min(self.max_tokens, max(num_tokens, 2 * old_width, 128))
        if old is not None:
            self._allocate(old)[:, :, :, :old_width] = old

    def _allocate(self, like: Tensor) -> Tensor:
        shape = (self.num_layers, 2, self.num_rows, self.width, *like.shape[-2:])
        self.store = like.new_zeros(shape)
        flat = self.store.flatten(2, 3)
        self.flat = [(flat[i, 0], flat[i, 1]) for i in range(self.num_layers)]
        self.rows = [(self.store[i, 0], self.store[i, 1]) for i in range(self.num_layers)]
        return self.store

    def write(self, layer: int, index_N: Tensor, key_NKD: Tensor, value_NKD: Tensor) -> None:
        """Stores tokens at flat places row * width + column."""
        if self.store is None:
            self._allocate(key_NKD)
        keys, values = self.flat[layer]
        keys.index_copy_(0, index_N, key_NKD)
        values.index_copy_(0, index_N, value_NKD)

    def move(self, source: np.ndarray, target: np.ndarray, num_tokens: int) -> None:
        """Copies the first `num_tokens` columns of rows `source` to rows `target`, all reads before all writes."""
        if len(source) and self.store is not None:
            taken = self.store[:, :, torch.from_numpy(source), :num_tokens]
            self.store[:, :, torch.from_numpy(target), :num_tokens] = taken


class StepLayout:
    """One decode step: P prefill tokens of new sequences (packed), then one query token for each of n cache rows.

    Row i of the step is row i of the cache. The new token of every row is written first, so a row reads `length_n[i]`
    columns, its own token included; a new sequence's last token is its first decode token.

    packed      layout of the P prefill tokens, or None
    index_N     where each of the P + n tokens goes in the cache
    groups      runs [start, stop) of rows, as `group_by_length` cuts them
    """

    def __init__(
        self,
        cache: KVCache,
        packed: PackedLayout | None,
        num_prefill: int,
        index_N: Tensor,
        length_n: np.ndarray,
        groups: Sequence[tuple[int, int]],
        dtype: torch.dtype,
    ):
        self.cache, self.packed, self.num_prefill, self.index = cache, packed, num_prefill, index_N
        self.max_length = int(length_n.max())
        self.groups = []
        device = index_N.device
        length = torch.from_numpy(length_n).to(device)[:, None, None, None]
        for a, b in groups:
            longest, mask = int(length_n[a:b].max()), None
            if longest != int(length_n[a:b].min()):
                hidden = torch.arange(longest, device=device) >= length[a:b]  # [n, 1, 1, L]
                mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
            self.groups.append((a, b, longest, mask))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
        """query [1, H, P + n, D], key and value [1, K, P + n, D] -> [P + n, H, D]."""
        if self.cache.fp8:  # prefill reads the cache, too: what a prefix says is the same in whatever window it was read
            key, value = through_fp8(key), through_fp8(value)
        self.cache.write(layer, self.index, _token_rows(key), _token_rows(value))
        p, outs = self.num_prefill, []
        if self.packed is not None:
            outs.append(self.packed.attend(layer, query[:, :, :p], key[:, :, :p], value[:, :, :p], scaling))
        keys, values = self.cache.rows[layer]
        # Query heads that share a key head become its query rows: no key is repeated.
        q = _token_rows(query)[p:].unflatten(1, (keys.shape[2], -1))  # [n, K, G, D]
        for a, b, longest, mask in self.groups:
            k, v = keys[a:b, :longest].transpose(1, 2), values[a:b, :longest].transpose(1, 2)
            outs.append(kernels.sdpa(q[a:b], k, v, scaling, mask=mask).flatten(1, 2))
        return outs[0] if len(outs) == 1 else torch.cat(outs)


def ragged_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    ragged: PackedLayout | LiveLayout | StepLayout | None = None,
    scaling: float | None = None,
    **options: Any,
):
    """The function that transformers' attention layers call; returns ([1, N, H, D], None).

    UserError where the layer asks for something this attention does not compute (a sliding window shorter than a
    sequence, capped scores, attention sinks, a position bias, cross attention).
    """
    if ragged is None:
        raise UserError(f"{type(module).__name__}: no layout reached the attention layer; this architecture is not supported")
    window = options.get("sliding_window")
    if window is not None and ragged.max_length > window:
        raise UserError(f"sliding_window={window} is shorter than a sequence of {ragged.max_length} tokens; expected none")
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise UserError(f"{type(module).__name__} uses {name}, which the ragged attention does not compute")
    return ragged.attend(module.layer_idx, query, key, value, scaling)[None], None


def use_ragged_attention(model: Any) -> None:
    """Makes a transformers model attend through `ragged_attention`; UserError where that cannot be right."""
    from transformers import AttentionInterface

    kind = getattr(model.config, "model_type", type(model).__name__)
    if not getattr(model, "_supports_attention_backend", False) or getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"model type {kind!r} is not supported: its attention does not go through transformers' AttentionInterface")
    odd = {t for t in getattr(model.config, "layer_types", None) or [] if t not in ("full_attention", "sliding_attention")}
    if odd:
        raise UserError(f"model type {kind!r} is not supported: it has layers of type {sorted(odd)}, expected full_attention")
    AttentionInterface.register(NAME, ragged_attention)
    # No mask function is registered under this name on purpose: transformers then builds no mask at all.
    model.set_attn_implementation(NAME)
