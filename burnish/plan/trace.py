"""One micro-batch, forward and backward, on tensors that have shapes and no bytes: what is alive when, and how much of it.

It runs the network that is trained, with its own layers and loss, on as few decoder layers as have all their kinds: what a layer keeps
for the backward pass is then added for each of the others. Costs about a second and no memory, whatever the size of the model.
"""

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from burnish.adapt.expand import Growth, with_blocks
from burnish.adapt.methods import METHODS
from burnish.adapt.targets import is_pattern
from burnish.config import AdaptConfig, ModelConfig, Plan
from burnish.data.batches import Batch
from burnish.load.weights import TensorInfo
from burnish.model import head, linear
from burnish.model.network import DTYPES, packed
from burnish.parallel.private import FakeTensorMode, TorchDispatchMode, tree_leaves
from burnish.plan.bytes import meta
from burnish.skeleton import Built


@dataclass(frozen=True)
class Trace:
    """Bytes beside parameters, gradients and moments."""

    kept: int
    """What all decoder layers keep for the backward pass, when the last of them has run."""
    head: int
    """The most beside `kept`, from the last decoder layer's end to the arrival of its gradient: hidden states, logits, loss."""
    layers: int
    """The most beside `kept` in the decoder layers: decoded tiles, intermediates, recomputation."""
    moved: int = 0
    """What is kept in host memory instead."""

    @property
    def peak(self) -> int:
        return self.kept + max(self.head, self.layers)


class Live(TorchDispatchMode):
    """Inside the block, counts the bytes of storages that operators make, until these are freed; real or fake alike."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = 0
        self.peaks: dict[str, int] = {}
        self.phase = "layers"
        self._seen: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._watch(tensor.untyped_storage(), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(leaf.untyped_storage()) not in self._seen:
                storage = leaf.untyped_storage()
                self._watch(storage, storage.nbytes())
        return result

    def _watch(self, storage: Any, count: int) -> None:
        key = id(storage)

        def gone(_: Any) -> None:
            self.now -= count
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, gone)
        self.now += count
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now)


Infos = Mapping[str, TensorInfo] | None
"""What the base's files hold: see `skeleton`."""


def trace_step(config: PretrainedConfig, model: ModelConfig, adapt: AdaptConfig, plan: Plan, context: int, infos: Infos = None) -> Trace:
    """Traces one micro-batch of `plan.micro_batch` contexts as the plan would run it; every token is supervised: the most there can be."""
    every = plan.checkpoint_every if plan.checkpointing else 1
    kinds, chosen, built = few_layers(config, model, adapt, replace(plan, offload_activations=False), infos, every)
    with FakeTensorMode(allow_non_fake_inputs=True), pieces_of(plan.device):  # parameters on meta are not fake yet
        built.model.to_empty(device="cpu")
        built.model.tie_weights()
        for parameter in built.adapters.trainable().values():
            parameter.grad = torch.zeros_like(parameter)
        kept, live = traced(built, worst_batch(context, plan.micro_batch))
    traced_kept = sum(kept)
    by_kind = dict(zip((kinds[layer] for layer in chosen), kept, strict=True))  # the last of each
    own = dict(zip(chosen, kept, strict=True))
    kept = [own.get(layer, by_kind[kind]) for layer, kind in enumerate(kinds)]
    work = live.peaks["layers"] - traced_kept if every == 1 else _work(config, model, adapt, plan, context, kept, infos)
    trace = Trace(sum(kept), live.peaks["head"] - traced_kept, work)
    return _offloaded(trace, config, plan, context, len(kept)) if plan.checkpointing and plan.offload_activations else trace


