"""At the shape of the 32B run (8,192 responses of up to 24,576 tokens, 64 ranks): the Trainer's own seconds, padding, balance.

    python -m benchmarks.at_32b
    python -m benchmarks.at_32b --step      the seconds that the clock expects of a step, alone

Own share (aim: at most 1 %): one rank's Trainer and batcher, driven for real through windows of 8,192 tokens by an engine and by
models that cost nothing, over the seconds that `sim plan` expects of a step. The rank is one of four that share an engine of 512
slots, as in scale/configs/qwen2.5-32b-port.yaml; all four pay for the whole schedule, so that the rank's seconds are the step's. On
a GPU the rows' tensors live there: this CPU's seconds are an upper bound for them. Not in it: collectives, metrics files.

Padding (aim: at most 5 %) and balance, of the same rows dealt to all 64 ranks: the models are fed packed rows, so that only spare
micro-batches pad the linear layers (models.NO_ROWS); attention pads in groups of similar lengths. Ranks go through micro-batches in
step: `waiting` is the mean over ranks of what the slowest of each round makes the others wait, over all of their time, with a
micro-batch's cost as the operations of its linear layers and its attention; `moved_tokens` is the share of tokens whose (ended)
responses changed ranks before that. Two columns more say what waiting is without that, and with mini-batches that are level in
trained tokens alone.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.batching import ReplayEngine
from benchmarks.common import report
from benchmarks.overhead import Stopwatch
from scale.config import ScaleConfig, check
from scale.distributed import moves
from scale.group import Group
from sim.clock.hardware import ModelShape, model
from sim.clock.lengths import load_lengths
from sim.clock.plan import PlanConfig, make
from tppo_ref.loop import learner
from tppo_ref.loop.learner import Plan
from tppo_ref.loop.parallel import SingleProcess
from tppo_ref.loop.trainer import Trainer
from tppo_ref.method.records import Prompt, Response
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.attention import PACKED_CALL_TOKENS, group_by_length
from tppo_ref.rollout.batcher import SampleStream, SuccessiveBatcher
from tppo_ref.rollout.packing import TokenBatch, pack
from tppo_ref.runs.parsing import parse

CONFIG = Path(__file__).parents[1] / "scale" / "configs" / "qwen2.5-32b-port.yaml"
PROMPT_TOKENS = 200
WARM, MEASURED = 5, 3  # windows until slots hold responses of all ages (a response has three), and windows that count


class Free(torch.nn.Module):
    """A model that answers at once, with a gradient; its packing is done for real, as it is the Trainer's to pay."""

    def __init__(self, *, value: bool):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.value, self.arithmetic = value, Stopwatch()
        self.answer = self.arithmetic.timed(self.answer)  # type: ignore[method-assign]

    def forward(self, batch: TokenBatch) -> Any:
        return self.answer(pack(batch, "cpu").shape)

    def answer(self, shape: tuple[int, int]) -> Any:
        rows, columns = shape
        out_BT = (self.weight * -0.5).expand(rows, columns)
        return (out_BT, torch.zeros(rows)) if self.value else out_BT

    def named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(())


class Scores:
    """+1 and -1 in turn."""

    def __init__(self) -> None:
        self.scores: dict[int, tuple[float, str]] = {}

    def submit(self, response: Response) -> None:
        self.scores[response.id] = (1.0 if response.id % 2 else -1.0, "ok")

    def collect(self) -> dict[int, tuple[float, str]]:
        scores, self.scores = self.scores, {}
        return scores


def load() -> ScaleConfig:
    return check(parse(ScaleConfig, ["--config", str(CONFIG)], prog="at_32b"))


