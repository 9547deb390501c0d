"""The training loop of T-PPO, and of PPO, which is the same loop without an edge: its step lasts until its responses have ended,
and its value model is trained jointly.

    repeat
        decode one window: carried responses go on, a freed slot takes the next prompt      SuccessiveBatcher.window
        score what ended                                                                    Ledger.enter_scores
        rows: the tokens that the policy has yet to see                                     Rows.of
        values and old log-probabilities                                                    forward
        EGAE, V(s_l) := V(s_{l-1}) at a cut; whiten                                         estimate_advantages
        policy: clipped surrogate on this window's tokens, ended or not                     update_policy
        value model: Monte Carlo returns of responses that ended                            update_value
        new weights to the engine
        settle: every token is trained, excluded or pending                                 Ledger.settle

Source: T-PPO, arXiv 2506.15050; docs/config.md marks where each default comes from.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from tppo_ref.loop.cut_rules import CutRule
from tppo_ref.loop.estimates import Advantages, estimate_advantages
from tppo_ref.loop.forward import Forward, dtype_of, forward, remember_values
from tppo_ref.loop.groups import NOTHING_HELD, held_metrics, split_whole_groups
from tppo_ref.loop.learner import Learner, Plan
from tppo_ref.loop.ledger import Ledger
from tppo_ref.loop.meters import Memory, Meters
from tppo_ref.loop.parallel import Parallel, SingleProcess
from tppo_ref.loop.rows import Rows
from tppo_ref.loop.settings import Settings
from tppo_ref.loop.updates import NO_VALUE_MODEL, Ewma, update_policy, update_value
from tppo_ref.loop.value_targets import ValueBatch, independent_batch, joint_batch, take_full_batches
from tppo_ref.method.records import Response, WindowSlice
from tppo_ref.rollout.batcher import Batcher
from tppo_ref.rollout.engine import RolloutEngine


class Scorer(Protocol):
    """Scores ended responses while others still decode. `submit` when a response ends, `collect` before the advantages."""

    def submit(self, response: Response) -> None: ...

    def collect(self) -> dict[int, tuple[float, str]]:
        """Waits, within bounds, for everything submitted: response id -> (score, "ok", "timeout", "error" or "bad_score")."""


Observer = Callable[[Rows, Forward, Advantages, ValueBatch], None]
"""Called once a step, after both updates and before the rows are settled, with what they were made on. It changes nothing."""


class Trainer:
    """Policy, value model, batcher, engine and scorer, stepped together. With advantage.estimator rloo or grpo, no value model.

    policy(TokenBatch) -> logprob_BT and value(TokenBatch) -> (value_BT, last_value_B), at least float32, on response tokens:
    packing, logit chunks, checkpointing and sharding live behind them. `step()` returns metrics (docs/metrics.md).

    averaged   for policy.ewma_decay: a second copy of the policy, where it cannot be deep-copied (sharded ones)
    observer   sees each step's data, for whoever studies them
    memory     the device's counters, where they are not CUDA's
    cut_rule   what stands for V(s_l) at a cut, in place of advantage.cut_value (cut_rules.py)
    """

    def __init__(
        self,
        config: Settings,
        *,
        policy: torch.nn.Module,
        value: torch.nn.Module | None,
        engine: RolloutEngine,
        batcher: Batcher,
        scorer: Scorer,
        parallel: Parallel | None = None,
        device: torch.device | str = "cpu",
        averaged: torch.nn.Module | None = None,
        observer: Observer | None = None,
        memory: Memory | None = None,
        cut_rule: CutRule | None = None,
    ):
        self.config, self.engine, self.batcher, self.scorer, self.device = config, engine, batcher, scorer, device
        self.parallel: Parallel = parallel or SingleProcess()
        self.observer, self.cut_rule = observer, cut_rule
        self.policy_learner = Learner("policy", policy, config.policy, self.parallel)
        if (value is None) != config.advantage.critic_free:
            raise ValueError(
                f"value: got {'none' if value is None else 'a model'} with advantage.estimator {config.advantage.estimator}"
            )
        self.value_learner = None if value is None else Learner("value", value, config.value, self.parallel)
        models = [learner.module for learner in self.learners]
        self.dtype = dtype_of(models)
        self.ewma: Ewma | None = None
        if config.policy.ewma_decay:
            self.ewma = Ewma(averaged if averaged is not None else copy.deepcopy(policy), config.policy.ewma_decay)
        models += [self.ewma.module] if self.ewma else []
        self.meters = Meters(models, self.parallel, clock=config.run.clock, device=device, peak=1e12 * config.run.peak_tflops,
                             memory=memory)  # fmt: skip
        self.ledger = Ledger(self.parallel)
        self.num_steps = 0
        self.version = 0  # of the policy's weights: one more per sync
        self.train_s = 0.0
        self.past: list[list[Response]] = []  # earlier steps' responses that the policy trains on again, the oldest step first
        self.held: list[Response] = []  # ended responses that wait for the value model's batch to fill
        self.held_groups: list[Response] = []  # without a value model: ended ones that wait for the others of their prompt
        self.slices: list[WindowSlice] = []  # the last window's

    @property
    def learners(self) -> list[Learner]:
        """The policy's, and the value model's where there is one."""
        return [learner for learner in (self.policy_learner, self.value_learner) if learner]

    def step(self) -> dict[str, float]:
        """One window and the updates on it, in the README's eight lines. In the first `value.warmup_steps` steps the value model is
        trained alone: the policy has no mini-batch, and the books count its tokens as lost [P]."""
        self.num_steps += 1
        config, phase = self.config, self.meters
        phase.begin()
        warming_up = self.value_learner is not None and self.num_steps <= config.value.warmup_steps
        with phase("rollout"):  # 1
            engine = phase.decoding(self.engine)
            self.slices = self.batcher.window(engine, version=self.version, on_end=self.scorer.submit)
            engine.sleep()
            phase.decoded(self.slices)
        with phase("verify"):  # 2
            self.ledger.enter_scores(self.slices, self.scorer.collect())
        with phase("forward"):  # 3 and 4
            rows = self._rows()
            policy_plans = self._plans(self.policy_learner, rows.responses, rows.train_BT)
            before = forward(
                rows, policy_plans[0], config.policy, policy=self.policy_learner.module,
                value=self.value_learner.module if self.value_learner else None,
                parallel=self.parallel, key=(config.run.seed, self.num_steps),
            )  # fmt: skip
            if self.value_learner:
                remember_values(rows, before.values_BT)
            advantages, metrics = estimate_advantages(rows, before, config.advantage, config.rollout, self.parallel, self.cut_rule)
        with phase("policy"):  # 5
            metrics |= update_policy(
                self.policy_learner, rows, before, advantages.scaled_BT, [] if warming_up else policy_plans, step=self.num_steps,
                ewma=self.ewma,
            )  # fmt: skip
        with phase("value"):  # 6, and 8
            batch, of_value = self._update_value(rows, before, advantages, policy_plans)
            metrics |= of_value
        with phase("sync"):  # 7
            self.version += 1
            self.ledger.updates_at[self.version] = self.policy_learner.num_updates
            self.engine.load_weights(self.policy_learner.module.named_tensors(), self.version)
        if self.observer:
            self.observer(rows, before, advantages, batch)
        metrics["policy/logprob_gap"] = before.gap
        metrics |= self._settle(rows, batch, warming_up=warming_up)
        metrics |= self.ledger.window_metrics(self.slices, self.batcher, phase.clock.seconds["rollout"])
        metrics |= phase.metrics()
        self.train_s += metrics["time/step_s"]
        return metrics | {"time/train_s": self.train_s}

    def _update_value(
        self, rows: Rows, before: Forward, advantages: Advantages, policy_plans: list[Plan]
    ) -> tuple[ValueBatch, dict[str, float]]:
        """What the value model was trained on, and its metrics."""
        config, learner = self.config, self.value_learner
        if learner is None:
            return independent_batch([], gamma=1.0, device=self.device, dtype=self.dtype), NO_VALUE_MODEL
        if config.value.update == "joint":
            batch = joint_batch(rows, before, advantages, constant_prefix=config.policy.prefix == "constant")
            plans = policy_plans  # the same mini-batches
        else:
            batch = self._ended_batch()
            plans = self._plans(learner, batch.responses, batch.mask_BT)
        return batch, update_value(learner, batch, plans, step=self.num_steps)

    def _settle(self, rows: Rows, batch: ValueBatch, *, warming_up: bool) -> dict[str, float]:
        """Moves on what the next step begins with: each row's `num_settled`, the books, the responses that are trained on again."""
        if self.config.policy.reuse_batches and not warming_up:
            self._remember(rows)
        again = [response for past in self.past for response in past]
        num_responses, num_held = self.parallel.sum([len(batch.responses), len(self.held)])
        sampled_with, books = self.version - 1, {"value/responses": num_responses, "value/held": num_held} | NOTHING_HELD
        if self.value_learner is None:
            new = [r for r, reused in zip(rows.responses, rows.reused_B.tolist(), strict=True) if not reused]
            size = self.config.rollout.samples_per_prompt
            books |= held_metrics(self.held_groups, new, size, sampled_with=sampled_with, parallel=self.parallel)
        return books | self.ledger.settle(
            rows, self.batcher, warming_up=warming_up, sampled_with=sampled_with, held=self.held_groups, again=again
        )

    def _rows(self) -> Rows:
        """The step's rows. Ended responses may move to a rank with less to do; one that runs stays where it is decoded."""
        reused = [response for batch in self.past for response in batch]
        if self.value_learner is None:
            new, held = self._whole_groups()
            return Rows.of(new, self.config.advantage, self.device, self.dtype, held, reused)
        work = [s.response.num_fed if self._trains(s.response) else 0 for s in self.slices]
        self.slices = self.parallel.rebalance(self.slices, work, [s.response.ended for s in self.slices])
        chosen = [s for s in self.slices if self._trains(s.response)]
        return Rows.of(chosen, self.config.advantage, self.device, self.dtype, reused=reused)

    def _whole_groups(self) -> tuple[list[WindowSlice], list[Response]]:
        """Without a value model: the responses whose whole group has ended, of this window and of those that were held. The others
        that have ended are held."""
        ended = [*self.held_groups, *(s.response for s in self.slices if s.response.ended)]
        whole, self.held_groups = split_whole_groups(ended, self.config.rollout.samples_per_prompt, self.parallel)
        whole = self.parallel.rebalance(whole, [r.num_fed for r in whole], [True] * len(whole))
        now = [WindowSlice(r, r.window_starts[-1], len(r)) for r in whole if r.versions[-1] == self.version]
        return now, [r for r in whole if r.versions[-1] < self.version]

    def _remember(self, rows: Rows) -> None:
        """This step's responses join those that the next steps train on again (GePPO); those of the oldest step leave."""
        new = [r for r, reused in zip(rows.responses, rows.reused_B.tolist(), strict=True) if not reused]
        unseen = [dataclasses.replace(response, num_settled=0) for response in new]  # a second record: the books are of the first
        self.past = [*self.past, unseen][-self.config.policy.reuse_batches :]

    def _trains(self, response: Response) -> bool:
        """Whether a response is one of the step's rows: always when it ended; while RUNNING, with enough untrained tokens."""
        policy = self.config.policy
        return response.ended or (policy.train_on == "window" and len(response) - response.num_settled >= policy.min_new_tokens)

    def _ended_batch(self) -> ValueBatch:
        """T-PPO's value batch: the responses that ended, all of them or as many full batches as there are."""
        self.held += [s.response for s in self.slices if s.response.ended]
        now, self.held = take_full_batches(self.held, self.config.value.batch_responses, self.parallel)
        self.ledger.valued += len(now)
        return independent_batch(now, gamma=self.config.advantage.gamma, device=self.device, dtype=self.dtype)

    def _plans(self, learner: Learner, responses: Sequence[Response], mask_BT: torch.Tensor) -> list[Plan]:
        """Mini- and micro-batches of each epoch, drawn from (seed, step, epoch, rank, model)."""
        trained, fed = mask_BT.sum(1).tolist(), [r.num_fed for r in responses]
        key = self.config.run.seed, self.num_steps
        last = self.parallel.rank, learner is self.value_learner
        return [learner.plan(trained, fed, np.random.default_rng((*key, e, *last))) for e in range(learner.config.epochs)]

    def state_dict(self) -> dict[str, Any]:
        """All of this rank's state but tensors, in plain JSON types; models and optimisers are stored beside it."""
        return {
            "num_steps": self.num_steps,
            "version": self.version,
            "train_s": self.train_s,
            "ledger": self.ledger.state_dict(),
            "learners": {learner.name: learner.state_dict() for learner in self.learners},
            "ewma_weight": self.ewma.weight if self.ewma else None,
            "past": [[response.state_dict() for response in batch] for batch in self.past],
            "held": [response.state_dict() for response in self.held],
            "held_groups": [response.state_dict() for response in self.held_groups],
            "batcher": self.batcher.state_dict(),
            "torch_rng": torch.get_rng_state().tolist(),
        }

    def load_state_dict(self, states: Sequence[dict[str, Any]], own: int | None = 0) -> None:
        """Go on from what ranks saved.

        own    this rank's place among `states`, where they were saved on as many ranks. Else None, and `states` are all ranks':
               in-flight, held and reused responses are dealt anew, none lost and none twice, and the first rank takes over the
               books, of which only the sums over ranks mean anything
        """
        first = states[0]
        self.num_steps, self.version = first["num_steps"], first["version"]
        self.train_s = max(state["train_s"] for state in states)
        for learner in self.learners:
            learner.load_state_dict(first["learners"][learner.name])
        if self.ewma is not None:
            self.ewma.weight = first["ewma_weight"]
        if own is not None:
            books = [states[own]["ledger"]]
            torch.set_rng_state(torch.tensor(states[own]["torch_rng"], dtype=torch.uint8))
        else:
            books = [state["ledger"] for state in states] if self.parallel.rank == 0 else []
        self.held = self._dealt([state["held"] for state in states], own)
        self.held_groups = self._dealt([state["held_groups"] for state in states], own)
        self.past = [self._dealt(batches, own) for batches in zip(*(state["past"] for state in states), strict=True)]
        self.ledger.load_state_dict([state["ledger"] for state in states], books)
        self.batcher.load_state_dict([state["batcher"] for state in states])

    def _dealt(self, saved: Sequence[list[dict[str, Any]]], own: int | None) -> list[Response]:
        """Responses out of what each rank saved: this rank's own; without `own` its share of all ranks', in order of their ids."""
        everything = sorted((r for responses in saved for r in responses), key=lambda r: r["id"])
        mine = saved[own] if own is not None else everything[self.parallel.rank :: self.parallel.world]
        return [Response.from_state_dict(response) for response in mine]
