"""Two commands on a frozen policy: fit the value model to its responses before training, and evaluate it.

Value pre-training (VC-PPO, arXiv 2503.01491; VAPO, arXiv 2504.05118) is its own cheap command: inside of the loop, every one of its
updates would wait for a window.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tppo_ref.loop.learner import Learner
from tppo_ref.loop.parallel import Parallel, SingleProcess
from tppo_ref.loop.rows import response_mask, terminal_rewards
from tppo_ref.loop.updates import explained_variance, update_value
from tppo_ref.loop.value_targets import ValueBatch
from tppo_ref.method.advantages import monte_carlo_returns
from tppo_ref.method.errors import UserError
from tppo_ref.method.records import Response
from tppo_ref.rollout.models import ValueModel
from tppo_ref.rollout.packing import TokenBatch
from tppo_ref.runs.build import TaskScorer, base_model, make_engine, make_policy, make_task, make_value
from tppo_ref.runs.checkpoint import file_digest
from tppo_ref.runs.config import Config
from tppo_ref.runs.evaluate import sample_answers
from tppo_ref.runs.references import leave_out_bad_references
from tppo_ref.runs.validation import writable_folder
from tppo_ref.tasks import Task

HELD_OUT = 0.2  # share of the responses that the quality report is made on
POSITIONS = (0, 8, 16, 32, 64, 128, 256, 1024, 4096, 16384)  # column ranges of that report, in tokens
PRETRAIN_SEED = 2**31 + 1  # its sampling is apart from every run's and from the evaluation's


def pretrain_value(config: Config) -> Path:
    """Sample value.pretrain_responses, store them, fit the value model, print and write how much it explains.

    Writes run.out/value (a folder for --model.value), responses.jsonl and explained_variance.csv; returns the first.
    """
    out = writable_folder(config.run.out, "run.out")
    if (out / "value").exists():
        raise UserError(f"run.out: {out} holds a value model already; choose another folder")
    if config.value.pretrain_responses < 2:
        raise UserError(f"value.pretrain_responses: expected at least 2, some are held out, got {config.value.pretrain_responses}")
    task = make_task(config)
    base = base_model(config, task)
    responses = _sample(config, task, base)
    with (out / "responses.jsonl").open("w") as file:
        file.writelines(json.dumps(response.state_dict()) + "\n" for response in responses)
    value = make_value(config, task, config.model.value or base)
    num_test = max(1, round(HELD_OUT * len(responses)))
    fit_value(config, value, responses[num_test:])
    report = explained_by_position(value, responses[:num_test], config.advantage.gamma)
    with (out / "explained_variance.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["from_token", "to_token", "tokens", "explained_variance"])
        writer.writeheader()
        writer.writerows(report)
    print(f"{'tokens':>14} {'count':>8}  explained variance on {num_test} held-out responses")
    for row in report:
        print(f"{row['from_token']:>6}-{row['to_token']:<7} {row['tokens']:>8}  {row['explained_variance']:.3f}")
    value.save_pretrained(out / "value")
    print(f"value model: {out / 'value'}")
    return out / "value"


def _sample(config: Config, task: Task, base: str) -> list[Response]:
    """Whole responses of the frozen policy to the first training prompts in a seeded order, scored."""
    policy = make_policy(config, task, base)
    wanted = config.value.pretrain_responses
    slots = min(256, wanted)
    scorer = TaskScorer(task, config.task)
    try:
        leave_out_bad_references(task, scorer.verifier, Path(config.run.out), resume=False, progress=config.run.progress)
        prompts = task.prompts("train")
        order = np.random.default_rng(PRETRAIN_SEED).permutation(len(prompts))
        chosen = [prompts[int(i)] for i in order[:wanted]]
        responses, failures = sample_answers(
            make_engine(config, task, policy, slots), scorer, chosen, samples_per_prompt=-(-wanted // len(chosen)), slots=slots,
            max_response_tokens=config.rollout.max_response_tokens, seed=PRETRAIN_SEED,
        )  # fmt: skip
    finally:
        scorer.close()
    if failures:
        print(f"warning: {failures} verifications failed; these responses score {config.task.failure_score}", file=sys.stderr)
    return responses[:wanted]


def fit_value(
    config: Config,
    value: ValueModel,
    responses: Sequence[Response],
    parallel: Parallel | None = None,
    device: torch.device | str | None = None,
) -> None:
    """value.pretrain_epochs passes over Monte Carlo returns, without a clip: there is no older value to stay near to.

    An update reads as many responses as one of training: value.mini_batches of them for every rollout.slots responses.

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
    fed = [len(r.prompt.token_ids) + len(r) for r in responses]
    epochs = range(config.value.pretrain_epochs)
    for epoch in tqdm(
        epochs, desc="value pre-training", unit="epoch", disable=not config.run.progress or parallel.rank > 0, leave=False
    ):
        plan = learner.plan([len(r) for r in responses], fed, np.random.default_rng((PRETRAIN_SEED, epoch, parallel.rank)))
        update_value(learner, batch, [plan], step=epoch)


@torch.no_grad()
def explained_by_position(
    value: ValueModel, responses: Sequence[Response], gamma: float, device: torch.device | str | None = None
) -> list[dict[str, float]]:
    """Explained variance of the returns by token position, over `responses` that the value model was not fitted to."""
    targets, values, columns = [], [], []
    device = device or value.device
    for response in responses:  # one at a time: it is a report, and long responses should not be padded to the longest
        value_BT, _ = value(TokenBatch.of([response]))
        mask_BT = response_mask([len(response)], device)
        targets.append(monte_carlo_returns(terminal_rewards([response], device), mask_BT, gamma=gamma)[0].cpu())
        values.append(value_BT[0].cpu())
        columns.append(torch.arange(len(response)))
    target, estimate, column = (torch.cat(parts).double() for parts in (targets, values, columns))
    report = []
    for begin, stop in [*itertools.pairwise(POSITIONS), (0, int(column.max()) + 1)]:
        inside = (column >= begin) & (column < stop)
        if bool(inside.any()):
            r, e = target[inside], (target - estimate)[inside]
            variance = explained_variance(float(r.var(correction=0)), float(e.var(correction=0)))
            report.append({"from_token": begin, "to_token": stop, "tokens": len(r), "explained_variance": variance})
    return report


def cached_value(config: Config, task: Task) -> Path:
    """A pre-trained value model under run.cache, made where it is not there yet: one for all methods and seeds of a comparison.

    The folder's name holds a hash of what determines it, the base model's weights and the prompts included. Written beside and
    renamed: a folder that is there is complete.
    """
    all_fields = dataclasses.asdict(config)
    rollout = {name: field for name, field in all_fields["rollout"].items() if "tokens" in name or name == "temperature"}
    base = Path(config.model.policy or "")
    weights = [base] if base.is_file() else sorted(base.glob("*.safetensors"))
    determined_by = {
        "task": all_fields["task"], "model": all_fields["model"], "value": all_fields["value"], "rollout": rollout,
        "gamma": config.advantage.gamma, "seed": config.run.seed, "weights": [file_digest(path) for path in weights],
        "prompts": [dataclasses.astuple(prompt) for prompt in task.prompts("train")],
    }  # fmt: skip
    name = hashlib.sha256(json.dumps(determined_by, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(config.run.cache) / f"value-{name}"
    if not folder.exists():
        beside = Path(config.run.cache) / f".unfinished-value-{name}-{os.getpid()}"
        try:
            pretrain_value(dataclasses.replace(config, run=dataclasses.replace(config.run, out=str(beside))))
            os.rename(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder / "value"
