"""The bytes of each phase of a run under one plan: counted parts, traced parts, and stated constants."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from burnish.adapt.methods import METHODS
from burnish.config import AdaptConfig, ModelConfig, Plan, RunConfig, TrainConfig
from burnish.load.fill import SLAB_BYTES
from burnish.load.pretrained import Pretrained
from burnish.load.weights import open_weights
from burnish.parallel.imagined import can_imagine
from burnish.parallel.world import launched_machines
from burnish.plan import bytes as counting
from burnish.plan.bytes import ADAPTERS, FROZEN, GRADIENTS, MOMENTS, Persistent
from burnish.plan.disk import on_disk
from burnish.plan.few import Infos
from burnish.plan.live import GAINS, GATHERED, WORK
from burnish.plan.machine import Machine
from burnish.plan.report import Part, Phase
from burnish.plan.trace import (
    BACKWARD,
    FORWARD,
    HEAD,
    HEAD_AGAIN,
    KEPT,
    Trace,
    gradients_stay,
    record_step,
    replay_step,
    trace_forward,
    trace_generation,
)
from burnish.train.optimizer import OPTIMIZERS

# Context and kernels of one process on a GPU. nvidia-smi counts it, and `torch.cuda.memory_reserved` does not. On an H100 0.54 GB when it
# is made and 0.79 to 0.87 once kernels are loaded (benchmarks/on_gpu.py); GPUs with fewer multiprocessors need less.
CUDA_CONTEXT = 900_000_000
# cuBLAS's, one for the thread that goes forward and one for that which goes backward: 32 MiB each on Hopper, 8 MiB on others (torch's
# CUDABlas.cpp). The allocator counts them.
WORKSPACES = 2 * (32 << 20)
# Buffers of one communicator: NCCL_BUFFSIZE is 4 MiB (NCCL's user guide, "Environment Variables"), one for each direction of each channel,
# of which there are at most 32 by default (`MAXCHANNELS` in NCCL's device.h). Ranks of `hybrid` are in two more. Not measured here.
NCCL_BYTES = 2 * 32 * (4 << 20)
# Resident memory after importing torch, transformers and bitsandbytes: 0.45 GB measured for CPUs; CUDA's libraries bring it to about 2 GB.
PROCESS = {"cpu": 500_000_000, "cuda": 2_000_000_000}
# Rounded blocks ("Memory management" in torch's CUDA notes) and fragments of torch's allocator on a GPU, whose segments grow
# (`burnish/__init__.py`): always, and as a share of all that is allocated and freed again. On an H100 a run that was capped at 0.07 GB
# above what it held ended with 0.09 GB in pieces; one with 2.7 GB above 62 did not (benchmarks/on_gpu.py). The share is a guess.
PIECES, SLACK = 250_000_000, 0.05
# The same of glibc's heap, which breaks up: an upper bound of what was found on SmolLM2-135M with 512 to 2,048 tokens at a time
# (docs/planning.md). Gradients of adapters come between what is freed and hold its pages; and some of the widest activations beside that.
HEAP_BYTES, HEAP_BYTES_WITH_ADAPTERS, HEAP_WIDEST = 350_000_000, 600_000_000, 40
# Of a token: its number, its position, where it is predicted and what it is, in 64 bits each.
TOKEN_BYTES = 32
# While a slab is encoded: its rows as read and in fp32, what a format makes of them, as decoded again, their squares. 8.7 is the most that
# was counted (hqq, where a whole slab is solved at a time); 6 the most of resident memory on a CPU, with what the heap keeps (nf4).
SLABS = 9


class Measure:
    """Counts and traces of one base model. Remembers them: many plans share most.

    `longest`: tokens of the longest sample that is trained, where that is known; else one fills its context, which attends most.
    """

    def __init__(self, pretrained: Pretrained, longest: int | None = None) -> None:
        self.pretrained, self.longest = pretrained, longest
        self._counts: dict[object, Persistent] = {}
        self._traces: dict[object, Any] = {}
        self._stored: Infos = None

    def persistent(self, model: ModelConfig, adapt: AdaptConfig, train: TrainConfig, plan: Plan) -> Persistent:
        shards = plan.shards
        key = (model, adapt, train, plan.dtype, shards)
        if key not in self._counts:
            self._counts[key] = counting.persistent(
                counting.meta(self.pretrained.config, model, adapt, plan, self._infos(model)), train, shards
            )
        return self._counts[key]

    def step(self, model: ModelConfig, adapt: AdaptConfig, plan: Plan, context: int) -> Trace:
        """The training step. One recording serves plans that differ in accumulation, or in what waits in host memory.

        A base in host memory is gathered by us and not by FSDP2, which is then left out of the recording: `_gathered` stands for it.
        """
        same = _simulated(plan)
        simulated = same if plan.sharded and not plan.offload_base else replace(same, ranks=1, strategy="single", shard_ranks=0)
        recorded = self._once(record_step, model, adapt, simulated, context, longest=self.longest)
        return replay_step(recorded, adapt, plan)

    def forward(self, model: ModelConfig, adapt: AdaptConfig, plan: Plan, contexts: int, context: int) -> Trace:
        return self._once(trace_forward, model, adapt, _evaluating(plan), contexts, context)

    def generation(self, model: ModelConfig, adapt: AdaptConfig, plan: Plan, prompts: int, tokens: int) -> Trace:
        return self._once(trace_generation, model, adapt, _evaluating(plan.alone), prompts, tokens)

    def _once(self, trace: Callable[..., Any], model: ModelConfig, adapt: AdaptConfig, plan: Plan, *sizes: int, **more: Any) -> Any:
        key = (trace, model, adapt, plan, sizes, *more.values())
        if key not in self._traces:
            self._traces[key] = trace(self.pretrained.config, model, adapt, plan, *sizes, infos=self._infos(model), **more)
        return self._traces[key]

    def _infos(self, model: ModelConfig) -> Infos:
        """What the base's files hold, where the plan depends on it: read once, headers alone."""
        if model.keeps_stored and self._stored is None:
            self._stored = open_weights(self.pretrained).infos
        return self._stored


