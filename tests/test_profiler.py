"""run.profile_steps: a trace per rank, of the steps that were asked for and bounded, on a run as users start it."""

from __future__ import annotations

import gzip
import json
import logging
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import one_thread  # noqa: F401  (a fixture)
from oracle_stage import make_config, real_stage

from tppo_ref.loop.meters import Held
from tppo_ref.loop.peaks import PEAK_FLOPS_PER_S
from tppo_ref.method.errors import UserError
from tppo_ref.runs import profiler
from tppo_ref.runs.glossary import GLOSSARY
from tppo_ref.runs.profiler import Profiler
from tppo_ref.runs.session import Session
from tppo_ref.runs.validation import MOST_STEPS, steps_of

pytestmark = pytest.mark.usefixtures("one_thread")
PHASES = ("rollout", "verify", "forward", "policy", "value", "sync")
SMALL = {"rollout.slots": 4, "rollout.window": 4, "rollout.max_response_tokens": 10}


@pytest.mark.parametrize(("text", "steps"), [
    ("", []), ("1:1", [1]), ("3:5", [3, 4, 5]), ("3:7", [3, 4, 5, 6, 7]),
    ("3:8", None), ("5:3", None), ("0:2", None), ("3", None), ("3:", None), (":3", None), ("-1:2", None), ("a:b", None), ("3:5:1", None),
])  # fmt: skip
def test_the_steps_that_a_text_names(text, steps):
    found = steps_of(text)
    assert (None if found is None else list(found)) == steps


def play(folder: Path, steps: str, num_steps: int, rank: int = 0, **config) -> Profiler:
    """Some steps on real modules, a profiler around each."""
    trainer = real_stage(make_config(SMALL | config)).trainer
    found = Profiler(folder, steps, trainer.meters, rank)
    for step in range(1, num_steps + 1):
        with found(step):
            trainer.step()
    return found


def events_of(file: Path) -> list[dict]:
    with gzip.open(file, "rt") as text:
        return json.load(text)["traceEvents"]


