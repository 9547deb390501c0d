"""Successive batching: which response decodes in which slot, for how many tokens, and what that makes of it.

`SlotSchedule` knows integers only and makes every decision; sim's clock drives the same object with known lengths.
`SuccessiveBatcher` adds the records and an engine. The engine only decodes: it is told how many tokens each request may add, so
nothing is ever aborted, and a window closes when nothing runs.

    window    0        1        2              refill="immediate"           refill="step"
    slot 0    aaaaaaaa aaaa bbb bbbbbbbb       a ends, b starts at once      aaaaaaaa aaaa.... bbbbbbbb
    slot 1    ccc ddddd dddddddd d eeeeee      c ends, d starts at once      ccc..... dddddddd dddddd..
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from tppo_ref.method.records import Prompt, Response, WindowSlice
from tppo_ref.method.slots import Grant, Segment, SlotSchedule
from tppo_ref.rollout.engine import Decoded, Request, RolloutEngine, request_seed
from tppo_ref.rollout.turns import Reply, transcript, turns_of


class Batcher(Protocol):
    """What the loop asks of a batcher; of several ranks, each is given and answers for its own share of the responses."""

    @property
    def in_flight(self) -> Mapping[int, Response]:
        """By id, the responses that are RUNNING at the last window's edge."""

    @property
    def num_generated_tokens(self) -> int:
        """Tokens sampled since the run began."""

    @property
    def num_steps(self) -> int:
        """Decode steps of the last window."""

    @property
    def slot_steps(self) -> float:
        """Slots x decode steps of the last window."""

    @property
    def segments(self) -> list[Segment]:
        """Who held which slot when in the last window, in this rank's engine."""

    @property
    def slices(self) -> list[WindowSlice]:
        """The tokens of each of `segments`."""

    @property
    def step_ends_s(self) -> list[float]:
        """Seconds since the last window's beginning at which each of its decode steps ended."""

    def window(
        self, engine: RolloutEngine, *, version: int = 0, on_end: Callable[[Response], None] | None = None
    ) -> list[WindowSlice]:
        """Decode one window; its tokens, response by response."""

    def state_dict(self) -> dict[str, Any]:
        """Everything between two windows, in plain JSON types."""

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from what ranks saved, one state each."""


class SampleStream:
    """Numbers the samples of a run and says which prompt each one answers.

    Sample g belongs to group g // samples_per_prompt: the group's prompt comes from a permutation of the prompts, a new one per
    epoch; drawing waits for no group. Rank r of `world` draws samples r, r + world, ... below `limit`, where one is set.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        samples_per_prompt: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        limit: int | None = None,
    ):
        if not prompts:
            raise ValueError("prompts: expected at least one prompt, got none")
        if samples_per_prompt < 1:
            raise ValueError(f"samples_per_prompt: expected at least 1, got {samples_per_prompt}")
        self.prompts, self.samples_per_prompt, self.seed, self.world = prompts, samples_per_prompt, seed, world
        self.limit, self.rank = limit, rank
        self.next = rank
        self.backlog: list[int] = []  # issued to nobody when the number of ranks changed; drawn first
        self._order: tuple[int, np.ndarray] | None = None

    def draw(self) -> int | None:
        """The id of this rank's next sample; None at the limit."""
        if self.backlog:
            return self.backlog.pop(0)
        if self.limit is not None and self.next >= self.limit:
            return None
        sample, self.next = self.next, self.next + self.world
        return sample

    def prompt_of(self, sample: int) -> tuple[Prompt, int]:
        """Prompt and sample index of a sample. The pair is unique over the run, epochs included: it seeds the sampling."""
        group, index = divmod(sample, self.samples_per_prompt)
        epoch, place = divmod(group, len(self.prompts))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.prompts)))
        return self.prompts[int(self._order[1][place])], epoch * self.samples_per_prompt + index

    def state_dict(self) -> dict[str, Any]:
        return {"next": self.next, "rank": self.rank, "world": self.world, "backlog": list(self.backlog)}

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """This rank's own state among `states`; from another number of ranks: all their states, what was not issued dealt anew."""
        for state in states:
            if (state["rank"], state["world"]) == (self.rank, self.world):
                self.next, self.backlog = state["next"], list(state["backlog"])
                return
        top = max(state["next"] for state in states)
        missed = [g for state in states for g in (*state["backlog"], *range(state["next"], top, state["world"]))]
        missed = [g for g in missed if self.limit is None or g < self.limit]
        self.backlog, self.next = sorted(missed)[self.rank :: self.world], top + self.rank


