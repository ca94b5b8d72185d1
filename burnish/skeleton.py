"""The network on meta → quantized → adapted → checkpointed → sharded; then its bytes. Everything before `fill` costs no memory."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from burnish.adapt import attach as adapting
from burnish.adapt.attach import Adapters
from burnish.config import AdaptConfig, ModelConfig, Plan
from burnish.errors import UserError
from burnish.load import fill as filling
from burnish.load.cache import open_cache
from burnish.load.fill import Place
from burnish.load.weights import TensorInfo, Weights
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
    places: dict[str, Place]
    plan: Plan


def skeleton(
    config: PretrainedConfig,
    model: ModelConfig,
    adapt: AdaptConfig,
    plan: Plan,
    world: World,
    infos: Mapping[str, TensorInfo] | None = None,
) -> Built:
    """Shapes only: quantized, adapted, checkpointed, and sharded over `world`. Runs on a laptop for a 70B model.

    `infos` says what the files hold; needed where `model.format` is `stored`.
    """
    network.refuse_unsupported(config, model.path)
    dtype = network.DTYPES[plan.dtype]
    net = network.build(config, dtype, model.run_model_code)
    layers, prefix = network.decoder_layers(net), network.layers_name(net)
    stored = stored_formats(layers, prefix, infos or {}, model) if model.format == "stored" else None
    linears = quantize_linears(layers, model.format, model.block, dtype, stored)
    network.check_share(layers, linears)
    places = filling.places_of(net)
    adapters = adapting.attach(linears, layers, prefix, adapt, wide(dtype))
    network.bind(net)
    if plan.checkpointing:
        network.checkpoint_layers(net)
    if plan.strategy == "fsdp":
        shard(net, layers, network.FORWARD_METHODS, world)
    return Built(net, layers, {f"{prefix}.{name}": layer for name, layer in linears.items()}, adapters, places, plan)


def stored_formats(layers: nn.ModuleList, prefix: str, infos: Mapping[str, TensorInfo], model: ModelConfig) -> dict[str, tuple[str, int]]:
    """Format and block of each linear layer, by its name inside `layers`: those of its tensor on disk; plain numbers are `none`.

    Raises a `UserError` that names the tensors whose type no format holds.
    """
    assert infos, "model.format=stored needs to know what the files hold"
    formats: dict[str, tuple[str, int]] = {}
    refused: dict[str, list[str]] = {}
    for name, module in layers.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        info = infos.get(f"{prefix}.{name}.weight")  # what no file holds is named when the model is filled
        if info is None or info.stored is None:
            formats[name] = ("none", model.block)
            continue
        form = FORMATS.get(info.stored.format or "")
        if form is None or form.adopt is None:
            refused.setdefault(info.stored.kind, []).append(f"{prefix}.{name}.weight")
        else:
            formats[name] = (form.name, info.stored.block)
    if refused:
        lines = [f"{kind}: {names[0]}" + (f" and {len(names) - 1} more" * (len(names) > 1)) for kind, names in sorted(refused.items())]
        raise UserError(
            f"model.format = 'stored': {model.path} holds weights in types that are not trained as they are.\n  "
            + "\n  ".join(lines)
            + "\nSet model.format=nf4, which decodes and quantizes them anew, or give a GGUF file of Q4_0, Q4_1 or Q8_0."
        )
    return formats


def fill(
    built: Built, weights: Weights, model: ModelConfig, adapt: AdaptConfig, world: World, advance: Callable[[int], None] = lambda _: None
) -> str:
    """Bytes: this rank's rows of every tensor, the adapters' first values, the buffers. Returns the base's fingerprint."""
    built.model.to_empty(device=world.device)
    if built.plan.strategy != "fsdp":
        built.model.tie_weights()  # `to_empty` breaks the tie of embeddings and head; under FSDP2 it holds
    network.renew_buffers(built.model)
    fingerprint = weights.fingerprint()
    cached = model.cache and filling.quantizes(built.places, weights)
    cache = open_cache(cache_key(fingerprint, model, built.plan)) if cached else None
    filling.fill(built.places, weights, cache, world.device, advance)
    adapting.start(built.adapters, adapt.seed)
    return fingerprint


def cache_key(fingerprint: str, model: ModelConfig, plan: Plan) -> dict[str, object]:
    form = FORMATS[model.format]
    return {"base": fingerprint, "format": form.name, "version": form.version, "block": model.block, "dtype": plan.dtype}
