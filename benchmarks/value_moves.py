"""How far does the value move from one token to the next? The base models of the built-in tasks, by Monte Carlo, without a critic.

    python -m benchmarks.value_moves [--prompts 12] [--samples 128]      measures; four minutes of CPU
    python -m benchmarks.value_moves --report                            only the tables of what is committed

T-PPO's rule at the cut takes V(s_{l-1}) for V(s_l). Here V is what it is: the mean score, +1 or -1, of `samples` continuations by
the policy. Of each task as many short problems as long ones (how often a task asks long ones is a matter of choice), one response
each. V is measured at the beginning and behind each drawn token to which the policy gave less than SURE; between such tokens
nothing is decided, and the move is the drawn token's.

    move            V behind the drawn token - V before it; its standard error is that of two means of `samples` scores
    moves           tokens whose move is more than LARGE either way, of 100 tokens
    late            the same of the tokens behind the first WINDOW, where the edges of a response's windows are
    +-              their standard error over responses, of which there are few: that of a ratio of sums
    size            root mean square of the moves over all tokens, less the variance that sampling adds
    cut tokens      response/cut_token_share of the base model under the default configuration, over STEPS windows, untrained

Writes results/value_moves.csv, a row per measured token and one per end, results/cut_tokens.csv, and docs/tasks.md's table.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import importlib
import math
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, report
from benchmarks.equal_tokens import quiet
from tppo_ref.rollout.engine import Decoded, Request, RolloutEngine, request_seed
from tppo_ref.rollout.torch_engine import TorchEngine
from tppo_ref.runs.build import base_model, build, make_engine, make_policy, make_task
from tppo_ref.runs.config import Config
from tppo_ref.runs.docs_pages import markdown_table
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.tasks.synthetic import Problem, SyntheticTask

TASKS = ("chain", "fork", "length", "maze", "brackets")
SURE, LARGE, SLOTS, SEED, STEPS = 0.95, 0.25, 128, 1, 24
WINDOW = Config().rollout.window
PAGE = Path(__file__).parents[1] / "docs" / "tasks.md"
BLOCK = re.compile(r"(<!-- begin moves -->\n).*?(<!-- end -->)", flags=re.DOTALL)
Row = dict[str, Any]


def decoded(engine: RolloutEngine, requests: Sequence[Request], slots: int) -> Iterator[Decoded]:
    """Their continuations, as they end; `slots` of them decode at a time."""
    waiting = list(reversed(requests))
    while waiting or engine.num_running:
        free = min(slots - engine.num_running, len(waiting))
        engine.submit([waiting.pop() for _ in range(free)])
        yield from engine.step()


class Base:
    """A task's base model: what it answers, and the value of what it has begun to answer."""

    def __init__(self, name: str, cache: str):
        config = replace_fields(Config(), {"task.name": name, "run.cache": cache, "run.progress": False})
        task = make_task(config)
        assert isinstance(task, SyntheticTask)
        module, _, function = task.verifier.partition(":")
        self.task, self.verify = task, getattr(importlib.import_module(module), function)
        self.engine: TorchEngine = make_engine(config, task, make_policy(config, task, base_model(config, task)), SLOTS)
        self.longest = config.rollout.max_response_tokens

    def request(self, number: int, prompt: Sequence[int], begun: Sequence[int], seed: tuple[int, int]) -> Request:
        return Request(response_id=number, token_ids=[*prompt, *begun], max_new_tokens=self.longest - len(begun),
                       seed=request_seed(SEED, *seed, len(begun)), num_response_tokens=len(begun))  # fmt: skip

    def responses(self, problems: Sequence[Problem]) -> list[Decoded]:
        """One to each problem."""
        requests = [self.request(i, self.task.prompt_ids(p), (), (i, 0)) for i, p in enumerate(problems)]
        return sorted(decoded(self.engine, requests, SLOTS), key=lambda d: d.response_id)

    def values(self, problem: Problem, begun: Sequence[Sequence[int]], samples: int) -> list[float]:
        """Of each beginning the mean score of its continuations; of a response that has ended, its score."""
        prompt, answer = self.task.prompt_ids(problem), self.task.answer(problem)
        ended = [bool(b) and (b[-1] == self.task.end_token_id or len(b) >= self.longest) for b in begun]
        requests = [
            self.request(i * samples + k, prompt, b, (i, k + 1))
            for i, b in enumerate(begun)
            if not ended[i]
            for k in range(samples)
        ]
        scores: list[list[float]] = [[self.verify(answer, b)] if e else [] for b, e in zip(begun, ended, strict=True)]
        for done in decoded(self.engine, requests, SLOTS):
            i = done.response_id // samples
            scores[i].append(self.verify(answer, [*begun[i], *done.token_ids]))
        return [float(np.mean(s)) for s in scores]


