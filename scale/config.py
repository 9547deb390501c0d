"""A run of scale/ as data: tppo_ref's own `Config` as the field `algo`, beside what only a cluster has.

Read by tppo_ref's one parser: `--config FILE --section.field VALUE`, with `--algo.policy.lr 8e-7` for the algorithm's fields.
Marks as there: [S] paper, [P] port, [V] another primary source, [I] inferred, [M] measured by us, [O] our choice.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from scale.rewards import GRADE
from tppo_ref.method.errors import UserError
from tppo_ref.runs.config import FIXED_ON_RESUME as FIXED_ALGO
from tppo_ref.runs.config import Config, apply_method
from tppo_ref.runs.parsing import field_paths, get_field
from tppo_ref.runs.validation import check as check_algo


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Who decodes."""

    kind: Literal["vllm", "torch"] = "vllm"
    """vllm, or torch: tppo_ref's TorchEngine, one engine per rank (tests, the bridge to tppo_ref). [O]"""
    tensor_parallel: int = 1
    """Ranks that share one engine: consecutive ones; must divide the model's heads and the number of ranks. [O]"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights and activations of the engine. [O]"""
    gpu_memory_utilization: float = 0.85
    """Share of a GPU that vLLM may take while it decodes. [O]"""
    sleep_level: Literal[0, 1, 2] = 2
    """GPU only: what becomes of the engine's weights while the trainer works. 0 stay, 1 to the host, 2 dropped. [O]"""
    block_size: int = 0
    """Tokens per KV-cache block; 0 = vLLM's own choice (32 on a CPU, so that short prefixes are cached). [O]"""
    max_batched_tokens: int = 0
    """Most tokens that vLLM prefills at once; 0 = its own choice. [O]"""
    probe_prompts: int = 8
    """Prompts of the start-up probe, which compares engine and trainer log-probabilities. [O]"""
    probe_tokens: int = 16
    """Tokens sampled from each. [O]"""
    probe_mean: float = 0.0
    """Refuse to train above this mean gap; 0 = by dtype: 1e-4 in float32, 0.03 in bfloat16 (unconfirmed until a GPU run). [O]"""
    probe_top_percent: float = 0.0
    """Refuse above this mean of the largest 1 % of gaps; 0 = by dtype: 1e-3 in float32, 0.3 in bfloat16 (unconfirmed). [O]"""
    gap_warning: float = 0.0
    """Warn when a step's mean gap passes this; 0 = the probe's mean threshold. [O]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardingConfig:
    """FSDP2 for policy and value model."""

    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Parameters as gathered for forward and backward; the masters and the reduction of gradients are float32. [P]"""
    checkpoint_layers: bool = True
    """Recompute each layer's activations in the backward pass. [O]"""
    offload: bool = False
    """Keep shards, gradients and optimiser states in host memory. [O]"""
    reshard_after_forward: bool = True
    """Free a layer's gathered parameters after its forward pass, and gather them again for the backward. [O]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The machines. torchrun says how many ranks there are; these fields say what they are, for the dry run and the launcher."""

    nodes: int = 1
    """Machines. [O]"""
    devices_per_node: int = 1
    """Ranks per machine; `python scale/launch.py` without torchrun starts this many. [O]"""
    device_bytes: float = 80e9
    """Memory of one device, in bytes, for the dry run's verdict. [O]"""
    timeout_s: float = 600.0
    """Longest wait for another rank, in seconds; then the run ends and says who was missing. [O]"""
    requeued: bool = False
    """A scheduler started this job again: go on from the newest checkpoint where there is one, else start anew. [O]"""
    plan_file: str = ""
    """Dry run: file that `python -m sim plan --json` wrote, for the step's seconds. [O]"""
    dry_run_json: str = ""
    """Dry run: write its table to this file too. [O]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts beyond what `algo.task` says (path, eval_path, tokenizer, keys, chat template, max_prompt_tokens, verifier).

    `algo.task.path` and `eval_path` take a .jsonl or .parquet file, or the id of a data set on the Hub.
    """

    instruction: str = ""
    """Text put behind each prompt, such as where to write the answer. [O]"""
    over_long: Literal["skip", "error"] = "skip"
    """What becomes of a prompt above algo.task.max_prompt_tokens: left out and counted, or an error. [O]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Shaping of the score in training; evaluation counts the verifier's own. `algo.task.verifier` names the verifier."""

    overlong_buffer: int = 0
    """The last so many tokens before the cap cost, linearly, from 0 to overlong_penalty; 0 = none. DAPO: 4,096. [V]"""
    overlong_penalty: float = 1.0
    """Penalty at the cap. [V]"""
    format_penalty: float = 0.0
    """Taken from responses in which no answer can be found. [O]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """avg@k and pass@k over the evaluation prompts: algo.run.eval_prompts of them, k = algo.run.eval_samples."""

    every_steps: int = 0
    """Training steps between evaluations; 0 = at the start and at the end only. [O]"""
    save_texts: int = 8
    """Sample answers written beside the metrics at each evaluation. [O]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaleConfig:
    """One run of scale/."""

    algo: Config = dataclasses.field(default_factory=Config)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    sharding: ShardingConfig = dataclasses.field(default_factory=ShardingConfig)
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    reward: RewardConfig = dataclasses.field(default_factory=RewardConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)


