"""Tests that bite: each bug below, planted into a copy of the package, is killed by the test that is named beside it.

The bugs are those that trainers of this kind have had (shared rules: an end token bootstrapped, a mask dropped, a shift by one, old and
new swapped, a mean of means, a clip's sign, a budget started afresh).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Bug(NamedTuple):
    """`before` stands exactly once in tppo_ref/`file`; with `after` in its place, `test` fails."""

    what: str
    file: str
    before: str
    after: str
    test: str


BUGS = [
    Bug("a response that ended is bootstrapped too", "method/advantages.py", "torch.where(cut_B, _last(values_BT, runs), 0.0)",
        "_last(values_BT, runs)", "test_advantages.py::test_rows_that_are_not_cut_agree_with_gae_whatever_their_neighbours_are"),
    Bug("the cut takes the value of one token earlier", "method/advantages.py", "torch.where(cut_B, _last(values_BT, runs), 0.0)",
        "torch.where(cut_B, _last(values_BT.roll(1, 1), runs), 0.0)", "test_advantages.py::test_egae_by_hand"),
    Bug("the bootstrap value is not discounted", "method/advantages.py", "_last(rewards_BT, runs) + gamma * end_value_B",
        "_last(rewards_BT, runs) + end_value_B", "test_advantages.py::test_egae_is_its_definition"),
    Bug("the next value is not discounted", "method/advantages.py", "add_(values_RT[:, 1:], alpha=gamma)",
        "add_(values_RT[:, 1:])", "test_advantages.py::test_gae_by_hand"),
    Bug("values outside the mask leak in", "method/recurrence.py",
        "            _zero_outside(x_RT, runs.mask_BT[rows, columns], spans[rows])\n", "",
        "test_advantages.py::test_garbage_outside_the_mask_changes_nothing_bit_for_bit"),
    Bug("a block of rows takes the first block's rates", "method/recurrence.py", "[level.of(rows) for level in levels]",
        "[level.of(slice(0, rows.stop - top)) for level in levels]", "test_recurrence.py::test_the_scan_is_the_loop_at_every_block_size"),
    Bug("lambda without the half window", "method/advantages.py", "length_B + cut_B * (window / 2)", "length_B + cut_B * 0",
        "test_advantages.py::test_lambda_of_rows_by_hand"),
    Bug("the half window on ended rows too", "method/advantages.py", "length_B + cut_B * (window / 2)", "length_B + window / 2",
        "test_advantages.py::test_lambda_of_rows_by_hand"),
    Bug("rounding is whitened where moments are given", "method/advantages.py", "if count == 0 or std <= 8 * torch.finfo(x_BT.dtype).eps * abs(mean):",
        "if count == 0 or std == 0:", "test_trainer.py::test_advantages_that_differ_by_rounding_alone_train_nothing"),
    Bug("moments of whitening over padding too", "method/advantages.py", "count = int(mask_BT.count_nonzero())", "count = mask_BT.numel()",
        "test_advantages.py::test_whiten_by_hand"),
    Bug("a tail is cut off ended rows too", "method/masks.py", "torch.where(cut_B, stop_B - skip_tail, stop_B)", "stop_B - skip_tail",
        "test_filters.py::test_policy_token_mask_by_hand"),
    Bug("the first token of the window is dropped", "method/masks.py", "column_T >= window_start_B", "column_T > window_start_B",
        "test_filters.py::test_policy_token_mask_by_hand"),
    Bug("the critic trains on running responses", "method/masks.py", "return response_mask_BT & ended_B[:, None]",
        "return response_mask_BT.clone()",
        "test_filters.py::test_f2_the_critic_sees_every_token_of_ended_responses_and_none_of_running_ones"),
    Bug("old and new log-probability swapped", "method/losses.py", "log_ratio = logprob - old_logprob", "log_ratio = old_logprob - logprob",
        "test_losses.py::test_policy_loss_by_hand_over_rows_weights_and_mask"),
    Bug("the clip takes the better side", "method/losses.py", "torch.minimum(unclipped, clipped)", "torch.maximum(unclipped, clipped)",
        "test_losses.py::test_every_case_of_the_clipped_surrogate_in_value_and_gradient"),
    Bug("clip-higher is clip-lower", "method/losses.py", "ratio.clamp(1 - clip_low, 1 + clip_high)",
        "ratio.clamp(1 - clip_high, 1 + clip_low)",
        "test_losses.py::test_every_case_of_the_clipped_surrogate_in_value_and_gradient"),
    Bug("the dual clip acts on positive advantages", "method/losses.py", "torch.where(advantages < 0, dual_clip * advantages, -math.inf)",
        "dual_clip * advantages", "test_losses.py::test_every_case_of_the_clipped_surrogate_in_value_and_gradient"),
    Bug("a mean of means", "method/losses.py", "return -surrogate.sum() / denominator, stats",
        "return -surrogate.sum() / mask_BT.sum().clamp(min=1), stats",
        "test_losses.py::test_micro_batches_that_share_a_denominator_equal_one_batch"),
    Bug("a mask by multiplication", "method/losses.py", "return torch.where(mask_BT, x_BT, torch.zeros((), dtype=x_BT.dtype, device=x_BT.device))",
        "return x_BT * mask_BT", "test_losses.py::test_masked_out_entries_change_neither_loss_nor_gradient_whatever_they_are"),
    Bug("the value clip takes the smaller error", "method/losses.py", "torch.maximum(error, clipped_error)",
        "torch.minimum(error, clipped_error)",
        "test_losses.py::test_every_case_of_the_clipped_value_loss_in_value_and_gradient"),
    Bug("a continued response gets a fresh budget", "method/slots.py", "min(self.window - now, self.max_response_tokens - num_tokens)",
        "min(self.window - now, self.max_response_tokens)",
        "test_batching.py::test_F7_segments_of_a_response_sum_to_at_most_the_cap_and_a_continued_one_gets_what_is_left"),
    Bug("a refilled slot decodes beyond the window", "method/slots.py", "min(self.window - now, self.max_response_tokens - num_tokens)",
        "min(self.window, self.max_response_tokens - num_tokens)",
        "test_batching.py::test_the_segments_are_those_of_a_simulator_that_walks_token_by_token"),
    Bug("an end token at the cap counts as the cap", "method/slots.py", "            if end_token:\n                end = End.END_TOKEN",
        "            if end_token and num_tokens < self.max_response_tokens:\n                end = End.END_TOKEN",
        "test_batching.py::test_how_a_response_stands_follows_from_its_tokens_the_cap_and_nothing_else"),
    Bug("samples of a group share a seed", "rollout/batcher.py", "epoch * self.samples_per_prompt + index", "epoch * self.samples_per_prompt",
        "test_batching.py::test_groups_are_n_samples_of_each_prompt_each_with_its_own_seed"),
    Bug("the score lands one token early", "loop/rows.py", "rewards_BT[row, len(response) - 1] = response.score",
        "rewards_BT[row, max(len(response) - 2, 0)] = response.score",
        "test_trainer.py::test_F2_each_ended_token_reaches_the_critic_once_per_epoch_and_no_running_one_ever"),
    Bug("deferred tokens are clipped around the new policy", "loop/forward.py", "torch.where(rows.new_BT, start_BT, rows.behaviour_BT)", "torch.where(rows.run_BT, start_BT, rows.behaviour_BT)",
        "test_trainer.py::test_F4_a_deferred_token_is_trained_against_its_own_older_policy"),
    Bug("a deferred tail is never trained", "method/masks.py", "torch.maximum(window_start_B, length_B - skip_tail), length_B)",
        "length_B, length_B)",
        "test_trainer.py::test_a_tail_that_is_deferred_is_trained_exactly_once_and_nothing_is_excluded"),
    Bug("the tail is trained although it is excluded", "loop/rows.py",
        "train_BT=policy_token_mask(mask_BT, start_B, cut_B, skip_tail=config.tail_tokens)",
        "train_BT=policy_token_mask(mask_BT, start_B, cut_B, skip_tail=0)",
        "test_trainer.py::test_F1_generated_is_trained_plus_excluded_plus_pending_at_every_step"),
    Bug("values are read one token late", "rollout/packing.py", "to(response_M - 1)", "to(response_M)",
        "test_models.py::test_values_equal_plain_unpadded_forward"),
    Bug("all tokens of a request are drawn with one number", "rollout/torch_engine.py", "uniform(state[SEED] + state[DONE])",
        "uniform(state[SEED])", "test_engines.py::test_tokens_and_logprobs_equal_a_naive_loop"),
    Bug("held-back responses are lost at a restart", "loop/trainer.py",
        'self.held = [Response.from_state_dict(response) for response in held]', "self.held = []",
        "test_resume.py::test_N_steps_a_restart_and_the_rest_are_bit_for_bit_one_run"),
]  # fmt: skip


@pytest.mark.parametrize("bug", [pytest.param(bug, id=bug.what.replace(" ", "-")) for bug in BUGS])
def test_the_named_test_kills_the_bug(bug: Bug, tmp_path: Path) -> None:
    for folder in ("tppo_ref", "sim", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    target = tmp_path / "tppo_ref" / bug.file
    text = target.read_text()
    assert text.count(bug.before) == 1, (
        f"{bug.file} holds {bug.before!r} {text.count(bug.before)} times, expected once: renew this bug"
    )
    target.write_text(text.replace(bug.before, bug.after))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"tests/{bug.test}"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1, f"the test did not fail (exit code {run.returncode}):\n{run.stdout[-2000:]}{run.stderr[-1000:]}"
    assert " failed" in run.stdout, f"it broke instead of failing:\n{run.stdout[-2000:]}"
