"""What was planned, for a person: bytes of every phase, why each decision was made, what does not fit and what would."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from burnish.config import Plan
from burnish.errors import UserError
from burnish.plan.machine import Machine
from burnish.words import gb

KIND = "plan/1"


@dataclass(frozen=True)
class Part:
    """Some of the bytes of a phase."""

    name: str
    bytes: int
    exact: bool = False
    """Counted from what will be there; otherwise an estimate."""


@dataclass(frozen=True)
class Phase:
    """What one process needs at a time, in one place."""

    name: str
    place: str
    """`GPU`, `memory` (of the host) or `disk`."""
    parts: tuple[Part, ...]
    limit_bytes: int
    """What there is for one process."""
    required: bool = True
    """Whether the run is refused where this does not fit; otherwise it is only said."""
    way_out: str = ""
    """What to do where it does not fit, if that is not what training needs too."""

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def fits(self) -> bool:
        return self.bytes <= self.limit_bytes


@dataclass(frozen=True)
class Decision:
    """`name`: `value`, because `reason`."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Change:
    """Settings that are changed from what was planned, and what the phase that needs most of its limit would then need."""

    settings: str
    bytes: int
    limit_bytes: int
    fits: bool


@dataclass(frozen=True)
class Report:
    """A plan with its reasons. `changes` are tried only where it does not fit."""

    machine: Machine
    plan: Plan
    decisions: tuple[Decision, ...]
    phases: tuple[Phase, ...]
    changes: tuple[Change, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether every phase fits that the run cannot do without."""
        return all(phase.fits for phase in self.phases if phase.required)

    @property
    def spare_bytes(self) -> int:
        """What the training step leaves of its device; negative where it does not fit."""
        step = next(phase for phase in self.phases if phase.name == "train step")
        return step.limit_bytes - step.bytes

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each phase that does not fit."""
        return tuple(_problem(phase) for phase in self.phases if not phase.fits and phase.required)

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line for each phase that may not fit, and that the run can do without."""
        return tuple(_problem(phase) for phase in self.phases if not phase.fits and not phase.required)


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain JSON values, with its sums."""
    values = asdict(report) | {"burnish": KIND, "fits": report.fits, "spare_bytes": report.spare_bytes}
    for phase, entry in zip(report.phases, values["phases"], strict=True):
        entry |= {"bytes": phase.bytes, "fits": phase.fits}
    return values | {"problems": list(report.problems), "warnings": list(report.warnings)}


def refuse_unless_fits(report: Report, anyway: bool) -> None:
    """Raises a `UserError` with what does not fit and what would, unless the user wants to try."""
    if report.fits or anyway:
        return
    lines = ["this run does not fit:", *(f"  {problem}" for problem in report.problems)]
    if report.changes:
        lines += ["what else was planned:", *(f"  {_change(change)}" for change in report.changes)]
    fitting = "Set what fits" if any(change.fits for change in report.changes) else "Take a smaller model, or more memory"
    raise UserError("\n".join([*lines, f"{fitting}; or run as it is with plan.anyway=true: estimates are upper bounds."]))


def render(report: Report) -> RenderableType:
    """A table of decisions and one of bytes, and the verdict."""
    decisions = Table.grid(padding=(0, 2))
    for decision in report.decisions:
        decisions.add_row(decision.name, Text(decision.value, style="bold"), Text(decision.reason, style="dim"))
    bytes_table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for title in ("phase", "where", "needs", "of", "most of it"):
        bytes_table.add_column(title, justify="right" if title in ("needs", "of") else "left")
    for phase in report.phases:
        largest = sorted(phase.parts, key=lambda part: -part.bytes)[:3]
        style = "" if phase.fits else "red" if phase.required else "yellow"
        most = ", ".join(f"{part.name} {gb(part.bytes)}" for part in largest if part.bytes)
        bytes_table.add_row(phase.name, phase.place, gb(phase.bytes), gb(phase.limit_bytes), Text(most, style="dim"), style=style)
    return Group(decisions, Text(), bytes_table, Text(), *_verdict(report))


def _verdict(report: Report) -> list[Text]:
    warnings = [Text(f"May not fit: {warning}", style="yellow") for warning in report.warnings]
    if report.fits:
        return [Text(f"It fits: the training step leaves {gb(report.spare_bytes)} to spare.", style="green"), *warnings]
    changes = [Text(f"  {_change(change)}") for change in report.changes]
    return [*(Text(f"Does not fit: {problem}", style="red") for problem in report.problems), *changes, *warnings]


def _problem(phase: Phase) -> str:
    largest = max(phase.parts, key=lambda part: part.bytes)
    needs = f"{phase.name}: {gb(phase.bytes)} of {gb(phase.limit_bytes)} {phase.place}; most of it {largest.name} ({gb(largest.bytes)})."
    return f"{needs} {phase.way_out}".rstrip()


def _change(change: Change) -> str:
    return f"{change.settings}: {gb(change.bytes)} of {gb(change.limit_bytes)}, {'fits' if change.fits else 'does not fit'}."
