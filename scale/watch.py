"""What a cluster's run warns of beside tppo_ref's own warnings."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from scale.config import ScaleConfig, thresholds
from scale.distributed import World
from tppo_ref.method.errors import UserError, refusal
from tppo_ref.runs.watch import EVERY

log = logging.getLogger("scale")


class GapLimit:
    """Called with each step's number and metrics, on every rank: all of them leave at the same step. UserError above the limit.

    Weights that a sleep has spoilt, a stale cache or a lost tensor show here, where the tokens that were trained on are compared.
    """

    def __init__(self, config: ScaleConfig):
        self.limit = config.engine.gap_limit or thresholds(config)[1]

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        gap = metrics["policy/logprob_gap"]
        if gap > self.limit:  # not a number where nothing was compared
            got = f"engine and trainer log-probabilities {gap:.2g} apart on average in step {step}"
            remedy = "go on from the last checkpoint, with engine.sleep_level 1 or 0 where it happens again"
            raise UserError(refusal("engine.gap_limit", got, f"at most {self.limit:.2g}", remedy))


class ClusterWatch:
    """Called with each step's number and metrics, on the rank that talks to people."""

    def __init__(self, config: ScaleConfig, world: World):
        self.gap_limit, self.world = config.engine.gap_warning or thresholds(config)[0], world.data_world

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        gap, ended = metrics["policy/logprob_gap"], metrics["response/ended"]
        if gap > self.gap_limit:
            log.warning("step %d: engine and trainer log-probabilities differ by %.2g on average (engine.gap_warning %.2g): "
                        "policy.old_logprobs recompute with policy.importance truncated corrects for it, in a new run",
                        step, gap, self.gap_limit)  # fmt: skip
        if ended < self.world and step % EVERY == 1:
            log.warning("step %d: only %d responses ended, the value model has little to learn from; a longer rollout.window "
                        "or more slots help", step, ended)  # fmt: skip
