"""FSDP2 over tppo_ref's modules: the same recorded rows give the same update on 1, 2 and 4 ranks, and on no ranks at all.

`sharding_worker.py` does everything that needs ranks, over gloo; no vLLM. The other oracle is tppo_ref's own unsharded model.
"""

from __future__ import annotations

import json
import math
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file
from scale_helpers import HERE, make_model, run_ranks
from sharding_worker import CONFIG, CONSTANT, Replay
from transformers import GraniteConfig, GraniteForCausalLM

from tppo_ref.loop.trainer import Trainer
from tppo_ref.method.records import End, Prompt, Response
from tppo_ref.rollout.models import load_policy, load_value_model

TOLERANCE = 1e-5
CASES = ("even", "ragged", "empty", "no checkpointing", "no reshard", "offload")
SIZES = dict(
    vocab=67, end=1, hidden_size=36, intermediate_size=50, num_attention_heads=2, num_key_value_heads=1
)  # uneven over 2 and 4


def recorded_rows(seed: int = 0) -> list[Response]:
    """Nine responses of 1 to 24 tokens, four of them ended, some continued from an earlier window."""
    rng = random.Random(seed)
    rows = []
    for id, (length, begin) in enumerate([(24, 16), (8, 0), (3, 0), (16, 8), (1, 0), (11, 8), (5, 0), (8, 0), (20, 16)]):
        end = [End.RUNNING, End.RUNNING, End.END_TOKEN, End.LENGTH_CAP][id % 4] if length < 20 else End.LENGTH_CAP
        tokens = [rng.randrange(2, 67) for _ in range(length)]
        prompt = Prompt(id=id, token_ids=tuple(rng.randrange(2, 67) for _ in range(1 + id)), answer="")
        rows.append(Response(id=id, prompt=prompt, sample_index=0, token_ids=tokens, logprobs=[-4 + rng.random() for _ in tokens],
                             versions=[0] * length, values=[rng.random() for _ in range(begin)], window_starts=sorted({0, begin}), end=end,
                             score=rng.choice([-1.0, 1.0]) if end is not End.RUNNING else None, num_settled=begin))  # fmt: skip
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharding")
    made = make_model(folder / "whole", tied=False, **SIZES)
    policy = load_policy(str(made))
    policy.hf.save_pretrained(folder / "policy", max_shard_size="30KB")  # many files
    value = load_value_model(str(made), seed=1)
    value.hf.save_pretrained(folder / "value", max_shard_size="30KB")
    (folder / "rows.json").write_text(json.dumps([r.state_dict() for r in recorded_rows()]))
    torch.manual_seed(0)
    shape = dict(
        vocab_size=67, hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    GraniteForCausalLM(GraniteConfig(**shape, logits_scaling=3.0, initializer_range=0.5)).save_pretrained(folder / "scaled")
    policy.hf.model.norm.weight.data[3] = math.nan
    policy.hf.save_pretrained(folder / "broken")
    shutil.copytree(folder / "policy", folder / "lacking")
    index = json.loads((folder / "lacking/model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / "lacking/model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """By number of ranks, which run when a test asks for them: (found.json, {case: tensors})."""

    class Results(dict):
        def __missing__(self, world):
            out = folder / f"out{world}"
            out.mkdir()
            run_ranks(HERE / "sharding_worker.py", world, [str(folder), str(out)])
            tensors = {f.stem: load_file(f) for f in out.glob("*.safetensors")}
            self[world] = json.loads((out / "found.json").read_text()), tensors
            return self[world]

    return Results()


@pytest.fixture(scope="module")
def plain(folder):
    return unsharded(folder, CONFIG)


def unsharded(folder, algo):
    """One step of tppo_ref's Trainer on unsharded models: gradients before the clip, weights after, metrics."""
    policy = load_policy(str(folder / "policy"), end_token_ids=(1,))
    value = load_value_model(str(folder / "value"))
    replay = Replay(recorded_rows())
    trainer = Trainer(algo, policy=policy, value=value, engine=replay, batcher=replay, scorer=replay)
    tensors = {}
    for learner in (trainer.policy_learner, trainer.value_learner):
        for group in learner.optimiser.param_groups:
            group["eps"] = 1e-3
    real = trainer.parallel.grad_norm

    def grad_norm(module, max_norm):
        name = "policy" if module is policy else "value"
        tensors.update({f"grad.{name}.{key}": p.grad.clone() for key, p in module.hf.named_parameters()})
        return real(module, max_norm)

    trainer.parallel.grad_norm = grad_norm
    metrics = trainer.step()
    for name, module in (("policy", policy), ("value", value)):
        tensors.update({f"new.{name}.{key}": p.detach().clone() for key, p in module.hf.named_parameters()})
    return metrics, tensors


def furthest(a, b, prefix):
    assert {k for k in a if k.startswith(prefix)} == {k for k in b if k.startswith(prefix)} != set()
    return max(float((a[k] - b[k]).abs().max()) for k in a if k.startswith(prefix))


@pytest.mark.parametrize("what", ["grad.policy", "grad.value", "new.policy", "new.value"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_makes_the_update_that_unsharded_models_make(results, plain, world, case, what):
    assert furthest(results[world][1][case], plain[1], what) < TOLERANCE


@pytest.mark.parametrize("name", ["policy", "value"])
def test_the_gradients_are_large_against_the_tolerance(plain, name):
    """Else the test above would hold for gradients of nothing."""
    assert max(float(t.abs().max()) for k, t in plain[1].items() if k.startswith(f"grad.{name}")) > 100 * TOLERANCE
    assert all(float(t.abs().max()) > 0 for k, t in plain[1].items() if k.startswith(f"grad.{name}") and "embed" not in k)


@pytest.mark.parametrize("what", ["grad.policy", "grad.value", "new.policy", "new.value"])
@pytest.mark.parametrize("how", ["ragged", "empty"])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_constant_prefix_is_read_by_all_ranks_or_none_and_gives_the_gradient_of_one(results, folder, plain, world, how, what):
    """Activation checkpointing is on: layers are computed again in the backward pass, against the keys that were kept."""
    one = unsharded(folder, CONSTANT)[1]
    assert furthest(results[world][1][f"constant {how}"], one, what) < TOLERANCE
    assert furthest(one, plain[1], "grad.policy") > 10 * TOLERANCE, "the prefix carried no gradient anyway"


@pytest.mark.parametrize("world", [2, 4])
def test_two_epochs_agree_too(results, world):
    for what in ("new.policy", "new.value"):
        assert furthest(results[world][1]["two epochs"], results[1][1]["two epochs"], what) < TOLERANCE
    assert furthest(results[1][1]["two epochs"], results[1][1]["even"], "new.policy") > 10 * TOLERANCE, (
        "the second epoch did nothing"
    )


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_metric_of_the_step_agrees(results, plain, world, case):
    """Losses, gradient norms, whitening, explained variance, the ledger. Rank counts are not metrics."""
    found = results[world][0][case]["metrics"]
    timed = ("time/", "rollout/tokens_per_s", "rollout/idle")
    expected = {k: v for k, v in plain[0].items() if not k.startswith(timed)}
    assert set(found) == set(expected)
    for name, number in expected.items():
        assert found[name] == pytest.approx(number, rel=1e-4, abs=1e-5, nan_ok=True), name


@pytest.mark.parametrize("world", [1, 2, 4])
def test_masters_and_gradients_are_float32_whatever_computes(results, world):
    assert results[world][0]["bfloat16"]["dtypes"] == ["torch.float32"]
    got, exact = results[world][1]["bfloat16"], results[world][1]["ragged"]
    for name in ("policy", "value"):
        largest = max(float(t.abs().max()) for k, t in exact.items() if k.startswith(f"grad.{name}"))
        gap = furthest(got, exact, f"grad.{name}")
        assert 0 < gap < 0.1 * largest, "bfloat16 computes something else, or nothing in bfloat16"


@pytest.mark.parametrize("name", ["policy", "value"])
@pytest.mark.parametrize("world", [2, 4])
def test_what_ranks_computed_in_bfloat16_is_added_up_in_float32(results, world, name):
    """Each rank's gradient has 8 significant bits. Their sum needs more of them nearly everywhere, unless it was rounded to as many."""
    case = results[world][1]["bfloat16 at once"]
    gradient = torch.cat([tensor.flatten() for key, tensor in case.items() if key.startswith(f"grad.{name}")])
    gradient = gradient[gradient != 0]
    assert len(gradient) > 1000
    assert float((gradient != gradient.bfloat16().float()).double().mean()) > 0.3


@pytest.mark.parametrize("world", [1, 2, 4])
def test_loaded_row_by_row_and_gathered_again_it_is_the_file(results, world):
    found = results[world][0]
    assert found["files"] > 3
    assert found["gathered is the file"]
    assert found["value gathered is the file"]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_checksum_is_the_sum_of_absolute_weights(results, world):
    found = results[world][0]
    assert found["checksum"] == pytest.approx(found["sum of |w|"], rel=1e-9)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_buffers_that_meta_construction_lost_are_those_of_a_plain_model(results, folder, world):
    expected = {name: b for name, b in load_policy(str(folder / "policy")).named_buffers()}
    found = results[world][0]["buffers"]
    assert set(found) == set(expected) != set()
    for name, buffer in expected.items():
        assert found[name] == ["cpu", pytest.approx(float(buffer.double().sum()))]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_value_model_from_a_policy_has_its_backbone_and_the_seeds_head(results, world):
    found, tensors = results[world]
    assert found["backbone is the policy's"]
    assert found["heads differ by seed"]
    for name in found["heads"]:
        assert torch.equal(tensors["head"][name], results[1][1]["head"][name])
    assert max(float(t.abs().max()) for t in tensors["head"].values()) > 0


@pytest.mark.parametrize("world", [2, 4])
def test_random_weights_do_not_depend_on_the_number_of_ranks(results, world):
    for name, tensor in results[1][1]["random"].items():
        assert torch.equal(results[world][1]["random"][name], tensor), name


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_folder_that_lacks_a_tensor_is_named_with_it(results, world):
    assert "model.norm.weight" in results[world][0]["lacking"]
    assert "lacking" in results[world][0]["lacking"]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_folder_whose_plain_forward_says_something_else_is_refused(results, world):
    """Granite divides its logits behind the head, where the packed forward takes them; and weights that are not numbers."""
    assert "'granite' is not supported: packed and plain forward differ" in results[world][0]["scaled"]
    assert "give numbers that are not finite" in results[world][0]["broken"]
