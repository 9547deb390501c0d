"""A sample of benchmarks/kills.py, and that its judges see what they look for."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.kills import Plan, judge
from benchmarks.same_run import difference
from tppo_ref.runs.checkpoint import complete_checkpoints

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def sample(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """Eight kills, by whatever chance draws, of runs that hold responses back."""
    out = tmp_path_factory.mktemp("kills")
    done = subprocess.run([sys.executable, "-m", "benchmarks.kills", "--kills", "8", "--minutes", "2", "--cases", "held batches",
                           "--out", str(out), "--csv", str(out / "kills.csv")], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    with (out / "kills.csv").open() as file:
        (row,) = csv.DictReader(file)
    return out / "unbroken-held-batches" / "run", row


def test_runs_that_were_killed_are_the_run_that_was_not(sample):
    row = sample[1]
    assert int(row["kills"]) >= 8
    nothing = ("second_accepted", "lost", "twice", "other_responses", "other_records", "other_state", "left", "stuck", "wrong_ends")
    assert {name: row[name] for name in nothing} == dict.fromkeys(nothing, "0")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def lines_of(out: Path) -> list[str]:
    return (out / "responses.csv").read_text().splitlines(keepends=True)


def rewrite(out: Path, lines: list[str]) -> None:
    (out / "responses.csv").write_text("".join(lines))


def turn_a_weight(out: Path) -> None:
    file = complete_checkpoints(out / "checkpoints")[-1] / "value" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def turn_an_optimiser(out: Path) -> None:
    file = complete_checkpoints(out / "checkpoints")[-1] / "optimisers.pt"
    state = torch.load(file, weights_only=True)
    state["policy"]["state"][0]["exp_avg"].view(-1)[0] += 1e-6
    torch.save(state, file)


def newest_state(out: Path) -> Path:
    return complete_checkpoints(out / "checkpoints")[-1] / "state.json"


@pytest.mark.parametrize(
    ("harm", "seen"),
    [
        (lambda out: rewrite(out, lines_of(out)[:-1]), "lost"),
        (lambda out: rewrite(out, [*lines_of(out), lines_of(out)[-1]]), "twice"),
        (lambda out: edit(out / "responses.csv", "LENGTH_CAP", "END_TOKEN"), "other responses"),
        (lambda out: edit(out / "metrics.jsonl", '"policy/tokens": ', '"policy/tokens": 1'), "other records"),
        (turn_a_weight, "other state"),
        (turn_an_optimiser, "other state"),
        (lambda out: edit(newest_state(out), '"num_settled": ', '"num_settled": 1'), "other state"),
        (lambda out: (out / "checkpoints" / ".removed-step-00000001").mkdir(), "left"),
    ],
)  # fmt: skip
def test_the_judges_see_what_they_look_for(harm, seen, sample, tmp_path):
    shutil.copytree(sample[0], tmp_path / "run")
    assert not any(difference(sample[0], tmp_path / "run").values())
    harm(tmp_path / "run")
    assert difference(sample[0], tmp_path / "run")[seen] > 0


def test_how_an_attempt_may_end_depends_on_what_was_done_to_it():
    def plan(how):
        return Plan(how, "save", 1, 0, 0.0)

    killed, asked, mistake, stopped, done, raised = 9, 15, 2 << 8, 130 << 8, 0, 1 << 8
    line = "error: run.out: got ...\n"
    assert judge(plan("SIGKILL"), killed, "") == judge(plan("SIGTERM"), asked, "") == judge(plan("SIGSTOP"), killed, "") == ""
    assert judge(plan("full disk"), mistake, line) == judge(plan("SIGTERM"), stopped, "stopped\n") == judge(None, done, "") == ""
    assert judge(plan("full disk"), mistake, line + line) == "not one line"
    assert judge(plan("full disk"), mistake, line + "Traceback (most recent call last):\n") == "traceback"
    assert judge(plan("SIGKILL"), mistake, line) == "exit code 2"
    assert judge(plan("full disk"), killed, "") == judge(None, killed, "") == "killed by another signal"
    assert judge(plan("SIGKILL"), raised, "") == "exit code 1"
    assert judge(plan("SIGTERM"), None, "") == "stood still"
