"""benchmarks/fair_headline.py and arrivals.py: equal grids, arrivals by hand, tuning, going on, and the committed tables."""

from __future__ import annotations

import csv
import json
import math

import numpy as np
import pytest

from benchmarks import arrivals, fair_headline, fair_told
from benchmarks.arrivals import Arrival, Curve, area, arrival, ratio, rows_of, smooth
from benchmarks.common import RESULTS
from benchmarks.equal_tokens import append
from benchmarks.fair_headline import CANDIDATES, ENGINE, HOLDS, Book, Job, choice, choice_jobs, chosen, grid, tune, variants
from tppo_ref.runs.config import Config, apply_method
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.validation import check, check_training


def made(seconds, accuracy, *, rate=100.0) -> Curve:
    """A run with `rate` generated tokens a second, half of them trained."""
    clock = np.array(seconds, dtype=float)
    return Curve(clock, np.array(accuracy, dtype=float), rate * clock, rate / 2 * clock)


def area_runs(scores):
    """Runs whose area is scores(job), and the jobs that were asked for."""
    asked: list[Job] = []

    def runs(job):
        asked.append(job)
        return made([0, job.budget_s], [scores(job)] * 2)

    return runs, asked


# ---------------------------------------------------------------------------------------------------------------- what is run


@pytest.mark.parametrize("arm", HOLDS)
def test_both_methods_have_as_many_cells_and_each_of_them_can_run(arm):
    cells = grid(arm, ENGINE)
    cells += variants(arm, cells[-1])
    assert len({json.dumps(c) for c in cells}) == len(cells) == 10
    for cell in cells:
        fields = cell | {"model.value": None}
        config = replace_fields(apply_method(Config(), "ppo" if arm == "ppo" else "tppo", strict=False), fields)
        check(config)
        check_training(config)
        assert cell["policy.old_logprobs"] == "engine"


def test_tuning_goes_from_the_grids_best_cell_to_its_variants():
    cells = grid("ppo", ENGINE)
    likes = {json.dumps(cells[1]): 0.6, json.dumps(variants("ppo", cells[1])[2]): 0.7}
    runs, asked = area_runs(lambda job: likes.get(job.cell, 0.4))
    assert tune("chain", "ppo", ENGINE, runs) == cells[1] | {"policy.mini_batch_tokens": 1000}
    assert len(asked) == 10
    assert {(job.seed, job.budget_s) for job in asked} == {(100, fair_headline.BUDGETS_S["chain"] / 2)}
    assert json.loads(asked[9].cell)["policy.lr"] == 1e-3  # 5/3 of cell 1's


def test_the_choice_is_the_largest_mean_and_never_the_paper_itself():
    runs, asked = area_runs(lambda job: {"tppo": 0.9, "c": 0.5, "cf": 0.6 + 0.1 * (job.task == "fork"), "ac": 0.62}[job.arm])
    rows = choice(runs)
    assert asked == choice_jobs()
    assert chosen(rows) == "cf"  # 0.633 over tasks, though ac is better on two of them
    (all_tasks,) = (r for r in rows if (r["score"], r["candidate"], r["task"]) == ("seconds", "c", "all"))
    assert all_tasks["difference"] == pytest.approx(-0.4)
    assert (all_tasks["seeds"], all_tasks["verdict"]) == (2, "worse")


def test_runs_that_are_whole_are_read_back_and_the_others_are_not_made_unasked(tmp_path):
    path = tmp_path / "runs.csv"
    job = Job("headline", "chain", "ppo", json.dumps({"policy.lr": 0.1}), 3, 4.0)
    rows = [job._asdict() | {"seconds": s, "accuracy": s / 10, "generated": 7, "trained": 5} for s in (0.0, 2.0, 4.0)]
    append(path, rows, list(rows[0]))
    with path.open("a") as file:
        file.write("headline,chain,pp")  # a kill in the middle of a write
    again = Book(path, None)
    assert again(job).accuracy.tolist() == [0.0, 0.2, 0.4]
    with pytest.raises(KeyError):
        again(job._replace(seed=4))


