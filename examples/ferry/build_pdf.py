"""Build manual.pdf from manual.md.

Run `python examples/ferry/build_pdf.py` to write the PDF next to this file, or
add `--check` to leave it alone and exit 1 if it is not what the source gives.
The bytes depend on the source and the reportlab version only: no dates, no
random identifiers, and no compression.
"""

import argparse
import io
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode
from reportlab.lib import colors
from reportlab.lib.pagesizes import A4
from reportlab.lib.styles import ParagraphStyle
from reportlab.lib.units import mm
from reportlab.pdfbase.pdfmetrics import stringWidth
from reportlab.pdfgen.canvas import Canvas
from reportlab.platypus import (
    BaseDocTemplate,
    Flowable,
    Frame,
    ListFlowable,
    ListItem,
    PageBreak,
    PageTemplate,
    Paragraph,
    Spacer,
    Table,
    TableStyle,
)

HERE = Path(__file__).parent
SOURCE = HERE / "manual.md"
TARGET = HERE / "manual.pdf"

MARGIN = 26 * mm
PADDING = 6
BODY = ParagraphStyle("Body", fontName="Helvetica", fontSize=11, leading=16, spaceAfter=8)
CELL = ParagraphStyle("Cell", BODY, fontSize=10, leading=13, spaceAfter=0)
HEAD_CELL = ParagraphStyle("HeadCell", CELL, fontName="Helvetica-Bold")
HEADINGS = {
    level: ParagraphStyle(
        f"Heading{level}",
        BODY,
        fontName="Helvetica-Bold",
        fontSize=size,
        leading=size * 1.25,
        spaceBefore=before,
        spaceAfter=after,
        keepWithNext=True,
    )
    for level, size, before, after in [(1, 20, 0, 14), (2, 14, 12, 6), (3, 12, 8, 4)]
}
GRID = TableStyle(
    [
        ("GRID", (0, 0), (-1, -1), 0.5, colors.gray),
        ("BACKGROUND", (0, 0), (-1, 0), colors.whitesmoke),
        ("VALIGN", (0, 0), (-1, -1), "TOP"),
        ("LEFTPADDING", (0, 0), (-1, -1), PADDING),
        ("RIGHTPADDING", (0, 0), (-1, -1), PADDING),
    ]
)


class ManualTemplate(BaseDocTemplate):
    """A document that adds an outline entry for each heading it places."""

    headings_placed = 0

    def afterFlowable(self, flowable: Flowable) -> None:
        if not isinstance(flowable, Paragraph) or flowable.style not in HEADINGS.values():
            return
        level = int(flowable.style.name[-1])
        key = f"heading-{self.headings_placed}"
        self.headings_placed += 1
        self.canv.bookmarkPage(key)
        self.canv.addOutlineEntry(flowable.getPlainText(), key, level - 1, closed=level > 1)


def inline_markup(node: SyntaxTreeNode) -> str:
    """Return an inline node as reportlab's paragraph markup."""
    if node.type == "text":
        return escape(node.content, quote=False)
    if node.type in ("softbreak", "hardbreak"):
        return " "
    inner = "".join(inline_markup(child) for child in node.children)
    tags = {"strong": "b", "em": "i"}
    if node.type == "inline":
        return inner
    if node.type not in tags:
        raise ValueError(f"manual.md uses inline markup that is not supported: {node.type}")
    return f"<{tags[node.type]}>{inner}</{tags[node.type]}>"


def table_flowable(node: SyntaxTreeNode, width: float) -> Table:
    """Return a table whose columns share the width by their widest cells."""
    rows = [row.children for part in node.children for row in part.children]
    texts = [[inline_markup(cell.children[0]) for cell in row] for row in rows]
    natural = [
        max(stringWidth(text, HEAD_CELL.fontName, HEAD_CELL.fontSize) for text in column) + 2 * PADDING
        for column in zip(*texts, strict=True)
    ]
    widths = [width * share / sum(natural) for share in natural]
    head, *body = texts
    cells = [[Paragraph(text, HEAD_CELL) for text in head]]
    cells += [[Paragraph(text, CELL) for text in row] for row in body]
    return Table(cells, colWidths=widths, repeatRows=1, style=GRID, spaceBefore=4, spaceAfter=12)


def list_flowable(node: SyntaxTreeNode, width: float) -> ListFlowable:
    """Return a bullet or numbered list."""
    items: list[Any] = [ListItem([part for child in item.children for part in block(child, width)]) for item in node.children]
    if node.type == "ordered_list":
        return ListFlowable(items, bulletType="1", bulletFormat="%s.", leftIndent=20)
    return ListFlowable(items, bulletType="bullet", start="•", leftIndent=20)


def block(node: SyntaxTreeNode, width: float) -> list[Flowable]:
    """Return the flowables of one block of the manual."""
    if node.type == "heading":
        return [Paragraph(inline_markup(node.children[0]), HEADINGS[int(node.tag[1])])]
    if node.type == "paragraph":
        return [Paragraph(inline_markup(node.children[0]), BODY)]
    if node.type in ("bullet_list", "ordered_list"):
        return [list_flowable(node, width), Spacer(0, 4)]
    if node.type == "table":
        return [table_flowable(node, width)]
    raise ValueError(f"manual.md uses a block that is not supported: {node.type}")


def story(root: SyntaxTreeNode, width: float) -> list[Flowable]:
    """Return the whole manual as flowables, each chapter on a new page."""
    flowables: list[Flowable] = []
    for node in root.children:
        if node.type == "heading" and node.tag == "h1" and flowables:
            flowables.append(PageBreak())
        flowables.extend(block(node, width))
    return flowables


def draw_page_frame(title: str, canvas: Canvas, page: int) -> None:
    """Draw the running header and the page number."""
    width, height = A4
    canvas.saveState()
    canvas.setFont("Helvetica", 8.5)
    canvas.setFillColor(colors.dimgray)
    canvas.drawString(MARGIN, height - 15 * mm, title)
    canvas.drawCentredString(width / 2, 13 * mm, f"Page {page}")
    canvas.restoreState()


def build(source: str) -> bytes:
    """Return the PDF that the Markdown source gives; its first heading is the title."""
    root = SyntaxTreeNode(MarkdownIt("commonmark").enable("table").parse(source))
    title = root.children[0].children[0].content
    out = io.BytesIO()
    document = ManualTemplate(out, pagesize=A4, title=title, invariant=1, pageCompression=0)
    frame = Frame(MARGIN, 22 * mm, A4[0] - 2 * MARGIN, A4[1] - 44 * mm, 0, 0, 0, 0)
    document.addPageTemplates(
        PageTemplate(
            frames=[frame],
            onPage=lambda canvas, doc: draw_page_frame(title, canvas, doc.page),
        )
    )
    document.build(story(root, frame.width))
    return out.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build manual.pdf from manual.md.")
    parser.add_argument("--check", action="store_true", help="only compare the PDF with the source")
    options = parser.parse_args(arguments)
    pdf = build(SOURCE.read_text(encoding="utf-8"))
    if not options.check:
        TARGET.write_bytes(pdf)
        return 0
    if TARGET.exists() and TARGET.read_bytes() == pdf:
        return 0
    print(f"{TARGET.name} is not what {SOURCE.name} gives; run build_pdf.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
