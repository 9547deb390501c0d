"""One model under training: its optimiser, its learning rate, its mini-batches, and the checks before each update."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tppo_ref.loop.masters import Masters
from tppo_ref.loop.minibatches import pack, split_mini_batches
from tppo_ref.loop.parallel import Parallel, per
from tppo_ref.loop.settings import PolicyConfig, ValueConfig
from tppo_ref.method.errors import NonFiniteError

Plan = list[list[list[int]]]  # mini-batches of micro-batches of row numbers


class Learner:
    """One model under training: its optimiser, its learning-rate warm-up, and the way from losses to an update."""

    def __init__(self, name: str, module: torch.nn.Module, config: PolicyConfig | ValueConfig, parallel: Parallel):
        self.name, self.config, self.parallel = name, config, parallel
        self.module: Any = module  # a torch module with named_tensors and save_pretrained (models.py, scale's sharded ones)
        self.num_steps = 0  # training steps that updated this model: the learning rate's warm-up counts these
        self.num_updates = 0  # optimiser steps
        self.masters = Masters(module)
        self.optimiser = torch.optim.AdamW(self.masters.tensors.values(), lr=self._warm_lr(1), weight_decay=config.weight_decay)
        allocate_moments(self.optimiser)
        self.grad_norms: list[float] = []

    def begin_step(self) -> None:
        """A new training step: its first update, if there is one, counts for the learning rate's warm-up."""
        self.grad_norms = []

    def _warm_up(self) -> None:
        self.num_steps += 1
        for group in self.optimiser.param_groups:
            group["lr"] = self._warm_lr(self.num_steps)

    def _warm_lr(self, num_steps: int) -> float:
        """The learning rate of the num_steps-th training step that updates this model; the first is 1."""
        warmup = self.config.lr_warmup_steps
        return self.config.lr * (min(1.0, num_steps / warmup) if warmup else 1.0)

    @property
    def lr(self) -> float:
        return self.optimiser.param_groups[0]["lr"]

    def plan(self, trained_tokens: Sequence[int], fed_tokens: Sequence[int], rng: np.random.Generator) -> Plan:
        """Rows -> mini-batches -> micro-batches, as many on every rank: short ranks get empty ones."""
        wanted = self.config.mini_batches
        if self.config.mini_batch_tokens:
            (tokens,) = self.parallel.sum([sum(trained_tokens)])
            wanted = max(1, round(tokens / self.config.mini_batch_tokens))
        mini_batches = split_mini_batches(trained_tokens, fed_tokens, wanted, rng)
        plan = [pack(rows, fed_tokens, self.config.micro_batch_tokens) for rows in mini_batches]
        most = self.parallel.max([len(micro_batches) for micro_batches in plan])
        return [[*micro, *([] for _ in range(int(n) - len(micro)))] for micro, n in zip(plan, most, strict=True)]

    def update(self, micro_batches: list[list[int]], loss: Callable[[list[int]], torch.Tensor], step: int) -> None:
        """One optimiser step on the sum of the micro-batches' losses, each already divided by the mini-batch's token count.

        Gradients are None before and after.
        """
        total = 0.0
        for rows in micro_batches:
            part = loss(rows)
            total += float(part.detach())
            (part * self.parallel.loss_scale).backward()
        norm = self.parallel.grad_norm(self.module, self.config.max_grad_norm)
        self._refuse_non_finite(total, norm, step)
        if not self.grad_norms:
            self._warm_up()
        self.masters.take_gradients()
        self.optimiser.step()
        self.masters.round()
        self.masters.drop_gradients()  # four bytes a parameter, which decoding can use
        self.grad_norms.append(norm)
        self.num_updates += 1

    def _refuse_non_finite(self, loss: float, norm: float, step: int) -> None:
        (bad,) = self.parallel.max([not (math.isfinite(loss) and math.isfinite(norm))])
        if not bad:
            return
        what = f"loss is {loss}"
        if math.isfinite(loss):
            grads = ((n, p.grad) for n, p in self.module.named_parameters() if p.grad is not None)
            name = next((n for n, grad in grads if not bool(torch.isfinite(grad).all())), "a parameter on another rank")
            what = f"gradient of {name} is not finite (norm {norm})"
        self.masters.drop_gradients()
        raise NonFiniteError(
            f"step {step}: the {self.name}'s {what}; stopped before the update; lower {self.name}.lr or {self.name}.max_grad_norm"
        )

    def state_dict(self) -> dict[str, int]:
        """What is known beside the module and its optimiser, whose tensors are stored apart."""
        return {"num_steps": self.num_steps, "num_updates": self.num_updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_steps, self.num_updates = state["num_steps"], state["num_updates"]

    def metrics(self) -> dict[str, float]:
        norms = self.grad_norms
        return {f"{self.name}/updates": len(norms), f"{self.name}/lr": self.lr,
                f"{self.name}/grad_norm": per(sum(norms), len(norms))}  # fmt: skip


def allocate_moments(optimiser: torch.optim.AdamW) -> None:
    """AdamW's state as its first step would make it: zeros. So a run has from its start the memory that it will need, eight bytes a
    parameter; by themselves the policy's moments appear at its first update, after the value model's warm-up.
    """
    for group in optimiser.param_groups:
        for parameter in group["params"]:
            moments = {name: torch.zeros_like(parameter, memory_format=torch.preserve_format) for name in ("exp_avg", "exp_avg_sq")}
            optimiser.state[parameter] = {"step": torch.tensor(0.0), **moments}
