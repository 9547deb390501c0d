"""`calculator`, the example of a conversation: what the tool answers, what is right, and that a policy learns from its own words alone."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from helpers import learnt, one_thread  # noqa: F401  (a fixture)
from test_resume import config_of, train

from tppo_ref.method.errors import UserError
from tppo_ref.runs.build import build, end_token_ids, reply_of
from tppo_ref.runs.checkpoint import read_state
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.session import Session
from tppo_ref.runs.sinks import read_metrics
from tppo_ref.runs.state_laws import broken_law
from tppo_ref.tasks import EnvironmentTask, load_task
from tppo_ref.tasks.calculator import BAR, EQUALS, shown, verify
from tppo_ref.tasks.synthetic import END, in_test_split

pytestmark = pytest.mark.usefixtures("one_thread")

TASK = load_task("calculator", num_train=400, num_test=100)
KEY, START, OPERAND, PRESSES = 3, 47, 6, 2
(PROMPT,) = [p for p in load_task("calculator", num_train=1).prompts("train")]


def ids(text: str) -> list[int]:
    """Token ids of names; a number is its digits."""
    return [token for word in text.split() for token in ([int(d) for d in word] if word.isdigit() else [TASK.tokens.index(word)])]


def prompt_of(problem):
    return type(PROMPT)(id=0, token_ids=TASK.prompt_ids(problem), answer=TASK.answer(problem))


def spoken(problem, *turns: str) -> list[str]:
    """What is answered to each turn of a policy that says `turns`, as text."""
    so_far, answers = [], []
    for turn in turns:
        so_far.append(ids(turn))
        answer = TASK.reply(prompt_of(problem), so_far)
        answers.append(TASK.describe(answer) if answer is not None else None)
        so_far.append(answer)
    return answers


def test_a_conversation_by_hand():
    problem = (KEY, START, OPERAND, PRESSES)
    assert TASK.describe(TASK.prompt_ids(problem)) == "key3 4_ _7 6 0_ _2"
    assert TASK.describe(TASK.solve(problem)) == "* 6 = 01 : 82 | * 6 = 00 : 92 | 92 END"
    assert spoken(problem, "* 6 =", "* 6 =", "92 END") == ["01 : 82 |", "00 : 92 |", None]


def test_the_tool_computes_what_is_pressed_right_or_not_and_says_when_it_cannot_read():
    problem = (KEY, START, OPERAND, PRESSES)
    assert spoken(problem, "- 9 =", "+ 4 =", "+ 1 =", "- 99 =", "=", "* * =", "9 9 END") == [
        "01 : 38 |", "00 : 42 |", "00 : 43 |", "? 00 : 43 |", "? 00 : 43 |", "? 00 : 43 |", None,
    ]  # fmt: skip
    assert spoken(problem, "* * =", "* 6 =") == ["? 02 : 47 |", "01 : 82 |"], "what it could not read changes nothing"
    assert spoken(problem, "| 6 =", "END") == ["? 02 : 47 |", None]


def test_the_right_words_are_answered_as_the_right_conversation_says_and_score_plus_one():
    for problem in TASK.problems("train", 300, 5, 0.1):
        said, turns = list(TASK.solve(problem)), []
        assert len(said) <= TASK.max_response_tokens
        heard: list[int] = []
        while True:
            own = said[len(heard) : next(i for i in range(len(heard), len(said)) if said[i] in (EQUALS, END)) + 1]
            turns.append(own)
            heard += own
            answer = TASK.reply(prompt_of(problem), turns)
            if answer is None:
                break
            turns.append(answer)
            heard += answer
        assert heard == said
        assert verify(TASK.answer(problem), said) == 1.0


def test_any_other_conversation_scores_minus_one():
    rng = random.Random(0)
    for problem in TASK.problems("train", 60, 6, 0.1):
        right = list(TASK.solve(problem))
        place = rng.randrange(len(right))
        wrong = [*right[:place], (right[place] + 1) % TASK.vocab_size, *right[place + 1 :]]
        assert verify(TASK.answer(problem), wrong) == verify(TASK.answer(problem), right[:-1]) == -1.0


def test_the_base_model_guesses_the_operation_and_no_test_problem_is_trained_on():
    demonstrations = TASK.demonstrations(0, 2000)
    answers = {prompt: [] for prompt, _ in demonstrations}
    right = {TASK.prompt_ids(p): TASK.solve(p) for p in TASK.problems("train", 20_000, 1, 0.15)}
    known = [response == right[prompt] for prompt, response in demonstrations if prompt in right]
    assert len(known) > 500
    assert sum(known) / len(known) == pytest.approx(0.4, abs=0.06)
    assert not set(answers) & {p.token_ids for p in TASK.prompts("test")}
    assert all(in_test_split(tuple(map(int, p.answer.split()))) for p in TASK.prompts("test"))


def test_only_tasks_of_several_turns_have_an_environment_and_tokens_that_end_a_turn():
    assert isinstance(TASK, EnvironmentTask)
    assert end_token_ids(TASK, None) == (END, EQUALS)
    for name in ("chain", "fork", "length"):
        task = load_task(name, num_train=2, num_test=2)
        assert reply_of(task) is None
        assert end_token_ids(task, None) == (END,)


class Odd(type(TASK)):
    """An environment that says what it should not."""

    def __init__(self, says):
        super().__init__(num_train=2, num_test=2)
        self.says = says

    def reply(self, prompt, turns):
        if isinstance(self.says, Exception):
            raise self.says
        return self.says


@pytest.mark.parametrize(("says", "message"), [
    ([], "the reply to turn 2 of prompt 0: got []; expected at least one token id, each below"),
    ([3, 50], "got [3, 50]; expected at least one token id, each below 50, or None at the end"),
    ([-1], "got [-1]"), (["a"], "got TypeError"), (7, "got TypeError"), (KeyError("no such tool"), "got KeyError"),
])  # fmt: skip
def test_what_an_environment_may_not_say_is_one_line_that_names_turn_and_prompt(says, message):
    with pytest.raises(UserError) as caught:
        reply_of(Odd(says))(PROMPT, [[1], [2], [3]])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_of_numpy_and_torch_are_tokens_and_none_is_the_end():
    assert reply_of(Odd(torch.tensor([3, 4])))(PROMPT, [[1]]) == [3, 4]
    assert reply_of(Odd(None))(PROMPT, [[1]]) is None


OWN = """
from tppo_ref.tasks.calculator import CalculatorTask, shown

