"""Exact resume: N steps, an end of whatever kind, and N more give bit for bit what 2N steps give. And broken checkpoints."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import one_thread  # noqa: F401  (a fixture)
from safetensors import SafetensorError
from transformers import GenerationConfig

from tppo_ref.loop.parallel import SingleProcess
from tppo_ref.method.errors import UserError
from tppo_ref.rollout.models import load_policy
from tppo_ref.runs.build import base_model, build, end_token_ids, make_task
from tppo_ref.runs.checkpoint import FORMAT, MANIFEST, complete_checkpoints
from tppo_ref.runs.commands import evaluate
from tppo_ref.runs.config import Config, apply_method
from tppo_ref.runs.parsing import get_field, replace_fields
from tppo_ref.runs.resume import resume_point
from tppo_ref.runs.session import Session
from tppo_ref.runs.sinks import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "task.name": "length", "model.warm_start_steps": 2, "model.hidden_size": 16, "model.num_layers": 1, "model.num_heads": 2,
    "rollout.slots": 6, "rollout.window": 8, "rollout.max_response_tokens": 30, "rollout.min_response_tokens": 2,
    "rollout.samples_per_prompt": 2, "advantage.tail_tokens": 2, "policy.mini_batches": 2, "policy.mini_batch_tokens": 0,
    "value.mini_batches": 2, "value.mini_batch_tokens": 0, "policy.lr": 2e-3, "policy.lr_warmup_steps": 3, "value.warmup_steps": 1,
    "run.eval_prompts": 2, "run.eval_every_s": 0.0, "run.checkpoint_every": 0, "run.progress": False, "run.checkpoints_kept": 50,
}  # fmt: skip


def llama(width: int, **fields: object) -> dict[str, object]:
    """A config.json of another architecture than the built-in one."""
    return {"model_type": "llama", "vocab_size": 64, "hidden_size": width, "num_attention_heads": 2, "num_key_value_heads": 2,
            "max_position_embeddings": 64} | fields  # fmt: skip


CASES = {
    "tppo": ("tppo", {}),
    "tppo-defer": ("tppo-defer", {"advantage.tail_tokens": 5}),
    "tppo-ewma": ("tppo-ewma", {}),
    "partial-is": ("partial-is", {}),
    "ppo": ("ppo", {}),
    "bfloat16": ("tppo-ewma", {"model.dtype": "bfloat16", "policy.lr": 1e-5}),
    "critic of another size": (
        "tppo-once",
        {
            "policy.prefix": "constant",
            "model.value": llama(
                8,
                intermediate_size=12,
                num_hidden_layers=2,
                num_attention_heads=1,
                num_key_value_heads=1,
                bos_token_id=None,
                eos_token_id=0,
                pad_token_id=None,
            ),
        },
    ),
    "conversations": (
        "tppo-defer",
        {"task.name": "calculator", "model.warm_start_steps": 30, "rollout.max_response_tokens": 60, "advantage.tail_tokens": 3},
    ),
    # transformers would have a llama end with token 2, which is a digit here
    "policy without an end token": ("tppo", {"model.policy": llama(16, intermediate_size=24, num_hidden_layers=1)}),
    "groups": ("rloo-window", {"rollout.samples_per_prompt": 3, "rollout.slots": 7}),
    "held back": ("tppo", {"value.batch_responses": 7, "policy.epochs": 2}),
}


@dataclasses.dataclass(frozen=True)
class ScaleLike:
    """A config whose run stands in a section, as a cluster's does."""

    algo: Config = dataclasses.field(default_factory=Config)


@pytest.fixture(scope="session", name="cache")
def _cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def config_of(case: str, out: Path, cache: Path, **run: object) -> Config:
    method, changes = CASES[case]
    for field, shape in changes.items():
        if isinstance(shape, dict):  # another architecture's config.json: fresh weights under the run's seed
            file = cache / field / "config.json"
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(shape))
            changes = changes | {field: str(file)}
    fields = TINY | changes | {"run.out": str(out), "run.cache": str(cache)} | {f"run.{k}": v for k, v in run.items()}
    return apply_method(replace_fields(Config(), fields), method, strict=False)


