"""`VLLMEngine` on vLLM's real CPU build: parity with the trainer through syncs, planted mistakes, the schedule, errors.

vLLM allows one engine per process for its life, so `vllm_worker.py` runs every check in one process per model (tied and untied
output head) and the tests below judge what it found.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from scale_helpers import HERE, LIMIT_S, ROOT, environment, make_model, require

require("vllm", "the engine is tested against the real one")

MAX_GAP = 1e-3  # fp32, issue 5


@pytest.fixture(scope="module", params=["tied", "untied"])
def found(request, tmp_path_factory):
    """The untied model is sampled at temperature 0.8, with a shortest response, and from a cache so small that vLLM preempts."""
    folder = make_model(
        tmp_path_factory.mktemp("vllm") / request.param, tied=request.param == "tied", vocab=64, end=1, head_std=0.1
    )
    done = subprocess.run([sys.executable, str(HERE / "vllm_worker.py"), str(folder), request.param], env=environment(), cwd=ROOT,
                          capture_output=True, text=True, timeout=LIMIT_S)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("FOUND "))
    return json.loads(line.removeprefix("FOUND ")) | {"tied": request.param == "tied"}


def test_engine_and_trainer_agree_at_the_start_and_after_each_of_five_syncs(found):
    assert len(found["probe"]) == 6
    assert max(found["probe"]) < MAX_GAP


def test_windows_that_go_on_across_syncs_have_the_new_weights_log_probabilities(found):
    assert found["continued"] >= 10, "too few continuations to mean anything"
    assert len(found["windows"]) == 6
    assert max(found["windows"]) < MAX_GAP


def test_what_is_said_behind_an_observation_has_the_whole_conversations_log_probabilities(found):
    assert found["observations"] >= 5, "too few observations to mean anything"
    assert found["conversations"] < MAX_GAP


def test_the_version_is_that_of_the_last_sync(found):
    assert (found["version"], found["version after errors"]) == (5, 9)


def test_a_stale_prefix_cache_fails_the_probe_and_refuses_to_train(found):
    assert found["no reset"] > 100 * 1e-4
    assert found["no reset refused"] is True


def test_dropping_the_cache_alone_heals_it(found):
    assert found["healed by reset"] < MAX_GAP


def test_a_stale_output_head_fails_the_probe_and_refuses_to_train(found):
    assert found["stale head"] > 100 * 1e-4
    assert found["stale head refused"] is True


def test_a_full_sync_heals_the_head(found):
    assert found["healed by repack"] < MAX_GAP
    assert found["good refused"] == "nothing was raised"


def test_tensors_that_the_engine_never_took_fail_the_sync(found):
    assert found["tensors lost on the way"] is True


def test_the_schedule_depends_on_lengths_alone_and_the_budget_is_never_exceeded(found):
    """15 schedules of three windows each, slots, window, cap and refill drawn by Hypothesis, against an engine of the same lengths."""
    assert found["counted"]["examples"] >= 10
    assert found["schedules"] == []


def test_requests_lagged_behind_the_logical_step_and_slots_were_refilled_inside_windows(found):
    """Else the test above would hold for an engine without lockstep."""
    assert found["counted"]["advances"] > found["counted"]["steps"]
    assert found["counted"]["refills"] > 10


def test_the_same_seeds_give_the_same_tokens_in_any_batch(found):
    assert found["same tokens"] is True
    assert found["other seeds differ"] is True


def test_no_response_ends_before_its_shortest_length(found):
    assert found["min_response_tokens kept"] is True


@pytest.mark.parametrize("mistake", ["submit before load", "keep nothing", "too long", "too long among others", "load while running",
                                     "load None while running"])  # fmt: skip
def test_mistakes_are_named_errors(found, mistake):
    assert found[mistake] is True


def test_a_refused_list_of_requests_leaves_none_of_them_running(found):
    assert found["left by it"] == 0


def test_the_longest_request_that_fits_is_served_whole(found):
    assert found["longest"] == 10


def test_vllms_own_options_arrive_by_name_and_the_output_head_is_float32(found):
    """With fewer sequences than slots requests wait inside vLLM, and the schedule above does not see it."""
    assert found["options read from the source"] is True
    assert found["head dtype"] == "torch.float32"
    assert found["further options"] == (5 if found["tied"] else 6)
