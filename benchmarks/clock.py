"""What the cluster clock itself costs: seconds and memory per 1,000 simulated steps of 8,192 slots.

    python -m benchmarks.clock                 T-PPO with a mean length of one window and of half a window, PPO; about 6 minutes
    python -m benchmarks.clock --steps 50      the same over fewer steps, per 1,000

Aim: 1,000 steps within 10 s on one core, with 64 replicas within 20 s, at any mean length. Seconds are the processor's, so that
other work on the machine counts less; `wall_s` has the others. The first step, which compiles where numba is there, is left out.
The last row is not under the aim: a cluster whose KV cache is too small for its slots.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import time

from benchmarks.common import report
from sim.clock.calibrate import Measured, Passes
from sim.clock.cluster import Setup
from sim.clock.hardware import Layout, Roofline, cluster, model
from sim.clock.lengths import load_lengths
from sim.clock.schedule import Windowed, ppo, tppo

SLOTS, WINDOW, CAP = 8192, 8192, 24_576

LINES = Measured(
    step_s=0.02, row_s=1e-5, context_s=1e-9, arrival_s=1e-3, prefill_token_s=1e-6,
    forward=Passes(0.1, 1e-7), policy=Passes(1.0, 3e-7), value=Passes(1.0, 3e-7), once_s=5.0,
)  # fmt: skip
"""Costs without a limit on the KV cache; their size does not matter here."""


def measure(what: str, system: Windowed, steps: int) -> dict[str, object]:
    system.step()
    begin_s, begin_wall_s = time.process_time(), time.perf_counter()
    for _ in range(steps):
        record = system.step()
    step_s, step_wall_s = (time.process_time() - begin_s) / steps, (time.perf_counter() - begin_wall_s) / steps
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "what": what, "steps": steps, "s_per_1000_steps": round(1000 * step_s, 1), "wall_s": round(1000 * step_wall_s, 1),
        "peak_mib": round(peak_mib), "replicas": system.setup.num_replicas, "preemptions_last_step": record.preemptions,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="simulated steps per row (the last row: a fiftieth)")
    steps = parser.parse_args().steps
    window, half = (load_lengths(f"lognormal:median={median},sigma=0.8", cap=CAP) for median in (6320, 3000))
    rows = []
    for what, lengths in (("a window", window), ("half a window", half)):
        setup = Setup(lengths=lengths, prompt_tokens=200, costs=LINES, slots=SLOTS, samples_per_prompt=16)
        rows.append(measure(f"T-PPO, mean length {what} ({lengths.mean_tokens():.0f})", tppo(setup, window=WINDOW), steps))
    rows.append(measure(f"PPO, mean length {half.mean_tokens():.0f}", ppo(setup), steps))
    apart = dataclasses.replace(setup, num_replicas=64)
    rows.append(measure("T-PPO, half a window, 64 replicas", tppo(apart, window=WINDOW), steps))
    num_devices, h800 = cluster("64xH800")
    costs = Roofline(accelerator=h800, model=model("Qwen/Qwen2.5-32B"), layout=Layout(num_devices=num_devices, tensor_parallel=4))
    full = dataclasses.replace(setup, num_replicas=16, costs=costs)
    rows.append(measure("T-PPO, half a window, 32B on 64xH800, KV cache full", tppo(full, window=WINDOW), max(1, steps // 50)))
    report("clock", rows)


if __name__ == "__main__":
    main()
