"""From values to the advantages that the policy is trained on: EGAE, whitening over the step, the clamp."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from tppo_ref.loop.forward import Forward
from tppo_ref.loop.parallel import Parallel, mean_and_variance, per
from tppo_ref.loop.rows import Rows
from tppo_ref.loop.settings import AdvantageConfig
from tppo_ref.method.advantages import egae, lambda_of_rows, whiten


@dataclasses.dataclass(frozen=True)
class Advantages:
    """Advantages of a step's rows, [B, T], 0 outside of their masks.

    raw_BT      EGAE on `Rows.run_BT`; the joint critic's target is raw + V
    scaled_BT   on `Rows.train_BT`: whitened and clamped where the settings say so, else raw
    """

    raw_BT: Tensor
    scaled_BT: Tensor


def estimate_advantages(
    rows: Rows, forward: Forward, config: AdvantageConfig, window: int, parallel: Parallel
) -> tuple[Advantages, dict[str, float]]:
    """EGAE on each row's run with this step's critic, then whitening over the trained tokens of all ranks, then the clamp.

    T-PPO (arXiv 2506.15050). The prefix is not needed: the advantage of a token depends on nothing before it (docs/theory.md, P6).
    Returns the advantages and the advantage/ metrics.
    """
    length_B = torch.tensor([len(r) for r in rows.responses], dtype=forward.values_BT.dtype, device=rows.cut_B.device)
    lam_B = lambda_of_rows(length_B, rows.cut_B, window, lam=config.lam, alpha=config.lam_alpha)
    raw_BT = egae(
        rows.rewards_BT, forward.values_BT, rows.run_BT, rows.cut_B, gamma=config.gamma, lam=lam_B, cut_value=config.cut_value,
        last_value_B=forward.last_value_B if config.cut_value == "critic" else None,
    )  # fmt: skip
    n, mean, variance = mean_and_variance(raw_BT[rows.train_BT], parallel)
    std = math.sqrt(variance)
    scaled_BT, clamped = torch.where(rows.train_BT, raw_BT, 0.0), 0.0
    if config.whiten and n:
        whitened_BT = whiten(raw_BT, rows.train_BT, mean=mean, std=std)
        scaled_BT = whitened_BT.clamp(-config.clamp, config.clamp)
        clamped = float((scaled_BT != whitened_BT).sum())
    clamped, lam_sum, num_rows = parallel.sum([clamped, float(lam_B.sum()), len(rows.responses)])
    return Advantages(raw_BT, scaled_BT), {
        "advantage/mean": mean,
        "advantage/std": std,
        "advantage/clamped_share": per(clamped, n),
        "advantage/lam_mean": per(lam_sum, num_rows),
    }
