"""The report of an evaluation, for a person to read."""

from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from burnish.errors import UserError
from burnish.evaluate.compare import KIND
from burnish.runs import check_kind, read_json
from burnish.words import counted


class Shown(NamedTuple):
    """How a measure is written: its name, a factor, digits after the point, and the sign of a change for the better."""

    title: str
    factor: float
    digits: int
    better: int


TITLES = {
    "unseen_wording": "unseen wording: facts that were trained, questions that were not",
    "unseen_section": "unseen section: nothing of it was trained",
    "general": "general rows: the training is not about them; what their loss rises by was forgotten",
}
MEASURES: dict[str, Shown] = {
    "loss": Shown("loss per token", 1, 3, better=-1),
    "exact_match": Shown("exact match, %", 100, 1, better=1),
    "number_match": Shown("same number, %", 100, 1, better=1),
    "overlap": Shown("word overlap, %", 100, 1, better=1),
}


def read(folder: Path) -> dict[str, Any]:
    """What `compare.write` wrote, without the answers. Raises a `UserError` where it is missing, damaged or newer than this burnish."""
    path = folder / "report.json"
    if not path.exists():
        raise UserError(f"{folder} holds no report.json. Run the evaluation again.")
    report = read_json(path)
    check_kind(path, report.get("burnish"), KIND)
    return report


def render(report: dict[str, Any]) -> RenderableType:
    """A table for each set: measure, base, tuned and difference with their 95 % intervals, and what the difference says in words."""
    return Group(*(_table(name, members) for name, members in report["sets"].items()))


def _table(name: str, members: dict[str, Any]) -> RenderableType:
    table = Table(title=TITLES[name], title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    for column in ("", "base", "tuned", "difference"):
        table.add_column(column, no_wrap=True)
    for measure, values in members["measures"].items():
        shown = MEASURES[measure]
        base, tuned = (_cell(values[which], shown) for which in ("base", "tuned"))
        table.add_row(shown.title, base, tuned, f"{_cell(values['difference'], shown, '+')}\n{verdict(values, shown.better)}")
    return Group(table, Text(_footnote(members), style="dim"), Text(""))


def verdict(values: dict[str, Any], better: int) -> str:
    """Whether the difference lies clear of zero, in words; of fewer than `FEWEST` rows or facts nobody can tell.

    `better` is the sign of a change for the better.
    """
    if values["clear_of_zero"] is None:
        return "too few to tell"
    if not values["clear_of_zero"]:
        return "not clear of 0" if values["difference"]["high"] > values["difference"]["low"] else "no difference"
    return "better: clear of 0" if values["difference"]["value"] * better > 0 else "worse: clear of 0"


def _cell(interval: dict[str, float], shown: Shown, sign: str = "") -> str:
    value, low, high = (f"{interval[part] * shown.factor:{sign}.{shown.digits}f}" for part in ("value", "low", "high"))
    return f"{value}\n[{low}, {high}]"


def _footnote(members: dict[str, Any]) -> str:
    rows, units = members["rows"], members["units"]
    drawn = counted(rows, "row") if rows == units else f"{counted(rows, 'row')} about {counted(units, 'fact')}, drawn by fact"
    return f"{drawn}. Loss in nats; [95 % interval, bootstrap]; the difference is tuned − base on the same rows."
