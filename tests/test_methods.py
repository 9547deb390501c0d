"""Methods by name, the grid over which each is at its best, and the baselines beside them."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from sim.clock import compare
from sim.clock.compare import (
    MOST_RESPONSES,
    SLOTS,
    Best,
    Case,
    Cell,
    at_best,
    best_ppo,
    equal_ppo,
    mean_of,
    run_at,
    setup_of,
    step_ppo,
)
from sim.clock.methods import LEVERS, Method, method, routine, small_critic
from sim.clock.specs import MODELS

SMALL = Case(
    model="Qwen2.5-0.5B", gpus="4xH100", lengths="twopoint:short=50,share=0.1", cap=512, slots=64, window=128, mini_batch=32
)


@pytest.fixture(autouse=True)
def small_grid(monkeypatch):
    """The same grid, smaller: 16 to 256 places, 512 responses per step."""
    monkeypatch.setattr(compare, "SLOTS", (16, 64, 256))
    monkeypatch.setattr(compare, "MOST_RESPONSES", 512)


# ----------------------------------------------------------------------------------------------------------------------- names


def test_a_name_says_levers_critic_and_staleness():
    assert method("tppo+ac") == Method(name="tppo+ac", kind="tppo", levers="ac")
    assert method("tppo-once/small") == Method(name="tppo-once/small", kind="tppo", levers="cf", critic="small")
    assert method("tppo+acdf").levers == "acdf"
    assert method("tppo+ac/small") == Method(name="tppo+ac/small", kind="tppo", levers="ac", critic="small")
    assert method("async:4/none") == Method(name="async:4/none", kind="async", critic="none", staleness=4)
    assert method("async").staleness == 1
    assert method("ppo").staleness == 0


def test_levers_are_what_training_feeds():
    recipe = method("tppo+acd").recipe
    assert (recipe.prefix, recipe.logprobs, recipe.values, recipe.critic) == ("forward", "engine", "window", True)
    recipe = method("tppo+b").recipe
    assert (recipe.prefix, recipe.logprobs, recipe.values) == ("kept", "recompute", "row")
    assert not method("partial/none").recipe.critic


def test_every_lever_has_its_price_in_words():
    for lever, (what, price) in LEVERS.items():
        assert what
        assert price in method(f"tppo+{lever}").price
    assert method("ppo").price == ""
    assert "no critic" in method("ppo/none").price


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("ppp", "expected one of ppo, tppo"),
        ("tppo+x", "expected levers out of a, b, c, d, f"),
        ("partial+a", "expected levers out of c"),
        ("tppo+aa", "each once"),
        ("tppo+bc", "a pass whose keys and values"),
        ("tppo/none", "expected a critic"),
        ("ppo/tiny", "ppo/small or ppo/none"),
        ("ppo:3", "async:4"),
        ("", "expected one of"),
    ],
)
def test_a_name_that_makes_no_sense_is_one_line(spec, said):
    with pytest.raises(ValueError, match=said) as raised:
        method(spec)
    assert "\n" not in str(raised.value)


def test_the_small_critic_has_about_a_quarter_of_the_parameters():
    assert small_critic(MODELS["Qwen/Qwen2.5-32B"]).name == "Qwen/Qwen2.5-7B"
    assert small_critic(MODELS["Qwen/Qwen2.5-7B"]).name == "Qwen/Qwen2.5-1.5B"
    with pytest.raises(ValueError, match="critic: got 'small'"):
        small_critic(MODELS["Qwen/Qwen2.5-0.5B"])


# ------------------------------------------------------------------------------------------------------------------------ runs


@pytest.mark.parametrize("name", ["ppo", "ppo/none", "tppo", "tppo+ac", "partial+c", "tail"])
def test_every_method_runs_and_its_phases_sum_to_its_step(name):
    found = routine(method(name), setup_of(SMALL, Cell(1, 64)), window=128, responses=128)
    assert sum(found.phases_s.values()) == pytest.approx(found.step_s)
    assert found.trained > 0
    assert (found.phases_s["value_train"] == 0) == (method(name).critic == "none")
    assert (found.phases_s["logprob"] == 0) == ("c" in method(name).levers)


def test_each_lever_makes_a_step_shorter_and_all_together_shortest():
    case = dataclasses.replace(SMALL, lengths="twopoint:short=300,share=0.5", window=64)
    speed = {name: run_at(case, name, Cell(1, 64)).middle.tokens_per_s for name in
             ("tppo", "tppo+a", "tppo+b", "tppo+c", "tppo+d", "tppo+f", "tppo+acdf")}  # fmt: skip
    assert all(speed[name] > speed["tppo"] for name in speed if name != "tppo")
    assert speed["tppo+b"] > speed["tppo+a"]
    assert max(speed, key=speed.get) == "tppo+acdf"


def test_asynchronous_training_stays_within_its_staleness_on_devices_of_its_own():
    case = dataclasses.replace(SMALL, slots=0)
    for lag in (1, 3):
        best = at_best(case, f"async:{lag}")
        assert best.cell.engine_devices in (1, 2, 3)
        assert best.system.apart
        assert best.system.middle.staleness_mean <= lag
        assert best.system.step.low <= best.system.step.middle <= best.system.step.high


# ------------------------------------------------------------------------------------------------------------------------- best


def test_ppo_at_its_best_is_the_fastest_of_the_whole_grid():
    best = best_ppo(SMALL)
    speeds = {}
    for tp, slots in itertools.product((1, 2), (16, 64, 256, 512)):
        cell = Cell(tp, slots, 512 * (slots < 512))
        speeds[cell] = run_at(compare._plain(SMALL, "ppo"), "ppo", cell).middle.tokens_per_s
    assert best.cell == max(speeds, key=speeds.get)
    assert best.system.middle.finished == 512


def test_the_paper_s_comparison_is_never_kinder_to_ppo_than_its_own_best():
    ours = at_best(SMALL, "tppo")
    assert best_ppo(SMALL).system.middle.tokens_per_s >= equal_ppo(SMALL, ours).system.middle.tokens_per_s
    assert equal_ppo(SMALL, ours).cell == Cell(ours.cell.tp, ours.cell.slots)


@pytest.mark.parametrize("slots", [16, 64])
def test_a_step_of_equal_tokens_holds_no_more_than_ours(slots):
    case = dataclasses.replace(SMALL, slots=slots)
    ours = at_best(case, "tppo")
    theirs = step_ppo(case, ours)
    allowed = max(ours.system.middle.trained, case.mini_batch * mean_of(case))
    assert theirs.system.middle.finished * mean_of(case) <= allowed * 1.001
    assert theirs.system.middle.updates <= max(1, ours.system.middle.updates) + 1


def test_no_method_at_its_best_makes_more_updates_between_two_syncs_than_ppo():
    free = dataclasses.replace(SMALL, slots=0)
    most = best_ppo(free).system.middle.updates
    for name in ("tppo", "partial", "tail"):
        best = at_best(free, name)
        assert isinstance(best, Best)
        assert best.system.middle.updates <= 1.1 * most, name


def test_the_shipped_grid_is_the_stated_one():
    assert SLOTS == (256, 512, 1024, 2048, 4096, 8192)
    assert MOST_RESPONSES == 512 * 16
