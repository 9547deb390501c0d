"""What `policy.prefix constant` drops: the policy gradient with and without the way through the prefix, on the Trainer's batches.

    python -m benchmarks.dropped_gradient [--tasks chain fork length] [--windows 16 64] [--seeds 2] [--budget 40960]

T-PPO with its defaults is trained; about every 2,048 generated tokens the gradient of the clipped surrogate before the update
(where every ratio is 1, so of -sum A logprob / tokens, without the LM loss) is taken twice on the step's own batch: `full`, and
`constant`, which has no gradient through the keys and values of prompt and earlier windows. Both are exact: a busy machine changes
nothing.

A row per task, window, seed, quarter of the budget and part of the batch goes to results/dropped_gradient.csv when its run ends;
the same command goes on where it was stopped, and draws dropped_gradient.png. `--seeds 0` prints and draws what is there.

    part        all; "earlier 0", "earlier 1", "earlier 2-3", ...: rows by the number of windows before this one; "quarter 1" to
                "quarter 4": tokens by their place in the window, of rows with a window before it
    cosine      of full and constant, mean over the measured batches;  norm_ratio: |constant| / |full|
    noise       |full - constant| / |a - b|, a and b the full gradients of the batch's two halves: |a - b| estimates how far a
                batch's gradient lies from its expectation
    halves      cosine of a and b: how alike two half batches are
    sum_cosine, sum_norm_ratio    of the gradients added up over the quarter's batches, where noise averages out and a bias does not
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import itertools
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.common import RESULTS, provenance, whole_rows
from benchmarks.equal_tokens import SHARED, TASKS, prepare, quiet
from sim.lab.learning import write_csv
from tppo_ref.loop.rows import Rows
from tppo_ref.rollout.models import PolicyModel
from tppo_ref.runs.build import build
from tppo_ref.runs.colours import COLOURS, MARKERS, SERIES
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.session import Session

PATH = RESULTS / "dropped_gradient.csv"
BETWEEN = 2048  # generated tokens from one measured batch to the next
QUARTERS = 4  # of the budget, and of a window
EARLIER = ("0", "1", "2-3", "4-7", "8+")  # windows before this one
PARTS = ("all", *(f"earlier {name}" for name in EARLIER), *(f"quarter {q + 1}" for q in range(QUARTERS)))
KEY = ("task", "window", "seed")
Row = dict[str, Any]


class Cell(NamedTuple):
    """Tokens of one batch: rows by their earlier windows (an index of EARLIER), place in the window, half of the batch."""

    earlier: int
    quarter: int
    half: int

    @property
    def parts(self) -> Iterator[str]:
        yield "all"
        yield f"earlier {EARLIER[self.earlier]}"
        if self.earlier:
            yield f"quarter {self.quarter + 1}"


def earlier_windows(num_settled: int, window: int) -> int:
    """Index in EARLIER. A response's first window may be short, since its slot was refilled within it; the others are whole."""
    return min(len(EARLIER) - 1, math.ceil(num_settled / window).bit_length())


def cell_gradients(policy: PolicyModel, rows: Rows, scaled_BT: Tensor, window: int, *, constant: bool) -> dict[Cell, Tensor]:
    """Per cell the policy gradient of its tokens, one flat vector. Their sum is the batch's gradient."""
    tokens, gradients = int(rows.train_BT.sum()), {}
    parameters = [p for p in policy.parameters() if p.requires_grad]
    members = collections.defaultdict(list)
    for row, response in enumerate(rows.responses):
        members[earlier_windows(response.num_settled, window), row % 2].append(row)
    for (earlier, half), chosen in members.items():
        logprob_bt = policy(rows.batch(chosen, constant_prefix=constant))
        part = chosen, slice(0, logprob_bt.shape[1])
        begin_b = torch.tensor([rows.responses[row].num_settled for row in chosen])
        quarter_bt = (torch.arange(logprob_bt.shape[1]) - begin_b[:, None]) * QUARTERS // window
        for quarter in range(QUARTERS):
            mask_bt = rows.train_BT[part] & (quarter_bt == quarter)
            if mask_bt.any():
                loss = -(scaled_BT[part] * logprob_bt)[mask_bt].sum() / tokens
                parts = torch.autograd.grad(loss, parameters, retain_graph=True)
                gradients[Cell(earlier, quarter, half)] = torch.cat([g.flatten() for g in parts])
    return gradients


