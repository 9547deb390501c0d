"""SlotSchedule and SuccessiveBatcher against a simulator that walks token by token, and against their laws.

The engine here knows how long each response would be. The simulator is written from the
contract of successive batching, and shares nothing with method/slots.py and rollout/batcher.py but the names of the ends.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tppo_ref.method.records import End, Prompt
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.batcher import SampleStream, SuccessiveBatcher
from tppo_ref.rollout.engine import Decoded, request_seed

LAW = settings(max_examples=80, deadline=None)
END_ID = 99
RUN_SEED = 5


@dataclasses.dataclass(frozen=True)
class Plan:
    """One schedule to check. Response i would end with its `lengths[i % len(lengths)]`-th token, if nothing capped it."""

    lengths: tuple[int, ...]
    slots: int = 3
    window: int = 4
    cap: int = 10
    refill: str = "immediate"
    samples_per_prompt: int = 1
    limit: int | None = None
    num_windows: int = 4
    num_prompts: int = 3

    def natural(self, response: int) -> int:
        return self.lengths[response % len(self.lengths)]

    def stream(self, **options) -> SampleStream:
        prompts = [Prompt(id=10 + i, token_ids=tuple(range(i + 1)), answer=str(i)) for i in range(self.num_prompts)]
        options = {"limit": self.limit} | options
        return SampleStream(prompts, samples_per_prompt=self.samples_per_prompt, seed=3, **options)

    def batcher(self) -> SuccessiveBatcher:
        schedule = SlotSchedule(slots=self.slots, window=self.window, max_response_tokens=self.cap, refill=self.refill)
        return SuccessiveBatcher(schedule, self.stream(), run_seed=RUN_SEED)


@st.composite
def plans(draw, **fixed) -> Plan:
    window, cap = draw(st.integers(1, 9)), draw(st.integers(1, 24))
    # Lengths at the window's edges and at the cap are the corners; arbitrary ones fill the room between.
    corners = sorted({window, 2 * window, cap, cap + 1, max(1, cap - 1), max(1, window - 1)})
    length = st.one_of(st.sampled_from(corners), st.integers(1, 30))
    drawn = {
        "lengths": tuple(draw(st.lists(length, min_size=1, max_size=12))),
        "slots": draw(st.integers(1, 5)),
        "window": window,
        "cap": cap,
        "refill": draw(st.sampled_from(["immediate", "step"])),
        "samples_per_prompt": draw(st.integers(1, 4)),
        "limit": draw(st.one_of(st.none(), st.integers(0, 12))),
        "num_windows": draw(st.integers(1, 6)),
        "num_prompts": draw(st.integers(1, 5)),
    }
    return Plan(**drawn | {name: f(drawn) if callable(f) else f for name, f in fixed.items()})


def token(response: int, position: int, natural: int) -> int:
    return END_ID if position == natural - 1 else (response * 7 + position) % 90


class KnownLengthEngine:
    """Decodes what it is asked to; `lose` is a response that it never hands back."""

    def __init__(self, plan: Plan, lose: int | None = None):
        self.plan, self.lose = plan, lose
        self.running: dict[int, tuple] = {}  # response -> (request, new tokens)
        self.asked: dict[tuple[int, int], tuple] = {}  # (response, position) -> (context before it, seed of its draw)
        self.begin_window()

    def begin_window(self) -> None:
        self.num_steps, self.busy, self.requests = 0, [], []

    @property
    def num_running(self) -> int:
        return len(self.running)

    def submit(self, requests) -> None:
        for request in requests:
            assert request.response_id not in self.running
            self.running[request.response_id] = (request, [])
            self.requests.append((self.num_steps, request))
        assert self.num_running <= self.plan.slots

    def step(self) -> list[Decoded]:
        self.num_steps += 1
        self.busy.append(self.num_running)
        done = []
        for id, (request, new) in list(self.running.items()):
            position = request.num_response_tokens + len(new)
            assert (id, position) not in self.asked, "a token was asked for twice"
            self.asked[id, position] = ((*request.token_ids, *new), (request.seed + len(new)) % 2**63)
            new.append(token(id, position, self.plan.natural(id)))
            if new[-1] == END_ID or len(new) == request.max_new_tokens:
                del self.running[id]
                if id != self.lose:
                    logprobs = [-(id + (request.num_response_tokens + i) / 1024) for i in range(len(new))]
                    done.append(Decoded(response_id=id, token_ids=new, logprobs=logprobs, end_token=new[-1] == END_ID))
        return done

    def load_weights(self, named_tensors, version) -> None:
        raise AssertionError("the batcher syncs no weights")


@dataclasses.dataclass
class Window:
    slices: list
    segments: list
    busy: list
    requests: list
    num_ended: int
    occupancy: float


def run(
    plan: Plan, batcher: SuccessiveBatcher | None = None, engine: KnownLengthEngine | None = None, version: int = 0
) -> list[Window]:
    batcher, engine = batcher or plan.batcher(), engine or KnownLengthEngine(plan)
    windows = []
    for i in range(plan.num_windows):
        engine.begin_window()
        ended = []
        slices = batcher.window(engine, version=version + i, on_end=ended.append)
        assert engine.num_running == 0, "a window closes when nothing runs"
        windows.append(Window(slices, batcher.segments, engine.busy, engine.requests, len(ended), batcher.occupancy))
    return windows


def responses_of(windows: list[Window]) -> dict:
    return {s.response.id: s.response for w in windows for s in w.slices}


def simulate(plan: Plan) -> list[set[tuple[int, int, int, End]]]:
    """Token by token: which response decoded in which steps (begin, stop] of each window, and how it then stood.

    Slots are a dict from place to response. At a window's begin free places take the next prompt; with immediate refill also
    after every step but the window's last. A token is an end if it is the response's natural last one, else at the cap.
    """
    places: dict[int, int | None] = dict.fromkeys(range(plan.slots))
    num_tokens: collections.Counter[int] = collections.Counter()
    unissued = iter(range(plan.limit)) if plan.limit is not None else itertools.count()
    found = []
    for _ in range(plan.num_windows):
        segments, begin = set(), dict.fromkeys(places, 0)
        for place in places:
            if places[place] is None:
                places[place] = next(unissued, None)
        for step in range(1, plan.window + 1):
            freed = []
            for place, response in places.items():
                if response is None:
                    continue
                num_tokens[response] += 1
                at_end = num_tokens[response] == plan.natural(response)
                if at_end or num_tokens[response] == plan.cap:
                    segments.add((response, begin[place], step, End.END_TOKEN if at_end else End.LENGTH_CAP))
                    places[place] = None
                    freed.append(place)
                elif step == plan.window:
                    segments.add((response, begin[place], step, End.RUNNING))
            if plan.refill == "immediate" and step < plan.window:
                for place in freed:
                    places[place], begin[place] = next(unissued, None), step
        found.append(segments)
    return found


# ---------------------------------------------------------------------------------------------------------------- the laws


@LAW
@given(plans())
@example(Plan(lengths=(4, 8, 10, 11), window=4, cap=10, slots=2))
@example(Plan(lengths=(3, 1, 20), window=4, cap=10, slots=2, refill="step", limit=3))
def test_the_segments_are_those_of_a_simulator_that_walks_token_by_token(plan):
    ours = [{(s.response, s.begin, s.stop, s.end) for s in w.segments} for w in run(plan)]
    assert ours == simulate(plan)


@LAW
@given(plans(refill="immediate", limit=None))
@example(Plan(lengths=(1,), window=1, cap=1, slots=5))
def test_F5_with_immediate_refill_every_slot_is_busy_at_every_decode_step(plan):
    for window in run(plan):
        assert window.busy == [plan.slots] * plan.window
        assert window.occupancy == 1.0


@LAW
@given(plans(refill="immediate", limit=lambda d: 3 * d["slots"]))
def test_F5_with_limited_prompts_slots_idle_only_once_the_prompts_are_issued(plan):
    issued = 0
    for window in run(plan):
        begun = collections.Counter(begin for begin, r in window.requests if r.num_response_tokens == 0)
        for step, busy in enumerate(window.busy):
            issued += begun[step]
            assert busy == plan.slots or issued == plan.limit


@LAW
@given(plans())
def test_occupancy_is_busy_slot_steps_over_slots_times_decode_steps(plan):
    for window in run(plan):
        possible = plan.slots * len(window.busy)
        assert window.occupancy == (sum(window.busy) / possible if possible else 0.0)


@LAW
@given(plans())
@example(Plan(lengths=(30,), window=4, cap=10))
def test_F7_segments_of_a_response_sum_to_at_most_the_cap_and_a_continued_one_gets_what_is_left(plan):
    spent: collections.Counter[int] = collections.Counter()
    for window in run(plan):
        for begin, request in window.requests:
            assert request.num_response_tokens == spent[request.response_id]
            assert request.max_new_tokens == min(plan.window - begin, plan.cap - spent[request.response_id])
        for s in window.segments:
            spent[s.response] += s.stop - s.begin
    assert all(total <= plan.cap for total in spent.values())


def test_before_the_first_window_there_is_nothing_to_tell():
    stream = SampleStream([Prompt(id=0, token_ids=(1,), answer="")], samples_per_prompt=1, seed=0)
    batcher = SuccessiveBatcher(SlotSchedule(slots=2, window=3, max_response_tokens=4), stream, run_seed=RUN_SEED)
    assert batcher.segments == batcher.slices == batcher.step_ends_s == []
    assert (batcher.in_flight, batcher.num_generated_tokens) == ({}, 0)


@LAW
@given(plans())
@example(Plan(lengths=(10,), window=4, cap=10))
@example(Plan(lengths=(4,), window=4, cap=4))
@example(Plan(lengths=(5,), window=4, cap=4))
def test_how_a_response_stands_follows_from_its_tokens_the_cap_and_nothing_else(plan):
    for response in responses_of(run(plan)).values():
        n = len(response)
        if response.token_ids[-1] == END_ID:  # on the last allowed token too
            assert (response.end, n) == (End.END_TOKEN, plan.natural(response.id))
        elif n == plan.cap:
            assert response.end is End.LENGTH_CAP
        else:
            assert response.end is End.RUNNING
        assert response.ended == (response.end is not End.RUNNING)
        assert END_ID not in response.token_ids[:-1]


@pytest.mark.parametrize(
    ("natural", "cap", "end"),
    [
        (4, 10, End.END_TOKEN),  # the end token at the window's edge
        (4, 4, End.END_TOKEN),  # ... which is the last allowed token as well
        (5, 4, End.LENGTH_CAP),  # capped at the window's edge
        (5, 10, End.RUNNING),  # neither
        (3, 4, End.END_TOKEN),
    ],
)
@pytest.mark.parametrize("refill", ["immediate", "step"])
def test_a_response_exactly_at_the_windows_edge(natural, cap, end, refill):
    plan = Plan(lengths=(natural,), slots=1, window=4, cap=cap, refill=refill, limit=1, num_windows=1)
    batcher = plan.batcher()
    (window,) = run(plan, batcher)
    (only,) = window.slices
    assert (only.response.end, len(only.response)) == (end, min(natural, 4))
    assert list(batcher.in_flight) == ([] if only.response.ended else [0])
    assert window.num_ended == only.response.ended


@LAW
@given(plans(refill="step", window=lambda d: d["cap"] + d["window"] % 3))
def test_with_a_window_of_at_least_the_cap_and_refill_step_it_is_synchronous_ppo(plan):
    batcher = plan.batcher()
    for i, window in enumerate(run(plan, batcher)):
        assert all(s.begin == 0 and s.response.ended and s.response.window_starts == [0] for s in window.slices)
        begun = [s.response.id for s in window.slices]
        left = plan.slots if plan.limit is None else min(plan.slots, max(0, plan.limit - i * plan.slots))
        assert sorted(begun) == list(range(i * plan.slots, i * plan.slots + left))
        longest = max((min(plan.natural(id), plan.cap) for id in begun), default=0)
        assert len(window.busy) == longest, "the step lasts as long as its longest response"
    assert not batcher.in_flight


@LAW
@given(plans())
def test_nothing_decoded_is_lost(plan):
    batcher, engine = plan.batcher(), KnownLengthEngine(plan)
    windows = run(plan, batcher, engine)
    in_slices = [(s.response.id, t) for w in windows for s in w.slices for t in range(s.begin, s.stop)]
    assert len(in_slices) == len(set(in_slices))
    assert set(in_slices) == set(engine.asked)
    assert batcher.num_generated_tokens == len(engine.asked)
    assert sum(map(len, responses_of(windows).values())) == len(engine.asked)
    assert {r.id for r in responses_of(windows).values() if not r.ended} == set(batcher.in_flight)


@LAW
@given(plans())
def test_the_records_are_aligned_and_name_each_tokens_version_and_window(plan):
    windows = run(plan, version=100)
    for r in responses_of(windows).values():
        assert len(r.token_ids) == len(r.logprobs) == len(r.versions)
        assert r.token_ids == [token(r.id, t, plan.natural(r.id)) for t in range(len(r))]
        assert r.logprobs == [-(r.id + t / 1024) for t in range(len(r))]
        slices = [(i, s.begin, s.stop) for i, w in enumerate(windows) for s in w.slices if s.response is r]
        assert r.window_starts == [begin for _, begin, _ in slices]
        assert r.versions == [100 + i for i, begin, stop in slices for _ in range(begin, stop)]
        assert [i for i, _, _ in slices] == list(range(slices[0][0], slices[0][0] + len(slices))), "a window was skipped"


@LAW
@given(plans())
def test_a_response_has_one_slot_at_a_time_and_keeps_it(plan):
    windows = run(plan)
    slot_of: dict[int, int] = {}
    for window in windows:
        for s in window.segments:
            assert slot_of.setdefault(s.response, s.slot) == s.slot
            assert 0 <= s.slot < plan.slots
        for a, b in itertools.combinations(window.segments, 2):
            assert a.slot != b.slot or a.stop <= b.begin or b.stop <= a.begin


@LAW
@given(plans())
def test_on_end_is_called_once_as_a_response_ends_while_others_still_decode(plan):
    batcher, engine = plan.batcher(), KnownLengthEngine(plan)
    for _ in range(plan.num_windows):
        engine.begin_window()
        told = []
        batcher.window(engine, on_end=lambda r: told.append((r.id, engine.num_steps, r.end)))  # noqa: B023
        assert sorted(told) == sorted((s.response, s.stop, s.end) for s in batcher.segments if s.end is not End.RUNNING)


# ------------------------------------------------------------------------------------------------------- seeds and groups


@LAW
@given(plans())
def test_seeds_are_request_seed_of_consecutive_positions(plan):
    engine = KnownLengthEngine(plan)
    found = responses_of(run(plan, engine=engine))
    for (id, position), (context, seed) in engine.asked.items():
        r = found[id]
        assert seed == request_seed(RUN_SEED, r.prompt.id, r.sample_index, position)
        assert context == (*r.prompt.token_ids, *r.token_ids[:position])


@LAW
@given(plans(), st.integers(1, 12), st.sampled_from(["immediate", "step"]))
def test_a_cut_changes_nothing_that_the_engine_is_asked_for(plan, window, refill):
    other = dataclasses.replace(plan, window=window, refill=refill)
    one, two = KnownLengthEngine(plan), KnownLengthEngine(other)
    run(plan, engine=one)
    run(other, engine=two)
    for cell in one.asked.keys() & two.asked.keys():
        assert one.asked[cell] == two.asked[cell]


def test_seeds_differ_between_prompts_samples_runs_and_stay_below_2_to_63():
    seeds = [request_seed(*key) for key in itertools.product(range(3), range(20), range(20), [0])]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_seed_is_the_same_in_every_process_and_version():
    # Pinned: Python's own hash() of a text would change per process, and a checkpoint outlives a process.
    assert request_seed(7, 11, 2, 0) == 5424163415323587068
    assert request_seed(7, 11, 2, 5) == 5424163415323587068 + 5


@LAW
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4))
def test_groups_are_n_samples_of_each_prompt_each_with_its_own_seed(num_prompts, n, epochs):
    plan = Plan(lengths=(1,), samples_per_prompt=n, num_prompts=num_prompts)
    stream = plan.stream(limit=n * num_prompts * epochs)
    drawn = [stream.prompt_of(sample) for sample in iter(stream.draw, None)]
    groups = [drawn[i : i + n] for i in range(0, len(drawn), n)]
    assert all(len({prompt.id for prompt, _ in group}) == 1 for group in groups)
    firsts = [group[0][0].id for group in groups]
    for epoch in range(epochs):  # a permutation of the prompts per epoch
        assert sorted(firsts[epoch * num_prompts : (epoch + 1) * num_prompts]) == sorted(p.id for p in stream.prompts)
    assert len({request_seed(RUN_SEED, prompt.id, index, 0) for prompt, index in drawn}) == n * num_prompts * epochs


def test_the_order_of_prompts_is_new_in_each_epoch_and_for_each_seed():
    prompts = [Prompt(id=i, token_ids=(1,), answer="") for i in range(50)]
    orders = []
    for seed in (0, 1):
        stream = SampleStream(prompts, samples_per_prompt=1, seed=seed)
        ids = [stream.prompt_of(sample)[0].id for sample in range(100)]
        orders += [tuple(ids[:50]), tuple(ids[50:])]
    assert len({*orders, tuple(range(50))}) == 5


# ------------------------------------------------------------------------------------------------------ saved and restored


def outcome(windows: list[Window]) -> list:
    return [([(s.response.id, s.begin, s.stop) for s in w.slices], w.segments, w.busy, [r for _, r in w.requests]) for w in windows]


@LAW
@given(plans(), st.integers(0, 5))
def test_a_state_that_went_through_json_gives_the_identical_rest(plan, num_before):
    before = dataclasses.replace(plan, num_windows=num_before)
    batcher = plan.batcher()
    run(before, batcher)
    saved = json.dumps(batcher.state_dict())
    restored = plan.batcher()
    restored.load_state_dict([json.loads(saved)])
    assert json.dumps(restored.state_dict()) == saved
    engines = [KnownLengthEngine(plan), KnownLengthEngine(plan)]
    rest = [run(plan, b, e, version=9) for b, e in zip((batcher, restored), engines, strict=True)]
    assert outcome(rest[0]) == outcome(rest[1])
    assert responses_of(rest[0]) == responses_of(rest[1])
    assert engines[0].asked == engines[1].asked
    assert batcher.state_dict() == restored.state_dict()


def test_saving_keeps_scores_values_and_what_is_settled():
    plan = Plan(lengths=(30,), slots=1, window=4, cap=30)
    batcher = plan.batcher()
    run(dataclasses.replace(plan, num_windows=1), batcher)
    (response,) = batcher.in_flight.values()
    response.values, response.score, response.num_settled = [0.1, -1 / 3, 2e-17, 3.0], -1.0, 3
    restored = plan.batcher()
    restored.load_state_dict([json.loads(json.dumps(batcher.state_dict()))])
    assert list(restored.in_flight.values()) == [response]


def test_running_on_leaves_a_loaded_state_as_it_was():
    plan = Plan(lengths=(30,), slots=2, window=4, cap=30, num_windows=1)
    batcher = plan.batcher()
    run(plan, batcher)
    state = json.loads(json.dumps(batcher.state_dict()))
    before = json.dumps(state)
    restored = plan.batcher()
    restored.load_state_dict([state])
    run(plan, restored)
    assert json.dumps(state) == before


@LAW
@given(plans(limit=None), st.integers(1, 8))
def test_carried_responses_are_seated_anew_in_other_slots_or_refused(plan, slots):
    batcher = plan.batcher()
    run(plan, batcher)
    state = json.loads(json.dumps(batcher.state_dict()))
    other = dataclasses.replace(plan, slots=slots, num_windows=1)
    restored = other.batcher()
    if len(batcher.in_flight) > slots and slots != plan.slots:
        with pytest.raises(ValueError, match="slots"):
            restored.load_state_dict([state])
        return
    restored.load_state_dict([state])
    so_far = {r.id: len(r) for r in restored.in_flight.values()}
    assert so_far == {r.id: len(r) for r in batcher.in_flight.values()}
    engine = KnownLengthEngine(other)
    (window,) = run(other, restored, engine)
    began = {r.response_id: r.num_response_tokens for begin, r in window.requests if begin == 0}
    assert {id: n for id, n in began.items() if n} == so_far
    assert engine.busy[0] == slots


def deal(worlds, draws, limit) -> list[int]:
    """Samples issued by a run that goes on with another number of ranks again and again, each rank drawing `draws` at a time."""
    issued, states, counts = [], None, iter(draws)
    for world in worlds:
        streams = [Plan(lengths=(1,)).stream(rank=rank, world=world, limit=limit) for rank in range(world)]
        if states is not None:
            for stream in streams:
                stream.load_state_dict(json.loads(json.dumps(states)))
        for stream in streams:
            issued += [sample for sample in (stream.draw() for _ in range(next(counts))) if sample is not None]
        states = [stream.state_dict() for stream in streams]
    # Every rank then draws on until each has had more than any rank could have left behind.
    return issued + [sample for stream in streams for sample in (stream.draw() for _ in range(60)) if sample is not None]


WORLDS = st.lists(st.integers(1, 4), min_size=2, max_size=4)
DRAWS = st.lists(st.integers(0, 6), min_size=16, max_size=16)


@LAW
@given(WORLDS, DRAWS)
@example([2, 3, 1], [5, 0, 0, 2, 1, 0, 9, 9] * 2)
def test_dealt_to_another_number_of_ranks_no_sample_is_issued_twice_or_lost(worlds, draws):
    issued = deal(worlds, draws, None)
    assert len(issued) == len(set(issued)), "issued twice"
    assert set(range(60)) <= set(issued), "lost"


@LAW
@given(WORLDS, DRAWS, st.integers(0, 25))
@example([3, 2], [4, 1, 0, 2] * 4, 10)
def test_dealt_anew_a_limit_stays_the_limit(worlds, draws, limit):
    assert sorted(deal(worlds, draws, limit)) == list(range(limit))


def test_a_batcher_on_one_of_two_ranks_restores_its_own_stream_whole():
    plan = Plan(lengths=(30,), slots=1, cap=30)

    def fresh() -> SuccessiveBatcher:
        schedule = SlotSchedule(slots=1, window=2, max_response_tokens=30)
        return SuccessiveBatcher(schedule, plan.stream(rank=1, world=2), run_seed=RUN_SEED)

    batcher = fresh()
    ahead = [{"next": n, "rank": n % 3, "world": 3, "backlog": []} for n in (30, 1, 2)]  # two of three ranks had issued nothing
    batcher.stream.load_state_dict(ahead)
    restored = fresh()
    restored.load_state_dict([json.loads(json.dumps(batcher.state_dict()))])
    assert [restored.stream.draw() for _ in range(5)] == [batcher.stream.draw() for _ in range(5)]


# ------------------------------------------------------------------------------------------------------------- what goes wrong


@LAW
@given(plans(limit=None), st.integers(0, 4))
def test_an_engine_that_loses_a_response_is_a_RuntimeError_that_names_it(plan, lose):
    lose %= plan.slots
    plan = dataclasses.replace(plan, lengths=(77,), num_windows=1)
    with pytest.raises(RuntimeError, match=rf"\b{lose}\b"):
        run(plan, engine=KnownLengthEngine(plan, lose=lose))


@pytest.mark.parametrize(
    "wrong", [{"slots": 0}, {"window": 0}, {"max_response_tokens": 0}, {"window": 2.0}, {"refill": "later"}], ids=str
)
def test_a_schedule_that_cannot_run_is_a_ValueError_that_names_the_argument(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=name):
        SlotSchedule(**{"slots": 2, "window": 3, "max_response_tokens": 4, "refill": "step"} | wrong)


def test_no_prompts_is_a_ValueError():
    with pytest.raises(ValueError, match="prompts"):
        SampleStream([], samples_per_prompt=1, seed=0)


@pytest.mark.parametrize(("saved", "restored"), [(2, 3), (3, 1), (1, 2)])
def test_in_flight_responses_are_dealt_to_another_number_of_ranks_none_lost_none_twice(saved, restored):
    plan = Plan(lengths=(9, 2, 14, 7), slots=4, cap=14)

    def batcher(rank: int, world: int, slots: int) -> SuccessiveBatcher:
        schedule = SlotSchedule(slots=slots, window=3, max_response_tokens=14)
        return SuccessiveBatcher(schedule, plan.stream(rank=rank, world=world), run_seed=RUN_SEED)

    before = [batcher(rank, saved, 4) for rank in range(saved)]
    for one in before:
        one.window(KnownLengthEngine(plan))
    states = json.loads(json.dumps([one.state_dict() for one in before]))
    after = [batcher(rank, restored, 12) for rank in range(restored)]
    for one in after:
        one.load_state_dict(states)
    flying = sorted((r for one in before for r in one.in_flight.values()), key=lambda r: r.id)
    dealt = sorted((r for one in after for r in one.in_flight.values()), key=lambda r: r.id)
    assert flying, "nothing was in flight: this test would show nothing"
    assert dealt == flying
    assert sum(one.num_generated_tokens for one in after) == sum(one.num_generated_tokens for one in before)
    lengths = {r.id: len(r) for r in dealt}
    assert {c[0]: c[1] for one in after for c in one.schedule.carried if c} == lengths
