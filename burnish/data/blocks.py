"""What every reader of documents gives: blocks in reading order. And what pages of any kind need: the removal of running lines."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.data.files import read_utf8
from burnish.errors import UserError

_DIGITS = re.compile(r"\d+")
_PAGE_NUMBER = re.compile(r"(?:page\s+)?(?:\d{1,4}|[ivxl]{1,7})(?:\s*(?:of|/)\s*\d{1,4})?|[-\u2013]\s*\d{1,4}\s*[-\u2013]", re.IGNORECASE)
_BULLETS = "~•·▪■◦‣¾➢✓*-\u2013"


@dataclass(frozen=True)
class Block:
    """A heading (`level` from 1) or a piece of body text (`level` 0) on a page (from 1)."""

    page: int
    text: str
    level: int = 0


def read_document(path: Path) -> str:
    """A text file's content. Raises a `UserError` where it is empty or not UTF-8."""
    text = read_utf8(path, "data.documents")
    if not text.strip():
        raise UserError(f"{path} is empty. Remove it from data.documents.")
    return text


Look = tuple[str, Any]
"""A line and how it looks (whether it is large, where that is known): a title is not the running header of the same words."""


def running_lines(pages: list[list[Look]], edge: int = 3) -> set[Look]:
    """Keys (`line_key` and looks) of running headers and footers.

    That is: lines on at least half of the pages, or on 30 % of them among the first and last `edge` lines (left and right
    pages often differ). Empty where there are fewer than three pages: nothing can be called a running line there.
    """
    if len(pages) < 3:
        return set()
    anywhere: Counter[Look] = Counter()
    at_edges: Counter[Look] = Counter()
    for lines in pages:
        keys = [(line_key(line), look) for line, look in lines if line.strip()]
        keys = [key for key in keys if len(key[0]) > 3]  # shorter ones are bullets and labels of tables
        anywhere.update(set(keys))
        at_edges.update(set(keys[:edge] + keys[-edge:]))
    often = {key for key, count in anywhere.items() if count >= max(3, 0.5 * len(pages))}
    return often | {key for key, count in at_edges.items() if count >= max(3, 0.3 * len(pages))}


def line_key(line: str) -> str:
    """A line with its numbers and spaces made alike, so that `Manual, page 7` and `Manual, page 8` are one."""
    return _DIGITS.sub("#", " ".join(line.split()))


def is_page_number(line: str) -> bool:
    return _PAGE_NUMBER.fullmatch(line.strip()) is not None


def page_numbers(lines: list[str], edge: int = 2) -> set[int]:
    """Which of a page's lines are nothing but a page number, among the first and last `edge` that are not blank."""
    filled = [at for at, line in enumerate(lines) if line.strip()]
    return {at for at in filled[:edge] + filled[-edge:] if is_page_number(lines[at])}


def without_running_lines(pages: list[list[Look]]) -> list[list[bool]]:
    """For every line of every page whether it stays: neither a running line nor a page number."""
    running = running_lines(pages)
    kept = []
    for lines in pages:
        numbers = page_numbers([line for line, _ in lines]) if len(pages) > 1 else set()
        kept.append([at not in numbers and (line_key(line), look) not in running for at, (line, look) in enumerate(lines)])
    return kept


def rejoin_bullets(lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """(page, line) with every bullet that stands alone put before the line that follows it."""
    joined: list[tuple[int, str]] = []
    waiting = ""
    for page, line in lines:
        text = line.strip()
        if text and all(letter in _BULLETS for letter in text) and len(text) <= 2:
            waiting = text
        elif text and waiting:
            joined.append((page, f"{waiting} {text}"))
            waiting = ""
        elif text or not waiting:
            joined.append((page, line))
    return joined
