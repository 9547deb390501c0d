"""`build` has no algorithm of its own: what can be wrong in it is a setting that goes to the wrong place, or to none.

Every field of the configuration has a value of its own here, which is not the default, and the places where it has to arrive. A
field that is added later is in neither table and fails; so does one that arrives in only one of its places.
"""

from __future__ import annotations

import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from helpers import one_thread  # noqa: F401  (a fixture)
from transformers import Qwen2Config

from tppo_ref.rollout.models import load_policy, load_value_model
from tppo_ref.runs import build as building
from tppo_ref.runs import session as running
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import field_paths, get_field, replace_fields
from tppo_ref.runs.session import Session

pytestmark = pytest.mark.usefixtures("one_thread")


class Made(NamedTuple):
    """A session, and what `build` and `Session` told the functions that they called: name -> one dict of arguments per call."""

    session: Session
    told: dict[str, list[dict[str, Any]]]

    @property
    def parts(self) -> Any:
        return self.session.parts

    @property
    def models(self) -> list[Any]:
        return [self.parts.policy, self.parts.value]

    @property
    def engines(self) -> list[Any]:
        """The run's and the evaluation's."""
        return [self.parts.engine, self.parts.evaluator.sampler.engine]

    def argument(self, name: str, *functions: str) -> list[Any]:
        """What each call of the functions got under that name."""
        assert all(self.told[function] for function in functions)
        return [call[name] for function in functions for call in self.told[function]]


Places = Callable[[Made], Any]
"""Every place where a field has to arrive: one object, or a list of them."""


def finished_at(made: Made, **state: float) -> list[bool]:
    """Whether the run is over just before and at a number of steps or seconds."""
    ((name, limit),) = state.items()
    trainer, over = made.session.trainer, []
    for number in (limit - 1, limit):
        before = getattr(trainer, name)
        setattr(trainer, name, number)
        over.append(made.session._finished())
        setattr(trainer, name, before)
    return over


def own_base_model(at: Path) -> dict[str, tuple[Any, Places]]:
    """A built-in task, whose base model `build` makes: field -> (its value, where it arrives). A pair instead of a value: what is
    given, and what it is there.
    """
    hf = lambda name: lambda m: [getattr(model.hf.config, name) for model in m.models]  # noqa: E731
    sampling = lambda name: lambda m: [getattr(x, name) for x in (m.parts.policy, *m.engines)]  # noqa: E731
    loads, schedule = ("load_policy", "load_value_model"), lambda m: m.parts.batcher.schedule
    return {
        "task.name": ("length", lambda m: [m.parts.task.name, *m.argument("name", "load_task")]),
        "task.verifier": ("tppo_ref.tasks.fork:verify", lambda m: m.parts.scorer.verifier.verifier),
        "task.verifier_timeout_s": (7.5, lambda m: m.parts.scorer.verifier.timeout_s),
        "task.verifier_workers": (2, lambda m: m.argument("num_workers", "Verifier")),
        "task.failure_score": (-3.25, lambda m: [m.parts.scorer.verifier.failure_score, m.parts.watchers[0].failure_score]),
        "model.hidden_size": (24, hf("hidden_size")),
        "model.num_layers": (1, hf("num_hidden_layers")),
        "model.num_heads": (4, hf("num_attention_heads")),
        "model.warm_start_steps": (5, lambda m: m.argument("steps", "warm_start")),
        "model.warm_start_lr": (3e-3, lambda m: m.argument("lr", "warm_start")),
        "model.dtype": (("bfloat16", torch.bfloat16), lambda m: [model.weight.dtype for model in m.models]),
        "model.device": ("cpu:0", lambda m: m.argument("device", *loads)),
        "model.trust_remote_code": (True, lambda m: m.argument("trust_remote_code", *loads)),
        "model.logit_chunk_tokens": (17, lambda m: m.parts.policy.logit_chunk_tokens),
        "rollout.slots": (6, lambda m: [schedule(m).slots, m.parts.engine.slots]),
        "rollout.window": (9, lambda m: schedule(m).window),
        "rollout.max_response_tokens": (33, lambda m: [
            schedule(m).max_response_tokens, m.parts.evaluator.sampler.max_response_tokens,
            *(engine.max_context_tokens - m.parts.task.max_prompt_tokens for engine in m.engines)]),
        "rollout.min_response_tokens": (8, sampling("min_response_tokens")),
        "rollout.refill": ("step", lambda m: schedule(m).refill),
        "rollout.samples_per_prompt": (7, lambda m: m.parts.batcher.stream.samples_per_prompt),
        "rollout.temperature": (0.7, sampling("temperature")),
        "rollout.kv_cache": (("fp8", True), lambda m: [engine._cache.fp8 for engine in m.engines]),
        "run.seed": (11, lambda m: [m.parts.batcher.stream.seed, m.parts.batcher.run_seed, *m.argument("seed", *loads)]),
        "run.steps": ((13, [False, True]), lambda m: [finished_at(m, num_steps=13)]),
        "run.out": (str(at / "out"), lambda m: [str(m.session.out), str(m.parts.checkpointer.folder.parent),
                                                str(m.session.profiler.folder.parent), *map(str, m.argument("out", "RunFiles"))]),
        "run.cache": (str(at / "cache"), lambda m: [*map(str, m.argument("cache_dir", "warm_start"))]),
        "run.resume": (True, lambda m: m.argument("resume", "resume_point")),
        "run.checkpoints_kept": (14, lambda m: m.parts.checkpointer.keep),
        "run.clock": ("cpu", lambda m: m.session.trainer.meters.clock_kind),
        "run.eval_every_s": ((2.5, [0, 1, 4]), lambda m: [[m.parts.due(100, seconds) for seconds in (2.4, 2.6, 10.1)]]),
        "run.eval_prompts": (15, lambda m: len(m.parts.evaluator.prompts)),
        "run.eval_samples": (16, lambda m: m.parts.evaluator.samples_per_prompt),
        "run.progress": (False, lambda m: m.argument("progress", "warm_start", "leave_out_bad_references")),
        "run.timeline": (False, lambda m: m.argument("timeline", "RunFiles")),
        "run.threads": (3, lambda m: torch.get_num_threads()),
        "run.staleness_warning": (18, lambda m: m.parts.watchers[0].run.staleness_warning),
        "run.wandb_project": ("tails", lambda m: m.argument("wandb_project", "RunFiles")),
        "run.peak_tflops": ((1.5, 1.5e12), lambda m: m.session.trainer.meters.peak),
        "run.profile_steps": (("2:3", range(2, 4)), lambda m: m.session.profiler.steps),
        "run.cut_warning": (0.8, lambda m: m.parts.watchers[0].run.cut_warning),
    }  # fmt: skip


