"""Whole runs: what a checkpoint changes (nothing), when it is one, who may go on from it, how a run ends, and what it says meanwhile.

Runs on one rank share one process (session_worker.py); those on two are launched. All decode with engine.kind torch.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scale_helpers import (
    HERE,
    LIMIT_S,
    ROOT,
    TINY_CONFIG,
    arguments,
    environment,
    launch,
    make_model,
    make_problems,
    metrics_of,
    one_error,
    ranks_left,
    require,
    responses_of,
)

from tppo_ref.rollout.decode_load import DecodeStep
from tppo_ref.runs.checkpoint import complete_checkpoints, file_digest
from tppo_ref.runs.run_folder import own_folder

require("math_verify", "the verifier of these runs")
import psutil  # noqa: E402

PLANTED = HERE / "planted" / "launch.py"
OWN = ("--algo.task.verifier", "parity_verifier:verify")
EVERY_STEP = ("--algo.run.checkpoint_every", "1", "--algo.run.checkpoints_kept", "9")


def with_verifier(**more: str) -> dict[str, str]:
    """The environment, with parity_verifier to be imported."""
    return environment(PYTHONPATH=f"{ROOT}{os.pathsep}{HERE}", **more)


def in_one_process(folder: Path, runs: dict[str, dict]) -> dict[str, str]:
    """Named runs, in order, on one rank; how each ended: "" or its error."""
    (folder / "runs.json").write_text(json.dumps(list(runs.values())))
    done = subprocess.run([sys.executable, str(HERE / "session_worker.py"), str(folder / "runs.json")], env=with_verifier(), cwd=ROOT,
                          capture_output=True, text=True, timeout=LIMIT_S)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    return dict(zip(runs, json.loads(found.removeprefix("FOUND ")), strict=True))


def timeless(row: dict) -> dict:
    """A step's metrics without those that a clock measured."""
    return {name: x for name, x in row.items() if not name.startswith(("time/", "rollout/tokens_per_s", "rollout/idle"))}


def steps_of(out: Path) -> list[int]:
    return [int(checkpoint.name[5:]) for checkpoint in complete_checkpoints(out / "checkpoints")]


# ----------------------------------------------------------------------------------------------------------------- one rank

DIFFERENT = {
    "engine.dtype": "bfloat16", "sharding.compute_dtype": "bfloat16", "data.instruction": "Think.", "reward.overlong_buffer": "8",
}  # fmt: skip
ELSEWHERE = {"cluster.devices_per_node": "2", "engine.tensor_parallel": "2"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, model, problems):
    """Runs of six steps of which the first three leave the policy alone, and the first two, in which no response may end, the value
    model, too: saved at every second step, saved at the end, and resumed after two; a job that was queued again, twice; and resumes
    under fields that differ."""
    out = tmp_path_factory.mktemp("alone")

    def run(name, *more, steps=6):
        own = (
            "--algo.value.warmup_steps",
            "3",
            "--algo.rollout.min_response_tokens",
            "40",
            "--algo.run.checkpoints_kept",
            "9",
            *OWN,
        )
        return {"arguments": arguments(model, problems, out / name, *own, *more, ranks=1, steps=steps)}

    resume, requeued = ("--algo.run.resume", "true"), ("--cluster.requeued", "true")
    runs = {
        "saved": run("saved", "--algo.run.checkpoint_every", "2"),
        "unsaved": run("unsaved", "--algo.run.checkpoint_every", "0"),
        "begun": run("resumed", "--algo.run.checkpoint_every", "0", steps=2),
        "resumed": run("resumed", "--algo.run.checkpoint_every", "0", *resume),
        "requeued": run("requeued", *requeued, steps=1),
        "requeued again": run("requeued", *requeued, steps=2),
    }
    runs |= {field: run("unsaved", *resume, f"--{field}", x) for field, x in DIFFERENT.items()}
    runs |= {"elsewhere": run("unsaved", *resume, *(word for field, x in ELSEWHERE.items() for word in (f"--{field}", x)))}
    return out, in_one_process(out, runs)


