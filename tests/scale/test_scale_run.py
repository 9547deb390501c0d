"""Whole runs of scale/launch.py: the bridge to tppo_ref, ranks and groups, a killed rank, restarts, errors, end to end.

Most runs decode with engine.kind torch, which starts faster and gives the same tokens on the same ranks; those that are about vLLM
are in their own fixtures and need it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
    launch,
    make_model,
    make_school,
    metrics_of,
    one_error,
    ranks_left,
    require,
    responses_of,
    shared_data,
    step_of,
    truncate_a_shard,
)

from tppo_ref.runs.checkpoint import complete_checkpoints

require("math_verify", "the verifier of these runs")


# -------------------------------------------------------------------------------------------------------------- the bridge


def cross(folder, problems, kind):
    """tppo_ref's metrics and scale's, step by step."""
    from tppo_ref.rollout.models import load_value_model

    make_model(folder / "policy", tied=True, head_std=0.1)
    load_value_model(str(folder / "policy"), seed=4).save_pretrained(folder / "value")
    done = subprocess.run([sys.executable, str(HERE / "bridge_worker.py"), str(folder / "policy"), str(folder / "value"), str(problems),
                           str(folder / "out"), "5", kind], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("FOUND ")).removeprefix("FOUND "))
    return found["ref"], found["scale"]


@pytest.fixture(scope="module")
def bridge(tmp_path_factory, problems):
    return cross(tmp_path_factory.mktemp("bridge"), problems, "torch")


@pytest.fixture(scope="module")
def vllm_bridge(needs_vllm, tmp_path_factory, problems):
    return cross(tmp_path_factory.mktemp("vllm_bridge"), problems, "vllm")


@pytest.mark.parametrize("step", range(5))
def test_the_losses_of_what_vllm_sampled_are_those_of_tppo_ref_on_the_same_tokens(vllm_bridge, step):
    ref, scale = (side[step] for side in vllm_bridge)
    assert scale["tokens"] == ref["tokens"]
    assert scale["policy/logprob_gap"] < 1e-3
    for name in ("policy/loss", "policy/lm_loss", "policy/kl", "policy/grad_norm", "policy/logprob_gap", "value/loss",
                 "value/explained_variance", "value/grad_norm", "advantage/mean", "advantage/std", "ledger/trained"):  # fmt: skip
        assert scale.get(name, 0.0) == pytest.approx(ref.get(name, 0.0), rel=1e-3, abs=1e-5, nan_ok=True), name


def test_the_bridge_to_vllm_crosses_something(vllm_bridge):
    _, scale = vllm_bridge
    assert any(begin > 0 for row in scale for _, begin, *_ in row["tokens"]), "no response was continued"
    assert all(row["policy/grad_norm"] > 0 for row in scale[1:])
    assert any((row["value/grad_norm"] or 0) > 0 for row in scale)
    assert all(row["policy/logprob_gap"] > 0 for row in scale), "another engine than the trainer's own rounds differently"


@pytest.mark.parametrize("step", range(5))
def test_scale_on_one_rank_samples_the_tokens_that_tppo_ref_samples(bridge, step):
    ref, scale = bridge
    assert scale[step]["tokens"] == ref[step]["tokens"]
    assert len(ref[step]["tokens"]) >= 6


@pytest.mark.parametrize("step", range(5))
def test_scale_on_one_rank_has_the_losses_and_metrics_of_tppo_ref(bridge, step):
    ref, scale = (side[step] for side in bridge)
    assert set(ref) == set(scale)
    for name, number in ref.items():
        if name == "tokens" or name.startswith(("time/", "rollout/tokens_per_s", "rollout/idle")):
            continue
        assert scale[name] == pytest.approx(number, rel=1e-4, abs=1e-6, nan_ok=True), name


def test_the_bridge_crosses_something(bridge):
    """Rows were cut and continued, the policy learned after its warm-up, and the value model too."""
    ref, _ = bridge
    assert any(row["response/cut_share"] > 0 for row in ref)
    assert any(begin > 0 for row in ref for _, begin, *_ in row["tokens"])
    assert ref[0]["policy/updates"] == 0
    assert all(row["policy/grad_norm"] > 0 for row in ref[1:])
    assert any((row["value/grad_norm"] or 0) > 0 for row in ref)


# ------------------------------------------------------------------------------------- a restart, a planted clash of names


@pytest.fixture(scope="module")
def clash(tmp_path_factory):
    """Modules named as scale's own files (and one that Python's own library has), which must not be imported."""
    folder = tmp_path_factory.mktemp("clash")
    for file in (ROOT / "scale").glob("*.py"):
        (folder / file.name).write_text("raise ImportError('a planted module was imported')\n")
    (folder / "__init__.py").unlink()
    return folder


@pytest.fixture(scope="module")
def halves(tmp_path_factory, model, problems, clash):
    """3 + 3 steps with a restart between, and 6 in one go, on the same two ranks. The second half has the clash first on its path."""
    out = tmp_path_factory.mktemp("halves")
    common = ("--algo.run.checkpoint_every", "3", "--algo.run.checkpoints_kept", "9")
    for name, steps, more, env in (
        ("whole", 6, (), environment()),
        ("halves", 3, (), environment()),
        ("halves", 6, ("--algo.run.resume", "true"), environment(PYTHONPATH=f"{clash}{os.pathsep}{ROOT}")),
    ):
        done = launch(*arguments(model, problems, out / name, *common, *more, steps=steps), env=env, cwd=clash if more else ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
        assert not ranks_left(out / name)
    return out


def test_a_run_that_was_restarted_is_the_run_that_was_not(halves):
    a, b = metrics_of(halves / "whole"), metrics_of(halves / "halves")
    assert len(a) == len(b) == 6
    for one, other in zip(a, b, strict=True):
        assert one.keys() == other.keys()
        for name, number in one.items():
            if not name.startswith(("time/", "rollout/tokens_per_s", "rollout/idle")):  # None: a mean of nothing
                assert other[name] == (None if number is None else pytest.approx(number, rel=1e-5, abs=1e-6)), (one["step"], name)


def test_its_responses_and_its_checkpoint_are_the_same(halves):
    def rows(name):
        return [{k: v for k, v in r.items() if k != "train_s"} for r in responses_of(halves / name)]

    assert rows("whole") == rows("halves") != []
    a, b = (complete_checkpoints(halves / name / "checkpoints")[-1] for name in ("whole", "halves"))
    assert a.name == b.name == "step-00000006"
    one, other = in_flight(a), in_flight(b)
    assert one.keys() == other.keys() != set()
    for id, response in one.items():
        assert response["token_ids"] == other[id]["token_ids"]
        assert response["versions"] == other[id]["versions"]
        assert response["window_starts"] == other[id]["window_starts"]


def test_the_conservation_law_holds_on_two_ranks_through_a_restart(halves):
    for name in ("whole", "halves"):
        rows = check_conservation(halves / name)
        assert sum(row["response/ended"] for row in rows) == len(responses_of(halves / name))
        check_no_response_twice(halves / name)


def test_the_names_of_scales_files_may_stand_first_on_the_path(halves):
    """The second half of `halves` ran from a folder of modules that raise when they are imported."""
    assert len(metrics_of(halves / "halves")) == 6


# ------------------------------------------------------------------------------------------------------------ kill -9


@pytest.fixture(scope="module")
def killed(tmp_path_factory, model, problems):
    """A run of two ranks of which one is killed in the middle of a step, after its second checkpoint."""
    out = tmp_path_factory.mktemp("killed") / "run"
    command = arguments(
        model, problems, out, *HELD, "--algo.run.checkpoint_every", "2", "--algo.run.checkpoints_kept", "9", steps=10_000
    )
    with (out.parent / "stderr").open("w") as stderr:
        launcher = subprocess.Popen(
            [sys.executable, str(LAUNCH), *command], env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr
        )
        try:
            deadline = time.monotonic() + LIMIT_S
            while len(complete_checkpoints(out / "checkpoints")) < 2:
                assert launcher.poll() is None, (out.parent / "stderr").read_text()[-3000:]
                assert time.monotonic() < deadline, "no checkpoint in time"
                time.sleep(0.05)
            ranks = [p for p in psutil.Process(launcher.pid).children() if "launch.py" in " ".join(p.cmdline())]
            assert len(ranks) == 2
            victim = next(p for p in ranks if p.environ().get("RANK") == "1")
            victim.send_signal(signal.SIGKILL)
            begin = time.monotonic()
            launcher.wait(timeout=60)
            took = time.monotonic() - begin
        finally:
            launcher.kill()
    time.sleep(1)
    return out, launcher.returncode, took, (out.parent / "stderr").read_text(), ranks_left(out)


def test_a_killed_rank_ends_the_job_within_a_minute_and_leaves_nobody(killed):
    _, code, took, _, left = killed
    assert code not in (0, None)
    assert took < 60
    assert left == []


def test_a_killed_rank_is_told_in_one_clear_line(killed):
    errors = [line for line in killed[3].splitlines() if "error" in line.lower()]
    assert len(errors) == 1, killed[3][-2000:]
    assert "rank 1" in errors[0]
    assert "SIGKILL" in errors[0]
    assert "resume" in errors[0]
    assert "Traceback" not in killed[3]


def test_the_checkpoint_of_a_killed_job_is_good(killed):
    from scale.checkpoint import read_manifest

    newest = complete_checkpoints(killed[0] / "checkpoints")[-1]
    assert read_manifest(newest)["world"]["world"] == 2
    assert in_flight(newest)


@pytest.fixture(scope="module", params=[2, 1, 4])
def resumed(request, killed, model, problems):
    """The killed job of two ranks, gone on with on as many, on one and on four."""
    source, ranks = killed[0], request.param
    out = source.parent / f"resumed-{ranks}"
    shutil.copytree(source, out)
    newest = complete_checkpoints(out / "checkpoints")[-1]
    steps = step_of(newest) + 5  # window 16, cap 48: three windows end every response
    before = in_flight(newest)
    ended_before = ended_by(source, step_of(newest))
    done = launch(
        *arguments(
            model,
            problems,
            out,
            *HELD,
            "--algo.run.resume",
            "true",
            "--algo.run.checkpoint_every",
            "1",
            "--algo.run.checkpoints_kept",
            "9",
            ranks=ranks,
            steps=steps,
        )
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out, newest, before, ended_before


def test_every_in_flight_response_goes_on_and_none_ends_twice(resumed):
    check_every_response_goes_on(*resumed)


def test_no_sample_number_is_skipped_after_a_restart(resumed):
    check_no_sample_skipped(resumed[0])


def test_the_ledger_goes_on_from_the_checkpoint(resumed):
    check_conservation(resumed[0])
    check_no_response_twice(resumed[0])


def test_every_ended_response_trains_the_value_model_once_or_is_held(resumed):
    out, newest, *_ = resumed
    rows = metrics_of(out)
    ended = len(responses_of(out))
    assert sum(row["value/responses"] for row in rows) + rows[-1]["value/held"] == ended
    at = next(row for row in rows if row["step"] == step_of(newest))
    held = [r["id"] for file in newest.glob("rank-*.json") for r in json.loads(file.read_text())["trainer"]["held"]]
    assert at["value/held"] == len(held) == len(set(held))
    assert any(row["value/held"] > 0 for row in rows), "nothing was ever held"


def test_continued_tokens_are_those_of_the_checkpoint(resumed):
    out, newest, before, _ = resumed
    check_tokens_kept(out, newest, before)


# --------------------------------------------------------------------------------------------------------------- errors


def test_a_truncated_shard_is_named_with_its_sizes_and_the_remedy(killed, model, problems):
    out = killed[0].parent / "truncated"
    shutil.copytree(killed[0], out)
    newest = complete_checkpoints(out / "checkpoints")[-1]
    truncate_a_shard(newest)
    done = launch(*arguments(model, problems, out, *HELD, "--algo.run.resume", "true"))
    one_error(done, newest.name, "distcp", "bytes", "remove this folder")
    assert not ranks_left(out)


def test_a_changed_rank_file_is_refused(killed, model, problems):
    out = killed[0].parent / "changed"
    shutil.copytree(killed[0], out)
    newest = complete_checkpoints(out / "checkpoints")[-1]
    file = newest / "rank-00001.json"
    file.write_text(file.read_text().replace('"score": null', '"score": 1.00', 1))
    one_error(launch(*arguments(model, problems, out, "--algo.run.resume", "true", ranks=1)), newest.name, "rank-00001.json")
    assert not ranks_left(out)


def test_a_run_is_never_overwritten(killed, model, problems):
    one_error(launch(*arguments(model, problems, killed[0])), "resume", str(killed[0]))


def test_a_missing_model_folder(tmp_path, problems):
    one_error(launch(*arguments(tmp_path / "nowhere", problems, tmp_path / "out")), "nowhere")
    assert not ranks_left(tmp_path)


def test_a_model_folder_whose_weights_are_cut_short(tmp_path, problems, model):
    folder = tmp_path / "cut"
    shutil.copytree(model, folder)
    file = next(folder.glob("*.safetensors"))
    with file.open("r+b") as f:
        f.truncate(file.stat().st_size // 2)
    one_error(launch(*arguments(folder, problems, tmp_path / "out")), "cut")
    assert not ranks_left(tmp_path)


def test_a_tokenizer_that_is_too_large_for_the_model(tmp_path, problems):
    small = make_model(tmp_path / "small", tied=False, vocab=100, end=1)
    one_error(launch(*arguments(small, problems, tmp_path / "out")), "vocabulary", "100", "small")
    assert not ranks_left(tmp_path)


def test_slots_that_cannot_be_dealt_to_the_engines(tmp_path, model, problems):
    one_error(launch(*arguments(model, problems, tmp_path / "out", "--algo.rollout.slots", "7")), "slots", "7", "2")
    assert not ranks_left(tmp_path)


def test_ranks_that_cannot_be_cut_into_groups(tmp_path, model, problems):
    one_error(launch(*arguments(model, problems, tmp_path / "out", "--engine.tensor_parallel", "3")), "tensor_parallel", "3", "2")


def test_a_folder_that_cannot_be_made(tmp_path, model, problems):
    (tmp_path / "file").write_text("")
    one_error(launch(*arguments(model, problems, tmp_path / "file" / "out", ranks=1)), "out")
    assert not ranks_left(tmp_path)


def test_a_prompt_file_that_is_not_there(tmp_path, model):
    one_error(launch(*arguments(model, tmp_path / "none.jsonl", tmp_path / "out", ranks=1)), "none.jsonl")


def test_an_unknown_key_names_the_nearest(tmp_path, model, problems):
    one_error(
        launch(*arguments(model, problems, tmp_path / "out", "--engine.tensor_paralel", "2")),
        "did you mean engine.tensor_parallel?",
    )


def test_tensor_parallelism_that_does_not_divide_the_heads(tmp_path, problems, needs_vllm):
    odd = make_model(tmp_path / "odd", tied=False, hidden_size=96, num_attention_heads=3, num_key_value_heads=3)
    one_error(launch(*arguments(odd, problems, tmp_path / "out", "--engine.tensor_parallel", "2", kind="vllm")), "odd", "2")
    assert not ranks_left(tmp_path)


def test_a_full_disk_at_a_checkpoint_is_one_line_and_ends_the_run(tmp_path, model, problems):
    """No file may grow beyond 400 kB: metrics fit, shards do not."""
    out = tmp_path / "out"
    command = [sys.executable, str(LAUNCH), *arguments(model, problems, out, "--algo.run.checkpoint_every", "1")]
    done = subprocess.run(["bash", "-c", 'ulimit -f 400; exec "$@"', "bash", *command], env=environment(), cwd=ROOT, capture_output=True, text=True,
                          timeout=LIMIT_S)  # fmt: skip
    one_error(done, "checkpoint", "cannot write", "step-00000001")
    assert complete_checkpoints(out / "checkpoints") == []
    assert not ranks_left(out)


def test_ctrl_c_once_ends_at_a_steps_edge_with_a_checkpoint(tmp_path, model, problems):
    out = tmp_path / "out"
    command = [sys.executable, str(LAUNCH), *arguments(model, problems, out, steps=10_000)]
    launcher = subprocess.Popen(command, env=environment(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + LIMIT_S
        while not (out / "responses.csv").exists() or not metrics_of(out):
            assert launcher.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        launcher.send_signal(signal.SIGINT)
        _, said = launcher.communicate(timeout=120)
    finally:
        launcher.kill()
    assert launcher.returncode == 130, said[-2000:]
    assert "Traceback" not in said
    newest = complete_checkpoints(out / "checkpoints")[-1]
    assert step_of(newest) == metrics_of(out)[-1]["step"]
    lines = [line for line in said.splitlines() if line.startswith("stopped")]
    assert lines == [f"stopped: {newest} holds everything; go on with: the same command and --algo.run.resume true"]
    assert not ranks_left(out)


def test_ranks_leave_with_a_launcher_that_was_killed(tmp_path, model, problems):
    out = tmp_path / "out"
    launcher = subprocess.Popen([sys.executable, str(LAUNCH), *arguments(model, problems, out, steps=10_000)], env=environment(), cwd=ROOT,
                                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        deadline = time.monotonic() + LIMIT_S
        while not (out / "responses.csv").exists():
            assert launcher.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert len(ranks_left(out)) >= 3
    finally:
        launcher.kill()
        launcher.wait()
    deadline = time.monotonic() + 60
    while ranks_left(out) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert ranks_left(out) == []


def test_a_critic_of_another_size_trains_and_goes_on_from_its_checkpoint(tmp_path, model, problems):
    """A policy's folder, a quarter of the width: its backbone under a new head, sharded on two ranks, saved, restored, exported."""
    from transformers import AutoModelForTokenClassification

    small = make_model(
        tmp_path / "small", tied=True, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    )
    more = ("--algo.model.value", str(small), "--algo.run.method", "tppo-once", "--algo.value.warmup_steps", "0")
    for steps, resume in ((2, "false"), (4, "true")):
        done = launch(*arguments(model, problems, tmp_path / "out", *more, "--algo.run.resume", resume, steps=steps))
        assert done.returncode == 0, done.stderr[-2000:]
    rows = metrics_of(tmp_path / "out")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert any((row["value/grad_norm"] or 0) > 0 for row in rows[2:])
    done = launch("export", *arguments(model, problems, tmp_path / "out", *more))
    assert done.returncode == 0, done.stderr[-2000:]
    exported = AutoModelForTokenClassification.from_pretrained(tmp_path / "out" / "export" / "value")
    assert exported.config.hidden_size == 32
    odd = make_model(tmp_path / "odd", tied=True, vocab=100, end=1, hidden_size=32, num_attention_heads=1, num_key_value_heads=1)
    done = launch(*arguments(model, problems, tmp_path / "refused", "--algo.model.value", str(odd)))
    one_error(done, "algo.model.value: got", "a vocabulary of 100 tokens")


