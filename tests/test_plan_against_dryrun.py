"""sim's plan and scale's dry run know nothing of each other: formulas against traced passes, for every config that is shipped."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from scale.config import ScaleConfig, check
from scale.memory import budget as memory
from sim.clock.fitting import kv_capacity
from sim.clock.footprint import UNSEEN, Budget, bytes_per_phase, totals
from sim.clock.hardware import Accelerator, Layout, ModelShape, Roofline, accelerator, model
from tppo_ref.runs.parsing import parse, replace_fields

CONFIGS = Path(__file__).resolve().parents[1] / "scale" / "configs"
AGREEMENT = 0.15
DRY_RUN_ALONE = {"batch", "average_state", "engine_asleep"}
"""Terms that the plan does not have (UNSEEN["plan"]: the batch itself; what a sleeping engine keeps, an allowance that is left out of
the sums below; PPO-EWMA's average, off in every config)."""


def setting(config: ScaleConfig) -> tuple[ModelShape, Layout, Budget, Accelerator]:
    """What the config says, in the plan's words."""
    shape = model(Path(config.algo.model.policy or "").name)
    layout = Layout(
        num_devices=memory.num_ranks(config), tensor_parallel=config.engine.tensor_parallel,
        devices_per_node=config.cluster.devices_per_node, micro_batch_tokens=config.algo.policy.micro_batch_tokens,
        memory_utilisation=config.engine.gpu_memory_utilization, sleep_level=config.engine.sleep_level,
        activation_checkpointing=config.sharding.checkpoint_layers, fp8_kv_cache=config.algo.rollout.kv_cache == "fp8",
    )  # fmt: skip
    probed = config.engine.probe_prompts * (config.algo.task.max_prompt_tokens + config.engine.probe_tokens)
    budget = Budget(sequence_tokens=memory.longest_row(config), logit_chunk_tokens=2**27 // shape.vocab_size, probe_tokens=probed)
    device = dataclasses.replace(accelerator("H800"), memory_bytes=config.cluster.device_bytes)
    return shape, layout, budget, device


def planned(config: ScaleConfig) -> dict[str, dict[str, float]]:
    """The plan's bytes for what the config says."""
    shape, layout, budget, device = setting(config)
    return bytes_per_phase(shape, layout, budget, accelerator=device)


@pytest.mark.parametrize("name", ["qwen2.5-1.5b-math", "qwen2.5-7b-math", "qwen2.5-32b-math", "qwen2.5-32b-port"])
def test_plan_and_dry_run_agree_on_every_phase(name, capsys):
    config = check(parse(ScaleConfig, ["--config", str(CONFIGS / f"{name}.yaml")], prog="test"))
    plan, dry = planned(config), memory.terms_per_phase(config)
    assert set(dry) == set(plan)
    assert max(sum(terms.values()) for terms in dry.values()) <= config.cluster.device_bytes
    sums = totals(plan)
    with capsys.disabled():
        print(f"\n{name}, GB: " + ", ".join(f"{p} plan {sums[p] / 1e9:.1f} dry run {sum(dry[p].values()) / 1e9:.1f}" for p in plan))
        print(
            f"  the plan does not see: {', '.join(UNSEEN['plan'])}; the dry run reckons, and does not trace: {', '.join(UNSEEN['dry_run'])}"
        )
    for phase, terms in plan.items():
        seen = sum(num_bytes for term, num_bytes in dry[phase].items() if term != "engine_asleep")
        assert sums[phase] == pytest.approx(seen, rel=AGREEMENT), phase
        assert set(dry[phase]) - set(terms) <= DRY_RUN_ALONE, phase


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_both_sides_give_the_engine_as_many_tokens_of_cache_to_a_thousandth(cache):
    config = check(parse(ScaleConfig, ["--config", str(CONFIGS / "qwen2.5-32b-math.yaml")], prog="test"))
    config = replace_fields(config, {"algo.rollout.kv_cache": cache})
    shape, layout, _, device = setting(config)
    assert kv_capacity(shape, layout, device) == pytest.approx(memory.kv_tokens(config, memory.shapes(config)[0]), rel=1e-3)
    costs = Roofline(accelerator=device, model=shape, layout=layout)
    assert costs.kv_capacity_tokens == kv_capacity(shape, layout, device)
    plain = Roofline(accelerator=device, model=shape, layout=dataclasses.replace(layout, fp8_kv_cache=False))
    assert plain.kv_bytes_per_token == (2 if cache == "fp8" else 1) * costs.kv_bytes_per_token
    long = 400, 400 * 20_000  # sequences, tokens read: the cache's traffic is most of the step
    if cache == "fp8":
        assert 0.5 < float(costs.decode_step_s(*long)) / float(plain.decode_step_s(*long)) < 0.8


def test_allowances_are_the_same_on_both_sides():
    layout, budget = Layout(num_devices=1, devices_per_node=1), Budget(sequence_tokens=1)
    assert layout.engine_reserve_bytes == memory.ENGINE_RESERVE_BYTES
    assert budget.runtime_bytes == memory.RUNTIME_BYTES
