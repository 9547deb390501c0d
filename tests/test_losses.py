"""losses.py against hand numbers, finite differences, tables of every clip case, and the laws of denominators and masks."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tppo_ref.method.losses import importance_weights, policy_loss, positive_lm_loss, value_loss

LAW = settings(max_examples=50, deadline=None)
F64 = torch.float64
NAN = float("nan")


def row(*numbers: float) -> torch.Tensor:
    return torch.tensor([numbers], dtype=F64)


def gradient(loss: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, of)[0]


def finite_differences(function, x: torch.Tensor, step: float = 1e-6) -> torch.Tensor:
    """Central differences of a scalar function, one entry at a time: error about step^2."""
    out = torch.zeros_like(x)
    for index in torch.cartesian_prod(*map(torch.arange, x.shape)).tolist():
        move = torch.zeros_like(x)
        move[tuple(index)] = step
        out[tuple(index)] = (function(x + move) - function(x - move)).detach() / (2 * step)
    return out


def close(actual, expected, atol: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=F64)
    torch.testing.assert_close(torch.as_tensor(actual).detach().to(F64), expected, rtol=0, atol=atol)


# -------------------------------------------------------------------------------------------------------- policy loss

# clip 0.2 / 0.28, dual clip 10. Surrogate and its derivative in log ratio, which is ratio * A where it is not clipped.
#   A    ratio   min(ratio A, clip(ratio, 0.8, 1.28) A)
POLICY_CASES = [
    (+2.0, 1.0, 2.0, 2.0, "A > 0, on policy"),
    (+2.0, 0.9, 1.8, 1.8, "A > 0, inside"),
    (+2.0, 1.25, 2.5, 2.5, "A > 0, inside: above 1 + clip_low, below 1 + clip_high"),
    (+2.0, 1.5, 2.56, 0.0, "A > 0, above: clipped"),
    (+2.0, 0.5, 1.0, 1.0, "A > 0, below: the pessimist keeps the small ratio"),
    (+2.0, 0.01, 0.02, 0.02, "A > 0, far below: no dual clip"),
    (+2.0, 12.0, 2.56, 0.0, "A > 0, far above: no dual clip"),
    (-2.0, 1.0, -2.0, -2.0, "A < 0, on policy"),
    (-2.0, 0.9, -1.8, -1.8, "A < 0, inside"),
    (-2.0, 0.75, -1.6, 0.0, "A < 0, below 1 - clip_low, above 1 - clip_high: clipped"),
    (-2.0, 0.5, -1.6, 0.0, "A < 0, below: clipped"),
    (-2.0, 1.5, -3.0, -3.0, "A < 0, above: the pessimist keeps the large ratio"),
    (-2.0, 9.5, -19.0, -19.0, "A < 0, just below the dual clip"),
    (-2.0, 12.0, -20.0, 0.0, "A < 0, above the dual clip: clipped"),
    (0.0, 12.0, 0.0, 0.0, "A = 0"),
]
policy_cases = pytest.mark.parametrize(
    ("advantage", "ratio", "surrogate", "slope"), [pytest.param(*case[:4], id=case[4]) for case in POLICY_CASES]
)


@policy_cases
def test_every_case_of_the_clipped_surrogate_in_value_and_gradient(advantage, ratio, surrogate, slope):
    old = row(-1.5)
    logprob = (old + math.log(ratio)).requires_grad_()
    loss, _ = policy_loss(logprob, old, row(advantage), torch.tensor([[True]]), denominator=4)
    assert loss.shape == ()
    close(loss, -surrogate / 4)
    close(gradient(loss, logprob), [[-slope / 4]])


@policy_cases
def test_without_a_dual_clip_a_negative_advantage_has_no_floor(advantage, ratio, surrogate, slope):
    old = row(-1.5)
    logprob = (old + math.log(ratio)).requires_grad_()
    loss, _ = policy_loss(logprob, old, row(advantage), torch.tensor([[True]]), denominator=4, dual_clip=None)
    if advantage < 0 and ratio == 12.0:
        surrogate = slope = -24.0
    close(loss, -surrogate / 4)
    close(gradient(loss, logprob), [[-slope / 4]])


def test_the_defaults_are_the_papers():
    defaults = {name: p.default for name, p in inspect.signature(policy_loss).parameters.items() if p.kind == p.KEYWORD_ONLY}
    expected = {"denominator": inspect.Parameter.empty, "clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0}
    assert defaults == expected | {"weight_BT": None, "start_logprob_BT": None}
    defaults = inspect.signature(value_loss).parameters
    assert (defaults["clip_low"].default, defaults["clip_high"].default) == (0.5, 0.6)


# The policy before the update makes the token twice as likely as its sampler did: the clip, 0.1 either way, lies around 2.
#   A    ratio to the sampler   min(ratio A, clip(ratio, 1.9, 2.1) A)
GEPPO_CASES = [
    (+2.0, 2.0, 4.0, 4.0, "A > 0, before the update: PPO's clip around 1 would take this gradient"),
    (+2.0, 2.05, 4.1, 4.1, "A > 0, inside"),
    (+2.0, 2.5, 4.2, 0.0, "A > 0, above: clipped"),
    (+2.0, 1.0, 2.0, 2.0, "A > 0, below: the pessimist keeps the small ratio"),
    (-2.0, 2.0, -4.0, -4.0, "A < 0, before the update"),
    (-2.0, 1.5, -3.8, 0.0, "A < 0, below: clipped"),
    (-2.0, 3.0, -6.0, -6.0, "A < 0, above: the pessimist keeps the large ratio"),
    (-2.0, 12.0, -20.0, 0.0, "A < 0, above the dual clip, which stays where it is"),
]


@pytest.mark.parametrize(
    ("advantage", "ratio", "surrogate", "slope"), [pytest.param(*case[:4], id=case[4]) for case in GEPPO_CASES]
)
def test_geppo_clips_around_the_ratio_before_the_update(advantage, ratio, surrogate, slope):
    behaviour, mask = row(-1.5), torch.tensor([[True]])
    logprob = (behaviour + math.log(ratio)).requires_grad_()
    loss, _ = policy_loss(
        logprob, behaviour, row(advantage), mask, denominator=4, clip_low=0.1, clip_high=0.1,
        start_logprob_BT=behaviour + math.log(2),
    )  # fmt: skip
    close(loss, -surrogate / 4)
    close(gradient(loss, logprob), [[-slope / 4]])


def test_geppo_on_the_policys_own_tokens_is_ppo():
    logprob, old = row(-1.0, -2.0, -0.5), row(-1.3, -1.9, -0.9)
    args = row(1.0, -2.0, 0.5), torch.tensor([[True, True, False]])
    ours, theirs = (policy_loss(logprob, old, *args, denominator=2, start_logprob_BT=x) for x in (old, None))
    close(ours[0], theirs[0])
    assert ours[1] == theirs[1]


def test_no_gradient_flows_into_the_middle_of_the_clip_and_outside_the_mask_nothing_is_read():
    start = row(-1.0, NAN).requires_grad_()
    logprob, behaviour = row(-1.0, 0.0).requires_grad_(), row(-3.0, 2.0)
    args = behaviour, row(1.0, 1.0), torch.tensor([[True, False]])
    loss, _ = policy_loss(logprob, *args, denominator=1, start_logprob_BT=start)
    close(loss, -math.exp(2))
    assert torch.autograd.grad(loss, start, allow_unused=True) == (None,)
    with pytest.raises(ValueError, match="start_logprob_BT"):
        policy_loss(logprob, *args, denominator=1, start_logprob_BT=row(0.0))


def test_policy_loss_by_hand_over_rows_weights_and_mask():
    # ratio 1, 1.5, 0.5 | 12, 1;   A = 1, 2, -1 | -3, 5;   weights 1, 0.5, 2 | 1, 0.25;   the last token is masked
    # surrogates 1, 1.28 * 2 = 2.56, -0.8 | -30, -;   weighted sum 1 + 1.28 - 1.6 - 30 = -29.32;   loss 29.32 / 8
    old = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, -1.0, NAN]], dtype=F64)
    ratio = torch.tensor([[1.0, 1.5, 0.5], [12.0, 1.0, 1.0]], dtype=F64)
    advantages = torch.tensor([[1.0, 2.0, -1.0], [-3.0, 5.0, NAN]], dtype=F64)
    weight = torch.tensor([[1.0, 0.5, 2.0], [1.0, 0.25, 1.0]], dtype=F64)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    loss, stats = policy_loss(old + ratio.log(), old, advantages, mask, denominator=8.0, weight_BT=weight)
    close(loss, 29.32 / 8)
    # the clip binds at 1.5 and 0.5, the dual clip at 12;   k3 = ratio - 1 - log ratio;   weights count in none of them
    assert (stats["clipped_tokens"], stats["dual_clipped_tokens"]) == (2, 1)
    assert stats["ratio_max"] == pytest.approx(12)
    assert stats["kl_sum"] == pytest.approx(0.5 - math.log(1.5) + -0.5 - math.log(0.5) + 11 - math.log(12))


def test_clip_bounds_and_dual_clip_are_arguments():
    old, mask = row(0.0, 0.0, 0.0), torch.tensor([[True, True, True]])
    ratio, advantages = row(2.0, 0.5, 4.0), row(1.0, -1.0, -1.0)
    loss, _ = policy_loss(
        ratio.log(), old, advantages, mask, denominator=1, clip_low=0.1, clip_high=0.5, dual_clip=3.0
    )  # fmt: skip
    close(loss, -(1.5 - 0.9 - 3.0))


def random_policy_batch(seed: int, shape: tuple[int, int] = (3, 5)) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    old = -torch.rand(shape, generator=g, dtype=F64) * 3
    return {
        "logprob_BT": old + 0.5 * torch.randn(shape, generator=g, dtype=F64),
        "old_logprob_BT": old,
        "advantages_BT": torch.randn(shape, generator=g, dtype=F64),
        "mask_BT": torch.rand(shape, generator=g) < 0.7,
        "weight_BT": torch.rand(shape, generator=g, dtype=F64) * 2,
    }


@pytest.mark.parametrize("seed", range(5))
def test_the_policy_gradient_is_what_finite_differences_say(seed):
    batch = random_policy_batch(seed)
    batch["logprob_BT"][0, 0] = batch["old_logprob_BT"][0, 0] + 3.0  # one ratio of 20, for the dual clip
    logprob = batch.pop("logprob_BT")

    def loss_of(x):
        return policy_loss(x, **batch, denominator=7)[0]

    leaf = logprob.clone().requires_grad_()
    close(gradient(loss_of(leaf), leaf), finite_differences(loss_of, logprob), atol=1e-7)


@LAW
@given(st.integers(0, 2**31), st.floats(0.5, 100.0))
def test_at_ratio_1_the_gradient_is_minus_advantage_over_the_denominator(seed, denominator):
    """On policy the surrogate is the policy gradient, whatever the clips."""
    batch = random_policy_batch(seed)
    batch["logprob_BT"] = batch["old_logprob_BT"].clone().requires_grad_()
    weight = batch.pop("weight_BT")
    expected = (-batch["advantages_BT"] / denominator).where(batch["mask_BT"], 0.0)
    loss, _ = policy_loss(**batch, denominator=denominator)
    close(gradient(loss, batch["logprob_BT"]), expected)
    loss, _ = policy_loss(**batch, denominator=denominator, weight_BT=weight)
    close(gradient(loss, batch["logprob_BT"]), expected * weight)


@LAW
@given(st.integers(0, 2**31))
def test_unit_weights_are_no_weights(seed):
    batch = random_policy_batch(seed)
    batch["weight_BT"] = torch.ones_like(batch["weight_BT"])
    weighted, _ = policy_loss(**batch, denominator=3)
    batch["weight_BT"] = None
    close(weighted, policy_loss(**batch, denominator=3)[0].item())


def test_a_ratio_beyond_the_floats_is_clipped_like_any_other():
    """exp(200) is infinite in float32; where the clip holds, value and gradient are those of the bound."""
    logprob = torch.tensor([[0.0, 0.0]], requires_grad=True)
    old, advantages = torch.tensor([[-200.0, -200.0]]), torch.tensor([[2.0, -2.0]])
    loss, _ = policy_loss(logprob, old, advantages, torch.tensor([[True, True]]), denominator=1)
    close(loss, -2.56 + 20.0, atol=1e-5)
    close(gradient(loss, logprob), [[0.0, 0.0]])


# --------------------------------------------------------------------------------------------------------- value loss

# old value 0, clip 0.5 down / 0.6 up:   0.5 max((v - R)^2, (clip(v, -0.5, 0.6) - R)^2), and its derivative in v
VALUE_CASES = [
    (0.3, 1.0, 0.245, -0.7, "inside: both are 0.7^2"),
    (-0.3, -1.0, 0.245, 0.7, "inside, below"),
    (0.55, 1.0, 0.10125, -0.45, "inside: above clip_low, below clip_high"),
    (-0.55, -1.0, 0.125, 0.0, "below -clip_low, above -clip_high: clipped, 0.5 * 0.5^2"),
    (1.0, 2.0, 0.98, 0.0, "above, towards R: clipped, 0.5 * 1.4^2"),
    (1.0, 0.0, 0.5, 1.0, "above, away from R: the larger error counts, 0.5 * 1^2"),
    (-1.0, -2.0, 1.125, 0.0, "below, towards R: clipped, 0.5 * 1.5^2"),
    (-1.0, 0.0, 0.5, -1.0, "below, away from R"),
    (1.0, 0.7, 0.045, 0.3, "above, R between bound and v, nearer to the bound: 0.5 * 0.3^2"),
    (1.0, 0.9, 0.045, 0.0, "above, R between bound and v, nearer to v: clipped, 0.5 * 0.3^2"),
]


@pytest.mark.parametrize(("value", "target", "loss", "slope"), [pytest.param(*c[:4], id=c[4]) for c in VALUE_CASES])
def test_every_case_of_the_clipped_value_loss_in_value_and_gradient(value, target, loss, slope):
    for old in (0.0, 3.0):  # the clip is around the old value, wherever that is
        values = row(old + value).requires_grad_()
        actual, stats = value_loss(values, row(old), row(old + target), torch.tensor([[True]]), denominator=4)
        assert actual.shape == ()
        assert stats == {"value_clipped_tokens": float(slope == 0)}  # tokens whose gradient the clip took
        close(actual, loss / 4)
        close(gradient(actual, values), [[slope / 4]])


@pytest.mark.parametrize(
    ("value", "target", "low", "high"), [pytest.param(*c[:2], *bounds, id=f"{bounds}, {c[4]}") for c in VALUE_CASES for bounds in [(None, 0.6), (0.5, None)]]
)  # fmt: skip
def test_a_clip_of_one_side_leaves_the_other_free(value, target, low, high):
    held = value if (low is None and value < 0) or (high is None and value > 0) else min(max(value, -0.5), 0.6)
    values = row(value).requires_grad_()
    loss, _ = value_loss(values, row(0.0), row(target), torch.tensor([[True]]), denominator=1, clip_low=low, clip_high=high)
    larger, further = (value - target) ** 2, (held - target) ** 2
    close(loss, max(larger, further) / 2)
    close(gradient(loss, values), [[value - target if larger >= further else 0.0]])


@pytest.mark.parametrize("how", [{"old": None}, {"clip_low": None, "clip_high": None}])
def test_unclipped_value_loss_is_half_the_squared_error(how):
    values = row(1.0, -2.0, 0.25).requires_grad_()
    old = None if "old" in how else row(0.0, 0.0, 0.0)
    clips = {name: bound for name, bound in how.items() if name != "old"}
    loss, _ = value_loss(values, old, row(2.0, -5.0, 0.25), torch.tensor([[True, True, True]]), denominator=4, **clips)
    close(loss, (0.5 + 4.5) / 4)
    close(gradient(loss, values), [[-0.25, 0.75, 0.0]])


def random_value_batch(seed: int, shape: tuple[int, int] = (3, 5)) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    values, old, returns = (torch.randn(shape, generator=g, dtype=F64) for _ in range(3))
    mask = torch.rand(shape, generator=g) < 0.7
    return {"values_BT": values, "old_values_BT": old, "returns_BT": returns, "mask_BT": mask}


@pytest.mark.parametrize("seed", range(5))
def test_the_value_gradient_is_what_finite_differences_say(seed):
    batch = random_value_batch(seed)
    values = batch.pop("values_BT")

    def loss_of(x):
        return value_loss(x, **batch, denominator=7, clip_low=0.4, clip_high=0.9)[0]

    leaf = values.clone().requires_grad_()
    close(gradient(loss_of(leaf), leaf), finite_differences(loss_of, values), atol=1e-7)


@LAW
@given(st.integers(0, 2**31))
def test_the_clipped_value_loss_is_never_below_the_unclipped(seed):
    batch = random_value_batch(seed)
    clipped, _ = value_loss(**batch, denominator=1)
    batch["old_values_BT"] = None
    assert clipped >= value_loss(**batch, denominator=1)[0] - 1e-12


# ---------------------------------------------------------------------------------------------- positive-example loss


def test_positive_lm_loss_by_hand():
    logprob = torch.tensor([[-1.0, -2.0], [-4.0, NAN]], dtype=F64, requires_grad=True)
    loss = positive_lm_loss(logprob, torch.tensor([[True, False], [True, False]]), denominator=10)
    assert loss.shape == ()
    close(loss, 0.5)
    close(gradient(loss, logprob), [[-0.1, 0.0], [-0.1, 0.0]])


# ------------------------------------------------------------------------- laws of all losses: masks and denominators


def random_lm_batch(seed: int, shape: tuple[int, int] = (3, 5)) -> dict[str, torch.Tensor]:
    batch = random_policy_batch(seed, shape)
    return {"logprob_BT": batch["logprob_BT"], "mask_BT": batch["mask_BT"]}


LOSSES = {
    "policy_loss": (lambda **kw: policy_loss(**kw)[0], random_policy_batch),
    "value_loss": (lambda **kw: value_loss(**kw)[0], random_value_batch),
    "positive_lm_loss": (positive_lm_loss, random_lm_batch),
}
all_losses = pytest.mark.parametrize("name", LOSSES)


def with_leaf(batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The batch with its first tensor, the model's output, as a fresh leaf."""
    first = next(iter(batch))
    leaf = batch[first].detach().clone().requires_grad_()
    return batch | {first: leaf}, leaf


