"""References that fail against themselves: found in the verifier's processes, counted, listed, left out, and the same on resume."""

from __future__ import annotations

import csv
import json
import logging

import pytest

from tppo_ref.__main__ import main
from tppo_ref.loop.parallel import SingleProcess
from tppo_ref.method.errors import UserError
from tppo_ref.method.records import Prompt
from tppo_ref.runs.commands import pretrain_value, train
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.references import FILE, leave_out_bad_references
from tppo_ref.runs.sinks import read_metrics
from tppo_ref.tasks import load_task
from tppo_ref.tasks.references import BadReference, failing_references
from tppo_ref.tasks.verifier import Score, Verifier

SOURCE = '''
import os, time

def wrap_reference(answer):
    if answer == "unwrappable":
        raise KeyError("no form")
    return f"<{answer}>"

def verify(answer, ids, text):
    """Right where the text is the answer in angle brackets; some answers misbehave."""
    if answer == "hang":
        time.sleep(3600)
    if answer == "exit":
        os._exit(3)
    if answer == "raise":
        raise ValueError("not mine")
    return 1.0 if text == f"<{answer}>" and answer.isdigit() and list(ids) == [] else -1.0
'''


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A verifier of one's own that says how a reference is stated."""
    (tmp_path / "own_verifier.py").write_text(SOURCE)
    (tmp_path / "silent_verifier.py").write_text("def verify(answer, ids, text):\n    return -1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "own_verifier:verify"


def prompts(*answers: str) -> list[Prompt]:
    return [Prompt(id=10 + i, token_ids=(1,), answer=answer) for i, answer in enumerate(answers)]


def write(path, *answers: str) -> str:
    path.write_text("".join(json.dumps({"prompt": f"p{i}", "answer": answer}) + "\n" for i, answer in enumerate(answers)))
    return str(path)


def test_each_way_to_fail_is_found_and_the_others_pass(own):
    asked = prompts("1", "wrong", "hang", "2", "raise", "exit", "unwrappable", "3")
    with Verifier(own, 1.0) as verifier:
        assert verifier.checks_references
        assert failing_references(verifier, asked, progress=False) == [
            BadReference(11, "wrong", "scored -1"), BadReference(12, "hang", "no answer within 1 s"),
            BadReference(14, "raise", "ValueError: not mine"), BadReference(15, "exit", "the verifier's process ended with code 3"),
            BadReference(16, "unwrappable", "KeyError: 'no form'"),
        ]  # fmt: skip


def test_more_references_than_go_at_a_time(own):
    asked = prompts(*(str(i) if i % 100 else "x" for i in range(700)))
    with Verifier(own, 20.0, num_workers=2) as verifier:
        assert [b.prompt_id for b in failing_references(verifier, asked, progress=False)] == [10 + 100 * i for i in range(7)]


def test_the_progress_bar_counts_references(own, capsys, monkeypatch):
    monkeypatch.setattr("tppo_ref.tasks.references.AT_A_TIME", 2)
    with Verifier(own, 20.0) as verifier:
        monkeypatch.setattr("tppo_ref.tasks.references.tqdm", lambda **options: __import__("tqdm").tqdm(**(options | {"delay": 0})))
        failing_references(verifier, prompts("1", "2", "3"))
    assert "references: 100%" in capsys.readouterr().err.replace("|", "").replace("  ", " ")


def test_a_verifier_that_states_no_reference_is_not_asked(own):
    with Verifier("silent_verifier:verify", 20.0) as verifier:
        assert not verifier.checks_references
        assert failing_references(verifier, prompts("1"), progress=False) == []
        with pytest.raises(ValueError, match="no wrap_reference"):
            verifier.submit_reference(1, "1")


def test_responses_and_references_go_side_by_side(own):
    with Verifier(own, 20.0) as verifier:
        verifier.submit("response", "7", [], "<7>")
        verifier.submit_reference("reference", "7")
        verifier.submit("wrong", "7", [1], "<8>")
        assert verifier.collect() == {"response": Score(1.0, "ok"), "reference": Score(1.0, "ok"), "wrong": Score(-1.0, "ok")}


# ------------------------------------------------------------------------------------------------------------ before training


@pytest.fixture
def task(own, tmp_path):
    train = write(tmp_path / "train.jsonl", "1", "bad", "2", "raise", "3")
    return load_task("jsonl", train=train, test=write(tmp_path / "test.jsonl", "4", "bad"))


def answers(task, split="train"):
    return [p.answer for p in task.prompts(split)]


def test_bad_prompts_are_left_out_listed_and_told_in_one_line_each(own, task, tmp_path, caplog):
    with Verifier(own, 20.0) as verifier, caplog.at_level(logging.WARNING):
        leave_out_bad_references(task, verifier, tmp_path, resume=False, progress=False)
    assert answers(task) == ["1", "2", "3"]
    assert answers(task, "test") == ["4", "bad"], "an accuracy is over all of its prompts"
    listed = json.loads((tmp_path / FILE).read_text())
    assert (listed["verifier"], listed["checked"]) == (own, 5)
    assert [(row["prompt"], row["where"].rpartition(":")[2], row["answer"], row["why"]) for row in listed["left_out"]] == [
        (1, "2", "bad", "scored -1"), (3, "4", "raise", "ValueError: not mine")]  # fmt: skip
    assert [row["answer"] for row in listed["evaluation"]] == ["bad"]
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("2 of 5 references fail against themselves")
    assert str(tmp_path / FILE) in first
    assert second.startswith("1 of 2 evaluation references fail")
    assert "\n" not in first + second


def test_a_run_that_goes_on_has_the_same_prompts_whatever_the_verifier_says_now(own, task, tmp_path):
    """A timeout on a busy machine must not change what the samples of a run are."""
    (tmp_path / FILE).write_text(json.dumps({"verifier": own, "checked": 5, "left_out": [{"prompt": 0}], "evaluation": []}))
    with Verifier(own, 20.0) as verifier:
        leave_out_bad_references(task, verifier, tmp_path, resume=True, progress=False)
    assert answers(task) == ["bad", "2", "raise", "3"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"left_out": 3}', '{"left_out": [{}]}', "\x00"])
def test_a_damaged_list_is_one_line_with_a_remedy(own, task, tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with Verifier(own, 20.0) as verifier, pytest.raises(UserError, match="remove it") as caught:
        leave_out_bad_references(task, verifier, tmp_path, resume=True, progress=False)
    assert "\n" not in str(caught.value)


def test_nothing_is_written_where_no_reference_is_checked(own, task, tmp_path):
    with Verifier("silent_verifier:verify", 20.0) as verifier:
        leave_out_bad_references(task, verifier, tmp_path, resume=False, progress=False)
    with Verifier(load_task("chain").verifier, 20.0) as verifier:
        leave_out_bad_references(load_task("chain"), verifier, tmp_path, resume=False, progress=False)
    assert len(answers(task)) == 5
    assert not (tmp_path / FILE).exists()


def test_ranks_share_the_work_and_agree(own, task, tmp_path):
    """Two ranks by hand: each checks its share, and both leave out what either has found."""

    class Rank(SingleProcess):
        def __init__(self, rank, others):
            self.rank, self.world, self.others, self.mine = rank, 2, list(others), []

        def gather_objects(self, thing):
            self.mine.append(thing)
            other = self.others.pop(0) if self.others else []
            return [thing, other] if self.rank == 0 else [other, thing]

    with Verifier(own, 20.0) as verifier:
        first = Rank(0, [])
        leave_out_bad_references(task, verifier, tmp_path, resume=False, progress=False, parallel=first)
        assert answers(task) == ["1", "bad", "2", "raise", "3"], "rank 0 checks lines 1, 3 and 5"
        second = Rank(1, first.mine)
        leave_out_bad_references(task, verifier, tmp_path, resume=False, progress=False, parallel=second)
    assert answers(task) == ["1", "2", "3"]
    assert [row["prompt"] for row in second.mine[1]] == [1, 3]  # behind the first rank's word on whether there is a list already


@pytest.fixture
def run_config(own, tmp_path):
    """A run of two tiny steps on two good prompts of three, from a policy that is nothing but a shape."""
    shape = {"model_type": "qwen2", "vocab_size": 260, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "max_position_embeddings": 64, "architectures": ["Qwen2ForCausalLM"]}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    fields = {
        "task.name": "jsonl", "task.tokenizer": "bytes", "task.verifier": own, "task.path": write(tmp_path / "train.jsonl", "1", "bad", "2"),
        "task.eval_path": write(tmp_path / "test.jsonl", "4"), "model.policy": str(tmp_path / "config.json"), "rollout.slots": 4,
        "rollout.window": 4, "rollout.max_response_tokens": 8, "rollout.samples_per_prompt": 1, "run.out": str(tmp_path / "run"), "run.steps": 2,
        "run.progress": False, "run.eval_prompts": 1, "run.eval_samples": 1, "value.pretrain_responses": 4,
    }  # fmt: skip
    return replace_fields(Config(), fields)


def test_a_run_never_samples_a_prompt_whose_reference_fails_also_after_a_resume(run_config, tmp_path, caplog):
    train(run_config)
    assert "1 of 3 references fail" in caplog.text
    caplog.clear()
    (tmp_path / "own_verifier.py").write_text(SOURCE.replace("answer.isdigit()", "True"))  # which would let all pass now
    train(replace_fields(run_config, {"run.resume": True, "run.steps": 6}))
    assert "references fail" not in caplog.text
    with (tmp_path / "run" / "responses.csv").open() as file:
        sampled = {int(row["prompt"]) for row in csv.DictReader(file)}
    assert sampled == {0, 2}


def test_a_score_beyond_float32_is_a_failed_verification_and_the_run_goes_on(run_config, tmp_path):
    (tmp_path / "own_verifier.py").write_text("def verify(answer, ids, text):\n    return 1e39\n")
    train(replace_fields(run_config, {"run.steps": 6}))
    with (tmp_path / "run" / "responses.csv").open() as file:
        scores = [float(row["score"]) for row in csv.DictReader(file)]
    counted = [record["verify/errors"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "verify/errors" in record]
    assert set(scores) == {-1.0}
    assert counted[-1] == len(scores)


def test_the_critic_is_pre_trained_without_them_too(run_config, tmp_path):
    pretrain_value(run_config)
    lines = (tmp_path / "run" / "responses.jsonl").read_text().splitlines()
    assert {json.loads(line)["prompt"]["id"] for line in lines} == {0, 2}


# ------------------------------------------------------------------------------------------------------------------ check-data


def test_check_data_names_the_lines_and_counts(own, tmp_path, capsys):
    train, test = write(tmp_path / "train.jsonl", "1", "bad", "2"), write(tmp_path / "test.jsonl", "raise", "3")
    assert main(["check-data", train, "--task.eval_path", test, "--task.verifier", own]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"{train}:2: 'bad': scored -1", f"{test}:1: 'raise': ValueError: not mine",
                       f"2 of 5 references fail against themselves ({own})"]  # fmt: skip
    assert main(["check-data", "--task.path", write(tmp_path / "good.jsonl", "1", "2"), "--task.verifier", own]) == 0
    assert capsys.readouterr().out == f"0 of 2 references fail against themselves ({own})\n"


def test_check_data_reads_texts_and_needs_neither_model_nor_tokenizer(tmp_path, capsys):
    long = tmp_path / "long.jsonl"
    long.write_text(
        json.dumps({"prompt": "x" * 100_000, "answer": "#### 5,000"}) + "\n" + json.dumps({"prompt": "a", "answer": "####"}) + "\n"
    )
    assert main(["check-data", str(long)]) == 1
    printed = capsys.readouterr().out
    assert "long.jsonl:2" in printed
    assert "nothing behind its ####" in printed
    assert "1 of 2 references" in printed


def test_check_data_says_what_a_verifier_lacks(own, tmp_path, capsys):
    assert main(["check-data", write(tmp_path / "a.jsonl", "1", "2"), "--task.verifier", "silent_verifier:verify"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: task.verifier: got silent_verifier:verify, whose module has no wrap_reference")
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [[], ["/nowhere/file.jsonl"], ["--task.path"]])
def test_check_data_without_a_file_is_one_line(arguments, capsys):
    assert main(["check-data", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: ")
