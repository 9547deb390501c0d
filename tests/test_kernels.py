"""Which attention kernel is called how. A CPU has no varlen kernel: a stand-in of torch's `varlen_attn`, with its names and its rule for
windows, computes each query by its own sum, and takes the place of the kernel in both layouts.
"""

from __future__ import annotations

import inspect
import logging
import sys

import pytest
import torch

from tppo_ref.rollout import kernels
from tppo_ref.rollout.models import load_policy
from tppo_ref.rollout.packing import TokenBatch

TINY = dict(model_type="qwen2", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2)  # fmt: skip
BATCH = TokenBatch([[1, 2, 3], [4, 5], [7] * 10, [8]], [[5, 6, 1, 1], [], [9, 11] * 20, [3] * 5])
LIVE = TokenBatch([[1, 2, 3], [4, 5], [7] * 10, [8]], [[5, 6, 1, 1], [2], [9, 11] * 20, [3] * 5], live_from=[2, 0, 17, 0])
calls: list[dict] = []


def stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """torch.nn.attention.varlen.varlen_attn for window (-1, 0): of a sequence the last query sees its last key (flash attention's
    lower right corner)."""
    assert window_size == (-1, 0)
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert enable_gqa == (query.shape[1] > key.shape[1])
    assert all(x.is_contiguous() for x in (query, key, value))
    calls.append({"queries": len(query), "keys": len(key), "max": (max_q, max_k)})
    group, outs = query.shape[1] // key.shape[1], []
    for q0, q1, k0, k1 in zip(cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], cu_seq_k[1:], strict=True):
        assert q1 - q0 <= max_q
        assert k1 - k0 <= max_k
        for i in range(int(q1 - q0)):
            seen = slice(int(k0), int(k1) - int(q1 - q0) + i + 1)
            keys, values = (x[seen].repeat_interleave(group, 1) for x in (key, value))
            scores = torch.einsum("hd,shd->hs", query[int(q0) + i], keys) * (scale or query.shape[-1] ** -0.5)
            outs.append(torch.einsum("hs,shd->hd", scores.softmax(-1), values))
    return torch.stack(outs)


def without_groups(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """The same of an older torch, which shares no key heads."""
    assert query.shape[1] == key.shape[1]
    return stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size)


@pytest.fixture(params=[stand_in, without_groups], ids=["shared heads", "repeated heads"])
def varlen(request, monkeypatch):
    calls.clear()
    monkeypatch.setattr(kernels, "takes_varlen", lambda query: True)
    monkeypatch.setattr(kernels, "varlen_attn", lambda: request.param)


def policy():
    model = load_policy(dict(TINY))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def outputs(batch):
    """Log-probabilities, and the gradient of a weighted sum of them."""
    model = policy()
    logprob_BT = model(batch)
    (logprob_BT * torch.linspace(-1, 1, logprob_BT.numel()).view_as(logprob_BT)).sum().backward()
    return logprob_BT.detach(), {name: p.grad for name, p in model.named_parameters()}


REFERENCE = {name: outputs(batch) for name, batch in (("whole", BATCH), ("live", LIVE))}
"""By scaled_dot_product_attention in groups, itself held against transformers' own forward (test_models, test_constant_prefix)."""


@pytest.mark.parametrize(("name", "batch"), [("whole", BATCH), ("live", LIVE)])
def test_both_layouts_give_varlen_what_it_needs_and_take_what_it_gives(varlen, name, batch):
    logprob_BT, gradients = outputs(batch)
    torch.testing.assert_close(logprob_BT, REFERENCE[name][0], atol=1e-5, rtol=1e-5)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, REFERENCE[name][1][key], atol=1e-4, rtol=1e-4)
    assert calls
    if name == "live":
        assert any(c["keys"] > c["queries"] for c in calls), "no constant key was read"


def test_the_stand_in_has_the_names_of_torchs_own():
    from torch.nn.attention.varlen import varlen_attn

    real = inspect.signature(varlen_attn).parameters
    assert [n for n in inspect.signature(stand_in).parameters if n in real] == list(inspect.signature(stand_in).parameters)
    assert kernels.varlen_attn() is varlen_attn


@pytest.mark.parametrize("missing", ["module", "window"])
def test_a_torch_without_it_falls_back_with_a_word(monkeypatch, caplog, missing):
    import torch.nn.attention.varlen as module

    kernels.varlen_attn.cache_clear()
    if missing == "module":
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    else:
        monkeypatch.setattr(module, "varlen_attn", lambda query, key, value, is_causal=False: None)
    try:
        with caplog.at_level(logging.WARNING, logger="tppo_ref"):
            assert kernels.varlen_attn() is None
        assert "has no varlen attention with a scale and a window: attention pads groups" in caplog.text
    finally:
        kernels.varlen_attn.cache_clear()


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU, and computes here."""

    is_cuda = True


@pytest.mark.parametrize(
    ("dtype", "masked", "shared"), [(torch.bfloat16, False, True), (torch.bfloat16, True, False), (torch.float32, False, False)]
)
def test_on_a_gpu_only_fused_kernels_are_allowed_and_heads_are_shared_where_one_takes_that(monkeypatch, dtype, masked, shared):
    """A stand-in of the call: what is enabled while it runs, and what it is given."""
    seen = {}

    def call(q, k, v, attn_mask, is_causal, scale, enable_gqa):
        seen.update(math=torch.backends.cuda.math_sdp_enabled(), cudnn=torch.backends.cuda.cudnn_sdp_enabled(),
                    flash=torch.backends.cuda.flash_sdp_enabled(), efficient=torch.backends.cuda.mem_efficient_sdp_enabled(),
                    shared=enable_gqa, heads=k.shape[1])  # fmt: skip
        return q

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", call)
    q, k = torch.zeros(1, 4, 3, 8, dtype=dtype).as_subclass(OnGpu), torch.zeros(1, 2, 3, 8, dtype=dtype)
    kernels.sdpa(q, k, k, None, mask=torch.ones(1, 1, 3, 3, dtype=torch.bool) if masked else None, causal=not masked)
    assert (seen["math"], seen["cudnn"], seen["flash"], seen["efficient"]) == (False, False, True, True)
    assert (seen["shared"], seen["heads"]) == (shared, 2 if shared else 4)
    assert torch.backends.cuda.math_sdp_enabled()  # as before
