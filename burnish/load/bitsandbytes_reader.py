"""Weights that bitsandbytes quantized to 4 bits (NF4, FP4): safetensors with the parts of its `QuantState` beside each matrix.

X.weight [out·in/2, 1], two codes a byte, the first one high; X.weight.absmax, one scale for each block, fp32 or, nested, uint8 with
X.weight.nested_absmax and .nested_quant_map; X.weight.quant_map [16]; X.weight.quant_state.bitsandbytes__nf4, JSON as bytes.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.errors import UserError
from burnish.load.safetensors_reader import SafetensorsWeights, open_safetensors
from burnish.load.weights import Stored, TensorInfo, check_rows

STATE = ".quant_state.bitsandbytes__"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


@dataclass(frozen=True)
class _Matrix:
    """One quantized matrix. `code` is its code book [16] in fp32."""

    name: str
    width: int
    block: int
    code: Tensor
    nested: tuple[Tensor, Tensor, int, Tensor] | None
    """Code book of the scales [256], their own scales, how many share one, and what is added to all."""


@dataclass(frozen=True)
class BitsandbytesWeights:
    """`Weights` of such a folder: blocks as they are for a format that holds the same, or decoded to fp32 for any other."""

    plain: SafetensorsWeights
    infos: dict[str, TensorInfo]
    matrices: dict[str, _Matrix]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if name not in self.matrices:
            return self.plain.rows(name, start, stop)
        matrix, stored = self.matrices[name], self.stored_rows(name, start, stop)
        pairs = torch.stack([matrix.code.repeat_interleave(16), matrix.code.repeat(16)], dim=1)  # of each byte
        blocks = pairs[stored["packed"].int()].view(stop - start, matrix.width // matrix.block, matrix.block)
        return blocks.mul_(stored["scale"][:, :, None]).view(stop - start, matrix.width)

    def stored_rows(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        """`packed` uint8 [n, in/2] and `scale` fp32 [n, in/block], un-nested by bitsandbytes' own arithmetic."""
        check_rows(name, self.infos[name].shape, start, stop)
        matrix = self.matrices[name]
        held = self.plain.infos[name]
        row_items = matrix.width // 2 // held.dtype.itemsize  # its storage dtype is a container only
        packed = self.plain.rows(name, start * row_items, stop * row_items).view(-1).view(torch.uint8).view(-1, matrix.width // 2)
        row_blocks = matrix.width // matrix.block
        scale = self.plain.rows(f"{name}.absmax", start * row_blocks, stop * row_blocks)
        if matrix.nested is not None:
            book, scales, share, offset = matrix.nested
            scale = book[scale.int()] * scales[torch.arange(start * row_blocks, stop * row_blocks) // share] + offset
        return {"packed": packed, "scale": scale.float().view(-1, row_blocks)}

    def fingerprint(self) -> str:
        return self.plain.fingerprint()


def open_bitsandbytes(folder: Path) -> BitsandbytesWeights:
    """Reads headers, and of each matrix its code books and settings. Raises a `UserError` for blocks that cross rows, and for damage."""
    plain = open_safetensors(folder)
    infos, matrices = dict(plain.infos), {}
    for state in [name for name in plain.infos if STATE in name]:
        name, _, kind = state.partition(STATE)
        parts = [name, state, *(name + part for part in PARTS if name + part in plain.infos)]
        try:
            said = json.loads(bytes(_whole(plain, state).tolist()))
            shape = tuple(int(length) for length in said["shape"])
            matrices[name] = _matrix(plain, name, shape, said)
        except (ValueError, KeyError, TypeError) as problem:
            raise UserError(f"{folder}: the settings of {name} are damaged ({problem!r}). Copy or download the file again.") from None
        _check(folder, matrices[name], shape, plain)
        for part in parts:
            del infos[part]
        stored = Stored(kind, kind if _is_standard(kind, matrices[name].code) else None, matrices[name].block)
        infos[name] = TensorInfo(shape, torch.float32, sum(plain.infos[part].bytes for part in parts), stored)
    return BitsandbytesWeights(plain, infos, matrices)


def _matrix(plain: SafetensorsWeights, name: str, shape: tuple[int, ...], said: dict[str, Any]) -> _Matrix:
    nested = None
    if f"{name}.nested_absmax" in plain.infos:
        book, scales = (_whole(plain, name + part).float() for part in (".nested_quant_map", ".nested_absmax"))
        nested = book, scales, int(said["nested_blocksize"]), torch.tensor(float(said["nested_offset"]))
    return _Matrix(name, shape[-1], int(said["blocksize"]), _whole(plain, f"{name}.quant_map").float(), nested)


def _check(folder: Path, matrix: _Matrix, shape: tuple[int, ...], plain: SafetensorsWeights) -> None:
    name, numbers = matrix.name, prod(shape)
    if matrix.width % matrix.block:
        raise UserError(
            f"{folder}: {name} {list(shape)} is quantized in blocks of {matrix.block} weights, which cross its rows of {matrix.width}: "
            "its rows cannot be read alone. Give the original weights: burnish quantizes them itself."
        )
    held, scales = plain.infos[name], plain.infos[f"{name}.absmax"]
    if held.bytes != numbers // 2 or scales.shape != (numbers // matrix.block,) or matrix.width // 2 % held.dtype.itemsize:
        raise UserError(
            f"{folder}: {name} of shape {list(shape)} in blocks of {matrix.block} should take {numbers // 2:,} bytes and "
            f"{numbers // matrix.block:,} scales; the file holds {held.bytes:,} and {prod(scales.shape):,}. Copy or download it again."
        )


def _whole(plain: SafetensorsWeights, name: str) -> Tensor:
    return plain.rows(name, 0, plain.infos[name].shape[0])


def _is_standard(kind: str, code: Tensor) -> bool:
    """Whether the file's code book is the one that bitsandbytes' kernels (and our formats) decode with; they do not read the file's."""
    from bitsandbytes.functional import get_4bit_type

    return torch.equal(get_4bit_type(kind, device="cpu"), code)
