"""Policies, critics, a rollout engine and a scorer on a token MDP: what the Trainer needs to learn where everything is known.

A response token id is the index of an edge of the unrolled MDP (`node_E`): the token chosen, with the outcome that was drawn for
it. So the path over nodes is a function of the token ids, and policy and critic find their nodes in any row. The policy's
log-probability of an edge is that of its MDP token; the outcome is the world's and carries no gradient.

Suffixes as in token_mdp.py; R rows of a table (one per node, or per state); n any list of nodes or running requests.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from sim.lab.checks import Floats
from sim.lab.token_mdp import TokenMDP
from sim.lab.truth import terminal_only
from sim.lab.unrolled import ENDED
from tppo_ref.loop.rows import pad
from tppo_ref.method.records import End, Prompt, Response
from tppo_ref.rollout.engine import Decoded, Request
from tppo_ref.rollout.packing import TokenBatch
from tppo_ref.rollout.torch_engine import uniform

By = Literal["node", "state"]

# ------------------------------------------------------------------------------------------------------- policies and critics


class _OnNodes(torch.nn.Module):
    """What policy and critic share: from the token ids of a batch to the MDP's nodes, and from nodes to numbers of each."""

    def __init__(self, mdp: TokenMDP):
        super().__init__()
        self.mdp = mdp
        self.node_E, self.token_E, self.next_E = (torch.from_numpy(x) for x in (mdp.node_E, mdp.token_E, mdp.next_E))
        self.legal_NA = torch.from_numpy(mdp.legal_NA)

    @staticmethod
    def edges(batch: TokenBatch) -> Tensor:
        """Edges [B, T]; edge 0 in the padding, which nobody reads."""
        return pad(batch.response_ids, torch.long)

    def named_tensors(self) -> Iterable[tuple[str, Tensor]]:
        """What the engine takes over: every parameter, by its name."""
        return self.named_parameters()


class _Table(torch.nn.Module):
    """One row of numbers per node or per state, trained directly."""

    def __init__(self, mdp: TokenMDP, x_N: Floats, by: By):
        super().__init__()
        rows = {"node": np.arange(mdp.num_nodes), "state": mdp.state_N}
        if by not in rows:
            raise ValueError(f"by: got {by!r}; expected node or state")
        self.row_N = torch.from_numpy(rows[by])
        self.row = torch.nn.Parameter(torch.zeros(mdp.num_nodes if by == "node" else mdp.num_states, *x_N.shape[1:]))
        self.begin_at(x_N)

    @torch.no_grad()
    def begin_at(self, x_N: Floats) -> None:
        """Holds these numbers. ValueError where nodes of one state differ and share a row."""
        start_N = torch.from_numpy(x_N)
        start_R = torch.zeros(self.row.shape, dtype=torch.float64)
        start_R[self.row_N] = start_N
        if not torch.allclose(start_R[self.row_N], start_N, rtol=0, atol=1e-9):
            raise ValueError('by: got "state" with different numbers at the nodes of one state; expected equal ones; use by="node"')
        self.row.copy_(start_R)

    def forward(self, node_n: Tensor) -> Tensor:
        """The numbers of some nodes, [n, ...]."""
        return self.row[self.row_N[node_n]]


class _Network(torch.nn.Module):
    """Given numbers per node plus a small MLP's correction, 0 at the beginning, over one-hot state and the share of tokens left."""

    def __init__(self, mdp: TokenMDP, x_N: Floats, hidden: int, seed: int):
        super().__init__()
        self.state_N, self.num_states = torch.from_numpy(mdp.state_N), mdp.num_states
        self.left_N = torch.from_numpy(1 - mdp.depth_N / mdp.max_tokens).float()
        self.shape = x_N.shape[1:]
        first = torch.nn.Linear(mdp.num_states + 1, hidden)
        last = torch.nn.Linear(hidden, int(np.prod(self.shape, dtype=int)))
        with torch.no_grad():
            first.weight.copy_(torch.randn(first.weight.shape, generator=torch.Generator().manual_seed(seed)))
            for zero in (first.bias, last.weight, last.bias):
                zero.zero_()
        self.layers = torch.nn.Sequential(first, torch.nn.Tanh(), last)
        self.begin_at(x_N)

    @torch.no_grad()
    def begin_at(self, x_N: Floats) -> None:
        """Holds these numbers, whatever the correction is by now."""
        self.base_N = torch.from_numpy(x_N).float()
        self.base_N = self.base_N - (self(torch.arange(len(x_N))) - self.base_N)

    def forward(self, node_n: Tensor) -> Tensor:
        """The numbers of some nodes, [n, ...]."""
        one_hot = torch.nn.functional.one_hot(self.state_N[node_n], self.num_states).float()
        correction = self.layers(torch.cat([one_hot, self.left_N[node_n, None]], dim=-1))
        return self.base_N[node_n] + correction.reshape(len(node_n), *self.shape)


