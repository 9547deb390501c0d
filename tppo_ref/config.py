"""The run as data: frozen dataclasses, and the one parser that laptop and cluster share.

Every field has a line of help that ends in the provenance of its default: [S] stated by the paper, [P] read in the authors'
port, [V] another primary source, [I] inferred, [M] measured by us on the built-in tasks, [O] our choice. Models and
learning rates of that size do not fit a laptop: where a default differs from theirs, the line gives both.

Precedence, weakest first: the defaults here, `--config FILE`, `--section.field VALUE`. A named method (`run.method`) fixes its
fields: `train` refuses another value for them, `compare` lets each method win, and `compare.per_method` has the last word.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import re
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from tppo_ref.types import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What is asked, and who checks the answers."""

    name: str = "chain"
    """Built-in task (chain, fork, length), or jsonl for a file of your own. [O]"""
    path: str | None = None
    """jsonl only: training prompts, one JSON object a line. [O]"""
    eval_path: str | None = None
    """jsonl only: evaluation prompts; none = the last tenth of the training file. [O]"""
    tokenizer: str | None = None
    """jsonl only: folder of a transformers tokenizer, or bytes for the built-in byte-level one; none = model.policy's. [O]"""
    prompt_key: str = ""
    """jsonl only: key of the prompt text; empty = 'prompt' or 'question'. [O]"""
    answer_key: str = "answer"
    """jsonl only: key of the answer. [O]"""
    max_prompt_tokens: int = 1024
    """jsonl only: a longer prompt is an error that names its line. [O]"""
    chat_template: bool = False
    """jsonl only: wrap prompts in the tokenizer's chat template. [O]"""
    verifier: str | None = None
    """Dotted name module:function of a verifier of your own; none = the task's. [O]"""
    verifier_timeout_s: float = 5.0
    """Wall-clock seconds after which a verification is killed, counted and scored as failed. [O]"""
    verifier_workers: int = 1
    """Verifier processes. [O]"""
    failure_score: float = -1.0
    """Score of a response whose verification timed out or raised. [O]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Policy and value model."""

    policy: str | None = None
    """Checkpoint folder, or config.json of a fresh model; none = the task's own warm-started base model. [O]"""
    value: str | None = None
    """Checkpoint folder of a (pre-trained) value model; none = the policy's weights under a new scalar head. [O]"""
    hidden_size: int = 32
    """Width of the built-in base model. [M]"""
    num_layers: int = 3
    """Layers of the built-in base model. [M]"""
    num_heads: int = 2
    """Attention heads of the built-in base model. [M]"""
    warm_start_steps: int = 700
    """Supervised steps on imperfect demonstrations that make the built-in base model. [M]"""
    warm_start_lr: float = 5e-3
    """Peak learning rate of these steps. [M]"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Weights and activations; losses and advantages are float32 always. [O]"""
    device: str = "cpu"
    """cpu, cuda, cuda:N or auto. [O]"""
    trust_remote_code: bool = False
    """Let a checkpoint folder run its own Python code. [O]"""
    logit_chunk_tokens: int = 0
    """Tokens whose logits exist at once; 0 = as many as fit half a gigabyte. [O]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """Successive batching: slots and windows."""

    slots: int = 32
    """Decoding slots; under synchronous PPO also the responses per step. The port: 512 prompts x 16. [M]"""
    window: int = 64
    """Decode steps per window, in tokens. The paper: 8k [S]; the port: a third of the longest response. [M]"""
    max_response_tokens: int = 320
    """Cap on a response over all its windows, in tokens; at the cap it counts as finished. The port: 24k. [M]"""
    min_response_tokens: int = 0
    """The end token is forbidden before this many tokens. [O]"""
    refill: Literal["immediate", "step"] = "immediate"
    """A freed slot takes the next prompt in the same window, or waits for the next. [S]"""
    samples_per_prompt: int = 1
    """Independent samples of each prompt. The port: 16. [O]"""
    temperature: float = 1.0
    """Sampling temperature; log-probabilities are of the sampling distribution. [I]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """Extended GAE."""

    gamma: float = 1.0
    """Discount per token. [S]"""
    lam: float = 0.95
    """Trace parameter of the policy's advantages; the floor of the length-adaptive one. [P]"""
    length_adaptive_lam: bool = True
    """lam = max(floor, 1 - 1/(alpha L)), L = tokens so far, plus half a window while RUNNING. [P]"""
    lam_alpha: float = 0.05
    """alpha of the length-adaptive lam. [P]"""
    cut_value: Literal["previous", "critic", "zero"] = "previous"
    """V(s_l) at a cut: the paper's V(s_{l-1}), the critic's own, or 0 (treats a cut as an end). [S]"""
    tail: Literal["exclude", "defer", "none"] = "exclude"
    """Last tokens of a cut row: left out for good (the port), trained in the next window (theory.md P7), or trained. [P]"""
    tail_tokens: int = 8
    """Length of that tail, in tokens. [P]"""
    whiten: bool = True
    """Whiten advantages over the step's trained tokens, all ranks. [P]"""
    clamp: float = 10.0
    """Whitened advantages are clamped to +- this. [P]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The policy's update."""

    lr: float = 3e-4
    """Learning rate. The port: 8e-7 at 32B. [M]"""
    lr_warmup_steps: int = 0
    """Training steps over which the learning rate rises linearly. The port: 20. [M]"""
    weight_decay: float = 0.1
    """AdamW weight decay. [P]"""
    max_grad_norm: float = 1.0
    """Gradient norm clip. [I]"""
    epochs: int = 1
    """Passes over the step's rows. [P]"""
    mini_batches: int = 16
    """Optimiser steps per epoch, where mini_batch_tokens is 0. [P]"""
    mini_batch_tokens: int = 500
    """Trained tokens per optimiser step, about (rows stay whole); 0 = use mini_batches. [M]"""
    micro_batch_tokens: int = 4096
    """Tokens fed per forward pass, prompts and prefixes included; one longer row goes alone. [O]"""
    clip_low: float = 0.2
    """Ratio clip below 1. [P]"""
    clip_high: float = 0.28
    """Ratio clip above 1 (clip-higher). [P]"""
    dual_clip: float | None = 10.0
    """Floor of the surrogate on negative advantages, in units of A; none = off. [P]"""
    lm_loss_weight: float = 0.1
    """Weight of the LM loss on responses that ended correct in this step. [P]"""
    old_logprobs: Literal["recompute", "engine"] = "recompute"
    """Clip centre for this step's tokens: recomputed before the update, or the engine's. [P]"""
    importance: Literal["none", "truncated", "masked"] = "none"
    """Weight pi_start/pi_behaviour per token; none: older tokens are clipped around their behaviour policy. [O]"""
    importance_cap: float = 2.0
    """Cap of that weight. [O]"""
    train_on: Literal["window", "ended"] = "window"
    """This window's tokens, ended or not (T-PPO), or whole responses once, when they end (partial rollouts). [S]"""
    ewma_decay: float = 0.0
    """PPO-EWMA (arXiv 2110.00641): clip around an exponential average of the weights with this decay; 0 = off. [O]"""
    detach_prefix: bool = False
    """Read the prompt and earlier windows as constants: no gradient through them. Biased. [O]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueConfig:
    """The value model's update."""

    update: Literal["independent", "joint"] = "independent"
    """independent: Monte Carlo returns of ended responses (T-PPO); joint: this step's policy tokens, target A + V. [S]"""
    lr: float = 1e-3
    """Learning rate. The port: 2e-6 at 32B. [M]"""
    lr_warmup_steps: int = 0
    """Training steps over which the learning rate rises linearly. The port: 20. [M]"""
    weight_decay: float = 0.1
    """AdamW weight decay. [P]"""
    max_grad_norm: float = 1.0
    """Gradient norm clip. [I]"""
    epochs: int = 1
    """Passes over the rows. [P]"""
    mini_batches: int = 16
    """Optimiser steps per epoch, where mini_batch_tokens is 0. [P]"""
    mini_batch_tokens: int = 500
    """Trained tokens per optimiser step, about (rows stay whole); 0 = use mini_batches. [M]"""
    micro_batch_tokens: int = 4096
    """Tokens fed per forward pass. [O]"""
    clip_low: float | None = 0.5
    """Values move at most this far below the stored ones; none = no clip. [P]"""
    clip_high: float | None = 0.6
    """Values move at most this far above the stored ones; none = no clip. [P]"""
    batch_responses: int = 0
    """0: train on every response that ended in this step; n: hold responses back until n are there. [O]"""
    warmup_steps: int = 0
    """First steps that train the value model alone; the policy's tokens of these are excluded. The port: 10. [M]"""
    pretrain_responses: int = 1024
    """pretrain-value: responses sampled from the frozen policy. [M]"""
    pretrain_epochs: int = 4
    """pretrain-value: passes over them. [M]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, where to, what is kept."""

    method: str = "tppo"
    """Named method: a set of defaults for the fields above (see METHODS). [O]"""
    seed: int = 0
    """Seed of sampling, prompt order and mini-batches. [O]"""
    steps: int = 1000
    """Stop after this many training steps; not used where train_seconds is given. [O]"""
    train_seconds: float | None = None
    """Stop after this many seconds on the training clock (evaluation, checkpoints excluded); none = by steps. [O]"""
    out: str = "runs/train"
    """Folder for checkpoints, metrics and figures. [O]"""
    cache: str = "runs/cache"
    """Folder for warm-started base models and pre-trained value models. [O]"""
    resume: bool = False
    """Go on from the newest checkpoint in `out`. [O]"""
    checkpoint_every: int = 200
    """Steps between checkpoints; 0 = only at the end. [O]"""
    checkpoints_kept: int = 2
    """Older ones are removed. [O]"""
    eval_every_s: float = 5.0
    """Training-clock seconds between evaluations; 0 = only at start and end. [O]"""
    eval_prompts: int = 256
    """Prompts of the fixed evaluation set. [O]"""
    eval_samples: int = 1
    """Sampled full-length answers per evaluation prompt. [O]"""
    progress: bool = True
    """Show progress bars. [O]"""
    timeline: bool = True
    """Write the decoding slots of each window to timeline.csv, the load of each decode step to decode.csv. [O]"""
    threads: int = 1
    """CPU threads of torch; more do not help models this small. [M]"""
    staleness_warning: int = 8
    """Warn when a trained token was sampled more than this many weight versions ago. [O]"""
    wandb_project: str = ""
    """Weights & Biases: log to this project, too; empty = do not. Needs `pip install wandb`. [O]"""
    cut_warning: float = 0.9
    """Warn when more than this share of a step's rows is cut or capped. [O]"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """`compare`: several methods over several seeds on one task."""

    methods: list[str] = dataclasses.field(default_factory=lambda: ["ppo", "tppo"])
    """Named methods, in the order of the table. [O]"""
    seeds: int = 3
    """Seeds per method: run.seed, run.seed + 1, ... [O]"""
    jobs: int = 2
    """Runs at a time, each with run.threads threads. [O]"""
    target: float = 0.95
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


WHOLE = "rollout.max_response_tokens"  # stands for that field's value where a method needs a window as long as a response

METHODS: dict[str, dict[str, Any]] = {
    "tppo": {},
    "tppo-critic-cut": {"advantage.cut_value": "critic"},
    "tppo-zero-cut": {"advantage.cut_value": "zero"},
    "tppo-defer": {"advantage.tail": "defer"},
    "tppo-ewma": {"policy.ewma_decay": 0.9},
    "ppo": {"rollout.window": WHOLE, "rollout.refill": "step", "value.update": "joint"},
    "ppo-dual": {"rollout.window": WHOLE, "rollout.refill": "step"},
    "partial-is": {"policy.train_on": "ended", "policy.importance": "truncated"},
}
"""Named methods, as overrides of the defaults. None is another code path: the loop is one."""

ConfigT = TypeVar("ConfigT")


def replace_fields(config: ConfigT, overrides: Mapping[str, Any]) -> ConfigT:
    """A copy of a nested config with dotted fields replaced, as `{"rollout.window": 64}`. Unknown names are UserErrors."""
    for path, value in overrides.items():
        head, _, rest = path.partition(".")
        known = [f.name for f in dataclasses.fields(config)]  # type: ignore[arg-type]
        if head not in known or (rest and path not in field_paths(type(config))):
            raise UserError(f"{path}: no such field{nearest(path, field_paths(type(config)))}")
        value = replace_fields(getattr(config, head), {rest: value}) if rest else _number(path, value, getattr(config, head))
        config = dataclasses.replace(config, **{head: value})  # type: ignore[type-var]
    return config


def _number(path: str, value: Any, current: Any) -> Any:
    """YAML 1.1 reads 6e-4 as a text: a text where a number stands is read as one, or refused."""
    if not isinstance(value, str) or isinstance(current, bool) or not isinstance(current, int | float):
        return value
    try:
        return type(current)(value)
    except ValueError:
        raise UserError(f"{path}: expected {type(current).__name__}, got {value!r}") from None


def field_paths(config_class: Any, prefix: str = "") -> list[str]:
    """Dotted names of all leaf fields of a nested config class, in order."""
    paths: list[str] = []
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        inner = hints[field.name]
        paths += field_paths(inner, f"{prefix}{field.name}.") if dataclasses.is_dataclass(inner) else [prefix + field.name]
    return paths


def nearest(name: str, names: Sequence[str]) -> str:
    """'; did you mean X?' for the closest known name, or nothing when none is close."""
    tail = name.rpartition(".")[2]
    misplaced = [n for n in names if n.rpartition(".")[2] == tail]  # a right field under the wrong section
    close = misplaced or difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def apply_method(config: Config, method: str, *, strict: bool = True, given: Collection[str] = ()) -> Config:
    """`config` with the fields that a named method fixes.

    strict: a field that the user set to something else is a UserError (train); else the method wins (compare, where one command
    line serves several methods). given: names of the fields that the user gave (`given_fields`), where that is known; a value that
    is not the default was given in any case.
    """
    if method not in METHODS:
        raise UserError(
            f"run.method: unknown method {method!r}, expected one of {', '.join(METHODS)}{nearest(method, list(METHODS))}"
        )
    overrides = {path: get_field(config, value) if value == WHOLE else value for path, value in METHODS[method].items()}
    for path, value in overrides.items():
        current = get_field(config, path)
        if strict and current != value and (path in given or current != get_field(Config(), path)):
            raise UserError(f"{path}: method {method} fixes it at {value}, got {current}; drop it or choose another run.method")
    return replace_fields(config, {**overrides, "run.method": method})


def get_field(config: Any, path: str) -> Any:
    """The value of a dotted field."""
    for name in path.split("."):
        config = getattr(config, name)
    return config


def parse(config_class: type[ConfigT], argv: Sequence[str], *, prog: str, description: str = "") -> ConfigT:
    """`--config FILE --section.field VALUE` into a nested frozen dataclass: the one parser of laptop and cluster.

    Unknown keys, wrong types and unreadable files raise UserError, in one line, with the nearest right name.
    `--help` and `--print_config` print and leave with exit code 0.
    """
    import jsonargparse  # slow to import, and nothing else of the library needs it

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML or JSON file with any of the fields below.")
    parser.add_class_arguments(config_class, None)
    names = field_paths(config_class)
    given_fields(argv)
    try:
        parsed = parser.parse_args(list(argv))
        values = parser.instantiate(parsed).as_dict()
    except jsonargparse.ArgumentError as error:
        raise UserError(_one_line(str(error), names)) from None
    return config_class(**{f.name: values[f.name] for f in dataclasses.fields(config_class)})  # type: ignore[arg-type]


def given_fields(argv: Sequence[str]) -> set[str]:
    """Dotted names of the fields that a command line gives, those of its `--config` files included.

    A file that is no mapping of sections is a UserError with the file's name, which jsonargparse leaves out.
    """
    import yaml

    given = {arg[2:].partition("=")[0] for arg in argv if arg.startswith("--")}
    pairs = [arg.partition("=")[2] for arg in argv if arg.startswith("--config=")]
    pairs += [value for flag, value in itertools.pairwise(argv) if flag == "--config"]
    for name in pairs:
        try:
            content = yaml.safe_load(Path(name).read_text())
        except OSError as error:
            raise UserError(f"config: cannot read {name} ({error.strerror}); give an existing file") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"config: {name} is neither YAML nor JSON: {' '.join(str(error).split())[:200]}") from None
        sections = content if isinstance(content, dict) else {"the file": content}
        for section, fields in sections.items():
            if not isinstance(fields, dict):
                raise UserError(
                    f"config: {name}: expected `section:` with `field: value` lines under it, got {section}: {fields!r}"
                )
            given |= {f"{section}.{field}" for field in fields}
    return given


def _one_line(message: str, names: Sequence[str]) -> str:
    """jsonargparse's error in one line, with the nearest right name where a name is the error."""
    message = " ".join(message.split())
    if match := re.search(r"unrecognized arguments: (\S+)", message):
        name = match.group(1).lstrip("-").partition("=")[0]
        return f"--{name}: no such option{nearest(name, names)}"
    if match := re.search(r"Group '(\S+)' does not accept option '(\S+)'", message):
        name = f"{match.group(1)}.{match.group(2)}"
        return f"{name}: no such field{nearest(name, names)}"
    if match := re.search(r"(?:Option|Key) '(\S+?)' is not accepted|does not accept option '(\S+)'", message):
        name = match.group(1) or match.group(2)
        return f"{name}: no such field{nearest(name, [*names, *{n.partition('.')[0] for n in names}])}"
    message = re.sub(r"Parser key \"(\S+?)\": ", r"\1: ", message)
    return re.sub(r"Expected a (?:<class '(\w+)'>|typing\.)", r"expected \1", message).replace(" Got value:", " got")
