"""Cut rule x critic x window: does the best rule at the cut depend on how good the critic is? On text, at equal generated tokens.

    python -m benchmarks.factorial [--seeds 32] [--jobs 2]      # says how long it will take; --seeds 0 only prints what is there
    python -m benchmarks.factorial --tasks maze brackets        # the same of the two tasks made to test the cut: a study of its own

Arms, contrasts, verdicts and stopping rules: prestated/2026-11-21-factorial.md, and for maze and brackets
2026-11-22-factorial-new-tasks.md, each written before its first run. No tail, four answers per prompt at each evaluation; how such
a study is made and told: benchmarks/study.py.

Writes results/factorial.csv or factorial-new-tasks.csv, a row per evaluation.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence

from benchmarks import study, workers
from benchmarks.common import RESULTS
from benchmarks.equal_tokens import Arm
from benchmarks.study import Study, Weights

TASKS, NEW_TASKS = ("chain", "fork"), ("maze", "brackets")
CUTS = {"previous": "tppo", "critic": "tppo-critic-cut", "zero": "tppo-zero-cut"}  # rule at the cut -> method
CRITICS = {"weak": 1024, "strong": 8192}  # responses that it was pre-trained on
WINDOWS = (16, 64)
Cell = tuple[str, str, int]  # cut, critic, window
CELLS: tuple[Cell, ...] = tuple(itertools.product(CUTS, CRITICS, WINDOWS))


def name(cell: Cell) -> str:
    return "-".join(map(str, cell))


def arm(cell: Cell) -> Arm:
    cut, _, window = cell
    return Arm(CUTS[cut], {"advantage.tail_tokens": 0, "rollout.window": window})


def weights(*, cut: Mapping[str, float] | None = None, critic: Mapping[str, float] | None = None,
            window: Mapping[int, float] | None = None) -> Weights:  # fmt: skip
    """Weight of each cell: a product over the factors, each a mean over its levels where nothing else is said."""
    cut, critic = cut or dict.fromkeys(CUTS, 1 / len(CUTS)), critic or dict.fromkeys(CRITICS, 1 / len(CRITICS))
    window = window or dict.fromkeys(WINDOWS, 1 / len(WINDOWS))
    return {name((c, q, w)): cut.get(c, 0.0) * critic.get(q, 0.0) * window.get(w, 0.0) for c, q, w in CELLS}


CRITIC_CUT = {"critic": 1.0, "previous": -1.0}
BETTER_CRITIC = {"strong": 1.0, "weak": -1.0}
CONTRASTS: dict[str, Weights] = {
    "(critic - previous) x (strong - weak)": weights(cut=CRITIC_CUT, critic=BETTER_CRITIC),
    "critic - previous, weak": weights(cut=CRITIC_CUT, critic={"weak": 1.0}),
    "critic - previous, strong": weights(cut=CRITIC_CUT, critic={"strong": 1.0}),
    "zero - previous": weights(cut={"zero": 1.0, "previous": -1.0}),
    "window 16 - 64, previous": weights(cut={"previous": 1.0}, window={16: 1.0, 64: -1.0}),
    "strong - weak, previous": weights(cut={"previous": 1.0}, critic=BETTER_CRITIC),
}
"""The first is primary. All are means over what they do not name, and over the tasks."""

FACTORIAL = Study(
    plan="2026-11-21-factorial.md", path=RESULTS / "factorial.csv", tasks=TASKS, seeds=32,
    arms={name(cell): arm(cell) for cell in CELLS}, contrasts=CONTRASTS,
    models={name(cell): {"value.pretrain_responses": CRITICS[cell[1]]} for cell in CELLS},
)  # fmt: skip
NEW = FACTORIAL._replace(
    plan="2026-11-22-factorial-new-tasks.md", path=RESULTS / "factorial-new-tasks.csv", tasks=NEW_TASKS, run_s=20.0
)
STUDIES = {made.tasks: made for made in (FACTORIAL, NEW)}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes as workers.command says."""
    options = study.options(__doc__)
    options.add_argument("--tasks", nargs="+", default=TASKS, help="of one study: chain fork, or maze brackets")
    arguments = workers.parsed(options, argv)
    if (tasks := tuple(arguments.tasks)) not in STUDIES:  # contrasts are means over all tasks of a plan
        options.error(f"--tasks: got {' '.join(tasks)}; expected {' or '.join(' '.join(known) for known in STUDIES)}")
    return study.command(STUDIES[tasks], arguments)


if __name__ == "__main__":
    sys.exit(main())
