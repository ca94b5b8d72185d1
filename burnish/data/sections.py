"""Documents → sections. A new kind of document is one file with one function and one row in READERS."""

import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from burnish.data.blocks import Block
from burnish.data.markdown import read_markdown
from burnish.data.pdf import read_pdf
from burnish.data.text import read_text
from burnish.errors import UserError


@dataclass(frozen=True)
class Section:
    """The text under one heading, without that of the headings beneath it."""

    file: str
    page: int
    """Physical page, from 1, of the heading."""
    last_page: int
    path: tuple[str, ...]
    """Headings, outermost first; empty for text before the first heading."""
    text: str
    page_starts: tuple[int, ...] = ()
    """Where in `text` each page after the first begins."""


READERS: dict[str, Callable[[Path], list[Block]]] = {
    ".pdf": read_pdf,
    ".md": read_markdown,
    ".markdown": read_markdown,
    ".txt": read_text,
    ".text": read_text,
}


def read_sections(documents: tuple[str, ...]) -> list[Section]:
    """Every section that has text, in the order of the documents. Raises a `UserError` for what cannot be read."""
    return [section for file in document_files(documents) for section in assemble(str(file), READERS[file.suffix.lower()](file))]


def document_files(documents: tuple[str, ...]) -> list[Path]:
    """The files that are meant by files, folders (searched to the bottom) and globs; each once, in a fixed order."""
    found: dict[Path, None] = {}
    for entry in documents:
        for file in _meant(entry):
            found.setdefault(file)
    return list(found)


def _meant(entry: str) -> list[Path]:
    path = Path(entry)
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.suffix.lower() in READERS]
        if not files:
            raise UserError(f"{path}: the folder holds no document that can be read ({', '.join(READERS)}).")
        return files
    if path.exists():
        return [_known(path)]
    files = [Path(name) for name in sorted(glob.glob(entry, recursive=True)) if Path(name).is_file()]
    if not files:
        raise UserError(f"{entry}: no such file{' (the pattern matches nothing)' if glob.has_magic(entry) else ''}. Check data.documents.")
    return [_known(file) for file in files]


def _known(file: Path) -> Path:
    if file.suffix.lower() not in READERS:
        kind = f"{file.suffix} files" if file.suffix else "files without a suffix"
        raise UserError(f"{file}: there is no reader for {kind}. Known: {', '.join(READERS)}. Convert it to one of these.")
    return file


def assemble(file: str, blocks: list[Block]) -> list[Section]:
    """Sections from blocks. A heading without text of its own makes none; it stays in the paths of those beneath it."""
    sections: list[Section] = []
    headings: list[tuple[int, str]] = []
    heading_page: int | None = None
    body: list[Block] = []
    for block in blocks:
        if block.level == 0:
            body.append(block)
            continue
        _close(sections, file, headings, heading_page, body)
        headings = [(level, text) for level, text in headings if level < block.level] + [(block.level, " ".join(block.text.split()))]
        heading_page, body = block.page, []
    _close(sections, file, headings, heading_page, body)
    return sections


def _close(sections: list[Section], file: str, headings: list[tuple[int, str]], heading_page: int | None, body: list[Block]) -> None:
    body = [block for block in body if block.text.strip()]
    if not body:
        return
    first = heading_page if heading_page is not None else body[0].page
    text, starts, page = "", [], first
    for block in body:
        text += "\n" if text else ""
        starts += [len(text)] * (block.page - page)
        page = block.page
        text += block.text.strip("\n")
    sections.append(Section(file, first, page, tuple(heading for _, heading in headings), text, tuple(starts)))
