"""One vLLM engine for the life of this process, and every check that needs one. Prints a JSON object of findings.

python vllm_worker.py FOLDER tied|untied
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import types

import hypothesis
import torch
from hypothesis import strategies as st

import scale.vllm_engine as vllm_engine
from scale.config import ScaleConfig
from scale.distributed import start
from scale.run import probe as start_up_probe
from scale.vllm_engine import VLLMEngine
from scale.vllm_options import option_names
from tppo_ref.method.errors import UserError
from tppo_ref.method.records import Prompt
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.batcher import SampleStream, SuccessiveBatcher
from tppo_ref.rollout.engine import Decoded, Request
from tppo_ref.rollout.models import load_policy
from tppo_ref.rollout.packing import TokenBatch

SLOTS, CONTEXT, END, VOCAB, BLOCK = 6, 200, 1, 64, 32
found: dict = {}


class FakeEngine:
    """Ends response r when it has lengths[r] tokens; a second oracle for the schedule: it knows nothing but lengths."""

    def __init__(self, lengths):
        self.lengths, self.running = lengths, {}

    @property
    def num_running(self):
        return len(self.running)

    def submit(self, requests):
        for r in requests:
            self.running[r.response_id] = [r, 0]

    def step(self):
        done = []
        for id, entry in list(self.running.items()):
            entry[1] += 1
            request, new = entry
            ends = self.lengths.get(id) == request.num_response_tokens + new
            if ends or new == request.max_new_tokens:
                del self.running[id]
                done.append(Decoded(response_id=id, token_ids=[0] * new, logprobs=[0.0] * new, end_token=ends))
        return done


def raises(kind, call, *words):
    """True where `call` raises `kind` and says `words`; else what happened instead."""
    try:
        call()
    except kind as error:
        return True if all(w in str(error) for w in words) else f"says: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def drain(engine):
    decoded = []
    while engine.num_running:
        decoded += engine.step()
    return {d.response_id: d for d in decoded}


def perturb(policy, seed, scale=0.03):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * scale)


def prompts_of(num, lengths=(50, 61, 70, 45), base=0):
    generator = torch.Generator().manual_seed(7 + base)
    return [Prompt(id=i, token_ids=tuple(torch.randint(2, VOCAB, (lengths[i % len(lengths)],), generator=generator).tolist()), answer="")
            for i in range(num)]  # fmt: skip


def batcher_of(schedule, seed=0, num=200):
    return SuccessiveBatcher(schedule, SampleStream(prompts_of(num), samples_per_prompt=1, seed=seed), run_seed=seed)


def gaps_of(policy, slices):
    """|engine - policy| for each token of the slices, computed anew from whole sequences."""
    with torch.no_grad():
        logprob_BT = policy(TokenBatch.of([s.response for s in slices]))
    return [abs(float(logprob_BT[row, t]) - s.response.logprobs[t]) for row, s in enumerate(slices) for t in range(s.begin, s.stop)]


def main(folder, tied):
    world = start(device="cpu")
    options = {} if tied else {"temperature": 0.8, "min_response_tokens": 9}
    # Few prompts fit into one of vLLM's steps, so that the requests of one submit lag behind each other; in the second process
    # few blocks of cache, so that vLLM preempts some and computes them anew.
    cache = {"max_num_seqs": SLOTS - 1} if tied else {"num_gpu_blocks_override": 14}
    engine = VLLMEngine(folder, world=world, slots=SLOTS, max_context_tokens=CONTEXT, end_token_ids=(END,),
                        options={"max_num_batched_tokens": CONTEXT + 1, **cache}, **options)  # fmt: skip
    from vllm.engine.arg_utils import EngineArgs  # not before the engine has set vLLM's environment

    found["options read from the source"] = option_names() == {f.name for f in dataclasses.fields(EngineArgs)}
    found["head dtype"] = str(engine._engine.model_config.head_dtype)
    found["further options"] = engine._engine.vllm_config.scheduler_config.max_num_seqs
    policy = load_policy(folder, end_token_ids=(END,), **options)
    request = Request(response_id=0, token_ids=[3] * 40, max_new_tokens=4, seed=1)
    found["submit before load"] = raises(RuntimeError, lambda: engine.submit([request]), "load_weights")
    found["keep nothing"] = raises(RuntimeError, lambda: engine.load_weights(None, 0))

    # Parity at start and after each of five syncs, by the probe and by windows that go on across the syncs.
    prompts = [list(p.token_ids) for p in prompts_of(SLOTS, base=1)]
    engine.load_weights(policy.named_tensors(), 0)
    batcher = batcher_of(SlotSchedule(slots=SLOTS, window=16, max_response_tokens=60))
    found["probe"], found["windows"] = [], []
    continued = 0
    for version in range(6):
        if version:
            perturb(policy, version)
            engine.load_weights(policy.named_tensors(), version)
        found["probe"].append(engine.probe(policy, prompts, new_tokens=12, seed=version).max)
        slices = batcher.window(engine, version=version)
        continued += sum(s.begin > 0 for s in slices)
        gaps = gaps_of(policy, slices)
        found["windows"].append(max(gaps))
        found["version"] = engine.version
    found["continued"] = continued
    found["min_response_tokens kept"] = all(len(s.response) >= 9 for s in batcher.slices if s.response.end.name == "END_TOKEN")

    # Negative controls. Each mistake is planted alone, seen, and taken back.
    task = types.SimpleNamespace(prompts=lambda split: [Prompt(id=i, token_ids=tuple(p), answer="") for i, p in enumerate(prompts)])
    config = ScaleConfig()

    def planted(name):
        found[name] = engine.probe(policy, prompts, new_tokens=12).mean
        found[name + " refused"] = raises(UserError, lambda: start_up_probe(engine, policy, task, config), "probe_mean", "allowed")

    real = engine._llm.reset_prefix_cache
    engine.probe(policy, prompts, new_tokens=1)  # the prompts are cached now
    perturb(policy, 100)
    engine._llm.reset_prefix_cache = lambda: True
    engine.load_weights(policy.named_tensors(), 6)
    planted("no reset")
    engine._llm.reset_prefix_cache = real
    engine.load_weights(None, 6)  # the same weights, and the cache dropped: that alone heals it
    found["healed by reset"] = engine.probe(policy, prompts, new_tokens=12).max

    receive = vllm_engine._receive

    def without_repack(worker, tensors):
        arrived = vllm_engine.Checksum()
        worker.reload_weights(weights_iterator=arrived.over(tensors))
        return arrived.totals

    perturb(policy, 101)
    if tied:  # the packed copy of the shared matrix; of a head of its own vLLM renews the copy itself
        vllm_engine._receive = without_repack
        engine.load_weights(policy.named_tensors(), 7)
    else:
        engine.load_weights(((n, t) for n, t in policy.named_tensors() if n != "lm_head.weight"), 7)
    planted("stale head")
    vllm_engine._receive = receive
    engine.load_weights(policy.named_tensors(), 8)
    found["healed by repack"] = engine.probe(policy, prompts, new_tokens=12).max

    # Conversations: the first three end tokens of a response are answered, and it goes on in its window and in later ones.
    talking = batcher_of(SlotSchedule(slots=SLOTS, window=24, max_response_tokens=100))
    talking.reply = lambda prompt, turns: (5, 6, 7) if len(turns) < 6 else None
    slices = [s for _ in range(6) for s in talking.window(engine, version=8)]
    found["conversations"] = max(gaps_of(policy, slices))
    found["observations"] = sum(len(r.observations) for r in {s.response.id: s.response for s in slices}.values())
    found["good refused"] = raises(UserError, lambda: start_up_probe(engine, policy, task, config))

    def short(worker, tensors):
        return receive(worker, itertools.islice(tensors, 3))

    vllm_engine._receive = short
    found["tensors lost on the way"] = raises(RuntimeError, lambda: engine.load_weights(policy.named_tensors(), 9), "weight sync")
    vllm_engine._receive = receive
    engine.load_weights(policy.named_tensors(), 9)

    # Errors, and that they leave nothing behind.
    good = [Request(response_id=i, token_ids=[5 + i] * 50, max_new_tokens=6, seed=i) for i in range(4)]
    long = Request(response_id=9, token_ids=[3] * 190, max_new_tokens=11, seed=1)
    found["too long"] = raises(ValueError, lambda: engine.submit([long]), "9", "201", "200")
    found["too long among others"] = raises(ValueError, lambda: engine.submit([*good, long]))
    found["left by it"] = engine.num_running
    drain(engine)
    engine.submit([Request(response_id=9, token_ids=[3] * 190, max_new_tokens=10, seed=1)])
    found["longest"] = len(drain(engine)[9].token_ids)
    engine.submit(good)
    engine.step()
    found["load while running"] = raises(RuntimeError, lambda: engine.load_weights(policy.named_tensors(), 10), "4 requests")
    found["load None while running"] = raises(RuntimeError, lambda: engine.load_weights(None, 10))
    first = drain(engine)
    found["version after errors"] = engine.version

    # Same seeds, same tokens: in another order, among others, in two pieces.
    others = [Request(response_id=20 + i, token_ids=[9] * (30 + i), max_new_tokens=10, seed=77 + i) for i in range(2)]
    engine.submit([good[3], others[0]])
    engine.step()
    engine.submit([good[1], others[1], good[0], good[2]])
    second = drain(engine)
    found["same tokens"] = all(first[i].token_ids == second[i].token_ids for i in range(4))
    found["other seeds differ"] = first[0].token_ids != drain_one(engine, good[0], seed=5)

    # The schedule depends on lengths alone. Lags are real: vLLM steps oftener than the logical clock.
    counted = {"advances": 0, "steps": 0, "refills": 0, "examples": 0}
    advance = engine._advance

    def counting():
        counted["advances"] += 1
        advance()

    engine._advance = counting
    problems: list[str] = []

    @hypothesis.settings(
        max_examples=15, deadline=None, database=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.example(slots=SLOTS, window=20, cap=7, refill="immediate", seed=0)
    @hypothesis.example(slots=SLOTS, window=16, cap=60, refill="step", seed=1)
    @hypothesis.given(slots=st.integers(1, SLOTS), window=st.integers(1, 24), cap=st.integers(1, 60), refill=st.sampled_from(["immediate", "step"]),
                      seed=st.integers(0, 99))  # fmt: skip
    def schedules(slots, window, cap, refill, seed):
        counted["examples"] += 1
        engine.load_weights(None, 10)  # cached prompts would be prefilled at once, and nothing would lag
        shape = dict(slots=slots, window=window, max_response_tokens=cap, refill=refill)
        real = batcher_of(SlotSchedule(**shape), seed)
        seen, lengths = [], {}
        for _ in range(3):
            slices = real.window(engine)
            seen.append(sorted(real.segments))
            counted["steps"] += real.num_steps
            counted["refills"] += sum(s.begin > 0 for s in real.segments)
            lengths |= {s.response.id: len(s.response) for s in slices if s.response.end.name == "END_TOKEN"}
            if (
                real.num_steps > window
                or any(s.stop - s.begin > window or len(s.response) > cap for s in slices)
                or engine.num_running
            ):
                problems.append(f"budget exceeded: {shape}, seed {seed}")
            if any(len(r.logprobs) != len(r) or END in r.token_ids[:-1] for r in (s.response for s in slices)):
                problems.append(f"tokens behind an end, or without a log-probability: {shape}, seed {seed}")
        fake = batcher_of(SlotSchedule(**shape), seed)
        oracle = FakeEngine(lengths)
        for window_segments in seen:
            fake.window(oracle)
            if sorted(fake.segments) != window_segments:
                problems.append(f"schedule differs from lengths alone: {shape}, seed {seed}")
                break

    schedules()
    found["schedules"] = problems
    found["counted"] = counted


def drain_one(engine, request, seed):
    engine.submit([Request(response_id=0, token_ids=request.token_ids, max_new_tokens=request.max_new_tokens, seed=seed)])
    return drain(engine)[0].token_ids


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "tied")
    print("FOUND " + json.dumps(found), flush=True)
    import os

    os._exit(0)
