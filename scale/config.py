"""A run of scale/ as data: tppo_ref's own `Config` as the field `algo`, beside what only a cluster has.

Read by tppo_ref's one parser: `--config FILE --section.field VALUE`, with `--algo.policy.lr 8e-7` for the algorithm's fields.
Marks as there: [S] paper, [P] port, [V] another primary source, [I] inferred, [M] measured by us, [O] our choice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from scale.rewards import GRADE
from scale.vllm_options import check_options
from tppo_ref.loop.bounds import Count, Natural, NotNegative, Positive, Share
from tppo_ref.method.errors import UserError, refusal
from tppo_ref.runs.config import FIXED_ON_RESUME as FIXED_ALGO
from tppo_ref.runs.config import Config, apply_method
from tppo_ref.runs.parsing import field_paths
from tppo_ref.runs.validation import Cancelled, Refusal, check_bounds, refuse, refuse_cancelled
from tppo_ref.runs.validation import check as check_algo
from tppo_ref.runs.validation import check_training as check_training_of_algo


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Who decodes."""

    kind: Literal["vllm", "torch"] = "vllm"
    """vllm, or torch: tppo_ref's TorchEngine, one engine per rank (tests, the bridge to tppo_ref). [O]"""
    tensor_parallel: Count = 1
    """Ranks that share one engine: consecutive ones; must divide the model's heads and the number of ranks. [O]"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights and activations of the engine. [O]"""
    gpu_memory_utilization: Share = 0.85
    """Share of a GPU that vLLM may take while it decodes. [O]"""
    sleep_level: Literal[0, 1, 2] = 2
    """GPU only: what becomes of the engine's weights while the trainer works. 0 stay, 1 to the host, 2 dropped. [O]"""
    block_size: Natural = 0
    """Tokens per KV-cache block; 0 = vLLM's own choice (32 on a CPU, so that short prefixes are cached). [O]"""
    max_batched_tokens: Natural = 0
    """Most tokens that vLLM prefills at once; 0 = its own choice. [O]"""
    admission: Literal["room", "whole"] = "room"
    """vLLM begins what fits now, and preempts when its cache is full; or, whole, what fits at its longest. [O]"""
    vllm: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Further options of vLLM by its own names, as {max_num_seqs: 512}; what a field here says is refused. [O]"""
    probe_prompts: Count = 8
    """Prompts of the start-up probe, which compares engine and trainer log-probabilities. [O]"""
    probe_tokens: Count = 16
    """Tokens sampled from each. [O]"""
    probe_mean: NotNegative = 0.0
    """Refuse to train above this mean gap, in nats; 0 = 1e-4 (float32), unconfirmed 0.03 (bfloat16), 0.15 (fp8 cache). [O]"""
    probe_top_percent: NotNegative = 0.0
    """Refuse above this mean of the largest 1 %, in nats; 0 = 1e-3 (float32), unconfirmed 0.3 (bfloat16), 0.6 (fp8 cache). [O]"""
    gap_warning: NotNegative = 0.0
    """Warn when a step's mean gap passes this; 0 = the probe's mean threshold. [O]"""
    gap_limit: NotNegative = 0.0
    """End the run when a step's mean gap passes this; 0 = the probe's threshold for the top 1 %. [O]"""


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
    context_parallel: Count = 1
    """Ranks that share each row, a divisor of tensor_parallel: each has a part of its tokens, in attention of the heads. [O]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The machines. torchrun says how many ranks there are; these fields say what they are, for the dry run and the launcher."""

    nodes: Count = 1
    """Machines. [O]"""
    devices_per_node: Count = 1
    """Ranks per machine; `python scale/launch.py` without torchrun starts this many. [O]"""
    device_bytes: Positive = 80e9
    """Memory of one device, in bytes: from it dry run and cache are reckoned; a GPU that has less is refused. [O]"""
    timeout_s: Positive = 600.0
    """Longest wait for another rank, in seconds; then the run ends and says which one waited. [O]"""
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

    overlong_buffer: Natural = 0
    """The last so many tokens before the cap cost, linearly, from 0 to overlong_penalty; 0 = none. DAPO: 4,096. [V]"""
    overlong_penalty: NotNegative = 1.0
    """Penalty at the cap. [V]"""
    format_penalty: NotNegative = 0.0
    """Taken from responses in which no answer can be found. [O]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """avg@k and pass@k over the evaluation prompts: algo.run.eval_prompts of them, k = algo.run.eval_samples."""

    every_steps: Natural = 0
    """Training steps between evaluations; 0 = at the start and at the end only. [O]"""
    save_texts: Natural = 8
    """Sample answers written at each evaluation during training, to answers-STEP.jsonl. [O]"""


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


PROBE = {"float32": (1e-4, 1e-3), "bfloat16": (0.03, 0.3), "fp8": (0.15, 0.6)}
"""Mean and top-1 % gap. bfloat16 is unconfirmed until a GPU run, and fp8, of keys and values, is twice what random
weights and a CPU's cast give (docs/fp8.md)."""

FIXED_ON_RESUME = tuple(
    path for path in field_paths(ScaleConfig)
    if path.removeprefix("algo.") in FIXED_ALGO or path in ("engine.kind", "engine.dtype", "sharding.compute_dtype")
    or path.startswith(("data.", "reward."))
)  # fmt: skip
"""What is computed. The rest says where and how long: ranks, groups and machines may change with a restart."""


