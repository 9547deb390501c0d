"""What the tests of scale/ share: tiny models on disk, problems, the launcher, ranks over gloo."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

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


def run_ranks(script: Path, world: int, arguments: Sequence[str], *, timeout_s: float = LIMIT_S) -> str:
    """Start `script` as `world` ranks as torchrun would; stdout of rank 0. A rank that fails fails the test, with its stderr."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        processes.append(subprocess.Popen([sys.executable, str(script), *arguments], env=environment(**ranks), cwd=ROOT,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))  # fmt: skip
    try:
        results = [p.communicate(timeout=timeout_s) for p in processes]
    finally:
        for p in processes:
            p.kill()
    failed = [f"rank {r}: {err[-1500:]}" for r, (p, (_, err)) in enumerate(zip(processes, results, strict=True)) if p.returncode]
    assert not failed, "\n".join(failed)
    return results[0][0]


def launch(
    *arguments: str, env: Mapping[str, str] | None = None, timeout_s: float = LIMIT_S, cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    """`python scale/launch.py ...` to its end."""
    return subprocess.run([sys.executable, str(LAUNCH), *arguments], env=env or environment(), cwd=cwd, capture_output=True, text=True,
                          timeout=timeout_s)  # fmt: skip


def metrics_of(out: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl that belong to a training step."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "ledger/generated" in row]
