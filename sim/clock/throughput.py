"""Where 84 -> 249 operations per byte and 2.5x come from, and where they vanish: the cases of docs/throughput.md.

    TABLES       name -> cases, each of which compare.evaluate makes a row of: conditions, lengths, windows, slots, devices, models,
                 tails
    methods()    every method side by side, on three setups
    PUBLISHED    what their papers claim

Gains are of trained tokens per second, T-PPO over PPO, each with the range that the stated efficiencies allow (ranges.py):

    gain                  over PPO at its own best (compare.py), both at their best tensor parallelism
    gain_step             over PPO at its best with at most as many tokens per step
    gain_equal            over PPO with the same TP and slots, one response per slot
    gain_rollout          as gain_equal, of the rollout's seconds alone
    gain_without_prefix   as gain_equal, as if no earlier window were ever fed again, to the engine or to the policy

Operations per byte are means over the seconds of decoding, at equal settings; `ppo_active_per_step` is PPO's mean batch over its
decode steps, slots of a replica x mean / longest, which is what weights-only operations per byte would be if every step took the
same time. T-PPO runs on a few of the engine replicas, PPO on all (steady.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sim.clock.compare import Case, method_row
from sim.clock.methods import method

CLAIM, PPO_INTENSITY, TPPO_INTENSITY = 2.5, 84.0, 249.0  # [S]
DAPO = "dapo-32b@2049"  # DAPO's run, half-way: a mean of 2,586 tokens


# --------------------------------------------------------------------------------------------------------------------- tables


def conditions() -> Iterator[Case]:
    """What is charged, one thing after the other, on 64 H800 with the port's 8,192 slots and with a quarter of them.

    "lognormal:median=7500,sigma=0.4" has a mean of a third of the cap: with it 249/84 is met, and nothing else says it was so [I].
    """
    for lengths in (THIRD, "math-mixture", DAPO):
        for slots, tp in ((8192, 2), (2048, 4)):
            for counted in ("weights", "kv", "cache"):
                yield Case(what=f"{slots} slots, {counted}", lengths=lengths, slots=slots, tp=tp, counted=counted)


THIRD = "lognormal:median=7400,sigma=0.42"


def length_cases() -> Iterator[Case]:
    """The published distributions, each with its own cap and a window of a third of it."""
    for spec, cap in (("dapo-32b-early", 20_480), ("dapo-32b@1024", 20_480), (DAPO, 20_480), ("dapo-32b@5280", 20_480),
                      ("math-14b", 16_000),
                      ("code-14b", 16_000), ("math-mixture", 24_576), ("constant:8192", 8192)):  # fmt: skip
        yield Case(what=spec, lengths=spec, cap=cap, window=-(-cap // 3))


def windows() -> Iterator[Case]:
    for lengths in (DAPO, "dapo-32b-early", "math-mixture"):
        for window in (1024, 2048, 4096, 8192, 12_288, 16_384):
            yield Case(what=f"{lengths}, {window}", lengths=lengths, window=window)


def slots() -> Iterator[Case]:
    for lengths in (DAPO, "math-mixture"):
        for number in (64, 256, 1024, 2048, 4096, 8192):
            yield Case(what=f"{lengths}, {number}", lengths=lengths, slots=number)


def devices() -> Iterator[Case]:
    for lengths in (DAPO, "math-mixture"):
        for number in (32, 64, 128, 256, 512):
            yield Case(what=f"{lengths}, {number}", lengths=lengths, gpus=f"{number}xH800")


def models() -> Iterator[Case]:
    """Up to 32B: with responses of 24k a 72B's update does not fit on 64 H800."""
    for lengths in (DAPO, "math-mixture"):
        for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B"):
            yield Case(what=f"{lengths}, {size}", lengths=lengths, model=f"Qwen2.5-{size}")


def tails() -> Iterator[Case]:
    """Log-normals with a mean of 2,500 tokens before the cap, from none to a heavy tail."""
    for sigma in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0):
        for counted in ("weights", "cache"):
            yield Case(what=f"sigma {sigma}, {counted}", lengths=f"lognormal:mean=2500,sigma={sigma}", slots=2048, counted=counted)


TABLES = {
    "conditions": conditions, "lengths": length_cases, "windows": windows, "slots": slots, "devices": devices, "models": models,
    "tails": tails,
}  # fmt: skip


# -------------------------------------------------------------------------------------------------------------------- methods

SETUPS = (
    Case(what="R1", lengths=DAPO),
    Case(what="R2"),
    Case(what="R3", model="Qwen2.5-7B", gpus="32xH800"),
)
"""R1: 32B on 64 H800, a heavy tail. R2: the same, long in the mean. R3: 7B on 32 H800, long in the mean."""
NAMES = (
    "ppo", "ppo/small", "ppo/none", "tppo", "tppo+d", "tppo+a", "tppo+c", "tppo+f", "tppo+b", "tppo+ac", "tppo+acd",
    "tppo+acdf", "tppo/small", "tppo+acdf/small",
    "partial", "partial+c", "partial+c/none", "tail", "async:1", "async:4", "async:4/none",
)  # fmt: skip

PUBLISHED = (
    ("T-PPO", "2.5x, at most [S]", "32B; cluster, lengths and baseline's settings unknown"),
    ("partial: APRIL 2509.18521", "+22.5 % rollout throughput, mean [V]", "unknown here"),
    ("partial: CoPRIS 2511.05589", "1.58-1.94x [V]", "against synchronous RL, mathematics; model and cluster unknown here"),
    ("partial: UloRL 2507.19766", "2.06x [V]", "Qwen3-30B-A3B, segments [V]; cluster unknown here"),
    ("tail batching: RollPacker 2509.21009", "2.03-2.56x [V]", "Qwen2.5 family on up to 128 H800, against veRL [V]"),
    ("asynchronous: AReaL 2505.24298", "up to 2.77x [V]", "unknown here"),
    ("asynchronous: Laminar 2510.12633", "up to 5.48x [V]", "1,024 GPUs [V]; model unknown here"),
)
"""System, what its paper claims, the setup that it states (abstracts; what is not stated there is unknown here)."""


def methods(names: tuple[str, ...] = NAMES, cases: tuple[Case, ...] = SETUPS) -> Iterator[dict[str, Any]]:
    """A row for each method on each setup, at its best tensor parallelism."""
    for case in cases:
        for name in names:
            yield method_row(case, name, method(name))
