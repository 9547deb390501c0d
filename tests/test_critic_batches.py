"""benchmarks/critic_batches.py: scores and verdicts by hand, one run, going on where it stopped."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest
import scipy.stats

from benchmarks import critic_batches
from benchmarks.critic_batches import ARMS, MARGIN, STARTS, WORLDS, contrast, score, table


def test_scores_by_hand():
    found = score([-1.0, 0.0, 1.0, 0.5, 1.0], best=3.0)
    assert found["area"] == pytest.approx((0.25 + 0.5 + 0.375 + 0.5) / 4)
    assert found["final"] == pytest.approx(0.5)
    assert found["setback"] == pytest.approx(0.125)


@pytest.mark.parametrize(
    ("middle", "spread", "verdict"),
    [(0.0, 0.001, "equal"), (0.004, 0.0005, "equal"), (0.02, 0.01, "better"), (-0.02, 0.01, "worse"), (0.0, 0.1, "undecided")],
)
def test_verdicts(middle, spread, verdict):
    x = middle + spread * np.tile([-1.0, 1.0], 8)
    found = contrast(list(x))
    half = 2.1314 * spread * math.sqrt(16 / 15) / 4  # t of 15 degrees of freedom
    assert (found["low"], found["high"]) == (pytest.approx(middle - half, rel=1e-3), pytest.approx(middle + half, rel=1e-3))
    assert (found["verdict"], found["n"]) == (verdict, 16)
    assert (found["seeds_needed"] > 16) == (verdict == "undecided")


MANY = [
    (middle, deviation, num) for middle, deviation in ((0.0, 0.02), (0.004, 0.01), (0.02, 0.05), (-0.01, 0.05)) for num in (2, 4, 9)
]
FEW = [(middle, 0.02, 3) for middle in (0.01, 0.015, 0.018, 0.02, 0.022, 0.025)]  # where a degree of freedom is a seed


@pytest.mark.parametrize(("middle", "deviation", "num"), MANY + FEW)
@pytest.mark.parametrize("level", [0.95, 1 - 0.05 / 6])
def test_as_many_seeds_as_it_says_decide_at_this_deviation_and_one_less_does_not(middle, deviation, level, num):
    """From few seeds, too, whose quantile of t is far above that of the number that is asked for."""
    x = middle + deviation * np.tile([-1.0, 1.0], num)[:num]
    x = x - x.mean() + middle
    found, width = contrast(list(x), level), np.std(x, ddof=1)

    def decided(seeds: int) -> bool:
        low, high = scipy.stats.t.interval(level, seeds - 1, middle, width / math.sqrt(seeds))
        return low > 0 or high < 0 or max(high, -low) <= MARGIN

    assert found["verdict"] == "undecided"
    assert decided(found["seeds_needed"])
    assert not decided(found["seeds_needed"] - 1) or found["seeds_needed"] == 2


def rows(effect: float) -> list[dict]:
    """Held is better by `effect` in every world, in area."""
    return [
        {"world": w, "start": b, "arm": a, "seed": s, "area": 0.5 + effect * (a == "held") + 0.1 * s, "final": 1, "setback": 0, "critic_rms": 0.2}
        for w in WORLDS for b in STARTS for a in ARMS for s in range(3)
    ]  # fmt: skip


def test_the_table_pairs_seeds_and_marks_four_primary_contrasts():
    found = table(rows(0.03)[:-1])  # the last seed lacks a run: it is left out everywhere
    primary = [r for r in found if r["primary"]]
    assert [(r["question"], r["arm"], r["start"]) for r in primary] == [
        (6, "held", "zero"),
        (6, "held", "warm"),
        (7, "joint", "zero"),
        (7, "joint", "warm"),
    ]
    assert {(r["world"], r["score"]) for r in primary} == {("all", "area")}
    assert [r["difference"] for r in primary] == pytest.approx([0.03, 0.03, 0, 0])
    assert {r["n"] for r in found} == {2}
    assert table([]) == []


def test_more_area_is_better_and_more_of_an_error_or_of_a_setback_is_worse():
    made = [r | {"setback": r["area"], "critic_rms": r["area"]} for r in rows(0.03)]
    verdicts = {r["score"]: r["verdict"] for r in table(made) if (r["world"], r["arm"], r["start"]) == ("all", "held", "zero")}
    assert verdicts == {"area": "better", "final": "equal", "setback": "worse", "critic_rms": "worse"}


def test_a_run_is_a_row_and_the_same_command_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(critic_batches, "STEPS", 4)
    monkeypatch.setattr(critic_batches, "WORLDS", {"early-decision": WORLDS["early-decision"]})
    path = tmp_path / "runs.csv"
    made, run = [], critic_batches.run
    monkeypatch.setattr(critic_batches, "run", lambda *job: made.append(job) or run(*job))
    assert critic_batches.main(["--seeds", "1", "--out", str(path)]) == 0
    assert len(made) == 6
    with path.open() as file:
        there = list(csv.DictReader(file))
    assert [(r["start"], r["arm"]) for r in there] == [(b, a) for b in STARTS for a in ARMS]
    held = [r for r in there if r["arm"] == "held"]
    means = {r["start"]: float(r["value_responses"]) for r in held}
    assert set(means) == set(STARTS)
    assert all(mean > 0 and mean % 8 == 0 for mean in means.values()), "a mean of four steps, in each one batch of 32 or none"
    assert all(float(r["value_responses"]) % 8 for r in there if r["arm"] == "all"), "some ended in each window"
    path.write_text(path.read_text()[:-5])  # a kill tore the last line
    assert critic_batches.main(["--seeds", "1", "--out", str(path)]) == 0
    assert made[6:] == made[5:6]
    assert "question 6" in capsys.readouterr().out
