"""What config and machine leave open, decided; with a reason for each decision, and whether it fits."""

import math
from dataclasses import replace
from typing import Literal

from burnish.adapt import methods
from burnish.adapt.methods import METHODS
from burnish.config import AdaptConfig, Plan, PlanConfig, RunConfig
from burnish.errors import UserError
from burnish.load.pretrained import Pretrained
from burnish.parallel.world import launched_machines
from burnish.plan.machine import Machine
from burnish.plan.phases import Measure, needed, others
from burnish.plan.report import Change, Decision, Phase, Report, as_json, gb, refuse_unless_fits, render
from burnish.train import optimizer
from burnish.train.progress import check_installed

ENOUGH_TOKENS = 512
"""Tokens in one forward pass that fill a CPU: more at a time are no faster, and need more memory."""
SHORTEST = 256
"""Contexts shorter than this are not proposed."""


FEW_STEPS = 20
"""With fewer optimizer steps than this, a run with usual rates learns next to nothing."""


def decide(config: RunConfig, pretrained: Pretrained, machine: Machine, contexts: int | None = None) -> tuple[Plan, Report]:
    """Chooses what `config.plan` leaves open. `contexts` is how many packed contexts an epoch has, where that is known.

    The plan of a run that does not fit is the one that needs least. Raises a `UserError` that lists all settings that contradict each
    other. Costs seconds and no memory, whatever the size of the model.
    """
    check(config, pretrained, machine)
    measure = Measure(pretrained)
    plan, decisions = choose(config, machine, measure)
    refused = optimizer.problems(config.train, machine.device, plan.strategy, plan.dtype)
    if refused:  # by what was chosen: what was asked for is checked above
        raise UserError("\n".join(refused))
    phases = (*needed(config, plan, machine, measure), *others(config, plan, machine, measure))
    report = Report(machine, plan, (*decisions, *_length(config, contexts)), phases)
    return plan, report if report.fits else replace(report, changes=tuple(changes(config, plan, machine, measure)))


def check(config: RunConfig, pretrained: Pretrained, machine: Machine) -> None:
    """Refuses pins that contradict each other or the machine, all in one message."""
    check_installed(config.train.log)
    pins, problems = config.plan, []
    longest = getattr(pretrained.config, "max_position_embeddings", None)
    if longest and config.data.context > longest:
        at_most = f"{pretrained.asked} reads at most {longest} tokens"
        problems.append(f"data.context = {config.data.context}: {at_most}. Set data.context={longest} or less.")

    if pins.strategy == "single" and pins.ranks > 1:
        problems.append(f"plan.strategy = 'single' is one process, and plan.ranks = {pins.ranks}. Set plan.ranks=1, or plan.strategy=fsdp.")
    if machine.device == "cuda" and pins.ranks > machine.devices * launched_machines():
        gpus = f"{machine.devices} GPU{'s' * (machine.devices > 1)}"
        problems.append(f"plan.ranks = {pins.ranks}: each needs a GPU, and this machine has {gpus}. Set plan.ranks={machine.devices}.")
    if pins.shard_ranks and not pins.strategy.startswith("hybrid"):
        problems.append(f"plan.shard_ranks = {pins.shard_ranks} is for plan.strategy=hybrid; plan.strategy is {pins.strategy!r}.")

    problems += methods.conflicts(config.adapt, config.model.format, config.model.ends)
    if not METHODS[config.adapt.method].adapts and "peft" in config.export.writers:
        problems.append(
            f"export.writers has 'peft', which holds adapters, and adapt.method = {config.adapt.method!r} has none. "
            'Set export.writers=["transformers"].'
        )
    if machine.device == "cuda" and config.model.autocast == "bf16" and not machine.bf16:
        problems.append(f"model.autocast = 'bf16': {machine.name} has no bf16. Set model.autocast=fp16.")
    if "gguf" in config.export.writers and config.model.ends not in ("none", "stored"):
        own = f"the file's own embeddings are written, and model.ends = {config.model.ends!r} trains on others"
        problems.append(f"export.writers = 'gguf': {own}. Set model.ends=stored or none.")
    if machine.device == "cuda" and config.model.dtype == "bf16" and not machine.bf16:
        problems.append(f"model.dtype = 'bf16': {machine.name} has no bf16. Set model.dtype=fp16.")
    if "gguf" in config.export.writers and (pretrained.gguf is None or config.model.format != "stored"):
        needs = "writes the base's own GGUF file anew with what was trained folded into it"
        problems.append(f"export.writers = 'gguf' {needs}: it needs a .gguf file as model.path and model.format=stored.")
    problems += optimizer.problems(config.train, machine.device, pins.strategy, config.model.dtype)
    problems += _offload_problems(pins, machine)
    if problems:
        raise UserError("\n  ".join(["the settings do not go together:", *problems]) if len(problems) > 1 else problems[0])


