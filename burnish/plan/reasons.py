"""What was chosen, in words, and why: from the pins, and from what was tried."""

import math
from collections.abc import Callable
from typing import Literal

from burnish.config import Plan, RunConfig
from burnish.plan.axes import ENOUGH_TOKENS, share
from burnish.plan.cost import DISK, DOWNLOAD, Start, Step, in_words
from burnish.plan.machine import Machine
from burnish.plan.report import WHERE, Candidate, Decision
from burnish.plan.search import Tried
from burnish.words import counted, gb, gb_of

FEW_STEPS = 20
"""With fewer optimizer steps than this, a run with usual rates learns next to nothing."""


def decisions(config: RunConfig, machine: Machine, tried: tuple[Tried, ...]) -> list[Decision]:
    """A line for each thing that was decided. `tried[0]` is the choice."""
    plan = tried[0].plan
    made = [
        Decision("processes", str(plan.ranks), _ranks(config, machine, plan)),
        Decision("strategy", plan.strategy + (f", groups of {plan.shard_ranks}" if plan.hybrid else ""), _strategy(config, machine, tried)),
        Decision("dtype", plan.dtype, dtype_of(config, machine)[1]),
        Decision("checkpointing", checkpointing_in_words(plan), _checkpointing(config, tried)),
        Decision("micro-batch", f"{plan.micro_batch} × {config.data.context} tokens", _micro_batch(config, tried[0])),
        Decision("accumulation", str(plan.accumulation), _accumulation(config, plan)),
    ]
    if plan.offload_base:
        made.insert(4, Decision("base", "in host memory", _base(config, tried)))
    if machine.host_of_here:
        made.append(Decision("host memory", gb(machine.host_bytes), "this machine's, since none was given: --ram=64GB says another's"))
    return made


def _accumulation(config: RunConfig, plan: Plan) -> str:
    """How a step's contexts are spread, and who waits for others where they do not come out even."""
    rows, ranks = config.train.rows_per_step, plan.ranks
    spread = f"{counted(rows, 'context')} in a step, over {ranks} × {plan.micro_batch}"
    waiting = f"; waiting for the others: {-rows % ranks} (none with a multiple of {ranks} in train.rows_per_step)"
    return spread + (waiting if rows % ranks else "")


def dtype_of(config: RunConfig, machine: Machine) -> tuple[Literal["fp32", "bf16", "fp16", "fp64"], str]:
    """The compute dtype, and why."""
    asked = config.model.dtype
    if config.model.autocast != "none":
        return "fp32", f"with products in {config.model.autocast}, as model.autocast says"
    if asked != "auto":
        slow = asked in ("fp16", "bf16") and machine.device == "cpu"
        return asked, "as model.dtype says" + (f", though most CPUs compute {asked} slowly" if slow else "")
    if machine.device == "cuda":
        return ("bf16", "this GPU has it") if machine.bf16 else ("fp16", "this GPU has no bf16; the loss is scaled")
    return "fp32", "a CPU: few are faster in bf16 (model.dtype=bf16 tries)"


def length(config: RunConfig, contexts: int | None, step: Step) -> list[Decision]:
    """How many steps, and how long each and all of them take. `contexts`: of an epoch, where that is known."""
    speed = f"{in_words(step.seconds)} a step"
    about = f"{step.tokens / step.seconds:,.0f} tokens/s, held up by {step.bound}: an estimate (docs/plan_search.md)"
    if contexts is None and config.train.steps is None:
        return [Decision("time", speed, about)]
    steps = config.train.steps or math.ceil((contexts or 0) * config.train.epochs / config.train.rows_per_step)
    epochs = f"{config.train.epochs:g} epoch{'s' * (config.train.epochs != 1)}"
    why = "as train.steps says" if config.train.steps else f"{epochs} of {counted(contexts or 0, 'context')}"
    few = "; that is few: a lower train.rows_per_step or data.context, or more train.epochs, gives more" if steps < FEW_STEPS else ""
    return [Decision("steps", str(steps), why + few), Decision("time", f"{in_words(steps * step.seconds)}, {speed}", about)]


