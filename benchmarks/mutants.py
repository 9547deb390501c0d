"""Which small changes of the code do the tests see? mutmut makes the mutants; each is planted alone and tested in a forked child.

    python -m benchmarks.mutants --hours 2     # needs the extra `mutants`; carries on where it was stopped
    python -m benchmarks.mutants --report      # the score; what was run goes to benchmarks/results

Of each room a sample is drawn (seed 0), and spread over the rooms in turn. A mutant meets the tests that reach its line (a run
under coverage, once, says which), those that have killed most of its file's mutants in the shortest time first, until one fails
or `CAP_S` of tests have passed; where ranks work together, tests on several ranks come after. killed: a test fails, or the
import; timeout: killed, too; survived: all passed; unreached: no test
runs the line. Prose (a string with a blank) and a word's case are not mutated.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import planted, swapped
from benchmarks.mutations import Mutant, Mutations, lines_of_statement

RESULTS, CACHE = planted.ROOT / "benchmarks" / "results", planted.ROOT / "runs" / "mutants"
PATH = CACHE / "mutants.csv"  # --report copies it to benchmarks/results
COLUMNS = ("room", "file", "digest", "number", "line", "before", "after", "verdict", "test", "seconds")
CAP_S = 6.0
SCALE = ("answers", "data", "distributed", "group", "rewards", "shaping", "sharding")
LAB = ("agents", "bias", "bounds", "critics", "envs", "estimators", "gradients", "instances", "learning", "rollouts",
       "stepping", "token_mdp", "trajectories", "truth", "unrolled")  # fmt: skip
ROOMS = {  # room -> (files, tests that are traced)
    "method": (
        ("tppo_ref/method/*.py",),
        ("advantages", "recurrence", "filters", "losses", "batching", "parallel", "trainer", "train_once", "whole_step"),
    ),
    "loop": (
        ("tppo_ref/loop/*.py",),
        ("trainer", "train_once", "microbatches", "parallel", "whole_step", "methods", "restart_state", "ledger", "masters",
         "validation", "docs", "two_devices", "cut_rules"),
    ),
    "rollout": (
        ("tppo_ref/rollout/*.py",),
        ("batching", "engines", "models", "kernels", "head", "constant_prefix", "trainer", "train_once", "restart_state",
         "microbatches", "bad_inputs", "two_devices"),
    ),
    "lab": (tuple(f"sim/lab/{name}.py" for name in LAB), ("token_mdp", "bias", "envs", "learning", "cut_rules")),
    "scale": (
        tuple(f"scale/{name}.py" for name in SCALE),
        ("scale/level", "scale/rewards", "scale/group", "scale/answers", "scale/data", "scale/left_out", "scale/sharding"),
    ),
}  # fmt: skip
RANKS = {  # of these files, what their traced tests let live meets tests on several ranks, whose processes coverage does not follow
    f"scale/{name}.py": ("tests/scale/test_whole_step_on_ranks.py", "tests/scale/test_sharding.py", "tests/scale/test_level.py")
    for name in ("distributed", "group", "sharding")
}
HYPOTHESIS = """
from hypothesis import HealthCheck, Phase, settings
settings.register_profile("mutants", deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck),
                          phases=[Phase.explicit, Phase.generate])
