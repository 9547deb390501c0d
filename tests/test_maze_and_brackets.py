"""The two tasks that were made to test the cut: walks and words made by solvers of their own, from the prompt as people read it."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tppo_ref.tasks import brackets, load_task, maze
from tppo_ref.tasks.synthetic import END

MAZE, BRACKETS = load_task("maze", num_train=2000, num_test=256), load_task("brackets", num_train=2000, num_test=256)
CHECK = {MAZE: maze.verify, BRACKETS: brackets.verify}
PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def ids(task, words):
    """Token ids of a text, numbers digit by digit."""
    return [task.tokens.index(token) for word in words.split() for token in (word if word.isdigit() else [word])]


def prompt_of(task, problem):
    """The prompt's words, and its number."""
    *words, tens, units = task.describe(task.prompt_ids(problem)).split()
    return words, int(tens[0] + units[1])


def walked(prompt, doors):
    """Text of the walk through these doors by a walker who knows nothing but the map, and whether it went far enough."""
    signs, moves = prompt
    leads = {}  # (room, door) -> (room, rooms gained)
    for here, sign in enumerate(signs):
        for door in "<^>":
            step = 1 if sign == "ABCDEF"[here] + door else -1
            leads["ABCDEF"[here], door] = ("ABCDEF"[(here + step) % 6], step)
    room, gained, words = "A", 0, []
    for left, door in zip(range(moves, 0, -1), doors, strict=True):
        room, step = leads[room, door]
        gained += step
        words += [f"{left:02}", door, room]
    return " ".join([*words, "END"]), gained > moves / 2


def bar_keeps(word, depth):
    """Whether it is the barred form that keeps the sense there."""
    return depth <= 3 and brackets.KEEPS[depth - 1]["([{<".index(word[depth - 1][1])] == 1


def nested(prompt, bars):
    """Text that closes the word with a stack, barred where `bars` says so; and how many of the outermost turn the sense."""
    word, depth = prompt
    stack = [(n, word[(n - 1) % 5][1]) for n in range(1, depth + 1)]
    words, turns = [], 0
    for bar in bars:
        n, opener = stack.pop()
        turns += bar != bar_keeps(word, n)
        words += [f"{n:02}", PAIRS[opener] + "!" * bar]
    assert not stack
    return " ".join([*words, "END"]), turns


MAZES = st.tuples(*[st.integers(0, 2)] * 6, st.integers(2, 12) | st.integers(24, 72))
WORDS = st.tuples(*[st.integers(0, 3)] * 5, st.integers(2, 12) | st.integers(24, 99))


# By hand.


def test_a_walk_by_hand():
    """Doors on: A< B^ C> D< E^ F<. Four moves; two of them are not enough, four are."""
    problem = (0, 1, 2, 0, 1, 0, 4)
    assert MAZE.describe(MAZE.prompt_ids(problem)) == "A< B^ C> D< E^ F< 0_ _4"
    assert MAZE.describe(MAZE.solve(problem)) == "04 < B 03 ^ C 02 > D 01 < E END"
    answer = MAZE.answer(problem)
    assert maze.verify(answer, ids(MAZE, "04 < B 03 ^ C 02 > D 01 < E END")) == 1.0
    assert maze.verify(answer, ids(MAZE, "04 < B 03 ^ C 02 < B 01 ^ C END")) == -1.0  # the docstring's: two ahead
    longer = MAZE.answer((*problem[:-1], 6))
    assert maze.verify(longer, ids(MAZE, "06 ^ F 05 < A 04 < B 03 ^ C 02 > D 01 < E END")) == 1.0  # a wrong turn made good
    assert maze.verify(longer, ids(MAZE, "06 ^ F 05 > E 04 ^ F 03 < A 02 < B 01 ^ C END")) == -1.0  # back twice


