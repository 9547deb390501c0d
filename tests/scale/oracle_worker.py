"""One rank of the whole-step oracle: scale's sharded models and `Collective` under the Trainer, the oracle on rank 0. Started by run_ranks.

oracle_worker.py OUT CONTEXT [--wrong] METHOD...     OUT/METHOD.json: per step what the Trainer reports; a step that is not the oracle's
                                                     ends the rank. CONTEXT: ranks that share their rows. --wrong: gradients are
                                                     averaged over ranks where they should be summed

Every rank decodes its own slots, ended responses move between ranks, gradients and norms are reduced over them. What the ranks
recorded is put together into one window and one plan, and the oracle, which knows of no ranks, plays the step alone.

FSDP's reductions are in float64 here, as the models are, so that only a wrong step is further from the oracle than rounding.
"""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))  # behind the checkout: a folder of tests/ is named scale too

import torch
from oracle import Plan, Window
from oracle_stage import MixedScorer, Recorded, Stage, make_config, real_engine, real_models
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy

from scale import sharding
from scale.config import ShardingConfig
from scale.context import context_of
from scale.distributed import Collective, World, start
from tppo_ref.runs.config import Config

SMALL: dict[str, Any] = {
    "rollout.slots": 6, "rollout.window": 4, "rollout.max_response_tokens": 10, "advantage.tail_tokens": 1, "policy.lr": 0.02,
    "policy.mini_batch_tokens": 0, "policy.mini_batches": 2, "value.lr": 0.02, "value.mini_batch_tokens": 0, "value.mini_batches": 2,
    "policy.engine_gap_limit": 1.0, "policy.micro_batch_tokens": 25, "value.micro_batch_tokens": 25, "policy.max_grad_norm": 0.3,
    "policy.epochs": 2, "value.epochs": 2, "policy.weight_decay": 0.1,
}  # fmt: skip
FURTHER = {
    "tppo-once": {"policy.prefix": "constant"},  # so that a constant prefix is seen on ranks, too
    "grpo": {"rollout.samples_per_prompt": 2}, "rloo-window": {"rollout.samples_per_prompt": 2, "rollout.window": 5},
}  # fmt: skip


class RecordingCollective(Collective):
    """Says where one optimiser step ends and the next begins."""

    def __init__(self, world: World, events: list[Any]):
        super().__init__(world)
        self.events = events

    def grad_norm(self, module: Recorded, max_norm: float) -> float:
        self.events.append((module.name, "update"))
        return super().grad_norm(module, max_norm)


class RankStage(Stage):
    """This rank's Trainer; on rank 0 the oracle too."""

    def __init__(self, config: Config, world: World):
        policy, value, by_hand = real_models(config)
        engine = real_engine(config, copy.deepcopy(policy), world.data_world)
        averaged = copy.deepcopy(policy) if config.policy.ewma_decay else None
        mesh = init_device_mesh("cpu", (world.world,))
        for model in (policy, value, averaged):
            if model is not None:
                sharding.shard(model, mesh, ShardingConfig(compute_dtype="float64"), context=context_of(world))
        self.stored: dict[int, tuple[list[float], int]] = {}
        super().__init__(config, policy=policy, value=value, engine=engine, by_hand=by_hand, averaged=averaged,
                         parallel=lambda events: RecordingCollective(world, events))  # fmt: skip

    def step(self) -> dict[str, float]:
        self.events.clear()
        metrics = self.trainer.step()
        gather = self.trainer.parallel.gather_objects
        windows: list[Window] = gather(self.last_window)
        plans: list[Plan] = gather(self._plan())
        seen = [s.response for s in self.trainer.slices]
        if self.value is None:  # those that were held are in no slice of this window, and may have moved out of one
            seen += self.rows
        for rank in gather([(r.id, r.values, r.num_settled) for r in seen]):
            for i, values, num_settled in rank:
                self.stored[i] = values, max(num_settled, self.stored.get(i, ([], 0))[1])
        self.whole = {id(module): [(name, p.full_tensor()) for name, p in module.named_parameters()]
                      for module in (self.policy, self.value, *self.policy.copies) if module}  # fmt: skip
        assert len({json.dumps({k: x for k, x in m.items() if not k.startswith("time/")}) for m in gather(metrics)}) == 1
        if self.trainer.parallel.rank == 0:
            self._by_the_oracle(metrics, windows, plans)
        return metrics

    def _by_the_oracle(self, metrics: dict[str, float], windows: list[Window], plans: list[Plan]) -> None:
        slices = [pair for window in windows for pair in window.slices]
        num_steps = max(window.num_steps for window in windows)
        slot_steps = sum(window.slots / len(windows) * window.num_steps for window in windows)
        window = Window(slices, [stay for w in windows for stay in w.busy], slot_steps / num_steps, num_steps)  # type: ignore[arg-type]
        together = [[[i for part in parts for i in part] for parts in zip(*(getattr(plan, which) for plan in plans), strict=True)]
                    for which in ("policy", "value")]  # fmt: skip
        recomputed = [i for plan in plans for i in plan.recomputed]
        scores = {r.id: MixedScorer.verdict(r.token_ids) for r, _ in slices if r.ended}
        self._compare(metrics, self.oracle.step(window, Plan(*together, recomputed), scores))

    def _weights(self, module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
        return self.whole[id(module)]

    def _stored(self) -> dict[int, tuple[list[float], int]]:
        return self.stored


def main(out: Path, context_parallel: int, methods: list[str]) -> None:
    wrong, methods = "--wrong" in methods, [method for method in methods if method != "--wrong"]
    torch.set_num_threads(1)
    # Here and not above, where whoever imports this file would have it, too.
    sharding.MixedPrecisionPolicy = lambda param_dtype, reduce_dtype: MixedPrecisionPolicy(param_dtype, torch.float64)  # type: ignore
    world = start(device="cpu", timeout_s=120, tensor_parallel=context_parallel, context_parallel=context_parallel)
    for method in methods:
        stage = RankStage(make_config(SMALL | FURTHER.get(method, {}), method), world)
        if wrong:
            stage.trainer.parallel.loss_scale = 1.0
        steps, moved = [], 0
        for _ in range(3):
            steps.append(stage.step())
            moved += len({r.id for r in stage.rows} - stage.live.keys())
        moved = sum(stage.trainer.parallel.gather_objects(moved))
        if world.rank == 0:
            (out / f"{method}.json").write_text(json.dumps({"steps": steps, "moved": moved}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
