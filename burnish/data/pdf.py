"""PDF: headings from the outline where there is one, else from size and weight of the letters, else from the words."""

import ctypes
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from burnish.data.blocks import Block, rejoin_bullets, without_running_lines
from burnish.data.headings import LONGEST_HEADING, find_headings
from burnish.errors import UserError
from burnish.words import counted

BOLD = ("bold", "black", "heavy", "semibold", "demi")


@dataclass(frozen=True)
class Line:
    """One line of a page as it is set; lengths in points, y from the bottom of the page."""

    page: int
    text: str
    size: float
    bold: bool
    left: float
    right: float
    baseline: float
    cells: int = 1


def read_pdf(path: Path) -> list[Block]:
    """Blocks of a PDF in reading order, one for each heading and paragraph.

    Raises a `UserError` where it is damaged, encrypted or without text.
    """
    document = _opened(path)
    try:
        pages = [_lines(document, page) for page in range(len(document))]
        outline = _outline(document)
    finally:
        document.close()
    if not any(lines for lines in pages):
        way_out = "Run OCR first, for example: ocrmypdf in.pdf out.pdf"
        raise UserError(f"{path} holds no text on any of its {counted(len(pages), 'page')}; it looks scanned. {way_out}")
    body = _body_size([line for page in pages for line in page])
    kept = without_running_lines([[(line.text, line.size > 1.3 * body) for line in lines] for lines in pages])
    lines = [line for page, stays in zip(pages, kept, strict=True) for line, stay in zip(page, stays, strict=True) if stay]
    levels = _levels_by_outline(lines, outline) or _levels_by_font(lines)
    if not levels:
        return find_headings(rejoin_bullets([(line.page, line.text) for line in lines]))
    return _blocks(lines, levels)


def _opened(path: Path) -> Any:
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(path)
        if len(document):
            document[0]
            return document
        raise UserError(f"{path} has no pages. Is the file whole?")
    except pypdfium2.PdfiumError as problem:
        if "password" in str(problem).lower():
            way_out = "Write a copy without a password, for example: qpdf --decrypt --password=… in.pdf out.pdf"
            raise UserError(f"{path} is encrypted. {way_out}") from None
        raise UserError(
            f"{path} cannot be read as a PDF ({str(problem).rstrip('.')}): it is cut off, damaged, or no PDF at all. Get it again."
        ) from None


# --- lines


def _lines(document: Any, number: int) -> list[Line]:
    """A page's lines in reading order; what stands on one baseline, one after the other, is one line."""
    import pypdfium2

    try:
        page = document[number]
        text_page = page.get_textpage()
    except pypdfium2.PdfiumError:
        return []  # one damaged page must not lose the others
    text = text_page.get_text_range(errors="ignore")
    found: list[Line] = []
    at = 0
    for raw in text.split("\n"):
        line = _line(text_page, raw, at, number + 1)
        at += len(raw) + 1
        if line is None:
            continue
        if found and _same_row(found[-1], line):
            last = found.pop()
            line = replace(last, text=f"{last.text} | {line.text}", right=line.right, cells=last.cells + 1, bold=last.bold and line.bold)
        found.append(line)
    text_page.close()
    page.close()
    return found


def _line(text_page: Any, raw: str, at: int, page: int) -> Line | None:
    import pypdfium2.raw as pdfium

    text = raw.strip()
    if not text:
        return None
    first = pdfium.FPDFText_GetCharIndexFromTextIndex(text_page, at + raw.index(text[0]))
    last = pdfium.FPDFText_GetCharIndexFromTextIndex(text_page, at + raw.rindex(text[-1]))
    if first < 0 or last < 0:
        return Line(page, _clean(text), 0.0, False, 0.0, 0.0, 0.0)
    size, bold, left, baseline = _letter(text_page, first)
    _, last_bold, _, _ = _letter(text_page, last)
    right = text_page.get_charbox(last)[2]
    cells = [text]
    if pdfium.FPDFText_CountRects(text_page, first, last - first + 1) > 1 and last - first + 1 == len(text):
        cells = _cells(text_page, text, first, 0.9 * size)
    return Line(page, _clean(" | ".join(cells)), size, bold and last_bold, left, right, baseline, len(cells))


