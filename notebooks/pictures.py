"""The picture that each notebook opens with, and the machinery behind it, which the notebook uses again further down.

01 `play`, `draw_schedules`: decoding slots. 02 `draw_bias`: error before a cut. 03 `make_trainer`, `follow`, `draw_fates`: the real
Trainer, watched. 04 `draw_first_to_finish`. 05 `draw_comparisons`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sim.clock.windows import windows_of
from sim.lab.bias import conditional_moments
from sim.lab.bounds import cut_bound
from sim.lab.estimators import ESTIMATORS
from sim.lab.instances import Instance
from sim.lab.rollouts import Rollouts
from tppo_ref.loop.trainer import Trainer
from tppo_ref.method.records import Prompt, Response
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.batcher import SampleStream, SuccessiveBatcher
from tppo_ref.rollout.engine import Decoded, Request
from tppo_ref.runs.colours import COLOURS, LINES, MARKERS, look
from tppo_ref.runs.config import Config
from tppo_ref.runs.figures import draw_slots, tidy
from tppo_ref.runs.parsing import replace_fields

# -------------------------------------------------------------------------------------------------- 01: slots, without a model

Played = list[dict[str, Any]]


def play(schedule: SlotSchedule, lengths: Sequence[int], enough: Callable[[Played, int], bool]) -> Played:
    """Drive `schedule` with known lengths, window by window, until `enough(segments, now)`. Returns the segments, as dictionaries.

    Times are decode steps from the very beginning. `sampled` is how many tokens the response had before the segment.
    """
    sampled, played, now = Counter[int](), [], 0
    for window in windows_of(schedule, lengths):
        for s in window:
            played.append({"kind": "decoding", "slot": s.slot, "response": s.response, "begin_s": now + s.begin,
                           "stop_s": now + s.stop, "end": s.end.name, "sampled": sampled[s.response]})  # fmt: skip
            sampled[s.response] += s.stop - s.begin
        now = played[-1]["stop_s"]
        if enough(played, now):
            break
    return played


def ended_among(played: Played, first: int) -> int:
    """How many of the first responses have ended."""
    return sum(s["end"] != "RUNNING" for s in played if s["response"] < first)


def draw_schedules(runs: Mapping[str, Played], slots: int, first: int) -> Figure:
    """A panel per schedule, PPO's first and T-PPO's last: bars are responses, white is idle; when have the `first` ones ended?"""
    took = {name: max(s["stop_s"] for s in run if s["response"] < first) for name, run in runs.items()}
    span = max(s["stop_s"] for run in runs.values() for s in run)
    figure, panels = plt.subplots(len(runs), 1, figsize=(8, 0.6 + 2 * len(runs)), sharex=True, layout="constrained")
    for axes, (name, run) in zip(panels, runs.items(), strict=True):
        axes.set(xlim=(0, 1.01 * span), ylim=(-0.6, slots - 0.4))
        stop = max(s["stop_s"] for s in run)
        draw_slots(axes, [s | {"seconds": span} for s in run], look("ppo" if name.startswith("PPO") else "tppo").shades)
        axes.axvline(took[name], color="black", linewidth=1, linestyle=(0, (4, 3)))
        busy = sum(s["stop_s"] - s["begin_s"] for s in run) / (slots * stop)
        if stop < 0.8 * span:
            axes.text((stop + span) / 2, slots / 2 - 0.5, "done: this run\nhas ended", fontsize=8.5, ha="center", va="center")
        title = f"{name}: {100 * busy:.0f} % of the slots busy, {first} responses ended after {took[name]} steps"
        tidy(axes, title=title, x="", y="slot")
    panels[-1].set_xlabel("decode steps since the beginning", fontsize=9.5)
    ppo, *_, tppo = took.values()
    figure.suptitle(
        f"The first {first} responses: {ppo} decode steps under PPO, {tppo} under T-PPO", fontweight="bold", fontsize=11
    )
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5, handles=[
        Patch(facecolor=look("ppo").colour, label="PPO: a response; neighbours in a slot alternate in shade"),
        Patch(facecolor=look("tppo").colour, label="with a window: the same"),
        Patch(facecolor="white", edgecolor="#888888", label="idle slot"),
        plt.Line2D([], [], color="black", marker=">", linestyle="", markersize=4, label="cut, goes on in the next window"),
        plt.Line2D([], [], color="black", linestyle=(0, (4, 3)), linewidth=1, label=f"first {first} ended"),
    ])  # fmt: skip
    return figure


# ------------------------------------------------------------------------------------------------ 02: the error before a cut


def draw_bias(worlds: Mapping[str, tuple[Rollouts, int]], lam: float) -> Figure:
    """|bias| of each token before the first cut, exact critic, per world and its window; black: P4's bound for EGAE."""
    figure, panels = plt.subplots(1, len(worlds), figsize=(9.6, 3.9), layout="constrained", sharey=True)
    for axes, (title, (rollouts, window)) in zip(panels, worlds.items(), strict=True):
        value_N, n, first = rollouts.solution.value_N, np.arange(1, window + 1), rollouts.mdp.depth_N < window
        axes.semilogy(
            n, cut_bound(rollouts, value_N, window, lam=lam)[first][::-1].max(1), color="black", label="P4's bound of EGAE"
        )
        for name, label in (("zero-cut", "value 0 at the cut"), ("egae", "EGAE, T-PPO's rule")):
            moments = conditional_moments(rollouts, value_N, dataclasses.replace(ESTIMATORS[name], lam=lam), window)
            y = np.where(moments.sampled_NA > 0, np.abs(moments.bias_NA), 0.0)[first][::-1].max(1)
            axes.semilogy(n[y > 1e-12], y[y > 1e-12], **look(name).line(markersize=7), label=label)
        axes.set_xlim(0.3, window + 0.7)
        tidy(
            axes, title=title, x="tokens before the cut, n", y="|bias| of the advantage (score is ±1)" if axes is panels[0] else ""
        )
    panels[0].legend(frameon=False, fontsize=8.5, loc="upper right")
    panels[0].set(ylim=(0.001, 3), yticks=[0.001, 0.01, 0.1, 1], yticklabels=["0.001", "0.01", "0.1", "1"])
    panels[0].minorticks_off()
    figure.suptitle("What a cut costs fades with the distance; how much it is depends on the token", fontweight="bold", fontsize=11)
    return figure


