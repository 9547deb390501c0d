"""What a claim must say to be a reference's equal: each shape by hand, and no perturbed answer is ever accepted."""

from __future__ import annotations

import logging
from fractions import Fraction

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scale_helpers import require

from scale.answers import same
from scale.rewards import NO_ANSWER, claimed, final_answer, grade, verify_math, wrap_reference

require("math_verify", "the reader of expressions")
logging.getLogger("math_verify").setLevel(logging.ERROR)

# What five mathematics sets outside of this repository hold, by kind: physics, olympiads, school, and what looks alike.
REFERENCES = [
    "3.83e35", "3.3e-10", "9.4e5", "1.0e-3", "3.83\\times 10^{35}", "6.02214076 \\times 10^{23}", "-1,-9", "6764$,$10945", "1,2,3", "3, 4, 5",
    "1000,2000", "(1,2)", "(-1,-9)", "(1,2),(3,4)", "\\{1,1,2\\}", "[1,2)", "(-\\infty, 3]", "2\\text{ or }3", "x=1, y=2", "\\pm 2", "7:6", "7:6:5",
    "12:10", "1:\\sqrt{3}", "March 14, 2015", "2015-03-14", "14/3/2015", "5-10", "1,234", "1 000", "25\\%", "\\frac{1}{2}", "1\\frac{1}{2}", "1 1/2",
    "2\\sqrt{3}", "12\\pi", "2\\pi \\text{ meters}", "5 \\text{ cm}", "70 dollars", "$70", "x \\geq 3", "f(x)=x^2+1", "x^2 + y^2 = 1", "10^{10}",
    "\\text{east}", "north", "A", "\\text{(A)}", "\\text{Yes}", "0.\\overline{3}", "\\emptyset", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}",
]  # fmt: skip


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_reference_in_a_box_is_right_against_itself(reference):
    assert verify_math(reference, [], wrap_reference(reference)) == 1.0
    assert verify_math(f"work\n#### {reference}", [], f"so \\boxed{{{reference}}}.") == 1.0
    assert verify_math(f"work, so \\boxed{{{reference}}}", [], f"#### {reference}") == 1.0


