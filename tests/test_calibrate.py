"""What a run records of its decode steps, the costs that sim/clock/calibrate.py reads from it, and the pieces of benchmarks/reality.py.

Oracles: windows worked out by hand; the engine's own arrays, spied on; folders written from costs chosen by hand; and the clock,
which must sample the same tokens as the run whose lengths it is given.
"""

from __future__ import annotations

import csv
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import one_thread  # noqa: F401  (a fixture)
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import reality
from benchmarks.reality import BASES, RATIOS, Steps, compare, measured_steps, predicted_steps, recorded_lengths, spread
from sim.clock.calibrate import Measured, Passes, least_absolute
from tppo_ref.method.errors import UserError
from tppo_ref.method.records import End, Prompt, Response, WindowSlice
from tppo_ref.method.slots import Segment, SlotSchedule
from tppo_ref.rollout.batcher import SampleStream, SuccessiveBatcher
from tppo_ref.rollout.decode_load import DecodeStep, ObservedEngine, decode_steps
from tppo_ref.rollout.engine import Decoded
from tppo_ref.rollout.torch_engine import DONE, LENGTH
from tppo_ref.runs.build import build
from tppo_ref.runs.checkpoint import MANIFEST
from tppo_ref.runs.config import Config, apply_method
from tppo_ref.runs.parsing import replace_fields
from tppo_ref.runs.session import Session
from tppo_ref.runs.sinks import read_metrics

pytestmark = pytest.mark.usefixtures("one_thread")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# -------------------------------------------------------------------------------------------------------- what a window held


def response(id: int, prompt_tokens: int, tokens: int) -> Response:
    return Response(id=id, prompt=Prompt(id=id, token_ids=(1,) * prompt_tokens, answer=""), sample_index=0, token_ids=[1] * tokens)


def test_a_window_worked_out_by_hand() -> None:
    """Two slots, four decode steps: a goes on from 5 tokens and ends, c takes its slot, b runs through."""
    a, b, c = response(0, 3, 7), response(1, 2, 4), response(2, 1, 2)
    segments = [Segment(0, 0, 0, 2, End.END_TOKEN), Segment(1, 1, 0, 4, End.RUNNING), Segment(0, 2, 2, 4, End.RUNNING)]
    slices = [WindowSlice(a, 5, 7), WindowSlice(b, 0, 4), WindowSlice(c, 0, 2)]
    found = decode_steps(segments, slices, [0.5, 0.625, 0.875, 1.0])
    assert found == [
        DecodeStep(2, 8 + 2, 7 + 1, 0.5),  # a: 3 + 5 tokens, of which 7 are prefilled and the last one is decoded from
        DecodeStep(2, 9 + 3, 0, 0.125),
        DecodeStep(2, 1 + 4, 0, 0.25),  # c: a prompt of one token leaves nothing to prefill
        DecodeStep(2, 2 + 5, 0, 0.125),
    ]


def test_an_empty_window_has_no_decode_steps() -> None:
    assert decode_steps([], [], []) == []


