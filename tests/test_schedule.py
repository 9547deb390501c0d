"""The clock: its schedule against SuccessiveBatcher's, its counts against the Trainer's masks, its seconds against closed forms.

Costs here are straight lines with round numbers, so that every law can be checked by hand; what real machines cost is
test_hardware's matter. Laws that turned out to be false stand here too, each with its counter-example.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sim.clock.cluster import Samples, Setup
from sim.clock.compiled import AVAILABLE
from sim.clock.decoding import Stints, clock, load, step_times, steps_until
from sim.clock.distributions import Constant, Empirical, Growth, TwoPoint
from sim.clock.queueing import queued, run_queue
from sim.clock.schedule import Windowed, ppo, run, tppo
from sim.clock.systems import Asynchronous, PartialRollouts, Synchronous, TailBatching
from sim.clock.trace import check_conservation
from sim.clock.windows import drive_window, run_window, windows_of
from tppo_ref.method.masks import policy_token_mask
from tppo_ref.method.records import End, Prompt
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.batcher import SampleStream, SuccessiveBatcher
from tppo_ref.rollout.decode_load import decode_steps
from tppo_ref.rollout.engine import Decoded

LAW = settings(max_examples=60, deadline=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """Costs that are straight lines; by default a decode step takes a second and nothing else takes any."""

    step_s: float = 1.0
    row_s: float = 0.0
    context_s: float = 0.0
    prefill_token_s: float = 0.0
    forward_token_s: float = 0.0
    policy_token_s: float = 0.0
    value_token_s: float = 0.0
    pair_s: float = 0.0
    update_s: float = 0.0
    once_s: float = 0.0
    kv_capacity_tokens: int | None = None

    def decode_step_s(self, active_n, context_tokens_n):
        return self.step_s + self.row_s * np.asarray(active_n) + self.context_s * np.asarray(context_tokens_n)

    def prefill_s(self, tokens, context_tokens=0):
        return self.prefill_token_s * np.asarray(tokens) + self.pair_s * np.asarray(context_tokens)

    def logprob_s(self, tokens, context_tokens):
        return self.forward_token_s * tokens + self.pair_s * context_tokens

    def value_forward_s(self, tokens, context_tokens):
        return 2 * self.forward_token_s * tokens

    def policy_train_s(self, tokens, context_tokens, num_updates=1):
        return self.policy_token_s * tokens + self.update_s * num_updates

    def value_train_s(self, tokens, context_tokens, num_updates=1):
        return self.value_token_s * tokens + self.update_s * num_updates

    def sync_s(self):
        return self.once_s

    def wake_s(self):
        return 2 * self.once_s


class Listed:
    """Lengths in the order of the samples, over and over: for samples whose blocks are drawn in order."""

    def __init__(self, lengths, cap):
        self.cap, self._lengths = cap, itertools.cycle([min(n, cap) for n in lengths])

    def sample(self, rng, num_groups, samples_per_group=1, *, step=0):
        return np.array(list(itertools.islice(self._lengths, num_groups * samples_per_group))).reshape(num_groups, -1)


class KnownLengthEngine:
    """Decodes what it is asked for; response i ends with its `lengths[i % len]`-th token, unless that is the cap or beyond."""

    def __init__(self, lengths, cap):
        self.lengths, self.cap, self.running = lengths, cap, {}

    @property
    def num_running(self):
        return len(self.running)

    def submit(self, requests):
        self.running |= {r.response_id: [r, 0] for r in requests}

    def step(self):
        done = []
        for id, entry in list(self.running.items()):
            request, entry[1] = entry[0], entry[1] + 1
            length = self.lengths[id % len(self.lengths)]
            ended = request.num_response_tokens + entry[1] == length < self.cap
            if ended or entry[1] == request.max_new_tokens:
                del self.running[id]
                done.append(Decoded(response_id=id, token_ids=[0] * entry[1], logprobs=[0.0] * entry[1], end_token=ended))
        return done


def setup_of(lengths=None, cap=24, **options) -> Setup:
    options = {"prompt_tokens": 1, "costs": Line(), "slots": 4} | options
    return Setup(lengths=Listed(lengths, cap) if isinstance(lengths, list | tuple) else lengths, **options)


@st.composite
def plans(draw):
    """Lengths, and numbers of a setup and a window; lengths at the window's edges and the cap are the corners."""
    window, cap = draw(st.integers(1, 9)), draw(st.integers(1, 24))
    corners = sorted({window, 2 * window, cap, cap + 1, max(1, cap - 1), max(1, window - 1)})
    lengths = draw(st.lists(st.one_of(st.sampled_from(corners), st.integers(1, 30)), min_size=1, max_size=12))
    num_replicas = draw(st.integers(1, 3))
    return {
        "lengths": lengths, "cap": cap, "window": window, "slots": num_replicas * draw(st.integers(1, 4)) + draw(st.integers(0, 1)),
        "num_replicas": num_replicas, "prompt": draw(st.integers(1, 5)), "refill": draw(st.sampled_from(["immediate", "step"])),
    }  # fmt: skip


def windowed(plan, costs=None, **options) -> Windowed:
    setup = {name: options.pop(name) for name in ("train_costs", "pipelined") if name in options}
    setup = setup_of(plan["lengths"], plan["cap"], slots=plan["slots"], num_replicas=plan["num_replicas"],
                     prompt_tokens=plan["prompt"], costs=costs or Line(), **setup)  # fmt: skip
    return Windowed(setup, window=plan["window"], refill=plan["refill"], **options)


def batchers(plan):
    """The real thing, one batcher and engine per replica."""
    prompts = [Prompt(id=0, token_ids=(1,) * plan["prompt"], answer="")]
    for replica in range(plan["num_replicas"]):
        slots = plan["slots"] // plan["num_replicas"] + (replica < plan["slots"] % plan["num_replicas"])
        schedule = SlotSchedule(slots=slots, window=plan["window"], max_response_tokens=plan["cap"], refill=plan["refill"])
        stream = SampleStream(prompts, samples_per_prompt=1, seed=0, rank=replica, world=plan["num_replicas"])
        yield SuccessiveBatcher(schedule, stream, run_seed=0), KnownLengthEngine(plan["lengths"], plan["cap"])


# ------------------------------------------------------------------------------------------------- the schedule is the batcher's


@LAW
@given(plans(), st.booleans())
@example(
    {"lengths": [4, 8, 10, 11], "cap": 10, "window": 4, "slots": 2, "num_replicas": 1, "prompt": 1, "refill": "immediate"}, False
)
@example({"lengths": [3, 1, 20], "cap": 10, "window": 4, "slots": 5, "num_replicas": 2, "prompt": 1, "refill": "step"}, True)
def test_the_schedule_is_the_batchers_event_by_event(plan, readable):
    system, real = windowed(plan, readable=readable), list(batchers(plan))
    for _ in range(4):
        system.step()
        replica_n, rows = system.segments
        for replica, (batcher, engine) in enumerate(real):
            batcher.window(engine)
            assert rows[replica_n == replica].tolist() == [list(segment) for segment in batcher.segments]


@LAW
@given(plans(), st.sampled_from(["exclude", "defer"]))
def test_both_ways_to_run_a_window_leave_the_same_records(plan, tail):
    made = [windowed(plan, HAND, readable=readable, tail=tail, tail_tokens=min(2, plan["window"])) for readable in (True, False)]
    for _ in range(5):
        records = [system.step() for system in made]
        assert records[0] == records[1]
        assert np.array_equal(made[0].segments[1], made[1].segments[1])
        assert made[0].samples.next_R.tolist() == made[1].samples.next_R.tolist()