def _cells(text_page: Any, text: str, first: int, gap: float) -> list[str]:
    """A line parted where the space between two words is wider than `gap`: the cells of a table's row."""
    cells, start, right = [], 0, None
    for at, letter in enumerate(text):
        if letter.isspace():
            continue
        left, _, letter_right, _ = text_page.get_charbox(first + at)
        if right is not None and left - right > gap:
            cells.append(text[start:at].strip())
            start = at
        right = letter_right
    return [*cells, text[start:].strip()]


def _letter(text_page: Any, index: int) -> tuple[float, bool, float, float]:
    """(size in points, bold, x, y of the baseline) of one letter."""
    import pypdfium2.raw as pdfium

    matrix, name, flags = pdfium.FS_MATRIX(), ctypes.create_string_buffer(128), ctypes.c_int()
    x, y = ctypes.c_double(), ctypes.c_double()
    pdfium.FPDFText_GetMatrix(text_page, index, matrix)
    pdfium.FPDFText_GetFontInfo(text_page, index, name, len(name), flags)
    pdfium.FPDFText_GetCharOrigin(text_page, index, x, y)
    scale = (matrix.c**2 + matrix.d**2) ** 0.5 or 1.0
    font = name.value.decode(errors="ignore").lower()
    bold = any(word in font for word in BOLD) or pdfium.FPDFText_GetFontWeight(text_page, index) >= 600
    return round(pdfium.FPDFText_GetFontSize(text_page, index) * scale, 1), bold, x.value, y.value


def _clean(text: str) -> str:
    """Without control characters; PDFium marks a hyphen that parts a word at the end of a line as U+FFFE or U+0002."""
    if text.isprintable():
        return text
    if text.endswith(("\ufffe", "\x02")):
        text = text[:-1] + "\u00ad"
    text = text.replace("\ufffe", "").replace("\x02", "")
    return "".join(letter for letter in text if letter.isprintable() or letter in "\t\u00ad")


def _same_row(last: Line, line: Line) -> bool:
    return last.size > 0 and abs(last.baseline - line.baseline) < 0.25 * max(last.size, line.size) and line.left > last.right


# --- headings


def _outline(document: Any) -> list[tuple[int, str, int]]:
    """(page, title, level from 1) of every entry that has a page."""
    entries = []
    for mark in document.get_toc():
        target = mark.get_dest()
        page = target.get_index() if target else None
        title = " ".join((mark.get_title() or "").split())
        if page is not None and title:
            entries.append((page + 1, title, mark.level + 1))
    return entries


def _levels_by_outline(lines: list[Line], outline: list[tuple[int, str, int]]) -> dict[int, tuple[int, int, str]]:
    """First line of each heading → (level, lines, title), for the entries whose title stands on their page or the next."""
    starts: dict[int, list[int]] = {}
    for at, line in enumerate(lines):
        starts.setdefault(line.page, []).append(at)
    found: dict[int, tuple[int, int, str]] = {}
    for page, title, level in outline:
        for at in starts.get(page, []) + starts.get(page + 1, []):
            count = _matches(lines, at, title)
            if count and at not in found:
                found[at] = (level, count, title)
                break
    return found if len(found) >= 0.5 * len(outline) else {}


def _matches(lines: list[Line], at: int, title: str) -> int:
    """How many lines from `at` on spell the title: 0 where they do not."""
    wanted, spelled = _bare(title), ""
    for count in range(1, 5):
        if at + count > len(lines):
            return 0
        spelled += _bare(lines[at + count - 1].text)
        if spelled == wanted:
            return count
        if not wanted.startswith(spelled):
            return 0
    return 0


