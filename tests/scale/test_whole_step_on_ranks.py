"""The whole-step oracle against scale's Trainer: two ranks over gloo, FSDP2-sharded models, ended responses that move."""

from __future__ import annotations

import json

import pytest
from scale_helpers import HERE, run_ranks

METHODS = ("tppo", "tppo-defer", "tppo-ewma", "tppo-once", "ppo", "ppo-dual", "partial-is", "grpo", "rloo-window")
SHARED = ("tppo-defer", "tppo-once", "ppo")  # full and constant prefixes; cut, deferred and whole rows; both value updates


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """Three steps of each method. oracle_worker.py compares after each; a rank that differs fails here, with what differs."""
    out = tmp_path_factory.mktemp("oracle")
    run_ranks(HERE / "oracle_worker.py", 2, [str(out), "1", *METHODS])
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
        assert any(step["response/cut_share"] > 0 for step in found["steps"]) == (method not in ("ppo", "ppo-dual", "grpo"))
    held = [step["ledger/held_responses"] for step in played["rloo-window"]["steps"]]
    assert max(held) > 0
    assert played["rloo-window"]["steps"][-1]["policy/staleness_max"] > 0


def test_a_rank_that_differs_from_the_oracle_is_seen(tmp_path):
    with pytest.raises(AssertionError, match="off by"):
        run_ranks(HERE / "oracle_worker.py", 2, [str(tmp_path), "1", "--wrong", "tppo"])


@pytest.fixture(scope="module")
def played_in_pairs(tmp_path_factory):
    """The same on two pairs of ranks, each of which shares its rows (context parallel). The Trainer and the oracle are the same."""
    out = tmp_path_factory.mktemp("pairs")
    run_ranks(HERE / "oracle_worker.py", 4, [str(out), "2", *SHARED])
    return {method: json.loads((out / f"{method}.json").read_text()) for method in SHARED}


def test_steps_on_ranks_that_share_their_rows_are_the_oracles(played_in_pairs):
    for method, found in played_in_pairs.items():
        assert len(found["steps"]) == 3
        assert all(step["policy/updates"] >= 2 for step in found["steps"]), method
        assert any(step["response/ended"] > 0 for step in found["steps"]), method
    assert sum(found["moved"] for found in played_in_pairs.values()) > 0
    assert any(step["response/cut_share"] > 0 for step in played_in_pairs["tppo-once"]["steps"])
