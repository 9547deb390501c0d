"""What `python -m tppo_ref` can be asked to do on a laptop: one function per command, over parts that build.py makes."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import torch
import transformers

from tppo_ref.method.errors import UserError
from tppo_ref.runs.build import (
    TaskScorer,
    base_model,
    build,
    check_sources,
    make_evaluator,
    make_policy,
    make_sampler,
    make_task,
    make_value,
)
from tppo_ref.runs.checkpoint import complete_checkpoints
from tppo_ref.runs.config import Config
from tppo_ref.runs.evaluate import evaluate_policy
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.pretrain import pretrain_value as pretrain
from tppo_ref.runs.references import failing_rows, leave_out_bad_references
from tppo_ref.runs.run_folder import own_folder
from tppo_ref.runs.session import Session
from tppo_ref.runs.watch import forewarn
from tppo_ref.tasks.jsonl import JsonlTask


def settle_libraries(config: Config) -> None:
    """Torch with as many threads as wanted, and transformers without a bar for every file that it reads or writes."""
    torch.set_num_threads(config.run.threads)
    transformers.utils.logging.disable_progress_bar()


def train(config: Config) -> Path:
    """Run `config` to its end; returns the newest checkpoint."""
    settle_libraries(config)
    forewarn(config)  # before a base model is made
    with own_folder(config.run.out), closing(Session(build(config))) as session:
        session.train()
        return complete_checkpoints(session.parts.checkpointer.folder)[-1]


def evaluate(config: Config) -> dict[str, float]:
    """The eval/ metrics of model.policy on the task's test prompts; they and the answers go to run.out."""
    settle_libraries(config)
    task = make_task(config)
    check_sources(config, task)
    with own_folder(config.run.out) as out, closing(TaskScorer(task, config.task)) as scorer:
        policy = make_policy(config, task, base_model(config, task))
        return evaluate_policy(make_evaluator(config, task, policy, scorer), task, out)


def pretrain_value(config: Config) -> Path:
    """A value model that was fitted to responses of model.policy: run.out/value, a folder for --model.value."""
    settle_libraries(config)
    task = make_task(config)
    check_sources(config, task)
    with own_folder(config.run.out) as out, closing(TaskScorer(task, config.task)) as scorer:
        base = base_model(config, task)
        policy = make_policy(config, task, base)
        leave_out_bad_references(task, scorer.verifier, out, resume=False, progress=config.run.progress)
        return pretrain(
            config, make_sampler(config, task, policy, scorer, config.value.pretrain_responses), task.prompts("train"),
            make_value=lambda: make_value(config, task, config.model.value or base),
            save=lambda value, folder: value.save_pretrained(folder),
        )  # fmt: skip


def check_data(config: Config) -> int:
    """Verify each reference of task.path and task.eval_path against itself; prints those that fail, and how many. 1 if one does."""
    task_config = config.task
    if not (task_config.tokenizer or config.model.policy):  # only texts are looked at: no prompt is too long
        config = replace_fields(config, {"task.tokenizer": "bytes", "task.max_prompt_tokens": 2**31})
    task = make_task(replace_fields(config, {"task.name": "jsonl"}))
    assert isinstance(task, JsonlTask)
    with closing(TaskScorer(task, config.task)) as scorer:
        if not scorer.verifier.checks_references:
            raise UserError(f"task.verifier: got {scorer.verifier.verifier}, whose module has no wrap_reference; expected a "
                            f"function wrap_reference(answer) -> the response that states it; add one")  # fmt: skip
        prompts = [*task.prompts("train"), *task.prompts("test")]
        bad = failing_rows(task, scorer.verifier, prompts, config.run.progress)
    for row in bad:
        print(f"{row['where']}: {row['answer'][-80:]!r}: {row['why']}")
    print(f"{len(bad)} of {len(prompts)} references fail against themselves ({scorer.verifier.verifier})")
    return 1 if bad else 0
