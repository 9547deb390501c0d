"""docs/index.md, the one page: its numbers, its tables and its pictures, from committed data; and README.md's first screen.

    python -m benchmarks.front_page [--check]      rewrites them; --check only says what is stale, and exits with 1 if anything is

A number stands before a comment that names its source, as in docs/findings.md (`benchmarks.findings`, whose sources are all here),
and three more:

    response "1 2" advantage    results/one_response.csv: window 1, token 2; `waited`: what the token would have been told had the
                                machine waited for the end; "all": the response as a whole
    rule "critic 2" advantage   the same window under another cut rule; "critic last" delta: the delta at the cut
    motion "tppo" ended         the picture of slots: responses that ended, busy share of the slots, its settings
"""

from __future__ import annotations

import argparse
import csv
import functools
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import fair_headline, fair_told, findings, pictures
from benchmarks.common import RESULTS
from benchmarks.value_moves import in_a_sentence
from tppo_ref.method.advantages import CutValue, egae, gae
from tppo_ref.runs.config import Config
from tppo_ref.runs.docs_pages import markdown_table

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "index.md", ROOT / "README.md"
PICTURES = PAGE.parent / "pictures"
WIDTH_IN_README = 420  # so that picture, method and what it brings fit one screen of 1280 x 900
RULES: dict[CutValue, str] = {
    "previous": "V(s_{l−1}): as if nothing had happened. T-PPO's",
    "critic": "V(s_l), the critic's own word. The usual bootstrap at a time limit",
    "zero": "0, as if it had ended there. That of code which knows padding and no cut",
}
Told = tuple[dict[str, str], ...]


@functools.cache
def told() -> tuple[Told, Told]:
    """The response's rows in the window that cut it, and in the one that ended it."""
    with (RESULTS / "one_response.csv").open(newline="") as file:
        rows = tuple(csv.DictReader(file))
    first = tuple(row for row in rows if row["end"] == "RUNNING")
    return first, tuple(row for row in rows if row["end"] != "RUNNING")


def column(rows: Told, name: str) -> torch.Tensor:
    return torch.tensor([[float(row[name]) for row in rows]], dtype=torch.float64)


@functools.cache
def waited() -> tuple[float, ...]:
    """Advantages of the cut's tokens with the whole response known, its verdict included, under the critic of one step later."""
    first, second = told()
    rewards_BT = column(second, "reward")
    whole_BT = gae(rewards_BT, column(second, "value"), rewards_BT == rewards_BT, gamma=1.0, lam=Config().advantage.lam)
    return tuple(whole_BT[0, : len(first)].tolist())


@functools.cache
def under(rule: CutValue) -> tuple[float, ...]:
    """What the first window's tokens are told under a cut rule."""
    first, _ = told()
    rewards_BT, last_B = column(first, "reward"), column(first, "last_value")[:, 0] if rule == "critic" else None
    found_BT = egae(rewards_BT, column(first, "value"), rewards_BT == rewards_BT, torch.tensor([True]), gamma=1.0,
                    lam=Config().advantage.lam, cut_value=rule, last_value_B=last_B)  # fmt: skip
    return tuple(found_BT[0].tolist())


def response(key: str, name: str) -> Any:
    first, second = told()
    if key == "all":
        cut = len(first)
        later = [float(row["advantage"]) for row in second[cut:]]
        whole = {"length": len(second), "cut": cut, "later": len(later), "low": min(later), "high": max(later)}
        return (
            whole[name] if name in whole else int(first[0][name]) if name in ("window", "tail", "step", "steps") else first[0][name]
        )
    window, at = map(int, key.split())
    row = (first, second)[window - 1][at]
    if name == "waited":
        return waited()[at]
    return row[name] if name == "text" else 1000 * float(row["push"]) if name == "push" else float(row[name])


def rule(key: str, name: str) -> float:
    name_of_rule, at = key.split()
    found = under(name_of_rule)  # type: ignore[arg-type]
    return found[-1 if at == "last" else int(at)]  # the last token's advantage is its delta: nothing follows


def motion(key: str, name: str) -> Any:
    ppo, tppo, shown = pictures.plays()
    settings = {"slots": pictures.SLOTS, "window": pictures.WINDOW, "shown": shown, "steps": pictures.STEPS}
    if key == "all":
        return settings[name]
    run = {"ppo": ppo, "tppo": tppo}[key]
    return {"ended": len(run.ended(shown)), "busy": run.busy(shown), "windows": sum(edge <= shown for edge in run.edges[1:])}[name]


SOURCES: findings.Sources = {**findings.SOURCES, "response": response, "rule": rule, "motion": motion}


