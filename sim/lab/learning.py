"""The Trainer on a token MDP: T-PPO and its relatives as learners whose every number can be checked against the exact one.

`learn` builds a tppo_ref `Config`, steps the real `Trainer`, and after each step writes a `Record`: the policy's exact return,
the critic's true error, whom the critic's batch over-represents (theory.md F6) and how old its targets are. Advantages, masks,
losses and schedules are tppo_ref's alone; agents.py holds what the Trainer drives.

    history = learn(instances.load("thinking"), method="tppo", window=8, steps=100, seed=0)
    history[-1].mean_return, optimum(mdp).mean_return

The Trainer knows terminal scores only: a response's score is the sum of its rewards. Where only the last token is rewarded this
is the MDP itself. With rewards on the way gamma = 1 is required and the return is paid at the end: the same policy gradient and
optimum, but a critic that sees the node only then has to learn V plus the expected rewards so far (`true_value`).
"""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from sim.lab.agents import PROMPT, MDPEngine, MDPScorer, NetworkPolicy, NetworkValue, TabularPolicy, TabularValue, terminal_only
from sim.lab.checks import Floats, Ints
from sim.lab.instances import Instance
from sim.lab.token_mdp import Solution, TokenMDP
from sim.lab.unrolled import ENDED
from tppo_ref.loop.estimates import Advantages
from tppo_ref.loop.forward import Forward
from tppo_ref.loop.rows import Rows
from tppo_ref.loop.trainer import Trainer
from tppo_ref.loop.updates import explained_variance
from tppo_ref.loop.value_targets import ValueBatch
from tppo_ref.method.errors import nearest
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.batcher import SampleStream, SuccessiveBatcher
from tppo_ref.runs.config import Config, apply_method
from tppo_ref.runs.parsing import field_paths, replace_fields

OFTEN_VISITED = 0.01  # nodes passed by fewer responses than this do not count for `critic_max`

DEFAULTS: dict[str, Any] = {
    "advantage.tail": "none",  # 8 of 8k tokens is little; of a window of 8 it is all of it
    "policy.weight_decay": 0.0, "value.weight_decay": 0.0,  # it would pull logits to uniform and values to 0
    "policy.lm_loss_weight": 0.0,  # a second loss would hide what the first one does
}  # fmt: skip
"""Where the laboratory departs from tppo_ref's defaults [O]. Mini-batches: slots x window tokens per update, in every method."""

LEARNING_RATES = {"tabular": {"policy.lr": 0.03, "value.lr": 0.1}, "network": {"policy.lr": 0.01, "value.lr": 0.01}}
"""[O] By `Setting.model`: Adam moves each entry of a table by about that much per update."""

OVERRIDABLE = [p for p in field_paths(Config) if p.split(".")[0] in ("advantage", "policy", "value") or p == "rollout.refill"]
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
    overrides  dotted fields of tppo_ref's advantage, policy and value sections, and rollout.refill; they have the last word
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
                                 f"MDP's), policy or value, or rollout.refill{nearest(path, OVERRIDABLE)}")  # fmt: skip
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
        return isinstance(self.critic, str) and self.critic == "oracle"


class LabTrainer(Trainer):
    """The Trainer, and what its last step trained on: `rows` of the policy, `batch` of the critic."""

    rows: Rows
    advantages: Advantages
    batch: ValueBatch

    def __init__(self, config: Config, **parts: Any):
        super().__init__(config, observer=self._see, **parts)

    def _see(self, rows: Rows, forward: Forward, advantages: Advantages, batch: ValueBatch) -> None:
        self.rows, self.advantages, self.batch = rows, advantages, batch

    def value_batch(self) -> list[Stretch]:
        """The stretches of responses on whose tokens the critic was trained in the last step."""
        if self.config.value.update == "independent":
            return [Stretch(np.array(r.token_ids), np.array(r.versions)) for r in self.batch.responses]
        batch = []
        for response, train_T in zip(self.rows.responses, self.rows.train_BT.numpy(), strict=True):
            column = np.flatnonzero(train_T)
            batch.append(Stretch(np.array(response.token_ids)[column], np.array(response.versions)[column]))
        return [stretch for stretch in batch if len(stretch.edge_T)]


class Stretch(NamedTuple):
    """Tokens of one response that the critic was trained on: edges, and the policy versions that sampled them."""

    edge_T: Ints
    version_T: Ints


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


