"""`sim throughput`, its page and the comparison with the literature: prose against CSV, CSV against the clock, closed forms."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import literature, pages, update_level
from sim.__main__ import main
from sim.clock.clock_figures import busy_share, timeline_rows
from sim.clock.cluster import Recipe, Setup
from sim.clock.compare import Case, WeightsOnly, at_best, best_ppo, evaluate, method_row, setup_of
from sim.clock.distributions import Constant, TwoPoint
from sim.clock.efficiency import Efficiency
from sim.clock.hardware import Layout, Roofline, cluster, model
from sim.clock.methods import method
from sim.clock.ranges import Ranged
from sim.clock.schedule import ppo, tppo
from sim.clock.steady import Steady, in_routine, steady, synchronous
from sim.clock.systems import PartialRollouts
from sim.clock.throughput import NAMES, PUBLISHED, SETUPS, TABLES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = pages.PAGE.read_text()


# ------------------------------------------------------------------------------------------------------- prose, CSV and clock


def test_every_number_of_the_page_is_the_committed_one():
    notes = pages.NOTE.findall(PAGE)
    assert len(notes) > 150
    assert len(notes) == len(re.findall(r"<!-- \w+ \"", PAGE)), "a note without a number"
    for number, _, name, what, column, spec in notes:
        assert number == pages.number(name, what, column, spec), (name, what, column)


def test_no_gain_stands_on_the_page_without_its_source():
    """Outside of the published claims each `1.23x` is annotated."""
    text = re.sub(r"[\d.]+x \([\d.]+ to [\d.]+\)<!--.*?-->", "@", PAGE)
    bare = set(re.findall(r"(?<![\d.@-])(\d+\.\d+)x", re.sub(r"<!--.*?-->", "@", text)))
    published = " ".join(f"{claim} {setup}" for _, claim, setup in PUBLISHED)
    assert bare <= {number for number in bare if f"{number}x" in published}


def test_the_page_says_how_many_predictions_of_real_runs_miss_and_names_each():
    rows = [row for row in pages.committed("reality") if row["role"] == "prediction"]
    missed = [pages.key("reality", row) for row in rows if row["within"] != "True"]
    section = PAGE.partition("## Against our own runs")[2].partition("\n## ")[0]
    assert f"{len(rows) - len(missed)} of {len(rows)} predictions" in section
    assert all(f'"{name}" error' in section for name in missed)


def test_by_medians_alone_fewer_predictions_of_real_runs_are_within():
    rows = [row for row in pages.committed("reality") if row["role"] == "prediction"]
    near = [row for row in rows if abs(float(row["predicted"]) / float(row["measured"]) - 1) <= float(row["tolerance"])]
    assert f"quotient of the two medians {len(near)} of {len(rows)} would be within" in " ".join(PAGE.split())
    runs = {row["run"] for row in rows}
    assert (len([run for run in runs if "/" not in run]), len([run for run in runs if "/" in run])) == (
        7,
        2,
    )  # "seven runs", "two pairs"


def test_what_the_page_says_of_the_tables_in_words():
    flowing = " ".join(re.sub("<!--.*?-->", "", PAGE).split())
    first = [row for row in pages.committed("literature") if row["first"] == "True"]
    within = sum(row["within"] == "True" for row in first)
    assert f"{within} of {len(first)} lie inside their range" in flowing
    assert f"The misses stay, {len(first) - within} of {len(first)}" in flowing
    tail, long = (float(pages.number("methods", f"{what}/tppo", "gain", ".4f")) for what in ("R1", "R2"))
    assert "gains about a seventh or loses about a fifth" in flowing
    assert round(1 / (tail - 1)) == 7
    assert round(1 / (1 - long)) == 5
    slots = {row["slots"]: row for row in pages.committed("slots") if row["lengths"] == SETUPS[0].lengths}
    assert max(slots.values(), key=lambda row: float(row["gain"]))["slots"] == "4096"
    assert float(slots["4096"]["lag_updates"]) > float(slots["4096"]["best_lag_updates"]) > float(slots["2048"]["lag_updates"])
    assert (float(slots["256"]["lag_updates"]), slots["256"]["step_responses"]) == (0.5, "512")  # "two updates", PPO's one
    heavy = next(row for row in pages.committed("tails") if row["what"] == "sigma 1.0, cache")
    assert float(heavy["gain_equal"]) - 1 < 0.5 * (float(heavy["gain_rollout"]) - 1)  # "less than half of that gain"
    rows = {(row["what"], row["system"]): row for row in pages.committed("methods")}
    for what in ("R1", "R2", "R3"):
        assert all(float(rows[what, name]["lag_updates"]) > 0 for name in NAMES)  # "no method ... has none"
        tppo = [float(rows[what, name]["gain"]) for name in NAMES if name.startswith("tppo") and "/" not in name]
        assert max(tppo) < float(rows[what, "partial+c"]["gain"])  # "no T-PPO of the table is faster"
        one, four = (float(rows[what, f"async:{bound}"]["tokens_per_s"]) for bound in (1, 4))
        assert one == pytest.approx(four, rel=1e-3)  # "gain the same"
    assert not {"tppo+cf", "tppo+cf/small", "partial/small", "partial+c/small"} & set(NAMES)  # "has no row here"


def test_rows_with_a_lever_that_is_not_there_are_marked():
    for line in PAGE.partition("## Every method")[2].splitlines():
        if line.startswith("| T-PPO + "):
            assert (" d" in line.partition("<!--")[0].split("|")[1]) == ("†" in line)


# ------------------------------------------------------------------------------------------------------- the update's own level


def test_seconds_of_phases_are_multiplied_by_hand():
    found = made(trained=60.0)  # 1 + 0 + 3 + 2 + 1 seconds of phases
    assert update_level.speed(found, {}) == 60 / 7
    assert update_level.speed(found, {"policy_train": 0.5, "value_train": 0.5}) == 60 / (7 - 2.5)


def test_what_is_fastest_is_so_by_the_speed_that_is_asked_for():
    case = small(slots=0)
    for find in (lambda speed: best_ppo(case, most_responses=512, speed=speed), lambda speed: at_best(case, "tppo", speed=speed)):
        fast, slow = find(lambda found: found.tokens_per_s), find(lambda found: -found.tokens_per_s)
        assert slow.system.middle.tokens_per_s < fast.system.middle.tokens_per_s


def test_training_as_published_is_of_the_one_published_update_and_raises_the_gain():
    rows = {row["what"]: {name: float(row[name]) for name in ("update", "passes", "gain", "gain_equal")}
            for row in pages.committed("update")}  # fmt: skip
    assert len(rows) == 2 * len(update_level.LEVELS)
    for case in SETUPS[:2]:
        plain, update, training = (rows[f"{case.what}, {level}"] for level in update_level.LEVELS)
        committed = next(row for row in pages.committed("methods") if pages.key("methods", row) == f"{case.what}/tppo")
        assert plain["gain"] == pytest.approx(float(committed["gain"]))
        assert (plain["update"], plain["passes"], update["passes"]) == (1, 1, 1)
        assert update["update"] == training["update"] == pytest.approx(270 / 585.4)
        assert training["passes"] == pytest.approx(108 / 146.4)
        assert plain["gain"] < update["gain"] < training["gain"]
        assert plain["gain_equal"] < update["gain_equal"] < training["gain_equal"]
    small = {what: {level: f"{rows[f'{what}, {level}']['gain']:.2f}x" for level in update_level.LEVELS} for what in ("R1", "R2")}
    told = [f"{one['as predicted']} becomes {one['update']}" for one in small.values()]
    passes = " and ".join(one["training"] for one in small.values())
    assert f"{', '.join(told)} ({passes} with the passes)" in (RESULTS.parent / "RESULTS.md").read_text()
    assert Efficiency().training_flops_fraction / update_level.published_over_predicted("update") > 0.9  # "about the whole rate"


def test_a_wrong_number_would_be_noticed():
    row = next(row for row in pages.committed("slots") if row["what"] == "dapo-32b@2049, 256")
    other = row | {"gain": str(float(row["gain"]) + 0.02)}
    for spec in (".2f", "range"):
        assert pages.written(other, "gain", spec) != pages.written(row, "gain", spec)
    note = '1.00x (0.90 to 1.10)<!-- slots "dapo-32b@2049, 256" gain range -->'
    assert pages.filled(note) == pages.number("slots", "dapo-32b@2049, 256", "gain", "range") + note[20:]


@pytest.mark.parametrize(("name", "what"), [("slots", "dapo-32b@2049, 64"), ("lengths", "code-14b")])
def test_the_clock_still_says_what_is_committed(name, what):
    case = next(case for case in TABLES[name]() if case.what == what)
    same_numbers(evaluate(case), next(row for row in pages.committed(name) if row["what"] == what))


def test_the_clock_still_says_what_is_committed_of_a_method():
    same_numbers(
        method_row(SETUPS[2], "partial+c", method("partial+c")),
        next(row for row in pages.committed("methods") if pages.key("methods", row) == "R3/partial+c"),
    )


def same_numbers(new, old):
    assert set(new) == set(old)
    for column, value in new.items():
        if isinstance(value, float):
            assert value == pytest.approx(float(old[column]), rel=1e-6, abs=1e-9), column
        else:
            assert str(value) == old[column], column


def test_the_tables_committed_are_all_of_their_cases():
    for name, cases in TABLES.items():
        assert [(row["what"], row["lengths"]) for row in pages.committed(name)] == [(case.what, case.lengths) for case in cases()]
    assert [(row["what"], row["system"]) for row in pages.committed("methods")] == [
        (case.what, name) for case in SETUPS for name in NAMES
    ]
    for name in (*TABLES, "methods"):  # every number has its range around it
        for row in pages.committed(name):
            for column in [column for column in row if f"{column}_low" in row]:
                assert float(row[f"{column}_low"]) <= float(row[column]) <= float(row[f"{column}_high"]), (
                    name,
                    row["what"],
                    column,
                )
    for name in ("roofline", "windows", "tails", "timeline"):
        assert (RESULTS / f"throughput_{name}.png").stat().st_size > 10_000
        assert f"throughput_{name}.png" in PAGE


# ---------------------------------------------------------------------------------------------------------------- closed forms


def small(**changes) -> Case:
    plain = {
        "model": "Qwen2.5-0.5B",
        "gpus": "1xH100",
        "tp": 1,
        "cap": 512,
        "slots": 16,
        "window": 128,
        "lengths": "twopoint:short=50,share=0.1",
    }
    return Case(**plain | changes)


def test_weights_only_operations_per_byte_are_the_batch():
    costs = setup_of(small(counted="weights")).costs
    assert isinstance(costs, WeightsOnly)
    shape = costs.model
    per_sequence = (shape.num_layer_matrix_parameters + shape.num_embedding_parameters) / (
        shape.num_body_parameters + shape.num_embedding_parameters
    )
    for batch in (1, 84, 249):
        assert costs.operations_per_byte(batch, 10_000 * batch) == pytest.approx(batch * per_sequence)
    assert 0.999 < per_sequence < 1
    assert setup_of(small()).costs.operations_per_byte(84, 84 * 10_000) < 40


def test_with_weights_only_ppos_batch_is_the_slots_times_mean_over_longest():
    """The closed form of finding 1, against the clock: memory-bound, so that every decode step takes the same time."""
    found = synchronous(setup_of(small(counted="weights", lengths="twopoint:short=100,share=0.5", slots=64)))
    assert found.ops_per_byte == pytest.approx(64 * (0.5 * 100 + 0.5 * 512) / 512, rel=0.1)


def test_keys_and_values_lower_operations_per_byte_and_a_bounded_cache_never_raises_the_speed():
    rows = {}
    for counted in ("weights", "kv", "cache"):
        setup = setup_of(small(counted=counted, slots=256))
        rows[counted] = in_routine(setup, 128)
    assert rows["kv"].ops_per_byte < rows["weights"].ops_per_byte
    assert rows["cache"].step_s >= rows["kv"].step_s - 1e-9
    assert rows["weights"].mean_active == pytest.approx(256)


def test_equal_lengths_lose_and_a_tail_wins():
    equal, tail = evaluate(small(lengths="constant:512")), evaluate(small())
    assert equal["gain_equal_high"] < 1 < tail["gain_equal_low"]
    assert equal["longest_over_mean"] == pytest.approx(1)
    assert tail["gain_without_prefix"] > tail["gain_equal"]
    assert tail["gain"] <= tail["gain_equal"] + 1e-9  # PPO's own best is no worse than PPO at our settings
    assert equal["gain"] <= equal["gain_equal"] + 1e-9


def test_without_earlier_windows_nothing_is_fed_again_and_the_gains_say_so():
    row = evaluate(small(lengths="constant:128", cap=128))
    assert row["fed_again"] == 0
    assert row["gain_without_prefix"] == pytest.approx(row["gain_equal"])
    assert row["gain_equal"] == pytest.approx(1)


def made(**fields) -> Steady:
    plain = {name: 0.0 for name in Steady.__annotations__}
    phases = {"logprob": 1.0, "value_forward": 0.0, "policy_train": 3.0, "value_train": 2.0, "prefill": 1.0}
    return Steady(**plain | {"system": "", "steps": 1, "phases_s": phases} | fields)


def test_the_step_without_prefixes_by_hand():
    after = made(step_s=12.0, rollout_s=6.0, trained=90.0, tokens_fed=200.0, prefix_tokens_trained=100.0, prefill_tokens=40.0,
                 reprefilled_tokens=30.0)  # fmt: skip
    assert after.step_without_prefix_s == 12 - 4 / 2 - 3 / 4


def test_a_gains_range_by_hand():
    """Rollouts of 9, 6, 3 s and the rest of 12, 6, 6 s beside rollouts of 20, 14, 10 s and the rest of 12, 6, 6 s."""

    def ranged(rollouts, rest, trained):
        levels = dict(zip(("slow", "middle", "fast"), zip(rollouts, rest, strict=True), strict=True))
        system = Ranged(lambda efficiency: None)
        system.levels = {level: made(step_s=a + b, rollout_s=a, trained=trained) for level, (a, b) in levels.items()}
        return system

    after, before = ranged((9, 6, 3), (12, 6, 6), 90.0), ranged((20, 14, 10), (12, 6, 6), 100.0)
    found = after.gain(before)
    ratios = [0.9 * (14 + 6) / (6 + 6), 0.9 * 32 / 21, 0.9 * 26 / 15, 0.9 * 22 / 15, 0.9 * 16 / 9]
    assert found == pytest.approx((min(ratios), ratios[0], max(ratios)))
    assert after.rollout_gain(before) == pytest.approx((0.9 * 20 / 9, 0.9 * 14 / 6, 0.9 * 10 / 3))
    assert after.step == pytest.approx((9, 12, 21))
    assert after.speed == pytest.approx((90 / 21, 90 / 12, 90 / 9))
    assert found.text() == f"{ratios[0]:.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"


def test_a_steady_state_is_a_mean_over_its_steps():
    setup = Setup(
        lengths=TwoPoint(short=20, long_share=0.2, cap=100), prompt_tokens=5, costs=setup_of(small()).costs, slots=8, seed=3
    )
    found = steady(tppo(setup, window=25), warm=4, steps=3)
    system = tppo(setup, window=25)
    records = [system.step() for _ in range(7)][4:]
    assert found.step_s == pytest.approx(np.mean([r.step_s for r in records]))
    assert found.trained == np.mean([r.trained for r in records])
    assert sum(found.phases_s.values()) == pytest.approx(found.step_s)
    assert found.occupancy == pytest.approx(sum(r.busy_slot_s for r in records) / sum(8 * r.rollout_s for r in records))
    assert in_routine(setup, 25).occupancy > synchronous(setup).occupancy
    assert steady(PartialRollouts(setup, batch_responses=4), warm=1, steps=2).trained > 0
    assert steady(ppo(setup), warm=0, steps=1).prefix_tokens_trained == 0


# --------------------------------------------------------------------------------------------------- timeline, systems, command


def test_the_timelines_bars_do_not_overlap_and_t_ppo_is_busier():
    rows = timeline_rows(
        Case(gpus="1xH100", model="Qwen2.5-0.5B", tp=1, lengths="twopoint:short=50,share=0.1", cap=512, slots=4, window=128), warm=2
    )
    for name in ("ppo", "tppo"):
        mine = [row for row in rows if row["method"] == name]
        for slot in range(4):
            spans = sorted((r["begin_s"], r["stop_s"]) for r in mine if r["slot"] == slot)
            assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(spans))
        assert all(0 <= row["begin_s"] <= row["stop_s"] <= row["until_s"] for row in mine if row["begin_s"] >= 0)
    shares = [busy_share([row for row in rows if row["method"] == method], 4) for method in ("ppo", "tppo")]
    assert shares[0] < shares[1] <= 1


def test_the_command_prints_a_table_or_json_and_writes_csv_and_figures(capsys, tmp_path):
    assert main(["throughput", "--tables", "timeline", "--out", str(tmp_path)]) == 0
    assert "timeline" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"throughput_timeline.csv", "throughput_timeline.png"}
    assert main(["throughput", "--tables", "timeline", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"timeline"}
    assert main(["throughput", "--tables", "tiemline", "--json"]) == 2
    out, err = capsys.readouterr()
    assert "did you mean" in json.loads(out)["error"]
    assert err.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------- literature


def test_the_literatures_error_is_relative_to_the_nearest_end():
    span = literature.Published("rollout", 550, 600, "s")
    assert [literature.error(x, span) for x in (500, 570, 660)] == pytest.approx([-50 / 550, 0, 0.1])


def test_the_committed_predictions_are_the_clocks_own_and_misses_are_kept():
    rows = pages.committed("literature")
    assert len(rows) == sum(len(quantities) for _, quantities in literature.SETUPS)
    stated, (published,) = literature.SETUPS[0]
    found = literature.simulate(stated)
    predicted = literature.parts(found)[published.quantity]
    assert float(rows[0]["predicted"]) == pytest.approx(predicted, abs=0.06)
    assert float(rows[0]["high"]) == pytest.approx(literature.parts(found, "slow", "slow")[published.quantity], abs=0.06)
    assert rows[0]["error"] == f"{100 * literature.error(predicted, published):+.0f} %"
    assert any(row["within"] == "False" for row in rows if row["first"] == "True")
    for row in rows:
        assert float(row["low"]) <= float(row["predicted"]) <= float(row["high"])


def test_what_verls_page_states_is_what_we_predict_from():
    """512 x 16 responses in mini-batches of 32 x 16, DAPO: neither critic nor reference."""
    assert (literature.H20.responses, literature.H20.mini_batch, literature.H20.critic) == (512 * 16, 32 * 16, False)


def test_a_sources_parts_follow_from_the_steps_phases():
    num_devices, gpu = cluster("1xH100")
    costs = Roofline(accelerator=gpu, model=model("Qwen2.5-0.5B"), layout=Layout(num_devices=num_devices))
    setup = Setup(
        lengths=Constant(value=64, cap=64), prompt_tokens=5, slots=8, samples_per_prompt=4, costs=costs, recipe=Recipe(critic=False)
    )
    found = Ranged(lambda efficiency: synchronous(setup))
    parts, spent = literature.parts(found), found.middle.phases_s
    assert spent["value_train"] == spent["value_forward"] == 0
    assert parts["rollout share"] == pytest.approx(found.middle.rollout_s / found.middle.step_s)
    assert parts["training share"] == pytest.approx((spent["logprob"] + spent["policy_train"]) / found.middle.step_s)
