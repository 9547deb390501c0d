"""The two updates of a step: the policy on its rows, the value model on returns. Both are losses.py wired to a Learner."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch

from tppo_ref.loop.learner import Learner, Plan
from tppo_ref.loop.rows import PolicyRows
from tppo_ref.loop.settings import PolicyConfig
from tppo_ref.method.losses import importance_weights, policy_loss, positive_lm_loss, value_loss
from tppo_ref.method.records import Response
from tppo_ref.rollout.packing import TokenBatch


class Ewma:
    """PPO-EWMA's averaged policy (arXiv 2110.00641): the centre of the clip, an exponential average of the weights.

    average <- ((w - 1) average + current) / w  with  w <- decay w + 1  after each optimiser step, w = 1 at the start: their average
    with its bias towards the first weights taken out. Our departure: the weight averaged / behaviour, which stands outside of the
    clip, is truncated at policy.importance_cap.

    module   a copy of the policy, of its own memory
    """

    def __init__(self, module: torch.nn.Module, decay: float):
        self.module = module.requires_grad_(False)
        self.decay, self.weight = decay, 1.0

    @torch.no_grad()
    def move(self, current: torch.nn.Module) -> None:
        self.weight = self.decay * self.weight + 1
        for average, parameter in zip(self.module.parameters(), current.parameters(), strict=True):
            average.lerp_(parameter.detach(), 1 / self.weight)

    def clip_centre(
        self, batch: TokenBatch, rows: PolicyRows, part: Any, config: PolicyConfig
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Averaged policy's log-probabilities, importance weights averaged / behaviour, and the share of these that was clipped."""
        with torch.no_grad():
            centre_BT = self.module(batch)
        mode: Literal["truncated", "masked"] = "truncated" if config.importance == "none" else config.importance
        weight_BT, clipped = importance_weights(
            centre_BT, rows.behaviour_BT[part], rows.train_BT[part], mode=mode, cap=config.importance_cap
        )
        return centre_BT, weight_BT, clipped


def update_policy(
    learner: Learner, rows: PolicyRows, plans: Sequence[Plan], *, step: int, ewma: Ewma | None = None
) -> dict[str, float]:
    """All epochs of the policy's update on one step's rows: clipped surrogate and the positive-example LM loss.

    Each loss is a token mean over its mini-batch, all ranks and micro-batches together. Returns the policy/ metrics, averages
    over the tokens of all mini-batches. `ewma`: PPO-EWMA's averaged policy, moved after each optimiser step.
    """
    config = learner.config
    assert isinstance(config, PolicyConfig)
    centre_BT, weight_BT, weight_clipped = rows.clip_centre(config)
    assert rows.advantages_BT is not None
    advantages_BT, positive_BT = rows.advantages_BT, rows.positive_BT()
    sums: defaultdict[str, float] = defaultdict(float)
    ratio_max = 0.0
    learner.begin_step()

    def loss(micro: list[int], tokens: float, positive: float) -> torch.Tensor:
        nonlocal ratio_max
        batch = rows.batch(micro, detach_prefix=config.detach_prefix)
        logprob_BT = learner.module(batch)
        part = (micro, slice(0, logprob_BT.shape[1]))
        old_BT, weight = centre_BT[part], None if weight_BT is None else weight_BT[part]
        if ewma is not None:
            old_BT, weight, clipped = ewma.clip_centre(batch, rows, part, config)
            sums["weight_clipped"] += clipped * int(rows.train_BT[part].sum())
        total, stats = policy_loss(
            logprob_BT, old_BT, advantages_BT[part], rows.train_BT[part], denominator=tokens,
            clip_low=config.clip_low, clip_high=config.clip_high, dual_clip=config.dual_clip, weight_BT=weight,
        )  # fmt: skip
        ratio_max = max(ratio_max, stats.pop("ratio_max"))
        for name, number in stats.items():
            sums[name] += number
        sums["loss"] += float(total.detach()) * tokens
        if positive and config.lm_loss_weight:
            lm = positive_lm_loss(logprob_BT, positive_BT[part], denominator=positive)
            sums["lm_loss"] += float(lm.detach()) * positive
            total = total + config.lm_loss_weight * lm
        sums["tokens"] += int(rows.train_BT[part].sum())
        sums["positive"] += int(positive_BT[part].sum())
        return total

    for mini_batch in (mini for plan in plans for mini in plan):
        members = [row for micro in mini_batch for row in micro]
        counts = [float(rows.train_BT[members].sum()), float(positive_BT[members].sum())]
        tokens, positive = learner.parallel.sum(counts)
        if not tokens:  # every token of these rows is a tail: nothing to learn from, and the ledger counts them
            continue
        learner.update(mini_batch, partial(loss, tokens=tokens, positive=positive), step)
        if ewma is not None:
            ewma.move(learner.module)

    (ratio_max,) = learner.parallel.max([ratio_max])
    if ewma is None:
        sums["weight_clipped"] = weight_clipped * sums["tokens"]
    names = ("tokens", "positive", "loss", "lm_loss", "clipped_tokens", "dual_clipped_tokens", "kl_sum", "weight_clipped")
    total = dict(zip(names, learner.parallel.sum(sums[name] for name in names), strict=True))
    tokens = max(total["tokens"], 1)
    return learner.metrics() | {
        "policy/loss": total["loss"] / tokens,
        "policy/lm_loss": total["lm_loss"] / max(total["positive"], 1),
        "policy/clipped_share": total["clipped_tokens"] / tokens,
        "policy/dual_clipped_share": total["dual_clipped_tokens"] / tokens,
        "policy/kl": total["kl_sum"] / tokens,
        "policy/ratio_max": ratio_max,
        "policy/weight_clipped_share": total["weight_clipped"] / tokens,
    }


