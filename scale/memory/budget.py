"""Bytes on one rank in every phase of a step, term by term, for a config: what the dry run prints and judges.

    terms_per_phase(config) -> {phase: {term: bytes on one rank}}
    bytes_per_phase(config) -> {phase: bytes on one rank}
    problems(config)        -> what does not fit, a line each

The training passes are traced (fake_pass.py): real modules, real sharding, every temporary counted. The engine is reckoned: its
weights, its cache and what it reserves are vLLM's, which a laptop cannot ask.

A response is fed whole, its earlier windows included, so that the longest row a pass meets is the longest prompt and the longest
response. That row, or `micro_batch_tokens` where they are more, is what is traced; a smaller window makes no pass smaller. With
`policy.prefix constant` it does: of what stands before the window only keys and values are kept, 2 x layers x key heads x head
width numbers a token. Then a micro-batch of rows in their first window, which have no prefix but the prompt, is traced beside it,
and the larger of the two counts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Collection
from pathlib import Path

from scale.config import ScaleConfig, check_deal, num_ranks
from scale.context import check_heads
from scale.memory.fake_pass import Pass, Shape, terms
from tppo_ref.method.errors import UserError
from tppo_ref.runs.validation import never_cut

PHASES: dict[str, str] = {
    "sync": "weights go to the engine, which has just woken up",
    "rollout": "a window is decoded",
    "probe": "start-up: engine and trainer compare log-probabilities, the engine awake",
    "logprob": "old log-probabilities, no gradients",
    "value_forward": "values, no gradients",
    "policy_update": "the policy's forward and backward pass",
    "value_update": "the value model's",
}
"""Phases, in the order of a step that begins with new weights, and what happens in them."""

TERMS: dict[str, str] = {
    "policy_state": "float32 masters and AdamW's two moments, this rank's shard (12 bytes a parameter)",
    "value_state": "the same of the value model",
    "average_state": "PPO-EWMA's averaged policy, this rank's shard (4 bytes a parameter)",
    "gradients": "float32 shards of the gradients of the model under update; freed with the update",
    "gathered_weights": "parameters gathered for computing, and the next layer's on their way",
    "gathered_gradients": "gradients on their way to the shards",
    "activations": "inputs saved for the backward pass, temporaries, a chunk of logits",
    "batch": "the step's tensors of this rank: masks, log-probabilities, values, advantages (an allowance)",
    "engine_weights": "the engine's copy of the policy, split over its ranks",
    "engine_reserve": "the engine's activations, graphs and buffers (an allowance)",
    "engine_asleep": "what a sleeping vLLM keeps: context, graphs, workspace (an allowance)",
    "kv_cache": "what is left of engine.gpu_memory_utilization; the engine is given exactly this (kv_cache_memory_bytes)",
    "sync_buffer": "the largest tensor, whole in the engine's type, and its place in the engine",
    "runtime": "driver context, communication buffers, fragmentation (an allowance)",
}
"""Keys of `terms_per_phase(config)[phase]`, and what they count."""

RUNTIME_BYTES = 2e9  # [I]
ENGINE_RESERVE_BYTES = 4e9  # [I] inside the engine's share
ENGINE_ASLEEP_BYTES = 3.5e9  # [I] 3 to 4 GB, read in vLLM's source: graphs and NCCL buffers lie outside of its sleeping pool
BATCH_BYTES_PER_CELL = 64  # [I] some ten float32 and six bool tensors [rows, response tokens], and EGAE's temporaries
BLOCK_TOKENS = 32  # vLLM's own choice is 16 on a GPU, 32 here on a CPU: the larger rounds up more
CPU_KV_BYTES = 2.0**30  # a cache of vLLM's on a CPU
SHIPPED = Path(__file__).parents[1] / "configs" / "models"


# ----------------------------------------------------------------------------------------------------------------------- bytes


def bytes_per_phase(config: ScaleConfig) -> dict[str, float]:
    """Phase -> bytes on one rank."""
    return {phase: sum(found.values()) for phase, found in terms_per_phase(config).items()}


def terms_per_phase(config: ScaleConfig, only: Collection[str] = tuple(PHASES)) -> dict[str, dict[str, float]]:
    """Phase -> term -> bytes on one rank; keys of PHASES and TERMS. UserError for a model that is not here or cannot be cut.

    only   phases wanted: each pass that is not asked for saves a trace

    The engine's weights and cache are gone while the trainer works, unless engine.sleep_level is 0 or the device a CPU; what a
    sleeping engine keeps (graphs, workspace) is an allowance until a GPU run has said more.
    """
    policy, value = shapes(config)
    check_cuts(config, policy)
    states, engine, cache = resident(config), engine_terms(config, policy), kv_cache_bytes(config, policy)
    decoding = engine | {"kv_cache": max(cache, 0.0)}
    awake = stays_awake(config)
    staying = decoding if awake else {}
    beside = decoding if awake else {"engine_asleep": ENGINE_ASLEEP_BYTES}  # the training passes
    size = number_bytes(config.engine.dtype)
    largest = max(math.prod(tensor) for tensor in policy.tensors)
    split = engine_split(config)
    phases: dict[str, dict[str, float]] = {
        "sync": states | engine | staying | {"sync_buffer": largest * (size + size / split)},
        "rollout": states | decoding,
    }
    if "probe" in only and config.engine.kind == "vllm":
        phases["probe"] = states | decoding | working(config, policy, "probe")
    for phase in ("logprob", "value_forward", "policy_update", "value_update"):
        if phase in only and not (phase.startswith("value") and config.algo.advantage.critic_free):
            shape = value if phase.startswith("value") else policy
            phases[phase] = states | beside | {"batch": batch_bytes(config)} | working(config, shape, phase)
    return {phase: {"runtime": RUNTIME_BYTES} | found for phase, found in phases.items() if phase in only}


def resident(config: ScaleConfig) -> dict[str, float]:
    """What the trainer holds in every phase. With offload, nothing; without a value model, nothing of one."""
    if config.sharding.offload:
        return {}
    policy, value = (shard_bytes(config, shape, value) for shape, value in zip(shapes(config), (False, True), strict=True))
    found = {"policy_state": 3 * policy} | ({} if config.algo.advantage.critic_free else {"value_state": 3 * value})
    return found | ({"average_state": policy} if config.algo.policy.ewma_decay else {})


def shard_bytes(config: ScaleConfig, shape: Shape, value: bool) -> float:
    """A model's float32 masters on one rank."""
    return terms(shape, passing(config, "value_update" if value else "policy_update"))["shards"]


