"""scale/launch.py under the real torchrun: whole runs, tensor-parallel sizes, a killed rank, users' mistakes, restarts.

torchrun ends a job in which a rank has failed: it sends SIGTERM to the others and prints a report of its own, with a traceback of its
own, around what the job says. A restart is given to other numbers of ranks and other tensor-parallel sizes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest
from scale_helpers import (
    HELD,
    HERE,
    LAUNCH,
    LIMIT_S,
    ROOT,
    arguments,
    check_conservation,
    check_every_response_goes_on,
    check_no_response_twice,
    check_no_sample_skipped,
    check_tokens_kept,
    ended_by,
    environment,
    in_flight,
    make_model,
    metrics_of,
    require,
    responses_of,
    step_of,
    truncate_a_shard,
)

from tppo_ref.runs.checkpoint import complete_checkpoints

require("math_verify", "the verifier of these runs")

MARK = "TPPO_TEST_JOB"  # every process of a job inherits it: torchrun, ranks, verifiers


@dataclasses.dataclass(frozen=True)
class Ended:
    """A job that is over: torchrun's exit code, what was printed, and the processes that outlived it."""

    code: int
    stdout: str
    stderr: str
    left: list[str]


class Torchrun:
    """`torchrun --standalone --nproc-per-node RANKS scale/launch.py ...`, and all processes that come of it. A context: it ends them."""

    def __init__(self, folder: Path, ranks: int, *more: str, env: Mapping[str, str] | None = None):
        self.mark = uuid.uuid4().hex
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = folder / f"stdout-{self.mark}", folder / f"stderr-{self.mark}"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(ranks),
            str(LAUNCH),
            *more,
        ]
        with self.logs[0].open("w") as stdout, self.logs[1].open("w") as stderr:
            self.agent = subprocess.Popen(command, env=environment(**(env or {})) | {MARK: self.mark}, cwd=ROOT, stdout=stdout, stderr=stderr)  # fmt: skip

    def __enter__(self) -> Torchrun:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes():
            process.kill()
        self.agent.wait()

    def processes(self) -> list[psutil.Process]:
        """Whoever carries this job's mark and is alive."""
        alive = []
        for process in psutil.process_iter(["environ", "status"]):
            if (process.info["environ"] or {}).get(MARK) == self.mark and process.info["status"] != psutil.STATUS_ZOMBIE:
                alive.append(process)
        return alive

    def rank(self, rank: int) -> psutil.Process:
        """The process that is this rank, not torchrun's and not a verifier."""
        (found,) = (p for p in psutil.Process(self.agent.pid).children() if p.environ().get("RANK") == str(rank))
        return found

    def stderr(self) -> str:
        return self.logs[1].read_text()

    def wait(self, timeout_s: float = LIMIT_S) -> Ended:
        code = self.agent.wait(timeout=timeout_s)
        deadline = time.monotonic() + 5  # a verifier leaves when it reads that its rank has
        while (left := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return Ended(code, self.logs[0].read_text(), self.stderr(), [str(process) for process in left])


def torchrun(folder: Path, ranks: int, *more: str, env: Mapping[str, str] | None = None) -> Ended:
    with Torchrun(folder, ranks, *more, env=env) as job:
        return job.wait()


def check_done(ended: Ended) -> None:
    assert ended.code == 0, ended.stderr[-3000:]
    assert ended.left == []


def the_error(ended: Ended) -> str:
    """The one line in which a job that failed says why; nobody is left."""
    assert ended.code not in (0, None)
    assert ended.left == []
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == ended.stderr.count("error: ") == 1, ended.stderr
    ours = rf'File "{re.escape(str(ROOT))}/(scale|tppo_ref)/'  # torchrun's traceback has none of these
    assert not re.search(ours, ended.stderr), ended.stderr
    return lines[0]


def check_restarted(source: Path, out: Path) -> None:
    """`out`, a copy of `source` that went on from its newest checkpoint, has lost no response and counts each once."""
    newest = complete_checkpoints(source / "checkpoints")[-1]
    before = in_flight(newest)
    assert len(before) > 2
    check_every_response_goes_on(out, newest, before, ended_by(source, step_of(newest)))
    check_tokens_kept(out, newest, before)
    check_no_sample_skipped(out)
    check_no_response_twice(out)
    rows = check_conservation(out)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)), "a step twice, or none of it"
    assert rows[-1]["step"] > step_of(newest)