@pytest.mark.skipif(not AVAILABLE, reason="numba is not installed: there is one way to run a loop")
@LAW
@given(plans(), st.data())
def test_compiled_loops_are_their_own_source(plan, data):
    """numba against Python, on the same arguments: windows, and a queue with preemptions."""
    slots = plan["slots"]
    carried = data.draw(
        st.lists(st.integers(-1, 40), min_size=slots, max_size=slots, unique_by=lambda x: x if x >= 0 else object())
    )
    done = [data.draw(st.integers(0, plan["cap"] - 1)) for _ in carried]
    left = [data.draw(st.integers(1, plan["cap"] + 1)) for _ in carried]
    fresh = [data.draw(st.integers(1, plan["cap"] + 1)) for _ in range(data.draw(st.integers(0, 30)))]
    arrays = [np.array(column, dtype=np.int64) for column in (carried, done, left, fresh)]
    arguments = (*arrays, 41, 2, plan["window"], plan["cap"], plan["refill"] == "immediate")
    (one, started), (two, also) = run_window(*arguments), run_window.py_func(*arguments)
    assert started == also
    assert np.array_equal(one, two)
    context = np.array([data.draw(st.integers(1, 9)) for _ in fresh], dtype=np.int64)
    if len(fresh):
        room = int((context + arrays[3]).max()) + data.draw(st.integers(0, 20))
        queue = (context, arrays[3], data.draw(st.integers(1, 5)), room, np.full(len(fresh), -1))
        assert np.array_equal(run_queue(*queue), run_queue.py_func(*queue))


def test_without_numba_the_clock_says_the_same():
    """A process in which numba cannot be imported, against this one."""
    program = """
import sys
if sys.argv[1] == "without":
    sys.modules["numba"] = None
from sim.clock.cluster import Setup
from sim.clock.compare import Case, setup_of
from sim.clock.compiled import AVAILABLE
from sim.clock.schedule import run, tppo
from sim.clock.systems import PartialRollouts
setup = setup_of(Case(model="Qwen2.5-0.5B", gpus="1xH100", tp=1, slots=64, lengths="lognormal:median=90,sigma=1", cap=512))
for system in (tppo(setup, window=128), PartialRollouts(setup, batch_responses=40)):
    print(run(system, steps=4).totals())
assert not (AVAILABLE and sys.argv[1] == "without")
"""
    with_it, without = (
        subprocess.run([sys.executable, "-c", program, how], capture_output=True, text=True, check=True).stdout
        for how in ("with", "without")
    )
    assert with_it == without


@LAW
@given(plans(), st.integers(0, 12))
def test_the_schedule_is_the_batchers_where_the_prompts_run_out(plan, limit):
    plan = plan | {"num_replicas": 1}
    ((batcher, engine),) = batchers(plan)
    batcher.stream.limit = limit
    schedule = SlotSchedule(slots=plan["slots"], window=plan["window"], max_response_tokens=plan["cap"], refill=plan["refill"])
    stream, done = SampleStream([Prompt(id=0, token_ids=(1,), answer="")], samples_per_prompt=1, seed=0, limit=limit), {}

    def left(response):
        length = plan["lengths"][response % len(plan["lengths"])]
        return (length if length < plan["cap"] else plan["cap"] + 1) - done.get(response, 0)

    for _ in range(4):
        first = stream.next
        segments = drive_window(
            schedule, stream.draw, lambda grants: [left(grant.response) for grant in grants],
            lambda drawn, first=first: map(left, itertools.count(first + drawn)),
        )  # fmt: skip
        for _, response, begin, stop, _ in segments:
            done[response] = done.get(response, 0) + stop - begin
        batcher.window(engine)
        assert segments == batcher.segments


def test_windows_of_known_lengths_by_hand():
    """Two slots, windows of 3, a cap of 5 that response 0 would pass. Response 2 ends with the first window's edge, and is not cut."""
    windows = list(windows_of(SlotSchedule(slots=2, window=3, max_response_tokens=5), [7, 2, 1]))
    assert windows == [
        [(1, 1, 0, 2, End.END_TOKEN), (0, 0, 0, 3, End.RUNNING), (1, 2, 2, 3, End.END_TOKEN)],
        [(0, 0, 0, 2, End.LENGTH_CAP)],
    ]


@LAW
@given(plans(), st.sampled_from(["exclude", "defer"]), st.integers(0, 4), st.booleans())
def test_the_counts_of_a_step_are_those_of_the_trainers_masks_on_the_batchers_records(plan, tail, tail_tokens, pipelined):
    if tail == "defer":
        tail_tokens = min(tail_tokens, plan["window"])
    more = {"train_costs": Line(), "pipelined": True} if pipelined else {}
    system, real, carried = windowed(plan, tail=tail, tail_tokens=tail_tokens, **more), list(batchers(plan)), {}
    for step in range(5):
        slices = []
        for batcher, engine in real:
            slices += batcher.window(engine, version=max(step - 1, 0) if pipelined else step)
        lengths, cut = [len(s.response) for s in slices], [not s.response.ended for s in slices]
        settled = [s.response.num_settled for s in slices]
        mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]
        masks = policy_token_mask(mask, torch.tensor(settled), torch.tensor(cut), skip_tail=tail_tokens)
        ages = [
            step - s.response.versions[t] for s, row in zip(slices, masks, strict=True) for t in row.nonzero().flatten().tolist()
        ]
        for s, row in zip(slices, masks.sum(1).tolist(), strict=True):
            s.response.num_settled = s.response.num_settled + row if tail == "defer" else len(s.response)
            carried[s.response.id] = s.response
        new, trained = sum(s.stop - s.begin for s in slices), int(masks.sum())
        fed, ended = sum(lengths) + plan["prompt"] * len(slices), [len(s.response) for s in slices if s.response.ended]
        again = sum(s.begin + plan["prompt"] for s in slices if s.begin)
        record = system.step()
        assert {name: getattr(record, name) for name in (
            "generated", "trained", "deferred", "excluded", "tokens_fed", "prefix_tokens_trained", "reprefilled_tokens", "prefill_tokens",
            "value_tokens_trained", "started", "finished", "capped", "completed_length", "staleness_sum", "staleness_max", "decode_steps",
        )} == {
            "generated": new, "trained": trained,
            "deferred": sum(len(r) - r.num_settled for r in carried.values()),
            "excluded": new - trained if tail == "exclude" else 0,
            "tokens_fed": fed, "prefix_tokens_trained": again,
            "reprefilled_tokens": again - sum(s.begin > 0 for s in slices),
            "prefill_tokens": sum(s.begin + plan["prompt"] - 1 for s in slices),
            "value_tokens_trained": sum(ended) + plan["prompt"] * len(ended),
            "started": sum(s.begin == 0 for s in slices), "finished": len(ended),
            "capped": sum(s.response.end is End.LENGTH_CAP for s in slices), "completed_length": sum(ended),
            "staleness_sum": sum(ages), "staleness_max": max(ages, default=0),
            "decode_steps": max(batcher.num_steps for batcher, _ in real),
        }  # fmt: skip


@LAW
@given(plans())
def test_the_load_of_every_decode_step_is_the_batchers(plan):
    plan = plan | {"num_replicas": 1}
    system, ((batcher, engine),) = windowed(plan), batchers(plan)
    for _ in range(4):
        slices = batcher.window(engine)
        steps = decode_steps(batcher.segments, slices, batcher.step_ends_s)
        seen = []
        system.setup = dataclasses.replace(system.setup, costs=Spy(seen))
        record = system.step()
        assert seen[-1] == [(s.active, s.context_tokens) for s in steps]
        assert record.generated == sum(s.active for s in steps)
        assert record.prefill_tokens == sum(s.prefill_tokens for s in steps)


class Spy(Line):
    """Keeps the load of each decode step of the spans that it was asked for, the first and the last step of each."""

    def __init__(self, seen):
        super().__init__()
        object.__setattr__(self, "seen", seen)
        object.__setattr__(self, "first", None)

    def decode_step_s(self, active_n, context_tokens_n):
        spans = list(zip(np.asarray(active_n).tolist(), np.asarray(context_tokens_n).tolist(), strict=True))
        if self.first is None:
            object.__setattr__(self, "first", spans)
        else:
            steps = [(active, context) for (active, first), (_, last) in zip(self.first, spans, strict=True) if active
                     for context in range(int(first), int(last) + 1, active)]  # fmt: skip
            self.seen.append(steps)
            object.__setattr__(self, "first", None)
        return super().decode_step_s(active_n, context_tokens_n)


