"""The dry run: fake passes against hand counts and whole traces, phases, the verdict and its remedies, the plan file."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.fsdp import MixedPrecisionPolicy

from scale import sharding
from scale.config import ScaleConfig, ShardingConfig, check
from scale.memory import budget as memory
from scale.memory.dryrun import dry_run, table
from scale.memory.fake_pass import Pass, Shape, terms, trace
from scale.memory.plan_file import read_seconds
from scale.memory.remedies import changes, longest_response
from tppo_ref.loop.learner import Learner
from tppo_ref.loop.parallel import SingleProcess
from tppo_ref.loop.settings import PolicyConfig
from tppo_ref.method.errors import UserError
from tppo_ref.rollout import head
from tppo_ref.runs.parsing import parse, replace_fields

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "scale" / "configs"
WIDTH, INNER, HEADS, KV_HEADS, VOCAB, LAYERS = 64, 96, 4, 2, 300, 7
BF16 = ShardingConfig(compute_dtype="bfloat16")


def model_file(folder: Path, **changes) -> Path:
    shape = dict(model_type="qwen2", vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
                 num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=4096, tie_word_embeddings=False)  # fmt: skip
    file = folder / "config.json"
    file.write_text(json.dumps(shape | changes))
    return file


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return model_file(tmp_path_factory.mktemp("shape"))


@pytest.fixture(scope="module")
def shape(file) -> Shape:
    return Shape(file)


def small(file: Path, **fields) -> ScaleConfig:
    """4 ranks in 2 engines, on devices whose size is no limit."""
    base = {
        "algo.model.policy": str(file), "algo.model.device": "auto", "algo.rollout.slots": 8, "algo.rollout.window": 32,
        "algo.rollout.max_response_tokens": 96, "algo.task.max_prompt_tokens": 32, "algo.policy.micro_batch_tokens": 128,
        "algo.value.micro_batch_tokens": 128, "engine.tensor_parallel": 2, "engine.dtype": "bfloat16", "engine.probe_prompts": 2,
        "sharding.compute_dtype": "bfloat16", "cluster.devices_per_node": 4, "cluster.device_bytes": 80e9,
    }  # fmt: skip
    return check(replace_fields(ScaleConfig(), base | {name.replace("__", "."): value for name, value in fields.items()}))


def training(value: bool, **changes) -> Pass:
    options = {"value": value, "train": True, "rows": ((32, 96),), "world": 4, "sharding": BF16} | changes
    return Pass(**options)


# --------------------------------------------------------------------------------------------------------------- fake passes


def test_what_is_traced_is_what_runs():
    assert sharding.MixedPrecisionPolicy is MixedPrecisionPolicy, "another test file left its own reduction here"


@pytest.mark.parametrize(
    ("value", "options"),
    [(False, {}), (True, {}), (False, {"checkpoint_layers": False}), (False, {"reshard_after_forward": False})],
)
def test_two_shallow_models_give_what_the_whole_model_gives(shape, value, options):
    passing = training(value, sharding=dataclasses.replace(BF16, **options))
    assert terms(shape, passing) == dict(trace(shape.config, passing))


@pytest.mark.parametrize("world", [1, 3, 4])
def test_shards_are_each_tensors_rows_over_the_ranks_rounded_up(shape, world):
    by_hand = sum(math.ceil(rows / world) * math.prod(rest) * 4 for rows, *rest in shape.tensors)
    found = terms(shape, training(False, world=world))
    assert found["shards"] == found["gradients"] == by_hand


def test_a_layer_more_costs_its_shards_its_gradients_and_its_saved_input(tmp_path):
    layer = (
        WIDTH * WIDTH * 2
        + 2 * WIDTH * WIDTH * KV_HEADS // HEADS
        + WIDTH
        + 2 * WIDTH * KV_HEADS // HEADS
        + 3 * WIDTH * INNER
        + 2 * WIDTH
    )
    totals = []
    for layers in (7, 8):
        folder = tmp_path / str(layers)
        folder.mkdir()
        deep = Shape(model_file(folder, num_hidden_layers=layers))
        totals.append(sum(terms(deep, training(False, world=1)).values()))
    assert totals[1] - totals[0] == layer * 8 + 128 * WIDTH * 2


def test_logits_of_all_tokens_never_exist_at_once(shape, tmp_path):
    wide = Shape(model_file(tmp_path, vocab_size=20_000))
    whole = sum(terms(wide, training(False, logit_chunk_tokens=96)).values())
    chunked = sum(terms(wide, training(False, logit_chunk_tokens=8)).values())
    assert whole - chunked > 80 * 20_000 * 4  # 88 tokens' logits in float32, at the least


def test_attention_makes_no_square_of_the_tokens(shape):
    per_token = [terms(shape, training(False, rows=((8, n - 8),)))["activations"] / n for n in (1024, 4096)]
    assert per_token[1] <= per_token[0] * 1.01


def test_recomputation_saves_memory_and_a_pass_without_gradients_needs_least(shape):
    rows = ((32, 1024),)
    kept = terms(shape, training(False, rows=rows, sharding=dataclasses.replace(BF16, checkpoint_layers=False)))["activations"]
    recomputed = terms(shape, training(False, rows=rows))["activations"]
    forward = terms(shape, training(False, rows=rows, train=False))["activations"]
    assert forward < recomputed < kept


@pytest.mark.parametrize("value", [False, True])
def test_of_a_constant_prefix_only_keys_and_values_are_kept_and_the_whole_trace_says_so(shape, value):
    """A prefix token costs its keys and values in each layer; a live one its saved input in each layer, and what one layer needs."""
    by_prefix = [training(value, rows=((32, response),), live=64) for response in (96, 1120, 2144)]
    assert terms(shape, by_prefix[0]) == dict(trace(shape.config, by_prefix[0]))
    peaks = [sum(terms(shape, passing).values()) for passing in by_prefix]
    numbers = LAYERS * 2 * KV_HEADS * WIDTH // HEADS
    assert peaks[2] - peaks[1] >= 1024 * numbers * 2, "bfloat16"
    full = [sum(terms(shape, training(value, rows=((32, response),))).values()) for response in (1120, 2144)]
    assert peaks[2] - peaks[1] < full[1] - full[0]


def test_with_all_of_a_response_live_the_prompt_alone_is_constant(shape):
    rows = ((4, 512),)
    whole, live = (terms(shape, training(False, rows=rows, live=n))["activations"] for n in (None, 512))
    assert live == pytest.approx(whole, rel=0.35)  # masks of the live layout, where the packed one needs none
    assert live > 2 * terms(shape, training(False, rows=rows, live=64))["activations"]


def test_nothing_of_the_fake_ranks_is_left(shape):
    terms(shape, training(False, world=7))
    assert not dist.is_initialized()


def test_layers_that_differ_are_all_traced(tmp_path):
    odd = Shape(model_file(tmp_path, layer_types=["full_attention"] * 6 + ["sliding_attention"], use_sliding_window=True,
                           sliding_window=4096, max_window_layers=6))  # fmt: skip
    assert not odd.alike
    assert terms(odd, training(False)) == dict(trace(odd.config, training(False)))


# -------------------------------------------------------------------------------------------------------------------- phases


@settings(deadline=None, max_examples=60)
@given(prompt=st.integers(1, 50), response=st.integers(1, 50), budget=st.integers(1, 500))
def test_a_micro_batch_is_the_longest_row_or_as_many_tokens_as_the_budget_holds(prompt, response, budget):
    rows = memory.fed_rows(prompt, response, budget)
    fed = sum(map(sum, rows))
    assert rows[0] == (prompt, response)
    assert all(p >= 1 and r >= 1 for p, r in rows[:-1])
    assert fed == prompt + response if budget <= prompt + response else budget - 1 <= fed <= budget


def test_phases_and_terms_are_the_documented_ones(file):
    found = memory.terms_per_phase(small(file))
    assert list(found) == list(memory.PHASES)
    assert {term for phase in found.values() for term in phase} <= set(memory.TERMS)
    assert all(b >= 0 and math.isfinite(b) for phase in found.values() for b in phase.values())


def test_live_tokens_are_a_window_what_waits_for_it_and_whole_responses_where_none_is_cut(file):
    def live(phase="policy_update", **fields):
        return memory.live_tokens(small(file, algo__policy__prefix="constant", **fields), phase)

    assert [live(phase) for phase in ("logprob", "policy_update", "value_forward", "value_update", "probe")] == [
        32,
        32,
        None,
        None,
        None,
    ]
    assert live("value_update", algo__value__update="joint") == 32
    assert live(algo__policy__min_new_tokens=21) == 52
    assert live(algo__advantage__tail="defer", algo__advantage__tail_tokens=5) == 37
    assert live(algo__rollout__window=96) == live(algo__policy__train_on="ended") == 96
    assert memory.live_tokens(small(file), "policy_update") is None


def test_a_constant_prefix_makes_updates_smaller_where_a_micro_batch_is_one_window(file):
    fields = {"algo__rollout__max_response_tokens": 992, "algo__policy__micro_batch_tokens": 64}
    full, constant = (memory.terms_per_phase(small(file, algo__policy__prefix=p, **fields)) for p in ("full", "constant"))
    assert constant["policy_update"]["activations"] < 0.7 * full["policy_update"]["activations"]
    assert constant["value_update"] == full["value_update"], "it is trained on whole responses"
    # With room for many rows in a pass those in their first window, nearly all of it live, are the largest pass.
    fields["algo__policy__micro_batch_tokens"] = 1024
    config = small(file, algo__policy__prefix="constant", **fields)
    longest, fresh = memory.passes(config, "policy_update")
    assert (longest.rows, fresh.rows) == (((32, 992),), ((32, 32),) * 16)
    of_shape = memory.shapes(config)[0]
    expected = {name: x for name, x in terms(of_shape, fresh).items() if name != "shards"}
    assert memory.working(config, of_shape, "policy_update") == expected


def test_a_critic_of_another_size_is_reckoned_by_its_own_shape(file, tmp_path):
    critic = model_file(tmp_path, hidden_size=32, intermediate_size=48, num_hidden_layers=2, max_position_embeddings=100)
    both, small_value = small(file), small(file, algo__model__value=str(critic))
    ours, theirs = memory.terms_per_phase(small_value), memory.terms_per_phase(both)
    assert ours["sync"]["policy_state"] == theirs["sync"]["policy_state"]
    by_hand = 3 * terms(Shape(critic), training(True, rows=((32, 96),)))["shards"]
    assert ours["sync"]["value_state"] == by_hand < theirs["sync"]["value_state"]
    assert ours["value_update"]["activations"] < theirs["value_update"]["activations"]
    assert ours["policy_update"]["activations"] == theirs["policy_update"]["activations"]
    assert "prompt and response of 128 tokens, the value model was made for 100 positions" in " ".join(memory.problems(small_value))


def test_the_engine_sleeps_while_the_trainer_works_unless_told_not_to(file):
    asleep, awake = (memory.terms_per_phase(small(file, engine__sleep_level=level)) for level in (2, 0))
    for phase in ("logprob", "value_forward", "policy_update", "value_update"):
        assert "kv_cache" not in asleep[phase]
        assert asleep[phase]["engine_asleep"] == memory.ENGINE_ASLEEP_BYTES
        assert "engine_asleep" not in awake[phase]
        assert awake[phase]["kv_cache"] == asleep["rollout"]["kv_cache"]
    assert asleep["sync"].keys() == awake["sync"].keys() - {"kv_cache"}


def test_the_cache_holds_what_its_share_leaves_by_hand():
    config = check(parse(ScaleConfig, ["--config", str(CONFIGS / "qwen2.5-32b-math.yaml")], prog="test"))
    policy, _ = memory.shapes(config)
    room = config.engine.gpu_memory_utilization * config.cluster.device_bytes - 32_763_876_352 * 2 / 4 - memory.ENGINE_RESERVE_BYTES
    per_token = 64 * 2 * 8 * 128 * 2 / 4  # layers, keys and values, heads, width, bfloat16, a quarter on each rank
    assert memory.kv_tokens(config, policy) == math.floor(room / per_token)


def test_whole_admission_takes_as_many_as_the_cache_holds_at_their_longest():
    """By hand: 25,601 tokens are 801 blocks of 32; a cache of n tokens holds n // 25,632 of them."""
    config = check(parse(ScaleConfig, ["--config", str(CONFIGS / "qwen2.5-32b-port.yaml")], prog="test"))
    held = memory.kv_tokens(config, memory.shapes(config)[0])
    assert memory.whole_sequences(config) == held // 25_632
    assert 1 < memory.whole_sequences(config) < 8192 // 16
    few = replace_fields(config, {"algo.rollout.slots": 32, "algo.rollout.samples_per_prompt": 2})
    assert memory.whole_sequences(few) == 2  # no more than the engine's slots


