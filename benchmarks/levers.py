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
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import fair_headline, fair_told, lever_learning
from benchmarks.common import RESULTS, report
from benchmarks.critic_batches import MARGIN
from benchmarks.equal_tokens import BUDGET, SHARED, prepare, quiet, read_whole
from benchmarks.fair_headline import small_critic
from tppo_ref.runs.build import build
from tppo_ref.runs.comparison import geometric
from tppo_ref.runs.config import Config
from tppo_ref.runs.docs_pages import markdown_table
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
    "tppo/small": ("small critic: a quarter of the width (measured), of the parameters (predicted)", SMALL),
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
    """How levers change learning at equal tokens: the area's difference, its interval, verdict and seeds."""
    runs = read_whole(lever_learning.PATH)[0]
    found = {lever: r for lever, name in PRICES.items() for r in lever_learning.table(runs, name)
             if (r["score"], r["task"]) == ("area", "all")}  # fmt: skip
    for r in rows_of("fair-headline-choice"):
        if (r["score"], r["task"], r["candidate"]) == ("tokens", "all", "ac"):
            found["tppo+ac"] = {k: float(r[k]) for k in ("difference", "low", "high")} | {"verdict": r["verdict"], "n": r["seeds"]}
    form = "{difference:+.3f} [{low:+.3f}, {high:+.3f}], {verdict}, {n} seeds"
    told = {lever: form.format(**r) for lever, r in found.items()}
    told["tppo+ac"] += " of another study"
    return {"tppo": "0, the reference", "tppo+b": "not measured; it drops what a drops"} | told


def page() -> str:
    """docs/levers.md, from the committed tables."""
    laptop, vllm = ({r["lever"]: r for r in rows_of(name)} for name in ("levers", "levers_vllm"))
    clock = {r["system"]: float(r["gain_same_critic"]) for r in rows_of("throughput_methods") if r["what"] == "R1"}
    own_best = {r["system"]: float(r["gain"]) for r in rows_of("throughput_methods") if r["what"] == "R1"}
    price = prices()
    head = ("lever", "CPU thread, measured", "vLLM on a CPU, measured", "clock, predicted", "change in learning (+ is better)")
    commands = ("benchmarks.levers", "benchmarks.levers_vllm", "sim throughput", "benchmarks.lever_learning")
    lines = [["*command*", *(f"`python -m {command}`" for command in commands)]]
    for name, (what, _) in LEVERS.items():
        form = "1" if name == "tppo" else "{gain:.2f}x [{low:.2f}, {high:.2f}]"
        here, beside = (form.format(**{k: float(r[name][k]) for k in ("gain", "low", "high")}) for r in (laptop, vllm))
        there = f"{own_best[name] / own_best['tppo']:.2f}x" if name in clock else "not predicted"
        lines.append([what, here, beside, there, price.get(name, NOT)])
    row, other = laptop["tppo"], vllm["tppo"]
    return TEXT.format(
        table=markdown_table(head, lines),
        headline=headline_table(),
        apart=apart(laptop),
        vllm_apart=apart(vllm),
        minutes=cpu_minutes(),
        cost=generation(),
        corrected=corrected("once-small"),
        budget=BUDGET,
        margin=MARGIN,
        task=row["task"],
        rounds=row["rounds"],
        date=row["date"],
        machine=row["machine"],
        vllm_rounds=other["rounds"],
        vllm_steps=other["steps"],
        vllm_date=other["date"],
    )


def apart(rows: Mapping[str, Mapping[str, str]]) -> str:
    """The levers whose interval does not hold 1, in words."""
    names = [name.removeprefix("tppo+").removeprefix("tppo/").replace("tppo-once/small", "`tppo-once` with the small critic")
             for name, r in rows.items() if not float(r["low"]) <= 1 <= float(r["high"])]  # fmt: skip
    return f"of {' and of '.join(names)} alone" if names else "of none"


def cpu_minutes() -> str:
    """CPU seconds that the stored runs of lever_learning and fair_headline trained, in words."""
    runs = {tuple(r[k] for k in lever_learning.KEY): float(r["cpu_s"]) for r in read_whole(lever_learning.PATH)[0]}
    book = {tuple(r[k] for k in fair_headline.Job._fields): float(r["budget_s"]) for r in rows_of("fair-headline-runs")}
    tasks = [sum(s for key, s in book.items() if key[1] == task and key[0] != "choose") / 60 for task in fair_headline.TASKS]
    return (f"{sum(runs.values()) / 60:.0f} CPU minutes for the {len(runs)} runs of `lever_learning`, {min(tasks):.0f} to "
            f"{max(tasks):.0f} a task of `fair_headline`")  # fmt: skip


def generation() -> str:
    """Who needs fewer generated tokens, in words."""
    found = {task: row for task in fair_headline.TASKS if (row := fair_told.found(task, "generated_tokens"))}

    def named(tasks: Iterable[str]) -> str:
        return " and ".join(f"`{task}`" for task in tasks)

    fewer = [t for t, r in found.items() if r["high"] < 1]
    unsure = [t for t, r in found.items() if r["value"] < 1 <= r["high"]]
    more = [t for t, r in found.items() if r["low"] > 1]
    both = " and ".join(f"{found[t]['both']}" for t in more)
    known = f"PPO needed fewer of them on {named(fewer)}, `tppo-once` on {named(more)} ({both} seeds)"
    return f"{known}, and {named(unsure)} leave it open"


