"""How one run differs from another that should be the same: responses, records, bits of the state."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from tppo_ref.runs.checkpoint import complete_checkpoints
from tppo_ref.runs.sinks import read_metrics

CLOCKS = ("rollout/tokens_per_s", "rollout/idle_s", "eval/time_s")


def same_local_state(one: Path, two: Path) -> bool:
    """Whether the newest checkpoints of two runs are the same bit for bit, but for clock, folders and torch's generator."""
    a, b = (complete_checkpoints(out / "checkpoints")[-1] for out in (one, two))
    names = [sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()) for folder in (a, b)]
    if a.name != b.name or names[0] != names[1]:
        return False
    if any((a / name).read_bytes() != (b / name).read_bytes() for name in names[0] if name.endswith(".safetensors")):
        return False
    states = [json.loads((folder / "state.json").read_text())["trainer"] for folder in (a, b)]
    for state in states:
        del state["train_s"], state["torch_rng"]
    optimisers = [list(leaves(torch.load(folder / "optimisers.pt", weights_only=True))) for folder in (a, b)]
    pairs = zip(*optimisers, strict=True)
    return states[0] == states[1] and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for (k, x), (l, y) in pairs if k == l or not k
    )


def difference(one: Path, two: Path, same_state: Callable[[Path, Path], bool] = same_local_state) -> dict[str, int]:
    """How the run `two` differs from `one`: responses lost and there twice, records, bits of the state, what lies about."""
    rows, other = responses(one), responses(two)
    records = [
        [{k: v for k, v in r.items() if not k.startswith("time/") and k not in CLOCKS} for r in read_metrics(out / "metrics.jsonl")
         if "rollout/tokens" in r] for out in (one, two)
    ]  # fmt: skip
    left = [path for path in (two / "checkpoints").iterdir() if not path.name.startswith("step-")]
    return {
        "lost": len(rows.keys() - other.keys()), "twice": sum(len(found) - 1 for found in other.values()),
        "other responses": sum(rows[id] != other[id] for id in rows.keys() & other.keys()) + len(other.keys() - rows.keys()),
        "other records": int(records[0] != records[1]), "other state": int(not same_state(one, two)), "left": len(left),
    }  # fmt: skip


def responses(out: Path) -> dict[str, list[list[str]]]:
    """Rows of responses.csv by response, without the clock."""
    rows: dict[str, list[list[str]]] = {}
    for line in (out / "responses.csv").read_text().splitlines()[1:]:
        step, _, response, *rest = line.split(",")
        rows.setdefault(response, []).append([step, *rest])
    return rows


def leaves(thing: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What nested dicts and lists hold, by path."""
    if isinstance(thing, Mapping | list | tuple):
        items = thing.items() if isinstance(thing, Mapping) else enumerate(thing)
        for key, part in items:
            yield from leaves(part, f"{name}/{key}")
    else:
        yield name, thing
