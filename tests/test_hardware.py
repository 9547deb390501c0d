"""specs.py, layout.py, hardware.py: shapes against transformers, operations against torch's counter, seconds against hand-made sums."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from sim.clock import efficiency as efficiency_module
from sim.clock.devices import ACCELERATORS, accelerator, cluster
from sim.clock.efficiency import ENGINE_ENDS, LEVELS, TRAINER_ENDS, at
from sim.clock.hardware import (
    GRADIENT_BYTES_PER_PARAMETER,
    OPTIMISER_BYTES_PER_PARAMETER,
    Costs,
    Efficiency,
    Layout,
    Roofline,
    causal_context,
)
from sim.clock.specs import MODELS, ModelShape, model

GIB = 1 << 30
LAW = settings(max_examples=60, deadline=None)
layouts_of_one_node = st.builds(Layout, num_devices=st.just(8), tensor_parallel=st.sampled_from([2, 4, 8]))
EXACT = Efficiency(
    memory_fraction=1, engine_flops_fraction=1, training_flops_fraction=1, link_fraction=1, network_fraction=1, host_link_fraction=1,
    all_reduce_latency_s=0, decode_overhead_s=0, sequence_overhead_s=0, sampling_passes=0, sync_tensor_s=0, sync_bytes_per_s=1e30,
    wake_overhead_s=0,
)  # fmt: skip
"""Software that reaches every rate and adds nothing: what is left is the arithmetic of the hardware."""


def roofline(devices: str = "64xH800", name: str = "Qwen2.5-32B", efficiency: Efficiency | None = None, **layout) -> Roofline:
    num_devices, gpu = cluster(devices)
    return Roofline(
        accelerator=gpu,
        model=model(name),
        layout=Layout(num_devices=num_devices, **layout),
        efficiency=Efficiency() if efficiency is None else efficiency,
    )


def as_a_protocol(costs: Costs) -> Costs:
    """mypy does not read tests; calling every member does the same at run time."""
    for call in (
        costs.decode_step_s,
        costs.prefill_s,
        costs.logprob_s,
        costs.prefix_s,
        costs.policy_train_s,
        costs.value_forward_s,
        costs.value_train_s,
    ):
        assert call(3, 5) >= 0
    assert costs.sync_s() >= 0
    assert costs.wake_s() >= 0
    return costs


# --------------------------------------------------------------------------------------------------------------- models

PUBLISHED_BILLIONS = {"0.5B": 0.49, "1.5B": 1.54, "3B": 3.09, "7B": 7.61, "14B": 14.7, "32B": 32.76, "72B": 72.7}


@pytest.mark.parametrize("size", PUBLISHED_BILLIONS)
def test_parameter_counts_are_the_published_ones(size):
    """To the digits that were printed; the model cards cut some and round others."""
    published = PUBLISHED_BILLIONS[size]
    last_digit = 0.1 if published in (14.7, 72.7) else 0.01
    assert abs(model(f"Qwen2.5-{size}").num_parameters / 1e9 - published) < last_digit


def hf_config(shape: ModelShape):
    return AutoConfig.for_model(
        "qwen2", num_hidden_layers=shape.num_layers, hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
        num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads, vocab_size=shape.vocab_size,
        tie_word_embeddings=shape.tied_embeddings,
    )  # fmt: skip


@pytest.mark.parametrize("size", ["0.5B", "7B"])
def test_parameter_counts_are_those_of_transformers(size):
    shape = model(f"Qwen/Qwen2.5-{size}")
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(hf_config(shape))
        config = hf_config(shape)
        config.num_labels = 1
        value = AutoModelForTokenClassification.from_config(config)
    assert sum(p.numel() for p in policy.parameters()) == shape.num_parameters
    assert sum(p.numel() for p in value.parameters()) == shape.num_value_parameters


SMALL = dict(
    num_hidden_layers=3, hidden_size=48, intermediate_size=80, num_attention_heads=6, num_key_value_heads=2, vocab_size=101
)
CONFIGS = [
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen2", {"num_key_value_heads": 6}),
    ("qwen3", {"head_dim": 16}),
    ("qwen3", {"head_dim": 16, "attention_bias": True}),
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("mistral", {"head_dim": 12, "sliding_window": None}),
]


@pytest.mark.parametrize(("kind", "changes"), CONFIGS)
def test_any_config_json_gives_the_parameters_that_transformers_would_make(tmp_path, kind, changes):
    config = AutoConfig.for_model(kind, **SMALL, **{k: v for k, v in changes.items() if k not in SMALL})
    config.update(changes)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    for path in (tmp_path, tmp_path / "config.json"):
        shape = ModelShape.from_config(path)
        assert shape.num_parameters == sum(p.numel() for p in built.parameters())
    assert model(tmp_path) == dataclasses.replace(shape, name=str(tmp_path / "config.json"), source=str(tmp_path / "config.json"))


@pytest.mark.parametrize(("kind", "changes"), CONFIGS[:6])
def test_forward_operations_are_those_that_torch_counts(kind, changes):
    """Eager attention multiplies every query with every key of the row, so each of n tokens attends to n."""
    config = AutoConfig.for_model(kind, **{**SMALL, **changes}, attn_implementation="eager")
    shape = ModelShape(name="counted", **_shape_fields(config))
    built, rows, tokens = AutoModelForCausalLM.from_config(config), 2, 11
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        built(input_ids=torch.zeros(rows, tokens, dtype=torch.long), use_cache=False)
    assert counter.get_total_flops() == shape.forward_flops(rows * tokens, rows * tokens**2)


def _shape_fields(config) -> dict:
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return dict(
        num_layers=config.num_hidden_layers, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads, num_kv_heads=config.num_key_value_heads, head_size=head, vocab_size=config.vocab_size,
        tied_embeddings=config.tie_word_embeddings,
    )  # fmt: skip


def test_the_32b_has_the_published_sizes():
    """Published: 65.5 GB in bf16, 262,144 bytes of KV cache per token, 2.0 GiB per 8k sequence."""
    shape = model("Qwen/Qwen2.5-32B")
    assert shape.weight_bytes() == pytest.approx(65.5e9, rel=1e-3)
    assert shape.kv_bytes_per_token() == 262_144
    assert 8192 * shape.kv_bytes_per_token() == 2 * GIB
    assert shape.read_bytes() == shape.weight_bytes() - 2 * 152_064 * 5120


def test_operations_follow_the_rule_of_thumb():
    """2 operations per parameter and token forward, for large models and short contexts."""
    shape = model("Qwen/Qwen2.5-72B")
    assert shape.flops_per_token(1) == pytest.approx(2 * shape.num_parameters, rel=0.02)
    assert shape.flops_per_token(8193) - shape.flops_per_token(1) == 8192 * 4 * 80 * 8192


def test_memory_of_training_is_that_of_the_dry_run():
    """FSDP2 on fake tensors, 32B on 64 ranks (recipes.md [M]): 7.6 GiB of state; with checkpointing 22.7, 31.7 and 50.9 GiB at 8k,
    16k and 32k tokens, 190 without at 8k."""
    shape = model("Qwen/Qwen2.5-32B")
    state = shape.num_parameters * (OPTIMISER_BYTES_PER_PARAMETER + GRADIENT_BYTES_PER_PARAMETER) / 64
    assert state / GIB == pytest.approx(7.6, abs=0.05)
    per_token = shape.activation_bytes_per_token(checkpointing=True)
    assert 8192 * per_token / GIB == pytest.approx(31.7 - 22.7, rel=0.01)
    assert 24_576 * per_token / GIB == pytest.approx(50.9 - 22.7, rel=0.05)
    assert 8192 * shape.activation_bytes_per_token(checkpointing=False) / GIB == pytest.approx(190 - (22.7 - 9), rel=0.05)
    assert shape.logit_bytes_per_token() == 608_256


def config_with(**changes) -> dict:
    return {"model_type": "qwen2", **SMALL, **changes}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "qwen2", "hidden_size": 4}, "has no num_hidden_layers, intermediate_size, num_attention_heads, vocab_size"),
        (config_with(model_type="gpt2"), "got model_type 'gpt2'; expected one of llama, mistral, qwen2, qwen3"),
        (config_with(model_type=None), "got model_type None"),
        (config_with(model_type="qwen3_moe", num_experts=8), "got num_experts, a mixture of experts; expected a dense model"),
        (config_with(use_sliding_window=True), "sliding attention window; expected full attention"),
        (config_with(model_type="mistral", sliding_window=4096), "sliding attention window"),
        (config_with(model_type="qwen3"), "has no head_dim"),
        (config_with(num_hidden_layers="three"), "num_layers: got 'three'; expected a whole number"),
        (config_with(hidden_size=0), "hidden_size: got 0; expected a whole number, 1 or more"),
        (config_with(num_key_value_heads=4), "num_kv_heads: got 4; expected a divisor of 6 heads"),
        ([1, 2], "got list; expected an object"),
    ],
)
def test_a_config_that_cannot_be_read_is_one_line_that_says_why(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message) as raised:
        model(tmp_path)
    assert "config.json" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_config_that_is_no_file_or_no_json(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json cannot be read: No such file"):
        model(tmp_path / "nowhere.json")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        model(tmp_path)


# ---------------------------------------------------------------------------------------------------------------- names


def test_names():
    assert model("qwen2.5-32b") is model("Qwen/Qwen2.5-32B-Instruct") is MODELS["Qwen/Qwen2.5-32B"]
    assert accelerator("h800") is ACCELERATORS["H800"]
    assert cluster("64xH800") == cluster(" 64 X h800") == cluster("64×H800") == (64, ACCELERATORS["H800"])
    assert cluster("laptop-cpu") == (1, ACCELERATORS["laptop-cpu"])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda: accelerator("H10"),
            r"accelerator: got 'H10' \(did you mean H100\?\); expected one of H100, H800, H200, B200, H20, A100, ",
        ),
        (lambda: cluster("64xH80"), r"accelerator: got 'H80' \(did you mean H800\?\)"),
        (lambda: cluster("0xH100"), "devices: got '0xH100'; expected at least 1"),
        (lambda: cluster(""), "accelerator: got ''"),
        (lambda: model("Qwen/Qwen2.5-32"), r"model: got 'Qwen/Qwen2.5-32' \(did you mean Qwen/Qwen2.5-32B\?\); expected one of"),
        (lambda: model("zebra"), "or a config.json, or the folder of one"),
    ],
)
def test_an_unknown_name_gets_the_nearest_one_and_the_list(ask, message):
    with pytest.raises(ValueError, match=message):
        ask()


def test_ridges_are_the_published_ones():
    assert {name: round(accelerator(name).ridge) for name in ("H100", "H800", "H200")} == {"H100": 295, "H800": 295, "H200": 206}


def test_every_number_has_a_source():
    for spec in (*ACCELERATORS.values(), *MODELS.values()):
        assert any(mark in spec.source for mark in ("[V]", "[2]", "[O]")), spec.name
    tree = ast.parse(inspect.getsource(efficiency_module))
    (efficiency,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Efficiency"]
    for field, text in zip(efficiency.body, efficiency.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign):
            assert isinstance(text, ast.Expr), ast.unparse(field)
            assert any(mark in text.value.value for mark in ("[V]", "[2]", "[I]", "[M]", "[O]")), ast.unparse(field)


def test_the_ends_lie_on_both_sides_of_the_middle_and_no_parameter_is_in_both_groups():
    assert not set(ENGINE_ENDS) & set(TRAINER_ENDS)
    for name, ends in (ENGINE_ENDS | TRAINER_ENDS).items():
        middle, smaller_is_faster = getattr(Efficiency(), name), name.endswith("_s") and not name.endswith("_per_s")
        low, high = (ends.fast, ends.slow) if smaller_is_faster else (ends.slow, ends.fast)
        assert low <= middle <= high, name
        assert low < high, name
    assert at() == Efficiency()
    assert at("slow", "fast") == dataclasses.replace(at("slow"), **{name: ends.fast for name, ends in TRAINER_ENDS.items()})


@pytest.mark.parametrize("group", ["engine", "trainer"])
def test_a_faster_end_never_takes_longer(group):
    work = (2_000_000, 4_000_000_000, 200, 500_000)
    slow, middle, fast = (all_costs(roofline(tensor_parallel=4, efficiency=at(**{group: level})), work) for level in LEVELS)
    assert all(f <= m <= s for f, m, s in zip(fast, middle, slow, strict=True))
    assert slow != fast


# ------------------------------------------------------------------------------------------------------------ the engine


@pytest.mark.parametrize(("begin", "stop"), [(0, 0), (0, 1), (0, 7), (3, 7), (7, 7)])
def test_causal_context_counts_query_key_pairs(begin, stop):
    assert causal_context(begin, stop) == sum(1 for query in range(begin, stop) for key in range(stop) if key <= query)
    assert causal_context(np.array([begin, 0]), stop).tolist() == [causal_context(begin, stop), causal_context(0, stop)]


def test_decoding_one_sequence_by_hand():
    """Qwen2.5-32B on 4 H100: a quarter of 65.53 GB less 1.56 GB of embedding, at 0.8 of 3.35 TB/s; 128 all-reduces; 12 passes over
    152,064 logits in fp32; overheads of the step and of the sequence."""
    costs = roofline("8xH100", tensor_parallel=4)
    weights_s = (65.5278e9 - 1.5571e9) / 4 / (3.35e12 * 0.8)
    reduce_s = 10e-6 + 2 * 3 / 4 * 10_240 / (450e9 * 0.77)
    sampling_s = 12 * 4 * 152_064 / (3.35e12 * 0.8)
    assert costs.decode_step_s(1, 0) == pytest.approx(weights_s + 128 * reduce_s + sampling_s + 3e-3 + 17e-6, rel=1e-5)
    assert costs.decode_step_s(1, 1000) - costs.decode_step_s(1, 0) == pytest.approx(1000 * 65_536 / 2.68e12)


def test_small_batches_take_as_long_as_one_and_large_ones_as_their_arithmetic():
    costs = roofline("1xH200", efficiency=EXACT)
    one, two = costs.decode_step_s(1, 0), costs.decode_step_s(2, 0)
    assert one == two == pytest.approx(63.97e9 / 4.8e12, rel=1e-3)
    turn = accelerator("H200").ridge  # operations per byte are the batch; above this one, arithmetic
    assert costs.decode_step_s(math.floor(turn), 0) == one
    assert costs.decode_step_s(2 * turn, 0) == pytest.approx(2 * one, rel=1e-3)
    assert costs.decode_step_s(1000, 0) == pytest.approx(1000 * costs.model.flops_per_token(0) / 989e12)


def test_in_crowded_batches_arithmetic_and_keys_take_their_time_one_after_the_other():
    """512 sequences of 1,000 tokens of Qwen2.5-32B on one H200, by hand: 33.5 ms of products, then 28 ms of keys and values. The
    maximum of the sums, all bytes against all operations, would be 0.66 of it."""
    costs = roofline("1xH200", efficiency=EXACT)
    products_s = 512 * 2 * (31.2e9 + 0.7786e9) / 989e12
    keys_s = 512 * 1000 * 262_144 / 4.8e12
    assert costs.decode_step_s(512, 512_000) == pytest.approx(products_s + keys_s, rel=2e-3)
    whole_s = max(products_s + 512_000 * 4 * 64 * 5120 / 989e12, (63.97e9 + 512_000 * 262_144) / 4.8e12)
    assert whole_s / costs.decode_step_s(512, 512_000) == pytest.approx(0.68, abs=0.02)


@LAW
@given(layouts_of_one_node, st.integers(1, 600), st.integers(0, 10**7))
def test_a_decode_step_takes_at_least_the_maximum_of_the_sums(layout, active, context):
    """All bytes against all operations, as if kernels overlapped, is a lower bound: max(a, b) + max(c, d) >= max(a + c, b + d)."""
    costs = Roofline(accelerator=accelerator("H800"), model=model("Qwen2.5-14B"), layout=layout, efficiency=EXACT)
    split, shape = layout.tensor_parallel, costs.model
    moved_bytes = (shape.read_bytes() + context * shape.kv_bytes_per_token()) / split
    assert costs.decode_step_s(active, context) >= max(moved_bytes / 3.35e12, shape.forward_flops(active, context) / split / 989e12)


def test_every_sequence_costs_its_scheduling_and_its_logits():
    plain, bare = roofline(tensor_parallel=4), roofline(tensor_parallel=4, efficiency=dataclasses.replace(
        Efficiency(), sequence_overhead_s=0, sampling_passes=0))  # fmt: skip
    each = (plain.decode_step_s(200, 0) - bare.decode_step_s(200, 0)) / 200
    assert each == pytest.approx(17e-6 + 12 * 152_064 * 4 / (0.8 * 3.35e12))


@pytest.mark.parametrize("batch", [1, 84, 249])
@pytest.mark.parametrize("tensor_parallel", [4, 8])
def test_operations_per_byte_are_the_batch_while_contexts_are_short(batch, tensor_parallel):
    """Each weight of bf16 is 2 bytes and 2 operations: the paper's 84 and 249 are mean batches."""
    costs = roofline(tensor_parallel=tensor_parallel)
    assert costs.operations_per_byte(batch, 0) == pytest.approx(batch, rel=1e-3)
    assert costs.operations_per_byte(batch, batch * 8192) < 0.6 * batch + 1


