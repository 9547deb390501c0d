"""What a step's phases take: FLOPs against torch's own counter and by hand, MFU from the logged numbers, memory of stand-in counters.

No GPU is here. What CUDA's allocator and driver would say comes from stand-ins, and these tests hold what is made of it: which phase
a number belongs to, that peaks are forgotten between phases, and that a step reports the fullest rank.
"""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import one_thread  # noqa: F401  (a fixture)
from oracle_stage import TINY, make_config, real_stage, toy_stage
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sim.clock.devices import ACCELERATORS
from tppo_ref.loop import meters
from tppo_ref.loop.meters import Held, Meters
from tppo_ref.loop.parallel import SingleProcess
from tppo_ref.loop.peaks import PEAK_FLOPS_PER_S, peak_flops_per_s
from tppo_ref.method.records import Prompt, Response, WindowSlice
from tppo_ref.rollout.attention import PrefixKeys
from tppo_ref.rollout.engine import Request
from tppo_ref.rollout.flops import flops_of
from tppo_ref.rollout.models import load_policy, load_value_model
from tppo_ref.rollout.packing import TokenBatch
from tppo_ref.rollout.torch_engine import TorchEngine

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"rollout.slots": 4, "rollout.window": 4, "rollout.max_response_tokens": 10}
SHAPES = {
    "llama": TINY,
    "gpt2": dict(model_type="gpt2", vocab_size=11, n_embd=8, n_layer=2, n_head=2, n_positions=64, bos_token_id=None, eos_token_id=0,
                 tie_word_embeddings=True),
    "wide heads": dict(model_type="qwen3", vocab_size=9, hidden_size=8, intermediate_size=12, num_hidden_layers=3,
                       num_attention_heads=2, num_key_value_heads=1, head_dim=6, max_position_embeddings=64, pad_token_id=None),
}  # fmt: skip