class SuccessiveBatcher:
    """SlotSchedule + Response records + an engine: `window(engine)` decodes one window and returns what it sampled.

    `in_flight` holds the responses that are RUNNING at the last window's edge; `segments` the last window's slots over its decode
    steps, `slices` their tokens in the same order, `step_ends_s` the seconds since its beginning at which each decode step ended;
    `num_generated_tokens` counts every token ever sampled.

    reply    an environment, asked whenever an end token was sampled; None: each end token ends its response
    now      the clock of `step_ends_s`
    """

    def __init__(
        self, schedule: SlotSchedule, stream: SampleStream, *, run_seed: int, reply: Reply | None = None,
        now: Callable[[], float] = time.perf_counter,
    ):  # fmt: skip
        self.schedule, self.stream, self.run_seed, self.reply, self.now = schedule, stream, run_seed, reply, now
        self.in_flight: dict[int, Response] = {}
        self.segments: list[Segment] = []
        self.slices: list[WindowSlice] = []
        self.step_ends_s: list[float] = []
        self.num_generated_tokens = 0

    def window(
        self, engine: RolloutEngine, *, version: int = 0, on_end: Callable[[Response], None] | None = None
    ) -> list[WindowSlice]:
        """Decode one window. `version` marks its tokens; `on_end` is called as each response ends, while others still decode.

        Returns one slice per response, with all of its turns in this window, in the order in which they stopped. A RuntimeError
        names the responses that an engine lost.
        """
        self.segments, self.slices, self.step_ends_s = [], [], []
        whole, begins, begin_s = list[WindowSlice](), dict[int, int](), self.now()
        self._submit(engine, self.schedule.open_window(self.stream.draw))
        while self.schedule.running:
            if self.num_steps == self.schedule.window:  # every grant ends within the window, so waiting longer is in vain
                raise RuntimeError(f"the engine lost responses {sorted(self.schedule.running)}: not finished at the window's edge")
            decoded = engine.step()
            self.step_ends_s.append(self.now() - begin_s)
            if not decoded:
                continue
            answers = self._enter(decoded, version, begins)
            segments, grants = self.schedule.finish(
                self.num_steps, [(d.response_id, len(d.token_ids), d.end_token) for d in decoded], self.stream.draw,
                {id: len(tokens) for id, tokens in answers.items()},
            )  # fmt: skip
            go_on = {grant.response for grant in grants}
            for segment in segments:
                response = self.in_flight[segment.response]
                response.end = segment.end
                if response.id in answers and not response.ended:
                    response.observations.append((len(response), answers[response.id]))
                if response.id not in go_on:
                    whole.append(WindowSlice(response, begins[response.id], len(response)))
                if response.ended:
                    del self.in_flight[response.id]
                if response.ended and on_end:
                    on_end(response)
            self._submit(engine, grants)
            self.segments += segments
        self.num_generated_tokens += sum(s.stop - s.begin for s in self.slices)
        return whole

    def _enter(self, decoded: Sequence[Decoded], version: int, begins: dict[int, int]) -> dict[int, tuple[int, ...]]:
        """Write what was decoded into the records, and where each response's tokens of this window begin into `begins`. What the
        environment answers to the turns that ended, by response."""
        answers = {}
        for result in decoded:
            response = self.in_flight[result.response_id]
            begin = len(response)
            response.token_ids += result.token_ids
            response.logprobs += result.logprobs
            response.versions += [version] * len(result.token_ids)
            self.slices.append(WindowSlice(response, begin, len(response)))
            if response.id not in begins:  # its first turn of this window
                begins[response.id] = begin
                response.window_starts.append(begin)
            if result.end_token and self.reply:
                answer = self.reply(response.prompt, turns_of(response.token_ids, response.observations))
                if answer is not None:
                    answers[response.id] = tuple(answer)
        return answers

    @property
    def num_steps(self) -> int:
        """Decode steps of the last window, so far."""
        return len(self.step_ends_s)

    @property
    def slot_steps(self) -> float:
        """Slots x decode steps of the last window."""
        return self.schedule.slots * self.num_steps

    @property
    def occupancy(self) -> float:
        """Busy slot-steps over slots x decode steps of the last window."""
        busy = sum(s.stop - s.begin for s in self.segments)
        return busy / (self.schedule.slots * self.num_steps) if self.num_steps else 0.0

    def _submit(self, engine: RolloutEngine, grants: list[Grant]) -> None:
        requests = []
        for grant in grants:
            if grant.response not in self.in_flight:
                prompt, sample_index = self.stream.prompt_of(grant.response)
                self.in_flight[grant.response] = Response(id=grant.response, prompt=prompt, sample_index=sample_index)
            response = self.in_flight[grant.response]
            requests.append(
                Request(
                    response_id=response.id,
                    token_ids=[*response.prompt.token_ids, *transcript(response)],
                    max_new_tokens=grant.max_new_tokens,
                    seed=request_seed(self.run_seed, response.prompt.id, response.sample_index, len(response)),
                    num_response_tokens=len(response),
                )
            )
        if requests:
            engine.submit(requests)

    def state_dict(self) -> dict[str, Any]:
        """Everything between two windows, in plain JSON types."""
        return {
            "schedule": self.schedule.state_dict(),
            "stream": self.stream.state_dict(),
            "in_flight": [response.state_dict() for response in self.in_flight.values()],
            "num_generated_tokens": self.num_generated_tokens,
        }

    def load_state_dict(self, states: Sequence[dict[str, Any]]) -> None:
        """What all engines' batchers saved, one state each. On as many engines everything is as it was; else unissued samples and
        in-flight responses are dealt anew, each to one engine."""
        stream = self.stream
        own = next((s for s in states if (s["stream"]["rank"], s["stream"]["world"]) == (stream.rank, stream.world)), None)
        stream.load_state_dict([s["stream"] for s in states])
        if own:
            self.schedule.load_state_dict(own["schedule"])
            saved, self.num_generated_tokens = own["in_flight"], own["num_generated_tokens"]
        else:
            everything = sorted((r for s in states for r in s["in_flight"]), key=lambda r: r["id"])
            saved = everything[stream.rank :: stream.world]
            self.schedule.load_state_dict({"carried": [[r["id"], len(transcript(Response.from_state_dict(r)))] for r in saved]})
            # Counted once over all engines: the sum is what the ledger holds.
            self.num_generated_tokens = sum(s["num_generated_tokens"] for s in states) if stream.rank == 0 else 0
        self.in_flight = {r["id"]: Response.from_state_dict(r) for r in saved}