class LengthEngine:
    """Decodes response i until its total length is lengths[i % len(lengths)]."""

    def __init__(self, lengths: tuple[int, ...]):
        self.lengths, self.rows = lengths, {}

    @property
    def num_running(self) -> int:
        return len(self.rows)

    def submit(self, requests) -> None:
        for r in requests:
            left = self.lengths[r.response_id % len(self.lengths)] - r.num_response_tokens
            self.rows[r.response_id] = [min(left, r.max_new_tokens), 0, left <= r.max_new_tokens]

    def step(self) -> list[Decoded]:
        done = []
        for id, row in list(self.rows.items()):
            row[1] += 1
            if row[1] == row[0]:
                del self.rows[id]
                done.append(Decoded(response_id=id, token_ids=[1] * row[0], logprobs=[0.0] * row[0], end_token=row[2]))
        return done


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6).map(tuple), slots=st.integers(1, 4), window=st.integers(1, 6),
    refill=st.sampled_from(["immediate", "step"]), prompts=st.lists(st.integers(1, 5), min_size=1, max_size=3),
)  # fmt: skip
def test_watching_the_engine_and_looking_back_at_the_window_tell_the_same(lengths, slots, window, refill, prompts) -> None:
    schedule = SlotSchedule(slots=slots, window=window, max_response_tokens=12, refill=refill)
    stream = SampleStream(
        [Prompt(id=i, token_ids=(1,) * n, answer="") for i, n in enumerate(prompts)], samples_per_prompt=2, seed=0
    )
    batcher, engine = SuccessiveBatcher(schedule, stream, run_seed=0), ObservedEngine(LengthEngine(lengths))
    for _ in range(3):
        engine.steps.clear()
        slices = batcher.window(engine)
        found = decode_steps(batcher.segments, slices, batcher.step_ends_s)
        assert [s[:3] for s in found] == [s[:3] for s in engine.steps]
        assert sum(s.active for s in found) == sum(s.stop - s.begin for s in slices)
        assert sum(s.seconds for s in found) == pytest.approx(batcher.step_ends_s[-1])


# ------------------------------------------------------------------------------------------------------------------ a real run

TINY = {
    "task.name": "length", "model.warm_start_steps": 2, "model.hidden_size": 16, "model.num_layers": 1, "model.num_heads": 2,
    "rollout.slots": 6, "rollout.window": 8, "rollout.max_response_tokens": 30, "rollout.min_response_tokens": 2,
    "advantage.tail_tokens": 2, "policy.mini_batch_tokens": 40, "value.mini_batch_tokens": 40, "run.eval_prompts": 5,
    "run.eval_every_s": 0.0, "run.checkpoint_every": 0, "run.progress": False,
}  # fmt: skip


@pytest.fixture(scope="session", name="cache")
def _cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def session_of(out: Path, cache: Path, method: str = "tppo", **run: object) -> Session:
    fields = TINY | {"run.out": str(out), "run.cache": str(cache)} | {f"run.{k}": v for k, v in run.items()}
    return Session(build(apply_method(replace_fields(Config(), fields), method, strict=False)))


def train(session: Session) -> Path:
    try:
        session.train()
    finally:
        session.close()
    return session.out


def spy_on(engine) -> list[tuple[int, int, int]]:
    """Per decode step what the engine's arrays hold: rows, tokens that their queries see, prompt tokens fed beside them."""
    seen, layout = [], engine._layout

    def spied():
        lengths, new = engine._state[LENGTH].copy(), engine._state[DONE] == 0
        out = layout()
        prefill = out[0].shape[1] - len(lengths)
        assert prefill == lengths[new].sum()
        seen.append((len(lengths), int((lengths + 1).sum()), prefill))
        return out

    engine._layout = spied
    return seen


@pytest.fixture(scope="module", name="runs")
def _runs(tmp_path_factory, cache) -> dict[str, tuple[Path, list, list]]:
    """By method: the folder of a run, and what its two engines really did."""
    found = {}
    for method in ("tppo", "ppo"):
        session = session_of(tmp_path_factory.mktemp("run") / method, cache, method, steps=14)
        seen, seen_eval = spy_on(session.trainer.engine), spy_on(session.parts.evaluator.sampler.engine)
        found[method] = (train(session), seen, seen_eval)
    return found


