"""What config and machine leave open, decided; with a reason for each decision, and whether it fits."""

from dataclasses import dataclass, replace

from burnish.config import Plan, RunConfig
from burnish.errors import UserError
from burnish.load.pretrained import Pretrained
from burnish.plan import reasons
from burnish.plan.changes import changes, with_more_memory
from burnish.plan.check import check
from burnish.plan.cost import start_cost, step_cost, token_cost
from burnish.plan.disk import is_local
from burnish.plan.machine import Machine
from burnish.plan.phases import Measure, needed, others, with_afterwards
from burnish.plan.report import Decision, Phase, Report
from burnish.plan.search import search, tightest
from burnish.train import optimizer
from burnish.words import gb

__all__ = ["Prepared", "check", "decide"]


@dataclass(frozen=True)
class Prepared:
    """What a plan wants to know of data that are prepared."""

    contexts: int
    """Packed contexts of an epoch."""
    longest: int
    """Tokens of the longest sample."""


def decide(config: RunConfig, pretrained: Pretrained, machine: Machine, prepared: Prepared | None = None) -> tuple[Plan, Report]:
    """Chooses what `config.plan` leaves open: the fastest that fits. Where data are not `prepared`, samples fill their contexts.

    The plan of a run that does not fit is the one that needs least. Raises a `UserError` that lists all settings that contradict each
    other. Costs seconds and no memory, whatever the size of the model.
    """
    check(config, pretrained, machine)
    measure = Measure(pretrained, prepared and prepared.longest)
    open_plan = Plan(
        device=machine.device,
        ranks=1,
        strategy="single",
        dtype=reasons.dtype_of(config, machine)[0],
        micro_batch=1,
        accumulation=1,
        checkpointing=False,
    )
    tried = search(config, open_plan, machine, measure)
    plan = tried[0].plan
    refused = optimizer.problems(config.train, machine.device, plan.strategy, plan.dtype)
    if refused:  # by what was chosen: what was asked for is checked above
        raise UserError("\n".join(refused))

    plan = with_afterwards(config, plan, machine, measure)
    kept = measure.persistent(config.model, config.adapt, config.train, plan)
    step = step_cost(config, plan, machine, kept, pretrained.config)
    local = is_local(pretrained, machine, config.model.revision)
    start = start_cost(config, plan, machine, kept, local)
    phases, disk = _phases(config, plan, machine, measure, local)
    decisions = reasons.decisions(config, machine, tried)
    decisions += reasons.afterwards(config, plan, token_cost(machine, kept))
    decisions += [*reasons.length(config, prepared and prepared.contexts, step), reasons.starting(start), *disk]
    report = Report(machine, plan, tuple(decisions), phases, (), reasons.candidates(tried), step, start)
    if all(need.place == "disk" for need in report.needs):  # which no change of the plan makes larger
        return plan, report
    shortest = tightest(tuple(phase for phase in phases if phase.required and phase.place != "disk")).place
    asked = next(need for need in report.needs if need.place == shortest)
    found = changes(config, open_plan, machine, measure, asked)
    return plan, replace(report, changes=tuple(found), instead=with_more_memory(config, open_plan, machine, measure))


def _phases(config: RunConfig, plan: Plan, machine: Machine, measure: Measure, local: bool) -> tuple[tuple[Phase, ...], list[Decision]]:
    """All phases; of a machine that is not this one, the disk's are only said, since nobody can look at it."""
    phases = (*needed(config, plan, machine, measure), *others(config, plan, machine, measure, local))
    if machine.here:
        return phases, []
    on_disk = [phase for phase in phases if phase.place == "disk"]
    names = ", ".join(f"{phase.name} {gb(phase.bytes)}" for phase in on_disk)
    own = ", beside the model's own files" if local else ""
    decision = Decision("disk", gb(sum(phase.bytes for phase in on_disk)), f"{names}{own}; that machine's disk cannot be seen from here")
    return tuple(phase for phase in phases if phase.place != "disk"), [decision]
