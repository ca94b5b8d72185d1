"""The merge: d ⊙ (W + s·B A) as dense rows onto the dequantized base, in fp32 whatever the compute dtype."""

from collections.abc import Iterator

import torch
from torch import Tensor

from burnish.errors import UserError
from burnish.export.fold import Gathered, gain, gather
from burnish.load.fill import slabs
from burnish.model.linear import QuantLinear, wide
from burnish.parallel.rows import whole
from burnish.skeleton import Built


def merged_tensors(built: Built) -> Iterator[tuple[str, Iterator[Tensor]]]:
    """Every tensor of the merged model by its name on disk, in the model's order, as slabs of rows.

    What is not a decoder's linear layer comes as it is; a tied head does not come at all. Every rank must take every item, since taking one
    gathers its rows; the slabs are computed where they are taken. Costs one quantized layer and a slab of dense rows.
    """
    for name, place in built.places.items():
        if isinstance(place.module, QuantLinear) and place.encodes:
            yield name, merged_rows(gather(place.module, built.adapters.by_name.get(name.removesuffix(".weight"))))
        else:
            (parameter,) = place.parameters().values()
            yield name, iter((whole(parameter.detach()),))


def merged_rows(gathered: Gathered) -> Iterator[Tensor]:
    """d ⊙ (W + s·B A) by slabs of rows, in fp32 (float64 where the model computes in it), W decoded once and rounded once."""
    layer, adapter = gathered.layer, gathered.adapter
    kind, d_O = wide(layer.dtype), gain(gathered)
    for start, stop in slabs(0, layer.out_features, (layer.out_features, layer.in_features)):
        w = layer.form.dequantize({name: tensor[start:stop] for name, tensor in layer.tensors().items()}, layer.block, kind)
        if adapter is not None:
            w = torch.addmm(w, adapter.b[start:stop], adapter.a, alpha=adapter.scaling)
        yield w if d_O is None else w * d_O[start:stop, None]


def cast(name: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows in `dtype`. A `UserError` that names the tensor where a value is not finite, before or after."""
    result = rows.to(dtype)
    if not result.isfinite().all():
        if not rows.isfinite().all():
            raise UserError(f"{name} holds values that are not finite: the training diverged. Train again with a smaller train.lr.")
        most = torch.finfo(dtype).max
        raise UserError(f"{name}: {rows.abs().max():.3g} exceeds export.dtype, whose largest is {most:.3g}. Set export.dtype=bf16.")
    return result
