"""What each lever of training once is worth: CPU seconds per token on a laptop, beside the clock's prediction and the price.

    python -m benchmarks.levers [--rounds 8] [--task chain]

One run per lever, T-PPO with its defaults and that lever, all in one process and stepped in turn, so that whatever else the machine
does touches all alike; seconds are this process's CPU seconds, one thread. The first rounds are not counted. A gain is T-PPO's
seconds per generated token over the lever's, round by round: geometric mean and 95 % Student-t interval of logarithms.

Keeps results/levers.csv, a row per lever, and writes docs/levers.md, whose other columns are of throughput_methods.csv (the cluster
clock: setup R1, over T-PPO as published), levers_vllm.csv, lever_learning.csv and fair-headline-choice.csv. `--rounds 0` only
writes the page.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import fair_headline, lever_learning
from benchmarks.common import RESULTS, report
from benchmarks.equal_tokens import SHARED, prepare, quiet, read_whole
from benchmarks.fair_headline import small_critic
from benchmarks.paired import geometric
from tppo_ref.runs.build import build
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.session import Session

PAGE = Path(__file__).parents[1] / "docs" / "levers.md"
CONSTANT, ENGINE, FILLED = {"policy.prefix": "constant"}, {"policy.old_logprobs": "engine"}, {"policy.min_new_tokens": 64}
SMALL = {"model.value": "small"}
LEVERS: dict[str, tuple[str, dict[str, Any]]] = {  # the clock's name -> what it is, the fields that switch it on
    "tppo": ("T-PPO, as published", {}),
    "tppo+a": ("a: prefix read without gradient", CONSTANT),
    "tppo+b": ("b: and its keys and values kept for the update", CONSTANT | {"policy.keep_prefix": True}),
    "tppo+c": ("c: the engine's log-probabilities", ENGINE),
    "tppo+f": ("f: a cut response trains once it has a window of untrained tokens", FILLED),
    "tppo/small": ("a critic of a quarter of the width, or of the parameters (clock)", SMALL),
    "tppo+ac": ("a and c", CONSTANT | ENGINE),
    "tppo-once/small": ("c and f, which is `tppo-once`, and the small critic", ENGINE | FILLED | SMALL),
}
PHASES = ("rollout", "forward", "policy", "value")
WARM_ROUNDS = 2
NOT = "not measured"


def measure(task: str, rounds: int, cache: str) -> list[dict[str, Any]]:
    """A row per lever."""
    shared = {"run.cache": cache, "run.clock": "cpu", **SHARED}
    fields = prepare(task, shared)[0]
    seconds: dict[str, list[dict[str, float]]] = {name: [] for name in LEVERS}
    with contextlib.ExitStack() as stack:
        out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        small = small_critic(task, Path(cache) / "small", cache)
        sessions = {}
        for name, (_, own) in LEVERS.items():
            own = {key: small if x == "small" else x for key, x in own.items()}
            config = replace_fields(Config(), {**fields, **own, "run.out": str(out / name.replace("/", "-"))})
            sessions[name] = stack.enter_context(contextlib.closing(Session(build(config))))
        for number in range(WARM_ROUNDS + rounds):
            for name, session in sessions.items():
                metrics = session.trainer.step()
                if number >= WARM_ROUNDS:
                    tokens = metrics["rollout/tokens"]
                    seconds[name].append({p: metrics[f"time/{p}_s"] / tokens for p in (*PHASES, "step")})
    base = np.array([row["step"] for row in seconds["tppo"]])
    return [
        {"lever": name, "task": task, "rounds": rounds, "us_per_token": round(1e6 * float(np.mean([r["step"] for r in rows])), 1)}
        | {f"{p}_us": round(1e6 * float(np.mean([r[p] for r in rows])), 1) for p in PHASES}
        | dict(zip(("gain", "low", "high"), (round(x, 4) for x in geometric(base / [r["step"] for r in rows])), strict=True))
        for name, rows in seconds.items()
    ]  # fmt: skip


def rows_of(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


PRICES = {"tppo+a": "constant-prefix", "tppo+c": "engine", "tppo+f": "filled", "tppo/small": "small-critic",
          "tppo-once/small": "once-small"}  # fmt: skip
"""Lever -> its name in lever_learning."""


def prices() -> dict[str, str]:
    """What levers cost in learning, at equal tokens: the area's difference, its interval, verdict and seeds."""
    runs = read_whole(lever_learning.PATH)[0]
    found = {lever: r for lever, name in PRICES.items() for r in lever_learning.table(runs, name)
             if (r["score"], r["task"]) == ("area", "all")}  # fmt: skip
    for r in rows_of("fair-headline-choice"):
        if (r["score"], r["task"], r["candidate"]) == ("tokens", "all", "ac"):
            found["tppo+ac"] = {k: float(r[k]) for k in ("difference", "low", "high")} | {"verdict": r["verdict"], "n": r["seeds"]}
    form = "{difference:+.3f} [{low:+.3f}, {high:+.3f}] of area, {verdict}, {n} seeds"
    return {"tppo": "0, the reference", "tppo+b": "it drops what a drops"} | {lever: form.format(**r) for lever, r in found.items()}


