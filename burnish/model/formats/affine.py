"""W = (q − z)·s by blocks of a row: what `int4` and `hqq` share.

packed  uint8 [out, in · bits / 8]   q, see `bits.py`
scale   fp32  [out, in / block]      s
zero          [out, in / block]      z in units of q: an integer (uint8) or a float

Scales are fp32, so that the fold d ⊙ s costs one rounding to 2⁻²⁴: in bf16 it would be one to 2⁻⁸ on every weight of a row, which is what
the fold is there to avoid. An engine that computes in 16 bits rounds them on load, once, after the fold; that costs nothing here but half a
bit for each weight at blocks of 32, a quarter at 64. Zero points are not scaled by d, so they take what holds them: a byte, or fp16.
"""

from functools import partial

import torch
from torch import Tensor

from burnish import kernels
from burnish.model.formats.base import Format, Shapes, Tensors, fold_scale
from burnish.model.formats.bits import pack, unpack
from burnish.model.formats.solve import solve


def affine(name: str, bits: int, zero: torch.dtype) -> Format:
    """A format of codes of `bits` bits; zero points are held as `zero`, and are integers among the codes where that is uint8."""
    given = partial(shapes, bits, zero), partial(quantize, bits, zero), partial(dequantize, bits)
    return Format(name, 1, lambda block: block, *given, fold_scale)


def shapes(bits: int, zero: torch.dtype, out: int, width: int, block: int, dtype: torch.dtype) -> Shapes:
    blocks = (out, width // block)
    return {"packed": ((out, width * bits // 8), torch.uint8), "scale": (blocks, torch.float32), "zero": (blocks, zero)}


def quantize(bits: int, zero: torch.dtype, rows: Tensor, block: int, dtype: torch.dtype) -> Tensors:
    codes, scales, zeros = solve(rows, block, 2**bits - 1, zero)
    return {"packed": pack(codes, bits), "scale": scales, "zero": zeros}


def dequantize(bits: int, tensors: Tensors, block: int, dtype: torch.dtype) -> Tensor:
    if bits != 3 and kernels.usable(tensors["packed"]) and dtype != torch.float64:
        return kernels.decode(tensors["packed"], tensors["scale"], block, dtype, bits=bits, zero=tensors["zero"])
    codes = unpack(tensors["packed"], bits)
    blocks = codes.to(torch.float32).view(codes.shape[0], codes.shape[1] // block, block)
    blocks.sub_(tensors["zero"].to(torch.float32)[..., None]).mul_(tensors["scale"][..., None])
    return blocks.view(codes.shape).to(dtype)
