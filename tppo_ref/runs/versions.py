"""What the numbers of a run depend on: packages, Python, the machine."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path


def versions() -> dict[str, str]:
    """Versions of what computes, and the names of machine and processor."""
    found = {}
    for name in ("tppo-ref", "torch", "transformers", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found | {"python": platform.python_version(), "machine": platform.machine(), "processor": processor()}


def processor() -> str:
    """The CPU's name, where the system tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
