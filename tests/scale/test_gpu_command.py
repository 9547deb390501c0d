"""`python -m benchmarks.gpu` at toy size on a CPU, so that it cannot rot: all of its parts, and its resumption."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scale_helpers import ROOT, environment

from benchmarks.gpu import heavy_tail


def run(folder: Path) -> str:
    done = subprocess.run([sys.executable, "-m", "benchmarks.gpu", "--toy", "--results", str(folder)], env=environment(), cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "gpu-toy.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_part_is_measured_once_and_a_second_call_goes_on_behind_what_is_there(tmp_path):
    run(tmp_path)
    rows = rows_of(tmp_path)
    assert {r["part"] for r in rows} == {"egae", "attention", "training", "methods"}
    assert all(float(r["value"]) > 0 for r in rows if r["quantity"] != "forward of the step")
    occupancy = {r["case"]: float(r["value"]) for r in rows if r["quantity"] == "occupancy"}
    assert occupancy["tppo"] == 1 > occupancy["ppo"], "the forced lengths have a tail"
    assert all(r["command"].startswith("python -m benchmarks.gpu") and r["date"] and r["machine"] for r in rows)
    kept = [r for r in rows if r["case"] != "tppo"]
    with (tmp_path / "gpu-toy.csv").open("w", newline="") as file:  # as a kill before the last case would leave it
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(kept)
    printed = run(tmp_path)
    again = rows_of(tmp_path)
    assert again[: len(kept)] == kept
    assert {r["case"] for r in again[len(kept) :]} == {"tppo"}
    assert "egae over copy" not in printed
    assert (tmp_path / "gpu-toy.png").stat().st_size > 1000


@pytest.mark.parametrize("cap", [64, 8192])
def test_forced_lengths_have_a_heavy_tail_inside_of_their_bounds(cap):
    lengths = torch.tensor(heavy_tail(4096, cap), dtype=torch.float64)
    assert lengths.min() >= 8
    assert lengths.max() == cap
    assert lengths.median() == pytest.approx(max(8, cap / 8), rel=0.1)
    assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