def corrected(lever: str) -> str:
    """The interval of a lever's price in area if its plan had corrected for the number of its contrasts, and its verdict."""
    num = len(PRICES) - 1  # of one plan; the constant prefix has its own
    rows = lever_learning.table(read_whole(lever_learning.PATH)[0], lever, level=1 - 0.05 / num)
    row = next(r for r in rows if (r["score"], r["task"]) == ("area", "all"))
    return f"{num} contrasts that would be [{row['low']:+.3f}, {row['high']:+.3f}], {row['verdict']}"


def headline_table() -> str:
    """PPO at its best against tppo-once, a line per task; who arrives stands before the ratios that rest on it."""
    quantities = ("CPU seconds", "the same over all seeds", "generated tokens", "trained tokens")
    ratios = [f"{what}, PPO / `tppo-once`" for what in quantities]
    head = ("task", "who arrives, of how many seeds", *ratios, "area, `tppo-once` - PPO", "verdict on seconds")
    return markdown_table(head, [[task, *(fair_told.told(task).values() or [NOT] * 7)] for task in fair_headline.TASKS])


TEXT = """# What each lever of training once is worth, and what it costs

Made by `python -m benchmarks.levers`; gains are over T-PPO as published, and above 1 the lever is faster.

{table}
- **CPU thread**: CPU seconds per generated token of one thread of an {machine}, a server's ({date}); the {task} task with
  windows of 64, all levers stepped in turn in one process, {rounds} rounds. Geometric mean and 95 % t-interval over rounds.
  Other work kept the machine busy: caches are shared, so intervals are wide. The interval leaves out 1, no gain,
  {apart}. Shares of time are those of a model of 32 numbers' width,
  where prefixes are short beside fixed costs: gains on large models are not these.
- **vLLM**: CPU seconds of a rank of scale/configs/cpu-tiny.yaml, vLLM's CPU build in it, per generated token;
  {vllm_rounds} rounds of a process of {vllm_steps} steps each ({vllm_date}). The interval leaves out 1 {vllm_apart}: this
  column tells no lever from no lever. The small critic has not learnt anything there: its cost is measured, not its worth.
- **Clock**: 32B on 64 H800, DAPO's lengths half-way (setup R1 of [throughput.md](throughput.md)), tokens per second, each at its
  best.
- **Small critic** is not one thing: measured, it is a layer of a quarter of the policy's width; the clock's has at most a quarter
  of the policy's parameters. The numbers of its row are not of the same model.
- **Change in learning**: of the *area*, which here is the mean accuracy over a run's first {budget:,} *generated tokens*, so that
  speed does not count; three tasks, paired by seed, 95 % t-interval. *Equal*: the whole interval lies within {margin} of 0.
  *Better*, *worse*: it lies above, below 0. *Undecided*: neither. Not corrected for the number of contrasts: the last row's
  *better* is the nearest to 0, and corrected for its plan's {corrected} (plans:
  [a](../benchmarks/prestated/2026-11-21-constant-prefix.md), [the others](../benchmarks/prestated/2026-11-22-prices-of-levers.md);
  [what a drops](../benchmarks/results/dropped_gradient.png)).
  That **c is equal** was to be expected: engine and trainer are one code here, and their log-probabilities differ by
  rounding at most. It says nothing of c where they differ, in vLLM or with an fp8 cache ([fp8.md](fp8.md)).
- **a and c** comes of another study, two seeds of `python -m benchmarks.fair_headline --choose`, 128 slots and the small critic in
  both arms, its area over the tokens that all candidates made ([plan](../benchmarks/prestated/2026-11-21-fair-headline.md)).
- **Durations**, training alone: {minutes};
  base models, critics and evaluations come on top. Runs that are stored are not made again:
  `python -m benchmarks.lever_learning --seeds 0` prints what is there, `python -m benchmarks.fair_headline --report --task TASK`
  writes its tables from it, `python -m benchmarks.levers --rounds 0` this page. The first two columns were not timed: dozens of
  steps a lever.

## `tppo-once` against PPO at its best

{headline}
To 95 % of PPO's best mean accuracy, each method tuned on each task with as many runs, the engine's log-probabilities and a small
critic open to both, PPO with its best batch and refilled within the step: `python -m benchmarks.fair_headline --task TASK`
([plan](../benchmarks/prestated/2026-11-21-fair-headline.md)). Above 1, and above 0 in area, `tppo-once` is ahead; below 1 in tokens
PPO needs fewer. Ratios are geometric means with 95 % t-intervals, seed by seed, over the seeds in which both arrive: where some do
not, they leave out the worst, and have no verdict. *Over all seeds*, one that misses is taken to arrive at the last moment that
counts: where only PPO misses some, the ratio is at least that, where only `tppo-once` does, at most. The *area* here is the mean
accuracy over equal *CPU seconds*, of all seeds. No interval is corrected for the number of tasks: with a correction for the three
of its plan, `fork`'s area would be undecided. And `fork` was looked at after two seeds, when a clock stopped it, before it went on
to its twelve (the plan's second amendment). What `tppo-once` is was chosen on the first three tasks
([plan](../benchmarks/prestated/2026-11-21-fair-headline.md)); the last two came after it.

**Which to use where generated tokens are what one pays for?** {cost},
over the seeds in which both arrive (both were tuned for seconds, not for tokens). Where they are the whole cost, these tasks speak
for PPO at its best rather than for `tppo-once`. What `tppo-once` saves is time per token, where slots would wait for the longest
response; on a cluster nobody has measured that, and [the clock](throughput.md) predicts less.
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