def counted(call) -> tuple[int, int]:
    """(matrix products, products of attention) that torch's counter saw. It counts the whole square of a causal score matrix."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    by_name = {str(name): number for name, number in counter.get_flop_counts()["Global"].items()}
    batched = sum(number for name, number in by_name.items() if "bmm" in name)
    return sum(by_name.values()) - batched, batched


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("load", [load_policy, load_value_model])
@pytest.mark.parametrize("backward", [False, True])
def test_flops_are_those_of_torchs_counter_but_for_the_square_of_attention(shape, load, backward):
    model, prompt, response = load(shape), [1, 2, 3], [4, 5, 6, 5, 4, 3, 2, 1]
    n = len(prompt) + len(response)
    batch, flops = TokenBatch([prompt], [response]), flops_of(model)

    def run() -> None:
        outputs = model(batch)
        if backward:
            sum(x.sum() for x in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()

    with torch.set_grad_enabled(backward):
        products, attention = counted(run)
    assert attention > 0
    assert flops.of_batch(batch, backward=backward) == products + attention * (n + 1) / (2 * n)


def test_flops_of_several_rows_are_the_sum_of_each_rows():
    model = load_policy(TINY)
    prompts, responses = [[1], [1, 2, 3], [2, 2]], [[3] * 7, [4] * 2, [5] * 9]
    each = [flops_of(model).of_batch(TokenBatch([p], [r]), backward=True) for p, r in zip(prompts, responses, strict=True)]
    assert flops_of(model).of_batch(TokenBatch(prompts, responses), backward=True) == sum(each)
    assert flops_of(model).of_batch(TokenBatch([], []), backward=True) == 0


def test_of_a_constant_prefix_only_the_live_end_is_counted_three_times_and_a_kept_one_not_at_all():
    model, prompt, response = load_policy(TINY), [1, 2, 3], [4] * 8
    of, kept = flops_of(model), PrefixKeys()
    batch = TokenBatch([prompt], [response], [5], kept)
    prefix, live = of.forward(0, 3 + 5 - 1, 0), of.forward(3 + 5 - 1, 11, 3)  # the last constant's hidden state predicts column 5
    assert of.of_batch(batch, backward=True) == prefix + 3 * live
    assert prefix + live == of.of_batch(TokenBatch([prompt], [response[:5] + [4] * 3]), backward=False) - of.per_output * 5
    with torch.no_grad():
        model(batch)
    assert kept.filled
    assert of.of_batch(batch, backward=True) == 3 * live


def test_flops_of_decoding_are_those_of_an_engine():
    policy = load_policy(TINY)
    engine = TorchEngine(policy, slots=1, max_context_tokens=32, end_token_ids=())
    engine.submit([Request(response_id=0, token_ids=[1, 2, 3, 4, 5], max_new_tokens=6, seed=3, num_response_tokens=2)])

    def decode() -> None:
        while engine.num_running:
            engine.step()

    products, _ = counted(decode)
    prompt = Prompt(id=0, token_ids=(1, 2, 3), answer="")
    window = WindowSlice(Response(id=0, prompt=prompt, sample_index=0, token_ids=[4] * 8), 2, 8)
    flops = flops_of(policy)
    pairs = 10 * 11 // 2  # ten tokens are read: the last one that is sampled is not
    assert flops.of_decoding([window]) == products + flops.per_pair * pairs


def test_no_flops_are_said_of_other_models_and_of_experts():
    assert flops_of(torch.nn.Linear(2, 2)) is None
    policy = load_policy(TINY)
    policy.hf.config.num_local_experts = 8
    assert flops_of(policy) is None


# ------------------------------------------------------------------------------------------------------------------------- MFU


def test_mfu_is_the_logged_flops_over_the_logged_seconds_and_the_peak_of_the_config():
    stage = real_stage(make_config(SMALL | {"run.peak_tflops": 0.002}))
    metrics = stage.step()
    for phase in meters.COMPUTING:
        assert metrics[f"mfu/{phase}"] == pytest.approx(metrics[f"flops/{phase}"] / (metrics[f"time/{phase}_s"] * 2e9))
        assert metrics[f"mfu/{phase}"] > 0


def test_no_mfu_is_made_up_where_the_peak_or_the_model_is_not_known():
    real, toy = real_stage(make_config(SMALL)).step(), toy_stage(make_config(SMALL | {"run.peak_tflops": 1.0})).step()
    assert all(math.isnan(found[f"mfu/{phase}"]) for found in (real, toy) for phase in meters.COMPUTING)
    assert all(real[f"flops/{phase}"] > 0 for phase in meters.COMPUTING)
    assert all(math.isnan(toy[f"flops/{phase}"]) for phase in meters.COMPUTING)


@pytest.mark.parametrize(("name", "peak"), [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H200", 989e12), ("NVIDIA H20", 148e12), ("NVIDIA A100-SXM4-80GB", 312e12),
    ("NVIDIA B200", 2250e12), ("NVIDIA H100 PCIe", None), ("NVIDIA H100 NVL", None), ("NVIDIA H200 NVL", None), ("NVIDIA GH200 480GB", None),
    ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None), ("NVIDIA GeForce RTX 4090", None),
])  # fmt: skip
def test_a_peak_is_known_by_the_drivers_name_of_the_device_or_not_at_all(name, peak):
    assert peak_flops_per_s(name) == peak


def test_runs_and_the_simulators_clock_know_the_same_peaks():
    assert {name: ACCELERATORS[name].flops_per_s for name in PEAK_FLOPS_PER_S} == PEAK_FLOPS_PER_S
    assert {*ACCELERATORS} - {*PEAK_FLOPS_PER_S} == {"laptop-cpu"}


# ---------------------------------------------------------------------------------------------------------------------- memory


class Counters:
    """A stand-in of an allocator's counters: in each phase tensors take what `plan` says, one phase after the other."""

    def __init__(self, plan):
        self.plan, self.calls = iter(plan), []

    def begin(self):
        self.calls.append("begin")

    def end(self):
        self.calls.append("end")
        return next(self.plan)


