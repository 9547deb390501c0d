"""TorchEngine against a naive loop over transformers' plain forward, and its own laws."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from tppo_ref.method.errors import UserError
from tppo_ref.rollout.engine import Request, request_seed
from tppo_ref.rollout.models import load_policy
from tppo_ref.rollout.packing import TokenBatch
from tppo_ref.rollout.torch_engine import TorchEngine, draw, uniform

SMALL = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
CONFIGS = {
    "qwen2": dict(model_type="qwen2", **SMALL),
    "qwen3": dict(model_type="qwen3", head_dim=16, **SMALL),
    "qwen3_moe": dict(model_type="qwen3_moe", head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, **SMALL),
    "granite": dict(model_type="granite", attention_multiplier=0.9, **SMALL),  # a scale of scores that is not 1/sqrt(D)
    "gpt2": dict(model_type="gpt2", vocab_size=40, n_embd=32, n_layer=2, n_head=4, n_positions=1024),
}
END = 0


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def policy_of(kind="qwen2", **options):
    model = load_policy(CONFIGS[kind], end_token_ids=(END,), **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.hf.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def policy():
    return policy_of()


def engine_of(policy, slots=16, **options):
    return TorchEngine(policy, slots=slots, max_context_tokens=512, end_token_ids=(END,), **options)


def request(response_id, prompt, max_new_tokens=20, response=(), run_seed=7, sample_index=0):
    seed = request_seed(run_seed, response_id, sample_index, len(response))
    return Request(
        response_id=response_id,
        token_ids=[*prompt, *response],
        max_new_tokens=max_new_tokens,
        seed=seed,
        num_response_tokens=len(response),
    )


def finish(engine):
    done = {}
    while engine.num_running:
        for d in engine.step():
            done[d.response_id] = d
    return done


def run(engine, requests):
    engine.submit(requests)
    return finish(engine)


def naive(policy, r, temperature=1.0, min_response_tokens=0):
    """Plain eager forward of the whole sequence for every token; sampling as the definition says, in Python floats."""
    hf, ids, tokens, logprobs = policy.hf, list(r.token_ids), [], []
    name = hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        while len(tokens) < r.max_new_tokens:
            logits = hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double() / temperature
            if r.num_response_tokens + len(tokens) < min_response_tokens:
                logits[END] = -torch.inf
            probs = torch.softmax(logits, -1).tolist()
            u, acc, token = float(uniform(np.array([r.seed + len(tokens)]))[0]), 0.0, None
            for v, p in enumerate(probs):
                acc += p
                if u < acc:
                    token = v
                    break
            tokens.append(token), ids.append(token), logprobs.append(float(np.log(probs[token])))
            if token == END:
                break
    hf.set_attn_implementation(name)
    return tokens, logprobs


def prompts(num, seed=0, longest=12):
    rng = random.Random(seed)
    return [[rng.randrange(1, 40) for _ in range(rng.randrange(1, longest))] for _ in range(num)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_tokens_and_logprobs_equal_a_naive_loop(kind):
    policy = policy_of(kind)
    requests = [request(i, p, max_new_tokens=5 + 3 * i) for i, p in enumerate(prompts(16))]
    done = run(engine_of(policy, temperature=0.8, min_response_tokens=3), requests)
    for r in requests:
        tokens, logprobs = naive(policy, r, temperature=0.8, min_response_tokens=3)
        d = done[r.response_id]
        assert d.token_ids == tokens
        np.testing.assert_allclose(d.logprobs, logprobs, atol=1e-5)
        assert d.end_token == (tokens[-1] == END)
        assert all(isinstance(x, float) for x in d.logprobs)
    ends = [done[r.response_id].end_token for r in requests]
    assert any(ends)
    assert not all(ends)


def test_logprobs_equal_the_policy_model(policy):
    options = dict(temperature=1.4, min_response_tokens=4)
    model = policy_of(**options)
    requests = [request(i, p, 60) for i, p in enumerate(prompts(16))]
    done = run(engine_of(model, **options), requests)
    batch = TokenBatch([r.token_ids for r in requests], [done[r.response_id].token_ids for r in requests])
    with torch.no_grad():
        logprob_BT = model(batch)
    for b, r in enumerate(requests):
        d = done[r.response_id]
        np.testing.assert_allclose(d.logprobs, logprob_BT[b, : len(d.token_ids)].numpy(), atol=1e-4)


def test_one_step_is_one_token_for_everybody_and_prefill_costs_none(policy):
    engine = engine_of(policy, min_response_tokens=10**6)
    engine.submit([request(0, [1, 2], 3), request(1, [3] * 40, 1)])
    assert engine.num_running == 2
    assert [(d.response_id, len(d.token_ids)) for d in engine.step()] == [(1, 1)]
    engine.submit([request(2, [4], 2)])
    assert engine.step() == []
    assert engine.num_running == 2
    assert sorted((d.response_id, len(d.token_ids)) for d in engine.step()) == [(0, 3), (2, 2)]
    assert engine.num_running == 0
    assert engine.step() == []


def test_neighbours_change_no_token(policy):
    requests = [request(i, p, 40) for i, p in enumerate(prompts(12))]
    together = run(engine_of(policy), requests)
    crowd = [request(100 + i, [5] * (30 * i + 1), 90) for i in range(4)]
    with_crowd = run(engine_of(policy), requests + crowd)
    for r in requests:
        alone = run(engine_of(policy), [r])[r.response_id]
        for other in (together, with_crowd):
            assert other[r.response_id].token_ids == alone.token_ids
            np.testing.assert_allclose(other[r.response_id].logprobs, alone.logprobs, atol=1e-5)


def test_identical_batches_are_bit_identical(policy):
    requests = [request(i, p, 40) for i, p in enumerate(prompts(12))]
    engine = engine_of(policy)
    first = run(engine, requests)
    engine.load_weights(None, 1)
    assert run(engine, requests) == first == run(engine_of(policy), requests)


@pytest.mark.parametrize("window", [1, 3, 16])
def test_cuts_change_no_token(policy, window):
    for i, prompt in enumerate(prompts(4)):
        whole = run(engine_of(policy, min_response_tokens=5), [request(i, prompt, 40)])[i]
        engine, tokens, logprobs, version = engine_of(policy, min_response_tokens=5), [], [], 0
        while len(tokens) < 40 and END not in tokens:
            part = run(engine, [request(i, prompt, min(window, 40 - len(tokens)), response=tokens)])[i]
            tokens, logprobs, version = tokens + part.token_ids, logprobs + part.logprobs, version + 1
            engine.load_weights(None, version)
        assert tokens == whole.token_ids
        np.testing.assert_allclose(logprobs, whole.logprobs, atol=1e-5)


def test_slots_refilled_at_once_give_what_fresh_engines_give(policy):
    """Rows come and go at every step: compaction, regrouping and growth of the cache must not mix rows up."""
    rng = random.Random(1)
    sizes = [(rng.choice([1, 3, 9, 150, 300]), rng.choice([1, 2, 5, 30, 150])) for _ in range(60)]
    requests = [request(i, [1 + rng.randrange(39)] * prompt, new) for i, (prompt, new) in enumerate(sizes)]
    waiting, done = list(requests), {}
    engine = engine_of(policy, slots=9, min_response_tokens=10)
    while waiting or engine.num_running:
        while waiting and engine.num_running < 9:
            engine.submit([waiting.pop(0)])
        done.update((d.response_id, d) for d in engine.step())
    assert len(done) == 60
    for r in requests:
        alone = run(engine_of(policy, min_response_tokens=10), [r])[r.response_id]
        assert done[r.response_id].token_ids == alone.token_ids, r.response_id
        np.testing.assert_allclose(done[r.response_id].logprobs, alone.logprobs, atol=1e-5)


def test_long_rows_do_not_share_a_group_with_short_ones(policy):
    engine = engine_of(policy)
    engine.submit([request(0, [1] * 400)] + [request(i, [2] * 5) for i in range(1, 16)])
    engine.step()
    assert engine._groups == [(0, 1), (1, 16)]


def test_load_weights_copies_drops_and_refuses(policy):
    engine = engine_of(policy_of())
    engine.submit([request(0, [1, 2], 4)])
    with pytest.raises(RuntimeError, match="1 requests run"):
        engine.load_weights(None, 1)
    before = finish(engine)[0]
    other = {n: p.detach() * 1.5 for n, p in engine.policy.hf.named_parameters()}
    engine.load_weights(other.items(), 2)
    assert engine.version == 2
    assert torch.equal(engine.policy.hf.model.norm.weight, other["model.norm.weight"])
    after = run(engine, [request(0, [1, 2], 4)])[0]
    tokens, logprobs = naive(engine.policy, request(0, [1, 2], 4))
    assert after.token_ids == tokens
    assert after.logprobs != before.logprobs
    np.testing.assert_allclose(after.logprobs, logprobs, atol=1e-5)
    with pytest.raises(ValueError, match="no tensor named 'nonsense'"):
        engine.load_weights({"nonsense": torch.zeros(1)}, 3)


def test_weights_trained_in_place_are_what_decodes_next():
    model = policy_of()
    engine = engine_of(model)
    run(engine, [request(0, [1, 2], 4)])
    model(TokenBatch([[1, 2]], [[3, 4]])).sum().backward()  # inference mode must leave nothing behind
    with torch.no_grad():
        for p in model.hf.parameters():
            p.add_(p.grad, alpha=0.01)
    engine.load_weights(dict(model.hf.named_parameters()), 1)
    tokens, _ = naive(model, request(0, [1, 2], 12))
    assert run(engine, [request(0, [1, 2], 12)])[0].token_ids == tokens


@pytest.mark.parametrize("least", [0, 1, 2])
def test_a_response_has_at_least_its_least_tokens_before_the_end_token(least):
    model = policy_of()
    with torch.no_grad():
        model.hf.lm_head.weight.zero_()
    model.hf.lm_head.bias = torch.nn.Parameter(torch.full((40,), -50.0).index_fill(0, torch.tensor([END]), 50.0))
    done = run(engine_of(model, min_response_tokens=least), [request(0, [1], 10)])[0]
    assert (len(done.token_ids), done.end_token) == (least + 1, True)


def test_min_response_tokens_counts_from_the_response_not_the_request(policy):
    """A policy that wants to end at once: it may at response position 3, in whichever request that falls."""
    model = policy_of()
    with torch.no_grad():
        model.hf.lm_head.weight.zero_()
        model.hf.model.norm.weight.zero_()
    model.hf.lm_head.bias = torch.nn.Parameter(torch.full((40,), -50.0).index_fill(0, torch.tensor([END]), 50.0))
    options = dict(min_response_tokens=3)
    whole = run(engine_of(model, **options), [request(0, [1], 10)])[0]
    assert len(whole.token_ids) == 4
    assert whole.end_token
    assert whole.logprobs[-1] == pytest.approx(0, abs=1e-6)
    assert whole.logprobs[0] == pytest.approx(-np.log(39), abs=1e-5)
    rest = run(engine_of(model, **options), [request(0, [1], 10, response=whole.token_ids[:2])])[0]
    assert rest.token_ids == whole.token_ids[2:]


def test_non_finite_logits_name_response_and_position():
    model = policy_of()
    engine = engine_of(model, min_response_tokens=100)
    engine.submit([request(41, [1], 9), request(42, [1, 2, 3], 9, response=[4, 5])])
    engine.step()
    with torch.no_grad():
        model.hf.lm_head.weight[3, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"response (41: .* position 1|42: .* position 3)$"):
        engine.step()


@pytest.mark.parametrize("broken", [41, 42, 43])
def test_of_several_rows_the_one_whose_logits_are_not_finite_is_named(broken):
    model = policy_of()
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[30] = torch.nan  # a token that stands in one prompt only
    engine = engine_of(model)
    engine.submit([request(i, [1, 30 if i == broken else 2, 3], 9) for i in (41, 42, 43)])
    with pytest.raises(FloatingPointError, match=rf"response {broken}: a logit is not finite at response position 0"):
        engine.step()


def test_a_logit_of_minus_infinity_stops_too():
    model = policy_of()
    model.hf.lm_head.bias = torch.nn.Parameter(torch.zeros(40).index_fill(0, torch.tensor([9]), -torch.inf))
    engine = engine_of(model)
    engine.submit([request(5, [1], 9)])
    with pytest.raises(FloatingPointError, match=r"response 5.*position 0"):
        engine.step()


def test_requests_that_cannot_be_served_are_refused(policy):
    engine = engine_of(policy, slots=2)
    with pytest.raises(ValueError, match="max_new_tokens = 0; expected 1"):
        engine.submit([request(0, [1], 0)])
    with pytest.raises(ValueError, match="0 tokens"):
        engine.submit([request(0, [], 1)])
    with pytest.raises(ValueError, match="exceed max_context_tokens = 512"):
        engine.submit([request(0, [1] * 500, 13)])
    with pytest.raises(ValueError, match="at most slots = 2 can"):
        engine.submit([request(i, [1], 5) for i in range(3)])
    assert engine.num_running == 0
    with pytest.raises(UserError, match="max_position_embeddings"):
        TorchEngine(policy, slots=2, max_context_tokens=10**6, end_token_ids=(END,))
    with pytest.raises(UserError, match=r"end_token_ids = \[40\]"):
        TorchEngine(policy, slots=2, max_context_tokens=64, end_token_ids=(40,))


def test_a_row_may_fill_the_context_to_the_last_token(policy):
    engine = TorchEngine(policy, slots=2, max_context_tokens=200, end_token_ids=(END,), min_response_tokens=1000)
    done = run(engine, [request(0, [1] * 130, 70), request(1, [2], 199)])
    assert [len(done[i].token_ids) for i in (0, 1)] == [70, 199]


def test_request_seed_is_stable_and_moves_with_the_position():
    assert request_seed(1, 2, 3, 0) == 8384462955522581546
    assert request_seed(1, 2, 3, 10) == (request_seed(1, 2, 3, 0) + 10) % 2**63
    assert len({request_seed(*x, 0) for x in [(1, 2, 3), (2, 1, 3), (1, 3, 2), (12, 3, 3), (1, 23, 3)]}) == 5
    assert 0 <= request_seed(2**70, -1, 0, 2**64) < 2**63


def splitmix64(x):
    """Steele, Lea and Flood 2014 in Python integers: the output for counter x."""
    mask = 2**64 - 1
    z = x * 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def test_uniform_is_splitmix64():
    assert splitmix64(1) == 0xE220A8397B1DCDAF  # the first output of the published generator from state 0
    seeds = [0, 1, 2, 12345, 2**62, 2**63 - 1]
    assert uniform(np.array(seeds)).tolist() == [(splitmix64(s) >> 11) / 2**53 for s in seeds]
    u = uniform(request_seed(0, 0, 0, 0) + np.arange(100_000))
    assert abs(u.mean() - 0.5) < 0.005
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.02
    assert u.min() >= 0
    assert u.max() < 1


def test_draw_follows_the_distribution_and_never_takes_probability_zero():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    n = 40_000
    u = torch.from_numpy(uniform(np.arange(n)))
    tokens, logprobs = draw(probs.log().expand(n, -1), u)
    frequency = torch.bincount(tokens, minlength=6) / n
    assert (frequency[[0, 2, 5]] == 0).all()
    torch.testing.assert_close(frequency, probs, atol=0.01, rtol=0)
    torch.testing.assert_close(logprobs, probs.log()[tokens])
    edges = torch.tensor([0.0, 0.49999, 0.50001, 0.70001, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(probs.log().expand(5, -1), edges)[0].tolist() == [1, 1, 3, 4, 4]


def test_draw_with_the_largest_uniform_number_stays_on_possible_tokens():
    """Totals on both sides of 1: the last token has probability 0 and must not be drawn even so."""
    logits = torch.randn(2000, 30, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 25:] = -torch.inf
    tokens, logprobs = draw(logits, torch.full((2000,), 1 - 2.0**-53, dtype=torch.float64))
    assert logprobs.isfinite().all()
    assert (tokens == 24).all()
