"""What devices promise: dense bfloat16 products a second, by the makers' data sheets. sim.clock.devices says where each is from.

Here and not in sim, as a run on a cluster wants them, too, and imports no simulator.
"""

from __future__ import annotations

import re

PEAK_FLOPS_PER_S = {"H100": 989e12, "H800": 989e12, "H200": 989e12, "B200": 2250e12, "H20": 148e12, "A100": 312e12}

SLOWER = re.compile(r"\b(H100|H800|H200) (PCIe|NVL)|MIG")
"""Other devices under the same names, whose peak is not the table's."""


def peak_flops_per_s(device: str) -> float | None:
    """By the name that the driver gives a device, as "NVIDIA H100 80GB HBM3"; None for a device that the table does not hold."""
    named = [kind for kind in PEAK_FLOPS_PER_S if re.search(rf"\b{kind}\b", device)]
    return PEAK_FLOPS_PER_S[named[0]] if named and not SLOWER.search(device) else None
