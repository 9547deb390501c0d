"""When the engine sleeps and wakes, what the sync's checksum sees, and what `check` refuses: without a launch, and without vLLM.

`FakeLLM` stands where vllm.LLM stands. It decodes by given lengths, and is stricter than a GPU: whoever reads or writes memory that
sleeps fails at once.
"""

from __future__ import annotations

import itertools
import json
import sys
import types
import weakref

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scale_helpers import TINY_CONFIG, require

from scale import build, launch
from scale.config import ScaleConfig, check
from scale.distributed import World
from scale.memory import budget as memory
from scale.run import probe_through_sleep
from scale.vllm_engine import Checksum, Gap, VLLMEngine, _bits
from scale.watch import GapLimit
from tppo_ref.loop.trainer import Trainer
from tppo_ref.method.errors import UserError
from tppo_ref.method.records import Prompt, Response
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.batcher import SampleStream, SuccessiveBatcher
from tppo_ref.rollout.engine import Request
from tppo_ref.rollout.models import load_policy, load_value_model
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import replace_fields

END, WINDOW = 256, 12


# ----------------------------------------------------------------------------------------------------------- vLLM, played


class FakeLLM:
    """vllm.LLM and its llm_engine in one. `events` says what was asked of it, in order.

    lengths   tokens of each response, the end token included; all others go on to their budget
    """

    def __init__(self, lengths):
        self.lengths, self.events, self.awake, self.requests = lengths, [], {"weights", "kv_cache"}, {}
        self.llm_engine, self.model_config = self, types.SimpleNamespace(dtype=torch.float32)

    def needs(self, *memory):
        assert self.awake >= set(memory), f"{memory} used while only {self.awake} is awake: {self.events}"

    def add_request(self, request_id, prompt, sampling):
        self.needs("weights", "kv_cache")
        self.events.append("add")
        self.requests[request_id] = (sampling.max_tokens, [])

    def has_unfinished_requests(self):
        return bool(self.requests)

    def step(self):
        self.needs("weights", "kv_cache")
        self.events.append("decode")
        outputs = []
        for id, (budget, tokens) in list(self.requests.items()):
            ends = len(tokens) + 1 == self.lengths.get(int(id))
            tokens.append(END if ends else 3)
            finished = ends or len(tokens) == budget
            if finished:
                del self.requests[id]
            completion = types.SimpleNamespace(token_ids=tokens[-1:], logprobs=[{tokens[-1]: types.SimpleNamespace(logprob=-1.0)}],
                                               finish_reason="stop" if ends else "length" if finished else None)  # fmt: skip
            outputs.append(types.SimpleNamespace(request_id=id, finished=finished, outputs=[completion]))
        return outputs

    def sleep(self, level):
        assert not self.requests, "put to sleep while requests run"
        self.events.append(f"sleep {level}")
        self.awake = set()

    def wake_up(self, tags=None):
        self.events.append(f"wake {' '.join(tags) if tags else 'all'}")
        self.awake |= set(tags or ("weights", "kv_cache"))

    def collective_rpc(self, function, args):
        worker = types.SimpleNamespace(reload_weights=self._reload, model_runner=types.SimpleNamespace(model=object()))
        return [function(worker, *args)]

    def _reload(self, weights_iterator):
        self.needs("weights")
        for _ in weights_iterator:
            pass
        self.events.append("reload")

    def reset_prefix_cache(self):
        self.needs("kv_cache")
        self.events.append("reset")
        return True


@pytest.fixture
def engine_of(monkeypatch):
    """(sleep level, slots, lengths, device) -> VLLMEngine, with weights, on a FakeLLM whose events begin here."""
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL"):  # the engine sets them: put back what was there
        monkeypatch.setenv(name, "ERROR")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    parameters = types.SimpleNamespace(RequestOutputKind=types.SimpleNamespace(DELTA="delta"))

    def make(sleep_level=2, slots=1, lengths=(), device="cuda:0"):
        llm = FakeLLM(dict(lengths))
        fake = types.SimpleNamespace(LLM=lambda **options: llm, SamplingParams=types.SimpleNamespace, sampling_params=parameters)
        monkeypatch.setitem(sys.modules, "vllm", fake)
        monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)
        engine = VLLMEngine("nowhere", world=World(device=device), slots=slots, max_context_tokens=64, end_token_ids=(END,),
                            sleep_level=sleep_level)  # fmt: skip
        engine.load_weights(WEIGHTS, 0)
        llm.events.clear()
        return engine, llm

    return make


