"""advantage.cut_value module:function: a rule of one's own in a training step, from the command line to the gradient."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import make_trainer, same, weights_of

from tppo_ref.__main__ import main
from tppo_ref.loop.cut_rules import CUT_RULES, Cut, cuts, noise_rms
from tppo_ref.method.errors import UserError
from tppo_ref.runs.config import Config
from tppo_ref.runs.own_rule import rule_of
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.sinks import read_metrics

ROOT = Path(__file__).resolve().parents[1]
MINE = """
import torch
def low(cut): return cut.critic_B - 1.0
def two(cut): return torch.zeros(len(cut.critic_B) + 1)
def endless(cut): return cut.critic_B / 0
def broken(cut): return cut.no_such_thing
def huge(cut): return torch.full((len(cut.critic_B),), 1e39, dtype=torch.float64)
def imaginary(cut): return cut.critic_B * 1j
def leaves(cut): raise SystemExit(0)
def lines(cut): raise RuntimeError("one\\ntwo")
"""


@pytest.fixture(name="module")
def _module(tmp_path, monkeypatch) -> str:
    (tmp_path / "rules_for_training.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    return "rules_for_training"


def config(name: str) -> Config:
    return replace_fields(Config(), {"advantage.cut_value": name})


# ------------------------------------------------------------------------------------------------------------------ in a step


def trained(steps: int = 4, *, rule=None, **changes) -> tuple[list, float]:
    trainer = make_trainer("tppo", **{"rollout__window": 3, "advantage__tail_tokens": 0} | changes)
    trainer.cut_rule = rule
    metrics = [trainer.step() for _ in range(steps)]
    assert sum(m["response/cut_share"] for m in metrics) > 0
    return weights_of(trainer.policy_learner.module), metrics[-1]["advantage/mean"]


@pytest.mark.parametrize("name", ["previous", "critic", "zero"])
@pytest.mark.parametrize("tail", [{}, {"advantage__tail": "defer", "advantage__tail_tokens": 2}])
def test_a_rule_as_a_function_trains_as_egaes_own(name, tail):
    own, given = trained(advantage__cut_value=name, **tail), trained(rule=CUT_RULES[name], **tail)
    assert same(own[0], given[0])
    others = [trained(advantage__cut_value=other, **tail)[0] for other in {"previous", "critic", "zero"} - {name}]
    assert not any(same(own[0], other) for other in others)


def test_a_rule_meets_the_cut_rows_of_the_step_and_its_word_moves_their_last_advantage():
    seen, steps = [], []

    def rule(cut: Cut) -> torch.Tensor:
        seen.append(cut)
        return cut.critic_B + torch.arange(len(cut.critic_B))

    trainer = make_trainer("tppo", rollout__window=3, advantage__tail="defer", advantage__tail_tokens=1, advantage__whiten=False)

    def observe(rows, before, advantages, _):
        at = [b for b, response in enumerate(rows.responses) if not response.ended]
        noise = noise_rms(before.values_BT, rows.rewards_BT, rows.run_BT, 1.0)  # now: a row's response grows with the next window
        steps.append((at, noise, rows, before, advantages))

    trainer.cut_rule, trainer.observer = rule, observe
    for _ in range(3):
        trainer.step()
    assert len(seen) == len(steps) == 3
    deferred = 0
    for cut, (at, noise, rows, before, advantages) in zip(seen, steps, strict=True):
        assert len(at) == len(cut.critic_B) > 1
        for place, b in enumerate(at):
            columns = [t for t, runs in enumerate(rows.run_BT[b].tolist()) if runs]
            deferred += columns[0] < int(rows.window_begin_B[b])
            values = before.values_BT[b, columns].tolist()
            num = int(cut.num_B[place])
            assert num == len(columns)
            assert cut.value_BT[place].tolist() == values + [0.0] * (cut.value_BT.shape[1] - num)
            assert cut.critic_B[place] == before.last_value_B[b]
            last = float(before.last_value_B[b]) + place - values[-1]  # gamma 1, and no reward before an end
            assert advantages.raw_BT[b, columns[-1]] == pytest.approx(last, abs=1e-6)
        assert set(cut.reward_BT.flatten().tolist()) == {0.0}
        assert set(cut.weight_B.tolist()) == {1.0}
        assert cut.gamma == 1
        assert cut.critic_rms == noise
    assert deferred > 0, "no run began before its window"


def test_where_nothing_is_cut_a_rule_is_not_asked():
    def never(cut: Cut) -> torch.Tensor:
        raise AssertionError(f"asked about {cut}")

    trainer = make_trainer("ppo")
    trainer.cut_rule = never
    assert trainer.step()["response/cut_share"] == 0


# ------------------------------------------------------------------------------------------------- the critic's noise, estimated


def walks(noise: float, drift: float = 0.0, gamma: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All 2^3 walks of +-1 under all 2^4 signs of independent noise, discounted so that V is exact where both are 0; an error that
    is the same in all states beside. Rewards 0; [B, T]."""
    rows = []
    for moves, signs in itertools.product(itertools.product((-1, 1), repeat=3), itertools.product((-1, 1), repeat=4)):
        places = itertools.accumulate(moves, initial=0)
        rows.append([place / gamma**t + drift + noise * sign for t, (place, sign) in enumerate(zip(places, signs, strict=True))])
    value_BT = torch.tensor(rows, dtype=torch.float64)
    return value_BT, torch.zeros_like(value_BT), torch.ones_like(value_BT, dtype=torch.bool)