PROBE = {"float32": (1e-4, 1e-3), "bfloat16": (0.03, 0.3)}  # mean and top-1 % gap; bfloat16 is unconfirmed until a GPU run

FIXED_ON_RESUME = tuple(
    path for path in field_paths(ScaleConfig)
    if path.removeprefix("algo.") in FIXED_ALGO or path in ("engine.kind", "engine.dtype", "sharding.compute_dtype")
    or path.startswith(("data.", "reward."))
)  # fmt: skip
"""What is computed. The rest says where and how long: ranks, groups and machines may change with a restart."""


def thresholds(config: ScaleConfig) -> tuple[float, float]:
    """(mean, top-1 %) gap above which the probe refuses to train."""
    mean, top = PROBE[config.engine.dtype if config.sharding.compute_dtype == "float32" else "bfloat16"]
    return config.engine.probe_mean or mean, config.engine.probe_top_percent or top


def own_base_model(config: ScaleConfig) -> bool:
    """Whether the run starts from the model that a built-in task makes for itself."""
    return not (config.algo.model.policy or config.algo.task.path or config.algo.task.name == "jsonl")


def check(config: ScaleConfig) -> ScaleConfig:
    """The config with its named method applied; UserError for what cannot run, before anything is loaded."""
    algo = apply_method(config.algo, config.algo.run.method, strict=False)
    check_algo(algo)
    for section, names in (("engine", ("tensor_parallel",)), ("cluster", ("nodes", "devices_per_node"))):
        for name in names:
            if getattr(getattr(config, section), name) < 1:
                raise UserError(f"{section}.{name}: expected at least 1, got {getattr(getattr(config, section), name)}")
    ranks = config.cluster.nodes * config.cluster.devices_per_node
    if ranks % config.engine.tensor_parallel:
        raise UserError(f"engine.tensor_parallel: {ranks} ranks cannot be cut into groups of {config.engine.tensor_parallel}")
    for path, unit in (("cluster.timeout_s", "seconds"), ("cluster.device_bytes", "bytes")):
        if not 0 < get_field(config, path) < math.inf:
            raise UserError(f"{path}: expected a positive number of {unit}, got {get_field(config, path)}")
    if not 0 < config.engine.gpu_memory_utilization <= 1:
        raise UserError(
            f"engine.gpu_memory_utilization: expected a share above 0, up to 1, got {config.engine.gpu_memory_utilization}"
        )
    verifier = algo.task.verifier or (GRADE if algo.task.path else "the built-in task's own")
    if config.reward.format_penalty and verifier != GRADE:
        raise UserError(f"reward.format_penalty: only {GRADE} can tell that a response has no answer, the verifier is {verifier}; "
                        f"give 0, or leave algo.task.verifier out")  # fmt: skip
    return dataclasses.replace(config, algo=algo)