def train(config: Config) -> Path:
    """As `run.train`; whoever comes next in this process gets another torch random state."""
    torch.set_num_threads(1)  # as __main__ does: sums over another number of threads are other sums
    torch.manual_seed(random.randrange(2**31))
    session = Session(build(config))
    try:
        session.train()
        return complete_checkpoints(session.out / "checkpoints")[-1]
    finally:
        session.close()


def arguments(config: Config, path: Path) -> list[str]:
    path.write_text(json.dumps(dataclasses.asdict(config)))
    return ["train", "--config", str(path)]


CLOCKS = ("rollout/tokens_per_s", "rollout/idle_s", "eval/time_s")


def metrics_of(out: Path) -> list[dict]:
    """The records of training steps, without what a clock says."""
    records = [r for r in read_metrics(out / "metrics.jsonl") if "rollout/tokens" in r]
    return [{k: v for k, v in r.items() if not k.startswith("time/") and k not in CLOCKS} for r in records]


def rows_of(path: Path, clocks: tuple[str, ...]) -> list[dict]:
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in clocks} for row in csv.DictReader(file)]


def flat(thing: object, name: str = "") -> dict[str, object]:
    """Leaves of nested dicts and lists, by path."""
    if isinstance(thing, dict):
        return {k: v for key, x in thing.items() for k, v in flat(x, f"{name}/{key}").items()}
    if isinstance(thing, list | tuple):
        return {k: v for i, x in enumerate(thing) for k, v in flat(x, f"{name}/{i}").items()}
    return {name: thing}


def assert_same_checkpoint(one: Path, two: Path) -> None:
    """Bit for bit, but for the clock and the config's words on where and how long."""
    assert one.name == two.name
    files = {str(p.relative_to(one)) for p in one.rglob("*") if p.is_file()}
    assert files == {str(p.relative_to(two)) for p in two.rglob("*") if p.is_file()}
    weights = [name for name in files if name.endswith(".safetensors")]
    assert "policy/model.safetensors" in weights
    for name in weights:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    states = []
    for folder in (one, two):
        state = json.loads((folder / "state.json").read_text())
        assert state["trainer"].pop("train_s") > 0
        assert state["trainer"].pop("torch_rng")  # the loop draws nothing from it, and this file stirs it on purpose
        state.pop("config")
        states.append(state)
    assert states[0] == states[1]
    optimisers = [flat(torch.load(folder / "optimisers.pt", weights_only=True)) for folder in (one, two)]
    assert optimisers[0].keys() == optimisers[1].keys()
    assert len(optimisers[0]) > 20
    for key, a in optimisers[0].items():
        b = optimisers[1][key]
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, key


def assert_same_run(one: Path, two: Path) -> None:
    assert metrics_of(one) == metrics_of(two)
    clocks = ("train_s", "begin_s", "stop_s")
    for table in ("responses.csv", "timeline.csv"):
        assert rows_of(one / table, clocks) == rows_of(two / table, clocks), table


@pytest.mark.parametrize("case", CASES)
def test_N_steps_a_restart_and_the_rest_are_bit_for_bit_one_run(case, tmp_path, cache):
    total = 8
    at = random.Random(case).randint(2, total - 2)
    whole = train(config_of(case, tmp_path / "whole", cache, steps=total))
    half = train(config_of(case, tmp_path / "parts", cache, steps=at))
    state = json.loads((half / "state.json").read_text())
    in_flight = state["trainer"]["batcher"]["in_flight"]
    if case != "ppo":
        assert in_flight
        assert any(r["logprobs"] and r["versions"] for r in in_flight)
    if case == "held back":
        assert state["trainer"]["held"], "nothing was held back at this step: choose another"
    if case == "groups":
        assert state["trainer"]["held_groups"], "no group was held at this step: choose another"
    if case == "tppo-defer":
        assert any(0 < r["num_settled"] < len(r["token_ids"]) for r in in_flight)
    parts = train(config_of(case, tmp_path / "parts", cache, steps=total, resume=True))
    assert_same_checkpoint(whole, parts)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


# ------------------------------------------------------------------------------------------------------------- end tokens