@pytest.mark.parametrize("reference", REFERENCES)
def test_no_other_reference_is_right_against_it(reference):
    """All pairs but those that do say the same."""
    equal = {frozenset(pair) for pair in [("3.83e35", "3.83\\times 10^{35}"), ("1\\frac{1}{2}", "1 1/2"), ("70 dollars", "$70"), ("A", "\\text{(A)}"),
                                          ("-1,-9", "(-1,-9)"), ("x=1, y=2", "(1,2)")]}  # fmt: skip
    for other in REFERENCES:
        if other != reference and frozenset((reference, other)) not in equal:
            assert verify_math(reference, [], wrap_reference(other)) == -1.0, other


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        ("3.83e35", ["3.83 \\times 10^{35}", "3.83×10^35", "383e33"], ["3.84e35", "3.83", "35", "3.83e34", "-3.83e35"]),
        ("3.3e-10", ["0.00000000033", "3.3\\cdot10^{-10}"], ["4.4e-10", "0", "0.0", "3.3", "3.3e10", "4.4\\times10^{-10}", "\\frac{1}{10^{10}}"]),
        ("-1,-9", ["-9, -1", "-1 \\text{ and } -9", "\\{-9,-1\\}"], ["-1", "-9", "-1,-8", "-10", "1,9", "-1,-9,-9", "(-9,-1)"]),
        ("6764$,$10945", ["6764, 10945", "10945 \\text{ or } 6764"], ["6764", "676410945", "6764,10946"]),
        ("7:6", ["7 : 6"], ["7", "6", "14:12", "7/6", "6:7", "7:6:1", "\\frac{7}{6}"]), ("12:10", ["12:10"], ["12", "10", "6:5", "12:01", "1.2"]),
        ("March 14, 2015", ["\\text{March 14, 2015}", "march 14, 2015"], ["14", "2015", "March 15, 2015", "charm 14, 2015"]),
        ("2015-03-14", ["2015-03-14"], ["1998", "2015", "2015-03-15"]), ("5-10", ["5 - 10"], ["-5", "-10", "5", "10"]),
        ("(1,2)", ["1,2", "\\left(1, 2\\right)"], ["(2,1)", "2,1", "[1,2]", "(1,3)", "1.2"]), ("[1,2)", ["[1, 2)"], ["[1,2]", "(1,2)"]),
        ("\\{1,1,2\\}", ["2,1,1"], ["1,2", "1,2,2"]), ("x=1,y=2", ["y=2,x=1", "1,2"], ["2,1", "x=2,y=1"]),
        ("1 000", ["1000", "1,000", "1\\,000"], ["0", "1"]), ("5", ["5.0", "x=5", "5 \\text{ cm}"], ["5 \\text{ million}", "5 dozen", "5 000", "5!", "5 1/2"]),
        ("1 1/2", ["1.5", "\\frac{3}{2}"], ["1", "1/2", "11/2"]), ("30", [], ["5 6", "3 0"]), ("0", ["0.0"], ["1 000", "0.0000001"]),
        ("0.0000001", ["1e-7"], ["0.0000002", "0"]), ("0.001", ["0.00100000001"], ["0.0010004"]), ("1/3", ["0.333333"], ["0.333"]),
        ("10^{-9}\\sqrt{2}", ["\\sqrt{2}\\times 10^{-9}"], ["0.0", "0.000000001"]), ("east", ["\\text{East}"], ["seat", "\\text{seat}", "west"]),
        ("5 \\text{ cm}", ["5", "5 \\text{cm}"], ["5 \\text{ m}", "5 m"]), ("70 dollars", ["70", "\\$70"], ["70 cents"]), ("25\\%", ["25", "25 %"], ["24\\%"]),
        ("\\pm 2", ["2,-2", "-2 \\text{ or } 2"], ["2", "-2", "\\pm 3", "2, 2"]), ("1,2", ["{1,2}", "\\{2, 1\\}"], ["{1,3}", "1.2"]),
        ("f(1)=2", ["f(1) = 2"], ["f(3)=2", "f(1)=3"]), ("x^2=-1", ["x^2 = -1"], ["x^2=-2"]),
        ("(-1,100)", ["(-1, 100)", "-1, 100"], ["-1100", "(-1100)"]), ("-1,100", ["-1100"], ["-1, 100"]), ("204_5", ["204_{5}", "204"], ["204_3", "203_5"]), ("15\\mbox{ cm}^2", ["15", "15\\text{ cm}^{2}"], ["15\\mbox{ cm}^3", "15\\mbox{ m}^2"]),
        ("\\begin{pmatrix} 0 & 3 \\\\ 0 & -1 \\end{pmatrix}", ["\\begin{pmatrix}0&3\\\\0&-1\\end{pmatrix}"], ["\\begin{pmatrix} 0 & 4 \\\\ 0 & -1 \\end{pmatrix}"]),
        ("\\left[ 1, 2 \\right]", ["[1,\\ 2]"], ["(1,2)", "[1,2]+1"]), ("A:B=7:6", ["7:6"], ["7", "6:7", "14:12"]), ("a=4,-8", ["-8,4"], ["4", "4,8"]), ("x^2/4+y^2/3=1", ["x^2/16+y^2/12=1/4"], ["x^2/4+y^2/3=2"]),
        ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", ["\\begin{bmatrix}1\\\\2\\end{bmatrix}"], ["\\begin{pmatrix}2\\\\1\\end{pmatrix}"]),
        ("11111111100", ["11,\\! 111,\\! 111,\\! 100"], ["11,\\! 111"]), ("1 - \\frac{1}{\\mathrm{e}}", ["1-\\frac1e"], ["1+\\frac1e", "1"]),
        ("x > 3", ["(3,\\infty)", "3 < x"], ["x \\geq 3", "[3,\\infty)", "3"]), ("\\frac 12", ["0.5"], ["12"]),
    ],
)  # fmt: skip
def test_each_shape_by_hand(reference, right, wrong):
    for claim in right:
        assert same(reference, claim), claim
    for claim in wrong:
        assert not same(reference, claim), claim


# ------------------------------------------------------------------------------------------------------- perturbed answers


def latex(value: Fraction) -> str:
    return str(value) if value.denominator == 1 else f"{'-' * (value < 0)}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


NUMBERS = st.fractions(-(10**4), 10**4, max_denominator=50)
SCIENTIFIC = st.tuples(st.integers(100, 999), st.integers(-30, 40), st.sampled_from([-1, 1]))


def scientific(mantissa: int, exponent: int, sign: int) -> str:
    return f"{'-' * (sign < 0)}{mantissa // 100}.{mantissa % 100:02d}e{exponent}"


def in_latex(text: str) -> str:
    mantissa, _, exponent = text.partition("e")
    return f"${mantissa} \\times 10^{{{exponent}}}$"


@settings(deadline=None, max_examples=150)
@given(SCIENTIFIC, SCIENTIFIC)
@example((383, 35, 1), (384, 35, 1))
@example((330, -10, 1), (440, -10, 1))
def test_scientific_numbers_are_equal_exactly_where_they_are(one, other):
    a, b = scientific(*one), scientific(*other)
    assert same(a, in_latex(a))
    assert same(in_latex(a), a)
    for claim in (b, in_latex(b)):
        assert same(a, claim) == (one == other)
    assert not same(a, a.partition("e")[0]) or one[1] == 0


