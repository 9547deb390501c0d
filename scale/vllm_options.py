"""vLLM's own options, passed through by name: which there are, and which are spoken for.

    engine:
      vllm: {max_num_seqs: 512, enforce_eager: true, disable_custom_all_reduce: true}

Names are vLLM's (`vllm.engine.arg_utils.EngineArgs`), and so is the check of their values. A name is refused where a field of the
config says the same, or where a promise would not survive it: same seeds, same tokens, and log-probabilities of exactly the
distribution that the trainer computes.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tppo_ref.method.errors import UserError, nearest, refusal

FIELD = "engine.vllm"

SPOKEN_FOR = {
    "model": "algo.model.policy", "model_weights": "algo.model.policy", "hf_config_path": "algo.model.policy",
    "dtype": "engine.dtype", "seed": "algo.run.seed",
    "max_model_len": "algo.rollout.max_response_tokens and algo.task.max_prompt_tokens",
    "tensor_parallel_size": "engine.tensor_parallel", "gpu_memory_utilization": "engine.gpu_memory_utilization",
    "kv_cache_memory_bytes": "engine.gpu_memory_utilization and cluster.device_bytes",
    "kv_cache_dtype": "algo.rollout.kv_cache",
    "block_size": "engine.block_size", "max_num_batched_tokens": "engine.max_batched_tokens",
    "enable_sleep_mode": "engine.sleep_level",
}  # fmt: skip
"""vLLM's name -> the field that says it here."""

CONTRADICTS = {
    "distributed_executor_backend": "the ranks are torchrun's (external_launcher)",
    **dict.fromkeys(("pipeline_parallel_size", "data_parallel_size", "prefill_context_parallel_size",
                     "decode_context_parallel_size"), "ranks are cut into tensor-parallel groups only"),
    **dict.fromkeys(("tokenizer", "skip_tokenizer_init"), "tokens travel as numbers"),
    "load_format": "weights come from the trainer", "trust_remote_code": "a cluster runs no code of a checkpoint's",
    **dict.fromkeys(("generation_config", "override_generation_config", "logits_processors", "logprobs_mode"),
                    "the trainer computes log-probabilities of the distribution that algo.rollout describes, and of no other"),
    **dict.fromkeys(("speculative_config", "spec_method", "spec_model", "spec_tokens"),
                    "a token's random number depends on its place in the response alone"),
    **dict.fromkeys(("kv_transfer_config", "kv_offloading_size"),
                    "a sync drops every cached prefix, and not a connector's, which also frees blocks late"),
    "enable_batch_sharded_sampling": "ranks would sample for each other, and nothing keeps a request in one slot on all of them",
    "max_logprobs": "one log-probability a token is asked for",
    "quantization": "each sync brings whole weights, in engine.dtype",
    **dict.fromkeys(("worker_cls", "worker_extension_cls", "scheduler_cls"), "a config runs no code"),
}  # fmt: skip
"""vLLM's name -> what it would break."""


def check_options(options: Mapping[str, Any], known: frozenset[str] | None = None) -> None:
    """UserError for an option that vLLM does not have (where vLLM is installed), that is said elsewhere, or that breaks a promise.

    known   vLLM's names; None: those of the vLLM that is installed
    """
    known = option_names() if known is None else known
    for name, value in options.items():
        whole = f"{FIELD}.{name}"
        if name in SPOKEN_FOR:
            raise UserError(refusal(whole, repr(value), "it left out", f"give {SPOKEN_FOR[name]}"))
        if name in CONTRADICTS:
            raise UserError(refusal(whole, repr(value), f"it left out: {CONTRADICTS[name]}", "drop it"))
        if known and name not in known:
            raise UserError(refusal(whole, repr(value), "an option of vLLM's EngineArgs") + nearest(name, known))
    overrides = options.get("hf_overrides", {})
    if not isinstance(overrides, Mapping):
        raise UserError(refusal(f"{FIELD}.hf_overrides", repr(overrides), "names and values of the model's config"))
    if "head_dtype" in overrides:
        remedy = "drop it: the output head is float32 on both sides"
        raise UserError(refusal(f"{FIELD}.hf_overrides", repr(overrides), "no head_dtype in it", remedy))


def with_float32_head(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, and logits in float32, as the trainer's (`tppo_ref.rollout.models.Float32Head`)."""
    return {**options, "hf_overrides": {**options.get("hf_overrides", {}), "head_dtype": "float32"}}


def option_names() -> frozenset[str]:
    """Fields of the installed vLLM's EngineArgs, read without importing it, which takes ten seconds; none where it is not there."""
    found = importlib.util.find_spec("vllm")
    file = Path(found.origin).parent / "engine" / "arg_utils.py" if found and found.origin else None
    if file is None or not file.is_file():
        return frozenset()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef) and node.name == "EngineArgs":
            return frozenset(n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name))
    return frozenset()
