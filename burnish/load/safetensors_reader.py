"""Weights in safetensors files: one file, or shards with an index."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from burnish.errors import UserError
from burnish.load.disk import read_bytes, read_tensor
from burnish.load.fingerprint import StoredTensor, fingerprint
from burnish.load.weights import TensorInfo, check_rows

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
AGAIN = "Copy or download the file again"
TWO_VERSIONS = "Index and shards are of two versions: download all of them again"
LARGEST_HEADER = 100_000_000  # the limit of the safetensors library itself

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U64": torch.uint64,
        "U32": torch.uint32,
        "U16": torch.uint16,
        "U8": torch.uint8,
        "BOOL": torch.bool,
    }
)
"""safetensors' names of dtypes, and torch's."""


@dataclass(frozen=True)
class _Place:
    file: Path
    offset: int
    kind: str


@dataclass(frozen=True)
class SafetensorsWeights:
    """`Weights` of a folder. Holds what the headers say; every read opens its file, reads, and closes it."""

    infos: dict[str, TensorInfo]
    places: dict[str, _Place]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        info, place = self.infos[name], self.places[name]
        check_rows(name, info.shape, start, stop)
        if not info.shape:
            return read_tensor(place.file, place.offset, (), info.dtype)
        row_bytes = info.bytes // info.shape[0] if info.shape[0] else 0
        return read_tensor(place.file, place.offset + start * row_bytes, (stop - start, *info.shape[1:]), info.dtype)

    def stored_rows(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        raise AssertionError(f"{name} is plain numbers")

    def fingerprint(self) -> str:
        return fingerprint(_stored(name, self.infos[name], place) for name, place in self.places.items())


def open_safetensors(folder: Path) -> SafetensorsWeights:
    """Reads the headers of all files of the folder's model, and refuses files that contradict each other or their index."""
    index = _index(folder)
    files = sorted(set(index.values())) if index is not None else [_single(folder)]
    infos: dict[str, TensorInfo] = {}
    places: dict[str, _Place] = {}
    for file in files:
        for name, (info, place) in read_header(_shard(folder, file)).items():
            if name in places:
                raise UserError(
                    f"{folder}: tensor {name} lies both in {places[name].file.name} and in {file}. "
                    "Files of two downloads may be mixed: remove the folder and download the model again."
                )
            infos[name], places[name] = info, place
    if index is not None:
        _check_index(folder, index, places)
    return SafetensorsWeights(infos, places)


def read_header(file: Path) -> dict[str, tuple[TensorInfo, _Place]]:
    """Every tensor of one file, from its header alone: 8 bytes length, JSON, then data without gaps."""
    size = file.stat().st_size
    length = int.from_bytes(read_bytes(file, 0, 8), "little") if size >= 8 else 0
    if size < 8 or length > LARGEST_HEADER:
        raise UserError(
            f"{file} is not a safetensors file: it has no readable header ({size:,} bytes in all). {AGAIN}{_pointer(file, size)}."
        )
    if 8 + length > size:
        raise UserError(f"{file} is cut short: its header alone takes {8 + length:,} bytes and the file has {size:,}. {AGAIN}.")
    try:
        header = json.loads(read_bytes(file, 8, length).decode())
        entries = {name: _entry(file, name, value, 8 + length) for name, value in header.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{file} is not a safetensors file: its header is damaged ({problem}). {AGAIN}.") from None
    end = max((place.offset + info.bytes for info, place in entries.values()), default=8 + length)
    if end > size:
        raise UserError(f"{file} is cut short: its tensors take {end:,} bytes and the file has {size:,}. {AGAIN}.")
    return entries


def _entry(file: Path, name: str, value: dict[str, Any], data: int) -> tuple[TensorInfo, _Place]:
    if value["dtype"] not in DTYPES:
        raise UserError(
            f"{file.name}: tensor {name} has dtype {value['dtype']}, which this version does not read (known: {', '.join(DTYPES)}). "
            "Use a model whose weights are stored in one of those."
        )
    dtype, shape = DTYPES[value["dtype"]], tuple(int(length) for length in value["shape"])
    start, stop = value["data_offsets"]
    expected = dtype.itemsize * torch.Size(shape).numel()
    if stop - start != expected or start < 0:
        raise UserError(
            f"{file}: tensor {name} of shape {shape} takes {expected:,} bytes, but its header gives it {stop - start:,}. {AGAIN}."
        )
    return TensorInfo(shape, dtype, expected), _Place(file, data + start, value["dtype"])


def _stored(name: str, info: TensorInfo, place: _Place) -> StoredTensor:
    return StoredTensor(
        name, info.shape, place.kind, info.bytes, lambda offset, count: read_bytes(place.file, place.offset + offset, count)
    )


def _index(folder: Path) -> dict[str, str] | None:
    """Tensor → file name, or None where the folder has no index."""
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        named = {str(name): str(file) for name, file in index.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(f"{path} is damaged ({problem!r}). {AGAIN}.") from None
    outside = next((file for file in named.values() if os.path.basename(file) != file), None)
    if outside is not None:
        raise UserError(f"{path} names {outside!r}, which is not a file of its own folder. Use an index that names its shards only.")
    return named


def _single(folder: Path) -> str:
    """The one safetensors file of a folder without an index."""
    if (folder / SINGLE).is_file():
        return SINGLE
    found = sorted(file.name for file in folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(
            f"{folder} holds {len(found)} safetensors files and no {INDEX} that says how they belong together. Download the index too."
        )
    raise UserError(f"{folder} holds no safetensors file. Is the download complete?")


def _shard(folder: Path, file: str) -> Path:
    path = folder / file
    if not path.is_file():
        raise UserError(f"{folder} lacks {file}, which {INDEX} names. The download is incomplete: run it again.")
    return path


def _check_index(folder: Path, index: dict[str, str], places: dict[str, _Place]) -> None:
    for name, file in index.items():
        if name not in places:
            raise UserError(f"{folder / INDEX} says that {file} holds tensor {name}, but it does not. {TWO_VERSIONS}.")
        if places[name].file.name != file:
            raise UserError(
                f"{folder / INDEX} says that tensor {name} lies in {file}, but it lies in {places[name].file.name}. {TWO_VERSIONS}."
            )
    unnamed = [name for name in places if name not in index]
    if unnamed:
        more = f" and {len(unnamed) - 1} more" if len(unnamed) > 1 else ""
        raise UserError(f"{places[unnamed[0]].file} holds tensor {unnamed[0]}{more}, which {INDEX} does not name. {TWO_VERSIONS}.")


def _pointer(file: Path, size: int) -> str:
    """The usual reason for a tiny weight file: git without git-lfs."""
    if size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
        return " (it is a git-lfs pointer: run `git lfs pull` in its folder)"
    return ""
