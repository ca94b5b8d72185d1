"""What would make a run fit that does not: one change of settings at a time, the smallest first."""

import json
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace

from burnish.adapt.methods import METHODS
from burnish.config import AdaptConfig, Plan, RunConfig
from burnish.errors import UserError
from burnish.plan.axes import BASE_ON_HOST, Asked, candidates
from burnish.plan.disk import run_folder
from burnish.plan.machine import Machine
from burnish.plan.phases import Measure, loading, needed, unfit_afterwards
from burnish.plan.report import Change, Need, Phase, needs
from burnish.plan.search import tightest

SHORTEST = 256
"""Contexts shorter than this are not proposed."""
LOWEST_RANK = 8
"""Nor are lower ranks."""
LESS, MUCH_LESS = 0.999, 0.9
"""Of what is needed as it was asked: what does not fit either is said only where it needs so little, one change or all of them together."""
ENOUGH_CHANGES = 3
"""When so many are found that fit, larger ones are not tried."""

Changed = RunConfig | None


def _pinned(config: RunConfig, **pins: object) -> RunConfig:
    return replace(config, plan=replace(config.plan, **pins))


def _recompute(config: RunConfig, machine: Machine) -> Changed:
    return _pinned(config, checkpointing="layers") if config.plan.checkpointing == "none" else None


def _every_layer(config: RunConfig, machine: Machine) -> Changed:
    return _pinned(config, checkpoint_every=1) if config.plan.checkpointing != "none" and config.plan.checkpoint_every > 1 else None


def _one_context(config: RunConfig, machine: Machine) -> Changed:
    return _pinned(config, micro_batch=1) if config.plan.micro_batch > 1 else None


def _sharded(config: RunConfig, machine: Machine) -> Changed:
    pins, ranks = config.plan, max(config.plan.ranks, machine.devices)
    narrow = pins.strategy in ("single", "ddp") or (pins.strategy == "auto" and pins.ranks == 1)
    return _pinned(config, strategy="fsdp", ranks=ranks) if narrow and ranks > 1 else None


def _activations_on_host(config: RunConfig, machine: Machine) -> Changed:
    possible = machine.device == "cuda" and config.plan.checkpointing != "none" and config.plan.offload_activations is False
    return _pinned(config, offload_activations=True) if possible else None


def _base_on_host(config: RunConfig, machine: Machine) -> Changed:
    possible = machine.device == "cuda" and config.plan.strategy in ("auto", *BASE_ON_HOST) and config.plan.offload_base is False
    return _pinned(config, offload_base=True) if possible else None


def _double_quantized(config: RunConfig, machine: Machine) -> Changed:
    possible = config.model.format in ("nf4", "fp4") and not config.model.double_quantized
    return replace(config, model=replace(config.model, double_quantized=True)) if possible else None


ENDS = ("none", "int8", "nf4")
"""Embeddings and head, each of these smaller than the one before it."""


def _smaller_ends(config: RunConfig, machine: Machine) -> Changed:
    ends = config.model.ends
    possible = ends in ENDS[:-1] and config.adapt.method != "full" and not config.adapt.also
    return replace(config, model=replace(config.model, ends=ENDS[ENDS.index(ends) + 1])) if possible else None


def _moments_in_8_bits(config: RunConfig, machine: Machine) -> Changed:
    possible = config.train.optimizer == "adamw" and config.model.dtype != "fp64"
    return replace(config, train=replace(config.train, optimizer="adamw8bit")) if possible else None


def _half_context(config: RunConfig, machine: Machine) -> Changed:
    half = config.data.context // 2
    return None if half < SHORTEST else replace(config, data=replace(config.data, context=half))


def _half_rank(config: RunConfig, machine: Machine) -> Changed:
    half = config.adapt.rank // 2
    possible = METHODS[config.adapt.method].adapts and half >= LOWEST_RANK
    return replace(config, adapt=replace(config.adapt, rank=half, alpha=config.adapt.alpha / 2)) if possible else None


def _nf4(config: RunConfig, machine: Machine) -> Changed:
    possible = config.model.format == "none" and "nf4" in (METHODS[config.adapt.method].formats or ("nf4",))
    return replace(config, model=replace(config.model, format="nf4")) if possible else None


def _three_bits(config: RunConfig, machine: Machine) -> Changed:
    if config.model.format not in ("nf4", "fp4", "int4"):
        return None
    return replace(config, model=replace(config.model, format="hqq", bits=3, double_quantized=False, block=min(config.model.block, 128)))


def _adapters(config: RunConfig, machine: Machine) -> Changed:
    if METHODS[config.adapt.method].adapts:
        return None
    adapt = replace(config.adapt, method="dora", new_blocks=0, targets=AdaptConfig().targets)
    return replace(config, adapt=adapt, model=replace(config.model, format="nf4"))


CHANGES: dict[str, Callable[[RunConfig, Machine], Changed]] = {
    # pins of the plan: nothing that is learned changes
    "layers are recomputed": _recompute,
    "every layer is": _every_layer,
    "one context at a time": _one_context,
    "shards on all GPUs": _sharded,
    "activations in host memory": _activations_on_host,
    "base in host memory": _base_on_host,
    # what changes it, the least first
    "scales in 8 bits": _double_quantized,
    "moments in 8 bits": _moments_in_8_bits,
    "embeddings and head in 8 bits, then in 4": _smaller_ends,
    "half the rank": _half_rank,
    "half the context": _half_context,
    "4 bits": _nf4,
    "3 bits": _three_bits,
    "adapters instead of all weights": _adapters,
}
"""What is tried where a run does not fit, the smallest first: the changed config, or None where it changes nothing. What can be done twice
is done until the run fits."""


