"""The words and the JSON of `python -m sim plan`: bytes, seconds and the window.

The JSON (`schema`: "tppo-sim-plan/1"); seconds, tokens and bytes as the names say, per training step, of the whole cluster:

    inputs            the options, as given or by default; cap as found, in tokens
    model             name, num_parameters, num_value_parameters
    device            name, memory_bytes, num_devices
    layout            the fields of sim.clock.layout.Layout, as chosen
    fits, problems    whether everything fits, and what does not, a line each
    remedies          [{change, peak_bytes}], each of which would make it fit
    bytes_per_phase   {phase: {term: bytes on one device}}; phases and terms are those of sim.clock.footprint
    bytes_total       {phase: bytes on one device}
    terms_unseen      {by_plan: [...], by_dry_run: [...]}
    kv_capacity_tokens  of an engine replica
    sampling          what was simulated for the whole
    seconds           [{system, window, step_s, rollout_s, phases_s: {phase: seconds}, trained_tokens, tokens_per_s, gain, updates,
                      occupancy, mean_active, operations_per_byte, prefix_tokens_trained, reprefilled_tokens, preemptions,
                      cut_weight, steps_simulated, ranges: {step_s, tokens_per_s, gain}}]; a range has low, middle
                      and high; phases are those of sim.clock.trace.PHASES and sum to step_s; PPO is the last entry; empty where
                      nothing fits
    window            {chosen, reason, decay_tokens, toy}, or null
A mistake prints {"error": "..."} instead, and the exit code is 2.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from sim.clock.cuts import lambda_at_cut
from sim.clock.footprint import TERMS, UNSEEN, totals
from sim.clock.plan import Plan, PlanConfig
from sim.clock.steady import Steady
from sim.clock.trace import PHASES


def report(plan: Plan) -> str:
    """The table for people."""
    lay, gpu, config = plan.layout, plan.accelerator, plan.config
    lines = [
        f"{plan.model.name} on {lay.num_devices} x {gpu.name} ({gpu.memory_bytes / 1e9:.1f} GB each), {lay.num_replicas} engine "
        f"replicas of {lay.tensor_parallel}, engine's share {100 * lay.memory_utilisation:.0f} %.",
        f"Responses: {plan.lengths.name or config.lengths}, mean {plan.lengths.mean_tokens():,.0f} tokens, "
        f"{100 * plan.lengths.capped_share():.2g} % at the cap of {plan.lengths.cap:,}; {config.prompts} prompts x "
        f"{config.samples} = {config.prompts * config.samples:,} slots; prompts of {config.prompt_tokens} tokens.",
        "",
        *bytes_table(plan),
        "",
        *verdict(plan),
    ]
    if plan.systems:
        lines += ["", *seconds_table(plan), "", *window_lines(plan)]
    return "\n".join(lines)


def bytes_table(plan: Plan) -> list[str]:
    """A row per term, a column per phase, GB on one device."""
    phases, sums = plan.phases, totals(plan.phases)
    terms = [term for term in TERMS if any(term in found for found in phases.values())]
    head = f"{'GB per device':18} " + " ".join(f"{name:>13}" for name in phases)
    rows = [f"{term:18} " + " ".join(f"{_gb(found.get(term)):>13}" for found in phases.values()) for term in terms]
    total = f"{'in all':18} " + " ".join(f"{_gb(sums[name]):>13}" for name in phases)
    return [head, *rows, total,
            f"A dry run on fake tensors does not see: {', '.join(UNSEEN['dry_run'])}.",
            f"This plan does not see: {'; '.join(UNSEEN['plan'])}."]  # fmt: skip


def _gb(num_bytes: float | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 1e9:.1f}"


def verdict(plan: Plan) -> list[str]:
    """Whether it fits, and what to change."""
    name, num_bytes = plan.peak
    if plan.fits:
        return [f"Fits: {name} is the largest phase, {num_bytes / 1e9:.1f} of {plan.accelerator.memory_bytes / 1e9:.1f} GB. The "
                f"engine's KV cache holds {plan.kv_capacity_tokens:,} tokens per replica: "
                f"{plan.kv_capacity_tokens / plan.budget.sequence_tokens:.1f} of the longest sequences. A smaller window makes no "
                "training pass smaller: earlier windows are fed again."]  # fmt: skip
    return ["DOES NOT FIT:", *(f"  {problem}" for problem in plan.problems), "Any one of these would make it fit:",
            *(f"  {r.text}: {r.peak_bytes / 1e9:.1f} GB at the peak" for r in plan.remedies),
            "Seconds are not computed for what does not fit."]  # fmt: skip


COLUMNS = ("rollout", "logprob", "value_forward", "policy_train", "value_train", "other")


def seconds_table(plan: Plan) -> list[str]:
    """A row per system, seconds per step."""
    heads = " ".join(f"{name:>13}" for name in COLUMNS)
    lines = [f"Seconds per training step ({plan.sampling}; efficiencies are those of sim/clock/efficiency.py, untuned).",
             f"{'system':6} {'window':>7} {'step (low to high)':>21} {heads} {'tokens/s (low to high)':>25} "
             f"{'gain (low to high)':>20} {'busy':>6} {'ops/byte':>9} {'fed again':>10} {'cut weight':>11}"]  # fmt: skip
    for window, found in plan.systems.items():
        seconds, ranged = by_column(found), plan.ranged[window]
        weight = plan.choice.weights.get(window) if plan.choice else None
        phases = " ".join(f"{seconds[name]:>13.0f}" for name in COLUMNS)
        lines.append(
            f"{found.system:6} {window:>7} {ranged.step.text('.0f', ''):>21} {phases} {ranged.speed.text(',.0f', ''):>25} "
            f"{plan.gain(window).text():>20} {100 * found.occupancy:>4.0f} % {found.ops_per_byte or 0:>9.0f} "
            f"{100 * found.prefix_tokens_trained / max(found.tokens_fed, 1):>8.0f} % "
            f"{'-' if weight is None else f'{weight:.4f}':>11}"
        )  # fmt: skip
    lines.append("gain: trained tokens per second, against PPO. Low and high: what the stated "
                 "efficiencies allow. busy: slots while decoding. fed again: share of the policy's "
                 "training tokens. other: wake-up, verification, weight sync.")  # fmt: skip
    crowded = [s for s in plan.systems.values() if s.preemptions]
    if crowded:
        held = plan.kv_capacity_tokens / (plan.lengths.mean_tokens() / 2 + plan.config.prompt_tokens) * plan.layout.num_replicas
        lines.append("The KV cache is too small for the slots: requests queue and are preempted; idle slots are no idle "
                     f"devices and windows have little to win. It holds about {held:,.0f} half-way sequences.")  # fmt: skip
    if plan.budget.offload:
        lines.append("Transfers of --offload to and from the host are not charged: these seconds are too few.")
    return lines


def by_column(found: Steady) -> dict[str, float]:
    """Seconds of a step, in the table's columns."""
    seconds = {name: found.phases_s.get(name, 0.0) for name in COLUMNS[1:-1]}
    other = sum(found.phases_s[name] for name in ("wake", "verify", "sync"))
    return {"rollout": found.rollout_s} | seconds | {"other": other}


