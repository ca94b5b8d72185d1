"""Which section of the documents a row speaks of: by the section it names, else by its page and words, else by its words alone."""

import re
from collections import defaultdict
from itertools import pairwise

import numpy as np

from burnish.data.rows import Row
from burnish.data.sections import Section

_WORD = re.compile(r"\w+")
NEEDED_SHARE = 0.5  # of the answer's words, rare ones counting more; below it an answer cannot be said to come from there


class Finder:
    """Finds sections for rows. Remembers which words stand where."""

    def __init__(self, sections: list[Section]):
        self.sections = sections
        self.words = [set(words(section.text)) | set(words(" ".join(section.path))) for section in sections]
        self.by_page: dict[int, list[int]] = defaultdict(list)
        self.by_heading: dict[str, list[int]] = defaultdict(list)
        postings: dict[str, list[int]] = defaultdict(list)
        for at, section in enumerate(sections):
            for page in range(section.page, section.last_page + 1):
                self.by_page[page].append(at)
            for name in {plain(section.path[-1]), plain(" > ".join(section.path))} if section.path else set():
                self.by_heading[name].append(at)
            for word in self.words[at]:
                postings[word].append(at)
        self.postings = {word: np.asarray(places) for word, places in postings.items()}
        self.weight = {word: float(np.log(1 + len(sections) / len(places))) for word, places in postings.items()}
        self.page_words: dict[int, list[set[str]]] = {}
        self.unknown_weight = float(np.log(1 + len(sections)))

    def find(self, row: Row) -> int | None:
        """Number of the row's section, or None where nothing fits. Plain text has one only where it names a section or a page."""
        return self._find(row) if self.sections else None

    def _find(self, row: Row) -> int | None:
        if row.section is not None and (named := self._named(row.section)):
            on_page = [at for at in named if row.page is not None and at in self.by_page.get(row.page, ())]
            return self._best(row, on_page or named, needed=0.0)
        if row.page is not None:
            return self._best(row, self.by_page.get(row.page, []), needed=0.0)
        return None if row.is_text else self._best(row, None, needed=NEEDED_SHARE)

    def page(self, row: Row, at: int) -> int:
        """The page of section `at` that shares most words with the row's answer."""
        section = self.sections[at]
        if at not in self.page_words:
            bounds = [0, *section.page_starts, len(section.text)]
            self.page_words[at] = [set(words(section.text[start:end])) for start, end in pairwise(bounds)]
        asked = set(words(row.said))
        return section.page + int(np.argmax([len(asked & on_page) for on_page in self.page_words[at]]))

    def _named(self, name: str) -> list[int]:
        exact = self.by_heading.get(plain(name))
        if exact:
            return exact
        wanted = plain(name)
        return [at for at, section in enumerate(self.sections) if wanted and any(wanted in plain(part) for part in section.path)]

    def _best(self, row: Row, among: list[int] | None, needed: float) -> int | None:
        """The section with the largest weighted share of the answer's words; the question's words decide between equals."""
        if among is not None and len(among) <= 1:
            return among[0] if among else None
        shares = self._shares(row.said)
        if among is None:
            among = np.flatnonzero(shares >= max(needed, shares.max() - 1e-9)).tolist()
            if not among:
                return None
        asked = self._shares(row.asked)
        return max(among, key=lambda at: (round(float(shares[at]), 9), float(asked[at]), -at))

    def _shares(self, text: str) -> np.ndarray:
        """Float [sections]: the weighted share of a text's distinct words that stands in each section."""
        shared = np.zeros(len(self.sections))
        total = 0.0
        for word in set(words(text)):
            weight = self.weight.get(word, self.unknown_weight)
            total += weight
            if word in self.postings:
                shared[self.postings[word]] += weight
        return shared / total if total else shared


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a text."""
    return _WORD.findall(text.casefold())


def plain(text: str) -> str:
    """Text as it is compared: casefolded, without punctuation, single spaces."""
    return " ".join(words(text.replace("_", " ")))
