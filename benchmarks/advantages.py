"""What `egae` costs, in copies of its result and in clones (a copy into fresh memory, which `egae` needs too).

    python -m benchmarks.advantages [--device cuda]
    python -m benchmarks.advantages --before FOLDER     this checkout against another one, case by case

Aims, in copies: 4 on a CPU, 6 with a lambda per row, 2 on a GPU. Every case runs once per round, so that a disturbance of
the machine meets all of them. A ratio of medians says what a user of this machine sees, a ratio of the fastest rounds
comes closest to what a quiet one would give. CPU time on one thread is the least disturbed by other work. With `--before` the
functions of both checkouts are loaded into one process and take turns.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.common import report
from tppo_ref.method import advantages

AIMS = {"cpu": {"egae": 4.0, "egae, lambda per row": 6.0}, "cuda": {"egae": 2.0, "egae, lambda per row": 2.0}}
COPY, CLONE, LOOP = "copy", "clone", "Python loop over T"
Cases = dict[str, Callable[[], Tensor]]


def loop_over_tokens(rewards_BT: Tensor, values_BT: Tensor, cut_B: Tensor, gamma: float, lam: float) -> Tensor:
    """EGAE on full rows as trainers usually write it, for comparison."""
    out_BT = torch.empty_like(rewards_BT)
    next_value_B = torch.where(cut_B, values_BT[:, -1], 0.0)
    advantage_B = torch.zeros_like(next_value_B)
    for t in reversed(range(rewards_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        advantage_B = delta_B + gamma * lam * advantage_B
        out_BT[:, t] = advantage_B
        next_value_B = values_BT[:, t]
    return out_BT


def load_before(checkout: Path) -> ModuleType:
    """advantages.py of another checkout, wherever it stands there; this one's modules stay as they are."""
    ours = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "tppo_ref"}
    sys.path.insert(0, str(checkout.resolve()))
    try:
        flat = (checkout / "tppo_ref" / "advantages.py").exists()
        module = importlib.import_module("tppo_ref.advantages" if flat else "tppo_ref.method.advantages")
    finally:
        sys.path.pop(0)
        for name in [name for name in sys.modules if name.partition(".")[0] == "tppo_ref"]:
            del sys.modules[name]
        sys.modules.update(ours)
    if not Path(module.__file__ or "").is_relative_to(checkout.resolve()):
        raise SystemExit(f"before: got {checkout}; expected a checkout of this project, found {module.__file__}")
    return module


def make_cases(B: int, T: int, device: str, lam: float, module: ModuleType = advantages) -> Cases:
    egae, monte_carlo_returns = module.egae, module.monte_carlo_returns
    generator = torch.Generator().manual_seed(0)
    rewards_BT, values_BT = torch.randn(2, B, T, generator=generator).to(device)
    mask_BT = torch.ones(B, T, dtype=torch.bool, device=device)
    cut_B = (torch.arange(B) % 2 == 0).to(device)
    stop_B1 = torch.randint(1, T + 1, (B, 1), generator=generator)
    padded_BT = (torch.arange(T) < stop_B1).to(device)
    lam_B = torch.linspace(lam - 0.001, lam, B, device=device)  # no two alike: rows that share a lambda are cheaper
    out_BT = torch.zeros_like(rewards_BT)
    return {
        COPY: lambda: out_BT.copy_(rewards_BT),
        CLONE: lambda: rewards_BT.clone(),
        "egae": lambda: egae(rewards_BT, values_BT, mask_BT, cut_B, gamma=1.0, lam=lam),
        "egae, lambda per row": lambda: egae(rewards_BT, values_BT, mask_BT, cut_B, gamma=1.0, lam=lam_B),
        "egae, uniform lengths": lambda: egae(rewards_BT, values_BT, padded_BT, cut_B, gamma=1.0, lam=lam),
        "monte_carlo_returns": lambda: monte_carlo_returns(rewards_BT, mask_BT, gamma=1.0),
        LOOP: lambda: loop_over_tokens(rewards_BT, values_BT, cut_B, 1.0, lam),
    }


