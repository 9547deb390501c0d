"""The tasks: what their verifiers accept and refuse, how long their answers are, and what a user's own file may hold."""

import importlib
import json
import os
import random
import statistics
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tppo_ref.method.errors import UserError
from tppo_ref.tasks import TASKS, DemonstratedTask, Task, chain, fork, length, load_task
from tppo_ref.tasks.jsonl import ByteTokenizer, verify
from tppo_ref.tasks.synthetic import END, draw_steps

STEPPED = ("chain", "fork", "length")  # one right answer, in steps of a counter and a token
BUILT_IN = (*STEPPED, "maze", "brackets")
BUILT = {name: load_task(name, num_train=2000, num_test=256) for name in BUILT_IN}
SOLVED = {name: [(p, task.answer(p), task.solve(p)) for p in task.problems("train", 300, 5, 0.1)] for name, task in BUILT.items()}


def verify_of(task):
    module, _, function = task.verifier.partition(":")
    return getattr(importlib.import_module(module), function)


def steps_of(response, lead):
    """The (tens, units, own) triples of a response after its first `lead` tokens, without the end token."""
    body = response[lead:-1]
    return [body[i : i + 3] for i in range(0, len(body), 3)]


# What is right.


def test_the_right_response_of_a_chain_by_hand():
    follow = chain.NEXT_STATE[1]
    state = chain.ChainTask.own_tokens.index("c")
    expected, names = ["03", "02", "01"], []
    for number in expected:
        state = follow[state]
        names += [number, chain.ChainTask.own_tokens[state]]
    task = BUILT["chain"]
    problem = (1, 3, chain.ChainTask.own_tokens.index("c"))
    assert task.describe(task.prompt_ids(problem)) == "map1 0_ _3 c"
    assert task.describe(task.solve(problem)) == " ".join([*names, "END"])


def test_the_right_response_of_a_fork_by_hand():
    task = BUILT["fork"]
    mark = fork.RIGHT_MARK[2][5]
    names = ["ABCDEFGH"[(mark + i) % 8] for i in range(4)]
    assert task.describe(task.prompt_ids((2, 5, 3))) == "left2 right5 0_ _3"
    assert task.describe(task.solve((2, 5, 3))) == f"{names[0]} 03 {names[1]} 02 {names[2]} 01 {names[3]} END"


def test_the_right_response_of_a_length_by_hand():
    task = BUILT["length"]
    assert task.describe(task.prompt_ids((1, 12))) == "nut 1_ _2"
    assert task.describe(task.solve((1, 12))) == (
        "01 nut 02 nut 03 nut 04 nut 05 nut 06 nut 07 nut 08 nut 09 nut 10 nut 11 nut 12 nut END"
    )


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_right_response_scores_plus_one_for_every_prompt_of_both_splits(name):
    task = BUILT[name]
    check = verify_of(task)
    for split, num in (("train", 2000), ("test", 256)):
        problems = task.problems(split, num, 0, task.long_share)
        for prompt, problem in zip(task.prompts(split), problems, strict=True):
            assert prompt.token_ids == task.prompt_ids(problem)
            assert check(prompt.answer, list(task.solve(problem)), None) == 1.0
            assert len(task.solve(problem)) <= task.max_response_tokens
            assert len(prompt.token_ids) == task.max_prompt_tokens


# What is refused.


@pytest.mark.parametrize("name", BUILT_IN)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_change_of_one_token_is_refused(name, data):
    task = BUILT[name]
    check = verify_of(task)
    _, answer, right = data.draw(st.sampled_from(SOLVED[name]))
    position = data.draw(st.integers(0, len(right) - 1))
    token = data.draw(st.integers(-1, task.vocab_size).filter(lambda token: token != right[position]))
    kind = data.draw(st.sampled_from(["replace", "insert", "delete"]))
    if kind == "replace":
        changed = [*right[:position], token, *right[position + 1 :]]
    elif kind == "insert":
        changed = [*right[:position], token, *right[position:]]
    else:
        changed = [*right[:position], *right[position + 1 :]]
    assert check(answer, changed, None) == -1.0