def test_the_paper_s_roofline_points_would_need_short_contexts():
    """249 with 8k of context each: the KV cache is 522 GB per step beside 64 GB of weights. Counted once more by hand."""
    costs = roofline(tensor_parallel=8)
    operations = 249 * 2 * 31.985e9 + 249 * 8192 * 4 * 64 * 5120
    moved_bytes = 63.97e9 + 249 * 8192 * 262_144
    assert costs.operations_per_byte(249, 249 * 8192) == pytest.approx(operations / moved_bytes, rel=1e-3)


def test_published_decode_time():
    """Qwen2.5-72B on 2 H100 under vLLM: 30.9 ms per token after 128 to 2,048 tokens, 31.3 ms after 8,192 (tenstorrent/tt-inference-
    server issue 143). No default was fitted to them."""
    costs = roofline("2xH100", "Qwen2.5-72B", tensor_parallel=2, memory_utilisation=0.98, engine_reserve_bytes=1e9)
    assert costs.decode_step_s(1, 192) == pytest.approx(0.0309, rel=0.03)
    assert costs.decode_step_s(1, 8256) == pytest.approx(0.0313, rel=0.03)


def test_more_devices_than_key_value_heads_hold_them_twice():
    narrow, wide = (roofline("8xH100", "Qwen2.5-3B", tensor_parallel=split) for split in (2, 8))
    assert (narrow.kv_bytes_per_token, wide.kv_bytes_per_token) == (36_864 / 2, 36_864 / 2)