def measure(cases: Cases, rounds: int, loop_rounds: int, clock: Callable[[], float], device: str) -> dict[str, list[float]]:
    """Seconds of every round, by case; the slow loop runs in the first `loop_rounds` only."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times_s: dict[str, list[float]] = {name: [] for name in cases if name != LOOP or loop_rounds}
    for i in range(-1, rounds):  # round -1 warms up
        for name in times_s:
            if name == LOOP and not 0 <= i < loop_rounds:
                continue
            wait()
            begin = clock()
            cases[name]()
            wait()
            if i >= 0:
                times_s[name].append(clock() - begin)
    return times_s


def compare(args: argparse.Namespace) -> None:
    """Both checkouts' functions, one after the other in each round: seconds of the fastest rounds, and how far results differ."""
    shape = args.rows, args.tokens, args.device, args.lam
    now, before = make_cases(*shape), make_cases(*shape, module=load_before(args.before))
    names = [name for name in now if name not in (COPY, CLONE, LOOP)]
    cases = {f"{name}, {side}": both[name] for name in names for side, both in (("before", before), ("now", now))}
    cpu_s: dict[str, list[float]] = {}
    if args.device == "cpu":
        torch.set_num_threads(1)
        cpu_s = measure(cases, args.rounds, 0, time.thread_time, args.device)
    torch.set_num_threads(args.threads)
    wall_s = measure(cases, args.rounds, 0, time.perf_counter, args.device)
    rows: list[dict[str, object]] = []
    for name in names:
        row: dict[str, object] = {"case": name}
        for clock, times_s in (("fastest", wall_s), ("cpu1_fastest", cpu_s)):
            if times_s:
                was, took = (min(times_s[f"{name}, {side}"]) for side in ("before", "now"))
                row |= {f"{clock}_before_ms": round(1e3 * was, 2), f"{clock}_ms": round(1e3 * took, 2),
                        f"{clock}_ratio": round(took / was, 3)}  # fmt: skip
        row |= {"largest_difference": f"{(now[name]() - before[name]()).abs().max().item():.2g}",
                "largest_value": f"{before[name]().abs().max().item():.3g}", "rounds": args.rounds, "device": args.device,
                "rows": args.rows, "tokens": args.tokens}  # fmt: skip
        rows.append(row)
    report("advantages_before", rows, args.out)


def make_rows(wall_s: dict[str, list[float]], cpu_s: dict[str, list[float]], aims: dict[str, float]) -> list[dict[str, object]]:
    def ratios(name: str) -> dict[str, float]:
        median, fastest = statistics.median(wall_s[name]), min(wall_s[name])
        return {
            "copies_median": round(median / statistics.median(wall_s[COPY]), 2),
            "copies_fastest": round(fastest / min(wall_s[COPY]), 2),
            "clones_median": round(median / statistics.median(wall_s[CLONE]), 2),
            "clones_fastest": round(fastest / min(wall_s[CLONE]), 2),
        }

    rows: list[dict[str, object]] = []
    for name in wall_s:
        row: dict[str, object] = {"case": name, "median_ms": round(1e3 * statistics.median(wall_s[name]), 3)}
        row |= {"fastest_ms": round(1e3 * min(wall_s[name]), 3), "rounds": len(wall_s[name])} | ratios(name)
        for key, base in (("cpu1_copies", COPY), ("cpu1_clones", CLONE)):  # one thread, CPU time, fastest round
            row[key] = round(min(cpu_s[name]) / min(cpu_s[base]), 2) if name in cpu_s else ""
        row["cpu1_fastest_ms"] = round(1e3 * min(cpu_s[name]), 3) if name in cpu_s else ""
        verdicts = {"aim_copies": "", "median": "", "fastest": ""}
        if name in aims:
            verdicts = {"aim_copies": f"at most {aims[name]:g}"}
            verdicts |= {
                kind: "met" if ratios(name)[f"copies_{kind}"] <= aims[name] else "missed" for kind in ("median", "fastest")
            }
        rows.append(row | verdicts)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--lam", type=float, default=0.95)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--loop-rounds", type=int, default=2)
    parser.add_argument("--out", type=Path, help="CSV to write, default benchmarks/results/advantages.csv")
    parser.add_argument("--before", type=Path, help="folder of another checkout to compare with; CSV: advantages_before.csv")
    args = parser.parse_args()
    if args.before:
        compare(args)
        return
    cases = make_cases(args.rows, args.tokens, args.device, args.lam)
    cpu_s: dict[str, list[float]] = {}
    if args.device == "cpu":
        torch.set_num_threads(1)
        cpu_s = measure(cases, args.rounds, 0, time.thread_time, args.device)
    torch.set_num_threads(args.threads)  # last: the provenance tells the number of threads of the wall clock
    wall_s = measure(cases, args.rounds, args.loop_rounds, time.perf_counter, args.device)
    shape = {"device": args.device, "rows": args.rows, "tokens": args.tokens, "dtype": "float32", "lam": args.lam}
    rows = make_rows(wall_s, cpu_s, AIMS[args.device])
    report("advantages", [row | shape for row in rows], args.out)
    for row in rows:
        if row["aim_copies"]:
            print(f"{row['case']}: aim {row['aim_copies']} copies: {row['copies_median']} by medians, {row['median']};"
                  f" {row['copies_fastest']} by the fastest rounds, {row['fastest']}")  # fmt: skip


if __name__ == "__main__":
    main()
