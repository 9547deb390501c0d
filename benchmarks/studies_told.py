"""What the committed runs of the studies stated before their first run say, as pages tell it.

study              a number
lines_of_studies   every contrast
critics            what the critics of the factorials were fitted to, and know
lines_of_critics   the same as a table
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

from benchmarks import equal_tokens, factorial, studies
from benchmarks import study as stated
from benchmarks.common import RESULTS
from tppo_ref.runs.build import make_task
from tppo_ref.runs.config import Config
from tppo_ref.runs.docs_pages import markdown_table
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.pretrain import partition

FACTORIALS = (studies.ALL["factorial"], studies.ALL["new-tasks"])


@functools.cache
def study_table(name: str) -> tuple[dict[str, Any], ...]:
    """The table of a stated study over the whole seeds that are committed; empty where there are none."""
    made = studies.ALL[name]
    rows, others = equal_tokens.read_whole(RESULTS / made.path.name)
    assert not others, f"{made.path.name}: {others} lines of runs that are not whole"
    return tuple(stated.table(made, rows))


def study(key: str, column: str) -> Any:
    """ "factorial 1": of the study's first contrast, the primary one, its `difference` with the interval, its `verdict`, the number
    of `seeds`, or all of it, `said`, which is "not yet" before the first whole seed; of several base models also what `two_levels`
    says, `by_seeds` with the interval of seeds alone. "edge further": of an arm, the explained variance after the first third of
    the budget, `first`, and after the last, `last`. "whole": how many `contrasts` the studies have that have all their seeds, and
    how many of these are `decided`."""
    if key == "whole":
        verdicts = [row["verdict"] for name in studies.ALL for row in study_table(name) if row["verdict"] != "not yet"]
        return {"contrasts": len(verdicts), "decided": len(verdicts) - verdicts.count("undecided")}[column]
    name, number = key.split()
    made, rows = studies.ALL[name], study_table(name)
    if number in made.arms:
        mark = {"first": 1, "last": equal_tokens.NUM_MARKS}[column]
        runs, _ = equal_tokens.read_whole(RESULTS / made.path.name)
        return equal_tokens.mean([r["explained_variance"] for r in runs if (r["arm"], r["mark"]) == (number, mark)])
    if column == "by_seeds":
        row = rows[int(number) - 1]
        return row["difference"], row["seeds_low"], row["seeds_high"]
    if column != "said":
        row = rows[int(number) - 1]
        return (row["difference"], row["low"], row["high"]) if column == "difference" else row[column]
    return f"({stated.told(made, rows[int(number) - 1]) if rows else f'not yet, none of {made.seeds} seeds'})"


def lines_of_studies() -> str:
    """Every contrast of every stated study, as far as its runs are there."""
    rows = []
    for name, made in studies.ALL.items():
        found = study_table(name)
        for number, what in enumerate(made.contrasts):
            told = stated.told(made, found[number]) if found else f"not yet, none of {made.seeds} seeds"
            how = f"`{studies.COMMANDS[name]}`, [plan](../benchmarks/prestated/{made.plan})"
            rows.append(["" if number else how, what if number else f"**{what}**", told])
    return markdown_table(("study", "contrast, the primary one in bold", "difference, interval, verdict"), rows)


@functools.cache
def fitted(task: str, critic: str) -> int:
    """Responses that a factorial's critic was fitted to, of the CRITICS[critic] that were sampled: what is not held out, from the
    task's prompts alone."""
    config = replace_fields(Config(), {"task.name": task, "value.pretrain_responses": factorial.CRITICS[critic]})
    return partition(config, make_task(config).prompts("train")).num_fitted


def explained(task: str, critic: str) -> float:
    """How much a factorial's critic explains in the first third of the budget, over all runs that begin with it."""
    (made,) = (made for made in FACTORIALS if task in made.tasks)
    rows = [row for row in equal_tokens.read_whole(RESULTS / made.path.name)[0] if (row["task"], row["mark"]) == (task, 1)]
    return equal_tokens.mean([row["explained_variance"] for row in rows if f"-{critic}-" in row["arm"]])


def critics(key: str, column: str) -> float:
    """ "fork strong": of a factorial's critic the responses `sampled` and `fitted`, and the variance `explained`; "fork": how many
    `times` as many are fitted for the strong one as for the weak one."""
    if column == "times":
        return fitted(key, "strong") / fitted(key, "weak")
    task, critic = key.split()
    return {"sampled": lambda: factorial.CRITICS[critic], "fitted": lambda: fitted(task, critic),
            "explained": lambda: explained(task, critic)}[column]()  # fmt: skip


def lines_of_critics() -> str:
    """What the critics of the factorials were made of, and what they know."""
    rows = []
    for made in FACTORIALS:
        there = equal_tokens.read_whole(RESULTS / made.path.name)[0]
        for task, critic in itertools.product(made.tasks if there else (), factorial.CRITICS):
            knows = format(round(explained(task, critic), 2) + 0.0, ".2f")
            rows.append([task, critic, format(factorial.CRITICS[critic], ","), format(fitted(task, critic), ","), knows])
    head = ("task", "critic", "responses sampled", "fitted on", "explained variance")
    return markdown_table(head, rows) if rows else "No run yet.\n"