def _work(config: PretrainedConfig, model: ModelConfig, adapt: AdaptConfig, plan: Plan, context: int, kept: list[int], infos: Infos) -> int:
    """The most beside all that is kept, where some layers are recomputed: in the last layer of all, or in the last that is recomputed.

    By then the layers behind it have let go of what they `kept`, and it needs what it would need if all were recomputed.
    """
    last = (len(kept) - 1) // plan.checkpoint_every * plan.checkpoint_every
    alike = replace(plan, checkpoint_every=1, offload_activations=False)
    recomputed = trace_step(config, model, adapt, alike, context, infos).layers - sum(kept[last + 1 :])
    return max(recomputed, trace_step(config, model, adapt, replace(alike, checkpointing=False), context, infos).layers)


def _offloaded(trace: Trace, config: PretrainedConfig, plan: Plan, context: int, layers: int) -> Trace:
    """The input of each recomputed layer waits in host memory.

    On the device stay the first of them, a leaf of the graph, and that of the layer which is being recomputed.
    """
    layer_input = (context * plan.micro_batch + 1) * config.hidden_size * DTYPES[plan.dtype].itemsize
    moved = -(-layers // plan.checkpoint_every) * layer_input
    return Trace(trace.kept - moved + layer_input, trace.head, trace.layers + layer_input, moved)


def trace_forward(
    config: PretrainedConfig, model: ModelConfig, adapt: AdaptConfig, plan: Plan, contexts: int, context: int, infos: Infos = None
) -> Trace:
    """The same of a forward pass without gradients. (DoRA's gains, 4 bytes for each output, only of the layers that are traced.)"""
    _, _, built = few_layers(config, model, adapt, replace(plan, checkpointing=False), infos)
    with FakeTensorMode(allow_non_fake_inputs=True), pieces_of(plan.device):
        built.model.to_empty(device="cpu")
        built.model.tie_weights()
        live = Live([*built.model.parameters(), *built.model.buffers()])
        with packed(built.model), live:
            built.model.losses_of(worst_batch(context, contexts))  # pyright: ignore[reportCallIssue]
    return Trace(0, 0, max(live.peaks.values()))


def traced(built: Built, batch: Batch) -> tuple[list[int], Live]:
    """Runs forward and backward; what each decoder layer leaves alive, and the peaks of the two phases."""
    ends: list[int] = []
    live = Live([*built.model.parameters(), *built.model.buffers(), *(p.grad for p in built.model.parameters() if p.grad is not None)])

    def ended(module: nn.Module, inputs: Any, output: Any) -> None:
        if len(ends) == len(built.layers) + 1:  # recomputed in the backward pass
            return
        ends.append(live.now)
        if len(ends) == len(built.layers) + 1:
            live.phase = "head"
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:  # else only what follows the layers is trained
                hidden.register_hook(back)

    def back(gradient: Tensor) -> None:
        live.phase = "layers"

    def begun(module: nn.Module, inputs: Any) -> None:
        if not ends:
            ends.append(live.now)

    handles = [built.layers[0].register_forward_pre_hook(begun), *(layer.register_forward_hook(ended) for layer in built.layers)]
    built.model.train()
    try:
        with packed(built.model), live:
            built.model.loss_of(batch).backward()  # pyright: ignore[reportCallIssue]
    finally:
        for handle in handles:
            handle.remove()
    return [after - before for before, after in pairwise(ends)], live


def worst_batch(context: int, contexts: int) -> Batch:
    """Contexts of one sample each, as long as can be (attention), and one token more: so that samples are joined (a copy)."""
    count = context * contexts + 1
    source = torch.arange(count)
    return Batch(
        ids=torch.zeros(1, count, dtype=torch.int64),
        positions=torch.zeros(1, count, dtype=torch.int64),
        segments=(*range(0, count, context), count),
        source=source,
        targets=torch.zeros_like(source),
        samples=(),
    )


def few_layers(
    config: PretrainedConfig, model: ModelConfig, adapt: AdaptConfig, plan: Plan, infos: Infos, every: int = 1
) -> tuple[list[str], list[int], Built]:
    """The kind of each layer of the trained model, which of them are enough to be traced, and a model on meta of these alone."""
    growth = METHODS[adapt.method].growth(config, adapt)
    kinds = kinds_of(config, growth, every)
    chosen = list(range(depth(kinds))) if growth is None else sample(kinds, growth)
    if growth is not None and every > 1:  # a sample would be recomputed at other places than the whole
        chosen = list(range(len(kinds)))
    own = [layer for layer in chosen if growth is None or layer not in growth.new]
    few = shallow(config, [layer if growth is None else growth.sources[layer] for layer in own])
    return kinds, chosen, meta(few, model, everywhere(config, model, adapt, plan, infos), plan, infos, growth and regrown(chosen, growth))


def kinds_of(config: PretrainedConfig, growth: Growth | None = None, every: int = 1) -> list[str]:
    """The kind of each decoder layer: full or sliding attention, where a family mixes them; recomputed or not, where not all are; where
    blocks are added, whether it is a new one, or lies before the first of them (it then has no backward pass) or after."""
    kinds = list(getattr(config, "layer_types", None) or ["decoder layer"] * config.num_hidden_layers)
    if growth is not None:
        first = growth.new[0]
        kinds = [
            f"{kinds[source]}, {'new' if layer in growth.new else 'after' if layer > first else 'before'}"
            for layer, source in enumerate(growth.sources)
        ]
    return [f"{kind}, recomputed" if every > 1 and not number % every else kind for number, kind in enumerate(kinds)]


def sample(kinds: list[str], growth: Growth) -> list[int]:
    """The first three layers of each kind, and what the new ones among them are copies of."""
    chosen = {layer for layer, kind in enumerate(kinds) if kinds[:layer].count(kind) < 3}
    return sorted(chosen | {layer - 1 for layer in chosen if layer in growth.new})


def regrown(chosen: list[int], growth: Growth) -> Growth:
    """The chosen layers as a growth of their own."""
    sources: list[int] = []
    for layer in chosen:
        sources.append(sources[-1] if layer in growth.new else len(set(sources)))
    return Growth(tuple(sources), tuple(at for at, layer in enumerate(chosen) if layer in growth.new))


def everywhere(config: PretrainedConfig, model: ModelConfig, adapt: AdaptConfig, plan: Plan, infos: Infos) -> AdaptConfig:
    """The same method where patterns name some layers: on all of them what it does on any, so that few stand for all. An upper bound."""
    if not any(is_pattern(target) for target in (*adapt.targets, *adapt.also)):
        return adapt
    trained = meta(config, model, adapt, plan, infos).adapters
    whole = {name.rpartition(".")[2] for entry in trained.whole.values() for name, _ in entry.modules}
    adapted = {name.rpartition(".")[2] for name in trained.by_name}
    if not METHODS[adapt.method].adapts:
        return replace(adapt, targets=tuple(sorted(whole)))
    return replace(adapt, targets=tuple(sorted(adapted)), also=tuple(sorted(whole)))


def depth(kinds: list[str]) -> int:
    """Decoder layers until each kind has been seen after the first two, which keep a little more or less than those that follow."""
    later = kinds[2:]
    return 3 + max(later.index(kind) for kind in set(later)) if later else len(kinds)


def shallow(config: PretrainedConfig, layers: list[int]) -> PretrainedConfig:
    """The same model with some of its decoder layers, and rotary frequencies that need no values of positions (shapes are the same)."""
    config = with_blocks(config, layers)
    rope = getattr(config, "rope_parameters", None) or {}
    for table in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if table.get("rope_type") in ("dynamic", "longrope"):
            table["rope_type"] = "default"
    return config


@contextmanager
def pieces_of(device: str) -> Iterator[None]:
    """Lets the trace, whose tensors all say `cpu`, decode tiles and compute logits in pieces as large as `device` will."""
    tables = (linear.TILE_BYTES, head.LOGIT_BYTES)
    before = [table["cpu"] for table in tables]
    for table in tables:
        table["cpu"] = table[device]
    try:
        yield
    finally:
        for table, value in zip(tables, before, strict=True):
            table["cpu"] = value
