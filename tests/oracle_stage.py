"""The stage on which `Trainer.step` and the oracle play the same step: tiny float64 models, a recorder, and the comparison.

The recorder sits on the Trainer's public seams only: the two modules that it calls (which rows, with or without gradient), `Parallel`
(`grad_norm` is called once per optimiser step), the batcher and the scorer. Nothing of the loop is patched.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from oracle import Oracle, Plan, Window

from tppo_ref.loop.parallel import SingleProcess
from tppo_ref.loop.trainer import Trainer
from tppo_ref.method.errors import UserError
from tppo_ref.method.records import Prompt, Response
from tppo_ref.method.slots import SlotSchedule
from tppo_ref.rollout.batcher import SampleStream, SuccessiveBatcher
from tppo_ref.rollout.engine import Decoded, Request
from tppo_ref.rollout.models import PolicyModel, ValueModel
from tppo_ref.rollout.packing import TokenBatch
from tppo_ref.rollout.torch_engine import TorchEngine, draw, uniform
from tppo_ref.rollout.turns import Reply
from tppo_ref.runs.config import Config, apply_method

VOCAB, WIDTH, END_ID, MAX_PROMPT = 7, 6, 0, 3
TOLERANCE = 1e-9
TINY = dict(model_type="llama", vocab_size=VOCAB, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32, num_labels=1, bos_token_id=None, eos_token_id=END_ID,
            pad_token_id=None)  # fmt: skip
WALL_CLOCK = ("time/", "mfu/", "memory/", "rollout/tokens_per_s", "rollout/idle_s")  # measured: nobody else can say what they are


# ------------------------------------------------------------------------------------------------- hand-made models and an engine


class ToyBackbone(torch.nn.Module):
    """A causal model of two lines: h_i = tanh(x_i + sum over j <= i of 0.8^(i-j) W x_j). What stands before `live_from` enters the sum
    as a constant, kept from the pass that filled `batch.prefix` where there is one."""

    def __init__(self, seed: int, num_out: int):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.6)

        self.embedding, self.mix = parameter(VOCAB, WIDTH), parameter(WIDTH, WIDTH)
        self.head, self.bias = parameter(WIDTH, num_out), parameter(num_out)

    def outputs(
        self, prompt: Sequence[int], response: Sequence[int], live_from: int | None = None, kept: list[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """[tokens, num_out]; `kept` takes the row's constants, or, where it is called a second time, gives them."""
        ids = torch.tensor([*prompt, *response])
        x = self.embedding[ids]
        n = len(ids)
        far = x @ self.mix
        if live_from is not None:
            edge = len(prompt) + live_from
            constant = far[: edge - 1].detach() if not kept else kept[0]
            if kept is not None and not kept:
                kept.append(constant)
            far = torch.cat([constant, far[edge - 1 : edge].detach(), far[edge:]])
        gap = torch.arange(n)[:, None] - torch.arange(n)
        weight = torch.where(gap >= 0, torch.tensor(0.8, dtype=torch.float64) ** gap.clamp(min=0), 0.0)
        return torch.tanh(x + weight @ far) @ self.head + self.bias

    def rows(self, batch: TokenBatch) -> list[torch.Tensor]:
        """Outputs of each row from its last prompt token on, one more than it has response tokens; 0 before `live_from`."""
        edges = batch.live_from or [None] * len(batch)
        if batch.prefix is not None and not hasattr(batch.prefix, "toy"):
            batch.prefix.toy = [[] for _ in edges]
        kept = [None] * len(batch) if batch.prefix is None else batch.prefix.toy
        rows = []
        for prompt, ids, edge, its in zip(batch.prompt_ids, batch.response_ids, edges, kept, strict=True):
            row = self.outputs(prompt, ids, edge, its)[len(prompt) - 1 :]
            rows.append(torch.cat([torch.zeros_like(row[: edge or 0]), row[edge or 0 :]]))
        return rows

    def named_tensors(self):
        return self.named_parameters()


