"""What is installed: the pins, the check that they resolve elsewhere, and the wheel, which must hold everything and work on its own."""

from __future__ import annotations

import csv
import email
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import tppo_ref

ROOT = Path(__file__).resolve().parents[1]
HOUSES = ("tppo_ref", "sim", "scale")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {
    canonicalize_name(name): Version(version)
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}
EXTRAS = PROJECT["optional-dependencies"]
REQUIRED = [Requirement(line) for line in [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]]

spec = importlib.util.spec_from_file_location("resolve", ROOT / ".ci" / "resolve.py")
resolve = importlib.util.module_from_spec(spec)
spec.loader.exec_module(resolve)


# ----------------------------------------------------------------------------------------------------------------- the pins


def test_nothing_is_pinned_that_a_build_of_torch_or_vllm_determines():
    determined = re.compile(r"torch|torchvision|torchaudio|torchcodec|triton|vllm.*|nvidia-.*|cuda-.*|flashinfer.*|apache-tvm-ffi")
    assert [name for name in PINS if determined.fullmatch(name)] == []


def test_every_line_of_the_constraints_is_a_pin_or_a_comment():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert len(PINS) == sum(not line.startswith("#") for line in lines)


def test_what_is_pinned_lies_within_the_ranges_that_users_get():
    pinned = [r for r in REQUIRED if canonicalize_name(r.name) in PINS]
    assert {"transformers", "numpy", "ruff", "mypy", "pytest"} <= {r.name for r in pinned}
    for requirement in pinned:
        assert PINS[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.parametrize("own", ["2.11.0+cu130", "2.12.1", "2.13.0+cpu", "2.13.0+cu130"])
def test_a_torch_that_is_there_already_is_good_enough(own):
    (torch,) = (r for r in REQUIRED if r.name == "torch")
    assert torch.specifier.contains(own)
    assert torch.url is None


def test_the_stated_ranges_are_those_that_were_tried():
    with (ROOT / "benchmarks" / "results" / "versions.csv").open(newline="") as file:
        tried = list(csv.DictReader(file))
    assert all(row["failed"] == "0" and int(row["passed"]) > 400 for row in tried)
    assert {row["python"] for row in tried} == set(resolve.pythons({"project": PROJECT}))
    for name in ("torch", "transformers"):
        (requirement,) = (r for r in REQUIRED if r.name == name)
        versions = sorted(Version(row[name]) for row in tried)
        minors = [version.minor for version in versions]
        assert set(minors) == set(range(minors[0], minors[-1] + 1)), name
        assert all(version in requirement.specifier for version in versions)
        assert f"{versions[-1].major}.{minors[-1] + 1}.0" not in requirement.specifier
        assert f"{versions[0].major}.{minors[0] - 1}.99" not in requirement.specifier
    page = (ROOT / "docs" / "install.md").read_text()
    rows = [f"| {row['python']} | {row['torch']} | {row['transformers']} | {row['passed']} passed |" for row in tried]
    assert re.findall(r"^\| \d.* passed \|$", page, re.MULTILINE) == rows


# ------------------------------------------------------------------------------------------------------ make resolve, offline


def wheel(folder: Path, name: str, version: str, *requires: str, tag: str = "py3-none-any") -> None:
    metadata = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    info = f"{name}-{version}.dist-info"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-{tag}.whl", "w") as file:
        file.writestr(f"{info}/METADATA", "\n".join(["Metadata-Version: 2.1", *metadata, ""]))
        file.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.fixture(name="elsewhere")
def _elsewhere(tmp_path, monkeypatch) -> Path:
    """A project, an index that has torch 2.11 to 2.13 with the triton of each, and a local wheel of another triton, as our machine has."""
    index, project, local = tmp_path / "index", tmp_path / "project", tmp_path / "local"
    for torch, triton in (("2.11.0", "3.6.0"), ("2.12.0", "3.7.0"), ("2.13.0", "3.7.1")):
        wheel(index / "torch", "torch", torch, f"triton=={triton}", tag="cp312-cp312-manylinux_2_28_x86_64")
        wheel(index / "triton", "triton", triton)
    wheel(index / "vllm", "vllm", "0.32.0", "torch==2.13.0")
    wheel(local, "triton", "3.9.0")
    for package in index.iterdir():
        links = (f'<a href="{file.name}">{file.name}</a>' for file in sorted(package.iterdir()))
        (package / "index.html").write_text("\n".join(links))
    (project / "tests" / "scale").mkdir(parents=True)
    (project / "tests" / "scale" / "requirements.txt").write_text("triton\n")
    (project / "Makefile").write_text("TORCH  ?= torch==2.13.0\n")
    (project / "constraints.txt").write_text("")
    (project / "pyproject.toml").write_text(
        '[project]\nname = "mine"\nversion = "1"\nrequires-python = ">=3.12"\ndependencies = ["torch>=2.11"]\n'
        'classifiers = ["Programming Language :: Python :: 3.12"]\n'
        '[project.optional-dependencies]\nscale = ["vllm"]\ndev = ["triton"]\ndocs = []\n'
    )
    monkeypatch.setenv("UV_DEFAULT_INDEX", index.as_uri())
    monkeypatch.setenv("UV_FIND_LINKS", str(local))
    monkeypatch.setenv("PIP_FIND_LINKS", str(local))
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
    return project


def test_a_set_that_the_index_can_serve_resolves_and_is_printed(elsewhere, capsys):
    assert resolve.main(elsewhere) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 8
    assert lines[0] == "torch==2.13.0 Python 3.12 2 packages: torch 2.13.0, triton 3.7.1"
    assert lines[1] == ". beside torch 2.11 Python 3.12 2 packages: torch 2.11.0, triton 3.6.0"
    assert lines[4] == ".[scale] Python 3.12 3 packages: torch 2.13.0, triton 3.7.1, vllm 0.32.0"


def test_a_pin_that_only_a_local_wheel_satisfies_is_found(elsewhere, capsys):
    (elsewhere / "constraints.txt").write_text("triton==3.9.0\n")
    assert resolve.main(elsewhere) == 1
    out = capsys.readouterr().out
    assert re.findall(r"^(.*?) +Python 3.12  DOES NOT RESOLVE", out, re.MULTILINE) == [
        "make test",
        "make test-docs",
        "make test-scale",
    ]
    assert "triton==3.9.0" in out


def test_a_wheel_for_a_newer_system_than_we_promise_does_not_count(elsewhere, tmp_path, capsys):
    vllm = tmp_path / "index" / "vllm"
    shutil.rmtree(vllm)
    wheel(vllm, "vllm", "0.32.0", "torch==2.13.0", tag="cp312-cp312-manylinux_2_39_x86_64")
    (vllm / "index.html").write_text('<a href="vllm-0.32.0-cp312-cp312-manylinux_2_39_x86_64.whl">vllm</a>')
    assert resolve.main(elsewhere) == 1
    assert re.findall(r"^(.*?) +Python 3.12  DOES NOT RESOLVE", capsys.readouterr().out, re.MULTILINE) == [".[scale]"]


def test_an_index_that_does_not_answer_is_no_success(elsewhere, monkeypatch, capsys):
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")  # nobody listens on the discard port
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    assert resolve.main(elsewhere) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("resolve: ")
    assert "nothing is known" in line


def test_it_asks_for_the_torch_and_the_pythons_that_the_project_names():
    assert resolve.torch_of_the_makefile((ROOT / "Makefile").read_text()) == "torch==2.13.0"
    assert resolve.pythons({"project": PROJECT}) == ["3.11", "3.12", "3.13"]


# ---------------------------------------------------------------------------------------------------------------- the wheel


def _made_here(folder: str, names: list[str]) -> set[str]:
    """What a checkout holds beside its sources."""
    at_the_top = {"runs", "build", "dist", *(n for n in names if n.startswith(".") or n.endswith(".egg-info"))}
    return {"__pycache__"} | (at_the_top if Path(folder) == ROOT else set())


@pytest.fixture(scope="module", name="dist")
def _dist(tmp_path_factory) -> Path:
    """sdist and, from nothing but the sdist, the wheel: the two steps of `python -m build`, by setuptools' own hooks and offline."""
    folder = tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT, folder / "source", ignore=_made_here)

    def hook(name: str, cwd: Path) -> None:
        call = f"from setuptools import build_meta; build_meta.{name}({str(folder)!r})"
        done = subprocess.run([sys.executable, "-c", call], cwd=cwd, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    hook("build_sdist", folder / "source")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    hook("build_wheel", unpacked)
    return folder


@pytest.fixture(scope="module", name="installed")
def _installed(dist, tmp_path_factory) -> Path:
    """The wheel's content in a folder of its own, as an installer would lay it."""
    folder = tmp_path_factory.mktemp("site-packages")
    (file,) = dist.glob("*.whl")
    assert file.name == f"tppo_ref-{tppo_ref.__version__}-py3-none-any.whl"
    zipfile.ZipFile(file).extractall(folder)
    return folder


def files(folder: Path) -> set[str]:
    """What a folder holds, but for what Python and numba compiled there."""
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}