WEIGHTS = {"a.weight": torch.arange(12.0).reshape(3, 4), "b.weight": torch.ones(5)}
REQUEST = Request(response_id=1, token_ids=[5, 6], max_new_tokens=4, seed=1)


def batcher_of(slots, cap=40):
    prompts = [Prompt(id=i, token_ids=(5, 6 + i % 20), answer="") for i in range(100)]
    schedule = SlotSchedule(slots=slots, window=WINDOW, max_response_tokens=cap)
    return SuccessiveBatcher(schedule, SampleStream(prompts, samples_per_prompt=1, seed=0), run_seed=0)


# ------------------------------------------------------------------------------------------------------------ sleep and wake


def test_an_engine_whose_one_slot_is_refilled_in_mid_window_does_not_sleep_in_between(engine_of):
    engine, llm = engine_of(lengths={0: 3, 1: 2, 2: 4})
    batcher = batcher_of(1)
    batcher.window(engine)
    assert [s.stop - s.begin for s in batcher.segments] == [3, 2, 4, 3]
    assert llm.events.count("add") == 4
    assert set(llm.events) == {"add", "decode"}
    engine.sleep()
    assert llm.events[-1] == "sleep 2"


def test_resting_twice_is_resting_once(engine_of):
    engine, llm = engine_of()
    engine.sleep()
    engine.sleep()
    assert llm.events == ["sleep 2"]


def test_an_engine_at_rest_takes_no_requests_and_has_no_weights_to_keep(engine_of):
    engine, llm = engine_of()
    engine.sleep()
    with pytest.raises(RuntimeError, match="load_weights before submit"):
        engine.submit([REQUEST])
    with pytest.raises(RuntimeError, match="no weights to keep"):
        engine.load_weights(None, 1)
    assert llm.events == ["sleep 2"]
    assert (engine.num_running, engine.version) == (0, 0)


def test_new_weights_wake_it_first_their_memory_then_the_caches(engine_of):
    engine, llm = engine_of()
    engine.sleep()
    engine.load_weights(WEIGHTS, 1)
    assert llm.events == ["sleep 2", "wake weights", "reload", "wake kv_cache", "reset"]
    assert engine.version == 1
    engine.submit([REQUEST])
    decoded = list(itertools.chain.from_iterable(engine.step() for _ in range(4)))
    assert [d.token_ids for d in decoded] == [[3] * 4]


@pytest.mark.parametrize(("level", "weights", "woken"), [
    (2, WEIGHTS, ["empty", "wake weights", "reload", "empty", "wake kv_cache", "reset"]),
    (1, WEIGHTS, ["empty", "wake weights", "reload", "empty", "wake kv_cache", "reset"]),
    (1, None, ["empty", "wake all", "reset"]),
])  # fmt: skip
def test_torch_gives_its_cached_memory_back_before_each_wake(engine_of, monkeypatch, level, weights, woken):
    """After garbage is collected: what a cycle still holds, the allocator cannot give."""
    engine, llm = engine_of(sleep_level=level)
    engine.sleep()
    llm.events.clear()
    cycle = [torch.empty(1)]
    cycle.append(cycle)
    dead = weakref.ref(cycle[0])
    del cycle
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: llm.events.append("empty" if dead() is None else "too early"))
    engine.load_weights(weights, 1)
    assert llm.events == woken


def test_an_engine_that_is_awake_or_on_a_cpu_leaves_torchs_memory_alone(engine_of, monkeypatch):
    on_gpu, llm = engine_of(sleep_level=0)
    on_cpu, other = engine_of(device="cpu")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: pytest.fail("nothing wakes"))
    for engine in (on_gpu, on_cpu):
        engine.sleep()
        engine.load_weights(WEIGHTS, 1)
    assert llm.events == other.events == ["reload", "reset"]


