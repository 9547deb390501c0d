"""What may stand for V(s_l) where a window's edge cuts a response after l tokens: rules as functions, ours and a user's own.

    def mine(cut: Cut) -> Tensor:          # [B]: the stand-in of each cut row
        return 0.5 * (cut.critic_B + cut.back(1))

    python -m sim bias --estimators egae my_module:mine
    python -m benchmarks.cut_rules --rules my_module:mine           # --text: trained on text
    python -m tppo_ref train --advantage.cut_value my_module:mine

A rule sees what a trainer knows at the cut, for the cut rows alone. EGAE's recursion then bootstraps from what it returns:
delta_{l-1} = r_{l-1} + gamma stand-in - V(s_{l-1}). T-PPO's rule is `previous` (arXiv 2506.15050); the others are this project's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Cut:
    """B rows that a window's edge cuts, T columns. Values and rewards in units of reward; float64 in the laboratory, in a
    trainer the models' dtype, at least float32.

    value_BT    V before each token of the row's run, right-padded with 0: its tokens in this window, and deferred ones before them
    reward_BT   its rewards
    num_B       the run's tokens, at least 1
    critic_B    V(s_l), the critic's own word on the state at the cut
    weight_B    how often a step has the row; equal weights in a trainer
    lam_B       trace parameter of the row
    gamma       discount
    critic_rms  root mean square error of the critic over visited states: known in the laboratory, `noise_rms` in a trainer
    """

    value_BT: Tensor
    reward_BT: Tensor
    num_B: Tensor
    critic_B: Tensor
    weight_B: Tensor
    lam_B: Tensor
    gamma: float
    critic_rms: float

    def back(self, tokens: int) -> Tensor:
        """V(s_{l - tokens}), [B], tokens from 1 on; the row's first value where it has fewer."""
        column_B = (self.num_B - tokens).clamp(min=0)
        return self.value_BT.gather(1, column_B[:, None])[:, 0]

    def mean(self, x_B: Tensor) -> float:
        """Over the rows, weighted."""
        return float((self.weight_B * x_B).sum() / self.weight_B.sum())


CutRule = Callable[[Cut], Tensor]


def previous(cut: Cut) -> Tensor:
    """V(s_{l-1}): T-PPO's."""
    return cut.back(1)


def critic(cut: Cut) -> Tensor:
    """V(s_l): what every other trainer bootstraps from."""
    return cut.critic_B


def zero(cut: Cut) -> Tensor:
    """0: the cut is taken for an end."""
    return torch.zeros_like(cut.critic_B)


def extrapolated(cut: Cut) -> Tensor:
    """V(s_{l-1}) + (V(s_{l-1}) - V(s_{l-2})): the line through the last two values, where V(s_l) is not at hand."""
    return 2 * cut.back(1) - cut.back(2)


def averaged(cut: Cut) -> Tensor:
    """The mean of the last four values before the cut: four looks instead of one, at the price of looking back."""
    return torch.stack([cut.back(tokens) for tokens in range(1, 5)]).mean(0)


def mixture(cut: Cut) -> Tensor:
    """(1 - w) V(s_{l-1}) + w V(s_l) with P8's weight (docs/theory.md) for tokens before the last one.

        w = 1 - (1 - kappa) sigma^2 / m,    kappa = (1 - lam) / (gamma lam)

    sigma is `critic_rms`, m the mean square of V(s_l) - V(s_{l-1}) over the rows. Where errors are independent from state to state
    it comes nearest, in mean square, to cut-GAE under the exact critic. Outside of [0, 1] it is put to the nearer end.
    """
    step_B = cut.critic_B - cut.back(1)
    m = cut.mean(step_B**2)
    if not m:  # nothing moves: both say the same
        return cut.critic_B
    kappa_B = (1 - cut.lam_B) / (cut.gamma * cut.lam_B).clamp(min=1e-12)
    weight_B = (1 - (1 - kappa_B) * cut.critic_rms**2 / m).clamp(0, 1)
    return cut.back(1) + weight_B * step_B


