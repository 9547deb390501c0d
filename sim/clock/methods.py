"""Ways to train side by side, by one name each, and what each of them costs that no clock sees.

method("ppo")             synchronous PPO; with more responses per step than slots it refills them within the step
method("tppo")            the paper's
method("tppo+acd")        with levers; "tppo-once" is tppo+cf, as in tppo_ref
method("partial-is")      partial rollouts by windows, as tppo_ref has them: what ended trains, whole; the rest goes on
method("partial-is/none") the same with groups instead of a critic: what ended waits for its group
method("partial+c")       partial rollouts, old log-probabilities from the engine
method("tail"), method("async:4")    tail batching; asynchronous with a staleness of at most 4 syncs
method("ppo/small"), method("partial/none")   a critic of about a quarter of the policy's size; groups instead of a critic, of which
                          partial rollouts as others have them train what has ended, without a wait
"""

from __future__ import annotations

import dataclasses
import re
from typing import Literal, get_args

from sim.clock.cluster import Recipe, Setup
from sim.clock.specs import MODELS, ModelShape
from sim.clock.steady import SEGMENTS, Steady, few, in_routine, refilled, sampled, steady, synchronous
from sim.clock.systems import Asynchronous, PartialRollouts, TailBatching
from tppo_ref.method.slots import Refill

Kind = Literal["ppo", "tppo", "partial-is", "partial", "tail", "async"]
Critic = Literal["own", "small", "none"]

LEVERS = {
    "a": ("earlier tokens forward only", "no gradient through the earlier tokens' keys and values"),
    "b": ("earlier keys and values kept from the log-probability pass", "as a, and they are as old as the step"),
    "c": ("old log-probabilities from the engine", "engine and trainer must agree, since a gap between them counts as an update"),
    "d": ("the critic reads the window only", "what it knew of earlier tokens is from its last pass"),
    "f": ("a cut response trains once it has a window of untrained tokens", "some tokens are one sync old"),
}
"""What each lever does, and its price."""

ONCE = "tppo+cf"
"""The levers of tppo_ref's method tppo-once."""

PRICES: dict[Kind, str] = {
    "ppo": "",
    "tppo": "cut responses train on values at the cut (docs/theory.md, P4)",
    "partial-is": "responses hold tokens of several policies",
    "partial": "responses hold tokens of several policies",
    "tail": "what was given up is sampled again; long responses come in rounds of their own",
    "async": "responses are up to the staleness old; two sets of devices",
}
IN_FLIGHT: dict[Kind, float] = {"partial": 1.5, "tail": 1.25}
"""Requests in flight per response of the batch [O]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """See the file's docstring. `staleness` is asynchronous training's, in syncs."""

    name: str
    kind: Kind
    levers: str = ""
    critic: Critic = "own"
    staleness: int = 0

    @property
    def recipe(self) -> Recipe:
        """What training feeds."""
        return Recipe(
            prefix="forward" if "a" in self.levers else "kept" if "b" in self.levers else "full",
            logprobs="engine" if "c" in self.levers else "recompute",
            values="window" if "d" in self.levers else "row", critic=self.critic != "none",
        )  # fmt: skip

    @property
    def price(self) -> str:
        """What the clock does not see, in words."""
        parts = [PRICES[self.kind], *(LEVERS[lever][1] for lever in self.levers)]
        parts += {"own": [], "small": ["a smaller critic"], "none": ["no critic: several answers to each prompt"]}[self.critic]
        return "; ".join(part for part in parts if part)

    def batch(self, slots: int) -> int:
        """Responses that train in a step of so many decoding places, where the method does not take their number."""
        return max(1, round(slots / IN_FLIGHT.get(self.kind, 1.0)))


def method(spec: str) -> Method:
    """A method by its name. ValueError for one that is unknown or makes no sense."""
    written = spec.replace("tppo-once", ONCE)
    found = re.fullmatch(r"([\w-]+)(?::(\d+))?(?:\+([a-z]+))?(?:/(\w+))?", written)
    kind, staleness, levers, critic = found.groups() if found else (spec, None, None, None)
    levers, critic = levers or "", critic or "own"
    if kind not in get_args(Kind) or critic not in get_args(Critic) or (staleness is not None and kind != "async"):
        raise ValueError(f"method: got {spec!r}; expected one of {', '.join(get_args(Kind))}, with levers as in tppo+acd, a critic "
                         "as in ppo/small or ppo/none, a staleness as in async:4")  # fmt: skip
    allowed = set(LEVERS) if kind == "tppo" else {"c"}
    if not set(levers) <= allowed or len(set(levers)) < len(levers):
        raise ValueError(f"method: got {spec!r}; expected levers out of {', '.join(sorted(allowed))}, each once")
    if kind == "tppo" and critic == "none":
        raise ValueError(f"method: got {spec!r}; expected a critic: a response that is cut has no reward yet, and nothing else to "
                         "learn from; partial/none trains it when it has ended")  # fmt: skip
    lag = int(staleness or 1) if kind == "async" else 0
    made = Method(name=spec, kind=kind, levers=levers, critic=critic, staleness=lag)  # type: ignore[arg-type]
    made.recipe.__post_init__()  # levers that exclude each other
    return made


def small_critic(policy: ModelShape) -> ModelShape:
    """The largest built-in model with at most a quarter of the policy's parameters; ValueError where there is none."""
    smaller = [shape for shape in MODELS.values() if 4 * shape.num_parameters <= policy.num_parameters]
    if not smaller:
        raise ValueError(f"critic: got 'small' beside {policy.name}; expected a policy of at least four times the smallest model")
    return max(smaller, key=lambda shape: shape.num_parameters)


def routine(
    which: Method, whole: Setup, *, window: int = 0, responses: int = 0, refill: Refill = "immediate", replicas: int = 0,
    segments: int = SEGMENTS,
) -> Steady:  # fmt: skip
    """A method long after its start, on few replicas that stand for all but for PPO, whose longest response counts.

    window      of tppo and partial-is, as is `refill`
    responses   per step, of ppo and async; 0: one per slot
    segments    of windowed methods: how much is simulated, about
    """
    setup = dataclasses.replace(whole, recipe=which.recipe)
    if which.kind == "tppo":
        return in_routine(setup, window, refill=refill, replicas=replicas, segments=segments,
                          min_new_tokens=window * ("f" in which.levers))  # fmt: skip
    if which.kind == "partial-is":
        return in_routine(setup, window, train_on="ended", refill=refill, replicas=replicas, segments=segments)
    if which.kind == "ppo":
        return synchronous(setup) if responses in (0, setup.slots) else refilled(setup, responses)
    some, scale = sampled(setup, replicas or few(setup))
    if which.kind == "async":
        batch = max(1, round((responses or whole.slots) / scale))
        system = Asynchronous(some, batch_responses=batch, max_staleness=which.staleness)
        return steady(system, warm=which.staleness + 4, steps=8, scale=scale)
    kind = PartialRollouts if which.kind == "partial" else TailBatching
    return steady(kind(some, batch_responses=which.batch(some.slots)), warm=6, steps=8, scale=scale)
