import os
import time
from pathlib import Path

import pytest

from burnish.data.headings import may_follow
from burnish.data.sections import read_sections
from burnish.errors import UserError

REPOSITORY = Path(__file__).parents[2]


def make_pdf(path, pages, outline=(), encrypt=None, size=12):
    """`pages` hold (text, size, bold) lines from the top; a list instead of text is a row of a table."""
    from reportlab.lib.pdfencrypt import StandardEncryption
    from reportlab.pdfgen.canvas import Canvas

    canvas = Canvas(str(path), encrypt=StandardEncryption(encrypt) if encrypt else None)
    for number, lines in enumerate(pages, 1):
        y = 810
        for text, line_size, bold in lines:
            y -= 1.3 * line_size
            canvas.setFont("Helvetica-Bold" if bold else "Helvetica", line_size)
            for column, cell in enumerate(text if isinstance(text, list) else [text]):
                canvas.drawString(60 + 150 * column, y, cell)
        for title, page, level in outline:
            if page == number:
                canvas.bookmarkPage(title)
                canvas.addOutlineEntry(title, title, level)
        canvas.showPage()
    canvas.save()
    return str(path)


def paths(document):
    return [section.path for section in read_sections((str(document),))]


FULL = "This line is a long one that goes all the way to the right edge of the page it stands on,"


def test_headings_of_a_pdf_come_from_larger_and_bolder_letters(tmp_path):
    page = [("1 Boats", 20, True), (FULL, 11, False), ("and it ends here.", 11, False), ("Colors", 11, True), ("Red.", 11, False)]
    sections = read_sections((make_pdf(tmp_path / "a.pdf", [page, [("2 Piers", 20, True), ("Two.", 11, False)]]),))
    assert [(section.path, section.text, section.page) for section in sections] == [
        (("1 Boats",), f"{FULL} and it ends here.", 1),
        (("1 Boats", "Colors"), "Red.", 1),
        (("2 Piers",), "Two.", 2),
    ]


def test_headings_of_a_pdf_come_from_its_outline_where_it_has_one(tmp_path):
    pages = [[("Boats", 12, False), ("They float.", 12, False), ("Shouted", 22, True)], [("Red boats", 12, False), ("Few.", 12, False)]]
    file = make_pdf(tmp_path / "a.pdf", pages, [("Boats", 1, 0), ("Red boats", 2, 1)])
    assert paths(file) == [("Boats",), ("Boats", "Red boats")]


def test_a_row_of_a_table_is_one_line_and_no_heading(tmp_path):
    table = [(["Line", "First boat", "Last boat"], 11, True), (["Red", "06:15", "22:40"], 11, False)]
    (section,) = read_sections((make_pdf(tmp_path / "a.pdf", [[("Timetable", 20, True), (FULL, 11, False), *table]]),))
    assert section.text.split("\n")[1:] == ["Line | First boat | Last boat", "Red | 06:15 | 22:40"]


def test_running_headers_footers_and_page_numbers_are_dropped(tmp_path):
    pages = []
    for number, part in enumerate("ABCDE", 1):
        footer = (str(number), 9, False)
        pages.append([("Manual, May", 9, False), (f"Part {part}", 20, True), (f"{part}: {FULL}", 11, False), footer])
    sections = read_sections((make_pdf(tmp_path / "a.pdf", [[("Manual, May", 30, True), ("A book.", 11, False)], *pages]),))
    assert [section.path[-1] for section in sections] == ["Manual, May", "Part A", "Part B", "Part C", "Part D", "Part E"]
    assert [section.text for section in sections] == ["A book.", *(f"{part}: {FULL}" for part in "ABCDE")]


def test_a_section_knows_where_its_pages_begin(tmp_path):
    file = make_pdf(tmp_path / "a.pdf", [[("Boats", 20, True), ("One.", 11, False)], [("Two.", 11, False)], [("Three.", 11, False)]])
    (section,) = read_sections((file,))
    assert (section.page, section.last_page, section.text) == (1, 3, "One.\nTwo.\nThree.")
    assert [section.text[start:] for start in section.page_starts] == ["Two.\nThree.", "Three."]


@pytest.mark.skipif(not (REPOSITORY / "examples/ferry/manual.pdf").exists(), reason="the example is not there")
def test_the_ferry_manual_reads_the_same_from_pdf_and_from_markdown():
    pdf, markdown = (read_sections((str(REPOSITORY / f"examples/ferry/manual.{kind}"),)) for kind in ("pdf", "md"))
    assert [section.path for section in pdf] == [section.path for section in markdown]

    def letters(text):
        return "".join(letter for letter in text if letter.isalnum())

    assert [letters(section.text) for section in pdf] == [letters(section.text) for section in markdown]


TEXT = """CONTENTS

1.1 Boats .......... 2
1.2 Piers .......... 3
\f
CHAPTER 1: THE LAKE
1.1 Boats
They carry 2.5 tons.
2.5 Tons is a lot
1.3.1 Lost parents
Here.
\f
CHAPTER 1: THE LAKE
More.
2.1
Weather
Rain.
"""