# ------------------------------------------------------------------------------------------------ 03: the real Trainer, watched


class ScriptedEngine:
    """A `RolloutEngine` that decodes responses of known lengths: each token is 1, its log-probability -1; the last one ends it."""

    def __init__(self, length_of_prompt: Sequence[int]):
        self.length_of_prompt, self.now = length_of_prompt, 0
        self.calendar: dict[int, list[Decoded]] = {}

    num_running = property(lambda self: sum(map(len, self.calendar.values())))

    def submit(self, requests: Sequence[Request]) -> None:
        for r in requests:
            left = self.length_of_prompt[r.token_ids[0]] - r.num_response_tokens
            new = min(left, r.max_new_tokens)
            decoded = Decoded(response_id=r.response_id, token_ids=[1] * new, logprobs=[-1.0] * new, end_token=new == left)
            self.calendar.setdefault(self.now + new, []).append(decoded)

    def step(self) -> list[Decoded]:
        self.now += 1
        return self.calendar.pop(self.now, [])

    def sleep(self) -> None:
        pass

    def load_weights(self, named_tensors: Any, version: int) -> None:
        assert not self.num_running


class Table(torch.nn.Module):
    """Stands where a language model stands: entry (prompt, t) for token t. Counts how often each entry gets a gradient."""

    def __init__(self, entries: torch.Tensor, *, is_value: bool = False):
        super().__init__()
        self.entries = torch.nn.Parameter(entries)
        self.trained = torch.zeros(entries.shape, dtype=torch.long)
        self.is_value = is_value  # a value model says V after the last token, too

    def forward(self, batch: Any) -> Any:
        rows = [prompt[0] for prompt in batch.prompt_ids]  # the prompt's only token says which one it is
        width = max(map(len, batch.response_ids), default=0)
        out_BT = self.entries[rows][:, :width] * 1.0
        if out_BT.requires_grad:
            out_BT.register_hook(lambda grad_BT: self.note(rows, grad_BT))
        return (out_BT, out_BT.new_zeros(len(rows))) if self.is_value else out_BT

    def note(self, rows: list[int], grad_BT: torch.Tensor) -> None:
        self.trained[rows, : grad_BT.shape[1]] += grad_BT != 0

    def named_tensors(self) -> list[Any]:
        return []  # the engine decodes by script and needs no weights


class LengthScorer:
    """A `Scorer`: +1 for a response of even length, else -1."""

    def __init__(self) -> None:
        self.scores: dict[int, tuple[float, str]] = {}

    def submit(self, response: Response) -> None:
        self.scores[response.id] = (1.0 if len(response) % 2 == 0 else -1.0, "ok")

    def collect(self) -> dict[int, tuple[float, str]]:
        found, self.scores = self.scores, {}
        return found


LENGTHS = [3, 14, 5, 99, 2, 6, 9, 4, 12, 3, 8, 7]  # of the responses; the heavy tail is meant
SLOTS, WINDOW, CAP, TAIL = 3, 6, 16, 2


