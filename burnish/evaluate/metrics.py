"""When an answer is right. A new way to tell is one row here, one choice of `evaluate.metric`, and one name in report.py's MEASURES."""

from collections.abc import Callable
from typing import NamedTuple

from burnish.evaluate.number import number_match
from burnish.evaluate.text import exact_match


class Metric(NamedTuple):
    """`measure` is its name in reports; `right` of (answer, truth) is true or false."""

    measure: str
    right: Callable[[str, str], float]


METRICS: dict[str, Metric] = {"exact": Metric("exact_match", exact_match), "number": Metric("number_match", number_match)}
