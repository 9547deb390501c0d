"""`python -m sim plan --best`: the recommended setting as a config, beside the runners-up, for people or as JSON.

What is printed is the config itself, its head a comment with the predictions, so that `sim plan --best > mine.yaml` is a run:

    python -m sim plan --best --model Qwen2.5-32B --gpus 64xH100 --lengths runs/mine --out mine.yaml
    python scale/launch.py --dry-run --config mine.yaml

The JSON (`schema`: "tppo-sim-best/1"): `inputs`, `doubts` [lines], `recommended` (a method's name), `advice` [lines], `config`
(nested), and `methods`, an entry each: `as_row`. `gain` is over PPO at its best.
"""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any

from sim.clock.footprint import totals
from sim.clock.hardware import cluster, model
from sim.clock.lengths import load_lengths
from sim.clock.plan import PlanConfig, check
from sim.clock.ranges import Range
from sim.clock.run_config import as_tree, as_yaml, fields_of
from sim.clock.run_lengths import doubts
from sim.clock.search import Answer, Found, Question, search

WIDTH = 128


def question_of(config: PlanConfig) -> Question:
    """What the options fix. ValueError for what is unknown or senseless."""
    check(config)
    shape, (num_devices, gpu) = model(config.model), cluster(config.gpus)
    if num_devices > 8 and num_devices % 8:
        raise ValueError(f"gpus: got {config.gpus}; expected up to 8 devices, or whole machines of 8")
    return Question(
        shape=shape, gpu=gpu, num_devices=num_devices, prompt_tokens=config.prompt_tokens, longest_prompt=config.longest_prompt,
        lengths=load_lengths(config.lengths, config.cap or None, field=config.field).at_step(config.train_step),
        samples=config.samples, mini_batch=config.mini_batch, most_updates=config.updates, windows=config.window,
        tps=(config.tp,) if config.tp else (), slack=config.slack, tolerance=config.tolerance, gamma=config.gamma, lam=config.lam,
        alpha=config.alpha, offload=config.offload, logit_chunk=config.logit_chunk, seed=config.seed,
    )  # fmt: skip


def answer(config: PlanConfig) -> Answer:
    return search(question_of(config), config.method)


def gain(found: Answer, one: Found) -> Range:
    """Trained tokens per second over PPO at its own best, old log-probabilities recomputed."""
    ppo = found.named("ppo")
    assert ppo is not None  # search looks at it always
    return one.system.gain(ppo.system)


def peak(one: Found) -> float:
    """Bytes on one device in the largest phase."""
    return max(totals(one.phases).values())


def advice(found: Answer) -> list[str]:
    """What the recommendation means, and what to use instead of what was asked for."""
    chosen, said = found.recommended, []
    speed = f"{chosen.speed:,.0f} trained tokens per second, {gain(found, chosen).text()} PPO at its best"
    said.append(f"Recommended: {chosen.method.name}, {speed}, {chosen.system.middle.step_s:,.0f} s per step.")
    tppo, partial = chosen if chosen.method.kind == "tppo" else found.of_kind("tppo"), found.of_kind("partial-is")
    if tppo and partial:
        ratio = partial.system.gain(tppo.system)
        if ratio.middle > 1 and chosen.method.kind != "tppo":
            what = (
                "Use partial rollouts instead of T-PPO" if chosen.method.kind == "partial-is" else "T-PPO is not the fastest here"
            )
            said.append(f"{what}: partial rollouts bring {ratio.text()} {tppo.method.name}'s tokens, with whole responses.")
        elif ratio.middle > 1:
            said.append(f"Partial rollouts ({partial.method.name}) would bring {ratio.text()} {tppo.method.name}'s tokens, with "
                        "whole responses: --method partial-is writes that config.")  # fmt: skip
        else:
            said.append(f"Partial rollouts ({partial.method.name}) would bring {ratio.text()} {tppo.method.name}'s tokens.")
    faster = [one for one in (*found.found, *found.elsewhere) if one.speed > chosen.speed]
    if costly := [one for one in faster if one.costs_learning]:
        said.append(f"Faster, but a constant prefix was measured to cost learning (docs/log.md): {_over(chosen, costly)}; --method "
                    "takes the name.")  # fmt: skip
    if alone := [one for one in faster if one in found.found and one.method.critic == "none"]:
        said.append(f"Faster, but without a value model, and how it learns was not compared (docs/critic_free.md): "
                    f"{_over(chosen, alone)}; --method takes the name.")  # fmt: skip
    if chosen.method.kind == "ppo":
        said.append("Nothing beats synchronous PPO here: many responses per step hide the longest, and the cache is full.")
    if outside := [one for one in faster if one in found.elsewhere]:
        said.append(f"Faster, but not in this repository: {_over(chosen, outside)}.")
    if chosen.method.price:
        said.append(f"Not in these seconds: {chosen.method.price}.")
    return said


def _over(chosen: Found, others: list[Found]) -> str:
    """Names, each with its tokens per second over the chosen one's."""
    return ", ".join(f"{one.method.name} {one.system.gain(chosen.system).text()}" for one in others)


