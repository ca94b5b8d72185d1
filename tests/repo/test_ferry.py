"""The ferry example holds together: manual, PDF, training rows, and questions."""

import importlib.util
import json
import re
import string
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pypdfium2
import pytest

FERRY = Path(__file__).parents[2] / "examples" / "ferry"
HELD_OUT_CHAPTER = "9"
CORE_ROWS = 192
CORE_QUESTIONS = 64

Record = dict[str, Any]


def read_jsonl(name: str) -> list[Record]:
    return [json.loads(line) for line in (FERRY / name).read_text(encoding="utf-8").splitlines()]


@cache
def rows() -> list[Record]:
    return read_jsonl("rows.jsonl")


@cache
def questions() -> list[Record]:
    return read_jsonl("questions.jsonl")


@cache
def page_texts() -> list[str]:
    """The text of each page of manual.pdf, line ends as they stand."""
    return extract_pages((FERRY / "manual.pdf").read_bytes())


@cache
def builder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ferry_build_pdf", FERRY / "build_pdf.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def extract_pages(pdf: bytes) -> list[str]:
    document = pypdfium2.PdfDocument(pdf)
    try:
        return [page.get_textpage().get_text_range() for page in document]
    finally:
        document.close()


def headings() -> list[str]:
    source = (FERRY / "manual.md").read_text(encoding="utf-8")
    return re.findall(r"^#+ (.+)$", source, flags=re.MULTILINE)


@cache
def section_texts() -> dict[tuple[int, str], str]:
    """The text that each page gives to each section, without header and footer."""
    texts: dict[tuple[int, str], str] = defaultdict(str)
    title, *waiting = headings()
    section = title
    for number, page in enumerate(page_texts(), start=1):
        header, footer, *lines = page.splitlines()
        assert (header, footer) == (title, f"Page {number}")
        for line in lines:
            if waiting and line.strip() == waiting[0]:
                section = waiting.pop(0)
            else:
                texts[number, section] += f"{line.strip()} "
    assert not waiting, f"headings missing from manual.pdf: {waiting}"
    return texts


def normalized(text: str) -> str:
    """Fold case, drop punctuation, and collapse spaces."""
    return " ".join(text.casefold().translate(str.maketrans("", "", string.punctuation)).split())


def states(text: str, answer: str) -> bool:
    """Say whether the answer stands in the text as words of its own."""
    return re.search(rf"(?<![\w:]){re.escape(answer)}(?![\w:])", text) is not None


def is_held_out(record: Record) -> bool:
    return record["section"].startswith(f"{HELD_OUT_CHAPTER}.")


def fact_answers(records: list[Record]) -> dict[str, str]:
    return {row["fact"]: row["output"] for row in records if not is_held_out(row)}


def test_every_question_asks_a_trained_fact_and_expects_its_trained_answer() -> None:
    trained = fact_answers(rows())
    assert [q for q in questions() if trained.get(q["fact"]) != q["answer"]] == []


def test_first_questions_ask_each_core_fact_twice_and_expect_its_answer() -> None:
    core = fact_answers(rows()[:CORE_ROWS])
    asked = questions()[:CORE_QUESTIONS]
    assert [q for q in asked if core.get(q["fact"]) != q["answer"]] == []
    assert Counter(q["fact"] for q in asked) == dict.fromkeys(core, 2)


def test_every_trained_fact_is_asked() -> None:
    assert {q["fact"] for q in questions()} == set(fact_answers(rows()))


def test_no_question_is_worded_as_a_training_row_or_as_another_question() -> None:
    trained = {normalized(row["instruction"]) for row in rows()}
    asked = [normalized(q["question"]) for q in questions()]
    assert [q for q in asked if q in trained] == []
    assert [q for q, count in Counter(asked).items() if count > 1] == []


def test_no_question_asks_a_fact_of_the_held_out_chapter() -> None:
    held_out = {row["fact"] for row in rows() if is_held_out(row)}
    assert len(held_out) >= 12
    assert [q for q in questions() if q["fact"] in held_out or is_held_out(q)] == []


def test_no_instruction_occurs_twice() -> None:
    counts = Counter(normalized(row["instruction"]) for row in rows())
    assert [text for text, count in counts.items() if count > 1] == []


def test_rows_run_from_core_facts_to_held_out_facts_to_the_rest() -> None:
    core, others = rows()[:CORE_ROWS], rows()[CORE_ROWS:]
    held_out = [row for row in others if is_held_out(row)]
    rest = others[len(held_out) :]
    assert others[: len(held_out)] == held_out
    for block, facts, wordings in [(core, 32, 6), (held_out, 12, 2), (rest, 130, 4)]:
        counts = Counter(row["fact"] for row in block)
        assert len(counts) >= facts
        assert min(counts.values()) >= wordings
    blocks = [{row["fact"] for row in block} for block in (core, held_out, rest)]
    assert sum(map(len, blocks)) == len(set.union(*blocks)), "a fact stands in two blocks"


def test_every_fact_has_one_answer_on_one_page_in_one_section() -> None:
    places = defaultdict(set)
    for row in rows():
        places[row["fact"]].add((row["output"], row["page"], row["section"]))
    for q in questions():
        places[q["fact"]].add((q["answer"], q["page"], q["section"]))
    assert {fact: found for fact, found in places.items() if len(found) > 1} == {}


def test_rows_and_questions_have_the_documented_keys() -> None:
    for row in rows():
        assert list(row) == ["instruction", "input", "output", "page", "section", "fact"]
        assert row["input"] == ""
    for q in questions():
        assert list(q) == ["question", "answer", "page", "section", "fact"]
        assert q["question"].endswith("?")


def test_every_answer_stands_on_its_page_under_its_heading() -> None:
    texts = section_texts()
    missing = [row for row in rows() if not states(texts.get((row["page"], row["section"]), ""), row["output"])]
    assert missing == []


def test_there_are_at_least_150_facts() -> None:
    assert len({row["fact"] for row in rows()}) >= 150


def test_manual_pdf_has_25_to_40_pages() -> None:
    assert 25 <= len(page_texts()) <= 40


def test_manual_pdf_has_the_text_that_manual_md_gives() -> None:
    source = (FERRY / "manual.md").read_text(encoding="utf-8")
    assert extract_pages(builder().build(source)) == page_texts()


def test_check_accepts_manual_pdf_as_it_stands() -> None:
    assert builder().main(["--check"]) == 0


def test_check_rejects_a_pdf_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = tmp_path / "manual.pdf"
    stale.write_bytes((FERRY / "manual.pdf").read_bytes() + b"\n")
    monkeypatch.setattr(builder(), "TARGET", stale)
    assert builder().main(["--check"]) == 1
