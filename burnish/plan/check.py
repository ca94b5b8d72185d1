"""What is asked against itself and against the machine: contradictions, all in one message, before anything is measured."""

from burnish.adapt import methods
from burnish.adapt.methods import METHODS
from burnish.config import PlanConfig, RunConfig
from burnish.errors import UserError
from burnish.load.pretrained import Pretrained
from burnish.parallel.world import launched_machines
from burnish.plan.machine import Machine
from burnish.train import optimizer
from burnish.train.progress import check_installed
from burnish.words import counted


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
        gpus = counted(machine.devices, "GPU")
        problems.append(f"plan.ranks = {pins.ranks}: each needs a GPU, and this machine has {gpus}. Set plan.ranks={machine.devices}.")
    if pins.shard_ranks and not pins.strategy.startswith("hybrid"):
        problems.append(f"plan.shard_ranks = {pins.shard_ranks} is for plan.strategy=hybrid; plan.strategy is {pins.strategy!r}.")

    problems += methods.conflicts(config.adapt, config.model.format, config.model.ends)
    try:
        METHODS[config.adapt.method].growth(pretrained.config, config.adapt)
    except UserError as problem:
        problems.append(str(problem))
    writers = methods.writers(config.export, config.adapt)
    if not METHODS[config.adapt.method].adapts and "peft" in writers:
        problems.append(
            f"export.writers has 'peft', which holds adapters, and adapt.method = {config.adapt.method!r} has none. "
            'Set export.writers=["transformers"].'
        )
    if machine.device == "cuda" and config.model.autocast == "bf16" and not machine.bf16:
        problems.append(f"model.autocast = 'bf16': {machine.name} has no bf16. Set model.autocast=fp16.")
    if "gguf" in writers and config.model.ends not in ("none", "stored"):
        own = f"the file's own embeddings are written, and model.ends = {config.model.ends!r} trains on others"
        problems.append(f"export.writers = 'gguf': {own}. Set model.ends=stored or none.")
    if machine.device == "cuda" and config.model.dtype == "bf16" and not machine.bf16:
        problems.append(f"model.dtype = 'bf16': {machine.name} has no bf16. Set model.dtype=fp16.")
    if "gguf" in writers and (pretrained.gguf is None or config.model.format != "stored"):
        needs = "writes the base's own GGUF file anew with what was trained folded into it"
        problems.append(f"export.writers = 'gguf' {needs}: it needs a .gguf file as model.path and model.format=stored.")
    problems += optimizer.problems(config.train, machine.device, pins.strategy, config.model.dtype)
    problems += _offload_problems(pins, machine)
    if pins.offload_base and METHODS[config.adapt.method].formats == ("none",):
        problems.append(
            f"plan.offload_base = true: adapt.method = {config.adapt.method!r} trains the whole base, so none of it is frozen. "
            "Leave it out, or set adapt.method=dora."
        )
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
    if pins.offload_base and pins.strategy == "ddp":
        found.append(
            "plan.offload_base = true: with ddp each process would keep a whole base in host memory, and copy all of it twice in a step. "
            "Set plan.strategy=fsdp: there each keeps and copies its own rows alone."
        )
    if pins.offload_base and pins.strategy.endswith("-grad"):
        without = pins.strategy.removesuffix("-grad")
        found.append(
            f"plan.offload_base = true brings a layer to the GPU for as long as it runs, and plan.strategy = {pins.strategy!r} keeps all "
            f"of them there until the backward pass. Set plan.strategy={without}, or leave plan.offload_base out."
        )
    return found
