"""A GGUF file's header: metadata and where each tensor lies.

Written out because `gguf.GGUFReader` makes a numpy view of every token and merge: 2 s for a vocabulary of 49 thousand and four times
that for a modern one, in each of configuration, tokenizer and weights. A test holds this file to that reader.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from burnish.errors import UserError

VERSIONS = (2, 3)
AGAIN = "Copy or download it again"

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: its shape in torch's order (rows first), its type, and its bytes' place in the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    bytes: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row; of one element for a 1-D tensor of plain numbers. Blocks never cross a row."""
        return self.bytes // self.shape[0]


@dataclass(frozen=True)
class Layout:
    """Where the parts of a header lie in the file, for whoever writes it anew."""

    version: int
    metadata: Mapping[str, tuple[int, int]]
    """First and last byte (exclusive) of each key with its value."""
    tensors: tuple[int, int]
    data: int
    alignment: int


@dataclass(frozen=True)
class GgufHeader:
    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    layout: Layout

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])


def read_gguf_header(path: Path) -> GgufHeader:
    """The header, in a tenth of a second for 100 thousand strings. A `UserError` names a file that is no GGUF, cut short, or a part."""
    size = path.stat().st_size
    if size < 24:
        raise UserError(f"{path} is not a GGUF file: it has only {size} bytes. {AGAIN}.")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            header = _header(path, _Cursor(content, size))
        except EOFError:
            raise UserError(f"{path} is cut short: its header goes on after its last byte ({size:,}). {AGAIN}.") from None
        except UnicodeDecodeError as problem:
            raise UserError(f"{path} is damaged: its header holds text that is not UTF-8 ({problem.reason}). {AGAIN}.") from None
    last = max(header.tensors.values(), key=lambda tensor: tensor.offset + tensor.bytes, default=None)
    if last is not None and last.offset + last.bytes > size:
        raise UserError(
            f"{path} is cut short: tensor {last.name} ends at byte {last.offset + last.bytes:,} and the file has {size:,}. {AGAIN}."
        )
    return header


class _Cursor:
    """A place in the file that moves on as values are read. Raises EOFError beyond the end."""

    def __init__(self, content: mmap.mmap, size: int) -> None:
        self.content, self.size, self.at = content, size, 0

    def take(self, count: int) -> bytes:
        start, self.at = self.at, self.at + count
        if self.at > self.size:
            raise EOFError
        return self.content[start : self.at]

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(f"<{code}")))

    def number(self, code: str) -> Any:
        return self.numbers(code)[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode()


def _header(path: Path, cursor: _Cursor) -> GgufHeader:
    if cursor.take(4) != b"GGUF":
        raise UserError(f"{path} is not a GGUF file, whatever its name says (its first bytes are not GGUF). {AGAIN}.")
    version = cursor.number("I")
    if version not in VERSIONS:
        raise UserError(
            f"{path} is GGUF version {version} (or written for a big-endian machine); versions 2 and 3 are read. Convert it with llama.cpp."
        )
    tensor_count, metadata_count = cursor.numbers("Q", 2)
    metadata: dict[str, Any] = {}
    places: dict[str, tuple[int, int]] = {}
    for _ in range(metadata_count):
        start, name = cursor.at, cursor.string()
        metadata[name] = _value(path, cursor, cursor.number("I"))
        places[name] = start, cursor.at
    _check_whole(path, metadata)
    begin = cursor.at
    entries = [_entry(path, cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    data = (cursor.at + alignment - 1) // alignment * alignment
    tensors = {name: GgufTensor(name, shape, kind, data + offset, size) for name, shape, kind, offset, size in entries}
    if len(tensors) != len(entries):
        raise UserError(f"{path} is damaged: it names a tensor twice. {AGAIN}.")
    return GgufHeader(path, metadata, tensors, Layout(version, places, (begin, cursor.at), data, alignment))


def _value(path: Path, cursor: _Cursor, kind: int) -> Any:
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind == _STRING:
        return cursor.string()
    if kind == _ARRAY:
        element, count = cursor.number("I"), cursor.number("Q")
        if element in _SCALARS:
            return list(cursor.numbers(_SCALARS[element], count))
        return [_value(path, cursor, element) for _ in range(count)]
    raise UserError(f"{path} is damaged: its header holds a value of the unknown kind {kind}. {AGAIN}.")


def _entry(path: Path, cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int, int]:
    name = cursor.string()
    shape = tuple(reversed(cursor.numbers("Q", cursor.number("I"))))  # ggml counts the fastest-moving dimension first
    number, offset = cursor.number("I"), cursor.number("Q")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise UserError(
            f"{path}: tensor {name} is of GGUF type {number}, which this gguf package does not know. Update it: pip install -U gguf."
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape and shape[-1] % block:
        raise UserError(
            f"{path} is damaged: rows of {shape[-1]} weights in tensor {name} are no whole {kind.name} blocks of {block}. {AGAIN}."
        )
    return name, shape, kind, offset, prod(shape) // block * block_bytes


def _check_whole(path: Path, metadata: Mapping[str, Any]) -> None:
    if "general.architecture" not in metadata:
        raise UserError(f"{path} does not name its architecture (general.architecture). It is damaged, or not a language model.")
    parts = metadata.get("split.count", 1)
    if parts > 1:
        raise UserError(f"{path} is one of {parts} parts. Join them first: llama-gguf-split --merge FIRST_PART.gguf whole.gguf.")