@all_losses
@pytest.mark.parametrize("garbage", [NAN, float("inf"), -float("inf"), 1e300])
def test_masked_out_entries_change_neither_loss_nor_gradient_whatever_they_are(name, garbage):
    loss_of, make = LOSSES[name]
    batch = make(11)
    mask = batch["mask_BT"]
    assert 0 < mask.sum() < mask.numel()
    clean, leaf = with_leaf(batch)
    dirty, dirty_leaf = with_leaf({key: x if key == "mask_BT" else x.where(mask, garbage) for key, x in batch.items()})
    loss, dirty_loss = loss_of(**clean, denominator=3), loss_of(**dirty, denominator=3)
    assert torch.equal(loss, dirty_loss)
    dirty_gradient = gradient(dirty_loss, dirty_leaf)
    assert torch.equal(dirty_gradient, gradient(loss, leaf))
    assert (dirty_gradient[~mask] == 0).all()
    assert dirty_gradient[mask].any()


@all_losses
@LAW
@given(seed=st.integers(0, 2**31), lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6), parts=st.integers(1, 4))
def test_micro_batches_that_share_a_denominator_equal_one_batch(name, seed, lengths, parts):
    """In value and gradient, each part padded to its own width: no mean of means, on unequal lengths."""
    loss_of, make = LOSSES[name]
    batch = make(seed, (len(lengths), max(lengths)))
    batch["mask_BT"] = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    denominator = max(1, sum(lengths))
    whole, leaf = with_leaf(batch)
    loss = loss_of(**whole, denominator=denominator)
    total, parts_gradient = torch.zeros((), dtype=F64), torch.zeros_like(leaf)
    for rows in torch.arange(len(lengths)).tensor_split(parts):
        width = max([lengths[i] for i in rows], default=0)
        part, part_leaf = with_leaf({key: x[rows, :width] for key, x in batch.items()})
        part_loss = loss_of(**part, denominator=denominator)
        total = total + part_loss.detach()
        parts_gradient[rows, :width] = gradient(part_loss, part_leaf)
    close(total, loss.detach())
    close(parts_gradient, gradient(loss, leaf))


