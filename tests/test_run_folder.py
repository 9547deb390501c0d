"""A run's folder: whose it is, what a damage to its files costs, and who may go on from it. Each refusal is one line."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import one_thread  # noqa: F401  (a fixture)
from test_resume import (
    TINY,
    assert_same_checkpoint,
    assert_same_run,
    config_of,
    metrics_of,
    one_line,
    rewrite_manifest,
    rows_of,
    train,
)

from tppo_ref.__main__ import main
from tppo_ref.method.errors import NonFiniteError, UserError
from tppo_ref.rollout.models import ValueModel, load_value_model
from tppo_ref.runs import checkpoint, commands
from tppo_ref.runs.build import build, make_policy
from tppo_ref.runs.checkpoint import FORMAT, MANIFEST, complete_checkpoints
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.run_folder import own_folder
from tppo_ref.runs.session import Session
from tppo_ref.runs.sinks import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", name="cache")
def _cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module", name="whole")
def _whole(tmp_path_factory, cache) -> Path:
    """Four steps that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(config_of("held back", out, cache, steps=4))
    return out


@pytest.fixture(scope="module", name="good")
def _good(tmp_path_factory, cache) -> Path:
    """The same run after three steps, each with a checkpoint."""
    out = tmp_path_factory.mktemp("good") / "run"
    train(config_of("held back", out, cache, steps=3, checkpoint_every=1))
    return out


@pytest.fixture(name="run_folder")
def _run_folder(good, tmp_path) -> Path:
    shutil.copytree(good, tmp_path / "run")
    return tmp_path / "run"


def go_on(out: Path, cache: Path, steps: int = 4) -> Path:
    return train(config_of("held back", out, cache, steps=steps, resume=True))


def newest(out: Path) -> Path:
    return complete_checkpoints(out / "checkpoints")[-1]


# ---------------------------------------------------------------------------------------------------------------- the tokenizer