def _evaluating(plan: Plan) -> Plan:
    """What a pass without gradients depends on."""
    return replace(_simulated(plan), micro_batch=1, checkpointing=False, checkpoint_every=1)


def _simulated(plan: Plan) -> Plan:
    """The plan without what no simulated pass depends on."""
    offloads = {"offload_activations": False, "offload_base": False, "offload_base_after": False}
    return replace(plan, accumulation=1, evaluate_batch=0, **offloads)


def needed(config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> tuple[Phase, ...]:
    """The phases that decide whether a plan fits: load, training step (the first and every other) and save, on device and host."""
    kept = measure.persistent(config.model, config.adapt, config.train, plan)
    step, waiting = _step(kept, config, plan, measure), _waiting(kept, config, plan, measure)
    process, here = Part("Python and its libraries", PROCESS[plan.device]), plan.ranks // launched_machines()
    saved = Part("trained weights and moments, whole", kept.kept if plan.shards > 1 or plan.device == "cuda" else 0)
    if plan.device == "cpu":
        memory = min(machine.device_bytes, machine.host_bytes)
        held = (
            *_resident(kept, plan, *FROZEN, ADAPTERS),
            *_base_waiting(kept, plan),
            Part(MOMENTS, kept.parts[MOMENTS], exact=True),
            process,
        )
        return (
            *loading(config, plan, machine, measure),
            Phase("train step", "memory", (*step, *waiting, process), memory // here, processes=here),
            Phase("save", "memory", (*held, saved, *_beside(held, here)), memory),
        )
    return (
        *loading(config, plan, machine, measure),
        Phase("train step", "GPU", (*step, *_driver(plan)), machine.device_bytes),
        Phase("train step", "memory", (*waiting, process), machine.host_bytes // here, processes=here),
        Phase("save", "memory", (*waiting, process, saved, *_beside((*waiting, process), here)), machine.host_bytes),
    )


def loading(config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> tuple[Phase, ...]:
    """The first of these phases, on device and host. Counted alone: no step is simulated for it."""
    kept = measure.persistent(config.model, config.adapt, config.train, plan)
    slabs, process = _slabs(measure, config, plan), Part("Python and its libraries", PROCESS[plan.device])
    resident, base, here = _resident(kept, plan, *FROZEN, ADAPTERS), _base_waiting(kept, plan), plan.ranks // launched_machines()
    if plan.device == "cpu":
        memory = min(machine.device_bytes, machine.host_bytes)
        return (Phase("load", "memory", (*resident, *base, slabs, process), memory // here, processes=here),)
    return (
        Phase("load", "GPU", (*resident, slabs, *_driver(plan)), machine.device_bytes),
        Phase("load", "memory", (*base, slabs, process), machine.host_bytes // here, processes=here),
    )


def _beside(held: tuple[Part, ...], here: int) -> tuple[Part, ...]:
    """What the other processes of this machine hold while one of them has something whole."""
    return (Part("the other processes", (here - 1) * sum(part.bytes for part in held)),) if here > 1 else ()


def _driver(plan: Plan) -> tuple[Part, ...]:
    """What libraries take of a GPU's memory in one process, whatever it trains."""
    groups = 0 if plan.ranks == 1 else 3 if plan.hybrid else 1
    return (
        Part("CUDA context", CUDA_CONTEXT),
        Part("cuBLAS workspaces", WORKSPACES),
        *((Part("NCCL buffers", groups * NCCL_BYTES),) if groups else ()),
    )


def with_afterwards(config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> Plan:
    """The plan with what one process can evaluate and export so: fewer prompts at a time, then the base in host memory; where neither fits,
    the base stays where training has it."""
    for way in _ways_afterwards(config, plan):
        batch = config.evaluate.batch
        while batch:
            one = way if batch == config.evaluate.batch else replace(way, evaluate_batch=batch)
            evaluation, *more = after(config, one, machine, measure)
            whatever = all(phase.fits for phase in more)  # these do not ask how many prompts there are
            if whatever and evaluation.fits:
                return one
            batch = batch // 2 if whatever else 0
    return replace(plan, offload_base_after=plan.offload_base)


def unfit_afterwards(config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> tuple[Phase, ...]:
    """What does not fit on one process whichever way it is done: the phases as they were asked; () where some way fits."""
    for way in _ways_afterwards(config, plan):
        if all(phase.fits for phase in after(config, replace(way, evaluate_batch=1), machine, measure)):
            return ()
    as_trained = replace(plan, offload_base_after=plan.offload_base)
    return tuple(phase for phase in after(config, as_trained, machine, measure) if not phase.fits)


def _ways_afterwards(config: RunConfig, plan: Plan) -> tuple[Plan, ...]:
    """With the base on the device, then in host memory where it can be moved there."""
    movable = plan.device == "cuda" and METHODS[config.adapt.method].formats != ("none",)
    return tuple(replace(plan, offload_base_after=there) for there in ((False, True) if movable else (plan.offload_base,)))


def after(config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> tuple[Phase, ...]:
    """Evaluation and export, on one process with the whole model."""
    alone = plan.alone
    kept = measure.persistent(config.model, config.adapt, config.train, alone)
    on_gpu = plan.device == "cuda"
    place, limit = ("GPU", machine.device_bytes) if on_gpu else ("memory", min(machine.device_bytes, machine.host_bytes))
    constant = _driver(alone) if on_gpu else (Part("Python and its libraries", PROCESS["cpu"]),)
    whole = _resident(kept, alone, *FROZEN, ADAPTERS)
    slabs = _slabs(measure, config, plan)
    prompts, context = plan.evaluate_batch or config.evaluate.batch, config.data.context
    answers = measure.generation(config.model, config.adapt, plan, prompts, context + config.evaluate.new_tokens)
    losses = measure.forward(config.model, config.adapt, alone, 1, context)
    fullest, heap = max(answers, losses, key=lambda trace: trace.peak), _heap(config, measure, 1)
    work = _parts(fullest, plan, heap, kept="keys and values", head="work in one layer and the head")
    alone_fit = sum(part.bytes for part in (*whole, *constant)) < limit
    way_out = f"Counted for {prompts} prompts of {context} tokens: a lower evaluate.batch needs less." if alone_fit and prompts > 1 else ""
    phases = (
        Phase("evaluate", place, (*whole, *work, *constant), limit, required=False, way_out=way_out),
        Phase("export", place, (*whole, slabs, *constant), limit, required=False),
    )
    if not (on_gpu and alone.offload_base):
        return phases
    host = (*_base_waiting(kept, alone), slabs, Part("Python and its libraries", PROCESS["cuda"]))
    return (*phases, *(Phase(name, "memory", host, machine.host_bytes, required=False) for name in ("evaluate", "export")))


def others(config: RunConfig, plan: Plan, machine: Machine, measure: Measure, local: bool) -> tuple[Phase, ...]:
    """Validation between two steps, the phases after training, and the disk. `local`: the base's files are here already."""
    disk = on_disk(config, measure.persistent(config.model, config.adapt, config.train, plan.alone), local)
    return (*_validation(config, plan, machine, measure), *after(config, plan, machine, measure), *disk)


def _validation(config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> tuple[Phase, ...]:
    """The loss on rows that are not trained, where there are any: on all ranks, beside the optimizer's moments."""
    if not config.data.validation:
        return ()
    kept = measure.persistent(config.model, config.adapt, config.train, plan)
    passed = measure.forward(config.model, config.adapt, plan, 1, config.data.context)
    stays = (*FROZEN, ADAPTERS, *((GRADIENTS,) if plan.strategy == "ddp" else ()), *(() if _paged(config) else (MOMENTS,)))
    parts = (*_resident(kept, plan, *stays), *_parts(passed, plan, _heap(config, measure, 1)))
    if plan.device == "cuda":
        return (Phase("validation", "GPU", (*parts, *_driver(plan)), machine.device_bytes),)
    here = plan.ranks // launched_machines()
    limit = min(machine.device_bytes, machine.host_bytes) // here
    return (Phase("validation", "memory", (*parts, Part("Python and its libraries", PROCESS["cpu"])), limit, processes=here),)


def _paged(config: RunConfig) -> bool:
    return OPTIMIZERS[config.train.optimizer].paged


def _step(kept: Persistent, config: RunConfig, plan: Plan, measure: Measure) -> tuple[Part, ...]:
    """One step. Moments are made before the first, and gradients freed after each, so that all steps need the same."""
    trace, kind = measure.step(config.model, config.adapt, plan, config.data.context), OPTIMIZERS[config.train.optimizer]
    stay = gradients_stay(plan, config.adapt)
    # FSDP2 keeps those of adapters unspread; DDP makes them anew beside its buckets, which they are copied into in the last pass
    beside = plan.strategy == "ddp" or (plan.sharded and not stay)
    whole = kept.trained if beside and plan.accumulation > 1 else 0
    update = kept.parts[ADAPTERS] if plan.device == "cuda" else kind.scratch * kept.largest
    if trace.after + update > trace.peak + whole:
        trace = replace(trace, at=UPDATE, parts={GRADIENTS: trace.after, WORK: update})
        whole = 0
    gathered = _gathered(kept, plan, measure) if plan.shards > 1 and (plan.offload_base or not can_imagine()) else 0
    return (
        *_resident(kept, plan, *FROZEN, ADAPTERS, *((GRADIENTS,) if stay else ()), *(() if kind.paged else (MOMENTS,))),
        Part("step counts", kept.step_counters, exact=True),
        Part("tokens of the step", TOKEN_BYTES * (plan.micro_batch * config.data.context + 1) * plan.accumulation),
        *((Part("gradients of earlier micro-batches, whole", whole, exact=True),) if whole else ()),
        *((Part("gathered layers", gathered),) if gathered else ()),
        *_parts(trace, plan, _heap(config, measure, plan.micro_batch), others=gathered),
    )


UPDATE = "update"
NAMES = {
    FORWARD: "decoded tiles and work in one layer",
    HEAD: "logits and loss",
    HEAD_AGAIN: "logits and loss",
    BACKWARD: "decoded tiles and work in one layer",
    UPDATE: "optimizer's work",
}


def _parts(trace: Trace, plan: Plan, heap: int, kept: str = "activations", head: str = "", others: int = 0) -> tuple[Part, ...]:
    """What was alive when most was, and what the allocator makes of it."""
    names = {GATHERED: "gathered layers", KEPT: kept, GAINS: "gains of DoRA", GRADIENTS: GRADIENTS, WORK: head or NAMES[trace.at]}
    parts = [Part(name, trace.parts[part]) for part, name in names.items() if part in trace.parts]
    moved = PIECES + SLACK * (trace.peak + others) if plan.device == "cuda" else heap
    return (*parts, Part("allocator", round(moved)))


def _heap(config: RunConfig, measure: Measure, contexts: int) -> int:
    """What a CPU's heap holds on to beside what is alive."""
    base = measure.pretrained.config
    width = max(base.hidden_size, getattr(base, "intermediate_size", None) or 4 * base.hidden_size)
    always = HEAP_BYTES_WITH_ADAPTERS if METHODS[config.adapt.method].adapts else HEAP_BYTES
    return always + HEAP_WIDEST * contexts * config.data.context * width * 4


def _gathered(kept: Persistent, plan: Plan, measure: Measure) -> int:
    """An upper bound of what FSDP2 gathers, where it was not recorded (this process has ranks already and cannot imagine others; or the
    base is in host memory): its largest group twice, as a flat buffer and as the parameters that are copied out of it; two decoder layers
    so, or all of them once; and a layer's gradients twice, whole and in the flat buffer that they are spread from."""
    layers = measure.pretrained.config.num_hidden_layers + 1 if plan.stays_gathered else 2
    layer = kept.layer_without_base if plan.offload_base else kept.layer
    return 2 * kept.root + (layers + 1) * layer + 2 * kept.gradients


def _resident(kept: Persistent, plan: Plan, *names: str) -> tuple[Part, ...]:
    """Counted parts on the device: all of them, or two decoder layers in the place of a base that waits in host memory, and this rank's
    rows of a third where they are gathered."""
    moved, slots = (kept.moved, 2 * max(kept.base_layers)) if plan.offload_base else ({}, 0)
    parts = tuple(Part(name, kept.parts[name] - moved.get(name, 0), exact=True) for name in names)
    share = max(kept.base_shares) if slots and plan.shards > 1 else 0
    parts += (Part("two layers of the base", slots, exact=True),) if slots else ()
    return (*parts, Part("rows of a layer that is gathered", share, exact=True)) if share else parts


def _base_waiting(kept: Persistent, plan: Plan) -> tuple[Part, ...]:
    """This rank's rows of a base in host memory, where torch rounds a pinned tensor up to a power of 2."""
    pinned = plan.device == "cuda"
    rows = sum(1 << (count - 1).bit_length() if pinned else count for count in kept.base_shares)
    return (Part("base in host memory", rows),) if plan.offload_base else ()


def _waiting(kept: Persistent, config: RunConfig, plan: Plan, measure: Measure) -> tuple[Part, ...]:
    """What training keeps in host memory instead of on the device; the base first."""
    parts = [*_base_waiting(kept, plan)]
    if plan.offload_activations and plan.checkpointing:
        parts.append(Part("activations in host memory", measure.step(config.model, config.adapt, plan, config.data.context).moved))
    if OPTIMIZERS[config.train.optimizer].paged:
        parts.append(Part(MOMENTS, kept.parts[MOMENTS]))
    return tuple(parts)


def _slabs(measure: Measure, config: RunConfig, plan: Plan) -> Part:
    """Rows of one matrix in fp32. The files' own pages are the system's to take back, and are not counted."""
    widest = measure.persistent(config.model, config.adapt, config.train, plan.alone).widest
    return Part("rows being read and quantized", SLABS * min(SLAB_BYTES, 4 * widest))
