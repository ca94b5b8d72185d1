"""4-bit codes into a book of 16 levels, one absmax for each block of a row: what `nf4` and `fp4` share.

packed  uint8 [out, in / 2]       the first of two codes in the high half
scale   fp32  [out, in / block]   the block's absmax

Code books and kernels are bitsandbytes'; bytes, scales and decoded values are equal to its own, bit for bit.

Double quantization (QLoRA, section 3: the scales are quantized too) is by row, so that the gain of a row still folds:

scale   uint8 [out, in / block]   c: the absmax is least + step · c²
bounds  fp32  [out, 2]            least and step of the row

The squares put more levels where the scales are small: a block whose absmax is a hundredth of the row's largest is held to 4 %, evenly
spaced levels would hold it to 20 %. It is not bitsandbytes' nested form (blocks of 256 scales, which cross rows); a reader of that gets the
fp32 scales. Codes are those of the exact scales.
"""

import logging
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor

from burnish.model.formats.base import Format, Shapes, Tensors, divided, fold_scale

LEVELS = 255


def code_book(name: str) -> Format:
    """The format of bitsandbytes' `quant_type` of this name."""
    return Format(name, 1, divides, shapes, partial(quantize, name), partial(dequantize, name), fold_scale, adopt=dict)


def double_quantized(name: str) -> Format:
    """The same codes with scales in 8 bits: `NAME_double`."""
    functions = partial(quantize_double, name), partial(dequantize_double, name)
    return Format(f"{name}_double", 1, divides, shapes_double, *functions, fold_double)


def divides(block: int) -> int:
    return block


def shapes(out: int, width: int, block: int, dtype: torch.dtype) -> Shapes:
    return {"packed": ((out, width // 2), torch.uint8), "scale": ((out, width // block), torch.float32)}


def quantize(quant_type: str, rows: Tensor, block: int, dtype: torch.dtype) -> Tensors:
    functional = _functional()
    count, width = rows.shape
    if not count:  # a GPU's kernel cannot be started for nothing
        return {name: torch.empty(shape, dtype=kind, device=rows.device) for name, (shape, kind) in shapes(0, width, block, dtype).items()}
    # bitsandbytes quantizes what it is given as one flat run of blocks; `width % block == 0` keeps them inside rows
    packed, state = functional.quantize_4bit(rows.float().contiguous(), blocksize=block, quant_type=quant_type, compress_statistics=False)
    return {"packed": packed.view(count, width // 2), "scale": state.absmax.view(count, width // block)}


def dequantize(quant_type: str, tensors: Tensors, block: int, dtype: torch.dtype) -> Tensor:
    functional = _functional()
    packed, scale = tensors["packed"], tensors["scale"]
    if not len(packed):
        return torch.empty(0, 2 * packed.shape[1], dtype=dtype, device=packed.device)
    # the kernels write 32- and 16-bit floats; float64 is for proofs and holds the fp32 values
    kernel_dtype = torch.float32 if dtype == torch.float64 else dtype
    state = functional.QuantState(
        absmax=scale.reshape(-1),
        shape=torch.Size((packed.shape[0], packed.shape[1] * 2)),
        blocksize=block,
        quant_type=quant_type,
        dtype=kernel_dtype,
    )
    return functional.dequantize_4bit(packed.reshape(-1, 1), state).to(dtype)


@cache
def _functional() -> ModuleType:
    """bitsandbytes, without what it says on import: that an optional CPU kernel is missing, which no user of ours can act on."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in record.getMessage())
    from bitsandbytes import functional

    return functional


# --- double quantization


def shapes_double(out: int, width: int, block: int, dtype: torch.dtype) -> Shapes:
    narrow = {"scale": ((out, width // block), torch.uint8), "bounds": ((out, 2), torch.float32)}
    return shapes(out, width, block, dtype) | narrow


def quantize_double(quant_type: str, rows: Tensor, block: int, dtype: torch.dtype) -> Tensors:
    tensors = quantize(quant_type, rows, block, dtype)
    scale = tensors["scale"]
    least, most = scale.amin(1, keepdim=True), scale.amax(1, keepdim=True)
    share = torch.where(most > least, (scale - least) / (most - least), 0)
    codes = (share.sqrt() * LEVELS).round().to(torch.uint8)
    return tensors | {"scale": codes, "bounds": torch.cat([least, divided(most - least, LEVELS**2)], dim=1)}


def dequantize_double(quant_type: str, tensors: Tensors, block: int, dtype: torch.dtype) -> Tensor:
    return dequantize(quant_type, {"packed": tensors["packed"], "scale": single_scales(tensors)}, block, dtype)


def single_scales(tensors: Tensors) -> Tensor:
    """The fp32 absmax of each block [n, blocks]: what the format without double quantization holds."""
    codes, bounds = tensors["scale"].to(torch.float32), tensors["bounds"]
    return bounds[:, :1] + bounds[:, 1:] * (codes * codes)


def fold_double(tensors: Tensors, d: Tensor) -> Tensors:
    return tensors | {"bounds": tensors["bounds"] * d[:, None].to(torch.float32)}
