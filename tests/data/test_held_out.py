import numpy as np
import pytest

from burnish.data.attribute import Finder
from burnish.data.held_out import LEFT_OUT, TRAIN, UNSEEN_SECTION, Copies, check_unseen_wording, divide
from burnish.data.rows import Row
from burnish.data.scan import scan
from burnish.data.sections import Section
from burnish.errors import UserError

HERON = "The Heron is the flagship of the fleet and was launched in the spring of 1988."
DOGS = "Dogs pay one mark for each crossing and must be kept on a short lead."
RAIN = "In heavy rain the masters keep a lookout at the bow and sound the horn often."
SECTIONS = [
    Section("m.pdf", 4, 4, ("4 The fleet", "4.2 Vessels"), HERON),
    Section("m.pdf", 5, 5, ("4 The fleet", "4.3 Colors"), "Cream above the waterline, black below it."),
    Section("m.pdf", 6, 6, ("6 Fares", "6.4 Dogs"), DOGS),
    Section("m.pdf", 7, 9, ("14.2 Rain",), RAIN + "\nFog.\nHail and thunder.", (len(RAIN) + 1, len(RAIN) + 6)),
]


def row(question, answer, line=1, **more):
    return Row(question, answer, "rows.jsonl", line, **more)


def split(rows, sections, held_out_sections, seed, questions=()):
    """(trained, of unseen sections, questions of unseen wording, left out with the reason), as the stage parts them."""
    finder = Finder(sections)
    parted = divide(scan(rows, finder), scan(questions, finder), scan([], finder), sections, held_out_sections, 0.0, seed)
    copies = Copies(sections[at] for at in parted.sections)
    of = {kind: [entry for entry, found in zip(rows, parted.rows, strict=True) if found == kind] for kind in (TRAIN, UNSEEN_SECTION)}
    asked = {kind: [entry for entry, found in zip(questions, parted.questions, strict=True) if found == kind] for kind in of}
    gone = [(entry, parted.reason(at)) for at, entry in enumerate(rows) if parted.rows[at] == LEFT_OUT]
    gone += [(entry, reason) for entry in of[TRAIN] if (reason := copies.reason(entry))]
    kept = [entry for entry in of[TRAIN] if not copies.reason(entry)]
    return kept, of[UNSEEN_SECTION] + asked[UNSEEN_SECTION], asked[TRAIN], gone


VESSEL = row("Which vessel leads?", "Heron", 1, section="4.2 Vessels")
DOG = row("What do dogs pay?", "Dogs pay one mark for each crossing.", 2)
WET = row("What in rain?", "Keep a lookout at the bow.", 3, page=7)
OTHER = row("What is love?", "Unknown to this manual altogether, whoever asks.", 4)
ROWS = [VESSEL, DOG, WET, OTHER]


@pytest.mark.parametrize(
    ("names", "held"),
    [
        (("4",), [VESSEL]),
        (("the fleet",), [VESSEL]),
        (("4.2 Vessels",), [VESSEL]),
        (("Dogs", "rain"), [DOG, WET]),
        (("14.2",), [WET]),
        (("4.3",), []),
    ],
)
def test_rows_of_a_named_section_and_of_those_beneath_it_are_held_out(names, held):
    train, unseen, _, left_out = split(ROWS, SECTIONS, names, 0)
    assert unseen == held
    assert train == [entry for entry in ROWS if entry not in held]
    assert left_out == []


def test_a_row_is_found_by_its_section_else_by_page_and_words_else_by_words_alone():
    finder = Finder(SECTIONS)
    assert [finder.find(entry) for entry in ROWS] == [0, 2, 3, None]
    assert finder.find(row("Q", "Dogs pay one mark", section="4.3 Colors")) == 1
    assert finder.page(row("Q", "Hail"), 3) == 9
    assert finder.page(row("Q", "the horn"), 3) == 7


def test_a_training_row_that_shares_text_with_a_held_out_one_is_left_out():
    same_question = row("what do DOGS pay", "Ask at the pier.", 8, section="4.3 Colors")
    same_answer = row("Crossing?", "dogs pay one mark for each crossing", 9, section="4.3 Colors")
    copied = row("Copy?", f"{DOGS}", 10, section="4.3 Colors")
    train, unseen, _, left_out = split([*ROWS, same_question, same_answer, copied], SECTIONS, ("6.4",), 0)
    assert unseen == [DOG]
    assert train == [VESSEL, WET, OTHER]
    assert [(gone.line, reason) for gone, reason in left_out] == [
        (8, "asks what the held-out row rows.jsonl:2 asks"),
        (9, "has the answer of the held-out row rows.jsonl:2"),
        (10, "its answer stands word for word in a held-out section"),
    ]


def test_a_share_is_drawn_by_the_seed_and_leaves_something_to_train():
    draws = {seed: split(ROWS, SECTIONS, 0.4, seed)[1] for seed in range(12)}
    assert draws[3] == split(ROWS, SECTIONS, 0.4, 3)[1]
    assert {len(held) for held in draws.values()} == {1}
    assert len({held[0].line for held in draws.values()}) > 1
    assert len(split(ROWS, SECTIONS, 0.99, 0)[1]) == 2
    assert split(ROWS, SECTIONS, 0.0, 0)[1] == []


def test_questions_of_a_held_out_section_are_not_unseen_wording():
    _, unseen, questions, _ = split(ROWS, SECTIONS, ("4",), 0, [VESSEL, DOG])
    assert (unseen, questions) == ([VESSEL, VESSEL], [DOG])


def test_sections_that_only_rows_name_can_be_held_out():
    assert split(ROWS, [], ("vessels",), 0)[1] == [VESSEL]


def test_a_name_that_no_heading_has_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"no heading has '6\.4 Dgos' in it\. Did you mean 6\.4 Dogs\?"):
        split(ROWS, SECTIONS, ("6.4 Dgos",), 0)
    with pytest.raises(UserError, match="neither documents nor rows name any section"):
        split([OTHER], [], ("4",), 0)


def test_holding_out_everything_is_refused():
    with pytest.raises(UserError, match="leaves no row to train on"):
        split([VESSEL], SECTIONS, ("4",), 0)
    with pytest.raises(UserError, match="a share needs rows from two sections or more; found 1"):
        split([VESSEL], SECTIONS, 0.5, 0)


def test_a_question_that_was_trained_is_refused_with_both_places():
    asked = [Row("which   Vessel: leads", "Heron", "questions.jsonl", 7), Row("Which vessel is first?", "Heron", "questions.jsonl", 8)]
    known, trained = scan(ROWS, Finder([])), np.ones(len(ROWS), bool)
    with pytest.raises(
        UserError, match=r"1 question is trained in the same words.*\n  questions\.jsonl:7 and rows\.jsonl:1: which"
    ) as caught:
        check_unseen_wording(known, trained, asked)
    assert "questions.jsonl:8" not in str(caught.value)
    check_unseen_wording(known, trained, asked[1:])
    check_unseen_wording(known, ~trained, asked)