class NodePolicy(_OnNodes):
    """policy(TokenBatch) -> logprob_BT, float32: a softmax over the legal tokens of each node. `TabularPolicy`, `NetworkPolicy`."""

    def __init__(self, mdp: TokenMDP, logits: torch.nn.Module):
        super().__init__(mdp)
        self.logits = logits  # nodes [n] -> [n, A]

    def forward(self, batch: TokenBatch) -> Tensor:
        """Log-probability of each token given its node, [B, T]; padding holds some number."""
        edge_BT = self.edges(batch)
        node_n, place_BT = self.node_E[edge_BT].unique(return_inverse=True)
        logprob_nA = self.logits(node_n).masked_fill(~self.legal_NA[node_n], -math.inf).log_softmax(-1)
        return logprob_nA[place_BT, self.token_E[edge_BT]]

    @torch.no_grad()
    def log_table(self) -> Floats:
        """Log-probabilities [N, A], float64, -inf on illegal tokens. FloatingPointError where a logit is not finite."""
        logits_NA = self.logits(torch.arange(self.mdp.num_nodes)).double()
        bad_N = (~torch.isfinite(logits_NA) & self.legal_NA).any(-1)
        if bool(bad_N.any()):
            raise FloatingPointError(f"the policy has a logit that is not finite at node {int(bad_N.nonzero()[0])}")
        return logits_NA.masked_fill(~self.legal_NA, -math.inf).log_softmax(-1).numpy()

    def table(self) -> Floats:
        """The policy as the MDP's methods take it: probabilities [N, A], float64."""
        return np.exp(self.log_table())


