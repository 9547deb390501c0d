"""The ranges that pyproject.toml states, tried: the heart of the test suite under each Python, torch and transformers below.

    python -m benchmarks.versions [PYTHON-TORCH-TRANSFORMERS ...]        (all, or those named)

Each combination gets an environment of its own from the package index, with torch's ordinary CUDA build (on a machine without a
GPU the tests run on the CPU), and loses it afterwards: a few minutes and 6 GB each. uv must find the interpreters. Rows of
combinations that are not tried again stay. No part of `make bench` or of CI, which has no room for it: tests/test_packaging.py
holds pyproject.toml against the table.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

from benchmarks.common import RESULTS, provenance

ROOT = Path(__file__).resolve().parents[1]
COMBINATIONS = (
    "3.11-2.11.0-5.16.1", "3.11-2.13.0-5.19.0",
    "3.12-2.11.0-5.17.0", "3.12-2.12.1-5.18.0", "3.12-2.14.1-5.19.0",
    "3.13-2.13.0-5.19.0", "3.13-2.15.0-5.19.0",
)  # fmt: skip
TESTS = ("tests/test_advantages.py", "tests/test_models.py", "tests/test_trainer.py")
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "torchrl", "stable-baselines3", "psutil")


def outcome(printed: str) -> dict[str, int]:
    """Counts of pytest's closing line; an error in collection counts as a failure."""
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", printed.splitlines()[-1])}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    return {"passed": counts.get("passed", 0), "failed": failed, "skipped": counts.get("skipped", 0)}


def tried(python: str, torch: str, transformers: str) -> dict[str, object]:
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    with tempfile.TemporaryDirectory() as folder:
        interpreter = f"{folder}/bin/python"
        uv = [sys.executable, "-m", "uv", "--no-config", "--quiet"]
        subprocess.run([*uv, "venv", "--clear", "--python", python, folder], check=True)
        wanted = [*requirements, *TOOLS, f"torch=={torch}", f"transformers=={transformers}"]
        subprocess.run([*uv, "pip", "install", "--python", interpreter, *wanted], check=True)
        command = [interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
        if done.returncode:
            print(done.stdout, done.stderr, sep="\n")
        versions = {"python": python, "torch": torch, "transformers": transformers}
        ours = {key: value for key, value in provenance().items() if key in ("machine", "date", "command")}
        return {**versions, **outcome(done.stdout), "tests": " ".join(TESTS), **ours}


def main(combinations: list[str]) -> None:
    path = RESULTS / "versions.csv"
    rows = {}
    if path.exists():
        with path.open(newline="") as file:
            rows = {f"{row['python']}-{row['torch']}-{row['transformers']}": row for row in csv.DictReader(file)}
    for combination in combinations or COMBINATIONS:
        rows[combination] = row = tried(*combination.split("-"))
        print(combination, f"{row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped", flush=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerows(rows[name] for name in sorted(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