@all_losses
@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)])
def test_an_empty_micro_batch_weighs_nothing_and_still_runs_backward(name, shape):
    """Under FSDP every rank runs as many micro-batches as the busiest: the spare ones are empty."""
    loss_of, make = LOSSES[name]
    batch = make(0, shape)
    batch["mask_BT"] = torch.zeros(shape, dtype=torch.bool)
    batch, leaf = with_leaf(batch)
    loss = loss_of(**batch, denominator=5)
    assert loss.item() == 0
    assert torch.equal(gradient(loss, leaf), torch.zeros(shape, dtype=F64))


@all_losses
def test_the_denominator_is_the_argument_not_a_count(name):
    loss_of, make = LOSSES[name]
    batch = make(3)
    close(loss_of(**batch, denominator=1), 8 * loss_of(**batch, denominator=8).detach())


@all_losses
@pytest.mark.parametrize("denominator", [0, 0.0, -1, NAN, float("inf"), -float("inf")])
def test_a_denominator_that_is_not_a_positive_number_is_an_error(name, denominator):
    loss_of, make = LOSSES[name]
    with pytest.raises(ValueError, match=r"^denominator: got .+; expected .+"):
        loss_of(**make(3), denominator=denominator)


@all_losses
def test_a_tensor_of_another_shape_or_a_mask_that_is_no_bool_is_named(name):
    """Broadcasting would train the wrong tokens in silence."""
    loss_of, make = LOSSES[name]
    good = make(3)
    for argument in good:
        wrong = good[argument][:1]  # [1, T], which would broadcast
        # A mask that is too small makes every other tensor too large: the first of them is named.
        named = next(iter(good)) if argument == "mask_BT" else argument
        with pytest.raises(ValueError, match=rf"^{named}: got .+; expected .+"):
            loss_of(**good | {argument: wrong}, denominator=3)
    with pytest.raises(ValueError, match=r"^mask_BT: got .+; expected .+"):
        loss_of(**good | {"mask_BT": good["mask_BT"].double()}, denominator=3)


