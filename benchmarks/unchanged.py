"""Did a re-arrangement change a number? The same commands in two checkouts, and what they write, compared bit for bit.

    python -m benchmarks.unchanged                              this folder against the committed numbers
    python -m benchmarks.unchanged --before FOLDER              this folder against another checkout; names the first row
    python -m benchmarks.unchanged --before FOLDER --store NEW  write FOLDER's numbers down, and compare nothing
    python -m benchmarks.unchanged --runs tppo ppo bias-cliff   some of the runs

Where numbers change on purpose, docs/log.md names the columns and why, and the new ones are stored in place of the old:

    python -m benchmarks.unchanged --before . --store NEW && python -m benchmarks.unchanged --after NEW

It knows command lines and output files, no modules: files may move, and fields may be renamed. Each command runs by itself, on one
thread, with a fixed seed. Compared are every record of metrics.jsonl and every cell of each CSV, wall-clock left out, the weights
of base models and checkpoints, and the laboratory's and the clock's tables. Settings that are not the defaults make things happen
within 20 short steps: windows cut, caps are reached, clips bind, some answers are right and some are wrong.

A column that only one side has is listed and fails nothing, as long as most of a run's columns are on both. Exit code: 0 nothing
changed, 1 something did, 2 there is nothing to compare. Stored numbers hold for one processor and one torch. Where those differ the
program says so, and last bits may differ for that reason alone: `--before CHECKOUT` measures both sides here.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.columns import Difference, Side, collect, column, compare, load, other_conditions, store, tensor_digests

STORED = Path(__file__).parent / "results" / "unchanged"


# ------------------------------------------------------------------------------------------------------------------- what is run


@dataclasses.dataclass(frozen=True)
class Run:
    """A command under a name. `spellings`: the same command in several versions' words; the first that a checkout takes is run.

    may_go   whether a checkout may refuse them all (exit code 2): what the run is about is offered no more
    """

    name: str
    spellings: Sequence[str]
    may_go: bool = False


COMMON = (
    "--task.verifier_timeout_s 100 --rollout.slots 8 --rollout.max_response_tokens 64 --run.eval_prompts 16 --run.progress false "
    "--run.out out --run.cache ../cache"
)
TRAIN = f"tppo_ref train {COMMON} --run.steps 20 --run.eval_every_s 0 --policy.mini_batch_tokens 40"
CHAIN = "--model.warm_start_steps 400"  # fewer, and every answer is wrong: one score says nothing about scores
LENGTH = "--task.name length --model.warm_start_steps 150"
WINDOWS = "--rollout.window 16"
APART = "--value.mini_batch_tokens 40"  # of the value model's own update; a joint one has the policy's mini-batches


def tppo(name: str, *spellings: str, may_go: bool = False) -> Run:
    """T-PPO with other options."""
    return Run(name, [f"{TRAIN} {CHAIN} {WINDOWS} {APART} {options}" for options in spellings], may_go)


RUNS = [
    Run("ppo", [f"{TRAIN} {CHAIN} --run.method ppo"]),
    Run("ppo-dual", [f"{TRAIN} {CHAIN} {APART} --run.method ppo-dual"]),
    tppo("tppo", "--run.method tppo"),
    tppo("tppo-defer", "--run.method tppo-defer"),
    tppo("tppo-ewma", "--run.method tppo-ewma"),
    tppo("partial-is", "--run.method partial-is"),
    tppo("tppo-critic-cut", "--run.method tppo-critic-cut"),
    tppo("tppo-zero-cut", "--run.method tppo-zero-cut"),
    tppo("discounted", "--advantage.gamma 0.97 --advantage.lam 0.9 --advantage.length_adaptive_lam false",
         "--advantage.gamma 0.97 --advantage.lam 0.9 --advantage.lam_alpha null"),
    tppo("adaptive-lam", "--advantage.lam 0.8 --advantage.lam_alpha 0.5"),  # as it is, responses this short have the floor
    tppo("no-tail", "--advantage.tail none", "--advantage.tail_tokens 0"),
    tppo("defer-critic-cut", "--run.method tppo-defer --advantage.cut_value critic --advantage.tail_tokens 4 --advantage.clamp 1"),
    tppo("tight-clips", "--policy.clip_low 0.01 --policy.clip_high 0.02 --policy.dual_clip 1.01 --policy.lr 1e-3 "
         "--policy.lm_loss_weight 0.5 --value.clip_low 0.02 --value.clip_high 0.03 --advantage.whiten false"),
    tppo("no-clips", "--policy.dual_clip null --value.clip_low null --value.clip_high null --policy.max_grad_norm 0.1"),
    tppo("importance-truncated", "--run.method tppo-defer --policy.importance truncated --policy.importance_cap 1.01"),
    tppo("importance-masked", "--policy.train_on ended --policy.importance masked --policy.importance_cap 1.01"),
    tppo("epochs", "--policy.epochs 2 --value.epochs 2 --policy.mini_batch_tokens 0 --policy.mini_batches 3 "
         "--value.mini_batch_tokens 0 --value.mini_batches 2 --policy.micro_batch_tokens 100 --value.micro_batch_tokens 100"),
    tppo("held-responses", "--value.batch_responses 6"),
    Run("joint", [f"{TRAIN} {CHAIN} {WINDOWS} --value.update joint"]),
    tppo("warm-up", "--value.warmup_steps 4 --policy.lr_warmup_steps 6 --value.lr_warmup_steps 3"),
    tppo("constant-prefix", "--policy.prefix constant"),
    tppo("engine-logprobs", "--policy.old_logprobs engine --rollout.refill step --rollout.samples_per_prompt 2 "
         "--rollout.temperature 0.8 --rollout.min_response_tokens 3 --model.logit_chunk_tokens 32"),
    Run("length", [f"{TRAIN} {LENGTH} {WINDOWS} {APART} --run.seed 3"]),
    Run("pretrain-value", [f"tppo_ref pretrain-value {COMMON} {LENGTH} --value.pretrain_responses 64 --value.pretrain_epochs 2"]),
    Run("evaluate", [f"tppo_ref evaluate {COMMON} {LENGTH} --run.eval_samples 2"]),
    Run("bias-calm-chain", ["sim bias --instance calm-chain --window 4 8 16 --out out"]),
    Run("bias-cliff", ["sim bias --instance cliff --window 4 8 --gamma 0.97 --lam 0.8 --alpha 0.5 --tail 3 "
                       "--behind 0.5 --offsets all --out out "
                       "--estimators egae cut-gae zero-cut egae-exclude egae-defer egae-drop egae-adaptive"]),
    Run("bias-noisy-reward", ["sim bias --instance noisy-reward --window 2 4 --logits state --critic noise:0.3 --seed 1 "
                              "--out out"]),
    Run("throughput", ["sim throughput --tables conditions lengths methods timeline --out out"]),
    Run("plan-32b", ["sim plan --model Qwen/Qwen2.5-32B --gpus 64xH800 --lengths dapo-32b --train-step 2000 --json"]),
    Run("plan-7b", ["sim plan --model Qwen/Qwen2.5-7B --gpus 16xH800 --lengths math-14b --refill step --offload --json"]),
    Run("plan-too-large", ["sim plan --model Qwen/Qwen2.5-72B --gpus 8xH800 --json"]),
]  # fmt: skip


# --------------------------------------------------------------------------------------------------------------------- running it


def measure(checkout: Path, runs: Sequence[Run]) -> Side:
    """Run each command in `checkout`. SystemExit (2) where Python would import another tree than that."""
    checkout, side, before_s = checkout.resolve(), Side(), children_s()
    with tempfile.TemporaryDirectory() as scratch:
        check_imports(checkout, Path(scratch))
        for run in (bar := tqdm(runs, desc=checkout.name, unit="run")):
            bar.set_postfix_str(run.name)
            folder = Path(scratch, run.name)
            done = first_accepted(checkout, folder, run)
            if done.returncode == 0:
                side.runs[run.name] = collect(folder / "out", done.stdout, timed=run.spellings[0].startswith("tppo_ref"))
            elif not (run.may_go and done.returncode == 2):
                side.failed[run.name] = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            for versions in folder.glob("out/versions.json"):
                side.provenance |= json.loads(versions.read_text())
        models = sorted(Path(scratch).glob("cache/*-*/model.safetensors"))  # their folders are named TASK-HASH
        if models:
            side.runs["base-models"] = {p.parent.name.rpartition("-")[0]: column(tensor_digests(p)) for p in models}
    side.provenance |= {
        "instructions": torch.backends.cpu.get_cpu_capability(), "commit": commit(checkout),
        "date": datetime.date.today().isoformat(), "cpu_s": round(children_s() - before_s),
    }  # fmt: skip
    return side


def first_accepted(checkout: Path, folder: Path, run: Run) -> subprocess.CompletedProcess[str]:
    """The run in its first spelling that `checkout` does not refuse as a user's mistake; else the last one's refusal."""
    folder.mkdir()
    for spelling in run.spellings:
        done = python(checkout, folder, "-m", *shlex.split(spelling))
        if done.returncode != 2:
            break
    return done


def python(checkout: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python on one thread in `folder`, with `checkout` before whatever is installed."""
    environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)