@pytest.mark.parametrize(("argv", "line"), [
    (["--report"], "--results: got no whole seed of the candidates; expected at least one"),
    (["--report", "--task", "fork"], "--task: got fork, which is not tuned; expected one that is"),
    (["--report", "--task", "chain", "--seeds", "1"], "--task: got chain with 1 whole seeds; expected at least 2"),
])  # fmt: skip
def test_what_is_not_there_is_one_line_and_leaves_tables_alone(argv, line, tmp_path, capsys):
    """Of the committed runs the first case has none, the second none of fork's tuning."""
    with (RESULTS / "fair-headline-runs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = [r for r in rows if not (r["task"] == "fork" and r["stage"] == "tune")] if "--task" in argv else []
    append(tmp_path / "fair-headline-runs.csv", kept, list(rows[0]))
    assert fair_headline.main([*argv, "--results", str(tmp_path)]) == 2
    told = [text for text in capsys.readouterr().err.splitlines() if text.startswith("error: ")]
    assert len(told) == 1
    assert line in told[0]
    assert not [path for path in tmp_path.glob("fair-headline-*.csv") if path.stem[14:] in fair_headline.TASKS]


# ------------------------------------------------------------------------------------------------------------- what came out


def test_an_arm_with_long_steps_does_not_wait_for_its_mark():
    """Both climb on the same line, one evaluated each 10 s, one each second: they arrive at the same time, and on the line."""
    long, short = (made(np.arange(0, 101, s), np.arange(0, 101, s) / 100) for s in (10, 1))
    a, b = (arrival(run, 0.5, budget_s=100) for run in (long, short))
    assert a == pytest.approx(b)
    assert a == pytest.approx((50.0, 5000.0, 2500.0), rel=0.01)
    assert area(long, 100) == pytest.approx(0.5, rel=1e-3)


def test_what_never_arrives_is_infinite_and_a_peak_shorter_than_the_span_is_no_arrival():
    flat = made([0, 50, 100], [0.2, 0.2, 0.2])
    assert arrival(flat, 0.3, 100) == Arrival(math.inf, math.inf, math.inf)
    assert smooth(flat, 100)[1] == pytest.approx(0.2)
    peak = made([0, 49, 50, 51, 100], [0, 0, 1, 0, 0])
    assert arrival(peak, 0.5, 100) == Arrival(math.inf, math.inf, math.inf)
    assert smooth(peak, 100)[1].max() == pytest.approx(1 / (100 * arrivals.SPAN), rel=0.05)  # a triangle of area 1 over the span


def test_ratios_by_hand():
    found = ratio([2.0, 8.0], [1.0, 2.0])  # logs: ln 2, ln 4; mean ln(2 sqrt 2), deviation ln 2 / sqrt 2, t of one degree 12.706
    assert found["value"] == pytest.approx(2 * math.sqrt(2))
    assert math.log(found["high"] / found["value"]) == pytest.approx(12.706 * math.log(2) / 2, rel=1e-4)
    assert found["verdict"] == "undecided"
    assert ratio([2.0, 2.001, 2.0], [1.0, 1.0, 1.0])["verdict"] == "better"
    assert ratio([1.0, 1.001, 1.0], [2.0, 2.0, 2.0])["verdict"] == "worse"
    assert {k: ratio([2.0, 2.1, 2.0], [1.0, 1.0, math.inf])[k] for k in ("reached", "verdict")} == {
        "reached": 2,
        "verdict": "not all arrive",
    }
    assert math.isnan(ratio([1.0], [math.inf])["value"])


def test_rows_hold_seconds_tokens_and_area_against_the_first_arm():
    """Straight lines, the second arm's twice as steep: means are the lines themselves."""
    seconds = np.arange(0, 101, 5)
    runs = {
        "ppo": {s: made(seconds, seconds / (160 + 2 * s)) for s in range(3)},
        "tppo-once": {s: made(seconds, seconds / (80 + s), rate=150) for s in range(3)},
    }
    rows = rows_of(runs, 100)
    found = {r["quantity"]: r for r in rows if r["seed"] == "all"}
    speed = found["seconds: ppo / tppo-once"]
    assert speed["value"] == pytest.approx(2, abs=0.01)
    assert (speed["verdict"], speed["reached"]) == ("better", 3)
    assert found["generated_tokens: ppo / tppo-once"]["value"] == pytest.approx(speed["value"] / 1.5, rel=1e-6)
    assert found["area: tppo-once - ppo"]["value"] == pytest.approx(np.mean([25 / (80 + s) for s in range(3)]), abs=1e-6)
    # The last moment that has all of its span is 90 s.
    assert {r["target"] for r in rows} == {round(0.95 * np.mean([90 / (160 + 2 * s) for s in range(3)]), 4)}
    assert len(rows) == 2 * 4 * 3 + 4


# --------------------------------------------------------------------------------------------------------- the committed tables


def test_tppo_once_is_the_candidate_that_was_chosen():
    runs = Book(RESULTS / "fair-headline-runs.csv", None)
    name = chosen(choice(runs))
    once, candidate = apply_method(Config(), "tppo-once"), replace_fields(Config(), CANDIDATES[name])
    assert (once.policy, once.value, once.rollout) == (candidate.policy, candidate.value, candidate.rollout)
    with (RESULTS / "fair-headline-choice.csv").open(newline="") as file:
        committed = list(csv.DictReader(file))
    for row, again in zip(committed, choice(runs), strict=True):
        assert {name: row[name] for name in again} == {name: str(x) for name, x in again.items()}


def csv_of(path, ppo, once, budget_s=10.0):
    """A table of seconds, as fair_headline writes one."""
    quantity = {"ppo": ppo, "tppo-once": once}
    rows = [{"arm": a, "quantity": "seconds", "seed": s, "value": x} for a, own in quantity.items() for s, x in enumerate(own)]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "budget_s"])
        writer.writeheader()
        writer.writerows(row | {"budget_s": budget_s} for row in rows)