@pytest.mark.parametrize(("kind", "dtype", "share"), [("vllm", "bfloat16", 2), ("vllm", "float32", 4), ("torch", "float32", 1)])
def test_an_fp8_cache_holds_more_tokens_but_not_where_numbers_are_only_rounded(file, kind, dtype, share):
    plain = replace_fields(small(file, engine__dtype=dtype), {"engine.kind": kind})
    other = replace_fields(plain, {"algo.rollout.kv_cache": "fp8"})
    shape, _ = memory.shapes(plain)
    assert memory.kv_bytes_per_token(plain, shape) == share * memory.kv_bytes_per_token(other, shape)


def test_offloaded_states_are_on_the_host_and_not_on_the_device(file):
    here, there = small(file), small(file, sharding__offload=True)
    states = memory.resident(here)
    assert memory.resident(there) == {}
    gradients = max(memory.terms_per_phase(here)[phase]["gradients"] for phase in ("policy_update", "value_update"))
    assert memory.host_bytes(there) - memory.host_bytes(here) == 4 * (sum(states.values()) + gradients)


@pytest.mark.parametrize(("fields", "ranks_weights"), [
    ({"engine.sleep_level": 1}, 8),
    ({"engine.sleep_level": 1, "engine.tensor_parallel": 8}, 4),
    ({"engine.sleep_level": 2}, 0),
    ({"engine.sleep_level": 0}, 0),
    ({"engine.sleep_level": 1, "engine.kind": "torch", "engine.tensor_parallel": 1}, 0),
])  # fmt: skip
def test_weights_that_sleep_on_the_host_are_counted_there(fields, ranks_weights):
    """By hand: each of a machine's 8 ranks keeps a quarter (or an eighth) of 32.8 billion weights, two bytes each; ranks_weights is
    that share times the ranks, in quarters."""
    config = check(parse(ScaleConfig, ["--config", str(CONFIGS / "qwen2.5-32b-math.yaml")], prog="test"))
    assert (config.cluster.devices_per_node, config.engine.tensor_parallel, config.engine.dtype) == (8, 4, "bfloat16")
    dropped, other = (replace_fields(config, changed) for changed in ({"engine.sleep_level": 2}, fields))
    assert memory.host_bytes(other) - memory.host_bytes(dropped) == ranks_weights * 32_763_876_352 * 2 / 4