def own_prompts(at: Path) -> dict[str, tuple[Any, Places]]:
    """Prompts, policy and value model of the user's own."""
    for name in ("train", "test"):
        rows = [{"ask": f"{name} {i}?", "say": f"{i}, {name}"} for i in range(3)]
        (at / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shape = Qwen2Config(vocab_size=260, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=256)  # fmt: skip
    load_policy(shape, seed=1).save_pretrained(at / "policy")
    load_value_model(shape, seed=2).save_pretrained(at / "value")
    option = lambda name: lambda m: m.argument(name, "load_task")  # noqa: E731
    return {
        "task.name": ("jsonl", lambda m: m.parts.task.name),
        "task.path": (str(at / "train.jsonl"), option("train")),
        "task.eval_path": (str(at / "test.jsonl"), option("test")),
        "task.tokenizer": ("bytes", option("tokenizer")),
        "task.prompt_key": ("ask", option("prompt_key")),
        "task.answer_key": ("say", option("answer_key")),
        "task.max_prompt_tokens": (61, option("max_prompt_tokens")),
        "task.chat_template": (True, option("chat_template")),
        "model.policy": (str(at / "policy"), lambda m: m.argument("source", "load_policy")),
        "model.value": (str(at / "value"), lambda m: m.argument("source", "load_value_model")),
        "rollout.slots": (8, lambda m: [m.parts.batcher.schedule.slots, m.parts.engine.slots]),
        "rollout.refill": ("batch", lambda m: m.parts.batcher.schedule.refill),
        "rollout.responses_per_step": (19, lambda m: m.parts.batcher.schedule.responses_per_step),
        "rollout.max_response_tokens": (34, lambda m: m.parts.batcher.schedule.max_response_tokens),
        "run.train_seconds": ((20.0, [False, True]), lambda m: [finished_at(m, train_s=20.0)]),
        "run.checkpoint_every": (21, lambda m: m.session.config.run.checkpoint_every),
        "run.out": (str(at / "out"), lambda m: str(m.session.out)),
        "run.progress": (False, lambda m: m.argument("progress", "leave_out_bad_references")),
    }  # fmt: skip


CASES = {"own base model": own_base_model, "own prompts": own_prompts}

BY_THE_TRAINER = ("advantage.", "policy.", "value.")
"""Sections that the loop reads by itself, out of the config that it is given; test_whole_step.py holds each of their fields."""

BEFORE = {"run.method": "stands for other fields, which `apply_method` has set before there is anything to build"}
BESIDE = ("compare.",)
"""Read by the command `compare`, which builds nothing: its runs do, each with a config of its own."""


@contextmanager
def made(at: Path, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    """The session of a config with these values, and what was told to whom. Nothing is written but the base model."""
    told: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def listen(module: Any, name: str, instead: Any = None) -> None:
        real = getattr(module, name)
        takes = inspect.signature(real)

        def heard(*args: Any, **options: Any) -> Any:
            bound = takes.bind(*args, **options)
            bound.apply_defaults()
            options_of = next((p.name for p in takes.parameters.values() if p.kind is p.VAR_KEYWORD), None)
            told[name].append(bound.arguments | bound.arguments.get(options_of, {}))
            return real(*args, **options) if instead is None else instead()

        monkeypatch.setattr(module, name, heard)

    for name in ("load_task", "Verifier", "warm_start", "load_policy", "load_value_model", "leave_out_bad_references"):
        listen(building, name)
    listen(building, "resume_point", lambda: None)  # a run that goes on has no base model: this one begins, whatever it was asked
    listen(running, "RunFiles", lambda: SimpleNamespace(close=lambda: None, last_evaluation=lambda: None))
    config = replace_fields(Config(), values)
    with closing(Session(building.build(config))) as session:
        yield Made(session, told)


@pytest.fixture(scope="module", name="tables")
def _tables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, tuple[Any, Places]]]:
    return {name: table(tmp_path_factory.mktemp("case")) for name, table in CASES.items()}