def test_kv_capacity_by_hand():
    costs = roofline("8xH100", tensor_parallel=4, memory_utilisation=0.9, engine_reserve_bytes=4e9)
    left = 81_559 * 2**20 * 0.9 - 65_527_752_704 / 4 - 4e9
    assert costs.kv_capacity_tokens == math.floor(left / 65_536)
    assert costs.layout.num_replicas == 2


def test_prefill_is_bound_by_arithmetic_and_short_ones_by_the_weights():
    costs = roofline("1xH200", efficiency=EXACT)
    matrices = model("Qwen2.5-32B").num_layer_matrix_parameters
    by_hand = (2 * matrices * 4096 + 4 * 64 * 5120 * causal_context(0, 4096)) / 989e12
    assert costs.prefill_s(4096, causal_context(0, 4096)) == pytest.approx(by_hand)
    assert costs.prefill_s(1) == pytest.approx(63.97e9 / 4.8e12, rel=1e-3)
    overhead = dataclasses.replace(EXACT, decode_overhead_s=1.0)
    tokens = np.array([0, 8192, 8193])
    added_s = roofline("1xH200", efficiency=overhead).prefill_s(tokens) - costs.prefill_s(tokens)
    assert added_s == pytest.approx([0, 1, 2], abs=1e-12)  # a second for each chunk of 8,192