def test_a_trace_holds_the_phases_of_the_steps_that_were_asked_for_in_their_order(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    play(tmp_path / "profile", "2:3", 4, rank=0)
    (file,) = (tmp_path / "profile").iterdir()
    assert file.name == "steps-2-3-rank0.json.gz"
    assert str(file) in caplog.text
    events = events_of(file)
    spans = [event for event in events if re.fullmatch(r"step \d: \w+", event.get("name", "")) and event["ph"] == "X"]
    assert [event["name"] for event in sorted(spans, key=lambda e: e["ts"])] == [f"step {s}: {p}" for s in (2, 3) for p in PHASES]
    inside = {name for name in ("aten::mm", "aten::scaled_dot_product_attention", "Optimizer.step#AdamW.step")
              if any(event.get("name") == name for event in events)}  # fmt: skip
    assert len(inside) == 3
    for event in events:  # of one phase after the other, on one clock
        if event.get("name") == "Optimizer.step#AdamW.step":
            assert any(s["ts"] <= event["ts"] <= s["ts"] + s["dur"] for s in spans if s["name"].endswith(("policy", "value")))


def test_a_run_that_ends_earlier_leaves_what_was_traced(tmp_path):
    found = play(tmp_path / "profile", "2:5", 3, rank=1)
    assert not (tmp_path / "profile").exists()
    found.close()
    assert [file.name for file in (tmp_path / "profile").iterdir()] == ["steps-2-3-rank1.json.gz"]
    found.close()  # a second time there is nothing to write
    assert len(list((tmp_path / "profile").iterdir())) == 1


def test_a_run_that_goes_on_among_the_steps_says_which_it_traced(tmp_path):
    trainer = real_stage(make_config(SMALL)).trainer
    found = Profiler(tmp_path, "2:4", trainer.meters, 0)
    for step in (3, 4):
        with found(step):
            trainer.step()
    assert [file.name for file in tmp_path.iterdir()] == ["steps-3-4-rank0.json.gz"]


def test_a_profile_that_cannot_be_written_keeps_neither_verifier_nor_files():
    closed = []

    def full() -> None:
        raise UserError("the disk is full")

    parts = SimpleNamespace(scorer=SimpleNamespace(close=lambda: closed.append("scorer")))
    session: Any = SimpleNamespace(
        parts=parts, profiler=SimpleNamespace(close=full), files=SimpleNamespace(close=lambda: closed.append("files"))
    )
    with pytest.raises(UserError, match="the disk is full"):
        Session.close(session)
    assert closed == ["scorer", "files"]


def test_nothing_is_traced_where_nothing_was_asked_for(tmp_path):
    play(tmp_path / "profile", "", 1).close()
    play(tmp_path / "profile", "5:6", 2).close()
    assert not list(tmp_path.iterdir())


def test_a_trace_is_bounded_however_many_passes_and_decode_steps_a_phase_has(tmp_path, monkeypatch):
    """One row a pass, and twice as many decode steps as are traced: each phase shows its first few."""
    monkeypatch.setattr(profiler, "PASSES", 2)
    monkeypatch.setattr(profiler, "DECODE_STEPS", 3)
    config = {"rollout.window": 8, "policy.micro_batch_tokens": 1, "value.micro_batch_tokens": 1, "policy.mini_batches": 1,
              "value.mini_batches": 1, "policy.mini_batch_tokens": 0, "value.mini_batch_tokens": 0}  # fmt: skip
    play(tmp_path, "2:2", 2, **config)
    heads = Counter()
    events = events_of(tmp_path / "steps-2-2-rank0.json.gz")
    spans = {event["name"].split(": ")[1]: event for event in events if event.get("name", "").startswith("step 2: ")}
    embeddings = [event["ts"] for event in events if event.get("name") == "aten::embedding"]  # one a pass, one a decode step
    for phase, span in spans.items():
        heads[phase] = sum(span["ts"] <= at <= span["ts"] + span["dur"] for at in embeddings)
    assert heads["rollout"] == 3
    assert [heads[phase] for phase in ("forward", "policy", "value")] == [2, 2, 2]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_on_cuda_the_allocators_history_is_bounded_and_written_once(tmp_path, monkeypatch):
    """torch.cuda is stood in for: what is recorded from when on, where the snapshot goes, and that recording ends."""
    calls = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: (calls.append(path), Path(path).write_text("snapshot")))
    trainer = real_stage(make_config(SMALL)).trainer
    trainer.meters.memory = type("Counters", (), {"begin": lambda self: None, "end": lambda self: Held(1, 1, 1)})()
    found = Profiler(tmp_path / "profile", "1:2", trainer.meters, 3)
    found.cuda = True
    for step in (1, 2, 3):
        with found(step):
            trainer.step()
    name = str(tmp_path / "profile" / "steps-1-2-rank3.pickle")
    assert calls == [{"max_entries": profiler.EVENTS}, name, {"enabled": None}]
    assert {file.suffix for file in (tmp_path / "profile").iterdir()} == {".pickle", ".gz"}


def test_the_clusters_page_says_the_bounds_as_they_are_and_metrics_that_there_are():
    page = " ".join((Path(__file__).parents[1] / "docs" / "scale.md").read_text().split())
    bounds = f"the first {profiler.DECODE_STEPS} decode steps or the first {profiler.PASSES} passes of a model, of at most {MOST_STEPS} steps"
    assert bounds in page
    assert f"the latest {profiler.EVENTS:,} events" in page
    named = set(re.findall(r"`((?:mfu|flops|memory|time)/\w+)`", page))
    assert {"mfu/policy", "flops/policy", "memory/policy_used"} <= named <= set(GLOSSARY)
    for kind in PEAK_FLOPS_PER_S:
        assert kind in page.partition("known by name for")[2].partition(";")[0]
