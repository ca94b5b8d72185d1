"""Rows: what is trained and evaluated, wherever it came from. entries.py reads files, formats.py says what their objects mean."""

import json
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from burnish.data.entries import Entry, Piece, entries, pieces
from burnish.data.formats import EXAMPLES, FORMATS, UNKNOWN, Bad, Parts, format_of, kind, lacking
from burnish.errors import UserError, did_you_mean
from burnish.words import counted


@dataclass(frozen=True)
class Row:
    """What is learned, and where it comes from: `line` of `file` (from 1), `page` of a document, `section`, `fact`.

    A conversation has its last turn in `question` and `answer`, those before it in `history`. A row without a question is plain text:
    `answer`, of which every token is trained.
    """

    question: str
    answer: str
    file: str
    line: int
    page: int | None = None
    section: str | None = None
    fact: str | None = None
    history: tuple[tuple[str, str], ...] = ()
    system: str | None = None
    """The conversation's own system message; None leaves it to data.system."""
    part: int = 0
    """Number of this piece of a text that comes in several, from 0."""
    ends: bool = True
    """Whether the text ends with this row."""

    @property
    def place(self) -> str:
        """`file:line`, as messages name a row."""
        return f"{self.file}:{self.line}"

    @property
    def is_text(self) -> bool:
        return not self.question

    @property
    def turns(self) -> tuple[tuple[str, str], ...]:
        """(question, answer) of every turn. Not for plain text."""
        return (*self.history, (self.question, self.answer))

    @property
    def asked(self) -> str:
        """The words of every question."""
        return "\n".join(question for question, _ in self.turns)

    @property
    def said(self) -> str:
        """The words of every answer."""
        return "\n".join(answer for _, answer in self.turns)


SHOWN = 20


def read_rows(file: str | Path, limit: int | None = None, form: str = "auto") -> list[Row]:
    """The first `limit` rows of a file, or all of them. Raises one `UserError` that lists every bad row by file and line.

    In a .json file a row's line is the one where its object begins.
    """
    return list(iter_rows(file, limit, form))


def iter_rows(file: str | Path, limit: int | None = None, form: str = "auto", found: dict[str, str] | None = None) -> Iterator[Row]:
    """What `read_rows` gives, one by one, in memory that does not grow with the file. `found` is told the file's format.

    `form` is a name of FORMATS, or `auto`: the format of the first row, which all others must have. After a bad row the rest of the file
    is only checked, and the error comes at its end.
    """
    path = Path(file)
    reader = _Format(form)
    problems: list[str] = []
    count = taken = 0
    for entry in entries(path):
        if taken == limit:
            break
        taken += 1
        try:
            rows = reader.read(entry, str(path))
        except Bad as problem:
            count += 1
            problems += [f"{path}:{entry.line}: {problem}"] * (count <= SHOWN)
            continue
        if not count:
            yield from rows
    if count:
        expected = f" Expected are {EXAMPLES}." if any(UNKNOWN in problem for problem in problems) else ""
        raise UserError(listed(f"{path}: {counted(count, 'row')} cannot be used.{expected}", problems, count))
    if not taken:
        raise UserError(f"{path} is empty: it holds no rows. Expected objects with the keys {EXAMPLES}.")
    if found is not None:
        found[str(path)] = reader.name


def listed(head: str, lines: list[str], count: int | None = None) -> str:
    """A message with the first lines of a list, and a count of the others (of `count` in all)."""
    more = (len(lines) if count is None else count) - SHOWN
    return "\n  ".join([head, *lines[:SHOWN], *([f"and {more} more"] if more > 0 else [])])


