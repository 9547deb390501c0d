"""P4 beside what happens: how far a trained critic's V moves over the cut, and over any one token, on the text tasks.

    python -m benchmarks.bound_in_practice [--tasks chain fork length] [--critics 1024] [--windows 16 64] [--seeds 3]

P1 (docs/theory.md) splits what EGAE leaves out of a cut row's advantage, n tokens before the cut, into

    A_t - B_t = (gamma lam)^{n-1} gap,      gap = gamma (V(s_l) - V(s_{l-1})) + gamma lam A_l,

and P4 bounds the first part by Lip, the largest |V(s') - V(s)| over one live step. T-PPO is trained with its defaults, from a
critic pre-trained on so many responses; in each step, under that step's critic, are noted

    step     V(s_l) - V(s_{l-1}) of the rows that the window's edge cuts: mean, mean size, 95th percentile of the size, largest
    lip      the largest |V(s_{t+1}) - V(s_t)| of all rows' live steps, and the mean size. P4's Lip is taken over all that the
             policy can write, so what is seen is at most that
    gap      of responses that have ended, at each edge that cut them (whole-row GAE after it): mean, and mean size. A token's
             bias at n = 1 lies, on average over tokens, between the two
    cut_share, cut_token_share    the metrics of these names, means over the steps

A row per run goes to results/bound_in_practice.csv when it ends; the same command goes on where it was stopped. One thread. Prints
a line per task, critic and window, means over seeds; `--seeds 0` prints what is there.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, provenance, whole_rows
from benchmarks.critic_batches import contrast
from benchmarks.equal_tokens import BUDGET, SHARED, TASKS, prepare, quiet
from sim.lab.learning import write_csv
from tppo_ref.loop.forward import Forward
from tppo_ref.loop.rows import Rows
from tppo_ref.method.advantages import gae
from tppo_ref.runs.build import build
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.session import Session

PATH = RESULTS / "bound_in_practice.csv"
KEY = ("task", "critic", "window", "seed")
NUMBERS = ("step_mean", "step_size", "step_high", "step_largest", "live_size", "lip", "gap_mean", "gap_size", "cut_share",
           "cut_token_share")  # fmt: skip
Row = dict[str, Any]


class Notes:
    """The Trainer's observer: steps of V at cuts and elsewhere, and the gaps of P1, in units of the score."""

    def __init__(self, gamma: float, lam: float):
        self.gamma, self.lam = gamma, lam
        self.at_cuts: list[float] = []
        self.live: list[float] = []
        self.gaps: list[float] = []

    def __call__(self, rows: Rows, forward: Forward, *_: Any) -> None:
        for at, response in enumerate(rows.responses):
            value_t, cut = forward.values_BT[at, : len(response)].double(), bool(rows.cut_B[at])
            seen_t = torch.cat([value_t, forward.last_value_B[at, None].double()]) if cut else value_t
            steps = seen_t.diff().tolist()
            self.live += steps
            if cut:
                self.at_cuts.append(steps[-1])
            elif len(response.window_starts) > 1:
                self.gaps += self.gaps_of(value_t, response.score or 0.0, response.window_starts[1:])

    def gaps_of(self, value_t: torch.Tensor, score: float, cuts: Sequence[int]) -> list[float]:
        """At each cut l: gamma (V(s_l) - V(s_{l-1})) + gamma lam A_l, of a response that has ended with `score`."""
        reward_t = torch.zeros_like(value_t)
        reward_t[-1] = score
        mask_t = torch.ones_like(value_t, dtype=torch.bool)
        (advantage_t,) = gae(reward_t[None], value_t[None], mask_t[None], gamma=self.gamma, lam=self.lam)
        return [float(self.gamma * (value_t[l] - value_t[l - 1] + self.lam * advantage_t[l])) for l in cuts]

    def numbers(self) -> Row:
        """The row's columns; NaN where nothing was cut."""
        cuts, live, gaps = (np.array(x) for x in (self.at_cuts, self.live, self.gaps))
        found = {
            "step_mean": mean(cuts), "step_size": mean(abs(cuts)),
            "step_high": np.quantile(abs(cuts), 0.95) if len(cuts) else math.nan, "step_largest": max(abs(cuts), default=math.nan),
            "live_size": mean(abs(live)), "lip": max(abs(live), default=math.nan),
            "gap_mean": mean(gaps), "gap_size": mean(abs(gaps)),
        }  # fmt: skip
        return {"cuts": len(cuts), "edges": len(gaps)} | {name: round(float(x), 5) for name, x in found.items()}


