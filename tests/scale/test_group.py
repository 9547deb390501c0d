"""A tensor-parallel group's batchers: together they are the one that a single rank has, through windows and restarts."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_batching import LAW, RUN_SEED, KnownLengthEngine, Plan, plans

from scale.build import build_sampler, groups_here
from scale.config import ScaleConfig
from scale.distributed import World
from scale.group import Group
from scale.group import group_of as maker_of
from tppo_ref.loop.meters import CLOCKS
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.batcher import SuccessiveBatcher
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.tasks import load_task


def group_of(plan: Plan, parts: int, *, rank: int = 0, world: int = 1, slots: int | None = None) -> list[Group]:
    """The batchers of the ranks that share one engine."""
    return [
        Group(
            SuccessiveBatcher(
                SlotSchedule(slots=slots or plan.slots, window=plan.window, max_response_tokens=plan.cap, refill=plan.refill),
                plan.stream(rank=rank, world=world), run_seed=RUN_SEED,
            ),
            part=part, parts=parts,
        )
        for part in range(parts)
    ]  # fmt: skip


@LAW
@given(plans(), st.integers(2, 3))
def test_ranks_that_share_an_engine_split_what_one_would_have_returned(plan, parts):
    """Every slice goes to exactly one of them, a response to the same one in all of its windows, and the counts add up."""
    alone, group = plan.batcher(), group_of(plan, parts)
    engines = [KnownLengthEngine(plan) for _ in range(1 + parts)]
    owner: dict[int, int] = {}
    for _ in range(plan.num_windows):
        whole = alone.window(engines[0])
        ended: list[list[int]] = [[] for _ in group]
        shares = [b.window(e, on_end=lambda r, x=x: x.append(r.id)) for b, e, x in zip(group, engines[1:], ended, strict=True)]
        assert sorted((s.response.id, s.begin, s.stop) for share in shares for s in share) == sorted(
            (s.response.id, s.begin, s.stop) for s in whole
        )
        for part, share in enumerate(shares):
            assert all(owner.setdefault(s.response.id, part) == part for s in share)
            assert ended[part] == [s.response.id for s in share if s.response.ended]
        assert sum(b.num_generated_tokens for b in group) == alone.num_generated_tokens
        assert sorted(r.id for b in group for r in b.in_flight.values()) == sorted(alone.in_flight)
        assert sum(b.slot_steps for b in group) == pytest.approx(alone.slot_steps)
        assert all(b.segments == alone.segments for b in group)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("engines", [1, 2, 3, 4])
def test_the_samples_that_an_engine_draws_go_to_its_ranks_in_turn(engines, parts):
    """Also where the number of engines and that of ranks per engine share a factor: no rank stands idle beside one that does all."""
    plan = Plan(lengths=(3,), slots=2, window=3, cap=3)
    for engine in range(engines):
        group = group_of(plan, parts, rank=engine, world=engines)
        drawn = [group[0].batcher.stream.draw() for _ in range(4 * parts)]
        owners = [[part for part, batcher in enumerate(group) if batcher.owns(sample)] for sample in drawn]
        assert owners == [[turn % parts] for turn in range(4 * parts)]


@pytest.mark.parametrize(
    ("saved", "restored"), [((1, 2), (1, 2)), ((2, 2), (2, 2)), ((1, 2), (2, 1)), ((2, 1), (1, 2)), ((2, 2), (1, 3))]
)
def test_groups_are_restored_on_the_same_ranks_and_dealt_anew_on_others(saved, restored):
    """(engines, ranks per engine): each rank saves its share, in which alone its responses' settled counts are right."""
    plan = Plan(lengths=(9, 2, 14, 7), slots=4, window=3, cap=14)
    slots = 24 // restored[0] if saved != restored else 4
    before = [b for rank in range(saved[0]) for b in group_of(plan, saved[1], rank=rank, world=saved[0])]
    for batcher in before:
        batcher.window(KnownLengthEngine(plan))
        for response in batcher.in_flight.values():
            response.num_settled = 1 + response.id % 2
    states = json.loads(json.dumps([b.state_dict() for b in before]))
    after = [b for rank in range(restored[0]) for b in group_of(plan, restored[1], rank=rank, world=restored[0], slots=slots)]
    for batcher in after:
        batcher.load_state_dict(states)
    flying = sorted((r for b in before for r in b.in_flight.values()), key=lambda r: r.id)
    assert len(flying) >= 3
    assert sorted((r for b in after for r in b.in_flight.values()), key=lambda r: r.id) == flying
    assert sum(b.num_generated_tokens for b in after) == sum(b.num_generated_tokens for b in before)
    if saved == restored:
        assert [b.state_dict() for b in after] == [b.state_dict() for b in before]
    for batcher in after:  # every rank of a group must be able to submit all of the group's requests
        assert {c[0] for c in batcher.batcher.schedule.carried if c} == set(batcher.batcher.in_flight)


