"""How long a rank that has lost another one keeps quiet: until somebody has said why, and no longer than it takes to find out."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from scale import shutdown


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
