"""Single layers with bytes in them, for laws about one layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from burnish.adapt.adapter import Adapter, Switch
from burnish.adapt.attach import MAGNITUDE
from burnish.model.formats import FORMATS
from burnish.model.linear import QuantLinear, wide

BLOCK = 64


def a_linear(
    format_name: str, dtype: torch.dtype = torch.float32, *, width: int = 128, out: int = 48, bias: bool = False, seed: int = 0
) -> QuantLinear:
    """A filled layer whose rows differ in size, as real ones do."""
    generator = torch.Generator().manual_seed(seed)
    layer = QuantLinear(width, out, bias, FORMATS[format_name], BLOCK, dtype)
    rows = torch.randn(out, width, generator=generator) * 0.1 * (0.2 + torch.rand(out, 1, generator=generator))
    put(layer, rows)
    if layer.bias is not None:
        layer.bias.data.copy_(torch.randn(out, generator=generator))
    return layer


def put(layer: QuantLinear, rows: Tensor) -> None:
    """Encodes a dense matrix into the layer."""
    for name, tensor in layer.encode(rows).items():
        getattr(layer, name).data.copy_(tensor)


def dense(layer: QuantLinear) -> Tensor:
    """W [O, I] as the layer holds it, decoded whole."""
    return layer.form.dequantize(layer.tensors(), layer.block, layer.dtype).clone()


def an_adapter(
    base: QuantLinear, method: str, *, rank: int = 8, scaling: float = 2.0, dropout: float = 0.0, seed: int = 1, trained: bool = True
) -> Adapter:
    """An adapter on the layer: at its first values, or with random ones as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    dtype = wide(base.dtype)
    adapter = Adapter(base, rank, scaling, dropout, method == "dora", Switch(), dtype)
    with torch.no_grad():
        adapter.a.copy_((torch.rand(adapter.a.shape, generator=generator) * 2 - 1) / base.in_features**0.5)
        adapter.start()
        if trained:
            adapter.b.copy_(torch.randn(adapter.b.shape, generator=generator) * 0.1)
            if adapter.m is not None:
                adapter.m.mul_(0.8 + 0.4 * torch.rand(adapter.m.shape, generator=generator))
    adapter.switch.advance()
    return adapter


def relative(found: Tensor, right: Tensor) -> float:
    """The size of the difference over the size of what is right."""
    return ((found.double() - right.double()).norm() / right.double().norm()).item()


def inputs(dtype: torch.dtype, *shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def results(adapter: Any, forward: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> dict[str, Tensor]:
    """Output and gradients of x, A, B and m."""
    x = x.clone().requires_grad_()
    wanted = {"x": x, "a": adapter.a, "b": adapter.b} | ({} if adapter.m is None else {"m": adapter.m})
    y = forward(x)
    return {"y": y.detach()} | dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), g), strict=True))


def kind_of(format_name: str) -> tuple[Any, ...]:
    """What sets a row of FORMATS apart outside of itself: the names and dtypes of its tensors."""
    tensors = FORMATS[format_name].shapes(1, 256, BLOCK, torch.float32).items()
    return tuple((part, dtype) for part, (_, dtype) in tensors)


def _kinds() -> list[str]:
    first: dict[tuple[Any, ...], str] = {}
    for name in FORMATS:
        first.setdefault(kind_of(name), name)
    return list(first.values())


KINDS = _kinds()
"""One row of FORMATS for each set of tensors, by name and dtype: more than that, nothing outside a format can tell apart."""

OTHER_KINDS = [name for name in KINDS if name not in ("none", "nf4")]
"""Tests that also go over families or methods do so for `none` and `nf4`, and take the other kinds once."""

METHODS_AND_KINDS = [*((method, name) for method in MAGNITUDE for name in ("none", "nf4")), *(("dora", name) for name in OTHER_KINDS)]


def has_half_scales(format_name: str) -> bool:
    """Whether its scales are fp16, so that a fold rounds d to 11 bits: those of a file format that has no others."""
    return any(kind == torch.float16 for _, kind in FORMATS[format_name].shapes(1, 64, 64, torch.float32).values())


def fold_rounding(format_name: str, exact: Tensor) -> Tensor:
    """What folding d into the scales may cost each weight of d ⊙ W [O, I]."""
    if not has_half_scales(format_name):
        return exact.abs() * 1e-6  # one rounding of the scale to fp32 and one of the product
    # half of a last bit of one or two scales, of which each is at most 2 · max |w| over its largest code; below 2^-14, fp16 has 2^-24 steps
    return exact.abs().amax(1, keepdim=True) * 3 * 2**-11 + 128 * 2**-25
