"""Models as data: a shape, where it comes from (the marks of docs/config.md), and what follows from it.

model("Qwen/Qwen2.5-32B")            by name, offline; or a config.json, or the folder that holds one
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

from sim.clock.devices import unknown


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A dense decoder: RMS norms, grouped-query attention, a gated MLP. Counts follow from the shape alone."""

    name: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    tied_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    """Of the attention's output projection."""
    mlp_bias: bool = False
    qk_norm: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{self.name}: {field.name}: got {value!r}; expected a whole number, 1 or more")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.name}: num_kv_heads: got {self.num_kv_heads}; expected a divisor of {self.num_heads} heads")

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_size

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_size

    @functools.cached_property
    def num_layer_matrix_parameters(self) -> int:
        """Of all layers' matrices: queries, keys, values, output, gate, up, down."""
        attention = self.hidden_size * (2 * self.query_size + 2 * self.kv_size)
        return self.num_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def num_embedding_parameters(self) -> int:
        """Of one matrix [vocabulary, hidden]."""
        return self.vocab_size * self.hidden_size

    @functools.cached_property
    def num_body_parameters(self) -> int:
        """Without embedding and head: matrices, biases, norms."""
        biases = self.qkv_bias * (self.query_size + 2 * self.kv_size) + self.output_bias * self.hidden_size
        biases += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        norms = 2 * self.hidden_size + self.qk_norm * 2 * self.head_size
        return self.num_layer_matrix_parameters + self.num_layers * (biases + norms) + self.hidden_size

    @property
    def num_parameters(self) -> int:
        """Of the policy."""
        return self.num_body_parameters + self.num_embedding_parameters * (1 if self.tied_embeddings else 2)

    @property
    def num_value_parameters(self) -> int:
        """Of a value model of this shape: a scalar head with a bias instead of the vocabulary's."""
        return self.num_body_parameters + self.num_embedding_parameters + self.hidden_size + 1

    @property
    def num_tensors(self) -> int:
        """Of the policy as a checkpoint has them: queries, keys and values apart, as are gate and up."""
        biases = 3 * self.qkv_bias + self.output_bias + 3 * self.mlp_bias
        return self.num_layers * (7 + 2 + 2 * self.qk_norm + biases) + (2 if self.tied_embeddings else 3)

    def weight_bytes(self, bytes_per_parameter: int = 2) -> int:
        """Of the policy; bf16 by default."""
        return self.num_parameters * bytes_per_parameter

    def read_bytes(self, bytes_per_parameter: int = 2) -> int:
        """Weights that a decode step reads: all but the input embedding, of which it takes a few rows."""
        return (self.num_body_parameters + self.num_embedding_parameters) * bytes_per_parameter

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Keys and values of one token in all layers; bf16 by default."""
        return 2 * self.num_layers * self.kv_size * bytes_per_element

    def forward_flops(self, tokens: Any, context_tokens: Any, *, head: bool = True) -> Any:
        """2 (matrix parameters) tokens + 4 layers (query size) context_tokens; numbers or arrays.

        `context_tokens` is summed over the tokens (hardware.Costs): the second term is queries times keys, and probabilities times
        values. Norms, softmax and the scalar head are left out. `head` says whether logits are computed for every token.
        """
        matrices = self.num_layer_matrix_parameters + head * self.num_embedding_parameters
        return 2.0 * matrices * tokens + 4.0 * self.num_layers * self.query_size * context_tokens

    def flops_per_token(self, context: float) -> float:
        """Forward operations of one token that attends to `context` tokens, itself included."""
        return float(self.forward_flops(1, context))

    def activation_bytes_per_token(self, *, checkpointing: bool) -> int:
        """Activations in bf16 that a training pass holds per token at its peak, logits apart: h hidden, i intermediate size,

            with checkpointing   layers * 2 h + 28 h + 14 i      every layer's input, and one layer in backward
            without              layers * (28 h + 8 i) + 6 i     what every layer saves, and the gradients of one

        The counts are of the transformers layers [I]: 28 h are two norms with fp32 copies, queries before and after rotation,
        attention and residual; 8 i gate, up, activation, product; 6 i their gradients. For the 32B the first is 1.19 MB per token,
        the second 23 MB; dry runs on fake tensors gave 1.18 to 1.26 and about 24 [M].
        """
        hidden, intermediate = self.hidden_size, self.intermediate_size
        saved = 28 * hidden + 8 * intermediate
        return self.num_layers * (2 * hidden if checkpointing else saved) + saved * checkpointing + 6 * intermediate

    def logit_bytes_per_token(self) -> int:
        """Logits of one token in fp32; a loss holds them and their gradient."""
        return 4 * self.vocab_size

    @classmethod
    def from_config(cls, path: str | os.PathLike[str]) -> ModelShape:
        """From a `config.json` of transformers, or the folder that holds one: Llama, Mistral, Qwen2 and Qwen3, dense.

        Raises ValueError, naming file and field, for other kinds, mixtures of experts, sliding windows and missing fields.
        """
        path = Path(path)
        path = path / "config.json" if path.is_dir() else path
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from None
        except (UnicodeDecodeError, json.JSONDecodeError):
            raise ValueError(f"{path} is not JSON") from None
        if not isinstance(config, dict):
            raise ValueError(f"{path}: got {type(config).__name__}; expected an object")
        return cls(name=str(path), source=str(path), **_shape_of(path, config))


# transformers' defaults: biases of query, key and value; whether the output projection has one as well; norms of queries and keys
_KINDS = {
    "llama": (False, True, False),
    "mistral": (False, False, False),
    "qwen2": (True, False, False),
    "qwen3": (False, True, True),
}
_REQUIRED = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


def _shape_of(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    kind = config.get("model_type")
    if experts := sorted(key for key in config if "expert" in key and config[key]):
        raise ValueError(f"{path}: got {experts[0]}, a mixture of experts; expected a dense model")
    if kind not in _KINDS:
        raise ValueError(f"{path}: got model_type {kind!r}; expected one of {', '.join(_KINDS)}")
    slides = config.get("use_sliding_window", False) if kind.startswith("qwen") else config.get("sliding_window")
    if slides:
        raise ValueError(f"{path}: got a sliding attention window; expected full attention")
    if missing := [key for key in _REQUIRED if config.get(key) is None]:
        raise ValueError(f"{path} has no {', '.join(missing)}")
    heads = config["num_attention_heads"]
    has_bias, bias_of_output, qk_norm = _KINDS[kind]
    has_bias = has_bias or bool(config.get("attention_bias", False))
    if config.get("head_dim") is None and kind == "qwen3":
        raise ValueError(f"{path} has no head_dim")
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_size": config.get("head_dim") or config["hidden_size"] // heads,
        "vocab_size": config["vocab_size"],
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "qkv_bias": has_bias,
        "output_bias": has_bias and bias_of_output,
        "mlp_bias": kind == "llama" and bool(config.get("mlp_bias", False)),
        "qk_norm": qk_norm,
    }


def _qwen(size: str, layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> ModelShape:
    return ModelShape(
        name=f"Qwen/Qwen2.5-{size}", num_layers=layers, hidden_size=hidden, intermediate_size=intermediate, num_heads=heads,
        num_kv_heads=kv_heads, head_size=hidden // heads, vocab_size=vocab, tied_embeddings=tied, qkv_bias=True,
        source="config.json of the checkpoint [V]",
    )  # fmt: skip


MODELS: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        _qwen("0.5B", 24, 896, 4_864, 14, 2, 151_936, True),
        _qwen("1.5B", 28, 1_536, 8_960, 12, 2, 151_936, True),
        _qwen("3B", 36, 2_048, 11_008, 16, 2, 151_936, True),
        _qwen("7B", 28, 3_584, 18_944, 28, 4, 152_064, False),
        _qwen("14B", 48, 5_120, 13_824, 40, 8, 152_064, False),
        _qwen("32B", 64, 5_120, 27_648, 40, 8, 152_064, False),
        _qwen("72B", 80, 8_192, 29_568, 64, 8, 152_064, False),
    )
}


# By name


def model(name: str | os.PathLike[str]) -> ModelShape:
    """A model of MODELS, with or without `Qwen/` and `-Instruct`; or the config.json, or its folder, that a path names."""
    text = os.fspath(name)
    by_name = {known.lower(): shape for known, shape in MODELS.items()}
    key = text.lower().removesuffix("-instruct")
    for candidate in (key, f"qwen/{key}"):
        if candidate in by_name:
            return by_name[candidate]
    if Path(text).exists() or text.endswith(".json"):
        return ModelShape.from_config(text)
    raise ValueError(unknown("model", text, MODELS) + "; or a config.json, or the folder of one")