def test_gradients_are_gone_between_updates_as_the_learner_leaves_them(file):
    module = torch.nn.Linear(2, 1)
    learner = Learner("policy", module, PolicyConfig(), SingleProcess())
    learner.update([[0]], lambda rows: module(torch.ones(1, 2)).sum(), step=1)
    stay = any(p.grad is not None for p in module.parameters())
    phases = memory.terms_per_phase(small(file))
    holding = {phase for phase, found in phases.items() if found.get("gradients")}
    assert holding == {"policy_update", "value_update"} | (set(phases) if stay else set())


def test_twice_the_ranks_hold_half_of_the_states_each_and_need_no_more_of_anything(file):
    """Term by term: the largest phase is the one that decodes, whose cache takes what it is given on any number of ranks."""
    four, eight = (memory.terms_per_phase(small(file, cluster__nodes=n)) for n in (1, 2))
    for phase, found in eight.items():
        assert found.keys() == four[phase].keys()
        assert {term for term in found if found[term] > 1.02 * four[phase][term]} == set(), phase  # shards are whole rows
    for term in ("policy_state", "value_state"):
        assert eight["sync"][term] == pytest.approx(four["sync"][term] / 2, rel=0.02)
    assert eight["policy_update"]["gradients"] == pytest.approx(four["policy_update"]["gradients"] / 2, rel=0.02)