# --------------------------------------------------------------------------------------------------- vLLM: groups of ranks


@pytest.fixture(scope="module")
def groups(needs_vllm, tmp_path_factory, model, problems):
    """One engine of eight slots, on one rank, on a tensor-parallel group of two, and on two that share each row as well. One mini-batch:
    which rows share one depends on ranks."""
    out = tmp_path_factory.mktemp("groups")
    for name, ranks, more in (("tp1", 1, ()), ("tp2", 2, ()), ("cp2", 2, ("--sharding.context_parallel", "2"))):
        done = launch(*arguments(model, problems, out / name, "--engine.tensor_parallel", str(ranks), "--algo.policy.mini_batches", "1", *more,
                                 "--algo.value.mini_batches", "1", "--algo.policy.lr", "1e-5", "--algo.value.lr", "1e-5", kind="vllm", ranks=ranks, steps=4))  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        assert not ranks_left(out)
    return out


@pytest.mark.parametrize("several", ["tp2", "cp2"])
def test_a_tensor_parallel_group_samples_the_tokens_of_one_rank(groups, several):
    one, two = (in_flight(complete_checkpoints(groups / name / "checkpoints")[-1]) for name in ("tp1", several))
    assert {id: r["token_ids"] for id, r in one.items()} == {id: r["token_ids"] for id, r in two.items()} != {}

    def rows(name):
        return sorted(
            (int(r["step"]), int(r["response"]), int(r["prompt"]), int(r["tokens"]), r["end"], float(r["score"]))
            for r in responses_of(groups / name)
        )

    assert rows("tp1") == rows(several) != []


