"""The bytes of each phase of a run under one plan: counted parts, traced parts, and stated constants."""

import shutil
from dataclasses import replace
from pathlib import Path

from burnish.adapt.methods import METHODS
from burnish.config import AdaptConfig, ModelConfig, Plan, RunConfig, TrainConfig
from burnish.load.fill import SLAB_BYTES
from burnish.load.pretrained import Pretrained
from burnish.load.weights import open_weights
from burnish.model.network import DTYPES
from burnish.parallel.world import launched_machines
from burnish.plan import bytes as counting
from burnish.plan.bytes import ADAPTERS, FROZEN, GRADIENTS, MOMENTS, Persistent
from burnish.plan.machine import Machine
from burnish.plan.report import Part, Phase
from burnish.plan.trace import Infos, Trace, trace_forward, trace_step
from burnish.runs import cache_root
from burnish.train.optimizer import OPTIMIZERS

# Context, kernels and cuBLAS workspaces of one process on a GPU: 0.3 to 0.6 GB by driver and GPU (not measured here).
CUDA_CONTEXT = 500_000_000
# Resident memory after importing torch, transformers and bitsandbytes: 0.45 GB measured for CPUs; CUDA's libraries bring it to about 2 GB.
PROCESS = {"cpu": 500_000_000, "cuda": 2_000_000_000}
# Rounded blocks and fragments of torch's allocator on a GPU, as a share of all that is allocated and freed again.
SLACK = 0.05
# The same of glibc's heap, which decoded tiles and gradients break up: measured on SmolLM2-135M at 512 tokens, resident memory lay 0.8 GB
# above what was alive with 0.78 GB of activations kept, and 0.5 GB above it with checkpointing.
HEAP_SHARE, HEAP_BYTES = 0.7, 500_000_000
# While a slab is encoded: its rows as read and in fp32, what a format makes of them, as decoded again, their squares. 8.7 is the most that
# was counted (hqq, where a whole slab is solved at a time); 6 the most of resident memory on a CPU, with what the heap keeps (nf4).
SLABS = 9
# FSDP2 at its fullest: one decoder layer in use, the next one gathered, and its copy out of the flat buffer that it is gathered into.
GATHERED_LAYERS = 3
# Its gradients, and their copy into the flat buffer that they are spread from.
SPREAD_GRADIENTS = 2


class Measure:
    """Counts and traces of one base model. Remembers them: many plans share most."""

    def __init__(self, pretrained: Pretrained) -> None:
        self.pretrained = pretrained
        self._counts: dict[object, Persistent] = {}
        self._traces: dict[object, Trace] = {}
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
        key = (model, adapt, plan.dtype, plan.device, plan.checkpointing, plan.checkpoint_every, plan.offload_activations)
        key += (plan.micro_batch, context)
        if key not in self._traces:
            self._traces[key] = trace_step(self.pretrained.config, model, adapt, plan, context, self._infos(model))
        return self._traces[key]

    def forward(self, model: ModelConfig, adapt: AdaptConfig, plan: Plan, contexts: int, context: int) -> int:
        key = (model, adapt, plan.dtype, plan.device, "forward", contexts, context)
        if key not in self._traces:
            self._traces[key] = trace_forward(self.pretrained.config, model, adapt, plan, contexts, context, self._infos(model))
        return self._traces[key].peak

    def _infos(self, model: ModelConfig) -> Infos:
        """What the base's files hold, where the plan depends on it: read once, headers alone."""
        if model.keeps_stored and self._stored is None:
            self._stored = open_weights(self.pretrained).infos
        return self._stored


