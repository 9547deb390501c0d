"""One rank of the tests of context parallelism: models whose rows are shared against whole ones. Started by run_ranks; no vLLM.

context_worker.py OUT CONTEXT     OUT/found.json from rank 0; CONTEXT: ranks that share their rows

Each data-parallel group has a batch of its own in every case. The whole models, in float64 as the shared ones are, are fed all groups'
batches on one rank and know of no group; FSDP's reductions are in float64 here, so that only a mistake is further off than rounding.
"""

from __future__ import annotations

import copy
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

from scale import sharding
from scale.config import ShardingConfig
from scale.context import SharedScorer, context_of, refuse_other_rows
from scale.distributed import Collective, World, start
from tppo_ref.method.records import Prompt, Response, WindowSlice
from tppo_ref.rollout.attention import PrefixKeys
from tppo_ref.rollout.models import PolicyModel, ValueModel
from tppo_ref.rollout.packing import TokenBatch

VOCAB, END = 31, 0
LENGTHS = {
    "a mixture": [(3, 17), (1, 4), (5, 1), (2, 9)],
    "rows that end where pieces do": [(2, 6), (3, 5), (1, 7), (4, 4)],
    "one long row": [(4, 40)],
    "fewer tokens than ranks": [(1, 1)],
    "no row": [],
}
LIVE = {"a constant prefix": [(3, 17, 12), (1, 4, 0), (5, 9, 9), (2, 9, 3)], "a prefix of nothing": [(1, 5, 0)]}


def whole_models() -> dict[str, Any]:
    """A policy, and a value model of another size with fewer key heads than ranks; in float64, of weights of a useful size."""
    shape = dict(
        model_type="qwen2", vocab_size=VOCAB, max_position_embeddings=64, num_labels=1, pad_token_id=None, tie_word_embeddings=False
    )
    sizes = {
        "policy": dict(hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
        "value": dict(hidden_size=32, intermediate_size=28, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=1),
    }
    models: dict[str, Any] = {}
    for seed, (name, auto) in enumerate({"policy": AutoModelForCausalLM, "value": AutoModelForTokenClassification}.items()):
        torch.manual_seed(seed)
        hf = auto.from_config(AutoConfig.for_model(**shape, **sizes[name])).double()
        with torch.no_grad():
            for p in hf.parameters():
                p.add_(torch.randn(p.shape, dtype=p.dtype) * 0.3)
        models[name] = hf
    sampling = dict(temperature=0.7, min_response_tokens=3, end_token_ids=(END,), logit_chunk_tokens=5)
    return {"policy": PolicyModel(models["policy"], **sampling), "value": ValueModel(models["value"])}


def batch_of(case: str, group: int, prefix: PrefixKeys | None = None) -> TokenBatch:
    """The batch of a data-parallel group; of the second one the rows are in another order, and one more is there."""
    rng = random.Random(f"{case} {group}")
    rows = [(*row, None)[:3] for row in (LENGTHS | LIVE)[case]]
    if group:
        rows = [*reversed(rows), *rows[:1]]
    prompts = [[rng.randrange(1, VOCAB) for _ in range(prompt)] for prompt, _, _ in rows]
    responses = [[rng.randrange(1, VOCAB) for _ in range(response)] for _, response, _ in rows]
    live = [live or 0 for _, _, live in rows] if case in LIVE else None
    return TokenBatch(prompts, responses, live, prefix)


def outputs(model: Any, batch: TokenBatch) -> list[torch.Tensor]:
    out = model(batch)
    return list(out) if isinstance(out, tuple) else [out]


def loss_of(outs: list[torch.Tensor]) -> torch.Tensor:
    """A sum with weights of all sizes, so that no token's gradient hides behind another's."""
    return sum((x * torch.linspace(0.3, 1.7, x.numel(), dtype=x.dtype).reshape(x.shape).cos()).sum() for x in outs)  # type: ignore


def gradients(model: Any) -> list[torch.Tensor]:
    return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in model.parameters()]


def gap(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> float:
    assert [x.shape for x in ours] == [x.shape for x in theirs]
    return max((float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True) if a.numel()), default=0.0)


def compare(case: str, whole: Any, shared: Any, world: World) -> dict[str, float]:
    """Outputs of this rank's group, and gradients of all groups' losses: shared against whole."""
    expected, got = [], []
    kept = PrefixKeys() if case in LIVE else None
    for group in range(world.data_world):
        outs = outputs(whole, batch_of(case, group))
        loss_of(outs).backward()
        if group == world.data_rank:
            expected = outs
    with torch.no_grad():  # as before an update: fills the prefix that the update then uses
        before = outputs(shared, batch_of(case, world.data_rank, kept))
    got = outputs(shared, batch_of(case, world.data_rank, kept))
    (loss_of(got) * Collective(world).loss_scale).backward()
    theirs, ours = gradients(whole), gradients(shared)
    found = {"outputs": max(gap(got, expected), gap(before, expected)), "gradients": gap(ours, theirs),
             "largest": max(float(x.abs().max()) for x in theirs)}  # fmt: skip
    whole.zero_grad(set_to_none=True), shared.zero_grad(set_to_none=True)
    return found


