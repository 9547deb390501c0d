"""A sample of `python -m benchmarks.kills --ranks 2`, and that its judges see what they look for."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
from scale_helpers import HERE, LIMIT_S, ROOT, environment

from benchmarks import kills_on_ranks
from benchmarks.kill_jobs import FIRST_RANKS, End, RankPlan, judge, places
from benchmarks.kill_plans import WHERES
from benchmarks.kills_on_ranks import verdict
from scale import shutdown
from tppo_ref.runs.checkpoint import complete_checkpoints

NOTHING = dict.fromkeys(("lost", "twice", "books", "other responses", "other records", "other state", "left"), 0)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    out = tmp_path_factory.mktemp("kills")
    done = subprocess.run([sys.executable, str(HERE / "kills_worker.py"), str(out)], env=environment(), cwd=ROOT, capture_output=True,
                          text=True, timeout=LIMIT_S)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return out, json.loads(next(x for x in done.stdout.splitlines() if x.startswith("FOUND ")).removeprefix("FOUND "))


def test_a_run_on_two_ranks_that_was_struck_is_the_run_that_was_not(sample):
    assert sample[1]["verdict"] == NOTHING


def test_after_each_blow_everybody_left_and_one_line_says_why(sample):
    ended = sample[1]["ended"]
    assert {name: end["fault"] for name, end in ended.items()} == dict.fromkeys(ended, "")
    assert {name: end["struck"] for name, end in ended.items()} == {name: name != "nobody" for name in ended}
    assert "error: rank 1 was killed (SIGKILL)" in ended["a rank as it saves"]["said"]


def test_a_rank_that_is_lost_while_a_checkpoint_loads_is_no_fault_of_the_checkpoint(sample):
    end = sample[1]["ended"]["a rank while a checkpoint loads"]
    assert end["inside"] == "load"
    assert "error: rank 0 lost another rank" in end["said"]
    assert "does not fit this run" not in end["said"]


def test_a_first_rank_that_stands_still_keeps_nobody_from_leaving_with_a_word(sample):
    """It holds the store in which ranks agree on who tells: whoever asks it waits for an answer."""
    assert "error: rank 1 waited for another rank in vain" in sample[1]["ended"]["the first rank stands still"]["said"]


def test_ranks_that_leave_in_order_do_not_mind_one_that_could_not(monkeypatch):
    """Its disk was full as it wrote the last evaluation: it has told, and the others were through."""

    def barrier():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "barrier", barrier)
    shutdown.wait_for_all_ranks()


# -------------------------------------------------------------------------------------------------- judges see what they look for


def older_shards(out):
    older, newest = complete_checkpoints(out / "checkpoints")[-2:]
    shutil.rmtree(newest / "shards")
    shutil.copytree(older / "shards", newest / "shards")


def newest_rank(out):
    return complete_checkpoints(out / "checkpoints")[-1] / "rank-00001.json"


def edit(path, change):
    path.write_text(change(path.read_text()))


def without_a_flight(text):
    state = json.loads(text)
    state["trainer"]["batcher"]["in_flight"].pop()
    return json.dumps(state)


def last_line(text):
    return text.splitlines(keepends=True)[-1]


@pytest.mark.parametrize(
    ("harm", "seen"),
    [
        (older_shards, {"other state"}),
        (lambda out: edit(newest_rank(out), without_a_flight), {"lost", "other state"}),
        (lambda out: edit(out / "responses.csv", lambda text: text + last_line(text)), {"twice", "other responses"}),
        (lambda out: edit(out / "responses.csv", lambda text: text.removesuffix(last_line(text))), {"lost"}),
        (lambda out: edit(out / "metrics.jsonl", lambda text: text.replace('"ledger/trained": ', '"ledger/trained": 1')),
         {"books", "other records"}),
        (lambda out: (out / "checkpoints" / ".removed-step-00000001").mkdir(), {"left"}),
    ],
)  # fmt: skip
def test_the_judges_see_what_they_look_for(harm, seen, sample, tmp_path, monkeypatch):
    monkeypatch.setattr(kills_on_ranks, "STEPS", 6)
    reference = sample[0] / "unbroken" / "run"
    shutil.copytree(reference, tmp_path / "run")
    assert verdict(reference, tmp_path / "run") == NOTHING
    harm(tmp_path / "run")
    assert {name for name, number in verdict(reference, tmp_path / "run").items() if number} == seen


def test_how_a_job_may_end_depends_on_what_was_done_to_it():
    def plan(how, whom="rank 1", **more):
        return RankPlan(how, "save", 1, 0, 0.0, whom=whom, **more)

    def end(code, said="", *, struck=True, **more):
        return End(9 if code == -9 else code << 8, struck, 0.1, said, **more)

    line = "error: rank 1 was killed (SIGKILL); start again\n"
    assert judge(plan("SIGKILL"), end(1, line)) == judge(plan("SIGKILL", "launcher"), end(-9)) == judge(plan("x"), end(0)) == ""
    assert judge(plan("full disk"), end(2, line)) == judge(plan("SIGTERM"), end(130, "stopped\n")) == ""
    assert judge(plan("SIGKILL", "all ranks", launcher=False), end(1)) == ""
    assert judge(plan("SIGKILL", launcher=False), end(1)) == "exit code 1, 0 lines", "the other one is there to tell"
    assert judge(plan("SIGKILL", launcher=False), end(2, line)) == "exit code 2, 1 lines"
    assert judge(plan("SIGKILL", launcher=False), end(2, "error: network: rank 1 of 2 did not reach\n")) == ""
    assert judge(plan("SIGKILL"), end(1, line + line)) == "exit code 1, 2 lines"
    assert judge(plan("SIGKILL"), end(1)) == "exit code 1, 0 lines"
    assert judge(plan("SIGKILL"), end(1, "Traceback (most recent call last):\n" + line)) == "traceback"
    assert judge(plan("SIGKILL"), End(None, True, 99.0, line)) == "stood still"
    assert judge(plan("SIGSTOP"), end(1, line, second="accepted")) == "second run accepted"
    assert judge(plan("SIGKILL"), end(1, "", struck=False)) == "exit code 1"
    assert judge(plan("x"), end(0, line)) == "a line"


def test_every_place_is_struck_in_a_rank_that_comes_by():
    """What the first rank alone calls is struck from there, whoever is struck; the rest in the rank itself."""
    from benchmarks.kill_jobs import plants_in

    found = set()
    for seed in range(3000):
        plan = RankPlan.draw(random.Random(seed))
        if plan.where != "random" and plan.whom == "rank 1":
            found.add((plan.inside, plants_in(plan)))
    names = {name for where in WHERES if where != "random" for _, name in places(where)}
    assert found == {(name, 0 if name in FIRST_RANKS else 1) for name in names}
