"""What the tests of scale/ share: tiny models on disk, problems, the launcher, ranks over gloo, what a run must leave behind."""

from __future__ import annotations

import collections
import csv
import importlib.util
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from benchmarks import planted
from benchmarks.forked import Forked
from scale.network import ranks_here
from tppo_ref.runs.checkpoint import complete_checkpoints

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
LAUNCH = ROOT / "scale" / "launch.py"
TINY_CONFIG = ROOT / "scale" / "configs" / "cpu-tiny.yaml"
LIMIT_S = 300


def require(package: str, why: str) -> None:
    """Skips the module in plain words where a package is missing; fails where CI_SCALE=1 says that it must be there."""
    if importlib.util.find_spec(package) is None:
        message = f"{package} is not installed: {why}"
        if os.environ.get("CI_SCALE") == "1":
            pytest.fail(f"CI_SCALE=1, and {message}", pytrace=False)
        pytest.skip(message, allow_module_level=True)


def shared_data() -> Path | None:
    """The folder of shared data: $TPPO_SHARED_DATA, else ../shared/data beside the repository; None where there is none."""
    folder = Path(os.environ.get("TPPO_SHARED_DATA", ROOT.parent / "shared" / "data"))
    return folder if folder.is_dir() else None


def environment(**more: str) -> dict[str, str]:
    """For subprocesses: one thread, no network, this checkout on the path, nothing left of another job's ranks."""
    gone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TPPO_PARENT_PIPE")
    kept = {name: value for name, value in os.environ.items() if name not in gone}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"} | more


def make_model(
    folder: Path, *, tied: bool, vocab: int = 512, end: int = 256, seed: int = 0, head_std: float = 0.05, **changes: Any
) -> Path:
    """A random tiny Qwen2 in a Hugging Face folder. vLLM's CPU attention wants heads of 32 or more."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    shape = dict(vocab_size=vocab, hidden_size=128, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                 max_position_embeddings=512, eos_token_id=end, tie_word_embeddings=tied, initializer_range=head_std)  # fmt: skip
    Qwen2ForCausalLM(Qwen2Config(**(shape | changes))).save_pretrained(folder)
    return folder


def make_problems(file: Path, num: int = 60, seed: int = 0) -> Path:
    rng = random.Random(seed)
    rows = []
    for _ in range(num):
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        rows.append(json.dumps({"question": f"{a}+{b}=", "answer": f"so {a}+{b}={a + b}\n#### {a + b}"}))
    file.write_text("\n".join(rows) + "\n")
    return file


class School(NamedTuple):
    """A tiny model that has read some school problems, its tokenizer, and the problems."""

    model: Path
    tokenizer: Path
    problems: Path
    losses: list[float]
    source: str


def make_school(folder: Path, problems: Path, num: int = 300, steps: int = 60) -> School:
    """A byte-level BPE tokenizer and a tiny Qwen2, both trained on the shared GSM8K; on `problems` where it is not there."""
    import tokenizers
    import torch
    from transformers import PreTrainedTokenizerFast

    from tppo_ref.rollout.models import load_policy
    from tppo_ref.rollout.packing import TokenBatch

    data = shared_data()
    source = data / "gsm8k_train.jsonl" if data else problems
    short = [row for row in map(json.loads, source.read_text().splitlines()) if len(row["question"]) < 250][:num]
    problems = folder / "problems.jsonl"
    folder.mkdir()
    problems.write_text("".join(json.dumps(row) + "\n" for row in short))

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=512, special_tokens=["<end>"], show_progress=False,
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    bpe.train_from_iterator((f"{row['question']}{row['answer']}" for row in short), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")
    model = make_model(folder / "model", tied=True, vocab=len(tokenizer), end=tokenizer.eos_token_id)
    tokenizer.save_pretrained(folder / "tokenizer")  # beside a config.json, transformers would take it for Qwen's own

    policy = load_policy(str(model))
    optimiser, rng, losses = torch.optim.AdamW(policy.parameters(), lr=3e-3), random.Random(0), []
    pairs = [(tokenizer.encode(row["question"]), [*tokenizer.encode(row["answer"])[:60], tokenizer.eos_token_id]) for row in short]
    for _ in range(steps):
        batch = TokenBatch(*map(list, zip(*rng.sample(pairs, 16), strict=True)))
        loss = -policy(batch).sum() / sum(map(len, batch.response_ids))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    policy.save_pretrained(model)
    return School(model, folder / "tokenizer", problems, losses, source.name)


def fork_server() -> ForkServerContext:
    """planted.fork_server, where torch's C++ says errors only, as launch.py has it; it reads that as it is imported."""
    context, name = planted.fork_server(), "TORCH_CPP_LOG_LEVEL"
    before = os.environ.get(name)
    os.environ[name] = "ERROR"
    forkserver.ensure_running()
    del os.environ[name]
    os.environ.update({name: before} if before else {})
    return context


