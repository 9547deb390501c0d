"""One backward recursion: its definition, a loop of five lines, and the fast scan that computes it.

    y_t = x_t + a y_{t+1}      inside each row's run of tokens, where y = 0 after the last one; a in [0, 1]

With x = delta and a = gamma lambda this is GAE, with x = r and a = gamma the Monte Carlo return (advantages.py). The scan is
blocked: in a chunk of C tokens y is a product with a triangular matrix of powers of a; the heads (first tokens) of chunks obey the
same recursion with a^C. A test holds both equal. Suffixes: B responses, T tokens, R rows at a time, K chunks of C tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tppo_ref.method.checks import Runs

CACHED = 400_000  # elements of x that a CPU core works on at a time: with their neighbours they should stay in its cache

Terms = Callable[[slice, slice, Tensor], object]
"""Writes x of some rows and columns into a tensor [R, T]: what is summed need not exist as a whole."""


def discounted_sum_by_loop(x_BT: Tensor, runs: Runs, rate_B1: Tensor) -> Tensor:
    """The definition: y_t = x_t + a y_{t+1}, from the last token of each row's run to its first; 0 outside of the run."""
    y_BT, y_B = torch.zeros_like(x_BT), x_BT.new_zeros(len(x_BT))
    for t in reversed(range(x_BT.shape[1])):
        y_B = torch.where(runs.mask_BT[:, t], x_BT[:, t] + rate_B1[:, 0] * y_B, 0.0)
        y_BT[:, t] = y_B
    return y_BT


def discounted_sum(x: Tensor | Terms, runs: Runs, rate_B1: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """The same by a blocked scan: O(log T) products instead of T steps, and a few rows at a time, which stay in the cache.

    x        [B, T] float32 or float64, or `Terms`, with its `dtype`. Not read outside of the runs.
    runs     one run of tokens per row, which may be empty and may start anywhere (`checks.runs_of`)
    rate_B1  a in float64: [B, 1], or [1, 1] for all rows; a rate that all rows share costs less
    Returns [B, T] in the dtype of x, exactly 0 outside of the runs. An x that is not finite makes y so up to the run's first token,
    even with a = 0. Neither autocast nor TF32 acts here. Arguments are not checked.
    """
    if isinstance(x, Tensor):
        whole_BT, dtype = x, x.dtype
        x = lambda rows, columns, out_RT: out_RT.copy_(whole_BT[rows, columns])  # noqa: E731
    assert dtype is not None, "dtype: got None; expected the dtype of the terms"
    (B, T), device = runs.mask_BT.shape, runs.mask_BT.device
    y_BT, columns, spans = _empty(B, T, dtype, device), *runs.columns_and_spans()
    y_BT[:, : columns.start], y_BT[:, columns.stop :] = 0, 0
    if columns.start == columns.stop:
        return y_BT
    width, on_cpu = columns.stop - columns.start, device.type == "cpu"
    R = min(B, max(1, CACHED * torch.get_num_threads() // width)) if on_cpu else B
    C = 16 if on_cpu else 64  # measured on a CPU (docs/log.md); a guess on GPUs
    levels = _levels(rate_B1 if (rate_B1 != rate_B1[0]).any() else rate_B1[:1], width, C, dtype)
    x_RKC, y_RKC = torch.empty(2, R, -(-width // C), C, dtype=dtype, device=device)
    x_RKC.flatten(1)[:, width:] = 0
    with _full_precision(device.type):
        for top in range(0, B, R):
            rows = slice(top, min(top + R, B))
            x_RKC, y_RKC = x_RKC[: rows.stop - top], y_RKC[: rows.stop - top]
            x_RT = x_RKC.flatten(1)[:, :width]
            x(rows, columns, x_RT)
            _zero_outside(x_RT, runs.mask_BT[rows, columns], spans[rows])
            _scan_chunks(x_RKC, [level.of(rows) for level in levels], out_RKC=y_RKC)
            y_BT[rows, columns] = y_RKC.flatten(1)[:, :width]
            _zero_outside(y_BT[rows, columns], runs.mask_BT[rows, columns], spans[rows])
    return y_BT


class Level(NamedTuple):
    """One level of the scan: y of a chunk of C tokens alone is x @ within; what follows the chunk adds y_next * carry."""

    within: Tensor  # [C, C], or [B, C, C] with a rate per row
    carry: Tensor  # [1, 1, C] or [B, 1, C]

    def of(self, rows: slice) -> Level:
        return self if len(self.carry) == 1 else Level(self.within[rows], self.carry[rows])


def _levels(rate_B1: Tensor, T: int, C: int, dtype: torch.dtype) -> list[Level]:
    """Chunks of C tokens, then of their heads, until one chunk is left. Powers in float64, 0^0 is 1."""
    levels = []
    while True:
        power_BC = rate_B1 ** torch.arange(C, -1, -1, device=rate_B1.device)
        padded = torch.cat([power_BC[:, 1:], torch.zeros_like(power_BC[:, 1:-1])], dim=1).to(dtype)
        within = padded.unfold(1, C, 1).flip(1)  # a^(i-j) at [i, j] where i >= j, else 0
        levels.append(Level(within.squeeze(0), power_BC[:, None, :-1].to(dtype)))
        T = -(-T // C)
        if T == 1:
            return levels
        rate_B1, C = power_BC[:, :1], min(T, 48)


def _scan_chunks(x_RKC: Tensor, levels: list[Level], out_RKC: Tensor | None = None) -> Tensor:
    """Each chunk by itself, then the heads of all chunks, one level up, then what they carry into the chunk before."""
    (within, carry), (R, K, _) = levels[0], x_RKC.shape
    y_RKC = torch.matmul(x_RKC, within, out=out_RKC)
    if K > 1:
        C = levels[1].carry.shape[-1]
        heads_RKC = x_RKC.new_zeros(R, -(-K // C), C)
        heads_RKC.view(R, -1)[:, :K] = y_RKC[:, :, 0]
        head_RK = _scan_chunks(heads_RKC, levels[1:]).view(R, -1)
        y_RKC[:, :-1].addcmul_(head_RK[:, 1:K, None], carry)
    return y_RKC


def _zero_outside(x_RT: Tensor, mask_RT: Tensor, spans: list[tuple[int, int]]) -> None:
    """By assignment, not by a product: 0 * NaN is NaN. On a CPU `where` takes longer than all the rest of the scan."""
    whole = (0, x_RT.shape[1])
    if all(span == whole for span in spans):
        return
    if x_RT.device.type != "cpu":
        torch.where(mask_RT, x_RT, x_RT.new_zeros(()), out=x_RT)
        return
    for row, (first, stop) in zip(x_RT.numpy(), spans, strict=True):
        row[:first] = 0
        row[stop:] = 0


@contextlib.contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Matrix products in the dtype of their arguments: no autocast, no TF32, no bfloat16 passes; restored afterwards."""
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [s.fp32_precision for s in settings]
    with torch.autocast(device_type, enabled=False):
        try:
            for s in settings:
                s.fp32_precision = "ieee"
            yield
        finally:
            for s, precision in zip(settings, before, strict=True):
                s.fp32_precision = precision


def _empty(B: int, T: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised. NumPy asks the kernel for huge pages, torch does not: first touch costs a third for 50 MB."""
    if device.type != "cpu":
        return torch.empty(B, T, dtype=dtype, device=device)
    return torch.from_numpy(np.empty((B, T), dtype=np.float32 if dtype is torch.float32 else np.float64))
