"""An fp8 cache: what it keeps, whose distribution the engine then samples from, and what the weight start / behaviour makes good.

Expectations are sums over all continuations, not samples.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import make_policy, make_trainer, one_thread, sharpen  # noqa: F401  (a fixture)
from test_engines import engine_of, finish, policy_of, prompts, request
from transformers import AttentionInterface
from transformers.models.qwen2.modeling_qwen2 import eager_attention_forward

from tppo_ref.loop.forward import clip_centre, forward
from tppo_ref.loop.parallel import SingleProcess
from tppo_ref.loop.rows import Rows
from tppo_ref.loop.settings import AdvantageConfig, PolicyConfig
from tppo_ref.method.errors import UserError
from tppo_ref.method.losses import policy_loss
from tppo_ref.method.records import Prompt, Response, WindowSlice
from tppo_ref.rollout import torch_engine
from tppo_ref.rollout.attention import through_fp8
from tppo_ref.rollout.engine import Request
from tppo_ref.rollout.packing import TokenBatch
from tppo_ref.rollout.torch_engine import TorchEngine
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.validation import check

pytestmark = pytest.mark.usefixtures("one_thread")

# ------------------------------------------------------------------------------------------------------------ what is kept

POSITIVE = sorted(
    {m / 8 * 2.0**-6 for m in range(8)} | {(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)} - {480.0}
)
TABLE = np.array([*(-x for x in reversed(POSITIVE) if x), *POSITIVE])
"""Every finite number of e4m3: subnormal ones, and (1 + m/8) 2^(e-7); the code of 480 is NaN."""


def nearest(x: torch.Tensor) -> torch.Tensor:
    """The number of `TABLE` that is closest. Between two it is either."""
    place = np.abs(x.detach().double().numpy()[..., None] - TABLE).argmin(-1)
    return torch.from_numpy(TABLE[place]).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_kept_is_the_closest_number_that_e4m3_has_and_large_ones_are_its_largest(dtype):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4000, generator=generator) * torch.exp(3 * torch.randn(4000, generator=generator))).to(dtype)
    x = torch.cat([x, torch.tensor([0.0, 448.0, 460.0, -1e6, torch.inf, 2.0**-9, 2.0**-11], dtype=dtype)])
    kept = through_fp8(x)
    assert kept.dtype == dtype
    assert len(TABLE) == 253
    torch.testing.assert_close((kept - x).abs(), (nearest(x) - x).abs(), rtol=0, atol=0)
    assert torch.equal(through_fp8(kept), kept)
    assert kept[-7:].tolist() == [0.0, 448.0, 448.0, -448.0, 448.0, 2.0**-9, 0.0]
    assert bool(through_fp8(torch.tensor([torch.nan])).isnan())


# -------------------------------------------------------------------------------------------------- who samples, by definition


def rounding_attention(module, query, key, value, mask, **options):
    later = torch.full((query.shape[2], key.shape[2]), -torch.inf).triu(1)[None, None]
    return eager_attention_forward(module, query, nearest(key), nearest(value), later, **options)


def whole_sequence_logprobs(policy, prompt, response, attention: str) -> list[float]:
    """Of transformers' own model, one plain forward pass; every key and value it attends to went through `attention`."""
    name = policy.hf.config._attn_implementation
    policy.hf.set_attn_implementation(attention)
    with torch.no_grad():
        logits = policy.hf(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0].log_softmax(-1)
    policy.hf.set_attn_implementation(name)
    return [float(logits[len(prompt) - 1 + t, token]) for t, token in enumerate(response)]


def test_a_quantised_engine_samples_from_the_policy_that_reads_every_key_and_value_rounded_in_whatever_windows():
    AttentionInterface.register("rounding", rounding_attention)
    policy = policy_of()
    said: list[dict[int, tuple[list[int], list[float]]]] = []
    for window in (24, 5):
        engine, rows = engine_of(policy, kv_cache="fp8"), {i: ([], []) for i in range(8)}
        while going := [i for i, (ids, _) in rows.items() if len(ids) < 24 and 0 not in ids]:
            engine.submit([request(i, prompts(8)[i], min(window, 24 - len(rows[i][0])), response=rows[i][0]) for i in going])
            for i, done in finish(engine).items():
                rows[i][0].extend(done.token_ids)
                rows[i][1].extend(done.logprobs)
        said.append(rows)
    gaps = []
    for i, (ids, logprobs) in said[0].items():
        assert said[1][i][0] == ids, "a window's edge changed what is sampled"
        np.testing.assert_allclose(said[1][i][1], logprobs, atol=1e-5)
        np.testing.assert_allclose(logprobs, whole_sequence_logprobs(policy, prompts(8)[i], ids, "rounding"), atol=1e-5)
        gaps += np.abs(np.array(logprobs) - whole_sequence_logprobs(policy, prompts(8)[i], ids, "eager")).tolist()
    assert len(gaps) > 80
    assert float(np.mean(gaps)) > 1e-3, "rounding is to be seen here, or nothing above was tested"