def check_imports(checkout: Path, elsewhere: Path) -> None:
    """The classical mistake: two checkouts, and one installed package that both of them import."""
    for name in ("tppo_ref", "sim"):
        code = f"import importlib.util as u; print(getattr(u.find_spec({name!r}), 'origin', None))"
        origin = python(checkout, elsewhere, "-c", code).stdout.strip()
        if Path(origin).resolve() != checkout / name / "__init__.py":
            print(f"error: {checkout}: got {name} from {origin}; expected it here; give a checkout's folder", file=sys.stderr)
            raise SystemExit(2)


def children_s() -> float:
    """CPU seconds of all processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "no commit"


# ------------------------------------------------------------------------------------------------------------------------ the door


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {run.name: run for run in RUNS}
    parser.add_argument("--before", type=Path, default=STORED, metavar="FOLDER", help="a checkout, or what --store wrote")
    parser.add_argument("--after", type=Path, default=Path(), metavar="FOLDER", help="the same")
    parser.add_argument("--store", type=Path, metavar="FOLDER", help="where to write the numbers of --before")
    parser.add_argument("--runs", nargs="+", default=list(known), choices=known, metavar="NAME", help=f"of {', '.join(known)}")
    options = parser.parse_args(argv)
    runs = [known[name] for name in options.runs]
    before = side(options.before, runs)
    for name, why in before.failed.items():
        print(f"error: {name} does not run in {options.before}: {why}", file=sys.stderr)
    if before.failed:
        return 2
    if options.store:
        store(before, options.store)
        return 0
    after = side(options.after, runs)
    if len(runs) < len(RUNS):  # base models are those of all runs
        for each in (before, after):
            each.runs = {name: columns for name, columns in each.runs.items() if name in options.runs}
    differences, alone = compare(before, after)
    report(differences, alone, other_conditions(before.provenance, after.provenance))
    num_columns = sum(len(columns) for columns in before.runs.values())
    print(f"{len(differences)} of {num_columns} columns of {len(before.runs)} runs differ, {before.provenance['commit']} against "
          f"{after.provenance['commit']}, {after.provenance['cpu_s']} s of CPU time")  # fmt: skip
    return int(bool(differences))


def side(folder: Path, runs: Sequence[Run]) -> Side:
    """The numbers of a checkout, or those that were stored in a folder."""
    return load(folder) if (folder / "columns.csv").exists() else measure(folder, runs)


def report(differences: Sequence[Difference], alone: Sequence[str], conditions: Sequence[str]) -> None:
    """A line for each thing that somebody should look at."""
    for line in alone:
        print(f"one side only: {line}")
    for line in conditions:
        print(f"note: {line}; last bits may differ for this reason alone")
    if differences:
        table = [Difference._fields, *differences]
        widths = [max(len(row[i]) for row in table) for i in range(len(Difference._fields))]
        for row in table:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


if __name__ == "__main__":
    sys.exit(main())
