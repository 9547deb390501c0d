"""Which kernel computes attention. Only attention.py calls this.

On a GPU, in half precision, `torch.nn.attention.varlen`: flash attention over sequences of any lengths end to end, key heads
shared, nothing padded and no plan per length (plain scaled_dot_product_attention prefers cuDNN on Hopper, which plans anew for each
length, 0.4 to 0.5 s each). Where a torch has no varlen that can do it, or numbers are float32, scaled_dot_product_attention by
groups, with cuDNN and the unfused path forbidden: the latter makes an [L, L] matrix, and a run would sooner fail than take it
without a word.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

log = logging.getLogger("tppo_ref")
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]


@functools.cache
def varlen_attn() -> Callable[..., Any] | None:
    """torch's own, where it takes a scale and a window (causal is the window (-1, 0)); None, with a word, where it does not."""
    try:
        import torch.nn.attention.varlen as module
    except ImportError:
        found = None
    else:
        found = getattr(module, "varlen_attn", None)
    if found is None or not {"scale", "window_size"} <= set(inspect.signature(found).parameters):
        log.warning("torch %s has no varlen attention with a scale and a window: attention pads groups of similar length instead",
                    torch.__version__)  # fmt: skip
        return None
    return found


def takes_varlen(query: Tensor) -> bool:
    """Whether sequences of this device and type go through `varlen`."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and varlen_attn() is not None


def varlen(
    query_NHD: Tensor, key_MKD: Tensor, value_MKD: Tensor, query_begin: Tensor, key_begin: Tensor, longest: tuple[int, int],
    scaling: float | None,
) -> Tensor:  # fmt: skip
    """Causal attention of sequences end to end -> [N, H, D].

    query_begin, key_begin   int32 [sequences + 1], where each one's queries and keys begin, and the last one's end
    longest                  queries and keys of the longest

    A sequence's last query sees all of its keys: where it has more keys than queries, the first ones are seen by every query.
    """
    call = varlen_attn()
    assert call is not None
    group = query_NHD.shape[1] // key_MKD.shape[1]
    shared: dict[str, Any] = {}
    if group > 1 and "enable_gqa" in inspect.signature(call).parameters:
        shared["enable_gqa"] = True
    elif group > 1:
        key_MKD, value_MKD = key_MKD.repeat_interleave(group, 1), value_MKD.repeat_interleave(group, 1)
    inputs = (query_NHD.contiguous(), key_MKD.contiguous(), value_MKD.contiguous())
    return call(*inputs, query_begin, key_begin, *longest, scale=scaling, window_size=(-1, 0), **shared)


def sdpa(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, *, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """scaled_dot_product_attention, q [n, H, L, D], k and v [n, K, S, D] with K a divisor of H -> [n, H, L, D].

    On a GPU by a fused kernel or not at all: RuntimeError where none takes these tensors.
    """
    shared = q.shape[1] > k.shape[1]
    if not q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=shared)
    if shared and (mask is not None or q.dtype == torch.float32):  # flash attention takes no mask, and only it shares key heads
        group = q.shape[1] // k.shape[1]
        k, v, shared = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), False
    with sdpa_kernel(FUSED):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=shared)
