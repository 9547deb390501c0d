"""An independent oracle of one whole training step: T-PPO in plain loops over tokens, float64.

Written from the paper, docs/algorithm.md, docs/metrics.md and the configuration's help, by somebody who had not read the loop. It takes
nothing from tppo_ref but the records and the model modules, which it calls on one response at a time. No packing, no blocks, no
masks, no vectors over tokens: a reader can check each line against the sentence that it stands for.

`Oracle.step(window, plan, scores)` goes from what the batcher recorded and the weights before the step to both models' parameters,
the averaged policy's (PPO-EWMA), the state that later steps need, and every metric that `Trainer.step` reports, wall-clock ones
excepted. The weights are its own: given once, before the first step, and never compared in passing.

What the contract leaves open, and what the oracle does about it:
- The plan. Which rows share a mini-batch is drawn at random. The oracle takes the plan as an input, and `check_plan` holds it to what
  the configuration promises of it. Micro-batches mean nothing here: a mini-batch is one sum.
- Which held responses a value update takes is read from the plan, too; `check_plan` asks for whole batches, oldest first.
- AdamW's betas and epsilon stand nowhere in the contract: torch's defaults, (0.9, 0.999) and 1e-8. Decay acts on every parameter.
- Gradient clipping divides by norm + 1e-6, as `torch.nn.utils.clip_grad_norm_` does.
- Whitening divides by std + 1e-8, as `whiten` documents.
- Undefined means (the mean score of a step in which nothing ended) are NaN.

Without a value model (advantage.estimator rloo, grpo) there is nothing of it: a response's advantage is its score against its group's.

Of a conversation the models are asked for every token after the prompt, whoever said it, as if it were one response; what they say of
the environment's tokens is thrown away before anything is computed. All columns are the policy's own tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from tppo_ref.method.records import End, Response
from tppo_ref.rollout.packing import TokenBatch
from tppo_ref.runs.config import Config

NAN = float("nan")
BETAS, ADAM_EPSILON, CLIP_EPSILON, WHITEN_EPSILON = (0.9, 0.999), 1e-8, 1e-6, 1e-8


# ------------------------------------------------------------------------------------------------------------ what it is given


@dataclasses.dataclass(frozen=True)
class Window:
    """What one window left behind: copies of the records, made before the Trainer could touch them.

    slices     (response, begin): its tokens from column `begin` on were sampled in this window, which was `version`'s
    busy       (first, last) decode step of each stay of a response in a slot
    """

    slices: list[tuple[Response, int]]
    busy: list[tuple[int, int]]
    slots: int
    num_steps: int


Minibatch = list[int]  # response ids


@dataclasses.dataclass(frozen=True)
class Plan:
    """The mini-batches of the step in the order in which they were trained, all epochs one after the other.

    recomputed   responses whose log-probabilities the Trainer computed before the update
    """

    policy: list[Minibatch]
    value: list[Minibatch]
    recomputed: list[int]


# ------------------------------------------------------------------------------------------------------------------- optimiser


class HandWrittenAdamW:
    """AdamW (arXiv 1711.05101), a clipped gradient and a linear warm-up, over one model's parameters."""

    def __init__(self, module: torch.nn.Module, section: Any):
        self.module, self.section, self.count, self.num_steps = module, section, 0, 0
        self.first = [torch.zeros_like(p) for p in module.parameters()]
        self.second = [torch.zeros_like(p) for p in module.parameters()]

    @property
    def lr(self) -> float:
        """lr i / n in the i-th training step that updates this model, and lr from the n-th on."""
        n = self.section.lr_warmup_steps
        return self.section.lr * (1.0 if n == 0 else min(1.0, max(1, self.num_steps) / n))

    def update(self, loss: torch.Tensor) -> float:
        """One optimiser step down `loss`; the norm of the gradient before it was clipped."""
        parameters = list(self.module.parameters())
        gradients = [torch.zeros_like(p) for p in parameters]
        if loss.requires_grad:  # not so where every token is clipped
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        norm = math.sqrt(sum(float((g * g).sum()) for g in gradients))
        shrink = min(1.0, self.section.max_grad_norm / (norm + CLIP_EPSILON))
        self.count += 1
        lr, (beta1, beta2) = self.lr, BETAS
        with torch.no_grad():
            for p, g, m, v in zip(parameters, gradients, self.first, self.second, strict=True):
                g = g * shrink
                p -= lr * self.section.weight_decay * p
                m += (1 - beta1) * (g - m)
                v += (1 - beta2) * (g * g - v)
                p -= lr * (m / (1 - beta1**self.count)) / ((v / (1 - beta2**self.count)).sqrt() + ADAM_EPSILON)
        return norm


