"""benchmarks/RESULTS.md says of scale/ what the committed tables say, verdicts included."""

from __future__ import annotations

import csv
import math
import re
import shutil
from pathlib import Path

import pytest

from benchmarks import common, fair_headline, fair_told, findings, headline, lever_learning, studies, study
from benchmarks.dropped_gradient import table as dropped_table
from benchmarks.equal_tokens import read_whole
from benchmarks.fair_told import shown
from benchmarks.vllm_windows import ratio
from tppo_ref.runs.comparison import write_csv

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def table(name):
    with (FOLDER / "results" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def line(start):
    (found,) = [x for x in (FOLDER / "RESULTS.md").read_text().splitlines() if x.startswith(f"| {start}")]
    result, aim = (cell.strip() for cell in found.split("|")[3:5])
    return result, aim


def percent(share, digits=1):
    return f"{100 * float(share):.{digits}f} %"


def verdict(aim, met):
    assert ("met" if met else "missed") in aim
    assert ("missed" if met else ": met") not in aim


def test_the_own_share_and_the_memory_of_a_cpu_tiny_step():
    (row,) = table("scale_overhead")
    result, aim = line("scale/: the Trainer's own share")
    assert result == percent(row["own_share"])
    verdict(aim, float(row["own_share"]) <= 0.03)
    result, aim = line("scale/: resident memory")
    assert percent(row["memory_growth"]) in result
    assert percent(row["memory_growth_second_half"]) in result
    assert f"over {row['steps']} steps" in (FOLDER / "RESULTS.md").read_text()
    verdict(aim, float(row["memory_growth"]) <= 0.02)
    result, _ = line("scale/: trained tokens that are padding")
    assert result == f"{percent(row['padding'], 0)} in linear layers, {percent(row['attention_padding'])} in attention"


@pytest.mark.parametrize("task", ["chain", "fork"])
def test_the_headline(task):
    result, aim = line(f"PPO against T-PPO, {task} task")
    middle, low, high = findings.headline(f"{task} tppo speed-up", "ratio")
    assert result.startswith(f"{middle:.2f} [{low:.2f}, {high:.2f}]x")
    verdict(aim, middle >= 2)


@pytest.mark.parametrize("task", [task for task in fair_headline.TASKS if fair_told.found(task, "seconds")])
def test_the_fair_headline(task):
    result, aim = line(f"`tppo-once` against PPO at its best, {task} task")
    seconds, made, trained, area = (
        fair_told.found(task, name) for name in ("seconds", "generated_tokens", "trained_tokens", "area")
    )
    assert result == (
        f"{shown(seconds)}x less CPU time to 95 % of PPO's best mean, where both arrive "
        + "({once} and {ppo} of {seeds} seeds)".format(**seconds)
        + f"; {shown(made)}x the generated, {shown(trained)}x the trained tokens; area {shown(area, '+.3f')}"
    )
    verdict(aim, seconds["low"] > 1 and seconds["value"] >= 2)


def test_the_early_decision():
    rows = findings.early_table()
    ends = {
        q: [f"{end(r['ratio'] for r in rows if r['quantity'] == q):.2f}x" for end in (min, max)] for q in ("tokens", "decode_steps")
    }
    result, _ = line("early decision")
    assert result.startswith("tokens {} to {}, decode steps {} to {}".format(*ends["tokens"], *ends["decode_steps"]))
    assert f"{findings.early('every', 'n')} seeds" in (FOLDER / "RESULTS.md").read_text()


def test_the_estimators_and_the_schedules_own_speed():
    cases = {row["case"]: row for row in table("advantages")}
    result, aim = line("`egae` [512, 24576]")
    assert (
        result
        == f"{float(cases['egae']['copies_median']):.1f}x a copy of the same bytes ({float(cases['egae']['clones_median']):.1f}x a clone)"
    )
    verdict(aim, float(cases["egae"]["copies_median"]) <= 4)
    costs = {row["what"]: float(row["us"]) for row in table("batching")}
    for what, cost in costs.items():
        result, aim = line(what)
        assert result == f"{cost:.2f} us"
        verdict(aim, cost <= 2)


@pytest.mark.parametrize(("what", "name"), [("the factorial", "factorial"), ("an edge right behind", "edge"),
                                              ("several base models", "bases"), ("the same factorial of maze", "new-tasks"), ("edges spread as", "spread"), ("the same with other seeds", "spread-again"),
                                              ("ten times the tokens", "long"), ("seven rules at the cut", "cut-rules")])  # fmt: skip
def test_a_stated_study_is_told_as_its_program_tells_it(what, name):
    made = studies.ALL[name]
    rows, _ = read_whole(made.path)
    result, _ = line(what)
    assert result == study.told(made, study.table(made, rows)[0])
    num = len({(row["task"], row["arm"], row["seed"]) for row in rows})
    each = f" on each of {len(made.bases)}" if len(made.bases) > 1 else ""
    assert f"{num} runs, {made.seeds} seeds{each}: " in (FOLDER / "RESULTS.md").read_text()


def test_what_the_planner_recommends_and_what_its_search_costs():
    cases = [row for row in table("plans") if row["recommended"] == "True"]
    gains, costs = ([float(row[name]) for row in cases] for name in ("gain", "search_cpu_s"))
    methods = [row["method"] for row in cases]
    result, _ = line("`sim plan --best`: recommended over PPO at its best")
    tppo, partial = (sum(method.startswith(name) for method in methods) for name in ("tppo", "partial"))
    assert result == (f"{min(gains):.2f}x to {max(gains):.2f}x; T-PPO in {tppo} of {len(cases)}, partial rollouts in {partial}")
    result, aim = line("the same: CPU seconds of a search")
    assert result == f"{min(costs):.1f} s to {max(costs):.1f} s"
    slow = sum(cost > 10 for cost in costs)
    assert aim == (f"10 s: missed in {slow} of {len(cases)} cases" if slow else "10 s: met")


def test_the_clock_against_reality():
    within = [row["within"] == "True" for row in table("reality") if row["role"] == "prediction"]
    result, aim = line("the clock against real runs")
    assert result.startswith(f"{sum(within)} of {len(within)} predictions within 10 %")
    assert f"{sum(within)} of {len(within)} predictions are within it" in (FOLDER.parent / "docs" / "throughput.md").read_text()
    verdict(aim, all(within))


def test_a_full_cache():
    arms = {row["admission"]: {name: float(row[name]) for name in ("engine_steps", "clock")} for row in table("vllm_full_cache")}
    result, _ = line("vLLM under a full cache")
    room, whole = arms["room"], arms["whole"]
    assert result == (
        f"{room['engine_steps']:.0f} with preemption ({room['clock']:.0f} by the clock), "
        f"{whole['engine_steps']:.0f} where nothing may preempt ({whole['clock']:.0f})"
    )


def test_the_clocks_misses():
    errors = [int(row["error"].split()[0]) for row in table("literature")]
    within = sum(row["within"] == "True" for row in table("literature"))
    result, _ = line("predicted against published step times")
    expected = (
        f"{min(errors):+d} % to {max(errors):+d} % over all settings tried, {within} of {len(errors)} within the printed range"
    )
    assert result.startswith(expected)


def test_the_clocks_own_cost():
    mean, half, _, apart, _ = table("clock")
    result, aim = line("the clock, 1,000 steps of 8,192 slots")
    seconds = [float(row["s_per_1000_steps"]) for row in (mean, half, apart)]
    assert result.startswith(
        f"{seconds[0]} s at a mean length of a window, {seconds[1]} s at half a window, {seconds[2]} s there with 64 replicas"
    )
    verdict(aim, max(seconds[:2]) <= 10 and seconds[2] <= 20)


def test_kills_lose_nothing_and_repeat_nothing():
    rows = table("kills")
    total = {name: sum(int(row[name]) for row in rows) for name in rows[0] if row_is_a_count(rows[0][name])}
    differences = sum(total[name] for name in ("other_responses", "other_records", "other_state", "left", "stuck"))
    result, aim = line("kills of real runs")
    assert result == (f"{total['kills']:,} kills of {total['runs']} runs: {total['lost']} responses lost, {total['twice']} trained "
                      f"twice, {differences} differences, {total['wrong_ends']} tracebacks or second lines")  # fmt: skip
    wrong = differences + total["lost"] + total["twice"] + total["wrong_ends"] + total["second_accepted"]
    verdict(aim, total["kills"] >= 1000 and not wrong)
    result, _ = line("the same: how, and inside of what")
    hows = [f"{name} {total[name.replace(' ', '_')]}" for name in ("SIGKILL", "SIGTERM", "SIGSTOP", "full disk")]
    wheres = [f"{name} {total[name]}" for name in ("start", "decode", "update", "save", "prune")]
    assert result == f"{', '.join(hows)}; {', '.join(wheres)}, at random {total['random']}"
    assert {row["case"] for row in rows} == {"tppo", "tppo-defer", "held batches", "tppo-ewma"}


def test_kills_on_ranks_lose_nothing_and_repeat_nothing():
    rows = table("kills_scale")
    kills, runs = [row for row in rows if row["how"] != "none"], [row for row in rows if row["lost"]]
    count = {name: sum(int(row[name]) for row in runs) for name in ("lost", "twice")}
    differences = sum(
        int(row[name]) for row in runs for name in ("other_responses", "other_records", "other_state", "left", "books")
    )
    assert len(runs) == len({(row["case"], row["run"]) for row in rows}), "a run that never got through"
    faults = sum(row["fault"] != "" for row in rows)
    result, aim = line("kills of two gloo ranks of scale/")
    assert result == (f"{len(kills)} kills of {len(runs)} runs: {count['lost']} responses lost, {count['twice']} trained twice, "
                      f"{differences} differences, {faults} traceback or second line (mended since)")  # fmt: skip
    verdict(aim, len(kills) >= 100 and not differences + sum(count.values()))
    (hows, _), (leaving, _) = line("the ranks: how, and inside of what"), line("the ranks: seconds until the last")
    by = {name: sum(name in row["how"] for row in kills) for name in ("SIGKILL", "SIGTERM", "SIGSTOP", "full disk")}
    at = {name: sum(row["where"] == name for row in kills) for name in ("start", "decode", "update", "save", "prune", "random")}
    told = [f"{name} {number}" for name, number in at.items()]
    assert hows == f"{', '.join(f'{name} {number}' for name, number in by.items())}; {', '.join(told[:-1])}, at {told[-1]}"
    for_good = [float(row["left_s"]) for row in kills if "for good" in row["how"]]
    others = sorted(float(row["left_s"]) for row in kills if "for good" not in row["how"])
    assert leaving == (f"{others[len(others) // 2]:.1f} s in the middle, {others[-1]:.1f} s at most; {max(for_good):.1f} s where a rank "
                       f"stands still for good (10 s `cluster.timeout_s`)")  # fmt: skip
    assert {row["case"] for row in rows} == {"tppo", "held batches", "tppo-ewma", "other ranks"}
    assert {row["second"] for row in kills} == {"", "refused"}
    assert {row["ranks"] for row in kills} == {"1", "2", "3"}


def row_is_a_count(text):
    return text.isdigit()


def test_the_memory_of_the_loop():
    (row,) = table("memory")
    result, aim = line("resident memory over whole tiny steps")
    growth, second = (100 * float(row[name]) for name in ("memory_growth", "memory_growth_second_half"))
    assert result == f"{growth:+.1f} % over {int(row['steps']):,} steps ({second:+.1f} % over their second half)"
    verdict(aim, growth <= 2 and int(row["steps"]) >= 10_000)


def test_the_32b_shape():
    (row,) = table("at_32b")
    result, aim = line("at the 32B shape")
    assert result == f"{row['own_s']} s of {row['simulated_step_s']} s, {percent(row['own_share'], 2)}"
    verdict(aim, float(row["own_share"]) <= 0.01)
    result, aim = line("the same: padding")
    assert result == f"{percent(row['padding'], 0)} in linear layers, {percent(row['attention_padding'], 2)} in attention"
    verdict(aim, float(row["padding"]) <= 0.05)
    result, _ = line("the same: update time")
    alone = percent(row["waiting_level_in_trained_alone"])
    stayed = f"{percent(row['waiting_without_moving'])} if ended responses stayed"
    assert result == f"{percent(row['waiting'])} ({stayed}, {alone} with mini-batches level in trained tokens alone, too)"
    assert f"{int(row['simulated_step_s']):,} s per step" in (FOLDER.parent / "docs" / "scale.md").read_text()
    for page in ("scale.md", "log.md"):
        text = " ".join((FOLDER.parent / "docs" / page).read_text().split())
        for column in ("waiting", "waiting_without_moving", "waiting_level_in_trained_alone"):
            assert f" {percent(row[column], 0)}" in text, (page, column)


def test_the_weight_sync():
    copies = {row["what"]: float(row["copies"]) for row in table("sync")}
    result, aim = line("scale/: weight sync")
    ours = copies["gather"] + copies["checksum"]
    assert result == f"{copies['sync']:.1f}x; ours (gathering, checksums) {ours:.1f}x, vLLM's reload {copies['vllm']:.1f}x"
    verdict(aim, copies["sync"] <= 2)


@pytest.mark.parametrize("page", [FOLDER / "RESULTS.md", FOLDER.parent / "README.md"])
def test_windows_with_vllm(page):
    rows = table("vllm_windows")
    assert len({row["seed"] for row in rows}) >= 5
    step, rollout = ratio(rows, "tokens_per_s"), ratio(rows, "rollout_tokens_per_s")
    text = " ".join(page.read_text().split())
    assert f"{step['ratio']:.2f}x [{step['low']:.2f}, {step['high']:.2f}]" in text
    assert f"{rollout['ratio']:.2f}x" in text
    if page.name == "RESULTS.md":
        verdict(line("scale/ with vLLM")[1], step["ratio"] >= 2)


def test_the_gradient_that_a_constant_prefix_drops():
    rows = dropped_table(table("dropped_gradient"))
    found = {(r["task"], r["window"]): r for r in rows if (r["part"], r["quarter"]) == ("all", "all")}
    tasks = ("chain", "fork", "length")
    wide, narrow = ({task: found[task, window] for task in tasks} for window in (64, 16))
    result, _ = line("the gradient that a constant prefix drops")
    cosines = ", ".join(f"{task} {wide[task]['cosine']:.2f}" for task in tasks)
    norms, summed = (", ".join(f"{wide[task][name]:.2f}" for task in tasks) for name in ("norm_ratio", "sum_cosine"))
    assert result == f"{cosines}; norm {norms} of the full one; no noise: {summed} where batches are summed"
    result, _ = line("the same, windows of 16")
    assert result == ", ".join(f"{task} {narrow[task]['cosine']:.2f}" for task in tasks)
    assert {r["seeds"] for r in found.values()} == {2}


@pytest.mark.parametrize("lever", list(lever_learning.LEVERS))
def test_what_a_lever_costs_in_learning(lever):
    found = {r["task"]: r for r in lever_learning.table(read_whole(lever_learning.PATH)[0], lever) if r["score"] == "area"}
    (row,) = [
        x
        for x in (FOLDER / "RESULTS.md").read_text().splitlines()
        if f"`python -m benchmarks.lever_learning --levers {lever}`" in x
    ]
    what = row.split("|")[1].strip()
    assert what.endswith(f"three tasks, {found['all']['n']} seeds")
    result, aim = line(what)
    whole = "{difference:.3f} [{low:.3f}, {high:.3f}], {verdict}".format(**found["all"])
    assert result == f"{whole}; " + ", ".join(
        f"{t} {found[t]['difference']:.3f} ({found[t]['verdict']})" for t in ("chain", "fork", "length")
    )
    verdict(aim, found["all"]["verdict"] in ("equal", "better"))


def test_the_mutants():
    rows, reasons, summary = table("mutants"), table("mutants_reasons"), table("mutants_summary")
    survivors = {(row["file"], row["digest"], row["number"]) for row in rows if row["verdict"] in ("survived", "unreached")}
    assert {(row["file"], row["digest"], row["number"]) for row in reasons} == survivors, (
        "every survivor has a reason, and no other"
    )
    assert {row["reason"] for row in reasons} <= {"equivalent", "only a message", "killed elsewhere", "killed later", "real gap"}
    no_change = sum(row["reason"] in ("equivalent", "only a message") for row in reasons)
    gaps = sum(row["reason"] == "real gap" for row in reasons)
    share = 1 - gaps / (len(rows) - no_change)
    whole = summary[-1]
    assert whole["room"] == "all"
    assert (int(whole["tried"]), int(whole["gap"]), float(whole["score"])) == (len(rows), gaps, pytest.approx(share, abs=1e-4))
    result, aim = line("small changes of the code")
    assert result == f"{percent(share)} of those that change something; {len(rows)} of {int(whole['mutants']):,} mutants were tried"
    verdict(aim, share >= 0.95)


@pytest.mark.parametrize("task", ["chain", "fork"])
def test_the_headlines_tables_are_what_the_values_of_its_seeds_say(task, monkeypatch, tmp_path):
    """`--redraw` changes nothing in what is committed, and draws the statistics that the summary states."""
    drawn = []
    monkeypatch.setattr(headline, "draw_learning_curves", lambda path, rows, comparison: drawn.append((rows, comparison)))
    monkeypatch.setattr(headline, "draw_lengths", lambda *_: None)
    kept, copy = FOLDER / "results" / f"headline-{task}", tmp_path / task
    shutil.copytree(kept, copy)
    headline.redraw(copy)
    for name in ("summary.csv", "summary.md", "learning_curves.csv"):
        assert (copy / name).read_bytes() == (kept / name).read_bytes(), f"{name}: run python -m benchmarks.headline --redraw"
    [(curves, comparison)] = drawn
    rows = [r for r in headline.rows_of(kept / "summary.csv") if not r["statistic"].startswith("seed ")]
    stated = {(r["method"], r["quantity"]): r for r in rows}
    marked = {r["method"]: (r["train_s"], r["trained"]) for r in curves if r["line"] == "crossing"}
    for method in comparison.runs:
        both = [stated[method, f"{name} to target"] for name in ("time", "tokens")]
        assert comparison.typical_crossing(method) == (both[0]["statistic"], tuple(r["value"] for r in both))
        assert marked[method] == comparison.typical_crossing(method)[1]
        assert {r["statistic"] for r in both} == {"geometric mean" if both[0]["reached"] == headline.SEEDS else "median"}


def test_the_headline_has_no_interval_that_is_none():
    """95 % is said of t intervals, and of nothing else."""
    for task in ("chain", "fork"):
        rows = [r for r in table(f"headline-{task}/summary") if not r["statistic"].startswith("seed ")]
        kinds = {(r["statistic"], r["interval"]) for r in rows if r["interval"]}
        assert kinds <= {("mean", "95 % t"), ("geometric mean", "95 % t of logarithms"), ("median", "range")}
        assert {r["statistic"] for r in rows if r["unit"] == "x" and r["method"] == "tppo"} == {"geometric mean"}
        assert "bootstrap" not in (FOLDER / "results" / f"headline-{task}" / "summary.md").read_text()


def test_a_redraw_starts_from_the_seeds_alone(monkeypatch, tmp_path):
    """Statistics that stand in the table are not read: where they are wrong, they come out right; a seed that changes counts."""
    for name in ("draw_learning_curves", "draw_lengths"):
        monkeypatch.setattr(headline, name, lambda *_: None)
    folder = tmp_path / "chain"
    shutil.copytree(FOLDER / "results" / "headline-chain", folder)
    rows = headline.rows_of(folder / "summary.csv")
    for row in rows:
        if not row["statistic"].startswith("seed "):
            row.update(statistic="mean", interval="95 % t", value=-1.0)
        if (row["method"], row["quantity"], row["statistic"]) == ("tppo", "time to target", "seed 1"):
            row["value"] = math.inf
        if (row["method"], row["quantity"], row["statistic"]) == ("ppo", "accuracy, final", "seed 3"):
            row["value"] = 0.1
    write_csv(folder / "summary.csv", rows)
    headline.redraw(folder)
    (tppo,) = [r for r in headline.rows_of(folder / "summary.csv")
               if (r["method"], r["quantity"], r["interval"]) == ("tppo", "time to target", "range")]  # fmt: skip
    assert (tppo["statistic"], tppo["high"], tppo["reached"]) == ("median", math.inf, 4)
    text = (folder / "summary.md").read_text()
    assert text.startswith("# Comparison void: PPO did not improve in seed 3\n")
    assert "machine x86_64" in text.splitlines()[-1]
    assert "(median, range " in headline.sentence(folder / "summary.csv")


def test_the_bound_in_practice():
    step, mean, lip = (findings.written(findings.bound("all 1024 64", name), form)
                       for name, form in (("step_size", ".2f"), ("step_mean", "+.3f"), ("lip", ".2f")))  # fmt: skip
    shares = [findings.written(findings.bound(f"all 1024 {window} mean", "cut_token_share"), "%") for window in (64, 16)]
    seeds = findings.bound("all 1024 64", "seeds")
    row, _ = line(f"P4 beside what happens: how far V moves over a cut, and at most over any token; text, {seeds} seeds")
    assert f"{step} in size, {mean} in the mean; Lip seen {lip}" in row
    assert "{} % of the tokens lie in cut rows at a window of 64, {} % at 16".format(*shares) in row
    log = " ".join((FOLDER.parent / "docs" / "log.md").read_text().split())
    assert f"V moves by {step} in size, as over any token, and by {mean} in the mean" in log


def test_no_table_names_a_folder_of_the_machine_that_made_it(monkeypatch, tmp_path):
    spoken_of = [path for path in common.RESULTS.rglob("*.csv") if re.search(r"[ =\"'](/[\w.-]+){2}", path.read_text())]
    assert spoken_of == []
    monkeypatch.setattr("sys.argv", ["x", "--cache", str(tmp_path / "kept"), "--seeds", "2"])
    assert common.provenance()["command"].endswith(" --cache kept --seeds 2")
