"""`sim plan --best`: the search, the config that it prints, the lengths and devices that it is asked with, and what is shipped."""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import pages
from benchmarks.plans import CASES, SHIPPED
from scale.config import ScaleConfig, check_training
from scale.config import check as check_scale
from scale.memory import budget as memory
from sim.__main__ import main
from sim.clock import best
from sim.clock.calibrate import Measured, Passes
from sim.clock.ceiling import ceiling, rows
from sim.clock.cluster import Recipe, Setup
from sim.clock.devices import ACCELERATORS, accelerator, cluster
from sim.clock.distributions import Constant, Empirical, TwoPoint
from sim.clock.efficiency import Efficiency
from sim.clock.hardware import Layout, Roofline, model
from sim.clock.lengths import load_lengths
from sim.clock.methods import method
from sim.clock.plan import PlanConfig
from sim.clock.ranges import Ranged
from sim.clock.run_config import as_tree, as_yaml, fields_of
from sim.clock.run_lengths import doubts, of_run
from sim.clock.schedule import ppo, run, tppo
from sim.clock.search import (
    DOUBT,
    ELSEWHERE,
    RUNNABLE,
    Setting,
    chosen,
    explored,
    grid_outside,
    run_at,
    settings_of,
    setup_of,
)  # fmt: skip
from sim.clock.trace import check_conservation
from tppo_ref.method.records import End
from tppo_ref.runs.parsing import get_field, parse

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "scale" / "configs"
SMALL = PlanConfig(
    best=True, model="Qwen2.5-0.5B", gpus="2xH100", lengths="twopoint:short=60,share=0.1", cap=768, samples=2, mini_batch=16,
    longest_prompt=256,
)  # fmt: skip
ARGV = ["plan", "--best", "--model", "Qwen2.5-0.5B", "--gpus", "2xH100", "--lengths", "twopoint:short=60,share=0.1", "--cap", "768",
        "--samples", "2", "--mini-batch", "16", "--longest-prompt", "256"]  # fmt: skip


@functools.cache
def small() -> best.Answer:
    return best.answer(SMALL)


def loaded(text: str, folder: Path) -> ScaleConfig:
    """By scale's own loader, as `scale/launch.py --config` reads it."""
    (folder / "run.yaml").write_text(text)
    return check_scale(parse(ScaleConfig, ["--config", str(folder / "run.yaml")], prog="test"))


# ------------------------------------------------------------------------------------------------------------------- the search


@functools.cache
def everywhere(name: str) -> dict[Setting, Ranged]:
    """Every place of a method's grid, run."""
    question, kind = small().question, method(name).kind
    grid = grid_outside(question, name) if name in ELSEWHERE else list(settings_of(question, kind))
    runs = {at: run_at(question, method(name), at) for at in grid}
    return {at: one for at, one in runs.items() if one.middle.updates <= question.most_updates + 0.5}


@pytest.mark.parametrize("slack", [0.0, 0.03])
def test_the_search_finds_what_running_every_place_finds(slack):
    """By definition: of all places within the slack of the fastest the freshest."""
    question = dataclasses.replace(small().question, slack=slack)
    grids = {name: list(settings_of(question, kind)) for kind, names in RUNNABLE.items() for name in names}
    grids |= {name: grid_outside(question, name) for name in ELSEWHERE}
    found = explored(question, grids)
    for name in (name for name, grid in grids.items() if grid):
        runs = {at: one.middle for at, one in everywhere(name).items()}
        fastest = max(one.tokens_per_s for one in runs.values())
        near = [at for at, one in runs.items() if one.tokens_per_s >= (1 - slack) * fastest]
        assert chosen(question, name, found[name]).setting == min(near, key=lambda at: (runs[at].lag_updates, runs[at].step_s))
    run_there, all_there = (sum(map(len, some.values())) for some in (found, grids))
    assert run_there < all_there


