"""What a tensor-parallel group needs of a batcher: its ranks decode the same requests, and each answers for its share of them.

Each rank's engine is the group's engine, so that all of them see every token of the group. A response belongs to one of the ranks
until it has ended: that rank counts its tokens, saves it and has it verified; what ended may move to a rank with less to train on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from scale.context import context_of, refuse_other_rows
from scale.distributed import World
from tppo_ref.method.records import Prompt, Response, WindowSlice
from tppo_ref.method.slots import Segment, SlotSchedule
from tppo_ref.rollout.batcher import SampleStream, SuccessiveBatcher
from tppo_ref.rollout.engine import RolloutEngine
from tppo_ref.rollout.turns import Reply


class Group:
    """A rank's share of what its group's `batcher` decodes.

    part, parts   which of the engine's equal shares is this rank's. With parts = 1 everything is
    check         sees each window's own slices
    """

    def __init__(
        self,
        batcher: SuccessiveBatcher,
        *,
        part: int,
        parts: int,
        check: Callable[[Sequence[WindowSlice]], None] = lambda own: None,
    ):
        self.batcher, self.part, self.parts, self.check = batcher, part, parts, check
        self.num_generated_tokens = 0

    def owns(self, response: int) -> bool:
        """Whether this rank answers for the response with this id: the group's samples are dealt to its ranks in turn."""
        return response // self.batcher.stream.world % self.parts == self.part

    def window(
        self, engine: RolloutEngine, *, version: int = 0, on_end: Callable[[Response], None] | None = None
    ) -> list[WindowSlice]:
        """`SuccessiveBatcher.window`, of which this rank's share comes back and is told to `on_end`."""

        def told(response: Response) -> None:
            if on_end and self.owns(response.id):
                on_end(response)

        own = [s for s in self.batcher.window(engine, version=version, on_end=told) if self.owns(s.response.id)]
        self.check(own)
        self.num_generated_tokens += sum(s.stop - s.begin for s in own)
        return own

    @property
    def in_flight(self) -> dict[int, Response]:
        return {id: response for id, response in self.batcher.in_flight.items() if self.owns(id)}

    @property
    def slot_steps(self) -> float:
        return self.batcher.slot_steps / self.parts

    # What the group's engine did: the same on each of its ranks.

    @property
    def num_steps(self) -> int:
        return self.batcher.num_steps

    @property
    def segments(self) -> list[Segment]:
        return self.batcher.segments

    @property
    def slices(self) -> list[WindowSlice]:
        return self.batcher.slices

    @property
    def step_ends_s(self) -> list[float]:
        return self.batcher.step_ends_s

    def state_dict(self) -> dict[str, Any]:
        """As the batcher's; of the responses in flight and of the count this rank's share."""
        own = [response.state_dict() for response in self.in_flight.values()]
        share = {"part": [self.part, self.parts], "in_flight": own, "num_generated_tokens": self.num_generated_tokens}
        return self.batcher.state_dict() | share

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """What ranks saved, one state each: on the same groups at least this group's, else all ranks'.

        The shares of each engine are put together again; the batcher then goes on, or deals anew where the engines are others.
        """
        engines: dict[tuple[int, int], dict[str, Any]] = {}
        for state in states:
            key = (state["stream"]["rank"], state["stream"]["world"])
            whole = engines.setdefault(key, state | {"in_flight": [], "num_generated_tokens": 0})
            whole["in_flight"] = whole["in_flight"] + state["in_flight"]
            whole["num_generated_tokens"] += state["num_generated_tokens"]
        self.batcher.load_state_dict(list(engines.values()))
        here = (self.batcher.stream.rank, self.batcher.stream.world)
        own = [s for s in states if (s["stream"]["rank"], s["stream"]["world"]) == here and s["part"] == [self.part, self.parts]]
        if own:
            self.num_generated_tokens = own[0]["num_generated_tokens"]
        else:  # of this count only the sum over ranks means anything
            self.num_generated_tokens = self.batcher.num_generated_tokens if self.part == 0 else 0


def group_of(world: World, reply: Reply | None = None, now: Callable[[], float] = time.perf_counter) -> Callable[..., Group]:
    """tppo_ref's `MakeBatcher` for this rank: its engine draws every `num_engines`-th sample, of which it answers for its share.
    Ranks that hold the same rows answer for the same share. reply: the task's environment, which each rank of an engine asks;
    now: the clock of its decode steps."""
    same = {}
    if world.context_parallel > 1:
        same["check"] = partial(refuse_other_rows, context=context_of(world))

    def make(
        schedule: SlotSchedule, prompts: Sequence[Prompt], *, samples_per_prompt: int, seed: int, limit: int | None = None
    ) -> Group:
        stream = SampleStream(prompts, samples_per_prompt=samples_per_prompt, seed=seed, limit=limit, rank=world.engine,
                              world=world.num_engines)  # fmt: skip
        batcher = SuccessiveBatcher(schedule, stream, run_seed=seed, reply=reply, now=now)
        return Group(batcher, part=world.part, parts=world.parts, **same)

    return make
