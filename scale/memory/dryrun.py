"""`--dry-run`: what a run needs of each device, without a device and without weights.

    python scale/launch.py --dry-run --config scale/configs/qwen2.5-32b-math.yaml
           [--cluster.plan_file plan.json] [--cluster.dry_run_json table.json]

    dry_run(config) -> 0 it fits, 1 it does not

Bytes come from budget.py, changes that make a run fit from remedies.py. Seconds are not computed here: they come from a file that
`python -m sim plan --json` wrote.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scale.config import ScaleConfig, own_base_model
from scale.memory import budget as memory
from scale.memory.budget import bytes_per_phase, terms_per_phase
from scale.memory.plan_file import Seconds, read_seconds
from scale.memory.remedies import Change, changes, longest_response
from tppo_ref.method.errors import UserError
from tppo_ref.runs.build import base_config
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.tasks import load_task

BUILT_IN = "base-model-of-a-built-in-task.json"

__all__ = ["Verdict", "bytes_per_phase", "dry_run", "judge", "predictions", "terms_per_phase"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a dry run found: bytes on one rank, tokens."""

    terms: dict[str, dict[str, float]]
    problems: list[str]
    remedies: list[Change]
    longest_response: int
    kv_tokens: int
    host_bytes: float

    @property
    def totals(self) -> dict[str, float]:
        return {phase: sum(found.values()) for phase, found in self.terms.items()}


def dry_run(config: ScaleConfig) -> int:
    """Print the table, the verdict and, where a plan is given, the seconds. 0: it fits; 1: it does not."""
    with tempfile.TemporaryDirectory() as folder:
        return _dry_run(_with_shape(config, Path(folder)))


def _with_shape(config: ScaleConfig, folder: Path) -> ScaleConfig:
    """A built-in task's base model need not be made: its shape is enough."""
    if not own_base_model(config):
        return config
    file = folder / BUILT_IN
    base_config(config.algo, load_task(config.algo.task.name)).to_json_file(file, use_diff=False)
    return replace_fields(config, {"algo.model.policy": str(file)})


def _is_built_in(config: ScaleConfig) -> bool:
    return Path(config.algo.model.policy or "").name == BUILT_IN


def predictions(config: ScaleConfig) -> dict[str, Any]:
    """What `as_json` says, with seconds where a plan is given."""
    with tempfile.TemporaryDirectory() as folder:
        config = _with_shape(config, Path(folder))
        return as_json(config, judge(config), _seconds(config))


def _seconds(config: ScaleConfig) -> Seconds | None:
    """The plan's seconds, where there is a plan."""
    policy, _ = memory.shapes(config)
    memory.check_cuts(config, policy)
    return read_seconds(config, policy.num_parameters, memory.num_ranks(config)) if config.cluster.plan_file else None


