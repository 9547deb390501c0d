"""Whole steps with the models on a device that is not there: no tensor of the loop is left behind on the host."""

from __future__ import annotations

import pytest
import torch
from helpers import make_trainer
from two_devices import AWAY, TwoDevices

from tppo_ref.method.advantages import egae

METHODS = {
    "tppo": {},
    "tppo-defer": {"value__update": "joint"},
    "tppo-ewma": {},
    "ppo-dual": {"advantage__whiten": False, "dtype": torch.float64},
    "geppo": {},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_step_leaves_no_tensor_on_the_host_that_the_models_meet(method):
    trainer = make_trainer(method, **METHODS[method])
    for learner in (trainer.policy_learner, trainer.value_learner):
        TwoDevices.place(learner.module)
        for tensor in (
            *learner.masters.tensors.values(),
            *(x for state in learner.optimiser.state.values() for x in state.values()),
        ):
            tensor.away = True
    if trainer.ewma is not None:
        TwoDevices.place(trainer.ewma.module)
    trainer.device = AWAY
    with TwoDevices() as devices:
        for _ in range(2):
            trainer.step()
    assert devices.met > 1000  # operations on what lies with the models


@pytest.mark.parametrize("per_row", [False, True])
def test_advantages_on_a_device_are_those_of_the_cpu(per_row):
    """Other blocks, another allocation and another way to find the runs: the same sums, in the dtype of the values."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 5, 300, generator=generator, dtype=torch.float64)
    first, length = torch.tensor([0, 7, 250, 3, 0]), torch.tensor([300, 290, 40, 0, 1])
    columns = torch.arange(300)
    mask = (columns >= first[:, None]) & (columns < (first + length)[:, None])
    cut = torch.tensor([True, False, True, False, True])
    lams = torch.tensor([0.5, 0.9, 1.0, 0.0, 0.95], dtype=torch.float64)
    here = egae(rewards, values, mask, cut, gamma=0.99, lam=lams if per_row else 0.9)
    with TwoDevices():
        moved = [tensor.to(AWAY) for tensor in (rewards, values, mask, cut)]
        there = egae(*moved, gamma=0.99, lam=lams.to(AWAY) if per_row else 0.9)
        assert (there.device, there.dtype) == (AWAY, torch.float64)
        back = there.cpu()
    assert torch.allclose(back, here, rtol=0, atol=1e-12)


def test_a_mixture_raises_as_on_a_gpu_and_what_a_gpu_takes_passes():
    weight = torch.nn.Linear(3, 3)
    TwoDevices.place(weight)
    with TwoDevices():
        away, host = torch.ones(2, 3, device=AWAY), torch.ones(2, 3)
        assert weight(away).device == AWAY
        assert (away * torch.tensor(2.0)).device == AWAY  # a number of the host's
        assert away[torch.tensor([0])].device == AWAY  # indices of the host's
        assert host.to(AWAY).device == AWAY
        assert away.cpu().device == host.device == torch.device("cpu")
        for mix in (
            lambda: away + host,
            lambda: weight(host),
            lambda: torch.where(away > 0, host, away),
            lambda: torch.cat([away, host]),
        ):
            with pytest.raises(RuntimeError, match="without the device of the models"):
                mix()
        with pytest.raises(TypeError, match="numpy"):
            away.numpy()