def padded(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


class ToyPolicy(ToyBackbone):
    def __init__(self, seed: int, *, temperature: float, min_response_tokens: int):
        super().__init__(seed, VOCAB)
        self.temperature, self.min_response_tokens = temperature, min_response_tokens

    def log_distribution(self, logits: torch.Tensor, first_column: int = 0) -> torch.Tensor:
        early = torch.arange(first_column, first_column + len(logits)) < self.min_response_tokens
        forbidden = early[:, None] & (torch.arange(VOCAB) == END_ID)
        return (logits / self.temperature).masked_fill(forbidden, -math.inf).log_softmax(-1)

    def forward(self, batch: TokenBatch) -> torch.Tensor:
        logprobs = []
        for row, ids, edge in zip(self.rows(batch), batch.response_ids, batch.live_from or [0] * len(batch), strict=True):
            logprob_T = self.log_distribution(row[:-1]).gather(-1, torch.tensor(ids)[:, None])[:, 0]
            logprobs.append(torch.cat([torch.zeros(edge, dtype=torch.float64), logprob_T[edge:]]))
        return padded(logprobs)


class ToyValue(ToyBackbone):
    def __init__(self, seed: int):
        super().__init__(seed, 1)

    def forward(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [row[:, 0] for row in self.rows(batch)]
        return padded([row[:-1] for row in rows]), torch.stack([row[-1] for row in rows])


class ToyEngine:
    """`RolloutEngine` over a ToyPolicy. Its log-probabilities are off by up to `mismatch`, as a faster engine's are."""

    def __init__(self, policy: ToyPolicy, mismatch: float):
        self.policy, self.mismatch, self.version = policy, mismatch, 0
        self.running: list[tuple[Request, list[int], list[float]]] = []

    @property
    def num_running(self) -> int:
        return len(self.running)

    def submit(self, requests):
        self.running += [(request, [], []) for request in requests]

    @torch.no_grad()
    def step(self) -> list[Decoded]:
        finished, going = [], []
        for request, tokens, logprobs in self.running:
            logits = self.policy.outputs(request.token_ids, tokens)[-1:]
            distribution = self.policy.log_distribution(logits, request.num_response_tokens + len(tokens))
            u = uniform(torch.tensor([request.seed + len(tokens)]).numpy().astype("uint64"))
            token = int(draw(distribution, torch.from_numpy(u))[0][0])
            tokens.append(token)
            logprobs.append(float(distribution[0, token]) + self.mismatch * math.sin(request.seed % 1000 + 7 * len(tokens)))
            if token == END_ID or len(tokens) == request.max_new_tokens:
                finished.append(Decoded(response_id=request.response_id, token_ids=tokens, logprobs=logprobs,
                                        end_token=token == END_ID))  # fmt: skip
            else:
                going.append((request, tokens, logprobs))
        self.running = going
        return finished

    def sleep(self):
        pass

    def load_weights(self, named_tensors, version):
        self.version = version


# ------------------------------------------------------------------------------------------------------ transformers' own forward


class Plain(torch.nn.Module):
    """A transformers model called on one response: its own forward, no packing, no cache, and the textbook's attention below.

    The oracle's side of `PolicyModel` and `ValueModel`; it shares no line with them.
    """

    now: Plain | None = None  # whose forward is running: transformers hands its attention no argument of ours

    def __init__(self, hf: Any, **sampling: Any):
        super().__init__()
        from transformers import AttentionInterface

        AttentionInterface.register("plain", plain_attention)
        hf.set_attn_implementation("plain")
        self.hf, self.sampling = hf.eval(), sampling
        self.edge, self.kept = 0, None

    def outputs(self, batch: TokenBatch) -> torch.Tensor:
        """The head's outputs [tokens, num_out], from the last prompt token on."""
        ((prompt,), (ids,)) = batch.prompt_ids, batch.response_ids
        self.edge = len(prompt) + batch.live_from[0] if batch.live_from else 0
        if batch.prefix is not None and not hasattr(batch.prefix, "plain"):
            batch.prefix.plain = {}
        self.kept, Plain.now = batch.prefix and batch.prefix.plain, self
        try:
            return self.hf(input_ids=torch.tensor([[*prompt, *ids]]), use_cache=False).logits[0, len(prompt) - 1 :]
        finally:
            Plain.now = None

    def constant(self, which: tuple[int, str], x: torch.Tensor) -> torch.Tensor:
        """Keys or values [1, heads, tokens, width], the ones before the edge as constants: today's, or those that were kept. The last
        of them, whose hidden state predicts the first live column, is computed in each pass."""
        if not self.edge:
            return x
        far, last = x[:, :, : self.edge - 1].detach(), x[:, :, self.edge - 1 : self.edge].detach()
        if self.kept is not None:
            far = self.kept.setdefault(which, far)
        return torch.cat([far, last, x[:, :, self.edge :]], dim=2)


def plain_attention(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *, scaling: float, **_: Any) -> Any:
    """softmax(scaling q k, causal) v, each query head with the key head of its group."""
    key, value = (Plain.now.constant((module.layer_idx, what), x) for what, x in (("key", key), ("value", value)))
    group = query.shape[1] // key.shape[1]
    scores = scaling * query @ key.repeat_interleave(group, 1).mT
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -math.inf).softmax(-1) @ value.repeat_interleave(group, 1)
    return mixed.transpose(1, 2), None


class PlainPolicy(Plain):
    def forward(self, batch: TokenBatch) -> torch.Tensor:
        (ids,) = batch.response_ids
        logits = self.outputs(batch)[:-1] / self.sampling["temperature"]
        early = torch.arange(len(ids)) < self.sampling["min_response_tokens"]
        logits = logits.masked_fill(early[:, None] & (torch.arange(VOCAB) == END_ID), -math.inf)
        return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[None, :, 0]


class PlainValue(Plain):
    def forward(self, batch: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
        value = self.outputs(batch)[:, 0]
        return value[None, :-1], value[-1:]


# -------------------------------------------------------------------------------------------------------------------- recording


class Recorded(torch.nn.Module):
    """A model that writes down which rows it was asked for."""

    def __init__(self, module: torch.nn.Module, name: str, events: list[Any]):
        super().__init__()
        self.module, self.name, self.events, self.copies = module, name, events, []

    def forward(self, batch: TokenBatch) -> Any:
        self.events.append((self.name, torch.is_grad_enabled(), list(batch.response_ids), batch.num_tokens_fed))
        return self.module(batch)

    def __deepcopy__(self, memo: Any) -> Recorded:
        """PPO-EWMA's second model is a copy: it is kept in sight."""
        self.copies.append(Recorded(copy.deepcopy(self.module, memo), self.name + "-copy", self.events))
        return self.copies[-1]

    def named_tensors(self):
        return self.module.named_tensors()


class RecordingParallel(SingleProcess):
    """Says where one optimiser step ends and the next begins."""

    def __init__(self, events: list[Any]):
        self.events = events

    def grad_norm(self, module: Recorded, max_norm: float) -> float:
        self.events.append((module.name, "update"))
        return super().grad_norm(module, max_norm)


class MixedScorer:
    """+1, -1 or 0.5, by the tokens; now and then a verification that failed, in one of three ways."""

    STATUSES = ("ok",) * 6 + ("timeout", "error", "bad_score")

    def __init__(self) -> None:
        self.ended: list[Response] = []

    def submit(self, response: Response) -> None:
        assert response.ended
        self.ended.append(response)

    def collect(self) -> dict[int, tuple[float, str]]:
        ended, self.ended = self.ended, []
        return {response.id: self.verdict(response.token_ids) for response in ended}

    @classmethod
    def verdict(cls, token_ids: list[int]) -> tuple[float, str]:
        number = sum((i + 1) * token for i, token in enumerate(token_ids))
        status = cls.STATUSES[number % len(cls.STATUSES)]
        return ((1.0, -1.0, 0.5)[number % 3] if status == "ok" else -1.0), status


# ------------------------------------------------------------------------------------------------------------------------ stage


@dataclasses.dataclass
class Outcome:
    """What a run of some steps came to: comparable, and the same for Trainer and oracle where they agree."""

    metrics: list[dict[str, float]]
    weights: list[torch.Tensor]
    num_forward_passes: int


def make_config(overrides: Mapping[str, Any], method: str = "tppo") -> Config:
    """A method's config; what a test asks for wins over it."""
    return with_fields(apply_method(with_fields(Config(), overrides), method, strict=False), overrides)


def with_fields(config: Config, overrides: Mapping[str, Any]) -> Config:
    """`replace_fields`, which looks every name up in all fields: too slow for hundreds of configs of 50 fields."""
    sections: dict[str, dict[str, Any]] = {}
    for path, x in overrides.items():
        section, name = path.split(".")
        sections.setdefault(section, {})[name] = x
    return dataclasses.replace(config, **{s: dataclasses.replace(getattr(config, s), **its) for s, its in sections.items()})


def make_prompts(num: int = 40) -> list[Prompt]:
    ids = [tuple(1 + (i * (k + 2) + k) % (VOCAB - 1) for k in range(1 + i % MAX_PROMPT)) for i in range(num)]
    return [Prompt(id=i, token_ids=prompt, answer="") for i, prompt in enumerate(ids)]


class Stage:
    """A Trainer and an Oracle on equal models. `step` plays one step on both, compares, and returns the Trainer's metrics."""

    def __init__(
        self,
        config: Config,
        *,
        policy: torch.nn.Module,
        value: torch.nn.Module,
        engine: Any,
        by_hand: tuple[torch.nn.Module, torch.nn.Module] | None = None,
        parallel: Any = None,
        averaged: torch.nn.Module | None = None,
        reply: Reply | None = None,
    ):
        """by_hand: the oracle's models, where they are not copies of the Trainer's; same parameters in the same order.
        parallel: makes the Trainer's `Parallel` from the list of events, on one of several ranks that share out the slots.
        averaged: a second copy of the policy, where it cannot be deep-copied. reply: an environment."""
        rollout = config.rollout
        self.config, self.events = config, []
        self.policy = Recorded(policy, "policy", self.events)
        self.value = None if config.advantage.critic_free else Recorded(value, "value", self.events)
        policy, value = by_hand or (policy, value)
        self.oracle = Oracle(config, policy, None if config.advantage.critic_free else value)
        ranks = (parallel or RecordingParallel)(self.events)
        schedule = SlotSchedule(slots=rollout.slots // ranks.world, window=rollout.window, max_response_tokens=rollout.max_response_tokens,
                                refill=rollout.refill, responses_per_step=rollout.responses_per_step)  # fmt: skip
        stream = SampleStream(make_prompts(), samples_per_prompt=rollout.samples_per_prompt, seed=config.run.seed,
                              rank=ranks.rank, world=ranks.world)  # fmt: skip
        self.batcher = SuccessiveBatcher(schedule, stream, run_seed=config.run.seed, reply=reply)
        self.plain_window, self.batcher.window = self.batcher.window, self._window
        self.live: dict[int, Response] = {}
        self.rows: list[Response] = []  # the step's
        self.shown: list[Response] = []  # these and the value model's batch: those of several ranks change places
        self.num_forward_passes = 0
        if averaged is not None:
            averaged = Recorded(averaged, "policy-copy", self.events)
            self.policy.copies.append(averaged)
        self.trainer = Trainer(config, policy=self.policy, value=self.value, engine=engine, batcher=self.batcher,
                               scorer=MixedScorer(), parallel=ranks, averaged=averaged, observer=self._observe)  # fmt: skip

    def _observe(self, rows: Any, forward: Any, advantages: Any, batch: Any) -> None:
        self.rows, self.shown = list(rows.responses), [*rows.responses, *batch.responses]

    def _window(self, *args: Any, **named: Any) -> Any:
        slices = self.plain_window(*args, **named)
        self.live |= {s.response.id: s.response for s in slices}
        self.last_window = Window(
            slices=[(copy.deepcopy(s.response), s.begin) for s in slices],
            busy=[(segment.begin, segment.stop) for segment in self.batcher.segments],
            slots=self.config.rollout.slots,
            num_steps=max(segment.stop for segment in self.batcher.segments),
        )
        return slices

    def step(self) -> dict[str, float] | None:
        """The Trainer's metrics; None where it refuses to go on, which the oracle must want as well."""
        self.events.clear()
        try:
            metrics = self.trainer.step()
        except UserError:
            gap, limit = self.oracle.gap_of(self.last_window, self._plan()), self.config.policy.engine_gap_limit
            assert self.config.policy.old_logprobs == "engine", "refused"
            assert gap > limit, f"refused a gap of {gap}"
            return None
        window = self.last_window
        scores = {r.id: MixedScorer.verdict(r.token_ids) for r, _ in window.slices if r.ended}
        expected = self.oracle.step(window, self._plan(), scores)
        self._compare(metrics, expected)
        self.num_forward_passes += sum(len(event) == 4 for event in self.events)
        return metrics

    # ------------------------------------------------------------------------------------------------------------- the plan

    def _plan(self) -> Plan:
        """The mini-batches of each model: its forward passes with gradient between two of its optimiser steps."""
        by_list = {id(response.token_ids): response.id for response in (*self.live.values(), *self.shown)}
        minibatches: dict[str, list[list[int]]] = {"policy": [], "value": []}
        gathering: dict[str, list[int]] = {"policy": [], "value": [], "policy-copy": []}
        recomputed: list[int] = []
        for name, what, *rest in self.events:
            if what == "update":
                minibatches[name].append(gathering[name])
                gathering[name] = []
                continue
            rows, num_tokens_fed = rest
            own = name == "value" and what and self.config.value.update == "independent"
            limit = (self.config.value if own else self.config.policy).micro_batch_tokens
            assert num_tokens_fed <= limit or len(rows) == 1, f"{name}: {num_tokens_fed} tokens in a pass"
            ids = [by_list[id(ids)] for ids in rows]
            if what:
                gathering[name] += ids
            elif name == "policy":
                recomputed += ids
        assert not any(gathering.values()), "a backward pass without an optimiser step"
        if self.value and self.config.value.update == "joint" and minibatches["policy"]:
            assert [sorted(b) for b in minibatches["value"]] == [sorted(b) for b in minibatches["policy"]], (
                "not the same mini-batches"
            )
        return Plan(minibatches["policy"], minibatches["value"], recomputed)

    # ------------------------------------------------------------------------------------------------------- the comparison

    def _compare(self, metrics: Mapping[str, float], expected: Mapping[str, float]) -> None:
        mine = {name: x for name, x in metrics.items() if not name.startswith(WALL_CLOCK)}
        wrong = [f"{name}: Trainer {mine.get(name, 'nothing')}, oracle {expected.get(name, 'nothing')}"
                 for name in sorted({*mine, *expected})
                 if name not in mine or name not in expected or not close(mine[name], expected[name])]  # fmt: skip
        weights = {"policy": (self.policy, self.oracle.policy)} | ({"value": (self.value, self.oracle.value)} if self.value else {})
        for which, (trained, by_hand) in weights.items():
            both = zip(self._weights(trained), by_hand.parameters(), strict=True)
            wrong += [f"{which} {name}: off by {distance(p, q):.1e}" for (name, p), q in both if distance(p, q) > TOLERANCE]
        if self.config.policy.ewma_decay > 0:
            (average,) = self.policy.copies
            both = zip(self._weights(average), self.oracle.averaged(), strict=True)
            wrong += [f"average {name}: off by {distance(p, q):.1e}" for (name, p), q in both if distance(p, q) > TOLERANCE]
        for i, (values, num_settled) in self._stored().items():
            anchors = self.oracle.first_values.get(i, [])
            if len(anchors) != len(values) or not all(map(close, anchors, values)):
                wrong.append(f"response {i}: stored values {values}, oracle {anchors}")
            if num_settled != self.oracle.settled.get(i, 0):
                wrong.append(f"response {i}: {num_settled} columns settled, oracle {self.oracle.settled.get(i, 0)}")
        assert not wrong, f"step {self.oracle.steps}:\n" + "\n".join(wrong)

    def _weights(self, module: torch.nn.Module) -> Sequence[tuple[str, torch.Tensor]]:
        """A model's parameters by name, whole."""
        return list(module.named_parameters())

    def _stored(self) -> Mapping[int, tuple[Sequence[float], int]]:
        """What each response carries from step to step: the values that were stored with it, and how much of it is settled."""
        return {i: (response.values, response.num_settled) for i, response in self.live.items()}

    def play(self, num_steps: int = 3) -> Outcome:
        metrics = list(itertools.takewhile(lambda m: m is not None, (self.step() for _ in range(num_steps))))
        models = [model for model in (self.policy, self.value) if model]
        weights = [p.detach().clone() for model in models for p in model.parameters()]
        return Outcome(
            [{k: x for k, x in m.items() if not k.startswith(WALL_CLOCK)} for m in metrics], weights, self.num_forward_passes
        )


def close(one: float, two: float) -> bool:
    return math.isclose(one, two, rel_tol=TOLERANCE, abs_tol=1e-12) or (math.isnan(one) and math.isnan(two))


def distance(p: torch.Tensor, q: torch.Tensor) -> float:
    """Largest difference of two tensors, relative to their largest entry."""
    return float((p - q).detach().abs().max() / q.detach().abs().max().clamp(min=1e-3))


def same_outcome(one: Outcome, two: Outcome) -> bool:
    weights = zip(one.weights, two.weights, strict=True)
    metrics = zip(one.metrics, two.metrics, strict=True)
    return (
        one.num_forward_passes == two.num_forward_passes
        and len(one.metrics) == len(two.metrics)
        and all(distance(p, q) <= TOLERANCE for p, q in weights)
        and all(a.keys() == b.keys() and all(close(a[k], b[k]) for k in a) for a, b in metrics)
    )


def toy_stage(config: Config, *, mismatch: float = 0.3) -> Stage:
    """The hand-made models: fast enough for hundreds of runs."""
    rollout = config.rollout
    policy = ToyPolicy(0, temperature=rollout.temperature, min_response_tokens=rollout.min_response_tokens)
    return Stage(config, policy=policy, value=ToyValue(1), engine=ToyEngine(policy, mismatch))


def real_stage(config: Config, *, scaling: float | None = None, reply: Reply | None = None, **shape: Any) -> Stage:
    """transformers' modules behind PolicyModel, ValueModel and TorchEngine, in float64; the oracle has their plain forward."""
    policy, value, by_hand = real_models(config, scaling=scaling, **shape)
    return Stage(config, policy=policy, value=value, engine=real_engine(config, policy), by_hand=by_hand, reply=reply)


def sampling_of(config: Config) -> dict[str, Any]:
    return dict(
        temperature=config.rollout.temperature, min_response_tokens=config.rollout.min_response_tokens, end_token_ids=(END_ID,)
    )


def real_engine(config: Config, policy: PolicyModel, world: int = 1) -> TorchEngine:
    """An engine for this rank's slots."""
    rollout = config.rollout
    return TorchEngine(policy, slots=rollout.slots // world, max_context_tokens=MAX_PROMPT + rollout.max_response_tokens,
                       **sampling_of(config))  # fmt: skip


def real_models(
    config: Config, *, scaling: float | None = None, **shape: Any
) -> tuple[PolicyModel, ValueModel, tuple[torch.nn.Module, torch.nn.Module]]:
    """Policy and value model of the Trainer, and the oracle's two.

    scaling: of the attention scores, where it is not the architecture's. Logits come in chunks of 5 tokens.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification

    sampling, shape = sampling_of(config), TINY | shape
    models = []
    for seed, auto_class in enumerate((AutoModelForCausalLM, AutoModelForTokenClassification)):
        torch.manual_seed(seed)
        hf = auto_class.from_config(AutoConfig.for_model(**shape)).double()
        with torch.no_grad():
            for p in hf.parameters():  # of a useful size: a fresh initialisation is nearly uniform
                p.add_(torch.randn(p.shape, dtype=p.dtype) * 0.2)
        for layer in hf.modules():
            if scaling is not None and hasattr(layer, "scaling"):
                layer.scaling = scaling
        models.append(hf)
    by_hand = PlainPolicy(copy.deepcopy(models[0]), **sampling), PlainValue(copy.deepcopy(models[1]))
    policy, value = PolicyModel(models[0], logit_chunk_tokens=5, **sampling), ValueModel(models[1])
    return policy, value, by_hand