# ------------------------------------------------------------------------------------------------------------------- verdict


@pytest.fixture
def no_allowances(monkeypatch):
    """A tiny model's bytes would drown in them."""
    monkeypatch.setattr(memory, "RUNTIME_BYTES", 0.0)
    monkeypatch.setattr(memory, "ENGINE_RESERVE_BYTES", 0.0)
    monkeypatch.setattr(memory, "ENGINE_ASLEEP_BYTES", 0.0)


def test_what_fits_says_so_and_leaves_with_0(file, capsys):
    assert dry_run(small(file)) == 0
    printed = capsys.readouterr().out
    assert "FITS: " in printed
    assert "Seconds: not known here" in printed


def test_every_remedy_makes_it_fit(file, no_allowances):
    roomy = small(file, algo__rollout__max_response_tokens=1024, engine__gpu_memory_utilization=0.5)
    config = replace_fields(roomy, {"cluster.device_bytes": memory.bytes_per_phase(roomy)["policy_update"] * 0.9})
    assert memory.problems(config)
    found = changes(config)
    assert {"algo.rollout.max_response_tokens"} <= {name for change in found for name in change.fields}
    for change in found:
        changed = replace_fields(config, change.fields)
        assert memory.problems(changed) == []
        assert max(memory.bytes_per_phase(changed).values()) == change.peak_bytes