def test_the_wheel_holds_the_three_packages_whole_and_nothing_else(installed):
    info = f"tppo_ref-{tppo_ref.__version__}.dist-info"
    expected = {f"{house}/{name}" for house in HOUSES for name in files(ROOT / house)}
    assert {name for name in files(installed) if not name.startswith(f"{info}/")} == expected
    assert {f"{house}/py.typed" for house in HOUSES} <= expected
    assert {"tppo_ref/configs/demo.yaml", "scale/configs/cpu-tiny.yaml", "scale/configs/models/qwen2.5-32b.json"} <= expected


def test_the_wheel_says_what_it_needs(installed):
    metadata = email.message_from_string((installed / f"tppo_ref-{tppo_ref.__version__}.dist-info" / "METADATA").read_text())
    assert (metadata["Name"], metadata["Version"]) == ("tppo-ref", tppo_ref.__version__)
    assert metadata["Requires-Python"] == PROJECT["requires-python"]
    assert (installed / f"tppo_ref-{tppo_ref.__version__}.dist-info" / "licenses" / "LICENSE").exists()
    needed = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert {str(r) for r in needed if r.marker is None} == {str(Requirement(line)) for line in PROJECT["dependencies"]}
    assert set(metadata.get_all("Provides-Extra")) == set(EXTRAS)


