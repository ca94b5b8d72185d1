"""A report for a person: the verdict first, then what was decided, the bytes of every phase, and what else was tried."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from burnish.plan.cost import in_words
from burnish.plan.report import Report, change_in_words, enough_in_words
from burnish.words import counted, gb

SHOWN = 6
"""Of the candidates that do not fit, and of those that do but are slower."""


def render(report: Report) -> RenderableType:
    """The verdict and three tables."""
    return Group(*_verdict(report), Text(), _decisions(report), Text(), _phases(report), Text(), *_candidates(report))


def _verdict(report: Report) -> list[Text]:
    warnings = [Text(f"May not fit: {warning}", style="yellow") for warning in report.warnings]
    if report.fits:
        start = f" The first step comes {in_words(report.start.download + report.start.first)} after the start." if report.start else ""
        return [Text(f"It fits: the training step leaves {gb(report.spare_bytes)} to spare.{start}", style="green"), *warnings]
    problems = [Text(f"Does not fit: {problem}", style="red") for problem in report.problems]
    smallest = report.smallest_change
    if smallest is not None:
        problems.append(Text(f"The smallest change that makes it fit: {change_in_words(smallest)}", style="bold"))
    elif report.changes:
        problems.append(Text("None of these changes makes it fit:", style="bold"))
    elif any(need.place != "disk" for need in report.needs):
        problems.append(Text("No change of its settings makes it fit, or comes clearly closer.", style="bold"))
    others = [Text(f"  {change_in_words(change)}") for change in report.changes if change is not smallest]
    return [*problems, *others, Text(f"{enough_in_words(report)}."), *warnings]


def _decisions(report: Report) -> Table:
    table = Table.grid(padding=(0, 2))
    for decision in report.decisions:
        table.add_row(decision.name, Text(decision.value, style="bold"), Text(decision.reason, style="dim"))
    return table


def _phases(report: Report) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("phase", "where", "needs", "of", "most of it"):
        table.add_column(title, justify="right" if title in ("needs", "of") else "left")
    for phase in report.phases:
        largest = sorted(phase.parts, key=lambda part: -part.bytes)[:3]
        style = "" if phase.fits else "red" if phase.required else "yellow"
        most = ", ".join(f"{part.name} {gb(part.bytes)}" for part in largest if part.bytes)
        table.add_row(phase.name, phase.place, gb(phase.bytes), gb(phase.limit_bytes), Text(most, style="dim"), style=style)
    return table


def _candidates(report: Report) -> list[RenderableType]:
    """What else there was, but where there was no choice."""
    others = report.candidates[1:]
    unfit = [one for one in others if one.measured and not one.fits]
    slower = [one for one in others if one.fits]
    if not others:
        return []
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("also tried", "a step", ""):
        table.add_column(title, justify="right" if title == "a step" else "left")
    shown = (*unfit[:SHOWN], *slower[:SHOWN])
    for one in shown:
        table.add_row(one.plan, in_words(one.step_seconds), Text(one.verdict, style="dim"))
    more = len(others) - len(shown)
    which = f"and {more} more, most of them slower" if shown else f"{counted(more, 'other way', 'other ways')}, slower by estimate"
    rest = Text(f"{which}: `burnish plan --json` lists them", style="dim")
    return [*([table] if shown else []), *([rest] if more else [])]
