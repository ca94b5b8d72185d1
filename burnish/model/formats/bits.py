"""Codes of 1, 2, 3, 4 and 8 bits in bytes, without a wasted bit.

1, 2, 4 bits: the first of 8 / bits codes lies in a byte's lowest bits. So four bytes of 4-bit codes, read as a little-endian int32, hold
element i at bits 4·i: the layout of compressed-tensors' `weight_packed`.
3 bits: a row is two planes, first the low two bits of all its codes, then the high bit of all, each packed as above.

Unpacking spreads a byte over 16, 32 or 64 bits by shifts and masks, one code to a byte: some passes over contiguous integers, where one
strided write for each code of a byte would be several times slower.
"""

import torch
from torch import Tensor

SPREAD: dict[int, tuple[torch.dtype, tuple[tuple[int, int], ...]]] = {
    4: (torch.int16, ((4, 0x0F0F),)),
    2: (torch.int32, ((12, 0x000F000F), (6, 0x03030303))),
    1: (torch.int64, ((28, 0x0000000F0000000F), (14, 0x0003000300030003), (7, 0x0101010101010101))),
}
"""bits → an integer of 8 / bits bytes, and the (shift, mask) steps that halve the codes which lie together until each has a byte."""


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [n, in] below 2**bits → bytes uint8 [n, in · bits / 8]. `in` must be a multiple of 8."""
    if bits == 8:
        return codes
    if bits == 3:
        return torch.cat([pack(codes & 3, 2), pack(codes >> 2, 1)], dim=1)
    lanes = codes.view(codes.shape[0], codes.shape[1] * bits // 8, 8 // bits)
    packed = lanes[..., 0].clone()
    for lane in range(1, 8 // bits):
        packed |= lanes[..., lane] << (bits * lane)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """What `pack` was given; `packed` itself where that is 8 bits. Costs three times the codes' bytes at most."""
    if bits == 8:
        return packed
    if bits == 3:
        low = packed.shape[1] * 2 // 3
        return unpack(packed[:, :low], 2).bitwise_or_(unpack(packed[:, low:], 1).bitwise_left_shift_(2))
    wide, steps = SPREAD[bits]
    codes = packed.to(wide)
    for shift, mask in steps:
        codes = (codes << shift).bitwise_or_(codes).bitwise_and_(mask)
    return codes.view(torch.uint8)