@pytest.mark.parametrize("several", ["tp2", "cp2"])
def test_each_response_of_a_group_is_trained_once(groups, several):
    a, b = (check_conservation(groups / name) for name in ("tp1", several))
    for one, two in zip(a, b, strict=True):
        for name in (
            "ledger/generated",
            "ledger/trained",
            "ledger/excluded_tail",
            "ledger/pending",
            "response/rows",
            "response/ended",
        ):
            assert one[name] == two[name], name
        for name in ("policy/loss", "value/loss", "policy/grad_norm", "value/grad_norm"):
            assert (two[name] is None) == (one[name] is None), name  # NaN, in JSON: a step without an update
            assert one[name] is None or two[name] == pytest.approx(one[name], rel=2e-3, abs=1e-5), name


def test_the_ranks_of_a_group_share_its_responses(groups):
    shares = [
        json.loads(f.read_text())["trainer"]["batcher"]["in_flight"]
        for f in sorted((groups / "tp2").glob("checkpoints/step-*4/rank-*.json"))
    ]
    assert len(shares) == 2
    assert all(shares), "one rank trains everything"


# ----------------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def school(tmp_path_factory, problems):
    return make_school(tmp_path_factory.mktemp("school") / "school", problems)


@pytest.fixture(scope="module")
def end_to_end(needs_vllm, tmp_path_factory, school):
    """Value pre-training, 20 steps of T-PPO with two vLLM engines, evaluation, export, reload: on GSM8K where it is at hand."""
    out = tmp_path_factory.mktemp("whole")

    def command(name: str, model: Path, *more: str, tokenizer: Path = school.tokenizer, **options: Any) -> Any:
        folder, own = {"train": "run", "export": "run"}.get(name, name), ("--algo.task.tokenizer", str(tokenizer))
        return launch(name, *arguments(model, school.problems, out / folder, *own, *more, **options))

    said = {
        "pretrain-value": command("pretrain-value", school.model, "--algo.value.pretrain_responses", "16"),
        "train": command("train", school.model, "--algo.model.value", str(out / "pretrain-value/value"), kind="vllm", steps=20),
    }
    said["export"] = command("export", school.model)
    exported = out / "run/export/policy"
    said["evaluate"] = command("evaluate", exported, tokenizer=exported, kind="vllm", ranks=1)
    for name, done in said.items():
        assert done.returncode == 0, (name, done.stderr[-3000:])
    assert not ranks_left(out)
    return out, said


