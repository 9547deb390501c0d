"""`tppo`: usage, help of one screen, completion, resume FOLDER, report FOLDER, the commands of other packages, and what a stop says."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tppo_ref import __version__
from tppo_ref.__main__ import COMMANDS, main
from tppo_ref.runs import console
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import field_paths, parse

ROOT = Path(__file__).resolve().parents[1]
OTHERS = ("bias", "throughput", "plan", "launch")


def declared() -> dict[str, str]:
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][console.GROUP]


@pytest.fixture(autouse=True)
def _entry_points_as_declared(monkeypatch):
    """Those of pyproject.toml, whether or not this checkout is the one that is installed."""
    entries = [importlib.metadata.EntryPoint(name, value, console.GROUP) for name, value in declared().items()]
    monkeypatch.setattr(console, "_entries", lambda: entries)


def test_the_usage_names_every_command_of_every_package(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    named = set(re.findall(r"^  ([a-z-]+) ", out, re.M))
    assert named == {*COMMANDS, *OTHERS, "completion"}
    assert {"demo", "train", "resume", "compare", "evaluate", "pretrain-value", "report"} <= named
    assert len(out.splitlines()) <= 24


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"tppo-ref {__version__}"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_commands_help_fits_a_screen_and_names_only_fields_that_exist(command, capsys):
    assert main([command, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 200
    shown = set(re.findall(r"--([a-z]+\.[a-z_]+)", " ".join(lines)))
    assert shown - {"section.field"} <= set(field_paths(Config))
    assert "--help-all" in lines[-1]


def test_the_help_of_the_demo_shows_the_defaults_of_the_demo(capsys):
    main(["demo", "--help"])
    shown = capsys.readouterr().out
    assert f"(default {parse(Config, console.fields_of('demo', []), prog='demo').run.out})" in shown
    assert Config().run.out not in shown


@pytest.mark.parametrize("name", OTHERS)
def test_commands_of_other_packages_are_found_and_called_with_their_own_name_first(name, capsys):
    entry = importlib.metadata.EntryPoint(name, declared()[name], console.GROUP)
    assert callable(entry.load()), "pyproject.toml names what is not there"
    try:
        code = main([name, "--no-such-option"])
    except SystemExit as left:
        code = left.code
    assert code == 2
    assert "--no-such-option" in capsys.readouterr().err


def test_an_unknown_command_gets_the_nearest_one(capsys):
    assert main(["trian"]) == 2
    assert re.match(r"error: command: got 'trian'; expected one of .*; did you mean train\?$", capsys.readouterr().err.strip())


@pytest.mark.parametrize("shell", console.SHELLS)
def test_completion_knows_commands_fields_and_choices(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in ("pretrain-value", "launch", "rollout.window", "immediate"):
        assert word in script, word


def test_completion_for_bash_is_a_script_that_bash_reads(tmp_path, capsys):
    main(["completion", "bash"])
    script = tmp_path / "tppo.sh"
    script.write_text(capsys.readouterr().out)
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""


@pytest.mark.parametrize("argv", [["completion"], ["completion", "fish"], ["resume"], ["resume", "no/such"], ["report", "."]])
def test_a_mistake_is_one_line_in_the_one_dialect(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert re.match(rf"error: {argv[0]}: got .*; expected ", err)


def test_a_run_of_scale_is_sent_to_its_own_command(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"algo": {}, "engine": {}}))
    assert main(["resume", str(tmp_path)]) == 2
    assert "tppo launch" in capsys.readouterr().err


TINY = {"model.warm_start_steps": 2, "model.num_layers": 1, "model.hidden_size": 16, "rollout.slots": 4, "run.eval_prompts": 4,
        "rollout.window": 8, "rollout.max_response_tokens": 16, "run.eval_every_s": 0}  # fmt: skip


def arguments(**more) -> list[str]:
    fields = TINY | {name.replace("__", "."): value for name, value in more.items()}
    return [word for name, value in fields.items() for word in (f"--{name}", str(value))]


def tppo(*argv: str, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "tppo_ref", *argv], text=True, env=environment, stderr=subprocess.PIPE,
                            stdout=subprocess.PIPE, **options)  # fmt: skip


def test_a_stop_names_the_checkpoint_and_the_command_that_goes_on_and_that_command_goes_on(tmp_path):
    out = tmp_path / "run"
    fields = arguments(run__out=out, run__cache=tmp_path / "cache", run__steps=100_000, run__progress="false")
    process = tppo("train", *fields)
    log = out / "metrics.jsonl"
    limit = time.monotonic() + 240
    while time.monotonic() < limit and not (log.exists() and log.read_text().count("policy/loss") >= 2):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    told = re.search(r"^stopped: (\S+) holds everything; go on with: tppo resume (\S+)$", err, re.M)
    assert told, err
    checkpoint, folder = Path(told[1]), told[2]
    assert checkpoint.is_dir()
    step = int(checkpoint.name.removeprefix("step-"))
    again = tppo("resume", folder, "--run.steps", str(step + 2))
    printed, err = again.communicate(timeout=240)
    assert again.returncode == 0, err
    assert printed.strip().endswith(f"step-{step + 2:08d}")


def test_a_comparison_draws_each_runs_accuracy_so_far(tmp_path):
    from tppo_ref.runs.compare import _curve

    records = [{"step": i, "eval/accuracy": accuracy} for i, accuracy in enumerate([0.0, 0.5, 1.0])]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in [*records, {"step": 3}]))
    assert _curve(str(tmp_path)) == f"{tmp_path.name} ▁▅█ 1.00"
    assert _curve(str(tmp_path / "not yet")) == "not yet"


def test_the_quick_demo_is_one_seed_of_both_methods_and_says_that_it_proves_nothing(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("tppo_ref.runs.compare.compare", seen.append)
    assert main(["demo", "--quick"]) == 0
    (config,) = seen
    assert (config.compare.methods, config.compare.seeds) == (["ppo", "tppo-once"], 1)
    assert "proves nothing" in capsys.readouterr().out
    assert main(["demo"]) == 0
    assert seen[-1].compare.seeds == 3
    assert "proves nothing" not in capsys.readouterr().out
