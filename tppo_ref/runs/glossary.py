"""The glossary of metrics: name, formula, what it is reduced over, unit, and the range in which a run is well."""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    """formula; what it is reduced over; unit; the range in which a run is well."""

    formula: str
    over: str
    unit: str
    healthy: str


MODEL_FLOPS = "2 P n + 4 L H D s + 2 W m"
MFU = "{} / (seconds of the slowest rank x ranks x peak FLOP/s); null where no peak is known (run.peak_tflops)"

FLOPS = {
    "flops/rollout": Metric(f"decoding: {MODEL_FLOPS}, what stood before the window read once", "step", "FLOP", "steady"),
    "flops/forward": Metric(f"values and old log-probabilities: {MODEL_FLOPS}", "step", "FLOP", "steady"),
    "flops/policy": Metric(f"policy updates: 3 x ({MODEL_FLOPS}), once what is read without gradient", "step", "FLOP", "steady"),
    "flops/value": Metric(f"value updates: 3 x ({MODEL_FLOPS})", "step", "FLOP", "steady"),
    "mfu/rollout": Metric(MFU.format("flops/rollout"), "step", "share", "low: memory sets its pace"),
    "mfu/forward": Metric(MFU.format("flops/forward"), "step", "share", "as mfu/policy"),
    "mfu/policy": Metric(MFU.format("flops/policy"), "step", "share", "0.3 to 0.6 on GPUs"),
    "mfu/value": Metric(MFU.format("flops/value"), "step", "share", "as mfu/policy"),
}

MEMORY = {
    f"memory/{phase}_{which}": Metric(f"{what}; fullest rank, null on a CPU", f"phase {phase}", "bytes", healthy)
    for phase in ("rollout", "forward", "policy", "value", "sync")
    for which, what, healthy in (
        ("allocated", "most that torch's tensors took (max_memory_allocated), what a sleeping vLLM gave back included", "steady"),
        ("reserved", "most that torch's allocator held (max_memory_reserved), the same included", "steady"),
        ("used", "of the device at the phase's end, by whomever (mem_get_info)", "about the dry run's, below the device's size"),
    )
}