def test_end_to_end_begins_with_a_model_and_a_tokenizer_that_have_read_the_problems(school):
    assert school.source == ("gsm8k_train.jsonl" if shared_data() else "problems.jsonl")
    assert sum(school.losses[-5:]) < 0.8 * sum(school.losses[:5])


def test_end_to_end_every_command_says_where_its_results_are(end_to_end):
    out, said = end_to_end
    assert str(out / "pretrain-value/value") in said["pretrain-value"].stdout
    assert "checkpoints" in said["train"].stdout
    assert str(out / "run/export/policy") in said["export"].stdout
    assert "eval/avg_at_k" in said["evaluate"].stdout


def test_end_to_end_two_engines_keep_the_conservation_law(end_to_end):
    out, _ = end_to_end
    rows = check_conservation(out / "run")
    assert len(rows) == 20
    check_no_response_twice(out / "run")
    assert all(row["policy/logprob_gap"] < 1e-3 for row in rows if row["policy/logprob_gap"] == row["policy/logprob_gap"])


def test_end_to_end_the_value_model_came_from_pre_training(end_to_end):
    from transformers import AutoModelForTokenClassification

    out, _ = end_to_end
    value = AutoModelForTokenClassification.from_pretrained(out / "pretrain-value/value")
    assert value.config.num_labels == 1
    assert json.loads((out / "run/config.json").read_text())["algo"]["model"]["value"] == str(out / "pretrain-value/value")