@pytest.mark.parametrize("name", ["policy_loss", "value_loss"])
def test_statistics_are_finite_numbers_that_carry_no_graph(name):
    function, make = {"policy_loss": policy_loss, "value_loss": value_loss}[name], LOSSES[name][1]
    batch = make(11)
    batch = {key: x if key == "mask_BT" else x.where(batch["mask_BT"], NAN) for key, x in batch.items()}
    for mask in (batch["mask_BT"], torch.zeros_like(batch["mask_BT"])):
        part, _ = with_leaf(batch | {"mask_BT": mask})
        _, stats = function(**part, denominator=3)
        assert isinstance(stats, dict)
        for key, number in stats.items():
            assert not getattr(number, "requires_grad", False), key
            assert math.isfinite(number), key


# -------------------------------------------------------------------------------------------------- importance weights

#                     ratio:  0.1   0.5    1     2     3    masked
RATIOS = torch.tensor([[0.1, 0.5, 1.0, 2.0, 3.0, 9.0]], dtype=F64)
INSIDE = torch.tensor([[True, True, True, True, True, False]])


def weights_of(ratio: torch.Tensor = RATIOS, mask: torch.Tensor = INSIDE, **how) -> tuple[list[float], float]:
    """From ratios by way of log-probabilities; the behaviour's are -2 everywhere."""
    behaviour = torch.full_like(ratio, -2.0)
    weight, clipped = importance_weights(behaviour + ratio.log(), behaviour, mask, **how)
    return weight[0].tolist(), float(clipped)


