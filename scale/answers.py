"""Whether a claim says what a reference says: nothing less, and nothing that merely evaluates to a part of it.

math-verify reads expressions well, and misreads what is none: of 3.83e35 it makes 3.83 e 35, of 7:6 a quotient that 14:12 equals,
of 2015-03-14 a difference, of a date or a word a product of letters (seat = east), of 1 000 the number 0, of 5 \\text{ million} the
number 5, and decimals below its sixth place are all the same to it. So the shape of a text decides first:

    shape           example                     equal to
    number          3.83e35, 1 000, 1/3         the same number (`numerals`), or to six places and five significant
                                                digits: 0.333333 for 1/3
    list, set       -1,-9   \\{1,2\\}   2 or 3    as many elements, each equal to one of the other's, in any order
    tuple           (1,2)   [0,\\infty)          as many elements, in this order, in the same brackets; (1,2) also to the list 1,2
    ratio, time     7:6   12:10                 as many parts, each equal: 14:12 and 7/6 are not 7:6
    date, range     2015-03-14   5-10           the same text
    words           March 14   east             the same text, whatever its case and \\text
    expression      2\\sqrt{3}   x=5   5 cm      what math-verify says, and where both have a value, five significant digits
"""

from __future__ import annotations

import decimal
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

from tppo_ref.tasks.numerals import COUNTING_WORD, read_numeral

PLACES, SIGNIFICANT = Decimal("1e-6"), Decimal("1e-5")
MAX_ELEMENTS = 100

_THOUSANDS = re.compile(r"(?<![\d,.])([1-9]\d{0,2}(?:,\d{3})+)(?![\d,])")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?|\.\d+)[eE]([-+]?\d+)(?![\w.])")
_NOISE = re.compile(r"(?<!\\)(?:\\!\s*|\\(?:left|right)(?![a-z])|\\[,;:()\[\]]|\\q?quad|\\displaystyle|\\?\$)")
_AND = re.compile(r",?\s*(?:\\(?:text|mathrm)\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b)", re.IGNORECASE)
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(_TEXT.pattern + r"(\^\{?-?\d+\}?)?")
_LITERAL = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}|\d+(?:\.\d+)?\s*[-–—]\s*\d+(?:\.\d+)?")
_BEGIN = re.compile(r"\\(?:begin|end)\s*\{\w*\*?\}(?:\{[\w|]*\})?")
_WORD = re.compile(r"(?<![\\A-Za-z])(?!(?:sinh|cosh|tanh|coth|sqrt|frac|arcsin|arccos|arctan)\b)[^\W\d_]{4,}")
_BRACKETS = (("(", ")"), ("[", "]"), ("(", "]"), ("[", ")"), ("\\{", "\\}"), ("{", "}"))
_EXACT = decimal.Context(prec=60, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN, traps=[])


def same(reference: str, claim: str) -> bool:
    """Whether `claim` equals `reference`, both whole answers without the words around them."""
    reference, claim = tidy(reference), tidy(claim)
    if not reference or not claim:
        return False
    if plain(reference) == plain(claim):
        return True
    if _LITERAL.fullmatch(reference) or _LITERAL.fullmatch(claim):
        return False
    (brackets, parts), (other_brackets, others) = elements(reference), elements(claim)
    if len(parts) > 1 and len(others) > 1:
        return _same_elements(brackets, parts, other_brackets, others)
    if (len(parts) > 1 and not brackets) or (len(others) > 1 and not other_brackets):
        return False  # but x > 3 may be the interval (3,\\infty)
    parts, others = (split(_without_name(text), ":") for text in (reference, claim))
    if len(parts) > 1 or len(others) > 1:
        return len(parts) == len(others) and all(map(same, parts, others))
    return _same_value(reference, claim)


