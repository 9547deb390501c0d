"""Prompts for scale/: jsonl, parquet, long prompts, the Hub without a network."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging

import pytest
from scale_helpers import shared_data

from scale.config import ScaleConfig
from scale.data import make_task
from tppo_ref.method.errors import UserError
from tppo_ref.runs.parsing import replace_fields


def config_for(path, *, over_long="skip", instruction="", **task):
    fields = {f"algo.task.{name}": value for name, value in ({"tokenizer": "bytes", "path": str(path)} | task).items()}
    config = replace_fields(ScaleConfig(), {"data.over_long": over_long, "data.instruction": instruction})
    return dataclasses.replace(
        config, algo=replace_fields(config.algo, {name.removeprefix("algo."): v for name, v in fields.items()})
    )


def write(file, texts, key="question"):
    file.write_text("".join(json.dumps({key: text, "answer": f"#### {i}"}) + "\n" for i, text in enumerate(texts)))
    return file


@pytest.mark.parametrize("key", ["prompt", "question", "problem"])
def test_each_name_of_the_prompt_is_understood(tmp_path, key):
    task = make_task(config_for(write(tmp_path / "a.jsonl", ["one", "two", "three"], key)))
    assert task.describe(task.prompts("train")[0].token_ids) == "one"
    assert [p.answer for p in (*task.prompts("train"), *task.prompts("test"))] == ["#### 0", "#### 1", "#### 2"]


def test_long_prompts_are_left_out_and_counted_and_told(tmp_path, caplog):
    file = write(tmp_path / "a.jsonl", ["short", "x" * 50, "brief", "y" * 31, "z" * 30])
    with caplog.at_level(logging.WARNING, logger="scale"):
        task = make_task(config_for(file, max_prompt_tokens=30))
    prompts = [*task.prompts("train"), *task.prompts("test")]
    assert [task.describe(p.token_ids) for p in prompts] == ["short", "brief", "z" * 30]
    assert [p.answer for p in prompts] == ["#### 0", "#### 2", "#### 4"], "an answer went to another prompt"
    assert task.num_skipped == 2
    assert "2 of 5" in caplog.text
    assert "30" in caplog.text


def test_ids_stay_unique_and_dense_behind_a_gap(tmp_path):
    train = write(tmp_path / "a.jsonl", ["short", "x" * 50, "brief"])
    test = write(tmp_path / "b.jsonl", ["y" * 50, "test"])
    task = make_task(config_for(train, eval_path=str(test), max_prompt_tokens=30))
    assert [p.id for p in (*task.prompts("train"), *task.prompts("test"))] == [0, 1, 2]
    assert task.num_skipped == 2


def test_long_prompts_may_be_an_error_that_names_the_line(tmp_path):
    file = write(tmp_path / "a.jsonl", ["short", "x" * 50, "brief"])
    with pytest.raises(UserError, match=r"a\.jsonl:2.*50.*30"):
        make_task(config_for(file, over_long="error", max_prompt_tokens=30))


def test_nothing_but_long_prompts_is_an_error(tmp_path):
    with pytest.raises(UserError, match="got no prompt of at most 30 tokens; expected one"):
        make_task(config_for(write(tmp_path / "a.jsonl", ["x" * 50, "y" * 60]), max_prompt_tokens=30))


def test_the_instruction_stands_behind_each_prompt_and_counts_to_its_length(tmp_path):
    file = write(tmp_path / "a.jsonl", ["one", "two and more"])
    task = make_task(config_for(file, instruction=" Box it.", eval_path=str(file)))
    assert task.describe(task.prompts("test")[1].token_ids) == "two and more Box it."
    assert make_task(config_for(file, instruction=" Box it.", max_prompt_tokens=12, eval_path=str(file))).num_skipped == 2


@pytest.mark.parametrize("content", ["", "\n\n", "{\n", '{"question": 3, "answer": "4"}\n', '{"question": "a"}\n', "\x00\xff"])
def test_a_broken_file_is_one_line_that_names_it(tmp_path, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"a\.jsonl") as caught:
        make_task(config_for(tmp_path / "a.jsonl"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["nowhere.jsonl", "./no/such/file", "/no/such.parquet", "one/two/three"])
def test_a_path_that_is_nothing_is_one_line(path):
    with pytest.raises(UserError) as caught:
        make_task(config_for(path))
    assert "\n" not in str(caught.value)
    assert path.removeprefix("./") in str(caught.value)


def test_a_hub_name_without_a_network_is_one_line_that_names_it(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="nobody/nothing") as caught:
        make_task(config_for("nobody/nothing:main/train"))
    assert "\n" not in str(caught.value)


def test_a_hub_split_is_read_from_the_files_of_its_folder(monkeypatch, tmp_path):
    """The client is replaced by a folder as it leaves one."""
    import huggingface_hub

    for folder in ("main", "socratic"):
        (tmp_path / folder).mkdir()
    write(tmp_path / "main/train-00000.jsonl", ["one", "two"])
    write(tmp_path / "main/train-00001.jsonl", ["three"])
    write(tmp_path / "main/test-00000.jsonl", ["never"])
    write(tmp_path / "socratic/train-00000.jsonl", ["of another configuration"])

    def snapshot_download(name, *, repo_type, allow_patterns):
        assert (repo_type, set(allow_patterns)) == ("dataset", {"*.parquet", "*.jsonl"})  # no model, and nothing but tables
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    task = make_task(config_for("some/set:main/train"))
    assert [task.describe(p.token_ids) for p in (*task.prompts("train"), *task.prompts("test"))] == ["one", "two", "three"]
    write(tmp_path / "train-00000.jsonl", ["of the set", "itself"])
    task = make_task(config_for("some/set"))  # no split is named: train
    assert [task.describe(p.token_ids) for p in (*task.prompts("train"), *task.prompts("test"))] == ["of the set", "itself"]
    with pytest.raises(UserError, match="validation"):
        make_task(config_for("some/set:main/validation"))


def test_parquet_gives_what_jsonl_gives(tmp_path):
    if importlib.util.find_spec("pyarrow") is None:
        pytest.skip("pyarrow is not installed: nothing here can write a parquet file")
    import pyarrow
    import pyarrow.parquet

    texts = ["one", "x" * 50, "three", "four"]
    plain = write(tmp_path / "a.jsonl", texts)
    table = pyarrow.table({"question": texts, "answer": [f"#### {i}" for i in range(4)], "unused": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    one, two = (make_task(config_for(file, max_prompt_tokens=30)) for file in (plain, tmp_path / "a.parquet"))
    assert one.prompts("train") == two.prompts("train")
    assert one.prompts("test") == two.prompts("test")
    assert two.num_skipped == 1
    (tmp_path / "a.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"a\.parquet"):
        make_task(config_for(tmp_path / "a.parquet"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="pyarrow"):
        make_task(config_for(tmp_path / "a.parquet"))


def test_the_shared_problems_are_read_whole():
    folder = shared_data()
    if folder is None:
        pytest.skip("no shared data beside the repository (set TPPO_SHARED_DATA)")
    for name in ("gsm8k_test.jsonl", "aime24.jsonl"):
        lines = (folder / name).read_text().splitlines()
        task = make_task(config_for(folder / name, eval_path=str(folder / name), max_prompt_tokens=100_000))
        assert len(task.prompts("train")) == len(lines)
        assert task.num_skipped == 0
