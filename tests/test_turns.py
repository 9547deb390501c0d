"""Conversations: what an environment answers is context. It takes room and is read; it is in no mask, no sum, no loss, no count but its own.

The contract is docs/turns.md. Whole steps are held against the oracle (oracle.py), which knows nothing of packing and of the batcher.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from typing import Any

import pytest
import torch
from helpers import END_ID, SMALL_RUN, make_policy, make_prompts, make_trainer, make_value, one_thread  # noqa: F401
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle_stage import make_config, real_stage

from tppo_ref.loop.estimates import estimate_advantages
from tppo_ref.loop.forward import Forward
from tppo_ref.loop.parallel import SingleProcess
from tppo_ref.loop.rows import Rows
from tppo_ref.loop.settings import AdvantageConfig, RolloutConfig
from tppo_ref.loop.value_targets import independent_batch
from tppo_ref.method.records import End, Prompt, Response, WindowSlice
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.batcher import SampleStream, SuccessiveBatcher
from tppo_ref.rollout.decode_load import decode_steps
from tppo_ref.rollout.engine import Decoded
from tppo_ref.rollout.packing import TokenBatch
from tppo_ref.rollout.torch_engine import TorchEngine
from tppo_ref.rollout.turns import num_before, transcript, turns_of
from tppo_ref.runs.config import METHODS

pytestmark = pytest.mark.usefixtures("one_thread")


# ------------------------------------------------------------------------------------------------------------- the record


def response_with(token_ids: list[int], observations: list[tuple[int, tuple[int, ...]]], **fields: Any) -> Response:
    prompt = Prompt(id=3, token_ids=(8, 9), answer="")
    return Response(id=3, prompt=prompt, sample_index=0, token_ids=token_ids, observations=observations,
                    **fields)  # fmt: skip


def test_a_conversation_by_hand():
    response = response_with([1, 2, 3, 4, 5], [(2, (6, 7)), (3, (6,)), (5, (7, 7, 7))])
    assert turns_of(response.token_ids, response.observations) == [[1, 2], (6, 7), [3], (6,), [4, 5], (7, 7, 7), []]
    assert transcript(response) == [1, 2, 6, 7, 3, 6, 4, 5, 7, 7, 7]
    assert len(response) == 5
    assert [num_before(response, column) for column in range(6)] == [2, 3, 6, 8, 9, 13]
    assert response.num_fed == 2 + 11


def test_a_record_is_the_same_after_a_round_trip_through_json():
    response = response_with([1, 2, 3], [(1, (6, 7)), (3, (4,))], end=End.LENGTH_CAP, score=1.0)
    state = json.loads(json.dumps(response.state_dict()))
    assert Response.from_state_dict(state) == response


# --------------------------------------------------------------------------------------------------- what reaches the models


def conversations(rng: torch.Generator, num: int = 5) -> list[Response]:
    """Own tokens and observations at random: some rows without, some that end with one."""
    rows = []
    for i in range(num):
        own = torch.randint(1, 20, (3 + i,), generator=rng).tolist()
        places = sorted(torch.randperm(len(own), generator=rng)[: i % 3].add(1).tolist())
        said = [(place, tuple(torch.randint(1, 20, (1 + place % 3,), generator=rng).tolist())) for place in places]
        rows.append(response_with(own, said))
    assert any(column == len(r) for r in rows for column, _ in r.observations), "no row ends with an observation"
    return rows


@pytest.mark.parametrize("live", [False, True])
def test_models_say_of_own_tokens_what_they_say_of_a_response_that_is_the_whole_conversation(live):
    rows, policy, value = conversations(torch.Generator().manual_seed(3)), make_policy(), make_value()
    edges = [i % (len(r) + 1) for i, r in enumerate(rows)]
    batch = TokenBatch.of(rows, edges if live else None)
    assert batch.num_tokens_fed == sum(len(r.prompt.token_ids) + len(transcript(r)) for r in rows)
    with torch.no_grad():
        logprob_BT, (value_BT, last_value_B) = policy(batch), value(batch)
        for b, row in enumerate(rows):
            alone = TokenBatch([row.prompt.token_ids], [transcript(row)])
            (logprob_T,), ((value_T,), (last_value,)) = policy(alone), value(alone)
            for column in range(edges[b] if live else 0, len(row)):
                place = num_before(row, column) - len(row.prompt.token_ids)
                assert transcript(row)[place] == row.token_ids[column]
                torch.testing.assert_close(logprob_BT[b, column], logprob_T[place], atol=2e-5, rtol=1e-4)
                torch.testing.assert_close(value_BT[b, column], value_T[place], atol=2e-5, rtol=1e-4)
            torch.testing.assert_close(last_value_B[b], last_value, atol=2e-5, rtol=1e-4)
    assert logprob_BT.shape[1] == max(map(len, rows)), "an observation has a column"


def test_the_fewest_tokens_before_an_end_are_own_ones_in_the_engine_and_in_the_policy():
    """With min_response_tokens the end token is impossible at own tokens 0 to n - 1, wherever observations stand."""
    policy = make_policy(min_response_tokens=3)
    row = response_with([5, 6, END_ID], [(1, (7, 7, 7, 7))])
    assert policy(TokenBatch.of([row]))[0, 2] == -math.inf
    row = response_with([5, 6, 7, END_ID], [(1, (7, 7, 7, 7))])
    assert policy(TokenBatch.of([row]))[0, 3] > -math.inf


# ----------------------------------------------------------------------------------------- advantages, returns, masks, lambda

conversation = st.tuples(
    st.integers(1, 9),  # own tokens
    st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(0, 19), min_size=1, max_size=4)), max_size=4, unique_by=lambda o: o[0]
    ),
    st.booleans(),  # ended
    st.integers(0, 4),  # settled
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(conversation, min_size=1, max_size=4), st.sampled_from(["previous", "critic", "zero"]), st.sampled_from([1.0, 0.9]),
       st.sampled_from([None, 0.3]), st.integers(0, 3), st.sampled_from(["exclude", "defer"]))  # fmt: skip
def test_observations_with_any_content_change_no_advantage_return_or_mask_of_own_tokens(drawn, cut_value, gamma, alpha, tail, what):
    """With given values. EGAE, the tail, lambda, the value model's targets: all count the policy's tokens alone."""
    config = AdvantageConfig(gamma=gamma, lam=0.7, lam_alpha=alpha, cut_value=cut_value, tail_tokens=tail, tail=what)
    outcomes = []
    for observed in (True, False):
        rows = []
        for n, said, ended, settled in drawn:
            said = sorted((at, tuple(ids)) for at, ids in said if at <= n) if observed else []
            end, score = (End.END_TOKEN, 1.0) if ended else (End.RUNNING, None)
            rows.append(response_with([1 + t for t in range(n)], said, end=end, score=score, num_settled=min(settled, n),
                                      logprobs=[-0.1] * n, values=[0.2 * t for t in range(n)]))  # fmt: skip
        made = Rows.of([WindowSlice(r, r.num_settled, len(r)) for r in rows], config)
        values = torch.linspace(-1, 1, made.run_BT.numel()).view_as(made.run_BT)
        forward = Forward(values, torch.linspace(0.1, 0.9, len(rows)), torch.zeros_like(values), 0.0, {})
        advantages, metrics = estimate_advantages(made, forward, config, RolloutConfig(window=4), SingleProcess())
        batch = independent_batch([r for r in rows if r.ended], gamma=gamma, device="cpu", dtype=torch.float32)
        outcomes.append([made.run_BT, made.train_BT, made.settled_B, made.new_BT, made.positive_BT, advantages.raw_BT, advantages.scaled_BT,
                         batch.targets_BT, batch.mask_BT, batch.anchor_BT, torch.tensor(list(metrics.values()))])  # fmt: skip
    for with_them, without in zip(*outcomes, strict=True):
        assert torch.equal(torch.nan_to_num(with_them, 7.0), torch.nan_to_num(without, 7.0))


# ------------------------------------------------------------------------------------------------------- the batcher and the cap


class ScriptedEngine:
    """Writes token 5; of response i the turns have the lengths turns[i], each ended by END_ID."""

    def __init__(self, turns: dict[int, list[int]]):
        self.turns, self.running, self.requests = turns, {}, []

    @property
    def num_running(self):
        return len(self.running)

    def submit(self, requests):
        self.requests += requests
        for r in requests:
            self.running[r.response_id] = (r, [])

    def step(self):
        done = []
        for id, (request, tokens) in list(self.running.items()):
            ends = set(itertools.accumulate(self.turns[id]))
            ended = request.num_response_tokens + len(tokens) + 1 in ends
            tokens.append(END_ID if ended else 5)
            if ended or len(tokens) == request.max_new_tokens:
                del self.running[id]
                done.append(Decoded(response_id=id, token_ids=tokens, logprobs=[-1.0] * len(tokens), end_token=ended))
        return done

    def load_weights(self, named_tensors, version):
        pass


def make_batcher(reply, *, slots=1, window=6, cap=20, refill="immediate", limit=3) -> SuccessiveBatcher:
    schedule = SlotSchedule(slots=slots, window=window, max_response_tokens=cap, refill=refill)
    return SuccessiveBatcher(
        schedule, SampleStream(make_prompts(), samples_per_prompt=1, seed=0, limit=limit), run_seed=0, reply=reply
    )


def until_turn(last: int, answer=(7, 8)):
    """An environment that answers each turn before number `last` alike."""
    return lambda prompt, turns: answer if len(turns) // 2 + 1 < last else None


def test_a_conversation_goes_on_in_its_slot_in_the_same_window_by_hand():
    engine, batcher = ScriptedEngine({0: [2, 3, 1], 1: [9, 1, 1], 2: [9, 1, 1]}), make_batcher(until_turn(3))
    one = batcher.window(engine, version=4)
    first, second = (s.response for s in one[:1]), None
    (response,) = first
    assert (response.end, response.token_ids) == (End.END_TOKEN, [5, 0, 5, 5, 0, 0])
    assert response.observations == [(2, (7, 8)), (5, (7, 8))]
    assert transcript(response) == [5, 0, 7, 8, 5, 5, 0, 7, 8, 0]
    assert [(s.response.id, s.begin, s.stop) for s in one] == [(0, 0, 6)], "one slice, whatever the turns"
    assert [(s.begin, s.stop, s.end.name) for s in batcher.segments] == [(0, 2, "RUNNING"), (2, 5, "RUNNING"), (5, 6, "END_TOKEN")]
    assert [(s.begin, s.stop) for s in batcher.slices] == [(0, 2), (2, 5), (5, 6)]
    assert response.window_starts == [0]
    prompt = list(response.prompt.token_ids)
    assert [list(r.token_ids) for r in engine.requests] == [prompt, [*prompt, 5, 0, 7, 8], [*prompt, 5, 0, 7, 8, 5, 5, 0, 7, 8]]
    assert [r.seed - engine.requests[0].seed for r in engine.requests] == [0, 2, 5], "the draw of a token depends on own tokens"
    assert [r.num_response_tokens for r in engine.requests] == [0, 2, 5]
    assert batcher.num_generated_tokens == 6
    load = decode_steps(batcher.segments, batcher.slices, batcher.step_ends_s)
    n = len(prompt)
    assert [s.prefill_tokens for s in load] == [n - 1, 0, n + 3, 0, 0, n + 8]
    assert [s.context_tokens for s in load] == [n, n + 1, n + 4, n + 5, n + 6, n + 9]
    second = batcher.window(engine)
    assert [(s.response.id, s.begin, s.stop, s.response.end.name) for s in second] == [(1, 0, 6, "RUNNING")]


def test_a_turn_that_ends_with_the_window_is_answered_at_once_and_the_row_is_cut_behind_the_answer():
    engine, batcher = ScriptedEngine({0: [6, 2]}), make_batcher(until_turn(2), limit=1)
    (cut,) = batcher.window(engine)
    assert (cut.response.end, cut.response.observations, cut.stop) == (End.RUNNING, [(6, (7, 8))], 6)
    restored = make_batcher(until_turn(2), limit=1)
    restored.load_state_dict([json.loads(json.dumps(batcher.state_dict()))])
    assert restored.in_flight == batcher.in_flight
    (rest,) = restored.window(engine)
    assert (rest.begin, rest.stop, rest.response.end) == (6, 8, End.END_TOKEN)
    assert list(engine.requests[-1].token_ids) == [*cut.response.prompt.token_ids, 5, 5, 5, 5, 5, 0, 7, 8]
    assert rest.response.window_starts == [0, 6]


@pytest.mark.parametrize(("cap", "end", "own", "observed"), [
    (9, End.LENGTH_CAP, 6, 2),  # 3 + 2 + 3, and a second answer of 2 would fill the cap
    (10, End.LENGTH_CAP, 6, 2),  # it would leave room for nothing after it
    (11, End.LENGTH_CAP, 7, 4),  # one token after it
    (13, End.END_TOKEN, 9, 4),
])  # fmt: skip
def test_observations_count_towards_the_cap_and_one_that_leaves_no_room_for_a_token_is_not_said(cap, end, own, observed):
    ended = []
    batcher = make_batcher(until_turn(3), window=50, cap=cap, limit=1)
    batcher.window(ScriptedEngine({0: [3, 3, 3]}), on_end=ended.append)
    (response,) = ended
    assert (response.end, len(response), len(transcript(response)) - len(response)) == (end, own, observed)
    assert len(transcript(response)) <= cap


def test_an_end_token_as_the_last_that_is_allowed_is_still_an_end_where_the_environment_says_so():
    ended = []
    make_batcher(until_turn(1), window=50, cap=3, limit=1).window(ScriptedEngine({0: [3]}), on_end=ended.append)
    assert [r.end for r in ended] == [End.END_TOKEN]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data(), st.integers(1, 3), st.integers(1, 9), st.integers(2, 24), st.sampled_from(["immediate", "step", "batch"]))
def test_conservation_over_any_turns_answers_windows_and_restarts(data, slots, window, cap, refill):
    """Every sampled token is in one slice; every response is one conversation within the cap; a cut changes nothing."""
    num = 6
    turns = {i: [*data.draw(st.lists(st.integers(1, 7), min_size=1, max_size=4)), 99] for i in range(num)}
    lengths = data.draw(st.lists(st.integers(1, 3), min_size=4, max_size=4))
    asked: Counter[int] = Counter()

    def reply(prompt, so_far):
        asked[prompt.id] += 1
        number = len(so_far) // 2
        return tuple(range(9, 9 + lengths[number])) if number < 3 else None

    def play(restart: bool, window: int, refill: str):
        batcher, engine = make_batcher(reply, slots=slots, window=window, cap=cap, refill=refill, limit=num), ScriptedEngine(turns)
        seen, columns, sampled, observed = {}, Counter(), 0, 0
        for _ in range(200):
            slices = batcher.window(engine)
            assert len({s.response.id for s in slices}) == len(slices), "two slices of a response"
            for s in slices:
                assert s.begin == columns[s.response.id] < s.stop
                columns[s.response.id] = s.stop
                seen[s.response.id] = s.response
                assert len(transcript(s.response)) <= cap
                assert s.response.window_starts[-1] == s.begin
                observed += sum(len(ids) for column, ids in s.response.observations if s.begin < column <= s.stop)
            sampled += sum(s.stop - s.begin for s in slices)
            assert batcher.num_generated_tokens == sampled
            assert sum(s.stop - s.begin for s in batcher.slices) == sum(s.stop - s.begin for s in slices)
            for slot in range(slots):
                stays = sorted((s.begin, s.stop) for s in batcher.segments if s.slot == slot)
                assert all(a[1] <= b[0] for a, b in itertools.pairwise(stays))
            if restart:
                state, batcher = (
                    batcher.state_dict(),
                    make_batcher(reply, slots=slots, window=window, cap=cap, refill=refill, limit=num),
                )
                batcher.load_state_dict([json.loads(json.dumps(state))])
            if not batcher.in_flight and batcher.stream.next >= num:
                break
        assert sorted(seen) == list(range(num))
        assert sampled == sum(map(len, seen.values()))
        assert observed == sum(len(transcript(r)) - len(r) for r in seen.values())
        return {i: (r.token_ids, r.observations, r.end) for i, r in seen.items()}

    whole = play(False, 1000, "immediate")
    assert play(False, window, refill) == whole
    assert play(True, window, refill) == whole


def test_responses_dealt_anew_to_other_ranks_bring_what_they_were_answered_and_the_rest_of_their_budget():
    engine, batcher = ScriptedEngine({0: [4, 9], 1: [4, 9]}), make_batcher(until_turn(3), slots=2, window=6, cap=12, limit=2)
    batcher.window(engine)
    states = [json.loads(json.dumps(batcher.state_dict()))]
    for rank in range(2):
        schedule = SlotSchedule(slots=1, window=6, max_response_tokens=12)
        own = SuccessiveBatcher(schedule, SampleStream(make_prompts(), samples_per_prompt=1, seed=0, limit=2, rank=rank, world=2),
                                run_seed=0, reply=until_turn(3))  # fmt: skip
        own.load_state_dict(states)
        (response,) = own.in_flight.values()
        assert response.observations == [(4, (7, 8))]
        (rest,) = own.window(ScriptedEngine({0: [4, 9], 1: [4, 9]}))
        assert (len(transcript(rest.response)), rest.response.end) == (12, End.LENGTH_CAP)


# --------------------------------------------------------------------------------------------------- the engine, token for token


def answer_of(prompt: Prompt, turns) -> tuple[int, ...] | None:
    """An environment of the tiny model's tokens: it answers in two turns of three, with one to three tokens that depend on all."""
    number = sum((i + 1) * token for i, turn in enumerate(turns) for token in turn) + prompt.id
    return tuple(1 + (number + k) % 6 for k in range(1 + number % 3)) if number % 3 and len(turns) < 8 else None


