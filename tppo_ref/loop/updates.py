"""The two updates of a step: the policy on its rows, the value model on its targets. Both are losses.py wired to a Learner."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from tppo_ref.loop.forward import ClipCentre, Forward, clip_centre
from tppo_ref.loop.learner import Learner, Plan
from tppo_ref.loop.masters import Masters
from tppo_ref.loop.parallel import Parallel, mean_and_variance, per
from tppo_ref.loop.rows import Rows
from tppo_ref.loop.settings import PolicyConfig, ValueConfig
from tppo_ref.loop.value_targets import ValueBatch
from tppo_ref.method.losses import importance_weights, policy_loss, positive_lm_loss, value_loss
from tppo_ref.rollout.packing import TokenBatch


class Ewma:
    """PPO-EWMA's averaged policy (arXiv 2110.00641): the centre of the clip, an exponential average of the weights.

    average <- ((w - 1) average + current) / w  with  w <- decay w + 1  after each optimiser step, w = 1 at the start: their average
    with its bias towards the first weights taken out. Our departure: the weight averaged / behaviour, which stands outside of the
    clip, is truncated at policy.importance_cap.

    module   a copy of the policy, of its own memory; where it is not float32, the average is, and the module holds its rounding
    """

    def __init__(self, module: torch.nn.Module, decay: float):
        self.module = module.requires_grad_(False)
        self.masters = Masters(module)
        self.decay, self.weight = decay, 1.0

    @torch.no_grad()
    def move(self, current: Masters) -> None:
        """One optimiser step went by: the average moves towards the current weights."""
        self.weight = self.decay * self.weight + 1
        for average, tensor in zip(self.masters.tensors.values(), current.tensors.values(), strict=True):
            average.lerp_(tensor.detach(), 1 / self.weight)
        self.masters.round()

    def clip_centre(self, batch: TokenBatch, rows: Rows, part: Any, config: PolicyConfig) -> ClipCentre:
        """The averaged policy's log-probabilities of a micro-batch, and the importance weights averaged / behaviour."""
        with torch.no_grad():
            centre_bt = self.module(dataclasses.replace(batch, prefix=None))  # what is kept is the policy's, not the average's
        mode: Literal["truncated", "masked"] = "masked" if config.importance == "masked" else "truncated"
        weight_bt, clipped = importance_weights(
            centre_bt, rows.behaviour_BT[part], rows.train_BT[part], mode=mode, cap=config.importance_cap
        )
        return ClipCentre(centre_bt, weight_bt, clipped)


class Sums:
    """Sums over a step's micro-batches, added up over ranks at its end."""

    def __init__(self) -> None:
        self.by_name: defaultdict[str, float] = defaultdict(float)

    def add(self, **numbers: float | Tensor) -> None:
        for name, number in numbers.items():
            self.by_name[name] += float(number)

    def over_ranks(self, parallel: Parallel, names: Sequence[str]) -> dict[str, float]:
        return dict(zip(names, parallel.sum(self.by_name[name] for name in names), strict=True))


def optimiser_steps(learner: Learner, plans: Iterable[Plan], *masks_BT: Tensor) -> Iterator[tuple[list[list[int]], list[float]]]:
    """Mini-batches of all epochs, each with its tokens in each mask over all ranks: the denominators of its losses.

    A mini-batch without a token in the first mask is left out on every rank: every token of its rows is a tail, nothing is to be
    learnt from it, and the ledger counts them.
    """
    for mini_batch in (mini for plan in plans for mini in plan):
        members = [row for micro in mini_batch for row in micro]
        counts = learner.parallel.sum([float(mask_BT[members].sum()) for mask_BT in masks_BT])
        if counts[0]:
            yield mini_batch, counts


class PolicyLoss:
    """The policy's loss on a micro-batch: clipped surrogate + lm_loss_weight x the LM loss on tokens of right responses."""

    def __init__(self, learner: Learner, rows: Rows, before: Forward, scaled_BT: Tensor, ewma: Ewma | None):
        assert isinstance(learner.config, PolicyConfig)
        self.config, self.learner, self.ewma = learner.config, learner, ewma
        self.rows, self.scaled_BT, self.positive_BT = rows, scaled_BT, rows.positive_BT
        self.centre = clip_centre(rows, before.logprob_BT, self.config)
        self.prefixes = dict(before.prefixes)  # each serves its micro-batch once: in the first epoch
        self.sums, self.ratio_max = Sums(), 0.0

    def __call__(self, micro: list[int], tokens: float, positive: float) -> Tensor:
        """tokens, positive: those of the mini-batch over all ranks and micro-batches, the two losses' denominators."""
        config, rows = self.config, self.rows
        batch = rows.batch(micro, constant_prefix=config.prefix == "constant", kept=self.prefixes.pop(id(micro), None))
        logprob_bt = self.learner.module(batch)
        part = (micro, slice(0, logprob_bt.shape[1]))
        centre, train_bt = self.centre.of_part(part), rows.train_BT[part]
        if self.ewma is not None:
            centre = self.ewma.clip_centre(batch, rows, part, config)
        total, stats = policy_loss(
            logprob_bt, centre.logprob_BT, self.scaled_BT[part], train_bt, denominator=tokens, clip_low=config.clip_low,
            clip_high=config.clip_high, dual_clip=config.dual_clip, weight_BT=centre.weight_BT, start_logprob_BT=centre.start_BT,
        )  # fmt: skip
        self.ratio_max = max(self.ratio_max, stats.pop("ratio_max"))
        num_tokens = int(train_bt.sum())
        updates_before = len(self.learner.grad_norms)  # in this step
        self.sums.add(loss=float(total.detach()) * tokens, tokens=num_tokens, lag=updates_before * num_tokens, **stats)
        if self.ewma is not None:
            self.sums.add(weight_clipped=centre.clipped_share * num_tokens)
        if positive:
            positive_bt = self.positive_BT[part]
            lm = positive_lm_loss(logprob_bt, positive_bt, denominator=positive)
            self.sums.add(lm_loss=float(lm.detach()) * positive, positive=int(positive_bt.sum()))
            if config.lm_loss_weight:
                total = total + config.lm_loss_weight * lm
        return total


