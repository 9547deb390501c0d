"""math-verify as the verifier, the shaping formula, and verifiers that misbehave in tppo_ref's killable processes."""

from __future__ import annotations

import json
import random
import time
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scale_helpers import HERE, require, shared_data

from scale.config import RewardConfig
from scale.rewards import GRADE, NO_ANSWER, final_answer, grade, verify_math
from scale.shaping import Shaped, shaped
from tppo_ref.method.records import Prompt, Response
from tppo_ref.tasks.verifier import Verifier

require("math_verify", "the verifier that is tested")


@pytest.mark.parametrize(
    ("answer", "response", "right"),
    [
        ("18", "so the answer is \\boxed{18}.", True),
        ("18", "so the answer is \\boxed{19}.", False),
        ("18", "first \\boxed{19}, no: \\boxed{18}", True),
        ("3 * 6 = 18\n#### 18", "it is 18", True),
        ("#### 1,234", "#### 1234", True),
        ("#### 1,234", "#### 1,234", True),
        ("#### 1234", "the total is \\boxed{1,234}", True),
        ("#### 70000", "He made $70,000 of profit.\n#### 70,000", True),
        ("#### 5", "we get 5 of 7\n#### 7", False),
        ("#### 5", "7 and 8\n#### 5", True),
        ("#### -3", "\\boxed{-3}", True),
        ("#### -3", "\\boxed{3}", False),
        ("033", "the answer is \\boxed{33}", True),
        ("33", "the answer is $\\boxed{033}$", True),
        ("\\frac{1}{2}", "\\boxed{0.5}", True),
        ("\\frac{1}{2}", "\\boxed{\\frac{2}{4}}", True),
        ("\\frac{1}{2}", "\\boxed{0.51}", False),
        ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}", True),
        ("2\\sqrt{3}", "\\boxed{2}", False),
        ("2\\sqrt{3}", "\\boxed{3}", False),
        ("$2\\sqrt{3}$", "\\boxed{\\sqrt{12}}", True),
        ("\\boxed{18}", "18", True),
        ("70 dollars", "\\boxed{70}", True),
        ("(1,2)", "\\boxed{(1,2)}", True),
        ("18", "first \\boxed{18}, no: \\boxed{19}", False),
        ("x^2+1", "\\boxed{1+x^2}", True),
        ("7", "", False),
        ("7", "I do not know.", False),
    ],
)  # fmt: skip
def test_answers_are_compared_as_mathematics(answer, response, right):
    assert verify_math(answer, [], response) == (1.0 if right else -1.0)


@pytest.mark.parametrize("text", [None, "", "\x00\xff\ud800".encode("utf-8", "replace").decode(), "{" * 2000, "\\boxed{" * 500, "####", "#### ", "\n" * 10_000,
                                  "__import__('os').system('true')", "\\boxed{__import__('os')._exit(7)}", "$" * 3000])  # fmt: skip
def test_no_text_scores_by_accident_or_runs(text):
    assert verify_math("#### 18", [], text) == -1.0


def test_a_reference_without_an_expression_is_an_error_and_not_a_score():
    with pytest.raises(ValueError, match="reference answer"):
        verify_math("####", [], "#### 3")


@pytest.mark.parametrize(
    ("answer", "final"),
    [
        ("a #### 5", "5"),
        ("5", "5"),
        ("x #### 1 #### 2,000 ", "2,000"),
        ("####", ""),
        ("so \\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}"),
    ],
)
def test_the_reference_is_what_stands_behind_the_last_mark_or_in_the_box(answer, final):
    assert final_answer(answer) == final


def test_grade_tells_a_wrong_answer_from_none():
    assert grade("18", [], "\\boxed{18}") == 1.0
    assert grade("18", [], "\\boxed{19}") == -1.0
    assert grade("18", [], "no idea at all") == NO_ANSWER


def problems_of(name: str, num: int) -> list[dict]:
    folder = shared_data()
    if folder is not None and (folder / name).exists():
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        return random.Random(0).sample(rows, min(num, len(rows)))
    rng = random.Random(0)
    return [
        {"answer": f"a step\n#### {rng.randrange(1, 100_000):,}" if name.startswith("gsm") else f"{rng.randrange(1000):03d}"}
        for _ in range(num)
    ]


def number(text: str) -> int:
    return int(float(text.rpartition("####")[2].strip().replace(",", "").replace("$", "")))


@pytest.mark.parametrize("name", ["gsm8k_test.jsonl", "aime24.jsonl"])
def test_every_reference_is_right_in_each_way_to_write_it_and_its_neighbour_wrong(name):
    for row in problems_of(name, 40):
        answer = str(row["answer"])
        n = number(answer)
        for text in (answer, f"so \\boxed{{{n}}}", f"The final answer is ${n}$.", f"steps 1 2 3\n#### {n:,}"):
            assert verify_math(answer, [], text) == 1.0, (answer, text)
        for text in (f"so \\boxed{{{n + 1}}}", f"steps {n}\n#### {n + 1}", f"\\boxed{{{n}.5}}"):
            assert verify_math(answer, [], text) == -1.0, (answer, text)


# ------------------------------------------------------------------------------------------------------------- shaping


def response_of(length: int) -> Response:
    return Response(id=0, prompt=Prompt(id=0, token_ids=(1,), answer=""), sample_index=0, token_ids=[5] * length)