def own_seconds(config: ScaleConfig, natural: Sequence[int]) -> dict[str, Any]:
    """Seconds of one rank's steps without models, optimisers and engine; of it those of the window."""
    algo, split = config.algo, config.engine.tensor_parallel
    engines = config.cluster.nodes * config.cluster.devices_per_node // split
    rollout = algo.rollout
    schedule = SlotSchedule(slots=rollout.slots // engines, window=rollout.window, max_response_tokens=rollout.max_response_tokens)
    prompts = [Prompt(id=i, token_ids=(1,) * PROMPT_TOKENS, answer="") for i in range(4096)]
    stream = SampleStream(prompts, samples_per_prompt=rollout.samples_per_prompt, seed=0)
    engine, policy, value = ReplayEngine(natural, rollout.max_response_tokens), Free(value=False), Free(value=True)
    trainer = Trainer(algo, policy=policy, value=value, engine=engine, scorer=Scores(),
                      batcher=Group(SuccessiveBatcher(schedule, stream, run_seed=0), part=0, parts=split))  # fmt: skip
    free, engine_watch = Stopwatch(), Stopwatch()
    for trained in trainer.learners:
        free.wrap(trained.optimiser, "step")
    engine_watch.wrap(engine, "step")
    engine_watch.wrap(engine, "submit")
    backward = torch.Tensor.backward
    torch.Tensor.backward = free.timed(backward)  # type: ignore[method-assign]
    own, rollouts = [], []
    try:
        for step in tqdm(range(WARM + MEASURED), desc="a rank of 64", unit="step"):
            before, engine_s = sum(watch.seconds for watch in (free, policy.arithmetic, value.arithmetic)), engine_watch.seconds
            begin = time.perf_counter()
            metrics = trainer.step()
            took = time.perf_counter() - begin
            spent = sum(watch.seconds for watch in (free, policy.arithmetic, value.arithmetic)) - before
            decoding = engine_watch.seconds - engine_s
            if step >= WARM:
                own.append(took - spent - decoding)
                rollouts.append(metrics["time/rollout_s"] - decoding)
    finally:
        torch.Tensor.backward = backward  # type: ignore[method-assign]
    return {"own_s": round(float(np.mean(own)), 2), "of_it_batcher_s": round(float(np.mean(rollouts)), 2)}


def simulated_step_s(config: ScaleConfig) -> float:
    """What `sim plan` expects of this config on H100s, with its default lengths."""
    rollout, engine = config.algo.rollout, config.engine
    planned = PlanConfig(model="Qwen2.5-32B", gpus="64xH100", cap=rollout.max_response_tokens, window=[rollout.window],
                         prompts=rollout.slots // rollout.samples_per_prompt, samples=rollout.samples_per_prompt,
                         tp=engine.tensor_parallel, memory_utilisation=engine.gpu_memory_utilization)  # fmt: skip
    return make(planned).systems[rollout.window].step_s


class Row(NamedTuple):
    """A row of a step: tokens fed, tokens trained, whether its response ended."""

    fed: int
    trained: int
    ended: bool


def rows_of_all_ranks(config: ScaleConfig, natural: Sequence[int], world: int) -> list[list[Row]]:
    """The rows of a step in routine, per rank: every engine runs its own schedule."""
    rollout, split = config.algo.rollout, config.engine.tensor_parallel
    engines, ranks = world // split, []
    prompts = [Prompt(id=0, token_ids=(1,) * PROMPT_TOKENS, answer="")]
    for number in tqdm(range(engines), desc="all ranks", unit="engine"):
        schedule = SlotSchedule(
            slots=rollout.slots // engines, window=rollout.window, max_response_tokens=rollout.max_response_tokens
        )
        stream = SampleStream(prompts, samples_per_prompt=rollout.samples_per_prompt, seed=0, rank=number, world=engines)
        batcher = SuccessiveBatcher(schedule, stream, run_seed=0)
        engine = ReplayEngine(natural, rollout.max_response_tokens)
        for _ in range(WARM):
            slices = batcher.window(engine)
        for part in range(split):
            own = [s for s in slices if s.response.id // engines % split == part]
            ranks.append(
                [Row(PROMPT_TOKENS + s.stop, s.stop - s.begin, s.response.ended and s.stop == len(s.response)) for s in own]
            )
    return ranks


class Agreed(SingleProcess):
    """A rank among others: their sum of trained tokens is its own times their number, their largest numbers are given."""

    def __init__(self, most: Sequence[float]):
        self.most = list(most)

    def max(self, numbers: Any) -> list[float]:
        return self.most or [float(n) for n in numbers]


def levelled(ranks: Sequence[Sequence[Row]]) -> tuple[list[list[Row]], float]:
    """The rows after ended ones have moved to ranks with less to do, as scale/ moves them, and the share of tokens that moved."""
    transfers = moves([[(row.fed, row.ended) for row in rows] for rows in ranks])
    gone = {(m.source, m.thing) for m in transfers}
    after = [[row for i, row in enumerate(rows) if (rank, i) not in gone] for rank, rows in enumerate(ranks)]
    for m in transfers:
        after[m.target].append(ranks[m.source][m.thing])
    moved = sum(ranks[m.source][m.thing].fed for m in transfers)
    return after, moved / sum(row.fed for rows in ranks for row in rows)


def balance(config: ScaleConfig, ranks: Sequence[Sequence[Row]], shape: ModelShape) -> dict[str, Any]:
    """Padding and waiting of one step's policy updates over all ranks, by the Trainer's own planning."""
    trainer = Trainer(config.algo, policy=Free(value=False), value=Free(value=True), engine=None, batcher=None, scorer=None)  # type: ignore[arg-type]

    def plan(rank: int, most: Sequence[float]) -> Plan:
        trainer.policy_learner.parallel = Agreed(most)
        fed, trained, _ = zip(*ranks[rank], strict=True)
        return trainer.policy_learner.plan(trained, fed, np.random.default_rng((0, rank)))

    alone = [[len(mini) for mini in plan(rank, [])] for rank in range(len(ranks))]
    plans = [plan(rank, np.max(alone, axis=0)) for rank in range(len(ranks))]
    counts: Counter[str] = Counter()
    waited = whole = 0.0
    for mini in range(len(plans[0])):
        for micro in range(len(plans[0][mini])):
            costs = []
            for rank, rank_plan in enumerate(plans):
                lengths = sorted((ranks[rank][row].fed for row in rank_plan[mini][micro]), reverse=True)
                counts["real"] += sum(lengths)
                counts["fed"] += sum(lengths) if lengths else 2
                groups = group_by_length(lengths, PACKED_CALL_TOKENS)
                counts["attended"] += sum((stop - start) * lengths[start] for start, stop in groups)
                costs.append(sum(shape.forward_flops(length, length * length / 2) for length in lengths))
            waited += len(costs) * max(costs) - sum(costs)
            whole += len(costs) * max(costs)
    return {
        "padding": round(1 - counts["real"] / counts["fed"], 6), "aim_padding": 0.05,
        "attention_padding": round(1 - counts["real"] / counts["attended"], 4),
        "waiting": round(waited / whole, 4), "micro_batches": sum(len(mini) for mini in plans[0]),
    }  # fmt: skip


def level_in_trained_alone(config: ScaleConfig, ranks: Sequence[Sequence[Row]], shape: ModelShape) -> dict[str, Any]:
    """`balance` of mini-batches that are dealt without a look at what is fed."""
    both = learner.split_mini_batches
    learner.split_mini_batches = lambda trained, fed, *rest: both(trained, trained, *rest)  # type: ignore[assignment]
    try:
        return balance(config, ranks, shape)
    finally:
        learner.split_mini_batches = both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", action="store_true", help="the clock's seconds of a step, alone")
    only_step, config = parser.parse_args().step, load()
    if only_step:
        print(f"{simulated_step_s(config):,.0f} s")
        return
    torch.set_num_threads(1)
    world = config.cluster.nodes * config.cluster.devices_per_node
    drawn = load_lengths("math-mixture", config.algo.rollout.max_response_tokens)
    natural = drawn.sample(np.random.default_rng(0), 200_000)[:, 0].tolist()
    own = own_seconds(config, natural)
    step_s = simulated_step_s(config)
    ranks = rows_of_all_ranks(config, natural, world)
    shape, (after, moved) = model("Qwen2.5-32B"), levelled(ranks)
    row = {
        "responses": config.algo.rollout.slots, "ranks": world, **own, "simulated_step_s": round(step_s),
        "own_share": round(own["own_s"] / step_s, 5), "aim_own_share": 0.01, **balance(config, after, shape),
        "moved_tokens": round(moved, 4), "waiting_without_moving": balance(config, ranks, shape)["waiting"],
        "waiting_level_in_trained_alone": level_in_trained_alone(config, ranks, shape)["waiting"],
    }  # fmt: skip
    report("at_32b", [row])


if __name__ == "__main__":
    main()