def test_nothing_to_do_takes_no_time():
    costs = roofline(tensor_parallel=4)
    work = (costs.prefill_s, costs.logprob_s, costs.policy_train_s, costs.value_forward_s, costs.value_train_s)
    assert [float(call(0, 0)) for call in work] == [0] * len(work)
    assert costs.decode_step_s(np.array([0, 1]), np.array([0, 9])).tolist() == [0, costs.decode_step_s(1, 9)]


def test_arrays_are_the_numbers_one_by_one():
    costs = as_a_protocol(roofline(tensor_parallel=4))
    tokens, context = np.array([[1, 64, 5000]]), np.array([[2], [70_000]])
    for name in ("decode_step_s", "prefill_s", "logprob_s", "policy_train_s", "value_forward_s", "value_train_s"):
        call = getattr(costs, name)
        each = [[call(int(t), int(c)) for t in tokens[0]] for c in context[:, 0]]
        np.testing.assert_allclose(call(tokens, context), each, rtol=1e-14)
        assert np.ndim(each[0][0]) == 0


# --------------------------------------------------------------------------------------------------- weights to the engines


def test_weight_sync_by_hand():
    """64 H800: 65.5 GB over NVLink at 200 GB/s, since a node's 8 adapters carry 400 GB/s; then a copy of a quarter. With A100s the
    adapters, 200 GB/s together, are the slower ones."""
    colocated = roofline(tensor_parallel=4, efficiency=EXACT)
    copy_s = 2 * 65.5278e9 / 4 / 3.35e12
    assert colocated.sync_s() == pytest.approx(65.5278e9 * 63 / 64 / 200e9 + copy_s, rel=1e-5)
    apart = roofline(tensor_parallel=4, num_engine_devices=32, efficiency=EXACT)
    assert apart.sync_s() - colocated.sync_s() == pytest.approx(65.5278e9 / 50e9, rel=1e-5)
    slow_network = roofline("64xA100", tensor_parallel=4, efficiency=EXACT)
    assert slow_network.sync_s() == pytest.approx(65.5278e9 * 63 / 64 / 200e9 + 2 * 65.5278e9 / 4 / 2.039e12, rel=1e-5)
    one_node = roofline("8xA100", tensor_parallel=4, efficiency=EXACT)
    assert one_node.sync_s() < roofline("16xA100", tensor_parallel=4, efficiency=EXACT).sync_s()


