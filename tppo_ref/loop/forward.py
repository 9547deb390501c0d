"""What the models say of a step's rows before any update, and where the policy's clip is centred."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tppo_ref.loop.learner import Plan
from tppo_ref.loop.parallel import Parallel, per
from tppo_ref.loop.rows import Rows
from tppo_ref.loop.settings import PolicyConfig
from tppo_ref.method.errors import NonFiniteError, UserError
from tppo_ref.method.losses import importance_weights
from tppo_ref.rollout.attention import PrefixKeys
from tppo_ref.rollout.packing import TokenBatch


@dataclasses.dataclass(frozen=True)
class Forward:
    """Outputs of one forward pass over `Rows`, without gradient.

    values_BT       V before each token by this step's critic, the whole row; without a value model NaN, which nobody may read
    last_value_B    V after the row's last token; so, too
    logprob_BT      under the policy before the update, on the tokens of the run; the engine's where those are taken
    gap             mean |recomputed - engine's| log-probability of this step's tokens, all ranks; NaN where none was recomputed
    prefixes        keys and values of each micro-batch's constant prefix, by the micro-batch's identity; empty unless kept
    """

    values_BT: Tensor
    last_value_B: Tensor
    logprob_BT: Tensor
    gap: float
    prefixes: dict[int, PrefixKeys]


CHECKED_SHARE = 0.05  # of the micro-batches, where the engine's log-probabilities are taken


@torch.no_grad()
def forward(
    rows: Rows,
    plan: Plan,
    config: PolicyConfig,
    *,
    policy: Callable[[TokenBatch], Tensor],
    value: Callable[[TokenBatch], tuple[Tensor, Tensor]] | None,
    parallel: Parallel,
    key: tuple[int, int],
) -> Forward:
    """Values of all rows, and log-probabilities of their runs: recomputed, or the engine's, of which a random twentieth of the
    micro-batches is recomputed all the same and compared.

    They are computed in the micro-batches of the first epoch's `plan`, fed as in the update: the first ratio is then exactly 1.
    key: (seed, step), which chooses the micro-batches that are compared. On all ranks or none: NonFiniteError where an output is
    not finite, UserError where the engine's log-probabilities are further off than config.engine_gap_limit.
    """
    unsaid, logprob_BT = 0.0 if value else math.nan, torch.zeros_like(rows.behaviour_BT)
    values_BT, last_value_B = torch.full_like(logprob_BT, unsaid), logprob_BT.new_full((len(rows.responses),), unsaid)
    seen_B, prefixes = torch.zeros_like(rows.cut_B), dict[int, PrefixKeys]()
    constant, takes_engines = config.prefix == "constant", config.old_logprobs == "engine"
    micro_batches = [micro for mini in plan for micro in mini]
    # The same on every rank: sharded models gather their weights in each pass.
    chosen = np.random.default_rng(key).random(len(micro_batches)) < (CHECKED_SHARE if takes_engines else 1.0)
    for micro, recompute in zip(micro_batches, chosen.tolist(), strict=True):
        index = torch.tensor(micro, dtype=torch.long, device=rows.cut_B.device)  # long: an empty list would make it float
        if value:
            value_bt, last_value_b = value(rows.batch(micro))
            values_BT[index, : value_bt.shape[1]], last_value_B[index] = value_bt, last_value_b
        if recompute:
            kept = PrefixKeys() if config.keep_prefix else None
            logprob_bt = policy(rows.batch(micro, constant_prefix=constant, kept=kept))
            logprob_BT[index, : logprob_bt.shape[1]], seen_B[index] = logprob_bt, True
            if kept is not None:
                prefixes[id(micro)] = kept
    outputs = [("log-probability", logprob_BT), *([("value", values_BT), ("value", last_value_B)] if value else [])]
    gap = _check_outputs(rows, outputs, logprob_BT, seen_B, parallel, step=key[1])
    if takes_engines:
        if gap > config.engine_gap_limit:
            raise UserError(
                f"policy.old_logprobs: got engine, whose log-probabilities differ from the trainer's by {gap:.2g} in step "
                f"{key[1]}; expected at most {config.engine_gap_limit:g} on average (policy.engine_gap_limit); use recompute"
            )
        logprob_BT = rows.behaviour_BT
    return Forward(values_BT, last_value_B, logprob_BT, gap, prefixes)


def _check_outputs(
    rows: Rows, outputs: Sequence[tuple[str, Tensor]], logprob_BT: Tensor, seen_B: Tensor, parallel: Parallel, step: int
) -> float:
    """`Forward.gap`; NonFiniteError where an output is not finite."""
    compared_BT = rows.new_BT & seen_B[:, None]
    gap_N = (logprob_BT - rows.behaviour_BT)[compared_BT].abs().double()
    bad = parallel.max([not bool(torch.isfinite(tensor).all()) for _, tensor in outputs])  # all ranks stop, or none
    for (name, _), is_bad in zip(outputs, bad, strict=True):
        if is_bad:
            raise NonFiniteError(f"step {step}: a {name} is not finite; stopped before the update")
    return per(*parallel.sum([float(gap_N.sum()), len(gap_N)]))


def remember_values(rows: Rows, values_BT: Tensor) -> None:
    """Append this step's critic values of newly sampled tokens to their responses, which carry them from step to step.

    They anchor the critic's clip when the response has ended: T-PPO's old values are those stored with each window [P].
    """
    for row, response in enumerate(rows.responses):
        response.values += values_BT[row, len(response.values) : len(response)].tolist()


@dataclasses.dataclass(frozen=True)
class ClipCentre:
    """What the policy's ratio is taken against, [B, T]: `ratio = exp(logprob - logprob_BT)`, times `weight_BT` where there is one,
    clipped around exp(start_BT - logprob_BT) where there is a start_BT, else around 1.

    clipped_share   of the weights, as a share of the trained tokens
    """

    logprob_BT: Tensor
    weight_BT: Tensor | None
    clipped_share: float
    start_BT: Tensor | None = None

    def of_part(self, part: Any) -> ClipCentre:
        """The same for some rows and columns."""
        weight, start = (None if x is None else x[part] for x in (self.weight_BT, self.start_BT))
        return ClipCentre(self.logprob_BT[part], weight, self.clipped_share, start)


def clip_centre(rows: Rows, start_BT: Tensor, config: PolicyConfig) -> ClipCentre:
    """The clip's centre, and importance weights where asked for. start_BT: log-probabilities before the update (`Forward`).

    Tokens sampled in this step: the policy before the update, recomputed or the engine's. Older tokens (deferred, of a partial
    rollout, or reused): with importance="none" the behaviour policy's, so that the clipped ratio itself is the correction; else the
    policy before the update, with the weight pi_start / pi_behaviour outside of the clip (the decoupled form). "generalised": each
    token's behaviour policy, and a clip around the ratio that it has before the update (GePPO).
    """
    if config.importance == "generalised":
        return ClipCentre(rows.behaviour_BT, None, 0.0, start_BT)
    if config.importance == "none":
        if config.old_logprobs == "engine":
            return ClipCentre(rows.behaviour_BT, None, 0.0)
        return ClipCentre(torch.where(rows.new_BT, start_BT, rows.behaviour_BT), None, 0.0)
    weight_BT, share = importance_weights(
        start_BT, rows.behaviour_BT, rows.train_BT, mode=config.importance, cap=config.importance_cap
    )
    return ClipCentre(start_BT, weight_BT, share)


def dtype_of(modules: Sequence[torch.nn.Module]) -> torch.dtype:
    """The dtype of a step's numbers: at least float32, float64 where a model is."""
    dtypes = [p.dtype for module in modules for p in module.parameters()]
    return torch.float64 if torch.float64 in dtypes else torch.float32
