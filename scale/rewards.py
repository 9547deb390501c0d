"""Scores: math-verify as a verifier for tppo_ref's killable processes.

`verify_math` and `grade` are what the verifier's processes import, so nothing here imports torch or vLLM at the top.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from scale.answers import parse, same
from tppo_ref.tasks.numerals import COUNTING_WORD

NO_ANSWER = -2.0  # what `grade` says of a response in which no answer can be found
GRADE = "scale.rewards:grade"
MAX_WORDS_CHARS = 80
"""A longer reference without mathematics is a proof or an explanation: no response would say the same, word by word."""


def final_answer(answer: str) -> str:
    """The answer that a reference states: in its box, else behind its last "####" (GSM8K), else all of it; of a worked solution
    without either, the last expression.
    """
    box = boxed(answer)
    text = (box if box is not None else answer.rpartition("####")[2]).strip()
    return claimed(text) if len(text) > MAX_WORDS_CHARS and len(_WORDS.findall(text)) > 5 else text


def wrap_reference(answer: str) -> str:
    """The response that states this reference, for both verifiers below."""
    return f"\\boxed{{{final_answer(answer)}}}"


def verify_math(answer: str, response_token_ids: Sequence[int], response_text: str | None) -> float:
    """+1.0 where the response's final answer says what the reference says (`answers.same`), else -1.0.

    ValueError for a reference that no response can match: none, or an explanation. math-verify's own time limits are off: the
    process is killed from outside.
    """
    reference, claim = final_answer(answer), claimed(response_text or "")
    if not re.search(r"\w", reference) or (len(reference) > MAX_WORDS_CHARS and not re.search(r"[\d\\=^]", reference)):
        raise ValueError(f"the reference answer {answer[-80:]!r} holds no expression and no short text")
    return 1.0 if same(reference, claim) else -1.0


def grade(answer: str, response_token_ids: Sequence[int], response_text: str | None) -> float:
    """`verify_math`, and NO_ANSWER where no answer can be found: the verifier for `reward.format_penalty`."""
    if not claimed(response_text or ""):
        return NO_ANSWER
    return verify_math(answer, response_token_ids, response_text)


def claimed(text: str) -> str:
    """The answer that a response states; "" for none.

    The line behind the last "####" where there is one, else what is in the last \\boxed{} (or in several, with no more between them
    than a comma or an "and"), else the last expression that math-verify finds, unless that is cut out of something longer. Behind
    the last box, "the final answer is" has the last word.
    """
    _, mark, tail = text.rpartition("####")
    if mark:
        return tail.strip().partition("\n")[0].strip()
    final = list(_FINAL.finditer(text))
    if final and final[-1].start() > text.rfind("\\boxed"):
        text = text[final[-1].start() :]
    if "\\boxed" in text:
        return (boxed(text) or "").strip()
    text = _SCIENTIFIC.sub(r"\1*10^(\2)", text.replace("\\mathrm{e}", "e"))
    found = parse(text)
    last = str(found[-1]) if found else ""
    behind = text.rpartition(last)[2] if last and last in text else ""
    word = re.match(r"\s*(?:\\(?:text\w*|mathrm|mathbf)\s*\{\s*)?([A-Za-z]*)", behind)
    return "" if _GOES_ON.match(behind) or (word and COUNTING_WORD.fullmatch(word[1])) else last


_FINAL = re.compile("final answer is", re.IGNORECASE)
_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d+)(?![\w.])")
_GOES_ON = re.compile(r"[,.:]?\d|\s*[:/–-]\s*\d|,-\d|!|\s*[\^*×]|\s*\\(?!text|mathrm|mathbf|[)\]])")
"""Behind a number: it is the beginning of a time, a date, a range, a list or another number."""
_BETWEEN_BOXES = re.compile(r"(?:[\s,;.$]|\\[,;()\[\]]|\\q?quad|and|or|\\text\{\s*(?:and|or)\s*\})*")


def boxed(text: str) -> str | None:
    """What is in the last \\boxed{...}, or in several with nothing between, as a list; None: there is none, or it is not closed."""
    insides: list[str] = []
    end = len(text)
    for match in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        close = _closing(text, match.end(), end)
        if close is None or (insides and not _BETWEEN_BOXES.fullmatch(text, close + 1, end)):
            break
        insides.append(text[match.end() : close])
        end = match.start()
    return ", ".join(reversed(insides)) if insides else None


def _closing(text: str, begin: int, end: int) -> int | None:
    """Where the bracket that is open at `begin` is closed, before `end`."""
    depth = 1
    for i in range(begin, end):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
    return None
