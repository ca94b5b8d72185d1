"""Files of rows → their objects one by one, each with its line, in memory that does not grow with the file."""

import codecs
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from burnish.data.formats import Bad, kind
from burnish.errors import UserError

LONGEST = 64 << 20
"""Bytes of one line, or of one object of a .json file."""
BLOCK = 1 << 20
"""Characters that are read at a time."""
PIECE = 1 << 20
"""Characters of a text that are held, and tokenized, at a time: a longer one comes in pieces."""


class Piece(NamedTuple):
    """A part of a text: its number (from 0), and whether the text ends with it."""

    text: str
    part: int
    ends: bool


class Entry(NamedTuple):
    """`value` is what JSON holds, a piece of a text, or why neither can be read. `line` counts from 1; in Parquet it is the row."""

    line: int
    value: Any
    inside: str | None = None
    """The key of the object around the list of rows, where there is one."""


def entries(path: Path) -> Iterator[Entry]:
    """Every object of a file. Raises a `UserError` where it is missing, of an unknown kind, or not UTF-8."""
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path}: rows are read from {', '.join(READERS)} files.")
    return READERS[path.suffix.lower()](path)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file. Check data.rows, data.questions and data.validation.") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; data.rows, data.questions and data.validation name files.") from None
    with file:
        yield file


def _as_text(file: BinaryIO) -> TextIO:
    return io.TextIOWrapper(file, encoding="utf-8-sig")  # line ends of any kind become \n


# --- one object a line


def _jsonl(path: Path) -> Iterator[Entry]:
    with _opened(path) as file:
        number = start = 0
        while line := file.readline(LONGEST + 1):
            number += 1
            if len(line) > LONGEST:
                raise UserError(f"{path}:{number}: the line is longer than {LONGEST >> 20} MiB. {_WAY_OUT}")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as problem:
                skipped = len(line) - len(problem.object)  # the mark at the beginning of the file
                raise _not_utf8(path, number, start + skipped + problem.start) from None
            start += len(line)
            if text.strip():
                yield Entry(number, _parsed(text))


_WAY_OUT = "A row is one object on one line; give long texts as .txt files."


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as problem:
        return Bad(f"not valid JSON: {problem.msg} (column {problem.colno})")
    except RecursionError:
        return Bad("not valid JSON for a row: it is nested too deeply")


# --- a list of objects


