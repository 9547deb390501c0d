"""Floating-point operations of policy and value model, from the tokens that they are fed: the numerator of MFU.

Model FLOPs, as in PaLM (arXiv 2204.02311, appendix B): what the arithmetic of the model asks for, a multiplication and an addition
as two. Causal attention counts the keys that a query sees, not the square; a layer that is computed anew in the backward pass
counts once; norms, activations and the optimiser do not count. So MFU never gains by doing something twice.

    forward = 2 P n + 4 L H D s + 2 W m       n tokens fed, s pairs of a token and one that it sees (itself too), m outputs
    with its backward pass: 3 times that of what is differentiated through

P weights of the layers' matrices, L layers of H heads D wide, W weights of the head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from tppo_ref.method.records import WindowSlice
from tppo_ref.rollout.models import PolicyModel, ValueModel, value_head
from tppo_ref.rollout.packing import TokenBatch
from tppo_ref.rollout.turns import num_before

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclasses.dataclass(frozen=True)
class ModelFlops:
    """FLOPs of a forward pass per token fed, per pair of a token and one that it sees, and per output of the head.

    outputs_after   outputs of a row beyond its response tokens: a value model's V after the last one
    """

    per_token: float
    per_pair: float
    per_output: float
    outputs_after: int = 0

    def forward(self, begin: int, stop: int, outputs: int) -> float:
        """Of the tokens begin to stop - 1 of a sequence, which see all before them."""
        pairs = (stop * (stop + 1) - begin * (begin + 1)) // 2
        return self.per_token * (stop - begin) + self.per_pair * pairs + self.per_output * outputs

    def of_batch(self, batch: TokenBatch, *, backward: bool) -> float:
        """Of one pass over a batch, its constant prefix read before unless that is kept; `backward`: and of the way back."""
        total, kept = 0.0, batch.prefix is not None and batch.prefix.filled
        first: Sequence[int | None] = batch.live_from or [None] * len(batch)
        for row, (response, live) in enumerate(zip(batch.response_ids, first, strict=True)):
            constant = 0 if live is None else batch.num_before(row, live) - 1
            stop, outputs = batch.num_before(row, len(response)), len(response) - (live or 0) + self.outputs_after
            total += (3 if backward else 1) * self.forward(constant, stop, outputs)
            total += 0 if kept else self.forward(0, constant, 0)
        return total

    def of_decoding(self, slices: Iterable[WindowSlice]) -> float:
        """Of a window: each response's prompt and earlier tokens read once, as without a prefix cache or preemption, then one token
        after the other, what was observed among them; the last one that is sampled is not read."""
        return sum(self.forward(0, num_before(s.response, s.stop - 1), s.stop - s.begin) for s in slices)


def flops_of(module: nn.Module) -> ModelFlops | None:
    """Of a policy or value model, wrapped or not, sharded or not. None for another module, and for a mixture of experts, of whose
    weights a token passes only some."""
    model = next((m for m in module.modules() if isinstance(m, PolicyModel | ValueModel)), None)
    if model is None:
        return None
    base, config = model.hf.base_model, model.hf.config.get_text_config()
    if any(getattr(config, name, 0) for name in EXPERTS):
        return None
    embeddings = {id(m.weight) for m in base.modules() if isinstance(m, nn.Embedding)}
    matrices = sum(p.numel() for p in base.parameters() if p.dim() > 1 and id(p) not in embeddings)
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    is_policy = isinstance(model, PolicyModel)
    head: Any = model.hf.get_output_embeddings() if is_policy else value_head(model.hf)
    attention = 4.0 * config.num_hidden_layers * heads * width
    return ModelFlops(2.0 * matrices, attention, 2.0 * head.weight.numel(), outputs_after=0 if is_policy else 1)
