"""scale/launch.py with a plant in the middle of a step: $PLANT is "WHAT RANK STEP".

raise   that rank fails, after its window and before its updates
stall   every rank stays in that step for good, and says so by a file `stalled-RANK` in the run's folder; RANK counts for nothing
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from scale import launch

launch.HERE = Path(__file__).parent  # the workers that it starts are this file, too


def plant() -> None:
    import scale.run

    what, rank, step = os.environ["PLANT"].split()
    build = scale.run.build

    def planted_build(config, world):
        parts, num_steps = build(config, world), 0
        collect = parts.scorer.collect

        def planted():
            nonlocal num_steps
            scores, num_steps = collect(), num_steps + 1
            if what == "raise" and (num_steps, world.rank) == (int(step), int(rank)):
                raise ZeroDivisionError("a planted mistake")
            if what == "stall" and num_steps == int(step) - 1:
                time.sleep(1.0)  # whatever is being written is written when this step ends
            if what == "stall" and num_steps == int(step):
                (Path(config.algo.run.out) / f"stalled-{world.rank}").touch()
                time.sleep(600)
            return scores

        parts.scorer.collect = planted
        return parts

    scale.run.build = planted_build


if __name__ == "__main__":
    if "RANK" in os.environ:
        plant()
    sys.exit(launch.main(sys.argv[1:]))
