"""What holds of every Trainer's state between two steps; a checkpoint that breaks one of these laws is refused before it is loaded.

Digests find a file that changed by accident. They do not find a state that was edited and given a new digest, or that a mistake of
ours wrote. Each such state would end in a traceback some steps later, or would lose responses, or train them twice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tppo_ref.loop.ledger import OUTCOMES
from tppo_ref.loop.trainer import Trainer
from tppo_ref.method.records import End, Prompt
from tppo_ref.tasks.verifier_process import STATUSES


class Broken(Exception):
    """A law that a state breaks."""


def broken_law(states: Sequence[Any], trainer: Trainer, *, step: int, whole: bool) -> str:
    """The first law that what ranks saved breaks, in a few words; empty where all hold.

    trainer   built from the run's config; nothing of it is changed
    step      after which the states were saved, by the checkpoint's name
    whole     `states` are all ranks', each response in one of them: then nothing may be missing, either
    """
    try:
        for state in states:
            _check_counts(state, trainer, step)
            _check_responses(state, trainer)
        if whole:
            independent = trainer.value_learner is not None and trainer.config.value.update == "independent"
            _check_sums(states, independent=independent)
            _check_groups(states, trainer.config.rollout.samples_per_prompt)
    except Broken as broken:
        return str(broken)
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError) as error:
        return f"something is not of its kind ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
    return ""


def _law(holds: bool, broken: str) -> None:
    if not holds:
        raise Broken(broken)


def _count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _finite(number: Any) -> bool:
    return isinstance(number, float | int) and not isinstance(number, bool) and math.isfinite(number)


def _check_counts(state: Mapping[str, Any], trainer: Trainer, step: int) -> None:
    """Counters, clocks and the books."""
    for name in ("num_steps", "version"):
        _law(state[name] == step and _count(state[name]), f"{name} is {state[name]!r} after step {step}")
    _law(_finite(state["train_s"]) and state["train_s"] >= 0, f"train_s is {state['train_s']!r}")
    learners = {learner.name for learner in trainer.learners}
    _law(state["learners"].keys() == learners, f"the learners are {sorted(state['learners'])}, not {sorted(learners)}")
    for learner in trainer.learners:
        counts = state["learners"][learner.name]
        _law(counts.keys() == learner.state_dict().keys(), f"the counts of the {learner.name}'s learner are {sorted(counts)}")
        _law(all(map(_count, counts.values())), f"a count of the {learner.name}'s learner is none")
        _law(counts["num_steps"] <= min(step, counts["num_updates"]), f"the {learner.name} was updated too often")
    ledger = state["ledger"]
    for name, known in (("tokens", OUTCOMES), ("verdicts", STATUSES)):
        _law(set(ledger[name]) <= set(known), f"ledger.{name} counts {sorted(set(ledger[name]) - set(known))}")
        _law(all(map(_count, ledger[name].values())), f"a count of ledger.{name} is none")
    for name, number in (("valued", ledger["valued"]), ("observed", ledger["observed"])):
        _law(_count(number), f"ledger.{name} is {number!r}")
    updates_at = dict(ledger["updates_at"])
    _law(all(map(_count, (*updates_at, *updates_at.values()))), "a count of ledger.updates_at is none")
    _law(step in updates_at, "ledger.updates_at lacks the last version")
    weight = state["ewma_weight"]
    _law((weight is None) == (trainer.ewma is None), f"ewma_weight is {weight!r}")
    _law(weight is None or (_finite(weight) and weight >= 1), f"ewma_weight is {weight!r}")
    generator = state["torch_rng"]
    _law(len(generator) == torch.get_rng_state().numel() and all(_count(byte) and byte < 256 for byte in generator),
         "torch_rng is no state of torch's generator")  # fmt: skip


def _check_responses(state: Mapping[str, Any], trainer: Trainer) -> None:
    """Each response, and who decodes it."""
    batcher, stream = state["batcher"], state["batcher"]["stream"]
    numbers = (stream["next"], stream["rank"], stream["world"], *stream["backlog"])
    _law(all(map(_count, numbers)), "the sample stream's place is none")
    _law(stream["rank"] < max(1, stream["world"]), "the sample stream's rank is beyond its world")
    _law(
        type(stream["backlog"]) is list and len(set(stream["backlog"])) == len(stream["backlog"]),
        "a sample waits twice to be issued",
    )
    past = state["past"]
    _law(type(past) is list and len(past) <= trainer.config.policy.reuse_batches, "more batches are kept than are used again")
    for response in (response for batch in past for response in batch):
        _check_response(response, trainer, last_version=state["version"])
    seen = dict(state["ledger"]["updates_at"])
    flying, held, grouped = batcher["in_flight"], state["held"], state["held_groups"]
    _law(type(grouped) is list and (not grouped or trainer.value_learner is None), "a value model is there, and groups are held")
    _law(not held or trainer.value_learner is not None, "responses are held for a value model that is not there")
    for response in (*flying, *held, *grouped):
        _check_response(response, trainer, last_version=state["version"])
        unknown = set(response["versions"][response["num_settled"] :]) - set(seen)
        _law(not unknown, f"response {response['id']} has tokens of a version that the ledger forgot")
        _law(response["id"] not in stream["backlog"], f"sample {response['id']} was begun and waits to be issued")
    for response in flying:
        _law(response["end"] == End.RUNNING.name and response["score"] is None, f"response {response['id']} is in flight and ended")
    for response in held:
        _law(response["end"] != End.RUNNING.name and _finite(response["score"]), f"response {response['id']} is held unscored")
        _law(response["num_settled"] == len(response["token_ids"]), f"response {response['id']} is held and not settled")
        _law(len(response["values"]) == len(response["token_ids"]), f"response {response['id']} is held without its values")
    for response in grouped:
        _law(response["end"] != End.RUNNING.name and _finite(response["score"]), f"response {response['id']} is held unscored")
        _law(response["num_settled"] == 0, f"response {response['id']} waits for its group and was trained")
    for response in (*flying, *grouped) if trainer.value_learner is None else ():
        _law(response["values"] == [], f"response {response['id']} has values of no value model")
    ids = [response["id"] for response in (*flying, *held, *grouped)]
    _law(len(set(ids)) == len(ids), "a response is there twice")
    lengths = {
        response["id"]: len(response["token_ids"]) + sum(len(ids) for _, ids in response["observations"]) for response in flying
    }
    seats = {id: length for seat in batcher["schedule"]["carried"] if seat for id, length in [seat]}
    num_seated = sum(seat is not None for seat in batcher["schedule"]["carried"])
    _law(len(seats) == num_seated, "a response has two slots")
    own = {id: length for id, length in seats.items() if id in lengths} if "part" in batcher else seats
    _law(own == lengths, "the slots hold other responses than those in flight")


def _check_response(response: Mapping[str, Any], trainer: Trainer, *, last_version: int) -> None:
    """One record, against itself and against the prompt that its number stands for."""
    name, tokens = f"response {response['id']!r}", response["token_ids"]
    limit, vocabulary = trainer.config.rollout.max_response_tokens, _vocabulary(trainer)
    _law(_count(response["id"]), f"{name} has no number")
    _law(0 < len(tokens) <= limit, f"{name} has {len(tokens)} tokens")
    _law(all(_count(token) and token < vocabulary for token in tokens), f"{name} has a token that the model does not know")
    _law(isinstance(response["observations"], list), f"{name} was answered {response['observations']!r}")
    observed = [column for column, _ in response["observations"]]
    _law(observed == sorted({*observed} & {*range(1, len(tokens) + 1)}), f"{name} was answered where no turn of its own ends")
    said = [token for _, ids in response["observations"] for token in ids]
    _law(all(_count(token) and token < vocabulary for token in said), f"{name} was answered a token that the model does not know")
    _law(len(tokens) + len(said) <= limit, f"{name} has {len(tokens) + len(said)} tokens with what was answered")
    for column in ("logprobs", "versions"):
        _law(len(response[column]) == len(tokens), f"{name} has {len(response[column])} {column} for {len(tokens)} tokens")
    edges = (0, *response["window_starts"][1:], len(tokens))
    _law(isinstance(response["values"], list) and len(response["values"]) in edges, f"{name} has values for part of a window")
    _law(all(map(_finite, (*response["logprobs"], *response["values"]))), f"{name} has a number that is not finite")
    _law(all(map(_count, response["versions"])), f"{name} has a version that is none")
    _law(max(response["versions"]) < last_version, f"{name} was sampled by a policy to come")
    _law(response["versions"] == sorted(response["versions"]), f"{name} was sampled by an older policy after a newer one")
    starts = response["window_starts"]
    _law(starts[:1] == [0] and all(map(_count, starts)), f"{name} begins in no window")
    _law(starts == sorted(set(starts)) and starts[-1] < len(tokens), f"{name} has windows that do not follow each other")
    _law(_count(response["num_settled"]) and response["num_settled"] <= len(tokens), f"{name} has settled tokens that it lacks")
    _law(response["end"] in End.__members__, f"{name} stands at {response['end']!r}")
    stream = _stream(trainer)
    if stream is not None:
        prompt = response["prompt"]
        asked = Prompt(id=prompt["id"], token_ids=tuple(prompt["token_ids"]), answer=prompt["answer"])
        _law((asked, response["sample_index"]) == stream.prompt_of(response["id"]), f"{name} answers another prompt than its own")


def _check_sums(states: Sequence[Mapping[str, Any]], *, independent: bool) -> None:
    """No token and no response is lost or there twice, over all ranks.

    generated = settled + pending;    drawn = ended + in flight;    with an independent critic, ended = valued + held
    """
    flying = [response for state in states for response in state["batcher"]["in_flight"]]
    grouped = [response for state in states for response in state["held_groups"]]
    ids = [response["id"] for response in (*flying, *(response for state in states for response in state["held"]), *grouped)]
    _law(len(set(ids)) == len(ids), "a response is on two ranks")
    generated = sum(state["batcher"]["num_generated_tokens"] for state in states)
    settled = sum(sum(state["ledger"]["tokens"].values()) for state in states)
    pending = sum(len(response["token_ids"]) - response["num_settled"] for response in (*flying, *grouped))
    _law(generated == settled + pending, f"{generated} tokens were generated and {settled + pending} are accounted for")
    streams = list({state["batcher"]["stream"]["rank"]: state["batcher"]["stream"] for state in states}.values())
    _law(len({stream["world"] for stream in streams} | {len(streams)}) == 1, "the sample streams are not of one run")
    issued = _issued(streams)
    ended = sum(sum(state["ledger"]["verdicts"].values()) for state in states)
    _law(issued == ended + len(flying), f"{issued:g} responses were begun and {ended + len(flying)} are accounted for")
    taken = sum(state["ledger"]["valued"] + len(state["held"]) for state in states)
    _law(not independent or ended == taken, f"{ended} responses ended and the value model took or holds {taken}")


def _check_groups(states: Sequence[Mapping[str, Any]], size: int) -> None:
    """What a held group lacks is in flight or yet to be issued, or the group would wait for ever; and no whole group is held."""
    streams = [state["batcher"]["stream"] for state in states]
    flying = {response["id"] for state in states for response in state["batcher"]["in_flight"]}
    held = {response["id"] for state in states for response in state["held_groups"]}

    def to_come(id: int) -> bool:
        return any(id in s["backlog"] or (id >= s["next"] and (id - s["next"]) % s["world"] == 0) for s in streams)

    for group in sorted({id // size for id in held}):
        missing = {*range(group * size, (group + 1) * size)} - held
        _law(bool(missing), f"group {group} has ended and is held")
        lost = [id for id in sorted(missing) if id not in flying and not to_come(id)]
        _law(not lost, f"group {group} waits for response {lost[:1]}, which nobody has")


def _issued(streams: Sequence[Mapping[str, Any]]) -> float:
    """Samples that streams have issued. Stream r draws r, r + world, ...; after a restart on other ranks from a common number on,
    which cancels: the mean of (next - r) is what has been drawn or waits."""
    return sum(s["next"] - s["rank"] for s in streams) / len(streams) - sum(len(s["backlog"]) for s in streams)


def _vocabulary(trainer: Trainer) -> float:
    """Tokens that the policy knows."""
    hf = getattr(trainer.policy_learner.module, "hf", None)
    return math.inf if hf is None else hf.config.vocab_size


def _stream(trainer: Trainer) -> Any:
    """The sample stream, where the batcher shows one."""
    batcher = trainer.batcher
    return getattr(batcher, "stream", None) or getattr(getattr(batcher, "batcher", None), "stream", None)