def _offload_problems(pins: PlanConfig, machine: Machine) -> list[str]:
    found = []
    for name in ("offload_activations", "offload_base"):
        if getattr(pins, name) and machine.device == "cpu":
            found.append(f"plan.{name} = true: on a CPU everything is in host memory already. Leave it out.")
    if pins.checkpointing == "none" and pins.offload_activations:
        found.append(
            "plan.offload_activations = true: it moves what plan.checkpointing keeps, and that is 'none'. Set plan.checkpointing=layers."
        )
    if pins.checkpointing == "none" and pins.checkpoint_every > 1:
        found.append(
            f"plan.checkpoint_every = {pins.checkpoint_every}: plan.checkpointing = 'none' recomputes none. Leave one of them out."
        )
    if pins.offload_base and (pins.ranks > 1 or pins.strategy not in ("auto", "single")):
        found.append(
            "plan.offload_base = true is for one process: what FSDP2 moves to the host is all of a shard, adapters and moments with it, "
            "and replicas would each need a whole base there. Set plan.ranks=1 plan.strategy=single, or leave it out: fsdp cuts the base."
        )
    return found


def choose(config: RunConfig, machine: Machine, measure: Measure) -> tuple[Plan, list[Decision]]:
    """A plan, and a reason for each part of it."""
    pins = config.plan
    ranks, why_ranks = _ranks(config, machine)
    dtype, why_dtype = _dtype(config, machine)
    share = math.ceil(config.train.rows_per_step / ranks)
    plan = Plan(
        device=machine.device,
        ranks=ranks,
        strategy="single",
        dtype=dtype,
        micro_batch=pins.micro_batch or 1,
        accumulation=share,
        checkpointing=True,
        checkpoint_every=pins.checkpoint_every,
        offload_activations=pins.offload_activations,
        offload_base=pins.offload_base,
    )

    plan, why_strategy = _strategy(plan, config, machine, measure)
    plan, why_checkpointing = _checkpointing(plan, config, machine, measure)
    plan, why_micro_batch = _micro_batch(plan, share, config, machine, measure)
    plan = replace(plan, accumulation=math.ceil(share / plan.micro_batch))
    return plan, [
        Decision("processes", str(ranks), why_ranks),
        Decision("strategy", plan.strategy, why_strategy),
        Decision("dtype", dtype, why_dtype),
        Decision("checkpointing", _in_words(plan), why_checkpointing),
        *((Decision("base", "in host memory", "as plan.offload_base says"),) if plan.offload_base else ()),
        Decision("micro-batch", f"{plan.micro_batch} × {config.data.context} tokens", why_micro_batch),
        Decision(
            "accumulation", str(plan.accumulation), f"{config.train.rows_per_step} contexts in a step, over {ranks} × {plan.micro_batch}"
        ),
    ]


def _in_words(plan: Plan) -> str:
    if not plan.checkpointing:
        return "none"
    every = "layers" if plan.checkpoint_every == 1 else f"every {plan.checkpoint_every} layers"
    return f"{every}, kept in host memory" if plan.offload_activations else every


def _ranks(config: RunConfig, machine: Machine) -> tuple[int, str]:
    if config.plan.ranks:
        return config.plan.ranks, "as plan.ranks says"
    if config.plan.offload_base:
        return 1, "plan.offload_base is for one process"
    if machine.device == "cpu" or config.plan.strategy == "single":
        return 1, "one process uses all cores" if machine.device == "cpu" else "as plan.strategy=single says"
    return machine.devices, f"one for each GPU ({machine.name})"


