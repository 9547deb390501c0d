"""Thousands of bad inputs, drawn by Hypothesis: each has to end in one line on stderr and exit code 2, at once.

    python -m benchmarks.fuzz [--cases 5900]

Six kinds: fields of the command line, YAML files, prompt files, models' config.json, checkpoints that are damaged, verifiers that
cannot be used. Every input is bad by construction, so that one which is accepted is an error of the same rank as a traceback. The
command function is called in a forked child, with torch imported; one that is not done within LIMIT_S is a hang. Results go to
results/fuzz.csv batch by batch: a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import io
import logging
import math
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.common import RESULTS, provenance, whole_rows
from benchmarks.fuzz_inputs import FILES, JSONL, Case, checkpoints, fields, prompt_files, shapes, verifiers, yaml_files
from tppo_ref.runs import parsing

LIMIT_S = 30.0  # of one input, on a machine that does other work, too
BATCH = 100
OUTCOMES = ("refused", "traceback", "hang", "accepted", "unclear")
"""What may become of an input: "accepted" is exit code 0, "unclear" any other end than code 2 and one line of an error."""


KINDS: dict[str, tuple[Callable[[], st.SearchStrategy[Case]], int]] = {
    "configuration": (fields, 26), "yaml": (yaml_files, 11), "prompts": (prompt_files, 10), "models": (shapes, 6),
    "checkpoints": (checkpoints, 3), "verifiers": (verifiers, 3),
}  # fmt: skip
"""Strategy of each kind, and its batches of BATCH at 5,900 cases."""


def drawn(kind: str, batch: int, num: int) -> list[Case]:
    """The first `num` cases of a batch: the same in every process."""
    cases: list[Case] = []

    @seed(batch)
    @settings(max_examples=num, database=None, phases=[Phase.generate], deadline=None, suppress_health_check=list(HealthCheck))
    @given(KINDS[kind][0]())
    def draw(case: Case) -> None:
        cases.append(case)

    draw()
    return cases[:num]


# ------------------------------------------------------------------------------------------------------------------- one input


def good_run(folder: Path) -> None:
    """A run of two steps in `folder`/good, for checkpoints to be damaged."""
    with cwd(folder):
        for name, content in FILES.items():
            Path(name).write_bytes(content)
        code, said, _ = called(("train", *JSONL, "--run.steps", "2", "--run.out", "good", "--run.progress", "false"))
        assert code == 0, said


def damage(run: Path, name: str, how: str, place: int) -> None:
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    path = checkpoint / name
    data = path.read_bytes()
    at = place % len(data)
    if how == "removed":
        path.unlink()
        return
    flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
    path.write_bytes({"torn": data[: min(at, len(data) - 3)], "flipped": flipped, "junk": b"\x00junk", "empty": b""}[how])


@contextlib.contextmanager
def cwd(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def called(argv: tuple[str, ...]) -> tuple[int | None, str, str]:
    """(exit code or None, what went to stderr, a traceback or "") of the command in this process."""
    from tppo_ref.__main__ import main

    said, code, trace = io.StringIO(), None, ""
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            code = main(list(argv))
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            trace = traceback.format_exc()
    return code, said.getvalue(), trace


def outcome(case: Case, good: Path) -> tuple[str, str]:
    """What became of a case, and what it said."""
    with tempfile.TemporaryDirectory() as name, cwd(Path(name)):
        for file, content in case.files:
            path = file.replace("..", ".")
            if content is None:
                os.mkfifo(path)
            else:
                Path(path).write_bytes(content)
        if case.damage:
            shutil.copytree(good, "good")
            damage(Path("good"), *case.damage)
            for file, content in FILES.items():
                Path(file).write_bytes(content)
        own = () if case.damage else ("--run.out", "out", "--run.cache", "cache", "--run.progress", "false")
        sys.path.insert(0, name)  # where a verifier of the case is found
        code, said, trace = called((*case.argv[:1], *own, *case.argv[1:]) if not case.damage else case.argv)
        sys.path.remove(name)
    if trace:
        return "traceback", trace
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if code == 2 and len(errors) == 1 and said.strip().endswith(errors[0]) and "Traceback" not in said and len(errors[0]) < 2000:
        return "refused", said
    return ("accepted" if code == 0 else "unclear"), f"exit code {code}: {said}"


def child(cases: list[Case], good: Path, pipe: Connection) -> None:
    """Send the outcome of each case, in turn."""
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for case in cases:
        pipe.send(outcome(case, good))
    pipe.close()


def outcomes(cases: list[Case], good: Path) -> Iterator[tuple[Case, str, str]]:
    """What becomes of each case; a child that hangs or dies is blamed on the case that it was at."""
    fork, rest = multiprocessing.get_context("fork"), list(cases)
    while rest:
        ours, theirs = fork.Pipe(duplex=False)
        process = fork.Process(target=child, args=(rest, good, theirs))
        process.start()
        theirs.close()
        for case in list(rest):
            try:
                found = ours.recv() if ours.poll(LIMIT_S) else ("hang", f"not done within {LIMIT_S:g} s")
            except EOFError:
                found = ("traceback", "the process died")
            rest.pop(0)
            yield case, *found
            if found[0] == "hang" or found[1] == "the process died":
                break
        process.kill()
        process.join()


def tally(kind: str, batch: int, num: int, good: Path, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """How many cases of a batch ended how, and the CPU seconds that they took; what is not refused is told."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    counts: Counter[str] = Counter()
    for case, ended, said in outcomes(drawn(kind, batch, num), good):
        counts[ended] += 1
        if ended != "refused":
            argv = case.argv if case.damage else case.argv[1 + len(JSONL) :]
            files = {n: c and c[:200] for n, c in case.files if FILES.get(n, b"") != c}
            tell(f"{kind} {batch}: {ended}: {argv} {files} {case.damage or ''}\n{said[-1500:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "kind": kind,
        "batch": batch,
        "inputs": sum(counts.values()),
        **{o: counts[o] for o in OUTCOMES},
        "cpu_s": f"{cpu_s:.1f}",
    }


def keep_parser() -> None:
    """jsonargparse's parser is made once and not for each input: it takes most of an input's time, and keeps no state."""
    parsing._parser = functools.cache(parsing._parser)  # type: ignore[assignment]


def main() -> None:
    keep_parser()
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=5900, help="inputs in all, dealt over the kinds")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    arguments = parser.parse_args()
    path, rounds = RESULTS / "fuzz.csv", arguments.cases / (BATCH * sum(num for _, num in KINDS.values()))
    done = {(row["kind"], int(row["batch"])) for row in whole_rows(path)}
    with tempfile.TemporaryDirectory() as name:
        good_run(Path(name))
        for kind in arguments.kinds:
            for batch in range(math.ceil(KINDS[kind][1] * rounds)):
                if (kind, batch) in done:
                    continue
                row = tally(kind, batch, BATCH, Path(name) / "good") | provenance()
                new = not path.exists()
                with path.open("a", newline="") as file:
                    writer = csv.DictWriter(file, list(row))
                    if new:
                        writer.writeheader()
                    writer.writerow(row)
                print(*list(row.values())[:9], flush=True)


if __name__ == "__main__":
    main()
