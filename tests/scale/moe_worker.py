"""A mixture of experts on the ranks of run_ranks: its folder's weights sharded, gathered, and computed with.

moe_worker.py FOLDER OUT      OUT/found.json, from rank 0
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from scale.config import ShardingConfig
from scale.distributed import start
from scale.sharding import load_sharded
from tppo_ref.rollout.models import PolicyModel, ValueModel, load_policy, load_value_model
from tppo_ref.rollout.packing import TokenBatch

BATCH = TokenBatch([[3, 4, 5], [6]], [[7, 8, 9, 10], [11, 12]])


def main(folder: str, out: Path) -> None:
    world, found = start(device="cpu"), {}
    for name, kind, load in (("policy", PolicyModel, load_policy), ("value", ValueModel, load_value_model)):
        sharded, whole = load_sharded(kind, folder, world, ShardingConfig()), load(folder)
        named, expected = dict(sharded.named_tensors()), whole.hf.state_dict()
        found[name] = {
            "names": sorted(named) == sorted(n for n, _ in whole.hf.named_parameters()),
            "unlike": [n for n, tensor in named.items() if "score" not in n and not torch.equal(tensor, expected[n])],
            "experts": [list(tensor.shape) for n, tensor in named.items() if "experts" in n],
        }
        if kind is PolicyModel:
            whole(BATCH).sum().backward()
            (loss := sharded(BATCH)).sum().backward()
            found["outputs"] = float((loss - whole(BATCH)).abs().max())
            gradients = {n: p.grad.full_tensor() for n, p in sharded.hf.named_parameters()}
            found["gradients"] = max(float((gradients[n] - p.grad).abs().max()) for n, p in whole.hf.named_parameters())
    if world.rank == 0:
        (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
