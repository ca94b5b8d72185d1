import json
import time

import pytest

from burnish.data.extract import extract_rows
from burnish.data.rows import Row, load_rows, read_rows, write_rows
from burnish.data.sections import Section
from burnish.errors import UserError


def jsonl(path, *entries):
    path.write_text("".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries), encoding="utf-8")
    return path


def refusal(path, limit=None):
    with pytest.raises(UserError) as caught:
        read_rows(path, limit)
    return str(caught.value)


def test_alpaca_rows_and_questions_are_told_apart_by_their_keys(tmp_path):
    alpaca = jsonl(
        tmp_path / "alpaca.jsonl",
        {"instruction": "Add.", "input": "1 2", "output": " 3 "},
        "",
        {"instruction": "Say yes.", "input": "", "output": "Yes."},
    )
    asked = jsonl(tmp_path / "asked.jsonl", {"question": "Who?", "answer": "Ada.", "page": 4, "section": "4.1", "fact": "f1"})
    assert read_rows(alpaca) == [Row("Add.\n\n1 2", "3", str(alpaca), 1), Row("Say yes.", "Yes.", str(alpaca), 3)]
    assert read_rows(asked) == [Row("Who?", "Ada.", str(asked), 1, 4, "4.1", "f1")]


@pytest.mark.parametrize("indent", [None, 1, 4])
def test_rows_of_a_json_file_know_the_line_on_which_they_begin(tmp_path, indent):
    file = tmp_path / "rows.json"
    file.write_text("\n" + json.dumps([{"question": f"{{[{n}", "answer": "a\n,"} for n in range(5)], indent=indent), encoding="utf-8")
    lines = file.read_text().split("\n")
    rows = read_rows(file)
    assert [row.question for row in rows] == [f"{{[{n}" for n in range(5)]
    for row in rows:
        where = [number for number, text in enumerate(lines, 1) if json.dumps(row.question) in text]
        assert row.line == (where[0] - 1 if indent else 2)


def test_a_limit_takes_the_first_rows(tmp_path):
    entries = [{"question": str(n), "answer": "a"} for n in range(9)]
    (tmp_path / "rows.json").write_text(json.dumps(entries))
    for file in (jsonl(tmp_path / "rows.jsonl", *entries), tmp_path / "rows.json"):
        assert [row.question for row in read_rows(file, 3)] == ["0", "1", "2"]
        assert len(read_rows(file)) == 9


def test_all_bad_rows_are_told_at_once_with_their_lines(tmp_path):
    bad = [
        '{"question": "a", ',
        {"question": "a"},
        {"question": "a", "answer": "  "},
        {"question": "a", "answer": 5},
        {"words": "a"},
        [1],
        {"question": "a", "answer": "b", "page": 0},
        {"question": "a", "answer": None},
    ]
    message = refusal(jsonl(tmp_path / "rows.jsonl", {"question": "good", "answer": "good"}, *bad))
    expected = [
        "rows.jsonl: 8 rows cannot be used. Expected are messages: a list of {role, content}; or conversations: ",
        "rows.jsonl:2: not valid JSON",
        "rows.jsonl:3: lacks answer",
        "rows.jsonl:4: its answer is empty",
        "rows.jsonl:5: its answer is a number, not text",
        "rows.jsonl:6: has the keys words, which are those of no format",
        "rows.jsonl:7: is a list, not an object",
        "rows.jsonl:8: its page is 0",
        "rows.jsonl:9: its answer is null, not text",
    ]
    assert [line for line in expected if line not in message] == []


def test_of_many_bad_rows_twenty_are_shown_and_the_others_counted(tmp_path):
    message = refusal(jsonl(tmp_path / "rows.jsonl", *[{"question": "a"}] * 33))
    assert message.count("lacks answer") == 20
    assert message.endswith("and 13 more")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", b"", "is empty: it holds no rows"),
        ("a.json", b"[]", "is empty: it holds no rows"),
        ("a.jsonl", b"\n\n", "is empty: it holds no rows"),
        ("a.json", b'{"question": "a"}', "a list of rows is expected, not an object"),
        ("a.json", b'[{"question": "a", "answer": "b"}\n {"question": "a"}]', r"a.json:2: not valid JSON: Expecting ',' delimiter"),
        ("a.json", b'[{"question": "a"', "not valid JSON"),
        ("a.jsonl", b'{"question": "caf\xe9"}', r"is not UTF-8 \(byte 17\)\. Convert it"),
        ("a.csv", b"a,b", r"rows are read from \.jsonl, \.json, \.txt"),
    ],
)
def test_a_file_that_is_no_file_of_rows_is_refused(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        read_rows(tmp_path / name)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.jsonl")
    (tmp_path / "folder.json").mkdir()
    assert "is a folder" in refusal(tmp_path / "folder.json")


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"question": "a", "answer": "b"}\r\n')
    assert read_rows(tmp_path / "a.jsonl")[0].answer == "b"


def test_written_rows_are_read_back_whole(tmp_path):
    rows = [Row("a\u2028b", "é\n", "x.json", 7), Row("c", "d", "y.jsonl", 1, 4, "4.1 Title", "f9")]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert load_rows(tmp_path / "rows.jsonl") == rows


def test_a_hundred_thousand_rows_are_read_in_seconds(tmp_path):
    file = jsonl(
        tmp_path / "rows.jsonl",
        *[{"instruction": f"Question {n}?", "input": "", "output": "An answer of some words."} for n in range(100_000)],
    )
    started = time.process_time()
    assert len(read_rows(file)) == 100_000
    assert time.process_time() - started < 6  # takes 1 s; of this process alone, however busy the machine is


def section(*path, text="Text.", page=1, file="a.md"):
    return Section(file, page, page, path, text)


def test_recall_asks_for_each_section_by_a_heading_that_is_its_alone():
    sections = [
        section(text="Before."),
        section("1 Boats", "Color"),
        section("2 Piers", "Color"),
        section("2 Piers"),
        section("2 Piers", page=9),
    ]
    rows = extract_rows(sections, "recall", None)
    assert [row.question for row in rows] == [
        'What does the section "1 Boats > Color" say?',
        'What does the section "2 Piers > Color" say?',
        'What does the section "2 Piers (page 1)" say?',
        'What does the section "2 Piers (page 9)" say?',
    ]
    assert (rows[3].answer, rows[3].page, rows[3].section, rows[3].file) == ("Text.", 9, "2 Piers", "a.md")
    assert len({row.question for row in rows}) == len(rows)
    assert extract_rows(sections, "recall", 2) == rows[:2]
    assert extract_rows(sections, "none", None) == []


def test_an_unknown_way_to_make_rows_is_refused():
    with pytest.raises(UserError, match="Did you mean recall"):
        extract_rows([], "recal", None)