def test_weights_that_slept_on_the_host_may_be_kept(engine_of):
    engine, llm = engine_of(sleep_level=1)
    engine.sleep()
    engine.load_weights(None, 1)
    assert llm.events == ["sleep 1", "wake all", "reset"]
    engine.submit([REQUEST])


def test_sleep_level_0_stays_awake(engine_of):
    engine, llm = engine_of(sleep_level=0)
    engine.sleep()
    engine.submit([REQUEST])
    assert llm.events == ["add"]


class ParityScorer:
    def __init__(self):
        self.ended = []

    def submit(self, response):
        self.ended.append(response)

    def collect(self):
        scores = {r.id: (1.0 if len(r) % 2 else -1.0, "ok") for r in self.ended}
        self.ended = []
        return scores


def test_a_training_step_lets_the_engine_rest_once_between_its_window_and_its_forward_passes(engine_of, model, monkeypatch):
    engine, llm = engine_of(slots=2, lengths={0: 3, 1: 5, 2: 1, 3: 20, 4: 2, 5: 6})
    policy, value = load_policy(str(model)), load_value_model(str(model))
    for name, module in (("policy", policy), ("value", value)):
        module.register_forward_pre_hook(lambda *_, name=name: llm.events.append(f"{name} forward"))
    sleep = engine.sleep
    monkeypatch.setattr(engine, "sleep", lambda: (llm.events.append("told to sleep"), sleep()))
    config = replace_fields(Config(), {
        "rollout.slots": 2, "rollout.window": WINDOW, "rollout.max_response_tokens": 40, "advantage.tail_tokens": 2,
        "policy.mini_batches": 1, "policy.mini_batch_tokens": 0, "value.mini_batches": 1, "value.mini_batch_tokens": 0,
    })  # fmt: skip
    trainer = Trainer(config, policy=policy, value=value, engine=engine, batcher=batcher_of(2), scorer=ParityScorer())
    for step in (1, 2):
        llm.events.clear()
        metrics = trainer.step()
        phases = [name for name, _ in itertools.groupby(e.replace("add", "decode") for e in llm.events)]
        assert phases[:3] == ["decode", "told to sleep", "sleep 2"], llm.events
        forward, sync = phases[3:-4], phases[-4:]
        assert set(forward) == {"policy forward", "value forward"}
        assert sync == ["wake weights", "reload", "wake kv_cache", "reset"]
        assert llm.events.count("told to sleep") == 1
        assert metrics["policy/updates"] == 1
        assert engine.version == step


# -------------------------------------------------------------------------------------------------------- the sync's checksum

DTYPES = {torch.float32: 4, torch.bfloat16: 2, torch.uint8: 1, torch.float64: 8}
NAMES = st.builds(
    "model.layers.{}.{}.weight".format, st.integers(0, 63), st.sampled_from(["mlp.up_proj", "self_attn.q_proj", "norm"])
)


def checksum(*pairs):
    passed = Checksum()
    for _ in passed.over(pairs):
        pass
    return passed.totals


def tensor_of(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).clone().view(dtype)


@st.composite
def tensors(draw, least=1):
    """A tensor of any bits, NaNs and both zeros among them, and any number of bytes."""
    dtype = draw(st.sampled_from(list(DTYPES)))
    num = draw(st.integers(least, 40))
    return tensor_of(draw(st.binary(min_size=num * DTYPES[dtype], max_size=num * DTYPES[dtype])), dtype)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return bytes(
        torch.cat([tensor.reshape(-1)] * 2).view(torch.uint8)[: tensor.nbytes].tolist()
    )  # of one element any stride is whole


