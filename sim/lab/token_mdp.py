"""Token MDPs about which everything is known: V, Q, A, visits, the return's distribution, the policy gradient, every trajectory.

Exact dynamic programming over the layers of an unrolled graph (unrolled.py), in float64. Nothing here knows of windows, critics or
estimators (bias.py does).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

from sim.lab import trajectories as paths
from sim.lab.checks import Floats, check_shape, vector
from sim.lab.trajectories import Trajectories
from sim.lab.unrolled import ENDED, Edges, Unrolled

__all__ = ["ENDED", "Edges", "Solution", "TokenMDP", "Trajectories"]


@dataclasses.dataclass(frozen=True)
class Solution:
    """What is true of a policy. Illegal tokens have q and advantage 0.

    value_N       V(n): expected discounted rewards from node n on
    q_NA          Q(n, a) = E[r + gamma V(next)]
    advantage_NA  Q - V
    visits_N      probability that a response passes node n (every node is passed at most once)
    ends_E        probability that a response ends with edge e, 0 where the edge leads on
    length_T      [max_tokens + 1], probability that a response has t tokens
    mean_return   expected return of a response: V averaged over the start
    """

    value_N: Floats
    q_NA: Floats
    advantage_NA: Floats
    visits_N: Floats
    ends_E: Floats
    length_T: Floats
    mean_return: float


class TokenMDP(Unrolled):
    """An unrolled graph (its arguments and arrays: `Unrolled`) and all that is true of a policy on it."""

    trajectories = paths.trajectories
    sample = paths.sample
    return_distribution = paths.return_distribution

    def solve(self, policy_NA: ArrayLike) -> Solution:
        """V, Q, A backwards over the layers, visits and lengths forwards. Time and memory are linear in nodes and edges."""
        policy_NA = self.check_policy(policy_NA)
        value_N, q_NA = self.evaluate(policy_NA)
        advantage_NA = np.where(self.legal_NA, q_NA - value_N[:, None], 0.0)
        visits_N = self.visits(policy_NA)
        ends_E = np.where(self.next_E == ENDED, visits_N[self.node_E] * self.joint(policy_NA), 0.0)
        length_T = np.bincount(self.depth_N[self.node_E] + 1, ends_E, minlength=self.max_tokens + 1).astype(np.float64)
        return Solution(value_N, q_NA, advantage_NA, visits_N, ends_E, length_T, float(self.start_N @ value_N))

    def evaluate(self, policy_NA: Floats) -> tuple[Floats, Floats]:
        """V [N] and Q [N, A] of a checked policy."""
        value_N, q_NA = np.zeros(self.num_nodes), np.zeros(self.legal_NA.shape)
        pair_E = self.node_E * self.num_tokens + self.token_E
        for first, stop in self.layers(backwards=True):
            edges = slice(self.edge_N[first], self.edge_N[stop])
            next_ = self.next_E[edges]
            gain = self.prob_E[edges] * (self.reward_E[edges] + self.gamma * np.where(next_ == ENDED, 0.0, value_N[next_]))
            size = (stop - first) * self.num_tokens
            q_NA[first:stop] = np.bincount(pair_E[edges] - first * self.num_tokens, gain, minlength=size).reshape(stop - first, -1)
            value_N[first:stop] = (policy_NA[first:stop] * q_NA[first:stop]).sum(1)
        return value_N, q_NA

    def visits(self, policy_NA: ArrayLike, start_N: Floats | None = None) -> Floats:
        """Probability of passing each node [N], from the start or from any weights on nodes."""
        joint_E = self.joint(self.check_policy(policy_NA))
        visits_N = self.start_N.copy() if start_N is None else vector("start_N", start_N, self.num_nodes).copy()
        for first, stop in self.layers():
            edges = slice(self.edge_N[first], self.edge_N[stop])
            live_E = self.next_E[edges] != ENDED
            following_E = self.next_E[edges][live_E] - stop  # the next layer begins where this one stops
            flow_E = (visits_N[self.node_E[edges]] * joint_E[edges])[live_E]
            arrived = np.bincount(following_E, flow_E)
            visits_N[stop : stop + len(arrived)] += arrived
        return visits_N

    def score_function(self, policy_NA: ArrayLike, credit_NA: ArrayLike, weight_N: ArrayLike) -> Floats:
        """E[sum_t c(n_t, a_t) grad log pi(a_t | n_t)] by softmax logits [N, A], for a credit c and node weights (visits).

        Of a softmax it is weight(n) pi(a|n) (c(n, a) - sum_b pi(b|n) c(n, b)). With c = A and weight = visits this is the policy
        gradient; with an estimator's conditional mean for c it is that estimator's expected gradient.
        """
        policy_NA, credit_NA = self.check_policy(policy_NA), check_shape("credit_NA", credit_NA, self.legal_NA.shape)
        credit_NA = np.where(self.legal_NA, credit_NA, 0.0)  # an estimator says nothing of tokens that cannot be taken
        if not np.isfinite(credit_NA).all():
            raise ValueError("credit_NA: got NaN or infinity; expected finite numbers on the legal tokens")
        centred_NA = credit_NA - (policy_NA * credit_NA).sum(1, keepdims=True)
        return vector("weight_N", weight_N, self.num_nodes)[:, None] * policy_NA * centred_NA

    def policy_gradient(self, policy_NA: ArrayLike, *, discounted: bool = False) -> Floats:
        """Gradient [N, A] by the logits of each node (`by_state` for shared ones): what PPO's sum over tokens estimates.

        With gamma < 1 that sum leaves out gamma^t, as everyone's trainer does; `discounted` puts it in, and the result is then the
        gradient of `mean_return` (policy gradient theorem). With gamma = 1 both are the same.
        """
        solution = self.solve(policy_NA)
        weight_N = solution.visits_N * (self.gamma**self.depth_N if discounted else 1.0)
        return self.score_function(policy_NA, solution.q_NA, weight_N)
