"""The numbers of a comparison: runs read from their folders, time to a target, intervals."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats

from tppo_ref.method.errors import UserError

POINTS = 3  # evaluations in a running mean


PHASES = ("rollout", "forward", "policy", "value")  # of the training clock; the rest is "other"


EVALUATION = ("step", "time/train_s", "ledger/trained", "eval/accuracy", "eval/length_mean", "eval/length_p99")


STEP = ("step", "time/train_s", "time/step_s", "ledger/generated", "ledger/trained", "rollout/occupancy", "rollout/decode_steps",
        *(f"time/{phase}_s" for phase in PHASES))  # fmt: skip


RERUN = "remove its folder and run compare again"


class Estimate(NamedTuple):
    """A mean, geometric mean or median over seeds and the ends of its interval or range, NaN where there is one seed."""

    value: float
    low: float
    high: float


class Crossing(NamedTuple):
    """Where a seed reaches the target: seconds of the training clock and trained tokens, infinite where it never does."""

    train_s: float
    tokens: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run: evaluations and training steps as arrays by metric name, and (train_s, tokens) of responses that ended."""

    method: str
    seed: int
    folder: Path
    slots: int
    evaluations: Mapping[str, np.ndarray]
    steps: Mapping[str, np.ndarray]
    responses: Sequence[tuple[float, int]]

    @property
    def accuracy(self) -> np.ndarray:
        return self.evaluations["eval/accuracy"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs by method, the same seeds for each; `void` says why the comparison shows nothing, and is "" where it is valid."""

    runs: Mapping[str, Sequence[Run]]
    share: float
    target: float
    void: str
    crossings: Mapping[str, Sequence[Crossing]]

    @property
    def first(self) -> str:
        return next(iter(self.runs))

    @property
    def num_seeds(self) -> int:
        return len(self.runs[self.first])

    @property
    def pair(self) -> list[str]:
        """The methods that titles and timeline are about: the first, and of the others the first T-PPO or else the first."""
        others = list(self.runs)[1:]
        return [self.first, *([m for m in others if m.startswith("tppo")] or others)[:1]]

    def typical_crossing(self, method: str) -> tuple[str, Crossing]:
        """The statistic over the method's seeds, "geometric mean" or "median", and its seconds and tokens (see `typical`)."""
        (statistic, train_s), (_, tokens) = (typical(values) for values in zip(*self.crossings[method], strict=True))
        return statistic, Crossing(train_s.value, tokens.value)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the columns of the first one; what a row lacks stays empty."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_run(out: Path, method: str, seed: int) -> Run:
    """The run out/runs/<method>-seed<seed>; two evaluations of the same step count once."""
    folder = out / "runs" / f"{method}-seed{seed}"
    if not (folder / "finished").exists():
        found = "one that is not finished" if folder.exists() else "nothing"
        raise UserError(f"{folder}: got {found}; expected a finished run; run compare again, it keeps what is finished")
    path = folder / "metrics.jsonl"
    records = [_parse(line, f"{path}, line {i}") for i, line in enumerate(_read_text(path).splitlines(), 1)]
    evaluations = {r.get("step"): r for r in records if "eval/accuracy" in r}
    return Run(
        method=method, seed=seed, folder=folder, slots=read_json(folder / "config.json")["rollout"]["slots"],
        evaluations=_columns(path, list(evaluations.values()), EVALUATION, "evaluation"),
        steps=_columns(path, [r for r in records if "eval/accuracy" not in r], STEP, "training step"),
        responses=read_table(folder / "responses.csv", {"train_s": float, "tokens": int}),
    )  # fmt: skip


def _columns(path: Path, records: Sequence[Mapping[str, Any]], names: Sequence[str], kind: str) -> dict[str, np.ndarray]:
    if len(records) < (2 if names is EVALUATION else 1):
        raise UserError(f"{path}: got {len(records)} {kind}s; expected an evaluation before and after at least a step; {RERUN}")
    if lacking := [name for name in names for record in records if not isinstance(record.get(name), int | float)]:
        raise UserError(f"{path}: got no number for {lacking[0]} in one {kind}; expected one in each; {RERUN}")
    return {name: np.array([record[name] for record in records], dtype=float) for name in names}


def _read_text(path: Path) -> str:
    try:
        text = path.read_text()
    except OSError as error:
        raise UserError(f"{path}: got {error.strerror}; expected a file that can be read; {RERUN}") from None
    if not text.endswith("\n"):
        raise UserError(f"{path}: got {'a last line that is cut off' if text else 'nothing'}; expected whole lines; {RERUN}")
    return text


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError):
        raise UserError(f"{where}: got something else; expected a JSON object; {RERUN}") from None


