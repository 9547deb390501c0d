"""The whole-step oracle against scale's Trainer: two ranks over gloo, FSDP2-sharded models, ended responses that move."""

from __future__ import annotations

import json

import pytest
from scale_helpers import HERE, run_ranks

METHODS = ("tppo", "tppo-defer", "tppo-ewma", "tppo-once", "ppo", "ppo-dual", "partial-is")


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """Three steps of each method. oracle_worker.py compares after each; a rank that differs fails here, with what differs."""
    out = tmp_path_factory.mktemp("oracle")
    run_ranks(HERE / "oracle_worker.py", 2, [str(out), *METHODS])
    return {method: json.loads((out / f"{method}.json").read_text()) for method in METHODS}


def test_steps_on_two_sharded_ranks_are_the_oracles(played):
    assert all(len(found["steps"]) == 3 for found in played.values())


def test_the_cases_reach_what_ranks_add(played):
    """Responses changed ranks; rows were cut and ended; both models were updated more than once in a step."""
    assert sum(found["moved"] for found in played.values()) > 0
    for method, found in played.items():
        for step in found["steps"]:
            assert step["policy/updates"] >= 2, method
            assert step["response/ended"] > 0, method
        assert any(step["response/cut_share"] > 0 for step in found["steps"]) == (method not in ("ppo", "ppo-dual"))


def test_a_rank_that_differs_from_the_oracle_is_seen(tmp_path):
    with pytest.raises(AssertionError, match="off by"):
        run_ranks(HERE / "oracle_worker.py", 2, [str(tmp_path), "--wrong", "tppo"])
