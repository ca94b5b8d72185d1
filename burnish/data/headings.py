"""Headings found by their words alone: `4.2 Title`, `CHAPTER 4`, ALL CAPS. For text, and for PDFs whose fonts say nothing."""

import re
from collections import Counter
from dataclasses import dataclass, field

from burnish.data.blocks import Block

Number = tuple[int, ...]

LONGEST_HEADING = 110
_NUMBERED = re.compile(r"(\d{1,2}(?:\.\d{1,2}){0,5})(\.?)\s+(\S.*)")
_CHAPTER = re.compile(r"chapter\s+(\d{1,2})\b\W*(.*)", re.IGNORECASE)
_APPENDIX = re.compile(r"(?:APPENDIX|ANNEX|Appendix|Annex)\s+(?:\d{1,2}|[A-Z])\b\W*(?:[A-Z].*)?")
_ALONE = re.compile(r"\d{1,2}(?:\.\d{1,2}){1,4}\.?")
_CONTENTS_ENTRY = re.compile(r"\.{3,}|(?:\. ){3,}|…|(?:\s{2,}|\t|\.\s*)\d{1,4}$")
_LOOK_BACK = 80  # candidates; a run of so many false ones in a row has not been seen in 1,162 pages


@dataclass
class _Walk:
    """What the walk down the document's lines has seen."""

    chapter: int | None = None
    number: Number = ()
    blocks: list[Block] = field(default_factory=list)


def find_headings(lines: list[tuple[int, str]]) -> list[Block]:
    """Blocks for (page, line), in order. A chapter's title that comes back on later pages is dropped there."""
    lines = _with_numbers_joined(lines)
    chapters = {at: int(found[1]) for at, (_, line) in enumerate(lines) if (found := _chapter(line))}
    titles = _titles(lines, chapters)
    numbers = _numbered(lines, alone=not titles)
    appendices = {at for at in range(len(lines)) if _appendix(lines[at][1])}
    capitals = _capitals(lines) if len(numbers) + len(titles) < 3 else set()
    walk = _Walk()
    for at, (page, line) in enumerate(lines):
        text = line.strip()
        if at in chapters:
            _enter(walk, page, chapters[at], titles[chapters[at]])
        elif at in numbers:
            if len(numbers[at]) > 1 and numbers[at][0] in titles and walk.chapter != numbers[at][0]:
                _enter(walk, page, numbers[at][0], titles[numbers[at][0]], again=True)
            _descend(walk, page, numbers[at])
            walk.blocks.append(Block(page, text, len(numbers[at])))
        elif at in appendices:
            walk.number = ()
            walk.blocks.append(Block(page, text, 1))
        else:
            walk.blocks.append(Block(page, text if at in capitals else line.rstrip(), 1 if at in capitals else 0))
    return walk.blocks


def _descend(walk: _Walk, page: int, number: Number) -> None:
    """Puts in the number of a heading that was lost, so that `1.3.8` does not come to lie under `1.2`."""
    for depth in range(2, len(number)):
        if walk.number[:depth] != number[:depth]:
            walk.blocks.append(Block(page, ".".join(map(str, number[:depth])), depth))
    walk.number = number


def _enter(walk: _Walk, page: int, chapter: int, title: str, again: bool = False) -> None:
    if chapter == walk.chapter or (walk.chapter is not None and chapter < walk.chapter and chapter != 1 and not again):
        return  # a running title
    walk.chapter, walk.number = chapter, (chapter,)
    walk.blocks.append(Block(page, title, 1))


def _appendix(line: str) -> bool:
    text = line.strip()
    short = 0 < len(text) <= LONGEST_HEADING and text[-1] not in ".,;"
    return short and _APPENDIX.fullmatch(text) is not None and not _CONTENTS_ENTRY.search(text)


