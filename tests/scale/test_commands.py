"""The commands beside training: whose folder they write to, what they refuse before anything takes long, what an export holds."""

from __future__ import annotations

import json
import math
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from scale_helpers import make_model, make_problems

from scale import build, checkpoint, commands
from scale.checkpoint import PIECES, WHOLE_BYTES, export, shard_digest
from scale.config import ScaleConfig
from scale.data import make_task
from scale.distributed import Collective, World
from scale.evaluate import GLOSSARY, accuracy_metrics
from tppo_ref.method.errors import UserError
from tppo_ref.method.records import Prompt, Response
from tppo_ref.rollout.models import PolicyModel, load_policy
from tppo_ref.runs.build import end_token_ids
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.run_folder import own_folder
from tppo_ref.tasks.jsonl import load_tokenizer


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """One rank, without a process group."""
    monkeypatch.setattr(Collective, "gather_objects", lambda self, thing: [thing])
    monkeypatch.setattr(checkpoint.dist, "all_gather_object", lambda things, thing: things.__setitem__(0, thing))


def config_of(tmp_path, policy, **fields) -> ScaleConfig:
    return replace_fields(ScaleConfig(), {
        "algo.run.out": str(tmp_path / "out"), "algo.model.policy": str(policy), "algo.task.tokenizer": "bytes",
        "algo.task.path": str(make_problems(tmp_path / "problems.jsonl")), "engine.kind": "torch", **fields,
    })  # fmt: skip


@pytest.fixture
def long_work(monkeypatch):
    """Fails where an engine is started."""
    monkeypatch.setattr(commands, "build_engine", lambda *_: pytest.fail("an engine was started"))


@pytest.mark.parametrize("command", ["evaluate", "pretrain_value"])
def test_a_folder_to_which_a_run_is_writing_is_refused(command, tmp_path, model, long_work):
    with own_folder(str(tmp_path / "out")), pytest.raises(UserError) as error:
        getattr(commands, command)(config_of(tmp_path, model), World())
    assert str(error.value).startswith(f"algo.run.out: got {tmp_path / 'out'}, to which process {os.getpid()} is writing; expected")


@pytest.mark.parametrize("command", ["evaluate", "pretrain_value", "train"])
def test_a_device_with_less_memory_than_the_config_says_is_refused_before_an_engine_starts(
    command, tmp_path, model, long_work, monkeypatch
):
    """The engine's cache is reckoned from cluster.device_bytes, whatever it decodes for."""
    device = SimpleNamespace(name="Stand-in", total_memory=79e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda which: device)
    monkeypatch.setattr(build, "build_engine", lambda *_: pytest.fail("an engine was started"))
    with pytest.raises(UserError, match=r"^cluster\.device_bytes: got 8e\+10; expected at most what Stand-in has, 7.9e\+10"):
        getattr(commands, command)(config_of(tmp_path, model), World(device="cuda:0"))


@pytest.mark.parametrize("command", ["evaluate", "pretrain_value"])
def test_a_policy_with_fewer_tokens_than_the_tokenizer_is_refused_before_an_engine_starts(command, tmp_path, long_work):
    small = make_model(tmp_path / "small", tied=True, vocab=100, end=1)
    with pytest.raises(UserError, match=r"^algo\.model\.policy: got .*small with a vocabulary of 100 tokens; expected the 260 of"):
        getattr(commands, command)(config_of(tmp_path, small), World())


def test_a_value_model_with_fewer_tokens_is_refused_before_an_engine_starts(tmp_path, model, long_work):
    small = make_model(tmp_path / "small", tied=True, vocab=100, end=1)
    with pytest.raises(UserError, match=r"^algo\.model\.value: got .*small with a vocabulary of 100 tokens; expected the 260 of"):
        commands.pretrain_value(config_of(tmp_path, model, **{"algo.model.value": str(small)}), World())


def test_an_export_holds_the_tokenizer_that_the_task_reads_with(tmp_path, model):
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<end>": 0, "?": 1, "sum": 2}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
    export(load_policy(str(model)), tmp_path / "export", World(), dtype=torch.float32, tokenizer=tokenizer)
    assert load_tokenizer(str(tmp_path / "export")).get_vocab() == {"<end>": 0, "?": 1, "sum": 2}
    assert (tmp_path / "export" / "model.safetensors").is_file()