def test_a_sync_costs_each_tensor_and_the_bytes_as_software_moves_them():
    """Qwen2.5-32B has 64 x (7 matrices, 3 biases, 2 norms) + 3 tensors. Links at their rate would take 0.5 s."""
    costs = roofline(tensor_parallel=4)
    assert costs.model.num_tensors == 64 * 12 + 3
    assert costs.sync_s() == pytest.approx(771 * 0.6e-3 + 65.5278e9 / 20e9, rel=1e-5)
    slow, fast = (dataclasses.replace(costs, efficiency=at(trainer=level)).sync_s() for level in ("slow", "fast"))
    assert fast < costs.sync_s() < slow
    assert (fast, slow) == (
        pytest.approx(771 * 0.2e-3 + 65.5278e9 / 60e9, rel=1e-5),
        pytest.approx(771 * 2e-3 + 65.5278e9 / 8e9, rel=1e-5),
    )


@pytest.mark.parametrize("size", sorted(MODELS))
def test_a_checkpoint_has_as_many_tensors_as_transformers_makes(size):
    shape = MODELS[size]
    config = AutoConfig.for_model("qwen2", num_hidden_layers=2, hidden_size=8, intermediate_size=8, num_attention_heads=2,
                                  num_key_value_heads=1, vocab_size=16, tie_word_embeddings=shape.tied_embeddings)  # fmt: skip
    with torch.device("meta"):
        small = AutoModelForCausalLM.from_config(config)
    per_layer = sum(1 for name, _ in small.named_parameters() if ".layers.0." in name)
    outside = sum(1 for name, _ in small.named_parameters() if ".layers." not in name)
    assert shape.num_tensors == shape.num_layers * per_layer + outside


