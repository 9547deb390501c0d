"""The best setting of each method for a model, devices and lengths: what `python -m sim plan --best` recommends.

    Question(shape, gpu, ...)      what is fixed
    search(question) -> Answer     every method at its preferred setting, fastest first, and the one that is recommended

Searched: tensor parallelism, slots, windows, their refill, and with them how many mini-batches a step has, since every update
trains the same number of tokens, `mini_batch` mean responses. The engine's share is what the trainer leaves, less a margin: a
smaller one only shrinks the cache.
A setting counts if it fits, makes one to `most_updates` updates between two syncs, and, where cut responses train, its window's
weight of the cut (cuts.py) is within the tolerance.

Of a method's settings that are within `slack` of its fastest the one with the smallest lag is preferred, and so among the methods:
updates a day follow from tokens per second, and what else a step's size changes is how fresh its tokens are.

The whole grid is searched by branch and bound: a place is left out only where its ceiling (ceiling.py) is below what was found.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sim.clock.ceiling import ceiling
from sim.clock.cluster import Setup
from sim.clock.compare import SLOTS
from sim.clock.cuts import cut_weight
from sim.clock.distributions import Lengths
from sim.clock.efficiency import Efficiency
from sim.clock.fitting import problems, tensor_parallel_sizes, with_utilisation
from sim.clock.footprint import Budget, bytes_per_phase
from sim.clock.hardware import Accelerator, Layout, ModelShape, Roofline
from sim.clock.methods import ONCE, Method, method, routine, small_critic
from sim.clock.ranges import Ranged
from tppo_ref.method.slots import Refill

RUNNABLE = {
    "tppo": ("tppo+c", "tppo+cf", "tppo", "tppo+f", "tppo+ac", "tppo+acf"),
    "partial-is": ("partial-is+c", "partial-is", "partial-is+c/none"),
    "ppo": ("ppo+c", "ppo", "ppo/none"),
}
"""By kind, the methods that tppo_ref and scale/ run; without a critic they are rloo-window and rloo there."""
COSTS_LEARNING = frozenset("ab")
"""Levers that were measured to cost learning (a constant prefix, docs/log.md): such a method is recommended only by its name."""
ELSEWHERE = ("partial+c", "partial+c/none", "tail+c", "async:4")
"""Methods that need another trainer, for comparison."""
DOUBT = 0.02
"""A ceiling's own, as a share: it is of mean rows."""
MOST_APART = 4
"""Updates of a step of asynchronous training: more make it no faster once its trainer never waits, and its tokens older."""
PROBE_PROMPTS, PROBE_TOKENS = 8, 16  # scale/'s start-up
MARGIN = 0.02  # of a device, left for what formulas do not see (footprint.UNSEEN): the dry run traces 1.4 GB of it


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """What is fixed. Tokens, devices, responses as the names say."""

    shape: ModelShape
    gpu: Accelerator
    num_devices: int
    lengths: Lengths
    prompt_tokens: int
    longest_prompt: int
    """In tokens: memory is planned for it, `prompt_tokens` is the mean."""
    samples: int
    mini_batch: int
    """Mean responses whose tokens an update trains."""
    most_updates: int
    tps: tuple[int, ...] = ()
    """Tensor parallelism to look at; none: every one that fits."""
    windows: tuple[int, ...] = ()
    slack: float = 0.03
    tolerance: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    alpha: float = 0.05
    offload: bool = False
    logit_chunk: int = 0
    seed: int = 0

    @functools.cached_property
    def mean(self) -> float:
        """Mean tokens of a response."""
        return self.lengths.mean_tokens()

    @property
    def update_tokens(self) -> int:
        return max(1, round(self.mini_batch * self.mean))

    @property
    def budget(self) -> Budget:
        return Budget(
            sequence_tokens=self.lengths.cap + self.longest_prompt, offload=self.offload,
            probe_tokens=PROBE_PROMPTS * (self.longest_prompt + PROBE_TOKENS),
            logit_chunk_tokens=self.logit_chunk or max(1, 2**27 // self.shape.vocab_size),
        )  # fmt: skip

    @functools.cached_property
    def layouts(self) -> dict[int, Layout]:
        """By tensor parallelism, what fits. ValueError where nothing does."""
        sizes = tensor_parallel_sizes(self.shape, self.num_devices)
        found = {tp: self.layout(tp) for tp in sizes if not self.tps or tp in self.tps}
        fitting = {tp: lay for tp, lay in found.items() if not problems(self.shape, lay, self.budget, self.gpu)}
        if not fitting:
            raise ValueError(f"{self.shape.name} does not fit on {self.num_devices} x {self.gpu.name} with responses of "
                             f"{self.lengths.cap:,} tokens; `sim plan` without --best says what would make it fit")  # fmt: skip
        return fitting

    def layout(self, tp: int, engine_devices: int = 0) -> Layout:
        per_node = min(8, self.num_devices)
        plain = Layout(
            num_devices=self.num_devices - engine_devices, num_engine_devices=engine_devices or None, tensor_parallel=tp,
            micro_batch_tokens=self.budget.sequence_tokens, devices_per_node=per_node,
        )  # fmt: skip
        if engine_devices:
            return plain
        fitting = with_utilisation(self.shape, plain, self.budget, self.gpu)
        return dataclasses.replace(fitting, memory_utilisation=round(max(0.01, fitting.memory_utilisation - MARGIN), 2))

    @functools.cached_property
    def weights(self) -> dict[int, float]:
        """Weight of the cut of each window to look at."""
        cap = self.lengths.cap
        windows = self.windows or sorted({max(1, cap * part // 12) for part in (1, 2, 4, 6)})
        return {w: cut_weight(self.lengths, w, gamma=self.gamma, lam=self.lam, alpha=self.alpha) for w in windows}

    @property
    def allowed(self) -> tuple[int, ...]:
        """Windows within the tolerance; where there is none, the one whose cuts weigh least."""
        within = tuple(w for w, weight in self.weights.items() if weight <= self.tolerance)
        return within or (min(self.weights, key=self.weights.__getitem__),)


class Setting(NamedTuple):
    """A place of the grid. `window` of windowed methods, `responses` per step of PPO, `engine_devices` of asynchronous training."""

    tp: int
    slots: int
    window: int = 0
    responses: int = 0
    refill: Refill = "immediate"
    engine_devices: int = 0


@dataclasses.dataclass(frozen=True)
class Found:
    """A method at its preferred setting."""

    method: Method
    setting: Setting
    layout: Layout
    system: Ranged
    phases: dict[str, dict[str, float]]
    """Bytes on one device: footprint.bytes_per_phase."""

    @property
    def speed(self) -> float:
        """Trained tokens per second, by the middle efficiencies."""
        return self.system.middle.tokens_per_s

    @property
    def costs_learning(self) -> bool:
        """Whether it has a lever that was measured to."""
        return bool(set(self.method.levers) & COSTS_LEARNING)

    @property
    def by_name_only(self) -> bool:
        """It learns otherwise than those beside it, at a cost or at one that nobody measured: never recommended unasked."""
        return self.costs_learning or self.method.critic == "none"

    @property
    def mini_batches(self) -> int:
        """Updates of a step."""
        return max(1, round(self.system.middle.updates))


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was found, fastest first; those that this repository does not run apart."""

    question: Question
    found: tuple[Found, ...]
    elsewhere: tuple[Found, ...]
    recommended: Found

    def of_kind(self, kind: str) -> Found | None:
        """The fastest of a kind, among those that may be recommended unasked."""
        return next((one for one in self.found if one.method.kind == kind and not one.by_name_only), None)

    def named(self, name: str) -> Found | None:
        return next((found for found in (*self.found, *self.elsewhere) if found.method.name == name), None)


def search(question: Question, wanted: str = "all", *, elsewhere: bool = True) -> Answer:
    """Every method at its preferred setting.

    wanted   "all", or what alone may be recommended: a kind ("tppo", "partial-is", "ppo") or a method by its name
    """
    wanted = ONCE if wanted == "tppo-once" else wanted
    if wanted not in ("all", *RUNNABLE, *itertools.chain(*RUNNABLE.values())):
        known = ", ".join(("all", *RUNNABLE, *itertools.chain(*RUNNABLE.values())))
        raise ValueError(f"method: got {wanted!r}; expected one of {known}")
    if wanted.endswith("/none") and question.samples < 2:
        raise ValueError(f"samples: got {question.samples} with {wanted}; expected at least 2 answers to each prompt")
    grids = {name: list(settings_of(question, kind)) for kind, names in RUNNABLE.items() for name in names
             if question.samples > 1 or method(name).critic != "none"}  # fmt: skip
    grids |= {name: grid_outside(question, name) for name in ELSEWHERE if elsewhere}
    methods = [one for name, systems in explored(question, grids).items() if (one := chosen(question, name, systems))]
    found = [one for one in methods if one.method.name not in ELSEWHERE]
    candidates = [one for one in found if one.method.name == wanted or
                  (wanted in ("all", one.method.kind) and not one.by_name_only)]  # fmt: skip
    if not candidates:
        raise ValueError(f"method: got {wanted!r}, of which no setting trains a mini-batch of {question.mini_batch} responses in a "
                         f"step of at most {question.most_updates} updates; change --mini-batch or --window")  # fmt: skip
    others = [one for one in methods if one.method.name in ELSEWHERE]
    found.sort(key=lambda one: -one.speed)
    others.sort(key=lambda one: -one.speed)
    near = [one for one in candidates if one.speed >= (1 - question.slack) * max(one.speed for one in candidates)]
    return Answer(question, tuple(found), tuple(others), min(near, key=lambda one: freshness(one.system)))


def explored(question: Question, grids: Mapping[str, Sequence[Setting]]) -> dict[str, dict[Setting, Ranged]]:
    """Of each method the places of its grid that could be its preferred one, run.

    Branch and bound: places in the order of their ceilings (ceiling.py), and none whose ceiling is below what matters. A place is
    run for all methods at once, since those that decode alike share its course (course.py).
    """
    ceilings: dict[Setting, dict[str, float]] = {}
    for name, grid in grids.items():
        for at in grid:
            setup = setup_of(question, at, Efficiency(), method(name).critic)
            ceilings.setdefault(at, {})[name] = ceiling(method(name), setup, window=at.window, refill=at.refill)
    found: dict[str, dict[Setting, Ranged]] = {name: {} for name in grids}
    fastest = dict.fromkeys(grids, 0.0)
    for at in sorted(ceilings, key=lambda at: max(ceilings[at].values()), reverse=True):
        for name in (name for name, most in ceilings[at].items() if most >= (1 - question.slack - DOUBT) * fastest[name]):
            run = run_at(question, method(name), at)
            if run.middle.updates <= question.most_updates + 0.5:
                found[name][at], fastest[name] = run, max(fastest[name], run.middle.tokens_per_s)
    return found


def chosen(question: Question, name: str, systems: dict[Setting, Ranged]) -> Found | None:
    """A method at the place that it prefers of these; None where there is none."""
    if not systems:
        return None
    at = preferred(systems, question.slack)
    return make(question, method(name), at, systems[at])


def preferred(systems: dict[Setting, Ranged], slack: float) -> Setting:
    """The freshest of those within `slack` of the fastest."""
    fastest = max(run.middle.tokens_per_s for run in systems.values())
    near = [at for at, run in systems.items() if run.middle.tokens_per_s >= (1 - slack) * fastest]
    return min(near, key=lambda at: freshness(systems[at]))


def freshness(system: Ranged) -> tuple[float, float]:
    """Updates between a token's sampling and its training, then seconds of a step: smaller is better."""
    return system.middle.lag_updates, system.middle.step_s


def settings_of(question: Question, kind: str) -> Iterator[Setting]:
    """The grid of a runnable kind: what fits, with whole groups of samples, and one to `most_updates` updates in a step."""
    most = question.most_updates * question.mini_batch
    for tp, layout in question.layouts.items():
        for slots in _slots(question, layout.num_replicas):
            if kind == "ppo":
                if slots <= most:
                    yield Setting(tp, slots, responses=most)
                continue
            for window in question.allowed if kind == "tppo" else question.weights:
                updates = slots * min(window, question.lengths.cap) / question.update_tokens
                if 0.9 <= updates <= question.most_updates + 0.5 and window < question.lengths.cap:
                    yield Setting(tp, slots, window)
                    yield Setting(tp, slots, window, refill="step")


def _slots(question: Question, replicas: int) -> list[int]:
    """Decoding places: powers of 2, divisible by the replicas and the samples of a prompt."""
    smallest = max(question.samples, replicas)
    return [n for n in (*(2**k for k in range(4, 8)), *SLOTS) if n >= smallest and n % replicas == 0 and n % question.samples == 0]


def grid_outside(question: Question, name: str) -> list[Setting]:
    """The grid of a method that this repository does not run; empty where it does not fit."""
    which, grid = method(name), []
    engines = question.num_devices // 2 if which.kind == "async" else 0
    if which.kind == "async" and engines == 0:
        return []
    for tp in question.layouts:
        layout = question.layout(tp, engines) if engines % tp == 0 else None
        if layout is None or (engines and problems(question.shape, layout, question.budget, question.gpu)):
            continue
        for slots in _slots(question, layout.num_replicas):
            most = question.most_updates * question.mini_batch
            responses = most if which.kind == "ppo" else 0
            responses = max(1, slots // 2) if engines else responses
            batch = responses or which.batch(slots)
            most = min(most, MOST_APART * question.mini_batch) if engines else most
            if 0.9 * question.mini_batch <= batch <= 1.05 * most and (which.kind != "ppo" or slots <= batch):
                grid.append(Setting(tp, slots, responses=responses, engine_devices=engines))
    return grid


def setup_of(question: Question, at: Setting, efficiency: Efficiency, critic: str = "own") -> Setup:
    """The clock's setup for a place of the grid."""
    layout = question.layout(at.tp, at.engine_devices) if at.engine_devices else question.layouts[at.tp]
    costs = Roofline(accelerator=question.gpu, model=question.shape, layout=layout, efficiency=efficiency,
                     critic=small_critic(question.shape) if critic == "small" else None)  # fmt: skip
    return Setup(
        lengths=question.lengths, prompt_tokens=question.prompt_tokens, costs=costs, slots=at.slots, ranks=layout.num_devices,
        num_replicas=layout.num_replicas, train_costs=costs if at.engine_devices else None, seed=question.seed,
        samples_per_prompt=question.samples, update_tokens=question.update_tokens,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def run_at(question: Question, which: Method, at: Setting) -> Ranged:
    """A method at a place; each level of efficiency runs when it is asked for."""

    def run(efficiency: Efficiency) -> Any:
        setup = setup_of(question, at, efficiency, which.critic)
        return routine(which, setup, window=at.window, responses=at.responses, refill=at.refill)

    return Ranged(run, apart=at.engine_devices > 0)


def make(question: Question, which: Method, at: Setting, system: Ranged) -> Found:
    layout = question.layout(at.tp, at.engine_devices) if at.engine_devices else question.layouts[at.tp]
    return Found(which, at, layout, system, bytes_per_phase(question.shape, layout, question.budget, accelerator=question.gpu))
