"""What `egae` costs, in copies of its result: python benchmarks/advantages.py [--out benchmarks/results/advantages.csv]

Every case runs once per round, so that a disturbance of the machine meets all of them; medians over the rounds. The
copy is `out.copy_(x)` into memory that is already mapped; `egae` allocates its result and checks its arguments.
The aims are printed, and do not change the exit code.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from tppo_ref.advantages import egae, monte_carlo_returns

AIMS = {"cpu": {"egae": 4.0, "egae, lambda per row": 6.0}, "cuda": {"egae": 2.0, "egae, lambda per row": 2.0}}
LOOP = "Python loop over T"


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


def make_cases(B: int, T: int, device: str, lam: float) -> dict[str, Callable[[], Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rewards_BT, values_BT = torch.randn(2, B, T, generator=generator).to(device)
    mask_BT = torch.ones(B, T, dtype=torch.bool, device=device)
    cut_B = (torch.arange(B) % 2 == 0).to(device)
    stop_B1 = torch.randint(1, T + 1, (B, 1), generator=generator)
    padded_BT = (torch.arange(T) < stop_B1).to(device)
    lam_B = torch.full((B,), lam, device=device)
    out_BT = torch.zeros_like(rewards_BT)
    return {
        "copy": lambda: out_BT.copy_(rewards_BT),
        "clone (copy and allocation)": lambda: rewards_BT.clone(),
        "egae": lambda: egae(rewards_BT, values_BT, mask_BT, cut_B, gamma=1.0, lam=lam),
        "egae, lambda per row": lambda: egae(rewards_BT, values_BT, mask_BT, cut_B, gamma=1.0, lam=lam_B),
        "egae, uniform lengths": lambda: egae(rewards_BT, values_BT, padded_BT, cut_B, gamma=1.0, lam=lam),
        "monte_carlo_returns": lambda: monte_carlo_returns(rewards_BT, mask_BT, gamma=1.0),
        LOOP: lambda: loop_over_tokens(rewards_BT, values_BT, cut_B, 1.0, lam),
    }


def measure(cases: dict[str, Callable[[], Tensor]], rounds: int, loop_rounds: int, device: str) -> dict[str, list[float]]:
    times_s: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(-1, rounds):  # round -1 warms up
        for name, case in cases.items():
            if name == LOOP and not 0 <= i < loop_rounds:
                continue
            if device == "cuda":
                torch.cuda.synchronize()
            start_s = time.perf_counter()
            case()
            if device == "cuda":
                torch.cuda.synchronize()
            if i >= 0:
                times_s[name].append(time.perf_counter() - start_s)
    return times_s


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=24576)
    parser.add_argument("--lam", type=float, default=0.95)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--loop-rounds", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, help="CSV to write")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cases = make_cases(args.rows, args.tokens, args.device, args.lam)
    if args.loop_rounds < 1:
        del cases[LOOP]
    times_s = measure(cases, args.rounds, args.loop_rounds, args.device)

    copy_s = statistics.median(times_s["copy"])
    rows = []
    print(f"[{args.rows}, {args.tokens}] float32, lambda {args.lam}, {machine(args.device)}, {args.threads} threads")
    print(f"{'case':30} {'median ms':>10} {'fastest ms':>10} {'copies':>8}   aim")
    for name, case_s in times_s.items():
        median_s, fastest_s, aim = statistics.median(case_s), min(case_s), AIMS[args.device].get(name)
        ratio = median_s / copy_s
        verdict = "" if aim is None else f"at most {aim:g}: {'met' if ratio <= aim else 'missed'}"
        print(f"{name:30} {median_s * 1e3:10.2f} {fastest_s * 1e3:10.2f} {ratio:8.2f}   {verdict}")
        rows.append(
            {
                "case": name,
                "rows": args.rows,
                "tokens": args.tokens,
                "lam": args.lam,
                "median_s": f"{median_s:.6f}",
                "fastest_s": f"{fastest_s:.6f}",
                "rounds": len(case_s),
                "copies": f"{ratio:.3f}",
                "aim_copies": "" if aim is None else aim,
                "aim_met": "" if aim is None else ratio <= aim,
                "machine": machine(args.device),
                "torch": torch.__version__,
                "threads": args.threads,
                "date": datetime.date.today().isoformat(),
                "command": " ".join(["python", *sys.argv]),
            }
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
