"""One response of a real run, from its prompt to its gradient: docs/index.md tells it.

    python -m benchmarks.one_response [--window 16] [--tail 2] [--steps 12] [--seed 0]

T-PPO on the chain task with a pre-trained critic. After so many steps the first response is taken that its window's edge cuts once,
that ends by itself in the next window, whose verdict is right, and that is 16 to 28 tokens long: short enough to print.
results/one_response.csv gets a row per window and token. Everything is the Trainer's own, as its observer is shown it, but for:

    delta     recomputed: V(s_{t+1}) - V(s_t) (gamma is 1, rewards before the last token are 0); at the cut V(s_l) := V(s_{l-1})
    last_value    what the critic says after the last token that is there: V(s_l), which the paper's rule does not use
    push      -d loss / d log pi(token) at the update's begin, of the clipped surrogate, whose ratio is 1 there: advantage / trained
              tokens of its mini-batch. The LM loss on right responses is not in it
    after     the token's probability under the policy after the update
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from benchmarks.common import report
from benchmarks.equal_tokens import SHARED, prepare, quiet
from tppo_ref.loop.estimates import Advantages
from tppo_ref.loop.forward import Forward
from tppo_ref.loop.rows import Rows
from tppo_ref.loop.trainer import Trainer
from tppo_ref.loop.value_targets import ValueBatch
from tppo_ref.method.records import End
from tppo_ref.runs.build import build
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.session import Session

LENGTHS = (16, 28)  # tokens: what fits on a page
PATIENCE = 40  # steps that are looked at
Row = dict[str, Any]


class Notes:
    """The Trainer's observer: what each step knew of each of its responses."""

    def __init__(self, trainer: Trainer, names: Sequence[str]):
        self.trainer, self.names = trainer, names
        self.windows: dict[int, list[list[Row]]] = {}
        self.wanted: int | None = None

    def __call__(self, rows: Rows, before: Forward, advantages: Advantages, batch: ValueBatch) -> None:
        denominators = self._denominators(rows)
        with torch.no_grad():
            after_BT = self.trainer.policy_learner.module(rows.batch(range(len(rows.responses))))
        for at, response in enumerate(rows.responses):
            told = list(self._tokens(at, rows, before, advantages, batch, after_BT, denominators[at]))
            self.windows.setdefault(response.id, []).append(told)
            lengths_fit = LENGTHS[0] <= len(response) <= LENGTHS[1]
            right = response.end is End.END_TOKEN and (response.score or 0) > 0
            if lengths_fit and right and len(self.windows[response.id]) == 2 and self.wanted is None:
                self.wanted = response.id

    def _denominators(self, rows: Rows) -> list[float]:
        """Trained tokens of each row's mini-batch: the plan is drawn anew from the same key."""
        trainer = self.trainer
        (plan, *_) = trainer._plans(trainer.policy_learner, rows.responses, rows.train_BT)
        tokens = {row: float(rows.train_BT[[r for m in mini for r in m]].sum()) for mini in plan for m in mini for row in m}
        return [tokens.get(row, math.nan) for row in range(len(rows.responses))]

    def _tokens(
        self, at: int, rows: Rows, before: Forward, advantages: Advantages, batch: ValueBatch, after_BT: torch.Tensor, tokens: float
    ) -> Iterator[Row]:
        response = rows.responses[at]
        length, cut = len(response), bool(rows.cut_B[at])
        place = next((i for i, other in enumerate(batch.responses) if other is response), None)
        values = before.values_BT[at, :length].tolist()
        for t, token in enumerate(response.token_ids):
            reward = float(rows.rewards_BT[at, t])
            following = values[t + 1] if t + 1 < length else values[t] if cut else 0.0
            in_run, trained = bool(rows.run_BT[at, t]), bool(rows.train_BT[at, t])
            new = t >= int(rows.window_begin_B[at])
            yield {
                "step": self.trainer.num_steps, "response": response.id, "prompt": self._words(response.prompt.token_ids),
                "answer": response.prompt.answer, "end": response.end.name, "score": "" if cut else response.score,
                "token": t, "text": self.names[token], "new": int(new), "value": values[t],
                "last_value": float(before.last_value_B[at]), "reward": reward,
                "delta": reward + following - values[t] if in_run else "",
                "advantage": float(advantages.raw_BT[at, t]) if in_run else "",
                "policy_trains": int(trained), "scaled": float(advantages.scaled_BT[at, t]) if trained else "",
                "push": float(advantages.scaled_BT[at, t]) / tokens if trained else "",
                "before": math.exp(float(before.logprob_BT[at, t])) if in_run else "",
                "after": math.exp(float(after_BT[at, t])) if in_run else "",
                "value_trains": int(place is not None and bool(batch.mask_BT[place, t])),
                "target": float(batch.targets_BT[place, t]) if place is not None else "",
            }  # fmt: skip

    def _words(self, ids: Sequence[int]) -> str:
        return " ".join(self.names[token] for token in ids)


def run(window: int, tail: int, steps: int, seed: int, cache: str) -> list[Row]:
    fields, _ = prepare("chain", {"run.cache": cache, "run.eval_prompts": 32, **SHARED})
    with tempfile.TemporaryDirectory() as out:
        settings = {"rollout.window": window, "advantage.tail_tokens": tail, "run.seed": seed, "run.out": out}
        config = replace_fields(Config(), {**fields, **settings})
        with contextlib.closing(Session(build(config))) as session:
            trainer: Any = session.trainer
            for _ in range(steps):
                trainer.step()
            trainer.observer = notes = Notes(trainer, session.parts.task.tokens)
            for _ in range(PATIENCE):
                trainer.step()
                if notes.wanted is not None:
                    return [row for told in notes.windows[notes.wanted] for row in told]
    raise SystemExit(f"steps: got {steps}; expected a fitting response within {PATIENCE} more; try another --seed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--tail", type=int, default=2, help="tokens; the port's 8 would be half of this window")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", default="runs/cache")
    arguments = parser.parse_args()
    quiet()
    rows = run(arguments.window, arguments.tail, arguments.steps, arguments.seed, arguments.cache)
    settings = {name: getattr(arguments, name) for name in ("window", "tail", "steps", "seed")}
    shown = [{k: round(x, 5) if isinstance(x, float) else x for k, x in row.items()} for row in rows]
    report("one_response", [{**settings, **row} for row in shown])
    return 0


if __name__ == "__main__":
    sys.exit(main())
