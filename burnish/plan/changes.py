"""What would make a run fit that does not: one change of settings at a time, the smallest first."""

from collections.abc import Callable, Iterator
from dataclasses import replace

from burnish.adapt.methods import METHODS
from burnish.config import AdaptConfig, Plan, RunConfig
from burnish.errors import UserError
from burnish.plan.axes import Asked, candidates
from burnish.plan.machine import Machine
from burnish.plan.phases import Measure, needed
from burnish.plan.report import Change
from burnish.plan.search import Tried, tightest

SHORTEST = 256
"""Contexts shorter than this are not proposed."""
LOWEST_RANK = 8
"""Nor are lower ranks."""
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
    return _pinned(config, strategy="fsdp", ranks=ranks) if narrow and ranks > 1 and not pins.offload_base else None


def _activations_on_host(config: RunConfig, machine: Machine) -> Changed:
    possible = machine.device == "cuda" and config.plan.checkpointing != "none" and config.plan.offload_activations is False
    return _pinned(config, offload_activations=True) if possible else None


def _base_on_host(config: RunConfig, machine: Machine) -> Changed:
    one = config.plan.ranks == 1 or machine.devices == 1
    return _pinned(config, offload_base=True) if machine.device == "cuda" and one and config.plan.offload_base is False else None


def _double_quantized(config: RunConfig, machine: Machine) -> Changed:
    possible = config.model.format in ("nf4", "fp4") and not config.model.double_quantized
    return replace(config, model=replace(config.model, double_quantized=True)) if possible else None


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
    "plan.checkpointing=layers": _recompute,
    "plan.checkpoint_every=1": _every_layer,
    "plan.micro_batch=1": _one_context,
    "plan.strategy=fsdp plan.ranks={plan.ranks}": _sharded,
    "plan.offload_activations=true": _activations_on_host,
    "plan.offload_base=true": _base_on_host,
    # what changes it, the least first
    "model.double_quantized=true": _double_quantized,
    "train.optimizer=adamw8bit": _moments_in_8_bits,
    "adapt.rank={adapt.rank} adapt.alpha={adapt.alpha:g}": _half_rank,
    "data.context={data.context}": _half_context,
    "model.format=nf4": _nf4,
    "model.format=hqq model.bits=3": _three_bits,
    "adapt.method=dora adapt.new_blocks=0 model.format=nf4": _adapters,
}
"""What is tried where a run does not fit, the smallest first: settings in words → the changed config, or None where that changes nothing.
What can be done twice is done until the run fits."""


def changes(config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> list[Change]:
    """What each change alone would come to, until some are found that fit; and all of them together, where none is enough.

    `plan` has the device and the dtype. Costs a second or two for each.
    """
    found: list[Change] = []
    together = config
    for name, change in CHANGES.items():
        changed, tried = change(config, machine), None
        while changed is not None and (tried is None or not tried.fits):
            thriftiest = _thriftiest(changed, plan, machine, measure)
            if thriftiest is None:  # these settings contradict others
                break
            tried, last = _change(name, changed, thriftiest), changed
            changed = change(last, machine)
        if tried is not None:
            found.append(tried)
            together = change(together, machine) or together
        if sum(one.fits for one in found) == ENOUGH_CHANGES:
            return found
    if len(found) > 1 and not any(change.fits for change in found):
        thriftiest = _thriftiest(together, plan, machine, measure)
        if thriftiest is not None:
            names = [name for name, change in CHANGES.items() if change(config, machine) is not None]
            found.append(_change(" ".join(names), together, thriftiest))
    return found


def _change(name: str, config: RunConfig, tried: Tried) -> Change:
    tight = tried.tight
    assert tight is not None
    words = name.format(plan=config.plan, data=config.data, adapt=config.adapt)
    return Change(words, tight.bytes, tight.limit_bytes, tight.fits)


def _thriftiest(config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> Tried | None:
    """The candidate that needs least of its limit, or the first that fits. None where settings contradict each other."""
    try:
        options = _thrifty(candidates(Asked(config, machine, measure.pretrained.config), plan))
        best: Tried | None = None
        for option in options:
            tight = tightest(needed(config, option, machine, measure))
            tried = Tried(option, 0.0, tight)
            if best is None or best.tight is None or tight.bytes / tight.limit_bytes < best.tight.bytes / best.tight.limit_bytes:
                best = tried
            if tight.fits:
                break
    except UserError:
        return None
    return best


def _thrifty(options: list[Plan]) -> Iterator[Plan]:
    """Of each strategy and base, the last two ways to recompute: all layers, and these with their inputs in host memory."""
    groups: dict[tuple[object, ...], list[Plan]] = {}
    for option in options:
        groups.setdefault((option.strategy, option.shard_ranks, option.ranks, option.offload_base), []).append(option)
    for group in reversed(groups.values()):
        yield from reversed(group[-2:])