def test_a_checkpoint_before_the_first_update_changes_nothing(alone):
    """To read an empty optimiser's state, torch fills it in with a step of AdamW, which the bias correction would count."""
    out, ended = alone
    assert ended["saved"] == ended["unsaved"] == ""
    assert steps_of(out / "saved") == [2, 4, 6]
    assert steps_of(out / "unsaved") == [6]
    saved, unsaved = (metrics_of(out / name) for name in ("saved", "unsaved"))
    assert [timeless(row) for row in saved] == [timeless(row) for row in unsaved]
    assert [row["step"] for row in saved] == [1, 2, 3, 4, 5, 6]


def test_a_run_resumed_before_the_first_update_is_the_run_that_was_not(alone):
    out, ended = alone
    assert ended["begun"] == ended["resumed"] == ""
    assert steps_of(out / "resumed") == [2, 6]
    assert [timeless(row) for row in metrics_of(out / "resumed")] == [timeless(row) for row in metrics_of(out / "unsaved")]


def test_these_runs_updated_nothing_until_their_checkpoint_and_both_models_later(alone):
    """Else the two tests above would hold for any optimiser."""
    rows = metrics_of(alone[0] / "unsaved")
    assert all(row.get("policy/updates", 0) == 0 for row in rows[:3])
    assert all(row["policy/updates"] > 0 and row["policy/grad_norm"] > 0 for row in rows[3:])
    assert all(row["value/updates"] == 0 for row in rows[:2])
    assert sum(row["value/updates"] > 0 for row in rows) > 1


def test_a_requeued_job_starts_anew_where_there_is_nothing_to_go_on_from(alone):
    out, ended = alone
    assert ended["requeued"] == ""
    assert steps_of(out / "requeued")[0] == 1


def test_a_requeued_job_goes_on_where_there_is_a_checkpoint(alone):
    """The first job's evaluations, at its start and at its end, are followed by the second job's step 2, and not by another start."""
    out, ended = alone
    assert ended["requeued again"] == ""
    lines = (out / "requeued" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 1, 2, 2]
    assert steps_of(out / "requeued") == [1, 2]


@pytest.mark.parametrize("field", DIFFERENT)
def test_what_is_computed_may_not_change_with_a_resume(alone, field):
    said = alone[1][field]
    assert said.startswith(f"{field}: got {DIFFERENT[field]}; expected ")
    assert "checkpoint" in said
    assert "\n" not in said


def test_where_it_is_computed_may(alone):
    assert alone[1]["elsewhere"] == ""


# --------------------------------------------------------------------------------------------------------- two ranks, PPO-EWMA


@pytest.fixture(scope="module")
def lively(tmp_path_factory):
    """A policy whose end token is likely in some contexts: responses end by themselves, at the cap, and go on."""
    folder = make_model(tmp_path_factory.mktemp("lively") / "policy", tied=False)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][256] *= 5
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory, lively, problems):
    """Three steps of PPO-EWMA on two ranks with a progress bar, one update of the policy and one checkpoint each."""
    out = tmp_path_factory.mktemp("pair") / "run"
    more = ("--algo.run.method", "tppo-ewma", "--algo.run.progress", "true", "--algo.policy.mini_batches", "1", *EVERY_STEP, *OWN)
    shape = ("--algo.rollout.max_response_tokens", "24", "--algo.rollout.refill", "step")
    done = launch(*arguments(lively, problems, out, *more, *shape, steps=3), env=with_verifier())
    assert done.returncode == 0, done.stderr[-3000:]
    assert not ranks_left(out)
    return out, done.stderr, (*more, *shape)


LINE = re.compile(
    r"score (?P<score>[-+\d.]+), length (?P<length>\d+) \(cut (?P<cut>\d+)%, capped (?P<capped>\d+)%\), "
    r"tokens/s (?P<decoded>\d+) decoded (?P<trained>\d+) trained, idle (?P<idle>\d+)%, gap (?P<gap>\S+), explained (?P<explained>[-\d.]+)"
)


def progress_lines(said: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]", said) if line.startswith("tppo-ewma seed 0:")]