@pytest.mark.parametrize("name", [*(name for names in RUNNABLE.values() for name in names), *ELSEWHERE])
def test_no_place_is_faster_than_its_ceiling(name):
    question = small().question
    for at, found in everywhere(name).items():
        most = ceiling(method(name), setup_of(question, at, Efficiency(), method(name).critic), window=at.window, refill=at.refill)
        assert found.middle.tokens_per_s <= (1 + DOUBT) * most


def test_a_ceiling_is_reached_where_nobody_waits():
    """Equal responses, one per slot, one replica, no sync: every decode step has all slots, whatever their context."""
    costs = Measured(step_s=2.0, row_s=0.5, context_s=0.01, arrival_s=0.0, prefill_token_s=0.1, forward=Passes(0.0, 0.3),
                     policy=Passes(0.0, 0.7), value=Passes(0.0, 0.2), once_s=0.0)  # fmt: skip
    work = Setup(lengths=Constant(value=10, cap=12), prompt_tokens=5, costs=costs, slots=4)
    contexts = sum(range(5, 15))  # in the cache or fed, at each of ten steps: the prompt, those sampled so far
    seconds = 10 * (2.0 + 4 * 0.5) + 0.01 * 4 * contexts + 4 * 4 * 0.1 + 4 * 15 * (0.3 + 0.7 + 0.2)
    assert ceiling(method("ppo"), work) == pytest.approx(40 / seconds)
    trace = run(ppo(work), steps=2)
    assert trace.total("trained") / trace.seconds == pytest.approx(40 / seconds)


def test_a_full_cache_lowers_the_ceiling_as_fewer_slots_do():
    place = small().named("ppo").setting
    speeds = [ceiling(method("ppo"), setup_of(small().question, place._replace(slots=slots), Efficiency())) for slots in (2, 8, 32)]
    assert speeds == sorted(speeds)
    roof = setup_of(small().question, place._replace(slots=10**6), Efficiency())
    tight = dataclasses.replace(roof, slots=10**7)
    assert ceiling(method("ppo"), roof) == ceiling(method("ppo"), tight)


