"""Ended responses move to ranks with less to do: the plan's laws, and a real exchange over gloo."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scale_helpers import run_ranks

from scale.distributed import moves

RANKS = st.lists(st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=12), min_size=1, max_size=6)


def loads(ranks, transfers=()):
    """Tokens per rank after the transfers; KeyError where one moves what is not there (any more)."""
    held = {(rank, i): thing for rank, things in enumerate(ranks) for i, thing in enumerate(things)}
    load = [sum(tokens for tokens, _ in things) for things in ranks]
    for move in transfers:
        tokens, movable = held.pop((move.source, move.thing))
        assert movable
        load[move.source] -= tokens
        load[move.target] += tokens
    return load


@settings(max_examples=300, deadline=None)
@given(RANKS)
@example([[]])
@example([[(50, True)], []])
@example([[(50, False), (1, True)], [(2, True)]])
def test_a_thing_moves_once_at_most_only_if_it_may_and_no_rank_gets_more_than_the_fullest_had(ranks):
    before, after = loads(ranks), loads(ranks, moves(ranks))
    assert sum(after) == sum(before)
    assert max(after) <= max(before)
    assert max(after) - min(after) <= max(before) - min(before)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(1, 20), max_size=30), min_size=2, max_size=6))
def test_ranks_end_within_twice_the_longest_thing_of_each_other_where_everything_may_move(ranks):
    transfers = moves([[(tokens, True) for tokens in things] for things in ranks], tolerance=0.0)
    after = loads([[(tokens, True) for tokens in things] for things in ranks], transfers)
    longest = max((tokens for things in ranks for tokens in things), default=0)
    assert max(after) - min(after) <= 2 * longest


def test_level_ranks_are_left_alone():
    assert moves([[(10, True), (5, True)], [(15, True)], [(7, True), (8, True)]]) == []


def test_a_rank_of_one_long_thing_keeps_it():
    assert moves([[(100, True)], [(1, True)]]) == []


def test_two_thirds_of_a_full_rank_go_to_two_empty_ones():
    transfers = moves([[(1, True)] * 90, [], []])
    assert loads([[(1, True)] * 90, [], []], transfers) == [30, 30, 30]
    assert len(transfers) == 60


WORKER = """
import json
from scale.distributed import Collective, start
world = start(device="cpu", timeout_s=60)
parallel = Collective(world)
mine = {0: [("a", i) for i in range(9)], 1: [], 2: [("c", 0)], 3: [("d", 0), ("d", 1)]}[world.rank]
tokens = [10] * len(mine)
movable = [thing != ("a", 8) for thing in mine]
kept = parallel.rebalance(mine, tokens, movable)
print("FOUND " + json.dumps(parallel.gather_objects(kept)))
"""


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory):
    script = tmp_path_factory.mktemp("level") / "worker.py"
    script.write_text(WORKER)
    said = run_ranks(script, 4, [])
    return json.loads(next(line for line in said.splitlines() if line.startswith("FOUND ")).removeprefix("FOUND "))


def test_four_ranks_exchange_things_and_none_is_lost_or_doubled(exchanged):
    everything = sorted(tuple(thing) for kept in exchanged for thing in kept)
    assert everything == sorted([*(("a", i) for i in range(9)), ("c", 0), ("d", 0), ("d", 1)])
    assert [len(kept) for kept in exchanged] == [3, 3, 3, 3]


def test_what_may_not_move_stays_and_what_stays_keeps_its_order(exchanged):
    assert ["a", 8] in exchanged[0]
    assert exchanged[0] == sorted(exchanged[0])
    assert exchanged[3][:2] == [["d", 0], ["d", 1]]
