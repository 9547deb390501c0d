"""envs.py against Gymnasium's checker and SyncVectorEnv, the exact solution of the same MDP, hand cases, and a stock PPO."""

from __future__ import annotations

import copy
import json
import math
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import scipy.stats
import torch
from gymnasium.error import ResetNeeded
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st

from sim import ENV_IDS
from sim.lab.envs import TokenEnv, TokenVectorEnv, WindowCut, sample_tokens
from sim.lab.instances import INSTANCES, load
from sim.lab.token_mdp import ENDED, Edges, TokenMDP
from tppo_ref.method.records import End

ROOT = Path(__file__).resolve().parents[1]
MODES = tuple(AutoresetMode)


@pytest.fixture(autouse=True)
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def walk(env: gymnasium.Env, tokens, seed: int | None = None) -> list[tuple]:
    """Everything that comes back from a reset and from one step per token, until the end."""
    out = [env.reset(seed=seed)]
    for token in tokens:
        out.append(env.step(token))
        if out[-1][2] or out[-1][3]:
            break
    return out


def equal(one, two) -> bool:
    """Same nested values, types and dtypes."""
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[k], two[k]) for k in one)
    if isinstance(one, tuple | list):
        return len(one) == len(two) and all(map(equal, one, two))
    if isinstance(one, np.ndarray):
        if one.dtype == object:
            return one.shape == two.shape and all(map(equal, one.tolist(), two.tolist()))
        return one.dtype == two.dtype and np.array_equal(one, two)
    return one == two


def by_hand() -> TokenMDP:
    """Token "go" leads from 0 to 1 to 0, token "stop" ends in state 1 alone, for 2; going costs 0.5; the cap gives -8 or -4."""
    edges = Edges([0, 1, 1], [0, 0, 1], [1, 1, 1], [-0.5, -0.5, 2], [1, 0, ENDED])
    return TokenMDP(num_states=2, num_tokens=2, edges=edges, max_tokens=3, gamma=0.5, cap_reward_S=[-4, -8], name="by hand",
                    state_names=("even", "odd"), token_names=("go", "stop"))  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- registration

IMPORT = """
import json, sys, warnings
warnings.simplefilter("error")
import gymnasium, numpy as np
before, state, filters = set(gymnasium.registry), np.random.get_state()[1].tolist(), list(warnings.filters)
import sim, importlib
importlib.reload(sim)
new = set(gymnasium.registry) - before
kept = np.random.get_state()[1].tolist() == state and list(warnings.filters) == filters and before < set(gymnasium.registry)
slow = sorted({"matplotlib", "torch", "scipy", "tppo_ref"} & set(sys.modules))
inside = [name for name in sys.modules if name.startswith("sim.")]
made = [gymnasium.make("TokenMDP/Cliff-v0", length=12).reset(seed=0)[1]["end"], gymnasium.make_vec("TokenMDP/Cliff-v0", num_envs=2).num_envs]
print(json.dumps({"new": sorted(new), "kept": kept, "slow": slow, "sim": inside, "made": made}))
"""


def test_importing_registers_one_id_per_instance_and_changes_nothing_else():
    run = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    expected = [
        "TokenMDP/CalmChain-v0", "TokenMDP/Cliff-v0", "TokenMDP/EarlyDecision-v0", "TokenMDP/LateDecision-v0",
        "TokenMDP/NoisyReward-v0", "TokenMDP/Random-v0", "TokenMDP/Thinking-v0",
    ]  # fmt: skip
    assert json.loads(run.stdout) == {"new": expected, "kept": True, "slow": [], "sim": [], "made": ["RUNNING", 2]}
    assert sorted(ENV_IDS.values()) == expected
    assert list(ENV_IDS) == list(INSTANCES)


@pytest.mark.parametrize("name", INSTANCES)
def test_gymnasiums_checker_passes_without_a_warning(name):
    env = gymnasium.make(ENV_IDS[name])
    assert env.unwrapped.mdp.name == load(name).mdp.name
    check_env(env.unwrapped)


@pytest.mark.parametrize("name", INSTANCES)
def test_make_vec_gives_the_vector_environment_with_its_mode_in_the_metadata(name):
    envs = gymnasium.make_vec(ENV_IDS[name], num_envs=3)
    assert isinstance(envs, TokenVectorEnv)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    assert (
        gymnasium.make_vec(ENV_IDS[name], num_envs=3, autoreset_mode="SameStep").metadata["autoreset_mode"]
        is AutoresetMode.SAME_STEP
    )
    assert envs.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP, "the class's own metadata stay as they are"
    observations, _ = envs.reset(seed=0)
    assert observations in envs.observation_space
    envs.action_space.seed(0)
    for _ in range(5):
        observations, rewards, terminated, truncated, _ = envs.step(envs.action_space.sample())
        assert observations in envs.observation_space
        assert (rewards.dtype, terminated.dtype, truncated.dtype) == (np.float64, np.bool_, np.bool_)
        assert not truncated.any()