def test_waking_up_depends_on_where_the_weights_are():
    awake, from_host, dropped = (roofline(tensor_parallel=4, sleep_level=level).wake_s() for level in (0, 1, 2))
    assert awake == 0
    assert from_host - dropped == pytest.approx(65.5278e9 / 4 / (64e9 * 0.8), rel=1e-5)
    assert roofline(tensor_parallel=4, num_engine_devices=8, sleep_level=1).wake_s() == 0


# ------------------------------------------------------------------------------------------------------------- training


def test_training_follows_the_rule_of_thumb():
    """6 N D operations, and 8 N D with recomputation, over all devices; the optimiser's step is added."""
    tokens, num_parameters = 64 * 32_768, 32.76e9
    for checkpointing, per_token in ((False, 6), (True, 8)):
        costs = roofline(tensor_parallel=4, efficiency=EXACT, activation_checkpointing=checkpointing)
        expected = per_token * num_parameters * tokens / (64 * 989e12) + costs.optimiser_s()
        assert costs.policy_train_s(tokens, 0) == pytest.approx(expected, rel=0.03)
        assert costs.policy_train_s(tokens, 0) == pytest.approx(
            per_token / 2 * costs.logprob_s(tokens, 0) + costs.optimiser_s(), rel=1e-9
        )


