"""What is never trained: the rows of held-out sections, those for validation, and whatever shares text with them."""

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from burnish.data.attribute import plain, words
from burnish.data.draws import shuffled
from burnish.data.rows import SHOWN, Row, listed
from burnish.data.scan import LEAST_WORDS, NONE, Scan, Texts, asked_keys
from burnish.data.sections import Section
from burnish.errors import UserError, did_you_mean
from burnish.words import counted

TRAIN, UNSEEN_SECTION, VALIDATION, LEFT_OUT = range(4)
"""What becomes of a row. A question that is not of a held-out section is TRAIN too: it asks what is trained."""

SET_APART = "set"
"""The kind of rows that a named set itself keeps from training."""


class Clash(NamedTuple):
    """For rows that share text with one that is kept apart: which (a place in `others`) and what. NONE elsewhere."""

    other: np.ndarray
    """int32 [rows]."""
    asked: np.ndarray
    """bool [rows]: it is the question that they share; else the answer."""


class Division(NamedTuple):
    """What becomes of every row."""

    rows: np.ndarray
    """uint8 [rows]."""
    questions: np.ndarray
    """uint8 [questions]: TRAIN or UNSEEN_SECTION."""
    clash: Clash
    replay: Clash
    """Of the rows to replay."""
    places: list[str]
    """Of the rows that are kept apart, as `clash.other` counts them."""
    kinds: list[str]
    """`held-out`, `validation` or SET_APART, for each of them."""
    sections: tuple[int, ...]
    """The held-out sections."""

    def reason(self, row: int) -> str:
        """Why a row is left out."""
        return self._reason(self.clash, row)

    def replay_reason(self, row: int) -> str | None:
        """Why a row to replay is left out; None where it is trained."""
        return None if self.replay.other[row] == NONE else self._reason(self.replay, row)

    def _reason(self, clash: Clash, row: int) -> str:
        other = int(clash.other[row])
        kind, place = self.kinds[other], self.places[other]
        what = f"row {place}, that a data set keeps apart," if kind == SET_APART else f"{kind} row {place}"
        return f"asks what the {what} asks" if clash.asked[row] else f"has the answer of the {what}"


def divide(
    rows: Scan,
    questions: Scan,
    validation: Scan,
    sections: list[Section],
    held_out_sections: tuple[str, ...] | float,
    validation_share: float,
    seed: int,
    of_sets: Scan | None = None,
    to_replay: Scan | None = None,
) -> Division:
    """Keeps every row of a held-out section out of training, and a share of the others for validation.

    Held out are the sections under any heading that has one of the names in it, or a share of the sections drawn by `seed`.
    A training row that has a question or an answer (of six words or more) of a held-out row, or of one in the `validation` files, is left
    out; so is one that asks what a row `of_sets` asks, which a named set keeps apart. Rows `to_replay` are held to the same, and against
    the rows that were drawn for validation too. `questions` of held-out sections become rows of the unseen sections: nothing of them was
    trained, in any wording.
    Raises a `UserError` for a name that no heading has, and where nothing is left to train on.
    """
    chosen = held_out(sections, rows, held_out_sections, seed)
    of_rows, of_questions = (np.where(_in(chosen, scan), UNSEEN_SECTION, TRAIN).astype(np.uint8) for scan in (rows, questions))
    apart = [(rows, of_rows == UNSEEN_SECTION), (questions, of_questions == UNSEEN_SECTION), (validation, np.ones(len(validation), bool))]
    kinds = ["held-out", "held-out", "validation"]
    if of_sets is not None:
        # By their questions alone, as the set itself parts them: many of them have the same query for an answer.
        apart.append((replace(of_sets, said=of_sets.said.of(np.zeros(len(of_sets), bool))), np.ones(len(of_sets), bool)))
        kinds.append(SET_APART)
    clash = _clash(rows, apart)
    of_rows[(of_rows == TRAIN) & (clash.other != NONE)] = LEFT_OUT
    if validation_share:
        of_rows[_drawn(rows, of_rows == TRAIN, validation_share, seed)] = VALIDATION
    if len(rows) and not (of_rows == TRAIN).any():
        if not (of_rows == UNSEEN_SECTION).any():
            what = "data.validation" if len(validation) else "What a data set keeps apart"
            raise UserError(f"{what} leaves no row to train on: each shares a question or an answer with one of its rows.")
        raise UserError("data.held_out_sections leaves no row to train on. Name fewer sections, or give a smaller share.")
    apart.append((rows, of_rows == VALIDATION))
    kinds.append("validation")
    of_replay = _clash(to_replay, apart) if to_replay is not None else Clash(clash.other[:0], clash.asked[:0])
    members = [(scan, number, kind) for (scan, mask), kind in zip(apart, kinds, strict=True) for number in np.flatnonzero(mask).tolist()]
    places = [scan.place(number) for scan, number, _ in members]
    return Division(of_rows, of_questions, clash, of_replay, places, [kind for _, _, kind in members], tuple(sorted(chosen.sections)))