@pytest.mark.parametrize(
    ("length", "penalty"), [(0, 0.0), (79, 0.0), (80, 0.0), (81, 0.05), (90, 0.5), (99, 0.95), (100, 1.0)]
)  # fmt: skip
def test_the_overlong_penalty_by_hand(length, penalty):
    """Cap 100, buffer 20: nothing up to 80, a twentieth per token, 1 at the cap."""
    config = RewardConfig(overlong_buffer=20, overlong_penalty=1.0)
    for score in (1.0, -1.0):
        assert shaped(score, response_of(length), config, cap=100, answered=True) == pytest.approx(score - penalty)


def test_shaping_is_off_by_default_and_the_format_penalty_is_paid_once():
    assert shaped(1.0, response_of(100), RewardConfig(), cap=100, answered=False) == 1.0
    config = RewardConfig(format_penalty=0.25, overlong_buffer=50, overlong_penalty=2.0)
    assert shaped(-1.0, response_of(100), config, cap=100, answered=False) == pytest.approx(-1 - 2 - 0.25)


@settings(deadline=None, max_examples=50)
@given(
    cap=st.integers(1, 500),
    buffer=st.integers(1, 500),
    penalty=st.floats(0, 5),
    lengths=st.tuples(st.integers(0, 500), st.integers(0, 500)),
)
def test_a_longer_response_is_never_worth_more_and_never_costs_more_than_the_penalty(cap, buffer, penalty, lengths):
    config = RewardConfig(overlong_buffer=buffer, overlong_penalty=penalty)
    short, long = sorted(min(length, cap) for length in lengths)
    a, b = (shaped(1.0, response_of(n), config, cap=cap, answered=True) for n in (short, long))
    assert a >= b >= 1.0 - penalty - 1e-9


# -------------------------------------------------------------------------------------------- in processes that can be killed


@pytest.fixture
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))


def test_a_verifier_that_sleeps_forever_is_killed_and_counted(on_path):
    begin = time.monotonic()
    with Verifier("bad_verifiers:sleeps", timeout_s=1.0, num_workers=1) as verifier:
        for id, answer in enumerate(["a", "sleep", "b"]):
            verifier.submit(id, answer, [1], "")
        scores = verifier.collect()
    assert {id: (s.value, s.status) for id, s in scores.items()} == {0: (1.0, "ok"), 1: (-1.0, "timeout"), 2: (1.0, "ok")}
    assert verifier.counts["timeout"] == 1
    assert time.monotonic() - begin < 120


def test_one_that_raises_prints_binary_exits_or_returns_nonsense_is_counted_and_the_others_are_scored(on_path):
    asked = ["fine", "raise", "binary", "exit", "nan", "text", "fine"]
    with Verifier("bad_verifiers:misbehaves", timeout_s=20.0, num_workers=1) as verifier:
        for id, answer in enumerate(asked):
            verifier.submit(id, answer, [1], "")
        scores = {int(id): s for id, s in verifier.collect().items()}
    assert len(scores) == len(asked)
    assert [scores[i].status for i in (0, 2, 6)] == ["ok", "ok", "ok"]
    assert [scores[i].status for i in (1, 3)] == ["error", "error"]
    assert [scores[i].status for i in (4, 5)] == ["bad_score", "bad_score"]
    assert all(s.value in (1.0, -1.0) for s in scores.values())
    assert sum(verifier.counts.values()) == len(asked)


def test_math_verify_works_in_the_killable_process_and_a_hard_text_cannot_hold_it():
    tower = "\\boxed{" + "9^{" * 12 + "9" + "}" * 12 + "}"
    with Verifier("scale.rewards:verify_math", timeout_s=5.0, num_workers=1) as verifier:
        verifier.submit(0, "#### 18", [1], "\\boxed{18}")
        verifier.submit(1, "#### 18", [1], tower)
        verifier.submit(2, "#### 18", [1], "\x00\x01 binary \ufffd" * 2000)
        verifier.submit(3, "no reference", [1], "\\boxed{18}")
        verifier.submit(4, "#### 18", [1], "18")
        scores = {int(id): s for id, s in verifier.collect().items()}
    assert (scores[0].value, scores[0].status) == (1.0, "ok")
    assert scores[1].value == -1.0
    assert scores[1].status in ("ok", "timeout")
    assert (scores[2].value, scores[2].status) == (-1.0, "ok")
    assert (scores[3].value, scores[3].status) == (-1.0, "ok")
    assert scores[4].value == 1.0
    assert set(scores) == {0, 1, 2, 3, 4}


def test_only_the_built_in_grader_says_that_there_is_no_answer():
    """A user's verifier may score below -1, and with exactly the grader's sign: such a score stays. The grader's is a wrong answer."""
    scores = {0: (NO_ANSWER, "ok"), 1: (-5.0, "ok"), 2: (1.0, "timeout")}
    verifier = types.SimpleNamespace(submit=lambda response: None, collect=lambda: scores)
    for graded, no_answer in ((False, NO_ANSWER), (True, -1.25)):
        scorer = Shaped(verifier, RewardConfig(format_penalty=0.25), cap=10, graded=graded)
        for id in scores:
            scorer.submit(Response(id=id, prompt=Prompt(id=0, token_ids=(1,), answer=""), sample_index=0, token_ids=[1, 2]))
        assert scorer.collect() == {0: (no_answer, "ok"), 1: (-5.0, "ok"), 2: (1.0, "timeout")}
    assert GRADE.partition(":")[2] == "grade"