def word_tokenizer(folder: Path) -> None:
    """A tokenizer whose class says nothing of how it cuts a text: all of that is in its file."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<end>", "?", *"0123456789", "+", "=", "what", "is"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"what|is|."), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>").save_pretrained(folder)


def sums(file: Path, offset: int = 0) -> Path:
    file.write_text("".join(json.dumps({"prompt": f"what is {i}+{i}=", "answer": i + i + offset}) + "\n" for i in range(9)))
    return file


def own_prompts(tmp_path: Path, out: Path, tokenizer: str) -> Config:
    from transformers import Qwen2Config

    shape = Qwen2Config(vocab_size=260, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
                        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=None)  # fmt: skip
    shape.save_pretrained(tmp_path / "shape")
    kept = {name: value for name, value in TINY.items() if not name.startswith(("model.", "task."))}
    fields = {"task.name": "jsonl", "task.path": str(sums(tmp_path / "sums.jsonl")), "task.tokenizer": tokenizer, "run.out": str(out),
              "model.policy": str(tmp_path / "shape" / "config.json"), "run.steps": 1}  # fmt: skip
    return replace_fields(Config(), kept | fields)


@pytest.mark.parametrize("tokenizer", ["folder", "bytes"])
def test_a_checkpoints_policy_folder_is_all_that_an_evaluation_needs(tokenizer, tmp_path, capsys):
    if tokenizer == "folder":
        tokenizer = str(tmp_path / "tokenizer")
        word_tokenizer(Path(tokenizer))
    policy = train(own_prompts(tmp_path, tmp_path / "run", tokenizer)) / "policy"
    shutil.rmtree(tmp_path / "tokenizer", ignore_errors=True)
    code = main(["evaluate", "--model.policy", str(policy), "--task.name", "jsonl", "--task.path", str(tmp_path / "sums.jsonl"),
                 "--run.out", str(tmp_path / "evaluation"), "--rollout.max_response_tokens", "4"])  # fmt: skip
    assert (code, capsys.readouterr().err.count("error")) == (0, 0)
    (answer,) = (json.loads(line) for line in (tmp_path / "evaluation" / "answers.jsonl").read_text().splitlines())
    assert "".join(answer["prompt"].split()).replace("?", "") == "whatis8+8="  # the last of the file


def test_a_generic_tokenizer_cuts_a_text_beside_a_models_config_as_it_does_alone(tmp_path):
    """transformers' AutoTokenizer takes one beside a Qwen2 config.json for Qwen2's own, which cuts at spaces and digits."""
    from tppo_ref.tasks.jsonl import load_tokenizer

    word_tokenizer(tmp_path / "alone")
    shutil.copytree(tmp_path / "alone", tmp_path / "beside")
    (tmp_path / "beside" / "config.json").write_text('{"model_type": "qwen2"}')
    alone, beside = (load_tokenizer(str(tmp_path / name)) for name in ("alone", "beside"))
    assert alone.encode("whatis1+1=") == beside.encode("whatis1+1=") == [14, 15, 3, 12, 3, 13]


# ---------------------------------------------------------------------------------------------------------------- whose it is


def test_other_prompts_under_the_same_name_are_refused(tmp_path):
    config = own_prompts(tmp_path, tmp_path / "run", "bytes")
    train(config)
    again = replace_fields(config, {"run.steps": 2, "run.resume": True})
    sums(tmp_path / "sums.jsonl", offset=1)  # the same texts, other answers
    with pytest.raises(UserError) as error:
        train(again)
    one_line(error, "task.path: got other train prompts", "step-00000001", "expected the same content")
    sums(tmp_path / "sums.jsonl")
    assert train(again).name == "step-00000002"


def test_a_second_run_in_a_folder_is_refused_and_harms_nothing(run_folder, cache, capsys, tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(dataclasses.asdict(config_of("held back", run_folder, cache, steps=4, resume=True))))
    before = (run_folder / "metrics.jsonl").read_bytes()
    with own_folder(str(run_folder)):
        assert main(["train", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(rf"error: run\.out: got \S+, to which process {os.getpid()} is writing; expected .*; wait .*\n", said), said
    assert (run_folder / "metrics.jsonl").read_bytes() == before
    assert main(["train", "--config", str(file)]) == 0


def test_a_second_comparison_in_a_folder_is_refused(tmp_path, capsys):
    """It would remove the checkpoints of the first one's runs, to start them anew."""
    with own_folder(str(tmp_path)):
        assert main(["compare", "--run.out", str(tmp_path)]) == 2
    assert re.fullmatch(r"error: run\.out: got \S+, to which process \d+ is writing; expected .*\n", capsys.readouterr().err)