def test_seeds_that_miss_bound_the_ratio_on_one_side(tmp_path, monkeypatch):
    """A run of ten seconds has means up to the ninth: a seed that misses arrives there at the earliest."""
    monkeypatch.setattr(fair_told, "RESULTS", tmp_path)
    cases = {
        "chain": ([4.0, math.inf, 8.0], [2.0, 3.0, 4.0], ("least", (2 * 3 * 2) ** (1 / 3))),
        "fork": ([4.0, 4.5, 8.0], [2.0, math.inf, 4.0], ("most", (2 * 0.5 * 2) ** (1 / 3))),
        "length": ([4.0, 4.5, 8.0], [2.0, 3.0, 4.0], None),
        "maze": ([4.0, math.inf, 8.0], [math.inf, 3.0, 4.0], None),
    }
    try:
        for task, (ppo, once, wanted) in cases.items():
            fair_told.committed.cache_clear()
            csv_of(tmp_path / f"fair-headline-{task}.csv", ppo, once)
            found = fair_told.bound(task)
            if wanted is None:
                assert found is None
            else:
                assert (found["side"], found["value"]) == (wanted[0], pytest.approx(wanted[1]))
                assert found["reached"] == 3
        assert fair_told.all_seeds("length", {"both": 3, "seeds": 3}) == "the same"
        assert fair_told.all_seeds("maze", {"both": 1, "seeds": 3}) == "not known: both miss some"
    finally:
        fair_told.committed.cache_clear()


@pytest.mark.parametrize("task", [task for task in fair_headline.TASKS if fair_told.found(task, "seconds")])
def test_the_committed_tables_are_of_the_committed_runs(task):
    runs = Book(RESULTS / "fair-headline-runs.csv", None)
    levers = {"ppo": ENGINE, "tppo-once": CANDIDATES[chosen(choice(runs))]}
    with (RESULTS / f"fair-headline-{task}.csv").open(newline="") as file:
        committed = list(csv.DictReader(file))
    for row, again in zip(committed, fair_headline.headline(task, levers, range(12), runs), strict=True):
        assert {name: row[name] for name in again} == {name: str(x) for name, x in again.items()}
