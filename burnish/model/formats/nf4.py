"""NF4 (QLoRA, arXiv 2305.14314): 16 levels of a normal distribution, one fp32 absmax for each block of a row.

Code book and kernels are bitsandbytes'; its bytes, scales and decoded values are ours bit for bit.
"""

import logging
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from burnish.model.formats.base import Format, Shapes, Tensors


@cache
def _functional() -> ModuleType:
    """bitsandbytes, without what it says on import: that an optional CPU kernel is missing, which no user of ours can act on."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.getMessage())
    from bitsandbytes import functional

    return functional


def shapes(out: int, width: int, block: int, dtype: torch.dtype) -> Shapes:
    return {"packed": ((out, width // 2), torch.uint8), "scale": ((out, width // block), torch.float32)}


def quantize(rows: Tensor, block: int, dtype: torch.dtype) -> Tensors:
    functional = _functional()
    count, width = rows.shape
    # bitsandbytes quantizes what it is given as one flat run of blocks; `width % block == 0` keeps them inside rows
    packed, state = functional.quantize_4bit(rows.float().contiguous(), blocksize=block, quant_type="nf4", compress_statistics=False)
    return {"packed": packed.view(count, width // 2), "scale": state.absmax.view(count, width // block)}


def dequantize(tensors: Tensors, block: int, dtype: torch.dtype) -> Tensor:
    functional = _functional()
    packed, scale = tensors["packed"], tensors["scale"]
    # the kernels write 32- and 16-bit floats; float64 is for proofs and holds the fp32 values
    kernel_dtype = torch.float32 if dtype == torch.float64 else dtype
    state = functional.QuantState(
        absmax=scale.reshape(-1),
        shape=torch.Size((packed.shape[0], packed.shape[1] * 2)),
        blocksize=block,
        quant_type="nf4",
        dtype=kernel_dtype,
    )
    return functional.dequantize_4bit(packed.reshape(-1, 1), state).to(dtype)


def fold(tensors: Tensors, d: Tensor) -> Tensors:
    return {"packed": tensors["packed"], "scale": tensors["scale"] * d[:, None].to(torch.float32)}


FORMAT = Format("nf4", 1, lambda block: block, shapes, quantize, dequantize, fold, adopt=dict)
