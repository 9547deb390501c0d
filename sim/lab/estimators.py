"""The advantage estimators under examination, as data. The arithmetic is tppo_ref's: `estimate` only feeds it enumerated rows."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sim.lab.checks import Floats, check_choice, check_count, check_unit
from sim.lab.rollouts import Rollouts, Stretches
from sim.lab.token_mdp import TokenMDP
from tppo_ref.loop import cut_rules
from tppo_ref.loop.cut_rules import Cut, CutRule, stand_in
from tppo_ref.method.advantages import egae, gae, lambda_of_rows, monte_carlo_returns
from tppo_ref.method.errors import nearest
from tppo_ref.method.losses import importance_weights
from tppo_ref.method.masks import policy_token_mask
from tppo_ref.runs.own_rule import load_rule

CutValue = Literal["previous", "critic", "zero", "none", "monte-carlo"]
Tail = Literal["exclude", "defer", "drop"]
Importance = Literal["none", "truncated", "masked", "exact"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimator:
    """How a step turns its rows into credit for tokens.

    lam             trace parameter in [0, 1]; the floor of the length-adaptive one
    lam_alpha       None: lam as it is; else max(lam, 1 - 1/(alpha L)), L tokens so far, plus half a window on cut rows (VAPO [V],
                    half a window [P])
    cut_value       what stands for V(s_l) at a cut: "previous" (EGAE), "critic" (cut-GAE), "zero" (takes the cut for an end);
                    "none": nothing is cut, GAE over the whole response; "monte-carlo": nothing is cut, full return minus V;
                    or a rule of one's own (cut_rules.py)
    tail            the last k tokens before a cut are: "exclude" never trained, where the row is cut [P]; "defer" trained in the
                    next window; "drop" the positions l-k .. l-1 are never trained, ended or not
    tail_tokens     k; 0: every token is trained at once
    train_on        "window": each token in the step that samples it (or the next, deferred); "ended": whole responses in the step
                    in which they end, uncut (partial rollouts)
    importance      weight of tokens that an older policy sampled: "none" 1, "truncated" min(ratio, cap), "masked" 0 above the cap,
                    "exact" the ratio, all per token. No weight is put on what follows a token or on how its state was reached.
    importance_cap  that cap

    With "drop", an edge at the length cap is no edge: nothing is cut there. Raises ValueError for values out of range and for
    combinations that mean nothing (a tail without a cut).
    """

    lam: float = 0.95
    lam_alpha: float | None = None
    cut_value: CutValue | CutRule = "previous"
    tail: Tail = "exclude"
    tail_tokens: int = 0
    train_on: Literal["window", "ended"] = "window"
    importance: Importance = "none"
    importance_cap: float = 2.0

    def __post_init__(self) -> None:
        choices = {"cut_value": CutValue, "tail": Tail, "importance": Importance, "train_on": Literal["window", "ended"]}
        for name, choice in choices.items():
            if not callable(getattr(self, name)):
                check_choice(name, getattr(self, name), get_args(choice))
        check_unit("lam", self.lam)
        check_count("tail_tokens", self.tail_tokens, least=0)
        if self.lam_alpha is not None and not 0 < self.lam_alpha < math.inf:
            raise ValueError(f"lam_alpha: got {self.lam_alpha!r}; expected None or a positive finite number")
        if not 0 < self.importance_cap < math.inf:
            raise ValueError(f"importance_cap: got {self.importance_cap!r}; expected a positive finite number")
        if self.cuts and self.train_on == "ended":
            raise ValueError(f"cut_value: got {self.cut_value!r} with train_on='ended'; expected none or monte-carlo")
        if not self.cuts and self.tail_tokens:
            raise ValueError(f"tail_tokens: got {self.tail_tokens} with cut_value={self.cut_value!r}; expected 0: nothing is cut")

    @property
    def cuts(self) -> bool:
        """Whether a window's edge ends its rows."""
        return self.cut_value not in ("none", "monte-carlo")

    @property
    def uncut(self) -> Estimator:
        """The same on whole responses, all sampled in one step: what is left of its error is the critic's (and lambda's)."""
        whole: CutValue | CutRule = "none" if self.cuts else self.cut_value
        return dataclasses.replace(self, cut_value=whole, tail_tokens=0, train_on="window", importance="none")

    def rows(self, rollouts: Rollouts, window: int, offset: int | None = None) -> Stretches:
        """What a step with that window hands to this estimator."""
        if self.train_on == "ended":
            return rollouts.stretches(window, offset, ended_only=True)
        if not self.cuts:
            rollouts.edges(window, offset)  # checked, though nothing is cut
            return rollouts.stretches(None)
        return rollouts.stretches(window, offset, lead=self.tail_tokens if self.tail == "defer" else 0)