@settings(deadline=None, max_examples=100)
@given(st.lists(NUMBERS, min_size=2, max_size=4))
@example([Fraction(-1), Fraction(-9)])
@example([Fraction(-1), Fraction(100)])
def test_lists_and_tuples_with_one_change_are_refused(values):
    texts = list(map(latex, values))
    reference, point = ", ".join(texts), f"({','.join(texts)})"
    assert same(reference, ", ".join(reversed(texts)))
    assert same(point, f"\\left({', '.join(texts)}\\right)")
    assert same(point, f"({','.join(reversed(texts))})") == (values == values[::-1])
    for i, value in enumerate(values):
        less = texts[:i] + texts[i + 1 :]
        more = [*texts, latex(value)]
        for changed in (latex(value + 1), latex(value + Fraction(1, 7)), latex(-value) if value else "1"):
            other = [*texts[:i], changed, *texts[i + 1 :]]
            for wrong in (less, more, other):
                assert not same(reference, ", ".join(wrong)), wrong
                assert not same(point, f"({','.join(wrong)})"), wrong


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=3), st.integers(2, 5))
@example([7, 6], 2)
@example([12, 10], 2)
def test_ratios_and_times_are_equal_part_by_part(parts, factor):
    reference = ":".join(map(str, parts))
    assert same(reference, " : ".join(map(str, parts)))
    changed = [":".join(str(factor * part) for part in parts), reference + ":1", *map(str, parts), f"{parts[0]}/{parts[1]}"]
    changed += [":".join(str(part + (i == j)) for j, part in enumerate(parts)) for i in range(len(parts))]
    if parts != parts[::-1]:
        changed.append(":".join(map(str, parts[::-1])))
    for wrong in changed:
        assert not same(reference, wrong), wrong
        assert not same(wrong, reference) or ":" not in wrong


@settings(deadline=None, max_examples=100)
@given(st.dates(), st.dates(), st.sampled_from(["%Y-%m-%d", "%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%B %d, %Y", "%d %B %Y"]))
def test_dates_are_equal_as_texts_only(one, other, form):
    a, b = one.strftime(form), other.strftime(form)
    assert same(a, f"\\text{{{a}}}")
    assert same(a, b) == (a == b)
    for part in (one.strftime("%Y"), one.strftime("%d"), one.strftime("%m"), str(one.year - one.month - one.day)):
        assert not same(a, part)


@settings(deadline=None, max_examples=150)
@given(NUMBERS, NUMBERS)
def test_numbers_are_equal_exactly_where_they_are(a, b):
    assert same(str(a), latex(a))
    assume(a != b)
    assert not same(str(a), latex(b))
    assert not same(latex(a), str(b))


# -------------------------------------------------------------------------------------------------- where a response claims it


@pytest.mark.parametrize(
    ("text", "claim"),
    [
        ("so \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"), ("\\boxed{1} no \\boxed{2}", "2"), ("\\boxed{1} no \\boxed{2", ""), ("\\boxed{}", ""), ("\\boxed{1} \\quad \\text{and} \\quad \\boxed{2}", "1, 2"),
        ("\\boxed{1}\n#### 7 apples\nDone.", "7 apples"), ("####", ""), ("", ""), ("I do not know.", ""), ("it is 18", "18"), ("the answer is 5.", "5"),
        ("it is 5 oranges", "5"), ("it is 12:10", ""), ("it is 5 million", ""), ("it is 5-10", "5-10"), ("it is -1,-9", ""), ("it is 5!", ""),
        ("it is 5 \\text{ million}", ""),
    ],
)  # fmt: skip
def test_the_claim_of_a_response_by_hand(text, claim):
    assert claimed(text) == claim


def test_an_answer_cut_out_of_a_longer_one_is_none():
    for reference, text in [
        ("3.3", "it is 3.3e-10"),
        ("12", "at 12:10"),
        ("5", "it is 5 million"),
        ("-1", "they are -1,-9"),
        ("5", "5-10"),
    ]:
        assert verify_math(reference, [], text) == -1.0
    assert verify_math("3.3e-10", [], "the answer is 3.3e-10") == 1.0
    assert grade("12", [], "at 12:10") == NO_ANSWER


@pytest.mark.parametrize("reference", ["", "####", "...", "\\boxed{}", "We show that the sum of the angles is even because " * 3])
def test_a_reference_that_no_response_can_match_is_an_error(reference):
    with pytest.raises(ValueError, match="reference answer"):
        verify_math(reference, [], wrap_reference(reference))


def test_the_reference_is_read_from_its_box_its_mark_or_whole():
    assert final_answer("a \\boxed{1} b \\boxed{\\sqrt{2}} c") == "\\sqrt{2}"
    assert final_answer("a\n#### 1,234 ") == "1,234"
    assert final_answer(" 7 ") == "7"
    assert (
        final_answer("There are several steps here that nobody wants to read again, and at the end of them we have $x = 28$.")
        == "x = 28"
    )


def test_whole_numbers_of_41_digits_that_differ_by_one_are_two_numbers():
    number = 10**40 + 7
    assert same(str(number), str(number))
    assert not same(str(number), str(number + 1))