@pytest.mark.parametrize("name", STEPPED)
def test_shortcuts_are_refused(name):
    task = BUILT[name]
    check = verify_of(task)
    lead = 1 if name == "fork" else 0
    for _, answer, right in SOLVED[name]:
        head, steps = right[:lead], steps_of(right, lead)
        join = lambda some, head=head: [*head, *(token for step in some for token in step), END]  # noqa: E731
        assert join(steps) == list(right)
        shortcuts = {
            "nothing": [],
            "the end at once": [END],
            "no end token": right[:-1],
            "a second end token": [*right, END],
            "tokens after the end": [*right, *right],
            "the last step alone": join(steps[-1:]),
            "the first step cut": join(steps[1:]),
            "the last step cut": join(steps[:-1]),
            "a step in the middle left out": join(steps[:1] + steps[2:]),
            "the last step twice": join([*steps, steps[-1]]),
            "the first state throughout": None,
            "counters alone": [*head, *(token for step in steps for token in step[:2]), END],
            "states alone": [*head, *(step[2] for step in steps), END],
            "counters the other way round": join(
                [(*number[:2], step[2]) for number, step in zip(reversed(steps), steps, strict=True)]
            ),
            "the prompt": task.prompt_ids(SOLVED[name][0][0]),
        }
        if len({step[2] for step in steps}) > 1:
            shortcuts["the first state throughout"] = join([(*step[:2], steps[0][2]) for step in steps])
        for kind, response in shortcuts.items():
            if response is not None:
                assert check(answer, response, None) == -1.0, kind


def test_a_chain_cannot_be_cut_by_the_period_of_its_cycle():
    """A cycle has 5 states: k and k - 5 end in the same state, and the shorter chain must not pass for the longer."""
    task = BUILT["chain"]
    assert chain.right_response(0, 60, 3)[-2] == chain.right_response(0, 55, 3)[-2]
    assert verify_of(task)("0 60 3", chain.right_response(0, 55, 3)) == -1.0


def test_a_wrong_guess_in_a_fork_is_as_long_as_the_right_one():
    for steps in (2, 12, 99):
        assert len({len(fork.response_for(mark, steps)) for mark in range(fork.NUM_MARKS)}) == 1
    assert sum(fork.verify("3 12", fork.response_for(mark, 12)) > 0 for mark in range(fork.NUM_MARKS)) == 1


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_answer_of_another_problem_is_refused(name):
    check = verify_of(BUILT[name])
    for (_, answer, right), (_, _, other) in zip(SOLVED[name][1:], SOLVED[name], strict=False):
        assert (check(answer, other, None) == 1.0) == (other == right)


# Lengths, splits, seeds.


@pytest.mark.parametrize("name", STEPPED)
def test_right_responses_have_a_long_tail(name):
    task = load_task(name)
    lengths = sorted(len(task.solve(p)) for p in task.problems("train", task.num_train, task.seed, task.long_share))
    p99 = lengths[int(0.99 * len(lengths))]
    assert p99 / statistics.mean(lengths) >= 4.0
    assert lengths[-1] <= task.max_response_tokens
    assert 20 < statistics.mean(lengths) < 35


def test_short_lengths_are_log_uniform_and_long_ones_uniform():
    rng = random.Random(0)
    short = [draw_steps(rng, 0.0) for _ in range(20_000)]
    assert (min(short), max(short)) == (2, 12)
    # log-uniform over [2, 13): 2..4 and 5..12 hold log(5/2) and log(13/5) of log(13/2)
    assert sum(k <= 4 for k in short) / len(short) == pytest.approx(0.4895, abs=0.02)
    long = [draw_steps(rng, 1.0) for _ in range(20_000)]
    assert (min(long), max(long)) == (24, 99)
    assert statistics.mean(long) == pytest.approx(61.5, abs=0.7)