def test_headings_of_text_come_from_numbers_and_chapters(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    found = [(section.page, section.path, section.text) for section in read_sections((str(tmp_path / "a.txt"),))]
    assert found[1:] == [
        (2, ("CHAPTER 1: THE LAKE", "1.1 Boats"), "They carry 2.5 tons.\n2.5 Tons is a lot"),
        (2, ("CHAPTER 1: THE LAKE", "1.3", "1.3.1 Lost parents"), "Here.\nMore."),
        (3, ("CHAPTER 1: THE LAKE", "2.1 Weather"), "Rain."),
    ]


def test_capitals_are_headings_where_nothing_is_numbered(tmp_path):
    (tmp_path / "a.txt").write_text("THE LAKE\n\nWater.\n\nTHE BOATS\n\nWood, and\nOIL\nin tins.\n")
    assert paths(tmp_path / "a.txt") == [("THE LAKE",), ("THE BOATS",)]


def test_items_of_a_list_are_no_headings(tmp_path):
    (tmp_path / "a.txt").write_text("1 Fares\n\n1.1 Adults\n\nThey pay:\n1. Three marks\n2. Four marks\n\n1.2 Dogs\n\nOne mark.\n")
    assert paths(tmp_path / "a.txt") == [("1 Fares", "1.1 Adults"), ("1 Fares", "1.2 Dogs")]


def test_a_number_follows_only_what_may_come_before_it():
    assert all(
        may_follow(*pair)
        for pair in [((1,), (1, 1)), ((1, 1), (1, 2)), ((1, 2, 3), (1, 3)), ((1, 9), (2,)), ((1, 2), (1, 5)), ((9, 9), (1, 1))]
    )
    assert not any(may_follow(*pair) for pair in [((1, 2), (1, 2)), ((1, 3), (1, 2)), ((1, 2), (1, 9)), ((2, 1), (5, 7))])


def test_headings_of_markdown_come_from_its_syntax_alone(tmp_path):
    source = "---\ntitle: x\n---\nBefore.\n\n# The *lake*\n\n```\n# code\n```\n\nDepths\n------\n\n"
    source += "| a | b |\n|---|---|\n| 1 | 2 |\n\f\n> # quoted\n\n## Boats\nFew.\n"
    (tmp_path / "a.md").write_text(source)
    found = [(section.page, section.path, section.text) for section in read_sections((str(tmp_path / "a.md"),))]
    assert found == [
        (1, (), "Before."),
        (1, ("The lake",), "```\n# code\n```"),
        (1, ("The lake", "Depths"), "| a | b |\n|---|---|\n| 1 | 2 |\n> # quoted"),
        (2, ("The lake", "Boats"), "Few."),
    ]


# --- what cannot be read


def refusal(*documents):
    with pytest.raises(UserError) as caught:
        read_sections(tuple(map(str, documents)))
    return str(caught.value)


def test_missing_files_empty_folders_and_unknown_kinds_are_refused(tmp_path):
    assert "no such file. Check data.documents" in refusal(tmp_path / "none.pdf")
    assert "the pattern matches nothing" in refusal(tmp_path / "*.pdf")
    assert "the folder holds no document that can be read (.pdf, .md" in refusal(tmp_path)
    (tmp_path / "a.docx").write_bytes(b"x")
    assert "no reader for .docx files. Known: .pdf, .md" in refusal(tmp_path / "a.docx")


def test_folders_and_globs_give_each_document_once(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("b.md", "a.md", "in/c.txt"):
        (tmp_path / name).write_text("Text.\n")
    (tmp_path / "in/picture.png").write_bytes(b"x")
    files = [Path(section.file).name for section in read_sections((str(tmp_path), str(tmp_path / "*.md"), str(tmp_path / "a.md")))]
    assert files == ["a.md", "b.md", "c.txt"]


def test_text_that_is_not_utf8_or_empty_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert "a.txt is not UTF-8 (byte 3). Convert it, for example: iconv" in refusal(tmp_path / "a.txt")
    (tmp_path / "a.md").write_bytes(b" \n")
    assert "a.md is empty" in refusal(tmp_path / "a.md")


def test_a_pdf_without_text_is_said_to_be_scanned(tmp_path):
    assert "holds no text on any of its 2 pages; it looks scanned. Run OCR first" in refusal(make_pdf(tmp_path / "a.pdf", [[], []]))


def test_an_encrypted_pdf_is_refused(tmp_path):
    assert "is encrypted. Write a copy without a password" in refusal(make_pdf(tmp_path / "a.pdf", [[("A", 9, False)]], encrypt="secret"))


def test_a_pdf_that_is_cut_off_or_something_else_is_refused(tmp_path):
    whole = Path(make_pdf(tmp_path / "a.pdf", [[("A", 9, False)]])).read_bytes()
    for name, content in {"cut.pdf": whole[: len(whole) // 3], "html.pdf": b"<html>not found</html>", "empty.pdf": b""}.items():
        (tmp_path / name).write_bytes(content)
        assert f"{name} cannot be read as a PDF" in refusal(tmp_path / name)


# --- a real book


def real(name):
    folder = os.environ.get("BURNISH_TEST_DATA")
    if not folder or not (Path(folder) / name).exists():
        pytest.skip("BURNISH_TEST_DATA names no folder with this document")
    return str(Path(folder) / name)


def test_a_guideline_of_1162_pages_has_its_sections_on_their_pages():
    started = time.perf_counter()
    sections = read_sections((real("guidelines/uganda2023/UCG2023.pdf"),))
    assert time.perf_counter() - started < 60
    assert max(section.last_page for section in sections) >= 1160
    assert len(sections) > 400
    measles = next(section for section in sections if section.path and section.path[-1].startswith("2.3.3 Measles"))
    assert measles.path[:2] == ("CHAPTER 2: Infectious Diseases", "2.3 VIRAL INFECTIONS")
    assert (measles.page, "Koplik" in measles.text) == (200, True)
    running = sum("Uganda Clinical Guidelines 2023" in section.text.split("\n") for section in sections)
    assert running == 0