@given(tensor=tensors(), offset=st.integers(1, 9), stride=st.integers(2, 3), name=NAMES)
@settings(deadline=None)
def test_a_tensor_has_one_checksum_wherever_it_lies(tensor, offset, stride, name):
    """A slice that begins anywhere in its memory, every second or third element of a larger one, and a column of a matrix."""
    memory = torch.zeros(offset + len(tensor), dtype=tensor.dtype)
    memory[offset:] = tensor
    spread = torch.zeros(len(tensor) * stride, dtype=tensor.dtype)
    spread[::stride] = tensor
    column = torch.stack([torch.zeros_like(tensor), tensor]).t().contiguous()[:, 1]
    others = [memory[offset:], spread[::stride], column, column.reshape(1, -1)]
    assert [bytes_of(other) for other in others] == [bytes_of(tensor)] * 4
    assert {checksum((name, other)) for other in others} == {checksum((name, tensor))}


@given(rows=st.integers(1, 6), columns=st.integers(1, 6), dtype=st.sampled_from(list(DTYPES)), seed=st.integers(0, 99), name=NAMES)
@settings(deadline=None)
def test_a_transposed_view_has_the_checksum_of_its_contiguous_copy(rows, columns, dtype, seed, name):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randint(0, 256, (rows, columns * DTYPES[dtype]), dtype=torch.uint8, generator=generator).view(dtype)
    view = matrix.t()
    assert checksum((name, view)) == checksum((name, view.contiguous()))


def test_memory_that_begins_at_an_odd_address_has_the_checksum_of_its_copy():
    for num_bytes in (1, 7, 8, 9, 33):
        tensor = torch.frombuffer(bytearray(range(64)), dtype=torch.uint8, offset=3, count=num_bytes)
        assert tensor.data_ptr() % 2
        assert _bits(tensor) == _bits(tensor.clone())


@given(tensor=tensors(), bit=st.integers(0, 10**6) | st.integers(0, 40).map(lambda word: 64 * word + 63), name=NAMES)
@settings(deadline=None, max_examples=300)
def test_one_flipped_bit_changes_the_checksum(tensor, bit, name):
    raw = tensor.view(torch.uint8).clone()
    byte, place = divmod(bit % (8 * len(raw)), 8)
    raw[byte] ^= 1 << place
    assert checksum((name, raw.view(tensor.dtype))) != checksum((name, tensor))


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"])
def test_each_sign_counts_under_the_names_of_a_real_model(name):
    """The sign of every second float32 is the highest bit of a 64-bit word: what is lost first when words are multiplied."""
    tensor = torch.randn(64, generator=torch.Generator().manual_seed(0))
    unseen = []
    for i in range(len(tensor)):
        flipped = tensor.clone()
        flipped[i] *= -1
        unseen += [i] if checksum((name, flipped)) == checksum((name, tensor)) else []
    assert unseen == []


