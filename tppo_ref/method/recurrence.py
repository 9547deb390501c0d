"""One backward recursion: its definition as a five-line loop, and the fast scan that computes it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tppo_ref.method.checks import (
    Runs,
    check_finite,
)

CACHED = 400_000  # elements of x that a CPU core works on at a time: with their neighbours they should stay in its cache


class Level(NamedTuple):
    """One level of the scan: G of a chunk of C tokens alone is x @ within; what follows it adds G_next * carry."""

    within: Tensor  # [C, C], or [B, C, C] with a lambda per row
    carry: Tensor  # [1, 1, C] or [B, 1, C]

    def rows(self, some: slice) -> Level:
        return self if len(self.carry) == 1 else Level(self.within[some], self.carry[some])


def _scan(
    rewards_BT: Tensor, values_BT: Tensor | None, mask_BT: Tensor, runs: Runs, end_B: Tensor, gamma: float, lam_B1: Tensor
) -> Tensor:
    """A_BT by the recursion of the module's docstring, or G_BT without values; end_B is V after the last token."""
    out_BT = _empty_like(rewards_BT)
    spans = list(zip(*torch.stack(runs).tolist(), strict=True))
    begin = min((first for first, stop in spans if stop), default=0)
    end = max((stop for _, stop in spans), default=0)
    out_BT[:, :begin], out_BT[:, end:] = 0, 0
    if end == 0:
        return out_BT
    last_x_B = torch.where(runs.stop_B > 0, _at(rewards_BT, runs.stop_B - 1) + gamma * end_B, 0)
    last = (runs.stop_B - 1 - begin).clamp(min=0)[:, None], last_x_B[:, None]
    rates = gamma * lam_B1, (gamma * (1 - lam_B1)).to(rewards_BT.dtype)
    spans = [(max(first - begin, 0), max(stop - begin, 0)) for first, stop in spans]
    with _full_precision(rewards_BT.device.type):
        run_BT = slice(None), slice(begin, end)
        v_BT = None if values_BT is None else values_BT[run_BT]
        head_B = _scan_rows(rewards_BT[run_BT], v_BT, mask_BT[run_BT], out_BT[run_BT], spans, last, rates)
    finite_B = head_B.isfinite()
    if values_BT is not None:  # the scan reads V_{t+1}: the first V of each run is left to check
        finite_B &= _at(values_BT, runs.first_B).isfinite() | (runs.stop_B == 0)
    if not finite_B.all():  # finite numbers whose sum overflows are no error of the arguments
        check_finite("rewards_BT", rewards_BT, mask_BT)
        if values_BT is not None:
            check_finite("values_BT", values_BT, mask_BT)
    return out_BT