@pytest.mark.parametrize(
    ("how", "weights", "clipped"),
    [
        ({"mode": "none"}, [1, 1, 1, 1, 1, 0], 0 / 5),
        ({"mode": "truncated", "cap": 2.5}, [0.1, 0.5, 1, 2, 2.5, 0], 1 / 5),
        ({"mode": "truncated", "cap": 1.5}, [0.1, 0.5, 1, 1.5, 1.5, 0], 2 / 5),
        ({"mode": "masked", "cap": 2.5}, [0.1, 0.5, 1, 2, 0, 0], 1 / 5),
        ({"mode": "masked", "cap": 1.5}, [0.1, 0.5, 1, 0, 0, 0], 2 / 5),
        ({"mode": "masked", "cap": 100.0}, [0.1, 0.5, 1, 2, 3, 0], 0 / 5),
    ],
)
def test_importance_weights_by_hand(how, weights, clipped):
    actual, share = weights_of(**how)
    assert actual == pytest.approx(weights, abs=1e-12)
    assert share == pytest.approx(clipped, abs=1e-7)


@pytest.mark.parametrize("mode", ["truncated", "masked"])
def test_the_default_cap_is_2_and_small_ratios_stay(mode):
    actual, share = weights_of(torch.tensor([[1.99, 2.01, 1e-9]], dtype=F64), torch.ones(1, 3, dtype=torch.bool), mode=mode)
    assert actual == pytest.approx([1.99, 2.0 if mode == "truncated" else 0.0, 1e-9], abs=1e-12)
    assert share == pytest.approx(1 / 3, abs=1e-7)


