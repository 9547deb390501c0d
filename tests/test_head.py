"""The output head in float32, and responses that more than one token ends."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from tppo_ref.method.errors import UserError
from tppo_ref.rollout.engine import Request
from tppo_ref.rollout.head import BLOCK_NUMBERS, float32_logits
from tppo_ref.rollout.models import load_policy
from tppo_ref.rollout.packing import TokenBatch
from tppo_ref.rollout.torch_engine import TorchEngine
from tppo_ref.runs.build import end_token_ids

TINY = dict(model_type="qwen2", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2)  # fmt: skip


def head_of(rows: int, width: int, *, bias: bool = False, dtype: torch.dtype = torch.bfloat16) -> torch.nn.Linear:
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(width, rows, bias=bias)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return head.to(dtype)


def hidden_of(rows: int, width: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("bias", [False, True])
def test_logits_are_the_exact_products_of_the_rounded_numbers(bias):
    """Against float64; the layer's own logits are off by what bfloat16 rounds away between 16 and 32."""
    head, hidden = head_of(97, 256, bias=bias), hidden_of(11, 256)
    exact = hidden.double() @ head.weight.double().t() + (head.bias.double() if bias else 0.0)
    assert exact.abs().max() > 16
    got = float32_logits(head, hidden)
    assert got.dtype == torch.float32
    assert (got - exact).abs().max() < 1e-4
    assert (head(hidden) - exact).abs().max() > 1 / 32


def test_a_weight_of_several_blocks_is_the_same_product():
    head, hidden = head_of(3 * BLOCK_NUMBERS // 4096 + 5, 4096), hidden_of(2, 4096)
    torch.testing.assert_close(float32_logits(head, hidden), hidden.float() @ head.weight.float().t(), rtol=1e-5, atol=1e-3)


def test_gradients_are_those_of_the_product():
    """Against autograd through the same numbers in float32, up to the rounding of the gradient to the weights' type."""
    head, hidden = head_of(97, 64, bias=True), hidden_of(11, 64).requires_grad_()
    out = torch.randn(11, 97, generator=torch.Generator().manual_seed(2))
    float32_logits(head, hidden).backward(out)
    exact, exact_hidden = head_of(97, 64, bias=True, dtype=torch.float32), hidden_of(11, 64).float().requires_grad_()
    exact(exact_hidden).backward(out)
    for got, expected in (
        (hidden.grad, exact_hidden.grad),
        (head.weight.grad, exact.weight.grad),
        (head.bias.grad, exact.bias.grad),
    ):
        assert (got.float() - expected).abs().max() < 2**-6 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_head_that_computes_in_float32_or_more_is_asked_itself(dtype):
    head, hidden = head_of(97, 64, dtype=dtype), hidden_of(11, 64).to(dtype)
    assert torch.equal(float32_logits(head, hidden), head(hidden))


def test_a_bfloat16_policys_log_probabilities_are_those_of_its_own_hidden_states():
    """Against the definition in float64, from the hidden states that the model has; logits of a useful size."""
    policy = load_policy(dict(TINY), dtype="bfloat16")
    with torch.no_grad():
        policy.hf.lm_head.weight.mul_(400)
        ids = torch.arange(3, 11)
        hidden = policy.hf.base_model(ids[None], use_cache=False, ragged=_layout(8)).last_hidden_state[0].double()
        exact = (hidden @ policy.hf.lm_head.weight.double().t()).log_softmax(-1)
        got = policy(TokenBatch([[3, 4]], [ids[2:].tolist()]))[0]
    assert exact.min() < -16
    assert (got - exact[torch.arange(1, 7), ids[2:]]).abs().max() < 1e-4


def _layout(length: int):
    from tppo_ref.rollout.attention import PackedLayout

    return PackedLayout([length])


# ---------------------------------------------------------------------------------------------------------------- end tokens


@pytest.mark.parametrize("end", [5, 9])
def test_each_end_token_ends_a_response_and_stays_in_it(end):
    policy = load_policy(dict(TINY), end_token_ids=(5, 9))
    with torch.no_grad():  # whatever is read, this token follows
        policy.hf.lm_head.weight.zero_()
        policy.hf.model.norm.weight.fill_(1)
    policy.hf.lm_head.bias = torch.nn.Parameter(30.0 * (torch.arange(64) == end))
    engine = TorchEngine(policy, slots=1, max_context_tokens=32, end_token_ids=policy.end_token_ids)
    engine.submit([Request(response_id=0, token_ids=[1, 2], max_new_tokens=8, seed=3)])
    (decoded,) = engine.step()
    assert (decoded.token_ids, decoded.end_token) == ([end], True)


def test_a_shortest_response_forbids_all_of_them():
    policy = load_policy(dict(TINY), end_token_ids=(5, 9), min_response_tokens=1)
    with torch.no_grad():
        policy.hf.lm_head.weight.zero_()
    got = policy(TokenBatch([[1]], [[7, 7]]))
    torch.testing.assert_close(got, -torch.tensor([[62.0, 64.0]]).log())


@pytest.mark.parametrize(
    ("named", "expected"),
    [([7, 3], (7, 3)), ([3, 7, 9], (7, 3, 9)), (3, (7, 3)), (7, (7,)), (None, (7,)), ("absent", (7,))],
)
def test_end_tokens_are_the_tasks_and_those_of_the_models_generation_config(tmp_path, named, expected):
    (tmp_path / "generation_config.json").write_text(json.dumps({} if named == "absent" else {"eos_token_id": named}))
    task = SimpleNamespace(end_token_id=7)
    assert end_token_ids(task, str(tmp_path)) == expected
    assert end_token_ids(task, str(tmp_path / "elsewhere")) == end_token_ids(task, None) == (7,)


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": ["x"]}'])
def test_a_generation_config_that_cannot_be_read_is_one_line(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"^model\.policy: got \S+generation_config.json, which cannot be read"):
        end_token_ids(SimpleNamespace(end_token_id=7), str(tmp_path))
