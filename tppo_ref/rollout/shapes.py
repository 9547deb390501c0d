"""A model's shape before there is a model: its transformers config, refused where this machine could not hold what it describes."""

from __future__ import annotations

import contextlib
import copy
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tppo_ref.method.errors import UserError, refusal

MOST_LAYERS = 1000
"""More would take minutes to lay out even without memory."""


def read_config(source: Any, trust_remote_code: bool = False) -> Any:
    """The transformers config that `source` names (as `load_policy`); a copy, since loading writes into it."""
    import transformers

    what = str(source) if isinstance(source, (str, os.PathLike)) else "model config"
    if isinstance(source, transformers.PretrainedConfig):
        source = source.to_dict()
    elif isinstance(source, (str, os.PathLike)):
        path = Path(source)
        folder = _exists(path)
        if folder and not (path / "config.json").is_file():
            raise UserError(refusal(str(source), "a folder without a config.json", "a model's folder"))
        if folder and not any(path.glob("*.safetensors")):
            remedy = f"for random weights give {path / 'config.json'}"
            raise UserError(refusal(str(source), "a folder without safetensors", "a model's folder", remedy))
        content = json.loads((path / "config.json" if folder else path).read_text("utf-8"), object_pairs_hook=_unique_keys)
        _refuse_too_many_layers(content)
        if folder:
            return transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
        source = content
    if not isinstance(source, dict) or not isinstance(source.get("model_type"), str):
        raise UserError(refusal(what, "no 'model_type'", "one, for example 'qwen2'"))
    return transformers.AutoConfig.for_model(**source)


def _refuse_too_many_layers(content: Any) -> None:
    """UserError before transformers lists what each of them is."""
    for name, value in content.items() if isinstance(content, dict) else ():
        if ("layers" in name or name == "n_layer") and isinstance(value, int) and value > MOST_LAYERS:
            raise UserError(refusal(f"model config: {name}", f"{value:.4g}", f"at most {MOST_LAYERS:,}"))


def _exists(path: Path) -> bool:
    """Whether `path` is a folder and not a regular file. UserError where it is neither: a pipe would be waited for."""
    with contextlib.suppress(OSError, ValueError):
        if path.is_dir() or path.is_file():
            return path.is_dir()
    raise UserError(refusal(str(path)[:200], "no such file or folder", "a model folder or a config.json"))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, num in Counter(key for key, _ in pairs).items() if num > 1]
    if twice:
        raise ValueError(f"key {twice[0]!r} stands there twice")
    return dict(pairs)


def check_size(auto: Any, config: Any, dtype: torch.dtype, device: torch.device) -> None:
    """UserError for a shape that has no layer or no vocabulary, or more weights than the device has memory.

    auto   the class of transformers' that would make it; it is laid out on the meta device, which takes no memory
    """
    text = config.get_text_config()
    for name, most in (("num_hidden_layers", MOST_LAYERS), ("vocab_size", None), ("intermediate_size", None)):
        number = getattr(text, name, 1)
        if isinstance(number, int) and (number < 1 or (most and number > most)):
            raise UserError(
                refusal(f"model config: {name}", repr(number)[:50], f"an integer from 1{f' to {most:,}' if most else ''}")
            )
    with torch.device("meta"):
        num = sum(parameter.numel() for parameter in auto.from_config(copy.deepcopy(config), dtype=dtype).parameters())
    needed, room = num * dtype.itemsize, memory_of(device)
    if needed > room:
        got = f"a shape of {num:,} parameters, {needed / 1e9:,.0f} GB of {str(dtype).removeprefix('torch.')}"
        raise UserError(refusal("model config", got, f"at most the {room / 1e9:,.0f} GB of memory on {device}"))


def memory_of(device: torch.device) -> float:
    """Bytes of the device, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def reason(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def device_named(name: str) -> torch.device:
    """The device "cpu", "cuda", "cuda:N" or "auto"; UserError where it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("neither cpu nor cuda")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(
            refusal("device", f"{name!r}, which is not there ({reason(error)[:200]})", "cpu, cuda, cuda:N or auto")
        ) from error
    return device


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers reports a new value head as a warning; missing weights are errors here, so the report adds nothing."""
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


__all__ = ["check_size", "device_named", "memory_of", "quiet", "read_config", "reason"]
