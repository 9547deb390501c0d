"""Which response decodes in which slot, and for how many tokens: every decision of successive batching, in integers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

from tppo_ref.method.errors import refusal
from tppo_ref.method.records import End

Refill = Literal["immediate", "step", "batch"]


class Grant(NamedTuple):
    """An order to decode: `response` runs in `slot` for at most `max_new_tokens` tokens of this window."""

    slot: int
    response: int
    max_new_tokens: int


class Segment(NamedTuple):
    """What came of a grant: `response` held `slot` in decode steps [begin, stop) of the window, and then stood at `end`."""

    slot: int
    response: int
    begin: int
    stop: int
    end: End


class SlotSchedule:
    """The decisions of successive batching (T-PPO, arXiv 2506.15050), in integers.

    slots                decoding places
    window               decode steps per window
    max_response_tokens  cap on a response over all of its windows; a continued response gets what is left of it, never more
    refill               "immediate": a slot whose response ended takes the next one in the same window (the paper's word);
                         "step": it waits for the next window (as read in the authors' port);
                         "batch": synchronous PPO, where a window has no edge: a freed slot takes the next response until
                         `responses_per_step` have begun, and the window closes when all of them have ended
    responses_per_step   of "batch"; 0: as many as slots

    One window: `open_window`, then `finish` at each decode step with which something finished, until `running` is empty.
    `draw` hands out the id of the next response, or None when there are no more. With window >= max_response_tokens and
    refill="step" every response ends in the window that began it: that is "batch" with as many responses as slots.
    Invariants: a slot holds one response; its segments and what was answered to it sum to at most max_response_tokens; no grant
    reaches beyond the window's edge; with immediate refill every slot is busy at every decode step while `draw` lasts.
    """

    def __init__(
        self, *, slots: int, window: int, max_response_tokens: int, refill: Refill = "immediate", responses_per_step: int = 0
    ):
        for name, number in (("slots", slots), ("window", window), ("max_response_tokens", max_response_tokens)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise ValueError(refusal(name, repr(number), "an integer of at least 1"))
        if refill not in ("immediate", "step", "batch"):
            raise ValueError(refusal("refill", repr(refill), "one of immediate, step, batch"))
        if refill != "batch" and responses_per_step:
            raise ValueError(refusal("responses_per_step", repr(responses_per_step), f"0 with refill {refill}"))
        if refill == "batch" and 0 < responses_per_step < slots:
            raise ValueError(refusal("responses_per_step", repr(responses_per_step), f"0, or at least as many as slots ({slots})"))
        if refill == "batch":
            window = max_response_tokens * (responses_per_step or slots)  # an edge that nothing reaches
        self.responses_per_step = responses_per_step or slots
        self.begun = 0  # responses drawn in this window
        self.slots, self.window, self.max_response_tokens, self.refill = slots, window, max_response_tokens, refill
        self.carried: list[tuple[int, int] | None] = [None] * slots  # per slot: (response, tokens so far), RUNNING at the edge
        self.running: dict[int, tuple[int, int, int, int]] = {}  # response -> (slot, tokens so far, granted, begin step)

    def open_window(self, draw: Callable[[], int | None]) -> list[Grant]:
        """Grants at decode step 0: carried responses go on in their slots, the free slots draw."""
        assert not self.running, "open_window: the last window is still open"
        self.begun = 0
        carried, self.carried = self.carried, [None] * self.slots
        grants = [self._grant(slot, 0, seated, draw) for slot, seated in enumerate(carried)]
        return [grant for grant in grants if grant]

    def finish(
        self, now: int, finished: Iterable[tuple[int, int, bool]], draw: Callable[[], int | None],
        answered: Mapping[int, int] | None = None,
    ) -> tuple[list[Segment], list[Grant]]:  # fmt: skip
        """Say which grants ended with decode step `now` (1 .. window), as (response, new tokens, end token sampled). `answered`:
        response -> tokens that an environment answers to its end token; it goes on in its slot, where one more token has room.
        Returns one segment per entry, in that order, and the grants of slots from step `now` on."""
        segments, grants = [], []
        for response, num_new, end_token in finished:
            slot, num_tokens, granted, begin = self.running.pop(response)
            assert 0 < num_new == now - begin <= granted, (response, num_new, granted, now)
            assert end_token or num_new == granted, (response, num_new, granted)
            answer = (answered or {}).get(response, 0) if end_token else 0
            num_tokens += num_new + answer
            if end_token and not answer:
                end = End.END_TOKEN
            elif num_tokens >= self.max_response_tokens:
                end = End.LENGTH_CAP
            else:  # answered; or not aborted and not ended: it spent its grant, so this is the window's edge
                end = End.RUNNING
            segments.append(Segment(slot, response, begin, now, end))
            seated = (response, num_tokens) if end is End.RUNNING else None
            if now == self.window:
                self.carried[slot] = seated
            elif (seated or self.refill != "step") and (grant := self._grant(slot, now, seated, draw)):
                grants.append(grant)
        return segments, grants

    def _grant(self, slot: int, now: int, seated: tuple[int, int] | None, draw: Callable[[], int | None]) -> Grant | None:
        if seated is None:
            if self.refill == "batch" and self.begun == self.responses_per_step:
                return None
            drawn = draw()
            if drawn is None:
                return None
            self.begun += 1
            seated = (drawn, 0)
        response, num_tokens = seated
        granted = min(self.window - now, self.max_response_tokens - num_tokens)
        self.running[response] = (slot, num_tokens, granted, now)
        return Grant(slot, response, granted)

    def state_dict(self) -> dict[str, Any]:
        """Between windows: which response stands in which slot, and how far it got."""
        assert not self.running, "state_dict: a window is open"
        return {"carried": [list(c) if c else None for c in self.carried]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Responses carried by a schedule with other slots are seated anew, in order; more than fit is a ValueError."""
        carried = [tuple(c) if c else None for c in state["carried"]]
        if len(carried) != self.slots:
            seated = [c for c in carried if c]
            if len(seated) > self.slots:
                raise ValueError(refusal("slots", str(self.slots), f"one for each of the {len(seated)} responses in flight"))
            carried = seated + [None] * (self.slots - len(seated))
        self.carried = carried
