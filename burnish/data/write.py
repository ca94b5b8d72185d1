"""A set of rows → its file and its tokens, one row at a time."""

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from burnish.config import DataConfig
from burnish.data.fit import Fitted, Single, conversations, fit
from burnish.data.rows import Row, StoredRows, as_line
from burnish.data.source import Growing
from burnish.data.template import Template
from burnish.data.tokens import Sample, write_tokens
from burnish.errors import UserError
from burnish.words import counted

ROW_FILES = {
    "train": "rows.jsonl",
    "unseen_section": "unseen_section.jsonl",
    "unseen_wording": "unseen_wording.jsonl",
    "validation": "validation.jsonl",
    "general": "general.jsonl",
}
REPORTED = 1000
"""Rows that are left out of which the report says why; of others it has the number alone."""
SECONDS_BETWEEN = 10.0
log = logging.getLogger("burnish")


class LeftOut:
    """Rows that are neither trained nor evaluated. Remembers how many, and the place and reason of the first."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[dict[str, str]] = []

    def __call__(self, row: Row, reason: str) -> None:
        self.count += 1
        if len(self.first) < REPORTED:
            self.first.append({"row": row.place, "reason": reason})


class Writer(NamedTuple):
    """Writes sets of rows and their tokens into a folder."""

    folder: Path
    template: Template
    config: DataConfig
    left_out: LeftOut

    def write(self, name: str, rows: Iterator[Row]) -> dict[str, Any]:
        """Streams a set to disk; returns what the report says of it."""
        config, tokens = self.config, self.folder / "tokens" / name
        turns = config.turns if name == "train" else 1
        written = _Written(name, turns)
        fitted = fit(rows, self.template, config.context, config.too_long, self.left_out, config.processes)
        with (self.folder / ROW_FILES[name]).open("w", encoding="utf-8") as out:
            samples = _stored(fitted, out.write, written)
            counts = write_tokens(tokens, samples) if turns == 1 else _used_up(samples)
        if turns > 1:
            counts = write_tokens(tokens, self._joined(self.folder / ROW_FILES[name], written, turns))
        if name == "train" and not written.rows:
            why = f" {self.left_out.first[0]['row']}: {self.left_out.first[0]['reason']}." if self.left_out.first else ""
            raise UserError(f"Every row was left out, so that nothing can be trained.{why} Raise data.context, or hold out less.")
        about = {"rows": written.rows, "rows_with_page": written.with_page, "longest_row": written.longest}
        return about | {key: counts[key] for key in ("samples", "tokens", "supervised")}

    def _joined(self, file: Path, written: "_Written", turns: int) -> Iterator[Sample]:
        """Samples of several rows each, which are read again from where they were stored."""
        lengths, sizes = written.lengths.array(), written.sizes.array()
        with StoredRows(file, sizes.cumsum() - sizes) as stored:
            single = Single(stored, np.abs(lengths), lengths > 0)
            for numbers in conversations(single, self.template, turns, self.config.context, self.config.seed):
                rows = [stored[at] for at in numbers]
                ids, mask = self.template.encode([turn for row in rows for turn in row.turns], rows[0].system)
                yield ids, mask, numbers


class _Written:
    """What was written of a set. Remembers 16 bytes a row."""

    def __init__(self, name: str, turns: int) -> None:
        self.name, self.turns = name, turns
        self.rows = self.with_page = self.longest = self.tokens = 0
        self.lengths, self.sizes = Growing(), Growing()
        """Tokens of each row, negative where it cannot become a turn among others; bytes of its line."""
        self.began = self.told = time.monotonic()

    def add(self, fitted: Fitted, line_bytes: int) -> None:
        row, length = fitted.row, len(fitted.ids)
        if row.is_text and self.turns > 1:
            raise UserError(f"{row.place}: plain text cannot become a turn of a conversation. Leave out data.turns.")
        self.rows += 1
        self.with_page += row.page is not None
        self.longest = max(self.longest, length)
        self.lengths.add(-length if row.history or row.system else length)
        self.sizes.add(line_bytes)
        self.tokens += length
        if (now := time.monotonic()) > self.told + SECONDS_BETWEEN:
            self.told, rate = now, self.tokens / (now - self.began)
            log.info(f"{self.name}: {counted(self.rows, 'row')}, {counted(self.tokens, 'token')}, {rate:,.0f} tokens/s")


def _stored(fitted: Iterator[Fitted], write: Callable[[str], Any], written: _Written) -> Iterator[Sample]:
    for number, sample in enumerate(fitted):
        line = as_line(sample.row)
        write(line)
        written.add(sample, len(line) if line.isascii() else len(line.encode()))
        yield sample.ids, sample.mask, (number,)


def _used_up(samples: Iterator[Sample]) -> dict[str, int]:
    for _ in samples:
        pass
    return {}
