"""Numbers in answers, read where they can mean one thing only; whatever else a text may be, it is no number.

A numeral is a number and the unit beside it. Two numerals are the same where the numbers are equal, exactly, and the units are
too, or one has none. What the grammar takes, and what it leaves alone (a test holds this table):

    text                        number          note
    `72`                        72
    `072`                       72
    `7.50`                      7.5
    `.5`                        0.5
    `72.`                       72              the full stop of a sentence
    `+72`                       72
    `-72`                       -72
    `−72`                       -72             the minus sign of Unicode; a dash (–) before a digit reads alike
    `- 72`                      none            a list's mark, perhaps
    `1,000`                     1000
    `1 000 000`                 1000000         spaces of any width, the same separator throughout
    `1'000.5`                   1000.5          also with a typographic apostrophe
    `1,00`                      none            groups have three digits: a list, or a decimal comma
    `1.000,5`                   none
    `0,125`                     none            a first group of 0 is a decimal comma
    `1 000,000`                 none
    `1.5e3`                     1500            also E; at most six digits of exponent
    `3.3e-10`                   0.00000000033
    `3 x 10^3`                  3000            x, ×, *, ·, \\times or \\cdot; ^, ** or superscripts, ^{3}
    `3×10⁻²`                    0.03
    `10^3`                      none
    `3/4`                       3/4             whole numbers above a positive whole number, of at most 1,000 digits each
    `-6/8`                      -3/4
    `3/0`                       none
    `1 3/4`                     none
    `3/4/2024`                  none
    `$5`                        5               $ € £ ¥ ₹, before or behind; the sign is the unit
    `-$5`                       -5
    `$-5`                       -5
    `-$-5`                      none
    `25%`                       25              a unit as others are: 25% is not 0.25
    `72 red apples`             72              up to four words of three letters or more are a unit
    `5 million`                 none            but no word that counts or calculates: million, dozen, half, or, times, two, ...
    `72 or 73`                  none
    `5cm`                       none            it might be a product, as 5ab
    `5-10`                      none            a range; it is neither -10 nor -5
    `5 - 10`                    none
    `12:10`                     none
    `2015-03-14`                none
    `5!`                        none
    `nan`                       none
    `inf`                       none
    `٣`                         none            digits are 0 to 9
"""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

MAX_FRACTION_DIGITS = 1000

COUNTING_WORD = re.compile(
    r"(?:zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\w+teen|twenty|thirty|forty|fifty|sixty|seventy|eighty"
    r"|ninety|hundred|thousand|\w*illion|mil|lakh|crore|dozen|gross|half|halves|third|quarter|fourth|fifth|sixth|seventh|eighth|ninth"
    r"|tenth|hundredth|thousandth|and|or|to|not|plus|minus|negative|times|squared|cubed|factorial|over|divided|point|root)s?",
    re.IGNORECASE,
)
"""A word beside a number that may make another number of it."""

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SIGN = "[-+−–]"
_CURRENCY = r"\\?\$|[€£¥₹]"
_WORD = r"[^\W\d_]{3,}"
_NUMERAL = re.compile(
    rf"""(?: (?P<sign>{_SIGN})?(?:(?P<before>{_CURRENCY})[ ]?)? | (?P<before2>{_CURRENCY})(?P<sign2>{_SIGN}) )
         (?: (?P<above>[0-9]+)/(?P<below>[0-9]+)
           | (?: (?P<whole>[1-9][0-9]{{0,2}}(?P<separator>[ ,'’])[0-9]{{3}}(?:(?P=separator)[0-9]{{3}})*|[0-9]+)
                 (?:\.(?P<part>[0-9]+))?
               | \.(?P<bare_part>[0-9]+) )
             (?: [eE](?P<e>[-+−]?[0-9]{{1,6}})
               | [ ]?(?:[x×*·]|\\times|\\cdot)[ ]?10(?:
                   (?:\^|\*\*)(?:(?P<power>[-+−]?[0-9]{{1,6}})|\{{(?P<braced>[-+−]?[0-9]{{1,6}})\}})
                 | (?P<superscript>[⁻⁺]?[⁰¹²³⁴⁵⁶⁷⁸⁹]{{1,6}}) ) )? )
         (?: [ ]?(?P<behind>\\?%|{_CURRENCY}) )?
         (?P<words>(?:[ ]{_WORD}(?:/[^\W\d_]+)?){{0,4}})
         \.?""",
    re.VERBOSE,
)


class Numeral(NamedTuple):
    """A number, exactly, and the unit that stood beside it ("" for none)."""

    value: Decimal | Fraction
    unit: str

    def same(self, other: Numeral) -> bool:
        """Whether both are the same number, and not of two different units."""
        return self.value == other.value and (self.unit == other.unit or not (self.unit and other.unit))


def read_numeral(text: str) -> Numeral | None:
    """The numeral that `text` is, the whole of it, by the table above; None where it is none.

    Takes time linear in the text, and any number of digits.
    """
    match = _NUMERAL.fullmatch(" ".join(text.split()))
    if match is None:
        return None
    got = match.groupdict(default="")
    words = got["words"].lower().split()
    if any(COUNTING_WORD.fullmatch(part) for word in words for part in word.split("/")):
        return None
    unit = " ".join(dict.fromkeys(filter(None, [got["before"] + got["before2"], got["behind"], *words]))).replace("\\", "")
    sign = "-" if got["sign"] + got["sign2"] in ("-", "−", "–") else ""
    if got["above"]:
        if max(len(got["above"]), len(got["below"])) > MAX_FRACTION_DIGITS or not int(got["below"]):
            return None
        return Numeral(Fraction(int(sign + got["above"]), int(got["below"])), unit)
    whole = got["whole"].replace(got["separator"], "") if got["separator"] else got["whole"]
    exponent = (got["e"] + got["power"] + got["braced"] + got["superscript"]).translate(_SUPERSCRIPTS).replace("−", "-")
    return Numeral(Decimal(f"{sign}{whole or '0'}.{got['part'] + got['bare_part'] or '0'}e{exponent or '0'}"), unit)


__all__ = ["COUNTING_WORD", "Numeral", "read_numeral"]