def needed(config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> tuple[Phase, ...]:
    """The phases that decide whether a plan fits: load and training step, on the device and on the host."""
    kept = measure.persistent(config.model, config.adapt, config.train, plan)
    step = _step(kept, config, plan, measure)
    slabs = _slabs(measure, config, plan)
    process = Part("Python and its libraries", PROCESS[plan.device])
    waiting = _waiting(kept, config, plan, measure)
    base = waiting[:1] if plan.offload_base else ()
    here = plan.ranks // launched_machines()
    host = machine.host_bytes // here
    if plan.device == "cpu":
        limit = min(machine.device_bytes, machine.host_bytes) // here
        load = (*_resident(kept, plan, *FROZEN, ADAPTERS), *base, slabs, process)
        return (Phase("load", "memory", load, limit), Phase("train step", "memory", (*step, *waiting, process), limit))
    context = Part("CUDA context", CUDA_CONTEXT)
    return (
        Phase("load", "GPU", (*_resident(kept, plan, *FROZEN, ADAPTERS), slabs, context), machine.device_bytes),
        Phase("load", "memory", (*base, slabs, process), host),
        Phase("train step", "GPU", (*step, context), machine.device_bytes),
        Phase("train step", "memory", (*waiting, process), host),
    )


def others(config: RunConfig, plan: Plan, machine: Machine, measure: Measure) -> tuple[Phase, ...]:
    """The phases after training, on one process with the whole model, and the disk."""
    kept = measure.persistent(config.model, config.adapt, config.train, _alone(plan))
    place, limit = ("GPU", machine.device_bytes) if plan.device == "cuda" else ("memory", min(machine.device_bytes, machine.host_bytes))
    constant = Part("CUDA context", CUDA_CONTEXT) if plan.device == "cuda" else Part("Python and its libraries", PROCESS["cpu"])
    whole = _resident(kept, _alone(plan), *FROZEN, ADAPTERS)
    slabs = _slabs(measure, config, plan)
    contexts, context = config.evaluate.batch, config.data.context
    work = Part("work in one layer and the head", measure.forward(config.model, config.adapt, plan, contexts, context))

    cache = Part("keys and values", _cache_bytes(config, plan, measure.pretrained))
    prompts = f"Counted for {contexts} prompts of {context} tokens: a lower evaluate.batch needs less."
    phases = (
        Phase("evaluate", place, (*whole, cache, work, constant), limit, required=False, way_out=prompts),
        Phase("export", place, (*whole, slabs, constant), limit, required=False),
        _disk(config, kept),
    )
    if not config.model.cache or config.model.format in ("none", "stored"):
        return phases
    base = (Part("base in its format", kept.cached),)
    return (
        *phases,
        Phase("quantized cache", "disk", base, _free(cache_root()), required=False, way_out="Without it each start quantizes anew."),
    )


def _step(kept: Persistent, config: RunConfig, plan: Plan, measure: Measure) -> tuple[Part, ...]:
    trace, kind = measure.step(config.model, config.adapt, plan, config.data.context), OPTIMIZERS[config.train.optimizer]
    update = (kept.parts[ADAPTERS] if plan.device == "cuda" else kind.scratch * kept.largest) - trace.kept  # when activations are gone
    work = max(trace.head, trace.layers, update)
    name = {trace.head: "logits and loss", trace.layers: "decoded tiles and work in one layer"}.get(work, "optimizer's work")
    layers = measure.pretrained.config.num_hidden_layers + 1 if plan.stays_gathered else GATHERED_LAYERS
    whole = kept.root + layers * (kept.layer_without_base if plan.offload_base else kept.layer) + SPREAD_GRADIENTS * kept.gradients
    gathered = whole if plan.shards > 1 else 0
    return (
        *_resident(kept, plan, *FROZEN, ADAPTERS, GRADIENTS, *(() if kind.paged else (MOMENTS,))),
        Part("step counts", kept.step_counters, exact=True),
        *((Part("gathered layers", gathered),) if gathered else ()),
        Part("activations", trace.kept),
        Part(name, work),
        Part(
            "allocator",
            round(SLACK * (trace.kept + work + gathered)) if plan.device == "cuda" else HEAP_BYTES + round(HEAP_SHARE * trace.kept),
        ),
    )


def _resident(kept: Persistent, plan: Plan, *names: str) -> tuple[Part, ...]:
    """Counted parts on the device: all of them, or two decoder layers in the place of a base that waits in host memory, and this rank's
    rows of a third where they are gathered."""
    moved, slots = (kept.moved, 2 * max(kept.base_layers)) if plan.offload_base else ({}, 0)
    parts = tuple(Part(name, kept.parts[name] - moved.get(name, 0), exact=True) for name in names)
    share = max(kept.base_shares) if slots and plan.shards > 1 else 0
    parts += (Part("two layers of the base", slots, exact=True),) if slots else ()
    return (*parts, Part("rows of a layer that is gathered", share, exact=True)) if share else parts


def _waiting(kept: Persistent, config: RunConfig, plan: Plan, measure: Measure) -> tuple[Part, ...]:
    """What training keeps in host memory instead of on the device; the base first."""
    parts = []
    if plan.offload_base:  # torch rounds a pinned tensor up to a power of 2
        parts.append(
            Part(
                "base in host memory", sum(1 << (count - 1).bit_length() if plan.device == "cuda" else count for count in kept.base_shares)
            )
        )
    if plan.offload_activations and plan.checkpointing:
        parts.append(Part("activations in host memory", measure.step(config.model, config.adapt, plan, config.data.context).moved))
    if OPTIMIZERS[config.train.optimizer].paged:
        parts.append(Part(MOMENTS, kept.parts[MOMENTS]))
    return tuple(parts)


def _alone(plan: Plan) -> Plan:
    return replace(plan, ranks=1, strategy="single", shard_ranks=0)


def _slabs(measure: Measure, config: RunConfig, plan: Plan) -> Part:
    """Rows of one matrix in fp32. The files' own pages are the system's to take back, and are not counted."""
    widest = measure.persistent(config.model, config.adapt, config.train, _alone(plan)).widest
    return Part("rows being read and quantized", SLABS * min(SLAB_BYTES, 4 * widest))


def _cache_bytes(config: RunConfig, plan: Plan, pretrained: Pretrained) -> int:
    """Keys and values of a batch of prompts as long as a context, and their answers."""
    net = pretrained.config
    heads = getattr(net, "num_key_value_heads", None) or net.num_attention_heads
    width = getattr(net, "head_dim", None) or net.hidden_size // net.num_attention_heads
    blocks = net.num_hidden_layers + (config.adapt.new_blocks if METHODS[config.adapt.method].grows else 0)
    tokens = config.evaluate.batch * (config.data.context + config.evaluate.new_tokens)
    return 2 * blocks * heads * width * DTYPES[plan.dtype].itemsize * tokens


def _disk(config: RunConfig, kept: Persistent) -> Phase:
    """Checkpoints (one more than are kept, while the newest is written), the adapter, and what is exported."""
    parts = [Part("checkpoints", (config.train.keep + 1) * kept.kept), Part("adapter", kept.trained)]
    sizes = {
        "peft": kept.trained,
        "transformers": kept.weights * DTYPES[config.export.dtype].itemsize,
        "gguf": kept.cached + kept.trained,  # a file holds no more than the model does in memory
    }
    for writer in config.export.writers:
        size = sizes[writer]
        parts.append(Part(f"export as {writer}", size))
    return Phase("run folder", "disk", tuple(parts), _free(Path(config.root)))


def _free(folder: Path) -> int:
    """Free bytes where the folder is or will be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
