"""The token store: samples of token ids with a loss mask, flat on disk, memory-mapped when read.

header.json      {"burnish": "tokens/1", "samples", "tokens", "supervised", "rows"}
ids.bin          int32 [tokens]
mask.bin         uint8 [tokens], 1 where the token is trained
offsets.bin      int64 [samples + 1] into ids and mask
rows.bin         int64 [rows], numbers of the rows that each sample was made of
row_offsets.bin  int64 [samples + 1] into rows
"""

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from burnish.errors import UserError, writing
from burnish.runs import check_kind, read_json, write_json

KIND = "tokens/1"
Sample = tuple[Sequence[int], Sequence[int], tuple[int, ...]]


class TokenSet:
    """An open token store. Holds lengths in memory; ids and masks stay on disk."""

    def __init__(self, folder: Path, header: dict[str, int]):
        samples, tokens = header["samples"], header["tokens"]
        self.folder = folder
        self.offsets: np.ndarray = np.array(_mapped(folder / "offsets.bin", np.int64, samples + 1))
        self._ids = _mapped(folder / "ids.bin", np.int32, tokens)
        self._mask = _mapped(folder / "mask.bin", np.uint8, tokens)
        self._rows = _mapped(folder / "rows.bin", np.int64, header["rows"])
        self._row_offsets = _mapped(folder / "row_offsets.bin", np.int64, samples + 1)
        self.lengths: np.ndarray = np.diff(self.offsets)
        """int64 [samples]: tokens of each sample."""
        self.supervised: np.ndarray = _sums(self._mask, self.offsets)
        """int64 [samples]: trained tokens of each sample."""

    def __len__(self) -> int:
        return len(self.lengths)

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [T], mask uint8 [T]), views into the file."""
        piece = slice(self.offsets[index], self.offsets[index + 1])
        return self._ids[piece], self._mask[piece]

    def rows_of(self, index: int) -> tuple[int, ...]:
        """Numbers (from 0) of the rows that the sample was made of, in their order."""
        return tuple(self._rows[self._row_offsets[index] : self._row_offsets[index + 1]].tolist())


def write_tokens(folder: Path, samples: Iterable[Sample]) -> dict[str, int]:
    """Streams (ids, mask, row numbers) to disk, holding 16 bytes a sample. Returns the header's counts."""
    offsets, row_offsets, supervised = array("q", [0]), array("q", [0]), 0
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with (
            (folder / "ids.bin").open("wb") as id_file,
            (folder / "mask.bin").open("wb") as mask_file,
            (folder / "rows.bin").open("wb") as row_file,
        ):
            for ids, mask, rows in samples:
                assert len(ids) == len(mask) and not mask[0], "a first token has nothing before it that could predict it"  # noqa: PT018
                id_file.write(array("i", ids).tobytes())  # twice as fast as by numpy, for a list
                mask_file.write(bytes(mask))
                row_file.write(array("q", rows).tobytes())
                offsets.append(offsets[-1] + len(ids))
                row_offsets.append(row_offsets[-1] + len(rows))
                supervised += sum(mask)
        (folder / "offsets.bin").write_bytes(offsets.tobytes())
        (folder / "row_offsets.bin").write_bytes(row_offsets.tobytes())
    counts = {"samples": len(offsets) - 1, "tokens": offsets[-1], "supervised": supervised, "rows": row_offsets[-1]}
    write_json(folder / "header.json", {"burnish": KIND} | counts)
    return counts


def open_tokens(folder: Path) -> TokenSet:
    """The store in a folder. Raises a `UserError` where it is missing, damaged or of a newer kind."""
    path = Path(folder) / "header.json"
    if not path.exists():
        raise UserError(f"{folder} holds no tokens. Run the data stage again.")
    header = read_json(path)
    check_kind(path, header.get("burnish"), KIND)
    return TokenSet(Path(folder), header)


def _mapped(path: Path, dtype: type, length: int) -> np.ndarray:
    expected = length * np.dtype(dtype).itemsize
    found = path.stat().st_size if path.exists() else -1
    if found != expected:
        said = f"holds {found} bytes, not {expected}" if found >= 0 else "is missing"
        raise UserError(f"{path} {said}: the token store is damaged. Remove its folder and run the data stage again.")
    return np.memmap(path, dtype, "r") if length else np.zeros(0, dtype)  # an empty file cannot be mapped


def _sums(mask: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Trained tokens per sample, some million tokens at a time."""
    sums = np.zeros(len(offsets) - 1, np.int64)
    first = 0
    while first < len(sums):
        stop = max(first + 1, int(np.searchsorted(offsets, offsets[first] + (1 << 22), "right")) - 1)
        part = offsets[first : stop + 1]
        total = np.concatenate([[0], np.cumsum(mask[part[0] : part[-1]], dtype=np.int64)])
        sums[first:stop] = np.diff(total[part - part[0]])
        first = stop
    return sums
