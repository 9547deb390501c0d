"""Everything that training carries from step to step is in the state: a trainer and its restored copy are compared object by object.

Nothing here lists what must be saved. A new attribute anywhere under the Trainer is found by walking over it, and fails this test
until it is restored, or proved to be of no consequence by `test_what_is_not_restored_is_of_no_consequence`.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from helpers import make_trainer, same, weights_of

CASES = {
    "tppo": {}, "tppo-defer": {}, "tppo-ewma": {}, "ppo": {}, "partial-is": {}, "geppo": {},
    "tppo-once": {"policy__min_new_tokens": 9, "rollout__window": 4, "policy__prefix": "constant"},
    "rloo": {"rollout__samples_per_prompt": 2}, "grpo-window": {"rollout__samples_per_prompt": 3, "rollout__slots": 7},
    "held": {"method": "tppo", "value__batch_responses": 3},
    "bfloat16": {"method": "tppo-ewma", "dtype": torch.bfloat16},
    "warm-ups": {"method": "tppo", "value__warmup_steps": 2, "policy__lr_warmup_steps": 9, "value__lr_warmup_steps": 7},
}  # fmt: skip

SCRATCH = {
    "slices", "segments", "step_ends_s",  # what the last window was, for whoever writes it down
    "begun",  # responses drawn in the last window
    "grad_norms",  # of the last step, for its metrics
    "_order",  # a prompt order that is drawn again from (seed, epoch)
    "_cache", "_state", "_cache_row", "_groups", "_requests", "_pending", "_places", "_tokens", "_logprobs",  # an idle engine's memory
}  # fmt: skip
"""Attributes that a window or a step writes before it reads them."""

CLOCKED = ("rollout/tokens_per_s", "rollout/idle_s")


def leaves(thing: Any, path: str = "", above: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:
    """Every number, text and tensor under an object, by the path to it: attributes, entries, parameters, optimiser states."""
    if isinstance(thing, torch.Tensor | np.ndarray):
        yield path, torch.as_tensor(thing).detach().clone()
    elif isinstance(thing, int | float | str | bool | type(None)):
        yield path, thing
    elif id(thing) in above or (callable(thing) and not isinstance(thing, torch.nn.Module)):
        return
    else:
        above |= {id(thing)}  # not what was met elsewhere: a prompt is shared by its samples, or is a copy of its own
        if isinstance(thing, torch.optim.Optimizer):
            yield from leaves(thing.state_dict(), f"{path}.state_dict", above)
        elif isinstance(thing, torch.nn.Module):
            yield from leaves(dict(thing.named_parameters()), f"{path}.parameters", above)
        elif isinstance(thing, Mapping):
            for key, entry in thing.items():
                yield from leaves(entry, f"{path}[{key!r}]", above)
        elif isinstance(thing, list | tuple | set | frozenset):
            yield f"{path}.len", len(thing)
            for i, entry in enumerate(thing):
                yield from leaves(entry, f"{path}[{i}]", above)
        elif hasattr(thing, "__dict__"):
            for name, entry in vars(thing).items():
                if name not in SCRATCH:
                    yield from leaves(entry, f"{path}.{name}", above)


def made(case: str):
    changes = dict(CASES[case])
    return make_trainer(changes.pop("method", case), **changes)


def restored(trainer, case: str):
    """A new trainer, brought to the state of `trainer` as a checkpoint would: tensors copied, the rest through JSON."""
    other = made(case)
    other.load_state_dict([json.loads(json.dumps(trainer.state_dict()))])
    for mine, theirs in zip(other.learners, trainer.learners, strict=True):
        mine.module.load_state_dict(theirs.module.state_dict())
        mine.optimiser.load_state_dict(copy.deepcopy(theirs.optimiser.state_dict()))  # torch shares the tensors
        mine.masters.load(theirs.masters.tensors)
    if trainer.ewma is not None:
        other.ewma.masters.load(trainer.ewma.masters.tensors)
    other.engine.load_weights(None, other.version)
    return other


def equal(a: Any, b: Any) -> bool:
    """NaN equals NaN here."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and torch.equal(a, b)
    return a == b or (a != a and b != b)


def differences(one, two) -> list[str]:
    first, second = dict(leaves(one)), dict(leaves(two))
    found = sorted(set(first) ^ set(second))
    for path in first.keys() & second.keys():
        a, b = first[path], second[path]
        if not equal(a, b):
            found.append(path)
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_restored_trainer_is_the_one_that_was_saved_in_every_attribute(case):
    trainer = made(case)
    for _ in range(5):
        trainer.step()
    fresh = differences(trainer, made(case))
    assert any("policy_learner" in path for path in fresh), "the walk does not see that training changed anything"
    assert differences(trainer, restored(trainer, case)) == []


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_restored_is_of_no_consequence(case):
    trainer = made(case)
    for _ in range(4):
        trainer.step()
    other = restored(trainer, case)
    for _ in range(2):
        ours, theirs = trainer.step(), other.step()
        numbers = {name: x for name, x in ours.items() if not name.startswith("time/") and name not in CLOCKED}
        assert {name: theirs[name] for name in numbers} == pytest.approx(numbers, rel=0, abs=0, nan_ok=True)
    for mine, its in zip(trainer.learners, other.learners, strict=True):
        assert same(weights_of(mine.module), weights_of(its.module))


def test_the_walk_sees_an_attribute_that_nobody_restores():
    trainer = made("tppo")
    trainer.step()
    other = restored(trainer, "tppo")
    trainer.batcher.stream.something_new = 1
    assert differences(trainer, other) == [".batcher.stream.something_new"]


def test_a_rank_takes_its_own_reused_responses_back_and_no_other_ranks():
    ranks = [make_trainer("geppo", run__seed=seed) for seed in (1, 2)]
    for trainer in ranks:
        trainer.step()
    states = [trainer.state_dict() for trainer in ranks]
    again = make_trainer("geppo", run__seed=1)
    again.load_state_dict(states, own=1)
    said = [[(r.id, r.token_ids) for r in batch] for batch in again.past]
    assert said == [[(r.id, r.token_ids) for r in batch] for batch in ranks[1].past]
    assert said != [[(r.id, r.token_ids) for r in batch] for batch in ranks[0].past]
    assert any(said)