def test_the_progress_line_of_a_step_holds_the_steps_numbers(pair):
    out, said, _ = pair
    row = metrics_of(out)[-1]
    found = LINE.search(progress_lines(said)[-1])
    assert found, progress_lines(said)[-1]
    shown = {name: float(text) for name, text in found.groupdict().items()}
    share = 0.5001 / 100  # as printed, to the last digit
    assert shown["score"] == pytest.approx(row["response/score_mean"], abs=0.00501)
    assert shown["length"] == pytest.approx(row["response/length_mean"], abs=0.501)
    assert shown["cut"] / 100 == pytest.approx(row["response/cut_share"], abs=share)
    assert shown["capped"] / 100 == pytest.approx(row["response/capped_share"], abs=share)
    assert shown["decoded"] == pytest.approx(row["rollout/tokens_per_s"], abs=0.501)
    assert shown["trained"] == pytest.approx(row["policy/tokens"] / row["time/policy_s"], abs=0.501)
    assert shown["idle"] / 100 == pytest.approx(1 - row["rollout/occupancy"], abs=share)
    assert shown["gap"] == pytest.approx(row["policy/logprob_gap"], rel=0.51)  # one digit
    assert shown["explained"] == pytest.approx(row["value/explained_variance"], abs=0.00501)


def test_these_numbers_differ_from_each_other(pair):
    """Else one could stand for another in the test above."""
    row = metrics_of(pair[0])[-1]
    shares = [row["response/cut_share"], row["response/capped_share"], 1 - row["rollout/occupancy"]]
    assert all(0.02 < share < 0.98 for share in shares), shares
    assert min(abs(a - b) for a, b in ((shares[0], shares[1]), (shares[0], shares[2]), (shares[1], shares[2]))) > 0.02, shares
    assert abs(row["response/score_mean"]) < 1


def test_the_progress_line_says_how_much_time_is_left(pair):
    """After one step of three as much again twice, after the last none."""
    clock = re.compile(r"\| (\d)/3 \[(\d+):(\d\d)<(\d+):(\d\d),.* explained ")
    shown = [tuple(map(int, found.groups())) for found in map(clock.search, progress_lines(pair[1])) if found]
    (spent, left), *_ = [(60 * a + b, 60 * c + d) for step, a, b, c, d in shown if step == 1]
    assert 2 * spent <= left <= 2 * spent + 2  # whole seconds are shown
    assert shown[-1][0] == 3
    assert shown[-1][3:] == (0, 0)