def of_shape(tmp_path: Path, cache: Path, **shape: object) -> Config:
    """A run of one step that begins with a config.json, whose transformers' end token is not the task's."""
    config = config_of("policy without an end token", tmp_path / "run", cache, steps=1)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(Path(config.model.policy).read_text()) | shape))
    return replace_fields(config, {"model.policy": str(file)})


@pytest.mark.parametrize("shape", [{}, {"eos_token_id": 5}, {"eos_token_id": 151643}, {"eos_token_id": [5, 6]}],
                         ids=["the architecture's", "its own", "beyond the vocabulary", "several"])  # fmt: skip
def test_a_checkpoint_names_the_end_tokens_of_its_run_and_no_others(shape, tmp_path, cache):
    """For a resume, and for whoever evaluates it or starts from it."""
    config = of_shape(tmp_path, cache, **shape)
    task = make_task(config)
    checkpoint = train(config)
    assert end_token_ids(task, str(checkpoint / "policy")) == end_token_ids(task, config.model.policy) == (task.end_token_id,)
    evaluation = replace_fields(config, {"model.policy": str(checkpoint / "policy"), "run.out": str(tmp_path / "evaluation")})
    (last,) = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval/accuracy" in r and r["step"] == 1]
    measured = {name: x for name, x in evaluate(evaluation).items() if name not in CLOCKS}
    assert measured.items() <= last.items()