@given(st.integers(1, 60), st.integers(1, 70), st.booleans(), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_rows_of_cut_responses_lose_and_double_no_token(tokens, window, anywhere, seed):
    lengths = Constant(value=tokens, cap=60)
    done_n, new_n, prompt_n = rows(lengths, 7, 4, seed, window, anywhere)
    begins = np.flatnonzero(done_n == 0)
    assert np.add.reduceat(new_n, begins).tolist() == [tokens] * len(begins)
    assert set(prompt_n.tolist()) == {7}
    assert 1 <= new_n.min() <= new_n.max() <= window
    inner = np.flatnonzero((done_n > 0) & (done_n + new_n < tokens))
    assert (new_n[inner] == window).all()
    continued = np.flatnonzero(done_n > 0)
    assert (done_n[continued] == (done_n + new_n)[continued - 1]).all()
    if not anywhere:
        assert (done_n % window == 0).all()


def test_every_method_fits_and_makes_one_to_the_most_updates():
    question = small().question
    for one in small().found:
        assert best.peak(one) <= question.gpu.memory_bytes
        assert one.system.middle.updates <= question.most_updates + 0.5
        if one.method.kind == "tppo":
            assert one.setting.window in question.allowed
    assert {one.method.name for one in small().found} == {name for names in RUNNABLE.values() for name in names}
    assert [one.speed for one in small().found] == sorted((one.speed for one in small().found), reverse=True)


def test_the_recommended_one_is_the_freshest_of_the_fast():
    found = small()
    candidates = [one for one in found.found if not set(one.method.levers) & set("ab") and one.method.critic == "own"]
    fastest = max(one.speed for one in candidates)
    near = [one for one in candidates if one.speed >= 0.97 * fastest]
    assert found.recommended.system.middle.lag_updates == min(one.system.middle.lag_updates for one in near)


def test_what_was_measured_to_cost_learning_is_recommended_by_its_name_alone():
    assert not set(small().recommended.method.levers) & set("ab")
    assert best.answer(dataclasses.replace(SMALL, method="tppo+ac")).recommended.method.name == "tppo+ac"


def test_a_method_without_a_critic_runs_here_and_is_recommended_by_its_name_alone(tmp_path):
    """Asked for PPO's kind, the answer is PPO with a critic, though without one it is faster; the advice says where it is."""
    asked = dataclasses.replace(SMALL, method="ppo")
    found = best.answer(asked)
    assert {"ppo/none", "partial-is+c/none"} <= {one.method.name for one in found.found}
    assert found.named("ppo/none").speed > found.recommended.speed
    assert found.recommended.method.critic == "own"
    (line,) = [line for line in best.advice(found) if "ppo/none" in line]
    assert "docs/critic_free.md" in line
    assert "not in this repository" not in line
    named = dataclasses.replace(SMALL, method="ppo/none")
    assert loaded(best.text(named, best.answer(named)), tmp_path).algo.run.method == "rloo"


def test_one_answer_to_a_prompt_leaves_nothing_to_compare_it_with():
    alone = dataclasses.replace(SMALL, samples=1)
    assert best.answer(alone).named("ppo/none") is None
    with pytest.raises(ValueError, match=r"^samples: got 1 with ppo/none; expected at least 2"):
        best.answer(dataclasses.replace(alone, method="ppo/none"))


def test_a_window_whose_cuts_weigh_too_much_is_left_to_partial_rollouts():
    question = dataclasses.replace(small().question, tolerance=0.0)
    assert len(question.allowed) == 1
    assert {at.window for at in settings_of(question, "tppo")} <= set(question.allowed)
    assert {at.window for at in settings_of(question, "partial-is")} > set(question.allowed)


# -------------------------------------------------------------------------------------------------- partial rollouts by windows


def setup(length: int, cap: int, slots: int = 1) -> Setup:
    costs = Roofline(accelerator=accelerator("H100"), model=model("Qwen2.5-0.5B"), layout=Layout(num_devices=1))
    return Setup(lengths=Constant(value=length, cap=cap), prompt_tokens=5, costs=costs, slots=slots)


def test_a_response_of_three_windows_trains_once_by_hand():
    """Versions 0, 0, 1, 1, 2, 2 of its tokens; trained in step 2 it is 2, 2, 1, 1, 0, 0 syncs old."""
    records = run(tppo(setup(6, 8), window=2, train_on="ended"), steps=6).records
    assert [r.trained for r in records] == [0, 0, 6, 0, 0, 6]
    assert [r.in_flight for r in records] == [2, 4, 0, 2, 4, 0]
    assert [r.staleness_sum for r in records] == [0, 0, 6, 0, 0, 6]
    assert [r.staleness_max for r in records] == [0, 0, 2, 0, 0, 2]
    assert [r.tokens_fed for r in records] == [0, 0, 11, 0, 0, 11]
    assert sum(r.prefix_tokens_trained for r in records) == 0


def critic_free(lengths, *, slots: int, samples: int) -> Setup:
    work = setup(1, lengths.cap, slots=slots)
    return dataclasses.replace(work, lengths=lengths, samples_per_prompt=samples, recipe=Recipe(critic=False))


@pytest.mark.parametrize("refill", ["immediate", "step"])
@pytest.mark.parametrize(("slots", "samples", "replicas"), [(2, 2, 1), (8, 4, 2), (6, 3, 2), (5, 8, 1)])
def test_a_group_trains_in_the_step_in_which_its_last_response_ends(slots, samples, replicas, refill):
    """By definition, from what was decoded where: tokens, their age, and what is held."""
    lengths = Empirical(values=tuple(range(1, 14)), cap=13, correlation=0.4)
    work = dataclasses.replace(critic_free(lengths, slots=slots, samples=samples), num_replicas=replicas)
    system, steps = tppo(work, window=4, refill=refill, train_on="ended"), 40
    records, decoded, ended_in = [], collections.defaultdict(list), {}
    for step in range(steps):
        records.append(system.step())
        for _, sample, begin, stop, end in system.segments[1].tolist():
            decoded[sample] += [step] * (stop - begin)
            if end != End.RUNNING:
                ended_in[sample] = step
    groups = collections.defaultdict(list)
    for sample, step in ended_in.items():
        groups[sample // samples].append((step, sample))
    trained_in = {sample: max(group)[0] for group in groups.values() if len(group) == samples for _, sample in group}
    for step, record in enumerate(records):
        ages = [step - at for sample, when in trained_in.items() if when == step for at in decoded[sample]]
        assert (record.trained, record.staleness_sum, record.staleness_max) == (len(ages), sum(ages), max(ages, default=0))
        assert record.completed == sum(when == step for when in trained_in.values())
    assert any(trained_in[sample] > when for sample, when in ended_in.items() if sample in trained_in)  # somebody waited
    check_conservation(records)


def test_with_a_critic_nobody_waits_for_a_group():
    lengths = Empirical(values=tuple(range(1, 14)), cap=13)
    work = dataclasses.replace(critic_free(lengths, slots=8, samples=4), recipe=Recipe())
    records = run(tppo(work, window=4, train_on="ended"), steps=20).records
    assert [r.completed for r in records] == [r.finished for r in records]


def test_with_a_window_as_long_as_a_response_it_is_ppo():
    def of(system):
        return [dataclasses.replace(r, curve=None) for r in run(system, steps=3).records]

    work = dataclasses.replace(setup(1, 64, slots=8), lengths=TwoPoint(short=9, long_share=0.3, cap=64))
    assert of(tppo(work, window=64, refill="step", train_on="ended")) == of(ppo(work))


# -------------------------------------------------------------------------------------------------------------------- the config


def test_yaml_reads_back_as_what_was_planned():
    for one in small().found:
        fields = fields_of(small().question, one)
        assert yaml.safe_load(as_yaml(fields)) == as_tree(fields)
        assert len({field.path for field in fields}) == len(fields)


@pytest.mark.parametrize("name", [name for names in RUNNABLE.values() for name in names])
def test_scale_takes_the_config_of_every_method_and_means_the_same(name, tmp_path):
    one = small().named(name)
    config, at = loaded(as_yaml(fields_of(small().question, one)), tmp_path), one.setting
    policy, levers = config.algo.policy, one.method.levers
    assert (config.algo.rollout.slots, config.engine.tensor_parallel) == (at.slots, at.tp)
    assert policy.train_on == ("ended" if one.method.kind == "partial-is" else "window")
    assert policy.prefix == ("constant" if set("ab") & set(levers) else "full")
    assert policy.keep_prefix == ("b" in levers)
    assert policy.old_logprobs == ("engine" if "c" in levers else "recompute")
    assert policy.min_new_tokens == (at.window if "f" in levers else 0)
    if one.method.kind == "ppo":
        assert config.algo.rollout.responses_per_step == at.responses
        assert config.algo.rollout.refill == "batch"
    else:
        assert (config.algo.rollout.window, config.algo.rollout.refill) == (at.window, at.refill)
    memory.check_cuts(config, memory.read_shape(_shape(tmp_path)))


def _shape(folder: Path) -> Path:
    """Qwen2.5-0.5B, which scale/configs/models does not have."""
    shape = json.loads((CONFIGS / "models" / "qwen2.5-1.5b.json").read_text()) | {
        "num_hidden_layers": 24, "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
    }  # fmt: skip
    (folder / "shape.json").write_text(json.dumps(shape))
    return folder / "shape.json"


@pytest.mark.parametrize(
    ("name", "stands_for"), [("ppo/none", "rloo"), ("partial-is/none", "rloo-window"), ("partial-is+c/none", "tppo")]
)
def test_without_a_critic_the_config_is_one_of_the_critic_free_methods(name, stands_for, tmp_path):
    question = dataclasses.replace(small().question, samples=8)
    one = dataclasses.replace(small().named("ppo" if name.startswith("ppo") else "partial-is"), method=method(name))
    fields = fields_of(question, one)
    config = loaded(as_yaml(fields), tmp_path)
    assert config.algo.run.method == stands_for
    assert config.algo.advantage.critic_free
    assert config.algo.rollout.samples_per_prompt == 8
    assert config.algo.policy.train_on == ("window" if name == "ppo/none" else "ended")
    check_training(config)
    assert not [field.path for field in fields if ".value" in field.path]
    with pytest.raises(ValueError, match=r"^samples: got 1 with"):
        fields_of(dataclasses.replace(question, samples=1), one)


def test_a_method_of_others_has_no_config():
    for name in ("tail+c", "async:4"):
        with pytest.raises(ValueError, match="does not run"):
            fields_of(small().question, small().named(name))


# ------------------------------------------------------------------------------------------------------------------- the command


def test_stdout_is_a_config_and_a_file_is_the_same(capsys, tmp_path):
    assert main(ARGV) == 0
    text = capsys.readouterr().out
    assert loaded(text, tmp_path).algo.rollout.max_response_tokens == 768
    assert main([*ARGV, "--out", str(tmp_path / "best.yaml")]) == 0
    table = capsys.readouterr().out
    assert (tmp_path / "best.yaml").read_text() == text
    for name in (one.method.name for one in small().found):
        assert f"\n# {name} " in text
        assert f"\n{name} " in table


def test_json_has_every_method_with_its_ranges(capsys):
    assert main([*ARGV, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "tppo-sim-best/1"
    for row in found["methods"]:
        for name in ("tokens_per_s", "step_s", "updates_per_day", "gain"):
            assert row[name]["low"] <= row[name]["middle"] <= row[name]["high"]
    assert found["recommended"] == small().recommended.method.name


def test_what_may_be_recommended_can_be_restricted():
    for wanted in ("ppo", "tppo+ac"):
        chosen = best.answer(dataclasses.replace(SMALL, method=wanted)).recommended.method
        assert wanted in (chosen.kind, chosen.name)
    assert best.answer(dataclasses.replace(SMALL, method="tppo-once")).recommended.method.name == "tppo+cf"


def test_partial_rollouts_are_named_where_they_are_faster():
    found = small()
    said = " ".join(best.advice(found))
    tppo_, partial = found.of_kind("tppo"), found.of_kind("partial-is")
    asked = found.recommended if found.recommended.method.kind == "tppo" else tppo_
    assert partial.system.gain(asked.system).text() in said
    wanted = best.answer(dataclasses.replace(SMALL, method="partial-is"))
    faster = partial.system.gain(tppo_.system).middle > 1
    assert faster == ("Use partial rollouts instead" in " ".join(best.advice(wanted)))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "grpo"], "method: got 'grpo'; expected one of all, tppo, partial-is, ppo"),
        (["--gpus", "12xH100"], "whole machines of 8"),
        (["--model", "Qwen2.5-72B"], "does not fit on 2 x H100"),
        (["--mini-batch", "0"], "mini_batch: got 0"),
        (["--slack", "2"], "slack: got 2.0"),
        (["--out", "{tmp}/no/folder.yaml"], "cannot be written"),
        (["--lengths", "{tmp}"], "expected a run's folder with a responses.csv"),
    ],
)
def test_a_mistake_is_one_line(arguments, said, capsys, tmp_path):
    assert main([*ARGV, *(a.format(tmp=tmp_path) for a in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert said in err


def test_a_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m sim --help | true"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    assert "Traceback" not in done.stderr


# -------------------------------------------------------------------------------------------------------------- devices, lengths


def test_a_device_from_a_file(tmp_path):
    fields = {field: value for field, value in dataclasses.asdict(ACCELERATORS["B200"]).items() if field not in ("name", "source")}
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(fields))
    number, mine = cluster(f"16x{file}")
    assert number == 16
    assert dataclasses.replace(mine, name="B200", source=ACCELERATORS["B200"].source) == ACCELERATORS["B200"]
    for wrong, said in (({"flops": 1}, "got the field 'flops'"), ({"flops_per_s": "much"}, "flops_per_s: got 'much'"),
                        ({"memory_bytes": -1}, "memory_bytes: got -1")):  # fmt: skip
        file.write_text(json.dumps(fields | wrong))
        with pytest.raises(ValueError, match=said):
            accelerator(str(file))
    file.write_text(json.dumps({"memory_bytes": 1e9}))
    with pytest.raises(ValueError, match="has no flops_per_s"):
        accelerator(str(file))


def a_run(folder: Path, rows: list[tuple[int, int]], cap: int = 100) -> Path:
    folder.mkdir()
    with (folder / "responses.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("step", "train_s", "response", "prompt", "tokens", "end", "score"),
                                    *((1, 0.0, number, 0, tokens, "END_TOKEN", 1.0) for number, tokens in rows)])  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"rollout": {"max_response_tokens": cap}}))
    return folder


