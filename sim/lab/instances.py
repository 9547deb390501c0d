"""Token MDPs of different character, each with the policy under which it is looked at.

Every builder returns an `Instance`: the MDP, a policy [N, A], and one sentence that says what it is for. All are small enough to
enumerate window by window; `random` is there for laws that must hold everywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.lab.token_mdp import TokenMDP
from sim.lab.unrolled import ENDED, Edges
from tppo_ref.method.errors import nearest

ON, END = 0, 1  # tokens of the chains: one more thought, or the answer


class Instance(NamedTuple):
    """An MDP with the policy to look at it with, and what it is for."""

    mdp: TokenMDP
    policy_NA: NDArray[np.float64]
    story: str


class _Graph:
    """Collects edges."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, float, float, int]] = []

    def add(self, state: int, token: int, next_: int, reward: float = 0.0, prob: float = 1.0) -> None:
        """One outcome."""
        self.rows.append((state, token, prob, reward, next_))

    def answer(self, state: int, token: int, p_right: float, reward: float = 0.0) -> None:
        """An end token whose verdict is +1 with probability p_right, else -1, on top of `reward`."""
        for verdict, prob in ((1.0, p_right), (-1.0, 1 - p_right)):
            if prob > 0:
                self.add(state, token, ENDED, reward + verdict, prob)

    def edges(self) -> Edges:
        """All outcomes as arrays."""
        state, token, prob, reward, next_ = zip(*self.rows, strict=True)
        return Edges(np.array(state), np.array(token), np.array(prob), np.array(reward), np.array(next_))


def _policy(mdp: TokenMDP, prob_SA: NDArray[np.float64]) -> NDArray[np.float64]:
    return mdp.check_policy(mdp.by_node(prob_SA))


def calm_chain(*, length: int = 48, p_end: float = 0.08, first: float = 0.35, last: float = 0.65, gamma: float = 1.0) -> Instance:
    """A long response whose prospects change slowly: the verdict's probability moves from `first` to `last` over the chain.

    In state i the token ON goes on and END answers. The value changes by little from token to token.
    """
    graph = _Graph()
    for i, p_right in enumerate(np.linspace(first, last, length)):
        if i < length - 1:
            graph.add(i, ON, i + 1)
        graph.answer(i, END, float(p_right))
    mdp = TokenMDP(num_states=length, num_tokens=2, edges=graph.edges(), max_tokens=length, gamma=gamma, name="calm chain",
                   token_names=("on", "end"))  # fmt: skip
    prob_SA = np.tile([1 - p_end, p_end], (length, 1))
    prob_SA[-1] = 0, 1
    return Instance(mdp, _policy(mdp, prob_SA), "the value changes little from token to token, so a cut loses little")


def decision(
    *, length: int = 16, at: int = 8, p_good: float = 0.5, p_end: float = 0.15, name: str = "cliff", gamma: float = 1.0
) -> Instance:
    """One token decides, the rest is mechanical: at position `at` the right token leads to the verdict +1, the other to -1.

    Before it nothing ends; after it each token ends the response with probability p_end, and the last one must. States:
    0 .. at before and at the decision, then one state per position on the good and on the bad side.
    """
    if not 0 <= at < length - 1:
        raise ValueError(f"at: got {at}; expected 0 .. {length - 2}")
    graph, rest = _Graph(), length - at - 1
    good, bad = at + 1, at + 1 + rest
    for i in range(at):
        graph.add(i, ON, i + 1)
    graph.add(at, 0, good)
    graph.add(at, 1, bad)
    for side, verdict in ((good, 1.0), (bad, -1.0)):
        for i in range(rest):
            if i < rest - 1:
                graph.add(side + i, ON, side + i + 1)
            graph.add(side + i, END, ENDED, verdict)
    num_states = bad + rest
    mdp = TokenMDP(num_states=num_states, num_tokens=2, edges=graph.edges(), max_tokens=length, gamma=gamma, name=name,
                   token_names=("on / right", "end / wrong"))  # fmt: skip
    prob_SA = np.tile([1 - p_end, p_end], (num_states, 1))
    prob_SA[:at] = 1, 0
    prob_SA[at] = p_good, 1 - p_good
    prob_SA[[good + rest - 1, bad + rest - 1]] = 0, 1
    return Instance(mdp, _policy(mdp, prob_SA), "one token moves the value by half of its range or more")