# ------------------------------------------------------------------------------------------------------------- a step by hand

HAND = Line(step_s=1.0, row_s=0.1, context_s=0.01, prefill_token_s=0.5, pair_s=0.001, forward_token_s=0.01, policy_token_s=0.02,
            value_token_s=0.03, update_s=0.25, once_s=0.125)  # fmt: skip


def test_three_slots_and_a_window_of_four_by_hand():
    """Lengths a 6, b 2, c 3, d 7, e 1, f 5, g at the cap of 8; one prompt token each; the last token of a cut row is excluded.

    window 0   slot 0  a a a a       cut, 4 so far              window 1   slot 0  a a g g       a ends (6), g cut, 2 so far
               slot 1  b b d d       b ends (2), d cut, 2                  slot 1  d d d d       cut, 6 so far
               slot 2  c c c e       c ends (3), e ends (1)                slot 2  f f f f       cut, 4 so far
    """
    system = tppo(setup_of([6, 2, 3, 7, 1, 5, 8, 1, 1], 8, slots=3, costs=HAND), window=4, tail_tokens=1)
    first, second = run(system, steps=2).records

    # Context before each decode step, prompt included: 1+1+1, 2+2+2, 3+3+1 (d began), 4+2+1 (e began).
    assert first.decode_s == pytest.approx(4 * (1.0 + 0.3) + 0.01 * (3 + 6 + 7 + 7))
    assert (first.prefill_s, first.prefill_tokens, first.engine_wait_s) == (0.0, 0, 0.0)  # the decode step feeds a prompt of one
    assert (first.generated, first.trained, first.excluded, first.in_flight) == (12, 10, 2, 0)  # a and d lose a token each
    assert (first.started, first.finished, first.started_length, first.completed_length) == (5, 3, 6 + 2 + 3 + 7 + 1, 2 + 3 + 1)
    assert first.tokens_fed == (1 + 4) + (1 + 2) + (1 + 3) + (1 + 2) + (1 + 1) == 17
    assert first.prefix_tokens_trained == 0
    pairs = 5 * 6 // 2 + 3 * 4 // 2 + 4 * 5 // 2 + 3 * 4 // 2 + 2 * 3 // 2
    assert first.logprob_s == pytest.approx(0.17 + 0.001 * pairs)
    assert first.value_forward_s == pytest.approx(0.34)
    assert first.policy_train_s == pytest.approx(0.02 * 17 + 0.25)
    assert first.value_train_s == pytest.approx(0.03 * (3 + 4 + 2) + 0.25)
    assert (first.wake_s, first.sync_s, first.updates) == (0.25, 0.125, 1)
    assert first.end_s == pytest.approx(sum(first.phases.values()))
    assert (first.occupancy, first.idle_slot_s) == (pytest.approx(1.0), pytest.approx(0.0))
    assert first.active[1].tolist() == [3, 0]

    # a, d: 1 + 4 and 1 + 2 tokens are prefilled but for the last, 4 and 2; context 5+3+1, 6+4+2, 5+3+1 (g for a), 6+4+2.
    assert second.prefill_tokens == second.reprefilled_tokens == 6
    assert second.prefill_s == pytest.approx(0.5 * 6 + 0.001 * (4 * 5 // 2 + 2 * 3 // 2))
    assert second.decode_s == pytest.approx(4 * 1.3 + 0.01 * (9 + 12 + 9 + 12))
    assert (second.generated, second.trained, second.excluded) == (12, 9, 3)  # d, f and g are cut
    assert second.prefix_tokens_trained == 5 + 3
    assert second.tokens_fed == 7 + 3 + 7 + 5
    assert (second.started, second.finished, second.completed_length, second.value_tokens_trained) == (2, 1, 6, 7)
    assert second.begin_s == first.end_s
    assert second.rollout_begin_s == pytest.approx(first.end_s + 0.25)

    third, fourth = system.step(), system.step()
    assert (third.finished, fourth.capped) == (5, 1)  # d, f, h, i, k (2) end; then g gets the two tokens that its cap leaves


def test_disjoint_devices_by_hand():
    """PPO, 2 slots, lengths 3 and 1: a rollout takes 3 s, training 4 tokens + 2 prompts = 6 s, a sync 1 s, verification 2 s."""
    costs = Line(policy_token_s=1.0, once_s=1.0)
    base = {"slots": 2, "costs": costs, "verify_s": 2.0}
    together = run(ppo(setup_of([3, 1], 3, **base)), steps=3)
    assert [r.end_s for r in together.records] == [14.0, 28.0, 42.0]  # wake 2, rollout 3, verify 2, train 6, sync 1
    apart = run(ppo(setup_of([3, 1], 3, train_costs=costs, **base)), steps=3)
    assert [r.end_s for r in apart.records] == [12.0, 24.0, 36.0]  # engines that never sleep do not wake
    assert [r.train_wait_s for r in apart.records] == [3.0, 3.0, 3.0]
    pipelined = run(ppo(setup_of([3, 1], 3, train_costs=costs, pipelined=True, **base)), steps=3)
    # 0-3 rollout 0; 3-11 verification and training 0 beside rollout 1; 11-12 sync; 12-20 training 1; ...
    assert [r.rollout_begin_s for r in pipelined.records] == [0.0, 3.0, 12.0]
    assert [r.end_s for r in pipelined.records] == [12.0, 21.0, 30.0]
    assert [r.train_wait_s for r in pipelined.records] == [3.0, 0.0, 0.0]
    assert [(r.staleness_sum, r.staleness_max) for r in pipelined.records] == [(0, 0), (4, 1), (4, 1)]
    # Rollouts that take longer than training set the pace: 0-30, training 30-36; 30-60, sync, training 61-67; 61-91, ...
    slow = run(ppo(setup_of([3, 1], 3, train_costs=costs, pipelined=True, slots=2, costs=Line(step_s=10.0, once_s=1.0))), steps=3)
    assert [r.end_s for r in slow.records] == [37.0, 68.0, 99.0]


# ------------------------------------------------------------------------------------------------- continuous batching, queued


def test_blocks_make_a_sequence_wait_by_hand():
    """Two sequences of 4 tokens in a cache of 10, each with half a block of 4 beside: the second waits for the first."""
    assert queued([4, 4], [1, 1], places=2, capacity=10).tolist() == [[0, 0, 0, 1, 4], [1, 0, 0, 1, 4]]
    assert queued([4, 4], [1, 1], places=2, capacity=10, unused=2).tolist() == [[0, 0, 0, 1, 4], [1, 0, 1, 2, 4]]


@pytest.mark.parametrize(("block", "steps"), [(1, 3), (4, 4)])
def test_a_window_takes_longer_where_the_cache_is_given_out_by_blocks(block, steps):
    """Prompts of 1, responses of 3, a cache of 8: before the third step two sequences hold 2 x 3 tokens, or 2 x 5 with half blocks
    of 4, and the second one decodes its last token when the first has ended."""
    costs = Line(kv_capacity_tokens=8)
    (record,) = run(tppo(setup_of([3], 3, slots=2, costs=costs, block_tokens=block), window=3, refill="step"), steps=1).records
    assert record.decode_steps == steps


def walk(context, new, places, capacity, following):
    """Token by token, as vLLM schedules: at each step the running ones first, the newest preempted while they do not fit, then the
    queue in order. Returns the stints, and the cache's tokens at each step."""
    later, queue, running, left, held = set(following), [], [], list(new), list(context)
    queue = [job for job in range(len(new)) if job not in later]
    ready, begun, stints, used = dict.fromkeys(queue, 0), {}, set(), []
    for now in itertools.count():
        for job in [job for job in running if left[job] == 0]:
            running.remove(job)
            stints.add((job, ready[job], begun[job][0], now, begun[job][1]))
            if following[job] >= 0:
                queue.append(following[job])
                ready[following[job]] = now
        if not running and not queue:
            return stints, used
        while sum(held[job] for job in running) > capacity:
            job = running.pop()
            stints.add((job, ready[job], begun[job][0], now, begun[job][1]))
            queue.insert(0, job)
            ready[job] = now
        while queue and len(running) < places and sum(held[job] for job in running) + held[queue[0]] <= capacity:
            job = queue.pop(0)
            running.append(job)
            begun[job] = now, held[job]
        used.append(sum(held[job] for job in running))
        for job in running:
            held[job], left[job] = held[job] + 1, left[job] - 1


@LAW
@given(st.data())
def test_the_queue_is_that_of_a_scheduler_that_walks_token_by_token(data):
    num = data.draw(st.integers(1, 9))
    context = data.draw(st.lists(st.integers(1, 9), min_size=num, max_size=num))
    new = data.draw(st.lists(st.integers(1, 12), min_size=num, max_size=num))
    places = data.draw(st.integers(1, 6))
    longest = max(c + n for c, n in zip(context, new, strict=True))
    capacity = data.draw(st.integers(longest, 4 * longest))
    # Chains, as slots have them, which end in whatever order.
    order, following = data.draw(st.permutations(range(num))), [-1] * num
    for one, two in itertools.pairwise(order):
        if data.draw(st.booleans()):
            following[one] = two
    stints = [tuple(row) for row in queued(context, new, places=places, capacity=capacity, following=following).tolist()]
    expected, used = walk(context, new, places, capacity, following)
    # Jobs that end with the same step have no order among themselves; their followers then come in the order of the jobs.
    assert set(stints) == expected
    for job in range(num):
        parts = sorted((begin, stop) for j, _, begin, stop, _ in stints if j == job)
        assert sum(stop - begin for begin, stop in parts) == new[job]
        assert all(a[1] <= b[0] for a, b in itertools.pairwise(parts)), "begins before it was stopped"
    assert max(used) <= capacity
    columns = [np.array(column) for column in zip(*stints, strict=True)]
    loads = load(Stints(np.zeros(len(stints), dtype=np.int64), *columns), 1)
    seen = []
    clock(Spy(seen), loads)
    assert [context for _, context in seen[0]] == used
    assert all(ready <= begin < stop for _, ready, begin, stop, _ in stints)


def test_the_clock_is_the_sum_of_its_steps():
    zeros, length = np.zeros(3, dtype=np.int64), np.array([5, 3, 4])
    stints = Stints(np.array([0, 0, 1]), np.arange(3), zeros, zeros, length, np.array([3, 7, 2]))
    loads = load(stints, 2)
    costs = Line(step_s=1.0, row_s=0.5, context_s=0.25, prefill_token_s=2.0)
    times = clock(costs, loads)
    steps = [1 + 2 * 0.5 + 0.25 * 10 + 2.0 * 8, 1 + 1 + 0.25 * 12, 1 + 1 + 0.25 * 14, 1.5 + 0.25 * 6, 1.5 + 0.25 * 7]
    ends = list(itertools.accumulate(steps)), list(itertools.accumulate([1.5 + 0.25 * 2 + 2.0, 2.25, 2.5, 2.75]))
    assert loads.step_E.tolist() == [0, 3, 5, 0, 4]
    assert times.time_E.tolist() == pytest.approx([0, ends[0][2], ends[0][4], 0, ends[1][3]])
    assert step_times(costs, loads, times, 0).tolist() == pytest.approx(ends[0][:3])
    assert step_times(costs, loads, times, 1).tolist() == pytest.approx(ends[0][3:])
    for stop_s in (0, 0.1, *ends[0], *(end + 0.01 for end in ends[0]), 1e9):
        expected = [min(sum(end < stop_s for end in replica) + 1, len(replica)) if stop_s else 0 for replica in ends]
        assert steps_until(costs, loads, times, stop_s - 1e-9 * (stop_s > 0.1)).tolist() == expected, stop_s


@LAW
@given(st.data())
def test_the_clock_by_spans_is_the_clock_step_by_step(data):
    """Costs bend where attention's roofs or batches change, never within a span: first and last step give the sum."""
    num = data.draw(st.integers(1, 8))
    column = st.lists(st.integers(1, 40), min_size=num, max_size=num)
    begin_n, length_n, context_n = (np.array(data.draw(column)) - less for less in (1, 0, 0))
    stints = Stints(np.zeros(num, dtype=np.int64), np.arange(num), begin_n, begin_n, begin_n + length_n, context_n)
    costs, loads = Line(step_s=1.0, row_s=0.3, context_s=0.01, prefill_token_s=0.2), load(stints, 1)
    times = clock(costs, loads)
    ends, second = {}, 0.0
    for step in range(int(stints.stop_n.max())):
        alive = (begin_n <= step) & (step < stints.stop_n)
        ends[step] = second
        context = int((context_n + step - begin_n)[alive].sum())
        second += 0.2 * int((context_n - 1)[begin_n == step].sum())
        second += (1.0 + 0.3 * int(alive.sum()) + 0.01 * context) * bool(alive.any())
    ends[int(stints.stop_n.max())] = second
    assert times.time_E.tolist() == pytest.approx([ends[step] for step in loads.step_E.tolist()])
    assert loads.peak_context_R()[0] == max(
        int((context_n + s - begin_n)[(begin_n <= s) & (s < stints.stop_n)].sum()) for s in ends
    )


# --------------------------------------------------------------------------------------------------------- laws of all systems


@st.composite
def systems(draw):
    """Any of the systems, on any small setup."""
    plan = draw(plans())
    longest = plan["cap"] + plan["prompt"]
    costs = Line(row_s=draw(st.sampled_from([0.0, 0.1])), context_s=draw(st.sampled_from([0.0, 0.03])), prefill_token_s=0.01,
                 policy_token_s=draw(st.sampled_from([0.0, 0.05, 2.0])), once_s=0.5,
                 kv_capacity_tokens=draw(st.one_of(st.none(), st.integers(longest, 3 * longest))))  # fmt: skip
    kind = draw(st.sampled_from(["windowed", "synchronous", "partial", "tail", "async"]))
    apart = kind == "async" or draw(st.booleans())
    more = {"train_costs": costs, "pipelined": kind != "async" and draw(st.booleans())} if apart else {}
    if kind == "windowed":
        tail = draw(st.sampled_from(["exclude", "defer"]))
        least = draw(st.integers(0, plan["window"]))
        return windowed(
            plan, costs, tail=tail, tail_tokens=draw(st.integers(0, min(plan["window"], 3))), min_new_tokens=least, **more
        )
    setup = setup_of(plan["lengths"], plan["cap"], slots=plan["slots"], num_replicas=plan["num_replicas"],
                     prompt_tokens=plan["prompt"], costs=costs, **more)  # fmt: skip
    batch = draw(st.integers(1, 6))
    if kind == "async":
        return Asynchronous(setup, batch_responses=batch, max_staleness=draw(st.integers(0, 3)), wait_for_old=draw(st.booleans()))
    if kind == "synchronous":
        return Synchronous(setup, batch_responses=batch)
    system = PartialRollouts if kind == "partial" else TailBatching
    return system(setup, batch_responses=batch, in_flight=batch + draw(st.integers(0, 5)))


@settings(max_examples=150, deadline=None)
@given(systems())
def test_every_token_is_in_exactly_one_place_and_every_slot_second_is_busy_or_idle(system):
    records, samples = [], system.samples
    for _ in range(6):
        records.append(r := system.step())
        flows = {name: sum(getattr(r, name) for r in records) for name in ("generated", "trained", "discarded", "excluded")}
        assert flows["generated"] == flows["trained"] + flows["discarded"] + flows["excluded"] + r.in_flight + r.deferred
        assert min(r.trained, r.discarded, r.excluded, r.in_flight, r.deferred, r.queue_s, r.idle_slot_s + 1e-9) >= 0
        assert sum(x.finished for x in records) >= sum(x.completed for x in records)
        assert 0 <= r.staleness_sum <= r.trained * r.staleness_max
        # Busy and idle from the curve of active sequences, which is computed apart from them.
        edges, active = np.append(r.active[0], r.rollout_s), r.active[1]
        assert active.max(initial=0) <= r.slots
        busy_s = float(np.sum(np.diff(edges) * active))
        idle_s = float(np.sum(np.diff(edges) * (r.slots - active))) + r.slots * float(edges[0])
        assert r.busy_slot_s == pytest.approx(busy_s)
        assert r.idle_slot_s == pytest.approx(idle_s, abs=1e-9 * r.slots * max(r.rollout_s, 1))
        assert r.busy_slot_s + r.idle_slot_s == pytest.approx(r.slots * r.rollout_s)
        assert r.prefill_s + r.decode_s + r.engine_wait_s == pytest.approx(r.rollout_s)
        rows = samples._rows
        assert (rows.done <= rows.length).all()
        assert (rows.length[: samples._stop] <= system.setup.lengths.cap).all()
        assert r.end_s >= max(r.begin_s, r.rollout_begin_s)
        if system.setup.train_costs is None:
            assert r.step_s == pytest.approx(sum(r.phases.values()))
    assert [r.begin_s for r in records[1:]] == [r.end_s for r in records[:-1]]


@LAW
@given(st.data())
def test_nothing_finishes_before_it_starts_and_nothing_outgrows_the_cap(data):
    system, begun, seen = data.draw(systems()), {}, {}
    put = system.samples.put

    def watch(ids, **columns):
        put(ids, **columns)
        for id, done, length in zip(
            ids.tolist(), *(system.samples.at(ids)._asdict()[n].tolist() for n in ("done", "length")), strict=True
        ):
            if done:
                begun.setdefault(id, system.num_steps)
            assert done >= seen.get(id, 0) or done == 0, "a response shrank"
            assert done <= length <= system.setup.lengths.cap
            assert done < length or begun[id] <= system.num_steps
            seen[id] = done

    system.samples.put = watch
    started = sum(system.step().started for _ in range(5))
    assert started == len(begun)


@LAW
@given(st.data())
def test_the_same_seed_gives_the_same_run_and_another_seed_another(data):
    lengths = Empirical(values=tuple(range(1, 12)), cap=12, correlation=0.3)
    window = data.draw(st.integers(1, 12))
    runs = [run(tppo(setup_of(lengths, slots=16, seed=seed, samples_per_prompt=4, num_replicas=2), window=window), steps=4)
            for seed in (3, 3, 4)]  # fmt: skip
    assert runs[0].records == runs[1].records
    assert runs[0].records != runs[2].records


def test_a_sample_has_the_same_length_under_every_system():
    lengths = Empirical(values=tuple(range(1, 500)), cap=600)
    one, two = (Samples(setup_of(lengths, slots=8, num_replicas=n)) for n in (1, 4))
    two.require(5000, updates=3)
    one.require(5000, updates=0)
    assert np.array_equal(one.at(np.arange(5000)).length, two.at(np.arange(5000)).length)
    assert [two.lengths(1, 3, 0).tolist()] == [one.at(np.array([1, 5, 9])).length.tolist()]


def test_lengths_grow_with_the_updates_of_the_policy():
    """In blocks: with 4,096 samples per step and 3 updates, block k is drawn after 3 k updates."""

    class Growing(Constant):
        def sample(self, rng, num_groups, samples_per_group=1, *, step=0):
            return np.full((num_groups, samples_per_group), 1 + step)

    growing = Growing(value=1, cap=50, growth=Growth(factors=((0, 1.0), (1, 1.0))))
    setup = setup_of(growing, slots=4096, updates_per_step=3)
    assert [r.decode_steps for r in run(ppo(setup), steps=4).records] == [1, 4, 7, 10]


@pytest.mark.parametrize("make", [
    lambda s: tppo(s, window=4), lambda s: PartialRollouts(s, batch_responses=200), lambda s: TailBatching(s, batch_responses=200),
])  # fmt: skip
def test_rows_of_samples_that_are_done_are_dropped_and_nothing_changes(make):
    keeps, drops = (make(setup_of([1, 2, 40, 3, 5], 40, slots=256, num_replicas=2, samples_per_prompt=2)) for _ in "ab")
    keeps.samples.release = lambda oldest: None
    assert run(drops, steps=120).records == run(keeps, steps=120).records
    assert 2 * len(drops.samples._rows.length) <= len(keeps.samples._rows.length)


# --------------------------------------------------------------------------------------------------------------- closed forms


def gain(costs: Line, lengths, *, slots: int, window: int, steps: int, refill="immediate", seed=0, prompt_tokens=1) -> float:
    """Trained tokens per second of T-PPO / PPO, without a tail."""
    base = {"slots": slots, "costs": costs, "seed": seed, "prompt_tokens": prompt_tokens}
    many = run(tppo(setup_of(lengths, **base), window=window, refill=refill, tail_tokens=0), steps=steps * lengths.cap // window)
    once = run(ppo(setup_of(lengths, **base)), steps=steps)
    return (many.total("trained") / many.seconds) / (once.total("trained") / once.seconds)


@LAW
@given(plans(), st.integers(0, 30))
def test_a_window_of_the_cap_with_step_refill_is_ppo_to_the_last_digit(plan, more):
    costs = dataclasses.replace(HAND, kv_capacity_tokens=3 * (plan["cap"] + plan["prompt"]))
    setups = [
        setup_of(plan["lengths"], plan["cap"], slots=plan["slots"], num_replicas=plan["num_replicas"], costs=costs) for _ in "ab"
    ]
    one = run(ppo(setups[0]), steps=4)
    two = run(tppo(setups[1], window=plan["cap"] + more, refill="step"), steps=4)
    assert one.records == two.records
    assert all(np.array_equal(a.active[0], b.active[0]) for a, b in zip(one.records, two.records, strict=True))


@pytest.mark.parametrize("system", [
    lambda s: Synchronous(s, batch_responses=8),
    lambda s: PartialRollouts(s, batch_responses=8),
    lambda s: TailBatching(s, batch_responses=8),
    lambda s: Asynchronous(s, batch_responses=8, max_staleness=0),
])  # fmt: skip
@pytest.mark.parametrize("capacity", [None, 32])
def test_with_nothing_beyond_the_batch_every_system_is_ppo(system, capacity):
    costs = dataclasses.replace(HAND, kv_capacity_tokens=capacity)
    options = {"slots": 8, "num_replicas": 2, "costs": costs, "train_costs": costs, "prompt_tokens": 3}
    one, two = (run(make(setup_of([5, 17, 3, 24, 9, 11, 1], **options)), steps=5) for make in (ppo, system))
    assert (one.total("preemptions") > 0) == (capacity is not None)
    for a, b in zip(one.records, two.records, strict=True):
        same = {
            name: value for name, value in a.row().items() if name not in ("rollout_s", "engine_wait_s", "idle_slot_s", "occupancy")
        }
        assert {name: b.row()[name] for name in same} == pytest.approx(same)


@LAW
@given(st.integers(1, 20), st.integers(1, 8), st.integers(1, 4), st.sampled_from(["immediate", "step"]))
def test_equal_lengths_gain_nothing_where_decoding_is_all_that_costs(length, slots, longer, refill):
    """Step costs that are straight lines in batch and context: every token costs the same share, at any window."""
    costs = Line(row_s=0.1, context_s=0.01)
    lengths = Constant(value=length, cap=length)
    assert gain(costs, lengths, slots=slots, window=length, steps=3, refill=refill) == 1.0
    # A longer window cuts only with immediate refill; then the slots still move in step, and each token costs what it did.
    longer_cap = Constant(value=length, cap=4 * length)
    assert gain(costs, longer_cap, slots=slots, window=longer * length, steps=3, refill="immediate") == pytest.approx(1.0)


@pytest.mark.parametrize("costs", [Line(prefill_token_s=0.01), Line(forward_token_s=0.01), Line(policy_token_s=0.01)])
@pytest.mark.parametrize("window", [3, 4, 6])
def test_equal_lengths_lose_where_windows_feed_prefixes_again(costs, window):
    assert gain(costs, Constant(value=12, cap=12), slots=4, window=window, steps=3, prompt_tokens=5) < 1


def test_one_slot_gains_nothing():
    """Seven responses of 56 tokens take PPO seven steps, and T-PPO seven windows of 8 tokens."""
    costs, lengths = Line(context_s=0.01), [1, 2, 3, 5, 8, 13, 24]
    once, many = (
        make(setup_of(lengths, slots=1, costs=costs, prompt_tokens=3)) for make in (ppo, lambda s: tppo(s, window=8, tail_tokens=0))
    )
    once, many = run(once, steps=21), run(many, steps=21)
    pairs = sum(3 * n + n * (n - 1) // 2 for n in lengths)
    assert once.seconds == pytest.approx(many.seconds) == pytest.approx(3 * (56 + 0.01 * pairs))
    assert once.total("trained") == many.total("trained") == 3 * 56


def test_ppo_decodes_as_many_steps_as_the_longest_of_its_responses_is_expected_to_take():
    """E[max of n] = sum over k >= 0 of 1 - P(length <= k)^n."""
    values, slots, steps = (1, 1, 2, 3, 3, 5, 9, 20), 6, 800
    shares = np.array([np.mean(np.array(values) <= k) for k in range(21)])
    expected = float(np.sum(1 - shares**slots))
    trace = run(ppo(setup_of(Empirical(values=values, cap=20), slots=slots)), steps=steps)
    taken = np.array([r.decode_steps for r in trace.records])
    assert abs(taken.mean() - expected) < 4 * taken.std() / math.sqrt(steps)
    assert trace.seconds == taken.sum()
    assert expected == pytest.approx(Empirical(values=values, cap=20).expected_maximum(slots))


def two_point_gain(share: float, *, short: int, cap: int, slots: int, step_s=lambda active: 1.0) -> float:
    """Gain of immediate refill over PPO if responses are `short`, or `cap` with probability `share`, and only decoding costs.

    PPO: `short` steps with all n slots, then cap - short with the K ~ Binomial(n, share) long ones, h(K) seconds each, h(0) = 0.
    T-PPO: all n slots always. Tokens per response in both: short + share (cap - short).

        gain = [short h(n) + (cap - short) E h(K)] / [h(n) (short + share (cap - short))]

    At share 0 and 1 it is 1 for every h. With h = 1, E h(K) = 1 - (1 - share)^n and the sign of the derivative is that of
    g = n q^(n-1) (short + share d) - cap + d q^n, q = 1 - share, d = cap - short: g(0) = (n - 1) short > 0, g(1) = -cap < 0 and
    g' = -n (n - 1) q^(n-2) (short + share d) < 0, so there is one maximum, for n > 1; for n = 1 the gain is 1 throughout.
    For other h: E h(K) is the Bernstein polynomial of h in the share, and changes curvature no more often than h. So one maximum
    is left where h is concave (a + b K), and where it is the roof max(a, b K), concave and then convex.
    """
    binomial = [math.comb(slots, k) * share**k * (1 - share) ** (slots - k) for k in range(slots + 1)]
    tail_s = sum(p * step_s(k) for k, p in enumerate(binomial) if k)
    return (short * step_s(slots) + (cap - short) * tail_s) / (step_s(slots) * (short + share * (cap - short)))


ROOFS = {
    "flat": lambda k: 1.0,
    "line": lambda k: 1 + 0.3 * k,
    "roof": lambda k: max(1.0, k / 3),
    "compute-bound": lambda k: 1.0 * k,
}


@pytest.mark.parametrize("roof", ROOFS)
@pytest.mark.parametrize("slots", [2, 8, 64])
@pytest.mark.parametrize("short", [1, 6, 18])
def test_short_or_capped_lengths_the_gain_is_1_at_both_ends_and_has_one_maximum(roof, slots, short):
    curve = [two_point_gain(p, short=short, cap=24, slots=slots, step_s=ROOFS[roof]) for p in np.linspace(0, 1, 201)]
    assert curve[0] == pytest.approx(1.0, abs=1e-12)
    assert curve[-1] == pytest.approx(1.0, abs=1e-12)
    assert min(curve) >= 1 - 1e-12
    turns = np.sign(np.round(np.diff(curve), 12))
    turns = turns[turns != 0]
    assert np.sum(np.diff(turns) != 0) == (0 if roof == "compute-bound" else 1)  # all work is proportional: nothing to gain


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("row_s", [0.0, 0.3])
def test_short_or_capped_lengths_the_clock_has_the_gain_of_the_closed_form(share, row_s):
    slots, short, cap, window = 16, 3, 24, 12  # short divides the window and the window the cap: the ends are exact
    costs, lengths = Line(row_s=row_s), TwoPoint(short=short, long_share=share, cap=cap)
    expected = two_point_gain(share, short=short, cap=cap, slots=slots, step_s=lambda k: 1 + row_s * k)
    found = [gain(costs, lengths, slots=slots, window=window, steps=80, seed=seed) for seed in range(5)]
    if share in (0.0, 1.0):
        assert found == pytest.approx([1.0] * 5, abs=1e-12)
    else:
        assert abs(np.mean(found) - expected) < 4 * np.std(found, ddof=1) / math.sqrt(5)
        assert np.std(found) < 0.1 * expected


def test_the_ends_of_that_curve_are_below_1_where_prefixes_cost_or_slots_wait():
    """Refuted: "1 at share 0" and "1 at share 1" hold for decoding alone, with windows that fit."""
    prefix = Line(policy_token_s=0.01)
    assert gain(prefix, TwoPoint(short=5, long_share=0.0, cap=24), slots=8, window=8, steps=40, prompt_tokens=9) < 0.99
    assert gain(prefix, TwoPoint(short=4, long_share=0.0, cap=24), slots=8, window=8, steps=40) == pytest.approx(1.0)
    assert gain(prefix, TwoPoint(short=4, long_share=1.0, cap=24), slots=8, window=8, steps=40) < 0.95  # cut after 8 and 16
    # With step refill slots wait at the last edge: 24 tokens take two windows of 16.
    waits = gain(Line(), TwoPoint(short=4, long_share=1.0, cap=24), slots=8, window=16, steps=40, refill="step")
    assert waits == pytest.approx(1.0)  # a window ends when nothing runs, so they do not wait if all are equal
    assert gain(Line(), Empirical(values=(16, 24), cap=24), slots=8, window=16, steps=40, refill="step") < 1


def test_where_training_is_all_that_costs_the_curve_has_a_minimum_inside_and_no_maximum():
    """Refuted: "the gain has one maximum". At share 1 all responses are cut at the same multiples of the window; just below, they
    are out of step, and one that is cut at 2, 10 and 18 feeds more prefix than one that is cut at 8 and 16."""
    bound = Line(step_s=0.01, policy_token_s=1.0)
    curve = {
        share: gain(bound, TwoPoint(short=4, long_share=share, cap=24), slots=8, window=8, steps=60) for share in (0, 0.1, 0.9, 1)
    }
    assert curve[0] == pytest.approx(1.0)
    assert curve[1] == pytest.approx((24 * 8 + 8) / (8 * (8 + 16 + 24) + 3 * 8), rel=0.01)  # tokens fed, a prompt token each time
    assert curve[0.9] < 0.95 * curve[1] < curve[0.1] < curve[0]


def test_equal_lengths_can_gain_where_the_cache_is_too_small():
    """Refuted: "equal lengths give no gain". Windows bring sequences back to the queue in turn, which saves preemptions."""
    tight = Line(kv_capacity_tokens=49)
    assert gain(tight, Constant(value=12, cap=12), slots=16, window=3, steps=1) == pytest.approx(32 / 30)
    assert gain(Line(kv_capacity_tokens=100), Constant(value=24, cap=24), slots=16, window=8, steps=3) < 1


# ------------------------------------------------------------------------------------------------------------------ monotony

RATES = (
    "step_s",
    "row_s",
    "context_s",
    "prefill_token_s",
    "forward_token_s",
    "policy_token_s",
    "value_token_s",
    "pair_s",
    "update_s",
    "once_s",
)


@LAW
@given(plans(), st.lists(st.floats(0, 2), min_size=len(RATES), max_size=len(RATES)), st.data())
def test_a_faster_device_never_makes_a_step_of_ppo_or_tppo_slower(plan, rates, data):
    """With preemption too: who waits for the cache depends on tokens, not on seconds. The replicas' draws do not either."""
    factors = data.draw(st.lists(st.floats(0, 1), min_size=len(RATES), max_size=len(RATES)))
    capacity = data.draw(st.one_of(st.none(), st.integers(plan["cap"] + plan["prompt"], 60)))
    apart = data.draw(st.booleans())
    traces = []
    for scale in ([1.0] * len(RATES), factors):
        costs = Line(**{name: r * f for name, r, f in zip(RATES, rates, scale, strict=True)}, kv_capacity_tokens=capacity)
        more = {"train_costs": costs, "pipelined": True} if apart else {}
        traces.append(run(windowed(plan, costs, **more), steps=4))
    for slow, fast in zip(*(trace.records for trace in traces), strict=True):
        assert fast.end_s <= slow.end_s
        assert fast.rollout_s <= slow.rollout_s
        assert apart or fast.phases["prefill"] + fast.phases["decode"] <= slow.phases["prefill"] + slow.phases["decode"]
        assert {k: v for k, v in fast.row().items() if isinstance(v, int)} == {
            k: v for k, v in slow.row().items() if isinstance(v, int)
        }


class Bumpy(Line):
    """A decode step of several sequences costs `crowd_s` instead."""

    def __init__(self, crowd_s, **rates):
        super().__init__(**rates)
        object.__setattr__(self, "crowd_s", crowd_s)

    def decode_step_s(self, active_n, context_tokens_n):
        return np.where(np.asarray(active_n) > 1, self.crowd_s, self.step_s)


def test_a_faster_device_can_make_a_step_of_partial_rollouts_slower():
    """Refuted for partial rollouts. Replica 0 has responses of 2 and 5 tokens, replica 1 one of 4; two of them make the batch.

    Slow, steps of two sequences take 2 s: the responses end after 4, 7 and 4 s, and 2 + 4 tokens train. Fast, they take 0.1 s: the
    responses end after 0.2, 3.2 and 4 s, and 2 + 5 tokens train, which takes longer; replica 1 is in a step until 4 s as before.
    """
    ends = []
    for crowd_s in (2.0, 0.1):
        costs = Bumpy(crowd_s, policy_token_s=1.0)
        record = PartialRollouts(setup_of([2, 4, 5], 9, slots=3, num_replicas=2, costs=costs), batch_responses=2).step()
        ends.append((record.rollout_s, record.trained, record.end_s))
    assert ends == [(4.0, 6, 4.0 + 6 + 2), (4.0, 7, 4.0 + 7 + 2)]


# -------------------------------------------------------------------------------------------------------- the other systems


def test_partial_rollouts_by_hand():
    """Three slots, a batch of two, lengths 2, 5, 3, then 4, 1, 6: a and c end after 3 steps; b (3 so far) goes on beside d and e."""
    system = PartialRollouts(setup_of([2, 5, 3, 4, 1, 6], 9, slots=3, costs=Line(policy_token_s=1.0)), batch_responses=2)
    first, second, third = run(system, steps=3).records
    assert (first.decode_steps, first.generated, first.trained, first.in_flight) == (3, 2 + 3 + 3, 2 + 3, 3)
    assert (first.started, first.finished, first.completed_length, first.staleness_sum) == (3, 2, 5, 0)
    assert first.policy_train_s == (1 + 2) + (1 + 3)
    # b needs 2 more, d 4, e 1: e and b are done after 2. b's first three tokens are one version old.
    assert (second.decode_steps, second.generated, second.trained, second.in_flight) == (2, 2 + 2 + 1, 5 + 1, 2)
    assert (second.staleness_sum, second.staleness_max, second.staleness_mean) == (3, 1, 0.5)
    assert (second.prefill_tokens, second.reprefilled_tokens) == (3, 3)  # b: the prompt and 3 tokens, but for the last
    # d (2 more), f (6), a new one (2): d and the new one end together; its first two tokens are one version old.
    assert (third.decode_steps, third.trained, third.staleness_sum, third.in_flight) == (2, 4 + 2, 2, 2)


def test_partial_rollouts_hold_back_what_ends_beyond_the_batch():
    system = PartialRollouts(setup_of([4], 9, slots=3, costs=Line()), batch_responses=2)
    records = run(system, steps=4).records
    assert [r.completed for r in records] == [2, 2, 2, 2]
    assert [r.finished for r in records] == [3, 3, 0, 3]  # one is held, then two, which fill the next batch without a rollout
    assert [r.rollout_s for r in records] == [4.0, 4.0, 0.0, 4.0]
    assert [r.in_flight for r in records] == [4, 8, 0, 4]
    assert [r.staleness_max for r in records] == [0, 1, 1, 0]


def test_tail_batching_by_hand():
    """Four slots, batches of two; lengths 2, 9, 3, 8, then 1, 1, 7, 6: two short rounds put b, d, g, h aside, two long ones run them."""
    system = TailBatching(setup_of([2, 9, 3, 8, 1, 1, 7, 6], 9, slots=4, costs=Line()), batch_responses=2)
    a, b, c, d = run(system, steps=4).records
    assert (a.rollout_s, a.generated, a.trained, a.discarded) == (3.0, 2 + 3 + 3 + 3, 5, 6)
    assert (b.rollout_s, b.generated, b.trained, b.discarded) == (9.0, 17, 17, 0)  # b and d, from their beginning
    assert (c.rollout_s, c.trained, c.discarded) == (1.0, 2, 2)
    assert (d.rollout_s, d.trained, d.staleness_sum, d.staleness_max) == (7.0, 13, 0, 0)
    assert [r.started for r in (a, b, c, d)] == [4, 0, 4, 0]
    assert system.samples.next_R.tolist() == [8]


def test_asynchronous_by_hand():
    """Batches of one, one slot, lengths 2 and 3 in turn, a second per token, training 4 s, sync 1 s, at most one version old.

    0-2 first response; 2-6 it trains, the second (3) is decoded 2-5, then nothing more may start; 6-7 sync
    7-11 the second trains, one version old; the third (2) is decoded 7-9, by then of the current version; 11-12 sync
    """
    costs = Line(once_s=1.0, update_s=2.0)
    system = Asynchronous(setup_of([2, 3], 9, slots=1, costs=costs, train_costs=costs), batch_responses=1, max_staleness=1)
    first, second, third = run(system, steps=3).records
    assert [(r.begin_s, r.end_s) for r in (first, second, third)] == [(0.0, 7.0), (7.0, 12.0), (12.0, 17.0)]
    assert [(r.generated, r.trained, r.in_flight) for r in (first, second, third)] == [(5, 2, 3), (2, 3, 2), (3, 2, 3)]
    assert [(r.staleness_sum, r.staleness_max) for r in (first, second, third)] == [(0, 0), (3, 1), (2, 1)]
    assert [r.train_wait_s for r in (first, second, third)] == [2.0, 0.0, 0.0]
    assert first.occupancy == pytest.approx(5 / 6)


@LAW
@given(st.data())
def test_staleness_is_bounded_where_training_waits_for_the_old(data):
    lengths = data.draw(st.lists(st.one_of(st.integers(1, 4), st.just(40)), min_size=2, max_size=9))
    costs = Line(policy_token_s=data.draw(st.sampled_from([0.0, 0.1, 3.0])), once_s=0.5)
    bound, replicas = data.draw(st.integers(0, 4)), data.draw(st.integers(1, 2))
    setup = setup_of(lengths, 40, slots=data.draw(st.integers(2, 9)), num_replicas=replicas, costs=costs, train_costs=costs)
    system = Asynchronous(setup, batch_responses=data.draw(st.integers(1, 5)), max_staleness=bound)
    records = run(system, steps=12).records
    assert max(r.staleness_max for r in records) <= bound
    assert all(r.completed == system.batch_responses for r in records)


def test_admission_alone_does_not_bound_the_staleness_of_a_long_response():
    """Refuted: the rule that limits how many responses may have started bounds their number, not their age."""
    costs = Line(once_s=0.5)
    found = {}
    for wait_for_old in (True, False):
        setup = setup_of([40, 1, 2, 1, 2, 1, 2, 1], 40, slots=4, costs=costs, train_costs=costs)
        system = Asynchronous(setup, batch_responses=2, max_staleness=1, wait_for_old=wait_for_old)
        trace = run(system, steps=40)
        found[wait_for_old] = trace.total("staleness_max"), trace.length_bias
    assert found[True] == (1, pytest.approx(1.0, abs=0.2))
    assert found[False][0] > 3 * 1


# ------------------------------------------------------------------------------------------------------- the trace, and errors


def test_the_trace_sums_up_and_writes_a_table(tmp_path):
    trace = run(tppo(setup_of([3, 9, 14, 5], costs=HAND, updates_per_step=4), window=4), steps=5)
    totals = trace.totals()
    assert totals["generated"] == sum(r.generated for r in trace.records) == 5 * 16
    assert totals["excluded"] + totals["trained"] == totals["generated"]
    assert totals["seconds"] == trace.records[-1].end_s == pytest.approx(sum(r.step_s for r in trace.records))
    assert totals["updates"] == 20
    assert totals["ops_per_byte"] is None
    levels = run(PartialRollouts(setup_of([2, 9, 14, 5]), batch_responses=2), steps=3)
    assert levels.totals()["in_flight"] == levels.records[-1].in_flight > 0
    assert levels.totals()["staleness_max"] == max(r.staleness_max for r in levels.records)
    assert trace.time_to(updates=5) == trace.records[1].end_s
    assert trace.time_to(tokens=1) == trace.records[0].end_s
    assert trace.time_to(tokens=10**9) is None
    with pytest.raises(ValueError, match="one of the two"):
        trace.time_to()
    trace.write_csv(tmp_path / "trace.csv")
    with (tmp_path / "trace.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["step_s"]) for row in rows] == [r.step_s for r in trace.records]
    assert rows[0]["ops_per_byte"] == ""
    time_s, active = trace.active()
    assert (np.diff(time_s) > 0).all()
    assert active.max() == 4
    broken = [dataclasses.replace(trace.records[0], trained=0)]
    with pytest.raises(AssertionError, match="unsettled"):
        check_conservation(broken)


def test_operations_per_byte_are_weighted_by_the_seconds_of_the_decode_steps():
    class Telling(Line):
        def operations_per_byte(self, active, context_tokens):
            return np.asarray(active, dtype=float)

    trace = run(ppo(setup_of([1, 3], slots=2, costs=Telling(row_s=1.0, prefill_token_s=5.0), prompt_tokens=4)), steps=2)
    assert trace.records[0].decode_s == 3 + 2 + 2
    assert trace.ops_per_byte == trace.records[0].ops_per_byte == pytest.approx((2 * 3 + 1 * 2 + 1 * 2) / 7)


def test_early_steps_train_short_responses_to_their_end():
    """docs/theory.md F6: long ones have not ended yet."""
    setup = setup_of([2, 2, 2, 30], 30, slots=64)
    trace = run(tppo(setup, window=4), steps=60)
    early = dataclasses.replace(trace, records=trace.records[:4])
    assert early.length_bias == pytest.approx(2 / 9, rel=0.03)
    assert 0.8 < trace.length_bias < 1.05


def test_updates_follow_the_trained_tokens_where_asked():
    trace = run(ppo(setup_of([6, 2], slots=4, update_tokens=5)), steps=1)
    assert trace.records[0].updates == 3  # 16 tokens
    assert run(ppo(setup_of([1], slots=1, update_tokens=5)), steps=1).records[0].updates == 1


def test_run_stops_at_the_first_limit():
    assert len(run(ppo(setup_of([3])), tokens=13).records) == 2
    assert len(run(ppo(setup_of([3], updates_per_step=4)), updates=9, steps=7).records) == 3
    with pytest.raises(RuntimeError, match="expected to reach"):
        run(ppo(setup_of([3])), tokens=10**6, max_steps=3)
    with pytest.raises(ValueError, match="expected one of them"):
        run(ppo(setup_of([3])))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: setup_of([3], slots=0), "slots: got 0"),
    (lambda: setup_of([3], slots=3, num_replicas=4), "at least one for each of 4"),
    (lambda: setup_of([3], verify_s=math.nan), "verify_s"),
    (lambda: setup_of([3], pipelined=True), "train_costs"),
    (lambda: setup_of([3], updates_per_step=True), "updates_per_step: got True"),
    (lambda: tppo(setup_of([3]), window=4, tail="defer", tail_tokens=5), "at most the window"),
    (lambda: tppo(setup_of([3]), window=4, tail="drop"), "tail: got 'drop'; expected one of exclude, defer"),
    (lambda: tppo(setup_of([3]), window=0), "window"),
    (lambda: PartialRollouts(setup_of([3]), batch_responses=9), "in_flight: got 4"),
    (lambda: TailBatching(setup_of([3]), batch_responses=3, in_flight=2), "in_flight: got 2"),
    (lambda: Asynchronous(setup_of([3]), batch_responses=2, max_staleness=1), "train_costs"),
    (lambda: Asynchronous(setup_of([3], train_costs=Line()), batch_responses=2, max_staleness=-1), "max_staleness: got -1"),
    (lambda: run(ppo(setup_of([20, 3], costs=Line(kv_capacity_tokens=20))), steps=1), "kv_capacity_tokens: got 20"),
    (lambda: run(ppo(setup_of([0, 3])), steps=1), "lengths: got 0"),
    (lambda: run(ppo(setup_of([3])), steps=0), "steps: got 0"),
    (lambda: run(ppo(setup_of([3], costs=Line(step_s=math.nan))), steps=1), "decode steps: got nan seconds"),
    (lambda: run(ppo(setup_of([3], costs=Line(policy_token_s=-1.0))), steps=1), "training: got -16"),
])  # fmt: skip
def test_a_wrong_argument_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [lambda s: tppo(s, window=16), lambda s: Synchronous(s, batch_responses=24)])
def test_an_engine_that_admits_what_fits_at_its_longest_never_preempts(make):
    """A cache of 4 longest sequences for 12 slots: whole responses trained are the same, the work takes longer, nothing is redone."""
    room, whole = (setup_of(TwoPoint(short=8, long_share=0.3, cap=40), slots=12, prompt_tokens=4, admission=admission,
                            costs=dataclasses.replace(HAND, kv_capacity_tokens=4 * 44)) for admission in ("room", "whole"))  # fmt: skip
    before, after = (run(make(setup), steps=8).records for setup in (room, whole))
    assert sum(r.preemptions for r in before) > 0
    assert sum(r.preemptions for r in after) == 0
    assert [r.trained for r in before] == [r.trained for r in after]
    assert max(int(n.max()) for r in after for n in [r.active[1]]) <= 4
