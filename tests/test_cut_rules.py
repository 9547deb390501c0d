"""Cut rules as functions: by hand, against egae's own, a user's own, what is refused; and the bench's table against its CSV."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch

from benchmarks import cut_rules as bench
from benchmarks import studies
from benchmarks.equal_tokens import Job, read_whole
from sim.__main__ import main
from sim.lab import instances
from sim.lab.critics import critic
from sim.lab.estimators import ESTIMATORS, Estimator, estimate, named
from sim.lab.gradients import gradient_errors
from sim.lab.rollouts import Rollouts
from tppo_ref.loop.cut_rules import CUT_RULES, Cut, stand_in
from tppo_ref.runs.own_rule import load_rule, rule_of

ROWS = 3
MINE = """
import torch
def halfway(cut): return 0.5 * (cut.critic_B + cut.back(1))
def column(cut): return cut.value_BT
def nothing(cut): return cut.critic_B / 0
def raises(cut): raise RuntimeError("one\\ntwo")
@torch.no_grad()
def wrapped(cut): return cut.critic_B
class Rule:
    def __call__(self, cut): return cut.back(1)
INSTANCE = Rule()
constant = 3
"""


def cut(**fields) -> Cut:
    """Rows of 4, 2 and 1 tokens."""
    whole = dict(
        value_BT=torch.tensor([[1.0, 3.0, 2.0, 6.0], [5.0, 4.0, 0.0, 0.0], [7.0, 0.0, 0.0, 0.0]], dtype=torch.float64),
        reward_BT=torch.zeros(ROWS, 4, dtype=torch.float64), num_B=torch.tensor([4, 2, 1]),
        critic_B=torch.tensor([7.0, 2.0, 9.0], dtype=torch.float64), weight_B=torch.tensor([1.0, 1.0, 2.0], dtype=torch.float64),
        lam_B=torch.ones(ROWS, dtype=torch.float64), gamma=1.0, critic_rms=1.0,
    )  # fmt: skip
    return Cut(**whole | fields)


@pytest.fixture(name="module")
def _module(tmp_path, monkeypatch) -> str:
    (tmp_path / "rules_of_mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "rules_of_mine", raising=False)  # that of another test's folder
    return "rules_of_mine"


@pytest.fixture(scope="module", name="rollouts")
def _rollouts() -> Rollouts:
    made = instances.load("thinking", length=10)
    return Rollouts(made.mdp, made.policy_NA)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("previous", [6, 4, 7]),
        ("critic", [7, 2, 9]),
        ("zero", [0, 0, 0]),
        ("extrapolated", [10, 3, 7]),
        ("averaged", [3, 19 / 4, 7]),
        ("mixture", [6 + 9 / 13, 4 - 18 / 13, 7 + 18 / 13]),  # steps 1, -2, 2 with weights 1, 1, 2: m = 13/4, w = 1 - 4/13
        ("shrunk-step", [6 + 5 / 13, 4 - 10 / 13, 7 + 10 / 13]),
    ],
)
def test_each_rule_by_hand(name, expected):
    assert CUT_RULES[name](cut()).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["mixture", "shrunk-step"])
def test_a_mixture_without_noise_is_the_critic_and_under_nothing_but_noise_t_ppos_rule(name):
    assert CUT_RULES[name](cut(critic_rms=0.0)).tolist() == [7, 2, 9]
    assert CUT_RULES[name](cut(critic_rms=50.0)).tolist() == [6, 4, 7]
    still = cut(critic_B=torch.tensor([6.0, 4.0, 7.0], dtype=torch.float64))
    assert CUT_RULES[name](still).tolist() == [6, 4, 7]  # m is 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mixture_is_finite_where_nothing_moves_and_noise_is_all_that_is_seen(dtype):
    still = cut(critic_B=torch.tensor([6.0, 4.0, 7.0]), lam_B=torch.tensor([0.5, 0.5, 1.0]))  # kappa 1: no weight on the noise
    still = dataclasses.replace(
        still, **{name: getattr(still, name).to(dtype) for name in ("value_BT", "critic_B", "lam_B", "weight_B")}
    )
    assert CUT_RULES["mixture"](still).tolist() == [6, 4, 7]


def test_lambda_moves_the_mixture_towards_the_critic():
    lam_B = torch.tensor([1.0, 0.8, 0.4], dtype=torch.float64)
    w = [1 - (1 - kappa) * 4 / 13 for kappa in (0, 1 / 4, 1)]  # kappa = (1 - lam) / lam, at most the critic's own word
    assert CUT_RULES["mixture"](cut(lam_B=lam_B)).tolist() == pytest.approx([6 + w[0], 4 - 2 * w[1], 7 + 2], abs=1e-12)


@pytest.mark.parametrize(("rule", "own"), [("previous", "egae"), ("critic", "cut-gae"), ("zero", "zero-cut")])
@pytest.mark.parametrize("lam_alpha", [None, 0.5])
def test_a_rule_as_a_function_is_egaes_own_cut_value(rollouts, rule, own, lam_alpha):
    value_N = critic("noise:0.3", rollouts.mdp, rollouts.solution)
    rows = rollouts.stretches(4, 3)
    both = [estimate(rows, value_N, Estimator(cut_value=c, lam=0.9, lam_alpha=lam_alpha), rollouts.mdp, 4)
            for c in (CUT_RULES[rule], ESTIMATORS[own].cut_value)]  # fmt: skip
    torch.testing.assert_close(both[0].estimate_BT, both[1].estimate_BT, rtol=0, atol=1e-14)


def test_a_rule_meets_the_cut_rows_only_with_what_a_trainer_knows(rollouts):
    value_N, seen = critic("noise:0.3", rollouts.mdp, rollouts.solution), []

    def spy(cut: Cut) -> torch.Tensor:
        seen.append(cut)
        return cut.critic_B

    gradient_errors(rollouts, value_N, Estimator(cut_value=spy, lam=0.9), [4])
    (met,) = seen  # the whole responses, with which the error is split, are not cut
    rows, mdp = rollouts.stretches(4), rollouts.mdp
    at = rows.cut_B.nonzero()[:, 0].tolist()
    assert len(met.critic_B) == len(at) > 1
    for place, b in enumerate(at):
        nodes = rows.node_BT[b][rows.mask_BT[b]].tolist()
        assert met.num_B[place] == len(nodes)
        assert met.back(1)[place] == value_N[nodes[-1]]
        assert met.back(3)[place] == value_N[nodes[max(0, len(nodes) - 3)]]
        assert met.critic_B[place] == value_N[rows.next_node_B[b]]
        assert met.weight_B[place] == rows.prob_B[b]
        assert met.reward_BT[place].tolist() == rows.reward_BT[b].tolist()
    error_N, visits_N = value_N - rollouts.solution.value_N, rollouts.solution.visits_N
    assert met.critic_rms == pytest.approx(math.sqrt(sum(visits_N * error_N**2) / sum(visits_N)), abs=1e-14)
    assert (met.gamma, set(met.lam_B.tolist())) == (mdp.gamma, {0.9})


def test_a_rule_of_ones_own_is_an_estimator_on_the_command_line(module, capsys):
    argv = [
        "bias",
        "--instance",
        "thinking",
        "--set",
        "length=10",
        "--window",
        "4",
        "--json",
        "--estimators",
        "egae",
        f"{module}:halfway",
    ]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)["estimators"]
    assert list(found) == ["egae", f"{module}:halfway"]
    assert found[f"{module}:halfway"]["estimator"]["cut_value"] == f"{module}:halfway"
    errors = [found[name]["windows"][0]["gradient"]["relative"] for name in found]
    assert errors[0] != errors[1]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_module:f", "expected module:function; importing 'no_such_module' failed"),
        ("rules_of_mine:missing", "has no 'missing'"),
        ("rules_of_mine:constant", "not a function"),
        ("rules_of_mine:", "form module:function"),
    ],
)
def test_a_rule_that_cannot_be_had_is_refused_by_name(module, name, said):
    with pytest.raises(ValueError, match=said) as error:
        load_rule(name)
    assert str(error.value).startswith(f"rule: got {name!r}; expected module:function")
    with pytest.raises(ValueError, match="rule: got"):
        named(name)


@pytest.mark.parametrize(("function", "said"), [("column", r"column: got torch.float64 \[3, 4\]; expected a real tensor of shape \[3\]"),
                                                ("nothing", "nothing: got inf; expected finite numbers")])  # fmt: skip
def test_what_a_rule_returns_is_checked(module, function, said):
    with pytest.raises(ValueError, match=said):
        stand_in(load_rule(f"{module}:{function}"), cut())
    with pytest.raises(ValueError, match="got None; expected a real tensor"):
        stand_in(lambda cut: None, cut())


# ------------------------------------------------------------------------------------------------------------------- the bench


def committed() -> list[dict[str, str]]:
    with bench.PATH.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_committed_rows_are_whole_and_some_of_them_computed_anew():
    rows = {(r["critic"], r["rule"], r["mdp"]): r for r in committed()}
    assert len(rows) == len(bench.CRITICS) * len(CUT_RULES) * (bench.NUM_RANDOM + len(bench.NAMED))
    for key in (("exact", "previous", "random-7"), ("noise:0.3", "mixture", "cliff"), ("drift:0.3", "averaged", "random-0")):
        again = bench.measure(key[1], CUT_RULES[key[1]], key[2], key[0])
        assert {name: float(rows[key][name]) for name in ("relative", "rescaled", "cut")} == pytest.approx(
            {name: again[name] for name in ("relative", "rescaled", "cut")}, abs=1e-6
        )


def test_the_table_by_hand(monkeypatch):
    monkeypatch.setattr(bench, "NUM_RANDOM", 3)
    monkeypatch.setattr(bench, "NAMED", ("cliff",))
    numbers = {"previous": [0.2, 0.4, 0.6, 0.9], "mine": [0.1, 0.4, 0.7, 0.8]}
    rows = [{"critic": "exact", "rule": rule, "mdp": mdp, "relative": x, "rescaled": 1 - x}
            for rule, xs in numbers.items() for mdp, x in zip(("random-0", "random-1", "random-2", "cliff"), xs, strict=True)]  # fmt: skip
    before, mine = bench.table(rows)
    assert (before["median"], before["wins"], before["cliff"]) == (0.4, 0, 0.9)
    assert (mine["median"], mine["wins"], mine["wins_rescaled"], mine["cliff"]) == (0.4, 1, 1, 0.8)
    assert "mine" in bench.text([before, mine])


def test_ones_own_rule_enters_the_table_and_only_asked_for_is_anything_written(module, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench, "NUM_RANDOM", 2)
    monkeypatch.setattr(bench, "NAMED", ("late-decision",))
    monkeypatch.setattr(bench, "CRITICS", ("exact",))
    before = bench.PATH.read_bytes()
    assert bench.main(["--rules", f"{module}:halfway"]) == 0
    out = capsys.readouterr().out
    assert f"{module}:halfway" in out
    assert "->" not in out
    assert bench.PATH.read_bytes() == before
    assert bench.main(["--rules", f"{module}:halfway", "--out", str(tmp_path / "mine.csv")]) == 0
    assert (tmp_path / "mine.csv").read_text().count("halfway,") == 3
    nowhere = str(tmp_path / "nowhere" / "mine.csv")
    for wrong, said in (
        (["--rules", "no_such_module:f"], "rule: got 'no_such_module:f'; expected module:function"),
        (["--rules", f"{module}:raises"], "raises: ended in RuntimeError: one two\n"),
        (["--rules", f"{module}:halfway", "--out", nowhere], f"--out: got {nowhere}; expected a file in a folder that is there"),
        (["--text", "--rules", "sys:getsizeof"], "rule: got 'sys:getsizeof', of a module without a file"),
    ):
        with pytest.raises(SystemExit) as leaving:
            bench.main(wrong)
        assert leaving.value.code == 2
        assert said in capsys.readouterr().err


def test_what_the_page_says_of_the_rules():
    """docs/log.md and docs/findings.md: with an exact critic its own word is best; P8's mixture is nearest, not best."""
    lines = {(r["critic"], r["rule"]): r for r in bench.table(committed())}
    exact = {rule: lines["exact", rule]["median"] for rule in CUT_RULES}
    assert exact["critic"] == pytest.approx(0, abs=1e-12)
    assert exact["extrapolated"] < exact["previous"] < exact["averaged"] < exact["zero"]
    assert np.isfinite([r["median"] for r in lines.values()]).all()


