"""What the value model is trained on: two ways to choose it, one kind of batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from tppo_ref.loop.estimates import Advantages
from tppo_ref.loop.forward import Forward
from tppo_ref.loop.parallel import Parallel
from tppo_ref.loop.rows import Rows, pad, response_mask, terminal_rewards
from tppo_ref.method.advantages import monte_carlo_returns
from tppo_ref.method.masks import value_token_mask
from tppo_ref.method.records import Response


@dataclasses.dataclass(frozen=True)
class ValueBatch:
    """Rows for the value model. Tensors are [B, T].

    targets_BT   what V should say
    mask_BT      bool, the tokens it is trained on
    anchor_BT    what V said when the token was first fed to it: its clip moves around this; None: no clip
    live_from    per row the first column that is differentiated through (TokenBatch); None: all
    """

    responses: Sequence[Response]
    targets_BT: Tensor
    mask_BT: Tensor
    anchor_BT: Tensor | None
    live_from: Sequence[int] | None = None


def joint_batch(rows: Rows, forward: Forward, advantages: Advantages, *, constant_prefix: bool = False) -> ValueBatch:
    """PPO's joint update: this step's policy tokens, target A + V with the policy's lambda. V is of this step; the anchor is, too,
    but for deferred tokens, whose value was stored with their window."""
    live_from = [r.num_settled for r in rows.responses] if constant_prefix else None
    anchor_BT = pad([r.values for r in rows.responses], forward.values_BT.dtype, forward.values_BT.device)
    return ValueBatch(rows.responses, advantages.raw_BT + forward.values_BT, rows.train_BT, anchor_BT, live_from)


def independent_batch(responses: Sequence[Response], *, gamma: float, device: torch.device | str, dtype: torch.dtype) -> ValueBatch:
    """T-PPO's independent update (arXiv 2506.15050): all tokens of ended responses, target their Monte Carlo returns, anchored
    at the values that were stored with each window. A response that is still RUNNING has no token in the mask."""
    ended_B = torch.tensor([r.ended for r in responses], dtype=torch.bool, device=device)
    mask_BT = value_token_mask(response_mask([len(r) for r in responses], device), ended_B)
    targets_BT = monte_carlo_returns(terminal_rewards(responses, device, dtype), mask_BT, gamma=gamma)
    return ValueBatch(responses, targets_BT, mask_BT, pad([r.values for r in responses], dtype, device))


def take_full_batches(held: Sequence[Response], size: int, parallel: Parallel) -> tuple[list[Response], list[Response]]:
    """Ended responses -> (those to train on now, those that wait): all of them with size 0, else as many batches of `size` as
    there are on every rank. What is taken is spread evenly over the ranks."""
    taken = len(held)
    if size:
        taken = size * min(parallel.gather_objects(len(held) // size))  # the rank with fewest sets the pace
    now = list(held[:taken])
    return parallel.rebalance(now, [r.num_fed for r in now], [True] * taken), list(held[taken:])
