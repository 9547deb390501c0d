"""benchmarks/bound_in_practice.py: the gap is P1's, steps by brute force on a real Trainer, the table by hand, going on."""

from __future__ import annotations

import csv
import itertools
import math

import pytest
import torch
from helpers import make_trainer

from benchmarks import bound_in_practice
from benchmarks.bound_in_practice import NUMBERS, Notes, table
from benchmarks.equal_tokens import TASKS
from tppo_ref.method.advantages import egae
from tppo_ref.method.records import End


def test_the_gap_is_what_egae_leaves_out_at_the_last_token_before_the_cut():
    """P1 at n = 1: A by the sum of discounted errors over the whole response, B by `egae` on what was there at the cut."""
    gamma, lam, score, cut = 0.9, 0.8, -1.0, 3
    value_t = torch.tensor([0.3, -0.2, 0.5, 0.1, 0.7], dtype=torch.float64)
    delta = [gamma * (value_t[t + 1] if t < 4 else 0) + (score if t == 4 else 0) - value_t[t] for t in range(5)]
    whole = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, 5)) for t in range(5)]
    zeros, mask = torch.zeros(1, cut, dtype=torch.float64), torch.ones(1, cut, dtype=torch.bool)
    (cut_t,) = egae(zeros, value_t[None, :cut], mask, torch.tensor([True]), gamma=gamma, lam=lam)
    (found,) = Notes(gamma, lam).gaps_of(value_t, score, [cut])
    assert found == pytest.approx(float(whole[cut - 1] - cut_t[-1]), abs=1e-12)


def test_what_is_noted_of_a_real_step_is_there_row_by_row():
    trainer = make_trainer("tppo")
    notes, at_cuts, live, edges, gaps = Notes(1.0, 0.95), list[float](), list[float](), list[int](), list[float]()

    def observe(rows, forward, *rest):
        notes(rows, forward, *rest)
        for at, response in enumerate(rows.responses):
            values = forward.values_BT[at, : len(response)].tolist()
            if response.end is End.RUNNING:
                values.append(float(forward.last_value_B[at]))
                at_cuts.append(values[-1] - values[-2])
            else:
                edges.extend(response.window_starts[1:])
                delta = [
                    after - before for before, after in itertools.pairwise([*values, response.score])
                ]  # the end pays the score
                for l in response.window_starts[1:]:
                    gaps.append(values[l] - values[l - 1] + 0.95 * sum(0.95 ** (k - l) * d for k, d in enumerate(delta) if k >= l))
            live.extend(abs(after - before) for before, after in itertools.pairwise(values))

    trainer.observer = observe
    for _ in range(4):
        trainer.step()
    assert at_cuts
    assert edges
    found = notes.numbers()
    assert (found["cuts"], found["edges"]) == (len(at_cuts), len(edges))
    assert found["step_mean"] == pytest.approx(sum(at_cuts) / len(at_cuts), abs=1e-5)
    assert found["step_size"] == pytest.approx(sum(map(abs, at_cuts)) / len(at_cuts), abs=1e-5)
    assert found["lip"] == pytest.approx(max(live), abs=1e-5)
    assert found["step_largest"] == pytest.approx(max(map(abs, at_cuts)), abs=1e-5)
    assert found["live_size"] == pytest.approx(sum(live) / len(live), abs=1e-5)
    assert found["gap_mean"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)
    assert found["gap_size"] == pytest.approx(sum(map(abs, gaps)) / len(gaps), abs=1e-5)


def row(task: str, seed: int, number: float, window: int = 16) -> dict[str, str]:
    return {"task": task, "critic": "1024", "window": str(window), "seed": str(seed), **dict.fromkeys(NUMBERS, str(number))}


def test_the_table_takes_means_over_tasks_seed_by_seed():
    rows = [row("chain", 0, 1.0), row("chain", 1, 3.0), row("fork", 0, 2.0), row("fork", 1, 6.0), row("chain", 2, 9.0)]
    chain, fork, everything = table(rows)
    assert (chain["seeds"], fork["seeds"], everything["seeds"]) == (3, 2, 2)  # fork lacks seed 2
    assert chain["lip"][0] == pytest.approx(13 / 3)
    middle, low, high = everything["lip"]  # of 1.5 and 4.5
    half = 12.706 * math.sqrt(4.5 / 2)  # Student's t of one degree of freedom
    assert (middle, low, high) == pytest.approx((3, 3 - half, 3 + half), rel=1e-4)


def test_a_stopped_command_goes_on(tmp_path, monkeypatch, capsys):
    made, path = [], tmp_path / "bound.csv"

    def run(fields, window, seed, budget):
        made.append((fields["task.name"], window, seed))
        return {"cuts": 1, "edges": 1} | dict.fromkeys(NUMBERS, 0.5)

    monkeypatch.setattr(bound_in_practice, "run", run)
    monkeypatch.setattr(bound_in_practice, "prepare", lambda task, fields: ({"task.name": task}, {}))
    assert bound_in_practice.main(["--tasks", "chain", "--seeds", "1", "--out", str(path)]) == 0
    path.write_text(path.read_text() + "fork,1024,16,0,0.3")  # torn by a kill
    made.clear()
    assert bound_in_practice.main(["--tasks", "chain", "fork", "--seeds", "1", "--out", str(path)]) == 0
    assert made == [("fork", 16, 0), ("fork", 64, 0)]
    assert bound_in_practice.main(["--seeds", "0", "--out", str(path)]) == 0
    assert len(made) == 2
    assert "lip +0.500" in capsys.readouterr().out


def test_the_committed_runs_are_whole_and_balanced():
    with bound_in_practice.PATH.open(newline="") as file:
        rows = list(csv.DictReader(file))
    keys = {tuple(r[k] for k in bound_in_practice.KEY) for r in rows}
    seeds = {r["seed"] for r in rows}
    assert keys == {(task, "1024", window, seed) for task in TASKS for window in ("16", "64") for seed in seeds}
    assert len(keys) == len(rows)
    assert len(seeds) >= 3
    assert {r["command"] for r in rows} == {"python -m benchmarks.bound_in_practice"}
