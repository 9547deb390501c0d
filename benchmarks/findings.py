"""The numbers of docs/findings.md: exact ones computed here, measured ones read from the committed CSV, and put into the page.

    python -m benchmarks.findings [--check]      rewrites the numbers of docs/findings.md; --check only says which are stale

A number on the page stands before a comment that names its source, its key there, its column and its format:

    0.0481<!-- exact "calm-chain egae 8" relative .4f -->     the laboratory's: nothing is sampled
    -0.02 [-0.03, 0.01]<!-- text "all window-32 tppo area" difference .3f -->     a mean and its interval
    undecided<!-- text "all window-32 tppo area" verdict s -->     words come from the CSV, too

and a table between `<!-- begin NAME -->` and `<!-- end -->`. So new seeds change the page by one command, and a test
(tests/test_findings.py) fails where the page and its sources differ.

Sources: exact (benchmarks/exact_numbers.py); text and runs (ablations_summary.csv, ablations.csv); early (early_decision.csv);
headline (headline-*/summary.csv); fair (fair-headline-*.csv); bound (bound_in_practice.csv); study (the runs of a plan in
prestated/, as far as they are there: drop the CSV in and run this); critics (what those of the factorials
were fitted to, and know); throughput tables by their file's name. Text comparisons also get Holm's correction over the whole
summary.
"""

from __future__ import annotations

import argparse
import csv
import functools
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import (
    ablations,
    bound_in_practice,
    critic_batches,
    cut_rules,
    early_decision,
    fair_told,
    studies_told,
)
from benchmarks.common import RESULTS
from benchmarks.exact_numbers import exact
from benchmarks.paired import PAIRED
from tppo_ref.runs.comparison import geometric, holm
from tppo_ref.runs.docs_pages import markdown_table

PAGE = Path(__file__).parents[1] / "docs" / "findings.md"
VALUE = r"\([^()\n]*\)|[-+]?[\d.,]+ \[[^\]\n]*\]|\[[^\]\n]*\]|[-+]?\d[\d,]*(?:\.\d+)?|[A-Za-z][\w-]*|\?"
MARK = re.compile(rf'(?P<value>{VALUE})(?P<mark><!-- (?P<source>\w+) "(?P<key>[^"]+)" (?P<column>\w+) (?P<form>\S+) -->)')
BLOCK = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)

# -------------------------------------------------------------------------------------------------------------- committed numbers


@functools.cache
def table(name: str) -> tuple[dict[str, str], ...]:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return tuple(csv.DictReader(file))


@functools.cache
def text_rows() -> dict[str, dict[str, Any]]:
    """Rows of ablations_summary.csv by "task arm base metric", with `holm`: the verdict that is left after the correction."""
    rows = table("ablations_summary")
    return {
        f"{r['task']} {r['arm']} {r['base']} {r['metric']}": {**r, "holm": r["verdict"] if falls else "undecided"}
        for r, falls in zip(rows, holm(float(r["p"]) for r in rows), strict=True)
    }


def text(key: str, column: str) -> Any:
    """ "all window-32 tppo area": a row of the summary; "every": counts over all of them."""
    if key == "every":
        if column == "strawman":  # decided ones of the arm that waits for ten of its fifteen steps
            return sum(r["holm"] != "undecided" and r["arm"] == "cold-critic-warmup" for r in text_rows().values())
        if column == "plain":  # intervals without 0: "equal" may be said of one that holds it
            return sum(float(r["p"]) < 0.05 for r in text_rows().values())
        if column == "holm":
            return sum(r["holm"] != "undecided" for r in text_rows().values())
        return len(text_rows()) if column == "tests" else min(int(r["n"]) for r in text_rows().values())
    row = text_rows()[key]
    if column == "difference":
        return float(row["mean_difference"]), float(row["low"]), float(row["high"])
    return row[column] if column in ("verdict", "holm") else float(row[column])


def runs(key: str, column: str) -> float:
    """ "chain tppo": means over the whole runs of a task ("all": of every task) and an arm; of their last row, or of `first_*` the
    first after the start. trained_share: of the generated tokens."""
    if (key, column) == ("every", "cpu_hours"):
        return sum(float(r["cpu_s"]) for r in table("ablations") if r["final"] == "1") / 3600
    task, arm = key.split()
    first = column.startswith("first_")
    rows = [r for r in table("ablations") if r["arm"] == arm and task in (r["task"], "all")]
    rows = [r for r in rows if (r["mark"] == "1" if first else r["final"] == "1")]
    name = column.removeprefix("first_")
    if name == "trained_share":
        return float(np.mean([int(r["trained_tokens"]) / int(r["generated_tokens"]) for r in rows]))
    return float(np.mean([float(r[name]) for r in rows]))


def ratio(key: str, column: str) -> float:
    """ "all ppo tppo": of the first arm, per one of the second."""
    task, arm, base = key.split()
    return runs(f"{task} {arm}", column) / runs(f"{task} {base}", column)


