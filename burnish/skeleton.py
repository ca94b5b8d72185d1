"""The network on meta → expanded → quantized → adapted → checkpointed → sharded; then its bytes. All before `fill` costs no memory."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from burnish.adapt import attach as adapting
from burnish.adapt import methods
from burnish.adapt.adapter import Switch
from burnish.adapt.attach import Adapters
from burnish.adapt.expand import Growth, with_blocks
from burnish.adapt.whole import skip_when_off, train_whole
from burnish.config import AdaptConfig, ModelConfig, Plan
from burnish.errors import UserError
from burnish.load import fill as filling
from burnish.load.cache import open_cache
from burnish.load.fill import Place
from burnish.load.weights import TensorInfo, Weights
from burnish.model import ends, network, offload
from burnish.model.formats import FORMATS
from burnish.model.linear import QuantLinear, quantize_linears, wide
from burnish.parallel.outside import together
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
    products: str
    """The dtype that products are computed in, by its name in settings."""


def skeleton(
    config: PretrainedConfig,
    model: ModelConfig,
    adapt: AdaptConfig,
    plan: Plan,
    world: World,
    infos: Mapping[str, TensorInfo] | None = None,
    growth: Growth | None = None,
) -> Built:
    """Shapes only: expanded, quantized, adapted, checkpointed, and sharded over `world`. Runs on a laptop for a 70B model.

    `infos` says what the files hold; needed where `model.format` or `model.ends` is `stored`. `growth` overrides where new blocks go, for a
    method that adds some. Raises a `UserError` for settings that do not go together.
    """
    methods.check(adapt, model.format, model.ends)
    network.refuse_unsupported(config, model.path)
    dtype, method, switch = network.DTYPES[plan.dtype], methods.METHODS[adapt.method], Switch()
    growth = growth or method.growth(config, adapt)
    net = network.build(with_blocks(config, growth.sources) if growth else config, dtype, model.run_model_code)
    layers, prefix = network.decoder_layers(net), network.layers_name(net)
    origin = partial(growth.origin, prefix) if growth else filling.itself
    new = tuple(f"{prefix}.{block}" for block in (growth.new if growth else ()))
    chosen = method.whole(_modules(net, layers, prefix, new), adapt)
    inside = {name.removeprefix(f"{prefix}."): net.get_submodule(name) for name in chosen if name.startswith(f"{prefix}.")}
    dense = {name: module for name, module in inside.items() if isinstance(module, nn.Linear)}
    own_ends = ends.names_of_ends(net)
    methods.check_ends(chosen, own_ends, model.ends)
    sources = {name: origin(f"{prefix}.{name}.weight")[0] for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    stored = stored_formats(sources, infos or {}, model, "model.format") if model.format == "stored" else None
    linears = quantize_linears(layers, model.held_as, model.block, dtype, stored, keep=dense.keys())
    network.check_share(layers, linears | dense)
    if model.ends != "none":
        held = dict.fromkeys(own_ends, (model.ends, model.block))
        if model.ends == "stored":
            held = stored_formats({name: f"{name}.weight" for name in own_ends}, infos or {}, model, "model.ends")
        ends.quantize_ends(net, held, model.ends, model.block, dtype)
    whole = train_whole(net, chosen, wide(dtype), dtype)
    places = filling.places_of(net, origin)
    by_name = adapting.attach(linears, layers, prefix, adapt, wide(dtype), switch)
    for block in new:
        skip_when_off(net.get_submodule(block), switch)
    network.bind(net, model.autocast)
    net.eval()  # the adapters too: a new module begins with its dropout on
    if plan.checkpointing:
        network.checkpoint_layers(net, plan.checkpoint_every, plan.offload_activations)
    if plan.sharded:
        outside = offload.moved(layers) if plan.offload_base else ()
        shard(net, layers, network.apart(net), network.FORWARD_METHODS, world, plan.shards, plan.stays_gathered, outside)
    quantized = {f"{prefix}.{name}": layer for name, layer in linears.items()}
    products = plan.dtype if model.autocast == "none" else model.autocast
    return Built(net, layers, quantized, Adapters(by_name, switch, adapt.method, whole, model.ends), places, plan, products)


def _modules(net: PreTrainedModel, layers: nn.ModuleList, prefix: str, new: tuple[str, ...]) -> methods.Modules:
    weighted = [name for name, module in net.named_modules() if any(True for _ in module.parameters(recurse=False))]
    linears = [f"{prefix}.{name}" for name, module in layers.named_modules() if isinstance(module, nn.Linear)]
    return methods.Modules(weighted, linears, new)


def stored_formats(
    sources: Mapping[str, str], infos: Mapping[str, TensorInfo], model: ModelConfig, setting: str
) -> dict[str, tuple[str, int]]:
    """Format and block of each layer by its name: those of the tensor on disk that `sources` says; plain numbers are `none`.

    Raises a `UserError`, said of the `setting`, that names the tensors whose type no format holds.
    """
    assert infos, f"{setting}=stored needs to know what the files hold"
    formats: dict[str, tuple[str, int]] = {}
    refused: dict[str, list[str]] = {}
    for name, source in sources.items():
        info = infos.get(source)  # what no file holds is named when the model is filled
        if info is None or info.stored is None:
            formats[name] = ("none", model.block)
            continue
        form = FORMATS.get(info.stored.format or "")
        if form is None or form.adopt is None:
            refused.setdefault(info.stored.kind, []).append(source)
        else:
            formats[name] = (form.name, info.stored.block)
    if refused:
        instead, anew = ("nf4", " and quantizes them anew") if setting == "model.format" else ("none", "")
        lines = [f"{kind}: {names[0]}" + (f" and {len(names) - 1} more" * (len(names) > 1)) for kind, names in sorted(refused.items())]
        raise UserError(
            f"{setting} = 'stored': {model.path} holds weights in types that are not trained as they are.\n  "
            + "\n  ".join(lines)
            + f"\nSet {setting}={instead}, which decodes them{anew}, or give a GGUF file of Q4_0, Q4_1 or Q8_0."
        )
    return formats


def fill(
    built: Built, weights: Weights, model: ModelConfig, adapt: AdaptConfig, world: World, advance: Callable[[int], None] = lambda _: None
) -> str:
    """Bytes: this rank's rows of every tensor, the adapters' first values, the buffers. Returns the base's fingerprint."""
    taken = offload.take_out(built.layers, built.plan.shards) if built.plan.offload_base else None
    built.model.to_empty(device=world.device)
    if taken is not None:
        others = together(next(built.layers.parameters())) if built.plan.sharded else None
        offload.HostBase(built.layers, taken, world.device, others)
    if not built.plan.sharded:
        built.model.tie_weights()  # `to_empty` breaks the tie of embeddings and head; under FSDP2 it holds
    network.renew_buffers(built.model)
    fingerprint = weights.fingerprint()
    # embeddings and head alone are quantized in seconds: no cache for them, which would hold all else beside them
    cached = model.cache and model.format not in ("none", "stored") and filling.quantizes(built.places, weights)
    cache = open_cache(cache_key(fingerprint, model, built.plan, filling.kept_out(built.places))) if cached else None
    filling.fill(built.places, weights, cache, world.device, advance)
    adapting.start(built.adapters, adapt.seed, adapt.start)
    return fingerprint


def refill(built: Built, weights: Weights, world: World) -> None:
    """Puts the base's values back into what was trained in full, and leaves all else. Costs reading these tensors."""
    trained = {name: place for name, place in built.places.items() if place.trained}
    filling.read(trained, weights, None, world.device)
    built.adapters.switch.advance()


def cache_key(fingerprint: str, model: ModelConfig, plan: Plan, kept_out: tuple[str, ...] = ()) -> dict[str, object]:
    """Names the quantized base: one for all methods, but where tensors of the base are trained and `kept_out` of the cache."""
    form = FORMATS[model.held_as]
    key: dict[str, object] = {"base": fingerprint, "format": form.name, "version": form.version, "block": model.block, "dtype": plan.dtype}
    if model.ends != "none":
        key |= {"ends": [model.ends, FORMATS[model.ends].version if model.ends in FORMATS else 0]}
    return key | ({"kept_out": list(kept_out)} if kept_out else {})
