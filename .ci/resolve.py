"""Would this install on an ordinary Linux machine? Asks the package index, downloads metadata only and installs nothing.

    python .ci/resolve.py          # `make resolve`

Every set below, for every Python of pyproject.toml's classifiers, is resolved with wheels only, for x86_64 and glibc 2.31 (vllm
needs it; Debian 11, Ubuntu 20.04 and newer have it). Wheels that lie on this machine, and its settings, do not count: a pin
that only they satisfy fails here. A mirror of the index is named by UV_DEFAULT_INDEX.

One line per set and Python. Exit code 0: all resolve; 1: one does not, with the reason; 2: the index could not be asked, so
nothing is known, which is no success.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = "x86_64-manylinux_2_31"
SHOWN = ("torch", "triton", "transformers", "vllm", "apache-tvm-ffi")
KEPT_SETTINGS = ("UV_DEFAULT_INDEX", "UV_CACHE_DIR", "UV_HTTP_TIMEOUT", "UV_HTTP_RETRIES", "UV_NATIVE_TLS")


class Requirements(NamedTuple):
    """What is asked for together: arguments of `uv pip compile`, and one requirement more on its standard input."""

    arguments: tuple[str, ...]
    requirement: str


def torch_of_the_makefile(makefile: str) -> str:
    found = re.search(r"^TORCH +\?= *(\S+)$", makefile, re.MULTILINE)
    assert found, "the Makefile says which torch `make` installs: TORCH ?= torch==VERSION"
    return found[1]


def pythons(project: dict) -> list[str]:
    """Python versions that the classifiers name, oldest first."""
    return re.findall(r"Python :: (3\.\d+)", "\n".join(project["project"]["classifiers"]))


def sets(torch: str) -> dict[str, Requirements]:
    """Name -> requirements, in the order in which they are resolved."""
    tests = ("pyproject.toml", "--extra", "dev", "--constraints", "constraints.txt")
    return {
        torch: Requirements((), torch),
        **{f". beside torch {v}": Requirements(("pyproject.toml",), f"torch=={v}.*") for v in ("2.11", "2.12")},
        ".": Requirements(("pyproject.toml",), ""),
        ".[scale]": Requirements(("pyproject.toml", "--extra", "scale"), ""),
        "make test": Requirements(tests, torch),
        "make test-docs": Requirements((*tests, "--extra", "docs"), torch),
        "make test-scale": Requirements((*tests, "tests/scale/requirements.txt"), torch),
    }


def resolve(requirements: Requirements, python: str, root: Path = ROOT) -> subprocess.CompletedProcess:
    """uv's exit code is 0, 1 (no solution) or 2 (it could not ask); stdout holds NAME==VERSION lines, stderr the reason."""
    command = [
        sys.executable, "-m", "uv", "--no-config", "pip", "compile", "--quiet", "--no-header", "--no-annotate",
        "--only-binary", ":all:", "--python-platform", PLATFORM, "--python-version", python,
        "--python", sys.executable,  # else uv looks for an interpreter of that version
        *requirements.arguments, "-",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("UV_") or k in KEPT_SETTINGS}
    return subprocess.run(command, cwd=root, input=requirements.requirement, env=environment, capture_output=True, text=True)


def described(resolution: str) -> str:
    versions = dict(re.findall(r"^([\w.-]+)==(\S+)", resolution, re.MULTILINE))
    return f"{len(versions):3} packages: " + ", ".join(f"{name} {versions[name]}" for name in SHOWN if name in versions)


def main(root: Path = ROOT) -> int:
    project = tomllib.loads((root / "pyproject.toml").read_text())
    failed = False
    for name, requirements in sets(torch_of_the_makefile((root / "Makefile").read_text())).items():
        for python in pythons(project):
            result = resolve(requirements, python, root)
            if result.returncode not in (0, 1):
                print(f"resolve: the package index could not be asked, so nothing is known: {' '.join(result.stderr.split())}")
                return 2
            failed |= result.returncode == 1
            print(f"{name:20} Python {python}  {described(result.stdout) if result.returncode == 0 else 'DOES NOT RESOLVE'}")
            print(result.stderr, end="", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