def seen_by(model: Any, batch: TokenBatch) -> dict[str, Any]:
    """Tokens that this rank embeds, and the heads and tokens that its attention kernel is given, of one batch."""
    from tppo_ref.rollout import kernels

    tokens, attended = [], []
    hook = model.hf.get_input_embeddings().register_forward_hook(lambda module, inputs, out: tokens.append(inputs[0].numel()))
    real = kernels.sdpa
    kernels.sdpa = lambda q, k, v, *args, **named: (
        attended.append([q.shape[1], k.shape[1], q.shape[2]]) or real(q, k, v, *args, **named)
    )
    with torch.no_grad():
        model(batch)
    hook.remove()
    kernels.sdpa = real
    return {"embedded": tokens, "attended": attended[0]}


def rows_and_scores(world: World) -> dict[str, Any]:
    """What the group makes of other rows, and whose scores are taken."""
    context = context_of(world)
    prompt = Prompt(id=0, token_ids=(1,), answer="")
    response = Response(id=4, prompt=prompt, sample_index=0, token_ids=[2, 3], logprobs=[-1.0, -1.0], versions=[0, 0])
    same = [WindowSlice(response, 0, 2)]
    refuse_other_rows(same, context)
    response.token_ids[1] += world.rank % world.context_parallel  # one token is another on each rank of the group
    try:
        refuse_other_rows(same, context)
        refused = "nothing was raised"
    except RuntimeError as error:
        refused = str(error)
    asked: list[int] = []

    class Verifier:
        def submit(self, id: int, *rest: Any) -> None:
            asked.append(id)

        def collect(self) -> dict[int, Any]:
            return {id: SimpleNamespace(value=world.rank + 0.5, status="ok") for id in asked}

    scorer = SharedScorer.__new__(SharedScorer)
    scorer.context, scorer.verifier, scorer.task = context, Verifier(), SimpleNamespace(response_text=lambda ids: None)  # type: ignore
    scorer.submit(response)
    return {"refused": refused, "scores": {str(id): score for id, (score, _) in scorer.collect().items()}, "asked": asked}


def main(out: Path, context_parallel: int) -> None:
    torch.set_num_threads(1)
    # Here and not above: a test that imports this file must not change what is behind it.
    sharding.MixedPrecisionPolicy = lambda param_dtype, reduce_dtype: MixedPrecisionPolicy(param_dtype, torch.float64)  # type: ignore
    world = start(device="cpu", timeout_s=120, tensor_parallel=context_parallel, context_parallel=context_parallel)
    whole = whole_models()
    shared = copy.deepcopy(whole)
    for model in shared.values():
        sharding.shard(model, init_device_mesh("cpu", (world.world,)), ShardingConfig(compute_dtype="float64"),
                       context=context_of(world))  # fmt: skip
    everyone = Collective(world.flat)
    found: dict[str, Any] = {"cases": {}}
    for case in (*LENGTHS, *LIVE):
        for name in whole:
            if name == "value" and case in LIVE and world.data_world > 1:
                continue  # a pass more than it need be
            ranks = everyone.gather_objects(compare(case, whole[name], shared[name], world))
            found["cases"][f"{name}, {case}"] = {key: max(rank[key] for rank in ranks) for key in ranks[0]}
    for name, model in shared.items():
        found[f"seen by {name}"] = everyone.gather_objects(seen_by(model, batch_of("a mixture", 0)))
    found |= {key: everyone.gather_objects(thing) for key, thing in rows_and_scores(world).items()}
    parallel = Collective(world)
    found["first"], found["leads"] = everyone.gather_objects(parallel.first), everyone.gather_objects(parallel.leads)
    found["ranks"] = everyone.gather_objects([parallel.rank, parallel.world, parallel.loss_scale])
    found["sum"], found["max"] = (
        everyone.gather_objects(parallel.sum([10.0**parallel.rank])),
        everyone.gather_objects(parallel.max([world.rank])),
    )
    found["gathered"] = everyone.gather_objects(parallel.gather_objects(f"rows {parallel.rank}"))
    moved = parallel.rebalance([f"thing {i}" for i in range(4)] if parallel.rank == 0 else [], [5] * 4 if parallel.rank == 0 else [],
                               [True] * 4 if parallel.rank == 0 else [])  # fmt: skip
    found["moved"] = everyone.gather_objects(moved)
    if world.rank == 0:
        (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
