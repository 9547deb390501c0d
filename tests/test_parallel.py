"""Two ranks give the update of one: the Trainer's parts under a `Parallel` that really talks, two threads over the same rows."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_policy, make_value

from tppo_ref.loop.estimates import estimate_advantages
from tppo_ref.loop.forward import forward
from tppo_ref.loop.learner import Learner
from tppo_ref.loop.parallel import SingleProcess
from tppo_ref.loop.rows import Rows, response_mask
from tppo_ref.loop.settings import AdvantageConfig, PolicyConfig, RolloutConfig, ValueConfig
from tppo_ref.loop.updates import update_policy, update_value
from tppo_ref.loop.value_targets import ValueBatch
from tppo_ref.method.errors import NonFiniteError
from tppo_ref.method.records import End, Prompt, Response, WindowSlice
from tppo_ref.rollout.packing import TokenBatch

MODELS = (make_policy(), make_value())  # made here: loading draws from torch's global generator, which threads would share


def make_policy_and_value() -> tuple[torch.nn.Module, torch.nn.Module]:
    return copy.deepcopy(MODELS[0]), copy.deepcopy(MODELS[1])


def make_rows() -> tuple[list[Response], list[int]]:
    """Six responses of unequal lengths, three of them still running, and where this step's window begins in each."""
    rng = np.random.default_rng(5)
    responses, begins = [], []
    for i, (length, begin, end) in enumerate(
        [
            (4, 0, End.END_TOKEN),
            (11, 6, End.END_TOKEN),
            (6, 0, End.RUNNING),
            (12, 6, End.RUNNING),
            (3, 0, End.LENGTH_CAP),
            (9, 6, End.RUNNING),
        ]
    ):
        responses.append(
            Response(
                id=i, prompt=Prompt(id=i, token_ids=(1 + i, 2, 3), answer=""), sample_index=0,
                token_ids=rng.integers(1, 20, length).tolist(), logprobs=(-rng.random(length) * 3).tolist(), versions=[0] * length,
                end=end, score=None if end is End.RUNNING else (1.0 if i % 2 else -1.0), num_settled=begin,
            )
        )  # fmt: skip
        begins.append(begin)
    return responses, begins


def watched_gradients(learner: Learner) -> list[torch.Tensor]:
    """A list that the next update fills with the gradients that it steps on, clip included. Not the weights: Adam's first step is
    the sign, which rounding turns where a gradient is 0."""
    found: list[torch.Tensor] = []

    def keep(optimiser: Any, *arguments: Any) -> None:
        found[:] = [p.grad.clone() for p in learner.module.parameters() if p.grad is not None]

    learner.optimiser.register_step_pre_hook(keep)
    return found


class Exchange:
    """Rank r of `world` threads puts a thing in and gets everybody's things out."""

    def __init__(self, world: int):
        self.barrier, self.things = threading.Barrier(world, timeout=60), [None] * world

    def all(self, rank: int, thing: Any) -> list[Any]:
        self.barrier.wait()
        self.things[rank] = thing
        self.barrier.wait()
        return list(self.things)


class Threads:
    """`Parallel` over threads. Gradients are averaged over ranks, as sharded training does; loss_scale undoes that."""

    def __init__(self, rank: int, world: int, exchange: Exchange):
        self.rank, self.world, self.loss_scale, self.exchange = rank, world, float(world), exchange

    def sum(self, numbers: Iterable[float]) -> list[float]:
        return [sum(column) for column in zip(*self.exchange.all(self.rank, [float(n) for n in numbers]), strict=True)]

    def max(self, numbers: Iterable[float]) -> list[float]:
        return [max(column) for column in zip(*self.exchange.all(self.rank, [float(n) for n in numbers]), strict=True)]

    def gather_objects(self, thing: Any) -> list[Any]:
        return self.exchange.all(self.rank, thing)

    def grad_norm(self, module: torch.nn.Module, max_norm: float) -> float:
        mine = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in module.parameters()]
        everyones = self.exchange.all(self.rank, mine)
        for parameter, *grads in zip(module.parameters(), *everyones, strict=True):
            parameter.grad = torch.stack(grads).mean(0)
        return SingleProcess().grad_norm(module, max_norm)


def on_ranks(world: int, work: Callable[[Threads], Any]) -> list[Any]:
    """The results of `work` on each rank, run at the same time; a rank's exception is raised here."""
    exchange, results, errors = Exchange(world), [None] * world, []

    def run(rank: int) -> None:
        try:
            results[rank] = work(Threads(rank, world, exchange))
        except BaseException as error:
            errors.append(error)
            exchange.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results


ADVANTAGE = AdvantageConfig(tail="exclude", tail_tokens=2)
SHARES = {"even": [[0, 1, 2], [3, 4, 5]], "ragged": [[0], [1, 2, 3, 4, 5]], "a rank without rows": [[], [0, 1, 2, 3, 4, 5]]}