def test_a_word_by_hand():
    problem = (0, 1, 0, 3, 2, 7)
    assert BRACKETS.describe(BRACKETS.prompt_ids(problem)) == "1( 2[ 3( 4< 5{ 0_ _7"
    bars = ["!" * brackets.KEEPS[depth][kind] for depth, kind in ((2, 0), (1, 1), (0, 0))]
    inside = "07 ] 06 ) 05 } 04 > "
    assert BRACKETS.describe(BRACKETS.solve(problem)) == inside + "03 ){} 02 ]{} 01 ){} END".format(*bars)
    turned = ["" if bar else "!" for bar in bars]
    for late in itertools.product((0, 1), repeat=3):
        forms = [turned[i] if turn else bars[i] for i, turn in enumerate(late)]
        text = inside + "03 ){} 02 ]{} 01 ){} END".format(*forms)
        assert brackets.verify(BRACKETS.answer(problem), ids(BRACKETS, text)) == (1.0 if sum(late) % 2 == 0 else -1.0)


# What is right, and what is not.


@settings(max_examples=300, deadline=None)
@given(problem=MAZES, data=st.data())
def test_a_walk_is_right_if_and_only_if_it_goes_far_enough(problem, data):
    prompt = prompt_of(MAZE, problem)
    wrong = data.draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    doors, room = [], 0
    for _ in range(prompt[1]):  # so that both sides of the rule are met
        door = prompt[0][room][1]
        doors.append(rng.choice("<^>") if rng.random() < wrong else door)
        room = (room + (1 if doors[-1] == door else -1)) % 6
    text, far = walked(prompt, doors)
    assert maze.verify(MAZE.answer(problem), ids(MAZE, text)) == (1.0 if far else -1.0)
    assert MAZE.describe(ids(MAZE, text)) == text


@settings(max_examples=300, deadline=None)
@given(problem=WORDS, data=st.data())
def test_a_word_is_right_if_and_only_if_its_sense_is_turned_an_even_number_of_times(problem, data):
    prompt = prompt_of(BRACKETS, problem)
    rare = data.draw(st.booleans())
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    bars = [rng.random() < (0.05 if rare else 0.5) for _ in range(prompt[1])]
    text, turns = nested(prompt, bars)
    assert brackets.verify(BRACKETS.answer(problem), ids(BRACKETS, text)) == (1.0 if turns % 2 == 0 else -1.0)
    assert BRACKETS.describe(ids(BRACKETS, text)) == text


def right_response(task, problem, rng):
    """One that is right and not the straight one, where chance finds it."""
    for _ in range(50):
        response = task.demonstrate(problem, rng)
        if CHECK[task](task.answer(problem), response) > 0:
            return response
    return task.solve(problem)


@pytest.mark.parametrize("task", CHECK, ids=lambda task: task.name)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_one_wrong_token_spoils_any_right_response(task, data):
    """But for one thing that the rules allow: a wrong turn may be taken through either of the two wrong doors."""
    problem = data.draw(MAZES if task is MAZE else WORDS)
    right = right_response(task, problem, random.Random(data.draw(st.integers(0, 2**32))))
    position = data.draw(st.integers(0, len(right) - 1))
    token = data.draw(st.integers(-1, task.vocab_size).filter(lambda token: token != right[position]))
    kind = data.draw(st.sampled_from(["replace", "insert", "delete"]))
    changed = [*right[:position], *([token] if kind != "delete" else []), *right[position + (kind != "insert") :]]
    score = CHECK[task](task.answer(problem), changed)
    if score > 0:
        assert task is MAZE
        assert kind == "replace"
        assert position % 4 == 2
        room = 0 if position < 4 else "ABCDEF".index(task.tokens[right[position - 3]])
        sign = prompt_of(MAZE, problem)[0][room][1]
        assert sign not in (task.tokens[token], task.tokens[right[position]])


@pytest.mark.parametrize("task", CHECK, ids=lambda task: task.name)
def test_what_is_no_answer_is_refused(task):
    for problem in task.problems("train", 100, 3, 0.2):
        right, answer = task.solve(problem), task.answer(problem)
        step = 4 if task is MAZE else 3
        for response in ([], [END], right[:-1], [*right, END], [*right, *right], right[step:], right[:-1] * 2, task.prompt_ids(problem),
                         [*right[:-1], *right[-1 - step :]], [t for t in right if t > END], [-1] * len(right)):  # fmt: skip
            assert CHECK[task](answer, response) == -1.0


