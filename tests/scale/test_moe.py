"""A mixture of experts (Qwen3-MoE): sharded on two ranks, from files that hold each expert's tensors by themselves."""

from __future__ import annotations

import json
import sys

import pytest
from safetensors import safe_open
from scale_helpers import HERE, run_ranks

from scale.build import build_engine
from scale.config import ScaleConfig
from scale.distributed import World
from tppo_ref.method.errors import UserError
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.tasks import load_task

EXPERTS = 4


def make_moe(folder):
    """A random tiny Qwen3-MoE. vLLM's CPU kernels want widths of 32 and more."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    shape = Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, moe_intermediate_size=64, num_experts=EXPERTS, num_experts_per_tok=2,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=512, eos_token_id=1,
        initializer_range=0.1, norm_topk_prob=True,
    )  # fmt: skip
    Qwen3MoeForCausalLM(shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return make_moe(tmp_path_factory.mktemp("moe") / "model")


@pytest.fixture(scope="module")
def found(moe):
    run_ranks(HERE / "moe_worker.py", 2, [str(moe), str(moe.parent)])
    return json.loads((moe.parent / "found.json").read_text())


@pytest.mark.parametrize("kind", ["policy", "value"])
def test_each_rank_reads_its_own_experts_and_all_of_them_are_gathered_for_the_engine(moe, found, kind):
    with safe_open(moe / "model.safetensors", "pt") as tensors:
        assert "model.layers.0.mlp.experts.3.up_proj.weight" in tensors.keys()  # noqa: SIM118
    assert found[kind] == {"names": True, "unlike": [], "experts": [[EXPERTS, 128, 64], [EXPERTS, 64, 64]] * 2}


def test_vllm_on_a_cpu_is_refused_in_one_line_before_it_is_started(moe):
    config = replace_fields(ScaleConfig(), {"algo.model.policy": str(moe), "engine.kind": "vllm"})
    with pytest.raises(UserError, match=r"^engine\.kind: got vllm for .*, a mixture of experts; expected torch .*; give that$"):
        build_engine(config, World(device="cpu"), load_task("chain"))
    assert "vllm" not in sys.modules


def test_outputs_and_gradients_on_two_ranks_are_one_ranks(found):
    assert found["outputs"] < 1e-5
    assert found["gradients"] < 1e-4
