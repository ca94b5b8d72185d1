"""llama.cpp's blocks of 32 weights along a row, as GGUF files hold them: fp16 scales beside 4- or 8-bit codes.

    q4_0   w = scale·(q − 8)        q4_1   w = scale·q + least        q8_0   w = scale·q

A block's bytes are split into codes and scales, so that a fold touches scales alone; `blocks_of` puts them back to equal bytes.
Decoded values are those of the `gguf` package bit for bit: the product of an fp16 number and a code is exact in fp32, and q4_1's sum is
rounded once.

The fold writes fp16 scales, since nothing else fits the file that is served. Training decodes with those very scales (`QuantLinear.tiles`
folds before it decodes), so what d loses to 11 bits is lost in training too, and is part of what was measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from burnish import kernels
from burnish.model.formats.base import Format, Shapes, Tensors

BLOCK = 32


@dataclass(frozen=True)
class Kind:
    """One of ggml's block types: `scales` fp16 numbers, in this order, then the codes."""

    scales: tuple[str, ...]
    codes: torch.dtype
    code_bytes: int
    """Of one block. 16: two codes a byte, the j-th low and the (j + 16)-th high."""
    middle: int = 0
    """Taken from each code."""

    @property
    def bytes(self) -> int:
        return 2 * len(self.scales) + self.code_bytes


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "q4_0": Kind(("scale",), torch.uint8, 16, middle=8),
        "q4_1": Kind(("scale", "least"), torch.uint8, 16),
        "q8_0": Kind(("scale",), torch.int8, 32),
    }
)
"""By their GGUF names in lower case."""


def blocks_of(name: str, tensors: Tensors) -> Tensor:
    """The blocks' bytes as a GGUF file of type `name` holds them: uint8 [n, bytes of a row]. The inverse of `adopt`."""
    kind = KINDS[name]
    count, blocks = tensors["scale"].shape
    scales = torch.stack([tensors[scale] for scale in kind.scales], dim=2)
    codes = tensors["packed"].reshape(count, blocks, kind.code_bytes)
    return torch.cat([scales.view(torch.uint8), codes.view(torch.uint8)], dim=2).reshape(count, blocks * kind.bytes)


def adopt(kind: Kind, stored: Tensors) -> Tensors:
    """Tensors from {"blocks": uint8 [n, bytes of a row]}."""
    count, row_bytes = stored["blocks"].shape
    blocks = stored["blocks"].reshape(count, row_bytes // kind.bytes, kind.bytes)
    codes_at = 2 * len(kind.scales)
    scales = blocks[:, :, :codes_at].contiguous().view(torch.float16)
    packed = blocks[:, :, codes_at:].reshape(count, blocks.shape[1] * kind.code_bytes).view(kind.codes)
    return {"packed": packed} | {name: scales[:, :, place].contiguous() for place, name in enumerate(kind.scales)}


def shapes(kind: Kind, out: int, width: int, block: int, dtype: torch.dtype) -> Shapes:
    blocks = width // BLOCK
    return {"packed": ((out, blocks * kind.code_bytes), kind.codes)} | dict.fromkeys(kind.scales, ((out, blocks), torch.float16))


def quantize(name: str, rows: Tensor, block: int, dtype: torch.dtype) -> Tensors:
    """llama.cpp's reference rounding, by the `gguf` package (numpy, so on the CPU)."""
    from gguf import GGMLQuantizationType, quants

    content = np.ascontiguousarray(rows.float().cpu().numpy())
    stored = torch.from_numpy(quants.quantize(content, GGMLQuantizationType[name.upper()]))
    return adopt(KINDS[name], {"blocks": stored.to(rows.device)})


def dequantize(kind: Kind, tensors: Tensors, block: int, dtype: torch.dtype) -> Tensor:
    scale = tensors["scale"]
    if kernels.usable(scale) and dtype != torch.float64:
        halves = kind.code_bytes < BLOCK
        how = {"bits": 4 if halves else 8, "halves": halves, "middle": kind.middle}
        return kernels.decode(tensors["packed"], scale, BLOCK, dtype, **how, least=tensors.get("least"))
    count, blocks = scale.shape
    codes = tensors["packed"].view(count, blocks, kind.code_bytes)
    w = torch.empty(count, blocks, BLOCK, dtype=torch.float32, device=codes.device)
    for place, part in enumerate((codes & 15, codes >> 4) if kind.code_bytes < BLOCK else (codes,)):
        start = place * kind.code_bytes
        w[:, :, start : start + kind.code_bytes] = part.view(torch.int8).sub_(kind.middle) if kind.middle else part
    w.mul_(scale.float()[:, :, None])
    if "least" in tensors:
        w.add_(tensors["least"].float()[:, :, None])
    return w.view(count, blocks * BLOCK).to(dtype)


def fold(tensors: Tensors, d: Tensor) -> Tensors:
    gain = d[:, None].to(torch.float32)
    folded = {name: (tensor.float() * gain).to(torch.float16) for name, tensor in tensors.items() if name != "packed"}
    return {"packed": tensors["packed"]} | folded


def _format(name: str) -> Format:
    kind = KINDS[name]
    return Format(
        name,
        1,
        lambda block: BLOCK,
        partial(shapes, kind),
        partial(quantize, name),
        partial(dequantize, kind),
        fold,
        partial(adopt, kind),
    )


FORMATS: dict[str, Format] = {name: _format(name) for name in KINDS}