@pytest.mark.parametrize("factor", [0.8, 1.3])  # of what the asked-for length needs
def test_the_longest_response_fits_and_a_tenth_more_does_not(file, no_allowances, factor):
    roomy = small(file, algo__rollout__max_response_tokens=1024, engine__gpu_memory_utilization=0.9)
    update = memory.bytes_per_phase(roomy)["policy_update"]
    config = replace_fields(roomy, {"cluster.device_bytes": update * factor})
    longest = longest_response(config)

    def peak(tokens: int) -> float:
        found = memory.bytes_per_phase(replace_fields(config, {"algo.rollout.max_response_tokens": tokens}))
        return max(found["policy_update"], found["value_update"])

    assert peak(longest) <= config.cluster.device_bytes < peak(round(longest * 1.1))


def test_the_longest_response_is_one_that_is_fed_alone(file, no_allowances):
    fields = {"algo__rollout__max_response_tokens": 512, "cluster__device_bytes": 2e7, "engine__gpu_memory_utilization": 0.9}
    alone, together = small(file, **fields), small(file, algo__policy__micro_batch_tokens=2048, **fields)
    assert longest_response(alone) == longest_response(together) > 0


def test_what_does_not_fit_says_which_phase_and_leaves_with_1(file, capsys, tmp_path):
    config = small(file, cluster__device_bytes=1e9, cluster__dry_run_json=str(tmp_path / "table.json"))
    assert dry_run(config) == 1
    printed = capsys.readouterr().out
    assert "DOES NOT FIT" in printed
    assert "policy_update needs 5.5 GB, cluster.device_bytes is 1.0 GB" in printed  # 2.0 of the runtime, 3.5 of the sleeping engine
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["schema"] == "tppo-dry-run/1"
    assert table["fits"] is False
    assert table["bytes_per_phase"] == memory.bytes_per_phase(config)