def _scan_rows(
    rewards_BT: Tensor, values_BT: Tensor | None, mask_BT: Tensor, out_BT: Tensor,
    spans: list[tuple[int, int]], last: tuple[Tensor, Tensor], rates: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    """Fills `out`, a few whole rows at a time; returns G at column 0, which is finite if all that was read is.

    With x_t = r_t + gamma (1 - lam) V_{t+1}, and r_t + gamma V(end) at the last token, G_t = x_t + a G_{t+1},
    a = gamma lam. On its way to column 0 a number that is not finite stays so, even times 0.
    """
    (B, T), on_cpu, (last_B1, last_x_B1), (a_B1, mix_B1) = rewards_BT.shape, rewards_BT.device.type == "cpu", last, rates
    R = min(B, max(1, CACHED * torch.get_num_threads() // T)) if on_cpu else B
    levels = _levels(a_B1, T, 16 if on_cpu else 64, rewards_BT.dtype)
    C = levels[0].carry.shape[-1]
    x_RKC, y_RKC = rewards_BT.new_empty(2, R, -(-T // C), C)
    x_RKC.flatten(1)[:, T:] = 0
    head_B = rewards_BT.new_empty(B)
    for top in range(0, B, R):
        some = slice(top, min(top + R, B))
        x_RKC, y_RKC = x_RKC[: some.stop - top], y_RKC[: some.stop - top]
        x_RT, y_RT = x_RKC.flatten(1)[:, :T], y_RKC.flatten(1)[:, :T]
        if values_BT is None:
            x_RT.copy_(rewards_BT[some])
        else:
            mix_R1 = mix_B1 if len(mix_B1) == 1 else mix_B1[some]
            torch.addcmul(rewards_BT[some, :-1], values_BT[some, 1:], mix_R1, out=x_RT[:, :-1])
        _zero_outside(x_RT, mask_BT[some], spans[some])
        x_RT.scatter_(1, last_B1[some], last_x_B1[some])  # in an empty row 0 at column 0
        _scan_chunks(x_RKC, [level.rows(some) for level in levels], out_RKC=y_RKC)
        head_B[some] = y_RT[:, 0]
        if values_BT is None:
            out_BT[some] = y_RT
        else:
            torch.sub(y_RT, values_BT[some], out=out_BT[some])
        _zero_outside(out_BT[some], mask_BT[some], spans[some])
    return head_B


def _scan_chunks(x_RKC: Tensor, levels: list[Level], out_RKC: Tensor | None = None) -> Tensor:
    """G from x: each chunk by itself, then the heads (first tokens) of all chunks, one level up, then what they carry."""
    (within, carry), (R, K, _) = levels[0], x_RKC.shape
    y_RKC = torch.matmul(x_RKC, within, out=out_RKC)
    if K > 1:
        C = levels[1].carry.shape[-1]
        heads_RKC = x_RKC.new_zeros(R, -(-K // C), C)
        heads_RKC.view(R, -1)[:, :K] = y_RKC[:, :, 0]
        head_RK = _scan_chunks(heads_RKC, levels[1:]).view(R, -1)
        y_RKC[:, :-1].addcmul_(head_RK[:, 1:K, None], carry)
    return y_RKC


def _levels(a_B1: Tensor, T: int, C: int, dtype: torch.dtype) -> list[Level]:
    """Chunks of C tokens, then of their heads, until one chunk is left. Powers in float64, 0^0 is 1."""
    levels = []
    while True:
        power_BC = a_B1 ** torch.arange(C, -1, -1, device=a_B1.device)
        padded = torch.cat([power_BC[:, 1:], torch.zeros_like(power_BC[:, 1:-1])], dim=1).to(dtype)
        within = padded.unfold(1, C, 1).flip(1)  # a^(i-j) at [i, j] where i >= j, else 0
        levels.append(Level(within.squeeze(0), power_BC[:, None, :-1].to(dtype)))
        T = -(-T // C)
        if T == 1:
            return levels
        a_B1, C = power_BC[:, :1], min(T, 48)


def _zero_outside(x_RT: Tensor, mask_RT: Tensor, spans: list[tuple[int, int]]) -> None:
    """By assignment, not by a product: 0 * NaN is NaN. On a CPU `where` takes longer than all the rest of the scan."""
    whole = (0, x_RT.shape[1])
    if all(span == whole for span in spans):
        return
    if x_RT.device.type != "cpu":
        torch.where(mask_RT, x_RT, x_RT.new_zeros(()), out=x_RT)
        return
    for row, (first, stop) in zip(x_RT.numpy(), spans, strict=True):
        if first > 0:
            row[:first] = 0
        if stop < len(row):
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


def _empty_like(x_BT: Tensor) -> Tensor:
    """Uninitialised. NumPy asks the kernel for huge pages, torch does not: first touch costs a third for 50 MB."""
    if x_BT.device.type != "cpu":
        return torch.empty_like(x_BT, memory_format=torch.contiguous_format)
    return torch.from_numpy(np.empty(x_BT.shape, dtype=np.float32 if x_BT.dtype is torch.float32 else np.float64))


def _at(x_BT: Tensor, column_B: Tensor) -> Tensor:
    """x_BT[b, column_B[b]]; columns below 0 (of empty runs) give column 0."""
    return x_BT.gather(1, column_B.clamp(min=0)[:, None])[:, 0]
