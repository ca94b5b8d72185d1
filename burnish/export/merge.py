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
    """d ⊙ (W + s·B A) by slabs of rows, in fp32 (float64 where the model computes in it): the weight that the live layer multiplies with.

    d goes into the scales as in training, so fp16 scales round here as they did there. One decoding of W, one rounding of the sum.
    """
    layer, adapter = gathered.layer, gathered.adapter
    kind, d_O = wide(layer.dtype), gain(gathered)
    for start, stop in slabs(0, layer.out_features, (layer.out_features, layer.in_features)):
        w = layer.decoded(slice(start, stop), d_O, kind)
        if adapter is not None:
            b_OR = adapter.scaling * adapter.b[start:stop]
            w = torch.addmm(w, b_OR if d_O is None else d_O[start:stop, None] * b_OR, adapter.a)
        yield w


def cast(name: str, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows in `dtype`. A `UserError` that names the tensor where a value is not finite, before or after."""
    result = rows.to(dtype)
    if not result.isfinite().all():
        if not rows.isfinite().all():
            raise UserError(f"{name} holds values that are not finite: the training diverged. Train again with a smaller train.lr.")
        most = torch.finfo(dtype).max
        raise UserError(f"{name}: {rows.abs().max():.3g} exceeds export.dtype, whose largest is {most:.3g}. Set export.dtype=bf16.")
    return result
