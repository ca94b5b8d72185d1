"""Safetensors files written as a stream: no more than one slab of one tensor is in memory (format: huggingface/safetensors, README)."""

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from burnish.load.safetensors_reader import DTYPES, INDEX, SINGLE
from burnish.runs import write_json

Shapes = dict[str, tuple[int, ...]]


class Shards:
    """Files of one dtype in a folder, at most `shard_bytes` each (a larger tensor gets its own), and their index where there are several.

    Tensors must be added in the order of `shapes`.
    """

    def __init__(self, folder: Path, shapes: Shapes, dtype: torch.dtype, shard_bytes: int) -> None:
        self.folder, self.shapes, self.dtype = folder, shapes, dtype
        self.files = file_names(shapes, dtype, shard_bytes)
        self._left = [(file, name) for file, names in self.files.items() for name in names]
        self._open: BinaryIO | None = None

    def add(self, name: str, slabs: Iterable[Tensor]) -> int:
        """Writes a tensor from slabs of its rows. Returns its bytes."""
        file, expected = self._left.pop(0)
        assert name == expected, f"{name} was added where {expected} was due"
        if self.files[file][0] == name:
            self._begin(file)
        assert self._open is not None
        written = 0
        for slab in slabs:
            assert slab.dtype == self.dtype
            written += self._open.write(slab.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        assert written == _bytes(self.shapes[name], self.dtype), f"{name}: {written} bytes of {_bytes(self.shapes[name], self.dtype)}"
        return written

    def finish(self) -> None:
        assert not self._left, f"{self._left[0][1]} was never added"
        self._close()
        if len(self.files) > 1:
            total = sum(_bytes(shape, self.dtype) for shape in self.shapes.values())
            index = {name: file for file, names in self.files.items() for name in names}
            write_json(self.folder / INDEX, {"metadata": {"total_size": total}, "weight_map": index})

    def _begin(self, file: str) -> None:
        self._close()
        self._open = (self.folder / file).open("wb")
        self._open.write(_header({name: self.shapes[name] for name in self.files[file]}, self.dtype))

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()


def file_names(shapes: Shapes, dtype: torch.dtype, shard_bytes: int) -> dict[str, list[str]]:
    """The tensors of each file, in order. One file has the usual name, several are numbered."""
    groups: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        size = _bytes(shape, dtype)
        if not groups or size > room:
            groups.append([])
            room = shard_bytes
        groups[-1].append(name)
        room -= size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": names for number, names in enumerate(groups, 1)}


def _bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _header(shapes: Shapes, dtype: torch.dtype) -> bytes:
    kind = next(name for name, known in DTYPES.items() if known == dtype)
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers 4 refuses a file without it
    end = 0
    for name, shape in shapes.items():
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + _bytes(shape, dtype)]}
        end += _bytes(shape, dtype)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
