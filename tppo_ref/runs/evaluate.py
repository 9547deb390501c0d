"""Evaluation: sampled full-length answers on a fixed prompt set, the same for every method and outside of its clock."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from tppo_ref.loop.parallel import Parallel, SingleProcess
from tppo_ref.loop.trainer import Scorer
from tppo_ref.method.errors import NonFiniteError, refusal
from tppo_ref.method.records import End, Prompt, Response
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.batcher import Batcher, SampleStream, SuccessiveBatcher
from tppo_ref.rollout.decode_load import DecodeStep, ObservedEngine
from tppo_ref.rollout.engine import RolloutEngine
from tppo_ref.rollout.turns import Reply, transcript
from tppo_ref.runs.run_folder import write_json, writing
from tppo_ref.tasks import Task

EVALUATION_SEED = 2**31  # apart from every run.seed: the same draws for all methods, seeds and steps


class MakeBatcher(Protocol):
    """Makes a batcher that has issued nothing; on a cluster, one of this rank's engine that answers for this rank's share."""

    def __call__(self, schedule: SlotSchedule, prompts: Sequence[Prompt], *, samples_per_prompt: int, seed: int,
                 limit: int | None = None) -> Batcher: ...  # fmt: skip


def make_batcher(
    schedule: SlotSchedule, prompts: Sequence[Prompt], *, samples_per_prompt: int, seed: int, limit: int | None = None,
    reply: Reply | None = None, now: Callable[[], float] = time.perf_counter,
) -> SuccessiveBatcher:  # fmt: skip
    """`MakeBatcher` of one process: it draws every sample, up to `limit` of them.

    reply: the task's environment; now: the clock of its steps.
    """
    stream = SampleStream(prompts, samples_per_prompt=samples_per_prompt, seed=seed, limit=limit)
    return SuccessiveBatcher(schedule, stream, run_seed=seed, reply=reply, now=now)


class Sampled(NamedTuple):
    """Scored whole responses in the order of the samples, failed verifications, and the load of each decode step."""

    responses: list[Response]
    num_failures: int
    decode_steps: list[DecodeStep]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampler:
    """Whole, scored responses from the weights that an engine holds: for evaluation, and for pre-training the value model.

    slots   responses that decode at a time, in this rank's engine
    now     the clock of its decode steps
    """

    engine: RolloutEngine
    scorer: Scorer
    slots: int
    max_response_tokens: int
    make_batcher: MakeBatcher = make_batcher
    now: Callable[[], float] = time.perf_counter

    def __call__(self, prompts: Sequence[Prompt], *, samples_per_prompt: int, seed: int) -> Sampled:
        """`samples_per_prompt` responses to each prompt; of several ranks, each gets its share. Sample i answers one prompt only.

        It is one window, as long as the longest response needs.
        """
        total = len(prompts) * samples_per_prompt
        schedule = SlotSchedule(slots=min(self.slots, total), window=self.max_response_tokens * total,
                                max_response_tokens=self.max_response_tokens)  # fmt: skip
        batcher = self.make_batcher(schedule, prompts, samples_per_prompt=samples_per_prompt, seed=seed, limit=total)
        engine = ObservedEngine(self.engine, self.now)
        slices = batcher.window(engine, on_end=self.scorer.submit)
        scores = self.scorer.collect()
        responses = sorted((s.response for s in slices), key=lambda response: response.id)
        for response in responses:
            response.score, _ = scores[response.id]
        return Sampled(responses, sum(status != "ok" for _, status in scores.values()), engine.steps)


class Evaluation(NamedTuple):
    """The eval/ metrics, the answers of all ranks in the order of the samples, and this rank's decode steps."""

    metrics: dict[str, float]
    answers: list[Response]
    decode_steps: list[DecodeStep]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Answers to a fixed set of prompts, `samples_per_prompt` each, and what they say of the policy. All ranks take part.

    further_metrics   of the answers, beside `summary`
    """

    sampler: Sampler
    prompts: Sequence[Prompt]
    samples_per_prompt: int
    parallel: Parallel = dataclasses.field(default_factory=SingleProcess)
    further_metrics: Callable[[Sequence[Response]], dict[str, float]] = lambda answers: {}

    def __call__(self) -> Evaluation:
        begin_s = time.perf_counter()
        sampled = self.sampler(self.prompts, samples_per_prompt=self.samples_per_prompt, seed=EVALUATION_SEED)
        answers = everyones(sampled.responses, self.parallel)
        (failures,) = self.parallel.sum([sampled.num_failures])
        metrics = summary(answers, int(failures)) | self.further_metrics(answers)
        (time_s,) = self.parallel.max([time.perf_counter() - begin_s])
        return Evaluation(metrics | {"eval/time_s": time_s}, answers, sampled.decode_steps)


def everyones(answers: Sequence[Response], parallel: Parallel) -> list[Response]:
    """The answers of all ranks in the order of the samples, without log-probabilities, versions and stored values."""
    if parallel.world == 1:
        return list(answers)
    unread: dict[str, Any] = {"logprobs": [], "versions": [], "values": []}  # several times the bytes of what is
    gathered = parallel.gather_objects([answer.state_dict() | unread for answer in answers])
    return sorted((Response.from_state_dict(answer) for share in gathered for answer in share), key=lambda answer: answer.id)


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


@contextmanager
def naming_the_policy() -> Iterator[None]:
    """Around sampling outside of a run, which would say at which step: logits that are not finite as a NonFiniteError."""
    try:
        yield
    except FloatingPointError as error:
        raise NonFiniteError(refusal("model.policy", f"a model of which {error}", "finite logits", "give another")) from None


def write_answers(path: Path, answers: Sequence[Response], task: Task) -> None:
    """Prompts and answers as people read them, one JSON object a line."""
    with path.open("w") as file:
        for a in answers:
            row = {"prompt": task.describe(a.prompt.token_ids), "answer": a.prompt.answer, "response": task.describe(transcript(a)),
                   "end": a.end.name, "score": a.score, "tokens": len(a)}  # fmt: skip
            file.write(json.dumps(row) + "\n")


def evaluate_policy(evaluator: Evaluator, task: Task, out: Path) -> dict[str, float]:
    """The command `evaluate`: print the eval/ metrics, and write them and the answers to `out`. All ranks take part.

    UserError where a logit is not finite, or `out` cannot be written to.
    """
    with naming_the_policy():
        metrics, answers, _ = evaluator()
    if evaluator.parallel.first:
        with writing(out):
            write_answers(out / "answers.jsonl", answers, task)
            write_json(out / "evaluation.json", metrics)
        for name, number in metrics.items():
            print(f"{name:22} {number:.4g}")
        print(f"{len(answers)} answers: {out / 'answers.jsonl'}")
    return metrics
