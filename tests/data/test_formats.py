"""What each format means, how it is told, and what of it is refused."""

import json

import pytest

from burnish.data.formats import FORMATS
from burnish.data.rows import iter_rows, read_rows
from burnish.errors import UserError

SAID = [("user", "Hi"), ("assistant", "Hello."), ("user", "Do dogs pay?"), ("assistant", "One mark.")]
ENTRIES = {
    "messages": {"messages": [{"role": role, "content": text} for role, text in [("system", "Be brief."), *SAID]]},
    "sharegpt": {"conversations": [{"from": {"user": "human", "assistant": "gpt"}[role], "value": text} for role, text in SAID]},
    "alpaca": {"instruction": "Do dogs pay?", "input": "On Sundays.", "output": "One mark.", "text": "all of it"},
    "question": {"question": "Do dogs pay?", "answer": "One mark."},
    "faq": {"questions": [{"question": "Do dogs pay?", "answer": "One mark."}, {"question": "And cats?", "answer": "No."}]},
    "prompt": {"prompt": "Dogs pay", "completion": "one mark."},
    "text": {"text": "Dogs pay one mark.\r\n"},
}
EXPECTED = {
    "messages": ("Be brief.", (("Hi", "Hello."), ("Do dogs pay?", "One mark."))),
    "sharegpt": (None, (("Hi", "Hello."), ("Do dogs pay?", "One mark."))),
    "alpaca": (None, (("Do dogs pay?\n\nOn Sundays.", "One mark."),)),
    "question": (None, (("Do dogs pay?", "One mark."),)),
    "faq": (None, (("Do dogs pay?", "One mark."),)),
    "prompt": (None, (("Dogs pay", "one mark."),)),
    "text": (None, (("", "Dogs pay one mark.\n"),)),
}


def stored(path, entry):
    path.write_text(json.dumps(entry if "questions" in entry else [entry]), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("form", ["auto", "fixed"])
def test_a_format_is_told_by_its_keys_and_gives_system_and_turns(name, form, tmp_path):
    file, found = stored(tmp_path / "rows.json", ENTRIES[name]), {}
    rows = list(iter_rows(file, None, name if form == "fixed" else "auto", found))
    assert found == {str(file): name}
    assert (rows[0].system, rows[0].turns) == EXPECTED[name]
    assert rows[0].is_text == (name == "text")
    assert (rows[0].question, rows[0].answer) == rows[0].turns[-1]


def refusal(path, entries, form="auto"):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_rows(path, None, form)
    return str(caught.value)


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"faq"}))
def test_a_row_of_another_format_is_refused_by_its_line(name, tmp_path):
    other = "prompt" if name == "text" else "text"
    message = refusal(tmp_path / "rows.jsonl", [ENTRIES[name], ENTRIES[name], ENTRIES[other]])
    assert f"rows.jsonl:3: has the format '{other}', but line 1 has the format '{name}'. Put rows of each format into a file" in message
    assert "1 row cannot be used" in message


@pytest.mark.parametrize("name", sorted(FORMATS.keys() - {"faq"}))
def test_a_fixed_format_says_which_keys_a_row_lacks(name, tmp_path):
    message = refusal(tmp_path / "rows.jsonl", [ENTRIES[name], {"other": "words"}], name)
    assert f"rows.jsonl:2: lacks {', '.join(sorted(FORMATS[name].needs))} (the format '{name}' is {FORMATS[name].example})" in message


def test_a_fixed_format_chooses_among_the_keys_of_a_row(tmp_path):
    file = stored(tmp_path / "rows.json", ENTRIES["alpaca"])
    assert read_rows(file, None, "text")[0].answer == "all of it"


def test_a_misspelled_format_and_one_that_a_file_cannot_have_are_refused(tmp_path):
    assert "no such format. Did you mean sharegpt?" in refusal(tmp_path / "rows.jsonl", [], "sharegtp")
    assert "data.format = 'faq' expects {\"questions\": " in refusal(tmp_path / "rows.jsonl", [ENTRIES["question"]], "faq")
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(UserError, match=r"a\.txt:1: has the format 'text', but data\.format is 'alpaca'"):
        read_rows(tmp_path / "a.txt", None, "alpaca")


def chat(*roles, **more):
    return {"messages": [{"role": role, "content": f"{role} {at}"} | more for at, role in enumerate(roles, 1)]}


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (chat("assistant", "user", "assistant"), "begins with the assistant. Remove that turn"),
        (chat("system", "assistant"), "begins with the assistant"),
        (chat("user", "user", "assistant"), "has two user turns in a row (messages 1 and 2)"),
        (chat("system", "user", "assistant", "assistant"), "has two assistant turns in a row (messages 3 and 4)"),
        (chat("user", "assistant", "user"), "ends with a user turn that nobody answers"),
        (chat("user"), "has no assistant turn: nothing of it would be trained"),
        (chat("system"), "has a system message alone"),
        (chat(), "has no messages"),
        (chat("user", "system", "assistant"), "message 2 is a system message; only the first may be one"),
        (chat("user", "narrator"), "message 2 has the role 'narrator'; known: system, user, assistant"),
        (chat("user", "tool", "assistant"), "message 2 uses a tool; conversations with tools cannot be trained. Leave such rows out"),
        (chat("user", "assistant", tool_calls=[{"id": 1}]), "message 1 uses a tool"),
        (chat("user", "assistant", weight=0), "message 1 has a weight of 0"),
        (chat("user", "assistant", content=" \n"), "message 1 (user)'s content is empty"),
        (chat("user", "assistant", content=None), "message 1 (user)'s content is null, not text"),
        (chat("user", "assistant", role=None), "message 1 has the role None"),
        (chat("user", "assistant", role=["user"]), "message 1 has the role ['user']"),
        ({"messages": None}, "its messages is null, not a list"),
        ({"messages": [None]}, "message 1 is null, not an object"),
        ({"messages": [{"role": "user"}]}, "message 1 lacks content"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "b"}]}, "message 2 uses a tool"),
        ({"conversations": [{"role": "user", "content": "a"}]}, "message 1 lacks from, value"),
        ({"question": None, "answer": "b"}, "its question is null, not text"),
        ({"prompt": "a", "completion": ["b"]}, "its completion is a list, not text"),
        ({"text": None}, "its text is null, not text"),
        ({"text": " \n"}, "its text is empty"),
        ({"instruction": "a", "input": 1, "output": "b"}, "its input is a number, not text"),
        ({"question": "a", "answer": "\ud83d"}, "its answer has \\ud83d alone, half of a letter"),
        ({"question": "a" * ((4 << 20) + 1), "answer": "b"}, "its question has 4,194,305 characters, more than any context holds"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_a_row_that_cannot_be_trained_is_refused_with_the_reason(entry, reason, tmp_path):
    assert f"rows.jsonl:1: {reason}" in refusal(tmp_path / "rows.jsonl", [entry])


def test_answers_hold_no_carriage_return(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"question": "a\\r\\nb", "answer": "c\\r\\nd\\re"}\r\n')
    (row,) = read_rows(file)
    assert (row.question, row.answer) == ("a\nb", "c\nd\ne")
