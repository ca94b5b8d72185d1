"""One step, simulated: the network that is trained runs forward and backward on tensors that have shapes and no bytes; sharded, as one
of ranks that are only imagined, through FSDP2 itself. What is alive when, and how much of it.

It runs on as few decoder layers as stand for all of them. What happens between two of a step's boundaries (a layer's forward pass, the
head, a layer's backward pass) is recorded as a change and as the most above its beginning; the whole step is replayed from these records,
each layer's from the layer that stands for it. Costs about a second and no memory, whatever the size of the model.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

from burnish.adapt.adapter import PRODUCT_BYTES
from burnish.adapt.methods import METHODS
from burnish.config import AdaptConfig, ModelConfig, Plan
from burnish.data.batches import Batch, Step
from burnish.model import head, linear
from burnish.model.network import DTYPES, packed
from burnish.parallel.imagined import can_imagine, imagined
from burnish.parallel.private import FakeTensorMode
from burnish.parallel.world import World
from burnish.plan.bytes import NOWHERE
from burnish.plan.few import Few, Infos, built_few, everywhere, few_layers
from burnish.plan.live import GAINS, GRADIENTS, WORK, Live
from burnish.skeleton import Built
from burnish.train.step import backward_passes

FORWARD, HEAD, BACKWARD, HEAD_AGAIN = "forward", "head", "backward", "head again"
AGAIN = {FORWARD: BACKWARD, HEAD: HEAD_AGAIN}
KEPT = "kept"


@dataclass(frozen=True)
class Stretch:
    """What happened between two boundaries, by kind of bytes."""

    change: Counter[str]
    at_most: Counter[str]
    """Where most was alive, beside what was at its beginning."""


Stretches = dict[tuple[str, int], Stretch]
"""By what ran, and the layer's number; in order."""


@dataclass(frozen=True)
class Trace:
    """Bytes beside parameters, moments, and gradients that were there before."""

    kept: int
    """Activations that all decoder layers keep for the backward pass, when the last of them has run."""
    at: str
    """What ran when most was alive: FORWARD, HEAD or BACKWARD."""
    parts: dict[str, int]
    """What was alive then: KEPT, WORK, and `burnish.plan.live`'s other kinds."""
    after: int
    """What is left at the end: gradients and the gains of DoRA."""
    moved: int = 0
    """What is kept in host memory instead."""

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Recorded:
    """A step of few layers, from which that of all is replayed."""

    stretches: Stretches
    stands_for: tuple[int, ...]
    layer_input: int
    """Bytes of the hidden states that enter a layer."""


def trace_step(
    config: PretrainedConfig,
    model: ModelConfig,
    adapt: AdaptConfig,
    plan: Plan,
    context: int,
    infos: Infos = None,
    longest: int | None = None,
) -> Trace:
    """Simulates the last micro-batch of a step as the plan would run it: see `record_step` and `replay_step`."""
    return replay_step(record_step(config, model, adapt, plan, context, infos, longest), adapt, plan)


def record_step(
    config: PretrainedConfig,
    model: ModelConfig,
    adapt: AdaptConfig,
    plan: Plan,
    context: int,
    infos: Infos = None,
    longest: int | None = None,
) -> Recorded:
    """One micro-batch on rank 0, which holds most, where no gradients are yet; every token is supervised.

    A plan that shards is simulated as `single` where a process group stands already (`can_imagine`).
    """
    few = few_layers(config, adapt, plan.checkpoint_every if plan.checkpointing else 1)
    batch = worst_batch(context, plan.micro_batch, longest)
    with faked(few, config, model, adapt, plan, infos) as (built, world):
        stretches = recorded_step(built, batch, world)
    return Recorded(stretches, few.stands_for, batch.ids.numel() * config.hidden_size * DTYPES[plan.dtype].itemsize)


def replay_step(recorded: Recorded, adapt: AdaptConfig, plan: Plan) -> Trace:
    """The whole step. Gradients that are there before it are not counted; others count where they appear. Costs no time."""
    moved = recorded.layer_input if plan.checkpointing and plan.offload_activations else 0
    return replay(recorded.stretches, recorded.stands_for, gradients_stay(plan, adapt), moved, plan.checkpoint_every)


