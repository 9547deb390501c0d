"""benchmarks/ablations.py: whole runs only, resumed and counted; the statistics against scipy and by hand; one real tiny run."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest
import scipy.stats
from helpers import one_thread  # noqa: F401  (a fixture)
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import ablations, equal_tokens, workers
from benchmarks.ablations import ARMS, COMPARISONS
from benchmarks.equal_tokens import COLUMNS, NUM_MARKS, SHARED, Job, Score, prepare
from benchmarks.paired import verdict
from tppo_ref.method.errors import UserError
from tppo_ref.runs.comparison import mean_interval
from tppo_ref.runs.config import Config, apply_method
from tppo_ref.runs.parsing import field_paths, get_field

BUDGET = 3000
START = {"eval/accuracy": 0.25, "eval/length_mean": 10.0}


def job(task="chain", arm="tppo", seed=0, **fields) -> Job:
    return Job(
        task=task,
        arm=arm,
        what=ARMS[arm],
        seed=seed,
        budget_tokens=BUDGET,
        fields={"task.name": task, "model.value": "critic", **fields},
        start=START,
    )


def rows_of(some: Job, accuracy=(0.25, 0.5, 0.5, 0.75), tokens=(0, 1000, 2000, 3000)):
    numbers = zip(accuracy, tokens, strict=True)
    return [
        some.row(mark, accuracy=a, generated_tokens=t, cut_share=math.nan, explained_variance=math.nan)
        for mark, (a, t) in enumerate(numbers)
    ]


# ------------------------------------------------------------------------------------------------------------- arms and comparisons


def test_every_arm_differs_from_its_method_in_the_fields_that_it_names_and_in_no_other():
    for name, arm in ARMS.items():
        plain = apply_method(Config(), arm.method, strict=False)
        config = job(arm=name).config()
        shared = ("task.name", "model.value", "run.seed", "run.out")
        differ = {p for p in field_paths(Config) if get_field(config, p) != get_field(plain, p) and p not in shared}
        assert differ == set(arm.fields) - {"model.value"}, name
        assert (config.model.value is None) == name.startswith("cold"), name


def test_every_comparison_is_of_arms_that_exist_and_every_arm_is_compared():
    assert {c.arm for c in COMPARISONS} | {"tppo"} == set(ARMS)
    assert {c.base for c in COMPARISONS} <= set(ARMS)
    assert {c.question for c in COMPARISONS} == {"3", "4", "5", "6", "7", "8", "P7"}
    assert len(set(COMPARISONS)) == len(COMPARISONS)


def test_windows_end_at_the_marks_so_that_none_of_them_gets_more_tokens_than_another():
    slots = Config().rollout.slots
    for name in ("tppo", "window-16", "window-32", "window-320"):  # 128 ends at every other one: the rest is interpolated
        assert equal_tokens.BUDGET / NUM_MARKS % (slots * job(arm=name).config().rollout.window) == 0, name
    assert job(arm="window-320").config().rollout.window == Config().rollout.max_response_tokens


def test_settings_change_with_what_decides_the_numbers_and_not_with_folders_or_seeds():
    same = {
        job().settings(),
        job(seed=3).settings(),
        job(**{"run.out": "x", "run.cache": "y", "model.value": "elsewhere"}).settings(),
    }
    others = [job(arm=a).settings() for a in ARMS if a != "tppo"] + [
        job(**{"policy.lr": 1e-9}).settings(),
        job(**{"run.eval_prompts": 3}).settings(),
    ]
    assert len(same) == 1
    assert len(same | set(others)) == 1 + len(others)


# ----------------------------------------------------------------------------------------------------------- whole runs, resumed

FAKE_WORKER = """
import json, os, sys, time
for line in sys.stdin:
    job = json.loads(line)
    if job["arm"] == "ppo": os._exit(3)
    if job["arm"] == "tail-none": print(json.dumps({"error": "NonFiniteError: step 3"}), flush=True); continue
    if job["arm"] == "tail-defer": time.sleep(60)
    print(json.dumps({"rows": job["start"]["rows"]}), flush=True)
