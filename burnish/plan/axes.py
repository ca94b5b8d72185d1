"""What a plan may choose by itself, an axis a row: none of it changes what is learned. Pins of `[plan]` leave an axis one value.

What does change it (context, formats, method) is never chosen silently: `changes.py` proposes it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from burnish.adapt.methods import METHODS
from burnish.config import Plan, RunConfig
from burnish.errors import UserError
from burnish.parallel.world import launched_machines
from burnish.plan.machine import Machine
from burnish.train import optimizer

ENOUGH_TOKENS = 512
"""Tokens in one forward pass that fill a CPU: more at a time are no faster, and need more memory."""
BASE_ON_HOST = ("single", "fsdp", "hybrid")
"""Strategies whose base can wait in host memory."""
PARTLY = (4, 2)
"""Where not every layer has to be recomputed, the first of so many is."""


@dataclass(frozen=True)
class Asked:
    """What the options of an axis depend on."""

    config: RunConfig
    machine: Machine
    network: PretrainedConfig


def strategies(asked: Asked, plan: Plan) -> list[Plan]:
    """Processes and what each holds: copies first, which gather nothing, then ever smaller shards, then one GPU alone."""
    config, machine = asked.config, asked.machine
    pins = config.plan
    ranks = pins.ranks or _ranks(config, machine)
    if ranks == 1:
        return [replace(plan, ranks=1)]
    plan = replace(plan, ranks=ranks)
    if pins.strategy.startswith("hybrid"):
        return [grouped(replace(plan, strategy=pins.strategy), config)]
    if pins.strategy != "auto":
        return [replace(plan, strategy=pins.strategy)]
    groups = [size for size in range(2, ranks) if ranks % size == 0] if machine.device == "cuda" else []
    hybrids = [replace(plan, strategy="hybrid", shard_ranks=size) for size in groups]
    alone = [] if pins.ranks or machine.device == "cpu" else [replace(plan, ranks=1)]
    copies = [] if pins.offload_base else [replace(plan, strategy="ddp")]  # each would keep a whole base in host memory
    options = [*copies, *hybrids, replace(plan, strategy="fsdp"), *alone]
    able = [option for option in options if not optimizer.problems(config.train, machine.device, option.strategy, plan.dtype)]
    return able or options


def _ranks(config: RunConfig, machine: Machine) -> int:
    """Processes where no pin says how many: one uses all cores of a CPU, and each GPU has its own."""
    pins = config.plan
    if machine.device == "cpu" or pins.strategy == "single":
        return 1
    return machine.devices


def grouped(plan: Plan, config: RunConfig) -> Plan:
    """Groups of `plan.shard_ranks` ranks, or of the ranks of one machine; more than one group, or it would be `fsdp` by another name."""
    here = plan.ranks // launched_machines()
    group = config.plan.shard_ranks or here
    if plan.ranks % group or not 1 < group < plan.ranks:
        divisors = ", ".join(str(size) for size in range(2, plan.ranks) if plan.ranks % size == 0)
        way_out = f"Set plan.shard_ranks to one of {divisors}" if divisors else "Use plan.strategy=fsdp"
        raise UserError(f"plan.strategy = {plan.strategy!r}: {plan.ranks} ranks do not make several groups of {group}. {way_out}.")
    return replace(plan, shard_ranks=group)


def checkpointings(asked: Asked, plan: Plan) -> list[Plan]:
    """What is recomputed, and where its input waits: nothing, ever more of the layers, all of them with their inputs in host memory."""
    pins = asked.config.plan
    none = replace(plan, checkpointing=False)
    if pins.checkpointing == "none":
        return [none]
    parts = [every for every in PARTLY if every < asked.network.num_hidden_layers]
    everies = [pins.checkpoint_every] if pins.checkpoint_every else [1] if pins.checkpointing == "layers" else [*parts, 1]
    layers = [replace(plan, checkpointing=True, checkpoint_every=every) for every in everies]
    if pins.offload_activations:
        return [replace(option, offload_activations=True) for option in layers]
    waiting = [replace(layers[-1], offload_activations=True)] if pins.offload_activations is None and plan.device == "cuda" else []
    return [*([none] if pins.checkpointing == "auto" else []), *layers, *waiting]


def bases(asked: Asked, plan: Plan) -> list[Plan]:
    """Where the frozen base lies: on the device, or in host memory."""
    pin = asked.config.plan.offload_base
    moved = replace(plan, offload_base=True)
    if pin:
        return [moved]
    frozen = METHODS[asked.config.adapt.method].adapts or METHODS[asked.config.adapt.method].grows
    possible = pin is None and plan.device == "cuda" and plan.strategy in BASE_ON_HOST and frozen
    return [plan, moved] if possible else [plan]


AXES: dict[str, Callable[[Asked, Plan], list[Plan]]] = {
    "strategy": strategies,
    "base": bases,
    "checkpointing": checkpointings,
}
"""Every combination is a candidate. An axis lists its options from the plainest to the thriftiest."""


def candidates(asked: Asked, plan: Plan) -> list[Plan]:
    """All combinations, the plainest first, each with the smallest micro-batch."""

    def combined(plan: Plan, axes: tuple[Callable[[Asked, Plan], list[Plan]], ...]) -> Iterator[Plan]:
        if not axes:
            yield cut(asked, plan, micro_batches(asked, plan)[0])
        else:
            for option in axes[0](asked, plan):
                yield from combined(option, axes[1:])

    return list(combined(plan, tuple(AXES.values())))


def micro_batches(asked: Asked, plan: Plan) -> list[int]:
    """Packed contexts at a time, ever more: powers of 2, since half a micro-batch at a step's end costs as much as a whole one."""
    config = asked.config
    if config.plan.micro_batch:
        return [min(config.plan.micro_batch, share(config, plan))]
    sizes = [1]
    while 2 * sizes[-1] <= share(config, plan) and not (plan.device == "cpu" and sizes[-1] * config.data.context >= ENOUGH_TOKENS):
        sizes.append(2 * sizes[-1])
    return sizes


def share(config: RunConfig, plan: Plan) -> int:
    """Contexts that a process has in a step."""
    return math.ceil(config.train.rows_per_step / plan.ranks)


def cut(asked: Asked, plan: Plan, micro_batch: int) -> Plan:
    """The plan with another micro-batch, and the accumulation that then makes a step."""
    return replace(plan, micro_batch=micro_batch, accumulation=math.ceil(share(asked.config, plan) / micro_batch))