def gradients_stay(plan: Plan, adapt: AdaptConfig) -> bool:
    """Whether gradients are there before the last micro-batch begins, as shards where the plan shards."""
    if plan.strategy == "ddp":
        return True  # its buckets, which gradients are views of, are never freed
    # FSDP2 holds those of adapters whole until the last micro-batch: `burnish.plan.phases` adds them
    return plan.accumulation > 1 and (not plan.sharded or trains_weights(adapt))


def trains_weights(adapt: AdaptConfig) -> bool:
    """Whether weights themselves are trained, whose gradients FSDP2 spreads over the ranks in every micro-batch."""
    return not METHODS[adapt.method].adapts or bool(adapt.also)


def trace_forward(
    config: PretrainedConfig, model: ModelConfig, adapt: AdaptConfig, plan: Plan, contexts: int, context: int, infos: Infos = None
) -> Trace:
    """The same of a forward pass without gradients, in eval mode: the loss on rows that are not trained."""
    few = few_layers(config, adapt)
    with faked(few, config, model, adapt, replace(plan, checkpointing=False), infos) as (built, _):
        batch = worst_batch(context, contexts)
        with packed(built.model):
            stretches = recorded(built, lambda: built.model.losses_of(batch))  # pyright: ignore[reportCallIssue]
    return replay(stretches, few.stands_for)