def update_value(
    learner: Learner,
    responses: Sequence[Response],
    targets_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    stored_BT: torch.Tensor | None,
    plans: Sequence[Plan],
    *,
    step: int,
) -> dict[str, float]:
    """All epochs of the value model's update: clipped squared error to `targets_BT` on `mask_BT`.

    stored_BT anchors the clip; None = no clip. Returns the value/ metrics; the explained variance is of V before each update.
    """
    config = learner.config
    sums: defaultdict[str, float] = defaultdict(float)
    learner.begin_step()

    def loss(micro: list[int], tokens: float) -> torch.Tensor:
        value_BT, _ = learner.module(TokenBatch.of([responses[row] for row in micro]))
        part = (micro, slice(0, value_BT.shape[1]))
        total, stats = value_loss(
            value_BT, None if stored_BT is None else stored_BT[part], targets_BT[part], mask_BT[part], denominator=tokens,
            clip_low=config.clip_low, clip_high=config.clip_high,
        )  # fmt: skip
        target, value = targets_BT[part][mask_BT[part]].double(), value_BT.detach()[mask_BT[part]].double()
        moments = {"n": target.numel(), "t": target.sum(), "tt": target.square().sum(),
                   "e": (target - value).sum(), "ee": (target - value).square().sum()}  # fmt: skip
        for name, number in (stats | moments).items():
            sums[name] += float(number)
        sums["loss"] += float(total.detach()) * tokens
        return total

    for mini_batch in (mini for plan in plans for mini in plan):
        members = [row for micro in mini_batch for row in micro]
        (tokens,) = learner.parallel.sum([float(mask_BT[members].sum())])
        if tokens:
            learner.update(mini_batch, partial(loss, tokens=tokens), step)

    names = ("n", "t", "tt", "e", "ee", "loss", "value_clipped_tokens")
    total = dict(zip(names, learner.parallel.sum(sums[name] for name in names), strict=True))
    n = max(total["n"], 1)
    return learner.metrics() | {
        "value/tokens": total["n"],
        "value/loss": total["loss"] / n,
        "value/clipped_share": total["value_clipped_tokens"] / n,
        "value/explained_variance": explained_variance(n, total["t"], total["tt"], total["e"], total["ee"]),
    }


def explained_variance(n: float, target: float, target_squares: float, error: float, error_squares: float) -> float:
    """1 - Var(error) / Var(target) from sums over n tokens; NaN where the targets do not vary."""
    variance = target_squares / n - (target / n) ** 2
    return 1 - (error_squares / n - (error / n) ** 2) / variance if variance > 1e-12 else math.nan
