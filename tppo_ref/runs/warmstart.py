"""Base models for the built-in tasks: a fresh policy, trained on demonstrations that hold the task's mistakes.

Reinforcement learning needs something to start from that is right now and then. A tiny model that imitates imperfect
demonstrations is such a base: it knows the form of an answer and part of its content.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2Config
from transformers.utils import logging

from tppo_ref.method.errors import UserError
from tppo_ref.rollout.models import PolicyModel
from tppo_ref.rollout.packing import TokenBatch
from tppo_ref.rollout.shapes import check_size
from tppo_ref.tasks import DemonstratedTask, Task

MAX_GRAD_NORM = 1.0
WARMUP_SHARE = 0.05
"""Share of the steps over which the learning rate rises; afterwards it falls to a tenth along a cosine."""


def tiny_policy_config(task: Task, *, num_layers: int = 3, width: int = 32, num_heads: int = 2) -> PretrainedConfig:
    """A Qwen2 of about 42,000 parameters, with room for the task's longest prompt and response."""
    longest = task.max_prompt_tokens + (task.max_response_tokens or 1024)
    return Qwen2Config(
        vocab_size=task.vocab_size,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_heads,
        max_position_embeddings=max(512, 2 * longest),
        tie_word_embeddings=True,
        use_cache=True,
        initializer_range=width**-0.5,  # transformers' 0.02 is meant for wide models; here it triples the warm start
        bos_token_id=None,
        eos_token_id=task.end_token_id,
        pad_token_id=None,
    )


def warm_start(
    task: Task,
    model_config: PretrainedConfig,
    *,
    seed: int = 0,
    steps: int = 700,
    batch: int = 64,
    lr: float = 5e-3,
    cache_dir: str | Path = ".cache",
    progress: bool = True,
) -> Path:
    """The folder of a policy that imitates `task.demonstrations`; trained only where the cache does not hold it.

    steps, batch    optimiser steps, and demonstrations in each
    lr              peak learning rate of AdamW
    The folder's name holds a hash of everything that determines the model, the source of the demonstrations included.
    It is written beside and renamed: a folder that is there is complete. UserError for a task without demonstrations,
    a vocabulary that is too small, and a cache that cannot be written.
    """
    if not isinstance(task, DemonstratedTask):
        raise UserError(f"task {task.name!r} has no demonstrations to make a base model from; give a model folder.")
    if model_config.vocab_size < task.vocab_size:
        raise UserError(
            f"the model's vocabulary has {model_config.vocab_size} tokens, task {task.name!r} needs {task.vocab_size}; "
            "set vocab_size to at least that."
        )
    for name, value in (("steps", steps), ("batch", batch)):
        if value < 1:
            raise UserError(f"warm start: {name} is {value}, expected at least 1.")
    settings = {"seed": seed, "steps": steps, "batch": batch, "lr": lr}
    check_size(AutoModelForCausalLM, model_config, torch.float32, torch.device("cpu"))
    folder = Path(cache_dir) / f"{task.name}-{fingerprint(task, model_config, settings)}"
    if folder.is_dir():
        return folder
    beside = _make_beside(Path(cache_dir))
    try:
        model = _train(task, model_config, seed=seed, steps=steps, batch=batch, lr=lr, progress=progress)
        with _no_progress_bars():
            model.save_pretrained(beside)
        (beside / "warmstart.json").write_text(json.dumps({"task": task.name, **settings}, indent=2) + "\n")
        _move_into_place(beside, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def fingerprint(task: Task, model_config: PretrainedConfig, settings: dict[str, Any]) -> str:
    """Hash of the task, its source, the model's configuration, the settings, this file and torch's version."""
    classes = [cls for cls in type(task).__mro__ if cls.__module__.split(".")[0] not in ("builtins", "typing")]
    sources = [inspect.getsource(sys.modules[cls.__module__]) for cls in classes]
    config = model_config.to_dict()
    config.pop("transformers_version", None)
    everything = {
        "task": repr(task), "options": getattr(task, "options", None), "sources": sources,
        "here": inspect.getsource(sys.modules[__name__]), "config": config, "settings": settings,
        "torch": torch.__version__,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(everything, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _make_beside(cache_dir: Path) -> Path:
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=".unfinished-", dir=cache_dir))
    except OSError as error:
        raise UserError(f"cache folder {str(cache_dir)!r} cannot be written: {error.strerror}.") from error


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers draws a bar for every file that it writes."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _move_into_place(beside: Path, folder: Path) -> None:
    try:
        os.rename(beside, folder)
    except OSError:
        if not folder.is_dir():  # else another process made the same model meanwhile
            raise


def _lr_factor(step: int, steps: int) -> float:
    """1 after the rise, then along a cosine to 0.1."""
    num_warmup = max(1, round(WARMUP_SHARE * steps))
    if step < num_warmup:
        return (step + 1) / num_warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - num_warmup) / max(1, steps - num_warmup))


def _train(
    task: DemonstratedTask, model_config: PretrainedConfig, *, seed: int, steps: int, batch: int, lr: float, progress: bool
) -> Any:
    """The trained `transformers` model. Torch's global random state is as it was before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    policy = PolicyModel(model)
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    bar = tqdm(range(steps), desc=f"warm start of {task.name}", unit="step", disable=not progress, leave=False)
    for step in bar:
        pairs = task.demonstrations(seed * steps + step, batch)
        tokens = TokenBatch([prompt for prompt, _ in pairs], [response for _, response in pairs])
        num_tokens = sum(len(response) for _, response in pairs)
        for group in optimizer.param_groups:
            group["lr"] = lr * _lr_factor(step, steps)
        # Columns beyond a response hold no log-probability; only where it ends differs from row to row.
        lengths_B = torch.tensor([len(response) for _, response in pairs])
        logprob_BT = policy(tokens)
        mask_BT = torch.arange(logprob_BT.shape[1]) < lengths_B[:, None]
        loss = -logprob_BT.masked_fill(~mask_BT, 0.0).sum() / num_tokens
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM, error_if_nonfinite=True)
        optimizer.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


__all__ = ["fingerprint", "tiny_policy_config", "warm_start"]
