"""`RolloutEngine` on vLLM: one engine per process for its life, in the ranks' own process group (external_launcher).

    submit -> step, step, ... -> load_weights -> submit -> ...

The batcher counts decode steps, and every running request must gain one token with each. vLLM does not promise that: a long prefill
may take several of its steps, and a full KV cache preempts. So `step` lets vLLM run until no request lags behind the logical
step, and holds back what ran ahead: the schedule depends on lengths alone, never on vLLM's timing, and is the same on every rank.

What bites, each held by a test: every request carries a seed (unseeded, the ranks of a tensor-parallel group diverge); a sync
drops every cached prefix; on a CPU the output head keeps a packed copy of its weights, which a sync must renew.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import logging
import math
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from scale.distributed import World
from scale.vllm_options import with_float32_head
from tppo_ref.method.errors import UserError
from tppo_ref.rollout.engine import Decoded, Request
from tppo_ref.rollout.packing import TokenBatch


@dataclasses.dataclass(frozen=True)
class Gap:
    """How far engine and trainer are apart on the same tokens: absolute differences of log-probabilities, over all ranks."""

    mean: float
    top_percent: float  # mean of the largest 1 % (at least one token)
    max: float
    num_tokens: int

    @classmethod
    def of(cls, ours: Sequence[float], engines: Sequence[float]) -> Gap:
        gaps = sorted((abs(a - b) for a, b in zip(ours, engines, strict=True)), reverse=True)
        worst = gaps[: max(1, math.ceil(len(gaps) / 100))]
        return cls(sum(gaps) / len(gaps), sum(worst) / len(worst), gaps[0], len(gaps))


@dataclasses.dataclass
class _Running:
    """A request inside vLLM: what it has sampled so far, and the logical step at which it began."""

    request: Request
    begin: int
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finished: bool = False
    end_token: bool = False


class VLLMEngine:
    """vLLM behind tppo_ref's `RolloutEngine`.

    folder               holds config.json; weights are never read from it: `load_weights` brings them, and must be called first
    slots                requests that decode at a time
    max_context_tokens   longest prompt plus response; a longer request is a ValueError (vLLM would cut it without a word)
    temperature, min_response_tokens, end_token_ids   the sampling distribution, as in tppo_ref's PolicyModel; log-probabilities are
                         of that distribution ("processed"). Filters that renormalise (top-p, top-k) are not offered
    sleep_level          GPU only, from `sleep` to the next `load_weights`. 0: stay; 1: weights to the host; 2: weights dropped
    kv_cache_bytes       of the cache, on this rank; vLLM asks no device how much it might take
    options              further arguments of vllm.LLM, checked by `check_options`
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        world: World,
        slots: int,
        max_context_tokens: int,
        end_token_ids: Sequence[int],
        temperature: float = 1.0,
        min_response_tokens: int = 0,
        dtype: str = "float32",
        seed: int = 0,
        sleep_level: int = 2,
        gpu_memory_utilization: float = 0.85,
        kv_cache_bytes: int = 2**30,
        options: Mapping[str, Any] | None = None,
    ):
        self.world, self.end_token_ids, self.temperature = world, list(end_token_ids), temperature
        self.min_response_tokens, self.max_context_tokens = min_response_tokens, max_context_tokens
        self.version: int | None = None
        self._on_cpu = world.device == "cpu"
        self.sleep_level = 0 if self._on_cpu else sleep_level
        self._asleep = False
        self._running: dict[int, _Running] = {}  # in order of submission
        self._step = 0  # logical decode steps since nothing ran
        vllm = _import_vllm(self._on_cpu)
        self._vllm = vllm
        shared_memory = _name_shared_memory_after_this_job() if self._on_cpu and world.tensor_parallel > 1 else ""
        try:
            self._llm = vllm.LLM(
                model=str(folder), load_format="dummy", skip_tokenizer_init=True, dtype=dtype, seed=seed,
                max_model_len=max_context_tokens + 1, tensor_parallel_size=world.tensor_parallel,
                distributed_executor_backend="external_launcher", logprobs_mode="processed_logprobs",
                generation_config="vllm",  # a folder's own would add filters that renormalise
                kv_cache_memory_bytes=kv_cache_bytes,
                **(_defaults(self._on_cpu, slots, gpu_memory_utilization) | with_float32_head(options or {})),
            )  # fmt: skip
        except (ValueError, RuntimeError, OSError, AssertionError) as error:
            why = " ".join(str(error).partition("[type=")[0].split())[:300]  # behind it stands pydantic's view of the input
            raise UserError(f"engine.kind: got vllm, which refuses {folder}; expected a model that it takes ({why})") from error
        self._engine = self._llm.llm_engine
        if shared_memory:
            _forget_shared_memory(shared_memory)

    # -------------------------------------------------------------------------------------------------------- RolloutEngine

    @property
    def num_running(self) -> int:
        return len(self._running)

    def submit(self, requests: Sequence[Request]) -> None:
        if self.version is None or self._asleep:
            raise RuntimeError("the engine has no weights: call load_weights before submit")
        for request in requests:  # all of them, before any is taken
            length = len(request.token_ids) + request.max_new_tokens
            if length > self.max_context_tokens:
                raise ValueError(f"request {request.response_id}: {length} tokens, the engine holds {self.max_context_tokens}")
        for request in requests:
            self._running[request.response_id] = _Running(request, self._step)
            prompt = {"prompt_token_ids": list(request.token_ids)}
            self._engine.add_request(str(request.response_id), prompt, self._sampling(request))

    def step(self) -> list[Decoded]:
        self._step += 1
        while any(not r.finished and r.begin + len(r.token_ids) < self._step for r in self._running.values()):
            self._advance()
        done = [r for r in self._running.values() if r.finished and r.begin + len(r.token_ids) == self._step]
        for r in done:
            del self._running[r.request.response_id]
        if not self._running:
            self._step = 0
        return [
            Decoded(response_id=r.request.response_id, token_ids=r.token_ids, logprobs=r.logprobs, end_token=r.end_token)
            for r in done
        ]

    def sleep(self) -> None:
        """Sleep. Not by itself when nothing runs: in mid-window the batcher refills the slot that just became free."""
        if self.sleep_level and not self._asleep:
            self._llm.sleep(level=self.sleep_level)
            self._asleep = True

    def load_weights(self, named_tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None, version: int) -> None:
        """Stream the weights in, one gathered tensor at a time; None: the same ones again. Every cached prefix is dropped.

        All ranks take part. RuntimeError while requests run, when what arrived is not what left (a checksum over names, sizes and
        bits), and for None while a sleep has dropped the weights.
        """
        if self._running:
            raise RuntimeError(f"load_weights while {len(self._running)} requests run")
        if named_tensors is None:
            if self.version is None or (self._asleep and self.sleep_level == 2):
                raise RuntimeError("load_weights(None): the engine has no weights to keep; give the tensors")
        else:
            pairs = named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors
            if self._asleep:
                self._wake(["weights"])
            sent = Checksum()
            stream = sent.over((name, tensor.to(self._dtype)) for name, tensor in pairs)
            received = self._llm.collective_rpc(_receive, args=(stream,))
            for _ in stream:  # what vLLM left lying, so that it counts as sent
                pass
            if any(r != sent.totals for r in received):
                raise RuntimeError(f"weight sync: {sent.totals} left the trainer, {received} arrived in the engine")
        if self._asleep:
            self._wake(["kv_cache"] if named_tensors is not None else None)
            self._asleep = False
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")
        self.version = version

    # ----------------------------------------------------------------------------------------------------------------- probe

    def probe(self, policy: torch.nn.Module, prompts: Sequence[Sequence[int]], *, new_tokens: int = 16, seed: int = 0) -> Gap:
        """Sample from the prompts here, let `policy` compute the same tokens' log-probabilities, compare. All ranks take part."""
        room = self.max_context_tokens - max(map(len, prompts))
        self.submit([
            Request(response_id=-1 - i, token_ids=ids, max_new_tokens=min(new_tokens, room), seed=seed + i)
            for i, ids in enumerate(prompts)
        ])  # fmt: skip
        decoded: list[Decoded] = []
        while self._running:
            decoded += self.step()
        decoded.sort(key=lambda d: -d.response_id)
        with torch.no_grad():
            logprob_BT = policy(TokenBatch(list(prompts), [d.token_ids for d in decoded]))
        ours = [x for row, d in zip(logprob_BT.tolist(), decoded, strict=True) for x in row[: len(d.token_ids)]]
        gathered: list[Any] = [None] * self.world.world
        dist.all_gather_object(gathered, (ours, [x for d in decoded for x in d.logprobs]))
        return Gap.of([x for a, _ in gathered for x in a], [x for _, b in gathered for x in b])

    # ----------------------------------------------------------------------------------------------------------------- inside

    def _wake(self, tags: list[str] | None) -> None:
        """vLLM maps what it wakes straight from the driver, which takes nothing back of what torch's allocator keeps for later:
        after the updates, and again after a sync's whole tensors, that is most of the device. 0.32.0 asks for it back itself."""
        if not self._on_cpu:
            gc.collect()
            torch.cuda.empty_cache()
        self._llm.wake_up(tags=tags)

    @property
    def _dtype(self) -> torch.dtype:
        return self._engine.model_config.dtype

    def _sampling(self, request: Request) -> Any:
        return self._vllm.SamplingParams(
            max_tokens=request.max_new_tokens, temperature=self.temperature, seed=request.seed % 2**63, logprobs=0,
            min_tokens=min(max(0, self.min_response_tokens - request.num_response_tokens), request.max_new_tokens),
            stop_token_ids=self.end_token_ids, ignore_eos=True, detokenize=False,
            output_kind=self._vllm.sampling_params.RequestOutputKind.DELTA,
        )  # fmt: skip

    def _advance(self) -> None:
        """One step of vLLM; its tokens go to the requests."""
        if not self._engine.has_unfinished_requests():
            lost = [r.request.response_id for r in self._running.values() if not r.finished]
            raise RuntimeError(f"vLLM lost requests {lost[:5]}: it has nothing to do, and they are not finished")
        for output in self._engine.step():
            running, completion = self._running[int(output.request_id)], output.outputs[0]
            running.token_ids += completion.token_ids
            running.logprobs += [d[t].logprob for d, t in zip(completion.logprobs, completion.token_ids, strict=True)]
            if output.finished:
                if completion.finish_reason not in ("stop", "length"):
                    raise RuntimeError(f"vLLM ended request {output.request_id} with {completion.finish_reason!r}")
                running.finished, running.end_token = True, completion.finish_reason == "stop"


