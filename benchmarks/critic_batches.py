"""Questions 6 and 7 with exact returns: does it matter which responses the critic is trained on, and on which targets?

    python -m benchmarks.critic_batches [--seeds 64] [--out FILE.csv]

Arms, worlds, score, contrasts, verdicts, stopping rule: prestated/2026-11-21-critic-batches.md, written before the first run.
A row per run goes to results/critic_batches.csv when the run ends; the same command goes on where it was stopped. Fixed steps, no
seconds: a busy machine makes it later, not different. One thread. Prints a row per contrast; `--seeds 0` prints what is there.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
import torch

from benchmarks.common import RESULTS, provenance, whole_rows
from benchmarks.paired import verdict
from sim.lab.instances import Instance, calm_chain, cliff, early_decision, thinking
from sim.lab.learning import learn, write_csv
from sim.lab.recorder import Record
from sim.lab.truth import optimum
from tppo_ref.runs.comparison import mean_interval

SLOTS, STEPS, MARGIN, PRIMARY = 32, 40, 0.005, 4
WORLDS: dict[str, Callable[[], Instance]] = {
    "thinking": lambda: thinking(length=24),
    "cliff": lambda: cliff(p_good=0.5),
    "calm-chain": lambda: calm_chain(length=24),
    "early-decision": early_decision,
}
ARMS: dict[str, dict[str, Any]] = {
    "all": {},
    "held": {"value.batch_responses": SLOTS},
    "joint": {"value.update": "joint"},
}
STARTS = ("zero", "warm")
QUESTIONS = {"held": 6, "joint": 7}
SCORES = ("area", "final", "setback", "critic_rms")
PATH = RESULTS / "critic_batches.csv"
Row = dict[str, Any]


def run(world: str, start: str, arm: str, seed: int) -> Row:
    """One learner; its scores, in shares of what there is to learn, and how much of it was cut."""
    made = WORLDS[world]()
    history = learn(
        made, method="tppo", window=made.mdp.max_tokens // 4, slots=SLOTS, steps=STEPS, seed=seed, model="network", critic=start,
        overrides=ARMS[arm],
    )  # fmt: skip
    scores = score([record.mean_return for record in history], optimum(made.mdp).mean_return)
    return {
        "world": world, "start": start, "arm": arm, "seed": seed, **{name: round(x, 6) for name, x in scores.items()},
        "critic_rms": round(mean(history[STEPS // 2 + 1 :], "critic_rms"), 6),
        "cut_share": round(mean(history[1:], "cut_share"), 4), "value_responses": round(mean(history[1:], "value_responses"), 3),
        "tokens": history[-1].tokens,
    }  # fmt: skip


def score(returns: Sequence[float], best: float) -> dict[str, float]:
    """Of exact returns after each step, the first before any: area, final, setback, as shares of best - first."""
    share = (np.array(returns) - returns[0]) / (best - returns[0])
    return {
        "area": float(share[1:].mean()),
        "final": float(share[-1]),
        "setback": float((np.maximum.accumulate(share) - share).max()),
    }


def mean(history: Sequence[Record], name: str) -> float:
    return float(np.mean([getattr(record, name) for record in history]))


def contrast(differences: Sequence[float], level: float = 0.95) -> Row:
    """Mean of paired differences, its Student-t interval, the verdict, and how many seeds would decide (0 where it is decided)."""
    middle, low, high = mean_interval(differences, level)
    word = "equal" if max(high, -low) <= MARGIN else verdict(low, high)
    enough, num = max(abs(middle), MARGIN - abs(middle)), len(differences)  # the half-width at which it would be decided
    needed = seeds_needed(float(np.std(differences, ddof=1)), enough, level) if word == "undecided" and num > 1 else 0
    return {"n": num, "difference": middle, "low": low, "high": high, "verdict": word, "seeds_needed": needed}


def seeds_needed(deviation: float, half_width: float, level: float) -> int:
    """The fewest seeds whose Student-t interval, at this deviation of differences, is no wider than that on either side. Since the
    next seeds' mean and deviation vary, so many decide in about every second repetition, and no more."""
    quantile = (1 + level) / 2
    num = max(2, math.ceil((scipy.stats.norm.ppf(quantile) * deviation / half_width) ** 2))  # t's quantile is above the normal one
    while scipy.stats.t.ppf(quantile, num - 1) * deviation / math.sqrt(num) > half_width:
        num += 1
    return num


def table(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row per question, critic's start, world ("all" is primary in area) and score: `arm` against T-PPO, paired by seed."""
    values = {(r["world"], r["start"], r["arm"], int(r["seed"])): r for r in rows}
    seeds = sorted({int(r["seed"]) for r in rows})
    seeds = [s for s in seeds if all((w, b, a, s) in values for w in WORLDS for b in STARTS for a in ARMS)]
    out = []
    for arm, start, world, name in itertools.product(QUESTIONS, STARTS, ("all", *WORLDS), SCORES) if seeds else ():
        worlds = WORLDS if world == "all" else [world]
        pairs = [[[float(values[w, start, a, s][name]) for w in worlds] for a in (arm, "all")] for s in seeds]
        primary = world == "all" and name == "area"
        level = 1 - 0.05 / PRIMARY if primary else 0.95
        found = contrast([float(np.mean(ours) - np.mean(theirs)) for ours, theirs in pairs], level)
        if name in ("setback", "critic_rms"):  # the less of it the better
            found["verdict"] = {"better": "worse", "worse": "better"}.get(found["verdict"], found["verdict"])
        out.append({"question": QUESTIONS[arm], "arm": arm, "start": start, "world": world, "score": name, "primary": int(primary),
                    "mean": float(np.mean([theirs for _, theirs in pairs]))} | found)  # fmt: skip
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a user's mistake, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=64, help="seeds 0 to this less 1; 0 only prints the table")
    parser.add_argument("--out", type=Path, default=PATH)
    arguments = parser.parse_args(argv)
    if arguments.seeds < 0:
        parser.error(f"seeds: got {arguments.seeds}; expected an integer of at least 0")
    torch.set_num_threads(1)
    there = {(r["world"], r["start"], r["arm"], int(r["seed"])) for r in whole_rows(arguments.out)}
    jobs = [
        (w, b, a, s) for s, w, b, a in itertools.product(range(arguments.seeds), WORLDS, STARTS, ARMS) if (w, b, a, s) not in there
    ]
    begin_s = time.perf_counter()
    try:
        for done, job in enumerate(jobs):
            write_csv(arguments.out, [run(*job) | provenance()], append=True)
            if done == 9:
                print(f"{len(jobs)} runs, about {(time.perf_counter() - begin_s) / 10 * len(jobs) / 60:.0f} minutes", flush=True)
    except KeyboardInterrupt:
        print(f"stopped; whole runs are in {arguments.out}, and the same command goes on with the others", file=sys.stderr)
        return 130
    for r in table(whole_rows(arguments.out)):
        what = f"{'primary' if r['primary'] else '':<8} question {r['question']}: {r['arm']:<6} critic from {r['start']:<5}"
        interval = f"{r['difference']:+.4f} [{r['low']:+.4f}, {r['high']:+.4f}]  {r['verdict']}"
        more = f", {r['seeds_needed']} seeds would decide" if r["seeds_needed"] else ""
        print(f"{what} {r['world']:<15} {r['score']:<11} {r['mean']:.4f} {interval}{more}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
