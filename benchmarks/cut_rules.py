"""An open bench for cut rules: what may stand for V(s_l), on exact gradients. Bring your own.

    python -m benchmarks.cut_rules                                   ours; writes results/cut_rules.csv
    python -m benchmarks.cut_rules --rules my_module:mine ...        yours beside ours; writes nothing without --out
    python -m benchmarks.cut_rules --text [--seeds N] [--jobs N]     ours, trained on text: `python -m benchmarks.studies cut-rules`
    python -m benchmarks.cut_rules --text --rules my_module:mine     yours and T-PPO's the same way; beside it what is known of ours

A rule is a function of `tppo_ref.loop.cut_rules.Cut`, importable from the working folder. It is put into EGAE on token MDPs that
are enumerated, so that nothing is sampled but the critic's errors: 40 random MDPs with windows of 4 tokens, and the six named ones
with windows of a quarter of their cap; responses begin anywhere in a window, lambda 0.95, no tail, equal tokens. Three critics:

    exact        V^pi
    noise:0.3    an independent normal error at every state: what P8 assumes (docs/theory.md)
    drift:0.3    an error that grows evenly with the depth: neighbours err alike, against what P8 assumes

Printed: the error of the expected gradient, as a share of the true one: its median over the 40, after the best rescaling (which is
all that whitening leaves of it), in how many of the 40 it is smaller than T-PPO's (`previous`), and on each named MDP; root mean
square over draws of the noise, 4 on a random MDP, 16 on a named one. Two minutes alone. In the CSV a row per rule, critic and MDP.

With --text each rule trains tiny models on five tasks at equal generated tokens, windows of 16, 8 seeds; what is compared is the
area under the accuracy curve, seed by seed against `previous` on the same machine. The plan is
prestated/2026-11-22-cut-rules-on-text.md; your runs go to runs/cut-rules-on-text.csv, or --out: 80 of about 10 s of one core for a
rule, and what was stopped goes on. A rule whose file has changed is another rule.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import studies, study, workers
from benchmarks.common import RESULTS, provenance
from benchmarks.equal_tokens import read_whole
from benchmarks.study import Study
from sim.lab import instances
from sim.lab.critics import critic
from sim.lab.estimators import Estimator
from sim.lab.gradients import gradient_errors
from sim.lab.rollouts import Rollouts
from tppo_ref.loop.cut_rules import CUT_RULES, CutRule
from tppo_ref.runs.checkpoint import file_digest
from tppo_ref.runs.own_rule import file_of_rule, load_rule

NUM_RANDOM, RANDOM_DRAWS, NAMED_DRAWS, WINDOW = 40, 4, 16, 4
NAMED = tuple(name for name in instances.INSTANCES if name != "random")
CRITICS = ("exact", "noise:0.3", "drift:0.3")
PATH = RESULTS / "cut_rules.csv"
Row = dict[str, Any]


@functools.cache
def world(name: str) -> Rollouts:
    """`random-7`: of seed 7, as in docs/findings.md; else a named instance."""
    if name.startswith("random-"):
        seed = int(name.removeprefix("random-"))
        made = instances.load("random", seed=seed, num_states=4, num_tokens=2, max_tokens=8, every_token=False)
    else:
        made = instances.load(name)
    return Rollouts(made.mdp, made.policy_NA)


def measure(name: str, rule: CutRule, where: str, spec: str) -> Row:
    """One rule on one MDP with one critic: root mean square over draws of the critic of its gradient errors."""
    rollouts, random = world(where), where.startswith("random-")
    window = WINDOW if random else max(1, rollouts.mdp.max_tokens // 4)
    first, draws = (int(where.removeprefix("random-")), RANDOM_DRAWS) if random else (0, NAMED_DRAWS)
    seeds = [first + NUM_RANDOM * draw for draw in range(draws if spec.startswith("noise") else 1)]
    squares = []
    for seed in seeds:
        value_N = critic(spec, rollouts.mdp, rollouts.solution, seed=seed)
        error = gradient_errors(rollouts, value_N, Estimator(cut_value=rule), [window], average_offsets=True)[window]
        squares.append([getattr(error, what) ** 2 for what in ("relative", "rescaled", "cut")])
    relative, rescaled, cut = np.sqrt(np.mean(squares, axis=0))
    return {"rule": name, "critic": spec, "mdp": where, "window": window, "relative": round(float(relative), 7),
            "rescaled": round(float(rescaled), 7), "cut": round(float(cut), 7)}  # fmt: skip


def measured(rules: Mapping[str, CutRule]) -> list[Row]:
    """A row per critic, rule and MDP."""
    worlds = [*(f"random-{seed}" for seed in range(NUM_RANDOM)), *NAMED]
    return [measure(name, rule, where, spec) for spec, (name, rule), where in itertools.product(CRITICS, rules.items(), worlds)]


def table(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """A row per critic and rule. wins, wins_rescaled: random MDPs on which the rule's error is smaller than that of `previous`."""
    error = {(r["critic"], r["rule"], r["mdp"], what): float(r[what]) for r in rows for what in ("relative", "rescaled")}
    random = [f"random-{seed}" for seed in range(NUM_RANDOM)]
    out = []
    for spec, name in dict.fromkeys((r["critic"], r["rule"]) for r in rows):
        line: Row = {"critic": spec, "rule": name}
        for what, suffix in (("relative", ""), ("rescaled", "_rescaled")):
            ours, theirs = (np.array([error[spec, rule, mdp, what] for mdp in random]) for rule in (name, "previous"))
            line[f"median{suffix}"], line[f"wins{suffix}"] = float(np.median(ours)), int((ours < theirs * (1 - 1e-6)).sum())
        out.append(line | {mdp: error[spec, name, mdp, "relative"] for mdp in NAMED})
    return out


