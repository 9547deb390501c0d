"""The run as data: frozen dataclasses, and the one parser that laptop and cluster share.

Every field has a line of help that ends in the provenance of its default: [S] stated by the paper, [P] read in the authors'
port, [V] another primary source, [I] inferred, [M] measured by us on the built-in tasks, [O] our choice. Models and
learning rates of that size do not fit a laptop: where a default differs from theirs, the line gives both.

Precedence, weakest first: the defaults here, `--config FILE`, `--section.field VALUE`. A named method (`run.method`) fixes its
fields: `train` refuses another value for them, `evaluate` and `pretrain-value` one beside `--run.method` on the command line,
`compare` lets each method win, and `compare.per_method` has the last word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Annotated, Any, Literal

from tppo_ref.loop.bounds import Bounds, Count, Natural, NotNegative, Positive, Share, Unit
from tppo_ref.loop.settings import AdvantageConfig, PolicyConfig, RolloutConfig, ValueConfig
from tppo_ref.method.errors import UserError, nearest, refusal
from tppo_ref.runs.parsing import field_paths, get_field, replace_fields
from tppo_ref.tasks.verifier_worker import MAX_SCORE


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is asked, and who checks the answers."""

    name: str = "chain"
    """Built-in task (chain, fork, length, maze, brackets, calculator), jsonl for a file, or module:Class of your own Task. [O]"""
    path: str | None = None
    """jsonl only: training prompts, one JSON object a line; on a cluster .parquet or a data set of the Hub, too. [O]"""
    eval_path: str | None = None
    """jsonl only: evaluation prompts; none = the last tenth of the training file. [O]"""
    tokenizer: str | None = None
    """jsonl only: folder of a transformers tokenizer, or bytes for the built-in byte-level one; none = model.policy's. [O]"""
    prompt_key: str = ""
    """jsonl only: key of the prompt text; empty = 'prompt' or 'question' (on a cluster 'problem', too). [O]"""
    answer_key: str = "answer"
    """jsonl only: key of the answer. [O]"""
    max_prompt_tokens: Count = 1024
    """jsonl only: a longer prompt is an error that names its line; on a cluster data.over_long says what it is. [O]"""
    chat_template: bool = False
    """jsonl only: wrap prompts in the tokenizer's chat template. [O]"""
    verifier: str | None = None
    """Dotted name module:function of a verifier of your own; none = the task's. [O]"""
    verifier_timeout_s: Annotated[float, Bounds(0, 1e6, above=True)] = 5.0
    """Wall-clock seconds after which a verification is killed, counted and scored as failed; an import has 60, or this. [O]"""
    verifier_workers: Annotated[int, Bounds(1, 1024)] = 1
    """Verifier processes. [O]"""
    failure_score: Annotated[float, Bounds(-MAX_SCORE, MAX_SCORE)] = -1.0
    """Score of a response whose verification timed out or raised. [O]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Policy and value model."""

    policy: str | None = None
    """Checkpoint folder, or config.json of a fresh model; none = the task's own warm-started base model. [O]"""
    value: str | None = None
    """Checkpoint folder of a (pre-trained) value model; none = the policy's weights under a new scalar head. [O]"""
    hidden_size: Annotated[int, Bounds(1, 65536)] = 32
    """Width of the built-in base model. [M]"""
    num_layers: Annotated[int, Bounds(1, 1000)] = 3
    """Layers of the built-in base model. [M]"""
    num_heads: Annotated[int, Bounds(1, 1024)] = 2
    """Attention heads of the built-in base model. [M]"""
    warm_start_steps: Annotated[int, Bounds(1, 1e7)] = 700
    """Supervised steps on imperfect demonstrations that make the built-in base model. [M]"""
    warm_start_lr: Positive = 5e-3
    """Peak learning rate of these steps. [M]"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights and activations; what updates and averages move, losses and advantages are float32 always. [O]"""
    device: str = "cpu"
    """cpu, cuda, cuda:N or auto. [O]"""
    trust_remote_code: bool = False
    """Let a checkpoint folder run its own Python code. [O]"""
    logit_chunk_tokens: Natural = 0
    """Tokens whose logits exist at once; 0 = as many as fit half a gigabyte. [O]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, where to, what is kept."""

    method: str = "tppo"
    """Named method, which fixes some fields: tppo, ppo, partial-is, rloo and more; docs/config.md lists them and the fields. [O]"""
    seed: Natural = 0
    """Seed of sampling, prompt order and mini-batches. [O]"""
    steps: Count = 1000
    """Stop after this many training steps; not used where train_seconds is given. [O]"""
    train_seconds: Positive | None = None
    """Stop after this many seconds on the training clock (evaluation, checkpoints excluded); none = by steps. [O]"""
    out: str = "runs/train"
    """Folder for checkpoints, metrics and figures. [O]"""
    cache: str = "runs/cache"
    """Folder for warm-started base models and pre-trained value models. [O]"""
    resume: bool = False
    """Go on from the newest checkpoint in `out`. [O]"""
    checkpoint_every: Natural = 200
    """Steps between checkpoints; 0 = only at the end. [O]"""
    checkpoints_kept: Count = 2
    """Older ones are removed. [O]"""
    clock: Literal["wall", "cpu"] = "wall"
    """The training clock: wall-clock seconds, or this process's CPU seconds, which other work on the machine hardly changes. [O]"""
    eval_every_s: NotNegative = 5.0
    """Training-clock seconds between evaluations; 0 = only at start and end. [O]"""
    eval_prompts: Count = 256
    """Prompts of the fixed evaluation set. [O]"""
    eval_samples: Annotated[int, Bounds(1, 1e6)] = 1
    """Sampled full-length answers per evaluation prompt. [O]"""
    progress: bool = True
    """Show progress bars. [O]"""
    timeline: bool = True
    """Write the decoding slots of each window to timeline.csv, the load of each decode step to decode.csv. [O]"""
    threads: Annotated[int, Bounds(1, 1024)] = 1
    """CPU threads of torch; more do not help models this small. [M]"""
    staleness_warning: Natural = 8
    """Warn when a trained token was sampled more than this many weight versions ago. [O]"""
    wandb_project: str = ""
    """Weights & Biases: log to this project, too; empty = do not. Needs `pip install wandb`. [O]"""
    peak_tflops: NotNegative = 0.0
    """Dense TFLOP/s that one device promises, for mfu/; 0 = by its name (tppo_ref/loop/peaks.py), or no MFU. [O]"""
    profile_steps: str = ""
    """Steps FIRST:LAST ("3:5", in a file with its quotes), at most 5, that each rank traces into out/profile; empty = none. [O]"""
    cut_warning: Unit = 0.9
    """Warn when more than this share of a step's rows is cut or capped. [O]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """`compare`: several methods over several seeds on one task."""

    methods: list[str] = dataclasses.field(default_factory=lambda: ["ppo", "tppo"])
    """Named methods, in the order of the table. [O]"""
    seeds: Annotated[int, Bounds(1, 1e4)] = 3
    """Seeds per method: run.seed, run.seed + 1, ... [O]"""
    jobs: Annotated[int, Bounds(1, 1024)] = 2
    """Runs at a time, each with run.threads threads. [O]"""
    target: Share = 0.95
    """Target accuracy, as a share of the first method's best mean evaluation. [O]"""
    per_method: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Fields for one method only, for example {ppo: {policy.lr: 4e-4}}. [O]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One run of tppo_ref."""

    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    rollout: RolloutConfig = dataclasses.field(default_factory=RolloutConfig)
    advantage: AdvantageConfig = dataclasses.field(default_factory=AdvantageConfig)
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    value: ValueConfig = dataclasses.field(default_factory=ValueConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    compare: CompareConfig = dataclasses.field(default_factory=CompareConfig)


FREE_ON_RESUME = (
    "run.out", "run.cache", "run.resume", "run.steps", "run.train_seconds", "run.checkpoint_every", "run.progress",
    "run.checkpoints_kept", "run.eval_every_s", "run.timeline", "run.wandb_project", "run.peak_tflops", "run.profile_steps",
    "compare.methods", "compare.seeds",
    "compare.jobs", "compare.target", "compare.per_method", "model.policy", "model.value", "model.logit_chunk_tokens",
    "policy.micro_batch_tokens", "value.micro_batch_tokens", "policy.engine_gap_limit", "task.verifier_workers",
)  # fmt: skip
"""May differ between a checkpoint and the run that goes on from it: they say where, how long and in what pieces, not what is
computed. (Other pieces add up in another order: the run goes on as it would have but for rounding.)"""

FIXED_ON_RESUME = tuple(path for path in field_paths(Config) if path not in FREE_ON_RESUME)


WHOLE = "rollout.max_response_tokens"  # stands for that field's value where a method needs a window as long as a response
WINDOW = "rollout.window"  # stands for that field's value
GROUP = "rollout.samples_per_prompt"  # stands for that field's value, or for GROUP_SIZE where it makes no groups
GROUP_SIZE = 4

GROUPS: dict[str, Any] = {"rollout.samples_per_prompt": GROUP, "advantage.whiten": False}
"""Of the critic-free methods, whose advantages are measured within a group already."""

METHODS: dict[str, dict[str, Any]] = {
    "tppo": {},
    "tppo-critic-cut": {"advantage.cut_value": "critic"},
    "tppo-zero-cut": {"advantage.cut_value": "zero"},
    "tppo-defer": {"advantage.tail": "defer"},
    "tppo-ewma": {"policy.ewma_decay": 0.9},
    "tppo-once": {"policy.old_logprobs": "engine", "policy.min_new_tokens": WINDOW},  # both depart from the paper
    "ppo": {"rollout.window": WHOLE, "rollout.refill": "batch", "value.update": "joint"},
    "geppo": {
        "rollout.window": WHOLE,
        "rollout.refill": "batch",
        "value.update": "joint",
        "policy.importance": "generalised",
        "policy.reuse_batches": 2,
        "policy.clip_low": 0.1,
        "policy.clip_high": 0.14,
    },
    "ppo-dual": {"rollout.window": WHOLE, "rollout.refill": "batch"},
    "partial-is": {"policy.train_on": "ended", "policy.importance": "truncated"},
    "rloo": {"advantage.estimator": "rloo", **GROUPS, "rollout.window": WHOLE, "rollout.refill": "batch"},
    "grpo": {"advantage.estimator": "grpo", **GROUPS, "rollout.window": WHOLE, "rollout.refill": "batch"},
    "rloo-window": {"advantage.estimator": "rloo", **GROUPS, "policy.train_on": "ended", "policy.importance": "truncated"},
    "grpo-window": {"advantage.estimator": "grpo", **GROUPS, "policy.train_on": "ended", "policy.importance": "truncated"},
}
"""Named methods, as overrides of the defaults. None is another code path: the loop is one."""


def apply_method(config: Config, method: str, *, strict: bool = True, given: Collection[str] = ()) -> Config:
    """`config` with the fields that a named method fixes.

    strict: a field that the user set to something else is a UserError (train); else the method wins (compare, where one command
    line serves several methods). given: names of the fields that the user gave (`fields_given`), where that is known; a value that
    is not the default was given in any case.
    """
    fixed = _fixed_by(method, config)
    if strict:
        others = [path for path in fixed if get_field(config, path) != get_field(Config(), path)]
        refuse_contradicting(config, method, {*given, *others})
    return replace_fields(config, {**fixed, "run.method": method})


def refuse_contradicting(config: Config, method: str, given: Collection[str]) -> None:
    """UserError for the first field of `given` that the method fixes at another value."""
    for path, value in _fixed_by(method, config).items():
        current = get_field(config, path)
        if path in given and current != value:
            remedy = "drop it, or choose another run.method"
            raise UserError(refusal(path, str(current), f"{value}, at which method {method} fixes it", remedy))


def _fixed_by(method: str, config: Config) -> dict[str, Any]:
    """The fields that a method fixes, with their values beside those of `config`. UserError for a method that is none."""
    if method not in METHODS:
        raise UserError(refusal("run.method", repr(method), f"one of {', '.join(METHODS)}") + nearest(method, list(METHODS)))
    fields = METHODS[method].items()
    fixed = {path: get_field(config, value) if value in (WHOLE, WINDOW, GROUP) else value for path, value in fields}
    if fixed.get(GROUP) == 1:
        fixed[GROUP] = GROUP_SIZE
    return fixed