def working(config: ScaleConfig, shape: Shape, phase: str) -> dict[str, float]:
    """What the largest pass adds to the states: gathered weights, gradients (offloaded ones are on the host), activations."""
    left_out = ("shards", "gradients") if config.sharding.offload else ("shards",)
    found = max((terms(shape, each) for each in passes(config, phase)), key=lambda terms: sum(terms.values()))
    return {name: num_bytes for name, num_bytes in found.items() if name not in left_out}


def passes(config: ScaleConfig, phase: str) -> list[Pass]:
    """Passes of a phase of which one is the largest: of the longest rows, and of rows in their first window where these have more
    tokens that are differentiated through."""
    longest = passing(config, phase)
    if longest.live is None:
        return [longest]
    rows = fed_rows(config.algo.task.max_prompt_tokens, longest.live, micro_batch_tokens(config, phase))
    return [longest, dataclasses.replace(longest, rows=rows)]


def passing(config: ScaleConfig, phase: str) -> Pass:
    """The pass over a phase's longest rows."""
    algo, value = config.algo, phase.startswith("value")
    if phase == "probe":
        rows = ((algo.task.max_prompt_tokens, config.engine.probe_tokens),) * config.engine.probe_prompts
    else:
        rows = fed_rows(algo.task.max_prompt_tokens, algo.rollout.max_response_tokens, micro_batch_tokens(config, phase))
    sharding = dataclasses.replace(config.sharding, offload=False)  # traced the same, and then left out
    return Pass(value=value, train=phase.endswith("update"), rows=rows, world=num_ranks(config), sharding=sharding,
                logit_chunk_tokens=0 if value else algo.model.logit_chunk_tokens, live=live_tokens(config, phase))  # fmt: skip


def micro_batch_tokens(config: ScaleConfig, phase: str) -> int:
    """Tokens fed per pass; a joint value update is made in the policy's micro-batches."""
    algo = config.algo
    own = phase == "value_update" and algo.value.update == "independent"
    return algo.value.micro_batch_tokens if own else algo.policy.micro_batch_tokens


