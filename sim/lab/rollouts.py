"""What one training step sees of a token MDP, enumerated: every stretch of tokens between window edges, with its probability.

By P6 (docs/theory.md) an advantage depends on nothing before its stretch, so windows are enumerated one by one, each from the nodes
at which it begins, weighted by the probability of getting there. The picture is a step long after the start: responses of every
age are in flight, each window of a response counts as often as responses reach it, and the sum over windows is one response.

Suffixes: N nodes, A tokens, B rows (stretches), T tokens of a stretch.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from sim.lab.checks import Floats, Ints, check_count
from sim.lab.token_mdp import Solution, TokenMDP
from sim.lab.trajectories import Trajectories
from sim.lab.unrolled import ENDED


@dataclasses.dataclass(frozen=True)
class Stretches:
    """Rows of a step, right-padded; outside the mask every entry is 0 or False.

    prob_B                  how often a step has the row, per response that it begins
    begin_B                 tokens of the response before the row's first
    edge_B                  tokens of a response at the window's edge, whether or not the row gets there
    length_B                tokens of the response so far, those before the row included
    cut_B                   the response is RUNNING at the edge
    node_BT, token_BT       what was seen and chosen; reward_BT what it gave; mask_BT the tokens that exist
    next_node_B             the live node at the cut, 0 where the row ended
    logprob_BT              of the token under the current policy; behaviour_logprob_BT under the one that sampled it: the
                            current one for this step's tokens, the older one for those before
    """

    prob_B: Tensor
    begin_B: Tensor
    edge_B: Tensor
    length_B: Tensor
    cut_B: Tensor
    next_node_B: Tensor
    node_BT: Tensor
    token_BT: Tensor
    reward_BT: Tensor
    mask_BT: Tensor
    logprob_BT: Tensor
    behaviour_logprob_BT: Tensor

    def __len__(self) -> int:
        return len(self.prob_B)

    @property
    def depth_BT(self) -> Tensor:
        """Tokens of the response before each column."""
        return self.begin_B[:, None] + torch.arange(self.mask_BT.shape[1])


class Rollouts:
    """The rollouts of one policy on one MDP, cut at any window; enumerated once per cut and kept.

    policy_NA     the current policy: it samples this step's tokens and is the one whose gradient is asked for
    behaviour_NA  the older policy that sampled the tokens of earlier steps; default: the current one, nothing is stale.
                  It may choose only what the current policy can choose as well.
    limit         stretches of one enumeration; more are a ValueError, as in `TokenMDP.trajectories`

    `solution` is the truth about policy_NA, `policy_gradient_NA` the true gradient by node logits.
    """

    def __init__(self, mdp: TokenMDP, policy_NA: ArrayLike, behaviour_NA: ArrayLike | None = None, *, limit: int = 2_000_000):
        self.mdp, self.limit = mdp, limit
        self.policy_NA: Floats = mdp.check_policy(policy_NA)
        self.behaviour_NA: Floats = self.policy_NA if behaviour_NA is None else mdp.check_policy(behaviour_NA)
        if ((self.behaviour_NA > 0) & (self.policy_NA == 0)).any():
            node, token = np.argwhere((self.behaviour_NA > 0) & (self.policy_NA == 0))[0]
            raise ValueError(f"behaviour_NA: got token {token} at node {node}; expected tokens that policy_NA takes, too")
        self.solution: Solution = mdp.solve(self.policy_NA)
        self.policy_gradient_NA: Floats = mdp.policy_gradient(self.policy_NA)
        self._arrival_N = mdp.visits(self.behaviour_NA)  # windows begin where the older policy has led
        self._enumerated: dict[tuple[tuple[int, ...], int, bool], Stretches] = {}

    def edges(self, window: int, offset: int | None = None) -> Ints:
        """Depths of a response's window edges: offset, offset + window, ..., and the length cap, where nothing is cut.

        offset in 1 .. window is the first edge; default window. With immediate refill a response begins anywhere in a window.
        """
        check_count("window", window)
        if offset is not None and (not isinstance(offset, int | np.integer) or not 1 <= offset <= window):
            raise ValueError(f"offset: got {offset!r}; expected an integer in 1 .. window = {window}")
        return np.append(np.arange(window if offset is None else offset, self.mdp.max_tokens, window), self.mdp.max_tokens)

    def edge_N(self, window: int, offset: int | None = None) -> Ints:
        """The edge before which each node lies, in tokens; the token at node n is `edge_N[n] - mdp.depth_N[n]` from it."""
        edges = self.edges(window, offset)
        return edges[np.searchsorted(edges, self.mdp.depth_N, side="right")]

    def stretches(self, window: int | None, offset: int | None = None, *, lead: int = 0, ended_only: bool = False) -> Stretches:
        """All rows of one step.

        window      None: responses are not cut, all of each is sampled in this step (synchronous PPO)
        lead        tokens before the window that a row sees again, if it has them (a deferred tail)
        ended_only  rows are whole responses, in the step in which they end (partial rollouts)
        """
        edges = np.array([self.mdp.max_tokens]) if window is None else self.edges(window, offset)
        key = tuple(edges.tolist()), lead, ended_only
        if key not in self._enumerated:
            self._enumerated[key] = self._enumerate(edges, lead, ended_only)
        return self._enumerated[key]

    def sampled_NA(self, window: int | None, offset: int | None = None) -> Floats:
        """How often a step samples each token at each node, per response that it begins. [N, A].

        A window's tokens come from the current policy, the nodes at which it begins from the older one.
        """
        if self.behaviour_NA is self.policy_NA:
            return self.solution.visits_N[:, None] * self.policy_NA
        edges = np.array([self.mdp.max_tokens]) if window is None else self.edges(window, offset)
        visits_N, begin = np.zeros(self.mdp.num_nodes), 0
        for edge in edges.tolist():
            passed_N = self.mdp.visits(self.policy_NA, np.where(self.mdp.depth_N == begin, self._arrival_N, 0.0))
            visits_N += np.where((self.mdp.depth_N >= begin) & (self.mdp.depth_N < edge), passed_N, 0.0)
            begin = edge
        return visits_N[:, None] * self.policy_NA

    def _enumerate(self, edges: Ints, lead: int, ended_only: bool) -> Stretches:
        parts: list[_Part] = []
        begin = num_rows = 0
        for edge in edges.tolist():
            first = 0 if ended_only else max(0, begin - lead)
            start_N = np.where(self.mdp.depth_N == first, self._arrival_N, 0.0)
            if not start_N.any():
                break
            older_N = self.mdp.depth_N < begin
            policy_NA = np.where(older_N[:, None], self.behaviour_NA, self.policy_NA)
            rows = self.mdp.trajectories(policy_NA, start_N=start_N, num_tokens=edge - first, limit=self.limit)
            kept_B = rows.mask_BT.sum(1) > begin - first  # the others ended in an earlier step
            if not kept_B.any():
                break
            num_rows += int(kept_B.sum())
            if num_rows > self.limit:
                raise ValueError(f"limit: got more than {self.limit} stretches; expected fewer; take a smaller MDP")
            if ended_only:
                kept_B &= ~rows.cut_B
            parts.append(_Part(rows, kept_B, first, begin, edge))
            begin = edge
        return self._join(parts)

    def _join(self, parts: list[_Part]) -> Stretches:
        width = max(part.rows.mask_BT.shape[1] for part in parts)

        def column(name: str, fill: float = 0) -> np.ndarray:
            """A [B, T] field of all parts, padded to one width."""
            return np.concatenate([np.pad(x, ((0, 0), (0, width - x.shape[1])), constant_values=fill)
                                   for x in (getattr(p.rows, name)[p.kept_B] for p in parts)])  # fmt: skip

        def row(name: str) -> np.ndarray:
            return np.concatenate([getattr(p.rows, name)[p.kept_B] for p in parts])

        begin_B, new_B, edge_B = (
            np.repeat([getattr(p, name) for p in parts], [p.kept_B.sum() for p in parts]) for name in ("first", "begin", "edge")
        )
        mask_BT = column("mask_BT", fill=False)
        node_BT, token_BT = (np.where(mask_BT, column(name), 0) for name in ("node_BT", "token_BT"))
        new_BT = mask_BT & (begin_B[:, None] + np.arange(width) >= new_B[:, None])
        with np.errstate(divide="ignore"):
            now_NA, then_NA = np.log(self.policy_NA), np.log(self.behaviour_NA)
        logprob_BT, older_BT = (np.where(mask_BT, log_NA[node_BT, token_BT], 0.0) for log_NA in (now_NA, then_NA))
        next_node_B = row("next_node_B")
        arrays = dict(
            prob_B=row("prob_B"), begin_B=begin_B, edge_B=edge_B, length_B=begin_B + mask_BT.sum(1), cut_B=row("cut_B"),
            next_node_B=np.where(next_node_B == ENDED, 0, next_node_B), node_BT=node_BT, token_BT=token_BT,
            reward_BT=column("reward_BT"), mask_BT=mask_BT, logprob_BT=logprob_BT,
            behaviour_logprob_BT=np.where(new_BT, logprob_BT, older_BT),
        )  # fmt: skip
        return Stretches(**{name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in arrays.items()})


@dataclasses.dataclass(frozen=True)
class _Part:
    """One window's enumeration: rows begin after `first` tokens, this step's tokens after `begin`, the edge comes after `edge`."""

    rows: Trajectories
    kept_B: np.ndarray
    first: int
    begin: int
    edge: int


def older_policy(mdp: TokenMDP, policy_NA: ArrayLike, step: float) -> Floats:
    """The policy from which an update of size `step` led to `policy_NA`, roughly: mu ~ pi exp(-step A^pi), per node. [N, A].

    A step of policy mirror descent (natural policy gradient), taken backwards with today's advantages. 0 is the policy itself.
    """
    if not np.isfinite(step):
        raise ValueError(f"step: got {step!r}; expected a finite number")
    policy_NA = mdp.check_policy(policy_NA)
    exponent_NA = -step * mdp.solve(policy_NA).advantage_NA
    weight_NA = policy_NA * np.exp(exponent_NA - exponent_NA.max(1, keepdims=True))
    return weight_NA / weight_NA.sum(1, keepdims=True)