settings.load_profile("mutants")
"""
"""conftest.py of the copy: the same examples for every mutant, and none is made smaller."""


def files(room: str) -> list[str]:
    return sorted(str(path.relative_to(planted.ROOT)) for pattern in ROOMS[room][0] for path in planted.ROOT.glob(pattern))


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def tests(room: str) -> list[str]:
    return [f"tests/{Path(name).parent / ('test_' + Path(name).name)}.py".replace("/./", "/") for name in ROOMS[room][1]]


def traced(root: Path, rooms: Sequence[str]) -> dict[str, Any]:
    """{"seconds": test -> s, "reached": file -> line -> tests}, measured once per test file, or read from runs/mutants."""
    whole: dict[str, Any] = {"seconds": {}, "reached": {}}
    CACHE.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(name for room in rooms for name in tests(room)):
        path = CACHE / (name.replace("/", "-") + ".json")
        if not path.exists():
            outcome = planted.run(root, [name], 1200, [planted.Traced(path)])
            if outcome.code != 0:
                path.unlink(missing_ok=True)
                raise SystemExit(f"{name} does not pass as it is:\n{outcome.output[-3000:]}")
            print(f"{name}: {outcome.seconds:.0f} s", flush=True)
        part = json.loads(path.read_text())
        whole["seconds"] |= part["seconds"]
        for file, lines in part["reached"].items():
            for line, contexts in lines.items():
                whole["reached"].setdefault(file, {}).setdefault(int(line), set()).update(contexts)
    return whole


class Run:
    """Mutants of some rooms, one after the other."""

    def __init__(self, root: Path, rooms: Sequence[str], each: int, hours: float) -> None:
        self.root, self.rooms, self.each = root, rooms, each
        self.end = time.monotonic() + 3600 * hours
        self.trace = traced(root, rooms)
        self.made: dict[str, Mutations] = {}

    def __call__(self, loop: swapped.Loop) -> None:
        rows = read()  # of files that have changed since, too: their mutants were what they were
        done = {(row["file"], row["digest"], int(row["number"])) for row in rows}
        self.kills = Counter((row["file"], row["test"]) for row in rows)
        todo = [(room, file, n) for room, file, n in self.sample() if (file, digest(self.of(file).text), n) not in done]
        begin, counts = time.monotonic(), Counter[str]()
        with PATH.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
            for i, (room, name, number) in enumerate(todo):
                if time.monotonic() > self.end:
                    break
                mutant, start = self.of(name)[number], time.monotonic()
                what, test = self.verdict(loop, mutant)
                self.kills[name, test] += 1
                counts[what] += 1
                where = (room, name, digest(self.of(name).text), number, mutant.line, mutant.before, mutant.after)
                row = (*where, what, test, f"{time.monotonic() - start:.1f}")
                writer.writerow(dict(zip(COLUMNS, row, strict=True)))
                file.flush()
                rate = (i + 1) / (time.monotonic() - begin)
                left = min((len(todo) - i - 1) / rate, self.end - time.monotonic()) / 60
                print(f"{i + 1} of {len(todo)}, {60 * rate:.0f} a minute, {left:.0f} min left: {dict(counts)}", flush=True)

    def of(self, file: str) -> Mutations:
        if file not in self.made:
            self.made[file] = Mutations(self.root, file)
        return self.made[file]

    def sample(self) -> Iterator[tuple[str, str, int]]:
        """(room, file, number of the mutant): `each` of every room in the order of a fixed shuffle, the rooms in turn."""
        queues = []
        for room in self.rooms:
            numbered = [(room, file, number) for file in files(room) for number in range(len(self.of(file)))]
            random.Random(f"{room} 0").shuffle(numbered)
            print(f"{room}: {len(numbered)} mutants", flush=True)
            queues.append(numbered[: self.each])
        for i in range(self.each):
            yield from (queue[i] for queue in queues if i < len(queue))

    def choose(self, mutant: Mutant) -> list[str]:
        """Tests that reach the statement, cheapest kill first, up to the cap; of a line that runs at import, its file's."""
        reached = self.trace["reached"].get(mutant.file, {})
        lines = lines_of_statement(self.of(mutant.file).text, mutant.line)
        contexts = set[str]().union(*(reached.get(line, set()) for line in lines))
        if contexts == {""}:
            contexts = set[str]().union(*reached.values())
            contexts = self.trace["seconds"].keys() if contexts == {""} else contexts  # a file of constants
        seconds = {t: s for t, s in self.trace["seconds"].items() if t in contexts or t.partition("::")[0] in contexts}
        chosen, spent = [], 0.0
        for test in sorted(seconds, key=lambda t: (seconds[t] + 0.05) / (1 + 20 * self.kills[mutant.file, t])):
            if chosen and spent + seconds[test] > CAP_S:
                break
            chosen.append(test)
            spent += seconds[test]
        return chosen

    def verdict(self, loop: swapped.Loop, mutant: Mutant) -> tuple[str, str]:
        """What became of the mutant, and the test that killed it."""
        chosen = self.choose(mutant)
        what, test = self.alone(loop, mutant, chosen) if chosen else ("unreached", "")
        if what in ("survived", "unreached") and mutant.file in RANKS:
            with planted.planted(self.root, mutant.file, mutant.text):
                outcome = planted.run(self.root, ["-p", "no:warnings", *RANKS[mutant.file]], 400)
            what = "survived" if outcome.code == 0 else "timeout" if outcome.code is None else "killed"
            test = (outcome.failed or [""])[0]
        return what, test

    def alone(self, loop: swapped.Loop, mutant: Mutant, chosen: Sequence[str]) -> tuple[str, str]:
        limit = 20 + 5 * sum(self.trace["seconds"][test] for test in chosen)
        failed: str | None = swapped.UNPLANTED
        if swapped.in_function(self.of(mutant.file).text, mutant.line):
            module = mutant.file.removesuffix(".py").replace("/", ".")
            failed = loop.trial(module, mutant.text, chosen, limit).failed
        if failed == swapped.UNPLANTED:
            failed = self.planted(mutant, chosen, limit)
        return ("timeout", "") if failed is None else ("killed", failed) if failed else ("survived", "")

    def planted(self, mutant: Mutant, chosen: list[str], limit: float) -> str | None:
        """As `Loop.trial`, with the mutant in its file, for what runs at import."""
        for file in dict.fromkeys(test.partition("::")[0] for test in chosen):  # one at a time: most die in the first
            these = [test for test in chosen if test.startswith(f"{file}::")]
            with planted.planted(self.root, mutant.file, mutant.text):
                outcome = planted.run(self.root, ["-p", "no:warnings", file], limit, [planted.Chosen(these)])
            if outcome.code != 0:
                return None if outcome.code is None else (outcome.failed or [f"{file}: exit code {outcome.code}"])[0]
        return ""


