"""The token MDPs as Gymnasium environments, single and vector, and the one wrapper in which `truncated` is right.

    observation  {"state": 0 .. S - 1, and S once the response has ended; "tokens_left": 0 .. max_tokens}, both Discrete, so
                 that Stable-Baselines3 (MultiInputPolicy) and Gymnasium's FlattenObservation make them one-hot
    action       Discrete(A), a token
    terminated   the end token was sampled or the length cap was reached: V behind it is 0, there is nothing to bootstrap
                 from. The cap is part of the MDP, which is honest because the observation holds the tokens left
    truncated    never, but by `WindowCut`: a window's edge is no end
    info         end          name of the `End`: RUNNING, END_TOKEN or LENGTH_CAP
                 node         node of the unrolled MDP, the row of every [N, A] policy and of `Solution`; ENDED after the end
                 action_mask  int8 [A], 1 on the legal tokens of the node (for `action_space.sample(mask=)`), 0 after the end
                 token        the token that was taken, -1 after a reset
                 num_redrawn  tokens of this response so far that were illegal and drawn anew

An illegal token is drawn anew, uniformly among the legal ones: an agent that knows no masks meets a proper MDP, and one that
draws uniformly among all tokens plays exactly `mdp.uniform()`. info["token"] says what was taken. With illegal="error" it is
a ValueError instead. `sample_tokens` draws from a policy [N, A] and never picks an illegal token.

`import sim` registers them as `TokenMDP/CalmChain-v0` and so on (sim.ENV_IDS).

Suffixes: B environments, R some of them, and those of unrolled.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.error import ResetNeeded
from gymnasium.utils import RecordConstructorArgs, seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from sim.lab.checks import Floats, Ints, check_choice, check_count
from sim.lab.instances import Instance, load
from sim.lab.stepping import RENDER_MODES, Illegal, Slots, frames, sample_tokens
from sim.lab.token_mdp import TokenMDP
from sim.lab.unrolled import ENDED

__all__ = ["TokenEnv", "TokenVectorEnv", "WindowCut", "sample_tokens"]
Observation = dict[str, Any]
METADATA = {"render_modes": RENDER_MODES, "render_fps": 4}
BLOCK = 64  # uniforms that the vector environment draws ahead per row


def _load(instance: str | Instance | TokenMDP, parameters: dict[str, Any]) -> Instance:
    if isinstance(instance, str):
        return load(instance, **parameters)
    if parameters:
        raise ValueError(f"parameters: got {', '.join(parameters)}; expected none beside an MDP that is built already")
    return Instance(instance, instance.uniform(), "") if isinstance(instance, TokenMDP) else instance


def _spaces(mdp: TokenMDP) -> tuple[spaces.Dict, spaces.Discrete]:
    num = {"state": mdp.num_states + 1, "tokens_left": mdp.max_tokens + 1}
    return spaces.Dict({name: spaces.Discrete(n) for name, n in num.items()}), spaces.Discrete(mdp.num_tokens)


def _tokens(actions: ArrayLike, num: int, num_tokens: int) -> Ints:
    token_B = np.asarray(actions)
    if token_B.shape != (num,) or not np.issubdtype(token_B.dtype, np.integer):
        raise ValueError(f"action: got {token_B.dtype} {list(token_B.shape)}; expected integers, shape [{num}]")
    wrong_B = (token_B < 0) | (token_B >= num_tokens)
    if wrong_B.any():
        raise ValueError(f"action: got {token_B[wrong_B][0]}; expected 0 .. {num_tokens - 1}")
    return token_B.astype(np.int64)


def _check_options(options: dict[str, Any] | None) -> None:
    if options:
        raise ValueError(f"options: got {', '.join(map(str, options))}; expected none")


def _checked_mode(mode: str | None) -> str | None:
    if mode is not None and mode not in RENDER_MODES:
        raise ValueError(f"render_mode: got {mode!r}; expected None, {' or '.join(RENDER_MODES)}")
    return mode


def _no_render_mode() -> None:
    gymnasium.logger.warn(f"render() without a render_mode; give one to the environment: {' or '.join(RENDER_MODES)}")


class TokenEnv(gymnasium.Env[Observation, Any]):
    """One response at a time. What it observes, when it ends and what `info` holds: the head of this file.

    instance    a name of `instances.INSTANCES`, with its parameters; or an `Instance`; or a `TokenMDP`
    illegal     "redraw" or "error": what becomes of an illegal token

    `mdp`, `policy_NA` and `story` are the instance's. `reset(seed=)` fixes all that follows; options are refused.
    ValueError for a token out of range (and an illegal one, if asked for), ResetNeeded for a step after the end.
    """

    metadata = METADATA

    def __init__(
        self,
        instance: str | Instance | TokenMDP,
        *,
        illegal: Illegal = "redraw",
        render_mode: str | None = None,
        **parameters: Any,
    ):
        self.mdp, self.policy_NA, self.story = _load(instance, parameters)
        self.observation_space, self.action_space = _spaces(self.mdp)
        self.render_mode = _checked_mode(render_mode)
        self._slots = Slots(self.mdp, 1, illegal, self._draw)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Observation, dict[str, Any]]:
        """Begins a response. seed fixes all that follows; there are no options."""
        _check_options(options)
        super().reset(seed=seed)
        self._slots.begin(np.zeros(1, dtype=np.int64))
        return self._observe()

    def step(self, action: Any) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """One token. The observation after an end is state S with the tokens that were left."""
        slots = self._slots
        if slots.node_B[0] == ENDED:
            raise ResetNeeded("step(): got no running response; expected reset() before it")
        slots.step(np.zeros(1, dtype=np.int64), _tokens(np.reshape(action, -1), 1, self.mdp.num_tokens))
        observation, info = self._observe()
        return observation, float(slots.reward_B[0]), bool(slots.ended_B[0]), False, info

    def _draw(self, rows_R: Ints) -> Floats:  # a method: a copy of the environment draws from the copy's generator
        return self.np_random.random(len(rows_R))

    def _observe(self) -> tuple[Observation, dict[str, Any]]:
        first: list[dict[str, Any]] = [
            {name: x_B[0] for name, x_B in batch.items()} for batch in (self._slots.observations(), self._slots.infos())
        ]
        return first[0], {name: x.item() if isinstance(x, np.integer) else x for name, x in first[1].items()}

    def render(self) -> Any:
        """A text of four lines ("ansi"), or the tokens as a strip of boxes under it ("rgb_array")."""
        return frames(self._slots, self.render_mode)[0] if self.render_mode else _no_render_mode()


class TokenVectorEnv(VectorEnv[Observation, NDArray[Any], NDArray[Any]]):
    """`num_envs` of `TokenEnv`, stepped together by NumPy: what `SyncVectorEnv` of them gives, under the same seeds.

    `reset(seed=s)` seeds row b with s + b (or with s[b] of a list), so that row b is `TokenEnv` after `reset(seed=s + b)`.

    autoreset_mode  what follows the end of a row's response (also in `metadata`):
        "NextStep"  the next `step` ignores the row's action and begins a response: reward 0, not terminated. The default
        "SameStep"  the same `step` begins one; the last observation and info lie in infos["final_obs"], infos["final_info"]
        "Disabled"  `reset(options={"reset_mask": bool [B]})` begins one; a step without it is ResetNeeded

    The other arguments, the spaces, the errors and the infos (arrays over the rows) are those of `TokenEnv`.
    """

    metadata = METADATA | {"autoreset_mode": AutoresetMode.NEXT_STEP}

    def __init__(
        self,
        instance: str | Instance | TokenMDP,
        *,
        num_envs: int = 1,
        autoreset_mode: str | AutoresetMode = AutoresetMode.NEXT_STEP,
        illegal: Illegal = "redraw",
        render_mode: str | None = None,
        **parameters: Any,
    ):
        self.mdp, self.policy_NA, self.story = _load(instance, parameters)
        self.num_envs = check_count("num_envs", num_envs)
        self.single_observation_space, self.single_action_space = _spaces(self.mdp)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.render_mode = _checked_mode(render_mode)
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = METADATA | {"autoreset_mode": self.autoreset_mode}
        self._slots = Slots(self.mdp, self.num_envs, illegal, self._draw)
        self._rngs, self._seeds = map(list, zip(*(seeding.np_random() for _ in range(self.num_envs)), strict=True))
        self._ahead_BK = np.empty((self.num_envs, BLOCK))
        self._used_B = np.full(self.num_envs, BLOCK)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Begins a response in every row, or in those of options["reset_mask"], bool [B]."""
        options = dict(options or {})
        mask_B = options.pop("reset_mask", np.ones(self.num_envs, dtype=bool))
        _check_options(options)
        if not isinstance(mask_B, np.ndarray) or mask_B.shape != (self.num_envs,) or mask_B.dtype != bool or not mask_B.any():
            raise ValueError(f"options['reset_mask']: got {mask_B!r}; expected bool [{self.num_envs}] with one True at least")
        seeds = [seed + b for b in range(self.num_envs)] if isinstance(seed, int | np.integer) else seed
        if seeds is not None and len(seeds) != self.num_envs:
            raise ValueError(f"seed: got {len(seeds)} seeds; expected one for each of the {self.num_envs} environments")
        rows_R = np.flatnonzero(mask_B)
        for b in rows_R.tolist():
            if seeds is not None and seeds[b] is not None:
                self._rngs[b], self._seeds[b] = seeding.np_random(seeds[b])
                self._used_B[b] = BLOCK
        self._slots.begin(rows_R)
        return self._slots.observations(), self._masked(self._slots.infos(), mask_B)

    def step(self, actions: NDArray[Any]) -> tuple[Observation, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """One token in every row that runs; what becomes of the others: `autoreset_mode`."""
        slots, infos = self._slots, {}
        token_B = _tokens(actions, self.num_envs, self.mdp.num_tokens)
        idle_B = slots.node_B == ENDED
        if idle_B.any() and (self.autoreset_mode != AutoresetMode.NEXT_STEP or not slots.ended_B[idle_B].all()):
            b = np.flatnonzero(idle_B)[0]
            raise ResetNeeded(f"step(): got no running response in environment {b}; expected reset() before it")
        rows_R = np.flatnonzero(~idle_B)
        slots.step(rows_R, token_B[rows_R])
        if idle_B.any():
            slots.begin(np.flatnonzero(idle_B))
        reward_B, ended_B = slots.reward_B.copy(), slots.ended_B
        if self.autoreset_mode == AutoresetMode.SAME_STEP and ended_B.any():
            infos = self._final(ended_B)
            slots.begin(np.flatnonzero(ended_B))
        infos |= self._masked(slots.infos(), np.ones(self.num_envs, dtype=bool))
        return slots.observations(), reward_B, ended_B, np.zeros(self.num_envs, dtype=bool), infos

    def render(self) -> Any:
        """A tuple with each row's frame."""
        return frames(self._slots, self.render_mode) if self.render_mode else _no_render_mode()

    @property  # type: ignore[misc]  # not one generator to read and set, as in SyncVectorEnv
    def np_random(self) -> Any:
        """Each row's generator. They run ahead: uniforms are drawn in blocks."""
        return tuple(self._rngs)

    @property
    def np_random_seed(self) -> Any:
        """Each row's seed."""
        return tuple(self._seeds)

    def _draw(self, rows_R: Ints) -> Floats:
        """The next uniform of each row, as its generator's `random()` would give it."""
        for b in rows_R[self._used_B[rows_R] == BLOCK]:
            self._ahead_BK[b], self._used_B[b] = self._rngs[b].random(BLOCK), 0
        u_R = self._ahead_BK[rows_R, self._used_B[rows_R]]
        self._used_B[rows_R] += 1
        return u_R

    def _masked(self, infos: dict[str, NDArray[Any]], mask_B: NDArray[np.bool_]) -> dict[str, Any]:
        """As Gymnasium has it: beside each array its mask, and 0 or None outside of it."""
        out: dict[str, Any] = {}
        for name, x_B in infos.items():
            out[name], out[f"_{name}"] = np.full_like(x_B, None if x_B.dtype == object else 0), mask_B.copy()
            out[name][mask_B] = x_B[mask_B]
        return out

    def _final(self, ended_B: NDArray[np.bool_]) -> dict[str, Any]:
        last, final_obs = self._slots.observations(), np.full(self.num_envs, None, dtype=object)
        for b in np.flatnonzero(ended_B):
            final_obs[b] = {name: x_B[b] for name, x_B in last.items()}
        final_info = self._masked(self._slots.infos(), ended_B)
        return self._masked({"final_obs": final_obs}, ended_B) | {"final_info": final_info, "_final_info": ended_B.copy()}


class WindowCut(gymnasium.Wrapper, RecordConstructorArgs):
    """Cuts a response after `window` tokens: `truncated`, while the response is RUNNING.

    The two flags ask for different targets behind the last token a_(l-1):

        terminated   0. The response is over (END_TOKEN or LENGTH_CAP); also where that falls on the window's edge
        truncated    V(s_l). The response lives on, and the observation returned with the cut is s_l: bootstrap from it

    A trainer that merges both into "done" takes 0 for V(s_l), `egae(cut_value="zero")`. Stable-Baselines3 puts the critic's own
    V(s_l) there, "critic"; T-PPO puts V(s_(l-1)), "previous" (tppo_ref.method.advantages.egae; what each costs: bias.py).

    after = "continue"  the `reset()` after a cut goes on with the same response, as T-PPO's next window does; nothing is drawn,
                        its first observation is that of the cut, and the budget of tokens runs on
    after = "anew"      it begins another response; the rest of this one is dropped, nobody sees how it ends (`num_dropped`)

    `reset(seed=)` and a `reset()` without a cut before it begin a response in both cases. Every `reset()` opens a full window,
    also after an end: SlotSchedule's refill="step", in which a freed slot waits. info["window"] counts the response's windows.
    """

    def __init__(self, env: gymnasium.Env, window: int, after: Literal["continue", "anew"] = "continue"):
        check_choice("after", after, ("continue", "anew"))
        RecordConstructorArgs.__init__(self, window=window, after=after)
        gymnasium.Wrapper.__init__(self, env)
        self.window, self.after = check_count("window", window), after
        self._num_tokens, self._window_index, self.num_dropped = 0, 0, 0
        self._cut: tuple[Any, dict[str, Any]] | None = None  # where the response goes on

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Opens a window: on the response that was cut, or on another one (see `after`)."""
        if self._cut is not None and self.after == "continue" and seed is None and not options:
            observation, info = self._cut
            self._window_index += 1
        else:
            observation, info = self.env.reset(seed=seed, options=options)
            self.num_dropped += self._cut is not None
            self._window_index = 0
        self._cut, self._num_tokens = None, 0
        return observation, info | {"window": self._window_index}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """One token; truncated where it fills the window and the response goes on."""
        if self._cut is not None:
            raise ResetNeeded("step(): got a full window; expected reset() before it")
        observation, reward, terminated, truncated, info = self.env.step(action)
        self._num_tokens += 1
        if self._num_tokens == self.window and not (terminated or truncated):
            truncated, self._cut = True, copy.deepcopy((observation, info))
        return observation, reward, terminated, truncated, info | {"window": self._window_index}

    def render(self) -> Any:
        """The environment's frame; a text gets a line on the window."""
        frame = self.env.render()
        edge = ", cut here" if self._cut is not None else ""
        line = f"\n  window: {self._window_index}, {self._num_tokens} of {self.window} tokens{edge}"
        return frame + line if isinstance(frame, str) else frame
