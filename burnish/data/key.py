"""What the prepared data depends on, so that a project that was moved is known again: names and bytes of files, never where they lie."""

from collections import Counter
from glob import has_magic
from pathlib import Path
from typing import Any

from burnish.config import DataConfig, canonical
from burnish.data.sections import document_files
from burnish.data.sources import input_files, parse_source
from burnish.errors import UserError
from burnish.runs import file_digest

VERSION = 4
"""Of the data stage. 4: packing has a stream of draws of its own (rows and tokens are those of 3)."""
BY_PLACE = 3
"""The last version whose key held whole paths."""


def data_key(config: DataConfig, tokenizer_digest: str) -> dict[str, Any]:
    """The section with the names of its files, every input file's bytes, the tokenizer, the version of the stage."""
    return data_keys(config, tokenizer_digest)[0]


def data_keys(config: DataConfig, tokenizer_digest: str) -> tuple[dict[str, Any], ...]:
    """`data_key`, and then the keys that earlier versions wrote for what is the same. Costs reading every file once."""
    found = files_of(config)
    digests = {file: file_digest(_checked(file)) for entries in found.values() for _, files in entries for _, file in files}
    named, old = _named(config, found, digests), {str(file): digest for file, digest in digests.items()}
    rest = {"tokenizer": tokenizer_digest}
    return named | rest, {"stage": BY_PLACE, "data": _section(config), "files": old} | rest


def files_of(config: DataConfig) -> dict[str, list[tuple[str, list[tuple[str, Path]]]]]:
    """For each setting that names files: its entries by their names, each with its files by what they are called inside of it."""
    validation = config.validation if isinstance(config.validation, tuple) else ()
    input_files(config)  # what does not go together is refused before a file is read
    found = {
        "documents": [(_last(text), [(_inside(text, file), file) for file in document_files((text,))]) for text in config.documents],
        "rows": [_file(text) for text in config.rows],
        "questions": [_file(text) for text in config.questions],
        "validation": [_file(text) for text in validation],
        "sets": [source_by_name(text, "data.sets") for text in config.sets],
        "replay": [source_by_name(text, "data.replay") for text in config.replay],
        "mixture": [source_by_name(part.source, "data.mixture") for part in config.mixture],
    }
    return {setting: _told_apart(entries) for setting, entries in found.items() if entries}


def source_by_name(text: str, setting: str) -> tuple[str, list[tuple[str, Path]]]:
    """(what a source is called wherever it lies, its local files by name)."""
    if text == "documents":
        return text, []
    source = parse_source(text, setting)
    if source.path is None:
        return text, []
    name, place = _last(source.path), Path(source.path)
    files = [(str(file.relative_to(place)) if place.is_dir() else "", file) for file in source.files()]
    return name if source.name is None else f"{source.name}={name}", files


def _named(config: DataConfig, found: dict[str, Any], digests: dict[Path, str]) -> dict[str, Any]:
    section = _section(config)
    names = {setting: [name for name, _ in entries] for setting, entries in found.items()}
    for part, name in zip(section["mixture"], names.pop("mixture", []), strict=True):
        part["source"] = name
    files = {
        f"{setting}: {name}" + (f": {inner}" if inner else ""): digests[file]
        for setting, entries in found.items()
        for name, inside in entries
        for inner, file in inside
    }
    return {"stage": VERSION, "data": section | names, "files": files}


def _section(config: DataConfig) -> dict[str, Any]:
    section = canonical(config)
    del section["processes"]  # it changes no byte
    return section


def _file(text: str) -> tuple[str, list[tuple[str, Path]]]:
    return _last(text), [("", Path(text))]


def _last(text: str) -> str:
    return Path(text).name or text


def _inside(entry: str, file: Path) -> str:
    """A document's name inside the folder or the pattern that it was found by; empty where it was named itself."""
    anchor = Path(entry)
    if anchor.is_file():
        return ""
    if not anchor.is_dir():  # a pattern: the folders before its first wildcard
        anchor = next(parent for parent in anchor.parents if not has_magic(str(parent)))
    return str(file.relative_to(anchor))


def _told_apart(entries: list[Any]) -> list[Any]:
    """Entries of one name in different folders are numbered, in their order."""
    seen: Counter[str] = Counter()
    apart = []
    for name, files in entries:
        seen[name] += 1
        apart.append((name if seen[name] == 1 else f"{name} ({seen[name]})", files))
    return apart


def _checked(file: Path) -> Path:
    if file.is_dir():
        raise UserError(f"{file}: is a folder. Name its files; data.documents alone takes folders.")
    if not file.is_file():
        raise UserError(f"{file}: no such file. Check data.rows, data.questions and data.validation.")
    return file