# ------------------------------------------------------------------------------------------------------------ a short run


@pytest.fixture(scope="module")
def short(tmp_path_factory, model, problems):
    out = tmp_path_factory.mktemp("short") / "run"
    return out, torchrun(out.parent, 2, *arguments(model, problems, out, "--algo.run.checkpoint_every", "2", steps=5))


def test_two_ranks_under_torchrun_train_and_leave_nobody(short):
    _, ended = short
    check_done(ended)
    assert "error" not in ended.stderr.lower()
    assert "Traceback" not in ended.stderr


def test_two_ranks_under_torchrun_keep_the_conservation_law(short):
    out, _ = short
    rows = check_conservation(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["ledger/trained"] > 0
    check_no_response_twice(out)
    assert sum(row["response/ended"] for row in rows) == len(responses_of(out))


def test_two_ranks_under_torchrun_leave_a_complete_checkpoint_of_the_last_step(short):
    from scale.checkpoint import read_manifest

    out, ended = short
    assert str(out / "checkpoints") in ended.stdout
    found = complete_checkpoints(out / "checkpoints")
    assert [step_of(checkpoint) for checkpoint in found][-1] == 5
    assert read_manifest(found[-1])["world"]["world"] == 2
    assert len(list(found[-1].glob("rank-*.json"))) == 2
    assert in_flight(found[-1])


# ---------------------------------------------------------------------------------------------------------------- kill -9


@dataclasses.dataclass(frozen=True)
class Killed:
    out: Path
    ended: Ended
    took_s: float
    step: int  # the last one that was over when the rank died


def steps_logged(out: Path) -> int:
    """Whole rows of metrics.jsonl, which another process is writing: the steps that are over."""
    file = out / "metrics.jsonl"
    rows = file.read_text().split("\n")[:-1] if file.exists() else []
    return max([0, *(json.loads(row)["step"] for row in rows)])


def kill_a_rank(out: Path, model: Path, problems: Path, *, victim: int, survivor_waits: bool) -> Killed:
    """Kill -9 of one of two ranks inside a step, after the second checkpoint.

    survivor_waits: the other one stands in a collective operation and learns it there, before torchrun's signal. Else it works,
    and torchrun's signal comes first. One of the two is frozen for a second, so that the other comes to wait for it.
    """
    more = (*HELD, "--algo.run.checkpoint_every", "2", "--algo.run.checkpoints_kept", "9")
    with Torchrun(out.parent, 2, *arguments(model, problems, out, *more, steps=10_000)) as job:
        deadline = time.monotonic() + LIMIT_S

        def wait_for(state: Callable[[], bool]) -> None:
            while not state():
                assert job.agent.poll() is None, job.stderr()[-3000:]
                assert time.monotonic() < deadline, "not in time"
                time.sleep(0.01)

        wait_for(lambda: len(complete_checkpoints(out / "checkpoints")) >= 2)
        dies, lives = job.rank(victim), job.rank(1 - victim)
        frozen = dies if survivor_waits else lives
        while True:
            wait_for(lambda: steps_logged(out) % 2 == 1)  # the next checkpoint is due when the step that runs now is over
            step = steps_logged(out)
            frozen.suspend()
            time.sleep(1)
            if steps_logged(out) == step and step % 2 == 1:
                break
            frozen.resume()
        dies.kill()
        begin = time.monotonic()
        if frozen is lives:
            time.sleep(1)  # torchrun looks after its ranks ten times a second
            lives.resume()
        ended = job.wait(timeout_s=60)
        return Killed(out, ended, time.monotonic() - begin, step)


@pytest.fixture(scope="module")
def killed_rank_1(tmp_path_factory, model, problems):
    return kill_a_rank(tmp_path_factory.mktemp("killed-1") / "run", model, problems, victim=1, survivor_waits=True)


@pytest.fixture(scope="module")
def killed_rank_0(tmp_path_factory, model, problems):
    """Rank 0, which has the store where torchrun has not, and which writes the run's files."""
    return kill_a_rank(tmp_path_factory.mktemp("killed-0") / "run", model, problems, victim=0, survivor_waits=False)


@pytest.fixture(scope="module", params=[1, 0])
def killed(request) -> Killed:
    return request.getfixturevalue(f"killed_rank_{request.param}")


def test_a_killed_rank_ends_the_job_within_a_minute_and_leaves_nobody(killed):
    assert killed.ended.code not in (0, None)
    assert killed.took_s < 60
    assert killed.ended.left == []


def test_a_killed_rank_is_told_in_one_clear_line_with_the_remedy(killed):
    """What happened and what to do; torchrun's report says which rank. Nothing of the library's insides."""
    line = the_error(killed.ended)
    assert "rank" in line
    assert re.search(r"killed|gone|lost", line), line
    assert "--algo.run.resume true" in line
    assert not re.search(r"gloo|/pytorch/|\.cc:\d+|\w+Error", line), line
    assert "SIGKILL" in killed.ended.stderr


def test_a_job_that_lost_a_rank_promises_no_checkpoint_that_will_not_come(killed):
    assert step_of(complete_checkpoints(killed.out / "checkpoints")[-1]) < killed.step
    assert "with a checkpoint" not in killed.ended.stderr


def test_the_checkpoint_of_a_job_that_lost_a_rank_is_good(killed):
    from scale.checkpoint import read_manifest

    found = complete_checkpoints(killed.out / "checkpoints")
    assert len(found) >= 2
    for checkpoint in found:
        assert read_manifest(checkpoint)["world"]["world"] == 2
    assert in_flight(found[-1])


@pytest.fixture(scope="module", params=[(1, 2), (1, 1), (0, 2), (0, 1)], ids=lambda p: f"rank {p[0]} killed, {p[1]} ranks go on")
def resumed(request, model, problems):
    victim, ranks = request.param
    source = request.getfixturevalue(f"killed_rank_{victim}").out
    out = source.parent / f"resumed-{ranks}"
    shutil.copytree(source, out)
    steps = step_of(complete_checkpoints(source / "checkpoints")[-1]) + 3  # window 16, cap 48: three windows end every response
    more = (*HELD, "--algo.run.resume", "true", "--algo.run.checkpoint_every", "1", "--algo.run.checkpoints_kept", "9")
    ended = torchrun(source.parent, ranks, *arguments(model, problems, out, *more, ranks=ranks, steps=steps))
    return source, out, ended, steps


def test_a_killed_job_goes_on_under_torchrun_with_every_response_in_flight(resumed):
    source, out, ended, steps = resumed
    check_done(ended)
    check_restarted(source, out)
    assert metrics_of(out)[-1]["step"] == steps


# ------------------------------------------------------------------------------------------------------- users' mistakes


def test_a_missing_model_folder(tmp_path, problems):
    line = the_error(torchrun(tmp_path, 2, *arguments(tmp_path / "nowhere", problems, tmp_path / "out")))
    assert "model" in line
    assert str(tmp_path / "nowhere") in line


def test_a_tokenizer_that_is_too_large_for_the_model(tmp_path, problems):
    small = make_model(tmp_path / "small", tied=False, vocab=100, end=1)
    line = the_error(torchrun(tmp_path, 2, *arguments(small, problems, tmp_path / "out")))
    for word in ("vocabulary", "100", "small", "tokenizer"):
        assert word in line


def test_a_truncated_shard_is_named_with_its_sizes_and_the_remedy(killed_rank_1, model, problems):
    out = killed_rank_1.out.parent / "truncated"
    shutil.copytree(killed_rank_1.out, out)
    newest = complete_checkpoints(out / "checkpoints")[-1]
    truncate_a_shard(newest)
    line = the_error(torchrun(out.parent, 2, *arguments(model, problems, out, *HELD, "--algo.run.resume", "true")))
    for word in (newest.name, "distcp", "bytes", "remove this folder"):
        assert word in line


def test_tensor_parallelism_that_does_not_divide_the_heads(tmp_path, problems, needs_vllm):
    odd = make_model(tmp_path / "odd", tied=False, hidden_size=96, num_attention_heads=3, num_key_value_heads=3)
    more = ("--engine.tensor_parallel", "2")
    line = the_error(torchrun(tmp_path, 2, *arguments(odd, problems, tmp_path / "out", *more, kind="vllm")))
    for word in ("engine.tensor_parallel", "3 attention heads", "2;", str(odd)):
        assert word in line


def test_a_misspelt_option_is_told_once_however_many_ranks_read_it(tmp_path, model, problems):
    line = the_error(torchrun(tmp_path, 4, *arguments(model, problems, tmp_path / "out", "--engine.tensor_paralel", "2", ranks=4)))
    assert "tensor_paralel" in line


def test_ranks_that_cannot_be_cut_into_groups_are_told_though_rank_0_comes_last(tmp_path, model, problems):
    """The mistake is found before the ranks know of each other; torchrun ends rank 0 as soon as another rank has failed."""
    late = tmp_path / "late"
    late.mkdir()
    (late / "sitecustomize.py").write_text("import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(4)\n")
    more = arguments(model, problems, tmp_path / "out", "--engine.tensor_parallel", "2", ranks=4)
    line = the_error(torchrun(tmp_path, 3, *more, env={"PYTHONPATH": f"{late}{os.pathsep}{ROOT}"}))
    for word in ("tensor_parallel", "3 ranks", "a divisor of the 3 ranks"):
        assert word in line


# ------------------------------------------------------------------------------------------------ vLLM: tensor-parallel sizes

SLOW = ("--algo.policy.mini_batches", "1", "--algo.value.mini_batches", "1", "--algo.policy.lr", "1e-5", "--algo.value.lr", "1e-5",
        "--algo.rollout.max_response_tokens", "40", "--algo.run.checkpoint_every", "1", "--algo.run.checkpoints_kept", "9",
        "--algo.task.verifier", "recording_verifier:record")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recorded:
    out: Path
    ended: Ended
    scored: list[list[int]]  # the tokens of every response that a verifier was asked for, in no order


def decode_with_vllm(out: Path, model: Path, problems: Path, *more: str, ranks: int, tensor_parallel: int, steps: int) -> Recorded:
    """A cap of 40 tokens with windows of 16: after three steps the first responses have ended and others are in flight.

    One mini-batch, as it depends on the ranks which rows share one; small learning rates, as rounding depends on them too.
    """
    record = out.parent / f"{out.name}.tokens"
    env = {"PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}", "TPPO_TEST_TOKENS": str(record)}
    ended = torchrun(out.parent, ranks, *arguments(model, problems, out, *SLOW, "--engine.tensor_parallel", str(tensor_parallel), *more,
                                                   kind="vllm", ranks=ranks, steps=steps), env=env)  # fmt: skip
    check_done(ended)
    return Recorded(out, ended, sorted(json.loads(line) for line in record.read_text().splitlines()))


@pytest.fixture(scope="module")
def two_engines(needs_vllm, tmp_path_factory, model, problems):
    """The same two engines, each on one rank and each on two: two ranks and four."""
    folder = tmp_path_factory.mktemp("engines")
    return [
        decode_with_vllm(folder / f"tp{size}", model, problems, ranks=2 * size, tensor_parallel=size, steps=3) for size in (1, 2)
    ]


@pytest.fixture(scope="module")
def one_engine(needs_vllm, tmp_path_factory, model, problems):
    """One engine on two ranks."""
    return decode_with_vllm(tmp_path_factory.mktemp("engine") / "tp2", model, problems, ranks=2, tensor_parallel=2, steps=3)


def rank_states(run: Recorded) -> list[dict]:
    newest = complete_checkpoints(run.out / "checkpoints")[-1]
    return [json.loads(file.read_text()) for file in sorted(newest.glob("rank-*.json"))]


def test_two_engines_sample_the_same_tokens_on_two_ranks_and_on_four(two_engines):
    """All tokens of all responses: those in flight after each step, those that ended, those of the evaluations before and after."""
    one, two = two_engines
    assert one.scored == two.scored
    assert len(one.scored) >= len(responses_of(one.out)) + 8, "two evaluations of two prompts, twice each"
    for a, b in zip(*(complete_checkpoints(run.out / "checkpoints") for run in two_engines), strict=True):
        ours, theirs = in_flight(a), in_flight(b)
        assert ours.keys() == theirs.keys() != set()
        for id, response in ours.items():
            for name in ("token_ids", "versions", "window_starts"):
                assert response[name] == theirs[id][name]

    def rows(run: Recorded) -> list[tuple]:
        return sorted(tuple(row[name] for name in ("step", "response", "prompt", "tokens", "end", "score")) for row in responses_of(run.out))  # fmt: skip

    assert rows(one) == rows(two) != []


def test_two_engines_count_and_learn_the_same_on_two_ranks_and_on_four(two_engines):
    counts = ("ledger/generated", "ledger/trained", "ledger/excluded_tail", "ledger/pending", "response/rows", "response/ended")
    for one, two in zip(*(check_conservation(run.out) for run in two_engines), strict=True):
        for name in counts:
            assert one[name] == two[name], name
        for name in ("policy/loss", "value/loss", "policy/grad_norm", "value/grad_norm"):
            assert (two[name] is None) == (one[name] is None), name  # NaN, in JSON: a step without an update
            assert one[name] is None or two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-5), name
    assert sum((row["policy/grad_norm"] or 0) > 0 for row in metrics_of(two_engines[0].out)) == 3
    assert any((row["value/grad_norm"] or 0) > 0 for row in metrics_of(two_engines[0].out))
    for run in two_engines:
        check_no_response_twice(run.out)