# ------------------------------------------------------------------------------------------------------------- trained on text

TINY = {
    "model.warm_start_steps": 2, "model.hidden_size": 16, "model.num_layers": 1, "model.num_heads": 2, "rollout.slots": 4,
    "rollout.max_response_tokens": 40, "value.pretrain_responses": 8, "value.pretrain_epochs": 1,
}  # fmt: skip


def test_each_arm_of_the_study_trains_with_its_own_rule_and_they_differ_in_nothing_else():
    made = studies.RULES
    assert list(made.arms) == list(CUT_RULES)
    for name, what in made.arms.items():
        config = Job(task="chain", arm=name, what=what, seed=0, budget_tokens=9, fields=made.models[name], start={}).config()
        rule, value = rule_of(config), config.advantage.cut_value
        assert value == name if rule is None else rule(cut()).tolist() == CUT_RULES[name](cut()).tolist()
        assert dict(what.fields) | {"advantage.cut_value": ""} == dict(made.arms["previous"].fields) | {"advantage.cut_value": ""}
    assert {c for weights in made.contrasts.values() for c, w in weights.items() if w < 0} == {"previous"}
    assert next(name for weights in made.contrasts.values() for name, w in weights.items() if w > 0) == "mixture"  # the primary one
    assert {name for weights in made.contrasts.values() for name, w in weights.items() if w > 0} == CUT_RULES.keys() - {"previous"}


