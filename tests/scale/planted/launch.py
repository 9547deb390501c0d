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

    class PlantedSession(scale.run.ScaleSession):
        def _build(self):
            trainer = super()._build()
            collect = self.scorer.collect

            def planted():
                scores = collect()
                if what == "raise" and (trainer.num_steps, self.world.rank) == (int(step), int(rank)):
                    raise ZeroDivisionError("a planted mistake")
                if what == "stall" and trainer.num_steps == int(step) - 1:
                    time.sleep(1.0)  # whatever is being written is written when this step ends
                if what == "stall" and trainer.num_steps == int(step):
                    (self.out / f"stalled-{self.world.rank}").touch()
                    time.sleep(600)
                return scores

            self.scorer.collect = planted
            return trainer

    scale.run.ScaleSession = PlantedSession


if __name__ == "__main__":
    if "RANK" in os.environ:
        plant()
    sys.exit(launch.main(sys.argv[1:]))