def test_a_runs_lengths_leave_out_what_was_drawn_after_the_first_that_still_runs(tmp_path):
    """Response 3 had not ended: 4 and 5, which had, are the short ones of their time."""
    folder = a_run(tmp_path / "mine", [(0, 40), (2, 7), (1, 90), (4, 3), (5, 2)])
    assert of_run(folder).values == (40, 90, 7)
    assert load_lengths(folder).cap == 100
    assert load_lengths(folder, 400).cap == 400
    with pytest.raises(ValueError, match="at most the cap of 50"):
        load_lengths(folder, 50)


def test_thin_lengths_are_doubted(tmp_path):
    assert "3 lengths are few" in doubts(of_run(a_run(tmp_path / "few", [(0, 40), (1, 90), (2, 7)])))[0]
    one = doubts(of_run(a_run(tmp_path / "one", [(i, 40) for i in range(1200)])))
    assert len(one) == 1
    assert "all 1,200 lengths are 40" in one[0]
    capped = doubts(of_run(a_run(tmp_path / "capped", [(i, 10 + i % 91) for i in range(1200)]), 400))
    assert "ended by a cap below 400" in capped[0]
    (piled,) = doubts(of_run(a_run(tmp_path / "piled", [(i, 10 + i % 80) for i in range(1200)])))
    assert "1.2 % of the lengths are the longest, 89, as if a cap below 100 had ended them" in piled
    assert doubts(of_run(a_run(tmp_path / "good", [(0, 95), *((i, 10 + i % 300) for i in range(1, 1200))], cap=400))) == []
    assert "not your run's" in doubts(load_lengths("math-mixture"))[0]


