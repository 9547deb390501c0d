"""How long a rank that has lost another one keeps quiet: until somebody has said why, and no longer than it takes to find out."""

from __future__ import annotations

import signal
import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from scale import launch, shutdown
from scale.config import ScaleConfig
from tppo_ref.runs.parsing import replace_fields


@pytest.mark.parametrize(("answers", "sleeps"), [
    ([1], 0),  # somebody has said why
    ([0, 0, 0, 2], 3),  # after a while
    ([0] * 1000, 100),  # nobody does: as long as ever, ten seconds
    ([RuntimeError()] * 1000, 10),  # rank 0 is gone, and the store with it: a second
    ([0, 0, RuntimeError(), *[RuntimeError()] * 1000], 12),
])  # fmt: skip
def test_a_rank_keeps_quiet_until_another_has_spoken_or_cannot(answers, sleeps, monkeypatch):
    """On a clock of its own: a tenth of a second goes by in each sleep."""
    now, asked, answer = [0.0], [], iter(answers)

    def add(key, number):
        asked.append((key, number))
        found = next(answer)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: SimpleNamespace(add=add))
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    shutdown.keep_quiet()
    assert now[0] == pytest.approx(0.1 * sleeps, abs=0.15)
    assert set(asked) == {("tppo/failures", 0)}, "asking must not claim the report"


@pytest.mark.parametrize(("claims", "within"), [(shutdown.keep_quiet, "QUIET_S"), (shutdown.claim_the_report, "CLAIM_S")])
def test_a_store_that_stands_still_is_not_waited_for(claims, within, monkeypatch):
    """Rank 0 is frozen, and its store with it: torch's client would wait as long as for any other rank."""
    thawed = threading.Event()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: SimpleNamespace(add=lambda *_: thawed.wait() or 1))
    monkeypatch.setattr(shutdown, within, 0.2)
    asked = threading.Thread(target=claims, daemon=True)
    asked.start()
    asked.join(20)
    stuck = asked.is_alive()
    thawed.set()
    assert not stuck


@pytest.mark.parametrize(("end", "said", "unsaid"), [
    ("os.abort()", ("rank 1 aborted (SIGABRT)", "NCCL's watchdog", "cluster.timeout_s"), "killed"),
    ("os.kill(os.getpid(), signal.SIGKILL)", ("rank 1 was killed (SIGKILL)",), "NCCL"),
])  # fmt: skip
def test_a_rank_that_aborts_is_told_apart_from_one_that_was_killed(end, said, unsaid, monkeypatch, tmp_path, capsys):
    """On GPUs a rank whose wait was too long aborts: its memory has nothing to do with it."""
    (tmp_path / "launch.py").write_text(
        "import os, resource, signal, time\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        f"{end} if os.environ['RANK'] == '1' else time.sleep(60)\n"
    )
    monkeypatch.setattr(launch, "HERE", tmp_path)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    begin = time.monotonic()
    try:
        code = launch.start_workers([], replace_fields(ScaleConfig(), {"cluster.devices_per_node": 2}))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 1
    assert line.startswith("error: ")
    assert line.endswith(shutdown.REMEDY)
    assert all(words in line for words in said)
    assert unsaid not in line
    assert time.monotonic() - begin < 30, "the other rank would wait for it in vain"