class _Format:
    """Reads entries of one file. Remembers the format of its first row."""

    def __init__(self, form: str):
        if form != "auto" and form not in FORMATS:
            raise UserError(f"data.format = {form!r}: no such format.{did_you_mean(form, ['auto', *FORMATS])}")
        self.fixed = form != "auto"
        self.name = "" if form == "auto" else form
        self.first_line = 0

    def read(self, entry: Entry, file: str) -> list[Row]:
        """The rows of an entry: one, or several where a text is long. Raises `Bad` for what cannot be used."""
        value = entry.value
        if isinstance(value, Bad):
            raise value
        if isinstance(value, Piece):
            self._must_be("text", entry)
            return [Row("", value.text, file, entry.line, part=value.part, ends=value.ends)]
        if not isinstance(value, dict):
            raise Bad(f"is {kind(value)}, not an object")
        if self.fixed:
            form = FORMATS[self.name]
            if form.inside != entry.inside:
                raise Bad(f"data.format = {self.name!r} expects {form.example}")
            if not form.needs <= value.keys():
                raise Bad(lacking(self.name, value))
        else:
            self._must_be(format_of(value, entry.inside), entry)
        return _rows(FORMATS[self.name].read(value), value, file, entry.line)

    def _must_be(self, name: str, entry: Entry) -> None:
        if not self.name:
            self.name, self.first_line = name, entry.line
        if name != self.name:
            since = f"data.format is {self.name!r}" if self.fixed else f"line {self.first_line} has the format {self.name!r}"
            raise Bad(f"has the format {name!r}, but {since}. Put rows of each format into a file of their own, or set data.format")


def _rows(parts: Parts, entry: dict[str, Any], file: str, line: int) -> list[Row]:
    page = entry.get("page")
    if page is not None and (not isinstance(page, int) or isinstance(page, bool) or page < 1):
        raise Bad(f"its page is {page!r}, not a whole number from 1")
    section, fact = _optional(entry, "section"), _optional(entry, "fact")
    if parts.text is not None:
        cut = pieces(parts.text)
        return [Row("", piece.text, file, line, page, section, fact, part=piece.part, ends=piece.ends) for piece in cut]
    *history, (question, answer) = parts.turns
    return [Row(question, answer, file, line, page, section, fact, tuple(history), parts.system)]


def _optional(entry: dict[str, Any], name: str) -> str | None:
    value = entry.get(name)
    return None if value is None else str(value)


# --- rows on disk

_DEFAULTS = {entry.name: entry.default for entry in fields(Row) if entry.default is not MISSING}
_MISSING = object()


def as_line(row: Row) -> str:
    """A row as one line of JSON with its line end. Keys that have their default are left out."""
    values = {name: value for name, value in vars(row).items() if value != _DEFAULTS.get(name, _MISSING)}
    return json.dumps(values, ensure_ascii=False) + "\n"


def write_rows(path: Path, rows: list[Row]) -> None:
    """One JSON object a line, in the `question`/`answer` format with `file` and `line`."""
    with path.open("w", encoding="utf-8") as out:
        out.writelines(map(as_line, rows))


def load_rows(file: str | Path, limit: int | None = None) -> list[Row]:
    """Reads back what was written, or its first `limit` rows; rows keep the file and line that they first came from."""
    with Path(file).open("rb") as lines:
        return [_loaded(line) for _, line in zip(range(limit), lines, strict=False)] if limit is not None else list(map(_loaded, lines))


def _loaded(line: bytes) -> Row:
    values = json.loads(line)
    if "history" in values:
        values["history"] = tuple((question, answer) for question, answer in values["history"])
    return Row(**values)


class StoredRows:
    """Rows of a file that was written here, by number. Holds where each line begins: 8 bytes a row."""

    def __init__(self, file: Path, starts: np.ndarray | None = None):
        self._file = file.open("rb")
        self.starts: np.ndarray = _starts(file) if starts is None else starts
        """int64 [rows]."""

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> Row:
        self._file.seek(int(self.starts[number]))
        return _loaded(self._file.readline())

    def __enter__(self) -> "StoredRows":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _starts(file: Path) -> np.ndarray:
    with file.open("rb") as lines:
        lengths = np.fromiter((len(line) for line in lines), np.int64)
    return np.cumsum(lengths) - lengths
