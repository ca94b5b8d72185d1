"""Two kernels for GPUs: in one pass over memory what takes many in torch's operations, which stand beside the callers as their oracles.

They are written in Triton, which comes with torch's CUDA builds for Linux and needs a C compiler; `usable` says where they run. Results are
those of the plain forms bit for bit (`decode`) and to the order of a sum in fp32 (`column_dots`). A kernel is compiled for each format,
block and dtype when it is first called, and kept in Triton's cache.
"""

import logging
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger("burnish")
ELEMENTS = 1024
"""Weights that one program decodes."""
COLUMNS, ROWS, TOKENS = 128, 32, 512
"""Columns of one program of `column_dots`, rows that it reads at a time, rows that it reads in all."""


def usable(tensor: Tensor) -> bool:
    """Whether kernels can be given this tensor: on a GPU, where Triton compiles."""
    return tensor.is_cuda and _works()


@cache
def _works() -> bool:
    """Tried once, on a few numbers: without a compiler, or on a GPU that Triton does not know, all runs without kernels, slower."""
    if find_spec("triton") is None:
        log.info("Triton is not installed: formats other than nf4 and fp4 are decoded more slowly")
        return False
    codes, ones = torch.arange(16, dtype=torch.uint8, device="cuda")[None], torch.ones(1, 1, device="cuda")
    try:
        decoded = decode(codes, ones, 16, torch.float32, bits=8)
        right = torch.equal(decoded, codes.float()) and torch.equal(column_dots(decoded, decoded), decoded[0].square())
        why = "they give wrong numbers here"
    except torch.OutOfMemoryError:
        raise
    except Exception as problem:  # a compiler's, a driver's, Triton's own: whatever it is, there is another way
        right, why = False, str(problem).strip().partition("\n")[0]
    if not right:
        log.warning("Triton's kernels are not used, and decoding is slower: %s. They need a C compiler and Python's headers.", why)
    return right


def decode(
    packed: Tensor,
    scale: Tensor,
    block: int,
    dtype: torch.dtype,
    *,
    bits: int,
    halves: bool = False,
    middle: int = 0,
    zero: Tensor | None = None,
    least: Tensor | None = None,
) -> Tensor:
    """W [n, in] in `dtype` (fp32, bf16, fp16), (q − zero)·scale or (q − middle)·scale + least, in fp32 inside.

    packed: uint8 [n, in · bits / 8], codes q of 1, 2, 4 or 8 bits, the first in a byte's lowest bits; or int8 [n, in], signed codes. With
    `halves`, a block's first half lies in the low and its second in the high four bits of block / 2 bytes. scale, zero, least
    [n, in / block] in any float dtype or uint8.
    """
    width = packed.shape[1] * 8 // bits
    out = torch.empty(packed.shape[0], width, dtype=dtype, device=packed.device)
    other = zero if zero is not None else least if least is not None else scale
    if out.numel():
        grid = (-(-out.numel() // ELEMENTS),)
        _decode_kernel()[grid](
            packed.contiguous(),
            scale.contiguous(),
            other.contiguous(),
            out,
            out.numel(),
            BLOCK=block,
            BITS=bits,
            HALVES=halves,
            MIDDLE=middle,
            ZERO=zero is not None,
            LEAST=least is not None,
            ELEMENTS=ELEMENTS,
            enable_fp_fusion=False,  # a product and a sum that are rounded once would not be what other devices decode
        )
    return out


def column_dots(a_TO: Tensor, b_TO: Tensor) -> Tensor:
    """Σ over rows of a · b [O] in fp32; products and sums in fp32, always in the same order."""
    count, columns = a_TO.shape
    parts = torch.empty(max(1, -(-count // TOKENS)), columns, dtype=torch.float32, device=a_TO.device)
    grid = (-(-columns // COLUMNS), len(parts))
    strides = (a_TO.stride(0), a_TO.stride(1), b_TO.stride(0), b_TO.stride(1))
    _dots_kernel()[grid](a_TO, b_TO, parts, count, columns, *strides, COLUMNS=COLUMNS, ROWS=ROWS, TOKENS=TOKENS)
    return parts.sum(0)


@cache
def _decode_kernel() -> Any:
    import triton
    from triton import language as tl

    @triton.jit
    def kernel(
        packed,
        scale,
        other,
        out,
        count,
        BLOCK: tl.constexpr,
        BITS: tl.constexpr,
        HALVES: tl.constexpr,
        MIDDLE: tl.constexpr,
        ZERO: tl.constexpr,
        LEAST: tl.constexpr,
        ELEMENTS: tl.constexpr,
    ):
        at = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
        here = at < count
        inside = at % BLOCK
        if HALVES:
            byte = at // BLOCK * (BLOCK // 2) + inside % (BLOCK // 2)
            shift = inside // (BLOCK // 2) * BITS
        else:
            byte = at * BITS // 8
            shift = at * BITS % 8
        code = tl.load(packed + byte, here, 0).to(tl.int32)
        if BITS < 8:
            code = (code >> shift.to(tl.int32)) & ((1 << BITS) - 1)
        value = (code - MIDDLE).to(tl.float32)
        if ZERO:
            value -= tl.load(other + at // BLOCK, here, 0).to(tl.float32)
        value *= tl.load(scale + at // BLOCK, here, 0).to(tl.float32)
        if LEAST:
            value += tl.load(other + at // BLOCK, here, 0).to(tl.float32)
        tl.store(out + at, value.to(out.dtype.element_ty), here)

    return kernel


@cache
def _dots_kernel() -> Any:
    import triton
    from triton import language as tl

    @triton.jit
    def kernel(
        a, b, parts, count, columns, a_row, a_column, b_row, b_column, COLUMNS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr
    ):
        column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        total = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, TOKENS, ROWS):
            row = (tl.program_id(1) * TOKENS + start + tl.arange(0, ROWS)).to(tl.int64)
            here = (row < count)[:, None] & (column < columns)[None, :]
            one = tl.load(a + row[:, None] * a_row + column[None, :] * a_column, here, 0).to(tl.float32)
            two = tl.load(b + row[:, None] * b_row + column[None, :] * b_column, here, 0).to(tl.float32)
            total += tl.sum(one * two, axis=0)
        tl.store(parts + tl.program_id(1).to(tl.int64) * columns + column, total, column < columns)

    return kernel