@pytest.mark.parametrize("name", BUILT_IN)
def test_splits_share_no_prompt_whatever_the_seeds(name):
    train, test = BUILT[name].prompts("train"), load_task(name, seed=7, num_test=1000).prompts("test")
    assert not {p.token_ids for p in train} & {p.token_ids for p in test}
    assert len({p.token_ids for p in test}) > 50
    demonstrated = {prompt for prompt, _ in BUILT[name].demonstrations(3, 3000)}
    assert not demonstrated & {p.token_ids for p in test}
    ids = [p.id for split in ("train", "test") for p in BUILT[name].prompts(split)]
    assert ids == list(range(2256))


@pytest.mark.parametrize("name", BUILT_IN)
def test_everything_follows_from_the_seed(name):
    task, again, other = (load_task(name, num_train=300, num_test=50, seed=seed) for seed in (4, 4, 5))
    assert task.prompts("train") == again.prompts("train")
    assert task.prompts("test") == again.prompts("test")
    assert task.demonstrations(9, 200) == again.demonstrations(9, 200)
    assert task.prompts("train") != other.prompts("train")
    assert task.demonstrations(9, 200) != task.demonstrations(10, 200)


def test_prompts_are_the_same_on_every_machine():
    """Literals: another Python or another hash seed must not move a prompt (checkpoints name prompts by id)."""
    assert {name: [p.answer for p in load_task(name).prompts("test")[:4]] for name in BUILT_IN} == {
        "chain": ["1 9 1", "1 12 11", "0 2 16", "1 7 13"],
        "fork": ["1 5", "3 3", "0 10", "4 3"],
        "length": ["9 3", "12 3", "15 4", "10 3"],
        "maze": ["0 2 2 2 0 1 7", "2 0 1 2 1 1 33", "0 0 1 1 2 1 50", "0 1 1 2 2 2 11"],
        "brackets": ["0 0 3 2 0 45", "3 2 3 1 0 2", "2 1 2 2 2 12", "0 0 3 0 3 3"],
    }


# The imperfect base.


@pytest.mark.parametrize("name", STEPPED)
def test_demonstrations_are_imperfect_alike_for_short_and_long_problems(name):
    """Pass rates of 0.3 to 0.5 in both halves: where the long ones failed, they would get no signal and shrink."""
    task = BUILT[name]
    check = verify_of(task)
    rng = random.Random(1)
    for long_share in (0.0, 1.0):
        problems = task.problems("train", 3000, 8, long_share)
        rate = statistics.mean(check(task.answer(p), task.demonstrate(p, rng), None) > 0 for p in problems)
        assert 0.3 < rate < 0.5, long_share


@pytest.mark.parametrize("name", STEPPED)
def test_demonstrations_are_well_formed(name):
    task = BUILT[name]
    for prompt, response in task.demonstrations(2, 500):
        assert len(prompt) == task.max_prompt_tokens
        assert response[-1] == END
        assert END not in response[:-1]
        assert all(0 <= token < task.vocab_size for token in prompt + response)
        lead = 1 if name == "fork" else 0
        numbers = [10 * tens + units for tens, units, _ in steps_of(response, lead)]
        expected = list(range(1, len(numbers) + 1))
        assert numbers == (expected if name == "length" else expected[::-1])


def test_a_wrong_step_of_a_chain_changes_no_length():
    task = BUILT["chain"]
    rng = random.Random(0)
    for problem, _, right in SOLVED["chain"]:
        assert len(task.demonstrate(problem, rng)) == len(right)


def test_chains_meet_at_most_three_doubtful_states():
    for table, doubtful in zip(chain.NEXT_STATE, chain.DOUBTFUL, strict=True):
        for start in range(chain.NUM_STATES):
            state, met = start, 0
            for _ in range(99):
                met += doubtful[state]
                state = table[state]
            assert met <= 3
        assert doubtful.count(False) == 5


def test_wrong_favourites_are_wrong():
    for table, wrong in zip(chain.NEXT_STATE, chain.FAVOURITE_WRONG, strict=True):
        assert all(a != b for a, b in zip(table, wrong, strict=True))
    for marks, wrong in zip(fork.RIGHT_MARK, fork.FAVOURITE_WRONG, strict=True):
        assert all(a != b for a, b in zip(marks, wrong, strict=True))
    assert 0 not in length.HABIT