@pytest.mark.parametrize("method", ["tppo", "ppo"])
def test_a_run_writes_what_its_engine_did(method, runs) -> None:
    folder, seen, seen_eval = runs[method]
    for name, real in (("decode.csv", seen), ("eval_decode.csv", seen_eval)):
        rows = rows_of(folder / name)
        assert [(int(r["active"]), int(r["context_tokens"]), int(r["prefill_tokens"])) for r in rows] == real
        assert all(float(r["seconds"]) > 0 for r in rows)
    steps = [r for r in read_metrics(folder / "metrics.jsonl") if "rollout/tokens" in r]
    for step in steps:
        rows = [r for r in rows_of(folder / "decode.csv") if int(r["step"]) == step["step"]]
        assert [int(r["decode_step"]) for r in rows] == list(range(int(step["rollout/decode_steps"])))
        assert sum(int(r["active"]) for r in rows) == step["rollout/tokens"]
        assert sum(float(r["seconds"]) for r in rows) <= step["time/rollout_s"] + 1e-6 * len(rows)
    evaluations = [r for r in read_metrics(folder / "metrics.jsonl") if "eval/accuracy" in r]
    answered = sum(int(r["active"]) for r in rows_of(folder / "eval_decode.csv"))
    assert answered == pytest.approx(sum(5 * r["eval/length_mean"] for r in evaluations))


def test_a_run_that_was_resumed_has_each_decode_step_once(tmp_path, cache) -> None:
    """It goes on from step 2; what was written of step 3 and of the evaluation after it is taken back."""
    train(session_of(tmp_path / "whole", cache, steps=5))
    train(session_of(tmp_path / "parts", cache, steps=3, checkpoint_every=2))
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-00000003")
    train(session_of(tmp_path / "parts", cache, steps=5, checkpoint_every=2, resume=True))
    for name in ("decode.csv", "eval_decode.csv"):
        whole, parts = ([r | {"seconds": ""} for r in rows_of(tmp_path / out / name)] for out in ("whole", "parts"))
        assert whole == parts
    assert {r["step"] for r in parts} == {"0", "5"}


def test_without_the_timeline_nothing_is_written_and_calibration_says_why(tmp_path, cache) -> None:
    folder = train(session_of(tmp_path / "run", cache, steps=2, timeline=False))
    assert rows_of(folder / "decode.csv") == rows_of(folder / "eval_decode.csv") == []
    with pytest.raises(UserError, match=r"^run\.timeline: .* with True, .* has False"):
        Measured.from_run(folder)


@pytest.mark.parametrize("method", ["tppo", "ppo"])
def test_the_clock_samples_the_tokens_of_the_run_whose_lengths_it_is_given(method, runs) -> None:
    """`predicted_steps` compares tokens and decode steps of every step itself; costs come from either run."""
    folder = runs[method][0]
    for calibrated in runs:
        costs = Measured.from_run(runs[calibrated][0])
        predicted, measured = predicted_steps(folder, costs), measured_steps(folder)
        assert predicted.tokens.tolist() == measured.tokens.tolist()
        assert predicted.step_s == pytest.approx(predicted.rollout_s + predicted.training_s + costs.once_s)


def test_the_clock_charges_the_decode_steps_that_the_run_recorded(runs) -> None:
    """Costs of one second a piece count what the clock charged: the sums of decode.csv, the first step left out."""
    folder = runs["tppo"][0]
    rows = [r for r in rows_of(folder / "decode.csv") if int(r["step"]) > 1]
    nothing = dict(step_s=0.0, row_s=0.0, context_s=0.0, arrival_s=0.0, prefill_token_s=0.0, once_s=0.0,
                   forward=Passes(0.0, 0.0), policy=Passes(0.0, 0.0), value=Passes(0.0, 0.0))  # fmt: skip
    sums = {
        "step_s": len(rows), "row_s": sum(int(r["active"]) for r in rows), "context_s": sum(int(r["context_tokens"]) for r in rows),
        "arrival_s": sum(r["prefill_tokens"] != "0" for r in rows), "prefill_token_s": sum(int(r["prefill_tokens"]) for r in rows),
    }  # fmt: skip
    for name, total in sums.items():
        assert predicted_steps(folder, Measured(**nothing | {name: 1.0})).rollout_s.sum() == pytest.approx(total), name
    metrics = [r for r in read_metrics(folder / "metrics.jsonl") if r.get("policy/updates")][1:]
    fed = sum(r["rollout/tokens"] + r["policy/prefix_tokens"] for r in metrics)
    value_fed = sum(r["value/tokens"] + 3 * r["value/responses"] for r in metrics)  # prompts of the length task: 3 tokens
    for name, passes, total in (
        ("forward", Passes(0.0, 1.0), fed), ("policy", Passes(0.0, 1.0), fed), ("value", Passes(0.0, 1.0), value_fed),
        ("policy", Passes(1.0, 0.0), sum(r["policy/updates"] for r in metrics)),
        ("value", Passes(1.0, 0.0), sum(r["value/updates"] for r in metrics)),
    ):  # fmt: skip
        assert predicted_steps(folder, Measured(**nothing | {name: passes})).training_s.sum() == pytest.approx(total), name


