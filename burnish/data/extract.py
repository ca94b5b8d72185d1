"""Rows made from sections without a model. A new kind is one function and one row in KINDS."""

from collections import Counter
from collections.abc import Callable

from burnish.data.rows import Row
from burnish.data.sections import Section
from burnish.errors import UserError, did_you_mean


def _recall(sections: list[Section]) -> list[Row]:
    """Each section asked for by its heading; by its whole path where the heading alone would be that of several."""
    named = [section for section in sections if section.path]
    last = Counter(section.path[-1] for section in named)
    whole = Counter(section.path for section in named)
    files = len({section.file for section in named})
    rows = []
    for section in named:
        name = section.path[-1] if last[section.path[-1]] == 1 else " > ".join(section.path)
        if whole[section.path] > 1:
            where = f" of {section.file.rpartition('/')[2]}" if files > 1 else ""
            name += f" (page {section.page}{where})"
        question = f'What does the section "{name}" say?'
        rows.append(Row(question, section.text.strip(), section.file, 1, section.page, " > ".join(section.path)))
    return rows


KINDS: dict[str, Callable[[list[Section]], list[Row]]] = {"none": lambda sections: [], "recall": _recall}


def extract_rows(sections: list[Section], kind: str, limit: int | None = None) -> list[Row]:
    """Rows of a kind, the first `limit` of them, in the order of the sections. Their line is 1: a section has a page instead."""
    if kind not in KINDS:
        raise UserError(f"{kind!r} is no way to make rows from documents.{did_you_mean(kind, list(KINDS))}")
    return KINDS[kind](sections)[:limit]
