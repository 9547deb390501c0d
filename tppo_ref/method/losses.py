"""The losses of policy and value model, as pure functions of [B, T] tensors.

Every denominator is an argument: the caller passes the number of trained tokens of the whole mini-batch, over all micro-batches
and ranks, so that k micro-batches add up to the gradient of one batch, however unequal their lengths. Entries outside the mask
are never read: NaN there changes neither loss nor gradient.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

Stats = dict[str, float]

MAX_LOG_RATIO = 60.0  # e^60 is far beyond every clip, and finite in float32: an infinite ratio times an advantage of 0 would be NaN


def policy_loss(
    logprob_BT: torch.Tensor,
    old_logprob_BT: torch.Tensor,
    advantages_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    denominator: float,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float | None = 10.0,
    weight_BT: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Stats]:
    """Clipped surrogate with clip-higher and dual clip, a token mean over the global count.

        ratio = exp(logprob - old_logprob)
        S     = min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A)         PPO, arXiv 1707.06347, eq. 7
        S     = max(S, dual_clip A)  where A < 0 only                            dual clip, arXiv 1912.09729
        loss  = - sum over mask of weight S / denominator

    clip_high > clip_low is DAPO's clip-higher (arXiv 2503.14476). Everything is [B, T]; mask_BT is bool; weight_BT is
    a detached importance weight (`importance_weights`). Gradients flow into logprob_BT alone.
    Reduces to the plain policy gradient -A/denominator per token where ratio = 1.

    Returns the scalar loss and sums over the mask, to be divided by a token count once all micro-batches and ranks are added:
    `clipped_tokens` (the clip binds), `dual_clipped_tokens`, `kl_sum` (k3 estimate of KL(old || new), in nats) and
    `ratio_max`. Raises ValueError for shapes or a denominator that is not positive and finite.
    """
    _check(denominator, mask_BT, logprob_BT=logprob_BT, old_logprob_BT=old_logprob_BT, advantages_BT=advantages_BT)
    if dual_clip is not None and dual_clip <= 1:
        raise ValueError(f"dual_clip: expected a number above 1, or None, got {dual_clip}")
    logprob = _inside(logprob_BT, mask_BT)
    old_logprob = _inside(old_logprob_BT, mask_BT).detach()
    advantages = _inside(advantages_BT, mask_BT).detach()

    log_ratio = logprob - old_logprob
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
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
        stats["ratio_max"] = float(ratio.max()) if ratio.numel() else 0.0
    return -surrogate.sum() / denominator, stats


def value_loss(
    values_BT: torch.Tensor,
    old_values_BT: torch.Tensor | None,
    returns_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    denominator: float,
    clip_low: float | None = 0.5,
    clip_high: float | None = 0.6,
) -> tuple[torch.Tensor, Stats]:
    """Clipped squared error of the value model, a token mean over the global count.

        v_clip = clip(v, old - clip_low, old + clip_high)
        loss   = sum over mask of 0.5 max((v - R)^2, (v_clip - R)^2) / denominator

    The clip range (0.5 down, 0.6 up) and the max are the authors' port's [P]. Without old_values_BT, or with both clips None,
    it is half the mean squared error. Gradients flow into values_BT alone. Returns the loss and `value_clipped_tokens`, a sum
    over the mask. Raises ValueError as `policy_loss`.
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


def positive_lm_loss(logprob_BT: torch.Tensor, mask_BT: torch.Tensor, *, denominator: float) -> torch.Tensor:
    """Negative log-likelihood of good responses' tokens: -sum over mask of logprob / denominator.

    VAPO's positive-example language-model loss (arXiv 2504.05118). Ours: the mask holds this step's policy tokens of
    responses that ended correct in this step. Raises ValueError as `policy_loss`.
    """
    _check(denominator, mask_BT, logprob_BT=logprob_BT)
    return -_inside(logprob_BT, mask_BT).sum() / denominator


def importance_weights(
    logprob_BT: torch.Tensor,
    behaviour_logprob_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    *,
    mode: Literal["none", "truncated", "masked"],
    cap: float = 2.0,
    floor: float = 0.0,
) -> tuple[torch.Tensor, float]:
    """Per-token weights exp(logprob - behaviour_logprob) for tokens that another policy sampled, detached and bounded.

        none       1
        truncated  min(ratio, cap)
        masked     ratio where floor <= ratio <= cap, else 0

    One function for engine mismatch, deferred tokens and partial rollouts: what differs is who sampled. logprob_BT is the
    policy at the start of the update, behaviour_logprob_BT the sampler's. Weights outside mask_BT are 0.
    Returns weights [B, T] and the share of the masked tokens that were truncated or zeroed (0 for an empty mask).
    """
    if mode not in ("none", "truncated", "masked"):
        raise ValueError(f"mode: expected none, truncated or masked, got {mode!r}")
    if not 0 <= floor <= cap or not math.isfinite(cap) or cap <= 0:
        raise ValueError(f"cap, floor: expected 0 <= floor <= cap, cap positive and finite, got floor={floor}, cap={cap}")
    _check(1.0, mask_BT, logprob_BT=logprob_BT, behaviour_logprob_BT=behaviour_logprob_BT)
    inside = mask_BT.to(logprob_BT.dtype)
    if mode == "none":
        return inside, 0.0
    with torch.no_grad():
        ratio = (_inside(logprob_BT, mask_BT) - _inside(behaviour_logprob_BT, mask_BT)).exp()
        outliers = (ratio > cap) | ((ratio < floor) if mode == "masked" else False)
        weight = ratio.clamp(max=cap) if mode == "truncated" else ratio.masked_fill(outliers, 0.0)
        num_tokens = int(mask_BT.sum())
        share = float((outliers & mask_BT).sum()) / num_tokens if num_tokens else 0.0
        return weight * inside, share


def _inside(x_BT: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
    # where, not multiplication: 0 * NaN is NaN, and so is its gradient.
    return torch.where(mask_BT, x_BT, torch.zeros((), dtype=x_BT.dtype, device=x_BT.device))


def _check(denominator: float, mask_BT: torch.Tensor, **tensors: torch.Tensor) -> None:
    if not (math.isfinite(denominator) and denominator > 0):
        raise ValueError(f"denominator: expected a positive finite number of tokens, got {denominator}")
    if mask_BT.dtype != torch.bool or mask_BT.ndim != 2:
        raise ValueError(f"mask_BT: expected bool [B, T], got {mask_BT.dtype} {list(mask_BT.shape)}")
    for name, tensor in tensors.items():
        if tensor.shape != mask_BT.shape or not tensor.is_floating_point():
            raise ValueError(f"{name}: expected floats {list(mask_BT.shape)}, got {tensor.dtype} {list(tensor.shape)}")
