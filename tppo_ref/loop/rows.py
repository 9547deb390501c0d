"""One training step's rows: which responses train, on which of their tokens, and who sampled these.

A row is a response as it stands after the window. Columns are response tokens from 0 on; the prefix of a continued response is
there too, because the models read it, but no mask holds it.

A step's data flows one way, and none of it is written to again:

    Rows -> Forward (forward.py) -> Advantages (estimates.py) -> losses (updates.py)
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from tppo_ref.loop.settings import AdvantageConfig
from tppo_ref.method.masks import num_settled, policy_token_mask
from tppo_ref.method.records import Response, WindowSlice
from tppo_ref.rollout.attention import PrefixKeys
from tppo_ref.rollout.packing import TokenBatch
from tppo_ref.rollout.turns import num_before


def pad(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Ragged rows as one right-padded tensor [B, T], 0 in the padding."""
    mask_BT = response_mask([len(row) for row in rows])
    padded_BT = torch.zeros(mask_BT.shape, dtype=dtype)
    padded_BT[mask_BT] = torch.tensor(list(itertools.chain.from_iterable(rows)), dtype=dtype)  # no padding passes through Python
    return padded_BT.to(device)


def response_mask(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Bool [B, T], True on each row's first `lengths[b]` columns."""
    column_T = torch.arange(max(lengths, default=0), device=device)
    return column_T < torch.tensor(lengths, device=device, dtype=torch.long)[:, None]


def terminal_rewards(
    responses: Sequence[Response], device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """[B, T], the score on the last token of each ended response, LENGTH_CAP included; a RUNNING response's rewards are 0."""
    rewards_BT = torch.zeros(len(responses), max(map(len, responses), default=0), device=device, dtype=dtype)
    for row, response in enumerate(responses):
        if response.ended:
            assert response.score is not None, f"response {response.id} ended without a score"
            rewards_BT[row, len(response) - 1] = response.score
    return rewards_BT


@dataclasses.dataclass(frozen=True)
class Rows:
    """The policy's rows of one step; nothing in here changes after `of`.

    window_begin_B  column of the first token that this step sampled
    run_BT          bool, tokens that the policy has yet to see, tail included: `egae` is computed on them
    train_BT        bool, of these the ones in the loss
    settled_B       tokens that the policy is done with after this step; the others wait for the next window
    cut_B           bool, RUNNING at the window's edge
    reused_B        bool, of an earlier step, trained on again (policy.reuse_batches)
    num_fed_again   prompt tokens, and response and observation tokens that an earlier step has fed to the models already
    behaviour_BT    log-probability of each token under the policy that sampled it; its dtype is the step's: float32, or float64
                    where the models are
    """

    responses: tuple[Response, ...]
    window_begin_B: Tensor
    run_BT: Tensor
    train_BT: Tensor
    settled_B: Tensor
    cut_B: Tensor
    reused_B: Tensor
    num_fed_again: int
    behaviour_BT: Tensor

    @classmethod
    def of(
        cls,
        slices: Sequence[WindowSlice],
        config: AdvantageConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        held: Sequence[Response] = (),
        reused: Sequence[Response] = (),
    ) -> Rows:
        """The rows of what a window sampled, one slice per response; of those `held` since they ended in an earlier window; and of
        earlier steps' responses that are trained on again."""
        responses = [*(s.response for s in slices), *held, *reused]
        begin = [*(s.begin for s in slices), *map(len, held), *map(len, reused)]
        is_reused = [False] * (len(responses) - len(reused)) + [True] * len(reused)
        length_B = torch.tensor([len(r) for r in responses], dtype=torch.long, device=device)
        mask_BT = response_mask(length_B.tolist(), device)
        # The one place where "cut" is derived: a row is cut when its response is RUNNING at the window's edge.
        cut_B = torch.tensor([not r.ended for r in responses], dtype=torch.bool, device=device)
        start_B = torch.tensor([r.num_settled for r in responses], dtype=torch.long, device=device)
        return cls(
            responses=tuple(responses),
            window_begin_B=torch.tensor(begin, dtype=torch.long, device=device),
            run_BT=policy_token_mask(mask_BT, start_B, cut_B, skip_tail=0),
            train_BT=policy_token_mask(mask_BT, start_B, cut_B, skip_tail=config.tail_tokens),
            settled_B=num_settled(length_B, start_B, cut_B, skip_tail=config.tail_tokens, tail=config.tail),
            cut_B=cut_B,
            reused_B=torch.tensor(is_reused, dtype=torch.bool, device=device),
            # values: one per response token that was fed so far; without a value model each was fed with its whole response, or not
            num_fed_again=sum(num_before(r, len(r) if old else len(r.values)) for r, old in zip(responses, is_reused, strict=True)),
            behaviour_BT=pad([r.logprobs for r in responses], dtype, device),
        )

    @property
    def new_BT(self) -> Tensor:
        """Bool: tokens of the run that this step sampled; the others were deferred from earlier windows."""
        column_T = torch.arange(self.run_BT.shape[1], device=self.run_BT.device)
        return self.run_BT & (column_T >= self.window_begin_B[:, None])

    @property
    def positive_BT(self) -> Tensor:
        """Bool: trained tokens of responses that ended correct and train for the first time after it, the LM loss's mask."""
        correct = [r.ended and (r.score or 0.0) > 0 for r in self.responses]
        correct_B = torch.tensor(correct, dtype=torch.bool, device=self.cut_B.device) & ~self.reused_B
        return self.train_BT & correct_B[:, None]

    @property
    def rewards_BT(self) -> Tensor:
        """`terminal_rewards` of the rows, in the step's dtype."""
        return terminal_rewards(self.responses, self.cut_B.device, self.behaviour_BT.dtype)

    def batch(self, rows: Sequence[int], *, constant_prefix: bool = False, kept: PrefixKeys | None = None) -> TokenBatch:
        """What the models are fed of some rows. constant_prefix: no gradient through what the policy has done with, nor through
        the prompt; `kept` holds its keys and values from one pass to the next."""
        responses = [self.responses[row] for row in rows]
        return TokenBatch.of(responses, [r.num_settled for r in responses] if constant_prefix else None, kept)
