"""`sim throughput`, its page and the comparison with the literature: prose against CSV, CSV against the clock, closed forms."""

from __future__ import annotations

import csv
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks import literature
from sim.__main__ import main
from sim.clock.clock_figures import busy_share, timeline_rows
from sim.clock.cluster import Setup
from sim.clock.distributions import Constant, TwoPoint
from sim.clock.hardware import Roofline
from sim.clock.schedule import ppo, tppo
from sim.clock.steady import Steady, in_routine, steady, synchronous
from sim.clock.systems import PartialRollouts
from sim.clock.throughput import PUBLISHED, TABLES, Case, WeightsOnly, evaluate, gains, setup_of, system_cases, systems

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = (ROOT / "docs" / "throughput.md").read_text()
CLAIMS = re.findall(r"([-+]?[\d.,]+(?: %)?)<!-- (\w+) \"([^\"]+)\" (\w+) (\S+) -->", PAGE)


def committed(name: str) -> list[dict[str, str]]:
    file = name if name in ("literature", "reality") else f"throughput_{name}"
    with (RESULTS / f"{file}.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    if name == "literature":  # "" for a setup's first assumption, then #2, #3, ...
        for at, row in enumerate(rows):
            before = sum((other["setup"], other["quantity"]) == (row["setup"], row["quantity"]) for other in rows[:at])
            row["nth"] = f"#{before + 1}" if before else ""
    return rows


def key(name: str, row: dict[str, str]) -> str:
    if name == "systems":
        lag = re.search(r"staleness (\d+)", row["how"])
        return f"{row['what']}/{row['system']}" + (f"/{lag[1]}" if lag else "")
    if name == "reality":
        return f"{row['run']}/{row['quantity']}"
    return f"{row['setup']}/{row['quantity']}{row['nth']}" if name == "literature" else row["what"]


def written(value: str, spec: str) -> str:
    """A number of the CSV as the page's annotation says it is printed."""
    return value if spec == "s" else f"{100 * float(value):.0f}" if spec == "%" else format(float(value), spec)


# ------------------------------------------------------------------------------------------------------- prose, CSV and clock


def test_every_number_of_the_page_is_the_committed_one():
    assert len(CLAIMS) > 60
    tables = {name: committed(name) for name in {claim[1] for claim in CLAIMS}}
    for number, name, what, column, spec in CLAIMS:
        row = next(
            row for row in tables[name] if key(name, row) == what
        )  # the first: literature's first assumption, finding 1's lengths
        assert number == written(row[column], spec), (name, what, column)


def test_no_gain_stands_on_the_page_without_its_source():
    """Outside of the published claims each `1.23x` is annotated."""
    text = re.sub(r"<!--.*?-->", "@", PAGE)
    bare = set(re.findall(r"(?<![\d.@-])(\d+\.\d+)x", text))
    published = " ".join(f"{claim} {setup}" for _, claim, setup in PUBLISHED)
    assert bare == {number for number in bare if f"{number}x" in published} | {"1.6"}  # 1.6: Amdahl's 1 / (1 - 0.38)
    share = float(next(row for row in committed("slots") if row["what"] == "dapo-32b@2049, 8192")["ppo_rollout_share"])
    assert f"{1 / (1 - share):.1f}" == "1.6"


def test_the_page_says_how_many_predictions_of_real_runs_miss_and_names_each():
    rows = [row for row in committed("reality") if row["role"] == "prediction"]
    missed = [key("reality", row) for row in rows if row["within"] != "True"]
    section = PAGE.partition("## Against our own runs")[2].partition("\n## ")[0]
    assert f"{len(rows) - len(missed)} of {len(rows)} predictions" in section
    assert all(f'"{name}" error' in section for name in missed)


def test_a_wrong_number_would_be_noticed():
    row = next(row for row in committed("slots") if row["what"] == "dapo-32b@2049, 256")
    assert written(row["gain"], ".2f") == "2.80"
    assert written(str(float(row["gain"]) + 0.02), ".2f") != "2.80"


RECOMPUTED = [("conditions", "2048 slots, weights", "lognormal"), ("conditions", "8192 slots, kv", "lognormal"),
              ("lengths", "dapo-32b@1024", ""), ("windows", "math-mixture, 16384", ""), ("tails", "sigma 0.4, cache", "")]  # fmt: skip


@pytest.mark.parametrize(("name", "what", "lengths"), RECOMPUTED)
def test_the_clock_still_says_what_is_committed(name, what, lengths):
    case = next(case for case in TABLES[name]() if case.what == what and lengths in case.lengths)
    old = next(row for row in committed(name) if row["what"] == what and row["lengths"] == case.lengths)
    new = evaluate(case)
    assert set(new) == set(old)
    for column, value in new.items():
        if isinstance(value, float):
            assert value == pytest.approx(float(old[column]), rel=1e-6, abs=1e-9), column


def test_the_tables_committed_are_all_of_their_cases():
    for name, cases in TABLES.items():
        assert [(row["what"], row["lengths"]) for row in committed(name)] == [(case.what, case.lengths) for case in cases()]
    assert {row["what"] for row in committed("systems")} == {case.what for case in system_cases()}
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
    rows = {counted: evaluate(small(counted=counted, slots=256)) for counted in ("weights", "kv", "cache")}
    assert rows["kv"]["ops_per_byte"] < rows["weights"]["ops_per_byte"]
    assert rows["cache"]["step_s"] >= rows["kv"]["step_s"] - 1e-9
    assert rows["weights"]["active"] == pytest.approx(256)


def test_equal_lengths_lose_and_a_tail_wins():
    equal = evaluate(small(lengths="constant:512"))
    tail = evaluate(small())
    assert equal["gain"] < 1 < tail["gain"]
    assert equal["longest_over_mean"] == pytest.approx(1)
    assert tail["gain_without_prefix"] > tail["gain"]


def test_without_earlier_windows_nothing_is_fed_again_and_the_gains_say_so():
    row = evaluate(small(lengths="constant:128", cap=128))
    assert row["fed_again"] == 0
    assert row["gain_without_prefix"] == pytest.approx(row["gain"])
    assert row["gain"] == pytest.approx(1)


def test_gains_by_hand():
    def made(**fields) -> Steady:
        plain = {name: 0.0 for name in Steady.__annotations__}
        phases = {"logprob": 1.0, "value_forward": 0.0, "policy_train": 3.0, "value_train": 2.0, "prefill": 1.0}
        return Steady(**plain | {"system": "", "steps": 1, "phases_s": phases} | fields)

    before = made(step_s=20.0, rollout_s=14.0, trained=100.0)
    after = made(
        step_s=12.0,
        rollout_s=6.0,
        trained=90.0,
        tokens_fed=200.0,
        prefix_tokens_trained=100.0,
        prefill_tokens=40.0,
        reprefilled_tokens=30.0,
    )
    assert after.step_without_prefix_s == 12 - 4 / 2 - 3 / 4
    found = gains(before, after)
    assert found["gain"] == pytest.approx((90 / 12) / (100 / 20))
    assert found["gain_rollout"] == pytest.approx((90 / 6) / (100 / 14))
    assert found["gain_without_prefix"] == pytest.approx((90 / 9.25) / (100 / 20))


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
    for method in ("ppo", "tppo"):
        mine = [row for row in rows if row["method"] == method]
        for slot in range(4):
            spans = sorted((r["begin_s"], r["stop_s"]) for r in mine if r["slot"] == slot)
            assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(spans))
        assert all(0 <= row["begin_s"] <= row["stop_s"] <= row["until_s"] for row in mine if row["begin_s"] >= 0)
    shares = [busy_share([row for row in rows if row["method"] == method], 4) for method in ("ppo", "tppo")]
    assert shares[0] < shares[1] <= 1


