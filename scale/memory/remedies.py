"""What would make a run fit, and how long a response may be: the dry run's table asked again with other fields."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm

from scale.config import ScaleConfig
from scale.memory.budget import (  # fmt: skip
    bytes_per_phase,
    check_cuts,
    engine_terms,
    kv_bytes_per_token,
    longest_row,
    on_cpu,
    problems,
    shapes,
    stays_awake,
    terms_per_phase,
)
from tppo_ref.method.errors import UserError
from tppo_ref.runs.parsing import replace_fields


@dataclasses.dataclass(frozen=True)
class Change:
    """Fields to change, and the largest phase's bytes then."""

    fields: dict[str, Any]
    peak_bytes: float

    @property
    def text(self) -> str:
        return " and ".join(f"--{name} {str(value).lower()}" for name, value in self.fields.items())


def changes(config: ScaleConfig) -> list[Change]:
    """Changes that make it fit: of one kind each, else of two, else more machines. The engine's share follows where it must."""
    kinds = list(_kinds(config))
    for number in (0, 1, 2):
        ways = list(itertools.combinations(kinds, number))
        found = [change for some in tqdm(ways, "what would make it fit", unit="way", delay=1.0, leave=False, disable=None)
                 if (change := _tried(config, {k: v for kind in some for k, v in kind.items()}))]  # fmt: skip
        if found:
            return found
    more = ({"cluster.nodes": config.cluster.nodes * factor} for factor in (2, 4, 8))
    return [change for fields in more if (change := _tried(config, fields))][:1]


def _kinds(config: ScaleConfig) -> Iterator[dict[str, Any]]:
    sharding, engine, row = config.sharding, config.engine, longest_row(config)
    models = ("policy",) if config.algo.advantage.critic_free else ("policy", "value")
    if max(getattr(config.algo, name).micro_batch_tokens for name in models) > row:
        yield {f"algo.{name}.micro_batch_tokens": row for name in models}
    if not sharding.checkpoint_layers:
        yield {"sharding.checkpoint_layers": True}
    if not sharding.reshard_after_forward:
        yield {"sharding.reshard_after_forward": True}
    if sharding.compute_dtype == "float32" and not on_cpu(config):
        yield {"sharding.compute_dtype": "bfloat16", "engine.dtype": "bfloat16"}
    if stays_awake(config) and not on_cpu(config) and engine.kind == "vllm":
        yield {"engine.sleep_level": 2}
    if not sharding.offload and not on_cpu(config):
        yield {"sharding.offload": True}
    for split in (2, 4, 8):
        if split > engine.tensor_parallel and split <= config.cluster.devices_per_node and engine.kind == "vllm":
            yield {"engine.tensor_parallel": split}
    for sharing in (2, 4, 8):
        if sharing > sharding.context_parallel and engine.tensor_parallel % sharing == 0:
            yield {"sharding.context_parallel": sharing}
    if 0 < (longest := longest_response(config)) < config.algo.rollout.max_response_tokens:
        row = longest + config.algo.task.max_prompt_tokens
        shorter = {f"algo.{name}.micro_batch_tokens": row for name in models
                   if getattr(config.algo, name).micro_batch_tokens > row}  # fmt: skip
        yield {"algo.rollout.max_response_tokens": longest} | shorter


def _tried(config: ScaleConfig, fields: dict[str, Any]) -> Change | None:
    """The change, where everything fits with it; the engine's share is lowered to what the trainer leaves, if that is needed."""
    new = replace_fields(config, fields)
    try:
        check_cuts(new, shapes(new)[0])
    except UserError:
        return None
    if problems(new):
        share = affordable_share(new)
        if share >= new.engine.gpu_memory_utilization or share <= 0:
            return None
        fields = fields | {"engine.gpu_memory_utilization": share}
        new = replace_fields(config, fields)
        if problems(new):
            return None
    return Change(fields, max(bytes_per_phase(new).values()))


def affordable_share(config: ScaleConfig) -> float:
    """The largest engine.gpu_memory_utilization, in whole per cent, beside which the trainer's states and passes have room."""
    engine = ("engine_weights", "engine_reserve", "kv_cache")
    awake = [phase for phase in terms_per_phase(config) if phase in ("rollout", "probe") or stays_awake(config)]
    trainer = max(sum(b for term, b in found.items() if term not in engine)
                  for phase, found in terms_per_phase(config).items() if phase in awake)  # fmt: skip
    return math.floor(100 * (1 - trainer / config.cluster.device_bytes)) / 100


def longest_response(config: ScaleConfig) -> int:
    """Tokens of the longest response that can be trained on, fed alone, and of which the cache holds one; 0: none.

    A pass's bytes grow linearly with the tokens fed, once these outweigh a chunk of logits: the line through two lengths is solved.
    Below the longest row asked for, the second length is an eighth of it, and the chord errs on the safe side.
    """
    prompt, asked, device = config.algo.task.max_prompt_tokens, config.algo.rollout.max_response_tokens, config.cluster.device_bytes
    policy, _ = shapes(config)
    room = config.engine.gpu_memory_utilization * device - sum(engine_terms(config, policy).values())
    limits = [policy.max_positions - prompt]
    if config.engine.kind == "vllm" and not on_cpu(config):
        limits.append(math.floor(room / kv_bytes_per_token(config, policy)) - prompt)
    other = 2 * asked if max(_training(config, asked).values()) <= device else max(1, asked // 8)
    here, there = _training(config, asked), _training(config, other)
    for phase in here:
        slope = (there[phase] - here[phase]) / (other - asked) if other != asked else 0.0
        if slope > 0:
            limits.append(math.floor(asked + (device - here[phase]) / slope))
        elif here[phase] > device:
            return 0
    return max(0, min(limits))


def _training(config: ScaleConfig, response_tokens: int) -> dict[str, float]:
    """The updates' bytes where a row of this length is fed alone."""
    alone = {"algo.policy.micro_batch_tokens": 1, "algo.value.micro_batch_tokens": 1}
    new = replace_fields(config, {"algo.rollout.max_response_tokens": response_tokens} | alone)
    return {phase: sum(found.values()) for phase, found in terms_per_phase(new, ("policy_update", "value_update")).items()}