def test_parameters_of_the_instance_pass_through_make():
    assert gymnasium.make(ENV_IDS["cliff"], length=6).unwrapped.mdp.max_tokens == 6
    assert gymnasium.make_vec(ENV_IDS["cliff"], num_envs=2, length=6).mdp.max_tokens == 6
    assert TokenEnv("cliff", length=6).mdp.max_tokens == 6
    made = load("thinking", length=5)
    assert TokenEnv(made).mdp is made.mdp
    assert TokenEnv(made).policy_NA is made.policy_NA
    assert (TokenEnv(made.mdp).policy_NA == made.mdp.uniform()).all()


def test_stable_baselines3s_checker_passes():
    from stable_baselines3.common.env_checker import check_env as check

    check(TokenEnv("noisy-reward"))


# --------------------------------------------------------------------------------------------- what is seen, and when it ends


@pytest.mark.parametrize("name", INSTANCES)
def test_the_same_seed_and_tokens_give_the_same_response_and_others_do_not(name):
    def responses(seed):
        env, rng = TokenEnv(name, illegal="redraw"), np.random.default_rng(0)
        out = []
        for i in range(6):
            out += walk(env, rng.integers(env.mdp.num_tokens, size=env.mdp.max_tokens), seed=seed if i == 0 else None)
        return out

    assert equal(responses(3), responses(3))
    if name in ("noisy-reward", "calm-chain", "thinking"):  # the others draw nothing but tokens that are illegal
        assert not equal(responses(3), responses(4))


def test_a_response_by_hand():
    env = TokenEnv(by_hand())
    (observation, info), *rest = walk(env, [0, 0, 0], seed=0)
    assert observation == {"state": 0, "tokens_left": 3}
    assert info.pop("action_mask").tolist() == [1, 0]
    assert info == {"end": "RUNNING", "node": 0, "token": -1, "num_redrawn": 0}
    flat = [
        (o["state"], o["tokens_left"], r, t, cut, i["end"], i["node"], i["token"], i["action_mask"].tolist())
        for o, r, t, cut, i in rest
    ]
    assert flat == [
        (1, 2, -0.5, False, False, "RUNNING", 1, 0, [1, 1]),
        (0, 1, -0.5, False, False, "RUNNING", 2, 0, [1, 0]),
        (2, 0, -8.5, True, False, "LENGTH_CAP", ENDED, 0, [0, 0]),  # in state "odd"; 2 is the state after the end
    ]
    *_, (observation, reward, terminated, truncated, info) = walk(env, [0, 1])
    assert (observation, reward, terminated, truncated) == ({"state": 2, "tokens_left": 1}, 2.0, True, False)
    assert (info["end"], info["node"], info["token"]) == ("END_TOKEN", ENDED, 1)


def test_first_states_come_as_often_as_the_mdp_says():
    rows = [(s, 0, 1.0, 0.0, ENDED) for s in range(4)]
    edges = Edges(*map(list, zip(*rows, strict=True)))
    mdp = TokenMDP(num_states=4, num_tokens=1, edges=edges, max_tokens=1, start_S=[0.2, 0, 0.5, 0.3])
    observations, infos = TokenVectorEnv(mdp, num_envs=3000).reset(seed=0)
    observed = np.bincount(observations["state"], minlength=4)
    assert observed[1] == 0
    assert scipy.stats.chisquare(observed[[0, 2, 3]], [600, 1500, 900]).pvalue > 1e-3
    assert (mdp.state_N[infos["node"]] == observations["state"]).all()


@pytest.mark.parametrize("make", [lambda: TokenEnv("noisy-reward"), lambda: TokenVectorEnv("noisy-reward", num_envs=2)])
@pytest.mark.parametrize("clone", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])
def test_a_copy_goes_on_like_the_original_and_by_itself(make, clone):
    env = make()
    zeros = 0 if isinstance(env, TokenEnv) else np.zeros(2, dtype=int)
    env.reset(seed=0)
    env.step(zeros)
    other = clone(env)
    expected = [env.step(zeros) for _ in range(5)]
    assert equal([other.step(zeros) for _ in range(5)], expected)
    assert len({np.sum(step[1]) for step in expected}) > 1


def test_an_end_token_as_the_last_allowed_one_is_an_end_token():
    mdp = TokenMDP(num_states=1, num_tokens=2, edges=Edges([0, 0], [0, 1], [1, 1], [0, 1], [0, ENDED]), max_tokens=2)
    *_, (observation, _, terminated, _, info) = walk(TokenEnv(mdp), [0, 1])
    assert (observation["tokens_left"], terminated, info["end"]) == (0, True, "END_TOKEN")
    *_, (observation, _, terminated, _, info) = walk(TokenEnv(mdp), [0, 0])
    assert (observation["tokens_left"], terminated, info["end"]) == (0, True, "LENGTH_CAP")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 500), tokens_seed=st.integers(0, 100))