def window_lines(plan: Plan) -> list[str]:
    """The window to choose, and how far that can be trusted."""
    choice, cap = plan.choice, plan.lengths.cap
    assert choice is not None  # where there are seconds there is a choice
    if choice.window is None or choice.window == cap:
        return ["Window: PPO alone was asked for."]
    best = max(plan.systems, key=lambda w: plan.systems[w].tokens_per_s)
    lines = [f"Window to choose for T-PPO: {choice.window:,} tokens ({plan.gain(choice.window).text()} PPO): {choice.reason}."]
    if best == cap:
        lines.append("PPO is faster than T-PPO at every window examined: on this cluster, with these lengths, windows do not pay.")
    return [*lines, decay_sentence(plan), toy_sentence()]


def decay_tokens(config: PlanConfig, length: float, window: int) -> float:
    """1 / (1 - gamma lambda) of a row that is cut at so many tokens; inf without end."""
    lam = lambda_at_cut(length, window, lam=config.lam, alpha=config.alpha).item()
    return 1 / (1 - config.gamma * lam) if config.gamma * lam < 1 else float("inf")


def decay_sentence(plan: Plan) -> str:
    """What of the bias can be said beforehand."""
    window = plan.choice.window if plan.choice and plan.choice.window else plan.lengths.cap
    near, far = (decay_tokens(plan.config, n, window) for n in (window, plan.lengths.cap))
    caveat = (
        " The trace grows with the response's length here (--alpha), for which P4 is not proven: the weight compares windows and "
    )
    caveat += "bounds nothing; --alpha 0 gives the bound."
    return (f"A cut's influence decays over 1/(1 - gamma lambda) = {near:,.0f} tokens at the first edge, {far:,.0f} at the cap. "
            "The cut weight is P4's (docs/theory.md): mean |bias| by the cut <= weight x [largest step of the critic + its error "
            "...]; that bracket belongs to your task and critic and is unknown." + caveat * bool(plan.config.alpha))  # fmt: skip


