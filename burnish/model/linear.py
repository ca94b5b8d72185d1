"""The quantized linear layer: plain frozen parameters, row-major, whatever the format.

Axes: T tokens (all leading axes of x flattened), I in_features, O out_features.
"""

from collections.abc import Container, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from burnish.errors import UserError
from burnish.model.formats import FORMATS, Format, Tensors

# Rows of the dense matrix that exist at a time. On a CPU a tile that stays below the allocator's mmap threshold (32 MiB in glibc) reuses
# pages that are already mapped, and a tile of some MiB stays in the cache between its decoding and its product.
TILE_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}


class QuantLinear(nn.Module):
    """y = W x + bias with W [O, I] in `format`. Nothing of it is trained.

    Parameters: the format's tensors; `norm2` [O], the squared norm of each dequantized row as rounded to
    the compute dtype; `bias` [O] or None.
    """

    def __init__(self, width: int, out: int, bias: bool, form: Format, block: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features, self.out_features, self.block, self.dtype = width, out, block, dtype
        self.format_name = form.name
        self.names = tuple(form.shapes(out, width, block, dtype))
        for name, (shape, kind) in form.shapes(out, width, block, dtype).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=kind), requires_grad=False))
        self.norm2 = nn.Parameter(torch.empty(out, dtype=wide(dtype)), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out, dtype=dtype), requires_grad=False) if bias else None

    @property
    def form(self) -> Format:
        return FORMATS[self.format_name]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] → [..., O], in the compute dtype. Costs one dequantization here and one in the backward pass."""
        return _FrozenProduct.apply(x, self)

    def tensors(self) -> Tensors:
        return {name: getattr(self, name) for name in self.names}

    def tiles(self, gain: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """The rows of gain ⊙ W, a tile at a time, each decoded once, in the compute dtype. A tile is valid until the next is asked for."""
        step = max(1, TILE_BYTES[self.norm2.device.type] // (self.in_features * self.dtype.itemsize))
        for start in range(0, self.out_features, step):
            rows = slice(start, min(start + step, self.out_features))
            tensors = {name: getattr(self, name)[rows] for name in self.names}
            if gain is None:
                yield rows, self.form.dequantize(tensors, self.block, self.dtype)
            elif self.dtype == torch.float64:  # for proofs: a scale in fp32 would round the gain
                yield rows, self.form.dequantize(tensors, self.block, self.dtype) * gain[rows, None]
            else:
                yield rows, self.form.dequantize(self.form.fold(tensors, gain[rows]), self.block, self.dtype)

    def encode(self, rows_NI: Tensor) -> Tensors:
        """Every parameter of this layer but the bias, for some rows of the dense matrix: what `fill` puts in their place."""
        tensors = self.form.quantize(rows_NI, self.block, self.dtype)
        dense = self.form.dequantize(tensors, self.block, self.dtype).to(wide(self.dtype))
        return tensors | {"norm2": dense.square().sum(dim=1)}

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {self.format_name}"


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms and of what is trained: fp32, or float64 where everything is (for proofs)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _FrozenProduct(torch.autograd.Function):
    """W x + bias for a frozen W that is decoded again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: QuantLinear) -> Tensor:
        ctx.base = base  # not saved tensors: under FSDP2 the layer's own attributes are what is gathered in the backward pass
        x_TI = x.reshape(-1, base.in_features)
        y_TO = x.new_empty(x_TI.shape[0], base.out_features)
        for rows, w in base.tiles():
            torch.mm(x_TI, w.T, out=y_TO[:, rows])
        if base.bias is not None:
            y_TO += base.bias
        return y_TO.view(*x.shape[:-1], base.out_features)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not ctx.needs_input_grad[0]:
            return None, None
        base: QuantLinear = ctx.base
        g_TO = g.reshape(-1, base.out_features)
        dx_TI = g.new_zeros(g_TO.shape[0], base.in_features)
        for rows, w in base.tiles():
            dx_TI.addmm_(g_TO[:, rows], w)
        return dx_TI.view(*g.shape[:-1], base.in_features), None


def quantize_linears(
    layers: nn.ModuleList, format_name: str, block: int, dtype: torch.dtype, keep: Container[str] = ()
) -> dict[str, QuantLinear]:
    """Puts a `QuantLinear` in the place of every `nn.Linear` of the decoder layers but those to `keep`. Returns them by name in `layers`.

    Raises a `UserError` that names the layer where the format's block does not divide its `in_features`.
    """
    form = FORMATS[format_name]
    swapped: dict[str, QuantLinear] = {}
    for name, module in list(layers.named_modules()):
        if not isinstance(module, nn.Linear) or name in keep:
            continue
        if module.in_features % form.divides(block):
            raise UserError(
                f"{name}: its {module.in_features} inputs are not a multiple of the block of {block} weights, "
                "and a block may not cross a row. "
                f"Choose model.block from the divisors of {module.in_features}, or model.format=none."
            )
        with module.weight.device:  # on meta where the dense one is: no bytes yet
            swapped[name] = QuantLinear(module.in_features, module.out_features, module.bias is not None, form, block, dtype)
        layers.set_submodule(name, swapped[name])
    return swapped
