"""Markdown: headings from its own syntax, all else as it is written. Page 1, or one more after each form feed."""

import re
from pathlib import Path
from typing import Any

from burnish.data.blocks import Block, is_page_number, read_document

_DEEP = re.compile(r"^#{7,}(?=\s)", re.MULTILINE)  # deeper than Markdown knows, as converters write them


def read_markdown(path: Path) -> list[Block]:
    """One block for each heading and for the source between two headings. Raises a `UserError` where it is empty or not UTF-8."""
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark").enable("table")
    blocks: list[Block] = []
    for page, source in enumerate(read_document(path).split("\f"), 1):
        source = _DEEP.sub("######", source)
        lines = source.split("\n")
        tokens = parser.parse(source)
        at = _front_matter(lines)
        for place, token in enumerate(tokens):
            if token.type != "heading_open" or token.level > 0 or token.map is None or token.map[0] < at:
                continue
            blocks.append(Block(page, _body(lines[at : token.map[0]])))
            title, at = _plain(tokens[place + 1]), token.map[1]
            if not is_page_number(title):  # converters of PDFs take them for headings
                blocks.append(Block(page, title, int(token.tag[1:])))
        blocks.append(Block(page, _body(lines[at:])))
    return [block for block in blocks if block.text]


def _plain(inline: Any) -> str:
    """A heading's words without emphasis, links and code marks."""
    return "".join(" " if child.type in ("softbreak", "hardbreak") else child.content for child in inline.children or ()).strip()


def _body(lines: list[str]) -> str:
    return "\n".join(lines).strip("\n").rstrip()


def _front_matter(lines: list[str]) -> int:
    """How many lines of YAML or TOML front matter the source begins with."""
    mark = lines[0].strip() if lines else ""
    if mark not in ("---", "+++"):
        return 0
    ends = [at for at, line in enumerate(lines[1:], 1) if line.strip() == mark]
    return ends[0] + 1 if ends else 0