def make_trainer(tail: str, opinion: float = 0.1, *, seed: int = 0, **changes: Any) -> Trainer:
    """The library's Trainer on two tables; one mini-batch, so that a step is one update; V begins as +-opinion."""
    settings = {
        "rollout.slots": SLOTS, "rollout.window": WINDOW, "rollout.max_response_tokens": CAP, "advantage.tail": tail,
        "advantage.tail_tokens": TAIL, "policy.mini_batches": 1, "policy.mini_batch_tokens": 0, "value.mini_batches": 1,
        "value.mini_batch_tokens": 0, **changes,
    }  # fmt: skip
    prompts = [Prompt(id=i, token_ids=(i,), answer="") for i in range(len(LENGTHS))]
    stream = SampleStream(prompts, samples_per_prompt=1, seed=seed, limit=len(prompts))
    schedule = SlotSchedule(slots=SLOTS, window=WINDOW, max_response_tokens=CAP)
    shape, generator = (len(prompts), CAP), torch.Generator().manual_seed(seed)
    return Trainer(
        replace_fields(Config(), settings), policy=Table(torch.full(shape, -1.0)),
        value=Table(opinion * torch.randn(shape, generator=generator), is_value=True), engine=ScriptedEngine(LENGTHS),
        batcher=SuccessiveBatcher(schedule, stream, run_seed=seed), scorer=LengthScorer(),
    )  # fmt: skip


def follow(trainer: Trainer, num_steps: int) -> tuple[dict[str, np.ndarray], list[dict[str, int]], dict[int, Response]]:
    """Run, and note per (prompt, token) the step that sampled it and those that trained on it. The first step is 1; 0: none."""
    shape = len(LENGTHS), CAP
    seen = {name: np.zeros(shape, dtype=int) for name in ("sampled", "policy", "value", "policy times", "value times")}
    ledger, responses = [], {}
    modules: Any = {"policy": trainer.policy_learner.module, "value": trainer.value_learner.module}
    for step in range(1, num_steps + 1):
        before = {name: module.trained.clone() for name, module in modules.items()}
        metrics = trainer.step()
        for s in trainer.slices:
            responses[s.response.prompt.id] = s.response
            seen["sampled"][s.response.prompt.id, s.begin : s.stop] = step
        for name, module in modules.items():
            seen[name][(module.trained > before[name]).numpy()] = step
            seen[f"{name} times"] = module.trained.numpy().copy()
        counts = {
            name: x for name, x in metrics.items() if name.startswith("ledger/") and not np.isnan(x)
        }  # a mean of nothing is NaN
        ledger.append({name.partition("/")[2]: int(x) for name, x in counts.items()})
    return seen, ledger, responses


FATES = {
    "trained by the policy in the step that sampled it": (look("tppo").colour, "white", ""),
    "trained by the policy one step later (deferred)": (look("egae-defer").colour, "black", ".."),
    "excluded tail: the policy never trains on it": (look("egae-exclude").colour, "white", "xx"),
    "trained by the value model, once the response has ended": (COLOURS[2], "white", ""),
    "nobody yet: the response still runs": ("#E8E8E8", "black", ""),
}
NOW, LATER, TAIL_LOST, BY_VALUE, NOBODY = FATES


def _fate(seen: dict[str, np.ndarray], who: str, tail: str, i: int, t: int) -> str:
    """What became of token t of response i, as `who` sees it."""
    if who == "value":
        return BY_VALUE if seen["value"][i, t] else NOBODY
    if seen["policy"][i, t]:
        return NOW if seen["policy"][i, t] == seen["sampled"][i, t] else LATER
    return TAIL_LOST if tail == "exclude" else NOBODY