def page() -> str:
    """docs/levers.md, from the committed tables."""
    laptop, vllm = ({r["lever"]: r for r in rows_of(name)} for name in ("levers", "levers_vllm"))
    clock = {r["system"]: float(r["gain_same_critic"]) for r in rows_of("throughput_methods") if r["what"] == "R1"}
    own_best = {r["system"]: float(r["gain"]) for r in rows_of("throughput_methods") if r["what"] == "R1"}
    price = prices()
    lines = []
    for name, (what, _) in LEVERS.items():
        form = "1" if name == "tppo" else "{gain:.2f}x [{low:.2f}, {high:.2f}]"
        here, beside = (form.format(**{k: float(r[name][k]) for k in ("gain", "low", "high")}) for r in (laptop, vllm))
        there = f"{own_best[name] / own_best['tppo']:.2f}x" if name in clock else "not predicted"
        lines.append(f"| {what} | {here} | {beside} | {there} | {price.get(name, NOT)} |")
    row, other = laptop["tppo"], vllm["tppo"]
    return TEXT.format(
        table="\n".join(lines),
        headline=headline_lines(),
        task=row["task"],
        rounds=row["rounds"],
        date=row["date"],
        machine=row["machine"],
        vllm_rounds=other["rounds"],
        vllm_steps=other["steps"],
        vllm_date=other["date"],
    )


def headline_lines() -> str:
    """PPO at its best against tppo-once, a line per task."""
    lines = []
    for task in fair_headline.TASKS:
        rows = [fair_headline.found(task, name) for name in ("seconds", "generated_tokens", "trained_tokens", "area")]
        cells = [NOT] * 5
        if seconds := rows[0]:
            cells = [fair_headline.shown(row, form) for row, form in zip(rows, [".2f"] * 3 + ["+.3f"], strict=True) if row]
            cells.append("{verdict}: {once} and {ppo} of {seeds} seeds".format(**seconds))
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


TEXT = """# What each lever of training once is worth, and what it costs

Made by `python -m benchmarks.levers`; gains are over T-PPO as published.

| lever | laptop measured | vLLM measured | clock predicted | price in learning |
| --- | --- | --- | --- | --- |
| *command* | `python -m benchmarks.levers` | `python -m benchmarks.levers_vllm` | `python -m sim throughput` | see below |
{table}

- **Laptop**: CPU seconds of one thread per generated token, the {task} task with windows of 64, all levers stepped in turn in one
  process, {rounds} rounds ({machine}, {date}). Geometric mean and 95 % t-interval over rounds. Other work kept the
  machine busy: caches are shared, so intervals are wide.
- **vLLM**: CPU seconds of a rank of scale/configs/cpu-tiny.yaml, vLLM's CPU build in it, per generated token;
  {vllm_rounds} rounds of a process of {vllm_steps} steps each ({vllm_date}). The small critic has not learnt anything: its cost is
  measured, not its worth.
- **Clock**: 32B on 64 H800, DAPO's lengths half-way (setup R1 of [throughput.md](throughput.md)), tokens per second, each at its
  best.
- **Price**: the area under the learning curve at equal generated tokens, three tasks, paired by seed; equal means within 0.005:
  `python -m benchmarks.lever_learning` (plans: [a](../benchmarks/prestated/2026-11-21-constant-prefix.md),
  [the others](../benchmarks/prestated/2026-11-22-prices-of-levers.md);
  [what a drops](../benchmarks/results/dropped_gradient.png)). Of a and c: `python -m benchmarks.fair_headline --choose`, 128 slots
  and the small critic in both arms ([plan](../benchmarks/prestated/2026-11-21-fair-headline.md)).
- Where a cell says "not measured", nobody has. The laptop's shares are those of a model of 32 numbers' width, where prefixes are
  short beside fixed costs: gains on large models are not these.

## `tppo-once` against PPO at its best

| task | CPU seconds, PPO / `tppo-once` | generated tokens | trained tokens | area, `tppo-once` - PPO | verdict by seconds |
| --- | --- | --- | --- | --- | --- |
{headline}

To 95 % of PPO's best mean accuracy, each method tuned on each task with as many runs, the engine's log-probabilities and a small
critic open to both, PPO with its best batch and refilled within the step: `python -m benchmarks.fair_headline --task TASK`
([plan](../benchmarks/prestated/2026-11-21-fair-headline.md)). Above 1, and above 0 in area, `tppo-once` is ahead. Geometric means
with 95 % t-intervals, seed by seed, over the seeds in which both arrive; area is mean accuracy at equal CPU seconds, over all. The
verdict says how many seeds of `tppo-once` and of PPO arrive; where not all do, the ratio has no verdict.
What `tppo-once` is was chosen on the first three tasks ([plan](../benchmarks/prestated/2026-11-21-fair-headline.md)); the
last two came after it.
"""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--task", default="chain")
    parser.add_argument("--cache", default="runs/cache")
    arguments = parser.parse_args(argv)
    quiet()
    if arguments.rounds:
        report("levers", measure(arguments.task, arguments.rounds, arguments.cache))
    PAGE.write_text(page())
    print(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
