"""A run's phases, what was measured of them beside what had been predicted: seconds, MFU and memory.

Predictions are files in the run's folder, where somebody put them; nothing of sim/ or scale/ is imported for them:

    plan.json       `tppo plan ... --json`: seconds by phase
    dry_run.json    a cluster's dry run: bytes by phase, and seconds where it was given a plan

Seconds and MFU are medians over the run's steps, bytes the most of any step and rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from tppo_ref.method.errors import UserError, refusal
from tppo_ref.runs.comparison import write_csv
from tppo_ref.runs.sinks import read_metrics

PLAN, DRY_RUN = ("plan.json", "tppo-sim-plan/1"), ("dry_run.json", "tppo-dry-run/1")


class Names(NamedTuple):
    """A phase's names in the plan's seconds, which are added up, and in the dry run's bytes, of which the largest counts."""

    seconds: tuple[str, ...]
    memory: tuple[str, ...]


PHASES = {
    "rollout": Names(("prefill", "decode", "engine_wait"), ("rollout",)),
    "verify": Names(("verify",), ()),
    "forward": Names(("logprob", "value_forward"), ("logprob", "value_forward")),
    "policy": Names(("policy_train",), ("policy_update",)),
    "value": Names(("value_train",), ("value_update",)),
    "sync": Names(("sync", "wake"), ("sync",)),  # new weights wake the engine
}
COLUMNS = {
    "phase": "phase", "seconds": "s", "predicted_s": "predicted s", "mfu": "MFU", "allocated_bytes": "allocated GB",
    "reserved_bytes": "reserved GB", "used_bytes": "used GB", "predicted_bytes": "predicted GB",
    "used_over_predicted": "used / predicted",
}  # fmt: skip


def write_measured(out: Path, window: int) -> None:
    """Print a run's table, and leave it as out/measured.csv. window: of the run, which a plan may have several of.

    UserError for a folder without a finished step, and for a prediction that cannot be read.
    """
    rows = measured_rows(out, window)
    write_csv(out / "measured.csv", rows)
    print("\n".join([*table(rows), "", *notes(rows), str(out / "measured.csv")]))


def measured_rows(out: Path, window: int) -> list[dict[str, Any]]:
    """A row per phase with the keys of COLUMNS, None for what is not known; the last one is the whole step."""
    steps = [record for record in read_metrics(out / "metrics.jsonl") if "time/step_s" in record]
    if not steps:
        raise UserError(refusal("report", str(out), "the folder of a run with a finished step", "wait for one"))
    seconds, memory = predicted_seconds(out, window), predicted_bytes(out)
    rows = []
    for phase, names in PHASES.items():
        used = _of(steps, f"memory/{phase}_used", max)
        fits = max((memory[name] for name in names.memory if name in memory), default=0.0)
        rows.append({
            "phase": phase, "seconds": _of(steps, f"time/{phase}_s", median),
            "predicted_s": sum(seconds[name] for name in names.seconds if name in seconds) if seconds else None,
            "mfu": _of(steps, f"mfu/{phase}", median), "allocated_bytes": _of(steps, f"memory/{phase}_allocated", max),
            "reserved_bytes": _of(steps, f"memory/{phase}_reserved", max), "used_bytes": used,
            "predicted_bytes": fits or None, "used_over_predicted": used / fits if used and fits else None,
        })  # fmt: skip
    whole = {"phase": "step", "seconds": _of(steps, "time/step_s", median), "predicted_s": seconds.get("step")}
    return [*rows, dict.fromkeys(COLUMNS) | whole]


def _of(steps: Sequence[Mapping[str, Any]], name: str, how: Callable[[list[float]], float]) -> float | None:
    known = [step[name] for step in steps if step.get(name) is not None]
    if wrong := [x for x in known if not isinstance(x, int | float)]:
        raise UserError(refusal("report", f"{name} {wrong[0]!r} in metrics.jsonl", "a number", "restore the file"))
    return float(how(known)) if known else None


def predicted_seconds(out: Path, window: int) -> dict[str, float]:
    """Phase of the plan -> seconds, and the whole "step"; empty where nothing was planned for this window."""
    for name, schema in (PLAN, DRY_RUN):
        planned = _predicted(out, name, schema).get("seconds") or []
        try:
            for entry in planned if isinstance(planned, list) else [planned]:
                if entry["window"] == window:
                    return {phase: float(s) for phase, s in {**entry["phases_s"], "step": entry["step_s"]}.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise _unreadable(out / name, schema) from None
    return {}


def predicted_bytes(out: Path) -> dict[str, float]:
    """Phase of the dry run -> bytes of one device; empty where none was made."""
    try:
        return {phase: float(num_bytes) for phase, num_bytes in _predicted(out, *DRY_RUN).get("bytes_per_phase", {}).items()}
    except (ValueError, TypeError, AttributeError):
        raise _unreadable(out / DRY_RUN[0], DRY_RUN[1]) from None


def _predicted(out: Path, name: str, schema: str) -> dict[str, Any]:
    """A file of predictions in the run's folder; empty where there is none."""
    if not (out / name).exists():
        return {}
    try:
        found = json.loads((out / name).read_bytes())
        if found["schema"] == schema:
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise _unreadable(out / name, schema)


def _unreadable(path: Path, schema: str) -> UserError:
    return UserError(refusal("report", f"{path}, which is no {schema}", "what the plan or the dry run wrote", "make it anew"))


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows for people, in Markdown."""
    cells = [list(COLUMNS.values()), *([_cell(name, row[name]) for name in COLUMNS] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells]
    return [lines[0], "|" + "|".join(" " + "-" * width + " " for width in widths) + "|", *lines[1:]]


def _cell(name: str, x: float | str | None) -> str:
    if isinstance(x, str):
        return x
    if x is None or math.isnan(x):
        return ""
    if name.endswith("bytes"):
        return f"{x / 1e9:.1f}"
    return f"{x:.0%}" if name in ("mfu", "used_over_predicted") else f"{x:.3g}" if x < 100 else f"{x:.0f}"


def notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What is missing, and where it would come from."""
    lacking = {
        "predicted_s": f"No seconds are predicted: put what `tppo plan ... --json` says of this window here, as {PLAN[0]}.",
        "predicted_bytes": f"No memory is predicted: a cluster's report reckons it; else put a dry run's JSON in, as {DRY_RUN[0]}.",
        "mfu": "No MFU: this device's peak is not known; give --run.peak_tflops.",
        "used_bytes": "No memory was measured: a CPU has no counters.",
    }
    return [text for name, text in lacking.items() if all(row[name] is None for row in rows)]
