"""What a run warns of: thresholds of its config that a step's metrics have passed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping

from tppo_ref.runs.config import Config
from tppo_ref.runs.validation import never_cut, steps_of

log = logging.getLogger("tppo_ref")

EVERY = 20  # steps between two warnings of one kind


def forewarn(config: Config) -> None:
    """What can be said of a run before its first step: settings that are legal, and hardly meant."""
    run, rollout = config.run, config.rollout
    warmup = 0 if config.advantage.critic_free else config.value.warmup_steps
    if run.train_seconds is None and warmup >= run.steps:
        log.warning("value.warmup_steps %d: the policy trains in none of the %d steps (run.steps); give more steps, or fewer of "
                    "warm-up", warmup, run.steps)  # fmt: skip
    if run.train_seconds is None and (traced := steps_of(run.profile_steps)) and traced[0] > run.steps:
        log.warning("run.profile_steps %s: the run ends with step %d (run.steps), so nothing is traced; name earlier ones",
                    run.profile_steps, run.steps)  # fmt: skip
    tail, excluded = config.advantage.tail_tokens, config.advantage.tail == "exclude"
    if tail >= rollout.window and excluded and not never_cut(config):
        log.warning("advantage.tail_tokens %d with rollout.window %d: no token of a cut row trains the policy, most are lost for "
                    "good; take a shorter tail, or --advantage.tail defer", tail, rollout.window)  # fmt: skip


class Watch:
    """Called with each step's number and metrics, on the rank that talks to people."""

    def __init__(self, config: Config):
        self.run, self.failure_score = config.run, config.task.failure_score
        self._told: Counter[str] = Counter()

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        if step % EVERY == 1:
            self._cuts(step, metrics)
            self._staleness(step, metrics)
        for name in ("verify/timeouts", "verify/errors"):
            if metrics[name] > self._told[name]:
                log.warning("step %d: %s is %d so far; they score %g", step, name, metrics[name], self.failure_score)
                self._told[name] = int(metrics[name])

    def _cuts(self, step: int, metrics: Mapping[str, float]) -> None:
        capped = metrics["response/ended"] * metrics["response/capped_share"] if metrics["response/ended"] else 0.0
        share = metrics["response/cut_share"] + capped / max(metrics["response/rows"], 1)
        if share > self.run.cut_warning:
            log.warning("step %d: %.0f %% of the rows were cut or capped (run.cut_warning %.0f %%): the critic sees few finished "
                        "responses; a longer rollout.window helps", step, 100 * share, 100 * self.run.cut_warning)  # fmt: skip

    def _staleness(self, step: int, metrics: Mapping[str, float]) -> None:
        oldest = metrics.get("policy/staleness_max", 0)
        if oldest > self.run.staleness_warning:
            log.warning("step %d: tokens that are %d weight versions old are trained (run.staleness_warning %d): their importance "
                        "weights are far from 1; a longer rollout.window helps",
                        step, oldest, self.run.staleness_warning)  # fmt: skip