def test_ones_own_rule_is_trained_beside_t_ppos_and_enters_the_table(module, monkeypatch, capsys, tmp_path):
    small = studies.RULES._replace(tasks=("length",), seeds=2, budget=240, path=tmp_path / "ours.csv",
                                   models=dict.fromkeys(CUT_RULES, TINY))  # fmt: skip
    monkeypatch.setattr(studies, "RULES", small)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out, options = tmp_path / "mine.csv", ["--text", "--rules", f"{module}:halfway", "--eval-prompts", "2", "--jobs", "1"]
    paths = ["--out", str(out), "--cache", str(tmp_path / "cache")]
    assert bench.main([*options, *paths]) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith(f"{module}:halfway@")]
    assert line.split()[1:3] == ["-", "previous"]
    assert "2 seeds" in line
    rows, others = read_whole(out)
    assert others == 0
    assert {(r["arm"].partition("@")[0], r["seed"]) for r in rows} == {
        (a, s) for a in ("previous", f"{module}:halfway") for s in (0, 1)
    }
    assert bench.main([*options, *paths]) == 0  # all there: nothing is made again
    assert "0 runs made" in capsys.readouterr().out
    before = bench.digest(f"{module}:halfway")
    assert bench.digest(f"{module}:wrapped") == bench.digest(f"{module}:INSTANCE") == before, "the module's file, whatever wraps it"
    (tmp_path / f"{module}.py").write_text(MINE + "\n# another\n")
    assert bench.digest(f"{module}:halfway") != before


def test_without_a_rule_of_ones_own_the_stated_study_is_shown(capsys):
    assert bench.main(["--text", "--seeds", "0"]) == 0
    assert "0 runs made, 0 failed" in capsys.readouterr().out
