"""Weights that compressed-tensors packed as integers (`pack-quantized`: W4A16, W8A16), decoded to fp32 rows for any format.

X.weight_packed int32 [out, ⌈in·bits/32⌉], the lowest bits first; X.weight_scale [out, groups]; X.weight_zero_point int32
[⌈out·bits/32⌉, groups], packed along the *outputs*, where they are not symmetric; X.weight_shape [2]; X.weight_g_idx [in], the group of
each input, where activations ordered them. W = (code − zero) · scale; compressed-tensors itself counts codes and zeros from the middle, and
both shifts cancel.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from burnish.errors import UserError
from burnish.load.safetensors_reader import SafetensorsWeights, open_safetensors
from burnish.load.weights import Stored, TensorInfo, check_rows

PACKED = "_packed"
PARTS = ("_packed", "_scale", "_shape", "_zero_point", "_g_idx")
CHUNK = 1 << 20
"""Weights decoded at a time."""


@dataclass(frozen=True)
class CompressedTensorsWeights:
    """`Weights` of such a folder. Nothing is taken as it is: `stored_rows` is where a format of integers with zero points would begin."""

    plain: SafetensorsWeights
    infos: dict[str, TensorInfo]
    bits: int

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        if self.infos[name].stored is None:
            return self.plain.rows(name, start, stop)
        check_rows(name, self.infos[name].shape, start, stop)
        width = self.infos[name].shape[1]
        rows, step = torch.empty(stop - start, width), max(1, CHUNK // width)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            rows[first - start : last - start] = self._decoded(name, first, last, width)
        return rows

    def stored_rows(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        raise AssertionError(f"no format holds {name} as it is")

    def fingerprint(self) -> str:
        return self.plain.fingerprint()

    def _decoded(self, name: str, start: int, stop: int, width: int) -> Tensor:
        codes = _unpacked(self.plain.rows(name + PACKED, start, stop), self.bits)[:, :width]
        scale = self.plain.rows(f"{name}_scale", start, stop).float()
        group = self._group(name, width, scale.shape[1])
        return (codes - self._zero(name, start, stop, group)).float() * scale[:, group]

    def _group(self, name: str, width: int, groups: int) -> Tensor:
        if f"{name}_g_idx" in self.plain.infos:
            return self.plain.rows(f"{name}_g_idx", 0, width).long()
        return torch.arange(width) // (width // groups)

    def _zero(self, name: str, start: int, stop: int, group: Tensor) -> Tensor | int:
        """The zero point of each weight; the middle of the codes where they are symmetric."""
        if f"{name}_zero_point" not in self.plain.infos:
            return 1 << (self.bits - 1)
        each = 32 // self.bits
        first = start // each
        packed = self.plain.rows(f"{name}_zero_point", first, -(-stop // each))
        zeros = _unpacked(packed.T, self.bits).T[start - first * each : stop - first * each]
        return zeros[:, group]


def open_compressed_tensors(folder: Path, said: Mapping[str, Any]) -> CompressedTensorsWeights:
    """Reads headers and the matrices' shapes. `said` is config.json's `quantization_config`, checked by `check_quantized`."""
    bits = next(group["weights"]["num_bits"] for group in said["config_groups"].values())
    plain = open_safetensors(folder)
    infos = dict(plain.infos)
    for packed in [name for name in plain.infos if name.endswith(f".weight{PACKED}")]:
        name = packed.removesuffix(PACKED)
        parts = [name + part for part in PARTS if name + part in plain.infos]
        out, width = _shape(folder, plain, name, bits)
        for part in parts:
            del infos[part]
        stored = Stored(f"compressed-tensors W{bits}A16", None, width // plain.infos[f"{name}_scale"].shape[1])
        infos[name] = TensorInfo((out, width), torch.float32, sum(plain.infos[part].bytes for part in parts), stored)
    return CompressedTensorsWeights(plain, infos, bits)


def _shape(folder: Path, plain: SafetensorsWeights, name: str, bits: int) -> tuple[int, int]:
    infos, each = plain.infos, 32 // bits
    lost = [name + part for part in ("_scale", "_shape") if name + part not in infos]
    if lost:
        raise UserError(f"{folder} holds {name}{PACKED} and no {lost[0]}. The download is incomplete: run it again.")
    out, width = (int(length) for length in plain.rows(f"{name}_shape", 0, 2))
    found, scales = infos[name + PACKED].shape, infos[f"{name}_scale"].shape
    if found != (out, -(-width // each)) or len(scales) != 2 or scales[0] != out or width % scales[1]:
        raise UserError(
            f"{folder}: {name} of shape {[out, width]} is packed as {list(found)} with scales {list(scales)}, which do not fit together. "
            "Copy or download it again."
        )
    return out, width


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """int32 [n, m] → the codes in it, int32 [n, m · 32/bits], the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed[:, :, None] >> shifts) & ((1 << bits) - 1)).flatten(1)
