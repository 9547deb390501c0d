"""Scores: math-verify as a verifier for tppo_ref's killable processes, and the shaping of scores in training.

`verify_math` and `grade` are what the verifier's processes import, so nothing here imports torch or vLLM at the top.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scale.config import RewardConfig
    from tppo_ref.method.records import Response


_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # the comma of 1,234, not the one of (1,2)
NO_ANSWER = -2.0  # what `grade` says of a response in which no answer can be found
GRADE = "scale.rewards:grade"


def final_answer(answer: str) -> str:
    """The reference as an expression: behind the last "####" where there is one (GSM8K), thousands' commas removed."""
    return _THOUSANDS.sub("", answer.rpartition("####")[2].strip())


def verify_math(answer: str, response_token_ids: Sequence[int], response_text: str | None) -> float:
    """+1.0 where the response's final answer equals the reference as mathematics, else -1.0.

    The response's answer is what math-verify extracts: the last \\boxed{...}, else the last LaTeX or plain expression; a "####"
    line counts as the answer where there is one. The library's own time limits are off: the process is killed from outside.
    """
    gold, found = _reference(final_answer(answer)), _parse(_claimed(response_text or ""))
    if not gold:
        raise ValueError(f"the reference answer {answer[-80:]!r} holds no expression that math-verify can read")
    import math_verify

    return 1.0 if found and math_verify.verify(gold, found, timeout_seconds=None) else -1.0


def grade(answer: str, response_token_ids: Sequence[int], response_text: str | None) -> float:
    """`verify_math`, and NO_ANSWER where no answer can be found: the verifier for `reward.format_penalty`."""
    if not _parse(_claimed(response_text or "")):
        return NO_ANSWER
    return verify_math(answer, response_token_ids, response_text)


def _claimed(text: str) -> str:
    """The part of a response that states its answer: behind the last "####" where there is one, else from the last \\boxed on
    (of several, math-verify would make a set), else all of it."""
    _, mark, tail = text.rpartition("####")
    if mark:
        return _THOUSANDS.sub("", tail.strip())
    _, box, tail = text.rpartition("\\boxed")
    return box + tail if box else text


def _reference(answer: str) -> list:
    """The reference as math-verify reads it. Bare LaTeX has to be marked as such: of 2\\sqrt{3} it would see the 2."""
    plain = [] if any(sign in answer for sign in "\\^{") else _parse(answer)
    return plain or _parse(f"\\boxed{{{answer}}}") or _parse(answer)


def _parse(text: str) -> list:
    import math_verify

    return math_verify.parse(text, parsing_timeout=None)


def shaped(score: float, response: Response, config: RewardConfig, *, cap: int, answered: bool) -> float:
    """The score that the policy is trained on: the verifier's, less what length and a missing answer cost.

        score - penalty x min(1, max(0, L - (cap - buffer)) / buffer) - format_penalty [no answer]       L: response tokens

    The soft overlong penalty of DAPO (arXiv 2503.14476, eq. 13): 0 up to cap - buffer, `overlong_penalty` at the cap.
    """
    if config.overlong_buffer:
        over = max(0, len(response) - (cap - config.overlong_buffer))
        score -= config.overlong_penalty * min(1.0, over / config.overlong_buffer)
    return score - (0.0 if answered else config.format_penalty)