def _dtype(config: RunConfig, machine: Machine) -> tuple[Literal["fp32", "bf16", "fp16", "fp64"], str]:
    asked = config.model.dtype
    if config.model.autocast != "none":
        return "fp32", f"with products in {config.model.autocast}, as model.autocast says"
    if asked != "auto":
        slow = asked in ("fp16", "bf16") and machine.device == "cpu"
        return asked, "as model.dtype says" + (f", though most CPUs compute {asked} slowly" if slow else "")
    if machine.device == "cuda":
        return ("bf16", "this GPU has it") if machine.bf16 else ("fp16", "this GPU has no bf16; the loss is scaled")
    return "fp32", "a CPU: few are faster in bf16 (model.dtype=bf16 tries)"


def _strategy(plan: Plan, config: RunConfig, machine: Machine, measure: Measure) -> tuple[Plan, str]:
    asked = config.plan.strategy
    if plan.ranks == 1:
        return plan, "one process" if asked in ("auto", "single") else f"one process: {asked} over one is the same"
    if asked.startswith("hybrid"):
        return _hybrid(replace(plan, strategy=asked), config)
    if asked != "auto":
        return replace(plan, strategy=asked), "as plan.strategy says"
    replicas = replace(plan, strategy="ddp")
    tight = tightest(needed(config, replicas, machine, measure))
    if tight.fits:
        return replicas, f"each process has room for the whole model: {gb(tight.bytes)} of {gb(tight.limit_bytes)}"
    return replace(plan, strategy="fsdp"), f"a whole model in each process takes {gb(tight.bytes)} of {gb(tight.limit_bytes)}"


def _hybrid(plan: Plan, config: RunConfig) -> tuple[Plan, str]:
    """Groups of `plan.shard_ranks` ranks, or of the ranks of one machine; more than one group, or it would be `fsdp` by another name."""
    here = plan.ranks // launched_machines()
    group = config.plan.shard_ranks or here
    if plan.ranks % group or not 1 < group < plan.ranks:
        divisors = ", ".join(str(size) for size in range(2, plan.ranks) if plan.ranks % size == 0)
        way_out = f"Set plan.shard_ranks to one of {divisors}" if divisors else "Use plan.strategy=fsdp"
        raise UserError(f"plan.strategy = {plan.strategy!r}: {plan.ranks} ranks do not make several groups of {group}. {way_out}.")
    why = "as plan.shard_ranks says" if config.plan.shard_ranks else "the ranks of one machine"
    return replace(plan, shard_ranks=group), f"{plan.ranks // group} copies, each cut over {group} ranks, {why}"


def _checkpointing(plan: Plan, config: RunConfig, machine: Machine, measure: Measure) -> tuple[Plan, str]:
    asked = config.plan.checkpointing
    if asked != "auto":
        return replace(plan, checkpointing=asked == "layers"), "as plan.checkpointing says"
    if config.plan.offload_activations:
        return plan, "plan.offload_activations moves what it keeps"
    without = replace(plan, checkpointing=False)
    tight = tightest(needed(config, without, machine, measure))
    if tight.fits:
        return without, "everything fits without recomputing"
    kept = measure.step(config.model, config.adapt, without, config.data.context).kept
    return plan, f"without it {tight.name} takes {gb(tight.bytes)} of {gb(tight.limit_bytes)}, {gb(kept)} of that activations"


def _micro_batch(plan: Plan, share: int, config: RunConfig, machine: Machine, measure: Measure) -> tuple[Plan, str]:
    if config.plan.micro_batch:
        return plan, "as plan.micro_batch says"
    best = replace(plan, micro_batch=1)
    while best.micro_batch < share:
        if machine.device == "cpu" and best.micro_batch * config.data.context >= ENOUGH_TOKENS:
            return best, "more tokens at a time are no faster on a CPU"
        larger = replace(best, micro_batch=min(2 * best.micro_batch, 1 << (share.bit_length() - 1)))
        if larger.micro_batch == best.micro_batch:
            break
        tight = tightest(needed(config, larger, machine, measure))
        if not tight.fits:
            return best, f"{larger.micro_batch} at a time take {gb(tight.bytes)} of {gb(tight.limit_bytes)}"
        best = larger
    return best, f"{'all' if best.micro_batch == share else 'the largest power of 2'} of the {share} that a process has in a step"


def _length(config: RunConfig, contexts: int | None) -> list[Decision]:
    if contexts is None and config.train.steps is None:
        return []
    steps = config.train.steps or math.ceil((contexts or 0) * config.train.epochs / config.train.rows_per_step)
    why = "as train.steps says" if config.train.steps else f"{config.train.epochs:g} epochs of {contexts} contexts"
    few = "; that is few: a lower train.rows_per_step or data.context, or more train.epochs, gives more" if steps < FEW_STEPS else ""
    return [Decision("steps", str(steps), why + few)]