# The imperfect base.


@pytest.mark.parametrize("task", CHECK, ids=lambda task: task.name)
def test_demonstrations_are_middling_for_short_and_for_long_problems(task):
    rng = random.Random(1)
    for long_share in (0.0, 1.0):
        problems = task.problems("train", 3000, 8, long_share)
        rate = statistics.mean(CHECK[task](task.answer(p), task.demonstrate(p, rng)) > 0 for p in problems)
        assert 0.35 < rate < 0.6, long_share


def test_a_demonstrated_walk_fits_its_map_and_errs_in_every_second_room():
    rng, wrong = random.Random(0), [0] * 6
    for problem in MAZE.problems("train", 400, 2, 0.3):
        prompt = prompt_of(MAZE, problem)
        text = MAZE.describe(MAZE.demonstrate(problem, rng))
        doors = text.split()[1:-1:3]
        assert walked(prompt, doors)[0] == text
        rooms = ["A", *text.split()[2:-1:3]][:-1]
        assert all(("ABCDEF".index(room) - i) % 2 == 0 for i, room in enumerate(rooms))
        for room, door in zip(rooms, doors, strict=True):
            wrong["ABCDEF".index(room)] += room + door not in prompt[0]
    assert wrong[1::2] == [0, 0, 0]
    assert min(wrong[::2]) > 200
    assert all(wrong != sign for room in maze.FAVOURITE_WRONG for sign, wrong in enumerate(room))


def test_a_demonstrated_word_errs_in_its_outermost_brackets_alone():
    rng, turned, seen = random.Random(0), [0] * 100, [0] * 100
    for problem in BRACKETS.problems("train", 2000, 2, 0.3):
        word, depth = prompt_of(BRACKETS, problem)
        text = BRACKETS.describe(BRACKETS.demonstrate(problem, rng))
        bars = [closer.endswith("!") for closer in text.split()[1:-1:2]]
        assert nested((word, depth), bars)[0] == text
        for n, bar in zip(range(depth, 0, -1), bars, strict=True):
            seen[n] += 1
            turned[n] += bar != bar_keeps(word, n)
    assert turned[4:] == [0] * 96
    for n in (1, 2, 3):
        assert turned[n] / seen[n] == pytest.approx(1 - brackets.KEEP_PROBABILITY[n - 1], abs=0.04)


@given(st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3))
def test_the_value_of_a_word_that_stands_straight(turn):
    """The docstring's formula for closers to come that turn with these probabilities, against all outcomes and their scores."""
    problem = (0, 1, 0, 3, 2, 7)
    word, depth = prompt_of(BRACKETS, problem)
    right = 0.0
    for turns in itertools.product((False, True), repeat=3):
        bars = [bar_keeps(word, n) != (n <= 3 and turns[3 - n]) for n in range(depth, 0, -1)]
        if brackets.verify(BRACKETS.answer(problem), ids(BRACKETS, nested((word, depth), bars)[0])) > 0:
            right += math.prod(q if turned else 1 - q for q, turned in zip(turn, turns, strict=True))
    assert right == pytest.approx((1 + math.prod(1 - 2 * q for q in turn)) / 2)


@pytest.mark.parametrize("task", CHECK, ids=lambda task: task.name)
def test_lengths_are_long_tailed_and_most_tokens_lie_beyond_a_window(task):
    default = load_task(task.name)
    lengths = sorted(len(task.solve(p)) for p in task.problems("train", 4096, 0, default.long_share))
    assert lengths[-1] <= task.max_response_tokens <= 320  # rollout.max_response_tokens
    assert lengths[int(0.99 * len(lengths))] / statistics.mean(lengths) >= 4.0
    assert lengths[len(lengths) // 2] < 32
    whole_windows = sum((n - 1) // 64 * 64 for n in lengths)  # even where every response begins with a window
    assert whole_windows / sum(lengths) > 0.6
