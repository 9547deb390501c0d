"""What is measured of a run: one glossary of metrics, and the sinks that they are written to.

A name that is not in GLOSSARY cannot be logged. docs/metrics.md is this table, and a test holds the two and the logged keys equal.
"""

from __future__ import annotations

import csv
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tppo_ref.types import UserError


class Metric(NamedTuple):
    """formula; what it is reduced over; unit; the range in which a run is well."""

    formula: str
    over: str
    unit: str
    healthy: str


GLOSSARY: dict[str, Metric] = {
    "time/train_s": Metric("sum of time/step_s: the training clock", "run", "s", "rises"),
    "time/step_s": Metric("wall-clock of the step, evaluation and checkpoints excluded", "step", "s", "steady"),
    "time/rollout_s": Metric("decoding one window, prefill included", "step", "s", "steady"),
    "time/verify_s": Metric("waiting for scores once decoding is done", "step", "s", "near 0: it overlaps decoding"),
    "time/forward_s": Metric("values and old log-probabilities", "step", "s", "below time/policy_s"),
    "time/policy_s": Metric("policy updates", "step", "s", "steady"),
    "time/value_s": Metric("value updates", "step", "s", "steady"),
    "time/sync_s": Metric("weights to the engine", "step", "s", "small"),
    "time/other_s": Metric("time/step_s less the phases above", "step", "s", "at most 5 % of time/step_s"),
    "rollout/decode_steps": Metric("decode steps of the window", "step", "steps", "T-PPO: the window; PPO: the longest response"),
    "rollout/tokens": Metric("response tokens sampled", "step", "tokens", "steady"),
    "rollout/tokens_per_s": Metric("rollout/tokens / time/rollout_s", "step", "tokens/s", "steady"),
    "rollout/occupancy": Metric("busy slot-steps / (slots x decode steps)", "step", "share", "T-PPO, immediate refill: 1"),
    "rollout/idle_s": Metric("(1 - rollout/occupancy) x time/rollout_s", "step", "s", "T-PPO: near 0"),
    "response/rows": Metric("responses that sampled at least a token", "step", "responses", "at least the slots"),
    "response/ended": Metric("responses that ended", "step", "responses", "above 0"),
    "response/cut_share": Metric("rows RUNNING at the window's edge / rows", "step", "share", "below run.cut_warning"),
    "response/capped_share": Metric("LENGTH_CAP / ended", "step", "share", "near 0"),
    "response/length_mean": Metric("tokens of ended responses, mean", "step", "tokens", "no run-away"),
    "response/length_max": Metric("tokens of ended responses, maximum", "step", "tokens", "below the cap"),
    "response/score_mean": Metric("score of ended responses, mean", "step", "score", "rises"),
    "response/accuracy": Metric(
        "share of ended responses with a score above 0", "step", "share", "rises; favours short ones early on"
    ),
    "verify/timeouts": Metric("verifications killed after task.verifier_timeout_s", "run", "responses", "0"),
    "verify/errors": Metric("verifications that raised, died or gave no finite number", "run", "responses", "0"),
    "ledger/generated": Metric("response tokens sampled", "run", "tokens", "sum of the next four"),
    "ledger/trained": Metric("tokens that the policy trained on, once per epoch", "run", "tokens", "most of ledger/generated"),
    "ledger/excluded_tail": Metric("tail tokens left out for good", "run", "tokens", "tail tokens x cut rows"),
    "ledger/excluded_warmup": Metric("tokens sampled while the critic trained alone", "run", "tokens", "stops after the warm-up"),
    "ledger/pending": Metric(
        "deferred tokens, and tokens of running responses that train at their end", "now", "tokens", "bounded"
    ),
    "ledger/in_flight": Metric("responses RUNNING at the window's edge", "now", "responses", "at most the slots"),
    "advantage/mean": Metric("raw advantages over trained tokens, mean", "step", "score", "around 0"),
    "advantage/std": Metric("raw advantages over trained tokens, population standard deviation", "step", "score", "above 0"),
    "advantage/clamped_share": Metric("whitened advantages beyond advantage.clamp / trained tokens", "step", "share", "below 0.01"),
    "advantage/lam_mean": Metric("lambda, mean over rows", "step", "1", "0.95 to 1"),
    "policy/tokens": Metric("trained tokens", "step", "tokens", "near rollout/tokens"),
    "policy/prefix_tokens": Metric("prompt and earlier response tokens fed again", "step", "tokens", "grows with length/window"),
    "policy/staleness": Metric(
        "weight versions between sampling and training, mean over trained tokens", "step", "versions", "T-PPO: 0"
    ),
    "policy/staleness_max": Metric("the same, the largest", "step", "versions", "below run.staleness_warning"),
    "policy/updates": Metric("optimiser steps", "step", "updates", "steady"),
    "policy/loss": Metric("clipped surrogate, token mean", "step", "1", "around 0"),
    "policy/lm_loss": Metric("positive-example LM loss, token mean, before its weight", "step", "nats", "falls"),
    "policy/clipped_share": Metric("tokens at which the clip binds / trained tokens", "step", "share", "below 0.2"),
    "policy/dual_clipped_share": Metric("tokens at which the dual clip binds / trained tokens", "step", "share", "near 0"),
    "policy/kl": Metric("KL of new from old policy, k3 estimate, mean over trained tokens", "step", "nats", "below 0.05"),
    "policy/ratio_max": Metric("largest probability ratio", "step", "1", "below 10"),
    "policy/weight_clipped_share": Metric("importance weights capped or zeroed / trained tokens", "step", "share", "below 0.05"),
    "policy/logprob_gap": Metric(
        "absolute difference of recomputed and engine log-probability over this step's tokens, mean",
        "step",
        "nats",
        "fp32: below 1e-5",
    ),
    "policy/grad_norm": Metric("gradient norm before clipping, mean over updates", "step", "1", "steady"),
    "policy/lr": Metric("learning rate", "now", "1", "as set"),
    "value/responses": Metric("ended responses trained on (joint: policy rows)", "step", "responses", "above 0"),
    "value/held": Metric("ended responses held back", "now", "responses", "below value.batch_responses"),
    "value/tokens": Metric("trained tokens", "step", "tokens", "steady"),
    "value/updates": Metric("optimiser steps", "step", "updates", "steady"),
    "value/loss": Metric("clipped squared error / 2, token mean", "step", "score^2", "falls"),
    "value/clipped_share": Metric("tokens at which the value clip binds / trained tokens", "step", "share", "below 0.2"),
    "value/explained_variance": Metric("1 - Var(target - V) / Var(target), V before each update", "step", "1", "above 0"),
    "value/grad_norm": Metric("gradient norm before clipping, mean over updates", "step", "1", "steady"),
    "value/lr": Metric("learning rate", "now", "1", "as set"),
    "eval/accuracy": Metric("share of sampled full-length answers with a score above 0", "evaluation set", "share", "rises"),
    "eval/length_mean": Metric("tokens of these answers, mean", "evaluation set", "tokens", "no run-away"),
    "eval/length_p99": Metric("tokens of these answers, 99th percentile", "evaluation set", "tokens", "the tail stays"),
    "eval/capped_share": Metric("LENGTH_CAP / answers", "evaluation set", "share", "near 0"),
    "eval/verify_failures": Metric("verifications that failed (as verify/)", "evaluation set", "answers", "0"),
    "eval/time_s": Metric("wall-clock of the evaluation, outside of the training clock", "evaluation set", "s", "small"),
}


