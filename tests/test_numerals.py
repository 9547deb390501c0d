"""Numbers in answers: the table of the grammar, what people and models write, and what must never be taken for another number."""

import re
import time
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from tppo_ref.tasks import numerals
from tppo_ref.tasks.jsonl import verify
from tppo_ref.tasks.numerals import read_numeral

ROWS = re.findall(r"^    `(.+?)` +(none|[-\d./]+)", numerals.__doc__, flags=re.M)


def test_the_table_is_read_whole():
    assert len(ROWS) == len(re.findall(r"^    `", numerals.__doc__, flags=re.M)) > 40


@pytest.mark.parametrize(("text", "number"), ROWS, ids=[text for text, _ in ROWS])
def test_the_table_of_the_docstring_says_what_is_read(text, number):
    numeral = read_numeral(text)
    assert numeral is None if number == "none" else numeral is not None and numeral.value == Fraction(number)


# ------------------------------------------------------------------------------------- written and read back


def grouped(digits: str, separator: str) -> str:
    """1234567 -> 1,234,567."""
    head = len(digits) % 3 or 3
    return separator.join([digits[:head], *(digits[i : i + 3] for i in range(head, len(digits), 3))])


SEPARATORS = ["", ",", " ", "\u00a0", "\u2009", "\u202f", "'", "’"]
MINUS = ["-", "−", "–"]
SUPERSCRIPT = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


@st.composite
def decimals(draw):
    """(number, a text of it in any admitted way)."""
    digits, places = draw(st.integers(0, 10**15)), draw(st.integers(0, 6))
    negative = draw(st.booleans())
    whole, part = divmod(digits, 10**places)
    text = grouped(str(whole), draw(st.sampled_from(SEPARATORS)))
    if places:
        text += f".{part:0{places}d}" + "0" * draw(st.integers(0, 3))
        if whole == 0 and draw(st.booleans()):
            text = text.removeprefix("0")
    value = Fraction(digits, 10**places)
    power = draw(st.none() | st.integers(-30, 40))
    if power is not None:
        value *= Fraction(10) ** power
        sign = "−" if draw(st.booleans()) and power < 0 else ""
        written = f"{sign}{abs(power)}" if sign else str(power)
        text += draw(st.sampled_from([
            f"e{written}", f"E{written}", f" x 10^{written}", f"×10^{written}", f" * 10**{written}", f"·10{str(power).translate(SUPERSCRIPT)}",
            f" \\times 10^{{{written}}}", f"\\cdot 10^{{{written}}}",
        ]))  # fmt: skip
    sign = draw(st.sampled_from(MINUS)) if negative else draw(st.sampled_from(["", "+"]))
    money = draw(st.sampled_from(["", "", "$", "€", "£"]))
    text = draw(st.sampled_from([f"{sign}{money}{text}", f"{money}{sign}{text}" if money and sign else f"{sign}{money}{text}"]))
    if not money:
        text += draw(st.sampled_from(["", "", "%", " €", " dollars", " red apples"]))
    return (-value if negative else value), text + draw(st.sampled_from(["", ".", " "]))


@st.composite
def fractions(draw):
    above, below, negative = draw(st.integers(0, 10**6)), draw(st.integers(1, 10**6)), draw(st.booleans())
    sign = draw(st.sampled_from(MINUS)) if negative else ""
    return (-1 if negative else 1) * Fraction(above, below), f"{sign}{above}/{below}"


@settings(max_examples=400)
@given(decimals() | fractions())
@example((Fraction(-5), "−5"))
@example((Fraction(-5), "-$5"))
@example((Fraction(1000), "1 000"))
@example((Fraction(1000), "1e3"))
def test_a_number_written_in_any_admitted_way_is_read_back(case):
    value, text = case
    numeral = read_numeral(text)
    assert numeral is not None
    assert numeral.value == value
    assert verify(f"work\n#### {text}", [], f"#### {text}") == 1.0


@settings(max_examples=400)
@given(decimals() | fractions(), decimals() | fractions())
def test_two_texts_are_the_same_exactly_where_their_numbers_are(one, other):
    (a, first), (b, second) = one, other
    same = read_numeral(first).same(read_numeral(second))
    assert same or a != b or read_numeral(first).unit != read_numeral(second).unit
    assert not same or a == b
    if a != b:
        assert verify(f"#### {first}", [], f"#### {second}") == -1.0


