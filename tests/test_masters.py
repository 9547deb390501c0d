"""Models in bfloat16 train as those in float32 do: updates, gradients and averages are added up in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import make_policy, make_trainer, one_thread  # noqa: F401  (a fixture)

from tppo_ref.loop.learner import Learner
from tppo_ref.loop.masters import Masters
from tppo_ref.loop.parallel import SingleProcess
from tppo_ref.loop.settings import PolicyConfig
from tppo_ref.loop.updates import Ewma

pytestmark = pytest.mark.usefixtures("one_thread")

BF16 = torch.bfloat16


class OneWeight(torch.nn.Module):
    """Loss: the weight times what it is called with, which is its gradient, too."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(1, dtype=dtype))

    def forward(self, gradient: float) -> torch.Tensor:
        return (self.w * gradient).sum()


def learner_of(module: torch.nn.Module, **settings: float) -> Learner:
    return Learner("policy", module, PolicyConfig(**({"weight_decay": 0.0, "max_grad_norm": 1e9} | settings)), SingleProcess())


def test_ten_steps_that_are_each_too_small_for_bfloat16_add_up():
    """AdamW moves by lr where the gradient is constant: ten steps of 1e-3 from 1 give 0.99, in bfloat16 0.98828125."""
    learner = learner_of(OneWeight(BF16), lr=1e-3)
    for _ in range(10):
        learner.update([[0]], lambda rows: learner.module(1.0), 1)
    assert float(learner.masters.tensors["w"]) == pytest.approx(0.99, abs=1e-6)
    assert learner.module.w.item() == 0.98828125


def test_gradients_of_micro_batches_add_up_in_float32():
    """1 + 64 times 2^-9 is 1.125; in bfloat16 each addition to 1 would be rounded away."""
    norms = []
    for dtype in (torch.float32, BF16):
        learner = learner_of(OneWeight(dtype))
        micro_batches = [[0], *([i] for i in range(1, 65))]
        learner.update(micro_batches, lambda rows, one=learner: one.module(1.0 if rows == [0] else 2.0**-9), 1)
        norms += learner.grad_norms
    assert norms == [1.125, 1.125]


def test_gradients_and_moments_are_gone_or_float32_after_an_update():
    learner = learner_of(OneWeight(BF16))
    learner.update([[0]], lambda rows: learner.module(1.0), 1)
    assert learner.module.w.grad is None
    assert learner.masters.tensors["w"].grad is None
    (state,) = learner.optimiser.state.values()
    assert {x.dtype for x in state.values()} == {torch.float32}


def test_a_float32_models_masters_are_its_own_weights():
    module = OneWeight(torch.float32)
    masters = Masters(module)
    assert masters.tensors["w"] is module.w
    assert masters.apart == {}


def test_at_the_ports_learning_rate_every_weight_with_a_gradient_moves_and_the_model_is_their_rounding():
    trainer = make_trainer("tppo", dtype=BF16, policy__lr=8e-7, policy__weight_decay=0.0)
    learner = trainer.policy_learner
    before = {name: x.clone() for name, x in learner.masters.tensors.items()}
    for _ in range(10):
        trainer.step()
    moved = total = 0
    for name, parameter in learner.module.named_parameters():
        master = learner.masters.tensors[name]
        assert (parameter.dtype, master.dtype) == (BF16, torch.float32)
        assert torch.equal(parameter, master.to(BF16)), name
        moved, total = moved + int((master != before[name]).sum()), total + master.numel()
    assert moved > 0.9 * total  # a token that was not met has an embedding without a gradient


def test_the_average_of_weights_is_kept_in_float32():
    """w = 1 held for a while, then 1 + 2^-7: the average nears it by a tenth and so on, which bfloat16 cannot say."""
    module = OneWeight(BF16)
    current, ewma = Masters(module), Ewma(copy.deepcopy(module), decay=0.9)
    ewma.weight = 10.0  # where it goes for decay 0.9
    current.tensors["w"] += 2**-7
    for n in range(1, 6):
        ewma.move(current)
        expected = 1 + 2**-7 * (1 - 0.9**n)
        assert float(ewma.masters.tensors["w"]) == pytest.approx(expected, abs=1e-7)
        assert torch.equal(ewma.module.w, torch.tensor([expected]).to(BF16))


def test_masters_that_were_saved_come_back_with_their_rounding():
    policy = make_policy(dtype="bfloat16")
    masters = Masters(policy)
    saved = {name: x + 1e-4 for name, x in masters.apart.items()}
    masters.load(saved)
    for name, parameter in policy.named_parameters():
        assert torch.equal(masters.tensors[name], saved[name])
        assert torch.equal(parameter, saved[name].to(BF16))
    with pytest.raises(LookupError):
        masters.load({})
