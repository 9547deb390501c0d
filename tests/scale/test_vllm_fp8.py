"""algo.rollout.kv_cache on vLLM's real CPU build: the field reaches it, and what it samples from is what TorchEngine's cache imitates."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from scale_helpers import HERE, LIMIT_S, ROOT, environment, make_model, require

from tppo_ref.tasks import load_task

require("vllm", "the engine is tested against the real one")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder, chain = tmp_path_factory.mktemp("fp8"), load_task("chain")
    model = make_model(folder / "model", tied=False, vocab=chain.vocab_size, end=chain.end_token_id, head_std=0.1)
    done = subprocess.run([sys.executable, str(HERE / "vllm_fp8_worker.py"), str(model), str(folder / "out")], env=environment(),
                          cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(x for x in done.stdout.splitlines() if x.startswith("FOUND ")).removeprefix("FOUND "))


def test_the_field_reaches_vllm_and_its_numbers_are_not_the_trainers(found):
    assert found["cache"] == "fp8"
    assert min(found["plain"]) > 5e-3


def test_it_samples_from_the_policy_that_reads_every_key_and_value_rounded_the_prompts_too(found):
    """On average: a key on the edge between two codes may fall to either side, an eighth apart."""
    assert max(found["rounded"]) < 1e-3


def test_the_start_up_probe_passes_within_a_limit_of_its_own(found):
    assert found["thresholds"] == [0.15, 0.6]
    assert found["start-up probe"] == "passed"