def test_a_response_longer_than_the_models_positions_does_not_fit(file):
    found = memory.problems(small(file, algo__rollout__max_response_tokens=4096))
    assert any("4,128 tokens, the policy was made for 4,096 positions" in line for line in found)


# ----------------------------------------------------------------------------------------------------------------- the plan


def plan_text(**changes) -> str:
    entry = {"window": 32, "step_s": 100.0, "phases_s": {"decode": 60.0, "policy_train": 40.0}, "gain": 1.5}
    plan = {
        "schema": "tppo-sim-plan/1", "seconds": [entry], "model": {"num_parameters": 7}, "device": {"num_devices": 4},
        "inputs": {"cap": 96, "prompts": 8, "samples": 1, "refill": "immediate"},
        "layout": {"tensor_parallel": 2, "memory_utilisation": 0.85},
    }  # fmt: skip
    return json.dumps(plan | changes)


def test_seconds_come_from_the_plan_and_so_does_what_differs(file, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(plan_text())
    config = small(file, cluster__plan_file=str(path), algo__run__steps=864)
    found = read_seconds(config, 8, 4)
    assert (found.step_s, found.window, found.gain) == (100.0, 32, 1.5)
    assert found.differences == ["parameters 7, here 8"]
    text = "\n".join(found.lines())
    assert "1.0 days, 96 device hours" in text
    assert "decode 60, policy_train 40" in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "expected what `python -m sim plan --json` writes"),
        ("[]", "expected what `python -m sim plan --json` writes"),
        ('{"error": "no such model"}', "with no such model; expected schema"),
        (plan_text(seconds=[]), "a plan in which nothing fitted"),
        (plan_text(seconds=[{"window": 64}]), "with windows 64; expected 32"),
        (plan_text(inputs={}), "expected what `python -m sim plan --json` writes"),
        (None, "expected a file that can be read"),
    ],
)
def test_a_plan_that_cannot_be_used_is_one_line(file, tmp_path, text, expected):
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=r"^cluster.plan_file: ") as caught:
        read_seconds(small(file, cluster__plan_file=str(path)), 7, 4)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ the whole thing


def test_32b_on_64_ranks_from_the_command_line_in_two_gib(tmp_path):
    table = tmp_path / "table.json"
    command = [sys.executable, str(ROOT / "scale" / "launch.py"), "--dry-run", "--config", str(CONFIGS / "qwen2.5-32b-math.yaml"),
               "--cluster.dry_run_json", str(table)]  # fmt: skip
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=tmp_path, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    assert "the folder is not here: shape from qwen2.5-32b.json" in done.stdout
    found = json.loads(table.read_text())
    assert found["model"]["num_parameters"] == 32_763_876_352
    # 12 bytes a parameter over 64 ranks; shards are whole rows, so rounding adds a little
    assert found["terms_per_phase"]["rollout"]["policy_state"] == pytest.approx(32_763_876_352 * 12 / 64, rel=1e-3)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 2 * 2**30
    check_the_guides_table(found["terms_per_phase"])


def check_the_guides_table(phases):
    """docs/scale.md shows this dry run, its terms in groups."""
    groups = {
        "states": ("policy_state", "value_state"),
        "passes": ("gathered_weights", "gathered_gradients", "gradients", "activations"),
        "engine": ("engine_weights", "engine_reserve", "kv_cache", "engine_asleep"),
        "sync buffer": ("sync_buffer", "batch", "runtime"),
        "in all": memory.TERMS,
    }
    guide = (ROOT / "docs" / "scale.md").read_text().splitlines()
    head = next(line for line in guide if line.startswith("| Qwen2.5-32B, 64 ranks"))
    names = [cell.strip() for cell in head.strip("|").split("|")][1:]
    assert names == list(phases)
    for start, grouped in groups.items():
        (row,) = [line for line in guide if line.startswith(f"| {start}") and line.count("|") == head.count("|")]
        shown = [float(cell) if cell.strip() else 0.0 for cell in row.strip("|").split("|")[1:]]
        for name, number in zip(names, shown, strict=True):
            assert number == pytest.approx(sum(phases[name].get(term, 0) for term in grouped) / 1e9, abs=0.051), (start, name)