def read() -> list[dict[str, str]]:
    if not PATH.exists():
        return []
    with PATH.open(newline="") as file:
        return list(csv.DictReader(file))


def run(rooms: Sequence[str], each: int, hours: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = planted.copy(Path(folder))
        (root / "conftest.py").write_text(HYPOTHESIS)
        body = Run(root, rooms, each, hours)
        os.chdir(root)
        swapped.collected(list(dict.fromkeys(name for room in rooms for name in tests(room))), f"{folder}/basetemp", body)


def score(rows: Sequence[dict[str, str]], reasons: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Of the mutants tried: how many died, how many could not (equivalent), and the share of the others that died.

    A survivor without a reason counts as a gap. `killed later`: by a test that was written for it.
    """
    why = {(row["file"], row["digest"], row["number"]): row["reason"] for row in reasons}
    said = Counter(why.get((row["file"], row["digest"], row["number"]), row["verdict"]) for row in rows)
    killed = said["killed"] + said["timeout"] + said["killed elsewhere"]
    no_change = said["equivalent"] + said["only a message"]
    return {
        "tried": len(rows), "killed": killed, "equivalent": said["equivalent"], "message": said["only a message"],
        "killed_later": said["killed later"], "gap": len(rows) - killed - no_change - said["killed later"],
        "score": f"{(killed + said['killed later']) / max(len(rows) - no_change, 1):.4f}",
    }  # fmt: skip


def report() -> None:
    from benchmarks.common import report, whole_rows

    rows, reasons = read(), whole_rows(RESULTS / "mutants_reasons.csv")
    shutil.copy(PATH, RESULTS / "mutants.csv")
    table = []
    for room in (*ROOMS, "all"):
        of_room = [row for row in rows if room in (row["room"], "all")]
        rooms = ROOMS if room == "all" else [room]
        made = sum(len(Mutations(planted.ROOT, file)) for name in rooms for file in files(name))
        table.append({"room": room, "mutants": made} | score(of_room, reasons))
    report("mutants_summary", table)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rooms", nargs="+", default=list(ROOMS), choices=list(ROOMS))
    parser.add_argument("--each", type=int, default=400, help="mutants drawn from each room")
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--report", action="store_true", help="runs nothing: the table and the score of what was run")
    chosen = parser.parse_args(arguments)
    if chosen.report:
        return report()
    run(chosen.rooms, chosen.each, chosen.hours)


if __name__ == "__main__":
    main()
