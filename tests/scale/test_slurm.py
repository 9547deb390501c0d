"""scale/slurm.sh with stand-ins for Slurm's commands: one machine, two ranks under the real torchrun. No cluster is at hand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from scale_helpers import LIMIT_S, ROOT, arguments, environment, metrics_of, ranks_left, require

from tppo_ref.runs.checkpoint import complete_checkpoints

require("math_verify", "the verifier of these runs")

SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do shift; done
echo "srun with $SRUN_CPUS_PER_TASK cores a task" >> "$SCONTROL_CALLS"
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "$@" >> "$SCONTROL_CALLS"
if [ "$1" = show ]; then echo 127.0.0.1; fi
"""


@pytest.fixture
def slurm(tmp_path):
    """sbatch's environment on one machine of two GPUs; `calls` is what scontrol was asked."""
    bin = tmp_path / "bin"
    bin.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    calls = tmp_path / "calls"
    calls.write_text("")
    set_by_slurm = {
        "SLURM_JOB_NODELIST": "here", "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2",
        "SLURM_CPUS_PER_TASK": "7",
        "SCONTROL_CALLS": str(calls), "TPPO_PYTHON": sys.executable, "PATH": f"{bin}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    return set_by_slurm, calls


def job(slurm, *more: str, restarts: int = 0) -> subprocess.Popen:
    env = environment(**slurm[0], SLURM_RESTART_COUNT=str(restarts))
    return subprocess.Popen(["bash", "scale/slurm.sh", *more], cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                            text=True, start_new_session=True)  # fmt: skip


def test_a_job_trains_is_requeued_before_its_time_is_up_and_goes_on_where_it_was(slurm, tmp_path, model, problems):
    out = tmp_path / "run"
    slurm[0]["TPPO_TORCHRUN"] = f"--log-dir {tmp_path / 'logs'} --tee 3"
    common = arguments(model, problems, out, "--algo.run.checkpoint_every", "1", "--algo.run.checkpoints_kept", "99", steps=10_000)
    first = job(slurm, *common)
    try:
        deadline = time.monotonic() + LIMIT_S
        while not complete_checkpoints(out / "checkpoints"):
            assert first.poll() is None, first.stderr.read()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        first.send_signal(signal.SIGUSR1)  # what --signal=B:USR1@120 does
        while "requeue" not in slurm[1].read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        os.killpg(
            first.pid, signal.SIGKILL
        )  # and then Slurm ends it; the ranks, in sessions of their own, notice that torchrun is gone
    first.communicate(timeout=60)
    deadline = time.monotonic() + 60  # with logs of their own they hold no end of this pipe, whose end is therefore not theirs
    while ranks_left(out) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not ranks_left(out)
    assert f"requeue {os.getpid()}" in slurm[1].read_text()
    assert "srun with 7 cores a task" in slurm[1].read_text()
    assert list((tmp_path / "logs").rglob("stderr.log")), "TPPO_TORCHRUN did not reach torchrun"
    reached = int(complete_checkpoints(out / "checkpoints")[-1].name[5:])

    steps = ("--algo.run.steps", str(reached + 2))
    again = job(slurm, *common, *steps, restarts=1)
    _, said = again.communicate(timeout=LIMIT_S)
    assert again.returncode == 0, said[-3000:]
    assert [row["step"] for row in metrics_of(out)] == list(range(1, reached + 3)), "it began anew, or lost a step"


def test_a_job_that_is_requeued_before_its_first_checkpoint_begins_anew(slurm, tmp_path, model, problems):
    done = job(slurm, *arguments(model, problems, tmp_path / "run", steps=1), restarts=1)
    _, said = done.communicate(timeout=LIMIT_S)
    assert done.returncode == 0, said[-3000:]
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1]


def test_a_mistake_ends_the_job_with_its_exit_code_and_one_line(slurm, tmp_path, model, problems):
    done = job(slurm, *arguments(model, problems, tmp_path / "run", "--algo.rollout.slots", "7"))
    _, said = done.communicate(timeout=LIMIT_S)
    assert done.returncode != 0
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "slots" in errors[0]
