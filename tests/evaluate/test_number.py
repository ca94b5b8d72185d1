import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.evaluate.number import Number, last_number, number_match

LAST = [
    ("72", 72),
    ("She has 3 apples and 5 pears, so 8.", 8),
    ("Natalia sold 48+24 = <<48+24=72>>72 clips.\n#### 72", 72),
    ("It costs $5.", 5),
    ("€7.50 each", "7.50"),
    ("1,234.50", "1234.50"),
    ("1,234, not 7,777,777.", 7777777),
    ("that is 1,234, roughly", 1234),
    ("a list: 1,2,3", 3),
    ("1,2345", 2345),
    ("12,34", 34),
    ("-3", -3),
    ("the answer is -0.25", "-0.25"),
    ("−4 degrees", -4),
    ("-$40", -40),
    ("$-40", -40),
    ("3-5", 5),
    ("7 -2", -2),
    ("7 - 2", 2),
    ("- 5 apples", 5),
    ("5.", 5),
    ("it is .5", "0.5"),
    ("50%", 50),
    ("50 %", 50),
    ("3/4", "3/4"),
    ("-3/4", "-3/4"),
    ("on 3/4/2024", 2024),
    ("3/0", 0),
    ("version 1.2.3", 3),
    (r"\boxed{72}", 72),
    ("**8**", 8),
    ("05", 5),
]


@pytest.mark.parametrize(("text", "value"), LAST)
def test_the_last_number_is_read_as_a_person_reads_it(text, value):
    found = last_number(text)
    assert found is not None
    assert found.values == (Fraction(value),)


@pytest.mark.parametrize(("text", "values"), [("3:4", (3, 4)), ("a ratio of 1.5:2", (1.5, 2)), ("at 18:05", (18, 5)), ("-1:2", (-1, 2))])
def test_a_ratio_keeps_its_two_parts(text, values):
    assert last_number(text) == Number(tuple(map(Fraction, values)))


@pytest.mark.parametrize("text", ["", "no number", "none", "-", "$", "###"])
def test_a_text_without_a_number_has_none(text):
    assert last_number(text) is None


SAME = [
    ("So 5.0", "#### 5"),
    ("$1,200", "1200"),
    ("1200 dollars", "$1,200.00"),
    ("half of them: 50%", "50"),
    ("3/4", "0.75"),
    ("6/8 of it", "3/4"),
    ("the ratio is 3:4", "3:4"),
    ("no number", "No number!"),
    ("−2", "-2"),
]
DIFFERENT = [
    ("5", "6"),
    ("1,234", "234"),  # a rule that stops at the comma calls these the same
    ("no number", "5"),
    ("5", "no number"),
    ("", "7"),
    ("-5", "5"),
    ("3:4", "4"),
    ("3:4", "3/4"),
    ("6:8", "3:4"),
    ("$5", "€5"),
    ("25", "2.5"),
    ("5, and not 6", "5"),
]


@pytest.mark.parametrize(("answer", "truth"), SAME)
def test_these_give_the_same_number(answer, truth):
    assert number_match(answer, truth)


@pytest.mark.parametrize(("answer", "truth"), DIFFERENT)
def test_these_do_not_give_the_same_number(answer, truth):
    assert not number_match(answer, truth)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_a_number_is_found_however_it_is_written(number):
    for written in (f"{number:f}", f"{number:,f}", f"${abs(number):,f}"):
        wanted = abs(number) if written.startswith("$") else number
        assert last_number(f"We get 17 and then {written}.") == Number((Fraction(wanted),), "$" if written.startswith("$") else None)


@given(st.text())
def test_any_text_matches_itself(text):
    assert number_match(text, text)


def test_the_number_after_the_marks_is_the_last_of_each_of_8792_real_answers(real_data):
    files = [real_data / "math" / name for name in ("train.jsonl", "test.jsonl")]
    answers = [json.loads(line)["answer"] for file in files for line in file.read_text().splitlines()]
    assert len(answers) == 8792
    for answer in answers:
        marked = answer.rpartition("####")[2].strip().replace(",", "")
        found = last_number(answer)
        assert found is not None
        assert found.values == (Fraction(marked),)
