"""One rank of the sharding tests: the same recorded rows on any number of ranks. Started by run_ranks; no vLLM.

sharding_worker.py FOLDER OUT      FOLDER/policy, FOLDER/value; OUT/{case}.safetensors and found.json, from rank 0
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from scale.config import ShardingConfig
from scale.distributed import Collective, start
from scale.sharding import checksum, gathered, load_sharded, weight_files
from tppo_ref.loop.trainer import Trainer
from tppo_ref.method.errors import UserError
from tppo_ref.method.records import Response, WindowSlice
from tppo_ref.rollout.models import PolicyModel, ValueModel
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import replace_fields

FULL32 = ShardingConfig()
CONFIG = replace_fields(Config(), {
    "policy.mini_batches": 1, "policy.mini_batch_tokens": 0, "value.mini_batches": 1, "value.mini_batch_tokens": 0,
    "policy.micro_batch_tokens": 60, "value.micro_batch_tokens": 60, "advantage.tail_tokens": 3, "rollout.window": 8,
    "policy.max_grad_norm": 0.1, "model.logit_chunk_tokens": 7,
})  # fmt: skip


CONSTANT = replace_fields(CONFIG, {"policy.prefix": "constant", "policy.keep_prefix": True, "value.update": "joint"})


class Replay:
    """Engine, batcher and scorer that bring recorded responses."""

    num_running = 0

    def __init__(self, responses):
        self.recorded = [WindowSlice(r, r.window_starts[-1], len(r)) for r in responses]
        self.num_steps, self.slot_steps = 8, 8.0 * len(responses)
        self.num_generated_tokens = sum(s.stop - s.begin for s in self.recorded)
        self.in_flight = {r.id: r for r in responses if not r.ended}

    def window(self, engine, *, version=0, on_end=None):
        return self.recorded

    def submit(self, response):
        raise AssertionError("a replay ends nothing")

    def collect(self):
        return {s.response.id: (s.response.score, "ok") for s in self.recorded if s.response.ended}

    def sleep(self):
        pass

    def load_weights(self, tensors, version):
        for _ in tensors:  # all ranks gather
            pass


def share(responses, how, rank, world):
    """This rank's rows. "ragged": rank 0 has most; "empty": the last rank has none."""
    if how == "even" or world == 1:
        return responses[rank::world]
    if how == "ragged":
        edge = len(responses) - (world - 1)
        return responses[:edge] if rank == 0 else responses[edge + rank - 1 : edge + rank]
    return [] if rank == world - 1 else responses[rank :: world - 1]


def fresh(folder, world, config, **options):
    policy = load_sharded(PolicyModel, folder / "policy", world, config, logit_chunk_tokens=7, end_token_ids=(1,), **options)
    value = load_sharded(ValueModel, folder / "value", world, config)
    return policy, value


def step(case, folder, out, world, how, config=FULL32, algo=CONFIG):
    """One Trainer step on the recorded rows; the gradients before clipping, the weights after, and the metrics."""
    responses = [Response.from_state_dict(r) for r in json.loads((folder / "rows.json").read_text())]
    policy, value = fresh(folder, world, config)
    replay = Replay(share(responses, how, world.rank, world.world))
    trainer = Trainer(algo, policy=policy, value=value, engine=replay, batcher=replay, scorer=replay, parallel=Collective(world))
    tensors, dtypes = {}, set()

    for learner in (trainer.policy_learner, trainer.value_learner):
        for group in learner.optimiser.param_groups:
            group["eps"] = 1e-3  # the update becomes a smooth function of the gradient; at 1e-8 it is its sign, rounding included

        def grad_norm(module, max_norm, name=learner.name, real=trainer.parallel.grad_norm):
            for key, p in module.hf.named_parameters():
                grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                dtypes.update({str(p.dtype), str(grad.dtype)})
                tensors[f"grad.{name}.{key}"] = grad.clone()
            return real(module, max_norm)

        learner.parallel = type("Recording", (), {"grad_norm": staticmethod(grad_norm), "loss_scale": trainer.parallel.loss_scale,
            "sum": trainer.parallel.sum, "max": trainer.parallel.max, "rank": world.rank, "world": world.world})()  # fmt: skip
    metrics = trainer.step()
    for learner in (trainer.policy_learner, trainer.value_learner):
        for key, tensor in gathered(learner.module):
            tensors[f"new.{learner.name}.{key}"] = tensor.clone()
    if world.rank == 0:
        save_file({k: v.contiguous() for k, v in tensors.items()}, out / f"{case}.safetensors")
    keep = {k: v for k, v in metrics.items() if not k.startswith(("time/", "rollout/tokens_per_s", "rollout/idle"))}
    return {"metrics": keep, "dtypes": sorted(dtypes)}


