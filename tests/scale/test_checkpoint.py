"""One rank's checkpoint without a run: what is written, and by what means. That runs go on from theirs, test_restart.py holds."""

from __future__ import annotations

import types

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import filesystem

from scale.checkpoint import DistributedCheckpointer, read_manifest
from scale.config import ScaleConfig
from scale.distributed import World
from tppo_ref.runs.checkpoint import complete_checkpoints


@pytest.fixture
def alone(tmp_path):
    """The process group of one rank, in this process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield World()
    dist.destroy_process_group()


@pytest.fixture
def learner():
    module = torch.nn.Linear(3, 2)
    return types.SimpleNamespace(name="policy", module=module, optimiser=torch.optim.AdamW(module.parameters()))


def test_a_checkpoint_is_written_without_a_stream_of_the_first_gpu(alone, learner, monkeypatch, tmp_path):
    """torch's writer copies ahead on a stream of the current device, which in its thread is GPU 0 on every rank: each would keep a
    context there. What it writes is on the host already, as it was when the save began."""

    def refuse(*_, **__):
        raise RuntimeError("a stream on the first GPU")

    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    task = types.SimpleNamespace(prompts=lambda split: [], tokenizer=None)
    checkpointer = DistributedCheckpointer(tmp_path / "checkpoints", alone, ScaleConfig(), task)
    trainer = types.SimpleNamespace(num_steps=7, learners=[learner], ewma=None, state_dict=dict)
    before = learner.module.weight.detach().clone()
    final = checkpointer.save(trainer)
    with torch.no_grad():
        learner.module.weight.add_(1.0)  # the next step, while the shards are written
    checkpointer.finish()
    assert complete_checkpoints(tmp_path / "checkpoints") == [final]
    assert read_manifest(final)["world"]["world"] == 1
    saved = {"policy": {"model": {"weight": torch.empty(2, 3)}}}
    dcp.load(saved, checkpoint_id=str(final / "shards"))
    assert torch.equal(saved["policy"]["model"]["weight"], before)