def test_the_tokens_that_end_a_turn_and_those_that_a_folder_names_are_named_by_its_checkpoint(tmp_path, cache):
    config = config_of("conversations", tmp_path / "run", cache, steps=1)
    task = make_task(config)
    source = tmp_path / "instruct"
    shutil.copytree(base_model(config, task), source)
    (source / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    checkpoint = train(replace_fields(config, {"model.policy": str(source)}))
    own = (task.end_token_id, *task.turn_end_token_ids)
    assert end_token_ids(task, str(source)) == end_token_ids(task, str(checkpoint / "policy")) == (*own, 7, 8)


@pytest.mark.parametrize(
    ("began_with", "goes_on_with"), [("config.json", (10,)), ("folder", (10, 9)), ("a folder that is gone", (10, 5))]
)
def test_a_run_whose_checkpoint_names_what_transformers_made_up_goes_on_with_what_it_began_with(
    began_with, goes_on_with, tmp_path, cache
):
    """Checkpoints were written so, of the model's config.json. Where nothing else is left, what they say holds."""
    config = of_shape(tmp_path, cache, eos_token_id=5)
    source = tmp_path / "instruct"
    if began_with != "config.json":
        load_policy(config.model.policy).save_pretrained(source)
        (source / "generation_config.json").write_text('{"eos_token_id": 9}')
        config = replace_fields(config, {"model.policy": str(source)})
    checkpoint = train(config)
    GenerationConfig.from_model_config(load_policy(str(checkpoint / "policy")).hf.config).save_pretrained(checkpoint / "policy")
    rewrite_manifest(checkpoint)
    task = make_task(config)
    assert end_token_ids(task, str(checkpoint / "policy")) == (10, 5)
    if began_with == "a folder that is gone":
        shutil.rmtree(source)
    for steps in (2, 3):
        resumed = train(replace_fields(config, {"run.resume": True, "run.steps": steps}))
        assert end_token_ids(task, str(resumed / "policy")) == goes_on_with


# ------------------------------------------------------------------------------------------------------------- evaluations

WRITTEN = ("metrics.jsonl", "responses.csv", "timeline.csv", "decode.csv", "eval_decode.csv")


def evaluations_of(out: Path) -> list[int]:
    return [record["step"] for record in read_metrics(out / "metrics.jsonl") if "eval/accuracy" in record]


def evaluated_steps(out: Path) -> list[int]:
    """The steps of eval_decode.csv, each as often as its evaluation began."""
    return [int(row["step"]) for row in rows_of(out / "eval_decode.csv", ()) if row["decode_step"] == "0"]


def test_a_finished_run_that_is_resumed_evaluates_nothing_again(tmp_path, cache):
    out = tmp_path / "run"
    train(config_of("tppo", out, cache, steps=2))
    before = {name: (out / name).read_bytes() for name in WRITTEN}
    train(config_of("tppo", out, cache, steps=2, resume=True))
    assert {name: (out / name).read_bytes() for name in WRITTEN} == before
    assert evaluations_of(out) == evaluated_steps(out) == [0, 2]


def test_a_run_that_was_stopped_in_its_first_evaluation_has_it_once(tmp_path, cache, monkeypatch):
    """Ctrl-C there leaves a checkpoint of step 0, and an evaluation."""
    out, real = tmp_path / "run", Session.evaluate

    def stopped(session: Session) -> None:
        real(session)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Session, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(config_of("tppo", out, cache, steps=2))
    monkeypatch.setattr(Session, "evaluate", real)
    assert [path.name for path in complete_checkpoints(out / "checkpoints")] == ["step-00000000"]
    resumed = train(config_of("tppo", out, cache, steps=2, resume=True))
    assert evaluations_of(out) == evaluated_steps(out) == [0, 2]
    assert_same_checkpoint(train(config_of("tppo", tmp_path / "whole", cache, steps=2)), resumed)
    assert_same_run(tmp_path / "whole", out)


def test_an_evaluation_of_which_there_is_no_record_is_made_by_the_resume(tmp_path, cache):
    """Killed between the last checkpoint and its evaluation: that there are earlier ones is no reason to leave it out."""
    out = tmp_path / "run"
    train(config_of("tppo", out, cache, steps=2))
    of_the_second = {"metrics.jsonl": r'{"step": 2, "eval/.*\n', "eval_decode.csv": r"2,.*\r\n"}
    for name, lines in of_the_second.items():
        text, gone = re.subn(f"(?m)^{lines}", "", (out / name).read_bytes().decode())
        assert gone
        (out / name).write_bytes(text.encode())
    assert evaluations_of(out) == [0]
    train(config_of("tppo", out, cache, steps=2, resume=True))
    assert evaluations_of(out) == evaluated_steps(out) == [0, 2]


@pytest.mark.parametrize("first", [True, False])
def test_every_rank_is_told_of_the_evaluation_that_the_first_one_has_on_record(first, tmp_path, cache):
    """Else one would evaluate, and wait for the others for ever."""

    class Ranks(SingleProcess):
        @property
        def first(self) -> bool:
            return first

        def max(self, numbers):
            return [max(number, 2.0) for number in numbers]  # as the first rank says

    out = tmp_path / "run"
    train(config_of("tppo", out, cache, steps=2))
    parts = build(config_of("tppo", out, cache, steps=2, resume=True))
    session = Session(dataclasses.replace(parts, parallel=Ranks()))
    session.close()
    assert session.evaluated_at == 2
    assert math.isnan(session.accuracy) != first


def test_pieces_and_limits_may_change_with_a_restart_and_what_is_computed_may_not(tmp_path, cache):
    """What an engineer is told to do where memory runs out: the run goes on as it would have, but for rounding."""
    train(config_of("tppo", tmp_path / "whole", cache, steps=4))
    train(config_of("tppo", tmp_path / "parts", cache, steps=3))
    on = config_of("tppo", tmp_path / "parts", cache, steps=4, resume=True)
    for field, value in (("policy.lr", 1e-3), ("value.lr", 1e-4), ("rollout.window", 9), ("policy.importance", "truncated")):
        with pytest.raises(UserError, match=rf"^{field}: got {value}; expected .* give the same value to go on$"):
            train(replace_fields(on, {field: value}))
    pieces = {"policy.micro_batch_tokens": 40, "value.micro_batch_tokens": 40, "model.logit_chunk_tokens": 8,
              "policy.engine_gap_limit": 0.5, "task.verifier_workers": 3}  # fmt: skip
    assert all(get_field(on, field) != value for field, value in pieces.items())
    train(replace_fields(on, pieces))
    whole, parts = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "parts")
    assert whole[:3] == parts[:3]
    for name, value in whole[3].items():  # the first step after the restart: its window was sampled by the same weights
        assert parts[3][name] == (value if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)), name