# The registry and the protocol.


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_tasks_keep_the_protocol(name):
    task = BUILT[name]
    assert isinstance(task, Task)
    assert isinstance(task, DemonstratedTask)
    assert task.vocab_size < 64
    assert task.tokenizer is None
    assert task.response_text([1, END]) is None
    assert task.end_token_id == END
    assert len(set(task.tokens)) == len(task.tokens)
    assert task.describe([1, 2, END, 99]) == "12 END ?99"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [("chian", {}, "task.name: got 'chian'; expected one of chain, fork, length, maze, brackets, calculator, jsonl, or module:Class; did you mean chain?"),
     ("xyz", {}, "chain, fork, length, maze, brackets, calculator, jsonl"),
     ("no_such_module:Task", {}, "task.name: got 'no_such_module:Task' (ModuleNotFoundError: No module named 'no_such_module'); expected a class that"),
     ("tppo_ref.tasks.chain:Chian", {}, "'tppo_ref.tasks.chain:Chian' (AttributeError: "), (":", {}, "expected a class that can be imported"),
     ("chain", {"num_tran": 3}, "task: got the option 'num_tran'; expected one of the options of chain: "),
     ("chain", {"num_tran": 3}, "; did you mean num_train?"),
     ("fork", {"num_test": 0}, "task fork: num_test: got 0; expected at least 1"), ("length", {"long_share": 1.5}, "long_share: got 1.5; expected a share")],
)  # fmt: skip
def test_a_mistake_in_a_name_or_an_option_is_named(name, options, message):
    with pytest.raises(UserError) as caught:
        load_task(name, **options)
    assert message in str(caught.value)


def test_every_name_of_the_registry_is_a_task():
    assert set(TASKS) == {*BUILT_IN, "calculator", "jsonl"}
    for name in (*BUILT_IN, "calculator"):
        assert load_task(name).name == name
    with pytest.raises(UserError, match="split: got 'validation'"):
        BUILT["chain"].prompts("validation")


# A user's own files.


def write(folder, *lines, name="train.jsonl"):
    file = folder / name
    file.write_bytes(b"".join(line if isinstance(line, bytes) else (json.dumps(line) + "\n").encode() for line in lines))
    return str(file)


GOOD = {"prompt": "6 x 7?", "answer": "It is\n#### 42"}


def test_a_users_file_becomes_prompts(tmp_path):
    train = write(tmp_path, b"\xef\xbb\xbf", GOOD, b"\n", {"question": "häh?", "answer": 7, "id": "b", "more": []})
    test = write(tmp_path, {"prompt": "1+1", "answer": "2"}, name="test.jsonl")
    task = load_task("jsonl", train=train, test=test)
    assert isinstance(task, Task)
    assert not isinstance(task, DemonstratedTask)
    first, second = task.prompts("train")
    assert (first.id, first.answer, task.describe(first.token_ids)) == (0, "It is\n#### 42", "6 x 7?")
    assert (second.id, second.answer, task.describe(second.token_ids)) == (1, "7", "häh?")
    assert [p.id for p in task.prompts("test")] == [2]
    assert (task.vocab_size, task.end_token_id) == (260, 256)
    assert task.response_text([*b"#### 42", 256]) == "#### 42"
    assert task.verifier == "tppo_ref.tasks.jsonl:verify"


def test_without_a_test_file_the_end_of_the_train_file_is_the_test_split(tmp_path):
    train = write(tmp_path, *({"prompt": str(i), "answer": str(i)} for i in range(10)))
    task = load_task("jsonl", train=train, test_share=0.25)
    assert [p.answer for p in task.prompts("train")] == list("0123456")
    assert [(p.id, p.answer) for p in task.prompts("test")] == [(7, "7"), (8, "8"), (9, "9")]


