"""From values, or from the scores of groups, to the advantages that the policy is trained on: then whitening and the clamp."""

from __future__ import annotations

import dataclasses
import math
from typing import cast

import torch
from torch import Tensor

from tppo_ref.loop.cut_rules import CutRule, cuts
from tppo_ref.loop.forward import Forward
from tppo_ref.loop.groups import advantage_of_rows
from tppo_ref.loop.parallel import Parallel, mean_and_variance, per
from tppo_ref.loop.rows import Rows
from tppo_ref.loop.settings import AdvantageConfig, RolloutConfig
from tppo_ref.method.advantages import CutValue, egae, lambda_of_rows, whiten


@dataclasses.dataclass(frozen=True)
class Advantages:
    """Advantages of a step's rows, [B, T], 0 outside of their masks.

    raw_BT      on `Rows.run_BT`: EGAE, and then the joint critic's target is raw + V; or each response's own, on all of its tokens
    scaled_BT   on `Rows.train_BT`: whitened and clamped where the settings say so, else raw
    """

    raw_BT: Tensor
    scaled_BT: Tensor


def estimate_advantages(
    rows: Rows,
    forward: Forward,
    config: AdvantageConfig,
    rollout: RolloutConfig,
    parallel: Parallel,
    cut_rule: CutRule | None = None,
) -> tuple[Advantages, dict[str, float]]:
    """What the estimator says of each row's run, then whitening over the trained tokens of all ranks, then the clamp.

    cut_rule   what stands for V(s_l) at a cut, in place of config.cut_value; on this rank's rows alone
    Returns the advantages and the advantage/ metrics.
    """
    if config.critic_free:
        raw_BT, metrics = _of_groups(rows, config, rollout.samples_per_prompt, parallel)
    else:
        raw_BT, metrics = _of_values(rows, forward, config, rollout.window, parallel, cut_rule)
    n, mean, variance = mean_and_variance(raw_BT[rows.train_BT], parallel)
    std = math.sqrt(variance)
    scaled_BT, clamped = torch.where(rows.train_BT, raw_BT, 0.0), 0.0
    if config.whiten and n:
        whitened_BT = whiten(raw_BT, rows.train_BT, mean=mean, std=std)
        scaled_BT = whitened_BT.clamp(-config.clamp, config.clamp)
        clamped = float((scaled_BT != whitened_BT).sum())
    (clamped,) = parallel.sum([clamped])
    return Advantages(raw_BT, scaled_BT), metrics | {
        "advantage/mean": mean,
        "advantage/std": std,
        "advantage/clamped_share": per(clamped, n),
    }


def _of_values(
    rows: Rows, forward: Forward, config: AdvantageConfig, window: int, parallel: Parallel, cut_rule: CutRule | None
) -> tuple[Tensor, dict[str, float]]:
    """EGAE on each row's run with this step's critic. T-PPO (arXiv 2506.15050).

    The prefix is not needed: the advantage of a token depends on nothing before it (docs/theory.md, P6).
    """
    length_B = torch.tensor([len(r) for r in rows.responses], dtype=forward.values_BT.dtype, device=rows.cut_B.device)
    lam_B = lambda_of_rows(length_B, rows.cut_B, window, lam=config.lam, alpha=config.lam_alpha)
    cut_value, last_value_B = cast(CutValue, config.cut_value), forward.last_value_B
    if cut_rule is not None:
        cut_value, last_value_B = "critic", _stand_ins(cut_rule, rows, forward, lam_B, config.gamma)
    raw_BT = egae(
        rows.rewards_BT, forward.values_BT, rows.run_BT, rows.cut_B, gamma=config.gamma, lam=lam_B, cut_value=cut_value,
        last_value_B=last_value_B if cut_value == "critic" else None,
    )  # fmt: skip
    lam_sum, num_rows = parallel.sum([float(lam_B.sum()), len(rows.responses)])
    return raw_BT, {"advantage/lam_mean": per(lam_sum, num_rows), "advantage/flat_groups": math.nan}


def _stand_ins(rule: CutRule, rows: Rows, forward: Forward, lam_B: Tensor, gamma: float) -> Tensor:
    """What a rule puts for V(s_l), [B]; 0 where nothing is cut, and nobody reads it."""
    last_value_B, cut_B = torch.zeros_like(forward.last_value_B), rows.cut_B & rows.run_BT.any(1)
    if cut_B.any():
        run = forward.values_BT, forward.last_value_B, rows.rewards_BT, rows.run_BT
        last_value_B[cut_B] = rule(cuts(*run, cut_B, lam_B, gamma))
    return last_value_B


def _of_groups(rows: Rows, config: AdvantageConfig, size: int, parallel: Parallel) -> tuple[Tensor, dict[str, float]]:
    """Each response's advantage within its group, on all tokens of its run (groups.py)."""
    assert config.estimator != "egae"
    advantage_b, flat = advantage_of_rows(rows.responses, size, estimator=config.estimator, parallel=parallel)
    advantage_B = torch.tensor(advantage_b, dtype=rows.behaviour_BT.dtype, device=rows.cut_B.device)
    raw_BT = torch.where(rows.run_BT, advantage_B[:, None], 0.0)
    return raw_BT, {"advantage/lam_mean": math.nan, "advantage/flat_groups": flat}