@given(plans())
def test_each_rank_of_a_job_makes_the_batcher_of_its_engine_and_of_its_place_in_it(plan):
    """Four ranks, two engines of two: what their batchers draw and answer for is what the parts of each engine's batcher are."""
    schedule = SlotSchedule(slots=plan.slots, window=plan.window, max_response_tokens=plan.cap, refill=plan.refill)
    for rank in range(4):
        make = maker_of(World(rank=rank, world=4, tensor_parallel=2))
        prompts = plan.stream().prompts
        mine = make(schedule, prompts, samples_per_prompt=plan.samples_per_prompt, seed=RUN_SEED, limit=plan.limit)
        assert (mine.part, mine.parts) == (rank % 2, 2)
        drawn = mine.batcher.stream
        assert (drawn.rank, drawn.world, drawn.limit) == (rank // 2, 2, plan.limit)


def test_ranks_of_a_group_hold_the_same_conversation_and_each_answers_for_its_own():
    """The environment is asked by each rank: a pure function says the same to all."""
    plan = Plan(lengths=(4, 5, 3, 6), slots=2, window=5, cap=20)
    asked = []

    def reply(prompt, turns):
        asked.append(len(turns))
        return (7, 8) if len(turns) < 3 else None

    makers = [maker_of(World(rank=rank, world=2, tensor_parallel=2), reply) for rank in range(2)]
    group = [make(SlotSchedule(slots=2, window=5, max_response_tokens=20), plan.stream().prompts, samples_per_prompt=1, seed=RUN_SEED,
                  limit=4) for make in makers]  # fmt: skip
    for _ in range(2):
        shares = [batcher.window(KnownLengthEngine(plan)) for batcher in group]
    assert len(asked) % 2 == 0
    assert {s.response.id % 2 for s in shares[0]} == {0}
    assert {s.response.id % 2 for s in shares[1]} == {1}
    one, two = ({i: r.observations for i, r in b.batcher.in_flight.items()} for b in group)
    assert one == two
    assert any(s.response.observations for share in shares for s in share)


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_decode_steps_are_timed_by_the_clock_of_the_run(clock, monkeypatch):
    """In training and in evaluation, whose batchers are made in one place."""
    ticks = iter(range(1000))
    monkeypatch.setitem(CLOCKS, clock, lambda: float(next(ticks)))
    config = replace_fields(ScaleConfig(), {"algo.run.clock": clock, "algo.rollout.samples_per_prompt": 1})
    plan = Plan(lengths=(4, 5, 3, 6), slots=2, window=5, cap=20)
    made = groups_here(config, World(), load_task("chain"))
    batcher = made(
        SlotSchedule(slots=2, window=5, max_response_tokens=20), plan.stream().prompts, samples_per_prompt=1, seed=RUN_SEED
    )
    batcher.window(KnownLengthEngine(plan))
    assert batcher.step_ends_s == sorted(batcher.step_ends_s)
    assert all(end == int(end) < 1000 for end in batcher.step_ends_s)
    assert len(batcher.step_ends_s) == 5
    assert build_sampler(config, World(), load_task("chain"), None, None).now is CLOCKS[clock]