@pytest.mark.parametrize("command", ["evaluate", "pretrain-value"])
def test_a_command_that_writes_into_a_run_that_goes_on_is_refused(command, tmp_path, capsys):
    with own_folder(str(tmp_path)):
        assert main([command, "--task.name", "length", "--run.out", str(tmp_path), "--run.cache", str(tmp_path / "cache")]) == 2
    assert re.fullmatch(r"error: run\.out: got \S+, to which process \d+ is writing; expected .*\n", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"], "nothing took long before"


def test_a_kill_releases_the_folder(tmp_path):
    ready, told = os.pipe()
    if not (child := os.fork()):
        with own_folder(str(tmp_path)):
            os.write(told, b".")
            signal.pause()
    os.read(ready, 1)
    with pytest.raises(UserError, match=f"process {child}"), own_folder(str(tmp_path)):
        pass
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with own_folder(str(tmp_path)):
        pass


def test_a_kill_in_the_middle_of_pruning_leaves_nothing_for_ever(run_folder, cache, monkeypatch):
    """An old checkpoint of which half is gone must be no checkpoint, and must go at the next start."""

    class Killed(BaseException):
        pass

    def half(folder, ignore_errors=False):
        (folder / "state.json").unlink()
        raise Killed

    with monkeypatch.context() as m:
        m.setattr(checkpoint.shutil, "rmtree", half)
        with pytest.raises(Killed):
            checkpoint.remove_all_but(run_folder / "checkpoints", 2)
    assert [path.name for path in complete_checkpoints(run_folder / "checkpoints")] == ["step-00000002", "step-00000003"]
    (run_folder / "checkpoints" / ".unfinished-step-00000009-123").mkdir()
    assert len(list((run_folder / "checkpoints").iterdir())) == 4
    with own_folder(str(run_folder)):
        assert sorted(path.name for path in (run_folder / "checkpoints").iterdir()) == ["step-00000002", "step-00000003"]


@pytest.mark.parametrize("what", ["removed", "another in its place", "metrics.jsonl alone"])
def test_a_folder_that_goes_under_a_running_run_ends_it_in_one_line(what, run_folder, cache):
    with own_folder(str(run_folder)):
        session = Session(build(config_of("held back", run_folder, cache, steps=9, resume=True)))
    real = session.trainer.step

    def step():
        if what == "metrics.jsonl alone":
            (run_folder / "metrics.jsonl").unlink()
        else:
            shutil.move(run_folder, run_folder.with_name("elsewhere"))
        if what == "another in its place":
            shutil.copytree(run_folder.with_name("elsewhere"), run_folder)
        return real()

    session.trainer.step = step
    with pytest.raises(UserError) as error:
        session.train()
    session.close()
    one_line(error, "run.out: got", "removed or replaced under the run", "expected it to stay")
    if what == "removed":
        assert not run_folder.exists(), "a folder without a config was begun in its place"


# --------------------------------------------------------------------------------------------------------------- damaged files


def damage(file: Path, line: int, garbage: bytes) -> bytes:
    """Put `garbage` in the place of a line, counted from 1; the line that was there."""
    lines = file.read_bytes().split(b"\n")
    lost, lines[line - 1] = lines[line - 1], garbage
    file.write_bytes(b"\n".join(lines))
    return lost


GARBAGE = {"torn": b"{", "no object": b"null", "no step": b'{"step": "x"}', "binary": b"\xff\xfe\x00", "brackets": b"[" * 20_000}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE.keys())
def test_a_damaged_record_costs_itself_and_a_word(garbage, run_folder, whole, cache, caplog):
    lines = (run_folder / "metrics.jsonl").read_bytes().count(b"\n")
    where = next(i for i, r in enumerate(read_metrics(run_folder / "metrics.jsonl"), 1) if r["step"] == 2)
    lost = json.loads(damage(run_folder / "metrics.jsonl", where, garbage))
    go_on(run_folder, cache)
    assert (run_folder / "metrics.jsonl.damaged").read_bytes() == garbage + b"\n"
    assert f"1 of {lines} lines cannot be read (the first: line {where})" in caplog.text
    assert "the records of 1 of 3 steps are missing (the first: step 2)" in caplog.text
    assert "responses are missing" not in caplog.text
    assert metrics_of(run_folder) == [r for r in metrics_of(whole) if r["step"] != lost["step"]]
    assert_same_checkpoint(newest(whole), newest(run_folder))


@pytest.mark.parametrize("garbage", [b"\xff\xfe,", b"1,2", b"x,0.1,0,0,3,END_TOKEN,1.0"], ids=repr)
def test_a_damaged_row_costs_itself_and_a_word(garbage, run_folder, whole, cache, caplog):
    damage(run_folder / "responses.csv", 3, garbage)
    go_on(run_folder, cache)
    assert (run_folder / "responses.csv.damaged").read_bytes() == garbage + b"\n"
    assert "responses.csv: 1 of " in caplog.text
    assert re.search(r"responses\.csv: 1 of \d+ responses are missing \(the first: of step \d\)", caplog.text)
    rows = rows_of(whole / "responses.csv", ("train_s",))
    assert rows_of(run_folder / "responses.csv", ("train_s",)) == [*rows[:1], *rows[2:]]