def update_policy(
    learner: Learner,
    rows: Rows,
    before: Forward,
    scaled_BT: Tensor,
    plans: Sequence[Plan],
    *,
    step: int,
    ewma: Ewma | None = None,
) -> dict[str, float]:
    """All epochs of the policy's update on one step's rows.

    before: what the policy said before the update, which centres the clip; with `ewma`, PPO-EWMA's averaged policy, it is the
    average's instead, which moves after each optimiser step. scaled_BT: advantages [B, T]. Each loss is a token mean over its
    mini-batch, all ranks and micro-batches together. Returns the policy/ metrics, means over the tokens of all mini-batches.
    """
    loss = PolicyLoss(learner, rows, before, scaled_BT, ewma)
    learner.begin_step()
    for mini_batch, (tokens, positive) in optimiser_steps(learner, plans, rows.train_BT, loss.positive_BT):
        learner.update(mini_batch, partial(loss, tokens=tokens, positive=positive), step)
        if ewma is not None:
            ewma.move(learner.masters)
    if ewma is None:
        loss.sums.add(weight_clipped=loss.centre.clipped_share * loss.sums.by_name["tokens"])
    (ratio_max,) = learner.parallel.max([loss.ratio_max])
    names = ("tokens", "positive", "loss", "lm_loss", "clipped_tokens", "dual_clipped_tokens", "kl_sum", "weight_clipped", "lag")
    total = loss.sums.over_ranks(learner.parallel, names)
    tokens = total["tokens"]
    return learner.metrics() | {
        "policy/loss": per(total["loss"], tokens),
        "policy/lm_loss": per(total["lm_loss"], total["positive"]),
        "policy/clipped_share": per(total["clipped_tokens"], tokens),
        "policy/dual_clipped_share": per(total["dual_clipped_tokens"], tokens),
        "policy/kl": per(total["kl_sum"], tokens),
        "policy/ratio_max": ratio_max if tokens else math.nan,
        "policy/weight_clipped_share": per(total["weight_clipped"], tokens),
        "policy/lag_in_step": per(total["lag"], tokens),
    }


class ValueLoss:
    """The value model's loss on a micro-batch: clipped squared error to the batch's targets."""

    def __init__(self, learner: Learner, batch: ValueBatch):
        assert isinstance(learner.config, ValueConfig)
        self.config, self.module, self.batch, self.sums = learner.config, learner.module, batch, Sums()
        self.targets: list[Tensor] = []  # of each trained token of each update, and what V lacked of it
        self.errors: list[Tensor] = []

    def __call__(self, micro: list[int], tokens: float) -> Tensor:
        """tokens: the mini-batch's, over all ranks and micro-batches, the loss's denominator."""
        batch, config = self.batch, self.config
        live_from = None if batch.live_from is None else [batch.live_from[row] for row in micro]
        value_bt, _ = self.module(TokenBatch.of([batch.responses[row] for row in micro], live_from))
        part = (micro, slice(0, value_bt.shape[1]))
        targets_bt, mask_bt = batch.targets_BT[part], batch.mask_BT[part]
        total, stats = value_loss(
            value_bt, None if batch.anchor_BT is None else batch.anchor_BT[part], targets_bt, mask_bt, denominator=tokens,
            clip_low=config.clip_low, clip_high=config.clip_high,
        )  # fmt: skip
        self.targets.append(targets_bt[mask_bt].double())
        self.errors.append(self.targets[-1] - value_bt.detach()[mask_bt].double())
        self.sums.add(n=len(self.targets[-1]), loss=float(total.detach()) * tokens, **stats)
        return total


def update_value(learner: Learner, batch: ValueBatch, plans: Sequence[Plan], *, step: int) -> dict[str, float]:
    """All epochs of the value model's update. Returns the value/ metrics; the explained variance is of V before each update."""
    loss = ValueLoss(learner, batch)
    learner.begin_step()
    for mini_batch, (tokens,) in optimiser_steps(learner, plans, batch.mask_BT):
        learner.update(mini_batch, partial(loss, tokens=tokens), step)
    total = loss.sums.over_ranks(learner.parallel, ("n", "loss", "value_clipped_tokens"))
    nothing = batch.targets_BT.new_zeros(0)
    target, error = (mean_and_variance(torch.cat([nothing, *parts]), learner.parallel)[2] for parts in (loss.targets, loss.errors))
    n = total["n"]
    return learner.metrics() | {
        "value/tokens": n,
        "value/loss": per(total["loss"], n),
        "value/clipped_share": per(total["value_clipped_tokens"], n),
        "value/explained_variance": explained_variance(target, error),
    }


NO_VALUE_MODEL = {f"value/{name}": 0.0 for name in ("tokens", "updates")} | {
    f"value/{name}": math.nan for name in ("loss", "clipped_share", "explained_variance", "grad_norm", "lr")
}
"""The value/ metrics of a step without a value model."""


def explained_variance(target: float, error: float) -> float:
    """1 - Var(error) / Var(target), from these variances; NaN where the targets do not vary, or there are none."""
    return 1 - error / target if target > 1e-12 else math.nan
