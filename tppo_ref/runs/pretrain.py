"""The command `pretrain-value`: fit the value model to responses of the frozen policy before training.

Value pre-training (VC-PPO, arXiv 2503.01491; VAPO, arXiv 2504.05118) is its own cheap command: inside of the loop, every one of
its updates would wait for a window. Responses to a fifth of the prompts are held out, with all that have the same text (most of
them where prompts repeat), and say how much the fitted model explains.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from tppo_ref.loop.learner import Learner
from tppo_ref.loop.parallel import Parallel, SingleProcess, mean_and_variance
from tppo_ref.loop.rows import response_mask, terminal_rewards
from tppo_ref.loop.updates import explained_variance, update_value
from tppo_ref.loop.value_targets import ValueBatch
from tppo_ref.method.advantages import monte_carlo_returns
from tppo_ref.method.errors import UserError
from tppo_ref.method.records import Prompt, Response
from tppo_ref.rollout.batcher import SampleStream
from tppo_ref.rollout.models import ValueModel
from tppo_ref.rollout.packing import TokenBatch
from tppo_ref.runs.checkpoint import put_in_place
from tppo_ref.runs.comparison import write_csv
from tppo_ref.runs.config import Config
from tppo_ref.runs.evaluate import Sampler, naming_the_policy
from tppo_ref.runs.run_folder import writing

HELD_OUT = 0.2  # share of the responses that the quality report is made on
POSITIONS = (0, 8, 16, 32, 64, 128, 256, 1024, 4096, 16384)  # column ranges of that report, in tokens
PRETRAIN_SEED = 2**31 + 1  # its sampling is apart from every run's and from the evaluation's


def pretrain_value(
    config: Config,
    sampler: Sampler,
    prompts: Sequence[Prompt],
    *,
    make_value: Callable[[], ValueModel],
    save: Callable[[ValueModel, Path], None],
    parallel: Parallel | None = None,
    device: torch.device | str | None = None,
) -> Path:
    """Sample value.pretrain_responses, fit the value model, print and write how much it explains. All ranks take part.

    sampler      its engine holds the frozen policy's weights, its scorer scores as in training
    make_value   called once the responses are there
    save         writes a folder for --model.value; of several ranks one writes, and an error of its is every rank's
    Writes run.out/value, explained_variance.csv and responses.jsonl (of several ranks, each its own); returns the first, which is
    written under another name and renamed once all of them are whole. UserError where run.out cannot be written to.
    """
    parallel, folder = parallel or SingleProcess(), Path(config.run.out) / "value"
    if folder.exists():
        raise UserError(f"run.out: got {config.run.out}, which holds a value model already; expected a folder without one; choose "
                        f"another")  # fmt: skip
    with naming_the_policy():
        responses, held_out, failures = sample_responses(config, sampler, prompts)
    sampler.engine.sleep()
    name = "responses.jsonl" if parallel.world == 1 else f"responses-{parallel.rank:05d}.jsonl"
    if parallel.leads:
        with writing(folder.parent), (folder.parent / name).open("w") as file:
            file.writelines(json.dumps(response.state_dict()) + "\n" for response in responses)
    (all_failures,) = parallel.sum([failures])
    if all_failures and parallel.first:
        print(
            f"warning: {all_failures:.0f} verifications failed; these responses score {config.task.failure_score}", file=sys.stderr
        )
    value = make_value()
    fit_value(config, value, [r for r in responses if r.prompt.token_ids not in held_out], parallel, device)
    test = [r for r in responses if r.prompt.token_ids in held_out]
    report = explained_by_position(value, test, config.advantage.gamma, parallel, device)
    (num_test,) = parallel.sum([len(test)])
    beside = folder.with_name(".unfinished-value")
    with writing(folder.parent):
        if parallel.first:
            shutil.rmtree(beside, ignore_errors=True)  # what a kill left of an earlier one
        save(value, beside)
        if parallel.first:  # who writes it: where several ranks save, they have waited for this one
            write_csv(folder.parent / "explained_variance.csv", report)
            put_in_place(beside, folder)
    if parallel.first:
        tell_report(report, int(num_test))
    return folder


class Partition(NamedTuple):
    """What value.pretrain_responses are made of.

    prompts      the ones that are answered, `samples` responses to each
    held_out     token ids of the prompts whose responses nothing is fitted to
    num_fitted   responses that are left, of all ranks. Far fewer than value.pretrain_responses where prompts repeat: every response
                 to a held-out text is held out
    """

    prompts: list[Prompt]
    samples: int
    held_out: frozenset[tuple[int, ...]]
    num_fitted: int


def partition(config: Config, prompts: Sequence[Prompt]) -> Partition:
    """Which of `prompts` value pre-training answers, and which it holds out; nothing is sampled.

    The prompts are the first ones in a seeded order, rollout.samples_per_prompt responses to each, more where prompts are few. The
    same prompts are held out on every rank and on any number of ranks: those that are sampled first, but never all of them.
    UserError where there is only one text.
    """
    wanted = config.value.pretrain_responses
    samples = max(config.rollout.samples_per_prompt, -(-wanted // len(prompts)))
    order = np.random.default_rng(PRETRAIN_SEED).permutation(len(prompts))
    chosen = [prompts[int(i)] for i in order[: -(-wanted // samples)]]
    stream = SampleStream(chosen, samples_per_prompt=samples, seed=PRETRAIN_SEED)
    begins = range(0, wanted, samples)
    texts = [tuple(stream.prompt_of(sample)[0].token_ids) for sample in begins]
    held_out = list(dict.fromkeys(texts[: -(-max(1, round(HELD_OUT * wanted)) // samples)]))
    if set(held_out) >= set(texts):  # few texts, that repeat: the last one found is left to fit the model to
        held_out.pop()
    if not held_out:
        raise UserError(f"value.pretrain_responses: got {wanted}, which are responses to 1 prompt; expected at least 2 different "
                        f"ones, as some are held out; take more responses, or more prompts")  # fmt: skip
    apart = frozenset(held_out)
    num_fitted = sum(min(samples, wanted - begin) for begin, text in zip(begins, texts, strict=True) if text not in apart)
    return Partition(chosen, samples, apart, num_fitted)


def sample_responses(
    config: Config, sampler: Sampler, prompts: Sequence[Prompt]
) -> tuple[list[Response], frozenset[tuple[int, ...]], int]:
    """This rank's responses, the token ids of the held-out prompts, and this rank's failed verifications; see `partition`."""
    made = partition(config, prompts)
    sampled = sampler(made.prompts, samples_per_prompt=made.samples, seed=PRETRAIN_SEED)
    wanted = [r for r in sampled.responses if r.id < config.value.pretrain_responses]
    return wanted, made.held_out, sampled.num_failures


def fit_value(
    config: Config,
    value: ValueModel,
    responses: Sequence[Response],
    parallel: Parallel | None = None,
    device: torch.device | str | None = None,
) -> None:
    """value.pretrain_epochs passes over Monte Carlo returns, without a clip: there is no older value to stay near to.

    An update is as large as one of training: value.mini_batch_tokens, or where that is 0 value.mini_batches updates for every
    rollout.slots responses.

    device   where the value model computes; None: where its weights are (offloaded ones are elsewhere)
    """
    parallel = parallel or SingleProcess()
    (total,) = parallel.sum([len(responses)])
    mini_batches = config.value.mini_batches * max(1, round(total / config.rollout.slots))
    # Its warm-up counts training steps: here there are none.
    settings = dataclasses.replace(config.value, lr_warmup_steps=0, mini_batches=mini_batches)
    learner = Learner("value", value, settings, parallel)
    device = device or value.device
    mask_BT = response_mask([len(r) for r in responses], device)
    returns_BT = monte_carlo_returns(terminal_rewards(responses, device), mask_BT, gamma=config.advantage.gamma)
    batch = ValueBatch(responses, returns_BT, mask_BT, anchor_BT=None)
    fed = [r.num_fed for r in responses]
    epochs = range(config.value.pretrain_epochs)
    for epoch in tqdm(
        epochs, desc="value pre-training", unit="epoch", disable=not (config.run.progress and parallel.first), leave=False
    ):
        plan = learner.plan([len(r) for r in responses], fed, np.random.default_rng((PRETRAIN_SEED, epoch, parallel.rank)))
        update_value(learner, batch, [plan], step=epoch)


@torch.no_grad()
def explained_by_position(
    value: ValueModel,
    responses: Sequence[Response],
    gamma: float,
    parallel: Parallel | None = None,
    device: torch.device | str | None = None,
) -> list[dict[str, float]]:
    """Explained variance of the returns by token position, over all ranks' `responses`, to which the value model was not fitted."""
    parallel, device = parallel or SingleProcess(), device or value.device
    (most,) = parallel.max([len(responses)])
    (longest,) = parallel.max([max(map(len, responses), default=0)])
    targets, errors, columns = ([torch.empty(0, dtype=torch.float64)] for _ in range(3))
    for row in range(int(most)):  # one at a time: long responses should not be padded to the longest
        batch = responses[row : row + 1]
        value_BT, _ = value(TokenBatch.of(batch))  # on every rank: a sharded model's forward is a collective operation
        for response in batch:
            mask_BT = response_mask([len(response)], device)
            targets.append(monte_carlo_returns(terminal_rewards([response], device), mask_BT, gamma=gamma)[0].cpu())
            errors.append(targets[-1].double() - value_BT[0].cpu().double())
            columns.append(torch.arange(len(response)))
    target, error, column = (torch.cat(parts).double() for parts in (targets, errors, columns))
    report = []
    for begin, stop in [*itertools.pairwise(POSITIONS), (0, int(longest))]:
        inside = (column >= begin) & (column < stop)
        tokens, _, target_variance = mean_and_variance(target[inside], parallel)
        _, _, error_variance = mean_and_variance(error[inside], parallel)
        if tokens:
            report.append({"from_token": begin, "to_token": stop, "tokens": tokens,
                           "explained_variance": explained_variance(target_variance, error_variance)})  # fmt: skip
    return report


def tell_report(report: Sequence[dict[str, Any]], num_test: int) -> None:
    """Print how much the value model explains, and warn where a constant would do better."""
    print(f"{'tokens':>14} {'count':>8}  explained variance on {num_test} held-out responses")
    for row in report:
        print(f"{row['from_token']:>6}-{row['to_token']:<7} {row['tokens']:>8}  {row['explained_variance']:.3f}")
    if below := [row["from_token"] for row in report if row["explained_variance"] < 0]:
        print(f"warning: explained variance is below 0 from token {below[0]} on: worse than a constant; take more "
              f"value.pretrain_responses or value.pretrain_epochs before you train with it", file=sys.stderr)  # fmt: skip
