"""The shipped configs: they parse, hold together and fit; their marks are honest; mistakes are one line and exit code 2."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scale import launch
from scale.config import CANCELLED, IMPOSSIBLE, ScaleConfig, check, check_ranks
from scale.docs_pages import cluster_markdown
from scale.memory import budget as memory
from tppo_ref.method.errors import UserError
from tppo_ref.runs.parsing import field_paths, get_field, parse, replace_fields

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "scale" / "configs"
BIG = ("qwen2.5-32b-port", "qwen2.5-32b-math", "qwen2.5-7b-math", "qwen2.5-1.5b-math")
"""The port's numbers first; the others are the planner's (tests/test_best.py)."""
MARK = re.compile(r"\[([SPRV2IMO])\]$")

PAPER = {  # read in the port, stated by the paper: docs/config.md
    "algo.rollout.slots": 8192, "algo.rollout.samples_per_prompt": 16, "algo.rollout.window": 8192,
    "algo.rollout.max_response_tokens": 24576, "algo.rollout.refill": "immediate", "algo.advantage.gamma": 1.0,
    "algo.advantage.lam": 0.95, "algo.advantage.lam_alpha": 0.05,
    "algo.advantage.cut_value": "previous", "algo.advantage.tail": "exclude", "algo.advantage.tail_tokens": 8,
    "algo.advantage.clamp": 10.0, "algo.policy.lr": 8e-7, "algo.policy.lr_warmup_steps": 20, "algo.policy.weight_decay": 0.1,
    "algo.policy.mini_batches": 16, "algo.policy.epochs": 1, "algo.policy.clip_low": 0.2, "algo.policy.clip_high": 0.28,
    "algo.policy.dual_clip": 10.0, "algo.policy.lm_loss_weight": 0.1, "algo.policy.old_logprobs": "recompute",
    "algo.value.update": "independent", "algo.value.lr": 2e-6, "algo.value.lr_warmup_steps": 20, "algo.value.warmup_steps": 10,
    "algo.value.weight_decay": 0.1, "algo.value.mini_batches": 16, "algo.value.clip_low": 0.5, "algo.value.clip_high": 0.6,
    "algo.run.eval_samples": 32, "algo.run.eval_prompts": 30, "engine.dtype": "bfloat16",
}  # fmt: skip


def load(name: str, *more: str) -> ScaleConfig:
    return check(parse(ScaleConfig, ["--config", str(CONFIGS / f"{name}.yaml"), *more], prog="test"))


def marks(name: str) -> dict[str, str]:
    """Dotted field -> the mark of its line; '' where a line has none."""
    found, path = {}, []
    for line in (CONFIGS / f"{name}.yaml").read_text().splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        key, rest = line.strip().split(":", 1)
        path = [*path[:depth], key]
        if rest.split("#")[0].strip():
            mark = MARK.search(line)
            found[".".join(path)] = mark.group(1) if mark else ""
    return found


def leaves(tree, prefix="") -> dict:
    return {
        k: v
        for key, sub in tree.items()
        for k, v in (leaves(sub, f"{prefix}{key}.") if isinstance(sub, dict) else {prefix + key: sub}).items()
    }


def test_docs_cluster_is_the_dataclasses_and_the_tables_of_what_is_refused():
    page = (ROOT / "docs" / "cluster.md").read_text()
    assert page == cluster_markdown(), "run: python -m scale.docs_pages"
    told = {name for name in re.findall(r"`([a-z]+\.[\w.]+)`", page)}
    assert {path for path in field_paths(ScaleConfig) if not path.startswith("algo.")} <= told
    assert {one.field for one in (*CANCELLED, *IMPOSSIBLE) if ".compare." not in one.field} <= told
    assert "{" not in page.partition("## Refused")[2]


@pytest.mark.parametrize("name", BIG)
def test_every_value_has_its_source(name):
    found = marks(name)
    assert set(found) == set(leaves(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())))
    assert [field for field, mark in found.items() if not mark] == []


def test_the_ports_config_has_the_papers_and_the_ports_values():
    config = load("qwen2.5-32b-port")
    assert {field: get_field(config, field) for field in PAPER} == PAPER


def test_what_the_paper_did_not_say_is_not_marked_as_its_word():
    found = marks("qwen2.5-32b-port")
    assert {f for f in PAPER if found[f] not in "SP"} == set()
    more = {"algo.model.policy", "algo.task.eval_path", "algo.advantage.whiten", "algo.value.epochs", "sharding.compute_dtype",
            "algo.policy.importance"}  # fmt: skip
    assert {f for f, mark in found.items() if mark in "SP"} - set(PAPER) - more <= {"algo.policy.importance"}


@pytest.mark.parametrize("name", BIG[1:])
def test_a_planned_config_marks_as_the_papers_only_what_the_ports_has(name):
    small, large = load(name), load(BIG[0])
    theirs = marks(name)
    assert [f for f, mark in theirs.items() if mark in "SP" and get_field(small, f) != get_field(large, f)] == []


@pytest.mark.parametrize("name", BIG)
def test_a_config_holds_together_and_fits_its_devices(name):
    config = load(name)
    policy, _ = memory.shapes(config)
    memory.check_cuts(config, policy)
    rollout = config.algo.rollout
    assert rollout.slots % rollout.samples_per_prompt == 0
    assert rollout.max_response_tokens % rollout.window == 0
    assert config.algo.policy.micro_batch_tokens >= memory.longest_row(config)
    assert config.algo.model.device != "cpu"
    if "32b" not in name:  # the planned one runs whole in test_dryrun.py, the port's in tests/test_plan_against_dryrun.py
        assert memory.problems(config) == []


@pytest.mark.parametrize("name", ["qwen2.5-32b", "qwen2.5-7b", "qwen2.5-1.5b"])
def test_shipped_shapes_have_the_published_number_of_parameters(name):
    published = {"qwen2.5-32b": 32_763_876_352, "qwen2.5-7b": 7_615_616_512, "qwen2.5-1.5b": 1_543_714_304}
    assert memory.read_shape(CONFIGS / "models" / f"{name}.json").num_parameters == published[name]


def test_the_tiny_config_parses():
    config = load("cpu-tiny")
    assert config.algo.model.device == "cpu"
    assert config.cluster.devices_per_node == 2


WRONG = [
    (["--algo.rollout.windwo", "4"], "--algo.rollout.windwo: no such option; did you mean algo.rollout.window?"),
    (["--engine.windows", "4"], "no such option"),
    (["--algo.policy.lr", "-1"], "algo.policy.lr: got -1.0; expected a number above 0"),
    (["--algo.rollout.slots", "8200"], "algo.rollout.slots: got 8200; expected a multiple of the 16 engines; give one"),
    (
        ["--engine.tensor_parallel", "3"],
        "engine.tensor_parallel: got 3; expected a divisor of the ranks (cluster.nodes 8 x cluster.devices_per_node 8)",
    ),
    (
        ["--engine.tensor_parallel", "16"],
        "engine.tensor_parallel: got 16; expected one of 1, 2, 4, 8, 40, to which the policy's 40 heads and 8 key-value heads can be dealt",
    ),
    (
        ["--engine.tensor_parallel", "8", "--cluster.devices_per_node", "4"],
        "engine.tensor_parallel: got 8; expected at most cluster.devices_per_node (4)",
    ),
    (["--engine.gpu_memory_utilization", "1.5"], "engine.gpu_memory_utilization: got 1.5; expected a number above 0, at most 1"),
    (["--cluster.device_bytes", "0"], "cluster.device_bytes: got 0.0; expected a number above 0"),
    (["--cluster.device_bytes", ".nan"], "cluster.device_bytes: got nan; expected a number above 0"),
    (
        ["--cluster.requeued", "true", "--algo.run.resume", "true"],
        "algo.run.resume: got True; expected false with cluster.requeued true",
    ),
    (["--algo.run.method", "ppo"], "algo.rollout.window: got 8192; expected 24576, at which method ppo fixes it; drop it, or"),
    (
        ["--algo.run.method", "ppo", "--algo.rollout.window", "24576"],
        "algo.rollout.refill: got immediate; expected batch, at which method ppo",
    ),
    (
        ["--algo.value.update", "joint", "--algo.value.epochs", "2"],
        "algo.value.epochs: got 2; expected it left out: with value.update joint",
    ),
    (
        ["--algo.policy.mini_batch_tokens", "9", "--algo.policy.mini_batches", "2"],
        "algo.policy.mini_batches: got 2; expected it left out: ",
    ),
    (
        ["--reward.format_penalty", "1", "--algo.task.verifier", "own:verify"],
        "reward.format_penalty: got 1.0; expected 0 with the verifier own:verify",
    ),
    (
        ["--algo.advantage.cut_value", "own:rule"],
        "algo.advantage.cut_value: got own:rule; expected previous, critic or zero: a rule that is a function may look at all rows",
    ),
    (["--sharding.compute_dtype", "float16"], "sharding.compute_dtype"),
    (["--algo.model.policy", "models/Nothing"], "algo.model.policy: got models/Nothing, which is not here"),
    (["--algo.model.policy", "null"], "algo.model.policy: got none; expected a model's folder or a config.json"),
    (["--cluster.plan_file", "nowhere.json"], "cluster.plan_file: got nowhere.json; expected a file that can be read"),
]


@pytest.mark.parametrize(("wrong", "expected"), WRONG, ids=lambda x: x[0] if isinstance(x, list) else "")
def test_a_wrong_value_is_one_line_and_exit_code_2(wrong, expected, capsys):
    code = launch.main(["--dry-run", "--config", str(CONFIGS / "qwen2.5-32b-port.yaml"), *wrong])
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert expected in printed.err


def test_an_unknown_key_in_a_file_is_refused_with_the_nearest_name(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("engine:\n  tensor_paralel: 2\n")
    command = [sys.executable, str(ROOT / "scale" / "launch.py"), "--dry-run", "--config", str(file)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == "error: engine.tensor_paralel: no such field; did you mean engine.tensor_parallel?\n"


# ------------------------------------------------------------------------------------------------------------------ cancelled

OTHER = {
    "algo.run.eval_every_s": 9.0, "algo.model.dtype": "bfloat16", "algo.model.trust_remote_code": True, "algo.compare.methods": ["tppo"],
    "algo.compare.seeds": 4, "algo.compare.jobs": 3, "algo.compare.target": 0.5, "algo.compare.per_method": {"tppo": {}},
    "engine.sleep_level": 1, "engine.block_size": 16, "engine.max_batched_tokens": 9, "engine.admission": "whole", "engine.vllm": {"enforce_eager": True},
    "engine.probe_prompts": 9, "engine.probe_tokens": 9,
    "engine.probe_mean": 0.5, "engine.probe_top_percent": 0.5, "algo.task.eval_path": "e.jsonl", "algo.task.prompt_key": "q",
    "algo.task.answer_key": "a", "algo.task.chat_template": True, "data.instruction": "Think.", "data.over_long": "error",
    "reward.overlong_penalty": 0.5,
}  # fmt: skip
"""A value of each field that something cancels, which is not its default."""


def test_every_pair_of_the_table_has_a_value():
    assert {row.field for row in CANCELLED} == OTHER.keys()
    assert all(get_field(ScaleConfig(), field) != value for field, value in OTHER.items())


@pytest.mark.parametrize("field", OTHER)
def test_an_option_that_does_nothing_is_refused_by_name(field):
    with pytest.raises(UserError) as error:
        check(replace_fields(ScaleConfig(), {"engine.kind": "torch", field: OTHER[field]}))
    assert str(error.value).startswith(f"{field}: got {OTHER[field]}; expected it left out: ")
    assert str(error.value).endswith("; drop it")


@pytest.mark.parametrize("field", [f for f in OTHER if not f.startswith(("algo.run.", "algo.model.", "algo.compare."))])
def test_it_is_not_where_it_does_something(field):
    needed = {"algo.task.path": "p.jsonl", "algo.task.tokenizer": "bytes", "reward.overlong_buffer": 8}
    check(replace_fields(ScaleConfig(), needed | {field: OTHER[field]}))


def test_a_job_of_other_ranks_than_its_config_is_refused_before_it_reads_a_weight(tmp_path):
    config = replace_fields(ScaleConfig(), {"cluster.nodes": 8, "cluster.devices_per_node": 8})
    check_ranks(config, 64)
    with pytest.raises(UserError, match=r"^cluster: got 32 ranks; expected cluster.nodes 8 x cluster.devices_per_node 8 = 64 "):
        check_ranks(config, 32)
    command = [sys.executable, "scale/launch.py", "--config", "scale/configs/cpu-tiny.yaml", "--cluster.nodes", "4",
               "--cluster.devices_per_node", "1", "--algo.run.out", str(tmp_path / "out")]  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (ended.returncode, len(ended.stderr.strip().splitlines())) == (2, 1), ended.stderr
    assert ended.stderr.startswith("error: cluster: got 1 ranks; expected cluster.nodes 4 x cluster.devices_per_node 1 = 4 ")
    assert not (tmp_path / "out").exists()
