"""The training loop of T-PPO, and of PPO, which is the same loop with a window as long as the response.

One step: decode a window -> scores of what ended -> values and old log-probabilities -> EGAE -> token filter -> policy update
and value update -> weights to the engine. Source: T-PPO, arXiv 2506.15050; config.py marks where a default comes from.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from tppo_ref.loop.learner import Learner, Plan
from tppo_ref.loop.ledger import PhaseClock
from tppo_ref.loop.parallel import Parallel, SingleProcess
from tppo_ref.loop.rows import PolicyRows, pad, response_mask, store_values, terminal_rewards
from tppo_ref.loop.updates import Ewma, update_policy, update_value
from tppo_ref.method.advantages import monte_carlo_returns
from tppo_ref.method.errors import NonFiniteError
from tppo_ref.method.masks import value_token_mask
from tppo_ref.method.records import End, Response, WindowSlice
from tppo_ref.rollout.batcher import SuccessiveBatcher
from tppo_ref.rollout.engine import RolloutEngine
from tppo_ref.runs.config import Config


class Scorer(Protocol):
    """Scores ended responses while others still decode. `submit` when a response ends, `collect` before the advantages."""

    def submit(self, response: Response) -> None: ...

    def collect(self) -> dict[int, tuple[float, str]]:
        """Waits, within bounds, for everything submitted: response id -> (score, "ok", "timeout", "error" or "bad_score")."""


class Trainer:
    """Policy, value model, batcher, engine and scorer, stepped together.

    policy(TokenBatch) -> logprob_BT and value(TokenBatch) -> (value_BT, last_value_B), both float32 on response tokens
    (float64 of float64 models): packing, logit chunks, checkpointing and sharding live behind them. `step()` returns metrics
    (metrics.GLOSSARY).

    averaged   for policy.ewma_decay: a second copy of the policy, where it cannot be deep-copied (sharded ones)
    """

    def __init__(
        self,
        config: Config,
        *,
        policy: torch.nn.Module,
        value: torch.nn.Module,
        engine: RolloutEngine,
        batcher: SuccessiveBatcher,
        scorer: Scorer,
        parallel: Parallel | None = None,
        device: torch.device | str = "cpu",
        averaged: torch.nn.Module | None = None,
    ):
        self.config, self.engine, self.batcher, self.scorer, self.device = config, engine, batcher, scorer, device
        self.parallel: Parallel = parallel or SingleProcess()
        self.policy_learner = Learner("policy", policy, config.policy, self.parallel)
        self.value_learner = Learner("value", value, config.value, self.parallel)
        self.ewma: Ewma | None = None
        if config.policy.ewma_decay:
            self.ewma = Ewma(averaged if averaged is not None else copy.deepcopy(policy), config.policy.ewma_decay)
        # Log-probabilities, values and advantages: never below float32, and float64 where the models are.
        self.dtype = torch.promote_types(next(policy.parameters()).dtype, torch.float32)
        self._recomputes = config.policy.old_logprobs == "recompute"
        self.num_steps = 0
        self.version = 0  # of the policy's weights: one more per sync
        self.train_s = 0.0
        self.held: list[Response] = []  # ended responses that wait for the value model's batch to fill
        self.ledger: Counter[str] = Counter()
        self.verdicts: Counter[str] = Counter()
        self.slices: list[WindowSlice] = []  # the last window's

    # ------------------------------------------------------------------------------------------------ one step, top to bottom

    def step(self) -> dict[str, float]:
        """One window and the updates on it."""
        self.num_steps += 1
        clock = PhaseClock()
        with clock("rollout"):
            self.slices = self.batcher.window(self.engine, version=self.version, on_end=self.scorer.submit)
            self.engine.sleep()
        with clock("verify"):
            self._collect_scores()
        warming_up = self.num_steps <= self.config.value.warmup_steps
        with clock("forward"):
            rows = self._policy_rows()
            epochs = range(self.config.policy.epochs)
            plans = [self._plan(self.policy_learner, rows.responses, rows.train_BT, epoch) for epoch in epochs]
            self._forward(rows, plans[0])
            metrics = rows.estimate_advantages(self.config.advantage, self.config.rollout.window, self.parallel)
        with clock("policy"):
            if not warming_up:
                metrics |= update_policy(self.policy_learner, rows, plans, step=self.num_steps, ewma=self.ewma)
        with clock("value"):
            metrics |= self._update_value(rows, plans)
        with clock("sync"):
            self.version += 1
            self.engine.load_weights(self.policy_learner.module.named_tensors(), self.version)
        metrics |= self._settle(rows, warming_up)
        metrics |= self._window_metrics(clock.seconds["rollout"])
        metrics |= clock.metrics()
        self.train_s += metrics["time/step_s"]
        return metrics | {"time/train_s": self.train_s}

    def _collect_scores(self) -> None:
        scores = self.scorer.collect()
        for window_slice in self.slices:
            response = window_slice.response
            if response.ended:
                response.score, status = scores[response.id]
                self.verdicts[status] += 1

    def _policy_rows(self) -> PolicyRows:
        """The step's rows. Ended responses may move to a rank with less to do; one that runs stays where it is decoded."""
        ended = [s.response.ended for s in self.slices]
        trains = [e or self.config.policy.train_on == "window" for e in ended]
        work = [s.response.num_fed if t else 0 for s, t in zip(self.slices, trains, strict=True)]
        self.slices = self.parallel.rebalance(self.slices, work, ended)
        chosen = [s for s in self.slices if self.config.policy.train_on == "window" or s.response.ended]
        return PolicyRows.build(
            [s.response for s in chosen], [s.begin for s in chosen], self.config.advantage, self.device, self.dtype
        )

    @torch.no_grad()
    def _forward(self, rows: PolicyRows, plan: Plan) -> None:
        """Values and old log-probabilities, in the micro-batches of the first epoch: its first ratio is then exactly 1."""
        for micro_batch in (micro for mini in plan for micro in mini):
            batch = rows.batch(micro_batch)
            value_BT, last_value_B = self.value_learner.module(batch)
            rows.put(micro_batch, values_BT=value_BT, last_value_B=last_value_B)
            if self._recomputes:
                rows.put(micro_batch, logprob_BT=self.policy_learner.module(batch))
        outputs = (("log-probability", rows.logprob_BT), ("value", rows.values_BT), ("value", rows.last_value_B))
        bad = self.parallel.max([not bool(torch.isfinite(tensor).all()) for _, tensor in outputs])  # all ranks stop, or none
        for (name, _), is_bad in zip(outputs, bad, strict=True):
            if is_bad:
                raise NonFiniteError(f"step {self.num_steps}: a {name} is not finite; stopped before the update")
        if not self._recomputes:
            rows.logprob_BT = rows.behaviour_BT
        store_values(rows)

    def _update_value(self, rows: PolicyRows, plans: list[Plan]) -> dict[str, float]:
        """The value model: on whole ended responses and their Monte Carlo returns, or jointly on the policy's tokens."""
        config = self.config.value
        if config.update == "joint":
            assert rows.raw_advantages_BT is not None
            responses, stored_BT = rows.responses, rows.values_BT
            targets_BT, mask_BT = rows.raw_advantages_BT + rows.values_BT, rows.train_BT
        else:
            responses = self._take_ended()
            ended_B = torch.tensor([r.ended for r in responses], dtype=torch.bool, device=self.device)
            mask_BT = value_token_mask(response_mask([len(r) for r in responses], self.device), ended_B)
            gamma = self.config.advantage.gamma
            targets_BT = monte_carlo_returns(terminal_rewards(responses, self.device, self.dtype), mask_BT, gamma=gamma)
            stored_BT = pad([r.values for r in responses], self.dtype, self.device)
            plans = [self._plan(self.value_learner, responses, mask_BT, epoch) for epoch in range(config.epochs)]
        metrics = update_value(self.value_learner, responses, targets_BT, mask_BT, stored_BT, plans, step=self.num_steps)
        num_responses, num_held = self.parallel.sum([len(responses), len(self.held)])
        return metrics | {"value/responses": num_responses, "value/held": num_held}

    def _take_ended(self) -> list[Response]:
        """Ended responses to train the value model on: all of them, or as many full batches as there are on every rank."""
        self.held += [s.response for s in self.slices if s.response.ended]
        taken = len(self.held)
        if size := self.config.value.batch_responses:
            full_batches = min(self.parallel.gather_objects(len(self.held) // size))  # the rank with fewest sets the pace
            taken = full_batches * size
        responses, self.held = self.held[:taken], self.held[taken:]
        return self.parallel.rebalance(responses, [r.num_fed for r in responses], [True] * len(responses))

    def _plan(self, learner: Learner, responses: Sequence[Response], mask_BT: torch.Tensor, epoch: int) -> Plan:
        fed = [r.num_fed for r in responses]
        key = (self.config.run.seed, self.num_steps, epoch, self.parallel.rank, learner is self.value_learner)
        return learner.plan(mask_BT.sum(1).tolist(), fed, np.random.default_rng(key))

    # ---------------------------------------------------------------------------------------------------- what became of tokens

    def _settle(self, rows: PolicyRows, warming_up: bool) -> dict[str, float]:
        """Enter the step into the ledger: generated = trained + excluded + pending, at every step (theory.md F1)."""
        advantage = self.config.advantage
        fed = sum(r.num_fed for r in rows.responses)
        sampled_with = self.version - 1  # the weights that this window's tokens come from; the sync is through
        age_sum, age_max = 0, 0
        for response, trained in zip(rows.responses, rows.train_BT.sum(1).tolist(), strict=True):
            unsettled = len(response) - response.num_settled
            versions = response.versions[response.num_settled : response.num_settled + trained]
            if versions and not warming_up:
                age_sum += sampled_with * trained - sum(versions)
                age_max = max(age_max, sampled_with - min(versions))
            if warming_up:
                self.ledger["excluded_warmup"] += unsettled
                response.num_settled = len(response)
            elif advantage.tail == "defer":
                self.ledger["trained"] += trained
                response.num_settled += trained
            else:
                self.ledger["trained"] += trained
                self.ledger["excluded_tail"] += unsettled - trained
                response.num_settled = len(response)
        new_BT = rows.new_BT
        ledger = self._sum(
            {f"ledger/{name}": self.ledger[name] for name in ("trained", "excluded_tail", "excluded_warmup")}
            | {
                "ledger/generated": self.batcher.num_generated_tokens,
                "ledger/pending": sum(len(r) - r.num_settled for r in self.batcher.own_in_flight),
                "ledger/in_flight": len(self.batcher.own_in_flight),
                "policy/tokens": 0.0 if warming_up else float(rows.train_BT.sum()),
                "policy/prefix_tokens": fed - float(new_BT.sum()),
                "policy/staleness": float(age_sum),
            }
        )
        ledger["policy/staleness"] /= max(ledger["policy/tokens"], 1)
        accounted = sum(ledger[f"ledger/{name}"] for name in ("trained", "excluded_tail", "excluded_warmup", "pending"))
        generated = ledger["ledger/generated"]
        assert generated == accounted, f"step {self.num_steps}: {generated} tokens generated, {accounted} accounted for"
        gap = -1.0  # a rank with nothing to compare
        if self._recomputes and bool(new_BT.any()):
            gap = float((rows.logprob_BT - rows.behaviour_BT)[new_BT].abs().mean())
        gap, oldest = self.parallel.max([gap, age_max])
        return ledger | {"policy/logprob_gap": gap if gap >= 0 else math.nan, "policy/staleness_max": oldest}

    def _sum(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """Named numbers of this rank -> their sums over all ranks."""
        return dict(zip(numbers, self.parallel.sum(numbers.values()), strict=True))

    def _window_metrics(self, rollout_s: float) -> dict[str, float]:
        ended = [s.response for s in self.slices if s.response.ended]
        busy = sum(s.stop - s.begin for s in self.slices)
        total = self._sum({
            "rows": len(self.slices), "ended": len(ended), "capped": sum(r.end is End.LENGTH_CAP for r in ended),
            "length": sum(map(len, ended)), "score": sum(r.score or 0.0 for r in ended),
            "right": sum((r.score or 0.0) > 0 for r in ended), "tokens": busy,
            "slot_steps": self.batcher.slot_steps, "timeout": self.verdicts["timeout"],
            "error": self.verdicts["error"] + self.verdicts["bad_score"],
        })  # fmt: skip
        longest, steps, rollout_s = self.parallel.max([max(map(len, ended), default=0), self.batcher.num_steps, rollout_s])
        occupancy = total["tokens"] / max(total["slot_steps"], 1)

        def per_ended(name: str) -> float:
            return total[name] / total["ended"] if total["ended"] else math.nan

        return {
            "rollout/decode_steps": steps, "rollout/tokens": total["tokens"], "rollout/tokens_per_s": total["tokens"] / rollout_s,
            "rollout/occupancy": occupancy, "rollout/idle_s": (1 - occupancy) * rollout_s, "response/rows": total["rows"],
            "response/ended": total["ended"], "response/cut_share": (total["rows"] - total["ended"]) / max(total["rows"], 1),
            "response/capped_share": per_ended("capped"), "response/length_mean": per_ended("length"),
            "response/length_max": longest, "response/score_mean": per_ended("score"), "response/accuracy": per_ended("right"),
            "verify/timeouts": total["timeout"], "verify/errors": total["error"],
        }  # fmt: skip
