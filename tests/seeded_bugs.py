"""The planted bugs, and what plants one: `test_seeded_bugs.py` runs those whose test needs no vLLM, `scale/test_seeded_bugs_of_scale.py`
the others.

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
from _pytest.mark.structures import ParameterSet

ROOT = Path(__file__).parents[1]


class Bug(NamedTuple):
    """`before` stands exactly once in `file`; with `after` in its place, `test` fails."""

    what: str
    file: str
    before: str
    after: str
    test: str


BUGS = [
    Bug("a response that ended is bootstrapped too", "tppo_ref/method/advantages.py", "torch.where(cut_B, _last(values_BT, runs), 0.0)",
        "_last(values_BT, runs)", "test_advantages.py::test_rows_that_are_not_cut_agree_with_gae_whatever_their_neighbours_are"),
    Bug("the cut takes the value of one token earlier", "tppo_ref/method/advantages.py", "torch.where(cut_B, _last(values_BT, runs), 0.0)",
        "torch.where(cut_B, _last(values_BT.roll(1, 1), runs), 0.0)", "test_advantages.py::test_egae_by_hand"),
    Bug("the bootstrap value is not discounted", "tppo_ref/method/advantages.py", "_last(rewards_BT, runs) + gamma * end_value_B",
        "_last(rewards_BT, runs) + end_value_B", "test_advantages.py::test_egae_is_its_definition"),
    Bug("the next value is not discounted", "tppo_ref/method/advantages.py", "add_(values_RT[:, 1:], alpha=gamma)",
        "add_(values_RT[:, 1:])", "test_advantages.py::test_gae_by_hand"),
    Bug("values outside the mask leak in", "tppo_ref/method/recurrence.py",
        "            _zero_outside(x_RT, runs.mask_BT[rows, columns], spans[rows])\n", "",
        "test_advantages.py::test_garbage_outside_the_mask_changes_nothing_bit_for_bit"),
    Bug("a block of rows takes the first block's rates", "tppo_ref/method/recurrence.py", "[level.of(rows) for level in levels]",
        "[level.of(slice(0, rows.stop - top)) for level in levels]", "test_recurrence.py::test_the_scan_is_the_loop_at_every_block_size"),
    Bug("lambda without the half window", "tppo_ref/method/advantages.py", "length_B + cut_B * (window / 2)", "length_B + cut_B * 0",
        "test_advantages.py::test_lambda_of_rows_by_hand"),
    Bug("the half window on ended rows too", "tppo_ref/method/advantages.py", "length_B + cut_B * (window / 2)", "length_B + window / 2",
        "test_advantages.py::test_lambda_of_rows_by_hand"),
    Bug("rounding is whitened where moments are given", "tppo_ref/method/advantages.py", "if count == 0 or std <= 8 * torch.finfo(x_BT.dtype).eps * abs(mean):",
        "if count == 0 or std == 0:", "test_trainer.py::test_advantages_that_differ_by_rounding_alone_train_nothing"),
    Bug("moments of whitening over padding too", "tppo_ref/method/advantages.py", "count = int(mask_BT.count_nonzero())", "count = mask_BT.numel()",
        "test_advantages.py::test_whiten_by_hand"),
    Bug("a tail is cut off ended rows too", "tppo_ref/method/masks.py", "torch.where(cut_B, stop_B - skip_tail, stop_B)", "stop_B - skip_tail",
        "test_filters.py::test_policy_token_mask_by_hand"),
    Bug("the first token of the window is dropped", "tppo_ref/method/masks.py", "column_T >= window_start_B", "column_T > window_start_B",
        "test_filters.py::test_policy_token_mask_by_hand"),
    Bug("the critic trains on running responses", "tppo_ref/method/masks.py", "return response_mask_BT & ended_B[:, None]",
        "return response_mask_BT.clone()",
        "test_filters.py::test_f2_the_critic_sees_every_token_of_ended_responses_and_none_of_running_ones"),
    Bug("old and new log-probability swapped", "tppo_ref/method/losses.py", "log_ratio = logprob - old_logprob", "log_ratio = old_logprob - logprob",
        "test_losses.py::test_policy_loss_by_hand_over_rows_weights_and_mask"),
    Bug("the clip takes the better side", "tppo_ref/method/losses.py", "torch.minimum(unclipped, clipped)", "torch.maximum(unclipped, clipped)",
        "test_losses.py::test_every_case_of_the_clipped_surrogate_in_value_and_gradient"),
    Bug("clip-higher is clip-lower", "tppo_ref/method/losses.py", "ratio.clamp(1 - clip_low, 1 + clip_high)",
        "ratio.clamp(1 - clip_high, 1 + clip_low)",
        "test_losses.py::test_every_case_of_the_clipped_surrogate_in_value_and_gradient"),
    Bug("the dual clip acts on positive advantages", "tppo_ref/method/losses.py", "torch.where(advantages < 0, dual_clip * advantages, -math.inf)",
        "dual_clip * advantages", "test_losses.py::test_every_case_of_the_clipped_surrogate_in_value_and_gradient"),
    Bug("a mean of means", "tppo_ref/method/losses.py", "return -surrogate.sum() / denominator, stats",
        "return -surrogate.sum() / mask_BT.sum().clamp(min=1), stats",
        "test_losses.py::test_micro_batches_that_share_a_denominator_equal_one_batch"),
    Bug("a mask by multiplication", "tppo_ref/method/losses.py", "return torch.where(mask_BT, x_BT, torch.zeros((), dtype=x_BT.dtype, device=x_BT.device))",
        "return x_BT * mask_BT", "test_losses.py::test_masked_out_entries_change_neither_loss_nor_gradient_whatever_they_are"),
    Bug("the value clip takes the smaller error", "tppo_ref/method/losses.py", "torch.maximum(error, clipped_error)",
        "torch.minimum(error, clipped_error)",
        "test_losses.py::test_every_case_of_the_clipped_value_loss_in_value_and_gradient"),
    Bug("a continued response gets a fresh budget", "tppo_ref/method/slots.py", "min(self.window - now, self.max_response_tokens - num_tokens)",
        "min(self.window - now, self.max_response_tokens)",
        "test_batching.py::test_F7_segments_of_a_response_sum_to_at_most_the_cap_and_a_continued_one_gets_what_is_left"),
    Bug("a refilled slot decodes beyond the window", "tppo_ref/method/slots.py", "min(self.window - now, self.max_response_tokens - num_tokens)",
        "min(self.window, self.max_response_tokens - num_tokens)",
        "test_batching.py::test_the_segments_are_those_of_a_simulator_that_walks_token_by_token"),
    Bug("an end token at the cap counts as the cap", "tppo_ref/method/slots.py", "            if end_token:\n                end = End.END_TOKEN",
        "            if end_token and num_tokens < self.max_response_tokens:\n                end = End.END_TOKEN",
        "test_batching.py::test_how_a_response_stands_follows_from_its_tokens_the_cap_and_nothing_else"),
    Bug("samples of a group share a seed", "tppo_ref/rollout/batcher.py", "epoch * self.samples_per_prompt + index", "epoch * self.samples_per_prompt",
        "test_batching.py::test_groups_are_n_samples_of_each_prompt_each_with_its_own_seed"),
    Bug("the score lands one token early", "tppo_ref/loop/rows.py", "rewards_BT[row, len(response) - 1] = response.score",
        "rewards_BT[row, max(len(response) - 2, 0)] = response.score",
        "test_trainer.py::test_F2_each_ended_token_reaches_the_critic_once_per_epoch_and_no_running_one_ever"),
    Bug("deferred tokens are clipped around the new policy", "tppo_ref/loop/forward.py", "torch.where(rows.new_BT, start_BT, rows.behaviour_BT)", "torch.where(rows.run_BT, start_BT, rows.behaviour_BT)",
        "test_trainer.py::test_F4_a_deferred_token_is_trained_against_its_own_older_policy"),
    Bug("a deferred tail is never trained", "tppo_ref/method/masks.py", "torch.maximum(window_start_B, length_B - skip_tail), length_B)",
        "length_B, length_B)",
        "test_trainer.py::test_a_tail_that_is_deferred_is_trained_exactly_once_and_nothing_is_excluded"),
    Bug("the tail is trained although it is excluded", "tppo_ref/loop/rows.py",
        "train_BT=policy_token_mask(mask_BT, start_B, cut_B, skip_tail=config.tail_tokens)",
        "train_BT=policy_token_mask(mask_BT, start_B, cut_B, skip_tail=0)",
        "test_trainer.py::test_F1_generated_is_trained_plus_excluded_plus_pending_at_every_step"),
    Bug("values are read one token late", "tppo_ref/rollout/packing.py", "to(response_M - 1)", "to(response_M)",
        "test_models.py::test_values_equal_plain_unpadded_forward"),
    Bug("all tokens of a request are drawn with one number", "tppo_ref/rollout/torch_engine.py", "uniform(state[SEED] + state[DONE])",
        "uniform(state[SEED])", "test_engines.py::test_tokens_and_logprobs_equal_a_naive_loop"),
    Bug("held-back responses are lost at a restart", "tppo_ref/loop/trainer.py",
        'self.held = self._dealt([state["held"] for state in states], own)', "self.held = []",
        "test_resume.py::test_N_steps_a_restart_and_the_rest_are_bit_for_bit_one_run"),
    Bug("the warm-up is a step short", "tppo_ref/loop/trainer.py", "self.num_steps <= config.value.warmup_steps",
        "self.num_steps < config.value.warmup_steps",
        "test_trainer.py::test_warm_up_steps_train_the_critic_alone_and_exclude_their_tokens"),
    Bug("the books count a warm-up's tokens as trained", 'tppo_ref/loop/ledger.py',
        'self.tokens["excluded_warmup"] +=',
        'self.tokens["trained"] +=',
        'test_trainer.py::test_warm_up_steps_train_the_critic_alone_and_exclude_their_tokens'),
    Bug('the books count the tail as trained', 'tppo_ref/loop/ledger.py',
        'self.tokens["trained"] += trained\n                self.tokens["excluded_tail"] += settled - response.num_settled - trained',
        'self.tokens["trained"] += settled - response.num_settled',
        'test_trainer.py::test_F1_generated_is_trained_plus_excluded_plus_pending_at_every_step'),
    Bug("ages are counted from the next version", "tppo_ref/loop/trainer.py", "sampled_with=self.version - 1",
        "sampled_with=self.version",
        "test_trainer.py::test_staleness_is_the_weight_versions_between_sampling_and_training_of_the_trained_tokens"),
    Bug('a restart forgets the version of the weights', 'tppo_ref/loop/trainer.py',
        'self.num_steps, self.version = first["num_steps"], first["version"]',
        'self.num_steps = first["num_steps"]',
        'test_restart_state.py::test_a_restored_trainer_is_the_one_that_was_saved_in_every_attribute'),
    Bug('a restart forgets how many updates each version had', 'tppo_ref/loop/ledger.py',
        'self.updates_at = {version: n for state in states for version, n in state["updates_at"]}',
        'self.updates_at = {version: 0 for state in states for version, n in state["updates_at"]}',
        'test_restart_state.py::test_a_restored_trainer_is_the_one_that_was_saved_in_every_attribute'),
    Bug("a restart begins the learning rate's warm-up anew", 'tppo_ref/loop/learner.py',
        'self.num_steps, self.num_updates = state["num_steps"], state["num_updates"]',
        'self.num_updates = state["num_updates"]',
        'test_restart_state.py::test_a_restored_trainer_is_the_one_that_was_saved_in_every_attribute'),
    Bug("GePPO's clip stays around 1", "tppo_ref/method/losses.py", "ratio.clamp(middle - clip_low, middle + clip_high)",
        "ratio.clamp(1 - clip_low, 1 + clip_high)", "test_losses.py::test_geppo_clips_around_the_ratio_before_the_update"),
    Bug("a reused response is booked twice", "tppo_ref/loop/ledger.py", "            if reused:\n                continue\n", "",
        "test_train_once.py::test_geppo_trains_on_the_last_batches_again_and_books_each_token_once"),
    Bug("the average of PPO-EWMA keeps its bias", "tppo_ref/loop/updates.py", "average.lerp_(parameter.detach(), 1 / self.weight)",
        "average.lerp_(parameter.detach(), 1 - self.decay)",
        "test_trainer.py::test_ppo_ewma_the_average_is_of_all_weights_so_far_each_older_one_counting_decay_times_less"),
    Bug("gradient flows into the token before the window", "tppo_ref/rollout/attention.py", "torch.where(self.first_mask, live_NKD.detach(), live_NKD)",
        "live_NKD",
        "test_constant_prefix.py::test_log_probabilities_and_their_gradient_are_those_of_detached_keys_and_values"),
    Bug("a live token does not see itself", "tppo_ref/rollout/attention.py", "sees = keys <= constant[a:b, None, None, None] + own[:, None]",
        "sees = keys < constant[a:b, None, None, None] + own[:, None]",
        "test_constant_prefix.py::test_log_probabilities_and_their_gradient_are_those_of_detached_keys_and_values"),
    Bug("a rank without rows reads no prefix", "tppo_ref/rollout/models.py", "live_from=None if batch.live_from is None else [0]",
        "live_from=None",
        "test_constant_prefix.py::test_an_empty_batch_makes_the_same_passes_and_weighs_nothing"),
    Bug("one token more must be there before a cut response trains", "tppo_ref/loop/trainer.py", "response.num_settled >= policy.min_new_tokens",
        "response.num_settled > policy.min_new_tokens",
        "test_train_once.py::test_a_cut_response_trains_once_it_holds_enough_untrained_tokens_and_always_when_it_ends"),
    Bug('a synchronous batch never ends', 'tppo_ref/method/slots.py',
        'if self.refill == "batch" and self.begun == self.responses_per_step:',
        'if False:',
        'test_train_once.py::test_synchronous_ppo_with_a_batch_of_three_times_its_slots'),
    Bug("an engine that disagrees is believed", "tppo_ref/loop/forward.py", "if gap > config.engine_gap_limit:",
        "if False:",
        "test_train_once.py::test_an_engine_that_disagrees_is_refused_before_the_update_on_the_step_that_sees_it"),
    Bug("the LM loss makes right responses less likely", "tppo_ref/method/losses.py", "return -_inside(logprob_BT, mask_BT).sum() / denominator",
        "return _inside(logprob_BT, mask_BT).sum() / denominator",
        "test_losses.py::test_positive_lm_loss_by_hand"),
    Bug("the gap to the engine is signed", "tppo_ref/loop/forward.py", "(logprob_BT - rows.behaviour_BT)[compared_BT].abs().double()",
        "(logprob_BT - rows.behaviour_BT)[compared_BT].double()",
        "test_train_once.py::test_an_engine_that_disagrees_is_refused_before_the_update_on_the_step_that_sees_it"),
    Bug("a value is discounted twice", "sim/lab/token_mdp.py", "self.reward_E[edges] + self.gamma * np.where(next_ == ENDED, 0.0, value_N[next_])",
        "self.reward_E[edges] + self.gamma**2 * np.where(next_ == ENDED, 0.0, value_N[next_])",
        "test_token_mdp.py::test_value_q_and_advantage_are_those_of_the_definition"),
    Bug("a response goes on after its end", "sim/lab/token_mdp.py", "live_E = self.next_E[edges] != ENDED\n",
        "live_E = self.next_E[edges] != ENDED - 1\n",
        "test_token_mdp.py::test_value_q_and_advantage_are_those_of_the_definition"),
    Bug("the overlong penalty begins at the cap", "scale/shaping.py", "over = max(0, len(response) - (cap - config.overlong_buffer))",
        "over = max(0, len(response) - cap)",
        "scale/test_rewards.py::test_the_overlong_penalty_by_hand"),
    Bug("a missing answer is not paid for", "scale/shaping.py", "return score - (0.0 if answered else config.format_penalty)",
        "return score",
        "scale/test_rewards.py::test_shaping_is_off_by_default_and_the_format_penalty_is_paid_once"),
    Bug("what may not move moves", "scale/distributed.py", "if movable and tokens)",
        "if tokens)",
        "scale/test_level.py::test_a_thing_moves_once_at_most_only_if_it_may_and_no_rank_gets_more_than_the_fullest_had"),
    Bug("the clip's anchor of the critic is zero", 'tppo_ref/loop/value_targets.py',
        'pad([r.values for r in responses], dtype, device)',
        'torch.zeros_like(targets_BT)',
        'test_whole_step.py::test_a_named_methods_steps_are_the_oracles'),
    Bug("the learning rate's warm-up counts updates", 'tppo_ref/loop/learner.py',
        '        if not self.grad_norms:\n            self._warm_up()',
        '        self._warm_up()',
        'test_whole_step.py::test_steps_are_the_oracles_under_any_settings'),
]  # fmt: skip


def cases(*, scale: bool) -> list[ParameterSet]:
    """The bugs whose test stands in tests/scale (or outside of it), as parameters of a test."""
    return [pytest.param(bug, id=bug.what.replace(" ", "-")) for bug in BUGS if bug.test.startswith("scale/") == scale]


def assert_killed(bug: Bug, folder: Path) -> None:
    """In a copy of the checkout under `folder`, the bug's test fails: it neither passes, nor is it skipped, nor does it break."""
    for part in ("tppo_ref", "sim", "scale", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    target = folder / bug.file
    text = target.read_text()
    assert text.count(bug.before) == 1, (
        f"{bug.file} holds {bug.before!r} {text.count(bug.before)} times, expected once: renew this bug"
    )
    target.write_text(text.replace(bug.before, bug.after))
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"tests/{bug.test}"]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 1, f"the test did not fail (exit code {run.returncode}):\n{run.stdout[-2000:]}{run.stderr[-1000:]}"
    assert " failed" in run.stdout, f"it broke instead of failing:\n{run.stdout[-2000:]}"