def build(instance: Instance, setting: Setting) -> LabTrainer:
    """The Trainer of a setting, ready to step."""
    mdp, config = instance.mdp, setting.config(instance.mdp)
    value_N = _first_value(instance, setting)
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
                            refill=rollout.refill)  # fmt: skip
    stream = SampleStream([PROMPT], samples_per_prompt=2**62, seed=setting.seed)  # one endless group: sample i is index i
    batcher = SuccessiveBatcher(schedule, stream, run_seed=setting.seed)
    return LabTrainer(config, policy=policy, value=value, engine=MDPEngine(policy), batcher=batcher, scorer=MDPScorer(mdp))


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


def learn(
    instance: Instance,
    *,
    steps: int | None = None,
    tokens: int | None = None,
    watch: Callable[[LabTrainer, Record], None] | None = None,
    **setting: Any,
) -> list[Record]:
    """Train on an MDP for `steps` Trainer steps, or until `tokens` tokens are sampled; the record of every step, step 0 first.

    The other arguments are the fields of `Setting`. watch(trainer, record) is called after each step.
    """
    if (steps is None) == (tokens is None):
        raise ValueError(f"steps, tokens: got {steps}, {tokens}; expected exactly one of them")
    chosen = Setting(**setting)
    trainer = build(instance, chosen)
    recorder = Recorder(instance.mdp, trainer)
    history = [recorder.record()]
    while history[-1].step < steps if steps is not None else history[-1].tokens < (tokens or 0):
        metrics = trainer.step()
        history.append(recorder.record(metrics, set_critic=chosen.oracle))
        if watch:
            watch(trainer, history[-1])
    return history


