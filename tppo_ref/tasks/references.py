"""References that no response can match: each is verified against itself, in the verifier's own processes, before training.

A prompt whose reference its verifier cannot read punishes every response. A verifier that wants its references checked has a
function `wrap_reference(answer) -> text` beside it in its module: the response that states the reference in the form that the
verifier reads. A reference passes where `verify(answer, [], wrap_reference(answer))` is above 0. Verifiers without one are not
asked: some accept no response that a reference could be turned into (a proof checker, a task of token ids).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from tqdm import tqdm

from tppo_ref.method.records import Prompt
from tppo_ref.tasks.verifier import Verifier

AT_A_TIME = 256
"""References in the workers' queue: enough to keep them busy, few enough for the bar to move."""


class BadReference(NamedTuple):
    """A prompt's id, its reference, and what the verifier made of it: "scored -1", or its error."""

    prompt_id: int
    answer: str
    why: str


def failing_references(verifier: Verifier, prompts: Sequence[Prompt], *, progress: bool = True) -> list[BadReference]:
    """The prompts whose reference fails against itself, in their order. None fails where the verifier does not check references."""
    if not verifier.checks_references:
        return []
    bad = []
    with tqdm(total=len(prompts), desc="references", unit="answer", disable=not progress, delay=1.0) as bar:
        for begin in range(0, len(prompts), AT_A_TIME):
            some = prompts[begin : begin + AT_A_TIME]
            keys: list[Hashable] = [("reference", prompt.id) for prompt in some]
            for key, prompt in zip(keys, some, strict=True):
                verifier.submit_reference(key, prompt.answer)
            scores = verifier.collect()
            for key, prompt in zip(keys, some, strict=True):
                score = scores[key]
                if not (score.status == "ok" and score.value > 0):
                    bad.append(BadReference(prompt.id, prompt.answer, score.detail or f"scored {score.value:g}"))
            bar.update(len(some))
    return bad


__all__ = ["BadReference", "failing_references"]
