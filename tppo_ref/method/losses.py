"""The losses of policy and value model, as pure functions of [B, T] tensors.

Every denominator is an argument: the caller passes the number of trained tokens of the whole mini-batch, over all micro-batches
and ranks, so that k micro-batches add up to the gradient of one batch, however unequal their lengths. Entries outside the mask
are never read: NaN there changes neither loss nor gradient. Suffixes: B responses, T response tokens.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from tppo_ref.method import checks
from tppo_ref.method.checks import refused

Stats = dict[str, float]
Importance = Literal["none", "truncated", "masked"]

MAX_LOG_RATIO = 60.0  # e^60 is far beyond every clip, and finite in float32: an infinite ratio times an advantage of 0 would be NaN


def policy_loss(
    logprob_BT: Tensor, old_logprob_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, *, denominator: float,
    clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float | None = 10.0, weight_BT: Tensor | None = None,
    start_logprob_BT: Tensor | None = None,
) -> tuple[Tensor, Stats]:  # fmt: skip
    """Clipped surrogate with clip-higher and dual clip, a token mean over the global count.

        ratio = exp(logprob - old_logprob)
        S     = min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)         PPO, arXiv 1707.06347, eq. 7
        with start_logprob the clip is around exp(start_logprob - old_logprob)   GePPO, arXiv 2111.00072: pi_k / pi_(k-i)
        S     = max(S, dual_clip A)  where A < 0 only                            dual clip, arXiv 1912.09729
        loss  = - sum over mask of weight S / denominator

    clip_high > clip_low is clip-higher (DAPO, arXiv 2503.14476); 0.2 / 0.28 and the dual clip of 10 are read in the authors' port
    [P]. Where ratio = 1 the gradient is the policy gradient, -A/denominator per token.

    logprob, old_logprob, advantages  [B, T] floats, nats for the first two; gradients flow into logprob alone
    mask_BT                           [B, T] bool, the trained tokens
    denominator                       their number over all micro-batches and ranks, in tokens
    weight_BT                         detached importance weights (`importance_weights`), outside of the clip; None: 1
    start_logprob_BT                  the policy before the update, in nats, where old is each token's own sampler; None: as old

    Returns the scalar loss and sums over the mask, to be divided by a token count once all micro-batches and ranks are added:
    `clipped_tokens` (the clip binds), `dual_clipped_tokens`, `kl_sum` (k3 estimate of KL(old || new), in nats); and `ratio_max`,
    the largest ratio on the mask, 0 where it is empty. Raises ValueError that names the argument.
    """
    _check(denominator, mask_BT, logprob_BT=logprob_BT, old_logprob_BT=old_logprob_BT, advantages_BT=advantages_BT)
    if dual_clip is not None and not dual_clip > 1:
        raise refused("dual_clip", dual_clip, "a number above 1, or None")
    logprob = _inside(logprob_BT, mask_BT)
    old_logprob = _inside(old_logprob_BT, mask_BT).detach()
    advantages = _inside(advantages_BT, mask_BT).detach()

    log_ratio = logprob - old_logprob
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    if start_logprob_BT is not None:
        _check(denominator, mask_BT, start_logprob_BT=start_logprob_BT)
        middle = (_inside(start_logprob_BT, mask_BT).detach() - old_logprob).clamp(max=MAX_LOG_RATIO).exp()
        clipped = ratio.clamp(middle - clip_low, middle + clip_high) * advantages
    surrogate = torch.minimum(unclipped, clipped)
    stats = {"clipped_tokens": float((clipped < unclipped).sum())}
    if dual_clip is not None:
        # On positive advantages this floor would be a gift above the clip: it belongs to negative ones only.
        floor = torch.where(advantages < 0, dual_clip * advantages, -math.inf)
        stats["dual_clipped_tokens"] = float((surrogate < floor).sum())
        surrogate = torch.maximum(surrogate, floor)
    if weight_BT is not None:
        _check(denominator, mask_BT, weight_BT=weight_BT)
        surrogate = surrogate * _inside(weight_BT, mask_BT).detach()
    with torch.no_grad():
        stats["kl_sum"] = float((ratio - 1 - log_ratio).sum())
        stats["ratio_max"] = float(ratio[mask_BT].max()) if bool(mask_BT.any()) else 0.0
    return -surrogate.sum() / denominator, stats


def value_loss(
    values_BT: Tensor, old_values_BT: Tensor | None, returns_BT: Tensor, mask_BT: Tensor, *, denominator: float,
    clip_low: float | None = 0.5, clip_high: float | None = 0.6,
) -> tuple[Tensor, Stats]:  # fmt: skip
    """Clipped squared error of the value model, a token mean over the global count.

        v_clip = clip(v, old - clip_low, old + clip_high)
        loss   = sum over mask of 0.5 max((v - R)^2, (v_clip - R)^2) / denominator

    PPO's value clip, with unequal sides: the range (0.5 down, 0.6 up) and the max are the authors' port's [P]; T-PPO (arXiv
    2506.15050) states the target R alone, the Monte Carlo return. The anchor `old` is what V said when the token was first fed to
    it. Without old_values_BT, or with both clips None, it is half the mean squared error.

    values, old_values, returns  [B, T] floats, in units of reward; gradients flow into values alone
    mask_BT, denominator         as in `policy_loss`
    clip_low, clip_high          in units of reward; None: no bound on that side
    Returns the loss and `value_clipped_tokens`, a sum over the mask: tokens whose gradient the clip took. Raises ValueError as
    `policy_loss`.
    """
    _check(denominator, mask_BT, values_BT=values_BT, returns_BT=returns_BT)
    values = _inside(values_BT, mask_BT)
    returns = _inside(returns_BT, mask_BT).detach()
    error = (values - returns).square()
    stats = {"value_clipped_tokens": 0.0}
    if old_values_BT is not None and not (clip_low is None and clip_high is None):
        _check(denominator, mask_BT, old_values_BT=old_values_BT)
        old = _inside(old_values_BT, mask_BT).detach()
        low = old - (math.inf if clip_low is None else clip_low)
        high = old + (math.inf if clip_high is None else clip_high)
        clipped_error = (torch.minimum(torch.maximum(values, low), high) - returns).square()
        stats["value_clipped_tokens"] = float((clipped_error > error).sum())
        error = torch.maximum(error, clipped_error)
    return 0.5 * error.sum() / denominator, stats


def positive_lm_loss(logprob_BT: Tensor, mask_BT: Tensor, *, denominator: float) -> Tensor:
    """Negative log-likelihood of good responses' tokens: -sum over mask of logprob / denominator, in nats.

    VAPO's positive-example language-model loss (arXiv 2504.05118), weighted by 0.1 in the authors' port [P]. Our departure lies in
    the mask that the loop passes: this step's policy tokens of responses that ended correct in this step. Shapes, dtypes and errors
    as in `policy_loss`.
    """
    _check(denominator, mask_BT, logprob_BT=logprob_BT)
    return -_inside(logprob_BT, mask_BT).sum() / denominator


def importance_weights(
    logprob_BT: Tensor, behaviour_logprob_BT: Tensor, mask_BT: Tensor, *, mode: Importance, cap: float = 2.0
) -> tuple[Tensor, float]:
    """Per-token weights exp(logprob - behaviour_logprob) for tokens that another policy sampled, detached and bounded.

        none       1
        truncated  min(ratio, cap)
        masked     ratio where ratio <= cap, else 0

    One function for engine mismatch, deferred tokens and partial rollouts: what differs is who sampled. It is the behaviour weight
    of the decoupled objective (PPO-EWMA, arXiv 2110.00641; AReaL, arXiv 2505.24298), per token: how a token's prefix was reached
    gets no weight.

    logprob_BT is the policy at the start of the update, behaviour_logprob_BT the sampler's, both [B, T] in nats; cap is positive
    and finite. Returns weights [B, T], 0 outside mask_BT, and the share of the masked tokens that were truncated or zeroed (0 for
    an empty mask). Raises ValueError that names the argument.
    """
    checks.choice("mode", mode, ("none", "truncated", "masked"))
    checks.positive("cap", cap)
    _check(1.0, mask_BT, logprob_BT=logprob_BT, behaviour_logprob_BT=behaviour_logprob_BT)
    inside = mask_BT.to(logprob_BT.dtype)
    if mode == "none":
        return inside, 0.0
    with torch.no_grad():
        ratio = (_inside(logprob_BT, mask_BT) - _inside(behaviour_logprob_BT, mask_BT)).exp()
        outliers = ratio > cap
        weight = ratio.clamp(max=cap) if mode == "truncated" else ratio.masked_fill(outliers, 0.0)
        num_tokens = int(mask_BT.sum())
        share = float((outliers & mask_BT).sum()) / num_tokens if num_tokens else 0.0
        return weight * inside, share


def _inside(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    # where, not multiplication: 0 * NaN is NaN, and so is its gradient.
    return torch.where(mask_BT, x_BT, torch.zeros((), dtype=x_BT.dtype, device=x_BT.device))


def _check(denominator: Any, mask_BT: Any, **tensors: Tensor) -> None:
    checks.positive("denominator", denominator)
    checks.tensor("mask_BT", mask_BT, 2, torch.bool)
    for name, tensor in tensors.items():
        if tensor.shape != mask_BT.shape or not tensor.is_floating_point():
            raise refused(name, tensor, f"a tensor of floats {list(mask_BT.shape)}")
