"""Kills of scale/: ranks over gloo, sharded models, and one rank, all of them or their launcher are struck.

    python -m benchmarks.kills --ranks 2 [--kills 200] [--minutes 30] [--out runs/kills_scale]

The part of benchmarks/kills.py that is about ranks. Runs of 8 tiny steps by scale/ (FSDP2, distributed checkpoints that are written
in the background, `TorchEngine`) are struck again and again until they are through. Then they are compared with the run that nobody
struck: responses, records, every tensor of the last checkpoint, every rank's state. In the case "other ranks" each attempt has one,
two or three ranks, and conservation is what is held.

A job is scale/launch.py's own launcher and ranks, forked where it would start programs: imports take longer than a run. Some jobs
have no launcher, as where a scheduler leaves alone what it has started. After the blow everybody has to leave. `left_s` is from the
blow until the last process of the job is gone; above `leave_s` the job stood still.

One row of the CSV is one attempt; what a run came to stands in its last row, that of the attempt that got through.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from benchmarks.common import report
from benchmarks.kill_jobs import RankPlan, attempt, judge
from benchmarks.kill_plans import TINY
from benchmarks.same_run import difference, leaves, responses
from scale import build
from scale.config import ScaleConfig
from tppo_ref.runs.build import base_model
from tppo_ref.runs.checkpoint import complete_checkpoints, step_of
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.sinks import EventFile, read_metrics
from tppo_ref.tasks import load_task

NAME = "kills_scale"
STEPS = 8
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tppo": ("tppo", {}),
    "held batches": ("tppo", {"value.batch_responses": 7, "policy.epochs": 2}),
    "tppo-ewma": ("tppo-ewma", {}),
    "other ranks": ("tppo-defer", {"advantage.tail_tokens": 5, "value.batch_responses": 7}),
}
TRIES = 60  # of one run, before it counts as stuck


def config_of(case: str, out: Path, cache: Path, ranks: int, timeout_s: float) -> ScaleConfig:
    """A case's config, which goes on where there is something to go on from."""
    method, changes = CASES[case]
    algo = TINY | changes | {"run.method": method, "run.steps": STEPS, "run.out": str(out), "run.cache": str(cache)}
    return replace_fields(ScaleConfig(), {f"algo.{name}": value for name, value in algo.items()} | {
        "engine.kind": "torch", "cluster.devices_per_node": ranks, "cluster.timeout_s": timeout_s, "cluster.requeued": True,
    })  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- what a run came to


def same_state(one: Path, two: Path) -> bool:
    """Whether the newest checkpoints hold the same, bit for bit, but for clock and torch's generator."""
    found = []
    for out in (one, two):
        newest = complete_checkpoints(out / "checkpoints")[-1]
        dcp_to_torch_save(newest / "shards", out / "whole.pt")
        tensors = dict(leaves(torch.load(out / "whole.pt", weights_only=True)))
        (out / "whole.pt").unlink()
        ranks = [json.loads(file.read_text())["trainer"] for file in sorted(newest.glob("rank-*.json"))]
        for state in ranks:
            del state["train_s"], state["torch_rng"]
        found.append((newest.name, tensors, ranks))
    (name, tensors, ranks), (other_name, other, other_ranks) = found
    return (name, ranks, tensors.keys()) == (other_name, other_ranks, other.keys()) and all(
        torch.equal(x, other[key]) if isinstance(x, torch.Tensor) else x == other[key] for key, x in tensors.items()
    )


def broken_laws(out: Path) -> dict[str, int]:
    """Conservation in what a run left, whatever its ranks were.

    lost    samples that were drawn, and have neither ended nor are in flight       twice    responses that are there twice
    books   steps that are missing, or whose tokens do not add up: generated = trained + excluded + pending, and generated grows by
            what was decoded
    """
    newest = complete_checkpoints(out / "checkpoints")[-1]
    states = [json.loads(file.read_text())["trainer"]["batcher"] for file in sorted(newest.glob("rank-*.json"))]
    streams, flying = [state["stream"] for state in states], [r["id"] for state in states for r in state["in_flight"]]
    waiting = {sample for stream in streams for sample in stream["backlog"]}
    rows = responses(out)
    drawn, ended = set(range(min(stream["next"] for stream in streams))), {int(id) for id in rows}
    books, generated, steps = 0, 0.0, [r for r in read_metrics(out / "metrics.jsonl") if "ledger/generated" in r]
    for record in steps:
        parts = sum(record[f"ledger/{name}"] for name in ("trained", "excluded_tail", "excluded_warmup", "pending"))
        grown = record["ledger/generated"] - generated
        books += record["ledger/generated"] != parts or grown != record["rollout/tokens"]
        generated = record["ledger/generated"]
    twice = sum(len(found) - 1 for found in rows.values()) + len(flying) - len(set(flying)) + len(ended & set(flying))
    missing = [record["step"] for record in steps] != list(range(1, STEPS + 1))
    return {"lost": len(drawn - ended - set(flying) - waiting), "twice": twice, "books": books + missing}


