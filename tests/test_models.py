"""Policy and value model against transformers' own unpadded forward, row by row."""

from __future__ import annotations

import json

import pytest
import torch

from tppo_ref.method.errors import UserError
from tppo_ref.rollout.attention import PackedLayout, group_by_length
from tppo_ref.rollout.models import PolicyModel, load_policy, load_value_model
from tppo_ref.rollout.packing import TokenBatch, pack

SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
CONFIGS = {
    "qwen2": dict(model_type="qwen2", **SMALL),
    "qwen3": dict(model_type="qwen3", head_dim=16, **SMALL),
    "llama": dict(model_type="llama", **SMALL),
    "mistral": dict(model_type="mistral", sliding_window=None, **SMALL),
    "granite": dict(model_type="granite", attention_multiplier=0.9, **SMALL),  # a scale of scores that is not 1/sqrt(D)
    "gpt2": dict(model_type="gpt2", vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=1024),
}
BATCH = TokenBatch([[1, 2, 3], [4, 5], [7] * 10, [8], [9, 10]], [[5, 6, 1, 1], [], [9, 11] * 70, [3] * 5, [12]])


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def sharpen(hf, seed=0):
    """Random weights of a useful size: a fresh init is almost the uniform distribution, which hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)


def policy_of(kind="qwen2", **options):
    model = load_policy(CONFIGS[kind], **options)
    sharpen(model.hf)
    return model


def value_of(kind="qwen2"):
    model = load_value_model(CONFIGS[kind])
    sharpen(model.hf)
    return model


def plain_forward(hf, ids):
    """transformers' own eager forward of one unpadded row: [n, width of the head]."""
    name = hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    try:
        return hf(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    finally:
        hf.set_attn_implementation(name)


def plain_logprobs(model, prompt, response):
    """The definition, token by token: temperature, forbidden end token, normalise, pick."""
    logits = plain_forward(model.hf, [*prompt, *response])
    out = []
    for t, token in enumerate(response):
        row = logits[len(prompt) + t - 1].double() / model.temperature
        if t < model.min_response_tokens:
            row[list(model.end_token_ids)] = -torch.inf
        out.append(row[token] - torch.log(torch.exp(row - row.max()).sum()) - row.max())
    return torch.stack(out).float() if out else torch.zeros(0)


@pytest.mark.parametrize("kind", CONFIGS)
def test_policy_logprobs_equal_plain_unpadded_forward(kind):
    model = policy_of(kind)
    logprob_BT = model(BATCH)
    assert logprob_BT.dtype == torch.float32
    assert logprob_BT.shape == (5, 140)
    for b, (prompt, response) in enumerate(zip(BATCH.prompt_ids, BATCH.response_ids, strict=True)):
        n = len(response)
        torch.testing.assert_close(logprob_BT[b, :n], plain_logprobs(model, prompt, response), atol=1e-5, rtol=0)
        assert (logprob_BT[b, n:] == 0).all()


@pytest.mark.parametrize("kind", [kind for kind in CONFIGS if kind != "granite"])  # transformers has no token classifier of it
def test_values_equal_plain_unpadded_forward(kind):
    model = value_of(kind)
    value_BT, last_B = model(BATCH)
    assert value_BT.dtype == last_B.dtype == torch.float32
    for b, (prompt, response) in enumerate(zip(BATCH.prompt_ids, BATCH.response_ids, strict=True)):
        want = plain_forward(model.hf, [*prompt, *response])[:, 0]
        n, p = len(response), len(prompt)
        torch.testing.assert_close(value_BT[b, :n], want[p - 1 : p + n - 1], atol=1e-5, rtol=0)
        torch.testing.assert_close(last_B[b], want[-1], atol=1e-5, rtol=0)
        assert (value_BT[b, n:] == 0).all()


def test_sampling_distribution_has_temperature_and_no_early_end_token():
    model = policy_of(temperature=0.7, min_response_tokens=2, end_token_ids=(6,))
    prompt, response = [1, 2, 3], [5, 9, 6]
    got = model(TokenBatch([prompt], [response]))[0]
    torch.testing.assert_close(got, plain_logprobs(model, prompt, response), atol=1e-5, rtol=0)
    every_token = torch.stack([model(TokenBatch([prompt], [[v]]))[0, 0] for v in range(64)])
    assert every_token[6] == -torch.inf  # forbidden at the first position ...
    torch.testing.assert_close(every_token.exp().sum(), torch.tensor(1.0))  # ... and the rest renormalised
    assert model(TokenBatch([prompt], [[5, 9, 6]]))[0, 2].isfinite()  # allowed from min_response_tokens on


def test_uniform_weights_give_hand_numbers():
    model = load_policy(CONFIGS["qwen2"], min_response_tokens=1, end_token_ids=(0,))
    with torch.no_grad():
        model.hf.lm_head.weight.zero_()
    got = model(TokenBatch([[1]], [[5, 5]]))
    torch.testing.assert_close(got, -torch.tensor([[63.0, 64.0]]).log())


@pytest.mark.parametrize("chunk", [1, 7, 149, 150])
def test_logit_chunks_change_neither_values_nor_gradients(chunk):
    options = dict(temperature=0.7, min_response_tokens=3, end_token_ids=(2,))  # nowhere sampled, so that nothing is infinite
    whole, chunked = policy_of(**options), policy_of(**options, logit_chunk_tokens=chunk)
    a, b = whole(BATCH), chunked(BATCH)
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    a.square().sum().backward(), b.square().sum().backward()
    for (name, p), q in zip(whole.hf.named_parameters(), chunked.hf.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_no_logits_of_the_whole_batch_exist_with_chunks(monkeypatch):
    model, seen = policy_of(logit_chunk_tokens=16), []
    original = PolicyModel.logits
    monkeypatch.setattr(PolicyModel, "logits", lambda self, h: (seen.append(len(h)), original(self, h))[1])
    model(BATCH).sum().backward()
    assert max(seen) == 16
    assert sum(seen) == 2 * 150


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_gradients_equal_plain_forward(kind):
    ours, plain = policy_of(kind), policy_of(kind)
    weight = torch.linspace(-1, 1, 140)
    (ours(BATCH) * weight).sum().backward()
    for prompt, response in zip(BATCH.prompt_ids, BATCH.response_ids, strict=True):
        if response:
            (plain_logprobs(plain, prompt, response) * weight[: len(response)]).sum().backward()
    for (name, p), q in zip(ours.hf.named_parameters(), plain.hf.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_neighbours_change_nothing_beyond_rounding():
    model, critic = policy_of(), value_of()
    together, (values, last) = model(BATCH), critic(BATCH)
    for b in range(len(BATCH)):
        alone_batch = TokenBatch([BATCH.prompt_ids[b]], [BATCH.response_ids[b]])
        alone, (value, last_alone) = model(alone_batch), critic(alone_batch)
        n = len(BATCH.response_ids[b])
        torch.testing.assert_close(together[b, :n], alone[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(values[b, :n], value[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(last[b], last_alone[0], atol=1e-5, rtol=0)
    assert torch.equal(together, model(BATCH))


def test_only_empty_responses():
    model, critic = policy_of(), value_of()
    batch = TokenBatch([[1, 2], [3]], [[], []])
    assert model(batch).shape == (2, 0)
    values, last = critic(batch)
    assert values.shape == (2, 0)
    torch.testing.assert_close(last[0], plain_forward(critic.hf, [1, 2])[-1, 0], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"prompt_ids\[1\]: got no tokens"):
        model(TokenBatch([[1], []], [[1], [2]]))


def test_packed_order_and_lengths():
    packed = pack(TokenBatch([[1], [2, 3, 4]], [[5, 6], [7]]), torch.device("cpu"))
    assert packed.input_ids.tolist() == [[2, 3, 4, 7, 1, 5, 6]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert packed.predictor_M.tolist() == [2, 4, 5]
    assert packed.target_M.tolist() == [7, 5, 6]
    assert packed.cell_M.tolist() == [2, 0, 1]
    assert packed.last_B.tolist() == [6, 3]


def test_groups_cover_every_row_once_and_cut_where_padding_is_saved():
    assert group_by_length([], 10) == []
    assert group_by_length([4, 4, 4], 0) == [(0, 3)]
    assert group_by_length([400, 5, 5, 5], 1000) == [(0, 1), (1, 4)]  # saves 3 * 395 tokens
    assert group_by_length([400, 5, 5, 5], 1185) == [(0, 4)]
    lengths = sorted(torch.randint(1, 500, (60,), generator=torch.Generator().manual_seed(0)).tolist(), reverse=True)
    groups = group_by_length(lengths, 300)
    assert [i for a, b in groups for i in range(a, b)] == list(range(60))
    for a, b in groups:  # no further cut would save more than it costs
        assert all((b - i) * (lengths[a] - lengths[i]) <= 300 for i in range(a, b))


def test_layout_in_another_order_is_right_too():
    model = policy_of()
    rows = [[1, 2], [3] * 50, [4, 5, 6]]
    lengths = [len(r) for r in rows]
    ids = torch.tensor([[token for row in rows for token in row]])
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    got = model.logits(model.hidden(ids, positions, PackedLayout(lengths)))
    torch.testing.assert_close(got, torch.cat([plain_forward(model.hf, r) for r in rows]), atol=1e-5, rtol=1e-5)


def test_saved_folders_are_ordinary_transformers_folders(tmp_path):
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    model, critic = policy_of(), value_of()
    model.save_pretrained(tmp_path / "policy"), critic.save_pretrained(tmp_path / "value")
    for folder in ("policy", "value"):
        assert "tppo" not in (tmp_path / folder / "config.json").read_text()
        assert (tmp_path / folder / "model.safetensors").is_file()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert plain.config._attn_implementation != model.hf.config._attn_implementation
    ids = [1, 2, 3, 4]
    torch.testing.assert_close(plain(torch.tensor([ids])).logits[0], plain_forward(model.hf, ids), atol=1e-5, rtol=1e-5)
    plain_critic = AutoModelForTokenClassification.from_pretrained(tmp_path / "value")
    torch.testing.assert_close(plain_critic(torch.tensor([ids])).logits[0], plain_forward(critic.hf, ids), atol=1e-5, rtol=1e-5)
    assert dict(model.hf.named_parameters()).keys() == dict(plain.named_parameters()).keys()
    assert torch.equal(load_policy(tmp_path / "policy")(BATCH), model(BATCH))
    assert torch.equal(load_value_model(tmp_path / "value")(BATCH)[0], critic(BATCH)[0])


def test_value_model_from_a_policy_folder_takes_its_backbone(tmp_path):
    model = policy_of()
    model.save_pretrained(tmp_path)
    a, b, c = load_value_model(tmp_path, seed=1), load_value_model(tmp_path, seed=1), load_value_model(tmp_path, seed=2)
    own = model.hf.base_model.state_dict()
    for name, tensor in a.hf.base_model.state_dict().items():
        assert torch.equal(tensor, own[name]), name
    assert torch.equal(a.hf.score.weight, b.hf.score.weight)
    assert not torch.equal(a.hf.score.weight, c.hf.score.weight)


def test_random_init_depends_on_the_seed_only(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen2"]))
    state = torch.get_rng_state()
    a, b = load_policy(CONFIGS["qwen2"], seed=3), load_policy(tmp_path / "config.json", seed=3)
    c = load_policy(a.hf.config, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a(BATCH), b(BATCH))
    assert not torch.equal(a(BATCH), c(BATCH))


def test_eval_mode_stays():
    model = policy_of("gpt2")  # GPT-2's config has dropout 0.1
    model.train()
    assert not any(m.training for m in model.modules())
    assert torch.equal(model(BATCH), model(BATCH))


def test_bfloat16_gives_float32_results(tmp_path):
    exact = load_policy(CONFIGS["qwen2"])
    exact.save_pretrained(tmp_path)  # one set of weights: torch 2.11 draws others for bfloat16 from the same seed
    model = load_policy(tmp_path, dtype="bfloat16")
    got = model(BATCH)
    assert model.hf.dtype == torch.bfloat16
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, exact(BATCH), atol=0.05, rtol=0)


def test_user_errors_are_one_line(tmp_path):
    def error(source, **options):
        with pytest.raises(UserError) as caught:
            load_policy(source, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    config = CONFIGS["qwen2"]
    assert "no such file" in error(tmp_path / "nothing")
    assert "a folder without a config.json" in error(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "a folder without safetensors" in error(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a safetensors file")
    assert "cannot be loaded" in error(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    assert "cannot be loaded" in error(tmp_path / "broken.json")
    assert "model_type" in error(SMALL)
    assert "nonsense" in error(dict(model_type="nonsense"))
    assert "dtype" in error(config, dtype="int8")
    assert "device" in error(config, device="cuda:99")
    assert "device" in error(config, device="toaster")


@pytest.mark.parametrize(("kind", "extra", "message"), [
    ("gemma2", {}, "softcap"),
    ("granite", dict(logits_scaling=3.0), "packed and plain forward differ"),
    ("mamba", {}, "not supported"),
    ("bloom", {}, "not supported"),
    ("gpt_oss", {}, "s_aux|not supported"),
])  # fmt: skip
def test_architectures_that_cannot_be_right_are_refused(kind, extra, message):
    with pytest.raises(UserError, match=message):
        load_policy(dict(model_type=kind, **SMALL, **extra))


def test_sliding_window_is_refused_once_a_sequence_is_longer():
    model = load_policy({**CONFIGS["mistral"], "sliding_window": 8})
    assert model(TokenBatch([[1, 2]], [[3] * 6])).isfinite().all()
    with pytest.raises(UserError, match="sliding_window=8"):
        model(TokenBatch([[1, 2]], [[3] * 7]))


def test_weights_missing_from_a_folder_are_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    policy_of().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of the model's weights, model\.layers\.1\.mlp\.up_proj"):
        load_policy(tmp_path)
