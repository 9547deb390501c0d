"""Estimators over windows on one token MDP: what `python -m sim bias` prints and draws.

examine(BiasConfig(instance="thinking", window=(4, 8))).findings["egae"].knee
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from sim.command import option
from sim.lab import instances
from sim.lab.bias import AtDistance, by_distance, every_offset
from sim.lab.checks import Floats, check_count
from sim.lab.critics import CRITICS, critic
from sim.lab.estimators import ESTIMATORS, Estimator, named
from sim.lab.gradients import GradientError, gradient_errors, knee
from sim.lab.rollouts import Rollouts, older_policy


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiasConfig:
    """What is examined. Each field is an option of the command line, its help is the field's."""

    instance: str = option("calm-chain", f"token MDP and policy: {', '.join(instances.INSTANCES)} [O]", metavar="NAME")
    set: tuple[str, ...] = option((), "parameters of the instance, such as length=32 p_good=0.7", metavar="NAME=NUMBER")
    critic: str = option("noise:0.1", f"{', '.join(n + ':SIZE' * sized for n, (_, sized) in CRITICS.items())} [O]", metavar="SPEC")
    seed: int = option(0, "of the critic's noise [O]")
    gamma: float = option(1.0, "discount [S]")
    lam: float = option(0.95, "trace parameter; the floor of egae-adaptive's [P]")
    alpha: float = option(0.05, "of egae-adaptive: lambda = max(lam, 1 - 1/(alpha L)) [P]")
    window: tuple[int, ...] = option((), "windows; none given: powers of 2 below the length cap, and the cap [O]", metavar="TOKENS")
    tail: int = option(2, "tokens before a cut that egae-exclude, -defer, -drop treat apart [O]", metavar="TOKENS")
    estimators: tuple[str, ...] = option(
        ("egae", "cut-gae", "zero-cut", "egae-exclude", "egae-defer"), f"of {', '.join(ESTIMATORS)} [O]", metavar="NAME"
    )
    behind: float = option(
        0.0, "steps by which the sampler of earlier windows is behind: mu ~ pi exp(-behind A) [O]", metavar="STEPS"
    )
    offsets: Literal["first", "all"] = option(
        "first", "responses begin with a window (first) or anywhere in one, as with immediate refill (all) [O]"
    )
    logits: Literal["node", "state"] = option(
        "node", "gradient by the logits of each state and position (node) or of each state (state) [O]"
    )
    tolerance: float = option(0.05, "largest gradient error, as a share of the true gradient [O]", metavar="SHARE")
    measure: Literal["relative", "rescaled"] = option(
        "relative", "error that the tolerance is for; rescaled: after the best rescaling [O]"
    )
    out: str | None = option(None, "folder for figures and their CSV; none given: none are drawn", metavar="FOLDER")
    json: bool = option(False, "print JSON and nothing else")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One estimator over all windows: window -> gradient error, window -> bias by distance, and the knee."""

    estimator: Estimator
    errors: Mapping[int, GradientError]
    distances: Mapping[int, list[AtDistance]]
    knee: int | None


@dataclasses.dataclass(frozen=True)
class Examination:
    """Everything that the command prints and draws."""

    config: BiasConfig
    rollouts: Rollouts
    critic_N: Floats
    story: str
    findings: Mapping[str, Finding]

    @property
    def title(self) -> str:
        """What was examined, for the head of a table or a figure."""
        c = self.config
        return f"{self.rollouts.mdp.name}, critic {c.critic}, gamma {c.gamma:g}, lambda {c.lam:g}"


def examine(config: BiasConfig) -> Examination:
    """Builds what the config names and computes everything. ValueError for what cannot be built or enumerated."""
    if len(set(config.estimators)) < len(config.estimators):
        raise ValueError(f"estimators: got {' '.join(config.estimators)}; expected different ones")
    check_count("tail", config.tail)
    estimators = {name: _adapted(named(name), config) for name in config.estimators}
    mdp, policy_NA, story = instances.load(config.instance, gamma=config.gamma, **_parameters(config.set))
    rollouts = Rollouts(mdp, policy_NA, older_policy(mdp, policy_NA, config.behind) if config.behind else None)
    critic_N = critic(config.critic, mdp, rollouts.solution, seed=config.seed)
    windows = config.window or sorted({*(2**i for i in range(mdp.max_tokens.bit_length())), mdp.max_tokens})
    findings = {}
    for name, estimator in estimators.items():
        errors = gradient_errors(
            rollouts, critic_N, estimator, windows, average_offsets=config.offsets == "all", shared=config.logits == "state"
        )
        offsets = {w: every_offset(w) if config.offsets == "all" else None for w in errors}
        distances = {w: by_distance(rollouts, critic_N, estimator, w, offsets[w]) for w in errors}
        findings[name] = Finding(estimator, errors, distances, knee(errors, config.tolerance, config.measure))
    return Examination(config, rollouts, critic_N, story, findings)


def _adapted(estimator: Estimator, config: BiasConfig) -> Estimator:
    """The named estimator with the config's lambda, alpha and tail."""
    alpha = None if estimator.lam_alpha is None else config.alpha
    return dataclasses.replace(estimator, lam=config.lam, lam_alpha=alpha, tail_tokens=config.tail if estimator.tail_tokens else 0)


def _parameters(pairs: Sequence[str]) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        try:
            numbers[name] = int(text) if text.lstrip("+-").isdigit() else float(text)
        except ValueError:
            equals = ""
        if not equals or name == "gamma":
            hint = "; gamma has its own option" * bool(equals)
            raise ValueError(f"set: got {pair}; expected NAME=NUMBER, such as length=32{hint}")
    return numbers
