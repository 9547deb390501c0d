"""What the phases of a step take: seconds, floating-point operations, memory of the device."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import torch

from tppo_ref.loop.parallel import Parallel, per
from tppo_ref.loop.peaks import peak_flops_per_s
from tppo_ref.method.records import WindowSlice
from tppo_ref.rollout.engine import RolloutEngine
from tppo_ref.rollout.flops import ModelFlops, flops_of

COMPUTING = ("rollout", "forward", "policy", "value")
"""Phases with FLOPs and MFU."""

HOLDING = (*COMPUTING, "sync")
"""Phases with memory."""


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class PhaseClock:
    """Seconds by phase of one step: `with clock("rollout"): ...`.

    kind   wall: seconds that go by; cpu: those in which this process computes. Its threads are added up, its children (verifiers)
           and devices are not seen, waiting costs nothing
    """

    def __init__(self, kind: Literal["wall", "cpu"] = "wall") -> None:
        self.now = CLOCKS[kind]
        self.begin = self.now()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = self.now()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + self.now() - begin

    def metrics(self) -> dict[str, float]:
        step_s = self.now() - self.begin
        parts = {f"time/{phase}_s": seconds for phase, seconds in self.seconds.items()}
        return parts | {"time/step_s": step_s, "time/other_s": step_s - sum(parts.values())}


class Held(NamedTuple):
    """Bytes of a device in one phase: the most that tensors took, the most that torch's allocator held for them, and what everybody
    together holds at the phase's end, as the driver says it."""

    allocated: float
    reserved: float
    used: float


NO_COUNTERS = Held(-1.0, -1.0, -1.0)  # and no NaN, of which several ranks have no maximum


class Memory(Protocol):
    """The counters of a device's memory."""

    def begin(self) -> None:
        """Forget the peaks: a phase begins."""

    def end(self) -> Held:
        """What was held since; waits for what the device still has to do."""


class CudaMemory:
    """`Memory` of a CUDA device.

    What vLLM's sleep gives back, the allocator's counters go on counting: the driver's number is the one that the device's size
    limits. It has no peak, but needs none: the allocator keeps what it once reserved.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def begin(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def end(self) -> Held:
        torch.cuda.synchronize(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        return Held(torch.cuda.max_memory_allocated(self.device), torch.cuda.max_memory_reserved(self.device), total - free)


class Witness(Protocol):
    """Told of what a step does, by whoever wants to watch one: `Profiler` does."""

    def begin(self, phase: str) -> None: ...

    def call(self) -> None:
        """A pass of a model, or a decode step of the engine, is about to begin."""

    def end(self) -> None: ...


class Watched:
    """An engine whose decode steps are told to a witness."""

    def __init__(self, engine: RolloutEngine, witness: Witness):
        self.engine, self.witness = engine, witness

    def step(self) -> Any:
        self.witness.call()
        return self.engine.step()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


class Meters:
    """What the phases of a step take: `begin()` it, `with meters("policy"): ...` its phases, then `metrics()`.

    models     the policy first. Passes are counted where they are made, by a hook on each model, from the tokens that it is fed
    peak       FLOP/s of one device; 0: by its name. None: its name is not known, and no MFU is said
    memory     None on a device that has no counters
    """

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        parallel: Parallel,
        *,
        clock: Literal["wall", "cpu"],
        device: torch.device | str,
        peak: float = 0.0,
        memory: Memory | None = None,
    ):
        self.device = device = torch.device(device)
        self.parallel, self.clock_kind, self.memory = parallel, clock, memory
        self.witness: Witness | None = None
        self.peak = peak or (peak_flops_per_s(torch.cuda.get_device_name(device)) if device.type == "cuda" else None)
        if memory is None and device.type == "cuda":
            self.memory = CudaMemory(device)
        self.phase: str | None = None
        found = [flops_of(model) for model in models]
        self.flops_of_policy = None if None in found else found[0]
        for model, flops in zip(models, found, strict=True):
            model.register_forward_pre_hook(self._hook(flops))
        self.begin()

    def begin(self) -> None:
        """A step begins."""
        self.clock, self.flops, self.held = PhaseClock(self.clock_kind), defaultdict[str, float](float), dict[str, Held]()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.phase = phase
        if self.memory:
            self.memory.begin()
        if self.witness:
            self.witness.begin(phase)
        try:
            with self.clock(phase):
                yield
                if self.memory:
                    self.held[phase] = self.memory.end()
        finally:
            self.phase = None
            if self.witness:
                self.witness.end()

    def _hook(self, flops: ModelFlops | None) -> Callable[..., None]:
        """A function, not a method: who copies a model with its hooks must not copy the meters."""

        def fed(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
            if self.phase is None or not arguments:
                return
            if self.witness:
                self.witness.call()
            if flops is not None:
                self.flops[self.phase] += flops.of_batch(arguments[0], backward=torch.is_grad_enabled())

        return fed

    def decoding(self, engine: RolloutEngine) -> RolloutEngine:
        """The engine, with its decode steps in sight where somebody watches."""
        return Watched(engine, self.witness) if self.witness else engine

    def decoded(self, slices: Sequence[WindowSlice]) -> None:
        """A window was decoded."""
        if self.flops_of_policy is not None:
            self.flops["rollout"] += self.flops_of_policy.of_decoding(slices)

    def metrics(self) -> dict[str, float]:
        """The time/, flops/, mfu/ and memory/ metrics of the step. FLOPs are added up over ranks, seconds and bytes are the largest
        of any rank's."""
        known = self.flops_of_policy is not None
        flops = self.parallel.sum(self.flops[phase] if known else math.nan for phase in COMPUTING)
        held = [x for phase in HOLDING for x in self.held.get(phase, NO_COUNTERS)]
        most = self.parallel.max([*(self.clock.seconds.get(phase, 0.0) for phase in COMPUTING), *held])
        peak = self.parallel.loss_scale * (self.peak or math.nan)  # as many as average their gradients, also where some share rows
        metrics = self.clock.metrics()
        for phase, number, seconds in zip(COMPUTING, flops, most, strict=False):
            metrics |= {f"flops/{phase}": number, f"mfu/{phase}": per(number, seconds) / peak}
        names = [f"memory/{phase}_{what}" for phase in HOLDING for what in Held._fields]
        return metrics | {name: math.nan if x < 0 else x for name, x in zip(names, most[len(COMPUTING) :], strict=True)}