# --------------------------------------------------------------------------------------------------------------- what is shipped


def leaves(tree, prefix=""):
    return {
        k: v
        for key, sub in tree.items()
        for k, v in (leaves(sub, f"{prefix}{key}.") if isinstance(sub, dict) else {prefix + key: sub}).items()
    }


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_is_what_the_planner_recommends(name):
    """Head and every field that it writes; a config may say more."""
    found = best.answer(SHIPPED[name])
    text, shipped = best.text(SHIPPED[name], found), (CONFIGS / f"{name}.yaml").read_text()
    planned = leaves(yaml.safe_load(text))
    assert planned == {field: value for field, value in leaves(yaml.safe_load(shipped)).items() if field in planned}
    assert [line for line in shipped.splitlines() if line.startswith("#")] == [
        line for line in text.splitlines() if line[:1] == "#"
    ]


def test_the_table_of_plans_has_each_case_and_each_recommends_one_that_runs():
    rows = pages.committed("plans")
    assert list(dict.fromkeys(row["what"] for row in rows)) == list(CASES)
    for what, config in CASES.items():
        (chosen,) = [row for row in rows if row["what"] == what and row["recommended"] == "True"]
        assert chosen["runnable"] == "True"
        assert chosen["asked"] == best.command(config)
        assert method(chosen["method"]).kind in RUNNABLE
        assert get_field(config, "model") in chosen["asked"] or get_field(config, "model") == PlanConfig().model


def test_every_number_of_docs_scale_is_the_committed_one():
    page = pages.PAGES[1].read_text()
    assert len(pages.NOTE.findall(page)) > 10
    assert pages.filled(page) == page
