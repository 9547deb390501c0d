"""Accelerators as data: numbers with units in their names, and where each comes from (the marks of docs/config.md).

    accelerator("H800")                  by name; or a .json file with the fields of `Accelerator`
    cluster("64xH800")                   (64, the accelerator)

A rate is what the vendor's sheet promises, dense and in one direction; what software reaches of it is efficiency.py.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tppo_ref.loop.peaks import PEAK_FLOPS_PER_S

MIB = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One device and its links. Bytes of memory are those that the driver reports, a few per cent more than the sheet's round
    number; links are per device and in one direction, half of what sheets call total bandwidth."""

    name: str
    flops_per_s: float
    """Dense matrix products in the precision of training (bf16 on GPUs)."""
    memory_bytes_per_s: float
    memory_bytes: float
    node_link_bytes_per_s: float
    """To the other devices of its node: NVLink."""
    network_bytes_per_s: float
    """To other nodes."""
    host_link_bytes_per_s: float
    """To the host's memory: PCIe."""
    source: str

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not 0 < value < math.inf:
                raise ValueError(f"{self.name}.{field.name}: got {value!r}; expected a positive finite number")

    @property
    def ridge(self) -> float:
        """Operations per byte above which matrix products, and below which reading memory, sets the pace."""
        return self.flops_per_s / self.memory_bytes_per_s


_HOPPER = Accelerator(
    name="H100", flops_per_s=PEAK_FLOPS_PER_S["H100"], memory_bytes_per_s=3.35e12, memory_bytes=81_559 * MIB,
    node_link_bytes_per_s=450e9, network_bytes_per_s=50e9, host_link_bytes_per_s=64e9,
    source="FLOP/s, HBM: primary [V]. NVLink 900 GB/s total, PCIe 128 GB/s total: NVIDIA H100 (SXM) data sheet [V]. One 400 Gb/s "
    "adapter per GPU: NVIDIA DGX H100 data sheet [V]. Bytes: nvidia-smi [2].",
)  # fmt: skip

ACCELERATORS: dict[str, Accelerator] = {
    "H100": _HOPPER,
    "H800": dataclasses.replace(
        _HOPPER, name="H800", node_link_bytes_per_s=200e9,
        source="FLOP/s, HBM: primary [V]. NVLink 400 GB/s total, one 400 Gb/s adapter per GPU: DeepSeek-V3 hardware paper, arXiv "
        "2505.09343 [V]. The rest as H100 [I].",
    ),
    "H200": dataclasses.replace(
        _HOPPER, name="H200", memory_bytes_per_s=4.8e12, memory_bytes=143_771 * MIB,
        source="FLOP/s, HBM: primary [V]. Links as H100: NVIDIA H200 data sheet [V]. Bytes: nvidia-smi [2].",
    ),
    "B200": Accelerator(
        name="B200", flops_per_s=PEAK_FLOPS_PER_S["B200"], memory_bytes_per_s=7.67e12, memory_bytes=183_359 * MIB,
        node_link_bytes_per_s=900e9, network_bytes_per_s=50e9, host_link_bytes_per_s=64e9,
        source="HGX, 1,000 W. 2.25 PFLOP/s dense in bf16, 7.67 TB/s (7,680 bits at 3,996 MHz, as the driver says): pytorch/ao pull "
        "request 4002 [V]; NVLink 1.8 TB/s total: HGX B200 as rented out (docs.vultr.com) [2]. Bytes: nvidia-smi (NVIDIA/TensorRT-"
        "LLM issue 10278) [2]. One 400 Gb/s adapter per GPU, PCIe as H100 [I].",
    ),
    "H20": dataclasses.replace(
        _HOPPER, name="H20", flops_per_s=PEAK_FLOPS_PER_S["H20"], memory_bytes_per_s=4.0e12, memory_bytes=97_871 * MIB,
        source="no public data sheet; 148 TFLOP/s, 96 GB at 4.0 TB/s, NVLink 900 GB/s total: press and framework tables agree [2]. "
        "Bytes: nvidia-smi [2]. Network and PCIe as H100 [I].",
    ),
    "A100": Accelerator(
        name="A100", flops_per_s=PEAK_FLOPS_PER_S["A100"], memory_bytes_per_s=2.039e12, memory_bytes=81_920 * MIB,
        node_link_bytes_per_s=300e9, network_bytes_per_s=25e9, host_link_bytes_per_s=32e9,
        source="80 GB SXM. 312 TFLOP/s, 2,039 GB/s, NVLink 600 GB/s total, PCIe 64 GB/s total: NVIDIA A100 data sheet [V]. One 200 "
        "Gb/s adapter per GPU: NVIDIA DGX A100 data sheet [V]. Bytes: nvidia-smi [2].",
    ),
    "laptop-cpu": Accelerator(
        name="laptop-cpu", flops_per_s=0.5e12, memory_bytes_per_s=60e9, memory_bytes=16 * 1024 * MIB, node_link_bytes_per_s=60e9,
        network_bytes_per_s=0.125e9, host_link_bytes_per_s=60e9,
        source="rough: eight cores in fp32, two channels of DDR5, 16 GiB, gigabit Ethernet. An order of magnitude, no machine [O].",
    ),
}  # fmt: skip


# By name


def accelerator(name: str) -> Accelerator:
    """An accelerator of ACCELERATORS, upper and lower case are the same; or of a .json file."""
    if name.lower().endswith(".json"):
        return read_accelerator(name)
    by_name = {known.lower(): spec for known, spec in ACCELERATORS.items()}
    if name.lower() not in by_name:
        raise ValueError(unknown("accelerator", name, ACCELERATORS) + "; or a .json file of one")
    return by_name[name.lower()]


def cluster(spec: str) -> tuple[int, Accelerator]:
    """`64xH800` -> (64, H800), `8xmine.json` -> (8, the file's); a name alone is one device."""
    number, name = re.fullmatch(r"\s*(?:(\d+)\s*[xX×*]\s*)?(.*?)\s*", spec).groups()  # type: ignore[union-attr]
    if number is not None and int(number) < 1:
        raise ValueError(f"devices: got {spec!r}; expected at least 1, as in 64xH800")
    return int(number or 1), accelerator(name)


def read_accelerator(path: str | Path) -> Accelerator:
    """An accelerator from a JSON object with the fields of `Accelerator`, all of them; `name` and `source` may be left out.

    ValueError, naming file and field, for what is missing, unknown or no positive finite number.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise ValueError(f"{path} is not JSON") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: got {type(found).__name__}; expected an object with the fields of an accelerator")
    given: dict[str, Any] = {"name": Path(path).stem, "source": str(path)} | found
    fields = [field.name for field in dataclasses.fields(Accelerator)]
    if wrong := [name for name in given if name not in fields]:
        raise ValueError(f"{path}: got the field {wrong[0]!r}; expected {', '.join(fields)}")
    if missing := [name for name in fields if name not in given]:
        raise ValueError(f"{path} has no {', '.join(missing)}")
    for name in set(fields) - {"name", "source"}:
        if isinstance(given[name], bool) or not isinstance(given[name], int | float):
            raise ValueError(f"{path}: {name}: got {given[name]!r}; expected a positive finite number")
    return Accelerator(**given)


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """A refusal with the nearest of the known names."""
    known = list(known)
    lower = {entry.lower(): entry for entry in known} | {entry.lower().rpartition("/")[2]: entry for entry in known}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.3)
    hint = f" (did you mean {lower[close[0]]}?)" if close else ""
    return f"{what}: got {name!r}{hint}; expected one of {', '.join(known)}"