def test_each_decode_step_of_an_evaluation_is_a_row_of_eval_decode_csv(pair):
    """As many tokens as the first engine's answers have: of its samples 0, 2, ... at the first step and at the last."""
    out, _, _ = pair
    with (out / "eval_decode.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "decode_step", *DecodeStep._fields]
    assert {int(row["step"]) for row in rows} == {0, 3}
    for step in (0, 3):
        here = [row for row in rows if int(row["step"]) == step]
        answers = [json.loads(line) for line in (out / f"answers-{step:08d}.jsonl").read_text().splitlines()]
        assert len(answers) == 4
        assert [int(row["decode_step"]) for row in here] == list(range(max(a["tokens"] for a in answers[::2])))
        assert sum(int(row["active"]) for row in here) == sum(a["tokens"] for a in answers[::2])
        assert int(here[0]["context_tokens"]) - int(here[0]["prefill_tokens"]) == int(here[0]["active"]) == 2
        assert all(float(row["seconds"]) > 0 for row in here)


def saved_weights(out: Path, step: int, beside: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Policy and averaged policy of a checkpoint, read by torch alone."""
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    file = beside / f"step-{step}.pt"
    dcp_to_torch_save(out / "checkpoints" / f"step-{step:08d}" / "shards", file)
    state = torch.load(file, weights_only=True)
    found = {"policy": state["policy"]["model"], "ewma": state["ewma"]}
    return {model: {name.removeprefix("hf."): t for name, t in tensors.items()} for model, tensors in found.items()}


def test_the_average_of_two_ranks_is_the_average_of_the_whole_weights(pair, lively, tmp_path):
    """average <- ((w - 1) average + policy) / w with w <- 0.9 w + 1, from the first weights and w = 1."""
    average, w = {name: t.double() for name, t in load_file(lively / "model.safetensors").items()}, 1.0
    moved = 0.0
    for row in metrics_of(pair[0]):
        assert row["policy/updates"] == 1
        found, w = saved_weights(pair[0], row["step"], tmp_path), 0.9 * w + 1
        assert found["policy"].keys() == found["ewma"].keys() == average.keys()
        for name, policy in found["policy"].items():
            average[name] = ((w - 1) * average[name] + policy.double()) / w
            assert torch.allclose(found["ewma"][name].double(), average[name], rtol=0, atol=1e-6), name  # float32, thrice rounded
            moved = max(moved, float((found["ewma"][name] - policy).abs().max()))
    assert moved > 1e-4, "average and policy are the same"


def test_the_average_after_a_resume_on_one_rank_is_the_one_before(pair, lively, problems, tmp_path):
    source, _, more = pair
    out = tmp_path / "run"
    shutil.copytree(source, out)
    resumed = arguments(lively, problems, out, *more, "--algo.run.resume", "true", ranks=1, steps=4)
    ended = in_one_process(tmp_path, {"resumed": {"arguments": resumed, "averaged": str(tmp_path / "averaged.safetensors")}})
    assert ended == {"resumed": ""}
    before, after = saved_weights(source, 3, tmp_path)["ewma"], load_file(tmp_path / "averaged.safetensors")
    assert float(after.pop("weight")) == pytest.approx(((0.9 + 1) * 0.9 + 1) * 0.9 + 1)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert steps_of(out) == [1, 2, 3, 4]
    assert metrics_of(out)[-1]["policy/updates"] == 1


def test_two_ranks_refuse_a_resume_in_one_line(pair, lively, problems):
    out, _, more = pair
    changed = ("--algo.run.resume", "true", "--reward.overlong_buffer", "8")
    one_error(
        launch(*arguments(lively, problems, out, *more, *changed, steps=4), env=with_verifier()), "reward.overlong_buffer", "8"
    )
    assert not ranks_left(out)


# --------------------------------------------------------------------------------------------------- whose the folder is


@pytest.fixture(scope="module")
def owned(tmp_path_factory, model):
    """A step; a resume on other answers under the file's old name, and on those that it had; a run in a folder that is taken; a state
    that was edited."""
    out = tmp_path_factory.mktemp("owned")
    problems, other, same = (make_problems(out / name, seed=seed) for name, seed in (("here", 0), ("other", 1), ("same", 0)))

    def run(name, *more, steps, **asked):
        return {"arguments": arguments(model, problems, out / name, *EVERY_STEP, *OWN, *more, ranks=1, steps=steps), **asked}

    resume, held = ("--algo.run.resume", "true"), own_folder(str(out / "taken"))
    with held:
        ended = in_one_process(out, {
            "begun": run("run", steps=1),
            "other prompts": run("run", *resume, steps=2, replace=[str(problems), str(other)]),
            "same prompts": run("run", *resume, steps=2, replace=[str(problems), str(same)]),
            "taken": run("taken", steps=1),
        })  # fmt: skip
    newest = complete_checkpoints(out / "run" / "checkpoints")[-1]
    rank, manifest = newest / "rank-00000.json", newest / "manifest.json"
    edited = json.loads(rank.read_text())
    edited["trainer"]["batcher"]["in_flight"].pop()
    rank.write_text(json.dumps(edited))
    written = json.loads(manifest.read_text())
    written["bytes"][rank.name], written["sha256"][rank.name] = rank.stat().st_size, file_digest(rank)
    manifest.write_text(json.dumps(written))
    return out, ended | in_one_process(out, {"edited": run("run", *resume, steps=3)})


def test_other_prompts_under_the_same_name_are_refused_and_the_same_go_on(owned):
    out, ended = owned
    assert ended["begun"] == ended["same prompts"] == ""
    assert re.match(
        r"algo\.task\.path: got other train prompts than checkpoint step-00000001 .*; expected ", ended["other prompts"]
    )
    assert steps_of(out / "run") == [1, 2]


def test_a_folder_that_another_run_writes_to_is_refused(owned):
    assert re.match(rf"algo\.run\.out: got \S+, to which process {os.getpid()} is writing; expected ", owned[1]["taken"])


def test_a_state_that_lost_a_response_is_refused_even_where_the_manifest_fits(owned):
    assert re.search(
        r"step-00000002: got ranks' states in which 8 responses were begun and 7 are accounted for; expected", owned[1]["edited"]
    )


def test_a_job_that_is_asked_to_end_while_it_starts_says_so_in_one_line(tmp_path, model, problems):
    job = subprocess.Popen([sys.executable, str(ROOT / "scale" / "launch.py"), *arguments(model, problems, tmp_path / "run", *OWN)],
                           env=with_verifier(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
    deadline = time.monotonic() + LIMIT_S
    while len(psutil.Process(job.pid).children()) < 2:
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job.terminate()
    _, said = job.communicate(timeout=60)
    assert (job.returncode, said) == (130, "stopped\n")
    assert not ranks_left(tmp_path)


# ------------------------------------------------------------------------------------------- which tokens end a response

OFTEN = list(range(0, 256, 2))  # every other byte: a response of random weights ends soon after it may


def naming(folder: Path, like: Path, ends: list[int]) -> Path:
    """The same model in a folder that names other end tokens."""
    shutil.copytree(like, folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


@pytest.fixture(scope="module")
def moved(tmp_path_factory, model, problems):
    """A run whose model's folder names every other byte as an end token, three times: as it is, with a checkpoint that does not say
    so, as they were written before, and with such a one whose model is gone. Each goes on with the same model in a folder that names
    another token, and then with the first again."""
    out = tmp_path_factory.mktemp("moved")
    named, other = naming(out / "named", model, OFTEN), naming(out / "other", model, [301])
    few = ("--algo.rollout.min_response_tokens", "3", "--algo.rollout.slots", "24", "--algo.rollout.max_response_tokens", "96")

    def run(name, policy, *more, steps):
        return {"arguments": arguments(policy, problems, out / name, *EVERY_STEP, *OWN, *few, *more, ranks=1, steps=steps)}

    assert in_one_process(out, {"kept": run("kept", named, steps=1)}) == {"kept": ""}
    for name in ("unsaid", "gone"):
        shutil.copytree(out / "kept", out / name)
        manifest = out / name / "checkpoints" / "step-00000001" / "manifest.json"
        written = json.loads(manifest.read_text())
        written.pop("end_tokens", None)
        written["config"]["algo"]["run"]["out"] = str(out / name)
        if name == "gone":
            written["config"]["algo"]["model"]["policy"] = str(out / "nowhere")
        manifest.write_text(json.dumps(written))
    resumed = {name: run(name, other, "--algo.run.resume", "true", steps=2) for name in ("kept", "unsaid", "gone")}
    again = {f"{name} again": run(name, named, "--algo.run.resume", "true", steps=3) for name in resumed}
    return out, in_one_process(out, resumed | again)


@pytest.mark.parametrize("name", ["kept", "unsaid"])
def test_a_run_that_goes_on_with_another_model_ends_responses_as_it_began(moved, name):
    out, ended = moved
    assert ended[name] == ended[f"{name} again"] == ""
    rows = [row for row in responses_of(out / name) if row["step"] == "2"]
    assert len(rows) > 20, "of 24 slots and windows of 16 tokens"
    assert {row["end"] for row in rows} == {"END_TOKEN"}
    assert all(row["policy/logprob_gap"] < 1e-4 for row in metrics_of(out / name)), "the policy forbids other tokens"


def test_where_nobody_knows_what_a_run_began_with_the_model_that_is_there_says_it_and_is_kept_to(moved):
    out, ended = moved
    assert ended["gone"] == ended["gone again"] == ""
    assert len([row for row in responses_of(out / "gone") if row["step"] in ("2", "3")]) < 10, "by two tokens of 512"
    newest = complete_checkpoints(out / "gone" / "checkpoints")[-1]
    assert json.loads((newest / "manifest.json").read_text())["end_tokens"] == [256, 301]


def test_an_export_ends_responses_as_its_run_whatever_model_is_given(moved, problems):
    out, _ = moved
    done = launch("export", *arguments(out / "other", problems, out / "kept", *OWN, ranks=1), env=with_verifier())
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((out / "kept/export/policy/generation_config.json").read_text())["eos_token_id"] == [256, *OFTEN]


# -------------------------------------------------------------------------------------------------------------- how a run ends


@pytest.fixture(scope="module")
def killed_at_once(tmp_path_factory, model, problems):
    """Two ranks that save at every third step; the whole job is killed in step 6."""
    out = tmp_path_factory.mktemp("killed") / "run"
    command = arguments(model, problems, out, "--algo.run.checkpoint_every", "3", *OWN, steps=9)
    job = subprocess.Popen([sys.executable, str(PLANTED), *command], env=with_verifier(PLANT="stall 0 6"), cwd=ROOT,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
    try:
        deadline = time.monotonic() + LIMIT_S
        while len(list(out.glob("stalled-*"))) < 2:
            assert job.poll() is None, job.communicate()[1][-3000:]
            assert time.monotonic() < deadline, "step 6 was not reached"
            time.sleep(0.1)
    finally:
        for process in [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)] if job.poll() is None else []:
            process.kill()
        job.communicate()
    assert not ranks_left(out)
    return out


def test_a_finished_write_becomes_a_checkpoint_without_another_save(killed_at_once):
    from scale.checkpoint import read_manifest

    assert [row["step"] for row in metrics_of(killed_at_once)] == [1, 2, 3, 4, 5]
    assert steps_of(killed_at_once) == [3]
    assert read_manifest(killed_at_once / "checkpoints" / "step-00000003")["world"]["world"] == 2
    assert list((killed_at_once / "checkpoints").glob(".unfinished-*")) == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_fails_in_mid_step_ends_the_job_with_its_own_cause(rank, tmp_path, model, problems):
    """A checkpoint was begun in the step before: the failing rank must not wait for the others to finish it."""
    out = tmp_path / "run"
    command = arguments(model, problems, out, "--algo.run.checkpoint_every", "2", "--cluster.timeout_s", "120", *OWN, steps=9)
    job = subprocess.Popen([sys.executable, str(PLANTED), *command], env=with_verifier(PLANT=f"raise {rank} 3"), cwd=ROOT,
                           stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)  # fmt: skip
    begun = out / "checkpoints"
    try:
        deadline = time.monotonic() + LIMIT_S
        while not list(begun.glob("*step-00000002")):
            assert job.poll() is None, job.communicate()[1][-3000:]
            assert time.monotonic() < deadline, "step 2 was not saved"
            time.sleep(0.05)
        saved_at = time.monotonic()
        _, said = job.communicate(timeout=150)
        took = time.monotonic() - saved_at
    finally:
        job.kill()
    assert took < 30
    assert job.returncode == 1
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert errors == ["error: ZeroDivisionError: a planted mistake"]
    assert [row["step"] for row in metrics_of(out)] == [1, 2]
    assert not ranks_left(out)


# ------------------------------------------------------------------------------------------------------ the config as it stands


def test_the_dry_run_of_the_tiny_config_needs_no_model_and_leaves_nothing(tmp_path):
    done = launch("--config", str(TINY_CONFIG), "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "FITS" in done.stdout
    assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_two_ranks_of_the_tiny_config_make_its_base_model_once(tmp_path):
    cache = tmp_path / "cache"
    done = launch("--config", str(TINY_CONFIG), "--engine.kind", "torch", "--algo.model.warm_start_steps", "3", "--algo.run.steps", "1",
                  "--algo.run.cache", str(cache), "--algo.run.out", str(tmp_path / "run"), "--algo.run.eval_prompts", "2")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (folder,) = cache.iterdir()
    assert folder.name.startswith("chain-")
    assert done.stderr.count("warm start of chain:   0%") == 1, "both ranks made it"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["algo"]["model"]["policy"] == str(folder)
    assert [row["step"] for row in metrics_of(tmp_path / "run")] == [1]
    assert not ranks_left(tmp_path)
