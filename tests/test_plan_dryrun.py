"""`sim plan` counts bytes by formula, scale's dry run traces the real modules: two ways to the same bytes per phase."""

from __future__ import annotations

from pathlib import Path

import pytest

from scale import memory
from scale.config import ScaleConfig
from sim.footprint import PHASES, TERMS, Budget, bytes_per_phase, totals
from sim.hardware import Layout, accelerator, model
from tppo_ref.config import parse

CONFIGS = Path(__file__).parents[1] / "scale" / "configs"


@pytest.mark.parametrize(("file", "name"), [("qwen2.5-32b-math", "32B"), ("qwen2.5-7b-math", "7B"), ("qwen2.5-1.5b-math", "1.5B")])
def test_the_plans_bytes_are_within_15_per_cent_of_the_dry_runs_in_every_phase(file, name):
    config = parse(ScaleConfig, ["--config", str(CONFIGS / f"{file}.yaml")], prog="test")
    layout = Layout(
        num_devices=memory.num_ranks(config), tensor_parallel=config.engine.tensor_parallel, sleep_level=config.engine.sleep_level,
        micro_batch_tokens=config.algo.policy.micro_batch_tokens, memory_utilisation=config.engine.gpu_memory_utilization,
        activation_checkpointing=config.sharding.checkpoint_layers,
    )  # fmt: skip
    budget = Budget(sequence_tokens=memory.longest_row(config), offload=config.sharding.offload)
    planned = bytes_per_phase(model(f"Qwen2.5-{name}"), layout, budget, accelerator=accelerator("H100"))
    traced = memory.terms_per_phase(config)
    assert set(planned) == set(PHASES) <= set(traced)
    for phase, num_bytes in totals(planned).items():
        assert num_bytes == pytest.approx(sum(traced[phase].values()), rel=0.15), phase


def test_both_call_the_same_terms_by_the_same_names():
    assert set(TERMS) - {"logits"} <= set(memory.TERMS)