# --- which sections


class Chosen(NamedTuple):
    sections: set[int]
    names: tuple[str, ...]


def held_out(sections: list[Section], rows: Scan, asked: tuple[str, ...] | float, seed: int) -> Chosen:
    """Numbers of the held-out sections. A drawn share is of the sections that rows speak of; at least one where it is above 0."""
    if isinstance(asked, tuple):
        return Chosen({at for name in asked for at in _named(name, sections, rows.named)}, asked)
    if asked == 0:
        return Chosen(set(), ())
    spoken_of = np.unique(rows.sections[rows.sections != NONE]).tolist()
    if len(spoken_of) < 2:
        raise UserError(f"data.held_out_sections = {asked}: a share needs rows from two sections or more; found {len(spoken_of)}.")
    count = min(len(spoken_of) - 1, max(1, round(asked * len(spoken_of))))
    return Chosen({spoken_of[at] for at in shuffled(len(spoken_of), seed, "held_out")[:count]}, ())


def _in(chosen: Chosen, scan: Scan) -> np.ndarray:
    """bool [rows]: of a chosen section, or of none that is known but with a chosen name."""
    if not (chosen.sections or chosen.names):
        return np.zeros(len(scan), bool)
    named = np.array([number for number, name in enumerate(scan.named) if _has_name(name, chosen.names)], np.int32)
    return np.isin(scan.sections, list(chosen.sections)) | ((scan.sections == NONE) & np.isin(scan.names, named))


def _named(name: str, sections: list[Section], named: list[str]) -> list[int]:
    found = [at for at, section in enumerate(sections) if any(_has_name(heading, (name,)) for heading in section.path)]
    if not found and not any(_has_name(heading, (name,)) for heading in named):
        headings = {heading for section in sections for heading in section.path} | set(named)
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


def _clash(rows: Scan, apart: list[tuple[Scan, np.ndarray]]) -> Clash:
    """Rows that ask or say what one of those apart asks at its end or says. The first of those apart is named, and questions first."""
    other, asked = np.full(len(rows), NONE, np.int32), np.zeros(len(rows), bool)
    for what, mine in (("asked", rows.asked), ("said", rows.said)):
        theirs = _numbered([(getattr(scan, what), mask) for scan, mask in apart], last=what == "asked")
        at = find(theirs.keys, mine.keys)
        hit = (at != NONE) & (other[mine.rows] == NONE)
        hit_rows, first = np.unique(mine.rows[hit], return_index=True)
        other[hit_rows], asked[hit_rows] = theirs.rows[at[hit][first]], what == "asked"
    return Clash(other, asked)


def asked_again(rows: Scan, trained: list[tuple[Scan, np.ndarray]]) -> np.ndarray:
    """bool [rows]: a row of `trained` (each with a mask, bool [rows]) asks what the row asks at its end, or says its text."""
    again = np.zeros(len(rows), bool)
    texts = ~np.isin(np.arange(len(rows)), rows.asked.rows)
    for mine, theirs in (
        (rows.asked.last(), [scan.asked.of(mask) for scan, mask in trained]),
        (rows.said.of(texts), [scan.said.of(mask) for scan, mask in trained]),
    ):
        again[mine.rows[np.isin(mine.keys, np.concatenate([some.keys for some in theirs]))]] = True
    return again


def _numbered(apart: list[tuple[Texts, np.ndarray]], last: bool) -> Texts:
    """Texts of the rows apart, sorted by key, each key once; rows are numbered through from the first set to the last."""
    keys, owners, before = [], [], 0
    for texts, mask in apart:
        some = (texts.last() if last else texts).of(mask)
        keys.append(some.keys)
        owners.append(before + np.cumsum(mask)[some.rows] - 1)
        before += int(mask.sum())
    unique, first = np.unique(np.concatenate(keys), return_index=True)
    return Texts(unique, np.concatenate(owners)[first].astype(np.int32))


def find(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """int64: the place of each wanted key in sorted `keys`, or NONE."""
    if not len(keys):
        return np.full(len(wanted), NONE)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, at, NONE)


