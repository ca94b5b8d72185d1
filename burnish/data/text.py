"""Plain text: pages are parted by form feeds, headings are found by their words."""

from pathlib import Path

from burnish.data.blocks import Block, read_document, rejoin_bullets, without_running_lines
from burnish.data.headings import find_headings


def read_text(path: Path) -> list[Block]:
    """One block for each heading and each line. Raises a `UserError` where the file is empty or not UTF-8."""
    return blocks_of_pages([page.split("\n") for page in read_document(path).split("\f")])


def blocks_of_pages(pages: list[list[str]]) -> list[Block]:
    """Blocks from pages of lines, without running headers, footers and page numbers."""
    kept = without_running_lines([[(line, None) for line in lines] for lines in pages])
    numbered = enumerate(zip(pages, kept, strict=True), 1)
    lines = [(page, line) for page, (texts, stays) in numbered for line, stay in zip(texts, stays, strict=True) if stay]
    return find_headings(rejoin_bullets(lines))
