"""From hidden states to the logits of the sampling distribution: in float32 on every side, whatever a model computes in.

Between 16 and 32 a bfloat16 number moves in steps of 0.125: logits rounded to it give log-probabilities that are off by as much,
and engine and trainer round differently. So the output head multiplies the model's own numbers and adds up, and stays, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

BLOCK_NUMBERS = 2**22
"""Of the weight, that are float32 at a time where no kernel adds up in float32 by itself."""


class Float32Head(torch.autograd.Function):
    """hidden [N, D] and weight [V, D], both of half precision -> their product in float32 [N, V].

    The gradient arrives in float32 and is rounded to the weights' type, as that of a layer which computes in it is anyway. On a GPU
    one kernel does it, as vLLM's head_dtype float32 does; elsewhere the weight is turned into float32 block by block.
    """

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD)
        if hidden_ND.is_cuda:
            return torch.mm(hidden_ND, weight_VD.t(), out_dtype=torch.float32)
        rows = max(1, BLOCK_NUMBERS // weight_VD.shape[1])
        whole_ND = hidden_ND.float()
        return torch.cat([whole_ND @ block.float().t() for block in weight_VD.split(rows)], dim=1)

    @staticmethod
    def backward(ctx: Any, grad_NV: Tensor) -> tuple[Tensor, Tensor]:
        hidden_ND, weight_VD = ctx.saved_tensors
        rounded_NV = grad_NV.to(weight_VD.dtype)
        return rounded_NV @ weight_VD, rounded_NV.t() @ hidden_ND


def float32_logits(head: nn.Module, hidden_ND: Tensor) -> Tensor:
    """The language-model head [N, D] -> [N, V], at least float32, before temperature."""
    weight: Any = head.weight
    if hidden_ND.dtype not in (torch.bfloat16, torch.float16):
        return head(hidden_ND)
    logits_NV = Float32Head.apply(hidden_ND, weight.to(hidden_ND.dtype))
    bias = getattr(head, "bias", None)
    return logits_NV if bias is None else logits_NV + bias.float()


def sampling_logits(logits_NV: Tensor, temperature: float, forbid_end_N: Tensor | None, end_token_ids: Sequence[int]) -> Tensor:
    """The logits of the distribution that tokens are drawn from, at least float32 [N, V]; the only place that defines it.

    logits / temperature; where `forbid_end_N` (bool) is True the end tokens have logit -inf.
    """
    logits = at_least_float32(logits_NV)
    if temperature != 1.0:
        logits = logits / temperature
    if forbid_end_N is not None:
        is_end = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
        is_end[list(end_token_ids)] = True
        logits = logits.masked_fill(forbid_end_N[:, None] & is_end, -torch.inf)
    return logits


def at_least_float32(x: Tensor) -> Tensor:
    """bfloat16 as float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