def afterwards(config: RunConfig, plan: Plan, token_seconds: float) -> list[Decision]:
    """What evaluation and export, which are one process's with the whole model, do otherwise than they were asked or than training did.

    `token_seconds`: see `token_cost`.
    """
    made = []
    if plan.offload_base_after and not plan.offload_base:
        why = "there is no room on one GPU with the whole model: evaluation and export are slower"
        made.append(Decision("afterwards", "base in host memory", why))
    if plan.evaluate_batch:
        prompts = f"{plan.evaluate_batch} prompts at a time"
        made.append(Decision("evaluation", prompts, f"there is no room for {config.evaluate.batch} of {config.data.context} tokens"))
    if plan.alone.offload_base:
        speed = f"{in_words(token_seconds)} for each token of a batch"
        made.append(
            Decision(
                "answers",
                speed,
                f"up to {config.evaluate.new_tokens} tokens each; for every one the base comes from host memory: an estimate",
            )
        )
    return made


def starting(start: Start) -> Decision:
    """How long until the first step."""
    download = f"{in_words(start.download)} of download, then " if start.download else ""
    again = f"; {in_words(start.again)} from the second time on" if start.again < start.first else ""
    speed = f"at {gb(round(DISK))} a second from disk" + (f", {gb(round(DOWNLOAD))} from the hub" if start.download else "")
    return Decision("start", f"{download}{in_words(start.first)}{again}", f"{speed}: an estimate")


def checkpointing_in_words(plan: Plan) -> str:
    if not plan.checkpointing:
        return "none"
    every = "layers" if plan.checkpoint_every == 1 else f"every {plan.checkpoint_every} layers"
    return f"{every}, kept in host memory" if plan.offload_activations else every


def plan_in_words(plan: Plan, with_micro_batch: bool = True) -> str:
    """A candidate on one line: `fsdp on 2, checkpointing layers, base in host memory, micro-batch 2`."""
    groups = f" in groups of {plan.shard_ranks}" if plan.hybrid else ""
    base = ", base in host memory" if plan.offload_base else ""
    size = f", micro-batch {plan.micro_batch}" if with_micro_batch else ""
    return f"{plan.strategy} on {plan.ranks}{groups}{base}, checkpointing {checkpointing_in_words(plan)}{size}"


def candidates(tried: tuple[Tried, ...]) -> tuple[Candidate, ...]:
    """What was tried, the choice first; then of each strategy the candidate that comes closest to fitting, then the others."""
    closest: dict[tuple[str, int, bool], Tried] = {}
    for one in tried[1:]:
        if not one.fits:
            group = (one.plan.strategy, one.plan.shard_ranks, one.plan.offload_base)
            closest[group] = min(closest.get(group, one), one, key=_excess)
    first = [one for one in tried[1:] if any(one is other for other in closest.values())]
    rest = [one for one in tried[1:] if not any(one is other for other in first)]
    return tuple(
        Candidate(
            plan_in_words(one.plan, one.tight is not None),
            one.seconds,
            _verdict(one, tried[0]),
            one.fits if one.tight is not None else None,
            one.tight is not None,
        )
        for one in (tried[0], *first, *rest)
    )


def _excess(one: Tried) -> float:
    return one.tight.share if one.tight else float("inf")


def _verdict(one: Tried, chosen: Tried) -> str:
    if one.tight is None:
        return "slower, not measured"
    if not one.fits:
        largest = max(one.tight.parts, key=lambda part: part.bytes)
        of = f"{gb_of(one.tight.bytes, one.tight.limit_bytes)} {one.tight.place}"
        return f"{one.tight.name} takes {of}, most of it {largest.name} ({gb(largest.bytes)})"
    return "chosen" if one is chosen else "fits"


def _ranks(config: RunConfig, machine: Machine, plan: Plan) -> str:
    if config.plan.ranks:
        return "as plan.ranks says"
    if machine.device == "cpu":
        return "one process uses all cores"
    if config.plan.strategy == "single":
        return "as plan.strategy=single says"
    return f"one for each GPU ({machine.name})" if plan.ranks == machine.devices else f"one of the {machine.devices} GPUs ({machine.name})"