def test_lengths_that_are_not_the_runs_are_noticed(runs, tmp_path) -> None:
    folder = runs["tppo"][0]
    costs = Measured.from_run(folder)
    for name in ("config.json", "metrics.jsonl", "responses.csv"):
        text = (folder / name).read_text()
        if name == "responses.csv":
            head, first, rest = text.split("\n", 2)
            cells = first.split(",")
            cells[4] = str(int(cells[4]) + 1)
            text = "\n".join((head, ",".join(cells), rest))
        (tmp_path / name).write_text(text)
    with pytest.raises(RuntimeError, match=r"step \d+: tokens, .* on the clock"):
        predicted_steps(tmp_path, costs)


def test_a_response_that_the_run_did_not_end_has_the_cap(tmp_path) -> None:
    (tmp_path / "responses.csv").write_text("step,response,tokens\n1,0,4\n1,3,7\n2,1,5\n")
    lengths = recorded_lengths(tmp_path, 30)
    assert lengths.sample(np.random.default_rng(0), 3).ravel().tolist() == [4, 5, 30]
    assert lengths.sample(np.random.default_rng(0), 1, 3).ravel().tolist() == [7, 30, 30]


# ------------------------------------------------------------------------------------------------- costs that are known by hand

ENGINE = {"step_s": 2e-3, "row_s": 3e-5, "context_s": 5e-7, "arrival_s": 7e-4, "prefill_token_s": 8e-6}
FORWARD, POLICY, VALUE, ONCE_S = Passes(3e-3, 1.5e-5), Passes(1e-2, 2e-5), Passes(9e-3, 1.8e-5), 2.5e-3
PROMPT = 4


def decode_row(step: int, i: int, active: int, context: int, prefill: int, slow: float = 1.0) -> tuple:
    e = ENGINE
    arrival = e["arrival_s"] if prefill else 0.0
    seconds = e["step_s"] + e["row_s"] * active + e["context_s"] * context + arrival + e["prefill_token_s"] * prefill
    return step, i, active, context, prefill, f"{slow * seconds:.9f}"


