"""benchmarks/factorial.py: what its arms are, and its contrasts by hand."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from scipy import stats

from benchmarks import equal_tokens, workers
from benchmarks.common import RESULTS
from benchmarks.equal_tokens import BUDGET, NUM_MARKS, Job
from benchmarks.factorial import CELLS, CONTRASTS, CRITICS, CUTS, NEW_TASKS, STUDIES, TASKS, WINDOWS, arm, main, name
from benchmarks.study import table as study_table


def rows_of(task, cell, seed, accuracy):
    """A run of that accuracy from beginning to end: its area is the accuracy."""
    start = {"eval/accuracy": accuracy, "eval/length_mean": 1.0}
    job = Job(task=task, arm=name(cell), what=arm(cell), seed=seed, budget_tokens=BUDGET, fields={"task.name": task}, start=start)
    return [job.row(mark, accuracy=accuracy, generated_tokens=BUDGET * mark // NUM_MARKS) for mark in range(NUM_MARKS + 1)]


def table(rows, wanted=32, tasks=TASKS):
    return study_table(STUDIES[tasks]._replace(seeds=wanted), rows)


def world(effect, seeds, tasks=TASKS):
    return [
        row
        for seed, cell, task in itertools.product(range(seeds), CELLS, tasks)
        for row in rows_of(task, cell, seed, effect(task, cell, seed))
    ]


def test_an_arm_is_the_cut_rule_the_window_and_no_tail():
    wanted = {"previous": "previous", "critic": "critic", "zero": "zero"}
    for cut, critic, window in CELLS:
        job = Job(task="chain", arm="x", what=arm((cut, critic, window)), seed=0, budget_tokens=1, fields={}, start={})
        config = job.config()
        assert (config.advantage.cut_value, config.advantage.tail_tokens, config.rollout.window) == (wanted[cut], 0, window)
    assert len({name(cell) for cell in CELLS}) == len(CELLS) == len(CUTS) * len(CRITICS) * len(WINDOWS)


def test_each_contrast_finds_its_own_effect_and_no_other():
    """Effects put in by hand: 0.08 for "critic" with the strong critic, 0.02 less with the weak one, 0.1 less for zero, 0.04 for the
    window of 64, 0.06 for the strong critic; a level per seed and task, which no contrast may see."""

    def effect(task, cell, seed):
        cut, critic, window = cell
        inner = {"critic": 0.08 if critic == "strong" else -0.02, "zero": -0.1, "previous": 0.0}[cut]
        return 0.3 + inner + 0.04 * (window == 64) + 0.06 * (critic == "strong") + 0.01 * seed * (2 if task == "fork" else 1)

    found = {r["contrast"]: r["difference"] for r in table(world(effect, 3))}
    assert list(found) == list(CONTRASTS)
    assert list(found.values()) == pytest.approx([0.10, -0.02, 0.08, -0.1, -0.04, 0.06], abs=1e-4)


def test_intervals_are_students_over_seeds_at_the_shared_level_and_no_verdict_comes_early():
    jitter = np.random.default_rng(0).normal(0.05, 0.01, 5)

    def effect(task, cell, seed):
        return 0.5 + (float(jitter[seed]) if cell[0] == "zero" else 0.0)

    row = {r["contrast"]: r for r in table(world(effect, 5))}["zero - previous"]
    rounded = np.round(0.5 + jitter, 5) - 0.5
    low, high = stats.t.interval(1 - 0.05 / 6, 4, rounded.mean(), stats.sem(rounded))
    assert (row["low"], row["high"], row["n"], row["verdict"]) == (pytest.approx(low), pytest.approx(high), 5, "not yet")
    assert {r["contrast"]: r for r in table(world(effect, 5), wanted=5)}["zero - previous"]["verdict"] == "better"


def test_a_seed_that_lacks_a_run_is_left_out():
    rows = world(lambda task, cell, seed: 0.5, 3)
    short = [r for r in rows if not (r["seed"] == 1 and r["arm"] == name(CELLS[3]) and r["task"] == "fork")]
    assert {r["n"] for r in table(short)} == {2}


def test_the_new_tasks_are_a_study_of_their_own(monkeypatch, capsys):
    """No run of one study counts in the other, and no half of a study is run: its contrasts are over both of its tasks."""
    both = world(lambda task, cell, seed: 0.5 + 0.1 * (cell[0] == "critic") * (task in NEW_TASKS), 2, (*TASKS, *NEW_TASKS))
    for tasks, effect in ((TASKS, 0.0), (NEW_TASKS, 0.1)):
        assert table(both, tasks=tasks)[1]["difference"] == pytest.approx(effect)
        assert (RESULTS.parent / "prestated" / STUDIES[tasks].plan).read_text().count("\n")
    asked = []
    monkeypatch.setattr(equal_tokens, "prepare", lambda task, fields: ({"task.name": task}, {}))
    monkeypatch.setattr(workers, "run_all", lambda jobs, path, num: asked.append(({job.task for job in jobs}, path.name)) or [])
    monkeypatch.setattr(workers, "keep_whole", lambda path: [])
    assert main(["--tasks", *NEW_TASKS, "--seeds", "1"]) == 0
    assert main(["--seeds", "1"]) == 0
    assert asked == [(set(NEW_TASKS), "factorial-new-tasks.csv"), (set(TASKS), "factorial.csv")]
    with pytest.raises(SystemExit):
        main(["--tasks", "maze"])
    assert "--tasks: got maze; expected chain fork or maze brackets" in capsys.readouterr().err


def test_wrong_numbers_are_refused(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--seeds", "-1"])
    assert stopped.value.code == 2
    assert "--seeds: got -1; expected an integer of at least 0" in capsys.readouterr().err


def test_a_table_of_something_else_is_refused_in_one_line(tmp_path, capsys):
    path = tmp_path / "runs.csv"
    path.write_text("task,arm\nchain,tppo\n")
    assert main(["--out", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --out: got {path} with others; expected the columns task, arm")
    assert path.read_text() == "task,arm\nchain,tppo\n"


BASES = {"chain": "chain-74ed860129820911", "fork": "fork-3e7342ca34409d5f"}  # of the runs in the table


def test_a_field_that_came_later_leaves_the_settings_of_earlier_runs_what_they_were():
    """Else a study that is made in several sittings could not go on; a run that uses the field has settings of its own."""
    kept = {(r["task"], r["arm"]): r["settings"] for r in equal_tokens.read_whole(RESULTS / "factorial.csv")[0] if r["seed"] == 0}
    assert len(kept) == len(TASKS) * len(CELLS)
    for task, cell in itertools.product(TASKS, CELLS):
        fields = {"run.cache": "x", "run.eval_prompts": 256, "run.eval_samples": 4, **equal_tokens.SHARED, "task.name": task,
                  "value.pretrain_responses": CRITICS[cell[1]], "model.policy": f"x/{BASES[task]}", "model.value": "x"}  # fmt: skip
        job = Job(task=task, arm=name(cell), what=arm(cell), seed=0, budget_tokens=BUDGET, fields=fields, start={})
        assert job.settings() == kept[task, name(cell)]
    for field in equal_tokens.LATER:
        other = {"advantage.estimator": "grpo", "rollout.kv_cache": "fp8"}[field]
        assert dataclasses.replace(job, fields={**fields, field: other}).settings() != job.settings()