class PhaseClock:
    """Wall-clock seconds by phase of one step: `with clock("rollout"): ...`."""

    def __init__(self) -> None:
        self.begin = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begin

    def metrics(self) -> dict[str, float]:
        step_s = time.perf_counter() - self.begin
        phases = {f"time/{name}_s": seconds for name, seconds in self.seconds.items()}
        return {"time/step_s": step_s, **phases, "time/other_s": step_s - sum(self.seconds.values())}


class MetricLog:
    """Metrics of a run as JSON lines and TensorBoard events, and on Weights & Biases where asked for; a run that goes on continues.

    `metrics.jsonl` holds one object a record: step, then names of the glossary. Lines after `resume_step` (written after the
    checkpoint from which a run goes on) are taken back.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resume_step: int | None = None,
        tensorboard: bool = True,
        wandb_project: str = "",
        glossary: Mapping[str, Metric] | None = None,
    ):
        self.path, self._glossary = folder / "metrics.jsonl", glossary or GLOSSARY
        if resume_step is None:
            self.path.unlink(missing_ok=True)
        elif self.path.exists():
            kept = [record for record in read_metrics(self.path) if record["step"] <= resume_step]
            beside = self.path.with_suffix(".new")  # renamed: a kill here must not lose what was there
            beside.write_text("".join(json.dumps(record) + "\n" for record in kept))
            os.replace(beside, self.path)
        self._file = self.path.open("a")
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=None if resume_step is None else resume_step + 1)
        self._wandb = _wandb_run(wandb_project, folder) if wandb_project else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write one record. A name outside of the glossary is a KeyError: it is complete by construction."""
        unknown = [name for name in metrics if name not in self._glossary]
        if unknown:
            raise KeyError(f"metrics not in GLOSSARY: {unknown}")
        # NaN is not JSON: an undefined metric (accuracy of a step without an ended response) is null.
        record = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **record}) + "\n")
        self._file.flush()
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        if self._writer:
            from tensorboard.compat.proto.summary_pb2 import Summary

            # One event for all of them: an event each, as add_scalar writes them, is dearer than the rest of the record.
            values = [Summary.Value(tag=name, simple_value=value) for name, value in finite.items()]
            self._writer._get_file_writer().add_summary(Summary(value=values), step)
        if self._wandb:
            self._wandb.log({"step": step} | finite)

    def close(self) -> None:
        self._file.close()
        if self._writer:
            self._writer.close()
        if self._wandb:
            self._wandb.finish()