def read_json(path: Path) -> dict[str, Any]:
    return _parse(_read_text(path), str(path))


def read_table(path: Path, types: Mapping[str, Callable[[str], Any]]) -> list[tuple[Any, ...]]:
    """The named columns of a CSV file, converted; a bad line is a UserError with its number."""
    header, *lines = csv.reader(_read_text(path).splitlines())
    if missing := [name for name in types if name not in header]:
        raise UserError(f"{path}: got columns {', '.join(header)}; expected a column {missing[0]}; {RERUN}")
    places, rows = [(header.index(name), convert) for name, convert in types.items()], []
    for line_number, line in enumerate(lines, 2):
        try:
            rows.append(tuple(convert(line[i]) for i, convert in places))
        except (ValueError, IndexError):
            raise UserError(f"{path}, line {line_number}: got {','.join(line)!r}; expected a row of its table; {RERUN}") from None
    return rows


def running_mean(x: np.ndarray) -> np.ndarray:
    """Trailing mean of POINTS entries; the first ones are means of what is there."""
    return np.array([x[max(0, stop - POINTS) : stop].mean() for stop in range(1, len(x) + 1)])


def whole_means(x: np.ndarray) -> np.ndarray:
    """The running means of POINTS entries (of all, where there are fewer)."""
    return running_mean(x)[min(POINTS, len(x)) - 1 :]


def crossing(run: Run, target: float) -> Crossing:
    """The first evaluation whose whole trailing mean is at least `target`."""
    means = whole_means(run.accuracy)
    reached = np.flatnonzero(means >= target - 1e-12)  # the mean of equal numbers may differ from them in the last bit
    at = len(run.accuracy) - len(means) + reached[:1]
    found = [float(x) for name in ("time/train_s", "ledger/trained") for x in run.evaluations[name][at]]
    return Crossing(*found or (math.inf, math.inf))


def compare_runs(runs: Mapping[str, Sequence[Run]], share: float) -> Comparison:
    """Target, crossings and validity. The first method sets the target, and must have learnt something in every seed."""
    first, firsts = next(iter(runs.items()))
    common = min(len(run.accuracy) for run in firsts)
    target = share * float(whole_means(np.mean([run.accuracy[:common] for run in firsts], axis=0)).max())
    ends = {run.seed: (run.accuracy[0], running_mean(run.accuracy)[-1]) for run in firsts}
    crossings = {method: [crossing(run, target) for run in group] for method, group in runs.items()}
    return Comparison(runs=runs, share=share, target=target, void=void_because(first, target, ends), crossings=crossings)


def void_because(first: str, target: float, ends: Mapping[int, tuple[float, float]]) -> str:
    """Why a comparison shows nothing, "" where it is valid. `ends`: the first method's (start, final) accuracy by seed."""
    if worse := [str(seed) for seed, (start, final) in ends.items() if not final > start]:
        return f"{display(first)} did not improve in {'seed' if len(worse) == 1 else 'seeds'} {', '.join(worse)}"
    start = float(np.mean([start for start, _ in ends.values()]))
    return "" if target > start else f"the target {target:.3f} is not above {display(first)}'s accuracy at the start, {start:.3f}"


