"""The forward-only prefix against its definition: the whole row fed at once, with the keys and values before the window detached."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tppo_ref.rollout.attention import PrefixKeys
from tppo_ref.rollout.models import load_policy, load_value_model
from tppo_ref.rollout.packing import TokenBatch

SMALL = dict(vocab_size=29, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
KINDS = {"qwen2": dict(model_type="qwen2", **SMALL), "llama": dict(model_type="llama", **SMALL),
         "gpt2": dict(model_type="gpt2", vocab_size=29, n_embd=16, n_layer=3, n_head=4, n_positions=256)}  # fmt: skip


class DefinedLayout:
    """One whole row: softmax(q k / sqrt(D)) v over the tokens up to itself, written out; keys and values of the first `constant`
    tokens are constants."""

    def __init__(self, length, constant):
        self.max_length, self.constant = length, constant

    def attend(self, layer, query, key, value, scaling):
        (_, H, N, D), (_, K, _, _) = query.shape, key.shape
        fixed = (torch.arange(N) < self.constant)[None, None, :, None]
        key, value = (torch.where(fixed, x.detach(), x).repeat_interleave(H // K, 1) for x in (key, value))
        score = query @ key.transpose(-1, -2) * (scaling if scaling is not None else D**-0.5)
        score = score.masked_fill(torch.ones(N, N, dtype=torch.bool).triu(1), -math.inf)
        return (score.softmax(-1) @ value)[0].transpose(0, 1)


def defined_outputs(model, batch):
    """Per row the outputs of the columns from `live_from` on: log-probabilities, or (values, last value)."""
    outputs = []
    for prompt, response, live_from in zip(batch.prompt_ids, batch.response_ids, batch.live_from, strict=True):
        ids = torch.tensor([[*prompt, *response]])
        layout = DefinedLayout(ids.shape[1], len(prompt) + live_from)
        hidden = model.hidden(ids, torch.arange(ids.shape[1])[None], layout)[len(prompt) - 1 :]  # before column 0, 1, ...
        if hasattr(model, "logits"):
            logprob = model.logits(hidden).log_softmax(-1)
            outputs.append([logprob[t, token] for t, token in enumerate(response) if t >= live_from])
        else:
            outputs.append([value for t, value in enumerate(model.hf.score(hidden)[:, 0]) if t >= live_from])
    return outputs


def make(kind, critic=False):
    load = load_value_model if critic else load_policy
    model = load(KINDS[kind]).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():  # a fresh init is nearly uniform, which hides mistakes
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.2)
    return model


def weights(num, seed=1):
    return torch.randn(num, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def loss_of(outputs):
    flat = [x for row in outputs for x in row]
    return sum(
        (w * x for w, x in zip(weights(len(flat)), flat, strict=True)), torch.zeros((), dtype=torch.float64, requires_grad=True)
    )


@st.composite
def batches(draw):
    """Rows of any mixture of lengths and windows: no prompt but one token, nothing live but the last token, all live."""
    tokens = st.integers(0, 28)
    num = draw(st.integers(1, 5))
    prompts = [draw(st.lists(tokens, min_size=1, max_size=6)) for _ in range(num)]
    responses = [draw(st.lists(tokens, max_size=draw(st.sampled_from([2, 9, 40])))) for _ in range(num)]
    return TokenBatch(prompts, responses, live_from=[draw(st.integers(0, len(r))) for r in responses])


RAGGED = TokenBatch([[1], [2, 3, 4], [5] * 7], [[6] * 30, [7, 8], [9, 1, 2, 3]], live_from=[17, 0, 4])


NOTHING_BEFORE = TokenBatch([[1], [2, 3]], [[6] * 9, [7]], live_from=[0, 1])  # the longest row has no constant token


def check_policy(model, batch):
    expected = defined_outputs(model, batch)
    logprob_BT = model(batch)
    got = [list(row[start : len(r)]) for row, r, start in zip(logprob_BT, batch.response_ids, batch.live_from, strict=True)]
    torch.testing.assert_close(loss_of(got), loss_of(expected), rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(gradients(model, loss_of(got)), gradients(model, loss_of(expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    for row, start in zip(logprob_BT, batch.live_from, strict=True):
        assert not row[:start].any(), "a column before the live ones has an output"


@example(RAGGED)
@example(NOTHING_BEFORE)
@given(batches())
@settings(max_examples=25, deadline=None)
def test_log_probabilities_and_their_gradient_are_those_of_detached_keys_and_values(batch):
    check_policy(MODEL, batch)


MODEL = make("qwen2")


@pytest.mark.parametrize("kind", KINDS)
def test_on_every_kind_of_model_grouped_heads_and_its_own_scale_included(kind):
    check_policy(make(kind), RAGGED)


def test_with_an_attention_scale_that_is_not_the_default():
    model = make("llama")
    for layer in model.hf.model.layers:
        layer.self_attn.scaling = 0.9
    check_policy(model, RAGGED)


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_with_several_chunks_of_logits(chunk):
    model = make("qwen2")
    model.logit_chunk_tokens = chunk
    check_policy(model, RAGGED)


def test_a_critics_values_and_gradient():
    model = make("llama", critic=True)
    expected = defined_outputs(model, RAGGED)
    value_BT, last_B = model(RAGGED)
    got = [
        [*row[start : len(r)], last]
        for row, r, start, last in zip(value_BT, RAGGED.response_ids, RAGGED.live_from, last_B, strict=True)
    ]
    torch.testing.assert_close(loss_of(got), loss_of(expected), rtol=1e-9, atol=1e-9)
    for ours, theirs in zip(gradients(model, loss_of(got)), gradients(model, loss_of(expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def test_what_the_dropped_gradient_is_the_full_one_differs():
    """The definition above would pass with nothing detached, too, if gradients through the prefix were nothing."""
    whole = TokenBatch(RAGGED.prompt_ids, RAGGED.response_ids)

    def of(batch):
        out = MODEL(batch)
        rows = zip(out, RAGGED.response_ids, RAGGED.live_from, strict=True)
        return gradients(MODEL, loss_of([list(row[start : len(r)]) for row, r, start in rows]))

    pairs = list(zip(of(RAGGED), of(whole), strict=True))
    difference = sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5
    assert difference > 1e-3 * sum(float(b.square().sum()) for _, b in pairs) ** 0.5


def test_kept_keys_are_read_again_and_are_exact_until_the_policy_moves():
    kept = PrefixKeys()
    batch = TokenBatch(RAGGED.prompt_ids, RAGGED.response_ids, RAGGED.live_from, kept)
    with torch.no_grad():
        first = MODEL(batch)
    passes = []
    hook = MODEL.hf.get_input_embeddings().register_forward_hook(lambda m, args, out: passes.append(args[0].numel()))
    second = MODEL(batch)
    hook.remove()
    live = sum(len(r) - start + 1 for r, start in zip(RAGGED.response_ids, RAGGED.live_from, strict=True))
    assert passes == [live], "the prefix was read again"
    assert torch.equal(first, second)
    moved = make("qwen2")
    with torch.no_grad():
        for p in moved.parameters():
            p.mul_(1.01)
    stale, fresh = moved(batch), moved(RAGGED)
    assert not torch.allclose(stale, fresh), "kept keys follow the weights: then they were not kept"


@pytest.mark.parametrize("critic", [False, True])
def test_an_empty_batch_makes_the_same_passes_and_weighs_nothing(critic):
    model, passes = make("qwen2", critic), []
    model.hf.get_input_embeddings().register_forward_hook(lambda m, args, out: passes.append(args[0].numel()))
    out = model(TokenBatch([], [], live_from=[]))
    assert len(passes) == 2, "a rank without rows must gather weights as often as the others"
    out = out[0] if critic else out
    assert out.shape[0] == 0
    assert all(not g.any() for g in gradients(model, out.sum()))


def test_a_column_outside_of_the_response_is_refused():
    with pytest.raises(ValueError, match=r"live_from: got \[3\]; expected"):
        MODEL(TokenBatch([[1]], [[1, 2]], live_from=[3]))
