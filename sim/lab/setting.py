"""One learner on a token MDP: which method, with which models, and the real Trainer built from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from sim.lab.agents import PROMPT, MDPEngine, MDPScorer, NetworkPolicy, NetworkValue, TabularPolicy, TabularValue
from sim.lab.checks import Floats
from sim.lab.instances import Instance
from sim.lab.token_mdp import TokenMDP
from sim.lab.truth import true_value
from tppo_ref.loop.trainer import Trainer
from tppo_ref.method.errors import nearest
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.batcher import SampleStream, SuccessiveBatcher
from tppo_ref.runs.config import Config, apply_method
from tppo_ref.runs.parsing import field_paths, replace_fields

DEFAULTS: dict[str, Any] = {
    "advantage.tail_tokens": 0,  # 8 of 8k tokens is little; of a window of 8 it is all of it
    "policy.weight_decay": 0.0, "value.weight_decay": 0.0,  # it would pull logits to uniform and values to 0
    "policy.lm_loss_weight": 0.0,  # a second loss would hide what the first one does
}  # fmt: skip
"""Where the laboratory departs from tppo_ref's defaults [O]. Mini-batches: slots x window tokens per update, in every method."""

LEARNING_RATES = {"tabular": {"policy.lr": 0.03, "value.lr": 0.1}, "network": {"policy.lr": 0.01, "value.lr": 0.01}}
"""[O] By `Setting.model`: Adam moves each entry of a table by about that much per update."""

OVERRIDABLE = [p for p in field_paths(Config) if p.split(".")[0] in ("advantage", "policy", "value")]
OVERRIDABLE += ["rollout.refill", "rollout.samples_per_prompt"]
OVERRIDABLE = [p for p in OVERRIDABLE if p != "advantage.gamma" and not p.startswith("value.pretrain")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """One learner.

    method     a named method of tppo_ref
    window     decode steps per window; None: a quarter of the cap. ppo and ppo-dual decode whole responses: to them it is only
               what makes an update's tokens, slots x window, the same in all methods
    model, by  "tabular": a row per "node" or per "state"; "network": a small MLP with `hidden` units over state and tokens left
    critic     how it begins: "zero"; "warm": the instance's policy's true value; "noisy": that plus normal noise of that
               standard deviation; "oracle": the true value, set anew after each step and never trained; or values [N]
    overrides  dotted fields of tppo_ref's advantage, policy and value sections, rollout.refill and (without a critic, which `rloo`
               and `grpo` have none of) rollout.samples_per_prompt; they have the last word
    """

    method: str = "tppo"
    seed: int = 0
    window: int | None = None
    slots: int = 32
    model: Literal["tabular", "network"] = "tabular"
    by: Literal["node", "state"] = "node"
    hidden: int = 16
    critic: Literal["zero", "warm", "noisy", "oracle"] | ArrayLike = "zero"
    noise: float = 0.5
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def config(self, mdp: TokenMDP) -> Config:
        """ValueError for a field that is unknown or not read here; UserError for an unknown method."""
        for path in self.overrides:
            if path not in OVERRIDABLE:
                raise ValueError(f"overrides: got {path!r}, which is not read here; expected fields of advantage (but gamma, the "
                                 f"MDP's), policy, value; rollout.refill{nearest(path, OVERRIDABLE)}")  # fmt: skip
        if self.model not in LEARNING_RATES:
            raise ValueError(f"model: got {self.model!r}; expected tabular or network")
        window = max(1, mdp.max_tokens // 4) if self.window is None else self.window
        per_update = {f"{name}.mini_batch_tokens": self.slots * window for name in ("policy", "value")}
        whole = {"rollout.slots": self.slots, "rollout.window": window, "rollout.max_response_tokens": mdp.max_tokens,
                 "advantage.gamma": mdp.gamma, "run.seed": self.seed}  # fmt: skip
        config = replace_fields(Config(), DEFAULTS | LEARNING_RATES[self.model] | per_update | whole)
        config = replace_fields(apply_method(config, self.method, strict=False), self.overrides)
        return replace_fields(config, {"value.lr": 0.0}) if self.oracle else config

    @property
    def oracle(self) -> bool:
        """Whether the critic is set to the true value after each step instead of being trained."""
        return isinstance(self.critic, str) and self.critic == "oracle"


def build(instance: Instance, setting: Setting) -> Trainer:
    """The Trainer of a setting, ready to step."""
    mdp, config = instance.mdp, setting.config(instance.mdp)
    value_N, critic_free = _first_value(instance, setting), config.advantage.critic_free
    policy: TabularPolicy | NetworkPolicy
    value: TabularValue | NetworkValue
    if setting.model == "tabular":
        policy = TabularPolicy(mdp, instance.policy_NA, by=setting.by)
        value = TabularValue(mdp, value_N, by=setting.by)
    else:
        policy = NetworkPolicy(mdp, instance.policy_NA, hidden=setting.hidden, seed=2 * setting.seed)
        value = NetworkValue(mdp, value_N, hidden=setting.hidden, seed=2 * setting.seed + 1)
    rollout = config.rollout
    schedule = SlotSchedule(slots=rollout.slots, window=rollout.window, max_response_tokens=rollout.max_response_tokens,
                            refill=rollout.refill, responses_per_step=rollout.responses_per_step)  # fmt: skip
    size = rollout.samples_per_prompt if critic_free else 2**62  # one endless group: sample i is index i, as it is in groups
    stream = SampleStream([PROMPT], samples_per_prompt=size, seed=setting.seed)
    batcher = SuccessiveBatcher(schedule, stream, run_seed=setting.seed)
    return Trainer(config, policy=policy, value=None if critic_free else value, engine=MDPEngine(policy), batcher=batcher,
                   scorer=MDPScorer(mdp))  # fmt: skip


def _first_value(instance: Instance, setting: Setting) -> Floats:
    mdp, critic = instance.mdp, setting.critic
    if not isinstance(critic, str):
        return np.asarray(critic, dtype=np.float64)
    if critic == "zero":
        return np.zeros(mdp.num_nodes)
    if critic not in ("warm", "noisy", "oracle"):
        raise ValueError(f"critic: got {critic!r}; expected zero, warm, noisy, oracle or values per node")
    value_N = true_value(mdp, instance.policy_NA)
    if critic == "noisy":
        value_N = value_N + setting.noise * np.random.default_rng((setting.seed, 1)).standard_normal(mdp.num_nodes)
    return value_N