def test_info_names_the_end_if_and_only_if_terminated_and_the_observation_is_the_nodes(seed, tokens_seed):
    env = TokenEnv("random", seed=seed, outcomes=2, p_end=0.15)
    mdp, rng = env.mdp, np.random.default_rng(tokens_seed)
    response = walk(env, rng.integers(mdp.num_tokens, size=mdp.max_tokens), seed=tokens_seed)
    (_, before), steps = response[0], response[1:]
    for t, (observation, reward, terminated, truncated, info) in enumerate(steps):
        assert terminated == (info["end"] != "RUNNING") == (info["node"] == ENDED) == (t == len(steps) - 1)
        assert truncated is False
        assert observation["tokens_left"] == mdp.max_tokens - t - 1
        if not terminated:
            assert mdp.depth_N[info["node"]] == t + 1
            assert observation["state"] == mdp.state_N[info["node"]]
        edge = (mdp.node_E == before["node"]) & (mdp.token_E == info["token"]) & (mdp.next_E == info["node"])
        assert (End[info["end"]], reward) in list(zip(mdp.end_E[edge], mdp.reward_E[edge], strict=True)), "no such edge"
        assert (info["end"] == "LENGTH_CAP") <= (observation["tokens_left"] == 0)
        before = info


# ----------------------------------------------------------------------------------------------------------- illegal tokens


def test_an_illegal_token_is_drawn_anew_uniformly_among_the_legal_ones_and_counted():
    rows = [(0, a, 1.0, float(a), ENDED) for a in (0, 2, 3)]  # token 1 is illegal
    mdp = TokenMDP(num_states=1, num_tokens=4, edges=Edges(*map(list, zip(*rows, strict=True))), max_tokens=1)
    envs = TokenVectorEnv(mdp, num_envs=3000)
    envs.reset(seed=0)
    _, rewards, _, _, infos = envs.step(np.full(3000, 1))
    assert (infos["num_redrawn"] == 1).all()
    assert (infos["token"] == rewards).all()
    observed = np.bincount(infos["token"], minlength=4)
    assert observed[1] == 0
    assert scipy.stats.chisquare(observed[[0, 2, 3]]).pvalue > 1e-3
    envs.reset(seed=0)
    _, _, _, _, infos = envs.step(np.full(3000, 3))
    assert (infos["token"] == 3).all()
    assert (infos["num_redrawn"] == 0).all()


def test_an_illegal_token_is_an_error_where_asked_for():
    env = TokenEnv(by_hand(), illegal="error")
    env.reset(seed=0)
    with pytest.raises(ValueError, match=r"action: got 1 \(stop\), illegal in state even; expected 0 \(go\)"):
        env.step(1)
    assert env.step(0)[0] == {"state": 1, "tokens_left": 2}, "the refused token left no trace"
    envs = TokenVectorEnv(by_hand(), num_envs=2, illegal="error")
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="illegal in state even"):
        envs.step(np.array([0, 1]))


def test_the_redraws_of_one_response_are_counted_until_the_next():
    env = TokenEnv("cliff", length=6)
    env.reset(seed=0)
    assert [env.step(token)[4]["num_redrawn"] for token in (1, 0, 1)] == [1, 1, 2]
    assert env.reset()[1]["num_redrawn"] == 0


def test_sampled_tokens_follow_the_policy_and_are_legal():
    mdp = by_hand()
    policy_NA = np.array([[1, 0], [0.3, 0.7], [1, 0]])
    node_B = np.repeat([0, 1, 2, ENDED], 5000)
    token_B = sample_tokens(mdp, node_B, np.random.default_rng(0), policy_NA)
    assert (token_B[node_B != 1] == 0).all()
    assert abs(token_B[node_B == 1].mean() - 0.7) < 4 * math.sqrt(0.21 / 5000)
    assert abs(sample_tokens(mdp, node_B, np.random.default_rng(0))[node_B == 1].mean() - 0.5) < 4 * math.sqrt(0.25 / 5000)
    assert sample_tokens(mdp, 0, np.random.default_rng(0)).shape == ()
    assert not sample_tokens(load("noisy-reward").mdp, np.full(99, ENDED), np.random.default_rng(0)).any(), "0 after the end"
    with pytest.raises(ValueError, match="policy_NA"):
        sample_tokens(mdp, node_B, np.random.default_rng(0), policy_NA[:2])


