"""Files of rows: objects one by one with their lines, however a file is cut into blocks; wrong bytes; sizes that are too large."""

import json
import resource

import pytest

from burnish.data import entries as reading
from burnish.data.entries import Piece, entries, pieces
from burnish.data.rows import iter_rows, read_rows
from burnish.errors import UserError

ROWS = [{"question": f'Wie heißt {at}? []{{}}\\"', "answer": "é😀\n" * at + "."} for at in range(1, 30)]


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_is_read_the_same_in_blocks_of_any_size(block, indent, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", block)
    text = json.dumps(ROWS, indent=indent, ensure_ascii=False)
    (tmp_path / "a.json").write_text(text, encoding="utf-8-sig", newline="\r\n")
    found = list(entries(tmp_path / "a.json"))
    assert [entry.value for entry in found] == ROWS
    lines = [number for number, line in enumerate(text.split("\n"), 1) if line.strip() == "{"]
    assert [entry.line for entry in found] == (lines if indent else [1] * len(ROWS))


def test_a_faq_file_knows_the_line_of_each_question_and_passes_over_what_else_it_holds(tmp_path):
    (tmp_path / "a.json").write_text(
        '{"title": {"a": [1]},\n"questions": [\n{"question": "a", "answer": "b"}\n,\n{"question": "", "answer": "b"}\n],"n": 1}'
    )
    with pytest.raises(UserError, match=r"a\.json:5: its question is empty"):
        read_rows(tmp_path / "a.json")


@pytest.mark.parametrize("block", [3, 1 << 20])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[{"question": "a"},\n {"question": nope}]', "a.json:2: not valid JSON: Expecting value (column 15)"),
        ('[{"a": 1}\n\n {"a": 1}]', "a.json:3: not valid JSON: Expecting ',' delimiter (column 2)"),
        ('[{"a": 1},\n]', "a.json:2: not valid JSON: Expecting value"),
        ('[{"a": 1}', "a.json:1: not valid JSON: Expecting ',' delimiter"),
        ('[{"a": "b', "a.json:1: not valid JSON: Unterminated string"),
        ('[{"a": 1}] [', "a.json:1: not valid JSON: Extra data"),
        ("[" * 100_000, "a.json:1: not valid JSON: nested too deeply"),
        ('{"rows": [1]}', "a list of rows is expected, not an object"),
        ("12", "a list of rows is expected, not a number"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else value,
)
def test_json_that_is_not_valid_is_refused_with_its_line(content, reason, block, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", block if len(content) < 1000 else 1 << 20)
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(UserError) as caught:
        list(entries(tmp_path / "a.json"))
    assert reason in str(caught.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("block", [1, 5, 1 << 20])
def test_a_byte_that_is_not_utf8_is_named_with_its_line_and_place(name, mark, block, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "BLOCK", block)
    content = mark + '{"question": "ä", "answer": "b"}\n'.encode() + b'{"question": "caf\xe9", "answer": "b"}\n'
    content = mark + b"[" + content[len(mark) : -1].replace(b"\n", b",\n") + b"]" if name == "a.json" else content
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        UserError, match=rf"{name}:2: is not UTF-8 \(byte {content.index(0xE9)}\)\. Convert it, for example: iconv -f latin1"
    ):
        list(entries(tmp_path / name))


def test_a_file_in_utf16_is_told_how_to_be_converted(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"question": "a", "answer": "b"}', encoding="utf-16")
    with pytest.raises(UserError, match=r"a\.jsonl:1: is not UTF-8 \(byte 0\)\. Convert it, for example: iconv -f utf-16 "):
        read_rows(tmp_path / "a.jsonl")


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.jsonl"])
def test_a_long_text_comes_in_pieces_that_lose_no_letter(name, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 40)
    monkeypatch.setattr(reading, "BLOCK", 7)
    text = "One line of words.\n\nAnother one, which is longer than a piece may be.\n" + "x" * 95 + "\n\nEnd."
    (tmp_path / name).write_text(text if name != "a.jsonl" else json.dumps({"text": text}), newline="\r\n")
    rows = read_rows(tmp_path / name)
    assert "".join(row.answer for row in rows) == text
    assert all(len(row.answer) <= 40 for row in rows)
    assert [row.part for row in rows] == list(range(len(rows)))
    assert [row.ends for row in rows] == [False] * (len(rows) - 1) + [True]


def test_pieces_are_cut_before_blank_lines_then_lines_then_words(monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 20)
    assert [piece.text for piece in pieces("a bb ccc dddd\neeee f\n\ngg hh")] == ["a bb ccc dddd", "\neeee f\n\ngg hh"]
    assert list(pieces("words")) == [Piece("words", 0, True)]
    assert [piece.text for piece in pieces("aaaa bbbb cccc dddd eeee")] == ["aaaa bbbb cccc dddd", " eeee"]
    assert [piece.text for piece in pieces("x" * 50)] == ["x" * 20, "x" * 20, "x" * 10]


def test_a_line_of_40_mb_is_read_and_memory_is_bounded(tmp_path):
    line = json.dumps({"text": "All is well. " * 3_200_000})
    (tmp_path / "a.jsonl").write_text(line + "\n")
    del line
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    letters = sum(len(row.answer) for row in iter_rows(tmp_path / "a.jsonl"))
    assert letters == 13 * 3_200_000
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 300_000  # KiB: the line as bytes, as text, as a value, and its pieces


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_row_that_is_longer_than_any_may_be_is_refused_before_it_is_read(name, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST", 1 << 20)
    monkeypatch.setattr(reading, "BLOCK", 1 << 10)
    row = json.dumps({"text": "x" * (3 << 20)})
    (tmp_path / name).write_text("\n" + (row if name == "a.jsonl" else f"[{row}]"))
    with pytest.raises(UserError, match=rf"{name}:2: .*(longer than 1 MiB|a row of more than 1 MiB)"):
        read_rows(tmp_path / name)


def test_parquet_is_read_where_pyarrow_is_installed(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    messages = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], None]
    parquet.write_table(pyarrow.table({"messages": messages}), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet", 1)[0].turns == (("a", "b"),)
    with pytest.raises(UserError, match=r"a\.parquet:2: its messages is null"):
        read_rows(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match=r"b\.parquet is no Parquet file, or is damaged"):
        read_rows(tmp_path / "b.parquet")
