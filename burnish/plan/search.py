"""The fastest plan that fits, by the cost model, and what was tried on the way.

Candidates are taken in the order of the least time that they could need, so that those which are slower than one that fits are never
traced. More contexts at a time are never slower and never smaller: of each candidate the largest micro-batch is found by halving.
"""

from dataclasses import dataclass, replace

from burnish.config import Plan, RunConfig
from burnish.plan.axes import Asked, candidates, cut, micro_batches
from burnish.plan.cost import step_cost
from burnish.plan.machine import Machine
from burnish.plan.phases import Measure, needed
from burnish.plan.report import Part, Phase

MARGIN = 1.1
"""What is faster by less than this is not worth being less plain: no estimate tells them apart."""
ROOM = 0.99
"""Of its limit: of plans as fast, one that needs no more is taken before one that does. What is planned is not known better than so."""
CLEARLY = 1.05
"""So far over its limit, what lies between two traces is not traced itself."""


@dataclass(frozen=True)
class Tried:
    """A candidate with the largest micro-batch that fits, or the smallest where none does."""

    plan: Plan
    seconds: float
    """Of one optimizer step, estimated."""
    tight: Phase | None
    """The phase that needs most of its limit. None where it was not measured, since a faster one fits."""
    over: tuple[int, Phase] | None = None
    """The next larger micro-batch, and what does not fit with it."""

    @property
    def fits(self) -> bool:
        return self.tight is not None and self.tight.fits


def tightest(phases: tuple[Phase, ...]) -> Phase:
    """The phase that needs most of its limit."""
    return max(phases, key=lambda phase: phase.share)


def search(config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> tuple[Tried, ...]:
    """Every candidate, the chosen one first; then those that fit, those that do not, and those that were not measured, each by time.

    `plan` has the device and the dtype. Where none fits, the one first that needs least of its limit. Costs a second or so for each
    candidate that would be faster than the chosen one.
    """
    asked = Asked(config, machine, measure.pretrained.config)
    options = candidates(asked, plan)
    fastest = [cut(asked, option, micro_batches(asked, option)[-1]) for option in options]
    untried = [Tried(option, seconds(config, fast, machine, measure), None) for option, fast in zip(options, fastest, strict=True)]
    found: list[Tried] = []
    best = float("inf")
    for one in sorted(untried, key=lambda one: one.seconds):
        if one.seconds > best * MARGIN:
            found.append(one)
            continue
        hopeless = _hopeless(asked, one.plan, measure)
        found.append(
            _largest(asked, one.plan, measure)
            if hopeless is None
            else Tried(one.plan, seconds(config, one.plan, machine, measure), hopeless)
        )
        if found[-1].fits:
            best = min(best, found[-1].seconds)
    return _ordered(found, best, [_uncut(option) for option in options])


def seconds(config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> float:
    kept = measure.persistent(config.model, config.adapt, config.train, plan)
    return step_cost(config, plan, machine, kept, measure.pretrained.config).seconds


def _ordered(found: list[Tried], best: float, plainest: list[Plan]) -> tuple[Tried, ...]:
    fitting = sorted((one for one in found if one.fits), key=lambda one: one.seconds)
    tight = [one for one in found if one.tight is not None and not one.fits]
    worth = [one for one in fitting if one.seconds <= best * MARGIN]

    def plain(one: Tried) -> int:
        return plainest.index(_uncut(one.plan))

    # of two as fast, shards over all ranks leave more room on each GPU than those of groups
    whole = {_uncut(replace(one.plan, strategy="hybrid", shard_ranks=0)) for one in worth if one.plan.strategy == "fsdp"}
    worth = [one for one in worth if not (one.plan.hybrid and _uncut(replace(one.plan, shard_ranks=0)) in whole)]
    roomy = [one for one in worth if one.tight is not None and one.tight.share <= ROOM]
    chosen = min(roomy or worth, key=plain) if worth else min(tight, key=lambda one: (_excess(one), -plain(one)))
    rest = [one for one in (*fitting, *sorted(tight, key=lambda one: one.seconds)) if one is not chosen]
    return (chosen, *rest, *(one for one in found if one.tight is None))


def _uncut(plan: Plan) -> Plan:
    return replace(plan, micro_batch=1, accumulation=1)


def _hopeless(asked: Asked, plan: Plan, measure: Measure) -> Phase | None:
    """The phase that does not fit with only some layers recomputed, where that can be told from none and all of them: it costs three
    times their trace. What a layer keeps is added up, so it lies between them as the number of recomputed layers does."""
    if not plan.checkpointing or plan.checkpoint_every == 1 or asked.config.plan.checkpoint_every:
        return None
    none, every = replace(plan, checkpointing=False, checkpoint_every=1), replace(plan, checkpoint_every=1)
    most, least = (needed(asked.config, option, asked.machine, measure) for option in (none, every))
    share = 1 / plan.checkpoint_every
    tight = tightest(tuple(_between(more, less, share) for more, less in zip(most, least, strict=True)))
    return tight if tight.bytes > CLEARLY * tight.limit_bytes else None


def _between(more: Phase, less: Phase, share: float) -> Phase:
    """`less`, and of what `more` needs beside it all but a share: activations."""
    beside = round((1 - share) * (more.bytes - less.bytes))
    kept = sum(part.bytes for part in less.parts if part.name == "activations")
    others = tuple(part for part in less.parts if part.name != "activations")
    return replace(less, parts=(*others, Part("activations", kept + beside)))


def _excess(one: Tried) -> float:
    assert one.tight is not None
    return one.tight.share


def _largest(asked: Asked, plan: Plan, measure: Measure) -> Tried:
    """The plan with the largest micro-batch that fits, found by halving; with the smallest where none does."""
    config, machine = asked.config, asked.machine
    sizes = micro_batches(asked, plan)
    tights: dict[int, Phase] = {}

    def fits(place: int) -> bool:
        tights[place] = tightest(needed(config, cut(asked, plan, sizes[place]), machine, measure))
        return tights[place].fits

    low, high = 0, len(sizes)  # sizes[low] fits, sizes[high] does not
    if fits(0):
        if high > 1 and fits(high - 1):
            low = high - 1
        elif high > 1:
            high -= 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
    else:
        high = 0
    done = cut(asked, plan, sizes[low])
    over = (sizes[high], tights[high]) if low < high < len(sizes) else None
    return Tried(done, seconds(config, done, machine, measure), tights[low], over)
