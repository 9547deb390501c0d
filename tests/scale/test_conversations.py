"""A task of several turns in a whole run of scale/: its environment answers in training windows and in evaluation."""

from __future__ import annotations

import json
import re

import pytest
from scale_helpers import TINY_CONFIG, check_conservation, in_flight, launch, make_model

from tppo_ref.method.records import Response
from tppo_ref.rollout.turns import transcript
from tppo_ref.runs.checkpoint import complete_checkpoints
from tppo_ref.tasks import load_task

CALCULATOR = load_task("calculator")


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Three steps on two ranks. A random policy of so few tokens presses "=" often enough."""
    folder = tmp_path_factory.mktemp("conversations")
    model = make_model(folder / "model", tied=False, vocab=CALCULATOR.vocab_size, end=CALCULATOR.end_token_id)
    changes = {
        "algo.task.name": "calculator", "algo.task.tokenizer": "null", "algo.model.policy": model, "algo.run.out": folder / "out", "engine.kind": "torch",
        "algo.rollout.slots": 16, "algo.rollout.window": 16, "algo.rollout.max_response_tokens": 48, "algo.run.steps": 3,
        "algo.run.eval_prompts": 4, "algo.run.eval_samples": 2, "algo.run.progress": "false", "cluster.timeout_s": 60,
    }  # fmt: skip
    done = launch("--config", str(TINY_CONFIG), *(word for field, x in changes.items() for word in (f"--{field}", str(x))))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "out"


def test_the_environment_answers_in_training_windows_and_the_books_know(out):
    """Each response in flight was answered behind its turns, as the task answers, and what the ranks were told is counted."""
    flying = [Response.from_state_dict(state) for state in in_flight(complete_checkpoints(out / "checkpoints")[-1]).values()]
    answered = [response for response in flying if response.observations]
    assert len(answered) >= 2
    for response in answered:
        said, start = transcript(response), 0
        turns: list[list[int]] = []
        for column, observation in response.observations:
            turns.append(response.token_ids[start:column])
            assert tuple(observation) == CALCULATOR.reply(response.prompt, turns)
            turns.append(list(observation))
            start = column
        assert len(said) - len(response) == sum(len(ids) for _, ids in response.observations)
    rows = check_conservation(out)
    assert all(row["ledger/observed"] > 0 for row in rows), [row["ledger/observed"] for row in rows]


def test_the_environment_answers_in_evaluation(out):
    """Behind each "=" that does not end an answer stands what the calculator says."""
    rows = [json.loads(line) for file in sorted(out.glob("answers-*.jsonl")) for line in file.read_text().splitlines()]
    pressed = [rest for row in rows for rest in re.split(r" =(?= )", row["response"])[1:]]
    assert len(pressed) >= 4
    assert all(re.match(r"( \?)? \d\d : \d\d \|", rest) for rest in pressed), pressed