# ------------------------------------------------------------------------------------------------------------- tables, pictures


def lines_of_rules() -> str:
    """The three rules: on the response of the page, and on forty random MDPs under three critics."""
    worlds = {"exact": "exact", "noise:0.3": "+ noise 0.3", "drift:0.3": "+ drift 0.3"}
    head = ["rule", "what stands for V(s_l), and whose rule it is", "δ at the cut", "q is told",
            *(f"critic {word}" for word in worlds.values())]  # fmt: skip
    rows = []
    unsure = next(at for at, row in enumerate(told()[0]) if float(row["before"]) < pictures.SURE)
    for name, stands in RULES.items():
        errors = [findings.written(findings.cuts(f"{critic} {name}", "median"), ".3f") for critic in worlds]
        rows.append([f"**{name}**", stands, f"{under(name)[-1]:+.2f}", f"{under(name)[unsure]:+.2f}", *errors])
    return markdown_table(head, rows)


def lines_of_tokens() -> str:
    """Every token of the response, in the window that trained it."""
    first, second = told()
    head = ("t", "token", "π(token)", "V(s_t)", "r_t", "δ_t", "A_t", "had it waited", "whitened", "push on log π, 10⁻³", "π after",
            "V's target")  # fmt: skip
    rows = []
    for t, row in enumerate([*first, *second[len(first) :]]):
        later = f"{waited()[t]:+.3f}" if t < len(first) else ""
        push = f"{1000 * float(row['push']):+.2f}" if row["push"] else "none: tail"
        rows.append([
            t, f"`{row['text']}`", f"{float(row['before']):.4f}", f"{float(row['value']):.3f}", f"{float(row['reward']):.0f}",
            f"{float(row['delta']):+.3f}", f"{float(row['advantage']):+.3f}", later,
            f"{float(row['scaled']):+.2f}" if row["scaled"] else "", push, f"{float(row['after']):.4f}",
            f"{float(second[t]['target']):.0f}" + ", one step later" * (t < len(first)),
        ])  # fmt: skip
    return markdown_table(head, rows)


@functools.cache
def drawn() -> dict[str, str]:
    """Each picture's file and its text."""
    words, by_rule = [row["text"] for row in told()[0]], {name: under(name) for name in RULES}
    return {
        "slots.svg": pictures.slots_picture(),
        "response.svg": pictures.response_picture(*told(), waited()),
        "rules.svg": pictures.rules_picture(words, by_rule, waited()),
    }


def shown(name: str, folder: str = "pictures", width: int | None = None) -> str:
    """A picture on the page, with its own description as alternative text; `width` in CSS pixels; None: the page's."""
    description = drawn()[name].partition("<desc>")[2].partition("</desc>")[0]
    return f'<img src="{folder}/{name}" width="{width}" alt="{description}">\n' if width else f"![{description}]({folder}/{name})\n"


BLOCKS: findings.Blocks = {
    "rules": lines_of_rules,
    "tokens": lines_of_tokens,
    "slots": lambda: shown("slots.svg"),
    "response": lambda: shown("response.svg"),
    "cuts": lambda: shown("rules.svg"),
}


def lines_of_fair() -> str:
    """PPO at its best against tppo-once, a line per task."""
    head = ("task", "in a sentence", "who arrives, of how many seeds",
            "CPU seconds to the target, PPO / `tppo-once`, where both arrive",
            "over all seeds", "generated tokens, where both arrive",
            "accuracy at equal CPU seconds, `tppo-once` - PPO")  # fmt: skip
    rows = {task: fair_told.told(task) for task in fair_headline.TASKS}
    names = ("arrive", "seconds", "bound", "generated_tokens", "area")
    return markdown_table(head, [[f"`{t}`", in_a_sentence(t), *(row[name] for name in names)] for t, row in rows.items()])


BLOCKS_OF_README: findings.Blocks = {
    "slots": lambda: shown("slots.svg", "docs/pictures", width=WIDTH_IN_README),
    "fair": lines_of_fair,
}


def stale() -> dict[Path, str]:
    """What is not as its sources have it: file -> what it should be."""
    wanted = {PICTURES / name: picture for name, picture in drawn().items()}
    for page, blocks in ((PAGE, BLOCKS), (README, BLOCKS_OF_README)):
        wanted[page] = findings.rewrite(page.read_text(), SOURCES, blocks)
    return {path: new for path, new in wanted.items() if not path.exists() or path.read_text() != new}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check, found = parser.parse_args().check, stale()
    PICTURES.mkdir(exist_ok=True)
    for path, new in found.items():
        print(f"{path.name}: {'stale' if check else 'rewritten'}")
        if not check:
            path.write_text(new)
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