class Recorder:
    """Writes down a Trainer's steps, exactly. Call `record` once before the first step and once after each."""

    def __init__(self, mdp: TokenMDP, trainer: LabTrainer):
        self.mdp, self.trainer = mdp, trainer
        self.decode_steps = 0
        self.counted_N, self.expected_N = np.zeros((2, mdp.num_nodes))  # tokens of all value batches by node; what visits say

    def record(self, metrics: Mapping[str, float] | None = None, *, set_critic: bool = False) -> Record:
        """`metrics` are the step's, None before the first. set_critic: the critic becomes the true value of the policy."""
        fields: dict[str, Any] = {"step": self.trainer.num_steps, "tokens": self.trainer.batcher.num_generated_tokens}
        if metrics is not None:
            self.decode_steps += self.trainer.batcher.num_steps
            fields |= self._step(metrics) | self._survivors() | _staleness(self.trainer.value_batch(), self.trainer.version - 1)
        policy_NA = self.trainer.policy_learner.module.table()
        self.solution = self.mdp.solve(policy_NA)
        true_N = true_value(self.mdp, policy_NA, self.solution)
        if set_critic:
            self.trainer.value_learner.module.begin_at(true_N)
        fields |= _critic_error(self.mdp, self.trainer.value_learner.module.table(), true_N, self.solution.visits_N)
        return Record(
            decode_steps=self.decode_steps,
            mean_return=self.solution.mean_return,
            mean_length=_mean_length(self.solution),
            entropy=_entropy(policy_NA, self.solution.visits_N),
            **fields,
        )

    def _step(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        raw = self.trainer.advantages.raw_BT[self.trainer.rows.train_BT]
        return {
            "trained_tokens": int(metrics["policy/tokens"]), "cut_share": metrics["response/cut_share"],
            "advantage_std": metrics["advantage/std"], "no_signal_share": float((raw == 0).double().mean()),
            "value_responses": int(metrics["value/responses"]), "value_tokens": int(metrics["value/tokens"]),
            "batch_explained_variance": metrics["value/explained_variance"],
        }  # fmt: skip

    def _survivors(self) -> dict[str, float]:
        """`self.solution` is still that of the policy that sampled this window."""
        batch, visits_N = self.trainer.value_batch(), self.solution.visits_N
        fields = {"exact_length": _mean_length(self.solution)}
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


# ---------------------------------------------------------------------------------------------------------------- exact numbers


def true_value(mdp: TokenMDP, policy_NA: ArrayLike, solution: Solution | None = None) -> Floats:
    """What the Trainer's critic should say at each node [N] under a policy: V, plus the expected rewards on the way there.

    The Trainer pays the whole return at the end, so a target holds the rewards before its token too. With rewards at the end only
    this is V. With others it is the best that a function of the node can do, and exact for lambda = 1 only: the node does not know
    which rewards came before it, so a difference of two such values holds more than one token's news.
    `solution`: mdp.solve(policy_NA), where it is known already.
    """
    solution = solution or mdp.solve(policy_NA)
    if terminal_only(mdp):
        return solution.value_N
    policy_NA = np.asarray(policy_NA, dtype=np.float64)
    so_far_N = np.zeros(mdp.num_nodes)  # expected rewards before the node, times the probability of passing it
    for first, stop in zip(mdp.layer_T[:-1], mdp.layer_T[1:], strict=True):
        edges = np.arange(mdp.edge_N[first], mdp.edge_N[stop])
        edges = edges[mdp.next_E[edges] != ENDED]
        node = mdp.node_E[edges]
        joint = policy_NA[node, mdp.token_E[edges]] * mdp.prob_E[edges]
        np.add.at(so_far_N, mdp.next_E[edges], joint * (so_far_N[node] + mdp.reward_E[edges] * solution.visits_N[node]))
    passed = solution.visits_N > 0
    return solution.value_N + np.divide(so_far_N, solution.visits_N, out=np.zeros_like(so_far_N), where=passed)


def optimum(mdp: TokenMDP) -> Solution:
    """Of the best policy, by policy iteration (one round per layer at most: the horizon is finite)."""
    solution = mdp.solve(mdp.uniform())
    for _ in range(mdp.max_tokens):
        best_N = np.where(mdp.legal_NA, solution.q_NA, -np.inf).argmax(1)
        solution = mdp.solve(np.eye(mdp.num_tokens)[best_N])
    return solution


def _mean_length(solution: Solution) -> float:
    return float(solution.visits_N.sum())


def _entropy(policy_NA: Floats, visits_N: Floats) -> float:
    """Of the next token, in nats, averaged over the tokens of responses."""
    log_NA = np.log(np.where(policy_NA > 0, policy_NA, 1.0))
    return float(visits_N @ -(policy_NA * log_NA).sum(1) / visits_N.sum())


def _critic_error(mdp: TokenMDP, value_N: Floats, true_N: Floats, visits_N: Floats) -> dict[str, float]:
    """The critic_ fields of a `Record`, and explained_variance."""
    error_N = value_N - true_N

    def rms(weight_N: Floats) -> float:
        return math.sqrt(weight_N @ error_N**2 / weight_N.sum()) if weight_N.any() else math.nan

    third_N = mdp.depth_N * 3 // mdp.max_tokens
    thirds = {f"critic_rms_{name}": rms(visits_N * (third_N == i)) for i, name in enumerate(("early", "middle", "late"))}
    moments = (float(visits_N @ x) for x in (true_N, true_N**2, error_N, error_N**2))
    return thirds | {
        "critic_rms": rms(visits_N),
        "critic_bias": float(visits_N @ error_N / visits_N.sum()),
        "critic_max": float(np.abs(error_N[visits_N >= OFTEN_VISITED]).max(initial=0.0)),
        "explained_variance": explained_variance(float(visits_N.sum()), *moments),
    }


def _total_variation(one_N: ArrayLike, other_N: ArrayLike) -> float:
    """Between two distributions, given up to a factor."""
    one_N, other_N = np.asarray(one_N, dtype=np.float64), np.asarray(other_N, dtype=np.float64)
    return float(0.5 * np.abs(one_N / one_N.sum() - other_N / other_N.sum()).sum())


# ------------------------------------------------------------------------------------------------------------------------- rows


def table(history: Iterable[Record], **labels: Any) -> list[dict[str, Any]]:
    """Records as rows of a table, each with the same labels in front (method="ppo", seed=3)."""
    return [labels | dataclasses.asdict(record) for record in history]


def write_csv(path: Path | str, rows: Sequence[Mapping[str, Any]], *, append: bool = False) -> None:
    """Rows with equal keys as CSV. append: below what stands there; ValueError where its columns differ."""
    if not rows:
        return
    path, names = Path(path), list(rows[0])
    begun = append and path.exists() and path.stat().st_size > 0
    if begun:
        with path.open(newline="") as file:
            standing = next(csv.reader(file))
        if standing != names:
            raise ValueError(f"{path}: got columns {names}; expected {standing}, which stand there; write to another file")
    with path.open("a" if append else "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        if not begun:
            writer.writeheader()
        writer.writerows(rows)