class Pair(NamedTuple):
    """Gradients of one part of one batch: full of each half, and constant of both together."""

    a: Tensor
    b: Tensor
    constant: Tensor

    @property
    def full(self) -> Tensor:
        return self.a + self.b


def pairs_of(full: Mapping[Cell, Tensor], constant: Mapping[Cell, Tensor]) -> dict[str, Pair]:
    """Cells added up to parts; a part without a token is left out."""
    sums: dict[str, list[Tensor]] = {}
    for cell, gradient in full.items():
        for name in cell.parts:
            three = sums.setdefault(name, [torch.zeros_like(gradient) for _ in Pair._fields])
            three[cell.half] += gradient
            three[2] += constant[cell]
    return {name: Pair(*three) for name, three in sums.items()}


def cosine(x: Tensor, y: Tensor) -> float:
    """NaN where one of them is 0."""
    norms = float(x.norm() * y.norm())
    return float(x @ y) / norms if norms else math.nan


def ratio(x: Tensor, y: Tensor) -> float:
    """|x| / |y|; NaN where y is 0."""
    return float(x.norm() / y.norm()) if y.any() else math.nan


def numbers(pairs: Sequence[Pair]) -> dict[str, float]:
    """The row's numbers, from one part's gradients in the batches of a quarter of the budget."""
    whole, kept = (sum(getattr(p, name) for p in pairs) for name in ("full", "constant"))
    assert isinstance(whole, Tensor)
    assert isinstance(kept, Tensor)
    return {
        "cosine": mean(cosine(p.full, p.constant) for p in pairs),
        "norm_ratio": mean(ratio(p.constant, p.full) for p in pairs),
        "noise": mean(ratio(p.full - p.constant, p.a - p.b) for p in pairs if p.a.any() and p.b.any()),
        "halves": mean(cosine(p.a, p.b) for p in pairs),
        "sum_cosine": cosine(whole, kept),
        "sum_norm_ratio": ratio(kept, whole),
    }


def mean(numbers: Iterator[float]) -> float:
    """Of the finite ones; NaN where none is."""
    finite = [x for x in numbers if math.isfinite(x)]
    return sum(finite) / len(finite) if finite else math.nan


