"""One training step's rows as tensors: which tokens train, on which advantage, against which log-probability.

A row is a response as it stands after the window. Columns are response tokens from 0 on; the prefix of a continued response is
there too, because the models read it, but no mask holds it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from tppo_ref.loop.parallel import Parallel
from tppo_ref.loop.settings import AdvantageConfig, PolicyConfig
from tppo_ref.method.advantages import egae, length_adaptive_lambda, whiten
from tppo_ref.method.losses import importance_weights
from tppo_ref.method.masks import policy_token_mask
from tppo_ref.method.records import Response
from tppo_ref.rollout.packing import TokenBatch


def pad(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """Ragged rows as one right-padded tensor [B, T], 0 in the padding."""
    mask_BT = response_mask([len(row) for row in rows])
    padded_BT = torch.zeros(mask_BT.shape, dtype=dtype)
    padded_BT[mask_BT] = torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=dtype)  # no padding passes through Python
    return padded_BT.to(device)


def response_mask(lengths: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Bool [B, T], True on each row's first `lengths[b]` columns."""
    column_T = torch.arange(max(lengths, default=0), device=device)
    return column_T < torch.tensor(lengths, device=device, dtype=torch.long)[:, None]


def terminal_rewards(
    responses: Sequence[Response], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """[B, T], the score on the last token of each ended response, LENGTH_CAP included; a RUNNING response's rewards are 0."""
    rewards_BT = torch.zeros(len(responses), max(map(len, responses), default=0), dtype=dtype, device=device)
    for row, response in enumerate(responses):
        if response.ended:
            assert response.score is not None, f"response {response.id} ended without a score"
            rewards_BT[row, len(response) - 1] = response.score
    return rewards_BT


@dataclasses.dataclass
class PolicyRows:
    """The policy's rows of one step. Tensors are bool or `dtype` (float32, or the models' float64), [B, T] or [B]."""

    responses: list[Response]
    window_begin_B: torch.Tensor  # column of the first token sampled in this step
    run_BT: torch.Tensor  # tokens the policy has yet to see, tail included: egae's run
    train_BT: torch.Tensor  # of these, the ones in the loss
    cut_B: torch.Tensor
    logprob_BT: torch.Tensor  # under the policy before the update
    behaviour_BT: torch.Tensor  # under the policy that sampled the token
    values_BT: torch.Tensor  # current critic, whole row
    last_value_B: torch.Tensor
    raw_advantages_BT: torch.Tensor | None = None  # before whitening; the joint critic's target is raw + V
    advantages_BT: torch.Tensor | None = None

    @classmethod
    def build(
        cls,
        responses: Sequence[Response],
        begins: Sequence[int],
        config: AdvantageConfig,
        device: Any,
        dtype: torch.dtype = torch.float32,
    ) -> PolicyRows:
        mask_BT = response_mask([len(r) for r in responses], device)
        # The one place where "cut" is derived: a row is cut when its response is RUNNING at the window's edge.
        cut_B = torch.tensor([not r.ended for r in responses], dtype=torch.bool, device=device)
        start_B = torch.tensor([r.num_settled for r in responses], dtype=torch.long, device=device)
        skip_tail = 0 if config.tail == "none" else config.tail_tokens
        return cls(
            responses=list(responses),
            window_begin_B=torch.tensor(begins, dtype=torch.long, device=device),
            run_BT=policy_token_mask(mask_BT, start_B, cut_B, skip_tail=0),
            train_BT=policy_token_mask(mask_BT, start_B, cut_B, skip_tail=skip_tail),
            cut_B=cut_B,
            logprob_BT=torch.zeros(mask_BT.shape, dtype=dtype, device=device),
            behaviour_BT=pad([r.logprobs for r in responses], dtype, device),
            values_BT=torch.zeros(mask_BT.shape, dtype=dtype, device=device),
            last_value_B=torch.zeros(len(responses), dtype=dtype, device=device),
        )

    @property
    def new_BT(self) -> torch.Tensor:
        """Tokens of the run that this step sampled; the others were deferred from earlier windows."""
        column_T = torch.arange(self.run_BT.shape[1], device=self.run_BT.device)
        return self.run_BT & (column_T >= self.window_begin_B[:, None])

    def batch(self, rows: Sequence[int], *, detach_prefix: bool = False) -> TokenBatch:
        responses = [self.responses[row] for row in rows]
        return TokenBatch.of(responses, [r.num_settled for r in responses] if detach_prefix else None)

    def put(self, rows: Sequence[int], **results: torch.Tensor) -> None:
        """Write a micro-batch's [b, t] or [b] results into the step's tensors."""
        index = torch.tensor(rows, dtype=torch.long, device=self.cut_B.device)  # long: an empty list would make it float
        for name, result in results.items():
            whole = getattr(self, name)
            if result.ndim == 2:
                whole[index, : result.shape[1]] = result
            else:
                whole[index] = result

    def estimate_advantages(self, config: AdvantageConfig, window: int, parallel: Parallel) -> dict[str, float]:
        """EGAE on each row's run with this step's critic, then whitening over the trained tokens of all ranks, then the clamp.

        Fills raw_advantages_BT and advantages_BT. T-PPO (arXiv 2506.15050); P6 of theory.md says why the prefix is not needed.
        """
        dtype, device = self.values_BT.dtype, self.cut_B.device
        length_B = torch.tensor([len(r) for r in self.responses], dtype=dtype, device=device)
        lam: float | torch.Tensor = config.lam
        if config.length_adaptive_lam:  # a RUNNING response will be longer than it is: half a window is added
            lam = length_adaptive_lambda(length_B + self.cut_B * (window / 2), alpha=config.lam_alpha, floor=config.lam)
        self.raw_advantages_BT = egae(
            terminal_rewards(self.responses, device, dtype), self.values_BT, self.run_BT, self.cut_B,
            gamma=config.gamma, lam=lam, cut_value=config.cut_value,
            last_value_B=self.last_value_B if config.cut_value == "critic" else None,
        )  # fmt: skip
        raw = self.raw_advantages_BT[self.train_BT].double()
        n, total, squares = parallel.sum([raw.numel(), float(raw.sum()), float(raw.square().sum())])
        mean = total / n if n else 0.0
        std = max(squares / n - mean * mean, 0.0) ** 0.5 if n else 0.0
        self.advantages_BT = torch.where(self.train_BT, self.raw_advantages_BT, 0.0)
        clamped = 0.0
        if config.whiten and n:
            whitened = whiten(self.raw_advantages_BT, self.train_BT, mean=mean, std=std)
            self.advantages_BT = whitened.clamp(-config.clamp, config.clamp)
            clamped = float((self.advantages_BT != whitened).sum())
        lam_sum = lam * len(self.responses) if isinstance(lam, float) else float(lam.sum())
        clamped, lam_sum, num_rows = parallel.sum([clamped, lam_sum, len(self.responses)])
        mean_lam = lam_sum / num_rows if num_rows else config.lam
        return {"advantage/mean": mean, "advantage/std": std, "advantage/clamped_share": clamped / n if n else 0.0,
                "advantage/lam_mean": mean_lam}  # fmt: skip

    def clip_centre(self, config: PolicyConfig) -> tuple[torch.Tensor, torch.Tensor | None, float]:
        """Old log-probabilities [B, T], importance weights or None, and the share of weights that was clipped.

        Tokens sampled in this step: the policy before the update, recomputed or the engine's. Older tokens (deferred, or of a
        partial rollout): with importance="none" the behaviour policy's, so that the clipped ratio itself is the correction;
        else the policy before the update, with the weight pi_start / pi_behaviour outside of the clip.
        """
        start_BT = self.logprob_BT
        if config.importance == "none":
            if config.old_logprobs == "engine":
                return self.behaviour_BT, None, 0.0
            return torch.where(self.new_BT, start_BT, self.behaviour_BT), None, 0.0
        weight_BT, share = importance_weights(
            start_BT, self.behaviour_BT, self.train_BT, mode=config.importance, cap=config.importance_cap
        )
        return start_BT, weight_BT, share

    def positive_BT(self) -> torch.Tensor:
        """This step's trained tokens of responses that ended correct in this step: the LM loss's mask."""
        correct = [r.ended and (r.score or 0.0) > 0 for r in self.responses]
        return self.train_BT & torch.tensor(correct, dtype=torch.bool, device=self.cut_B.device)[:, None]


def store_values(rows: PolicyRows) -> None:
    """Append this step's critic values of newly sampled tokens to their responses: the anchor of the critic's clip."""
    for row, response in enumerate(rows.responses):
        response.values += rows.values_BT[row, len(response.values) : len(response)].tolist()