def _first_logits(mdp: TokenMDP, policy_NA: ArrayLike) -> Floats:
    """Logits of a policy, 0 on illegal tokens. ValueError where a legal token has probability 0: no softmax holds that."""
    policy_NA = mdp.check_policy(policy_NA)
    if (policy_NA[mdp.legal_NA] == 0).any():
        node = int(np.argmax((policy_NA == 0) & mdp.legal_NA) // mdp.num_tokens)
        raise ValueError(f"policy_NA: got probability 0 for a legal token of node {node}; expected more than 0, for a softmax")
    return np.log(np.where(mdp.legal_NA, policy_NA, 1.0))


class TabularPolicy(NodePolicy):
    """A logit per token and node (or state), beginning as `policy_NA`. Its one parameter is `logits.row` [R, A]."""

    def __init__(self, mdp: TokenMDP, policy_NA: ArrayLike, *, by: By = "node"):
        super().__init__(mdp, _Table(mdp, _first_logits(mdp, policy_NA), by))


class NetworkPolicy(NodePolicy):
    """A small MLP over state and tokens left, beginning as `policy_NA`."""

    def __init__(self, mdp: TokenMDP, policy_NA: ArrayLike, *, hidden: int = 16, seed: int = 0):
        super().__init__(mdp, _Network(mdp, _first_logits(mdp, policy_NA), hidden, seed))


class NodeValue(_OnNodes):
    """value(TokenBatch) -> (value_BT, last_value_B), float32: V before each token, and after the last one, 0 where that one ended
    the response (never read). `TabularValue`, `NetworkValue`."""

    def __init__(self, mdp: TokenMDP, values: torch.nn.Module):
        super().__init__(mdp)
        self.values = values  # nodes [n] -> [n]

    def forward(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """V before each token, [B, T], and after the last one, [B]."""
        edge_BT = self.edges(batch)
        next_B = self.next_E[torch.tensor([row[-1] for row in batch.response_ids], dtype=torch.long)]
        node_n, place = torch.cat([self.node_E[edge_BT].flatten(), next_B.clamp(min=0)]).unique(return_inverse=True)
        value = self.values(node_n)[place]
        value_BT, last_value_B = value[: edge_BT.numel()].reshape(edge_BT.shape), value[edge_BT.numel() :]
        return value_BT, torch.where(next_B == ENDED, 0.0, last_value_B)

    def begin_at(self, value_N: ArrayLike) -> None:
        """Take these values [N]."""
        self.values.begin_at(_node_vector(self.mdp, value_N))  # type: ignore[operator]

    @torch.no_grad()
    def table(self) -> Floats:
        """V [N], float64."""
        return self.values(torch.arange(self.mdp.num_nodes)).double().numpy()


def _node_vector(mdp: TokenMDP, x_N: ArrayLike) -> Floats:
    x_N = np.asarray(x_N, dtype=np.float64)
    if x_N.shape != (mdp.num_nodes,) or not np.isfinite(x_N).all():
        raise ValueError(f"value_N: got shape {list(x_N.shape)}; expected {mdp.num_nodes} finite numbers, one per node")
    return x_N


class TabularValue(NodeValue):
    """A value per node (or state)."""

    def __init__(self, mdp: TokenMDP, value_N: ArrayLike, *, by: By = "node"):
        super().__init__(mdp, _Table(mdp, _node_vector(mdp, value_N), by))


class NetworkValue(NodeValue):
    """A small MLP over state and tokens left, beginning as `value_N`."""

    def __init__(self, mdp: TokenMDP, value_N: ArrayLike, *, hidden: int = 16, seed: int = 0):
        super().__init__(mdp, _Network(mdp, _node_vector(mdp, value_N), hidden, seed))


# ---------------------------------------------------------------------------------------------------------- engine and scorer

PROMPT = Prompt(id=0, token_ids=(0,), answer="")
"""The one prompt. Where a response starts is drawn by the engine with probability start_N, so that any start_S is right."""

NODE, SEED, DONE, LIMIT, PLACE = range(5)  # fields of a running row


class MDPEngine:
    """`RolloutEngine` on a token MDP: all running responses advance by one edge per step.

    An edge is drawn by inverse CDF with probability pi(token | node) prob(outcome | token). Its uniform number depends on the
    request's seed and the position alone (the first node: on the position before the first token), so that with fixed weights
    a cut changes no response. The policy is the Trainer's own module: `load_weights` tabulates it. No limit on slots.
    """

    def __init__(self, policy: NodePolicy):
        self.policy, self.mdp, self.version = policy, policy.mdp, 0
        mdp = self.mdp
        num_N = np.diff(mdp.edge_N)
        self._edge_NK = mdp.edge_N[:-1, None] + np.minimum(np.arange(num_N.max()), num_N[:, None] - 1)
        self._exists_NK = np.arange(num_N.max()) < num_N[:, None]
        self._start_cdf = np.cumsum(mdp.start_N[: mdp.layer_T[1]])
        self._requests: dict[int, Request] = {}  # by place
        self._places: list[int] = []  # free rows of _edges
        self._edges = np.zeros((0, mdp.max_tokens), dtype=np.int64)
        self._state = np.zeros((5, 0), dtype=np.int64)
        self._tabulate()

    @property
    def num_running(self) -> int:
        """Requests that were submitted and have not finished."""
        return self._state.shape[1]

    def submit(self, requests: Sequence[Request]) -> None:
        """ValueError on a response that has ended, or that would grow beyond the MDP's cap."""
        mdp = self.mdp
        first_node = self._first_nodes(np.array([r.seed for r in requests], dtype=np.uint64))
        nodes = [
            int(mdp.next_E[r.token_ids[-1]]) if r.num_response_tokens else first
            for r, first in zip(requests, first_node.tolist(), strict=True)
        ]
        for r, node in zip(requests, nodes, strict=True):
            done = r.num_response_tokens
            if node == ENDED:
                raise ValueError(f"response {r.response_id}: got one that has ended after {done} tokens; expected a running one")
            if not 1 <= r.max_new_tokens <= mdp.max_tokens - done:
                raise ValueError(
                    f"response {r.response_id}: got max_new_tokens {r.max_new_tokens} after {done} tokens; "
                    f"expected 1 .. {mdp.max_tokens - done}, what is left of the MDP's cap"
                )
        columns = [(node, r.seed, 0, r.max_new_tokens, self._place(r)) for r, node in zip(requests, nodes, strict=True)]
        self._state = np.concatenate([self._state, np.array(columns, dtype=np.int64).reshape(-1, 5).T], axis=1)

    def _first_nodes(self, seed_n: np.ndarray) -> np.ndarray:
        """Where responses begin whose first token is drawn with these seeds: drawn with the seed before."""
        with np.errstate(over="ignore"):
            point_n = uniform(seed_n - np.uint64(1)) * self._start_cdf[-1]
        return np.searchsorted(self._start_cdf, point_n, side="right")

    def _place(self, request: Request) -> int:
        """A row of `_edges` for the request's tokens."""
        if not self._places:
            more = len(self._edges) + 8
            self._places = list(range(len(self._edges), len(self._edges) + more))
            self._edges = np.pad(self._edges, ((0, more), (0, 0)))
        place = self._places.pop()
        self._requests[place] = request
        return place

    def step(self) -> list[Decoded]:
        """One token for every running request; those that finished by it."""
        state = self._state
        cdf_nK = self._cdf_NK[state[NODE]]
        point_n = uniform(state[SEED] + state[DONE]) * cdf_nK[:, -1]
        edge_n = self._edge_NK[state[NODE], (cdf_nK <= point_n[:, None]).sum(1)]  # the first whose cdf exceeds the point
        self._edges[state[PLACE], state[DONE]] = edge_n
        state[NODE] = self.mdp.next_E[edge_n]
        state[DONE] += 1
        finished_n = (state[NODE] == ENDED) | (state[DONE] == state[LIMIT])
        if not finished_n.any():
            return []
        decoded = []
        for place, num in state[[PLACE, DONE]][:, finished_n].T.tolist():
            edge_T = self._edges[place, :num]
            decoded.append(
                Decoded(
                    response_id=self._requests.pop(place).response_id,
                    token_ids=edge_T.tolist(),
                    logprobs=self._logprob_E[edge_T].tolist(),
                    end_token=bool(self.mdp.end_E[edge_T[-1]] == End.END_TOKEN),
                )
            )
            self._places.append(place)
        self._state = state[:, ~finished_n]
        return decoded

    def sleep(self) -> None:
        """Nothing to give up."""

    def load_weights(self, named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """Copies tensors that are not the policy's own already, and tabulates the policy."""
        if self.num_running:
            raise RuntimeError(f"load_weights: {self.num_running} requests run; weights change only between windows")
        own = dict(self.policy.named_tensors())
        with torch.no_grad():
            for name, tensor in dict(named_tensors or {}).items():
                if name not in own:
                    raise ValueError(f"load_weights: got a tensor named {name!r}; expected some of {', '.join(own)}")
                if own[name] is not tensor:
                    own[name].copy_(tensor)
        self.version = version
        self._tabulate()

    def _tabulate(self) -> None:
        log_NA = self.policy.log_table()
        self._logprob_E = log_NA[self.mdp.node_E, self.mdp.token_E]
        joint_E = np.exp(self._logprob_E) * self.mdp.prob_E
        self._cdf_NK = np.cumsum(np.where(self._exists_NK, joint_E[self._edge_NK], 0.0), axis=1)


class MDPScorer:
    """`Scorer`: an ended response's score is the sum of its rewards. ValueError for gamma < 1 with rewards on the way."""

    def __init__(self, mdp: TokenMDP):
        self.mdp = mdp
        if mdp.gamma < 1 and not terminal_only(mdp):
            raise ValueError(f"gamma: got {mdp.gamma} with rewards on the way; expected 1, or rewards at the end "
                             "only: the Trainer pays one score at the end")  # fmt: skip
        self._scores: dict[int, tuple[float, str]] = {}

    def submit(self, response: Response) -> None:
        """Scores an ended response at once: nothing here takes time."""
        self._scores[response.id] = (float(self.mdp.reward_E[response.token_ids].sum()), "ok")

    def collect(self) -> dict[int, tuple[float, str]]:
        """Response id -> (sum of its rewards, "ok"), of all that were submitted since the last call."""
        scores, self._scores = self._scores, {}
        return scores
