"""What a Trainer's step on a token MDP is written down as: exact numbers of both models, and who was in the critic's batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from sim.lab.checks import Ints
from sim.lab.token_mdp import TokenMDP
from sim.lab.truth import critic_error, entropy, mean_length, true_value
from tppo_ref.loop.estimates import Advantages
from tppo_ref.loop.forward import Forward
from tppo_ref.loop.rows import Rows
from tppo_ref.loop.trainer import Trainer
from tppo_ref.loop.value_targets import ValueBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """One Trainer step. Step 0 is the beginning, with nothing trained yet. NaN: there was nothing to measure.

    Policy and critic are those after the step; exact numbers, no sampling:
      mean_return, mean_length, entropy (nats per token)
      critic_rms, critic_bias    root mean square and mean of e = V - `true_value`, nodes weighted by visits
      critic_max                 largest |e| over nodes that at least 1 % of the responses pass
      critic_rms_early, _middle, _late   root mean square by thirds of the length cap
      explained_variance         1 - Var(e) / Var(true value), nodes weighted by visits
    What the step sampled and trained:
      tokens, decode_steps       so far: what the policy paid in samples, and in time at equal slots
      trained_tokens, cut_share  policy tokens in the loss; rows that the window's edge cut
      advantage_std, no_signal_share   raw advantages of the trained tokens; the share of these that is exactly 0
    Survivorship: the critic's batch against the policy that sampled this window (exact):
      value_responses, value_tokens, batch_explained_variance (of targets, before the update)
      value_length, exact_length   mean tokens of the batch's responses (joint critic: of their trained parts); of that policy's
      value_tv                   total variation between the batch's tokens' nodes and that policy's visits
      value_tv_so_far            the same of all batches so far, against these policies' visits weighted by tokens
    Staleness: for token t of the batch, the tokens u >= t whose rewards and choices its target holds:
      target_age                 mean over t of mean_u (version_u - version_t);  target_age_first: t = 0 only
      target_later_share         share of the u sampled by a later policy than t;  target_later_share_first: t = 0 only
      target_lag                 mean over t of mean_u (version of this window's policy - version_u)
    """

    step: int
    tokens: int
    decode_steps: int
    mean_return: float
    mean_length: float
    entropy: float
    critic_rms: float
    critic_bias: float
    critic_max: float
    critic_rms_early: float
    critic_rms_middle: float
    critic_rms_late: float
    explained_variance: float
    trained_tokens: int = 0
    cut_share: float = math.nan
    advantage_std: float = math.nan
    no_signal_share: float = math.nan
    value_responses: int = 0
    value_tokens: int = 0
    batch_explained_variance: float = math.nan
    value_length: float = math.nan
    exact_length: float = math.nan
    value_tv: float = math.nan
    value_tv_so_far: float = math.nan
    target_age: float = math.nan
    target_age_first: float = math.nan
    target_later_share: float = math.nan
    target_later_share_first: float = math.nan
    target_lag: float = math.nan


class Stretch(NamedTuple):
    """Tokens of one response that the critic was trained on: edges, and the policy versions that sampled them."""

    edge_T: Ints
    version_T: Ints


class Recorder:
    """Observes a Trainer and writes down its steps, exactly. Call `record` once before the first step and once after each.

    rows, advantages, batch   what the last step trained its policy and its critic on
    """

    rows: Rows
    advantages: Advantages
    batch: ValueBatch

    def __init__(self, mdp: TokenMDP, trainer: Trainer):
        self.mdp, self.trainer = mdp, trainer
        trainer.observer = self._observe
        self.decode_steps = 0
        self.counted_N, self.expected_N = np.zeros((2, mdp.num_nodes))  # tokens of all value batches by node; what visits say

    def record(self, metrics: Mapping[str, float] | None = None, *, set_critic: bool = False) -> Record:
        """`metrics` are the step's, None before the first. set_critic: the critic becomes the true value of the policy."""
        fields: dict[str, Any] = {"step": self.trainer.num_steps, "tokens": self.trainer.batcher.num_generated_tokens}
        if metrics is not None:
            self.decode_steps += self.trainer.batcher.num_steps
            fields |= self._step(metrics) | self._survivors() | _staleness(self.stretches(), self.trainer.version - 1)
        policy_NA = self.trainer.policy_learner.module.table()
        self.solution = self.mdp.solve(policy_NA)
        true_N = true_value(self.mdp, policy_NA, self.solution)
        critic, value_N = self.trainer.value_learner, np.full_like(true_N, np.nan)  # NaN: of no critic there is no error
        if critic and set_critic:
            critic.module.begin_at(true_N)
        if critic:
            value_N = critic.module.table()
        fields |= critic_error(self.mdp, value_N, true_N, self.solution.visits_N)
        return Record(
            decode_steps=self.decode_steps,
            mean_return=self.solution.mean_return,
            mean_length=mean_length(self.solution),
            entropy=entropy(policy_NA, self.solution.visits_N),
            **fields,
        )

    def _observe(self, rows: Rows, forward: Forward, advantages: Advantages, batch: ValueBatch) -> None:
        self.rows, self.advantages, self.batch = rows, advantages, batch

    def stretches(self) -> list[Stretch]:
        """What the critic was trained on in the last step; a response without a token in its mask is left out."""
        out = []
        for response, mask_T in zip(self.batch.responses, self.batch.mask_BT.numpy(), strict=True):
            column = np.flatnonzero(mask_T)
            out.append(Stretch(np.array(response.token_ids)[column], np.array(response.versions)[column]))
        return [stretch for stretch in out if len(stretch.edge_T)]

    def _step(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        raw = self.advantages.raw_BT[self.rows.train_BT]
        return {
            "trained_tokens": int(metrics["policy/tokens"]), "cut_share": metrics["response/cut_share"],
            "advantage_std": metrics["advantage/std"], "no_signal_share": float((raw == 0).double().mean()),
            "value_responses": int(metrics["value/responses"]), "value_tokens": int(metrics["value/tokens"]),
            "batch_explained_variance": metrics["value/explained_variance"],
        }  # fmt: skip

    def _survivors(self) -> dict[str, float]:
        """`self.solution` is still that of the policy that sampled this window."""
        batch, visits_N = self.stretches(), self.solution.visits_N
        fields = {"exact_length": mean_length(self.solution)}
        if batch:
            edge_n = np.concatenate([stretch.edge_T for stretch in batch])
            count_N = np.bincount(self.mdp.node_E[edge_n], minlength=self.mdp.num_nodes)
            expected_N = len(edge_n) * visits_N / visits_N.sum()
            self.counted_N += count_N
            self.expected_N += expected_N
            fields |= {"value_length": len(edge_n) / len(batch), "value_tv": _total_variation(count_N, expected_N)}
        if self.counted_N.any():
            fields["value_tv_so_far"] = _total_variation(self.counted_N, self.expected_N)
        return fields


def _staleness(batch: Sequence[Stretch], current: int) -> dict[str, float]:
    """The target_ fields of a `Record`. `current` is the version that sampled the step's window."""
    if not batch:
        return {}
    age, later, lag = [], [], []
    for _, version_T in batch:
        left_T = np.arange(len(version_T), 0, -1)
        mean_T = np.cumsum(version_T[::-1])[::-1] / left_T  # of the versions from t on
        age.append(mean_T - version_T)
        # Versions never fall along a response, so the tokens from t on that share its version come first.
        later.append((len(version_T) - np.searchsorted(version_T, version_T, side="right")) / left_T)
        lag.append(current - mean_T)
    return {
        "target_age": float(np.concatenate(age).mean()),
        "target_age_first": float(np.mean([age_T[0] for age_T in age])),
        "target_later_share": float(np.concatenate(later).mean()),
        "target_later_share_first": float(np.mean([later_T[0] for later_T in later])),
        "target_lag": float(np.concatenate(lag).mean()),
    }


def _total_variation(one_N: ArrayLike, other_N: ArrayLike) -> float:
    """Between two distributions, given up to a factor."""
    one_N, other_N = np.asarray(one_N, dtype=np.float64), np.asarray(other_N, dtype=np.float64)
    return float(0.5 * np.abs(one_N / one_N.sum() - other_N / other_N.sum()).sum())