def mean(x: np.ndarray) -> float:
    return float(x.mean()) if len(x) else math.nan


def run(fields: Mapping[str, Any], window: int, seed: int, budget: int) -> Row:
    """One training run's numbers, over all of its steps."""
    with tempfile.TemporaryDirectory() as out:
        config = replace_fields(Config(), {**fields, "rollout.window": window, "run.seed": seed, "run.out": out})
        with contextlib.closing(Session(build(config))) as session:
            trainer, shares = session.trainer, []
            trainer.observer = notes = Notes(config.advantage.gamma, config.advantage.lam)
            while trainer.batcher.num_generated_tokens < budget:
                metrics = trainer.step()
                shares.append([metrics[f"response/{name}"] for name in ("cut_share", "cut_token_share")])
    cut_share, cut_token_share = np.mean(shares, axis=0).round(5).tolist()
    return notes.numbers() | {"cut_share": cut_share, "cut_token_share": cut_token_share}


def table(rows: Sequence[Mapping[str, str]]) -> list[Row]:
    """Per task, critic and window, and "all" tasks: each number's mean over seeds with a 95 % t-interval, (middle, low, high).

    In "all" a seed counts once, as the mean over the tasks; seeds that some task lacks are left out.
    """
    cells = {tuple(r[k] for k in KEY): r for r in rows}
    seeds, tasks, out = sorted({key[3] for key in cells}), list(dict.fromkeys(key[0] for key in cells)), []
    for critic, window in dict.fromkeys(key[1:3] for key in cells):
        for task in (*tasks, "all"):
            needed = tasks if task == "all" else [task]
            groups = [[cells.get((t, critic, window, s)) for t in needed] for s in seeds]
            whole = [[r for r in group if r] for group in groups if all(group)]
            if not whole:
                continue
            row: Row = {"task": task, "critic": int(critic), "window": int(window), "seeds": len(whole)}
            for name in NUMBERS:
                found = contrast([float(np.mean([float(r[name]) for r in group])) for group in whole])
                row[name] = (found["difference"], found["low"], found["high"])
            out.append(row)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a user's mistake, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK")
    parser.add_argument("--critics", nargs="+", type=int, default=[1024], help="responses that a critic is pre-trained on")
    parser.add_argument("--windows", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to this less 1; 0 only prints")
    parser.add_argument("--budget", type=int, default=BUDGET, help="generated tokens of a run")
    parser.add_argument("--cache", default="runs/cache", help="folder of base models and pre-trained critics")
    parser.add_argument("--out", type=Path, default=PATH)
    arguments = parser.parse_args(argv)
    for name, least in (("seeds", 0), ("budget", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"{name}: got {getattr(arguments, name)}; expected an integer of at least {least}")
    torch.set_num_threads(1)
    quiet()
    path = arguments.out
    there = {tuple(r[k] for k in KEY) for r in whole_rows(path)}
    cells = itertools.product(arguments.critics, range(arguments.seeds), arguments.windows, arguments.tasks)
    jobs = [(t, c, w, s) for c, s, w, t in cells if (t, str(c), str(w), str(s)) not in there]
    prepared: dict[tuple[str, int], Any] = {}
    try:
        for done, (task, critic, window, seed) in enumerate(jobs):
            if (task, critic) not in prepared:
                shared = {"run.cache": arguments.cache, "run.eval_prompts": 32, "value.pretrain_responses": critic, **SHARED}
                prepared[task, critic] = prepare(task, shared)[0]
            row = dict(zip(KEY, (task, critic, window, seed), strict=True))
            row |= run(prepared[task, critic], window, seed, arguments.budget)
            write_csv(path, [row | provenance()], append=True)
            print(f"{done + 1} of {len(jobs)}: {task}, critic of {critic} responses, window {window}, seed {seed}", flush=True)
    except KeyboardInterrupt:
        print(f"stopped; whole runs are in {path}, and the same command goes on with the others", file=sys.stderr)
        return 130
    for r in table(whole_rows(path)):
        shown = "  ".join(f"{name} {r[name][0]:+.3f}" for name in NUMBERS)
        print(f"{r['task']:<7}critic {r['critic']:<5} window {r['window']:<3} {shown}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