def thresholds(config: ScaleConfig) -> tuple[float, float]:
    """(mean, top-1 %) gap above which the probe refuses to train."""
    kind = config.engine.dtype if config.sharding.compute_dtype == "float32" else "bfloat16"
    mean, top = PROBE["fp8" if config.algo.rollout.kv_cache == "fp8" else kind]
    return config.engine.probe_mean or mean, config.engine.probe_top_percent or top


def own_base_model(config: ScaleConfig) -> bool:
    """Whether the run starts from the model that a built-in task makes for itself."""
    return not (config.algo.model.policy or config.algo.task.path or config.algo.task.name == "jsonl")


def num_ranks(config: ScaleConfig) -> int:
    """Ranks of the job, as the config has it."""
    return config.cluster.nodes * config.cluster.devices_per_node


def check_ranks(config: ScaleConfig, found: int) -> None:
    """UserError where a job has other ranks than its config: bytes, engines and the share of each were reckoned for those."""
    if found != num_ranks(config):
        nodes, devices = config.cluster.nodes, config.cluster.devices_per_node
        expected = f"cluster.nodes {nodes} x cluster.devices_per_node {devices} = {num_ranks(config)} (torchrun on each node)"
        raise UserError(refusal("cluster", f"{found} ranks", expected, "start as many, or give the numbers that there are, and "
                                "dry-run them"))  # fmt: skip


def graded(config: ScaleConfig) -> bool:
    """Whether the verifier is ours, which alone says that a response has no answer."""
    return config.algo.task.verifier == GRADE or (config.algo.task.verifier is None and bool(config.algo.task.path))


IMPOSSIBLE = (
    Refusal("engine.tensor_parallel", lambda c: num_ranks(c) % c.engine.tensor_parallel != 0,
            "a divisor of the ranks (cluster.nodes {cluster.nodes} x cluster.devices_per_node {cluster.devices_per_node})"),
    Refusal("sharding.context_parallel", lambda c: c.engine.tensor_parallel % c.sharding.context_parallel != 0,
            "a divisor of engine.tensor_parallel ({engine.tensor_parallel}): ranks that share their rows share an engine"),
    Refusal("algo.advantage.cut_value", lambda c: ":" in c.algo.advantage.cut_value,
            "previous, critic or zero: a rule that is a function may look at all rows of a step, and a rank has only its own"),
    Refusal("reward.format_penalty", lambda c: c.reward.format_penalty and not graded(c),
            f"0 with the verifier {{algo.task.verifier}} (None: a built-in one); only {GRADE} sees that an answer is missing",
            "leave algo.task.verifier out, and give algo.task.path"),
    Refusal("algo.run.resume", lambda c: c.cluster.requeued and c.algo.run.resume,
            "false with cluster.requeued true, which goes on only where there is something to go on from", "drop one of them"),
)  # fmt: skip
"""What cannot run, beside tppo_ref's."""

CANCELLED = (
    Cancelled("algo.run.eval_every_s", lambda c: True, "evaluation.every_steps says when a cluster evaluates"),
    Cancelled("algo.model.dtype", lambda c: True, "sharding.compute_dtype and engine.dtype say it on a cluster"),
    Cancelled("algo.model.trust_remote_code", lambda c: True, "a cluster runs no code of a checkpoint's"),
    *(Cancelled(path, lambda c: True, "scale/ compares nothing") for path in field_paths(ScaleConfig) if ".compare." in path),
    *(Cancelled(f"engine.{name}", lambda c: c.engine.kind == "torch", "engine.kind torch is not vLLM")
      for name in ("sleep_level", "block_size", "max_batched_tokens", "admission", "vllm", "probe_prompts", "probe_tokens",
                   "probe_mean", "probe_top_percent")),
    *(Cancelled(path, lambda c: not c.algo.task.path, "there is no file of prompts (algo.task.path)")
      for path in ("algo.task.eval_path", "algo.task.prompt_key", "algo.task.answer_key", "algo.task.chat_template",
                   "data.instruction", "data.over_long")),
    Cancelled("reward.overlong_penalty", lambda c: not c.reward.overlong_buffer,
              "reward.overlong_buffer 0 makes no response overlong"),
)  # fmt: skip
"""Options that another option cancels, or being on a cluster."""


def check(config: ScaleConfig, given: Collection[str] = ()) -> ScaleConfig:
    """The config with its named method applied; UserError for what cannot run, before anything is loaded.

    given   names of the fields that the user gave (`fields_given`), where that is known
    """
    check_bounds(config)
    with named_in("algo."):
        algo = apply_method(config.algo, config.algo.run.method, given={name.removeprefix("algo.") for name in given})
        check_algo(algo)
    config = dataclasses.replace(config, algo=algo)
    refuse(config, IMPOSSIBLE)
    refuse_cancelled(config, CANCELLED)
    check_options(config.engine.vllm)
    return config


def check_deal(config: ScaleConfig, engines: int) -> None:
    """UserError where a step's slots or responses cannot be dealt evenly to that many engines."""
    for name in ("slots", "responses_per_step"):
        if (number := getattr(config.algo.rollout, name)) % engines:
            raise UserError(refusal(f"algo.rollout.{name}", str(number), f"a multiple of the {engines} engines", "give one"))


def check_training(config: ScaleConfig) -> None:
    """Refuse options of training that do nothing."""
    with named_in("algo."):
        check_training_of_algo(config.algo)


@contextmanager
def named_in(section: str) -> Iterator[None]:
    """Refusals of a part of the config, with the field's whole name."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{section}{error}") from None