def _bare(text: str) -> str:
    return "".join(letter for letter in text.casefold() if letter.isalnum())


def _levels_by_font(lines: list[Line]) -> dict[int, tuple[int, int, str]]:
    """As `_levels_by_outline`: short lines that are larger than the body, or bold at its size. Larger is higher."""
    body = _body_size(lines)
    bold_counts = sum(len(line.text) for line in lines if line.bold) < 0.3 * sum(len(line.text) for line in lines)
    styles = {at: style for at, line in enumerate(lines) if (style := _style(line, body, bold_counts))}
    if sum(len(lines[at].text) for at in styles) > 0.4 * sum(len(line.text) for line in lines):
        return {}  # headings hold few of the letters; here size and weight say something else
    order = {style: level for level, style in enumerate(sorted(set(styles.values()), reverse=True), 1)}
    found: dict[int, tuple[int, int, str]] = {}
    taken = -1
    for at, style in styles.items():
        if at <= taken:
            continue
        taken = at
        while taken + 1 in styles and styles[taken + 1] == style and _continues(lines[taken], lines[taken + 1]):
            taken += 1
        found[at] = (order[style], taken - at + 1, " ".join(line.text for line in lines[at : taken + 1]))
    return found


def _body_size(lines: list[Line]) -> float:
    """The size in which most letters are set."""
    letters: Counter[float] = Counter()
    for line in lines:
        letters[line.size] += len(line.text)
    return letters.most_common(1)[0][0]


def _style(line: Line, body: float, bold_counts: bool) -> tuple[float, bool] | None:
    """(size, bold) of a line that can be a heading."""
    text = line.text
    wordy = any(letter.isalpha() for letter in text) and len(text) <= LONGEST_HEADING and line.cells == 1
    if not wordy or text[0].islower():
        return None
    if line.size >= 1.12 * body:
        return (round(line.size * 2) / 2, line.bold)
    is_label = text.endswith((":", ".", ",", ";"))
    return (round(body * 2) / 2, True) if bold_counts and line.bold and line.size >= 0.97 * body and not is_label else None


def _continues(line: Line, following: Line) -> bool:
    same_page = line.page == following.page
    return same_page and 0 < line.baseline - following.baseline < 1.6 * line.size and not following.text[0].isdigit()


# --- paragraphs


def _blocks(lines: list[Line], levels: dict[int, tuple[int, int, str]]) -> list[Block]:
    blocks: list[Block] = []
    widths = _right_edges(lines)
    at = 0
    last: Line | None = None
    while at < len(lines):
        line = lines[at]
        if at in levels:
            level, count, title = levels[at]
            blocks.append(Block(line.page, title, level))
            at, last = at + count, None
            continue
        if last is not None and _wrapped(last, line, widths):
            text = blocks.pop().text
            blocks.append(Block(last.page, text[:-1] + line.text if text.endswith("\u00ad") else f"{text} {line.text}"))
        else:
            blocks.append(Block(line.page, line.text))
        at, last = at + 1, line
    return [replace(block, text=block.text.replace("\u00ad", "")) for block in blocks]


def _right_edges(lines: list[Line]) -> dict[int, float]:
    """Each page's right edge of text."""
    edges: dict[int, float] = {}
    for line in lines:
        edges[line.page] = max(edges.get(line.page, 0.0), line.right)
    return edges


def _wrapped(last: Line, line: Line, edges: dict[int, float]) -> bool:
    """Whether a line goes on with the paragraph of the line before it: same letters, close below, and that one was full."""
    close = last.page == line.page and 0 < last.baseline - line.baseline < 1.7 * last.size
    alike = last.cells == line.cells == 1 and abs(last.size - line.size) < 0.6
    return close and alike and (last.right > 0.82 * edges[last.page] or last.text.endswith("\u00ad"))