def _dry_run(config: ScaleConfig) -> int:
    seconds, verdict = _seconds(config), judge(config)
    print("\n".join(report(config, verdict, seconds)))
    if path := config.cluster.dry_run_json:
        try:
            Path(path).write_text(json.dumps(as_json(config, verdict, seconds), indent=1, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(
                f"cluster.dry_run_json: got {path}; expected a file that can be written ({error.strerror}); choose another"
            ) from None
    return 1 if verdict.problems else 0


def judge(config: ScaleConfig) -> Verdict:
    """Everything that the table and the JSON say, but the seconds."""
    with tqdm(total=4, desc="dry run", unit="part", delay=1.0, leave=False, disable=None) as bar:

        def part(result: Any) -> Any:
            bar.update()
            return result

        found = part(memory.problems(config))
        return Verdict(
            terms=part(terms_per_phase(config)), problems=found, remedies=part(changes(config) if found else []),
            longest_response=part(longest_response(config)), kv_tokens=memory.kv_tokens(config, memory.shapes(config)[0]),
            host_bytes=memory.host_bytes(config),
        )  # fmt: skip


def report(config: ScaleConfig, verdict: Verdict, seconds: Seconds | None) -> list[str]:
    """For people."""
    rollout = config.algo.rollout
    if verdict.longest_response:
        longest = (f"The longest response, hence the largest window, that fits: {verdict.longest_response:,} tokens (asked for: "
                   f"{rollout.max_response_tokens:,} in windows of {rollout.window:,}).")  # fmt: skip
    else:
        longest = "No response fits, however short."
    return [
        *heading(config),
        "",
        *table(verdict.terms),
        "",
        *engine_lines(config, verdict),
        "",
        *judgement(config, verdict),
        longest,
        "",
        *(seconds.lines() if seconds else [no_seconds(config)]),
    ]


def heading(config: ScaleConfig) -> list[str]:
    policy, source = memory.shapes(config)[0], config.algo.model.policy
    file, engines = memory.config_file(source), memory.num_engines(config)
    fed = sum(map(sum, memory.passing(config, "policy_update").rows))
    by = "" if str(file).startswith(str(source)) else f" (the folder is not here: shape from {file.name})"
    shared = config.sharding.context_parallel
    sharing = f"; {shared} ranks share each row" if shared > 1 else ""
    name = f"The base model that task {config.algo.task.name} makes" if _is_built_in(config) else source
    return [
        f"{name}: {policy.num_parameters / 1e9:.4g} B parameters{by}",
        f"{memory.num_ranks(config)} ranks of {config.cluster.device_bytes / 1e9:.1f} GB; engines: {engines}, of "
        f"{config.engine.tensor_parallel} each{sharing}. The policy's update is fed {fed:,} tokens at a time; the longest row has "
        f"{memory.longest_row(config):,}.",
    ]  # fmt: skip


def table(phases: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A row per term, a column per phase, GB on one rank."""
    width = max(map(len, phases)) + 2

    def row(name: str, numbers: Sequence[float | None]) -> str:
        return f"{name:20}" + "".join(" " * width if x is None else f"{x / 1e9:>{width}.1f}" for x in numbers)

    terms = [term for term in memory.TERMS if any(term in found for found in phases.values())]
    return [
        f"{'GB per rank':20}" + "".join(f"{phase:>{width}}" for phase in phases),
        *(row(term, [found.get(term) for found in phases.values()]) for term in terms),
        row("in all", [sum(found.values()) for found in phases.values()]),
    ]


def engine_lines(config: ScaleConfig, verdict: Verdict) -> list[str]:
    """How much of a window the cache holds, and what the host needs."""
    rollout, prompt = config.algo.rollout, config.algo.task.max_prompt_tokens
    typical = prompt + min(rollout.window, rollout.max_response_tokens)
    held, slots = verdict.kv_tokens, rollout.slots // memory.num_engines(config)
    offloaded = ", and the offloaded states" if config.sharding.offload else ""
    asleep = ", and the weights of sleeping engines" if memory.sleeps_on_the_host(config) else ""
    return [
        f"An engine's cache holds {held:,} tokens: {held / memory.longest_row(config):.1f} of the longest sequences, or "
        f"{held / typical:.1f} of a prompt and one window.",
        f"It has {slots:,} slots: {held / slots:,.0f} tokens each. Requests without room wait inside vLLM: slower, never wrong.",
        f"Host memory of a machine: {verdict.host_bytes / 1e9:.0f} GB for a checkpoint being written{offloaded}{asleep}.",
    ]  # fmt: skip


def judgement(config: ScaleConfig, verdict: Verdict) -> list[str]:
    """Whether it fits, and what to change."""
    if not verdict.problems:
        phase, peak = max(verdict.totals.items(), key=lambda item: item[1])
        return [f"FITS: {phase} is the largest phase, {peak / 1e9:.1f} of {config.cluster.device_bytes / 1e9:.1f} GB."]
    lines = ["DOES NOT FIT:", *(f"  {problem}" for problem in verdict.problems)]
    if not verdict.remedies:
        return [*lines, "No two changes, nor eight times the machines, make it fit: take larger devices, or a smaller model."]
    remedies = (f"  {change.text}   ({change.peak_bytes / 1e9:.1f} GB at the peak)" for change in verdict.remedies)
    return [*lines, "Each of these makes it fit:", *remedies]


def no_seconds(config: ScaleConfig) -> str:
    rollout, engine = config.algo.rollout, config.engine
    if _is_built_in(config):
        return "Seconds: run it; the simulator plans for published models."
    return (
        f"Seconds: not known here. python -m sim plan --model {Path(config.algo.model.policy or '').name} "
        f"--gpus {memory.num_ranks(config)}xH100 --cap {rollout.max_response_tokens} --window {rollout.window} "
        f"--prompts {max(1, rollout.slots // rollout.samples_per_prompt)} --samples {rollout.samples_per_prompt} "
        f"--tp {engine.tensor_parallel} --memory-utilisation {engine.gpu_memory_utilization} "
        f"{'' if rollout.refill == 'batch' else f'--refill {rollout.refill} '}--json > plan.json, with --lengths where you know "
        f"yours; then --cluster.plan_file plan.json"
    )


def as_json(config: ScaleConfig, verdict: Verdict, seconds: Seconds | None) -> dict[str, Any]:
    """What `cluster.dry_run_json` holds; bytes on one rank, host_bytes on one machine, tokens and seconds as the names say."""
    policy, value = memory.shapes(config)
    num_value_parameters = 0 if config.algo.advantage.critic_free else value.num_value_parameters
    return {
        "schema": "tppo-dry-run/1",
        "model": {"policy": config.algo.model.policy, "num_parameters": policy.num_parameters,
                  "num_value_parameters": num_value_parameters},
        "ranks": memory.num_ranks(config),
        "engines": memory.num_engines(config),
        "device_bytes": config.cluster.device_bytes,
        "fits": not verdict.problems,
        "problems": verdict.problems,
        "remedies": [{"fields": r.fields, "peak_bytes": r.peak_bytes} for r in verdict.remedies],
        "terms_per_phase": verdict.terms,
        "bytes_per_phase": verdict.totals,
        "kv_cache_tokens": verdict.kv_tokens,
        "longest_response_tokens": verdict.longest_response,
        "host_bytes": verdict.host_bytes,
        "seconds": dataclasses.asdict(seconds) if seconds else None,
    }  # fmt: skip
