"""The policy and the value model: transformers models behind the two calls that the Trainer makes.

    PolicyModel(batch) -> logprob_BT                     log-probabilities of the response tokens
    ValueModel(batch)  -> (value_BT, last_value_B)       V before each response token, and after the last one

Both feed a `TokenBatch` packed (no padding, see attention.py) and give float32 back (float64 of a float64 model) on response
columns, T the longest response of the batch, 0 in padding. The wrapped transformers model is `.hf`; its parameter names are
transformers' own.

Both stay in eval mode while they are trained: PPO's ratio compares two evaluations of one policy, and dropout would make
them differ before any update. (Activation checkpointing that asks for `training`, as transformers' own does, is
therefore off; wrap the layers instead, as scale/ does.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tppo_ref.method.errors import UserError
from tppo_ref.rollout.attention import PackedLayout, use_ragged_attention
from tppo_ref.rollout.head import at_least_float32, float32_logits, sampling_logits
from tppo_ref.rollout.packing import Packed, TokenBatch, pack
from tppo_ref.rollout.shapes import check_size, device_named, quiet, read_config, reason

# A logit chunk holds at most this many numbers unless `logit_chunk_tokens` says otherwise: half a gigabyte in float32.
LOGIT_CHUNK_NUMBERS = 2**27


def no_rows(batch: TokenBatch) -> TokenBatch:
    """What an empty batch is fed instead, with the same passes: a model cannot read nothing."""
    return TokenBatch([[0]], [[0]], live_from=None if batch.live_from is None else [0], prefix=batch.prefix)


class _Backbone(nn.Module):
    """What policy and value model share: a transformers model that attends raggedly, always in eval mode."""

    def __init__(self, hf: Any):
        super().__init__()
        use_ragged_attention(hf)
        self.hf = hf
        self.eval()

    def train(self, mode: bool = True) -> _Backbone:
        """Stays in eval mode whatever `mode` says; the module's docstring says why."""
        return super().train(False)

    @property
    def weight(self) -> Tensor:
        """The input embedding's weight: where the model lives (.device) and computes (.dtype), without a walk over modules."""
        return self.hf.get_input_embeddings().weight

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def hidden(self, input_ids: Tensor, position_ids: Tensor, layout: Any) -> Tensor:
        """Last hidden states [N, width] of one ragged row [1, N]."""
        out = self.hf.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, ragged=layout)
        return out.last_hidden_state[0]

    def read(self, packed: Packed) -> Tensor:
        """Last hidden states [N, width] of a packed batch, its constant prefix read before, without gradient."""
        if packed.prefix is not None:
            with torch.no_grad():
                self.hidden(*packed.prefix)
        return self.hidden(packed.input_ids, packed.position_ids, packed.layout)

    def packed(self, batch: TokenBatch) -> Packed:
        """What `read` is fed of a batch; where several ranks share it, its piece is put in this place (scale/context.py)."""
        return pack(batch, self.device)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The weights under transformers' names: what a rollout engine loads."""
        return self.hf.named_parameters()

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Writes a transformers folder (safetensors) that knows nothing of this project's attention."""
        self.hf.save_pretrained(folder)


