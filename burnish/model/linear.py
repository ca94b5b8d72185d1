"""The quantized linear layer: plain frozen parameters, row-major, whatever the format.

Axes: T tokens (all leading axes of x flattened), I in_features, O out_features.
"""

from collections.abc import Container, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
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
        self.format_name = self.asked_format = form.name  # asked for as `stored`, perhaps
        self.names = tuple(form.shapes(out, width, block, dtype))
        for name, (shape, kind) in form.shapes(out, width, block, dtype).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=kind), requires_grad=False))
        self.norm2 = nn.Parameter(torch.empty(out, dtype=wide(dtype)), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out, dtype=dtype), requires_grad=False) if bias else None
        self.near: Tensors = {}  # copies on the device of tensors that are kept in host memory, for as long as they are there: offload.py

    @property
    def form(self) -> Format:
        return FORMATS[self.format_name]

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] → [..., O], in the compute dtype. Costs one dequantization here and one in the backward pass."""
        kind, as_said = self.products(x)
        with as_said:
            return _FrozenProduct.apply(x.to(kind), self)

    def products(self, x: Tensor) -> tuple[torch.dtype, AbstractContextManager[Any]]:
        """See the function of this name."""
        return products(x, self.dtype)

    def tensors(self) -> Tensors:
        """The format's tensors, on the device; those that are kept in host memory as copies."""
        return dict(self.near) or {name: getattr(self, name).to(self.norm2.device) for name in self.names}

    def tiles(self, gain: Tensor | None = None, dtype: torch.dtype | None = None) -> Iterator[tuple[slice, Tensor]]:
        """The rows of gain ⊙ W, a tile at a time, each decoded once, in `dtype` or the layer's own. A tile is valid until the next is asked
        for."""
        kind = self.dtype if dtype is None else dtype
        step = max(1, TILE_BYTES[self.norm2.device.type] // (self.in_features * kind.itemsize))
        for start in range(0, self.out_features, step):
            rows = slice(start, min(start + step, self.out_features))
            yield rows, self.decoded(rows, gain, kind)

    def decoded(self, rows: slice | Tensor, gain: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Some rows of gain ⊙ W in `dtype`, a range or by their numbers [n], the gain [O] put into their scales as the fold puts it. May
        share the layer's memory."""
        tensors = {name: self.near[name][rows] if self.near else getattr(self, name)[rows].to(self.norm2.device) for name in self.names}
        if gain is None:
            return self.form.dequantize(tensors, self.block, dtype)
        if self.dtype == torch.float64:  # for proofs: a scale in fp32 or fp16 would round the gain
            return self.form.dequantize(tensors, self.block, dtype) * gain[rows, None]
        return self.form.dequantize(self.form.fold(tensors, gain[rows]), self.block, dtype)

    def encode(self, rows_NI: Tensor) -> Tensors:
        """Every parameter of this layer but the bias, for some rows of the dense matrix: what `fill` puts in their place."""
        return self._with_norm(self.form.quantize(rows_NI, self.block, self.dtype))

    def adopt(self, stored: Tensors) -> Tensors:
        """The same from rows that a file holds in this layer's format already (`Weights.stored_rows`): nothing is quantized."""
        assert self.form.adopt is not None, self.format_name
        return self._with_norm(self.form.adopt(stored))

    def adopts(self, form: str | None, block: int) -> bool:
        """Whether rows that a file holds in the format `form`, in blocks of `block` weights, are this layer's as they are."""
        return form == self.format_name and self.form.adopt is not None and self.form.divides(self.block) == block

    def _with_norm(self, tensors: Tensors) -> Tensors:
        dense = self.form.dequantize(tensors, self.block, self.dtype).to(wide(self.dtype))
        return tensors | {"norm2": dense.square().sum(dim=1)}

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {self.format_name}"


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms and of what is trained: fp32, or float64 where everything is (for proofs)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def products(x: Tensor, dtype: torch.dtype) -> tuple[torch.dtype, AbstractContextManager[Any]]:
    """What a product of x with a matrix that is held in `dtype` is computed in, and a context that leaves it so.

    That is `dtype`, and inside `torch.autocast` what that says. Our own arithmetic is explicit in every dtype, so autocast is off inside
    the context: it would round again, and round what must stay fp32.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return dtype, nullcontext()
    return torch.get_autocast_dtype(device), torch.autocast(device, enabled=False)


class _FrozenProduct(torch.autograd.Function):
    """W x + bias for a frozen W that is decoded again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: QuantLinear) -> Tensor:
        ctx.base = base  # not saved tensors: under FSDP2 the layer's own attributes are what is gathered in the backward pass
        x_TI = x.reshape(-1, base.in_features)
        y_TO = x.new_empty(x_TI.shape[0], base.out_features)
        for rows, w in base.tiles(None, x.dtype):
            torch.mm(x_TI, w.T, out=y_TO[:, rows])
        if base.bias is not None:
            y_TO += base.bias.to(y_TO.dtype)
        return y_TO.view(*x.shape[:-1], base.out_features)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not ctx.needs_input_grad[0]:
            return None, None
        base: QuantLinear = ctx.base
        g_TO = g.reshape(-1, base.out_features)
        dx_TI = g.new_zeros(g_TO.shape[0], base.in_features)
        for rows, w in base.tiles(None, g.dtype):
            dx_TI.addmm_(g_TO[:, rows], w)
        return dx_TI.view(*g.shape[:-1], base.in_features), None


def quantize_linears(
    layers: nn.ModuleList,
    format_name: str,
    block: int,
    dtype: torch.dtype,
    stored: Mapping[str, tuple[str, int]] | None = None,
    keep: Container[str] = (),
) -> dict[str, QuantLinear]:
    """Puts a `QuantLinear` in the place of every `nn.Linear` of the decoder layers but those to `keep`. Returns them by name in `layers`.

    `stored` gives each layer a format and block of its own, by that name. Raises a `UserError` that names the layer where the format's
    block does not divide its `in_features`.
    """
    swapped: dict[str, QuantLinear] = {}
    for name, module in list(layers.named_modules()):
        if not isinstance(module, nn.Linear) or name in keep:
            continue
        own, own_block = stored[name] if stored is not None else (format_name, block)
        form = FORMATS[own]
        check_divides(name, module.in_features, form, own_block, block)
        with module.weight.device:  # on meta where the dense one is: no bytes yet
            swapped[name] = QuantLinear(module.in_features, module.out_features, module.bias is not None, form, own_block, dtype)
        swapped[name].asked_format = format_name
        layers.set_submodule(name, swapped[name])
    return swapped


def check_divides(name: str, width: int, form: Format, own_block: int, block: int, setting: str = "model.format") -> None:
    """Raises a `UserError` that names the layer where a block of the format would cross its rows of `width` weights.

    `block` is what `model.block` says, the format's own block may be another; `setting` is what chose the format.
    """
    divisor = form.divides(own_block)
    if width % divisor:
        choose = f"Choose model.block from the divisors of {width}, or {setting}=none."
        raise UserError(
            f"{name}: its {width} inputs are not a multiple of the block of {divisor} weights, "
            f"and a block may not cross a row. {choose if divisor == block else f'Choose another {setting}: none fits all.'}"
        )