def test_every_rank_trains_something(two_engines, one_engine):
    for run, ranks in zip((*two_engines, one_engine), (2, 4, 2), strict=True):
        trained = [state["trainer"]["ledger"]["tokens"]["trained"] for state in rank_states(run)]
        assert len(trained) == ranks
        assert min(trained) > 0


def test_the_conservation_law_holds_on_one_engine_of_two_ranks(one_engine):
    """Its tokens are others than those of two engines: which sample goes to which slot depends on their number."""
    assert len(check_conservation(one_engine.out)) == 3
    check_no_response_twice(one_engine.out)


@pytest.fixture(scope="module", params=[1, 2], ids=["from TP2 to TP1", "from TP1 to TP2"])
def changed_size(request, two_engines, one_engine, model, problems) -> tuple[Path, Path]:
    """Two ranks go on as two ranks: one engine as two engines, two engines as one."""
    size = request.param
    source = (one_engine if size == 1 else two_engines[0]).out
    out = source.parent / f"on-as-tp{size}"
    shutil.copytree(source, out)
    steps = step_of(complete_checkpoints(source / "checkpoints")[-1]) + 3
    run = decode_with_vllm(out, model, problems, "--algo.run.resume", "true", ranks=2, tensor_parallel=size, steps=steps)
    states = rank_states(run)
    assert (len(states), {state["trainer"]["batcher"]["part"][1] for state in states}) == (2, {size})
    return source, out


def test_a_run_goes_on_with_every_response_in_flight_at_another_tensor_parallel_size(changed_size):
    check_restarted(*changed_size)
