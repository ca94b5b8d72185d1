"""Bytes that stay for the whole of training, counted from the skeleton and the optimizer that are trained: exact.

FSDP2 cuts every parameter by rows as `torch.chunk` does: rank 0 holds ceil(rows / ranks) of them, no rank holds more.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, device
from transformers import PretrainedConfig

from burnish.adapt.expand import Growth
from burnish.config import AdaptConfig, ModelConfig, Plan, TrainConfig
from burnish.load.weights import TensorInfo
from burnish.model import offload
from burnish.model.linear import QuantLinear
from burnish.model.network import apart
from burnish.parallel.world import World
from burnish.skeleton import Built, skeleton
from burnish.train import optimizer

NOWHERE = World(0, 1, device("meta"), None)

WEIGHTS, SCALES, EMBEDDINGS, OTHER = "quantized weights", "scales and norms", "embeddings and head", "other frozen tensors"
BUFFERS, ADAPTERS, GRADIENTS, MOMENTS = "buffers", "trained weights", "gradients", "optimizer moments"
FROZEN = (WEIGHTS, SCALES, EMBEDDINGS, OTHER, BUFFERS)


@dataclass(frozen=True)
class Persistent:
    """Bytes on one rank, the fullest, by part."""

    parts: dict[str, int]
    step_counters: int
    """The optimizer's step counts."""
    layer: int
    """Largest decoder layer, whole: what FSDP gathers for it."""
    layer_without_base: int
    """The same where `plan.offload_base` keeps its base out of FSDP."""
    root: int
    """Whole parameters outside the decoder layers that FSDP gathers at once: its root group, and the larger of embeddings and head."""
    gradients: int
    """Gradients of the largest decoder layer and of what lies outside the layers, whole: what FSDP holds before it spreads them."""
    trained: int
    """All that is trained, whole."""
    kept: int
    """The same and its moments: what a checkpoint holds."""
    weights: int
    """Numbers in the dense model, with the new blocks."""
    read: int
    """The same without the new blocks, which are copies: what the base's files hold."""
    widest: int
    """Numbers in its largest matrix."""
    largest: int
    """Largest trained parameter on this rank."""
    cached: int
    """Whole base in its format: what the quantized cache holds."""
    moved: dict[str, int]
    """Of the parts, what `plan.offload_base` keeps in host memory."""
    base_layers: tuple[int, ...]
    """That of each decoder layer, whole, as it lies in a slot on the device."""
    base_shares: tuple[int, ...]
    """This rank's rows of the same, as they lie in host memory."""

    @property
    def published(self) -> int:
        """The base's files in 16 bits, which models are published in."""
        return 2 * self.read

    @property
    def total(self) -> int:
        """All of it but the step counts."""
        return sum(self.parts.values())

    def of(self, *names: str) -> int:
        return sum(self.parts[name] for name in names)


def meta(
    config: PretrainedConfig,
    model: ModelConfig,
    adapt: AdaptConfig,
    plan: Plan,
    infos: Mapping[str, TensorInfo] | None = None,
    growth: Growth | None = None,
) -> Built:
    """The skeleton of a plan without its sharding: what every count here is read from. No memory. `infos`, `growth`: see `skeleton`."""
    return skeleton(config, model, adapt, replace(plan, strategy="single", ranks=1), NOWHERE, infos, growth)


def persistent(built: Built, train: TrainConfig, shards: int) -> Persistent:
    """Counts a skeleton (or a filled model) and its optimizer as cut into `shards`: 1 for one device and for replicas."""
    parts: Counter[str] = Counter(dict.fromkeys((*FROZEN, ADAPTERS, GRADIENTS, MOMENTS), 0))
    kinds = _kinds(built)
    for tensor in built.model.parameters():
        parts[kinds.get(id(tensor), OTHER)] += shard_bytes(tensor, shards)
    parts[BUFFERS] = sum(size(buffer) for buffer in built.model.buffers())  # never sharded
    trainable = built.adapters.trainable()
    parts[GRADIENTS] = parts[ADAPTERS]
    update = optimizer.build(trainable, train)
    state = sum(size(tensor) for entry in update.state.values() for tensor in entry.values())
    moments = [tensor for _, _, tensor in optimizer.moments(update, trainable)]
    parts[MOMENTS] = sum(size(own) for tensor in trainable.values() for own in optimizer.moments_of_a_part(tensor, train, shards))
    base = [offload.pieces(layer, shards) for layer in built.layers]
    moved = Counter({WEIGHTS: 0, SCALES: 0})
    for piece in (piece for group in base for piece in group):
        moved[kinds[id(getattr(piece.linear, piece.name))]] += piece.share_bytes
    frozen = sum(size(tensor) for tensor in built.model.parameters() if not tensor.requires_grad)
    layers = [sum(size(tensor) for tensor in layer.parameters()) for layer in built.layers]
    trained_in = [sum(size(tensor) for tensor in layer.parameters() if tensor.requires_grad) for layer in built.layers]
    everything = sum(size(tensor) for tensor in built.model.parameters())
    groups = [sum(size(tensor) for tensor in module.parameters()) for module in apart(built.model)]
    return Persistent(
        parts=dict(parts),
        step_counters=state - sum(size(tensor) for tensor in moments),
        layer=max(layers),
        layer_without_base=max(
            whole - sum(size(getattr(piece.linear, piece.name)) for piece in group) for whole, group in zip(layers, base, strict=True)
        ),
        root=everything - sum(layers) - sum(groups) + max(groups, default=0),
        gradients=max(trained_in) + sum(size(tensor) for tensor in trainable.values()) - sum(trained_in),
        trained=sum(size(tensor) for tensor in trainable.values()),
        weights=sum(math.prod(place.shape) for place in built.places.values()),
        read=sum(math.prod(place.shape) for place in built.places.values() if not place.copy),
        widest=max(math.prod(place.shape) for place in built.places.values()),
        kept=sum(size(tensor) for tensor in (*trainable.values(), *moments)),
        largest=max(shard_bytes(tensor, shards) for tensor in trainable.values()),
        cached=frozen,
        moved=dict(moved),
        base_layers=tuple(offload.flat_bytes(group) for group in base),
        base_shares=tuple(offload.share_bytes(group) for group in base),
    )


def _kinds(built: Built) -> dict[int, str]:
    """The part that a parameter is counted in, by its id."""
    kinds: dict[int, str] = {}
    for linear in built.linears.values():
        kinds |= {id(tensor): WEIGHTS if _is_codes(linear, name) else SCALES for name, tensor in linear.tensors().items()}
        kinds[id(linear.norm2)] = SCALES
    for module in (built.model.get_input_embeddings(), built.model.get_output_embeddings()):
        assert module is not None
        kinds |= {id(tensor): EMBEDDINGS for tensor in module.parameters()}
    return kinds | {id(tensor): ADAPTERS for tensor in built.adapters.trainable().values()}


def _is_codes(linear: QuantLinear, name: str) -> bool:
    """The largest tensor of a format is the weights, whatever it is called."""
    return name == max(linear.names, key=lambda other: size(getattr(linear, other)))


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def shard_bytes(tensor: Tensor, shards: int) -> int:
    """Rank 0's rows of a tensor of at least one axis."""
    rows = tensor.shape[0]
    return size(tensor) // rows * -(-rows // shards) if rows else 0
