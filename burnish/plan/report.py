"""What was planned: bytes of every phase, why each decision was made, what does not fit and what would. `render.py` shows it."""

from dataclasses import asdict, dataclass
from typing import Any

from burnish.config import Plan
from burnish.errors import UserError
from burnish.plan.cost import Start, Step
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
    """What one process needs at a time, in one place; what all of a machine do, while one of them saves."""

    name: str
    place: str
    """`GPU`, `memory` (of the host) or `disk`."""
    parts: tuple[Part, ...]
    limit_bytes: int
    """What there is for it."""
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
class Candidate:
    """A way to run it that was tried, with the estimated seconds of a step, and whether it fits or why not."""

    plan: str
    step_seconds: float
    verdict: str
    fits: bool | None
    """None where it was not measured."""
    measured: bool
    """Those that are slower than one that fits are not."""


@dataclass(frozen=True)
class Report:
    """A plan with its reasons. `changes` are tried only where it does not fit."""

    machine: Machine
    plan: Plan
    decisions: tuple[Decision, ...]
    phases: tuple[Phase, ...]
    changes: tuple[Change, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    """The chosen one first."""
    step: Step | None = None
    start: Start | None = None

    @property
    def smallest_change(self) -> Change | None:
        """The first that makes it fit."""
        return next((change for change in self.changes if change.fits), None)

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
        lines += ["what else was planned:", *(f"  {change_in_words(change)}" for change in report.changes)]
    fitting = "Set what fits" if any(change.fits for change in report.changes) else "Take a smaller model, or more memory"
    raise UserError("\n".join([*lines, f"{fitting}; or run as it is with plan.anyway=true: estimates are upper bounds."]))


def _problem(phase: Phase) -> str:
    largest = max(phase.parts, key=lambda part: part.bytes)
    needs = f"{phase.name}: {gb(phase.bytes)} of {gb(phase.limit_bytes)} {phase.place}; most of it {largest.name} ({gb(largest.bytes)})."
    return f"{needs} {phase.way_out}".rstrip()


def change_in_words(change: Change) -> str:
    return f"{change.settings}: {gb(change.bytes)} of {gb(change.limit_bytes)}, {'fits' if change.fits else 'does not fit'}."