def early(key: str, column: str) -> Any:
    """ "network zero 0 tokens": a row of early_decision's table; `difference` is the ratio with its interval."""
    if key == "every":
        return min(r["n"] for r in early_table()) if column == "n" else len(early_table())
    model, start, at, quantity = key.split()
    row = next(r for r in early_table() if (r["model"], r["critic"], str(r["at"]), r["quantity"]) == (model, start, at, quantity))
    return (row["ratio"], row["low"], row["high"]) if column == "ratio" else row[column]


@functools.cache
def early_table() -> tuple[dict[str, Any], ...]:
    return tuple(early_decision.table(early_decision.read(early_decision.PATH)))


@functools.cache
def cut_table() -> dict[str, dict[str, Any]]:
    return {f"{r['critic']} {r['rule']}": r for r in cut_rules.table(table("cut_rules"))}


def cuts(key: str, column: str) -> float:
    """ "noise:0.3 mixture": a row of the bench of cut rules; "noise:0.3 mixture cliff": `relative`, its error on a named MDP."""
    spec, rule, *named_mdp = key.split()
    return float(cut_table()[f"{spec} {rule}"][named_mdp[0] if named_mdp else column])


def headline(key: str, column: str) -> Any:
    """ "chain tppo speed-up": a ratio to PPO is the geometric mean over seeds with a 95 % t-interval on logarithms; all else is the
    summary's own statistic. "trained tokens to target": what the method needs for one token of PPO."""
    task, method, quantity = key.split(maxsplit=2)
    if quantity in PAIRED and column == "ratio":
        return geometric(PAIRED[quantity](table(f"headline-{task}/summary"), method))
    row = next(r for r in table(f"headline-{task}/summary")
               if (r["method"], r["quantity"]) == (method, quantity) and not r["statistic"].startswith("seed "))  # fmt: skip
    return (float(row["value"]), float(row["low"]), float(row["high"])) if column == "ratio" else float(row[column])


@functools.cache
def batch_table() -> tuple[dict[str, Any], ...]:
    return tuple(critic_batches.table(table("critic_batches")))


def batches(key: str, column: str) -> Any:
    """ "6 zero area": the contrast of a question with a critic that begins so, over all worlds, "6 zero area cliff": in one;
    `difference` with its interval."""
    question, start, name, world = [*key.split(), "all"][:4]
    row = next(
        r for r in batch_table() if (str(r["question"]), r["start"], r["world"], r["score"]) == (question, start, world, name)
    )
    return (row["difference"], row["low"], row["high"]) if column == "difference" else row[column]


def fair(key: str, column: str) -> Any:
    """ "chain seconds": PPO / tppo-once with its interval; `ppo`, `once`, `both` and `seeds`: how many seeds of either and of both
    arrive, of how many. "chain bound": the least or most that it is over all seeds, and its `side`."""
    task, quantity = key.split()
    row = fair_told.bound(task) if quantity == "bound" else fair_told.found(task, quantity)
    if row is None:
        raise KeyError(f"fair: {key}")
    return (row["value"], row["low"], row["high"]) if column == "ratio" else row[column]


@functools.cache
def bound_table() -> dict[str, dict[str, Any]]:
    return {f"{r['task']} {r['critic']} {r['window']}": r for r in bound_in_practice.table(table("bound_in_practice"))}


def bound(key: str, column: str) -> Any:
    """ "chain 1024 16 mean": a column of bound_in_practice for a task ("all": their mean), critic and window; without "mean" the
    interval over seeds, too. "every": the largest number of all runs."""
    if key == "every":
        return max(float(row[column]) for row in table("bound_in_practice"))
    *cell, mean = [*key.split(), ""][:4]
    found = bound_table()[" ".join(cell)][column]
    return found[0] if mean and column != "seeds" else found


def throughput(name: str, key: str, column: str) -> float:
    return float(next(r for r in table(f"throughput_{name}") if r["what"] == key)[column])