class Copies:
    """Finds text of held-out sections in rows. Remembers their text, as it is compared."""

    def __init__(self, sections: Iterable[Section]):
        sections = list(sections)
        self.texts = [plain(section.text) for section in sections]
        lines = {plain(line) for section in sections for line in section.text.split("\n")}
        self.lines = sorted(line for line in lines if len(line.split()) >= 2 * LEAST_WORDS)

    def reason(self, row: Row) -> str | None:
        """Why a row must not be trained: an answer of twelve words stands in a section, or a text holds such a line of one."""
        if not self.texts:
            return None
        if row.is_text:
            text = plain(row.answer)
            return "holds a line of a held-out section" if any(line in text for line in self.lines) else None
        answers = [plain(answer) for _, answer in row.turns]
        copied = any(answer in text for answer in answers if len(words(answer)) >= 2 * LEAST_WORDS for text in self.texts)
        return "its answer stands word for word in a held-out section" if copied else None


# --- a share for validation


def _drawn(rows: Scan, among: np.ndarray, share: float, seed: int) -> np.ndarray:
    """bool [rows]: a share of the rows `among`, such that none of them shares a section, a fact, a question or an answer with the rest."""
    groups = _groups(rows, among)
    sizes = np.bincount(groups[among])
    wanted = max(1, round(share * int(among.sum())))
    order = np.array(shuffled(len(sizes), seed, "validation"))
    chosen = np.zeros(len(sizes), bool)
    left = wanted
    for group in order[sizes[order] <= wanted].tolist():
        if sizes[group] <= left:
            chosen[group], left = True, left - int(sizes[group])
        if not left:
            break
    if not chosen.any() or chosen.all():
        groups_in_words = f"{counted(len(sizes), 'group')} of such rows, the smallest of {counted(int(sizes.min()), 'row')}"
        raise UserError(
            f"data.validation = {share:g}: rows share sections, facts or words with one another, so that {wanted} of them cannot be kept "
            f"apart ({groups_in_words}). Give files with data.validation, or a larger share."
        )
    return among & chosen[np.where(among, groups, 0)]


def _groups(rows: Scan, among: np.ndarray) -> np.ndarray:
    """int [rows]: rows of `among` that share anything, directly or through others, have the same number, from 0; -1 elsewhere."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    numbers = np.arange(len(rows), dtype=np.int32)
    asked, said = rows.asked.of(among), rows.said.of(among)
    ends = np.unique(asked.last().keys)
    shared = find(ends, asked.keys) != NONE  # the beginning of a conversation counts where it is the whole of another
    marks = [
        Texts(rows.sections, numbers).of(among & (rows.sections != NONE)),
        Texts(rows.names, numbers).of(among & (rows.sections == NONE) & (rows.names != NONE)),
        Texts(rows.facts, numbers).of(among & (rows.facts != 0)),
        Texts(asked.keys[shared], asked.rows[shared]),
        said,
    ]
    owners, nodes, count = [], [], len(rows)
    for mark in marks:
        unique, node = np.unique(mark.keys, return_inverse=True)
        owners.append(mark.rows)
        nodes.append(node.astype(np.int32) + np.int32(count))
        count += len(unique)
    one, other = np.concatenate(owners), np.concatenate(nodes)
    graph = coo_matrix((np.ones(len(one), bool), (one, other)), shape=(count, count))
    labels = connected_components(graph, directed=False)[1][: len(rows)]
    groups = np.full(len(rows), NONE)
    groups[among] = np.unique(labels[among], return_inverse=True)[1]
    return groups


# --- unseen wording


def check_unseen_wording(rows: Scan, trained: np.ndarray, questions: Iterable[Row]) -> None:
    """Raises a `UserError` that lists every question which a row of `trained` (bool [rows]) asks too (case, punctuation, spaces aside)."""
    asked = rows.asked.of(trained)
    keys, first = np.unique(asked.keys, return_index=True)
    same: list[str] = []
    count = 0
    for row in questions:
        if row.is_text:
            raise UserError(f"{row.place}: data.questions holds plain text, which asks nothing. Give it with data.validation.")
        at = find(keys, np.array(asked_keys(row)[-1:], np.uint64))[0]
        if at != NONE:
            count += 1
            same += [f"{row.place} and {rows.place(int(asked.rows[first[at]]))}: {row.question[:80]}"] * (count <= SHOWN)
    if count:
        are = "s are" if count > 1 else " is"
        raise UserError(
            listed(f"data.questions: {count} question{are} trained in the same words; unseen wording needs others.", same, count)
        )