@pytest.mark.parametrize("mode", ["truncated", "masked"])
def test_a_ratio_exactly_at_the_cap_is_not_clipped(mode):
    """exp(0) is exactly 1: equal policies and a cap of 1 leave everything as it is."""
    weights, share = weights_of(torch.ones(1, 3, dtype=F64), torch.ones(1, 3, dtype=torch.bool), mode=mode, cap=1.0)
    assert weights == [1.0, 1.0, 1.0]
    assert share == 0.0


@pytest.mark.parametrize("mode", ["none", "truncated", "masked"])
def test_importance_weights_are_detached_and_read_nothing_outside_the_mask(mode):
    g = torch.Generator().manual_seed(0)
    logprob, behaviour = (-3 * torch.rand(3, 5, generator=g, dtype=F64) for _ in range(2))
    mask = torch.rand(3, 5, generator=g) < 0.6
    clean, share = importance_weights(logprob.clone().requires_grad_(), behaviour, mask, mode=mode, cap=1.5)
    assert not clean.requires_grad
    assert not getattr(share, "requires_grad", False)
    assert (clean[~mask] == 0).all()
    assert clean[mask].any()
    for garbage in (NAN, float("inf"), -float("inf")):
        spoilt = (x.where(mask, garbage) for x in (logprob, behaviour))
        dirty, dirty_share = importance_weights(*spoilt, mask, mode=mode, cap=1.5)
        assert torch.equal(dirty, clean)
        assert float(dirty_share) == float(share)