Sources, Blocks = dict[str, Callable[[str, str], Any]], dict[str, Callable[[], str]]
SOURCES: Sources = {
    "exact": exact, "text": text, "runs": runs, "ratio": ratio, "early": early, "headline": headline, "cuts": cuts,
    "batches": batches, "fair": fair, "bound": bound, "study": studies_told.study, "critics": studies_told.critics,
    **{name: functools.partial(throughput, name) for name in ("conditions", "slots", "lengths", "windows", "models", "tails")},
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------- the page


def written(value: Any, form: str) -> str:
    """A value as the page prints it: `.2f` and the like, `%` for a share in per cent, `s` as it is; pairs of ends in brackets."""
    if isinstance(value, tuple):
        middle, low, high = (written(x, form) for x in value)
        return f"{middle} [{low}, {high}]"
    if form == "s":
        return "no" if value is None else str(value)
    if form == "%":
        return f"{100 * value:.0f}"
    shown = format(value, form)
    return shown.removeprefix("-") if float(shown.replace(",", "")) == 0 else shown  # no -0.00


def lines_of_comparisons() -> str:
    """Every comparison of the ablations, mean over the three tasks, area under the learning curve."""
    head = ("question", "arm", "against", "seeds", "difference in area, 95 %", "verdict", "after Holm", "final, 95 %", "verdict")
    rows = []
    for question, arm, base in ablations.COMPARISONS:
        keys = [f"all {arm} {base} {metric}" for metric in ("area", "final")]
        if keys[0] not in text_rows():
            continue
        area, final = (text_rows()[key] for key in keys)
        difference = [written(text(key, "difference"), "+.3f") for key in keys]
        rows.append([question, arm, base, area["n"], difference[0], area["verdict"], area["holm"], difference[1], final["verdict"]])
    return markdown_table(head, rows)


def lines_of_decided() -> str:
    """What is left of all comparisons, single tasks and both metrics included, after Holm's correction."""
    left = [f"- {r['arm']} against {r['base']}, {r['task']}, {r['metric']}: {written(text(key, 'difference'), '+.3f')}, {r['holm']}"
            for key, r in text_rows().items() if r["holm"] != "undecided"]  # fmt: skip
    return "\n".join(left or ["- none"]) + "\n"


def lines_of_early() -> str:
    head = ("policy and critic", "critic begins", "decides at token", "tokens: PPO-dual / T-PPO, 95 %", "decode steps, 95 %",
            "seeds")  # fmt: skip
    rows, ratios = [], [r for r in early_table() if not r["quantity"].startswith("whole_")]
    for tokens, steps in zip(ratios[::2], ratios[1::2], strict=True):
        shown = [written((r["ratio"], r["low"], r["high"]), ".2f") + f", {r['verdict']}" for r in (tokens, steps)]
        rows.append([tokens["model"], tokens["critic"], tokens["at"], *shown, tokens["n"]])
    return markdown_table(head, rows)


def lines_of_cuts() -> str:
    """Medians over the random MDPs; in brackets, on how many of them the rule beats T-PPO's."""
    rows = []
    for name in dict.fromkeys(row["rule"] for row in cut_table().values()):
        found = [cut_table()[f"{spec} {name}"] for spec in cut_rules.CRITICS]
        rows.append([name, *(written(row["median"], ".3f") + f" ({row['wins']})" * (name != "previous") for row in found)])
    return markdown_table(("stand-in for V(s_l)", *(f"critic {spec}" for spec in cut_rules.CRITICS)), rows)


def lines_of_bound() -> str:
    """P4's Lip beside what happens at cuts, windows of 64; intervals over seeds."""
    head = ("task", "V(s_l) − V(s_{l−1}), mean", "its size", "95 % below", "Lip seen", "left out by EGAE, mean", "its size")
    forms = {"step_mean": "+.3f", "step_size": ".2f", "step_high": ".2f", "lip": ".2f", "gap_mean": "+.3f", "gap_size": ".2f"}
    rows = [row for row in bound_table().values() if row["window"] == 64]
    return markdown_table(head, [[row["task"], *(written(row[name], form) for name, form in forms.items())] for row in rows])


BLOCKS: Blocks = {
    "comparisons": lines_of_comparisons, "decided": lines_of_decided, "early": lines_of_early, "cuts": lines_of_cuts,
    "bound": lines_of_bound, "studies": studies_told.lines_of_studies, "critics": studies_told.lines_of_critics,
}  # fmt: skip


def rewrite(page: str, sources: Sources = SOURCES, blocks: Blocks = BLOCKS) -> str:
    """A page with every marked number and table as its sources have it now. KeyError for a source or table that is unknown."""

    def fresh(match: re.Match[str]) -> str:
        try:
            value = sources[match["source"]](match["key"], match["column"])
        except (KeyError, StopIteration, AttributeError) as error:
            raise KeyError(f"{match['mark']}: no such number ({error!r})") from error
        return written(value, match["form"]) + match["mark"]

    page = MARK.sub(fresh, page)
    return BLOCK.sub(lambda match: match[1] + blocks[match[2]]() + match[3], page)


def main() -> int:
    """Exit codes: 0 the page is up to date or was rewritten, 1 --check found it stale."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is stale")
    arguments = parser.parse_args()
    old = PAGE.read_text()
    new = rewrite(old)
    for before, after in zip(old.splitlines(), new.splitlines(), strict=False):
        if before != after:
            print(f"- {before}\n+ {after}")
    if not arguments.check:
        PAGE.write_text(new)
    print(f"{PAGE.name}: {'up to date' if new == old else 'stale' if arguments.check else 'rewritten'}")
    return int(arguments.check and new != old)


if __name__ == "__main__":
    sys.exit(main())