"""
COMMAND = (sys.executable, "-c", FAKE_WORKER)


def fake(some: Job) -> Job:
    """A job that the fake worker answers with its rows."""
    return Job(**{**vars(some), "start": {"rows": rows_of(some)}})


@pytest.mark.parametrize("num_workers", [1, 2])
def test_whole_runs_are_appended_and_failed_ones_named_with_their_reason(tmp_path, num_workers):
    path = tmp_path / "new" / "ablations.csv"
    arms = ["tppo", "ppo", "zero-cut", "tail-none", "partial-is"]
    failed = workers.run_all([fake(job(arm=arm)) for arm in arms], path, num_workers, COMMAND)
    assert sorted(failed) == ["chain ppo seed 0: its process ended with code 3", "chain tail-none seed 0: NonFiniteError: step 3"]
    rows, others = equal_tokens.read_whole(path)
    assert others == 0
    assert sorted({row["arm"] for row in rows}) == ["partial-is", "tppo", "zero-cut"]
    assert [row for row in rows if row["arm"] == "tppo"] == [pytest.approx(row, nan_ok=True) for row in rows_of(job())]


def test_ctrl_c_keeps_what_is_whole_and_leaves_no_worker_behind(tmp_path, monkeypatch):
    path, started = tmp_path / "ablations.csv", []
    popen = workers.subprocess.Popen
    monkeypatch.setattr(workers.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])

    def interrupt():
        while not path.exists():
            time.sleep(0.02)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        workers.run_all([fake(job()), fake(job(arm="tail-defer")), fake(job(arm="ppo"))], path, 1, COMMAND)
    time.sleep(0.5)  # in which nobody may begin the third
    assert [process.wait(timeout=5) for process in started] == [-signal.SIGKILL]
    assert len(equal_tokens.read_whole(path)[0]) == NUM_MARKS + 1


def test_a_file_cut_off_at_any_byte_keeps_its_whole_runs_and_is_made_whole_again(tmp_path):
    path, runs = tmp_path / "ablations.csv", [rows_of(job(arm=arm)) for arm in ("tppo", "ppo", "zero-cut")]
    for run in runs:
        equal_tokens.append(path, run)
    whole = path.read_text()
    ends = [0] + [sum(len(line) + 1 for line in whole.splitlines()[: 1 + (i + 1) * (NUM_MARKS + 1)]) for i in range(3)]
    for size in sorted({*range(len(whole.splitlines()[0]) + 1, len(whole), 9), *ends[1:], *(end - 1 for end in ends[1:])}):
        path.write_text(whole[:size])
        kept = equal_tokens.keep_whole(path)
        assert len(kept) == (NUM_MARKS + 1) * sum(size >= end for end in ends[1:]), size
        for run in runs[len(kept) // (NUM_MARKS + 1) :]:
            equal_tokens.append(path, run)
        assert path.read_text() == whole


def test_a_file_with_other_columns_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "ablations.csv"
    path.write_text("task,arm\nchain,tppo\n")
    with pytest.raises(UserError, match="expected the columns task, arm, seed"):
        equal_tokens.keep_whole(path)
    assert path.read_text() == "task,arm\nchain,tppo\n"


@pytest.fixture
def planned(monkeypatch):
    """plan() without models; the tasks that were prepared."""
    prepared = []

    def fake_prepare(task, fields):
        prepared.append(task)
        return {"task.name": task, "model.value": "critic", "run.eval_prompts": fields["run.eval_prompts"]}, START

    monkeypatch.setattr(equal_tokens, "prepare", fake_prepare)
    return prepared


def arguments(*extra):
    return ablations.parse_arguments(
        ["--tasks", "chain", "fork", "--arms", "tppo", "ppo", "--seeds", "2", "--budget", str(BUDGET), *extra]
    )


def plan(given, rows):
    return equal_tokens.plan(ablations.wanted(given), given.budget, rows)


def test_seeds_are_outermost_and_what_is_there_is_not_made_again(planned):
    jobs = plan(arguments(), [])
    assert [j.seed for j in jobs] == [0] * 4 + [1] * 4
    assert planned == ["chain", "fork"]
    done = [row for j in jobs[:4] for row in rows_of(j)]
    assert [j.key for j in plan(arguments(), done)] == [j.key for j in jobs[4:]]
    assert len(plan(arguments("--budget", "6000"), done)) == 8


def test_nothing_is_prepared_where_nothing_is_missing(planned):
    done = [row for j in plan(arguments(), []) for row in rows_of(j)]
    planned.clear()
    assert plan(arguments(), done) == []
    assert planned == []


def test_a_run_that_is_there_with_other_settings_is_refused(planned):
    done = [row | {"settings": "otherone"} for row in rows_of(plan(arguments(), [])[0])]
    with pytest.raises(UserError, match=r"--out: got runs of which chain tppo seed 0 is there with other settings; expected"):
        plan(arguments(), done)


def test_the_command_says_what_it_did_and_goes_on_where_it_was(planned, tmp_path, monkeypatch, capsys):
    real = workers.run_all
    monkeypatch.setattr(workers, "run_all", lambda jobs, path, n: real([fake(j) for j in jobs], path, n, COMMAND))
    line = [
        "--tasks",
        "chain",
        "--arms",
        "tppo",
        "zero-cut",
        "ppo",
        "--seeds",
        "2",
        "--budget",
        str(BUDGET),
        "--out",
        str(tmp_path),
    ]
    assert ablations.main(line) == 1  # both runs of ppo crash
    assert "4 runs made, 2 failed" in capsys.readouterr().out
    monkeypatch.setitem(ARMS, "tppo", ARMS["tppo"])
    assert ablations.main([*line, "--arms", "tppo", "zero-cut"]) == 0
    assert "0 runs made, 0 failed" in capsys.readouterr().out
    with (tmp_path / "ablations_summary.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert {(r["task"], r["arm"], r["n"], r["verdict"]) for r in table} == {
        ("chain", "zero-cut", "2", "equal"),  # the fake worker's runs are all the same
        ("all", "zero-cut", "2", "equal"),
    }


def test_a_worker_answers_a_job_that_cannot_run_with_the_reason_and_goes_on():
    broken, out = json.dumps(vars(job(**{"run.cache": "/proc/nowhere", "model.value": None}))), io.StringIO()
    workers.serve([broken, broken], out)
    for line in out.getvalue().splitlines(keepends=True):
        assert line.endswith("\n")
        assert "run.cache: got /proc/nowhere; expected" in json.loads(line)["error"]
    assert out.getvalue().count("\n") == 2


# ------------------------------------------------------------------------------------------------------------------- statistics


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(-1, 1).map(lambda x: round(x, 3)), min_size=2, max_size=9))
def test_the_interval_is_scipys(differences):
    middle, low, high = mean_interval(differences)
    assert middle == pytest.approx(np.mean(differences))
    if len(set(differences)) > 1:
        test = scipy.stats.ttest_1samp(differences, 0.0)
        between = test.confidence_interval(0.95)
        found = low, high, ablations.p_value(differences)
        assert found == pytest.approx((between.low, between.high, test.pvalue), rel=1e-6, abs=1e-9)


def test_the_interval_of_a_worked_example():
    # Mean 2, standard deviation 1, standard error 1/sqrt(3), t(2, 0.975) = 4.3027.
    middle, low, high = mean_interval([1.0, 2.0, 3.0])
    assert (middle, low, high) == pytest.approx((2.0, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [([0.1], "undecided"), ([0.1, 0.1], "better"), ([-0.1, -0.1], "worse"), ([0.0, 0.0], "undecided"), ([0.1, -0.1], "undecided"), ([0.1, 0.3], "undecided"),
     ([0.1, 0.11, 0.12], "better"), ([-0.1, -0.11, -0.12], "worse")],
)  # fmt: skip
def test_a_verdict_needs_two_seeds_and_an_interval_without_zero(differences, expected):
    _, low, high = mean_interval(differences)
    assert verdict(low, high) == expected


def test_the_score_of_a_worked_example():
    # Trapezoids over thirds: (.25 + .5)/2, .5, (.5 + .75)/2, their mean; final: the mean at 2000 and 3000 tokens.
    assert equal_tokens.score(rows_of(job())) == pytest.approx(Score(area=(0.375 + 0.5 + 0.625) / 3, final=0.625))


def test_a_run_that_overshoots_its_marks_is_read_at_the_marks():
    # Accuracy is a line in the tokens, wherever it is evaluated: 0 at 0, 0.6 at 3000.
    tokens = (0, 1100, 2600, 3500)
    overshot = equal_tokens.score(rows_of(job(), [t * 2e-4 for t in tokens], tokens))
    assert overshot == pytest.approx(Score(area=0.3, final=0.5))


def test_the_summary_pairs_seeds_and_counts_only_those_that_both_arms_have():
    def run(task, arm, seed, level):
        return rows_of(job(task, arm, seed), (level,) * (NUM_MARKS + 1))

    rows = [
        *run("chain", "tppo", 0, 0.5), *run("chain", "tppo", 1, 0.3), *run("chain", "tppo", 2, 0.9),
        *run("chain", "zero-cut", 0, 0.4), *run("chain", "zero-cut", 1, 0.22),
        *run("fork", "tppo", 0, 0.5), *run("fork", "zero-cut", 0, 0.7), *run("fork", "zero-cut", 5, 0.0),
    ]  # fmt: skip
    table = {r["task"]: r for r in ablations.summary(rows, BUDGET) if r["metric"] == "final"}
    assert set(table) == {"chain", "fork", "all"}
    assert {r["arm"] for r in table.values()} == {"zero-cut"}
    chain, fork, both = table["chain"], table["fork"], table["all"]
    assert (chain["n"], chain["mean_difference"], chain["arm_mean"], chain["base_mean"]) == (2, -0.09, 0.31, 0.4)
    half = 12.7062 * 0.01  # t(1, 0.975), standard error |0.1 - 0.08| / 2
    assert (chain["low"], chain["high"]) == pytest.approx((-0.09 - half, -0.09 + half), abs=1e-4)
    assert chain["verdict"] == "undecided"
    assert (fork["n"], fork["mean_difference"], fork["verdict"]) == (1, 0.2, "undecided")
    assert (both["n"], both["mean_difference"]) == (1, 0.05)  # seed 0: (-0.1 + 0.2) / 2
    assert ablations.summary(rows, 1) == []


def test_a_row_of_the_summary_says_equal_within_the_margin_and_how_many_seeds_would_decide():
    """Differences 0.1, 0.1, 0.4: mean 0.2, deviation 0.1732. Decided at an interval of 0.2 on either side, which t(4) = 2.776 of five
    seeds is not narrow enough for (0.2150), and t(5) = 2.571 of six is (0.1818)."""

    def row(*differences):
        found = ablations.compared([(0.5 + d, 0.5) for d in differences])
        return found["verdict"], found["seeds_needed"]

    assert row(0.1, 0.1, 0.4) == ("undecided", 6)
    assert row(0.1, 0.11, 0.12) == ("better", 0)
    assert row(0.001, 0.0012, 0.0008) == ("equal", 0)  # though its interval leaves out 0
    assert (row(0.001, -0.001)[0], row(0.0, 0.0)[0]) == ("undecided", "equal")
    assert row(0.2) == ("undecided", 0)  # of one seed no deviation is known


# ------------------------------------------------------------------------------------------------------------------ a real run

TINY = {
    "task.name": "length", "model.warm_start_steps": 2, "model.hidden_size": 16, "model.num_layers": 1, "model.num_heads": 2, "rollout.slots": 6,
    "rollout.max_response_tokens": 100, "rollout.window": 20, "value.pretrain_responses": 8, "value.pretrain_epochs": 1, "run.eval_prompts": 2,
    **SHARED,
}  # fmt: skip


@pytest.mark.usefixtures("one_thread")
def test_a_real_run_gives_whole_reproducible_rows_and_refuses_failed_verifications(tmp_path):
    fields, start = prepare("length", {**TINY, "run.cache": str(tmp_path)})
    some = Job(
        task="length",
        arm="cold-critic-warmup",
        what=ARMS["cold-critic-warmup"],
        seed=1,
        budget_tokens=1500,
        fields=fields,
        start=start,
    )
    rows, again = equal_tokens.run_one(some), equal_tokens.run_one(some)
    table = tmp_path / "ablations.csv"
    equal_tokens.append(table, json.loads(json.dumps(rows)))  # as they come from a worker
    assert equal_tokens.read_whole(table)[1] == 0
    for row in (*rows, *again):
        assert tuple(row) == COLUMNS
        assert row.pop("cpu_s") >= 0
    assert [pytest.approx(row, nan_ok=True) for row in rows] == again
    assert [row["mark"] for row in rows] == list(range(NUM_MARKS + 1))
    assert [row["final"] for row in rows] == [0] * NUM_MARKS + [1]
    assert rows[0]["accuracy"] == round(start["eval/accuracy"], 5)
    assert all(row["generated_tokens"] == row["steps"] * 6 * 20 >= 500 * row["mark"] for row in rows)
    assert all(row["decode_steps"] == row["steps"] * 20 for row in rows)
    assert rows[2]["trained_tokens"] == 0 < rows[3]["trained_tokens"], "10 steps of 120 tokens warm the critic up"
    broken = Job(**{**vars(some), "fields": {**fields, "task.verifier": "json:loads"}})
    with pytest.raises(RuntimeError, match="verifications failed"):
        equal_tokens.run_one(broken)