def run(fields: Mapping[str, Any], window: int, seed: int, budget: int) -> list[Row]:
    """One training run, a row per quarter of the budget and part."""
    found: dict[tuple[int, str], list[Pair]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as out:
        config = replace_fields(Config(), {**fields, "rollout.window": window, "run.seed": seed, "run.out": out})
        with contextlib.closing(Session(build(config))) as session:
            trainer, due = session.trainer, 0
            while (tokens := trainer.batcher.num_generated_tokens) < budget:
                trainer.observer = None
                if tokens >= due:
                    due = tokens + BETWEEN
                    before, place = copy.deepcopy(trainer.policy_learner.module), tokens * QUARTERS // budget

                    def measure(rows: Rows, forward: Any, advantages: Any, batch: Any, before=before, place=place) -> None:
                        full, constant = (
                            cell_gradients(before, rows, advantages.scaled_BT, window, constant=x) for x in (False, True)
                        )
                        for name, pair in pairs_of(full, constant).items():
                            found[place, name].append(pair)

                    trainer.observer = measure
                trainer.step()
    key = {"task": fields["task.name"], "window": window, "seed": seed}
    return [
        {**key, "quarter": place + 1, "tokens": budget * (place + 1) // QUARTERS, "part": name, "batches": len(found[place, name]),
         **{k: round(x, 5) for k, x in numbers(found[place, name]).items()}}
        for place, name in itertools.product(range(QUARTERS), PARTS) if (place, name) in found
    ]  # fmt: skip


def whole_runs(path: Path) -> list[dict[str, str]]:
    """Rows of the runs whose last quarter is there: a kill within a write leaves a run without its end, which is made again."""
    rows = whole_rows(path)
    last = {tuple(r[k] for k in KEY) for r in rows if (r["quarter"], r["part"]) == (str(QUARTERS), f"quarter {QUARTERS}")}
    kept = [r for r in rows if tuple(r[k] for k in KEY) in last]
    if len(kept) < len(rows):
        path.unlink()
        write_csv(path, kept)
    return kept


def table(rows: Sequence[Mapping[str, str]]) -> list[Row]:
    """Means over seeds, and over the quarters of the budget ("all" of them, and each), per task, window and part."""
    groups = collections.defaultdict(list)
    for r in rows:
        for quarter in ("all", r["quarter"]):
            groups[r["task"], int(r["window"]), r["part"], quarter].append(r)
    names = ("cosine", "norm_ratio", "noise", "halves", "sum_cosine", "sum_norm_ratio")
    return [
        {"task": task, "window": window, "part": part, "quarter": quarter, "seeds": len({r["seed"] for r in group}),
         **{name: mean(float(r[name]) for r in group) for name in names}}
        for (task, window, part, quarter), group in groups.items()
    ]  # fmt: skip


def draw(rows: Sequence[Row], path: Path) -> None:
    """Three panels of cosines: over training, by windows before, by place in the window."""
    figure = Figure(figsize=(11.5, 3.9), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    times = [str(q + 1) for q in range(QUARTERS)]
    sides = (
        ("quarter of training", times, lambda r, x: r["part"] == "all" and r["quarter"] == x),
        ("windows before this one", EARLIER, lambda r, x: r["part"] == f"earlier {x}" and r["quarter"] == "all"),
        ("quarter of the window", times, lambda r, x: r["part"] == f"quarter {x}" and r["quarter"] == "all"),
    )
    lines = sorted({(r["task"], r["window"]) for r in rows})
    styles = {window: style for window, style in zip(sorted({w for _, w in lines}), ("-", "--", ":", "-."), strict=False)}
    tasks = sorted({task for task, _ in lines})
    for axes, (name, places, chosen) in zip(panels, sides, strict=True):
        for task, window in lines:
            i = tasks.index(task)
            points = [(x, r["cosine"]) for x in places for r in rows if (r["task"], r["window"]) == (task, window) and chosen(r, x)]
            axes.plot(*zip(*points, strict=True), color=COLOURS[SERIES[i]], marker=MARKERS[i], linestyle=styles[window],
                      label=f"{task}, window {window}")  # fmt: skip
        axes.set_xlabel(name)
        axes.axhline(1, color="#7F7F7F", linewidth=0.6)
    panels[0].set_ylabel("cosine with the full gradient")
    figure.suptitle("A gradient that stops at the window's edge points elsewhere, on chain and fork mostly just behind the edge")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, handlelength=5)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 a user's mistake, 130 Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, metavar="TASK")
    parser.add_argument("--windows", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--seeds", type=int, default=2, help="seeds 0 to this less 1; 0 only prints and draws")
    parser.add_argument("--budget", type=int, default=40960, help="generated tokens of a run")
    parser.add_argument("--cache", default="runs/cache", help="folder of base models and pre-trained critics")
    parser.add_argument("--out", type=Path, default=PATH)
    arguments = parser.parse_args(argv)
    for name, least in (("seeds", 0), ("budget", BETWEEN)):
        if getattr(arguments, name) < least:
            parser.error(f"{name}: got {getattr(arguments, name)}; expected an integer of at least {least}")
    if min(arguments.windows) < QUARTERS:
        parser.error(f"windows: got {min(arguments.windows)}; expected at least {QUARTERS} tokens")
    torch.set_num_threads(1)
    quiet()
    there = {tuple(r[k] for k in KEY) for r in whole_runs(arguments.out)}
    jobs = [(t, w, s) for s, w, t in itertools.product(range(arguments.seeds), arguments.windows, arguments.tasks)
            if (t, str(w), str(s)) not in there]  # fmt: skip
    prepared = {t: prepare(t, {"run.cache": arguments.cache, **SHARED})[0] for t in sorted({t for t, _, _ in jobs})}
    try:
        for done, (task, window, seed) in enumerate(jobs):
            rows = run(prepared[task], window, seed, arguments.budget)
            write_csv(arguments.out, [row | provenance() for row in rows], append=True)
            print(f"{done + 1} of {len(jobs)}: {task}, window {window}, seed {seed}", flush=True)
    except KeyboardInterrupt:
        print(f"stopped; whole runs are in {arguments.out}, and the same command goes on with the others", file=sys.stderr)
        return 130
    if rows := table(whole_runs(arguments.out)):
        for r in rows:
            if r["quarter"] == "all" or r["part"] == "all":
                where = f"{r['task']:<7}window {r['window']:<4}{r['part']:<13}quarter {r['quarter']:<4}"
                print(f"{where}cosine {r['cosine']:.4f}  norm {r['norm_ratio']:.3f}  of noise {r['noise']:.2f}  halves "
                      f"{r['halves']:+.2f}  summed {r['sum_cosine']:.4f}  {r['sum_norm_ratio']:.3f}")  # fmt: skip
        draw(rows, arguments.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
