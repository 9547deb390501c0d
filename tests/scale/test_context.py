"""Context parallelism: ranks that share their rows compute what one rank computes, each a part of it, and nobody else knows.

`context_worker.py` does everything that needs ranks, over gloo, in float64; no vLLM. What the Trainer makes of it is the whole-step
oracle's to say (test_whole_step_on_ranks.py).
"""

from __future__ import annotations

import ast
import csv
import json
from pathlib import Path

import pytest
from context_worker import LENGTHS, LIVE
from scale_helpers import HERE, ROOT, arguments, launch, metrics_of, one_error, responses_of, run_ranks

from scale.config import ScaleConfig, check
from scale.context import check_heads
from tppo_ref.method.errors import UserError
from tppo_ref.runs.parsing import parse, replace_fields

RANKS = {"2 ranks": (2, 2), "2 x 2 ranks": (4, 2), "4 ranks": (4, 4)}  # (all, those that share their rows)
TOLERANCE = 1e-9


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What context_worker.py found, run once for each kind of group."""
    kept = {}

    def of(ranks: str):
        if ranks not in kept:
            out, (world, sharing) = tmp_path_factory.mktemp("context"), RANKS[ranks]
            run_ranks(HERE / "context_worker.py", world, [str(out), str(sharing)])
            kept[ranks] = json.loads((out / "found.json").read_text())
        return kept[ranks]

    return of


# ---------------------------------------------------------------------------------------------------------------- the models


@pytest.mark.parametrize("name", ["policy", "value"])
@pytest.mark.parametrize("ranks", RANKS)
def test_outputs_and_gradients_are_one_ranks(found, ranks, name):
    """Log-probabilities, values, last values and every parameter's gradient, for mixtures of lengths, rows that a piece's edge cuts or
    meets, padding, no row, a constant prefix kept from the pass before. The value model has other sizes, and one key head."""
    cases = {case: gaps for case, gaps in found(ranks)["cases"].items() if case.startswith(name)}
    assert len(cases) >= len(LENGTHS)
    for case, gaps in cases.items():
        assert gaps["outputs"] < TOLERANCE, case
        assert gaps["gradients"] < TOLERANCE, case


@pytest.mark.parametrize("ranks", RANKS)
def test_the_gradients_are_large_against_the_tolerance(found, ranks):
    cases = {case: gaps["largest"] for case, gaps in found(ranks)["cases"].items()}
    assert {case.partition(", ")[2] for case in cases} == {*LENGTHS, *LIVE}
    assert all(largest > 1e6 * TOLERANCE for case, largest in cases.items() if not case.endswith("no row")), cases


@pytest.mark.parametrize("ranks", RANKS)
def test_each_rank_computes_its_part_and_no_more(found, ranks):
    """Else nothing would be gained: equal results alone could come from ranks that all compute everything."""
    _, sharing = RANKS[ranks]
    fed = sum(prompt + response for prompt, response in LENGTHS["a mixture"])
    for name, heads, key_heads in (("policy", 4, 2), ("value", 8, 1)):
        for rank in found(ranks)[f"seen by {name}"]:
            assert rank["embedded"] == [-(-fed // sharing)]
            assert rank["attended"][:2] == [heads // sharing, max(1, key_heads // sharing)]
            assert rank["attended"][2] == 20, "attention sees whole rows"


# ------------------------------------------------------------------------------------------------------- rows, scores, counts


@pytest.mark.parametrize("ranks", RANKS)
def test_each_row_counts_once(found, ranks):
    """Of two data-parallel groups the sum of 1 and 10 is 11 on every rank; what decides for all is over all ranks."""
    (world, sharing), seen = RANKS[ranks], found(ranks)
    groups = world // sharing
    assert seen["ranks"] == [[rank // sharing, groups, world] for rank in range(world)]
    assert seen["sum"] == [[sum(10.0**group for group in range(groups))]] * world
    assert seen["max"] == [[world - 1]] * world
    assert seen["gathered"] == [[f"rows {group}" for group in range(groups)]] * world
    assert seen["first"] == [rank == 0 for rank in range(world)]
    assert seen["leads"] == [rank % sharing == 0 for rank in range(world)]


def test_what_moves_between_groups_moves_to_all_of_their_ranks(found):
    moved = found("2 x 2 ranks")["moved"]
    assert moved[0] == moved[1]
    assert moved[2] == moved[3]
    assert len(moved[0]) == len(moved[2]) == 2
    assert sorted(moved[0] + moved[2]) == [f"thing {i}" for i in range(4)]


@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_that_decoded_different_rows_stop(found, ranks):
    assert all("decoded different responses" in refused for refused in found(ranks)["refused"])


@pytest.mark.parametrize("ranks", RANKS)
def test_the_first_rank_of_a_group_asks_the_verifier_for_all(found, ranks):
    world, sharing = RANKS[ranks]
    assert found(ranks)["asked"] == [[4] if rank % sharing == 0 else [] for rank in range(world)]
    assert found(ranks)["scores"] == [{"4": rank // sharing * sharing + 0.5} for rank in range(world)]


# ------------------------------------------------------------------------------------------------------------------- whole runs


SHARED = ("--engine.tensor_parallel", "2", "--sharding.context_parallel", "2")


@pytest.fixture(scope="module")
def runs(model, problems, tmp_path_factory):
    """The same run by one rank, and by two that share its rows; then both for two steps more, on the other's ranks."""
    out = {name: tmp_path_factory.mktemp("runs") / name for name in ("one", "two")}
    commands = {"one": ((), 1), "two": (SHARED, 2)}
    resumed = ("--algo.run.resume", "true")
    for name, steps, more in (("one", 2, ()), ("two", 2, ()), ("one", 4, resumed), ("two", 4, resumed)):
        other = {"one": "two", "two": "one"}[name] if more else name
        options, ranks = commands[other]
        done = launch(*arguments(model, problems, out[name], *options, *more, ranks=ranks, steps=steps))
        assert done.returncode == 0, done.stderr[-2000:]
    return out