def run_ranks(script: Path, world: int, arguments: Sequence[str], *, timeout_s: float = LIMIT_S) -> str:
    """Run `script` as `world` ranks as torchrun would; stdout of rank 0. A rank that fails fails the test, with its stderr.

    The ranks are forks of a process that has imported torch and transformers, none of ours: importing costs more than most of them do.
    """
    with tempfile.TemporaryDirectory() as folder:
        said = [(Path(folder) / f"{rank}.out", Path(folder) / f"{rank}.err") for rank in range(world)]
        children = []
        for variables, own in zip(ranks_here(world), said, strict=True):
            child = fork_server().Process(target=_worker, args=(script, list(arguments), environment(**variables), own))
            child.start()
            children.append(child)
        end = time.monotonic() + timeout_s
        for child in children:
            child.join(max(0.0, end - time.monotonic()))
        codes = [child.exitcode for child in children]
        for child in children:
            child.kill()
            child.join()
        failed = [f"rank {r}: {said[r][1].read_text()[-1500:]}" for r, code in enumerate(codes) if code]
        assert not failed, "\n".join(failed)
        assert None not in codes, f"of ranks {[r for r, code in enumerate(codes) if code is None]} none ended within {timeout_s} s"
        return said[0][0].read_text()


def _worker(script: Path, arguments: list[str], variables: dict[str, str], said: tuple[Path, Path]) -> None:
    """A rank that leaves when all are through: one that is early would take its connections away from the others."""
    _rank(script, arguments, variables, said)
    from scale.shutdown import wait_for_all_ranks

    wait_for_all_ranks()
    sys.stdout.flush()
    os._exit(0)


def _rank(script: Path, arguments: list[str], variables: dict[str, str], said: tuple[Path, Path]) -> None:
    for stream, path in zip((1, 2), said, strict=True):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), stream)
    os.chdir(ROOT)
    _as_a_script(script, arguments, variables)


def _as_a_script(script: Path, arguments: Sequence[str], variables: Mapping[str, str]) -> None:
    """What `python script arguments` does, in a process that has imported nothing of ours."""
    os.environ.clear()
    os.environ.update(variables)
    sys.argv[:] = [str(script), *arguments]
    sys.path[:0] = [str(script.parent), *variables["PYTHONPATH"].split(os.pathsep)]
    runpy.run_path(str(script), run_name="__main__")


