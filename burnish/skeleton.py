"""The network on meta → quantized → adapted → checkpointed → sharded; then its bytes. Everything before `fill` costs no memory."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from burnish.adapt import attach as adapting
from burnish.adapt.attach import Adapters
from burnish.config import AdaptConfig, ModelConfig, Plan
from burnish.load import fill as filling
from burnish.load.cache import open_cache
from burnish.load.fill import Place
from burnish.load.weights import Weights
from burnish.model import network, offload
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
    places: dict[str, Place]
    plan: Plan


def skeleton(config: PretrainedConfig, model: ModelConfig, adapt: AdaptConfig, plan: Plan, world: World) -> Built:
    """Shapes only: quantized, adapted, checkpointed, and sharded over `world`. Runs on a laptop for a 70B model."""
    network.refuse_unsupported(config, model.path)
    dtype = network.DTYPES[plan.dtype]
    net = network.build(config, dtype, model.run_model_code)
    layers, prefix = network.decoder_layers(net), network.layers_name(net)
    linears = quantize_linears(layers, model.format, model.block, dtype)
    network.check_share(layers, linears)
    places = filling.places_of(net)
    adapters = adapting.attach(linears, layers, prefix, adapt, wide(dtype))
    network.bind(net)
    net.eval()  # the adapters too: a new module begins with its dropout on
    if plan.checkpointing:
        network.checkpoint_layers(net, plan.checkpoint_every, plan.offload_activations)
    if plan.strategy == "fsdp":
        shard(net, layers, network.FORWARD_METHODS, world)
    return Built(net, layers, {f"{prefix}.{name}": layer for name, layer in linears.items()}, adapters, places, plan)


def fill(
    built: Built, weights: Weights, model: ModelConfig, adapt: AdaptConfig, world: World, advance: Callable[[int], None] = lambda _: None
) -> str:
    """Bytes: this rank's rows of every tensor, the adapters' first values, the buffers. Returns the base's fingerprint."""
    taken = offload.take_out(built.layers) if built.plan.offload_base else None
    built.model.to_empty(device=world.device)
    if taken is not None:
        offload.HostBase(built.layers, taken, world.device)
    if built.plan.strategy != "fsdp":
        built.model.tie_weights()  # `to_empty` breaks the tie of embeddings and head; under FSDP2 it holds
    network.renew_buffers(built.model)
    fingerprint = weights.fingerprint()
    cache = open_cache(cache_key(fingerprint, model, built.plan)) if model.cache and model.format != "none" else None
    filling.fill(built.places, weights, cache, world.device, advance)
    adapting.start(built.adapters, adapt.seed)
    return fingerprint


def cache_key(fingerprint: str, model: ModelConfig, plan: Plan) -> dict[str, object]:
    form = FORMATS[model.format]
    return {"base": fingerprint, "format": form.name, "version": form.version, "block": model.block, "dtype": plan.dtype}