def test_all_systems_run_on_a_small_setup_and_stay_within_their_staleness():
    found = {(row["system"], row["how"]): row for row in systems(small(gpus="2xH100", slots=16))}
    assert [system for system, _ in found] == ["ppo", "tppo", "partial", "tail-batching", "async", "async"]
    for (system, how), row in found.items():
        assert np.isfinite(row["gain"])
        assert row["discarded"] == 0 or system == "tail-batching"
        if "staleness" in how:
            assert row["staleness_mean"] <= int(how[-1])


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
    rows = committed("literature")
    assert len(rows) == sum(len(quantities) for _, quantities in literature.SETUPS)
    stated, (published,) = literature.SETUPS[0]
    predicted = literature.parts(literature.simulate(stated), stated)[published.quantity]
    assert float(rows[0]["predicted"]) == pytest.approx(predicted, abs=0.06)
    assert rows[0]["error"] == f"{100 * literature.error(predicted, published):+.0f} %"
    assert any(abs(int(row["error"].split()[0])) > 25 for row in rows)


def test_a_sources_parts_follow_from_the_steps_phases():
    setup = Setup(lengths=Constant(value=64, cap=64), prompt_tokens=5, slots=8, samples_per_prompt=4,
                  costs=Roofline(accelerator=setup_of(small()).costs.accelerator, model=setup_of(small()).costs.model, layout=setup_of(small()).costs.layout))  # fmt: skip
    found, stated = synchronous(setup), literature.MATH
    parts = literature.parts(found, stated)
    spent = found.phases_s
    step_s = found.step_s - spent["value_forward"] - spent["value_train"]
    assert parts["rollout share"] == pytest.approx(found.rollout_s / step_s)
    assert parts["training share"] == pytest.approx((spent["logprob"] + spent["policy_train"]) / step_s)
