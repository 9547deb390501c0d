"""Advantages without a value model: the answers to one prompt, its group, are measured against each other.

    rloo    A_i = r_i - mean of the other G - 1 scores           Ahmadian et al., arXiv 2402.14740
    grpo    A_i = (r_i - mean of all G) / (std + 1e-6)           DeepSeekMath, arXiv 2402.03300

Each trained token of response i has A_i. T-PPO's paper has nothing to say here: all is our choice [O], docs/critic_free.md.

A response that is RUNNING has no score, and without it its group has no mean: nothing of a group is trained before all of it has
ended. What ended is held by the rank that decoded it. "The mean of those that have ended so far" would not do: which others have
ended by then depends on the response's own length, and a baseline that depends on what it is taken from is biased.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from tppo_ref.loop.parallel import Parallel, per
from tppo_ref.method.records import Response

STD_EPSILON = 1e-6  # as in verl's compute_grpo_outcome_advantage; the paper has none


def group_advantages(scores_PG: Tensor, *, estimator: Literal["rloo", "grpo"]) -> Tensor:
    """Scores of the G responses to each of P prompts -> their advantages, [P, G], same dtype; 0 where a group's are all alike.

    grpo: the sample's standard deviation, over G - 1. The paper says "std" and no more; verl takes torch.std, which is this one.
    ValueError for groups of one.
    """
    size = scores_PG.shape[1]
    if size < 2:
        raise ValueError(f"scores_PG: expected groups of at least 2, got {size}")
    centred_PG = scores_PG - scores_PG.mean(1, keepdim=True)
    if estimator == "rloo":
        advantage_PG = centred_PG * (size / (size - 1))  # r_i - (sum - r_i) / (G - 1)
    else:
        std_P1 = (centred_PG.square().sum(1, keepdim=True) / (size - 1)).sqrt()  # torch.std warns where there is no group
        advantage_PG = centred_PG / (std_P1 + STD_EPSILON)
    alike_P = scores_PG.amax(1) == scores_PG.amin(1)  # rounding would leave a little of them
    return torch.where(alike_P[:, None], 0.0, advantage_PG)


def advantage_of_rows(
    responses: Sequence[Response], size: int, *, estimator: Literal["rloo", "grpo"], parallel: Parallel
) -> tuple[list[float], float]:
    """The advantage of each of this rank's responses, whose groups are whole over all ranks; and the share of groups, all ranks',
    whose scores are all alike. size: responses of a group (rollout.samples_per_prompt)."""
    everyones = parallel.gather_objects([(r.id, r.score) for r in responses])
    groups = defaultdict[int, dict[int, float]](dict)
    for id, score in (pair for ranks in everyones for pair in ranks):
        groups[id // size][id] = score
    assert all(len(group) == size for group in groups.values()), "a group is trained in part"
    scores_PG = torch.tensor([list(group.values()) for group in groups.values()], dtype=torch.float64).reshape(-1, size)
    advantage_PG = group_advantages(scores_PG, estimator=estimator)
    ids = [id for group in groups.values() for id in group]
    of_id = dict(zip(ids, advantage_PG.flatten().tolist(), strict=True))
    alike = int((scores_PG.amax(1) == scores_PG.amin(1)).sum())
    return [of_id[r.id] for r in responses], per(alike, len(groups))


def split_whole_groups(ended: Sequence[Response], size: int, parallel: Parallel) -> tuple[list[Response], list[Response]]:
    """This rank's ended responses -> (those whose group has ended, on whatever ranks; those that wait). All ranks take part.

    A group is `size` successive sample numbers (`SampleStream`), not a prompt, which comes again in each epoch.
    """
    num_ended = Counter(id // size for ids in parallel.gather_objects([r.id for r in ended]) for id in ids)
    whole = [r for r in ended if num_ended[r.id // size] == size]
    return whole, [r for r in ended if num_ended[r.id // size] < size]


def held_metrics(
    held: Sequence[Response], trained: Sequence[Response], size: int, *, sampled_with: int, parallel: Parallel
) -> dict[str, float]:
    """What waits for its group after a step, and how many steps ago the responses ended that train in it (`trained`).

    sampled_with   version of the policy that sampled this step's window: one more with each step
    """
    everyones = parallel.gather_objects(sorted({r.id // size for r in held}))
    waited, num, num_held = parallel.sum([sum(sampled_with - r.versions[-1] for r in trained), len(trained), len(held)])
    return {
        "ledger/held_groups": len({group for ranks in everyones for group in ranks}),
        "ledger/held_responses": num_held,
        "ledger/held_steps": per(waited, num),
    }


NOTHING_HELD = {"ledger/held_groups": 0.0, "ledger/held_responses": 0.0, "ledger/held_steps": float("nan")}
"""The same of a run with a value model, in which nothing waits for a group."""