def verdict(reference: Path | None, out: Path) -> dict[str, int]:
    """What differs from the run that nobody struck, where there is one, and which laws are broken."""
    found = broken_laws(out)
    if reference is None:
        left = [path for path in (out / "checkpoints").iterdir() if not path.name.startswith("step-")]
        return found | {"other responses": 0, "other records": 0, "other state": 0, "left": len(left)}
    differs = difference(reference, out, same_state)
    return differs | {name: number + differs.get(name, 0) for name, number in found.items()}


def one_run(
    case: str, seed: int, work: Path, cache: Path, reference: Path | None, *, stop: Callable[[], bool]
) -> list[dict[str, Any]]:
    """Strike a run again and again until it is through, or TRIES times; a row for each attempt."""
    rng, rows = random.Random(f"{case} {seed}"), list[dict[str, Any]]()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for number in range(TRIES + 1):
        plan = RankPlan.draw(rng, ranks=rng.randint(1, 3) if case == "other ranks" else 2)
        config = config_of(case, work / "run", cache, plan.ranks, plan.timeout_s)
        end = attempt(config, plan, work, real_verifier=seed % 4 == 0, struck=number < TRIES and not stop())
        fault = judge(plan, end)
        steps = [step_of(path) for path in complete_checkpoints(work / "run" / "checkpoints")]
        rows.append({
            "case": case, "run": seed, "ranks": plan.ranks, "launcher": int(plan.launcher),
            "how": plan.how if end.struck else "none", "where": plan.where, "inside": plan.inside, "whom": plan.whom,
            "second": end.second, "exit": "" if end.status is None else os.waitstatus_to_exitcode(end.status),
            "left_s": round(end.left_s, 2), "step": max(steps, default=0), "fault": fault,
        })  # fmt: skip
        if fault:
            with (work.parent / "faults.txt").open("a") as file:
                print(f"{rows[-1]}\n{plan}\n{end.said[-4000:]}\n", file=file)
        if end.status == 0 and steps[-1:] == [STEPS]:
            found = verdict(reference, work / "run")
            if not any(found.values()) and not any(row["fault"] for row in rows):
                shutil.rmtree(work)
            return [*rows[:-1], rows[-1] | found]
    return [*rows[:-1], rows[-1] | {"stuck": 1}]


def unbroken(case: str, work: Path, cache: Path) -> Path:
    """The run of a case that nobody strikes; kept."""
    if not (work / "through").exists():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        plan = RankPlan("", "random", 0, 0, 0.0)
        end = attempt(config_of(case, work / "run", cache, plan.ranks, plan.timeout_s), plan, work, struck=False)
        assert end.status == 0, end.said
        (work / "through").touch()
    return work / "run"


def warm_up(cache: Path) -> None:
    """What all attempts share: imports, prompts, the base model; orphans of a job become this process's children."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    torch.set_num_threads(1)
    task = load_task("length")
    build.make_task = lambda config: task
    base_model(config_of("tppo", Path("nowhere"), cache, 2, 60.0).algo, task)
    EventFile(cache / "events", None).close()
    gc.collect()
    gc.freeze()


def measure(given: argparse.Namespace) -> None:
    """Strike runs until there are `given.kills` blows, or `given.minutes` are over."""
    cache, raw, deadline = given.out / "cache", given.out / "attempts.jsonl", time.monotonic() + 60 * given.minutes
    warm_up(cache)
    same_ranks = [case for case in given.cases if case != "other ranks"]
    references = {case: unbroken(case, given.out / f"unbroken-{case.replace(' ', '-')}", cache) for case in same_ranks}
    rows = [json.loads(line) for line in raw.read_text().splitlines()] if raw.exists() else []
    runs = len({(row["case"], row["run"]) for row in rows})
    while (done := sum(row["how"] != "none" for row in rows)) < given.kills and time.monotonic() < deadline:
        case, seed = given.cases[runs % len(given.cases)], runs // len(given.cases)
        work = given.out / f"run-{runs}"
        new = one_run(case, seed, work, cache, references.get(case), stop=lambda: time.monotonic() > deadline)
        with raw.open("a") as file:
            print(*map(json.dumps, new), sep="\n", file=file)
        rows, runs = rows + new, runs + 1
        print(f"{done + sum(row['how'] != 'none' for row in new)} kills: {new[-1]}", flush=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    report(NAME, [{name.replace(" ", "_"): row.get(name, "") for name in names} for row in rows], given.csv)
