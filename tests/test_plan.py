"""`sim plan`: bytes against published dry runs and hand counts, whether it fits, seconds, the window, and what people get wrong."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sim.__main__ import main
from sim.clock.cluster import Setup
from sim.clock.cuts import cut_weight
from sim.clock.distributions import Constant, TwoPoint
from sim.clock.fitting import problems
from sim.clock.footprint import GIB, PHASES, TERMS, Budget, bytes_per_phase, state_bytes, totals
from sim.clock.hardware import Layout, Roofline, accelerator, model
from sim.clock.lengths import load_lengths
from sim.clock.plan import PlanConfig, make
from sim.clock.plan_report import TOY_KNEES, as_json, report
from sim.clock.schedule import ppo, tppo
from sim.clock.steady import gain, sampled, steady
from sim.clock.trace import PHASES as STEP_PHASES
from sim.lab.examination import BiasConfig, examine

QWEN32, H800 = model("Qwen2.5-32B"), accelerator("H800")
SMALL = ["plan", "--model", "Qwen2.5-0.5B", "--gpus", "4xH100", "--lengths", "twopoint:short=100,share=0.1", "--cap", "1024",
         "--prompts", "8", "--samples", "4", "--tp", "1"]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize(
    ("ranks", "tokens", "checkpointing", "measured"),
    [(64, 8192, True, 22.7), (64, 16_384, True, 31.7), (64, 32_768, True, 50.9), (16, 32_768, True, 68.1), (64, 8192, False, 190)],
)
def test_the_policys_update_is_within_15_per_cent_of_the_published_dry_runs(ranks, tokens, checkpointing, measured):
    """GiB that FSDP2 on fake tensors needed for the 32B shape: one micro-batch, logits in chunks of 1,024 [M]."""
    layout = Layout(num_devices=ranks, micro_batch_tokens=tokens, activation_checkpointing=checkpointing)
    budget = Budget(sequence_tokens=tokens, logit_chunk_tokens=1024, accumulate=False, value_model=False, runtime_bytes=0)
    update = totals(bytes_per_phase(QWEN32, layout, budget))["policy_update"] / GIB
    assert abs(update / measured - 1) < 0.15


def test_parameters_gradients_and_moments_are_the_published_7_6_gib():
    assert state_bytes(QWEN32.num_parameters, Layout(num_devices=64)) / GIB == pytest.approx(7.6, abs=0.05)


def test_a_policy_of_tied_embeddings_by_hand():
    """Two layers of width 4: every term counted on fingers, 2 devices, 10 tokens, a chunk of 5."""
    shape = dataclasses.replace(model("Qwen2.5-0.5B"), num_layers=2, hidden_size=4, intermediate_size=8, num_heads=2, num_kv_heads=1,
                                head_size=2, vocab_size=16)  # fmt: skip
    layer = (4 * 4 + 4 * 2 + 4 * 2 + 4 * 4) + 3 * 4 * 8 + (4 + 2 + 2) + 2 * 4  # q, k, v, o; gate, up, down; biases; norms
    assert shape.num_parameters == 2 * layer + 4 + 16 * 4
    terms = bytes_per_phase(shape, Layout(num_devices=2, micro_batch_tokens=10), Budget(sequence_tokens=10, logit_chunk_tokens=5))
    assert terms["policy_update"] == {
        "policy_state": shape.num_parameters * 12 / 2, "value_state": (shape.num_parameters + 4 + 1) * 12 / 2,
        "gradients": shape.num_parameters * 4 / 2,
        "gathered_weights": (64 + 2 * layer) * 2, "gathered_gradients": layer * 6 + 64 * 2,
        "activations": 10 * (2 * 2 * 4 + 28 * 4 + 14 * 8), "runtime": 2e9,
    }  # fmt: skip
    assert terms["sync"]["engine_weights"] == shape.num_parameters * 2
    assert terms["value_update"]["gathered_gradients"] == layer * 6
    assert set(terms["sync"]) == {
        "policy_state",
        "value_state",
        "engine_weights",
        "engine_reserve",
        "sync_buffer",
        "runtime",
    }


def test_the_head_is_the_peak_of_short_batches_with_a_large_vocabulary():
    layout = Layout(num_devices=64, micro_batch_tokens=8192)
    wide = Budget(sequence_tokens=8192, logit_chunk_tokens=8192)
    phases = bytes_per_phase(QWEN32, layout, wide)
    assert phases["policy_update"]["logits"] == 8192 * 152_064 * 6 * 2
    assert "logits" not in bytes_per_phase(QWEN32, layout, dataclasses.replace(wide, logit_chunk_tokens=512))["policy_update"]
    assert "logits" not in phases["value_update"]


def test_phases_and_terms_are_the_documented_ones():
    phases = bytes_per_phase(
        QWEN32, Layout(num_devices=64, tensor_parallel=4), Budget(sequence_tokens=100, probe_tokens=8), accelerator=H800
    )
    assert set(phases) == set(PHASES)
    assert {term for terms in phases.values() for term in terms} <= set(TERMS)


@given(
    devices=st.sampled_from([8, 16, 64]), tokens=st.integers(1, 40_000), split=st.sampled_from([1, 2, 4, 8]),
    level=st.sampled_from([0, 1, 2]), offload=st.booleans(),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_more_devices_fewer_tokens_and_offload_never_need_more_training_bytes(devices, tokens, split, level, offload):
    layout = Layout(
        num_devices=devices, tensor_parallel=split, micro_batch_tokens=tokens, sleep_level=level, memory_utilisation=0.5
    )
    budget = Budget(sequence_tokens=tokens, offload=offload)
    now = totals(bytes_per_phase(QWEN32, layout, budget, accelerator=H800))
    for easier_layout, easier in (
        (dataclasses.replace(layout, num_devices=2 * devices), budget),
        (dataclasses.replace(layout, micro_batch_tokens=max(1, tokens // 2)), dataclasses.replace(budget, sequence_tokens=max(1, tokens // 2))),
        (layout, dataclasses.replace(budget, offload=True)),
        (dataclasses.replace(layout, sleep_level=2), budget),
    ):  # fmt: skip
        then = totals(bytes_per_phase(QWEN32, easier_layout, easier, accelerator=H800))
        assert all(then[name] <= now[name] + 1 for name in now)


def test_an_engine_that_stays_awake_costs_its_weights_and_cache_in_training():
    asleep, awake = (
        bytes_per_phase(QWEN32, Layout(num_devices=64, tensor_parallel=4, sleep_level=level), Budget(sequence_tokens=8192), accelerator=H800)
        for level in (2, 0)
    )  # fmt: skip
    extra = totals(awake)["policy_update"] - totals(asleep)["policy_update"]
    assert extra == pytest.approx(sum(awake["rollout"][term] for term in ("engine_weights", "engine_reserve", "kv_cache")))


# ----------------------------------------------------------------------------------------------------------------------- fits


def test_what_does_not_fit_gets_remedies_that_do():
    config = PlanConfig(gpus="8xA100", prompts=4, samples=8, cap=20_480, lengths="dapo-32b-early", window=(20_480,))
    plan = make(config)
    assert not plan.fits
    assert plan.systems == {}
    assert plan.choice is None
    assert any("policy_update needs" in problem for problem in plan.problems)
    assert all(remedy.peak_bytes <= plan.accelerator.memory_bytes for remedy in plan.remedies)
    assert any("--offload" in remedy.text for remedy in plan.remedies)
    assert any(remedy.text == "4 times the devices" for remedy in plan.remedies)
    assert make(dataclasses.replace(config, offload=True)).fits  # a remedy, taken
    assert make(dataclasses.replace(config, gpus="32xA100")).fits
    assert not make(dataclasses.replace(config, gpus="16xA100")).fits  # not among them
    assert "DOES NOT FIT" in report(plan)


def test_the_engine_may_not_take_what_the_trainer_holds():
    plan = make(PlanConfig(memory_utilisation=0.95, tp=4))
    assert [p.partition(" ")[0] for p in plan.problems] == ["rollout"]
    (share,) = [float(r.text.split()[1]) for r in plan.remedies if r.text.startswith("--memory_utilisation")]
    assert make(PlanConfig(memory_utilisation=share, tp=4)).problems == ()
    assert make(PlanConfig(memory_utilisation=share + 0.02, tp=4)).problems, "a share that could have been larger"


def test_a_cache_that_cannot_hold_one_response_does_not_fit():
    layout = Layout(num_devices=64, tensor_parallel=1, memory_utilisation=0.85)  # 65.5 GB of weights, 4 of reserve, of 72.7
    (problem,) = problems(QWEN32, layout, Budget(sequence_tokens=24_776, offload=True), H800)
    assert "KV cache holds" in problem


# -------------------------------------------------------------------------------------------------------------------- seconds


@pytest.fixture(scope="module")
def small_plan():
    return make(
        PlanConfig(
            model="Qwen2.5-0.5B", gpus="4xH100", lengths="twopoint:short=100,share=0.1", cap=1024, prompts=8, samples=4, tp=1
        )
    )


def test_phases_sum_to_the_step_and_gain_is_a_ratio_of_tokens_per_second(small_plan):
    found = as_json(small_plan)
    json.dumps(found, allow_nan=False)
    assert [row["system"] for row in found["seconds"]] == ["tppo"] * 3 + ["ppo"]
    last = found["seconds"][-1]
    assert last["gain"] == 1
    for row in found["seconds"]:
        assert set(row["phases_s"]) == set(STEP_PHASES)
        assert math.fsum(row["phases_s"].values()) == pytest.approx(row["step_s"])
        assert row["gain"] == pytest.approx((row["trained_tokens"] / row["step_s"]) / (last["trained_tokens"] / last["step_s"]))
    for phase, terms in found["bytes_per_phase"].items():
        assert found["bytes_total"][phase] == pytest.approx(sum(terms.values()))


def test_the_seconds_are_those_of_the_clock_on_the_whole_cluster(small_plan):
    config, lengths = small_plan.config, small_plan.lengths
    setup = Setup(
        lengths=lengths, prompt_tokens=config.prompt_tokens, slots=32, num_replicas=4, samples_per_prompt=4, seed=0,
        costs=Roofline(accelerator=accelerator("H100"), model=model("Qwen2.5-0.5B"), layout=small_plan.layout), ranks=4,
        update_tokens=round(32 * lengths.mean_tokens() / 16),
    )  # fmt: skip
    assert small_plan.systems[1024].step_s == pytest.approx(steady(ppo(setup), warm=0, steps=small_plan.systems[1024].steps).step_s)
    whole = steady(tppo(setup, window=512), warm=20, steps=200)
    assert small_plan.systems[512].tokens_per_s == pytest.approx(whole.tokens_per_s, rel=0.1)  # half of the replicas, other samples


def test_a_sample_of_the_replicas_stands_for_all_where_they_are_alike():
    lengths, layout = Constant(value=64, cap=64), Layout(num_devices=8, micro_batch_tokens=4096)
    costs = Roofline(accelerator=accelerator("H100"), model=model("Qwen2.5-0.5B"), layout=layout)
    setup = Setup(lengths=lengths, prompt_tokens=10, costs=costs, slots=64, num_replicas=8, updates_per_step=2)
    part, scale = sampled(setup, 2)
    assert (part.slots, part.num_replicas, scale) == (16, 2, 4.0)
    all_of_it, some = (steady(tppo(s, window=16), warm=4, steps=4, scale=k) for s, k in ((setup, 1.0), (part, scale)))
    for name in (
        "step_s",
        "trained",
        "tokens_fed",
        "prefix_tokens_trained",
        "reprefilled_tokens",
        "occupancy",
        "ops_per_byte",
        "mean_active",
    ):
        assert getattr(some, name) == pytest.approx(getattr(all_of_it, name)), name
    assert gain(before=all_of_it, after=some) == pytest.approx(1)
    assert sampled(setup, 8) == (setup, 1.0)


# --------------------------------------------------------------------------------------------------------------------- window


def brute_weight(lengths_list, window, decay) -> float:
    """Every response at every offset of its first edge, token by token."""
    total = tokens = 0.0
    for length in lengths_list:
        for first in range(1, window + 1):
            for t in range(length):
                edge = first + max(0, -(-(t + 1 - first) // window)) * window
                total += decay ** (edge - t - 1) if length > edge else 0.0
                tokens += 1
    return total / tokens


@pytest.mark.parametrize("window", [1, 3, 8, 20])
def test_the_weight_of_the_cut_is_p4s_factor_averaged_over_tokens(window):
    lengths = TwoPoint(short=5, long_share=0.25, cap=20)
    assert cut_weight(lengths, window, lam=0.8) == pytest.approx(brute_weight([5, 5, 5, 20], window, 0.8))
    assert cut_weight(lengths, window, lam=1.0) == pytest.approx(brute_weight([5, 5, 5, 20], window, 1.0))


@given(window=st.integers(1, 2000), lam=st.floats(0, 0.999), alpha=st.sampled_from([0.0, 0.05]))
@settings(max_examples=30, deadline=None)
def test_the_weight_of_the_cut_lies_in_0_to_1_and_falls_with_larger_windows(window, lam, alpha):
    lengths = load_lengths("lognormal:median=300,sigma=1", cap=4000)
    here, there = (cut_weight(lengths, w, lam=lam, alpha=alpha) for w in (window, 2 * window))
    assert 0 <= there <= here * (1 + 1e-2) + 1e-12  # up to the 64 offsets that are taken
    assert here <= 1 + 1e-9


def test_the_window_is_the_fastest_within_the_tolerance(small_plan):
    choice, speed = small_plan.choice, {w: s.tokens_per_s for w, s in small_plan.systems.items()}
    within = [w for w, weight in choice.weights.items() if weight <= small_plan.config.tolerance]
    assert choice.window == max(within, key=speed.get)
    strict = make(dataclasses.replace(small_plan.config, tolerance=0.0))
    assert strict.choice.window == 512
    assert "no window examined" in strict.choice.reason


def test_the_toys_knees_are_the_laboratorys():
    for lam, knee in TOY_KNEES.items():
        toy = BiasConfig(
            instance="calm-chain", critic="exact", lam=lam, estimators=("egae",), window=(2, 3, 4, 6, 8), tolerance=0.05
        )
        assert examine(toy).findings["egae"].knee == knee


# ---------------------------------------------------------------------------------------------------------------- the command


def test_people_get_a_table_and_json_is_json_and_nothing_else(capsys, tmp_path):
    assert main([*SMALL, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for piece in (
        "GB per device",
        "engine_weights",
        "Fits:",
        "A dry run on fake tensors does not see",
        "gain",
        "ppo",
        "Window to choose",
    ):
        assert piece in text
    assert (tmp_path / "plan.png").stat().st_size > 10_000
    header, *rows = (tmp_path / "plan.csv").read_text().splitlines()
    assert header.split(",")[:2] == ["panel", "bar"]
    assert len(rows) > 10
    assert main([*SMALL, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "tppo-sim-plan/1"
    assert found["fits"] is True
    assert found["inputs"]["prompts"] == 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpus", "64xH801"], "H800"),
        (["--model", "Qwen2.5-33B"], "Qwen/Qwen2.5-32B"),
        (["--lengths", "{tmp}/empty.jsonl"], "got no length"),
        (["--lengths", "{tmp}/long.txt", "--cap", "100"], "at most the cap of 100"),
        (["--lengths", "nonsense"], "expected one of"),
        (["--window", "0"], "window: got 0"),
        (["--window", "30000"], "expected 1 to the cap"),
        (["--model", "Qwen2.5-72B", "--gpus", "1xlaptop-cpu"], "does not fit"),
        (["--tp", "3"], "tensor_parallel: got 3"),
        (["--prompts", "1", "--samples", "1", "--gpus", "64xH800", "--tp", "8"], "engine replicas"),
        (["--lam", "1.5"], "lam: got 1.5"),
        (["--memory_utilisation", "7"], "memory_utilisation"),
        (["--wimdow", "8"], "did you mean"),
        (["--prompts", "many"], "prompts"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_exit_code_2_and_json_stays_parseable(arguments, said, capsys, tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "long.txt").write_text("50 101")
    argv = ["plan", *(a.format(tmp=tmp_path) for a in arguments)]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert said in err
    assert main([*argv, "--json"]) == 2
    out, _ = capsys.readouterr()
    assert said in json.loads(out)["error"]


def test_a_file_of_ones_own_lengths_brings_its_own_cap(tmp_path):
    (tmp_path / "mine.jsonl").write_text("\n".join(json.dumps({"length": int(n)}) for n in np.arange(1, 400, 7)))
    config = PlanConfig(model="Qwen2.5-0.5B", gpus="1xH100", lengths=str(tmp_path / "mine.jsonl"), cap=0, prompts=4, samples=2)
    assert make(config).lengths.cap == 393


def test_a_plan_counts_the_windows_that_it_has_tried(monkeypatch):
    """On a terminal the bar has a step for each window and one for PPO; with --json there is none."""
    shown = []
    monkeypatch.setattr(
        "sim.clock.plan.tqdm", lambda windows, name, **options: shown.append((name, list(windows), options["disable"])) or windows
    )
    config = PlanConfig(model="Qwen/Qwen2.5-1.5B", gpus="8xH100", cap=2048, prompts=8, samples=8, window=(512, 1024), replicas=1)
    make(config)
    make(dataclasses.replace(config, json=True))
    assert shown == [("plan", [512, 1024, 2048], None), ("plan", [512, 1024, 2048], True)]
