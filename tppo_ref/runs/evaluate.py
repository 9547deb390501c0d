"""Evaluation: sampled full-length answers on a fixed prompt set, the same for every method and outside of its clock."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import numpy as np

from tppo_ref.loop.trainer import Scorer
from tppo_ref.method.records import End, Prompt, Response
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.batcher import SampleStream, SuccessiveBatcher
from tppo_ref.rollout.engine import RolloutEngine
from tppo_ref.runs.build import TaskScorer, base_model, make_engine, make_policy, make_task
from tppo_ref.runs.config import Config
from tppo_ref.runs.validation import writable_folder

EVALUATION_SEED = 2**31  # apart from every run.seed: the same draws for all methods, seeds and steps


def sample_answers(
    engine: RolloutEngine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    *,
    samples_per_prompt: int,
    slots: int,
    max_response_tokens: int,
    seed: int,
    rank: int = 0,
    world: int = 1,
    part: int = 0,
    parts: int = 1,
) -> tuple[list[Response], int]:
    """Whole responses to each prompt, scored, in the order of the samples, and how many verifications failed.

    It is one window, as long as the longest response needs. Engine `rank` of `world` draws its share of the samples, and of those
    the share `part` of `parts` comes back (SampleStream, SuccessiveBatcher).
    """
    total = len(prompts) * samples_per_prompt
    schedule = SlotSchedule(slots=min(slots, total), window=max_response_tokens * total, max_response_tokens=max_response_tokens)
    stream = SampleStream(prompts, samples_per_prompt=samples_per_prompt, seed=seed, limit=total, rank=rank, world=world)
    batcher = SuccessiveBatcher(schedule, stream, run_seed=seed, part=part, parts=parts)
    slices = batcher.window(engine, on_end=scorer.submit)
    scores = scorer.collect()
    responses = sorted((s.response for s in slices), key=lambda response: response.id)
    for response in responses:
        response.score, _ = scores[response.id]
    return responses, sum(status != "ok" for _, status in scores.values())


def evaluate(
    engine: RolloutEngine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    *,
    samples_per_prompt: int,
    slots: int,
    max_response_tokens: int,
) -> tuple[dict[str, float], list[Response]]:
    """The eval/ metrics, and the answers themselves."""
    begin = time.perf_counter()
    answers, failures = sample_answers(
        engine, scorer, prompts, samples_per_prompt=samples_per_prompt, slots=slots, max_response_tokens=max_response_tokens,
        seed=EVALUATION_SEED,
    )  # fmt: skip
    return summary(answers, failures) | {"eval/time_s": time.perf_counter() - begin}, answers


def summary(answers: Sequence[Response], failures: int) -> dict[str, float]:
    """The eval/ metrics of scored answers."""
    lengths = np.array([len(answer) for answer in answers])
    return {
        "eval/accuracy": float(np.mean([(answer.score or 0.0) > 0 for answer in answers])),
        "eval/length_mean": float(lengths.mean()),
        "eval/length_p99": float(np.percentile(lengths, 99)),
        "eval/capped_share": float(np.mean([answer.end is End.LENGTH_CAP for answer in answers])),
        "eval/verify_failures": failures,
    }


def evaluate_policy(config: Config) -> dict[str, float]:
    """Print the eval/ metrics of model.policy on the task's test prompts, and write the answers to run.out/answers.jsonl."""
    out = writable_folder(config.run.out, "run.out")
    task = make_task(config)
    policy = make_policy(config, task, base_model(config, task))
    prompts = task.prompts("test")[: config.run.eval_prompts]
    slots = min(256, len(prompts) * config.run.eval_samples)
    scorer = TaskScorer(task, config.task)
    try:
        metrics, answers = evaluate(
            make_engine(config, task, policy, slots), scorer, prompts, samples_per_prompt=config.run.eval_samples, slots=slots,
            max_response_tokens=config.rollout.max_response_tokens,
        )  # fmt: skip
    finally:
        scorer.close()
    with (out / "answers.jsonl").open("w") as file:
        for answer in answers:
            text = {"prompt": task.describe(answer.prompt.token_ids), "answer": answer.prompt.answer,
                    "response": task.describe(answer.token_ids), "end": answer.end.name, "score": answer.score}  # fmt: skip
            file.write(json.dumps(text) + "\n")
    (out / "evaluation.json").write_text(json.dumps(metrics, indent=1) + "\n")
    for name, number in metrics.items():
        print(f"{name:20} {number:.4g}")
    print(f"{len(answers)} answers: {out / 'answers.jsonl'}")
    return metrics
