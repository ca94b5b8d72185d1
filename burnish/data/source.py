"""The rows of some files, as often as they are asked for, without holding them."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from burnish.data.formats import FORMATS
from burnish.data.rows import Row, iter_rows


class Source:
    """Rows of files, and then others. Remembers the format that each file turned out to have, and how many rows it gave."""

    def __init__(self, files: Iterable[str], limit: int | None, form: str, others: Sequence[Row] = ()):
        self.files, self.limit, self.form, self.others = tuple(files), limit, form, others
        self.formats: dict[str, str] = {}
        self.counts: dict[str, int] = {}

    def __iter__(self) -> Iterator[Row]:
        """Reads the files once more."""
        for file in self.files:
            count = 0
            for row in iter_rows(file, self.limit, self.form, self.formats):
                count += 1
                yield row
            self.counts[str(Path(file))] = count
        yield from self.others

    def report(self) -> list[dict[str, Any]]:
        """What was read: each file with its format, in words too, and its rows."""
        return [
            {"file": file, "format": self.formats[file], "keys": FORMATS[self.formats[file]].example, "rows": count}
            for file, count in self.counts.items()
        ]


class Growing:
    """Whole numbers that come one by one: 8 bytes each."""

    def __init__(self) -> None:
        self._values = array("q")

    def add(self, value: int) -> None:
        self._values.append(value)

    def __len__(self) -> int:
        return len(self._values)

    def array(self) -> np.ndarray:
        """int64, a view."""
        return np.frombuffer(self._values, np.int64) if len(self._values) else np.zeros(0, np.int64)
