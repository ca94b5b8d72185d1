"""What a reader of base weights promises, and the table of readers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from burnish.load.pretrained import Pretrained


@dataclass(frozen=True)
class Stored:
    """How a file holds a matrix that it holds quantized."""

    kind: str
    """As the file calls it: `Q4_1`, `nf4`."""
    format: str | None
    """The format (`model.format`) that holds these very bytes; None where there is none."""
    block: int
    """Weights that share a scale."""


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as `Weights.rows` gives it; `bytes` is what it takes in its file, which for a GGUF block type is less."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    stored: Stored | None = None
    """None where the file holds plain numbers."""


class Weights(Protocol):
    """The tensors of a base model on disk. Opening one reads headers only."""

    @property
    def infos(self) -> dict[str, TensorInfo]:
        """Every tensor of the files by its transformers parameter name.

        A tensor that has no such name is listed too, under its name in the file: whoever fills a model finds no place for it,
        and must say so.
        """
        ...

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` (dimension 0; elements of a 1-D tensor) as a new contiguous CPU tensor [stop - start, ...].

        The dtype is `infos[name].dtype`: the stored one; fp32 for everything in a GGUF file. Equals the same slice of the whole
        tensor bit for bit, and reads no other rows (GGUF's query and key: no rows of other heads). Needs memory for these rows,
        and a few MiB. A 0-D tensor has one row and is returned as it is.
        """
        ...

    def stored_rows(self, name: str, start: int, stop: int) -> dict[str, Tensor]:
        """The same rows as the file holds them, for `Format.adopt`; asked only where `infos[name].stored.format` names a format.

        A GGUF block type: {"blocks": uint8 [stop - start, bytes of a row]}, rows in the parameter's order. nf4, fp4: its tensors.
        """
        ...

    def fingerprint(self) -> str:
        """A name for the content, independent of how it is split into files; see `fingerprint.py` for what it can miss."""
        ...


def open_weights(pretrained: Pretrained) -> Weights:
    """The weights of a model that `find_model` found. Raises a `UserError` for files that are missing, cut short or contradictory."""
    return READERS["gguf" if pretrained.gguf else (pretrained.quantized or {}).get("quant_method", "safetensors")](pretrained)


def _safetensors(pretrained: Pretrained) -> Weights:
    from burnish.load.safetensors_reader import open_safetensors

    return open_safetensors(pretrained.folder)


def _gguf(pretrained: Pretrained) -> Weights:
    from burnish.load.gguf_reader import open_gguf

    assert pretrained.gguf is not None
    return open_gguf(pretrained.gguf, pretrained.config)


def _bitsandbytes(pretrained: Pretrained) -> Weights:
    from burnish.load.bitsandbytes_reader import open_bitsandbytes

    return open_bitsandbytes(pretrained.folder)


def _compressed_tensors(pretrained: Pretrained) -> Weights:
    from burnish.load.compressed_tensors_reader import open_compressed_tensors

    assert pretrained.quantized is not None
    return open_compressed_tensors(pretrained.folder, pretrained.quantized)


READERS: dict[str, Callable[[Pretrained], Weights]] = {
    "safetensors": _safetensors,
    "gguf": _gguf,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
}
"""A new kind of file costs one file and one row. Imported when used: `gguf` alone takes a third of a second."""


def check_rows(name: str, shape: tuple[int, ...], start: int, stop: int) -> None:
    """What every reader asserts of a request for rows: only we can get this wrong."""
    count = shape[0] if shape else 1
    assert 0 <= start <= stop <= count, f"{name} has {count} rows; {start}:{stop} was asked for"