def policy_update(rows: list[int], parallel: Any) -> tuple[list[torch.Tensor], dict[str, float]]:
    policy, value = make_policy_and_value()
    responses, begins = make_rows()
    config = PolicyConfig(lr=1e-2, mini_batch_tokens=0, mini_batches=1, micro_batch_tokens=24, max_grad_norm=0.5)
    learner = Learner("policy", policy, config, parallel)
    step = Rows.of([WindowSlice(responses[i], begins[i], len(responses[i])) for i in rows], ADVANTAGE)
    fed = [len(r.prompt.token_ids) + len(r) for r in step.responses]
    plan = learner.plan(step.train_BT.sum(1).tolist(), fed, np.random.default_rng(0))
    before = forward(step, plan, config, policy=policy, value=value, parallel=parallel, key=(0, 1))
    advantages, _ = estimate_advantages(step, before, ADVANTAGE, RolloutConfig(window=6), parallel)
    gradients = watched_gradients(learner)
    metrics = update_policy(learner, step, before, advantages.scaled_BT, [plan], step=1)
    return gradients, metrics


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES.keys())
def test_the_policys_update_of_two_ranks_is_that_of_one(shares: list[list[int]]) -> None:
    expected, metrics = policy_update([0, 1, 2, 3, 4, 5], SingleProcess())
    assert sum(float(g.abs().sum()) for g in expected) > 0.1, "one rank changed nothing"
    for gradients, its_metrics in on_ranks(2, lambda parallel: policy_update(shares[parallel.rank], parallel)):
        for ours, theirs in zip(expected, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        for name in ("policy/loss", "policy/grad_norm", "policy/kl", "policy/lm_loss", "policy/clipped_share"):
            assert its_metrics[name] == pytest.approx(metrics[name], rel=1e-4, abs=1e-6), name


def value_update(rows: list[int], parallel: Any) -> tuple[list[torch.Tensor], dict[str, float]]:
    _, value = make_policy_and_value()
    responses = [make_rows()[0][i] for i in rows]
    learner = Learner("value", value, ValueConfig(lr=1e-2, mini_batch_tokens=0, mini_batches=1, micro_batch_tokens=24), parallel)
    mask_BT = response_mask([len(r) for r in responses])
    targets_BT = torch.where(mask_BT, 0.3, 0.0)
    plan = learner.plan([len(r) for r in responses], [len(r) + 3 for r in responses], np.random.default_rng(0))
    gradients = watched_gradients(learner)
    metrics = update_value(learner, ValueBatch(responses, targets_BT, mask_BT, None), [plan], step=1)
    return gradients, metrics


@pytest.mark.parametrize("shares", SHARES.values(), ids=SHARES.keys())
def test_the_value_models_update_of_two_ranks_is_that_of_one(shares: list[list[int]]) -> None:
    expected, metrics = value_update([0, 1, 2, 3, 4, 5], SingleProcess())
    assert sum(float(g.abs().sum()) for g in expected) > 0.1, "one rank changed nothing"
    for gradients, its_metrics in on_ranks(2, lambda parallel: value_update(shares[parallel.rank], parallel)):
        for ours, theirs in zip(expected, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert its_metrics["value/loss"] == pytest.approx(metrics["value/loss"], rel=1e-4)
        assert its_metrics["value/tokens"] == metrics["value/tokens"]


def test_mini_batches_of_tokens_are_as_many_as_all_ranks_tokens_ask_for() -> None:
    tokens = [[5, 5], [10, 10, 10]]

    def num_mini_batches(parallel: Threads) -> int:
        config = PolicyConfig(mini_batch_tokens=10)
        learner = Learner("policy", copy.deepcopy(MODELS[0]), config, parallel)
        return len(learner.plan(tokens[parallel.rank], tokens[parallel.rank], np.random.default_rng(parallel.rank)))

    assert on_ranks(2, num_mini_batches) == [4, 4]  # 40 tokens


def test_a_batch_without_rows_is_weightless_and_leaves_a_gradient_of_zero_on_every_parameter() -> None:
    policy, value = make_policy_and_value()
    (policy(TokenBatch([], [])).sum() + value(TokenBatch([], []))[0].sum()).backward()
    used = [p for module in (policy, value) for p in module.parameters()]
    grads = [p.grad for p in used if p.grad is not None]
    assert len(grads) == len(used)
    assert all(float(g.abs().max()) == 0 for g in grads)
    assert policy(TokenBatch([], [])).shape[0] == 0


def test_one_rank_with_a_number_that_is_not_finite_stops_both() -> None:
    def work(parallel: Threads) -> str:
        policy, _ = make_policy_and_value()
        learner = Learner("policy", copy.deepcopy(policy), PolicyConfig(), parallel)

        def loss(rows: list[int]) -> torch.Tensor:
            total = learner.module(TokenBatch([[1]], [[2]])).sum()
            return total * float("nan") if parallel.rank == 1 else total

        try:
            learner.update([[0]], loss, step=7)
        except Exception as error:
            return str(error)
        return "went on"

    messages = on_ranks(2, work)
    assert all("step 7" in message and ("not finite" in message or "nan" in message) for message in messages), messages


def test_a_gradient_that_is_not_finite_on_another_rank_alone_is_said_to_be_there() -> None:
    class AnothersNorm(SingleProcess):
        def grad_norm(self, module: torch.nn.Module, max_norm: float) -> float:
            return float("nan")

    learner = Learner("policy", copy.deepcopy(MODELS[0]), PolicyConfig(), AnothersNorm())
    with pytest.raises(NonFiniteError, match="gradient of a parameter on another rank is not finite"):
        learner.update([[0]], lambda rows: sum(p.sum() for p in learner.module.parameters()), step=1)