def test_end_to_end_the_export_loads_in_transformers_and_is_the_trained_policy(end_to_end, school):
    import torch
    from transformers import AutoModelForCausalLM

    out, _ = end_to_end
    trained = AutoModelForCausalLM.from_pretrained(out / "run/export/policy").state_dict()
    start = AutoModelForCausalLM.from_pretrained(school.model).state_dict()
    assert trained.keys() == start.keys()
    moved = {name: float((trained[name] - start[name]).abs().max()) for name in start}
    assert max(moved.values()) > 1e-4
    assert all(torch.isfinite(t).all() for t in trained.values())


def test_end_to_end_vllm_serves_the_export_and_evaluates_it(end_to_end):
    """`evaluate` ran on the exported folder, on another number of ranks, and agrees with the run's own last evaluation."""
    out, _ = end_to_end
    found = json.loads((out / "evaluate/evaluation.json").read_text())
    rows = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "eval/accuracy" in row][-1]
    assert 0 <= found["eval/avg_at_k"] <= found["eval/pass_at_k"] <= 1
    for name in ("eval/accuracy", "eval/length_mean", "eval/capped_share", "eval/pass_at_k"):
        assert found[name] == pytest.approx(last[name]), name
    answers = [json.loads(line) for line in (out / "evaluate/answers.jsonl").read_text().splitlines()]
    assert len(answers) == 4
    assert {"prompt", "response", "answer", "score"} <= answers[0].keys()
