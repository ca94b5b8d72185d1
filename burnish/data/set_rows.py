"""The rows of a named set: from the hub, or from a local file or folder in its place."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from burnish.data.attribute import plain
from burnish.data.draws import shuffled
from burnish.data.entries import Entry as FileEntry
from burnish.data.entries import entries
from burnish.data.named import SPLITS, NamedSet, named_set
from burnish.data.rows import Row, listed
from burnish.data.template import Template
from burnish.errors import UserError

Entry = dict[str, Any]


class LeftOut(NamedTuple):
    """A row that is neither trained nor evaluated, and why."""

    row: Row
    reason: str


class SetRows(NamedTuple):
    """The rows of a set by what becomes of them."""

    train: list[Row]
    apart: list[Row]
    left_out: list[LeftOut]


def read_set(name: str, path: str | None, limit: int | None, template: Template, context: int, seed: int) -> SetRows:
    """The rows of a set, from the hub or from a local file or folder in its place.

    A row without a question or an answer is left out with that reason. Raises a `UserError` for a file that holds something else.
    """
    kind = named_set(name)
    if kind.made is not None:
        return SetRows(_made(name, kind, limit or kind.limit or 1, template, context), [], [])
    limit = limit or kind.limit
    first = None if kind.drawn or kind.apart else limit  # a draw needs all of them
    train: list[Row] = []
    left_out: list[LeftOut] = []
    for file, found in _entries(name, kind, path):
        read, gone = _rows(name, kind, file, found, kind.template == template.name, None if first is None else first - len(train))
        train, left_out = train + read, left_out + gone
    if not train:
        raise UserError(f"data set {name}{f' in {path}' if path else ''}: there is no row in it that can be used.")
    return _set_apart(kind, train, left_out, limit, seed)


def files_of(name: str, path: str) -> list[Path]:
    """The local files that stand in a set's place: the file itself, or of a folder those of the set's split; all, where none names it."""
    kind, place = named_set(name), Path(path)
    if not place.is_dir():
        return [place]
    for suffixes in ((".json", ".jsonl"), (".parquet",)):
        found = sorted(file for file in place.rglob("*") if file.suffix.lower() in suffixes and _is_data(file.relative_to(place)))
        named = [file for file in found if SPLITS[kind.split] & set(re.findall(r"[a-z]+", file.stem.lower()))]
        if found:
            return named or found
    raise UserError(f"{place}: no .json, .jsonl or .parquet file in this folder for the data set {name}.")


def _is_data(file: Path) -> bool:
    return not any(part.startswith(".") for part in file.parts) and file.name not in (
        "dataset_infos.json",
        "dataset_info.json",
        "state.json",
    )


# --- entries: from files, or from the hub


def _entries(name: str, kind: NamedSet, path: str | None) -> Iterator[tuple[str, Iterator[FileEntry]]]:
    """(file, its entries with their lines) of each file."""
    if path is None:
        yield name, _from_hub(name, kind)
        return
    for file in files_of(name, path):
        yield str(file), entries(file)


def _from_hub(name: str, kind: NamedSet) -> Iterator[FileEntry]:
    """Entries by their number from 1, through the `datasets` library and its cache."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise UserError(
            f"The data set {name} comes from the hub ({kind.hub}), for which the package datasets is needed. Install it "
            f"(pip install 'burnish[sets]'), or give a local copy in its place: {name}=PATH."
        ) from None
    from huggingface_hub.errors import HTTPError

    try:
        table = datasets.load_dataset(kind.hub, kind.subset, split=kind.split)
    except (OSError, ValueError, HTTPError, datasets.exceptions.DatasetsError) as problem:
        said = str(problem).strip().splitlines()[:1] or [type(problem).__name__]
        raise UserError(
            f"The data set {name} could not be had from the hub ({kind.hub}): {said[0]}. "
            f"Try again with a network, or give a local copy: {name}=PATH."
        ) from problem
    yield from (FileEntry(number, value) for number, value in enumerate(table, 1))


# --- rows