def test_a_resumed_run_goes_on_counting_failed_verifications(tmp_path, cache):
    """verify/timeouts and verify/errors are sums over the run (the glossary): a restart does not forget them."""

    broken = "statistics:mean"  # importable, and raises on (answer, ids, text)

    def of(out: str, **run: object) -> Config:
        return replace_fields(config_of("tppo", tmp_path / out, cache, **run), {"task.verifier": broken})

    train(of("whole", steps=6))
    train(of("parts", steps=3))
    train(of("parts", steps=6, resume=True))
    whole, parts = metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "parts")
    assert whole[2]["verify/errors"] > 0
    assert [m["verify/errors"] for m in parts] == [m["verify/errors"] for m in whole]


def test_a_kill_9_in_the_middle_loses_nothing_that_a_checkpoint_held(tmp_path, cache):
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "tppo_ref",
        *arguments(config_of("tppo", out, cache, steps=10**6, checkpoint_every=2), tmp_path / "c.json"),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while len(complete_checkpoints(out / "checkpoints")) < 3:
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline, "no checkpoint within two minutes"
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()
    last = int(complete_checkpoints(out / "checkpoints")[-1].name[5:])
    resumed = train(config_of("tppo", out, cache, steps=last + 3, resume=True))
    whole = train(config_of("tppo", tmp_path / "whole", cache, steps=last + 3))
    assert_same_checkpoint(whole, resumed)
    assert_same_run(tmp_path / "whole", out)
    assert not list((out / "checkpoints").glob(".unfinished-*"))


@pytest.mark.parametrize("torn", ["9", "9999,0.5", "4", "", '4,"'])
def test_a_table_whose_last_line_a_kill_cut_off_is_whole_again_after_the_resume(torn, tmp_path, cache):
    """A row of step 4x, of which only the first figure reached the disk, is no row of step 4."""
    from tppo_ref.runs.sinks import Table

    path = tmp_path / "t.csv"
    table = Table(path, ("step", "tokens", "end"))
    table.write([(1, 10, "END_TOKEN"), (4, 12, "LENGTH_CAP"), (41, 3, "END_TOKEN")])
    table.close()
    path.write_text(path.read_text() + torn)
    table = Table(path, ("step", "tokens", "end"), resume_step=40)
    table.write([(41, 5, "END_TOKEN")])
    table.close()
    with path.open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["step", "tokens", "end"],
            ["1", "10", "END_TOKEN"],
            ["4", "12", "LENGTH_CAP"],
            ["41", "5", "END_TOKEN"],
        ]


# ------------------------------------------------------------------------------------------------------ broken checkpoints


@pytest.fixture(scope="module", name="good")
def _good(tmp_path_factory, cache) -> Path:
    """A run of two steps with a checkpoint of each."""
    out = tmp_path_factory.mktemp("run") / "good"
    train(config_of("tppo", out, cache, steps=2, checkpoint_every=1))
    assert [p.name for p in complete_checkpoints(out / "checkpoints")] == ["step-00000001", "step-00000002"]
    return out


@pytest.fixture(name="run_folder")
def _run_folder(good, tmp_path) -> Path:
    shutil.copytree(good, tmp_path / "run")
    return tmp_path / "run"


def resume(out: Path, cache: Path, steps: int = 3) -> Path:
    return train(config_of("tppo", out, cache, steps=steps, resume=True))


