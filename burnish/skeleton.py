"""The network on meta → expanded → quantized → adapted → checkpointed → sharded; then its bytes. All before `fill` costs no memory."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from burnish.adapt import attach as adapting
from burnish.adapt import methods
from burnish.adapt.adapter import Switch
from burnish.adapt.attach import Adapters
from burnish.adapt.expand import Growth, with_blocks
from burnish.adapt.whole import skip_when_off, train_whole
from burnish.config import AdaptConfig, ModelConfig, Plan
from burnish.load import fill as filling
from burnish.load.cache import open_cache
from burnish.load.fill import Place
from burnish.load.weights import Weights
from burnish.model import network
from burnish.model.formats import FORMATS
from burnish.model.linear import QuantLinear, quantize_linears, wide
from burnish.parallel.shard import shard
from burnish.parallel.world import World

log = logging.getLogger("burnish")


@dataclass(frozen=True)
class Built:
    """A model and what is known of it."""

    model: PreTrainedModel
    layers: nn.ModuleList
    linears: dict[str, QuantLinear]
    """The quantized layers by their name inside the whole model."""
    adapters: Adapters
    """What is trained, by whatever method."""
    places: dict[str, Place]
    plan: Plan


def skeleton(
    config: PretrainedConfig, model: ModelConfig, adapt: AdaptConfig, plan: Plan, world: World, growth: Growth | None = None
) -> Built:
    """Shapes only: expanded, quantized, adapted, checkpointed, and sharded over `world`. Runs on a laptop for a 70B model.

    `growth` overrides where new blocks go, for a method that adds some. Raises a `UserError` for settings that do not go together.
    """
    methods.check(adapt, model.format)
    network.refuse_unsupported(config, model.path)
    dtype, method, switch = network.DTYPES[plan.dtype], methods.METHODS[adapt.method], Switch()
    growth = growth or method.growth(config, adapt)
    net = network.build(with_blocks(config, growth.sources) if growth else config, dtype, model.run_model_code)
    layers, prefix = network.decoder_layers(net), network.layers_name(net)
    new = tuple(f"{prefix}.{block}" for block in (growth.new if growth else ()))
    chosen = method.whole(_modules(net, layers, prefix, new), adapt)
    inside = {name.removeprefix(f"{prefix}."): net.get_submodule(name) for name in chosen if name.startswith(f"{prefix}.")}
    dense = {name: module for name, module in inside.items() if isinstance(module, nn.Linear)}
    linears = quantize_linears(layers, model.format, model.block, dtype, keep=dense.keys())
    network.check_share(layers, linears | dense)
    whole = train_whole(net, chosen, wide(dtype), dtype)
    places = filling.places_of(net, lambda name: growth.origin(prefix, name) if growth else (name, False, False))
    by_name = adapting.attach(linears, layers, prefix, adapt, wide(dtype), switch)
    for block in new:
        skip_when_off(net.get_submodule(block), switch)
    network.bind(net)
    if plan.checkpointing:
        network.checkpoint_layers(net)
    if plan.strategy == "fsdp":
        shard(net, layers, network.FORWARD_METHODS, world)
    quantized = {f"{prefix}.{name}": layer for name, layer in linears.items()}
    return Built(net, layers, quantized, Adapters(by_name, switch, adapt.method, whole), places, plan)


def _modules(net: PreTrainedModel, layers: nn.ModuleList, prefix: str, new: tuple[str, ...]) -> methods.Modules:
    weighted = [name for name, module in net.named_modules() if any(True for _ in module.parameters(recurse=False))]
    linears = [f"{prefix}.{name}" for name, module in layers.named_modules() if isinstance(module, nn.Linear)]
    return methods.Modules(weighted, linears, new)


def fill(
    built: Built, weights: Weights, model: ModelConfig, adapt: AdaptConfig, world: World, advance: Callable[[int], None] = lambda _: None
) -> str:
    """Bytes: this rank's rows of every tensor, the adapters' first values, the buffers. Returns the base's fingerprint."""
    built.model.to_empty(device=world.device)
    if built.plan.strategy != "fsdp":
        built.model.tie_weights()  # `to_empty` breaks the tie of embeddings and head; under FSDP2 it holds
    network.renew_buffers(built.model)
    fingerprint = weights.fingerprint()
    key = cache_key(fingerprint, model, built.plan, filling.kept_out(built.places))
    cache = open_cache(key) if model.cache and model.format != "none" else None
    filling.fill(built.places, weights, cache, world.device, advance)
    adapting.start(built.adapters, adapt.seed)
    return fingerprint


def refill(built: Built, weights: Weights, world: World) -> None:
    """Puts the base's values back into what was trained in full, and leaves all else. Costs reading these tensors."""
    trained = {name: place for name, place in built.places.items() if place.trained}
    filling.read(trained, weights, None, world.device)
    built.adapters.switch.advance()


def cache_key(fingerprint: str, model: ModelConfig, plan: Plan, kept_out: tuple[str, ...] = ()) -> dict[str, object]:
    """Names the quantized base: one for all methods, but where tensors of the base are trained and `kept_out` of the cache."""
    form = FORMATS[model.format]
    key: dict[str, object] = {"base": fingerprint, "format": form.name, "version": form.version, "block": model.block, "dtype": plan.dtype}
    return key | ({"kept_out": list(kept_out)} if kept_out else {})
