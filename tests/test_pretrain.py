"""Value pre-training: which responses are held out, on any number of ranks, and what the report counts."""

from __future__ import annotations

import dataclasses
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers import END_ID, ToyScorer, make_policy, make_prompts, make_value
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tppo_ref.loop.parallel import SingleProcess
from tppo_ref.method.errors import UserError
from tppo_ref.method.records import Prompt
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.batcher import SampleStream, SuccessiveBatcher
from tppo_ref.rollout.models import load_value_model
from tppo_ref.rollout.torch_engine import TorchEngine
from tppo_ref.runs.build import make_task
from tppo_ref.runs.config import Config
from tppo_ref.runs.evaluate import Sampled, Sampler
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.pretrain import explained_by_position, fit_value, partition, pretrain_value, sample_responses


def config_of(responses: int, samples: int = 1) -> Config:
    return replace_fields(
        Config(), {"value.pretrain_responses": responses, "rollout.samples_per_prompt": samples, "run.progress": False}
    )


class Numbers:
    """A sampler of one of several ranks that answers with nothing but the samples' numbers and prompts."""

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world

    def __call__(self, prompts, *, samples_per_prompt, seed) -> Sampled:
        from tppo_ref.method.records import Response

        total = len(prompts) * samples_per_prompt
        stream = SampleStream(
            prompts, samples_per_prompt=samples_per_prompt, seed=seed, limit=total, rank=self.rank, world=self.world
        )
        found = []
        while (sample := stream.draw()) is not None:
            prompt, index = stream.prompt_of(sample)
            found.append(Response(id=sample, prompt=prompt, sample_index=index, token_ids=[1]))
        return Sampled(found, 0, [])


def prompts_of(texts: list[int]) -> list[Prompt]:
    return [Prompt(id=i, token_ids=(text, text + 1), answer="") for i, text in enumerate(texts)]


@settings(deadline=None)
@example(texts=[0, 0, 0, 0, 0, 1], wanted=18, samples=1, world=1)  # both texts are among the first fifth
@example(texts=[0, 0, 1, 1], wanted=30, samples=1, world=3)
@given(
    texts=st.lists(st.integers(0, 6), min_size=2, max_size=12),
    wanted=st.integers(2, 30),
    samples=st.integers(1, 4),
    world=st.integers(1, 5),
)
def test_no_prompt_is_on_both_sides_for_any_number_of_ranks(texts, wanted, samples, world):
    """By its text: a prompt that stands twice in a file is one prompt. And all ranks together have what one has alone."""
    config, prompts = config_of(wanted, samples), prompts_of(texts)

    def sides(world: int) -> tuple[set, set, list[int]]:
        fit, test, ids = set(), set(), []
        for rank in range(world):
            responses, held_out, _ = sample_responses(config, Numbers(rank, world), prompts)
            for response in responses:
                (test if response.prompt.token_ids in held_out else fit).add(response.prompt.token_ids)
            ids += [response.id for response in responses]
        return fit, test, sorted(ids)

    try:
        fit, test, ids = sides(world)
    except UserError as error:
        assert "expected at least 2 different ones" in str(error)  # noqa: PT017
        num_chosen = -(-wanted // max(samples, -(-wanted // len(texts))))
        assert num_chosen <= max(Counter(texts).values()), "they cannot all have been one"
        return
    assert len(fit | test) > 1
    assert not fit & test
    assert fit
    assert test
    assert ids == list(range(wanted))
    assert sides(1) == (fit, test, ids)
    everyone, held_out, _ = sample_responses(config, Numbers(0, 1), prompts)
    assert partition(config, prompts).num_fitted == sum(r.prompt.token_ids not in held_out for r in everyone)


@pytest.mark.parametrize(("task", "wanted", "held_out"), [("fork", 8192, 6630), ("chain", 8192, 5786)])
def test_where_prompts_repeat_most_responses_are_held_out(task, wanted, held_out):
    """So many as the command's own report counted (docs/log.md, 2026-11-22, studies of text)."""
    config = replace_fields(Config(), {"value.pretrain_responses": wanted, "task.name": task})
    assert wanted - partition(config, make_task(config).prompts("train")).num_fitted == held_out


def test_a_fifth_of_the_prompts_is_held_out_with_all_of_their_samples():
    responses, held_out, _ = sample_responses(config_of(40, samples=4), Numbers(0, 1), prompts_of(list(range(0, 60, 2))))
    test = [r for r in responses if r.prompt.token_ids in held_out]
    assert (len(responses), len({r.prompt.id for r in responses}), len(test), len(held_out)) == (40, 10, 8, 2)


@pytest.mark.parametrize(("texts", "wanted"), [([3, 3, 3], 9), ([1, 5, 9], 1)])
def test_one_prompt_cannot_be_held_out_and_fitted(texts, wanted):
    with pytest.raises(UserError, match=f"^value.pretrain_responses: got {wanted}, which are responses to 1 prompt; expected"):
        sample_responses(config_of(wanted), Numbers(0, 1), prompts_of(texts))


# --------------------------------------------------------------------------------------------------------- several ranks, in threads


class Together(SingleProcess):
    """Ranks that are threads: each waits for the others' numbers."""

    def __init__(self, rank: int, world: int, barrier: threading.Barrier, box: dict):
        self.rank, self.world, self.barrier, self.box = rank, world, barrier, box

    def gather_objects(self, thing):
        self.box[self.rank] = thing
        self.barrier.wait(timeout=60)
        things = [self.box[rank] for rank in range(self.world)]
        self.barrier.wait(timeout=60)
        return things

    def sum(self, numbers):
        return [float(sum(column)) for column in zip(*self.gather_objects(list(numbers)), strict=True)]

    def max(self, numbers):
        return [float(max(column)) for column in zip(*self.gather_objects(list(numbers)), strict=True)]


def in_threads(world: int, work) -> list:
    """work(parallel) on each of `world` ranks; what each returns."""
    barrier, box, results, errors = threading.Barrier(world), {}, {}, []

    def one(rank: int) -> None:
        try:
            results[rank] = work(Together(rank, world, barrier, box))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(world)]


