"""Training without a value model on ranks: groups whose responses lie on several engines, a restart on another number of ranks, export
and dry run. That a step is the oracle's is in test_whole_step_on_ranks.py."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from scale_helpers import (
    HERE,
    ROOT,
    TINY_CONFIG,
    arguments,
    check_conservation,
    check_no_response_twice,
    environment,
    launch,
    one_error,
    require,
    responses_of,
    step_of,
)
from torch.distributed.checkpoint import FileSystemReader

from scale.config import ScaleConfig, check
from scale.memory.budget import host_bytes, problems, terms_per_phase
from scale.memory.dryrun import as_json, judge
from scale.memory.remedies import _kinds
from tppo_ref.method.errors import UserError
from tppo_ref.runs.checkpoint import complete_checkpoints
from tppo_ref.runs.parsing import replace_fields

require("math_verify", "the verifier of these runs")

SIZE = 4
RLOO = ("--algo.run.method", "rloo-window", "--algo.rollout.samples_per_prompt", str(SIZE), "--algo.task.verifier",
        "parity_verifier:verify", "--algo.run.checkpoint_every", "1", "--algo.run.checkpoints_kept", "99")  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory, model, problems):
    """The arguments of a short run, under a config that names no field of a value model."""
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    tree = yaml.safe_load(TINY_CONFIG.read_text())
    del tree["algo"]["value"]
    file.write_text(yaml.safe_dump(tree))

    def of(out: Path, *more: str, **options: int) -> list[str]:
        _, _, *fields = arguments(model, problems, out, *RLOO, *more, **options)  # which come after the config they change
        return ["--config", str(file), *fields]

    return of


def run(*words: str):
    return launch(*words, env=environment(PYTHONPATH=f"{ROOT}{os.pathsep}{HERE}"))


def held_in(checkpoint: Path) -> list[dict]:
    return [r for file in sorted(checkpoint.glob("rank-*.json")) for r in json.loads(file.read_text())["trainer"]["held_groups"]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, words):
    """Five steps on two ranks, then five on one, from a checkpoint that holds groups."""
    out = tmp_path_factory.mktemp("rloo") / "run"
    done = run(*words(out, steps=5))
    assert done.returncode == 0, done.stderr[-3000:]
    before = complete_checkpoints(out / "checkpoints")[-1]
    done = run(*words(out, "--algo.run.resume", "true", ranks=1, steps=10))
    assert done.returncode == 0, done.stderr[-3000:]
    return out, before


def test_groups_over_two_ranks_and_a_restart_on_one_lose_no_token_and_train_each_response_once(trained):
    out, before = trained
    rows = check_conservation(out)
    check_no_response_twice(out)
    assert [row["step"] for row in rows] == list(range(1, 11))
    held = {row["step"]: (row["ledger/held_groups"], row["ledger/held_responses"]) for row in rows}
    for checkpoint in complete_checkpoints(out / "checkpoints"):
        ids = [r["id"] for r in held_in(checkpoint)]
        assert len(set(ids)) == len(ids)
        assert held[step_of(checkpoint)] == (len({id // SIZE for id in ids}), len(ids))
    at = {r["id"] for r in held_in(before)}
    assert at, "nothing was held when the ranks changed"
    still = {r["id"] for r in held_in(complete_checkpoints(out / "checkpoints")[-1])}
    assert at - still, "none of them has trained since"
    ended = {int(row["response"]): int(row["tokens"]) for row in responses_of(out)}
    assert rows[-1]["ledger/trained"] == sum(tokens for id, tokens in ended.items() if id not in still)
    groups = {id // SIZE for id in ended.keys() - still}
    assert ended.keys() - still == {id for group in groups for id in range(group * SIZE, (group + 1) * SIZE)}, "a group in part"
    assert any(row["policy/updates"] > 0 and row["policy/grad_norm"] > 0 for row in rows)
    assert all(row["value/updates"] == 0 and row["value/lr"] is None for row in rows)


def test_the_checkpoint_has_no_value_model_and_neither_has_the_export(trained, words):
    out, before = trained
    names = {name.partition(".")[0] for name in FileSystemReader(before / "shards").read_metadata().state_dict_metadata}
    assert names == {"policy"}
    done = run("export", *words(out))
    assert done.returncode == 0, done.stderr[-3000:]
    assert [folder.name for folder in (out / "export").iterdir()] == ["policy"]
    assert (out / "export" / "policy" / "config.json").exists()
    assert "value" not in done.stdout


def test_what_needs_a_value_model_is_refused_in_one_line(tmp_path, words):
    one_error(
        run(*words(tmp_path / "a", "--algo.model.value", "some/folder")), "algo.model.value: got some/folder; expected it left out"
    )
    one_error(run(*words(tmp_path / "b", "--algo.value.lr", "1e-4")), "algo.value.lr: got 0.0001; expected it left out")
    one_error(run("pretrain-value", *words(tmp_path / "c")), "algo.advantage.estimator: got rloo; expected egae")


def test_the_dry_run_counts_no_value_model(model):
    fields = {"algo.model.policy": str(model), "algo.rollout.samples_per_prompt": 4, "algo.rollout.max_response_tokens": 200,
              "algo.rollout.window": 64, "algo.task.max_prompt_tokens": 40, "cluster.devices_per_node": 2}  # fmt: skip
    with_one = check(replace_fields(ScaleConfig(), fields | {"algo.run.method": "partial-is"}))
    without = check(replace_fields(ScaleConfig(), fields | {"algo.run.method": "rloo-window"}))
    theirs, ours = terms_per_phase(with_one), terms_per_phase(without)
    assert theirs.keys() - ours.keys() == {"value_forward", "value_update"}
    for phase, found in ours.items():
        assert found == {term: num_bytes for term, num_bytes in theirs[phase].items() if term != "value_state"}
    assert all("value_state" in found for found in theirs.values())
    assert host_bytes(without) < 0.6 * host_bytes(with_one)
    assert as_json(without, judge(without), None)["model"]["num_value_parameters"] == 0
    crowded = replace_fields(without, {"cluster.device_bytes": 1e6, "algo.policy.micro_batch_tokens": 100_000})
    assert problems(crowded)
    assert not any("value" in line for line in problems(crowded))
    kinds = list(_kinds(crowded))
    assert any("algo.policy.micro_batch_tokens" in kind for kind in kinds)
    assert not any("value" in field for kind in kinds for field in kind)


def test_a_group_size_of_one_is_refused_on_a_cluster_too():
    fields = {"algo.advantage.estimator": "rloo", "algo.policy.train_on": "ended"}
    with pytest.raises(UserError, match=r"^algo.rollout.samples_per_prompt: got 1; expected at least 2"):
        check(replace_fields(ScaleConfig(), fields))