def changes(config: RunConfig, plan: Plan, machine: Machine, measure: Measure, asked: Need) -> list[Change]:
    """What each change alone would come to, until some are found that fit; and as many as it takes together, where none is enough.

    `plan` has the device and the dtype; `asked` is what there is least of for what is needed. What neither fits nor needs less of that is
    left out: a base in host memory, which is pinned in powers of 2, may need more than it frees. Costs a second or two for each.
    """

    def least(ever_larger: list[RunConfig]) -> Change | None:
        """The first that fits, found by halving; the largest where none does. None where there is none, or it contradicts others."""
        best = _tried(config, ever_larger[-1], plan, machine, measure) if ever_larger else None
        low, high = 0, len(ever_larger) - 1
        while best is not None and best.fits and low < high:
            middle = (low + high) // 2
            tried = _tried(config, ever_larger[middle], plan, machine, measure)
            if tried is not None and tried.fits:
                best, high = tried, middle
            else:
                low = middle + 1
        return best

    def left(change: Change) -> int:
        """What it would need of what is shortest; 0 where there is enough of that."""
        return next((need.bytes for need in change.needs if need.place == asked.place), 0)

    found: list[Change] = []
    together = [config]
    for change in CHANGES.values():
        tried = least(_repeated(change, config, machine))
        if tried is None:
            continue
        found.append(tried)
        if left(tried) <= asked.bytes:  # it may help beside others
            together += _repeated(change, together[-1], machine)[-1:]
        if sum(one.fits for one in found) == ENOUGH_CHANGES:
            break
    alone = [change for change in found if change.fits or left(change) <= LESS * asked.bytes]
    if not any(change.fits for change in found):
        several = least(together[2:])
        alone += [several] if several is not None and (several.fits or left(several) <= MUCH_LESS * asked.bytes) else []
    return alone


def _repeated(change: Callable[[RunConfig, Machine], Changed], config: RunConfig, machine: Machine) -> list[RunConfig]:
    """The config changed once, twice, … as long as the change changes something."""
    found: list[RunConfig] = []
    while (changed := change(found[-1] if found else config, machine)) is not None:
        found.append(changed)
    return found


def _tried(before: RunConfig, config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> Change | None:
    """What the changed config would come to with the candidate that needs least of its limit, or the first that fits."""
    try:
        option, phases = _the_thriftiest(config, plan, machine, measure)
    except UserError:
        return None
    if machine.here:  # else its disk cannot be looked at
        phases = (*phases, run_folder(config, measure.persistent(config.model, config.adapt, config.train, plan.alone)))
    tight = tightest(phases)
    later = unfit_afterwards(config, option, machine, measure) if tight.fits else ()
    return Change(differences(before, config), tight, needs(phases), later)


def differences(before: RunConfig, after: RunConfig) -> str:
    """The settings that differ, as overrides on a command line: `model.format=nf4 data.context=512`."""
    words = []
    for section in fields(after):
        own, other = getattr(after, section.name), getattr(before, section.name)
        if is_dataclass(own):
            changed = [name.name for name in fields(own) if getattr(own, name.name) != getattr(other, name.name)]
            words += [f"{section.name}.{name}={_value(getattr(own, name))}" for name in changed]
    return " ".join(words)


def _value(value: object) -> str:
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)


def with_more_memory(config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> tuple[Need, ...]:
    """The host memory with which it would fit on these GPUs, as it was asked: the least. () where it would with none."""
    kinds = [group for load, group in _thrifty(config, plan, machine, measure) if all(phase.fits for phase in load if phase.place == "GPU")]
    found = [needs(phases) for group in kinds for _, phases in _measured(config, group, machine, measure)]
    enough = [one for one in found if [need.place for need in one] == ["memory"]]
    return min(enough, key=lambda one: one[0].bytes, default=())


def _the_thriftiest(config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> tuple[Plan, tuple[Phase, ...]]:
    """The first candidate that fits, or that which comes closest, with its phases."""
    found: list[tuple[Plan, tuple[Phase, ...]]] = []
    for load, group in _thrifty(config, plan, machine, measure):
        if found and tightest(load).share >= min(tightest(phases).share for _, phases in found):
            break
        for one in _measured(config, group, machine, measure):
            if tightest(one[1]).fits:
                return one
            found.append(one)
    return min(found, key=lambda one: tightest(one[1]).share)


def _thrifty(config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> list[tuple[tuple[Phase, ...], list[Plan]]]:
    """Those candidates of each strategy and base that need least, the thriftiest first, and what loading them takes: those first that it
    takes least of.

    All layers are recomputed, with their inputs in host memory where that may be.
    """
    groups: dict[tuple[object, ...], list[Plan]] = {}
    for option in candidates(Asked(config, machine, measure.pretrained.config), plan):
        groups.setdefault((option.strategy, option.shard_ranks, option.ranks, option.offload_base), []).append(option)
    thrifty = [group[:-3:-1] for group in reversed(groups.values())]
    loads = [(loading(config, group[0], machine, measure), group) for group in thrifty]
    return sorted(loads, key=lambda one: tightest(one[0]).share)


def _measured(config: RunConfig, group: list[Plan], machine: Machine, measure: Measure) -> Iterator[tuple[Plan, tuple[Phase, ...]]]:
    """The phases of each, one after the other. What fits no device, or cannot even be loaded, does no better with more on the device."""
    for option in group:
        phases = needed(config, option, machine, measure)
        yield option, phases
        if not all(phase.fits for phase in phases if phase.place == "GPU" or phase.name == "load"):
            break
