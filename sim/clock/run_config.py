"""A setting that the planner found, as a config that `scale/launch.py` takes: what is planned, and the port's numbers for the rest.

    fields_of(question, found) -> [(dotted field, value, where it comes from)]
    as_yaml(fields)            -> the file's text; sim/ does not import scale/, a test loads it there

Marks as in docs/config.md; what the planner chose is [O], with "planned" before it.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from sim.clock.methods import ONCE
from sim.clock.search import Found, Question


class Field(NamedTuple):
    """A line of the config."""

    path: str
    value: Any
    source: str


PLANNED = "planned [O]"
INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
PLAIN = re.compile(r"[A-Za-z][\w./-]*")


def fields_of(question: Question, found: Found) -> list[Field]:
    """Every field, section by section. ValueError for a method that this repository does not run."""
    if found.method.kind not in ("tppo", "ppo", "partial-is") or found.method.critic == "small":
        raise ValueError(f"method: got {found.method.name}, which this repository does not run; expected T-PPO, PPO or partial-is")
    alone = found.method.critic == "none"
    if alone and question.samples < 2:
        raise ValueError(f"samples: got {question.samples} with {found.method.name}; expected at least 2 answers to each prompt")
    name = question.shape.name.rpartition("/")[2]
    low = name.lower()
    rows = [
        ("task.name", "jsonl", "a file of prompts and answers [O]"),
        ("task.path", "data/math-train.jsonl", "yours; the paper's prompts are mathematics with a rule verifier [P] [O]"),
        ("task.eval_path", "data/aime24.jsonl", "AIME 2024, 30 problems [S]"),
        ("task.max_prompt_tokens", question.longest_prompt, "longer ones are left out and counted [O]"),
        ("task.chat_template", False, "a base model [O]"),
        ("task.verifier_workers", 2 if question.num_devices > 1 else 8, "processes per rank [O]"),
        ("task.verifier_timeout_s", 10.0, "math-verify on a busy host [O]"),
        ("model.policy", f"models/{name}", "the base model [O]"),
        *([] if alone else [("model.value", f"runs/{low}-value/value",
                             "from pretrain-value; null while you make it. Without one VAPO fell to 11 [2]")]),
        ("model.device", "auto", "the GPUs [O]"),
        *_method(question, found),
        ("policy.lr", 8e-7, "[P]"), ("policy.lr_warmup_steps", 20, "[P]"), ("policy.weight_decay", 0.1, "[P]"),
        ("policy.mini_batches", found.mini_batches, f"updates, of {question.mini_batch} mean responses' tokens: {PLANNED}"),
        ("policy.mini_batch_tokens", 0, "so that mini_batches counts [O]"),
        ("policy.micro_batch_tokens", question.budget.sequence_tokens, "one longest row, prompt and response [O]"),
        ("policy.epochs", 1, "[P]"), ("policy.clip_low", 0.2, "[P]"), ("policy.clip_high", 0.28, "[P]"),
        ("policy.dual_clip", 10.0, "[P]"), ("policy.lm_loss_weight", 0.1, "on responses that ended correct in this step [P]"),
        *([] if alone else _value(question, found)),
        ("run.steps", 500, "how many steps the paper took is unknown [O]"),
        ("run.out", f"runs/{low}-math", "on a file system that all machines see [O]"),
        ("run.checkpoint_every", 10, f"{_checkpoint_bytes(question, found) / 1e12:.2g} TB each [O]"),
        ("run.checkpoints_kept", 2, "[O]"),
        ("run.eval_prompts", 30, "all of AIME 2024 [S]"), ("run.eval_samples", 32, "avg@32 [S]"),
        ("run.threads", 4, "CPU threads of torch, per rank [O]"),
    ]  # fmt: skip
    return [Field(f"algo.{path}", value, source) for path, value, source in rows] + _cluster(question, found)


def _method(question: Question, found: Found) -> list[tuple[str, Any, str]]:
    """The method, what decodes, and what of advantages it leaves open."""
    at, which, cap = found.setting, found.method, question.lengths.cap
    ppo, cut = which.kind == "ppo", which.kind == "tppo"
    importance = "truncated" if which.kind == "partial-is" and not which.levers else "none"
    alone = which.critic == "none"
    # partial-is fixes a weight that the engine's log-probabilities replace
    whole = "tppo" if which.levers else "rloo-window" if alone else "partial-is"
    named = {"ppo": "rloo" if alone else "ppo", "partial-is": whole, "tppo": "tppo-once" if which.name == ONCE else "tppo"}
    prefix = "constant" if set(which.levers) & {"a", "b"} else "full"
    rows: list[tuple[str, Any, str]] = [
        ("run.method", named[which.kind], f"{which.name}: {PLANNED}"),
        ("rollout.slots", at.slots, f"{at.slots * at.tp // question.num_devices} for each engine: {PLANNED}"),
        ("rollout.samples_per_prompt", question.samples, "[P]" if question.samples == 16 else "[O]"),
        ("rollout.window", cap if ppo else at.window, PLANNED),
        ("rollout.max_response_tokens", cap, "the longest response [P]" if cap == 24_576 else "the longest response [O]"),
        ("rollout.refill", "batch" if ppo else at.refill, PLANNED if ppo or at.refill != "immediate" else
         "a freed slot takes the next prompt in the same window [S]"),
        *([("rollout.responses_per_step", at.responses, f"in {found.mini_batches} mini-batches: {PLANNED}")] if ppo else []),
        ("rollout.temperature", 1.0, "[I]"),
    ]  # fmt: skip
    rows += [
        ("advantage.estimator", "rloo", "no value model: each answer against the others to its prompt [O]"),
        ("advantage.whiten", False, "advantages are measured within a group [O]"),
    ] if alone else [
        ("advantage.gamma", 1.0, "[S]"), ("advantage.lam", 0.95, "the floor of the policy's lambda [P]"),
        ("advantage.lam_alpha", 0.05, "max(lam, 1 - 1/(0.05 L)) [P]"),
    ]  # fmt: skip
    if cut:
        rows += [("advantage.cut_value", "previous", "V(s_l) = V(s_{l-1}) at a cut [S]"),
                 ("advantage.tail", "exclude", "the last tokens of a cut row are not trained [P]"),
                 ("advantage.tail_tokens", 8, "[P]")]  # fmt: skip
    if not alone:
        rows += [("advantage.whiten", True, "over the step's trained tokens [P]"),
                 ("advantage.clamp", 10.0, "of whitened advantages [P]")]  # fmt: skip
    rows += [
        ("policy.train_on", "ended" if which.kind == "partial-is" else "window", PLANNED),
        ("policy.prefix", prefix, PLANNED),
        ("policy.keep_prefix", "b" in which.levers, PLANNED),
        ("policy.old_logprobs", "engine" if "c" in which.levers else "recompute", PLANNED),
        ("policy.importance", importance, "the weight pi_start / pi_behaviour per token [O]"),
    ]  # fmt: skip
    if cut:
        rows.append(
            ("policy.min_new_tokens", at.window if "f" in which.levers else 0, f"a cut response waits for so many: {PLANNED}")
        )
    return rows


def _value(question: Question, found: Found) -> list[tuple[str, Any, str]]:
    """The critic. PPO's trains in the policy's mini-batches."""
    rows: list[tuple[str, Any, str]] = [("value.update", "independent", "own returns, own mini-batches [S]")]
    if found.method.kind == "ppo":
        rows = [("value.update", "joint", "in the policy's mini-batches [O]")]
    rows += [("value.lr", 2e-6, "[P]"), ("value.lr_warmup_steps", 20, "[P]"),
             ("value.warmup_steps", 10, "steps that train the value model alone [P]"),
             ("value.weight_decay", 0.1, "[P]")]  # fmt: skip
    if found.method.kind != "ppo":
        rows += [("value.mini_batches", found.mini_batches, "as many as the policy's [O]"),
                 ("value.mini_batch_tokens", 0, "so that mini_batches counts [O]"),
                 ("value.micro_batch_tokens", question.budget.sequence_tokens, "as the policy's [O]"),
                 ("value.epochs", 1, "[P]")]  # fmt: skip
    return [*rows, ("value.clip_low", 0.5, "[P]"), ("value.clip_high", 0.6, "[P]"),
            ("value.pretrain_responses", 32 * question.mini_batch, "how many the paper took is unknown [O]"),
            ("value.pretrain_epochs", 1, "unknown, too [O]")]  # fmt: skip


def _cluster(question: Question, found: Found) -> list[Field]:
    lay = found.layout
    per_node = min(lay.devices_per_node, lay.num_devices)
    timeout_s = max(3600, 600 * round(found.system.step.high / 300))
    return [
        Field("engine.kind", "vllm", "[O]"),
        Field("engine.tensor_parallel", lay.tensor_parallel, f"{lay.num_replicas} engines, each inside one machine: {PLANNED}"),
        Field("engine.dtype", "bfloat16", "[P]"),
        Field("engine.gpu_memory_utilization", lay.memory_utilisation, f"what states and probe leave of the device: {PLANNED}"),
        Field("engine.sleep_level", 2, "the engine's weights are dropped while the trainer works; each sync brings them [O]"),
        Field("sharding.compute_dtype", "bfloat16", "masters and reductions stay float32 [P]"),
        Field("sharding.checkpoint_layers", True, "without it a longest row does not fit [O]"),
        Field("sharding.offload", question.offload, "[O]"),
        Field("cluster.nodes", -(-lay.num_devices // per_node), "[O]"),
        Field("cluster.devices_per_node", per_node, "[O]"),
        Field("cluster.device_bytes", float(question.gpu.memory_bytes), f"{question.gpu.name}, as its driver reports it [2]"),
        Field("cluster.timeout_s", timeout_s, "twice a slow step, an hour at least [O]"),
        Field("data.instruction", INSTRUCTION, "as Qwen2.5-Math is asked [V]"),
        Field("data.over_long", "skip", "[O]"),
        Field("reward.overlong_buffer", 0, "the paper names no such penalty; DAPO's is 4,096 [V]"),
        Field("evaluation.every_steps", 20, "[O]"),
    ]  # fmt: skip


def _checkpoint_bytes(question: Question, found: Found) -> float:
    """Masters and moments of the models."""
    critic = 0 if found.method.critic == "none" else question.shape.num_value_parameters
    return 12.0 * (question.shape.num_parameters + critic)


def as_tree(fields: list[Field]) -> dict[str, Any]:
    """Nested by the fields' dots."""
    tree: dict[str, Any] = {}
    for path, value, _ in fields:
        *sections, last = path.split(".")
        here = tree
        for section in sections:
            here = here.setdefault(section, {})
        here[last] = value
    return tree


def as_yaml(fields: list[Field]) -> str:
    """A section's fields stand together, in the order of their first one; behind each, where it comes from."""
    source = {path: text for path, _, text in fields}

    def lines(tree: dict[str, Any], prefix: str, depth: int) -> list[str]:
        found = []
        for name, value in tree.items():
            if isinstance(value, dict):
                found += [f"{'  ' * depth}{name}:", *lines(value, f"{prefix}{name}.", depth + 1)]
            else:
                found.append(f"{'  ' * depth}{name}: {_scalar(value)}  # {source[prefix + name]}")
        return found

    return "\n".join(lines(as_tree(fields), "", 0)) + "\n"


def _scalar(value: Any) -> str:
    """A YAML scalar that YAML 1.1 reads back as what it is: 8.0e-07, not 8e-07, which would be a string."""
    if isinstance(value, float):
        digits, e, exponent = f"{value:.12g}".partition("e")
        return (digits if "." in digits else f"{digits}.0") + (f"e{exponent}" if e else "")
    if isinstance(value, str) and not (
        value and value.replace("-", "").replace("_", "").replace("/", "").replace(".", "").isalnum()
    ):
        return json.dumps(value)
    return json.dumps(value) if not isinstance(value, str) else value