def talk(window: int, slots: int, *, reply=answer_of, num=12) -> dict[int, Response]:
    policy = make_policy()
    engine = TorchEngine(policy, slots=slots, max_context_tokens=34, end_token_ids=(END_ID, 3, 5))
    batcher = make_batcher(reply, slots=slots, window=window, cap=30, limit=num)
    seen: dict[int, Response] = {}
    while len(seen) < num:
        batcher.window(engine, on_end=lambda r: seen.setdefault(r.id, r))
        engine.load_weights(None, 1)
    return seen


def test_torch_engine_says_after_an_observation_what_the_models_own_forward_says_and_a_window_changes_nothing():
    whole, cut = talk(1000, 12), talk(4, 3)
    assert sum(bool(r.observations) for r in whole.values()) > 3
    for id, response in whole.items():
        assert (cut[id].token_ids, cut[id].observations, cut[id].end) == (response.token_ids, response.observations, response.end)
    policy = make_policy()
    with torch.no_grad():
        logprob_BT = policy(TokenBatch.of(list(whole.values())))
    for row, response in zip(logprob_BT, whole.values(), strict=True):
        torch.testing.assert_close(row[: len(response)], torch.tensor(response.logprobs), atol=1e-5, rtol=1e-5)


def test_an_environment_that_never_answers_changes_nothing_bit_for_bit():
    def run(reply):
        trainer = make_trainer()
        trainer.batcher.reply = reply
        metrics = [trainer.step() for _ in range(3)]
        weights = [
            p.detach().clone() for p in (*trainer.policy_learner.module.parameters(), *trainer.value_learner.module.parameters())
        ]
        return [
            {k: x for k, x in m.items() if not k.startswith(("time/", "mfu/", "rollout/idle", "rollout/tokens_per"))}
            for m in metrics
        ], weights

    (mine, my_weights), (plain, plain_weights) = run(lambda prompt, turns: None), run(None)
    assert str(mine) == str(plain)
    assert all(torch.equal(p, q) for p, q in zip(my_weights, plain_weights, strict=True))
    assert plain[-1]["ledger/observed"] == 0


