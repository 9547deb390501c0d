"""The step's seconds, from a file that `python -m sim plan --json` wrote. Nothing of sim/ is imported: the file is the seam."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from scale.config import ScaleConfig
from tppo_ref.method.errors import UserError

SCHEMA = "tppo-sim-plan/1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seconds:
    """What the simulator's clock says of one training step."""

    step_s: float
    phases_s: dict[str, float]
    window: int
    gain: float
    steps: int
    ranks: int
    differences: list[str]

    def lines(self) -> list[str]:
        """For people."""
        parts = ", ".join(f"{name} {s:.0f}" for name, s in self.phases_s.items() if s >= 0.5)
        days = self.step_s * self.steps / 86400
        return [
            f"Seconds per step, by `sim plan`: {self.step_s:.0f} ({parts}); {self.gain:.2f}x PPO's trained tokens per second.",
            f"{self.steps:,} steps: {days:.1f} days, {24 * days * self.ranks:,.0f} device hours, evaluation not counted.",
            *(f"  The plan is of another run: {difference}." for difference in self.differences),
        ]


def read_seconds(config: ScaleConfig, num_parameters: int, ranks: int) -> Seconds:
    """The entry of `cluster.plan_file` for this config's window. UserError in one line for what is unreadable or missing."""
    name, rollout = config.cluster.plan_file, config.algo.rollout
    try:
        plan = json.loads(Path(name).read_text())
        if plan.get("schema") != SCHEMA:
            raise UserError(f"cluster.plan_file: got {name} with {plan.get('error') or plan.get('schema')}; expected schema "
                            f"{SCHEMA}; write it with `python -m sim plan --json`")  # fmt: skip
        entries = {entry["window"]: entry for entry in plan["seconds"]}
        window = min(rollout.window, rollout.max_response_tokens)
        if not entries:
            raise UserError(f"cluster.plan_file: got {name}, a plan in which nothing fitted; expected seconds; plan again")
        if window not in entries:
            raise UserError(f"cluster.plan_file: got {name} with windows {', '.join(map(str, entries))}; expected {window}; plan "
                            f"again with --window {window}")  # fmt: skip
        entry = entries[window]
        return Seconds(step_s=float(entry["step_s"]), phases_s={k: float(v) for k, v in entry["phases_s"].items()}, window=window,
                       gain=float(entry["gain"]), steps=config.algo.run.steps, ranks=ranks,
                       differences=_differences(plan, config, num_parameters, ranks))  # fmt: skip
    except OSError as error:
        raise UserError(
            f"cluster.plan_file: got {name}; expected a file that can be read ({error.strerror}); give another"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cluster.plan_file: got {name}; expected what `python -m sim plan --json` writes ({error})") from None


def _differences(plan: dict[str, Any], config: ScaleConfig, num_parameters: int, ranks: int) -> list[str]:
    """Where the plan's inputs are not this run's."""
    inputs, rollout = plan["inputs"], config.algo.rollout
    pairs = {
        "parameters": (plan["model"]["num_parameters"], num_parameters),
        "devices": (plan["device"]["num_devices"], ranks),
        "longest response": (inputs["cap"], rollout.max_response_tokens),
        "slots": (inputs["prompts"] * inputs["samples"], rollout.slots),
        "devices of an engine": (plan["layout"]["tensor_parallel"], config.engine.tensor_parallel),
        "engine's share": (plan["layout"]["memory_utilisation"], config.engine.gpu_memory_utilization),
        "refill": (inputs["refill"], rollout.refill),
        "ranks that share a row": (1, config.sharding.context_parallel),  # the simulator knows of no others
    }
    return [f"{name} {theirs}, here {ours}" for name, (theirs, ours) in pairs.items() if theirs != ours]
