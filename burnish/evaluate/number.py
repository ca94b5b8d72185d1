"""The last number of an answer: how sums that are worked out in words are marked."""

import re
from fractions import Fraction
from typing import NamedTuple

from burnish.evaluate.text import exact_match


class Number(NamedTuple):
    """What a text says in numbers: one value, or the two of a ratio."""

    values: tuple[Fraction, ...]
    currency: str | None = None


_CURRENCIES = "$€£¥₹"
_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d|,\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
_NUMBER = re.compile(
    rf"(?:(?<![\w)%.,])(?P<minus>-))?"  # after a word or a number it is a hyphen, or subtracts: there is no -5 in 3-5
    rf"(?P<currency>[{_CURRENCIES}])?(?:(?<=[{_CURRENCIES}])(?P<inner>-))?"
    rf"(?P<digits>{_DIGITS}(?:[:/]{_DIGITS})*)"
)
_BETWEEN = re.compile(r"[:/]")


def last_number(text: str) -> Number | None:
    """The last number of a text, or None where it has none.

    Thousands commas, currency signs, percent signs and a minus are understood; `3/4` is the fraction, `3:4` a ratio (or a time), whose
    two parts are compared as they stand. Of three or more, as in the date 3/4/2024, the last counts.
    """
    every = list(_NUMBER.finditer(text.replace("−", "-")))
    if not every:
        return None
    found = every[-1]
    sign = -1 if found["minus"] or found["inner"] else 1
    values = [Fraction(digits.replace(",", "")) for digits in _BETWEEN.split(found["digits"])]
    if len(values) == 2 and ":" in found["digits"]:
        return Number((sign * values[0], values[1]), found["currency"])
    if len(values) == 2 and values[1]:
        return Number((sign * values[0] / values[1],), found["currency"])
    return Number((values[-1] * (sign if len(values) == 1 else 1),), found["currency"])


def number_match(answer: str, truth: str) -> bool:
    """Whether the last numbers of both are equal as numbers: 5.0 is 5, $1,200 is 1200, 50% is 50. Two different currencies differ.

    A truth without a number is compared by its words. An answer without one is wrong where the truth has one.
    """
    wanted, said = last_number(truth), last_number(answer)
    if wanted is None:
        return exact_match(answer, truth)
    if said is None or said.values != wanted.values:
        return False
    return None in (said.currency, wanted.currency) or said.currency == wanted.currency