@pytest.mark.parametrize("gamma", [1.0, 0.5])
@pytest.mark.parametrize("noise", [0.0, 0.3, 2.0])
def test_independent_noise_is_found_exactly_over_all_its_signs(noise, gamma):
    assert noise_rms(*walks(noise, gamma=gamma), gamma) == pytest.approx(noise, abs=1e-7)


def test_an_error_that_all_states_share_does_not_show():
    assert noise_rms(*walks(0.3, drift=5.0), 1.0) == pytest.approx(0.3, abs=1e-12)


@pytest.mark.parametrize("rho", [-0.5, 0.0, 0.3, 0.9])
def test_of_noise_that_is_alike_less_is_seen(rho):
    """Rows sqrt(n) L_k, L the Cholesky factor of sigma^2 rho^|i-j|: their mean products are that covariance exactly."""
    place = torch.arange(5, dtype=torch.float64)
    factor = torch.linalg.cholesky(0.4**2 * rho ** (place[:, None] - place).abs())
    value_BT = math.sqrt(5) * factor.T
    assert noise_rms(value_BT, torch.zeros(5, 5), torch.ones(5, 5, dtype=torch.bool), 1.0) == pytest.approx(
        0.4 * (1 - rho), abs=1e-9
    )


def test_only_runs_count_and_without_neighbours_no_noise_is_seen():
    value_BT, reward_BT, run_BT = walks(0.3)
    wide_BT = torch.cat([torch.full((len(value_BT), 2), math.nan, dtype=torch.float64), value_BT], 1)
    wide_run_BT = torch.cat([torch.zeros(len(value_BT), 2, dtype=torch.bool), run_BT], 1)
    assert noise_rms(wide_BT, torch.zeros_like(wide_BT), wide_run_BT, 1.0) == pytest.approx(0.3, abs=1e-12)
    longer_BT, longer_run_BT = torch.cat([value_BT, wide_BT[:, :2]], 1), torch.cat([run_BT, wide_run_BT[:, :2]], 1)
    assert noise_rms(longer_BT, torch.zeros_like(longer_BT), longer_run_BT, 1.0) == pytest.approx(0.3, abs=1e-12)
    assert noise_rms(value_BT[:, :2], reward_BT[:, :2], run_BT[:, :2], 1.0) == 0
    assert noise_rms(value_BT, reward_BT, run_BT, 0.0) == 0
    trend_BT = torch.arange(6.0)[None]  # neighbouring steps alike: the opposite of noise
    assert noise_rms(trend_BT, torch.zeros(1, 6), torch.ones(1, 6, dtype=torch.bool), 1.0) == 0


def test_runs_are_moved_to_the_first_column_whatever_stands_beside_them():
    nan = math.nan
    value_BT = torch.tensor([[nan, nan, 3.0, 4.0], [5.0, nan, nan, nan], [nan, 1.0, 2.0, nan]])
    run_BT = torch.tensor([[False, False, True, True], [True, False, False, False], [False, True, True, False]])
    cut_B, lam_B = torch.tensor([True, False, True]), torch.tensor([0.1, 0.2, 0.3])
    made = cuts(value_BT, torch.tensor([7.0, 8.0, 9.0]), torch.zeros(3, 4), run_BT, cut_B, lam_B, 1.0)
    assert made.value_BT.tolist() == [[3, 4], [1, 2]]
    assert made.back(1).tolist() == [4, 2]
    assert made.critic_B.tolist() == [7, 9]
    assert made.lam_B.tolist() == pytest.approx([0.1, 0.3])