# ------------------------------------------------------------------------------------------------------------------------ rows


@dataclasses.dataclass
class Row:
    """One response that the policy trains on in this step.

    begin      first column that this window sampled
    start      first column that the policy has not done with
    trained    the columns that enter loss and whitening; the run that EGAE sees, [start, T), has the tail as well
    """

    response: Response
    begin: int
    start: int
    trained: range
    tail: range
    fed_before: int = 0  # columns that an earlier step has fed to the models already
    lam: float = 0.0
    value: list[float] = dataclasses.field(default_factory=list)
    last_value: float = 0.0
    raw: dict[int, float] = dataclasses.field(default_factory=dict)  # column -> advantage
    scaled: dict[int, float] = dataclasses.field(default_factory=dict)
    recomputed: list[float] = dataclasses.field(default_factory=list)
    reused: bool = False  # an earlier step's
    constant: Any = None  # of what is read without gradient: what the models said of it before the update

    @property
    def T(self) -> int:
        return len(self.response.token_ids)

    @property
    def cut(self) -> bool:
        return self.response.end is End.RUNNING


def spoken(response: Response) -> list[tuple[int, int | None]]:
    """Token by token what was said after the prompt: with its column where the policy said it, None where the environment did."""
    said: list[tuple[int, int | None]] = []
    for column in range(len(response.token_ids) + 1):
        for at, tokens in response.observations:
            said += [(token, None) for token in tokens if at == column]
        if column < len(response.token_ids):
            said.append((response.token_ids[column], column))
    return said


def place(response: Response, column: int) -> int:
    """How much was said before the policy's token `column`; of the column behind its last token: how much in all."""
    columns = [c for _, c in spoken(response)]
    return columns.index(column) if column in columns else len(columns)


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else NAN


def variance(numbers: Sequence[float]) -> float:
    """Population variance, about the mean."""
    centre = mean(numbers)
    return mean([(x - centre) ** 2 for x in numbers])


class Sums(dict):
    """Named sums that begin at 0."""

    def __missing__(self, name: str) -> float:
        return 0.0