def _with_numbers_joined(lines: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """With `7.1.1` that stands alone put before the line that follows it."""
    joined: list[tuple[int, str]] = []
    number: int | None = None  # where it stands
    for page, line in lines:
        text = line.strip()
        if number is not None and text[:1].isupper():
            joined[number] = (joined[number][0], f"{joined[number][1].strip()} {text}")
        else:
            joined.append((page, line))
        if text:
            number = len(joined) - 1 if _ALONE.fullmatch(text) else None
    return joined


def _chapter(line: str) -> re.Match[str] | None:
    text = line.strip()
    found = _CHAPTER.fullmatch(text)
    good = found and len(text) <= LONGEST_HEADING and not _CONTENTS_ENTRY.search(text) and not text.endswith((".", ",", ";"))
    good = good and found and (not found[2] or found[2][0].isupper())
    return found if good else None


def _titles(lines: list[tuple[int, str]], chapters: dict[int, int]) -> dict[int, str]:
    """Each chapter's title as it is most often written."""
    ways: dict[int, Counter[str]] = {}
    for at, chapter in chapters.items():
        ways.setdefault(chapter, Counter())[" ".join(lines[at][1].split())] += 1
    return {chapter: counts.most_common(1)[0][0] for chapter, counts in ways.items()}


def _numbered(lines: list[tuple[int, str]], alone: bool) -> dict[int, Number]:
    """Numbers of the lines that are numbered headings: the longest chain of candidates in which each may follow the last.

    `alone` allows numbers of one part, `4 Fares`, where `4.1` comes next or where it stands between blank lines.
    """
    candidates = [(at, number) for at in range(len(lines)) if (number := _candidate(lines, at))]
    if not candidates:
        return {}
    following = [number for _, number in candidates[1:]] + [()]
    pairs = zip(candidates, following, strict=True)
    candidates = [
        (at, number)
        for (at, number), after in pairs
        if len(number) > 1 or (alone and (after[:2] == (*number, 1) or _between_blanks(lines, at)))
    ]
    best, before = [1] * len(candidates), [-1] * len(candidates)
    for this, (_, number) in enumerate(candidates):
        for other in range(max(0, this - _LOOK_BACK), this):
            if best[other] + 1 > best[this] and may_follow(candidates[other][1], number):
                best[this], before[this] = best[other] + 1, other
    chain: dict[int, Number] = {}
    at = max(range(len(best)), key=best.__getitem__, default=-1)
    while at >= 0:
        chain[candidates[at][0]] = candidates[at][1]
        at = before[at]
    return chain


def may_follow(last: Number, number: Number) -> bool:
    """Whether `number` can be the next heading after `last`, where up to two headings between them may have been lost."""
    if all(part == 1 for part in number) and last != number and len(number) <= 2:
        return True  # the text begins again, after a table of contents
    shared = 0
    while shared < min(len(last), len(number)) and last[shared] == number[shared]:
        shared += 1
    if shared == len(number):
        return False
    step = number[shared] - (last[shared] if shared < len(last) else 0)
    return 1 <= step <= 3 and all(part <= 2 for part in number[shared + 1 :])


def _candidate(lines: list[tuple[int, str]], at: int) -> Number | None:
    text = lines[at][1].strip()
    found = _NUMBERED.fullmatch(text)
    if not found or len(text) > LONGEST_HEADING or _CONTENTS_ENTRY.search(text) or text.endswith((".", ",", ";", ":")):
        return None
    number = tuple(int(part) for part in found[1].split("."))
    title = found[3].lstrip("“\"'(")
    if not title[:1].isupper() or not re.search(r"[^\W\d_]{3}", title) or 0 in number[:1]:
        return None
    return number


def _between_blanks(lines: list[tuple[int, str]], at: int) -> bool:
    """Between blank lines and without a full stop after its number: `3 Tickets`, not an item of a list."""
    page, line = lines[at]
    found = _NUMBERED.fullmatch(line.strip())
    return found is not None and not found[2] and _blank(lines, at - 1, page) and _blank(lines, at + 1, page)


def _blank(lines: list[tuple[int, str]], at: int, page: int) -> bool:
    return not 0 <= at < len(lines) or lines[at][0] != page or not lines[at][1].strip()


def _capitals(lines: list[tuple[int, str]]) -> set[int]:
    """Lines in capitals between blank ones; not those that come back more than twice, which are labels."""
    found = []
    for at, (page, line) in enumerate(lines):
        text = line.strip()
        letters = [letter for letter in text if letter.isalpha()]
        shaped = len(letters) >= 4 and len(text) <= LONGEST_HEADING and text.isupper() and text[-1] not in ".,;"
        if shaped and _blank(lines, at - 1, page) and _blank(lines, at + 1, page):
            found.append(at)
    counts = Counter(lines[at][1].strip() for at in found)
    return {at for at in found if counts[lines[at][1].strip()] <= 2}