@pytest.mark.parametrize("file", ["metrics.jsonl", "responses.csv"])
@pytest.mark.parametrize("harm", ["gone", "cut in half", "empty"])
def test_what_a_file_lost_is_counted(file, harm, run_folder, cache, caplog):
    path = run_folder / file
    content = path.read_bytes()
    kept = content[: len(content) // 2].rpartition(b"\n")[0].splitlines() if harm == "cut in half" else []
    if file == "metrics.jsonl":
        steps = sorted({1, 2, 3} - {record["step"] for record in map(json.loads, kept) if "response/ended" in record})
        told = f"the records of {len(steps)} of 3 steps are missing (the first: step {steps[0]})"
    else:
        num = len(content.splitlines()) - 1
        told = f"{num - len(kept[1:])} of {num} responses are missing"
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if harm == "cut in half" else b"")
    go_on(run_folder, cache)
    assert f"{file}: {told}" in caplog.text
    assert read_metrics(run_folder / "metrics.jsonl")[-1]["step"] == 4


def test_an_undamaged_run_goes_on_without_a_word(run_folder, whole, cache, caplog):
    go_on(run_folder, cache)
    assert "missing" not in caplog.text
    assert "cannot be read" not in caplog.text
    assert_same_run(whole, run_folder)
    assert list(run_folder.glob("*.damaged")) == []


@pytest.mark.parametrize("content", [None, b"{", b"[1]", b"\xff"], ids=repr)
def test_a_config_that_cannot_be_read_is_that_of_the_newest_checkpoint(content, run_folder, caplog, capsys):
    config = run_folder / "config.json"
    before = json.loads(config.read_text())
    config.unlink() if content is None else config.write_bytes(content)
    assert main(["resume", str(run_folder), "--run.steps", "4"]) == 0
    assert "it is now that of checkpoint step-00000003" in caplog.text
    after = json.loads(config.read_text())
    assert {**after, "run": 0} == {**before, "run": 0}
    assert capsys.readouterr().out.strip().endswith("step-00000004")


@pytest.mark.parametrize("content", [None, b"", b"\xff"], ids=repr)
def test_without_config_and_checkpoint_there_is_nothing_to_go_on_from(content, run_folder, capsys):
    shutil.rmtree(run_folder / "checkpoints")
    config = run_folder / "config.json"
    config.unlink() if content is None else config.write_bytes(content)
    assert main(["resume", str(run_folder)]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(r"error: resume: got .*config\.json cannot be read.*; expected .*; give its run\.out\n", said)


KINDS = [(name, kind) for name in ("metrics.jsonl", "responses.csv", "config.json") for kind in ("folder", "pipe")]


@pytest.mark.parametrize(("name", "kind"), [*KINDS, ("tensorboard", "file"), ("tensorboard", "pipe")])
def test_a_thing_of_another_kind_in_a_files_place_is_one_line(name, kind, run_folder, cache):
    path = run_folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    {"folder": lambda: (path.mkdir(), (path / "x").touch()), "file": path.touch, "pipe": lambda: os.mkfifo(path)}[kind]()
    if kind == "pipe" and name in ("config.json", "versions.json"):  # written beside and renamed
        go_on(run_folder, cache)
        return
    with pytest.raises(UserError, match=r"^run\.(out|resume): got .*; expected ") as error:
        go_on(run_folder, cache)
    one_line(error)


@pytest.mark.parametrize("name", [MANIFEST, "state.json", "optimisers.pt"])
def test_a_pipe_in_a_checkpoint_is_one_line_and_is_not_waited_for(name, run_folder, cache):
    path = newest(run_folder) / name
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError) as error:
        go_on(run_folder, cache)
    one_line(error, "step-00000003: got what cannot be read (", "it is no regular file", name, "; expected")