def _rows(
    name: str, kind: NamedSet, file: str, found: Iterator[FileEntry], own_prompt: bool, limit: int | None
) -> tuple[list[Row], list[LeftOut]]:
    """The first `limit` rows, or all. Raises one `UserError` that lists every entry that is not one of this set."""
    rows: list[Row] = []
    left_out: list[LeftOut] = []
    problems: list[str] = []
    needed = [key for key in (*kind.parts, kind.answer) if key not in kind.optional]
    for line, entry, _ in found:
        if limit is not None and len(rows) >= limit:
            break
        problem = _problem(entry, needed)
        if problem:
            problems.append(f"{file}:{line}: {problem}")
            continue
        turns = [(question.strip(), answer.strip()) for question, answer in _turns(kind, entry, own_prompt)]
        if reason := _useless(turns):
            left_out.append(LeftOut(Row("", "", file, line), reason))
            continue
        *history, (question, answer) = turns
        rows.append(Row(question, answer, file, line, history=tuple(history)))
    if problems:
        are = "entries are" if len(problems) > 1 else "entry is"
        raise UserError(
            listed(f"{file}: {len(problems)} {are} none of the data set {name}; it has the keys {', '.join(needed)}.", problems)
        )
    return rows, left_out


def _problem(entry: Any, needed: list[str]) -> str | None:
    if isinstance(entry, Exception):
        return str(entry)
    if not isinstance(entry, dict):
        return "is not an object"
    missing = [key for key in needed if not isinstance(entry.get(key), str)]
    return f"lacks a text for {', '.join(missing)}" if missing else None


def _useless(turns: list[tuple[str, str]]) -> str | None:
    if not turns:
        return "nobody answers in it"
    for question, answer in turns:
        if not question or not answer:
            return f"its {'answer' if question else 'question'} is empty"
    return None


def _turns(kind: NamedSet, entry: Entry, own_prompt: bool) -> list[tuple[str, str]]:
    if kind.turns is not None:
        return kind.turns(entry[kind.answer])
    parts = [str(entry.get(key) or "").strip() for key in kind.parts]
    if any(not part and key not in kind.optional for key, part in zip(kind.parts, parts, strict=True)):
        return [("", entry[kind.answer])]
    return [((kind.heading if own_prompt else "\n\n").join(part for part in parts if part), entry[kind.answer])]


def _set_apart(kind: NamedSet, rows: list[Row], left_out: list[LeftOut], limit: int | None, seed: int) -> SetRows:
    """Rows that are kept apart, then what may be trained; both in the order of the set, drawn by the seed where the set says so."""
    order = shuffled(len(rows), seed, "set")
    count = min(kind.apart, len(rows) // 10)  # of a small copy of the set, a tenth
    apart, others = [rows[at] for at in sorted(order[:count])], order[count:]
    asked = {plain(row.asked): row for row in apart}
    same = [at for at in others if asked and plain(rows[at].asked) in asked]
    left_out = left_out + [LeftOut(rows[at], f"asks what {asked[plain(rows[at].asked)].place} asks, which is kept apart") for at in same]
    asks_again = set(same)
    kept = [at for at in (others if kind.drawn else sorted(others)) if at not in asks_again]
    return SetRows([rows[at] for at in sorted(kept[:limit])], apart, left_out)


def _made(name: str, kind: NamedSet, count: int, template: Template, context: int) -> list[Row]:
    """Rows of which each fills a context: nothing to learn, but the memory and the time of a full one."""
    assert kind.made is not None
    question = (kind.heading if kind.template == template.name else "\n\n").join(kind.parts)
    low, high = 0, context + 1  # low times the text fits; so often as there are tokens it does not, unless it takes none
    while low + 1 < high:
        middle = (low + high) // 2
        fits = len(template.encode([(question, kind.made * middle)])[0]) <= context
        low, high = (middle, high) if fits else (low, middle)
    if not low:
        raise UserError(f"data.context = {context} has no room for an answer of the data set {name}. Raise it.")
    return [Row(question, kind.made * low, name, line) for line in range(1, count + 1)]