def test_two_ranks_that_share_rows_make_one_ranks_run(runs):
    """Every metric of every step, also once each checkpoint went on where the other was written: a run does not know."""
    one, two = (metrics_of(runs[name]) for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two, strict=True):
        assert set(a) == set(b)
        for key in a:
            if not key.startswith(("time/", "mfu/", "rollout/tokens_per_s", "rollout/idle", "memory/")):
                assert (b[key] is None) == (a[key] is None), key  # a mean of nothing
                assert b[key] is None or b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-5), key
    assert any(row["policy/updates"] > 0 for row in one)
    assert responses_of(runs["one"])
    assert [r["response"] for r in responses_of(runs["one"])] == [r["response"] for r in responses_of(runs["two"])]


def test_a_checkpoint_holds_each_row_once(runs):
    for name in runs:
        for checkpoint in (runs[name] / "checkpoints").iterdir():
            assert [file.name for file in checkpoint.glob("rank-*.json")] == ["rank-00000.json"]


def test_value_pretraining_by_two_ranks_that_share_rows_is_one_ranks(model, problems, tmp_path):
    reports = {}
    for name, options, ranks in (("one", (), 1), ("two", SHARED, 2)):
        few = ("--algo.value.pretrain_responses", "16", "--algo.value.pretrain_epochs", "1")
        done = launch("pretrain-value", *arguments(model, problems, tmp_path / name, *options, *few, ranks=ranks))
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count("value model: ") == 1, "one rank speaks"
        assert [file.name for file in (tmp_path / name).glob("responses*.jsonl")] == ["responses.jsonl"]
        with (tmp_path / name / "explained_variance.csv").open() as file:
            reports[name] = [[float(x or "nan") for x in row.values()] for row in csv.DictReader(file)]
    assert len(reports["one"]) >= 2
    for one, two in zip(reports["one"], reports["two"], strict=True):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5, nan_ok=True)


# ------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("heads", "key_heads", "sharing"), [(40, 8, 4), (40, 8, 40), (40, 8, 8), (4, 2, 4), (6, 3, 3), (8, 1, 2)])
def test_heads_that_can_be_dealt(heads, key_heads, sharing):
    check_heads("sharding.context_parallel", "policy", heads, key_heads, sharing)


@pytest.mark.parametrize(("heads", "key_heads", "sharing"), [(40, 8, 3), (40, 8, 16), (40, 8, 20), (6, 3, 2), (12, 4, 6)])
def test_heads_that_cannot_be_dealt_are_refused_with_what_could_be(heads, key_heads, sharing):
    with pytest.raises(UserError, match=rf"^sharding.context_parallel: got {sharing}; expected one of 1, .* {heads} heads"):
        check_heads("sharding.context_parallel", "policy", heads, key_heads, sharing)


def test_ranks_that_share_rows_share_an_engine():
    config = parse(ScaleConfig, ["--config", str(ROOT / "scale/configs/cpu-tiny.yaml")], prog="test")
    good = {"cluster.devices_per_node": 4, "engine.tensor_parallel": 4, "sharding.context_parallel": 2}
    assert check(replace_fields(config, good)).sharding.context_parallel == 2
    with pytest.raises(UserError, match=r"^sharding.context_parallel: got 4; expected a divisor of engine.tensor_parallel \(2\)"):
        check(replace_fields(config, good | {"engine.tensor_parallel": 2, "sharding.context_parallel": 4}))


def test_a_run_that_cannot_share_its_rows_ends_in_one_line(model, problems, tmp_path):
    """The tiny model has two key heads and four heads; the launcher starts three ranks of one engine."""
    options = ("--engine.tensor_parallel", "3", "--sharding.context_parallel", "3", "--algo.rollout.slots", "9")
    done = launch(*arguments(model, problems, tmp_path / "run", *options, ranks=3))
    one_error(done, "sharding.context_parallel: got 3; expected one of 1, 2, 4", "policy's 4 heads and 2 key-value heads")
    done = launch(*arguments(model, problems, tmp_path / "run", "--engine.tensor_parallel", "2", ranks=2))
    one_error(done, "engine.tensor_parallel: got 2; expected 1, sharding.context_parallel, with engine.kind torch")


# ---------------------------------------------------------------------------------------------------------------- who knows of it


def names_in(path: Path) -> set[str]:
    """What a source reads off other objects, imports, and takes as an argument; no prose."""
    names = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        names |= {str(getattr(node, field)) for field in ("attr", "arg", "module") if getattr(node, field, None)}
        names |= {alias.name for alias in getattr(node, "names", []) if isinstance(alias, ast.alias)}
    return names


def test_the_trainer_does_not_know():
    """Neither the loop nor the method has a word for it; of `Parallel` they read what they read before there was one."""
    loop = [p for wing in ("method", "loop") for p in (ROOT / "tppo_ref" / wing).glob("*.py") if p.name != "parallel.py"]
    assert len(loop) > 15
    for path in loop:
        assert not names_in(path) & {"leads", "first", "context_parallel", "data_rank", "Context", "Packed"}, path.name
    sources = [*(ROOT / "tppo_ref" / "rollout").glob("*.py"), *(ROOT / "tppo_ref" / "loop").glob("*.py")]
    assert not any("context_parallel" in path.read_text() for path in sources)
