"""What was planned: bytes of every phase, why each decision was made, what does not fit and what would. `render.py` shows it."""

from dataclasses import asdict, dataclass
from typing import Any

from burnish.config import Plan
from burnish.errors import UserError
from burnish.plan.cost import Start, Step
from burnish.plan.machine import Machine
from burnish.words import gb, gb_enough, gb_of

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
    processes: int = 1
    """Of one machine, that each need so much of that place; the limit is the share of one."""

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    @property
    def fits(self) -> bool:
        return self.bytes <= self.limit_bytes

    @property
    def share(self) -> float:
        """Of its limit: above 1 where it does not fit."""
        return self.bytes / self.limit_bytes if self.limit_bytes else float("inf")


@dataclass(frozen=True)
class Decision:
    """`name`: `value`, because `reason`."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Need:
    """What a machine would have to have in one place, for all phases that a run cannot do without; it has less."""

    place: str
    bytes: int
    """Of one GPU; of the memory or the disk of the whole machine."""


@dataclass(frozen=True)
class Change:
    """Settings that are changed from what was planned, and what the phase that needs most of its limit would then need."""

    settings: str
    tight: Phase
    needs: tuple[Need, ...] = ()
    """What would be enough for it, where it does not fit."""
    later: tuple[Phase, ...] = ()
    """What comes after training and would not fit, where that does."""

    @property
    def bytes(self) -> int:
        return self.tight.bytes

    @property
    def fits(self) -> bool:
        return self.tight.fits


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
    instead: tuple[Need, ...] = ()
    """Host memory with which it would fit as it was asked, where GPUs are too small for the plan that comes closest."""

    @property
    def smallest_change(self) -> Change | None:
        """The first that makes it fit."""
        return next((change for change in self.changes if change.fits), None)

    @property
    def fits(self) -> bool:
        """Whether every phase fits that the run cannot do without."""
        return all(phase.fits for phase in self.phases if phase.required)

    @property
    def needs(self) -> tuple[Need, ...]:
        """What would be enough for it as it was asked, where it does not fit."""
        return needs(self.phases)

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
        """One line for each phase that may not fit, and for which the run is not refused."""
        return tuple(_problem(phase) for phase in self.phases if not phase.fits and not phase.required)


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain JSON values, with its sums."""
    values = asdict(report) | {"burnish": KIND, "fits": report.fits, "spare_bytes": report.spare_bytes}
    for phase, entry in zip(report.phases, values["phases"], strict=True):
        entry |= {"bytes": phase.bytes, "fits": phase.fits}
    values["changes"] = [_change_as_json(change) for change in report.changes]
    return values | {"problems": list(report.problems), "warnings": list(report.warnings), "needs": [asdict(need) for need in report.needs]}


def _change_as_json(change: Change) -> dict[str, Any]:
    tight = change.tight
    of = {"phase": tight.name, "place": tight.place, "bytes": tight.bytes, "limit_bytes": tight.limit_bytes}
    needed, later = [asdict(need) for need in change.needs], [_problem(phase) for phase in change.later]
    return {"settings": change.settings, **of, "fits": change.fits, "needs": needed, "warnings": later}


def needs(phases: tuple[Phase, ...]) -> tuple[Need, ...]:
    """What the machine has too little of, and how much would be enough: the most that a required phase needs there."""
    most: dict[str, int] = {}
    for phase in phases:
        if phase.required and not phase.fits:
            most[phase.place] = max(most.get(phase.place, 0), phase.bytes * phase.processes)
    return tuple(Need(place, count) for place, count in most.items())


def refuse_unless_fits(report: Report, anyway: bool) -> None:
    """Raises a `UserError` with what does not fit and what would, unless the user wants to try."""
    if report.fits or anyway:
        return
    lines = ["this run does not fit:", *(f"  {problem}" for problem in report.problems)]
    if report.changes:
        lines += ["what else was planned:", *(f"  {change_in_words(change)}" for change in report.changes)]
    fitting = "Set what fits" if report.smallest_change else "Take a smaller model, or more of what is short"
    lines += [f"{enough_in_words(report)}.", f"{fitting}; or run as it is with plan.anyway=true: estimates are upper bounds."]
    raise UserError("\n".join(lines))


def _problem(phase: Phase) -> str:
    largest = max(phase.parts, key=lambda part: part.bytes)
    most = f"; most of it {largest.name} ({gb(largest.bytes)})" if len(phase.parts) > 1 else ""
    takes = f"{phase.name}: {gb_of(phase.bytes, phase.limit_bytes)} {WHERE[phase.place]}{most}."
    return f"{takes} {phase.way_out}".rstrip()


def change_in_words(change: Change) -> str:
    of = gb_of(change.tight.bytes, change.tight.limit_bytes)
    later = "".join(f"; {phase.name} may not, with {gb_of(phase.bytes, phase.limit_bytes)} {WHERE[phase.place]}" for phase in change.later)
    verdict = f"fits{later}" if change.fits else "does not fit"
    return f"{change.settings}: {of} {WHERE[change.tight.place]} ({change.tight.name}), {verdict}."


def enough_in_words(report: Report) -> str:
    """How much of what would be enough, as it was asked and, where no change is enough either, with the one that needs least."""
    asked = f"As asked, training would fit with {_needs_in_words(report.needs)}"
    if report.instead and not _covers(report.instead, report.needs):
        asked += f", or with {_needs_in_words(report.instead)}"
    unfit = [change for change in report.changes if change.needs]
    if not unfit or report.smallest_change is not None:
        return asked
    least = min(unfit, key=lambda change: change.tight.share)
    return f"{asked}. With {least.settings} it would with {_needs_in_words(least.needs)}"


def _covers(more: tuple[Need, ...], less: tuple[Need, ...]) -> bool:
    """Whether `more` is at least `less` in every place."""
    there = {need.place: need.bytes for need in more}
    return all(there.get(need.place, 0) >= need.bytes for need in less)


WHERE = {"GPU": "GPU", "memory": "memory", "disk": "free disk"}
PLACES = {"GPU": "on each GPU", "memory": "of memory on each machine", "disk": "of free disk"}


def _needs_in_words(needed: tuple[Need, ...]) -> str:
    return " and ".join(f"{gb_enough(need.bytes)} {PLACES[need.place]}" for need in needed)