def test_keys_can_be_named_and_a_chat_template_used(tmp_path):
    train = write(tmp_path, *[{"prompt": "no", "text": "yes", "label": "a", "answer": "b"}] * 2)
    task = load_task("jsonl", train=train, prompt_key="text", answer_key="label", chat_template=True)
    prompt = task.prompts("train")[0]
    assert (task.describe(prompt.token_ids), prompt.answer) == ("<user>yes<assistant>", "a")


@pytest.mark.parametrize(
    ("bad", "messages"),
    [
        (b"{oops}\n", ["invalid JSON", "one JSON object per line"]),
        (b'{"prompt": "a", "answer": \n', ["invalid JSON"]),
        (b"[" * 100_000 + b"\n", ["invalid JSON"]),
        (b'{"prompt": "\xff", "answer": "1"}\n', ["no UTF-8", "byte 13"]),
        (b"[1, 2]\n", ["a JSON list", "expected an object"]),
        (b'"text"\n', ["a JSON str"]),
        ({"prompt": "a"}, ["got the keys 'prompt'", "expected 'answer'"]),
        ({"promt": "a", "answer": "1"}, ["expected 'prompt' or 'question'", "'promt'"]),
        ({"prompt": "a", "question": "b", "answer": "1"}, ["both 'prompt' and 'question'", "prompt_key"]),
        ({"prompt": 3, "answer": "1"}, ["'prompt': got int", "expected a text"]),
        ({"prompt": "a", "answer": None}, ["'answer': got NoneType", "a text or a number"]),
        ({"prompt": "a", "answer": True}, ["'answer': got bool"]),
        ({"prompt": " ", "answer": "1"}, ["'prompt': got nothing but white space"]),
        (b'{"prompt": "\\ud800", "answer": "1"}\n', ["surrogate"]),
        ({"prompt": "a" * 33, "answer": "1"}, ["got a prompt of 33 tokens", "at most 32", "raise task.max_prompt_tokens"]),
        ({"prompt": "a", "answer": "1", "id": 5}, ["got id 5, as in line 2"]),
        (b'{"prompt": "a", "answer": NaN}\n', ["'answer': got nan", "finite"]),
        (b'{"prompt": "a", "answer": -Infinity}\n', ["'answer': got -inf"]),
        (b'{"prompt": "a", "answer": 1e999}\n', ["'answer': got inf"]),
        (b'{"prompt": "a", "answer": "1", "answer": "2"}\n', ["key 'answer' stands there twice"]),
        (b'{"prompt": "a", "answer": "1", "more": {"x": 1, "x": 1}}\n', ["key 'x' stands there twice"]),
        ({"prompt": "It is\n#### 42", "answer": "6 x 7?"}, ["a prompt that ends with #### and a number", "swapped"]),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_number(tmp_path, bad, messages):
    file = write(tmp_path, GOOD, {**GOOD, "id": 5}, bad, GOOD)
    with pytest.raises(UserError) as caught:
        load_task("jsonl", train=file, max_prompt_tokens=32)
    assert f"{file}:3: " in str(caught.value)
    assert "\n" not in str(caught.value)
    for message in messages:
        assert message in str(caught.value)


def test_a_missing_an_empty_and_a_single_file_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl', which cannot be read \(No such file"):
        load_task("jsonl", train=str(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match=r"train\.jsonl', which is empty"):
        load_task("jsonl", train=write(tmp_path, b"\n \n"))
    with pytest.raises(UserError, match="at least 2"):
        load_task("jsonl", train=write(tmp_path, GOOD))
    with pytest.raises(UserError, match=r"task.tokenizer: got .*, which is no folder"):
        load_task("jsonl", train=write(tmp_path, GOOD, GOOD), tokenizer=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"task.tokenizer: got .*, which cannot be loaded"):
        load_task("jsonl", train=write(tmp_path, GOOD, GOOD), tokenizer=str(tmp_path))


@pytest.mark.parametrize(("kind", "make"), [("folder", Path.mkdir), ("pipe", os.mkfifo), ("device", None)])
def test_a_prompt_file_that_is_none_is_refused_at_once(tmp_path, kind, make):
    """A pipe would block before the first byte, and /dev/zero never end."""
    file = Path("/dev/zero") if make is None else tmp_path / "train.jsonl"
    if make:
        make(file)
    with pytest.raises(UserError, match=f"got '{file}', a {kind}.*; expected a regular file") as caught:
        load_task("jsonl", train=str(file))
    assert "\n" not in str(caught.value)


def test_a_path_with_a_nul_is_no_traceback():
    with pytest.raises(UserError, match="cannot be read"):
        load_task("jsonl", train="a\0b")


def test_a_prompt_of_no_tokens_is_refused_by_its_line(tmp_path, monkeypatch):
    """As a folder without a tokenizer encodes everything: to nothing."""
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text, add_special_tokens=True: list(text.strip("x").encode()))
    with pytest.raises(UserError, match=r"train\.jsonl:2: got a prompt that encodes to no tokens"):
        load_task("jsonl", train=write(tmp_path, GOOD, {"prompt": "xx", "answer": "1"}))


def test_prompt_and_answer_have_keys_of_their_own(tmp_path):
    with pytest.raises(UserError, match=r"task.prompt_key: got 'answer'.*task.answer_key"):
        load_task("jsonl", train=write(tmp_path, GOOD, GOOD), prompt_key="answer")


def test_a_prompt_may_speak_of_the_mark_and_show_examples(tmp_path):
    texts = ["Write #### and the number.", "2+2?\n#### 4\n\n3+3?", "#### means the answer"]
    task = load_task("jsonl", train=write(tmp_path, *({"prompt": text, "answer": "6"} for text in texts)))
    assert len(task.prompts("train")) == 2


def test_prompts_are_left_out_of_training_by_id_and_stay_in_the_test_split(tmp_path):
    train = write(tmp_path, *({"prompt": str(i), "answer": str(i)} for i in range(10)))
    task = load_task("jsonl", train=train, test_share=0.2)
    task.leave_out({1, 3, 9})
    assert [p.id for p in task.prompts("train")] == [0, 2, 4, 5, 6, 7]
    assert [p.id for p in task.prompts("test")] == [8, 9]
    assert task.where(4).endswith("train.jsonl:5")
    with pytest.raises(UserError, match="all of whose references fail"):
        task.leave_out(set(range(10)))


def test_a_transformers_tokenizer_folder_works(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {word: i for i, word in enumerate(["<unk>", "</s>", "one", "two", "user", ":"])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    template = "{% for m in messages %}user : {{ m.content }}{% endfor %}"
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", chat_template=template)
    fast.save_pretrained(folder)
    train = write(tmp_path, *[{"prompt": "one two", "answer": "two"}] * 2)
    task = load_task("jsonl", train=train, tokenizer=str(folder))
    assert (task.vocab_size, task.end_token_id) == (6, 1)
    assert task.prompts("train")[0].token_ids == (2, 3)
    assert task.response_text([3, 1]) == "two"
    chat = load_task("jsonl", train=train, tokenizer=str(folder), chat_template=True)
    assert chat.prompts("train")[0].token_ids == (4, 5, 2, 3)


# The default verifier of a user's file.


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        ("Work.\n#### 72", "so #### 72", 1.0), ("#### 1,000", "#### $1000.00", 1.0), ("#### -3", "#### -3.", 1.0),
        ("#### 72", "it is 72", -1.0), ("#### 72", "", -1.0), ("#### 72", "####", -1.0), ("#### 72", "#### 27", -1.0),
        ("#### 72", "#### 72 #### 1", -1.0), ("#### 72", "#### 1 #### 72", 1.0), ("#### 72", "72 #### 1", -1.0),
        ("#### 0.5", "#### .5", 1.0), ("#### 3", "#### -3", -1.0),
        ("yes", " yes\n", 1.0), ("yes", "Yes", -1.0), ("yes", "yes, or no", -1.0), ("72", "#### 72", -1.0),
        ("#### none", "#### none", 1.0), ("#### none", "none", -1.0),
    ],
)  # fmt: skip
def test_the_default_verifier_keeps_its_stated_rule(answer, response, score):
    assert verify(answer, [], response) == score


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_give_any_text_back(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < 256 for token in ids)
    assert tokenizer.decode([*ids, 256], skip_special_tokens=True) == text


def test_bytes_decode_whatever_a_model_samples():
    assert ByteTokenizer().decode([0xC3, 256, 0xA4, 999]) == "\ufffd<end>\ufffd\ufffd"


# The warm start.


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A few steps of a very small policy, and its folder."""
    from tppo_ref.runs.warmstart import tiny_policy_config, warm_start

    cache = tmp_path_factory.mktemp("cache")
    task = load_task("length", num_train=50, num_test=10)
    config = tiny_policy_config(task, num_layers=1, width=16)

    def make(task=task, config=config, cache_dir=cache, **settings):
        return warm_start(task, config, **{"steps": 4, "batch": 8, "cache_dir": cache_dir, "progress": False, **settings})

    return make, task, config, cache


def test_a_warm_start_lowers_the_loss_and_leaves_the_global_random_state_alone(warm, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM

    make, task, _, _ = warm
    torch.manual_seed(3)
    before = torch.get_rng_state()

    def loss(folder):
        model = AutoModelForCausalLM.from_pretrained(folder)
        losses = []
        for prompt, response in task.demonstrations(123, 20):
            ids = torch.tensor([prompt + response])
            logprobs = model(input_ids=ids[:, :-1]).logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
            losses.append(-logprobs[0, len(prompt) - 1 :].mean().item())
        return statistics.mean(losses)

    short, long = (make(steps=steps, cache_dir=tmp_path) for steps in (1, 40))
    assert torch.equal(torch.get_rng_state(), before)
    assert loss(long) < 0.8 * loss(short)
    assert sorted(tmp_path.iterdir()) == sorted([short, long])  # nothing half-written is left


def test_a_warm_start_is_made_once_and_anew_when_anything_changes(warm, monkeypatch):
    from tppo_ref.runs import warmstart
    from tppo_ref.runs.warmstart import tiny_policy_config

    make, task, _, _ = warm
    folder = make()
    with monkeypatch.context() as patch:
        patch.setattr(warmstart, "_train", None)  # would be called if the cache were not used
        assert make() == folder
    others = [make(seed=1), make(steps=5), make(batch=9), make(lr=1e-4)]
    others.append(make(config=tiny_policy_config(task, num_layers=1, width=24)))
    others.append(make(task=load_task("length", num_train=50, num_test=10, seed=1)))
    with monkeypatch.context() as patch:
        source = warmstart.inspect.getsource
        edited = lambda what: source(what) + ("# edited" if "length" in str(what) else "")  # noqa: E731
        patch.setattr(warmstart.inspect, "getsource", edited)
        others.append(make())
    assert len({folder, *others}) == 8


def test_a_warm_start_is_the_same_again_elsewhere(warm, tmp_path):
    make, _, _, _ = warm
    first, second = make(), make(cache_dir=tmp_path)
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


def test_an_interrupted_warm_start_leaves_nothing(warm, tmp_path, monkeypatch):
    from tppo_ref.runs import warmstart

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(warmstart, "_train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        warm[0](cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_in_a_warm_start_are_named(warm, tmp_path):
    from tppo_ref.runs.warmstart import tiny_policy_config

    make, task, _, _ = warm
    own = load_task("jsonl", train=write(tmp_path, GOOD, GOOD))
    with pytest.raises(UserError, match=r"'jsonl' has no demonstrations"):
        make(task=own)
    small = tiny_policy_config(task)
    small.vocab_size = 11
    with pytest.raises(UserError, match=r"vocabulary has 11 tokens, task 'length' needs 47"):
        make(config=small)
    with pytest.raises(UserError, match=r"steps is 0"):
        make(steps=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cache folder .* cannot be written"):
        make(cache_dir=tmp_path / "file" / "cache")
