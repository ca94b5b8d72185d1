"""Rows and conversations that fit into a context. What becomes of a row that is too long is one row in TOO_LONG."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from burnish.data.held_out import LeftOut
from burnish.data.rows import Row, listed
from burnish.data.template import Template
from burnish.errors import UserError


@dataclass(frozen=True)
class Fitted:
    """Rows that fit, each with its number of tokens, and those that had to go."""

    rows: list[Row]
    lengths: list[int]
    left_out: list[LeftOut]


def length_of(template: Template, row: Row) -> int:
    """Tokens of a row as a conversation of its own. Raises a `UserError` where none of them would be trained."""
    ids, mask = template.encode([(row.question, row.answer)])
    if not any(mask):
        raise UserError(f"{row.place}: no token of this row would be trained. Give it an answer, or remove it.")
    return len(ids)


def fit(rows: list[Row], template: Template, context: int, too_long: str) -> Fitted:
    """Rows of at most `context` tokens each, by what `too_long` names."""
    lengths = [length_of(template, row) for row in rows]
    long = [(row, length) for row, length in zip(rows, lengths, strict=True) if length > context]
    if long and too_long == "refuse":
        raise UserError(
            listed(
                f"{len(long)} row{'s are' if len(long) > 1 else ' is'} longer than data.context = {context} tokens. Raise data.context, "
                "or set data.too_long to drop or split.",
                [f"{row.place}: {length} tokens" for row, length in long],
            )
        )
    kept: list[Row] = []
    left_out: list[LeftOut] = []
    for row, length in zip(rows, lengths, strict=True):
        pieces = [row] if length <= context else TOO_LONG[too_long](row, template, context)
        if not pieces:
            left_out.append(LeftOut(row, f"{length} tokens, more than the context's {context}"))
        kept += pieces
    return Fitted(kept, [length_of(template, row) for row in kept] if long else lengths, left_out)


def _split(row: Row, template: Template, context: int) -> list[Row]:
    """The row as several that fit: its answer cut between paragraphs, else sentences, else words."""
    parts: list[str] = []
    rest = row.answer
    while rest:
        question = _question(row, len(parts) + 1)
        part = _longest_start(rest, lambda text, question=question: len(template.encode([(question, text)])[0]) <= context)
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


def conversations(
    rows: list[Row], lengths: list[int], template: Template, turns: int, context: int, seed: int
) -> Iterator[tuple[int, ...]]:
    """Numbers of the rows of each conversation. Several turns are drawn by `seed`; a conversation ends early where it is full."""
    if turns == 1:
        yield from ((at,) for at in range(len(rows)))
        return
    draws = np.random.PCG64(np.random.SeedSequence([seed, 2])).random_raw(len(rows))
    open_rows: list[int] = []
    for at in np.argsort(draws, kind="stable").tolist():
        longer = [*open_rows, at]
        # Rows on their own are at least as long as turns: each of them has the template's beginning too.
        full = len(longer) > turns or (sum(lengths[row] for row in longer) > context and _tokens(rows, longer, template) > context)
        if open_rows and full:
            yield tuple(open_rows)
            longer = [at]
        open_rows = longer
    if open_rows:
        yield tuple(open_rows)


def _tokens(rows: list[Row], numbers: list[int], template: Template) -> int:
    return len(template.encode([(rows[at].question, rows[at].answer) for at in numbers])[0])
