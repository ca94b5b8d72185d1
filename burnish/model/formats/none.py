"""No quantization: the matrix in the compute dtype."""

import torch
from torch import Tensor

from burnish.model.formats.base import Format, Shapes, Tensors


def shapes(out: int, width: int, block: int, dtype: torch.dtype) -> Shapes:
    return {"weight": ((out, width), dtype)}


def quantize(rows: Tensor, block: int, dtype: torch.dtype) -> Tensors:
    return {"weight": rows.to(dtype)}


def dequantize(tensors: Tensors, block: int, dtype: torch.dtype) -> Tensor:
    return tensors["weight"].to(dtype)


def fold(tensors: Tensors, d: Tensor) -> Tensors:
    weight = tensors["weight"]
    return {"weight": (weight.to(d.dtype) * d[:, None]).to(weight.dtype)}


FORMAT = Format("none", 1, lambda block: 1, shapes, quantize, dequantize, fold)
