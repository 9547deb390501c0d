"""`make bench`: every benchmark that ends within minutes, in turn. Headline and sweep are commands of their own.

python -m benchmarks                  advantages, batching, overhead
python -m benchmarks.sweep            tunes PPO and T-PPO on the same grid
python -m benchmarks.headline         PPO against T-PPO, five seeds a task
"""

from __future__ import annotations

import subprocess
import sys

for name in ("advantages", "batching", "overhead"):
    print(f"\n== {name}", flush=True)
    subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], check=True)