@pytest.mark.parametrize("mode", ["none", "truncated", "masked"])
def test_no_tokens_have_no_clipped_share(mode):
    _, share = importance_weights(RATIOS.log(), RATIOS.log(), torch.zeros_like(INSIDE), mode=mode)
    assert float(share) == 0.0


@pytest.mark.parametrize(("mode", "weight"), [("truncated", 2.0), ("masked", 0.0)])
def test_a_ratio_beyond_the_floats_is_clipped(mode, weight):
    logprob, behaviour = torch.tensor([[0.0]]), torch.tensor([[-1000.0]])
    weights, share = importance_weights(logprob, behaviour, torch.tensor([[True]]), mode=mode)
    assert weights.item() == weight
    assert float(share) == 1.0


@LAW
@given(st.integers(0, 2**31), st.sampled_from(["truncated", "masked"]), st.floats(0.2, 4.0))
def test_importance_weights_are_their_definition_token_by_token(seed, mode, cap):
    g = torch.Generator().manual_seed(seed)
    logprob, behaviour = (torch.randn(3, 4, generator=g, dtype=F64) for _ in range(2))
    mask = torch.rand(3, 4, generator=g) < 0.8
    weights, share = importance_weights(logprob, behaviour, mask, mode=mode, cap=cap)
    expected, clipped = torch.zeros(3, 4, dtype=F64), 0
    for b, t in mask.nonzero().tolist():
        ratio = math.exp(logprob[b, t].item() - behaviour[b, t].item())
        outside = ratio > cap
        expected[b, t] = ratio if not outside else cap if mode == "truncated" else 0.0
        clipped += outside
    close(weights, expected)
    assert float(share) == pytest.approx(clipped / max(1, mask.sum().item()), abs=1e-7)


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match=r"^mode: got 'clipped'; expected one of none, truncated, masked"):
        importance_weights(RATIOS.log(), RATIOS.log(), INSIDE, mode="clipped")


def test_deferred_tokens_get_the_same_gradient_as_fresh_ones_once_weighted():
    """Sampled by b, trained around the recomputed old policy with weight old/b: E_b[weight A grad] = E_old[A grad].

    Two actions, exact expectation: the gradient of sum_a p(a) A(a) in the logits at p = old.
    """
    logits = torch.tensor([0.3, -0.4], dtype=F64, requires_grad=True)
    behaviour = torch.tensor([0.7, 0.3], dtype=F64)
    advantages = torch.tensor([2.0, -1.0], dtype=F64)
    logprob = logits.log_softmax(0)
    old, mask = logprob.detach()[None], torch.tensor([[True, True]])
    weight, _ = importance_weights(old, behaviour.log()[None], mask, mode="truncated", cap=10.0)
    loss, _ = policy_loss(logprob[None], old, advantages[None], mask, denominator=1, weight_BT=weight * behaviour)
    exact = gradient(-(logits.softmax(0) * advantages).sum(), logits)
    close(gradient(loss, logits), exact)