# --------------------------------------------------------------------------------------- the expected gradient, every outcome

PROMPT = Prompt(id=0, token_ids=(3, 7, 12), answer="")


@pytest.fixture(scope="module")
def toy():
    """(policy, q, p): probabilities of each next token behind each prefix of at most one token, by the quantised engine and by the
    plain one. In float64."""
    policy = make_policy().double()
    sharpen(policy.hf, seed=2, scale=0.5)  # attention that looks somewhere: rounding then moves log-probabilities by tenths
    vocab, seen = policy.hf.config.vocab_size, {}

    def whole(logits_nV, uniform_n):
        seen["logprobs"] = logits_nV.log_softmax(-1)
        return draw(logits_nV, uniform_n)

    draw, torch_engine.draw = torch_engine.draw, whole
    try:
        tables = []
        for kind in ("fp8", "auto"):
            engine = TorchEngine(policy, slots=1, max_context_tokens=16, end_token_ids=(0,), kv_cache=kind)
            table = {}
            for prefix in [(), *((token,) for token in range(1, vocab))]:
                engine.submit([Request(response_id=0, token_ids=[*PROMPT.token_ids, *prefix], max_new_tokens=1, seed=1)])
                finish(engine)
                table[prefix] = seen["logprobs"][0].exp()
            tables.append(table)
    finally:
        torch_engine.draw = draw
    return policy, *tables


def advantage(prefix, token) -> float:
    """Any number that depends on both, of either sign."""
    return math.sin(1 + 5 * sum(prefix) + 3 * token)


def expected_update(policy, behaviour, states, **settings) -> torch.Tensor:
    """The expected gradient of the loss that the update computes, at its first step: over all tokens behind all prefixes, each with
    the chance that `behaviour` samples it there; prefixes have the chances `states`.

    Each row is a response whose last token alone has yet to train. Chances go into the advantages, in which the loss is linear.
    """
    config = PolicyConfig(clip_low=0.2, clip_high=0.28, **settings)
    pairs = [(prefix, token) for prefix, q in behaviour.items() for token in range(len(q))]
    slices, chance = [], []
    for number, (prefix, token) in enumerate(pairs):
        ids, logprobs = [*prefix, token], [-1.0] * len(prefix) + [float(behaviour[prefix][token].log())]
        response = Response(id=number, prompt=PROMPT, sample_index=0, token_ids=ids, logprobs=logprobs, num_settled=len(prefix))
        slices.append(WindowSlice(response, len(prefix), len(ids)))
        chance.append(float(states[prefix] * behaviour[prefix][token]) * advantage(prefix, token))
    rows = Rows.of(slices, AdvantageConfig(tail_tokens=0), dtype=torch.float64)
    plan = [[list(range(len(pairs)))]]
    nothing = lambda batch: (torch.zeros(rows.run_BT.shape, dtype=torch.float64), torch.zeros(len(pairs), dtype=torch.float64))  # noqa: E731
    before = forward(rows, plan, config, policy=policy, value=nothing, parallel=SingleProcess(), key=(0, 1))
    centre = clip_centre(rows, before.logprob_BT, config)
    advantages_BT = torch.zeros(rows.run_BT.shape, dtype=torch.float64)
    advantages_BT[rows.train_BT] = torch.tensor(chance, dtype=torch.float64)
    policy.zero_grad()
    loss, _ = policy_loss(
        policy(rows.batch(plan[0][0])), centre.logprob_BT, advantages_BT, rows.train_BT, denominator=1.0, clip_low=config.clip_low,
        clip_high=config.clip_high, dual_clip=None, weight_BT=centre.weight_BT, start_logprob_BT=centre.start_BT,
    )  # fmt: skip
    loss.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def policy_gradient(policy, states) -> torch.Tensor:
    """Minus the gradient of sum over prefixes of chance x sum over tokens of pi(token | prefix) A: no sampler in it."""
    policy.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for prefix, chance in states.items():
        ids = [[*prefix, token] for token in range(policy.hf.config.vocab_size)]
        logprob_B = policy(TokenBatch([PROMPT.token_ids] * len(ids), ids))[:, len(prefix)]
        a_B = torch.tensor([advantage(prefix, row[-1]) for row in ids], dtype=torch.float64)
        total = total - float(chance) * (logprob_B.exp() * a_B).sum()
    total.backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def off(found: torch.Tensor, right: torch.Tensor) -> float:
    return float((found - right).norm() / right.norm())


