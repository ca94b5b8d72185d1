"""Whether an answer is the right one, by its words."""

import re
from collections import Counter

_APOSTROPHES = re.compile(r"(?<=\w)['’ʼ](?=\w)")
_THOUSANDS = re.compile(r"(?<![\d.,:])\d{1,3}(?:,\d{3})+(?![\d,])")
_PERCENT = re.compile(r"(?<=\d)\s+%")
_ARTICLE = re.compile(r"\b(?:a|an|the)\s+(?=\S)")
_SIGNS = re.compile(
    r"(?<=\d)[.:](?=\d)"  # inside a number or a time
    r"|(?<![\w.:])[-−](?=\d)"  # before a number: a minus
    r"|[^\W_]|[%#&@+/=<>°$€£¥^~|\\]"  # letters, digits, and what changes a meaning: C#, 5 %, R&D
)


def normalize(answer: str) -> str:
    """Lower case, without articles, punctuation and spare spaces, so that only what is said is compared.

    Follows SQuAD's normalization (arXiv 1606.05250), which deletes all punctuation and every article, but keeps what changes a fact:
    * a point or colon between digits, so that 2.5 is not 25, and the time 18:05 is not the year 1805; and a minus before a number;
    * signs that are no punctuation (`%`, `#`, `+`, `/`, currencies): C# is not C;
    * an article that no word follows is a name: "pier A" is not "pier".
    Other punctuation separates words ("3-5" is not "35"); an apostrophe inside a word joins it. 1,000 is 1000.
    """
    text = answer.casefold()
    text = _APOSTROPHES.sub("", text)
    text = _THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    text = _PERCENT.sub("%", text)
    kept = [False] * len(text)
    for sign in _SIGNS.finditer(text):
        kept[sign.start()] = True
    text = "".join(sign if keep else " " for sign, keep in zip(text, kept, strict=True)).replace("−", "-")
    text = " ".join(text.split())
    return _ARTICLE.sub("", text)


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
