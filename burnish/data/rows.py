"""Instruction rows from JSON and JSONL. A new row format is one function and one row in FORMATS."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from burnish.data.files import read_utf8
from burnish.errors import UserError


@dataclass(frozen=True)
class Row:
    """A question, its answer and where they come from: `line` of `file` (from 1), `page` of a document, `section`, `fact`."""

    question: str
    answer: str
    file: str
    line: int
    page: int | None = None
    section: str | None = None
    fact: str | None = None

    @property
    def place(self) -> str:
        """`file:line`, as messages name a row."""
        return f"{self.file}:{self.line}"


class Format(NamedTuple):
    """A row has this format if it has all the keys of `needs`; `read` gives question and answer."""

    needs: frozenset[str]
    read: Callable[[dict[str, Any]], tuple[Any, Any]]
    example: str


def _alpaca(entry: dict[str, Any]) -> tuple[Any, Any]:
    question, addition = entry["instruction"], entry.get("input")
    if addition is not None and not isinstance(addition, str):
        raise _Bad(f"its input is {_kind(addition)}, not text")
    return (f"{question}\n\n{addition}" if isinstance(question, str) and (addition or "").strip() else question), entry["output"]


FORMATS: dict[str, Format] = {
    "alpaca": Format(frozenset({"instruction", "output"}), _alpaca, "instruction, input (optional), output"),
    "question": Format(frozenset({"question", "answer"}), lambda entry: (entry["question"], entry["answer"]), "question, answer"),
}

SHOWN = 20
_EXAMPLES = "; or ".join(form.example for form in FORMATS.values())


class _Bad(Exception):
    """Why one row cannot be used; collected, so that a file's problems are all told at once."""


def read_rows(file: str | Path, limit: int | None = None) -> list[Row]:
    """The first `limit` rows of a file, or all of them. Raises one `UserError` that lists every bad row by file and line.

    In a .json file a row's line is the one where its object begins.
    """
    path = Path(file)
    rows: list[Row] = []
    problems: list[str] = []
    for line, entry in read_entries(path, "data.rows and data.questions", limit):
        if limit is not None and len(rows) + len(problems) >= limit:
            break
        try:
            rows.append(_row(entry, str(path), line))
        except _Bad as problem:
            problems.append(f"{path}:{line}: {problem}")
    if problems:
        raise UserError(listed(f"{path}: {len(problems)} row{'s' * (len(problems) > 1)} cannot be used.", problems))
    if not rows:
        raise UserError(f"{path} is empty: it holds no rows. Expected objects with the keys {_EXAMPLES}.")
    return rows


def read_entries(file: str | Path, setting: str, limit: int | None = None) -> Iterator[tuple[int, Any]]:
    """(line, value) of each entry of a file, whatever its keys; an exception that says why in place of one that cannot be read.

    `setting` is what messages say to check where there is no such file.
    """
    path = Path(file)
    if path.suffix.lower() not in _ENTRIES:
        raise UserError(f"{path}: rows are read from {' and '.join(_ENTRIES)} files.")
    yield from _ENTRIES[path.suffix.lower()](path, read_utf8(path, setting), limit)


def listed(head: str, lines: list[str]) -> str:
    """A message with the first lines of a list, and a count of the others."""
    rest = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    return "\n  ".join([head, *lines[:SHOWN], *rest])


def write_rows(path: Path, rows: list[Row]) -> None:
    """One JSON object a line, in the `question`/`answer` format with `file` and `line`. Keys without a value are left out."""
    with path.open("w", encoding="utf-8") as out:
        for row in rows:
            out.write(json.dumps({key: value for key, value in asdict(row).items() if value is not None}, ensure_ascii=False) + "\n")


def load_rows(file: str | Path) -> list[Row]:
    """Reads back what `write_rows` wrote; rows keep the file and line that they first came from."""
    with Path(file).open(encoding="utf-8") as lines:
        return [Row(**json.loads(line)) for line in lines]


def _jsonl_entries(path: Path, text: str, limit: int | None) -> Iterator[tuple[int, Any]]:
    taken = 0
    for number, line in enumerate(text.split("\n"), 1):
        if taken == limit:
            return
        if not line.strip():
            continue
        taken += 1
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as problem:
            yield number, _Bad(f"not valid JSON: {problem.msg} (column {problem.colno})")


def _json_entries(path: Path, text: str, limit: int | None) -> Iterator[tuple[int, Any]]:
    """Objects of a list one by one, so that each is known with the line on which it begins."""
    if not text.strip():
        return
    skip, decoder = re.compile(r"[\s,]*"), json.JSONDecoder()
    at = len(text) - len(text.lstrip())
    try:
        if text[at] != "[":
            value = json.loads(text)
            way_out = "Put the rows into [ ], or one a line into a .jsonl file."
            raise UserError(f"{path}: a list of rows is expected, not {_kind(value)}. {way_out}")
        json.loads(text)  # the whole must be JSON; the loop below would forgive a missing comma
        line, counted = 1, 0
        at = _end(skip, text, at + 1)
        while text[at] != "]":
            line, counted = line + text.count("\n", counted, at), at
            entry, at = decoder.raw_decode(text, at)
            yield line, entry
            at = _end(skip, text, at)
    except json.JSONDecodeError as problem:
        raise UserError(f"{path}:{problem.lineno}: not valid JSON: {problem.msg} (column {problem.colno}).") from None


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    found = pattern.match(text, at)
    return found.end() if found else at


_ENTRIES: dict[str, Callable[[Path, str, int | None], Iterator[tuple[int, Any]]]] = {".json": _json_entries, ".jsonl": _jsonl_entries}


def _row(entry: Any, file: str, line: int) -> Row:
    if isinstance(entry, _Bad):
        raise entry
    if not isinstance(entry, dict):
        raise _Bad(f"is {_kind(entry)}, not an object")
    question, answer = _format(entry).read(entry)
    page = entry.get("page")
    if page is not None and (not isinstance(page, int) or isinstance(page, bool) or page < 1):
        raise _Bad(f"its page is {page!r}, not a whole number from 1")
    question, answer = _filled(question, "question"), _filled(answer, "answer")
    return Row(question, answer, file, line, page, _optional(entry, "section"), _optional(entry, "fact"))


def _format(entry: dict[str, Any]) -> Format:
    for form in FORMATS.values():
        if form.needs <= entry.keys():
            return form
    for form in FORMATS.values():
        if form.needs & entry.keys():
            raise _Bad(f"lacks {', '.join(sorted(form.needs - entry.keys()))}")
    raise _Bad(f"has the keys {', '.join(map(str, entry)) or '(none)'}; expected {_EXAMPLES}")


def _filled(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _Bad(f"its {name} is {_kind(value)}, not text")
    if not value.strip():
        raise _Bad(f"its {name} is empty")
    return value.strip()


def _optional(entry: dict[str, Any], name: str) -> str | None:
    value = entry.get(name)
    return None if value is None else str(value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null", int: "a number", float: "a number"}
    return names[type(value)]