@pytest.mark.parametrize("command", ["resume", "report"])
def test_a_pipe_as_config_json_is_not_waited_for(command, tmp_path, capsys):
    os.mkfifo(tmp_path / "config.json")
    assert main([command, str(tmp_path)]) == 2
    assert re.fullmatch(rf"error: {command}: got .*config\.json.*; expected .*\n", capsys.readouterr().err)


def test_a_pipe_as_list_of_references_is_one_line_and_is_not_waited_for(tmp_path):
    config = own_prompts(tmp_path, tmp_path / "run", "bytes")
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "references.json")
    with pytest.raises(UserError) as error:
        train(config)
    one_line(error, "references.json", "a pipe; expected a regular file")


def test_a_report_names_the_line_that_is_no_record(run_folder):
    damage(run_folder / "metrics.jsonl", 2, b"{")
    with pytest.raises(UserError) as error:
        read_metrics(run_folder / "metrics.jsonl")
    one_line(error, "metrics.jsonl, of which line 2 is no record; expected")


@pytest.mark.parametrize("file", ["metrics.jsonl", "responses.csv", "tensorboard"])
def test_a_full_disk_under_a_run_is_one_line(file, run_folder, cache, tmp_path):
    """/dev/full takes no byte."""
    session = Session(build(config_of("held back", run_folder, cache, steps=4, resume=True)))
    full = open("/dev/full", "a" if file != "tensorboard" else "ab")  # noqa: SIM115
    if file == "tensorboard":
        session.files.log._events._writer._writer = full
    else:
        sink = session.files.log if file == "metrics.jsonl" else session.files.responses
        os.dup2(full.fileno(), sink.file.fileno())
        sink.path = Path("/dev/full")  # it is still there
    with pytest.raises(UserError) as error:
        session.train()
    session.close()
    one_line(error, "run.out: got", "No space left on device", "free some space")
    assert newest(run_folder).name == "step-00000003"


# --------------------------------------------------------------------------------------------------------- edited checkpoints


@pytest.mark.parametrize("name", ["model.safetensors", "everything"])
def test_swapped_policy_and_value_folders_are_refused_even_where_the_manifest_fits(name, run_folder, cache):
    folder = newest(run_folder)
    pairs = (
        [(folder / "policy", folder / "value")] if name == "everything" else [(folder / "policy" / name, folder / "value" / name)]
    )
    for one, two in pairs:
        one.rename(folder / "between")
        two.rename(one)
        (folder / "between").rename(two)
    rewrite_manifest(folder)
    with pytest.raises(UserError) as error:
        go_on(run_folder, cache)
    one_line(error, "step-00000003")


def test_optimisers_of_other_shapes_are_refused(run_folder, cache):
    folder = newest(run_folder)
    optimisers = torch.load(folder / "optimisers.pt", weights_only=True)
    state = optimisers["policy"]["state"]
    state[0]["exp_avg"] = state[0]["exp_avg"].T.contiguous()
    torch.save(optimisers, folder / "optimisers.pt")
    rewrite_manifest(folder)
    with pytest.raises(UserError) as error:
        go_on(run_folder, cache)
    one_line(error, "step-00000003", "exp_avg of the policy's optimiser has shape")


def test_a_checkpoint_whose_config_lacks_a_field_of_this_version_is_of_another_version(run_folder, cache):
    """ "Give the same value to go on" would be no remedy: there is none."""
    folder = newest(run_folder)
    state = json.loads((folder / "state.json").read_text())
    del state["config"]["rollout"]["refill"]
    (folder / "state.json").write_text(json.dumps(state))
    rewrite_manifest(folder)
    with pytest.raises(UserError) as error:
        go_on(run_folder, cache)
    one_line(error, "step-00000003: got a config without rollout.refill; expected", "the version of tppo-ref that wrote it")


