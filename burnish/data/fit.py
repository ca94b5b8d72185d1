"""Rows → samples that fit into a context: chunks of plain text, and what becomes of a row that is too long (one row in TOO_LONG)."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from burnish.data.draws import shuffled
from burnish.data.rows import SHOWN, Row, StoredRows, listed
from burnish.data.template import Template
from burnish.data.workers import in_order
from burnish.errors import UserError

ROWS_AT_ONCE = 1024
LETTERS_AT_ONCE = 1 << 20
"""Rows and characters that are tokenized in one call: enough to keep the tokenizer busy, little enough to hold."""

Report = Callable[[Row, str], None]
"""Is told of a row that is left out, and why."""


class Fitted(NamedTuple):
    """A row, or a part of one, as a sample of its own."""

    row: Row
    ids: list[int]
    mask: list[int]


def fit(rows: Iterable[Row], template: Template, context: int, too_long: str, left_out: Report, processes: int = 1) -> Iterator[Fitted]:
    """Samples of at most `context` tokens each, one by one in the order of the rows; of those that are longer, by what `too_long` names.

    The same with any number of `processes`, which tokenize conversations; plain text, and what is too long, is cut in this one.
    Raises a `UserError` that lists the rows that are refused, after the last row; nothing comes after the first of them.
    """
    refused: list[str] = []
    count = longest = 0
    for row, encoded in _encoded(rows, template, context, processes):
        if (len(encoded) == 1 and len(encoded[0].ids) <= context) or row.is_text:
            if not encoded:
                left_out(row, "has no second token, so that nothing of it could be predicted")
            if not count:
                yield from encoded
            continue
        length = len(encoded[0].ids)
        if too_long == "refuse":
            count, longest = count + 1, max(longest, length)
            refused += [f"{row.place}: {length} tokens"] * (count <= SHOWN)
            continue
        pieces = TOO_LONG[too_long](row, template, context)
        if not pieces:
            left_out(row, f"{length} tokens, more than the context's {context}")
        yield from (Fitted(piece, *template.encode(piece.turns, piece.system)) for piece in pieces)
    if count:
        are = "s are" if count > 1 else " is"
        head = (
            f"{count} row{are} longer than data.context = {context} tokens. Raise data.context (the longest needs {longest}), "
            "or set data.too_long to drop or split."
        )
        raise UserError(listed(head, refused, count))


def _encoded(rows: Iterable[Row], template: Template, context: int, processes: int) -> Iterator[tuple[Row, list[Fitted]]]:
    """Each row with its samples; a conversation has one, of any length."""
    chunks = _Chunks(template, context)
    for group, encoded in in_order(partial(_conversations, template), _groups(rows), processes):
        spoken = iter(encoded)
        for row in group:
            yield row, chunks.of(row) if row.is_text else [Fitted(row, *next(spoken))]


def _groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    group: list[Row] = []
    letters = 0
    for row in rows:
        group.append(row)
        letters += len(row.answer) + len(row.question) + sum(len(question) + len(answer) for question, answer in row.history)
        if len(group) == ROWS_AT_ONCE or letters >= LETTERS_AT_ONCE:
            yield group
            group, letters = [], 0
    yield group


def _conversations(template: Template, group: list[Row]) -> list[tuple[list[int], list[int]]]:
    """(ids, mask) of each row that is no plain text."""
    rows = [row for row in group if not row.is_text]
    try:
        encoded = template.encode_all([(row.turns, row.system) for row in rows])
    except UserError:
        for row in rows:  # to say which of them it is
            try:
                template.encode(row.turns, row.system)
            except UserError as problem:
                raise UserError(f"{row.place}: {problem}") from None
        raise
    for row, (_, mask) in zip(rows, encoded, strict=True):
        if 1 not in mask:
            raise UserError(f"{row.place}: no token of this row would be trained. Give it an answer, or remove it.")
    return encoded


# --- plain text


class _Chunks:
    """Cuts texts into contexts. Remembers the last token of a text that may go on in the next row."""

    def __init__(self, template: Template, context: int):
        self.template, self.context = template, context
        self.last: tuple[str, int, int] | None = None
        """File, number of the piece, token."""

    def of(self, row: Row) -> list[Fitted]:
        """A text's samples. Each token is trained in exactly one of them: a sample begins with the last token of the one before it.

        A text begins with the tokenizer's first token, where it has one, and ends with its end-of-text token. Without a first token
        nothing can predict the text's own first one. Empty where the text has one token alone.
        """
        encoded = self.template.tokens_of([row.answer])[0]
        before = self._before(row)
        front = [] if before is None else [before]
        eos = self.template.tokenizer.eos_token_id
        ids = [*front, *encoded.ids, *([eos] if row.ends and eos is not None else [])]
        self.last = (row.file, row.part, ids[-1]) if ids and not row.ends else None
        ends = [0] * len(front) + [end for _, end in encoded.offsets]
        return list(self._cut(row, ids, ends))

    def _before(self, row: Row) -> int | None:
        if not row.part:
            return self.template.bos_id
        follows = self.last is not None and self.last[:2] == (row.file, row.part - 1)  # the piece between may have been held out
        return self.last[2] if self.last is not None and follows else None

    def _cut(self, row: Row, ids: list[int], ends: list[int]) -> Iterator[Fitted]:
        at = 0
        for start in range(0, len(ids) - 1, self.context - 1):
            piece = ids[start : start + self.context]
            end = ends[start + len(piece) - 1] if start + len(piece) < len(ids) else len(row.answer)
            part = replace(row, answer=row.answer[at:end])
            yield Fitted(part, piece, [0] + [1] * (len(piece) - 1))
            at = max(at, end)


# --- rows that are too long


def _split(row: Row, template: Template, context: int) -> list[Row]:
    """The row as several that fit: a conversation between its turns, a turn that is too long alone within its answer."""
    rows: list[Row] = []
    turns = list(row.turns)
    while turns:
        count = len(turns)
        while count and len(template.encode(turns[:count], row.system)[0]) > context:
            count -= 1
        if count:
            *history, (question, answer) = turns[:count]
            rows.append(replace(row, question=question, answer=answer, history=tuple(history)))
        else:
            rows += _split_answer(replace(row, question=turns[0][0], answer=turns[0][1], history=()), template, context)
        turns = turns[max(1, count) :]
    return rows


def _split_answer(row: Row, template: Template, context: int) -> list[Row]:
    """The row as several that fit: its answer cut between paragraphs, else sentences, else words."""
    parts: list[str] = []
    rest = row.answer
    while rest:
        question = _question(row, len(parts) + 1)
        part = _longest_start(rest, lambda text, question=question: len(template.encode([(question, text)], row.system)[0]) <= context)
        if not part:
            raise UserError(
                f"{row.place}: the question leaves no room for an answer in {context} tokens. Raise data.context, or drop the row."
            )
        parts.append(part.strip())
        rest = rest[len(part) :].lstrip()
    return [replace(row, question=_question(row, number), answer=part) for number, part in enumerate(parts, 1)]


TOO_LONG: dict[str, Callable[[Row, Template, int], list[Row]]] = {"drop": lambda row, template, context: [], "split": _split}

_CUTS = (r"\n\s*\n", r"(?<=[.!?。])\s+|\n", r"\s+", r"")


def _question(row: Row, part: int) -> str:
    return row.question if part == 1 else f"{row.question} (continued, part {part})"


def _longest_start(text: str, fits: Callable[[str], bool]) -> str:
    """The longest start of a text that fits, cut at the best kind of place that leaves at least half of what could fit."""
    if fits(text):
        return text
    starts = []
    for cut in _CUTS:
        places = [found.end() for found in re.finditer(cut, text) if 0 < found.end() < len(text)]
        low, high = 0, len(places)  # places[:low] fit, those from high on do not
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if fits(text[: places[middle]].strip()) else (low, middle)
        starts.append(places[low - 1] if low else 0)
        if starts[-1] and cut != "":
            break
    return text[: starts[-1]]


# --- rows put together


@dataclass(frozen=True)
class Single:
    """Rows by number, with the tokens of each on its own."""

    rows: StoredRows
    lengths: np.ndarray
    """int64 [rows]."""
    joined: np.ndarray
    """bool [rows]: whether it may become a turn of a conversation: it is none yet, and no text."""


def conversations(single: Single, template: Template, turns: int, context: int, seed: int) -> Iterator[tuple[int, ...]]:
    """Numbers of the rows of each conversation, drawn by `seed`; one ends early where it is full."""
    open_rows: list[int] = []
    for at in shuffled(len(single.lengths), seed, "conversations"):
        if not single.joined[at]:
            yield (at,)
            continue
        longer = [*open_rows, at]
        # Rows on their own are at least as long as turns: each of them has the template's beginning too.
        full = len(longer) > turns or (single.lengths[longer].sum() > context and _tokens(single.rows, longer, template) > context)
        if open_rows and full:
            yield tuple(open_rows)
            longer = [at]
        open_rows = longer
    if open_rows:
        yield tuple(open_rows)


def _tokens(rows: StoredRows, numbers: list[int], template: Template) -> int:
    return len(template.encode([rows[at].turns[0] for at in numbers])[0])