def _wandb_run(project: str, folder: Path) -> Any:
    """The W&B run of a folder: the same one after a restart. Its x axis is our step: W&B's own cannot go back to a checkpoint."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"run.wandb_project: {project} needs wandb, which is not installed; pip install wandb, or leave it out"
        ) from None
    known = folder / "wandb-run-id"
    run = wandb.init(project=project, name=folder.name, dir=str(folder), id=known.read_text() if known.exists() else None,
                     resume="allow")  # fmt: skip
    known.write_text(run.id)
    run.define_metric("*", step_metric="step")
    return run


class Table:
    """A CSV file that grows by rows whose first column is the step; takes back rows after `resume_step`."""

    def __init__(self, path: Path, columns: Sequence[str], *, resume_step: int | None = None):
        rows = []
        if resume_step is not None and path.exists():
            with path.open(newline="") as file:
                whole = [row for row in list(csv.reader(file))[1:] if len(row) == len(columns)]  # a kill may tear the last one
                rows = [row for row in whole if int(row[0]) <= resume_step]
        beside = path.with_suffix(".new")  # renamed: a kill here must not lose what was there
        with beside.open("w", newline="") as file:
            csv.writer(file).writerows([columns, *rows])
        os.replace(beside, path)
        self._file = path.open("a", newline="")
        self._writer = csv.writer(self._file)

    def write(self, rows: Sequence[Sequence[Any]]) -> None:
        self._writer.writerows(rows)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl. A last line that was cut off by a kill is left out."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def glossary_markdown() -> str:
    """The glossary as the Markdown table of docs/metrics.md."""
    head = "| metric | what it is | over | unit | healthy |\n| --- | --- | --- | --- | --- |\n"
    return head + "".join(f"| `{name}` | {m.formula} | {m.over} | {m.unit} | {m.healthy} |\n" for name, m in GLOSSARY.items())
