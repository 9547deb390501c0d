"""benchmarks/dropped_gradient.py: cells add up to the batch's gradient, the numbers by hand, a run and its going on."""

from __future__ import annotations

import copy
import csv
import math

import pytest
import torch
from helpers import RecordingParallel, make_trainer

from benchmarks import dropped_gradient
from benchmarks.dropped_gradient import Cell, Pair, cell_gradients, earlier_windows, numbers, pairs_of


def test_a_window_is_counted_by_those_before_it():
    # A first window of 5 of 16 tokens, since its slot was refilled within it; then whole ones.
    settled = [0, 5, 5 + 16, 5 + 2 * 16, 5 + 3 * 16, 5 + 7 * 16, 5 + 40 * 16]
    assert [dropped_gradient.EARLIER[earlier_windows(n, 16)] for n in settled] == ["0", "1", "2-3", "2-3", "4-7", "8+", "8+"]


@pytest.mark.parametrize("constant", [False, True])
def test_the_cells_add_up_to_the_gradient_of_the_policys_first_update(constant):
    parallel = RecordingParallel()
    trainer = make_trainer(
        "tppo", parallel=parallel, policy__lm_loss_weight=0.0, policy__prefix="constant" if constant else "full"
    )  # fmt: skip
    for _ in range(3):
        trainer.step()
    before, seen = copy.deepcopy(trainer.policy_learner.module), []
    trainer.observer = lambda rows, forward, advantages, batch: seen.append(
        cell_gradients(before, rows, advantages.scaled_BT, 6, constant=constant)
    )
    trainer.step()
    (cells,) = seen
    assert {cell.earlier for cell in cells} > {0}
    assert {cell.quarter for cell in cells} >= {0, 1, 2}
    expected = parallel.of(trainer.policy_learner.module)[-1]
    torch.testing.assert_close(sum(cells.values()), torch.cat([g.flatten() for g in expected]), rtol=1e-4, atol=1e-6)


def test_parts_and_numbers_by_hand():
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    full = {Cell(0, 1, 0): 3 * x, Cell(2, 1, 1): 4 * y}
    constant = {Cell(0, 1, 0): 3 * x, Cell(2, 1, 1): 0 * y}
    pairs = pairs_of(full, constant)
    assert set(pairs) == {"all", "earlier 0", "earlier 2-3", "quarter 2"}
    found = numbers([pairs["all"], Pair(3 * x, -4 * y, 3 * x)])
    assert [found["cosine"], found["norm_ratio"]] == pytest.approx([3 / 5, 3 / 5])
    assert found["noise"] == pytest.approx(4 / 5)  # |4 y| / |3 x - 4 y|
    assert found["halves"] == 0
    assert [found["sum_cosine"], found["sum_norm_ratio"]] == pytest.approx([1, 1]), "what is dropped cancels over the two batches"
    assert math.isnan(numbers([pairs["quarter 2"]])["cosine"]), "nothing is left to compare"


def test_a_run_goes_on_and_one_without_its_end_is_made_again(tmp_path, monkeypatch, capsys):
    made = []

    def run(fields, window, seed, budget):
        made.append((fields["task.name"], window, seed))
        key = {"task": fields["task.name"], "window": window, "seed": seed}
        numbers = dict.fromkeys(("cosine", "norm_ratio", "noise", "halves", "sum_cosine", "sum_norm_ratio"), 0.5)
        return [{**key, "quarter": q, "part": part, **numbers} for q in (1, 4) for part in ("all", "quarter 4")]

    monkeypatch.setattr(dropped_gradient, "run", run)
    monkeypatch.setattr(dropped_gradient, "prepare", lambda task, fields: ({"task.name": task}, {}))
    path = tmp_path / "some.csv"
    command = ["--tasks", "chain", "fork", "--windows", "16", "--out", str(path), "--seeds"]
    assert dropped_gradient.main([*command, "1"]) == 0
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n")
    assert dropped_gradient.main([*command, "2"]) == 0
    assert made == [("chain", 16, 0), ("fork", 16, 0), ("fork", 16, 0), ("chain", 16, 1), ("fork", 16, 1)]
    with path.open() as file:
        assert len(list(csv.DictReader(file))) == 16
    assert path.with_suffix(".png").exists()
    assert "cosine 0.5000" in capsys.readouterr().out


def test_a_window_of_fewer_than_four_tokens_is_refused(capsys):
    with pytest.raises(SystemExit):
        dropped_gradient.main(["--windows", "3"])
    assert "windows: got 3; expected at least 4 tokens" in capsys.readouterr().err