# ------------------------------------------------------------------------------------------------- whole steps, on the oracle

SMALL: dict[str, Any] = {
    "rollout.slots": 4, "rollout.window": 5, "rollout.max_response_tokens": 16, "advantage.tail_tokens": 1, "policy.lr": 0.02,
    "policy.mini_batch_tokens": 0, "policy.mini_batches": 2, "value.lr": 0.02, "value.mini_batch_tokens": 0, "value.mini_batches": 2,
    "policy.engine_gap_limit": 1.0,
}  # fmt: skip


def plays(changes: dict[str, Any], method: str = "tppo"):
    """Three steps on Trainer and oracle, which are compared after each; there must have been conversations, some of them cut."""
    outcome = real_stage(make_config(SMALL | changes, method), reply=answer_of).play()
    assert outcome.metrics[-1]["ledger/observed"] > 0
    return outcome


@pytest.mark.parametrize("method", METHODS)
def test_a_named_methods_steps_over_conversations_are_the_oracles(method):
    plays({}, method)


@pytest.mark.parametrize("changes", [
    {"advantage.tail": "defer", "advantage.tail_tokens": 3, "policy.importance": "truncated"},
    {"advantage.gamma": 0.9, "advantage.lam": 0.5, "advantage.lam_alpha": 0.3, "advantage.cut_value": "critic"},
    {"policy.prefix": "constant", "policy.keep_prefix": True, "policy.epochs": 2, "value.update": "joint"},
    {"policy.ewma_decay": 0.5, "value.batch_responses": 2, "policy.micro_batch_tokens": 20, "value.micro_batch_tokens": 20},
    {"policy.old_logprobs": "engine", "policy.min_new_tokens": 6, "value.warmup_steps": 1},
    {"rollout.refill": "step", "policy.train_on": "ended", "value.epochs": 2},
])  # fmt: skip
def test_steps_over_conversations_are_the_oracles_under_many_settings(changes):
    plays(changes)


def test_an_observation_is_read_and_differentiated_through_but_never_predicted():
    """The gradient of a sum over own tokens is that of the same tokens of a response that the policy wrote whole."""
    row = response_with([5, 6, 7], [(2, (11, 12))])
    mine, whole = make_policy(), make_policy()
    mine(TokenBatch.of([row])).sum().backward()
    whole(TokenBatch([row.prompt.token_ids], [transcript(row)]))[0, [0, 1, 4]].sum().backward()
    for p, q in zip(mine.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-4)
    assert mine.hf.get_input_embeddings().weight.grad[11].abs().sum() > 0