HEADS = (("method", -17), ("TP", 3), ("slots", 6), ("window", 7), ("updates", 8), ("tokens/s (low to high)", 27),
         ("gain (low to high)", 22), ("s/step (low to high)", 23), ("a day", 6), ("lag", 5), ("GB", 5))  # fmt: skip
COLUMNS = " ".join(f"{name:<{-width}}" if width < 0 else f"{name:>{width}}" for name, width in HEADS)


def row(found: Answer, one: Found) -> str:
    at, system = one.setting, one.system
    window = f"{at.window:,}{'*' * (at.refill == 'step')}" if at.window else f"x{at.responses:,}" if at.responses else "-"
    return (f"{one.method.name:17} {at.tp:>3} {at.slots:>6,} {window:>7} {system.middle.updates:>8.1f} "
            f"{_text(system.speed):>27} {gain(found, one).text():>22} {_text(system.step):>23} "
            f"{system.middle.updates_per_day:>6,.0f} {system.middle.lag_updates:>5.1f} {peak(one) / 1e9:>5.0f}")  # fmt: skip


def _text(number: Range) -> str:
    return f"{number.middle:,.0f} ({number.low:,.0f} to {number.high:,.0f})"


def report(config: PlanConfig, found: Answer) -> list[str]:
    """The table for people: lines of the config's head."""
    asked = found.question
    before = [
        f"{asked.shape.name} on {asked.num_devices} x {asked.gpu.name}, responses {asked.lengths.name or config.lengths}: mean "
        f"{asked.mean:,.0f} tokens, cap {asked.lengths.cap:,}; an update trains {asked.mini_batch} mean responses' tokens.",
        *(f"Doubt: {doubt}." for doubt in doubts(asked.lengths)),
        *advice(found),
    ]  # fmt: skip
    after = [
        f"Each at its best with at most {asked.most_updates} updates a step; of those within {100 * asked.slack:g} % of the "
        "fastest, the freshest. Gain: trained tokens per second over `ppo`. Window: xN is N responses per step; * has freed "
        "slots wait for the next window. A day: updates. Lag: updates between a token's "
        "sampling and its training. GB: the largest phase on a device. Ranges: what the stated "
        "efficiencies allow (sim/clock/efficiency.py); nothing was measured.",
    ]  # fmt: skip
    rows = [COLUMNS, *(row(found, one) for one in found.found)]
    if found.elsewhere:
        rows += ["not in this repository:", *(row(found, one) for one in found.elsewhere)]
    return [*_wrapped(before), "", *rows, "", *_wrapped(after)]


def _wrapped(lines: list[str]) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(line, WIDTH)]


MARKS = ("Marks of the values, as in docs/config.md: [S] the paper's 32B run, [P] its authors' port, [V] and [2] other sources, "
         "[I] inferred, [O] ours. Nobody here has tried them on such devices.")  # fmt: skip


def text(config: PlanConfig, found: Answer) -> str:
    """The config with its predictions as its head: YAML."""
    head = [*_wrapped([f"Made by `{command(config)}`."]), *report(config, found), *_wrapped([MARKS])]
    return "".join(f"# {line}".rstrip() + "\n" for line in head) + as_yaml(fields_of(found.question, found.recommended))


def command(config: PlanConfig) -> str:
    """The command line that asks for it again."""
    parts = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default or field.name in ("best", "out", "json"):
            continue
        shown = " ".join(map(str, value)) if isinstance(value, tuple) else "" if value is True else str(value)
        parts.append(f"--{field.name.replace('_', '-')} {shown}".rstrip())
    return " ".join(["python -m sim plan --best", *parts])


def as_json(config: PlanConfig, found: Answer) -> dict[str, Any]:
    """See the file's docstring."""
    return {
        "schema": "tppo-sim-best/1",
        "inputs": dataclasses.asdict(config) | {"cap": found.question.lengths.cap},
        "doubts": doubts(found.question.lengths), "recommended": found.recommended.method.name, "advice": advice(found),
        "config": as_tree(fields_of(found.question, found.recommended)),
        "methods": [as_row(found, one) for one in (*found.found, *found.elsewhere)],
    }  # fmt: skip


def as_row(found: Answer, one: Found) -> dict[str, Any]:
    """A method's entry."""
    at, system = one.setting, one.system
    per_day = [86_400 * system.middle.updates / seconds for seconds in (system.step.high, system.step.middle, system.step.low)]
    ranges = {"tokens_per_s": system.speed, "step_s": system.step, "updates_per_day": Range(*per_day), "gain": gain(found, one)}
    return {
        "method": one.method.name, "runnable": one in found.found, "tensor_parallel": at.tp, "engine_devices": at.engine_devices,
        "slots": at.slots, "window": at.window, "responses": at.responses, "refill": at.refill, "mini_batches": one.mini_batches,
        "share": one.layout.memory_utilisation, "peak_bytes": peak(one), "cut_weight": found.question.weights.get(at.window),
        **{name: number._asdict() for name, number in ranges.items()}, "lag_updates": system.middle.lag_updates,
        "occupancy": system.middle.occupancy, "preemptions": system.middle.preemptions, "price": one.method.price,
    }  # fmt: skip