# ------------------------------------------------------------------------------------------------------------ what a user gives


def test_a_rule_is_found_by_its_name_and_the_known_ones_are_egaes(module):
    cut = Cut(value_BT=torch.tensor([[1.0, 2.0]]), reward_BT=torch.zeros(1, 2), num_B=torch.tensor([2]), critic_B=torch.tensor([3.0]),
              weight_B=torch.ones(1), lam_B=torch.ones(1), gamma=1.0, critic_rms=0.0)  # fmt: skip
    found = rule_of(config(f"{module}:low"))
    assert found is not None
    assert found(cut).tolist() == [2.0]
    assert [rule_of(config(name)) for name in ("previous", "critic", "zero")] == [None] * 3
    for name, why in (
        ("two", r"\[2\]; expected a real tensor of shape \[1\]"),
        ("endless", "got inf"),
        ("broken", "no_such_thing"),
        ("huge", "got inf"),
        ("imaginary", "expected a real tensor"),
        ("leaves", "ended in SystemExit: 0"),
        ("lines", "one two"),
    ):
        found = rule_of(config(f"{module}:{name}"))
        assert found is not None
        with pytest.raises(UserError, match=f"advantage.cut_value: got {module}:{name}, of which .*{why}") as error:
            found(cut)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("previuos", "advantage.cut_value: got previuos; expected previous, critic, zero, or module:function"),
        ("nowhere_at_all:rule", "advantage.cut_value: got nowhere_at_all:rule; expected module:function, importable from here"),
        ("math:no_such", "advantage.cut_value: got math:no_such; expected module:function"),
    ],
)
def test_a_name_that_is_no_rule_is_one_line_and_exit_code_2(name, said, tmp_path, capsys):
    argv = ["train", "--advantage.cut_value", name, "--run.out", str(tmp_path / "run"), "--run.steps", "1"]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_from_the_command_line_to_the_gradient_a_rule_is_the_one_that_was_named(tmp_path, module):
    fast = {"task.name": "length", "model.warm_start_steps": 2, "model.hidden_size": 16, "model.num_layers": 1, "model.num_heads": 2,
            "rollout.slots": 4, "rollout.window": 6, "rollout.max_response_tokens": 30, "run.eval_prompts": 2, "run.eval_every_s": 0,
            "run.steps": 3, "run.progress": "false", "advantage.tail_tokens": 0, "run.cache": tmp_path / "cache"}  # fmt: skip
    found = {}
    for name in ("previous", "critic", "tppo_ref.loop.cut_rules:critic", f"{module}:low"):
        out = tmp_path / name.replace(":", "-")
        words = (fast | {"run.out": out, "advantage.cut_value": name}).items()
        assert main(["train", *(word for field, value in words for word in (f"--{field}", str(value)))]) == 0
        found[name] = [m["policy/grad_norm"] for m in read_metrics(out / "metrics.jsonl") if "policy/grad_norm" in m]
    assert len(found["critic"]) == 3
    assert found["tppo_ref.loop.cut_rules:critic"] == found["critic"]
    assert found["previous"] != found["critic"] != found[f"{module}:low"]


def test_a_console_script_finds_the_rules_of_the_folder_where_it_is_started(tmp_path):
    """It has the folder of its own file on the path, and not, as `python -m` has, the working folder."""
    (tmp_path / "rules_right_here.py").write_text(MINE)
    words = ["-P", "-c", "import sys; from tppo_ref.__main__ import main; sys.exit(main(sys.argv[1:]))", "train"]
    for name in ("rules_right_here:low", "rules_not_here:low"):
        done = subprocess.run([sys.executable, *words, "--run.out", tmp_path / "run", "--advantage.cut_value", name, "--task.name",
                               "length", "--model.policy", "nowhere"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                              capture_output=True, text=True)  # fmt: skip
        assert done.returncode == 2
        assert ("importable from here" in done.stderr) == (name == "rules_not_here:low"), done.stderr


def test_ctrl_c_while_a_rule_is_imported_is_ctrl_c(tmp_path, monkeypatch):
    (tmp_path / "rules_of_the_impatient.py").write_text("raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        rule_of(config("rules_of_the_impatient:low"))