class Oracle:
    """T-PPO over several steps. `config` is a tppo_ref Config; only its sections advantage, policy, value and rollout are read."""

    def __init__(self, config: Config, policy: torch.nn.Module, value: torch.nn.Module | None):
        self.config = config
        self.policy, self.value = copy.deepcopy(policy), copy.deepcopy(value)
        self.policy_optimiser = HandWrittenAdamW(self.policy, config.policy)
        self.value_optimiser = HandWrittenAdamW(self.value, config.value) if value else None
        self.groups: dict[int, list[Response]] = {}  # without a value model: of each prompt's samples those that have ended
        self.ended_at: dict[int, int] = {}  # per response the step in which it ended
        self.history = [[p.detach().clone() for p in self.policy.parameters()]]  # of the policy's weights, for PPO-EWMA
        self.steps = 0
        self.first_values: dict[int, list[float]] = {}  # per response: V as first estimated, the critic's anchor
        self.settled: dict[int, int] = {}  # per response: columns that the policy has done with
        self.past: list[list[Response]] = []  # of earlier steps that the policy trained in, the latest last
        self.waiting: list[Response] = []  # ended, the value model has yet to train on them; in order of their end
        self.seen: dict[int, Response] = {}
        self.ledger = Sums()
        self.updates_before: dict[int, int] = {}  # weight version -> updates of the policy that came before it

    # ------------------------------------------------------------------------------------------------------------ one step

    def step(self, window: Window, plan: Plan, scores: Mapping[int, tuple[float, str]]) -> dict[str, float]:
        """One training step; the metrics. Weights and state move on."""
        for response, _ in window.slices:
            self.seen[response.id] = response
        for response in self._ended(window):
            response.score = scores[response.id][0]
        rows = self._rows(window)
        self._estimate(rows)
        gap = self.gap(rows, plan)
        assert self.config.policy.old_logprobs == "recompute" or not gap > self.config.policy.engine_gap_limit, f"a gap of {gap}"
        metrics = self._window_metrics(window, scores) | self._advantages(rows)
        warming_up = self.value is not None and self.steps < self.config.value.warmup_steps
        version = window.slices[0][0].versions[-1]  # all of the window's tokens are of one
        self.updates_before[version] = len(self.history) - 1
        self.waiting += self._ended(window)
        metrics |= self._settle(window, rows, warming_up)
        metrics |= self._update_policy([] if warming_up else rows, plan.policy, version)
        metrics |= self._update_value(rows, plan) if self.value else self._no_value()
        if not warming_up:
            self.past.append([row.response for row in rows if not row.reused])
        metrics["policy/reused_tokens"] = 0 if warming_up else sum(len(row.trained) for row in rows if row.reused)
        metrics["policy/logprob_gap"] = gap
        metrics |= self._flops(window, rows, plan)
        metrics["policy/prefix_tokens"] = sum(
            len(row.response.prompt.token_ids) + row.fed_before
            + sum(len(tokens) for at, tokens in row.response.observations if at <= row.fed_before) for row in rows
        )  # fmt: skip
        self.steps += 1
        return metrics

    def _flops(self, window: Window, rows: list[Row], plan: Plan) -> dict[str, float]:
        """Multiplications and additions of a transformer's matrices and of causal attention, token by token."""
        found, c = dict.fromkeys(("flops/rollout", "flops/forward", "flops/policy", "flops/value"), 0.0), self.config.policy
        if not hasattr(self.policy, "hf"):
            return dict.fromkeys(found, NAN)
        by_id = {row.response.id: row for row in rows}

        def one_pass(model: Any, response: Response, backward: bool, edge: int | None = None, kept: bool = False) -> float:
            first, total = (0 if edge is None else len(response.prompt.token_ids) + place(response, edge) - 1), 0.0
            for i in range(len(response.prompt.token_ids) + len(spoken(response))):
                if i >= first or not kept:
                    total += self._token_flops(model, i) * (3 if backward and i >= first else 1)
            outputs = len(response) - (edge or 0) + (model is self.value)
            return total + self._head_flops(model) * outputs * (3 if backward else 1)

        for response, begin in window.slices:
            read = len(response.prompt.token_ids) + place(response, len(response) - 1)  # nobody reads the policy's last token
            found["flops/rollout"] += sum(self._token_flops(self.policy, i) for i in range(read))
            found["flops/rollout"] += self._head_flops(self.policy) * (len(response) - begin)
        for row in rows:
            found["flops/forward"] += one_pass(self.value, row.response, False) if self.value else 0.0
            if row.response.id in plan.recomputed:
                edge = row.start if c.prefix == "constant" else None  # what stands before it has no log-probability
                found["flops/forward"] += one_pass(self.policy, row.response, False, edge)
        for n, minibatch in enumerate(plan.policy):
            for row in (by_id[i] for i in minibatch):
                edge = row.start if c.prefix == "constant" else None
                kept = c.keep_prefix and n < len(plan.policy) // c.epochs
                found["flops/policy"] += one_pass(self.policy, row.response, True, edge, kept)
                if c.ewma_decay > 0:
                    found["flops/policy"] += one_pass(self.policy, row.response, False, edge)
        joint = self.config.value.update == "joint"
        for i in (i for minibatch in plan.value for i in minibatch):
            edge = by_id[i].start if joint and c.prefix == "constant" else None
            found["flops/value"] += one_pass(self.value, self.seen[i], True, edge)
        return found

    @staticmethod
    def _token_flops(model: Any, place: int) -> float:
        """Of the token at `place`, 0 the first: it passes the matrices of all layers, and sees itself and all before it."""
        config = model.hf.config
        matrices = sum(m.weight.numel() for m in model.hf.base_model.modules() if isinstance(m, torch.nn.Linear))
        head_width = config.hidden_size // config.num_attention_heads
        scores_and_mix = 2 * 2 * head_width * (place + 1)
        return 2 * matrices + config.num_hidden_layers * config.num_attention_heads * scores_and_mix

    def _head_flops(self, model: Any) -> float:
        return 2 * model.hf.config.hidden_size * (1 if model is self.value else model.hf.config.vocab_size)

    def gap(self, rows: list[Row], plan: Plan) -> float:
        """Engine against trainer, over this step's tokens of the rows that were recomputed: all of them, or a sample."""
        ids = [row.response.id for row in rows]
        if self.config.policy.old_logprobs == "recompute":
            assert sorted(plan.recomputed) == sorted(ids), "not every row was recomputed"
        return mean([
            abs(row.recomputed[t] - row.response.logprobs[t])
            for row in rows if row.response.id in plan.recomputed for t in range(max(row.start, row.begin), row.T)
        ])  # fmt: skip

    def gap_of(self, window: Window, plan: Plan) -> float:
        """The gap that a Trainer refused to train on."""
        rows = self._rows(window)
        self._estimate(rows)
        return self.gap(rows, plan)

    def _ended(self, window: Window) -> list[Response]:
        return [response for response, _ in window.slices if response.end is not End.RUNNING]

    def _rows(self, window: Window) -> list[Row]:
        """train_on="window": whatever sampled a token and has min_new_tokens. "ended": whole responses, once, when they end."""
        rows = self._whole_groups(window) if self.value is None else []
        for response, begin in window.slices if self.value is not None else ():
            T, cut = len(response.token_ids), response.end is End.RUNNING
            start = self.settled.get(response.id, 0)
            if cut and (self.config.policy.train_on == "ended" or T - start < self.config.policy.min_new_tokens):
                continue
            stop = max(start, T - self.config.advantage.tail_tokens) if cut else T
            rows.append(Row(response, begin, start, range(start, stop), range(stop, T)))
        n = self.config.policy.reuse_batches
        for batch in self.past[max(0, len(self.past) - n) :]:
            rows += [Row(r, len(r), 0, range(len(r)), range(0), reused=True) for r in batch]
        return rows

    def _whole_groups(self, window: Window) -> list[Row]:
        """Samples G k, ..., G k + G - 1 are of one prompt, and train in the step in which the last of them has ended."""
        begins = {response.id: begin for response, begin in window.slices}
        size, rows = self.config.rollout.samples_per_prompt, []
        for response in self._ended(window):
            self.ended_at[response.id] = self.steps
            self.groups.setdefault(response.id // size, []).append(response)
        for number in [number for number, group in self.groups.items() if len(group) == size]:
            for r in self.groups.pop(number):
                rows.append(Row(r, begins.get(r.id, len(r)), 0, range(len(r)), range(0)))
        return rows

    @torch.no_grad()
    def _estimate(self, rows: list[Row]) -> None:
        """V and log-probabilities of whole rows under the models as they stand before the updates."""
        for row in rows:
            if self.value is not None:
                value_T, last_value_1 = self._say(self.value, row.response)
                row.value, row.last_value = value_T[: row.T].tolist(), float(last_value_1[0])
            row.recomputed = self._say(self.policy, row.response)[: row.T].tolist()
            if self.config.policy.keep_prefix:
                row.constant = SimpleNamespace()
                self._say(self.policy, row.response, row.start, row.constant)
            anchors = self.first_values.setdefault(row.response.id, [])
            row.fed_before = len(row.response) if row.reused else len(anchors)
            anchors += row.value[len(anchors) :]

    @staticmethod
    def _say(model: torch.nn.Module, response: Response, live_from: int | None = None, constant: Any = None) -> Any:
        """What a model says of the policy's tokens, and the value model of what comes after all. live_from: what stands before this
        column is read without gradient. constant: fill it with what the model makes of that, or read it from there."""
        said = spoken(response)
        edge = None if live_from is None else [place(response, live_from)]
        output = model(TokenBatch([response.prompt.token_ids], [[token for token, _ in said]], edge, constant))
        own = [i for i, (_, column) in enumerate(said) if column is not None]
        return (output[0][0, own], output[1]) if isinstance(output, tuple) else output[0, own]

    def _advantages(self, rows: list[Row]) -> dict[str, float]:
        """Extended GAE, or each response against its group; then whitening over the step's trained tokens, then the clamp."""
        c, num_flat, groups = self.config.advantage, 0, {}
        for row in rows if self.value is None else ():
            groups.setdefault(row.response.id // self.config.rollout.samples_per_prompt, []).append(row)
        for group in groups.values():
            scores = [row.response.score for row in group]
            num_flat += len({*scores}) == 1
            for i, row in enumerate(group):
                A = scores[i] - mean(scores[:i] + scores[i + 1 :])
                if c.estimator == "grpo":
                    A = 0.0 if len({*scores}) == 1 else (scores[i] - mean(scores)) / (statistics.stdev(scores) + 1e-6)
                row.raw, row.lam = dict.fromkeys(range(row.T), A), NAN
        for row in rows if self.value is not None else ():
            length = row.T + (self.config.rollout.window / 2 if row.cut else 0)
            row.lam = c.lam if c.lam_alpha is None else max(c.lam, 1 - 1 / (c.lam_alpha * length))
            after_the_cut = {"previous": row.value[-1], "critic": row.last_value, "zero": 0.0}[c.cut_value]
            next_value = [*row.value[1:], after_the_cut if row.cut else 0.0]
            reward = [0.0] * row.T
            if not row.cut:
                reward[-1] = row.response.score
            delta = [reward[t] + c.gamma * next_value[t] - row.value[t] for t in range(row.T)]
            for t in range(row.start, row.T):
                row.raw[t] = sum((c.gamma * row.lam) ** k * delta[t + k] for k in range(row.T - t))
        raw = [row.raw[t] for row in rows for t in row.trained]
        centre, deviation, num_clamped = mean(raw), math.sqrt(variance(raw)), 0
        for row in rows:
            for t in row.trained:
                row.scaled[t] = row.raw[t]
                if c.whiten:
                    white = (row.raw[t] - centre) / (deviation + WHITEN_EPSILON) if deviation > 0 else 0.0
                    row.scaled[t] = min(max(white, -c.clamp), c.clamp)
                    num_clamped += abs(white) > c.clamp
        return {
            "advantage/mean": centre,
            "advantage/std": deviation,
            "advantage/clamped_share": num_clamped / (len(raw) or NAN),
            "advantage/lam_mean": mean([row.lam for row in rows]),
            "advantage/flat_groups": num_flat / (len(groups) or NAN),
        }

    # ----------------------------------------------------------------------------------------------------------- the policy

    def averaged(self) -> list[torch.Tensor]:
        """PPO-EWMA's average (arXiv 2110.00641): weights decay^i for the policy of i updates ago, divided by their sum."""
        decay, n = self.config.policy.ewma_decay, len(self.history)
        weights = [decay ** (n - 1 - i) for i in range(n)]
        each = zip(*self.history, strict=True)
        return [sum(w * p for w, p in zip(weights, past, strict=True)) / sum(weights) for past in each]

    @torch.no_grad()
    def _averaged_logprobs(self, row: Row) -> list[float]:
        model = copy.deepcopy(self.policy)
        for p, average in zip(model.parameters(), self.averaged(), strict=True):
            p.copy_(average)
        return self._say(model, row.response)[: row.T].tolist()

    def _middle(self, row: Row, t: int) -> float:
        """Around which ratio the clip lies: 1, or GePPO's (arXiv 2111.00072), the ratio that the policy before the update has."""
        generalised = self.config.policy.importance == "generalised"
        return math.exp(row.recomputed[t] - row.response.logprobs[t]) if generalised else 1.0

    def _centre_and_weight(self, row: Row, t: int, averaged: list[float]) -> tuple[float, float, bool]:
        """The log-probability that the ratio is formed with, the weight outside of the clip, and whether the cap acts on it."""
        c = self.config.policy
        behaviour, this_step = row.response.logprobs[t], t >= row.begin
        if c.importance == "generalised":
            return behaviour, 1.0, False
        if c.ewma_decay > 0:
            centre = averaged[t]
        elif c.importance != "none":
            centre = row.recomputed[t]
        else:
            recomputed = this_step and c.old_logprobs == "recompute"
            return (row.recomputed[t] if recomputed else behaviour), 1.0, False
        weight = math.exp(centre - behaviour)
        if weight <= c.importance_cap:
            return centre, weight, False
        return centre, (0.0 if c.importance == "masked" else c.importance_cap), True

    def _update_policy(self, rows: list[Row], minibatches: list[Minibatch], version: int) -> dict[str, float]:
        c, by_id = self.config.policy, {row.response.id: row for row in rows}
        check_plan(minibatches, {row.response.id: len(row.trained) for row in rows}, c, "policy")
        tokens = [(row, t) for row in rows for t in row.trained]
        total, norms, ratios = Sums(), [], []
        self.policy_optimiser.num_steps += bool(minibatches)
        for minibatch in minibatches:
            batch = [by_id[i] for i in minibatch]
            num_tokens = sum(len(row.trained) for row in batch)
            good = [row for row in batch if not row.cut and not row.reused and row.response.score > 0]
            num_good = sum(len(row.trained) for row in good)
            loss = torch.zeros((), dtype=torch.float64)
            first_epoch = len(norms) < len(minibatches) // c.epochs
            for row in batch:
                averaged = self._averaged_logprobs(row) if c.ewma_decay > 0 else []
                live_from = row.start if c.prefix == "constant" else None
                logprob = self._say(self.policy, row.response, live_from, row.constant if first_epoch else None)
                for t in row.trained:
                    A = row.scaled[t]
                    centre, weight, capped = self._centre_and_weight(row, t, averaged)
                    live_ratio = torch.exp(logprob[t] - centre)
                    S, ratio = live_ratio * A, live_ratio.item()
                    limit = self._middle(row, t) + (c.clip_high if A > 0 else -c.clip_low)
                    clipped = ratio > limit if A > 0 else A < 0 and ratio < limit
                    if clipped:
                        S = torch.tensor(limit * A, dtype=torch.float64)
                    dual_clipped = c.dual_clip is not None and A < 0 and S.item() < c.dual_clip * A
                    if dual_clipped:
                        S = torch.tensor(c.dual_clip * A, dtype=torch.float64)
                    loss = loss - weight * S / num_tokens
                    ratios.append(ratio)
                    total["tokens"] += 1
                    total["lag"] += len(norms)
                    total["loss"] -= weight * S.item()
                    total["clipped"] += clipped
                    total["dual"] += dual_clipped
                    total["capped"] += capped
                    total["kl"] += ratio - 1 - math.log(ratio)
                    if row in good:
                        loss = loss - c.lm_loss_weight * logprob[t] / num_good
                        total["lm_loss"] -= logprob[t].item()
                        total["lm_tokens"] += 1
            norms.append(self.policy_optimiser.update(loss))
            self.history.append([p.detach().clone() for p in self.policy.parameters()])
        sampled_by = [row.response.versions[t] for row, t in tokens]
        staleness = [version - v for v in sampled_by]
        n = total["tokens"] or NAN
        return {
            "policy/tokens": len(tokens),
            "policy/staleness": mean(staleness),
            "policy/staleness_max": max(staleness, default=NAN),
            "policy/lag_updates": mean([self.updates_before[version] - self.updates_before[v] for v in sampled_by]),
            "policy/lag_in_step": total["lag"] / n,
            "policy/updates": len(minibatches),
            "policy/loss": total["loss"] / n,
            "policy/lm_loss": total["lm_loss"] / (total["lm_tokens"] or NAN),
            "policy/clipped_share": total["clipped"] / n,
            "policy/dual_clipped_share": total["dual"] / n,
            "policy/weight_clipped_share": total["capped"] / n,
            "policy/kl": total["kl"] / n,
            "policy/ratio_max": max(ratios, default=NAN),
            "policy/grad_norm": mean(norms),
            "policy/lr": self.policy_optimiser.lr,
        }

    # ------------------------------------------------------------------------------------------------------ the value model

    def _update_value(self, rows: list[Row], plan: Plan) -> dict[str, float]:
        """independent: ended responses, whole, to their Monte Carlo returns. joint: the policy's tokens, to A + V."""
        c, gamma = self.config.value, self.config.advantage.gamma
        if c.update == "joint":
            taken = [row.response for row in rows]
            target = {row.response.id: {t: row.raw[t] + row.value[t] for t in row.trained} for row in rows}
            live_from = {row.response.id: row.start for row in rows if self.config.policy.prefix == "constant"}
        else:
            taken = self._take_waiting(plan.value)
            target = {r.id: {t: r.score * gamma ** (len(r) - 1 - t) for t in range(len(r))} for r in taken}
            live_from = {}
        check_plan(plan.value, {i: len(columns) for i, columns in target.items()}, self._value_passes(), "value")
        total, norms, targets, misses = Sums(), [], [], []
        self.value_optimiser.num_steps += bool(plan.value)
        for minibatch in plan.value:
            num_tokens = sum(len(target[i]) for i in minibatch)
            loss = torch.zeros((), dtype=torch.float64)
            for i in minibatch:
                value, _ = self._say(self.value, self.seen[i], live_from.get(i))
                for t, R in target[i].items():
                    anchor, v = self.first_values[i][t], value[t]
                    low = -math.inf if c.clip_low is None else anchor - c.clip_low
                    high = math.inf if c.clip_high is None else anchor + c.clip_high
                    inside = min(max(v.item(), low), high)
                    error, clip_binds = (v - R) ** 2, (inside - R) ** 2 > (v.item() - R) ** 2
                    if clip_binds:
                        error = torch.tensor((inside - R) ** 2, dtype=torch.float64)
                    loss = loss + 0.5 * error / num_tokens
                    total["loss"] += 0.5 * error.item()
                    total["clipped"] += clip_binds
                    total["tokens"] += 1
                    targets.append(R)
                    misses.append(R - v.item())
            norms.append(self.value_optimiser.update(loss))
        n, spread = total["tokens"] or NAN, variance(targets)
        return {
            "value/responses": len(taken),
            "value/held": len(self.waiting) if c.update == "independent" else 0,
            "value/tokens": total["tokens"],
            "value/updates": len(plan.value),
            "value/loss": total["loss"] / n,
            "value/clipped_share": total["clipped"] / n,
            "value/explained_variance": 1 - variance(misses) / spread if spread > 1e-12 else NAN,  # less is rounding
            "value/grad_norm": mean(norms),
            "value/lr": self.value_optimiser.lr,
        }

    def _no_value(self) -> dict[str, float]:
        counts = dict.fromkeys(("responses", "held", "tokens", "updates"), 0)
        means = dict.fromkeys(("loss", "clipped_share", "explained_variance", "grad_norm", "lr"), NAN)
        return {f"value/{name}": x for name, x in (counts | means).items()}

    def _value_passes(self) -> Any:
        """Whose epochs and mini-batches the value model has: its own, or under "joint" the policy's."""
        return self.config.policy if self.config.value.update == "joint" else self.config.value

    def _take_waiting(self, minibatches: list[Minibatch]) -> list[Response]:
        """The responses that the plan trains on leave the queue; it must take whole batches, the oldest ones."""
        n = self.config.value.batch_responses
        count = len(self.waiting) if n == 0 else len(self.waiting) // n * n
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return taken

    # -------------------------------------------------------------------------------------------------------------- metrics

    def _settle(self, window: Window, rows: list[Row], warming_up: bool) -> dict[str, float]:
        """The ledger: what became of every token that was ever sampled."""
        a = self.config.advantage
        self.ledger["generated"] += sum(len(response) - begin for response, begin in window.slices)
        self.ledger["observed"] += sum(
            len(tokens) for response, begin in window.slices for at, tokens in response.observations if at > begin
        )
        for row in (row for row in rows if not row.reused):
            if warming_up:  # whatever the policy would have seen, the tail included
                self.ledger["excluded_warmup"] += row.T - row.start
                self.settled[row.response.id] = row.T
                continue
            self.ledger["trained"] += len(row.trained)
            if a.tail == "exclude":
                self.ledger["excluded_tail"] += len(row.tail)
            self.settled[row.response.id] = row.T if a.tail == "exclude" else row.trained.stop
        in_flight = [response for response in self.seen.values() if response.end is End.RUNNING]
        held = [response for group in self.groups.values() for response in group]
        waited = [self.steps - self.ended_at[row.response.id] for row in rows if self.value is None and not row.reused]
        return {
            "ledger/generated": self.ledger["generated"],
            "ledger/trained": self.ledger["trained"],
            "ledger/excluded_tail": self.ledger["excluded_tail"],
            "ledger/excluded_warmup": self.ledger["excluded_warmup"],
            "ledger/pending": sum(len(response) - self.settled.get(response.id, 0) for response in in_flight + held),
            "ledger/in_flight": len(in_flight),
            "ledger/held_groups": len(self.groups),
            "ledger/held_responses": len(held),
            "ledger/held_steps": mean(waited),
            "ledger/observed": self.ledger["observed"],
        }

    def _window_metrics(self, window: Window, scores: Mapping[int, tuple[float, str]]) -> dict[str, float]:
        ended = self._ended(window)
        self.ledger["timeouts"] += sum(status == "timeout" for _, status in scores.values())
        self.ledger["errors"] += sum(status in ("error", "bad_score") for _, status in scores.values())
        return {
            "rollout/decode_steps": window.num_steps,
            "rollout/tokens": sum(len(response) - begin for response, begin in window.slices),
            "rollout/occupancy": sum(stop - begin for begin, stop in window.busy) / (window.slots * window.num_steps),
            "response/rows": len(window.slices),
            "response/ended": len(ended),
            "response/cut_share": 1 - len(ended) / len(window.slices),
            "response/cut_token_share": sum(len(r) - begin for r, begin in window.slices if r.end is End.RUNNING)
            / sum(len(r) - begin for r, begin in window.slices),
            "response/capped_share": mean([r.end is End.LENGTH_CAP for r in ended]),
            "response/length_mean": mean([len(r) for r in ended]),
            "response/length_max": max((len(r) for r in ended), default=NAN),
            "response/turns_mean": mean([1 + len(r.observations) for r in ended]),
            "response/score_mean": mean([r.score for r in ended]),
            "response/accuracy": mean([r.score > 0 for r in ended]),
            "verify/timeouts": self.ledger["timeouts"],
            "verify/errors": self.ledger["errors"],
        }


def check_plan(minibatches: list[Minibatch], tokens: Mapping[int, int], section: Any, name: str) -> None:
    """Every row that trains a token is in exactly one mini-batch per epoch, and there are as many as the section asks for."""
    rows = sorted(i for i, n in tokens.items() if n)
    if not rows:
        assert not minibatches, f"{name}: an update without a trained token"
        return
    assert len(minibatches) % section.epochs == 0, f"{name}: {len(minibatches)} mini-batches in {section.epochs} epochs"
    per_epoch = len(minibatches) // section.epochs
    for first in range(0, len(minibatches), per_epoch):
        epoch = minibatches[first : first + per_epoch]
        assert sorted(i for b in epoch for i in b if tokens[i]) == rows, f"{name}: not each row once per epoch"
        assert all(any(tokens[i] for i in b) for b in epoch), f"{name}: a mini-batch without a trained token"
    if section.mini_batch_tokens == 0:
        assert per_epoch == min(section.mini_batches, len(rows)), f"{name}: {per_epoch} mini-batches of {len(rows)} rows"
    else:
        # "Trained tokens per optimiser step, about (rows stay whole)": within half an update of the quotient, rows permitting.
        asked = sum(tokens.values()) / section.mini_batch_tokens
        assert abs(per_epoch - asked) <= 1 or per_epoch == len(rows), f"{name}: {per_epoch} mini-batches where {asked} were asked"
