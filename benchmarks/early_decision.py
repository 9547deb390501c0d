"""The counter-example: does T-PPO lose its advantage where an early token decides and a long rest follows?

    python -m benchmarks.early_decision [--seeds 32] [--out FILE.csv]

The real Trainer on a token MDP (`sim.lab.learning`): at token `at` the right choice leads to +1, the other to -1; every later token
ends the response with 5 %, the 64th must. 32 slots, windows of 8, about 256 tokens per update, whichever the method. Counted is
what it takes until the policy's exact return reaches 0.70 (it begins at 0): sampled tokens, and decode steps, which are time where
a step takes as long for few slots as for many. The exact return is known after each Trainer step; between the last two it is
taken to be linear (`tokens`, `decode_steps`), since a step of PPO-dual holds several times the tokens of a step of T-PPO, and
counting whole steps (`whole_tokens`, `whole_decode_steps`) charges it with most of a step that it no longer needed.

Results go to results/early_decision.csv, a row per run, appended when the run ends; the same command goes on where it was stopped.
Fixed steps, no seconds: a busy machine makes it later, not different. One thread. Float32, so that another processor may sample
other responses. Prints PPO-dual / T-PPO, above 1 where T-PPO needs less: the ratio of geometric means with Welch's 95 % interval
on logarithms. PPO-dual is PPO with T-PPO's critic update, so that only the windows differ.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats

from benchmarks.common import RESULTS, provenance, whole_rows
from sim.lab import instances
from sim.lab.learning import write_csv
from sim.lab.recorder import Record, Recorder
from sim.lab.setting import Setting, build

TARGET, LIMIT_TOKENS = 0.70, 16_000
LENGTH, P_END, WINDOW = 64, 0.05, 8
METHODS = ("ppo-dual", "tppo")
PATH = RESULTS / "early_decision.csv"


class World(NamedTuple):
    """What both methods face: the position that decides, the models, how the critic begins."""

    model: str
    critic: str
    at: int


WORLDS = (
    World("network", "zero", 0), World("network", "zero", 12), World("network", "warm", 0),
    World("network", "oracle", 0), World("network", "oracle", 12), World("tabular", "zero", 0),
)  # fmt: skip
QUANTITIES = ("tokens", "decode_steps", "whole_tokens", "whole_decode_steps")
NUMBERS = ("at", "seed", "target", "reached", *QUANTITIES, "steps", "mean_return", "no_signal_share")
Row = dict[str, Any]


def instance(at: int) -> instances.Instance:
    return instances.decision(length=LENGTH, at=at, p_end=P_END, name=f"decision at {at}")


def setting(world: World, method: str, seed: int) -> Setting:
    size = {f"{name}.mini_batch_tokens": 256 for name in ("policy", "value")}
    return Setting(method=method, window=WINDOW, seed=seed, model=world.model, critic=world.critic, overrides=size)  # type: ignore[arg-type]


def run(world: World, method: str, seed: int) -> Row:
    """Train until the target or the limit; the row of the run."""
    made, chosen = instance(world.at), setting(world, method, seed)
    trainer = build(made, chosen)
    recorder = Recorder(made.mdp, trainer)
    history: list[Record] = [recorder.record()]
    while history[-1].mean_return < TARGET and history[-1].tokens < LIMIT_TOKENS:
        history.append(recorder.record(trainer.step(), set_critic=chosen.oracle))
    (before, last), trained = history[-2:], sum(r.trained_tokens for r in history[1:])
    silent = sum(r.no_signal_share * r.trained_tokens for r in history[1:]) / trained
    return {
        **world._asdict(), "method": method, "seed": seed, "target": TARGET, "reached": int(last.mean_return >= TARGET),
        "tokens": round(at_target(before, last, "tokens"), 1), "decode_steps": round(at_target(before, last, "decode_steps"), 2),
        "whole_tokens": last.tokens, "whole_decode_steps": last.decode_steps, "steps": last.step,
        "mean_return": round(last.mean_return, 5),
        "no_signal_share": round(silent, 5),
    }  # fmt: skip


def at_target(before: Record, last: Record, name: str) -> float:
    """A count of the records where the return, a straight line between them, is TARGET; that of `last` where it is never there."""
    counts = getattr(before, name), getattr(last, name)
    if last.mean_return < TARGET:
        return float(counts[1])
    return float(np.interp(TARGET, (before.mean_return, last.mean_return), counts))


def read(path: Path) -> list[Row]:
    """Rows of whole runs."""
    return [{name: float(value) if name in NUMBERS else value for name, value in row.items()} for row in whole_rows(path)]


def key(row: Mapping[str, Any]) -> tuple[str, str, int, str, int]:
    return row["model"], row["critic"], int(row["at"]), row["method"], int(row["seed"])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of theirs / that of ours, and Welch's 95 % interval; the ends are NaN for fewer than two of either."""
    a, b = np.log(theirs), np.log(ours)
    middle = float(np.exp(a.mean() - b.mean()))
    if min(len(a), len(b)) < 2:
        return middle, math.nan, math.nan
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    return middle, float(np.exp(interval.low)), float(np.exp(interval.high))


def table(rows: Iterable[Mapping[str, Any]]) -> list[Row]:
    """A row per world and quantity: n seeds of each method, the ratio, its interval, the verdict.

    A world in which a run never reaches the target has no ratio: `reached` says how many did.
    """
    found, rows = [], list(rows)
    for world, quantity in itertools.product(WORLDS, QUANTITIES):
        of = {m: [r for r in rows if key(r)[:4] == (*world, m)] for m in METHODS}
        if not all(of.values()):
            continue
        low = high = middle = math.nan
        if all(r["reached"] for runs in of.values() for r in runs):
            middle, low, high = ratio(*([float(r[quantity]) for r in of[m]] for m in ("tppo", "ppo-dual")))
        verdict = "T-PPO" if low > 1 else "PPO" if high < 1 else "undecided"
        found.append({
            **world._asdict(), "quantity": quantity, "n": min(map(len, of.values())),
            "reached": int(sum(r["reached"] for runs in of.values() for r in runs)), "runs": sum(map(len, of.values())),
            "ratio": middle, "low": low, "high": high, "verdict": verdict,
        })  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a user's mistake, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=32, help="seeds 0 to this less 1; 0 only prints the table")
    parser.add_argument("--out", type=Path, default=PATH)
    arguments = parser.parse_args(argv)
    if arguments.seeds < 0:
        parser.error(f"--seeds: expected an integer of at least 0, got {arguments.seeds}")
    torch.set_num_threads(1)
    there = {key(row) for row in read(arguments.out)}
    try:
        for seed, world, method in itertools.product(range(arguments.seeds), WORLDS, METHODS):  # seeds outermost: always balanced
            if (*world, method, seed) not in there:
                write_csv(arguments.out, [run(world, method, seed) | provenance()], append=True)
    except KeyboardInterrupt:
        print(f"stopped; whole runs are in {arguments.out}, and the same command goes on with the others", file=sys.stderr)
        return 130
    print(f"PPO-dual / T-PPO until the return is {TARGET:g}; above 1: T-PPO needs less")
    for r in table(read(arguments.out)):
        where = f"{r['model']:<8} {r['critic']:<7} decision at {r['at']:<3} {r['quantity']:<18}"
        found = f"{r['ratio']:.2f} [{r['low']:.2f}, {r['high']:.2f}]  n = {r['n']}, {r['reached']} of {r['runs']} reached it"
        print(f"{where} {found}: {r['verdict']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
