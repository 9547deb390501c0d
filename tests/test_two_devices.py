"""Whole steps with the models on a device that is not there: no tensor of the loop is left behind on the host."""

from __future__ import annotations

import pytest
import torch
from helpers import make_trainer
from two_devices import AWAY, TwoDevices

METHODS = {
    "tppo": {},
    "tppo-defer": {"value__update": "joint"},
    "tppo-ewma": {},
    "ppo-dual": {"advantage__whiten": False},
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
