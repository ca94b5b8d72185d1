"""INT8: symmetric codes −127 … 127 and one fp32 scale (absmax / 127) for each block of a row; in `int8_row` the row is one block.

packed  int8 [out, in]
scale   fp32 [out, in / block]

This is plain absmax rounding of the weights, decoded before the product. It is not LLM.int8() (arXiv 2208.07339), which also rounds the
activations and computes columns with outliers apart in 16 bits: no activation is rounded here, and no column is treated apart.
"""

import torch
from torch import Tensor

from burnish import kernels
from burnish.model.formats.base import Format, Shapes, Tensors, divided, fold_scale

MOST = 127


def shapes(out: int, width: int, block: int, dtype: torch.dtype) -> Shapes:
    return {"packed": ((out, width), torch.int8), "scale": ((out, width // block), torch.float32)}


def quantize(rows: Tensor, block: int, dtype: torch.dtype) -> Tensors:
    count, width = rows.shape
    blocks = rows.to(torch.float32).reshape(count, width // block, block)
    scale = divided(blocks.abs().amax(2), MOST)
    # a block of zeros has the scale 0; so has one whose absmax is so near to 0 that fp32 has no 127th part of it
    codes = torch.where(scale[..., None] > 0, blocks / scale[..., None], 0).round().clamp(-MOST, MOST)
    return {"packed": codes.to(torch.int8).view(count, width), "scale": scale}


def dequantize(tensors: Tensors, block: int, dtype: torch.dtype) -> Tensor:
    packed, scale = tensors["packed"], tensors["scale"]
    if kernels.usable(packed) and dtype != torch.float64:
        return kernels.decode(packed, scale, block, dtype, bits=8)
    blocks = packed.to(torch.float32).view(packed.shape[0], packed.shape[1] // block, block)
    return blocks.mul_(scale[..., None]).view(packed.shape).to(dtype)


FORMAT = Format("int8", 1, lambda block: block, shapes, quantize, dequantize, fold_scale)
BY_ROW = Format(
    "int8_row",
    1,
    lambda block: 1,
    lambda out, width, block, dtype: shapes(out, width, width, dtype),
    lambda rows, block, dtype: quantize(rows, rows.shape[1], dtype),
    lambda tensors, block, dtype: dequantize(tensors, tensors["packed"].shape[1], dtype),
    fold_scale,
)
