"""`python -m sim bias`: the table, the figures and the window that keeps the gradient within a stated error."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

import numpy as np

from sim.lab import instances
from sim.lab.bias import AtDistance, by_distance, every_offset
from sim.lab.critics import CRITICS, critic
from sim.lab.estimators import ESTIMATORS, Estimator, named
from sim.lab.gradients import GradientError, gradient_errors, knee
from sim.lab.rollouts import Rollouts, older_policy
from sim.lab.token_mdp import Floats
from tppo_ref.method.errors import UserError, nearest


def _option(default: Any, help: str, **options: Any) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, **options})


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiasConfig:
    """What is examined. Each field is an option of the command line, its help is the field's."""

    instance: str = _option("calm-chain", f"token MDP and policy: {', '.join(instances.INSTANCES)} [O]", metavar="NAME")
    set: tuple[str, ...] = _option((), "parameters of the instance, such as length=32 p_good=0.7", nargs="+", metavar="NAME=NUMBER")
    critic: str = _option("noise:0.1", f"{', '.join(n + ':SIZE' * sized for n, (_, sized) in CRITICS.items())} [O]", metavar="SPEC")
    seed: int = _option(0, "of the critic's noise [O]", type=int)
    gamma: float = _option(1.0, "discount [S]", type=float)
    lam: float = _option(0.95, "trace parameter; the floor of egae-adaptive's [P]", type=float)
    alpha: float = _option(0.05, "of egae-adaptive: lambda = max(lam, 1 - 1/(alpha L)) [P]", type=float)
    window: tuple[int, ...] = _option(
        (), "windows; none given: powers of 2 below the length cap, and the cap [O]", nargs="+", type=int, metavar="TOKENS"
    )
    tail: int = _option(2, "tokens before a cut that egae-exclude, -defer, -drop treat apart [O]", type=int, metavar="TOKENS")
    estimators: tuple[str, ...] = _option(
        ("egae", "cut-gae", "zero-cut", "egae-exclude", "egae-defer"), f"of {', '.join(ESTIMATORS)} [O]", nargs="+", metavar="NAME"
    )
    behind: float = _option(
        0.0, "steps by which the sampler of earlier windows is behind: mu ~ pi exp(-behind A) [O]", type=float, metavar="STEPS"
    )
    offsets: Literal["first", "all"] = _option(
        "first",
        "responses begin with a window (first) or anywhere in one, as with immediate refill (all) [O]",
        choices=("first", "all"),
    )
    logits: Literal["node", "state"] = _option(
        "node", "gradient by the logits of each state and position (node) or of each state (state) [O]", choices=("node", "state")
    )
    tolerance: float = _option(0.05, "largest gradient error, as a share of the true gradient [O]", type=float, metavar="SHARE")
    measure: Literal["relative", "rescaled"] = _option(
        "relative", "error that the tolerance is for; rescaled: after the best rescaling [O]", choices=("relative", "rescaled")
    )
    out: str | None = _option(None, "folder for figures and their CSV; none given: none are drawn", metavar="FOLDER")
    json: bool = _option(False, "print JSON and nothing else", action="store_true")


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
        c = self.config
        return f"{self.rollouts.mdp.name}, critic {c.critic}, gamma {c.gamma:g}, lambda {c.lam:g}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: --"):
            option = message.split()[2].removeprefix("--").partition("=")[0]
            message = f"--{option}: no such option{nearest(option, [f.name for f in dataclasses.fields(BiasConfig)])}"
        raise UserError(message)


def parse(argv: Sequence[str]) -> BiasConfig:
    """The command line as a `BiasConfig`; UserError for an unknown option or a wrong type."""
    parser = _Parser(prog="python -m sim bias", description=__doc__, allow_abbrev=False,
                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    for field in dataclasses.fields(BiasConfig):
        parser.add_argument(f"--{field.name}", default=field.default, **field.metadata)
    given = vars(parser.parse_args(list(argv))).items()
    values: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in given}
    return BiasConfig(**values)


def main(argv: Sequence[str]) -> None:
    """Prints the table or JSON, and draws where --out is given. UserError for a user's mistake."""
    config = parse(argv)
    try:
        examination = examine(config)
    except ValueError as error:  # the library's, in one line: its names are those of the options
        raise UserError(str(error)) from None
    if config.json:
        print(json.dumps(as_json(examination), indent=1, allow_nan=False))
    else:
        print(report(examination))
    if config.out is not None:
        from sim.lab.bias_figures import draw  # matplotlib takes its time

        for path in draw(examination, config.out):
            if not config.json:
                print(f"figure: {path}")


def examine(config: BiasConfig) -> Examination:
    """Builds what the config names and computes everything. ValueError for what cannot be built or enumerated."""
    if len(set(config.estimators)) < len(config.estimators):
        raise ValueError(f"estimators: expected different ones, got {' '.join(config.estimators)}")
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
    return dataclasses.replace(estimator, lam=config.lam, lam_alpha=alpha, tail_tokens=config.tail)