def moves_of(base: Base, number: int, problem: Problem, response: Decoded, samples: int) -> list[Row]:
    """A row per token that was in doubt: where it stands, its probability, and V before and behind it."""
    drawn = [i for i, logprob in enumerate(response.logprobs) if logprob < math.log(SURE)]
    values = base.values(problem, [response.token_ids[:n] for n in (0, *(i + 1 for i in drawn))], samples)
    rows = [{"position": i, "probability": round(math.exp(response.logprobs[i]), 3), "before": round(before, 4),
             "behind": round(behind, 4)} for i, before, behind in zip(drawn, values, values[1:], strict=False)]  # fmt: skip
    # The end, which moves nothing where it was sure to come, tells how long the response is.
    rows.append({"position": len(response.token_ids) - 1, "probability": 1.0, "before": values[-1], "behind": values[-1]})
    return [{"task": base.task.name, "response": number} | row for row in rows]


def measure(name: str, cache: str, prompts: int, samples: int) -> list[Row]:
    base = Base(name, cache)
    problems = [p for share in (0.0, 1.0) for p in base.task.problems("test", prompts // 2, SEED, share)]
    answers = base.responses(problems)
    return [row | {"samples": samples} for i, (p, a) in enumerate(zip(problems, answers, strict=True))
            for row in moves_of(base, i, p, a, samples)]  # fmt: skip


def cut_tokens(name: str, cache: str) -> Row:
    """Windows of the base model under the default configuration: how many of their tokens lie in rows that are cut."""
    from tppo_ref.runs.session import Session

    fields = {"task.name": name, "run.cache": cache, "run.progress": False, "run.timeline": False}
    base = base_model(replace_fields(Config(), fields), make_task(replace_fields(Config(), fields)))
    with tempfile.TemporaryDirectory() as out:
        config = replace_fields(Config(), fields | {"model.policy": base, "run.out": out})
        with contextlib.closing(Session(build(config))) as session:
            batcher, scorer = session.trainer.batcher, session.parts.scorer
            seen = [session.trainer.ledger.window_metrics(batcher.window(session.parts.engine, on_end=scorer.submit), batcher, 1.0)
                    for _ in range(STEPS)]  # fmt: skip
            right = [score > 0 for score, _ in scorer.collect().values()]
    tokens = sum(m["rollout/tokens"] for m in seen)
    share = sum(m["response/cut_token_share"] * m["rollout/tokens"] for m in seen) / tokens
    return {"task": name, "window": WINDOW, "tokens": int(tokens), "ended": len(right), "accuracy": round(float(np.mean(right)), 4),
            "cut_token_share": round(share, 4)}  # fmt: skip


def summary(rows: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    """Numbers of one task, see above."""
    mine = [r for r in rows if r["task"] == name]
    at, moved, samples = (np.array([float(f(r)) for r in mine]) for f in (
        lambda r: r["position"], lambda r: float(r["behind"]) - float(r["before"]), lambda r: r["samples"]))  # fmt: skip
    of, numbers = np.array([int(r["response"]) for r in mine]), sorted({int(r["response"]) for r in mine})
    ends = [float(at[of == number].max()) + 1 for number in numbers]
    noise = [sum(1 - float(r[v]) ** 2 for v in ("before", "behind")) for r in mine]  # of scores of +-1
    squares = np.where(moved == 0, 0.0, moved**2 - np.array(noise) / samples)
    large = np.abs(moved) > LARGE
    behind = [[max(0.0, end - first) for end in ends] for first in (0, WINDOW)]
    counts = [[float(large[(of == number) & (at >= first)].sum()) for number in numbers] for first in (0, WINDOW)]
    (moves, moves_se), (late, late_se) = (rate(c, n) for c, n in zip(counts, behind, strict=True))
    return {"responses": len(ends), "tokens": sum(ends), "moves": moves, "moves_se": moves_se, "num_moves": sum(counts[0]),
            "longer": sum(n > 0 for n in behind[1]), "late": late, "late_se": late_se, "num_late": sum(counts[1]),
            "doubtful": 100 * (len(mine) - len(ends)) / sum(ends),
            "size": math.sqrt(max(0.0, squares.sum()) / sum(ends))}  # fmt: skip


def rate(counts: Sequence[float], tokens: Sequence[float]) -> tuple[float, float]:
    """Of 100 tokens, over responses; and its standard error, theirs being independent: of sum(counts) / sum(tokens)."""
    found, num = sum(counts) / sum(tokens), len(tokens)
    left = sum((c - found * n) ** 2 for c, n in zip(counts, tokens, strict=True))
    return 100 * found, 100 * math.sqrt(left * num / (num - 1)) / sum(tokens)


@functools.cache
def table(name: str) -> tuple[dict[str, str], ...]:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return tuple(csv.DictReader(file))


def in_a_sentence(task: str) -> str:
    """The first sentence of a task's module, without its name."""
    doc = importlib.import_module(f"tppo_ref.tasks.{task}").__doc__ or ""
    return doc.splitlines()[0].partition(": ")[2].partition(".")[0]


def counted(found: Mapping[str, float], name: str) -> str:
    """A rate, its standard error, and in brackets how many it rests on: of none there is no error."""
    error = f" ± {found[f'{name}_se']:.1f}" if found[f"num_{name}"] else ""
    return f"{found[name]:.1f}{error} ({found[f'num_{name}']:.0f})"


def lines() -> str:
    """The table of docs/tasks.md: the first line of each task's module, and the committed numbers."""
    head = ("task", "in a sentence", "right, base model", "tokens in cut rows", "V moves, of 100 tokens", f"behind the {WINDOW}th",
            "size")  # fmt: skip
    rows, base = [], {row["task"]: row for row in table("cut_tokens")}
    for name in TASKS:
        own, found = base[name], summary(table("value_moves"), name)
        right, cut = f"{float(own['accuracy']):.2f}", f"{100 * float(own['cut_token_share']):.0f} %"
        rows.append([f"`{name}`", in_a_sentence(name), right, cut,
                     counted(found, "moves"), counted(found, "late"), f"{found['size']:.2f}"])  # fmt: skip
    return markdown_table(head, rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=12, help="of each task, half of them short")
    parser.add_argument("--samples", type=int, default=128, help="continuations for one value")
    parser.add_argument("--cache", default="runs/cache", help="folder of base models")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    arguments = parser.parse_args(argv)
    for field in ("prompts", "samples"):
        if getattr(arguments, field) < 2:
            parser.error(f"--{field}: got {getattr(arguments, field)}; expected an integer of at least 2")
    torch.set_num_threads(1)
    quiet()
    if not arguments.report:
        report("cut_tokens", [cut_tokens(name, arguments.cache) for name in TASKS])
        report("value_moves", [r for n in TASKS for r in measure(n, arguments.cache, arguments.prompts, arguments.samples)])
    PAGE.write_text(BLOCK.sub(lambda found: found[1] + lines() + found[2], PAGE.read_text()))
    print(lines(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