def rewrite_manifest(folder: Path) -> None:
    """As if the files had been written like that."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST]
    digests = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "sha256": digests}))


def one_line(error: pytest.ExceptionInfo, *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_a_checkpoint_without_its_manifest_or_name_is_never_picked_up(run_folder, cache, tmp_path):
    checkpoints = run_folder / "checkpoints"
    good = checkpoints / "step-00000002"
    shutil.copytree(good, checkpoints / ".unfinished-step-00000007-123")  # killed before the rename
    shutil.copytree(good, checkpoints / "step-00000009")
    (checkpoints / "step-00000009" / MANIFEST).unlink()  # killed before the manifest
    (checkpoints / "step-00000011").mkdir()
    assert complete_checkpoints(checkpoints)[-1] == good
    resumed = resume(run_folder, cache)
    assert resumed.name == "step-00000003"
    whole = train(config_of("tppo", tmp_path / "whole", cache, steps=3))
    assert_same_checkpoint(whole, resumed)


def test_a_resume_with_another_model_says_that_it_is_not_read_and_goes_on_from_the_checkpoint(run_folder, cache, tmp_path, caplog):
    """A run that began without the pre-trained value model does not get it by a resume."""
    shutil.copytree(run_folder, tmp_path / "same")
    same = config_of("tppo", tmp_path / "same", cache, steps=3, resume=True)
    other = replace_fields(same, {"run.out": str(run_folder), "model.value": "runs/pretrained/value"})
    assert_same_checkpoint(train(same), train(other))
    (told,) = (r.getMessage() for r in caplog.records if "which is not read" in r.getMessage())
    assert told.startswith("model.value: got runs/pretrained/value, which is not read; expected None, with which the run began: ")
    assert "step-00000002" in told


def test_of_several_ranks_one_tells_of_a_model_that_is_not_read(caplog):
    config = replace_fields(ScaleLike(), {"algo.model.policy": "models/B"})
    saved = {"config": {"algo": {"model": {"policy": "models/A", "value": None}}}, "prompts": {}}
    point = SimpleNamespace(complete=lambda: [Path("step-00000004")], saved=lambda _: saved, prompts={}, folder=Path())
    for tell in (False, True):
        assert resume_point(point, config, resume=True, fixed=(), section="algo.", tell=tell) == Path("step-00000004")
        assert [r.getMessage().partition(":")[0] for r in caplog.records] == ["algo.model.policy"] * tell


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("harm", [flip, truncate, Path.unlink, lambda path: path.write_bytes(b"")],
                         ids=["flipped byte", "truncated", "missing", "empty"])  # fmt: skip
@pytest.mark.parametrize(
    "name", ["policy/model.safetensors", "value/model.safetensors", "optimisers.pt", "state.json", "policy/config.json"]
)
def test_a_file_that_is_not_as_it_was_written_is_one_line_that_names_the_checkpoint(name, harm, run_folder, cache):
    newest = run_folder / "checkpoints" / "step-00000002"
    harm(newest / name)
    with pytest.raises(UserError) as error:
        resume(run_folder, cache)
    one_line(error, "step-00000002", name)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"x"', '{"state.json": 3}'])
def test_a_manifest_that_is_garbage_is_one_line_that_names_the_checkpoint(content, run_folder, cache):
    (run_folder / "checkpoints" / "step-00000002" / MANIFEST).write_text(content)
    with pytest.raises(UserError) as error:
        resume(run_folder, cache)
    one_line(error, "step-00000002")


def test_a_checkpoint_of_another_format_is_one_line_with_the_remedy(run_folder, cache):
    """Not the remedy of a broken one: all the checkpoints before it are of that format, too."""
    newest = run_folder / "checkpoints" / "step-00000002"
    digests = json.loads((newest / MANIFEST).read_text())["sha256"]
    for manifest, number in ((digests, 1), ({"format": FORMAT + 1, "sha256": digests}, FORMAT + 1)):  # 1 had no number
        (newest / MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(UserError) as error:
            resume(run_folder, cache)
        one_line(error, "step-00000002", f"got format {number}; expected {FORMAT};", "another run.out")
        assert "remove" not in str(error.value)


@pytest.mark.parametrize("content", ["garbage", "{}", "[]", "null", '{"config": {}}', '{"config": {}, "trainer": {}}'])
def test_a_state_that_is_garbage_is_one_line_even_where_the_manifest_fits(content, run_folder, cache):
    newest = run_folder / "checkpoints" / "step-00000002"
    (newest / "state.json").write_text(content)
    rewrite_manifest(newest)
    with pytest.raises(UserError) as error:
        resume(run_folder, cache)
    one_line(error, "step-00000002")


class Payload:
    """Runs code where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("form", ["torch", "plain pickle"])