@given(decimals() | fractions(), st.data())
def test_a_changed_digit_is_another_number(case, data):
    _, text = case
    place = data.draw(st.sampled_from([i for i, c in enumerate(text) if c in "0123456789"]))
    other = data.draw(st.sampled_from([c for c in "0123456789" if c != text[place]]))
    changed = text[:place] + other + text[place + 1 :]
    numeral = read_numeral(changed)
    assume(numeral is None or numeral.value != read_numeral(text).value)  # 0.00e5, 0/7
    assert verify(f"#### {text}", [], f"#### {changed}") == -1.0


@given(st.text(max_size=30), st.text(max_size=30))
@example("5-10", "-10")
@example("1 000", "0")
@example("1/2", "3/2")
@example("1e3", "3")
def test_whatever_two_texts_are_they_are_equal_only_as_text_or_as_numbers(one, other):
    reference = one.replace("#", "").strip().partition("\n")[0].strip()
    assume(reference)
    right = verify(f"#### {reference}", [], f"#### {other}") == 1.0
    a, b = read_numeral(reference), read_numeral(other.rpartition("####")[2].strip().partition("\n")[0])
    assert right == (other.rpartition("####")[2].strip().partition("\n")[0].strip() == reference or bool(a and b and a.same(b)))


# ----------------------------------------------------------------------------------------------------- found by a hostile reading


@pytest.mark.parametrize(
    ("answer", "response", "score"),
    [
        ("#### -5", "#### −5", 1.0), ("#### 5", "#### −5", -1.0), ("#### −5", "#### -5", 1.0), ("#### -5", "#### -$5", 1.0),
        ("#### 5", "#### -$5", -1.0), ("#### 3/2", "#### 1/2", -1.0), ("#### 0.5", "#### 1/2", 1.0), ("#### 2", "#### 1/2", -1.0),
        ("#### 3", "#### 1e3", -1.0), ("#### 1000", "#### 1e3", 1.0), ("#### 0", "#### 1 000", -1.0), ("#### 1000", "#### 1 000", 1.0),
        ("#### -10", "#### 5-10", -1.0), ("#### 5", "#### 5-10", -1.0), ("#### 5-10", "#### 5-10", 1.0), ("#### 10", "#### 5 to 10", -1.0),
        # GSM8K takes the number behind the mark, not the last one of the text
        ("#### 72", "#### 72\nThat is for 3 people.", 1.0), ("#### 3", "#### 72\nThat is for 3 people.", -1.0), ("#### 72", "#### 72 eggs", 1.0),
        ("#### 5", "#### 5 million", -1.0), ("#### 5", "#### 5 dozen", -1.0), ("#### 5", "#### 5 and a half", -1.0),
        ("#### 25", "#### 25%", 1.0), ("#### 0.25", "#### 25%", -1.0), ("#### 5 apples", "#### 5 pears", -1.0), ("#### $5", "#### €5", -1.0),
        ("It is east.\n#### east", "#### east", 1.0), ("#### east", "#### seat", -1.0), ("#### 12:10", "#### 12:10", 1.0),
        ("#### 12:10", "#### 12", -1.0), ("7", "7.0", 1.0), ("1000", "1,000", 1.0), ("1e+22", "10000000000000000000000", 1.0), ("7", "8", -1.0),
    ],
)  # fmt: skip
def test_what_the_hostile_reading_found(answer, response, score):
    assert verify(answer, [], response) == score


def test_a_reference_with_nothing_behind_its_mark_is_an_error():
    with pytest.raises(ValueError, match="nothing behind its ####"):
        verify("work\n#### \n", [], "####")


@pytest.mark.parametrize("length", [5_000, 1_000_000])
def test_long_numbers_are_compared_digit_by_digit_and_at_once(length):
    digits = "7" * length
    begin_s = time.process_time()
    assert verify(f"#### {digits}", [], f"#### {digits}.0") == 1.0
    assert verify(f"#### {digits}", [], f"#### {digits[:-1]}8") == -1.0
    assert verify("#### 1/3", [], f"#### 0.{digits}") == -1.0
    assert verify("#### 1", [], "#### 1e999999") == -1.0
    assert verify(f"#### {digits}/3", [], f"#### {digits}/3") == 1.0  # as texts: too long for a fraction
    assert time.process_time() - begin_s < 30.0  # a quadratic reading takes hours


@pytest.mark.parametrize(
    "text", ["1 " * 50_000, "1" + ",000" * 50_000 + "x", "5" + " abc" * 50_000, "-" * 100_000, "1/" * 50_000, "9" * 10**6 + "x"]
)
def test_no_text_holds_the_reader(text):
    begin_s = time.process_time()
    assert read_numeral(text) is None
    assert time.process_time() - begin_s < 10.0


def test_values_are_exact():
    assert read_numeral("0.1").value == Fraction(1, 10) == Decimal("0.1")
    assert read_numeral("9007199254740993").value != read_numeral("9007199254740992").value
