"""The peak memory of one pass without a device: tppo_ref's models, sharded by sharding.py, on tensors of a shape and no bytes.

    terms(shape, passing) -> bytes on one rank at the peak, term by term

Every rank's work is the same, so rank 0 of a fake process group stands for all of them. `FSDPMemTracker` follows every storage that
comes and goes, from the gathered parameters to the last temporary.

Decoder layers that are alike need not all be traced. Two shallow models give what one layer adds, and the model's depth is reached
by multiplying: at the peak, the start of the last layer's backward pass, each further layer adds its shards and its saved input,
and nothing else. For Qwen2.5-32B's update at 25,600 tokens on 64 ranks this and the trace of all 64 layers agree to the byte
(40,965,764,232); a test holds it on a smaller model. A model whose layers differ is traced whole.

What is not seen: the allocator's fragmentation, communication buffers, and the order of work on a GPU's streams.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from scale.config import ShardingConfig
from scale.context import Context
from scale.sharding import decoder_layers, from_config, shard
from tppo_ref.method.errors import UserError
from tppo_ref.rollout.models import PolicyModel, ValueModel
from tppo_ref.rollout.packing import TokenBatch

DEPTHS = (4, 6)  # the shallow models; below 4 no layer is prefetched while another one works

TERMS = {
    "SHARDED_PARAM": "shards", "SHARDED_GRAD": "gradients", "UNSHARDED_PARAM": "gathered_weights", "ALL_GATHER": "gathered_weights",
    "UNSHARDED_GRAD": "gathered_gradients", "REDUCE_SCATTER": "gathered_gradients",
    "ACT": "activations", "TEMP": "activations", "BUFFER": "activations", "INP": "activations", "OPT": "activations",
}  # fmt: skip
"""The tracker's kinds of memory -> the terms given here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """One forward pass over a micro-batch and, in training, the backward pass.

    value          the value model's, or else the policy's
    rows           (prompt tokens, response tokens) of each row
    live           response tokens at each row's end that are differentiated through; what stands before them is read without
                   gradient (policy.prefix constant); None: everything is
    train          with a backward pass; gradients of earlier micro-batches are there already
    """

    value: bool
    train: bool
    rows: tuple[tuple[int, int], ...]
    world: int
    sharding: ShardingConfig
    logit_chunk_tokens: int = 0
    live: int | None = None


class Shape:
    """A model's config.json, its sizes, and whether its layers are alike. UserError for one that this project cannot train."""

    def __init__(self, file: Path):
        import transformers

        try:
            self.text = file.read_text()
            self.config = transformers.AutoConfig.for_model(**json.loads(self.text))
            with torch.device("meta"):
                policy, value = from_config(PolicyModel, self.config), from_config(ValueModel, self.config)
        except UserError:
            raise
        except Exception as error:  # transformers raises a dozen types for a bad config
            raise UserError(
                f"{file}: got no model config ({' '.join(str(error).split())[:200]}); expected a transformers config.json"
            ) from None
        self.tensors = [tuple(p.shape) for p in policy.parameters()]
        self.num_parameters = sum(p.numel() for p in policy.parameters())
        self.num_value_parameters = sum(p.numel() for p in value.parameters())
        kinds = {tuple((name, tuple(p.shape)) for name, p in layer.named_parameters()) for layer in decoder_layers(policy)}
        types = set(getattr(self.config, "layer_types", None) or [])
        self.alike = len(kinds) == 1 and len(types) <= 1 and self.config.num_hidden_layers == len(decoder_layers(policy))

    @property
    def depth(self) -> int:
        return self.config.num_hidden_layers

    @property
    def num_heads(self) -> int:
        return self.config.num_attention_heads

    @property
    def num_kv_heads(self) -> int:
        return getattr(self.config, "num_key_value_heads", None) or self.num_heads

    @property
    def kv_numbers_per_token(self) -> int:
        """Keys and values of all layers."""
        head = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.num_heads
        return 2 * self.depth * self.num_kv_heads * head

    @property
    def max_positions(self) -> int:
        return self.config.max_position_embeddings


def terms(shape: Shape, passing: Pass) -> dict[str, float]:
    """Bytes on one rank at the pass's peak: shards (float32 masters, 4 bytes a parameter), gradients (float32 shards), gathered
    weights, gathered gradients (before they are reduced, and in the reduction), activations (saved ones and temporaries, logits
    included)."""
    return dict(_terms(shape.text, shape.depth, shape.alike, passing))


@functools.lru_cache(maxsize=64)
def _terms(text: str, depth: int, alike: bool, passing: Pass) -> Counter[str]:
    import transformers

    def traced(layers: int) -> Counter[str]:
        config = transformers.AutoConfig.for_model(**json.loads(text))
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        return trace(config, passing)

    if not alike or depth <= DEPTHS[1]:
        return traced(depth)
    shallow, deeper = (traced(layers) for layers in DEPTHS)
    more = (depth - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])
    return Counter({name: shallow[name] + more * (deeper[name] - shallow[name]) for name in shallow | deeper})


def trace(config: Any, passing: Pass) -> Counter[str]:
    """Run the pass on fake tensors and read the tracker's peak."""
    kind = ValueModel if passing.value else PolicyModel
    options = {} if passing.value else {"logit_chunk_tokens": passing.logit_chunk_tokens or None}
    live_from = None if passing.live is None else [max(0, response - passing.live) for _, response in passing.rows]
    batch = TokenBatch([[0] * prompt for prompt, _ in passing.rows], [[0] * response for _, response in passing.rows], live_from)
    with fake_ranks(passing.world) as mesh, warnings.catch_warnings(), FakeTensorMode(allow_non_fake_inputs=True):
        warnings.simplefilter("ignore")  # FSDP warns of views that ValueModel returns
        with torch.device("cpu"):
            model = from_config(kind, config, **options)
        # Offloaded shards would be here, too. Rank 0 of a context group stands for all: pieces are of equal size.
        shard(model, mesh, dataclasses.replace(passing.sharding, offload=False), context=fake_context(passing))
        if passing.train:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        tracker = FSDPMemTracker(model)
        with tracker, torch.set_grad_enabled(passing.train):
            out = model(batch)
            if passing.train:
                (out[0] if passing.value else out).sum().backward()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    found: Counter[str] = Counter()
    for kind_of_memory, num_bytes in peak.items():
        if num_bytes and (name := getattr(kind_of_memory, "name", None)) is not None:  # the rest is the sum
            found[TERMS[name]] += num_bytes
    return found


def fake_context(passing: Pass) -> Context:
    """The first context group of the fake ranks."""
    size = passing.sharding.context_parallel
    return Context(dist.new_group(range(size)), part=0, parts=size)


@contextlib.contextmanager
def fake_ranks(world: int) -> Iterator[Any]:
    """A device mesh over `world` ranks of which only this one exists. Collectives return at once and move nothing."""
    if dist.is_initialized():
        raise RuntimeError("a process group is there already: a dry run needs a process of its own")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield init_device_mesh("cpu", (world,))
    finally:
        dist.destroy_process_group()