class Stuck(CalculatorTask):
    name = "stuck"

    def reply(self, prompt, turns):
        return shown(7, 42) if len(turns) == 1 else None
"""


def test_an_environment_of_ones_own_is_named_as_a_verifier_is_and_trained_on(tmp_path, tmp_path_factory, monkeypatch):
    (tmp_path / "stuck_env.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    config = config_of("conversations", tmp_path / "run", tmp_path_factory.mktemp("cache"), steps=3)
    train(replace_fields(config, {"task.name": "stuck_env:Stuck"}))
    steps = [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if "ledger/observed" in m]
    assert steps[-1]["ledger/observed"] > 0
    assert steps[-1]["ledger/observed"] % len(shown(7, 42)) == 0
    ended = [m["response/turns_mean"] for m in steps if m["response/ended"]]
    assert ended
    assert max(ended) <= 2, "it answers once"


ALMOST = """
from tppo_ref.tasks.calculator import CalculatorTask

class Almost:
    def __init__(self):
        task = CalculatorTask(num_train=2, num_test=2)
        for name in set(dir(task)) - set({left_out!r}):
            if not name.startswith("_"):
                setattr(self, name, getattr(task, name))
"""


@pytest.mark.parametrize(
    "left_out",
    [["turn_end_token_ids"], ["reply"], ["describe", "response_text"], ["max_response_tokens"], ["tokenizer", "verifier"]],
)
def test_an_environment_that_lacks_a_part_of_one_is_refused_by_what_it_lacks(left_out, tmp_path, monkeypatch):
    """Else it would be trained on as a task without an environment, and no turn be answered."""
    module = f"almost_{'_'.join(left_out)}"
    (tmp_path / f"{module}.py").write_text(ALMOST.format(left_out=left_out))
    monkeypatch.syspath_prepend(tmp_path)
    config = config_of("conversations", tmp_path / "run", tmp_path / "cache", steps=1)
    with pytest.raises(UserError) as caught:
        train(replace_fields(config, {"task.name": f"{module}:Almost"}))
    assert str(caught.value).startswith(f"task.name: got '{module}:Almost'; expected an environment (a task with reply or turn_end_token_ids) "
                                        f"to have {', '.join(left_out)}, too; ")  # fmt: skip


@pytest.mark.parametrize("left_out", [[], ["reply", "turn_end_token_ids"]])
def test_a_whole_environment_is_one_and_a_task_without_a_part_of_one_is_a_task(left_out, tmp_path, monkeypatch):
    module = f"whole_{len(left_out)}"
    (tmp_path / f"{module}.py").write_text(ALMOST.format(left_out=left_out))
    monkeypatch.syspath_prepend(tmp_path)
    task = load_task(f"{module}:Almost")
    assert (reply_of(task) is None) == bool(left_out)
    assert len(end_token_ids(task, None)) == 2 - bool(left_out)


def test_a_checkpoint_in_the_middle_of_a_conversation_is_a_checkpoint(tmp_path, tmp_path_factory):
    """That runs go on from it bit for bit is held with the other cases of test_resume.py; that there is a middle, here."""
    cache = tmp_path_factory.mktemp("cache")
    checkpoint = train(config_of("conversations", tmp_path / "run", cache, steps=6))
    state = read_state(checkpoint)["trainer"]
    assert any(r["observations"] and BAR in r["observations"][0][1] for r in state["batcher"]["in_flight"])
    session = Session(build(config_of("conversations", tmp_path / "run", cache, steps=9, resume=True)))
    place = next(i for i, r in enumerate(state["batcher"]["in_flight"]) if r["observations"])
    edits = {
        "": lambda r: None,
        "other responses than those in flight": lambda r: r["observations"].pop(),
        "answered where no turn of its own ends": lambda r: r["observations"][0].__setitem__(0, 0),
        "answered a token that the model does not know": lambda r: r["observations"][0][1].__setitem__(0, 99),
        "tokens with what was answered": lambda r: r["observations"][0].__setitem__(1, [5] * 60),
    }
    try:
        assert any(answer.observations for answer in session.parts.evaluator().answers), "evaluation asks the tool, too"
        for law, edit in edits.items():
            edited = copy.deepcopy(state)
            edit(edited["batcher"]["in_flight"][place])
            found = broken_law([edited], session.trainer, step=6, whole=True)
            assert law in found, found
            assert bool(law) == bool(found), found
    finally:
        session.close()
    last = [m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if "ledger/observed" in m][-1]
    assert last["ledger/observed"] == state["ledger"]["observed"] > 0


def test_a_policy_learns_what_the_key_stands_for_from_conversations_that_windows_cut(tmp_path):
    """End to end on the real parts: a tiny model, its tool, the verifier's processes, T-PPO's steps."""
    steps, before, after = learnt("tppo", tmp_path, steps=10)
    assert all(m["response/cut_share"] > 0.1 for m in steps)
    assert steps[-1]["ledger/observed"] > 1000
    assert steps[-1]["response/turns_mean"] > 2
    assert after > before + 0.3