def _defaults(on_cpu: bool, slots: int, share: float) -> dict[str, Any]:
    """vLLM's arguments that `options` may change."""
    ours = {"max_num_seqs": slots, "enable_prefix_caching": True, "enforce_eager": on_cpu, "disable_log_stats": True}
    if on_cpu:  # no prompt in pieces: vLLM then rewinds the seeded generator of a piece's discarded token, which a CPU's cannot
        return ours | {"block_size": 32, "enable_chunked_prefill": False}
    return ours | {"enable_sleep_mode": True, "gpu_memory_utilization": share}  # as much must be free at the start


def _receive(worker: Any, tensors: Iterator[tuple[str, Tensor]]) -> tuple[int, int, int]:
    """Runs inside vLLM's worker: takes the weights, returns the checksum of what came."""
    arrived = Checksum()
    worker.reload_weights(weights_iterator=arrived.over(tensors))
    head: Any = getattr(worker.model_runner.model, "lm_head", None)
    if hasattr(head, "cpu_linear"):  # a packed copy, which reload_weights leaves as it was
        head.quant_method.process_weights_after_loading(head)
    return arrived.totals


class Checksum:
    """(tensors, bytes, sum over tensors of a hash of their name and the sum of their bits, modulo 2^64): what passed through."""

    def __init__(self) -> None:
        self.totals = (0, 0, 0)

    def over(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            count, num_bytes, total = self.totals
            digest = hashlib.blake2b(f"{name}:{_bits(tensor)}".encode(), digest_size=8).digest()
            total = (total + int.from_bytes(digest, "little")) % 2**64
            self.totals = (count + 1, num_bytes + tensor.nbytes, total)
            yield name, tensor


def _bits(tensor: Tensor) -> int:
    """The sum of a tensor's bytes, read as 64-bit integers: exact in any order, at half the price of a copy. (A sum of values is
    neither, and NaN or -0.0 hide in it.)"""
    whole_tensor = tensor.detach().contiguous()
    raw = whole_tensor.as_strided((whole_tensor.numel(),), (1,)).view(torch.uint8)  # of one element any stride is contiguous
    if raw.storage_offset() % 8:
        raw = raw.clone()
    whole = len(raw) // 8 * 8
    return int(raw[:whole].view(torch.int64).sum()) + int(raw[whole:].sum())


def _import_vllm(on_cpu: bool) -> Any:
    """vLLM, with what must be set before its first import. UserError where it is not installed."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])  # what it says before it reads the line above
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")
    if on_cpu:
        # Each window's prefill has a size of its own, and oneDNN keeps a kernel for each of the last 1,024: 1.4 MB a window.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    try:
        import vllm
        import vllm.sampling_params
    except ImportError as error:
        raise UserError(
            f"engine.kind: got vllm; expected it installed ({error}); pip install 'tppo-ref[scale]', or engine.kind torch"
        ) from None
    return vllm


def _name_shared_memory_after_this_job() -> str:
    """vLLM's CPU build names a tensor-parallel group's shared memory after its ranks only: two jobs at once, or one after a
    crashed one, would collide (errno 17). All ranks take part. Returns what the names begin with."""
    import vllm.distributed.device_communicators.cpu_communicator as communicator

    shared: Any = communicator._CPUSHMDistributed
    job = [f"{os.getpid()}-{time.time_ns()}"]
    dist.broadcast_object_list(job, src=0)
    original = shared.make_group_name
    shared.make_group_name = staticmethod(lambda group: f"{job[0]}-{original(group)}".replace("/", ""))
    return job[0]


def _forget_shared_memory(job: str) -> None:
    """Take the names away once every rank has opened it: the memory then goes with the last rank, however that one ends."""
    dist.barrier()
    if dist.get_rank() == 0:
        for file in Path("/dev/shm").glob(f"*{job}*"):
            file.unlink(missing_ok=True)