@given(
    seed=st.integers(0, 10**6),
    num=st.integers(16, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    one=NAMES,
    two=NAMES,
)
@settings(deadline=None)
def test_two_tensors_whose_names_are_exchanged_change_the_checksum(seed, num, dtype, one, two):
    assume(one != two)
    a, b = torch.randn(2, num, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert checksum((one, b), (two, a)) != checksum((one, a), (two, b))


@given(st.lists(tensors(), min_size=1, max_size=4), st.data())
@settings(deadline=None)
def test_a_missing_tensor_changes_the_checksum(parts, data):
    pairs = [(f"layers.{i}.weight", tensor) for i, tensor in enumerate(parts)]
    lost = data.draw(st.integers(0, len(pairs) - 1))
    assert checksum(*pairs) != checksum(*pairs[:lost], *pairs[lost + 1 :])


# ------------------------------------------------------------------------------------------- a penalty that nobody could take


def config_of(verifier, path="problems.jsonl", penalty=0.5):
    fields = {"algo.task.verifier": verifier, "algo.task.path": path, "reward.format_penalty": penalty}
    return replace_fields(ScaleConfig(), fields)


@pytest.mark.parametrize(
    ("verifier", "path"), [("scale.rewards:verify_math", "problems.jsonl"), ("mine:verify", "problems.jsonl"), (None, None)]
)
def test_a_format_penalty_is_refused_with_a_verifier_that_cannot_see_a_missing_answer(verifier, path):
    with pytest.raises(UserError, match=r"^reward\.format_penalty: .*") as refused:
        check(config_of(verifier, path))
    assert "\n" not in str(refused.value)
    assert (verifier or "built-in") in str(refused.value)


def test_without_a_penalty_any_verifier_does_and_with_one_the_grader():
    for config in (config_of("mine:verify", penalty=0.0), config_of("scale.rewards:grade"), config_of(None)):
        assert check(config).reward == config.reward


def test_the_launcher_says_so_in_one_line_and_starts_nobody(capsys, tmp_path):
    require("math_verify", "the verifier that is named")
    code = launch.main(["--config", str(TINY_CONFIG), "--algo.task.path", "problems.jsonl", "--reward.format_penalty", "0.5",
                        "--algo.task.verifier", "scale.rewards:verify_math", "--algo.run.out", str(tmp_path / "out")])  # fmt: skip
    said = capsys.readouterr().err
    assert code == 2
    assert said.startswith("error: reward.format_penalty: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_overlong_penalty_is_measured_from_the_cap_of_whole_responses_not_from_a_window():
    """A response of 20 to 30 tokens, of windows of 8: 0 at 20, half of the penalty at 25, all of it at 30."""
    config = replace_fields(ScaleConfig(), {"algo.rollout.window": 8, "algo.rollout.max_response_tokens": 30,
                                            "reward.overlong_buffer": 10, "reward.overlong_penalty": 0.5})  # fmt: skip
    lengths = (9, 20, 25, 30)
    right = {length: (1.0, "ok") for length in lengths}
    scorer = build.shape(types.SimpleNamespace(name="", submit=lambda response: None, collect=lambda: right), config)
    for length in lengths:
        prompt = Prompt(id=0, token_ids=(1,), answer="")
        scorer.submit(Response(id=length, prompt=prompt, sample_index=0, token_ids=[2] * length))
    assert {length: score for length, (score, _) in scorer.collect().items()} == {9: 1.0, 20: 1.0, 25: 0.75, 30: 0.5}


# ------------------------------------------------------------------------------------- the probe after a sleep, and the gap


class SleepyEngine:
    """An engine whose numbers are off once it has slept. It is asked for nothing else."""

    def __init__(self, sleep_level, gap_awake=1e-5, gap_after=1.0):
        self.sleep_level, self.version, self.world, self.events = sleep_level, 3, World(rank=1), []
        self.gaps = {False: gap_awake, True: gap_after}

    def probe(self, policy, prompts, new_tokens):
        gap = self.gaps["sleep" in self.events]
        self.events.append("probe")
        return Gap(mean=gap, top_percent=gap, max=gap, num_tokens=128)

    def sleep(self):
        self.events.append("sleep")

    def load_weights(self, tensors, version):
        self.events.append(f"load {dict(tensors)} {version}")


def probed(engine):
    task = types.SimpleNamespace(prompts=lambda split: [Prompt(id=0, token_ids=(1, 2), answer="")])
    policy = types.SimpleNamespace(named_tensors=lambda: {"w": 1})
    probe_through_sleep(engine, policy, task, ScaleConfig())
    return engine.events


def test_the_engine_is_probed_again_once_it_has_slept_and_taken_its_weights():
    assert probed(SleepyEngine(2, gap_after=1e-5)) == ["probe", "sleep", "load {'w': 1} 3", "probe"]
    assert probed(SleepyEngine(0)) == ["probe"]


@pytest.mark.parametrize("level", [1, 2])
def test_weights_that_a_sleep_spoilt_are_refused_before_the_first_step(level):
    with pytest.raises(UserError, match=rf"after a sleep of level {level} .*; give engine\.sleep_level 1 or 0$"):
        probed(SleepyEngine(level))


def test_a_gap_before_the_sleep_is_told_as_such():
    with pytest.raises(UserError, match=r"128 tokens \(allowed.*; look at dtype"):
        probed(SleepyEngine(2, gap_awake=1.0))


@pytest.mark.parametrize(
    ("fields", "gap", "ends"),
    [
        ({}, 2e-3, True),
        ({}, 5e-4, False),
        ({}, float("nan"), False),
        ({"engine.gap_limit": 0.01}, 5e-3, False),
        ({"engine.gap_limit": 0.01}, 0.02, True),
        ({"engine.dtype": "bfloat16", "sharding.compute_dtype": "bfloat16"}, 0.29, False),
        ({"engine.dtype": "bfloat16", "sharding.compute_dtype": "bfloat16"}, 0.31, True),
    ],
)
def test_a_gap_above_the_limit_ends_the_run(fields, gap, ends):
    limit = GapLimit(replace_fields(ScaleConfig(), fields))
    if not ends:
        limit(7, {"policy/logprob_gap": gap})
        return
    with pytest.raises(
        UserError, match=rf"^engine\.gap_limit: got engine and trainer log-probabilities {gap:.2g} apart on average in step 7"
    ):
        limit(7, {"policy/logprob_gap": gap})


# ------------------------------------------------------------------------------------------- one number of bytes for everybody


def test_the_engine_is_given_the_cache_that_the_dry_run_reckons(monkeypatch, tmp_path):
    """A stand-in of the engine: what it is built with is what `kv_cache_bytes` says, from cluster.device_bytes and no device."""
    shape = dict(model_type="qwen2", vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2)  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    given = {}
    monkeypatch.setattr(build, "VLLMEngine", lambda folder, **options: given.update(options))
    config = replace_fields(
        ScaleConfig(), {"algo.model.policy": str(tmp_path), "algo.model.device": "cuda", "cluster.device_bytes": 10e9}
    )
    task = types.SimpleNamespace(end_token_id=2, max_prompt_tokens=16)
    build.build_engine(config, World(device="cuda:0"), task)
    assert given["kv_cache_bytes"] == int(memory.kv_cache_bytes(config, memory.shapes(config)[0]))
    assert 0.85 * 10e9 - memory.ENGINE_RESERVE_BYTES - 1e6 < given["kv_cache_bytes"] < 0.85 * 10e9 - memory.ENGINE_RESERVE_BYTES
    assert given["options"]["kv_cache_dtype"] == "auto"
    build.build_engine(replace_fields(config, {"algo.rollout.kv_cache": "fp8"}), World(device="cuda:0"), task)
    assert given["options"]["kv_cache_dtype"] == "fp8"
    tight = replace_fields(config, {"cluster.device_bytes": 4e9})
    with pytest.raises(UserError, match=r"^engine\.gpu_memory_utilization: got 0.85; expected room for a cache"):
        build.build_engine(tight, World(device="cuda:0"), task)


@pytest.mark.parametrize("kind", ["auto", "fp8"])
def test_torch_engine_is_given_the_kind_of_cache(model, kind):
    fields = {"algo.model.policy": str(model), "engine.kind": "torch", "algo.rollout.kv_cache": kind}
    task = types.SimpleNamespace(end_token_id=2, max_prompt_tokens=16)
    engine = build.build_engine(replace_fields(ScaleConfig(), fields), World(), task)
    assert engine._cache.fp8 == (kind == "fp8")


@pytest.mark.parametrize(("has", "refused", "told"), [(85e9, False, True), (80.5e9, False, False), (79e9, True, False)])
def test_a_device_with_less_memory_than_the_config_says_is_refused(monkeypatch, caplog, has, refused, told):
    device = types.SimpleNamespace(name="Stand-in", total_memory=int(has))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda which: device)
    with caplog.at_level("INFO", logger="scale"):
        if refused:
            with pytest.raises(
                UserError, match=r"^cluster\.device_bytes: got 8e\+10; expected at most what Stand-in has, 7.9e\+10"
            ):
                build.check_device(ScaleConfig(), World(device="cuda:0"))
        else:
            build.check_device(ScaleConfig(), World(device="cuda:0"))
    assert ("the rest stays unused" in caplog.text) == told