def test_gymnasiums_own_masked_sampling_reads_the_mask():
    env = TokenEnv("calm-chain", length=5, illegal="error")
    env.action_space.seed(0)
    for seed in range(20):
        _, info = env.reset(seed=seed)
        while info["end"] == "RUNNING":
            *_, info = env.step(env.action_space.sample(mask=info["action_mask"]))


# ------------------------------------------------------------------------------------------------ the same MDP as the solution


def rollouts(envs: TokenVectorEnv, choose) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Discounted return, length and end of the first response of every row."""
    mdp, rows = envs.mdp, np.arange(envs.num_envs)
    _, infos = envs.reset(seed=7)
    returns, lengths, ends = np.zeros(len(rows)), np.zeros(len(rows), dtype=int), np.full(len(rows), "RUNNING", dtype=object)
    for t in range(mdp.max_tokens):
        alive = ends == "RUNNING"
        _, rewards, terminated, _, infos = envs.step(choose(infos))
        returns += np.where(alive, mdp.gamma**t * rewards, 0)
        lengths += alive
        ended = alive & terminated
        ends[ended] = infos["end"][ended]
        if not (alive & ~terminated).any():
            break
    return returns, lengths, ends.tolist()


def agree(sample: np.ndarray, exact: float) -> None:
    assert abs(sample.mean() - exact) <= 4 * sample.std() / math.sqrt(len(sample)) + 1e-12


@pytest.mark.parametrize("name", INSTANCES)
@pytest.mark.parametrize("agent", ["knows no masks", "plays the instance's policy"])
def test_returns_lengths_and_ends_of_the_vector_environment_are_those_of_the_exact_solution(name, agent):
    envs = TokenVectorEnv(name, num_envs=4000, **({"outcomes": 2} if name == "random" else {}))
    mdp, rng = envs.mdp, np.random.default_rng(5)
    if agent == "knows no masks":  # uniform over all tokens: with the redraws that is uniform over the legal ones
        policy_NA, choose = mdp.uniform(), lambda infos: rng.integers(mdp.num_tokens, size=4000)
    else:
        policy_NA, choose = envs.policy_NA, lambda infos: sample_tokens(mdp, infos["node"], rng, envs.policy_NA)
    solution = mdp.solve(policy_NA)
    returns, lengths, ends = rollouts(envs, choose)
    agree(returns, solution.mean_return)
    agree(lengths, solution.length_T @ np.arange(mdp.max_tokens + 1))
    capped = solution.ends_E[mdp.end_E == End.LENGTH_CAP].sum()
    agree(np.array([end == "LENGTH_CAP" for end in ends], dtype=float), capped)
    assert set(ends) <= {"END_TOKEN", "LENGTH_CAP"}


@pytest.mark.parametrize("name", ["thinking", "random"])
def test_the_mean_return_of_the_single_environment_is_the_exact_one(name):
    env = TokenEnv(name, **({"outcomes": 2, "gamma": 0.8} if name == "random" else {"length": 8}))
    rng, returns = np.random.default_rng(3), []
    for i in range(1500):
        _, *steps = walk(env, rng.integers(env.mdp.num_tokens, size=env.mdp.max_tokens), seed=0 if i == 0 else None)
        returns.append(sum(env.mdp.gamma**t * step[1] for t, step in enumerate(steps)))
    agree(np.array(returns), env.mdp.solve(env.mdp.uniform()).mean_return)


# -------------------------------------------------------------------------------------------------------- single and vector

COMPARED = {
    "noisy outcomes": ("random", {"outcomes": 3, "p_end": 0.3}),
    "illegal tokens": ("cliff", {"length": 5}),
    "noise and ends": ("noisy-reward", {"length": 4}),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", COMPARED)
def test_the_vector_environment_is_gymnasiums_sync_vector_of_single_ones_bit_for_bit(case, mode):
    """Observations, rewards, flags and infos, with what stands in final_obs and final_info, through many responses."""
    name, parameters = COMPARED[case]
    envs = TokenVectorEnv(name, num_envs=4, autoreset_mode=mode, **parameters)
    sync = SyncVectorEnv([lambda: TokenEnv(name, **parameters)] * 4, autoreset_mode=mode)
    assert envs.observation_space == sync.observation_space
    assert envs.action_space == sync.action_space
    assert envs.metadata["autoreset_mode"] is sync.metadata["autoreset_mode"]
    rng = np.random.default_rng(0)
    assert equal(envs.reset(seed=11), sync.reset(seed=11))
    num_ended = 0
    for step in range(90):
        if step == 40:
            assert equal(envs.reset(), sync.reset()), "without a seed the streams go on"
        if step == 60:
            assert equal(envs.reset(seed=[5, None, 7, 5]), sync.reset(seed=[5, None, 7, 5]))
        actions = rng.integers(envs.mdp.num_tokens, size=4)
        one, two = envs.step(actions), sync.step(actions)
        assert equal(one, two), step
        num_ended += one[2].sum()
        if mode is AutoresetMode.DISABLED and one[2].any():
            assert equal(*(x.reset(options={"reset_mask": one[2].copy()}) for x in (envs, sync))), step
    assert num_ended > 20


def test_row_b_is_the_single_environment_seeded_with_s_plus_b_also_beyond_a_block_of_uniforms():
    envs = TokenVectorEnv("random", outcomes=3, num_envs=3, autoreset_mode="SameStep")
    singles = [TokenEnv("random", outcomes=3) for _ in range(3)]
    observations, _ = envs.reset(seed=100)
    for b, env in enumerate(singles):
        assert {name: x[b] for name, x in observations.items()} == env.reset(seed=100 + b)[0]
    rng = np.random.default_rng(0)
    for _ in range(200):
        actions = rng.integers(3, size=3)
        observations, rewards, terminated, _, _ = envs.step(actions)
        for b, env in enumerate(singles):
            observation, reward, ended, _, _ = env.step(actions[b])
            assert (reward, ended) == (rewards[b], terminated[b])
            observation = env.reset()[0] if ended else observation
            assert {name: x[b] for name, x in observations.items()} == observation


def test_a_row_does_not_see_its_neighbours():
    """The same seed, other tokens in the other rows: row 1 is the same."""
    rewards = []
    for other in (0, 1):
        envs = TokenVectorEnv("noisy-reward", num_envs=3)
        envs.reset(seed=0)
        rewards.append([envs.step(np.array([other, 0, 2 * other]))[1][1] for _ in range(30)])
    assert rewards[0] == rewards[1]
    assert len(set(rewards[0])) > 2


def test_what_was_returned_is_not_changed_by_later_steps():
    envs = TokenVectorEnv("noisy-reward", num_envs=3, autoreset_mode="SameStep")
    first = envs.reset(seed=0)
    copies = [repr(first)]
    returned = [first]
    for _ in range(10):
        returned.append(envs.step(np.array([0, 1, 2])))
        copies.append(repr(returned[-1]))
    assert [repr(x) for x in returned] == copies


# ----------------------------------------------------------------------------------------------------------------- WindowCut


def windows(env: WindowCut, tokens, seed: int) -> list[list[tuple]]:
    """A response window by window: what `reset` and each `step` returned, until it ended."""
    out, (observation, info) = [], env.reset(seed=seed)
    tokens = iter(tokens)
    while True:
        rows = [(observation, None, False, False, info)]
        while not (rows[-1][2] or rows[-1][3]):
            rows.append(env.step(next(tokens)))
        out.append(rows)
        if rows[-1][2]:
            return out
        observation, info = env.reset()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), window=st.integers(1, 8), name=st.sampled_from(["random", "cliff", "noisy-reward", "thinking"]))
def test_windows_that_continue_join_to_the_uncut_response_and_are_cut_exactly_at_the_edges(seed, window, name):
    parameters = {"seed": seed % 50, "outcomes": 2} if name == "random" else {"length": 7}
    tokens = np.random.default_rng(seed).integers(2, size=40)
    whole = walk(TokenEnv(name, **parameters), tokens, seed=seed)
    pieces = windows(WindowCut(TokenEnv(name, **parameters), window), tokens, seed=seed)
    length = len(whole) - 1
    assert [len(rows) - 1 for rows in pieces] == [window] * ((length - 1) // window) + [(length - 1) % window + 1]
    for i, rows in enumerate(pieces):
        for observation, _, terminated, truncated, info in rows:
            assert info["window"] == i
            assert not (terminated and truncated)
            assert truncated <= (info["end"] == "RUNNING"), "an ended response is never cut"
            assert terminated == (info["end"] != "RUNNING")
            assert observation["tokens_left"] >= 0
        assert rows[-1][3] == (i < len(pieces) - 1)
        if i:
            assert equal(rows[0][0], pieces[i - 1][-1][0]), "the next window begins where the last one was cut"
    joined = [row for rows in pieces for row in rows[1:]]
    for (observation, reward, terminated, _, info), expected in zip(joined, whole[1:], strict=True):
        assert equal(
            (observation, reward, terminated, {k: v for k, v in info.items() if k != "window"}), (*expected[:3], expected[4])
        )


def test_a_response_that_ends_on_the_edge_is_terminated_and_not_truncated():
    for tokens, end in (([0, 1], "END_TOKEN"), ([0, 0, 0], "LENGTH_CAP")):
        env = WindowCut(TokenEnv(by_hand()), len(tokens))
        *_, last = walk(env, tokens, seed=0)
        assert last[2:4] == (True, False)
        assert last[4]["end"] == end
        assert env.reset()[0] == {"state": 0, "tokens_left": 3}, "the next one is another response"


def test_after_a_cut_anew_begins_another_response_and_counts_what_it_drops():
    env = WindowCut(TokenEnv(by_hand()), 2, after="anew")
    *_, last = walk(env, [0, 0], seed=0)
    assert last[2:4] == (False, True)
    assert last[0] == {"state": 0, "tokens_left": 1}
    observation, info = env.reset()
    assert observation == {"state": 0, "tokens_left": 3}
    assert info["window"] == 0
    assert env.num_dropped == 1


def test_after_a_cut_a_seed_begins_another_response_and_a_reset_within_the_window_does_too():
    env = WindowCut(TokenEnv(by_hand()), 2)
    walk(env, [0, 0], seed=0)
    assert env.reset()[0] == {"state": 0, "tokens_left": 1}
    env.step(0)
    assert env.reset()[0] == {"state": 0, "tokens_left": 3}
    assert env.num_dropped == 0
    walk(env, [0, 0])
    assert env.reset(seed=1)[0] == {"state": 0, "tokens_left": 3}
    assert env.num_dropped == 1


def test_a_full_window_takes_no_step():
    env = WindowCut(TokenEnv(by_hand()), 2)
    walk(env, [0, 0], seed=0)
    with pytest.raises(ResetNeeded, match=r"step\(\): got a full window"):
        env.step(0)


def test_wrappers_may_lie_on_either_side_of_the_cut():
    env = gymnasium.wrappers.FlattenObservation(WindowCut(gymnasium.make(ENV_IDS["thinking"], length=4), 2))
    observation, _ = env.reset(seed=0)
    assert observation.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]  # state 0 of 5, 4 tokens left of 0 .. 4
    inside = WindowCut(gymnasium.wrappers.FlattenObservation(gymnasium.make(ENV_IDS["thinking"], length=4)), 2)
    *_, last = walk(inside, [0, 0], seed=0)
    assert last[0].tolist() == [0, 0, 1, 0, 0, 0, 0, 1, 0, 0]
    assert last[3]
    last[0][:] = 9
    assert inside.reset()[0].tolist() == [0, 0, 1, 0, 0, 0, 0, 1, 0, 0], "the cut's observation is a copy"


def test_a_cut_that_the_environment_makes_itself_is_passed_on_and_not_continued():
    env = WindowCut(gymnasium.wrappers.TimeLimit(TokenEnv("thinking", length=6), 2), 2)
    *_, last = walk(env, [0, 0], seed=0)
    assert last[3]
    assert env.reset()[0] == {"state": 0, "tokens_left": 6}


@pytest.mark.parametrize("window", [2, 5])
def test_bootstrapping_at_truncated_is_right_and_at_terminated_it_is_not(window):
    """E[rewards of the window + V(s_l) where truncated] = V(s_0). Without V (a cut taken for an end) it is off by E[V(s_l)]."""
    env = WindowCut(TokenEnv("thinking", length=6, p_end=0.3, start=0.6), window, after="anew")
    base = env.unwrapped
    value_N = base.mdp.solve(base.policy_NA).value_N
    rng, right, as_an_end = np.random.default_rng(0), [], []
    for i in range(2500):
        _, info = env.reset(seed=0 if i == 0 else None)
        rewards, terminated, truncated = 0.0, False, False
        while not (terminated or truncated):
            _, reward, terminated, truncated, info = env.step(sample_tokens(base.mdp, info["node"], rng, base.policy_NA))
            rewards += reward
        right.append(rewards + (value_N[info["node"]] if truncated else 0.0))
        as_an_end.append(rewards)
    agree(np.array(right), value_N[0])
    error = (np.mean(as_an_end) - value_N[0]) / (np.std(as_an_end) / math.sqrt(len(as_an_end)))
    assert abs(error) > 5


# -------------------------------------------------------------------------------------------------------------------- render


def test_the_rendered_text_of_a_case_by_hand():
    env = TokenEnv(by_hand(), render_mode="ansi")
    env.reset(seed=0)
    fresh = env.render()
    assert fresh == (
        "by hand: 0 of 3 tokens, 3 left, RUNNING\n  tokens: none yet\n  state:  even\n  reward: +0 last, +0 in all, discounted"
    )
    env.step(1)  # illegal in "even": drawn anew
    assert env.render() == (
        "by hand: 1 of 3 tokens, 2 left, RUNNING\n"
        "  tokens: go (1 drawn anew)\n"
        "  state:  odd\n"
        "  reward: -0.5 last, -0.5 in all, discounted"
    )
    env.step(1)
    assert env.render() == (
        "by hand: 2 of 3 tokens, 1 left, END_TOKEN\n"
        "  tokens: go | stop (1 drawn anew)\n"
        "  state:  none\n"
        "  reward: +2 last, +0.5 in all, discounted"
    )
    _, info = env.reset()
    assert env.render() == fresh, "nothing of the last response is left"
    assert (info["token"], info["num_redrawn"]) == (-1, 0)


def test_the_rendered_text_says_where_the_window_stands():
    env = WindowCut(TokenEnv(by_hand(), render_mode="ansi"), 2)
    env.reset(seed=0)
    env.step(0)
    assert env.render().splitlines()[-1] == "  window: 0, 1 of 2 tokens"
    env.step(0)
    assert env.render().splitlines()[-1] == "  window: 0, 2 of 2 tokens, cut here"
    env.reset()
    assert env.render().splitlines()[-1] == "  window: 1, 0 of 2 tokens"
    env.step(0)
    assert env.render().splitlines()[0] == "by hand: 3 of 3 tokens, 0 left, LENGTH_CAP"


def test_pictures_show_the_tokens():
    env = TokenEnv(by_hand(), render_mode="rgb_array")
    env.reset(seed=0)
    before = env.render()
    assert (before.dtype, before.ndim, before.shape[2]) == (np.uint8, 3, 3)
    env.step(0)
    after = env.render()
    assert after.shape == before.shape
    blue = (np.abs(after.astype(int) - [31, 119, 180]).max(-1) <= 3).sum() - (
        np.abs(before.astype(int) - [31, 119, 180]).max(-1) <= 3
    ).sum()
    width = after.shape[1]
    assert blue > width * 5, "one box of three, in the colour of the token"
    assert equal(after, env.render())


def test_the_vector_environment_renders_every_row():
    envs = TokenVectorEnv(by_hand(), num_envs=2, render_mode="ansi")
    envs.reset(seed=0)
    envs.step(np.array([0, 0]))
    envs.step(np.array([0, 1]))
    assert [text.splitlines()[1] for text in envs.render()] == ["  tokens: go | go", "  tokens: go | stop"]


@pytest.mark.parametrize("env", [TokenEnv("cliff"), TokenVectorEnv("cliff")])
def test_without_a_render_mode_a_warning_names_the_remedy(env):
    env.reset(seed=0)
    with pytest.warns(UserWarning, match="render.. without a render_mode; give one to the environment: ansi or rgb_array"):
        assert env.render() is None


# ------------------------------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: TokenEnv("cliv"), r"did you mean cliff\?"),
        (lambda: TokenEnv("cliff", lenght=3), r"cliff: got parameter 'lenght'"),
        (lambda: TokenEnv(load("cliff"), length=3), r"parameters: got length; expected none beside an MDP that is built already"),
        (lambda: TokenEnv("cliff", render_mode="human"), r"render_mode: got 'human'; expected None, ansi or rgb_array"),
        (lambda: TokenEnv("cliff", illegal="skip"), r"illegal: got 'skip'; expected one of redraw, error"),
        (lambda: TokenVectorEnv("cliff", num_envs=0), r"num_envs: got 0"),
        (lambda: TokenVectorEnv("cliff", autoreset_mode="Sometimes"), r"Sometimes"),
        (lambda: WindowCut(TokenEnv("cliff"), 0), r"window: got 0; expected an integer of at least 1"),
        (lambda: WindowCut(TokenEnv("cliff"), 2.5), r"window: got 2\.5"),
        (lambda: WindowCut(TokenEnv("cliff"), 2, after="wait"), r"after: got 'wait'; expected one of continue, anew"),
        (lambda: TokenEnv("cliff").reset(options={"node": 3}), r"options: got node; expected none"),
        (lambda: TokenVectorEnv("cliff").reset(options={"mask": 3}), r"options: got mask; expected none"),
        (lambda: TokenVectorEnv("cliff", num_envs=2).reset(seed=[1]), r"seed: got 1 seeds; expected one for each of the 2"),
        (lambda: TokenVectorEnv("cliff", num_envs=2).reset(options={"reset_mask": np.zeros(2, bool)}), r"options\['reset_mask'\]"),
        (
            lambda: TokenVectorEnv("cliff", num_envs=2).reset(options={"reset_mask": np.ones(3, bool)}),
            r"expected bool \[2\]",
        ),
        (lambda: TokenVectorEnv("cliff", num_envs=2).reset(options={"reset_mask": [True, True]}), r"expected bool \[2\]"),
    ],
)
def test_mistakes_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize("action", [-1, 2, 0.7, None, [0, 1], True])
def test_what_is_no_token_is_refused_and_leaves_no_trace(action):
    env = TokenEnv("thinking", length=4)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="action"):
        env.step(action)
    assert env.step(0)[0] == {"state": 1, "tokens_left": 3}


@pytest.mark.parametrize("action", [0, np.int64(0), np.array(0), np.array([0]), np.int32(0)])
def test_tokens_come_as_any_integer_that_libraries_hand_over(action):
    env = TokenEnv("thinking", length=4)
    env.reset(seed=0)
    assert env.step(action)[4]["token"] == 0


@pytest.mark.parametrize("actions", [np.array([0, 2]), np.array([0]), np.array([0.0, 1.0]), np.array([[0, 1]]), [0, -1]])
def test_what_is_no_batch_of_tokens_is_refused(actions):
    envs = TokenVectorEnv("thinking", num_envs=2)
    envs.reset(seed=0)
    with pytest.raises(ValueError, match="action"):
        envs.step(actions)


def test_a_step_without_a_running_response_needs_a_reset():
    env = TokenEnv("thinking", length=4)
    with pytest.raises(ResetNeeded, match=r"step\(\): got no running response"):
        env.step(0)
    walk(env, [1], seed=0)
    with pytest.raises(ResetNeeded, match=r"step\(\): got no running response"):
        env.step(0)
    for mode in MODES:
        envs = TokenVectorEnv("thinking", num_envs=2, length=4, autoreset_mode=mode)
        with pytest.raises(ResetNeeded, match="got no running response in environment 0"):
            envs.step(np.array([0, 0]))
    envs.reset(seed=0)  # the last mode is Disabled
    envs.step(np.array([0, 1]))
    with pytest.raises(ResetNeeded, match="got no running response in environment 1"):
        envs.step(np.array([0, 0]))
    envs.reset(options={"reset_mask": np.array([False, True])})
    observations, *_ = envs.step(np.array([0, 0]))
    assert observations["state"].tolist() == [2, 1], "the other row went on"


# -------------------------------------------------------------------------------------------------------------- it can be learnt


def best_return(mdp: TokenMDP) -> float:
    """Value iteration: the best mean return, from the last node to the first."""
    value = [0.0] * mdp.num_nodes
    for n in reversed(range(mdp.num_nodes)):
        q: dict[int, float] = {}
        for e in range(mdp.edge_N[n], mdp.edge_N[n + 1]):
            after = 0.0 if mdp.next_E[e] == ENDED else value[mdp.next_E[e]]
            q[mdp.token_E[e]] = q.get(mdp.token_E[e], 0.0) + mdp.prob_E[e] * (mdp.reward_E[e] + mdp.gamma * after)
        value[n] = max(q.values())
    return float(mdp.start_N @ value)


def exact_return(model, mdp: TokenMDP) -> float:
    """Mean return of the network's policy, by the exact solution: what it does at every node, illegal tokens drawn anew."""
    observations = {"state": mdp.state_N, "tokens_left": mdp.max_tokens - mdp.depth_N}
    with torch.no_grad():
        probs_NA = model.policy.get_distribution(model.policy.obs_to_tensor(observations)[0]).distribution.probs.double().numpy()
    wasted_N = (probs_NA * ~mdp.legal_NA).sum(1, keepdims=True)
    policy_NA = np.where(mdp.legal_NA, probs_NA + wasted_N * mdp.uniform(), 0.0)
    return mdp.solve(policy_NA / policy_NA.sum(1, keepdims=True)).mean_return


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_best_return_by_hand():
    assert best_return(by_hand()) == 0.5  # go, stop: -0.5 + 0.5 * 2
    assert best_return(load("cliff").mdp) == 1.0
    assert best_return(load("thinking", length=8).mdp) == pytest.approx(2 * (1 - 0.8 * 0.85**7) - 1)