@pytest.mark.parametrize("source", ["config.json", "folder"])
def test_an_export_names_the_end_tokens_of_its_run_and_no_others(source, tmp_path, model, monkeypatch):
    """The model's config.json names token 302, which ends no response of a run; a folder's generation_config.json two that do."""
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 302}))
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [300, 301]}')
    policy = tmp_path / "model" / ("config.json" if source == "config.json" else "")
    config = config_of(tmp_path, policy)

    def whole(kind, source, world, sharding, *, seed, weights, sync_dtype, **options):
        assert kind is PolicyModel
        return load_policy(source, seed=seed, **options)

    monkeypatch.setattr(build, "load_sharded", whole)
    task = make_task(config)
    export(build.build_policy(config, World(), task), tmp_path / "export", World(), dtype=torch.float32)
    expected = (task.end_token_id, *([300, 301] if source == "folder" else []))
    assert end_token_ids(task, str(policy)) == end_token_ids(task, str(tmp_path / "export")) == expected


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_alone_tells_of_a_model_that_a_resume_does_not_read(rank, tmp_path, model, monkeypatch):
    class Asked(Exception):
        pass

    def point(*_, tell, **__):
        raise Asked(tell)

    monkeypatch.setattr(build, "DistributedCheckpointer", lambda *_: SimpleNamespace(complete=list))
    monkeypatch.setattr(build, "resume_point", point)
    with pytest.raises(Asked) as asked:
        build.build(config_of(tmp_path, model), World(rank=rank, world=2))
    assert asked.value.args == (rank == 0,)


# ------------------------------------------------------------------------------------------------------------ avg@k and pass@k


def answers_to(*scores):
    """Responses with these scores, a list of them to each prompt."""
    return [Response(id=10 * i + j, prompt=Prompt(id=i, token_ids=(1,), answer=""), sample_index=j, score=score)
            for i, of_prompt in enumerate(scores) for j, score in enumerate(of_prompt)]  # fmt: skip


def test_an_evaluation_counts_answers_and_prompts_under_the_names_of_the_glossary():
    """Three prompts of four answers: all right, one right, none; 5 of 12 answers, 2 of 3 prompts."""
    found = accuracy_metrics(answers_to([1.0] * 4, [-1.0, 1.0, -1.0, -1.0], [-1.0] * 4))
    assert found.keys() == GLOSSARY.keys()
    assert (found["eval/k"], found["eval/avg_at_k"], found["eval/pass_at_k"]) == (4, 5 / 12, 2 / 3)
    assert found["eval/avg_at_k_low"] < 5 / 12 < found["eval/avg_at_k_high"]
    alone = accuracy_metrics(answers_to([1.0, -1.0]))
    assert (alone["eval/avg_at_k"], alone["eval/pass_at_k"]) == (0.5, 1)
    assert math.isnan(alone["eval/pass_at_k_low"])


# --------------------------------------------------------------------------------------------------------- digests of shards


@pytest.mark.parametrize("at", [0, WHOLE_BYTES // 2, WHOLE_BYTES - 1])
def test_a_byte_of_a_shard_that_is_read_whole_changes_its_digest(at, tmp_path):
    file = tmp_path / "shard"
    file.write_bytes(bytes(WHOLE_BYTES))
    before = shard_digest(file)
    with file.open("r+b") as opened:
        opened.seek(at)
        opened.write(b"\1")
    assert shard_digest(file) != before


def test_of_a_larger_shard_beginning_end_size_and_pieces_between_count(tmp_path):
    """A hole of a whole piece's distance is seen wherever it lies; a byte between two pieces is not."""
    file, size, piece = tmp_path / "shard", 3 * WHOLE_BYTES, WHOLE_BYTES // PIECES
    file.write_bytes(b"\1" * size)
    before = shard_digest(file)

    def with_zeros(begin: int, length: int) -> str:
        other = tmp_path / "other"
        shutil.copy(file, other)
        with other.open("r+b") as opened:
            opened.seek(begin)
            opened.write(bytes(length))
        return shard_digest(other)

    assert before not in {with_zeros(0, 1), with_zeros(size - 1, 1)}
    distance = (size - piece) // (PIECES - 1)
    assert all(with_zeros(begin, distance) != before for begin in range(piece, size - distance, 7 * distance // 2))
    assert with_zeros(piece + 1, 1) == before
    with file.open("ab") as opened:
        opened.write(b"\1")
    assert shard_digest(file) != before


def test_a_shard_with_another_byte_is_refused(tmp_path):
    folder = tmp_path / "step-00000002"
    (folder / "shards").mkdir(parents=True)
    shard = folder / "shards" / "__0_0.distcp"
    shard.write_bytes(bytes(100))
    checkpoint.write_manifest(folder, ScaleConfig(), World(), {"train": "a", "test": "b"}, (1,))
    assert json.loads((folder / "manifest.json").read_text())["shards"].keys() == {"shards/__0_0.distcp"}
    checkpoint.read_manifest(folder)
    shard.write_bytes(bytes(99) + b"\1")
    with pytest.raises(UserError, match=r"got another shards/__0_0\.distcp; expected what was written; remove this folder"):
        checkpoint.read_manifest(folder)