def text(lines: Sequence[Row]) -> str:
    """The table for people, a block per critic."""
    head = f"{'rule':24} {'random':>8} {'wins':>5} {'rescaled':>9} {'wins':>5}  " + " ".join(f"{mdp:>14}" for mdp in NAMED)
    out = []
    for spec, block in itertools.groupby(lines, key=lambda line: line["critic"]):
        out += [f"critic {spec}: error of the expected gradient, share of the true one", head]
        out += [f"{r['rule']:24} {r['median']:>8.4f} {r['wins']:>5} {r['median_rescaled']:>9.4f} {r['wins_rescaled']:>5}  "
                + " ".join(f"{r[mdp]:>14.4f}" for mdp in NAMED) for r in block]  # fmt: skip
        out.append("")
    return "\n".join(out)


# ----------------------------------------------------------------------------------------------------------------------- text


def text_study(rules: Sequence[str]) -> Study:
    """Rules of one's own against T-PPO's, as the stated study of ours has it; each named with a digest of its source file."""
    named = {f"{name}@{digest(name)}": name for name in rules}
    return studies.RULES._replace(
        arms={"previous": studies.cut_rule("previous")} | {own: studies.cut_rule(name) for own, name in named.items()},
        models={own: studies.RULES.models["previous"] for own in ("previous", *named)},
        contrasts=studies.against_previous(list(named)), path=Path("runs") / studies.RULES.path.name,
    )  # fmt: skip


def digest(name: str) -> str:
    """Of the file of a rule's module. ValueError where it has none: nobody could say whether its runs are of the same rule."""
    file = file_of_rule(name)
    if file is None:
        raise ValueError(f"rule: got {name!r}, of a module without a file; expected module:function of one with source")
    return file_digest(file)[:8]


def on_text(arguments: argparse.Namespace) -> int:
    """Exit codes as workers.command says."""
    if not arguments.rules:
        return study.command(studies.RULES, arguments)
    for row in study.table(studies.RULES, read_whole(studies.RULES.path)[0]):
        print(f"{row['contrast']:<39} {study.told(studies.RULES, row)}")  # known; made elsewhere
    return study.command(text_study(arguments.rules), arguments)


# -------------------------------------------------------------------------------------------------------------------- command


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a user's mistake; with --text those of workers.command."""
    parser = study.options(__doc__)
    parser.add_argument("--rules", nargs="+", default=(), metavar="MODULE:FUNCTION", help="rules of your own")
    parser.add_argument("--text", action="store_true", help="train on text; --seeds, --jobs, --budget and --cache are of this")
    arguments = workers.parsed(parser, argv)
    torch.set_num_threads(1)
    path = arguments.out or (None if arguments.rules else PATH)
    if path and not path.parent.is_dir():
        parser.error(f"--out: got {path}; expected a file in a folder that is there")
    try:
        rules = CUT_RULES | {name: load_rule(name) for name in arguments.rules}
        if arguments.text:
            return on_text(arguments)
        rows = measured(rules)
    except ValueError as error:
        parser.error(str(error))
    print(text(table(rows)))
    if path:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], *provenance()])
            writer.writeheader()
            writer.writerows(row | provenance() for row in rows)
        print(f"-> {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
