"""benchmarks/value_moves.py: values against a policy whose values are known, its summary by hand, and docs/tasks.md."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from benchmarks import fair_told, studies, studies_told, study, value_moves
from benchmarks.common import RESULTS
from benchmarks.equal_tokens import read_whole
from benchmarks.value_moves import Base, decoded, lines, moves_of, summary
from tppo_ref.rollout.engine import Decoded

END = 10


class CoinEngine:
    """Each request ends with its third token; the second is 1 or 2, by its seed. No more run at a time than there are slots."""

    def __init__(self, slots):
        self.slots, self.running, self.most = slots, [], 0

    @property
    def num_running(self):
        return len(self.running)

    def submit(self, requests):
        self.running += requests
        self.most = max(self.most, len(self.running))
        assert len(self.running) <= self.slots

    def step(self):
        done, self.running = self.running[:2], self.running[2:]
        return [
            Decoded(
                response_id=r.response_id, token_ids=[0, 1 + r.seed % 2, END][r.num_response_tokens :], logprobs=[], end_token=True
            )
            for r in done
        ]


def coin_base():
    """Right where the second token is 1: V is 0 before it, +-1 behind it."""
    base = object.__new__(Base)
    task = SimpleNamespace(name="coin", end_token_id=END, prompt_ids=lambda p: (7,), answer=lambda p: "")
    base.task, base.longest, base.engine = task, 320, CoinEngine(value_moves.SLOTS)
    base.verify = lambda answer, ids: 1.0 if ids[1] == 1 else -1.0
    return base


def test_a_decision_moves_the_value_and_nothing_else_does():
    sure, doubt = math.log(0.99), math.log(0.5)
    response = Decoded(response_id=0, token_ids=[0, 2, END], logprobs=[doubt, doubt, sure], end_token=True)
    first, second, end = moves_of(coin_base(), 0, (), response, 2000)
    assert (first["position"], second["position"], end["position"]) == (0, 1, 2)
    assert first["before"] == pytest.approx(0, abs=0.1)
    assert first["behind"] == second["before"] == pytest.approx(0, abs=0.1)
    assert second["behind"] == end["before"] == end["behind"] == -1.0


def test_the_slots_are_never_too_few():
    base = coin_base()
    requests = [base.request(i, (7,), (), (i, 0)) for i in range(300)]
    assert sorted(d.response_id for d in decoded(base.engine, requests, value_moves.SLOTS)) == list(range(300))
    assert base.engine.most == value_moves.SLOTS


def test_the_summary_by_hand():
    """Two responses of 80 and 20 tokens; moves of 1 (early), 0.5 (late) and 0.2; 100 samples."""
    rows = [
        {"task": "x", "response": r, "position": p, "before": b, "behind": a, "samples": 100}
        for r, p, b, a in [(0, 3, 0, 1), (0, 70, 1, 0.5), (0, 79, 0.5, 0.5), (1, 4, 0, -0.2), (1, 19, -0.2, -0.2)]
    ]
    found = summary([*rows, rows[0] | {"task": "y"}], "x")
    assert (found["responses"], found["tokens"]) == (2, 100)
    assert found["moves"] == pytest.approx(2.0)
    assert found["late"] == pytest.approx(100 / 16)
    assert (found["num_moves"], found["num_late"], found["longer"], found["doubtful"]) == (2, 1, 1, 3)
    assert found["moves_se"] == pytest.approx(100 * math.sqrt(2 * (0.4**2 + 0.4**2)) / 100)  # 2 of 80 and 0 of 20, 1 of 50 each
    noise = [(1 - 0) + (1 - 1), (1 - 1) + (1 - 0.25), (1 - 0) + (1 - 0.04)]  # variances of scores of +-1
    assert found["size"] == pytest.approx(math.sqrt((1 + 0.25 + 0.04 - sum(noise) / 100) / 100))


# -------------------------------------------------------------------------------------------------------------- what was found

PAGE = value_moves.PAGE.read_text()


def test_the_page_has_the_committed_table():
    assert value_moves.BLOCK.search(PAGE)[0].removeprefix("<!-- begin moves -->\n").removesuffix("<!-- end -->") == lines()
    assert f"more than {value_moves.LARGE} either way" in PAGE
    assert f"those behind the {value_moves.WINDOW}th" in PAGE


def test_what_the_page_says_of_the_table_in_words():
    found = {name: summary(value_moves.table("value_moves"), name) for name in value_moves.TASKS}
    late = {name: s["late"] for name, s in found.items()}
    assert late["chain"] == late["fork"] == 0  # "stands still"
    assert late["maze"] > 2 * max(late[name] for name in late if name != "maze")
    assert found["maze"]["moves"] > 2 * max(s["moves"] for name, s in found.items() if name != "maze")
    assert late["brackets"] == pytest.approx(late["length"], rel=0.25)  # "as rare as those of length"
    sizes = [s["size"] for s in found.values()]
    assert max(sizes) < 1.4 * min(sizes)  # "nearly the same on all five"
    for s in found.values():  # "at most 1", but for chance: there are twelve responses of each
        assert s["size"] ** 2 * s["tokens"] / s["responses"] < 1.2


def test_what_the_page_says_of_its_own_certainty():
    text = " ".join(PAGE.split())
    found = {name: summary(value_moves.table("value_moves"), name) for name in value_moves.TASKS}
    assert {(s["responses"], s["longer"]) for s in found.values()} == {(12, 6)}
    assert "12 responses to each task" in text
    assert "6 of each 12 are longer than 64" in text
    samples = {int(row["samples"]) for row in value_moves.table("value_moves")}
    assert samples == {128}
    assert 2 * math.sqrt(2 / 128) == value_moves.LARGE  # "at worst 0.25 is two standard errors"
    assert found["maze"]["doubtful"] == pytest.approx(100 / 8, rel=0.1)  # "one token in eight is in doubt"
    apart = [(found["maze"]["moves"] - s["moves"]) / math.hypot(found["maze"]["moves_se"], s["moves_se"])
             for name, s in found.items() if name != "maze"]  # fmt: skip
    assert round(min(apart)) == 2  # "by about two standard errors of the difference"
    assert found["maze"]["moves"] < 0.5 * found["maze"]["doubtful"]  # "mostly moves V by less"
    assert f"only {found['maze']['moves']:.1f} of 100 tokens" in text
    for name in ("length", "brackets"):  # "come last in their response"
        rows = [r for r in value_moves.table("value_moves") if r["task"] == name]
        end = {r["response"]: int(r["position"]) + 1 for r in rows}  # a response's last row is its end
        where = [(int(r["position"]) + 1) / end[r["response"]] for r in rows
                 if abs(float(r["behind"]) - float(r["before"])) > value_moves.LARGE]  # fmt: skip
        assert sorted(where)[len(where) // 2] > 0.9


def test_what_the_page_says_of_maze_against_ppo():
    area, seconds = (fair_told.found("maze", name) for name in ("area", "seconds"))
    missed = seconds["seeds"] - seconds["once"]
    said = f"{area['verdict']}, area {fair_told.shown(area, '+.3f')}; `tppo-once` misses the target in {missed} of {seconds['seeds']} seeds"
    assert f"{said}, PPO in none" in " ".join(PAGE.split())
    assert seconds["ppo"] == seconds["seeds"]


def test_results_say_the_same():
    moves = {name: summary(value_moves.table("value_moves"), name)["moves"] for name in value_moves.TASKS}
    most = moves.pop("maze")
    cut = {row["task"]: 100 * float(row["cut_token_share"]) for row in value_moves.table("cut_tokens")}
    text = (RESULTS.parent / "RESULTS.md").read_text()
    assert f"maze moves at {most:.1f} of 100 tokens, the others at {min(moves.values()):.1f} to {max(moves.values()):.1f}" in text
    assert f"{cut['maze']:.0f} and {cut['brackets']:.0f} % of maze's and brackets' tokens" in text


def test_which_task_moves_most_hangs_on_what_counts_as_a_move(monkeypatch):
    assert "(If only moves of more than 0.5 counted, it would be `fork`'s:" in PAGE
    rows = value_moves.table("value_moves")
    for large, first in ((value_moves.LARGE, "maze"), (0.5, "fork")):
        monkeypatch.setattr(value_moves, "LARGE", large)
        moves = {name: summary(rows, name)["moves"] for name in value_moves.TASKS}
        assert max(moves, key=moves.get) == first


def test_most_tokens_of_the_new_tasks_lie_in_cut_rows_and_all_base_models_are_middling():
    base = {row["task"]: row for row in value_moves.table("cut_tokens")}
    cut = {name: float(row["cut_token_share"]) for name, row in base.items()}
    assert min(cut["maze"], cut["brackets"]) > 0.6 > max(cut[name] for name in ("chain", "fork", "length"))
    assert all(0.3 <= float(row["accuracy"]) <= 0.6 for row in base.values())


def test_the_page_says_what_the_study_of_the_cut_found():
    made = studies.ALL["new-tasks"]
    rows = {row["contrast"]: row for row in study.table(made, read_whole(made.path)[0])}
    window, critic = rows["window 16 - 64, previous"], rows["critic - previous, strong"]
    assert (window["verdict"], critic["verdict"], critic["seeds"]) == ("worse", "undecided", 32)
    text = " ".join(PAGE.split())
    assert "windows of 16 lose against windows of 64, " + study.told(made, window).partition(", worse")[0] in text
    said = study.told(made, critic).partition(", undecided")[0]
    assert f"is undecided against T-PPO's rule, {said} with the stronger critic" in text
    knows = {task: studies_told.critics(f"{task} strong", "explained") for task in made.tasks}
    assert 0.1 < knows["maze"] < 0.25
    assert abs(knows["brackets"]) < 0.02