@pytest.mark.parametrize("case", CASES)
def test_every_field_arrives_wherever_it_is_read(case, tables, tmp_path, monkeypatch):
    given, there = {}, {}
    for path, (value, places) in tables[case].items():
        given[path], arrived = value if isinstance(value, tuple) else (value, value)
        there[path] = arrived, places
    with made(tmp_path, given, monkeypatch) as m:
        for path, (arrived, places) in there.items():
            found = places(m)
            found = found if isinstance(found, list) else [found]
            assert found == [arrived] * max(len(found), 1), path


def test_the_trainer_is_given_the_models_the_batcher_the_engine_and_the_whole_config(tables, tmp_path, monkeypatch):
    given = {path: value[0] if isinstance(value, tuple) else value for path, (value, _) in tables["own prompts"].items()}
    with made(tmp_path, given | {"run.out": str(tmp_path / "out")}, monkeypatch) as m:
        trainer, parts = m.session.trainer, m.parts
        assert trainer.config is parts.config is m.session.config
        assert (trainer.policy_learner.config, trainer.value_learner.config) == (parts.config.policy, parts.config.value)
        assert trainer.policy_learner.module is parts.policy
        assert trainer.value_learner.module is parts.value
        assert (trainer.engine, trainer.batcher, trainer.scorer) == (parts.engine, parts.batcher, parts.scorer)
        assert all(engine.policy is parts.policy for engine in m.engines)
        assert parts.evaluator.sampler.scorer is parts.scorer
        assert [p.answer for p in parts.batcher.stream.prompts] == ["0, train", "1, train", "2, train"]
        assert [p.answer for p in parts.evaluator.prompts] == ["0, test", "1, test", "2, test"]
        assert parts.record == json.loads(json.dumps(parts.record))
        assert parts.record["policy"]["lr"] == parts.config.policy.lr


def test_every_field_of_the_configuration_has_a_place(tables):
    told = {path for table in tables.values() for path in table}
    others = {path for path in field_paths(Config) if path.startswith((*BY_THE_TRAINER, *BESIDE))} | set(BEFORE)
    assert not told & others
    assert sorted(told | others) == sorted(field_paths(Config))


@pytest.mark.parametrize("case", CASES)
def test_values_are_no_defaults_and_no_two_numbers_are_alike(case, tables):
    """Else a field that never left its default, or came from its neighbour, would look as if it had arrived."""
    given = {path: value[0] if isinstance(value, tuple) else value for path, (value, _) in tables[case].items()}
    assert not [path for path, value in given.items() if value == get_field(Config(), path)]
    numbers = [value for value in given.values() if not isinstance(value, bool | str)]
    assert len(set(numbers)) == len(numbers)