def test_the_value_model_has_no_vocabulary_to_predict():
    costs = roofline(tensor_parallel=4)
    tokens, context = 64 * 32_768, 64 * 32_768 * 4000
    rate = 64 * 989e12 * 0.50
    assert costs.logprob_s(tokens, context) - costs.value_forward_s(tokens, context) == pytest.approx(
        2 * 152_064 * 5120 * tokens / rate
    )
    policy_s, value_s = (call(tokens, context) for call in (costs.policy_train_s, costs.value_train_s))
    heads_s, optimisers_s = 4 * 2 * 152_064 * 5120 * tokens / rate, costs.optimiser_s() - costs.optimiser_s(31_985_313_793)
    assert policy_s - value_s == pytest.approx(heads_s + optimisers_s)


def test_few_tokens_are_bound_by_gathering_the_weights():
    """One token on 64 H800: bf16 weights gathered once forward; again backward, and fp32 gradients scattered, in training."""
    costs = roofline(tensor_parallel=4, efficiency=EXACT)
    gather_s = 65.5278e9 * 63 / 64 / 200e9
    assert costs.logprob_s(1, 1) == pytest.approx(gather_s, rel=1e-5)
    assert costs.policy_train_s(1, 1) - costs.optimiser_s() == pytest.approx(4 * gather_s, rel=1e-5)
    assert costs.policy_train_s(1600, 1600, 16) == pytest.approx(16 * costs.policy_train_s(1, 1), rel=1e-9)
    more_than_one_pass = costs.logprob_s(64 * 32_768 + 1, 0)
    slow_links = dataclasses.replace(costs.accelerator, node_link_bytes_per_s=1e9)
    assert dataclasses.replace(costs, accelerator=slow_links).logprob_s(64 * 32_768 + 1, 0) == pytest.approx(
        2 * 200 * gather_s, rel=1e-5
    )
    assert more_than_one_pass < 2 * 200 * gather_s


def test_overlap_hides_the_shorter_of_computing_and_communicating():
    tokens = 64 * 4096
    hidden, half, bare = (
        roofline(tensor_parallel=4, efficiency=dataclasses.replace(EXACT, communication_overlap=share)).logprob_s(tokens, 0)
        for share in (1.0, 0.5, 0.0)
    )
    compute_s = 2 * 31.985e9 * tokens / (64 * 989e12)
    gather_s = 65.5278e9 * 63 / 64 / 200e9
    assert hidden == pytest.approx(max(compute_s, gather_s), rel=1e-3)
    assert bare == pytest.approx(compute_s + gather_s, rel=1e-3)
    assert half == pytest.approx((hidden + bare) / 2)


def test_the_optimiser_moves_28_bytes_per_parameter():
    assert roofline(tensor_parallel=4).optimiser_s() == pytest.approx(28 * 32_763_876_352 / 64 / (3.35e12 * 0.8))


# ------------------------------------------------------------------------------------------------------------------ laws

RATES = [f.name for f in dataclasses.fields(ACCELERATORS["H100"]) if f.name.endswith(("_per_s", "memory_bytes"))]
EFFICIENCIES = [f.name for f in dataclasses.fields(Efficiency) if f.name.endswith("_fraction")]
work = st.tuples(st.integers(0, 10**8), st.integers(0, 10**12), st.integers(0, 600), st.integers(0, 10**7))
layouts = st.builds(
    Layout,
    num_devices=st.sampled_from([8, 64]),
    tensor_parallel=st.sampled_from([4, 8]),
    num_engine_devices=st.sampled_from([None, 16]),
    activation_checkpointing=st.booleans(),
    sleep_level=st.sampled_from([0, 1, 2]),
)


def all_costs(costs: Roofline, amount) -> list[float]:
    tokens, context, active, active_context = amount
    passes = (costs.prefill_s, costs.logprob_s, costs.policy_train_s, costs.value_forward_s, costs.value_train_s)
    seconds = [costs.decode_step_s(active, active_context), *(call(tokens, context) for call in passes)]
    return [
        float(s) for s in (*seconds, costs.policy_train_s(tokens, context, 16), costs.sync_s(), costs.wake_s(), costs.optimiser_s())
    ]


