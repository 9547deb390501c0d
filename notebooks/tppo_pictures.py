"""Notebook 01: its figures, and how it quotes settings and source lines. What is computed is the library's; here it is shown."""

from __future__ import annotations

import difflib
import inspect
import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from tppo_ref.method.masks import policy_token_mask, value_token_mask
from tppo_ref.method.records import End
from tppo_ref.runs import config, parsing
from tppo_ref.runs.colours import look
from tppo_ref.runs.figures import tidy

RULES = {"zero": "value 0 at the cut", "critic": "critic's own V(s_l)", "previous": "EGAE: V(s_l) := V(s_(l-1))"}

# ------------------------------------------------------------------------------------------------------- section 3: a cut response


def draw_cut(whole_T: np.ndarray, by_rule: Mapping[str, np.ndarray], value_T: np.ndarray, lam: float) -> Figure:
    """Advantages of a cut response under each rule, beside those of the whole one and the critic's values."""
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    axes.axhline(0, color="#999999", linewidth=0.8)
    axes.plot(whole_T, color="black", linewidth=3, alpha=0.35, label="whole response, no cut")
    axes.plot(value_T, color="black", linewidth=1, linestyle=(0, (1, 2)), label="the critic's V(s_t)")
    for i, (rule, advantage_T) in enumerate(by_rule.items()):
        axes.plot(advantage_T, **look(rule).line(markevery=(2 * i, 6)), label=RULES[rule])
    window = len(by_rule["previous"])
    axes.axvline(window - 0.5, color="black", linewidth=1, linestyle=(0, (4, 3)))
    axes.text(window - 0.8, axes.get_ylim()[1], "the cut: later tokens \ndo not exist yet ", fontsize=8.5, ha="right", va="top")
    zero, egae = by_rule["zero"][-1], by_rule["previous"][-1]
    title = f"λ = {lam:.2f}: value 0 gives the last token before the cut {zero:+.2f}, EGAE gives it {egae:.2f}"
    tidy(axes, title=title, x="token t", y="advantage, value (units of the score)")
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")
    return figure


def draw_fading(gaps: Mapping[str, np.ndarray], lam: float) -> Figure:
    """|error of the advantage| of each rule against the tokens left before the cut."""
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for i, (rule, gap) in enumerate(gaps.items()):
        axes.semilogy(np.arange(len(gap), 0, -1), gap, **look(rule).line(markevery=(i, 5)), label=RULES[rule])
    axes.set_yticks([0.02, 0.05, 0.1, 0.2, 0.5], ["0.02", "0.05", "0.1", "0.2", "0.5"])
    axes.minorticks_off()
    times = gaps["zero"][-1] / gaps["previous"][-1]
    title = f"Each error fades by γλ = {lam} per token; value 0 starts {times:.0f} times higher than EGAE"
    tidy(axes, title=title, x="tokens left before the cut, n", y="|error of the advantage|")
    axes.legend(frameon=False, fontsize=8.5)
    return figure


# --------------------------------------------------------------------------------------------- section 4: settings and source lines


def fields(settings: config.Config) -> list[str]:
    """A configuration as lines of text, `section.field = value`; the method's name left out."""
    return [
        f"{path} = {parsing.get_field(settings, path)!r}" for path in parsing.field_paths(config.Config) if path != "run.method"
    ]


def show_diff(before: Sequence[str], after: Sequence[str]) -> None:
    """What differs between two lists of lines."""
    for line in itertools.islice(difflib.unified_diff(before, after, lineterm="", n=0), 2, None):
        if not line.startswith("@@"):
            print("   ", line)


def body(function: Callable[..., Any]) -> list[str]:
    """The source lines of a function without its docstring."""
    lines = inspect.getsource(function).splitlines()
    quotes = [i for i, line in enumerate(lines) for _ in range(line.count('"""'))]
    return lines[: quotes[0]] + lines[quotes[1] + 1 :] if quotes else lines


def quote(where: Callable[..., Any], *words: str) -> None:
    """The lines of the library's source that contain one of `words`, each of which is there, and the function that holds them."""
    module = inspect.getmodule(where)
    assert module
    print(f"    {module.__name__.partition('.')[2]}.{where.__qualname__}:")
    missing = [word for word in words if not any(word in line for line in body(where))]
    assert not missing, f"{where.__qualname__} has no line with {missing} any more: what does the notebook mean to quote?"
    for line in body(where):
        if any(word in line for word in words):
            print(*textwrap.wrap(line.strip(), 88, initial_indent=" " * 8, subsequent_indent=" " * 12), sep="\n")


# ------------------------------------------------------------------------------------------------- section 5: where each token goes


def account(run: Sequence[Mapping[str, Any]], cap: int, tail: int) -> dict[str, int]:
    """Tokens by fate. A segment is a row of the step that sampled it; a response's last segment says how it stands."""
    so_far = torch.tensor([s["sampled"] + s["stop_s"] - s["begin_s"] for s in run])
    row_BT = torch.arange(cap) < so_far[:, None]
    cut_B = torch.tensor([s["end"] == End.RUNNING.name for s in run])
    start_B = torch.tensor([s["sampled"] for s in run])
    latest = {s["response"]: i for i, s in enumerate(run)}
    final = torch.tensor(sorted(latest.values()))
    window_BT, trained_BT = (policy_token_mask(row_BT, start_B, cut_B, skip_tail=k) for k in (0, tail))
    return {
        "generated": int((so_far - start_B).sum()),
        "policy trains": int(trained_BT.sum()),
        "excluded tail": int((window_BT & ~trained_BT).sum()),
        "critic trains": int(value_token_mask(row_BT[final], ~cut_B[final]).sum()),
        "critic waits": int(row_BT[final][cut_B[final]].sum()),
        "prefix fed again": int(start_B.sum()),
    }
