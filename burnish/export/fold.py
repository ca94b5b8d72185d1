"""The fold: d goes into the scales of the base and into B, so that QDoRA becomes an ordinary quantized base with an ordinary LoRA adapter.

    d ⊙ (W x + s·B A x) = (d ⊙ W) x + (s·d ⊙ B) A x

d belongs to an output row and so do a row's scales: codes and zero points do not change, nothing is requantized. Exact to fp32 where
scales are fp32; the format `none` in bf16 has no scales, and rounds.

Axes: I in_features, O out_features, R rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from burnish.adapt.adapter import Adapter, Switch
from burnish.model.formats import Tensors
from burnish.model.linear import QuantLinear
from burnish.parallel.rows import whole
from burnish.skeleton import Built


@dataclass(frozen=True)
class Gathered:
    """One layer with all of its rows here, and its adapter likewise; None where it has none."""

    layer: QuantLinear
    adapter: Adapter | None


@dataclass(frozen=True)
class Folded:
    """A layer as it is served: the format's tensors of d ⊙ W, and y = W' x + B' A x + bias. alpha' is the rank, so the scaling is 1."""

    tensors: Tensors
    a: Tensor | None
    """A [R, I], as it was trained."""
    b: Tensor | None
    """B' = s·d ⊙ B [O, R]."""


def fold(built: Built) -> dict[str, Folded]:
    """Every linear layer of the decoder by its name in the model. Costs the quantized base once more; every rank must call it."""
    return {name: fold_layer(gather(layer, built.adapters.by_name.get(name))) for name, layer in built.linears.items()}


def fold_layer(gathered: Gathered) -> Folded:
    """One layer of `fold`: what a writer that streams calls."""
    layer, adapter, d_O = gathered.layer, gathered.adapter, gain(gathered)
    tensors = layer.tensors() if d_O is None else layer.form.fold(layer.tensors(), d_O)
    if adapter is None:
        return Folded(tensors, None, None)
    b_OR = adapter.scaling * adapter.b.detach()
    return Folded(tensors, adapter.a.detach(), b_OR if d_O is None else d_O[:, None] * b_OR)


def gather(base: QuantLinear, adapter: Adapter | None) -> Gathered:
    """The layer's rows from all ranks, on this rank's device; a collective where it is sharded, and no copy where it is not."""
    with torch.device("meta"):
        layer = QuantLinear(base.in_features, base.out_features, base.bias is not None, base.form, base.block, base.dtype)
        here = None
        if adapter is not None:
            here = Adapter(layer, adapter.a.shape[0], adapter.scaling, 0.0, adapter.m is not None, Switch(), adapter.a.dtype)
    _share(base, layer)
    if adapter is not None and here is not None:
        _share(adapter, here)
    return Gathered(layer, here)


def gain(gathered: Gathered) -> Tensor | None:
    """d = m / ‖W + s·B A‖ [O], by the adapter's own arithmetic; None where it is 1. Costs one dequantization."""
    adapter = gathered.adapter
    if adapter is None or adapter.m is None:
        return None
    adapter.refresh()
    return adapter.d


def _share(source: nn.Module, target: nn.Module) -> None:
    """Puts all rows of the source's own parameters into the target; its submodules are left."""
    for name, parameter in source.named_parameters(recurse=False):
        setattr(target, name, nn.Parameter(whole(parameter.detach()), requires_grad=False))
