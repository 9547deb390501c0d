"""What the batcher asks of an engine: requests in, decoded tokens out, and no decision in between."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from torch import Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Continue `token_ids` (prompt and response so far) by at most `max_new_tokens`, at least 1.

    seed                  of the request's first token; token i is drawn with seed + i (see `request_seed`)
    num_response_tokens   how many of `token_ids` are the policy's own: min_response_tokens counts on from there
    """

    response_id: int
    token_ids: Sequence[int]
    max_new_tokens: int
    seed: int
    num_response_tokens: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoded:
    """All tokens that one request brought, with their log-probabilities under the sampling distribution."""

    response_id: int
    token_ids: list[int]
    logprobs: list[float]
    end_token: bool


class RolloutEngine(Protocol):
    """What the batcher needs of an engine."""

    @property
    def num_running(self) -> int:
        """Requests submitted and not yet returned."""

    def submit(self, requests: Sequence[Request]) -> None:
        """Takes requests; they decode from the next step on, and their prefill costs no step of its own."""

    def step(self) -> list[Decoded]:
        """One more token for every running request; returns those that finished with it (end token or max_new_tokens)."""

    def sleep(self) -> None:
        """No request comes before the next `load_weights`: an engine that shares its device with the trainer may give up memory."""

    def load_weights(self, named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """New weights; every cached prefix is dropped. RuntimeError while requests run."""


def request_seed(run_seed: int, prompt_id: int, sample_index: int, num_tokens_so_far: int) -> int:
    """The seed of a response's next token, in [0, 2**63): the same in every process and Python version.

    A hash of the first three arguments plus `num_tokens_so_far`: the draw of a token depends on its position in the
    response and not on where windows cut it.
    """
    text = f"{run_seed}:{prompt_id}:{sample_index}".encode()
    base = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return (base + num_tokens_so_far) % 2**63