def test_a_step_reports_memory_by_phase_of_whatever_counters_there_are():
    stage = real_stage(make_config(SMALL))
    plan = {phase: Held(10.0 * i, 10.0 * i + 1, 10.0 * i + 2) for i, phase in
            enumerate(("rollout", "verify", "forward", "policy", "value", "sync"), 1)}  # fmt: skip
    stage.trainer.meters.memory = counters = Counters(plan.values())
    metrics = stage.step()
    expected = {f"memory/{phase}_{name}": number for phase in meters.HOLDING for name, number in plan[phase]._asdict().items()}
    assert {name: x for name, x in metrics.items() if name.startswith("memory/")} == expected
    assert counters.calls == ["begin", "end"] * 6


def test_a_cpu_has_no_memory_metrics_but_their_names():
    metrics = real_stage(make_config(SMALL)).step()
    found = [x for name, x in metrics.items() if name.startswith("memory/")]
    assert len(found) == 15
    assert all(map(math.isnan, found))


def test_of_several_ranks_the_fullest_and_the_slowest_count_and_flops_are_added_up():
    class Two(SingleProcess):
        world, loss_scale = 2, 2.0

        def sum(self, numbers):
            return [x + 100 for x in numbers]

        def max(self, numbers):
            return [max(x, 5.0) for x in numbers]

    model = load_policy(TINY)
    found = Meters([model], Two(), clock="wall", device="cpu", peak=3.0, memory=Counters([Held(1.0, 9.0, 2.0)]))
    with found("policy"):
        model(TokenBatch([[1]], [[2, 3]]))
    metrics = found.metrics()
    flops = flops_of(model).of_batch(TokenBatch([[1]], [[2, 3]]), backward=True) + 100
    assert metrics["flops/policy"] == flops
    assert metrics["mfu/policy"] == pytest.approx(flops / (5.0 * 2 * 3.0))
    assert [metrics[f"memory/policy_{name}"] for name in Held._fields] == [5.0, 9.0, 5.0]


def test_cudas_counters_are_asked_in_order_and_the_driver_is_asked_for_what_is_used(monkeypatch):
    """The calls of torch.cuda, stood in for: peaks are reset as a phase begins, read once the device is done with it."""
    calls = []

    def said(name, answer=None):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: (calls.append(name), answer)[1])

    said("reset_peak_memory_stats")
    said("synchronize")
    said("mem_get_info", (30, 80))
    said("max_memory_allocated", 20)
    said("max_memory_reserved", 25)
    said("get_device_name", "NVIDIA H100 80GB HBM3")
    model = load_policy(TINY)
    found = Meters([model], SingleProcess(), clock="wall", device="cuda:0")
    with found("value"):
        pass
    assert found.held == {"value": Held(20, 25, 50)}
    assert found.peak == 989e12
    assert calls == ["get_device_name", "reset_peak_memory_stats", "synchronize", "mem_get_info", "max_memory_allocated",
                     "max_memory_reserved"]  # fmt: skip


# -------------------------------------------------------------------------------------------------------------------- witnesses


class Diary:
    def __init__(self):
        self.entries = []

    def begin(self, phase):
        self.entries.append([phase, 0])

    def call(self):
        self.entries[-1][1] += 1

    def end(self):
        pass


def test_a_witness_sees_the_phases_with_each_pass_and_decode_step():
    stage = real_stage(make_config(SMALL | {"policy.micro_batch_tokens": 10, "value.micro_batch_tokens": 10}))
    stage.trainer.meters.witness = diary = Diary()
    metrics = stage.step()
    found = dict(map(tuple, diary.entries))
    assert found["rollout"] == metrics["rollout/decode_steps"]
    assert [found[phase] for phase in ("verify", "sync")] == [0, 0]
    assert sum(found[phase] for phase in ("forward", "policy", "value")) == stage.num_forward_passes
    stage.trainer.meters.witness = None
    stage.step()
    assert len(diary.entries) == 6


def test_a_copy_of_a_model_does_not_copy_what_meters_it():
    import copy

    model, parallel = load_policy(TINY), SimpleNamespace(__deepcopy__=None)
    found = Meters([model], parallel, clock="wall", device="cpu")
    copy.deepcopy(model)(TokenBatch([[1]], [[2, 3]]))  # would fail where it took `parallel` along
    assert not found.flops