def test_an_older_checkpoint_is_refused_before_its_config_is(run_folder, capsys):
    """Fields that are gone would be refused one by one, each with a remedy that leads to the next."""
    config = json.loads((run_folder / "config.json").read_text())
    config["advantage"]["length_adaptive_lam"] = False
    (run_folder / "config.json").write_text(json.dumps(config))
    manifest = newest(run_folder) / MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 2, "version": "0.0.9"}))
    assert main(["resume", str(run_folder)]) == 2
    said = capsys.readouterr().err
    assert re.fullmatch(
        rf"error: checkpoint \S+step-00000003: got format 2; expected {FORMAT}; go on with tppo-ref 0\.0\.9, .*\n", said
    )


# What an edit may change without breaking a law: numbers that could have been measured or sampled like that.
COULD_BE = re.compile(r"/(train_s|torch_rng/\d+|score|sample_index)$|/(logprobs|values|versions|token_ids|window_starts)/\d+$"
                      r"|/in_flight/\d+/values$|/verdicts/|/updates_at/|/learners/")  # fmt: skip


def places(thing: object, path: tuple = ()) -> list[tuple]:
    """Paths of everything in nested dicts and lists."""
    inside = thing.items() if isinstance(thing, dict) else enumerate(thing) if isinstance(thing, list) else ()
    return [path, *(p for key, part in inside for p in places(part, (*path, key)))]


def edited(state: dict, path: tuple, edit) -> dict:
    state = copy.deepcopy(state)
    owner = state
    for key in path[:-1]:
        owner = owner[key]
    if edit == "gone":
        del owner[path[-1]]
    else:
        owner[path[-1]] = edit(owner[path[-1]]) if callable(edit) else edit
    return state


EDITS = [
    "gone",
    None,
    -1,
    "x",
    [],
    {},
    10**20,
    float("nan"),
    True,
    lambda old: [old],
    lambda old: old + 1 if isinstance(old, int) else 0,
]


def test_an_edited_state_is_refused_or_could_have_been_written(good, cache):
    """Whatever is edited, with a manifest that fits: one line, or a state that breaks no law and trains on."""
    session = Session(build(config_of("held back", good, cache, steps=9, resume=True)))
    state = json.loads((newest(good) / "state.json").read_text())["trainer"]
    assert state["held"]
    assert state["batcher"]["in_flight"]
    law = checkpoint.broken_law([state], session.trainer, step=3, whole=True)
    assert law == ""
    rng, told, accepted = random.Random(0), Counter(), []
    everywhere = [path for path in places(state) if path and (path[0] != "torch_rng" or path[1:] < (4,))]
    for path in rng.sample(everywhere, 250):
        for edit in EDITS:
            bad = edited(state, path, edit)
            if bad == state:
                continue
            law = checkpoint.broken_law([bad], session.trainer, step=3, whole=True)
            assert "\n" not in law
            told[law.partition(" ")[0]] += 1
            if not law:
                accepted.append("/" + "/".join(map(str, path)))
    session.close()
    assert told.total() > 2000
    assert [path for path in accepted if not COULD_BE.search(path)] == []


@pytest.mark.parametrize(
    ("edit", "law"),
    [
        (lambda s: s["batcher"]["in_flight"].pop(), "other responses than those in flight"),
        (lambda s: s["held"].append(s["held"][0]), "there twice"),
        (lambda s: s["held"].pop(), "responses ended and the value model took or holds"),
        (lambda s: s["batcher"]["stream"].update(next=s["batcher"]["stream"]["next"] + 1), "responses were begun and"),
        (lambda s: s["ledger"]["tokens"].update(trained=s["ledger"]["tokens"]["trained"] - 1), "tokens were generated and"),
        (lambda s: s.update(num_steps=2), "num_steps is 2 after step 3"),
        (lambda s: s["batcher"]["in_flight"][0]["prompt"].update(answer="other"), "answers another prompt"),
        (lambda s: s["batcher"]["in_flight"][0]["token_ids"].__setitem__(0, 10**6), "a token that the model does not know"),
    ],
)  # fmt: skip
def test_a_state_that_loses_or_repeats_a_response_is_refused_by_name(edit, law, run_folder, cache):
    folder = newest(run_folder)
    state = json.loads((folder / "state.json").read_text())
    edit(state["trainer"])
    (folder / "state.json").write_text(json.dumps(state))
    rewrite_manifest(folder)
    with pytest.raises(UserError) as error:
        go_on(run_folder, cache)
    one_line(error, "step-00000003: got a state.json in which", law, "remove this folder")


