"""What `sim plan --best` recommends for the shipped configs and for longer responses, larger devices: results/plans.csv.

    python -m benchmarks.plans              some ten seconds of one core for each case
    python -m benchmarks.plans --configs    writes scale/configs/*-math.yaml anew, too

Every method of a case is a row, at its preferred setting, with its range; `recommended` says which one is the config. docs/scale.md
quotes the table, and a test holds the shipped configs to it. `search_cpu_s` is the search's own time, loops compiled (numba).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import report
from sim.clock import best
from sim.clock.plan import PlanConfig

CONFIGS = Path(__file__).resolve().parents[1] / "scale" / "configs"


def planned(**options: Any) -> PlanConfig:
    """A question with DAPO's lengths half-way, a run of the same base model on mathematics."""
    return PlanConfig(**{"best": True, "lengths": "dapo-32b", "train_step": 2049, "gpus": "64xH100"} | options)


SHIPPED = {
    "qwen2.5-32b-math": planned(),
    "qwen2.5-7b-math": planned(model="Qwen/Qwen2.5-7B", gpus="8xH100", mini_batch=256),
    "qwen2.5-1.5b-math": planned(model="Qwen/Qwen2.5-1.5B", gpus="1xH100", mini_batch=64, cap=12_288),
}
"""By config, what it was planned for."""
LONG = {"lengths": "math-mixture", "train_step": 0}
CASES = {
    "32B": SHIPPED["qwen2.5-32b-math"],
    "7B": SHIPPED["qwen2.5-7b-math"],
    "1.5B": SHIPPED["qwen2.5-1.5b-math"],
    "32B, long": planned(**LONG),
    "7B, long": planned(model="Qwen/Qwen2.5-7B", gpus="8xH100", mini_batch=256, **LONG),
    "32B, H200": planned(gpus="64xH200"),
    "32B, B200": planned(gpus="64xB200"),
}
"""The shipped configs first; long: responses of `math-mixture`, a mean of 9,545 tokens."""


def rows(what: str, config: PlanConfig, found: best.Answer, cpu_s: float) -> Iterator[dict[str, Any]]:
    """A case's methods, fastest first."""
    for one in (*found.found, *found.elsewhere):
        flat: dict[str, Any] = {"what": what, "recommended": one is found.recommended, "mean_tokens": round(found.question.mean)}
        for name, value in best.as_row(found, one).items():
            ends = (
                {f"{name}_low": value["low"], name: value["middle"], f"{name}_high": value["high"]}
                if isinstance(value, dict)
                else {}
            )
            flat |= ends or {name: value}
        over = one.system.gain(found.recommended.system)
        yield flat | {"over_recommended": over.middle, "over_recommended_low": over.low, "over_recommended_high": over.high,
                      "search_cpu_s": round(cpu_s, 1), "asked": best.command(config)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", action="store_true")
    write, table, texts = parser.parse_args().configs, [], {}
    for what, config in CASES.items():
        begin = time.process_time()
        found = best.answer(config)
        table += rows(what, config, found, time.process_time() - begin)
        texts |= {name: best.text(config, found) for name, shipped in SHIPPED.items() if shipped is config}
        print("\n".join(best.advice(found)), flush=True)
    report("plans", table)
    for name, text in texts.items() if write else ():
        (CONFIGS / f"{name}.yaml").write_text(text)


if __name__ == "__main__":
    main()