def live_tokens(config: ScaleConfig, phase: str) -> int | None:
    """Most response tokens of a row with a gradient, where its prefix is constant: a window's, those that wait for
    policy.min_new_tokens, a deferred tail; whole responses where none is cut. None: the phase's prefix is not constant."""
    algo = config.algo
    constant = algo.policy.prefix == "constant"
    if not constant or not (phase in ("logprob", "policy_update") or (phase == "value_update" and algo.value.update == "joint")):
        return None
    waiting = max(0, algo.policy.min_new_tokens - 1) + (algo.advantage.tail_tokens if algo.advantage.tail == "defer" else 0)
    whole = never_cut(algo)
    return algo.rollout.max_response_tokens if whole else min(algo.rollout.max_response_tokens, algo.rollout.window + waiting)


def fed_rows(prompt: int, response: int, budget: int) -> tuple[tuple[int, int], ...]:
    """Rows of a full micro-batch: as many of the longest as `budget` tokens hold, at least one, and one of what is left."""
    whole, left = divmod(budget, prompt + response)
    rows = ((prompt, response),) * max(1, whole)
    short = min(prompt, left // 2)
    return rows + (((short, left - short),) if whole and left >= 2 else ())


def batch_bytes(config: ScaleConfig) -> float:
    rollout = config.algo.rollout
    rows = math.ceil(rollout.slots * config.sharding.context_parallel / num_ranks(config))  # each rank has all of its group's
    return rows * rollout.max_response_tokens * BATCH_BYTES_PER_CELL


def engine_terms(config: ScaleConfig, shape: Shape) -> dict[str, float]:
    weights = shape.num_parameters * number_bytes(config.engine.dtype) / engine_split(config)
    return {"engine_weights": weights} | ({} if on_cpu(config) else {"engine_reserve": ENGINE_RESERVE_BYTES})


def kv_cache_bytes(config: ScaleConfig, shape: Shape) -> float:
    """Keys' and values' room on one rank, which is also what the engine is given (`build_engine`); negative where the engine's
    weights and reserve take more than its share.
    """
    if config.engine.kind == "torch":
        return config.algo.rollout.slots / num_engines(config) * longest_row(config) * kv_bytes_per_token(config, shape)
    if on_cpu(config):
        return CPU_KV_BYTES
    return config.engine.gpu_memory_utilization * config.cluster.device_bytes - sum(engine_terms(config, shape).values())


def kv_bytes_per_token(config: ScaleConfig, shape: Shape) -> float:
    """On one rank; key heads that are fewer than the ranks of an engine are copied."""
    share = max(1 / engine_split(config), 1 / shape.num_kv_heads)
    fp8 = config.algo.rollout.kv_cache == "fp8" and config.engine.kind == "vllm"  # TorchEngine rounds, in memory of its own type
    size = 1 if fp8 else number_bytes(config.engine.dtype)
    return shape.kv_numbers_per_token * size * share


def kv_tokens(config: ScaleConfig, shape: Shape) -> int:
    """Tokens that the cache of one engine holds."""
    return max(0, math.floor(kv_cache_bytes(config, shape) / kv_bytes_per_token(config, shape)))


def whole_sequences(config: ScaleConfig) -> int:
    """Sequences that the cache of one engine holds at their longest, in whole blocks; no more than its slots, and at least one.

    With so many at a time (`engine.admission` whole) vLLM never preempts.
    """
    block = config.engine.block_size or BLOCK_TOKENS
    longest = -(-(longest_row(config) + 1) // block) * block
    fitting = kv_tokens(config, shapes(config)[0]) // longest
    return max(1, min(config.algo.rollout.slots // num_engines(config), fitting))


def host_bytes(config: ScaleConfig) -> float:
    """Of one machine: a checkpoint while it is written (copies of all states), with offload the states themselves, and the engines'
    weights where they sleep there (engine.sleep_level 1)."""
    here = dataclasses.replace(config, sharding=dataclasses.replace(config.sharding, offload=False))
    copies = sum(resident(here).values())
    gradients = max(shard_bytes(here, shape, name != "policy") for name, shape in trained_shapes(here).items())
    offloaded = copies + gradients if config.sharding.offload else 0.0
    asleep = engine_terms(config, shapes(config)[0])["engine_weights"] if sleeps_on_the_host(config) else 0.0
    return config.cluster.devices_per_node * (copies + offloaded + asleep)


def num_engines(config: ScaleConfig) -> int:
    return num_ranks(config) // config.engine.tensor_parallel


def engine_split(config: ScaleConfig) -> int:
    """Ranks among which an engine's weights are dealt: vLLM's. Those of engine.kind torch have whole ones."""
    return config.engine.tensor_parallel if config.engine.kind == "vllm" else 1


def longest_row(config: ScaleConfig) -> int:
    return config.algo.task.max_prompt_tokens + config.algo.rollout.max_response_tokens


def on_cpu(config: ScaleConfig) -> bool:
    return config.algo.model.device == "cpu"


def stays_awake(config: ScaleConfig) -> bool:
    return config.engine.kind == "torch" or on_cpu(config) or config.engine.sleep_level == 0


def sleeps_on_the_host(config: ScaleConfig) -> bool:
    """Whether a sleeping engine keeps its weights in host memory, from where the next sync wakes them."""
    return config.engine.sleep_level == 1 and not stays_awake(config)


def number_bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


# ---------------------------------------------------------------------------------------------------------------------- models


def shapes(config: ScaleConfig) -> tuple[Shape, Shape]:
    """Policy's and value model's; a value model that is not here has the policy's."""
    policy = config_file(config.algo.model.policy)
    try:
        value = config_file(config.algo.model.value or config.algo.model.policy)
    except UserError:
        value = policy
    return read_shape(policy), read_shape(value)


def trained_shapes(config: ScaleConfig) -> dict[str, Shape]:
    """Of the models that there are, by what people call them."""
    policy, value = shapes(config)
    return {"policy": policy} | ({} if config.algo.advantage.critic_free else {"value model": value})


@functools.lru_cache(maxsize=8)
def read_shape(file: Path) -> Shape:
    return Shape(file)


def config_file(source: str | None) -> Path:
    """The config.json of a model's folder; of a folder that is not here, the one that scale/configs/models has under its name."""
    if not source:
        raise UserError("algo.model.policy: got none; expected a model's folder or a config.json; give one")
    path = Path(source)
    shipped = SHIPPED / f"{path.name.lower()}.json"
    for file in (path if path.suffix == ".json" else path / "config.json", shipped):
        if file.is_file():
            return file
    known = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.json")))
    raise UserError(
        f"algo.model.policy: got {source}, which is not here; expected one that a dry run knows, {known}; give its config.json"
    )


def check_cuts(config: ScaleConfig, shape: Shape) -> None:
    """UserError where ranks, heads or slots cannot be dealt out evenly. shape: the policy's."""
    split, sharing = config.engine.tensor_parallel, config.sharding.context_parallel
    if sharing > 1:
        for model, its in trained_shapes(config).items():
            check_heads("sharding.context_parallel", model, its.num_heads, its.num_kv_heads, sharing)
    check_heads("engine.tensor_parallel", "policy", shape.num_heads, shape.num_kv_heads, split)
    if split > config.cluster.devices_per_node:
        raise UserError(f"engine.tensor_parallel: got {split}; expected at most cluster.devices_per_node "
                        f"({config.cluster.devices_per_node}), as an engine stays on a machine")  # fmt: skip
    check_deal(config, num_engines(config))


# --------------------------------------------------------------------------------------------------------------------- verdict


def problems(config: ScaleConfig) -> list[str]:
    """What does not fit, a line each."""
    device, (policy, _) = config.cluster.device_bytes, shapes(config)
    found = [f"{phase} needs {num_bytes / 1e9:.1f} GB, cluster.device_bytes is {device / 1e9:.1f} GB"
             for phase, num_bytes in bytes_per_phase(config).items() if num_bytes > device]  # fmt: skip
    if (held := kv_tokens(config, policy)) < longest_row(config):
        found.append(f"the engine's cache holds {held:,} tokens, expected at least one sequence of {longest_row(config):,}")
    for model, shape in trained_shapes(config).items():
        if longest_row(config) > shape.max_positions:
            found.append(f"algo.rollout.max_response_tokens: prompt and response of {longest_row(config):,} tokens, the {model} "
                         f"was made for {shape.max_positions:,} positions")  # fmt: skip
    return found
