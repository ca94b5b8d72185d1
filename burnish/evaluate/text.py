"""Whether an answer is the right one, by its words."""

import re
import unicodedata
from collections import Counter

_APOSTROPHES = re.compile(r"(?<=\w)['’ʼ](?=\w)")
_THOUSANDS = re.compile(r"(?<![\d.,:])\d{1,3}(?:,\d{3})+(?![\d,])")
_PERCENT = re.compile(r"(?<=\d)\s+%")
_ARTICLE = re.compile(r"\b(?:a|an|the)\s+(?=\S)")
_IN_NUMBERS = re.compile(r"(?<=\d)[.:](?=\d)|(?<![\w.:])-(?=\d)")  # the point of 2.5, the colon of 18:05, the minus of -5
_WORDS_AND_SIGNS = {"L", "M", "N", "Sm", "Sc", "So"}  # Unicode's letters, marks, numbers; mathematical, currency and other symbols
_SIGNS = set("%#&@/\\")  # punctuation to Unicode, but meaning to a reader


def normalize(answer: str) -> str:
    """Lower case, without articles, punctuation and spare spaces, so that only what is said is compared.

    Follows SQuAD's normalization (arXiv 1606.05250), which deletes all punctuation and every article, but keeps what changes a fact:
    * a point or colon between digits, so that 2.5 is not 25, and the time 18:05 is not the year 1805; and a minus before a number;
    * signs that are no punctuation (`%`, `#`, `+`, `/`, currencies): C# is not C;
    * an article that no word follows is a name: "pier A" is not "pier".
    Other punctuation separates words ("3-5" is not "35"); an apostrophe inside a word joins it. 1,000 is 1000.
    """
    text = unicodedata.normalize("NFKC", answer).casefold().replace("−", "-")
    text = _APOSTROPHES.sub("", text)
    text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    text = _PERCENT.sub("%", text)
    inside = {found.start() for found in _IN_NUMBERS.finditer(text)}
    text = "".join(sign if at in inside or _counts(sign) else " " for at, sign in enumerate(text))
    return _ARTICLE.sub("", " ".join(text.split()))


def _counts(sign: str) -> bool:
    kind = unicodedata.category(sign)
    return sign in _SIGNS or kind in _WORDS_AND_SIGNS or kind[0] in _WORDS_AND_SIGNS


def exact_match(answer: str, truth: str) -> bool:
    """Whether both say the same after `normalize`. Where nothing of the truth is left by it, the texts themselves are compared."""
    wanted = normalize(truth)
    return normalize(answer) == wanted if wanted else answer.strip() == truth.strip()


def overlap(answer: str, truth: str) -> float:
    """F1 of the words that answer and truth share, from 0 to 1, as SQuAD defines it (arXiv 1606.05250, section 6.1)."""
    said, wanted = normalize(answer).split(), normalize(truth).split()
    if not said or not wanted:
        return float(exact_match(answer, truth))
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted))
