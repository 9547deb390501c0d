"""The records that every room of the project shares: how a response stands, what was asked, what was answered.

A response lives longer than a window, a policy version or a process. One record holds all of it; masks are derived
from the record and never stored beside it.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import Any


class End(enum.IntEnum):
    """How a response stands. A window's edge is no end: a response that reaches it is still RUNNING. An end token sampled as the
    last allowed token is END_TOKEN."""

    RUNNING = 0
    END_TOKEN = 1
    LENGTH_CAP = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """One problem: its token ids, and the answer that the verifier compares with."""

    id: int
    token_ids: tuple[int, ...]
    answer: str


@dataclasses.dataclass(kw_only=True)
class Response:
    """Everything known of one sampled response, from its first window to its last update. The per-token lists are aligned: entry t
    belongs to response token t, which the policy wrote.

    id              global sample number; prompt and sample_index follow from it (rollout.batcher.SampleStream)
    token_ids       response tokens so far, the end token included
    logprobs        log-probability of each token under the policy that sampled it (the behaviour policy)
    versions        weight version of that policy, per token
    values          V before each token, as the critic estimated it in the first step that fed the token to it: the step
                    that sampled it (a later one where rows wait: partial-is, tppo-once); used by the critic's clip only
    window_starts   columns at which the response's windows begin, ascending; the first is 0
    end             RUNNING, END_TOKEN or LENGTH_CAP
    score           the verifier's verdict, None until it is known
    num_settled     tokens that the policy has done with, trained or excluded: the first column it has yet to see
    observations    (t, what an environment said before response token t): read like a prompt, in no list above (rollout/turns.py)
    """

    id: int
    prompt: Prompt
    sample_index: int
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)
    values: list[float] = dataclasses.field(default_factory=list)
    window_starts: list[int] = dataclasses.field(default_factory=list)
    end: End = End.RUNNING
    score: float | None = None
    num_settled: int = 0
    observations: list[tuple[int, tuple[int, ...]]] = dataclasses.field(default_factory=list)

    @property
    def ended(self) -> bool:
        """True once the end token was sampled or the length cap was reached."""
        return self.end is not End.RUNNING

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_fed(self) -> int:
        """Tokens that a model reads of it: prompt, response and observations."""
        return len(self.prompt.token_ids) + len(self) + sum(len(ids) for _, ids in self.observations)

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON types; `Response.from_state_dict` gives an equal record back."""
        state = dataclasses.asdict(self)
        state["end"] = self.end.name
        return state

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Response:
        prompt = state["prompt"]
        prompt = Prompt(id=prompt["id"], token_ids=tuple(prompt["token_ids"]), answer=prompt["answer"])
        lists = {name: list(entry) for name, entry in state.items() if isinstance(entry, list)}
        lists["observations"] = [(column, tuple(ids)) for column, ids in state["observations"]]
        return cls(**{**state, **lists, "prompt": prompt, "end": End[state["end"]]})


@dataclasses.dataclass(frozen=True)
class WindowSlice:
    """The tokens [begin, stop) of `response` that one window, or one stay in a slot, sampled; begin < stop."""

    response: Response
    begin: int
    stop: int