@LAW
@given(layouts, work, st.sampled_from(RATES + EFFICIENCIES), st.floats(1, 3), st.floats(0, 1))
def test_a_faster_device_never_takes_longer(layout, amount, name, factor, overlap):
    efficiency = Efficiency(communication_overlap=overlap)
    costs = Roofline(accelerator=accelerator("H100"), model=model("Qwen2.5-14B"), layout=layout, efficiency=efficiency)
    if name in RATES:
        gpu = dataclasses.replace(costs.accelerator, **{name: getattr(costs.accelerator, name) * factor})
        faster = dataclasses.replace(costs, accelerator=gpu)
    else:
        raised = min(1.0, getattr(efficiency, name) * factor)
        faster = dataclasses.replace(costs, efficiency=dataclasses.replace(efficiency, **{name: raised}))
    for quick, slow in zip(all_costs(faster, amount), all_costs(costs, amount), strict=True):
        assert quick <= slow * (1 + 1e-12)
    assert faster.kv_capacity_tokens >= costs.kv_capacity_tokens


@LAW
@given(layouts, work, work)
def test_more_work_never_takes_less_time_and_seconds_are_finite(layout, amount, more):
    costs = Roofline(accelerator=accelerator("H800"), model=model("Qwen2.5-14B"), layout=layout)
    less, both = all_costs(costs, amount), all_costs(costs, tuple(a + b for a, b in zip(amount, more, strict=True)))
    assert all(0 <= a <= b * (1 + 1e-12) < math.inf for a, b in zip(less, both, strict=True))


@LAW
@given(layouts, st.integers(1, 600), st.integers(0, 10**7))
def test_a_decode_step_takes_at_least_its_bytes_and_its_operations(layout, active, context):
    """At what the device promises, whatever the efficiencies: no cost is below the roof."""
    costs = Roofline(accelerator=accelerator("H800"), model=model("Qwen2.5-14B"), layout=layout)
    split, shape = layout.tensor_parallel, costs.model
    moved_bytes = (shape.read_bytes() + context * shape.kv_bytes_per_token()) / split
    assert costs.decode_step_s(active, context) >= max(moved_bytes / 3.35e12, shape.forward_flops(active, context) / split / 989e12)


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: roofline("8xH100", "Qwen2.5-72B"), "Qwen/Qwen2.5-72B does not fit: 145.4 GB of weights .* raise tensor_parallel"),
        (
            lambda: roofline("8xH100", "Qwen2.5-7B", tensor_parallel=8),
            "tensor_parallel: got 8; expected a divisor of .*'s 28 heads",
        ),
        (lambda: Layout(num_devices=8, tensor_parallel=16), "tensor_parallel: got 16; expected at most the devices of a node, 8"),
        (lambda: Layout(num_devices=12, tensor_parallel=8), "expected a divisor of the engine's 12 devices"),
        (lambda: Layout(num_devices=8, num_engine_devices=0), "expected a divisor of the engine's 0 devices"),
        (lambda: Layout(num_devices=0), "num_devices: got 0"),
        (lambda: Layout(num_devices=True), "num_devices: got True"),
        (lambda: Layout(num_devices=8, memory_utilisation=1.1), "memory_utilisation: got 1.1"),
        (lambda: Layout(num_devices=8, engine_reserve_bytes=-1), "engine_reserve_bytes: got -1"),
        (lambda: Layout(num_devices=8, sleep_level=3), "sleep_level: got 3"),
        (lambda: Efficiency(memory_fraction=0), r"memory_fraction: got 0; expected a number in \(0, 1\]"),
        (lambda: Efficiency(training_flops_fraction=math.nan), "training_flops_fraction: got nan"),
        (lambda: Efficiency(decode_overhead_s=-1), "decode_overhead_s: got -1"),
        (lambda: Efficiency(communication_overlap=2), "communication_overlap: got 2"),
        (lambda: Efficiency(prefill_chunk_tokens=0), "prefill_chunk_tokens: got 0"),
        (lambda: dataclasses.replace(ACCELERATORS["H100"], flops_per_s=math.inf), "H100.flops_per_s: got inf"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(build, message):
    with pytest.raises(ValueError, match=message) as raised:
        build()
    assert "\n" not in str(raised.value)