ESTIMATORS: dict[str, Estimator] = {
    "egae": Estimator(),
    "cut-gae": Estimator(cut_value="critic"),
    "zero-cut": Estimator(cut_value="zero"),
    "extrapolated": Estimator(cut_value=cut_rules.extrapolated),
    "averaged": Estimator(cut_value=cut_rules.averaged),
    "mixture": Estimator(cut_value=cut_rules.mixture),
    "shrunk-step": Estimator(cut_value=cut_rules.shrunk_step),
    "gae": Estimator(cut_value="none"),
    "monte-carlo": Estimator(cut_value="monte-carlo"),
    "egae-exclude": Estimator(tail="exclude", tail_tokens=2),
    "egae-defer": Estimator(tail="defer", tail_tokens=2),
    "egae-drop": Estimator(tail="drop", tail_tokens=2),
    "egae-adaptive": Estimator(lam_alpha=0.05),
    "partial": Estimator(cut_value="none", train_on="ended"),
    "partial-is": Estimator(cut_value="none", train_on="ended", importance="truncated"),
    "partial-exact": Estimator(cut_value="none", train_on="ended", importance="exact"),
}
"""Named estimators. `named` is the way in for names that people type."""


def named(name: str) -> Estimator:
    """The estimator of that name, or of a cut rule "module:function"; ValueError for an unknown one, with the nearest known one."""
    if ":" in name:
        return Estimator(cut_value=load_rule(name))
    if name not in ESTIMATORS:
        raise ValueError(f"estimator: got {name!r}; expected one of {', '.join(ESTIMATORS)}{nearest(name, list(ESTIMATORS))}")
    return ESTIMATORS[name]


class Credit(NamedTuple):
    """What a step's rows say of their tokens: the estimate, importance weight included, and which tokens train. [B, T]."""

    estimate_BT: Tensor
    train_BT: Tensor


def estimate(
    rows: Stretches, critic_N: Floats, estimator: Estimator, mdp: TokenMDP, window: int, *, critic_rms: float = math.nan
) -> Credit:
    """Advantages and masks by tppo_ref.method's advantages, masks and losses, on enumerated rows, in float64.

    critic_rms: the critic's error, for cut rules that weigh by it. ValueError as those of tppo_ref.method, and `stand_in`'s.
    """
    gamma, critic = mdp.gamma, torch.from_numpy(critic_N)
    values_BT = torch.where(rows.mask_BT, critic[rows.node_BT], 0.0)
    lam: float | Tensor = estimator.lam
    if estimator.lam_alpha is not None:
        lam = lambda_of_rows(rows.length_B.double(), rows.cut_B, window, lam=estimator.lam, alpha=estimator.lam_alpha)
    run = rows.reward_BT, values_BT, rows.mask_BT
    if estimator.cut_value == "monte-carlo":
        advantage_BT = monte_carlo_returns(rows.reward_BT, rows.mask_BT, gamma=gamma) - values_BT
    elif estimator.cut_value == "none":
        advantage_BT = gae(*run, gamma=gamma, lam=lam)
    elif callable(estimator.cut_value):
        stand_in_B = _stand_ins(rows, values_BT, critic[rows.next_node_B], lam, estimator.cut_value, gamma, critic_rms)
        advantage_BT = egae(*run, rows.cut_B, gamma=gamma, lam=lam, cut_value="critic", last_value_B=stand_in_B)
    else:
        last_value_B = critic[rows.next_node_B] if estimator.cut_value == "critic" else None
        advantage_BT = egae(*run, rows.cut_B, gamma=gamma, lam=lam, cut_value=estimator.cut_value, last_value_B=last_value_B)
    train_BT = _train_mask(rows, estimator, mdp.max_tokens)
    if estimator.importance == "none":
        return Credit(advantage_BT, train_BT)
    mode, cap = estimator.importance, estimator.importance_cap
    weight_BT, _ = importance_weights(
        rows.logprob_BT, rows.behaviour_logprob_BT, rows.mask_BT, mode="truncated" if mode == "exact" else mode,
        cap=sys.float_info.max if mode == "exact" else cap,
    )  # fmt: skip
    return Credit(advantage_BT * weight_BT, train_BT)


def _stand_ins(
    rows: Stretches, values_BT: Tensor, critic_B: Tensor, lam: float | Tensor, rule: CutRule, gamma: float, critic_rms: float
) -> Tensor:
    """What a rule puts for V(s_l), [B]; 0 in rows that are not cut, where nobody reads it."""
    cut_B = rows.cut_B
    last_value_B = torch.zeros_like(critic_B)
    if cut_B.any():
        lam_B = torch.as_tensor(lam, dtype=torch.float64).expand(len(rows))
        last_value_B[cut_B] = stand_in(rule, Cut(
            value_BT=values_BT[cut_B], reward_BT=rows.reward_BT[cut_B], num_B=rows.mask_BT.sum(1)[cut_B], critic_B=critic_B[cut_B],
            weight_B=rows.prob_B[cut_B], lam_B=lam_B[cut_B], gamma=gamma, critic_rms=critic_rms,
        ))  # fmt: skip
    return last_value_B


def _train_mask(rows: Stretches, estimator: Estimator, max_tokens: int) -> Tensor:
    """Every row begins with the first token that the policy has not trained yet, so the window starts at column 0."""
    skip_tail = estimator.tail_tokens if estimator.tail in ("exclude", "defer") else 0
    train_BT = policy_token_mask(rows.mask_BT, torch.zeros_like(rows.begin_B), rows.cut_B, skip_tail=skip_tail)
    if estimator.tail == "drop":
        num_dropped_B = torch.where(rows.edge_B < max_tokens, estimator.tail_tokens, 0)
        train_BT &= rows.depth_BT < (rows.edge_B - num_dropped_B)[:, None]
    return train_BT
