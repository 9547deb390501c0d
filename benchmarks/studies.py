"""Further questions on text: a deciding token at every window's edge, and at few; several base models; ten times the tokens.

    python -m benchmarks.studies edge     # late-fork, whose ninth token decides, with edges before, right behind and after it
    python -m benchmarks.studies spread   # the same task and critic, edges spread as T-PPO spreads them
    python -m benchmarks.studies spread-again   # its first question with four times the seeds, all of them new
    python -m benchmarks.studies cut-rules   # seven rules at the cut on five tasks
    python -m benchmarks.studies bases    # T-PPO, its critic's own cut and PPO, from four base models and critics
    python -m benchmarks.studies long     # four methods at 307,200 tokens: about 6 CPU-hours
    python -m benchmarks.studies all      # these, and the two of benchmarks/factorial.py, one after the other

Each says how long it will take before it begins (`all`: how long they will all take), goes on where it was stopped, and with
`--seeds 0` only prints what is there.
Arms, contrasts, verdicts and stopping rules: prestated/2026-11-22-{deciding-position,spread-edges,spread-edges-again,
cut-rules-on-text,several-bases,long-runs}.md, each written before the study's first run; how such a study is made and told:
benchmarks/study.py.

Writes results/NAME.csv, NAME as in the plan's, a row per evaluation.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import factorial, study, workers
from benchmarks.ablations import ARMS
from benchmarks.common import RESULTS
from benchmarks.equal_tokens import BUDGET, Arm
from benchmarks.late_fork import LEAD, NAME
from benchmarks.study import Study, Weights
from tppo_ref.loop.cut_rules import CUT_RULES
from tppo_ref.runs.validation import CUT_VALUES

BEFORE, BEHIND, FURTHER = (len(LEAD) + shift for shift in (0, 1, 2))  # the window's edge, seen from the deciding token
ALIGNED: dict[str, Any] = {"advantage.tail_tokens": 0, "rollout.refill": "step", "rollout.samples_per_prompt": 1}
CRITIC = {"value.pretrain_responses": 4096, "value.pretrain_epochs": 8, "rollout.samples_per_prompt": 64}
"""64 to a prompt, for the critic alone: a fifth of the prompts is held out with all that have the same text, and with one response
to each of 4,096 prompts that would be nearly all of late-fork's few texts."""


def edge(window: int, method: str = "tppo") -> Arm:
    return Arm(method, {**ALIGNED, "rollout.window": window})


def spread(window: int, method: str = "tppo") -> Arm:
    return Arm(method, {**ALIGNED, "rollout.refill": "immediate", "rollout.window": window})


EDGE = Study(
    plan="2026-11-22-deciding-position.md", path=RESULTS / "deciding-position.csv", tasks=(NAME,), seeds=32, run_s=20.0,
    arms={"before": edge(BEFORE), "behind": edge(BEHIND), "further": edge(FURTHER),
          "behind-critic": edge(BEHIND, "tppo-critic-cut")},
    models=dict.fromkeys(("before", "behind", "further", "behind-critic"), CRITIC),
    contrasts={
        "right behind - a token further": {"behind": 1.0, "further": -1.0},
        "right behind - right before": {"behind": 1.0, "before": -1.0},
        "critic - previous, right behind": {"behind-critic": 1.0, "behind": -1.0},
    },
)  # fmt: skip
SPREAD = Study(
    plan="2026-11-22-spread-edges.md", path=RESULTS / "spread-edges.csv", tasks=(NAME,), seeds=32, run_s=20.0,
    arms={"spread-9": spread(9), "spread-9-critic": spread(9, "tppo-critic-cut"),
          "spread-64": spread(64), "spread-64-critic": spread(64, "tppo-critic-cut")},
    models=dict.fromkeys(("spread-9", "spread-9-critic", "spread-64", "spread-64-critic"), CRITIC),
    contrasts={
        "critic - previous, windows of 9": {"spread-9-critic": 1.0, "spread-9": -1.0},
        "critic - previous, windows of 64": {"spread-64-critic": 1.0, "spread-64": -1.0},
    },
)  # fmt: skip
AGAIN = SPREAD._replace(
    plan="2026-11-22-spread-edges-again.md", path=RESULTS / "spread-edges-again.csv", first_seed=32, seeds=128, run_s=10.0,
    arms={name: SPREAD.arms[name] for name in ("spread-9", "spread-9-critic")},
    contrasts={name: SPREAD.contrasts[name] for name in ("critic - previous, windows of 9",)},
)  # fmt: skip


