"""benchmarks/levers.py: the page is the committed tables' and every lever's fields can run."""

from __future__ import annotations

import argparse

from benchmarks import fair_headline, fair_told, lever_learning
from benchmarks.equal_tokens import read_whole
from benchmarks.levers import LEVERS, NOT, PAGE, page, rows_of
from sim.clock.methods import method
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.validation import check, check_training


def test_the_page_is_made_of_the_committed_tables():
    assert PAGE.read_text() == page()


def test_what_the_page_says_of_the_tables_in_words():
    text = " ".join(page().split())
    apart = {
        table: [r["lever"] for r in rows_of(table) if not float(r["low"]) <= 1 <= float(r["high"])]
        for table in ("levers", "levers_vllm")
    }
    assert apart == {"levers": ["tppo+c", "tppo-once/small"], "levers_vllm": []}
    assert "of c and of `tppo-once` with the small critic alone" in text
    assert "leaves out 1 of none: this column tells no lever from no lever" in text
    made = {task: fair_told.found(task, "generated_tokens") for task in fair_headline.TASKS}
    sides = {task: "ppo" if r["high"] < 1 else "once" if r["low"] > 1 else "open" for task, r in made.items()}
    assert sides == {"chain": "ppo", "fork": "open", "length": "ppo", "maze": "open", "brackets": "once"}
    assert (
        "PPO needed fewer of them on `chain` and `length`, `tppo-once` on `brackets` (6 seeds), and `fork` and `maze` leave it open"
        in text
    )
    assert [name for name in LEVERS if NOT in page().partition(f"| {LEVERS[name][0]} |")[2].partition("\n")[0]] == ["tppo+b"]


def test_the_clocks_page_says_what_the_tokens_cost():
    ratios = sorted(fair_told.found(task, "generated_tokens")["value"] for task in fair_headline.TASKS)
    text = " ".join((PAGE.parent / "throughput.md").read_text().split())
    assert (
        f"PPO at its best needs {ratios[0]:.2f} to {ratios[3]:.2f} of the tokens that `tppo-once` generates on four of five" in text
    )
    assert f"{ratios[4]:.2f} of them on the fifth" in text
    four = [fair_told.found(task, "generated_tokens") for task in fair_headline.TASKS if task != "brackets"]
    assert "where both arrive, two of the four undecided," in text
    assert sum(row["low"] < 1 < row["high"] for row in four) == 2


def test_the_price_of_the_whole_lever_is_better_only_without_a_correction():
    rows = {
        level: lever_learning.table(read_whole(lever_learning.PATH)[0], "once-small", level=level) for level in (0.95, 1 - 0.05 / 4)
    }
    plain, corrected = (next(r for r in own if (r["score"], r["task"]) == ("area", "all")) for own in rows.values())
    assert (plain["verdict"], corrected["verdict"]) == ("better", "undecided")
    assert f"plan's 4 contrasts that would be [{corrected['low']:+.3f}, {corrected['high']:+.3f}], undecided" in " ".join(
        page().split()
    )


def test_every_lever_is_measured_has_a_name_for_the_clock_and_can_run():
    for table in ("levers", "levers_vllm"):
        assert [row["lever"] for row in rows_of(table)] == list(LEVERS)
    for name, (_, fields) in LEVERS.items():
        method(name)
        config = replace_fields(Config(), fields)
        check(config)
        check_training(config)


def test_an_arm_differs_from_the_base_in_its_lever_alone_and_small_ones_have_the_small_critic(monkeypatch):
    monkeypatch.setattr(
        lever_learning, "prepare", lambda task, fields: ({"task.name": task, "model.value": "usual"}, {"eval/accuracy": 0.5})
    )
    monkeypatch.setattr(lever_learning, "small_critic", lambda task, out, cache: f"small {task}")
    asked = argparse.Namespace(
        seeds=2, tasks=["chain"], levers=list(lever_learning.LEVERS), budget=30, cache="cache", eval_prompts=4
    )
    jobs = lever_learning.plan(asked, [])
    assert [job.seed for job in jobs] == [0] * 6 + [1] * 6
    configs = {job.arm: job.config() for job in jobs}
    base = configs.pop(lever_learning.BASE)
    usual = (base.policy.prefix, base.policy.old_logprobs, base.policy.min_new_tokens, base.model.value)
    assert usual == ("full", "recompute", 0, "usual")
    found = {a: (c.policy.prefix, c.policy.old_logprobs, c.policy.min_new_tokens, c.model.value) for a, c in configs.items()}
    assert found == {
        "constant-prefix": ("constant", *usual[1:]), "engine": ("full", "engine", *usual[2:]),
        "filled": ("full", "recompute", 64, "usual"), "small-critic": (*usual[:3], "small chain"),
        "once-small": ("full", "engine", 64, "small chain"),
    }  # fmt: skip
    there = [{"task": "chain", "arm": "engine", "seed": 0, "budget_tokens": 30}]
    assert len(lever_learning.plan(asked, there)) == 11
