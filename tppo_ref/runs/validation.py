"""What a config refuses before anything is loaded: one line with the field, its value and what was expected."""

from __future__ import annotations

import tempfile
from pathlib import Path

from tppo_ref.method.errors import UserError, refusal
from tppo_ref.runs.config import Config
from tppo_ref.runs.parsing import get_field

AT_LEAST_ONE = (
    "rollout.slots", "rollout.window", "rollout.max_response_tokens", "rollout.samples_per_prompt", "policy.epochs",
    "policy.mini_batches", "policy.micro_batch_tokens", "value.epochs", "value.mini_batches", "value.micro_batch_tokens",
    "run.steps", "run.threads", "run.eval_prompts", "run.eval_samples", "run.checkpoints_kept", "compare.seeds", "compare.jobs",
    "task.verifier_workers", "model.warm_start_steps", "value.pretrain_epochs", "model.hidden_size", "model.num_layers",
    "model.num_heads",
)  # fmt: skip
POSITIVE = (
    "policy.lr", "value.lr", "model.warm_start_lr", "policy.max_grad_norm", "value.max_grad_norm", "rollout.temperature",
    "task.verifier_timeout_s", "advantage.clamp", "policy.importance_cap", "policy.engine_gap_limit",
)  # fmt: skip
NOT_NEGATIVE = (
    "advantage.tail_tokens", "rollout.min_response_tokens", "rollout.responses_per_step", "policy.min_new_tokens",
    "policy.mini_batch_tokens", "value.mini_batch_tokens",
    "policy.lr_warmup_steps", "value.lr_warmup_steps", "value.warmup_steps", "value.batch_responses", "run.checkpoint_every",
    "run.eval_every_s", "model.logit_chunk_tokens", "policy.lm_loss_weight", "policy.weight_decay", "value.weight_decay",
    "value.pretrain_responses", "policy.clip_low", "policy.clip_high", "run.seed",
)  # fmt: skip


def check(config: Config) -> None:
    """Refuse what cannot run, before anything is loaded: UserError with the field, its value and what was expected."""
    lam, gamma = config.advantage.lam, config.advantage.gamma
    rollout, run = config.rollout, config.run
    for path in AT_LEAST_ONE:
        if get_field(config, path) < 1:
            raise UserError(f"{path}: expected an integer of at least 1, got {get_field(config, path)}")
    for path in POSITIVE:
        if not 0 < get_field(config, path) < float("inf"):
            raise UserError(f"{path}: expected a positive number, got {get_field(config, path)}")
    for path in NOT_NEGATIVE:
        if get_field(config, path) < 0:
            raise UserError(f"{path}: expected a number of at least 0, got {get_field(config, path)}")
    alpha = config.advantage.lam_alpha
    if alpha is not None and not 0 < alpha < float("inf"):
        raise UserError(refusal("advantage.lam_alpha", str(alpha), "a positive number, or null for a lambda of one length"))
    if config.advantage.tail == "defer" and not config.advantage.tail_tokens:
        remedy = "drop it or choose another run.method"
        raise UserError(refusal("advantage.tail", "defer with tail_tokens 0", "a tail to train in the next window", remedy))
    for path, number in (("advantage.lam", lam), ("advantage.gamma", gamma)):
        if not 0 <= number <= 1:
            raise UserError(f"{path}: expected a number from 0 to 1, got {number}")
    if not 0 <= config.policy.ewma_decay < 1:
        raise UserError(f"policy.ewma_decay: expected a number from 0 up to, not including, 1, got {config.policy.ewma_decay}")
    if config.model.hidden_size % (2 * config.model.num_heads):
        raise UserError(
            f"model.hidden_size: expected a multiple of twice model.num_heads ({config.model.num_heads}), "
            f"got {config.model.hidden_size}"
        )
    if not 0 < config.compare.target <= 1:
        raise UserError(f"compare.target: expected a share above 0, up to 1, got {config.compare.target}")
    if config.policy.importance != "none" and config.policy.old_logprobs == "engine":
        raise UserError(
            f"policy.old_logprobs: importance weights ({config.policy.importance}) need recomputed log-probabilities, got engine"
        )
    batch = rollout.responses_per_step
    if batch and rollout.refill != "batch":
        raise UserError(
            f"rollout.responses_per_step: got {batch} with refill {rollout.refill}; expected 0; only refill batch has a batch"
        )
    if 0 < batch < rollout.slots:
        raise UserError(f"rollout.responses_per_step: got {batch}; expected at least rollout.slots ({rollout.slots}), or 0")
    if config.policy.keep_prefix and (config.policy.prefix, config.policy.old_logprobs) != ("constant", "recompute"):
        raise UserError(
            "policy.keep_prefix: got true; expected false, or policy.prefix constant with old_logprobs recompute, which fills it"
        )
    for path in ("value.clip_low", "value.clip_high"):
        if (bound := get_field(config, path)) is not None and not bound >= 0:
            raise UserError(f"{path}: expected a number of at least 0, or null, got {bound}")
    if rollout.min_response_tokens >= rollout.max_response_tokens:
        raise UserError(f"rollout.min_response_tokens: expected less than rollout.max_response_tokens "
                        f"({rollout.max_response_tokens}), got {rollout.min_response_tokens}")  # fmt: skip
    if config.policy.dual_clip is not None and config.policy.dual_clip <= 1:
        raise UserError(f"policy.dual_clip: expected a number above 1, or null, got {config.policy.dual_clip}")
    if run.train_seconds is not None and run.train_seconds <= 0:
        raise UserError(f"run.train_seconds: expected a positive number, or null, got {run.train_seconds}")


def writable_folder(path: str, name: str) -> Path:
    """`path` as an existing folder that can be written to, or a UserError that names the field."""
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # nameless: ranks of other machines test the same folder at the same time
    except OSError as error:
        raise UserError(f"{name}: cannot write to {path} ({error.strerror}); choose another folder") from None
    return folder