def test_train_takes_the_folder_for_itself(tmp_path, cache, monkeypatch):
    """The tests above take the lock apart; here is who takes it."""
    seen = []
    monkeypatch.setattr(commands, "build", lambda config: seen.append((tmp_path / "run" / ".lock").read_text()) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        commands.train(config_of("tppo", tmp_path / "run", cache, steps=1))
    assert seen == [f"{os.getpid()}\n"]


# ----------------------------------------------------------------------------------------- evaluate and pretrain-value, alone


@pytest.fixture(name="asked")
def _asked(tmp_path) -> Config:
    """Four responses of a fresh tiny policy, for `evaluate` and `pretrain-value`."""
    fields = {"value.pretrain_responses": 4, "value.pretrain_epochs": 1, "run.eval_prompts": 2, "run.eval_samples": 2}
    (tmp_path / "run").mkdir()
    return replace_fields(own_prompts(tmp_path, tmp_path / "run", "bytes"), fields)


WRITTEN = [("evaluate", "answers.jsonl"), ("evaluate", ".evaluation.json.new"), ("pretrain_value", "responses.jsonl"),
           ("pretrain_value", "explained_variance.csv")]  # fmt: skip


@pytest.mark.parametrize(("command", "file"), WRITTEN)
def test_a_full_disk_under_a_command_is_one_line_and_it_can_be_given_again(command, file, asked, tmp_path):
    (tmp_path / "run" / file).symlink_to("/dev/full")
    with pytest.raises(UserError) as error:
        getattr(commands, command)(asked)
    one_line(error, f"run.out: got {tmp_path / 'run'}, which cannot be written to (No space left on device)", "free some space")
    (tmp_path / "run" / file).unlink()
    getattr(commands, command)(asked)
    assert (tmp_path / "run" / file.removeprefix(".").removesuffix(".new")).stat().st_size


@pytest.mark.parametrize("end", ["full disk", "kill"])
def test_a_value_model_that_was_half_written_is_none(end, asked, tmp_path, monkeypatch):
    """A disk that takes 2,000 bytes more of a file, or a kill between two files; what is left of either is no value model."""
    save, limits = ValueModel.save_pretrained, resource.getrlimit(resource.RLIMIT_FSIZE)

    def half(value, folder):
        if end == "kill":
            Path(folder).mkdir()
            (Path(folder) / "config.json").write_text("{")
            raise KeyboardInterrupt
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            save(value, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(ValueModel, "save_pretrained", half)
    with pytest.raises((UserError, KeyboardInterrupt)) as ended:
        commands.pretrain_value(asked)
    if end == "full disk":
        one_line(ended, "run.out: got", "which cannot be written to", "File too large")
    assert not (tmp_path / "run" / "value").exists()
    monkeypatch.setattr(ValueModel, "save_pretrained", save)
    folder = commands.pretrain_value(asked)
    assert load_value_model(str(folder)) is not None
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if "value" in path.name) == ["value"]


@pytest.mark.parametrize("command", ["evaluate", "pretrain_value"])
def test_a_policy_whose_logits_are_not_finite_is_one_line(command, asked, monkeypatch):
    def broken(*arguments):
        policy = make_policy(*arguments)
        with torch.no_grad():
            policy.hf.get_output_embeddings().weight[3, 0] = torch.nan
        return policy

    monkeypatch.setattr(commands, "make_policy", broken)
    with pytest.raises(NonFiniteError) as error:
        getattr(commands, command)(asked)
    one_line(error, "model.policy: got a model of which response ", "a logit is not finite at response position", "; expected ")
