"""Rollout engines: they decode what they are given and decide nothing.

The batcher owns the schedule (method/slots.py); an engine takes requests, advances all of them by one token per `step`, and
hands each back whole when it ends. `TorchEngine` is the engine of one process: it decodes with the policy's own
transformers module. scale/vllm_engine.py is the same protocol on vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tppo_ref.method.errors import UserError
from tppo_ref.rollout.attention import DECODE_CALL_TOKENS, KVCache, PackedLayout, StepLayout, group_by_length
from tppo_ref.rollout.engine import Decoded, Request
from tppo_ref.rollout.head import sampling_logits
from tppo_ref.rollout.models import PolicyModel


def uniform(seed_n: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), float64, one per uint64 seed: SplitMix64's output for that counter (53 bits kept)."""
    with np.errstate(over="ignore"):
        z = seed_n.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)) * 2.0**-53


def draw(logits_nV: Tensor, uniform_n: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [n] by inverse CDF in float64, and their log-probabilities [n] in the dtype of the logits.

    The first token whose cumulative probability exceeds u times the total: a token of probability 0 is never drawn.
    """
    logprobs = logits_nV.log_softmax(-1)
    cdf = logprobs.to(torch.float64, copy=True).exp_().cumsum(-1)
    # u <= 1 - 2**-53, so u * total rounds to less than the total and some cumulative sum exceeds it; NaN alone needs the clamp.
    tokens = torch.searchsorted(cdf, uniform_n[:, None] * cdf[:, -1:], right=True).clamp_(max=cdf.shape[-1] - 1)
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]


# Fields of a running row; the rows' state is one integer array [fields, n].
LAST, LENGTH, SEED, DONE, LIMIT, RESPONSE, PLACE = range(7)


class TorchEngine:
    """Batched decoding with a KV cache in one process; ended rows are compacted away.

    The engine decodes with `policy`'s own module: after an optimiser step the weights are already here, and
    `load_weights` only forgets the cache. It keeps `slots` rows; `max_context_tokens` bounds prompt plus response.
    temperature, min_response_tokens and end_token_ids define the sampling distribution as in PolicyModel; with kv_cache "fp8" keys
    and values are rounded as in vLLM's cache of that name, and so its log-probabilities are not quite the policy's.

    Row i of the state is row i of the cache. Rows lie in groups of similar length (attention.group_by_length); all grow
    by one token a step, so groups only change when a request comes or goes.
    """

    def __init__(
        self,
        policy: PolicyModel,
        *,
        slots: int,
        max_context_tokens: int,
        end_token_ids: Sequence[int],
        temperature: float = 1.0,
        min_response_tokens: int = 0,
        kv_cache: Literal["auto", "fp8"] = "auto",
    ):
        config = policy.hf.config
        longest = getattr(config, "max_position_embeddings", None)
        if longest is not None and max_context_tokens > longest:
            raise UserError(f"max_context_tokens = {max_context_tokens}; the model's max_position_embeddings is {longest}")
        for token in end_token_ids:
            if not 0 <= token < config.vocab_size:
                raise UserError(f"end_token_ids = {list(end_token_ids)}; the model's vocabulary has {config.vocab_size} tokens")
        self.policy, self.slots, self.max_context_tokens = policy, slots, max_context_tokens
        self.end_token_ids, self.temperature, self.min_response_tokens = tuple(end_token_ids), temperature, min_response_tokens
        self.version = 0
        self._cache = KVCache(config.num_hidden_layers, slots, max_context_tokens, fp8=kv_cache == "fp8")
        self._pending: list[Request] = []
        self._requests: dict[int, Request] = {}  # by place
        self._places = list(range(slots))  # free rows of the two arrays below
        self._tokens = np.zeros((slots, 0), dtype=np.int64)
        self._logprobs = np.zeros((slots, 0), dtype=np.float32)
        self._state = np.zeros((7, 0), dtype=np.int64)
        # Where each row's keys lie, -1: nowhere yet; None: row i at cache row i, as `_arrange` leaves it.
        self._cache_row: np.ndarray | None = np.zeros(0, dtype=np.int64)
        self._groups: list[tuple[int, int]] = []

    @property
    def num_running(self) -> int:
        return len(self._pending) + self._state.shape[1]

    def submit(self, requests: Sequence[Request]) -> None:
        """ValueError on a request that cannot be served: no tokens, no budget, too long, more than `slots` at a time."""
        for r in requests:
            num_tokens, new = len(r.token_ids), r.max_new_tokens
            if num_tokens < 1 or new < 1:
                raise ValueError(f"response {r.response_id}: {num_tokens} tokens, max_new_tokens = {new}; expected 1 or more")
            if num_tokens + new > self.max_context_tokens:
                raise ValueError(
                    f"response {r.response_id}: {num_tokens} tokens and {new} new ones exceed "
                    f"max_context_tokens = {self.max_context_tokens}"
                )
        if self.num_running + len(requests) > self.slots:
            raise ValueError(f"{self.num_running} requests run and {len(requests)} more came; at most slots = {self.slots} can")
        self._pending.extend(requests)

    def sleep(self) -> None:
        """It decodes with the trainer's own weights, or a small copy: it keeps what it has."""

    def load_weights(self, named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """Copies tensors that are not the module's own already (names as in its state_dict); None: nothing to copy."""
        if self.num_running:
            raise RuntimeError(f"load_weights: {self.num_running} requests run; weights change only between windows")
        if named_tensors is not None:
            own = self.policy.hf.state_dict()
            pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
            with torch.no_grad():
                for name, tensor in pairs:  # one at a time: gathered ones exist only while they are copied
                    if name not in own:
                        raise ValueError(f"load_weights: the policy has no tensor named {name!r}")
                    if own[name].data_ptr() != tensor.data_ptr():
                        own[name].copy_(tensor)
        # Rows are dropped with their requests, so no cached key outlives this call; only the memory is kept.
        self.version = version

    @torch.inference_mode()
    def step(self) -> list[Decoded]:
        """See RolloutEngine. FloatingPointError on a logit that is not finite, naming response and position."""
        if not self.num_running:
            return []
        arrivals, self._pending = self._pending, []
        if arrivals:
            self._admit(arrivals)
        if self._cache_row is not None:
            self._arrange(self._cache_row)
        input_ids, positions, layout = self._layout()
        num_rows = self._state.shape[1]
        hidden = self.policy.hidden(input_ids, positions, layout)[-num_rows:]
        tokens, logprobs = self._sample(self.policy.logits(hidden))
        return self._record(tokens, logprobs)

    def _admit(self, arrivals: Sequence[Request]) -> None:
        """New rows at the end of the state; their keys lie nowhere yet."""
        columns = []
        for r in arrivals:
            place = self._places.pop()
            self._requests[place] = r
            columns.append((r.token_ids[-1], len(r.token_ids) - 1, r.seed, 0, r.max_new_tokens, r.num_response_tokens, place))
        longest = max(r.max_new_tokens for r in arrivals)
        if longest > self._tokens.shape[1]:
            grow = ((0, 0), (0, longest - self._tokens.shape[1]))
            self._tokens, self._logprobs = np.pad(self._tokens, grow), np.pad(self._logprobs, grow)
        if self._cache_row is None:
            self._cache_row = np.arange(self._state.shape[1])
        self._state = np.concatenate([self._state, np.array(columns, dtype=np.int64).T], axis=1)
        self._cache_row = np.concatenate([self._cache_row, np.full(len(arrivals), -1)])

    def _arrange(self, old: np.ndarray) -> None:
        """Gives every row its place in the cache: groups of similar length side by side, as few rows moved as possible."""
        length = self._state[LENGTH]
        order = np.argsort(-length, kind="stable")
        self._groups = group_by_length(length[order].tolist(), DECODE_CALL_TOKENS)
        new = np.empty_like(old)
        for a, b in self._groups:
            members = order[a:b]
            stays = (old[members] >= a) & (old[members] < b)
            free = np.ones(b - a, dtype=bool)
            free[old[members[stays]] - a] = False
            new[members[stays]] = old[members[stays]]
            new[members[~stays]] = np.flatnonzero(free) + a
        moved = np.flatnonzero((new != old) & (old >= 0))
        if len(moved):
            self._cache.move(old[moved], new[moved], int(length[moved].max()))
        arranged = np.empty_like(self._state)
        arranged[:, new] = self._state
        self._state, self._cache_row = arranged, None

    def _layout(self) -> tuple[Tensor, Tensor, StepLayout]:
        """input_ids [1, P + n], position_ids [1, P + n] and the step's layout; P prefill tokens of new rows first.

        A new row's last token is its decode token, so P counts the tokens before it.
        """
        device, dtype = self.policy.weight.device, self.policy.weight.dtype
        state = self._state
        length = state[LENGTH]
        self._cache.reserve(int(length.max()) + 1)
        width = self._cache.width
        ids, positions = state[LAST], length
        places = np.arange(state.shape[1]) * width + length
        packed, num_prefill = None, 0
        new = np.flatnonzero((state[DONE] == 0) & (length > 0))
        if len(new):
            new = new[np.argsort(-length[new], kind="stable")]
            lengths = length[new].tolist()
            num_prefill = sum(lengths)
            columns = np.concatenate([np.arange(n) for n in lengths])
            rows = np.repeat(new, lengths)
            ids = np.concatenate([*(self._requests[place].token_ids[:-1] for place in state[PLACE, new].tolist()), ids])
            positions = np.concatenate([columns, positions])
            places = np.concatenate([rows * width + columns, places])
            packed = PackedLayout(lengths, device)
        layout = StepLayout(self._cache, packed, num_prefill, torch.from_numpy(places).to(device), length + 1, self._groups, dtype)
        return torch.from_numpy(ids).to(device)[None], torch.from_numpy(positions).to(device)[None], layout

    def _sample(self, logits_nV: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """One token and its log-probability per row."""
        state = self._state
        device = logits_nV.device
        u = torch.from_numpy(uniform(state[SEED] + state[DONE])).to(device)
        forbid = None
        if self.min_response_tokens > 0:
            forbidden = state[RESPONSE] + state[DONE] < self.min_response_tokens
            if forbidden.any():
                forbid = torch.from_numpy(forbidden).to(device)
        tokens, logprobs = draw(sampling_logits(logits_nV, self.temperature, forbid, self.end_token_ids), u)
        # A sum is finite exactly where every logit is: one number per row to look at.
        sums = logits_nV.sum(-1, dtype=torch.float32).cpu().numpy()
        if not np.isfinite(sums).all():
            row = int(np.flatnonzero(~np.isfinite(sums))[0])
            request = self._requests[int(state[PLACE, row])]
            position = request.num_response_tokens + int(state[DONE, row])
            raise FloatingPointError(f"response {request.response_id}: a logit is not finite at response position {position}")
        return tokens.cpu().numpy(), logprobs.cpu().numpy()

    def _record(self, tokens: np.ndarray, logprobs: np.ndarray) -> list[Decoded]:
        """Stores the step's tokens, and takes out the rows that ended with it."""
        state = self._state
        self._tokens[state[PLACE], state[DONE]] = tokens
        self._logprobs[state[PLACE], state[DONE]] = logprobs
        state[LAST] = tokens
        state[LENGTH] += 1
        state[DONE] += 1
        ended_by_token = np.isin(tokens, self.end_token_ids)
        finished = ended_by_token | (state[DONE] == state[LIMIT])
        if not finished.any():
            return []
        results = []
        for row in np.flatnonzero(finished):
            place, count = int(state[PLACE, row]), int(state[DONE, row])
            request = self._requests.pop(place)
            self._places.append(place)
            results.append(
                Decoded(
                    response_id=request.response_id,
                    token_ids=self._tokens[place, :count].tolist(),
                    logprobs=self._logprobs[place, :count].tolist(),
                    end_token=bool(ended_by_token[row]),
                )
            )
        self._cache_row = np.flatnonzero(~finished)
        self._state = state[:, ~finished]
        return results
