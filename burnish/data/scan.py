"""What rows have in common, without their texts: at most 60 bytes a row, so that millions can be parted and compared."""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from burnish.data.attribute import Finder, plain
from burnish.data.named import without_headings
from burnish.data.rows import Row

LEAST_WORDS = 6  # a shorter answer ("Heron", "5 kg") is shared by chance
NONE = -1


class Texts(NamedTuple):
    """Keys of texts, and the rows that hold them. Two texts that differ have one key in 10^7 sets of two million, or fewer."""

    keys: np.ndarray
    """uint64 [texts], in the order of the rows."""
    rows: np.ndarray
    """int32 [texts]."""

    def of(self, rows: np.ndarray) -> "Texts":
        """Those of some rows, bool [rows]."""
        among = rows[self.rows]
        return Texts(self.keys[among], self.rows[among])

    def last(self) -> "Texts":
        """The last one of each row."""
        is_last = np.append(self.rows[1:] != self.rows[:-1], True)[: len(self.rows)]
        return Texts(self.keys[is_last], self.rows[is_last])


@dataclass(frozen=True)
class Scan:
    """What is known of each row of a source. `asked` and `said` are empty where nothing is to be compared."""

    sections: np.ndarray
    """int32 [rows]: number of the document's section, or NONE."""
    names: np.ndarray
    """int32 [rows]: the section that the row itself names, as a place in `named`, or NONE."""
    named: list[str]
    facts: np.ndarray
    """uint64 [rows]: key of the fact, 0 where the row has none."""
    asked: Texts
    """What a model is asked in each turn: the conversation up to there."""
    said: Texts
    """Answers of LEAST_WORDS words or more, and texts."""
    files: list[str]
    file: np.ndarray
    """int32 [rows]: a place in `files`."""
    line: np.ndarray
    """int64 [rows]."""

    def __len__(self) -> int:
        return len(self.sections)

    def place(self, row: int) -> str:
        return f"{self.files[self.file[row]]}:{self.line[row]}"


def scan(rows: Iterable[Row], finder: Finder, compare: bool = True) -> Scan:
    """One pass over the rows. `compare` makes the keys of their texts, which is what costs time."""
    sections, names, facts, file, line = array("i"), array("i"), array("Q"), array("i"), array("q")
    asked, said = (array("Q"), array("i")), (array("Q"), array("i"))
    named: dict[str, int] = {}
    files: dict[str, int] = {}
    for number, row in enumerate(rows):
        at = finder.find(row)
        sections.append(NONE if at is None else at)
        if not compare:
            continue
        names.append(NONE if row.section is None else named.setdefault(row.section, len(named)))
        facts.append(0 if row.fact is None else key(row.fact))
        file.append(files.setdefault(row.file, len(files)))
        line.append(row.line)
        for (keys, owners), values in ((asked, asked_keys(row)), (said, said_keys(row))):
            keys.extend(values)
            owners.extend([number] * len(values))
    return Scan(
        _array(sections, np.int32),
        _array(names, np.int32),
        list(named),
        _array(facts, np.uint64),
        Texts(_array(asked[0], np.uint64), _array(asked[1], np.int32)),
        Texts(_array(said[0], np.uint64), _array(said[1], np.int32)),
        list(files),
        _array(file, np.int32),
        _array(line, np.int64),
    )


def _array(values: array, dtype: type) -> np.ndarray:
    return np.frombuffer(values, dtype) if len(values) else np.zeros(0, dtype)


def key(text: str) -> int:
    """64 bits of a text's hash, the same in every process; never 0."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little") or 1


def asked_keys(row: Row) -> list[int]:
    """A key of each prompt that the row trains an answer to: case, punctuation and spaces do not count."""
    if row.is_text:
        return []
    said = ""
    keys = []
    for question, answer in row.turns:
        said = f"{said} {plain(without_headings(question))}"
        keys.append(key(said))
        said = f"{said} {plain(answer)}"
    return keys


def said_keys(row: Row) -> list[int]:
    """A key of each answer that is long enough to be no chance; of a text in any case."""
    answers = [plain(answer) for _, answer in row.turns]
    return [key(answer) for answer in answers if row.is_text or answer.count(" ") >= LEAST_WORDS - 1]