def states_of(table) -> dict:
    """Chances of the prefixes of at most one token."""
    return {prefix: 1.0 if prefix == () else float(table[()][prefix[0]]) for prefix in table}


def test_with_the_weight_the_expected_gradient_behind_every_prefix_is_the_unquantised_engines_and_without_it_is_not(toy):
    policy, quantised, plain = toy
    states = states_of(quantised)
    right = policy_gradient(policy, states)
    assert off(expected_update(policy, plain, states), right) < 1e-12
    for kind in ("truncated", "masked"):
        assert off(expected_update(policy, quantised, states, importance=kind, importance_cap=1e9), right) < 1e-12, kind
    assert off(expected_update(policy, quantised, states), right) > 0.01, "the test must be able to fail"
    assert off(expected_update(policy, quantised, states, importance="truncated", importance_cap=1.0), right) > 1e-3, (
        "a cap is a bias"
    )


def test_the_engines_numbers_in_the_clips_centre_take_rounding_for_a_step_of_the_policy(toy):
    """Where rounding alone has left the clip's range the gradient is gone: why that pair is refused."""
    policy, quantised, _ = toy
    states = states_of(quantised)
    found = expected_update(policy, quantised, states, old_logprobs="engine", engine_gap_limit=10.0)
    assert off(found, policy_gradient(policy, states)) > 0.01


def test_what_a_weight_per_token_leaves_is_the_chance_of_the_prefix(toy):
    """Whole responses of two tokens, a return for each: the product of the weights is exact, a token's own weight is not, and is
    closer than none."""
    policy, quantised, plain = toy
    vocab = policy.hf.config.vocab_size
    whole = [(a, b) for a, b in itertools.product(range(1, vocab), range(vocab))]
    logprob_BT = policy(TokenBatch([PROMPT.token_ids] * len(whole), [list(pair) for pair in whole]))
    returns_B1 = torch.tensor([[math.sin(5 * a + 3 * b)] for a, b in whole], dtype=torch.float64)
    q_BT, p_BT = (torch.stack([torch.stack([t[()][a], t[a,][b]]) for a, b in whole]) for t in (quantised, plain))
    chance_B1, ratio_BT = q_BT.prod(1, keepdim=True), p_BT / q_BT

    def gradient(weight_BT):
        loss = -(chance_B1 * weight_BT * returns_B1 * logprob_BT).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True)])

    loss = -(p_BT.prod(1, keepdim=True) * returns_B1 * logprob_BT).sum()
    right = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True)])
    none, token, product = (off(gradient(w), right) for w in (torch.ones_like(ratio_BT), ratio_BT, ratio_BT.prod(1, keepdim=True)))
    assert product < 1e-9
    assert product < token < none


# --------------------------------------------------------------------------------------------------------------- whole steps


def test_a_step_shows_the_gap_and_the_share_of_weights_that_were_capped():
    found = {}
    for kind, cap in (("auto", 1.0), ("fp8", 1.0), ("fp8", 1e9)):
        trainer = make_trainer(policy__importance="truncated", policy__importance_cap=cap, rollout__kv_cache=kind)
        found[kind, cap] = trainer.step()
    assert found["auto", 1.0]["policy/logprob_gap"] < 1e-5
    assert found["fp8", 1.0]["policy/logprob_gap"] == found["fp8", 1e9]["policy/logprob_gap"] > 1e-3
    assert 0.1 < found["fp8", 1.0]["policy/weight_clipped_share"] < 0.9
    assert found["fp8", 1e9]["policy/weight_clipped_share"] == 0


@pytest.mark.parametrize(
    ("changes", "field"),
    [({}, "rollout.kv_cache"), ({"policy.old_logprobs": "engine"}, "rollout.kv_cache"),
     ({"policy.old_logprobs": "engine", "policy.importance": "truncated"}, "policy.old_logprobs")],
)  # fmt: skip
def test_an_fp8_cache_without_a_weight_is_refused_in_one_line_that_says_which(changes, field):
    with pytest.raises(UserError) as error:
        check(replace_fields(Config(), {"rollout.kv_cache": "fp8", **changes}))
    line = str(error.value)
    assert line.startswith(f"{field}: got ")
    assert "\n" not in line
    assert "{" not in line
    if field == "rollout.kv_cache":
        assert "policy.importance truncated" in line


@pytest.mark.parametrize("kind", ["truncated", "masked", "generalised"])
def test_an_fp8_cache_passes_with_any_weight(kind):
    check(replace_fields(Config(), {"rollout.kv_cache": "fp8", "policy.importance": kind}))