def cut_rule(name: str) -> Arm:
    """T-PPO with a rule at the cut: one of `egae`'s own, one of ours, or module:function."""
    ours = name in CUT_RULES and name not in CUT_VALUES
    field = f"{CUT_RULES[name].__module__}:{CUT_RULES[name].__name__}" if ours else name
    return Arm("tppo", {"advantage.cut_value": field, "advantage.tail_tokens": 0, "rollout.window": 16})


def against_previous(rules: Sequence[str]) -> dict[str, Weights]:
    return {f"{name} - previous": {name: 1.0, "previous": -1.0} for name in rules}


RULES = Study(
    plan="2026-11-22-cut-rules-on-text.md", path=RESULTS / "cut-rules-on-text.csv", seeds=8, run_s=10.0,
    tasks=("chain", "fork", "length", "maze", "brackets"), arms={name: cut_rule(name) for name in CUT_RULES},
    models={name: {"value.pretrain_responses": 1024} for name in CUT_RULES},
    contrasts=against_previous(["mixture", *(name for name in CUT_RULES if name not in ("mixture", "previous"))]),
)  # fmt: skip
BASES = Study(
    plan="2026-11-22-several-bases.md",
    path=RESULTS / "several-bases.csv",
    tasks=("chain", "fork"),
    seeds=8,
    bases=(1, 2, 3, 4),
    arms={name: ARMS[name] for name in ("tppo", "ppo", "critic-cut")},
    contrasts={"ppo - tppo": {"ppo": 1.0, "tppo": -1.0}, "critic - previous": {"critic-cut": 1.0, "tppo": -1.0}},
)
LONG = Study(
    plan="2026-11-22-long-runs.md",
    path=RESULTS / "long-runs.csv",
    tasks=("chain", "fork"),
    seeds=24,
    budget=10 * BUDGET,
    run_s=120.0,
    score="final",
    arms={name: ARMS[name] for name in ("tppo", "ppo", "critic-cut", "cold-critic-warmup")},
    contrasts={
        "ppo - tppo": {"ppo": 1.0, "tppo": -1.0},
        "critic - previous": {"critic-cut": 1.0, "tppo": -1.0},
        "cold critic with warm-up - pre-trained": {"cold-critic-warmup": 1.0, "tppo": -1.0},
    },
)
STUDIES = {"edge": EDGE, "spread": SPREAD, "spread-again": AGAIN, "cut-rules": RULES, "bases": BASES, "long": LONG}
ALL = {"factorial": factorial.FACTORIAL, "new-tasks": factorial.NEW, **STUDIES}
"""All studies on text of which a plan was stated before their first run."""
EVERY = "all"
COMMANDS = {
    "factorial": "python -m benchmarks.factorial", "new-tasks": "python -m benchmarks.factorial --tasks maze brackets",
    **{name: f"python -m benchmarks.studies {name}" for name in STUDIES},
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes as workers.command says."""
    options = study.options(__doc__)
    options.add_argument("study", choices=[*ALL, EVERY], help=f"{EVERY}: each of them in turn; --out is then a folder")
    arguments = workers.parsed(options, argv)
    return study.commands(ALL, arguments) if arguments.study == EVERY else study.command(ALL[arguments.study], arguments)


if __name__ == "__main__":
    sys.exit(main())