class PolicyModel(_Backbone):
    """A causal language model as the policy: `forward(batch) -> logprob_BT`.

    temperature, min_response_tokens, end_token_ids   define the sampling distribution (`sampling_logits`): end tokens are
                         forbidden at response columns < min_response_tokens
    logit_chunk_tokens   response tokens whose logits exist at a time; each chunk is computed again in the backward pass
                         unless one chunk covers the batch. None: as many as fit half a gigabyte
    """

    def __init__(
        self,
        hf: Any,
        *,
        temperature: float = 1.0,
        min_response_tokens: int = 0,
        end_token_ids: Sequence[int] = (),
        logit_chunk_tokens: int | None = None,
    ):
        super().__init__(hf)
        if not temperature > 0:
            raise ValueError(f"temperature = {temperature}; expected > 0")
        if min_response_tokens > 0 and not end_token_ids:
            raise ValueError(f"min_response_tokens = {min_response_tokens} needs end_token_ids")
        self.temperature, self.min_response_tokens, self.end_token_ids = temperature, min_response_tokens, tuple(end_token_ids)
        self.logit_chunk_tokens = logit_chunk_tokens or max(1, LOGIT_CHUNK_NUMBERS // hf.config.vocab_size)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """The language-model head: [N, width] -> [N, V], at least float32, before temperature."""
        return float32_logits(self.hf.get_output_embeddings(), hidden_ND)

    def forward(self, batch: TokenBatch) -> Tensor:
        """Log-probability of each response token under the sampling distribution, at least float32 [B, T]."""
        if not len(batch):  # a spare micro-batch: weightless, but every parameter is in its graph, as sharded ones need
            return self._forward(no_rows(batch))[:0, :0].clone()  # not self(...): the hooks of a sharded module must run once
        return self._forward(batch)

    def _forward(self, batch: TokenBatch) -> Tensor:
        packed = self.packed(batch)
        hidden = self.read(packed).index_select(0, packed.predictor_M)
        chunk = self.logit_chunk_tokens
        if len(hidden) <= chunk:
            return packed.unpack(self._token_logprobs(hidden, packed.target_M, packed.column_M))
        parts = [
            checkpoint(self._token_logprobs, *args, use_reentrant=False)
            for args in zip(hidden.split(chunk), packed.target_M.split(chunk), packed.column_M.split(chunk), strict=True)
        ]
        return packed.unpack(torch.cat(parts))

    def _token_logprobs(self, hidden_MD: Tensor, target_M: Tensor, column_M: Tensor) -> Tensor:
        forbid = column_M < self.min_response_tokens if self.min_response_tokens > 0 else None
        logits = sampling_logits(self.logits(hidden_MD), self.temperature, forbid, self.end_token_ids)
        return logits.gather(-1, target_M[:, None])[:, 0] - logits.logsumexp(-1)


def as_value_config(config: Any) -> Any:
    """A transformers config, changed to that of a value model: one label per token, no dropout in the head."""
    config.num_labels, config.classifier_dropout = 1, 0.0
    return config


def value_head(hf: Any) -> Any:
    """The scalar head of a token classifier, which transformers names by architecture."""
    return hf.score if hasattr(hf, "score") else hf.classifier


def in_value_head(name: str) -> bool:
    """Whether a parameter belongs to the scalar head: a policy's folder lacks it, and it starts at random."""
    return name.startswith(("score.", "classifier."))


class ValueModel(_Backbone):
    """A token classifier with one label as the critic: `forward(batch) -> (value_BT, last_value_B)`, float32.

    value_BT[b, t] is V before response token t, read at the token before it (t = 0: the last prompt token);
    last_value_B is V after the last response token.
    """

    def forward(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        if not len(batch):
            value_BT, last_value_B = self._forward(no_rows(batch))
            return value_BT[:0, :0].clone(), last_value_B[:0].clone()
        return self._forward(batch)

    def _forward(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        packed = self.packed(batch)
        hidden = self.read(packed)
        read = hidden.index_select(0, torch.cat([packed.predictor_M, packed.last_B]))
        head = value_head(self.hf)
        value = at_least_float32(head(read)[:, 0])
        num_tokens = len(packed.predictor_M)
        return packed.unpack(value[:num_tokens]), packed.unpack_last(value[num_tokens:])


def load_policy(
    source: Any, *, seed: int = 0, dtype: str = "float32", device: str = "cpu", trust_remote_code: bool = False, **options: Any
) -> PolicyModel:
    """The policy from `source`; `options` go to PolicyModel.

    source      a checkpoint folder (config.json and safetensors), or for random weights under `seed` a transformers
                config: a PretrainedConfig, a dict with "model_type", or the path of a config.json
    dtype       "float32", "bfloat16"
    device      "cpu", "cuda", "cuda:1", "auto"
    Raises UserError, in one line: nothing at that path, no model in it, unreadable weights, no such device, an
    architecture whose results the packed attention does not reproduce (every load compares both on a few tokens).
    """
    hf = _load("AutoModelForCausalLM", source, seed, dtype, device, trust_remote_code)
    model = PolicyModel(hf, **options)
    check_against_plain_forward(model)
    return model


def load_value_model(
    source: Any, *, seed: int = 0, dtype: str = "float32", device: str = "cpu", trust_remote_code: bool = False
) -> ValueModel:
    """The value model; arguments and errors as for `load_policy`.

    A policy's folder gives its backbone with a new head, random under `seed`; a value model's folder gives it all.
    """
    hf = _load("AutoModelForTokenClassification", source, seed, dtype, device, trust_remote_code)
    model = ValueModel(hf)
    check_against_plain_forward(model)
    return model


def _load(auto_class: str, source: Any, seed: int, dtype: str, device: str, trust_remote_code: bool) -> Any:
    import transformers

    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"dtype = {dtype!r}; expected float32 or bfloat16")
    where = device_named(device)
    auto = getattr(transformers, auto_class)
    is_value = auto_class == "AutoModelForTokenClassification"
    is_folder = isinstance(source, (str, os.PathLike)) and not str(source).endswith(".json")
    options = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
    missing = []
    with torch.random.fork_rng(devices=[]), quiet():
        try:
            config = read_config(source, trust_remote_code)
            if is_value:
                as_value_config(config)
            check_size(auto, config, options["dtype"], where)
            torch.manual_seed(seed)
            if is_folder:
                hf, info = auto.from_pretrained(
                    source, config=config, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
                )
                missing = sorted(n for n in info["missing_keys"] if not (is_value and in_value_head(n)))
            else:
                hf = auto.from_config(config, **options)
        except UserError:
            raise
        except Exception as error:  # transformers and safetensors raise a dozen types for a bad folder or config
            what = source if isinstance(source, (str, os.PathLike)) else "model config"
            raise UserError(f"{what}: cannot be loaded: {reason(error)}") from error
    if missing:
        raise UserError(f"{source}: lacks {len(missing)} of the model's weights, {missing[0]} first")
    for parameter in hf.parameters():
        # Weights read from a file lie at the file's alignment, and matrix kernels round differently with it: a resumed run would
        # differ in last bits from one that never stopped. A clone is aligned like any other tensor.
        parameter.data = parameter.data.clone()
    return hf.to(where)


@torch.no_grad()
def check_against_plain_forward(model: PolicyModel | ValueModel) -> None:
    """UserError unless the packed forward of two short sequences equals transformers' own forward of each.

    Catches what no flag announces: attention scores with extra terms, logits scaled or capped after the head.
    """
    hf, lengths = model.hf, (5, 3)
    head = hf.get_output_embeddings() if isinstance(model, PolicyModel) else value_head(hf)
    kind, name = hf.config.model_type, hf.config._attn_implementation
    ids = [torch.arange(n, device=model.device) % hf.config.vocab_size for n in lengths]
    positions = torch.cat([torch.arange(n, device=model.device) for n in lengths])
    try:
        ours = head(model.hidden(torch.cat(ids)[None], positions[None], PackedLayout(lengths, model.device)))
        hf.set_attn_implementation("eager")
        plain = torch.cat([hf(input_ids=x[None], use_cache=False).logits[0] for x in ids])
    except UserError:
        raise
    except Exception as error:  # a config may be legal to build and still fail to run; each architecture in its own way
        raise UserError(f"model type {kind!r} does not run: {reason(error)}") from error
    finally:
        hf.set_attn_implementation(name)
    tolerance = (1e-4 if ours.dtype == torch.float32 else 0.05) * max(1.0, plain.abs().max().item())
    difference = (ours - plain).abs().max().item()
    if not bool(torch.isfinite(plain).all()):
        raise UserError(f"the weights of this {kind} give numbers that are not finite; take an earlier checkpoint")
    if not difference <= tolerance:
        raise UserError(f"model type {kind!r} is not supported: packed and plain forward differ by {difference:.1e}")