def whole(model):
    return {name: tensor.clone() for name, tensor in gathered(model)}


def main(folder, out):
    world = start(device="cpu", timeout_s=120)
    found = {"rank_rows": {}}
    for how in ("even", "ragged", "empty"):
        found[how] = step(how, folder, out, world, how)
    found["no checkpointing"] = step(
        "no checkpointing", folder, out, world, "even", dataclasses.replace(FULL32, checkpoint_layers=False)
    )
    found["no reshard"] = step("no reshard", folder, out, world, "ragged", dataclasses.replace(FULL32, reshard_after_forward=False))
    found["offload"] = step("offload", folder, out, world, "ragged", dataclasses.replace(FULL32, offload=True))
    found["bfloat16"] = step("bfloat16", folder, out, world, "ragged", dataclasses.replace(FULL32, compute_dtype="bfloat16"))
    once = replace_fields(CONFIG, {"policy.micro_batch_tokens": 1000, "value.micro_batch_tokens": 1000})
    step("bfloat16 at once", folder, out, world, "even", dataclasses.replace(FULL32, compute_dtype="bfloat16"), algo=once)
    for how in ("ragged", "empty"):
        found[f"constant {how}"] = step(f"constant {how}", folder, out, world, how, algo=CONSTANT)
    two = replace_fields(CONFIG, {"policy.epochs": 2, "value.epochs": 2})
    found["two epochs"] = step("two epochs", folder, out, world, "ragged", algo=two)

    # What was loaded is what the files hold, row by row, and what is gathered again.
    policy, value = fresh(folder, world, FULL32)
    files = {name: load_file(file)[name] for name, file in weight_files(folder / "policy").items()}
    mine = whole(policy)
    found["files"] = len(set(weight_files(folder / "policy").values()))
    found["gathered is the file"] = all(torch.equal(files[name], tensor) for name, tensor in mine.items()) and set(mine) <= set(
        files
    )
    files = {name: load_file(file)[name] for name, file in weight_files(folder / "value").items()}
    mine = whole(value)
    found["value gathered is the file"] = all(torch.equal(files[name], tensor) for name, tensor in mine.items()) and set(
        mine
    ) == set(files)
    found["checksum"] = checksum(policy)
    found["sum of |w|"] = sum(float(t.double().abs().sum()) for t in whole(policy).values())
    buffers = {name: b for name, b in policy.named_buffers()}
    found["buffers"] = {name: [b.device.type, float(b.double().sum())] for name, b in buffers.items()}

    # A value model from a policy's folder: the backbone is the policy's, the head depends on the seed alone.
    head = load_sharded(ValueModel, folder / "policy", world, FULL32, seed=5)
    other = load_sharded(ValueModel, folder / "policy", world, FULL32, seed=6)
    tensors, others = whole(head), whole(other)
    names = [name for name in tensors if name.startswith(("score.", "classifier."))]
    found["heads"] = names
    found["heads differ by seed"] = not torch.equal(tensors[names[0]], others[names[0]])
    policy_files = {name: load_file(file)[name] for name, file in weight_files(folder / "policy").items()}
    found["backbone is the policy's"] = all(torch.equal(policy_files[n], t) for n, t in tensors.items() if n not in names)
    if world.rank == 0:
        save_file({name: tensors[name].contiguous() for name in names}, out / "head.safetensors")

    # Random weights from a config.json are the same on any number of ranks.
    random = load_sharded(PolicyModel, folder / "policy" / "config.json", world, FULL32, seed=3)
    tensors = whole(random)
    if world.rank == 0:
        save_file({n: t.contiguous() for n, t in tensors.items()}, out / "random.safetensors")

    try:
        load_sharded(PolicyModel, folder / "lacking", world, FULL32)
        found["lacking"] = "nothing was raised"
    except UserError as error:
        found["lacking"] = str(error)
    for name in ("scaled", "broken"):
        try:
            load_sharded(PolicyModel, folder / name, world, FULL32)
            found[name] = "nothing was raised"
        except UserError as error:
            found[name] = str(error)
    if world.rank == 0:
        (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
