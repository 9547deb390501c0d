"""AdamW's moments are there from the start, and change nothing."""

from __future__ import annotations

import copy

import pytest
import torch

from tppo_ref.loop.learner import Learner, allocate_moments
from tppo_ref.loop.parallel import SingleProcess
from tppo_ref.loop.settings import PolicyConfig


def layers() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3), torch.nn.Linear(2, 2))  # the last one takes no part


def step(module: torch.nn.Module, optimiser: torch.optim.Optimizer, number: int) -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
    module[1](module[0](x)).square().sum().backward()
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)


def test_updates_are_to_the_bit_those_of_an_optimiser_that_was_left_alone():
    module, other = layers(), layers()
    optimisers = [torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.1) for m in (module, other)]
    allocate_moments(optimisers[0])
    for number in range(5):
        for m, optimiser in zip((module, other), optimisers, strict=True):
            step(m, optimiser, number)
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    for p, q in zip(module.parameters(), other.parameters(), strict=True):
        for name, tensor in optimisers[1].state[q].items():
            assert torch.equal(optimisers[0].state[p][name], tensor)
            assert optimisers[0].state[p][name].dtype == tensor.dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_learner_has_from_the_start_the_bytes_that_it_will_have(dtype):
    """Also where the weights that an update moves are float32 beside a model that computes in bfloat16."""
    module = layers().to(dtype)
    learner = Learner("policy", module, PolicyConfig(), SingleProcess())

    def held() -> int:
        return sum(t.nbytes for state in learner.optimiser.state.values() for t in state.values())

    before = held()
    assert before == sum(8 * p.numel() + 4 for p in module.parameters())
    x = torch.ones(1, 5, dtype=dtype)
    learner.update([[0]], lambda rows: module[1](module[0](x)).sum(), step=1)
    assert held() == before


def test_a_state_that_was_saved_before_the_first_update_goes_on_as_if_nothing_had_been_saved():
    module = layers()
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-2)
    allocate_moments(optimiser)
    saved, other = copy.deepcopy(optimiser.state_dict()), layers()
    again = torch.optim.AdamW(other.parameters(), lr=1e-2)
    again.load_state_dict(saved)
    step(module, optimiser, 1)
    step(other, again, 1)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