def answers(num: int) -> list:
    policy = make_policy()
    engine = TorchEngine(policy, slots=num, max_context_tokens=24, end_token_ids=(END_ID,))
    sampler = Sampler(engine=engine, scorer=ToyScorer(), slots=num, max_response_tokens=20)
    return sampler(make_prompts(num), samples_per_prompt=1, seed=0).responses


@pytest.mark.parametrize("world", [2, 3])
def test_the_report_of_several_ranks_is_that_of_one_with_all_responses(world):
    """One of the ranks has fewer responses than the others, or none: the value model's forward is a collective operation."""
    responses, value = answers(world + world // 2), make_value()
    alone = explained_by_position(value, responses, 1.0)
    for report in in_threads(world, lambda p: explained_by_position(value, responses[p.rank :: p.world], 1.0, p)):
        assert [dataclasses.astuple(RowOf(**row)) for row in report] == [
            pytest.approx(dataclasses.astuple(RowOf(**row)), nan_ok=True) for row in alone
        ]


@dataclasses.dataclass
class RowOf:
    from_token: int
    to_token: int
    tokens: int
    explained_variance: float


def test_a_rank_without_responses_fits_in_step_with_the_others():
    """Three responses on four ranks: the fourth runs empty micro-batches, and leaves its weights finite."""
    responses = answers(3)

    def fit(parallel):
        torch.manual_seed(0)
        value = make_value()
        fit_value(
            replace_fields(config_of(3), {"value.pretrain_epochs": 1}), value, responses[parallel.rank :: parallel.world], parallel
        )
        return all(bool(torch.isfinite(p).all()) for p in value.parameters())

    assert in_threads(4, fit) == [True] * 4


def test_a_folder_with_a_value_model_is_not_written_into(tmp_path):
    (tmp_path / "value").mkdir()
    with pytest.raises(UserError, match=r"^run\.out: got .* holds a value model already; expected"):
        pretrain_value(
            replace_fields(config_of(4), {"run.out": str(tmp_path)}),
            Numbers(0, 1),
            make_prompts(4),
            make_value=make_value,
            save=None,
        )  # type: ignore[arg-type]


class Share:
    """A sampler of one of several ranks, whose responses are there."""

    def __init__(self, responses):
        self.responses, self.engine = responses, SimpleNamespace(sleep=lambda: None)

    def __call__(self, prompts, *, samples_per_prompt, seed) -> Sampled:
        return Sampled(self.responses, 0, [])


@pytest.mark.parametrize("fails", [False, True])
def test_of_several_ranks_one_writes_the_value_model_and_puts_it_in_place_when_it_is_whole(fails, tmp_path):
    """As scale/ saves: all ranks take part, the first one writes, and what it could not write is every rank's error."""
    responses, seen = answers(4), []
    config = replace_fields(config_of(4), {"value.pretrain_epochs": 1, "run.out": str(tmp_path)})

    def work(parallel):
        sampler = Share(responses[parallel.rank :: parallel.world])

        def save(value, folder):
            if parallel.rank == 0:
                value.save_pretrained(folder)
                seen.append((tmp_path / "value").exists())
            if any(parallel.gather_objects(fails and parallel.rank == 0)):
                raise UserError("no room")

        try:
            return pretrain_value(config, sampler, make_prompts(4), make_value=make_value, save=save, parallel=parallel)
        except UserError as error:
            return str(error)

    assert in_threads(2, work) == (["no room"] * 2 if fails else [tmp_path / "value"] * 2)
    assert seen == [False]
    assert (tmp_path / "value").exists() == (not fails)
    if not fails:
        load_value_model(str(tmp_path / "value"))


def test_the_batchers_of_an_engine_draw_what_numbers_draws():
    """The stand-in above deals samples as the batcher's own stream does."""
    schedule = SlotSchedule(slots=4, window=99, max_response_tokens=9)
    prompts = make_prompts(5)
    stream = SampleStream(prompts, samples_per_prompt=2, seed=7, limit=10, rank=1, world=2)
    batcher = SuccessiveBatcher(schedule, stream, run_seed=7)
    engine = TorchEngine(make_policy(), slots=4, max_context_tokens=24, end_token_ids=(END_ID,))
    drawn = sorted((s.response.id, s.response.prompt.id) for s in batcher.window(engine))
    assert drawn == [(r.id, r.prompt.id) for r in Numbers(1, 2)(prompts, samples_per_prompt=2, seed=7).responses]
