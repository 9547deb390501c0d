"""What several test files share: tiny models, a scorer that needs no process, and a Trainer made of both."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tppo_ref.loop.parallel import SingleProcess
from tppo_ref.loop.trainer import Trainer
from tppo_ref.method.records import Prompt, Response
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.batcher import SampleStream, SuccessiveBatcher
from tppo_ref.rollout.models import load_policy, load_value_model
from tppo_ref.rollout.torch_engine import TorchEngine
from tppo_ref.runs.build import build
from tppo_ref.runs.config import Config, apply_method
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.session import Session

VOCAB, END_ID = 20, 0
TINY = dict(model_type="qwen2", vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=128, bos_token_id=None, eos_token_id=END_ID,
            pad_token_id=None)  # fmt: skip

SMALL_RUN: dict[str, Any] = {
    "rollout.slots": 5, "rollout.window": 6, "rollout.max_response_tokens": 20,
    "advantage.tail_tokens": 2, "policy.mini_batches": 1, "policy.mini_batch_tokens": 0, "value.mini_batches": 1,
    "value.mini_batch_tokens": 0, "policy.lr": 1e-3, "value.lr": 1e-3,
}  # fmt: skip
"""Rows are cut, capped and ended in nearly every step; one mini-batch, so that one step is one update."""


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sharpen(module: torch.nn.Module, seed: int = 0, scale: float = 0.15) -> None:
    """Weights of a useful size: a fresh init is nearly uniform, which hides mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * scale)


def make_policy(**options: Any):
    policy = load_policy(dict(TINY), end_token_ids=(END_ID,), **options)
    sharpen(policy.hf)
    return policy


def make_value():
    value = load_value_model(dict(TINY))
    sharpen(value.hf, seed=1)
    return value


def make_prompts(num: int = 400) -> list[Prompt]:
    """Prompts of one to four tokens, no two alike: a row's prompt tells which response it is, while the prompts last."""
    ids = [(1 + i % 19, *([1 + (i // 19) % 19] * (1 + i % 3))) for i in range(num)]
    assert len(set(ids)) == num
    return [Prompt(id=i, token_ids=prompt, answer=str(i)) for i, prompt in enumerate(ids)]


def score_of(response: Response) -> float:
    """+1 where the sum of the tokens is even, else -1: about half and half, and any token can turn it."""
    return 1.0 if sum(response.token_ids) % 2 == 0 else -1.0


class ToyScorer:
    """`trainer.Scorer` in this process."""

    def __init__(self) -> None:
        self.scores: dict[int, tuple[float, str]] = {}

    def submit(self, response: Response) -> None:
        assert response.ended
        assert response.id not in self.scores, "submitted twice"
        self.scores[response.id] = (score_of(response), "ok")

    def collect(self) -> dict[int, tuple[float, str]]:
        scores, self.scores = self.scores, {}
        return scores


class RecordingParallel(SingleProcess):
    """One process; keeps a copy of each gradient before the clip, and of the weights before each update."""

    def __init__(self) -> None:
        self.gradients: list[tuple[torch.nn.Module, list[torch.Tensor]]] = []
        self.weights: list[tuple[torch.nn.Module, list[torch.Tensor]]] = []

    def grad_norm(self, module: torch.nn.Module, max_norm: float) -> float:
        self.gradients.append((module, [p.grad.clone() for p in module.parameters()]))
        self.weights.append((module, weights_of(module)))
        return super().grad_norm(module, max_norm)

    def of(self, module: torch.nn.Module) -> list[list[torch.Tensor]]:
        return [gradients for owner, gradients in self.gradients if owner is module]


class Spy(torch.nn.Module):
    """Stands where a model stands, passes everything on, and shows what it was fed and what came back.

    see(batch, output, training) is called after each forward pass and returns the output to use.
    """

    def __init__(self, module: torch.nn.Module, see):
        super().__init__()
        self.module, self.see = module, see

    def forward(self, batch):
        return self.see(batch, self.module(batch), torch.is_grad_enabled())

    def named_tensors(self):
        return self.module.named_tensors()

    def save_pretrained(self, folder):
        self.module.save_pretrained(folder)


def weights_of(module: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


_MODELS: list[Any] = []


def make_trainer(
    method: str = "tppo", *, policy_spy=None, value_spy=None, parallel=None, dtype=torch.float32, **changes: Any
) -> Trainer:
    """A Trainer on tiny models; `changes` are config fields with __ for the dot, as rollout__window=4."""
    if not _MODELS:
        _MODELS.extend([make_policy(), make_value()])
    policy, value = copy.deepcopy(_MODELS[0]).to(dtype), copy.deepcopy(_MODELS[1]).to(dtype)
    fields = SMALL_RUN | {name.replace("__", "."): x for name, x in changes.items()}
    config = replace_fields(Config(), fields)
    config = apply_method(config, method, strict=False) if method else config
    # A field that a test asks for wins over the method's own, as with compare.per_method.
    config = replace_fields(config, {name.replace("__", "."): x for name, x in changes.items()})
    rollout = config.rollout
    schedule = SlotSchedule(slots=rollout.slots, window=rollout.window, max_response_tokens=rollout.max_response_tokens,
                            refill=rollout.refill, responses_per_step=rollout.responses_per_step)  # fmt: skip
    stream = SampleStream(make_prompts(), samples_per_prompt=rollout.samples_per_prompt, seed=config.run.seed)
    engine = TorchEngine(policy, slots=rollout.slots, max_context_tokens=rollout.max_response_tokens + 4, end_token_ids=(END_ID,),
                         kv_cache=rollout.kv_cache)  # fmt: skip
    return Trainer(
        config,
        policy=Spy(policy, policy_spy) if policy_spy else policy,
        value=None if config.advantage.critic_free else Spy(value, value_spy) if value_spy else value,
        engine=engine,
        batcher=SuccessiveBatcher(schedule, stream, run_seed=config.run.seed),
        scorer=ToyScorer(),
        parallel=parallel,
    )


def bare_numbers(page: str, noise: Sequence[str]) -> set[str]:
    """Numbers of a page that stand there without a mark of `benchmarks.findings`; `noise`: patterns of what is no number of ours."""
    from benchmarks import findings

    text = findings.BLOCK.sub("", findings.MARK.sub(" ", page))
    for pattern in noise:
        text = re.sub(pattern, "", text, flags=re.MULTILINE)
    return {number.rstrip(".,") for number in re.findall(r"\d[\d.,]*", text)}


LEARNS = {
    "task.name": "calculator", "model.warm_start_steps": 400, "model.hidden_size": 48, "model.num_layers": 2, "model.num_heads": 4,
    "rollout.slots": 64, "rollout.window": 24, "rollout.max_response_tokens": 60, "policy.lr": 2e-3,
    "run.eval_prompts": 128, "run.progress": False, "run.threads": 1,
}  # fmt: skip


def learnt(method: str, folder: Path, *, steps: int, **changes: Any) -> tuple[list[dict[str, float]], float, float]:
    """A tiny model on the calculator, with all real parts: each step's metrics, accuracy on test prompts before and after."""
    fields = LEARNS | changes | {"run.out": str(folder / "run"), "run.cache": str(folder / "cache")}
    session = Session(build(apply_method(replace_fields(Config(), fields), method)))
    try:
        before = session.parts.evaluator().metrics["eval/accuracy"]
        made = [session.trainer.step() for _ in range(steps)]
        return made, before, session.parts.evaluator().metrics["eval/accuracy"]
    finally:
        session.close()
