"""The fold: d goes into the scales of the base and into B, so that QDoRA becomes an ordinary quantized base with an ordinary LoRA adapter.

    d ⊙ (W x + s·B A x) = (d ⊙ W) x + (s·d ⊙ B) A x

d belongs to an output row and so do a row's scales: codes and zero points do not change, nothing is requantized. Exact to fp32 where
scales are fp32; the format `none` in bf16 has no scales, and rounds.

Axes: I in_features, O out_features, R rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from burnish.adapt.adapter import Adapter, dora_gain
from burnish.model.formats import Tensors
from burnish.model.linear import QuantLinear
from burnish.parallel.rows import whole
from burnish.skeleton import Built


@dataclass(frozen=True)
class Gathered:
    """One layer with all of its rows here, and its adapter's; `a` and `b` are None where it has none, `m` where that is LoRA."""

    layer: QuantLinear
    a: Tensor | None = None
    b: Tensor | None = None
    m: Tensor | None = None
    scaling: float = 1.0


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
    layer, d = gathered.layer, gain(gathered)
    tensors = layer.tensors() if d is None else layer.form.fold(layer.tensors(), d)
    if gathered.b is None:
        return Folded(tensors, None, None)
    scaled = gathered.scaling * gathered.b
    return Folded(tensors, gathered.a, scaled if d is None else d[:, None] * scaled)


def gather(base: QuantLinear, adapter: Adapter | None) -> Gathered:
    """The layer's rows from all ranks, on this rank's device; a collective where it is sharded, and no copy where it is not."""
    with torch.device("meta"):
        layer = QuantLinear(base.in_features, base.out_features, base.bias is not None, base.form, base.block, base.dtype)
    for name, parameter in base.named_parameters(recurse=False):
        setattr(layer, name, nn.Parameter(whole(parameter.detach()), requires_grad=False))
    if adapter is None:
        return Gathered(layer)
    m = None if adapter.m is None else whole(adapter.m.detach())
    return Gathered(layer, whole(adapter.a.detach()), whole(adapter.b.detach()), m, adapter.scaling)


def gain(gathered: Gathered) -> Tensor | None:
    """d = m / ‖W + s·B A‖ [O], as the adapter's forward computes it; None where it is 1. Costs one dequantization."""
    layer, a_RI, b_OR, m_O = gathered.layer, gathered.a, gathered.b, gathered.m
    if a_RI is None or b_OR is None or m_O is None:
        return None
    a_wide = a_RI.to(layer.dtype).to(m_O.dtype)  # rounded to the compute dtype, as it was while m was trained
    gram_RR = a_wide @ a_wide.T
    d_O = torch.empty_like(m_O)
    for rows, w in layer.tiles():
        d_O[rows] = dora_gain(layer.norm2[rows], w.to(m_O.dtype) @ a_wide.T, gram_RR, b_OR[rows], m_O[rows], gathered.scaling)
    return d_O
