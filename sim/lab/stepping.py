"""Responses side by side on a token MDP: the arithmetic under both environments of envs.py, and their frames.

Suffixes: B responses, R some of them, K uniforms; the rest as in token_mdp.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sim.lab.checks import Floats, Ints, check_choice
from sim.lab.token_mdp import TokenMDP
from sim.lab.unrolled import ENDED
from tppo_ref.method.records import End

Illegal = Literal["redraw", "error"]
RENDER_MODES = ["ansi", "rgb_array"]
END_NAMES = np.array([end.name for end in End], dtype=object)


class Slots:
    """B responses side by side: everything that both environments compute. Row b uses no uniforms but those drawn for b.

    `draw(rows_R)` gives one uniform per row: one for the first state, one for each outcome, and one before that for a token
    that is drawn anew.
    """

    def __init__(self, mdp: TokenMDP, num: int, illegal: Illegal, draw: Callable[[Ints], Floats]):
        check_choice("illegal", illegal, ("redraw", "error"))
        self.mdp, self.illegal, self.draw = mdp, illegal, draw
        pair_E = mdp.node_E * mdp.num_tokens + mdp.token_E
        self.edge_E = np.argsort(pair_E, kind="stable")  # outcomes of one (node, token) side by side
        self.first_P = np.searchsorted(pair_E[self.edge_E], np.arange(mdp.num_nodes * mdp.num_tokens + 1))
        self.below_E = np.concatenate([[0.0], np.cumsum(mdp.prob_E[self.edge_E])])
        self.below_start = np.concatenate([[0.0], np.cumsum(mdp.start_N[: mdp.layer_T[1]])])
        self.node_B, self.end_B, self.num_tokens_B, self.num_redrawn_B = (np.full(num, x) for x in (ENDED, End.RUNNING, 0, 0))
        self.reward_B, self.return_B = np.zeros(num), np.zeros(num)
        self.token_BT = np.full((num, mdp.max_tokens), -1)

    def begin(self, rows_R: Ints) -> None:
        """A new response in these rows, at a first state drawn for each."""
        self.node_B[rows_R] = _place(self.below_start, 0, len(self.below_start) - 1, self.draw(rows_R))
        self.end_B[rows_R] = End.RUNNING
        self.token_BT[rows_R] = -1
        for x_B in (self.num_tokens_B, self.num_redrawn_B, self.reward_B, self.return_B):
            x_B[rows_R] = 0

    def step(self, rows_R: Ints, token_R: Ints) -> None:
        """One token in each of these rows. ValueError for an illegal one where those are errors."""
        mdp, node_R = self.mdp, self.node_B[rows_R]
        token_R = self._legal(rows_R, node_R, token_R)
        pair_R = node_R * mdp.num_tokens + token_R
        place_R = _place(self.below_E, self.first_P[pair_R], self.first_P[pair_R + 1], self.draw(rows_R))
        edge_R = self.edge_E[place_R]
        self.token_BT[rows_R, self.num_tokens_B[rows_R]] = token_R
        self.reward_B[rows_R] = mdp.reward_E[edge_R]
        self.return_B[rows_R] += mdp.gamma ** self.num_tokens_B[rows_R] * mdp.reward_E[edge_R]
        self.num_tokens_B[rows_R] += 1
        self.node_B[rows_R], self.end_B[rows_R] = mdp.next_E[edge_R], mdp.end_E[edge_R]

    def _legal(self, rows_R: Ints, node_R: Ints, token_R: Ints) -> Ints:
        legal_RA = self.mdp.legal_NA[node_R]
        wrong_R = ~np.take_along_axis(legal_RA, token_R[:, None], axis=1)[:, 0]
        if not wrong_R.any():
            return token_R
        if self.illegal == "error":
            r, names = int(np.flatnonzero(wrong_R)[0]), self.mdp.token_names
            state, legal = self.mdp.state_names[self.mdp.state_N[node_R[r]]], np.flatnonzero(legal_RA[r])
            expected = ", ".join(f"{a} ({names[a]})" for a in legal)
            raise ValueError(f"action: got {token_R[r]} ({names[token_R[r]]}), illegal in state {state}; expected {expected}")
        num_legal = legal_RA[wrong_R].sum(1)
        pick = np.minimum((self.draw(rows_R[wrong_R]) * num_legal).astype(np.int64), num_legal - 1)
        token_R = token_R.copy()
        token_R[wrong_R] = np.argmax(np.cumsum(legal_RA[wrong_R], axis=1) > pick[:, None], axis=1)
        self.num_redrawn_B[rows_R[wrong_R]] += 1
        return token_R

    @property
    def ended_B(self) -> NDArray[np.bool_]:
        """By an end token or by the cap."""
        return self.end_B != End.RUNNING

    def observations(self) -> dict[str, Ints]:
        """Arrays of their own, not views."""
        state_B = np.where(self.node_B == ENDED, self.mdp.num_states, self.mdp.state_N[self.node_B])
        return {"state": state_B, "tokens_left": self.mdp.max_tokens - self.num_tokens_B}

    def infos(self) -> dict[str, Any]:
        """Views in part: who hands them out copies them."""
        last_B = np.maximum(self.num_tokens_B - 1, 0)  # column 0 is -1 before the first token
        return {
            "end": END_NAMES[self.end_B],
            "node": self.node_B,
            "action_mask": (self.mdp.legal_NA[self.node_B] & ~self.ended_B[:, None]).astype(np.int8),
            "token": self.token_BT[np.arange(len(last_B)), last_B],
            "num_redrawn": self.num_redrawn_B,
        }


def _place(below: Floats, first: Ints | int, stop: Ints | int, u: Floats) -> Ints:
    """Index between first and stop, by probabilities whose running sums are `below`. Rounding never leads outside."""
    low, high = below[first], below[stop]
    return np.clip(np.searchsorted(below, low + u * (high - low), side="right") - 1, first, stop - 1)


def sample_tokens(mdp: TokenMDP, node_B: ArrayLike, rng: np.random.Generator, policy_NA: ArrayLike | None = None) -> Ints:
    """A token for each node, drawn from a policy [N, A]; None: uniformly among the legal ones. Shape of `node_B`.

    `node_B` is info["node"] of either environment; where it is ENDED the token is 0, and nobody reads it.
    """
    policy_NA = mdp.uniform() if policy_NA is None else mdp.check_policy(policy_NA)
    node_B = np.asarray(node_B)
    cumulative_BA = np.cumsum(policy_NA[node_B], axis=-1)
    point_B = rng.random(node_B.shape) * cumulative_BA[..., -1]
    last_B = (cumulative_BA < cumulative_BA[..., -1:]).sum(-1)  # the last token with a probability: rounding ends there
    token_B = np.minimum((cumulative_BA <= point_B[..., None]).sum(-1), last_B)
    return np.where(node_B == ENDED, 0, token_B)


def frames(slots: Slots, mode: str) -> tuple[Any, ...]:
    """A frame of each response: "ansi" a text of four lines, "rgb_array" a picture, uint8 [height, width, 3]."""
    frame = _text if mode == "ansi" else _picture
    return tuple(frame(slots, b) for b in range(len(slots.node_B)))


def _text(slots: Slots, b: int) -> str:
    mdp, node, num = slots.mdp, slots.node_B[b], slots.num_tokens_B[b]
    tokens = " | ".join(mdp.token_names[a] for a in slots.token_BT[b, :num]) or "none yet"
    redrawn = f" ({slots.num_redrawn_B[b]} drawn anew)" if slots.num_redrawn_B[b] else ""
    return (
        f"{mdp.name or 'token MDP'}: {num} of {mdp.max_tokens} tokens, {mdp.max_tokens - num} left, {End(slots.end_B[b]).name}\n"
        f"  tokens: {tokens}{redrawn}\n"
        f"  state:  {'none' if node == ENDED else mdp.state_names[mdp.state_N[node]]}\n"
        f"  reward: {slots.reward_B[b]:+g} last, {slots.return_B[b]:+g} in all, discounted"
    )


def _picture(slots: Slots, b: int) -> NDArray[np.uint8]:
    """One box per token so far, coloured by token, on an axis as long as the cap."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # only who asks for pictures waits for the import
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(6.4, 2.0), dpi=100)
    canvas, axis = FigureCanvasAgg(figure), figure.add_axes((0.03, 0.2, 0.94, 0.25))
    head, _, state, reward = _text(slots, b).splitlines()
    figure.text(0.03, 0.95, "\n".join((head, state, reward)), va="top", family="monospace", fontsize=9)
    token_T = slots.token_BT[b, : slots.num_tokens_B[b]]
    axis.bar(np.arange(len(token_T)), 1, width=0.9, color=[f"C{a % 10}" for a in token_T])
    axis.set(xlim=(-0.5, slots.mdp.max_tokens - 0.5), ylim=(0, 1), yticks=[])
    key = [Patch(color=f"C{a % 10}", label=name) for a, name in enumerate(slots.mdp.token_names[:6])]
    axis.legend(handles=key, ncols=len(key), fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