def draw_fates(runs: Mapping[str, Any]) -> Figure:
    """Responses x tokens in three panels; a cell's number is the step that trained on it. `runs`: tail -> `follow`'s result."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 4.6), sharey=True, layout="constrained")
    views = (
        ("policy", "exclude", "policy, tail excluded: some are lost"),
        ("policy", "defer", "policy, tail deferred: one step late"),
        ("value", "exclude", "value model: whole responses, at their end"),
    )
    for axes, (who, tail, title) in zip(panels, views, strict=True):
        seen, _, responses = runs[tail]
        for row, (i, response) in enumerate(sorted(responses.items())):
            for t in range(len(response)):
                face, ink, hatch = FATES[_fate(seen, who, tail, i, t)]
                axes.add_patch(
                    plt.Rectangle((t, row - 0.42), 1, 0.84, facecolor=face, hatch=hatch, edgecolor="white", linewidth=0.6)
                )
                axes.text(t + 0.5, row, seen[who][i, t] or "", color=ink, fontsize=7, ha="center", va="center")
            for begin in response.window_starts[1:]:
                axes.plot([begin, begin], [row - 0.5, row + 0.5], color="black", linewidth=2)
        axes.set(xlim=(-0.1, CAP + 0.1), ylim=(len(responses) - 0.4, -0.6), yticks=range(len(responses)),
                 yticklabels=sorted(responses), xticks=range(0, CAP + 1, 2))  # fmt: skip
        tidy(axes, title=title, x="response token t", y="response (number of its prompt)" if axes is panels[0] else "")
    lost, waiting = (int(((runs[tail][0]["sampled"] > 0) & (runs[tail][0]["policy"] == 0)).sum()) for tail in ("exclude", "defer"))
    sampled = int((runs["exclude"][0]["sampled"] > 0).sum())
    title = f"Excluding the tail has lost {lost} of {sampled} tokens for good, deferring it holds {waiting} back"
    figure.suptitle(title, fontweight="bold", fontsize=11)
    handles: list[Any] = [
        Patch(facecolor=face, hatch=hatch, edgecolor="white", label=fate) for fate, (face, _, hatch) in FATES.items()
    ]
    handles.append(plt.Line2D([], [], color="black", linewidth=2, label="a window's edge inside the response"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8.5)
    return figure


# ------------------------------------------------------------------------------------------------------ 04: who finishes first


def draw_first_to_finish(worlds: Mapping[str, Instance], windows: Mapping[str, int]) -> Figure:
    """Exact mean score of the responses that end within t tokens, beside that of all: what waiting for the end teaches first."""
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for i, (name, instance) in zip((4, 3), worlds.items(), strict=True):
        found = instance.mdp.trajectories(instance.policy_NA)
        length_B, score_B = found.mask_BT.sum(1), found.reward_BT.sum(1)
        t = np.arange(1, length_B.max() + 1)
        mean = [found.prob_B[length_B <= k] @ score_B[length_B <= k] / max(found.prob_B[length_B <= k].sum(), 1e-300) for k in t]
        style: dict[str, Any] = {"color": COLOURS[i], "linestyle": LINES[i], "marker": MARKERS[i], "markersize": 4}
        axes.plot(t, np.where([(length_B <= k).any() for k in t], mean, np.nan), **style, label=f"{name}: those that ended so far")
        axes.axhline(float(found.prob_B @ score_B), color=COLOURS[i], linewidth=3, alpha=0.3, label=f"{name}: all responses")
        axes.axvline(windows[name], color=COLOURS[i], linewidth=1, linestyle=(0, (4, 3)))
        side, height, align = (1, 0.03, "left") if i == 4 else (-1, 0.75, "right")
        axes.text(windows[name] + 0.2 * side, height, f"{name}:\nfirst window ends", transform=axes.get_xaxis_transform(),
                  fontsize=8.5, va="bottom", ha=align)  # fmt: skip
    tidy(
        axes,
        title="Where the hasty answer first, the first to finish say that the prompt is hopeless",
        x="tokens t",
        y="mean score",
    )
    axes.legend(frameon=False, fontsize=8.5, loc="lower right")
    return figure


# ------------------------------------------------------------------------------------------------------ 05: every comparison

TASK_LOOKS = {"all": {"color": "#000000", "marker": "o"}} | {
    task: {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": LINES[i]}
    for task, i in {"chain": 4, "fork": 3, "length": 5}.items()
}


def draw_comparisons(areas: Sequence[Mapping[str, str]]) -> Figure:
    """Per comparison the paired difference of the areas with its interval: the mean over tasks, thick, and each task."""
    figure, axes = plt.subplots(figsize=(9.6, 7.4), layout="constrained")
    together = [row for row in areas if row["task"] == "all"]
    for place, row in enumerate(together):
        same = [r for r in areas if r["task"] != "all" and (r["arm"], r["base"]) == (row["arm"], row["base"])]
        for i, r in enumerate([row, *same]):
            y, own = -place - 0.17 * i + 0.25, TASK_LOOKS[r["task"]]
            low, middle, high = (float(r[name]) for name in ("low", "mean_difference", "high"))
            filled = own["color"] if r["verdict"] != "undecided" else "white"
            axes.plot([low, high], [y, y], color=own["color"], linewidth=2.2 if i == 0 else 1.1)
            axes.plot(middle, y, own["marker"], color=own["color"], markersize=6 if i == 0 else 4, markerfacecolor=filled,
                      label=r["task"] if place == 0 else None)  # fmt: skip
    axes.axvline(0, color="#666666", linewidth=0.8)
    names = [f"{row['question']}:  {row['arm']} - {row['base']}" for row in together]
    axes.set_yticks([-place for place in range(len(together))], names)
    undecided = sum(r["verdict"] == "undecided" for r in areas)
    title = f"Five seeds decide little: {undecided} of {len(areas)} intervals hold 0"
    tidy(axes, title=title, x="difference in area under the accuracy curve (95 %; filled: 0 is outside)", y="")
    axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    return figure