def tightest(phases: tuple[Phase, ...]) -> Phase:
    """The phase that needs most of its limit."""
    return max(phases, key=lambda phase: phase.bytes / phase.limit_bytes)


def changes(config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> list[Change]:
    """What each of a few changes alone would come to; and all of them together, where none is enough."""
    found: list[Change] = []
    together: tuple[RunConfig, Plan] = (config, plan)
    for name, change in CHANGES.items():
        changed = change(config, plan, machine)
        tried = None
        while changed is not None and (tried is None or not tried.fits):  # what can be done twice is, until it fits
            tried, last = _tried(_named(name, *changed), *changed, machine, measure), changed
            changed = change(*last, machine)
        if tried is not None:
            found.append(tried)
            together = change(*together, machine) or together
    if len(found) > 1 and not any(change.fits for change in found):
        names = [_named(name, *together) for name, change in CHANGES.items() if change(config, plan, machine) is not None]
        found.append(_tried(" ".join(names), *together, machine, measure))
    return found


def _tried(settings: str, config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> Change:
    tight = tightest(needed(config, plan, machine, measure))
    return Change(settings, tight.bytes, tight.limit_bytes, tight.fits)


Changed = tuple[RunConfig, Plan] | None


def _recompute(config: RunConfig, plan: Plan, machine: Machine) -> Changed:
    return None if plan.checkpointing else (config, replace(plan, checkpointing=True))


def _every_layer(config: RunConfig, plan: Plan, machine: Machine) -> Changed:
    return (config, replace(plan, checkpoint_every=1)) if plan.checkpointing and plan.checkpoint_every > 1 else None


def _activations_on_host(config: RunConfig, plan: Plan, machine: Machine) -> Changed:
    possible = plan.device == "cuda" and plan.checkpointing and not plan.offload_activations
    return (config, replace(plan, offload_activations=True)) if possible else None


def _base_on_host(config: RunConfig, plan: Plan, machine: Machine) -> Changed:
    possible = plan.device == "cuda" and plan.ranks == 1 and not plan.offload_base
    return (config, replace(plan, offload_base=True)) if possible else None


def _one_context(config: RunConfig, plan: Plan, machine: Machine) -> Changed:
    return None if plan.micro_batch == 1 else (config, replace(plan, micro_batch=1))


def _sharded(config: RunConfig, plan: Plan, machine: Machine) -> Changed:
    ranks = max(plan.ranks, machine.devices)
    return None if plan.sharded or ranks == 1 or plan.offload_base else (config, replace(plan, strategy="fsdp", ranks=ranks))


def _half_context(config: RunConfig, plan: Plan, machine: Machine) -> Changed:
    half = config.data.context // 2
    return None if half < SHORTEST else (replace(config, data=replace(config.data, context=half)), plan)


def _nf4(config: RunConfig, plan: Plan, machine: Machine) -> Changed:
    possible = config.model.format == "none" and "nf4" in (METHODS[config.adapt.method].formats or ("nf4",))
    return (replace(config, model=replace(config.model, format="nf4")), plan) if possible else None


def _adapters(config: RunConfig, plan: Plan, machine: Machine) -> Changed:
    if METHODS[config.adapt.method].adapts:
        return None
    adapt = replace(config.adapt, method="dora", new_blocks=0, targets=AdaptConfig().targets)
    return replace(config, adapt=adapt, model=replace(config.model, format="nf4")), plan


CHANGES = {
    "plan.checkpointing=layers": _recompute,
    "plan.checkpoint_every=1": _every_layer,
    "plan.micro_batch=1": _one_context,
    "plan.strategy=fsdp plan.ranks={plan.ranks}": _sharded,
    "data.context={config.data.context}": _half_context,
    "model.format=nf4": _nf4,
    "plan.offload_activations=true": _activations_on_host,
    "plan.offload_base=true": _base_on_host,
    "adapt.method=dora adapt.new_blocks=0 model.format=nf4": _adapters,
}
"""What is tried where a run does not fit, the cheapest first. Each gives the changed config and plan, or None where it changes nothing."""


def _named(name: str, config: RunConfig, plan: Plan) -> str:
    return name.format(config=config, plan=plan)


__all__ = ["as_json", "check", "decide", "refuse_unless_fits", "render"]