def write_run(
    folder: Path, *, steps: int = 16, stalls: bool = False, shrinks: bool = True, config: dict | None = None, alike: int = 0
) -> Path:
    """A run's folder in which every second follows from the costs above; `stalls`: but in every sixth step and at odd places.

    alike    not 0: every step feeds the same tokens, in so many updates
    """
    rng = np.random.default_rng(7)
    settings = {"policy": {"train_on": "window", "epochs": 1}, "run": {"timeline": True},
                "value": {"batch_responses": 0, "epochs": 1, "update": "independent"}}  # fmt: skip
    for path, value in (config or {}).items():
        section, name = path.split(".")
        settings[section][name] = value
    decode, evaluation, records = [], [], []
    for step in range(1, steps + 1):
        stalled = stalls and (step % 6 == 0)
        seconds, tokens = 0.0, 8 * 16
        for i in range(16):
            prefill = int(rng.integers(100, 400)) if i == 0 else int(rng.integers(1, 9)) * (i % 3 == 0)
            row = decode_row(step, i, 8, int(rng.integers(200, 900)), prefill, slow=9.0 if stalled and i > 3 else 1.0)
            decode.append(row)
            seconds += float(row[-1])
        prefix, ended, updates, value_updates = int(rng.integers(50, 400)), int(rng.integers(2, 9)), step % 3 + 2, step % 4 + 1
        value_tokens = int(rng.integers(100, 900))
        if alike:
            prefix, ended, updates, value_updates, value_tokens = 200, 5, alike, alike, 600
        fed = tokens + prefix
        joint = settings["value"]["update"] == "joint"  # on the policy's rows, in the policy's epochs
        value_epochs = settings["policy" if joint else "value"]["epochs"]
        value_fed = fed if joint else value_tokens / value_epochs + PROMPT * ended
        if step == 1:
            prefix = PROMPT * 10
        slow = 4.0 if stalled else 1.0
        record = {
            "step": step, "time/rollout_s": seconds, "time/sync_s": 1e-3, "time/verify_s": 1e-3, "time/other_s": 5e-4,
            "time/forward_s": slow * (FORWARD.update_s * updates / settings["policy"]["epochs"] + FORWARD.token_s * fed),
            "time/policy_s": slow * (POLICY.update_s * updates + POLICY.token_s * settings["policy"]["epochs"] * fed),
            "time/value_s": slow * (VALUE.update_s * value_updates + VALUE.token_s * value_epochs * value_fed),
            "rollout/tokens": tokens, "response/rows": 10, "policy/prefix_tokens": prefix, "policy/updates": updates,
            "value/tokens": value_tokens, "value/responses": ended, "value/updates": value_updates,
        }  # fmt: skip
        records.append(record)
        if step % 5 == 0:
            evaluation += [decode_row(step, i, 8 - i // 2 if shrinks else 8, 40 * (16 - i), 24 * (i == 0)) for i in range(16)]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    for name, rows in (("decode.csv", decode), ("eval_decode.csv", evaluation)):
        with (folder / name).open("w", newline="") as file:
            csv.writer(file).writerows([("step", "decode_step", *DecodeStep._fields), *rows])
    checkpoint = folder / "checkpoints" / f"step-{steps:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / MANIFEST).write_text("{}")
    return folder


def assert_the_costs_by_hand(found: Measured, rel: float) -> None:
    assert {name: getattr(found, name) for name in ENGINE} == pytest.approx(ENGINE, rel=rel)
    for passes, known in ((found.forward, FORWARD), (found.policy, POLICY), (found.value, VALUE)):
        assert tuple(passes) == pytest.approx(tuple(known), rel=rel)
    assert found.once_s == pytest.approx(ONCE_S, rel=rel)


@pytest.mark.parametrize("epochs", [1, 3])
def test_costs_chosen_by_hand_are_found_again(epochs, tmp_path) -> None:
    folder = write_run(tmp_path / "run", config={"policy.epochs": epochs, "value.epochs": epochs})
    assert_the_costs_by_hand(Measured.from_run(folder), rel=1e-4)


def test_a_run_with_other_mini_batches_tells_an_updates_cost_from_its_tokens(tmp_path) -> None:
    """Its training alone counts: what it decoded may be another engine's."""
    one, other = write_run(tmp_path / "one", alike=4), write_run(tmp_path / "other", alike=16)
    (other / "decode.csv").write_text("")
    alone = Measured.from_run(one)
    known = 4 * POLICY.update_s + 328 * POLICY.token_s  # of 128 tokens and a prefix of 200: all that one run says
    assert 4 * alone.policy.update_s + 328 * alone.policy.token_s == pytest.approx(known, rel=1e-4)
    assert tuple(alone.policy) != pytest.approx(tuple(POLICY), rel=0.1)
    assert_the_costs_by_hand(Measured.from_run(one, other), rel=1e-4)


def test_another_run_is_read_as_carefully_as_the_first(tmp_path) -> None:
    one, other = write_run(tmp_path / "one"), write_run(tmp_path / "other", config={"policy.train_on": "ended"})
    with pytest.raises(UserError, match=r"policy\.train_on: .*other has ended"):
        Measured.from_run(one, other)


def test_a_joint_critic_has_the_policys_epochs(tmp_path) -> None:
    folder = write_run(tmp_path / "run", config={"policy.epochs": 3, "value.epochs": 1, "value.update": "joint"})
    assert_the_costs_by_hand(Measured.from_run(folder), rel=1e-4)


def test_steps_in_which_the_machine_stalled_change_nothing(tmp_path) -> None:
    assert_the_costs_by_hand(Measured.from_run(write_run(tmp_path / "run", stalls=True)), rel=1e-3)


def test_seconds_that_are_lost_in_every_window_are_put_back(tmp_path) -> None:
    """A tenth of each window's seconds falls outside of its decode steps' typical cost: the engine's costs carry it."""
    folder = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (folder / "metrics.jsonl").write_text(
        "".join(json.dumps(r | {"time/rollout_s": 1.1 * r["time/rollout_s"]}) + "\n" for r in lines)
    )
    found = Measured.from_run(folder)
    assert {name: getattr(found, name) for name in ENGINE} == pytest.approx({n: 1.1 * s for n, s in ENGINE.items()}, rel=1e-4)


def test_a_joint_critic_is_fed_the_policys_rows(tmp_path) -> None:
    """Value seconds that follow the policy's tokens, 0.1 ms each, and not the ended responses'."""
    folder = write_run(tmp_path / "run", config={"value.update": "joint"})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for r in lines:
        r["time/value_s"] = 1e-4 * (r["rollout/tokens"] + r["policy/prefix_tokens"]) + 5e-3 * r["value/updates"]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    assert tuple(Measured.from_run(folder).value) == pytest.approx((5e-3, 1e-4), rel=1e-4)


def test_measured_answers_as_costs_do(tmp_path) -> None:
    costs = Measured.from_run(write_run(tmp_path / "run"))
    seconds = costs.decode_step_s(np.array([0, 1, 32]), np.array([0, 100, 4000]))
    assert seconds.tolist() == pytest.approx([0.0, 2e-3 + 3e-5 + 5e-5, 2e-3 + 96e-5 + 2e-3], rel=1e-4)
    assert costs.prefill_s(np.array([0, 1, 1000])).tolist() == pytest.approx([0.0, 7.08e-4, 8.7e-3], rel=1e-4)
    assert costs.logprob_s(1000, 0) + costs.value_forward_s(1000, 0) == pytest.approx(0.015, rel=1e-4)
    assert costs.policy_train_s(1000, 0, 2) == pytest.approx(2 * (0.01 + 0.003) + 0.02, rel=1e-4)
    assert costs.value_train_s(1000, 0) == pytest.approx(0.009 + 0.018, rel=1e-4)
    assert (costs.kv_capacity_tokens, costs.wake_s()) == (None, 0.0)
    assert costs.sync_s() == pytest.approx(ONCE_S)


def test_the_fit_is_least_absolute_and_never_negative() -> None:
    """y = 3 x but for two rows of seven: squares would give 6.7. And a cost that would have to be negative is 0."""
    x, y = np.array([1.0, 2, 3, 4, 5, 6, 7]), np.array([3.0, 6, 9, 12, 15, 60, 63])
    assert least_absolute(x[:, None], y) == pytest.approx([3.0], rel=1e-3)
    found = least_absolute(np.stack([x, np.ones(7)], axis=1), 3 * x - 2)
    assert found[1] == 0.0
    assert 2 < found[0] < 3


# --------------------------------------------------------------------------------------------------------------- bad folders


def no_file(name: str):
    return lambda folder: (folder / name).unlink()


def replaced(name: str, old: str, new: str):
    def harm(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return harm


def nan_seconds(folder: Path) -> None:
    head, first, rest = (folder / "decode.csv").read_text().split("\n", 2)
    (folder / "decode.csv").write_text("\n".join((head, first.rpartition(",")[0] + ",nan", rest)))


def older_checkpoint(folder: Path) -> None:
    (folder / "checkpoints" / "step-00000016").rename(folder / "checkpoints" / "step-00000011")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        *((no_file(name), f"found no {name}") for name in ("config.json", "metrics.jsonl", "decode.csv", "eval_decode.csv")),
        (replaced("config.json", "{", "["), "config.json: expected a run's config"),
        (replaced("config.json", '"window"', '"ended"'), "policy.train_on: calibration needs a run with window"),
        (replaced("config.json", '"batch_responses": 0', '"batch_responses": 9'), "value.batch_responses: calibration needs"),
        (older_checkpoint, "records of 16 steps and a checkpoint of step 11; let it end"),
        (
            no_file(f"checkpoints/step-00000016/{MANIFEST}"),
            "a run that ended, found records of 16 steps and a checkpoint of step 0",
        ),
        (replaced("metrics.jsonl", '"value/tokens": ', '"value/other": '), "a number for value/tokens"),
        (replaced("decode.csv", "seconds", "s"), "expected a column seconds"),
        (replaced("decode.csv", "3,5,", "3,5,x"), "decode.csv, line"),
        (nan_seconds, "decode.csv: expected finite numbers, found nan"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line_that_names_the_thing(harm, words, tmp_path) -> None:
    folder = write_run(tmp_path / "run")
    harm(folder)
    with pytest.raises(UserError) as error:
        Measured.from_run(folder)
    assert "\n" not in str(error.value)
    assert words in str(error.value)


def test_steps_that_decode_csv_lacks_are_named(tmp_path) -> None:
    folder = write_run(tmp_path / "run")
    kept = [line for line in (folder / "decode.csv").read_text().splitlines() if not line.startswith("9,")]
    (folder / "decode.csv").write_text("\n".join(kept) + "\n")
    with pytest.raises(UserError, match="found none of step 9"):
        Measured.from_run(folder)


def test_a_run_of_too_few_steps_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"at least 8 steps .* found 7; raise run\.steps"):
        Measured.from_run(write_run(tmp_path / "run", steps=8))
    Measured.from_run(write_run(tmp_path / "longer", steps=9))


def test_a_batch_that_never_changes_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"found 8 always; .* run\.eval_prompts"):
        Measured.from_run(write_run(tmp_path / "run", shrinks=False))


# ------------------------------------------------------------------------------------------------------- the benchmark's verdict


def rounds(*seconds: float) -> np.ndarray:
    return np.array(seconds)


def test_the_tolerance_is_a_tenth_or_what_the_machine_does_to_equal_work() -> None:
    for predicted, noise, within in (
        (1.09, 0.03, True),
        (0.89, 0.03, False),
        (1.12, 0.03, False),
        (1.12, 0.2, True),
        (0.79, 0.2, False),
    ):
        row = compare("run", "step_s", rounds(predicted), rounds(1.0), noise)
        assert row["within"] is within, row
        assert row["error"] == pytest.approx(predicted - 1)


def test_a_round_is_compared_with_itself_and_its_outliers_do_not_count() -> None:
    """The host is four times slower in the last two rounds, for both; one measurement of five stalls."""
    row = compare("run", "step_s", rounds(1.1, 2.2, 1.1, 4.4, 8.8), rounds(1.0, 2.0, 9.0, 4.0, 8.0), 0.0)
    assert row["error"] == pytest.approx(0.1)
    assert (row["predicted"], row["measured"]) == ("2.2", "4")  # medians


def test_equal_work_is_compared_round_by_round() -> None:
    slow, fast = rounds(1.0, 4.0, 2.0), rounds(0.8, 3.2, 1.6)
    assert spread([slow, slow]) == 0.0
    assert spread([slow, fast, slow]) == pytest.approx(0.25)  # slow / fast: the larger of both ways round


def test_a_predictions_range_is_over_the_base_runs_repeats() -> None:
    names = [*BASES, *(name for pair in RATIOS for name in pair if name not in BASES)]
    one = rounds(1.0)
    real = {name: Steps(step_s=2.0 * one, rollout_s=one, training_s=one, tokens=10.0 * one) for name in names}
    by_costs = [
        {name: Steps(step_s=s * one, rollout_s=s / 2 * one, training_s=s / 2 * one, tokens=10.0 * one) for name in names}
        for s in (2.1, 1.9, 2.4)
    ]
    row = next(row for row in reality.rows_of(real, by_costs) if row["run"] == names[-1] and row["quantity"] == "step_s")
    assert (row["low"], row["predicted"], row["high"]) == ("1.9", "2.1", "2.4")
    assert row["error"] == pytest.approx(0.05)
    assert compare("x", "step_s", one, one, 0.01)["low"] == "1"


def test_runs_are_stepped_in_turn_and_go_on_where_they_were_stopped(tmp_path, monkeypatch) -> None:
    """Two settings, three rounds: each round steps both before the next; what was stopped after a checkpoint steps the rest only."""
    settings = tuple(
        reality.Setting(name, "tppo", {"task.name": "length", "rollout.window": 16, "rollout.slots": 8}) for name in "ab"
    )
    monkeypatch.setattr(reality, "COMMON", reality.COMMON | {"run.eval_prompts": 2, "run.cache": str(tmp_path / "cache"),
                                                             "model.warm_start_steps": 2})  # fmt: skip
    monkeypatch.setattr(reality, "KEPT_EVERY", 2)
    order, step = [], Session.step

    def noted(self: Session):
        if len(order) == 5:
            raise KeyboardInterrupt
        order.append((self.out.name, self.trainer.num_steps + 1))
        return step(self)

    monkeypatch.setattr(Session, "step", noted)
    with pytest.raises(KeyboardInterrupt):
        reality.make_runs(settings, 3, tmp_path / "runs")
    assert order == [("a", 1), ("b", 1), ("a", 2), ("b", 2), ("a", 3)]
    order.clear()
    folders = reality.make_runs(settings, 3, tmp_path / "runs")
    assert order == [("a", 3), ("b", 3)]
    assert [len(measured_steps(folder).tokens) for folder in folders.values()] == [2, 2]
    assert json.loads((folders["a"] / "config.json").read_text())["run"]["clock"] == "cpu"
    reality.make_runs(settings, 3, tmp_path / "runs")
    assert len(order) == 2
    with pytest.raises(SystemExit, match="something else"):
        reality.make_runs(settings, 4, tmp_path / "runs")


def test_decode_steps_are_on_the_runs_clock(tmp_path) -> None:
    """With run.clock=cpu waiting costs nothing, in metrics and in decode.csv alike."""
    fields = {"task.name": "length", "rollout.window": 8, "rollout.slots": 4, "run.eval_prompts": 2, "run.progress": False,
              "model.warm_start_steps": 2, "run.cache": str(tmp_path / "cache"), "run.clock": "cpu",
              "run.out": str(tmp_path / "run")}  # fmt: skip
    session = Session(build(replace_fields(apply_method(Config(), "tppo"), fields)))
    for engine in (session.parts.engine, session.parts.evaluator.sampler.engine):
        step = engine.step
        engine.step = lambda step=step: (time.sleep(0.2), step())[1]
    metrics = session.step()
    session.evaluate()
    session.close()
    for name in ("decode.csv", "eval_decode.csv"):
        steps = rows_of(tmp_path / "run" / name)
        assert sum(float(r["seconds"]) for r in steps) < 0.1 * len(steps), name
    assert metrics["time/rollout_s"] < 0.1 * len(rows_of(tmp_path / "run" / "decode.csv"))