def trace_generation(
    config: PretrainedConfig, model: ModelConfig, adapt: AdaptConfig, plan: Plan, prompts: int, context: int, infos: Infos = None
) -> Trace:
    """Prompts of `context` tokens are read into a cache of keys and values, and one more token each, when the cache is copied by layers."""
    few = few_layers(config, adapt)
    plan = replace(plan, ranks=1, strategy="single", shard_ranks=0, checkpointing=False)
    with faked(few, config, model, adapt, plan, infos) as (built, _), torch.no_grad():
        cache = DynamicCache(config=built.model.config)

        def ask(tokens: int, seen: int) -> Stretches:
            ids = torch.zeros(prompts, tokens, dtype=torch.int64)
            mask = torch.ones(prompts, 1, tokens, seen, dtype=torch.bool)  # as transformers makes it of padded prompts
            named = {"attention_mask": mask, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
            return recorded(built, lambda: built.model(input_ids=ids, **named).logits, mask)

        read = ask(context, context)
        # replayed as a backward pass would be, its layers follow; what each makes takes the place of what the first pass made
        more = {(AGAIN[name], layer): Stretch(Counter(), stretch.at_most) for (name, layer), stretch in ask(1, context + 1).items()}
        return replay(read | more, few.stands_for)


# --- recording


class Recorder:
    """Cuts what `Live` counts into stretches."""

    def __init__(self, live: Live) -> None:
        self.live, self.stretches = live, Stretches()
        self.before = live.by.copy()
        live.begin()

    def cut(self, name: str, layer: int) -> None:
        """What ran since the last cut was this."""
        self.stretches[name, layer] = Stretch(_less(self.live.by, self.before), _less(self.live.by_at_peak, self.before))
        self.before = self.live.by.copy()
        self.live.begin()


def _less(a: Counter[str], b: Counter[str]) -> Counter[str]:
    return Counter({kind: a[kind] - b[kind] for kind in a.keys() | b.keys()})


def recorded_step(built: Built, batch: Batch, world: World, replicas: Any = None) -> Stretches:
    """Forward and backward through the training loop's own passes, on real or fake tensors. Gradients that are there are not counted."""
    trainable = list(built.adapters.trainable().values())
    step = Step((batch,), len(batch.targets), batch.ids.numel())
    built.model.train()
    with packed(built.model):
        return recorded(built, lambda: backward_passes(built, replicas, step, world), gradients=trainable)


def recorded(built: Built, work: Callable[[], Any], *more: Tensor, gradients: Sequence[nn.Parameter] = ()) -> Stretches:
    """Runs `work` and cuts it at the ends of decoder layers, and where the backward pass enters one."""
    there = [parameter.grad for parameter in gradients if parameter.grad is not None]
    live = Live([*built.model.parameters(), *built.model.buffers(), *there, *more])
    recorder, last = Recorder(live), len(built.layers) - 1
    running = [FORWARD, 0]

    def tagged() -> None:
        for parameter in gradients:
            if parameter.grad is not None:
                live.tag(parameter.grad, GRADIENTS)
        for adapter in built.adapters.by_name.values():
            if adapter.d is not None:
                live.tag(adapter.d, GAINS)

    def ended(number: int, output: Any) -> None:
        if running[0] != FORWARD or running[1] != number:  # recomputed in the backward pass
            return
        tagged()
        recorder.cut(FORWARD, number)
        running[:] = [FORWARD, number + 1] if number < last else [HEAD, last]
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:  # else only what follows is trained
            hidden.register_hook(lambda gradient: entered(number))

    def entered(number: int) -> None:
        tagged()
        recorder.cut(*running)
        running[:] = [BACKWARD, number]

    handles = [
        layer.register_forward_hook(lambda _, __, output, number=number: ended(number, output)) for number, layer in enumerate(built.layers)
    ]
    try:
        with live:
            result = work()
            tagged()
            recorder.cut(*running)
            del result
    finally:
        for handle in handles:
            handle.remove()
    return recorder.stretches


# --- the law of extension


def replay(stretches: Stretches, stands_for: Sequence[int], stay: bool = False, moved: int = 0, every: int = 1) -> Trace:
    """The whole step from the stretches of few layers. `stay`: a gradient is added to one that was there, and lives no longer than its
    layer's backward pass. `moved`: bytes that one of `every` so many layers keeps in host memory instead."""
    order = [(FORWARD, layer) for layer in range(len(stands_for))] + [(HEAD, len(stands_for) - 1)]
    order += [(name, layer) for name in (BACKWARD, HEAD_AGAIN) for layer in reversed(range(len(stands_for)))]
    level, most, at, kept = Counter[str](), Counter[str](), FORWARD, 0
    for name, layer in order:
        stretch = stretches.get((name, stands_for[layer]))
        if stretch is None:  # no backward pass comes here
            continue
        waits = moved if layer and not layer % every else 0  # the first is a leaf of the graph, and stays
        back = waits if name == BACKWARD else 0
        if name == HEAD:
            kept = level[WORK]
        here = Counter(level)
        here[KEPT] = here.pop(WORK, 0)
        here.update(stretch.at_most)
        here[WORK] += back
        if here.total() > most.total():
            most, at = here, name
        level.update(stretch.change)
        level[WORK] += back - (waits if name == FORWARD else 0)
        if stay:
            level[GRADIENTS] = 0
    if most[WORK] < 0:  # a layer let go of more than it made
        most[KEPT] += most.pop(WORK)
    layers = -(-len(stands_for) // every) if moved else 0
    return Trace(kept, at, {kind: count for kind, count in most.items() if count}, level.total(), layers * moved)


# --- what is run


@contextmanager
def faked(
    few: Few, config: PretrainedConfig, model: ModelConfig, adapt: AdaptConfig, plan: Plan, infos: Infos
) -> Iterator[tuple[Built, World]]:
    """The few layers with fake tensors in them, on the ranks that the plan shards them over."""
    adapt = everywhere(config, model, adapt, plan, infos)
    plan = replace(plan, offload_activations=False, offload_base=False)
    sharded = plan.shards > 1 and can_imagine()
    with imagined(plan.ranks) if sharded else nullcontext() as world:
        built = built_few(few, model, adapt, plan, infos, world)
        with FakeTensorMode(allow_non_fake_inputs=True), pieces_of(plan.device):  # parameters on meta are not fake yet
            built.model.to_empty(device="cpu")
            if not sharded:
                built.model.tie_weights()
            yield built, world or replace(NOWHERE, device=torch.device("cpu"))


def worst_batch(context: int, contexts: int, longest: int | None = None) -> Batch:
    """Contexts of samples as long as can be (attention), and one token more: so that samples are joined (a copy)."""
    count = context * contexts + 1
    source = torch.arange(count)
    length = min(longest or context, context)
    starts = [start for begin in range(0, count, context) for start in range(begin, min(begin + context, count), length)]
    return Batch(
        ids=torch.zeros(1, count, dtype=torch.int64),
        positions=torch.zeros(1, count, dtype=torch.int64),
        segments=(*starts, count),
        source=source,
        targets=torch.zeros_like(source),
        samples=(),
    )


@contextmanager
def pieces_of(device: str) -> Iterator[None]:
    """Lets the trace, whose tensors all say `cpu`, decode, multiply and compute logits in pieces as large as `device` will."""
    tables = (linear.TILE_BYTES, head.LOGIT_BYTES, PRODUCT_BYTES)
    before = [table["cpu"] for table in tables]
    for table in tables:
        table["cpu"] = table[device]
    try:
        yield
    finally:
        for table, value in zip(tables, before, strict=True):
            table["cpu"] = value