class _Reader:
    """The text of a file, of which only what is not used yet is held. Remembers the place, with its line and column."""

    def __init__(self, path: Path, file: TextIO):
        self.path, self.file = path, file
        self.text, self.at, self.ended = "", 0, False
        self.line, self._column, self._counted = 1, 0, 0
        self._json = json.JSONDecoder()

    def here(self) -> int:
        """The line of the place."""
        breaks = self.text.count("\n", self._counted, self.at)
        last = self.text.rfind("\n", self._counted, self.at)
        self._column = self.at - last - 1 if breaks else self._column + self.at - self._counted
        self.line, self._counted = self.line + breaks, self.at
        return self.line

    def grow(self) -> bool:
        """Reads as much again as is not used yet, at least a block. False at the end of the file."""
        self.here()
        self.text, self.at, self._counted = self.text[self.at :], 0, 0
        try:
            more = "" if self.ended else self.file.read(max(BLOCK, len(self.text)))
        except UnicodeDecodeError:
            raise _not_utf8(self.path, *_bad_byte(self.path)) from None
        self.ended = not more
        self.text += more
        return bool(more)

    def next(self) -> str:
        """The next sign that is no white space, which is not used by this; "" at the end of the file."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # pyright: ignore[reportOptionalMemberAccess]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.grow():
                return ""

    def take(self, sign: str) -> None:
        """Uses the next sign, which must be this one."""
        if self.next() != sign:
            raise self.wrong(f"Expecting '{sign}'" + " delimiter" * (sign in ",:"))
        self.at += 1

    def value(self) -> Any:
        """The next JSON value. Costs twice its parsing where it is longer than a block."""
        self.next()
        while True:
            try:
                value, end = self._json.raw_decode(self.text, self.at)
            except json.JSONDecodeError as problem:
                into = problem.pos - self.at
                cut_off = problem.pos > len(self.text) - 16 or problem.msg.startswith("Unterminated string")
                if cut_off and len(self.text) - self.at > LONGEST:
                    raise self.wrong(f"a row of more than {LONGEST >> 20} MiB") from None
                if cut_off and self.grow():
                    continue
                raise self.wrong(problem.msg, self.at + into) from None
            except RecursionError:
                raise self.wrong("nested too deeply for a row") from None
            if end == len(self.text) and self.grow():
                continue  # a number, of which more may follow
            self.at = end
            return value

    def wrong(self, reason: str, at: int | None = None) -> UserError:
        self.at = self.at if at is None else at
        self.here()
        return UserError(f"{self.path}:{self.line}: not valid JSON: {reason} (column {self._column + 1}).")


_SPACE = re.compile(r"\s*")


def _json(path: Path) -> Iterator[Entry]:
    with _opened(path) as file:
        reader = _Reader(path, _as_text(file))
        sign = reader.next()
        if not sign:
            return
        if sign == "[":
            yield from _list(reader, None)
        elif sign == "{":
            yield from _within_object(reader)
        else:
            raise _not_a_list(path, kind(reader.value()))
        if reader.next():
            raise reader.wrong("Extra data")


def _list(reader: _Reader, inside: str | None) -> Iterator[Entry]:
    reader.take("[")
    while reader.next() != "]":
        line = reader.here()
        yield Entry(line, reader.value(), inside)
        if reader.next() == "]":
            break
        reader.take(",")
        if reader.next() == "]":
            raise reader.wrong("Expecting value")
    reader.take("]")


def _within_object(reader: _Reader) -> Iterator[Entry]:
    """Rows of the list under `questions`; whatever else the object holds is passed over."""
    reader.take("{")
    found = False
    while reader.next() != "}":
        key = reader.value()
        reader.take(":")
        if key == "questions" and reader.next() == "[":
            found = True
            yield from _list(reader, "questions")
        else:
            reader.value()
        if reader.next() != "}":
            reader.take(",")
    reader.take("}")
    if not found:
        raise _not_a_list(reader.path, "an object")


def _not_a_list(path: Path, found: str) -> UserError:
    way_out = 'Put the rows into [ ] or {"questions": [ ]}, or one a line into a .jsonl file.'
    return UserError(f"{path}: a list of rows is expected, not {found}. {way_out}")


# --- text


def _text(path: Path) -> Iterator[Entry]:
    with _opened(path) as file:
        reader = _Reader(path, _as_text(file))
        yield from (Entry(line, piece) for line, piece in _pieces(reader))


def _pieces(reader: _Reader) -> Iterator[tuple[int, Piece]]:
    part, last = 0, False
    while not last:
        while len(reader.text) - reader.at <= PIECE and reader.grow():
            pass
        rest = reader.text[reader.at :]
        end, last = cut(rest), len(rest) <= PIECE
        if rest.strip():
            yield reader.here(), Piece(rest[:end], part, last)
            part += 1
        reader.at += end


def cut(text: str) -> int:
    """Where the first piece of a text ends: before a blank line, else before a line end or a space, in the second half of PIECE."""
    if len(text) <= PIECE:
        return len(text)
    places = (text.rfind(mark, PIECE // 2, PIECE) for mark in ("\n\n", "\n", " "))
    return next((place for place in places if place > 0), PIECE)


def pieces(text: str) -> Iterator[Piece]:
    """A text that is in memory already, cut as one in a file is."""
    at = part = 0
    while at < len(text):
        end = at + cut(text[at : at + PIECE + 1])
        yield Piece(text[at:end], part, end == len(text))
        at, part = end, part + 1


# --- tables


def _parquet(path: Path) -> Iterator[Entry]:
    try:
        from pyarrow import ArrowInvalid, parquet  # pyright: ignore[reportMissingImports, reportMissingModuleSource]
    except ImportError:
        raise UserError(f"{path}: Parquet is read by pyarrow, which is not installed. Install it, or convert the file to .jsonl.") from None
    with _opened(path) as file:
        try:
            number = 0
            for batch in parquet.ParquetFile(file).iter_batches(1024):
                for value in batch.to_pylist():
                    number += 1
                    yield Entry(number, value)
        except ArrowInvalid as problem:
            raise UserError(f"{path} is no Parquet file, or is damaged: {problem}. Write it again.") from None


READERS: dict[str, Callable[[Path], Iterator[Entry]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".txt": _text,
    ".md": _text,
    ".parquet": _parquet,
}


# --- what is not UTF-8


def _bad_byte(path: Path) -> tuple[int, int]:
    """(line, byte) of the first byte that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, read = 1, 0
    with path.open("rb") as file:
        while True:
            block = file.read(BLOCK)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as problem:
                held = len(problem.object) - len(block)  # of the block before: a letter that was not whole
                return line + problem.object[: problem.start].count(b"\n"), read - held + problem.start
            line, read = line + block.count(b"\n"), read + len(block)


def _not_utf8(path: Path, line: int, byte: int) -> UserError:
    with path.open("rb") as file:
        encoding = "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "latin1"
    way_out = f"Convert it, for example: iconv -f {encoding} -t utf-8 {path.name}"
    return UserError(f"{path}:{line}: is not UTF-8 (byte {byte}). {way_out}")
