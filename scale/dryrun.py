"""`--dry-run`: what a run needs of each device, without a device and without weights.

    python scale/launch.py --dry-run --config scale/configs/qwen2.5-32b-math.yaml
           [--cluster.plan_file plan.json] [--cluster.dry_run_json table.json]

    dry_run(config) -> 0 it fits, 1 it does not

Bytes come from memory.py, changes that make a run fit from remedies.py. Seconds are not computed here: they come from a file that
`python -m sim plan --json` wrote.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scale.config import ScaleConfig
from scale.memory import (
    PHASES, TERMS, bytes_per_phase, config_file, host_bytes, kv_tokens, longest_row, num_engines, num_ranks, passing, problems, shapes,
    terms_per_phase,
)  # fmt: skip
from scale.plan_file import Seconds, read_seconds
from scale.remedies import Change, changes, longest_response
from tppo_ref.types import UserError


def dry_run(config: ScaleConfig) -> int:
    """Print the table, the verdict and, where a plan is given, the seconds. 0: it fits; 1: it does not."""
    seconds = read_seconds(config, shapes(config)[0].num_parameters, num_ranks(config)) if config.cluster.plan_file else None
    found = problems(config)
    longest = longest_response(config)
    remedies = changes(config) if found else []
    print(report(config, found, longest, remedies, seconds))
    if config.cluster.dry_run_json:
        content = as_json(config, found, longest, remedies, seconds)
        try:
            Path(config.cluster.dry_run_json).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"cluster.dry_run_json: cannot write {config.cluster.dry_run_json} ({error.strerror})") from None
    return 1 if found else 0


# ---------------------------------------------------------------------------------------------------------------- what is said


def report(config: ScaleConfig, found: list[str], longest: int, remedies: Sequence[Change], seconds: Seconds | None) -> str:
    """The table for people."""
    policy, _ = shapes(config)
    rollout, device = config.algo.rollout, config.cluster.device_bytes
    held, slots = kv_tokens(config, policy), rollout.slots // num_engines(config)
    typical = config.algo.task.max_prompt_tokens + min(rollout.window, rollout.max_response_tokens)
    lines = [
        f"{config.algo.model.policy} ({policy.num_parameters / 1e9:.2f} B parameters; shape from {config_file(config.algo.model.policy)})",
        f"{num_ranks(config)} ranks of {device / 1e9:.1f} GB, {num_engines(config)} engines of {config.engine.tensor_parallel}; fed at most "
        f"{sum(map(sum, passing(config, 'policy_update').rows)):,} tokens at a time, longest row {longest_row(config):,}.",
        "",
        *table(terms_per_phase(config)),
        "",
        f"Each engine's cache holds {held:,} tokens: {held / longest_row(config):.1f} of the longest sequences, {held / typical:.1f} of a "
        f"prompt and one window; it has {slots:,} slots. Requests that find no room wait inside vLLM: slower, never wrong.",
        f"Host memory of a machine: {host_bytes(config) / 1e9:.0f} GB (a checkpoint being written"
        f"{', offloaded states' if config.sharding.offload else ''}).",
        "",
    ]
    if found:
        lines += ["DOES NOT FIT:", *(f"  {problem}" for problem in found)]
        lines += ["Any one of these makes it fit:", *(f"  {change.text}: {change.peak_bytes / 1e9:.1f} GB at the peak" for change in remedies)] if remedies else [
            "No change of one or two fields that a dry run knows makes it fit: take more devices, or larger ones."]  # fmt: skip
    else:
        phase, peak = max(bytes_per_phase(config).items(), key=lambda item: item[1])
        lines.append(f"FITS: {phase} is the largest phase, {peak / 1e9:.1f} of {device / 1e9:.1f} GB.")
    lines.append(f"Longest response, hence largest window, that fits: {longest:,} tokens (asked for: {rollout.max_response_tokens:,} in "
                 f"windows of {rollout.window:,})." if longest else "No response fits, however short.")  # fmt: skip
    return "\n".join([*lines, "", *(seconds.lines() if seconds else [no_seconds(config)])])


def table(phases: dict[str, dict[str, float]]) -> list[str]:
    """A row per term, a column per phase, GB on one rank."""
    names = [term for term in TERMS if any(term in found for found in phases.values())]
    width = max(map(len, PHASES)) + 1
    rows = [f"{'GB per rank':20}" + "".join(f"{phase:>{width}}" for phase in phases)]
    for term in names:
        rows.append(
            f"{term:20}"
            + "".join(f"{found[term] / 1e9:>{width}.1f}" if term in found else " " * width for found in phases.values())
        )
    return [*rows, f"{'in all':20}" + "".join(f"{sum(found.values()) / 1e9:>{width}.1f}" for found in phases.values())]


def no_seconds(config: ScaleConfig) -> str:
    rollout, name = config.algo.rollout, Path(config.algo.model.policy or "").name
    prompts = max(1, rollout.slots // rollout.samples_per_prompt)
    return (f"Seconds: unknown here. python -m sim plan --model {name} --gpus {num_ranks(config)}xH100 --cap {rollout.max_response_tokens} "
            f"--window {rollout.window} --prompts {prompts} --samples {rollout.samples_per_prompt} --tp {config.engine.tensor_parallel} "
            f"--json > plan.json, then --cluster.plan_file plan.json")  # fmt: skip


def as_json(
    config: ScaleConfig, found: list[str], longest: int, remedies: Sequence[Change], seconds: Seconds | None
) -> dict[str, Any]:
    """`cluster.dry_run_json`, schema "tppo-dry-run/1": bytes on one rank, tokens and seconds as the names say."""
    policy, value = shapes(config)
    return {
        "schema": "tppo-dry-run/1",
        "model": {"policy": config.algo.model.policy, "num_parameters": policy.num_parameters,
                  "num_value_parameters": value.num_value_parameters},
        "ranks": num_ranks(config), "engines": num_engines(config), "device_bytes": config.cluster.device_bytes,
        "fits": not found, "problems": found,
        "remedies": [{"change": change.text, "peak_bytes": change.peak_bytes} for change in remedies],
        "terms_per_phase": terms_per_phase(config), "bytes_per_phase": bytes_per_phase(config),
        "kv_cache_tokens": kv_tokens(config, policy), "longest_response_tokens": longest, "host_bytes": host_bytes(config),
        "seconds": dataclasses.asdict(seconds) if seconds else None,
    }  # fmt: skip


__all__ = ["bytes_per_phase", "dry_run", "terms_per_phase"]
