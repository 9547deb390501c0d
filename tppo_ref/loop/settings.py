"""The settings of the algorithm: successive batching, advantages, policy update, value update."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal, Protocol

from tppo_ref.loop.bounds import Bounds, Count, Natural, NotNegative, Positive, Unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Successive batching: slots and windows."""

    slots: Annotated[int, Bounds(1, 1e6)] = 32
    """Decoding slots; under synchronous PPO also the responses per step, if that is not given. The port: 512 prompts x 16. [M]"""
    window: Annotated[int, Bounds(1, 1e8)] = 64
    """Decode steps per window, in tokens. The paper: 8k [S]; the port: a third of the longest response. [M]"""
    max_response_tokens: Annotated[int, Bounds(1, 1e8)] = 320
    """Cap on a response over all its windows, in tokens; at the cap it counts as finished. The port: 24k. [M]"""
    min_response_tokens: Natural = 0
    """The end token is forbidden before this many tokens. [O]"""
    refill: Literal["immediate", "step", "batch"] = "immediate"
    """A freed slot takes the next prompt in the same window, waits for the next, or (synchronous) goes on up to a batch. [S]"""
    responses_per_step: Natural = 0
    """Responses begun, and ended, in each step with refill batch; 0 = as many as slots. [O]"""
    samples_per_prompt: Annotated[int, Bounds(1, 1e6)] = 1
    """Independent samples of each prompt. The port: 16. [O]"""
    temperature: Positive = 1.0
    """Sampling temperature; log-probabilities are of the sampling distribution. [I]"""
    kv_cache: Literal["auto", "fp8"] = "auto"
    """The engine's keys and values: as computed, or rounded to fp8 (e4m3), which wants policy.importance. [O]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """Extended GAE, or the scores of a prompt's responses against each other."""

    estimator: Literal["egae", "rloo", "grpo"] = "egae"
    """egae (T-PPO), or without a value model: rloo, score less the mean of the prompt's others; grpo, standardised. [O]"""
    gamma: Unit = 1.0
    """Discount per token. [S]"""
    lam: Unit = 0.95
    """Trace parameter of the policy's advantages; the floor of the length-adaptive one. [P]"""
    lam_alpha: Positive | None = 0.05
    """alpha of max(lam, 1 - 1/(alpha L)), L = tokens so far, plus half a window while RUNNING; none = lam at every length. [P]"""
    cut_value: str = "previous"
    """V(s_l) at a cut: previous, the paper's V(s_{l-1}); critic, its own; zero, as at an end; module:function, your own. [S]"""
    tail: Literal["exclude", "defer"] = "exclude"
    """Last tokens of a cut row: left out for good (the port), or trained in the next window (docs/theory.md, P7). [P]"""
    tail_tokens: Natural = 8
    """Length of that tail, in tokens; 0 = none, all are trained at once. [P]"""
    whiten: bool = True
    """Whiten advantages over the step's trained tokens, all ranks. [P]"""
    clamp: Positive = 10.0
    """Whitened advantages are clamped to +- this. [P]"""

    @property
    def critic_free(self) -> bool:
        """Whether there is no value model (docs/critic_free.md)."""
        return self.estimator != "egae"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The policy's update."""

    lr: Positive = 3e-4
    """Learning rate. The port: 8e-7 at 32B. [M]"""
    lr_warmup_steps: Natural = 0
    """Training steps that update this model, over which its learning rate rises linearly. The port: 20. [M]"""
    weight_decay: NotNegative = 0.1
    """AdamW weight decay. [P]"""
    max_grad_norm: Positive = 1.0
    """Gradient norm clip. [I]"""
    epochs: Count = 1
    """Passes over the step's rows. [P]"""
    mini_batches: Count = 16
    """Optimiser steps per epoch, where mini_batch_tokens is 0. [P]"""
    mini_batch_tokens: Natural = 500
    """Trained tokens per optimiser step, about (rows stay whole); 0 = use mini_batches. [M]"""
    micro_batch_tokens: Count = 4096
    """Tokens fed per forward pass, prompts and prefixes included; one longer row goes alone. [O]"""
    clip_low: NotNegative = 0.2
    """Ratio clip below 1. [P]"""
    clip_high: NotNegative = 0.28
    """Ratio clip above 1 (clip-higher). [P]"""
    dual_clip: Annotated[float, Bounds(1, above=True)] | None = 10.0
    """Floor of the surrogate on negative advantages, in units of A; none = off. [P]"""
    lm_loss_weight: NotNegative = 0.1
    """Weight of the LM loss on responses that ended correct in this step. [P]"""
    old_logprobs: Literal["recompute", "engine"] = "recompute"
    """Clip centre for this step's tokens: recomputed before the update, or the engine's, of which a twentieth is checked. [P]"""
    importance: Literal["none", "truncated", "masked", "generalised"] = "none"
    """Weight pi_start/pi_behaviour per token; none: older tokens' ratio is clipped around 1; generalised: around it (GePPO). [O]"""
    importance_cap: Positive = 2.0
    """Cap of that weight. [O]"""
    train_on: Literal["window", "ended"] = "window"
    """This window's tokens, ended or not (T-PPO), or whole responses once, when they end (partial rollouts). [S]"""
    reuse_batches: Natural = 0
    """GePPO (arXiv 2111.00072): train again on the responses of this many steps before; needs whole responses; 0 = off. [O]"""
    ewma_decay: Annotated[float, Bounds(0, 1, below=True)] = 0.0
    """PPO-EWMA (arXiv 2110.00641): clip around an exponential average of the weights with this decay; 0 = off. [O]"""
    prefix: Literal["full", "constant"] = "full"
    """Prompt and earlier windows: differentiated through, or read without gradient, which costs a third (a departure). [P]"""
    keep_prefix: bool = False
    """Keep the constant prefix's keys and values of the pass before the update; they serve the first epoch, and grow stale. [O]"""
    min_new_tokens: Natural = 0
    """A cut response trains once it holds this many untrained tokens, and always when it ends; 0 = in each window. [S]"""
    engine_gap_limit: Positive = 0.03
    """Stop where the engine's numbers, recomputed for a sample, are off by more than this on average, in nats. [O]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueConfig:
    """The value model's update."""

    update: Literal["independent", "joint"] = "independent"
    """independent: Monte Carlo returns of ended responses (T-PPO); joint: this step's policy tokens, target A + V. [S]"""
    lr: Positive = 1e-3
    """Learning rate. The port: 2e-6 at 32B. [M]"""
    lr_warmup_steps: Natural = 0
    """Training steps that update this model, over which its learning rate rises linearly. The port: 20. [M]"""
    weight_decay: NotNegative = 0.1
    """AdamW weight decay. [P]"""
    max_grad_norm: Positive = 1.0
    """Gradient norm clip. [I]"""
    epochs: Count = 1
    """Passes over the rows. With update joint this and the three below are the policy's. [P]"""
    mini_batches: Count = 16
    """Optimiser steps per epoch, where mini_batch_tokens is 0. [P]"""
    mini_batch_tokens: Natural = 500
    """Trained tokens per optimiser step, about (rows stay whole); 0 = use mini_batches. [M]"""
    micro_batch_tokens: Count = 4096
    """Tokens fed per forward pass. [O]"""
    clip_low: NotNegative | None = 0.5
    """Values move at most this far below the stored ones; none = no clip. [P]"""
    clip_high: NotNegative | None = 0.6
    """Values move at most this far above the stored ones; none = no clip. [P]"""
    batch_responses: Natural = 0
    """0: train on every response that ended in this step; n: hold responses back until n are there. [O]"""
    warmup_steps: Natural = 0
    """First steps that train the value model alone; the policy's tokens of these are excluded. The port: 10. [M]"""
    pretrain_responses: Annotated[int, Bounds(0, 1e8)] = 1024
    """pretrain-value: responses sampled from the frozen policy. [M]"""
    pretrain_epochs: Count = 4
    """pretrain-value: passes over them. [M]"""


class Seeded(Protocol):
    """The part of a run's settings that the loop reads: what it draws from, the clock of its phases, what its devices promise."""

    @property
    def seed(self) -> int: ...

    @property
    def clock(self) -> Literal["wall", "cpu"]: ...

    @property
    def peak_tflops(self) -> float: ...


class Settings(Protocol):
    """What the loop reads of a configuration; runs.config.Config is one."""

    @property
    def rollout(self) -> RolloutConfig: ...

    @property
    def advantage(self) -> AdvantageConfig: ...

    @property
    def policy(self) -> PolicyConfig: ...

    @property
    def value(self) -> ValueConfig: ...

    @property
    def run(self) -> Seeded: ...
