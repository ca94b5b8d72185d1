"""What is never trained: the rows of held-out sections. And the check that no question of the evaluation was trained."""

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from burnish.data.attribute import Finder, plain
from burnish.data.rows import Row, listed
from burnish.data.sections import Section
from burnish.errors import UserError, did_you_mean


@dataclass(frozen=True)
class LeftOut:
    """A row that is neither trained nor evaluated, and why."""

    row: Row
    reason: str


class Split(NamedTuple):
    """Rows by what becomes of them."""

    train: list[Row]
    unseen_section: list[Row]
    questions: list[Row]
    """Those that may be asked as unseen wording."""
    left_out: list[LeftOut]


def split(
    rows: list[Row], sections: list[Section], held_out_sections: tuple[str, ...] | float, seed: int, questions: list[Row] | None = None
) -> Split:
    """Keeps every row of a held-out section out of training.

    Held out are the sections under any heading that has one of the names in it, or a share of the sections drawn by `seed`.
    A training row that has the question or the answer (of six words or more) of a held-out row is left out, with its reason.
    `questions` of held-out sections become rows of the unseen sections: nothing of them was trained, in any wording.
    Raises a `UserError` for a name that no heading has, and where nothing is left to train on.
    """
    finder = Finder(sections)
    chosen = held_out(sections, rows, held_out_sections, seed, finder)
    if not chosen.sections and not chosen.names:
        return Split(list(rows), [], list(questions or ()), [])
    train, unseen = _parted(rows, chosen, finder)
    seen, unseen_questions = _parted(questions or [], chosen, finder)
    unseen += unseen_questions
    kept, left_out = _without_shared(train, unseen, [sections[at] for at in sorted(chosen.sections)])
    if not kept:
        raise UserError("data.held_out_sections leaves no row to train on. Name fewer sections, or give a smaller share.")
    return Split(kept, unseen, seen, left_out)


def _parted(rows: list[Row], chosen: "Chosen", finder: Finder) -> tuple[list[Row], list[Row]]:
    """(rows of other sections, rows of the chosen ones)."""
    others: list[Row] = []
    held: list[Row] = []
    for row in rows:
        at = finder.find(row)
        is_held_out = at in chosen.sections or (at is None and row.section is not None and _has_name(row.section, chosen.names))
        (held if is_held_out else others).append(row)
    return others, held


# --- which sections


class Chosen(NamedTuple):
    sections: set[int]
    names: tuple[str, ...]


def held_out(sections: list[Section], rows: list[Row], asked: tuple[str, ...] | float, seed: int, finder: Finder) -> Chosen:
    """Numbers of the held-out sections. A drawn share is of the sections that rows speak of; at least one where it is above 0."""
    if isinstance(asked, tuple):
        return Chosen({at for name in asked for at in _named(name, sections, rows)}, asked)
    if asked == 0:
        return Chosen(set(), ())
    spoken_of = sorted({at for row in rows if (at := finder.find(row)) is not None})
    if len(spoken_of) < 2:
        raise UserError(f"data.held_out_sections = {asked}: a share needs rows from two sections or more; found {len(spoken_of)}.")
    draws = np.random.PCG64(np.random.SeedSequence([seed, 1])).random_raw(len(spoken_of))
    count = min(len(spoken_of) - 1, max(1, round(asked * len(spoken_of))))
    return Chosen({spoken_of[int(at)] for at in np.argsort(draws, kind="stable")[:count]}, ())


def _named(name: str, sections: list[Section], rows: list[Row]) -> list[int]:
    found = [at for at, section in enumerate(sections) if any(_has_name(heading, (name,)) for heading in section.path)]
    if not found and not any(row.section is not None and _has_name(row.section, (name,)) for row in rows):
        headings = {heading for section in sections for heading in section.path} | {row.section for row in rows if row.section}
        if not headings:
            raise UserError(f"data.held_out_sections: {name!r}, but neither documents nor rows name any section.")
        close = did_you_mean(name, sorted(headings))
        hint = close if len(headings) <= 40 or "Did you mean" in close else f" The documents have {len(headings)} headings."
        raise UserError(f"data.held_out_sections: no heading has {name!r} in it.{hint}")
    return found


def _has_name(heading: str, names: tuple[str, ...]) -> bool:
    """Whether whole words of a heading spell one of the names: `4` is in `4 Fares`, not in `4.2 Fares` or `14 Fares`."""
    words_of = f" {' '.join(_HEADING_WORD.findall(heading.casefold()))} "
    return any(f" {' '.join(_HEADING_WORD.findall(name.casefold()))} " in words_of for name in names if name.strip())


_HEADING_WORD = re.compile(r"\d+(?:\.\d+)*|\w+")


# --- no text shared

LEAST_WORDS = 6  # a shorter answer ("Heron", "5 kg") is shared by chance


def _without_shared(train: list[Row], unseen: list[Row], sections: list[Section]) -> tuple[list[Row], list[LeftOut]]:
    questions = {plain(row.question): row for row in unseen}
    answers = {text: row for row in unseen if len((text := plain(row.answer)).split()) >= LEAST_WORDS}
    texts = [plain(section.text) for section in sections]
    kept: list[Row] = []
    left_out: list[LeftOut] = []
    for row in train:
        reason = _shared(row, questions, answers, texts)
        if reason:
            left_out.append(LeftOut(row, reason))
        else:
            kept.append(row)
    return kept, left_out


def _shared(row: Row, questions: dict[str, Row], answers: dict[str, Row], texts: list[str]) -> str | None:
    question, answer = plain(row.question), plain(row.answer)
    if question in questions:
        return f"asks what the held-out row {questions[question].place} asks"
    if answer in answers:
        return f"has the answer of the held-out row {answers[answer].place}"
    if len(answer.split()) >= 2 * LEAST_WORDS and any(answer in text for text in texts):
        return "its answer stands word for word in a held-out section"
    return None


# --- unseen wording


def check_unseen_wording(train_rows: list[Row], questions: list[Row]) -> None:
    """Raises a `UserError` that lists every question which a training row asks too (case, punctuation and spaces aside)."""
    trained = {plain(row.question): row for row in reversed(train_rows)}
    same = [f"{row.place} and {trained[key].place}: {row.question[:80]}" for row in questions if (key := plain(row.question)) in trained]
    if same:
        are = "s are" if len(same) > 1 else " is"
        head = f"data.questions: {len(same)} question{are} trained in the same words; unseen wording needs others."
        raise UserError(listed(head, same))
