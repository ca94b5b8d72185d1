import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.evaluate.text import exact_match, normalize, overlap

SAME = [
    ("Heron", "the heron."),
    ("**Heron**", "Heron"),
    ("“Slow and sure”", "slow  and\nsure!"),
    ("The dog's lead", "dogs lead"),
    ("1,000 crowns", "1000 crowns"),
    ("12,345,678", "12345678"),
    ("5 %", "5%"),
    ("five-minute wait", "five minute wait"),
    ("06:40.", "06:40"),
    ("It costs 2.50.", "it costs 2.50"),
    ("−5 degrees", "-5 degrees"),
    ("STRASSE", "Straße"),
    ("Königin", "königin"),
    ("北の港。", "北の港"),
    ("cafe\u0301", "café"),
    ("नदी।", "नदी"),
    ("5\u00a0%", "5%"),
    ("12 m²", "12 m2"),
]
DIFFERENT = [
    ("18:05", "1805"),
    ("06:40", "0640"),
    ("2.5", "25"),
    ("2.5", "2 5"),
    ("-5", "5"),
    ("3-5", "35"),
    ("1,2", "12"),
    ("C#", "C"),
    ("5%", "5"),
    ("9 €", "9 $"),
    ("नदी", "नद"),
    ("pier A", "pier"),
    ("pier A", "pier B"),
    ("A", ""),
    ("the", ""),
    ("Heron", "Herons"),
    ("16 tonnes", "16"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_these_say_the_same(one, other):
    assert exact_match(one, other)
    assert exact_match(other, one)
    assert overlap(one, other) == 1


@pytest.mark.parametrize(("one", "other"), DIFFERENT)
def test_these_do_not_say_the_same(one, other):
    assert not exact_match(one, other)
    assert not exact_match(other, one)


def test_a_normalized_answer_reads_as_documented():
    assert normalize("The 06:40 boat, from pier A!") == "06:40 boat from pier a"
    assert normalize("an  hour (or 3-5 minutes)") == "hour or 3 5 minutes"


@given(st.text())
def test_any_text_says_what_it_says_and_keeps_no_spare_space(text):
    once = normalize(text)
    assert exact_match(text, text)
    assert exact_match(f" {text}\n", text)
    assert once == " ".join(once.split())


@pytest.mark.parametrize(
    ("answer", "truth", "f1"),
    [
        ("the Heron leaves at dawn", "Heron", 2 * (1 / 4) * 1 / (1 / 4 + 1)),
        ("Heron", "the Heron leaves at dawn", 0.4),
        ("red red boat", "red boat boat", 2 / 3),
        ("green", "red", 0),
        ("", "red", 0),
        ("!!!", "?", 0),
        ("?", "?", 1),
    ],
)
def test_overlap_is_squads_f1_of_words(answer, truth, f1):
    assert overlap(answer, truth) == pytest.approx(f1, abs=1e-12)


def test_a_truth_of_punctuation_alone_is_compared_as_it_is():
    assert exact_match(" ; ", ";")
    assert not exact_match(",", ";")
    assert not exact_match("", ";")