def tidy(text: str) -> str:
    """Without the marks of typesetting and thousands' commas; scientific and mixed numbers in LaTeX, "and" and "or" as commas."""
    for written, meant in (("{,}", ","), ("\\%", "%"), ("−", "-"), ("~", " "), ("\\mathrm{e}", "e")):
        text = text.replace(written, meant)
    text = re.sub(r"(?<!\\)\\ ", " ", text)  # not of a matrix's row
    text = _NOISE.sub("", text).strip()
    text = _THOUSANDS.sub(_joined, text.removesuffix("."))
    text = _SCIENTIFIC.sub(r"\1\\times 10^{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"(\d)\s+(\d+)/(\d+)$", r"\1\\frac{\2}{\3}", text)
    return _AND.sub(",", text).strip()


def _joined(match: re.Match[str]) -> str:
    """1,234 is one number, (1,234) are two."""
    before = match.string[: match.start()]
    inside = sum(map(before.count, "([")) > sum(map(before.count, ")]"))
    return match[0] if inside else match[0].replace(",", "")


def plain(text: str) -> str:
    """For comparing texts: the contents of \\text, white space only between words and numbers, no case."""
    return re.sub(r"\s+(?!\w)|(?<!\w)\s+", "", " ".join(_TEXT.sub(r"\1", text).split())).casefold()


def elements(text: str) -> tuple[str, list[str]]:
    """The brackets around a list ("" for none, or a set's), and its elements; one element where it is no list."""
    for opening, closing in _BRACKETS:
        if text.startswith(opening) and text.endswith(closing):
            inner = text[len(opening) : -len(closing)]
            parts = split(inner, ",;")
            if len(parts) > 1 and _balanced(inner):
                return opening + closing if opening in "([" else "", parts
    if match := re.fullmatch(r"\\pm\s*([^+,;-]+)", text):
        return "", [match[1], f"-{match[1]}"]
    return "", split(text, ",;")


def split(text: str, separators: str) -> list[str]:
    """The parts of a text between separators that stand in no brackets; parts that are empty are none."""
    parts, depth, begin = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c in separators and depth == 0:
            parts.append(text[begin:i])
            begin = i + 1
    return [part.strip() for part in (*parts, text[begin:]) if part.strip()]


def _without_name(text: str) -> str:
    """A:B=7:6 says 7:6."""
    name, _, value = text.partition("=")
    return value.strip() if value and ":" in name else text


def _balanced(text: str) -> bool:
    """Whether no bracket of `text` is closed before it is opened: of (1,2),(3,4) the inside is not."""
    depth = 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if depth < 0:
            return False
    return depth == 0


def _same_elements(brackets: str, parts: list[str], other_brackets: str, others: list[str]) -> bool:
    if len(parts) != len(others) or len(parts) > MAX_ELEMENTS:
        return False
    if brackets != other_brackets and {brackets, other_brackets} != {"", "()"}:
        return False
    if sum("=" in part for part in parts) == 1 and not any("=" in other for other in others):
        parts = [parts[0].rpartition("=")[2], *parts[1:]]  # a=4,-8 is a list of values
    named = any("=" in part for part in parts) and not all("=" in other for other in others)  # x=1,y=2: 2,1 is another answer
    if brackets or other_brackets or named:
        return all(map(same, parts, others))
    left = list(others)
    for part in parts:
        match = next((other for other in left if same(part, other)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _same_value(reference: str, claim: str) -> bool:
    """Numbers as numbers, words as texts (which differ, here), the rest by math-verify."""
    words, other_words = (_TEXT.sub(r" \1 ", text) for text in (reference, claim))
    number, other = read_numeral(words), read_numeral(other_words)
    if number and other:
        if number.same(other):
            return True
        if "%" not in number.unit + other.unit:
            return number.unit == other.unit and _close(number.value, other.value)
    for mark in (_unit, _base):  # another one is wrong, none is understood
        if mark(reference) and mark(claim) and mark(reference) != mark(claim):
            return False
    if _counting(words) != _counting(other_words) or _loose(words) or _loose(other_words):
        return False
    return _same_expression(reference, claim)


def _counting(text: str) -> list[str]:
    return [word.casefold() for word in re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}", text) if COUNTING_WORD.fullmatch(word)]


def _unit(text: str) -> str:
    """The letters in \\text and their power, or what stands behind a number and a space: math-verify takes cm for m."""
    bare = re.search(r"\d\s+([A-Za-z][A-Za-z/^\d]*)$", text)
    unit = " ".join(part + power for part, power in _UNIT.findall(text)) or (bare[1] if bare else "")
    return "".join(re.findall(r"[^\W_]", unit)).casefold() if re.search(r"[^\W\d_]", unit) else ""


def _base(text: str) -> str:
    """The base of 204_5, which math-verify leaves out; "" for none."""
    match = re.fullmatch(r"[\dA-Fa-f]+_\{?(\d+)\}?", text)
    return match[1] if match else ""


def _loose(text: str) -> bool:
    """Whether two numbers stand side by side: math-verify would multiply them."""
    return re.search(r"\d\s+[\d.]", text) is not None


def _close(a: Decimal | Fraction, b: Decimal | Fraction) -> bool:
    x, y = (_EXACT.divide(Decimal(v.numerator), Decimal(v.denominator)) if isinstance(v, Fraction) else v for v in (a, b))
    difference = _EXACT.subtract(x, y).copy_abs()
    return difference < PLACES and difference <= _EXACT.multiply(SIGNIFICANT, x.copy_abs())


def parse(text: str) -> list[Any]:
    """What math-verify reads in a text: an expression and its LaTeX, or the LaTeX alone, or nothing."""
    import math_verify

    return math_verify.parse(text, parsing_timeout=None)


def _same_expression(reference: str, claim: str) -> bool:
    import math_verify

    gold, found = parse(f"\\boxed{{{reference}}}"), parse(f"\\boxed{{{claim}}}")
    if not gold or not found or any(_WORD.search(_BEGIN.sub("", str(text[-1]))) for text in (gold, found)):
        return False
    if not math_verify.verify(gold, found, timeout_seconds=None):
        return False
    return "%" in reference + claim or _agree(gold[0], found[0])


def _agree(gold: Any, found: Any) -> bool:
    """Where math-verify is too generous: it compares decimals to six places, which tiny ones lack, and equations by what solves
    them, which for f(1)=2 and f(3)=2 is nothing.
    """
    import sympy

    try:
        equations = [e for e in (gold, found) if isinstance(e, sympy.Eq)]
        if len(equations) == 2 and not all(e.lhs.is_Symbol for e in equations):
            return gold == found or bool(gold.free_symbols and sympy.solve(gold, gold.free_symbols))
        a, b = (e.rhs if isinstance(e, sympy.Eq) and e.lhs.is_Symbol else e for e in (gold, found))
        if not all(isinstance(e, sympy.Expr) and not e.is_Matrix and e.is_number for e in (a, b)):
            return True
        a, b = sympy.N(a, 30), sympy.N(b, 30)
        return bool(abs(a - b) <= 1e-5 * abs(a)) or not (a.is_finite and b.is_finite)
    except (ArithmeticError, AttributeError, NotImplementedError, RecursionError, TypeError, ValueError):  # no value, to sympy
        return True


__all__ = ["elements", "parse", "plain", "same", "split", "tidy"]
