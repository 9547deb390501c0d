"""The Trainer on a token MDP: T-PPO and its relatives as learners whose every number can be checked against the exact one.

`learn` builds a tppo_ref `Config`, steps the real `Trainer`, and after each step writes a `Record`: the policy's exact return,
the critic's true error, whom the critic's batch over-represents (docs/theory.md F6) and how old its targets are. Advantages, masks,
losses and schedules are tppo_ref's alone; agents.py holds what the Trainer drives, setting.py builds it, recorder.py watches it.

    history = learn(instances.load("thinking"), method="tppo", window=8, steps=100, seed=0)
    history[-1].mean_return, truth.optimum(mdp).mean_return

The Trainer knows terminal scores only: a response's score is the sum of its rewards. Where only the last token is rewarded this
is the MDP itself. With rewards on the way gamma = 1 is required and the return is paid at the end: the same policy gradient and
optimum, but a critic that sees the node only then has to learn V plus the expected rewards so far (truth.py).
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sim.lab.instances import Instance
from sim.lab.recorder import Record, Recorder
from sim.lab.setting import Setting, build


def learn(
    instance: Instance,
    *,
    steps: int | None = None,
    tokens: int | None = None,
    watch: Callable[[Recorder, Record], None] | None = None,
    **setting: Any,
) -> list[Record]:
    """Train on an MDP for `steps` Trainer steps, or until `tokens` tokens are sampled; the record of every step, step 0 first.

    The other arguments are the fields of `Setting`. watch(recorder, record) is called after each step.
    """
    if (steps is None) == (tokens is None):
        raise ValueError(f"steps, tokens: got {steps}, {tokens}; expected exactly one of them")
    chosen = Setting(**setting)
    trainer = build(instance, chosen)
    recorder = Recorder(instance.mdp, trainer)
    history = [recorder.record()]
    while history[-1].step < steps if steps is not None else history[-1].tokens < (tokens or 0):
        metrics = trainer.step()
        history.append(recorder.record(metrics, set_critic=chosen.oracle))
        if watch:
            watch(recorder, history[-1])
    return history


def table(history: Iterable[Record], **labels: Any) -> list[dict[str, Any]]:
    """Records as rows of a table, each with the same labels in front (method="ppo", seed=3)."""
    return [labels | dataclasses.asdict(record) for record in history]


def write_csv(path: Path | str, rows: Sequence[Mapping[str, Any]], *, append: bool = False) -> None:
    """Rows with equal keys as CSV. append: below what stands there; ValueError where its columns differ."""
    if not rows:
        return
    path, names = Path(path), list(rows[0])
    begun = append and path.exists() and path.stat().st_size > 0
    if begun:
        with path.open(newline="") as file:
            standing = next(csv.reader(file))
        if standing != names:
            raise ValueError(f"{path}: got columns {names}; expected {standing}, which stand there; write to another file")
    with path.open("a" if append else "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        if not begun:
            writer.writeheader()
        writer.writerows(rows)