def shrunk_step(cut: Cut) -> Tensor:
    """The same with P8's weight for the last token, w = 1 - (1 + 1/gamma) sigma^2 / m: EGAE where noise explains every step."""
    step_B = cut.critic_B - cut.back(1)
    m = cut.mean(step_B**2)
    weight = 1 - (1 + 1 / max(cut.gamma, 1e-12)) * cut.critic_rms**2 / max(m, 1e-300)
    return cut.back(1) + min(max(weight, 0.0), 1.0) * step_B


CUT_RULES: dict[str, CutRule] = {
    "previous": previous,
    "critic": critic,
    "zero": zero,
    "extrapolated": extrapolated,
    "averaged": averaged,
    "mixture": mixture,
    "shrunk-step": shrunk_step,
}
"""Ours, by name."""


def noise_rms(value_BT: Tensor, reward_BT: Tensor, run_BT: Tensor, gamma: float) -> float:
    """What a trainer can know of its critic's error: the root mean square of that part which is independent from state to state.

    With V = V^pi + e of such errors, neighbouring deltas share one of them with opposite signs, and surprises are uncorrelated:

        delta_t = r_t + gamma V(s_{t+1}) - V(s_t),    E[delta_t delta_{t+1}] = -gamma E[e^2]

    so minus the lag-one autocovariance is the noise's variance: as Roll (1984) reads a market's spread off its prices. Errors that
    are alike from state to state do not show in it. [B, T] each; over all neighbours within a run that another token follows; 0
    where the covariance is not negative, or nothing is neighbour.
    """
    delta_BT = reward_BT[:, :-1] + gamma * value_BT[:, 1:] - value_BT[:, :-1]
    inside_BT = run_BT[:, :-1] & run_BT[:, 1:]
    pair_BT = inside_BT[:, :-1] & inside_BT[:, 1:]
    products = (delta_BT[:, :-1] * delta_BT[:, 1:])[pair_BT].double()
    return math.sqrt(max(0.0, -float(products.mean()) / gamma)) if len(products) and gamma else 0.0


def cuts(
    value_BT: Tensor, last_value_B: Tensor, reward_BT: Tensor, run_BT: Tensor, cut_B: Tensor, lam_B: Tensor, gamma: float
) -> Cut:
    """The `Cut` of a training step, of those rows of it that are cut: runs moved to column 0, all rows of equal weight.

    run_BT [B, T] bool, a run of columns per row; cut_B [B] bool, True only where the run holds a token.
    """
    num_B, first_B = run_BT[cut_B].sum(1), run_BT[cut_B].int().argmax(1)
    column_T = torch.arange(int(num_B.max()), device=num_B.device)
    inside_BT = column_T < num_B[:, None]
    at_BT = torch.where(inside_BT, first_B[:, None] + column_T, 0)
    value_bt, reward_bt = (torch.where(inside_BT, x_BT[cut_B].gather(1, at_BT), 0.0) for x_BT in (value_BT, reward_BT))
    return Cut(value_BT=value_bt, reward_BT=reward_bt, num_B=num_B, critic_B=last_value_B[cut_B],
               weight_B=torch.ones_like(last_value_B[cut_B]), lam_B=lam_B[cut_B], gamma=gamma,
               critic_rms=noise_rms(value_BT, reward_BT, run_BT, gamma))  # fmt: skip


def stand_in(rule: CutRule, cut: Cut) -> Tensor:
    """What a rule returns, on the rows' device and in their dtype. ValueError of one line where it raises, or is not one finite
    real number per row."""
    name = getattr(rule, "__name__", type(rule).__name__)
    try:
        value_B = rule(cut)
    except (Exception, SystemExit) as error:  # whatever a user's code raises
        raise ValueError(f"{name}: ended in {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(value_B, Tensor) or value_B.shape != cut.critic_B.shape or value_B.is_complex():
        shown = f"{value_B.dtype} {list(value_B.shape)}" if isinstance(value_B, Tensor) else " ".join(repr(value_B).split())
        raise ValueError(f"{name}: got {shown}; expected a real tensor of shape {list(cut.critic_B.shape)}")
    value_B = value_B.detach().to(cut.critic_B)
    if not value_B.isfinite().all():
        raise ValueError(f"{name}: got {value_B[~value_B.isfinite()][0].item()}; expected finite numbers")
    return value_B