def _parameters(pairs: Sequence[str]) -> dict[str, float]:
    found: dict[str, float] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        try:
            found[name] = int(text) if text.lstrip("+-").isdigit() else float(text)
        except ValueError:
            equals = ""
        if not equals or name == "gamma":
            raise ValueError(f"--set {pair}: expected NAME=NUMBER, such as length=32{'; gamma has its own option' * bool(equals)}")
    return found


# ------------------------------------------------------------------------------------------------------------ what is printed

COLUMNS = (
    f"{'':6}  {'|bias|':^15}  {'share of cut':^15}  {'P4 bound':^15}  {'gradient error, share of the true gradient':^50}\n"
    f"{'window':>6}  {'near':>7} {'far':>7}  {'near':>7} {'far':>7}  {'near':>7} {'far':>7}  "
    f"{'total':>7} {'cut':>7} {'critic':>7} {'rescaled':>8} {'cosine':>8} {'trained':>8}"
)


def report(examination: Examination) -> str:
    """The table for people. near: the last token before a cut, far: the first of the window, means over the trained tokens."""
    config, rollouts = examination.config, examination.rollouts
    error_N = examination.critic_N - rollouts.solution.value_N
    visits_N = rollouts.solution.visits_N
    rms, length = (
        np.sqrt(visits_N @ error_N**2 / visits_N.sum()),
        rollouts.solution.length_T @ np.arange(rollouts.mdp.max_tokens + 1),
    )
    reach = f"{1 / (1 - config.gamma * config.lam):.4g} tokens" if config.gamma * config.lam < 1 else "without end"
    lines = [
        f"{examination.title}: {examination.story}.",
        f"{rollouts.mdp.num_nodes} nodes, responses of {length:.3g} tokens in the mean, {rollouts.mdp.max_tokens} at most; "
        f"critic's error {rms:.3g} rms over visits; reach of the trace 1/(1 - gamma lambda): {reach}.",
        "near: the last token before a cut; far: the first of the window. Biases and bounds in units of reward.",
    ]
    for name, finding in examination.findings.items():
        lines += ["", name, COLUMNS, *(_line(w, finding.errors[w], finding.distances[w]) for w in finding.errors)]
        lines.append(knee_sentence(name, finding, config))
    return "\n".join(lines)


def _line(window: int, error: GradientError, distances: Sequence[AtDistance]) -> str:
    def pair(name: str) -> str:
        ends = [getattr(d, name) if d.tokens else None for d in (distances[0], distances[-1])] if distances else [None, None]
        return " ".join(f"{'-' if x is None else _number(x):>7}" for x in ends)

    shares = " ".join(f"{_number(x):>7}" for x in (error.relative, error.cut, error.critic))
    return (f"{window:>6}  {pair('mean_bias')}  {pair('cut_bias')}  {pair('bound')}  {shares} {_number(error.rescaled):>8} "
            f"{error.cosine:>8.4f} {100 * error.trained_share:>6.1f} %")  # fmt: skip


def _number(x: float) -> str:
    return "0" if abs(x) < 1e-12 else f"{x:.4f}" if abs(x) >= 0.001 else f"{x:.1e}"


def knee_sentence(name: str, finding: Finding, config: BiasConfig) -> str:
    """Which window keeps the gradient within the tolerance, and by which measure."""
    within = f"within {100 * config.tolerance:g} % of the true one ({config.measure} error)"
    if finding.knee is not None:
        larger = " and every larger one examined keep" if finding.knee < max(finding.errors) else ", the largest examined, keeps"
        tokens = "token" if finding.knee == 1 else "tokens"
        return f"Knee of {name}: a window of {finding.knee} {tokens}{larger} the gradient {within}."
    last = finding.errors[max(finding.errors)]
    blame = f"; the critic alone costs {100 * last.critic:.3g} %" if last.critic > config.tolerance else ""
    return f"Knee of {name}: no window examined keeps the gradient {within}{blame}."


def as_json(examination: Examination) -> dict[str, Any]:
    """All numbers, in JSON's types. Unknown ones are null."""
    return {
        "config": dataclasses.asdict(examination.config),
        "instance": {"name": examination.rollouts.mdp.name, "story": examination.story, "nodes": examination.rollouts.mdp.num_nodes,
                     "mean_return": examination.rollouts.solution.mean_return},
        "estimators": {
            name: {
                "estimator": dataclasses.asdict(finding.estimator), "knee": finding.knee,
                "windows": [{"window": w, "gradient": dataclasses.asdict(finding.errors[w]),
                             "by_distance": [dataclasses.asdict(d) for d in finding.distances[w]]} for w in finding.errors],
            } for name, finding in examination.findings.items()
        },
    }  # fmt: skip
