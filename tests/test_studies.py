"""benchmarks/study.py, studies.py and late_fork.py: arms as planned, contrasts by hand, base models as the unit, what is told."""

from __future__ import annotations

import ast
import itertools
import math
import random
import re

import numpy as np
import pytest
from helpers import one_thread  # noqa: F401  (a fixture)
from scipy import stats

from benchmarks import equal_tokens, findings, late_fork, studies, studies_told, study, workers
from benchmarks.common import RESULTS
from benchmarks.equal_tokens import NUM_MARKS, Arm, Job
from benchmarks.late_fork import LEAD, LateFork
from benchmarks.studies import AGAIN, ALL, BASES, EDGE, LONG, SPREAD, STUDIES, main
from benchmarks.study import Study, told
from tppo_ref.method.errors import UserError
from tppo_ref.tasks import TASKS, fork, load_task


def rows_of(made: Study, task: str, name: str, seed: int, accuracy: float) -> list[dict]:
    """A run of that accuracy from beginning to end: both its scores are the accuracy."""
    job = Job(
        task=task, arm=name, what=made.arms[name.split("@")[0]], seed=seed, budget_tokens=made.budget, fields={},
        start={"eval/accuracy": accuracy, "eval/length_mean": 1.0},
    )  # fmt: skip
    return [job.row(mark, accuracy=accuracy, generated_tokens=made.budget * mark // NUM_MARKS) for mark in range(NUM_MARKS + 1)]


def world(made: Study, effect, seeds: int) -> list[dict]:
    """effect(task, arm, base, seed) -> accuracy."""
    return [
        row
        for seed, arm, task in itertools.product(range(seeds), made.arms, made.tasks)
        for base, name in zip(made.bases, made.names(arm), strict=True)
        for row in rows_of(made, task, name, seed, effect(task, arm, base, seed))
    ]


def config(made: Study, arm: str, task: str = "chain"):
    return Job(task=task, arm=arm, what=made.arms[arm], seed=0, budget_tokens=1, fields={"task.name": task}, start={}).config()


# ---------------------------------------------------------------------------------------------------------------- the plans


def test_the_arms_of_each_study_are_those_of_its_plan():
    windows = {}
    for arm in EDGE.arms:
        made = config(EDGE, arm)
        windows[arm] = (made.rollout.window, made.advantage.cut_value)
        assert (made.rollout.refill, made.advantage.tail_tokens, made.rollout.samples_per_prompt) == ("step", 0, 1)
        assert EDGE.models[arm] == studies.CRITIC
    # the deciding token is the ninth
    assert windows == {
        "before": (8, "previous"),
        "behind": (9, "previous"),
        "further": (10, "previous"),
        "behind-critic": (9, "critic"),
    }
    for arm, (window, cut) in {
        "spread-9": (9, "previous"), "spread-9-critic": (9, "critic"), "spread-64": (64, "previous"), "spread-64-critic": (64, "critic"),
    }.items():  # fmt: skip
        made = config(SPREAD, arm)
        assert (made.rollout.window, made.advantage.cut_value) == (window, cut)
        assert (made.rollout.refill, made.advantage.tail_tokens, made.rollout.samples_per_prompt) == ("immediate", 0, 1)
        assert SPREAD.models[arm] == studies.CRITIC
    assert (SPREAD.tasks, set(SPREAD.arms)) == (EDGE.tasks, set(SPREAD.models))
    assert AGAIN.arms.items() <= SPREAD.arms.items()
    assert AGAIN.models == SPREAD.models
    assert not {*range(AGAIN.first_seed, AGAIN.first_seed + AGAIN.seeds)} & {*range(SPREAD.seeds)}
    for made in (BASES, LONG):
        seen = {a: config(made, a) for a in made.arms}
        assert (seen["ppo"].rollout.refill, seen["ppo"].policy.lr) == ("batch", 6e-4)
        assert (seen["tppo"].advantage.cut_value, seen["critic-cut"].advantage.cut_value) == ("previous", "critic")
        assert {c.rollout.window for a, c in seen.items() if a != "ppo"} == {64}
    cold = LONG.arms["cold-critic-warmup"].fields
    assert (cold["model.value"], cold["value.warmup_steps"]) == (None, 10)
    assert (LONG.budget, LONG.score) == (307_200, "final")


@pytest.mark.parametrize("name", STUDIES)
def test_a_plan_was_stated_and_names_its_command_contrasts_and_runs(name):
    made, text = STUDIES[name], (RESULTS.parent / "prestated" / STUDIES[name].plan).read_text()
    assert f"`python -m benchmarks.studies {name}`" in text
    assert f"benchmarks/results/{made.path.name}" in text
    assert all(f"`{what}`" in text for what in made.contrasts)
    num = made.seeds * len(made.tasks) * len(made.arms) * len(made.bases)
    assert f"{num} runs" in text
    for arm in made.arms:
        assert f"`{arm}`" in text


def test_each_contrast_is_of_two_arms_that_the_study_runs():
    for made in STUDIES.values():
        for weights in made.contrasts.values():
            assert set(weights) <= set(made.arms)
            assert sorted(weights.values()) == [-1, 1]


# ---------------------------------------------------------------------------------------------------------------- the table


def test_contrasts_by_hand_and_not_yet_until_all_seeds_are_there():
    """0.04 right before the edge, 0.1 a token further, 0.07 with the critic's own value; right behind, a level per seed."""
    levels = [0.30, 0.31, 0.35]

    def effect(task, arm, base, seed):
        return levels[seed] + {"before": 0.04, "behind": 0.0, "further": 0.1 + 0.01 * seed, "behind-critic": 0.07}[arm]

    rows = study.table(EDGE, world(EDGE, effect, 3))
    assert [r["contrast"] for r in rows] == list(EDGE.contrasts)
    assert [r["difference"] for r in rows] == pytest.approx([-0.11, -0.04, 0.07])
    assert {(r["verdict"], r["n"], r["seeds"]) for r in rows} == {("not yet", 3, 3)}
    low, high = stats.t.interval(1 - 0.05 / 3, 2, -0.11, stats.sem([-0.1, -0.11, -0.12]))
    assert (rows[0]["low"], rows[0]["high"]) == pytest.approx((low, high))
    whole = study.table(EDGE._replace(seeds=3), world(EDGE, effect, 3))
    assert [r["verdict"] for r in whole] == ["worse", "worse", "better"]
    assert told(EDGE, rows[0]) == f"-0.1100 [{low:+.4f}, {high:+.4f}], not yet, 3 of 32 seeds"
    assert study.table(EDGE, []) == []
    (one, *_) = study.table(EDGE, world(EDGE, effect, 1))
    assert told(EDGE, one) == "-0.1000, not yet, 1 of 32 seeds"


def test_runs_of_another_budget_do_not_count():
    rows = world(EDGE._replace(budget=3000), lambda *_: 0.5, 2)
    assert study.table(EDGE, rows) == []
    assert study.table(EDGE._replace(budget=3000), rows)[0]["n"] == 2


def test_of_one_seed_nothing_is_known_of_what_seeds_do():
    (row, _) = study.table(BASES, world(BASES, lambda task, arm, base, seed: 0.5 + 0.01 * base * (arm == "ppo"), 1))
    assert all(math.isnan(row[name]) for name in ("between", "between_high", "seeds_low", "seeds_high"))


def test_base_models_are_what_a_contrast_counts_and_their_deviation_is_found():
    """ppo - tppo is 0.01, 0.02, 0.03, 0.06 on the four bases, the same for all seeds but for +-0.004: many seeds cannot narrow it."""
    of_base = {1: 0.01, 2: 0.02, 3: 0.03, 4: 0.06}

    def effect(task, arm, base, seed):
        return 0.4 + 0.05 * base + (of_base[base] + 0.004 * (-1) ** seed) * (arm == "ppo")

    (ppo, critic) = study.table(BASES, world(BASES, effect, 8))
    assert (ppo["difference"], ppo["n"], ppo["seeds"]) == (pytest.approx(0.03), 4, 8)
    low, high = stats.t.interval(1 - 0.05 / 2, 3, 0.03, stats.sem(list(of_base.values())))
    assert (ppo["low"], ppo["high"]) == pytest.approx((low, high))
    assert ppo["verdict"] == "undecided"
    assert critic["verdict"] == "equal"
    assert critic["between"] == 0
    seeds = np.var([0.004 * (-1) ** s for s in range(8)], ddof=1) / 8
    assert ppo["between"] == pytest.approx(math.sqrt(np.var(list(of_base.values()), ddof=1) - seeds))
    limit = np.var(list(of_base.values()), ddof=1) * 3 / stats.chi2.ppf(0.05, 3)
    assert ppo["between_high"] == pytest.approx(math.sqrt(limit - seeds))
    half = stats.t.ppf(1 - 0.05 / 4, 4 * 7) * math.sqrt(seeds / 4)  # 32 runs of a deviation that 28 differences within bases tell
    assert (ppo["seeds_low"], ppo["seeds_high"]) == (pytest.approx(0.03 - half), pytest.approx(0.03 + half))
    assert told(BASES, ppo).endswith(f"undecided, 8 seeds on each of 4 base models, {ppo['seeds_needed']} base models would decide")
    lacking = [r for r in world(BASES, effect, 8) if (r["arm"], r["task"], r["seed"]) != ("ppo@3", "fork", 5)]
    assert {r["seeds"] for r in study.table(BASES, lacking)} == {7}


# -------------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def asked(monkeypatch):
    """What is asked for, without models: jobs and what their models are made from."""
    found = []

    def prepare(task, fields):
        found.append((task, dict(fields)))
        return dict(fields), {"eval/accuracy": 0.5, "eval/length_mean": 1.0}

    def run_all(jobs, path, num):
        for job in jobs:
            found.append(job)
            equal_tokens.append(path, [job.row(m, accuracy=0.5, generated_tokens=job.budget_tokens * m // 3) for m in range(4)])
        return []

    monkeypatch.setattr(equal_tokens, "prepare", prepare)
    monkeypatch.setattr(workers, "run_all", run_all)
    return found


def jobs(found):
    return [job for job in found if isinstance(job, Job)]


def test_the_command_says_how_long_it_takes_and_goes_on_where_it_was_stopped(asked, tmp_path, capsys):
    out = tmp_path / "runs.csv"
    assert main(["edge", "--seeds", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "4 runs to make, 20 s of CPU each by the plan: 0.0 CPU-hours" in printed
    assert "not yet, 1 of 32 seeds" in printed
    assert [(j.arm, j.seed, j.budget_tokens) for j in jobs(asked)] == [(a, 0, 30_720) for a in EDGE.arms]
    assert {j.task for j in jobs(asked)} == {"late-fork"}
    lines = out.read_text().splitlines(keepends=True)
    out.write_text("".join(lines[:-1]) + lines[-1][:20])  # a kill in the middle of the last run
    asked.clear()
    assert main(["edge", "--seeds", "2", "--out", str(out)]) == 0
    assert [(j.arm, j.seed) for j in jobs(asked)] == [("behind-critic", 0), *((a, 1) for a in EDGE.arms)]
    assert "5 runs to make, 0 s of CPU each so far" in capsys.readouterr().out
    asked.clear()
    assert main(["edge", "--seeds", "0", "--out", str(out)]) == 0
    assert not asked
    assert "not yet, 2 of 32 seeds" in capsys.readouterr().out


def test_all_studies_are_one_command_that_says_first_how_long_all_of_it_takes_and_goes_on(asked, tmp_path, capsys):
    assert main(["all", "--seeds", "1", "--out", str(tmp_path), "--jobs", "2"]) == 0
    printed = capsys.readouterr().out
    num = {name: len(made.arms) * len(made.tasks) * len(made.bases) for name, made in ALL.items()}
    hours = sum(num[name] * made.run_s for name, made in ALL.items()) / 3600
    first, *others = printed.splitlines()
    assert (
        first == f"{sum(num.values())} runs to make in {len(ALL)} of {len(ALL)} studies: {hours:.1f} CPU-hours, "
        f"about {hours / 2:.1f} hours with --jobs 2"
    )
    assert [line.split(":")[0] for line in others if line.endswith(".md")] == list(ALL)
    assert {path.name for path in tmp_path.iterdir()} == {made.path.name for made in ALL.values()}
    assert len(jobs(asked)) == sum(num.values())
    asked.clear()
    (tmp_path / EDGE.path.name).unlink()
    assert main(["all", "--seeds", "1", "--out", str(tmp_path)]) == 0
    assert [j.arm for j in jobs(asked)] == list(EDGE.arms)
    assert f"{num['edge']} runs to make in 1 of {len(ALL)} studies: " in capsys.readouterr().out.splitlines()[0]
    asked.clear()
    assert main(["all", "--seeds", "0", "--out", str(tmp_path)]) == 0
    assert not asked
    shown = capsys.readouterr().out
    assert "runs to make" not in shown
    assert sum("not yet, 1 of" in line for line in shown.splitlines()) == sum(len(made.contrasts) for made in ALL.values())


def test_a_study_of_which_runs_fail_does_not_stop_the_others_and_a_stop_does(asked, monkeypatch, tmp_path, capsys):
    """Exit code 1 tells of the first; Ctrl-C in the second study leaves the rest for the same command."""
    reached = []

    def run_all(jobs, path, num):
        reached.append(path.name)
        if len(reached) == stop_at:
            raise KeyboardInterrupt
        return [f"{jobs[0].task} failed"] if len(reached) == 1 else []

    monkeypatch.setattr(workers, "run_all", run_all)
    stop_at = None
    assert main(["all", "--seeds", "1", "--out", str(tmp_path)]) == 1
    assert reached == [made.path.name for made in ALL.values()]
    reached.clear()
    stop_at = 2
    assert main(["all", "--seeds", "1", "--out", str(tmp_path)]) == 130
    assert len(reached) == 2
    assert "the same command goes on with the others" in capsys.readouterr().err


@pytest.mark.parametrize("seeds", ["0", "1"])
@pytest.mark.parametrize(("name", "at", "said"), [
    ("edge", "folder", "{at}, a folder; expected a file"), ("edge", "file/runs.csv", "{file}, a file; expected a folder"),
    ("all", "file", "{file}, a file; expected a folder"), ("all", "file/deeper", "{file}, a file; expected a folder"),
    ("all", "taken", "{taken}, a folder; expected a file"),
])  # fmt: skip
def test_an_out_of_the_wrong_kind_is_one_line_before_a_run_is_made(name, at, said, seeds, asked, tmp_path, capsys):
    taken, file = tmp_path / "taken" / EDGE.path.name, tmp_path / "file"
    taken.mkdir(parents=True)
    (tmp_path / "folder").mkdir()
    file.write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    assert main([name, "--seeds", seeds, "--out", str(tmp_path / at)]) == 2
    printed = capsys.readouterr()
    assert (asked, printed.out) == ([], "")
    (line,) = printed.err.splitlines()
    assert line == f"error: --out: got {said.format(at=tmp_path / at, file=file, taken=taken)}; choose another"
    assert (sorted(tmp_path.rglob("*")), file.read_text()) == (before, "mine")


def test_all_names_the_table_that_it_cannot_read(tmp_path, capsys):
    (tmp_path / EDGE.path.name).write_text("task,arm\nchain,tppo\n")
    assert main(["all", "--seeds", "0", "--out", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --out: got {tmp_path / EDGE.path.name} with others; expected the columns")


def test_the_list_of_programs_names_no_study_by_hand_so_that_none_is_missing(capsys):
    listed = ast.get_docstring(ast.parse((RESULTS.parent / "__main__.py").read_text()))
    (line,) = [line for line in listed.splitlines() if "benchmarks.studies" in line]
    assert line.startswith("python -m benchmarks.studies all ")
    assert not {*STUDIES} & {*re.findall(r"[\w-]+", line)}
    with pytest.raises(SystemExit):
        main(["-h"])
    assert ",".join([*ALL, "all"]) in capsys.readouterr().out


def test_a_study_made_again_begins_behind_the_seeds_of_the_first(asked, tmp_path, capsys):
    assert main(["spread-again", "--seeds", "2", "--out", str(tmp_path / "runs.csv")]) == 0
    assert [(j.arm, j.seed) for j in jobs(asked)] == [(arm, seed) for seed in (32, 33) for arm in AGAIN.arms]
    assert "not yet, 2 of 128 seeds" in capsys.readouterr().out


def test_each_base_model_and_its_critic_have_a_seed_of_their_own(asked, tmp_path):
    assert main(["bases", "--seeds", "1", "--out", str(tmp_path / "runs.csv")]) == 0
    made = [(task, fields["run.seed"]) for task, fields in asked[: 2 * 4]]
    assert sorted(made) == sorted(itertools.product(("chain", "fork"), (1, 2, 3, 4)))
    assert {(j.arm, j.config().run.seed) for j in jobs(asked)} == {(f"{a}@{b}", 0) for a in BASES.arms for b in (1, 2, 3, 4)}
    assert all(j.fields["run.seed"] == int(j.arm.split("@")[1]) for j in jobs(asked))
    assert all(j.fields["run.eval_samples"] == 4 for j in jobs(asked))


def test_the_settings_of_a_run_hold_its_task_window_and_refill():
    """late-fork and fork are never taken for each other, nor edges; so a table with other runs is refused."""
    seen = [
        Job(task=task, arm="x", what=what, seed=0, budget_tokens=1, fields={"task.name": task}, start={}).settings()
        for task, what in [("fork", Arm()), ("late-fork", Arm()), *(("late-fork", what) for what in EDGE.arms.values())]
    ]
    assert len(set(seen)) == len(seen)


def test_a_table_with_other_settings_is_refused(asked, tmp_path, capsys):
    out = tmp_path / "runs.csv"
    assert main(["edge", "--seeds", "1", "--out", str(out)]) == 0
    assert main(["edge", "--seeds", "2", "--eval-prompts", "7", "--out", str(out)]) == 2
    assert "is there with other settings" in capsys.readouterr().err


def test_a_study_that_is_not_there_and_a_number_that_is_too_small_are_refused(capsys):
    for wrong, said in ((["egde"], "invalid choice: 'egde'"), (["edge", "--seeds", "-1"], "--seeds: got -1; expected an integer")):
        with pytest.raises(SystemExit) as stopped:
            main(wrong)
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- the task late-fork


def test_the_ninth_token_decides_and_nothing_before_or_behind_it():
    task = LateFork(num_train=50, num_test=10)
    assert len(LEAD) == 8
    assert task.describe(LEAD) == "04030201"
    for problem, prompt in zip(task.problems("train", 50, 0, 0.06), task.prompts("train"), strict=True):
        right = task.solve(problem)
        assert right == (*LEAD, *fork.ForkTask().solve(problem))
        assert len(right) <= task.max_response_tokens
        mark = fork.RIGHT_MARK[problem[0]][problem[1]]
        for other in range(fork.NUM_MARKS):
            response = (*LEAD, *fork.response_for(other, problem[2]))
            assert response[:8] == right[:8]
            assert late_fork.verify(prompt.answer, response) == (1.0 if other == mark else -1.0)
        for place in range(len(right)):
            assert late_fork.verify(prompt.answer, (*right[:place], (right[place] + 1) % 30, *right[place + 1 :])) == -1.0
        assert late_fork.verify(prompt.answer, right[8:]) == -1.0
        assert task.demonstrate(problem, random.Random(0))[:8] == LEAD


def test_it_is_a_task_only_while_runs_of_it_are_made():
    before = dict(TASKS)
    with late_fork.known():
        assert load_task("late-fork").verifier == "benchmarks.late_fork:verify"
    assert before == TASKS
    with pytest.raises(UserError, match="late-fork"):
        load_task("late-fork")


TINY = {
    "model.warm_start_steps": 2, "model.hidden_size": 16, "model.num_layers": 1, "model.num_heads": 2, "rollout.slots": 6, "run.eval_prompts": 2,
    "value.pretrain_responses": 8, "value.pretrain_epochs": 1, **equal_tokens.SHARED,
}  # fmt: skip


@pytest.mark.usefixtures("one_thread")
def test_a_real_run_of_it_starts_from_the_base_model_and_critic_of_its_seed(tmp_path):
    shared = {**TINY, "run.cache": str(tmp_path), "rollout.max_response_tokens": 40}
    fields, start = equal_tokens.prepare("late-fork", shared)
    again, _ = equal_tokens.prepare("late-fork", shared)
    other, _ = equal_tokens.prepare("late-fork", {**shared, "run.seed": 1})
    assert (fields["model.policy"], fields["model.value"]) == (again["model.policy"], again["model.value"])
    assert fields["model.policy"] != other["model.policy"]
    assert fields["model.value"] != other["model.value"]
    job = Job(task="late-fork", arm="behind", what=EDGE.arms["behind"], seed=0, budget_tokens=600, fields=fields, start=start)
    rows = equal_tokens.run_one(job)
    assert [r["mark"] for r in rows] == [0, 1, 2, 3]
    assert rows[-1]["generated_tokens"] >= 600
    assert rows[-1]["generated_tokens"] == rows[-1]["trained_tokens"]  # no tail
    assert "late-fork" not in TASKS


# ------------------------------------------------------------------------------------------------------------ the page of answers


@pytest.fixture
def results(monkeypatch, tmp_path):
    """An empty folder of committed tables of studies."""
    monkeypatch.setattr(studies_told, "RESULTS", tmp_path)
    studies_told.study_table.cache_clear()
    yield tmp_path
    studies_told.study_table.cache_clear()


PRIMARY = '(?)<!-- study "factorial 1" said s -->'


def shown(sentence: str) -> str:
    studies_told.study_table.cache_clear()
    page = findings.rewrite(sentence)
    assert findings.rewrite(page) == page
    return findings.MARK.fullmatch(page)["value"]


def test_the_answer_shows_the_factorial_as_far_as_it_is_there(results):
    """No table; one seed; two seeds and a run of the third; all 32: what better critics add to critic - previous is 0.02 -+ 0.001."""
    made = studies.ALL["factorial"]

    def effect(task, arm, base, seed):
        return 0.5 + (0.02 + 0.001 * (-1) ** seed) * arm.startswith("critic-strong")

    rows = world(made, effect, 32)
    assert shown(PRIMARY) == "(not yet, none of 32 seeds)"
    equal_tokens.append(results / "factorial.csv", [r for r in rows if r["seed"] < 1])
    assert shown(PRIMARY) == "(+0.0210, not yet, 1 of 32 seeds)"
    equal_tokens.append(results / "factorial.csv", [r for r in rows if r["seed"] == 1] + [r for r in rows if r["seed"] == 2][:4])
    low, high = stats.t.interval(1 - 0.05 / 6, 1, 0.02, stats.sem([0.021, 0.019]))
    assert shown(PRIMARY) == f"(+0.0200 [{low:+.4f}, {high:+.4f}], not yet, 2 of 32 seeds)"
    (results / "factorial.csv").unlink()
    equal_tokens.append(results / "factorial.csv", rows)
    low, high = stats.t.interval(1 - 0.05 / 6, 31, 0.02, stats.sem([0.021, 0.019] * 16))
    assert shown(PRIMARY) == f"(+0.0200 [{low:+.4f}, {high:+.4f}], better, 32 seeds)"
    lines = studies_told.lines_of_studies().splitlines()
    assert len(lines) == 2 + sum(len(made.contrasts) for made in studies.ALL.values())
    assert (
        lines[2]
        == f"| `python -m benchmarks.factorial`, [plan](../benchmarks/prestated/{made.plan}) | **{next(iter(made.contrasts))}** | {shown(PRIMARY)[1:-1]} |"
    )
    assert lines[-1].endswith("| cold critic with warm-up - pre-trained | not yet, none of 24 seeds |")


def test_verdicts_are_told_with_what_would_decide(results):
    made = studies.ALL["factorial"]
    rows = world(made, lambda task, arm, base, seed: 0.5 + 0.05 * (-1) ** seed * arm.startswith("zero"), 32)
    equal_tokens.append(results / "factorial.csv", rows)
    assert shown(PRIMARY) == "(+0.0000 [+0.0000, +0.0000], equal within 0.005, 32 seeds)"
    told_zero = shown('(?)<!-- study "factorial 4" said s -->')
    assert "undecided, 32 seeds, " in told_zero
    assert told_zero.endswith(" seeds would decide)")


def test_what_the_critics_of_the_factorial_explain_stands_beside_it(results):
    """0.3 for the strong one of chain, 0.1 for its weak one, nothing on fork; steps without a number do not count."""
    made = studies.ALL["factorial"]
    assert studies_told.lines_of_critics() == "No run yet.\n"
    rows = world(made, lambda *_: 0.5, 2)
    for row in rows:
        seen = {"chain": 0.3 if "-strong-" in row["arm"] else 0.1, "fork": 0.0}[row["task"]]
        row["explained_variance"] = {1: seen if row["seed"] else math.nan, 2: 0.9, 3: 0.9}.get(row["mark"], math.nan)
    equal_tokens.append(results / "factorial.csv", rows)
    assert studies_told.lines_of_critics().splitlines()[2:] == [
        "| chain | weak | 1,024 | 584 | 0.10 |", "| chain | strong | 8,192 | 2,406 | 0.30 |",
        "| fork | weak | 1,024 | 574 | 0.00 |", "| fork | strong | 8,192 | 1,562 | 0.00 |",
    ]  # fmt: skip


def test_a_critic_is_fitted_to_what_is_not_held_out():
    """As an audit counted them from the prompts alone; which are held out is tests/test_pretrain.py's."""
    fitted = {"chain": (584, 2406), "fork": (574, 1562), "maze": (799, 5964), "brackets": (807, 6092)}
    for made in (studies.ALL["factorial"], studies.ALL["new-tasks"]):
        for task, (at, critic) in itertools.product(made.tasks, enumerate(("weak", "strong"))):
            (fields,) = {tuple(made.models[arm].items()) for arm in made.arms if f"-{critic}-" in arm}
            assert fields == (("value.pretrain_responses", studies_told.critics(f"{task} {critic}", "sampled")),)
            assert studies_told.critics(f"{task} {critic}", "fitted") == fitted[task][at]
    assert studies_told.critics("fork", "times") == pytest.approx(1562 / 574)
    with pytest.raises(KeyError):
        findings.rewrite('1<!-- critics "fork strongest" fitted s -->')


def test_the_page_shows_the_primary_contrast_of_each_study_with_its_command():
    page = findings.PAGE.read_text()
    assert {m["key"].split()[0] for m in findings.MARK.finditer(page) if m["source"] == "study"} >= {
        "factorial",
        "edge",
        "bases",
        "long",
    }
    assert 'study "factorial 1"' in page.split("### 4.")[1].split("\n\n")[1]  # in the bold answer of the question it belongs to
    assert all(f"`{command}`" in page for command in studies.COMMANDS.values())


def test_the_studies_are_named_where_their_command_is_explained():
    assert all(f"python -m benchmarks.studies {name}" in (studies.__doc__ or "") for name in STUDIES)
