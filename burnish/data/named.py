"""Named data sets: where each comes from, its keys, its prompt, and what of it is trained. A new set is one row in NAMED.

docs/sets.md says the same for a reader. In every set the answer is trained, with the token that ends it, and nothing else.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from burnish.errors import UserError, did_you_mean


@dataclass(frozen=True)
class NamedSet:
    """One set. `parts` are the keys of what is asked; the first is needed, and the others as well unless they are `optional`."""

    hub: str | None
    """Its hub id."""
    parts: tuple[str, ...]
    answer: str
    template: str | None = None
    """A name of TEMPLATES; None leaves the choice to the model."""
    heading: str = "\n\n"
    """What the template has between the parts. Under another template they are separate paragraphs."""
    optional: frozenset[str] = frozenset()
    subset: str | None = None
    split: str = "train"
    limit: int | None = None
    """Rows that are taken where data.sets_limit does not say."""
    drawn: bool = False
    """A limited number of rows is drawn by the seed, not the first."""
    apart: int = 0
    """Rows, drawn by the seed, that are never trained: they are measured with the unseen sections."""
    turns: Callable[[str], list[tuple[str, str]]] | None = None
    """The (question, answer) pairs in the text of a whole conversation, where the set has that in the key of `answer`."""
    made: str | None = None
    """The set comes from nowhere: each answer is this text again and again, until it fills the context."""


_SPEAKER = re.compile(r"### (Human|Assistant):")


def guanaco_turns(text: str) -> list[tuple[str, str]]:
    """Each question with its answer; what nobody asked or answered falls away."""
    heads = list(_SPEAKER.finditer(text))
    ends = [*(head.start() for head in heads[1:]), *([len(text)] if heads else [])]
    turns: list[tuple[str, str]] = []
    question = None
    for head, end in zip(heads, ends, strict=True):
        said = text[head.end() : end].strip()
        if head[1] == "Human":
            question = said
        elif question is not None:
            turns.append((question, said))
            question = None
    return turns


_ALPACA = NamedSet(
    "yahma/alpaca-cleaned", ("instruction", "input"), "output", "alpaca_full", heading="\n\n### Input:\n", optional=frozenset({"input"})
)
NAMED: dict[str, NamedSet] = {
    "alpaca": _ALPACA,
    "alpaca_sample": replace(_ALPACA, limit=512),
    "dummy": replace(_ALPACA, hub=None, limit=512, made="output"),
    "guanaco": NamedSet("timdettmers/openassistant-guanaco", (), "text", "guanaco", turns=guanaco_turns),
    "sql": NamedSet(
        "knowrohit07/know_sql",
        ("context", "question"),
        "answer",
        "qna",
        heading="\n###Question:\n",
        split="validation",
        drawn=True,
        apart=1000,
    ),
    "orca_math": NamedSet("microsoft/orca-math-word-problems-200k", ("question",), "answer", "qna", drawn=True),
    "gsm8k": NamedSet("openai/gsm8k", ("question",), "answer", subset="main"),
}
SPLITS = {"train": {"train"}, "validation": {"validation", "valid", "val", "dev"}}
"""Words in the names of files that hold a split."""

_HEADINGS = sorted({kind.heading for kind in NAMED.values()} - {"\n\n"})


def without_headings(question: str) -> str:
    """A question as it is compared: its parts as separate paragraphs, whichever set's prompt it was put together for."""
    for heading in _HEADINGS:
        question = question.replace(heading, "\n\n")
    return question


def named_set(name: str) -> NamedSet:
    """The set of that name. Raises a `UserError` with the nearest name where there is none."""
    if name not in NAMED:
        raise UserError(f"{name!r}: no such data set.{did_you_mean(name, list(NAMED))} A file of rows is named by its path.")
    return NAMED[name]