def launch(
    *arguments: str, env: Mapping[str, str] | None = None, timeout_s: float = LIMIT_S, cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    """`python scale/launch.py ...` to its end.

    Launcher and ranks are forks of a process that has imported torch and transformers, none of ours: importing costs more than most
    runs do. Whoever wants the real start, with vLLM or from another folder, gets it; tests of signals start processes of their own.
    """
    variables = dict(env or environment())
    if "vllm" in arguments or cwd != ROOT:
        return subprocess.run([sys.executable, str(LAUNCH), *arguments], env=variables, cwd=cwd, capture_output=True, text=True,
                              timeout=timeout_s)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        said, pids = (Path(folder, "out"), Path(folder, "err")), Path(folder, "pids")
        child = fork_server().Process(target=_launcher, args=(list(arguments), variables, said, pids))
        child.start()
        child.join(timeout_s)
        ranks = [int(pid) for pid in pids.read_text().split()] if pids.exists() else []
        left = [pid for pid in (child.pid, *ranks) if pid is not None and psutil.pid_exists(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left, f"of launcher {child.pid} and ranks {ranks} there were left: {left}"
        return subprocess.CompletedProcess(arguments, child.exitcode or 0, *(path.read_text() for path in said))


def _launcher(arguments: list[str], variables: dict[str, str], said: tuple[Path, Path], pids: Path) -> None:
    plain = subprocess.Popen

    def start(command: Sequence[str], **options: Any) -> Any:
        if str(LAUNCH) not in command:
            return plain(command, **options)
        rank = Forked(lambda: _as_a_script(Path(command[1]), command[2:], options["env"]))
        with pids.open("a") as file:
            print(rank.pid, file=file)
        return rank

    subprocess.Popen = start  # type: ignore[assignment, misc]
    _rank(LAUNCH, arguments, variables, said)


def metrics_of(out: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl that belong to a training step."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "ledger/generated" in row]


HELD = ("--algo.value.batch_responses", "3")  # ended responses wait for the value model's batch, through a restart too


def arguments(model, problems, out, *more: str, kind: str = "torch", ranks: int = 2, steps: int = 4) -> list[str]:
    """A short run of the tiny config, for launch.py."""
    return ["--config", str(TINY_CONFIG), "--algo.task.path", str(problems), "--algo.model.policy", str(model), "--algo.run.out", str(out),
            "--engine.kind", kind, "--cluster.devices_per_node", str(ranks), "--algo.run.steps", str(steps), "--algo.run.progress", "false",
            "--algo.run.eval_prompts", "2", "--algo.run.eval_samples", "2", "--cluster.timeout_s", "60",
            "--algo.rollout.slots", "8", "--algo.rollout.window", "16", "--algo.rollout.max_response_tokens", "48", *more]  # fmt: skip


def ranks_left(out: Path) -> list[int]:
    """Processes that still work on this run's folder."""
    left = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        if str(out) in " ".join(process.info["cmdline"] or []) and process.info["pid"] != os.getpid():
            left.append(process.info["pid"])
    return left


def one_error(done: subprocess.CompletedProcess, *words: str) -> None:
    """A mistake of the user's: exit code 2 and one line, with `words` in it."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 2, (done.returncode, done.stderr[-2000:])
    assert len(lines) == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in lines[0]


def check_conservation(out: Path) -> list[dict]:
    """generated = trained + excluded + pending after every step, and generated grows by what the step decoded."""
    rows, before = metrics_of(out), 0
    for row in rows:
        parts = sum(row[f"ledger/{name}"] for name in ("trained", "excluded_tail", "excluded_warmup", "pending"))
        assert row["ledger/generated"] == parts
        assert row["ledger/generated"] - before == row["rollout/tokens"]
        assert row["rollout/occupancy"] <= 1
        before = row["ledger/generated"]
    return rows


def responses_of(out: Path) -> list[dict[str, str]]:
    """Rows of responses.csv: the responses that have ended."""
    with (out / "responses.csv").open() as file:
        return list(csv.DictReader(file))


def in_flight(checkpoint: Path) -> dict[int, dict]:
    """The responses of a checkpoint by id; twice the same one fails."""
    found: dict[int, dict] = {}
    for file in sorted(checkpoint.glob("rank-*.json")):
        for response in json.loads(file.read_text())["trainer"]["batcher"]["in_flight"]:
            assert response["id"] not in found, "one response, two ranks"
            found[response["id"]] = response
    return found


def check_no_response_twice(out: Path) -> None:
    """No response ended twice, and some did end."""
    counts = collections.Counter(row["response"] for row in responses_of(out))
    assert counts
    assert max(counts.values()) == 1


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def ended_by(out: Path, step: int) -> set[int]:
    """The responses that have ended by this step."""
    return {int(row["response"]) for row in responses_of(out) if int(row["step"]) <= step}


def check_every_response_goes_on(out: Path, checkpoint: Path, before: Mapping[int, dict], ended_before: set[int]) -> None:
    """After a restart from `checkpoint` every response in flight there (`before`) has ended, longer than it was; none ends twice."""
    after = [row for row in responses_of(out) if int(row["step"]) > step_of(checkpoint)]
    ended = collections.Counter(int(row["response"]) for row in after)
    assert before, "nothing was in flight"
    assert set(before) <= set(ended), "a response of the checkpoint never ended"
    assert max(ended.values()) == 1
    assert not set(ended) & ended_before
    for row in after:
        if int(row["response"]) in before:
            assert int(row["tokens"]) > len(before[int(row["response"])]["token_ids"])


def check_no_sample_skipped(out: Path) -> None:
    """Every sample up to the last is in flight or has ended: none was lost between the ranks."""
    newest = complete_checkpoints(out / "checkpoints")[-1]
    ended, flying = ended_by(out, step_of(newest)), set(in_flight(newest))
    assert not ended & flying
    streams = [json.loads(file.read_text())["trainer"]["batcher"]["stream"] for file in newest.glob("rank-*.json")]
    backlog = {sample for stream in streams for sample in stream["backlog"]}
    for sample in range(min(stream["next"] for stream in streams)):
        assert sample in ended | flying | backlog, sample


def check_tokens_kept(out: Path, checkpoint: Path, before: Mapping[int, dict]) -> None:
    """Where a later checkpoint still holds a response of `before`, it begins with the same tokens, sampled by the same versions."""
    both = 0
    for later in complete_checkpoints(out / "checkpoints"):
        if later.name <= checkpoint.name:
            continue
        for id, response in in_flight(later).items():
            if id in before:
                both += 1
                kept = before[id]
                for name in ("token_ids", "logprobs", "versions"):
                    assert response[name][: len(kept["token_ids"])] == kept[name]
    assert both > 0, "no checkpoint later on still holds one of them"


def truncate_a_shard(checkpoint: Path) -> None:
    """Half of the largest shard, as a full disk leaves it."""
    shard = max(checkpoint.glob("shards/*.distcp"), key=lambda f: f.stat().st_size)
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size // 2)