def cliff(*, length: int = 16, p_good: float = 0.9, gamma: float = 1.0) -> Instance:
    """`decision` in the middle: one token, seldom wrong, that loses everything."""
    made = decision(length=length, at=length // 2, p_good=p_good, name="cliff", gamma=gamma)
    return made._replace(story="one wrong token in the middle loses everything: V(s_l) = V(s_(l-1)) is wrong by nearly 2 there")


def early_decision(*, length: int = 16, p_good: float = 0.5, p_end: float = 0.15, gamma: float = 1.0) -> Instance:
    """`decision` at the first token: in a cut response its credit comes from the critic alone."""
    made = decision(length=length, at=0, p_good=p_good, p_end=p_end, name="early decision", gamma=gamma)
    return made._replace(story="the first token decides, a long mechanical rest follows: credit rests on the critic alone")


def late_decision(*, length: int = 16, p_good: float = 0.5, gamma: float = 1.0) -> Instance:
    """`decision` just before the end: whoever is cut earlier learns nothing wrong."""
    made = decision(length=length, at=length - 3, p_good=p_good, name="late decision", gamma=gamma)
    return made._replace(story="the last tokens decide: most windows hold nothing to learn")


def noisy_reward(*, length: int = 8, noise: float = 1.0, p_end: float = 0.1, p_good: float = 0.5, gamma: float = 1.0) -> Instance:
    """Every token is good (+1 / length) or bad (-1 / length) and its reward is shaken by +-noise: variance is what matters.

    Tokens: 0 good, 1 bad, 2 end. The noise is drawn per token, so long traces sum it up.
    """
    graph = _Graph()
    for i in range(length):
        next_ = i + 1 if i < length - 1 else ENDED
        for token, mean in ((0, 1 / length), (1, -1 / length)):
            for shake in (noise, -noise):
                graph.add(i, token, next_, mean + shake, 0.5)
        graph.add(i, 2, ENDED)
    mdp = TokenMDP(num_states=length, num_tokens=3, edges=graph.edges(), max_tokens=length, gamma=gamma, name="noisy reward",
                   token_names=("good", "bad", "end"))  # fmt: skip
    prob_SA = np.tile([(1 - p_end) * p_good, (1 - p_end) * (1 - p_good), p_end], (length, 1))
    return Instance(mdp, _policy(mdp, prob_SA), "each token's reward is shaken by noise: long traces pay in variance")


def thinking(
    *, length: int = 32, p_end: float = 0.1, start: float = 0.2, gain: float = 0.15, cost: float = 0.0, gamma: float = 1.0
) -> Instance:
    """The policy chooses its own length: each more thought closes a share `gain` of the gap to a sure answer, and costs `cost`.

    P(right after i thoughts) = 1 - (1 - start) (1 - gain)^i. Ending early is a mistake, so a better policy is a longer one.
    """
    graph = _Graph()
    for i in range(length):
        if i < length - 1:
            graph.add(i, ON, i + 1, -cost)
        graph.answer(i, END, 1 - (1 - start) * (1 - gain) ** i, -cost)
    mdp = TokenMDP(num_states=length, num_tokens=2, edges=graph.edges(), max_tokens=length, gamma=gamma, name="thinking",
                   token_names=("think", "answer"))  # fmt: skip
    prob_SA = np.tile([1 - p_end, p_end], (length, 1))
    prob_SA[-1] = 0, 1
    return Instance(mdp, _policy(mdp, prob_SA), "the longer the response, the better: length depends on the policy, and grows")


def random(
    *,
    seed: int = 0,
    num_states: int = 5,
    num_tokens: int = 3,
    max_tokens: int = 6,
    outcomes: int = 1,
    p_end: float = 0.1,
    every_token: bool = True,
    gamma: float = 1.0,
) -> Instance:
    """A random graph, policy and rewards from a seed.

    Each (state, token) has `outcomes` outcomes, each ending the response with probability p_end, else leading anywhere; state 0
    can always end. Rewards in [-1, 1] at every token, or where the response ends only. A random reward is added at the cap.
    """
    rng = np.random.default_rng(seed)
    shape = num_states, num_tokens, outcomes
    next_ = np.where(rng.random(shape) < p_end, ENDED, rng.integers(num_states, size=shape))
    next_[0, 0, 0] = ENDED
    prob = rng.dirichlet(np.ones(outcomes), size=shape[:2])
    reward = rng.uniform(-1, 1, size=shape)
    if not every_token:
        reward[next_ != ENDED] = 0
    state, token, _ = np.indices(shape)
    mdp = TokenMDP(num_states=num_states, num_tokens=num_tokens, max_tokens=max_tokens, gamma=gamma, name=f"random {seed}",
                   edges=Edges(state.ravel(), token.ravel(), prob.ravel(), reward.ravel(), next_.ravel()),
                   cap_reward_S=rng.uniform(-1, 1, num_states))  # fmt: skip
    prob_SA = rng.dirichlet(np.ones(num_tokens), size=num_states)
    return Instance(mdp, _policy(mdp, prob_SA), "nothing special, which is its use")


INSTANCES: dict[str, Callable[..., Instance]] = {
    "calm-chain": calm_chain,
    "cliff": cliff,
    "early-decision": early_decision,
    "late-decision": late_decision,
    "noisy-reward": noisy_reward,
    "thinking": thinking,
    "random": random,
}
"""Named instances. `load(name, **parameters)` is the way in for names that people type."""


def load(name: str, **parameters: float) -> Instance:
    """The instance of that name; ValueError for an unknown name or parameter, with the nearest known one."""
    if name not in INSTANCES:
        raise ValueError(f"instance: got {name!r}; expected one of {', '.join(INSTANCES)}{nearest(name, list(INSTANCES))}")
    known = inspect.signature(INSTANCES[name]).parameters
    for parameter in parameters:
        if parameter not in known:
            raise ValueError(f"{name}: got parameter {parameter!r}; expected some of {', '.join(known)}")
    return INSTANCES[name](**parameters)