def test_a_pickle_payload_in_the_optimisers_is_refused_and_not_run(form, run_folder, cache, tmp_path):
    newest, mark = run_folder / "checkpoints" / "step-00000002", tmp_path / "was-run"
    if form == "torch":
        torch.save({"policy": Payload(mark)}, newest / "optimisers.pt")
    else:
        (newest / "optimisers.pt").write_bytes(pickle.dumps(Payload(mark)))
    rewrite_manifest(newest)
    try:
        with pytest.raises(UserError) as error:
            resume(run_folder, cache)
    finally:
        assert not mark.exists(), "loading a checkpoint ran its code"
    one_line(error, "step-00000002")


def test_removing_the_broken_one_goes_on_from_the_one_before(run_folder, cache, tmp_path):
    """The remedy that the message gives."""
    broken = run_folder / "checkpoints" / "step-00000002"
    flip(broken / "state.json")
    with pytest.raises(UserError):
        resume(run_folder, cache)
    shutil.rmtree(broken)
    whole = train(config_of("tppo", tmp_path / "whole", cache, steps=3))
    assert_same_checkpoint(whole, resume(run_folder, cache))
    assert_same_run(tmp_path / "whole", run_folder)


def test_only_the_newest_checkpoints_are_kept_and_saving_the_same_step_again_keeps_it_good(tmp_path, cache):
    out = tmp_path / "run"
    train(config_of("tppo", out, cache, steps=4, checkpoint_every=1, checkpoints_kept=2))
    assert [p.name for p in complete_checkpoints(out / "checkpoints")] == ["step-00000003", "step-00000004"]
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


def test_a_number_that_is_not_finite_stops_and_names_the_last_good_checkpoint(tmp_path, cache):
    out = tmp_path / "run"
    session = Session(build(config_of("tppo", out, cache, steps=9, checkpoint_every=1)))
    real = session.trainer.step

    def step():
        if session.trainer.num_steps == 2:
            with torch.no_grad():
                next(session.trainer.value_learner.module.parameters())[:] = math.nan
        return real()

    session.trainer.step = step
    try:
        with pytest.raises(UserError) as error:
            session.train()
    finally:
        session.close()
    one_line(error, "step 3", "value", "step-00000002")
    assert [p.name for p in complete_checkpoints(out / "checkpoints")][-1] == "step-00000002"
    train(config_of("tppo", out, cache, steps=3, resume=True))


def test_weights_that_an_update_spoilt_are_not_saved_and_the_checkpoint_before_stays(tmp_path, cache):
    out = tmp_path / "run"
    session = Session(build(config_of("tppo", out, cache, steps=9, checkpoint_every=0)))
    try:
        session.trainer.step()
        good = session.save()
        with torch.no_grad():
            next(session.trainer.policy_learner.module.parameters())[0, 0] = math.inf
        session.trainer.num_steps += 1
        with pytest.raises(UserError) as error:
            session.save()
    finally:
        session.close()
    one_line(error, "step 2", "policy", "not finite")
    assert complete_checkpoints(out / "checkpoints") == [good]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("write failed"), SafetensorError("I/O")])
def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before_and_no_remains(failure, tmp_path, cache, monkeypatch):
    out = tmp_path / "run"
    session = Session(build(config_of("tppo", out, cache, steps=9, checkpoint_every=0)))
    try:
        session.trainer.step()
        good = session.save()
        session.trainer.step()
        monkeypatch.setattr(session.trainer.value_learner.module, "save_pretrained", lambda folder: (_ for _ in ()).throw(failure))
        with pytest.raises(UserError) as error:
            session.save()
    finally:
        session.close()
    one_line(error, "step-00000002", "cannot be written")
    assert [path for path in (out / "checkpoints").iterdir()] == [good]


def test_the_saved_models_load_with_plain_transformers(good):
    from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

    newest = good / "checkpoints" / "step-00000002"
    policy = AutoModelForCausalLM.from_pretrained(newest / "policy", local_files_only=True)
    value = AutoModelForTokenClassification.from_pretrained(newest / "value", local_files_only=True)
    assert policy.config.hidden_size == 16
    assert value.config.num_labels == 1
    assert torch.isfinite(policy(input_ids=torch.tensor([[1, 2, 3]])).logits).all()