def _strategy(config: RunConfig, machine: Machine, tried: tuple[Tried, ...]) -> str:
    plan, asked = tried[0].plan, config.plan.strategy
    if plan.hybrid and asked.startswith("hybrid"):
        why = "as plan.shard_ranks says" if config.plan.shard_ranks else "the ranks of one machine"
        return f"{plan.ranks // plan.shard_ranks} copies, each cut over {plan.shard_ranks} ranks, {why}"
    if plan.ranks == 1 and (machine.devices == 1 or asked != "auto" or config.plan.ranks or config.plan.offload_base):
        return "one process" if asked in ("auto", "single") else f"one process: {asked} over one is the same"
    if asked != "auto":
        return f"as plan.strategy says ({asked} over one is the same)" if plan.ranks == 1 else "as plan.strategy says"
    tight = tried[0].tight
    if plan.strategy == "ddp" and tight is not None and tight.fits:
        return f"each process has room for the whole model: {gb_of(tight.bytes, tight.limit_bytes)}"
    return _instead(
        tried, lambda other: other.strategy != plan.strategy, {"ddp": "a whole model in each process", "fsdp": "a shard in each"}
    )


def _checkpointing(config: RunConfig, tried: tuple[Tried, ...]) -> str:
    plan, pins = tried[0].plan, config.plan
    if pins.checkpointing != "auto":
        return "as plan.checkpointing says"
    if pins.offload_activations:
        return "plan.offload_activations moves what it keeps"
    if not plan.checkpointing:
        return "everything fits without recomputing" if tried[0].fits else "needs least"
    alike = [one for one in tried if one.tight and not one.fits and not one.plan.checkpointing and one.plan.strategy == plan.strategy]
    if not alike:
        return "nothing that recomputes less fits"
    one = next((one for one in alike if one.plan.offload_base == plan.offload_base), alike[0])
    assert one.tight is not None
    kept = sum(part.bytes for part in one.tight.parts if part.name == "activations")
    of_that = f", {gb(kept)} of that activations" if kept else ""
    return f"without it {one.tight.name} takes {gb_of(one.tight.bytes, one.tight.limit_bytes)}{of_that}"


def _base(config: RunConfig, tried: tuple[Tried, ...]) -> str:
    rounded = "; pinned, each layer rounded up to a power of 2" if tried[0].plan.device == "cuda" else ""
    if config.plan.offload_base:
        return f"as plan.offload_base says{rounded}"

    def other(plan: Plan) -> bool:
        return not plan.offload_base and plan.ranks == tried[0].plan.ranks

    there = _instead(tried, other, {"single": "on the GPU it"})
    untried = [one.seconds for one in tried if one.tight is None and other(one.plan)]
    slower = f"; with more recomputation it may fit, in {in_words(min(untried))} a step or more" if untried else ""
    return f"{there}{slower}{rounded}"


def _instead(tried: tuple[Tried, ...], other: Callable[[Plan], bool], names: dict[str, str]) -> str:
    """What another choice would take: of those that do not fit, the one that comes closest; else the fastest of those that do."""
    tight = [(one, one.tight) for one in tried if one.tight is not None and not one.fits and other(one.plan)]
    if tight:
        one, phase = min(tight, key=lambda pair: pair[1].share)
        return f"{names.get(one.plan.strategy, one.plan.strategy)} takes {gb_of(phase.bytes, phase.limit_bytes)} {WHERE[phase.place]}"
    best = min((one for one in tried if other(one.plan)), key=lambda one: one.seconds, default=None)
    if best is None:
        return "there is no other"
    plainer = ", which is not clearly less" if best.seconds < tried[0].seconds else ""
    return f"{in_words(tried[0].seconds)} a step; {best.plan.strategy} takes {in_words(best.seconds)}{plainer}"


def _micro_batch(config: RunConfig, chosen: Tried) -> str:
    plan = chosen.plan
    if config.plan.micro_batch == plan.micro_batch:
        return "as plan.micro_batch says"
    if config.plan.micro_batch:
        return f"all of the {plan.micro_batch} that a process has in a step: plan.micro_batch = {config.plan.micro_batch} is more"
    if chosen.over is not None:
        larger, tight = chosen.over
        return f"{larger} at a time take {gb_of(tight.bytes, tight.limit_bytes)}"
    mine = share(config, plan)
    if not chosen.fits:
        return "one context at a time needs least"
    if plan.device == "cpu" and plan.micro_batch * config.data.context >= ENOUGH_TOKENS and 2 * plan.micro_batch <= mine:
        return "more tokens at a time are no faster on a CPU"
    return f"{'all' if plan.micro_batch == mine else 'the largest power of 2'} of the {mine} that a process has in a step"