GLOSSARY: dict[str, Metric] = {
    "time/train_s": Metric("sum of time/step_s: the training clock", "run", "s", "rises"),
    "time/step_s": Metric("seconds of the step by run.clock, evaluation and checkpoints excluded", "step", "s", "steady"),
    "time/rollout_s": Metric("decoding one window, prefill included", "step", "s", "steady"),
    "time/verify_s": Metric("waiting for scores once decoding is done", "step", "s", "near 0: it overlaps decoding"),
    "time/forward_s": Metric("values and old log-probabilities", "step", "s", "below time/policy_s"),
    "time/policy_s": Metric("policy updates", "step", "s", "steady"),
    "time/value_s": Metric("value updates", "step", "s", "steady"),
    "time/sync_s": Metric("weights to the engine", "step", "s", "small"),
    "time/other_s": Metric("time/step_s less the phases above", "step", "s", "at most 5 % of time/step_s"),
    **FLOPS,
    **MEMORY,
    "rollout/decode_steps": Metric("decode steps of the window", "step", "steps", "T-PPO: the window; PPO: the longest response"),
    "rollout/tokens": Metric("response tokens sampled", "step", "tokens", "steady"),
    "rollout/tokens_per_s": Metric("rollout/tokens / time/rollout_s", "step", "tokens/s", "steady"),
    "rollout/occupancy": Metric(
        "share of (slot, decode step) pairs in which the slot decoded", "step", "share", "T-PPO, immediate refill: 1"
    ),
    "rollout/idle_s": Metric("(1 - rollout/occupancy) x time/rollout_s", "step", "s", "T-PPO: near 0"),
    "response/rows": Metric("responses that sampled a token in this step: its rows", "step", "responses", "at least the slots"),
    "response/ended": Metric("responses that ended", "step", "responses", "above 0; at least one for each rank"),
    "response/cut_share": Metric("rows that go on in the next window (RUNNING) / rows", "step", "share", "below run.cut_warning"),
    "response/cut_token_share": Metric(
        "tokens of the window in rows RUNNING at its edge / tokens of the window", "step", "share", "what the cut rule touches"
    ),
    "response/capped_share": Metric(
        "share of ended responses that reached rollout.max_response_tokens (LENGTH_CAP)", "step", "share", "below 0.1, not rising"
    ),
    "response/length_mean": Metric("tokens of ended responses, mean", "step", "tokens", "no run-away"),
    "response/length_max": Metric("tokens of ended responses, maximum", "step", "tokens", "below the cap"),
    "response/turns_mean": Metric("the policy's turns in ended responses, mean", "step", "turns", "1 without an environment"),
    "response/score_mean": Metric("score of ended responses, mean", "step", "score", "rises"),
    "response/accuracy": Metric(
        "share of ended responses with a score above 0", "step", "share", "rises; favours short ones early on"
    ),
    "verify/timeouts": Metric("verifications killed after task.verifier_timeout_s", "run", "responses", "0"),
    "verify/errors": Metric("verifications that raised, died or gave no number within 1e6", "run", "responses", "0"),
    "ledger/generated": Metric("response tokens sampled", "run", "tokens", "sum of the next four"),
    "ledger/trained": Metric("tokens that the policy trained on, each once", "run", "tokens", "most of ledger/generated"),
    "ledger/excluded_tail": Metric("tail tokens left out for good", "run", "tokens", "tail tokens x cut rows"),
    "ledger/excluded_warmup": Metric("tokens sampled while the critic trained alone", "run", "tokens", "stops after the warm-up"),
    "ledger/pending": Metric(
        "deferred tokens, and tokens of responses that train when they, or their groups, have ended", "now", "tokens", "bounded"
    ),
    "ledger/held_groups": Metric(
        "prompts of which some responses have ended and wait for the others; 0 with a value model", "now", "groups", "bounded"
    ),
    "ledger/held_responses": Metric("responses that have ended and wait for their group", "now", "responses", "bounded"),
    "ledger/held_steps": Metric(
        "steps between a trained response's end and its training, mean; null with a value model", "step", "steps", "synchronous: 0"
    ),
    "ledger/in_flight": Metric("responses RUNNING at the window's edge", "now", "responses", "at most the slots"),
    "ledger/observed": Metric(
        "tokens that an environment answered, in no other number of the ledger", "run", "tokens", "0 without an environment"
    ),
    "advantage/mean": Metric("raw advantages over trained tokens, mean", "step", "score", "around 0"),
    "advantage/std": Metric("raw advantages over trained tokens, population standard deviation", "step", "score", "above 0"),
    "advantage/clamped_share": Metric("whitened advantages beyond advantage.clamp / trained tokens", "step", "share", "below 0.01"),
    "advantage/lam_mean": Metric("lambda, mean over rows; null without a value model", "step", "1", "0.95 to 1"),
    "advantage/flat_groups": Metric(
        "trained groups whose scores are all alike, which teach nothing / trained groups; null with a value model",
        "step",
        "share",
        "far below 1",
    ),
    "policy/tokens": Metric("trained tokens", "step", "tokens", "near rollout/tokens"),
    "policy/reused_tokens": Metric("of these, tokens of earlier steps' batches", "step", "tokens", "0; GePPO: 2 in 3"),
    "policy/prefix_tokens": Metric(
        "prompt tokens, and response tokens that an earlier step has fed already", "step", "tokens", "grows with length/window"
    ),
    "policy/staleness": Metric(
        "weight versions between sampling and training, mean over trained tokens",
        "step",
        "versions",
        "T-PPO: 0; partial rollouts: up to cap / window",
    ),
    "policy/staleness_max": Metric("the same, the largest", "step", "versions", "below run.staleness_warning"),
    "policy/lag_updates": Metric(
        "policy updates between a trained token's sampling and the step that trains it, mean; the next comes on top",
        "trained tokens",
        "updates",
        "0 where each window's tokens train in it",
    ),
    "policy/lag_in_step": Metric(
        "updates of this step before the one that trains the token, mean", "trained tokens", "updates", "half of policy/updates"
    ),
    "policy/updates": Metric("optimiser steps", "step", "updates", "steady"),
    "policy/loss": Metric("clipped surrogate, token mean", "step", "1", "around 0"),
    "policy/lm_loss": Metric("positive-example LM loss, token mean, before its weight", "step", "nats", "falls"),
    "policy/clipped_share": Metric("tokens at which the clip binds / trained tokens", "step", "share", "below 0.2"),
    "policy/dual_clipped_share": Metric("tokens at which the dual clip binds / trained tokens", "step", "share", "near 0"),
    "policy/kl": Metric("KL of new from old policy: mean of r - 1 - log r, r the ratio (k3)", "step", "nats", "below 0.05"),
    "policy/ratio_max": Metric("largest probability ratio", "step", "1", "below 10"),
    "policy/weight_clipped_share": Metric("importance weights capped or zeroed / trained tokens", "step", "share", "below 0.05"),
    "policy/logprob_gap": Metric(
        "absolute difference of recomputed and engine log-probability, mean over this step's tokens; policy.old_logprobs engine: "
        "over a twentieth of the micro-batches, null where none was drawn",
        "step",
        "nats",
        "flat; TorchEngine in float32: below 1e-5; vLLM: below the probe's limit",
    ),
    "policy/grad_norm": Metric("gradient norm before clipping, mean over updates", "step", "1", "steady"),
    "policy/lr": Metric("learning rate", "now", "1", "as set"),
    "value/responses": Metric("ended responses trained on (joint: policy rows)", "step", "responses", "above 0"),
    "value/held": Metric(
        "ended responses held back for value.batch_responses", "now", "responses", "0 where that is 0; else bounded"
    ),
    "value/tokens": Metric("trained tokens, counted in each epoch", "step", "tokens", "steady"),
    "value/updates": Metric("optimiser steps", "step", "updates", "steady"),
    "value/loss": Metric("clipped squared error / 2, token mean", "step", "score^2", "falls"),
    "value/clipped_share": Metric("tokens at which the value clip binds / trained tokens", "step", "share", "below 0.2"),
    "value/explained_variance": Metric(
        "1 - Var(target - V) / Var(target), V before each update; null where Var(target) is below 1e-12", "step", "1", "above 0"
    ),
    "value/grad_norm": Metric("gradient norm before clipping, mean over updates", "step", "1", "steady"),
    "value/lr": Metric("learning rate", "now", "1", "as set"),
    "eval/accuracy": Metric("share of sampled full-length answers with a score above 0", "evaluation set", "share", "rises"),
    "eval/length_mean": Metric("tokens of these answers, mean", "evaluation set", "tokens", "no run-away"),
    "eval/length_p99": Metric("tokens of these answers, 99th percentile", "evaluation set", "tokens", "the tail stays"),
    "eval/capped_share": Metric("share of these answers that reached the cap (LENGTH_CAP)", "evaluation set", "share", "below 0.1"),
    "eval/verify_failures": Metric("verifications that failed (as verify/)", "evaluation set", "answers", "0"),
    "eval/time_s": Metric("wall-clock of the evaluation, outside of the training clock", "evaluation set", "s", "small"),
}
