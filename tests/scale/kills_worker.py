"""A few kills of benchmarks/kills_on_ranks.py, each of them chosen: kills_worker.py OUT. Prints FOUND and what came of them.

Its waits are shorter than a user's: who is left to wait does so for seconds.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from benchmarks import kills_on_ranks
from benchmarks.kill_jobs import RankPlan, attempt, judge
from scale import launch, shutdown

STEPS = 6  # the value model is updated when responses end, and the policy behind it
PLANS = {
    "a rank as it saves": RankPlan("SIGKILL", "save", 4, 3, 0.0, whom="rank 1"),
    "a rank while a checkpoint loads": RankPlan("SIGKILL", "start", 1, 5, 0.0, whom="rank 1", launcher=False),
    "the first rank stands still": RankPlan("SIGSTOP for good", "decode", 2, 0, 0.0, whom="rank 0", timeout_s=10.0),
    "the launcher": RankPlan("SIGKILL", "save", 1, 7, 0.0, whom="launcher"),
    "nobody": RankPlan("", "random", 0, 0, 0.0),
}


def main(out: Path) -> dict[str, object]:
    kills_on_ranks.STEPS, cache, work = STEPS, out / "cache", out / "struck"
    shutdown.QUIET_S, shutdown.CLAIM_S, launch.GRACE_S = 0.5, 1.0, 1.0
    work.mkdir()
    kills_on_ranks.warm_up(cache)
    reference = kills_on_ranks.unbroken("tppo", out / "unbroken", cache)
    ended = {}
    for name, plan in PLANS.items():
        config = kills_on_ranks.config_of("tppo", work / "run", cache, plan.ranks, plan.timeout_s)
        end = attempt(config, plan, work, real_verifier=False, struck=bool(plan.how))
        ended[name] = {"fault": judge(plan, end), "said": end.said, "struck": end.struck, "inside": plan.inside}
    return {"ended": ended, "verdict": kills_on_ranks.verdict(reference, work / "run")}


if __name__ == "__main__":
    print("FOUND " + json.dumps(main(Path(sys.argv[1]))), flush=True)
    os._exit(0)