# ------------------------------------------------------------------------------------------------------------- while it is silent


class Bar:
    """What the dry run needs of tqdm, written down in `shown`."""

    shown: ClassVar[list[list]] = []

    def __init__(self, things=(), desc="", total=None, **options):
        self.things, self.row = list(things), [desc, total or len(list(things)), 0, options["disable"], options["leave"]]
        self.shown.append(self.row)

    def __iter__(self):
        for thing in self.things:
            yield thing
            self.update()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self):
        self.row[2] += 1


@pytest.mark.parametrize("device_bytes", [1e12, 1e6])
def test_a_dry_run_counts_its_parts_and_the_ways_to_make_a_run_fit(device_bytes, file, monkeypatch, capsys):
    """On a terminal alone (disable None), and nothing of it stays."""
    monkeypatch.setattr(Bar, "shown", [])
    for module in ("dryrun", "remedies"):
        monkeypatch.setattr(f"scale.memory.{module}.tqdm", Bar)
    monkeypatch.setattr("scale.memory.remedies._tried", lambda *_: None)  # what each would cost is others' subject, and takes long
    fits = dry_run(small(file) if device_bytes > 1e9 else replace_fields(small(file), {"cluster.device_bytes": device_bytes})) == 0
    assert fits == (device_bytes > 1e9)
    assert capsys.readouterr().err == ""
    first, *others = [row[0] for row in Bar.shown]
    assert (first, set(others)) == ("dry run", set() if fits else {"what would make it fit"})
    assert sum(total for _, total, *_ in Bar.shown) > (3 if fits else 6)
    for _, total, done, disable, leave in Bar.shown:
        assert done == total
        assert disable is None
        assert leave is False


def test_responses_of_128k_fit_on_64_devices_where_four_of_them_share_a_row(tmp_path, monkeypatch):
    """The command of docs/scale.md, and the table that it printed; one device to a row is far from enough."""
    monkeypatch.setattr(head, "BLOCK_NUMBERS", 2**27)  # the head is no pass's peak here; in small blocks it is most of the trace
    guide = (ROOT / "docs" / "scale.md").read_text()
    shown = guide.partition("## Long rows over several ranks")[2].partition("\n## ")[0]
    command = shown.partition("scale/launch.py --dry-run ")[2].partition("\n\n")[0].replace("\\\n", " ").split()
    long = tmp_path / "long.json"
    long.write_text((CONFIGS / "models" / "qwen2.5-32b.json").read_text().replace("131072", "262144"))
    command[command.index("long.json")], command[1] = str(long), str(ROOT / command[1])
    config = check(parse(ScaleConfig, command, prog="test"))
    assert (config.algo.rollout.max_response_tokens, memory.num_ranks(config), config.cluster.device_bytes) == (131_072, 64, 80e9)
    terms = memory.terms_per_phase(config)
    assert max(sum(found.values()) for found in terms.values()) < 80e9
    assert memory.kv_tokens(config, memory.shapes(config)[0]) > memory.longest_row(config)
    for line in table(terms):
        assert f"    {line.rstrip()}\n" in shown, line
    needed = {}
    for sharing in (1, 2):
        fewer = replace_fields(config, {"sharding.context_parallel": sharing})
        found = memory.working(fewer, memory.shapes(config)[1], "value_update") | {"batch": memory.batch_bytes(fewer)}
        needed[sharing] = sum((terms["value_update"] | found).values()) / 1e9
    assert f"would need {needed[1]:.0f} GB, with two {needed[2]:.0f} GB" in shown
    assert min(needed.values()) > 80