TOY_KNEES = {0.5: 3, 0.75: 4, 0.9: 6}
"""Lambda -> the knee in tokens of `python -m sim bias --instance calm-chain --critic exact`, 5 % allowed; tests compute it anew."""


def toy_sentence() -> str:
    """The knee of `sim bias` on a calm chain, in decay lengths, and why it is not used."""
    decays = ", ".join(f"{knee * (1 - lam):.2g}" for lam, knee in TOY_KNEES.items())
    return (f"Toy (`python -m sim bias --instance calm-chain --critic exact`, 48 tokens): the knee at 5 % lies at {decays} decay "
            f"lengths for lambda {', '.join(map(str, TOY_KNEES))}. It is no constant, so no toy's knee carries over to a "
            f"window in tokens; only P4's decay does.")  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------- JSON


def as_json(plan: Plan) -> dict[str, Any]:
    """See the file's docstring. Unknown numbers are null."""
    choice = plan.choice
    window = (choice and choice.window) or plan.lengths.cap
    return {
        "schema": "tppo-sim-plan/1",
        "inputs": dataclasses.asdict(plan.config) | {"cap": plan.lengths.cap},
        "model": {"name": plan.model.name, "num_parameters": plan.model.num_parameters,
                  "num_value_parameters": plan.model.num_value_parameters},
        "device": {"name": plan.accelerator.name, "memory_bytes": plan.accelerator.memory_bytes,
                   "num_devices": plan.layout.num_devices},
        "layout": dataclasses.asdict(plan.layout),
        "fits": plan.fits,
        "problems": list(plan.problems),
        "remedies": [{"change": r.text, "peak_bytes": r.peak_bytes} for r in plan.remedies],
        "bytes_per_phase": plan.phases,
        "bytes_total": totals(plan.phases),
        "terms_unseen": {"by_plan": list(UNSEEN["plan"]), "by_dry_run": list(UNSEEN["dry_run"])},
        "kv_capacity_tokens": max(0, plan.kv_capacity_tokens),
        "sampling": plan.sampling,
        "seconds": [_seconds(plan, w, found) for w, found in plan.systems.items()],
        "window": None if choice is None else {
            "chosen": choice.window, "reason": choice.reason, "toy": toy_sentence(),
            "decay_tokens": finite(decay_tokens(plan.config, window, window)),
        },
    }  # fmt: skip


def finite(x: float) -> float | None:
    return x if x < float("inf") else None


def _seconds(plan: Plan, window: int, found: Steady) -> dict[str, Any]:
    ranged = plan.ranged[window]
    spans = {"step_s": ranged.step, "tokens_per_s": ranged.speed, "gain": plan.gain(window)}
    return {
        "system": found.system, "window": window, "step_s": found.step_s, "rollout_s": found.rollout_s,
        "phases_s": {name: found.phases_s[name] for name in PHASES}, "trained_tokens": found.trained,
        "tokens_per_s": found.tokens_per_s, "gain": plan.gain(window).middle,
        "ranges": {name: found._asdict() for name, found in spans.items()}, "updates": found.updates, "occupancy": found.occupancy,
        "mean_active": found.mean_active, "operations_per_byte": found.ops_per_byte,
        "prefix_tokens_trained": found.prefix_tokens_trained, "reprefilled_tokens": found.reprefilled_tokens,
        "preemptions": found.preemptions, "cut_weight": plan.choice.weights.get(window) if plan.choice else None,
        "steps_simulated": found.steps,
    }  # fmt: skip