@pytest.mark.parametrize(
    ("name", "window", "seed", "num_updates"),
    [("thinking", None, 0, 13), ("thinking", None, 1, 13), ("thinking", 3, 0, 13), ("cliff", None, 0, 5)],
)
def test_a_stock_ppo_closes_seven_tenths_of_the_gap_to_the_best_return(name, window, seed, num_updates, one_thread):
    """With a window Stable-Baselines3 bootstraps from its critic at `truncated`, and goes on with the response afterwards."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv

    def make() -> gymnasium.Env:
        env = gymnasium.make(ENV_IDS[name], length=6)
        return WindowCut(env, window) if window else env

    options = dict(n_steps=64, batch_size=128, n_epochs=10, learning_rate=1e-2, gamma=1.0)
    envs = DummyVecEnv([make] * 8)
    model = PPO("MultiInputPolicy", envs, seed=seed, device="cpu", **options)
    mdp = envs.envs[0].unwrapped.mdp
    best, before = best_return(mdp), exact_return(model, mdp)
    assert before < best - 0.5, "nothing to learn"
    after = []
    for update in range(num_updates):  # after which one is the processor's choice: a stock PPO climbs, falls and climbs again
        model.learn(64 * 8, reset_num_timesteps=update == 0)
        after.append(exact_return(model, mdp))
    assert before + 0.7 * (best - before) < max(after) <= best + 1e-9