def mean_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Estimate:
    """Mean with its Student-t interval; NaN of nothing."""
    x, n = np.asarray(values, dtype=float), len(values)
    mean = float(x.mean()) if n else math.nan
    half = float(scipy.stats.t.ppf((1 + level) / 2, n - 1) * x.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return Estimate(mean, mean - half, mean + half)


def holm(p: Iterable[float], level: float = 0.05) -> list[bool]:
    """Holm's step-down test: which hypotheses fall with a family-wise error of `level`. A p that is not a number never falls."""
    p = [x if math.isfinite(x) else 1.0 for x in p]
    falls = [False] * len(p)
    for rank, place in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[place] > level / (len(p) - rank):
            break
        falls[place] = True
    return falls


def geometric(values: Iterable[float]) -> Estimate:
    """Geometric mean of positive, finite values, as ratios and times are, and the 95 % Student-t interval of the mean logarithm.

    Of one value, however often: that value itself, which its logarithm would round, and no interval.
    """
    x = [float(value) for value in values]
    return Estimate(x[0], math.nan, math.nan) if len(set(x)) == 1 else Estimate(*map(math.exp, mean_interval(np.log(x))))


def median_range(values: Sequence[float]) -> Estimate:
    """Median, and the least and the largest: what few seeds that do not all arrive let say. Infinite values count."""
    x = np.asarray(values, dtype=float)
    low, high = (float(x.min()), float(x.max())) if len(x) > 1 else (math.nan, math.nan)
    return Estimate(float(np.median(x)), low, high)


def has_logarithm(value: float) -> bool:
    """Positive and finite. A speed-up is, where both arrive (`speed_up`)."""
    return 0 < value < math.inf


def typical(values: Sequence[float]) -> tuple[str, Estimate]:
    """Of times or tokens to the target, or of ratios, over seeds: ("geometric mean", with its interval) where all have a logarithm,
    else ("median", with the range). A mean without the seeds that do not arrive would flatter, and with them there is none."""
    return ("geometric mean", geometric(values)) if all(map(has_logarithm, values)) else ("median", median_range(values))


def speed_up(first_s: float, other_s: float) -> float:
    """first / other; 0 where the other never arrives, infinite where only the first does not."""
    return 0.0 if math.isinf(other_s) else math.inf if math.isinf(first_s) else first_s / other_s


def quantities(run: Run) -> dict[str, tuple[float, str]]:
    """What the table says of one run, as (number, unit)."""
    steps, last = run.steps, {name: values[-1] for name, values in run.steps.items()}
    clock = {phase: steps[f"time/{phase}_s"].sum() / steps["time/step_s"].sum() for phase in PHASES}
    clock["other"] = 1.0 - sum(clock.values())
    busy = (steps["rollout/occupancy"] * steps["rollout/decode_steps"]).sum() / steps["rollout/decode_steps"].sum()
    mean, p99 = run.evaluations["eval/length_mean"], run.evaluations["eval/length_p99"]
    return {
        "accuracy, start": (run.accuracy[0], "accuracy"), "accuracy, final": (running_mean(run.accuracy)[-1], "accuracy"),
        "accuracy, best": (whole_means(run.accuracy).max(), "accuracy"),
        "throughput": (last["ledger/generated"] / last["time/train_s"], "tokens/s"),
        "trained tokens": (last["ledger/trained"] / last["ledger/generated"], "share"), "occupancy": (busy, "share"),
        **{f"clock, {phase}": (share, "share") for phase, share in clock.items()},
        "length, start, mean": (mean[0], "tokens"), "length, start, p99": (p99[0], "tokens"),
        "length, end, mean": (running_mean(mean)[-1], "tokens"), "length, end, p99": (running_mean(p99)[-1], "tokens"),
    }  # fmt: skip


def display(method: str) -> str:
    """A method's name in tables and figures."""
    return {"ppo": "PPO", "tppo": "T-PPO"}.get(method, method)


def number(value: float, unit: str) -> str:
    """A number as tables and figures print it."""
    if math.isinf(value):
        return "never" if unit in ("s", "tokens") else "infinite"
    if unit == "s":
        return f"{value:.1f} s" if value < 100 else f"{value:.0f} s"
    return {"accuracy": f"{value:.3f}", "share": f"{100 * value:.1f} %", "x": f"{value:.2f}x"}.get(unit, f"{value:,.0f}")