def test_the_sdist_holds_the_sources_and_no_tests(dist):
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "tppo_ref/__main__.py",
        "scale/configs/cpu-tiny.yaml",
        "examples/own_task.py",
    } <= names
    assert {name.partition("/")[0] for name in names} & {"tests", "notebooks", "benchmarks", "constraints.txt"} == set()


def run_installed(installed: Path, cwd: Path, *argv: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *argv], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_trains_away_from_the_checkout(installed, tmp_path):
    where = run_installed(
        installed, tmp_path, "-c", "import tppo_ref as t, sim, scale; print(t.__file__, sim.__file__, scale.__file__)"
    )
    assert [Path(path).parents[1] for path in where.split()] == [installed] * 3
    assert "--rollout.window" in run_installed(installed, tmp_path, "-m", "tppo_ref", "train", "--help")
    tiny = {
        "task.name": "length", "model.hidden_size": 16, "model.num_layers": 1, "model.num_heads": 2, "model.warm_start_steps": 2,
        "rollout.slots": 4, "rollout.window": 6, "rollout.max_response_tokens": 12, "run.eval_prompts": 2, "run.eval_every_s": 0,
        "run.steps": 2, "run.progress": "false", "run.out": "out",
    }  # fmt: skip
    options = [word for name, value in tiny.items() for word in (f"--{name}", str(value))]
    printed = run_installed(installed, tmp_path, "-m", "tppo_ref", "train", *options)
    assert (tmp_path / "out" / "checkpoints" / "step-00000002" / "policy").is_dir(), printed
